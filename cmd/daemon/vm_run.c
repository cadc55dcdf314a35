/* cmd/daemon/vm_run.c - a hypervisor as a process of its own.
 *
 * Double fork and setsid: the VM belongs to nobody, so that no end of a Lifeboat
 * process can take it along. The pid and a failed exec come back by a pipe that exec
 * closes. */
#include "cmd/daemon/daemon.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>

enum step { STEP_PID, STEP_CHDIR, STEP_LOG, STEP_EXEC };
struct news {
    enum step step;
    int value; /* pid or errno */
};

static void tell(int fd, enum step step, int value)
{
    struct news n = {step, value};

    if (write(fd, &n, sizeof(n)) != sizeof(n))
        _exit(127);
}

static void become_vm(char *const argv[], const char *cwd, const char *log_path, int news)
{
    int null, log;

    lb_child_reset();
    signal(SIGPIPE, SIG_DFL);
    umask(022);
    tell(news, STEP_PID, (int)getpid());
    if (cwd && cwd[0] && chdir(cwd) < 0) {
        tell(news, STEP_CHDIR, errno);
        _exit(127);
    }
    null = open("/dev/null", O_RDONLY);
    log = open(log_path, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND, 0600);
    if (null < 0 || log < 0 || dup2(null, 0) < 0 || dup2(log, 1) < 0 || dup2(log, 2) < 0) {
        tell(news, STEP_LOG, errno);
        _exit(127);
    }
    /* Nothing else of ours: `news` closes by itself when exec succeeds. */
    close_range(3, (unsigned)news - 1, 0);
    close_range((unsigned)news + 1, ~0u, 0);
    execvp(argv[0], argv);
    tell(news, STEP_EXEC, errno);
    _exit(127);
}

static int failed(const struct news *n, char *const argv[], const char *cwd, const char *log_path,
                  struct lb_error *err)
{
    switch (n->step) {
    case STEP_CHDIR:
        return lb_fail_errno(err, LB_E_NOT_FOUND, n->value, "cannot change to directory %s", cwd);
    case STEP_LOG:
        return lb_fail_errno(err, LB_E_INTERNAL, n->value, "cannot open %s", log_path);
    default:
        lb_fail_errno(err, n->value == ENOENT ? LB_E_NOT_FOUND : LB_E_HV, n->value,
                      "cannot start %s", argv[0]);
        return lb_remedy(err, "check the path of the hypervisor after `--`, and that it is installed");
    }
}

int lb_vm_start(char *const argv[], const char *cwd, const char *log_path, struct lb_proc_id *out,
                struct lb_error *err)
{
    int p[2];
    pid_t middle, vm = -1;
    struct news n;
    int rc = 0;

    if (pipe2(p, O_CLOEXEC) < 0)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot make a pipe");
    /* Above the standard descriptors, which become_vm replaces. */
    if (p[1] < 3) {
        int high = fcntl(p[1], F_DUPFD_CLOEXEC, 3);

        close(p[1]);
        p[1] = high;
    }
    middle = fork();
    if (middle == 0) {
        close(p[0]);
        if (fork() == 0)
            become_vm(argv, cwd, log_path, p[1]);
        _exit(0);
    }
    close(p[1]);
    if (middle < 0) {
        close(p[0]);
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot start a process");
    }
    waitpid(middle, NULL, 0);
    while (!rc && read(p[0], &n, sizeof(n)) == sizeof(n)) {
        if (n.step == STEP_PID)
            vm = n.value;
        else
            rc = failed(&n, argv, cwd, log_path, err);
    }
    close(p[0]);
    if (rc)
        return -1;
    if (vm < 0)
        return lb_fail(err, LB_E_INTERNAL, "cannot start a process");
    if (lb_proc_identify(vm, out, NULL)) {
        LB_AUTO_FREE char *tail = lb_log_tail(log_path, 300);

        lb_fail(err, LB_E_HV, "the hypervisor ended at once: %s", tail);
        return lb_remedy(err, "try the command by hand");
    }
    return 0;
}

char *lb_log_tail(const char *path, size_t max_bytes)
{
    LB_AUTO_FD int fd = open(path, O_RDONLY | O_CLOEXEC);
    char *buf = lb_alloc(max_bytes + 1);
    struct stat st;
    ssize_t n = 0;

    if (fd >= 0 && !fstat(fd, &st))
        n = pread(fd, buf, max_bytes,
                  st.st_size > (off_t)max_bytes ? st.st_size - (off_t)max_bytes : 0);
    if (n < 0)
        n = 0;
    while (n > 0 && (unsigned char)buf[n - 1] <= ' ')
        n--;
    buf[n] = '\0';
    for (char *c = buf; *c; c++)
        if (*c == '\n')
            *c = ';';
    if (!n)
        snprintf(buf, max_bytes, "it said nothing");
    return buf;
}
