/* The outside hold on real taps. The "guest" is this program writing into a tap, so that it is known exactly what
 * was sent when; the tap, a bridge and the receiver are in a network namespace that belongs to a process, the "VM".
 *
 *      we write -> tap0 (2 queues) - br0 - v0 ======= v1 -> AF_PACKET socket, read by us
 *
 * Needs root, /dev/net/tun, iproute2 and a kernel with cls_bpf; skipped otherwise. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "remus/output_internal.h"
#include "tests/lib/check.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/ethtool.h>
#include <linux/if_packet.h>
#include <linux/if_tun.h>
#include <linux/sockios.h>
#include <linux/virtio_net.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <netinet/ip.h>
#include <netinet/tcp.h>
#include <netinet/udp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>

#define QUEUES 2
#define TEST_PROTO 0x88b5 /* local experimental */
#define LINK_SETUP                                                                                \
    "ip link set lo up && ip link add br0 type bridge && ip link set br0 up && "                  \
    "ip link add v0 type veth peer name v1 && ip link set v0 master br0 && "                      \
    "ip link set tap0 master br0 && ip link set v0 up && ip link set v1 up && "                   \
    "ip link set tap0 up"
#define ROUTED_SETUP "ip link set lo up && ip addr add 10.9.0.1/24 dev tap0 && ip link set tap0 up"

/* ------------------------------------------------------------- the stage */

struct world {
    struct lb_hv_vm_base base; /* first: this is the VM's handle */
    struct lb_vm_ident ident;
    struct lb_nic nics[2];
    unsigned n_nics;
    pid_t vm;                  /* owner of the namespace */
    int netns, tap[QUEUES];
    int rx;                    /* packets on v1, or UDP in the namespace */
    char run_dir[64];
    uint64_t next[QUEUES];     /* what the receiver expects */
    uint64_t received, lost;
    bool gaps;                 /* a frame may be missing */
};

static int world_nics(struct lb_hv_vm *vm, struct lb_nic **out, unsigned *n, struct lb_error *err)
{
    struct world *w = (struct world *)vm;
    (void)err;
    *out = lb_alloc(sizeof(w->nics));
    memcpy(*out, w->nics, sizeof(w->nics));
    *n = w->n_nics;
    return 0;
}

static void world_ident(struct lb_hv_vm *vm, struct lb_vm_ident *out)
{
    *out = ((struct world *)vm)->ident;
}

static const struct lb_hv_ops world_ops = {.name = "test", .nics = world_nics, .ident = world_ident};

static struct lb_hv_vm *handle(struct world *w)
{
    return (struct lb_hv_vm *)w;
}

static int open_tap(void)
{
    struct ifreq ifr = {.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE};
    int hdr = LB_VNET_HDR, fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    strcpy(ifr.ifr_name, "tap0");
    if (fd < 0 || ioctl(fd, TUNSETIFF, &ifr) < 0 || ioctl(fd, TUNSETVNETHDRSZ, &hdr) < 0)
        return -1;
    return fd;
}

static int open_rx(bool routed)
{
    int fd = routed ? socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0)
                    : socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, 0);
    int big = 64 << 20;
    setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &big, sizeof(big));
    if (routed) {
        struct sockaddr_in in = {.sin_family = AF_INET, .sin_port = htons(9000)};
        return bind(fd, (void *)&in, sizeof(in)) < 0 ? -1 : fd;
    }
    struct sockaddr_ll ll = {.sll_family = AF_PACKET, .sll_protocol = htons(TEST_PROTO),
                             .sll_ifindex = (int)if_nametoindex("v1")};
    return bind(fd, (void *)&ll, sizeof(ll)) < 0 ? -1 : fd;
}

static void vm_main(int sock, bool routed)
{
    int fds[QUEUES + 1] = {-1, -1, -1};
    char ok = 0;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (unshare(CLONE_NEWNET) == 0) {
        for (int i = 0; i < QUEUES; i++)
            fds[i] = open_tap();
        if (fds[0] >= 0 && fds[1] >= 0 && system(routed ? ROUTED_SETUP : LINK_SETUP) == 0)
            fds[QUEUES] = open_rx(routed);
        ok = fds[QUEUES] >= 0;
    }
    if (!ok || lb_send_fds(sock, &ok, 1, fds, QUEUES + 1, NULL) < 0)
        _exit(1);
    for (int i = 0; i <= QUEUES; i++)
        close(fds[i]);
    for (;;)
        pause();
}

static void world_start(struct world *w, bool routed)
{
    int sv[2], fds[QUEUES + 1];
    unsigned n = QUEUES + 1;
    char ok, path[64];
    memset(w, 0, sizeof(*w));
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sv), 0);
    w->vm = fork();
    assert_true(w->vm >= 0);
    if (w->vm == 0) {
        close(sv[0]);
        vm_main(sv[1], routed);
    }
    close(sv[1]);
    assert_int_equal(lb_recv_fds(sv[0], &ok, 1, fds, &n, NULL), 1);
    close(sv[0]);
    memcpy(w->tap, fds, sizeof(w->tap));
    w->rx = fds[QUEUES];
    snprintf(path, sizeof(path), "/proc/%d/ns/net", (int)w->vm);
    w->netns = open(path, O_RDONLY | O_CLOEXEC);
    strcpy(w->run_dir, "/tmp/lbo.XXXXXX");
    assert_non_null(mkdtemp(w->run_dir));
    w->base = (struct lb_hv_vm_base){.ops = &world_ops, .state = LB_HV_RUNNING};
    w->ident.name = "t";
    OK(lb_proc_identify(w->vm, &w->ident.proc, err));
    w->n_nics = 1;
    w->nics[0] = (struct lb_nic){.id = "n0", .kind = LB_NIC_TAP, .ifname = "tap0", .queues = QUEUES};
}

static void world_end(struct world *w)
{
    kill(w->vm, SIGKILL);
    waitpid(w->vm, NULL, 0);
    for (int i = 0; i < QUEUES; i++)
        close(w->tap[i]);
    close(w->rx);
    close(w->netns);
    lb_remove_tree(w->run_dir, NULL);
}

/* A shell command in the namespace; its exit status. */
static int in_world(struct world *w, const char *command)
{
    int status = -1;
    pid_t p = fork();
    if (p == 0) {
        if (setns(w->netns, CLONE_NEWNET) < 0)
            _exit(125);
        execl("/bin/sh", "sh", "-c", command, (char *)NULL);
        _exit(126);
    }
    waitpid(p, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/* Nothing of ours in the namespace. */
static void assert_clean(struct world *w)
{
    assert_int_not_equal(in_world(w, "ip -o link | grep -q 'lb[hi][0-9]'"), 0);
    assert_int_not_equal(in_world(w, "tc qdisc show dev tap0 | grep -q clsact"), 0);
    char path[96];
    snprintf(path, sizeof(path), "%s/output.json", w->run_dir);
    assert_int_not_equal(access(path, F_OK), 0);
}

/* ------------------------------------------------------------ guest and receiver */

struct test_frame {
    unsigned char vnet[LB_VNET_HDR];
    struct ether_header eth;
    uint32_t queue;
    uint64_t seq;
    unsigned char pad[32];
} __attribute__((packed));

static void send_frame(struct world *w, unsigned queue, uint64_t seq)
{
    struct test_frame f;
    memset(&f, 0, sizeof(f));
    memcpy(f.eth.ether_dhost, "\x02\xff\xff\xff\xff\x01", 6);
    memcpy(f.eth.ether_shost, "\x02\xff\xff\xff\xff\x02", 6);
    f.eth.ether_type = htons(TEST_PROTO);
    f.queue = queue;
    f.seq = seq;
    assert_int_equal(write(w->tap[queue], &f, sizeof(f)), sizeof(f));
}

/* One frame within wait_ms; asserts that it is the next of its queue. */
static bool receive(struct world *w, int wait_ms, unsigned *queue, uint64_t *seq)
{
    struct test_frame f;
    struct pollfd p = {.fd = w->rx, .events = POLLIN};
    if (poll(&p, 1, wait_ms) != 1)
        return false;
    ssize_t n = recv(w->rx, &f.eth, sizeof(f) - LB_VNET_HDR, 0);
    assert_true(n >= (ssize_t)(sizeof(f.eth) + 12));
    assert_true(f.queue < QUEUES);
    if (w->gaps && f.seq > w->next[f.queue]) {
        w->lost += f.seq - w->next[f.queue];
        w->next[f.queue] = f.seq;
    }
    if (f.seq != w->next[f.queue])
        fail_msg("queue %u: frame %llu, expected %llu", f.queue, (unsigned long long)f.seq,
                 (unsigned long long)w->next[f.queue]);
    w->next[f.queue]++;
    w->received++;
    *queue = f.queue;
    *seq = f.seq;
    return true;
}

/* Everything up to limit[] (exclusive) arrives, nothing else does. */
static void expect_until(struct world *w, const uint64_t limit[QUEUES], int more_ms)
{
    unsigned q;
    uint64_t seq;
    while (w->next[0] < limit[0] || w->next[1] < limit[1])
        if (!receive(w, 2000, &q, &seq))
            fail_msg("lost: %llu of %llu, %llu of %llu", (unsigned long long)w->next[0],
                     (unsigned long long)limit[0], (unsigned long long)w->next[1],
                     (unsigned long long)limit[1]);
    while (receive(w, more_ms, &q, &seq))
        ;
    assert_int_equal(w->next[0], limit[0]);
    assert_int_equal(w->next[1], limit[1]);
}

/* A guest that sends on both queues until stopped. `running` is the vCPU: held while stopped. */
struct guest {
    struct world *w;
    pthread_t thread;
    pthread_mutex_t running;
    uint64_t sent[QUEUES];
    bool end;
    unsigned burst;
};

static void *guest_main(void *arg)
{
    struct guest *g = arg;
    for (;;) {
        pthread_mutex_lock(&g->running);
        if (g->end)
            break;
        for (unsigned i = 0; i < g->burst; i++) {
            unsigned q = (unsigned)((g->sent[0] + g->sent[1]) * 7 / 3 % QUEUES);
            send_frame(g->w, q, g->sent[q]);
            g->sent[q]++;
        }
        pthread_mutex_unlock(&g->running);
        usleep(50);
    }
    pthread_mutex_unlock(&g->running);
    return NULL;
}

static void guest_start(struct guest *g, struct world *w, unsigned burst)
{
    memset(g, 0, sizeof(*g));
    g->w = w;
    g->burst = burst;
    pthread_mutex_init(&g->running, NULL);
    assert_int_equal(pthread_create(&g->thread, NULL, guest_main, g), 0);
}

static void guest_stop(struct guest *g)
{
    pthread_mutex_lock(&g->running);
}

static void guest_cont(struct guest *g)
{
    pthread_mutex_unlock(&g->running);
}

static void guest_end(struct guest *g) /* running */
{
    guest_stop(g);
    g->end = true;
    guest_cont(g);
    pthread_join(g->thread, NULL);
}

static struct lb_output *open_output(struct world *w)
{
    struct lb_output *o = NULL;
    OK(lb_output_open(handle(w), &w->ident, w->run_dir, &o, err));
    return o;
}

static struct lb_output *open_armed(struct world *w)
{
    struct lb_output *o = open_output(w);
    OK(lb_output_arm(o, err));
    lb_output_gate(o, UINT64_MAX);
    return o;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* ----------------------------------------------------------------- the tests */

static void mark(struct lb_output *o, uint64_t epoch)
{
    lb_output_mark_begin(o, epoch);
    OK(lb_output_mark_end(o, err));
}

/* Attach, many epochs and detach under one numbered flow: nothing early, lost, doubled or out of order. */
static void test_epochs(void **state)
{
    enum { EPOCHS = 300 };
    static double us[EPOCHS];
    struct world w;
    struct guest g;
    uint64_t before[QUEUES] = {0}, allowed[QUEUES] = {0};
    (void)state;
    world_start(&w, false);
    guest_start(&g, &w, 8);
    usleep(20000);
    struct lb_output *o = open_output(&w);
    lb_output_gate(o, UINT64_MAX);
    usleep(5000);
    guest_stop(&g);
    OK(lb_output_arm(o, err));
    memcpy(allowed, g.sent, sizeof(allowed));
    for (unsigned e = 0; e < EPOCHS; e++) {
        guest_cont(&g);
        usleep(2000 + e % 7 * 500);
        guest_stop(&g);
        uint64_t t0 = lb_now_ns();
        mark(o, e);
        us[e] = (double)(lb_now_ns() - t0) / 1e3;
        OK(lb_output_verify(o, err));
        /* released is the epoch before the one that has just ended: that and no more has arrived */
        expect_until(&w, allowed, 0);
        memcpy(before, allowed, sizeof(before));
        memcpy(allowed, g.sent, sizeof(allowed));
        if (e % 3 != 0) { /* some epochs together with the next */
            lb_output_release(o, e);
        } else {
            memcpy(allowed, before, sizeof(allowed));
        }
    }
    struct lb_output_stats s;
    lb_output_get_stats(o, &s);
    assert_int_equal(s.dropped_packets, 0);
    OK(lb_output_disarm(o, true, err));
    guest_cont(&g);
    usleep(10000);
    lb_output_close(o);
    usleep(5000);
    guest_end(&g);
    expect_until(&w, g.sent, 20);
    qsort(us, EPOCHS, sizeof(us[0]), by_value);
    print_message("%llu frames, %d epochs; mark p50 %.0f us, p99 %.0f us\n",
                  (unsigned long long)w.received, EPOCHS, us[EPOCHS / 2], us[EPOCHS * 99 / 100]);
    assert_clean(&w);
    world_end(&w);
}

static void test_nothing_held_when_not_armed(void **state)
{
    struct world w;
    (void)state;
    world_start(&w, false);
    struct lb_output *o = open_output(&w);
    send_frame(&w, 0, 0);
    expect_until(&w, (uint64_t[]){1, 0}, 20);
    lb_output_close(o);
    send_frame(&w, 0, 1);
    expect_until(&w, (uint64_t[]){2, 0}, 20);
    assert_clean(&w);
    world_end(&w);
}

static void test_drop_at_disarm(void **state)
{
    struct world w;
    (void)state;
    world_start(&w, false);
    struct lb_output *o = open_armed(&w);
    for (uint64_t i = 0; i < 100; i++)
        send_frame(&w, 0, i);
    mark(o, 1);
    OK(lb_output_disarm(o, false, err));
    lb_output_close(o);
    w.next[0] = 100; /* never seen */
    send_frame(&w, 0, 100);
    expect_until(&w, (uint64_t[]){101, 0}, 20);
    assert_clean(&w);
    world_end(&w);
}

/* A holder in a process of its own, which lets every epoch of 2 ms go as long as its lease is renewed in *lease. */
static pid_t start_holder(struct world *w, volatile uint64_t *lease)
{
    pid_t p = fork();
    assert_true(p >= 0);
    if (p)
        return p;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    struct lb_output *o;
    if (lb_output_open(handle(w), &w->ident, w->run_dir, &o, NULL) < 0 ||
        lb_output_arm(o, NULL) < 0)
        _exit(1);
    lease[1] = 1; /* armed */
    for (uint64_t e = 0;; e++) {
        lb_output_gate(o, lease[0]);
        lb_output_mark_begin(o, e);
        if (lb_output_mark_end(o, NULL) < 0)
            _exit(1);
        lb_output_release(o, e);
        usleep(2000);
    }
}

static volatile uint64_t *shared_lease(void)
{
    void *p = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    assert_true(p != MAP_FAILED);
    return p;
}

static void wait_armed(volatile uint64_t *lease)
{
    for (int i = 0; i < 2000 && !lease[1]; i++)
        usleep(1000);
    assert_true(lease[1]);
}

/* Killed: not a frame leaks, the guest still hears, and after clearing up it is heard again. */
static void test_killed_holder(void **state)
{
    struct world w;
    volatile uint64_t *lease = shared_lease();
    char buf[2048];
    (void)state;
    for (int round = 0; round < 5; round++) {
        world_start(&w, false);
        lease[0] = UINT64_MAX;
        lease[1] = 0;
        pid_t holder = start_holder(&w, lease);
        wait_armed(lease);
        for (uint64_t i = 0; i < 500; i++)
            send_frame(&w, 0, i);
        expect_until(&w, (uint64_t[]){500, 0}, 0);
        struct lb_error e = LB_ERROR_INIT;
        assert_int_equal(lb_output_clear_stale(&w.ident, handle(&w), w.run_dir, &e), -1);
        assert_int_equal(e.code, LB_E_STATE); /* not while it lives */
        kill(holder, SIGKILL);
        waitpid(holder, NULL, 0);
        for (uint64_t i = 500; i < 1500; i++)
            send_frame(&w, (unsigned)(i & 1), i);
        unsigned q;
        uint64_t seq;
        assert_false(receive(&w, 50, &q, &seq));
        while (read(w.tap[0], buf, sizeof(buf)) > 0 || read(w.tap[1], buf, sizeof(buf)) > 0)
            ;
        struct test_frame in = {.eth.ether_type = htons(TEST_PROTO)};
        memset(in.eth.ether_dhost, 0xff, 6);
        assert_true(send(w.rx, &in.eth, sizeof(in) - LB_VNET_HDR, 0) > 0);
        struct pollfd p[2] = {{.fd = w.tap[0], .events = POLLIN}, {.fd = w.tap[1], .events = POLLIN}};
        assert_true(poll(p, 2, 1000) > 0);
        /* with the record, or without it */
        if (round % 2)
            snprintf(buf, sizeof(buf), "%s/output.json", w.run_dir), unlink(buf);
        OK(lb_output_clear_stale(&w.ident, handle(&w), w.run_dir, err));
        OK(lb_output_clear_stale(&w.ident, handle(&w), w.run_dir, err)); /* nothing there: success */
        w.next[0] = w.next[1] = 1500;
        send_frame(&w, 0, 1500);
        expect_until(&w, (uint64_t[]){1501, 1500}, 20);
        assert_int_not_equal(in_world(&w, "ip -o link | grep -q 'lb[hi][0-9]'"), 0);
        if (round % 2 == 0)
            assert_clean(&w);
        world_end(&w);
    }
    munmap((void *)lease, 4096);
}

/* Giving up in the holder itself: its own hold it may clear. */
static void test_clear_own(void **state)
{
    struct world w;
    (void)state;
    world_start(&w, false);
    struct lb_output *o = open_armed(&w);
    OK(lb_output_clear_stale(&w.ident, handle(&w), w.run_dir, err));
    send_frame(&w, 0, 0);
    expect_until(&w, (uint64_t[]){1, 0}, 20);
    lb_output_close(o);
    assert_clean(&w);
    world_end(&w);
}

/* As recovery does it for a VM whose process is gone: from the namespace of the host. */
static void clear_dead(struct world *w)
{
    int status;
    pid_t p = fork();
    if (p == 0) {
        struct lb_vm_ident gone = w->ident;
        gone.proc.start_ticks++; /* nobody is that */
        _exit(setns(w->netns, CLONE_NEWNET) < 0 ||
              lb_output_clear_stale(&gone, NULL, w->run_dir, NULL) < 0);
    }
    waitpid(p, &status, 0);
    assert_int_equal(status, 0);
}

static void armed_and_killed(struct world *w)
{
    volatile uint64_t *lease = shared_lease();
    world_start(w, false);
    pid_t holder = start_holder(w, lease);
    wait_armed(lease);
    kill(holder, SIGKILL);
    waitpid(holder, NULL, 0);
    munmap((void *)lease, 4096);
    assert_int_equal(in_world(w, "ip -o link | grep -q 'lbh[0-9]'"), 0);
}

/* VM and holder are dead. The guest's tap may be persistent, or have gone with the VM. */
static void test_stale_of_dead_vm(void **state)
{
    struct world w;
    (void)state;
    armed_and_killed(&w);
    clear_dead(&w);
    send_frame(&w, 0, 0);
    expect_until(&w, (uint64_t[]){1, 0}, 20);
    assert_clean(&w);
    world_end(&w);
    armed_and_killed(&w);
    close(w.tap[0]);
    close(w.tap[1]);
    clear_dead(&w);
    assert_int_not_equal(in_world(&w, "ip -o link | grep -q 'lb[hi][0-9]'"), 0);
    w.tap[0] = w.tap[1] = -1;
    world_end(&w);
}

/* Stopped for longer than its lease while it lets frames go, then woken: nothing comes after the lease. */
static void test_gate_of_stopped_holder(void **state)
{
    struct world w;
    struct guest g;
    volatile uint64_t *lease = shared_lease();
    (void)state;
    world_start(&w, false);
    w.gaps = true; /* what the kernel drops at the gate is lost, as on a wire */
    pid_t holder = start_holder(&w, lease);
    wait_armed(lease);
    guest_start(&g, &w, 32);
    for (int round = 0; round < 20; round++) {
        unsigned q;
        uint64_t seq, last;
        for (int i = 0; i < 10; i++) {
            lease[0] = lb_now_ns() + 30000000;
            while (receive(&w, 0, &q, &seq))
                ;
            usleep(1000 + (unsigned)round * 37);
        }
        last = lease[0];
        kill(holder, SIGSTOP);
        while (lb_now_ns() < last + 1000000)
            usleep(1000);
        while (receive(&w, 0, &q, &seq))
            ;
        kill(holder, SIGCONT);
        assert_false(receive(&w, 20, &q, &seq));
    }
    lease[0] = UINT64_MAX;
    guest_end(&g);
    send_frame(&w, 0, g.sent[0]); /* behind all, in case the last was lost */
    send_frame(&w, 1, g.sent[1]);
    expect_until(&w, (uint64_t[]){g.sent[0] + 1, g.sent[1] + 1}, 20);
    print_message("%llu frames, %llu lost at the gate\n", (unsigned long long)w.received,
                  (unsigned long long)w.lost);
    assert_true(w.lost <= 20); /* at most the one that was on its way, each time */
    kill(holder, SIGKILL);
    waitpid(holder, NULL, 0);
    OK(lb_output_clear_stale(&w.ident, handle(&w), w.run_dir, err));
    world_end(&w);
    munmap((void *)lease, 4096);
}

struct raw_hold {
    struct lb_rtnl nl;
    struct lb_otap tap;
    int sysfs, gate_fd;
    struct lb_gate *gate;
};

static int open_raw_hold(void *arg, struct lb_error *err)
{
    struct raw_hold *h = arg;
    h->tap = (struct lb_otap)LB_OTAP_INIT;
    h->sysfs = lb_sysfs_open();
    if (lb_rtnl_open(&h->nl, err) < 0 || lb_bpf_gate(&h->gate_fd, &h->gate, err) < 0)
        return -1;
    return lb_otap_open(&h->tap, &h->nl, "tap0", h->sysfs, 77, h->gate_fd, err);
}

/* The gate in the kernel, past our own look at it: a write after the deadline reaches nobody. */
static void test_gate_in_kernel(void **state)
{
    struct world w;
    struct raw_hold h;
    char buf[LB_FRAME_MAX];
    unsigned q;
    uint64_t seq;
    (void)state;
    world_start(&w, false);
    OK(lb_netns_run(w.netns, open_raw_hold, &h, err));
    OK(lb_otap_arm(&h.tap, &h.nl, err));
    assert_true(h.sysfs >= 0);
    send_frame(&w, 0, 0);
    ssize_t n = read(h.tap.hold_fd, buf, sizeof(buf));
    assert_int_equal(n, sizeof(struct test_frame));
    h.gate->until_ns = lb_now_ns() - 1;
    assert_int_equal(write(h.tap.inj_fd, buf, (size_t)n), n);
    assert_false(receive(&w, 50, &q, &seq));
    assert_int_equal(h.gate->dropped, 1);
    h.gate->until_ns = lb_now_ns() + 50000000;
    assert_int_equal(write(h.tap.inj_fd, buf, (size_t)n), n);
    assert_true(receive(&w, 1000, &q, &seq));
    assert_int_equal(h.gate->dropped, 1);
    assert_int_equal(read(h.tap.hold_fd, buf, sizeof(buf)), -1); /* it did not come round again */
    OK(lb_otap_disarm(&h.tap, &h.nl, err));
    lb_otap_close(&h.tap, &h.nl, h.sysfs);
    lb_bpf_gate_unmap(h.gate);
    close(h.gate_fd);
    close(h.sysfs);
    lb_rtnl_close(&h.nl);
    assert_clean(&w);
    world_end(&w);
}

/* Frames wait at a closed gate and go when it opens. */
static void test_gate_keeps(void **state)
{
    struct world w;
    unsigned q;
    uint64_t seq;
    (void)state;
    world_start(&w, false);
    struct lb_output *o = open_output(&w);
    OK(lb_output_arm(o, err));
    for (uint64_t i = 0; i < 200; i++)
        send_frame(&w, 1, i);
    mark(o, 0);
    lb_output_release(o, 0);
    assert_false(receive(&w, 20, &q, &seq));
    struct lb_error e = LB_ERROR_INIT;
    assert_int_equal(lb_output_disarm(o, true, &e), -1);
    assert_int_equal(e.code, LB_E_STATE);
    lb_output_gate(o, lb_now_ns() + 500000000);
    expect_until(&w, (uint64_t[]){0, 200}, 20);
    OK(lb_output_disarm(o, true, err));
    lb_output_close(o);
    assert_clean(&w);
    world_end(&w);
}

/* Somebody takes the filter, or all of clsact, or puts another in front. */
static void test_verify(void **state)
{
    struct world w;
    unsigned q;
    uint64_t seq;
    static const char *const sabotage[] = {
        "tc filter del dev tap0 ingress", "tc qdisc del dev tap0 clsact",
        "tc filter del dev tap0 ingress pref 1",
    };
    (void)state;
    world_start(&w, false);
    struct lb_output *o = open_armed(&w);
    OK(lb_output_verify(o, err));
    for (unsigned i = 0; i < LB_ARRAY_LEN(sabotage); i++) {
        assert_int_equal(in_world(&w, sabotage[i]), 0);
        struct lb_error e = LB_ERROR_INIT;
        assert_int_equal(lb_output_verify(o, &e), 1);
        assert_true(e.message[0]);
        OK(lb_output_verify(o, err));
        send_frame(&w, 0, i);
        assert_false(receive(&w, 20, &q, &seq));
    }
    mark(o, 1);
    lb_output_release(o, 1);
    expect_until(&w, (uint64_t[]){LB_ARRAY_LEN(sabotage), 0}, 10);
    uint64_t t0 = lb_now_ns();
    for (int i = 0; i < 100; i++)
        OK(lb_output_verify(o, err));
    print_message("verify %.1f us\n", (double)(lb_now_ns() - t0) / 1e5);
    assert_int_equal(in_world(&w, "ip link del lbh0"), 0);
    struct lb_error e = LB_ERROR_INIT;
    assert_int_equal(lb_output_verify(o, &e), -1);
    send_frame(&w, 0, 9);
    assert_false(receive(&w, 20, &q, &seq)); /* fails closed */
    OK(lb_output_disarm(o, true, err));
    lb_output_close(o);
    assert_clean(&w);
    world_end(&w);
}

/* What the host itself sends into the holding tap is not taken for the guest's. */
static void test_strangers_in_the_hold(void **state)
{
    struct world w;
    struct lb_output_stats s;
    (void)state;
    world_start(&w, false);
    struct lb_output *o = open_armed(&w);
    pid_t p = fork();
    if (p == 0) {
        struct sockaddr_ll ll = {.sll_family = AF_PACKET, .sll_protocol = htons(TEST_PROTO)};
        unsigned char frame[60] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 2, 2, 2, 2, 2, 0x88, 0xb5};
        if (setns(w.netns, CLONE_NEWNET) < 0)
            _exit(1);
        int fd = socket(AF_PACKET, SOCK_RAW, 0);
        ll.sll_ifindex = (int)if_nametoindex("lbh0");
        _exit(sendto(fd, frame, sizeof(frame), 0, (void *)&ll, sizeof(ll)) != (ssize_t)sizeof(frame) &&
              errno != ENOBUFS);
    }
    int status;
    waitpid(p, &status, 0);
    assert_int_equal(status, 0);
    send_frame(&w, 0, 0);
    mark(o, 0);
    lb_output_get_stats(o, &s);
    assert_int_equal(s.held_packets, 1);
    OK(lb_output_disarm(o, true, err));
    expect_until(&w, (uint64_t[]){1, 0}, 10);
    lb_output_close(o);
    assert_clean(&w);
    world_end(&w);
}

/* A filter of the operator's keeps its place behind ours, one in our place is refused. */
static void test_foreign_filters(void **state)
{
    struct world w;
    (void)state;
    world_start(&w, false);
    assert_int_equal(in_world(&w, "tc qdisc add dev tap0 clsact && tc filter add dev tap0 ingress "
                                  "pref 7 protocol all u32 match u32 0 0 classid 1:1"), 0);
    struct lb_output *o = open_armed(&w);
    send_frame(&w, 0, 0);
    mark(o, 0);
    lb_output_release(o, 0);
    expect_until(&w, (uint64_t[]){1, 0}, 10);
    OK(lb_output_disarm(o, true, err));
    lb_output_close(o);
    assert_int_equal(in_world(&w, "tc filter show dev tap0 ingress | grep -q 'pref 7'"), 0);
    assert_int_equal(in_world(&w, "tc filter add dev tap0 ingress pref 1 protocol all u32 match "
                                  "u32 0 0 classid 1:1"), 0);
    struct lb_error e = LB_ERROR_INIT;
    char **why = lb_output_blockers(handle(&w), &e);
    assert_non_null(why);
    assert_non_null(why[0]);
    assert_non_null(strstr(why[0], "priority 1"));
    assert_null(why[1]);
    lb_strv_free(why);
    assert_int_equal(lb_output_open(handle(&w), &w.ident, w.run_dir, &o, &e), -1);
    assert_int_equal(in_world(&w, "tc filter del dev tap0 ingress pref 1"), 0);
    why = lb_output_blockers(handle(&w), &e);
    assert_null(why[0]);
    lb_strv_free(why);
    assert_int_not_equal(in_world(&w, "ip -o link | grep -q 'lb[hi][0-9]'"), 0);
    world_end(&w);
}

static void test_rps_is_put_back(void **state)
{
    struct world w;
#define IN_SYSFS "unshare -m sh -c 'mount -t sysfs s /sys && cd /sys/class/net/tap0/queues && "
#define MASKS IN_SYSFS "cat rx-*/rps_cpus | tr -d \"\\n\" | grep -q "
    (void)state;
    world_start(&w, false);
    assert_int_equal(in_world(&w, IN_SYSFS "for q in rx-*; do echo 1 >$q/rps_cpus; done'"), 0);
    assert_int_equal(in_world(&w, MASKS "^1*$'"), 0);
    struct lb_output *o = open_armed(&w);
    assert_int_equal(in_world(&w, MASKS "^0*$'"), 0);
    OK(lb_output_disarm(o, true, err));
    lb_output_close(o);
    assert_int_equal(in_world(&w, MASKS "^1*$'"), 0);
    world_end(&w);
}

/* ------------------------------------------------ IP: routed taps, GSO, checksums */

static uint32_t sum16(const void *data, size_t len, uint32_t sum)
{
    const unsigned char *p = data;
    for (size_t i = 0; i + 1 < len; i += 2)
        sum += (uint32_t)(p[i] << 8 | p[i + 1]);
    if (len & 1)
        sum += (uint32_t)(p[len - 1] << 8);
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    return sum;
}

static uint32_t pseudo(const struct iphdr *ip, size_t l4)
{
    uint32_t sum = sum16((const unsigned char *)ip + offsetof(struct iphdr, saddr), 8, 0);
    return sum16("", 0, sum + ip->protocol + (uint32_t)l4);
}

struct ip_frame {
    struct virtio_net_hdr_mrg_rxbuf vnet;
    struct ether_header eth;
    struct iphdr ip;
    unsigned char l4[65535];
} __attribute__((packed));

/* Ethernet and IP headers for `l4` bytes; the checksum field at `csum_off` of l4 is the device's work. */
static size_t ip_begin(struct ip_frame *f, const unsigned char dst[6], uint8_t proto, size_t l4,
                       uint16_t csum_off)
{
    memcpy(f->eth.ether_dhost, dst, 6);
    memcpy(f->eth.ether_shost, "\x02\xff\xff\xff\xff\x02", 6);
    f->eth.ether_type = htons(ETHERTYPE_IP);
    struct iphdr ip = {.version = 4, .ihl = 5, .ttl = 64, .protocol = proto,
                       .tot_len = htons((uint16_t)(sizeof(ip) + l4)),
                       .saddr = inet_addr("10.9.0.2"), .daddr = inet_addr("10.9.0.1")};
    ip.check = htons((uint16_t)~sum16(&ip, sizeof(ip), 0));
    f->ip = ip;
    f->vnet.hdr.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM;
    f->vnet.hdr.csum_start = sizeof(f->eth) + sizeof(f->ip);
    f->vnet.hdr.csum_offset = csum_off;
    uint16_t part = htons((uint16_t)pseudo(&ip, l4));
    memcpy(f->l4 + csum_off, &part, 2);
    return sizeof(f->vnet) + sizeof(f->eth) + sizeof(f->ip) + l4;
}

static void send_udp(struct world *w, const unsigned char dst[6], uint64_t seq)
{
    static struct ip_frame f;
    struct udphdr udp = {.source = htons(9001), .dest = htons(9000),
                         .len = htons(sizeof(udp) + sizeof(seq))};
    memset(&f, 0, sizeof(f.vnet) + sizeof(f.eth) + sizeof(f.ip) + 64);
    memcpy(f.l4, &udp, sizeof(udp));
    memcpy(f.l4 + sizeof(udp), &seq, sizeof(seq));
    size_t len = ip_begin(&f, dst, IPPROTO_UDP, sizeof(udp) + sizeof(seq), 6);
    assert_int_equal(write(w->tap[seq % QUEUES], &f, len), len);
}

static void mac_of_tap(struct world *w, unsigned char mac[6])
{
    struct ifreq ifr;
    memset(&ifr, 0, sizeof(ifr));
    strcpy(ifr.ifr_name, "tap0");
    assert_int_equal(ioctl(w->rx, SIOCGIFHWADDR, &ifr), 0);
    memcpy(mac, ifr.ifr_hwaddr.sa_data, 6);
}

/* The host itself is the receiver: what comes in must be for its address after the detour, too. */
static void test_routed(void **state)
{
    struct world w;
    unsigned char mac[6];
    uint64_t seq, want = 0;
    (void)state;
    world_start(&w, true);
    mac_of_tap(&w, mac);
    struct lb_output *o = open_armed(&w);
    struct pollfd p = {.fd = w.rx, .events = POLLIN};
    for (uint64_t e = 0; e < 50; e++) {
        for (uint64_t i = 0; i < 40; i++)
            send_udp(&w, mac, e * 40 + i);
        mark(o, e);
        assert_int_equal(poll(&p, 1, e < 5 ? 5 : 0), 0);
        lb_output_release(o, e);
        for (; want < (e + 1) * 40; want++) {
            assert_int_equal(poll(&p, 1, 2000), 1);
            assert_int_equal(recv(w.rx, &seq, sizeof(seq), 0), sizeof(seq));
            assert_int_equal(seq, want);
        }
    }
    OK(lb_output_disarm(o, true, err));
    lb_output_close(o);
    send_udp(&w, mac, want);
    assert_int_equal(poll(&p, 1, 2000), 1);
    assert_clean(&w);
    world_end(&w);
}

/* Packets of another type on v1. */
static void rebind(struct world *w, uint16_t proto)
{
    struct sockaddr_ll ll;
    socklen_t len = sizeof(ll);
    assert_int_equal(getsockname(w->rx, (void *)&ll, &len), 0);
    ll.sll_protocol = htons(proto);
    assert_int_equal(bind(w->rx, (void *)&ll, sizeof(ll)), 0);
}

/* 20 large TCP segments with checksums left to the device: cut and summed as if nothing had been in between. */
static void test_gso(void **state)
{
    enum { MSS = 1400, PAYLOAD = MSS * 40, LARGE = 20 };
    static struct ip_frame f;
    static unsigned char got[70000];
    struct world w;
    (void)state;
    world_start(&w, false);
    static const uint32_t off[] = {ETHTOOL_STSO, ETHTOOL_SGSO, ETHTOOL_STXCSUM};
    for (unsigned i = 0; i < LB_ARRAY_LEN(off); i++) {
        struct ethtool_value v = {.cmd = off[i]};
        struct ifreq ifr = {.ifr_data = (void *)&v};
        strcpy(ifr.ifr_name, "v0");
        assert_int_equal(ioctl(w.rx, SIOCETHTOOL, &ifr), 0);
    }
    rebind(&w, ETHERTYPE_IP);
    struct lb_output *o = open_armed(&w);
    size_t sent = 0;
    for (uint32_t i = 0; i < LARGE; i++) {
        struct tcphdr tcp = {.source = htons(1), .dest = htons(2), .seq = htonl(i * PAYLOAD),
                             .doff = 5, .ack = 1};
        memset(&f, 0, sizeof(f));
        memcpy(f.l4, &tcp, sizeof(tcp));
        for (size_t b = 0; b < PAYLOAD; b++)
            f.l4[sizeof(tcp) + b] = (unsigned char)((sent + b) * 31);
        size_t len = ip_begin(&f, (const unsigned char *)"\x02\xff\xff\xff\xff\x01", IPPROTO_TCP,
                              sizeof(tcp) + PAYLOAD, 16);
        f.vnet.hdr.gso_type = VIRTIO_NET_HDR_GSO_TCPV4;
        f.vnet.hdr.gso_size = MSS;
        f.vnet.hdr.hdr_len = sizeof(f.eth) + sizeof(f.ip) + sizeof(tcp);
        assert_int_equal(write(w.tap[0], &f, len), len);
        sent += PAYLOAD;
    }
    mark(o, 0);
    struct lb_output_stats s;
    lb_output_get_stats(o, &s);
    assert_int_equal(s.held_packets, LARGE); /* kept whole */
    lb_output_release(o, 0);
    size_t seen = 0;
    unsigned packets = 0;
    while (seen < sent) {
        struct pollfd p = {.fd = w.rx, .events = POLLIN};
        assert_int_equal(poll(&p, 1, 2000), 1);
        ssize_t n = recv(w.rx, got, sizeof(got), 0);
        struct iphdr ip;
        memcpy(&ip, got + 14, sizeof(ip));
        if (ip.protocol != IPPROTO_TCP)
            continue; /* the bridge's own: it joins a group when it comes up */
        size_t l4 = ntohs(ip.tot_len) - sizeof(ip);
        assert_true(n >= (ssize_t)(14 + sizeof(ip) + l4));
        assert_true(l4 - sizeof(struct tcphdr) <= MSS);
        assert_int_equal(sum16(&ip, sizeof(ip), 0), 0xffff);
        assert_int_equal(sum16(got + 34, l4, pseudo(&ip, l4)), 0xffff);
        for (size_t b = sizeof(struct tcphdr); b < l4; b++, seen++)
            assert_int_equal(got[34 + b], (unsigned char)(seen * 31));
        packets++;
    }
    print_message("%u segments with valid checksums\n", packets);
    OK(lb_output_disarm(o, true, err));
    lb_output_close(o);
    world_end(&w);
}

/* A tag stays on. */
static void test_vlan(void **state)
{
    struct world w;
    unsigned char frame[LB_VNET_HDR + 64] = {0}, got[128];
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(struct tpacket_auxdata))];
    } control;
    struct iovec v = {.iov_base = got, .iov_len = sizeof(got)};
    struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_control = &control,
                       .msg_controllen = sizeof(control)};
    struct tpacket_auxdata aux;
    (void)state;
    world_start(&w, false);
    rebind(&w, ETH_P_ALL); /* sees the tag, which is taken off before the others */
    assert_int_equal(setsockopt(w.rx, SOL_PACKET, PACKET_AUXDATA, &(int){1}, sizeof(int)), 0);
    struct lb_output *o = open_armed(&w);
    memcpy(frame + LB_VNET_HDR, "\x02\xff\xff\xff\xff\x01\x02\xff\xff\xff\xff\x02\x81\x00\x60\x05\x88\xb5", 18);
    assert_int_equal(write(w.tap[1], frame, sizeof(frame)), sizeof(frame));
    mark(o, 0);
    lb_output_release(o, 0);
    do { /* past what the bridge sends by itself */
        struct pollfd p = {.fd = w.rx, .events = POLLIN};
        assert_int_equal(poll(&p, 1, 2000), 1);
        m.msg_controllen = sizeof(control);
        assert_true(recvmsg(w.rx, &m, 0) > 0);
    } while (got[12] != TEST_PROTO >> 8 || got[13] != (TEST_PROTO & 255));
    assert_non_null(CMSG_FIRSTHDR(&m));
    memcpy(&aux, CMSG_DATA(CMSG_FIRSTHDR(&m)), sizeof(aux));
    assert_true(aux.tp_status & TP_STATUS_VLAN_VALID);
    assert_int_equal(aux.tp_vlan_tci, 0x6005);
    OK(lb_output_disarm(o, true, err));
    lb_output_close(o);
    world_end(&w);
}

/* ------------------------------------------------------------- the rest */

/* Frames of an epoch are copied, and sent on another host as if the guest were there. */
static void test_copy_and_inject(void **state)
{
    struct world a, b;
    void *buf = NULL;
    size_t len = 0, small;
    unsigned q;
    uint64_t seq;
    (void)state;
    world_start(&a, false);
    world_start(&b, false);
    struct lb_output *o = open_armed(&a);
    for (uint64_t i = 0; i < 10; i++)
        send_frame(&a, 0, i);
    mark(o, 0);
    for (uint64_t i = 10; i < 40; i++)
        send_frame(&a, (unsigned)(i & 1), i < 20 ? i : i);
    mark(o, 1);
    OK(lb_output_copy(o, 1, 1 << 20, &buf, &len, err));
    assert_int_equal(len, 30 * (LB_OQ_COPY_HDR + sizeof(struct test_frame)));
    b.next[0] = 10, b.next[1] = 11;
    OK(lb_output_inject(handle(&b), &b.ident, buf, len, err));
    for (unsigned i = 0; i < 30; i++) {
        struct test_frame f;
        struct pollfd p = {.fd = b.rx, .events = POLLIN};
        assert_int_equal(poll(&p, 1, 2000), 1);
        assert_true(recv(b.rx, &f.eth, sizeof(f) - LB_VNET_HDR, 0) > 0);
        assert_int_equal(f.seq, 10 + i);
    }
    assert_false(receive(&b, 20, &q, &seq));
    free(buf);
    OK(lb_output_copy(o, 1, 1000, &buf, &small, err)); /* the newest that fit */
    assert_int_equal(small / (LB_OQ_COPY_HDR + sizeof(struct test_frame)),
                     1000 / (LB_OQ_COPY_HDR + sizeof(struct test_frame)));
    free(buf);
    OK(lb_output_copy(o, 7, 1000, &buf, &small, err));
    assert_int_equal(small, 0);
    free(buf);
    assert_clean(&b);
    OK(lb_output_disarm(o, false, err));
    lb_output_close(o);
    assert_clean(&a);
    world_end(&a);
    world_end(&b);
}

static void test_no_card(void **state)
{
    struct world w;
    struct lb_output_stats s;
    (void)state;
    world_start(&w, false);
    w.n_nics = 0;
    struct lb_output *o = open_armed(&w);
    mark(o, 0);
    lb_output_release(o, 0);
    OK(lb_output_verify(o, err));
    assert_false(lb_output_waiting(o));
    lb_output_get_stats(o, &s);
    assert_int_equal(s.held_packets, 0);
    OK(lb_output_disarm(o, true, err));
    lb_output_close(o);
    assert_clean(&w);
    world_end(&w);
}

static bool can_run(void)
{
    struct lb_gate *gate;
    struct lb_error e = LB_ERROR_INIT;
    LB_AUTO_FD int fd = -1;
    if (geteuid() != 0 || access("/dev/net/tun", R_OK | W_OK) < 0 ||
        lb_bpf_gate(&fd, &gate, &e) < 0) {
        print_message("1..0 # SKIP needs root, /dev/net/tun and BPF\n");
        return false;
    }
    lb_bpf_gate_unmap(gate);
    return true;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_nothing_held_when_not_armed),
        cmocka_unit_test(test_epochs),
        cmocka_unit_test(test_drop_at_disarm),
        cmocka_unit_test(test_killed_holder),
        cmocka_unit_test(test_clear_own),
        cmocka_unit_test(test_stale_of_dead_vm),
        cmocka_unit_test(test_gate_in_kernel),
        cmocka_unit_test(test_gate_keeps),
        cmocka_unit_test(test_gate_of_stopped_holder),
        cmocka_unit_test(test_verify),
        cmocka_unit_test(test_strangers_in_the_hold),
        cmocka_unit_test(test_foreign_filters),
        cmocka_unit_test(test_rps_is_put_back),
        cmocka_unit_test(test_routed),
        cmocka_unit_test(test_gso),
        cmocka_unit_test(test_vlan),
        cmocka_unit_test(test_copy_and_inject),
        cmocka_unit_test(test_no_card),
    };
    return can_run() ? cmocka_run_group_tests(tests, NULL, NULL) : 0;
}
