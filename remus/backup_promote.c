/*
 * remus/backup_promote.c - the standby becomes the VM.
 *
 *   load     drop the incomplete epoch, device state into the receiver (it stays paused), disks
 *            closed, record PROMOTING with the nonce of the claim: all of it while the promise lasts
 *   claim    not before the promise is over. Under the lock of the journal: refused there already
 *            (the primary asked, and was told that we never will)? Else the witness is asked.
 *            WON -> journal RUNNING, durable. LOST -> the primary goes on. Not known -> again, same nonce.
 *   run      the disks are opened, the guest runs; what it sent last is sent again (it may have
 *            been lost with the primary), the switches are told
 *
 * A crash before RUNNING is in the journal: recovery asks the witness with the same nonce.
 */
#include "remus/backup_internal.h"

#include <sodium.h>
#include <string.h>

#include "remus/output.h"

#define CLAIM_NS UINT64_C(1000000000)
#define AGAIN_NS UINT64_C(20000000)
#define RUN_NS UINT64_C(10000000000) /* a lock on a disk may be held by what is just being killed */
#define JOURNAL_LOCK_MS 2000

static double ms_since(uint64_t t)
{
    return (double)(lb_now_ns() - t) / 1e6;
}

/* ------------------------------------------------------------------------- load */

static int close_targets(struct lb_bk *b, struct lb_error *err)
{
    int rc = 0;

    for (unsigned i = 0; i < b->n_targets; i++)
        if (lb_disk_target_close(b->targets[i], rc ? NULL : err))
            rc = -1;
    b->n_targets = 0;
    return rc;
}

int lb_bk_load(struct lb_bk *b, struct lb_error *err)
{
    const void *state, *frames;
    size_t len, frames_len;
    uint8_t nonce[(LB_PROTECT_ID_HEX - 1) / 2];
    uint64_t t0 = lb_now_ns(), t1, t2;

    lb_collector_discard(b->coll);
    lb_collector_state(b->coll, &state, &len, &frames, &frames_len);
    if (lb_hv_load_state(b->rx.vm, state, len, err))
        return -1;
    lb_sm_move(&b->sm, BK_LOADED);
    t1 = lb_now_ns();
    if (close_targets(b, err))
        return -1;
    t2 = lb_now_ns();
    randombytes_buf(nonce, sizeof(nonce));
    lb_hex(b->rec.nonce, nonce, sizeof(nonce));
    if (lb_record_move(b->rx.env->state_dir, b->rx.entry.name, &b->rec, LB_PH_PROMOTING, err))
        return -1;
    lb_log(LB_LOG_INFO, "epoch %llu loaded: %zu bytes of state in %.1f ms, disks closed in %.1f ms, "
           "recorded in %.1f ms", (unsigned long long)b->epoch, len, (double)(t1 - t0) / 1e6,
           (double)(t2 - t1) / 1e6, ms_since(t2));
    lb_point("bk-loaded");
    return 0;
}

/* ------------------------------------------------------------------------ claim */

/* The primary yielded: it has stopped its guest for good, and there is nobody to be cut off. */
static bool yielded_unasked(struct lb_bk *b)
{
    return lb_bk_said(b).yielded && !strcmp(lb_witness_kind(b->witness), "fence");
}

/* One attempt. WON: the journal says RUNNING. */
static enum lb_claim attempt(struct lb_bk *b, bool vouched, struct lb_error *err)
{
    const char *dir = b->rx.env->state_dir;
    struct lb_journal *j = &b->rx.journal;
    struct lb_vm_ident id = lb_entry_ident(&b->rx.entry);
    LB_AUTO_FD int lock = lb_journal_lock(dir, j->token, JOURNAL_LOCK_MS, err);
    enum lb_claim c = LB_CLAIM_WON;

    if (lock < 0 || lb_journal_load(dir, j->token, j, err))
        return LB_CLAIM_UNREACHABLE;
    if (j->state == LB_J_REFUSED) {
        lb_fail(err, LB_E_STATE, "%s", j->detail);
        return LB_CLAIM_LOST;
    }
    if (!lb_hv_exists(b->rx.env->hv, &id)) { /* the primary, should it live, has the only copy */
        lb_fail(err, LB_E_HV, "the standby died");
        return LB_CLAIM_LOST;
    }
    if (!vouched && !yielded_unasked(b))
        c = lb_witness_claim(b->witness, &b->rec, lb_now_ns() + CLAIM_NS, err);
    if (c != LB_CLAIM_WON)
        return c;
    lb_point("bk-won");
    snprintf(j->detail, sizeof(j->detail), "epoch %llu%s", (unsigned long long)b->epoch,
             vouched ? ", by an operator's word" : "");
    /* On failure the file may already say RUNNING: then it is decided all the same. */
    if (lb_journal_move(dir, j, LB_J_RUNNING, err) && j->state != LB_J_RUNNING)
        return LB_CLAIM_UNREACHABLE;
    return LB_CLAIM_WON;
}

/* Between two attempts. 1: an operator vouches for the death of the primary; 2: discarded. */
static int meanwhile(struct lb_bk *b, const struct lb_error *why, struct lb_error *err)
{
    uint64_t count;

    if (lb_bk_said(b).discard)
        return 2;
    if (lb_readable(b->env->failover_fd, 0) &&
        read(b->env->failover_fd, &count, sizeof(count)) == sizeof(count) &&
        *b->env->failover_force) {
        lb_log(LB_LOG_WARN, "an operator vouches for the death of host %s", b->rx.peer);
        return 1;
    }
    if (strncmp(b->st.note, "does not run", 12)) {
        lb_bk_note(b, "does not run: the witness does not answer: %.180s", why->message);
        lb_log(LB_LOG_WARN, "%s", b->st.note);
    }
    lb_bk_status(b, false);
    return lb_bk_check(b, err);
}

/* Silence until the promise is over. false: discarded meanwhile. */
static bool keep_promise(struct lb_bk *b)
{
    uint64_t end;

    if (lb_bk_said(b).yielded)
        return true;
    pthread_mutex_lock(&b->mu);
    end = lb_promise_end_ns(&b->lease); /* it does not move: `claiming` is set */
    pthread_mutex_unlock(&b->mu);
    while (lb_now_ns() < end && !lb_bk_said(b).discard)
        lb_rx_wait(&b->rx, lb_rx_events(&b->rx), end);
    return !lb_bk_said(b).discard;
}

/* 0 and *won, 0 and discarded (sm), or -1: lost, or ended from outside. */
static int decide(struct lb_bk *b, bool *won, struct lb_error *err)
{
    struct lb_error why = LB_ERROR_INIT;
    enum lb_claim c;
    int rc = 0;

    *won = false;
    if (!keep_promise(b))
        rc = 2;
    else
        lb_sm_move(&b->sm, BK_CLAIMING);
    while (rc < 2) {
        c = attempt(b, rc == 1, &why);
        if (c == LB_CLAIM_WON) {
            *won = true;
            return 0;
        }
        if (c == LB_CLAIM_LOST) {
            lb_fail(err, LB_E_STATE, "host %s goes on, this standby was removed: %s", b->rx.peer,
                    why.message);
            return -1;
        }
        rc = meanwhile(b, &why, err);
        if (rc < 0)
            return -1;
        if (!rc)
            lb_rx_wait(&b->rx, lb_rx_events(&b->rx), lb_now_ns() + AGAIN_NS);
    }
    lb_sm_move(&b->sm, BK_DISCARDED);
    return 0;
}

/* -------------------------------------------------------------------------- run */

/* The receiver is dead: its guest never ran, and the primary, should it come back, may go on. */
static void retract(struct lb_bk *b, const char *why)
{
    const char *dir = b->rx.env->state_dir;
    LB_AUTO_FD int lock = lb_journal_lock(dir, b->rx.journal.token, JOURNAL_LOCK_MS, NULL);
    struct lb_error e = LB_ERROR_INIT;

    if (lock < 0 || lb_journal_retract(dir, &b->rx.journal, why, &e))
        lb_log_error(LB_LOG_ERROR, &e);
}

/* It is ours. A guest that runs already, because only the answer was lost, is told so again. When it
 * neither runs nor dies the rest is left to recovery. */
static int run(struct lb_bk *b, struct lb_error *err)
{
    struct lb_vm_ident id = lb_entry_ident(&b->rx.entry);
    uint64_t until = lb_now_ns() + RUN_NS;
    struct lb_error why = LB_ERROR_INIT;

    while (lb_hv_run(b->rx.vm, &why)) {
        bool alive = lb_hv_exists(b->rx.env->hv, &id);

        lb_log_error(LB_LOG_WARN, &why);
        if (alive && lb_now_ns() < until) {
            lb_sleep_ms(20);
            continue;
        }
        if (!alive)
            retract(b, why.message);
        if (err)
            *err = why;
        return lb_context(err, "the VM was taken over and does not run");
    }
    return 0;
}

static void tell_promoted(struct lb_bk *b, double took_ms)
{
    Lb__Control m = LB__CONTROL__INIT;
    Lb__Promoted p = LB__PROMOTED__INIT;

    p.took_us = (uint32_t)(took_ms * 1e3);
    m.kind_case = LB__CONTROL__KIND_PROMOTED;
    m.promoted = &p;
    lb_ctl_send(b->rx.chan, &m, NULL); /* nobody may be there */
}

/* What the guest sent last may have been lost with the primary; what arrives twice does no harm. */
static void tell_network(struct lb_bk *b)
{
    struct lb_vm_ident id = lb_entry_ident(&b->rx.entry);
    struct lb_error e = LB_ERROR_INIT;
    const void *state, *frames;
    size_t len, frames_len;

    lb_collector_state(b->coll, &state, &len, &frames, &frames_len);
    /* First: until the switches know, what clients send again goes to the host that is dead. */
    if (lb_hv_announce(b->rx.vm, &e))
        lb_log_error(LB_LOG_WARN, &e);
    if (frames_len && lb_output_inject(b->rx.vm, &id, frames, frames_len, &e))
        lb_log_error(LB_LOG_WARN, &e);
}

int lb_bk_claim(struct lb_bk *b, uint64_t since_ns, struct lb_error *err)
{
    uint64_t t_claim, t_won;
    double took_ms;
    bool won;

    lb_bk_status(b, true);
    t_claim = lb_now_ns();
    if (decide(b, &won, err))
        return -1;
    if (!won)
        return 0;
    t_won = lb_now_ns();
    lb_point("bk-journalled");
    if (run(b, err))
        return -1;
    took_ms = ms_since(since_ns);
    lb_sm_move(&b->sm, BK_PROMOTED);
    lb_log(LB_LOG_WARN, "runs here: %.1f ms after the last sign of host %s (promise and claim %.1f ms, "
           "run %.1f ms)", took_ms, b->rx.peer, (double)(t_won - t_claim) / 1e6, ms_since(t_won));
    lb_point("bk-ran");
    tell_network(b);
    tell_promoted(b, took_ms);
    lb_bk_settle(b->rx.env, &b->rx.entry, &b->rec, took_ms);
    lb_bk_note(b, "failed over from %s in %.0f ms", b->rx.peer, took_ms);
    lb_wish_load(b->rx.env->state_dir, b->rx.entry.name, &b->wish, NULL); /* the count, for status */
    lb_bk_status(b, true);
    return 0;
}
