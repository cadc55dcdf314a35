/* checkpoint/chain.c - a checkpoint and all it stands on, as one.
 *
 * The files are opened from the checkpoint down, each one's id being what the one above names as
 * its parent.  Their indexes are then laid over each other from the bottom up, in one array per
 * block with 8 bytes a page: what is in it at the end is where each page is now.  A page stored as
 * a difference needs the entry that was there before, too: there are few of these, kept in a sorted
 * list per file.
 *
 * Hashes take twice as much again and only a writer of increments wants them: read when it asks. */
#include "checkpoint/reader_internal.h"

#include <assert.h>
#include <string.h>

/* ---------------------------------------------------------------- open */

static bool same_id(const uint8_t a[LB_CKPT_ID_BYTES], const uint8_t b[LB_CKPT_ID_BYTES])
{
    return memcmp(a, b, LB_CKPT_ID_BYTES) == 0;
}

static int parent_missing(const struct lb_cf_file *child, const char *instead, struct lb_error *err)
{
    char id[2 * LB_CKPT_ID_BYTES + 1];
    lb_hex(id, child->head.parent, LB_CKPT_ID_BYTES);
    lb_fail(err, LB_E_NOT_FOUND, "the parent of %s (id %s) is missing%s%s", child->name, id,
            instead ? ": another checkpoint is in its place, " : "", instead ? instead : "");
    return lb_remedy(err, "%s holds only what differs from it: bring the parent's file back",
                     child->name);
}

static int open_files(struct lb_chain *c, const char *const *paths, unsigned n,
                      const struct lb_ckpt_key *key, struct lb_error *err)
{
    if (n < 1 || n > LB_CF_MAX_DEPTH)
        return lb_fail(err, LB_E_UNSUPPORTED, "a checkpoint stands on at most %u others, not %u",
                       LB_CF_MAX_DEPTH - 1, n - 1);
    for (unsigned i = 0; i < n; i++) {
        struct lb_cf_file *f = &c->files[i], *child = i ? f - 1 : NULL;
        struct lb_error why = LB_ERROR_INIT;
        c->n_files = i + 1;
        if (child && !child->increment)
            return lb_fail(err, LB_E_USAGE, "%s is a full checkpoint and has no parent",
                           child->name);
        if (lb_cf_open(f, paths[i], key, &why) < 0 && child && why.code == LB_E_NOT_FOUND)
            return parent_missing(child, NULL, err);
        if (why.code) {
            if (err)
                *err = why;
            return -1;
        }
        if (child && !same_id(f->head.id, child->head.parent))
            return parent_missing(child, f->name, err);
        if (lb_cf_open_chunks(f, err) < 0)
            return -1;
    }
    if (c->files[n - 1].increment)
        return parent_missing(&c->files[n - 1], NULL, err);
    return 0;
}

static int same_blocks(const struct lb_chain *c, const struct lb_cf_file *f,
                       const struct lb_cf_index *ix, struct lb_error *err)
{
    bool same = ix->n_blocks == c->n_blocks;
    for (unsigned i = 0; same && i < ix->n_blocks; i++)
        same = strcmp(ix->blocks[i].name, c->blocks[i].name) == 0 &&
               ix->blocks[i].kind == c->blocks[i].kind &&
               ix->blocks[i].n_pages == c->blocks[i].n_pages;
    return same ? 0
                : lb_fail(err, LB_E_PROTO, "%s and its parent do not have the same memory blocks",
                          f->name);
}

static int new_map(struct lb_chain *c, struct lb_cf_index *ix, struct lb_error *err)
{
    c->blocks = LB_STEAL_PTR(ix->blocks);
    c->n_blocks = ix->n_blocks;
    c->map = lb_alloc(c->n_blocks * sizeof(*c->map));
    for (unsigned i = 0; i < c->n_blocks; i++) {
        c->map[i] = lb_try_alloc(c->blocks[i].n_pages * sizeof(**c->map), err);
        if (!c->map[i])
            return -1;
    }
    return 0;
}

static const char *lay_difference(uint64_t *entry, uint64_t now, struct lb_xor_ref *x, uint64_t key)
{
    if (!(*entry & LB_ENTRY_STORED) || *entry & LB_ENTRY_XOR)
        return "a difference from a page that is not stored whole";
    *x = (struct lb_xor_ref){.key = key, .base = *entry};
    *entry = now;
    return NULL;
}

static int lay_index(struct lb_chain *c, unsigned file, const struct lb_cf_index *ix,
                     struct lb_error *err)
{
    bool bottom = file == c->n_files - 1;
    uint64_t n_xor = 0;
    struct lb_cf_run_host r;

    c->n_xors[file] = ix->n_xor;
    c->xors[file] = lb_try_alloc(ix->n_xor * sizeof(**c->xors), err);
    if (!c->xors[file])
        return -1;
    for (uint64_t i = 0; i < ix->n_runs; i++) {
        lb_cf_run_at(ix, i, &r);
        uint64_t *m = c->map[r.block] + r.first;
        if (r.kind == LB_CF_RUN_ZERO) {
            for (uint64_t k = 0; !bottom && k < r.count;
                 k++) /* at the bottom they are zeros already */
                m[k] = LB_ENTRY_NAMED | (uint64_t)file << 48;
            continue;
        }
        for (uint32_t k = 0; k < r.count; k++) {
            uint64_t now = lb_entry(file, r.part, r.slot + k, r.kind == LB_CF_RUN_XOR);
            const char *fault = NULL;
            if (r.kind == LB_CF_RUN_WHOLE)
                m[k] = now;
            else
                fault = lay_difference(&m[k], now, &c->xors[file][n_xor++],
                                       lb_page_key(r.block, r.first + k));
            if (fault)
                return lb_fail(err, LB_E_PROTO, "%s: its index is damaged: %s", c->files[file].name,
                               fault);
        }
    }
    return 0;
}

static int lay_all(struct lb_chain *c, struct lb_error *err)
{
    c->xors = lb_alloc(c->n_files * sizeof(*c->xors));
    c->n_xors = lb_alloc(c->n_files * sizeof(*c->n_xors));
    for (unsigned i = c->n_files; i-- > 0;) {
        struct lb_cf_index ix;
        int rc = lb_cf_index_load(&c->files[i], &ix, err);
        if (rc == 0)
            rc = c->map ? same_blocks(c, &c->files[i], &ix, err) : new_map(c, &ix, err);
        if (rc == 0)
            rc = lay_index(c, i, &ix, err);
        lb_cf_index_free(&ix);
        if (rc < 0)
            return -1;
    }
    return 0;
}

int lb_chain_open(const char *const *paths, unsigned n, const struct lb_ckpt_key *key,
                  struct lb_chain **out, struct lb_error *err)
{
    struct lb_chain *c = lb_alloc(sizeof(*c));
    pthread_mutex_init(&c->lock, NULL);
    c->files = lb_alloc((size_t)n * sizeof(*c->files));
    if (open_files(c, paths, n, key, err) < 0 || lay_all(c, err) < 0) {
        lb_chain_close(c);
        return -1;
    }
    *out = c;
    return 0;
}

static void free_hashes(struct lb_chain *c)
{
    for (unsigned i = 0; c->hashes && i < c->n_files; i++) {
        free(c->hashes[i].base);
        free(c->hashes[i].v);
    }
    free(c->hashes);
    c->hashes = NULL;
}

void lb_chain_close(struct lb_chain *c)
{
    if (!c)
        return;
    lb_chain_cache_free(c);
    free_hashes(c);
    for (unsigned i = 0; c->map && i < c->n_blocks; i++)
        free(c->map[i]);
    for (unsigned i = 0; i < c->n_files; i++) {
        if (c->xors)
            free(c->xors[i]);
        lb_cf_close(&c->files[i]);
    }
    free(c->map);
    free(c->xors);
    free(c->n_xors);
    free(c->blocks);
    free(c->files);
    pthread_mutex_destroy(&c->lock);
    free(c);
}

/* ---------------------------------------------------------------- what is there */

const struct lb_ckpt_info *lb_chain_info(const struct lb_chain *c)
{
    return &c->files[0].info;
}

unsigned lb_chain_depth(const struct lb_chain *c)
{
    return c->n_files;
}

const struct lb_ckpt_block *lb_chain_blocks(const struct lb_chain *c, unsigned *n)
{
    *n = c->n_blocks;
    return c->blocks;
}

int lb_chain_state(struct lb_chain *c, void **buf, size_t *len, struct lb_error *err)
{
    return lb_cf_section(&c->files[0], LB_CF_STATE, LB_CF_MAX_META_BYTES, buf, len, err);
}

int lb_chain_hot(struct lb_chain *c, uint64_t **v, uint64_t *n, struct lb_error *err)
{
    LB_AUTO_FREE void *buf = NULL;
    size_t len;
    const struct lb_cf_section *s = &c->files[0].sections[LB_CF_HOT];
    uint64_t total = 0;

    *v = NULL;
    *n = 0;
    for (unsigned i = 0; i < c->n_blocks; i++)
        total += c->blocks[i].n_pages;
    if (s->n == 0)
        return 0;
    if (lb_cf_section(&c->files[0], LB_CF_HOT, total * sizeof(**v), &buf, &len, err) < 0)
        return -1;
    uint64_t *hot = buf;
    for (size_t i = 0; i < len / sizeof(*hot); i++) {
        hot[i] = le64toh(hot[i]);
        if (lb_key_block(hot[i]) >= c->n_blocks ||
            lb_key_page(hot[i]) >= c->blocks[lb_key_block(hot[i])].n_pages)
            return lb_fail(err, LB_E_PROTO, "%s is damaged: its hot pages are not in its memory",
                           c->files[0].name);
    }
    *n = len / sizeof(*hot);
    *v = LB_STEAL_PTR(buf);
    return 0;
}

static int block_bits(const struct lb_chain *c, unsigned block, const struct lb_bitmap *pages,
                      struct lb_error *err)
{
    if (block >= c->n_blocks || pages->n_bits < c->blocks[block].n_pages)
        return lb_fail(err, LB_E_INTERNAL, "%s has no memory block %u of that size",
                       c->files[0].name, block);
    return 0;
}

int lb_chain_populated(struct lb_chain *c, unsigned block, struct lb_bitmap *pages,
                       struct lb_error *err)
{
    if (block_bits(c, block, pages, err) < 0)
        return -1;
    for (uint64_t i = 0; i < c->blocks[block].n_pages; i++)
        if (c->map[block][i] & LB_ENTRY_STORED)
            lb_bitmap_set(pages, i);
    return 0;
}

int lb_chain_named(struct lb_chain *c, unsigned block, unsigned files, struct lb_bitmap *pages,
                   struct lb_error *err)
{
    if (block_bits(c, block, pages, err) < 0)
        return -1;
    for (uint64_t i = 0; i < c->blocks[block].n_pages; i++) {
        uint64_t e = c->map[block][i];
        if (e && lb_entry_file(e) < files)
            lb_bitmap_set(pages, i);
    }
    return 0;
}

/* ---------------------------------------------------------------- hashes */

/* Pages that share a slot have the same hash, so a hash per slot is enough; slots nobody names cost
 * nothing but the room before them. */
static int index_hashes(const struct lb_cf_file *f, const struct lb_cf_index *ix, const uint8_t *in,
                        struct lb_chain_hashes *h, struct lb_error *err)
{
    struct lb_cf_run_host r;
    uint64_t sum = 0, next;

    h->base = lb_try_alloc(f->n_chunks * sizeof(*h->base), err);
    if (!h->base)
        return -1;
    for (uint64_t i = 0; i < ix->n_runs; i++) {
        lb_cf_run_at(ix, i, &r);
        if (r.kind != LB_CF_RUN_ZERO)
            h->base[r.part] = LB_MAX(h->base[r.part], r.slot + r.count);
    }
    for (uint32_t i = 0; i < f->n_chunks; i++, sum = next) {
        next = sum + h->base[i];
        h->base[i] = sum;
    }
    h->v = lb_try_alloc(sum * sizeof(*h->v), err);
    if (!h->v)
        return -1;
    for (uint64_t i = 0; i < ix->n_runs; i++) {
        lb_cf_run_at(ix, i, &r);
        if (r.kind == LB_CF_RUN_ZERO)
            continue;
        memcpy(h->v + h->base[r.part] + r.slot, in, r.count * sizeof(*h->v));
        in += r.count * sizeof(*h->v);
    }
    return 0;
}

static int load_hashes(const struct lb_cf_file *f, struct lb_chain_hashes *h, uint64_t *seed,
                       struct lb_error *err)
{
    struct lb_cf_index ix;
    LB_AUTO_FREE void *buf = NULL;
    size_t len = 0;
    int rc = lb_cf_index_load(f, &ix, err);

    if (rc < 0)
        return -1;
    rc = lb_cf_section(f, LB_CF_HASHES, sizeof(*seed) + ix.n_stored * sizeof(*h->v), &buf, &len,
                       err);
    if (rc == 0 && len != sizeof(*seed) + ix.n_stored * sizeof(*h->v))
        rc = lb_fail(err, LB_E_PROTO, "%s is damaged: the number of its hashes", f->name);
    if (rc == 0) {
        memcpy(seed, buf, sizeof(*seed));
        *seed = le64toh(*seed);
        rc = index_hashes(f, &ix, (const uint8_t *)buf + sizeof(*seed), h, err);
    }
    lb_cf_index_free(&ix);
    return rc;
}

int lb_chain_seed(struct lb_chain *c, uint64_t *seed, struct lb_error *err)
{
    uint64_t one = 0;
    if (!c->hashes) {
        c->hashes = lb_alloc(c->n_files * sizeof(*c->hashes));
        for (unsigned i = 0; i < c->n_files; i++) {
            int rc = load_hashes(&c->files[i], &c->hashes[i], &one, err);
            if (rc == 0 && i > 0 && one != c->seed)
                rc = lb_fail(err, LB_E_PROTO,
                             "%s and its parent do not have the same seed of their hashes",
                             c->files[i - 1].name);
            if (rc < 0) {
                free_hashes(c);
                return -1;
            }
            c->seed = one;
        }
    }
    *seed = c->seed;
    return 0;
}

bool lb_chain_hash(const struct lb_chain *c, unsigned block, uint64_t page, uint8_t hash[16],
                   bool *whole)
{
    assert(c->hashes && block < c->n_blocks && page < c->blocks[block].n_pages);
    uint64_t e = c->map[block][page];
    if (!(e & LB_ENTRY_STORED))
        return false;
    const struct lb_chain_hashes *h = &c->hashes[lb_entry_file(e)];
    memcpy(hash, h->v[h->base[lb_entry_part(e)] + lb_entry_slot(e)], 16);
    *whole = !(e & LB_ENTRY_XOR);
    return true;
}
