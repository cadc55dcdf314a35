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
#include "cmd/daemon/daemon.h"

#include <string.h>

#include "migrate/evacuate.h"
#include "migrate/maintenance.h"

#define TICK_US 250000
#define SAY_NS UINT64_C(250000000)   /* at most so often */
#define SAVE_NS UINT64_C(1000000000)
#define QUIET_NS UINT64_C(2000000000) /* after a restart: sessions connect again */
#define PLAN_AGE_MS UINT64_C(900000)
#define PAUSE_MS 3600000u             /* a VM that may be paused for its last part: no limit that matters */
#define RETURNS_AT_ONCE 2u
#define REASON "evacuation"

struct evacuation {
    struct lb_evac *e;         /* NULL: none */
    struct session *planner;
    bool showing;              /* what it plans is only to be shown */
    bool maintenance_was_on;   /* before this one began */
    char *plan;                /* JSON: the last one; NULL */
    uint64_t planned_ns;
    struct event *tick;
    bool say_all, save_due;
    uint64_t said_ns, saved_ns, quiet_until_ns;
};

static void step(struct daemon *d);

static uint64_t now_ms(void)
{
    return lb_now_ns() / 1000000;
}

static bool is(const struct session *s, const char *role)
{
    return s && !strcmp(s->role, role);
}

static struct evacuation *ev(struct daemon *d)
{
    if (!d->evacuation)
        d->evacuation = lb_alloc(sizeof(*d->evacuation));
    return d->evacuation;
}

static bool runs(const struct evacuation *v)
{
    return v->e && v->e->phase != LB_EVAC_PLANNED && !lb_evac_over(v->e);
}

/* ------------------------------------------------------------------------ maintenance.json */

static bool maintenance_is_on(struct daemon *d)
{
    struct lb_maintenance m;
    bool on;

    lb_maintenance_load(d->opt.state_dir, &m, NULL);
    on = m.on;
    lb_maintenance_free(&m);
    return on;
}

/* reason NULL: as it is. */
static int set_maintenance(struct daemon *d, bool on, const char *reason, bool keep_left, struct lb_error *err)
{
    struct lb_maintenance m;
    int rc = lb_maintenance_load(d->opt.state_dir, &m, err);

    if (!rc) {
        if (on && !m.on)
            m.since_ms = lb_wall_ms();
        if (reason)
            snprintf(m.reason, sizeof(m.reason), "%.127s", reason);
        if (!on && !keep_left)
            m.n_left = 0;
        m.on = on;
        rc = lb_maintenance_save(d->opt.state_dir, &m, err);
    }
    lb_maintenance_free(&m);
    return rc;
}

/* What leaves is written down before it does; what has not left, or is back, is taken out. */
static int note_left(struct daemon *d, const struct lb_evac_item *it, bool leaves, struct lb_error *err)
{
    struct lb_maintenance m;
    struct lb_left_vm *v;
    int rc = 0;

    if (it->kind == LB_EVAC_BACKUP)
        return 0;
    if (lb_maintenance_load(d->opt.state_dir, &m, err))
        return -1;
    if (leaves) {
        v = lb_left_add(&m, it->vm);
        snprintf(v->to, sizeof(v->to), "%s", it->to);
        v->is_protected = it->is_protected;
        v->suspended = it->kind == LB_EVAC_SUSPEND;
        rc = lb_maintenance_save(d->opt.state_dir, &m, err);
    } else if (lb_left_find(&m, it->vm)) {
        lb_left_remove(&m, it->vm);
        rc = lb_maintenance_save(d->opt.state_dir, &m, err);
    }
    lb_maintenance_free(&m);
    return rc;
}

static void forget_left(struct daemon *d, const struct lb_evac_item *it)
{
    struct lb_error err = LB_ERROR_INIT;

    if (note_left(d, it, false, &err))
        lb_log_error(LB_LOG_ERROR, &err);
}

json_t *lb_maintenance_status(struct daemon *d)
{
    struct lb_maintenance m;
    json_t *o, *on;

    lb_maintenance_load(d->opt.state_dir, &m, NULL);
    LB_AUTO_FREE char *text = lb_maintenance_json(&m);
    o = json_loads(text, 0, NULL);
    on = json_incref(json_object_get(o, "on"));
    json_object_del(o, "on");
    json_object_set_new(o, "maintenance", on);
    lb_maintenance_free(&m);
    return o;
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
    LB_AUTO_FREE char *text = lb_json_dump(lb_evac_event(v->e, v->say_all, now_ms()));
    v->say_all = false;
    lb_clients_tell(d, LB_EVAC_NAME, text);
    if (v->save_due && lb_now_ns() - v->saved_ns > SAVE_NS)
        save(d);
}

static char *result_json(struct evacuation *v)
{
    return lb_json_dump(lb_evac_event(v->e, true, now_ms()));
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
        set_maintenance(d, false, NULL, false, &err))
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
        (!v->maintenance_was_on && set_maintenance(d, false, NULL, true, &err)))
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

    if (!err.code && !lb_evac_planned(v->e, plan, now_ms(), &err))
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
        lb_evac_not_planned(v->e, &err, now_ms());
    } else {
        lb_clients_tell(d, LB_EVAC_NAME, v->plan);
        v->say_all = v->save_due = true;
    }
    if (runs(v))
        step(d);
}

static void do_plan(struct daemon *d)
{
    struct evacuation *v = d->evacuation;
    struct lb_error err = LB_ERROR_INIT;

    v->planner = spawn_planner(d, v->e, &err);
    if (!v->planner)
        lb_evac_not_planned(v->e, &err, now_ms());
}

/* ----------------------------------------------------------------------- what sessions say */

static double real(const json_t *o, const char *key)
{
    const json_t *v = json_object_get(o, key);

    return json_is_number(v) ? json_number_value(v) : -1;
}

static bool one_of(const char *word, const char *const *list)
{
    while (*list && strcmp(word, *list))
        list++;
    return *list != NULL;
}

static struct lb_evac_progress progress_of(const json_t *o, const char *state)
{
    static const char *const before[] = {"connecting", "preflight", "launching", "starting", "started", "", NULL};
    static const char *const after[] = {"handed-over", "done", "undecided", NULL};

    return (struct lb_evac_progress){
        .state = !strcmp(state, "ready")  ? LB_EVAC_READY
                 : one_of(state, before) ? LB_EVAC_SETUP
                                         : LB_EVAC_SENDING,
        .handed_over = one_of(state, after),
        .percent = real(o, "percent"),
        .bytes = real(o, "sent_bytes"),
        .throughput = real(o, "throughput_bytes_per_s"),
        /* before the first round has ended it is a guess worse than the plan's */
        .dirty_bytes_per_s = real(o, "round") > 0 ? real(o, "dirty_rate_bytes_per_s") : -1,
        .eta_s = real(o, "eta_s"),
    };
}

static void take_progress(struct daemon *d, struct lb_evac_item *it, const struct session *s)
{
    struct lb_evac *e = d->evacuation->e;
    json_t *o;
    struct lb_evac_progress p;

    if (!strcmp(s->state, "failed")) /* how far it had come is what counts; its end is told apart */
        return;
    o = s->progress ? json_loads(s->progress, 0, NULL) : NULL;
    p = progress_of(o, s->state);
    json_decref(o);
    if (it->kind == LB_EVAC_COPY && p.state == LB_EVAC_READY && it->state == LB_EVAC_SENDING)
        lb_evac_not_told(e, it); /* the go was lost on its way */
    lb_evac_progress(e, it, &p);
}

/* --------------------------------------------------------------- beginning what is to be done */

/* How many share what may be sent. */
static unsigned at_once(const struct lb_evac *e)
{
    unsigned n = 0;

    for (unsigned i = 0; i < e->n_items; i++)
        n += e->items[i].kind == LB_EVAC_COPY && e->items[i].state != LB_EVAC_DONE && e->items[i].state != LB_EVAC_LEFT;
    return LB_MAX(LB_MIN(n, e->parallel), 1u);
}

static void copy_options(const struct lb_evac *e, const struct lb_evac_item *it, Lb__MigrateOptions *o)
{
    o->compress = LB_RPC_COMPRESS_CONFIGURED;
    o->bandwidth_bytes_per_s = e->opts.bandwidth_bytes_per_s / at_once(e);
    /* Others on the link may be why it does not converge: it is slowed only when it has been alone. */
    o->no_throttle = !lb_evac_may_throttle(e, it);
    o->max_downtime_ms = lb_evac_may_pause(e, it) ? PAUSE_MS : 0;
}

static struct session *begin_copy(struct daemon *d, const struct lb_evac_item *it, struct lb_error *err)
{
    Lb__MigrateOptions o = LB__MIGRATE_OPTIONS__INIT;
    struct lb_vm_entry vm;

    if (lb_vm_entry_load(d->opt.state_dir, it->vm, &vm, err) || lb_protect_refuse(d, &vm, "migrate", err))
        return NULL;
    copy_options(d->evacuation->e, it, &o);
    o.wait_go = true;
    return lb_session_spawn(d, "out", it->vm, it->to, &o, -1, err);
}

/* The session "out" of a protected VM has begun, and is ours like any other; or it has come to nothing. */
static void moved(struct daemon *d, const char *vm, struct session *out, const struct lb_error *e)
{
    struct evacuation *v = d->evacuation;
    struct lb_evac_item *it = v && runs(v) ? lb_evac_active(v->e, vm) : NULL;

    if (!out && it && it->kind == LB_EVAC_COPY)
        lb_evac_ended(v->e, it, e, now_ms());
}

/* Its protection ends first, so it waits for no go: every moment it waits it has no backup. */
static void begin_protected_copy(struct daemon *d, const struct lb_evac_item *it)
{
    Lb__MigrateOptions o = LB__MIGRATE_OPTIONS__INIT;
    Lb__RpcMigrate m = LB__RPC_MIGRATE__INIT;

    copy_options(d->evacuation->e, it, &o);
    m.name = (char *)it->vm;
    m.host = (char *)it->to;
    m.options = &o;
    lb_protect_move(d, &m, moved);
}

static struct session *begin_ask(struct daemon *d, const struct lb_evac_item *it, struct lb_error *err)
{
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;
    Lb__RpcName failover = LB__RPC_NAME__INIT;
    Lb__RpcProtect protect = LB__RPC_PROTECT__INIT;
    Lb__RpcMigrate migrate = LB__RPC_MIGRATE__INIT;
    Lb__MigrateOptions opts = LB__MIGRATE_OPTIONS__INIT;
    char *backups[] = {(char *)it->to};

    switch (it->kind) {
    case LB_EVAC_SWAP:
        failover.name = (char *)it->vm;
        r.kind_case = LB__RPC_REQUEST__KIND_FAILOVER;
        r.failover = &failover;
        return lb_session_spawn_for(d, "ask", it->vm, it->to, &r, err);
    case LB_EVAC_BACKUP:
        protect.name = (char *)it->vm;
        protect.backups = backups;
        protect.n_backups = 1;
        r.kind_case = LB__RPC_REQUEST__KIND_PROTECT;
        r.protect = &protect;
        return lb_session_spawn_for(d, "ask", it->vm, it->from, &r, err);
    default:
        opts.compress = LB_RPC_COMPRESS_CONFIGURED;
        migrate.name = (char *)it->vm;
        migrate.options = &opts; /* the host is this one, whatever it is called there */
        r.kind_case = LB__RPC_REQUEST__KIND_MIGRATE;
        r.migrate = &migrate;
        return lb_session_spawn_for(d, "ask", it->vm, it->from, &r, err);
    }
}

static struct session *begin_disk(struct daemon *d, const struct lb_evac_item *it, struct lb_error *err)
{
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;
    Lb__RpcCheckpoint take = LB__RPC_CHECKPOINT__INIT;
    Lb__RpcRestore resume = LB__RPC_RESTORE__INIT;

    if (it->kind == LB_EVAC_SUSPEND) {
        take.name = (char *)it->vm;
        take.suspend = true;
        r.kind_case = LB__RPC_REQUEST__KIND_CHECKPOINT;
        r.checkpoint = &take;
        return lb_session_spawn_for(d, "checkpoint", it->vm, "", &r, err);
    }
    resume.ref = (char *)it->vm;
    resume.resume = true;
    r.kind_case = LB__RPC_REQUEST__KIND_RESTORE;
    r.restore = &resume;
    return lb_session_spawn_for(d, "restore", it->vm, "", &r, err);
}

static struct session *spawn(struct daemon *d, const struct lb_evac_item *it, struct lb_error *err)
{
    switch (it->kind) {
    case LB_EVAC_COPY:
        return begin_copy(d, it, err);
    case LB_EVAC_SUSPEND:
    case LB_EVAC_RESUME:
        return begin_disk(d, it, err);
    default:
        return begin_ask(d, it, err);
    }
}

/* The ask session about the VM; others are found by lb_session_of_vm. */
static struct session *asking(struct daemon *d, const char *vm)
{
    struct session *s;

    LIST_FOREACH (s, &d->sessions, link)
        if (is(s, "ask") && !s->ended && !strcmp(s->vm, vm))
            return s;
    return NULL;
}

static const char *role_of(const struct lb_evac_item *it)
{
    return it->kind == LB_EVAC_COPY      ? "out"
           : it->kind == LB_EVAC_SUSPEND ? "checkpoint"
           : it->kind == LB_EVAC_RESUME  ? "restore"
                                         : "ask";
}

/* A restore goes on as a fill once the guest runs. */
static bool works_for(const struct session *s, const struct lb_evac_item *it)
{
    return is(s, role_of(it)) || (it->kind == LB_EVAC_RESUME && is(s, "fill"));
}

static struct session *session_of(struct daemon *d, const struct lb_evac_item *it)
{
    struct session *s = !strcmp(role_of(it), "ask") ? asking(d, it->vm) : lb_session_of_vm(d, it->vm);

    return works_for(s, it) ? s : NULL;
}

enum place {
    BUSY,   /* something works on it, or it is to be decided */
    HERE,   /* it runs here and nothing works on it, but perhaps what protects it */
    AWAY,   /* it does not run here, and will not by itself */
    DISK,   /* suspended on this host's disk */
    FILLS,  /* it runs here, and its memory still comes */
    DEAD,
};

/* Where the VM is. why: what keeps it busy. */
static enum place place_of(struct daemon *d, const char *vm, char why[256])
{
    struct session *s = lb_session_of_vm(d, vm);
    struct lb_error err = LB_ERROR_INIT;
    struct lb_vm_entry e;

    if (lb_vm_entry_load(d->opt.state_dir, vm, &e, &err)) {
        snprintf(why, 256, "%.255s", err.message);
        return err.code == LB_E_NOT_FOUND ? AWAY : BUSY;
    }
    snprintf(why, 256, "it is %s%s%.30s", lb_vm_state_name(e.state), s ? ", session " : "", s ? s->role : "");
    if (e.state == LB_VM_STANDBY || is(s, "backup"))
        return AWAY;
    if (is(s, "protect") && (e.state == LB_VM_PROTECTED || e.state == LB_VM_RUNNING))
        return HERE;
    if (e.state == LB_VM_FILLING && lb_proc_alive(&e.proc))
        return FILLS;
    if (s || lb_vm_is_locked(d->opt.state_dir, vm))
        return BUSY;
    if (e.state == LB_VM_SUSPENDED)
        return e.proc.pid > 0 ? BUSY : DISK;
    if (e.state == LB_VM_DEAD || (e.state == LB_VM_RUNNING && !lb_proc_alive(&e.proc)))
        return DEAD;
    return e.state == LB_VM_RUNNING ? HERE : BUSY;
}

static bool comes_here(const struct lb_evac_item *it)
{
    return it->kind == LB_EVAC_BACK || it->kind == LB_EVAC_RESUME;
}

static bool reached(const struct lb_evac_item *it, enum place p)
{
    return comes_here(it) ? p == HERE || p == FILLS : p == AWAY || p == DISK;
}

static void leave_dead(struct daemon *d, struct lb_evac_item *it)
{
    lb_evac_leave(d->evacuation->e, it, "it is dead: its process is gone", "`lifeboat release` forgets it");
    forget_left(d, it);
}

/* What is done with what has no session any more. */
static void settle(struct daemon *d, struct lb_evac_item *it)
{
    struct lb_evac *e = d->evacuation->e;
    struct session *s = session_of(d, it);
    char why[256];
    enum place p;

    if (s && !is(s, "fill")) { /* it came back to a new supervisor */
        lb_evac_found(e, it, s->peer, now_ms());
        take_progress(d, it, s);
        return;
    }
    if (it->kind == LB_EVAC_BACKUP) { /* of an earlier supervisor; asking twice does no harm */
        lb_evac_settled(e, it, now_ms());
        return;
    }
    p = place_of(d, it->vm, why);
    if (p == BUSY || (p == FILLS && !comes_here(it)))
        return;
    if (p == DEAD) {
        leave_dead(d, it);
    } else if (reached(it, p)) {
        lb_evac_gone(e, it, now_ms());
        if (comes_here(it))
            forget_left(d, it);
    } else {
        lb_evac_settled(e, it, now_ms());
        if (!comes_here(it))
            forget_left(d, it);
    }
}

/* false: something has been said of the item already. */
static bool may_begin(struct daemon *d, struct lb_evac_item *it)
{
    struct lb_evac *e = d->evacuation->e;
    struct session *s = session_of(d, it);
    char why[256];
    enum place p;

    if (it->kind == LB_EVAC_BACKUP)
        return true;
    if (s) { /* somebody has begun it by hand */
        lb_evac_found(e, it, s->peer, now_ms());
        take_progress(d, it, s);
        return false;
    }
    p = place_of(d, it->vm, why);
    if (p == BUSY || (p == FILLS && !comes_here(it)))
        lb_evac_hold(e, it, why, now_ms());
    else if (p == DEAD && !comes_here(it))
        leave_dead(d, it);
    else if (reached(it, p))
        lb_evac_gone(e, it, now_ms());
    else
        return true;
    return false;
}

static void do_begin(struct daemon *d, struct lb_evac_item *it)
{
    struct lb_evac *e = d->evacuation->e;
    struct lb_error err = LB_ERROR_INIT;
    const struct session *s;

    if (!may_begin(d, it))
        return;
    s = lb_session_of_vm(d, it->vm);
    if (!comes_here(it) && note_left(d, it, true, &err)) {
        lb_evac_ended(e, it, &err, now_ms());
        return;
    }
    if (it->kind == LB_EVAC_COPY && is(s, "protect")) {
        if (strcmp(s->peer, it->to)) {
            begin_protected_copy(d, it);
            return;
        }
        it->kind = LB_EVAC_SWAP; /* it has become its backup since the plan was made */
    }
    if (!spawn(d, it, &err))
        lb_evac_ended(e, it, &err, now_ms());
}

static void do_tell(struct daemon *d, const struct lb_evac_order *o)
{
    struct session *s = session_of(d, o->item);
    struct lb_error err = LB_ERROR_INIT;

    if (!s)
        lb_fail(&err, LB_E_STATE, "its session is not there");
    else if (o->what == LB_EVAC_DO_GO)
        lb_session_order_go(s, &err);
    else
        lb_session_order_cancel(s, &err);
    if (err.code)
        lb_evac_not_told(d->evacuation->e, o->item);
}

/* VMs that were started here meanwhile leave as well. */
static void find_others(struct daemon *d)
{
    LB_AUTO_FREE struct lb_vm_entry *v = NULL;
    struct lb_evac *e = d->evacuation->e;
    unsigned n = 0;

    if (e->returning || e->phase != LB_EVAC_RUNNING || !e->id[0] || e->need_plan)
        return;
    for (unsigned i = 0; i < e->n_items; i++)
        if (e->items[i].state != LB_EVAC_DONE && e->items[i].state != LB_EVAC_LEFT)
            return;
    if (lb_vm_entry_list(d->opt.state_dir, &v, &n, NULL))
        return;
    for (unsigned i = 0; i < n; i++) {
        char why[256];

        if (!lb_evac_mover(e, v[i].name) && place_of(d, v[i].name, why) == HERE)
            lb_evac_add(e, v[i].name, LB_EVAC_COPY);
    }
}

/* Of an earlier supervisor, ready to leave, and in no list of ours: nobody would ever tell it to go. */
static void cancel_strays(struct daemon *d)
{
    struct session *s;

    LIST_FOREACH (s, &d->sessions, link)
        if (is(s, "out") && !strcmp(s->state, "ready") && !lb_evac_active(d->evacuation->e, s->vm))
            lb_session_order_cancel(s, NULL);
}

/* Everything that can be done now. */
static void step(struct daemon *d)
{
    struct evacuation *v = d->evacuation;
    struct lb_evac_order o;

    if (!runs(v) || lb_now_ns() < v->quiet_until_ns)
        return;
    if (v->quiet_until_ns)
        cancel_strays(d);
    v->quiet_until_ns = 0;
    for (unsigned i = 0; i < v->e->n_items; i++)
        if (v->e->items[i].unsettled)
            settle(d, &v->e->items[i]);
    find_others(d);
    while (runs(v) && lb_evac_next(v->e, now_ms(), &o)) {
        switch (o.what) {
        case LB_EVAC_DO_PLAN:
            do_plan(d);
            break;
        case LB_EVAC_DO_BEGIN:
            do_begin(d, o.item);
            break;
        case LB_EVAC_DO_GO:
        case LB_EVAC_DO_CANCEL:
            do_tell(d, &o);
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

/* ------------------------------------------------------------- from sessions.c, about sessions */

static struct lb_evac_item *item_of(struct session *s)
{
    struct evacuation *v = s->d->evacuation;
    struct lb_evac_item *it = v && runs(v) ? lb_evac_active(v->e, s->vm) : NULL;

    return it && works_for(s, it) ? it : NULL;
}

/* It waits for a go that nobody will give. */
static void cancel_orphan(struct session *s)
{
    struct evacuation *v = s->d->evacuation;

    if (v && runs(v) && lb_now_ns() < v->quiet_until_ns)
        return;
    lb_log(LB_LOG_WARN, "vm=%s is ready to leave, but no evacuation is under way: it stays", s->vm);
    lb_session_order_cancel(s, NULL);
}

void lb_evac_heard(struct session *s, const char *kind, const char *text)
{
    struct evacuation *v = s->d->evacuation;
    struct lb_evac_item *it = item_of(s);
    enum lb_evac_state before;

    if (v && v->planner == s && !strcmp(kind, "note"))
        lb_clients_tell(s->d, LB_EVAC_NAME, text);
    if (!strcmp(kind, "running") && it && it->kind == LB_EVAC_RESUME) {
        lb_evac_ended(v->e, it, NULL, now_ms());
        return;
    }
    if (strcmp(kind, "progress"))
        return;
    if (!it) {
        if (is(s, "out") && !strcmp(s->state, "ready"))
            cancel_orphan(s);
        return;
    }
    before = it->state;
    take_progress(s->d, it, s);
    if (it->state != before)
        step(s->d);
}

/* What the result of a good end says besides. */
static void take_result(struct lb_evac_item *it, const struct session *s)
{
    json_t *o = s->result ? json_loads(s->result, 0, NULL) : NULL;
    const char *key = it->kind == LB_EVAC_SUSPEND ? "pause_ms" : it->kind == LB_EVAC_SWAP ? "last_failover_took_ms" : "downtime_ms";
    double downtime = real(o, key), bytes = real(o, "wire_bytes");

    if (downtime >= 0)
        it->downtime_ms = downtime;
    if (bytes > 0)
        it->bytes = bytes;
    json_decref(o);
}

void lb_evac_session_over(struct session *s)
{
    struct daemon *d = s->d;
    struct evacuation *v = d->evacuation;
    struct lb_evac_item *it = item_of(s);

    if (v && v->planner == s) {
        v->planner = NULL;
        if (v->e && (v->showing || v->e->planning))
            planned(d, s);
        return;
    }
    if (!it || !it->session)
        return;
    if (!s->error.code)
        take_result(it, s);
    lb_evac_ended(v->e, it, s->error.code ? &s->error : NULL, now_ms());
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

/* Replaces what was shown, or is over. */
static int new_evacuation(struct daemon *d, const Lb__RpcEvacuate *r, struct lb_error *err)
{
    struct evacuation *v = ev(d);
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

static int refuse_two(struct evacuation *v, struct lb_error *err)
{
    if (runs(v)) {
        lb_fail(err, LB_E_STATE, v->e->returning ? "VMs are being brought back to this host" : "this host is being emptied");
        return lb_remedy(err, "`lifeboat evacuate` shows how far it is, `lifeboat cancel --evacuation` stops it");
    }
    if (v->planner) {
        lb_fail(err, LB_E_STATE, "another plan is being made");
        return lb_remedy(err, "try again in some seconds");
    }
    return 0;
}

static void op_plan(struct daemon *d, struct client *c, const Lb__RpcEvacuate *r)
{
    struct evacuation *v = ev(d);
    struct lb_error err = LB_ERROR_INIT;

    if (!refuse_two(v, &err) && !new_evacuation(d, r, &err))
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
        if (place_of(d, list[i].name, why) == HERE && !lb_evac_mover(v->e, list[i].name))
            return false;
    for (unsigned i = 0; i < v->e->n_items; i++)
        if (v->e->items[i].kind != LB_EVAC_BACKUP && reached(&v->e->items[i], place_of(d, v->e->items[i].vm, why)))
            return false;
    return true;
}

static void begin_run(struct daemon *d)
{
    struct evacuation *v = d->evacuation;

    v->say_all = true;
    v->said_ns = v->quiet_until_ns = 0;
    lb_evac_start(v->e, now_ms(), lb_wall_ms());
    save(d);
    start_ticking(d);
    step(d);
}

/* Shows it to one more client. */
static void attach(struct daemon *d, struct client *c)
{
    struct evacuation *v = d->evacuation;

    lb_client_wait(c, LB_EVAC_NAME, LB_WAIT_EVACUATED, 0, NULL);
    if (v->plan)
        lb_client_event(c, v->plan);
    LB_AUTO_FREE char *text = lb_json_dump(lb_evac_event(v->e, true, now_ms()));
    lb_client_event(c, text);
}

static void op_run(struct daemon *d, struct client *c, const Lb__RpcEvacuate *r)
{
    struct evacuation *v = ev(d);
    struct lb_error err = LB_ERROR_INIT;

    if (runs(v) && !v->e->returning) {
        attach(d, c);
        return;
    }
    if (refuse_two(v, &err)) {
        /* err says it */
    } else if (r->plan_id[0] && !plan_holds(d, r->plan_id)) {
        lb_fail(&err, LB_E_STATE, "VMs have come or gone since this was planned, or it is too long ago");
        lb_remedy(&err, "plan it anew: `lifeboat evacuate`");
    } else if (r->plan_id[0] || !new_evacuation(d, r, &err)) {
        v->maintenance_was_on = maintenance_is_on(d);
        set_maintenance(d, true, v->maintenance_was_on ? NULL : REASON, true, &err);
    }
    if (err.code) {
        lb_client_failure(c, &err, NULL);
        return;
    }
    lb_log(LB_LOG_INFO, "evacuation: this host takes no VMs from now on");
    lb_client_wait(c, LB_EVAC_NAME, LB_WAIT_EVACUATED, 0, NULL);
    begin_run(d);
}

static void op_watch(struct daemon *d, struct client *c)
{
    struct evacuation *v = ev(d);
    struct lb_error err = LB_ERROR_INIT;

    if (runs(v)) {
        attach(d, c);
        return;
    }
    lb_fail(&err, LB_E_STATE, "this host is not being emptied");
    lb_remedy(&err, "`lifeboat evacuate` begins it");
    lb_client_failure(c, &err, NULL);
}

static void op_status(struct daemon *d, struct client *c)
{
    struct evacuation *v = ev(d);
    json_t *o = v->e && v->e->phase != LB_EVAC_PLANNED ? lb_evac_event(v->e, true, now_ms()) : json_object();

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
    struct evacuation *v = ev(d);
    struct lb_error err = LB_ERROR_INIT;

    if (!runs(v)) {
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

/* ------------------------------------------------------------------------------ maintenance */

/* Everything that has left, from where it was sent to. */
static void bring_back(struct daemon *d, struct client *c, uint32_t parallel, struct lb_error *err)
{
    struct evacuation *v = ev(d);
    struct lb_evac_opts o = {.parallel = parallel ? parallel : RETURNS_AT_ONCE};
    struct lb_maintenance m;

    if (lb_maintenance_load(d->opt.state_dir, &m, err))
        return;
    lb_evac_free(v->e);
    free(LB_STEAL_PTR(v->plan));
    v->e = lb_evac_new(d->cfg.name, &o, true);
    for (unsigned i = 0; i < m.n_left; i++) {
        struct lb_evac_item *it = lb_evac_add(v->e, m.left[i].vm, m.left[i].suspended ? LB_EVAC_RESUME : LB_EVAC_BACK);

        snprintf(it->from, sizeof(it->from), "%s", m.left[i].suspended ? d->cfg.name : m.left[i].to);
        snprintf(it->to, sizeof(it->to), "%s", d->cfg.name);
        it->is_protected = m.left[i].is_protected;
    }
    lb_maintenance_free(&m);
    lb_client_wait(c, LB_EVAC_NAME, LB_WAIT_EVACUATED, 0, NULL);
    begin_run(d);
}

static void maintenance_off(struct daemon *d, struct client *c, const Lb__RpcMaintenance *r)
{
    struct lb_error err = LB_ERROR_INIT;

    if (!refuse_two(ev(d), &err) && !set_maintenance(d, false, NULL, r->bring_back, &err)) {
        lb_log(LB_LOG_INFO, "maintenance is over: this host takes VMs");
        if (r->bring_back) {
            bring_back(d, c, r->parallel, &err);
        } else {
            LB_AUTO_FREE char *text = lb_json_dump(lb_maintenance_status(d));
            lb_client_result(c, text);
        }
    }
    if (err.code)
        lb_client_failure(c, &err, NULL);
}

static void maintenance_on(struct daemon *d, struct client *c, const Lb__RpcMaintenance *r)
{
    struct lb_error err = LB_ERROR_INIT;

    if (!refuse_two(ev(d), &err))
        set_maintenance(d, true, r->reason, true, &err);
    if (err.code) {
        lb_client_failure(c, &err, NULL);
        return;
    }
    lb_log(LB_LOG_INFO, "maintenance: this host takes no VMs from now on");
    LB_AUTO_FREE char *text = lb_json_dump(lb_maintenance_status(d));
    lb_client_result(c, text);
}

void lb_op_maintenance(struct daemon *d, struct client *c, const Lb__RpcMaintenance *r)
{
    struct lb_error err = LB_ERROR_INIT;

    if (!strcmp(r->op, "on")) {
        maintenance_on(d, c, r);
    } else if (!strcmp(r->op, "off")) {
        maintenance_off(d, c, r);
    } else if (!strcmp(r->op, "status")) {
        LB_AUTO_FREE char *text = lb_json_dump(lb_maintenance_status(d));
        lb_client_result(c, text);
    } else {
        lb_fail(&err, LB_E_USAGE, "maintenance is \"on\" or \"off\", not \"%.20s\"", r->op);
        lb_client_failure(c, &err, NULL);
    }
}

/* ----------------------------------------------------------------------------------- restart */

void lb_evac_resume(struct daemon *d)
{
    struct lb_error err = LB_ERROR_INIT;
    struct evacuation *v = ev(d);

    v->e = lb_evac_load(d->opt.state_dir, &err);
    if (!v->e) {
        if (err.code != LB_E_NOT_FOUND)
            lb_log_error(LB_LOG_ERROR, &err);
        return;
    }
    if (!runs(v))
        return;
    lb_log(LB_LOG_INFO, "%s goes on", v->e->returning ? "bringing VMs back" : "evacuation");
    v->maintenance_was_on = true; /* it is by now, and nobody knows why */
    v->say_all = true;
    v->quiet_until_ns = lb_now_ns() + QUIET_NS;
    lb_evac_start(v->e, now_ms(), lb_wall_ms());
    start_ticking(d);
}
