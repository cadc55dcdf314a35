/*
 * cmd/daemon/session.c - one piece of work in a process of its own (lifeboatd --session).
 *
 *   main thread    out: lb_migrate_out, in: lb_serve_channel, recover: lb_recover_vm,
 *                  protect: lb_protect_run, backup: lb_backup_serve (role in, until it turns out);
 *                  checkpoint, restore, fill, clone: ckpt_session.c, catalog: ckpt_catalog.c;
 *                  ask, check, and role in when another host asks for something: ask.c
 *   link thread    keeps the connection to the supervisor: says who we are, sends events and the
 *                  result, takes orders (cancel) and bulk connections
 *
 * The supervisor may die and come back: the link connects again and repeats what
 * the new one has to know. Nothing the engine does waits for it, except a
 * destination that needs its bulk connections routed. Protections last for months: their
 * log is kept short.
 */
#include "cmd/daemon/session.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sodium.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <netdb.h>

#include "core/qemu/qemu.h"
#include "migrate/preflight.h"
#include "remus/remus.h"

#define START_FD 3
#define CONN_FD 4
#define MAX_CONNS 64u
#define RECONNECT_MS 100
#define SEND_TIMEOUT_NS UINT64_C(2000000000)
#define FINAL_WAIT_NS UINT64_C(3000000000)
#define NOTED_WAIT_NS UINT64_C(10000000000)
#define HANDSHAKE_TIMEOUT_MS 10000u
#define LOCK_WAIT_MS 10000u /* the daemon has seen that no session works on it: one ends, maybe on a busy host */
#define MAX_LOG_BYTES (1 << 20)

struct sess {
    /* immutable once the link thread runs */
    Lb__SessionStart *start;
    char id[33];
    char *sessions_path;
    int cancel_fd, wake_fd, failover_fd, go_fd;
    pthread_t thread;

    /* written before failover_fd, read after it */
    bool failover_force;

    /* main thread only */
    bool promoted;             /* role backup: the VM runs here */
    bool asked;                /* role in: it was another host's Ask */

    /* locked by mu */
    pthread_mutex_t mu;
    pthread_cond_t cond;
    char role[16], vm[128], peer[128];
    bool hello_due, want_due;
    /* last event of each kind, and whether it is still to be sent, in this order */
    struct event_slot {
        char *text;
        bool due;
    } preflight, running, progress, protect;
    char *log_path;            /* set once */
    bool wants, noted, cancelled;
    uint8_t want_id[LB_SESSION_ID_BYTES];
    int conns[MAX_CONNS];
    unsigned n_conns;
    Lb__SessionEvent *final;   /* set once, owned by the main thread */
    bool final_sent, stop;
};

static void wake(struct sess *s)
{
    uint64_t one = 1;

    if (write(s->wake_fd, &one, sizeof(one)) != sizeof(one))
        lb_log(LB_LOG_DEBUG, "the link is awake already");
}

/* ----------------------------------------------------------------- link thread */

static int send_event(int fd, const Lb__SessionEvent *e)
{
    return lb_rpc_send(fd, &e->base, lb_now_ns() + SEND_TIMEOUT_NS, NULL);
}

static int send_text(int fd, char *json)
{
    Lb__SessionEvent e = LB__SESSION_EVENT__INIT;

    e.kind_case = LB__SESSION_EVENT__KIND_EVENT_JSON;
    e.event_json = json;
    return send_event(fd, &e);
}

/* mu held. The first event that is to be sent: that the guest runs before how its memory comes. */
static struct event_slot *due_slot(struct sess *s)
{
    struct event_slot *const order[] = {&s->preflight, &s->running, &s->progress, &s->protect};

    for (size_t i = 0; i < LB_ARRAY_LEN(order); i++)
        if (order[i]->due)
            return order[i];
    return NULL;
}

/* mu held; released while sending. Returns -1 when the connection broke. */
static int send_due(struct sess *s, int fd)
{
    Lb__SessionEvent e = LB__SESSION_EVENT__INIT;
    struct event_slot *slot;
    int rc = 0;

    if (s->hello_due) {
        Lb__SessionHello h = LB__SESSION_HELLO__INIT;
        uint8_t id[LB_SESSION_ID_BYTES];
        char role[16], vm[128], peer[128];

        s->hello_due = false;
        memcpy(role, s->role, sizeof(role));
        memcpy(vm, s->vm, sizeof(vm));
        memcpy(peer, s->peer, sizeof(peer));
        pthread_mutex_unlock(&s->mu);
        lb_unhex(id, sizeof(id), s->id);
        h.role = role;
        h.session_id = (ProtobufCBinaryData){sizeof(id), id};
        h.vm = vm;
        h.peer = peer;
        h.pid = (int32_t)getpid();
        e.kind_case = LB__SESSION_EVENT__KIND_HELLO;
        e.hello = &h;
        rc = send_event(fd, &e);
    } else if (s->want_due) {
        uint8_t id[LB_SESSION_ID_BYTES];

        s->want_due = false;
        memcpy(id, s->want_id, sizeof(id));
        pthread_mutex_unlock(&s->mu);
        e.kind_case = LB__SESSION_EVENT__KIND_WANT_SESSION_ID;
        e.want_session_id = (ProtobufCBinaryData){sizeof(id), id};
        rc = send_event(fd, &e);
    } else if ((slot = due_slot(s))) {
        LB_AUTO_FREE char *text = lb_strdup(slot->text);

        slot->due = false;
        pthread_mutex_unlock(&s->mu);
        rc = send_text(fd, text);
    } else if (s->final && !s->final_sent) {
        pthread_mutex_unlock(&s->mu);
        rc = send_event(fd, s->final);
        pthread_mutex_lock(&s->mu);
        s->final_sent = rc == 0;
        pthread_cond_broadcast(&s->cond);
        return rc;
    }
    pthread_mutex_lock(&s->mu);
    return rc;
}

static bool anything_due(struct sess *s)
{
    return s->hello_due || s->want_due || due_slot(s) || (s->final && !s->final_sent);
}

static void obey(struct sess *s, const Lb__SessionOrder *o, int *fd)
{
    uint64_t one = 1;

    pthread_mutex_lock(&s->mu);
    switch (o->kind_case) {
    case LB__SESSION_ORDER__KIND_CANCEL:
        s->cancelled = true;
        lb_log(LB_LOG_INFO, "cancel was asked for");
        if (write(s->cancel_fd, &one, sizeof(one)) != sizeof(one))
            lb_log(LB_LOG_DEBUG, "cancelled already");
        break;
    case LB__SESSION_ORDER__KIND_BULK_CONN:
        if (*fd >= 0 && s->n_conns < MAX_CONNS)
            s->conns[s->n_conns++] = LB_STEAL_FD(*fd);
        break;
    case LB__SESSION_ORDER__KIND_NOTED:
        s->noted = true;
        break;
    case LB__SESSION_ORDER__KIND_FAILOVER:
        s->failover_force = o->failover->force;
        lb_log(LB_LOG_INFO, "failover was asked for%s", s->failover_force ? ", by force" : "");
        if (write(s->failover_fd, &one, sizeof(one)) != sizeof(one))
            lb_log(LB_LOG_DEBUG, "asked for already");
        break;
    case LB__SESSION_ORDER__KIND_GO:
        if (write(s->go_fd, &one, sizeof(one)) != sizeof(one))
            lb_log(LB_LOG_DEBUG, "told to go already");
        break;
    default:
        break;
    }
    pthread_cond_broadcast(&s->cond);
    pthread_mutex_unlock(&s->mu);
}

/* One order; a descriptor comes with the first byte of its frame. */
static int take_order(struct sess *s, int sock)
{
    uint64_t deadline = lb_now_ns() + SEND_TIMEOUT_NS;
    LB_AUTO_FD int fd = -1;
    unsigned n_fds = 1;
    uint8_t head[4], body[256];
    ssize_t n = lb_recv_fds(sock, head, sizeof(head), &fd, &n_fds, NULL);
    Lb__SessionOrder *o;
    uint32_t len;

    if (n <= 0)
        return -1;
    if (n < 4 && lb_read_all_until(sock, head + n, 4 - (size_t)n, deadline, -1, NULL))
        return -1;
    len = head[0] | (uint32_t)head[1] << 8 | (uint32_t)head[2] << 16 | (uint32_t)head[3] << 24;
    if (len > sizeof(body) || lb_read_all_until(sock, body, len, deadline, -1, NULL))
        return -1;
    o = lb__session_order__unpack(NULL, len, body);
    if (!o)
        return -1;
    obey(s, o, &fd);
    lb__session_order__free_unpacked(o, NULL);
    return 0;
}

/* A session that lasts must not fill the disk with what it says: its log begins anew, what there was
 * stays beside it until the next time. */
static void bound_log(const char *path)
{
    struct stat st;

    if (!path || stat(path, &st) || st.st_size <= MAX_LOG_BYTES)
        return;
    LB_AUTO_FREE char *old = lb_asprintf("%s.old", path);
    LB_AUTO_FD int fd = open(path, O_RDONLY | O_CLOEXEC);
    LB_AUTO_FD int copy = open(old, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0 || copy < 0 || sendfile(copy, fd, NULL, (size_t)st.st_size) < 0 || truncate(path, 0))
        lb_log(LB_LOG_DEBUG, "cannot shorten the log");
}

/* One connection, until it breaks or we stop. */
static void serve_link(struct sess *s, int fd)
{
    struct pollfd p[2] = {{.fd = fd, .events = POLLIN}, {.fd = s->wake_fd, .events = POLLIN}};
    const char *log;
    uint64_t count;

    pthread_mutex_lock(&s->mu);
    s->hello_due = true;
    s->want_due = s->wants;
    s->noted = false;
    s->preflight.due = s->preflight.text != NULL;
    s->progress.due = s->progress.text != NULL;
    s->protect.due = s->protect.text != NULL;
    s->running.due = s->running.text != NULL;
    while (!s->stop) {
        while (anything_due(s))
            if (send_due(s, fd)) {
                pthread_mutex_unlock(&s->mu);
                return;
            }
        if (s->stop)
            break;
        log = s->log_path;
        pthread_mutex_unlock(&s->mu);
        bound_log(log);
        if (poll(p, 2, -1) < 0 && errno != EINTR)
            return;
        if (p[1].revents && read(s->wake_fd, &count, sizeof(count)) < 0)
            lb_log(LB_LOG_DEBUG, "nothing to wake for");
        if (p[0].revents && take_order(s, fd))
            return;
        pthread_mutex_lock(&s->mu);
    }
    pthread_mutex_unlock(&s->mu);
}

static void *link_main(void *arg)
{
    struct sess *s = arg;
    bool stop = false;

    while (!stop) {
        LB_AUTO_FD int fd = lb_unix_connect(s->sessions_path, NULL);

        if (fd >= 0)
            serve_link(s, fd);
        pthread_mutex_lock(&s->mu);
        stop = s->stop;
        pthread_mutex_unlock(&s->mu);
        if (!stop)
            lb_sleep_ms(RECONNECT_MS);
    }
    return NULL;
}

/* ----------------------------------------------------- what the engine asks of us */

static void set_text(struct sess *s, struct event_slot *slot, char *text)
{
    pthread_mutex_lock(&s->mu);
    free(slot->text);
    slot->text = text;
    slot->due = true;
    pthread_mutex_unlock(&s->mu);
    wake(s);
}

static void on_report(const struct lb_progress *p, void *arg)
{
    LB_AUTO_FREE char *text = lb_progress_json(p);
    struct sess *s = arg;
    json_t *o = text ? json_loads(text, 0, NULL) : NULL;

    if (!o)
        return;
    json_object_set_new(o, "event", json_string("progress"));
    json_object_set_new(o, "vm", lb_json_text(s->vm));
    set_text(s, &s->progress, lb_json_dump(o));
}

static void on_preflight(const char *json, void *arg)
{
    struct sess *s = arg;
    json_t *checks = json_loads(json, 0, NULL), *o;

    if (!checks)
        return;
    o = json_object();
    json_object_set_new(o, "event", json_string("preflight"));
    json_object_set_new(o, "vm", lb_json_text(s->vm));
    json_object_set_new(o, "checks", checks);
    set_text(s, &s->preflight, lb_json_dump(o));
}

/* What the engines of protection say of themselves. */
static void on_status(const struct lb_protect_status *p, void *arg)
{
    LB_AUTO_FREE char *text = lb_protect_status_json(p);
    struct sess *s = arg;
    json_t *o = text ? json_loads(text, 0, NULL) : NULL;

    if (!o)
        return;
    json_object_set_new(o, "event", json_string("protect"));
    json_object_set_new(o, "vm", lb_json_text(s->vm));
    set_text(s, &s->protect, lb_json_dump(o));
}

/* mu held. false when the time is over. */
static bool wait_until(struct sess *s, uint64_t deadline_ns)
{
    struct timespec ts = {.tv_sec = (time_t)(deadline_ns / 1000000000),
                          .tv_nsec = (long)(deadline_ns % 1000000000)};

    return pthread_cond_timedwait(&s->cond, &s->mu, &ts) == 0;
}

static int want_conns(const uint8_t id[LB_SESSION_ID_BYTES], const char *vm, struct lb_error *err,
                      void *arg)
{
    uint64_t deadline = lb_now_ns() + NOTED_WAIT_NS;
    struct sess *s = arg;
    bool ok;

    pthread_mutex_lock(&s->mu);
    memcpy(s->want_id, id, sizeof(s->want_id));
    snprintf(s->vm, sizeof(s->vm), "%s", vm);
    s->wants = s->want_due = s->hello_due = true;
    s->noted = false;
    wake(s);
    while (!s->noted && wait_until(s, deadline))
        ;
    ok = s->noted;
    pthread_mutex_unlock(&s->mu);
    if (ok)
        return 0;
    lb_fail(err, LB_E_INTERNAL, "lifeboatd does not route connections to this session");
    return lb_remedy(err, "see that lifeboatd runs on the destination");
}

static int take_conn(unsigned timeout_ms, struct lb_error *err, void *arg)
{
    uint64_t deadline = lb_now_ns() + (uint64_t)timeout_ms * 1000000;
    struct sess *s = arg;
    int fd = -1;

    pthread_mutex_lock(&s->mu);
    while (!s->n_conns && !s->cancelled && wait_until(s, deadline))
        ;
    if (s->cancelled) {
        lb_fail(err, LB_E_CANCELLED, "cancelled");
    } else if (!s->n_conns) {
        lb_fail(err, LB_E_NET, "no bulk connection came within %u ms", timeout_ms);
        lb_remedy(err, "see whether a firewall limits connections to the port of lifeboatd");
    } else {
        fd = s->conns[0];
        memmove(s->conns, s->conns + 1, --s->n_conns * sizeof(s->conns[0]));
    }
    pthread_mutex_unlock(&s->mu);
    return fd;
}

static void open_log(struct sess *s, const char *name)
{
    char *path = lb_asprintf("%s/log/%s.log", s->start->state_dir, name);
    int fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);

    pthread_mutex_lock(&s->mu);
    s->log_path = path;
    pthread_mutex_unlock(&s->mu);

    if (fd < 0) {
        lb_log(LB_LOG_WARN, "cannot open %s: %s", path, strerror(errno));
        return;
    }
    if (lseek(fd, 0, SEEK_END) > MAX_LOG_BYTES && ftruncate(fd, 0))
        lb_log(LB_LOG_WARN, "cannot shorten %s", path);
    lb_log_set_fd(fd);
}

static void set_fields(struct sess *s)
{
    char text[300];

    snprintf(text, sizeof(text), "%s%s%ssession=%.8s%s%s", s->vm[0] ? "vm=" : "", s->vm,
             s->vm[0] ? " " : "", s->id, s->peer[0] ? " peer=" : "", s->peer);
    lb_log_set_fields(text);
}

/* What the work of ckpt_session.c and ckpt_catalog.c asks; see session.h. */
const Lb__SessionStart *lb_sess_start(const struct sess *s)
{
    return s->start;
}

/* Written by this thread alone: it may be read without mu. */
const char *lb_sess_vm(const struct sess *s)
{
    return s->vm;
}

int lb_sess_cancel_fd(const struct sess *s)
{
    return s->cancel_fd;
}

static void set_name(struct sess *s, char *slot, size_t cap, const char *name)
{
    pthread_mutex_lock(&s->mu);
    snprintf(slot, cap, "%s", name);
    s->hello_due = true;
    pthread_mutex_unlock(&s->mu);
    set_fields(s);
    wake(s);
}

void lb_sess_set_vm(struct sess *s, const char *vm)
{
    set_name(s, s->vm, sizeof(s->vm), vm);
}

void lb_sess_set_role(struct sess *s, const char *role)
{
    set_name(s, s->role, sizeof(s->role), role);
}

void lb_sess_set_peer(struct sess *s, const char *host)
{
    set_name(s, s->peer, sizeof(s->peer), host);
}

void lb_sess_open_log(struct sess *s)
{
    open_log(s, s->id);
}

void lb_sess_progress(struct sess *s, char *json)
{
    set_text(s, &s->progress, json);
}

void lb_sess_running(struct sess *s, char *json)
{
    set_text(s, &s->running, json);
}

/* --------------------------------------------------------------------- the work */

static int serve_other(const struct lb_session_env *base, struct lb_chan *chan, const char *peer,
                       Lb__Control *first, char *vm_name, struct lb_error *err);

/* Is there a host here that may be the backup of a VM with this wish, once the VM has come from s->peer? */
static bool somebody_else(struct sess *s, const struct lb_protect_wish *w)
{
    struct lb_hosts hosts = {0};
    bool found = false;

    if (lb_hosts_load(s->start->state_dir, &hosts, NULL))
        return false;
    for (unsigned i = 0; i < hosts.n && !found; i++) {
        found = hosts.v[i].address[0] && strcmp(hosts.v[i].name, s->peer) && !w->n_backups;
        for (unsigned k = 0; k < w->n_backups && !found; k++)
            found = hosts.v[i].address[0] && strcmp(hosts.v[i].name, s->peer) &&
                    !strcmp(hosts.v[i].name, w->backups[k]);
    }
    lb_hosts_free(&hosts);
    return found;
}

/* false: nothing to add. */
static bool add_peer(const struct sess *s, struct lb_protect_wish *w)
{
    for (unsigned i = 0; i < w->n_backups; i++)
        if (!strcmp(w->backups[i], s->peer))
            return false;
    if (!w->n_backups || w->n_backups == LB_PROTECT_MAX_BACKUPS)
        return false;
    snprintf(w->backups[w->n_backups++], sizeof(w->backups[0]), "%s", s->peer);
    return true;
}

/* What is said about a VM that is to be protected again when it has come here. */
static void check_wish(const char *json, struct lb_report *rep, void *arg)
{
    LB_AUTO_FREE struct lb_protect_wish *w = lb_alloc(sizeof(*w));
    struct lb_error err = LB_ERROR_INIT;
    struct sess *s = arg;

    if (lb_wish_parse(json, w, &err))
        lb_report_add(rep, "protection", LB_CHECK_FAIL, "use the same version of Lifeboat on both hosts", "%s",
                      err.message);
    else if (somebody_else(s, w))
        lb_report_add(rep, "protection", LB_CHECK_OK, NULL, "it is protected again when it has come");
    else
        lb_report_add(rep, "protection", LB_CHECK_WARN, "`lifeboat host trust` another one here",
                      "only host %s can be its backup: it runs unprotected for as long as that refuses", s->peer);
}

/* The host that it comes from may be its backup next time. */
static int keep_wish(const char *vm, const char *json, struct lb_error *err, void *arg)
{
    LB_AUTO_FREE struct lb_protect_wish *w = lb_alloc(sizeof(*w));
    struct sess *s = arg;

    if (lb_wish_parse(json, w, err))
        return -1;
    add_peer(s, w);
    return lb_wish_save(s->start->state_dir, vm, w, err);
}

struct lb_session_env lb_sess_env(struct sess *s, const struct lb_identity *id)
{
    struct lb_session_env e = {
        .state_dir = s->start->state_dir,
        .hv = &lb_hv_qemu,
        .identity = id,
        .cancel_fd = s->cancel_fd,
        .go_fd = s->go_fd,
        .report = on_report,
        .preflight = on_preflight,
        .want_conns = want_conns,
        .take_conn = take_conn,
        .arg = s,
        .config_path = s->start->config_path,
        .check_wish = check_wish,
        .keep_wish = keep_wish,
        .serve_other = serve_other,
    };

    lb_unhex(e.session_id, sizeof(e.session_id), s->id);
    return e;
}

/* Values that were not given are the host's. */
static int fill_options(const Lb__SessionStart *m, const char *budget_path, struct lb_migrate_opts *o, struct lb_error *err)
{
    static const Lb__MigrateOptions none = LB__MIGRATE_OPTIONS__INIT;
    const Lb__MigrateOptions *r = m->options ? m->options : &none;
    struct lb_host_config c;

    if (lb_config_load(m->config_path, &c, err))
        return -1;
    *o = (struct lb_migrate_opts){
        .bandwidth_bytes_per_s = r->bandwidth_bytes_per_s ? r->bandwidth_bytes_per_s
                                                          : c.bandwidth_bytes_per_s,
        .budget_path = r->shared_bandwidth ? budget_path : NULL,
        .max_downtime_ms = r->max_downtime_ms ? r->max_downtime_ms : c.max_downtime_ms,
        .channels = r->channels ? r->channels : c.channels,
        .compress = (enum lb_compress)r->compress,
        .zstd_level = r->zstd_level,
        .verify = r->verify,
        .timeout_ms = r->timeout_ms,
        .dry_run = r->dry_run,
        .insecure_plaintext = r->insecure_plaintext,
        .allow_throttle = !r->no_throttle && c.throttle,
        .wait_go = r->wait_go,
        .transport = (enum lb_transport_wish)r->transport,
        .trusted_fabric = r->trusted_fabric,
    };
    if (r->compress == LB_RPC_COMPRESS_CONFIGURED) {
        o->compress = !strcmp(c.compress, "off")          ? LB_COMPRESS_OFF
                      : !strncmp(c.compress, "zstd", 4) ? LB_COMPRESS_ZSTD
                                                          : LB_COMPRESS_AUTO;
        o->zstd_level = !strncmp(c.compress, "zstd:", 5) ? atoi(c.compress + 5) : 0;
    }
    lb_config_free(&c);
    return 0;
}

void lb_sess_add_checks(struct sess *s, char **json)
{
    json_t *o = json_loads(*json, 0, NULL), *p;

    pthread_mutex_lock(&s->mu);
    p = s->preflight.text ? json_loads(s->preflight.text, 0, NULL) : NULL;
    pthread_mutex_unlock(&s->mu);
    if (o && json_object_get(p, "checks")) {
        json_object_set(o, "checks", json_object_get(p, "checks"));
        free(*json);
        *json = json_dumps(o, JSON_COMPACT | JSON_REAL_PRECISION(12));
    }
    json_decref(o);
    json_decref(p);
}

/* The wish that goes with the VM; *json NULL: none. */
static int load_wish(struct sess *s, char **json, struct lb_error *err)
{
    LB_AUTO_FREE struct lb_protect_wish *w = lb_alloc(sizeof(*w));
    struct lb_error why = LB_ERROR_INIT;

    *json = NULL;
    if (!lb_wish_load(s->start->state_dir, s->vm, w, &why)) {
        *json = lb_wish_json(w);
        return 0;
    }
    if (why.code == LB_E_NOT_FOUND)
        return 0;
    if (err)
        *err = why;
    return -1;
}

/* *json: the result, also of a failure that got as far as the engine. */
static int migrate_out(struct sess *s, const struct lb_identity *id, char **json,
                       struct lb_error *err)
{
    struct lb_session_env env = lb_sess_env(s, id);
    struct lb_migrate_opts opts;
    struct lb_migrate_result res;
    struct lb_hosts hosts = {0};
    const struct lb_host *to;
    struct lb_vm_entry e;
    struct lb_error he = LB_ERROR_INIT;
    uint64_t started = lb_wall_ms();
    LB_AUTO_FREE char *wish = NULL, *budget = lb_asprintf("%s/evacuation.budget", s->start->state_dir);
    int rc;

    open_log(s, s->id);
    if (fill_options(s->start, budget, &opts, err))
        return -1;
    LB_AUTO_FD int lock = lb_vm_lock_patiently(env.state_dir, s->vm, LOCK_WAIT_MS, err);
    if (lock < 0) {
        if (!lb_vm_entry_load(env.state_dir, s->vm, &e, NULL) && e.state == LB_VM_INCOMING) {
            lb_fail(err, LB_E_STATE, "VM %s is still coming in from host %s", s->vm, e.peer);
            lb_remedy(err, "wait until it runs here");
        }
        return -1;
    }
    if (lb_vm_entry_load(env.state_dir, s->vm, &e, err)) {
        lb_vm_entry_remove(env.state_dir, s->vm, NULL);
        return -1;
    }
    if (e.state != LB_VM_RUNNING)
        return lb_fail(err, LB_E_STATE, "VM %s is %s", s->vm, lb_vm_state_name(e.state));
    if (load_wish(s, &wish, err) || lb_hosts_load(env.state_dir, &hosts, err))
        return -1;
    to = lb_hosts_by_name(&hosts, s->peer);
    if (!to) {
        lb_hosts_free(&hosts);
        return lb_fail(err, LB_E_NOT_FOUND, "host %s is not known here", s->peer);
    }
    lb_log(LB_LOG_INFO, "%s to %s (%s)", opts.dry_run ? "preflight" : "migration", to->name,
           to->address);
    opts.wish_json = wish;
    rc = lb_migrate_out(&env, &e, to, &opts, &res, err);
    lb_hosts_free(&hosts);
    *json = lb_migrate_result_json(&e, s->peer, "out", started, &res);
    LB_AUTO_FREE char *path = lb_asprintf("%s/history.jsonl", env.state_dir);
    if (*json && !opts.dry_run && lb_file_append_line(path, *json, &he))
        lb_log_error(LB_LOG_WARN, &he);
    /* The report is the result of a dry run, and the reason of a refusal. */
    if (*json && (opts.dry_run || (rc && err->code == LB_E_PREFLIGHT)))
        lb_sess_add_checks(s, json);
    return rc;
}

/* -------------------------------------------------------------------- protection */

static struct lb_remus_env remus_env_of(struct sess *s, const struct lb_session_env *base)
{
    return (struct lb_remus_env){.base = *base, .failover_fd = s->failover_fd,
                                 .failover_force = &s->failover_force, .status = on_status};
}

static char *end_json(const struct sess *s, const char *end)
{
    json_t *o = json_object();

    json_object_set_new(o, "vm", lb_json_text(s->vm));
    json_object_set_new(o, "host", lb_json_text(s->peer));
    json_object_set_new(o, "end", json_string(end));
    return lb_json_dump(o);
}

/* The wish, the entry (locked: returns the lock) and the other host. */
static int load_protection(struct sess *s, struct lb_protect_wish *wish, struct lb_vm_entry *e,
                           struct lb_hosts *hosts, struct lb_error *err)
{
    const char *dir = s->start->state_dir;
    LB_AUTO_FD int lock = lb_vm_lock_patiently(dir, s->vm, LOCK_WAIT_MS, err);

    if (lock < 0)
        return -1;
    if (lb_vm_entry_load(dir, s->vm, e, err)) {
        lb_vm_entry_remove(dir, s->vm, NULL);
        return -1;
    }
    if (e->state != LB_VM_RUNNING)
        return lb_fail(err, LB_E_STATE, "VM %s is %s", s->vm, lb_vm_state_name(e->state));
    if (lb_wish_load(dir, s->vm, wish, err) || lb_hosts_load(dir, hosts, err))
        return -1;
    if (!lb_hosts_by_name(hosts, s->peer))
        return lb_fail(err, LB_E_NOT_FOUND, "host %s is not known here", s->peer);
    return LB_STEAL_FD(lock);
}

static int protect(struct sess *s, const struct lb_identity *id, char **json, struct lb_error *err)
{
    static const struct lb_protect_status beginning = {.role = "primary", .state = "connecting"};
    LB_AUTO_FREE struct lb_protect_wish *wish = lb_alloc(sizeof(*wish));
    struct lb_session_env base = lb_sess_env(s, id);
    struct lb_remus_env env = remus_env_of(s, &base);
    struct lb_protect_status first = beginning;
    enum lb_protect_end how = LB_PROTECT_FAILED;
    struct lb_hosts hosts = {0};
    struct lb_vm_entry e;
    int rc;

    open_log(s, s->id);
    first.backup = s->peer;
    first.interval_ms = LB_REMUS_INTERVAL_MS;
    first.lease_left_ms = -1;
    on_status(&first, s);
    LB_AUTO_FD int lock = load_protection(s, wish, &e, &hosts, err);
    rc = lock < 0 ? -1
                  : lb_protect_run(&env, &e, lb_hosts_by_name(&hosts, s->peer), &wish->opts, &how, err);
    lb_hosts_free(&hosts);
    *json = end_json(s, lb_protect_end_name(how));
    return rc;
}

/* The host that it came from may be its backup next time: it takes the place of this one. */
static void remember_peer(struct sess *s)
{
    LB_AUTO_FREE struct lb_protect_wish *w = lb_alloc(sizeof(*w));
    struct lb_error err = LB_ERROR_INIT;

    if (lb_wish_load(s->start->state_dir, s->vm, w, &err) ||
        (add_peer(s, w) && lb_wish_save(s->start->state_dir, s->vm, w, &err)))
        lb_log_error(LB_LOG_WARN, &err);
}

/* What came in is the beginning of a protection. */
static int serve_backup(const struct lb_session_env *base, struct lb_chan *chan, const char *peer,
                        Lb__Control *first, char *vm_name, struct lb_error *err)
{
    struct sess *s = base->arg;
    struct lb_remus_env env = remus_env_of(s, base);
    int rc;

    if (!first->migrate_request->dry_run)
        lb_sess_set_role(s, "backup");
    rc = lb_backup_serve(&env, chan, peer, first, vm_name, &s->promoted, err);
    if (!rc && s->promoted)
        remember_peer(s);
    return rc;
}

static int serve_other(const struct lb_session_env *base, struct lb_chan *chan, const char *peer,
                       Lb__Control *first, char *vm_name, struct lb_error *err)
{
    struct sess *s = base->arg;

    if (first->kind_case == LB__CONTROL__KIND_ASK) {
        s->asked = true;
        return lb_serve_ask(s, chan, peer, first->ask, err);
    }
    return serve_backup(base, chan, peer, first, vm_name, err);
}

static bool trusted(const uint8_t pub[LB_KEY_BYTES], void *arg)
{
    return lb_hosts_by_key(arg, pub) != NULL;
}

static void describe_peer(int fd, char out[128])
{
    struct sockaddr_storage a;
    socklen_t n = sizeof(a);
    char host[64], port[16];

    if (getpeername(fd, (struct sockaddr *)&a, &n) ||
        getnameinfo((struct sockaddr *)&a, n, host, sizeof(host), port, sizeof(port),
                    NI_NUMERICHOST | NI_NUMERICSERV))
        snprintf(out, 128, "unknown address");
    else
        snprintf(out, 128, "%s port %s", host, port);
}

static int serve_in(struct sess *s, const struct lb_identity *id, char **json,
                    struct lb_error *err)
{
    struct lb_session_env env = lb_sess_env(s, id);
    struct lb_hosts hosts = {0};
    const struct lb_host *h;
    struct lb_chan *chan = NULL;
    char from[128], vm[128] = "";
    struct lb_vm_entry e;
    int rc;

    describe_peer(CONN_FD, from);
    if (lb_hosts_load(env.state_dir, &hosts, err))
        return -1;
    /* Until it has shown a trusted key a peer makes no file here. */
    if (lb_chan_accept(lb_tcp_from_fd(CONN_FD), id, trusted, &hosts, HANDSHAKE_TIMEOUT_MS, &chan,
                       err)) {
        lb_hosts_free(&hosts);
        return lb_context(err, "connection from %s", from);
    }
    h = lb_hosts_by_key(&hosts, lb_chan_peer_key(chan));
    pthread_mutex_lock(&s->mu);
    snprintf(s->peer, sizeof(s->peer), "%s", h ? h->name : "");
    s->hello_due = true;
    pthread_mutex_unlock(&s->mu);
    wake(s);
    lb_hosts_free(&hosts);
    open_log(s, s->id);
    set_fields(s);
    rc = lb_serve_channel(&env, chan, s->peer, vm, err);
    lb_chan_close(chan);
    if (s->asked)
        return rc;
    if (!vm[0]) {
        /* A question (is it there, what became of it): not worth a log file of its own. */
        LB_AUTO_FREE char *path = lb_asprintf("%s/log/%s.log", env.state_dir, s->id);
        lb_log_set_fd(-1);
        unlink(path);
        return rc;
    }
    /* A refused VM must not leave the directory its lock was in. */
    if (lb_vm_name_valid(vm) && lb_vm_entry_load(env.state_dir, vm, &e, NULL)) {
        LB_AUTO_FREE char *dir = lb_vm_dir(env.state_dir, vm, false);
        LB_AUTO_FD int lock = access(dir, F_OK) ? -1 : lb_vm_lock(env.state_dir, vm, NULL);

        /* with the lock: another VM may have got the name meanwhile */
        if (lock >= 0 && lb_vm_entry_load(env.state_dir, vm, &e, NULL))
            lb_vm_entry_remove(env.state_dir, vm, NULL);
    }
    if (!rc && !strcmp(s->role, "backup")) {
        *json = end_json(s, s->promoted ? "promoted" : "discarded");
    } else if (!rc) {
        json_t *o = json_object();

        json_object_set_new(o, "vm", lb_json_text(vm));
        json_object_set_new(o, "host", lb_json_text(s->peer));
        json_object_set_new(o, "direction", json_string("in"));
        *json = lb_json_dump(o);
    }
    return rc;
}

static int recover(struct sess *s, char **json, struct lb_error *err)
{
    LB_AUTO_FREE char *name = lb_asprintf("recover-%s", s->vm);
    char text[512] = "";
    json_t *o;
    int rc;
    LB_AUTO_FD int lock = lb_vm_lock(s->start->state_dir, s->vm, err);

    if (lock < 0)
        return -1;
    open_log(s, name);
    rc = lb_recover_here(s->start->state_dir, s->start->config_path, s->vm, text, err);
    if (text[0])
        lb_log(rc ? LB_LOG_WARN : LB_LOG_INFO, "%s", text);
    o = json_object();
    json_object_set_new(o, "name", lb_json_text(s->vm));
    json_object_set_new(o, "text", lb_json_text(text));
    *json = lb_json_dump(o);
    return rc;
}

/* ------------------------------------------------------------------- begin, end */

static Lb__SessionStart *read_start(struct lb_error *err)
{
    LB_AUTO_FREE char *buf = NULL;
    Lb__SessionStart *m;
    size_t len;

    if (lb_file_read("/proc/self/fd/3", LB_RPC_MAX_BYTES, &buf, &len, err))
        return NULL;
    m = lb__session_start__unpack(NULL, len, (uint8_t *)buf);
    sodium_memzero(buf, len); /* there may be a passphrase in it */
    if (!m || m->session_id.len != LB_SESSION_ID_BYTES || !m->state_dir[0]) {
        if (m)
            lb__session_start__free_unpacked(m, NULL);
        lb_fail(err, LB_E_USAGE, "--session is for lifeboatd's own use");
        return NULL;
    }
    close(START_FD);
    return m;
}

static int begin(struct sess *s, struct lb_error *err)
{
    pthread_condattr_t attr;

    s->start = read_start(err);
    if (!s->start)
        return -1;
    lb_log_set_level((enum lb_log_level)s->start->log_level);
    if (fcntl(CONN_FD, F_GETFD) >= 0)
        fcntl(CONN_FD, F_SETFD, FD_CLOEXEC);
    lb_hex(s->id, s->start->session_id.data, LB_SESSION_ID_BYTES);
    snprintf(s->role, sizeof(s->role), "%s", s->start->role);
    snprintf(s->vm, sizeof(s->vm), "%.127s", s->start->vm);
    snprintf(s->peer, sizeof(s->peer), "%.127s", s->start->host);
    set_fields(s);
    s->sessions_path = lb_asprintf("%s/sessions.sock", s->start->state_dir);
    s->cancel_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    s->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    s->failover_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    s->go_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (s->cancel_fd < 0 || s->wake_fd < 0 || s->failover_fd < 0 || s->go_fd < 0)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot make an event descriptor");
    pthread_mutex_init(&s->mu, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&s->cond, &attr);
    pthread_condattr_destroy(&attr);
    if (pthread_create(&s->thread, NULL, link_main, s))
        return lb_fail(err, LB_E_INTERNAL, "cannot start a thread");
    return 0;
}

typedef int work_fn(struct sess *s, char **json, struct lb_error *err);

/* The roles whose work is elsewhere. */
static work_fn *work_of(const char *role)
{
    static const struct {
        const char *role;
        work_fn *work;
    } works[] = {
        {"checkpoint", lb_work_checkpoint}, {"scheduled", lb_work_checkpoint},
        {"restore", lb_work_restore},       {"fill", lb_work_fill},
        {"clone", lb_work_clone},           {"catalog", lb_work_catalog},
        {"plan", lb_work_plan},             {"ask", lb_work_ask},
        {"check", lb_work_check},
    };

    for (size_t i = 0; i < LB_ARRAY_LEN(works); i++)
        if (!strcmp(role, works[i].role))
            return works[i].work;
    return NULL;
}

/* Is its work to talk to other hosts? */
static bool asks(const char *role)
{
    return !strcmp(role, "ask") || !strcmp(role, "check") || !strcmp(role, "plan");
}

/* No error reaches an operator without a word on what to do; errors of deep layers
 * cannot know it. */
static void add_remedy(struct sess *s, struct lb_error *err)
{
    if (err->remedy[0])
        return;
    if (work_of(s->start->role) && !asks(s->start->role)) {
        if (err->code == LB_E_AUTH)
            lb_remedy(err, "give the key with which it was made: --key or --passphrase");
        else
            lb_remedy(err, "see %.250s/log/%s.log", s->start->state_dir, s->id);
        return;
    }
    switch (err->code) {
    case LB_E_AUTH:
    case LB_E_PROTO:
        lb_remedy(err, "data was changed on the way, or it is no lifeboatd of this version that "
                       "answers: check the address in `lifeboat host ls` and the network, then try "
                       "again");
        break;
    case LB_E_NET:
        lb_remedy(err, "check the network and lifeboatd on the other host, then try again");
        break;
    default:
        lb_remedy(err, "see %.250s/log/%s.log", s->start->state_dir, s->id);
    }
}

/* Tell the supervisor, when there is one, and go. */
static void end(struct sess *s, int rc, char *json, const struct lb_error *err)
{
    Lb__SessionEvent e = LB__SESSION_EVENT__INIT;
    Lb__RpcFailure f = LB__RPC_FAILURE__INIT;
    uint64_t deadline = lb_now_ns() + FINAL_WAIT_NS;

    if (rc) {
        f.code = err->code;
        f.message = (char *)err->message;
        f.remedy = (char *)err->remedy;
        f.json = json ? json : (char *)"";
        e.kind_case = LB__SESSION_EVENT__KIND_FAILURE;
        e.failure = &f;
    } else {
        e.kind_case = LB__SESSION_EVENT__KIND_RESULT_JSON;
        e.result_json = json ? json : (char *)"{}";
    }
    pthread_mutex_lock(&s->mu);
    s->final = &e;
    wake(s);
    while (!s->final_sent && wait_until(s, deadline))
        ;
    s->stop = true;
    wake(s);
    pthread_mutex_unlock(&s->mu);
    pthread_join(s->thread, NULL);
}

int lb_session_main(void)
{
    static struct sess s;
    struct lb_error err = LB_ERROR_INIT;
    struct lb_identity id = {0};
    char *json = NULL;
    int rc = -1;

    prctl(PR_SET_NAME, "lifeboatd"); /* it was started by way of /proc/self/exe */
    if (sodium_init() < 0 || begin(&s, &err)) {
        lb_log_error(LB_LOG_ERROR, &err);
        return lb_errcode_exit(err.code ? err.code : LB_E_INTERNAL);
    }
    LB_AUTO_FREE char *throttle = lb_asprintf("%s/throttle", s.start->state_dir);
    lb_qemu_set_throttle_dir(throttle);
    if (work_of(s.start->role))
        rc = work_of(s.start->role)(&s, &json, &err);
    else if (!strcmp(s.start->role, "recover"))
        rc = recover(&s, &json, &err);
    else if (lb_identity_load(s.start->state_dir, &id, &err))
        rc = -1;
    else if (!strcmp(s.start->role, "out"))
        rc = migrate_out(&s, &id, &json, &err);
    else if (!strcmp(s.start->role, "protect"))
        rc = protect(&s, &id, &json, &err);
    else if (!strcmp(s.start->role, "in"))
        rc = serve_in(&s, &id, &json, &err);
    else
        lb_fail(&err, LB_E_USAGE, "there is no session role \"%.20s\"", s.start->role);
    lb_identity_wipe(&id);
    if (rc)
        add_remedy(&s, &err);
    if (rc)
        lb_log_error(err.code == LB_E_UNDECIDED ? LB_LOG_WARN : LB_LOG_ERROR, &err);
    else
        lb_log(LB_LOG_DEBUG, "ended well");
    end(&s, rc, json, &err);
    free(json);
    return rc ? lb_errcode_exit(err.code) : 0;
}
