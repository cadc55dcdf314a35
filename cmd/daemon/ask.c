/*
 * cmd/daemon/ask.c - one host asks another to do something with a VM, as if its operator said it there.
 *
 *   asks    role "ask": Ask{request} to the host; its events become progress here; its answer is ours
 *   asked   role "in", then "asked": may that host ask for it (remus/ask.h)? Then we are a client of our own
 *           supervisor, and pass on what it answers
 *
 * Cancel is passed on: a migration is cancelled there, the rest goes on to its end; what has become of it is waited for in
 * any case. When the one who asked goes away, what it asked for goes on, as with any client. A VM that
 * is not there any more is followed where it went, a few hosts far.
 *
 * Role "check" is here too: would a host take a protected VM (rehome.c)?
 */
#include <string.h>

#include "cmd/daemon/session.h"
#include "core/qemu/qemu.h"
#include "migrate/ctl.h"
#include "remus/ask.h"
#include "remus/remus.h"

#define CONNECT_MS 10000u
#define POLL_MS 200
#define ALIVE_NS UINT64_C(5000000000)
#define SILENT_NS UINT64_C(30000000000)
#define RPC_NS UINT64_C(10000000000)
#define MAX_HOPS 4u

/* ---------------------------------------------------------------------- who asks */

struct asking {
    struct sess *s;
    struct lb_identity id;
    struct lb_hosts hosts;
    uint8_t *request;
    size_t request_len;
    bool cancel_sent;
    char moved_on[LB_KEY_TEXT_BYTES]; /* key of the host where the VM is said to be; "" */
};

static int send_ask(struct asking *a, struct lb_chan *c, struct lb_error *err)
{
    Lb__Control m = LB__CONTROL__INIT;
    Lb__Ask ask = LB__ASK__INIT;
    Lb__Hello h = LB__HELLO__INIT;

    lb_ctl_hello(&h, NULL);
    ask.hello = &h;
    ask.request = (ProtobufCBinaryData){a->request_len, a->request};
    m.kind_case = LB__CONTROL__KIND_ASK;
    m.ask = &ask;
    return lb_ctl_send(c, &m, err);
}

static void send_cancel(struct asking *a, struct lb_chan *c)
{
    Lb__Control m = LB__CONTROL__INIT;
    Lb__Cancel cancel = LB__CANCEL__INIT;

    a->cancel_sent = true;
    cancel.reason = (char *)"asked for";
    m.kind_case = LB__CONTROL__KIND_CANCEL;
    m.cancel = &cancel;
    lb_ctl_send(c, &m, NULL);
}

/* Whatever it is there, here it is progress of what was asked. */
static void relay(struct asking *a, const struct lb_host *to, const char *text)
{
    json_t *o = json_loads(text, 0, NULL);
    const char *kind = json_string_value(json_object_get(o, "event"));
    const char *key = json_string_value(json_object_get(o, "key"));

    if (kind && !strcmp(kind, "moved-on") && key) {
        snprintf(a->moved_on, sizeof(a->moved_on), "%.*s", (int)sizeof(a->moved_on) - 1, key);
    } else if (kind && strcmp(kind, "alive")) {
        if (!json_object_get(o, "state"))
            json_object_set_new(o, "state", lb_json_text(kind));
        json_object_set(o, "phase", json_object_get(o, "state"));
        json_object_set_new(o, "what", lb_json_text(to->name));
        json_object_set_new(o, "kind", lb_json_text(kind));
        json_object_set_new(o, "event", json_string("progress"));
        json_object_set_new(o, "vm", lb_json_text(lb_sess_vm(a->s)));
        json_object_set_new(o, "asked", lb_json_text(to->name));
        lb_sess_progress(a->s, lb_json_dump(LB_STEAL_PTR(o)));
    }
    json_decref(o);
}

/* Until the answer. */
static int hear(struct asking *a, struct lb_chan *c, struct lb_ctl_queue *q, const struct lb_host *to,
                char **json, struct lb_error *err)
{
    uint64_t heard = lb_now_ns();
    Lb__Control *m;
    int rc = 1;

    while (rc > 0) {
        if (!a->cancel_sent && lb_readable(lb_sess_cancel_fd(a->s), 0))
            send_cancel(a, c);
        if (lb_ctl_queue_pop(q, &m, lb_now_ns() + POLL_MS * UINT64_C(1000000), NULL)) {
            if (lb_ctl_queue_ended(q, err))
                return -1;
            if (lb_now_ns() - heard > SILENT_NS) {
                lb_fail(err, LB_E_NET, "host %s does not say any more what becomes of it", to->name);
                return lb_remedy(err, "`lifeboat status %s` there shows it", lb_sess_vm(a->s));
            }
            continue;
        }
        heard = lb_now_ns();
        if (m->kind_case == LB__CONTROL__KIND_ASK_EVENT) {
            relay(a, to, m->ask_event->json);
        } else if (m->kind_case == LB__CONTROL__KIND_ASK_RESULT) {
            *json = lb_strdup(m->ask_result->json);
            rc = 0;
        } else {
            rc = lb_fail(err, LB_E_PROTO, "host %s answers something else", to->name);
        }
        lb__control__free_unpacked(m, NULL);
    }
    return rc;
}

static int ask_host(struct asking *a, const struct lb_host *to, char **json, struct lb_error *err)
{
    struct lb_ctl_queue *q;
    struct lb_chan *c = NULL;
    char host[256];
    uint16_t port;
    int rc;

    a->moved_on[0] = '\0';
    if (!to->address[0]) {
        lb_fail(err, LB_E_USAGE, "host %s is known here without an address", to->name);
        return lb_remedy(err, "`lifeboat host trust %s KEY ADDRESS`", to->name);
    }
    lb_host_address(to, host, &port);
    if (lb_chan_connect(host, port, &a->id, to->pub, CONNECT_MS, lb_sess_cancel_fd(a->s), &c, err))
        return lb_context(err, "host %s cannot be asked", to->name);
    rc = send_ask(a, c, err);
    q = rc ? NULL : lb_ctl_queue_start(c, NULL, NULL);
    if (q)
        rc = hear(a, c, q, to, json, err);
    else if (!rc)
        rc = lb_fail(err, LB_E_INTERNAL, "cannot start a thread");
    lb_ctl_queue_stop(q);
    lb_chan_close(c);
    return rc;
}

/* The host that it went to, unless we have been there or do not know it. */
static const struct lb_host *follow(struct asking *a, const struct lb_host *const *been, unsigned n,
                                    struct lb_error *err)
{
    const struct lb_host *next = NULL;
    uint8_t key[LB_KEY_BYTES];

    if (!a->moved_on[0] || n == MAX_HOPS || lb_key_parse(a->moved_on, key, NULL))
        return NULL;
    next = lb_hosts_by_key(&a->hosts, key);
    if (!next) {
        lb_remedy(err, "that host is not trusted here: `lifeboat host trust NAME %s ADDRESS`", a->moved_on);
        return NULL;
    }
    for (unsigned i = 0; i < n; i++)
        if (been[i] == next)
            return NULL;
    return next;
}

static int ask_all(struct asking *a, char **json, struct lb_error *err)
{
    const char *name = lb_sess_start(a->s)->host;
    const struct lb_host *been[MAX_HOPS], *to = lb_hosts_by_name(&a->hosts, name);

    if (!to) {
        lb_fail(err, LB_E_NOT_FOUND, "host %.100s is not known here", name);
        return lb_remedy(err, "`lifeboat host ls` lists the known ones");
    }
    for (unsigned n = 0; to;) {
        if (!ask_host(a, to, json, err))
            return 0;
        been[n++] = to;
        to = err->code == LB_E_NOT_FOUND ? follow(a, been, n, err) : NULL;
        if (to) {
            lb_log(LB_LOG_INFO, "%s; asking host %s", err->message, to->name);
            lb_sess_set_peer(a->s, to->name);
            *err = (struct lb_error)LB_ERROR_INIT;
        }
    }
    return -1;
}

int lb_work_ask(struct sess *s, char **json, struct lb_error *err)
{
    struct asking a = {.s = s};
    const Lb__SessionStart *m = lb_sess_start(s);
    int rc;

    lb_sess_open_log(s);
    if (!m->request)
        return lb_fail(err, LB_E_USAGE, "there is nothing to ask");
    a.request_len = lb__rpc_request__get_packed_size(m->request);
    a.request = lb_alloc(a.request_len + 1);
    lb__rpc_request__pack(m->request, a.request);
    rc = lb_identity_load(m->state_dir, &a.id, err) || lb_hosts_load(m->state_dir, &a.hosts, err) ? -1 : 0;
    if (!rc)
        rc = ask_all(&a, json, err);
    lb_hosts_free(&a.hosts);
    lb_identity_wipe(&a.id);
    free(a.request);
    return rc;
}

/* -------------------------------------------------------------------- who is asked */

static int send_event(struct lb_chan *c, char *json, struct lb_error *err)
{
    Lb__Control m = LB__CONTROL__INIT;
    Lb__AskEvent e = LB__ASK_EVENT__INIT;

    e.json = json;
    m.kind_case = LB__CONTROL__KIND_ASK_EVENT;
    m.ask_event = &e;
    return lb_ctl_send(c, &m, err);
}

static int send_result(struct lb_chan *c, char *json, struct lb_error *err)
{
    Lb__Control m = LB__CONTROL__INIT;
    Lb__AskResult r = LB__ASK_RESULT__INIT;

    r.json = json;
    m.kind_case = LB__CONTROL__KIND_ASK_RESULT;
    m.ask_result = &r;
    return lb_ctl_send(c, &m, err);
}

static int alive(struct lb_chan *c, struct lb_error *err)
{
    return send_event(c, (char *)"{\"event\":\"alive\"}", err);
}

/* By its key: hosts call each other by names of their own. */
static void tell_moved_on(const char *state_dir, struct lb_chan *c, const struct lb_asked *q)
{
    struct lb_hosts hosts = {0};
    const struct lb_host *h;
    char key[LB_KEY_TEXT_BYTES];
    json_t *o;

    if (!lb_hosts_load(state_dir, &hosts, NULL) && (h = lb_hosts_by_name(&hosts, q->moved_on))) {
        lb_key_format(key, h->pub);
        o = json_object();
        json_object_set_new(o, "event", json_string("moved-on"));
        json_object_set_new(o, "vm", json_string(q->vm));
        json_object_set_new(o, "key", json_string(key));
        LB_AUTO_FREE char *text = lb_json_dump(o);
        send_event(c, text, NULL);
    }
    lb_hosts_free(&hosts);
}

/* As `lifeboat cancel`, whose answer is not needed: what was asked first says how it ended. */
static void cancel_here(const char *socket, const struct lb_asked *q)
{
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;
    Lb__RpcName name = LB__RPC_NAME__INIT;
    LB_AUTO_FD int fd = q->r.kind_case == LB__RPC_REQUEST__KIND_MIGRATE ? lb_unix_connect(socket, NULL) : -1;
    Lb__RpcReply *m;

    if (fd < 0)
        return;
    name.name = (char *)q->vm;
    r.kind_case = LB__RPC_REQUEST__KIND_CANCEL;
    r.cancel = &name;
    if (lb_rpc_send(fd, &r.base, lb_now_ns() + RPC_NS, NULL))
        return;
    m = (Lb__RpcReply *)lb_rpc_recv(fd, &lb__rpc_reply__descriptor, lb_now_ns() + RPC_NS, -1, NULL);
    if (m)
        lb__rpc_reply__free_unpacked(m, NULL);
}

/* One answer of our supervisor. 1: more follow. */
static int pass_on(struct lb_chan *c, const Lb__RpcReply *m, struct lb_error *err)
{
    switch (m->kind_case) {
    case LB__RPC_REPLY__KIND_EVENT_JSON:
        return send_event(c, m->event_json, err) ? -1 : 1;
    case LB__RPC_REPLY__KIND_RESULT_JSON:
        return send_result(c, m->result_json, err);
    case LB__RPC_REPLY__KIND_FAILURE:
        lb_fail(err, m->failure->code ? (enum lb_errcode)m->failure->code : LB_E_INTERNAL, "%s",
                m->failure->message);
        return lb_remedy(err, "%s", m->failure->remedy);
    default:
        return lb_fail(err, LB_E_PROTO, "lifeboatd answered something unknown");
    }
}

/* The queue only listens for Cancel, and for the end of the one who asked. */
static int serve(struct lb_chan *c, struct lb_ctl_queue *q, const char *socket, const struct lb_asked *asked,
                 int fd, struct lb_error *err)
{
    uint64_t said = lb_now_ns();
    struct lb_error why = LB_ERROR_INIT;
    bool cancelled = false;
    int rc = 1;

    while (rc > 0) {
        if (!cancelled && lb_ctl_queue_ended(q, &why)) {
            if (why.code != LB_E_CANCELLED) {
                *err = why;
                return lb_context(err, "the host that asked is gone; what it asked for goes on");
            }
            cancelled = true;
            cancel_here(socket, asked);
        }
        if (!lb_readable(fd, POLL_MS)) {
            if (lb_now_ns() - said > ALIVE_NS && alive(c, err))
                return -1;
            if (lb_now_ns() - said > ALIVE_NS)
                said = lb_now_ns();
            continue;
        }
        Lb__RpcReply *m = (Lb__RpcReply *)lb_rpc_recv(fd, &lb__rpc_reply__descriptor, lb_now_ns() + RPC_NS,
                                                      -1, err);
        if (!m)
            return lb_context(err, "lifeboatd went away before it had answered");
        rc = pass_on(c, m, err);
        said = lb_now_ns();
        lb__rpc_reply__free_unpacked(m, NULL);
    }
    return rc;
}

static int carry_out(struct lb_chan *c, const char *socket, const struct lb_asked *asked,
                     struct lb_error *err)
{
    LB_AUTO_FD int fd = -1;
    struct lb_ctl_queue *q;
    int rc;

    if (asked->already) {
        json_t *o = json_object();

        json_object_set_new(o, "vm", json_string(asked->vm));
        json_object_set_new(o, "already", json_true());
        LB_AUTO_FREE char *json = lb_json_dump(o);
        return send_result(c, json, err);
    }
    fd = lb_unix_connect(socket, err);
    if (fd < 0 || lb_rpc_send(fd, &asked->r.base, lb_now_ns() + RPC_NS, err))
        return -1;
    q = lb_ctl_queue_start(c, NULL, NULL);
    rc = q ? serve(c, q, socket, asked, fd, err) : lb_fail(err, LB_E_INTERNAL, "cannot start a thread");
    if (rc)
        lb_ctl_send_failure(c, err, NULL);
    lb_ctl_queue_stop(q);
    return rc;
}

int lb_serve_ask(struct sess *s, struct lb_chan *c, const char *peer, const Lb__Ask *ask,
                 struct lb_error *err)
{
    const Lb__SessionStart *m = lb_sess_start(s);
    LB_AUTO_FREE struct lb_asked *q = lb_alloc(sizeof(*q));
    Lb__RpcRequest *r = lb__rpc_request__unpack(NULL, ask->request.len, ask->request.data);
    int rc;

    if (!r)
        return lb_fail(err, LB_E_PROTO, "what host %s asks for does not parse", peer);
    rc = lb_ask_allow(m->state_dir, peer, lb_chan_peer_key(c), r, q, err);
    if (rc) {
        if (q->moved_on[0])
            tell_moved_on(m->state_dir, c, q);
        lb_ctl_send_failure(c, err, NULL);
    } else {
        q->options.compress = LB_RPC_COMPRESS_CONFIGURED;
        lb_sess_set_role(s, "asked");
        lb_log(LB_LOG_INFO, "host %s asks for something of VM %s (request %d)", peer, q->vm,
               (int)q->r.kind_case);
        rc = carry_out(c, m->socket, q, err);
    }
    lb__rpc_request__free_unpacked(r, NULL);
    return rc;
}

/* ------------------------------------------------------------------------- check */

int lb_work_check(struct sess *s, char **json, struct lb_error *err)
{
    const Lb__SessionStart *m = lb_sess_start(s);
    LB_AUTO_FREE struct lb_protect_wish *wish = lb_alloc(sizeof(*wish));
    bool standby = m->request && m->request->kind_case == LB__RPC_REQUEST__KIND_PROTECT;
    const char *vm = !m->request ? "" : standby ? m->request->protect->name : m->request->migrate->name;
    struct lb_identity id = {0};
    struct lb_hosts hosts = {0};
    const struct lb_host *to = NULL;
    struct lb_session_env env = lb_sess_env(s, &id);
    json_t *o;
    int rc;

    lb_sess_open_log(s);
    rc = lb_wish_load(m->state_dir, vm, wish, err) || lb_identity_load(m->state_dir, &id, err) ||
                 lb_hosts_load(m->state_dir, &hosts, err)
             ? -1
             : 0;
    to = rc ? NULL : lb_hosts_by_name(&hosts, m->host);
    if (to)
        rc = lb_remus_ask_ahead(&env, vm, to, wish, standby, err);
    else if (!rc)
        rc = lb_fail(err, LB_E_USAGE, "host %.100s is not known here", m->host);
    lb_hosts_free(&hosts);
    lb_identity_wipe(&id);
    o = json_object();
    json_object_set_new(o, "vm", lb_json_text(vm));
    json_object_set_new(o, "host", lb_json_text(m->host));
    json_object_set_new(o, "dry_run", json_true());
    json_object_set_new(o, "ok", json_boolean(!rc));
    *json = lb_json_dump(o);
    lb_sess_add_checks(s, json);
    return rc;
}

/* ---------------------------------------------------------------- the supervisor's side */

void lb_op_ask(struct daemon *d, struct client *c, const Lb__RpcAsk *a)
{
    Lb__RpcRequest *r = lb__rpc_request__unpack(NULL, a->request.len, a->request.data);
    const char *vm = r ? lb_ask_vm(r) : NULL;
    struct lb_error err = LB_ERROR_INIT;
    struct session *s = NULL;

    if (!vm || !lb_vm_name_valid(vm))
        lb_fail(&err, LB_E_USAGE, "another host can be asked for failover, protect, migrate and status of a VM");
    else
        s = lb_session_spawn_for(d, "ask", vm, a->host, r, &err);
    if (s)
        lb_client_watch(c, s, true);
    else
        lb_client_failure(c, &err, NULL);
    if (r)
        lb__rpc_request__free_unpacked(r, NULL);
}
