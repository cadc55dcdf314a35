/*
 * remus/protect_ship.c - from a captured epoch to the release of its output.
 *
 *   engine --full slot--> shipper: encode, send --> backup
 *   engine <--free slot-- control reader: Ack   <--   |
 *                              `-> output of the epoch may leave
 *
 * The Ack is handled in the reader thread: the time until output leaves is the latency that
 * clients see. Only before the record says PROTECTED it waits for the engine.
 */
#include "remus/protect_internal.h"

#include <assert.h>
#include <string.h>

/* mu held. What the whole thing is about. */
static void check_order(const struct prot *p)
{
    assert(p->released <= p->acked && p->acked <= p->sent && p->sent <= p->captured);
    assert(p->captured - p->acked <= LB_PROT_SLOTS);
}

int lb_prot_send(struct prot *p, Lb__Control *m, struct lb_error *err)
{
    return lb_ctl_send(p->tx.chan, m, err);
}

/* ----------------------------------------------------------------- shipper */

void lb_prot_pace(struct prot *p, uint64_t bytes)
{
    uint64_t now = lb_now_ns();

    if (!p->opts.bandwidth_bytes_per_s)
        return;
    pthread_mutex_lock(&p->mu);
    if (p->paced_ns < now)
        p->paced_ns = now;
    p->paced_ns += (uint64_t)((double)bytes * 1e9 / (double)p->opts.bandwidth_bytes_per_s);
    while (!p->quit && !p->lost && lb_now_ns() < p->paced_ns)
        lb_prot_wait(p, p->paced_ns);
    pthread_mutex_unlock(&p->mu);
}

static struct lb_prot_slot *slot_of(struct prot *p, uint64_t epoch)
{
    return &p->slot[epoch % LB_PROT_SLOTS];
}

static void *ship_main(void *arg)
{
    struct prot *p = arg;
    struct lb_encoder_stats was, now;

    lb_encoder_get_stats(p->enc, &was); /* the first copy of the disks went before */
    pthread_mutex_lock(&p->mu);
    for (;;) {
        struct lb_prot_slot *s = slot_of(p, p->sent + 1);
        struct lb_error err = LB_ERROR_INIT;
        int rc;

        if (p->quit || p->lost)
            break;
        if (s->state != SLOT_FULL) {
            lb_prot_wait(p, UINT64_MAX);
            continue;
        }
        /* Counted before it goes: the Ack may be here before the send returns. */
        p->sent++;
        s->state = SLOT_SENDING;
        check_order(p);
        pthread_mutex_unlock(&p->mu);
        rc = lb_encoder_send(p->enc, p->bulk, &s->e, &err);
        lb_encoder_get_stats(p->enc, &now);
        if (rc)
            lb_prot_lost(p, &err);
        else
            lb_prot_pace(p, now.wire_bytes - was.wire_bytes);
        was = now;
        pthread_mutex_lock(&p->mu);
        s->state = SLOT_SENT;
        pthread_cond_broadcast(&p->cond);
    }
    pthread_mutex_unlock(&p->mu);
    return NULL;
}

int lb_prot_ship_start(struct prot *p, struct lb_error *err)
{
    p->shipping = !pthread_create(&p->shipper, NULL, ship_main, p);
    return p->shipping ? 0 : lb_fail(err, LB_E_NO_SPACE, "cannot start a thread");
}

void lb_prot_ship_stop(struct prot *p)
{
    pthread_mutex_lock(&p->mu);
    p->quit = true;
    pthread_cond_broadcast(&p->cond);
    pthread_mutex_unlock(&p->mu);
    if (p->bulk)
        lb_bulk_abort(p->bulk);
    if (p->shipping)
        pthread_join(p->shipper, NULL);
    p->shipping = false;
}

/* ------------------------------------------------------- messages of the backup */

/* mu held. */
static void release(struct prot *p)
{
    if (!p->may_release || p->released == p->acked)
        return;
    p->released = p->acked;
    check_order(p);
    lb_output_release(p->output, p->released);
}

static void acked(struct prot *p, uint64_t epoch)
{
    struct lb_error err = LB_ERROR_INIT;
    bool wrong;

    pthread_mutex_lock(&p->mu);
    wrong = epoch != p->acked + 1 || epoch > p->sent;
    if (!wrong) {
        p->acked = epoch;
        release(p);
        pthread_cond_broadcast(&p->cond);
    }
    pthread_mutex_unlock(&p->mu);
    if (wrong) {
        lb_fail(&err, LB_E_PROTO, "the backup acknowledged epoch %llu out of turn",
                (unsigned long long)epoch);
        lb_prot_lost(p, &err);
    }
}

void lb_prot_release_from_now(struct prot *p)
{
    pthread_mutex_lock(&p->mu);
    p->may_release = true;
    release(p);
    pthread_mutex_unlock(&p->mu);
}

uint64_t lb_prot_acked(struct prot *p)
{
    uint64_t n;

    pthread_mutex_lock(&p->mu);
    n = p->acked;
    pthread_mutex_unlock(&p->mu);
    return n;
}

static void flag(struct prot *p, bool *which)
{
    pthread_mutex_lock(&p->mu);
    *which = true;
    pthread_cond_broadcast(&p->cond);
    pthread_mutex_unlock(&p->mu);
}

bool lb_prot_on_message(const Lb__Control *m, void *arg)
{
    struct prot *p = arg;

    switch (m->kind_case) {
    case LB__CONTROL__KIND_BEAT_ANSWER:
        if (!p->reader_priority)
            lb_thread_realtime();
        p->reader_priority = true;
        lb_guard_answered(p->guard, m->beat_answer->sent_ns);
        return true;
    case LB__CONTROL__KIND_EPOCH_ACK:
        acked(p, m->epoch_ack->epoch);
        return true;
    case LB__CONTROL__KIND_DISCARDED:
        flag(p, &p->discarded);
        lb_guard_discarded(p->guard);
        return true;
    case LB__CONTROL__KIND_YIELD_REQUEST:
        flag(p, &p->yield);
        return true;
    case LB__CONTROL__KIND_PROMOTED:
        flag(p, &p->promoted);
        return true;
    default:
        return false;
    }
}
