/* checkpoint/writer_end.c - what comes after the pages: FORMAT.md from "PARTS" to "TRAILER".
 *
 * One thread, after the workers have ended.  What is "joined" in the format goes through a buffer of one part. */
#include "checkpoint/writer_internal.h"

#include <errno.h>
#include <string.h>
#include <zstd.h>

#define PIECE_BYTES (1u << 20)
#define RUN_MAX_PAGES 0xffffu

/* A sequence in parts of one kind */
struct joined {
    struct lb_ckpt_writer *w;
    enum lb_cf_part_kind kind;
    uint8_t *piece, *packed; /* PIECE_BYTES each; of all kinds */
    size_t used;
    uint64_t first;          /* offset of the first part; 0 none */
};

static int write_piece(struct joined *j, struct lb_error *err)
{
    size_t n = 0;
    if (j->kind != LB_CF_HASHES) /* which are random */
        n = ZSTD_compress(j->packed, j->used - j->used / 16, j->piece, j->used, j->w->level);
    bool packed = n > 0 && !ZSTD_isError(n);
    struct lb_cf_part head = {
        .magic = htole32(LB_CF_PART_MAGIC),
        .kind = htole32(j->kind),
        .flags = htole32(packed ? LB_CF_ZSTD : 0),
        .stored_bytes = htole32((uint32_t)(packed ? n : j->used)),
        .unpacked_bytes = htole32((uint32_t)j->used),
    };
    struct lb_out_place place;

    if (lb_out_part(j->w->out, &j->w->seal, &head, packed ? j->packed : j->piece, &place, err) < 0)
        return -1;
    if (!j->first)
        j->first = place.offset;
    j->used = 0;
    return 0;
}

static int add(struct joined *j, const void *data, size_t len, struct lb_error *err)
{
    while (len > 0) {
        size_t n = LB_MIN(len, PIECE_BYTES - j->used);
        memcpy(j->piece + j->used, data, n);
        j->used += n;
        data = (const uint8_t *)data + n;
        len -= n;
        if (j->used == PIECE_BYTES && write_piece(j, err) < 0)
            return -1;
    }
    return 0;
}

static void begin(struct joined *j, enum lb_cf_part_kind kind)
{
    j->kind = kind;
    j->used = 0;
    j->first = 0;
}

/* At least one part, also of nothing. */
static int end(struct joined *j, uint64_t *offset, struct lb_error *err)
{
    if ((j->used > 0 || !j->first) && write_piece(j, err) < 0)
        return -1;
    *offset = htole64(j->first);
    return 0;
}

/* ---------------------------------------------------------------------------- runs */

/* Whether a page's place continues a run that has begun with `first`, n pages before. */
static bool continues(lb_loc first, uint64_t n, lb_loc next)
{
    if (LB_LOC_KIND(first) != LB_LOC_KIND(next) || LB_LOC_KIND(first) == LB_LOC_ZERO)
        return first == next;
    return n < RUN_MAX_PAGES && LB_LOC_SERIAL(first) == LB_LOC_SERIAL(next) &&
           LB_LOC_SLOT(first) + n == LB_LOC_SLOT(next);
}

/* A page that need not be said: as in the parent; zero in a checkpoint that has none. */
static bool silent(const struct lb_ckpt_writer *w, lb_loc l)
{
    return l == LB_LOC_NONE || (LB_LOC_KIND(l) == LB_LOC_ZERO && !w->parent);
}

struct run {
    unsigned block;
    uint64_t first, n;
    lb_loc loc; /* of the first page */
};

/* The run after *r (at the beginning: {0}); false: there is none. */
static bool next_run(const struct lb_ckpt_writer *w, struct run *r)
{
    uint64_t page = r->first + r->n;
    for (unsigned b = r->block; b < w->n_blocks; b++, page = 0) {
        const lb_loc *loc = w->index->loc[b];
        uint64_t n_pages = w->blocks[b].n_pages;
        while (page < n_pages && silent(w, loc[page]))
            page++;
        if (page == n_pages)
            continue;
        *r = (struct run){b, page, 1, loc[page]};
        while (page + r->n < n_pages && continues(r->loc, r->n, loc[page + r->n]))
            r->n++;
        return true;
    }
    return false;
}

static struct lb_cf_run run_of(const struct lb_ckpt_writer *w, const struct run *r)
{
    static const uint32_t kinds[] = {
        [LB_LOC_ZERO] = LB_CF_RUN_ZERO, [LB_LOC_WHOLE] = LB_CF_RUN_WHOLE, [LB_LOC_XOR] = LB_CF_RUN_XOR};
    uint64_t packed = r->n;
    if (LB_LOC_KIND(r->loc) != LB_LOC_ZERO)
        packed = LB_CF_PACK(r->n, lb_widx_chunk(w->index, LB_LOC_SERIAL(r->loc))->part, LB_LOC_SLOT(r->loc));
    return (struct lb_cf_run){htole32(r->block), htole32(kinds[LB_LOC_KIND(r->loc)]), htole64(r->first),
                              htole64(packed)};
}

/* --------------------------------------------------------------------------- parts */

static int write_parts(struct joined *j, uint64_t *offset, uint32_t *n_pages_parts, struct lb_error *err)
{
    const struct lb_cf_part_entry *v;

    /* A copy: these parts are parts too, and v moves when they are added. */
    lb_out_entries(j->w->out, &v, n_pages_parts);
    LB_AUTO_FREE struct lb_cf_part_entry *copy = lb_try_alloc((*n_pages_parts + 1) * sizeof(*copy), err);
    if (!copy)
        return -1;
    if (*n_pages_parts > 0)
        memcpy(copy, v, *n_pages_parts * sizeof(*copy));
    begin(j, LB_CF_PARTS);
    if (add(j, copy, *n_pages_parts * sizeof(*copy), err) < 0)
        return -1;
    return end(j, offset, err);
}

static int write_index(struct joined *j, uint64_t *offset, uint64_t *n_runs, struct lb_error *err)
{
    const struct lb_ckpt_writer *w = j->w;
    struct run r = {0};

    begin(j, LB_CF_INDEX);
    for (unsigned i = 0; i < w->n_blocks; i++) {
        const struct lb_ckpt_block *b = &w->blocks[i];
        size_t len = strnlen(b->name, sizeof(b->name));
        struct lb_cf_block head = {htole32((uint32_t)len), htole32(b->kind), htole64(b->n_pages)};
        if (add(j, &head, sizeof(head), err) < 0 || add(j, b->name, len, err) < 0)
            return -1;
    }
    for (*n_runs = 0; next_run(w, &r);)
        ++*n_runs;
    uint64_t n = htole64(*n_runs);
    if (add(j, &n, sizeof(n), err) < 0)
        return -1;
    for (r = (struct run){0}; next_run(w, &r);) {
        struct lb_cf_run run = run_of(w, &r);
        if (add(j, &run, sizeof(run), err) < 0)
            return -1;
    }
    return end(j, offset, err);
}

static int write_hashes(struct joined *j, uint64_t *offset, struct lb_error *err)
{
    const struct lb_ckpt_writer *w = j->w;
    uint64_t seed = htole64(w->seed);

    begin(j, LB_CF_HASHES);
    if (add(j, &seed, sizeof(seed), err) < 0)
        return -1;
    for (struct run r = {0}; next_run(w, &r);) {
        if (LB_LOC_KIND(r.loc) == LB_LOC_ZERO)
            continue;
        const struct lb_chunk_rec *c = lb_widx_chunk(w->index, LB_LOC_SERIAL(r.loc));
        if (add(j, c->hash[LB_LOC_SLOT(r.loc)], r.n * sizeof(c->hash[0]), err) < 0)
            return -1;
    }
    return end(j, offset, err);
}

static int write_bytes(struct joined *j, enum lb_cf_part_kind kind, const void *data, size_t len, uint64_t *offset,
                       struct lb_error *err)
{
    begin(j, kind);
    return add(j, data, len, err) < 0 ? -1 : end(j, offset, err);
}

static int write_meta(struct joined *j, const struct lb_ckpt_meta *meta, uint64_t *offset, struct lb_error *err)
{
    struct lb_ckpt_stats stats;

    lb_ckpt_writer_stats(j->w, &stats);
    LB_AUTO_FREE char *json = lb_ckpt_meta_json(meta, &stats, err);
    return json ? write_bytes(j, LB_CF_META, json, strlen(json), offset, err) : -1;
}

/* The checksum of the whole: of the checks of all parts so far. */
static int hash_checks(struct lb_out *o, uint32_t *n, uint8_t whole[16], struct lb_error *err)
{
    const struct lb_cf_part_entry *v;

    lb_out_entries(o, &v, n);
    LB_AUTO_FREE uint8_t *checks = lb_try_alloc((size_t)*n * 16, err);
    if (!checks)
        return -1;
    for (uint32_t i = 0; i < *n; i++)
        memcpy(checks + (size_t)i * 16, v[i].check, 16);
    lb_cf_hash(whole, checks, (size_t)*n * 16, 0);
    return 0;
}

static int write_trailer(struct lb_ckpt_writer *w, struct lb_cf_trailer *t, uint64_t *offset, struct lb_error *err)
{
    uint32_t n_parts;
    struct lb_out_place place;

    if (hash_checks(w->out, &n_parts, t->whole, err) < 0)
        return -1;
    t->n_parts = htole64(n_parts);
    t->bytes = htole64(lb_out_bytes(w->out));
    struct lb_cf_part head = {
        .magic = htole32(LB_CF_PART_MAGIC),
        .kind = htole32(LB_CF_TRAILER),
        .stored_bytes = htole32(sizeof(*t)),
        .unpacked_bytes = htole32(sizeof(*t)),
    };
    if (lb_out_part(w->out, &w->seal, &head, t, &place, err) < 0)
        return -1;
    *offset = place.offset;
    return 0;
}

static int write_all(struct joined *j, const struct lb_ckpt_meta *meta, const void *state, size_t state_bytes,
                     struct lb_cf_trailer *t, struct lb_error *err)
{
    const struct lb_ckpt_writer *w = j->w;
    uint32_t n_pages_parts;
    uint64_t n_runs;

    if (write_parts(j, &t->parts, &n_pages_parts, err) < 0 || write_index(j, &t->index, &n_runs, err) < 0 ||
        write_hashes(j, &t->hashes, err) < 0)
        return -1;
    if (w->n_hot > 0 &&
        write_bytes(j, LB_CF_HOT, w->hot, w->n_hot * sizeof(*w->hot), &t->hot, err) < 0)
        return -1;
    if (write_bytes(j, LB_CF_STATE, state, state_bytes, &t->state, err) < 0 || write_meta(j, meta, &t->meta, err) < 0)
        return -1;
    t->n_pages_parts = htole64(n_pages_parts);
    t->runs = htole64(n_runs);
    t->stored_pages = htole64(w->stats.stored_pages + w->stats.delta_pages);
    return 0;
}

int lb_writer_finish(struct lb_ckpt_writer *w, const struct lb_ckpt_meta *meta, const void *state, size_t state_bytes,
                     struct lb_error *err)
{
    LB_AUTO_FREE uint8_t *piece = lb_try_alloc(PIECE_BYTES, err);
    LB_AUTO_FREE uint8_t *packed = piece ? lb_try_alloc(PIECE_BYTES, err) : NULL;
    struct joined j = {.w = w, .piece = piece, .packed = packed};
    struct lb_cf_trailer t = {0};
    struct lb_cf_end last = {0};
    uint64_t trailer;

    if (!packed || write_all(&j, meta, state, state_bytes, &t, err) < 0 || write_trailer(w, &t, &trailer, err) < 0)
        return -1;
    last.trailer = htole64(trailer);
    memcpy(last.magic, LB_CF_END_MAGIC, sizeof(last.magic));
    return lb_out_finish(w->out, &last, w->replace, err);
}
