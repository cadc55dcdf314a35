/* core/proc.c - processes named so that a reused pid cannot be mistaken.
 *
 * Signals and waiting go through a pidfd: it is opened first and the start
 * time compared after, so a pid reused in between is noticed. */
#include "core/core_internal.h"

#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/pidfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

int lb_proc_identify(pid_t pid, struct lb_proc_id *out, struct lb_error *err)
{
    char path[64];
    LB_AUTO_FREE char *stat = NULL;

    snprintf(path, sizeof(path), "/proc/%d/stat", (int)pid);
    struct lb_error why = LB_ERROR_INIT;
    if (pid <= 0 || lb_file_read(path, 8192, &stat, NULL, &why) < 0) {
        if (pid <= 0 || why.code == LB_E_NOT_FOUND)
            return lb_fail(err, LB_E_NOT_FOUND, "there is no process %d", (int)pid);
        return lb_fail_errno(err, why.code, why.sys_errno, "cannot identify process %d", (int)pid);
    }
    /* "PID (NAME) STATE ...": the name may hold anything, ')' included.
     * STATE is field 3, the start time field 22. */
    char *field = strrchr(stat, ')');
    for (int i = 2; field && i < 22; i++) {
        field = strchr(field, ' ');
        if (field)
            field++;
    }
    uint64_t ticks;
    if (!field || sscanf(field, "%" SCNu64, &ticks) != 1)
        return lb_fail(err, LB_E_INTERNAL, "cannot understand %s", path);
    out->pid = pid;
    out->start_ticks = ticks;
    return 0;
}

int lb_proc_open(const struct lb_proc_id *id, struct lb_error *err)
{
    LB_AUTO_FD int fd = id->pid > 0 ? pidfd_open(id->pid, 0) : -1;
    if (fd < 0) {
        int e = id->pid > 0 ? errno : ESRCH;
        /* EINVAL: the number now belongs to a thread of somebody else;
         * ENOENT is what newer kernels say for it */
        if (e == ESRCH || e == EINVAL || e == ENOENT)
            return lb_fail(err, LB_E_NOT_FOUND, "process %d is gone", (int)id->pid);
        return lb_fail_errno(err, LB_E_INTERNAL, e, "cannot open process %d", (int)id->pid);
    }
    struct lb_proc_id now;
    if (lb_proc_identify(id->pid, &now, err) < 0)
        return -1;
    if (now.start_ticks != id->start_ticks)
        return lb_fail(err, LB_E_NOT_FOUND, "process %d is gone and its number was reused",
                       (int)id->pid);
    return LB_STEAL_FD(fd);
}

bool lb_proc_alive(const struct lb_proc_id *id)
{
    struct lb_error why = LB_ERROR_INIT;
    LB_AUTO_FD int fd = lb_proc_open(id, &why);
    if (fd < 0) {
        /* Not being able to look (no descriptors left) must not read as dead. */
        return why.code != LB_E_NOT_FOUND && (kill(id->pid, 0) == 0 || errno == EPERM);
    }
    /* Readable when every thread has exited, reaped or not: the state letter
     * of /proc would also say Z when only the main thread is gone. */
    return !lb_readable(fd, 0);
}

/* ------------------------------------------------ what SIGKILL leaves behind */

#define MAX_SOCKETS 256u

static unsigned own_sockets(pid_t pid, ino_t inodes[MAX_SOCKETS])
{
    char dir_path[64], link[64];
    unsigned n = 0;
    snprintf(dir_path, sizeof(dir_path), "/proc/%d/fd", (int)pid);
    DIR *dir = opendir(dir_path);
    struct dirent *e;
    while (dir && (e = readdir(dir)) && n < MAX_SOCKETS) {
        ssize_t len = readlinkat(dirfd(dir), e->d_name, link, sizeof(link) - 1);
        unsigned long long inode;
        link[len > 0 ? len : 0] = '\0';
        if (sscanf(link, "socket:[%llu]", &inode) == 1)
            inodes[n++] = (ino_t)inode;
    }
    if (dir)
        closedir(dir);
    return n;
}

char **lb_proc_listening(pid_t pid)
{
    char path[64];
    ino_t inodes[MAX_SOCKETS];
    unsigned n_inodes = own_sockets(pid, inodes), n = 0;
    char **v = lb_alloc(sizeof(char *) * (MAX_SOCKETS + 1));
    LB_AUTO_FREE char *line = NULL;
    size_t cap = 0;
    snprintf(path, sizeof(path), "/proc/%d/net/unix", (int)pid);
    LB_AUTO_FILE FILE *f = fopen(path, "re");
    while (f && n < MAX_SOCKETS && getline(&line, &cap, f) > 0) {
        unsigned long flags;
        unsigned long long inode;
        int at = 0;
        /* Num RefCount Protocol Flags Type St Inode Path */
        if (sscanf(line, "%*s %*s %*s %lx %*s %*s %llu %n", &flags, &inode, &at) != 2 || !at ||
            !(flags & 0x10000) /* SO_ACCEPTCON */ || line[at] != '/')
            continue;
        line[at + (int)strcspn(line + at, "\n")] = '\0';
        for (unsigned i = 0; i < n_inodes; i++)
            if (inodes[i] == (ino_t)inode) {
                v[n++] = lb_strdup(line + at);
                break;
            }
    }
    return v;
}

/* Whose is the socket at path: its process, 0 nobody's (any more), -1 not known. */
static pid_t server_of(const char *path)
{
    struct sockaddr_un sa = {.sun_family = AF_UNIX};
    struct ucred cred;
    socklen_t len = sizeof(cred);
    struct stat st;
    LB_AUTO_FD int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0 || strlen(path) >= sizeof(sa.sun_path) || lstat(path, &st) < 0 ||
        !S_ISSOCK(st.st_mode))
        return -1;
    strcpy(sa.sun_path, path);
    if (connect(fd, (struct sockaddr *)&sa, sizeof(sa)) < 0)
        return errno == ECONNREFUSED ? 0 : -1;
    return getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &cred, &len) < 0 ? -1 : cred.pid;
}

/* Another may serve the same path by now: only those of this process, or of nobody. */
static void remove_sockets(char *const *paths, pid_t pid)
{
    for (; paths && *paths; paths++)
        if (server_of(*paths) == pid)
            unlink(*paths);
}

void lb_remove_dead_sockets(char *const *paths)
{
    remove_sockets(paths, 0);
}

static int kill_and_wait(int fd, const struct lb_proc_id *id, unsigned timeout_ms,
                         struct lb_error *err)
{
    if (pidfd_send_signal(fd, SIGKILL, NULL, 0) < 0 && errno != ESRCH)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot kill process %d", (int)id->pid);

    uint64_t deadline_ns = lb_now_ns() + (uint64_t)timeout_ms * 1000000;
    for (;;) {
        uint64_t now_ns = lb_now_ns();
        uint64_t left_ns = deadline_ns > now_ns ? deadline_ns - now_ns : 0;
        struct pollfd p = {.fd = fd, .events = POLLIN};
        struct timespec left = {.tv_sec = (time_t)(left_ns / 1000000000),
                                .tv_nsec = (long)(left_ns % 1000000000)};
        int n = ppoll(&p, 1, &left, NULL);
        if (n > 0)
            return 0;
        if (n < 0 && errno != EINTR)
            return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot wait for process %d",
                                 (int)id->pid);
        if (n == 0) {
            lb_fail(err, LB_E_INTERNAL, "process %d did not die within %u ms of SIGKILL",
                    (int)id->pid, timeout_ms);
            return lb_remedy(err, "it hangs in the kernel: check its disks and network mounts");
        }
    }
}

int lb_proc_kill(const struct lb_proc_id *id, unsigned timeout_ms, struct lb_error *err)
{
    struct lb_error why = LB_ERROR_INIT;
    LB_AUTO_FD int fd = lb_proc_open(id, &why);
    if (fd < 0) {
        if (why.code == LB_E_NOT_FOUND)
            return 0;
        if (err)
            *err = why;
        return -1;
    }
    char **left = lb_proc_listening(id->pid);
    remove_sockets(left, id->pid); /* before: if we die now too, nobody finds them again */
    int rc = kill_and_wait(fd, id, timeout_ms, err);
    lb_remove_dead_sockets(left);
    lb_strv_free(left);
    return rc;
}

int lb_proc_cmdline(pid_t pid, char ***argv, struct lb_error *err)
{
    char path[64];
    LB_AUTO_FREE char *text = NULL;
    size_t len = 0;

    snprintf(path, sizeof(path), "/proc/%d/cmdline", (int)pid);
    if (lb_file_read(path, 8u << 20, &text, &len, err) < 0)
        return -1;
    if (len == 0)
        return lb_fail(err, LB_E_NOT_FOUND, "process %d has no command line: it has exited or "
                       "belongs to the kernel", (int)pid);
    size_t n = 0;
    for (size_t at = 0; at < len; at += strlen(text + at) + 1)
        n++;
    char **v = lb_alloc((n + 1) * sizeof(*v));
    size_t i = 0;
    for (size_t at = 0; at < len; at += strlen(text + at) + 1)
        v[i++] = lb_strdup(text + at);
    *argv = v;
    return 0;
}

void lb_thread_realtime(void)
{
    static atomic_flag said = ATOMIC_FLAG_INIT;
    struct sched_param sp = {.sched_priority = 10};
    int e = pthread_setschedparam(pthread_self(), SCHED_RR, &sp);

    if (e && !atomic_flag_test_and_set(&said))
        lb_log(LB_LOG_INFO, "no real-time priority: %s", strerror(e));
}

void lb_mutex_init_inherit(pthread_mutex_t *m)
{
    pthread_mutexattr_t a;

    pthread_mutexattr_init(&a);
    pthread_mutexattr_setprotocol(&a, PTHREAD_PRIO_INHERIT);
    pthread_mutex_init(m, &a);
    pthread_mutexattr_destroy(&a);
}
