/* RDMA connections between two ends of this process, over a device of this machine (soft-RoCE will do). Skipped
 * where there is none: tests/rdma runs it in a virtual machine that has one. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <pthread.h>
#include <string.h>
#include <sys/mman.h>

#include "netproto/netproto_internal.h"
#include "netproto/rdma.h"

static const uint8_t SESSION[LB_SESSION_ID_BYTES] = {1, 2, 3};

struct link {
    struct lb_rdma_addr addr;
    struct lb_rdma_listener *listener;
    struct lb_transport *near, *far; /* that connected, that accepted */
};

static void *accept_main(void *arg)
{
    struct link *l = arg;
    struct lb_error e = LB_ERROR_INIT;

    if (lb_rdma_accept(l->listener, 10000, &l->far, &e))
        print_message("accept: %s\n", e.message);
    return NULL;
}

static void need_device(struct link *l)
{
    memset(l, 0, sizeof(*l));
    if (lb_rdma_addresses(&l->addr, 1) == 1)
        return;
    print_message("no RDMA device with an address\n");
    skip();
}

static void open_link(struct link *l)
{
    struct lb_error e = LB_ERROR_INIT;
    pthread_t t;

    assert_int_equal(lb_rdma_listen(&l->addr, 1, SESSION, &l->listener, &e), 0);
    assert_int_equal(pthread_create(&t, NULL, accept_main, l), 0);
    int rc = lb_rdma_connect(&l->addr, SESSION, 10000, -1, &l->near, &e);
    pthread_join(t, NULL);
    if (rc)
        fail_msg("%s", e.message);
    assert_non_null(l->far);
}

static void close_link(struct link *l)
{
    uint64_t now, max;

    if (l->near)
        l->near->ops->close(l->near);
    if (l->far)
        l->far->ops->close(l->far);
    lb_rdma_listener_close(l->listener);
    lb_rdma_registered(&now, &max);
    assert_int_equal(now, 0);
    assert_true(max > 0);
}

/* ------------------------------------------------------------------- stream */

struct pump {
    struct lb_transport *t;
    size_t bytes;
    unsigned seed;
    int rc;
    struct lb_error err;
};

static void fill(uint8_t *p, size_t n, uint64_t at)
{
    for (size_t i = 0; i < n; i++)
        p[i] = (uint8_t)((at + i) * 2654435761u >> 11);
}

static void *send_main(void *arg)
{
    struct pump *p = arg;
    uint8_t *buf = lb_alloc(600000);

    for (size_t at = 0; at < p->bytes && !p->rc;) {
        size_t n = LB_MIN((size_t)(rand_r(&p->seed) % 600000) + 1, p->bytes - at);
        struct iovec iov[2] = {{buf, n / 3}, {buf + n / 3, n - n / 3}};

        fill(buf, n, at);
        p->rc = p->t->ops->writev(p->t, iov, 2, 0, &p->err);
        at += n;
    }
    if (!p->rc)
        p->rc = lb_rdma_drain(p->t, 0, &p->err);
    free(buf);
    return NULL;
}

static void *receive_main(void *arg)
{
    struct pump *p = arg;
    uint8_t *buf = lb_alloc(300000), *want = lb_alloc(300000);

    for (size_t at = 0; at < p->bytes && !p->rc;) {
        size_t n = LB_MIN((size_t)(rand_r(&p->seed) % 300000) + 1, p->bytes - at);
        ssize_t got = p->t->ops->read_some(p->t, buf, n, 0, &p->err);

        if (got <= 0) {
            p->rc = -1;
            break;
        }
        fill(want, (size_t)got, at);
        if (memcmp(buf, want, (size_t)got))
            p->rc = lb_fail(&p->err, LB_E_PROTO, "different after %zu bytes", at);
        at += (size_t)got;
    }
    free(buf);
    free(want);
    return NULL;
}

static void test_stream_both_ways(void **state)
{
    struct link l;
    pthread_t t[4];

    (void)state;
    need_device(&l);
    open_link(&l);
    struct pump p[4] = {{.t = l.near, .bytes = 20u << 20, .seed = 1},
                        {.t = l.far, .bytes = 20u << 20, .seed = 2},
                        {.t = l.far, .bytes = 9u << 20, .seed = 3},
                        {.t = l.near, .bytes = 9u << 20, .seed = 4}};
    for (int i = 0; i < 4; i++)
        pthread_create(&t[i], NULL, i % 2 ? receive_main : send_main, &p[i]);
    for (int i = 0; i < 4; i++)
        pthread_join(t[i], NULL);
    for (int i = 0; i < 4; i++)
        if (p[i].rc)
            fail_msg("%d: %s", i, p[i].err.message);
    close_link(&l);
}

/* Nobody reads: the sender waits, and loses nothing by its deadline; then all comes. */
static void test_credits(void **state)
{
    struct link l;
    struct lb_error e = LB_ERROR_INIT;
    unsigned sent = 0;

    (void)state;
    need_device(&l);
    uint8_t *buf = lb_alloc(128 << 10);
    struct iovec iov = {buf, 128 << 10};
    open_link(&l);
    while (!l.near->ops->writev(l.near, &iov, 1, lb_now_ns() + 300000000, &e))
        sent++;
    assert_true(lb_is_timeout(&e));
    assert_int_equal(sent, 16);
    assert_true(l.near->blocked_ns >= 200000000);
    for (unsigned i = 0; i < sent; i++)
        assert_int_equal(lb_transport_read(l.far, buf, iov.iov_len, lb_now_ns() + UINT64_C(5000000000), &e), 0);
    assert_int_equal(l.near->ops->writev(l.near, &iov, 1, lb_now_ns() + UINT64_C(5000000000), &e), 0);
    /* The end: what was sent is still read. */
    l.near->ops->close(LB_STEAL_PTR(l.near));
    assert_int_equal(lb_transport_read(l.far, buf, iov.iov_len, lb_now_ns() + UINT64_C(5000000000), &e), 0);
    assert_int_equal(l.far->ops->read_some(l.far, buf, 1, lb_now_ns() + UINT64_C(5000000000), &e), 0);
    assert_int_equal(l.far->ops->writev(l.far, &iov, 1, 0, &e), -1);
    assert_int_equal(e.code, LB_E_NET);
    free(buf);
    close_link(&l);
}

static void *abort_main(void *arg)
{
    struct lb_transport *t = arg;

    lb_sleep_ms(200);
    t->ops->abort(t);
    return NULL;
}

static void test_abort(void **state)
{
    struct link l;
    struct lb_error e = LB_ERROR_INIT;
    uint8_t byte = 0;
    struct iovec iov = {&byte, 1};
    pthread_t t;

    (void)state;
    need_device(&l);
    open_link(&l);
    pthread_create(&t, NULL, abort_main, l.far);
    assert_int_equal(l.far->ops->read_some(l.far, &byte, 1, 0, &e), -1);
    assert_int_equal(e.code, LB_E_CANCELLED);
    pthread_join(t, NULL);
    assert_int_equal(l.far->ops->writev(l.far, &iov, 1, 0, &e), -1);
    assert_int_equal(l.far->ops->read_some(l.far, &byte, 1, 0, &e), -1);
    /* the other side learns it at once */
    uint64_t start = lb_now_ns();
    assert_int_equal(l.near->ops->read_some(l.near, &byte, 1, start + UINT64_C(5000000000), &e), 0);
    assert_true(lb_now_ns() - start < 2000000000u);
    close_link(&l);
}

/* A connection of another session is turned away, and the next one of ours comes through. */
static void test_stranger(void **state)
{
    static const uint8_t other[LB_SESSION_ID_BYTES] = {9};
    struct link l;
    struct lb_error e = LB_ERROR_INIT;
    struct lb_transport *t = NULL;
    pthread_t thread;

    (void)state;
    need_device(&l);
    assert_int_equal(lb_rdma_listen(&l.addr, 1, SESSION, &l.listener, &e), 0);
    assert_int_equal(pthread_create(&thread, NULL, accept_main, &l), 0);
    assert_int_equal(lb_rdma_connect(&l.addr, other, 5000, -1, &t, &e), -1);
    assert_int_equal(e.code, LB_E_NET);
    assert_int_equal(lb_rdma_connect(&l.addr, SESSION, 5000, -1, &l.near, &e), 0);
    pthread_join(thread, NULL);
    assert_non_null(l.far);
    assert_int_equal(lb_rdma_accept(l.listener, 20, &t, &e), -1);
    assert_true(lb_is_timeout(&e));
    close_link(&l);
}

static void *connect_main(void *arg)
{
    struct link *l = arg;
    struct lb_error e = LB_ERROR_INIT;

    if (lb_rdma_connect(&l->addr, SESSION, 10000, -1, &l->near, &e))
        print_message("connect: %s\n", e.message);
    return NULL;
}

/* Who asked and has given up since keeps the next one waiting for no longer than it takes to say so. */
static void test_given_up(void **state)
{
    struct link l;
    struct lb_error e = LB_ERROR_INIT;
    struct lb_transport *t = NULL;
    pthread_t thread;

    (void)state;
    need_device(&l);
    assert_int_equal(lb_rdma_listen(&l.addr, 1, SESSION, &l.listener, &e), 0);
    assert_int_equal(lb_rdma_connect(&l.addr, SESSION, 500, -1, &t, &e), -1); /* nobody accepts */
    assert_true(lb_is_timeout(&e));
    uint64_t start = lb_now_ns();
    assert_int_equal(pthread_create(&thread, NULL, connect_main, &l), 0);
    for (unsigned i = 0; i < 3 && !l.far; i++)
        lb_rdma_accept(l.listener, 8000, &l.far, &e);
    pthread_join(thread, NULL);
    assert_non_null(l.near);
    assert_non_null(l.far);
    assert_true(lb_now_ns() - start < UINT64_C(8000000000));
    close_link(&l);
}

/* -------------------------------------------------------------------- writes */

#define AREA (2u << 20)

/* What was written is there when the message after it is. */
static void test_write(void **state)
{
    struct link l;
    struct lb_error e = LB_ERROR_INIT;
    struct lb_rdma_mr from = {0}, to = {0};
    uint8_t byte = 7;
    struct iovec iov = {&byte, 1};

    (void)state;
    need_device(&l);
    open_link(&l);
    uint8_t *a = mmap(NULL, AREA, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    uint8_t *b = mmap(NULL, AREA, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    assert_int_equal(lb_rdma_register(l.near, a, AREA, false, &from, &e), 0);
    assert_int_equal(lb_rdma_register(l.far, b, AREA, true, &to, &e), 0);
    for (unsigned turn = 0; turn < 20; turn++) {
        fill(a, AREA, turn);
        for (unsigned at = 0; at < AREA; at += 4096)
            assert_int_equal(lb_rdma_write(l.near, &from, a + at, 4096, to.addr + at, to.rkey,
                                           at + 4096 < AREA, &e), 0);
        assert_int_equal(l.near->ops->writev(l.near, &iov, 1, 0, &e), 0);
        assert_int_equal(lb_transport_read(l.far, &byte, 1, lb_now_ns() + UINT64_C(10000000000), &e), 0);
        assert_memory_equal(a, b, AREA);
    }
    assert_int_equal(lb_rdma_drain(l.near, lb_now_ns() + UINT64_C(5000000000), &e), 0);
    /* Where nothing is registered any more nobody can write. */
    uint64_t where = to.addr;
    uint32_t key = to.rkey;
    lb_rdma_deregister(&to);
    memset(a, 0x55, AREA);
    if (!lb_rdma_write(l.near, &from, a, 4096, where, key, false, &e))
        assert_int_equal(lb_rdma_drain(l.near, lb_now_ns() + UINT64_C(5000000000), &e), -1);
    assert_int_equal(e.code, LB_E_NET);
    assert_int_not_equal(b[0], 0x55);
    lb_rdma_deregister(&from);
    close_link(&l);
    munmap(a, AREA);
    munmap(b, AREA);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_stream_both_ways), cmocka_unit_test(test_credits),
        cmocka_unit_test(test_abort),            cmocka_unit_test(test_stranger),
        cmocka_unit_test(test_given_up),         cmocka_unit_test(test_write),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
