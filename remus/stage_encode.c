/* remus/stage_encode.c - a captured epoch becomes records (stage.h, STREAM.md).
 *
 * Pages are looked at in the order of their addresses and gathered in three lists of one record
 * each (zero, difference, plain), a list is sent when it is full or the block ends. A page is in one of
 * them at most once, so their order does not matter.
 *
 * Compression is tried less and less often while it gains nothing (struct thrift). */
#include "remus/delta.h"
#include "remus/stage_internal.h"

#include <assert.h>
#include <errno.h>
#include <stdatomic.h>

enum {
    ZSTD_LEVEL = 1,
    MAX_SKIP = 63,      /* records sent raw between two attempts */
    RECORD_OPS = 512,   /* disk operations in one record */
};

struct thrift {
    unsigned left, step; /* records not to be tried; the next time it fails */
};

/* Pages of one record. data[i] holds runs[i].count pages. */
struct list {
    struct lb_page_run runs[LB_REC_MAX_PAGES];
    struct iovec data[LB_REC_MAX_PAGES];
    unsigned n_runs, n_pages;
};

/* Operations of one disk for one record. */
struct op_list {
    uint8_t heads[RECORD_OPS][LB_STAGE_OP_BYTES];
    struct iovec iov[2 * RECORD_OPS];
    unsigned n, n_iov;
    size_t bytes;
    uint32_t disk;
};

struct lb_encoder {
    /* sending thread only */
    struct lb_delta *cache;
    unsigned n_blocks;
    uint64_t number;          /* of the last epoch */
    struct list zero, delta, plain;
    struct op_list ops;
    uint8_t *xored;           /* of delta, LB_REC_MAX_PAYLOAD; one more page */
    uint8_t *state, *state_xored;
    size_t state_len, state_cap;
    struct thrift of_pages, of_disk, of_frames;

    /* any thread, relaxed; written by the sending thread */
    _Atomic uint64_t raw_bytes, wire_bytes, delta_pages, zero_pages, zstd_pages, raw_pages,
        same_pages, cache_bytes;
};

static void count(_Atomic uint64_t *c, uint64_t n)
{
    atomic_fetch_add_explicit(c, n, memory_order_relaxed);
}

static int level_of(struct thrift *t)
{
    if (t->left == 0)
        return ZSTD_LEVEL;
    t->left--;
    return 0;
}

static void learn(struct thrift *t, int level, bool compressed)
{
    if (level == 0)
        return;
    t->step = compressed ? 0 : LB_MIN(t->step * 2 + 1, (unsigned)MAX_SKIP);
    t->left = t->step;
}

int lb_encoder_new(const struct lb_ram_block *blocks, unsigned n_blocks, uint64_t cache_bytes,
                   struct lb_encoder **out, struct lb_error *err)
{
    struct lb_encoder *enc = lb_alloc(sizeof(*enc));
    LB_AUTO_FREE uint64_t *pages = lb_alloc((n_blocks ? n_blocks : 1) * sizeof(*pages));

    for (unsigned i = 0; i < n_blocks; i++)
        pages[i] = blocks[i].size_bytes / LB_PAGE_SIZE;
    enc->n_blocks = n_blocks;
    enc->xored = aligned_alloc(LB_PAGE_SIZE, LB_REC_MAX_PAYLOAD + LB_PAGE_SIZE);
    if (!enc->xored) {
        lb_fail_errno(err, LB_E_NO_SPACE, errno, "no memory to encode epochs");
        goto fail;
    }
    if (lb_delta_new(pages, n_blocks, cache_bytes, &enc->cache, err) < 0)
        goto fail;
    *out = enc;
    return 0;
fail:
    lb_encoder_free(enc);
    return -1;
}

void lb_encoder_free(struct lb_encoder *enc)
{
    if (!enc)
        return;
    lb_delta_free(enc->cache);
    free(enc->xored);
    free(enc->state);
    free(enc->state_xored);
    free(enc);
}

/* ------------------------------------------------------------------------ memory */

struct sending {
    struct lb_bulk *bulk;
    const struct lb_epoch *e;
    uint32_t round;
};

static void add(struct list *l, uint32_t page, const uint8_t *data)
{
    struct lb_page_run *last = l->n_runs ? &l->runs[l->n_runs - 1] : NULL;
    if (last && last->first + last->count == page) {
        last->count++; /* the next page of memory is the next of the epoch */
        l->data[l->n_runs - 1].iov_len += LB_PAGE_SIZE;
    } else {
        l->runs[l->n_runs] = (struct lb_page_run){page, 1};
        l->data[l->n_runs++] = (struct iovec){(void *)(uintptr_t)data, LB_PAGE_SIZE};
    }
    l->n_pages++;
}

static int send_plain(struct lb_encoder *enc, struct sending *s, uint32_t block, struct list *l,
                      struct lb_error *err)
{
    struct lb_bulk_stats before, after;
    int level = level_of(&enc->of_pages);

    lb_bulk_get_stats(s->bulk, &before);
    if (lb_bulk_send_pages(s->bulk, s->round, block, l->runs, l->data, l->n_runs, level, err) < 0)
        return -1;
    lb_bulk_get_stats(s->bulk, &after);
    bool packed = after.zstd_pages > before.zstd_pages;
    learn(&enc->of_pages, level, packed);
    count(packed ? &enc->zstd_pages : &enc->raw_pages, l->n_pages);
    return 0;
}

static int send_delta(struct lb_encoder *enc, struct sending *s, uint32_t block, struct list *l,
                      struct lb_error *err)
{
    uint64_t sum = 0;

    for (unsigned i = 0; i < l->n_runs; i++)
        sum = lb_bulk_checksum(sum, l->data[i].iov_base, l->runs[i].count);
    int rc = lb_bulk_send_delta(s->bulk, s->round, block, l->runs, l->n_runs, enc->xored, sum,
                                ZSTD_LEVEL, err);
    if (rc == 0)
        return send_plain(enc, s, block, l, err);
    count(&enc->delta_pages, l->n_pages);
    return rc < 0 ? -1 : 0;
}

static int send_zero(struct lb_encoder *enc, struct sending *s, uint32_t block, struct list *l,
                     struct lb_error *err)
{
    count(&enc->zero_pages, l->n_pages);
    return lb_bulk_send_zero(s->bulk, s->round, block, l->runs, l->n_runs, err);
}

static int flush_list(struct lb_encoder *enc, struct sending *s, uint32_t block, struct list *l,
                      struct lb_error *err)
{
    if (l->n_pages == 0)
        return 0;
    int rc = l == &enc->delta  ? send_delta(enc, s, block, l, err)
             : l == &enc->zero ? send_zero(enc, s, block, l, err)
                               : send_plain(enc, s, block, l, err);
    l->n_runs = l->n_pages = 0;
    return rc;
}

static int flush_lists(struct lb_encoder *enc, struct sending *s, uint32_t block,
                       struct lb_error *err)
{
    return flush_list(enc, s, block, &enc->zero, err) < 0 ||
                   flush_list(enc, s, block, &enc->delta, err) < 0 ||
                   flush_list(enc, s, block, &enc->plain, err) < 0
               ? -1 : 0;
}

static int encode_page(struct lb_encoder *enc, struct sending *s, uint64_t i, struct lb_error *err)
{
    const struct lb_epoch_page *p = &s->e->pages[i];
    const uint8_t *now = s->e->data + i * LB_PAGE_SIZE;
    bool zero = lb_is_zero(now, LB_PAGE_SIZE);
    struct list *l = &enc->plain;

    switch (lb_delta_update(enc->cache, p->block, p->page, now, zero,
                            enc->xored + (size_t)enc->delta.n_pages * LB_PAGE_SIZE)) {
    case LB_DELTA_SAME:
        count(&enc->same_pages, 1);
        return 0;
    case LB_DELTA_SPARSE:
        l = &enc->delta;
        break;
    case LB_DELTA_NEW:
    case LB_DELTA_DENSE:
        break;
    }
    if (zero)
        l = &enc->zero;
    add(l, p->page, now);
    return l->n_pages == LB_REC_MAX_PAGES ? flush_list(enc, s, p->block, l, err) : 0;
}

static int send_memory(struct lb_encoder *enc, struct sending *s, struct lb_error *err)
{
    const struct lb_epoch *e = s->e;

    for (uint64_t i = 0; i < e->n_pages; i++) {
        assert(e->pages[i].block < enc->n_blocks);
        if (i > 0 && e->pages[i].block != e->pages[i - 1].block &&
            flush_lists(enc, s, e->pages[i - 1].block, err) < 0)
            return -1;
        if (encode_page(enc, s, i, err) < 0)
            return -1;
    }
    return e->n_pages ? flush_lists(enc, s, e->pages[e->n_pages - 1].block, err) : 0;
}

/* ------------------------------------------------------------------------- disks */

static int flush_ops(struct lb_encoder *enc, struct lb_bulk *bulk, uint32_t round,
                     struct lb_error *err)
{
    struct op_list *l = &enc->ops;

    if (l->n == 0)
        return 0;
    int level = level_of(&enc->of_disk);
    int rc = lb_bulk_send_data(bulk, LB_REC_DISK, round, l->disk, l->iov, l->n_iov, level, err);
    if (rc >= 0)
        learn(&enc->of_disk, level, rc == 1);
    l->n = l->n_iov = 0;
    l->bytes = 0;
    return rc < 0 ? -1 : 0;
}

/* One that fits a record. */
static int add_op(struct lb_encoder *enc, struct lb_bulk *bulk, uint32_t round,
                  struct lb_disk_op op, struct lb_error *err)
{
    struct op_list *l = &enc->ops;

    if (op.kind == LB_DISK_WRITE && op.len % 64 == 0 && lb_is_zero(op.data, op.len))
        op.kind = LB_DISK_ZERO;
    size_t data = op.kind == LB_DISK_WRITE ? (size_t)op.len : 0;
    if ((op.disk != l->disk || l->n == RECORD_OPS ||
         l->bytes + LB_STAGE_OP_BYTES + data > LB_REC_MAX_PAYLOAD) &&
        flush_ops(enc, bulk, round, err) < 0)
        return -1;
    l->disk = op.disk;
    lb_stage_put_op(l->heads[l->n], &op);
    l->iov[l->n_iov++] = (struct iovec){l->heads[l->n++], LB_STAGE_OP_BYTES};
    if (data > 0)
        l->iov[l->n_iov++] = (struct iovec){(void *)(uintptr_t)op.data, data};
    l->bytes += LB_STAGE_OP_BYTES + data;
    return 0;
}

static int add_ops(struct lb_encoder *enc, struct lb_bulk *bulk, uint32_t round,
                   const struct lb_disk_op *op, struct lb_error *err)
{
    struct lb_disk_op part = *op;
    uint64_t left = op->len;

    if (op->kind == LB_DISK_ZERO)
        return add_op(enc, bulk, round, part, err);
    for (; left > 0; left -= part.len) {
        part.offset = op->offset + (op->len - left);
        part.data = (const uint8_t *)op->data + (op->len - left);
        part.len = LB_MIN(left, (uint64_t)LB_STAGE_OP_MAX_DATA);
        if (add_op(enc, bulk, round, part, err) < 0)
            return -1;
    }
    return 0;
}

static int send_disks(struct lb_encoder *enc, struct sending *s, struct lb_error *err)
{
    for (unsigned i = 0; i < s->e->disk.n; i++)
        if (add_ops(enc, s->bulk, s->round, &s->e->disk.v[i], err) < 0)
            return -1;
    return flush_ops(enc, s->bulk, s->round, err);
}

static uint64_t wire_bytes(struct lb_bulk *bulk)
{
    struct lb_bulk_stats st;
    lb_bulk_get_stats(bulk, &st);
    return st.wire_bytes;
}

int lb_encoder_send_disk(struct lb_encoder *enc, struct lb_bulk *bulk, const struct lb_disk_op *op,
                         struct lb_error *err)
{
    uint64_t before = wire_bytes(bulk);

    assert(enc->number == 0);
    lb_bulk_set_checkpoint(bulk);
    if (add_ops(enc, bulk, 0, op, err) < 0 || flush_ops(enc, bulk, 0, err) < 0)
        return -1;
    count(&enc->raw_bytes, op->kind == LB_DISK_WRITE ? op->len : 0);
    count(&enc->wire_bytes, wire_bytes(bulk) - before);
    return 0;
}

/* ---------------------------------------------------------- device state, frames */

static int send_blob(struct lb_bulk *bulk, enum lb_rec_type type, uint32_t round, const void *data,
                     size_t len, struct thrift *t, struct lb_error *err)
{
    for (size_t at = 0; at < len;) {
        struct iovec iov = {(uint8_t *)(uintptr_t)data + at,
                            LB_MIN(len - at, (size_t)LB_REC_MAX_PAYLOAD)};
        int level = t ? level_of(t) : ZSTD_LEVEL;
        int rc = lb_bulk_send_data(bulk, type, round, 0, &iov, 1, level, err);
        if (rc < 0)
            return -1;
        if (t)
            learn(t, level, rc == 1);
        at += iov.iov_len;
    }
    return 0;
}

/* Remember the state for the next epoch. */
static int keep_state(struct lb_encoder *enc, const uint8_t *now, size_t len, struct lb_error *err)
{
    if (len > enc->state_cap) {
        uint8_t *state = lb_try_alloc(len, err), *xored = state ? lb_try_alloc(len, err) : NULL;
        if (!xored) {
            free(state);
            return -1;
        }
        free(enc->state);
        free(enc->state_xored);
        enc->state = state;
        enc->state_xored = xored;
        enc->state_cap = len;
    }
    memcpy(enc->state, now, len);
    enc->state_len = len;
    return 0;
}

/* Most of it is as it was one epoch ago, at the same place as long as nothing changes its length. */
static int send_state(struct lb_encoder *enc, struct sending *s, struct lb_error *err)
{
    const uint8_t *now = s->e->state;
    size_t len = s->e->state_len, at = 0;

    if (len > LB_EPOCH_MAX_STATE)
        return lb_fail(err, LB_E_UNSUPPORTED, "a device state of %zu bytes", len);
    bool similar = len == enc->state_len;
    if (similar)
        lb_stage_xor(enc->state_xored, now, enc->state, len);
    while (similar && at < len) {
        size_t n = LB_MIN(len - at, (size_t)LB_REC_MAX_PAYLOAD);
        int rc = lb_bulk_send_state_xor(s->bulk, s->round, enc->state_xored + at, n, ZSTD_LEVEL,
                                        err);
        if (rc < 0)
            return -1;
        if (rc == 0)
            break;
        at += n;
    }
    if (send_blob(s->bulk, LB_REC_STATE, s->round, now + at, len - at, NULL, err) < 0)
        return -1;
    return keep_state(enc, now, len, err);
}

static int send_end(struct sending *s, struct lb_error *err)
{
    uint64_t number = htole64(s->e->number);
    struct iovec iov = {&number, sizeof(number)};

    if (lb_bulk_send_data(s->bulk, LB_REC_EPOCH_END, s->round, 0, &iov, 1, 0, err) < 0)
        return -1;
    return lb_bulk_flush(s->bulk, err);
}

int lb_encoder_send(struct lb_encoder *enc, struct lb_bulk *bulk, const struct lb_epoch *e,
                    struct lb_error *err)
{
    struct sending s = {.bulk = bulk, .e = e, .round = (uint32_t)e->number};
    uint64_t before = wire_bytes(bulk);

    assert(e->number == enc->number + 1 && e->state_len > 0);
    enc->number = e->number;
    lb_bulk_set_checkpoint(bulk);
    if (send_disks(enc, &s, err) < 0 ||
        send_blob(bulk, LB_REC_FRAMES, s.round, e->frames, e->frames_len, &enc->of_frames, err) < 0 ||
        send_memory(enc, &s, err) < 0 || send_state(enc, &s, err) < 0 || send_end(&s, err) < 0)
        return -1;
    count(&enc->raw_bytes, e->n_pages * LB_PAGE_SIZE + e->disk.bytes + e->frames_len + e->state_len);
    count(&enc->wire_bytes, wire_bytes(bulk) - before);
    atomic_store_explicit(&enc->cache_bytes, lb_delta_bytes(enc->cache), memory_order_relaxed);
    return 0;
}

void lb_encoder_get_stats(struct lb_encoder *enc, struct lb_encoder_stats *out)
{
#define GET(field) .field = atomic_load_explicit(&enc->field, memory_order_relaxed)
    *out = (struct lb_encoder_stats){
        GET(raw_bytes), GET(wire_bytes), GET(delta_pages), GET(zero_pages),
        GET(zstd_pages), GET(raw_pages), GET(same_pages), GET(cache_bytes),
    };
#undef GET
}
