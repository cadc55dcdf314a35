/*
 * cmd/daemon/sessions.c - the supervisor's side of session processes.
 *
 * A session connects to STATE_DIR/sessions.sock and says who it is; the process
 * id comes from the kernel (SO_PEERCRED), not from what it says. After a
 * restart of the supervisor sessions of the old one connect again and are taken
 * on as if they had been started here. The end of a session is seen by its pidfd.
 */
#include "cmd/daemon/daemon.h"

#include <errno.h>
#include <event2/buffer.h>
#include <event2/listener.h>
#include <fcntl.h>
#include <signal.h>
#include <sodium.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/pidfd.h>
#include <sys/socket.h>
#include <sys/wait.h>

#define LAST_WORDS_US 300000

struct link {
    struct daemon *d;
    struct bufferevent *bev;
    struct session *s;   /* NULL before its hello */
    pid_t pid;           /* by the kernel */
};

static void link_free(struct link *l)
{
    if (l->s && l->s->conn == l)
        l->s->conn = NULL;
    bufferevent_free(l->bev);
    free(l);
}

static void session_free(struct session *s)
{
    struct daemon *d = s->d;

    LIST_REMOVE(s, link);
    if (!strcmp(s->role, "in"))
        d->n_in--;
    if (s->conn)
        link_free(s->conn);
    if (s->on_exit)
        event_free(s->on_exit);
    if (s->pidfd >= 0)
        close(s->pidfd);
    free(s->preflight);
    free(s->progress);
    free(s->protect);
    free(s->result);
    free(s);
}

/* A session that accepted a connection turns out to hold a standby. */
static void set_role(struct session *s, const char *role)
{
    if (!strcmp(s->role, "in"))
        s->d->n_in--;
    snprintf(s->role, sizeof(s->role), "%s", role);
    if (!strcmp(s->role, "in"))
        s->d->n_in++;
}

/* ------------------------------------------------------------------------ end */

static void drain(struct link *l);

static void finish(struct session *s)
{
    struct daemon *d = s->d;
    struct lb_error e = LB_ERROR_INIT;
    bool undecided, of_vm = s->vm[0];

    if (s->conn)
        drain(s->conn);
    if (!s->ended) {
        if (WIFSIGNALED(s->exit_status))
            lb_fail(&e, LB_E_INTERNAL, "the session%s%s was killed by signal %d", of_vm ? " of VM " : "",
                    s->vm, WTERMSIG(s->exit_status));
        else
            lb_fail(&e, LB_E_INTERNAL, "the session%s%s ended without a result",
                    of_vm ? " of VM " : "", s->vm);
        if (of_vm)
            lb_remedy(&e, "recovery has begun: `lifeboat status %s` shows where the VM is; see "
                          "%.200s/log/%s.log", s->vm, d->opt.state_dir, s->id);
        else
            lb_remedy(&e, "see %.250s/log/%s.log", d->opt.state_dir, s->id);
        if (s->vm[0])
            lb_log_error(LB_LOG_ERROR, &e);
        s->error = e;
        lb_clients_failure(s, &e, NULL);
    }
    lb_log(LB_LOG_DEBUG, "session %s role=%s vm=%s ended", s->id, s->role, s->vm);
    lb_protect_ended(s);
    lb_ckpt_ended(s);
    lb_evac_session_over(s);
    /* A recovery that decided nothing is tried again by its timer, not at once. */
    undecided = (!strcmp(s->role, "recover") || !strcmp(s->role, "fill")) && s->error.code;
    session_free(s);
    if (!undecided)
        lb_daemon_scan(d);
    lb_evac_step(d);
}

static void on_grace_over(evutil_socket_t fd, short what, void *arg)
{
    (void)fd;
    (void)what;
    finish(arg);
}

static void on_exit_event(evutil_socket_t fd, short what, void *arg)
{
    struct timeval grace = {0, LAST_WORDS_US};
    struct session *s = arg;

    (void)fd;
    (void)what;
    if (waitpid(s->pid, &s->exit_status, WNOHANG) != s->pid)
        s->exit_status = 0; /* an earlier supervisor's child */
    /* Its last words may still sit in the socket, and a short session's whole connection in the
     * queue of the listener: that event may come after this one. */
    if (s->conn)
        drain(s->conn);
    if (!s->ended && !WIFSIGNALED(s->exit_status)) {
        event_free(s->on_exit);
        s->on_exit = evtimer_new(s->d->base, on_grace_over, s);
        if (s->on_exit && !evtimer_add(s->on_exit, &grace))
            return;
    }
    finish(s);
}

static int watch(struct session *s)
{
    s->pidfd = pidfd_open(s->pid, 0);
    if (s->pidfd < 0)
        return -1;
    s->on_exit = event_new(s->d->base, s->pidfd, EV_READ, on_exit_event, s);
    return s->on_exit ? event_add(s->on_exit, NULL) : -1;
}

/* -------------------------------------------------------------------- looking */

struct session *lb_session_of_vm(struct daemon *d, const char *vm)
{
    struct session *s;

    LIST_FOREACH (s, &d->sessions, link)
        if (!s->ended && !strcmp(s->vm, vm) && strcmp(s->role, "ask"))
            return s;
    return NULL;
}

bool lb_session_blocks(const struct session *s, const struct lb_vm_entry *e)
{
    return s && strcmp(s->role, "in") && (strcmp(s->role, "fill") || e->state != LB_VM_RUNNING);
}

struct session *lb_session_wanting(struct daemon *d, const uint8_t id[LB_SESSION_ID_BYTES])
{
    struct session *s;

    LIST_FOREACH (s, &d->sessions, link)
        if (s->wants_conns && s->conn && !memcmp(s->want_id, id, LB_SESSION_ID_BYTES))
            return s;
    return NULL;
}

static struct session *of_pid(struct daemon *d, pid_t pid)
{
    struct session *s;

    LIST_FOREACH (s, &d->sessions, link)
        if (s->pid == pid)
            return s;
    return NULL;
}

/* --------------------------------------------------------------------- orders */

/* One order with at most one descriptor, by the socket itself: a descriptor must ride on
 * its own bytes. A session reads all the time; one that does not gets disconnected. */
static int order(struct session *s, const Lb__SessionOrder *o, int fd, struct lb_error *err)
{
    union {
        struct cmsghdr align;
        char space[CMSG_SPACE(sizeof(int))];
    } control = {0};
    struct msghdr msg = {0};
    struct iovec iov;
    size_t len;
    LB_AUTO_FREE uint8_t *buf = lb_rpc_frame(&o->base, &len, err);
    ssize_t n;

    if (!s->conn)
        return lb_fail(err, LB_E_STATE, "the session of VM %s is not connected", s->vm);
    if (!buf)
        return -1;
    iov = (struct iovec){buf, len};
    msg.msg_iov = &iov;
    msg.msg_iovlen = 1;
    if (fd >= 0) {
        msg.msg_control = &control;
        msg.msg_controllen = sizeof(control);
        struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(c), &fd, sizeof(int));
    }
    n = sendmsg(bufferevent_getfd(s->conn->bev), &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n == (ssize_t)len)
        return 0;
    lb_fail_errno(err, LB_E_INTERNAL, n < 0 ? errno : EAGAIN, "the session of VM %s does not listen",
                  s->vm);
    link_free(s->conn);
    return -1;
}

int lb_session_order_cancel(struct session *s, struct lb_error *err)
{
    Lb__SessionOrder o = LB__SESSION_ORDER__INIT;

    o.kind_case = LB__SESSION_ORDER__KIND_CANCEL;
    o.cancel = true;
    return order(s, &o, -1, err);
}

int lb_session_order_go(struct session *s, struct lb_error *err)
{
    Lb__SessionOrder o = LB__SESSION_ORDER__INIT;

    o.kind_case = LB__SESSION_ORDER__KIND_GO;
    o.go = true;
    return order(s, &o, -1, err);
}

int lb_session_order_failover(struct session *s, bool force, struct lb_error *err)
{
    Lb__SessionOrder o = LB__SESSION_ORDER__INIT;
    Lb__SessionFailover f = LB__SESSION_FAILOVER__INIT;

    f.force = force;
    o.kind_case = LB__SESSION_ORDER__KIND_FAILOVER;
    o.failover = &f;
    return order(s, &o, -1, err);
}

int lb_session_order_conn(struct session *s, int fd, struct lb_error *err)
{
    LB_AUTO_FD int mine = fd;
    Lb__SessionOrder o = LB__SESSION_ORDER__INIT;

    o.kind_case = LB__SESSION_ORDER__KIND_BULK_CONN;
    o.bulk_conn = true;
    return order(s, &o, mine, err);
}

/* --------------------------------------------------------------------- events */

static bool hello(struct link *l, const Lb__SessionHello *h)
{
    struct session *s = of_pid(l->d, l->pid);

    if (!s) {
        s = lb_alloc(sizeof(*s));
        s->d = l->d;
        s->pid = l->pid;
        s->begun_ms = lb_wall_ms();
        LIST_INSERT_HEAD(&l->d->sessions, s, link);
        set_role(s, h->role);
        if (watch(s)) {
            session_free(s);
            return false;
        }
        lb_log(LB_LOG_INFO, "session of VM %s (process %d) is back", h->vm, (int)l->pid);
    }
    if (s->conn && s->conn != l)
        link_free(s->conn);
    l->s = s;
    s->conn = l;
    if (strcmp(s->role, h->role))
        set_role(s, h->role);
    /* Of a session that came over from an earlier supervisor; a new one says what we know. */
    if (!s->id[0] && h->session_id.len == LB_SESSION_ID_BYTES)
        lb_hex(s->id, h->session_id.data, LB_SESSION_ID_BYTES);
    if (lb_vm_name_valid(h->vm))
        snprintf(s->vm, sizeof(s->vm), "%s", h->vm);
    if (h->peer[0])
        snprintf(s->peer, sizeof(s->peer), "%.127s", h->peer);
    return true;
}

static void replace(char **slot, const char *text)
{
    free(*slot);
    *slot = lb_strdup(text);
}

static void event_of(struct session *s, const char *text)
{
    json_t *o = json_loads(text, 0, NULL);
    const char *kind = json_string_value(json_object_get(o, "event"));
    const char *state = json_string_value(json_object_get(o, "state"));
    const char *note = json_string_value(json_object_get(o, "note"));

    if (kind && !strcmp(kind, "preflight"))
        replace(&s->preflight, text);
    if (kind && !strcmp(kind, "progress")) {
        replace(&s->progress, text);
        if (state)
            snprintf(s->state, sizeof(s->state), "%s", state);
    }
    if (kind && !strcmp(kind, "protect")) {
        replace(&s->protect, text);
        if (state) {
            snprintf(s->state, sizeof(s->state), "%s", state);
            lb_protect_event(s, state, note ? note : "", text);
        }
    } else if (kind) {
        /* It was not connected yet when nobody wanted its work any more. */
        if (s->abandoned)
            s->abandoned = lb_session_order_cancel(s, NULL) != 0;
        lb_clients_event(s, text);
        if (!strcmp(s->role, "protect"))
            lb_clients_tell(s->d, s->vm, text);
        lb_ckpt_event(s, kind, o, text);
        lb_evac_heard(s, kind, text);
    }
    json_decref(o);
}

/* How a protection ended comes with its last words, good or bad. */
static void note_end(struct session *s, const char *text)
{
    json_t *o = json_loads(text, 0, NULL);
    const char *how = json_string_value(json_object_get(o, "end"));

    if (how)
        snprintf(s->end, sizeof(s->end), "%s", how);
    json_decref(o);
}

static bool handle(struct link *l, const Lb__SessionEvent *e)
{
    Lb__SessionOrder noted = LB__SESSION_ORDER__INIT;
    struct lb_error err = LB_ERROR_INIT;
    struct session *s = l->s;

    if (e->kind_case == LB__SESSION_EVENT__KIND_HELLO)
        return hello(l, e->hello);
    if (!s)
        return false;
    switch (e->kind_case) {
    case LB__SESSION_EVENT__KIND_EVENT_JSON:
        event_of(s, e->event_json);
        return s->conn == l;
    case LB__SESSION_EVENT__KIND_RESULT_JSON:
        s->ended = true;
        if (!strcmp(s->role, "recover"))
            lb_log(LB_LOG_INFO, "vm=%s recovered: %s", s->vm, e->result_json);
        note_end(s, e->result_json);
        replace(&s->result, e->result_json);
        lb_clients_result(s, e->result_json);
        return true;
    case LB__SESSION_EVENT__KIND_FAILURE:
        s->ended = true;
        lb_fail(&err, (enum lb_errcode)e->failure->code, "%s", e->failure->message);
        lb_remedy(&err, "%s", e->failure->remedy);
        if (strcmp(s->role, "in")) /* that one logs for itself */
            lb_log(err.code == LB_E_UNDECIDED ? LB_LOG_DEBUG : LB_LOG_WARN, "vm=%s %s: %s", s->vm,
                   s->role, err.message);
        s->error = err;
        note_end(s, e->failure->json);
        lb_clients_failure(s, &err, e->failure->json);
        return true;
    case LB__SESSION_EVENT__KIND_WANT_SESSION_ID:
        if (e->want_session_id.len != LB_SESSION_ID_BYTES)
            return false;
        memcpy(s->want_id, e->want_session_id.data, LB_SESSION_ID_BYTES);
        s->wants_conns = true;
        noted.kind_case = LB__SESSION_ORDER__KIND_NOTED;
        noted.noted = true;
        if (!order(s, &noted, -1, &err))
            lb_peers_unpark(l->d, s);
        return s->conn == l;
    default:
        return true; /* of a newer version */
    }
}

/* false: the link is gone. */
static bool take_frames(struct link *l)
{
    struct evbuffer *in = bufferevent_get_input(l->bev);
    uint8_t head[4];

    while (evbuffer_copyout(in, head, 4) == 4) {
        uint32_t len = head[0] | (uint32_t)head[1] << 8 | (uint32_t)head[2] << 16 |
                       (uint32_t)head[3] << 24;
        Lb__SessionEvent *e = NULL;
        struct session *s;
        bool ok;

        if (len <= LB_RPC_MAX_BYTES && evbuffer_get_length(in) < 4 + (size_t)len)
            return true;
        if (len <= LB_RPC_MAX_BYTES) {
            evbuffer_drain(in, 4);
            e = lb__session_event__unpack(NULL, len, len ? evbuffer_pullup(in, len) : head);
            evbuffer_drain(in, len);
        }
        s = l->s;
        ok = e && handle(l, e);
        if (e)
            lb__session_event__free_unpacked(e, NULL);
        if (!ok) {
            /* An order that failed has already closed it. */
            if (!s || s->conn == l)
                link_free(l);
            return false;
        }
    }
    return true;
}

static void on_read(struct bufferevent *bev, void *arg)
{
    (void)bev;
    take_frames(arg);
}

static void drain(struct link *l)
{
    struct evbuffer *in = bufferevent_get_input(l->bev);

    while (evbuffer_read(in, bufferevent_getfd(l->bev), 65536) > 0)
        if (!take_frames(l))
            return;
}

static void on_event(struct bufferevent *bev, short what, void *arg)
{
    (void)bev;
    (void)what;
    link_free(arg);
}

static void on_accept(struct evconnlistener *listener, evutil_socket_t fd, struct sockaddr *a,
                      int len, void *arg)
{
    struct daemon *d = arg;
    struct ucred cred;
    socklen_t n = sizeof(cred);
    struct link *l;

    (void)listener;
    (void)a;
    (void)len;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &cred, &n) || cred.uid != geteuid()) {
        close(fd);
        return;
    }
    l = lb_alloc(sizeof(*l));
    l->d = d;
    l->pid = cred.pid;
    l->bev = bufferevent_socket_new(d->base, fd, BEV_OPT_CLOSE_ON_FREE);
    if (!l->bev) {
        close(fd);
        free(l);
        return;
    }
    bufferevent_setcb(l->bev, on_read, NULL, on_event, l);
    bufferevent_setwatermark(l->bev, EV_READ, 0, LB_RPC_MAX_BYTES + 4);
    bufferevent_enable(l->bev, EV_READ);
}

int lb_sessions_start(struct daemon *d, struct lb_error *err)
{
    int fd = lb_unix_listen(d->sessions_path, 0600, err);

    if (fd < 0)
        return -1;
    d->sessions_listener = evconnlistener_new(
        d->base, on_accept, d, LEV_OPT_CLOSE_ON_FREE | LEV_OPT_CLOSE_ON_EXEC, 0, fd);
    if (!d->sessions_listener) {
        close(fd);
        return lb_fail(err, LB_E_INTERNAL, "cannot serve %s", d->sessions_path);
    }
    return 0;
}

/* ---------------------------------------------------------------------- spawn */

static int start_file(const Lb__SessionStart *m, struct lb_error *err)
{
    size_t len;
    int rc;
    LB_AUTO_FREE uint8_t *buf = NULL;
    LB_AUTO_FD int fd = memfd_create("lifeboat-session", MFD_CLOEXEC);

    if (fd < 0)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot make a memory file");
    len = lb__session_start__get_packed_size(m);
    buf = lb_alloc(len + 1);
    lb__session_start__pack(m, buf);
    rc = lb_write_all(fd, buf, len, err);
    sodium_memzero(buf, len); /* there may be a passphrase in it */
    if (rc || lseek(fd, 0, SEEK_SET) < 0)
        return -1;
    return LB_STEAL_FD(fd);
}

/* Between fork and exec: fd 3 = start message, fd 4 = connection or closed. */
static void become_session(int start_fd, int conn_fd, const char *role, const char *vm)
{
    /* role and VM are for people who look at ps */
    char *argv[] = {(char *)"lifeboatd", (char *)"--session", (char *)role,
                    (char *)(vm && vm[0] ? vm : NULL), NULL};
    int a, b = -1;

    lb_child_reset();
    signal(SIGHUP, SIG_IGN);
    signal(SIGTERM, SIG_IGN);
    signal(SIGINT, SIG_IGN);
    a = fcntl(start_fd, F_DUPFD_CLOEXEC, 10);
    if (conn_fd >= 0)
        b = fcntl(conn_fd, F_DUPFD_CLOEXEC, 10);
    if (a < 0 || (conn_fd >= 0 && b < 0) || dup2(a, 3) < 0 || (b >= 0 && dup2(b, 4) < 0))
        _exit(127);
    close_range(b >= 0 ? 5 : 4, ~0u, 0);
    /* The very program that runs, also while a package manager replaces it. */
    execv("/proc/self/exe", argv);
    _exit(127);
}

/* m says role, VM, host, options and request. */
static struct session *spawn(struct daemon *d, Lb__SessionStart *m, int conn, struct lb_error *err)
{
    uint8_t id[LB_SESSION_ID_BYTES];
    sigset_t all, old;
    struct session *s;
    pid_t pid;

    randombytes_buf(id, sizeof(id));
    m->session_id = (ProtobufCBinaryData){sizeof(id), id};
    m->state_dir = d->opt.state_dir;
    m->config_path = d->opt.config_path;
    m->socket = d->opt.socket;
    m->log_level = d->opt.log_level;
    LB_AUTO_FD int start_fd = start_file(m, err);
    if (start_fd < 0)
        return NULL;
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, &old);
    pid = fork();
    if (pid == 0)
        become_session(start_fd, conn, m->role, m->vm);
    sigprocmask(SIG_SETMASK, &old, NULL);
    if (pid < 0) {
        lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot start a session");
        return NULL;
    }
    s = lb_alloc(sizeof(*s));
    s->d = d;
    s->pid = pid;
    s->begun_ms = lb_wall_ms();
    lb_hex(s->id, id, sizeof(id));
    set_role(s, m->role);
    snprintf(s->vm, sizeof(s->vm), "%s", m->vm);
    snprintf(s->peer, sizeof(s->peer), "%s", m->host);
    LIST_INSERT_HEAD(&d->sessions, s, link);
    if (watch(s)) {
        lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot watch a session");
        kill(pid, SIGKILL);
        waitpid(pid, NULL, 0);
        session_free(s);
        return NULL;
    }
    lb_log(LB_LOG_DEBUG, "session %s role=%s vm=%s process=%d", s->id, s->role, s->vm, (int)pid);
    return s;
}

struct session *lb_session_spawn(struct daemon *d, const char *role, const char *vm,
                                 const char *host, const Lb__MigrateOptions *opts, int conn_fd,
                                 struct lb_error *err)
{
    LB_AUTO_FD int conn = conn_fd;
    Lb__SessionStart m = LB__SESSION_START__INIT;

    m.role = (char *)role;
    m.vm = (char *)(vm ? vm : "");
    m.host = (char *)(host ? host : "");
    m.options = (Lb__MigrateOptions *)opts;
    return spawn(d, &m, conn, err);
}

struct session *lb_session_spawn_for(struct daemon *d, const char *role, const char *vm,
                                     const char *host, const Lb__RpcRequest *r,
                                     struct lb_error *err)
{
    Lb__SessionStart m = LB__SESSION_START__INIT;

    m.role = (char *)role;
    m.vm = (char *)vm;
    m.host = (char *)host;
    m.request = (Lb__RpcRequest *)r;
    return spawn(d, &m, -1, err);
}
