/* checkpoint/seal.c - the check of a part of a checkpoint file: FORMAT.md, "Part". */
#define XXH_STATIC_LINKING_ONLY /* the state of a hash, on the stack */
#include "checkpoint/store_internal.h"

#include <sodium.h>
#include <string.h>
#include <xxhash.h>

enum {
    HEAD_CHECKED = offsetof(struct lb_cf_part, check), /* bytes of a head that the check covers */
    NONCE_BYTES = crypto_aead_xchacha20poly1305_ietf_NPUBBYTES,
};
_Static_assert(sizeof(XXH128_canonical_t) == 16, "the check");
_Static_assert(crypto_aead_xchacha20poly1305_ietf_ABYTES == 16, "the check");

void lb_cf_hash(uint8_t out[16], const void *data, size_t len, uint64_t seed)
{
    XXH128_canonical_t c;
    XXH128_canonicalFromHash(&c, XXH3_128bits_withSeed(data, len, seed));
    memcpy(out, c.digest, sizeof(c.digest));
}

static void plain_check(uint8_t out[16], const struct lb_cf_seal *s, const struct lb_cf_part *head,
                        const void *stored, size_t len)
{
    XXH3_state_t st;
    XXH128_canonical_t c;
    uint64_t seed;

    memcpy(&seed, s->id, sizeof(seed));
    /* else a seed left on the stack by the last call passes for this one, with a secret that is gone */
    XXH3_INITSTATE(&st);
    XXH3_128bits_reset_withSeed(&st, le64toh(seed));
    XXH3_128bits_update(&st, head, HEAD_CHECKED);
    if (len > 0)
        XXH3_128bits_update(&st, stored, len);
    XXH128_canonicalFromHash(&c, XXH3_128bits_digest(&st));
    memcpy(out, c.digest, sizeof(c.digest));
}

/* What the tag covers besides the bytes, and the nonce: of this place in this file. */
static void bind(const struct lb_cf_seal *s, const struct lb_cf_part *head,
                 uint8_t ad[HEAD_CHECKED + 16], uint8_t nonce[NONCE_BYTES])
{
    uint64_t number = htole64(le32toh(head->number));

    memcpy(ad, head, HEAD_CHECKED);
    memcpy(ad + HEAD_CHECKED, s->id, 16);
    memset(nonce, 0, NONCE_BYTES);
    memcpy(nonce + 16, &number, sizeof(number));
}

void lb_cf_seal_part(const struct lb_cf_seal *s, struct lb_cf_part *head, const void *stored, void *out)
{
    size_t len = le32toh(head->stored_bytes);
    uint8_t ad[HEAD_CHECKED + 16], nonce[NONCE_BYTES];

    if (!s->encrypted) {
        plain_check(head->check, s, head, stored, len);
        if (out != stored && len > 0)
            memcpy(out, stored, len);
        return;
    }
    bind(s, head, ad, nonce);
    crypto_aead_xchacha20poly1305_ietf_encrypt_detached(out, head->check, NULL, stored, len, ad,
                                                        sizeof(ad), NULL, nonce, s->data_key);
}

bool lb_cf_open_part(const struct lb_cf_seal *s, const struct lb_cf_part *head, const void *stored,
                     void *out)
{
    size_t len = le32toh(head->stored_bytes);
    uint8_t ad[HEAD_CHECKED + 16], nonce[NONCE_BYTES], check[16];

    if (s->encrypted) {
        bind(s, head, ad, nonce);
        return crypto_aead_xchacha20poly1305_ietf_decrypt_detached(out, NULL, stored, len, head->check, ad,
                                                                   sizeof(ad), nonce, s->data_key) == 0;
    }
    plain_check(check, s, head, stored, len);
    if (memcmp(check, head->check, sizeof(check)))
        return false;
    if (out != stored && len > 0)
        memcpy(out, stored, len);
    return true;
}
