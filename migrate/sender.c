/*
 * migrate/sender.c - the source's bulk workers.
 *
 * A round is a set of dirty bitmaps. One worker per connection takes the next
 * chunk (CHUNK_PAGES pages of one block) from a shared cursor, so the load
 * balances itself also when the dirty pages are few and clustered:
 *
 *      cursor --> chunk --> peek: drop pages dirty again --> zero? --> record --> connection
 *
 * A page that the guest wrote again since the round began is in the next round
 * whatever we do now; not sending it twice is what makes a busy guest converge
 * earlier (Xen's and Lifeboat's `skip`). The last round runs without peek.
 *
 * Compression, when it is left to us, follows a model (tuner.h) fed with what the workers
 * see: waiting for the link, processor time per page, and samples of what zstd would give.
 *
 * An RDMA connection that breaks is replaced by a TCP one, in the middle of a round: the worker remembers
 * the chunks that it took in this round and sends them again. Rounds before were acknowledged.
 *
 * Threads: the engine thread calls everything but lb_sender_abort. Workers own
 * their connection while a round runs; between rounds the engine does.
 */
#include "migrate/sender.h"

#include "migrate/budget.h"
#include "migrate/direct.h"
#include "migrate/tuner.h"
#include "netproto/rdma.h"

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <time.h>

#define CHUNK_PAGES 256u
/* Registering costs as much as copying some of its pages, and populates it on the other side. */
#define WORTH_PAGES (LB_RDMA_CHUNK_PAGES / 4)
#define WINDOW_NS UINT64_C(50000000)
#define SAMPLE_EVERY 16 /* records between samples of a level that is not in use */

struct worker {
    struct lb_sender *s;
    struct lb_bulk *bulk;        /* replaced by the worker (or, between rounds, the engine) under mu */
    pthread_t thread;
    bool started;
    unsigned index;
    struct lb_bulk_stats before; /* of connections that were replaced; locked by mu */
    /* worker only */
    uint64_t *taken;             /* chunks of this round, if the connection can be replaced */
    size_t n_taken, max_taken;
    uint64_t done, skipped;      /* pages of this round, as counted in the sender's */
    uint8_t *bounce;             /* LB_REC_MAX_PAGES pages, for blocks without a view */
    struct lb_bitmap peeked;     /* CHUNK_PAGES bits */
    uint32_t block;              /* of the records being filled */
    struct lb_page_run runs[LB_REC_MAX_PAGES], zruns[LB_REC_MAX_PAGES];
    struct iovec iov[LB_REC_MAX_PAGES];
    unsigned n_runs, n_pages, n_zruns, n_zpages;
    struct lb_direct *direct;    /* with zero copy */
    bool direct_now;             /* the record being filled goes this way */
    unsigned records;
    unsigned sample;             /* level index to try on the record being filled; 0: none */
    unsigned max_pages;          /* of the record being filled */
};

struct lb_sender {
    /* immutable */
    struct lb_hv_vm *vm;
    const struct lb_ram_block *blocks;
    struct lb_bitmap *dirty;
    unsigned n_blocks, n_workers;
    int fixed_level;             /* < 0: tuner */
    struct worker *workers;
    int (*reconnect)(unsigned index, struct lb_bulk **out, struct lb_error *err, void *arg);
    void *reconnect_arg;

    /* locked by mu */
    unsigned replaced;
    pthread_mutex_t mu;
    pthread_cond_t cond;
    uint64_t generation;         /* of the round; workers run one per generation */
    unsigned busy;
    bool quit, failed;
    struct lb_error error;

    /* set before a generation starts, then read only */
    uint32_t round;
    bool peek;
    uint64_t unit_pages;         /* of what a worker takes at once: CHUNK_PAGES, or a chunk to register */
    uint64_t n_chunks;
    uint64_t *block_chunk0;      /* first chunk number of each block; n_blocks + 1 */

    struct lb_budget budget;     /* atomic */
    _Atomic uint64_t cursor, done_pages, skipped_pages, moved_pages;
    _Atomic uint64_t limited_ns;  /* slept for the bandwidth limit, all workers */
    atomic_bool aborted;
    _Atomic unsigned level;      /* index, see tuner.h; follows the tuner unless fixed */
    bool tuning;                 /* engine thread */
    struct lb_tuner tuner;       /* locked by mu */
    /* engine thread: where the last look at the totals was, and what came since */
    struct totals {
        uint64_t ns, blocked_ns, pages, wire_bytes;
    } last, window;
};

static void fail(struct lb_sender *s, const struct lb_error *err)
{
    pthread_mutex_lock(&s->mu);
    if (!s->failed) {
        s->failed = true;
        s->error = *err;
    }
    pthread_mutex_unlock(&s->mu);
    lb_sender_abort(s);
}

/* Account for bytes just sent and sleep until the limit allows more. */
static void limit(struct lb_sender *s, uint64_t bytes)
{
    /* while the guest stands still no other goes first */
    uint64_t until = lb_budget_take(&s->budget, bytes, !s->peek), now = lb_now_ns(), from = now;

    /* 5 ms of credit, so that short sleeps do not cost throughput; in slices, so that a low
     * limit does not hold up a cancel */
    while (until > now + 5000000u && !atomic_load(&s->aborted)) {
        uint64_t wake = LB_MIN(until - 5000000u, now + 50000000u);
        struct timespec ts = {(time_t)(wake / 1000000000u), (long)(wake % 1000000000u)};

        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &ts, NULL);
        now = lb_now_ns();
    }
    atomic_fetch_add(&s->limited_ns, now - from);
}

static void next_record(struct worker *w)
{
    unsigned now = atomic_load(&w->s->level), other;

    w->records++;
    w->sample = 0;
    w->max_pages = LB_REC_MAX_PAGES;
    if (w->s->fixed_level >= 0)
        return;
    if (w->records < LB_TUNER_LEVELS) /* first of all, what each level would give */
        other = w->records;
    else if (w->records % SAMPLE_EVERY == 0)
        other = 1 + w->records / SAMPLE_EVERY % (LB_TUNER_LEVELS - 1);
    else
        return;
    if (other != now) {
        w->sample = other;
        w->max_pages = LB_TUNER_SAMPLE_PAGES;
    }
}

static int flush_data(struct worker *w, struct lb_error *err)
{
    struct lb_sender *s = w->s;
    struct lb_bulk_stats a, b;
    unsigned index = w->sample ? w->sample : atomic_load(&s->level);
    int level = s->fixed_level >= 0 ? s->fixed_level : lb_tuner_level(index);

    if (!w->n_runs)
        return 0;
    lb_bulk_get_stats(w->bulk, &a);
    if (w->direct_now ? lb_direct_send(w->direct, s->round, &s->blocks[w->block], w->runs, w->iov,
                                       w->n_runs, err)
                      : lb_bulk_send_pages(w->bulk, s->round, w->block, w->runs, w->iov, w->n_runs,
                                           level, err))
        return -1;
    lb_bulk_get_stats(w->bulk, &b);
    if (s->fixed_level < 0 && level && !w->direct_now) {
        pthread_mutex_lock(&s->mu);
        lb_tuner_sample(&s->tuner, index, w->n_pages, b.zstd_ns - a.zstd_ns,
                        b.zstd_out_bytes - a.zstd_out_bytes);
        pthread_mutex_unlock(&s->mu);
    }
    limit(s, b.wire_bytes - a.wire_bytes);
    atomic_fetch_add(&s->moved_pages, w->n_pages);
    w->n_runs = w->n_pages = 0;
    next_record(w);
    return 0;
}

static int flush_zero(struct worker *w, struct lb_error *err)
{
    if (!w->n_zruns)
        return 0;
    if (lb_bulk_send_zero(w->bulk, w->s->round, w->block, w->zruns, w->n_zruns, err))
        return -1;
    w->n_zruns = w->n_zpages = 0;
    return 0;
}

static int add_zero(struct worker *w, uint32_t page, struct lb_error *err)
{
    struct lb_page_run *last = w->n_zruns ? &w->zruns[w->n_zruns - 1] : NULL;

    if (last && last->first + last->count == page) {
        last->count++;
    } else {
        w->zruns[w->n_zruns].first = page;
        w->zruns[w->n_zruns++].count = 1;
    }
    if (++w->n_zpages == LB_REC_MAX_PAGES)
        return flush_zero(w, err);
    return 0;
}

static int add_data(struct worker *w, uint32_t page, const uint8_t *src, struct lb_error *err)
{
    struct lb_page_run *last = w->n_runs ? &w->runs[w->n_runs - 1] : NULL;
    struct iovec *v = w->n_runs ? &w->iov[w->n_runs - 1] : NULL;

    if (last && last->first + last->count == page &&
        (const uint8_t *)v->iov_base + v->iov_len == src) {
        last->count++;
        v->iov_len += LB_PAGE_SIZE;
    } else {
        w->runs[w->n_runs].first = page;
        w->runs[w->n_runs].count = 1;
        w->iov[w->n_runs].iov_base = (void *)src;
        w->iov[w->n_runs++].iov_len = LB_PAGE_SIZE;
    }
    if (++w->n_pages >= (w->direct_now ? LB_REC_MAX_PAGES : w->max_pages))
        return flush_data(w, err);
    return 0;
}

static int send_run(struct worker *w, const struct lb_ram_block *blk, uint64_t first,
                    uint64_t count, struct lb_error *err)
{
    struct lb_sender *s = w->s;
    /* The receiver's main RAM is zero before round 0: nothing to say about zero pages. */
    bool zero_is_known = s->round == 0 && blk->kind == LB_RAM_MAIN;

    while (count) {
        uint64_t n = count;
        const uint8_t *src;

        if (blk->map) {
            src = (const uint8_t *)blk->map + (first << LB_PAGE_SHIFT);
        } else {
            /* The bounce buffer has one slot per page of the record being filled. */
            uint8_t *to = w->bounce + (size_t)w->n_pages * LB_PAGE_SIZE;

            n = LB_MIN(n, (uint64_t)(LB_REC_MAX_PAGES - w->n_pages));
            if (lb_hv_read(s->vm, blk, first, n, to, err))
                return -1;
            src = to;
        }
        for (uint64_t i = 0; i < n; i++) {
            const uint8_t *p = src + (i << LB_PAGE_SHIFT);

            if (lb_is_zero(p, LB_PAGE_SIZE)) {
                if (!zero_is_known && add_zero(w, (uint32_t)(first + i), err))
                    return -1;
                continue;
            }
            if (!blk->map) { /* close the gap that zero pages left */
                uint8_t *slot = w->bounce + (size_t)w->n_pages * LB_PAGE_SIZE;

                if (slot != p)
                    memmove(slot, p, LB_PAGE_SIZE);
                p = slot;
            }
            if (add_data(w, (uint32_t)(first + i), p, err))
                return -1;
        }
        first += n;
        count -= n;
    }
    return 0;
}

/* Pages to be sent of the registered chunk around `page`. */
static uint64_t chunk_dirty(const struct lb_bitmap *dirty, uint64_t page)
{
    uint64_t n = 0, at = page / LB_RDMA_CHUNK_PAGES * (LB_RDMA_CHUNK_PAGES / 64);

    for (uint64_t i = 0; i < LB_RDMA_CHUNK_PAGES / 64 && (at + i) * 64 < dirty->n_bits; i++)
        n += (uint64_t)__builtin_popcountll(dirty->words[at + i]);
    return n;
}

/* Whichever way the pages of this block from `first` on go: a record holds only of one kind. */
static int choose_way(struct worker *w, unsigned b, uint64_t first, struct lb_error *err)
{
    struct lb_sender *s = w->s;
    int ready = 0;

    if (!w->direct)
        return 0;
    if (flush_data(w, err))
        return -1;
    ready = lb_direct_ready(w->direct, &s->blocks[b], first / LB_RDMA_CHUNK_PAGES,
                            chunk_dirty(&s->dirty[b], first) >= WORTH_PAGES, err);
    if (ready < 0)
        return -1;
    w->direct_now = ready > 0;
    return 0;
}

static int send_chunk(struct worker *w, unsigned b, uint64_t first, uint64_t count,
                      struct lb_error *err)
{
    struct lb_sender *s = w->s;
    const struct lb_ram_block *blk = &s->blocks[b];
    uint64_t run_first, run_count, todo = 0, skipped = 0;
    uint64_t words[CHUNK_PAGES / 64] = {0};
    struct lb_bitmap set = {.n_bits = count, .words = words};

    /* A chunk is whole words of the bitmap; bits past the end of a block are clear. */
    for (uint64_t i = 0; i * 64 < count; i++) {
        words[i] = s->dirty[b].words[first / 64 + i];
        todo += (uint64_t)__builtin_popcountll(words[i]);
    }
    if (!todo)
        return 0;
    if (s->peek && blk->kind != LB_RAM_ROM) { /* ROM has no log */
        lb_bitmap_clear_all(&w->peeked);
        if (lb_hv_log_peek(s->vm, blk, first, count, &w->peeked, err))
            return -1;
        for (unsigned i = 0; i < CHUNK_PAGES / 64; i++) {
            skipped += (uint64_t)__builtin_popcountll(words[i] & w->peeked.words[i]);
            words[i] &= ~w->peeked.words[i];
        }
    }
    if (w->block != blk->id && (flush_data(w, err) || flush_zero(w, err)))
        return -1;
    w->block = blk->id;
    if (choose_way(w, b, first, err))
        return -1;
    for (uint64_t at = 0; lb_bitmap_next_run(&set, at, count, &run_first, &run_count);
         at = run_first + run_count)
        if (send_run(w, blk, first + run_first, run_count, err))
            return -1;
    atomic_fetch_add(&s->done_pages, todo);
    atomic_fetch_add(&s->skipped_pages, skipped);
    w->done += todo;
    w->skipped += skipped;
    return 0;
}

static int send_numbered(struct worker *w, uint64_t chunk, struct lb_error *err)
{
    struct lb_sender *s = w->s;
    unsigned b = 0;

    while (s->block_chunk0[b + 1] <= chunk)
        b++;
    uint64_t first = (chunk - s->block_chunk0[b]) * s->unit_pages;
    uint64_t end = LB_MIN(first + s->unit_pages, s->dirty[b].n_bits);
    for (; first < end; first += CHUNK_PAGES)
        if (send_chunk(w, b, first, LB_MIN((uint64_t)CHUNK_PAGES, end - first), err))
            return -1;
    return 0;
}

/* The next chunk is this worker's; false: there is none. */
static bool take_chunk(struct worker *w, uint64_t *chunk)
{
    *chunk = atomic_fetch_add(&w->s->cursor, 1);
    if (*chunk >= w->s->n_chunks)
        return false;
    if (!lb_rdma_is(lb_bulk_transport(w->bulk)))
        return true;
    if (w->n_taken == w->max_taken) {
        w->max_taken = LB_MAX(w->max_taken * 2, (size_t)64);
        w->taken = lb_realloc(w->taken, w->max_taken * sizeof(*w->taken));
    }
    w->taken[w->n_taken++] = *chunk;
    return true;
}

/* Over RDMA only who looks finds out that a connection is broken. */
static int arrived(struct worker *w, struct lb_error *err)
{
    return lb_bulk_flush(w->bulk, err) || lb_rdma_drain(lb_bulk_transport(w->bulk), 0, err) ? -1 : 0;
}

/* What the worker has taken already (another connection carried it), then what is left of all. */
static int send_share(struct worker *w, struct lb_error *err)
{
    size_t again = w->n_taken;
    uint64_t chunk;

    for (size_t i = 0; i < again; i++)
        if (send_numbered(w, w->taken[i], err))
            return -1;
    while (take_chunk(w, &chunk))
        if (send_numbered(w, chunk, err))
            return -1;
    if (flush_data(w, err) || flush_zero(w, err))
        return -1;
    if (lb_bulk_send_mark(w->bulk, LB_REC_ROUND_END, w->s->round, NULL, 0, err))
        return -1;
    return arrived(w, err);
}

static void add_stats(struct lb_bulk_stats *sum, const struct lb_bulk_stats *b)
{
    sum->wire_bytes += b->wire_bytes;
    sum->zero_pages += b->zero_pages;
    sum->raw_pages += b->raw_pages;
    sum->zstd_pages += b->zstd_pages;
    sum->zstd_in_bytes += b->zstd_in_bytes;
    sum->zstd_out_bytes += b->zstd_out_bytes;
    sum->zstd_ns += b->zstd_ns;
    sum->blocked_ns += b->blocked_ns;
    sum->copied_bytes += b->copied_bytes;
    sum->direct_pages += b->direct_pages;
}

/* Nothing of this round counts as sent by this worker any more. */
static void forget_share(struct worker *w)
{
    atomic_fetch_sub(&w->s->done_pages, w->done);
    atomic_fetch_sub(&w->s->skipped_pages, w->skipped);
    w->done = w->skipped = 0;
    w->n_runs = w->n_pages = w->n_zruns = w->n_zpages = 0;
    w->block = UINT32_MAX;
}

/* After `why`: a TCP connection instead of the RDMA one. 0: go on; -1 and *why is why not. */
static int replace(struct worker *w, struct lb_error *why)
{
    struct lb_sender *s = w->s;
    struct lb_bulk *old = w->bulk, *fresh;
    struct lb_bulk_stats b;

    if (!s->reconnect || !lb_rdma_is(lb_bulk_transport(old)) || why->code != LB_E_NET ||
        atomic_load(&s->aborted))
        return -1;
    lb_log(LB_LOG_WARN, "connection %u goes on over TCP: %s", w->index, why->message);
    lb_bulk_abort(old);
    memset(why, 0, sizeof(*why));
    if (s->reconnect(w->index, &fresh, why, s->reconnect_arg))
        return -1;
    lb_bulk_get_stats(old, &b);
    pthread_mutex_lock(&s->mu);
    add_stats(&w->before, &b);
    w->bulk = fresh;
    s->replaced++;
    pthread_mutex_unlock(&s->mu);
    if (atomic_load(&s->aborted)) /* it may not have been there to be aborted */
        lb_bulk_abort(fresh);
    lb_direct_free(LB_STEAL_PTR(w->direct));
    w->direct_now = false;
    lb_bulk_close(old);
    forget_share(w);
    return 0;
}

static int run_round(struct worker *w, struct lb_error *err)
{
    w->n_taken = 0;
    w->done = w->skipped = 0;
    while (send_share(w, err))
        if (replace(w, err))
            return -1;
    return 0;
}

static void *worker_main(void *p)
{
    struct worker *w = p;
    struct lb_sender *s = w->s;
    uint64_t seen = 0;

    for (;;) {
        struct lb_error err = LB_ERROR_INIT;

        pthread_mutex_lock(&s->mu);
        while (!s->quit && s->generation == seen)
            pthread_cond_wait(&s->cond, &s->mu);
        if (s->quit) {
            pthread_mutex_unlock(&s->mu);
            return NULL;
        }
        seen = s->generation;
        pthread_mutex_unlock(&s->mu);
        if (run_round(w, &err))
            fail(s, &err);
        pthread_mutex_lock(&s->mu);
        if (--s->busy == 0)
            pthread_cond_broadcast(&s->cond);
        pthread_mutex_unlock(&s->mu);
    }
}

static void number_chunks(struct lb_sender *s, uint64_t unit_pages)
{
    s->unit_pages = unit_pages;
    for (unsigned b = 0; b < s->n_blocks; b++)
        s->block_chunk0[b + 1] =
            s->block_chunk0[b] + (s->dirty[b].n_bits + unit_pages - 1) / unit_pages;
    s->n_chunks = s->block_chunk0[s->n_blocks];
}

int lb_sender_new(struct lb_hv_vm *vm, const struct lb_ram_block *blocks,
                  struct lb_bitmap *dirty, unsigned n_blocks, struct lb_bulk **conns,
                  unsigned n_conns, const struct lb_migrate_opts *opts, struct lb_sender **out,
                  struct lb_error *err)
{
    struct lb_sender *s = lb_alloc(sizeof(*s));
    pthread_condattr_t ca;

    s->vm = vm;
    s->blocks = blocks;
    s->dirty = dirty;
    s->n_blocks = n_blocks;
    s->n_workers = n_conns;
    s->fixed_level = opts->compress == LB_COMPRESS_OFF    ? 0
                     : opts->compress == LB_COMPRESS_ZSTD ? (opts->zstd_level ? opts->zstd_level
                                                                              : 1)
                                                          : -1;
    s->tuning = s->fixed_level < 0;
    lb_tuner_init(&s->tuner);
    pthread_mutex_init(&s->mu, NULL);
    pthread_condattr_init(&ca);
    pthread_condattr_setclock(&ca, CLOCK_MONOTONIC);
    pthread_cond_init(&s->cond, &ca);
    pthread_condattr_destroy(&ca);
    s->block_chunk0 = lb_alloc(sizeof(uint64_t) * (n_blocks + 1));
    number_chunks(s, CHUNK_PAGES);
    s->workers = lb_alloc(sizeof(*s->workers) * n_conns);
    if (lb_budget_open(&s->budget, opts->bandwidth_bytes_per_s, opts->budget_path, err)) {
        lb_sender_free(s);
        return -1;
    }
    for (unsigned i = 0; i < n_conns; i++) {
        struct worker *w = &s->workers[i];
        int rc;

        w->s = s;
        w->index = i;
        w->bulk = conns[i];
        conns[i] = NULL;
        w->block = UINT32_MAX;
        next_record(w);
        w->bounce = aligned_alloc(LB_PAGE_SIZE, (size_t)LB_REC_MAX_PAGES * LB_PAGE_SIZE);
        if (!w->bounce || lb_bitmap_init(&w->peeked, CHUNK_PAGES, err)) {
            lb_fail(err, LB_E_NO_SPACE, "no memory for a bulk worker");
            lb_sender_free(s);
            return -1;
        }
        rc = pthread_create(&w->thread, NULL, worker_main, w);
        if (rc) {
            lb_fail_errno(err, LB_E_NO_SPACE, rc, "cannot start a bulk worker");
            lb_sender_free(s);
            return -1;
        }
        w->started = true;
    }
    *out = s;
    return 0;
}

/* Of all connections that there are and were. *rdma, when not NULL: how many of them are RDMA now. */
static struct lb_bulk_stats bulk_stats(struct lb_sender *s, unsigned *rdma)
{
    struct lb_bulk_stats sum = {0}, b;

    pthread_mutex_lock(&s->mu);
    for (unsigned i = 0; i < s->n_workers; i++) {
        lb_bulk_get_stats(s->workers[i].bulk, &b);
        add_stats(&sum, &b);
        add_stats(&sum, &s->workers[i].before);
        if (rdma)
            *rdma += lb_rdma_is(lb_bulk_transport(s->workers[i].bulk));
    }
    pthread_mutex_unlock(&s->mu);
    return sum;
}

static struct totals totals(struct lb_sender *s)
{
    struct totals t = {.ns = lb_now_ns(), .blocked_ns = atomic_load(&s->limited_ns),
                       .pages = atomic_load(&s->moved_pages)};

    struct lb_bulk_stats b = bulk_stats(s, NULL);
    t.blocked_ns += b.blocked_ns;
    t.wire_bytes += b.wire_bytes;
    return t;
}

int lb_sender_set_zero_copy(struct lb_sender *s, struct lb_error *err)
{
    LB_AUTO_FREE uint64_t *pages = lb_alloc(sizeof(*pages) * (s->n_blocks + 1));

    for (unsigned b = 0; b < s->n_blocks; b++)
        pages[b] = s->blocks[b].size_bytes >> LB_PAGE_SHIFT;
    for (unsigned i = 0; i < s->n_workers; i++) {
        struct worker *w = &s->workers[i];

        if (!lb_rdma_is(lb_bulk_transport(w->bulk)))
            continue;
        if (lb_bulk_set_blocks(w->bulk, pages, s->n_blocks, err))
            return -1;
        w->direct = lb_direct_new(w->bulk, w->bounce, s->n_workers);
        number_chunks(s, LB_RDMA_CHUNK_PAGES);
    }
    return 0;
}

void lb_sender_set_reconnect(struct lb_sender *s,
                             int (*reconnect)(unsigned index, struct lb_bulk **out,
                                              struct lb_error *err, void *arg),
                             void *arg)
{
    s->reconnect = reconnect;
    s->reconnect_arg = arg;
}

void lb_sender_round_begin(struct lb_sender *s, uint32_t round, bool peek)
{
    pthread_mutex_lock(&s->mu);
    assert(s->busy == 0);
    s->round = round;
    s->peek = peek;
    atomic_store(&s->cursor, 0);
    atomic_store(&s->done_pages, 0);
    atomic_store(&s->skipped_pages, 0);
    s->busy = s->n_workers;
    s->generation++;
    pthread_cond_broadcast(&s->cond);
    pthread_mutex_unlock(&s->mu);
    s->last = totals(s);
}

/* A few times per window: add what was sent since the last look, and decide when there is
 * enough of it. Time between rounds does not count. */
static void tune(struct lb_sender *s)
{
    struct totals now = totals(s), *w = &s->window;
    unsigned level;

    w->ns += now.ns - s->last.ns;
    w->blocked_ns += now.blocked_ns - s->last.blocked_ns;
    w->pages += now.pages - s->last.pages;
    w->wire_bytes += now.wire_bytes - s->last.wire_bytes;
    s->last = now;
    if (!s->tuning || w->ns < WINDOW_NS)
        return;
    pthread_mutex_lock(&s->mu);
    level = lb_tuner_window(&s->tuner, s->n_workers, w->ns, w->blocked_ns, w->pages,
                            w->wire_bytes);
    if (level != atomic_load(&s->level))
        lb_log(LB_LOG_DEBUG, "zstd level %d (0: off): %.1f us a page without it, %.1f with, "
               "%.0f bytes a page, link %.0f MB/s", lb_tuner_level(level), s->tuner.base_ns / 1e3,
               (s->tuner.base_ns + s->tuner.zstd_ns[level]) / 1e3, s->tuner.bytes[level],
               s->tuner.link_bytes_s / 1e6);
    pthread_mutex_unlock(&s->mu);
    atomic_store(&s->level, level);
    memset(w, 0, sizeof(*w));
}

int lb_sender_round_wait(struct lb_sender *s, unsigned timeout_ms, struct lb_error *err)
{
    uint64_t end = lb_now_ns() + (uint64_t)timeout_ms * 1000000u;
    struct timespec ts = {(time_t)(end / 1000000000u), (long)(end % 1000000000u)};
    int rc = 0;

    pthread_mutex_lock(&s->mu);
    while (s->busy && rc != ETIMEDOUT)
        rc = pthread_cond_timedwait(&s->cond, &s->mu, &ts);
    if (s->failed && !s->busy) {
        if (err)
            *err = s->error;
        rc = -1;
    } else {
        rc = s->busy ? 1 : 0;
    }
    pthread_mutex_unlock(&s->mu);
    tune(s);
    return rc;
}

void lb_sender_get_stats(struct lb_sender *s, struct lb_sender_stats *out)
{
    memset(out, 0, sizeof(*out));
    out->bulk = bulk_stats(s, &out->rdma_conns);
    pthread_mutex_lock(&s->mu);
    out->replaced = s->replaced;
    pthread_mutex_unlock(&s->mu);
    out->done_pages = atomic_load(&s->done_pages);
    out->skipped_pages = atomic_load(&s->skipped_pages);
    out->zstd_level = s->fixed_level >= 0 ? s->fixed_level
                                          : lb_tuner_level(atomic_load(&s->level));
}

void lb_sender_force_compress(struct lb_sender *s)
{
    s->tuning = false;
    atomic_store(&s->level, LB_TUNER_FORCED);
}

bool lb_sender_compressible(struct lb_sender *s)
{
    bool yes;

    pthread_mutex_lock(&s->mu);
    yes = s->fixed_level < 0 && lb_tuner_compressible(&s->tuner);
    pthread_mutex_unlock(&s->mu);
    return yes;
}

static int send_end(struct worker *w, uint32_t round, const char *state, size_t len,
                    struct lb_error *err)
{
    for (size_t at = 0; at < len;) {
        size_t n = LB_MIN(len - at, (size_t)LB_REC_MAX_PAYLOAD);

        if (lb_bulk_send_mark(w->bulk, LB_REC_STATE, round, state + at, n, err))
            return -1;
        at += n;
    }
    return lb_bulk_send_mark(w->bulk, LB_REC_END, round, NULL, 0, err) || arrived(w, err) ? -1 : 0;
}

int lb_sender_state(struct lb_sender *s, uint32_t round, const void *buf, size_t len,
                    struct lb_error *err)
{
    assert(s->busy == 0);
    for (unsigned i = 0; i < s->n_workers; i++) {
        struct lb_error e = LB_ERROR_INIT;

        while (send_end(&s->workers[i], round, buf, i == 0 ? len : 0, &e))
            if (replace(&s->workers[i], &e)) {
                if (err)
                    *err = e;
                return -1;
            }
    }
    return 0;
}

void lb_sender_abort(struct lb_sender *s)
{
    atomic_store(&s->aborted, true);
    pthread_mutex_lock(&s->mu);
    for (unsigned i = 0; i < s->n_workers; i++)
        if (s->workers[i].bulk)
            lb_bulk_abort(s->workers[i].bulk);
    pthread_mutex_unlock(&s->mu);
}

void lb_sender_free(struct lb_sender *s)
{
    if (!s)
        return;
    pthread_mutex_lock(&s->mu);
    s->quit = true;
    pthread_cond_broadcast(&s->cond);
    pthread_mutex_unlock(&s->mu);
    lb_sender_abort(s);
    for (unsigned i = 0; i < s->n_workers; i++) {
        if (s->workers[i].started)
            pthread_join(s->workers[i].thread, NULL);
        lb_direct_free(s->workers[i].direct);
        lb_bulk_close(s->workers[i].bulk);
        free(s->workers[i].bounce);
        free(s->workers[i].taken);
        lb_bitmap_free(&s->workers[i].peeked);
    }
    pthread_cond_destroy(&s->cond);
    pthread_mutex_destroy(&s->mu);
    free(s->workers);
    free(s->block_chunk0);
    lb_budget_close(&s->budget);
    free(s);
}
