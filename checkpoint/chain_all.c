/* checkpoint/chain_all.c - every page of a checkpoint, as fast as the disk gives it.
 *
 * A list of all populated pages is sorted by where they are (by file and chunk; a counting sort
 * over the map, so pages of one chunk stay in ascending order).  Workers then take windows from it,
 * a few megabytes of neighbouring chunks: one read, then unpack and give.  While one worker unpacks
 * others read, so that neither the disk nor a processor waits.
 *
 * The files go from the bottom up.  A window begins and ends with a chunk that is needed; chunks in
 * between that nobody needs are read along when they are few, and not unpacked. */
#include "checkpoint/reader_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

enum {
    WINDOW_BYTES = 2 << 20,    /* of a read; a single chunk may be more */
    MAX_GAP_BYTES = 256 << 10, /* chunks nobody needs, read along */
    DIRECT_ALIGN = 4096,
    MAX_THREADS = 64,
    CHECK_EVERY = 64, /* chunks between two looks at the cancel fd */
};

struct window {
    unsigned file;
    uint32_t first, end; /* chunks */
};

struct all {
    struct lb_chain *c;
    const struct lb_chain_read_all *r;
    /* constant */
    uint64_t *keys;   /* of all populated pages, by file and chunk */
    uint64_t **begin; /* of each file: n_chunks + 1, where a chunk's keys begin */
    int *direct;      /* of each file: O_DIRECT, -1: not */
    /* under lock */
    pthread_mutex_t lock;
    unsigned left; /* files; the next window is in number left - 1, from part on */
    uint32_t part;
    bool failed;
    struct lb_error err;
};

struct worker {
    struct all *a;
    struct lb_scratch *s;
    struct lb_cf_chunk chunk;
    struct lb_page_ref *refs;
    uint64_t n_refs; /* room for */
    uint8_t *buf;
    size_t buf_cap;
};

/* ---------------------------------------------------------------- the list */

static void count_pages(struct all *a)
{
    const struct lb_chain *c = a->c;
    for (unsigned b = 0; b < c->n_blocks; b++)
        for (uint64_t i = 0; i < c->blocks[b].n_pages; i++) {
            uint64_t e = c->map[b][i];
            if (e & LB_ENTRY_STORED)
                a->begin[lb_entry_file(e)][lb_entry_part(e)]++;
        }
}

static void place_pages(struct all *a)
{
    const struct lb_chain *c = a->c;
    for (unsigned b = 0; b < c->n_blocks; b++)
        for (uint64_t i = 0; i < c->blocks[b].n_pages; i++) {
            uint64_t e = c->map[b][i];
            if (e & LB_ENTRY_STORED)
                a->keys[a->begin[lb_entry_file(e)][lb_entry_part(e)]++] = lb_page_key(b, i);
        }
}

static int make_list(struct all *a, struct lb_error *err)
{
    const struct lb_chain *c = a->c;
    uint64_t sum = 0, n;

    a->begin = lb_alloc(c->n_files * sizeof(*a->begin));
    for (unsigned f = 0; f < c->n_files; f++)
        if (!(a->begin[f] =
                  lb_try_alloc((c->files[f].n_chunks + UINT64_C(1)) * sizeof(**a->begin), err)))
            return -1;
    count_pages(a);
    for (unsigned f = 0; f < c->n_files; f++)
        for (uint32_t p = 0; p <= c->files[f].n_chunks; p++) {
            n = a->begin[f][p];
            a->begin[f][p] = sum;
            sum += n;
        }
    if (!(a->keys = lb_try_alloc(sum * sizeof(*a->keys), err)))
        return -1;
    place_pages(a);
    /* placing has moved every beginning to its end, the next one's beginning */
    for (unsigned f = 0; f < c->n_files; f++) {
        uint64_t *v = a->begin[f], n_parts = c->files[f].n_chunks;
        memmove(v + 1, v, n_parts * sizeof(*v));
        v[0] = f ? a->begin[f - 1][c->files[f - 1].n_chunks] : 0;
    }
    return 0;
}

/* ---------------------------------------------------------------- windows */

static bool wanted_page(const struct all *a, uint64_t key)
{
    return !a->r->skip || !a->r->skip(lb_key_block(key), lb_key_page(key), a->r->arg);
}

static bool wanted_chunk(const struct all *a, unsigned file, uint32_t part)
{
    for (uint64_t i = a->begin[file][part]; i < a->begin[file][part + 1]; i++)
        if (wanted_page(a, a->keys[i]))
            return true;
    return false;
}

/* From `part` on in w->file. */
static bool window_in_file(const struct all *a, struct window *w, uint32_t part)
{
    const struct lb_cf_file *f = &a->c->files[w->file];
    while (part < f->n_chunks && !wanted_chunk(a, w->file, part))
        part++;
    w->first = part;
    if (part == f->n_chunks)
        return false;
    w->end = ++part;
    for (; part < f->n_chunks; part++) {
        if (f->chunk_at[part + 1] - f->chunk_at[w->first] > WINDOW_BYTES ||
            f->chunk_at[part] - f->chunk_at[w->end] > MAX_GAP_BYTES)
            break;
        if (wanted_chunk(a, w->file, part))
            w->end = part + 1;
    }
    return true;
}

static bool next_window(struct all *a, struct window *w)
{
    bool found = false;
    pthread_mutex_lock(&a->lock);
    while (!a->failed && !found && a->left > 0) {
        w->file = a->left - 1;
        found = window_in_file(a, w, a->part);
        a->part = found ? w->end : 0;
        a->left -= !found;
    }
    pthread_mutex_unlock(&a->lock);
    return found;
}

static int fail_all(struct all *a, const struct lb_error *err)
{
    pthread_mutex_lock(&a->lock);
    if (!a->failed) {
        a->failed = true;
        a->err = *err;
    }
    pthread_mutex_unlock(&a->lock);
    return -1;
}

static int may_go_on(struct all *a, struct lb_error *err)
{
    if (lb_readable(a->r->cancel_fd, 0))
        return lb_fail(err, LB_E_CANCELLED, "cancelled");
    pthread_mutex_lock(&a->lock);
    bool failed = a->failed;
    pthread_mutex_unlock(&a->lock);
    return failed ? -1 : 0;
}

/* ---------------------------------------------------------------- reading */

/* Bytes [from, to) of the file; *data points at `from`. O_DIRECT wants whole sectors, so a little
 * more is read then. */
static int read_window(struct worker *w, unsigned file, uint64_t from, uint64_t to, uint8_t **data,
                       struct lb_error *err)
{
    const struct lb_cf_file *f = &w->a->c->files[file];
    int direct = w->a->direct[file];
    struct lb_error why = LB_ERROR_INIT;
    uint64_t start = from / DIRECT_ALIGN * DIRECT_ALIGN,
             end = (to + DIRECT_ALIGN - 1) / DIRECT_ALIGN * DIRECT_ALIGN;

    if (end - start > w->buf_cap) {
        free(w->buf);
        w->buf_cap = LB_MAX(end - start, (uint64_t)WINDOW_BYTES + 2 * DIRECT_ALIGN);
        if (posix_memalign((void **)&w->buf, DIRECT_ALIGN, w->buf_cap) != 0) {
            w->buf = NULL;
            w->buf_cap = 0;
            return lb_fail(err, LB_E_NO_SPACE, "no memory to read a checkpoint: %llu bytes",
                           (unsigned long long)(end - start));
        }
    }
    *data = w->buf + (from - start);
    /* some file systems accept O_DIRECT when opening and refuse it when reading */
    if (direct >= 0 && lb_cf_pread(direct, f->name, w->buf, end - start, start, &why) == 0)
        return 0;
    if (direct >= 0 && why.sys_errno != EINVAL) {
        if (err)
            *err = why;
        return -1;
    }
    if (lb_cf_pread(f->fd, f->name, w->buf, end - start, start, err) < 0)
        return -1;
    if (w->a->r->dont_cache)
        posix_fadvise(f->fd, (off_t)start, (off_t)(end - start), POSIX_FADV_DONTNEED);
    return 0;
}

static int give_chunk(struct worker *w, unsigned file, uint32_t part, void *raw,
                      struct lb_error *err)
{
    struct all *a = w->a;
    uint64_t n = a->begin[file][part + 1] - a->begin[file][part];
    unsigned n_refs = 0;

    if (n > w->n_refs) {
        free(w->refs);
        w->n_refs = 0;
        w->refs = lb_try_alloc(n * sizeof(*w->refs), err);
        if (!w->refs)
            return -1;
        w->n_refs = n;
    }
    for (uint64_t i = a->begin[file][part]; i < a->begin[file][part + 1]; i++) {
        uint64_t key = a->keys[i], e = a->c->map[lb_key_block(key)][lb_key_page(key)];
        if (wanted_page(a, key))
            w->refs[n_refs++] = (struct lb_page_ref){
                .key = key, .slot = lb_entry_slot(e), .is_xor = e & LB_ENTRY_XOR};
    }
    if (n_refs == 0)
        return 0;
    const struct lb_cf_file *f = &a->c->files[file];
    if (lb_scratch_grow(&w->chunk.body, &w->chunk.cap, lb_cf_chunk_bytes(f), err) < 0)
        return -1;
    w->chunk.file = file;
    const char *fault = lb_cf_chunk_unpack(f, a->c->blocks, part, raw, &w->chunk, w->s->z);
    if (fault)
        return lb_chain_damaged(a->c, file, part, fault, err);
    return lb_chunk_give(a->c, w->s, &w->chunk, w->refs, n_refs, w->refs[0].key, a->r->fn,
                         a->r->arg, err);
}

static int do_window(struct worker *w, const struct window *win, struct lb_error *err)
{
    const struct lb_cf_file *f = &w->a->c->files[win->file];
    uint64_t from = f->chunk_at[win->first];
    uint32_t last = win->end - 1;
    uint8_t *data = NULL;

    if (read_window(w, win->file, from, f->chunk_at[last] + lb_cf_chunk_raw_bytes(f, last), &data,
                    err) < 0)
        return -1;
    for (uint32_t p = win->first; p < win->end; p++) {
        if ((p - win->first) % CHECK_EVERY == 0 &&
            may_go_on(w->a, err) < 0)
            return -1;
        if (give_chunk(w, win->file, p, data + (f->chunk_at[p] - from), err) < 0)
            return -1;
    }
    return 0;
}

static void *work(void *arg)
{
    struct worker w = {.a = arg};
    struct lb_error err = LB_ERROR_INIT;
    struct window win;

    w.s = lb_scratch_get(w.a->c, &err);
    if (!w.s)
        fail_all(w.a, &err);
    while (w.s && next_window(w.a, &win))
        if (do_window(&w, &win, &err) < 0)
            fail_all(w.a, &err);
    if (w.s)
        lb_scratch_put(w.a->c, w.s);
    free(w.chunk.body);
    free(w.refs);
    free(w.buf);
    return NULL;
}

/* By the descriptor that is open, not by name: another file may have the name by now. Refused: no
 * O_DIRECT there. */
static void open_direct(struct all *a)
{
    a->direct = lb_alloc(a->c->n_files * sizeof(*a->direct));
    for (unsigned i = 0; i < a->c->n_files; i++) {
        char path[64];
        snprintf(path, sizeof(path), "/proc/self/fd/%d", a->c->files[i].fd);
        a->direct[i] = a->r->dont_cache ? open(path, O_RDONLY | O_CLOEXEC | O_DIRECT) : -1;
    }
}

static void run_workers(struct all *a, unsigned n)
{
    pthread_t th[MAX_THREADS];
    unsigned started = 0;
    /* the calling thread is one of them, so that it is enough when no other can be started */
    while (started + 1 < n && pthread_create(&th[started], NULL, work, a) == 0)
        started++;
    work(a);
    for (unsigned i = 0; i < started; i++)
        pthread_join(th[i], NULL);
}

static unsigned n_threads(const struct lb_chain_read_all *r)
{
    long n = r->threads ? (long)r->threads : sysconf(_SC_NPROCESSORS_ONLN);
    return (unsigned)LB_MAX(1, LB_MIN(n, MAX_THREADS));
}

int lb_chain_read_all(struct lb_chain *c, const struct lb_chain_read_all *r, struct lb_error *err)
{
    struct all a = {.c = c, .r = r, .left = c->n_files, .lock = PTHREAD_MUTEX_INITIALIZER};
    int rc = make_list(&a, err);

    if (rc == 0) {
        open_direct(&a);
        run_workers(&a, n_threads(r));
        for (unsigned i = 0; i < c->n_files; i++)
            lb_cleanup_fd(&a.direct[i]);
        rc = a.failed ? -1 : 0;
        if (a.failed && err)
            *err = a.err;
    }
    for (unsigned i = 0; a.begin && i < c->n_files; i++)
        free(a.begin[i]);
    free(a.begin);
    free(a.keys);
    free(a.direct);
    return rc;
}
