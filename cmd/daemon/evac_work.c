/*
 * cmd/daemon/evac_work.c - the items of an evacuation: where a VM is, what is begun for it, what its session says. See
 * evac.h and evacuate.c.
 */
#include "cmd/daemon/evac.h"

#include <string.h>

#define BEHIND_MS 3000u
#define PAUSE_MS 3600000u /* a VM that may be paused for its last part: no limit that matters */

static bool is(const struct session *s, const char *role)
{
    return s && !strcmp(s->role, role);
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

static void copy_options(const struct lb_evac *e, const struct lb_evac_item *it, Lb__MigrateOptions *o)
{
    o->compress = LB_RPC_COMPRESS_CONFIGURED;
    o->bandwidth_bytes_per_s = e->opts.bandwidth_bytes_per_s;
    o->shared_bandwidth = e->opts.bandwidth_bytes_per_s;
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
    struct lb_evac_item *it = v && lb_evac_runs(v) ? lb_evac_active(v->e, vm) : NULL;

    if (!out && it && it->kind == LB_EVAC_COPY)
        lb_evac_ended(v->e, it, e, lb_evac_now_ms());
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
    Lb__RpcProtect protect = LB__RPC_PROTECT__INIT;
    Lb__RpcMigrate migrate = LB__RPC_MIGRATE__INIT;
    Lb__MigrateOptions opts = LB__MIGRATE_OPTIONS__INIT;
    char *backups[] = {(char *)it->to};

    switch (it->kind) {
    case LB_EVAC_SWAP:
        return lb_protect_swap(d, it->vm, it->to, err);
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

/* Where the VM is. why: what keeps it busy. */
enum lb_evac_place lb_evac_place_of(struct daemon *d, const char *vm, char why[256])
{
    struct session *s = lb_session_of_vm(d, vm);
    struct lb_error err = LB_ERROR_INIT;
    struct lb_vm_entry e;

    if (lb_vm_entry_load(d->opt.state_dir, vm, &e, &err)) {
        snprintf(why, 256, "%.255s", err.message);
        return err.code == LB_E_NOT_FOUND ? LB_PLACE_AWAY : LB_PLACE_BUSY;
    }
    snprintf(why, 256, "it is %s%s%.30s", lb_vm_state_name(e.state), s ? ", session " : "", s ? s->role : "");
    if (e.state == LB_VM_STANDBY || is(s, "backup"))
        return LB_PLACE_AWAY;
    if (is(s, "protect") && (e.state == LB_VM_PROTECTED || e.state == LB_VM_RUNNING))
        return LB_PLACE_HERE;
    if (e.state == LB_VM_FILLING && lb_proc_alive(&e.proc))
        return LB_PLACE_FILLS;
    if (s || lb_vm_is_locked(d->opt.state_dir, vm))
        return LB_PLACE_BUSY;
    if (e.state == LB_VM_SUSPENDED)
        return e.proc.pid > 0 ? LB_PLACE_BUSY : LB_PLACE_DISK;
    if (e.state == LB_VM_DEAD || (e.state == LB_VM_RUNNING && !lb_proc_alive(&e.proc)))
        return LB_PLACE_DEAD;
    return e.state == LB_VM_RUNNING ? LB_PLACE_HERE : LB_PLACE_BUSY;
}

static bool comes_here(const struct lb_evac_item *it)
{
    return it->kind == LB_EVAC_BACK || it->kind == LB_EVAC_RESUME;
}

bool lb_evac_reached(const struct lb_evac_item *it, enum lb_evac_place p)
{
    return comes_here(it) ? p == LB_PLACE_HERE || p == LB_PLACE_FILLS : p == LB_PLACE_AWAY || p == LB_PLACE_DISK;
}

/* Its guest may just have powered off. */
static void leave_dead(struct daemon *d, struct lb_evac_item *it)
{
    if (comes_here(it))
        lb_evac_leave(d->evacuation->e, it, "it is dead: its process is gone", "`lifeboat release` forgets it");
    else
        lb_evac_died(d->evacuation->e, it, lb_evac_now_ms());
    lb_maintenance_forget(d, it);
}

static void reached(struct daemon *d, struct lb_evac_item *it)
{
    lb_evac_gone(d->evacuation->e, it, lb_evac_now_ms());
    if (comes_here(it))
        lb_maintenance_forget(d, it);
}

/* Its session said that all went well, or was gone before we came: what the registry says may be a moment behind. */
static bool is_old(const struct lb_evac_item *it)
{
    return it->unsettled_ms && lb_evac_now_ms() - it->unsettled_ms > BEHIND_MS;
}

/* What is done with what has no session any more. */
void lb_evac_settle(struct daemon *d, struct lb_evac_item *it)
{
    struct lb_evac *e = d->evacuation->e;
    struct session *s = session_of(d, it);
    char why[256];
    enum lb_evac_place p;

    if (s && !is(s, "fill")) { /* it came back to a new supervisor */
        lb_evac_found(e, it, s->peer, lb_evac_now_ms());
        take_progress(d, it, s);
        return;
    }
    if (it->kind == LB_EVAC_BACKUP) { /* of an earlier supervisor; asking twice does no harm */
        lb_evac_settled(e, it, lb_evac_now_ms());
        return;
    }
    p = lb_evac_place_of(d, it->vm, why);
    if (p == LB_PLACE_BUSY || (p == LB_PLACE_FILLS && !comes_here(it)))
        return;
    if (p == LB_PLACE_DEAD) {
        leave_dead(d, it);
    } else if (lb_evac_reached(it, p)) {
        reached(d, it);
    } else if (it->error.code || is_old(it)) {
        lb_evac_settled(e, it, lb_evac_now_ms());
        if (!comes_here(it))
            lb_maintenance_forget(d, it);
    }
}

/* false: something has been said of the item already. */
static bool may_begin(struct daemon *d, struct lb_evac_item *it)
{
    struct lb_evac *e = d->evacuation->e;
    struct session *s = session_of(d, it);
    char why[256];
    enum lb_evac_place p;

    if (it->kind == LB_EVAC_BACKUP)
        return true;
    if (s) { /* somebody has begun it by hand */
        lb_evac_found(e, it, s->peer, lb_evac_now_ms());
        take_progress(d, it, s);
        return false;
    }
    p = lb_evac_place_of(d, it->vm, why);
    if (p == LB_PLACE_BUSY || (p == LB_PLACE_FILLS && !comes_here(it)))
        lb_evac_hold(e, it, why, lb_evac_now_ms());
    else if (p == LB_PLACE_DEAD && !comes_here(it))
        leave_dead(d, it);
    else if (lb_evac_reached(it, p))
        reached(d, it);
    else
        return true;
    return false;
}

/* Backups come and go after the plan was made: to the host where it is complete now, the VM swaps; to any other it is copied. */
static void fit_kind(struct lb_evac_item *it, const struct session *s)
{
    bool swaps = lb_protect_backed_by(s, it->to);

    if (it->kind == LB_EVAC_COPY || it->kind == LB_EVAC_SWAP)
        it->kind = swaps ? LB_EVAC_SWAP : LB_EVAC_COPY;
}

void lb_evac_do_begin(struct daemon *d, struct lb_evac_item *it)
{
    struct lb_evac *e = d->evacuation->e;
    struct lb_error err = LB_ERROR_INIT;
    const struct session *s;

    if (!may_begin(d, it))
        return;
    s = lb_session_of_vm(d, it->vm);
    fit_kind(it, s);
    if (!comes_here(it) && lb_maintenance_note(d, it, true, &err)) {
        lb_evac_ended(e, it, &err, lb_evac_now_ms());
        return;
    }
    if (it->kind == LB_EVAC_COPY && is(s, "protect"))
        begin_protected_copy(d, it);
    else if (!spawn(d, it, &err))
        lb_evac_ended(e, it, &err, lb_evac_now_ms());
}

void lb_evac_do_tell(struct daemon *d, const struct lb_evac_order *o)
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

/* Its memory comes from a checkpoint: no plan takes it before that is all there. */
static bool comes_up(const struct lb_vm_entry *vm)
{
    return (vm->state == LB_VM_FILLING || vm->state == LB_VM_RESTORING) && lb_proc_alive(&vm->proc);
}

/* One that nobody works on is planned; what is worked on is waited for, as its host is not empty before. */
static void find_other(struct daemon *d, const struct lb_vm_entry *vm)
{
    struct lb_evac *e = d->evacuation->e;
    const struct lb_evac_item *it = lb_evac_mover(e, vm->name);
    char why[256];
    enum lb_evac_place p = lb_evac_place_of(d, vm->name, why);

    if (!it && p == LB_PLACE_HERE)
        lb_evac_add(e, vm->name, LB_EVAC_COPY);
    else if (!it ? p == LB_PLACE_BUSY || p == LB_PLACE_FILLS
                 : it->state == LB_EVAC_LEFT && !it->tries && !it->held_ms && comes_up(vm))
        lb_evac_await(e, vm->name, why, lb_evac_now_ms());
}

/* VMs that were started here meanwhile, or came back from a migration by hand, leave as well. */
void lb_evac_find_others(struct daemon *d)
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
    for (unsigned i = 0; i < n; i++)
        find_other(d, &v[i]);
}

void lb_evac_look_again(struct daemon *d, struct lb_evac_item *it)
{
    char why[256];

    switch (lb_evac_place_of(d, it->vm, why)) {
    case LB_PLACE_HERE:
        lb_evac_free_again(d->evacuation->e, it);
        break;
    case LB_PLACE_AWAY:
    case LB_PLACE_DISK:
        lb_evac_gone(d->evacuation->e, it, lb_evac_now_ms());
        break;
    case LB_PLACE_DEAD:
        leave_dead(d, it);
        break;
    case LB_PLACE_BUSY:
    case LB_PLACE_FILLS:
        break;
    }
}

/* It waits for a go, and no item is at work with it. Either an earlier supervisor began it after it had last written the
 * file: then it is taken up. Or nobody will ever give it one. */
static void take_up(struct session *s)
{
    struct evacuation *v = s->d->evacuation;
    struct lb_evac_item *it = v && lb_evac_runs(v) ? lb_evac_mover(v->e, s->vm) : NULL;

    if (it && it->kind == LB_EVAC_COPY && (it->state == LB_EVAC_WAITS || it->state == LB_EVAC_FAILED)) {
        lb_evac_found(v->e, it, s->peer, lb_evac_now_ms());
        take_progress(s->d, it, s);
        return;
    }
    lb_log(LB_LOG_WARN, "vm=%s is ready to leave, but no evacuation wants it to: it stays", s->vm);
    lb_session_order_cancel(s, NULL);
}

void lb_evac_take_up_strays(struct daemon *d)
{
    struct session *s;

    LIST_FOREACH (s, &d->sessions, link)
        if (is(s, "out") && !strcmp(s->state, "ready") && !lb_evac_active(d->evacuation->e, s->vm))
            take_up(s);
}

/* ------------------------------------------------------------- from sessions.c, about sessions */

static struct lb_evac_item *item_of(struct session *s)
{
    struct evacuation *v = s->d->evacuation;
    struct lb_evac_item *it = v && lb_evac_runs(v) ? lb_evac_active(v->e, s->vm) : NULL;

    return it && works_for(s, it) ? it : NULL;
}

void lb_evac_heard(struct session *s, const char *kind, const char *text)
{
    struct evacuation *v = s->d->evacuation;
    struct lb_evac_item *it = item_of(s);
    enum lb_evac_state before;

    if (v && v->planner == s && !strcmp(kind, "note"))
        lb_clients_tell(s->d, LB_EVAC_NAME, text);
    if (!strcmp(kind, "running") && it && it->kind == LB_EVAC_RESUME) {
        lb_evac_ended(v->e, it, NULL, lb_evac_now_ms());
        return;
    }
    if (strcmp(kind, "progress"))
        return;
    if (!it) {
        if (is(s, "out") && !strcmp(s->state, "ready") && !(v && lb_now_ns() < v->quiet_until_ns))
            take_up(s);
        return;
    }
    before = it->state;
    take_progress(s->d, it, s);
    if (it->state != before)
        lb_evac_step(s->d);
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

void lb_evac_work_over(struct session *s)
{
    struct lb_evac_item *it = item_of(s);

    if (!it || !it->session)
        return;
    if (!s->error.code)
        take_result(it, s);
    lb_evac_ended(s->d->evacuation->e, it, s->error.code ? &s->error : NULL, lb_evac_now_ms());
}
