/* netproto/cipher_aesgcm.c - AES-256-GCM by OpenSSL's EVP.
 *
 * The key schedule is made once; a piece only sets the nonce. Incremental, so
 * that pages go from guest memory into the send buffer, and from the receive
 * buffer into guest memory, with no copy between. */
#include "netproto/netproto_internal.h"

#include <openssl/evp.h>
#include <string.h>

struct gcm {
    EVP_CIPHER_CTX *ctx;
    bool seal;
};

static void gcm_wipe(void *state)
{
    struct gcm *g = state;
    EVP_CIPHER_CTX_free(g->ctx); /* cleanses the key */
    free(g);
}

static int gcm_init(void **state, const uint8_t key[32], bool seal, struct lb_error *err)
{
    struct gcm *g = lb_alloc(sizeof(*g));
    g->seal = seal;
    g->ctx = EVP_CIPHER_CTX_new();
    if (!g->ctx || !EVP_CipherInit_ex(g->ctx, EVP_aes_256_gcm(), NULL, key, NULL, seal)) {
        gcm_wipe(g);
        return lb_fail(err, LB_E_INTERNAL, "libcrypto offers no AES-256-GCM");
    }
    *state = g;
    return 0;
}

static int gcm_begin(void *state, uint64_t counter)
{
    struct gcm *g = state;
    uint8_t nonce[12] = {0};
    lb_put64(nonce + 4, counter);
    return EVP_CipherInit_ex(g->ctx, NULL, NULL, NULL, nonce, g->seal) == 1 ? 0 : -1;
}

static int gcm_update(void *state, const void *in, size_t len, void *out)
{
    struct gcm *g = state;
    int n;
    return EVP_CipherUpdate(g->ctx, out, &n, in, (int)len) == 1 && (size_t)n == len ? 0 : -1;
}

static int gcm_finish(void *state, uint8_t tag[LB_TAG_BYTES])
{
    struct gcm *g = state;
    uint8_t none[16];
    int n;
    if (!g->seal && !EVP_CIPHER_CTX_ctrl(g->ctx, EVP_CTRL_AEAD_SET_TAG, LB_TAG_BYTES, tag))
        return -1;
    if (EVP_CipherFinal_ex(g->ctx, none, &n) != 1)
        return -1;
    if (g->seal && !EVP_CIPHER_CTX_ctrl(g->ctx, EVP_CTRL_AEAD_GET_TAG, LB_TAG_BYTES, tag))
        return -1;
    return 0;
}

const struct lb_aead_ops lb_aead_aes256gcm = {
    .name = "aes-256-gcm",
    .id = LB_CIPHER_AES256GCM,
    .init = gcm_init,
    .wipe = gcm_wipe,
    .begin = gcm_begin,
    .update = gcm_update,
    .finish = gcm_finish,
};
