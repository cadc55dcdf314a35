/* checkpoint/reader_index.c - the INDEX of one file: its blocks, and what is where.
 *
 * Runs stay as they are in the file, 24 bytes each; all of them are checked once, here, so that who
 * walks them later has nothing to check. */
#include "checkpoint/reader_internal.h"

#include <string.h>

static int damaged(const struct lb_cf_file *f, const char *what, struct lb_error *err)
{
    return lb_fail(err, LB_E_PROTO, "%s: its index is damaged: %s", f->name, what);
}

void lb_cf_run_at(const struct lb_cf_index *ix, uint64_t i, struct lb_cf_run_host *out)
{
    struct lb_cf_run r;
    memcpy(&r, ix->runs + i * sizeof(r), sizeof(r));
    uint64_t packed = le64toh(r.packed);
    out->block = le32toh(r.block);
    out->kind = (enum lb_cf_run_kind)le32toh(r.kind);
    out->first = le64toh(r.first);
    out->count = out->kind == LB_CF_RUN_ZERO ? packed : LB_CF_RUN_COUNT(packed);
    out->part = LB_CF_RUN_PART(packed);
    out->slot = LB_CF_RUN_SLOT(packed);
}

static int take_blocks(const struct lb_cf_file *f, struct lb_cf_index *ix, const uint8_t **p,
                       const uint8_t *end, struct lb_error *err)
{
    ix->n_blocks = f->n_blocks;
    ix->blocks = lb_alloc(ix->n_blocks * sizeof(*ix->blocks));
    for (unsigned i = 0; i < ix->n_blocks; i++) {
        struct lb_ckpt_block *b = &ix->blocks[i];
        struct lb_cf_block raw;
        if ((size_t)(end - *p) < sizeof(raw))
            return damaged(f, "it ends within the table of blocks", err);
        memcpy(&raw, *p, sizeof(raw));
        *p += sizeof(raw);
        size_t len = le32toh(raw.name_bytes);
        if (len < 1 || len >= sizeof(b->name) || (size_t)(end - *p) < len || memchr(*p, 0, len))
            return damaged(f, "a block's name", err);
        memcpy(b->name, *p, len);
        *p += len;
        b->n_pages = le64toh(raw.n_pages);
        b->kind = (enum lb_ram_kind)le32toh(raw.kind);
        if (b->n_pages > LB_CF_MAX_BLOCK_PAGES || le32toh(raw.kind) > LB_RAM_ROM)
            return damaged(f, "a block's size or kind", err);
    }
    return 0;
}

static const char *run_fault(const struct lb_cf_file *f, const struct lb_cf_index *ix,
                             const struct lb_cf_run_host *r, uint64_t *next)
{
    if (r->block >= ix->n_blocks || r->kind > LB_CF_RUN_XOR)
        return "a run of an unknown block or kind";
    uint64_t pages = ix->blocks[r->block].n_pages;
    if (r->count < 1 || r->first > pages || r->count > pages - r->first)
        return "a run that is not within its block";
    if (lb_page_key(r->block, r->first) < *next)
        return "runs that are not in order";
    *next = lb_page_key(r->block, r->first + r->count);
    if (r->kind == LB_CF_RUN_ZERO)
        return NULL;
    if (r->part >= f->n_chunks || r->slot + r->count > f->chunk_pages)
        return "a run of pages that are in no chunk";
    if (r->kind == LB_CF_RUN_XOR && !f->increment)
        return "a difference from nothing";
    return NULL;
}

static int take_runs(const struct lb_cf_file *f, struct lb_cf_index *ix, const uint8_t *p,
                     const uint8_t *end, struct lb_error *err)
{
    uint64_t n, next = 0;
    if ((size_t)(end - p) < sizeof(n))
        return damaged(f, "it ends before the runs", err);
    memcpy(&n, p, sizeof(n));
    p += sizeof(n);
    ix->n_runs = le64toh(n);
    ix->runs = p;
    if (ix->n_runs != (uint64_t)(end - p) / sizeof(struct lb_cf_run) ||
        (uint64_t)(end - p) % sizeof(struct lb_cf_run) || ix->n_runs != f->trailer.runs)
        return damaged(f, "the number of its runs", err);
    for (uint64_t i = 0; i < ix->n_runs; i++) {
        struct lb_cf_run_host r;
        lb_cf_run_at(ix, i, &r);
        const char *fault = run_fault(f, ix, &r, &next);
        if (fault)
            return damaged(f, fault, err);
        if (r.kind != LB_CF_RUN_ZERO)
            ix->n_stored += r.count;
        if (r.kind == LB_CF_RUN_XOR)
            ix->n_xor += r.count;
    }
    return 0;
}

int lb_cf_index_load(const struct lb_cf_file *f, struct lb_cf_index *ix, struct lb_error *err)
{
    size_t len;
    const uint8_t *p;

    uint64_t most = f->n_blocks * (sizeof(struct lb_cf_block) + LB_BLOCK_NAME_MAX) +
                    sizeof(uint64_t) + f->trailer.runs * sizeof(struct lb_cf_run);

    memset(ix, 0, sizeof(*ix));
    if (f->trailer.runs > f->sections[LB_CF_INDEX].bytes / sizeof(struct lb_cf_run))
        return damaged(f, "the trailer's number of runs", err);
    if (lb_cf_section(f, LB_CF_INDEX, most, &ix->buf, &len, err) < 0)
        return -1;
    p = ix->buf;
    if (take_blocks(f, ix, &p, p + len, err) < 0 ||
        take_runs(f, ix, p, (const uint8_t *)ix->buf + len, err) < 0) {
        lb_cf_index_free(ix);
        return -1;
    }
    return 0;
}

void lb_cf_index_free(struct lb_cf_index *ix)
{
    free(ix->buf);
    free(ix->blocks);
    memset(ix, 0, sizeof(*ix));
}
