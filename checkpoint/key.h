/*
 * checkpoint/key.h - keys of encrypted checkpoints.
 *
 * A file is encrypted with a random key of its own, which is in its header, wrapped by the user's: 32
 * bytes of a key file, or what Argon2id makes of a passphrase (salt and limits are in the header).  A
 * wrong key is known at once, before anything else is read.
 */
#ifndef LB_CKPT_KEY_H
#define LB_CKPT_KEY_H

#include "core/core.h"

enum lb_key_kind { LB_KEY_NONE = 0, LB_KEY_FILE, LB_KEY_PASSPHRASE };

struct lb_ckpt_key;
/* A file of 32 bytes, or of 64 hex digits (and a newline). Refused when others may read it. */
int lb_ckpt_key_file(const char *path, struct lb_ckpt_key **out, struct lb_error *err);
/* The text is copied to guarded memory (sodium_malloc); the caller wipes its own. "" is refused. */
int lb_ckpt_key_passphrase(const char *text, size_t len, struct lb_ckpt_key **out, struct lb_error *err);
enum lb_key_kind lb_ckpt_key_kind(const struct lb_ckpt_key *k); /* NULL: LB_KEY_NONE */
void lb_ckpt_key_free(struct lb_ckpt_key *k);

/* What a header holds about its key; integers in host order here. */
struct lb_key_slot {
    enum lb_key_kind kind;
    uint8_t salt[16];                /* PASSPHRASE */
    uint64_t ops_limit, mem_limit;   /* PASSPHRASE: Argon2id, as libsodium counts; a reader refuses absurd ones */
    uint8_t nonce[24], wrapped[48];
};
/* A new data key for a new file. Argon2id takes a second: the derived key is kept in k for its salt, so that a
 * chain and its children cost it once. `bind`: bytes of the header that must not change. Any thread. */
int lb_ckpt_key_new(const struct lb_ckpt_key *k, const void *bind, size_t bind_len, struct lb_key_slot *slot,
                    uint8_t data_key[32], struct lb_error *err);
/* LB_E_AUTH "wrong key" / "wrong passphrase" / "is encrypted with a ...: give --key". k NULL: the last. */
int lb_ckpt_key_open(const struct lb_ckpt_key *k, const struct lb_key_slot *slot, const void *bind, size_t bind_len,
                     uint8_t data_key[32], struct lb_error *err);

#endif
