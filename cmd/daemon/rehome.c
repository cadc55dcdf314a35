/*
 * cmd/daemon/rehome.c - a protected VM goes to another host, or gets another backup.
 *
 *   migrate NAME HOST            CHECK  would HOST take it? Its preflight, while the protection goes on (remus/ahead.c)
 *                                END    the session that protects is told to end; the wish stays
 *                                       the migration, as of any VM; the wish travels with it, and HOST protects again
 *                                To its backup's host: that is asked to take it over (role "ask"), nothing is copied.
 *   protect NAME --backup X,Y    CHECK  would X be the backup? Else Y?
 *     of a VM that has a backup  END    the wish names X first now; the session is told to end
 *                                BEGIN  protected by X; else by the others of the wish, the old one last
 *
 * There is one backup per protection, so the VM is without one from END until the next first epoch is complete: that time
 * is measured (unprotected_ms) and shown by status. No step can be forgotten half-way: the wish is on disk
 * where the VM is all the time, and whoever finds it there with no session protects the VM (protect.c). What is in
 * memory here is only who waits for an answer.
 */
#include "cmd/daemon/daemon.h"

#include <string.h>

enum step { R_CHECK, R_END, R_BEGIN };

struct rehome {
    LIST_ENTRY(rehome) link;
    struct daemon *d;
    char vm[128];
    enum step step;
    Lb__RpcRequest *r;    /* migrate or protect */
    lb_moved_fn *done;    /* migrate: who is told */
    char check[33];       /* session of role "check" at work; "" */
    size_t next;          /* protect: which of the named hosts is asked */
    struct lb_error why;  /* the first refusal */
};

static bool is(const struct session *s, const char *role)
{
    return s && !strcmp(s->role, role);
}

static struct rehome *find(struct daemon *d, const char *vm)
{
    struct rehome *h;

    LIST_FOREACH (h, &d->rehomes, link)
        if (!strcmp(h->vm, vm))
            return h;
    return NULL;
}

static struct rehome *begin(struct daemon *d, const char *vm, const Lb__RpcRequest *r)
{
    struct rehome *h = lb_alloc(sizeof(*h));
    size_t n = lb__rpc_request__get_packed_size(r);
    LB_AUTO_FREE uint8_t *buf = lb_alloc(n + 1);

    lb__rpc_request__pack(r, buf);
    h->r = lb__rpc_request__unpack(NULL, n, buf);
    h->d = d;
    snprintf(h->vm, sizeof(h->vm), "%s", vm);
    LIST_INSERT_HEAD(&d->rehomes, h, link);
    return h;
}

static bool moves(const struct rehome *h)
{
    return h->r->kind_case == LB__RPC_REQUEST__KIND_MIGRATE;
}

/* The host that is asked now. */
static const char *target(const struct rehome *h)
{
    return moves(h) ? h->r->migrate->host : h->r->protect->backups[h->next];
}

/* It is over; out: the migration has begun, json: another backup follows it, e: neither. */
static void end(struct rehome *h, struct session *out, const char *json, const struct lb_error *e)
{
    LIST_REMOVE(h, link);
    if (e)
        lb_log(LB_LOG_WARN, "vm=%s %s: %s", h->vm, moves(h) ? "migrate" : "another backup", e->message);
    if (moves(h))
        h->done(h->d, h->vm, out, e);
    else
        lb_clients_settle(h->d, h->vm, LB_WAIT_REHOMED, json, e);
    lb__rpc_request__free_unpacked(h->r, NULL);
    free(h);
}

/* ----------------------------------------------------------------------- steps */

static bool asked_for(const struct rehome *h, const char *host)
{
    for (size_t i = 0; i < h->r->protect->n_backups; i++)
        if (!strcmp(h->r->protect->backups[i], host))
            return true;
    return false;
}

/* The named hosts, the chosen one first, before those of the wish; a wish for any host stays one. */
static int change_wish(struct rehome *h, struct lb_error *err)
{
    LB_AUTO_FREE struct lb_protect_wish *old = lb_alloc(sizeof(*old)), *w = lb_alloc(sizeof(*w));
    const Lb__RpcProtect *r = h->r->protect;

    if (lb_wish_load(h->d->opt.state_dir, h->vm, old, err))
        return -1;
    if (!old->n_backups)
        return 0;
    *w = *old;
    w->n_backups = 0;
    for (size_t i = 0; i < r->n_backups; i++)
        snprintf(w->backups[w->n_backups++], sizeof(w->backups[0]), "%s",
                 r->backups[(h->next + i) % r->n_backups]);
    for (unsigned i = 0; i < old->n_backups && w->n_backups < LB_PROTECT_MAX_BACKUPS; i++)
        if (!asked_for(h, old->backups[i]))
            snprintf(w->backups[w->n_backups++], sizeof(w->backups[0]), "%s", old->backups[i]);
    return lb_wish_save(h->d->opt.state_dir, h->vm, w, err);
}

/* Who waits for its protection here has waited long enough: it goes on where the VM goes. */
static void tell_protecting(const struct rehome *h)
{
    struct lb_error e = LB_ERROR_INIT;

    lb_fail(&e, LB_E_STATE, "VM %s is being migrated to host %s, which protects it then", h->vm, target(h));
    lb_remedy(&e, "`lifeboat status %s` there shows it", h->vm);
    lb_clients_settle(h->d, h->vm, LB_WAIT_PROTECTED, NULL, &e);
}

/* Nothing protects it any more. */
static void go_on(struct rehome *h, const char *old_backup)
{
    struct lb_error err = LB_ERROR_INIT;
    struct session *s;

    if (moves(h)) {
        tell_protecting(h);
        s = lb_session_spawn(h->d, "out", h->vm, target(h), h->r->migrate->options, -1, &err);
        end(h, s, NULL, s ? NULL : &err);
    } else {
        h->step = R_BEGIN;
        lb_protect_next(h->d, h->vm, target(h), old_backup);
    }
}

static void end_protection(struct rehome *h)
{
    struct session *s = lb_session_of_vm(h->d, h->vm);
    struct lb_error err = LB_ERROR_INIT;
    struct lb_vm_entry e;

    if (lb_vm_entry_load(h->d->opt.state_dir, h->vm, &e, &err) || (!moves(h) && change_wish(h, &err))) {
        end(h, NULL, NULL, &err);
        return;
    }
    h->step = R_END;
    if (is(s, "protect")) {
        lb_protect_end_for_now(h->d, h->vm);
    } else if ((!s || is(s, "in")) && e.state == LB_VM_RUNNING) { /* there is nothing to end, or not any more */
        go_on(h, "");
    } else {
        lb_fail(&err, LB_E_STATE, "VM %s is %s, and is not protected any more", h->vm,
                lb_vm_state_name(e.state));
        lb_remedy(&err, "`lifeboat status %s` shows what is done about it", h->vm);
        end(h, NULL, NULL, &err);
    }
}

/* Would the host take it? One whose backup is not complete has nothing to lose, and nothing to ask with. */
static void check(struct rehome *h)
{
    const struct session *p = lb_session_of_vm(h->d, h->vm);
    struct lb_error err = LB_ERROR_INIT;
    struct session *s;

    if (!is(p, "protect") || !p->protected_ns) {
        end_protection(h);
        return;
    }
    s = lb_session_spawn_for(h->d, "check", "", target(h), h->r, &err);
    if (s)
        snprintf(h->check, sizeof(h->check), "%s", s->id);
    else
        end(h, NULL, NULL, &err);
}

void lb_rehome_checked(struct session *s)
{
    struct rehome *h;

    LIST_FOREACH (h, &s->d->rehomes, link)
        if (h->step == R_CHECK && !strcmp(h->check, s->id))
            break;
    if (!h)
        return;
    h->check[0] = '\0';
    if (!s->error.code || s->error.code == LB_E_NOT_FOUND) {
        end_protection(h);
        return;
    }
    if (!h->why.code)
        h->why = s->error;
    if (!moves(h) && h->next + 1 < h->r->protect->n_backups) {
        h->next++;
        check(h);
    } else {
        end(h, NULL, NULL, &h->why);
    }
}

bool lb_rehome_ended(struct session *s, bool here)
{
    struct rehome *h = find(s->d, s->vm);
    struct lb_error err = s->error;

    if (!h)
        return false;
    if (h->step == R_BEGIN && here) {
        if (!h->why.code)
            h->why = s->error;
        return false;
    }
    if (h->step == R_END && here) {
        go_on(h, s->peer);
        return true;
    }
    if (here) /* ended by itself while another host was asked: see end_protection */
        return false;
    if (!err.code)
        lb_fail(&err, LB_E_STATE, "VM %s runs on host %s now", s->vm, s->peer);
    end(h, NULL, NULL, &err);
    return false;
}

void lb_rehome_protected(struct session *s, const char *json)
{
    struct rehome *h = find(s->d, s->vm);
    struct lb_error err = LB_ERROR_INIT;

    if (!h || h->step != R_BEGIN)
        return;
    if (asked_for(h, s->peer)) {
        end(h, NULL, json, NULL);
        return;
    }
    lb_fail(&err, h->why.code ? h->why.code : LB_E_STATE, "VM %s is protected by host %s, not by host %s: %.300s",
            s->vm, s->peer, target(h), h->why.message);
    lb_remedy(&err, "%s", h->why.remedy);
    end(h, NULL, NULL, &err);
}

void lb_rehome_unprotected(struct daemon *d, const char *vm, const struct lb_error *e)
{
    struct rehome *h = find(d, vm);
    struct lb_error err = LB_ERROR_INIT;

    if (!h || h->step != R_BEGIN)
        return;
    lb_fail(&err, e->code, "VM %s runs unprotected, no host would be its backup: %.300s", vm,
            h->why.code ? h->why.message : e->message);
    lb_remedy(&err, "it is tried again by itself; %.300s", h->why.code ? h->why.remedy : e->remedy);
    end(h, NULL, NULL, &err);
}

void lb_rehome_drop(struct daemon *d, const char *vm)
{
    struct rehome *h = find(d, vm);
    struct lb_error err = LB_ERROR_INIT;

    if (!h)
        return;
    lb_fail(&err, LB_E_CANCELLED, "VM %s is not to be protected any more: somebody said `lifeboat unprotect`", vm);
    lb_remedy(&err, "it runs here; say again what is to be done with it");
    end(h, NULL, NULL, &err);
}

/* -------------------------------------------------------------------- requests */

static int not_twice(struct daemon *d, const char *vm, struct lb_error *err)
{
    struct rehome *h = find(d, vm);

    if (!h)
        return 0;
    lb_fail(err, LB_E_STATE, "VM %s is already about to get %s %s", vm,
            moves(h) ? "a migration to host" : "another backup, host", target(h));
    return lb_remedy(err, "wait; `lifeboat status %s` shows how far it is", vm);
}

bool lb_protect_backed_by(const struct session *s, const char *host)
{
    return is(s, "protect") && s->protected_ns && !strcmp(s->peer, host);
}

struct session *lb_protect_swap(struct daemon *d, const char *vm, const char *host, struct lb_error *err)
{
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;
    Lb__RpcName name = LB__RPC_NAME__INIT;

    name.name = (char *)vm;
    r.kind_case = LB__RPC_REQUEST__KIND_FAILOVER;
    r.failover = &name;
    return lb_session_spawn_for(d, "ask", vm, host, &r, err);
}

/* The VM is to go where its backup is: nothing is copied. */
static void swap(struct daemon *d, const Lb__RpcMigrate *m, lb_moved_fn *done)
{
    struct lb_error err = LB_ERROR_INIT;
    struct session *s = lb_protect_swap(d, m->name, m->host, &err);

    done(d, m->name, s, s ? NULL : &err);
}

void lb_protect_move(struct daemon *d, const Lb__RpcMigrate *m, lb_moved_fn *done)
{
    const struct session *s = lb_session_of_vm(d, m->name);
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;
    struct lb_error err = LB_ERROR_INIT;
    struct rehome *h;

    if (not_twice(d, m->name, &err)) {
        done(d, m->name, NULL, &err);
        return;
    }
    if (lb_protect_backed_by(s, m->host)) {
        swap(d, m, done);
        return;
    }
    r.kind_case = LB__RPC_REQUEST__KIND_MIGRATE;
    r.migrate = (Lb__RpcMigrate *)m;
    h = begin(d, m->name, &r);
    h->done = done;
    check(h);
}

/* What who waits for a migration is told. */
static void tell_moved(struct daemon *d, const char *vm, struct session *out, const struct lb_error *e)
{
    if (out)
        lb_clients_pass_on(d, vm, LB_WAIT_REHOMED, out);
    else
        lb_clients_settle(d, vm, LB_WAIT_REHOMED, NULL, e);
}

/* To the host of its backup: that is ready to take it over, as it shows 40 times a second. */
static void ready_there(struct client *c, const Lb__RpcMigrate *m)
{
    json_t *o = json_object();

    json_object_set_new(o, "vm", json_string(m->name));
    json_object_set_new(o, "host", lb_json_text(m->host));
    json_object_set_new(o, "dry_run", json_true());
    json_object_set_new(o, "ok", json_true());
    json_object_set_new(o, "checks", json_pack("[{s:s,s:s,s:s,s:s}]", "id", "protection", "status", "ok", "message",
                                               "it is the backup: it takes the VM over, nothing is copied",
                                               "remedy", ""));
    LB_AUTO_FREE char *json = lb_json_dump(o);
    lb_client_result(c, json);
}

/* Nothing but the preflight: the protection goes on. */
static void dry_run(struct daemon *d, struct client *c, const Lb__RpcMigrate *m)
{
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;
    struct lb_error err = LB_ERROR_INIT;
    struct session *s;

    r.kind_case = LB__RPC_REQUEST__KIND_MIGRATE;
    r.migrate = (Lb__RpcMigrate *)m;
    s = lb_session_spawn_for(d, "check", "", m->host, &r, &err);
    if (s)
        lb_client_watch(c, s, true);
    else
        lb_client_failure(c, &err, NULL);
}

void lb_op_move(struct daemon *d, struct client *c, const Lb__RpcMigrate *m)
{
    const struct session *s = lb_session_of_vm(d, m->name);

    if (m->options && m->options->dry_run) {
        if (lb_protect_backed_by(s, m->host))
            ready_there(c, m);
        else
            dry_run(d, c, m);
        return;
    }
    lb_client_wait(c, m->name, LB_WAIT_REHOMED, 0, NULL);
    lb_protect_move(d, m, tell_moved);
}

static int check_changeable(struct daemon *d, const Lb__RpcProtect *r, struct lb_error *err)
{
    LB_AUTO_FREE struct lb_protect_wish *named = lb_alloc(sizeof(*named));
    struct session *s = lb_session_of_vm(d, r->name);
    struct lb_vm_entry e;

    if (lb_vm_entry_load(d->opt.state_dir, r->name, &e, err) || not_twice(d, r->name, err) ||
        lb_protect_backups(d, r, named, err))
        return -1;
    if (is(s, "protect") || (!s && e.state == LB_VM_RUNNING) || is(s, "in"))
        return 0;
    lb_fail(err, LB_E_STATE, "VM %s is %s%s%s", r->name, lb_vm_state_name(e.state), s ? ", role " : "",
            s ? s->role : "");
    return lb_remedy(err, "wait; `lifeboat status %s` shows what is done with it", r->name);
}

void lb_op_change_backup(struct daemon *d, struct client *c, const Lb__RpcProtect *p)
{
    const struct session *s = lb_session_of_vm(d, p->name);
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;
    struct lb_error err = LB_ERROR_INIT;
    struct rehome *h;

    if (check_changeable(d, p, &err)) {
        lb_client_failure(c, &err, NULL);
        return;
    }
    r.kind_case = LB__RPC_REQUEST__KIND_PROTECT;
    r.protect = (Lb__RpcProtect *)p;
    lb_client_wait(c, p->name, LB_WAIT_REHOMED, 0, NULL);
    h = begin(d, p->name, &r);
    if (is(s, "protect") && !s->protected_ns && asked_for(h, s->peer)) {
        h->step = R_BEGIN; /* just what is being done */
        return;
    }
    if (is(s, "protect") && asked_for(h, s->peer)) {
        json_t *o = json_object();

        json_object_set_new(o, "vm", json_string(p->name));
        json_object_set_new(o, "host", lb_json_text(s->peer));
        json_object_set_new(o, "protected", json_true());
        json_object_set_new(o, "already", json_true());
        LB_AUTO_FREE char *json = lb_json_dump(o);
        end(h, NULL, json, NULL);
        return;
    }
    check(h);
}
