/* Noise_XX_25519_ChaChaPoly_SHA256 against published vectors, and against damage.
 * The vectors are fetched by tests/unit/noise_vectors.sh; without them this fails. */
#include "netproto/netproto_internal.h"
#include "netproto/noise.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>
/* after the four headers above */
#include <cmocka.h>
#include <sodium.h>

#define MAX_MSGS 8
struct vector {
    char suite[64];
    uint8_t s_i[32], s_r[32], e_i[32], e_r[32], prologue[256];
    bool has_s_i, has_s_r;
    size_t prologue_len;
    struct {
        uint8_t payload[256], cipher[512];
        size_t payload_len, cipher_len;
    } m[MAX_MSGS];
    unsigned n;
};

static size_t unhex(uint8_t *out, size_t max, const char *hex)
{
    ssize_t n = *hex ? lb_unhex(out, max, hex) : 0;
    assert_true(n >= 0);
    return (size_t)n;
}

static void take_line(struct vector *v, const char *key, const char *value)
{
    unsigned i;
    char what[16];
    if (!strcmp(key, "handshake"))
        snprintf(v->suite, sizeof(v->suite), "%s", value);
    else if (!strcmp(key, "init_static"))
        v->has_s_i = unhex(v->s_i, 32, value) == 32;
    else if (!strcmp(key, "resp_static"))
        v->has_s_r = unhex(v->s_r, 32, value) == 32;
    else if (!strcmp(key, "gen_init_ephemeral"))
        unhex(v->e_i, 32, value);
    else if (!strcmp(key, "gen_resp_ephemeral"))
        unhex(v->e_r, 32, value);
    else if (!strcmp(key, "prologue"))
        v->prologue_len = unhex(v->prologue, sizeof(v->prologue), value);
    else if (sscanf(key, "msg_%u_%15s", &i, what) == 2 && i < MAX_MSGS) {
        if (!strcmp(what, "payload"))
            v->m[i].payload_len = unhex(v->m[i].payload, sizeof(v->m[i].payload), value);
        else
            v->m[i].cipher_len = unhex(v->m[i].cipher, sizeof(v->m[i].cipher), value);
        v->n = LB_MAX(v->n, i + 1);
    }
}

static struct lb_identity identity(const uint8_t priv[32])
{
    struct lb_identity id;
    memcpy(id.priv, priv, 32);
    crypto_scalarmult_base(id.pub, id.priv);
    return id;
}

static void run_vector(const struct vector *v)
{
    struct lb_identity id_i = identity(v->s_i), id_r = identity(v->s_r);
    struct lb_noise side[2];
    struct lb_noise_cipher tx[2], rx[2];
    struct lb_error err = LB_ERROR_INIT;

    lb_noise_init(&side[0], true, &id_i, v->prologue, v->prologue_len);
    lb_noise_init(&side[1], false, &id_r, v->prologue, v->prologue_len);
    lb_noise_fix_ephemeral(&side[0], v->e_i);
    lb_noise_fix_ephemeral(&side[1], v->e_r);
    assert_true(v->n > 3);
    for (unsigned i = 0; i < v->n; i++) {
        uint8_t msg[512], plain[512];
        size_t len = sizeof(msg), plain_len = 0;
        unsigned from = i < 3 ? i % 2 : (i - 3) % 2; /* the initiator starts both phases */
        if (i < 3) {
            assert_int_equal(lb_noise_write(&side[from], v->m[i].payload, v->m[i].payload_len, msg,
                                            &len, &err), 0);
        } else {
            assert_int_equal(lb_noise_seal(&tx[from], NULL, 0, v->m[i].payload,
                                           v->m[i].payload_len, msg, &err), 0);
            len = v->m[i].payload_len + LB_NOISE_TAG_BYTES;
        }
        assert_int_equal(len, v->m[i].cipher_len);
        assert_memory_equal(msg, v->m[i].cipher, len);
        if (i < 3) {
            assert_int_equal(lb_noise_read(&side[!from], msg, len, plain, &plain_len, &err), 0);
        } else {
            assert_int_equal(lb_noise_open(&rx[!from], NULL, 0, msg, len, plain, &err), 0);
            plain_len = len - LB_NOISE_TAG_BYTES;
        }
        assert_int_equal(plain_len, v->m[i].payload_len);
        assert_memory_equal(plain, v->m[i].payload, plain_len);
        if (i == 2)
            for (int k = 0; k < 2; k++)
                lb_noise_split(&side[k], &tx[k], &rx[k]);
    }
    assert_memory_equal(side[0].rs, id_r.pub, 32);
    assert_memory_equal(side[1].rs, id_i.pub, 32);
}

static void published_vectors(void **state)
{
    (void)state;
    const char *path = getenv("LB_NOISE_VECTORS");
    if (!path) {
        path = "build/vectors/noise.txt";
        if (access(path, R_OK) < 0 && system("tests/unit/noise_vectors.sh") != 0)
            fail_msg("tests/unit/noise_vectors.sh failed (run from the top of the tree)");
    }
    FILE *f = fopen(path, "r");
    if (!f)
        fail_msg("no Noise vectors at %s", path);
    struct vector *v = calloc(1, sizeof(*v));
    char line[4096];
    unsigned ran = 0;
    for (bool more = true; more;) {
        more = fgets(line, sizeof(line), f);
        char *eq = more ? strchr(line, '=') : NULL;
        if (eq) {
            *eq = 0;
            eq[1 + strcspn(eq + 1, "\r\n")] = 0;
            take_line(v, line, eq + 1);
        } else { /* an empty line or the end */
            if (!strcmp(v->suite, "Noise_XX_25519_ChaChaPoly_SHA256")) {
                assert_true(v->has_s_i && v->has_s_r);
                run_vector(v);
                ran++;
            }
            memset(v, 0, sizeof(*v));
        }
    }
    fclose(f);
    free(v);
    print_message("%u published vectors\n", ran);
    assert_true(ran >= 2); /* at least with and without payloads */
}

/* ------------------------------------------------------------------ damage */

struct two {
    struct lb_identity id[2];
    struct lb_noise side[2];
};

static void start(struct two *t)
{
    for (int i = 0; i < 2; i++) {
        uint8_t priv[32];
        memset(priv, 7 + i, sizeof(priv));
        t->id[i] = identity(priv);
        lb_noise_init(&t->side[i], i == 0, &t->id[i], "p", 1);
    }
}

/* Exchange messages, damaging number `which`; returns the error code of its reader. */
static int exchange(struct two *t, unsigned which, size_t flip_bit, size_t cut, size_t grow)
{
    struct lb_error err = LB_ERROR_INIT;
    for (unsigned i = 0; i < 3; i++) {
        uint8_t msg[256] = {0}, plain[256];
        size_t len = 200, plain_len;
        assert_int_equal(lb_noise_write(&t->side[i % 2], NULL, 0, msg, &len, &err), 0);
        if (i == which) {
            if (flip_bit < len * 8)
                msg[flip_bit / 8] ^= (uint8_t)(1u << flip_bit % 8);
            len = len - cut + grow;
        }
        if (lb_noise_read(&t->side[!(i % 2)], msg, len, plain, &plain_len, &err) < 0) {
            assert_true(err.message[0] != 0);
            return (int)err.code;
        }
        if (grow == 0)
            assert_int_equal(plain_len, 0);
    }
    return 0;
}

static void every_flipped_bit(void **state)
{
    (void)state;
    static const size_t len[3] = {LB_NOISE_MSG1_BYTES, LB_NOISE_MSG2_BYTES, LB_NOISE_MSG3_BYTES};
    for (unsigned which = 0; which < 3; which++) {
        for (size_t bit = 0; bit < len[which] * 8; bit++) {
            struct two t;
            start(&t);
            /* a flip in message 1 shows when message 2 is read, all others at once */
            assert_int_equal(exchange(&t, which, bit, 0, 0), LB_E_AUTH);
        }
    }
}

static void every_truncation(void **state)
{
    (void)state;
    static const size_t len[3] = {LB_NOISE_MSG1_BYTES, LB_NOISE_MSG2_BYTES, LB_NOISE_MSG3_BYTES};
    for (unsigned which = 0; which < 3; which++)
        for (size_t cut = 1; cut <= len[which]; cut++) {
            struct two t;
            start(&t);
            assert_int_equal(exchange(&t, which, SIZE_MAX, cut, 0), LB_E_PROTO);
        }
}

static void longer_messages(void **state)
{
    (void)state;
    for (unsigned which = 0; which < 3; which++) {
        struct two t;
        start(&t);
        assert_int_equal(exchange(&t, which, SIZE_MAX, 0, 5), LB_E_AUTH);
    }
    struct two t;
    start(&t);
    static uint8_t big[70000], out[70000];
    size_t out_len;
    struct lb_error err = LB_ERROR_INIT;
    assert_int_equal(lb_noise_read(&t.side[1], big, sizeof(big), out, &out_len, &err), -1);
    assert_int_equal(err.code, LB_E_PROTO);
}

static void low_order_points(void **state)
{
    (void)state;
    struct two t;
    struct lb_error err = LB_ERROR_INIT;
    uint8_t msg[128] = {0}, out[128];
    size_t len;
    start(&t);
    assert_int_equal(lb_noise_read(&t.side[1], msg, 32, out, &len, &err), 0);
    len = sizeof(out);
    assert_int_equal(lb_noise_write(&t.side[1], NULL, 0, out, &len, &err), -1);
    assert_int_equal(err.code, LB_E_AUTH);
}

static void prologue_matters(void **state)
{
    (void)state;
    struct two t;
    start(&t);
    lb_noise_init(&t.side[1], false, &t.id[1], "q", 1);
    assert_int_equal(exchange(&t, 9, 0, 0, 0), LB_E_AUTH);
}

static void transport_damage(void **state)
{
    (void)state;
    struct two t;
    struct lb_noise_cipher tx[2], rx[2];
    struct lb_error err = LB_ERROR_INIT;
    uint8_t first[64], second[64], out[64];

    start(&t);
    assert_int_equal(exchange(&t, 9, 0, 0, 0), 0);
    for (int i = 0; i < 2; i++)
        lb_noise_split(&t.side[i], &tx[i], &rx[i]);
    assert_int_equal(lb_noise_seal(&tx[0], NULL, 0, "one", 3, first, &err), 0);
    assert_int_equal(lb_noise_seal(&tx[0], NULL, 0, "two", 3, second, &err), 0);
    /* out of order, to the wrong side, cut, and at last right */
    assert_int_equal(lb_noise_open(&rx[1], NULL, 0, second, 19, out, &err), -1);
    assert_int_equal(lb_noise_open(&rx[0], NULL, 0, first, 19, out, &err), -1);
    assert_int_equal(lb_noise_open(&rx[1], NULL, 0, first, 18, out, &err), -1);
    assert_int_equal(lb_noise_open(&rx[1], NULL, 0, first, 15, out, &err), -1);
    assert_int_equal(err.code, LB_E_PROTO);
    assert_int_equal(lb_noise_open(&rx[1], NULL, 0, first, 19, out, &err), 0);
    assert_memory_equal(out, "one", 3);
    assert_int_equal(lb_noise_open(&rx[1], NULL, 0, first, 19, out, &err), -1); /* replayed */
    assert_int_equal(lb_noise_open(&rx[1], NULL, 0, second, 19, out, &err), 0);
    /* a counter is not driven to its end */
    tx[0].n = UINT64_C(1) << 62;
    assert_int_equal(lb_noise_seal(&tx[0], NULL, 0, "x", 1, first, &err), -1);
    assert_int_equal(err.code, LB_E_STATE);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(published_vectors), cmocka_unit_test(every_flipped_bit),
        cmocka_unit_test(every_truncation),  cmocka_unit_test(longer_messages),
        cmocka_unit_test(low_order_points),  cmocka_unit_test(prologue_matters),
        cmocka_unit_test(transport_damage),
    };
    if (lb_crypto_init(NULL) < 0)
        return 1;
    return cmocka_run_group_tests(tests, NULL, NULL);
}
