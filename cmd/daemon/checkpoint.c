/*
 * cmd/daemon/checkpoint.c - checkpoints, suspended VMs and schedules, as the supervisor sees them.
 *
 *   request      carried out by                          on the way
 *   checkpoint   session "checkpoint" of the VM          progress
 *   restore      session "restore" of the new VM; once   progress, then {"event":"running"}; with `wait` the
 *                the guest runs its role is "fill"       answer comes when all memory is there
 *   clone        session "clone"                         progress
 *   catalog      ls, show: a worker                      -
 *                else a session "catalog"                progress
 *   schedule     at once                                 -
 *   suspend_all, resume_all, fill_key                    {"event":"started"}, {"event":"vm"}: batch.c
 *
 * A session without a VM of its own (clone, catalog) is cancelled when the client that asked for it goes
 * away; all others go on. `lifeboat cancel NAME` stops a checkpoint, a suspend and a restore; nothing stops
 * a fill: its guest runs.
 *
 * What is said, as JSON. Sizes are bytes, times ms, `created_ms` and the like wall clock; a number that is
 * not known is null.
 *
 * Events
 *   {"event":"started","vm":"web1","session":"..."}
 *   {"event":"progress","vm":"web1","what":"suspend"|"checkpoint"|"resume"|"restore"|"fill"|"clone"|"verify"|"prune"|
 *    "rm"|"export"|"import","phase":"copying", "state": as phase,"percent":41.5,"done_bytes":N,"total_bytes":N,
 *    "file_bytes":N,"bytes_per_s":N,"eta_s":N|null,"note":"..."}
 *   {"event":"running","vm":"web1","result":{as the result of restore}}       lazy: memory still comes
 *   {"event":"vm","what":"suspend"|"resume"|"key","vm":"web1","ok":true,"done":1,"total":5,"message":"","remedy":""}
 *                                                                             one VM of suspend_all ... is done
 * Results
 *   checkpoint   {"vm","ref":"web1@7","path","number":7,"label","suspend":false,"increment":true,"encrypted":false,
 *                 "pages","zero_pages","same_pages","unchanged_pages","delta_pages","stored_pages","raw_bytes",
 *                 "file_bytes","rounds","disks":1,"pause_ms","total_ms"}
 *   restore      {"vm","ref","resumed":false,"filling":true,"running_ms","total_ms","ram_bytes","placed_bytes"}
 *                with `wait`: when all is there, "filling":false and total_ms, placed_bytes of all.
 *                resume of a VM in state filling that waits for its key: {"vm","resumed":true,"filling":true}
 *   clone        {"ref","clones":[{"name","running_ms"}]}; also the failure's, with those that run
 *   catalog ls   {"checkpoints":[C ...]}
 *     C          {"ref":"web1@7","vm","number":7 (0: suspend),"suspend","label","created_ms","pause_ms","path",
 *                 "file_bytes","encrypted","key":"none"|"file"|"passphrase","increment","id","parent":"" or id,
 *                 "depth":3 (files a restore reads, 0: a parent is missing),"no_disk","ram_bytes","pages",...
 *                 "raw_bytes" (as in checkpoint),"readable":true,"error":"" ,"remedy":""}
 *                 not readable: what is not known is null
 *   catalog show C and "disks":[{"id","path","argv_path","format","size_bytes"}],"chain":["web1@7","web1@6",...],
 *                 "machine","accel","cpu_model","vcpus","hv_version"
 *   verify       {"ok":false,"checked":[{"ref","path","ok","problems":["..."]}],"problems":["..."]}
 *   rm, prune    {"refs":["web1@3"],"removed":1,"joined":1,"images_joined":1,"images_kept":0,"freed_bytes"}
 *                 dry_run: {"would_remove":["web1@3",...]}
 *   export       {"ref","to"}
 *   import       C
 *   schedule     {"vm","every_ms","keep","no_disk","key_file","last_ms" (0: never),"next_ms","failures","error"};
 *                off or none: {"vm","every_ms":0}. every_ms 0 and not off: only asked
 *   suspend_all  {"done":[{"vm",result of checkpoint}],"failed":[{"vm","message","remedy"}],
 *                 "left":[{"vm","state","message","remedy"}]}   left: protected, or not one that can be suspended
 *   resume_all   {"done":[{"vm",result of restore}],"failed":[...],"left":[...]}
 *   fill_key     {"done":[{"vm"}],"failed":[...],"left":[]}
 *
 * In ls, status and show a VM has besides
 *   "checkpoint"  the registry's: "web1@7", the last one taken or the one it comes from; ""
 *   "suspended"   {"ref","path","file_bytes","since_ms"} in state suspended
 *   "fill"        {"percent","problem":""} in state filling; percent null: nobody fills at the moment
 *   "schedule"    as above, when there is one
 */
#include "cmd/daemon/ckpt.h"

#include <string.h>
#include <sys/stat.h>

#define MAX_SCHEDULED 2u /* at a time: they read memory as fast as the disks take it */

static bool is(const struct session *s, const char *role)
{
    return s && !strcmp(s->role, role);
}

/* ------------------------------------------------------------ what may be done when */

static int refuse_taken(const char *vm, struct lb_error *err)
{
    lb_fail(err, LB_E_STATE, "a checkpoint of VM %s is being taken", vm);
    return lb_remedy(err, "wait until it is done, or `lifeboat cancel %s`", vm);
}

static int refuse_restored(const char *vm, struct lb_error *err)
{
    lb_fail(err, LB_E_STATE, "VM %s is being restored", vm);
    return lb_remedy(err, "wait until it runs, or `lifeboat cancel %s`", vm);
}

static int refuse_filled(const char *vm, const char *from, struct lb_error *err)
{
    lb_fail(err, LB_E_STATE, "VM %s runs, but its memory still comes from %s", vm,
            from[0] ? from : "its checkpoint");
    return lb_remedy(err, "wait until `lifeboat status %s` says running; `lifeboat stop --force %s` ends it",
                     vm, vm);
}

int lb_ckpt_refuse(struct daemon *d, const struct lb_vm_entry *e, struct lb_error *err)
{
    struct session *s = lb_session_of_vm(d, e->name);

    if (is(s, "checkpoint") || is(s, "scheduled") || e->state == LB_VM_CHECKPOINTING)
        return refuse_taken(e->name, err);
    if (e->state == LB_VM_FILLING)
        return refuse_filled(e->name, e->checkpoint, err);
    if (is(s, "restore") || e->state == LB_VM_RESTORING)
        return refuse_restored(e->name, err);
    if (is(s, "catalog")) {
        lb_fail(err, LB_E_STATE, "images of VM %s are being joined", e->name);
        return lb_remedy(err, "wait until it is done, or `lifeboat cancel %s`", e->name);
    }
    if (e->state != LB_VM_SUSPENDED)
        return 0;
    lb_fail(err, LB_E_STATE, "VM %s is suspended", e->name);
    return lb_remedy(err, "`lifeboat resume %s` first; `lifeboat checkpoint rm --force %s@suspend` throws "
                          "it away", e->name, e->name);
}

int lb_ckpt_takeable(struct daemon *d, const struct lb_vm_entry *e, const char *what, struct lb_error *err)
{
    struct session *s = lb_session_of_vm(d, e->name);

    if (lb_protect_refuse(d, e, what, err) || lb_ckpt_refuse(d, e, err))
        return -1;
    if (e->state == LB_VM_DEAD || (e->proc.pid > 0 && !lb_proc_alive(&e->proc))) {
        lb_fail(err, LB_E_STATE, "VM %s is dead: its process %d is gone", e->name, (int)e->proc.pid);
        return lb_remedy(err, "`lifeboat restore %s` starts its latest checkpoint, `lifeboat release %s` "
                              "forgets it", e->name, e->name);
    }
    if (is(s, "out")) {
        lb_fail(err, LB_E_STATE, "VM %s is being migrated to host %s", e->name, s->peer);
        return lb_remedy(err, "wait, or `lifeboat cancel %s`", e->name);
    }
    /* One that has just come in may go on at once: the session waits for its lock. */
    if (lb_session_blocks(s, e) || (e->state != LB_VM_RUNNING && !is(s, "in"))) {
        lb_fail(err, LB_E_STATE, "VM %s is %s%s", e->name, lb_vm_state_name(e->state),
                is(s, "recover") ? " and being recovered" : "");
        return lb_remedy(err, "wait, or `lifeboat recover %s`", e->name);
    }
    return 0;
}

bool lb_ckpt_cancellable(const struct session *s)
{
    return is(s, "checkpoint") || is(s, "scheduled") || is(s, "restore") || is(s, "catalog");
}

void lb_ckpt_abandon(struct session *s)
{
    if ((is(s, "clone") || is(s, "catalog")) && !s->ended)
        s->abandoned = lb_session_order_cancel(s, NULL) != 0;
}

/* ------------------------------------------------------------------------- requests */

/* A session for the request, which the client watches; or the failure. */
static void start(struct client *c, struct daemon *d, const char *role, const char *vm,
                  const Lb__RpcRequest *r, bool all, struct lb_error *err)
{
    struct session *s = err->code ? NULL : lb_session_spawn_for(d, role, vm, "", r, err);

    if (s)
        lb_client_watch(c, s, all);
    else
        lb_client_failure(c, err, NULL);
}

void lb_op_checkpoint(struct daemon *d, struct client *c, const Lb__RpcRequest *r)
{
    const Lb__RpcCheckpoint *m = r->checkpoint;
    struct lb_error err = LB_ERROR_INIT;
    struct lb_vm_entry e;

    if (strlen(m->label) >= sizeof(((struct lb_take_opts *)0)->label)) {
        lb_fail(&err, LB_E_USAGE, "the label has more than %zu characters",
                sizeof(((struct lb_take_opts *)0)->label) - 1);
        lb_remedy(&err, "use a shorter one");
    } else if (!lb_vm_entry_load(d->opt.state_dir, m->name, &e, &err)) {
        lb_ckpt_takeable(d, &e, m->suspend ? "suspend" : "checkpoint", &err);
    }
    start(c, d, "checkpoint", m->name, r, true, &err);
}

/* Which VM it will be, as far as the request says; the session finds out the rest. */
static void target_of(const Lb__RpcRestore *m, char out[128])
{
    size_t len = strcspn(m->ref, "@");

    if (m->as[0])
        snprintf(out, 128, "%s", m->as);
    else
        snprintf(out, 128, "%.*s", strchr(m->ref, '/') ? 0 : (int)LB_MIN(len, 127u), m->ref);
}

/* Of a suspended VM; also of one that waits for the key with which its memory can be read. */
static int check_resume(struct daemon *d, const char *vm, bool *fill, struct lb_error *err)
{
    struct lb_vm_entry e;

    *fill = false;
    if (lb_vm_entry_load(d->opt.state_dir, vm, &e, err))
        return -1;
    *fill = e.state == LB_VM_FILLING;
    if (*fill || e.state == LB_VM_SUSPENDED || e.state == LB_VM_RESTORING)
        return 0;
    lb_fail(err, LB_E_STATE, "VM %s is not suspended, it is %s", vm, lb_vm_state_name(e.state));
    return lb_remedy(err, "`lifeboat restore %s` goes back to its latest checkpoint", vm);
}

void lb_op_restore(struct daemon *d, struct client *c, const Lb__RpcRequest *r)
{
    const Lb__RpcRestore *m = r->restore;
    struct lb_error err = LB_ERROR_INIT;
    struct session *s;
    bool fill = false;
    char vm[128];

    target_of(m, vm);
    s = vm[0] ? lb_session_of_vm(d, vm) : NULL;
    if ((m->as[0] || vm[0]) && !lb_vm_name_valid(vm)) {
        lb_fail(&err, LB_E_USAGE, "\"%.80s\" is not a valid VM name", vm);
        lb_remedy(&err, "use at most 63 letters, digits, '.', '_' and '-', beginning with a letter or a digit");
    } else if (s) {
        lb_fail(&err, LB_E_STATE, "VM %s is busy: a session (%s) works on it", vm, s->role);
        lb_remedy(&err, "`lifeboat status %s` shows it", vm);
    } else if (m->resume) {
        check_resume(d, vm, &fill, &err);
    }
    start(c, d, fill ? "fill" : "restore", vm, r, m->wait, &err);
}

void lb_op_clone(struct daemon *d, struct client *c, const Lb__RpcRequest *r)
{
    struct lb_error err = LB_ERROR_INIT;

    if (!r->clone->count || r->clone->count > LB_CKPT_CLONES_MAX) {
        lb_fail(&err, LB_E_USAGE, "%u clones are not possible", r->clone->count);
        lb_remedy(&err, "use a number from 1 to %u", LB_CKPT_CLONES_MAX);
    }
    start(c, d, "clone", "", r, true, &err);
}

void lb_op_catalog(struct daemon *d, struct client *c, const Lb__RpcRequest *r)
{
    struct lb_error err = LB_ERROR_INIT;

    start(c, d, "catalog", "", r, true, &err);
}

/* ------------------------------------------------------------------------ schedules */

static json_t *schedule_json(const char *vm, const struct lb_ckpt_schedule *s)
{
    json_t *o = json_object();

    json_object_set_new(o, "vm", lb_json_text(vm));
    json_object_set_new(o, "every_ms", json_integer(s ? (json_int_t)s->every_ms : 0));
    if (!s)
        return o;
    json_object_set_new(o, "keep", json_integer(s->keep));
    json_object_set_new(o, "no_disk", json_boolean(s->no_disk));
    json_object_set_new(o, "key_file", lb_json_text(s->key_file));
    json_object_set_new(o, "last_ms", json_integer((json_int_t)s->last_ms));
    json_object_set_new(o, "next_ms", json_integer((json_int_t)lb_schedule_next_ms(s, lb_wall_ms())));
    json_object_set_new(o, "failures", json_integer(s->failures));
    json_object_set_new(o, "error", lb_json_text(s->error));
    return o;
}

/* What is known to be wrong with it is said now, not at the first run. */
static int check_key_file(const char *path, struct lb_error *err)
{
    struct lb_ckpt_key *k = NULL;
    int rc;

    if (!path[0])
        return 0;
    if (path[0] != '/' || strlen(path) >= sizeof(((struct lb_ckpt_schedule *)0)->key_file))
        return lb_fail(err, LB_E_USAGE, "the key file %.200s is not an absolute path, or too long", path);
    rc = lb_ckpt_key_file(path, &k, err);
    lb_ckpt_key_free(k);
    return rc;
}

/* schedule.json is written by the supervisor alone: sessions report, they do not write. */
char *lb_op_schedule(struct daemon *d, const Lb__RpcSchedule *r, struct lb_error *err)
{
    struct lb_error why = LB_ERROR_INIT;
    struct lb_ckpt_schedule s = {0};
    struct lb_vm_entry e;
    bool there;

    if (lb_vm_entry_load(d->opt.state_dir, r->name, &e, err))
        return NULL;
    if (r->off)
        return lb_schedule_remove(d->opt.state_dir, r->name, err) ? NULL
                                                                  : lb_json_dump(schedule_json(r->name, NULL));
    there = !lb_schedule_load(d->opt.state_dir, r->name, &s, &why);
    if (!r->every_ms && !there && why.code != LB_E_NOT_FOUND) {
        *err = why;
        return NULL;
    }
    if (!r->every_ms)
        return lb_json_dump(schedule_json(r->name, there ? &s : NULL));
    s.every_ms = r->every_ms;
    s.keep = r->keep;
    s.no_disk = r->no_disk;
    s.failures = 0;
    s.error[0] = '\0';
    if (check_key_file(r->key_file, err))
        return NULL;
    snprintf(s.key_file, sizeof(s.key_file), "%s", r->key_file);
    if (lb_schedule_save(d->opt.state_dir, r->name, &s, err))
        return NULL;
    lb_daemon_scan(d);
    return lb_json_dump(schedule_json(r->name, &s));
}

static unsigned count_scheduled(struct daemon *d)
{
    struct session *s;
    unsigned n = 0;

    LIST_FOREACH (s, &d->sessions, link)
        n += is(s, "scheduled");
    return n;
}

void lb_schedule_scan(struct daemon *d, const struct lb_vm_entry *e)
{
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;
    Lb__RpcSchedule m = LB__RPC_SCHEDULE__INIT;
    struct lb_error err = LB_ERROR_INIT;
    struct lb_ckpt_schedule s;
    uint64_t now = lb_wall_ms();

    /* One that is damaged is shown by status, and fails when it is set again. */
    if (lb_schedule_load(d->opt.state_dir, e->name, &s, NULL) || now < lb_schedule_next_ms(&s, now) ||
        lb_session_of_vm(d, e->name) || lb_protect_wanted(d, e->name) || lb_batch_suspends(d) ||
        lb_vm_is_locked(d->opt.state_dir, e->name) || count_scheduled(d) >= MAX_SCHEDULED)
        return;
    m.name = (char *)e->name;
    r.kind_case = LB__RPC_REQUEST__KIND_SCHEDULE;
    r.schedule = &m;
    if (!lb_session_spawn_for(d, "scheduled", e->name, "", &r, &err))
        lb_log_error(LB_LOG_ERROR, &err);
}

/* How it went: the next one is later after a failure. */
static void scheduled_ended(struct session *s)
{
    struct lb_error err = LB_ERROR_INIT;
    struct lb_ckpt_schedule w;
    json_t *o = s->result ? json_loads(s->result, 0, NULL) : NULL;
    const char *pruned = json_string_value(json_object_get(o, "prune_error"));
    bool bad = s->error.code && s->error.code != LB_E_CANCELLED;

    if (!lb_schedule_load(s->d->opt.state_dir, s->vm, &w, NULL)) {
        w.last_ms = s->begun_ms; /* so that its own time does not add up */
        w.failures = bad ? w.failures + 1 : 0;
        snprintf(w.error, sizeof(w.error), "%.255s", bad ? s->error.message : pruned ? pruned : "");
        if (lb_schedule_save(s->d->opt.state_dir, s->vm, &w, &err))
            lb_log_error(LB_LOG_ERROR, &err);
    }
    json_decref(o);
}

/* ----------------------------------------------------------- what becomes of sessions */

void lb_fill_scan(struct daemon *d, const struct lb_vm_entry *e)
{
    Lb__RpcRequest none = LB__RPC_REQUEST__INIT;
    struct lb_error err = LB_ERROR_INIT;
    bool alive = lb_proc_alive(&e->proc);

    if (!lb_recover_due(d, e->name))
        return;
    if (!lb_session_spawn_for(d, alive ? "fill" : "recover", e->name, "", &none, &err))
        lb_log_error(LB_LOG_ERROR, &err);
}

static void tell_filling(struct session *s)
{
    json_t *o = json_object();

    json_object_set_new(o, "vm", lb_json_text(s->vm));
    json_object_set_new(o, "resumed", json_true());
    json_object_set_new(o, "filling", json_true());
    LB_AUTO_FREE char *json = lb_json_dump(o);
    lb_clients_running(s, json);
}

void lb_ckpt_event(struct session *s, const char *kind, const json_t *o, const char *text)
{
    const char *state = json_string_value(json_object_get(o, "state"));
    LB_AUTO_FREE char *result = json_dumps(json_object_get(o, "result"), JSON_COMPACT | JSON_REAL_PRECISION(12));

    if (result && !strcmp(kind, "running"))
        lb_clients_running(s, result);
    /* One that was taken up again: the key is right, and who brought it need not wait for the rest. */
    if (is(s, "fill") && state && !strcmp(state, lb_ckpt_phase_name(LB_CKPT_FILLING)))
        tell_filling(s);
    lb_batch_event(s, kind, o, text);
}

void lb_ckpt_ended(struct session *s)
{
    if (is(s, "scheduled"))
        scheduled_ended(s);
    lb_batch_ended(s);
}

/* ------------------------------------------------------------------ ls, status, show */

static json_t *suspended_json(struct daemon *d, const struct lb_vm_entry *e)
{
    struct lb_ckpt_host h;
    struct stat st = {0};
    json_t *o = json_object();

    json_object_set_new(o, "ref", lb_json_text(e->checkpoint));
    json_object_set_new(o, "since_ms", json_integer((json_int_t)e->changed_ms));
    if (!lb_ckpt_host_open(&h, d->opt.state_dir, d->opt.config_path, NULL)) {
        LB_AUTO_FREE char *path = lb_catalog_suspend_path(h.catalog_dir, e->name);

        stat(path, &st);
        json_object_set_new(o, "path", lb_json_text(path));
        json_object_set_new(o, "file_bytes", json_integer((json_int_t)st.st_size));
        lb_ckpt_host_close(&h);
    }
    return o;
}

static json_t *fill_json(struct daemon *d, const struct lb_vm_entry *e)
{
    struct session *s = lb_session_of_vm(d, e->name);
    json_t *o = json_object(), *p = s && s->progress ? json_loads(s->progress, 0, NULL) : NULL;
    json_t *percent = json_object_get(p, "percent");

    json_object_set(o, "percent", percent ? percent : json_null());
    json_object_set_new(o, "problem", lb_json_text(s ? "" : lb_fill_problem(d, e->name)));
    json_decref(p);
    return o;
}

void lb_ckpt_add_json(struct daemon *d, const struct lb_vm_entry *e, json_t *o)
{
    struct lb_error why = LB_ERROR_INIT;
    struct lb_ckpt_schedule s;

    json_object_set_new(o, "checkpoint", lb_json_text(e->checkpoint));
    if (e->state == LB_VM_SUSPENDED)
        json_object_set_new(o, "suspended", suspended_json(d, e));
    if (e->state == LB_VM_FILLING)
        json_object_set_new(o, "fill", fill_json(d, e));
    if (!lb_schedule_load(d->opt.state_dir, e->name, &s, &why)) {
        json_object_set_new(o, "schedule", schedule_json(e->name, &s));
    } else if (why.code != LB_E_NOT_FOUND) {
        memset(&s, 0, sizeof(s));
        snprintf(s.error, sizeof(s.error), "%.255s", why.message);
        json_object_set_new(o, "schedule", schedule_json(e->name, &s));
    }
}
