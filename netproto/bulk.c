/*
 * netproto/bulk.c - one bulk connection: key agreement, sealed records, buffers.
 *
 * Sending.  Pages are sealed straight out of guest memory into sbuf; sbuf goes to
 * the transport when it is full, so small records share a system call and a
 * large one passes through in pieces that stay in the cache.
 *
 *      guest RAM --seal--> sbuf (128 KiB) --writev--> transport
 *      guest RAM --copy--> bounce --zstd--> frame --seal--> sbuf    (compression)
 *
 * Receiving.  rbuf is filled with whatever is there; header and runs are opened
 * and checked inside it, payload is opened from it straight into guest memory.
 *
 *      transport --read--> rbuf (128 KiB) --open--> guest RAM
 *
 * Failure modes: anything wrong leaves that direction broken for good; only a
 * deadline that passes in lb_bulk_recv loses nothing (the call may be repeated).
 */
#include "netproto/netproto_internal.h"

#include <assert.h>
#include <sodium.h>
#include <stdatomic.h>
#include <string.h>
#include <xxhash.h>

#define SBUF_BYTES ((size_t)128 << 10)
#define RBUF_BYTES ((size_t)128 << 10)
/* A record once begun must go on: its sender writes it in one go. */
#define STALL_LIMIT_NS (UINT64_C(60) * 1000000000)
#define MAX_BLOCKS 65536u

_Static_assert(RBUF_BYTES >= LB_REC_MAX_RUNS * LB_REC_RUN_BYTES + LB_TAG_BYTES, "a table fits");
_Static_assert(SBUF_BYTES >= LB_REC_HEADER_BYTES + LB_REC_MAX_RUNS * LB_REC_RUN_BYTES +
                                 2 * LB_TAG_BYTES, "a header and a table fit");

enum rx_state { RX_HEADER, RX_RUNS, RX_PAYLOAD, RX_END };

struct lb_bulk {
    /* immutable after the key agreement */
    struct lb_transport *t;
    uint32_t index;

    /* sending thread only */
    struct lb_aead tx;
    uint8_t *sbuf;
    size_t s_len;
    struct lb_zstd *tx_zstd;
    uint8_t *tx_bounce; /* at first use */
    bool tx_broken;

    /* receiving thread only */
    struct lb_aead rx;
    uint8_t *rbuf;
    size_t r_pos, r_end;
    enum rx_state rx_state;
    struct lb_rec_header hdr;
    struct lb_rec_limits limits;
    uint64_t *block_pages;
    struct lb_page_run *runs;
    struct lb_zstd *rx_zstd;
    uint8_t *rx_bounce, *rx_plain; /* at first use */
    uint64_t rx_until_ns; /* lb_bulk_set_payload_deadline */
    size_t rx_done;       /* bytes of a payload that a deadline cut in two */
    bool rx_open;         /* such a payload is begun */
    bool rx_broken;

    /* any thread, relaxed; written by the sending thread */
    _Atomic uint64_t wire_bytes, raw_pages, zstd_pages, zstd_in_bytes, zstd_out_bytes, zstd_ns,
        zero_pages, copied_bytes, direct_pages;
};

static void count(_Atomic uint64_t *c, uint64_t n)
{
    atomic_fetch_add_explicit(c, n, memory_order_relaxed);
}

/* ------------------------------------------------------------ key agreement */

/*      initiator                                          responder
 *        hello: "LBB1" index cipher 0 salt_i mac(80)  ->
 *                                              <-  answer: salt_r confirm_r (64)
 *        confirm_i (32)                               ->
 *
 * mac proves the secret, so that a stranger gets not one byte back; the confirmations
 * depend on both salts, so that a recording replayed goes no further. */

struct bulk_secrets {
    uint8_t key_i[32], key_r[32];         /* initiator to responder, and back */
    uint8_t confirm_i[32], confirm_r[32]; /* MAC keys */
};

static const char LABEL_HELLO[16] = "lb bulk hello v1";
static const char LABEL_KEYS[16] = "lb bulk keys  v1";

static void hello_mac(uint8_t mac[32], const struct lb_bulk_keys *k, const uint8_t hello[48])
{
    uint8_t key[32];
    lb_hkdf_sha256(key, sizeof(key), k->session_id, sizeof(k->session_id), k->secret,
                   sizeof(k->secret), LABEL_HELLO, sizeof(LABEL_HELLO));
    lb_hmac_sha256(mac, key, sizeof(key), hello, 48);
    sodium_memzero(key, sizeof(key));
}

/* hello carries index, cipher and salt_i. */
static void derive(struct bulk_secrets *s, const struct lb_bulk_keys *k, const uint8_t hello[48],
                   const uint8_t salt_r[32])
{
    uint8_t salt[64], info[16 + LB_SESSION_ID_BYTES + 16];

    memcpy(salt, hello + 16, 32);
    memcpy(salt + 32, salt_r, 32);
    memcpy(info, LABEL_KEYS, 16);
    memcpy(info + 16, k->session_id, LB_SESSION_ID_BYTES);
    memcpy(info + 32, hello, 16);
    lb_hkdf_sha256(s, sizeof(*s), salt, sizeof(salt), k->secret, sizeof(k->secret), info,
                   sizeof(info));
}

static int fail_auth(struct lb_error *err)
{
    return lb_fail(err, LB_E_AUTH, "a bulk connection does not prove that it belongs to the session");
}

static int put(struct lb_bulk *b, const void *data, size_t len, uint64_t deadline_ns,
               struct lb_error *err)
{
    struct iovec iov = {.iov_base = (void *)(uintptr_t)data, .iov_len = len};
    if (b->t->ops->writev(b->t, &iov, 1, deadline_ns, err) < 0)
        return -1;
    count(&b->wire_bytes, len);
    return 0;
}

static int greet_initiator(struct lb_bulk *b, const struct lb_bulk_keys *k, uint64_t deadline_ns,
                           struct bulk_secrets *s, struct lb_error *err)
{
    uint8_t hello[LB_BULK_HELLO_BYTES] = {'L', 'B', 'B', '1'};
    uint8_t answer[LB_BULK_ANSWER_BYTES], mac[32];

    lb_put32(hello + 4, b->index);
    hello[8] = (uint8_t)k->cipher;
    randombytes_buf(hello + 16, 32);
    hello_mac(hello + 48, k, hello);
    if (put(b, hello, sizeof(hello), deadline_ns, err) < 0 ||
        lb_transport_read(b->t, answer, sizeof(answer), deadline_ns, err) < 0)
        return -1;
    derive(s, k, hello, answer);
    lb_hmac_sha256(mac, s->confirm_r, 32, answer, 32);
    if (sodium_memcmp(mac, answer + 32, 32) != 0)
        return fail_auth(err);
    lb_hmac_sha256(mac, s->confirm_i, 32, answer, 32);
    return put(b, mac, sizeof(mac), deadline_ns, err);
}

static int check_hello(struct lb_bulk *b, const struct lb_bulk_keys *k,
                       const uint8_t hello[LB_BULK_HELLO_BYTES], bool any_index,
                       struct lb_error *err)
{
    static const uint8_t zero[7];
    uint8_t mac[32];

    hello_mac(mac, k, hello);
    if (sodium_memcmp(mac, hello + 48, 32) != 0)
        return fail_auth(err);
    uint32_t index = lb_get32(hello + 4);
    if (memcmp(hello, "LBB1", 4) != 0 || memcmp(hello + 9, zero, sizeof(zero)) != 0)
        return lb_fail(err, LB_E_PROTO, "the greeting of a bulk connection is not valid");
    if (hello[8] != (uint8_t)k->cipher)
        return lb_fail(err, LB_E_PROTO, "a bulk connection wants cipher %u, the session %u",
                       hello[8], (unsigned)k->cipher);
    if (index >= LB_BULK_MAX_INDEX || (!any_index && index != b->index))
        return lb_fail(err, LB_E_PROTO, "a bulk connection has number %u", index);
    b->index = index;
    return 0;
}

static int greet_responder(struct lb_bulk *b, const struct lb_bulk_keys *k, uint64_t deadline_ns,
                           bool any_index, struct bulk_secrets *s, struct lb_error *err)
{
    uint8_t hello[LB_BULK_HELLO_BYTES], answer[LB_BULK_ANSWER_BYTES];
    uint8_t confirm[LB_BULK_CONFIRM_BYTES], mac[32];

    if (lb_transport_read(b->t, hello, sizeof(hello), deadline_ns, err) < 0 ||
        check_hello(b, k, hello, any_index, err) < 0)
        return -1;
    randombytes_buf(answer, 32);
    derive(s, k, hello, answer);
    lb_hmac_sha256(answer + 32, s->confirm_r, 32, answer, 32);
    lb_hmac_sha256(mac, s->confirm_i, 32, answer, 32);
    if (put(b, answer, sizeof(answer), deadline_ns, err) < 0 ||
        lb_transport_read(b->t, confirm, sizeof(confirm), deadline_ns, err) < 0)
        return -1;
    return sodium_memcmp(mac, confirm, sizeof(mac)) == 0 ? 0 : fail_auth(err);
}

static int open_any(struct lb_transport *t, bool initiator, bool any_index,
                    const struct lb_bulk_keys *k, uint32_t index, uint64_t deadline_ns,
                    struct lb_bulk **out, struct lb_error *err)
{
    struct bulk_secrets s = {0};
    struct lb_bulk *b = lb_alloc(sizeof(*b));
    int rc = -1;

    assert(index < LB_BULK_MAX_INDEX);
    b->t = t;
    b->index = index;
    if (lb_crypto_init(err) < 0)
        goto out;
    if (!lb_aead_find(k->cipher)) {
        lb_fail(err, LB_E_PROTO, "unknown cipher %d", (int)k->cipher);
        goto out;
    }
    if (initiator ? greet_initiator(b, k, deadline_ns, &s, err)
                  : greet_responder(b, k, deadline_ns, any_index, &s, err)) {
        lb_context(err, "bulk connection");
        goto out;
    }
    if (lb_aead_init(&b->tx, k->cipher, initiator ? s.key_i : s.key_r, true, err) < 0 ||
        lb_aead_init(&b->rx, k->cipher, initiator ? s.key_r : s.key_i, false, err) < 0)
        goto out;
    b->limits.index = b->index;
    b->sbuf = lb_alloc(SBUF_BYTES);
    b->rbuf = lb_alloc(RBUF_BYTES);
    b->runs = lb_alloc(LB_REC_MAX_RUNS * sizeof(*b->runs));
    *out = b;
    b = NULL;
    rc = 0;
out:
    sodium_memzero(&s, sizeof(s));
    lb_bulk_close(b);
    return rc;
}

int lb_bulk_open(struct lb_transport *t, bool initiator, const struct lb_bulk_keys *k,
                 uint32_t index, unsigned timeout_ms, struct lb_bulk **out, struct lb_error *err)
{
    return open_any(t, initiator, false, k, index, lb_deadline(timeout_ms), out, err);
}

int lb_bulk_accept(struct lb_transport *t, const struct lb_bulk_keys *k, unsigned timeout_ms,
                   uint32_t *index, struct lb_bulk **out, struct lb_error *err)
{
    if (open_any(t, false, true, k, 0, lb_deadline(timeout_ms), out, err) < 0)
        return -1;
    *index = (*out)->index;
    return 0;
}

int lb_bulk_connect(const char *host, uint16_t port, const struct lb_bulk_keys *k, uint32_t index,
                    unsigned timeout_ms, int cancel_fd, struct lb_bulk **out,
                    struct lb_error *err)
{
    uint64_t deadline_ns = lb_deadline(timeout_ms);
    struct lb_preamble p = {.kind = 'D'};
    uint8_t bytes[LB_PREAMBLE_BYTES];
    struct iovec iov = {.iov_base = bytes, .iov_len = sizeof(bytes)};
    struct lb_transport *t;

    memcpy(p.session_id, k->session_id, sizeof(p.session_id));
    lb_preamble_write(bytes, &p);
    if (lb_tcp_connect(host, port, timeout_ms, cancel_fd, &t, err) < 0)
        return -1;
    lb_tcp_set_cancel_fd(t, cancel_fd);
    if (t->ops->writev(t, &iov, 1, deadline_ns, err) < 0) {
        t->ops->close(t);
        return -1;
    }
    if (open_any(t, true, false, k, index, deadline_ns, out, err) < 0)
        return -1;
    lb_tcp_set_cancel_fd(t, -1);
    count(&(*out)->wire_bytes, sizeof(bytes));
    return 0;
}

void lb_bulk_abort(struct lb_bulk *b)
{
    b->t->ops->abort(b->t);
}

static void wipe_free(void *p, size_t len)
{
    if (p)
        sodium_memzero(p, len); /* guest memory */
    free(p);
}

void lb_bulk_close(struct lb_bulk *b)
{
    if (!b)
        return;
    b->t->ops->close(b->t);
    lb_aead_wipe(&b->tx);
    lb_aead_wipe(&b->rx);
    lb_zstd_free(b->tx_zstd);
    lb_zstd_free(b->rx_zstd);
    wipe_free(b->sbuf, SBUF_BYTES);
    wipe_free(b->rbuf, RBUF_BYTES);
    wipe_free(b->tx_bounce, LB_REC_MAX_PAYLOAD);
    wipe_free(b->rx_bounce, LB_REC_MAX_PAYLOAD);
    wipe_free(b->rx_plain, LB_REC_MAX_PAYLOAD);
    free(b->block_pages);
    free(b->runs);
    free(b);
}

void lb_bulk_get_stats(const struct lb_bulk *b, struct lb_bulk_stats *out)
{
#define LOAD(field) atomic_load_explicit(&b->field, memory_order_relaxed)
    *out = (struct lb_bulk_stats){
        .wire_bytes = LOAD(wire_bytes),
        .raw_pages = LOAD(raw_pages),
        .zstd_pages = LOAD(zstd_pages),
        .zstd_in_bytes = LOAD(zstd_in_bytes),
        .zstd_out_bytes = LOAD(zstd_out_bytes),
        .zstd_ns = LOAD(zstd_ns),
        .zero_pages = LOAD(zero_pages),
        .direct_pages = LOAD(direct_pages),
        .blocked_ns = LOAD(t->blocked_ns),
        .copied_bytes = LOAD(copied_bytes) + LOAD(t->copied_bytes),
    };
#undef LOAD
}

struct lb_transport *lb_bulk_transport(const struct lb_bulk *b)
{
    return b->t;
}

/* ------------------------------------------------------------------ sending */

static int flush(struct lb_bulk *b, struct lb_error *err)
{
    if (b->s_len == 0)
        return 0;
    size_t len = b->s_len;
    b->s_len = 0;
    return put(b, b->sbuf, len, 0, err);
}

static int room(struct lb_bulk *b, size_t len, struct lb_error *err)
{
    return SBUF_BYTES - b->s_len < len ? flush(b, err) : 0;
}

/* One sealed piece: the bytes of iov, then the tag. All iov but the last have
 * lengths that are multiples of LB_KEYSTREAM_ALIGN. */
static int put_sealed(struct lb_bulk *b, const struct iovec *iov, unsigned n, struct lb_error *err)
{
    if (lb_aead_begin(&b->tx, err) < 0)
        return -1;
    for (unsigned i = 0; i < n; i++) {
        const uint8_t *p = iov[i].iov_base;
        size_t left = iov[i].iov_len;
        while (left > 0) {
            if (room(b, LB_MIN(left, (size_t)LB_KEYSTREAM_ALIGN), err) < 0)
                return -1;
            size_t take = SBUF_BYTES - b->s_len;
            take = take >= left ? left : take & ~(size_t)(LB_KEYSTREAM_ALIGN - 1);
            if (lb_aead_update(&b->tx, p, take, b->sbuf + b->s_len, err) < 0)
                return -1;
            count(&b->copied_bytes, take);
            b->s_len += take;
            p += take;
            left -= take;
        }
    }
    if (room(b, LB_TAG_BYTES, err) < 0 || lb_aead_finish(&b->tx, b->sbuf + b->s_len, err) < 0)
        return -1;
    b->s_len += LB_TAG_BYTES;
    return 0;
}

static int put_head(struct lb_bulk *b, const struct lb_rec_header *h,
                    const struct lb_page_run *runs, struct lb_error *err)
{
    uint8_t bytes[LB_REC_HEADER_BYTES], table[LB_REC_MAX_RUNS * LB_REC_RUN_BYTES];
    struct iovec iov = {.iov_base = bytes, .iov_len = sizeof(bytes)};

    assert(h->n_runs <= LB_REC_MAX_RUNS);
    lb_rec_write_header(bytes, h);
    if (put_sealed(b, &iov, 1, err) < 0)
        return -1;
    if (h->n_runs == 0)
        return 0;
    for (uint32_t i = 0; i < h->n_runs; i++) {
        lb_put32(table + i * LB_REC_RUN_BYTES, runs[i].first);
        lb_put32(table + i * LB_REC_RUN_BYTES + 4, runs[i].count);
    }
    iov = (struct iovec){.iov_base = table, .iov_len = h->n_runs * LB_REC_RUN_BYTES};
    return put_sealed(b, &iov, 1, err);
}

/* The end of every public send: a failure is final. */
static int sent(struct lb_bulk *b, int rc)
{
    if (rc < 0)
        b->tx_broken = true;
    return rc;
}

static int check_tx(const struct lb_bulk *b, struct lb_error *err)
{
    if (b->tx_broken)
        return lb_fail(err, LB_E_NET, "this bulk connection has failed before");
    return 0;
}

/* Copy the pages once (they may change) and compress the copy. *payload is what to send. */
static int compress(struct lb_bulk *b, const struct iovec *iov, unsigned n, int level,
                    struct lb_rec_header *h, struct iovec *payload, struct lb_error *err)
{
    const uint8_t *frame;
    size_t len = 0;

    if (!b->tx_zstd) {
        if (!(b->tx_bounce = lb_try_alloc(LB_REC_MAX_PAYLOAD, err)))
            return -1;
        b->tx_zstd = lb_zstd_new();
    }
    uint64_t start_ns = lb_now_ns();
    for (unsigned i = 0; i < n; i++) {
        memcpy(b->tx_bounce + len, iov[i].iov_base, iov[i].iov_len);
        len += iov[i].iov_len;
    }
    size_t packed = lb_zstd_compress(b->tx_zstd, b->tx_bounce, len, level, &frame);
    count(&b->zstd_ns, lb_now_ns() - start_ns);
    count(&b->zstd_in_bytes, len);
    count(&b->zstd_out_bytes, packed ? packed : len);
    if (packed) {
        h->codec = LB_CODEC_ZSTD;
        h->payload_bytes = (uint32_t)packed;
        *payload = (struct iovec){.iov_base = (void *)(uintptr_t)frame, .iov_len = packed};
    } else {
        *payload = (struct iovec){.iov_base = b->tx_bounce, .iov_len = len};
    }
    return 0;
}

int lb_bulk_send_pages(struct lb_bulk *b, uint32_t round, uint32_t block_id,
                       const struct lb_page_run *runs, const struct iovec *iov, unsigned n_runs,
                       int zstd_level, struct lb_error *err)
{
    struct lb_rec_header h = {.type = LB_REC_PAGES, .round = round, .block_id = block_id,
                              .n_runs = n_runs};
    struct iovec packed;

    if (check_tx(b, err) < 0)
        return -1;
    assert(n_runs > 0 && n_runs <= LB_REC_MAX_PAGES);
    for (unsigned i = 0; i < n_runs; i++) {
        assert(iov[i].iov_len == (size_t)runs[i].count * LB_WIRE_PAGE_BYTES);
        h.n_pages += runs[i].count;
    }
    assert(h.n_pages <= LB_REC_MAX_PAGES);
    h.payload_bytes = h.n_pages * LB_WIRE_PAGE_BYTES;
    unsigned n_iov = n_runs;
    if (zstd_level != 0) {
        if (compress(b, iov, n_runs, zstd_level, &h, &packed, err) < 0)
            return sent(b, -1);
        iov = &packed;
        n_iov = 1;
    }
    if (put_head(b, &h, runs, err) < 0 || put_sealed(b, iov, n_iov, err) < 0)
        return sent(b, -1);
    count(h.codec == LB_CODEC_ZSTD ? &b->zstd_pages : &b->raw_pages, h.n_pages);
    return 0;
}

int lb_bulk_send_zero(struct lb_bulk *b, uint32_t round, uint32_t block_id,
                      const struct lb_page_run *runs, unsigned n_runs, struct lb_error *err)
{
    if (check_tx(b, err) < 0)
        return -1;
    while (n_runs > 0) {
        struct lb_rec_header h = {.type = LB_REC_ZERO, .round = round, .block_id = block_id,
                                  .n_runs = LB_MIN(n_runs, LB_REC_MAX_RUNS)};
        for (unsigned i = 0; i < h.n_runs; i++)
            h.n_pages += runs[i].count;
        if (put_head(b, &h, runs, err) < 0)
            return sent(b, -1);
        count(&b->zero_pages, h.n_pages);
        runs += h.n_runs;
        n_runs -= h.n_runs;
    }
    return 0;
}

int lb_bulk_send_mark(struct lb_bulk *b, enum lb_rec_type type, uint32_t round, const void *data,
                      size_t len, struct lb_error *err)
{
    struct lb_rec_header h = {.type = (uint16_t)type, .round = round,
                              .payload_bytes = (uint32_t)len};
    struct iovec iov = {.iov_base = (void *)(uintptr_t)data, .iov_len = len};

    if (check_tx(b, err) < 0)
        return -1;
    assert(type == LB_REC_STATE ? len > 0 && len <= LB_REC_MAX_PAYLOAD && b->index == 0
                                : len == 0 && (type == LB_REC_ROUND_END || type == LB_REC_END));
    if (put_head(b, &h, NULL, err) < 0 || (len > 0 && put_sealed(b, &iov, 1, err) < 0))
        return sent(b, -1);
    return sent(b, flush(b, err)); /* the other side waits for marks */
}

void lb_bulk_set_checkpoint(struct lb_bulk *b)
{
    b->limits.checkpoint = true;
}

uint64_t lb_bulk_checksum(uint64_t sum, const void *pages, size_t n_pages)
{
    const uint8_t *p = pages;
    for (size_t i = 0; i < n_pages; i++, p += LB_WIRE_PAGE_BYTES)
        sum = (sum << 1 | sum >> 63) ^ XXH3_64bits(p, LB_WIRE_PAGE_BYTES);
    return sum;
}

/* zstd of len bytes at in, which nobody changes. Bytes in *frame, 0: not worth it. */
static size_t pack(struct lb_bulk *b, const void *in, size_t len, int level, const uint8_t **frame)
{
    if (!b->tx_zstd)
        b->tx_zstd = lb_zstd_new();
    uint64_t start_ns = lb_now_ns();
    size_t packed = lb_zstd_pack(b->tx_zstd, in, len, level, frame);
    count(&b->zstd_ns, lb_now_ns() - start_ns);
    count(&b->zstd_in_bytes, len);
    count(&b->zstd_out_bytes, packed ? packed : len);
    return packed;
}

int lb_bulk_send_delta(struct lb_bulk *b, uint32_t round, uint32_t block_id,
                       const struct lb_page_run *runs, unsigned n_runs, const void *xored,
                       uint64_t checksum, int zstd_level, struct lb_error *err)
{
    struct lb_rec_header h = {.type = LB_REC_DELTA, .codec = LB_CODEC_ZSTD, .round = round,
                              .block_id = block_id, .n_runs = n_runs};
    uint8_t head[LB_KEYSTREAM_ALIGN], sum[LB_REC_CHECKSUM_BYTES];
    const uint8_t *frame = NULL;

    if (check_tx(b, err) < 0)
        return -1;
    assert(b->limits.checkpoint && n_runs > 0 && n_runs <= LB_REC_MAX_PAGES);
    for (unsigned i = 0; i < n_runs; i++)
        h.n_pages += runs[i].count;
    assert(h.n_pages <= LB_REC_MAX_PAGES);
    size_t packed = pack(b, xored, (size_t)h.n_pages * LB_WIRE_PAGE_BYTES, zstd_level, &frame);
    if (packed == 0)
        return 0;
    h.payload_bytes = (uint32_t)(LB_REC_CHECKSUM_BYTES + packed);
    lb_put64(sum, checksum);
    /* a piece of several parts: all but the last are whole blocks of the key stream */
    size_t n_head = LB_MIN(packed, sizeof(head) - sizeof(sum));
    memcpy(head, sum, sizeof(sum));
    memcpy(head + sizeof(sum), frame, n_head);
    struct iovec iov[] = {{head, sizeof(sum) + n_head},
                          {(void *)(uintptr_t)(frame + n_head), packed - n_head}};
    if (put_head(b, &h, runs, err) < 0 || put_sealed(b, iov, packed > n_head ? 2 : 1, err) < 0)
        return sent(b, -1);
    return 1;
}

int lb_bulk_send_data(struct lb_bulk *b, enum lb_rec_type type, uint32_t round, uint32_t block_id,
                      const struct iovec *iov, unsigned n_iov, int zstd_level,
                      struct lb_error *err)
{
    struct lb_rec_header h = {.type = (uint16_t)type, .round = round, .block_id = block_id};
    const uint8_t *frame = NULL;
    size_t len = 0, packed = 0;

    if (check_tx(b, err) < 0)
        return -1;
    if (!b->tx_bounce && !(b->tx_bounce = lb_try_alloc(LB_REC_MAX_PAYLOAD, err)))
        return sent(b, -1);
    for (unsigned i = 0; i < n_iov; i++) { /* together, so that the parts may have any length */
        assert(iov[i].iov_len <= LB_REC_MAX_PAYLOAD - len);
        memcpy(b->tx_bounce + len, iov[i].iov_base, iov[i].iov_len);
        len += iov[i].iov_len;
    }
    assert(b->limits.checkpoint && len > 0);
    if (zstd_level != 0)
        packed = pack(b, b->tx_bounce, len, zstd_level, &frame);
    struct iovec payload = {b->tx_bounce, len};
    if (packed > 0)
        payload = (struct iovec){(void *)(uintptr_t)frame, packed};
    h.codec = packed > 0 ? LB_CODEC_ZSTD : LB_CODEC_RAW;
    h.payload_bytes = (uint32_t)payload.iov_len;
    if (put_head(b, &h, NULL, err) < 0 || put_sealed(b, &payload, 1, err) < 0)
        return sent(b, -1);
    return packed > 0;
}

int lb_bulk_send_state_xor(struct lb_bulk *b, uint32_t round, const void *xored, size_t len,
                           int zstd_level, struct lb_error *err)
{
    struct lb_rec_header h = {.type = LB_REC_STATE, .codec = LB_CODEC_XOR_ZSTD, .round = round};
    const uint8_t *frame = NULL;

    if (check_tx(b, err) < 0)
        return -1;
    assert(b->limits.checkpoint);
    size_t packed = pack(b, xored, len, zstd_level, &frame);
    if (packed == 0)
        return 0;
    struct iovec payload = {(void *)(uintptr_t)frame, packed};
    h.payload_bytes = (uint32_t)packed;
    if (put_head(b, &h, NULL, err) < 0 || put_sealed(b, &payload, 1, err) < 0)
        return sent(b, -1);
    return 1;
}

int lb_bulk_send_direct(struct lb_bulk *b, enum lb_rec_type type, uint32_t round, uint32_t block_id,
                        const struct lb_page_run *runs, unsigned n_runs, const void *payload,
                        size_t len, struct lb_error *err)
{
    struct lb_rec_header h = {.type = (uint16_t)type, .round = round, .block_id = block_id,
                              .n_runs = n_runs, .payload_bytes = (uint32_t)len};
    struct iovec iov = {(void *)(uintptr_t)payload, len};

    if (check_tx(b, err) < 0)
        return -1;
    assert(b->limits.direct != LB_DIRECT_NONE && len <= LB_REC_MAX_DIRECT_BYTES);
    for (unsigned i = 0; i < n_runs; i++)
        h.n_pages += runs[i].count;
    if (put_head(b, &h, runs, err) < 0 || put_sealed(b, &iov, 1, err) < 0 ||
        (type != LB_REC_WRITTEN && flush(b, err) < 0))
        return sent(b, -1);
    return 0;
}

void lb_bulk_count_direct(struct lb_bulk *b, uint64_t pages, uint64_t copied_bytes)
{
    count(&b->direct_pages, pages);
    count(&b->wire_bytes, pages * LB_WIRE_PAGE_BYTES);
    count(&b->copied_bytes, copied_bytes);
}

int lb_bulk_flush(struct lb_bulk *b, struct lb_error *err)
{
    return check_tx(b, err) < 0 ? -1 : sent(b, flush(b, err));
}

/* ---------------------------------------------------------------- receiving */

int lb_bulk_set_blocks(struct lb_bulk *b, const uint64_t *n_pages_of_block, unsigned n_blocks,
                       struct lb_error *err)
{
    if (n_blocks > MAX_BLOCKS)
        return lb_fail(err, LB_E_UNSUPPORTED, "%u memory blocks", n_blocks);
    for (unsigned i = 0; i < n_blocks; i++)
        if (n_pages_of_block[i] > UINT32_MAX)
            return lb_fail(err, LB_E_UNSUPPORTED, "memory block %u is larger than 16 TiB", i);
    uint64_t *copy = lb_alloc((n_blocks ? n_blocks : 1) * sizeof(*copy));
    if (n_blocks > 0)
        memcpy(copy, n_pages_of_block, n_blocks * sizeof(*copy));
    free(b->block_pages);
    b->block_pages = copy;
    b->limits.n_pages_of_block = copy;
    b->limits.n_blocks = n_blocks;
    return 0;
}

void lb_bulk_set_direct(struct lb_bulk *b, enum lb_direct_side side)
{
    b->limits.direct = side;
}

/* At least len bytes at rbuf + r_pos. */
static int need(struct lb_bulk *b, size_t len, uint64_t deadline_ns, struct lb_error *err)
{
    if (b->r_end - b->r_pos >= len)
        return 0;
    if (b->r_pos > 0) { /* short: what is left is less than len */
        memmove(b->rbuf, b->rbuf + b->r_pos, b->r_end - b->r_pos);
        b->r_end -= b->r_pos;
        b->r_pos = 0;
    }
    while (b->r_end < len) {
        ssize_t n = b->t->ops->read_some(b->t, b->rbuf + b->r_end, RBUF_BYTES - b->r_end,
                                         deadline_ns, err);
        if (n < 0)
            return -1;
        if (n == 0) {
            lb_fail(err, LB_E_NET, "the peer closed a bulk connection before its end");
            return lb_remedy(err, "see the log of the peer for the reason");
        }
        b->r_end += (size_t)n;
    }
    return 0;
}

/* A whole small piece of len bytes and its tag, opened in place. */
static int get_sealed(struct lb_bulk *b, size_t len, uint64_t deadline_ns, uint8_t **out,
                      struct lb_error *err)
{
    if (need(b, len + LB_TAG_BYTES, deadline_ns, err) < 0)
        return -1;
    uint8_t *p = b->rbuf + b->r_pos;
    if (lb_aead_begin(&b->rx, err) < 0 || lb_aead_update(&b->rx, p, len, p, err) < 0 ||
        lb_aead_finish(&b->rx, p + len, err) < 0) {
        b->rx_broken = true;
        return -1;
    }
    b->r_pos += len + LB_TAG_BYTES;
    *out = p;
    return 0;
}

void lb_bulk_set_payload_deadline(struct lb_bulk *b, uint64_t deadline_ns)
{
    b->rx_until_ns = deadline_ns;
}

static int need_payload(struct lb_bulk *b, size_t len, struct lb_error *err)
{
    return need(b, len, b->rx_until_ns ? b->rx_until_ns : lb_now_ns() + STALL_LIMIT_NS, err);
}

/* Payload of the present record into iov (together exactly hdr.payload_bytes). Goes on where a
 * deadline has stopped it. */
static int get_payload(struct lb_bulk *b, const struct iovec *iov, unsigned n, struct lb_error *err)
{
    if (!b->rx_open && lb_aead_begin(&b->rx, err) < 0)
        return -1;
    if (!b->rx_open)
        b->rx_done = 0;
    b->rx_open = true;
    size_t skip = b->rx_done;
    for (unsigned i = 0; i < n; i++) {
        size_t have = LB_MIN(skip, iov[i].iov_len), left = iov[i].iov_len - have;
        uint8_t *dst = (uint8_t *)iov[i].iov_base + have;
        skip -= have;
        while (left > 0) {
            if (need_payload(b, LB_MIN(left, (size_t)LB_KEYSTREAM_ALIGN), err) < 0)
                return -1;
            size_t take = b->r_end - b->r_pos;
            take = take >= left ? left : take & ~(size_t)(LB_KEYSTREAM_ALIGN - 1);
            if (lb_aead_update(&b->rx, b->rbuf + b->r_pos, take, dst, err) < 0)
                return -1;
            count(&b->copied_bytes, take);
            b->r_pos += take;
            b->rx_done += take;
            dst += take;
            left -= take;
        }
    }
    if (need_payload(b, LB_TAG_BYTES, err) < 0)
        return -1;
    b->r_pos += LB_TAG_BYTES;
    b->rx_open = false;
    return lb_aead_finish(&b->rx, b->rbuf + b->r_pos - LB_TAG_BYTES, err);
}

/* The end of taking a payload: next comes a header, or the rest of it when only a deadline has
 * passed, or nothing any more. */
static int taken(struct lb_bulk *b, int rc, const struct lb_error *err)
{
    if (rc < 0 && b->rx_open && b->rx_until_ns && err && lb_is_timeout(err))
        return rc;
    if (rc < 0)
        b->rx_broken = true;
    else
        b->rx_state = RX_HEADER;
    return rc;
}

static uint8_t *bounce(uint8_t **p, struct lb_error *err)
{
    if (!*p)
        *p = lb_try_alloc(LB_REC_MAX_PAYLOAD, err);
    return *p;
}

/* An optional record that this version does not know: authenticated, then dropped. */
static int skip_payload(struct lb_bulk *b, struct lb_error *err)
{
    struct iovec iov = {.iov_base = bounce(&b->rx_bounce, err), .iov_len = b->hdr.payload_bytes};
    return taken(b, iov.iov_base ? get_payload(b, &iov, 1, err) : -1, err);
}

static int recv_header(struct lb_bulk *b, uint64_t deadline_ns, struct lb_error *err)
{
    uint8_t *p;

    if (get_sealed(b, LB_REC_HEADER_BYTES, deadline_ns, &p, err) < 0)
        return -1;
    if (lb_rec_parse_header(p, &b->limits, &b->hdr, err) < 0) {
        b->rx_broken = true;
        return -1;
    }
    b->rx_state = RX_RUNS;
    return 0;
}

static int recv_runs(struct lb_bulk *b, uint64_t deadline_ns, struct lb_error *err)
{
    uint8_t *p;

    if (b->hdr.n_runs > 0) {
        if (get_sealed(b, b->hdr.n_runs * LB_REC_RUN_BYTES, deadline_ns, &p, err) < 0)
            return -1;
        if (!b->hdr.skip && lb_rec_parse_runs(p, &b->limits, &b->hdr, b->runs, err) < 0) {
            b->rx_broken = true;
            return -1;
        }
    }
    b->rx_state = b->hdr.payload_bytes ? RX_PAYLOAD : RX_HEADER;
    if (b->hdr.type == LB_REC_END)
        b->rx_state = RX_END;
    return 0;
}

int lb_bulk_recv(struct lb_bulk *b, struct lb_record *rec, uint64_t deadline_ns,
                 struct lb_error *err)
{
    if (b->rx_broken)
        return lb_fail(err, LB_E_NET, "this bulk connection has failed before");
    /* the caller must take a payload first */
    assert(b->rx_state != RX_PAYLOAD || b->hdr.skip);
    if (b->rx_state == RX_END)
        return lb_fail(err, LB_E_STATE, "the bulk connection has ended");
    for (;;) {
        if (b->rx_state == RX_PAYLOAD && skip_payload(b, err) < 0)
            return -1;
        if (b->rx_state == RX_HEADER && recv_header(b, deadline_ns, err) < 0)
            return -1;
        if (recv_runs(b, deadline_ns, err) < 0)
            return -1;
        if (!b->hdr.skip)
            break;
    }
    *rec = (struct lb_record){
        .type = (enum lb_rec_type)b->hdr.type,
        .codec = (enum lb_codec)b->hdr.codec,
        .round = b->hdr.round,
        .block_id = b->hdr.block_id,
        .n_runs = b->hdr.n_runs,
        .n_pages = b->hdr.n_pages,
        .payload_bytes = b->hdr.payload_bytes,
        .runs = b->runs,
    };
    return 0;
}

static int recv_zstd(struct lb_bulk *b, const struct lb_record *rec, const struct iovec *dst,
                     struct lb_error *err)
{
    struct iovec frame = {.iov_base = bounce(&b->rx_bounce, err), .iov_len = rec->payload_bytes};
    size_t raw_bytes = (size_t)rec->n_pages * LB_WIRE_PAGE_BYTES, at = 0;

    if (!b->rx_zstd)
        b->rx_zstd = lb_zstd_new();
    if (!frame.iov_base || get_payload(b, &frame, 1, err) < 0)
        return -1;
    if (rec->n_runs == 1)
        return lb_zstd_decompress(b->rx_zstd, frame.iov_base, frame.iov_len, dst[0].iov_base,
                                  raw_bytes, err);
    uint8_t *plain = bounce(&b->rx_plain, err);
    if (!plain || lb_zstd_decompress(b->rx_zstd, frame.iov_base, frame.iov_len, plain, raw_bytes,
                                     err) < 0)
        return -1;
    for (uint32_t i = 0; i < rec->n_runs; i++) {
        memcpy(dst[i].iov_base, plain + at, dst[i].iov_len);
        at += dst[i].iov_len;
    }
    return 0;
}

int lb_bulk_recv_pages(struct lb_bulk *b, const struct lb_record *rec, const struct iovec *dst,
                       struct lb_error *err)
{
    assert(b->rx_state == RX_PAYLOAD && b->hdr.type == LB_REC_PAGES && !b->rx_broken);
    for (uint32_t i = 0; i < rec->n_runs; i++)
        assert(dst[i].iov_len == (size_t)rec->runs[i].count * LB_WIRE_PAGE_BYTES);
    if (rec->codec == LB_CODEC_ZSTD)
        return taken(b, recv_zstd(b, rec, dst, err), err);
    return taken(b, get_payload(b, dst, rec->n_runs, err), err);
}

int lb_bulk_recv_data(struct lb_bulk *b, const struct lb_record *rec, void *buf,
                      struct lb_error *err)
{
    struct iovec iov = {.iov_base = buf, .iov_len = rec->payload_bytes};
    assert(b->rx_state == RX_PAYLOAD && b->hdr.type == LB_REC_STATE && !b->rx_broken);
    assert(!b->limits.checkpoint); /* there it may be compressed */
    return taken(b, get_payload(b, &iov, 1, err), err);
}

int lb_bulk_recv_direct(struct lb_bulk *b, const struct lb_record *rec, void *payload,
                        struct lb_error *err)
{
    struct iovec iov = {.iov_base = payload, .iov_len = rec->payload_bytes};
    assert(b->rx_state == RX_PAYLOAD && b->hdr.type >= LB_REC_WRITTEN && !b->rx_broken);
    return taken(b, get_payload(b, &iov, 1, err), err);
}

/* The payload, as it is, into b's own buffer. */
static const uint8_t *get_own(struct lb_bulk *b, const struct lb_record *rec, struct lb_error *err)
{
    struct iovec iov = {.iov_base = bounce(&b->rx_bounce, err), .iov_len = rec->payload_bytes};
    return iov.iov_base && get_payload(b, &iov, 1, err) == 0 ? iov.iov_base : NULL;
}

int lb_bulk_recv_delta(struct lb_bulk *b, const struct lb_record *rec, void *xored,
                       uint64_t *checksum, struct lb_error *err)
{
    assert(b->rx_state == RX_PAYLOAD && b->hdr.type == LB_REC_DELTA && !b->rx_broken);
    if (!b->rx_zstd)
        b->rx_zstd = lb_zstd_new();
    const uint8_t *p = get_own(b, rec, err);
    if (!p)
        return taken(b, -1, err);
    *checksum = lb_get64(p);
    return taken(b, lb_zstd_decompress(b->rx_zstd, p + LB_REC_CHECKSUM_BYTES,
                                       rec->payload_bytes - LB_REC_CHECKSUM_BYTES, xored,
                                       (size_t)rec->n_pages * LB_WIRE_PAGE_BYTES, err), err);
}

int lb_bulk_recv_blob(struct lb_bulk *b, const struct lb_record *rec, const void **data,
                      size_t *len, struct lb_error *err)
{
    assert(b->rx_state == RX_PAYLOAD && b->limits.checkpoint && rec->n_runs == 0 && !b->rx_broken);
    const uint8_t *p = get_own(b, rec, err);
    if (!p)
        return taken(b, -1, err);
    *data = p;
    *len = rec->payload_bytes;
    if (rec->codec == LB_CODEC_RAW)
        return taken(b, 0, err);
    if (!b->rx_zstd)
        b->rx_zstd = lb_zstd_new();
    void *plain = bounce(&b->rx_plain, err);
    if (!plain ||
        lb_zstd_content_bytes(p, rec->payload_bytes, LB_REC_MAX_PAYLOAD, len, err) < 0 ||
        lb_zstd_decompress(b->rx_zstd, p, rec->payload_bytes, plain, *len, err) < 0)
        return taken(b, -1, err);
    *data = plain;
    return taken(b, 0, err);
}
