/* What checkpoints ask of a real QEMU: short pauses, cards found and held, disks found and mirrored,
 * the guest frozen, pauses of others respected.  The guests are the boot sector of guest_util.h and,
 * where something has to be sent or written, the Linux guest of tests/guest. */
#include "tests/integration/guest_util.h"

#include <arpa/inet.h>
#include <net/if.h>
#include <netinet/in.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <linux/if_tun.h>

#include "core/qemu/qemu_internal.h"

#define BOOT                                                                                      \
    "-machine pc,accel=tcg -m 64 -nodefaults -display none "                                      \
    "-drive if=ide,file=@D/disk.raw,format=raw,cache=none "

/* ------------------------------------------------------------ Linux guest */

/* `words` go to the kernel, `args` to QEMU. Returns when its workload runs. */
static void linux_start(struct qemu *q, const char *words, const char *args)
{
    char path[96], cmd[1400];
    snprintf(path, sizeof(path), "%s/boot.cfg", q->dir); /* arguments cannot hold blanks */
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fprintf(f, "[machine]\nkernel = \"%s/vmlinuz\"\ninitrd = \"%s/initrd.img\"\n"
               "append = \"console=ttyS0 quiet %s\"\n", guest_dir(), guest_dir(), words);
    fclose(f);
    snprintf(cmd, sizeof(cmd), "-machine pc,accel=tcg -cpu max -m 256 -nodefaults -display none "
             "-readconfig @D/boot.cfg -serial file:@D/serial %s", args);
    qemu_start(q, cmd);
    snprintf(path, sizeof(path), "%s/serial", q->dir);
    for (int i = 0; i < 600; i++) {
        LB_AUTO_FREE char *text = NULL;
        if (lb_file_read(path, 1 << 20, &text, NULL, NULL) == 0 && strstr(text, "\nLB "))
            return;
        usleep(50000);
    }
    fail_msg("the Linux guest does not start: see %s", path);
}

/* ---------------------------------------------------------------- pauses */

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* n epochs as an engine does them; the milliseconds of each pause, sorted. */
static void epochs(struct lb_hv_vm *vm, unsigned n, bool overlap, double *pause_ms)
{
    const struct lb_ram_block *b;
    unsigned n_blocks;
    OK(lb_hv_blocks(vm, &b, &n_blocks, err));
    struct lb_bitmap *dirty = lb_alloc(n_blocks * sizeof(*dirty));
    for (unsigned i = 0; i < n_blocks; i++)
        OK(lb_bitmap_init(&dirty[i], b[i].size_bytes / LB_PAGE_SIZE, err));
    for (unsigned e = 0; e < n; e++) {
        void *state = NULL;
        size_t len = 0;
        uint64_t t0 = lb_now_ns();
        OK(lb_hv_stop(vm, err));
        if (overlap)
            OK(lb_hv_save_begin(vm, false, err));
        for (unsigned i = 0; i < n_blocks; i++) {
            lb_bitmap_clear_all(&dirty[i]);
            if (b[i].kind != LB_RAM_ROM)
                OK(lb_hv_log_clean(vm, &b[i], &dirty[i], err));
        }
        if (!overlap)
            OK(lb_hv_save_begin(vm, false, err));
        OK(lb_hv_save_end(vm, &state, &len, err));
        OK(lb_hv_cont(vm, err));
        pause_ms[e] = ms_since(t0);
        assert_in_range(len, 10000, 1 << 20);
        free(state);
        usleep(25000);
    }
    for (unsigned i = 0; i < n_blocks; i++)
        lb_bitmap_free(&dirty[i]);
    free(dirty);
    qsort(pause_ms, n, sizeof(*pause_ms), by_value);
}

static void test_pause(void **state)
{
    (void)state;
    enum { N = 80 };
    struct qemu q;
    double plain[N], prepared[N];
    qemu_dir(&q);
    linux_start(&q, "", "-device virtio-net-pci");
    struct lb_hv_vm *vm = qemu_attach(&q);
    OK(lb_hv_log_enable(vm, err));
    epochs(vm, N, false, plain);
    OK(lb_hv_checkpoint_mode(vm, true, err));
    epochs(vm, N, true, prepared);
    print_message("pause of an idle 256 MB guest, p50/p99 ms: %.2f/%.2f, with commands sent ahead "
                  "%.2f/%.2f\n", plain[N / 2], plain[N - 1], prepared[N / 2], prepared[N - 1]);
    assert_true(prepared[N / 2] < 10); /* 4 is the aim, on an idle machine */
    /* leaving the mode with a save sent ahead: the next stop needs none */
    OK(lb_hv_stop(vm, err));
    OK(lb_hv_checkpoint_mode(vm, false, err));
    OK(lb_hv_cont(vm, err));
    bool alive, running;
    OK(lb_hv_status(vm, &alive, &running, err));
    assert_true(alive && running);
    /* a handle closed in the middle of a pause: the save sent ahead must not happen */
    OK(lb_hv_checkpoint_mode(vm, true, err));
    OK(lb_hv_stop(vm, err));
    lb_hv_detach(vm);
    vm = qemu_attach(&q);
    OK(lb_hv_cont(vm, err));
    OK(lb_hv_status(vm, &alive, &running, err));
    assert_true(alive && running);
    lb_hv_detach(vm);
    qemu_end(&q);
}

/* ------------------------------------------------------------------ freeze */

static void test_freeze(void **state)
{
    (void)state;
    struct qemu q;
    qemu_dir(&q);
    qemu_start(&q, BOOT);
    struct lb_hv_vm *vm = qemu_attach(&q);
    wait_guest(vm);
    OK(lb_hv_freeze(vm, true, err));
    usleep(20000);
    uint32_t at = counter(vm, 0);
    usleep(50000);
    assert_int_equal(counter(vm, 0), at);
    OK(lb_hv_freeze(vm, false, err));
    wait_guest(vm);
    bool alive, running;
    OK(lb_hv_status(vm, &alive, &running, err));
    assert_true(alive && running);
    /* dead: says so, hits nobody else */
    kill(q.pid, SIGKILL);
    waitpid(q.pid, NULL, 0);
    q.pid = 0;
    struct lb_error why = LB_ERROR_INIT;
    assert_int_equal(lb_hv_freeze(vm, true, &why), -1);
    assert_int_equal(why.code, LB_E_HV);
    lb_hv_detach(vm);
    qemu_end(&q);
}

/* A command through a second monitor, as an operator would. */
static void operator_says(struct qemu *q, const char *text)
{
    struct sockaddr_un sa = {.sun_family = AF_UNIX};
    char buf[4096];
    snprintf(sa.sun_path, sizeof(sa.sun_path), "%s/hmp.sock", q->dir);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(connect(fd, (struct sockaddr *)&sa, sizeof(sa)), 0);
    assert_int_equal(write(fd, text, strlen(text)), (ssize_t)strlen(text));
    usleep(100000);
    assert_true(read(fd, buf, sizeof(buf)) > 0);
    close(fd);
}

static void test_operator_pauses(void **state)
{
    (void)state;
    struct qemu q;
    bool alive, running;
    qemu_dir(&q);
    qemu_start(&q, BOOT " -monitor unix:@D/hmp.sock,server=on,wait=off");
    struct lb_hv_vm *vm = qemu_attach(&q);
    wait_guest(vm);
    for (int i = 0; i < 3; i++) {
        OK(lb_hv_stop(vm, err));
        OK(lb_hv_cont(vm, err));
    }
    operator_says(&q, "stop\n");
    for (int i = 0; i < 3; i++) { /* a round does not continue it */
        OK(lb_hv_stop(vm, err));
        OK(lb_hv_cont(vm, err));
        OK(lb_hv_status(vm, &alive, &running, err));
        assert_true(alive && !running);
    }
    operator_says(&q, "cont\n");
    for (int i = 0; i < 3; i++) {
        OK(lb_hv_stop(vm, err));
        OK(lb_hv_cont(vm, err));
        OK(lb_hv_status(vm, &alive, &running, err));
        assert_true(alive && running);
    }
    lb_hv_detach(vm);
    qemu_end(&q);
}

/* ------------------------------------------------------------------- cards */

static const struct lb_nic *nic_named(const struct lb_nic *v, unsigned n, const char *id)
{
    for (unsigned i = 0; i < n; i++)
        if (strcmp(v[i].id, id) == 0)
            return &v[i];
    fail_msg("no card at %s", id);
    return NULL;
}

/* A tap that goes with its last descriptor, or stays when persistent. */
static int make_tap(const char *name, short flags)
{
    struct ifreq ifr = {.ifr_flags = (short)(IFF_TAP | IFF_NO_PI | flags)};
    int fd = open("/dev/net/tun", O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return -1;
    snprintf(ifr.ifr_name, sizeof(ifr.ifr_name), "%s", name);
    if (ioctl(fd, TUNSETIFF, &ifr) < 0) {
        close(fd);
        return -1;
    }
    return fd;
}

static void test_cards(void **state)
{
    (void)state;
    struct qemu q;
    struct lb_nic *v;
    unsigned n;
    char args[1024], mq[16], one[16];
    snprintf(mq, sizeof(mq), "hvm%d", (int)(getpid() % 100000));
    snprintf(one, sizeof(one), "hvo%d", (int)(getpid() % 100000));
    int probe = make_tap(one, 0);
    if (probe < 0) {
        print_message("no taps here (%s)\n", strerror(errno));
        skip();
    }
    close(probe);
    int given = make_tap(one, 0); /* handed to QEMU by number */
    assert_true(given >= 0);
    fcntl(given, F_SETFD, 0);
    qemu_dir(&q);
    snprintf(args, sizeof(args),
             BOOT "-netdev tap,id=many,ifname=%s,script=no,downscript=no,queues=3 "
                  "-device virtio-net-pci,netdev=many,mq=on "
                  "-netdev tap,id=byfd,fd=%d -device e1000,netdev=byfd "
                  "-netdev user,id=u -device virtio-net-pci,netdev=u -nic user,model=e1000 "
                  "-device e1000,id=lone -netdev user,id=unused -net nic,model=rtl8139 -net user "
                  "-netdev stream,id=st,server=on,addr.type=unix,addr.path=@D/st -device e1000,netdev=st",
             mq, given);
    qemu_start(&q, args);
    close(given);
    struct lb_hv_vm *vm = qemu_attach(&q);
    OK(lb_hv_nics(vm, &v, &n, err));
    for (unsigned i = 0; i < n; i++)
        print_message("card at %s: kind %d %s, %u queues %s\n", v[i].id, v[i].kind, v[i].ifname,
                      v[i].queues, v[i].why);
    assert_int_equal(n, 7); /* "unused" is nobody's */
    assert_int_equal(nic_named(v, n, "many")->kind, LB_NIC_TAP);
    assert_int_equal(nic_named(v, n, "many")->queues, 3);
    assert_string_equal(nic_named(v, n, "many")->ifname, mq);
    assert_int_equal(nic_named(v, n, "byfd")->kind, LB_NIC_TAP);
    assert_int_equal(nic_named(v, n, "byfd")->queues, 1);
    assert_string_equal(nic_named(v, n, "byfd")->ifname, one);
    assert_int_equal(nic_named(v, n, "u")->kind, LB_NIC_INSIDE);
    assert_int_equal(nic_named(v, n, "st")->kind, LB_NIC_INSIDE);
    assert_int_equal(nic_named(v, n, "lone")->kind, LB_NIC_NONE);
    unsigned held = 0;
    for (unsigned i = 0; i < n; i++) { /* whatever its name is (#net1, hub0port0, ...) */
        int fds[2];
        if (v[i].kind != LB_NIC_INSIDE)
            continue;
        OK(lb_hv_nic_hold(vm, v[i].id, fds, err));
        OK(lb_hv_stop(vm, err));
        OK(lb_hv_nic_unhold(vm, v[i].id, err));
        OK(lb_hv_cont(vm, err));
        close(fds[0]);
        close(fds[1]);
        held++;
    }
    assert_int_equal(held, 4);
    /* QEMU itself refuses several queues */
    int fds[2];
    struct lb_error why = LB_ERROR_INIT;
    assert_int_equal(lb_hv_nic_hold(vm, "many", fds, &why), -1);
    assert_non_null(strstr(why.message, "many"));
    free(v);
    lb_hv_detach(vm);
    qemu_end(&q);
}

/* A QEMU that may open nothing and start nothing can still be held: it gets sockets, not paths. */
static void test_hold_unprivileged(void **state)
{
    (void)state;
    if (getenv("LB_TEST_QEMU")) {
        print_message("another QEMU is given, which may be a wrapper that needs root\n");
        skip();
    }
    struct qemu q;
    int fds[2];
    bool alive, running;
    qemu_dir(&q);
    assert_int_equal(chown(q.dir, 65534, 65534), 0);
    qemu_start_as(&q, 65534,
                  "-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny " BOOT
                  "-netdev user,id=n0 -device e1000,netdev=n0");
    struct lb_hv_vm *vm = qemu_attach(&q);
    OK(lb_hv_nic_hold(vm, "n0", fds, err));
    OK(lb_hv_stop(vm, err));
    OK(lb_hv_nic_unhold(vm, "n0", err));
    OK(lb_hv_cont(vm, err));
    OK(lb_hv_status(vm, &alive, &running, err));
    assert_true(alive && running);
    close(fds[0]);
    close(fds[1]);
    lb_hv_detach(vm);
    qemu_end(&q);
}

/* -------------------------------------------------------------------- hold */

struct holder {
    int fds[2];
    unsigned char *buf; /* taken out and not yet released */
    size_t len, cap, marked;
};

/* Everything that is in the socket now. */
static void take(struct holder *h)
{
    for (;;) {
        if (h->cap - h->len < 65536) {
            h->cap += 1 << 20;
            h->buf = lb_realloc(h->buf, h->cap);
        }
        ssize_t n = recv(h->fds[0], h->buf + h->len, h->cap - h->len, MSG_DONTWAIT);
        if (n < 0) {
            assert_int_equal(errno, EAGAIN);
            return;
        }
        assert_true(n > 0);
        h->len += (size_t)n;
    }
}

static void release(struct holder *h)
{
    OK(lb_write_all(h->fds[1], h->buf, h->marked, err));
    h->len -= h->marked;
    memmove(h->buf, h->buf + h->marked, h->len);
    h->marked = 0;
}

/* Frames of the stream in the first `len` bytes of what is held: the last sequence, 0 none. */
static uint64_t last_held(const struct holder *h, size_t len)
{
    uint64_t last = 0;
    size_t at = 0;
    while (at < len) {
        uint32_t be;
        assert_true(at + 4 <= len); /* whole frames only */
        memcpy(&be, h->buf + at, 4);
        size_t n = ntohl(be);
        const unsigned char *frame = h->buf + at + 4;
        assert_true(n <= 65536 && at + 4 + n <= len);
        if (n == 14 + 20 + 8 + 16 && frame[12] == 8 && frame[23] == IPPROTO_UDP)
            memcpy(&last, frame + 42, 8);
        at += 4 + n;
    }
    return last;
}

/* What the receiver outside has seen of the stream. */
struct outside {
    int fd;
    uint64_t first, last, lost, doubled;
};

static void listen_outside(struct outside *o)
{
    while (true) {
        uint64_t msg[2];
        if (recv(o->fd, msg, sizeof(msg), MSG_DONTWAIT) != sizeof(msg))
            return;
        if (!o->first)
            o->first = msg[0];
        else if (msg[0] <= o->last)
            o->doubled++;
        else
            o->lost += msg[0] - o->last - 1;
        o->last = msg[0];
    }
}

static void hear_until(struct outside *o, uint64_t seq)
{
    for (int i = 0; i < 1000 && o->last < seq; i++) {
        listen_outside(o);
        usleep(2000);
    }
    assert_true(o->last >= seq);
}

static void test_hold(void **state)
{
    (void)state;
    struct qemu q;
    struct outside o = {.fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0)};
    struct sockaddr_in sa = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t sa_len = sizeof(sa);
    int room = 8 << 20;
    char words[96];
    assert_int_equal(bind(o.fd, (struct sockaddr *)&sa, sizeof(sa)), 0);
    assert_int_equal(getsockname(o.fd, (struct sockaddr *)&sa, &sa_len), 0);
    setsockopt(o.fd, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof(room));
    qemu_dir(&q);
    /* slirp's own address stands for this host's loopback */
    snprintf(words, sizeof(words), "lb.net=10.77.0.10/24 lb.udp=10.77.0.2:%d", ntohs(sa.sin_port));
    linux_start(&q, words, "-netdev user,id=n0,net=10.77.0.0/24 -device virtio-net-pci,netdev=n0");
    struct lb_hv_vm *vm = qemu_attach(&q);
    OK(lb_hv_log_enable(vm, err));
    OK(lb_hv_checkpoint_mode(vm, true, err));
    hear_until(&o, 100);
    for (int session = 0; session < 2; session++) {
        struct holder h = {.len = 0};
        OK(lb_hv_stop(vm, err));
        OK(lb_hv_nic_hold(vm, "n0", h.fds, err));
        OK(lb_hv_cont(vm, err));
        usleep(30000);
        listen_outside(&o);
        uint64_t free_until = o.last, allowed = o.last;
        unsigned frames_seen = 0;
        for (int e = 0; e < 60; e++) {
            uint64_t until = lb_now_ns() + 15000000;
            while (lb_now_ns() < until) {
                take(&h);
                listen_outside(&o);
                usleep(500);
            }
            assert_true(o.last <= allowed); /* nothing left that was not released */
            OK(lb_hv_stop(vm, err));
            take(&h);
            h.marked = h.len;
            OK(lb_hv_save_begin(vm, false, err));
            void *st = NULL;
            size_t st_len;
            OK(lb_hv_save_end(vm, &st, &st_len, err));
            free(st);
            take(&h);
            assert_int_equal(h.len, h.marked); /* stop had put everything into the socket */
            OK(lb_hv_cont(vm, err));
            uint64_t last = last_held(&h, h.marked);
            frames_seen += last != 0;
            allowed = last ? last : allowed;
            release(&h);
        }
        assert_true(frames_seen > 30 && allowed > free_until + 300);
        hear_until(&o, allowed);
        /* the end: what is held is released while stopped, and the guest goes on directly */
        OK(lb_hv_stop(vm, err));
        take(&h);
        h.marked = h.len;
        release(&h);
        OK(lb_hv_nic_unhold(vm, "n0", err));
        close(h.fds[0]);
        close(h.fds[1]);
        free(h.buf);
        OK(lb_hv_cont(vm, err));
        hear_until(&o, o.last + 200);
    }
    print_message("stream through two holds of 60 epochs: %llu frames, %llu lost, %llu doubled\n",
                  (unsigned long long)(o.last - o.first + 1), (unsigned long long)o.lost,
                  (unsigned long long)o.doubled);
    assert_int_equal(o.lost, 0);
    assert_int_equal(o.doubled, 0);
    /* a holder that dies: closed; the next session takes over */
    int fds[2];
    OK(lb_hv_nic_hold(vm, "n0", fds, err));
    close(fds[0]);
    close(fds[1]);
    lb_hv_detach(vm);
    usleep(50000);
    listen_outside(&o);
    uint64_t at = o.last;
    usleep(200000);
    listen_outside(&o);
    assert_true(o.last == at);
    vm = qemu_attach(&q);
    OK(lb_hv_nic_hold(vm, "n0", fds, err));
    OK(lb_hv_stop(vm, err));
    OK(lb_hv_nic_unhold(vm, "n0", err));
    OK(lb_hv_cont(vm, err));
    close(fds[0]);
    close(fds[1]);
    hear_until(&o, at + 100);
    lb_hv_detach(vm);
    close(o.fd);
    qemu_end(&q);
}

/* ------------------------------------------------------------------- disks */

struct server {
    pid_t pid;
    char sock[96], image[96];
};

static void server_start(struct server *s, const struct qemu *q, const char *name, uint64_t bytes)
{
    snprintf(s->sock, sizeof(s->sock), "%s/%s.sock", q->dir, name);
    snprintf(s->image, sizeof(s->image), "%s/%s.copy", q->dir, name);
    unlink(s->sock);
    int fd = open(s->image, O_RDWR | O_CREAT | O_TRUNC, 0600);
    assert_int_equal(ftruncate(fd, (off_t)bytes), 0);
    close(fd);
    s->pid = fork();
    if (s->pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        execlp("qemu-nbd", "qemu-nbd", "-k", s->sock, "-x", "0", "-f", "raw", "-t", "--discard=unmap",
               s->image, NULL);
        _exit(127);
    }
    for (int i = 0; i < 500 && access(s->sock, F_OK) != 0; i++)
        usleep(10000);
    assert_int_equal(access(s->sock, F_OK), 0);
}

static void server_end(struct server *s)
{
    kill(s->pid, SIGKILL);
    waitpid(s->pid, NULL, 0);
}

static void wait_ready(struct lb_hv_vm *vm, const char *id)
{
    struct lb_mirror_status st;
    for (int i = 0; i < 3000; i++) {
        OK(lb_hv_disk_mirror_status(vm, id, i % 10 == 0, &st, err));
        if (st.failed)
            fail_msg("mirror of %s: %s", id, st.error);
        if (st.ready)
            return;
        usleep(10000);
    }
    fail_msg("mirror of %s does not get ready", id);
}

static bool same(const char *a, const char *b, size_t bytes)
{
    bool equal = true;
    int fa = open(a, O_RDONLY | O_CLOEXEC), fb = open(b, O_RDONLY | O_CLOEXEC);
    char *pa = lb_alloc(1 << 20), *pb = lb_alloc(1 << 20);
    for (size_t at = 0; at < bytes; at += 1 << 20) {
        assert_int_equal(pread(fa, pa, 1 << 20, (off_t)at), 1 << 20);
        assert_int_equal(pread(fb, pb, 1 << 20, (off_t)at), 1 << 20);
        equal &= memcmp(pa, pb, 1 << 20) == 0;
    }
    free(pa);
    free(pb);
    close(fa);
    close(fb);
    return equal;
}

/* A guest that writes: at every stop both sides are the same. */
static void test_mirror(void **state)
{
    (void)state;
    enum { BYTES = 64 << 20 };
    struct qemu q;
    struct server s;
    struct lb_mirror_status st;
    qemu_dir(&q);
    assert_int_equal(truncate(q.disk, BYTES), 0);
    linux_start(&q, "lb.disk=vda", "-drive file=@D/disk.raw,format=raw,if=virtio,cache=none");
    server_start(&s, &q, "one", BYTES);
    struct lb_hv_vm *vm = qemu_attach(&q);
    struct lb_hv_disk *d;
    unsigned n;
    OK(lb_hv_disks(vm, &d, &n, err));
    assert_int_equal(n, 1);
    assert_string_equal(d[0].path, q.disk);
    assert_string_equal(d[0].format, "raw");
    assert_int_equal(d[0].size_bytes, BYTES);
    assert_false(d[0].shareable);
    const char *id = d[0].id;
    OK(lb_hv_log_enable(vm, err));
    OK(lb_hv_checkpoint_mode(vm, true, err));
    OK(lb_hv_disk_mirror_end(vm, id, err)); /* never begun */
    OK(lb_hv_disk_mirror(vm, id, s.sock, "0", err));
    wait_ready(vm, id);
    OK(lb_hv_disk_mirror_status(vm, id, true, &st, err));
    assert_true(st.total_bytes > 0 && st.done_bytes > 0);
    long written = guest_says(&q, "disk_written");
    for (int e = 0; e < 15 || guest_says(&q, "disk_written") < written + 20; e++) {
        assert_true(e < 500);
        usleep(40000);
        OK(lb_hv_stop(vm, err));
        OK(lb_hv_disk_mirror_status(vm, id, false, &st, err));
        assert_true(st.ready && !st.failed);
        assert_true(same(q.disk, s.image, BYTES));
        OK(lb_hv_cont(vm, err));
    }
    struct lb_hv_disk *d2; /* the mirror does not change what the disk is called */
    OK(lb_hv_disks(vm, &d2, &n, err));
    assert_int_equal(n, 1);
    assert_string_equal(d2[0].id, id);
    assert_string_equal(d2[0].path, q.disk);
    free(d2);

    /* the server dies: known without asking, the guest goes on */
    server_end(&s);
    for (int i = 0; i < 500 && !st.failed; i++) {
        OK(lb_hv_disk_mirror_status(vm, id, false, &st, err));
        usleep(10000);
    }
    assert_true(st.failed && !st.ready && st.error[0]);
    print_message("server killed: %s\n", st.error);
    long before = guest_says(&q, "disk_written");
    for (int i = 0; i < 500 && guest_says(&q, "disk_written") <= before + 20; i++)
        usleep(20000);
    assert_true(guest_says(&q, "disk_written") > before + 20);
    assert_int_equal(guest_says(&q, "disk_bad"), 0);
    assert_int_equal(guest_says(&q, "disk_errors"), 0);
    OK(lb_hv_disk_mirror_end(vm, id, err));

    /* again, on a fresh copy; ended by a session that did not begin it */
    server_start(&s, &q, "two", BYTES);
    OK(lb_hv_disk_mirror(vm, id, s.sock, "0", err));
    wait_ready(vm, id);
    char keep[256];
    snprintf(keep, sizeof(keep), "%s", id);
    lb_hv_detach(vm);
    vm = qemu_attach(&q);
    OK(lb_hv_disk_mirror(vm, keep, s.sock, "0", err)); /* takes the place of the old one */
    OK(lb_hv_disk_mirror_end(vm, keep, err));          /* before it is ready */
    OK(lb_hv_disk_mirror(vm, keep, s.sock, "0", err));
    wait_ready(vm, keep);
    uint64_t t0 = lb_now_ns();
    OK(lb_hv_disk_mirror_end(vm, keep, err));
    print_message("end of a mirror: %.1f ms\n", ms_since(t0));
    struct lb_error why = LB_ERROR_INIT;
    assert_int_equal(lb_hv_disk_mirror_status(vm, keep, false, &st, &why), -1);
    server_end(&s);
    assert_int_equal(lb_hv_disk_mirror(vm, keep, s.sock, "0", &why), -1); /* nobody there */
    assert_int_equal(why.code, LB_E_HV);
    free(d);
    lb_hv_detach(vm);
    qemu_end(&q);
}

static void make_image(const struct qemu *q, const char *name, const char *format)
{
    char cmd[256];
    snprintf(cmd, sizeof(cmd), "qemu-img create -q -f %s %s/%s 4M", format, q->dir, name);
    assert_int_equal(system(cmd), 0);
}

/* Every way to attach a disk; what does not change is left out. */
static void test_disks(void **state)
{
    (void)state;
    struct qemu q;
    struct lb_hv_disk *d;
    unsigned n, shareable = 0, qcow2 = 0;
    qemu_dir(&q);
    make_image(&q, "a.qcow2", "qcow2");
    make_image(&q, "b.raw", "raw");
    make_image(&q, "c.raw", "raw");
    make_image(&q, "ro.raw", "raw");
    make_image(&q, "cd.raw", "raw");
    qemu_start(&q, BOOT "-drive file=@D/a.qcow2,if=virtio,id=va -hdb @D/b.raw "
                        "-blockdev driver=file,filename=@D/c.raw,node-name=f0 "
                        "-blockdev driver=raw,file=f0,node-name=r0 "
                        "-device virtio-blk-pci,drive=r0,id=vd,share-rw=on "
                        "-drive file=@D/ro.raw,format=raw,if=virtio,readonly=on "
                        "-drive if=ide,media=cdrom,file=@D/cd.raw,format=raw -device ide-cd,bus=ide.1,unit=1");
    struct lb_hv_vm *vm = qemu_attach(&q);
    OK(lb_hv_disks(vm, &d, &n, err));
    assert_int_equal(n, 4);
    for (unsigned i = 0; i < n; i++) {
        struct server s;
        print_message("disk %s: %s %s %llu%s\n", d[i].id, d[i].path, d[i].format,
                      (unsigned long long)d[i].size_bytes, d[i].shareable ? " shareable" : "");
        assert_int_equal(strncmp(d[i].path, q.dir, strlen(q.dir)), 0);
        shareable += d[i].shareable && strcmp(d[i].id, "vd") == 0;
        qcow2 += strcmp(d[i].format, "qcow2") == 0 && d[i].size_bytes == 4 << 20;
        server_start(&s, &q, "copy", d[i].size_bytes);
        OK(lb_hv_disk_mirror(vm, d[i].id, s.sock, "0", err));
        wait_ready(vm, d[i].id);
        OK(lb_hv_disk_mirror_end(vm, d[i].id, err));
        server_end(&s);
    }
    assert_int_equal(shareable, 1);
    assert_int_equal(qcow2, 1);
    free(d);
    lb_hv_detach(vm);
    qemu_end(&q);
}

/* ------------------------------------------------------------------- clock */

static void test_no_kvm_clock(void **state)
{
    (void)state;
    struct qemu q;
    struct lb_error why = LB_ERROR_INIT;
    qemu_dir(&q);
    qemu_start(&q, BOOT);
    struct lb_hv_vm *vm = qemu_attach(&q);
    uint64_t step = 1000;
    OK(lb_hv_checkpoint_mode(vm, true, err));
    assert_int_equal(lb_hv_clock_step(vm, &step, &why), -1);
    assert_int_equal(why.code, LB_E_UNSUPPORTED);
    lb_hv_detach(vm);
    qemu_end(&q);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_pause),  cmocka_unit_test(test_freeze),
        cmocka_unit_test(test_operator_pauses), cmocka_unit_test(test_cards),
        cmocka_unit_test(test_hold_unprivileged),
        cmocka_unit_test(test_hold),   cmocka_unit_test(test_mirror),
        cmocka_unit_test(test_disks),  cmocka_unit_test(test_no_kvm_clock),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
