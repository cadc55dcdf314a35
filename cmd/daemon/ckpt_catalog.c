/*
 * cmd/daemon/ckpt_catalog.c - what can be done with checkpoints that are there: ls and show in a worker, the rest
 * in a session of role "catalog".
 *
 * The catalog is checkpoint/'s. Here is what it cannot know: which VMs of this host still need a checkpoint, and
 * whose images can be joined because the VM that writes to them runs here. Only for that is a VM's lock taken, when
 * it comes to that, and it is asked for, not waited for: the catalog's lock is held, and whoever has the VM's
 * may wait for that one. When something else works on the VM, the images stay as they are until next time.
 */
#include "cmd/daemon/ckpt.h"
#include "cmd/daemon/session.h"

#include <errno.h>
#include <string.h>

#include "core/qemu/qemu.h"

#define CATALOG_WAIT_MS 10000u
#define VM_WAIT_MS 500u /* a status query */
#define REPORT_NS UINT64_C(100000000)

/* ---------------------------------------------------------------------- ls and show */

static void entries_free(struct lb_ckpt_entry *v, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        lb_ckpt_entry_free(&v[i]);
    free(v);
}

static char *list(const struct lb_ckpt_host *h, const char *vm, const struct lb_ckpt_key *key, struct lb_error *err)
{
    struct lb_ckpt_entry *v = NULL;
    json_t *o, *a;
    unsigned n = 0;

    if (lb_catalog_list(h->catalog_dir, vm, key, &v, &n, err))
        return NULL;
    a = json_array();
    for (unsigned i = 0; i < n; i++)
        json_array_append_new(a, lb_ckpt_entry_json(&v[i]));
    entries_free(v, n);
    o = json_object();
    json_object_set_new(o, "checkpoints", a);
    return lb_json_dump(o);
}

static const struct lb_ckpt_entry *with_id(const struct lb_ckpt_entry *v, unsigned n, const struct lb_ckpt_id *id)
{
    static const struct lb_ckpt_id none;

    for (unsigned i = 0; i < n && memcmp(id, &none, sizeof(none)); i++)
        if (!memcmp(&v[i].info.id, id, sizeof(*id)))
            return &v[i];
    return NULL;
}

/* The files that a restore of e reads, e first. */
static json_t *chain_json(const struct lb_ckpt_host *h, const struct lb_ckpt_entry *e, const struct lb_ckpt_key *key)
{
    const struct lb_ckpt_entry *p = e;
    struct lb_ckpt_entry *v = NULL;
    json_t *a = json_array();
    unsigned n = 0;

    lb_catalog_list(h->catalog_dir, e->vm, key, &v, &n, NULL);
    for (unsigned i = 0; p && i <= n; i++) { /* no further than there are files, whatever they say */
        json_array_append_new(a, lb_json_text(p->ref));
        p = with_id(v, n, &p->info.parent);
    }
    entries_free(v, n);
    return a;
}

static json_t *disks_json(const struct lb_ckpt_entry *e)
{
    json_t *a = json_array(), *o;

    for (unsigned i = 0; i < e->n_disks; i++) {
        const struct lb_ckpt_disk *k = &e->disks[i];

        o = json_object();
        json_object_set_new(o, "id", lb_json_text(k->id));
        json_object_set_new(o, "path", lb_json_text(k->path));
        json_object_set_new(o, "argv_path", lb_json_text(k->argv_path));
        json_object_set_new(o, "format", lb_json_text(k->format));
        json_object_set_new(o, "size_bytes", json_integer((json_int_t)k->size_bytes));
        json_array_append_new(a, o);
    }
    return a;
}

static char *show(const struct lb_ckpt_host *h, const char *ref, const struct lb_ckpt_key *key, struct lb_error *err)
{
    struct lb_ckpt_entry e = {0};
    const struct lb_vm_desc *d = &e.info.meta.desc;
    json_t *o;

    if (lb_catalog_find(h->catalog_dir, ref, key, &e, err))
        return NULL;
    o = lb_ckpt_entry_json(&e);
    json_object_set_new(o, "disks", disks_json(&e));
    json_object_set_new(o, "chain", chain_json(h, &e, key));
    if (e.readable) {
        json_object_set_new(o, "machine", lb_json_text(d->machine));
        json_object_set_new(o, "accel", lb_json_text(d->accel));
        json_object_set_new(o, "cpu_model", lb_json_text(d->cpu_model));
        json_object_set_new(o, "vcpus", json_integer(d->vcpus));
        json_object_set_new(o, "hv_version", lb_json_text(d->hv_version));
    }
    lb_ckpt_entry_free(&e);
    return lb_json_dump(o);
}

char *lb_op_catalog_read(struct daemon *d, Lb__RpcCatalog *r, struct lb_error *err)
{
    const char *ref = r->n_refs && r->refs[0][0] ? r->refs[0] : NULL;
    struct lb_ckpt_key *key = NULL;
    struct lb_ckpt_host h;
    char *json = NULL;

    if (lb_ckpt_host_open(&h, d->opt.state_dir, d->opt.config_path, err))
        return NULL;
    if (!lb_ckpt_key_for(&h, r->key, NULL, false, &key, err)) {
        if (!strcmp(r->op, "ls"))
            json = list(&h, ref, key, err);
        else if (ref)
            json = show(&h, ref, key, err);
        else
            lb_fail(err, LB_E_USAGE, "there is no checkpoint to show");
    }
    lb_ckpt_key_free(key);
    lb_ckpt_host_close(&h);
    return json;
}

/* ------------------------------------------------------------------------- removing */

/* The hypervisor of a VM, asked only when there is an image to join. */
struct joiner {
    const struct lb_ckpt_host *h;
    struct sess *s;
    const char *vm;
    bool locked;        /* the caller has the lock */
    int lock;           /* ours */
    struct lb_hv_vm *hv;
};

static int join_tick(uint64_t done, uint64_t total, void *arg)
{
    struct joiner *j = arg;

    (void)done;
    (void)total;
    return lb_readable(lb_sess_cancel_fd(j->s), 0) ? -1 : 0;
}

static int join_attach(struct joiner *j, struct lb_error *err)
{
    struct lb_vm_entry e;
    struct lb_vm_ident id;

    if (!j->locked && j->lock < 0)
        j->lock = lb_vm_lock(j->h->env.state_dir, j->vm, err);
    if (!j->locked && j->lock < 0)
        return -1;
    if (!j->locked)
        lb_sess_set_vm(j->s, j->vm); /* whoever wants it now is told who has it */
    if (lb_vm_entry_load(j->h->env.state_dir, j->vm, &e, err))
        return -1;
    if (e.state != LB_VM_RUNNING || !lb_proc_alive(&e.proc))
        return lb_fail(err, LB_E_STATE, "VM %s does not run", j->vm);
    id = (struct lb_vm_ident){.name = e.name, .proc = e.proc, .qmp_path = e.qmp_path[0] ? e.qmp_path : NULL};
    return lb_hv_attach(j->h->env.hv, &id, &j->hv, err);
}

static int join_images(const char *vm, const char *disk_id, const char *top, const char *base, void *arg,
                       struct lb_error *err)
{
    struct joiner *j = arg;

    if (strcmp(vm, j->vm))
        return lb_fail(err, LB_E_STATE, "VM %s is not the one that runs here", vm);
    if (!j->hv && join_attach(j, err))
        return -1;
    lb_log(LB_LOG_INFO, "image %s is joined with %s", top, base);
    return lb_hv_disk_join(j->hv, disk_id, top, base, join_tick, j, err);
}

/* The VM of these that cannot do without the checkpoint: it is one, or it still reads it. NULL: none. */
static const struct lb_vm_entry *who_needs(const struct lb_vm_entry *v, unsigned n, const char *ref)
{
    for (unsigned i = 0; i < n; i++)
        if (!strcmp(v[i].checkpoint, ref) && (v[i].state == LB_VM_SUSPENDED || v[i].state == LB_VM_RESTORING ||
                                              v[i].state == LB_VM_FILLING))
            return &v[i];
    return NULL;
}

/* Those of the numbers that no VM of this host needs now: since they were chosen a restore may have begun. */
static int free_ones(const struct lb_ckpt_host *h, const char *vm, const uint32_t *numbers, unsigned n,
                     uint32_t **out, unsigned *n_out, struct lb_error *err)
{
    LB_AUTO_FREE struct lb_vm_entry *vms = NULL;
    const struct lb_vm_entry *who;
    unsigned n_vms = 0;
    char ref[160];

    if (lb_vm_entry_list(h->env.state_dir, &vms, &n_vms, err))
        return -1;
    *out = lb_alloc((n + 1) * sizeof(**out));
    *n_out = 0;
    for (unsigned i = 0; i < n; i++) {
        lb_ckpt_number_ref(ref, vm, numbers[i]);
        who = who_needs(vms, n_vms, ref);
        if (who)
            lb_log(LB_LOG_INFO, "%s stays: VM %s (%s) needs it", ref, who->name, lb_vm_state_name(who->state));
        else
            (*out)[(*n_out)++] = numbers[i];
    }
    return 0;
}

int lb_ckpt_remove(const struct lb_ckpt_host *h, struct sess *s, const char *vm, bool vm_locked,
                   const uint32_t *numbers, unsigned n, const struct lb_ckpt_key *key,
                   void (*progress)(uint64_t done, uint64_t total, void *arg), void *arg,
                   struct lb_prune_result *res, struct lb_error *err)
{
    struct joiner j = {.h = h, .s = s, .vm = vm, .locked = vm_locked, .lock = -1};
    const struct lb_image_join join = {join_images, &j};
    LB_AUTO_FD int lock = lb_catalog_lock(h->catalog_dir, vm, CATALOG_WAIT_MS, err);
    LB_AUTO_FREE uint32_t *unneeded = NULL;
    struct lb_vm_entry e;
    unsigned n_unneeded;
    bool here = !lb_vm_entry_load(h->env.state_dir, vm, &e, NULL) && e.state == LB_VM_RUNNING;
    int rc;

    if (lock < 0 || free_ones(h, vm, numbers, n, &unneeded, &n_unneeded, err))
        return -1;
    rc = lb_catalog_remove(h->catalog_dir, vm, unneeded, n_unneeded, key, here ? &join : NULL, progress, arg,
                           lb_sess_cancel_fd(s), res, err);
    lb_hv_detach(j.hv);
    lb_cleanup_fd(&j.lock);
    return rc;
}

/* ------------------------------------------------------------------ a session's work */

struct task {
    struct sess *s;
    const Lb__RpcCatalog *r;
    struct lb_ckpt_host host;
    struct lb_ckpt_key *key;
    struct lb_vm_entry *vms; /* of this host */
    unsigned n_vms;
    uint64_t said_ns, begun_ns;
    char note[200];
};

static void on_progress(uint64_t done, uint64_t total, void *arg)
{
    struct task *t = arg;
    uint64_t now = lb_now_ns();
    double rate = now > t->begun_ns ? (double)done * 1e9 / (double)(now - t->begun_ns) : 0;
    json_t *o;

    if (now - t->said_ns < REPORT_NS && done < total)
        return;
    t->said_ns = now;
    o = json_object();
    json_object_set_new(o, "event", json_string("progress"));
    json_object_set_new(o, "vm", json_string(""));
    json_object_set_new(o, "what", lb_json_text(t->r->op));
    json_object_set_new(o, "phase", json_string("working"));
    json_object_set_new(o, "state", json_string("working"));
    json_object_set_new(o, "percent", total ? lb_ckpt_real((double)LB_MIN(done, total) * 100 / (double)total) : json_null());
    json_object_set_new(o, "done_bytes", json_integer((json_int_t)done));
    json_object_set_new(o, "total_bytes", json_integer((json_int_t)total));
    json_object_set_new(o, "file_bytes", json_integer(0));
    json_object_set_new(o, "bytes_per_s", lb_ckpt_real(rate));
    json_object_set_new(o, "eta_s", rate > 0 && total >= done ? lb_ckpt_real((double)(total - done) / rate) : json_null());
    json_object_set_new(o, "note", lb_json_text(t->note));
    lb_sess_progress(t->s, lb_json_dump(o));
}

static int check_cancel(const struct task *t, struct lb_error *err)
{
    return lb_readable(lb_sess_cancel_fd(t->s), 0) ? lb_fail(err, LB_E_CANCELLED, "cancelled") : 0;
}

/* ---- verify */

struct verification {
    struct task *t;
    json_t *problems;        /* of this file */
    uint64_t before, total;  /* bytes of the files before it, of all */
};

static void on_found(const char *what, void *arg)
{
    struct verification *v = arg;

    json_array_append_new(v->problems, lb_json_text(what));
}

static int on_tick(uint64_t done, void *arg)
{
    struct verification *v = arg;

    on_progress(v->before + done, v->total, v->t);
    return check_cancel(v->t, NULL);
}

/* Differences from a parent need the parent. */
static int verify_chain(struct verification *v, const struct lb_ckpt_entry *e, struct lb_error *err)
{
    struct lb_chain *chain;

    if (lb_catalog_open(v->t->host.catalog_dir, e, v->t->key, &chain, err))
        return -1;
    int rc = lb_chain_verify(chain, on_found, v, lb_sess_cancel_fd(v->t->s), err);
    lb_chain_close(chain);
    return rc;
}

static json_t *verify_one(struct verification *v, const struct lb_ckpt_entry *e, json_t *all)
{
    json_t *o = json_object(), *p;
    struct lb_error err = LB_ERROR_INIT;
    size_t i;

    v->problems = json_array();
    int rc = lb_ckpt_verify_watched(e->path, v->t->key, v->t->r->deep, on_found, on_tick, v, &err);
    if (!rc && v->t->r->deep && e->depth > 1)
        rc = verify_chain(v, e, &err);
    if (rc && !json_array_size(v->problems))
        json_array_append_new(v->problems, lb_json_text(err.message));
    if (!e->depth)
        json_array_append_new(v->problems, json_sprintf("%s: a parent of it is missing", e->ref));
    json_array_foreach (v->problems, i, p)
        json_array_append(all, p);
    json_object_set_new(o, "ref", lb_json_text(e->ref));
    json_object_set_new(o, "path", lb_json_text(e->path));
    json_object_set_new(o, "ok", json_boolean(!json_array_size(v->problems)));
    json_object_set_new(o, "problems", v->problems);
    return o;
}

/* Those that were named, or all. */
static int find_all(struct task *t, struct lb_ckpt_entry **v, unsigned *n, struct lb_error *err)
{
    *v = NULL;
    *n = 0;
    if (!t->r->n_refs)
        return lb_catalog_list(t->host.catalog_dir, NULL, t->key, v, n, err);
    *v = lb_alloc(sizeof(**v) * t->r->n_refs);
    for (size_t i = 0; i < t->r->n_refs; i++) {
        if (lb_catalog_find(t->host.catalog_dir, t->r->refs[i], t->key, &(*v)[i], err)) {
            entries_free(*v, *n);
            return -1;
        }
        ++*n;
    }
    return 0;
}

static json_t *verify(struct task *t, struct lb_error *err)
{
    struct verification ver = {.t = t};
    json_t *o, *checked, *problems;
    struct lb_ckpt_entry *v;
    unsigned n;

    if (find_all(t, &v, &n, err))
        return NULL;
    for (unsigned i = 0; i < n; i++)
        ver.total += v[i].info.file_bytes;
    checked = json_array();
    problems = json_array();
    for (unsigned i = 0; i < n && !check_cancel(t, err); i++) {
        snprintf(t->note, sizeof(t->note), "%s", v[i].ref);
        json_array_append_new(checked, verify_one(&ver, &v[i], problems));
        ver.before += v[i].info.file_bytes;
    }
    entries_free(v, n);
    o = json_object();
    json_object_set_new(o, "ok", json_boolean(!json_array_size(problems)));
    json_object_set_new(o, "checked", checked);
    json_object_set_new(o, "problems", problems);
    if (!check_cancel(t, err))
        return o;
    json_decref(o);
    return NULL;
}

/* ---- rm and prune */

/* What is to go, VM by VM. */
struct doomed {
    char vm[128];
    uint32_t *numbers;
    unsigned n;
};

static void doomed_free(struct doomed *v, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        free(v[i].numbers);
    free(v);
}

static struct doomed *doomed_of(struct doomed **v, unsigned *n, const char *vm)
{
    for (unsigned i = 0; i < *n; i++)
        if (!strcmp((*v)[i].vm, vm))
            return &(*v)[i];
    *v = lb_realloc(*v, (*n + 1) * sizeof(**v));
    (*v)[*n] = (struct doomed){0};
    snprintf((*v)[*n].vm, sizeof((*v)->vm), "%s", vm);
    return &(*v)[(*n)++];
}

static void doom(struct doomed **v, unsigned *n, const char *vm, uint32_t number)
{
    struct doomed *d = doomed_of(v, n, vm);

    for (unsigned i = 0; i < d->n; i++)
        if (d->numbers[i] == number)
            return;
    d->numbers = lb_realloc(d->numbers, (d->n + 1) * sizeof(*d->numbers));
    d->numbers[d->n++] = number;
}

static json_t *refs_json(const struct doomed *v, unsigned n)
{
    json_t *a = json_array();
    char ref[160];

    for (unsigned i = 0; i < n; i++)
        for (unsigned k = 0; k < v[i].n; k++) {
            lb_ckpt_number_ref(ref, v[i].vm, v[i].numbers[k]);
            json_array_append_new(a, lb_json_text(ref));
        }
    return a;
}

static void add_result(struct lb_prune_result *sum, const struct lb_prune_result *r)
{
    sum->removed += r->removed;
    sum->joined += r->joined;
    sum->images_joined += r->images_joined;
    sum->images_kept += r->images_kept;
    sum->freed_bytes += r->freed_bytes;
}

static json_t *remove_all(struct task *t, const struct doomed *v, unsigned n, struct lb_error *err)
{
    struct lb_prune_result sum = {0};
    json_t *o = json_object();
    unsigned wanted = 0;

    if (t->r->dry_run) {
        json_object_set_new(o, "would_remove", refs_json(v, n));
        return o;
    }
    for (unsigned i = 0; i < n && !err->code; i++) {
        struct lb_prune_result res = {0};

        snprintf(t->note, sizeof(t->note), "%s", v[i].vm);
        if (!check_cancel(t, err))
            lb_ckpt_remove(&t->host, t->s, v[i].vm, false, v[i].numbers, v[i].n, t->key, on_progress, t, &res,
                           err);
        add_result(&sum, &res);
        wanted += v[i].n;
    }
    if (!err->code && !strcmp(t->r->op, "rm") && sum.removed < wanted) {
        lb_fail(err, LB_E_STATE, "a VM has begun to need %u of %u meanwhile: they stay", wanted - sum.removed, wanted);
        lb_remedy(err, "wait until `lifeboat ls` says running of all VMs, then try again");
    }
    if (err->code) {
        json_decref(o);
        return NULL;
    }
    json_object_set_new(o, "refs", refs_json(v, n));
    json_object_set_new(o, "removed", json_integer(sum.removed));
    json_object_set_new(o, "joined", json_integer(sum.joined));
    json_object_set_new(o, "images_joined", json_integer(sum.images_joined));
    json_object_set_new(o, "images_kept", json_integer(sum.images_kept));
    json_object_set_new(o, "freed_bytes", json_integer((json_int_t)sum.freed_bytes));
    return o;
}

static int may_remove(const struct task *t, const struct lb_ckpt_entry *e, struct lb_error *err)
{
    const struct lb_vm_entry *vm = who_needs(t->vms, t->n_vms, e->ref);

    if (!vm || (vm->state == LB_VM_SUSPENDED && t->r->force))
        return 0;
    if (vm->state == LB_VM_SUSPENDED) {
        lb_fail(err, LB_E_STATE, "%s is VM %s: without it the VM is gone", e->ref, vm->name);
        return lb_remedy(err, "`lifeboat resume %s`, or --force to throw the VM away", vm->name);
    }
    lb_fail(err, LB_E_STATE, "the memory of VM %s still comes from %s", vm->name, e->ref);
    return lb_remedy(err, "wait until `lifeboat status %s` says running", vm->name);
}

/* A suspended VM goes with its file. The entry first: a file without a VM can be removed again, a VM
 * without its file could not. */
static int forget_vm(const struct task *t, const struct lb_ckpt_entry *e, struct lb_error *err)
{
    const struct lb_vm_entry *vm = who_needs(t->vms, t->n_vms, e->ref);
    struct lb_vm_entry now;

    if (!vm || t->r->dry_run)
        return 0;
    LB_AUTO_FD int lock = lb_vm_lock_patiently(t->host.env.state_dir, vm->name, VM_WAIT_MS, err);
    if (lock < 0)
        return -1;
    if (lb_vm_entry_load(t->host.env.state_dir, vm->name, &now, err))
        return -1;
    if (now.state != LB_VM_SUSPENDED)
        return lb_fail(err, LB_E_STATE, "VM %s is %s now", vm->name, lb_vm_state_name(now.state));
    lb_log(LB_LOG_WARN, "suspended VM %s is thrown away", vm->name);
    return lb_vm_entry_remove(t->host.env.state_dir, vm->name, err);
}

static json_t *rm(struct task *t, struct lb_error *err)
{
    struct lb_ckpt_entry *v = NULL;
    struct doomed *doomed = NULL;
    unsigned n = 0, n_doomed = 0;
    json_t *o = NULL;

    if (!t->r->n_refs) {
        lb_fail(err, LB_E_USAGE, "there is no checkpoint to remove");
        return NULL;
    }
    if (find_all(t, &v, &n, err))
        return NULL;
    for (unsigned i = 0; i < n && !err->code; i++)
        if (!may_remove(t, &v[i], err))
            doom(&doomed, &n_doomed, v[i].vm, v[i].number);
    for (unsigned i = 0; i < n && !err->code; i++)
        forget_vm(t, &v[i], err);
    if (!err->code)
        o = remove_all(t, doomed, n_doomed, err);
    doomed_free(doomed, n_doomed);
    entries_free(v, n);
    return o;
}

/* Of one VM. What a VM still reads stays: it goes next time. */
static int prune_vm(struct task *t, const char *vm, struct doomed **v, unsigned *n, struct lb_error *err)
{
    LB_AUTO_FREE uint32_t *numbers = NULL;
    unsigned count = 0;
    char ref[160];

    if (lb_catalog_prunable(t->host.catalog_dir, vm, t->key, t->r->keep, t->r->older_ms, t->r->labelled, &numbers,
                            &count, err))
        return -1;
    for (unsigned i = 0; i < count; i++) {
        lb_ckpt_number_ref(ref, vm, numbers[i]);
        if (!who_needs(t->vms, t->n_vms, ref))
            doom(v, n, vm, numbers[i]);
    }
    return 0;
}

static json_t *prune(struct task *t, struct lb_error *err)
{
    struct lb_ckpt_entry *v = NULL;
    struct doomed *doomed = NULL;
    unsigned n = 0, n_doomed = 0;
    json_t *o = NULL;

    if (!t->r->keep && !t->r->older_ms) {
        lb_fail(err, LB_E_USAGE, "it is not said which checkpoints to keep");
        lb_remedy(err, "give --keep, --older, or both");
        return NULL;
    }
    if (!t->r->n_refs && lb_catalog_list(t->host.catalog_dir, NULL, t->key, &v, &n, err))
        return NULL;
    for (size_t i = 0; i < t->r->n_refs && !err->code; i++)
        prune_vm(t, t->r->refs[i], &doomed, &n_doomed, err);
    for (unsigned i = 0; i < n && !err->code; i++) /* sorted by VM */
        if (!i || strcmp(v[i].vm, v[i - 1].vm))
            prune_vm(t, v[i].vm, &doomed, &n_doomed, err);
    if (!err->code)
        o = remove_all(t, doomed, n_doomed, err);
    doomed_free(doomed, n_doomed);
    entries_free(v, n);
    return o;
}

/* ---- export and import */

static json_t *export(struct task *t, struct lb_error *err)
{
    struct lb_ckpt_entry e = {0};
    json_t *o = NULL;

    if (t->r->n_refs != 1 || t->r->to[0] != '/') {
        lb_fail(err, LB_E_USAGE, "one checkpoint is exported to one folder, by its absolute path");
        return NULL;
    }
    if (lb_catalog_find(t->host.catalog_dir, t->r->refs[0], t->key, &e, err))
        return NULL;
    snprintf(t->note, sizeof(t->note), "%s", e.ref);
    if (!lb_catalog_export(t->host.catalog_dir, &e, t->key, t->r->to, t->r->no_disk, on_progress, t,
                           lb_sess_cancel_fd(t->s), err)) {
        o = json_object();
        json_object_set_new(o, "ref", lb_json_text(e.ref));
        json_object_set_new(o, "to", lb_json_text(t->r->to));
    }
    lb_ckpt_entry_free(&e);
    return o;
}

static json_t *import(struct task *t, struct lb_error *err)
{
    struct lb_ckpt_entry e = {0};
    json_t *o = NULL;

    if (t->r->n_refs != 1 || t->r->refs[0][0] != '/') {
        lb_fail(err, LB_E_USAGE, "one folder is imported, by its absolute path");
        return NULL;
    }
    if (t->r->as[0] && !lb_vm_name_valid(t->r->as)) {
        lb_fail(err, LB_E_USAGE, "\"%.80s\" is not a valid VM name", t->r->as);
        return NULL;
    }
    if (!lb_catalog_import(t->host.catalog_dir, t->r->refs[0], t->r->as[0] ? t->r->as : NULL, t->key, on_progress, t,
                           lb_sess_cancel_fd(t->s), &e, err))
        o = lb_ckpt_entry_json(&e);
    lb_ckpt_entry_free(&e);
    return o;
}

static json_t *carry_out(struct task *t, struct lb_error *err)
{
    static const struct {
        const char *name;
        json_t *(*fn)(struct task *t, struct lb_error *err);
    } ops[] = {{"verify", verify}, {"rm", rm}, {"prune", prune}, {"export", export}, {"import", import}};

    for (size_t i = 0; i < LB_ARRAY_LEN(ops); i++)
        if (!strcmp(t->r->op, ops[i].name))
            return ops[i].fn(t, err);
    lb_fail(err, LB_E_PROTO, "this lifeboatd does not know the operation \"%.40s\"", t->r->op);
    lb_remedy(err, "use a lifeboat of the same version (" LB_VERSION ")");
    return NULL;
}

int lb_work_catalog(struct sess *s, char **json, struct lb_error *err)
{
    const Lb__SessionStart *m = lb_sess_start(s);
    struct task t = {.s = s, .begun_ns = lb_now_ns()};
    json_t *o = NULL;

    if (!m->request || m->request->kind_case != LB__RPC_REQUEST__KIND_CATALOG)
        return lb_fail(err, LB_E_USAGE, "the session was not told what to do");
    t.r = m->request->catalog;
    lb_sess_open_log(s);
    if (!lb_ckpt_host_open(&t.host, m->state_dir, m->config_path, err) &&
        !lb_vm_entry_list(m->state_dir, &t.vms, &t.n_vms, err) &&
        !lb_ckpt_key_for(&t.host, m->request->catalog->key, NULL, false, &t.key, err))
        o = carry_out(&t, err);
    if (o)
        *json = lb_json_dump(o);
    free(t.vms);
    lb_ckpt_key_free(t.key);
    lb_ckpt_host_close(&t.host);
    return o ? 0 : -1;
}
