/*
 * cmd/daemon/rpc_server.c - the CLI's side door.
 *
 * One request per connection. It is answered at once from files, by a worker
 * process that takes the connection over, or by watching a session: then
 * events follow until the session ends. What concerns a protection is waited for by
 * the VM's name: several sessions may follow each other before it is reached. A client
 * that goes away changes nothing: sessions and workers go on.
 */
#include "cmd/daemon/ckpt.h"

#include <errno.h>
#include <event2/buffer.h>
#include <event2/listener.h>
#include <fcntl.h>
#include <sodium.h>
#include <string.h>

#define EVENT_BACKLOG_BYTES (256u << 10) /* a slow reader loses progress, not results */
#define CANCEL_TIMEOUT_S 30

struct client {
    LIST_ENTRY(client) link;
    struct daemon *d;
    struct bufferevent *bev;
    struct session *watching;
    bool all;                 /* not content with a guest that runs while its memory comes */
    bool cancelling;          /* watches only to learn how the cancelled session ends */
    char vm[128];             /* of a cancel, or of what is waited for */
    enum lb_wait wait;
    uint8_t *then;            /* packed RpcRequest to carry out after the wait; NULL */
    size_t then_len;
    bool closing;
    struct event *timeout;    /* of a cancel or a wait */
};

static void client_free(struct client *c)
{
    LIST_REMOVE(c, link);
    c->d->n_clients--;
    if (c->timeout)
        event_free(c->timeout);
    if (c->bev)
        bufferevent_free(c->bev);
    if (c->watching)
        lb_ckpt_abandon(c->watching);
    free(c->then);
    free(c);
}

static void send_reply(struct client *c, const Lb__RpcReply *r, bool last)
{
    struct lb_error err = LB_ERROR_INIT;
    size_t len;
    LB_AUTO_FREE uint8_t *buf = lb_rpc_frame(&r->base, &len, &err);

    if (!buf) {
        Lb__RpcReply fr = LB__RPC_REPLY__INIT;
        Lb__RpcFailure f = LB__RPC_FAILURE__INIT;

        if (!last)
            return;
        f.code = err.code;
        f.message = err.message;
        fr.kind_case = LB__RPC_REPLY__KIND_FAILURE;
        fr.failure = &f;
        buf = lb_rpc_frame(&fr.base, &len, NULL);
    }
    bufferevent_write(c->bev, buf, len);
    if (last) {
        c->closing = true;
        c->watching = NULL;
        c->wait = LB_WAIT_NONE;
    }
}

void lb_client_event(struct client *c, const char *json)
{
    Lb__RpcReply r = LB__RPC_REPLY__INIT;

    if (c->closing ||
        evbuffer_get_length(bufferevent_get_output(c->bev)) > EVENT_BACKLOG_BYTES)
        return;
    r.kind_case = LB__RPC_REPLY__KIND_EVENT_JSON;
    r.event_json = (char *)json;
    send_reply(c, &r, false);
}

void lb_client_result(struct client *c, const char *json)
{
    Lb__RpcReply r = LB__RPC_REPLY__INIT;

    if (c->closing)
        return;
    r.kind_case = LB__RPC_REPLY__KIND_RESULT_JSON;
    r.result_json = (char *)(json ? json : "{}");
    send_reply(c, &r, true);
}

void lb_client_failure(struct client *c, const struct lb_error *e, const char *json)
{
    Lb__RpcReply r = LB__RPC_REPLY__INIT;
    Lb__RpcFailure f = LB__RPC_FAILURE__INIT;

    if (c->closing)
        return;
    f.code = e->code;
    f.message = (char *)e->message;
    f.remedy = (char *)e->remedy;
    f.json = (char *)(json ? json : "");
    r.kind_case = LB__RPC_REPLY__KIND_FAILURE;
    r.failure = &f;
    send_reply(c, &r, true);
}

/* ------------------------------------------------------- watching a session */

void lb_clients_event(struct session *s, const char *json)
{
    struct client *c;

    LIST_FOREACH (c, &s->d->clients, link)
        if (c->watching == s && !c->cancelling)
            lb_client_event(c, json);
}

void lb_client_watch(struct client *c, struct session *s, bool all)
{
    json_t *ev = json_object();

    c->watching = s;
    c->all = all;
    json_object_set_new(ev, "event", json_string("started"));
    json_object_set_new(ev, "vm", lb_json_text(s->vm));
    if (s->peer[0])
        json_object_set_new(ev, "host", lb_json_text(s->peer));
    json_object_set_new(ev, "session", json_string(s->id));
    LB_AUTO_FREE char *text = lb_json_dump(ev);
    lb_client_event(c, text);
}

static void too_late(struct client *c, const struct session *s, const char *json)
{
    struct lb_error e = LB_ERROR_INIT;

    if (!strcmp(s->role, "out")) {
        lb_fail(&e, LB_E_STATE, "too late: VM %s runs on host %s now", s->vm, s->peer);
        lb_remedy(&e, "migrate it back from there");
    } else {
        lb_fail(&e, LB_E_STATE, "too late: it is done");
        lb_remedy(&e, "`lifeboat status %s` shows how VM %s is", s->vm, s->vm);
    }
    lb_client_failure(c, &e, json);
}

void lb_clients_running(struct session *s, const char *json)
{
    struct client *c;

    LIST_FOREACH (c, &s->d->clients, link) {
        if (c->watching != s)
            continue;
        if (c->cancelling)
            too_late(c, s, json);
        else if (!c->all)
            lb_client_result(c, json);
    }
}

void lb_clients_result(struct session *s, const char *json)
{
    struct client *c;

    LIST_FOREACH (c, &s->d->clients, link) {
        if (c->watching != s)
            continue;
        if (c->cancelling)
            too_late(c, s, json);
        else
            lb_client_result(c, json);
    }
}

void lb_clients_failure(struct session *s, const struct lb_error *e, const char *json)
{
    struct client *c;

    LIST_FOREACH (c, &s->d->clients, link) {
        if (c->watching != s)
            continue;
        if (c->cancelling && e->code != LB_E_UNDECIDED) {
            json_t *o = json_object();

            json_object_set_new(o, "vm", lb_json_text(s->vm));
            json_object_set_new(o, "host", lb_json_text(s->peer));
            json_object_set_new(o, "cancelled", json_boolean(e->code == LB_E_CANCELLED));
            json_object_set_new(o, "message", lb_json_text(e->message));
            LB_AUTO_FREE char *text = lb_json_dump(o);
            lb_client_result(c, text);
        } else {
            lb_client_failure(c, e, json);
        }
    }
}

/* ---------------------------------------------- waiting for what becomes of a VM */

static void on_wait_timeout(evutil_socket_t fd, short what, void *arg)
{
    struct client *c = arg;
    struct lb_error e = LB_ERROR_INIT;

    (void)fd;
    (void)what;
    lb_fail(&e, LB_E_STATE, "VM %s: %s was asked for, but has not come about yet", c->vm,
            c->wait == LB_WAIT_OFF ? "the end of its protection" : "a failover");
    lb_remedy(&e, "`lifeboat status %s` shows what it waits for", c->vm);
    lb_client_failure(c, &e, NULL);
}

void lb_client_wait(struct client *c, const char *vm, enum lb_wait what, unsigned timeout_s,
                    const Lb__RpcRequest *then)
{
    struct timeval limit = {timeout_s, 0};

    c->wait = what;
    snprintf(c->vm, sizeof(c->vm), "%s", vm);
    if (then) {
        c->then_len = lb__rpc_request__get_packed_size(then);
        c->then = lb_alloc(c->then_len + 1);
        lb__rpc_request__pack(then, c->then);
    }
    c->timeout = timeout_s ? evtimer_new(c->d->base, on_wait_timeout, c) : NULL;
    if (c->timeout)
        evtimer_add(c->timeout, &limit);
}

void lb_clients_tell(struct daemon *d, const char *vm, const char *json)
{
    struct client *c;

    LIST_FOREACH (c, &d->clients, link)
        if (c->wait != LB_WAIT_NONE && !strcmp(c->vm, vm))
            lb_client_event(c, json);
}

static bool to_worker(struct client *c, const Lb__RpcRequest *r);

void lb_clients_settle(struct daemon *d, const char *vm, enum lb_wait what, const char *json,
                       const struct lb_error *e)
{
    struct client *c, *next;

    for (c = LIST_FIRST(&d->clients); c; c = next) {
        next = LIST_NEXT(c, link);
        if (c->wait != what || strcmp(c->vm, vm))
            continue;
        if (e) {
            lb_client_failure(c, e, NULL);
        } else if (c->then) {
            Lb__RpcRequest *r = lb__rpc_request__unpack(NULL, c->then_len, c->then);

            to_worker(c, r);
            lb__rpc_request__free_unpacked(r, NULL);
        } else {
            lb_client_result(c, json);
        }
    }
}

void lb_clients_pass_on(struct daemon *d, const char *vm, enum lb_wait what, struct session *s)
{
    struct client *c;

    LIST_FOREACH (c, &d->clients, link)
        if (c->wait == what && !strcmp(c->vm, vm)) {
            c->wait = LB_WAIT_NONE;
            lb_client_watch(c, s, true);
        }
}

static void start_migrate(struct client *c, const Lb__RpcMigrate *r)
{
    struct daemon *d = c->d;
    struct lb_error err = LB_ERROR_INIT;
    Lb__MigrateOptions none = LB__MIGRATE_OPTIONS__INIT, *o = r->options ? r->options : &none;
    struct lb_hosts hosts = {0};
    struct lb_vm_entry e;
    struct session *s;
    bool known, is_protected;

    if (lb_vm_entry_load(d->opt.state_dir, r->name, &e, &err) ||
        lb_hosts_load(d->opt.state_dir, &hosts, &err)) {
        lb_client_failure(c, &err, NULL);
        return;
    }
    known = lb_hosts_by_name(&hosts, r->host) != NULL;
    lb_hosts_free(&hosts);
    s = lb_session_of_vm(d, r->name);
    is_protected = s && !strcmp(s->role, "protect");
    if (lb_protect_refuse(d, &e, "migrate", &err) || lb_ckpt_refuse(d, &e, &err)) {
        /* err says it */
    } else if (!known) {
        lb_fail(&err, LB_E_NOT_FOUND, "host %.100s is not known here", r->host);
        lb_remedy(&err, "run `lifeboat host id` there, then `lifeboat host trust %.60s KEY ADDRESS` "
                        "here; `lifeboat host ls` lists the known ones", r->host);
    } else if (s && !strcmp(s->role, "out")) {
        lb_fail(&err, LB_E_STATE, "VM %s is already being migrated to host %s", r->name, s->peer);
        lb_remedy(&err, "`lifeboat status %s` shows how far it is, `lifeboat cancel %s` stops it",
                  r->name, r->name);
    } else if ((lb_session_blocks(s, &e) && !is_protected) || e.state == LB_VM_MIGRATING_OUT ||
               e.state == LB_VM_HANDED_OVER || (!s && e.state == LB_VM_INCOMING)) {
        /* One that has just come in may go on at once: the session waits for its lock. */
        lb_fail(&err, LB_E_STATE, "VM %s is %s%s", r->name, lb_vm_state_name(e.state),
                s && !strcmp(s->role, "recover") ? " and being recovered" : "");
        lb_remedy(&err, "wait, or `lifeboat recover %s`", r->name);
    } else if (e.state == LB_VM_DEAD || !lb_proc_alive(&e.proc)) {
        lb_fail(&err, LB_E_STATE, "VM %s is dead: its process %d is gone", r->name,
                (int)e.proc.pid);
        lb_remedy(&err, "`lifeboat release %s` forgets it", r->name);
    } else if (o->channels > 64 || o->zstd_level > 19 ||
               (o->compress > LB_COMPRESS_ZSTD && o->compress != LB_RPC_COMPRESS_CONFIGURED)) {
        lb_fail(&err, LB_E_USAGE, "at most 64 channels and zstd level 19 are possible");
    } else if (o->transport > LB_TRANSPORT_RDMA) {
        lb_fail(&err, LB_E_USAGE, "transport %u is not known here", o->transport);
    }
    if (err.code) {
        lb_client_failure(c, &err, NULL);
        return;
    }
    if (r->preflight_only)
        o->dry_run = true;
    if (is_protected) {
        lb_op_move(d, c, r);
        return;
    }
    s = lb_session_spawn(d, "out", r->name, r->host, o, -1, &err);
    if (!s) {
        lb_client_failure(c, &err, NULL);
        return;
    }
    lb_client_watch(c, s, true);
}

static void on_cancel_timeout(evutil_socket_t fd, short what, void *arg)
{
    struct client *c = arg;
    struct lb_error e = LB_ERROR_INIT;

    (void)fd;
    (void)what;
    lb_fail(&e, LB_E_STATE, "VM %s: asked to cancel, but its session has not ended yet", c->vm);
    lb_remedy(&e, "`lifeboat status %s` shows what it waits for", c->vm);
    lb_client_failure(c, &e, NULL);
}

static void start_cancel(struct client *c, const Lb__RpcName *r)
{
    struct timeval limit = {CANCEL_TIMEOUT_S, 0};
    struct lb_error err = LB_ERROR_INIT;
    struct session *s = lb_session_of_vm(c->d, r->name);
    struct lb_vm_entry e;

    if (lb_ckpt_cancellable(s)) { /* a restore's VM may have no entry yet */
        lb_session_order_cancel(s, &err);
    } else if (lb_vm_entry_load(c->d->opt.state_dir, r->name, &e, &err) ||
               lb_protect_refuse(c->d, &e, "cancel", &err)) {
        /* err says it */
    } else if (e.state == LB_VM_HANDED_OVER ||
               (s && (!strcmp(s->state, "handed-over") || !strcmp(s->state, "done") ||
                      !strcmp(s->state, "undecided")))) {
        lb_fail(&err, LB_E_STATE, "VM %s was handed over to host %s: it cannot be cancelled any more",
                r->name, s ? s->peer : e.peer);
        lb_remedy(&err, "migrate it back when it runs there");
    } else if (e.state == LB_VM_INCOMING) {
        lb_fail(&err, LB_E_STATE, "VM %s is coming in from host %s", r->name, e.peer);
        lb_remedy(&err, "cancel it there");
    } else if (!s || s->ended || strcmp(s->role, "out")) {
        lb_fail(&err, LB_E_STATE, "VM %s is not being migrated, and no checkpoint is at work on it", r->name);
        lb_remedy(&err, "`lifeboat status %s` shows what it does", r->name);
    } else {
        lb_session_order_cancel(s, &err);
    }
    if (err.code) {
        lb_client_failure(c, &err, NULL);
        return;
    }
    c->watching = s;
    c->cancelling = true;
    snprintf(c->vm, sizeof(c->vm), "%s", s->vm);
    c->timeout = evtimer_new(c->d->base, on_cancel_timeout, c);
    if (c->timeout)
        evtimer_add(c->timeout, &limit);
}

/* ------------------------------------------------------------------- dispatch */

/* Takes json. */
static void answer(struct client *c, char *json, const struct lb_error *err)
{
    LB_AUTO_FREE char *mine = json;

    if (mine)
        lb_client_result(c, mine);
    else
        lb_client_failure(c, err, NULL);
}

/* true: the client was handed to a worker and is gone. */
static bool to_worker(struct client *c, const Lb__RpcRequest *r)
{
    struct lb_error err = LB_ERROR_INIT;
    int fd;

    if (c->d->n_workers >= MAX_WORKERS) {
        lb_fail(&err, LB_E_STATE, "lifeboatd is busy with %d requests", MAX_WORKERS);
        lb_remedy(&err, "try again in a moment");
        lb_client_failure(c, &err, NULL);
        return false;
    }
    fd = fcntl(bufferevent_getfd(c->bev), F_DUPFD_CLOEXEC, 3);
    if (fd < 0 || lb_worker_start(c->d, fd, r, &err)) {
        if (fd < 0)
            lb_fail_errno(&err, LB_E_INTERNAL, errno, "cannot pass a connection on");
        lb_client_failure(c, &err, NULL);
        return false;
    }
    client_free(c);
    return true;
}

/* A protected VM: its protection ends before it does, so that the other host does not bring it
 * back. false: not protected. */
static bool stop_protected(struct client *c, const Lb__RpcRequest *r)
{
    struct lb_vm_entry e;

    if (!lb_protect_wanted(c->d, r->stop->name) ||
        lb_vm_entry_load(c->d->opt.state_dir, r->stop->name, &e, NULL) || e.state == LB_VM_DEAD)
        return false;
    lb_op_unprotect(c->d, c, r->stop->name, r);
    return true;
}

/* false: an answer was given. */
static bool may_release(struct client *c, const Lb__RpcName *r)
{
    struct lb_error err = LB_ERROR_INIT;
    struct lb_vm_entry e;

    if (r->force || lb_vm_entry_load(c->d->opt.state_dir, r->name, &e, NULL) ||
        !lb_protect_refuse(c->d, &e, "release", &err))
        return true;
    lb_client_failure(c, &err, NULL);
    return false;
}

static bool dispatch(struct client *c, const Lb__RpcRequest *r)
{
    struct lb_error err = LB_ERROR_INIT;
    struct daemon *d = c->d;

    switch (r->kind_case) {
    case LB__RPC_REQUEST__KIND_LS:
        answer(c, lb_op_ls(d, &err), &err);
        return false;
    case LB__RPC_REQUEST__KIND_HISTORY:
        answer(c, lb_op_history(d, r->history, &err), &err);
        return false;
    case LB__RPC_REQUEST__KIND_HOST_ID:
        answer(c, lb_op_host_id(d, &err), &err);
        return false;
    case LB__RPC_REQUEST__KIND_HOST_TRUST:
        answer(c, lb_op_host_trust(d, r->host_trust, &err), &err);
        return false;
    case LB__RPC_REQUEST__KIND_HOST_LS:
        answer(c, lb_op_host_ls(d, &err), &err);
        return false;
    case LB__RPC_REQUEST__KIND_HOST_FORGET:
        answer(c, lb_op_host_forget(d, r->host_forget, &err), &err);
        return false;
    case LB__RPC_REQUEST__KIND_MIGRATE:
        start_migrate(c, r->migrate);
        return false;
    case LB__RPC_REQUEST__KIND_CANCEL:
        start_cancel(c, r->cancel);
        return false;
    case LB__RPC_REQUEST__KIND_PROTECT:
        lb_op_protect(d, c, r->protect);
        return false;
    case LB__RPC_REQUEST__KIND_UNPROTECT:
        lb_op_unprotect(d, c, r->unprotect->name, NULL);
        return false;
    case LB__RPC_REQUEST__KIND_FAILOVER:
        lb_op_failover(d, c, r->failover);
        return false;
    case LB__RPC_REQUEST__KIND_ASK:
        lb_op_ask(d, c, r->ask);
        return false;
    case LB__RPC_REQUEST__KIND_TOP:
        answer(c, lb_op_top(d, &err), &err);
        return false;
    case LB__RPC_REQUEST__KIND_CHECKPOINT:
        lb_op_checkpoint(d, c, r);
        return false;
    case LB__RPC_REQUEST__KIND_RESTORE:
        lb_op_restore(d, c, r);
        return false;
    case LB__RPC_REQUEST__KIND_CLONE:
        lb_op_clone(d, c, r);
        return false;
    case LB__RPC_REQUEST__KIND_CATALOG:
        if (!strcmp(r->catalog->op, "ls") || !strcmp(r->catalog->op, "show"))
            return to_worker(c, r);
        lb_op_catalog(d, c, r);
        return false;
    case LB__RPC_REQUEST__KIND_SCHEDULE:
        answer(c, lb_op_schedule(d, r->schedule, &err), &err);
        return false;
    case LB__RPC_REQUEST__KIND_SUSPEND_ALL:
    case LB__RPC_REQUEST__KIND_RESUME_ALL:
    case LB__RPC_REQUEST__KIND_FILL_KEY:
        lb_op_batch(d, c, r);
        return false;
    case LB__RPC_REQUEST__KIND_EVACUATE:
        lb_op_evacuate(d, c, r->evacuate);
        return false;
    case LB__RPC_REQUEST__KIND_MAINTENANCE:
        lb_op_maintenance(d, c, r->maintenance);
        return false;
    case LB__RPC_REQUEST__KIND_STOP:
        return stop_protected(c, r) ? false : to_worker(c, r);
    case LB__RPC_REQUEST__KIND_RELEASE:
        return may_release(c, r->release) && to_worker(c, r);
    case LB__RPC_REQUEST__KIND_RUN:
    case LB__RPC_REQUEST__KIND_ADOPT:
    case LB__RPC_REQUEST__KIND_STATUS:
    case LB__RPC_REQUEST__KIND_SHOW:
    case LB__RPC_REQUEST__KIND_RECOVER:
        return to_worker(c, r);
    default:
        break;
    }
    lb_fail(&err, LB_E_PROTO, "this lifeboatd does not know the request");
    lb_remedy(&err, "use a lifeboat of the same version (" LB_VERSION ")");
    lb_client_failure(c, &err, NULL);
    return false;
}

static void on_read(struct bufferevent *bev, void *arg)
{
    struct evbuffer *in = bufferevent_get_input(bev);
    struct client *c = arg;
    struct lb_error err = LB_ERROR_INIT;
    Lb__RpcRequest *r;
    uint8_t head[4], *body;
    uint32_t len;

    if (c->closing || c->watching || c->wait != LB_WAIT_NONE) {
        evbuffer_drain(in, evbuffer_get_length(in));
        return;
    }
    if (evbuffer_copyout(in, head, 4) < 4)
        return;
    len = head[0] | (uint32_t)head[1] << 8 | (uint32_t)head[2] << 16 | (uint32_t)head[3] << 24;
    if (len > LB_RPC_MAX_BYTES) {
        lb_fail(&err, LB_E_PROTO, "a request of %u bytes is too long", len);
        lb_client_failure(c, &err, NULL);
        return;
    }
    if (evbuffer_get_length(in) < 4 + (size_t)len)
        return;
    evbuffer_drain(in, 4);
    body = len ? evbuffer_pullup(in, len) : head;
    r = lb__rpc_request__unpack(NULL, len, body);
    sodium_memzero(body, len); /* there may be a passphrase in it */
    evbuffer_drain(in, len);
    if (!r) {
        lb_fail(&err, LB_E_PROTO, "the request could not be understood");
        lb_client_failure(c, &err, NULL);
        return;
    }
    bufferevent_set_timeouts(bev, NULL, &(struct timeval){30, 0});
    dispatch(c, r);
    lb_ckpt_key_wipe(lb_ckpt_key_of(r));
    lb__rpc_request__free_unpacked(r, NULL);
}

static void on_written(struct bufferevent *bev, void *arg)
{
    struct client *c = arg;

    (void)bev;
    if (c->closing)
        client_free(c);
}

static void on_event(struct bufferevent *bev, short what, void *arg)
{
    (void)bev;
    (void)what;
    client_free(arg);
}

static void on_accept(struct evconnlistener *l, evutil_socket_t fd, struct sockaddr *a, int len,
                      void *arg)
{
    struct daemon *d = arg;
    struct client *c;

    (void)l;
    (void)a;
    (void)len;
    if (d->n_clients >= MAX_CLIENTS) {
        close(fd);
        return;
    }
    c = lb_alloc(sizeof(*c));
    c->d = d;
    c->bev = bufferevent_socket_new(d->base, fd, BEV_OPT_CLOSE_ON_FREE);
    if (!c->bev) {
        close(fd);
        free(c);
        return;
    }
    LIST_INSERT_HEAD(&d->clients, c, link);
    d->n_clients++;
    bufferevent_setcb(c->bev, on_read, on_written, on_event, c);
    bufferevent_setwatermark(c->bev, EV_READ, 0, LB_RPC_MAX_BYTES + 4);
    bufferevent_set_timeouts(c->bev, &(struct timeval){30, 0}, &(struct timeval){30, 0});
    bufferevent_enable(c->bev, EV_READ | EV_WRITE);
}

int lb_rpc_server_start(struct daemon *d, struct lb_error *err)
{
    int fd = lb_unix_listen(d->opt.socket, 0600, err);

    if (fd < 0)
        return -1;
    d->rpc_listener = evconnlistener_new(
        d->base, on_accept, d, LEV_OPT_CLOSE_ON_FREE | LEV_OPT_CLOSE_ON_EXEC, 0, fd);
    if (!d->rpc_listener) {
        close(fd);
        return lb_fail(err, LB_E_INTERNAL, "cannot serve %s", d->opt.socket);
    }
    return 0;
}
