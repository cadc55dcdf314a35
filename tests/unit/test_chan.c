/* The control channel: trust on both sides, messages of every size, damage, deadlines, abort; and
 * the preamble. */
#include "netproto/netproto_internal.h"
#include "netproto/noise.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <string.h>
/* after the headers above */
#include <cmocka.h>
#include <sodium.h>

static struct lb_identity make_id(uint8_t seed)
{
    struct lb_identity id;
    memset(id.priv, seed, sizeof(id.priv));
    crypto_scalarmult_base(id.pub, id.priv);
    return id;
}

static unsigned g_timeout_ms = 5000;

struct accepting {
    struct lb_transport *t;
    struct lb_identity me;
    const uint8_t *trusts; /* NULL: nobody */
    bool asked;
    struct lb_chan *c;
    struct lb_error err;
    int rc;
};

static bool trusted(const uint8_t pub[LB_KEY_BYTES], void *arg)
{
    struct accepting *a = arg;
    a->asked = true;
    return a->trusts && memcmp(pub, a->trusts, LB_KEY_BYTES) == 0;
}

static void *acceptor(void *arg)
{
    struct accepting *a = arg;
    uint8_t bytes[LB_PREAMBLE_BYTES];
    struct lb_preamble p;
    if (lb_transport_read(a->t, bytes, sizeof(bytes), lb_deadline(g_timeout_ms), &a->err) < 0 ||
        lb_preamble_parse(bytes, &p, &a->err) < 0) {
        a->t->ops->close(a->t);
        a->rc = -1;
        return NULL;
    }
    a->rc = lb_chan_accept(a->t, &a->me, trusted, a, g_timeout_ms, &a->c, &a->err);
    return NULL;
}

struct duo {
    struct lb_identity id;
    struct accepting a;
    struct lb_chan *c;
    struct lb_error err;
    int rc;
};

/* plan[0]: what the initiator sends, plan[1]: the responder. */
static void meet(struct duo *d, const uint8_t *expect, bool trust, const struct lb_fault_plan *plan0,
                 const struct lb_fault_plan *plan1)
{
    struct lb_transport *t;
    pthread_t th;
    memset(d, 0, sizeof(*d));
    d->id = make_id(1);
    d->a.me = make_id(2);
    d->a.trusts = trust ? d->id.pub : NULL;
    assert_int_equal(lb_memory_pair(&t, &d->a.t, NULL), 0);
    if (plan0)
        t = lb_transport_fault(t, plan0);
    if (plan1)
        d->a.t = lb_transport_fault(d->a.t, plan1);
    pthread_create(&th, NULL, acceptor, &d->a);
    d->rc = lb_chan_open(t, &d->id, expect ? expect : d->a.me.pub, g_timeout_ms, &d->c, &d->err);
    pthread_join(th, NULL);
}

static void part(struct duo *d)
{
    if (d->rc == 0)
        lb_chan_close(d->c);
    if (d->a.rc == 0)
        lb_chan_close(d->a.c);
}

static void messages_of_every_size(void **state)
{
    (void)state;
    static const size_t sizes[] = {0, 1, 2, 100, 65517, 65518, 65519, 131036, 131037, 1000000,
                                   LB_CONTROL_MAX_BYTES};
    struct duo d;
    uint8_t *msg = malloc(LB_CONTROL_MAX_BYTES + 1);
    meet(&d, NULL, true, NULL, NULL);
    assert_int_equal(d.rc | d.a.rc, 0);
    assert_memory_equal(lb_chan_peer_key(d.c), d.a.me.pub, LB_KEY_BYTES);
    assert_memory_equal(lb_chan_peer_key(d.a.c), d.id.pub, LB_KEY_BYTES);
    randombytes_buf(msg, LB_CONTROL_MAX_BYTES);
    for (int way = 0; way < 2; way++)
        for (size_t i = 0; i < LB_ARRAY_LEN(sizes); i++) {
            void *got;
            size_t len;
            assert_int_equal(lb_chan_send(way ? d.a.c : d.c, msg, sizes[i], &d.err), 0);
            assert_int_equal(lb_chan_send(way ? d.a.c : d.c, "next", 4, &d.err), 0);
            assert_int_equal(lb_chan_recv(way ? d.c : d.a.c, &got, &len, 0, &d.err), 0);
            assert_int_equal(len, sizes[i]);
            assert_memory_equal(got, msg, len);
            free(got);
            assert_int_equal(lb_chan_recv(way ? d.c : d.a.c, &got, &len, 0, &d.err), 0);
            assert_int_equal(len, 4);
            assert_memory_equal(got, "next", 4);
            free(got);
        }
    assert_int_equal(lb_chan_send(d.c, msg, LB_CONTROL_MAX_BYTES + 1, &d.err), -1);
    /* the other side goes away */
    void *got;
    size_t len;
    lb_chan_close(d.a.c);
    assert_int_equal(lb_chan_recv(d.c, &got, &len, 0, &d.err), -1);
    assert_int_equal(d.err.code, LB_E_NET);
    lb_chan_close(d.c);
    free(msg);
}

static void wrong_responder(void **state)
{
    (void)state;
    struct duo d;
    struct lb_identity other = make_id(9);
    meet(&d, other.pub, true, NULL, NULL);
    assert_int_equal(d.rc, -1);
    assert_int_equal(d.err.code, LB_E_AUTH);
    assert_true(d.err.remedy[0] != 0);
    assert_int_equal(d.a.rc, -1);
    assert_int_equal(d.a.err.code, LB_E_NET);
    assert_false(d.a.asked); /* our key was never shown */
}

static void unknown_initiator(void **state)
{
    (void)state;
    struct duo d;
    meet(&d, NULL, false, NULL, NULL);
    assert_int_equal(d.rc, -1);
    assert_int_equal(d.err.code, LB_E_AUTH);
    assert_non_null(strstr(d.err.remedy, "host trust"));
    assert_int_equal(d.a.rc, -1);
    assert_int_equal(d.a.err.code, LB_E_AUTH);
    assert_true(d.a.asked);
}

/* Preamble, message 1 and 3 with their lengths. */
#define FROM_INITIATOR (LB_PREAMBLE_BYTES + 2 + LB_NOISE_MSG1_BYTES + 2 + LB_NOISE_MSG3_BYTES)
#define FROM_RESPONDER (2 + LB_NOISE_MSG2_BYTES + 2 + 17)

static void every_flipped_bit(void **state)
{
    (void)state;
    for (int64_t bit = 0; bit < (int64_t)(FROM_INITIATOR + FROM_RESPONDER) * 8; bit++) {
        struct lb_fault_plan p = {.flip_bit_at = bit, .truncate_at = -1, .stall_at = -1};
        struct duo d;
        bool ours = bit < (int64_t)FROM_INITIATOR * 8;
        if (!ours)
            p.flip_bit_at -= (int64_t)FROM_INITIATOR * 8;
        /* a welcome whose length grew ends by its deadline; a failure is what is asked for anyway */
        g_timeout_ms = bit >= (int64_t)(FROM_INITIATOR + 2 + LB_NOISE_MSG2_BYTES) * 8 ? 100 : 5000;
        meet(&d, NULL, true, ours ? &p : NULL, ours ? NULL : &p);
        if (d.rc == 0)
            fail_msg("flipped bit %d goes unnoticed", (int)bit);
        enum lb_errcode who = ours ? d.a.err.code : d.err.code;
        if (who != LB_E_AUTH && who != LB_E_PROTO && who != LB_E_NET)
            fail_msg("bit %d: %s", (int)bit, d.err.message);
        part(&d);
    }
    g_timeout_ms = 5000;
}

static void every_truncation(void **state)
{
    (void)state;
    for (int64_t at = 0; at < (int64_t)(FROM_INITIATOR + FROM_RESPONDER); at++) {
        struct lb_fault_plan p = {.flip_bit_at = -1, .truncate_at = at, .stall_at = -1};
        struct duo d;
        bool ours = at < (int64_t)FROM_INITIATOR;
        if (!ours)
            p.truncate_at -= (int64_t)FROM_INITIATOR;
        meet(&d, NULL, true, ours ? &p : NULL, ours ? NULL : &p);
        assert_int_equal(d.rc, -1);
        assert_int_equal(d.a.rc, -1);
        part(&d);
    }
}

/* Bytes of a stranger, as they are, to an accepting side. */
static struct accepting nonsense(const void *bytes, size_t len)
{
    struct accepting a = {.me = make_id(2)};
    struct lb_transport *t;
    struct iovec iov = {(void *)(uintptr_t)bytes, len};
    assert_int_equal(lb_memory_pair(&t, &a.t, NULL), 0);
    assert_int_equal(t->ops->writev(t, &iov, 1, 0, NULL), 0);
    t->ops->abort(t);
    a.rc = lb_chan_accept(a.t, &a.me, trusted, &a, 1000, &a.c, &a.err);
    t->ops->close(t);
    return a;
}

static void strangers(void **state)
{
    (void)state;
    uint8_t big[70000];
    static const char http[] = "GET / HTTP/1.1\r\nHost: x\r\n\r\n";
    struct accepting a = nonsense(http, sizeof(http));
    assert_int_equal(a.rc, -1);
    assert_int_equal(a.err.code, LB_E_PROTO);
    memset(big, 0xff, sizeof(big));
    a = nonsense(big, sizeof(big)); /* 65535 octets announced: refused unread */
    assert_int_equal(a.rc, -1);
    assert_int_equal(a.err.code, LB_E_PROTO);
    a = nonsense("", 0);
    assert_int_equal(a.rc, -1);
    assert_int_equal(a.err.code, LB_E_NET);
    memset(big, 0, sizeof(big));
    lb_put16(big, 32);
    a = nonsense(big, 34); /* an ephemeral key of low order */
    assert_int_equal(a.rc, -1);
    assert_int_equal(a.err.code, LB_E_AUTH);
}

/* Frames after the handshake: every bit of a two-frame message. */
static void damaged_frames(void **state)
{
    (void)state;
    const int64_t start = (int64_t)FROM_INITIATOR;
    for (int64_t bit = 0; bit < (2 + 17 + 40) * 8; bit++) {
        struct lb_fault_plan p = {.flip_bit_at = start * 8 + bit, .truncate_at = -1, .stall_at = -1};
        struct duo d;
        char msg[40] = "hello";
        void *got = NULL;
        size_t len;
        meet(&d, NULL, true, &p, NULL);
        assert_int_equal(d.rc | d.a.rc, 0);
        assert_int_equal(lb_chan_send(d.c, msg, sizeof(msg), &d.err), 0);
        lb_chan_close(d.c);
        assert_int_equal(lb_chan_recv(d.a.c, &got, &len, lb_deadline(1000), &d.a.err), -1);
        assert_null(got);
        if (bit >= 16)
            assert_int_equal(d.a.err.code, LB_E_AUTH);
        lb_chan_close(d.a.c);
    }
    for (int64_t at = 0; at < 2 + 17 + 40; at++) {
        struct lb_fault_plan p = {.flip_bit_at = -1, .truncate_at = start + at, .stall_at = -1};
        struct duo d;
        char msg[40] = "hello";
        void *got = NULL;
        size_t len;
        meet(&d, NULL, true, &p, NULL);
        assert_int_equal(lb_chan_send(d.c, msg, sizeof(msg), &d.err), -1);
        assert_int_equal(lb_chan_recv(d.a.c, &got, &len, lb_deadline(1000), &d.a.err), -1);
        assert_int_equal(d.a.err.code, LB_E_NET);
        part(&d);
    }
}

/* A peer with good keys and bad manners: its frames are made here with its own cipher state. */
static void bad_manners(void **state)
{
    (void)state;
    static uint8_t data[65535], frame[65537 + 2];
    for (int what = 0; what < 4; what++) {
        struct accepting a = {.me = make_id(2)};
        struct lb_identity me = make_id(1);
        struct lb_transport *t;
        struct lb_noise n;
        struct lb_noise_cipher tx, rx;
        uint8_t prologue[LB_PREAMBLE_BYTES], msg[128], none[128];
        size_t len, none_len;
        pthread_t th;
        a.trusts = me.pub;
        assert_int_equal(lb_memory_pair(&t, &a.t, NULL), 0);
        lb_preamble_write(prologue, &(struct lb_preamble){.kind = 'C'});
        pthread_create(&th, NULL, acceptor, &a);
        lb_noise_init(&n, true, &me, prologue, sizeof(prologue));
        struct iovec iov[2] = {{prologue, sizeof(prologue)}, {msg, 34}};
        len = 100;
        assert_int_equal(lb_noise_write(&n, NULL, 0, msg + 2, &len, NULL), 0);
        lb_put16(msg, 32);
        assert_int_equal(t->ops->writev(t, iov, 2, 0, NULL), 0);
        assert_int_equal(lb_transport_read(t, msg, 98, 0, NULL), 0);
        assert_int_equal(lb_noise_read(&n, msg + 2, 96, none, &none_len, NULL), 0);
        len = 100;
        assert_int_equal(lb_noise_write(&n, NULL, 0, msg + 2, &len, NULL), 0);
        lb_put16(msg, 64);
        iov[0] = (struct iovec){msg, 66};
        assert_int_equal(t->ops->writev(t, iov, 1, 0, NULL), 0);
        lb_noise_split(&n, &tx, &rx);
        pthread_join(th, NULL);
        assert_int_equal(a.rc, 0);

        memset(data, 0, sizeof(data));
        size_t size = 65535 - 16, frames = 1;
        switch (what) {
        case 0: /* never the last frame: more than a message may have */
            frames = LB_CONTROL_MAX_BYTES / (65535 - 17) + 1;
            break;
        case 1:
            data[0] = 2; /* unknown flag */
            break;
        case 2:
            size = 1; /* empty and not the last */
            break;
        case 3:
            size = 0; /* a frame without flags: 16 octets */
            break;
        }
        for (size_t i = 0; i < frames; i++) {
            assert_int_equal(lb_noise_seal(&tx, NULL, 0, data, size, frame + 2, NULL), 0);
            lb_put16(frame, (uint16_t)(size + 16));
            iov[0] = (struct iovec){frame, size + 18};
            assert_int_equal(t->ops->writev(t, iov, 1, 0, NULL), 0);
        }
        void *got = NULL;
        assert_int_equal(lb_chan_recv(a.c, &got, &len, lb_deadline(2000), &a.err), -1);
        assert_int_equal(a.err.code, LB_E_PROTO);
        lb_chan_close(a.c);
        t->ops->close(t);
    }
}

static void *abort_soon(void *arg)
{
    lb_sleep_ms(50);
    lb_chan_abort(arg);
    return NULL;
}

static void deadline_and_abort(void **state)
{
    (void)state;
    struct duo d;
    void *got;
    size_t len;
    pthread_t th;
    meet(&d, NULL, true, NULL, NULL);
    assert_int_equal(lb_chan_recv(d.c, &got, &len, lb_deadline(20), &d.err), -1);
    assert_true(lb_is_timeout(&d.err));
    assert_int_equal(lb_chan_send(d.a.c, "later", 5, &d.err), 0);
    assert_int_equal(lb_chan_recv(d.c, &got, &len, lb_deadline(1000), &d.err), 0);
    assert_int_equal(len, 5);
    free(got);
    pthread_create(&th, NULL, abort_soon, d.c);
    assert_int_equal(lb_chan_recv(d.c, &got, &len, 0, &d.err), -1);
    assert_int_equal(d.err.code, LB_E_CANCELLED);
    pthread_join(th, NULL);
    assert_int_equal(lb_chan_send(d.c, "x", 1, &d.err), -1);
    part(&d);
}

struct sender {
    struct lb_chan *c;
    uint8_t id;
};

static void *send_many(void *arg)
{
    struct sender *s = arg;
    for (unsigned i = 0; i < 50; i++) {
        size_t len = 1 + i * 3000;
        uint8_t *msg = malloc(len);
        memset(msg, s->id, len);
        if (lb_chan_send(s->c, msg, len, NULL) < 0)
            abort();
        free(msg);
    }
    return NULL;
}

static void senders_take_turns(void **state)
{
    (void)state;
    struct duo d;
    pthread_t th[3];
    struct sender s[3];
    meet(&d, NULL, true, NULL, NULL);
    for (uint8_t i = 0; i < 3; i++) {
        s[i] = (struct sender){d.c, i};
        pthread_create(&th[i], NULL, send_many, &s[i]);
    }
    unsigned next[3] = {0};
    for (int n = 0; n < 150; n++) {
        uint8_t *got;
        size_t len;
        assert_int_equal(lb_chan_recv(d.a.c, (void **)&got, &len, 0, &d.a.err), 0);
        assert_true(got[0] < 3);
        assert_int_equal(len, 1 + next[got[0]]++ * 3000);
        for (size_t i = 0; i < len; i++)
            assert_true(got[i] == got[0]);
        free(got);
    }
    for (int i = 0; i < 3; i++)
        pthread_join(th[i], NULL);
    part(&d);
}

static void preamble(void **state)
{
    (void)state;
    struct lb_preamble in = {.kind = 'D', .session_id = {1, 2, 3}}, out;
    uint8_t bytes[LB_PREAMBLE_BYTES];
    struct lb_error err = LB_ERROR_INIT;
    lb_preamble_write(bytes, &in);
    assert_int_equal(lb_preamble_parse(bytes, &out, &err), 0);
    assert_int_equal(out.kind, 'D');
    assert_memory_equal(out.session_id, in.session_id, sizeof(in.session_id));
    for (unsigned bit = 0; bit < 8 * 8; bit++) { /* any flip in the fixed part */
        lb_preamble_write(bytes, &in);
        bytes[bit / 8] ^= (uint8_t)(1u << bit % 8);
        assert_int_equal(lb_preamble_parse(bytes, &out, &err), -1);
        assert_int_equal(err.code, LB_E_PROTO);
    }
    lb_preamble_write(bytes, &in);
    bytes[4] = 'C'; /* with a session id */
    assert_int_equal(lb_preamble_parse(bytes, &out, &err), -1);
    memset(bytes + 8, 0, 16);
    assert_int_equal(lb_preamble_parse(bytes, &out, &err), 0);
    bytes[4] = 'D'; /* without */
    assert_int_equal(lb_preamble_parse(bytes, &out, &err), -1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(messages_of_every_size), cmocka_unit_test(wrong_responder),
        cmocka_unit_test(unknown_initiator),      cmocka_unit_test(every_flipped_bit),
        cmocka_unit_test(every_truncation),       cmocka_unit_test(strangers),
        cmocka_unit_test(damaged_frames),         cmocka_unit_test(bad_manners),
        cmocka_unit_test(deadline_and_abort),     cmocka_unit_test(senders_take_turns),
        cmocka_unit_test(preamble),
    };
    if (lb_crypto_init(NULL) < 0)
        return 1;
    return cmocka_run_group_tests(tests, NULL, NULL);
}
