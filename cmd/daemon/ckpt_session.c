/*
 * cmd/daemon/ckpt_session.c - taking, restoring, filling, cloning: the work of a session process.
 *
 * The engines are checkpoint/'s. Here: the VM's lock, the key, this host's configuration, what is told on the
 * way, the result as JSON and a line of the history. The shapes are written down in checkpoint.c.
 */
#include "cmd/daemon/ckpt.h"
#include "cmd/daemon/session.h"

#include <string.h>

#include "core/qemu/qemu.h"

#define LOCK_WAIT_MS 3000u

/* What every kind of work here begins with and ends with. */
struct work {
    struct sess *s;
    struct lb_ckpt_host host;
    struct lb_ckpt_key *key;
    uint64_t started_ms; /* wall clock */
    int lock;
};

static void put_int(json_t *o, const char *key, uint64_t v)
{
    json_object_set_new(o, key, json_integer((json_int_t)v));
}

static void on_report(const struct lb_ckpt_progress *p, void *arg)
{
    struct sess *s = arg;
    json_t *o = json_object();

    json_object_set_new(o, "event", json_string("progress"));
    json_object_set_new(o, "vm", lb_json_text(lb_sess_vm(s)));
    json_object_set_new(o, "what", json_string(p->what ? p->what : ""));
    json_object_set_new(o, "phase", json_string(lb_ckpt_phase_name(p->phase)));
    json_object_set_new(o, "state", json_string(lb_ckpt_phase_name(p->phase)));
    json_object_set_new(o, "percent", lb_ckpt_real(p->percent));
    put_int(o, "done_bytes", p->done_bytes);
    put_int(o, "total_bytes", p->total_bytes);
    put_int(o, "file_bytes", p->file_bytes);
    json_object_set_new(o, "bytes_per_s", lb_ckpt_real(p->bytes_per_s));
    json_object_set_new(o, "eta_s", lb_ckpt_real(p->eta_s));
    json_object_set_new(o, "note", lb_json_text(p->note));
    lb_sess_progress(s, lb_json_dump(o));
}

static int work_open(struct work *w, struct sess *s, struct lb_error *err)
{
    const Lb__SessionStart *m = lb_sess_start(s);

    *w = (struct work){.s = s, .started_ms = lb_wall_ms(), .lock = -1};
    lb_sess_open_log(s);
    if (lb_ckpt_host_open(&w->host, m->state_dir, m->config_path, err))
        return -1;
    w->host.env.cancel_fd = lb_sess_cancel_fd(s);
    w->host.env.report = on_report;
    w->host.env.arg = s;
    return 0;
}

static void work_close(struct work *w)
{
    lb_ckpt_key_free(w->key);
    lb_ckpt_host_close(&w->host);
    lb_cleanup_fd(&w->lock);
}

/* The lock, and the entry as it is then. */
static int lock_vm(struct work *w, struct lb_vm_entry *e, struct lb_error *err)
{
    const char *dir = w->host.env.state_dir, *vm = lb_sess_vm(w->s);

    w->lock = lb_vm_lock_patiently(dir, vm, LOCK_WAIT_MS, err);
    if (w->lock < 0)
        return -1;
    if (lb_vm_entry_load(dir, vm, e, err)) {
        lb_vm_entry_remove(dir, vm, NULL); /* the lock made its directory */
        return -1;
    }
    return 0;
}

/* ------------------------------------------------------------------------- history */

/* Takes o, which says what is special of it. */
static void history(const struct work *w, json_t *o, const char *vm, const char *direction, int rc,
                    const struct lb_error *err)
{
    LB_AUTO_FREE char *path = lb_asprintf("%s/history.jsonl", w->host.env.state_dir);
    struct lb_error why = LB_ERROR_INIT;
    json_t *e;

    json_object_set_new(o, "vm", lb_json_text(vm));
    json_object_set_new(o, "host", json_string(""));
    json_object_set_new(o, "direction", json_string(direction));
    put_int(o, "started_ms", w->started_ms);
    json_object_set_new(o, "ok", json_boolean(!rc));
    if (rc) {
        e = json_object();
        json_object_set_new(e, "code", json_string(lb_errcode_name(err->code)));
        json_object_set_new(e, "message", lb_json_text(err->message));
        json_object_set_new(e, "remedy", lb_json_text(err->remedy));
        json_object_set_new(o, "error", e);
    }
    LB_AUTO_FREE char *line = lb_json_dump(o);
    if (lb_file_append_line(path, line, &why))
        lb_log_error(LB_LOG_WARN, &why);
}

/* -------------------------------------------------------------------------- taking */

static json_t *take_json(const struct work *w, const struct lb_take_result *r)
{
    json_t *o = json_object();
    struct lb_ckpt_info info = {0};
    struct lb_ckpt_entry e = {0};
    bool known = !lb_ckpt_info(r->path, w->key, &info, NULL);

    /* What the file says of itself, in the words of the catalog. */
    if (known) {
        snprintf(e.vm, sizeof(e.vm), "%s", lb_sess_vm(w->s));
        e.info = info;
        e.number = info.meta.number;
        e.readable = true;
        json_decref(o);
        o = lb_ckpt_entry_json(&e);
        json_object_del(o, "depth");
        json_object_del(o, "readable");
        json_object_del(o, "error");
        json_object_del(o, "remedy");
    }
    json_object_set_new(o, "vm", lb_json_text(lb_sess_vm(w->s)));
    json_object_set_new(o, "ref", lb_json_text(r->ref));
    json_object_set_new(o, "path", lb_json_text(r->path));
    lb_ckpt_stats_json(o, &r->stats);
    if (known) /* of the whole file, with what was written last */
        put_int(o, "file_bytes", info.file_bytes);
    put_int(o, "rounds", r->rounds);
    put_int(o, "disks", r->disks);
    json_object_set_new(o, "pause_ms", lb_ckpt_real(r->pause_ms));
    json_object_set_new(o, "total_ms", lb_ckpt_real(r->total_ms));
    lb_ckpt_info_free(&info);
    return o;
}

/* What to take: of a request, or of the schedule. */
static int take_opts(struct work *w, struct lb_take_opts *o, unsigned *keep, struct lb_error *err)
{
    const Lb__SessionStart *m = lb_sess_start(w->s);
    const Lb__RpcRequest *r = m->request;
    struct lb_ckpt_schedule sched;

    *o = (struct lb_take_opts){.zstd_level = w->host.cfg.checkpoint_level};
    *keep = 0;
    if (r && r->kind_case == LB__RPC_REQUEST__KIND_SCHEDULE) {
        if (lb_schedule_load(m->state_dir, m->vm, &sched, err))
            return -1;
        o->no_disk = sched.no_disk;
        *keep = sched.keep;
        return lb_ckpt_key_for(&w->host, NULL, sched.key_file[0] ? sched.key_file : NULL, true, &w->key, err);
    }
    if (!r || r->kind_case != LB__RPC_REQUEST__KIND_CHECKPOINT)
        return lb_fail(err, LB_E_USAGE, "the session was not told what to take");
    o->suspend = r->checkpoint->suspend;
    snprintf(o->label, sizeof(o->label), "%.127s", r->checkpoint->label);
    o->no_disk = r->checkpoint->no_disk;
    o->full = r->checkpoint->full;
    if (r->checkpoint->zstd_level)
        o->zstd_level = r->checkpoint->zstd_level;
    o->bandwidth_bytes_per_s = r->checkpoint->bandwidth_bytes_per_s;
    return 0;
}

/* After a scheduled one: the oldest go. A failure of this is no failure of the checkpoint. */
static void prune_to(struct work *w, unsigned keep, json_t *o)
{
    const char *vm = lb_sess_vm(w->s);
    struct lb_error err = LB_ERROR_INIT;
    struct lb_prune_result res = {0};
    LB_AUTO_FREE uint32_t *v = NULL;
    unsigned n = 0;

    if (!lb_catalog_prunable(w->host.catalog_dir, vm, w->key, keep, 0, false, &v, &n, &err) && n)
        lb_ckpt_remove(&w->host, w->s, vm, true, v, n, w->key, NULL, NULL, &res, &err);
    put_int(o, "removed", res.removed);
    if (!err.code)
        return;
    lb_log_error(LB_LOG_WARN, &err);
    json_object_set_new(o, "prune_error", lb_json_text(err.message));
}

/* Locked, and *keep known. */
static int take(struct work *w, const struct lb_vm_entry *e, struct lb_take_opts *opts, unsigned keep, char **json,
                struct lb_error *err)
{
    Lb__RpcKey *k = lb_ckpt_key_of(lb_sess_start(w->s)->request);
    LB_AUTO_FREE char *key_file = lb_strdup(k && k->key_file[0] ? k->key_file : "");
    struct lb_take_result res = {0};
    json_t *o;
    int rc;

    if (!w->key && lb_ckpt_key_for(&w->host, k, NULL, true, &w->key, err))
        return -1;
    opts->key = w->key;
    /* Before: once it is suspended nothing may be missing. */
    if (opts->suspend)
        lb_ckpt_remember_key(w->host.env.state_dir, e->name, key_file);
    rc = lb_ckpt_take(&w->host.env, e, opts, &res, err);
    if (opts->suspend) {
        json_t *line = json_object();

        json_object_set_new(line, "total_ms", lb_ckpt_real(res.total_ms));
        put_int(line, "file_bytes", res.stats.file_bytes);
        history(w, line, e->name, "suspend", rc, err);
    }
    if (rc)
        return -1;
    o = take_json(w, &res);
    if (keep)
        prune_to(w, keep, o);
    *json = lb_json_dump(o);
    return 0;
}

int lb_work_checkpoint(struct sess *s, char **json, struct lb_error *err)
{
    struct lb_take_opts opts;
    struct lb_vm_entry e;
    struct work w;
    unsigned keep;
    int rc = -1;

    if (!work_open(&w, s, err) && !take_opts(&w, &opts, &keep, err) && !lock_vm(&w, &e, err)) {
        if (e.state == LB_VM_RUNNING)
            rc = take(&w, &e, &opts, keep, json, err);
        else
            lb_fail(err, LB_E_STATE, "VM %s is %s", e.name, lb_vm_state_name(e.state));
    }
    work_close(&w);
    return rc;
}

/* ----------------------------------------------------------------------- restoring */

static json_t *restore_json(const struct lb_restore_result *r, const char *ref, bool resumed)
{
    json_t *o = json_object();

    json_object_set_new(o, "vm", lb_json_text(r->vm));
    json_object_set_new(o, "ref", lb_json_text(ref));
    json_object_set_new(o, "resumed", json_boolean(resumed));
    json_object_set_new(o, "filling", json_boolean(r->filling));
    json_object_set_new(o, "running_ms", lb_ckpt_real(r->running_ms));
    json_object_set_new(o, "total_ms", lb_ckpt_real(r->total_ms));
    put_int(o, "ram_bytes", r->ram_bytes);
    put_int(o, "placed_bytes", r->placed_bytes);
    return o;
}

/* This host's maps are for what comes from elsewhere; a VM that was suspended here knows its files. */
static void set_launch(struct lb_ckpt_host *h, const struct lb_ckpt_entry *ck)
{
    const char *was = ck->readable ? ck->info.meta.desc.emulator : NULL, *is = was;

    h->launch = (struct lb_launch_opts){.paths = h->cfg.paths, .n_paths = h->cfg.n_paths,
                                        .taps = h->cfg.taps, .n_taps = h->cfg.n_taps};
    if (was)
        is = lb_map_name(h->cfg.emulators, h->cfg.n_emulators, was);
    h->launch.emulator = is == was ? NULL : is;
}

/* The checkpoint (ref: its name), and which VM it will be; the key. */
static int restore_find(struct work *w, const Lb__RpcRestore *m, char ref[160], struct lb_error *err)
{
    const char *dir = w->host.env.state_dir;
    LB_AUTO_FREE char *remembered = m->resume ? lb_ckpt_remembered_key(dir, m->ref) : NULL;
    LB_AUTO_FREE char *asked = m->resume ? lb_asprintf("%s@suspend", m->ref) : lb_strdup(m->ref);
    struct lb_ckpt_entry ck = {0};
    const char *vm;
    int rc = -1;

    if (lb_ckpt_key_for(&w->host, m->key, remembered, false, &w->key, err) ||
        lb_catalog_find(w->host.catalog_dir, asked, w->key, &ck, err))
        return -1;
    snprintf(ref, 160, "%s", ck.ref);
    vm = m->as[0] ? m->as : ck.vm;
    if (!ck.readable) {
        if (err)
            *err = ck.error;
    } else if (!lb_vm_name_valid(vm)) {
        lb_fail(err, LB_E_USAGE, "\"%.80s\" is not a valid VM name", vm);
        lb_remedy(err, "give the VM another name with --as");
    } else {
        lb_sess_set_vm(w->s, vm);
        if (!m->resume)
            set_launch(&w->host, &ck);
        rc = 0;
    }
    lb_ckpt_entry_free(&ck);
    return rc;
}

static int restore_lock(struct work *w, bool resume, struct lb_error *err)
{
    const char *dir = w->host.env.state_dir, *vm = lb_sess_vm(w->s);
    struct lb_vm_entry e;

    if (resume)
        return lock_vm(w, &e, err);
    w->lock = lb_vm_lock_patiently(dir, vm, LOCK_WAIT_MS, err);
    return w->lock < 0 ? -1 : 0;
}

/* The directory that the lock made, when no VM came of it. */
static void restore_undo(struct work *w)
{
    struct lb_vm_entry e;

    if (lb_vm_entry_load(w->host.env.state_dir, lb_sess_vm(w->s), &e, NULL))
        lb_vm_entry_remove(w->host.env.state_dir, lb_sess_vm(w->s), NULL);
}

static void tell_running(struct sess *s, const struct lb_restore_result *res, const char *ref, bool resumed)
{
    json_t *o = json_object();

    json_object_set_new(o, "event", json_string("running"));
    json_object_set_new(o, "vm", lb_json_text(res->vm));
    json_object_set_new(o, "result", restore_json(res, ref, resumed));
    lb_sess_running(s, lb_json_dump(o)); /* before anything is said in the new role */
    lb_sess_set_role(s, "fill");
}

/* Locked. */
static int restore(struct work *w, const Lb__RpcRestore *m, const char *ref, char **json, struct lb_error *err)
{
    /* What is named by its path need not be where its name says. */
    const char *which = strchr(m->ref, '/') ? m->ref : ref;
    LB_AUTO_FREE struct lb_path_map *taps = lb_alloc(sizeof(*taps) * (m->n_taps + 1));
    const char *dir = w->host.env.state_dir, *vm = lb_sess_vm(w->s);
    LB_AUTO_FREE char *before = lb_ckpt_remembered_key(dir, vm);
    uint64_t began_ns = lb_now_ns();
    struct lb_restore_opts opts = {.eager = m->eager, .force = m->force, .paused = m->paused, .key = w->key,
                                   .taps = taps, .n_taps = (unsigned)m->n_taps};
    struct lb_restore_result res = {0};
    struct lb_fill *fill = NULL;
    json_t *line;
    int rc;

    for (size_t i = 0; i < m->n_taps; i++)
        taps[i] = (struct lb_path_map){m->taps[i]->from, m->taps[i]->to};
    snprintf(opts.as, sizeof(opts.as), "%s", m->as);
    if (m->key && m->key->key_file[0])
        lb_ckpt_remember_key(dir, vm, m->key->key_file);
    rc = lb_ckpt_restore(&w->host.env, which, &opts, &fill, &res, err);
    line = rc ? json_object() : restore_json(&res, ref, m->resume);
    history(w, line, vm, m->resume ? "resume" : "restore", rc, err);
    if (rc) {
        lb_ckpt_remember_key(dir, vm, before ? before : "");
        return -1;
    }
    if (res.filling) {
        tell_running(w->s, &res, ref, m->resume);
        if (lb_ckpt_fill(fill, err))
            return -1;
        res.filling = false;
        res.placed_bytes = res.ram_bytes;
        res.total_ms = (double)(lb_now_ns() - began_ns) / 1e6;
    }
    lb_ckpt_remember_key(dir, vm, "");
    *json = lb_json_dump(restore_json(&res, ref, m->resume));
    return 0;
}

int lb_work_restore(struct sess *s, char **json, struct lb_error *err)
{
    const Lb__RpcRequest *r = lb_sess_start(s)->request;
    char ref[160];
    struct work w;
    int rc = -1;

    if (!r || r->kind_case != LB__RPC_REQUEST__KIND_RESTORE)
        return lb_fail(err, LB_E_USAGE, "the session was not told what to restore");
    if (!work_open(&w, s, err) && !restore_find(&w, r->restore, ref, err) &&
        !restore_lock(&w, r->restore->resume, err)) {
        rc = restore(&w, r->restore, ref, json, err);
        if (rc)
            restore_undo(&w);
    }
    work_close(&w);
    return rc;
}

/* ------------------------------------------------------------------- filling again */

int lb_work_fill(struct sess *s, char **json, struct lb_error *err)
{
    const Lb__SessionStart *m = lb_sess_start(s);
    LB_AUTO_FREE char *remembered = lb_ckpt_remembered_key(m->state_dir, m->vm);
    struct lb_vm_entry e;
    struct work w;
    json_t *o;
    int rc = -1;

    if (!work_open(&w, s, err) && !lock_vm(&w, &e, err) &&
        !lb_ckpt_key_for(&w.host, lb_ckpt_key_of(m->request), remembered, false, &w.key, err))
        rc = e.state == LB_VM_FILLING ? lb_ckpt_refill(&w.host.env, &e, w.key, err) : 0;
    if (!rc) {
        lb_ckpt_remember_key(m->state_dir, m->vm, "");
        o = json_object();
        json_object_set_new(o, "vm", lb_json_text(m->vm));
        json_object_set_new(o, "filling", json_false());
        *json = lb_json_dump(o);
    }
    work_close(&w);
    return rc;
}

/* ------------------------------------------------------------------------- cloning */

static char *clones_json(const struct work *w, const char *ref, const struct lb_clone_result *res)
{
    json_t *o = json_object(), *list = json_array(), *one;

    for (unsigned i = 0; i < res->n; i++) {
        one = json_object();
        json_object_set_new(one, "name", lb_json_text(res->names[i]));
        json_object_set_new(one, "running_ms", lb_ckpt_real(res->running_ms[i]));
        json_array_append_new(list, one);
        one = json_copy(one);
        json_object_set_new(one, "ref", lb_json_text(ref));
        history(w, one, res->names[i], "clone", 0, NULL);
    }
    json_object_set_new(o, "ref", lb_json_text(ref));
    json_object_set_new(o, "clones", list);
    return lb_json_dump(o);
}

static int clone_opts(const Lb__RpcClone *m, struct lb_ckpt_key *key, struct lb_clone_opts *o, struct lb_error *err)
{
    *o = (struct lb_clone_opts){.count = m->count, .key = key};
    if (strlen(m->name) >= sizeof(o->name) || strlen(m->tap) >= sizeof(o->tap))
        return lb_fail(err, LB_E_USAGE, "the name of clones has at most %zu characters, that of taps %zu",
                       sizeof(o->name) - 1, sizeof(o->tap) - 1);
    snprintf(o->name, sizeof(o->name), "%s", m->name);
    snprintf(o->tap, sizeof(o->tap), "%s", m->tap);
    return 0;
}

int lb_work_clone(struct sess *s, char **json, struct lb_error *err)
{
    const Lb__RpcRequest *r = lb_sess_start(s)->request;
    struct lb_clone_result res = {0};
    struct lb_ckpt_entry ck = {0};
    struct lb_clone_opts opts;
    struct work w;
    int rc = -1;

    if (!r || r->kind_case != LB__RPC_REQUEST__KIND_CLONE)
        return lb_fail(err, LB_E_USAGE, "the session was not told what to clone");
    if (!work_open(&w, s, err) && !lb_ckpt_key_for(&w.host, r->clone->key, NULL, false, &w.key, err) &&
        !clone_opts(r->clone, w.key, &opts, err) &&
        !lb_catalog_find(w.host.catalog_dir, r->clone->ref, w.key, &ck, err)) {
        set_launch(&w.host, &ck);
        rc = lb_ckpt_clone(&w.host.env, r->clone->ref, &opts, &res, err);
        *json = clones_json(&w, ck.ref, &res);
        lb_ckpt_entry_free(&ck);
    }
    free(res.names);
    free(res.running_ms);
    work_close(&w);
    return rc;
}
