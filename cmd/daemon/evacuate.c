/*
 * cmd/daemon/evacuate.c - emptying this host, and maintenance mode: what migrate/evacuate.c says is to be done, is
 * done here, and what has become of it is said there.
 *
 *   plan     session "plan"; the answer is shown, and kept for `run` with its id
 *   run      maintenance on, a plan, then by lb_evac_next:
 *              copy      session "out" with wait_go; its go comes by an order
 *              swap      session "ask" to the backup's host: failover
 *              backup    session "ask" to where the VM runs: protect, with another backup
 *              suspend   session "checkpoint"
 *   cancel   what has not been handed over is cancelled. Maintenance goes on, so that `run` can go on - unless
 *            nothing has left: then it ends as well
 *   maintenance off --bring-back   the same machine the other way: session "ask" to where each VM is (migrate), or
 *            "restore" of what is suspended here
 *
 * Where a VM is, the registry says: when a session of ours has ended, in whatever way, the item is unsettled until the
 * entry is gone, or the VM runs here and nobody works on it. So a session that was killed, an undecided hand-over
 * and a supervisor that comes back need no rules of their own: recovery decides (migrate/handover.c), then we go on. A new
 * supervisor waits for the sessions to come back to it, then goes on with what the file says.
 *
 * There is one evacuation or return at a time. All on the loop; the tick is what time has to say.
 */
#include "cmd/daemon/evac.h"

#include <string.h>

#include "migrate/maintenance.h"

#define TICK_US 250000
#define SAY_NS UINT64_C(250000000)   /* at most so often */
#define SAVE_NS UINT64_C(1000000000)
#define QUIET_NS UINT64_C(2000000000) /* after a restart */
#define PLAN_AGE_MS UINT64_C(900000)
#define REASON "evacuation"

static void step(struct daemon *d);

uint64_t lb_evac_now_ms(void)
{
    return lb_now_ns() / 1000000;
}

struct evacuation *lb_evac_of(struct daemon *d)
{
    if (!d->evacuation)
        d->evacuation = lb_alloc(sizeof(*d->evacuation));
    return d->evacuation;
}

bool lb_evac_runs(const struct evacuation *v)
{
    return v->e && v->e->phase != LB_EVAC_PLANNED && !lb_evac_over(v->e);
}

/* --------------------------------------------------------------------------- what is said */

static void save(struct daemon *d)
{
    struct lb_error err = LB_ERROR_INIT;
    struct evacuation *v = d->evacuation;

    if (lb_evac_save(d->opt.state_dir, v->e, &err))
        lb_log_error(LB_LOG_ERROR, &err);
    v->save_due = false;
    v->saved_ns = lb_now_ns();
}

static bool has_changed(const struct lb_evac *e)
{
    for (unsigned i = 0; i < e->n_items; i++)
        if (e->items[i].changed)
            return true;
    return false;
}

static void say(struct daemon *d)
{
    struct evacuation *v = d->evacuation;

    if (lb_now_ns() - v->said_ns < SAY_NS)
        return;
    v->said_ns = lb_now_ns();
    v->save_due |= has_changed(v->e);
    LB_AUTO_FREE char *text = lb_json_dump(lb_evac_event(v->e, v->say_all, lb_evac_now_ms()));
    v->say_all = false;
    lb_clients_tell(d, LB_EVAC_NAME, text);
    if (v->save_due && lb_now_ns() - v->saved_ns > SAVE_NS)
        save(d);
}

static char *result_json(struct evacuation *v)
{
    return lb_json_dump(lb_evac_event(v->e, true, lb_evac_now_ms()));
}

static void stop_ticking(struct evacuation *v)
{
    if (v->tick)
        event_free(v->tick);
    v->tick = NULL;
}

/* It has come to rest. */
static void end(struct daemon *d)
{
    struct evacuation *v = d->evacuation;
    struct lb_error err = LB_ERROR_INIT;
    struct lb_maintenance m;

    stop_ticking(v);
    lb_maintenance_load(d->opt.state_dir, &m, NULL);
    if (v->e->phase == LB_EVAC_CANCELLED && !v->e->returning && !v->maintenance_was_on && !m.n_left &&
        lb_maintenance_set(d, false, NULL, false, &err))
        lb_log_error(LB_LOG_ERROR, &err);
    lb_maintenance_free(&m);
    save(d);
    lb_log(LB_LOG_INFO, "%s: %s", v->e->returning ? "bringing VMs back" : "evacuation", lb_evac_phase_name(v->e));
    LB_AUTO_FREE char *text = result_json(v);
    lb_clients_settle(d, LB_EVAC_NAME, LB_WAIT_EVACUATED, text, NULL);
}

/* It cannot even be planned. */
static void give_up(struct daemon *d, const struct lb_error *why)
{
    struct evacuation *v = d->evacuation;
    struct lb_error err = LB_ERROR_INIT;

    stop_ticking(v);
    lb_evac_free(LB_STEAL_PTR(v->e));
    if (lb_evac_remove(d->opt.state_dir, &err) ||
        (!v->maintenance_was_on && lb_maintenance_set(d, false, NULL, true, &err)))
        lb_log_error(LB_LOG_ERROR, &err);
    lb_clients_settle(d, LB_EVAC_NAME, LB_WAIT_EVACUATED, NULL, why);
}

/* -------------------------------------------------------------------------------- the plan */

static struct session *spawn_planner(struct daemon *d, const struct lb_evac *e, struct lb_error *err)
{
    static const char *const hot[] = {"throttle", "suspend", "leave"};
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;
    Lb__RpcEvacuate m = LB__RPC_EVACUATE__INIT;
    char **excluded = lb_evac_excluded(e);
    struct session *s;

    m.op = (char *)"plan";
    m.to = e->opts.to;
    while (m.to[m.n_to])
        m.n_to++;
    m.parallel = e->opts.parallel;
    m.bandwidth_bytes_per_s = e->opts.bandwidth_bytes_per_s;
    if (e->opts.priorities_json)
        m.priorities_json = e->opts.priorities_json;
    m.suspend_rest = e->opts.suspend_rest;
    m.hot = (char *)hot[e->opts.hot];
    m.excluded = excluded;
    while (excluded[m.n_excluded])
        m.n_excluded++;
    r.kind_case = LB__RPC_REQUEST__KIND_EVACUATE;
    r.evacuate = &m;
    s = lb_session_spawn_for(d, "plan", "", "", &r, err);
    lb_strv_free(excluded);
    return s;
}

static void keep_plan(struct evacuation *v, const json_t *plan)
{
    free(v->plan);
    v->plan = json_dumps(plan, JSON_COMPACT | JSON_REAL_PRECISION(12));
    v->planned_ns = lb_now_ns();
}

static void planned(struct daemon *d, struct session *s)
{
    struct evacuation *v = d->evacuation;
    json_t *o = s->result ? json_loads(s->result, 0, NULL) : NULL, *plan = json_object_get(o, "plan");
    struct lb_error err = s->error;

    if (!err.code && !lb_evac_planned(v->e, plan, lb_evac_now_ms(), &err))
        keep_plan(v, plan);
    json_decref(o);
    if (v->showing) {
        v->showing = false;
        lb_clients_settle(d, LB_EVAC_NAME, LB_WAIT_PLAN, v->plan, err.code ? &err : NULL);
        if (err.code)
            lb_evac_free(LB_STEAL_PTR(v->e));
    } else if (err.code && !v->e->id[0]) {
        give_up(d, &err);
    } else if (err.code) {
        lb_log_error(LB_LOG_WARN, &err);
        lb_evac_not_planned(v->e, &err, lb_evac_now_ms());
    } else {
        lb_clients_tell(d, LB_EVAC_NAME, v->plan);
        v->say_all = v->save_due = true;
    }
    if (lb_evac_runs(v))
        step(d);
}

static void do_plan(struct daemon *d)
{
    struct evacuation *v = d->evacuation;
    struct lb_error err = LB_ERROR_INIT;

    v->planner = spawn_planner(d, v->e, &err);
    if (!v->planner)
        lb_evac_not_planned(v->e, &err, lb_evac_now_ms());
}

/* Everything that can be done now. */
static void step(struct daemon *d)
{
    struct evacuation *v = d->evacuation;
    struct lb_evac_order o;

    if (!lb_evac_runs(v) || lb_now_ns() < v->quiet_until_ns)
        return;
    if (v->quiet_until_ns)
        lb_evac_take_up_strays(d);
    v->quiet_until_ns = 0;
    for (unsigned i = 0; i < v->e->n_items; i++)
        if (v->e->items[i].unsettled)
            lb_evac_settle(d, &v->e->items[i]);
        else if (v->e->items[i].awaited)
            lb_evac_look_again(d, &v->e->items[i]);
    lb_evac_find_others(d);
    while (lb_evac_runs(v) && lb_evac_next(v->e, lb_evac_now_ms(), &o)) {
        switch (o.what) {
        case LB_EVAC_DO_PLAN:
            do_plan(d);
            break;
        case LB_EVAC_DO_BEGIN:
            lb_evac_do_begin(d, o.item);
            break;
        case LB_EVAC_DO_GO:
        case LB_EVAC_DO_CANCEL:
            lb_evac_do_tell(d, &o);
            break;
        case LB_EVAC_DO_END:
            end(d);
            return;
        }
    }
    if (v->e)
        say(d);
}

void lb_evac_step(struct daemon *d)
{
    if (d->evacuation)
        step(d);
}

static void on_tick(evutil_socket_t fd, short what, void *arg)
{
    (void)fd;
    (void)what;
    step(arg);
}

static void start_ticking(struct daemon *d)
{
    struct timeval every = {0, TICK_US};
    struct evacuation *v = d->evacuation;

    v->tick = event_new(d->base, -1, EV_PERSIST, on_tick, d);
    if (v->tick)
        event_add(v->tick, &every);
}

void lb_evac_session_over(struct session *s)
{
    struct evacuation *v = s->d->evacuation;

    if (!v)
        return;
    if (v->planner != s) {
        lb_evac_work_over(s);
        return;
    }
    v->planner = NULL;
    if (v->e && (v->showing || v->e->planning))
        planned(s->d, s);
}

/* --------------------------------------------------------------------------- requests: plan, run */

static int read_opts(struct daemon *d, const Lb__RpcEvacuate *r, struct lb_evac_opts *o, struct lb_error *err)
{
    static const char *const hot[] = {"throttle", "suspend", "leave"};
    struct lb_hosts hosts = {0};
    int rc = 0;

    o->parallel = r->parallel;
    o->bandwidth_bytes_per_s = r->bandwidth_bytes_per_s;
    o->suspend_rest = r->suspend_rest;
    o->priorities_json = r->priorities_json[0] ? r->priorities_json : NULL;
    for (size_t i = 0; i < LB_ARRAY_LEN(hot); i++)
        if (!strcmp(r->hot, hot[i]))
            o->hot = (enum lb_plan_hot)i;
    if (r->hot[0] && strcmp(r->hot, hot[o->hot]))
        return lb_fail(err, LB_E_USAGE, "what is hot can be slowed (throttle), suspended or left, not \"%.40s\"", r->hot);
    if (r->parallel > 1000)
        return lb_fail(err, LB_E_USAGE, "at most 1000 transfers at once are possible");
    if (lb_hosts_load(d->opt.state_dir, &hosts, err))
        return -1;
    o->to = lb_alloc((r->n_to + 1) * sizeof(*o->to));
    for (size_t i = 0; i < r->n_to && !rc; i++) {
        o->to[i] = lb_strdup(r->to[i]);
        if (lb_hosts_by_name(&hosts, r->to[i]))
            continue;
        rc = lb_fail(err, LB_E_NOT_FOUND, "host %.100s is not known here", r->to[i]);
        lb_remedy(err, "run `lifeboat host id` there, then `lifeboat host trust %.60s KEY ADDRESS` here; "
                       "`lifeboat host ls` lists the known ones", r->to[i]);
    }
    lb_hosts_free(&hosts);
    return rc;
}

static bool same_text(const char *a, const char *b)
{
    return !strcmp(a ? a : "", b ? b : "");
}

static bool same_opts(const struct lb_evac_opts *a, const struct lb_evac_opts *b)
{
    size_t i = 0;

    while (a->to[i] && b->to[i] && !strcmp(a->to[i], b->to[i]))
        i++;
    return !a->to[i] && !b->to[i] && a->parallel == b->parallel && a->bandwidth_bytes_per_s == b->bandwidth_bytes_per_s &&
           a->suspend_rest == b->suspend_rest && a->hot == b->hot && same_text(a->priorities_json, b->priorities_json);
}

/* Somebody waits for just that plan: one is enough for both. */
static bool is_being_planned(struct daemon *d, const Lb__RpcEvacuate *r)
{
    struct evacuation *v = lb_evac_of(d);
    struct lb_evac_opts o = {0};
    bool same = v->planner && v->showing && !read_opts(d, r, &o, NULL) && same_opts(&v->e->opts, &o);

    lb_strv_free(o.to);
    return same;
}

/* Replaces what was shown, or is over. */
static int new_evacuation(struct daemon *d, const Lb__RpcEvacuate *r, struct lb_error *err)
{
    struct evacuation *v = lb_evac_of(d);
    struct lb_evac_opts o = {0};
    int rc = read_opts(d, r, &o, err);

    if (!rc) {
        lb_evac_free(v->e);
        free(LB_STEAL_PTR(v->plan));
        v->e = lb_evac_new(d->cfg.name, &o, false);
    }
    lb_strv_free(o.to);
    return rc;
}

int lb_evac_refuse_two(struct evacuation *v, struct lb_error *err)
{
    if (lb_evac_runs(v)) {
        lb_fail(err, LB_E_STATE, v->e->returning ? "VMs are being brought back to this host" : "this host is being emptied");
        return lb_remedy(err, "`lifeboat %s` shows how far it is, `lifeboat cancel --evacuation` stops it",
                         v->e->returning ? "maintenance off --bring-back" : "evacuate");
    }
    if (v->planner) {
        lb_fail(err, LB_E_STATE, "another plan is being made");
        return lb_remedy(err, "try again in some seconds");
    }
    return 0;
}

static void op_plan(struct daemon *d, struct client *c, const Lb__RpcEvacuate *r)
{
    struct evacuation *v = lb_evac_of(d);
    struct lb_error err = LB_ERROR_INIT;

    if (!is_being_planned(d, r) && !lb_evac_refuse_two(v, &err) && !new_evacuation(d, r, &err))
        v->planner = spawn_planner(d, v->e, &err);
    if (err.code) {
        lb_client_failure(c, &err, NULL);
        return;
    }
    v->showing = true;
    lb_client_wait(c, LB_EVAC_NAME, LB_WAIT_PLAN, 0, NULL);
}

/* Is the plan that was shown still about what runs here? */
static bool plan_holds(struct daemon *d, const char *id)
{
    LB_AUTO_FREE struct lb_vm_entry *list = NULL;
    struct evacuation *v = d->evacuation;
    unsigned n = 0;
    char why[256];

    if (!v->e || v->e->phase != LB_EVAC_PLANNED || strcmp(v->e->id, id) ||
        lb_now_ns() - v->planned_ns > PLAN_AGE_MS * 1000000 || lb_vm_entry_list(d->opt.state_dir, &list, &n, NULL))
        return false;
    for (unsigned i = 0; i < n; i++)
        if (lb_evac_place_of(d, list[i].name, why) == LB_PLACE_HERE && !lb_evac_mover(v->e, list[i].name))
            return false;
    for (unsigned i = 0; i < v->e->n_items; i++)
        if (v->e->items[i].kind != LB_EVAC_BACKUP && lb_evac_reached(&v->e->items[i], lb_evac_place_of(d, v->e->items[i].vm, why)))
            return false;
    return true;
}

void lb_evac_begin(struct daemon *d)
{
    struct evacuation *v = d->evacuation;

    v->say_all = true;
    v->said_ns = v->quiet_until_ns = 0;
    lb_evac_start(v->e, lb_evac_now_ms(), lb_wall_ms());
    save(d);
    start_ticking(d);
    step(d);
}

void lb_evac_attach(struct daemon *d, struct client *c)
{
    struct evacuation *v = d->evacuation;

    lb_client_wait(c, LB_EVAC_NAME, LB_WAIT_EVACUATED, 0, NULL);
    if (v->plan)
        lb_client_event(c, v->plan);
    LB_AUTO_FREE char *text = lb_json_dump(lb_evac_event(v->e, true, lb_evac_now_ms()));
    lb_client_event(c, text);
}

static void op_run(struct daemon *d, struct client *c, const Lb__RpcEvacuate *r)
{
    struct evacuation *v = lb_evac_of(d);
    bool holds = r->plan_id[0] && plan_holds(d, r->plan_id);
    struct lb_error err = LB_ERROR_INIT;

    if (lb_evac_runs(v) && !v->e->returning) {
        lb_evac_attach(d, c);
        return;
    }
    if (lb_evac_refuse_two(v, &err)) {
        /* err says it */
    } else if (r->plan_id[0] && !holds && !r->replan) {
        lb_fail(&err, LB_E_STATE, "VMs have come or gone since this was planned, another plan was made, or it is too long ago");
        lb_remedy(&err, "plan it anew: `lifeboat evacuate`");
    } else if (holds || !new_evacuation(d, r, &err)) {
        v->maintenance_was_on = lb_maintenance_is_on(d);
        lb_maintenance_set(d, true, v->maintenance_was_on ? NULL : REASON, true, &err);
    }
    if (err.code) {
        lb_client_failure(c, &err, NULL);
        return;
    }
    lb_log(LB_LOG_INFO, "evacuation: this host takes no VMs from now on");
    lb_client_wait(c, LB_EVAC_NAME, LB_WAIT_EVACUATED, 0, NULL);
    lb_evac_begin(d);
}

static void op_watch(struct daemon *d, struct client *c)
{
    struct evacuation *v = lb_evac_of(d);
    struct lb_error err = LB_ERROR_INIT;

    if (lb_evac_runs(v)) {
        lb_evac_attach(d, c);
        return;
    }
    lb_fail(&err, LB_E_STATE, "this host is not being emptied");
    lb_remedy(&err, "`lifeboat evacuate` begins it");
    lb_client_failure(c, &err, NULL);
}

static void op_status(struct daemon *d, struct client *c)
{
    struct evacuation *v = lb_evac_of(d);
    json_t *o = v->e && v->e->phase != LB_EVAC_PLANNED ? lb_evac_event(v->e, true, lb_evac_now_ms()) : json_object();

    if (!json_object_size(o)) {
        json_object_set_new(o, "event", json_string("evacuation"));
        json_object_set_new(o, "phase", json_string("none"));
        json_object_set_new(o, "items", json_array());
    }
    LB_AUTO_FREE char *text = lb_json_dump(o);
    lb_client_result(c, text);
}

static void op_cancel(struct daemon *d, struct client *c)
{
    struct evacuation *v = lb_evac_of(d);
    struct lb_error err = LB_ERROR_INIT;

    if (!lb_evac_runs(v)) {
        lb_fail(&err, LB_E_STATE, "this host is not being emptied");
        lb_remedy(&err, "`lifeboat cancel NAME` is for one migration");
        lb_client_failure(c, &err, NULL);
        return;
    }
    lb_client_wait(c, LB_EVAC_NAME, LB_WAIT_EVACUATED, 0, NULL);
    if (v->planner)
        lb_session_order_cancel(v->planner, NULL);
    lb_evac_cancel(v->e);
    v->say_all = true;
    save(d);
    step(d);
}

void lb_op_evacuate(struct daemon *d, struct client *c, const Lb__RpcEvacuate *r)
{
    struct lb_error err = LB_ERROR_INIT;

    if (!strcmp(r->op, "plan")) {
        op_plan(d, c, r);
    } else if (!strcmp(r->op, "run")) {
        op_run(d, c, r);
    } else if (!strcmp(r->op, "watch")) {
        op_watch(d, c);
    } else if (!strcmp(r->op, "status")) {
        op_status(d, c);
    } else if (!strcmp(r->op, "cancel")) {
        op_cancel(d, c);
    } else {
        lb_fail(&err, LB_E_USAGE, "an evacuation cannot be asked to \"%.20s\"", r->op);
        lb_client_failure(c, &err, NULL);
    }
}

/* ----------------------------------------------------------------------------------- restart */

void lb_evac_resume(struct daemon *d)
{
    struct lb_error err = LB_ERROR_INIT;
    struct evacuation *v = lb_evac_of(d);

    v->e = lb_evac_load(d->opt.state_dir, &err);
    if (!v->e) {
        if (err.code != LB_E_NOT_FOUND)
            lb_log_error(LB_LOG_ERROR, &err);
        return;
    }
    if (!lb_evac_runs(v))
        return;
    lb_log(LB_LOG_INFO, "%s goes on", v->e->returning ? "bringing VMs back" : "evacuation");
    v->maintenance_was_on = true; /* it is by now, and nobody knows why */
    v->say_all = true;
    v->quiet_until_ns = lb_now_ns() + QUIET_NS;
    lb_evac_start(v->e, lb_evac_now_ms(), lb_wall_ms());
    start_ticking(d);
}

