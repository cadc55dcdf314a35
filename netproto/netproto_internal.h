/* netproto/netproto_internal.h - shared by the .c files of netproto/ and its tests only. */
#ifndef LB_NETPROTO_INTERNAL_H
#define LB_NETPROTO_INTERNAL_H

#include "netproto/netproto.h"

/* ------------------------------------------------------------ primitives */

/* sodium_init once; every entry point that needs libsodium calls it. Any thread. */
int lb_crypto_init(struct lb_error *err);
void lb_hmac_sha256(uint8_t out[32], const void *key, size_t key_len, const void *msg, size_t len);
/* RFC 5869 over SHA-256; len at most 255 * 32. */
void lb_hkdf_sha256(void *out, size_t len, const void *salt, size_t salt_len, const void *ikm,
                    size_t ikm_len, const void *info, size_t info_len);

/* ------------------------------------------------------------- transport */

/* The wait of every call on a tcp transport also ends with LB_E_CANCELLED when fd is readable;
 * -1 takes that back. Used while connecting only. */
void lb_tcp_set_cancel_fd(struct lb_transport *t, int fd);
/* LB_E_NET with sys_errno ETIMEDOUT: the caller may try again, nothing was lost. */
int lb_fail_timeout(struct lb_error *err);
bool lb_is_timeout(const struct lb_error *err);
static inline uint64_t lb_deadline(unsigned timeout_ms)
{
    return timeout_ms ? lb_now_ns() + (uint64_t)timeout_ms * 1000000 : 0;
}

/* --------------------------------------------------------------- ciphers */

#define LB_TAG_BYTES 16u
#define LB_KEYSTREAM_ALIGN 64u
/* Pieces sealed with one key. Far below the 2^64 of the counter. */
#define LB_AEAD_MAX_PIECES (UINT64_C(1) << 40)

/* One direction of one connection. A piece is begin, update..., finish. All
 * updates of a piece but the last have lengths that are multiples of
 * LB_KEYSTREAM_ALIGN. Opening writes plaintext before the tag is checked: the
 * caller must not act upon it until finish says 0. */
struct lb_aead_ops {
    const char *name;
    enum lb_cipher id;
    /* State for one key and direction; *state is freed by wipe. */
    int (*init)(void **state, const uint8_t key[32], bool seal, struct lb_error *err);
    void (*wipe)(void *state);
    /* Start a piece. `counter` never repeats for one state. 0 or -1. */
    int (*begin)(void *state, uint64_t counter);
    /* Reads every byte of `in` once. in == out is allowed. 0 or -1. */
    int (*update)(void *state, const void *in, size_t len, void *out);
    /* Sealing: writes tag. Opening: compares, -1 when it differs. */
    int (*finish)(void *state, uint8_t tag[LB_TAG_BYTES]);
};
extern const struct lb_aead_ops lb_aead_aes256gcm, lb_aead_chacha20poly1305, lb_aead_none;

struct lb_aead {
    const struct lb_aead_ops *ops;
    void *state;
    uint64_t counter; /* of the next piece */
    bool seal;
    bool open_piece;
};
const struct lb_aead_ops *lb_aead_find(enum lb_cipher c); /* NULL: unknown */
int lb_aead_init(struct lb_aead *a, enum lb_cipher c, const uint8_t key[32], bool seal,
                 struct lb_error *err);
void lb_aead_wipe(struct lb_aead *a);
int lb_aead_begin(struct lb_aead *a, struct lb_error *err);
int lb_aead_update(struct lb_aead *a, const void *in, size_t len, void *out, struct lb_error *err);
int lb_aead_finish(struct lb_aead *a, uint8_t tag[LB_TAG_BYTES], struct lb_error *err);

/* ----------------------------------------------------------------- zstd */

struct lb_zstd; /* contexts are made at first use and kept; one thread */
struct lb_zstd *lb_zstd_new(void);
void lb_zstd_free(struct lb_zstd *z);
/* Compress len bytes (at most LB_REC_MAX_PAYLOAD). Returns the size in *out (owned by
 * z, valid until the next call), or 0 when that does not save 1/8 or fails. */
size_t lb_zstd_compress(struct lb_zstd *z, const void *in, size_t len, int level,
                        const uint8_t **out);
/* The same without trying a sample first: for what most likely compresses. */
size_t lb_zstd_pack(struct lb_zstd *z, const void *in, size_t len, int level, const uint8_t **out);
/* What a frame says it holds: 1..max bytes. LB_E_PROTO otherwise. */
int lb_zstd_content_bytes(const void *in, size_t len, size_t max, size_t *out,
                          struct lb_error *err);
/* Exactly one frame that says it holds exactly out_len bytes. LB_E_PROTO otherwise. */
int lb_zstd_decompress(struct lb_zstd *z, const void *in, size_t len, void *out, size_t out_len,
                       struct lb_error *err);

/* --------------------------------------------------------------- records */

#define LB_REC_HEADER_BYTES 32u
#define LB_REC_RUN_BYTES 8u
#define LB_REC_MAX_RUNS 4096u
#define LB_REC_FLAG_OPTIONAL 1u
#define LB_REC_CHECKSUM_BYTES 8u  /* before the frame of a DELTA */
#define LB_REC_EPOCH_END_BYTES 8u
#define LB_REC_ASK_BYTES 4u
#define LB_REC_GRANT_BYTES 16u
#define LB_REC_MAX_ASK_PAGES 4096u
/* Wire page: the same 4096 as core/hv.h's, fixed by the format. */
#define LB_WIRE_PAGE_BYTES 4096u

struct lb_rec_header {
    uint16_t type;
    uint16_t flags;
    uint8_t codec;
    uint32_t block_id, round, n_runs, n_pages, payload_bytes;
    bool skip; /* unknown and optional */
};
struct lb_rec_limits {
    const uint64_t *n_pages_of_block;
    unsigned n_blocks;
    uint32_t index; /* of the connection */
    bool checkpoint;
    enum lb_direct_side direct;
};
void lb_rec_write_header(uint8_t out[LB_REC_HEADER_BYTES], const struct lb_rec_header *h);
/* Decode and check everything that can be checked without the runs. */
int lb_rec_parse_header(const uint8_t in[LB_REC_HEADER_BYTES], const struct lb_rec_limits *l,
                        struct lb_rec_header *h, struct lb_error *err);
/* in: h->n_runs * 8 bytes; out: room for h->n_runs. */
int lb_rec_parse_runs(const uint8_t *in, const struct lb_rec_limits *l,
                      const struct lb_rec_header *h, struct lb_page_run *out,
                      struct lb_error *err);

/* First bytes of a bulk connection, see STREAM.md. */
#define LB_BULK_HELLO_BYTES 80u
#define LB_BULK_ANSWER_BYTES 64u
#define LB_BULK_CONFIRM_BYTES 32u
#define LB_BULK_MAX_INDEX 256u

_Static_assert(LB_REC_MAX_PAYLOAD == LB_REC_MAX_PAGES * LB_WIRE_PAGE_BYTES, "a raw record fits");
_Static_assert(sizeof(struct lb_page_run) == LB_REC_RUN_BYTES, "runs are laid out as on the wire");

#endif
