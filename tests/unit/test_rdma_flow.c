/* What of RDMA needs no device: credits, the window of chunks, networks, and which transport is chosen. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <stdlib.h>
#include <string.h>

#include "migrate/transport.h"
#include "netproto/rdma.h"
#include "netproto/rdma_flow.h"

/* ------------------------------------------------------------------ credits */

#define BUFS 4u

/* One side of a stream: what is on its way to it, and what it has received and not read. */
struct side {
    struct lb_rdma_flow flow;
    struct {
        uint32_t immediate;
        bool data;
    } wire[64];
    unsigned n_wire;   /* also: receives in use that nobody has looked at */
    unsigned unread;
    unsigned sent, read;
};

static void put(struct side *to, uint32_t immediate, bool data)
{
    assert_true(to->n_wire < sizeof(to->wire) / sizeof(to->wire[0]));
    to->wire[to->n_wire].immediate = immediate;
    to->wire[to->n_wire++].data = data;
    /* receives that are posted: never exceeded, or the device would stop the sender */
    assert_true(to->n_wire + to->unread <= BUFS + LB_RDMA_SPARE);
}

static void look(struct side *s, struct side *peer)
{
    for (unsigned i = 0; i < s->n_wire; i++) {
        assert_int_equal(lb_rdma_flow_got(&s->flow, s->wire[i].immediate, NULL), 0);
        s->unread += s->wire[i].data;
    }
    s->n_wire = 0;
    if (lb_rdma_flow_due(&s->flow))
        put(peer, lb_rdma_flow_tell(&s->flow), false);
}

static bool step(struct side *s, struct side *peer, unsigned what)
{
    if (what == 0 && s->flow.credits > 0) {
        put(peer, lb_rdma_flow_send(&s->flow), true);
        s->sent++;
        return true;
    }
    if (what == 1 && s->unread > 0) {
        s->unread--;
        s->read++;
        lb_rdma_flow_freed(&s->flow);
        if (lb_rdma_flow_due(&s->flow))
            put(peer, lb_rdma_flow_tell(&s->flow), false);
        return true;
    }
    if (what == 2) {
        look(s, peer);
        return true;
    }
    return false;
}

/* Whatever the order: no receive is missing, and nobody waits for ever. */
static void test_credits(void **state)
{
    (void)state;
    for (unsigned seed = 1; seed <= 200; seed++) {
        struct side s[2] = {0};
        unsigned rnd = seed, lazy = seed % 4; /* of lazy & 1: side 0 hardly looks; & 2: side 1 sends little */

        lb_rdma_flow_init(&s[0].flow, BUFS, BUFS);
        lb_rdma_flow_init(&s[1].flow, BUFS, BUFS);
        for (unsigned i = 0; i < 5000; i++) {
            unsigned who = (unsigned)rand_r(&rnd) % 2, what = (unsigned)rand_r(&rnd) % 3;

            if ((lazy & 1) && who == 0 && what == 2 && rand_r(&rnd) % 16)
                continue;
            if ((lazy & 2) && who == 1 && what == 0)
                continue;
            step(&s[who], &s[!who], what);
        }
        for (unsigned i = 0; i < 3; i++) { /* all that is on its way is read and known */
            step(&s[1], &s[0], 2);
            while (step(&s[1], &s[0], 1))
                ;
            step(&s[0], &s[1], 2);
        }
        /* from here on: 0 sends, 1 reads, both look */
        unsigned before = s[0].sent;
        for (unsigned i = 0; i < 100; i++) {
            step(&s[0], &s[1], 0);
            step(&s[1], &s[0], 2);
            while (step(&s[1], &s[0], 1))
                ;
            step(&s[0], &s[1], 2);
        }
        assert_int_equal(s[0].sent, before + 100);
        assert_int_equal(s[1].read, s[0].sent);
    }
}

static void test_credits_of_a_liar(void **state)
{
    struct lb_error e = LB_ERROR_INIT;
    struct lb_rdma_flow f;

    (void)state;
    lb_rdma_flow_init(&f, 4, 4);
    lb_rdma_flow_send(&f);
    assert_int_equal(lb_rdma_flow_got(&f, 2, &e), -1);
    assert_int_equal(e.code, LB_E_PROTO);
    assert_int_equal(lb_rdma_flow_got(&f, UINT32_MAX, NULL), -1);
    assert_int_equal(f.credits, 3);
    assert_int_equal(lb_rdma_flow_got(&f, 1, NULL), 0);
}

static void test_hello(void **state)
{
    static const struct lb_rdma_hello bad[] = {
        {0, 131072}, {1, 131072}, {4097, 131072}, {16, 4095}, {16, (8u << 20) + 1}, {UINT32_MAX, UINT32_MAX},
    };
    struct lb_rdma_hello h = {16, 131072}, got;
    uint8_t b[LB_RDMA_HELLO_BYTES + 4] = {0};

    (void)state;
    lb_rdma_hello_write(b, &h);
    assert_int_equal(lb_rdma_hello_parse(b, sizeof(b), &got, NULL), 0); /* padded */
    assert_int_equal(got.buffers, 16);
    assert_int_equal(got.buffer_bytes, 131072);
    assert_int_equal(lb_rdma_hello_parse(b, LB_RDMA_HELLO_BYTES - 1, &got, NULL), -1);
    for (unsigned i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        lb_rdma_hello_write(b, &bad[i]);
        assert_int_equal(lb_rdma_hello_parse(b, sizeof(b), &got, NULL), -1);
    }
}

/* ------------------------------------------------------------------- window */

static void test_window(void **state)
{
    struct lb_rdma_window w;

    (void)state;
    lb_rdma_window_init(&w, 1);
    assert_int_equal((uint64_t)w.n_slots * LB_RDMA_CHUNK_BYTES, LB_RDMA_WINDOW_BYTES);
    lb_rdma_window_init(&w, 64);
    assert_int_equal(w.n_slots, 2);
    lb_rdma_window_init(&w, 5);
    assert_int_equal(w.n_slots, 3);
    for (unsigned i = 0; i < 3; i++) {
        assert_int_equal(lb_rdma_window_victim(&w), i);
        lb_rdma_window_put(&w, i, 7, i);
    }
    assert_int_equal(lb_rdma_window_find(&w, 7, 0), 0);
    assert_int_equal(lb_rdma_window_find(&w, 6, 0), -1);
    assert_int_equal(lb_rdma_window_find(&w, 7, 3), -1);
    assert_int_equal(lb_rdma_window_victim(&w), 1);
    lb_rdma_window_put(&w, 1, 7, 3);
    assert_int_equal(lb_rdma_window_find(&w, 7, 1), -1);
    assert_int_equal(lb_rdma_window_victim(&w), 2);
    w.slot[0].full = false; /* emptied, and then not filled */
    assert_int_equal(lb_rdma_window_find(&w, 7, 0), -1);
    assert_int_equal(lb_rdma_window_victim(&w), 0);
}

/* ---------------------------------------------------------------- addresses */

static struct lb_rdma_addr addr(const char *ip, unsigned prefix)
{
    struct lb_rdma_addr a = {.prefix = prefix};

    snprintf(a.ip, sizeof(a.ip), "%s", ip);
    return a;
}

static void test_networks(void **state)
{
    static const struct {
        const char *a, *b;
        unsigned pa, pb;
        bool same;
    } v[] = {
        {"10.0.0.1", "10.0.0.200", 24, 24, true},   {"10.0.0.1", "10.0.1.1", 24, 24, false},
        {"10.0.0.1", "10.0.1.1", 23, 23, true},     {"10.0.0.1", "10.0.2.1", 23, 23, false},
        {"10.0.0.1", "10.0.0.2", 24, 16, false},    {"10.0.0.1", "10.0.0.1", 32, 32, true},
        {"fd00::1", "fd00::2", 64, 64, true},       {"fd00::1", "fd00:0:0:1::2", 64, 64, false},
        {"10.0.0.1", "fd00::2", 24, 24, false},     {"10.0.0.1", "10.0.0.2", 33, 33, false},
        {"10.0.0.1", "10.0.0.2", 0, 0, false},      {"", "", 24, 24, false},
        {"10.0.0.1", "host", 24, 24, false},        {"fd00::1", "fd00::2", 129, 129, false},
    };

    (void)state;
    for (unsigned i = 0; i < sizeof(v) / sizeof(v[0]); i++) {
        struct lb_rdma_addr a = addr(v[i].a, v[i].pa), b = addr(v[i].b, v[i].pb);

        assert_int_equal(lb_rdma_same_network(&a, &b), v[i].same);
        assert_int_equal(lb_rdma_same_network(&b, &a), v[i].same);
    }
}

static void test_parse_addresses(void **state)
{
    Lb__RdmaAddress v[20], *pv[20];
    struct lb_rdma_addr out[LB_RDMA_MAX_ADDRS];
    char longer[100];

    (void)state;
    memset(longer, '1', sizeof(longer) - 1);
    longer[sizeof(longer) - 1] = '\0';
    for (unsigned i = 0; i < 20; i++) {
        lb__rdma_address__init(&v[i]);
        v[i].ip = (char *)"10.0.0.1";
        v[i].prefix = 24;
        v[i].port = 5000 + i;
        pv[i] = &v[i];
    }
    v[0].ip = longer;
    v[1].prefix = 99;
    v[2].port = 65536;
    v[3].ip = (char *)"10.0.0.1; reboot";
    assert_int_equal(lb_rdma_addrs_parse(pv, 5, out), 1);
    assert_int_equal(out[0].port, 5004);
    assert_int_equal(lb_rdma_addrs_parse(pv, 20, out), LB_RDMA_MAX_ADDRS);
}

/* ------------------------------------------------------------------- choice */

static Lb__TransportWish wish_of(uint32_t wish, bool trusted, Lb__RdmaAddress **addrs, size_t n)
{
    Lb__TransportWish w = LB__TRANSPORT_WISH__INIT;

    w.wish = wish;
    w.trusted_fabric = trusted;
    w.addresses = addrs;
    w.n_addresses = n;
    return w;
}

static void test_choose(void **state)
{
    static const struct {
        uint32_t wish;
        bool trusted, theirs, mine, common;
        bool rdma, zero_copy;
        enum lb_check_status status;
        const char *says;
    } v[] = {
        {LB_TRANSPORT_TCP, true, true, true, true, false, false, LB_CHECK_OK, "TCP, as asked"},
        {LB_TRANSPORT_AUTO, false, true, true, true, true, false, LB_CHECK_OK, "RDMA at 10.1.0.2"},
        {LB_TRANSPORT_AUTO, true, true, true, true, true, true, LB_CHECK_OK, "in clear"},
        {LB_TRANSPORT_AUTO, false, true, true, false, false, false, LB_CHECK_OK, "no common network"},
        {LB_TRANSPORT_AUTO, false, false, true, true, false, false, LB_CHECK_OK, "the source has no RDMA"},
        {LB_TRANSPORT_AUTO, true, false, true, true, false, false, LB_CHECK_WARN, "changes nothing"},
        {LB_TRANSPORT_RDMA, false, true, true, true, true, false, LB_CHECK_OK, "encrypted"},
        {LB_TRANSPORT_RDMA, true, true, true, false, true, true, LB_CHECK_OK, "RDMA at 10.1.0.2"},
        {LB_TRANSPORT_RDMA, false, true, false, true, false, false, LB_CHECK_FAIL, "no RDMA"},
        {LB_TRANSPORT_RDMA, false, false, true, true, false, false, LB_CHECK_FAIL, "the source has no RDMA"},
    };

    (void)state;
    for (unsigned i = 0; i < sizeof(v) / sizeof(v[0]); i++) {
        struct lb_rdma_addr theirs = addr(v[i].common ? "10.1.0.1" : "10.2.0.1", 24);
        struct lb_rdma_addr mine = addr("10.1.0.2", 24);
        Lb__RdmaAddress **packed = lb_rdma_addrs_pack(&theirs, 1);
        Lb__TransportWish w = wish_of(v[i].wish, v[i].trusted, packed, v[i].theirs);
        struct lb_transport_choice c;
        struct lb_report rep = {0};

        lb_transport_choose(&w, &mine, v[i].mine, &c, &rep);
        assert_int_equal(c.rdma, v[i].rdma);
        assert_int_equal(c.n, v[i].rdma);
        assert_int_equal(c.zero_copy, v[i].zero_copy);
        assert_int_equal(rep.n, 1);
        assert_string_equal(rep.v[0].id, "transport");
        assert_int_equal(rep.v[0].status, v[i].status);
        if (!strstr(rep.v[0].message, v[i].says))
            fail_msg("%u: \"%s\" does not say \"%s\"", i, rep.v[0].message, v[i].says);
        lb_report_free(&rep);
        lb_rdma_addrs_free(packed, 1);
    }
}

static void test_choose_old_source(void **state)
{
    struct lb_rdma_addr mine = addr("10.1.0.2", 24);
    struct lb_transport_choice c;
    struct lb_report rep = {0};

    (void)state;
    lb_transport_choose(NULL, &mine, 1, &c, &rep);
    assert_false(c.rdma);
    lb_report_free(&rep);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_credits),        cmocka_unit_test(test_credits_of_a_liar),
        cmocka_unit_test(test_hello),          cmocka_unit_test(test_window),
        cmocka_unit_test(test_networks),       cmocka_unit_test(test_parse_addresses),
        cmocka_unit_test(test_choose),         cmocka_unit_test(test_choose_old_source),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
