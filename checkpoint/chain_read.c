/* checkpoint/chain_read.c - chunks, and the pages around one page.
 *
 * A chunk that was unpacked is kept for a while: pages of the same content and differences come
 * back to it.  It never changes once it is in the cache; who uses it holds a reference, so that the
 * cache may forget it at any time.
 *
 *      read page P      -> entry of P: file, part, slot -> chunk -> which pages of it are current?
 *                          those of its page table whose entry is this very slot, P itself, and
 * pages around P that have their content here, too P is a difference -> chunk of the entry below,
 * one page of it, XOR
 *
 * Differences other than P are given along only when the chunk they differ from is at hand:
 * somebody waits for P. */
#include "checkpoint/reader_internal.h"

#include <assert.h>
#include <stdatomic.h>
#include <string.h>

/* The page table's, the same again to either side of the wanted page. */
enum { MAX_REFS = 3 * LB_CF_MAX_CHUNK_PAGES };

/* ---------------------------------------------------------------- damage */

/* Only on the way out: looks at every page. */
int lb_chain_damaged(const struct lb_chain *c, unsigned file, uint32_t part, const char *why,
                     struct lb_error *err)
{
    uint64_t first = UINT64_MAX, last = 0;
    const uint64_t mask = lb_entry(0xfff, UINT32_MAX, 0, false),
                   want = lb_entry(file, part, 0, false);
    const struct lb_cf_file *f = &c->files[file];
    unsigned b = c->n_blocks;

    while (first == UINT64_MAX && b-- > 0)
        for (uint64_t i = 0; i < c->blocks[b].n_pages; i++)
            if ((c->map[b][i] & mask) == want) {
                first = LB_MIN(first, i);
                last = i;
            }
    if (first == UINT64_MAX)
        lb_fail(err, LB_E_PROTO, "%s: part %u is damaged: %s", f->name, part, why);
    else
        lb_fail(err, LB_E_PROTO, "%s: part %u (pages %llu-%llu of %s) is damaged: %s", f->name,
                part, (unsigned long long)first, (unsigned long long)last, c->blocks[b].name, why);
    return lb_remedy(
        err, "nothing of it was used; take another checkpoint, or a copy of %s that is whole",
        f->path);
}

/* ---------------------------------------------------------------- scratch */

int lb_scratch_grow(uint8_t **buf, size_t *cap, size_t bytes, struct lb_error *err)
{
    if (bytes <= *cap)
        return 0;
    free(*buf);
    *cap = 0;
    *buf = malloc(bytes);
    if (!*buf)
        return lb_fail(err, LB_E_NO_SPACE, "no memory to read a checkpoint: %zu bytes", bytes);
    *cap = bytes;
    return 0;
}

struct lb_scratch *lb_scratch_get(struct lb_chain *c, struct lb_error *err)
{
    pthread_mutex_lock(&c->lock);
    struct lb_scratch *s = c->scratch;
    if (s)
        c->scratch = s->next;
    pthread_mutex_unlock(&c->lock);
    if (s)
        return s;
    s = lb_alloc(sizeof(*s));
    s->z = ZSTD_createDCtx();
    if (!s->z) {
        lb_fail(err, LB_E_NO_SPACE, "no memory for zstd");
        free(s);
        return NULL;
    }
    return s;
}

void lb_scratch_put(struct lb_chain *c, struct lb_scratch *s)
{
    pthread_mutex_lock(&c->lock);
    s->next = c->scratch;
    c->scratch = s;
    pthread_mutex_unlock(&c->lock);
}

/* ---------------------------------------------------------------- chunks */

void lb_cf_chunk_entry(const struct lb_cf_chunk *c, uint32_t slot, unsigned *block, uint32_t *kind,
                       uint64_t *page)
{
    struct lb_cf_page e;
    memcpy(&e, c->body + (size_t)slot * sizeof(e), sizeof(e));
    *block = le32toh(e.block);
    *kind = le32toh(e.kind);
    *page = le64toh(e.page);
}

static const char *table_fault(const struct lb_cf_file *f, const struct lb_ckpt_block *blocks,
                               const struct lb_cf_chunk *c)
{
    unsigned block, first = 0;
    uint32_t kind;
    uint64_t page;
    for (uint32_t i = 0; i < c->n_pages; i++) {
        lb_cf_chunk_entry(c, i, &block, &kind, &page);
        if (i == 0)
            first = block;
        if (block != first || block >= f->n_blocks || page >= blocks[block].n_pages ||
            kind > LB_CF_XOR || (kind == LB_CF_XOR && !f->increment))
            return "its page table";
    }
    return NULL;
}

const char *lb_cf_chunk_unpack(const struct lb_cf_file *f, const struct lb_ckpt_block *blocks,
                               uint32_t part, void *raw, struct lb_cf_chunk *c, ZSTD_DCtx *z)
{
    struct lb_cf_part head;
    memcpy(&head, raw, sizeof(head));
    const char *fault = lb_cf_head_fault(f, &head, part, f->chunk_at[part], f->chunk_at[part + 1]);
    if (!fault && le32toh(head.kind) != LB_CF_PAGES)
        fault = "it is no chunk";
    /* what its head says is bound to the check, and the check to the whole by the part table */
    if (!fault && (le32toh(head.stored_bytes) != f->chunks[part].stored_bytes ||
                   memcmp(head.check, f->chunks[part].check, sizeof(head.check)) != 0))
        fault = "it is not what the part table says";
    if (fault)
        return fault;
    c->part = part;
    c->n_pages = le32toh(head.n_pages);
    fault = lb_cf_unpack(f, &head, (uint8_t *)raw + sizeof(head), c->body, z);
    return fault ? fault : table_fault(f, blocks, c);
}

/* With the lock held. */
static void drop(struct lb_cf_chunk *c)
{
    if (--c->refs > 0)
        return;
    free(c->body);
    free(c);
}

static void chunk_put(struct lb_chain *c, struct lb_cf_chunk *chunk)
{
    pthread_mutex_lock(&c->lock);
    drop(chunk);
    pthread_mutex_unlock(&c->lock);
}

static struct lb_cf_chunk *cached(struct lb_chain *c, unsigned file, uint32_t part)
{
    struct lb_cf_chunk *found = NULL;
    pthread_mutex_lock(&c->lock);
    for (unsigned i = 0; i < LB_CHUNK_CACHE && !found; i++)
        if (c->cache[i] && c->cache[i]->part == part && c->cache[i]->file == file) {
            found = c->cache[i];
            found->refs++;
            c->used[i] = ++c->clock;
        }
    pthread_mutex_unlock(&c->lock);
    return found;
}

/* In the place of the one that was not used for the longest time. Two threads may come with the
 * same chunk: then it is there twice for a while. */
static void keep(struct lb_chain *c, struct lb_cf_chunk *chunk)
{
    unsigned oldest = 0;
    pthread_mutex_lock(&c->lock);
    for (unsigned i = 1; i < LB_CHUNK_CACHE; i++)
        if (c->used[i] < c->used[oldest])
            oldest = i;
    if (c->cache[oldest])
        drop(c->cache[oldest]);
    c->cache[oldest] = chunk;
    c->used[oldest] = ++c->clock;
    chunk->refs++;
    pthread_mutex_unlock(&c->lock);
}

static int load(struct lb_chain *c, struct lb_scratch *s, unsigned file, uint32_t part,
                struct lb_cf_chunk *chunk, struct lb_error *err)
{
    const struct lb_cf_file *f = &c->files[file];
    size_t len = lb_cf_chunk_raw_bytes(f, part);
    if (lb_scratch_grow(&s->raw, &s->raw_cap, len, err) < 0 ||
        lb_scratch_grow(&chunk->body, &chunk->cap, lb_cf_chunk_bytes(f), err) < 0 ||
        lb_cf_pread(f->fd, f->name, s->raw, len, f->chunk_at[part], err) < 0)
        return -1;
    chunk->file = file;
    const char *fault = lb_cf_chunk_unpack(f, c->blocks, part, s->raw, chunk, s->z);
    return fault ? lb_chain_damaged(c, file, part, fault, err) : 0;
}

static int chunk_get(struct lb_chain *c, unsigned file, uint32_t part, struct lb_cf_chunk **out,
                 struct lb_error *err)
{
    struct lb_cf_chunk *chunk = cached(c, file, part);
    if (!chunk) {
        struct lb_scratch *s = lb_scratch_get(c, err);
        if (!s)
            return -1;
        chunk = lb_alloc(sizeof(*chunk));
        int rc = load(c, s, file, part, chunk, err);
        lb_scratch_put(c, s);
        if (rc < 0) {
            free(chunk->body);
            free(chunk);
            return -1;
        }
        chunk->refs = 1;
        keep(c, chunk);
    }
    *out = chunk;
    return 0;
}

void lb_chain_warm(struct lb_chain *c, const uint64_t *v, uint64_t n, _Atomic bool *stop)
{
    unsigned read = 0;

    for (uint64_t i = 0; i < n && read < LB_CHUNK_CACHE && !atomic_load(stop); i++) {
        uint64_t page = lb_key_page(v[i]);
        unsigned block = lb_key_block(v[i]);
        if (block >= c->n_blocks || page >= c->blocks[block].n_pages || !(c->map[block][page] & LB_ENTRY_STORED))
            continue;
        uint64_t e = c->map[block][page];
        struct lb_cf_chunk *chunk = cached(c, lb_entry_file(e), lb_entry_part(e));
        read += !chunk;
        if (!chunk && chunk_get(c, lb_entry_file(e), lb_entry_part(e), &chunk, NULL) < 0)
            return; /* who needs it will say why */
        chunk_put(c, chunk);
    }
}

void lb_chain_cache_free(struct lb_chain *c)
{
    for (unsigned i = 0; i < LB_CHUNK_CACHE; i++)
        if (c->cache[i])
            drop(c->cache[i]);
    for (struct lb_scratch *s = c->scratch, *next; s; s = next) {
        next = s->next;
        ZSTD_freeDCtx(s->z);
        free(s->raw);
        free(s->pages);
        free(s);
    }
}

/* ---------------------------------------------------------------- pages of a chunk */

/* What the page (a difference) of file differs from. */
static uint64_t base_of(const struct lb_chain *c, unsigned file, uint64_t key)
{
    const struct lb_xor_ref *v = c->xors[file];
    uint64_t lo = 0, hi = c->n_xors[file];
    while (lo < hi) {
        uint64_t mid = lo + (hi - lo) / 2;
        if (v[mid].key < key)
            lo = mid + 1;
        else
            hi = mid;
    }
    assert(lo < c->n_xors[file] && v[lo].key == key); /* the map and this list are made together */
    return v[lo].base;
}

/* Does the index fit the chunk: a slot that is there, of the kind the run says? */
static const char *ref_fault(const struct lb_cf_chunk *chunk, uint64_t key, uint32_t slot,
                             bool is_xor)
{
    unsigned block;
    uint32_t kind;
    uint64_t page;
    if (slot >= chunk->n_pages)
        return "the index names a page that is not in it";
    lb_cf_chunk_entry(chunk, slot, &block, &kind, &page);
    if ((kind == LB_CF_XOR) != is_xor || (is_xor && lb_page_key(block, page) != key))
        return "the index takes a page of it for another";
    return NULL;
}

static void xor_page(uint8_t *restrict dst, const uint8_t *restrict a, const uint8_t *restrict b)
{
    for (size_t i = 0; i < LB_PAGE_SIZE; i++)
        dst[i] = a[i] ^ b[i];
}

static int undo_difference(struct lb_chain *c, const struct lb_cf_chunk *chunk,
                           const struct lb_page_ref *ref, uint8_t *dst, struct lb_error *err)
{
    uint64_t base = base_of(c, chunk->file, ref->key);
    struct lb_cf_chunk *below;
    if (chunk_get(c, lb_entry_file(base), lb_entry_part(base), &below, err) < 0)
        return -1;
    const char *fault = ref_fault(below, ref->key, lb_entry_slot(base), false);
    if (!fault)
        xor_page(dst, lb_cf_chunk_page(chunk, ref->slot),
                 lb_cf_chunk_page(below, lb_entry_slot(base)));
    chunk_put(c, below);
    return fault ? lb_chain_damaged(c, lb_entry_file(base), lb_entry_part(base), fault, err) : 0;
}

/* Adjacent pages [0, n) of refs: as they lie in the chunk when they are in one piece, else put
 * together. */
static int give_run(struct lb_chain *c, struct lb_scratch *s, const struct lb_cf_chunk *chunk,
                    const struct lb_page_ref *refs, unsigned n, lb_chain_pages_fn *fn, void *arg,
                    struct lb_error *err)
{
    const uint8_t *data = lb_cf_chunk_page(chunk, refs[0].slot);
    bool straight = true;

    for (unsigned i = 0; i < n; i++) {
        const char *fault = ref_fault(chunk, refs[i].key, refs[i].slot, refs[i].is_xor);
        if (fault)
            return lb_chain_damaged(c, chunk->file, chunk->part, fault, err);
        straight = straight && !refs[i].is_xor && refs[i].slot == refs[0].slot + i;
    }
    if (!straight) {
        if (lb_scratch_grow(&s->pages, &s->pages_cap, (size_t)n * LB_PAGE_SIZE, err) < 0)
            return -1;
        for (unsigned i = 0; i < n; i++) {
            uint8_t *dst = s->pages + (size_t)i * LB_PAGE_SIZE;
            if (!refs[i].is_xor)
                memcpy(dst, lb_cf_chunk_page(chunk, refs[i].slot), LB_PAGE_SIZE);
            else if (undo_difference(c, chunk, &refs[i], dst, err) < 0)
                return -1;
        }
        data = s->pages;
    }
    return fn(lb_key_block(refs[0].key), lb_key_page(refs[0].key), n, data, arg, err);
}

static unsigned run_length(const struct lb_page_ref *refs, unsigned n)
{
    unsigned i = 1;
    n = LB_MIN(n, LB_CF_MAX_CHUNK_PAGES); /* a page of which there are thousands takes no memory for
                                             thousands */
    while (i < n && refs[i].key == refs[i - 1].key + 1)
        i++;
    return i;
}

int lb_chunk_give(struct lb_chain *c, struct lb_scratch *s, const struct lb_cf_chunk *chunk,
                  const struct lb_page_ref *refs, unsigned n, uint64_t wanted,
                  lb_chain_pages_fn *fn, void *arg, struct lb_error *err)
{
    for (int first = 1; first >= 0; first--)
        for (unsigned i = 0, k; i < n; i += k) {
            k = run_length(refs + i, n - i);
            bool has = refs[i].key <= wanted && wanted < refs[i].key + k;
            if (has == (first == 1) && give_run(c, s, chunk, refs + i, k, fn, arg, err) < 0)
                return -1;
        }
    return 0;
}

/* ---------------------------------------------------------------- the pages around one page */

struct gathered {
    struct lb_chain *c;
    struct lb_cf_chunk *chunk;
    uint64_t wanted,
        wanted_base; /* chunk of the entry that the wanted page differs from; 0 when it does not */
    struct lb_page_ref v[MAX_REFS];
    unsigned n;
};

static uint64_t chunk_of(uint64_t entry)
{
    return entry & lb_entry(0xfff, UINT32_MAX, 0, false);
}

static bool at_hand(struct gathered *g, uint64_t key)
{
    uint64_t base = base_of(g->c, g->chunk->file, key);
    if (chunk_of(base) == g->wanted_base)
        return true;
    struct lb_cf_chunk *below = cached(g->c, lb_entry_file(base), lb_entry_part(base));
    if (below)
        chunk_put(g->c, below);
    return below;
}

static void gather(struct gathered *g, uint64_t key, uint64_t entry)
{
    bool is_xor = entry & LB_ENTRY_XOR;
    if (!is_xor || key == g->wanted || at_hand(g, key))
        g->v[g->n++] =
            (struct lb_page_ref){.key = key, .slot = lb_entry_slot(entry), .is_xor = is_xor};
}

/* Is the page one that the chunk's own table names for that slot? Then it is found there. */
static bool in_table(const struct lb_cf_chunk *chunk, uint64_t key, uint32_t slot)
{
    unsigned block;
    uint32_t kind;
    uint64_t page;
    if (slot >= chunk->n_pages)
        return false;
    lb_cf_chunk_entry(chunk, slot, &block, &kind, &page);
    return lb_page_key(block, page) == key;
}

static void gather_table(struct gathered *g)
{
    unsigned block;
    uint32_t kind;
    uint64_t page;
    for (uint32_t i = 0; i < g->chunk->n_pages; i++) {
        lb_cf_chunk_entry(g->chunk, i, &block, &kind, &page);
        uint64_t e = g->c->map[block][page];
        if (e == lb_entry(g->chunk->file, g->chunk->part, i, kind == LB_CF_XOR))
            gather(g, lb_page_key(block, page), e);
    }
}

/* The wanted page and those next to it without a gap, when their content is in this chunk under
 * another page's name. */
static void gather_around(struct gathered *g)
{
    const unsigned block = lb_key_block(g->wanted);
    const uint64_t page = lb_key_page(g->wanted), *map = g->c->map[block],
                   here = chunk_of(map[page]);
    uint64_t lo = page, hi = page + 1, n = g->c->blocks[block].n_pages;

    while (lo > 0 && page - lo < LB_CF_MAX_CHUNK_PAGES - 1 && chunk_of(map[lo - 1]) == here)
        lo--;
    while (hi < n && hi - page < LB_CF_MAX_CHUNK_PAGES && chunk_of(map[hi]) == here)
        hi++;
    for (; lo < hi; lo++)
        if (!in_table(g->chunk, lb_page_key(block, lo), lb_entry_slot(map[lo])))
            gather(g, lb_page_key(block, lo), map[lo]);
}

static int by_key(const void *a, const void *b)
{
    uint64_t x = ((const struct lb_page_ref *)a)->key, y = ((const struct lb_page_ref *)b)->key;
    return (x > y) - (x < y);
}

int lb_chain_read(struct lb_chain *c, unsigned block, uint64_t page, lb_chain_pages_fn *fn,
                  void *arg, struct lb_error *err)
{
    struct gathered g = {.c = c, .wanted = lb_page_key(block, page)};
    struct lb_scratch *s;

    if (block >= c->n_blocks || page >= c->blocks[block].n_pages ||
        !(c->map[block][page] & LB_ENTRY_STORED))
        return lb_fail(err, LB_E_INTERNAL, "%s stores no page %llu of block %u", c->files[0].name,
                       (unsigned long long)page, block);
    uint64_t e = c->map[block][page];
    if (e & LB_ENTRY_XOR)
        g.wanted_base = chunk_of(base_of(c, lb_entry_file(e), g.wanted));
    if (chunk_get(c, lb_entry_file(e), lb_entry_part(e), &g.chunk, err) < 0)
        return -1;
    const char *fault = ref_fault(g.chunk, g.wanted, lb_entry_slot(e), e & LB_ENTRY_XOR);
    if (fault) {
        chunk_put(c, g.chunk);
        return lb_chain_damaged(c, lb_entry_file(e), lb_entry_part(e), fault, err);
    }
    gather_table(&g);
    gather_around(&g);
    qsort(g.v, g.n, sizeof(g.v[0]), by_key);
    int rc = -1;
    s = lb_scratch_get(c, err);
    if (s) {
        rc = lb_chunk_give(c, s, g.chunk, g.v, g.n, g.wanted, fn, arg, err);
        lb_scratch_put(c, s);
    }
    chunk_put(c, g.chunk);
    return rc;
}
