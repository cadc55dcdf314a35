/* netproto/cipher_chacha.c - ChaCha20-Poly1305 (RFC 8439) from libsodium's two halves.
 *
 * libsodium's own AEAD wants the whole message in one piece; put together from
 * its stream cipher (which starts at any block) and its incremental Poly1305 it
 * needs no bounce copy. tests/unit/test_codec.c holds it against libsodium's AEAD. */
#include "netproto/netproto_internal.h"

#include <assert.h>
#include <sodium.h>
#include <string.h>

enum { CHUNK = 16384 }; /* what was ciphered is still in the L1/L2 cache when it is authenticated */

struct chacha {
    crypto_onetimeauth_poly1305_state poly; /* first: wants 16-byte alignment */
    uint8_t key[32];
    uint8_t nonce[12];
    uint64_t len;
    bool seal;
    bool last; /* an update that was no multiple of 64: nothing may follow */
};

static int chacha_init(void **state, const uint8_t key[32], bool seal, struct lb_error *err)
{
    void *p;
    if (posix_memalign(&p, 64, sizeof(struct chacha)) != 0)
        return lb_fail(err, LB_E_NO_SPACE, "no memory for a cipher");
    struct chacha *c = p;
    memset(c, 0, sizeof(*c));
    memcpy(c->key, key, sizeof(c->key));
    c->seal = seal;
    *state = c;
    return 0;
}

static void chacha_wipe(void *state)
{
    sodium_memzero(state, sizeof(struct chacha));
    free(state);
}

static int chacha_begin(void *state, uint64_t counter)
{
    struct chacha *c = state;
    uint8_t block[64];

    memset(c->nonce, 0, 4);
    lb_put64(c->nonce + 4, counter);
    crypto_stream_chacha20_ietf(block, sizeof(block), c->nonce, c->key);
    crypto_onetimeauth_poly1305_init(&c->poly, block);
    sodium_memzero(block, sizeof(block));
    c->len = 0;
    c->last = false;
    return 0;
}

static int chacha_update(void *state, const void *in, size_t len, void *out)
{
    struct chacha *c = state;
    const uint8_t *src = in;
    uint8_t *dst = out;

    assert(!c->last);
    c->last = len % LB_KEYSTREAM_ALIGN != 0;
    while (len > 0) {
        size_t n = LB_MIN(len, (size_t)CHUNK);
        uint32_t block = (uint32_t)(c->len / 64 + 1); /* block 0 made the Poly1305 key */
        if (!c->seal)
            crypto_onetimeauth_poly1305_update(&c->poly, src, n);
        crypto_stream_chacha20_ietf_xor_ic(dst, src, n, c->nonce, block, c->key);
        if (c->seal)
            crypto_onetimeauth_poly1305_update(&c->poly, dst, n);
        src += n;
        dst += n;
        len -= n;
        c->len += n;
    }
    return 0;
}

static int chacha_finish(void *state, uint8_t tag[LB_TAG_BYTES])
{
    struct chacha *c = state;
    uint8_t tail[32] = {0}, mine[LB_TAG_BYTES];
    size_t pad = (16 - c->len % 16) % 16;

    lb_put64(tail + pad + 8, c->len); /* no additional data: its length is the 8 zeros before */
    crypto_onetimeauth_poly1305_update(&c->poly, tail, pad + 16);
    crypto_onetimeauth_poly1305_final(&c->poly, mine);
    if (c->seal) {
        memcpy(tag, mine, sizeof(mine));
        return 0;
    }
    return sodium_memcmp(tag, mine, sizeof(mine));
}

const struct lb_aead_ops lb_aead_chacha20poly1305 = {
    .name = "chacha20-poly1305",
    .id = LB_CIPHER_CHACHA20POLY1305,
    .init = chacha_init,
    .wipe = chacha_wipe,
    .begin = chacha_begin,
    .update = chacha_update,
    .finish = chacha_finish,
};
