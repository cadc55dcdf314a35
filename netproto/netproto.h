/*
 * netproto/netproto.h - what travels between two daemons.
 *
 *   identity + trust      who we are, whom we believe       (identity.c)
 *   noise                 Noise_XX_25519_ChaChaPoly_SHA256   (noise.c)
 *   control channel       protobuf messages, one connection  (chan.c, control.proto)
 *   bulk connections      page records, N connections        (bulk.c, codec_*.c, STREAM.md)
 *   transport             the byte stream under both         (transport_tcp.c, transport_memory.c)
 *
 * One listening port per host carries everything.  The first LB_PREAMBLE_BYTES of a
 * connection say in clear what it is, so that the supervisor can route it
 * without parsing anything else (lb_preamble_parse):
 *      "LBv1" kind(1) reserved(3) = 0  session_id(16)      24 bytes
 *      kind 'C': a control channel, a Noise XX handshake follows (session_id zero)
 *      kind 'D': a bulk connection of session session_id
 *
 * Threads: a channel or a bulk connection is used by one thread at a time for
 * sending and one for receiving; lb_chan_abort / lb_bulk_abort from any thread.
 */
#ifndef LB_NETPROTO_H
#define LB_NETPROTO_H

#include "core/core.h"
#include <sys/uio.h>

#define LB_DEFAULT_PORT 7007
#define LB_KEY_BYTES 32
#define LB_SESSION_ID_BYTES 16
#define LB_PREAMBLE_BYTES 24
#define LB_CONTROL_MAX_BYTES (4u << 20)  /* one control message */

/* ------------------------------------------- integers on the wire: little-endian */

static inline void lb_put16(uint8_t *p, uint16_t v)
{
    p[0] = (uint8_t)v;
    p[1] = (uint8_t)(v >> 8);
}
static inline void lb_put32(uint8_t *p, uint32_t v)
{
    lb_put16(p, (uint16_t)v);
    lb_put16(p + 2, (uint16_t)(v >> 16));
}
static inline void lb_put64(uint8_t *p, uint64_t v)
{
    lb_put32(p, (uint32_t)v);
    lb_put32(p + 4, (uint32_t)(v >> 32));
}
static inline uint16_t lb_get16(const uint8_t *p)
{
    return (uint16_t)(p[0] | p[1] << 8);
}
static inline uint32_t lb_get32(const uint8_t *p)
{
    return (uint32_t)lb_get16(p) | (uint32_t)lb_get16(p + 2) << 16;
}
static inline uint64_t lb_get64(const uint8_t *p)
{
    return (uint64_t)lb_get32(p) | (uint64_t)lb_get32(p + 4) << 32;
}

/* --------------------------------------------------------------- transport */

/* A reliable byte stream. All slots mandatory. */
struct lb_transport;
struct lb_transport_ops {
    const char *name; /* "tcp", "memory" */
    /* Everything or failure. deadline_ns absolute CLOCK_MONOTONIC, 0 = none. */
    int (*writev)(struct lb_transport *t, const struct iovec *iov, unsigned n, uint64_t deadline_ns,
                  struct lb_error *err);
    /* As much as is there, at least 1 byte. 0 at EOF. */
    ssize_t (*read_some)(struct lb_transport *t, void *buf, size_t len, uint64_t deadline_ns,
                         struct lb_error *err);
    /* Make every present and future call fail at once. Any thread. */
    void (*abort)(struct lb_transport *t);
    int (*fd)(struct lb_transport *t); /* for passing to another process and for polling */
    void (*close)(struct lb_transport *t); /* and free */
};
struct lb_transport {
    const struct lb_transport_ops *ops;
    _Atomic uint64_t blocked_ns; /* spent in writev waiting for room; relaxed */
    _Atomic uint64_t copied_bytes; /* by a processor, to or from the network; relaxed */
};
/* Everything or failure; deadline_ns as above. */
int lb_transport_read(struct lb_transport *t, void *buf, size_t len, uint64_t deadline_ns,
                      struct lb_error *err);
/* Connect with a deadline (getaddrinfo, non-blocking connect, TCP_NODELAY, keepalive,
 * TCP_USER_TIMEOUT 20 s). cancel_fd: -1 or an fd whose readability ends the wait. */
int lb_tcp_connect(const char *host, uint16_t port, unsigned timeout_ms, int cancel_fd,
                   struct lb_transport **out, struct lb_error *err);
/* Take over an accepted socket. */
struct lb_transport *lb_tcp_from_fd(int fd);
/* Listening socket bound to "HOST:PORT" (":7007" = all addresses); returns fd or -1. */
int lb_tcp_listen(const char *hostport, uint16_t default_port, struct lb_error *err);
/* Two connected ends inside one process, for tests. */
int lb_memory_pair(struct lb_transport **a, struct lb_transport **b, struct lb_error *err);
/* Test filter: passes everything to `inner` (owned) and damages it as told. */
struct lb_fault_plan {
    int64_t flip_bit_at;      /* absolute sent bit, -1 none */
    int64_t truncate_at;      /* sent byte at which the stream ends, -1 none */
    int64_t stall_at;         /* sent byte at which writes block until abort, -1 none */
};
struct lb_transport *lb_transport_fault(struct lb_transport *inner, const struct lb_fault_plan *p);

struct lb_preamble {
    char kind;                                /* 'C' or 'D' */
    uint8_t session_id[LB_SESSION_ID_BYTES];
};
void lb_preamble_write(uint8_t out[LB_PREAMBLE_BYTES], const struct lb_preamble *p);
int lb_preamble_parse(const uint8_t in[LB_PREAMBLE_BYTES], struct lb_preamble *p,
                      struct lb_error *err);

/* ---------------------------------------------------------- identity, trust */

struct lb_identity {
    uint8_t pub[LB_KEY_BYTES];
    uint8_t priv[LB_KEY_BYTES]; /* X25519; wiped by lb_identity_wipe */
};
/* Load STATE_DIR/identity.key (0600, hex), or make it at first start. */
int lb_identity_load(const char *state_dir, struct lb_identity *out, struct lb_error *err);
void lb_identity_wipe(struct lb_identity *id);
/* Public key as people see it: "lb1" + 64 hex digits; parse checks both. */
#define LB_KEY_TEXT_BYTES 68
void lb_key_format(char out[LB_KEY_TEXT_BYTES], const uint8_t pub[LB_KEY_BYTES]);
int lb_key_parse(const char *text, uint8_t pub[LB_KEY_BYTES], struct lb_error *err);

/* Trusted hosts: STATE_DIR/hosts.json, re-read by every process that needs it. */
struct lb_host {
    char name[128];
    char address[280]; /* "HOST[:PORT]" or "" when it only connects to us */
    uint8_t pub[LB_KEY_BYTES];
};
struct lb_hosts {
    struct lb_host *v;
    unsigned n;
};
int lb_hosts_load(const char *state_dir, struct lb_hosts *out, struct lb_error *err);
void lb_hosts_free(struct lb_hosts *h);
/* Durable. Fails with LB_E_EXISTS when the name has another key (remedy: forget first). */
int lb_hosts_trust(const char *state_dir, const struct lb_host *h, struct lb_error *err);
int lb_hosts_forget(const char *state_dir, const char *name, struct lb_error *err);
const struct lb_host *lb_hosts_by_name(const struct lb_hosts *h, const char *name);
const struct lb_host *lb_hosts_by_key(const struct lb_hosts *h, const uint8_t pub[LB_KEY_BYTES]);

/* ------------------------------------------------------------------- noise */

/* Noise_XX_25519_ChaChaPoly_SHA256 as a pure state machine over buffers (no I/O),
 * internals in noise.h so that the published vectors can drive it. */

/* ---------------------------------------------------------- control channel */

struct lb_chan;
/* Initiator: connect, preamble, handshake. The responder's key must be `expect`
 * (checked before our own identity is sent). Succeeds only when the responder accepted
 * our key; LB_E_AUTH when it closed the connection instead. */
int lb_chan_connect(const char *host, uint16_t port, const struct lb_identity *me,
                    const uint8_t expect[LB_KEY_BYTES], unsigned timeout_ms, int cancel_fd,
                    struct lb_chan **out, struct lb_error *err);
/* The same over any transport (tests), preamble included. Takes over t also on failure. */
int lb_chan_open(struct lb_transport *t, const struct lb_identity *me,
                 const uint8_t expect[LB_KEY_BYTES], unsigned timeout_ms, struct lb_chan **out,
                 struct lb_error *err);
/* Responder, preamble already consumed. `trusted` decides on the initiator's key
 * after message 3; an unknown key gets the connection closed, nothing more.
 * Takes over t also on failure. */
int lb_chan_accept(struct lb_transport *t, const struct lb_identity *me,
                   bool (*trusted)(const uint8_t pub[LB_KEY_BYTES], void *arg), void *arg,
                   unsigned timeout_ms, struct lb_chan **out, struct lb_error *err);
const uint8_t *lb_chan_peer_key(const struct lb_chan *c);
/* One packed protobuf message of at most LB_CONTROL_MAX_BYTES; fragmented into
 * Noise messages inside. Send is thread safe. */
int lb_chan_send(struct lb_chan *c, const void *msg, size_t len, struct lb_error *err);
/* *msg malloc'ed, caller frees. deadline_ns absolute, 0 none. LB_E_NET at EOF. One
 * receiving thread. A deadline that passes (sys_errno ETIMEDOUT) loses nothing: call again. */
int lb_chan_recv(struct lb_chan *c, void **msg, size_t *len, uint64_t deadline_ns,
                 struct lb_error *err);
/* Readable when a message may be there (poll); data may also be buffered inside. */
int lb_chan_fd(const struct lb_chan *c);
void lb_chan_abort(struct lb_chan *c);
void lb_chan_close(struct lb_chan *c);   /* NULL is fine; wipes keys */

/* -------------------------------------------------------------------- bulk */

enum lb_cipher {
    LB_CIPHER_NONE = 0,      /* --insecure-plaintext, benchmark only: XXH64 checksums instead of tags */
    LB_CIPHER_AES256GCM = 1, /* OpenSSL's EVP: 2.2 x libsodium's rate, and incremental, so that pages are
                                read from and decrypted into guest RAM without a copy */
    LB_CIPHER_CHACHA20POLY1305 = 2,
};
/* AES-GCM when this CPU has AES and carry-less multiply, else ChaCha. */
enum lb_cipher lb_cipher_preferred(void);
const char *lb_cipher_name(enum lb_cipher c);

enum lb_rec_type {
    LB_REC_PAGES = 1,      /* runs + payload */
    LB_REC_ZERO = 2,       /* runs, no payload: pages become zero */
    LB_REC_ROUND_END = 3,  /* every page of this round on this connection was sent */
    LB_REC_STATE = 4,      /* a piece of device state, in order, on connection 0 */
    LB_REC_END = 5,        /* nothing follows on this connection */
    /* of checkpoints (remus/stage.h); round = low 32 bits of the epoch */
    LB_REC_DELTA = 6,      /* runs + checksum + zstd of (new XOR what the backup holds) */
    LB_REC_DISK = 7,       /* block = disk number; payload: operations on it */
    LB_REC_FRAMES = 8,     /* payload: what the guest sent in this epoch */
    LB_REC_EPOCH_END = 9,  /* payload: u64 epoch; everything of it was sent */
    /* with zero copy, where the sender writes into the receiver's memory itself (rdma.h) */
    LB_REC_WRITTEN = 10,   /* runs + XXH3-64 of each page: they are there */
    LB_REC_ASK = 11,       /* one run: let me write there; payload: u32 slot */
    LB_REC_GRANT = 12,     /* the answer, from the receiver: the same run; payload: u64 address, u32 key, u32 granted */
};
enum lb_codec {
    LB_CODEC_RAW = 0,
    LB_CODEC_ZSTD = 1,
    LB_CODEC_XOR_ZSTD = 2, /* STATE of a checkpoint: as DELTA, against the last epoch's device state */
};

#define LB_REC_MAX_PAGES 256u              /* pages per record: 1 MiB */
#define LB_REC_MAX_PAYLOAD (1u << 20)      /* hard maximum, checked before anything else */

struct lb_page_run {
    uint32_t first; /* page index in the block */
    uint32_t count; /* >= 1 */
};
/* A received record header; runs valid until the next recv on the connection. */
struct lb_record {
    enum lb_rec_type type;
    enum lb_codec codec;
    uint32_t round;
    uint32_t block_id;
    uint32_t n_runs;
    uint32_t n_pages;      /* sum of the runs' counts, checked */
    uint32_t payload_bytes;
    const struct lb_page_run *runs; /* sorted, not overlapping, checked */
};

struct lb_bulk;
struct lb_bulk_keys {
    uint8_t secret[32];   /* made by the source, sent over the control channel */
    uint8_t session_id[LB_SESSION_ID_BYTES];
    enum lb_cipher cipher;
};
/* Source side: connect, preamble 'D', exchange of fresh 32-byte salts and a key
 * confirmation in both directions; per-direction keys = HKDF(secret, salts, index). */
int lb_bulk_connect(const char *host, uint16_t port, const struct lb_bulk_keys *k, uint32_t index,
                    unsigned timeout_ms, int cancel_fd, struct lb_bulk **out,
                    struct lb_error *err);
/* The same over any transport (tests, memory), preamble excluded. Takes over t. */
int lb_bulk_open(struct lb_transport *t, bool initiator, const struct lb_bulk_keys *k,
                 uint32_t index, unsigned timeout_ms, struct lb_bulk **out, struct lb_error *err);
/* Receiver: preamble already consumed; learns the index. Takes over t. */
int lb_bulk_accept(struct lb_transport *t, const struct lb_bulk_keys *k, unsigned timeout_ms,
                   uint32_t *index, struct lb_bulk **out, struct lb_error *err);

struct lb_bulk_stats { /* since open; monotonic; readable from any thread (relaxed atomics inside) */
    uint64_t wire_bytes;     /* what went to the transport */
    uint64_t raw_pages;
    uint64_t zstd_pages;
    uint64_t zstd_in_bytes, zstd_out_bytes, zstd_ns;
    uint64_t zero_pages;
    uint64_t direct_pages;   /* written straight into the receiver's memory; in wire_bytes, too */
    uint64_t blocked_ns;     /* time spent waiting for the transport (socket full) */
    uint64_t copied_bytes;   /* moved by a processor here, both directions: sealed, opened, compressed, to and from
                                the network (where the kernel does that, what it copies) */
};
void lb_bulk_get_stats(const struct lb_bulk *b, struct lb_bulk_stats *out);
/* What carries it; b's. */
struct lb_transport *lb_bulk_transport(const struct lb_bulk *b);

/* Send pages. iov[i] holds runs[i].count pages and may be guest RAM that changes
 * meanwhile (a page that changed is in the next round anyway): every byte is
 * read exactly once. zstd_level 0 = raw; otherwise compressed, and sent raw
 * when that does not save 1/8. At most LB_REC_MAX_PAGES pages in all; runs sorted and disjoint
 * (both sends). Buffered: lb_bulk_flush or a mark puts it on its way. */
int lb_bulk_send_pages(struct lb_bulk *b, uint32_t round, uint32_t block_id,
                       const struct lb_page_run *runs, const struct iovec *iov, unsigned n_runs,
                       int zstd_level, struct lb_error *err);
int lb_bulk_send_zero(struct lb_bulk *b, uint32_t round, uint32_t block_id,
                      const struct lb_page_run *runs, unsigned n_runs, struct lb_error *err);
/* ROUND_END, END (len 0) or STATE (0 < len <= LB_REC_MAX_PAYLOAD, connection 0 only). Flushes.
 * The sends have no deadline: abort ends them. A failed send is final for the connection. */
int lb_bulk_send_mark(struct lb_bulk *b, enum lb_rec_type type, uint32_t round, const void *data,
                      size_t len, struct lb_error *err);
int lb_bulk_flush(struct lb_bulk *b, struct lb_error *err);

/* ---- checkpoint connections: DELTA, DISK, FRAMES, EPOCH_END, and STATE on whatever index; no ROUND_END.
 * Both sides say so before their first record. */
void lb_bulk_set_checkpoint(struct lb_bulk *b);
/* xored: the pages of the runs in order, each XOR what the other side holds. checksum: of the pages
 * as they will be (lb_bulk_checksum). Returns 1, or 0 when it does not compress to 7/8: nothing was sent. */
int lb_bulk_send_delta(struct lb_bulk *b, uint32_t round, uint32_t block_id,
                       const struct lb_page_run *runs, unsigned n_runs, const void *xored,
                       uint64_t checksum, int zstd_level, struct lb_error *err);
/* STATE, DISK, FRAMES or EPOCH_END: 0 < len <= LB_REC_MAX_PAYLOAD. zstd_level 0 = raw; otherwise
 * compressed when that saves 1/8. Buffered. Returns 1 when compressed, else 0. */
int lb_bulk_send_data(struct lb_bulk *b, enum lb_rec_type type, uint32_t round, uint32_t block_id,
                      const struct iovec *iov, unsigned n_iov, int zstd_level,
                      struct lb_error *err);
/* STATE as XOR with the last epoch's at the same place. 1, or 0: nothing sent, as for a delta. */
int lb_bulk_send_state_xor(struct lb_bulk *b, uint32_t round, const void *xored, size_t len,
                           int zstd_level, struct lb_error *err);
/* Of n pages, for DELTA: XXH3-64 of each in order, folded. Start with 0. */
uint64_t lb_bulk_checksum(uint64_t sum, const void *pages, size_t n_pages);

/* Receive: header and runs are authenticated and checked against hard limits and
 * against what lb_bulk_set_blocks allows before this returns. A deadline that passes in
 * lb_bulk_recv (LB_E_NET, sys_errno ETIMEDOUT) loses nothing: call again. Any other failure is
 * final. Without lb_bulk_set_blocks no record with pages is accepted. Nothing comes after END. */
int lb_bulk_set_blocks(struct lb_bulk *b, const uint64_t *n_pages_of_block, unsigned n_blocks,
                       struct lb_error *err);
int lb_bulk_recv(struct lb_bulk *b, struct lb_record *rec, uint64_t deadline_ns,
                 struct lb_error *err);
/* A payload must come within 60 s; or before deadline_ns (0: 60 s again), and then a call that ends
 * with ETIMEDOUT loses nothing either: repeat it with the same arguments. */
void lb_bulk_set_payload_deadline(struct lb_bulk *b, uint64_t deadline_ns);
/* Then exactly one of these for a record with payload (PAGES, STATE):
 * decrypt/decompress into dst[i] = runs[i].count pages each, without an intermediate
 * copy where the cipher allows. On failure the contents of dst are undefined and
 * the receiver must be thrown away. */
int lb_bulk_recv_pages(struct lb_bulk *b, const struct lb_record *rec, const struct iovec *dst,
                       struct lb_error *err);
int lb_bulk_recv_data(struct lb_bulk *b, const struct lb_record *rec, void *buf,
                      struct lb_error *err);
/* On checkpoint connections: DELTA into xored (n_pages pages, contiguous)... */
int lb_bulk_recv_delta(struct lb_bulk *b, const struct lb_record *rec, void *xored,
                       uint64_t *checksum, struct lb_error *err);
/* ...and the others, decompressed: *data is b's until the next call, 0 < *len <= LB_REC_MAX_PAYLOAD. */
int lb_bulk_recv_blob(struct lb_bulk *b, const struct lb_record *rec, const void **data,
                      size_t *len, struct lb_error *err);
/* ---- zero copy: WRITTEN, ASK, GRANT. Both sides say so before their first record. */
enum lb_direct_side { LB_DIRECT_NONE, LB_DIRECT_SOURCE, LB_DIRECT_DEST };
void lb_bulk_set_direct(struct lb_bulk *b, enum lb_direct_side side);
#define LB_REC_MAX_DIRECT_BYTES (LB_REC_MAX_PAGES * 8u)
/* One of the three. WRITTEN is buffered, the others flush. */
int lb_bulk_send_direct(struct lb_bulk *b, enum lb_rec_type type, uint32_t round, uint32_t block_id,
                        const struct lb_page_run *runs, unsigned n_runs, const void *payload,
                        size_t len, struct lb_error *err);
/* Its payload, at most LB_REC_MAX_DIRECT_BYTES. */
int lb_bulk_recv_direct(struct lb_bulk *b, const struct lb_record *rec, void *payload,
                        struct lb_error *err);
/* Pages that went beside the stream, for the statistics. */
void lb_bulk_count_direct(struct lb_bulk *b, uint64_t pages, uint64_t copied_bytes);
void lb_bulk_abort(struct lb_bulk *b);  /* any thread */
void lb_bulk_close(struct lb_bulk *b);  /* NULL is fine; wipes keys */

/* True when n_bytes (multiple of 64) at p are all zero; fast on any x86-64. */
bool lb_is_zero(const void *p, size_t n_bytes);

#endif
