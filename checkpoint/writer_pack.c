/* checkpoint/writer_pack.c - from pages to chunks: the workers of a writer.
 *
 * A worker takes a put, decides of each page what it is, and moves those that have to be stored together: at
 * the beginning of the put's own buffer, which then is a chunk, or behind those of the chunk the worker has
 * open.  A put of which every page is stored is never copied.  A full chunk is compressed and given to the file. */
#include "checkpoint/writer_internal.h"

#include <errno.h>
#include <string.h>
#include <zstd.h>

#include "netproto/netproto.h"

enum {
    MAX = LB_CKPT_CHUNK_PAGES,
    OWN_CHUNK = MAX * 3 / 4, /* so many pages are a chunk, rather than copied behind others */
    LINE_WORDS = 8,          /* a line of 64 bytes */
    PAGE_LINES = LB_PAGE_SIZE / 8 / LINE_WORDS,
    DELTA_LINES = PAGE_LINES / 4, /* a page is stored as a difference when at most so many lines differ */
    MAX_SKIP = 15,           /* while differences do not pay, so many puts in a row do without trying */
};
#define CHUNK_BYTES (MAX * (sizeof(struct lb_cf_page) + LB_PAGE_SIZE))

enum fate { STORE, ZERO, UNCHANGED, SAME };

/* A put at work */
struct put {
    struct lb_wbuf *b;
    enum fate fate[MAX];
    uint8_t hash[MAX][16];
    bool comparable[MAX]; /* the parent has it whole */
    uint8_t to_slot[MAX];
    bool to_open[MAX];
};

struct lb_packer {
    struct lb_ckpt_writer *w;
    pthread_t thread;
    bool started;
    ZSTD_CCtx *zstd;
    uint8_t *packed;      /* CHUNK_BYTES */
    struct lb_wbuf *open; /* the chunk that is not full; NULL none */
    struct put put;
    uint64_t diff[LB_PAGE_SIZE / 8];
    unsigned skip_step, skip_left; /* of differences */
    bool warned;
};

static uint8_t *data_of(struct lb_wbuf *b, unsigned slot)
{
    return (uint8_t *)b + LB_PAGE_SIZE + (size_t)slot * LB_PAGE_SIZE;
}

static void release(struct lb_ckpt_writer *w, struct lb_wbuf *b)
{
    pthread_mutex_lock(&w->lock);
    b->next = w->unused;
    w->unused = b;
    pthread_cond_signal(&w->room);
    pthread_mutex_unlock(&w->lock);
}

/* ------------------------------------------------------------------- what a page is */

static void classify(struct lb_ckpt_writer *w, struct put *t)
{
    struct lb_wbuf *b = t->b;
    uint8_t parents[16];

    for (unsigned i = 0; i < b->n; i++) {
        const uint8_t *page = data_of(b, i);
        bool zero = lb_is_zero(page, LB_PAGE_SIZE), whole = false, parent_has = false;

        if (!zero)
            lb_cf_hash(t->hash[i], page, LB_PAGE_SIZE, w->seed);
        if (w->compare)
            parent_has = lb_chain_hash(w->parent, b->block, b->page[i], parents, &whole);
        t->fate[i] = zero ? ZERO : STORE;
        if (w->compare && zero == !parent_has && (zero || !memcmp(parents, t->hash[i], sizeof(parents))))
            t->fate[i] = UNCHANGED;
        t->comparable[i] = parent_has && whole && t->fate[i] == STORE;
        b->kind[i] = LB_CF_WHOLE;
    }
}

/* ---------------------------------------------------------------------- differences */

/* diff = a XOR b; the number of lines that differ. */
static unsigned difference(uint64_t *diff, const void *a, const void *b)
{
    unsigned lines = 0;
    for (unsigned l = 0; l < PAGE_LINES; l++) {
        uint64_t x[LINE_WORDS], y[LINE_WORDS], any = 0;
        memcpy(x, (const uint8_t *)a + l * sizeof(x), sizeof(x));
        memcpy(y, (const uint8_t *)b + l * sizeof(y), sizeof(y));
        for (unsigned i = 0; i < LINE_WORDS; i++)
            any |= diff[l * LINE_WORDS + i] = x[i] ^ y[i];
        lines += any != 0;
    }
    return lines;
}

/* Pages of the parent, of a chunk that has one we asked for. */
static int compare_pages(unsigned block, uint64_t first, uint64_t count, const void *data, void *arg,
                         struct lb_error *err)
{
    struct lb_packer *p = arg;
    struct put *t = &p->put;

    (void)err;
    for (unsigned i = 0; i < t->b->n && block == t->b->block; i++) {
        uint64_t page = t->b->page[i];
        if (!t->comparable[i] || page < first || page - first >= count)
            continue;
        uint8_t *ours = data_of(t->b, i);
        t->comparable[i] = false; /* it has been */
        if (difference(p->diff, ours, (const uint8_t *)data + (page - first) * LB_PAGE_SIZE) > DELTA_LINES)
            continue;
        memcpy(ours, p->diff, LB_PAGE_SIZE);
        t->b->kind[i] = LB_CF_XOR;
    }
    return 0;
}

/* Turn into differences what is smaller as one. That costs reading the parent's chunks, so while it does not pay it is
 * not tried every time. */
static void make_differences(struct lb_packer *p)
{
    struct put *t = &p->put;
    struct lb_error why = LB_ERROR_INIT;
    bool tried = false, paid = false;

    if (!p->w->compare)
        return;
    if (p->skip_left > 0) {
        p->skip_left--;
        return;
    }
    for (unsigned i = 0; i < t->b->n; i++) {
        if (!t->comparable[i])
            continue;
        tried = true;
        if (lb_chain_read(p->w->parent, t->b->block, t->b->page[i], compare_pages, p, &why) < 0 && !p->warned) {
            lb_log(LB_LOG_WARN, "pages are stored whole: the parent cannot be read: %s", why.message);
            p->warned = true;
        }
        t->comparable[i] = false;
        paid = paid || t->b->kind[i] == LB_CF_XOR;
    }
    if (tried) {
        p->skip_step = paid ? 0 : LB_MIN(p->skip_step * 2 + 1, (unsigned)MAX_SKIP);
        p->skip_left = p->skip_step;
    }
}

/* ----------------------------------------------------------------------- its place */

static void count_page(struct lb_ckpt_stats *s, enum fate f, bool delta)
{
    s->pages++;
    s->raw_bytes += LB_PAGE_SIZE;
    s->zero_pages += f == ZERO;
    s->unchanged_pages += f == UNCHANGED;
    s->same_pages += f == SAME;
    s->delta_pages += f == STORE && delta;
    s->stored_pages += f == STORE && !delta;
}

/* Differences are never shared: each is of its own page. */
static lb_loc find_same(struct lb_widx *x, struct put *t, unsigned i)
{
    if (t->fate[i] != STORE || t->b->kind[i] == LB_CF_XOR)
        return LB_LOC_NONE;
    return lb_widx_find(x, t->hash[i]);
}

/* Page i gets the next slot of `to`, which may be its own buffer. */
static lb_loc add_to_chunk(struct lb_widx *x, struct lb_wbuf *to, unsigned slot, const struct put *t, unsigned i)
{
    bool delta = t->b->kind[i] == LB_CF_XOR;

    if (slot == 0)
        to->serial = lb_widx_open_chunk(x);
    lb_loc loc = LB_LOC(delta ? LB_LOC_XOR : LB_LOC_WHOLE, to->serial, slot);
    memcpy(lb_widx_chunk(x, to->serial)->hash[slot], t->hash[i], 16);
    if (!delta)
        lb_widx_add(x, t->hash[i], loc);
    to->page[slot] = t->b->page[i];
    to->kind[slot] = t->b->kind[i];
    return loc;
}

/* True when what has to be stored of this put goes behind the pages of the open chunk. */
static bool joins_open(struct lb_packer *p, struct put *t)
{
    unsigned n = 0;
    for (unsigned i = 0; i < t->b->n; i++)
        n += t->fate[i] == STORE && find_same(p->w->index, t, i) == LB_LOC_NONE;
    return p->open && p->open->block == t->b->block && (p->open->n + n <= MAX || n < OWN_CHUNK);
}

/* What each page is, in the index; where those that are stored go, in t. Returns how many stay in the put's buffer. */
static unsigned place_pages(struct lb_packer *p, struct put *t)
{
    struct lb_widx *x = p->w->index;
    struct lb_wbuf *b = t->b;
    unsigned n_own = 0;

    pthread_mutex_lock(&x->lock);
    bool join = joins_open(p, t);
    for (unsigned i = 0; i < b->n; i++) {
        uint32_t page = b->page[i]; /* its place in b may be another's in a moment */
        lb_loc loc = find_same(x, t, i);
        if (loc != LB_LOC_NONE) {
            t->fate[i] = SAME;
        } else if (t->fate[i] == STORE) {
            t->to_open[i] = join && p->open->n < MAX;
            t->to_slot[i] = (uint8_t)(t->to_open[i] ? p->open->n++ : n_own++);
            loc = add_to_chunk(x, t->to_open[i] ? p->open : b, t->to_slot[i], t, i);
        } else if (t->fate[i] == ZERO) {
            loc = LB_LOC(LB_LOC_ZERO, 0, 0);
        }
        count_page(&p->w->stats, t->fate[i], LB_LOC_KIND(loc) == LB_LOC_XOR);
        lb_widx_set(x, b->block, page, b->seq, loc);
    }
    pthread_mutex_unlock(&x->lock);
    return n_own;
}

/* In ascending order: nothing is overwritten before it has been moved. */
static void move_pages(struct lb_packer *p, struct put *t)
{
    for (unsigned i = 0; i < t->b->n; i++) {
        if (t->fate[i] != STORE)
            continue;
        uint8_t *to = data_of(t->to_open[i] ? p->open : t->b, t->to_slot[i]);
        if (to != data_of(t->b, i))
            memcpy(to, data_of(t->b, i), LB_PAGE_SIZE);
    }
}

/* --------------------------------------------------------------------------- chunks */

/* The page table, right before the pages: table and pages are one piece. */
static uint8_t *make_body(struct lb_wbuf *b, size_t *len)
{
    struct lb_cf_page *table = (struct lb_cf_page *)(void *)(data_of(b, 0) - b->n * sizeof(*table));
    for (unsigned i = 0; i < b->n; i++)
        table[i] = (struct lb_cf_page){htole32(b->block), htole32(b->kind[i]), htole64(b->page[i])};
    *len = b->n * (sizeof(*table) + LB_PAGE_SIZE);
    return (uint8_t *)table;
}

/* The chunk to the file. Its buffer is released. */
static void seal_chunk(struct lb_packer *p, struct lb_wbuf *b)
{
    struct lb_ckpt_writer *w = p->w;
    struct lb_error why = LB_ERROR_INIT;
    struct lb_out_place place;
    size_t len;
    uint8_t *body = make_body(b, &len);
    /* The room is what may be used at most: zstd stops when it is full. */
    size_t n = ZSTD_compress2(p->zstd, p->packed, len - len / 16, body, len);
    bool packed = !ZSTD_isError(n);
    struct lb_cf_part head = {
        .magic = htole32(LB_CF_PART_MAGIC),
        .kind = htole32(LB_CF_PAGES),
        .flags = htole32(packed ? LB_CF_ZSTD : 0),
        .stored_bytes = htole32((uint32_t)(packed ? n : len)),
        .unpacked_bytes = htole32((uint32_t)len),
        .n_pages = htole32(b->n),
        .table_bytes = htole32((uint32_t)(b->n * sizeof(struct lb_cf_page))),
    };

    if (lb_out_part(w->out, &w->seal, &head, packed ? p->packed : body, &place, &why) < 0) {
        lb_writer_fail(w, &why);
    } else {
        pthread_mutex_lock(&w->index->lock);
        lb_widx_chunk(w->index, b->serial)->part = place.number;
        pthread_mutex_unlock(&w->index->lock);
    }
    release(w, b);
}

static void seal_open(struct lb_packer *p)
{
    seal_chunk(p, LB_STEAL_PTR(p->open));
}

static void pack(struct lb_packer *p, struct lb_wbuf *b)
{
    struct put *t = &p->put;

    t->b = b;
    classify(p->w, t);
    make_differences(p);
    unsigned n_own = place_pages(p, t);
    move_pages(p, t);
    b->n = n_own;

    if (p->open && p->open->n == MAX)
        seal_open(p);
    if (b->n == 0) {
        release(p->w, b);
    } else if (b->n == MAX || (p->open && b->n >= OWN_CHUNK)) {
        seal_chunk(p, b);
    } else {
        if (p->open)
            seal_open(p);
        p->open = b;
    }
}

/* -------------------------------------------------------------------------- threads */

/* One thing to do, the queue's lock held (and given away meanwhile). False: nothing to do now. */
static bool work_once(struct lb_packer *p)
{
    struct lb_ckpt_writer *w = p->w;
    bool had_open = p->open;
    struct lb_wbuf *b = w->first;

    if (b) {
        w->first = b->next;
        if (!w->first)
            w->last = &w->first;
    } else if (!p->open || !(w->flushing || w->failed)) {
        return false;
    }
    bool failed = w->failed;
    w->n_busy++;
    pthread_mutex_unlock(&w->lock);

    if (failed && (b || p->open))
        release(w, b ? b : LB_STEAL_PTR(p->open));
    else if (b)
        pack(p, b);
    else
        seal_open(p);

    pthread_mutex_lock(&w->lock);
    w->n_busy--;
    w->n_open += (p->open ? 1u : 0u) - (had_open ? 1u : 0u);
    return true;
}

static void *run(void *arg)
{
    struct lb_packer *p = arg;
    struct lb_ckpt_writer *w = p->w;

    pthread_mutex_lock(&w->lock);
    for (;;) {
        while (work_once(p))
            ;
        if (w->n_busy == 0 && !w->first)
            pthread_cond_broadcast(&w->idle);
        if (w->stopping)
            break;
        pthread_cond_wait(&w->work, &w->lock);
    }
    pthread_mutex_unlock(&w->lock);
    return NULL;
}

static int start_one(struct lb_ckpt_writer *w, struct lb_packer *p, struct lb_error *err)
{
    p->w = w;
    p->zstd = ZSTD_createCCtx();
    p->packed = malloc(CHUNK_BYTES);
    if (!p->zstd || !p->packed)
        return lb_fail_errno(err, LB_E_NO_SPACE, ENOMEM, "no memory to compress");
    if (ZSTD_isError(ZSTD_CCtx_setParameter(p->zstd, ZSTD_c_compressionLevel, w->level)))
        return lb_fail(err, LB_E_USAGE, "zstd has no level %d", w->level);
    int e = pthread_create(&p->thread, NULL, run, p);
    if (e != 0)
        return lb_fail_errno(err, LB_E_INTERNAL, e, "cannot start a thread");
    p->started = true;
    return 0;
}

int lb_packers_start(struct lb_ckpt_writer *w, struct lb_error *err)
{
    w->workers = lb_alloc(w->n_workers * sizeof(*w->workers));
    for (unsigned i = 0; i < w->n_workers; i++)
        if (start_one(w, &w->workers[i], err) < 0)
            return -1;
    return 0;
}

void lb_packers_stop(struct lb_ckpt_writer *w)
{
    pthread_mutex_lock(&w->lock);
    w->stopping = true;
    pthread_cond_broadcast(&w->work);
    pthread_mutex_unlock(&w->lock);
    for (unsigned i = 0; w->workers && i < w->n_workers; i++) {
        struct lb_packer *p = &w->workers[i];
        if (p->started)
            pthread_join(p->thread, NULL);
        ZSTD_freeCCtx(p->zstd);
        free(p->packed);
    }
    free(w->workers);
    w->workers = NULL;
}
