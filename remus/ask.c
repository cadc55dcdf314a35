/* remus/ask.c - see ask.h. Whatever is not plainly allowed is refused. */
#include "remus/ask.h"

#include <fcntl.h>
#include <jansson.h>
#include <string.h>
#include <sys/stat.h>

#include "core/json.h"
#include "remus/record.h"

#define HISTORY_BYTES (1 << 20) /* from the end; some 2,000 migrations */

struct facts {
    const char *state_dir, *peer;
    char key[LB_KEY_TEXT_BYTES];
    struct lb_vm_entry e;
    struct lb_asked *out;
};

static int refuse(const struct facts *f, const char *what, struct lb_error *err)
{
    lb_fail(err, LB_E_AUTH, "host %s may not ask for %s of VM %s", f->peer, what, f->out->vm);
    return lb_remedy(err, "say it on the host itself");
}

/* ------------------------------------------------------------------ who is it? */

static bool came_by(const struct facts *f)
{
    return lb_came_by_has(f->e.came_by, f->key);
}

static bool came_from(const struct facts *f)
{
    size_t list = strlen(f->e.came_by), key = strlen(f->key);

    return came_by(f) && !strcmp(f->e.came_by + list - key, f->key);
}

static bool named_in_wish(const struct facts *f)
{
    LB_AUTO_FREE struct lb_protect_wish *w = lb_alloc(sizeof(*w));

    if (lb_wish_load(f->state_dir, f->e.name, w, NULL))
        return false;
    for (unsigned i = 0; i < w->n_backups; i++)
        if (!strcmp(w->backups[i], f->peer))
            return true;
    return false;
}

static bool runs_here(const struct facts *f)
{
    return f->e.state == LB_VM_RUNNING || f->e.state == LB_VM_PROTECTED;
}

static bool other_side(const struct facts *f, enum lb_vm_state state)
{
    return f->e.state == state && !strcmp(f->e.peer, f->peer);
}

/* ------------------------------------------------------------------ where did it go? */

/* The end of the history; *len 0 when there is none. */
static char *history_tail(const char *state_dir, size_t *len)
{
    LB_AUTO_FREE char *path = lb_asprintf("%s/history.jsonl", state_dir);
    LB_AUTO_FD int fd = open(path, O_RDONLY | O_CLOEXEC);
    char *buf = lb_alloc(HISTORY_BYTES + 1);
    struct stat st;
    ssize_t n = -1;

    if (fd >= 0 && !fstat(fd, &st))
        n = pread(fd, buf, HISTORY_BYTES, LB_MAX(st.st_size - HISTORY_BYTES, 0));
    *len = n > 0 ? (size_t)n : 0;
    return buf;
}

static bool left_here(const json_t *line)
{
    const char *direction = json_string_value(json_object_get(line, "direction"));
    const char *final = json_string_value(json_object_get(line, "final_state"));

    return direction && final && !strcmp(final, "moved") &&
           (!strcmp(direction, "out") || !strcmp(direction, "failed-over"));
}

static bool arrived_here(const json_t *line)
{
    const char *direction = json_string_value(json_object_get(line, "direction"));

    return direction && (!strcmp(direction, "in") || !strcmp(direction, "failover"));
}

/* Only a host from which the VM came is told. */
static void find_moved_on(const struct facts *f)
{
    char *save = NULL, went[128] = "";
    bool theirs = false;
    size_t len;
    LB_AUTO_FREE char *text = history_tail(f->state_dir, &len);

    for (char *s = strtok_r(text, "\n", &save); s; s = strtok_r(NULL, "\n", &save)) {
        json_t *line = json_loads(s, 0, NULL);
        const char *vm = json_string_value(json_object_get(line, "vm"));
        const char *host = json_string_value(json_object_get(line, "host"));

        if (vm && host && !strcmp(vm, f->out->vm)) {
            theirs = theirs || (arrived_here(line) && !strcmp(host, f->peer));
            snprintf(went, sizeof(went), "%s", left_here(line) ? host : "");
        }
        json_decref(line);
    }
    if (theirs)
        snprintf(f->out->moved_on, sizeof(f->out->moved_on), "%s", went);
}

static int runs_there(const struct facts *f, struct lb_error *err)
{
    lb_fail(err, LB_E_NOT_FOUND, "VM %s does not run here any more: it went on to host %s", f->out->vm,
            f->out->moved_on);
    return lb_remedy(err, "`lifeboat status %s` there shows it", f->out->vm);
}

static int not_here(const struct facts *f, struct lb_error *err)
{
    find_moved_on(f);
    if (f->out->moved_on[0])
        return runs_there(f, err);
    lb_fail(err, LB_E_NOT_FOUND, "there is no VM named %s here", f->out->vm);
    return lb_remedy(err, "`lifeboat ls` on each host shows where it runs");
}

/* ------------------------------------------------------------------- what is asked? */

static int allow_failover(const struct facts *f, const Lb__RpcName *r, struct lb_error *err)
{
    if (r->force)
        return refuse(f, "a failover by force", err);
    f->out->already = runs_here(f) && came_from(f);
    if (!f->out->already && !other_side(f, LB_VM_STANDBY))
        return refuse(f, "a failover", err);
    lb__rpc_name__init(&f->out->name);
    f->out->name.name = f->out->vm;
    f->out->r.kind_case = LB__RPC_REQUEST__KIND_FAILOVER;
    f->out->r.failover = &f->out->name;
    return 0;
}

static int allow_protect(const struct facts *f, const Lb__RpcProtect *r, struct lb_error *err)
{
    Lb__RpcProtect *p = &f->out->protect;

    if (!runs_here(f) || (!other_side(f, LB_VM_PROTECTED) && !came_by(f) && !named_in_wish(f)))
        return refuse(f, "another backup", err);
    if (r->witness[0] || r->insecure_plaintext)
        return refuse(f, "another kind of protection", err);
    if (!r->n_backups || r->n_backups > LB_PROTECT_MAX_BACKUPS)
        return lb_fail(err, LB_E_USAGE, "from 1 to %d backups can be named", LB_PROTECT_MAX_BACKUPS);
    lb__rpc_protect__init(p);
    p->name = f->out->vm;
    p->n_backups = r->n_backups;
    p->backups = r->backups;
    p->change = true;
    f->out->r.kind_case = LB__RPC_REQUEST__KIND_PROTECT;
    f->out->r.protect = p;
    return 0;
}

static int allow_migrate(const struct facts *f, const Lb__RpcMigrate *r, struct lb_error *err)
{
    static const Lb__MigrateOptions none = LB__MIGRATE_OPTIONS__INIT;
    const Lb__MigrateOptions *o = r->options ? r->options : &none;
    struct lb_asked *out = f->out;

    if (r->host[0] && strcmp(r->host, f->peer))
        return refuse(f, "a migration to another host", err);
    if (other_side(f, LB_VM_STANDBY)) {
        lb_fail(err, LB_E_STATE, "VM %s runs on host %s, which asks for it", out->vm, f->peer);
        return lb_remedy(err, "`lifeboat status %s` there shows it", out->vm);
    }
    if (f->e.state == LB_VM_STANDBY && came_by(f)) {
        snprintf(out->moved_on, sizeof(out->moved_on), "%s", f->e.peer);
        return runs_there(f, err);
    }
    if (!runs_here(f) || !came_by(f))
        return refuse(f, "a migration", err);
    if (o->insecure_plaintext)
        return refuse(f, "a migration that anybody can read", err);
    lb__migrate_options__init(&out->options);
    out->options.bandwidth_bytes_per_s = o->bandwidth_bytes_per_s;
    out->options.max_downtime_ms = o->max_downtime_ms;
    out->options.timeout_ms = o->timeout_ms;
    out->options.verify = o->verify;
    out->options.no_throttle = o->no_throttle;
    lb__rpc_migrate__init(&out->migrate);
    out->migrate.name = out->vm;
    out->migrate.host = (char *)f->peer;
    out->migrate.options = &out->options;
    out->r.kind_case = LB__RPC_REQUEST__KIND_MIGRATE;
    out->r.migrate = &out->migrate;
    return 0;
}

static int allow_status(const struct facts *f, struct lb_error *err)
{
    if (!came_by(f) && !other_side(f, LB_VM_STANDBY) && !other_side(f, LB_VM_PROTECTED) &&
        !named_in_wish(f))
        return refuse(f, "the status", err);
    lb__rpc_name__init(&f->out->name);
    f->out->name.name = f->out->vm;
    f->out->r.kind_case = LB__RPC_REQUEST__KIND_STATUS;
    f->out->r.status = &f->out->name;
    return 0;
}

const char *lb_ask_vm(const Lb__RpcRequest *r)
{
    switch (r->kind_case) {
    case LB__RPC_REQUEST__KIND_FAILOVER:
        return r->failover->name;
    case LB__RPC_REQUEST__KIND_PROTECT:
        return r->protect->name;
    case LB__RPC_REQUEST__KIND_MIGRATE:
        return r->migrate->name;
    case LB__RPC_REQUEST__KIND_STATUS:
        return r->status->name;
    default:
        return NULL;
    }
}

int lb_ask_allow(const char *state_dir, const char *peer, const uint8_t key[LB_KEY_BYTES],
                 const Lb__RpcRequest *r, struct lb_asked *out, struct lb_error *err)
{
    struct facts f = {.state_dir = state_dir, .peer = peer, .out = out};
    struct lb_error why = LB_ERROR_INIT;
    const char *vm = lb_ask_vm(r);

    *out = (struct lb_asked){.r = LB__RPC_REQUEST__INIT};
    if (!vm) {
        lb_fail(err, LB_E_AUTH, "host %s may not ask for that", peer);
        return lb_remedy(err, "say it on the host itself");
    }
    if (!lb_vm_name_valid(vm))
        return lb_fail(err, LB_E_PROTO, "the VM's name is not valid");
    snprintf(out->vm, sizeof(out->vm), "%s", vm);
    lb_key_format(f.key, key);
    if (lb_vm_entry_load(state_dir, vm, &f.e, &why)) {
        if (why.code == LB_E_NOT_FOUND)
            return not_here(&f, err);
        if (err)
            *err = why;
        return -1;
    }
    switch (r->kind_case) {
    case LB__RPC_REQUEST__KIND_FAILOVER:
        return allow_failover(&f, r->failover, err);
    case LB__RPC_REQUEST__KIND_PROTECT:
        return allow_protect(&f, r->protect, err);
    case LB__RPC_REQUEST__KIND_MIGRATE:
        return allow_migrate(&f, r->migrate, err);
    default:
        return allow_status(&f, err);
    }
}
