/*
 * cmd/daemon/batch.c - all VMs of the host at once: suspend when it goes down, resume when it is back, and a
 * key for all that wait for one.
 *
 *   suspend_all   every VM that runs and is not protected. One a session works on (it is migrated, it still gets
 *                 its memory, a checkpoint is taken) is waited for. What cannot be suspended runs on.
 *   resume_all    the VMs that suspend_all suspended, and only those: STATE_DIR/resume.json
 *   fill_key      every VM that waits for its memory with no session to bring it
 *
 * As many at a time as there are processors. resume.json has a name from before its suspend begins until
 * the VM runs again, or until the suspend has failed, so that a crash in between leaves no VM behind; names of VMs that
 * are not suspended mean nothing.
 *
 * One batch at a time; a second request for the same waits for the first. A supervisor that dies takes the
 * batch along, not the sessions.
 */
#include "cmd/daemon/ckpt.h"

#include <sodium.h>
#include <string.h>

#define MAX_RESUME_BYTES (4u << 20)

enum item_state { ITEM_WAITS = 0, ITEM_BEGUN, ITEM_DONE };

struct item {
    char vm[128];
    enum item_state state;
    struct session *s; /* BEGUN */
};

struct batch {
    Lb__RpcRequest__KindCase kind;
    struct item *v;
    unsigned n, n_done;
    json_t *done, *failed, *left;
    uint8_t *request;  /* fill_key: packed, with the secret; wiped at the end */
    size_t request_len;
};

/* --------------------------------------------------------------------- resume.json */

static char *list_path(struct daemon *d)
{
    return lb_asprintf("%s/resume.json", d->opt.state_dir);
}

/* An array of names; empty when there is none. NULL: it is damaged. */
static json_t *list_load(struct daemon *d, struct lb_error *err)
{
    LB_AUTO_FREE char *path = list_path(d);
    LB_AUTO_FREE char *text = NULL;
    struct lb_error why = LB_ERROR_INIT;
    json_t *o, *list;
    size_t len;

    if (lb_file_read(path, MAX_RESUME_BYTES, &text, &len, &why)) {
        if (why.code == LB_E_NOT_FOUND)
            return json_array();
        *err = why;
        return NULL;
    }
    o = json_loadb(text, len, 0, NULL);
    list = json_incref(json_object_get(o, "suspended"));
    json_decref(o);
    if (json_is_array(list))
        return list;
    json_decref(list);
    lb_fail(err, LB_E_STATE, "%s is damaged", path);
    lb_remedy(err, "`lifeboat ls` shows which VMs are suspended; resume them one by one and remove the file");
    return NULL;
}

/* Takes list. */
static int list_save(struct daemon *d, json_t *list, struct lb_error *err)
{
    LB_AUTO_FREE char *path = list_path(d);
    json_t *o = json_object();

    json_object_set_new(o, "suspended", list);
    LB_AUTO_FREE char *text = lb_json_dump(o);
    return lb_file_write_atomic(path, text, strlen(text), 0600, err);
}

static bool list_has(const json_t *list, const char *vm, size_t *at)
{
    const json_t *name;
    size_t i;

    json_array_foreach (list, i, name)
        if (json_is_string(name) && !strcmp(json_string_value(name), vm)) {
            *at = i;
            return true;
        }
    return false;
}

static void list_remove(struct daemon *d, const char *vm)
{
    struct lb_error err = LB_ERROR_INIT;
    json_t *list = list_load(d, &err);
    size_t at;

    if (list && list_has(list, vm, &at)) {
        json_array_remove(list, at);
        list_save(d, json_incref(list), &err);
    }
    json_decref(list);
    if (err.code)
        lb_log_error(LB_LOG_ERROR, &err);
}

/* All of the batch in one write. */
static int list_add_all(struct daemon *d, const struct batch *b, struct lb_error *err)
{
    json_t *list = list_load(d, err);
    size_t at;

    if (!list)
        return -1;
    for (unsigned i = 0; i < b->n; i++)
        if (b->v[i].state == ITEM_WAITS && !list_has(list, b->v[i].vm, &at))
            json_array_append_new(list, json_string(b->v[i].vm));
    return list_save(d, list, err);
}

/* --------------------------------------------------------------------------- items */

static const char *what_of(const struct batch *b)
{
    return b->kind == LB__RPC_REQUEST__KIND_SUSPEND_ALL  ? "suspend"
           : b->kind == LB__RPC_REQUEST__KIND_RESUME_ALL ? "resume"
                                                         : "key";
}

static void tell_item(struct daemon *d, const struct item *it, const struct lb_error *e)
{
    struct batch *b = d->batch;
    json_t *o = json_object();

    json_object_set_new(o, "event", json_string("vm"));
    json_object_set_new(o, "what", json_string(what_of(b)));
    json_object_set_new(o, "vm", lb_json_text(it->vm));
    json_object_set_new(o, "ok", json_boolean(!e));
    json_object_set_new(o, "done", json_integer(b->n_done));
    json_object_set_new(o, "total", json_integer(b->n));
    json_object_set_new(o, "message", lb_json_text(e ? e->message : ""));
    json_object_set_new(o, "remedy", lb_json_text(e ? e->remedy : ""));
    LB_AUTO_FREE char *text = lb_json_dump(o);
    lb_clients_tell(d, LB_BATCH_NAME, text);
}

static json_t *problem_json(const char *vm, const struct lb_error *e)
{
    json_t *o = json_object();

    json_object_set_new(o, "vm", lb_json_text(vm));
    json_object_set_new(o, "code", json_integer(e->code));
    json_object_set_new(o, "message", lb_json_text(e->message));
    json_object_set_new(o, "remedy", lb_json_text(e->remedy));
    return o;
}

static void item_over(struct daemon *d, struct item *it, const struct lb_error *e)
{
    it->state = ITEM_DONE;
    it->s = NULL;
    d->batch->n_done++;
    tell_item(d, it, e);
}

/* result: JSON text, may be NULL. */
static void item_done(struct daemon *d, struct item *it, const char *result)
{
    json_t *o = result ? json_loads(result, 0, NULL) : NULL;

    if (!o)
        o = json_object();
    json_object_set_new(o, "vm", lb_json_text(it->vm));
    json_array_append_new(d->batch->done, o);
    item_over(d, it, NULL);
}

static void item_failed(struct daemon *d, struct item *it, const struct lb_error *e)
{
    if (d->batch->kind == LB__RPC_REQUEST__KIND_SUSPEND_ALL)
        list_remove(d, it->vm);
    json_array_append_new(d->batch->failed, problem_json(it->vm, e));
    item_over(d, it, e);
}

static void item_left(struct daemon *d, struct item *it, const struct lb_vm_entry *vm, const struct lb_error *e)
{
    json_t *o = problem_json(it->vm, e);

    if (d->batch->kind == LB__RPC_REQUEST__KIND_SUSPEND_ALL)
        list_remove(d, it->vm);
    json_object_set_new(o, "state", json_string(vm ? lb_vm_state_name(vm->state) : "gone"));
    json_array_append_new(d->batch->left, o);
    item_over(d, it, e);
}

static struct item *item_of(struct session *s)
{
    struct batch *b = s->d->batch;

    for (unsigned i = 0; b && i < b->n; i++)
        if (b->v[i].state == ITEM_BEGUN && b->v[i].s == s)
            return &b->v[i];
    return NULL;
}

static struct session *spawn_item(struct daemon *d, const struct item *it, struct lb_error *err)
{
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT, *key;
    Lb__RpcCheckpoint take = LB__RPC_CHECKPOINT__INIT;
    Lb__RpcRestore resume = LB__RPC_RESTORE__INIT;
    struct session *s;

    switch (d->batch->kind) {
    case LB__RPC_REQUEST__KIND_SUSPEND_ALL:
        take.name = (char *)it->vm;
        take.suspend = true;
        r.kind_case = LB__RPC_REQUEST__KIND_CHECKPOINT;
        r.checkpoint = &take;
        return lb_session_spawn_for(d, "checkpoint", it->vm, "", &r, err);
    case LB__RPC_REQUEST__KIND_RESUME_ALL:
        resume.ref = (char *)it->vm;
        resume.resume = true;
        r.kind_case = LB__RPC_REQUEST__KIND_RESTORE;
        r.restore = &resume;
        return lb_session_spawn_for(d, "restore", it->vm, "", &r, err);
    default:
        key = lb__rpc_request__unpack(NULL, d->batch->request_len, d->batch->request);
        s = lb_session_spawn_for(d, "fill", it->vm, "", key, err);
        lb_ckpt_key_wipe(lb_ckpt_key_of(key));
        lb__rpc_request__free_unpacked(key, NULL);
        return s;
    }
}

/* Can it begin? *e says why it never will. Neither: a session is at work on it. */
static bool may_begin(struct daemon *d, const struct lb_vm_entry *vm, struct lb_error *e)
{
    if (lb_session_of_vm(d, vm->name) || lb_vm_is_locked(d->opt.state_dir, vm->name))
        return false;
    switch (d->batch->kind) {
    case LB__RPC_REQUEST__KIND_SUSPEND_ALL:
        return !lb_ckpt_takeable(d, vm, "suspend", e);
    case LB__RPC_REQUEST__KIND_RESUME_ALL:
        if (vm->state != LB_VM_SUSPENDED)
            lb_fail(e, LB_E_STATE, "VM %s is %s", vm->name, lb_vm_state_name(vm->state));
        return vm->state == LB_VM_SUSPENDED;
    default:
        if (vm->state != LB_VM_FILLING)
            lb_fail(e, LB_E_STATE, "VM %s is %s", vm->name, lb_vm_state_name(vm->state));
        return vm->state == LB_VM_FILLING;
    }
}

static void item_try(struct daemon *d, struct item *it)
{
    struct lb_error e = LB_ERROR_INIT;
    struct lb_vm_entry vm;

    if (lb_vm_entry_load(d->opt.state_dir, it->vm, &vm, &e)) {
        item_left(d, it, NULL, &e); /* it has moved to another host, or ended */
        return;
    }
    /* A protection is a session too, but not one to wait for. */
    if (d->batch->kind == LB__RPC_REQUEST__KIND_SUSPEND_ALL && lb_protect_refuse(d, &vm, "suspend", &e)) {
        item_left(d, it, &vm, &e);
        return;
    }
    if (!may_begin(d, &vm, &e)) {
        if (e.code)
            item_left(d, it, &vm, &e);
        return;
    }
    it->s = spawn_item(d, it, &e);
    if (it->s)
        it->state = ITEM_BEGUN;
    else
        item_failed(d, it, &e);
}

/* --------------------------------------------------------------------------- batch */

static void batch_free(struct daemon *d)
{
    struct batch *b = d->batch;

    d->batch = NULL;
    json_decref(b->done);
    json_decref(b->failed);
    json_decref(b->left);
    if (b->request)
        sodium_memzero(b->request, b->request_len);
    free(b->request);
    free(b->v);
    free(b);
}

static void batch_end(struct daemon *d)
{
    json_t *o = json_object();

    json_object_set(o, "done", d->batch->done);
    json_object_set(o, "failed", d->batch->failed);
    json_object_set(o, "left", d->batch->left);
    LB_AUTO_FREE char *text = lb_json_dump(o);
    batch_free(d);
    lb_clients_settle(d, LB_BATCH_NAME, LB_WAIT_BATCH, text, NULL);
}

void lb_batch_step(struct daemon *d)
{
    unsigned most = (unsigned)LB_MAX(sysconf(_SC_NPROCESSORS_ONLN), 1), begun = 0;
    struct batch *b = d->batch;

    for (unsigned i = 0; b && i < b->n; i++)
        begun += b->v[i].state == ITEM_BEGUN;
    for (unsigned i = 0; b && i < b->n && begun < most; i++) {
        if (b->v[i].state != ITEM_WAITS)
            continue;
        item_try(d, &b->v[i]);
        begun += b->v[i].state == ITEM_BEGUN;
    }
    if (b && b->n_done == b->n)
        batch_end(d);
}

bool lb_batch_suspends(struct daemon *d)
{
    return d->batch && d->batch->kind == LB__RPC_REQUEST__KIND_SUSPEND_ALL;
}

void lb_batch_event(struct session *s, const char *kind, const json_t *o, const char *text)
{
    struct item *it = item_of(s);
    const char *state = json_string_value(json_object_get(o, "state"));

    /* The guest runs again: its memory comes without us. */
    if (!strcmp(kind, "running"))
        list_remove(s->d, s->vm);
    if (!it)
        return;
    if (!strcmp(kind, "running")) {
        LB_AUTO_FREE char *result = json_dumps(json_object_get(o, "result"), JSON_COMPACT);

        item_done(s->d, it, result);
    } else if (s->d->batch->kind == LB__RPC_REQUEST__KIND_FILL_KEY && state &&
               !strcmp(state, lb_ckpt_phase_name(LB_CKPT_FILLING))) {
        item_done(s->d, it, NULL); /* the key is right */
    } else {
        lb_clients_tell(s->d, LB_BATCH_NAME, text);
        return;
    }
    lb_batch_step(s->d);
}

/* Is the result's word true? */
static bool result_says(const struct session *s, const char *word)
{
    json_t *o = s->result ? json_loads(s->result, 0, NULL) : NULL;
    bool yes = json_is_true(json_object_get(o, word));

    json_decref(o);
    return yes;
}

void lb_batch_ended(struct session *s)
{
    struct item *it = item_of(s);
    bool good = !s->error.code;

    /* Whoever suspends or resumes a VM by hand, does both by hand. */
    if (good && (result_says(s, "resumed") || (result_says(s, "suspend") && !it)))
        list_remove(s->d, s->vm);
    if (it && good)
        item_done(s->d, it, s->result);
    else if (it)
        item_failed(s->d, it, &s->error);
}

/* ------------------------------------------------------------------------- requests */

static void add_item(struct batch *b, const char *vm)
{
    b->v = lb_realloc(b->v, (b->n + 1) * sizeof(*b->v));
    b->v[b->n] = (struct item){.state = ITEM_WAITS};
    snprintf(b->v[b->n++].vm, sizeof(b->v->vm), "%s", vm);
}

/* Which entries the batch is about. */
static bool concerns(const struct batch *b, const struct lb_vm_entry *e, const json_t *list)
{
    size_t at;

    switch (b->kind) {
    case LB__RPC_REQUEST__KIND_SUSPEND_ALL:
        return e->state != LB_VM_SUSPENDED && e->state != LB_VM_DEAD && e->state != LB_VM_STANDBY &&
               (e->state != LB_VM_RUNNING || lb_proc_alive(&e->proc));
    case LB__RPC_REQUEST__KIND_RESUME_ALL:
        return e->state == LB_VM_SUSPENDED && list_has(list, e->name, &at);
    default:
        return e->state == LB_VM_FILLING;
    }
}

static int batch_begin(struct daemon *d, const Lb__RpcRequest *r, struct lb_error *err)
{
    LB_AUTO_FREE struct lb_vm_entry *v = NULL;
    json_t *list = list_load(d, err);
    struct batch *b;
    unsigned n = 0;

    if (!list || lb_vm_entry_list(d->opt.state_dir, &v, &n, err)) {
        json_decref(list);
        return -1;
    }
    d->batch = b = lb_alloc(sizeof(*b));
    b->kind = r->kind_case;
    b->done = json_array();
    b->failed = json_array();
    b->left = json_array();
    for (unsigned i = 0; i < n; i++)
        if (concerns(b, &v[i], list))
            add_item(b, v[i].name);
    json_decref(list);
    if (b->kind == LB__RPC_REQUEST__KIND_SUSPEND_ALL && list_add_all(d, b, err)) {
        batch_free(d);
        return -1;
    }
    if (b->kind == LB__RPC_REQUEST__KIND_FILL_KEY) {
        b->request_len = lb__rpc_request__get_packed_size(r);
        b->request = lb_alloc(b->request_len + 1);
        lb__rpc_request__pack(r, b->request);
    }
    if (!b->n && b->kind == LB__RPC_REQUEST__KIND_FILL_KEY) {
        batch_free(d);
        lb_fail(err, LB_E_NOT_FOUND, "no VM of this host waits for a key");
        return lb_remedy(err, "`lifeboat ls` shows the state of each");
    }
    return 0;
}

void lb_op_batch(struct daemon *d, struct client *c, const Lb__RpcRequest *r)
{
    struct lb_error err = LB_ERROR_INIT;
    json_t *o;

    if (d->batch && (d->batch->kind != r->kind_case || r->kind_case == LB__RPC_REQUEST__KIND_FILL_KEY)) {
        lb_fail(&err, LB_E_STATE, "another request for all VMs (%s) is under way", what_of(d->batch));
        lb_remedy(&err, "wait until it is done");
    } else if (!d->batch) {
        batch_begin(d, r, &err);
    }
    if (err.code) {
        lb_client_failure(c, &err, NULL);
        return;
    }
    lb_client_wait(c, LB_BATCH_NAME, LB_WAIT_BATCH, 0, NULL);
    o = json_object();
    json_object_set_new(o, "event", json_string("started"));
    json_object_set_new(o, "what", json_string(what_of(d->batch)));
    json_object_set_new(o, "total", json_integer(d->batch->n));
    LB_AUTO_FREE char *text = lb_json_dump(o);
    lb_client_event(c, text);
    lb_batch_step(d);
}
