/*
 * netproto/noise.h - Noise_XX_25519_ChaChaPoly_SHA256 as a pure state machine.
 *
 *      initiator                    responder
 *        write(1)   -> e               read(1)
 *        read(2)    <- e, ee, s, es    write(2)      remote static known after read(2)
 *        write(3)   -> s, se           read(3)       remote static known after read(3)
 *        split                         split
 *
 * No I/O, no allocation. One thread per object. Wipe it when done, also after a failure.
 */
#ifndef LB_NOISE_H
#define LB_NOISE_H

#include "netproto/netproto.h"

#define LB_NOISE_TAG_BYTES 16u
#define LB_NOISE_MAX_BYTES 65535u /* of any Noise message */
/* Handshake messages without payload. */
#define LB_NOISE_MSG1_BYTES 32u
#define LB_NOISE_MSG2_BYTES 96u
#define LB_NOISE_MSG3_BYTES 64u

/* One direction. n counts messages and is never reused. */
struct lb_noise_cipher {
    uint8_t key[32];
    uint64_t n;
    bool has_key;
};

struct lb_noise {
    bool initiator;
    unsigned step; /* messages done: 0..3 */
    bool failed;
    struct lb_identity s;
    uint8_t e_pub[32], e_priv[32];
    bool e_fixed; /* tests: keep e_priv instead of a fresh one */
    uint8_t rs[32], re[32];
    uint8_t h[32], ck[32];
    struct lb_noise_cipher cs;
};

void lb_noise_init(struct lb_noise *n, bool initiator, const struct lb_identity *me,
                   const void *prologue, size_t prologue_len);
/* For published vectors only. */
void lb_noise_fix_ephemeral(struct lb_noise *n, const uint8_t priv[32]);
/* Next handshake message with a payload (may be empty); *out_len in: room, out: length. */
int lb_noise_write(struct lb_noise *n, const void *payload, size_t len, uint8_t *out,
                   size_t *out_len, struct lb_error *err);
/* payload: room for len bytes; *payload_len set. LB_E_AUTH or LB_E_PROTO; the object is
 * then dead. */
int lb_noise_read(struct lb_noise *n, const uint8_t *msg, size_t len, uint8_t *payload,
                  size_t *payload_len, struct lb_error *err);
/* After message 3. */
void lb_noise_split(struct lb_noise *n, struct lb_noise_cipher *send,
                    struct lb_noise_cipher *recv);
void lb_noise_wipe(struct lb_noise *n);

/* out: len + 16 bytes. Fails (LB_E_STATE) long before n wraps. */
int lb_noise_seal(struct lb_noise_cipher *c, const void *ad, size_t ad_len, const void *in,
                  size_t len, uint8_t *out, struct lb_error *err);
/* out: len - 16 bytes. */
int lb_noise_open(struct lb_noise_cipher *c, const void *ad, size_t ad_len, const uint8_t *in,
                  size_t len, void *out, struct lb_error *err);

#endif
