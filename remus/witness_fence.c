/* remus/witness_fence.c - the one who claims cuts the other host off first: `CMD off HOST`.
 *
 * CMD is a shell command line; "off" and the host's name are added to it. It exits with 0 only when it
 * is certain that HOST is off. Anything else, and not ending in time (its process group is killed
 * then), is "not known": never "lost", as a command that failed says nothing about the other side. */
#include "remus/witness_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

struct fence {
    const char *command, *host; /* of the setup */
};

static int fence_open(const struct lb_witness_setup *s, void **impl, struct lb_error *err)
{
    struct fence *f;

    if (strspn(s->rest, " \t") == strlen(s->rest)) {
        lb_fail(err, LB_E_USAGE, "witness fence: there is no command");
        return lb_remedy(err, "write it as fence:COMMAND; `COMMAND off HOST` must cut that host off");
    }
    f = lb_alloc(sizeof(*f));
    f->command = s->rest;
    f->host = s->peer_name;
    *impl = f;
    return 0;
}

/* In a process group of its own, with no signal blocked or ignored; its output goes to `out`. */
static int start(const struct fence *f, int out, pid_t *pid, struct lb_error *err)
{
    LB_AUTO_FREE char *script = lb_asprintf("%s \"$@\"", f->command);
    char *argv[] = {"sh", "-c", script, "sh", "off", (char *)f->host, NULL};
    posix_spawn_file_actions_t files;
    posix_spawnattr_t attr;
    sigset_t all, none;
    int failed;

    sigfillset(&all);
    sigemptyset(&none);
    posix_spawnattr_init(&attr);
    posix_spawnattr_setflags(&attr, POSIX_SPAWN_SETPGROUP | POSIX_SPAWN_SETSIGMASK |
                                        POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETSCHEDULER);
    posix_spawnattr_setpgroup(&attr, 0);
    posix_spawnattr_setsigmask(&attr, &none);
    posix_spawnattr_setsigdefault(&attr, &all);
    posix_spawnattr_setschedpolicy(&attr, SCHED_OTHER); /* the claiming thread may be a real-time one */
    posix_spawnattr_setschedparam(&attr, &(struct sched_param){0});
    posix_spawn_file_actions_init(&files);
    posix_spawn_file_actions_addopen(&files, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_adddup2(&files, out, STDOUT_FILENO);
    posix_spawn_file_actions_adddup2(&files, out, STDERR_FILENO);
    failed = posix_spawn(pid, "/bin/sh", &files, &attr, argv, environ);
    posix_spawn_file_actions_destroy(&files);
    posix_spawnattr_destroy(&attr);
    if (failed)
        return lb_fail_errno(err, LB_E_INTERNAL, failed, "cannot start the fence command");
    return 0;
}

/* Keeps the newest of what it says. */
static void take_output(int fd, char *said, size_t cap)
{
    char buf[512];
    ssize_t n;

    while ((n = read(fd, buf, sizeof(buf))) > 0) {
        size_t keep = LB_MIN((size_t)n, cap - 1);

        memcpy(said, buf + n - keep, keep);
        said[keep] = '\0';
    }
}

/* Waits until it has ended; at the deadline it is killed. False when that was so. */
static bool wait_end(pid_t pid, int out, uint64_t deadline_ns, char *said, size_t cap, int *status)
{
    LB_AUTO_FD int pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
    bool in_time = pidfd >= 0;

    while (in_time) {
        struct pollfd p[2] = {{.fd = pidfd, .events = POLLIN}, {.fd = out, .events = POLLIN}};
        uint64_t now = lb_now_ns();

        if (now >= deadline_ns) {
            in_time = false;
            break;
        }
        /* at most a second, so that no deadline is too far away for an int */
        poll(p, 2, (int)LB_MIN((deadline_ns - now) / 1000000 + 1, 1000));
        take_output(out, said, cap);
        if (p[1].revents & (POLLHUP | POLLERR))
            out = -1; /* it closed its output; nothing more to come */
        if (p[0].revents)
            break;
    }
    if (!in_time)
        kill(-pid, SIGKILL);
    *status = W_EXITCODE(255, 0); /* should somebody else have waited for it */
    while (waitpid(pid, status, 0) < 0 && errno == EINTR)
        ;
    return in_time;
}

static enum lb_claim fence_claim(void *impl, const struct lb_remus_record *r, uint64_t deadline_ns,
                                 struct lb_error *err)
{
    const struct fence *f = impl;
    char said[200] = "";
    int ends[2], status;
    pid_t pid;

    (void)r;
    if (pipe2(ends, O_CLOEXEC) < 0) {
        lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot make a pipe");
        return LB_CLAIM_UNREACHABLE;
    }
    LB_AUTO_FD int out = ends[0];
    LB_AUTO_FD int in = ends[1];
    lb_set_nonblock(out, true);
    if (start(f, in, &pid, err))
        return LB_CLAIM_UNREACHABLE;
    lb_cleanup_fd(&in);
    in = -1;
    if (!wait_end(pid, out, deadline_ns, said, sizeof(said), &status)) {
        lb_fail(err, LB_E_NET, "the fence command did not end in time, host %s may be alive", f->host);
        return LB_CLAIM_UNREACHABLE;
    }
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0)
        return LB_CLAIM_WON;
    said[strcspn(said, "\n")] = '\0';
    lb_fail(err, LB_E_NET, "the fence command ended with %s %d, host %s may be alive%s%s",
            WIFEXITED(status) ? "exit code" : "signal",
            WIFEXITED(status) ? WEXITSTATUS(status) : WTERMSIG(status), f->host, *said ? ": " : "",
            said);
    return LB_CLAIM_UNREACHABLE;
}

const struct lb_witness_ops lb_witness_fence = {
    .kind = "fence",
    .automatic = true,
    .open = fence_open,
    .close = free,
    .arm = lb_witness_no_arm,
    .claim = fence_claim,
    .disarm = lb_witness_no_disarm,
    .read = lb_witness_no_read,
    .healthy = lb_witness_always_healthy,
};
