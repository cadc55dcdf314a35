/*
 * cmd/daemon/ops_vm.c - requests about one VM, in a worker process: they may wait for
 * a hypervisor.
 *
 * Every operation that talks to a VM holds its lock, so that it never meets a session on
 * the VM's one control socket.
 */
#include "cmd/daemon/ckpt.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/un.h>

#include "core/host.h"
#include "core/hv.h"
#include "core/qemu/qemu.h"
#include "remus/remus.h"

#define START_TIMEOUT_NS UINT64_C(30000000000)
#define QUIT_TIMEOUT_NS UINT64_C(15000000000)
#define LOCK_WAIT_MS 3000u
#define RECOVER_LOCK_WAIT_MS 20000u

/* Lock an existing VM and read its entry. */
static int take(struct daemon *d, const char *name, struct lb_vm_entry *e, struct lb_error *err)
{
    if (lb_vm_entry_load(d->opt.state_dir, name, e, err))
        return -1;
    /* Waiting helps against a query, or a session that is about to end, not against long work. */
    struct session *s = lb_session_of_vm(d, name);
    bool longer = lb_session_blocks(s, e) && strcmp(s->role, "recover");
    int lock = lb_vm_lock_patiently(d->opt.state_dir, name, longer ? 0 : LOCK_WAIT_MS, err);
    if (lock >= 0 && lb_vm_entry_load(d->opt.state_dir, name, e, err)) {
        /* removed while we waited: the lock made its directory anew */
        lb_vm_entry_remove(d->opt.state_dir, name, NULL);
        close(lock);
        return -1;
    }
    return lock;
}

static struct lb_vm_ident ident_of(const struct lb_vm_entry *e)
{
    return (struct lb_vm_ident){.name = e->name, .proc = e->proc,
                                .qmp_path = e->qmp_path[0] ? e->qmp_path : NULL};
}

/* ------------------------------------------------------------------ run, adopt */

/* What was wanted of an earlier VM is not wanted of a new one. */
static void forget_wishes(struct daemon *d, const char *name)
{
    lb_wish_remove(d->opt.state_dir, name, NULL);
    lb_schedule_remove(d->opt.state_dir, name, NULL);
}

static bool serves(int fd, pid_t pid)
{
    struct ucred cred;
    socklen_t len = sizeof(cred);

    return getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &cred, &len) == 0 && cred.pid == pid;
}

/* The name is free (a dead VM's is): take its lock. adopted: the process that is to have the name, 0 for a new one;
 * one that was released keeps its control socket under its old name, and may have that again. */
static int reserve(struct daemon *d, const char *name, pid_t adopted, struct lb_error *err)
{
    struct lb_error why = LB_ERROR_INIT;
    struct lb_vm_entry e;
    LB_AUTO_FD int lock = lb_vm_lock_patiently(d->opt.state_dir, name, LOCK_WAIT_MS, err);

    if (lock < 0)
        return -1;
    LB_AUTO_FREE char *qmp = lb_vm_qmp_path(d->opt.state_dir, name);
    if (lb_vm_entry_load(d->opt.state_dir, name, &e, &why)) {
        LB_AUTO_FD int other = -1;

        if (why.code != LB_E_NOT_FOUND) {
            if (err)
                *err = why;
            return -1;
        }
        other = lb_unix_connect(qmp, &why);
        if ((other >= 0 && !(adopted && serves(other, adopted))) || why.sys_errno == EAGAIN) { /* EAGAIN: there, and busy */
            lb_fail(err, LB_E_EXISTS, "a released VM still runs in the directory of %s", name);
            return lb_remedy(err, "`lifeboat adopt %s --pid` with its process, or choose another name", name);
        }
        forget_wishes(d, name);
        return LB_STEAL_FD(lock);
    }
    if (e.state == LB_VM_SUSPENDED) {
        lb_fail(err, LB_E_EXISTS, "there is a VM named %s already (suspended)", name);
        return lb_remedy(err, "choose another name; `lifeboat resume %s` brings it back", name);
    }
    if (e.state != LB_VM_DEAD && (e.state != LB_VM_RUNNING || lb_proc_alive(&e.proc))) {
        lb_fail(err, LB_E_EXISTS, "there is a VM named %s already (%s)", name,
                lb_vm_state_name(e.state));
        return lb_remedy(err, "choose another name, or `lifeboat stop %s` / `lifeboat release %s` it",
                         name, name);
    }
    forget_wishes(d, name);
    return LB_STEAL_FD(lock);
}

static bool is_option(const char *arg, const char *name)
{
    return arg[0] == '-' && !strcmp(arg + (arg[1] == '-' ? 2 : 1), name);
}

/* The command line with our own monitor, without what would take the process from us. */
static char **vm_argv(const Lb__RpcRun *r, const char *qmp_path, json_t *warnings)
{
    char **argv = lb_alloc(sizeof(char *) * (r->n_argv + 5));
    unsigned n = 0;

    for (size_t i = 0; i < r->n_argv; i++) {
        if (i > 0 && is_option(r->argv[i], "daemonize")) {
            json_array_append_new(warnings,
                                  json_string("-daemonize was left out: Lifeboat detaches the VM "
                                              "itself"));
            continue;
        }
        argv[n++] = lb_strdup(r->argv[i]);
    }
    /* a comma in a value is written twice */
    LB_AUTO_FREE char *path = lb_alloc(2 * strlen(qmp_path) + 1);
    char *to = path;
    for (const char *p = qmp_path; *p; p++) {
        *to++ = *p;
        if (*p == ',')
            *to++ = ',';
    }
    /* "lb-": known as ours (core/qemu), so that it does not travel with the VM */
    argv[n++] = lb_strdup("-chardev");
    argv[n++] = lb_asprintf("socket,id=lb-qmp,server=on,wait=off,path=%s", path);
    argv[n++] = lb_strdup("-mon");
    argv[n] = lb_strdup("chardev=lb-qmp,mode=control");
    return argv;
}

static char *entry_result(const struct lb_vm_entry *e, json_t *warnings, json_t *damages)
{
    json_t *o = lb_entry_to_json(e);

    if (json_array_size(warnings))
        json_object_set(o, "warnings", warnings);
    if (json_array_size(damages))
        json_object_set(o, "damages", damages);
    return lb_json_dump(o);
}

static int start_vm(struct daemon *d, struct lb_vm_entry *e, const Lb__RpcRun *r, const char *log, json_t *warnings,
                    struct lb_error *err)
{
    char **argv = vm_argv(r, e->qmp_path, warnings);
    int rc = lb_vm_newest_images(d, e->name, r->cwd, &argv, warnings, err) ||
             lb_vm_start(argv, r->cwd, log, &e->proc, err);

    lb_strv_free(argv);
    if (rc)
        return -1;
    if (!lb_qmp_wait_greeting(e->qmp_path, &e->proc, lb_now_ns() + START_TIMEOUT_NS, err))
        return 0;
    lb_proc_kill(&e->proc, 5000, NULL);
    LB_AUTO_FREE char *tail = lb_log_tail(log, 350);
    if (err) {
        struct lb_error first = *err;

        lb_fail(err, first.code, "VM %s: %.120s: %s", e->name, first.message, tail);
        lb_remedy(err, "correct the hypervisor's options after `--`, or try the command by hand");
    }
    return -1;
}

static char *op_run(struct daemon *d, const Lb__RpcRun *r, struct lb_error *err)
{
    struct lb_vm_entry e = {.hypervisor = "qemu", .origin = "run", .state = LB_VM_RUNNING};
    LB_AUTO_FREE char *dir = lb_vm_dir(d->opt.state_dir, r->name, false);
    LB_AUTO_FREE char *qmp = lb_vm_qmp_path(d->opt.state_dir, r->name);
    LB_AUTO_FREE char *log = lb_asprintf("%s/qemu.log", dir);
    json_t *warnings;
    char *json = NULL;

    if (!r->n_argv || !r->argv[0][0]) {
        lb_fail(err, LB_E_USAGE, "there is no command to run");
        lb_remedy(err, "lifeboat run NAME -- qemu-system-x86_64 OPTIONS...");
        return NULL;
    }
    if (strlen(qmp) >= sizeof(((struct sockaddr_un *)0)->sun_path)) {
        lb_fail(err, LB_E_USAGE, "the path %.200s is too long for a socket", qmp);
        lb_remedy(err, "use a shorter VM name or a shorter --state-dir");
        return NULL;
    }
    LB_AUTO_FD int lock = reserve(d, r->name, 0, err);
    if (lock < 0)
        return NULL;
    snprintf(e.name, sizeof(e.name), "%s", r->name);
    snprintf(e.qmp_path, sizeof(e.qmp_path), "%s", qmp);
    e.created_ms = lb_wall_ms();
    unlink(qmp);
    warnings = json_array();
    if (!start_vm(d, &e, r, log, warnings, err)) {
        if (!lb_vm_entry_save(d->opt.state_dir, &e, err))
            json = entry_result(&e, warnings, NULL);
        else
            lb_proc_kill(&e.proc, 5000, NULL);
    }
    if (!json) {
        struct lb_vm_entry old;

        /* A dead VM whose name we tried to reuse stays listed. */
        unlink(qmp);
        if (lb_vm_entry_load(d->opt.state_dir, r->name, &old, NULL)) {
            unlink(log);
            lb_vm_entry_remove(d->opt.state_dir, r->name, NULL);
        }
    }
    json_decref(warnings);
    return json;
}

static int check_not_registered(struct daemon *d, const struct lb_proc_id *p, struct lb_error *err)
{
    LB_AUTO_FREE struct lb_vm_entry *v = NULL;
    unsigned n = 0;

    if (lb_vm_entry_list(d->opt.state_dir, &v, &n, err))
        return -1;
    for (unsigned i = 0; i < n; i++)
        if (v[i].proc.pid == p->pid && v[i].proc.start_ticks == p->start_ticks) {
            lb_fail(err, LB_E_EXISTS, "process %d is VM %s already", (int)p->pid, v[i].name);
            return lb_remedy(err, "`lifeboat status %s`", v[i].name);
        }
    return 0;
}

/* It would be gone when `suspend --all` comes to it. */
static void warn_unit(const struct lb_vm_entry *e, json_t *damages)
{
    static const char *const suspends = "lifeboat-suspend.service";
    char *its;

    if (!lb_host_stops_early(e->proc.pid, suspends, &its))
        return;
    LB_AUTO_FREE char *text = lb_asprintf("its process belongs to %s, which systemd may stop before %s has suspended the VM "
                                          "when this host goes down: give that unit `Before=%s`", its, suspends, suspends);
    json_array_append_new(damages, lb_json_text(text));
    free(its);
}

static char *op_adopt(struct daemon *d, const Lb__RpcAdopt *r, struct lb_error *err)
{
    struct lb_vm_entry e = {.hypervisor = "qemu", .origin = "adopted", .state = LB_VM_RUNNING};
    struct lb_vm_desc desc = {0};
    struct lb_vm_ident id, real;
    struct lb_hv_vm *vm = NULL;
    char *json = NULL;

    LB_AUTO_FD int lock = reserve(d, r->name, r->pid, err);
    if (lock < 0)
        return NULL;
    if (lb_proc_identify(r->pid, &e.proc, err)) {
        lb_remedy(err, "give the process number of the running hypervisor (`pgrep -a qemu`)");
        goto out;
    }
    if (check_not_registered(d, &e.proc, err))
        goto out;
    snprintf(e.name, sizeof(e.name), "%s", r->name);
    e.created_ms = lb_wall_ms();
    id = (struct lb_vm_ident){.name = e.name, .proc = e.proc,
                              .qmp_path = r->qmp[0] ? r->qmp : NULL};
    if (lb_hv_attach(&lb_hv_qemu, &id, &vm, err) || lb_hv_describe(vm, &desc, err))
        goto out;
    lb_hv_ident(vm, &real);
    if (!real.qmp_path || strlen(real.qmp_path) >= sizeof(e.qmp_path)) {
        lb_fail(err, LB_E_USAGE, "the path of the control socket is too long");
        goto out;
    }
    snprintf(e.qmp_path, sizeof(e.qmp_path), "%s", real.qmp_path);
    if (!lb_vm_entry_save(d->opt.state_dir, &e, err)) {
        json_t *warnings = json_array(), *damages = json_array();

        for (char **b = desc.blockers; b && *b; b++)
            json_array_append_new(warnings, lb_json_text(*b));
        lb_vm_warn_images(d, e.name, &desc, damages);
        warn_unit(&e, damages);
        json = entry_result(&e, warnings, damages);
        json_decref(warnings);
        json_decref(damages);
    }
out:
    lb_hv_detach(vm);
    lb_vm_desc_free(&desc);
    if (!json) {
        struct lb_vm_entry old;

        if (lb_vm_entry_load(d->opt.state_dir, r->name, &old, NULL))
            lb_vm_entry_remove(d->opt.state_dir, r->name, NULL);
    }
    return json;
}

/* --------------------------------------------------------------- release, stop */

static int check_undecided(const struct lb_vm_entry *e, const char *what, struct lb_error *err)
{
    if (e->state == LB_VM_RUNNING || e->state == LB_VM_DEAD)
        return 0;
    lb_fail(err, LB_E_STATE, "VM %s is %s: %s could lose it or run it twice", e->name,
            lb_vm_state_name(e->state), what);
    return lb_remedy(err, "`lifeboat recover %s` first", e->name);
}

static char *op_release(struct daemon *d, const Lb__RpcName *r, struct lb_error *err)
{
    struct lb_vm_entry e;
    json_t *o;
    LB_AUTO_FD int lock = -1;

    if (!r->force && (lb_vm_entry_load(d->opt.state_dir, r->name, &e, err) || lb_ckpt_refuse(d, &e, err)))
        return NULL;
    lock = take(d, r->name, &e, err);
    if (lock < 0 || (!r->force && check_undecided(&e, "release", err)))
        return NULL;
    if (e.state == LB_VM_FILLING) { /* nobody would ever give its guest the rest of its memory */
        lb_ckpt_refuse(d, &e, err);
        return NULL;
    }
    o = lb_entry_to_json(&e);
    if (lb_vm_entry_remove(d->opt.state_dir, r->name, err)) {
        json_decref(o);
        return NULL;
    }
    json_object_set_new(o, "released", json_true());
    return lb_json_dump(o);
}

static char *stopped_json(const char *name, bool forced)
{
    json_t *o = json_object();

    json_object_set_new(o, "name", lb_json_text(name));
    json_object_set_new(o, "stopped", json_true());
    json_object_set_new(o, "forced", json_boolean(forced));
    return lb_json_dump(o);
}

/* The file of a suspend whose VM has run since: its disks are not what they were, it is good for nothing. */
static void drop_suspend(struct daemon *d, const struct lb_vm_entry *e)
{
    struct lb_error err = LB_ERROR_INIT;
    struct lb_ckpt_host h;
    char own[160];

    lb_ckpt_number_ref(own, e->name, 0);
    if (strcmp(e->checkpoint, own) || lb_ckpt_host_open(&h, d->opt.state_dir, d->opt.config_path, &err))
        return;
    LB_AUTO_FREE char *path = lb_catalog_suspend_path(h.catalog_dir, e->name);
    if (unlink(path) < 0 && errno != ENOENT)
        lb_log(LB_LOG_WARN, "cannot remove %s: %s", path, strerror(errno));
    lb_ckpt_host_close(&h);
}

/* Its session has the lock and goes when the VM has gone; one that does not see it is ended: it has nothing left
 * to do. */
static char *stop_filling(struct daemon *d, const struct lb_vm_entry *before, struct lb_error *err)
{
    struct session *s = lb_session_of_vm(d, before->name);
    struct lb_proc_id filler = {0};
    struct lb_vm_entry e;

    if (s)
        lb_proc_identify(s->pid, &filler, NULL);
    if (lb_proc_kill(&before->proc, 10000, err))
        return NULL;
    LB_AUTO_FD int lock = lb_vm_lock_patiently(d->opt.state_dir, before->name, LOCK_WAIT_MS, NULL);
    if (lock < 0 && filler.pid && lb_proc_kill(&filler, 10000, err))
        return NULL;
    if (lock < 0)
        lock = lb_vm_lock_patiently(d->opt.state_dir, before->name, RECOVER_LOCK_WAIT_MS, err);
    if (lock < 0)
        return NULL;
    if (!lb_vm_entry_load(d->opt.state_dir, before->name, &e, NULL) && e.proc.pid == before->proc.pid &&
        e.proc.start_ticks == before->proc.start_ticks) {
        drop_suspend(d, &e);
        if (lb_vm_entry_remove(d->opt.state_dir, before->name, err))
            return NULL;
    }
    return stopped_json(before->name, true);
}

static char *op_stop(struct daemon *d, const Lb__RpcName *r, struct lb_error *err)
{
    struct lb_vm_entry e;
    bool forced = r->force;
    LB_AUTO_FD int lock = -1;

    if (lb_vm_entry_load(d->opt.state_dir, r->name, &e, err))
        return NULL;
    if (forced && e.state == LB_VM_FILLING)
        return stop_filling(d, &e, err);
    if (lb_ckpt_refuse(d, &e, err))
        return NULL;
    lock = take(d, r->name, &e, err);
    if (lock < 0 || check_undecided(&e, "stop", err))
        return NULL;
    if (e.state == LB_VM_DEAD || !lb_proc_alive(&e.proc)) {
        lb_fail(err, LB_E_STATE, "VM %s does not run: its process is gone", e.name);
        lb_remedy(err, "`lifeboat release %s` forgets it", e.name);
        return NULL;
    }
    if (forced) {
        if (lb_proc_kill(&e.proc, 10000, err))
            return NULL;
    } else if (lb_qmp_quit(e.qmp_path, &e.proc, lb_now_ns() + QUIT_TIMEOUT_NS, err)) {
        lb_context(err, "VM %s", e.name);
        if (err && !err->remedy[0])
            lb_remedy(err, "`lifeboat stop --force %s` kills it", e.name);
        return NULL;
    }
    if (lb_vm_entry_remove(d->opt.state_dir, r->name, err))
        return NULL;
    return stopped_json(e.name, forced);
}

/* ---------------------------------------------------------------- status, show */

/* How it is protected, and what was asked for. */
static void add_protection(struct daemon *d, const struct lb_vm_entry *e, json_t *o)
{
    json_t *p = lb_protect_json(d, e), *wish;
    LB_AUTO_FREE struct lb_protect_wish *w = lb_alloc(sizeof(*w));

    if (!p)
        return;
    json_object_set_new(o, "protect", p);
    if (lb_wish_load(d->opt.state_dir, e->name, w, NULL))
        return;
    LB_AUTO_FREE char *text = lb_wish_json(w);
    wish = json_loads(text, 0, NULL);
    if (wish)
        json_object_set_new(o, "wish", wish);
}

static char *op_status(struct daemon *d, const Lb__RpcName *r, struct lb_error *err)
{
    struct session *s = lb_session_of_vm(d, r->name);
    struct lb_hv_vm *vm = NULL;
    struct lb_vm_entry e;
    struct lb_vm_ident id;
    struct lb_error why = LB_ERROR_INIT;
    bool alive = false, running = false, known = false;
    json_t *o, *session = lb_session_to_json(s);

    if (lb_vm_entry_load(d->opt.state_dir, r->name, &e, err)) {
        json_decref(session);
        return NULL;
    }
    /* Only a VM that nobody works on is asked: its control socket serves one client. One that waits for its
     * memory may not answer. */
    if (!s && e.proc.pid > 0 && e.state != LB_VM_FILLING && lb_proc_alive(&e.proc)) {
        LB_AUTO_FD int lock = lb_vm_lock_patiently(d->opt.state_dir, r->name, 500, &why);

        id = ident_of(&e);
        if (lock >= 0 && !lb_hv_attach(&lb_hv_qemu, &id, &vm, &why) &&
            !lb_hv_status(vm, &alive, &running, &why))
            known = alive;
        lb_hv_detach(vm);
    }
    o = lb_entry_to_json(&e);
    json_object_set_new(o, "running", known ? json_boolean(running) : json_null());
    json_object_set_new(o, "session", session ? session : json_null());
    add_protection(d, &e, o);
    lb_ckpt_add_json(d, &e, o);
    if (why.code)
        json_object_set_new(o, "problem", lb_json_text(why.message));
    return lb_json_dump(o);
}

static json_t *strings(char *const *v)
{
    json_t *a = json_array();

    for (; v && *v; v++)
        json_array_append_new(a, lb_json_text(*v));
    return a;
}

static json_t *desc_to_json(const struct lb_vm_desc *v)
{
    json_t *o = json_object(), *disks = json_array();

    json_object_set_new(o, "hv_version", lb_json_text(v->hv_version));
    json_object_set_new(o, "emulator", lb_json_text(v->emulator));
    json_object_set_new(o, "argv", strings(v->argv));
    json_object_set_new(o, "cwd", lb_json_text(v->cwd));
    json_object_set_new(o, "uid", json_integer(v->uid));
    json_object_set_new(o, "gid", json_integer(v->gid));
    json_object_set_new(o, "machine", lb_json_text(v->machine));
    json_object_set_new(o, "accel", lb_json_text(v->accel));
    json_object_set_new(o, "cpu_model", lb_json_text(v->cpu_model));
    json_object_set_new(o, "vcpus", json_integer(v->vcpus));
    json_object_set_new(o, "ram_bytes", json_integer((json_int_t)v->ram_bytes));
    json_object_set_new(o, "uuid", lb_json_text(v->uuid));
    for (unsigned i = 0; i < v->n_disks; i++) {
        json_t *k = json_object();

        json_object_set_new(k, "id", lb_json_text(v->disks[i].id));
        json_object_set_new(k, "path", lb_json_text(v->disks[i].path));
        json_object_set_new(k, "format", lb_json_text(v->disks[i].format));
        json_object_set_new(k, "read_only", json_boolean(v->disks[i].read_only));
        json_object_set_new(k, "shareable", json_boolean(v->disks[i].shareable));
        json_array_append_new(disks, k);
    }
    json_object_set_new(o, "disks", disks);
    json_object_set_new(o, "features", strings(v->features));
    json_object_set_new(o, "blockers", strings(v->blockers));
    json_object_set_new(o, "kernel_release", lb_json_text(v->kernel_release));
    return o;
}

static char *op_show(struct daemon *d, const Lb__RpcName *r, struct lb_error *err)
{
    struct session *s = lb_session_of_vm(d, r->name);
    struct lb_vm_desc desc = {0};
    struct lb_hv_vm *vm = NULL;
    struct lb_vm_entry e;
    struct lb_vm_ident id;
    json_t *o, *body = NULL;

    if (lb_vm_entry_load(d->opt.state_dir, r->name, &e, err))
        return NULL;
    /* While a session works on it the registry has to do. */
    if (!s && e.state == LB_VM_RUNNING && lb_proc_alive(&e.proc)) {
        LB_AUTO_FD int lock = take(d, r->name, &e, err);

        id = ident_of(&e);
        if (lock < 0 || lb_hv_attach(&lb_hv_qemu, &id, &vm, err) ||
            lb_hv_describe(vm, &desc, err)) {
            lb_hv_detach(vm);
            return NULL;
        }
        body = desc_to_json(&desc);
        lb_hv_detach(vm);
        lb_vm_desc_free(&desc);
    }
    o = lb_entry_to_json(&e);
    lb_ckpt_add_json(d, &e, o);
    json_object_set_new(o, "description", body ? body : json_null());
    return lb_json_dump(o);
}

/* -------------------------------------------------------------------- recover */

static bool is_checkpoints(enum lb_vm_state s)
{
    return s == LB_VM_CHECKPOINTING || s == LB_VM_SUSPENDED || s == LB_VM_RESTORING || s == LB_VM_FILLING;
}

int lb_recover_here(const char *state_dir, const char *config_path, const char *vm, char text[512],
                    struct lb_error *err)
{
    LB_AUTO_FREE char *throttle = lb_asprintf("%s/throttle", state_dir);
    struct lb_ckpt_host h = {0};
    bool fill_wanted;
    struct lb_session_env env = {.state_dir = state_dir, .hv = &lb_hv_qemu, .cancel_fd = -1,
                                 .config_path = config_path};
    struct lb_identity id;
    struct lb_vm_entry e;
    int rc;

    if (lb_identity_load(state_dir, &id, err))
        return -1;
    lb_qemu_set_throttle_dir(throttle);
    env.identity = &id;
    if (lb_vm_entry_load(state_dir, vm, &e, err))
        rc = -1;
    else if (e.state == LB_VM_PROTECTED || e.state == LB_VM_STANDBY)
        rc = lb_remus_recover(&env, vm, text, err);
    else if (is_checkpoints(e.state))
        /* A fill that is wanted is the scan's to begin. */
        rc = lb_ckpt_host_open(&h, state_dir, config_path, err) ? -1
                                                                : lb_ckpt_recover(&h.env, vm, &fill_wanted, text, err);
    else
        rc = lb_recover_vm(&env, vm, text, err);
    lb_ckpt_host_close(&h);
    lb_identity_wipe(&id);
    return rc;
}

static json_t *recover_one(struct daemon *d, const char *name, struct lb_error *err)
{
    char text[512] = "";
    struct lb_vm_entry e;
    json_t *o = json_object();

    json_object_set_new(o, "name", lb_json_text(name));
    /* Its session ends when all is there, however long that takes: there is nothing to recover. */
    if (!lb_vm_entry_load(d->opt.state_dir, name, &e, NULL) && e.state == LB_VM_FILLING &&
        lb_vm_is_locked(d->opt.state_dir, name)) {
        snprintf(text, sizeof(text), "%s: its memory still comes from %s", name, e.checkpoint);
        json_object_set_new(o, "ok", json_true());
        json_object_set_new(o, "text", lb_json_text(text));
        json_object_set_new(o, "state", json_string(lb_vm_state_name(e.state)));
        return o;
    }
    LB_AUTO_FD int lock = lb_vm_lock_patiently(d->opt.state_dir, name, RECOVER_LOCK_WAIT_MS, err);
    if (lock < 0) {
        json_object_set_new(o, "ok", json_false());
        json_object_set_new(o, "text", lb_json_text("a session works on it"));
        return o;
    }
    bool ok = !lb_recover_here(d->opt.state_dir, d->opt.config_path, name, text, err);
    json_object_set_new(o, "ok", json_boolean(ok));
    json_object_set_new(o, "text", lb_json_text(text));
    if (!lb_vm_entry_load(d->opt.state_dir, name, &e, NULL))
        json_object_set_new(o, "state", json_string(lb_vm_state_name(e.state)));
    else
        json_object_set_new(o, "state", json_string("gone"));
    return o;
}

/* Everything is tried; the first failure is the request's. */
static char *op_recover(struct daemon *d, const Lb__RpcName *r, struct lb_error *err)
{
    LB_AUTO_FREE struct lb_vm_entry *v = NULL;
    struct lb_error first = LB_ERROR_INIT;
    json_t *o, *list = json_array();
    unsigned n = 0;

    if (r->name[0]) {
        v = lb_alloc(sizeof(*v));
        n = 1;
        if (lb_vm_entry_load(d->opt.state_dir, r->name, v, &first))
            n = 0;
    } else {
        lb_vm_entry_list(d->opt.state_dir, &v, &n, &first);
    }
    for (unsigned i = 0; i < n; i++) {
        struct lb_error e = LB_ERROR_INIT;
        json_t *one = recover_one(d, v[i].name, &e);

        if (e.code) {
            json_object_set_new(one, "error", lb_json_text(e.message));
            if (!first.code)
                first = e;
        }
        json_array_append_new(list, one);
    }
    /* One VM: its failure is the answer. Several: the list says which. */
    if (first.code && n <= 1) {
        if (err)
            *err = first;
        json_decref(list);
        return NULL;
    }
    o = json_object();
    json_object_set_new(o, "vms", list);
    json_object_set_new(o, "failed", json_boolean(first.code != LB_OK));
    return lb_json_dump(o);
}

char *lb_op_vm(struct daemon *d, const Lb__RpcRequest *r, struct lb_error *err)
{
    switch (r->kind_case) {
    case LB__RPC_REQUEST__KIND_RUN:
        return op_run(d, r->run, err);
    case LB__RPC_REQUEST__KIND_ADOPT:
        return op_adopt(d, r->adopt, err);
    case LB__RPC_REQUEST__KIND_RELEASE:
        return op_release(d, r->release, err);
    case LB__RPC_REQUEST__KIND_STATUS:
        return op_status(d, r->status, err);
    case LB__RPC_REQUEST__KIND_SHOW:
        return op_show(d, r->show, err);
    case LB__RPC_REQUEST__KIND_STOP:
        return op_stop(d, r->stop, err);
    case LB__RPC_REQUEST__KIND_RECOVER:
        return op_recover(d, r->recover, err);
    case LB__RPC_REQUEST__KIND_CATALOG:
        return lb_op_catalog_read(d, r->catalog, err);
    default:
        lb_fail(err, LB_E_INTERNAL, "a worker got request %d", (int)r->kind_case);
        return NULL;
    }
}
