/* checkpoint/key.c: key files, passphrases, and what a wrong one is told. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <fcntl.h>
#include <pthread.h>
#include <sodium.h>
#include <string.h>
#include <sys/stat.h>

#include "checkpoint/store_internal.h"

static char g_dir[64], g_path[128];
static const char HEX[] = "00112233445566778899aabbccddeeff00112233445566778899AABBCCDDEEFF";

static int setup(void **state)
{
    (void)state;
    strcpy(g_dir, "/tmp/lb-test-key-XXXXXX");
    if (!mkdtemp(g_dir))
        return -1;
    snprintf(g_path, sizeof(g_path), "%s/key", g_dir);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    return lb_remove_tree(g_dir, NULL);
}

static void write_file(const void *text, size_t len, mode_t mode)
{
    assert_int_equal(lb_file_write_atomic(g_path, text, len, mode, NULL), 0);
}

static struct lb_ckpt_key *from_file(const void *text, size_t len)
{
    struct lb_ckpt_key *k = NULL;
    struct lb_error err = LB_ERROR_INIT;
    write_file(text, len, 0600);
    if (lb_ckpt_key_file(g_path, &k, &err) < 0)
        fail_msg("%s", err.message);
    assert_int_equal(lb_ckpt_key_kind(k), LB_KEY_FILE);
    return k;
}

static struct lb_ckpt_key *from_text(const char *text)
{
    struct lb_ckpt_key *k = NULL;
    assert_int_equal(lb_ckpt_key_passphrase(text, strlen(text), &k, NULL), 0);
    assert_int_equal(lb_ckpt_key_kind(k), LB_KEY_PASSPHRASE);
    return k;
}

static void refuse_file(const void *text, size_t len, mode_t mode, enum lb_errcode code)
{
    struct lb_ckpt_key *k = NULL;
    struct lb_error err = LB_ERROR_INIT;
    write_file(text, len, mode);
    assert_int_equal(lb_ckpt_key_file(g_path, &k, &err), -1);
    assert_int_equal(err.code, code);
    assert_null(k);
}

static void refuse_open(const struct lb_ckpt_key *k, const struct lb_key_slot *slot, const char *bind,
                        enum lb_errcode code, const char *says)
{
    uint8_t key[32];
    struct lb_error err = LB_ERROR_INIT;
    assert_int_equal(lb_ckpt_key_open(k, slot, bind, strlen(bind), key, &err), -1);
    assert_int_equal(err.code, code);
    if (!strstr(err.message, says))
        fail_msg("\"%s\" does not say \"%s\"", err.message, says);
}

static void test_files(void **state)
{
    uint8_t raw[32], a[32], b[32];
    struct lb_key_slot slot;
    char line[66];
    (void)state;

    assert_int_equal(lb_unhex(raw, sizeof(raw), HEX), 32);
    snprintf(line, sizeof(line), "%s\n", HEX);
    struct lb_ckpt_key *one = from_file(raw, 32), *two = from_file(HEX, 64), *three = from_file(line, 65);
    assert_int_equal(lb_ckpt_key_new(one, "head", 4, &slot, a, NULL), 0);
    assert_int_equal(slot.kind, LB_KEY_FILE);
    assert_int_equal(lb_ckpt_key_open(two, &slot, "head", 4, b, NULL), 0);
    assert_memory_equal(a, b, 32);
    sodium_memzero(b, 32);
    assert_int_equal(lb_ckpt_key_open(three, &slot, "head", 4, b, NULL), 0);
    assert_memory_equal(a, b, 32);

    /* as FORMAT.md says it, with libsodium alone */
    assert_int_equal(crypto_aead_xchacha20poly1305_ietf_decrypt(b, NULL, NULL, slot.wrapped, 48,
                                                                (const uint8_t *)"head", 4, slot.nonce, raw), 0);
    assert_memory_equal(a, b, 32);
    lb_ckpt_key_free(one);
    lb_ckpt_key_free(two);
    lb_ckpt_key_free(three);
}

static void test_bad_files(void **state)
{
    char text[80];
    struct lb_ckpt_key *k = NULL;
    struct lb_error err = LB_ERROR_INIT;
    (void)state;

    refuse_file(HEX, 64, 0640, LB_E_AUTH);
    refuse_file(HEX, 64, 0604, LB_E_AUTH);
    refuse_file(HEX, 63, 0600, LB_E_USAGE);
    refuse_file(HEX, 31, 0600, LB_E_USAGE);
    refuse_file("", 0, 0600, LB_E_USAGE);
    memcpy(text, HEX, 64);
    text[64] = text[65] = '\n';
    refuse_file(text, 66, 0600, LB_E_USAGE);
    text[10] = 'g';
    refuse_file(text, 64, 0600, LB_E_USAGE);
    assert_int_equal(lb_ckpt_key_file("/nonexistent/key", &k, &err), -1);
    assert_int_equal(err.code, LB_E_NOT_FOUND);
    assert_int_equal(lb_ckpt_key_file(g_dir, &k, &err), -1);
    assert_int_equal(err.code, LB_E_USAGE);
    assert_int_equal(lb_ckpt_key_passphrase("", 0, &k, &err), -1);
    assert_int_equal(err.code, LB_E_USAGE);
}

static void test_wrong(void **state)
{
    static const char other[] = "ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff";
    struct lb_ckpt_key *file = from_file(HEX, 64), *file2 = from_file(other, 64);
    struct lb_ckpt_key *text = from_text("correct horse"), *text2 = from_text("correct horsf");
    struct lb_key_slot of_file, of_text, bad;
    uint8_t key[32], again[32];
    (void)state;

    assert_int_equal(lb_ckpt_key_new(file, "head", 4, &of_file, key, NULL), 0);
    refuse_open(file2, &of_file, "head", LB_E_AUTH, "wrong key");
    refuse_open(file, &of_file, "hear", LB_E_AUTH, "wrong key");
    refuse_open(text, &of_file, "head", LB_E_AUTH, "is encrypted with a key file, not with a passphrase");
    refuse_open(NULL, &of_file, "head", LB_E_AUTH, "is encrypted with a key file");

    assert_int_equal(lb_ckpt_key_new(text, "head", 4, &of_text, key, NULL), 0);
    assert_int_equal(of_text.kind, LB_KEY_PASSPHRASE);
    refuse_open(text2, &of_text, "head", LB_E_AUTH, "wrong passphrase");
    refuse_open(file, &of_text, "head", LB_E_AUTH, "is encrypted with a passphrase, not with a key file");
    for (unsigned i = 0; i < sizeof(bad.wrapped); i++) {
        bad = of_text;
        bad.wrapped[i] ^= 1;
        refuse_open(text, &bad, "head", LB_E_AUTH, "wrong passphrase");
    }
    assert_int_equal(lb_ckpt_key_open(text, &of_text, "head", 4, again, NULL), 0);
    assert_memory_equal(key, again, 32);

    /* what would take for ever, or all memory, is not tried */
    bad = of_text;
    bad.ops_limit = UINT64_C(1) << 40;
    refuse_open(text, &bad, "head", LB_E_PROTO, "passes");
    bad = of_text;
    bad.mem_limit = UINT64_C(1) << 41;
    refuse_open(text, &bad, "head", LB_E_PROTO, "bytes");
    bad.mem_limit = 0;
    refuse_open(text, &bad, "head", LB_E_PROTO, "bytes");
    bad = of_text;
    bad.kind = LB_KEY_NONE;
    refuse_open(text, &bad, "head", LB_E_PROTO, "unknown way");

    lb_ckpt_key_free(file);
    lb_ckpt_key_free(file2);
    lb_ckpt_key_free(text);
    lb_ckpt_key_free(text2);
    lb_ckpt_key_free(NULL);
}

/* A chain and its children: one salt, derived once; each file has a key of its own. */
static void test_one_salt(void **state)
{
    struct lb_ckpt_key *k = from_text("correct horse"), *later = from_text("correct horse");
    struct lb_key_slot first, next;
    uint8_t a[32], b[32];
    (void)state;

    assert_int_equal(lb_ckpt_key_new(k, "1", 1, &first, a, NULL), 0);
    uint64_t t = lb_now_ns();
    for (unsigned i = 0; i < 1000; i++)
        assert_int_equal(lb_ckpt_key_new(k, "2", 1, &next, b, NULL), 0);
    assert_true(lb_now_ns() - t < 1000 * UINT64_C(10000000)); /* 10 ms each: Argon2id takes 50 and more */
    assert_memory_equal(first.salt, next.salt, 16);
    assert_memory_not_equal(first.nonce, next.nonce, 24);
    assert_memory_not_equal(a, b, 32);

    /* another process opens the parent, then makes a child */
    assert_int_equal(lb_ckpt_key_open(later, &first, "1", 1, b, NULL), 0);
    assert_memory_equal(a, b, 32);
    assert_int_equal(lb_ckpt_key_new(later, "3", 1, &next, b, NULL), 0);
    assert_memory_equal(first.salt, next.salt, 16);
    lb_ckpt_key_free(k);
    lb_ckpt_key_free(later);
}

/* More salts than are kept, from several threads. */
static struct lb_key_slot g_slots[10];
static uint8_t g_keys[10][32];

static void *open_all(void *arg)
{
    uint8_t key[32];
    for (unsigned i = 0; i < LB_ARRAY_LEN(g_slots); i++)
        if (lb_ckpt_key_open(arg, &g_slots[i], "x", 1, key, NULL) < 0 || memcmp(key, g_keys[i], 32))
            return arg;
    return NULL;
}

static void test_many_salts(void **state)
{
    struct lb_ckpt_key *k = from_text("correct horse");
    pthread_t th[2];
    void *bad;
    (void)state;

    for (unsigned i = 0; i < LB_ARRAY_LEN(g_slots); i++) {
        struct lb_ckpt_key *one = from_text("correct horse");
        assert_int_equal(lb_ckpt_key_new(one, "x", 1, &g_slots[i], g_keys[i], NULL), 0);
        lb_ckpt_key_free(one);
    }
    assert_memory_not_equal(g_slots[0].salt, g_slots[1].salt, 16);
    for (unsigned i = 0; i < 2; i++)
        assert_int_equal(pthread_create(&th[i], NULL, open_all, k), 0);
    for (unsigned i = 0; i < 2; i++) {
        assert_int_equal(pthread_join(th[i], &bad), 0);
        assert_null(bad);
    }
    lb_ckpt_key_free(k);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_files),    cmocka_unit_test(test_bad_files),  cmocka_unit_test(test_wrong),
        cmocka_unit_test(test_one_salt), cmocka_unit_test(test_many_salts),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
