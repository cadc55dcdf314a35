/*
 * cmd/daemon/directory.c - says in the directory of hosts that this one exists, and what it has.
 *
 * Every 10 s a forked copy of the supervisor looks at the host, writes, and exits; while one is still at it (the directory does not
 * answer) no other begins. What cannot be written is logged once, and again when it can.
 */
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/pidfd.h>
#include <sys/wait.h>

#include "cmd/daemon/daemon.h"
#include "migrate/capacity.h"
#include "remus/directory.h"

#define PUBLISH_NS UINT64_C(5000000000)

struct directory {
    struct event *timer, *on_exit; /* on_exit NULL: nobody at work */
    int pidfd;
    pid_t pid;
    bool failing;
};

/* In the child: 0 or -1. The configuration is read anew, as sessions do. */
static int publish(const struct daemon *d, struct lb_error *err)
{
    struct lb_host_config cfg;
    struct lb_identity me = {0};
    json_t *fragment = NULL;
    char address[280];
    const char *spec;
    int rc = -1;

    if (lb_config_load(d->opt.config_path, &cfg, err))
        return -1;
    spec = lb_config_directory(&cfg);
    if (!spec) {
        rc = 0;
    } else if (!lb_identity_load(d->opt.state_dir, &me, err) &&
               !lb_directory_address(spec, d->opt.listen ? d->opt.listen : cfg.listen, address, err)) {
        fragment = lb_capacity_fragment(d->opt.state_dir, &cfg, me.pub, err);
        rc = fragment ? lb_directory_publish(spec, address, fragment, lb_now_ns() + PUBLISH_NS, err) : -1;
    }
    json_decref(fragment);
    lb_identity_wipe(&me);
    lb_config_free(&cfg);
    return rc;
}

static _Noreturn void child(const struct daemon *d)
{
    struct lb_error err = LB_ERROR_INIT;
    int rc;

    lb_child_reset();
    close_range(3, ~0u, 0);
    rc = publish(d, &err);
    if (rc && !d->directory->failing)
        lb_log_error(LB_LOG_WARN, &err);
    _exit(rc ? 1 : 0);
}

static void on_exit_event(evutil_socket_t fd, short what, void *arg)
{
    struct daemon *d = arg;
    struct directory *w = d->directory;
    int status = 0;
    bool good;

    (void)fd;
    (void)what;
    waitpid(w->pid, &status, WNOHANG);
    good = WIFEXITED(status) && !WEXITSTATUS(status);
    if (good && w->failing)
        lb_log(LB_LOG_INFO, "the directory of hosts answers again");
    w->failing = !good;
    event_free(w->on_exit);
    w->on_exit = NULL;
    close(w->pidfd);
}

static void watch(struct daemon *d)
{
    struct directory *w = d->directory;

    w->pidfd = pidfd_open(w->pid, 0);
    w->on_exit = w->pidfd < 0 ? NULL : event_new(d->base, w->pidfd, EV_READ, on_exit_event, d);
    if (w->on_exit && !event_add(w->on_exit, NULL))
        return;
    lb_log(LB_LOG_ERROR, "cannot watch the process that writes to the directory of hosts");
    kill(w->pid, SIGKILL);
    waitpid(w->pid, NULL, 0);
    if (w->on_exit)
        event_free(w->on_exit);
    w->on_exit = NULL;
    if (w->pidfd >= 0)
        close(w->pidfd);
}

static void on_time(evutil_socket_t fd, short what, void *arg)
{
    struct daemon *d = arg;
    struct directory *w = d->directory;
    sigset_t all, old;

    (void)fd;
    (void)what;
    if (w->on_exit)
        return;
    /* As for a worker: no signal may run a handler of the loop in the child. */
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, &old);
    w->pid = fork();
    if (w->pid == 0)
        child(d);
    sigprocmask(SIG_SETMASK, &old, NULL);
    if (w->pid > 0)
        watch(d);
}

int lb_directory_start(struct daemon *d, struct lb_error *err)
{
    struct timeval every = {LB_DIRECTORY_EVERY_S, 0};

    if (!lb_config_directory(&d->cfg))
        return 0;
    d->directory = lb_alloc(sizeof(*d->directory));
    d->directory->timer = event_new(d->base, -1, EV_PERSIST, on_time, d);
    if (!d->directory->timer || event_add(d->directory->timer, &every))
        return lb_fail(err, LB_E_INTERNAL, "cannot make events");
    on_time(-1, 0, d);
    return 0;
}
