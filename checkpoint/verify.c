/* checkpoint/verify.c - everything of one file, said by name.
 *
 * Header, trailer, part table, index and hashes first: without these nothing else can be told, so
 * damage there ends it. Then chunk after chunk in the order of the file; a damaged one is named and
 * the next one looked at.
 *
 * A difference is checked as it is in the file.  What it becomes takes the parents: that is
 * lb_chain_verify's, which reads just these pages. */
#include "checkpoint/reader_internal.h"

#include <fcntl.h>
#include <string.h>

enum { FORGET_BYTES = 16 << 20 }; /* read once, so it need not stay in the host's page cache */

struct verify {
    struct lb_cf_file f;
    bool deep;
    void (*found)(const char *what, void *arg);
    int (*tick)(uint64_t done_bytes, void *arg);
    void *arg;
    struct lb_error first;
    struct lb_cf_index ix;
    void *hash_buf;
    uint64_t seed;
    const uint8_t (*hashes)[16];
    uint64_t *hash_at; /* of each run: its first hash */
    uint64_t *begin,
        *runs; /* run numbers by chunk: those of chunk p are runs[begin[p]..begin[p + 1]) */
    uint64_t stored_pages;
    ZSTD_DCtx *z;
    uint8_t *raw;
    size_t raw_cap;
    struct lb_cf_chunk chunk;
};

static void note(struct verify *v, const struct lb_error *why)
{
    if (v->first.code == LB_OK)
        v->first = *why;
    if (v->found)
        v->found(why->message, v->arg);
}

static void note_chunk(struct verify *v, uint32_t part, const char *fault)
{
    struct lb_error why = LB_ERROR_INIT;
    struct lb_cf_run_host r;
    uint64_t first = UINT64_MAX, last = 0;
    unsigned block = 0;

    for (uint64_t i = v->begin[part]; i < v->begin[part + 1]; i++) {
        lb_cf_run_at(&v->ix, v->runs[i], &r);
        if (first == UINT64_MAX)
            block = r.block;
        if (r.block == block) {
            first = LB_MIN(first, r.first);
            last = LB_MAX(last, r.first + r.count - 1);
        }
    }
    if (first == UINT64_MAX)
        lb_fail(&why, LB_E_PROTO, "%s: part %u (no page of use) is damaged: %s", v->f.name, part,
                fault);
    else
        lb_fail(&why, LB_E_PROTO, "%s: part %u (pages %llu-%llu of %s) is damaged: %s", v->f.name,
                part, (unsigned long long)first, (unsigned long long)last, v->ix.blocks[block].name,
                fault);
    note(v, &why);
}

/* ---------------------------------------------------------------- what the chunks are compared
 * with */

static int load_hashes(struct verify *v, struct lb_error *err)
{
    size_t len, want = sizeof(v->seed) + v->ix.n_stored * 16;
    if (lb_cf_section(&v->f, LB_CF_HASHES, want, &v->hash_buf, &len, err) < 0)
        return -1;
    if (len != want)
        return lb_fail(err, LB_E_PROTO, "%s is damaged: the number of its hashes", v->f.name);
    memcpy(&v->seed, v->hash_buf, sizeof(v->seed));
    v->seed = le64toh(v->seed);
    v->hashes = (const uint8_t(*)[16])((const uint8_t *)v->hash_buf + sizeof(v->seed));
    return 0;
}

/* A counting sort: how many of each chunk, where they begin, then each into its place. */
static int sort_runs(struct verify *v, struct lb_error *err)
{
    struct lb_cf_run_host r;
    uint64_t hash = 0;

    v->begin = lb_try_alloc((v->f.n_chunks + UINT64_C(2)) * sizeof(*v->begin), err);
    v->runs = lb_try_alloc(v->ix.n_runs * sizeof(*v->runs), err);
    v->hash_at = lb_try_alloc(v->ix.n_runs * sizeof(*v->hash_at), err);
    if (!v->begin || !v->runs || !v->hash_at)
        return -1;
    for (uint64_t i = 0; i < v->ix.n_runs; i++) {
        lb_cf_run_at(&v->ix, i, &r);
        v->hash_at[i] = hash;
        if (r.kind != LB_CF_RUN_ZERO) {
            v->begin[r.part + 2]++;
            hash += r.count;
        }
    }
    for (uint64_t p = 2; p < v->f.n_chunks + UINT64_C(2); p++)
        v->begin[p] += v->begin[p - 1];
    for (uint64_t i = 0; i < v->ix.n_runs; i++) {
        lb_cf_run_at(&v->ix, i, &r);
        if (r.kind != LB_CF_RUN_ZERO)
            v->runs[v->begin[r.part + 1]++] = i;
    }
    return 0;
}

/* ---------------------------------------------------------------- chunks */

static const char *check_page(const struct verify *v, const struct lb_cf_run_host *r, uint32_t k,
                              uint64_t hash)
{
    uint8_t is[16];
    unsigned block;
    uint32_t kind;
    uint64_t page;

    lb_cf_chunk_entry(&v->chunk, r->slot + k, &block, &kind, &page);
    if ((kind == LB_CF_XOR) != (r->kind == LB_CF_RUN_XOR))
        return "the index takes a difference for a page, or a page for one";
    if (kind == LB_CF_XOR)
        return block == r->block && page == r->first + k
                   ? NULL
                   : "the index takes a difference for another page's";
    lb_cf_hash(is, lb_cf_chunk_page(&v->chunk, r->slot + k), LB_PAGE_SIZE, v->seed);
    return memcmp(is, v->hashes[hash], sizeof(is)) == 0 ? NULL : "a page is not what its hash says";
}

static const char *check_pages(const struct verify *v, uint32_t part)
{
    struct lb_cf_run_host r;
    for (uint64_t i = v->begin[part]; i < v->begin[part + 1]; i++) {
        lb_cf_run_at(&v->ix, v->runs[i], &r);
        if (r.slot + r.count > v->chunk.n_pages)
            return "the index names a page that is not in it";
        for (uint32_t k = 0; v->deep && k < r.count; k++) {
            const char *fault = check_page(v, &r, k, v->hash_at[v->runs[i]] + k);
            if (fault)
                return fault;
        }
    }
    return NULL;
}

static bool all_zero(const uint8_t *p, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (p[i])
            return false;
    return true;
}

/* With the gap behind it. -1: cannot be read, or no memory. */
static int check_chunk(struct verify *v, uint32_t part, struct lb_error *err)
{
    const struct lb_cf_file *f = &v->f;
    size_t len = lb_cf_chunk_raw_bytes(f, part), whole = f->chunk_at[part + 1] - f->chunk_at[part];
    const char *fault;

    if (lb_scratch_grow(&v->raw, &v->raw_cap, whole, err) < 0 ||
        lb_cf_pread(f->fd, f->name, v->raw, whole, f->chunk_at[part], err) < 0)
        return -1;
    bool clean = all_zero(v->raw + len, whole - len);
    fault = lb_cf_chunk_unpack(f, v->ix.blocks, part, v->raw, &v->chunk, v->z);
    if (!fault) {
        v->stored_pages += v->chunk.n_pages;
        fault = check_pages(v, part);
    }
    if (!fault && !clean)
        fault = "there is something behind it";
    if (fault)
        note_chunk(v, part, fault);
    return 0;
}

static int check_chunks(struct verify *v, struct lb_error *err)
{
    const struct lb_cf_file *f = &v->f;
    uint64_t forgotten = 0;

    v->z = ZSTD_createDCtx();
    if (!v->z)
        return lb_fail(err, LB_E_NO_SPACE, "no memory for zstd");
    if (lb_scratch_grow(&v->chunk.body, &v->chunk.cap, lb_cf_chunk_bytes(f), err) < 0)
        return -1;
    posix_fadvise(f->fd, 0, 0, POSIX_FADV_SEQUENTIAL);
    for (uint32_t p = 0; p < f->n_chunks; p++) {
        if (check_chunk(v, p, err) < 0)
            return -1;
        if (v->tick && v->tick(f->chunk_at[p + 1], v->arg) < 0)
            return lb_fail(err, LB_E_CANCELLED, "%s: the verification was cancelled", f->name);
        if (f->chunk_at[p + 1] - forgotten >= FORGET_BYTES) {
            posix_fadvise(f->fd, (off_t)forgotten, (off_t)(f->chunk_at[p + 1] - forgotten),
                          POSIX_FADV_DONTNEED);
            forgotten = f->chunk_at[p + 1];
        }
    }
    if (v->first.code == LB_OK && v->stored_pages != f->trailer.stored_pages)
        return lb_fail(err, LB_E_PROTO,
                       "%s is damaged: its chunks do not have as many pages as its trailer says",
                       f->name);
    return 0;
}

/* ---------------------------------------------------------------- the rest */

/* Index, hashes, part table and meta have been read by now. */
static int check_sections(struct verify *v, struct lb_error *err)
{
    static const enum lb_cf_part_kind kinds[] = {LB_CF_HOT, LB_CF_STATE};
    const struct lb_cf_file *f = &v->f;
    struct lb_cf_part head;
    uint8_t gap[LB_CF_ALIGN];
    uint64_t at, end;

    for (size_t i = 0; i < LB_ARRAY_LEN(kinds); i++) {
        LB_AUTO_FREE void *buf = NULL;
        size_t len = 0;
        if (f->sections[kinds[i]].n &&
            lb_cf_section(f, kinds[i], LB_CF_MAX_META_BYTES, &buf, &len, err) < 0)
            return -1;
        if (kinds[i] == LB_CF_HOT && len % sizeof(uint64_t))
            return lb_fail(err, LB_E_PROTO, "%s is damaged: the number of its hot pages", f->name);
    }
    for (at = f->trailer.parts; at < f->trailer_at; at = lb_cf_align(end)) {
        if (lb_cf_pread(f->fd, f->name, &head, sizeof(head), at, err) < 0)
            return -1;
        end = at + sizeof(head) + le32toh(head.stored_bytes);
        if (lb_cf_pread(f->fd, f->name, gap, lb_cf_align(end) - end, end, err) < 0)
            return -1;
        if (!all_zero(gap, lb_cf_align(end) - end))
            return lb_fail(err, LB_E_PROTO,
                           "%s: part %u (%s) is damaged: there is something behind it", f->name,
                           le32toh(head.number), lb_cf_kind_name(le32toh(head.kind)));
    }
    return 0;
}

static int verify(struct verify *v, const char *path, const struct lb_ckpt_key *key,
                  struct lb_error *err)
{
    if (lb_cf_open(&v->f, path, key, err) < 0 || lb_cf_open_chunks(&v->f, err) < 0 ||
        lb_cf_index_load(&v->f, &v->ix, err) < 0 || load_hashes(v, err) < 0 ||
        sort_runs(v, err) < 0)
        return -1;
    int rc = check_chunks(v, err);
    struct lb_error why = LB_ERROR_INIT;
    if (check_sections(v, &why) < 0)
        note(v, &why);
    return rc;
}

int lb_ckpt_verify(const char *path, const struct lb_ckpt_key *key, bool deep,
                   void (*found)(const char *what, void *arg), void *arg, struct lb_error *err)
{
    return lb_ckpt_verify_watched(path, key, deep, found, NULL, arg, err);
}

int lb_ckpt_verify_watched(const char *path, const struct lb_ckpt_key *key, bool deep,
                           void (*found)(const char *what, void *arg),
                           int (*tick)(uint64_t done_bytes, void *arg), void *arg, struct lb_error *err)
{
    struct verify v = {.deep = deep, .found = found, .tick = tick, .arg = arg};
    struct lb_error why = LB_ERROR_INIT;

    if (verify(&v, path, key, &why) < 0)
        note(&v, &why);
    lb_cf_index_free(&v.ix);
    lb_cf_close(&v.f);
    ZSTD_freeDCtx(v.z);
    free(v.hash_buf);
    free(v.hash_at);
    free(v.begin);
    free(v.runs);
    free(v.raw);
    free(v.chunk.body);
    if (v.first.code == LB_OK)
        return 0;
    if (err)
        *err = v.first;
    return -1;
}

/* ---------------------------------------------------------------- differences, with the parents */

struct differences {
    struct lb_chain *c;
    uint64_t seed;
    void (*found)(const char *what, void *arg);
    void *arg;
    pthread_mutex_t lock; /* of what follows */
    struct lb_error first;
};

static bool no_difference(unsigned block, uint64_t page, void *arg)
{
    const struct differences *d = arg;
    return !(d->c->map[block][page] & LB_ENTRY_XOR);
}

static void note_page(struct differences *d, unsigned block, uint64_t page)
{
    const struct lb_cf_file *f = &d->c->files[lb_entry_file(d->c->map[block][page])];
    struct lb_error why = LB_ERROR_INIT;

    lb_fail(&why, LB_E_PROTO, "%s: page %llu of %s is not what its hash says", f->name,
            (unsigned long long)page, d->c->blocks[block].name);
    pthread_mutex_lock(&d->lock);
    if (d->first.code == LB_OK)
        d->first = why;
    if (d->found)
        d->found(why.message, d->arg);
    pthread_mutex_unlock(&d->lock);
}

static int compare_hashes(unsigned block, uint64_t first, uint64_t count, const void *data,
                          void *arg, struct lb_error *err)
{
    struct differences *d = arg;
    uint8_t want[16], is[16];
    bool whole;

    (void)err;
    for (uint64_t i = 0; i < count; i++) {
        lb_cf_hash(is, (const uint8_t *)data + i * LB_PAGE_SIZE, LB_PAGE_SIZE, d->seed);
        if (!lb_chain_hash(d->c, block, first + i, want, &whole) ||
            memcmp(is, want, sizeof(is)) != 0)
            note_page(d, block, first + i);
    }
    return 0;
}

int lb_chain_verify(struct lb_chain *c, void (*found)(const char *what, void *arg), void *arg,
                    int cancel_fd, struct lb_error *err)
{
    struct differences d = {
        .c = c, .found = found, .arg = arg, .lock = PTHREAD_MUTEX_INITIALIZER};
    struct lb_chain_read_all r = {.skip = no_difference,
                                  .fn = compare_hashes,
                                  .arg = &d,
                                  .cancel_fd = cancel_fd,
                                  .dont_cache = true};

    if (lb_chain_seed(c, &d.seed, err) < 0 || lb_chain_read_all(c, &r, err) < 0)
        return -1;
    if (d.first.code == LB_OK)
        return 0;
    if (err)
        *err = d.first;
    return -1;
}
