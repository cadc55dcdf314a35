/*
 * migrate/out_setup.c - the source session between preflight and the first page: journal,
 * transfer (tx.h), a first forecast, waiting for others that send first.
 */
#include "migrate/out_internal.h"

#include <string.h>

#define GO_POLL_MS 100
#define KEEPALIVE_NS UINT64_C(5000000000)

int lb_out_begin_journal(struct out *o, struct lb_error *err)
{
    if (lb_journal_move(o->env->state_dir, &o->journal, LB_J_PREPARING, err))
        return -1;
    o->journalled = true;
    o->entry.state = LB_VM_MIGRATING_OUT;
    o->entry.note[0] = '\0';
    snprintf(o->entry.token, sizeof(o->entry.token), "%s", o->journal.token);
    snprintf(o->entry.peer, sizeof(o->entry.peer), "%s", o->to->name);
    return lb_vm_entry_save(o->env->state_dir, &o->entry, err);
}

int lb_out_setup(struct out *o, struct lb_error *err)
{
    uint64_t pages;
    double dt;
    struct lb_policy_out fc = {0};
    uint64_t populated = 0;

    lb_out_move(o, S_LAUNCH);
    if (lb_tx_launch(&o->tx, err))
        return -1;
    /* The time since the log began is a free sample of the dirty rate. */
    if (lb_tx_count_dirty(&o->tx, &pages, err))
        return -1;
    dt = (double)(lb_now_ns() - o->tx.t_clean) / 1e9;
    o->dirty_rate = dt > 0 ? (double)pages * LB_PAGE_SIZE / dt : 0;
    for (unsigned b = 0; b < o->tx.n_blocks; b++)
        populated += lb_bitmap_count(&o->tx.dirty[b]) << LB_PAGE_SHIFT;
    lb_policy_forecast(populated, o->dirty_rate, 0, (double)o->opts->bandwidth_bytes_per_s,
                       o->opts->max_downtime_ms, &fc);
    o->prog.converges = fc.converges;
    o->prog.predicted_downtime_ms = fc.predicted_downtime_ms;
    o->prog.eta_s = fc.eta_s;
    lb_out_note(o, fc.reason);
    lb_out_report(o, true);
    if (lb_tx_connect(&o->tx, NULL, err))
        return -1;
    if (o->tx.why_tcp[0])
        lb_out_note(o, o->tx.why_tcp);
    return 0;
}

static int keep_alive(struct out *o, struct lb_error *err)
{
    Lb__Control m = LB__CONTROL__INIT;
    Lb__Keepalive k = LB__KEEPALIVE__INIT;

    m.kind_case = LB__CONTROL__KIND_KEEPALIVE;
    m.keepalive = &k;
    return lb_ctl_send(o->tx.chan, &m, err) ? lb_tx_explain(&o->tx, err) : 0;
}

int lb_out_wait_go(struct out *o, struct lb_error *err)
{
    uint64_t began = lb_now_ns(), said = began;

    if (!o->opts->wait_go)
        return 0;
    lb_out_move(o, S_READY);
    while (!lb_readable(o->env->go_fd, GO_POLL_MS)) {
        if (lb_tx_check_interrupt(&o->tx, err))
            return -1;
        if (lb_now_ns() - said < KEEPALIVE_NS)
            continue;
        said = lb_now_ns();
        if (keep_alive(o, err))
            return -1;
    }
    o->t_start += lb_now_ns() - began;
    /* What was written meanwhile says nothing about the rounds to come. */
    return lb_tx_restart_log(&o->tx, err);
}
