/* Ciphers, zstd, zero pages, HKDF: each against something independent of it. */
#include "netproto/netproto_internal.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>
/* after the headers above */
#include <cmocka.h>
#include <openssl/evp.h>
#include <sodium.h>
#include <xxhash.h>
#include <zstd.h>

#define MAX (300u << 10)
static uint8_t g_in[MAX], g_out[MAX + 16], g_back[MAX], g_ref[MAX + 16], g_key[32];

static void reference(enum lb_cipher c, uint64_t counter, size_t len)
{
    uint8_t nonce[12] = {0};
    lb_put64(nonce + 4, counter);
    if (c == LB_CIPHER_CHACHA20POLY1305) {
        crypto_aead_chacha20poly1305_ietf_encrypt(g_ref, NULL, g_in, len, NULL, 0, NULL, nonce, g_key);
    } else if (c == LB_CIPHER_AES256GCM) { /* libsodium's, not OpenSSL's */
        assert_true(crypto_aead_aes256gcm_is_available());
        crypto_aead_aes256gcm_encrypt(g_ref, NULL, g_in, len, NULL, 0, NULL, nonce, g_key);
    } else {
        memcpy(g_ref, g_in, len);
        lb_put64(g_ref + len, XXH64(g_in, len, counter));
        lb_put64(g_ref + len + 8, counter);
    }
}

/* In steps of `step` octets, as the stream does it. */
static int run(struct lb_aead *a, const uint8_t *in, size_t len, size_t step, uint8_t *out,
               uint8_t *tag)
{
    struct lb_error err = LB_ERROR_INIT;
    assert_int_equal(lb_aead_begin(a, &err), 0);
    for (size_t at = 0; at < len; at += step)
        assert_int_equal(lb_aead_update(a, in + at, LB_MIN(step, len - at), out + at, &err), 0);
    int rc = lb_aead_finish(a, tag, &err);
    if (rc < 0)
        assert_int_equal(err.code, LB_E_AUTH);
    return rc;
}

static void ciphers_agree_with_others(void **state)
{
    (void)state;
    static const size_t lens[] = {1, 8, 15, 16, 17, 32, 63, 64, 65, 100, 4096, 16384, 16385, 40000,
                                  MAX - 1, MAX};
    static const size_t steps[] = {64, 128, 4096, 16384 + 64, 1 << 20};
    for (int c = LB_CIPHER_NONE; c <= LB_CIPHER_CHACHA20POLY1305; c++) {
        struct lb_aead seal, open;
        assert_int_equal(lb_aead_init(&seal, (enum lb_cipher)c, g_key, true, NULL), 0);
        assert_int_equal(lb_aead_init(&open, (enum lb_cipher)c, g_key, false, NULL), 0);
        uint64_t counter = 0;
        for (size_t l = 0; l < LB_ARRAY_LEN(lens); l++)
            for (size_t s = 0; s < LB_ARRAY_LEN(steps); s++) {
                size_t len = lens[l];
                assert_int_equal(run(&seal, g_in, len, steps[s], g_out, g_out + len), 0);
                reference((enum lb_cipher)c, counter++, len);
                assert_memory_equal(g_out, g_ref, len + 16);
                size_t back = steps[LB_ARRAY_LEN(steps) - 1 - s]; /* other steps than sealing */
                assert_int_equal(run(&open, g_out, len, back, g_back, g_out + len), 0);
                assert_memory_equal(g_back, g_in, len);
            }
        /* in place */
        memcpy(g_back, g_in, 4096);
        assert_int_equal(run(&seal, g_back, 4096, 4096, g_back, g_out), 0);
        assert_int_equal(run(&open, g_back, 4096, 4096, g_back, g_out), 0);
        assert_memory_equal(g_back, g_in, 4096);
        lb_aead_wipe(&seal);
        lb_aead_wipe(&open);
    }
}

static void every_bit_is_authentic(void **state)
{
    (void)state;
    enum { LEN = 200 };
    for (int c = LB_CIPHER_NONE; c <= LB_CIPHER_CHACHA20POLY1305; c++)
        for (unsigned bit = 0; bit < (LEN + 16) * 8; bit++) {
            struct lb_aead seal, open;
            lb_aead_init(&seal, (enum lb_cipher)c, g_key, true, NULL);
            lb_aead_init(&open, (enum lb_cipher)c, g_key, false, NULL);
            assert_int_equal(run(&seal, g_in, LEN, 64, g_out, g_out + LEN), 0);
            g_out[bit / 8] ^= (uint8_t)(1u << bit % 8);
            assert_int_equal(run(&open, g_out, LEN, 64, g_back, g_out + LEN), -1);
            lb_aead_wipe(&seal);
            lb_aead_wipe(&open);
        }
}

static void order_and_limits(void **state)
{
    (void)state;
    uint8_t tag[2][16];
    for (int c = LB_CIPHER_NONE; c <= LB_CIPHER_CHACHA20POLY1305; c++) {
        struct lb_aead seal, open;
        struct lb_error err = LB_ERROR_INIT;
        lb_aead_init(&seal, (enum lb_cipher)c, g_key, true, NULL);
        lb_aead_init(&open, (enum lb_cipher)c, g_key, false, NULL);
        run(&seal, g_in, 64, 64, g_out, tag[0]);
        run(&seal, g_in, 64, 64, g_out + 64, tag[1]);
        assert_int_equal(run(&open, g_out + 64, 64, 64, g_back, tag[1]), -1); /* the second first */
        seal.counter = LB_AEAD_MAX_PIECES;
        assert_int_equal(lb_aead_begin(&seal, &err), -1);
        assert_int_equal(err.code, LB_E_STATE);
        lb_aead_wipe(&seal);
        lb_aead_wipe(&open);
    }
    struct lb_aead a;
    assert_int_equal(lb_aead_init(&a, (enum lb_cipher)3, g_key, true, NULL), -1);
    assert_true(lb_aead_find(lb_cipher_preferred()) != NULL);
    assert_string_equal(lb_cipher_name(LB_CIPHER_AES256GCM), "aes-256-gcm");
}

static void hkdf_rfc5869(void **state)
{
    (void)state; /* test case 1 of RFC 5869 */
    uint8_t ikm[22], salt[13], info[10], out[42], want[42];
    memset(ikm, 0x0b, sizeof(ikm));
    for (uint8_t i = 0; i < 13; i++)
        salt[i] = i;
    for (uint8_t i = 0; i < 10; i++)
        info[i] = (uint8_t)(0xf0 + i);
    lb_unhex(want, sizeof(want), "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf"
                                 "34007208d5b887185865");
    lb_hkdf_sha256(out, sizeof(out), salt, sizeof(salt), ikm, sizeof(ikm), info, sizeof(info));
    assert_memory_equal(out, want, sizeof(want));
}

static void zstd_there_and_back(void **state)
{
    (void)state;
    struct lb_zstd *z = lb_zstd_new();
    const uint8_t *frame;
    static uint8_t text[LB_REC_MAX_PAYLOAD], back[LB_REC_MAX_PAYLOAD];
    struct lb_error err = LB_ERROR_INIT;
    for (size_t i = 0; i < sizeof(text); i++)
        text[i] = (uint8_t)((i / 50) * 7 % 251);
    static const int levels[] = {1, 3, 1, -7, 9};
    for (size_t l = 0; l < LB_ARRAY_LEN(levels); l++)
        for (size_t len = LB_WIRE_PAGE_BYTES; len <= sizeof(text); len *= 4) {
            size_t n = lb_zstd_compress(z, text, len, levels[l], &frame);
            assert_true(n > 0 && n <= len - len / 8);
            assert_int_equal(ZSTD_getFrameContentSize(frame, n), len);
            memset(back, 0xee, sizeof(back));
            assert_int_equal(lb_zstd_decompress(z, frame, n, back, len, &err), 0);
            assert_memory_equal(back, text, len);
            for (size_t cut = 1; cut <= n; cut += 1 + n / 50)
                assert_int_equal(lb_zstd_decompress(z, frame, n - cut, back, len, &err), -1);
            assert_int_equal(lb_zstd_decompress(z, frame, n, back, len - 1, &err), -1);
            assert_int_equal(err.code, LB_E_PROTO);
        }
    /* random data is given up, whole records of it and small ones */
    for (size_t len = LB_WIRE_PAGE_BYTES; len <= MAX; len *= 2)
        assert_int_equal(lb_zstd_compress(z, g_in, len, 1, &frame), 0);
    lb_zstd_free(z);
}

static void is_zero(void **state)
{
    (void)state;
    static uint8_t page[2 * LB_WIRE_PAGE_BYTES + 64];
    uint8_t *p = page + 1; /* any alignment */
    static const size_t lens[] = {0, 64, 128, 192, 256, 320, 4096, 8192};
    for (size_t l = 0; l < LB_ARRAY_LEN(lens); l++) {
        memset(page, 0xff, sizeof(page));
        memset(p, 0, lens[l]);
        assert_true(lb_is_zero(p, lens[l]));
        for (size_t i = 0; i < lens[l]; i++) {
            p[i] = (uint8_t)(1u << i % 8);
            assert_false(lb_is_zero(p, lens[l]));
            p[i] = 0;
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(ciphers_agree_with_others),
        cmocka_unit_test(every_bit_is_authentic),
        cmocka_unit_test(order_and_limits),
        cmocka_unit_test(hkdf_rfc5869),
        cmocka_unit_test(zstd_there_and_back),
        cmocka_unit_test(is_zero),
    };
    if (lb_crypto_init(NULL) < 0)
        return 1;
    randombytes_buf(g_in, sizeof(g_in));
    randombytes_buf(g_key, sizeof(g_key));
    return cmocka_run_group_tests(tests, NULL, NULL);
}
