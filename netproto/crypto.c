/* netproto/crypto.c - HMAC and HKDF over libsodium's SHA-256. */
#include "netproto/netproto_internal.h"

#include <assert.h>
#include <sodium.h>
#include <string.h>

int lb_crypto_init(struct lb_error *err)
{
    if (sodium_init() < 0) /* thread safe, 1 when done before */
        return lb_fail(err, LB_E_INTERNAL, "libsodium cannot be initialised");
    return 0;
}

void lb_hmac_sha256(uint8_t out[32], const void *key, size_t key_len, const void *msg, size_t len)
{
    crypto_auth_hmacsha256_state st;
    crypto_auth_hmacsha256_init(&st, key, key_len);
    crypto_auth_hmacsha256_update(&st, msg, len);
    crypto_auth_hmacsha256_final(&st, out);
    sodium_memzero(&st, sizeof(st));
}

void lb_hkdf_sha256(void *out, size_t len, const void *salt, size_t salt_len, const void *ikm,
                    size_t ikm_len, const void *info, size_t info_len)
{
    uint8_t prk[32], block[32], n = 0;
    uint8_t *p = out;

    assert(len <= 255 * sizeof(block));
    lb_hmac_sha256(prk, salt, salt_len, ikm, ikm_len);
    while (len > 0) {
        crypto_auth_hmacsha256_state st;
        crypto_auth_hmacsha256_init(&st, prk, sizeof(prk));
        if (n++ > 0)
            crypto_auth_hmacsha256_update(&st, block, sizeof(block));
        if (info_len > 0)
            crypto_auth_hmacsha256_update(&st, info, info_len);
        crypto_auth_hmacsha256_update(&st, &n, 1);
        crypto_auth_hmacsha256_final(&st, block);
        sodium_memzero(&st, sizeof(st));
        size_t take = LB_MIN(len, sizeof(block));
        memcpy(p, block, take);
        p += take;
        len -= take;
    }
    sodium_memzero(prk, sizeof(prk));
    sodium_memzero(block, sizeof(block));
}
