/*
 * cmd/daemon/supervisor.c - start, scan, stop.
 *
 * The scan looks at every entry of the registry: a VM that is in the middle of a
 * migration or a checkpoint and that nobody works on (its session died, or this host just came
 * up) gets a session of role "recover"; a VM that runs here and is to be protected gets one
 * of role "protect", one whose memory nobody fills one of role "fill", one of which a checkpoint is due
 * one of role "scheduled"; a VM whose process is gone becomes dead. It runs at start, when
 * a session ends, and every 2 s; what did not succeed (the other host does not
 * answer) is tried again later and later (protect.c).
 */
#include "cmd/daemon/daemon.h"

#include <dirent.h>
#include <errno.h>
#include <event2/listener.h>
#include <fcntl.h>
#include <signal.h>
#include <sodium.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "migrate/journal.h"

#define LOG_KEEP_S (30 * 86400)
#define PRUNE_INTERVAL_MS UINT64_C(86400000)
#define ORPHANS_INTERVAL_NS UINT64_C(30000000000)

/* ---------------------------------------------------------------------- scan */

static void note_death(struct daemon *d, const char *name)
{
    struct lb_error err = LB_ERROR_INIT;
    struct lb_vm_entry e;
    LB_AUTO_FD int lock = lb_vm_lock(d->opt.state_dir, name, NULL);

    /* Read again: the lock was free, so nobody changes it any more. */
    if (lock < 0 || lb_vm_entry_load(d->opt.state_dir, name, &e, &err) ||
        e.state != LB_VM_RUNNING || lb_proc_alive(&e.proc))
        return;
    e.state = LB_VM_DEAD;
    snprintf(e.note, sizeof(e.note), "its process is gone");
    if (lb_vm_entry_save(d->opt.state_dir, &e, &err))
        lb_log_error(LB_LOG_ERROR, &err);
    else
        lb_log(LB_LOG_WARN, "vm=%s its process %d is gone", name, (int)e.proc.pid);
}

void lb_daemon_scan(struct daemon *d)
{
    LB_AUTO_FREE struct lb_vm_entry *v = NULL;
    struct lb_error err = LB_ERROR_INIT;
    unsigned n = 0;

    if (lb_vm_entry_list(d->opt.state_dir, &v, &n, &err)) {
        lb_log_error(LB_LOG_ERROR, &err);
        return;
    }
    for (unsigned i = 0; i < n; i++) {
        switch (v[i].state) {
        case LB_VM_RUNNING:
            if (!lb_proc_alive(&v[i].proc)) {
                note_death(d, v[i].name);
            } else {
                lb_protect_scan(d, &v[i]);
                lb_schedule_scan(d, &v[i]);
            }
            break;
        case LB_VM_MIGRATING_OUT:
        case LB_VM_INCOMING:
        case LB_VM_HANDED_OVER:
        case LB_VM_PROTECTED:
        case LB_VM_STANDBY:
        case LB_VM_CHECKPOINTING:
        case LB_VM_RESTORING:
            lb_recover_scan(d, &v[i]);
            break;
        case LB_VM_FILLING:
            lb_fill_scan(d, &v[i]);
            break;
        case LB_VM_SUSPENDED:
            if (v[i].proc.pid > 0) /* the process that is to end, when nobody has seen to it */
                lb_recover_scan(d, &v[i]);
            break;
        case LB_VM_DEAD:
            break;
        }
    }
    lb_wards_prune(d, v, n);
    lb_batch_step(d);
}

/* A receiver journalled PREPARED whose entry is gone never ran: make that answer durable
 * while nobody asks (the entry is written before the journal, removed after it). */
static void refuse_orphans(struct daemon *d)
{
    LB_AUTO_FREE struct lb_journal *v = NULL;
    struct lb_error err = LB_ERROR_INIT;
    unsigned n = 0;

    /* It reads every journal, and they are many after some years. */
    if (d->last_orphans_ns && lb_now_ns() - d->last_orphans_ns < ORPHANS_INTERVAL_NS)
        return;
    d->last_orphans_ns = lb_now_ns();
    if (lb_journal_list(d->opt.state_dir, &v, &n, &err)) {
        lb_log_error(LB_LOG_ERROR, &err);
        return;
    }
    for (unsigned i = 0; i < n; i++) {
        struct lb_error why = LB_ERROR_INIT;
        struct lb_journal j;
        struct lb_vm_entry e;

        if (v[i].state != LB_J_PREPARED || lb_vm_is_locked(d->opt.state_dir, v[i].vm))
            continue;
        if (!lb_vm_entry_load(d->opt.state_dir, v[i].vm, &e, &why) ? !strcmp(e.token, v[i].token)
                                                                  : why.code != LB_E_NOT_FOUND)
            continue;
        LB_AUTO_FD int lock = lb_journal_lock(d->opt.state_dir, v[i].token, 0, NULL);
        if (lock < 0 || lb_journal_load(d->opt.state_dir, v[i].token, &j, NULL) ||
            j.state != LB_J_PREPARED)
            continue;
        snprintf(j.detail, sizeof(j.detail), "given up before it was committed");
        if (lb_journal_move(d->opt.state_dir, &j, LB_J_REFUSED, &err))
            lb_log_error(LB_LOG_ERROR, &err);
    }
}

static void prune_logs(struct daemon *d)
{
    LB_AUTO_FREE char *path = lb_asprintf("%s/log", d->opt.state_dir);
    time_t now = time(NULL);
    struct dirent *e;
    DIR *dir = opendir(path);

    while (dir && (e = readdir(dir))) {
        struct stat st;

        if (e->d_name[0] != '.' && !fstatat(dirfd(dir), e->d_name, &st, AT_SYMLINK_NOFOLLOW) &&
            S_ISREG(st.st_mode) && now - st.st_mtime > LOG_KEEP_S)
            unlinkat(dirfd(dir), e->d_name, 0);
    }
    if (dir)
        closedir(dir);
}

/* Directories of VMs that were released and have died since, and of removals cut short. */
static void prune_vms(struct daemon *d)
{
    LB_AUTO_FREE char *vms = lb_asprintf("%s/vms", d->opt.state_dir);
    struct dirent *e;
    DIR *dir = opendir(vms);

    while (dir && (e = readdir(dir))) {
        LB_AUTO_FREE char *path = lb_asprintf("%s/%s", vms, e->d_name);
        LB_AUTO_FREE char *entry = lb_asprintf("%s/vm.json", path);
        LB_AUTO_FREE char *qmp = lb_vm_qmp_path(d->opt.state_dir, e->d_name);

        if (!strncmp(e->d_name, ".gone.", 6)) {
            lb_remove_tree(path, NULL);
            continue;
        }
        if (!lb_vm_name_valid(e->d_name) || !access(entry, F_OK) ||
            lb_vm_is_locked(d->opt.state_dir, e->d_name))
            continue;
        struct lb_error why = LB_ERROR_INIT;
        LB_AUTO_FD int answers = lb_unix_connect(qmp, &why);
        if (answers >= 0 || why.sys_errno == EAGAIN) /* EAGAIN: there, and busy */
            continue;
        LB_AUTO_FD int lock = lb_vm_lock(d->opt.state_dir, e->d_name, NULL);
        if (lock >= 0 && access(entry, F_OK))
            lb_remove_tree(path, NULL);
    }
    if (dir)
        closedir(dir);
}

static void prune(struct daemon *d)
{
    struct lb_error err = LB_ERROR_INIT;
    uint64_t now = lb_wall_ms();

    if (d->last_prune_ms && now - d->last_prune_ms < PRUNE_INTERVAL_MS)
        return;
    d->last_prune_ms = now;
    if (lb_journal_prune(d->opt.state_dir, &err))
        lb_log_error(LB_LOG_WARN, &err);
    prune_logs(d);
    prune_vms(d);
}

static void on_scan(evutil_socket_t fd, short what, void *arg)
{
    (void)fd;
    (void)what;
    lb_daemon_scan(arg);
    refuse_orphans(arg);
    prune(arg);
}

/* ---------------------------------------------------------------- start, stop */

static int make_dirs(const struct daemon_options *o, struct lb_error *err)
{
    static const char *const subs[] = {"", "/vms", "/handover", "/log", "/throttle"};
    LB_AUTO_FREE char *run = lb_strdup(o->socket);
    char *slash = strrchr(run, '/');

    for (size_t i = 0; i < LB_ARRAY_LEN(subs); i++) {
        LB_AUTO_FREE char *path = lb_asprintf("%s%s", o->state_dir, subs[i]);

        /* A receiver that runs as an unprivileged user must reach its own directory in
         * vms/, and see no other. */
        if (lb_mkdir_p(path, i < 2 ? 0711 : 0700, err))
            return lb_remedy(err, "lifeboatd needs root, or a --state-dir that it may write");
    }
    if (slash && slash != run) {
        *slash = '\0';
        if (lb_mkdir_p(run, 0755, err))
            return lb_remedy(err, "lifeboatd needs root, or a --socket in a directory that it may "
                                  "write");
    }
    return 0;
}

static int lock_state(struct daemon *d, struct lb_error *err)
{
    LB_AUTO_FREE char *path = lb_asprintf("%s/lock", d->opt.state_dir);
    LB_AUTO_FD int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);

    if (fd < 0)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot open %s", path);
    if (flock(fd, LOCK_EX | LOCK_NB) < 0) {
        if (errno != EWOULDBLOCK)
            return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot lock %s", path);
        lb_fail(err, LB_E_EXISTS, "another lifeboatd already works with state directory %s",
                d->opt.state_dir);
        return lb_remedy(err, "stop it, or give this one another --state-dir and --socket");
    }
    d->lock_fd = LB_STEAL_FD(fd);
    return 0;
}

static void on_stop(evutil_socket_t sig, short what, void *arg)
{
    struct daemon *d = arg;

    (void)what;
    lb_log(LB_LOG_INFO, "signal %d: stopping; VMs and sessions go on", (int)sig);
    event_base_loopbreak(d->base);
}

/* To systemd (Type=notify): whoever is ordered after us finds the socket there. Nothing that we start is to
 * speak to it in our name. */
static void say_ready(void)
{
    const char *path = getenv("NOTIFY_SOCKET");
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    size_t len = path ? strlen(path) : 0;
    LB_AUTO_FD int fd = -1;

    if (!len || len >= sizeof(a.sun_path))
        return;
    memcpy(a.sun_path, path, len);
    if (a.sun_path[0] == '@') /* an abstract address */
        a.sun_path[0] = '\0';
    fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || sendto(fd, "READY=1", 7, MSG_NOSIGNAL, (struct sockaddr *)&a,
                         (socklen_t)(offsetof(struct sockaddr_un, sun_path) + len)) < 0)
        lb_log(LB_LOG_WARN, "cannot tell systemd that we are ready: %s", strerror(errno));
    unsetenv("NOTIFY_SOCKET");
}

static void on_hup(evutil_socket_t sig, short what, void *arg)
{
    (void)sig;
    (void)what;
    (void)arg;
    lb_log(LB_LOG_INFO, "signal 1: every session reads the configuration anew; nothing to do");
}

static int start(struct daemon *d, struct lb_error *err)
{
    struct timeval every = {SCAN_INTERVAL_S, 0};
    struct lb_identity id;
    const char *listen;

    if (make_dirs(&d->opt, err) || lock_state(d, err))
        return -1;
    if (lb_config_load(d->opt.config_path, &d->cfg, err))
        return -1;
    if (lb_identity_load(d->opt.state_dir, &id, err))
        return -1;
    lb_identity_wipe(&id);
    d->base = event_base_new();
    if (!d->base)
        return lb_fail(err, LB_E_INTERNAL, "cannot make an event loop");
    d->sessions_path = lb_asprintf("%s/sessions.sock", d->opt.state_dir);
    listen = d->opt.listen ? d->opt.listen : d->cfg.listen;
    if (lb_sessions_start(d, err) || lb_peers_start(d, listen, err) ||
        lb_rpc_server_start(d, err) || lb_directory_start(d, err))
        return -1;
    d->on_term = evsignal_new(d->base, SIGTERM, on_stop, d);
    d->on_int = evsignal_new(d->base, SIGINT, on_stop, d);
    d->on_hup = evsignal_new(d->base, SIGHUP, on_hup, d);
    d->scan_timer = event_new(d->base, -1, EV_PERSIST, on_scan, d);
    if (!d->on_term || !d->on_int || !d->on_hup || !d->scan_timer)
        return lb_fail(err, LB_E_INTERNAL, "cannot make events");
    event_add(d->on_term, NULL);
    event_add(d->on_int, NULL);
    event_add(d->on_hup, NULL);
    event_add(d->scan_timer, &every);
    lb_log(LB_LOG_INFO, "lifeboatd " LB_VERSION " serves %s, state %s, listens on %s",
           d->opt.socket, d->opt.state_dir, listen);
    /* Sessions of an earlier supervisor hold the locks of their VMs, so that the first
     * scan leaves them alone whether they reconnected or not. */
    on_scan(-1, 0, d);
    lb_evac_resume(d);
    return 0;
}

int lb_daemon_run(const struct daemon_options *opt, struct lb_error *err)
{
    /* One per process, until its end: the kernel closes and frees. */
    static struct daemon the_daemon;
    struct daemon *d = &the_daemon;
    int rc;

    d->opt = *opt;
    d->lock_fd = -1;
    LIST_INIT(&d->clients);
    LIST_INIT(&d->sessions);
    LIST_INIT(&d->peers);
    LIST_INIT(&d->workers);
    LIST_INIT(&d->wards);
    if (sodium_init() < 0)
        return lb_fail(err, LB_E_INTERNAL, "libsodium does not start");
    rc = start(d, err);
    if (!rc) {
        say_ready();
        event_base_dispatch(d->base);
        unlink(d->opt.socket);
        unlink(d->sessions_path);
    }
    return rc;
}
