/*
 * remus/status.c - what people and scripts see of a protection.
 *
 * The primary's numbers are gathered here, at most ten times a second, in the engine thread and never
 * in a pause. The JSON is the same for both sides.
 */
#include "netproto/rdma.h"
#include "remus/protect_internal.h"
#include "core/json.h"

#include <jansson.h>
#include <string.h>

#define REPORT_NS UINT64_C(100000000)
#define RATE_NS UINT64_C(1000000000)

/* ------------------------------------------------------------------- percentiles */

void lb_pause_add(struct lb_pause_log *l, double ms)
{
    l->ms[l->at] = (float)ms;
    l->at = (l->at + 1) % LB_REMUS_EPOCH_LOG;
    if (l->n < LB_REMUS_EPOCH_LOG)
        l->n++;
}

static int by_value(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;

    return (x > y) - (x < y);
}

static void pause_get(const struct lb_pause_log *l, double *p50, double *p99, double *max)
{
    LB_AUTO_FREE float *v = NULL;

    *p50 = *p99 = *max = 0;
    if (!l->n)
        return;
    v = lb_alloc(sizeof(*v) * l->n);
    memcpy(v, l->ms, sizeof(*v) * l->n);
    qsort(v, l->n, sizeof(*v), by_value);
    *p50 = v[(l->n - 1) / 2];
    *p99 = v[(l->n - 1) * 99 / 100];
    *max = v[l->n - 1];
}

/* ------------------------------------------------------------------- the primary */

static double percent(struct prot *p)
{
    double part = LB_MIN(1.0, p->extra_percent), pct = p->st.percent;
    double disks = p->n_disks ? 60 : 5; /* of the bar, before the memory */

    switch ((enum lb_prot_state)p->sm.state) {
    case P_CONNECT: pct = 0; break;
    case P_PREFLIGHT: pct = 1; break;
    case P_LAUNCH: pct = 3; break;
    case P_DISKS: pct = 5 + (disks - 5) * part; break;
    case P_ROUNDS: pct = disks + (95 - disks) * part; break;
    case P_ARM: pct = 97; break;
    case P_PROTECTED: pct = 100; break;
    default: break;
    }
    return LB_MAX(pct, p->st.percent);
}

static void rates(struct prot *p, uint64_t now)
{
    struct lb_encoder_stats enc = {0};
    struct lb_rate_mark m = {.ns = now, .epochs = p->captured, .pages = p->total_pages};
    double s = (double)(now - p->mark.ns) / 1e9;

    if (now - p->mark.ns < RATE_NS || !p->enc)
        return;
    lb_encoder_get_stats(p->enc, &enc);
    m.raw = enc.raw_bytes;
    m.wire = enc.wire_bytes;
    if (p->mark.ns) {
        uint64_t epochs = m.epochs - p->mark.epochs;

        p->st.epochs_per_s = (double)epochs / s;
        p->st.dirty_pages = epochs ? (double)(m.pages - p->mark.pages) / (double)epochs : 0;
        p->st.raw_bytes_per_s = (double)(m.raw - p->mark.raw) / s;
        p->st.wire_bytes_per_s = (double)(m.wire - p->mark.wire) / s;
    }
    p->mark = m;
    pause_get(p->pauses, &p->st.pause_p50_ms, &p->st.pause_p99_ms, &p->st.pause_max_ms);
}

/* What is between capture and Ack. */
static void lag(struct prot *p, uint64_t now)
{
    uint64_t oldest = 0;

    p->st.disk_backlog_bytes = p->disk ? lb_disk_source_backlog(p->disk) : 0;
    pthread_mutex_lock(&p->mu);
    for (uint64_t n = p->acked + 1; n <= p->captured; n++) {
        const struct lb_epoch *e = &p->slot[n % LB_PROT_SLOTS].e;

        if (!oldest)
            oldest = e->cont_ns;
        p->st.disk_backlog_bytes += e->disk.bytes;
    }
    p->st.epoch = p->captured;
    p->st.acked = p->acked;
    p->st.released = p->released;
    p->st.stretched = p->stretched;
    pthread_mutex_unlock(&p->mu);
    p->st.lag_ms = oldest && now > oldest ? (double)(now - oldest) / 1e6 : 0;
}

static const char *state_name(struct prot *p)
{
    if (p->sm.state == P_PROTECTED && lb_guard_frozen(p->guard))
        return "no-lease";
    return lb_sm_name(&p->sm);
}

static void lease(struct prot *p)
{
    char why[160] = "";

    p->st.lease_left_ms = -1;
    p->st.witness_ok = p->witness && lb_witness_healthy(p->witness, why);
    snprintf(p->st.witness, sizeof(p->st.witness), "%.159s",
             p->st.witness_ok || !why[0] ? p->opts.witness : why);
    if (p->guard && lb_guard_verdict(p->guard) == LB_GUARD_OPEN)
        p->st.lease_left_ms = lb_guard_left_ms(p->guard);
}

void lb_prot_report(struct prot *p, bool force)
{
    uint64_t now = lb_now_ns();
    struct lb_output_stats out = {0};

    if (!force && now - p->t_report < REPORT_NS)
        return;
    p->t_report = now;
    p->st.role = "primary";
    p->st.state = state_name(p);
    p->st.backup = p->backup->name;
    p->st.percent = percent(p);
    p->st.interval_ms = p->opts.interval_ms;
    rates(p, now);
    lag(p, now);
    lease(p);
    if (p->output)
        lb_output_get_stats(p->output, &out);
    p->st.held_packets = out.held_packets;
    p->st.held_bytes = out.held_bytes;
    p->st.clock_lag_ms = (double)p->lag_ns / 1e6;
    p->st.clock_corrected_ms = (double)p->corrected_ns / 1e6;
    p->st.transport = p->bulk ? lb_bulk_transport(p->bulk)->ops->name : "";
    lb_rdma_registered(&p->st.registered_bytes, &(uint64_t){0});
    p->st.failovers = p->wish.failovers;
    p->st.last_failover_ms = p->wish.last_failover_ms;
    p->st.last_failover_took_ms = p->wish.last_failover_took_ms;
    if (p->env->status)
        p->env->status(&p->st, p->base->arg);
}

/* -------------------------------------------------------------------------- JSON */

static void put_text(json_t *o, const char *key, const char *s)
{
    json_object_set_new(o, key, lb_json_text(s));
}

static void put_u64(json_t *o, const char *key, uint64_t v)
{
    json_object_set_new(o, key, json_integer((json_int_t)v));
}

static void put_real(json_t *o, const char *key, double v)
{
    json_object_set_new(o, key, json_real(v));
}

static void put_bool(json_t *o, const char *key, bool v)
{
    json_object_set_new(o, key, json_boolean(v));
}

char *lb_protect_status_json(const struct lb_protect_status *s)
{
    json_t *o = json_object();
    char *text;

    put_text(o, "role", s->role);
    put_text(o, "state", s->state);
    put_text(o, "backup", s->backup);
    put_real(o, "percent", s->percent);
    put_u64(o, "epoch", s->epoch);
    put_u64(o, "acked", s->acked);
    put_u64(o, "released", s->released);
    put_u64(o, "interval_ms", s->interval_ms);
    put_real(o, "epochs_per_s", s->epochs_per_s);
    put_real(o, "pause_p50_ms", s->pause_p50_ms);
    put_real(o, "pause_p99_ms", s->pause_p99_ms);
    put_real(o, "pause_max_ms", s->pause_max_ms);
    put_real(o, "dirty_pages", s->dirty_pages);
    put_real(o, "raw_bytes_per_s", s->raw_bytes_per_s);
    put_real(o, "wire_bytes_per_s", s->wire_bytes_per_s);
    put_real(o, "lag_ms", s->lag_ms);
    put_u64(o, "held_packets", s->held_packets);
    put_u64(o, "held_bytes", s->held_bytes);
    put_u64(o, "disk_backlog_bytes", s->disk_backlog_bytes);
    put_real(o, "lease_left_ms", s->lease_left_ms);
    put_bool(o, "witness_ok", s->witness_ok);
    put_text(o, "witness", s->witness);
    put_real(o, "clock_lag_ms", s->clock_lag_ms);
    put_real(o, "clock_corrected_ms", s->clock_corrected_ms);
    put_text(o, "transport", s->transport ? s->transport : "");
    put_u64(o, "registered_bytes", s->registered_bytes);
    put_bool(o, "stretched", s->stretched);
    put_u64(o, "failovers", s->failovers);
    put_u64(o, "last_failover_ms", s->last_failover_ms);
    put_real(o, "last_failover_took_ms", s->last_failover_took_ms);
    put_text(o, "note", s->note);
    text = json_dumps(o, JSON_COMPACT | JSON_REAL_PRECISION(6));
    json_decref(o);
    return text;
}
