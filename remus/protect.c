/*
 * remus/protect.c - the primary's session from above.
 *
 * Happy path: lb_protect_run reads top to bottom: setup, engine until something ends it, settle.
 */
#include "remus/protect_internal.h"

#include <sodium.h>
#include <stdarg.h>
#include <string.h>

#include "migrate/handover.h"

#define CLAIM_LOST_NS UINT64_C(2000000000)
#define TO LB_SM_TO
#define FAIL (TO(P_FAILED) | TO(P_DECIDING))

static const struct lb_sm_state states[] = {
    [P_CONNECT] = {"connecting", TO(P_PREFLIGHT) | FAIL},
    [P_PREFLIGHT] = {"preflight", TO(P_LAUNCH) | FAIL},
    [P_LAUNCH] = {"launching", TO(P_DISKS) | TO(P_ROUNDS) | FAIL},
    [P_DISKS] = {"disk-sync", TO(P_ROUNDS) | FAIL},
    [P_ROUNDS] = {"pre-copy", TO(P_ARM) | FAIL},
    [P_ARM] = {"arming", TO(P_PROTECTED) | TO(P_UNPROTECT) | FAIL},
    [P_PROTECTED] = {"protected", TO(P_UNPROTECT) | TO(P_DECIDING)},
    [P_UNPROTECT] = {"unprotecting", TO(P_DECIDING) | TO(P_DONE) | TO(P_FENCED) | TO(P_UNDECIDED)},
    /* the backup is silent, or something broke: the guard finds out who may run it */
    [P_DECIDING] = {"no-lease", TO(P_ALONE) | TO(P_FENCED) | TO(P_DONE) | TO(P_FAILED) |
                                    TO(P_UNDECIDED)},
    [P_ALONE] = {"alone", TO(P_DONE) | TO(P_UNDECIDED)},
    [P_FENCED] = {"fenced", TO(P_DONE)},
    [P_DONE] = {"done", 0},
    [P_FAILED] = {"failed", 0},
    [P_UNDECIDED] = {"no-lease", 0},
};

const char *lb_protect_end_name(enum lb_protect_end e)
{
    static const char *const names[] = {
        [LB_PROTECT_OFF] = "off",         [LB_PROTECT_ALONE] = "alone",
        [LB_PROTECT_FENCED] = "fenced",   [LB_PROTECT_YIELDED] = "yielded",
        [LB_PROTECT_FAILED] = "failed",   [LB_PROTECT_UNDECIDED] = "undecided",
    };

    return (unsigned)e < LB_ARRAY_LEN(names) ? names[e] : "unknown";
}

void lb_prot_move(struct prot *p, enum lb_prot_state to)
{
    lb_sm_move(&p->sm, to);
    p->extra_percent = 0;
    lb_prot_report(p, true);
}

void lb_prot_note(struct prot *p, const char *fmt, ...)
{
    char text[sizeof(p->st.note)];
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    if (!strcmp(text, p->st.note))
        return;
    memcpy(p->st.note, text, sizeof(text));
    lb_log(LB_LOG_INFO, "%s", text);
}

/* -------------------------------------------------------- news of other threads */

void lb_prot_wait(struct prot *p, uint64_t deadline_ns)
{
    struct timespec ts = {(time_t)(deadline_ns / 1000000000u), (long)(deadline_ns % 1000000000u)};

    if (deadline_ns == UINT64_MAX)
        pthread_cond_wait(&p->cond, &p->mu);
    else
        pthread_cond_timedwait(&p->cond, &p->mu, &ts);
}

void lb_prot_lost(struct prot *p, const struct lb_error *why)
{
    struct lb_guard *g;

    pthread_mutex_lock(&p->mu);
    if (!p->lost && !p->disk_failed)
        p->why = *why;
    p->lost = true;
    g = p->guard;
    pthread_cond_broadcast(&p->cond);
    pthread_mutex_unlock(&p->mu);
    if (g)
        lb_guard_ask(g, why->message);
}

void lb_prot_guard_changed(void *arg)
{
    struct prot *p = arg;

    pthread_mutex_lock(&p->mu);
    pthread_cond_broadcast(&p->cond);
    pthread_mutex_unlock(&p->mu);
}

/* The backup has the claim: did it come to run the guest? Its journal says so, and when it has not decided
 * it never will run it after this. When it cannot be asked, a later protection says that it did. */
enum lb_verdict_on_us lb_prot_claim_lost(void *arg)
{
    struct prot *p = arg;
    struct lb_witness_state now;
    struct lb_error err = LB_ERROR_INIT;
    enum lb_verdict v;

    if (!lb_handover_ask(p->base, p->backup, p->rec.id, p->entry.name, &v, &err))
        return v == LB_VERDICT_RUNNING ? LB_GUARD_THEIRS : LB_GUARD_OURS;
    if (!lb_witness_read(p->witness, p->rec.key, &now, lb_now_ns() + CLAIM_LOST_NS, NULL) &&
        now.present && strcmp(now.id, p->rec.id))
        return LB_GUARD_THEIRS;
    lb_log_error(LB_LOG_WARN, &err);
    return LB_GUARD_OPEN;
}

/* The watcher of cancel_fd, or the control reader at the end of the channel. */
static void on_interrupt(bool cancel, void *arg)
{
    struct prot *p = arg;
    struct lb_error why = LB_ERROR_INIT;

    if (!cancel) {
        if (!p->tx.ctl || !lb_ctl_queue_ended(p->tx.ctl, &why))
            lb_fail(&why, LB_E_NET, "the connection to the backup broke");
        lb_context(&why, "backup %s", p->backup->name);
        lb_prot_lost(p, &why);
        return;
    }
    pthread_mutex_lock(&p->mu);
    p->cancel = true;
    pthread_cond_broadcast(&p->cond);
    pthread_mutex_unlock(&p->mu);
}

/* ------------------------------------------------------------------- the session */

static void init_locks(struct prot *p)
{
    pthread_condattr_t ca;

    lb_mutex_init_inherit(&p->mu);
    pthread_condattr_init(&ca);
    pthread_condattr_setclock(&ca, CLOCK_MONOTONIC);
    pthread_cond_init(&p->cond, &ca);
    pthread_condattr_destroy(&ca);
}

/* What the backup saves beside its standby: without a wish on disk, one that says just this. */
static void load_wish(struct prot *p)
{
    if (!lb_wish_load(p->base->state_dir, p->entry.name, &p->wish, NULL))
        return;
    memset(&p->wish, 0, sizeof(p->wish));
    p->wish.opts = p->opts;
    p->wish.n_backups = 1;
    snprintf(p->wish.backups[0], sizeof(p->wish.backups[0]), "%s", p->backup->name);
}

static void init(struct prot *p, const struct lb_remus_env *env, const struct lb_vm_entry *vm,
                 const struct lb_host *backup, const struct lb_protect_opts *opts)
{
    p->env = env;
    p->base = &env->base;
    p->backup = backup;
    p->entry = *vm;
    p->opts = *opts;
    if (!p->opts.interval_ms)
        p->opts.interval_ms = LB_REMUS_INTERVAL_MS;
    if (!p->opts.lease_ms)
        p->opts.lease_ms = lb_lease_default_ms(p->opts.witness);
    p->mopts.bandwidth_bytes_per_s = opts->bandwidth_bytes_per_s;
    p->mopts.channels = opts->channels;
    p->mopts.insecure_plaintext = opts->insecure_plaintext;
    p->mopts.transport = (enum lb_transport_wish)opts->transport;
    p->pauses = lb_alloc(sizeof(*p->pauses));
    p->run_dir = lb_vm_dir(p->base->state_dir, vm->name, true);
    for (unsigned i = 0; i < LB_PROT_SLOTS; i++)
        lb_epoch_init(&p->slot[i].e);
    init_locks(p);
    lb_sm_init(&p->sm, "protect", states, LB_ARRAY_LEN(states), P_CONNECT);
    lb_tx_init(&p->tx, p->base, backup, &p->entry, &p->mopts);
    p->tx.what = "protection";
    p->tx.verb = "protect";
    p->tx.on_interrupt = on_interrupt;
    p->tx.arg = p;
    randombytes_buf(p->tx.token, sizeof(p->tx.token));
    lb_hex(p->rec.id, p->tx.token, sizeof(p->tx.token));
    snprintf(p->rec.peer, sizeof(p->rec.peer), "%s", backup->name);
    lb_key_format(p->rec.peer_key, backup->pub);
    snprintf(p->rec.witness, sizeof(p->rec.witness), "%s", p->opts.witness);
    load_wish(p);
}

static void tear_down(struct prot *p)
{
    lb_prot_ship_stop(p);
    lb_tx_hang_up(&p->tx);
    lb_guard_stop(p->guard);
    lb_disk_source_close(p->disk);
    lb_output_close(p->output);
    lb_witness_close(p->witness);
    lb_tx_close(&p->tx);
    lb_bulk_close(p->bulk);
    lb_encoder_free(p->enc);
    for (unsigned i = 0; i < LB_PROT_SLOTS; i++)
        lb_epoch_free(&p->slot[i].e);
    pthread_cond_destroy(&p->cond);
    pthread_mutex_destroy(&p->mu);
    free(p->disks);
    free(p->parts);
    free(p->run_dir);
    free(p->pauses);
    free(p);
}

int lb_protect_run(const struct lb_remus_env *env, const struct lb_vm_entry *vm,
                   const struct lb_host *backup, const struct lb_protect_opts *opts,
                   enum lb_protect_end *end, struct lb_error *err)
{
    struct prot *p = lb_alloc(sizeof(*p));
    struct lb_error local = LB_ERROR_INIT;
    int rc;

    init(p, env, vm, backup, opts);
    lb_prot_report(p, true);
    rc = lb_prot_setup(p, &local);
    if (rc && !p->guard) {
        *end = LB_PROTECT_FAILED;
        lb_prot_abandon(p, &local);
    } else {
        rc = lb_prot_settle(p, rc ? WHY_BROKEN : lb_prot_engine(p, &local), end, &local);
    }
    lb_log(LB_LOG_INFO, "protection ended: %s", lb_protect_end_name(*end));
    tear_down(p);
    if (rc && err)
        *err = local;
    return rc;
}
