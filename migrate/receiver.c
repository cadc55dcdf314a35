/*
 * migrate/receiver.c - the destination's bulk workers.
 *
 * One worker per connection places records straight into the receiver's RAM.
 * A page may be sent in round n on one connection and in round n+1 on another,
 * so the connections meet at every ROUND_END: nobody starts round n+1 before
 * everybody has placed round n.
 *
 * Nothing that arrives is believed: limits are checked by lb_bulk against the
 * block table, rounds must follow each other, state has a hard maximum. A
 * failure in one worker aborts all; the receiver is thrown away.
 */
#include "migrate/receiver.h"

#include <assert.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#define STATE_MAX_BYTES (256u << 20)

struct rworker {
    struct lb_receiver *r;
    struct lb_bulk *bulk;
    pthread_t thread;
    bool started;
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
};

static void fail(struct lb_receiver *r, const struct lb_error *err)
{
    pthread_mutex_lock(&r->mu);
    if (!r->failed) {
        r->failed = true;
        r->error = *err;
    }
    pthread_cond_broadcast(&r->cond);
    pthread_mutex_unlock(&r->mu);
    lb_receiver_abort(r);
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

static int serve(struct rworker *w, struct lb_error *err)
{
    struct lb_receiver *r = w->r;

    for (;;) {
        struct lb_record rec;
        int64_t round;

        if (lb_bulk_recv(w->bulk, &rec, 0, err))
            return -1;
        switch (rec.type) {
        case LB_REC_PAGES:
        case LB_REC_ZERO:
            pthread_mutex_lock(&r->mu);
            round = r->round;
            pthread_mutex_unlock(&r->mu);
            if ((int64_t)rec.round != round + 1)
                return lb_fail(err, LB_E_PROTO, "pages of round %u while round %lld is due",
                               rec.round, (long long)round + 1);
            if (place(w, &rec, err))
                return -1;
            atomic_fetch_add(&r->pages, rec.n_pages);
            break;
        case LB_REC_ROUND_END:
            if (meet(r, rec.round, err))
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

static void *rworker_main(void *p)
{
    struct rworker *w = p;
    struct lb_receiver *r = w->r;
    struct lb_error err = LB_ERROR_INIT;

    if (serve(w, &err)) {
        fail(r, &err);
        return NULL;
    }
    pthread_mutex_lock(&r->mu);
    r->ended++;
    pthread_mutex_unlock(&r->mu);
    r->on_event(r->arg);
    return NULL;
}

int lb_receiver_new(struct lb_hv_vm *vm, const struct lb_ram_block *const *map, unsigned n_map,
                    struct lb_bulk **conns, unsigned n_conns, void (*on_event)(void *arg),
                    void *arg, struct lb_receiver **out, struct lb_error *err)
{
    struct lb_receiver *r = lb_alloc(sizeof(*r));

    r->vm = vm;
    r->map = map;
    r->n_map = n_map;
    r->n_workers = n_conns;
    r->on_event = on_event;
    r->arg = arg;
    r->round = -1;
    pthread_mutex_init(&r->mu, NULL);
    pthread_cond_init(&r->cond, NULL);
    r->workers = lb_alloc(sizeof(*r->workers) * n_conns);
    for (unsigned i = 0; i < n_conns; i++) {
        r->workers[i].r = r;
        r->workers[i].bulk = conns[i];
        conns[i] = NULL;
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

void lb_receiver_abort(struct lb_receiver *r)
{
    pthread_mutex_lock(&r->mu);
    r->stop = true;
    pthread_cond_broadcast(&r->cond);
    pthread_mutex_unlock(&r->mu);
    for (unsigned i = 0; i < r->n_workers; i++)
        if (r->workers[i].bulk)
            lb_bulk_abort(r->workers[i].bulk);
}

void lb_receiver_free(struct lb_receiver *r)
{
    if (!r)
        return;
    lb_receiver_abort(r);
    for (unsigned i = 0; i < r->n_workers; i++) {
        if (r->workers[i].started)
            pthread_join(r->workers[i].thread, NULL);
        lb_bulk_close(r->workers[i].bulk);
        free(r->workers[i].bounce);
    }
    free(r->workers);
    free(r->state);
    pthread_cond_destroy(&r->cond);
    pthread_mutex_destroy(&r->mu);
    free(r);
}
