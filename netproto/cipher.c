/* netproto/cipher.c - choice of a cipher, and the counter that no cipher may reuse. */
#include "netproto/netproto_internal.h"

#include <assert.h>
#include <string.h>

const struct lb_aead_ops *lb_aead_find(enum lb_cipher c)
{
    static const struct lb_aead_ops *const all[] = {&lb_aead_none, &lb_aead_aes256gcm,
                                                    &lb_aead_chacha20poly1305};
    for (size_t i = 0; i < LB_ARRAY_LEN(all); i++)
        if (all[i]->id == c)
            return all[i];
    return NULL;
}

enum lb_cipher lb_cipher_preferred(void)
{
#if defined(__x86_64__)
    /* without both, AES-GCM is slower than ChaCha and leaks through caches */
    if (!__builtin_cpu_supports("aes") || !__builtin_cpu_supports("pclmul"))
        return LB_CIPHER_CHACHA20POLY1305;
    return LB_CIPHER_AES256GCM;
#else
    return LB_CIPHER_CHACHA20POLY1305;
#endif
}

const char *lb_cipher_name(enum lb_cipher c)
{
    const struct lb_aead_ops *ops = lb_aead_find(c);
    return ops ? ops->name : "unknown";
}

int lb_aead_init(struct lb_aead *a, enum lb_cipher c, const uint8_t key[32], bool seal,
                 struct lb_error *err)
{
    memset(a, 0, sizeof(*a));
    const struct lb_aead_ops *ops = lb_aead_find(c);
    if (!ops)
        return lb_fail(err, LB_E_PROTO, "unknown cipher %d", (int)c);
    if (lb_crypto_init(err) < 0 || ops->init(&a->state, key, seal, err) < 0)
        return -1;
    a->ops = ops;
    a->seal = seal;
    return 0;
}

void lb_aead_wipe(struct lb_aead *a)
{
    if (a->ops)
        a->ops->wipe(a->state);
    memset(a, 0, sizeof(*a));
}

int lb_aead_begin(struct lb_aead *a, struct lb_error *err)
{
    assert(!a->open_piece);
    if (a->counter >= LB_AEAD_MAX_PIECES)
        return lb_fail(err, LB_E_STATE, "too many records under one key");
    if (a->ops->begin(a->state, a->counter++) < 0)
        return lb_fail(err, LB_E_INTERNAL, "%s failed to start", a->ops->name);
    a->open_piece = true;
    return 0;
}

int lb_aead_update(struct lb_aead *a, const void *in, size_t len, void *out, struct lb_error *err)
{
    assert(a->open_piece);
    if (a->ops->update(a->state, in, len, out) < 0)
        return lb_fail(err, LB_E_INTERNAL, "%s failed", a->ops->name);
    return 0;
}

int lb_aead_finish(struct lb_aead *a, uint8_t tag[LB_TAG_BYTES], struct lb_error *err)
{
    assert(a->open_piece);
    a->open_piece = false;
    if (a->ops->finish(a->state, tag) == 0)
        return 0;
    if (a->seal)
        return lb_fail(err, LB_E_INTERNAL, "%s failed to finish", a->ops->name);
    return lb_fail(err, LB_E_AUTH, "a record fails its authentication (%s)", a->ops->name);
}
