/*
 * remus/protect_end.c - how a protection ends.
 *
 *   abandon   before arming: nothing but the guest's own host ever mattered
 *   settle    after it: first it is made certain who has the guest (the guard's verdict), and only
 *             then anything is undone:  ours -> free, theirs -> destroyed here, unknown -> frozen
 *
 *   unprotect, broken   Discard to the backup; its Discarded is as good as a claim won
 *   backup lost         the claim at the witness (the guard asks by itself)
 *   yield               stop, last epoch, Yielded; the backup claims and says Promoted
 *   QEMU killed         as yield, with the last epoch that was acknowledged: what a protection is for
 *   guest powered off   as unprotect: nobody may switch it on again
 */
#include "remus/protect_internal.h"

#include <string.h>

#define MS UINT64_C(1000000)
#define DRAIN_NS (100 * MS)
#define DISARM_NS UINT64_C(5000000000)
#define REPORT_NS (100 * MS)
/* A host that dies takes its processes one after the other. When a part of this protection is gone the
 * rest may be about to go: to tell the backup to give up would leave no copy. Output is held meanwhile. */
#define GRACE_NS (500 * MS)

/* ------------------------------------------------------------------- who has it */

/* Until there is a verdict, or the deadline; status goes on being reported. */
static enum lb_verdict_on_us wait_verdict(struct prot *p, uint64_t deadline_ns)
{
    enum lb_verdict_on_us v;

    while ((v = lb_guard_wait(p->guard, LB_MIN(deadline_ns, lb_now_ns() + REPORT_NS))) ==
               LB_GUARD_OPEN &&
           lb_now_ns() < deadline_ns)
        lb_prot_report(p, false);
    return v;
}

static enum lb_verdict_on_us ask(struct prot *p, const char *why)
{
    lb_guard_ask(p->guard, why);
    return wait_verdict(p, UINT64_MAX);
}

static int send_discard(struct prot *p, const char *reason)
{
    Lb__Control m = LB__CONTROL__INIT;
    Lb__Discard d = LB__DISCARD__INIT;

    d.reason = (char *)reason;
    m.kind_case = LB__CONTROL__KIND_DISCARD;
    m.discard = &d;
    return lb_prot_send(p, &m, NULL);
}

static enum lb_verdict_on_us discard(struct prot *p, const char *reason)
{
    enum lb_verdict_on_us v = LB_GUARD_OPEN;

    lb_point("pr-ending");
    if (!send_discard(p, reason))
        v = wait_verdict(p, lb_now_ns() + LB_PROT_DISCARD_NS);
    return v != LB_GUARD_OPEN ? v : ask(p, "the backup does not confirm that it gives up");
}

/* What was released is on its way, and may not be heard after the backup's guest. What is still here after
 * this stays: the backup sends it again. */
static void drain_output(struct prot *p)
{
    uint64_t until = lb_now_ns() + DRAIN_NS;
    struct lb_output_stats st;

    do {
        lb_output_get_stats(p->output, &st);
        if (!st.held_packets)
            return;
        lb_sleep_ms(1);
    } while (lb_now_ns() < until);
}

/* The guest will not run here again unless the witness says so; one without a memory cannot, and then
 * only the backup's own word counts, which recovery waits for. */
static enum lb_verdict_on_us hand_to_backup(struct prot *p, struct lb_error *err)
{
    Lb__Control m = LB__CONTROL__INIT;
    Lb__Yielded y = LB__YIELDED__INIT;
    uint64_t until = lb_now_ns() + LB_PROT_YIELD_NS;
    bool promoted;

    drain_output(p);
    if (!lb_guard_yield(p->guard, true))
        return ask(p, "the backup was silent before the guest was handed to it");
    if (lb_record_move(p->base->state_dir, p->entry.name, &p->rec, LB_PH_YIELDED, err)) {
        lb_guard_yield(p->guard, false);
        return discard(p, err->message);
    }
    lb_point("pr-yield");
    y.epoch = lb_prot_acked(p); /* nothing is on its way any more */
    m.kind_case = LB__CONTROL__KIND_YIELDED;
    m.yielded = &y;
    if (!lb_prot_send(p, &m, NULL)) {
        lb_point("pr-yielded");
        pthread_mutex_lock(&p->mu);
        while (!p->promoted && !p->lost && lb_now_ns() < until &&
               lb_guard_verdict(p->guard) == LB_GUARD_OPEN)
            lb_prot_wait(p, until);
        promoted = p->promoted;
        pthread_mutex_unlock(&p->mu);
        if (promoted)
            lb_guard_promoted(p->guard);
        else if (!lb_witness_remembers(p->witness))
            return LB_GUARD_UNDECIDED;
    }
    lb_guard_yield(p->guard, false);
    return ask(p, "the backup does not say that it took over");
}

/* The guest stays stopped. */
static enum lb_verdict_on_us yield(struct prot *p, struct lb_error *err)
{
    enum lb_verdict_on_us v;

    lb_prot_note(p, "planned failover to %s", p->backup->name);
    if (!lb_prot_drain(p, lb_now_ns() + LB_PROT_YIELD_NS))
        return ask(p, "the backup asked for the guest, but does not follow");
    if (lb_prot_epoch(p, true, err)) {
        lb_log_error(LB_LOG_WARN, err);
        lb_prot_resume(p, NULL);
        return discard(p, err->message);
    }
    if (!lb_prot_drain(p, lb_now_ns() + LB_PROT_YIELD_NS))
        return ask(p, "the backup asked for the guest, but does not follow");
    v = hand_to_backup(p, err);
    p->yielding = v == LB_GUARD_THEIRS;
    return v;
}

/* ------------------------------------------------------------------- taking it down */

static bool vm_exists(struct prot *p)
{
    struct lb_vm_ident id = lb_entry_ident(&p->entry);

    return lb_hv_exists(p->base->hv, &id);
}

/* The guest lives: it is stopped, and what was held leaves in its order. It stays stopped. */
static int release_output(struct prot *p, struct lb_error *err)
{
    uint64_t until = lb_now_ns() + DISARM_NS;

    while (p->out_armed && vm_exists(p) && lb_now_ns() < until) {
        p->tx.stopped = true;
        if (!lb_hv_stop(p->tx.vm, err) && !lb_output_disarm(p->output, true, err))
            p->out_armed = false;
        else
            lb_sleep_ms(20);
    }
    return p->out_armed ? -1 : 0;
}

/* The guest is dead: what is still held is dropped. */
static void drop_output(struct prot *p)
{
    struct lb_vm_ident id = lb_entry_ident(&p->entry);
    struct lb_error err = LB_ERROR_INIT;

    lb_tx_hang_up(&p->tx); /* no Ack releases anything any more */
    lb_output_close(LB_STEAL_PTR(p->output));
    if (p->out_armed && lb_output_clear_stale(&id, NULL, p->run_dir, &err))
        lb_log_error(LB_LOG_ERROR, &err);
    p->out_armed = false;
}

static void end_mirrors(struct prot *p)
{
    struct lb_error err = LB_ERROR_INIT;

    for (unsigned i = 0; p->mirroring && i < p->n_disks; i++)
        if (lb_hv_disk_mirror_end(p->tx.vm, p->disks[i].id, &err))
            lb_log_error(LB_LOG_WARN, &err);
    p->mirroring = false;
}

static void save_entry(struct prot *p, enum lb_vm_state state)
{
    struct lb_error err = LB_ERROR_INIT;

    p->entry.state = state;
    p->entry.peer[0] = '\0';
    if (lb_vm_entry_save(p->base->state_dir, &p->entry, &err))
        lb_log_error(LB_LOG_ERROR, &err);
}

/* The hypervisor forgets us. 0: the guest runs; 1: its process is gone; -1: it is paused, or cannot speak. */
static int let_go(struct prot *p, struct lb_error *err)
{
    struct lb_error e2 = LB_ERROR_INIT;
    int rc = lb_prot_resume(p, &e2);

    lb_prot_ship_stop(p); /* a first copy that waits for the link, too */
    if (!rc && p->out_armed) {
        lb_hv_checkpoint_mode(p->tx.vm, false, NULL);
        rc = release_output(p, &e2);
        rc = lb_prot_resume(p, &e2) || rc ? -1 : 0;
    }
    if (!vm_exists(p)) {
        drop_output(p);
        if (!p->entry.note[0])
            snprintf(p->entry.note, sizeof(p->entry.note), "its process died while it was protected");
        return 1;
    }
    end_mirrors(p);
    if (!rc)
        return 0;
    lb_fail(err, LB_E_HV, "VM %s could not be set free: %.300s", p->entry.name,
            e2.message);
    return lb_remedy(err, "it is tried again by itself; `lifeboat recover %s` tries at once",
                     p->entry.name);
}

/* Nobody else will run it. */
static int go_free(struct prot *p, struct lb_error *err)
{
    struct lb_error e2 = LB_ERROR_INIT;
    int rc;

    lb_point("pr-free");
    if (lb_record_move(p->base->state_dir, p->entry.name, &p->rec, LB_PH_ALONE, &e2))
        lb_log_error(LB_LOG_ERROR, &e2);
    lb_point("pr-alone");
    send_discard(p, "the guest goes on without this backup");
    rc = let_go(p, err);
    if (rc < 0)
        return -1; /* the record says alone: recovery continues the guest */
    if (p->discarded && lb_witness_disarm(p->witness, &p->rec, lb_now_ns() + 2000 * MS, &e2))
        lb_log_error(LB_LOG_WARN, &e2);
    save_entry(p, rc ? LB_VM_DEAD : LB_VM_RUNNING);
    if (lb_record_remove(p->base->state_dir, p->entry.name, &e2))
        lb_log_error(LB_LOG_ERROR, &e2);
    return 0;
}

static void write_history(struct prot *p)
{
    struct lb_migrate_result res = {.ok = true};
    struct lb_error err = LB_ERROR_INIT;
    LB_AUTO_FREE char *path = lb_asprintf("%s/history.jsonl", p->base->state_dir), *line;

    snprintf(res.final_state, sizeof(res.final_state), "moved");
    line = lb_migrate_result_json(&p->entry, p->backup->name, "failed-over", lb_wall_ms(), &res);
    if (line && lb_file_append_line(path, line, &err))
        lb_log_error(LB_LOG_WARN, &err);
}

/* The backup runs it: nothing may be left here. */
static void fenced(struct prot *p)
{
    struct lb_vm_ident id = lb_entry_ident(&p->entry);
    struct lb_error err = LB_ERROR_INIT;

    if (lb_record_move(p->base->state_dir, p->entry.name, &p->rec, LB_PH_FENCED, &err))
        lb_log_error(LB_LOG_ERROR, &err);
    lb_point("pr-fenced");
    lb_prot_ship_stop(p);
    lb_tx_hang_up(&p->tx);
    lb_prot_drop_save(p);
    if (lb_hv_destroy(LB_STEAL_PTR(p->tx.vm), &err) && lb_hv_end(p->base->hv, &id, &err)) {
        lb_log_error(LB_LOG_ERROR, &err);
        return; /* the record says fenced: recovery destroys it */
    }
    drop_output(p);
    write_history(p);
    /* With the entry its directory goes, unless somebody else uses it. */
    if (lb_vm_entry_remove(p->base->state_dir, p->entry.name, &err) ||
        lb_record_remove(p->base->state_dir, p->entry.name, &err) ||
        lb_wish_remove(p->base->state_dir, p->entry.name, &err))
        lb_log_error(LB_LOG_ERROR, &err);
}

/* ------------------------------------------------------------------------ ends */

int lb_prot_abandon(struct prot *p, struct lb_error *err)
{
    struct lb_error e2 = LB_ERROR_INIT;
    Lb__Control m = LB__CONTROL__INIT;
    Lb__Cancel c = LB__CANCEL__INIT;
    int rc;

    if (p->tx.vm && p->touched)
        lb_hv_checkpoint_mode(p->tx.vm, false, NULL);
    rc = p->tx.vm ? let_go(p, &e2) : 0;
    c.reason = err->message;
    m.kind_case = LB__CONTROL__KIND_CANCEL;
    m.cancel = &c;
    if (p->tx.reached_peer)
        lb_prot_send(p, &m, NULL);
    lb_prot_move(p, P_FAILED);
    if (!p->touched)
        return -1;
    if (rc < 0) { /* the record says arming: recovery continues the guest */
        *err = e2;
        return -1;
    }
    if (!rc && err->code == LB_E_CANCELLED)
        snprintf(p->entry.note, sizeof(p->entry.note), "protection by %.60s was given up before it had all: %.120s",
                 p->backup->name, err->message);
    else if (!rc)
        snprintf(p->entry.note, sizeof(p->entry.note), "protection by %.60s failed: %.150s",
                 p->backup->name, err->message);
    save_entry(p, rc ? LB_VM_DEAD : LB_VM_RUNNING);
    if (lb_record_remove(p->base->state_dir, p->entry.name, &e2))
        lb_log_error(LB_LOG_ERROR, &e2);
    return -1;
}

static enum lb_verdict_on_us killed(struct prot *p, struct lb_error *err)
{
    if (!p->may_release)
        return discard(p, err->message);
    lb_prot_note(p, "the VM's process was killed: %s takes over", p->backup->name);
    lb_prot_drain(p, lb_now_ns() + LB_PROT_DISCARD_NS);
    p->yielding = true;
    return hand_to_backup(p, err);
}

static enum lb_verdict_on_us find_out(struct prot *p, enum lb_prot_why why, struct lb_error *err)
{
    switch (why) {
    case WHY_CANCEL:
        lb_prot_move(p, P_UNPROTECT);
        return discard(p, "unprotected");
    case WHY_YIELD:
        lb_prot_move(p, P_UNPROTECT);
        return yield(p, err);
    case WHY_KILLED:
        lb_prot_move(p, P_DECIDING);
        return killed(p, err);
    case WHY_BROKEN:
        lb_prot_resume(p, NULL); /* its output is still held */
        lb_prot_move(p, P_DECIDING);
        lb_guard_wait(p->guard, lb_now_ns() + GRACE_NS);
        return vm_exists(p) ? discard(p, err->message) : killed(p, err);
    case WHY_POWEROFF:
        lb_guard_switched_off(p->guard);
        lb_prot_move(p, P_DECIDING);
        snprintf(p->entry.note, sizeof(p->entry.note), "the guest switched itself off");
        return discard(p, p->entry.note);
    case WHY_LOST:
    case WHY_VERDICT:
        break;
    }
    lb_prot_move(p, P_DECIDING);
    return ask(p, "the backup is lost");
}

/* Handed over, or dead: only the backup knows whether it runs it. */
static int up_to_backup(struct prot *p, const char *here, struct lb_error *err)
{
    snprintf(p->entry.note, sizeof(p->entry.note), "%s; whether host %.60s runs it is not known", here,
             p->backup->name);
    lb_vm_entry_save(p->base->state_dir, &p->entry, NULL);
    lb_fail(err, LB_E_UNDECIDED, "VM %s: %s; whether host %s runs it is not known", p->entry.name, here,
            p->backup->name);
    return lb_remedy(err, "bring host %s back: it is asked again by itself, `lifeboat recover %s` does it "
                          "at once", p->backup->name, p->entry.name);
}

static int undecided(struct prot *p, struct lb_error *err)
{
    char trouble[256];

    lb_guard_trouble(p->guard, trouble);
    lb_prot_move(p, P_UNDECIDED);
    if (!vm_exists(p))
        return up_to_backup(p, "its process is gone", err);
    if (p->rec.phase == LB_PH_YIELDED)
        return up_to_backup(p, "stopped, handed over", err);
    snprintf(p->entry.note, sizeof(p->entry.note),
             "frozen: backup %.60s is silent and the witness cannot be asked", p->backup->name);
    lb_vm_entry_save(p->base->state_dir, &p->entry, NULL);
    lb_fail(err, LB_E_UNDECIDED,
            "VM %s is frozen: backup %s is silent and the witness cannot be asked (%.200s)",
            p->entry.name, p->backup->name, trouble);
    return lb_remedy(err, "bring the witness back; it is asked again by itself, "
                          "`lifeboat recover %s` does it at once", p->entry.name);
}

static int theirs(struct prot *p, enum lb_protect_end *end, struct lb_error *err)
{
    lb_prot_move(p, P_FENCED);
    fenced(p);
    lb_prot_move(p, P_DONE);
    *end = p->yielding ? LB_PROTECT_YIELDED : LB_PROTECT_FENCED;
    if (p->yielding)
        return 0;
    lb_fail(err, LB_E_STATE, "VM %s runs on %s: it took over while this host was silent",
            p->entry.name, p->backup->name);
    return lb_remedy(err, "look at it there: `lifeboat status %s`", p->entry.name);
}

int lb_prot_settle(struct prot *p, enum lb_prot_why why, enum lb_protect_end *end,
                   struct lb_error *err)
{
    enum lb_verdict_on_us v = find_out(p, why, err);
    bool asked = why == WHY_CANCEL || why == WHY_POWEROFF;
    int rc;

    if (v == LB_GUARD_THEIRS)
        return theirs(p, end, err);
    *end = LB_PROTECT_UNDECIDED;
    if (v == LB_GUARD_UNDECIDED)
        return undecided(p, err);
    if (p->sm.state == P_DECIDING && !asked)
        lb_prot_move(p, lb_prot_acked(p) ? P_ALONE : P_FAILED);
    rc = go_free(p, err);
    if (rc)
        return -1;
    if (p->sm.state != P_FAILED)
        lb_prot_move(p, P_DONE);
    *end = asked ? LB_PROTECT_OFF : lb_prot_acked(p) ? LB_PROTECT_ALONE : LB_PROTECT_FAILED;
    if (asked)
        return 0;
    if (err->code == LB_OK)
        lb_fail(err, LB_E_NET, "backup %s was silent: VM %s runs here, unprotected",
                p->backup->name, p->entry.name);
    return -1;
}
