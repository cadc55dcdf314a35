/*
 * remus/recover.c - after a crash of the session that protected, or followed: who runs the VM?
 *
 *   entry      record                   what is done
 *   PROTECTED  arming, alone, none      it goes on here
 *              fenced                   what is left is destroyed
 *              arming with a revision,
 *              protected, yielded       guest stopped; the witness and the other host are asked:
 *                                         ours -> it goes on here, unprotected
 *                                         theirs -> destroyed
 *                                         nobody answers -> stays stopped, LB_E_UNDECIDED
 *              ... process gone         nothing to claim for: the other host may still take over,
 *                                       so it is only looked at what it has done
 *   STANDBY    receiving, standby       destroyed: whoever was promised silence is not claimed against
 *              promoting                the claim is repeated with its nonce
 *              promoted, or journal     it runs here
 *
 * Two places know: the witness, and the journal of the backup (token: the protection's id), which says
 * RUNNING before the guest runs there. The journal is asked by migrate/handover.h; a question
 * that is no peek makes an undecided backup refuse for ever. The witness alone remembers when
 * it is etcd; a fence or a person remembers nothing, so then the other host is asked first.
 */
#include "remus/backup_internal.h"

#include <signal.h>
#include <sodium.h>
#include <string.h>
#include <sys/syscall.h>

#include "migrate/handover.h"
#include "remus/output.h"

#define CLAIM_NS UINT64_C(3000000000)
#define JOURNAL_LOCK_MS 5000

enum verdict { OURS, THEIRS, NOBODY_KNOWS, NEVER_THEIRS /* and our process is gone */ };

struct rc {
    const struct lb_session_env *env;
    struct lb_vm_entry e;
    struct lb_remus_record rec;
    struct lb_journal journal;      /* STANDBY */
    struct lb_hv_vm *vm;            /* PROTECTED: attached, guest stopped; or NULL */
    char *text;
};

static void say(struct rc *r, const char *fmt, ...) LB_PRINTF(2, 3);

static void say(struct rc *r, const char *fmt, ...)
{
    int n = snprintf(r->text, 512, "%s: ", r->e.name);
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(r->text + n, 512 - (size_t)n, fmt, ap);
    va_end(ap);
}

static bool exists(const struct rc *r)
{
    struct lb_vm_ident id = lb_entry_ident(&r->e);

    return r->e.proc.pid > 0 && lb_hv_exists(r->env->hv, &id);
}

static void history(const struct lb_session_env *env, const struct lb_vm_entry *e, const char *peer,
                    const char *direction, uint64_t started_ms, double took_ms, const char *final)
{
    struct lb_migrate_result res = {.ok = true, .total_ms = took_ms};
    LB_AUTO_FREE char *path = lb_asprintf("%s/history.jsonl", env->state_dir), *line = NULL;
    struct lb_error err = LB_ERROR_INIT;

    snprintf(res.final_state, sizeof(res.final_state), "%s", final);
    line = lb_migrate_result_json(e, peer, direction, started_ms, &res);
    if (line && lb_file_append_line(path, line, &err))
        lb_log_error(LB_LOG_WARN, &err);
}

/* ------------------------------------------------------------ a failover has happened */

void lb_bk_forget(const char *state_dir, const char *vm)
{
    struct lb_error err = LB_ERROR_INIT;

    if (lb_record_remove(state_dir, vm, &err) || lb_wish_remove(state_dir, vm, &err))
        lb_log_error(LB_LOG_WARN, &err);
}

/* In the order in which a crash does no harm: a record without an entry that says RUNNING is
 * finished by recovery, an entry that says so without a record is as any other VM. */
/* The host that was lost, when it comes back, is as good as any other of the list. */
static void add_candidate(struct lb_protect_wish *w, const char *name)
{
    for (unsigned i = 0; i < w->n_backups; i++)
        if (!strcmp(w->backups[i], name))
            return;
    if (w->n_backups && w->n_backups < LB_PROTECT_MAX_BACKUPS) /* none: any trusted host is */
        snprintf(w->backups[w->n_backups++], sizeof(w->backups[0]), "%s", name);
}

void lb_bk_settle(const struct lb_session_env *env, struct lb_vm_entry *e, struct lb_remus_record *rec,
                  double took_ms)
{
    const char *dir = env->state_dir;
    struct lb_protect_wish w;
    struct lb_error err = LB_ERROR_INIT;

    if (rec->phase == LB_PH_PROMOTING && !lb_wish_load(dir, e->name, &w, NULL)) {
        add_candidate(&w, rec->peer);
        w.failovers++;
        w.last_failover_ms = lb_wall_ms();
        w.last_failover_took_ms = took_ms;
        if (lb_wish_save(dir, e->name, &w, &err))
            lb_log_error(LB_LOG_WARN, &err);
    }
    if (rec->phase == LB_PH_PROMOTING && lb_record_move(dir, e->name, rec, LB_PH_PROMOTED, &err))
        lb_log_error(LB_LOG_ERROR, &err);
    e->state = LB_VM_RUNNING;
    e->token[0] = e->peer[0] = '\0';
    snprintf(e->note, sizeof(e->note), "failed over from %s", rec->peer);
    if (lb_vm_entry_save(dir, e, &err)) {
        lb_log_error(LB_LOG_ERROR, &err);
        return; /* the record stays: recovery comes here again */
    }
    history(env, e, rec->peer, "failover", lb_wall_ms() - (uint64_t)took_ms, took_ms, "running");
    if (lb_record_remove(dir, e->name, &err))
        lb_log_error(LB_LOG_WARN, &err);
}

/* --------------------------------------------------------------------- the questions */

static int new_nonce(struct rc *r, struct lb_error *err)
{
    uint8_t nonce[(LB_PROTECT_ID_HEX - 1) / 2];

    if (r->rec.nonce[0])
        return 0;
    randombytes_buf(nonce, sizeof(nonce));
    lb_hex(r->rec.nonce, nonce, sizeof(nonce));
    return lb_record_move(r->env->state_dir, r->e.name, &r->rec, r->rec.phase, err);
}

static int open_witness(struct rc *r, enum lb_side side, struct lb_witness **out,
                        struct lb_error *err)
{
    char self[LB_KEY_TEXT_BYTES];

    lb_key_format(self, r->env->identity->pub);
    return lb_witness_open(r->rec.witness, side, self, r->rec.peer, out, err);
}

/* Only the host with the key of that time is asked: another machine of that name knows nothing. */
static int ask_peer(struct rc *r, bool peek, enum lb_verdict *out, struct lb_error *err)
{
    struct lb_hosts hosts = {0};
    const struct lb_host *h;
    uint8_t key[LB_KEY_BYTES];
    int rc;

    if (lb_key_parse(r->rec.peer_key, key, err) || lb_hosts_load(r->env->state_dir, &hosts, err))
        return -1;
    h = lb_hosts_by_key(&hosts, key);
    if (h && h->address[0])
        rc = (peek ? lb_handover_peek : lb_handover_ask)(r->env, h, r->rec.id, r->e.name, out, err);
    else
        rc = lb_fail(err, LB_E_UNDECIDED, "host %s is no longer trusted, or has no address", r->rec.peer);
    lb_hosts_free(&hosts);
    return rc;
}

static enum verdict by_peer(struct rc *r, struct lb_error *err)
{
    enum lb_verdict v;

    if (ask_peer(r, false, &v, err))
        return NOBODY_KNOWS;
    return v == LB_VERDICT_RUNNING ? THEIRS : OURS;
}

static enum verdict by_claim(struct rc *r, struct lb_witness *w, struct lb_error *err)
{
    struct lb_witness_state now;
    enum lb_verdict v;

    switch (lb_witness_claim(w, &r->rec, lb_now_ns() + CLAIM_NS, err)) {
    case LB_CLAIM_WON:
        return OURS;
    case LB_CLAIM_LOST:
        /* It won, and has it been able to run? When it cannot say so, a later protection does. */
        if (!ask_peer(r, false, &v, err))
            return v == LB_VERDICT_RUNNING ? THEIRS : OURS;
        if (!lb_witness_read(w, r->rec.key, &now, lb_now_ns() + CLAIM_NS, NULL) && now.present &&
            strcmp(now.id, r->rec.id))
            return THEIRS;
        break;
    case LB_CLAIM_UNREACHABLE:
        break;
    }
    return NOBODY_KNOWS;
}

/* The guest is here, stopped: may it go on? */
static enum verdict who_runs(struct rc *r, struct lb_error *err)
{
    struct lb_witness *w = NULL;
    struct lb_error e2 = LB_ERROR_INIT;
    bool remembers;
    enum verdict v;

    if (new_nonce(r, err) || open_witness(r, LB_SIDE_PRIMARY, &w, err))
        return NOBODY_KNOWS;
    remembers = lb_witness_remembers(w);
    v = remembers ? by_claim(r, w, err) : by_peer(r, err);
    if (v == NOBODY_KNOWS && remembers)
        v = by_peer(r, &e2);
    else if (v == NOBODY_KNOWS && r->rec.phase != LB_PH_YIELDED) /* that may have run without a claim */
        v = by_claim(r, w, &e2);
    if (v == NOBODY_KNOWS && e2.message[0])
        lb_context(err, "%.200s; and", e2.message);
    lb_witness_close(w);
    return v;
}

/* The process is gone: nothing is claimed, the other host may be about to take over. */
static enum verdict who_has_it(struct rc *r, struct lb_error *err)
{
    struct lb_witness *w = NULL;
    struct lb_witness_state st = {0};
    char self[LB_KEY_TEXT_BYTES];
    enum lb_verdict v;
    bool other = false;

    lb_key_format(self, r->env->identity->pub);
    if (!open_witness(r, LB_SIDE_PRIMARY, &w, NULL) &&
        !lb_witness_read(w, r->rec.key, &st, lb_now_ns() + CLAIM_NS, NULL))
        other = st.revision > r->rec.revision && st.owner[0] && strcmp(st.owner, self);
    lb_witness_close(w);
    if (other)
        return THEIRS;
    if (ask_peer(r, true, &v, err))
        return NOBODY_KNOWS;
    if (v == LB_VERDICT_OPEN)
        lb_fail(err, LB_E_UNDECIDED, "host %s has not decided yet", r->rec.peer);
    return v == LB_VERDICT_RUNNING ? THEIRS : v == LB_VERDICT_REFUSED ? NEVER_THEIRS : NOBODY_KNOWS;
}

/* ------------------------------------------------------------------------ the guest */

/* State letter of a process; a frozen hypervisor ('T') answers nothing. */
static bool frozen(const struct lb_proc_id *p)
{
    LB_AUTO_FREE char *path = lb_asprintf("/proc/%d/stat", (int)p->pid), *text = NULL;
    const char *state;
    size_t len;

    if (p->pid <= 0 || lb_file_read(path, 4096, &text, &len, NULL) || !(state = strrchr(text, ')')))
        return false;
    return state[1] == ' ' && state[2] == 'T';
}

static void thaw(const struct lb_proc_id *p)
{
    LB_AUTO_FD int fd = frozen(p) ? lb_proc_open(p, NULL) : -1;

    if (fd >= 0)
        syscall(SYS_pidfd_send_signal, fd, SIGCONT, NULL, 0);
}

static int attach_stopped(struct rc *r, struct lb_error *err)
{
    struct lb_vm_ident id = lb_entry_ident(&r->e);

    if (r->vm)
        return 0;
    thaw(&r->e.proc);
    if (lb_hv_attach(r->env->hv, &id, &r->vm, err) || lb_hv_freeze(r->vm, false, err))
        return -1;
    return lb_hv_stop(r->vm, err);
}

/* What the dead session has left attached to the VM. */
static int clear_leftovers(struct rc *r, struct lb_error *err)
{
    LB_AUTO_FREE char *dir = lb_vm_dir(r->env->state_dir, r->e.name, false);
    LB_AUTO_FREE struct lb_hv_disk *disks = NULL;
    struct lb_vm_ident id = lb_entry_ident(&r->e);
    struct lb_error why = LB_ERROR_INIT;
    unsigned n = 0;

    if (lb_output_clear_stale(&id, r->vm, dir, err) || lb_hv_disks(r->vm, &disks, &n, err))
        return -1;
    for (unsigned i = 0; i < n; i++) /* one that does not go is no reason to keep the guest stopped */
        if (lb_hv_disk_mirror_end(r->vm, disks[i].id, &why))
            lb_log_error(LB_LOG_WARN, &why);
    return 0;
}

static int dead(struct rc *r, const char *why, struct lb_error *err)
{
    LB_AUTO_FREE char *run_dir = lb_vm_dir(r->env->state_dir, r->e.name, false);
    struct lb_vm_ident id = lb_entry_ident(&r->e);
    struct lb_error e = LB_ERROR_INIT;

    if (lb_output_clear_stale(&id, NULL, run_dir, &e))
        lb_log_error(LB_LOG_WARN, &e);
    say(r, "its process is gone; %s", why);
    r->e.state = LB_VM_DEAD;
    snprintf(r->e.note, sizeof(r->e.note), "its process is gone");
    if (lb_vm_entry_save(r->env->state_dir, &r->e, err))
        return -1;
    return lb_record_remove(r->env->state_dir, r->e.name, err);
}

/* It goes on here, unprotected. */
static int go_on(struct rc *r, const char *why, struct lb_error *err)
{
    const char *dir = r->env->state_dir;

    if (!exists(r))
        return dead(r, why, err);
    if (attach_stopped(r, err) || clear_leftovers(r, err))
        return -1;
    if (r->rec.phase != LB_PH_NONE && lb_record_move(dir, r->e.name, &r->rec, LB_PH_ALONE, err))
        return -1;
    if (lb_hv_cont(r->vm, err))
        return -1;
    r->e.state = LB_VM_RUNNING;
    r->e.token[0] = r->e.peer[0] = '\0';
    snprintf(r->e.note, sizeof(r->e.note), "recovered: %s", why);
    if (lb_vm_entry_save(dir, &r->e, err))
        return -1;
    say(r, "running on this host, unprotected (%s)", why);
    return lb_record_remove(dir, r->e.name, err);
}

static int beaten(struct rc *r, struct lb_error *err)
{
    const char *dir = r->env->state_dir;
    LB_AUTO_FREE char *run_dir = lb_vm_dir(dir, r->e.name, false);
    struct lb_vm_ident id = lb_entry_ident(&r->e);
    struct lb_error why = LB_ERROR_INIT;

    if (lb_record_move(dir, r->e.name, &r->rec, LB_PH_FENCED, err))
        return -1;
    lb_hv_detach(LB_STEAL_PTR(r->vm));
    if (r->e.proc.pid > 0 && lb_hv_end(r->env->hv, &id, err))
        return -1;
    /* Only now: its output was held to the end. */
    if (lb_output_clear_stale(&id, NULL, run_dir, &why))
        lb_log_error(LB_LOG_WARN, &why);
    say(r, "host %s took it over; the copy here was removed", r->rec.peer);
    history(r->env, &r->e, r->rec.peer, "failed-over", r->rec.changed_ms, 0, "moved");
    if (lb_vm_entry_remove(dir, r->e.name, err))
        return -1;
    lb_bk_forget(dir, r->e.name);
    return 0;
}

static int undecided(struct rc *r, const char *here, struct lb_error *err)
{
    say(r, "%s; whether host %s runs it is not known", here, r->rec.peer);
    snprintf(r->e.note, sizeof(r->e.note), "%s", r->text + strlen(r->e.name) + 2);
    lb_vm_entry_save(r->env->state_dir, &r->e, NULL);
    if (err)
        err->code = LB_E_UNDECIDED;
    return lb_remedy(err, "bring the witness or host %s back: it is asked again by itself, or by "
                          "`lifeboat recover %s`", r->rec.peer, r->e.name);
}

static int recover_primary(struct rc *r, struct lb_error *err)
{
    struct lb_error why = LB_ERROR_INIT;
    bool gone = !exists(r);

    switch (r->rec.phase) {
    case LB_PH_FENCED:
        return beaten(r, err);
    case LB_PH_PROTECTED:
    case LB_PH_YIELDED:
        break;
    case LB_PH_ARMING:
        if (r->rec.revision) /* Armed may have been sent, and an epoch whose Ack was not seen */
            break;
        /* fall through */
    default:
        return go_on(r, r->rec.phase == LB_PH_ALONE ? "the backup will never run it"
                                                    : "no complete checkpoint had been made", err);
    }
    if (!gone && !frozen(&r->e.proc) && attach_stopped(r, &why))
        lb_log_error(LB_LOG_WARN, &why); /* its output is held: asking does not depend on it */
    switch (gone ? who_has_it(r, err) : who_runs(r, err)) {
    case OURS:
        return go_on(r, "the backup has not taken over", err);
    case NEVER_THEIRS:
        return dead(r, "the backup will never run it", err);
    case THEIRS:
        return beaten(r, err);
    case NOBODY_KNOWS:
        break;
    }
    return undecided(r, gone ? "its process is gone" : "stopped here", err);
}

/* ------------------------------------------------------------------------ a standby */

static int finish(struct rc *r, struct lb_error *err)
{
    struct lb_vm_ident id = lb_entry_ident(&r->e);
    bool alive, running;

    if (!exists(r))
        return dead(r, "it had been taken over and died here", err);
    if (lb_hv_attach(r->env->hv, &id, &r->vm, err) || lb_hv_status(r->vm, &alive, &running, err) ||
        (!running && lb_hv_cont(r->vm, err)) || lb_hv_announce(r->vm, err))
        return -1;
    lb_bk_settle(r->env, &r->e, &r->rec, 0);
    say(r, "running on this host (failed over from %s)", r->rec.peer);
    return 0;
}

/* The claim may have been won: the primary goes on, and wants to protect its VM again. */
static void give_back(struct rc *r)
{
    struct lb_witness *w = NULL;
    struct lb_error err = LB_ERROR_INIT;

    if (r->rec.phase != LB_PH_PROMOTING)
        return;
    if (open_witness(r, LB_SIDE_BACKUP, &w, &err) ||
        lb_witness_disarm(w, &r->rec, lb_now_ns() + CLAIM_NS, &err))
        lb_log_error(LB_LOG_WARN, &err);
    lb_witness_close(w);
}

static int discard(struct rc *r, struct lb_error *err)
{
    if (lb_receiver_discard(r->env, &r->e, err))
        return -1;
    give_back(r);
    lb_bk_forget(r->env->state_dir, r->e.name);
    say(r, "an unfinished standby was removed; it stays on host %s", r->rec.peer);
    return 0;
}

/* The record may be from before the end of the promise. */
static void keep_promise(struct rc *r)
{
    struct lb_protect_wish w;
    struct lb_lease l;
    uint64_t now = lb_now_ns(), end;

    lb_lease_init(&l, lb_wish_load(r->env->state_dir, r->e.name, &w, NULL) ? 0 : w.opts.lease_ms, now);
    end = lb_promise_end_ns(&l);
    while ((now = lb_now_ns()) < end)
        lb_sleep_ms((unsigned)((end - now) / 1000000 + 1));
}

static int claim_again(struct rc *r, struct lb_error *err)
{
    const char *dir = r->env->state_dir;
    struct lb_witness *w = NULL;
    enum lb_claim c = LB_CLAIM_UNREACHABLE;

    if (!exists(r)) /* could not run it any more; a primary that asks may go on */
        return discard(r, err);
    keep_promise(r);
    if (open_witness(r, LB_SIDE_BACKUP, &w, err))
        return undecided(r, "loaded here and paused", err);
    LB_AUTO_FD int lock = lb_journal_lock(dir, r->e.token, JOURNAL_LOCK_MS, err);
    if (lock >= 0 && !lb_journal_load(dir, r->e.token, &r->journal, err))
        c = r->journal.state == LB_J_PREPARED
                ? lb_witness_claim(w, &r->rec, lb_now_ns() + CLAIM_NS, err)
                : LB_CLAIM_LOST;
    lb_witness_close(w);
    if (c == LB_CLAIM_WON && lb_journal_move(dir, &r->journal, LB_J_RUNNING, err))
        return -1;
    if (lock >= 0)
        close(LB_STEAL_FD(lock));
    return c == LB_CLAIM_WON    ? finish(r, err)
           : c == LB_CLAIM_LOST ? discard(r, err)
                                : undecided(r, "loaded here and paused", err);
}

static int recover_backup(struct rc *r, struct lb_error *err)
{
    if (lb_journal_load(r->env->state_dir, r->e.token, &r->journal, err))
        return -1;
    if (r->journal.state == LB_J_RUNNING)
        return finish(r, err);
    if (r->rec.phase == LB_PH_PROMOTING && r->journal.state == LB_J_PREPARED)
        return claim_again(r, err);
    return discard(r, err);
}

int lb_remus_recover(const struct lb_session_env *env, const char *vm_name, char text[512],
                     struct lb_error *err)
{
    struct rc r = {.env = env, .text = text};
    int rc;

    text[0] = '\0';
    if (lb_vm_entry_load(env->state_dir, vm_name, &r.e, err) ||
        lb_record_load(env->state_dir, vm_name, &r.rec, err))
        return -1;
    if (r.e.state == LB_VM_PROTECTED)
        rc = recover_primary(&r, err);
    else if (r.e.state == LB_VM_STANDBY)
        rc = recover_backup(&r, err);
    else
        rc = lb_fail(err, LB_E_INTERNAL, "VM %s is %s: not a matter of protection", vm_name,
                     lb_vm_state_name(r.e.state));
    lb_hv_detach(r.vm);
    return rc;
}
