/*
 * cmd/daemon/worker.c - one request answered by a forked copy.
 *
 * The supervisor has one thread, so a plain fork is safe; the child keeps nothing open but the
 * client's connection, answers, and exits. What it needs to know (options,
 * sessions and their last events) it has as a copy. It outlives the supervisor.
 */
#include "cmd/daemon/daemon.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/pidfd.h>
#include <sys/wait.h>

#define ANSWER_TIMEOUT_NS UINT64_C(30000000000)

struct worker {
    LIST_ENTRY(worker) link;
    struct daemon *d;
    pid_t pid;
    int pidfd;
    struct event *on_exit;
};

static void on_exit_event(evutil_socket_t fd, short what, void *arg)
{
    struct worker *w = arg;
    struct daemon *d = w->d;
    int status = 0;

    (void)fd;
    (void)what;
    if (waitpid(w->pid, &status, WNOHANG) == w->pid && WIFSIGNALED(status))
        lb_log(LB_LOG_ERROR, "worker %d was killed by signal %d", (int)w->pid, WTERMSIG(status));
    LIST_REMOVE(w, link);
    event_free(w->on_exit);
    close(w->pidfd);
    free(w);
    d->n_workers--;
    lb_daemon_scan(d);
}

void lb_child_reset(void)
{
    sigset_t none;

    for (int s = 1; s < NSIG; s++)
        if (s != SIGPIPE && s != SIGKILL && s != SIGSTOP)
            signal(s, SIG_DFL);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    setsid();
}

static void answer(struct daemon *d, int fd, const Lb__RpcRequest *r)
{
    struct lb_error err = LB_ERROR_INIT;
    Lb__RpcReply reply = LB__RPC_REPLY__INIT;
    Lb__RpcFailure f = LB__RPC_FAILURE__INIT;
    char *json = lb_op_vm(d, r, &err);

    if (json) {
        reply.kind_case = LB__RPC_REPLY__KIND_RESULT_JSON;
        reply.result_json = json;
    } else {
        f.code = err.code;
        f.message = err.message;
        f.remedy = err.remedy;
        reply.kind_case = LB__RPC_REPLY__KIND_FAILURE;
        reply.failure = &f;
    }
    if (lb_rpc_send(fd, &reply.base, lb_now_ns() + ANSWER_TIMEOUT_NS, &err) &&
        err.code == LB_E_NO_SPACE) { /* does not fit a message */
        f.code = err.code;
        f.message = err.message;
        f.remedy = err.remedy;
        reply.kind_case = LB__RPC_REPLY__KIND_FAILURE;
        reply.failure = &f;
        lb_rpc_send(fd, &reply.base, lb_now_ns() + ANSWER_TIMEOUT_NS, NULL);
    }
}

int lb_worker_start(struct daemon *d, int fd, const Lb__RpcRequest *r, struct lb_error *err)
{
    LB_AUTO_FD int mine = fd;
    sigset_t all, old;
    struct worker *w;
    pid_t pid;

    /* No signal may run a handler of the loop in the child: they share its wake-up pipe. */
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, &old);
    pid = fork();
    if (pid == 0) {
        lb_child_reset();
        close_range(3, (unsigned)mine - 1, 0);
        close_range((unsigned)mine + 1, ~0u, 0);
        answer(d, mine, r);
        _exit(0);
    }
    sigprocmask(SIG_SETMASK, &old, NULL);
    if (pid < 0)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot start a worker");
    w = lb_alloc(sizeof(*w));
    w->d = d;
    w->pid = pid;
    w->pidfd = pidfd_open(pid, 0);
    w->on_exit = w->pidfd < 0 ? NULL : event_new(d->base, w->pidfd, EV_READ, on_exit_event, w);
    if (!w->on_exit || event_add(w->on_exit, NULL))
        lb_log(LB_LOG_ERROR, "cannot watch worker %d", (int)pid);
    LIST_INSERT_HEAD(&d->workers, w, link);
    d->n_workers++;
    return 0;
}
