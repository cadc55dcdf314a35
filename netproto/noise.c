/* netproto/noise.c - the XX handshake of the Noise framework, revision 34, for one suite.
 *
 * Names follow the specification: h is the transcript hash, ck the chaining key,
 * e/s ephemeral and static keys, r... the remote ones.  A handshake that failed
 * once is dead: no further message is written or read. */
#include "netproto/noise.h"
#include "netproto/netproto_internal.h"

#include <assert.h>
#include <sodium.h>
#include <string.h>

static const char PROTOCOL[] = "Noise_XX_25519_ChaChaPoly_SHA256";
_Static_assert(sizeof(PROTOCOL) - 1 == 32, "a name of 32 bytes is h itself");
#define MAX_MESSAGES (UINT64_C(1) << 48)

static void make_nonce(uint8_t nonce[12], uint64_t n)
{
    memset(nonce, 0, 4);
    lb_put64(nonce + 4, n);
}

int lb_noise_seal(struct lb_noise_cipher *c, const void *ad, size_t ad_len, const void *in,
                  size_t len, uint8_t *out, struct lb_error *err)
{
    uint8_t nonce[12];

    assert(c->has_key && len <= LB_NOISE_MAX_BYTES - LB_NOISE_TAG_BYTES);
    if (c->n >= MAX_MESSAGES)
        return lb_fail(err, LB_E_STATE, "too many messages under one key");
    make_nonce(nonce, c->n++);
    crypto_aead_chacha20poly1305_ietf_encrypt(out, NULL, in, len, ad, ad_len, NULL, nonce, c->key);
    return 0;
}

int lb_noise_open(struct lb_noise_cipher *c, const void *ad, size_t ad_len, const uint8_t *in,
                  size_t len, void *out, struct lb_error *err)
{
    uint8_t nonce[12];

    assert(c->has_key);
    if (len < LB_NOISE_TAG_BYTES || len > LB_NOISE_MAX_BYTES)
        return lb_fail(err, LB_E_PROTO, "an encrypted message of %zu bytes is not possible", len);
    if (c->n >= MAX_MESSAGES)
        return lb_fail(err, LB_E_STATE, "too many messages under one key");
    make_nonce(nonce, c->n);
    if (crypto_aead_chacha20poly1305_ietf_decrypt(out, NULL, NULL, in, len, ad, ad_len, nonce,
                                                  c->key) != 0)
        return lb_fail(err, LB_E_AUTH, "a message of the peer fails its authentication");
    c->n++;
    return 0;
}

static void mix_hash(struct lb_noise *n, const void *data, size_t len)
{
    crypto_hash_sha256_state st;
    crypto_hash_sha256_init(&st);
    crypto_hash_sha256_update(&st, n->h, sizeof(n->h));
    crypto_hash_sha256_update(&st, data, len);
    crypto_hash_sha256_final(&st, n->h);
}

/* DH(priv, pub) into the chaining key and a new cipher key. */
static int mix_dh(struct lb_noise *n, const uint8_t priv[32], const uint8_t pub[32],
                  struct lb_error *err)
{
    uint8_t dh[32], out[64];

    if (crypto_scalarmult(dh, priv, pub) != 0) /* a point of low order */
        return lb_fail(err, LB_E_AUTH, "the peer's key is not valid");
    lb_hkdf_sha256(out, sizeof(out), n->ck, sizeof(n->ck), dh, sizeof(dh), NULL, 0);
    memcpy(n->ck, out, 32);
    memcpy(n->cs.key, out + 32, 32);
    n->cs.n = 0;
    n->cs.has_key = true;
    sodium_memzero(dh, sizeof(dh));
    sodium_memzero(out, sizeof(out));
    return 0;
}

/* EncryptAndHash; returns bytes written. */
static int seal_and_hash(struct lb_noise *n, const void *in, size_t len, uint8_t *out,
                         size_t *out_len, struct lb_error *err)
{
    if (n->cs.has_key) {
        if (lb_noise_seal(&n->cs, n->h, sizeof(n->h), in, len, out, err) < 0)
            return -1;
        *out_len = len + LB_NOISE_TAG_BYTES;
    } else {
        if (len > 0)
            memcpy(out, in, len);
        *out_len = len;
    }
    mix_hash(n, out, *out_len);
    return 0;
}

static int open_and_hash(struct lb_noise *n, const uint8_t *in, size_t len, uint8_t *out,
                         size_t *out_len, struct lb_error *err)
{
    uint8_t h[32];

    if (n->cs.has_key) {
        memcpy(h, n->h, sizeof(h));
        if (lb_noise_open(&n->cs, h, sizeof(h), in, len, out, err) < 0)
            return -1;
        *out_len = len - LB_NOISE_TAG_BYTES;
    } else {
        if (len > 0)
            memcpy(out, in, len);
        *out_len = len;
    }
    mix_hash(n, in, len);
    return 0;
}

void lb_noise_init(struct lb_noise *n, bool initiator, const struct lb_identity *me,
                   const void *prologue, size_t prologue_len)
{
    memset(n, 0, sizeof(*n));
    n->initiator = initiator;
    n->s = *me;
    memcpy(n->h, PROTOCOL, sizeof(n->h));
    memcpy(n->ck, n->h, sizeof(n->ck));
    mix_hash(n, prologue, prologue_len);
}

void lb_noise_fix_ephemeral(struct lb_noise *n, const uint8_t priv[32])
{
    memcpy(n->e_priv, priv, sizeof(n->e_priv));
    n->e_fixed = true;
}

static bool my_turn(const struct lb_noise *n)
{
    return !n->failed && n->step < 3 && n->initiator == (n->step % 2 == 0);
}

static void write_e(struct lb_noise *n, uint8_t *out)
{
    if (!n->e_fixed)
        randombytes_buf(n->e_priv, sizeof(n->e_priv));
    crypto_scalarmult_base(n->e_pub, n->e_priv);
    memcpy(out, n->e_pub, 32);
    mix_hash(n, n->e_pub, 32);
}

static int write_s(struct lb_noise *n, uint8_t *out, struct lb_error *err)
{
    size_t len;
    return seal_and_hash(n, n->s.pub, 32, out, &len, err);
}

static int write_message(struct lb_noise *n, const void *payload, size_t len, uint8_t *out,
                         size_t *out_len, struct lb_error *err)
{
    static const size_t fixed[3] = {32, 32 + 48 + 16, 48 + 16};
    uint8_t *p = out;
    size_t put;

    if (len > LB_NOISE_MAX_BYTES - fixed[1] || *out_len < fixed[n->step] + len)
        return lb_fail(err, LB_E_INTERNAL, "no room for a handshake message");
    switch (n->step) {
    case 0:
        write_e(n, p);
        p += 32;
        break;
    case 1:
        write_e(n, p);
        p += 32;
        if (mix_dh(n, n->e_priv, n->re, err) < 0 || write_s(n, p, err) < 0 ||
            mix_dh(n, n->s.priv, n->re, err) < 0)
            return -1;
        p += 48;
        break;
    default:
        if (write_s(n, p, err) < 0 || mix_dh(n, n->s.priv, n->re, err) < 0)
            return -1;
        p += 48;
        break;
    }
    if (seal_and_hash(n, payload, len, p, &put, err) < 0)
        return -1;
    *out_len = (size_t)(p - out) + put;
    return 0;
}

int lb_noise_write(struct lb_noise *n, const void *payload, size_t len, uint8_t *out,
                   size_t *out_len, struct lb_error *err)
{
    assert(my_turn(n));
    if (write_message(n, payload, len, out, out_len, err) < 0) {
        n->failed = true;
        return -1;
    }
    n->step++;
    return 0;
}

static int read_s(struct lb_noise *n, const uint8_t *in, struct lb_error *err)
{
    size_t len;
    return open_and_hash(n, in, 48, n->rs, &len, err);
}

static int read_message(struct lb_noise *n, const uint8_t *msg, size_t len, uint8_t *payload,
                        size_t *payload_len, struct lb_error *err)
{
    static const size_t least[3] = {LB_NOISE_MSG1_BYTES, LB_NOISE_MSG2_BYTES, LB_NOISE_MSG3_BYTES};
    const uint8_t *p = msg;

    if (len < least[n->step] || len > LB_NOISE_MAX_BYTES)
        return lb_fail(err, LB_E_PROTO, "handshake message %u of %zu bytes is not possible",
                       n->step + 1, len);
    if (n->step < 2) {
        memcpy(n->re, p, 32);
        mix_hash(n, n->re, 32);
        p += 32;
    }
    if (n->step == 1) {
        if (mix_dh(n, n->e_priv, n->re, err) < 0 || read_s(n, p, err) < 0 ||
            mix_dh(n, n->e_priv, n->rs, err) < 0)
            return -1;
        p += 48;
    } else if (n->step == 2) {
        if (read_s(n, p, err) < 0 || mix_dh(n, n->e_priv, n->rs, err) < 0)
            return -1;
        p += 48;
    }
    return open_and_hash(n, p, len - (size_t)(p - msg), payload, payload_len, err);
}

int lb_noise_read(struct lb_noise *n, const uint8_t *msg, size_t len, uint8_t *payload,
                  size_t *payload_len, struct lb_error *err)
{
    assert(!n->failed && n->step < 3 && !my_turn(n));
    if (read_message(n, msg, len, payload, payload_len, err) < 0) {
        n->failed = true;
        return lb_context(err, "handshake");
    }
    n->step++;
    return 0;
}

void lb_noise_split(struct lb_noise *n, struct lb_noise_cipher *send, struct lb_noise_cipher *recv)
{
    uint8_t out[64];

    assert(n->step == 3 && !n->failed);
    lb_hkdf_sha256(out, sizeof(out), n->ck, sizeof(n->ck), NULL, 0, NULL, 0);
    struct lb_noise_cipher *first = n->initiator ? send : recv;
    struct lb_noise_cipher *second = n->initiator ? recv : send;
    memcpy(first->key, out, 32);
    memcpy(second->key, out + 32, 32);
    first->n = second->n = 0;
    first->has_key = second->has_key = true;
    sodium_memzero(out, sizeof(out));
}

void lb_noise_wipe(struct lb_noise *n)
{
    sodium_memzero(n, sizeof(*n));
}
