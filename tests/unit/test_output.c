/* The queue of held frames against a plain model, and cards held by the hypervisor through the public calls with a
 * hypervisor made of two sockets. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "remus/output_internal.h"
#include "tests/lib/check.h"

#include <arpa/inet.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>

/* ------------------------------------------------------------------- queue */

static void add(struct lb_oq *q, uint64_t seq, size_t len, uint64_t now)
{
    unsigned char *p = lb_oq_room(q, NULL);
    assert_non_null(p);
    assert_true(len >= sizeof(seq));
    memset(p, (int)seq, len);
    memcpy(p, &seq, sizeof(seq));
    lb_oq_commit(q, len, now);
}

static uint64_t seq_of(const struct lb_oq_frame *f)
{
    uint64_t seq;
    memcpy(&seq, f->data, sizeof(seq));
    for (size_t i = sizeof(seq); i < f->len; i++)
        if (f->data[i] != (unsigned char)seq)
            fail_msg("frame %llu is damaged at %zu", (unsigned long long)seq, i);
    return seq;
}

/* Frames of all sizes through random marks and releases: each leaves once, in order, with its epoch. */
static void test_queue_model(void **state)
{
    enum { STEPS = 40000 };
    static uint64_t end_of[STEPS]; /* frames that had come when epoch i ended */
    struct lb_oq q = {0};
    uint64_t in = 0, out = 0, epochs = 0, released = 0, bytes = 0;
    unsigned seed = 42;
    (void)state;
    for (unsigned step = 0; step < STEPS; step++) {
        int what = rand_r(&seed) % 10;
        if (what < 6) {
            size_t len = rand_r(&seed) % 50 ? 60 + (size_t)(rand_r(&seed) % 1500)
                                            : LB_FRAME_MAX - (size_t)(rand_r(&seed) % 9);
            add(&q, in++, len, step);
            bytes += len;
        } else if (what < 7) {
            lb_oq_mark(&q, epochs);
            end_of[epochs++] = in;
        } else if (what < 8 && released < epochs) {
            released += 1 + (uint64_t)rand_r(&seed) % (epochs - released);
            lb_oq_allow(&q, released - 1);
        } else if (released) {
            const struct lb_oq_frame *f;
            for (int i = rand_r(&seed) % 40; i > 0 && (f = lb_oq_head(&q)); i--) {
                assert_int_equal(seq_of(f), out);
                assert_true(out < end_of[released - 1]);
                bytes -= f->len;
                out++;
                lb_oq_pop(&q);
            }
        }
        assert_int_equal(q.held_bytes, bytes);
        assert_int_equal(q.in - q.out, in - out);
        if (!lb_oq_head(&q))
            assert_int_equal(out, released ? end_of[released - 1] : 0);
    }
    lb_oq_allow_all(&q);
    for (const struct lb_oq_frame *f; (f = lb_oq_head(&q)); lb_oq_pop(&q))
        assert_int_equal(seq_of(f), out++);
    assert_int_equal(out, in);
    assert_null(lb_oq_oldest(&q));
    lb_oq_free(&q);
}

/* Frames that found room in one chunk, were marked, and whose epoch ends in the next. */
static void test_queue_copy(void **state)
{
    struct lb_oq a = {0}, b = {0};
    const struct lb_oq *both[] = {&a, &b};
    void *buf;
    size_t len;
    (void)state;
    for (uint64_t i = 0; i < 9; i++)
        add(&a, i, LB_FRAME_MAX, i); /* nobody's epoch 5 */
    lb_oq_mark(&a, 4);
    for (uint64_t i = 0; i < 20; i++)
        add(i % 3 ? &a : &b, 100 + i, 1000 + (size_t)i, 100 + i);
    lb_oq_mark(&a, 5);
    lb_oq_mark(&b, 5);
    add(&a, 7, 100, 200);
    OK(lb_oq_copy(both, 2, 5, 1 << 20, &buf, &len, err));
    const unsigned char *p = buf;
    for (uint64_t i = 0; i < 20; i++) { /* by age, whichever card */
        uint64_t seq;
        assert_int_equal(p[0] | p[1] << 8, i % 3 ? 0 : 1);
        assert_int_equal(p[2] | p[3] << 8 | p[4] << 16, 1000 + i);
        memcpy(&seq, p + LB_OQ_COPY_HDR, sizeof(seq));
        assert_int_equal(seq, 100 + i);
        p += LB_OQ_COPY_HDR + 1000 + i;
    }
    assert_int_equal((size_t)(p - (unsigned char *)buf), len);
    free(buf);
    OK(lb_oq_copy(both, 2, 5, 2 * (LB_OQ_COPY_HDR + 1019), &buf, &len, err));
    assert_int_equal(len, 2 * LB_OQ_COPY_HDR + 1018 + 1019); /* the newest */
    free(buf);
    OK(lb_oq_copy(both, 2, 5, 0, &buf, &len, err));
    assert_int_equal(len, 0);
    free(buf);
    lb_oq_free(&a);
    lb_oq_free(&b);
}

/* -------------------------------------------------- the hypervisor's own cards */

struct fake_hv {
    struct lb_hv_vm_base base;
    int guest, net;    /* our ends: what the guest sends goes in, what leaves comes out */
    unsigned holds, unholds;
};

static int hv_nics(struct lb_hv_vm *vm, struct lb_nic **out, unsigned *n, struct lb_error *err)
{
    static const struct lb_nic nics[] = {
        {.id = "none", .kind = LB_NIC_NONE}, {.id = "n0", .kind = LB_NIC_INSIDE},
    };
    (void)vm, (void)err;
    *out = lb_alloc(sizeof(nics));
    memcpy(*out, nics, sizeof(nics));
    *n = LB_ARRAY_LEN(nics);
    return 0;
}

static int hv_hold(struct lb_hv_vm *vm, const char *id, int fds[2], struct lb_error *err)
{
    struct fake_hv *h = (struct fake_hv *)vm;
    int a[2], b[2];
    (void)err;
    assert_string_equal(id, "n0");
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, a), 0);
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, b), 0);
    h->guest = a[0], fds[0] = a[1];
    h->net = b[0], fds[1] = b[1];
    h->holds++;
    return 0;
}

static int hv_unhold(struct lb_hv_vm *vm, const char *id, struct lb_error *err)
{
    (void)id, (void)err;
    ((struct fake_hv *)vm)->unholds++;
    return 0;
}

static const struct lb_hv_ops hv_ops = {
    .name = "sockets", .nics = hv_nics, .nic_hold = hv_hold, .nic_unhold = hv_unhold,
};

static void hv_send(struct fake_hv *h, uint64_t seq, size_t len)
{
    LB_AUTO_FREE unsigned char *p = lb_alloc(4 + len);
    uint32_t be = htonl((uint32_t)len);
    memcpy(p, &be, 4);
    memcpy(p + 4, &seq, sizeof(seq));
    OK(lb_write_all(h->guest, p, 4 + len, err));
}

static void hv_expect(struct fake_hv *h, uint64_t seq, size_t len)
{
    uint32_t be;
    uint64_t got;
    LB_AUTO_FREE unsigned char *p = lb_alloc(len);
    OK(lb_read_all(h->net, &be, 4, err));
    assert_int_equal(ntohl(be), len);
    OK(lb_read_all(h->net, p, len, err));
    memcpy(&got, p, sizeof(got));
    assert_int_equal(got, seq);
}

static bool hv_silent(struct fake_hv *h)
{
    struct pollfd p = {.fd = h->net, .events = POLLIN};
    return poll(&p, 1, 5) == 0;
}

static struct lb_output *open_inside(struct fake_hv *h, char dir[64])
{
    struct lb_output *o = NULL;
    struct lb_vm_ident ident = {.name = "t"};
    memset(h, 0, sizeof(*h));
    h->base = (struct lb_hv_vm_base){.ops = &hv_ops, .state = LB_HV_STOPPED};
    strcpy(dir, "/tmp/lbo.XXXXXX");
    assert_non_null(mkdtemp(dir));
    OK(lb_proc_identify(getpid(), &ident.proc, err));
    OK(lb_output_open((struct lb_hv_vm *)h, &ident, dir, &o, err));
    OK(lb_output_arm(o, err));
    return o;
}

static void end_inside(struct fake_hv *h, const char *dir)
{
    close(h->guest);
    close(h->net);
    assert_int_equal(rmdir(dir), 0); /* no record is left */
}

static void mark(struct lb_output *o, uint64_t epoch)
{
    lb_output_mark_begin(o, epoch);
    OK(lb_output_mark_end(o, err));
}

static void test_inside(void **state)
{
    struct fake_hv h;
    struct lb_output_stats s;
    char dir[64];
    uint64_t seq = 0;
    (void)state;
    struct lb_output *o = open_inside(&h, dir);
    lb_output_gate(o, UINT64_MAX);
    for (uint64_t e = 0; e < 100; e++) {
        uint64_t first = seq;
        for (unsigned i = 0; i < e % 7; i++, seq++)
            hv_send(&h, seq, 60 + (seq * 977) % 30000);
        mark(o, e);
        if (e % 10 == 1)
            assert_true(hv_silent(&h));
        lb_output_get_stats(o, &s);
        assert_int_equal(s.held_packets, seq - first);
        lb_output_release(o, e);
        for (; first < seq; first++)
            hv_expect(&h, first, 60 + (first * 977) % 30000);
        /* It is counted out after it was written, and so after we can have read it. */
        for (int i = 0; i < 5000 && s.held_packets; i++, usleep(1000))
            lb_output_get_stats(o, &s);
        assert_int_equal(s.held_packets, 0);
    }
    assert_false(lb_output_waiting(o));
    hv_send(&h, seq, 100);
    for (int i = 0; i < 1000 && !lb_output_waiting(o); i++)
        usleep(1000);
    assert_true(lb_output_waiting(o));
    /* not marked: leaves at disarm */
    lb_output_get_stats(o, &s);
    assert_true(s.oldest_held_ns && s.oldest_held_ns <= lb_now_ns());
    hv_send(&h, seq + 1, 100);
    assert_int_equal(h.unholds, 0);
    OK(lb_output_disarm(o, true, err));
    hv_expect(&h, seq, 100);
    hv_expect(&h, seq + 1, 100);
    assert_int_equal(h.holds, 1);
    assert_int_equal(h.unholds, 1);
    lb_output_get_stats(o, &s);
    assert_int_equal(s.released_packets, seq + 2);
    assert_int_equal(s.dropped_packets, 0);
    lb_output_close(o);
    end_inside(&h, dir);
}

/* More than a socket holds: what blocks waits, and arrives whole. */
static void test_inside_blocks(void **state)
{
    enum { N = 400 };
    struct fake_hv h;
    char dir[64];
    (void)state;
    struct lb_output *o = open_inside(&h, dir);
    for (uint64_t i = 0; i < N; i++)
        hv_send(&h, i, 9000);
    mark(o, 0);
    lb_output_release(o, 0);
    assert_true(hv_silent(&h)); /* the gate begins closed */
    lb_output_gate(o, UINT64_MAX);
    usleep(20000);
    hv_send(&h, N, 60); /* it reads while it cannot write */
    mark(o, 1);
    for (uint64_t i = 0; i < N; i++)
        hv_expect(&h, i, 9000);
    assert_true(hv_silent(&h));
    OK(lb_output_disarm(o, false, err));
    lb_output_close(o);
    assert_int_equal(read(h.net, &(char){0}, 1), 0); /* dropped, and closed */
    end_inside(&h, dir);
}

static void test_inside_dies(void **state)
{
    struct fake_hv h;
    struct lb_error e = LB_ERROR_INIT;
    char dir[64], path[96];
    (void)state;
    struct lb_output *o = open_inside(&h, dir);
    hv_send(&h, 1, 100);
    close(h.guest);
    int r = 0;
    for (int i = 0; i < 1000 && r == 0; i++, usleep(1000))
        r = lb_output_verify(o, &e);
    assert_int_equal(r, -1);
    lb_output_close(o); /* still armed: the record stays for recovery */
    snprintf(path, sizeof(path), "%s/output.json", dir);
    assert_int_equal(access(path, F_OK), 0);
    struct lb_vm_ident ident = {.name = "t"};
    OK(lb_proc_identify(getpid(), &ident.proc, err));
    OK(lb_output_clear_stale(&ident, (struct lb_hv_vm *)&h, dir, err));
    assert_int_equal(h.unholds, 1);
    h.guest = -1;
    end_inside(&h, dir);
}

/* A length that no frame has ends the hold of that card; nothing is believed. */
static void test_inside_nonsense(void **state)
{
    struct fake_hv h;
    struct lb_error e = LB_ERROR_INIT;
    char dir[64];
    (void)state;
    struct lb_output *o = open_inside(&h, dir);
    OK(lb_write_all(h.guest, "\xff\xff\xff\xff", 4, err));
    lb_output_mark_begin(o, 0);
    int r = lb_output_mark_end(o, &e);
    for (int i = 0; i < 1000 && r == 0; i++, usleep(1000))
        r = lb_output_verify(o, &e);
    assert_int_equal(r, -1);
    OK(lb_output_disarm(o, false, err));
    lb_output_close(o);
    end_inside(&h, dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_queue_model),   cmocka_unit_test(test_queue_copy),
        cmocka_unit_test(test_inside),        cmocka_unit_test(test_inside_blocks),
        cmocka_unit_test(test_inside_dies),   cmocka_unit_test(test_inside_nonsense),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
