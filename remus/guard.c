/* remus/guard.c - see guard.h.
 *
 * Everything is under one mutex with priority inheritance; what is done with it held are system
 * calls that do not wait (a signal, a map update). The kill of a lost guest, the claim and
 * the sending of Beats are done without it. */
#include "remus/guard.h"

#include <pthread.h>
#include <string.h>

#include "migrate/ctl.h"

#define CLAIM_NS UINT64_C(2000000000)         /* one attempt */
#define CLAIM_FENCE_NS UINT64_C(30000000000)  /* a machine's power is slower than a database */
#define RETRY_MS_MIN 20
#define RETRY_MS_MAX 500

struct lb_guard {
    /* immutable */
    struct lb_guard_opts o;
    struct lb_remus_record rec;
    pthread_t guard, beat, asker;
    bool guarding, beating, asks;

    /* locked by mu */
    pthread_mutex_t mu;
    pthread_cond_t cond;
    struct lb_lease lease;
    enum lb_verdict_on_us verdict;
    bool frozen, asking, yielding, switched_off, quit;
    bool barred;              /* a claim was lost: no answer of the backup lets the guest go on */
    uint64_t lapsed_ns;       /* since when; 0: it has not */
    char trouble[256];
};

static void wait_until(struct lb_guard *g, uint64_t deadline_ns)
{
    struct timespec ts = {(time_t)(deadline_ns / 1000000000u), (long)(deadline_ns % 1000000000u)};

    if (deadline_ns == UINT64_MAX)
        pthread_cond_wait(&g->cond, &g->mu);
    else
        pthread_cond_timedwait(&g->cond, &g->mu, &ts);
}

static void wake(struct lb_guard *g)
{
    pthread_cond_broadcast(&g->cond);
}

static void gate(struct lb_guard *g, uint64_t until_ns)
{
    if (g->o.output)
        lb_output_gate(g->o.output, until_ns);
}

/* mu held. */
static void freeze(struct lb_guard *g, bool on)
{
    struct lb_error err = LB_ERROR_INIT;

    if (g->frozen == on)
        return;
    if (lb_hv_freeze(g->o.vm, on, &err))
        lb_log_error(LB_LOG_WARN, &err); /* it is gone: nothing runs that could be a second copy */
    g->frozen = on;
}

/* mu held. The first verdict stays. */
static void decide(struct lb_guard *g, enum lb_verdict_on_us v)
{
    if (g->verdict != LB_GUARD_OPEN)
        return;
    g->verdict = v;
    if (v == LB_GUARD_OURS) {
        gate(g, UINT64_MAX);
        freeze(g, false);
    }
    wake(g);
}

static void ask(struct lb_guard *g, const char *why)
{
    if (g->asking || g->verdict != LB_GUARD_OPEN)
        return;
    g->asking = true;
    lb_log(LB_LOG_WARN, "%s: asking the witness who may run the guest", why);
    wake(g);
}

/* ------------------------------------------------------------- guard thread */

/* mu held. Returns when to look again; *changed: tell the engine. */
static uint64_t look(struct lb_guard *g, bool *changed)
{
    uint64_t now = lb_now_ns();
    enum lb_lease_state st = lb_lease_state(&g->lease, now);
    bool was = g->frozen;

    if (g->verdict != LB_GUARD_OPEN)
        return UINT64_MAX;
    if (st != LB_LEASE_OK && !g->yielding)
        ask(g, st == LB_LEASE_ASK ? "the backup is silent" : "the lease has lapsed");
    if (st == LB_LEASE_LAPSED && !g->lapsed_ns)
        g->lapsed_ns = now;
    else if (st != LB_LEASE_LAPSED)
        g->lapsed_ns = 0;
    freeze(g, st == LB_LEASE_LAPSED || g->barred);
    *changed = was != g->frozen;
    if (*changed)
        lb_log(LB_LOG_WARN, g->frozen ? "no answer in time: the guest is frozen until it is "
                                        "known who may run it"
                                      : "the backup answers again: the guest goes on");
    if (!g->lapsed_ns)
        return lb_lease_next_ns(&g->lease, now);
    if (now - g->lapsed_ns >= UINT64_C(1000000) * LB_GUARD_UNDECIDED_MS) {
        decide(g, LB_GUARD_UNDECIDED);
        *changed = true;
        return UINT64_MAX;
    }
    return g->lapsed_ns + UINT64_C(1000000) * LB_GUARD_UNDECIDED_MS;
}

static void *guard_main(void *arg)
{
    struct lb_guard *g = arg;

    lb_thread_realtime();
    pthread_mutex_lock(&g->mu);
    while (!g->quit) {
        bool changed = false;
        uint64_t next = look(g, &changed);

        if (changed) {
            pthread_mutex_unlock(&g->mu);
            g->o.changed(g->o.arg);
            pthread_mutex_lock(&g->mu);
            continue; /* what came meanwhile was not waited for */
        }
        wait_until(g, next);
    }
    pthread_mutex_unlock(&g->mu);
    return NULL;
}

/* -------------------------------------------------------------- beat thread */

static void *beat_main(void *arg)
{
    struct lb_guard *g = arg;
    Lb__Control m = LB__CONTROL__INIT;
    Lb__Beat b = LB__BEAT__INIT;

    lb_thread_realtime();
    m.kind_case = LB__CONTROL__KIND_BEAT;
    m.beat = &b;
    pthread_mutex_lock(&g->mu);
    while (!g->quit && g->verdict == LB_GUARD_OPEN) {
        uint64_t next;

        pthread_mutex_unlock(&g->mu);
        b.sent_ns = lb_now_ns();
        next = b.sent_ns + UINT64_C(1000000) * LB_BEAT_MS;
        if (lb_ctl_send(g->o.chan, &m, NULL)) {
            lb_guard_ask(g, "the connection to the backup broke");
            return NULL;
        }
        pthread_mutex_lock(&g->mu);
        while (!g->quit && g->verdict == LB_GUARD_OPEN && lb_now_ns() < next)
            wait_until(g, next);
    }
    pthread_mutex_unlock(&g->mu);
    return NULL;
}

/* ------------------------------------------------------------- asker thread */

/* Theirs: the copy here must be gone before anybody acts on the verdict. */
static void lost(struct lb_guard *g)
{
    struct lb_error err = LB_ERROR_INIT;

    pthread_mutex_lock(&g->mu);
    freeze(g, true);
    pthread_mutex_unlock(&g->mu);
    if (lb_hv_end(g->o.hv, &g->o.ident, &err))
        lb_log_error(LB_LOG_ERROR, &err);
}

/* The guest died here: the backup has it, or nobody. */
static bool nothing_to_claim(struct lb_guard *g)
{
    bool off;

    pthread_mutex_lock(&g->mu);
    off = g->switched_off;
    pthread_mutex_unlock(&g->mu);
    return !off && !lb_hv_exists(g->o.hv, &g->o.ident);
}

/* The witness gave the guest to the backup. Whether it came to run there only the backup knows: one that died
 * first must not take the last copy with it. Until that is known nothing runs or speaks here. */
static enum lb_verdict_on_us claim_lost(struct lb_guard *g)
{
    enum lb_verdict_on_us v;

    pthread_mutex_lock(&g->mu);
    g->barred = true;
    gate(g, 0);
    freeze(g, true);
    pthread_mutex_unlock(&g->mu);
    v = g->o.lost(g->o.arg);
    if (v == LB_GUARD_THEIRS)
        lost(g);
    return v;
}

static enum lb_verdict_on_us claim(struct lb_guard *g)
{
    struct lb_error err = LB_ERROR_INIT;
    bool fence = !strcmp(lb_witness_kind(g->o.witness), "fence");
    uint64_t t = lb_now_ns();
    enum lb_claim c;

    if (nothing_to_claim(g))
        return LB_GUARD_UNDECIDED;
    c = lb_witness_claim(g->o.witness, &g->rec, t + (fence ? CLAIM_FENCE_NS : CLAIM_NS), &err);
    if (c == LB_CLAIM_UNREACHABLE) {
        pthread_mutex_lock(&g->mu);
        if (strcmp(g->trouble, err.message)) {
            snprintf(g->trouble, sizeof(g->trouble), "%.255s", err.message);
            lb_log_error(LB_LOG_WARN, &err);
        }
        pthread_mutex_unlock(&g->mu);
        return LB_GUARD_OPEN;
    }
    lb_log(LB_LOG_WARN, "the witness says after %.1f ms: the guest is %s",
           (double)(lb_now_ns() - t) / 1e6, c == LB_CLAIM_WON ? "ours" : "the backup's");
    return c == LB_CLAIM_WON ? LB_GUARD_OURS : claim_lost(g);
}

static void *asker_main(void *arg)
{
    struct lb_guard *g = arg;
    unsigned wait_ms = RETRY_MS_MIN;

    lb_thread_realtime();
    pthread_mutex_lock(&g->mu);
    while (!g->quit && g->verdict == LB_GUARD_OPEN) {
        enum lb_verdict_on_us v;
        uint64_t again;

        if (!g->asking) {
            wait_until(g, UINT64_MAX);
            continue;
        }
        pthread_mutex_unlock(&g->mu);
        v = claim(g);
        pthread_mutex_lock(&g->mu);
        if (v != LB_GUARD_OPEN) {
            decide(g, v);
            break;
        }
        again = lb_now_ns() + UINT64_C(1000000) * wait_ms;
        wait_ms = LB_MIN(wait_ms * 2, (unsigned)RETRY_MS_MAX);
        while (!g->quit && g->verdict == LB_GUARD_OPEN && lb_now_ns() < again)
            wait_until(g, again);
    }
    pthread_mutex_unlock(&g->mu);
    g->o.changed(g->o.arg);
    return NULL;
}

/* -------------------------------------------------------------------- calls */

static void init_locks(struct lb_guard *g)
{
    pthread_condattr_t ca;

    lb_mutex_init_inherit(&g->mu);
    pthread_condattr_init(&ca);
    pthread_condattr_setclock(&ca, CLOCK_MONOTONIC);
    pthread_cond_init(&g->cond, &ca);
    pthread_condattr_destroy(&ca);
}

int lb_guard_start(const struct lb_guard_opts *opts, struct lb_guard **out, struct lb_error *err)
{
    struct lb_guard *g = lb_alloc(sizeof(*g));

    g->o = *opts;
    g->rec = *opts->rec;
    g->o.rec = &g->rec;
    init_locks(g);
    lb_lease_init(&g->lease, opts->lease_ms, opts->since_ns);
    gate(g, g->lease.until_ns);
    g->guarding = !pthread_create(&g->guard, NULL, guard_main, g);
    g->asks = g->guarding && !pthread_create(&g->asker, NULL, asker_main, g);
    g->beating = g->asks && !pthread_create(&g->beat, NULL, beat_main, g);
    if (!g->beating) {
        lb_guard_stop(g);
        return lb_fail(err, LB_E_NO_SPACE, "cannot start a thread");
    }
    *out = g;
    return 0;
}

void lb_guard_stop(struct lb_guard *g)
{
    if (!g)
        return;
    pthread_mutex_lock(&g->mu);
    g->quit = true;
    wake(g);
    pthread_mutex_unlock(&g->mu);
    if (g->guarding)
        pthread_join(g->guard, NULL);
    if (g->asks)
        pthread_join(g->asker, NULL);
    if (g->beating)
        pthread_join(g->beat, NULL);
    pthread_cond_destroy(&g->cond);
    pthread_mutex_destroy(&g->mu);
    free(g);
}

void lb_guard_answered(struct lb_guard *g, uint64_t sent_ns)
{
    pthread_mutex_lock(&g->mu);
    if (g->verdict == LB_GUARD_OPEN) {
        lb_lease_answered(&g->lease, sent_ns, lb_now_ns());
        if (!g->yielding && !g->barred)
            gate(g, g->lease.until_ns);
        if (g->frozen)
            wake(g);
    }
    pthread_mutex_unlock(&g->mu);
}

void lb_guard_ask(struct lb_guard *g, const char *why)
{
    pthread_mutex_lock(&g->mu);
    if (!g->yielding)
        ask(g, why);
    pthread_mutex_unlock(&g->mu);
}

static void decided(struct lb_guard *g, enum lb_verdict_on_us v)
{
    pthread_mutex_lock(&g->mu);
    decide(g, v);
    pthread_mutex_unlock(&g->mu);
    g->o.changed(g->o.arg);
}

void lb_guard_discarded(struct lb_guard *g)
{
    decided(g, LB_GUARD_OURS);
}

void lb_guard_promoted(struct lb_guard *g)
{
    lost(g);
    decided(g, LB_GUARD_THEIRS);
}

void lb_guard_switched_off(struct lb_guard *g)
{
    pthread_mutex_lock(&g->mu);
    g->switched_off = true;
    pthread_mutex_unlock(&g->mu);
}

bool lb_guard_yield(struct lb_guard *g, bool on)
{
    bool late;

    pthread_mutex_lock(&g->mu);
    late = g->verdict != LB_GUARD_OPEN || (g->asking && !lb_witness_remembers(g->o.witness));
    if (g->verdict == LB_GUARD_OPEN && g->yielding != (on && !late)) {
        g->yielding = on && !late;
        gate(g, g->yielding ? 0 : g->lease.until_ns);
    }
    pthread_mutex_unlock(&g->mu);
    return !late;
}

enum lb_verdict_on_us lb_guard_verdict(struct lb_guard *g)
{
    enum lb_verdict_on_us v;

    pthread_mutex_lock(&g->mu);
    v = g->verdict;
    pthread_mutex_unlock(&g->mu);
    return v;
}

enum lb_verdict_on_us lb_guard_wait(struct lb_guard *g, uint64_t deadline_ns)
{
    enum lb_verdict_on_us v;

    pthread_mutex_lock(&g->mu);
    while (g->verdict == LB_GUARD_OPEN && lb_now_ns() < deadline_ns)
        wait_until(g, deadline_ns);
    v = g->verdict;
    pthread_mutex_unlock(&g->mu);
    return v;
}

bool lb_guard_frozen(struct lb_guard *g)
{
    bool frozen;

    pthread_mutex_lock(&g->mu);
    frozen = g->frozen;
    pthread_mutex_unlock(&g->mu);
    return frozen;
}

double lb_guard_left_ms(struct lb_guard *g)
{
    double left;

    pthread_mutex_lock(&g->mu);
    left = ((double)g->lease.until_ns - (double)lb_now_ns()) / 1e6;
    pthread_mutex_unlock(&g->mu);
    return left;
}

void lb_guard_trouble(struct lb_guard *g, char text[256])
{
    pthread_mutex_lock(&g->mu);
    memcpy(text, g->trouble, sizeof(g->trouble));
    pthread_mutex_unlock(&g->mu);
}
