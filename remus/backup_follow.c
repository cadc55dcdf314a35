/*
 * remus/backup_follow.c - the standby: epoch after epoch, and what it makes of silence.
 *
 * The promise (lease.h) lives in the control reader, which answers a beat at once, whatever the engine
 * does. Both meet under mu: a beat is answered, and renews the promise, only while
 * `claiming` is not set, and the engine sets it only when the promise is over, or when nothing
 * can be answered any more.
 *
 * A beat that is due for longer than the primary waits before it asks the witness itself cannot be
 * made good again: then loading begins a little before the promise ends (LOAD_AHEAD_NS), and
 * from there on no beat is answered. Only the claim has to wait for the end.
 */
#include "remus/backup_internal.h"

#include <errno.h>
#include <string.h>

#define SLICE_NS UINT64_C(10000000)
#define LOAD_AHEAD_NS UINT64_C(60000000)
#define CHECK_NS UINT64_C(250000000)
#define STATUS_NS UINT64_C(100000000)
#define RATE_NS UINT64_C(1000000000)
#define YIELD_NS UINT64_C(5000000000)

/* --------------------------------------------------------------- control reader */

static void on_beat(struct lb_bk *b, uint64_t sent_ns)
{
    Lb__Control m = LB__CONTROL__INIT;
    Lb__BeatAnswer a = LB__BEAT_ANSWER__INIT;
    bool claiming;

    if (!b->priority_set)
        lb_thread_realtime(); /* a beat that is late costs the primary its lease */
    b->priority_set = true;
    pthread_mutex_lock(&b->mu);
    claiming = b->claiming;
    if (!claiming)
        lb_promise_heard(&b->lease, lb_now_ns());
    pthread_mutex_unlock(&b->mu);
    if (claiming)
        return;
    a.sent_ns = sent_ns;
    m.kind_case = LB__CONTROL__KIND_BEAT_ANSWER;
    m.beat_answer = &a;
    lb_ctl_send(b->rx.chan, &m, NULL); /* a broken channel is noticed by the reader */
}

bool lb_bk_on_message(const Lb__Control *m, void *arg)
{
    struct lb_bk *b = arg;

    if (m->kind_case == LB__CONTROL__KIND_BEAT) {
        on_beat(b, m->beat->sent_ns);
        return true;
    }
    pthread_mutex_lock(&b->mu);
    switch (m->kind_case) {
    case LB__CONTROL__KIND_ARMED:
        b->said.armed = true;
        b->said.revision = m->armed->revision;
        lb_lease_init(&b->lease, b->spec->lease_ms, lb_now_ns());
        break;
    case LB__CONTROL__KIND_DISCARD:
        b->said.discard = true;
        snprintf(b->said.reason, sizeof(b->said.reason), "%s", m->discard->reason);
        break;
    case LB__CONTROL__KIND_YIELDED:
        b->said.yielded = true;
        b->said.yielded_epoch = m->yielded->epoch;
        b->said.yielded_ns = lb_now_ns();
        break;
    default:
        pthread_mutex_unlock(&b->mu);
        return false;
    }
    pthread_mutex_unlock(&b->mu);
    lb_rx_wake(&b->rx);
    return true;
}

struct lb_bk_said lb_bk_said(struct lb_bk *b)
{
    struct lb_bk_said s;

    pthread_mutex_lock(&b->mu);
    s = b->said;
    pthread_mutex_unlock(&b->mu);
    return s;
}

/* ----------------------------------------------------------------------- status */

void lb_bk_note(struct lb_bk *b, const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(b->st.note, sizeof(b->st.note), fmt, ap);
    va_end(ap);
}

static const char *state_name(const struct lb_bk *b)
{
    switch ((enum lb_bk_state)b->sm.state) {
    case BK_ORPHAN: return "standby";
    case BK_LOADED:
    case BK_CLAIMING: return "promoting";
    case BK_DISCARDED: return "done";
    default: return lb_sm_name(&b->sm);
    }
}

static void rates(struct lb_bk *b, uint64_t now)
{
    double s = (double)(now - b->rate_ns) / 1e9;

    if (now - b->rate_ns < RATE_NS)
        return;
    b->st.epochs_per_s = (double)b->rate_epochs / s;
    b->st.raw_bytes_per_s = (double)b->rate_bytes / s;
    b->rate_epochs = b->rate_bytes = 0;
    b->rate_ns = now;
}

void lb_bk_status(struct lb_bk *b, bool at_once)
{
    uint64_t now = lb_now_ns();
    struct lb_protect_status *st = &b->st;

    if (!b->env->status || (!at_once && now - b->reported_ns < STATUS_NS))
        return;
    b->reported_ns = now;
    rates(b, now);
    st->role = "backup";
    st->state = state_name(b);
    st->backup = b->rx.peer;
    st->epoch = st->acked = st->released = b->epoch;
    st->interval_ms = b->spec->interval_ms;
    if (b->epoch)
        st->percent = 100;
    pthread_mutex_lock(&b->mu);
    st->lease_left_ms = b->said.armed
                            ? ((double)lb_promise_end_ns(&b->lease) - (double)now) / 1e6 : -1;
    st->lag_ms = b->said.armed ? (double)(now - b->lease.heard_ns) / 1e6 : 0;
    pthread_mutex_unlock(&b->mu);
    st->failovers = b->wish.failovers;
    st->last_failover_ms = b->wish.last_failover_ms;
    st->last_failover_took_ms = b->wish.last_failover_took_ms;
    snprintf(st->witness, sizeof(st->witness), "%.159s", b->wish.opts.witness);
    if (b->witness) {
        char why[160];

        st->witness_ok = lb_witness_healthy(b->witness, why);
        if (!st->witness_ok)
            snprintf(st->witness, sizeof(st->witness), "%s", why);
    }
    b->env->status(st, b->env->base.arg);
}

/* ----------------------------------------------------------------------- checks */

int lb_bk_check(struct lb_bk *b, struct lb_error *err)
{
    struct lb_vm_ident id = lb_entry_ident(&b->rx.entry);
    struct lb_journal j = {0};
    uint64_t now = lb_now_ns();

    if (lb_readable(b->env->base.cancel_fd, 0))
        return lb_fail(err, LB_E_CANCELLED, "cancelled on the backup host");
    if (now - b->checked_ns < CHECK_NS)
        return 0;
    b->checked_ns = now;
    if (!lb_hv_exists(b->rx.env->hv, &id)) {
        lb_fail(err, LB_E_HV, "the standby of VM %s died", b->rx.entry.name);
        return lb_remedy(err, "see vms/%s/qemu.log in the state directory of the backup host",
                         b->rx.entry.name);
    }
    if (!lb_journal_load(b->rx.env->state_dir, b->rx.journal.token, &j, NULL) &&
        j.state == LB_J_REFUSED) {
        b->rx.journal = j;
        return lb_fail(err, LB_E_STATE, "host %s goes on without this standby: %s", b->rx.peer,
                       j.detail);
    }
    return 0;
}

/* ----------------------------------------------------------------------- epochs */

int lb_bk_take_epoch(struct lb_bk *b, uint64_t epoch, struct lb_error *err)
{
    Lb__Control m = LB__CONTROL__INIT;
    Lb__EpochAck a = LB__EPOCH_ACK__INIT;

    if (b->sm.state != BK_STANDBY)
        lb_point("bk-first");
    a.epoch = epoch;
    m.kind_case = LB__CONTROL__KIND_EPOCH_ACK;
    m.epoch_ack = &a;
    b->rate_epochs++;
    b->rate_bytes += lb_collector_bytes(b->coll);
    /* Acknowledged means: will be applied. When this cannot be sent the primary does not release
     * the output, which is no reason not to use the epoch. */
    lb_ctl_send(b->rx.chan, &m, NULL);
    if (lb_collector_apply(b->coll, err))
        return lb_context(err, "epoch %llu", (unsigned long long)epoch);
    b->epoch = epoch;
    if (b->sm.state == BK_STANDBY)
        return 0;
    b->rec.revision = lb_bk_said(b).revision;
    if (lb_record_move(b->rx.env->state_dir, b->rx.entry.name, &b->rec, LB_PH_STANDBY, err))
        return -1;
    lb_sm_move(&b->sm, BK_STANDBY);
    lb_bk_status(b, true);
    return 0;
}

/* The last moment at which the engine has to look again when nothing comes. */
static uint64_t load_at(struct lb_bk *b)
{
    uint64_t end, asks;

    pthread_mutex_lock(&b->mu);
    end = lb_promise_end_ns(&b->lease);
    asks = b->lease.heard_ns + b->lease.ask_ns;
    pthread_mutex_unlock(&b->mu);
    return LB_MAX(end - LOAD_AHEAD_NS, asks);
}

/* Silent for so long that there is no way back? From then on no beat is answered. */
static bool silent(struct lb_bk *b)
{
    bool yes;

    if (!lb_witness_automatic(b->witness))
        return false;
    pthread_mutex_lock(&b->mu);
    yes = lb_now_ns() >= LB_MAX(lb_promise_end_ns(&b->lease) - LOAD_AHEAD_NS,
                                b->lease.heard_ns + b->lease.ask_ns);
    if (yes)
        b->claiming = true;
    pthread_mutex_unlock(&b->mu);
    return yes;
}

/* An operator asks for failover: the primary is to yield. Without one that hears, only --force. */
static int on_failover(struct lb_bk *b)
{
    Lb__Control m = LB__CONTROL__INIT;
    Lb__YieldRequest y = LB__YIELD_REQUEST__INIT;
    uint64_t count;

    if (read(b->env->failover_fd, &count, sizeof(count)) != sizeof(count) && errno != EAGAIN)
        lb_log(LB_LOG_WARN, "failover request: %s", strerror(errno));
    if (b->sm.state == BK_STANDBY) {
        lb_log(LB_LOG_INFO, "failover was asked for: host %s is to yield", b->rx.peer);
        y.reason = (char *)"asked for on the backup";
        m.kind_case = LB__CONTROL__KIND_YIELD_REQUEST;
        m.yield_request = &y;
        lb_ctl_send(b->rx.chan, &m, NULL);
        b->yield_asked = true;
        b->yield_asked_ns = lb_now_ns();
        return 0;
    }
    if (*b->env->failover_force)
        return 1;
    lb_bk_note(b, "failover refused: host %s cannot be reached and the witness cannot say that it is "
               "down; when you know that it is: lifeboat failover %s --force", b->rx.peer,
               b->rx.entry.name);
    lb_log(LB_LOG_WARN, "%s", b->st.note);
    lb_bk_status(b, true);
    return 0;
}

/* Asked to yield, it says nothing: dead (then --force holds), or alive and unwilling. */
static bool yield_overdue(struct lb_bk *b)
{
    bool over;

    if (!b->yield_asked || lb_now_ns() - b->yield_asked_ns < YIELD_NS)
        return false;
    b->yield_asked = false;
    pthread_mutex_lock(&b->mu);
    over = lb_promise_over(&b->lease, lb_now_ns());
    if (over && *b->env->failover_force)
        b->claiming = true;
    else
        over = false;
    pthread_mutex_unlock(&b->mu);
    if (!over) {
        lb_bk_note(b, "failover refused: host %s did not yield", b->rx.peer);
        lb_log(LB_LOG_WARN, "%s", b->st.note);
    }
    return over;
}

/* The connection is gone, and no automatic witness: a person has to say that the primary is dead. */
static int await_word(struct lb_bk *b, struct lb_error *err)
{
    if (b->yield_asked && *b->env->failover_force)
        return 0; /* said just before the connection was seen to be gone */
    lb_bk_note(b, "host %s is lost: when you know that it is down: lifeboat failover %s --force",
               b->rx.peer, b->rx.entry.name);
    lb_log(LB_LOG_WARN, "%s", b->st.note);
    for (;;) {
        lb_bk_status(b, false);
        if (lb_bk_check(b, err))
            return -1;
        if (lb_readable(b->env->failover_fd, 0) && on_failover(b))
            return 0;
        lb_rx_wait(&b->rx, lb_rx_events(&b->rx), lb_now_ns() + SLICE_NS);
    }
}

static int orphan(struct lb_bk *b, const char *why, struct lb_error *err)
{
    uint64_t heard;

    pthread_mutex_lock(&b->mu);
    heard = b->lease.heard_ns;
    pthread_mutex_unlock(&b->mu);
    lb_sm_move(&b->sm, BK_ORPHAN);
    lb_log(LB_LOG_WARN, "host %s: %s; last sign of it %.1f ms ago, last complete epoch %llu",
           b->rx.peer, why, (double)(lb_now_ns() - heard) / 1e6, (unsigned long long)b->epoch);
    lb_bk_status(b, true);
    if (!lb_witness_automatic(b->witness) && await_word(b, err))
        return -1;
    pthread_mutex_lock(&b->mu);
    b->claiming = true;
    pthread_mutex_unlock(&b->mu);
    return 0;
}

/* The checkpoint connection broke; the control connection may live: the primary is told, and while
 * its beats come they are answered. */
static int await_control(struct lb_bk *b, const char *why, struct lb_error *err)
{
    struct lb_error told = LB_ERROR_INIT;

    lb_fail(&told, LB_E_NET, "checkpoints do not arrive any more: %s", why);
    if (!lb_ctl_queue_ended(b->rx.ctl, NULL))
        lb_ctl_send_failure(b->rx.chan, &told, NULL);
    while (!lb_ctl_queue_ended(b->rx.ctl, NULL) && !silent(b) && !lb_bk_said(b).discard &&
           !lb_bk_said(b).yielded) {
        if (lb_bk_check(b, err))
            return -1;
        lb_rx_wait(&b->rx, lb_rx_events(&b->rx), lb_now_ns() + SLICE_NS);
    }
    return 0;
}

/* One slice of following; 1: another one, 0: *why it ends, -1: failed. */
static int step(struct lb_bk *b, char why[256], struct lb_error *err)
{
    uint64_t epoch, until = lb_now_ns() + SLICE_NS;
    struct lb_error e = LB_ERROR_INIT;
    int got;

    if (lb_ctl_queue_ended(b->rx.ctl, &e)) {
        snprintf(why, 256, "%.255s", e.message);
        return 0;
    }
    if (silent(b)) {
        snprintf(why, 256, "silent");
        return 0;
    }
    if (yield_overdue(b)) {
        snprintf(why, 256, "silent, an operator says that it is down");
        return 0;
    }
    if (lb_witness_automatic(b->witness))
        until = LB_MIN(until, load_at(b));
    got = lb_collector_recv(b->coll, b->bulk, until, &epoch, &e);
    if (got > 0)
        return lb_bk_take_epoch(b, epoch, err) ? -1 : 1;
    if (got == 0)
        return 1;
    if (e.code == LB_E_NET) {
        snprintf(why, 256, "%.255s", e.message);
        return await_control(b, why, err);
    }
    if (err)
        *err = e;
    return -1;
}

/* The primary has stopped its guest for good: this standby has every epoch that was acknowledged. */
static int take_over(struct lb_bk *b, const struct lb_bk_said *said, struct lb_error *err)
{
    if (b->epoch < said->yielded_epoch)
        return lb_fail(err, LB_E_PROTO, "host %s yielded at epoch %llu, the last one here is %llu",
                       b->rx.peer, (unsigned long long)said->yielded_epoch,
                       (unsigned long long)b->epoch);
    lb_log(LB_LOG_INFO, "host %s yielded at epoch %llu", b->rx.peer,
           (unsigned long long)said->yielded_epoch);
    pthread_mutex_lock(&b->mu);
    b->claiming = true;
    pthread_mutex_unlock(&b->mu);
    return lb_bk_load(b, err) || lb_bk_claim(b, said->yielded_ns, err) ? -1 : 0;
}

static uint64_t last_sign(struct lb_bk *b)
{
    uint64_t t;

    pthread_mutex_lock(&b->mu);
    t = b->lease.heard_ns;
    pthread_mutex_unlock(&b->mu);
    return t;
}

int lb_bk_follow(struct lb_bk *b, struct lb_error *err)
{
    struct lb_bk_said said;
    char why[256] = "";
    int more = 1;

    b->rate_ns = lb_now_ns();
    for (;;) {
        said = lb_bk_said(b);
        if (said.discard || said.yielded)
            break;
        if (!more) {
            if (orphan(b, why, err))
                return -1;
            return lb_bk_load(b, err) || lb_bk_claim(b, last_sign(b), err) ? -1 : 0;
        }
        if (lb_bk_check(b, err))
            return -1;
        if (lb_readable(b->env->failover_fd, 0))
            on_failover(b);
        lb_bk_status(b, false);
        more = step(b, why, err);
        if (more < 0)
            return -1;
    }
    if (!said.discard)
        return take_over(b, &said, err);
    lb_sm_move(&b->sm, BK_DISCARDED);
    return 0;
}
