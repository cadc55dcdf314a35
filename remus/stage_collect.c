/* remus/stage_collect.c - records become an epoch, an epoch becomes the standby (stage.h, STREAM.md).
 *
 * Pages are kept decoded, so that applying is copying and nothing of it can fail for want of
 * understanding. A difference is resolved when it comes, against the standby's memory, which holds the
 * epoch before; its checksum says whether both sides mean the same page.
 *
 *      records --> staged runs, disk payloads, state, frames --EPOCH_END--> complete --apply--> standby
 *                  (the epoch that comes)                                   state, frames stay
 *
 * A page comes at most once in an epoch: what is staged is never more than the guest's memory. */
#include "remus/stage_internal.h"

#include <assert.h>
#include <errno.h>
#include <stdatomic.h>
#include <sys/mman.h>

enum {
    CHUNK_PAGES = 1024,
    KEEP_EPOCHS = 64, /* half of the memory that so many epochs did not need is given back */
};
#define CHUNK_BYTES ((size_t)CHUNK_PAGES * LB_PAGE_SIZE)
#define SPARE_BYTES (UINT64_C(256) << 20)

struct run {
    uint32_t block, first, count;
    const uint8_t *data; /* NULL: zero */
};
struct payload { /* of a DISK record, checked */
    uint32_t disk;
    size_t len;
    uint8_t *data;
};
struct blob {
    uint8_t *data;
    size_t len, cap;
};

/* Page buffers, given out one after the other and taken back all at once. */
struct arena {
    uint8_t **chunks;
    unsigned n, used;   /* chunks there are; of them begun */
    uint64_t pages;     /* given out of the last one begun */
    unsigned most, age; /* chunks used at most, in so many epochs */
};

struct lb_collector {
    /* immutable */
    struct lb_hv_vm *vm;
    const struct lb_ram_block **map;
    uint64_t *n_pages; /* by block; 0: nothing may come for it */
    unsigned n_map;
    struct lb_disk_target **targets;
    unsigned n_targets;
    uint64_t max_bytes;

    /* receiving thread only */
    struct lb_bulk *bulk; /* that was prepared */
    uint64_t next;        /* the epoch that comes */
    bool complete, broken;
    bool begun;           /* a record of `next` has come */
    struct lb_record rec; /* its payload is being taken */
    bool in_payload;
    uint8_t *rec_data;    /* staging of its pages */
    struct lb_bitmap *seen; /* by block: pages of `next` */
    struct arena arena;
    struct run *runs;
    size_t n_runs, cap_runs;
    struct payload *payloads;
    size_t n_payloads, cap_payloads;
    bool *touched; /* by disk: not flushed yet */
    uint8_t *scratch; /* LB_REC_MAX_PAYLOAD: memory that cannot be mapped */
    struct blob state, frames, last_state, last_frames;

    _Atomic uint64_t bytes; /* staged; any thread, relaxed */
};

/* ------------------------------------------------------------------------- memory */

static uint64_t staged(const struct lb_collector *c)
{
    return atomic_load_explicit(&c->bytes, memory_order_relaxed);
}

static int account(struct lb_collector *c, uint64_t n, struct lb_error *err)
{
    if (n > c->max_bytes || staged(c) > c->max_bytes - n) {
        lb_fail(err, LB_E_NO_SPACE, "epoch %llu is larger than %llu MiB",
                (unsigned long long)c->next, (unsigned long long)(c->max_bytes >> 20));
        return lb_remedy(err, "protect with a shorter interval");
    }
    atomic_fetch_add_explicit(&c->bytes, n, memory_order_relaxed);
    return 0;
}

/* n <= LB_REC_MAX_PAGES pages, next to each other. */
static uint8_t *arena_take(struct arena *a, uint64_t n, struct lb_error *err)
{
    if (a->used == 0 || a->pages + n > CHUNK_PAGES) {
        if (a->used == a->n) {
            a->chunks = lb_realloc(a->chunks, (a->n + 1) * sizeof(*a->chunks));
            void *p = mmap(NULL, CHUNK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                           -1, 0);
            if (p == MAP_FAILED) {
                lb_fail_errno(err, LB_E_NO_SPACE, errno, "no memory to stage an epoch");
                return NULL;
            }
            a->chunks[a->n++] = p;
        }
        a->used++;
        a->pages = 0;
    }
    uint8_t *p = a->chunks[a->used - 1] + a->pages * LB_PAGE_SIZE;
    a->pages += n;
    return p;
}

static void arena_reset(struct arena *a)
{
    a->most = LB_MAX(a->most, a->used);
    if (++a->age == KEEP_EPOCHS) {
        for (unsigned keep = a->most + (a->n - a->most) / 2; a->n > keep;)
            munmap(a->chunks[--a->n], CHUNK_BYTES);
        a->age = a->most = 0;
    }
    a->used = 0;
}

/* Room for want elements in the vector whose pointer is at pp; sizes come from the peer. */
static int grow(void *pp, size_t *cap, size_t want, size_t element, struct lb_error *err)
{
    void *old, *p;

    if (want <= *cap)
        return 0;
    size_t n = LB_MAX(want, *cap + *cap / 2 + 16);
    memcpy(&old, pp, sizeof(old));
    if (!(p = realloc(old, n * element)))
        return lb_fail_errno(err, LB_E_NO_SPACE, errno, "no memory to stage an epoch");
    memcpy(pp, &p, sizeof(p));
    *cap = n;
    return 0;
}

static int blob_add(struct lb_collector *c, struct blob *b, const uint8_t *data, size_t len,
                    size_t max, struct lb_error *err)
{
    if (len > max - b->len)
        return lb_fail(err, LB_E_PROTO, "epoch %llu: more than %zu bytes of one kind",
                       (unsigned long long)c->next, max);
    if (account(c, len, err) < 0 ||
        grow(&b->data, &b->cap, b->len + len, 1, err) < 0)
        return -1;
    memcpy(b->data + b->len, data, len);
    b->len += len;
    return 0;
}

/* ---------------------------------------------------------------------- life */

int lb_collector_new(struct lb_hv_vm *vm, const struct lb_ram_block *const *map, unsigned n_map,
                     struct lb_disk_target **targets, unsigned n_targets, struct lb_collector **out,
                     struct lb_error *err)
{
    struct lb_collector *c = lb_alloc(sizeof(*c));

    c->vm = vm;
    c->n_map = n_map;
    c->n_targets = n_targets;
    c->map = lb_alloc((n_map + 1) * sizeof(*c->map));
    c->n_pages = lb_alloc((n_map + 1) * sizeof(*c->n_pages));
    c->seen = lb_alloc((n_map + 1) * sizeof(*c->seen));
    c->targets = lb_alloc((n_targets + 1) * sizeof(*c->targets));
    c->touched = lb_alloc((n_targets + 1) * sizeof(*c->touched));
    c->max_bytes = SPARE_BYTES;
    c->next = 1;
    for (unsigned i = 0; i < n_targets; i++)
        c->targets[i] = targets[i];
    for (unsigned i = 0; i < n_map; i++) {
        if (!map[i] || map[i]->kind == LB_RAM_ROM)
            continue; /* it never changes */
        c->map[i] = map[i];
        c->n_pages[i] = map[i]->size_bytes / LB_PAGE_SIZE;
        c->max_bytes += map[i]->size_bytes;
        if (lb_bitmap_init(&c->seen[i], c->n_pages[i], err) < 0)
            goto fail;
    }
    if (!(c->scratch = aligned_alloc(LB_PAGE_SIZE, LB_REC_MAX_PAYLOAD))) {
        lb_fail_errno(err, LB_E_NO_SPACE, errno, "no memory to receive epochs");
        goto fail;
    }
    *out = c;
    return 0;
fail:
    lb_collector_free(c);
    return -1;
}

void lb_collector_set_limit(struct lb_collector *c, uint64_t max_bytes)
{
    c->max_bytes = max_bytes;
}

/* Nothing is staged any more; state and frames of this epoch stay. */
static void drop_staged(struct lb_collector *c)
{
    for (size_t i = 0; i < c->n_runs; i++)
        lb_bitmap_clear_range(&c->seen[c->runs[i].block], c->runs[i].first, c->runs[i].count);
    for (size_t i = 0; i < c->n_payloads; i++)
        free(c->payloads[i].data);
    c->n_runs = c->n_payloads = 0;
    c->complete = c->begun = false;
    arena_reset(&c->arena);
    atomic_store_explicit(&c->bytes, 0, memory_order_relaxed);
}

void lb_collector_discard(struct lb_collector *c)
{
    c->broken = true; /* what comes means nothing without what came */
    if (c->complete)
        return; /* nothing of the next one has been read, and this one has been promised */
    drop_staged(c);
    c->state.len = c->frames.len = 0;
}

void lb_collector_free(struct lb_collector *c)
{
    if (!c)
        return;
    if (c->runs || c->payloads)
        drop_staged(c);
    for (unsigned i = 0; i < c->n_map; i++)
        lb_bitmap_free(&c->seen[i]);
    for (unsigned i = 0; i < c->arena.n; i++)
        munmap(c->arena.chunks[i], CHUNK_BYTES);
    free(c->arena.chunks);
    free(c->runs);
    free(c->payloads);
    free(c->state.data);
    free(c->frames.data);
    free(c->last_state.data);
    free(c->last_frames.data);
    free(c->scratch);
    free(c->touched);
    free(c->targets);
    free(c->seen);
    free(c->n_pages);
    free(c->map);
    free(c);
}

uint64_t lb_collector_bytes(struct lb_collector *c)
{
    return staged(c);
}

void lb_collector_state(struct lb_collector *c, const void **state, size_t *len,
                        const void **frames, size_t *frames_len)
{
    *state = c->last_state.data;
    *len = c->last_state.len;
    *frames = c->last_frames.data;
    *frames_len = c->last_frames.len;
}

/* -------------------------------------------------------------------- receiving */

static int bad(struct lb_collector *c, const char *why, struct lb_error *err)
{
    return lb_fail(err, LB_E_PROTO, "epoch %llu: %s", (unsigned long long)c->next, why);
}

/* All pages of a record: not seen before, and from now on. */
static int mark_seen(struct lb_collector *c, const struct lb_record *r, struct lb_error *err)
{
    struct lb_bitmap *seen = &c->seen[r->block_id];

    for (uint32_t i = 0; i < r->n_runs; i++) {
        const struct lb_page_run *p = &r->runs[i];
        for (uint64_t page = p->first; page < (uint64_t)p->first + p->count; page++)
            if (lb_bitmap_test(seen, page))
                return bad(c, "a page comes twice", err);
        if (grow(&c->runs, &c->cap_runs, c->n_runs + 1, sizeof(*c->runs), err) < 0)
            return -1;
        c->runs[c->n_runs++] = (struct run){r->block_id, p->first, p->count, NULL};
        lb_bitmap_set_range(seen, p->first, p->count);
    }
    return 0;
}

/* The runs that mark_seen has just added get their data. */
static void set_data(struct lb_collector *c, const struct lb_record *r, const uint8_t *data)
{
    for (struct run *p = c->runs + c->n_runs - r->n_runs; p < c->runs + c->n_runs; p++) {
        p->data = data;
        data += (size_t)p->count * LB_PAGE_SIZE;
    }
}

static int begin_record(struct lb_collector *c, struct lb_error *err)
{
    const struct lb_record *r = &c->rec;

    if (r->type == LB_REC_END)
        return lb_fail(err, LB_E_NET, "the primary has ended the checkpoint connection");
    bool first_copy = r->type == LB_REC_DISK && r->round == 0 && c->next == 1 && !c->begun;
    if (!first_copy && r->round != (uint32_t)c->next)
        return bad(c, "a record of another epoch", err);
    if (r->type == LB_REC_DISK && r->block_id >= c->n_targets)
        return bad(c, "a disk that does not exist", err);
    c->begun = !first_copy;
    c->rec_data = NULL;
    if (r->n_runs == 0)
        return 0;
    uint64_t overhead = r->n_runs * sizeof(struct run);
    if (r->type == LB_REC_ZERO)
        return account(c, overhead, err) < 0 ? -1 : mark_seen(c, r, err);
    if (account(c, overhead + (uint64_t)r->n_pages * LB_PAGE_SIZE, err) < 0 ||
        !(c->rec_data = arena_take(&c->arena, r->n_pages, err)) || mark_seen(c, r, err) < 0)
        return -1;
    set_data(c, r, c->rec_data);
    return 0;
}

static int take_pages(struct lb_collector *c, struct lb_error *err)
{
    struct iovec iov[LB_REC_MAX_PAGES];
    uint8_t *p = c->rec_data;

    for (uint32_t i = 0; i < c->rec.n_runs; i++) {
        iov[i] = (struct iovec){p, (size_t)c->rec.runs[i].count * LB_PAGE_SIZE};
        p += iov[i].iov_len;
    }
    return lb_bulk_recv_pages(c->bulk, &c->rec, iov, err);
}

static int take_delta(struct lb_collector *c, struct lb_error *err)
{
    const struct lb_ram_block *blk = c->map[c->rec.block_id];
    uint8_t *p = c->rec_data;
    uint64_t sum;

    if (lb_bulk_recv_delta(c->bulk, &c->rec, p, &sum, err) < 0)
        return -1;
    for (uint32_t i = 0; i < c->rec.n_runs; i++) {
        const struct lb_page_run *r = &c->rec.runs[i];
        const uint8_t *old = c->scratch;
        size_t len = (size_t)r->count * LB_PAGE_SIZE;
        if (blk->map)
            old = (const uint8_t *)blk->map + (size_t)r->first * LB_PAGE_SIZE;
        else if (lb_hv_read(c->vm, blk, r->first, r->count, c->scratch, err) < 0)
            return -1;
        lb_stage_xor(p, p, old, len);
        p += len;
    }
    if (lb_bulk_checksum(0, c->rec_data, c->rec.n_pages) == sum)
        return 0;
    bad(c, "the standby's memory is not what the primary takes it for", err);
    return lb_remedy(err, "protect the VM again; please report this");
}

static int check_ops(struct lb_collector *c, const uint8_t *p, size_t len, struct lb_error *err)
{
    struct lb_disk_op op;

    while (len > 0) {
        size_t n = lb_stage_get_op(p, len, c->rec.block_id, &op);
        if (n == 0)
            return bad(c, "a disk operation that is not valid", err);
        p += n;
        len -= n;
    }
    return 0;
}

static int apply_ops(struct lb_collector *c, uint32_t disk, const uint8_t *p, size_t len,
                     struct lb_error *err)
{
    struct lb_disk_op op;

    c->touched[disk] = true;
    for (size_t n; len > 0; p += n, len -= n) {
        n = lb_stage_get_op(p, len, disk, &op);
        if (lb_disk_target_apply(c->targets[disk], &op, err) < 0)
            return -1;
    }
    return 0;
}

static int take_disk(struct lb_collector *c, const uint8_t *data, size_t len, struct lb_error *err)
{
    uint32_t disk = c->rec.block_id;

    if (check_ops(c, data, len, err) < 0)
        return -1;
    if (!c->begun) /* the first copy */
        return apply_ops(c, disk, data, len, err);
    if (account(c, len + sizeof(struct payload), err) < 0)
        return -1;
    if (grow(&c->payloads, &c->cap_payloads, c->n_payloads + 1, sizeof(*c->payloads),
             err) < 0)
        return -1;
    uint8_t *copy = lb_try_alloc(len, err);
    if (!copy)
        return -1;
    memcpy(copy, data, len);
    c->payloads[c->n_payloads++] = (struct payload){disk, len, copy};
    return 0;
}

static int take_state(struct lb_collector *c, const uint8_t *data, size_t len, struct lb_error *err)
{
    size_t at = c->state.len;

    if (blob_add(c, &c->state, data, len, LB_EPOCH_MAX_STATE, err) < 0)
        return -1;
    if (c->rec.codec != LB_CODEC_XOR_ZSTD)
        return 0;
    if (at + len > c->last_state.len)
        return bad(c, "a difference to more device state than there was", err);
    lb_stage_xor(c->state.data + at, c->state.data + at, c->last_state.data + at, len);
    return 0;
}

static void swap(struct blob *a, struct blob *b)
{
    struct blob t = *a;
    *a = *b;
    *b = t;
    b->len = 0;
}

static int take_end(struct lb_collector *c, const uint8_t *data, struct lb_error *err)
{
    uint64_t number;

    memcpy(&number, data, sizeof(number)); /* its length is part of the format */
    if (le64toh(number) != c->next)
        return bad(c, "ends with another number", err);
    if (c->state.len == 0)
        return bad(c, "has no device state", err);
    swap(&c->last_state, &c->state);
    swap(&c->last_frames, &c->frames);
    c->complete = true;
    c->next++;
    return 0;
}

static int take_blob(struct lb_collector *c, struct lb_error *err)
{
    const void *data;
    size_t len;

    if (lb_bulk_recv_blob(c->bulk, &c->rec, &data, &len, err) < 0)
        return -1;
    switch (c->rec.type) {
    case LB_REC_DISK:
        return take_disk(c, data, len, err);
    case LB_REC_FRAMES:
        return blob_add(c, &c->frames, data, len, LB_EPOCH_MAX_FRAMES, err);
    case LB_REC_STATE:
        return take_state(c, data, len, err);
    default:
        return take_end(c, data, err);
    }
}

static int take_payload(struct lb_collector *c, struct lb_error *err)
{
    switch (c->rec.type) {
    case LB_REC_PAGES:
        return take_pages(c, err);
    case LB_REC_DELTA:
        return take_delta(c, err);
    default:
        return take_blob(c, err);
    }
}

/* A header and its payload. A deadline that passes in between loses nothing. */
static int take_record(struct lb_collector *c, uint64_t deadline_ns, struct lb_error *err)
{
    if (!c->in_payload) {
        if (lb_bulk_recv(c->bulk, &c->rec, deadline_ns, err) < 0 || begin_record(c, err) < 0)
            return -1;
        c->in_payload = c->rec.payload_bytes > 0;
    }
    if (c->in_payload && take_payload(c, err) < 0)
        return -1;
    c->in_payload = false;
    return 0;
}

static int prepare(struct lb_collector *c, struct lb_bulk *bulk, struct lb_error *err)
{
    if (c->bulk == bulk)
        return 0;
    assert(!c->bulk);
    if (lb_bulk_set_blocks(bulk, c->n_pages, c->n_map, err) < 0)
        return -1;
    lb_bulk_set_checkpoint(bulk);
    c->bulk = bulk;
    return 0;
}

int lb_collector_recv(struct lb_collector *c, struct lb_bulk *bulk, uint64_t deadline_ns,
                      uint64_t *epoch, struct lb_error *err)
{
    struct lb_error why = LB_ERROR_INIT;

    assert(!c->complete); /* apply comes first */
    if (c->broken)
        return lb_fail(err, LB_E_STATE, "this standby has failed or been told to stop before");
    if (prepare(c, bulk, err) < 0)
        return -1;
    lb_bulk_set_payload_deadline(bulk, deadline_ns);
    while (!c->complete) {
        if (take_record(c, deadline_ns, &why) == 0)
            continue;
        if (deadline_ns && why.code == LB_E_NET && why.sys_errno == ETIMEDOUT)
            return 0;
        c->broken = true;
        if (err)
            *err = why;
        return -1;
    }
    *epoch = c->next - 1;
    return 1;
}

/* ---------------------------------------------------------------------- applying */

static int write_run(struct lb_collector *c, const struct run *r, struct lb_error *err)
{
    const struct lb_ram_block *blk = c->map[r->block];

    if (blk->map) {
        uint8_t *dst = (uint8_t *)blk->map + (size_t)r->first * LB_PAGE_SIZE;
        size_t len = (size_t)r->count * LB_PAGE_SIZE;
        if (r->data)
            memcpy(dst, r->data, len);
        else
            memset(dst, 0, len);
        return 0;
    }
    if (r->data)
        return lb_hv_write(c->vm, blk, r->first, r->count, r->data, err);
    memset(c->scratch, 0, LB_MIN(r->count, LB_REC_MAX_PAGES) * (size_t)LB_PAGE_SIZE);
    for (uint64_t at = 0, n; at < r->count; at += n) {
        n = LB_MIN(r->count - at, (uint64_t)LB_REC_MAX_PAGES);
        if (lb_hv_write(c->vm, blk, r->first + at, n, c->scratch, err) < 0)
            return -1;
    }
    return 0;
}

static int apply_disks(struct lb_collector *c, struct lb_error *err)
{
    for (size_t i = 0; i < c->n_payloads; i++)
        if (apply_ops(c, c->payloads[i].disk, c->payloads[i].data, c->payloads[i].len, err) < 0)
            return -1;
    for (unsigned i = 0; i < c->n_targets; i++) {
        if (c->touched[i] && lb_disk_target_flush(c->targets[i], err) < 0)
            return -1;
        c->touched[i] = false;
    }
    return 0;
}

int lb_collector_apply(struct lb_collector *c, struct lb_error *err)
{
    assert(c->complete);
    for (size_t i = 0; i < c->n_runs; i++)
        if (write_run(c, &c->runs[i], err) < 0)
            goto fail;
    if (apply_disks(c, err) < 0)
        goto fail;
    drop_staged(c);
    return 0;
fail:
    c->broken = true;
    return lb_context(err, "applying epoch %llu", (unsigned long long)(c->next - 1));
}
