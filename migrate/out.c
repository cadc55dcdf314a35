/*
 * migrate/out.c - the source session.
 *
 * Happy path: lb_migrate_out reads top to bottom: open, agree, rounds, final,
 * hand_over. Every step before the journal says HANDED_OVER may fail and ends
 * in give_up(): the guest continues here first, then everything else is torn
 * down. After it, only resolve() decides, by what the destination's journal says.
 *
 * Who may end it early, until `decided` is set: see tx.h.
 */
#include "migrate/out_internal.h"

#include "migrate/frames.h"

#include <sodium.h>
#include <string.h>

static const struct lb_sm_state states[] = {
    [S_CONNECT] = {"connecting", LB_SM_TO(S_PREFLIGHT) | LB_SM_TO(S_FAILED)},
    [S_PREFLIGHT] = {"preflight", LB_SM_TO(S_LAUNCH) | LB_SM_TO(S_DONE) | LB_SM_TO(S_FAILED)},
    [S_LAUNCH] = {"launching", LB_SM_TO(S_READY) | LB_SM_TO(S_ROUNDS) | LB_SM_TO(S_FAILED)},
    [S_READY] = {"ready", LB_SM_TO(S_ROUNDS) | LB_SM_TO(S_FAILED)},
    [S_ROUNDS] = {"pre-copy", LB_SM_TO(S_FINAL) | LB_SM_TO(S_FAILED)},
    [S_FINAL] = {"stop-and-copy", LB_SM_TO(S_WAIT) | LB_SM_TO(S_FAILED)},
    [S_WAIT] = {"waiting", LB_SM_TO(S_HANDED_OVER) | LB_SM_TO(S_FAILED)},
    [S_HANDED_OVER] = {"handed-over",
                       LB_SM_TO(S_DONE) | LB_SM_TO(S_FAILED) | LB_SM_TO(S_UNDECIDED)},
    [S_DONE] = {"done", 0},
    [S_FAILED] = {"failed", 0},
    [S_UNDECIDED] = {"undecided", 0},
};

uint64_t lb_out_ms_since(uint64_t t)
{
    return (lb_now_ns() - t) / 1000000u;
}

/* ----------------------------------------------------------------- progress */

static void transport_name(const struct out *o, const struct lb_sender_stats *st, char *out,
                           size_t len)
{
    snprintf(out, len, "%s",
             st->replaced         ? "rdma+tcp"
             : !st->rdma_conns    ? "tcp"
             : o->tx.zero_copy    ? "rdma zero-copy"
                                  : "rdma");
}

/* Bytes per second on the wire, four times a second. What was sent before the first look took nobody knows how long. */
static void measure_rate(struct out *o, uint64_t wire_bytes, uint64_t now)
{
    if (o->bytes_seen_ns) {
        double rate;

        if (now - o->bytes_seen_ns < 250000000u)
            return;
        rate = (double)(wire_bytes - o->bytes_seen) * 1e9 / (double)(now - o->bytes_seen_ns);
        o->throughput = o->throughput > 0 ? 0.5 * o->throughput + 0.5 * rate : rate;
    }
    o->bytes_seen = wire_bytes;
    o->bytes_seen_ns = now;
}

void lb_out_report(struct out *o, bool force)
{
    uint64_t now = lb_now_ns();
    struct lb_progress *p = &o->prog;
    double pct = p->percent;

    if (!force && now - o->t_report < 100000000u)
        return;
    o->t_report = now;
    p->state = lb_sm_name(&o->sm);
    if (o->tx.sender) {
        struct lb_sender_stats st;

        lb_sender_get_stats(o->tx.sender, &st);
        p->sent_bytes = st.bulk.wire_bytes;
        p->zstd_level = st.zstd_level;
        lb_rdma_registered(&p->registered_bytes, &(uint64_t){0});
        transport_name(o, &st, p->transport, sizeof(p->transport));
        if (st.replaced > o->replaced_seen) {
            o->replaced_seen = st.replaced;
            snprintf(p->note, sizeof(p->note), "an RDMA connection broke: goes on over TCP");
        }
        p->remaining_pages = o->round_pages > st.done_pages ? o->round_pages - st.done_pages : 0;
        measure_rate(o, st.bulk.wire_bytes, now);
        if (o->sm.state == S_ROUNDS) {
            double f = o->round_pages ? (double)st.done_pages / (double)o->round_pages
                                      : p->round > 0;
            double lo = 80, hi;

            /* Round 0 is most of the work; later rounds share what is left, each
             * half of it, so that the bar moves forward however many there are. */
            if (p->round == 0) {
                pct = 4 + 76 * f;
            } else {
                for (uint32_t i = 1; i < p->round && i < 20; i++)
                    lo += (97 - lo) / 2;
                hi = lo + (97 - lo) / 2;
                pct = lo + (hi - lo) * f;
            }
        }
        if (p->round == 0 && o->round_pages && o->throughput > 0)
            p->eta_s = (double)p->remaining_pages * LB_PAGE_SIZE / o->throughput;
    }
    switch (o->sm.state) {
    case S_PREFLIGHT: pct = 1; break;
    case S_LAUNCH: pct = 2; break;
    case S_READY: pct = 3; break;
    case S_FINAL: case S_WAIT: case S_HANDED_OVER: case S_UNDECIDED: pct = 98; break;
    case S_DONE: pct = 100; break;
    default: break;
    }
    if (pct > p->percent)
        p->percent = pct;
    p->dirty_rate_bytes_per_s = o->dirty_rate;
    p->throughput_bytes_per_s = o->throughput;
    p->throttle_percent = o->throttle_percent;
    if (o->env->report)
        o->env->report(p, o->env->arg);
}

void lb_out_move(struct out *o, enum lb_out_state to)
{
    lb_sm_move(&o->sm, to);
    lb_out_report(o, true);
}

void lb_out_note(struct out *o, const char *text)
{
    snprintf(o->prog.note, sizeof(o->prog.note), "%s", text);
    lb_log(LB_LOG_INFO, "%s", text);
}

/* ------------------------------------------------------------------ hand-over */

/* The destination runs it, and we need never ask. */
static void settle(struct out *o)
{
    Lb__Control m = LB__CONTROL__INIT;
    Lb__Settled s = LB__SETTLED__INIT;
    struct lb_error err = LB_ERROR_INIT;
    uint8_t token[LB_TOKEN_BYTES];

    if (lb_journal_move(o->env->state_dir, &o->journal, LB_J_DONE, &err)) {
        lb_log_error(LB_LOG_WARN, &err);
        return;
    }
    lb_unhex(token, sizeof(token), o->journal.token);
    s.token = (ProtobufCBinaryData){sizeof(token), token};
    m.kind_case = LB__CONTROL__KIND_SETTLED;
    m.settled = &s;
    lb_ctl_send(o->tx.chan, &m, NULL);
}

static int destroy_own(struct out *o)
{
    struct lb_error err = LB_ERROR_INIT;
    struct lb_vm_ident id = lb_entry_ident(&o->entry);

    if (o->throttled)
        lb_hv_throttle(o->tx.vm, 0, NULL);
    if (lb_hv_destroy(LB_STEAL_PTR(o->tx.vm), &err)) {
        lb_log_error(LB_LOG_ERROR, &err);
        if (lb_hv_end(o->env->hv, &id, &err))
            return lb_log_error(LB_LOG_ERROR, &err), -1;
    }
    lb_point("src-destroyed");
    if (lb_vm_entry_remove(o->env->state_dir, o->entry.name, &err))
        lb_log_error(LB_LOG_WARN, &err);
    return 0;
}

/* Until the switches have heard from the guest at its new place, its frames come here. */
static void late_frames(struct out *o)
{
    for (int i = 0; o->frames && i < 5 && lb_frames_send(o->frames, o->tx.chan); i++)
        lb_sleep_ms(4);
}

static int moved(struct out *o)
{
    snprintf(o->res->final_state, sizeof(o->res->final_state), "moved");
    lb_sm_move(&o->sm, S_DONE);
    late_frames(o);
    settle(o);
    destroy_own(o);
    lb_frames_send(o->frames, o->tx.chan);
    o->res->ok = true;
    lb_out_report(o, true);
    return 0;
}

/* The destination never ran it and never will: it is ours again. */
static int taken_back(struct out *o, const char *why, struct lb_error *err)
{
    struct lb_error e2 = LB_ERROR_INIT;

    snprintf(o->journal.detail, sizeof(o->journal.detail), "%.200s", why);
    if (lb_journal_move(o->env->state_dir, &o->journal, LB_J_ABORTED, &e2))
        lb_log_error(LB_LOG_ERROR, &e2);
    lb_fail(err, LB_E_HV, "host %s could not run the VM: %s", o->to->name, why);
    lb_remedy(err, "the VM runs here; see the log of lifeboatd on %s", o->to->name);
    return -1;
}

/* The answer to Commit did not come. Only the destination's journal knows. */
static int resolve(struct out *o, struct lb_error *err)
{
    uint64_t until = lb_now_ns() + RESOLVE_FOR_NS;
    enum lb_verdict v;
    struct lb_error e2 = LB_ERROR_INIT;

    lb_out_note(o, "handed over, but the destination did not confirm: asking its journal");
    o->entry.state = LB_VM_HANDED_OVER;
    snprintf(o->entry.note, sizeof(o->entry.note), "handed over to %s, which does not answer",
             o->to->name);
    lb_vm_entry_save(o->env->state_dir, &o->entry, NULL);
    for (unsigned wait = 50;; wait = LB_MIN(wait * 2, 2000u)) {
        memset(&e2, 0, sizeof(e2));
        if (!lb_handover_ask(o->env, o->to, o->journal.token, o->entry.name, &v, &e2))
            break;
        lb_log_error(LB_LOG_WARN, &e2);
        lb_out_report(o, true);
        if (lb_now_ns() > until) {
            lb_fail(err, LB_E_UNDECIDED,
                    "VM %s is paused: it was handed over to %s, which cannot be asked (%.150s)",
                    o->entry.name, o->to->name, e2.message);
            lb_remedy(err, "bring lifeboatd on %s back, then `lifeboat recover %s` (it is also "
                           "tried by itself)",
                      o->to->name, o->entry.name);
            snprintf(o->res->final_state, sizeof(o->res->final_state), "handed-over");
            lb_sm_move(&o->sm, S_UNDECIDED);
            lb_out_report(o, true);
            return -1;
        }
        lb_sleep_ms(wait);
    }
    if (v == LB_VERDICT_RUNNING)
        return moved(o);
    return taken_back(o, "it was refused there before it ran", err);
}

static int hand_over(struct out *o, struct lb_error *err)
{
    Lb__Control m = LB__CONTROL__INIT, *in = NULL;
    Lb__Commit c = LB__COMMIT__INIT;
    uint8_t token[LB_TOKEN_BYTES];
    struct lb_error e2 = LB_ERROR_INIT;
    bool go;
    int rc;

    pthread_mutex_lock(&o->tx.mu);
    go = !o->tx.aborting;
    o->tx.decided = go;
    pthread_mutex_unlock(&o->tx.mu);
    if (!go)
        return lb_tx_check_interrupt(&o->tx, err);
    lb_point("src-prepared");
    if (lb_journal_move(o->env->state_dir, &o->journal, LB_J_HANDED_OVER, err) &&
        o->journal.state != LB_J_HANDED_OVER)
        return -1;
    lb_sm_move(&o->sm, S_HANDED_OVER);
    lb_point("src-handed-over");
    lb_unhex(token, sizeof(token), o->journal.token);
    c.token = (ProtobufCBinaryData){sizeof(token), token};
    m.kind_case = LB__CONTROL__KIND_COMMIT;
    m.commit = &c;
    rc = lb_ctl_send(o->tx.chan, &m, &e2);
    lb_point("src-committed");
    if (!rc)
        lb_frames_send(o->frames, o->tx.chan); /* they wait there for the guest to run */
    if (!rc)
        rc = lb_ctl_queue_pop(o->tx.ctl, &in, lb_now_ns() + RUNNING_TIMEOUT_NS, &e2);
    o->res->downtime_ms = (double)(lb_now_ns() - o->tx.t_stop) / 1e6;
    o->res->total_ms = (double)(lb_now_ns() - o->t_start) / 1e6;
    if (rc) {
        lb_log_error(LB_LOG_WARN, &e2);
        return resolve(o, err);
    }
    lb_point("src-running");
    if (in->kind_case == LB__CONTROL__KIND_RUNNING) {
        lb__control__free_unpacked(in, NULL);
        return moved(o);
    }
    if (in->kind_case == LB__CONTROL__KIND_HANDOVER_ANSWER &&
        !strcmp(in->handover_answer->state, "refused")) {
        rc = taken_back(o, in->handover_answer->detail, err);
        lb__control__free_unpacked(in, NULL);
        return rc;
    }
    lb__control__free_unpacked(in, NULL);
    return resolve(o, err);
}

/* -------------------------------------------------------------------- failure */

/* The guest first: whatever else has to be torn down, it continues here. */
static void resume_guest(struct out *o, struct lb_error *err)
{
    struct lb_error e2 = LB_ERROR_INIT;
    struct lb_vm_ident id = lb_entry_ident(&o->entry);
    bool alive = false, running = false;

    if (!o->tx.vm)
        return;
    if (o->saving) {
        void *buf = NULL;
        size_t len;

        if (!lb_hv_save_end(o->tx.vm, &buf, &len, NULL))
            free(buf);
        o->saving = false;
    }
    if (o->tx.stopped) {
        uint64_t until = lb_now_ns() + RESUME_FOR_NS;

        for (bool first = true; first || lb_now_ns() < until; first = false) {
            memset(&e2, 0, sizeof(e2));
            if (!lb_hv_cont(o->tx.vm, &e2))
                break;
            if (!lb_hv_exists(o->env->hv, &id))
                break;
            lb_sleep_ms(100);
        }
    }
    if (o->throttled)
        lb_hv_throttle(o->tx.vm, 0, NULL);
    if (!lb_hv_exists(o->env->hv, &id) ||
        lb_hv_status(o->tx.vm, &alive, &running, NULL))
        alive = running = false;
    o->entry.state = LB_VM_RUNNING;
    if (!lb_hv_exists(o->env->hv, &id)) {
        o->entry.state = LB_VM_DEAD;
        snprintf(o->entry.note, sizeof(o->entry.note), "its process died during a migration");
        lb_fail(err, LB_E_HV, "VM %s died during the migration (process %d is gone)",
                o->entry.name, (int)o->entry.proc.pid);
        lb_remedy(err, "see the log of the VM in %s/vms/%s; nothing runs on %s",
                  o->env->state_dir, o->entry.name, o->to->name);
    } else if (o->tx.stopped && !running) {
        lb_log(LB_LOG_ERROR, "the guest could not be continued: %s", e2.message);
        /* Not RUNNING: recovery goes on trying where we have to end. */
        o->entry.state = LB_VM_MIGRATING_OUT;
        if (err) {
            struct lb_error first = *err;

            lb_fail(err, LB_E_HV, "VM %s is paused and could not be continued (%.150s) after: %.250s",
                    o->entry.name, e2.message, first.message);
            lb_remedy(err, "it is tried again by itself; `lifeboat recover %s` tries at once and "
                           "says what is wrong", o->entry.name);
        }
        snprintf(o->entry.note, sizeof(o->entry.note), "paused, could not be continued: %.180s",
                 e2.message);
    }
    snprintf(o->res->final_state, sizeof(o->res->final_state), "%s",
             o->entry.state == LB_VM_DEAD ? "dead" : running ? "running" : "paused");
}

static void give_up(struct out *o, struct lb_error *err)
{
    bool after = o->sm.state == S_HANDED_OVER; /* refused by the destination */

    resume_guest(o, err);
    if (o->tx.chan && o->tx.reached_peer && !after) {
        Lb__Control m = LB__CONTROL__INIT;
        Lb__Cancel c = LB__CANCEL__INIT;

        c.reason = err ? err->message : (char *)"";
        m.kind_case = LB__CONTROL__KIND_CANCEL;
        m.cancel = &c;
        lb_ctl_send(o->tx.chan, &m, NULL);
    }
    if (o->journalled && o->journal.state == LB_J_PREPARING) {
        snprintf(o->journal.detail, sizeof(o->journal.detail), "%.200s",
                 err ? err->message : "");
        lb_journal_move(o->env->state_dir, &o->journal, LB_J_ABORTED, NULL);
    }
    lb_sm_move(&o->sm, S_FAILED);
    lb_out_report(o, true);
    if (!o->journalled && o->entry.state == LB_VM_RUNNING)
        return; /* nothing was touched */
    o->entry.token[0] = o->entry.peer[0] = '\0';
    if (err && !o->entry.note[0])
        snprintf(o->entry.note, sizeof(o->entry.note), "migration to %.60s failed: %.150s",
                 o->to->name, err->message);
    lb_vm_entry_save(o->env->state_dir, &o->entry, NULL);
}

static void tear_down(struct out *o)
{
    if (o->tx.sender) {
        struct lb_sender_stats st;

        lb_sender_get_stats(o->tx.sender, &st);
        o->res->wire_bytes = st.bulk.wire_bytes;
        o->res->zero_pages = st.bulk.zero_pages;
        o->res->raw_pages = st.bulk.raw_pages;
        o->res->zstd_pages = st.bulk.zstd_pages;
        o->res->copied_bytes = st.bulk.copied_bytes;
        o->res->direct_pages = st.bulk.direct_pages;
        o->res->damaged_pages = o->tx.damaged_pages;
        o->res->replaced_connections = st.replaced;
        transport_name(o, &st, o->res->transport, sizeof(o->res->transport));
        snprintf(o->res->why_tcp, sizeof(o->res->why_tcp), "%s", o->tx.why_tcp);
        lb_rdma_registered(&(uint64_t){0}, &o->res->registered_max_bytes);
    }
    lb_frames_free(o->frames);
    lb_tx_close(&o->tx);
}

/* For an error that came up too deep to know what a person could do. */
static const char *common_remedy(enum lb_errcode code)
{
    switch (code) {
    case LB_E_AUTH:
        return "somebody changes the data on its way, or the address is not that host's: "
               "compare `lifeboat host id` there with `lifeboat host ls` here, and check the network";
    case LB_E_PROTO:
        return "see that lifeboatd of the same version answers at that address "
               "(`lifeboat host ls`), and check the network";
    case LB_E_NET:
        return "see whether lifeboatd runs there, and check the network; then migrate again";
    case LB_E_HV:
        return "see the VM's log in vms/ of the state directory on both hosts";
    default:
        return "see the logs of lifeboatd on both hosts";
    }
}

int lb_migrate_out(const struct lb_session_env *env, const struct lb_vm_entry *vm,
                   const struct lb_host *to, const struct lb_migrate_opts *opts,
                   struct lb_migrate_result *res, struct lb_error *err)
{
    struct lb_migrate_opts eff = *opts;
    struct lb_error local = LB_ERROR_INIT;
    struct lb_report mine = {0};
    struct out *o = lb_alloc(sizeof(*o));
    int rc;

    memset(res, 0, sizeof(*res));
    o->env = env;
    o->to = to;
    o->opts = &eff;
    o->res = res;
    o->entry = *vm;
    o->prog.converges = -1;
    o->prog.eta_s = -1;
    o->prog.ram_bytes = 0;
    if (!eff.max_downtime_ms)
        eff.max_downtime_ms = LB_DEFAULT_MAX_DOWNTIME_MS;
    lb_tx_init(&o->tx, env, to, &o->entry, &eff);
    o->tx.what = "migration";
    o->tx.verb = "migrate";
    lb_sm_init(&o->sm, "migrate-out", states, LB_ARRAY_LEN(states), S_CONNECT);
    randombytes_buf(o->tx.token, sizeof(o->tx.token));
    lb_hex(o->journal.token, o->tx.token, sizeof(o->tx.token));
    snprintf(o->journal.vm, sizeof(o->journal.vm), "%s", vm->name);
    snprintf(o->journal.peer, sizeof(o->journal.peer), "%s", to->name);
    lb_key_format(o->journal.peer_key, to->pub);
    snprintf(res->final_state, sizeof(res->final_state), "running");
    res->dry_run = eff.dry_run;
    o->t_start = lb_now_ns();

    lb_out_report(o, true);
    rc = lb_tx_open(&o->tx, &mine, &local);
    if (!rc) {
        o->prog.ram_bytes = o->tx.desc.ram_bytes;
        lb_out_move(o, S_PREFLIGHT);
        rc = lb_tx_preflight(&o->tx, &mine, &local);
    }
    if (!rc && eff.dry_run) {
        lb_out_move(o, S_DONE);
        res->total_ms = (double)(lb_now_ns() - o->t_start) / 1e6;
        tear_down(o);
        free(o);
        lb_report_free(&mine);
        return 0;
    }
    if (!rc)
        rc = lb_out_begin_journal(o, &local);
    if (!rc)
        rc = lb_out_setup(o, &local);
    res->setup_ms = (double)(lb_now_ns() - o->t_start) / 1e6;
    if (!rc)
        rc = lb_out_wait_go(o, &local);
    if (!rc) {
        o->frames = o->tx.desc.argv ? lb_frames_new(o->tx.desc.argv) : NULL;
        rc = lb_out_precopy(o, &local);
    }
    if (!rc)
        rc = lb_out_stop_and_copy(o, &local);
    if (!rc)
        rc = lb_out_wait_prepared(o, &local);
    if (!rc)
        rc = hand_over(o, &local);
    if (rc && o->sm.state != S_UNDECIDED)
        give_up(o, &local);
    if (!res->total_ms)
        res->total_ms = (double)(lb_now_ns() - o->t_start) / 1e6;
    if (rc) {
        if (!local.remedy[0])
            lb_remedy(&local, "%s", common_remedy(local.code));
        res->error = local;
        if (err)
            *err = local;
    }
    tear_down(o);
    lb_report_free(&mine);
    free(o);
    return rc;
}
