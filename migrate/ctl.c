/*
 * migrate/ctl.c - control messages over a channel, and the reader thread that
 * notices a failing peer while the engine is busy with a round.
 */
#include "migrate/ctl.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

int lb_ctl_send(struct lb_chan *c, const Lb__Control *msg, struct lb_error *err)
{
    size_t n = lb__control__get_packed_size(msg);
    LB_AUTO_FREE uint8_t *buf = lb_alloc(n + 1);

    lb__control__pack(msg, buf);
    return lb_chan_send(c, buf, n, err);
}

static void failure_to_error(const Lb__Failure *f, struct lb_error *err)
{
    enum lb_errcode code = f->code > LB_OK && f->code <= LB_E_UNSUPPORTED
                               ? (enum lb_errcode)f->code
                               : LB_E_INTERNAL;

    lb_fail(err, code, "%s", f->message && *f->message ? f->message : "the peer failed");
    if (f->remedy && *f->remedy)
        lb_remedy(err, "%s", f->remedy);
}

/* *heard counts every message, those that are swallowed too. */
static int receive(struct lb_chan *c, Lb__Control **out, uint64_t deadline_ns, _Atomic unsigned *heard,
                   struct lb_error *err)
{
    for (;;) {
        LB_AUTO_FREE void *buf = NULL;
        size_t len = 0;
        Lb__Control *m;

        if (lb_chan_recv(c, &buf, &len, deadline_ns, err))
            return -1;
        m = lb__control__unpack(NULL, len, buf);
        if (!m)
            return lb_fail(err, LB_E_PROTO, "the peer sent a control message that does not parse");
        ++*heard;
        if (m->kind_case == LB__CONTROL__KIND_KEEPALIVE) {
            lb__control__free_unpacked(m, NULL);
            continue;
        }
        if (m->kind_case == LB__CONTROL__KIND_FAILURE) {
            failure_to_error(m->failure, err);
            lb__control__free_unpacked(m, NULL);
            return -1;
        }
        if (m->kind_case == LB__CONTROL__KIND_CANCEL) {
            lb_fail(err, LB_E_CANCELLED, "cancelled by the peer: %.200s",
                    m->cancel->reason ? m->cancel->reason : "");
            lb__control__free_unpacked(m, NULL);
            return -1;
        }
        if (m->kind_case == LB__CONTROL__KIND__NOT_SET) {
            lb__control__free_unpacked(m, NULL);
            return lb_remedy((lb_fail(err, LB_E_PROTO, "the peer sent an unknown control message"),
                              err),
                             "run the same Lifeboat version on both hosts");
        }
        *out = m;
        return 0;
    }
}

int lb_ctl_recv(struct lb_chan *c, Lb__Control **out, uint64_t deadline_ns, struct lb_error *err)
{
    _Atomic unsigned heard = 0;

    return receive(c, out, deadline_ns, &heard, err);
}

static int expect_kind(Lb__Control *m, Lb__Control__KindCase want, Lb__Control **out,
                       struct lb_error *err)
{
    if (m->kind_case != want) {
        lb_fail(err, LB_E_PROTO, "the peer sent control message %d where %d was expected",
                (int)m->kind_case, (int)want);
        lb__control__free_unpacked(m, NULL);
        return -1;
    }
    *out = m;
    return 0;
}

int lb_ctl_expect(struct lb_chan *c, Lb__Control__KindCase want, Lb__Control **out,
                  uint64_t deadline_ns, struct lb_error *err)
{
    Lb__Control *m;

    if (lb_ctl_recv(c, &m, deadline_ns, err))
        return -1;
    return expect_kind(m, want, out, err);
}

int lb_ctl_send_failure(struct lb_chan *c, const struct lb_error *failure, struct lb_error *err)
{
    Lb__Control m = LB__CONTROL__INIT;
    Lb__Failure f = LB__FAILURE__INIT;

    f.code = (uint32_t)failure->code;
    f.message = (char *)failure->message;
    f.remedy = (char *)failure->remedy;
    m.kind_case = LB__CONTROL__KIND_FAILURE;
    m.failure = &f;
    return lb_ctl_send(c, &m, err);
}

int lb_ctl_refusal(const Lb__PreflightReport *rep, struct lb_error *err)
{
    for (size_t i = 0; i < rep->n_checks; i++) {
        const Lb__Check *c = rep->checks[i];

        if (strcmp(c->status, "fail"))
            continue;
        lb_fail(err, LB_E_PREFLIGHT, "%.60s: %.400s", c->id, c->message);
        if (c->remedy && *c->remedy)
            lb_remedy(err, "%s", c->remedy);
        return -1;
    }
    return lb_fail(err, LB_E_PREFLIGHT, "the destination refused without saying why");
}

void lb_ctl_hello(Lb__Hello *h, const struct lb_host_config *cfg)
{
    h->version = 1;
    h->wall_ms = lb_wall_ms();
    h->host = cfg ? (char *)cfg->name : (char *)"";
    h->software = (char *)"lifeboat";
}

/* ------------------------------------------------------------------- queue */

struct node {
    Lb__Control *m;
    struct node *next;
};

/* The protocol never has more than a few in flight; the frames of a pause come in more. */
#define MAX_QUEUED 256u

struct lb_ctl_queue {
    /* immutable */
    struct lb_chan *chan;
    void (*on_end)(void *arg);
    void *arg;
    pthread_t thread;
    /* locked by mu */
    pthread_mutex_t mu;
    pthread_cond_t cond;
    struct node *head, **tail;
    unsigned n;
    bool ended, interrupted;
    struct lb_error error;
    bool (*tap)(const Lb__Control *m, void *arg);
    void *tap_arg;
    /* any thread */
    _Atomic unsigned heard;
};

static bool tapped(struct lb_ctl_queue *q, Lb__Control *m)
{
    bool (*tap)(const Lb__Control *, void *);
    void *arg;

    pthread_mutex_lock(&q->mu);
    tap = q->tap;
    arg = q->tap_arg;
    pthread_mutex_unlock(&q->mu);
    if (!tap || !tap(m, arg))
        return false;
    lb__control__free_unpacked(m, NULL);
    return true;
}

static void *reader_main(void *p)
{
    struct lb_ctl_queue *q = p;
    struct lb_error err = LB_ERROR_INIT;

    for (;;) {
        Lb__Control *m;
        struct node *n;
        bool flood;

        if (receive(q->chan, &m, 0, &q->heard, &err))
            break;
        if (tapped(q, m))
            continue;
        n = lb_alloc(sizeof(*n));
        n->m = m;
        pthread_mutex_lock(&q->mu);
        *q->tail = n;
        q->tail = &n->next;
        flood = ++q->n > MAX_QUEUED;
        pthread_cond_broadcast(&q->cond);
        pthread_mutex_unlock(&q->mu);
        if (flood) {
            lb_fail(&err, LB_E_PROTO, "the peer sends control messages without waiting");
            break;
        }
    }
    pthread_mutex_lock(&q->mu);
    q->ended = true;
    q->error = err;
    pthread_cond_broadcast(&q->cond);
    pthread_mutex_unlock(&q->mu);
    if (q->on_end)
        q->on_end(q->arg);
    return NULL;
}

struct lb_ctl_queue *lb_ctl_queue_start(struct lb_chan *c, void (*on_end)(void *arg), void *arg)
{
    return lb_ctl_queue_start_first(c, NULL, NULL, on_end, arg);
}

struct lb_ctl_queue *lb_ctl_queue_start_first(struct lb_chan *c,
                                              bool (*tap)(const Lb__Control *m, void *arg),
                                              void *tap_arg, void (*on_end)(void *arg),
                                              void *arg)
{
    struct lb_ctl_queue *q = lb_alloc(sizeof(*q));
    pthread_condattr_t ca;

    q->chan = c;
    q->tap = tap;
    q->tap_arg = tap_arg;
    q->on_end = on_end;
    q->arg = arg;
    q->tail = &q->head;
    lb_mutex_init_inherit(&q->mu);
    pthread_condattr_init(&ca);
    pthread_condattr_setclock(&ca, CLOCK_MONOTONIC);
    pthread_cond_init(&q->cond, &ca);
    pthread_condattr_destroy(&ca);
    if (pthread_create(&q->thread, NULL, reader_main, q)) {
        free(q);
        return NULL;
    }
    return q;
}

void lb_ctl_queue_tap(struct lb_ctl_queue *q, bool (*tap)(const Lb__Control *m, void *arg),
                      void *arg)
{
    pthread_mutex_lock(&q->mu);
    q->tap = tap;
    q->tap_arg = arg;
    pthread_mutex_unlock(&q->mu);
}

int lb_ctl_queue_pop(struct lb_ctl_queue *q, Lb__Control **out, uint64_t deadline_ns,
                     struct lb_error *err)
{
    struct timespec ts = {(time_t)(deadline_ns / 1000000000u), (long)(deadline_ns % 1000000000u)};
    int rc = 0;

    pthread_mutex_lock(&q->mu);
    while (!q->head && !q->ended && !q->interrupted && rc != ETIMEDOUT)
        rc = deadline_ns ? pthread_cond_timedwait(&q->cond, &q->mu, &ts)
                         : pthread_cond_wait(&q->cond, &q->mu);
    if (q->head) {
        struct node *n = q->head;

        q->n--;
        q->head = n->next;
        if (!q->head)
            q->tail = &q->head;
        *out = n->m;
        free(n);
        rc = 0;
    } else if (q->ended) {
        if (err)
            *err = q->error;
        rc = -1;
    } else if (q->interrupted) {
        rc = lb_fail(err, LB_E_CANCELLED, "interrupted");
    } else {
        rc = lb_fail(err, LB_E_NET, "the peer did not answer in time");
        lb_remedy(err, "see the log of lifeboatd on the other host");
    }
    pthread_mutex_unlock(&q->mu);
    return rc;
}

int lb_ctl_queue_expect(struct lb_ctl_queue *q, Lb__Control__KindCase want, Lb__Control **out,
                        uint64_t deadline_ns, struct lb_error *err)
{
    Lb__Control *m;

    if (lb_ctl_queue_pop(q, &m, deadline_ns, err))
        return -1;
    return expect_kind(m, want, out, err);
}

void lb_ctl_queue_interrupt(struct lb_ctl_queue *q)
{
    pthread_mutex_lock(&q->mu);
    q->interrupted = true;
    pthread_cond_broadcast(&q->cond);
    pthread_mutex_unlock(&q->mu);
}

unsigned lb_ctl_queue_heard(struct lb_ctl_queue *q)
{
    return q->heard;
}

bool lb_ctl_queue_ended(struct lb_ctl_queue *q, struct lb_error *err)
{
    bool ended;

    pthread_mutex_lock(&q->mu);
    ended = q->ended;
    if (ended && err)
        *err = q->error;
    pthread_mutex_unlock(&q->mu);
    return ended;
}

void lb_ctl_queue_stop(struct lb_ctl_queue *q)
{
    if (!q)
        return;
    lb_chan_abort(q->chan);
    pthread_join(q->thread, NULL);
    while (q->head) {
        struct node *n = q->head;

        q->head = n->next;
        lb__control__free_unpacked(n->m, NULL);
        free(n);
    }
    pthread_cond_destroy(&q->cond);
    pthread_mutex_destroy(&q->mu);
    free(q);
}
