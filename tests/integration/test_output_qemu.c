/* Held output of a real guest under a stock QEMU: a 1 kHz stream of numbered packets through attach, epochs and detach,
 * with the card on a kernel tap (held outside) and on a socket back end (held by QEMU's filter-redirector).
 *
 * We are the network: we answer the guest's ARP and see every frame that leaves. At each stop the copy of the epoch
 * says which packets were sent in it, so that one that arrives before its epoch is released is found out.
 *
 * Needs root, QEMU, the test guest and iproute2. All in a network namespace of this process. */
#include "tests/integration/qemu_util.h"

#include "remus/output_internal.h"

#include <arpa/inet.h>
#include <linux/if_packet.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <netinet/if_ether.h>
#include <netinet/ip.h>
#include <poll.h>
#include <sched.h>

#define EPOCHS 150
#define UDP_AT (sizeof(struct ether_header) + sizeof(struct iphdr))
#define SEQ_AT (UDP_AT + 8)
#define UDP_PORT 9000
#define GUEST_IP "10.77.0.10"
#define OUR_IP "10.77.0.1"
/* Words with spaces between them, so in a file of their own. */
#define GUEST_CONFIG                                                                              \
    "[machine]\n  kernel = \"%s/vmlinuz\"\n  initrd = \"%s/initrd.img\"\n"                           \
    "  append = \"console=ttyS0 quiet lb.net=" GUEST_IP "/24 lb.udp=" OUR_IP ":9000\"\n"
#define GUEST_ARGS                                                                                \
    "-machine pc,accel=tcg -cpu max -m 192 -nodefaults -display none -no-reboot -readconfig @D/guest " \
    "-netdev %s -device virtio-net-pci,netdev=n0,mac=52:54:00:77:01:10"

/* The wire: how frames come from the guest and go to it. */
struct wire {
    int fd;
    struct sockaddr_in to;   /* socket back end */
    bool is_socket;
    uint64_t next, count;    /* of the stream; next 0: nothing seen yet */
};

static void wire_send(struct wire *w, const void *frame, size_t len)
{
    ssize_t n = w->is_socket ? sendto(w->fd, frame, len, 0, (void *)&w->to, sizeof(w->to))
                             : send(w->fd, frame, len, 0);
    assert_int_equal(n, len);
}

static void answer_arp(struct wire *w, const unsigned char *frame)
{
    struct {
        struct ether_header eth;
        struct ether_arp arp;
        unsigned char pad[18];
    } __attribute__((packed)) a;
    static const unsigned char mac[6] = {2, 0, 0, 0, 0, 1};
    memset(&a, 0, sizeof(a));
    memcpy(&a, frame, sizeof(a.eth) + sizeof(a.arp));
    if (ntohs(a.arp.ea_hdr.ar_op) != ARPOP_REQUEST ||
        memcmp(a.arp.arp_tpa, &(in_addr_t){inet_addr(OUR_IP)}, 4) != 0)
        return;
    a.arp.ea_hdr.ar_op = htons(ARPOP_REPLY);
    memcpy(a.arp.arp_tha, a.arp.arp_sha, 6);
    memcpy(a.arp.arp_tpa, a.arp.arp_spa, 4);
    memcpy(a.arp.arp_sha, mac, 6);
    memcpy(a.arp.arp_spa, &(in_addr_t){inet_addr(OUR_IP)}, 4);
    memcpy(a.eth.ether_dhost, a.eth.ether_shost, 6);
    memcpy(a.eth.ether_shost, mac, 6);
    wire_send(w, &a, sizeof(a));
}

/* Is it a packet of the stream? */
static bool stream_seq(const unsigned char *frame, size_t len, uint64_t *seq)
{
    if (len < SEQ_AT + sizeof(*seq) || frame[12] != 8 || frame[13] != 0 ||
        frame[23] != IPPROTO_UDP || frame[UDP_AT + 2] != UDP_PORT >> 8 ||
        frame[UDP_AT + 3] != (UDP_PORT & 255))
        return false;
    memcpy(seq, frame + SEQ_AT, sizeof(*seq));
    return true;
}

/* Take one frame in, if it comes in time. The stream has no gap, nothing twice, nothing out of order. */
static bool wire_take(struct wire *w, int wait_ms)
{
    unsigned char frame[65536];
    struct pollfd p = {.fd = w->fd, .events = POLLIN};
    uint64_t seq;
    if (poll(&p, 1, wait_ms) != 1)
        return false;
    socklen_t len = sizeof(w->to);
    ssize_t n = recvfrom(w->fd, frame, sizeof(frame), 0, w->is_socket ? (void *)&w->to : NULL,
                         w->is_socket ? &len : NULL);
    assert_true(n >= 14);
    if (frame[12] == 8 && frame[13] == 6 && n >= 42)
        answer_arp(w, frame);
    if (!stream_seq(frame, (size_t)n, &seq))
        return true;
    if (w->count && seq != w->next)
        fail_msg("packet %llu, expected %llu", (unsigned long long)seq, (unsigned long long)w->next);
    w->next = seq + 1;
    w->count++;
    return true;
}

/* Number behind the last packet of the stream in a copy of an epoch; 0: none in it. */
static uint64_t last_in(const unsigned char *buf, size_t len)
{
    uint64_t last = 0, seq;
    for (size_t at = 0, n; at < len; at += LB_OQ_COPY_HDR + n) {
        n = buf[at + 2] | (size_t)buf[at + 3] << 8 | (size_t)buf[at + 4] << 16;
        const unsigned char *frame = buf + at + LB_OQ_COPY_HDR + LB_VNET_HDR;
        if (stream_seq(frame, n - LB_VNET_HDR, &seq))
            last = seq + 1;
    }
    return last;
}

static uint64_t end_epoch(struct lb_hv_vm *vm, struct lb_output *o, uint64_t epoch, double *mark_us)
{
    void *buf;
    size_t len;
    OK(lb_hv_stop(vm, err));
    uint64_t t0 = lb_now_ns();
    lb_output_mark_begin(o, epoch);
    OK(lb_output_mark_end(o, err));
    *mark_us = (double)(lb_now_ns() - t0) / 1e3;
    OK(lb_output_verify(o, err));
    OK(lb_output_copy(o, epoch, 1 << 20, &buf, &len, err));
    uint64_t last = last_in(buf, len);
    free(buf);
    return last;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void run_epochs(struct lb_hv_vm *vm, struct lb_output *o, struct wire *w)
{
    static double us[EPOCHS];
    uint64_t behind[2] = {w->next, 0}; /* what may have left; what the epoch before has */
    for (uint64_t e = 0; e < EPOCHS; e++) {
        for (uint64_t until = lb_now_ns() + 20000000; lb_now_ns() < until;)
            wire_take(w, 1);
        behind[1] = end_epoch(vm, o, e, &us[e]);
        while (wire_take(w, 0))
            ;
        assert_true(w->next <= behind[0]);
        OK(lb_hv_cont(vm, err));
        lb_output_release(o, e);
        if (behind[1]) {
            while (w->next < behind[1])
                assert_true(wire_take(w, 2000));
            behind[0] = behind[1];
            assert_int_equal(w->next, behind[1]);
        }
    }
    qsort(us, EPOCHS, sizeof(us[0]), by_value);
    print_message("%d epochs, %llu packets; mark p50 %.0f us, p99 %.0f us\n", EPOCHS,
                  (unsigned long long)w->count, us[EPOCHS / 2], us[EPOCHS * 99 / 100]);
}

static void start_guest(struct qemu *q, const char *netdev)
{
    char args[512], config[1024], path[96];
    qemu_dir(q);
    snprintf(path, sizeof(path), "%s/guest", q->dir);
    snprintf(config, sizeof(config), GUEST_CONFIG, guest_dir(), guest_dir());
    OK(lb_file_write_atomic(path, config, strlen(config), 0644, err));
    snprintf(args, sizeof(args), GUEST_ARGS, netdev);
    qemu_start(q, args);
}

static void protect(struct qemu *q, struct wire *w)
{
    struct lb_output *o;
    struct lb_output_stats s;
    struct lb_hv_vm *vm = qemu_attach(q);
    struct lb_vm_ident ident;
    struct lb_error e = LB_ERROR_INIT;
    lb_hv_ident(vm, &ident);
    char **why = lb_output_blockers(vm, &e);
    assert_non_null(why);
    assert_null(why[0]);
    lb_strv_free(why);
    for (uint64_t until = lb_now_ns() + UINT64_C(60000000000); w->count < 100;) {
        assert_true(lb_now_ns() < until); /* booted and sending */
        wire_take(w, 100);
    }
    OK(lb_output_open(vm, &ident, q->dir, &o, err));
    lb_output_gate(o, UINT64_MAX);
    OK(lb_hv_stop(vm, err));
    OK(lb_output_arm(o, err));
    while (wire_take(w, 5))
        ;
    OK(lb_hv_cont(vm, err));
    run_epochs(vm, o, w);
    OK(lb_hv_stop(vm, err));
    OK(lb_output_disarm(o, true, err));
    OK(lb_hv_cont(vm, err));
    lb_output_get_stats(o, &s);
    assert_int_equal(s.dropped_packets, 0);
    lb_output_close(o);
    for (uint64_t more = w->count + 300, until = lb_now_ns() + 10000000000; w->count < more;) {
        assert_true(lb_now_ns() < until);
        wire_take(w, 100);
    }
    lb_hv_detach(vm);
}

static void test_tap(void **state)
{
    struct qemu q;
    struct wire w = {.fd = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, htons(ETH_P_ALL))};
    struct sockaddr_ll ll = {.sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_ALL)};
    (void)state;
    assert_int_equal(system("ip tuntap add dev tap0 mode tap && ip link add br0 type bridge && "
                            "ip link add v0 type veth peer name v1 && "
                            "ip link set v0 master br0 && ip link set tap0 master br0 && "
                            "for i in br0 v0 v1 tap0; do ip link set $i up; done"), 0);
    ll.sll_ifindex = (int)if_nametoindex("v1");
    assert_int_equal(bind(w.fd, (void *)&ll, sizeof(ll)), 0);
    setsockopt(w.fd, SOL_PACKET, PACKET_IGNORE_OUTGOING, &(int){1}, sizeof(int));
    start_guest(&q, "tap,id=n0,ifname=tap0,script=no,downscript=no");
    protect(&q, &w);
    qemu_end(&q);
    assert_int_not_equal(system("ip -o link | grep -q 'lb[hi][0-9]'"), 0);
    close(w.fd);
}

static void test_socket(void **state)
{
    struct qemu q;
    struct wire w = {.fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), .is_socket = true};
    struct sockaddr_in us = {.sin_family = AF_INET, .sin_port = htons(7700),
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    (void)state;
    assert_int_equal(system("ip link set lo up"), 0);
    assert_int_equal(bind(w.fd, (void *)&us, sizeof(us)), 0);
    start_guest(&q, "socket,id=n0,udp=127.0.0.1:7700,localaddr=127.0.0.1:7701");
    protect(&q, &w);
    qemu_end(&q);
    close(w.fd);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tap),
        cmocka_unit_test(test_socket),
    };
    if (geteuid() != 0 || unshare(CLONE_NEWNET) < 0 || access("/dev/net/tun", R_OK | W_OK) < 0) {
        print_message("1..0 # SKIP needs root and /dev/net/tun\n");
        return 0;
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
