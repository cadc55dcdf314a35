/* remus/disk_child.c - nbdkit and qemu-nbd as children of a session.
 *
 * The listening socket is made here and handed over (LISTEN_FDS), so there is nothing to wait for: a
 * client may connect at once, and when the child dies before it accepts, the connection ends. What it
 * says on stderr goes into a memfd: no file is left behind whatever happens. A child whose session dies is
 * killed, not asked: qemu-nbd forgets a SIGTERM that comes while it starts, and would hold its image for
 * ever. What was flushed is in the image all the same. The primary's nbdkit is not: see remus/nbdkit/plugin.c. */
#include "remus/disk_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/pidfd.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>

enum { TERM_MS = 1000, LAST_WORDS = 300, LISTEN_FD = 3 };

int lb_disk_find_program(const char *name, const char *package, char path[128],
                         struct lb_error *err)
{
    static const char *const dirs[] = {"/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin",
                                       "/sbin", "/bin"};
    for (size_t i = 0; i < LB_ARRAY_LEN(dirs); i++) {
        snprintf(path, 128, "%s/%s", dirs[i], name);
        if (access(path, X_OK) == 0)
            return 0;
    }
    lb_fail(err, LB_E_UNSUPPORTED, "disks cannot be replicated: %s is not installed", name);
    return lb_remedy(err, "apt-get install %s, or protect with --disk none", package);
}

static int listen_on(const char *path, uint32_t uid, uint32_t gid, struct lb_error *err)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof(a.sun_path)) {
        lb_fail(err, LB_E_USAGE, "the path of a socket is too long: %s", path);
        return lb_remedy(err, "use a state directory with a shorter name");
    }
    memcpy(a.sun_path, path, strlen(path) + 1);
    LB_AUTO_FD int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot make a socket");
    unlink(path);
    /* Narrow from the beginning: the mode of a new socket file comes from the descriptor. */
    if (fchmod(fd, 0600) < 0 || bind(fd, (struct sockaddr *)&a, sizeof(a)) < 0 ||
        (uid != geteuid() && chown(path, uid, gid) < 0) || listen(fd, 16) < 0)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot listen on %s", path);
    return LB_STEAL_FD(fd);
}

/* In the child: only calls that are safe after fork in a process with threads. */
static void exec_child(const struct lb_disk_child_opts *o, int listen_fd, int log_fd, pid_t parent)
{
    char listen_pid[32];
    char *const env[] = {(char *)"PATH=/usr/sbin:/usr/bin:/sbin:/bin", (char *)"LC_ALL=C",
                         (char *)"LISTEN_FDS=1", listen_pid, NULL};
    sigset_t none;
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    /* out of the way of the numbers they get */
    int l = fcntl(listen_fd, F_DUPFD_CLOEXEC, 16), e = fcntl(log_fd, F_DUPFD_CLOEXEC, 16);
    int p = o->pass_fd >= 0 ? fcntl(o->pass_fd, F_DUPFD_CLOEXEC, 16) : -1;

    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    signal(SIGPIPE, SIG_DFL);
    if (dup2(null, 0) < 0 || dup2(null, 1) < 0 || dup2(e, 2) < 0 || dup2(l, LISTEN_FD) < 0 ||
        (p >= 0 && dup2(p, LB_DISK_CHILD_FD) < 0) ||
        close_range(p >= 0 ? LB_DISK_CHILD_FD + 1 : LISTEN_FD + 1, ~0u, 0) < 0)
        _exit(126);
    snprintf(listen_pid, sizeof(listen_pid), "LISTEN_PID=%d", (int)getpid());
    /* the parent may have died before it was asked for */
    if (!o->outlives && (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0 || getppid() != parent))
        _exit(126);
    execve(o->argv[0], (char *const *)o->argv, env);
    dprintf(2, "cannot execute %s: error %d\n", o->argv[0], errno);
    _exit(127);
}

int lb_disk_child_start(const struct lb_disk_child_opts *opts, struct lb_disk_child *out,
                        struct lb_error *err)
{
    const char *slash = strrchr(opts->argv[0], '/');
    *out = (struct lb_disk_child){.pidfd = -1, .log_fd = -1, .outlives = opts->outlives};
    snprintf(out->name, sizeof(out->name), "%s", slash ? slash + 1 : opts->argv[0]);
    LB_AUTO_FD int log_fd = memfd_create("log", MFD_CLOEXEC);
    if (log_fd < 0)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot make a log for %s", out->name);
    LB_AUTO_FD int listen_fd = listen_on(opts->socket, opts->uid, opts->gid, err);
    if (listen_fd < 0)
        return -1;
    snprintf(out->socket, sizeof(out->socket), "%s", opts->socket);
    pid_t parent = getpid(), pid = fork();
    if (pid == 0)
        exec_child(opts, listen_fd, log_fd, parent);
    out->pidfd = pid > 0 ? pidfd_open(pid, 0) : -1;
    if (out->pidfd < 0) {
        int e = errno;
        lb_disk_child_unlink(out);
        if (pid > 0) {
            kill(pid, SIGKILL);
            waitpid(pid, NULL, 0);
        }
        return lb_fail_errno(err, LB_E_INTERNAL, e, "cannot start %s", out->name);
    }
    out->pid = pid;
    out->log_fd = LB_STEAL_FD(log_fd);
    return 0;
}

void lb_disk_child_unlink(struct lb_disk_child *c)
{
    if (c->socket[0])
        unlink(c->socket);
    c->socket[0] = '\0';
}

/* The end of what it said, on one line. */
static void last_words(const struct lb_disk_child *c, char text[LAST_WORDS])
{
    struct stat st;
    off_t size = fstat(c->log_fd, &st) == 0 ? st.st_size : 0;
    off_t from = size >= LAST_WORDS ? size - LAST_WORDS + 1 : 0;
    ssize_t n = pread(c->log_fd, text, LAST_WORDS - 1, from);
    n = n > 0 ? n : 0;
    while (n > 0 && text[n - 1] == '\n')
        n--;
    text[n] = '\0';
    for (char *p = text; *p; p++)
        if (*p == '\n' || *p == '\t')
            *p = ' ';
}

int lb_disk_child_failed(struct lb_disk_child *c, unsigned wait_ms, struct lb_error *err)
{
    char words[LAST_WORDS], how[48] = "does not work";
    siginfo_t info = {0};
    /* not reaped: the pid stays ours until lb_disk_child_end */
    if (lb_readable(c->pidfd, wait_ms) && waitid(P_PID, (id_t)c->pid, &info, WEXITED | WNOHANG | WNOWAIT) == 0 &&
        info.si_pid == c->pid)
        snprintf(how, sizeof(how), info.si_code == CLD_EXITED ? "ended with status %d" : "was killed by signal %d",
                 info.si_status);
    last_words(c, words);
    return lb_fail(err, LB_E_HV, "%s %s%s%s", c->name, how, words[0] ? ": " : "", words);
}

void lb_disk_child_end(struct lb_disk_child *c, unsigned grace_ms)
{
    char words[LAST_WORDS];
    lb_disk_child_unlink(c);
    if (c->pid <= 0)
        return;
    if (!lb_readable(c->pidfd, grace_ms) && !c->outlives) {
        kill(c->pid, SIGTERM);
        if (!lb_readable(c->pidfd, TERM_MS))
            kill(c->pid, SIGKILL);
    }
    while (waitpid(c->pid, NULL, c->outlives ? WNOHANG : 0) < 0 && errno == EINTR)
        ;
    last_words(c, words);
    if (words[0])
        lb_log(LB_LOG_DEBUG, "%s said: %s", c->name, words);
    close(c->pidfd);
    close(c->log_fd);
    *c = (struct lb_disk_child){.pidfd = -1, .log_fd = -1};
}
