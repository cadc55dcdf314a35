/*
 * migrate/receiver.c - the destination's bulk workers.
 *
 * One worker per connection places records straight into the receiver's RAM.
 * A page may be sent in round n on one connection and in round n+1 on another,
 * so the connections meet at every ROUND_END: nobody starts round n+1 before
 * everybody has placed round n.
 *
 * An RDMA connection may break in the middle of a round. Its worker then waits for another connection with
 * its index (lb_receiver_replace), which sends everything of the round again - or of the last complete one,
 * when the source did not hear that it was: that does no harm, since nobody sends the next one before.
 *
 * Nothing that arrives is believed: limits are checked by lb_bulk against the
 * block table, rounds must follow each other, state has a hard maximum. A
 * failure in one worker aborts all; the receiver is thrown away.
 */
#include "migrate/receiver.h"

#include "migrate/direct.h"
#include "netproto/rdma.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#define STATE_MAX_BYTES (256u << 20)

#define REPLACE_WITHIN_NS UINT64_C(30000000000)

struct rworker {
    struct lb_receiver *r;
    struct lb_bulk *bulk;        /* changed by the worker under mu */
    struct lb_bulk *next;        /* to go on with; locked by mu */
    bool done;                   /* has END; locked by mu */
    pthread_t thread;
    bool started;
    struct lb_direct_rx *direct; /* worker only: with zero copy */
    bool resumed;                /* worker only: no round has ended on this connection yet */
    uint8_t *bounce;
};

struct lb_receiver {
    /* immutable */
    struct lb_hv_vm *vm;
    const struct lb_ram_block *const *map;
    unsigned n_map, n_workers;
    struct rworker *workers;
    void (*on_event)(void *arg);
    void *arg;
    /* locked by mu */
    pthread_mutex_t mu;
    pthread_cond_t cond;
    int64_t round;       /* last complete */
    unsigned at_barrier, ended;
    bool failed, stop;
    struct lb_error error;
    /* worker 0 only until ended */
    uint8_t *state;
    size_t state_len, state_cap;
    _Atomic uint64_t pages;
    /* With zero copy: pages that are not as their checksums say; by the source's block id, those of blocks that do not
     * travel empty. Locked by bad_mu; n_bad may be read without. */
    struct lb_bitmap *bad;
    _Atomic uint64_t n_bad;
    pthread_mutex_t bad_mu;
};

/* Every connection fails at once. Any thread. */
static void abort_all(struct lb_receiver *r)
{
    pthread_mutex_lock(&r->mu);
    r->stop = true;
    pthread_cond_broadcast(&r->cond);
    for (unsigned i = 0; i < r->n_workers; i++)
        if (r->workers[i].bulk)
            lb_bulk_abort(r->workers[i].bulk);
    pthread_mutex_unlock(&r->mu);
}

static void fail(struct lb_receiver *r, const struct lb_error *err)
{
    pthread_mutex_lock(&r->mu);
    if (!r->failed) {
        r->failed = true;
        r->error = *err;
    }
    pthread_cond_broadcast(&r->cond);
    pthread_mutex_unlock(&r->mu);
    abort_all(r);
    r->on_event(r->arg);
}

static int meet(struct lb_receiver *r, uint32_t round, struct lb_error *err)
{
    int rc = 0;
    bool last = false;

    pthread_mutex_lock(&r->mu);
    if ((int64_t)round != r->round + 1) {
        rc = lb_fail(err, LB_E_PROTO, "the peer ended round %u after round %lld", round,
                     (long long)r->round);
    } else if (++r->at_barrier == r->n_workers) {
        r->at_barrier = 0;
        r->round = round;
        last = true;
        pthread_cond_broadcast(&r->cond);
    } else {
        while (r->round < (int64_t)round && !r->failed && !r->stop)
            pthread_cond_wait(&r->cond, &r->mu);
        if (r->round < (int64_t)round)
            rc = lb_fail(err, LB_E_CANCELLED, "stopped");
    }
    pthread_mutex_unlock(&r->mu);
    if (last)
        r->on_event(r->arg);
    return rc;
}

static int zero_run(struct rworker *w, const struct lb_ram_block *blk, const struct lb_page_run *run,
                    struct lb_error *err)
{
    uint64_t at = run->first, left = run->count;

    while (left) {
        uint64_t n = LB_MIN(left, (uint64_t)LB_REC_MAX_PAGES);

        if (blk->map) {
            uint8_t *p = (uint8_t *)blk->map + (at << LB_PAGE_SHIFT);

            for (uint64_t i = 0; i < n; i++, p += LB_PAGE_SIZE)
                if (!lb_is_zero(p, LB_PAGE_SIZE))
                    memset(p, 0, LB_PAGE_SIZE);
        } else {
            memset(w->bounce, 0, (size_t)n << LB_PAGE_SHIFT);
            if (lb_hv_write(w->r->vm, blk, at, n, w->bounce, err))
                return -1;
        }
        at += n;
        left -= n;
    }
    return 0;
}

/* bad_mu held. */
static void mark(struct lb_receiver *r, uint32_t block, uint64_t page, bool good)
{
    bool was_bad = lb_bitmap_test(&r->bad[block], page);

    if (good && was_bad) {
        lb_bitmap_clear(&r->bad[block], page);
        atomic_fetch_sub(&r->n_bad, 1);
    } else if (!good && !was_bad) {
        lb_bitmap_set(&r->bad[block], page);
        atomic_fetch_add(&r->n_bad, 1);
    }
}

/* The pages of a record: good[] has a bit for each, NULL: they are what was sent. */
static void mark_record(struct lb_receiver *r, const struct lb_record *rec, const uint64_t *good)
{
    unsigned n = 0;

    if (!r->bad || (!good && !atomic_load(&r->n_bad)))
        return;
    pthread_mutex_lock(&r->bad_mu);
    for (uint32_t i = 0; i < rec->n_runs; i++)
        for (uint32_t k = 0; k < rec->runs[i].count; k++, n++)
            mark(r, rec->block_id, (uint64_t)rec->runs[i].first + k,
                 !good || (good[n / 64] >> (n % 64) & 1));
    pthread_mutex_unlock(&r->bad_mu);
}

uint64_t lb_receiver_bad(struct lb_receiver *r, struct lb_bad_run *out, unsigned max, unsigned *n)
{
    uint64_t first, count;

    *n = 0;
    if (!r->bad)
        return 0;
    pthread_mutex_lock(&r->bad_mu);
    for (unsigned b = 0; b < r->n_map; b++)
        for (uint64_t at = 0; *n < max && lb_bitmap_next_run(&r->bad[b], at, UINT32_MAX,
                                                             &first, &count);
             at = first + count)
            out[(*n)++] = (struct lb_bad_run){b, {(uint32_t)first, (uint32_t)count}};
    pthread_mutex_unlock(&r->bad_mu);
    return atomic_load(&r->n_bad);
}

/* What was written into our memory: look at it. */
static int take_written(struct rworker *w, const struct lb_record *rec,
                        const struct lb_ram_block *blk, struct lb_error *err)
{
    uint64_t good[LB_REC_MAX_PAGES / 64];

    if (lb_direct_rx_written(w->direct, rec, blk, good, err))
        return -1;
    mark_record(w->r, rec, good);
    return 0;
}

static int place(struct rworker *w, const struct lb_record *rec, struct lb_error *err)
{
    struct lb_receiver *r = w->r;
    const struct lb_ram_block *blk = rec->block_id < r->n_map ? r->map[rec->block_id] : NULL;
    struct iovec iov[LB_REC_MAX_PAGES];
    uint8_t *p = w->bounce;
    bool in_place;

    if (!blk)
        return lb_fail(err, LB_E_PROTO, "the peer sent pages of block %u which was not agreed",
                       rec->block_id);
    if (rec->type == LB_REC_WRITTEN)
        return take_written(w, rec, blk, err);
    mark_record(r, rec, NULL); /* it fails or is there in a moment */
    if (rec->type == LB_REC_ZERO) {
        for (uint32_t i = 0; i < rec->n_runs; i++)
            if (zero_run(w, blk, &rec->runs[i], err))
                return -1;
        return 0;
    }
    /* A page that is there already is decrypted in place. One that is not (all of
     * round 0) goes through a small buffer and pwrite: the kernel then neither takes a fault nor
     * zeroes the page first, which costs about twice what the copy does. */
    in_place = blk->map && rec->round > 0;
    for (uint32_t i = 0; i < rec->n_runs; i++) {
        iov[i].iov_len = (size_t)rec->runs[i].count << LB_PAGE_SHIFT;
        if (in_place) {
            iov[i].iov_base = (uint8_t *)blk->map + ((uint64_t)rec->runs[i].first << LB_PAGE_SHIFT);
        } else {
            iov[i].iov_base = p;
            p += iov[i].iov_len;
        }
    }
    if (lb_bulk_recv_pages(w->bulk, rec, iov, err))
        return -1;
    if (!in_place)
        for (uint32_t i = 0; i < rec->n_runs; i++)
            if (lb_hv_write(r->vm, blk, rec->runs[i].first, rec->runs[i].count, iov[i].iov_base,
                            err))
                return -1;
    return 0;
}

static int take_state(struct rworker *w, const struct lb_record *rec, struct lb_error *err)
{
    struct lb_receiver *r = w->r;

    if (w != &r->workers[0])
        return lb_fail(err, LB_E_PROTO, "the peer sent device state on a connection other than 0");
    if (r->state_len + rec->payload_bytes > STATE_MAX_BYTES)
        return lb_fail(err, LB_E_PROTO, "the peer sent more than %u MiB of device state",
                       STATE_MAX_BYTES >> 20);
    if (r->state_len + rec->payload_bytes > r->state_cap) {
        size_t cap = LB_MAX(r->state_cap * 2, r->state_len + rec->payload_bytes);
        uint8_t *n = lb_try_alloc(cap, err);

        if (!n)
            return -1;
        if (r->state_len)
            memcpy(n, r->state, r->state_len);
        free(r->state);
        r->state = n;
        r->state_cap = cap;
    }
    if (lb_bulk_recv_data(w->bulk, rec, r->state + r->state_len, err))
        return -1;
    r->state_len += rec->payload_bytes;
    return 0;
}

/* Is it a record of the round that is due, or again of the last one? */
static int check_round(struct rworker *w, uint32_t round, struct lb_error *err)
{
    int64_t last;

    pthread_mutex_lock(&w->r->mu);
    last = w->r->round;
    pthread_mutex_unlock(&w->r->mu);
    if ((int64_t)round == last + 1 || (w->resumed && (int64_t)round == last))
        return 0;
    return lb_fail(err, LB_E_PROTO, "pages of round %u while round %lld is due", round,
                   (long long)last + 1);
}

static int end_round(struct rworker *w, uint32_t round, struct lb_error *err)
{
    int64_t last;

    pthread_mutex_lock(&w->r->mu);
    last = w->r->round;
    pthread_mutex_unlock(&w->r->mu);
    if (w->resumed && (int64_t)round == last) {
        w->resumed = false;
        return 0;
    }
    w->resumed = false;
    return meet(w->r, round, err);
}

static int serve(struct rworker *w, struct lb_error *err)
{
    struct lb_receiver *r = w->r;

    for (;;) {
        struct lb_record rec;

        if (lb_bulk_recv(w->bulk, &rec, 0, err))
            return -1;
        switch (rec.type) {
        case LB_REC_PAGES:
        case LB_REC_ZERO:
        case LB_REC_WRITTEN:
            if (check_round(w, rec.round, err) || place(w, &rec, err))
                return -1;
            atomic_fetch_add(&r->pages, rec.n_pages);
            break;
        case LB_REC_ASK:
            if (lb_direct_rx_ask(w->direct, &rec,
                                 rec.block_id < r->n_map ? r->map[rec.block_id] : NULL, err))
                return -1;
            break;
        case LB_REC_ROUND_END:
            if (end_round(w, rec.round, err))
                return -1;
            break;
        case LB_REC_STATE:
            if (take_state(w, &rec, err))
                return -1;
            break;
        case LB_REC_END:
            return 0;
        default:
            return lb_fail(err, LB_E_PROTO, "record of unknown type %d", (int)rec.type);
        }
    }
}

/* After `why`: wait for another connection. 0: go on with it. */
static int resume(struct rworker *w, const struct lb_error *why)
{
    struct lb_receiver *r = w->r;
    uint64_t until_ns = lb_now_ns() + REPLACE_WITHIN_NS;
    struct timespec until = {(time_t)(until_ns / 1000000000u), (long)(until_ns % 1000000000u)};
    struct lb_bulk *old = w->bulk;
    int rc = 0;

    if (!lb_rdma_is(lb_bulk_transport(old)) ||
        (why->code != LB_E_NET && why->code != LB_E_CANCELLED))
        return -1;
    pthread_mutex_lock(&r->mu);
    while (!w->next && !r->stop && !r->failed && rc != ETIMEDOUT)
        rc = pthread_cond_timedwait(&r->cond, &r->mu, &until);
    rc = w->next && !r->stop && !r->failed ? 0 : -1;
    if (rc == 0)
        w->bulk = LB_STEAL_PTR(w->next);
    pthread_mutex_unlock(&r->mu);
    if (rc)
        return -1;
    lb_direct_rx_free(LB_STEAL_PTR(w->direct));
    lb_bulk_close(old); /* nothing comes through it any more, before anything comes through the other one */
    lb_log(LB_LOG_WARN, "a connection goes on over TCP: %s", why->message);
    w->resumed = true;
    if (w == &r->workers[0])
        r->state_len = 0; /* comes again, from its beginning */
    return 0;
}

int lb_receiver_replace(struct lb_receiver *r, unsigned index, struct lb_bulk *fresh,
                        struct lb_error *err)
{
    struct rworker *w = index < r->n_workers ? &r->workers[index] : NULL;

    pthread_mutex_lock(&r->mu);
    bool take = w && !w->done && !w->next && lb_rdma_is(lb_bulk_transport(w->bulk));
    if (take) {
        w->next = fresh;
        lb_bulk_abort(w->bulk); /* its worker may not have noticed */
        pthread_cond_broadcast(&r->cond);
    }
    pthread_mutex_unlock(&r->mu);
    if (take)
        return 0;
    lb_bulk_close(fresh);
    return lb_fail(err, LB_E_PROTO, "a bulk connection %u that replaces nothing", index);
}

static void *rworker_main(void *p)
{
    struct rworker *w = p;
    struct lb_receiver *r = w->r;
    struct lb_error err = LB_ERROR_INIT;

    while (serve(w, &err)) {
        if (resume(w, &err)) {
            fail(r, &err);
            return NULL;
        }
        memset(&err, 0, sizeof(err));
    }
    lb_direct_rx_free(LB_STEAL_PTR(w->direct)); /* the memory is ours alone from now on */
    pthread_mutex_lock(&r->mu);
    w->done = true;
    r->ended++;
    pthread_mutex_unlock(&r->mu);
    r->on_event(r->arg);
    return NULL;
}

static int make_bad(struct lb_receiver *r, struct lb_error *err)
{
    r->bad = lb_alloc(sizeof(*r->bad) * (r->n_map + 1));
    for (unsigned b = 0; b < r->n_map; b++)
        if (lb_bitmap_init(&r->bad[b], r->map[b] ? r->map[b]->size_bytes >> LB_PAGE_SHIFT : 0, err))
            return -1;
    return 0;
}

int lb_receiver_new(struct lb_hv_vm *vm, const struct lb_ram_block *const *map, unsigned n_map,
                    struct lb_bulk **conns, unsigned n_conns, bool zero_copy,
                    void (*on_event)(void *arg), void *arg, struct lb_receiver **out, struct lb_error *err)
{
    struct lb_receiver *r = lb_alloc(sizeof(*r));
    pthread_condattr_t ca;

    r->vm = vm;
    r->map = map;
    r->n_map = n_map;
    r->n_workers = n_conns;
    r->on_event = on_event;
    r->arg = arg;
    r->round = -1;
    pthread_mutex_init(&r->mu, NULL);
    pthread_condattr_init(&ca);
    pthread_condattr_setclock(&ca, CLOCK_MONOTONIC);
    pthread_cond_init(&r->cond, &ca);
    pthread_condattr_destroy(&ca);
    pthread_mutex_init(&r->bad_mu, NULL);
    r->workers = lb_alloc(sizeof(*r->workers) * n_conns);
    for (unsigned i = 0; i < n_conns; i++) {
        r->workers[i].r = r;
        r->workers[i].bulk = conns[i];
        conns[i] = NULL;
        if (zero_copy && lb_rdma_is(lb_bulk_transport(r->workers[i].bulk)))
            r->workers[i].direct = lb_direct_rx_new(r->workers[i].bulk, n_conns);
    }
    if (zero_copy && make_bad(r, err)) {
        lb_receiver_free(r);
        return -1;
    }
    for (unsigned i = 0; i < n_conns; i++) {
        struct rworker *w = &r->workers[i];
        int rc;

        w->bounce = aligned_alloc(LB_PAGE_SIZE, (size_t)LB_REC_MAX_PAGES * LB_PAGE_SIZE);
        rc = w->bounce ? pthread_create(&w->thread, NULL, rworker_main, w) : -1;
        if (rc) {
            lb_fail(err, LB_E_NO_SPACE, "cannot start a bulk worker");
            lb_receiver_free(r);
            return -1;
        }
        w->started = true;
    }
    *out = r;
    return 0;
}

int lb_receiver_poll(struct lb_receiver *r, int64_t *round, bool *ended, struct lb_error *err)
{
    int rc = 0;

    pthread_mutex_lock(&r->mu);
    *round = r->round;
    *ended = r->ended == r->n_workers;
    if (r->failed) {
        if (err)
            *err = r->error;
        rc = -1;
    }
    pthread_mutex_unlock(&r->mu);
    return rc;
}

void lb_receiver_state(struct lb_receiver *r, const void **buf, size_t *len)
{
    *buf = r->state;
    *len = r->state_len;
}

uint64_t lb_receiver_pages(struct lb_receiver *r)
{
    return atomic_load(&r->pages);
}

void lb_receiver_free(struct lb_receiver *r)
{
    if (!r)
        return;
    abort_all(r);
    for (unsigned i = 0; i < r->n_workers; i++) {
        if (r->workers[i].started)
            pthread_join(r->workers[i].thread, NULL);
        lb_direct_rx_free(r->workers[i].direct);
        lb_bulk_close(r->workers[i].bulk);
        lb_bulk_close(r->workers[i].next);
        free(r->workers[i].bounce);
    }
    for (unsigned b = 0; r->bad && b < r->n_map; b++)
        lb_bitmap_free(&r->bad[b]);
    free(r->bad);
    free(r->workers);
    free(r->state);
    pthread_mutex_destroy(&r->bad_mu);
    pthread_cond_destroy(&r->cond);
    pthread_mutex_destroy(&r->mu);
    free(r);
}
