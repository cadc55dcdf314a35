/* checkpoint/qemu_img.c - qemu-img as a child process, with its percentage, killed when it is cancelled. */
#include "checkpoint/catalog_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>

enum { WORDS = 300, PARTS_OF_PERCENT = 100 };

/* In the child: only what is safe after fork in a process with threads. */
static void run_child(const char *const argv[], int out, int log, pid_t parent)
{
    char *const env[] = {(char *)"PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", (char *)"LC_ALL=C", NULL};
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    sigset_t none;

    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    signal(SIGPIPE, SIG_DFL);
    if (dup2(null, 0) < 0 || dup2(out, 1) < 0 || dup2(log, 2) < 0 || close_range(3, ~0u, 0) < 0)
        _exit(126);
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0 || getppid() != parent)
        _exit(126);
    execvpe(argv[0], (char *const *)argv, env);
    dprintf(2, "cannot execute %s: %s\n", argv[0], strerrordesc_np(errno));
    _exit(127);
}

/* "    (12.34/100%)\r" again and again. */
static void read_percent(int fd, struct lb_share *share)
{
    char text[256];
    ssize_t n = read(fd, text, sizeof(text) - 1);

    if (n <= 0 || !share)
        return;
    text[n] = '\0';
    const char *open_bracket = strrchr(text, '(');
    double percent;
    if (open_bracket && sscanf(open_bracket, "(%lf/", &percent) == 1 && percent >= 0 && percent <= 100)
        lb_share_progress((uint64_t)(percent * PARTS_OF_PERCENT), 100 * PARTS_OF_PERCENT, share);
}

/* False: cancelled. Ends when the child has closed its output. */
static bool follow(int fd, struct lb_share *share, int cancel_fd)
{
    for (;;) {
        struct pollfd p[2] = {{.fd = fd, .events = POLLIN}, {.fd = cancel_fd, .events = POLLIN}};
        if (poll(p, 2, -1) < 0)
            continue; /* EINTR */
        if (p[1].revents)
            return false;
        if (p[0].revents & POLLIN)
            read_percent(fd, share);
        else if (p[0].revents)
            return true;
    }
}

/* The last line of what it said on stderr. */
static void last_words(int log, char text[WORDS])
{
    char *end, *line;
    off_t size = lseek(log, 0, SEEK_END);
    ssize_t n = pread(log, text, WORDS - 1, size > WORDS - 1 ? size - (WORDS - 1) : 0);

    text[n > 0 ? n : 0] = '\0';
    for (end = text + strlen(text); end > text && end[-1] == '\n';)
        *--end = '\0';
    line = strrchr(text, '\n');
    if (line)
        memmove(text, line + 1, strlen(line + 1) + 1);
}

int lb_qemu_img(const char *const argv[], struct lb_share *share, int cancel_fd, struct lb_error *err)
{
    int ends[2], status = 0;
    char text[WORDS];
    LB_AUTO_FD int log = memfd_create("log", MFD_CLOEXEC);

    if (log < 0 || pipe2(ends, O_CLOEXEC) < 0)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot make a pipe for qemu-img");
    LB_AUTO_FD int in = ends[0];
    pid_t parent = getpid(), pid = fork();
    if (pid == 0)
        run_child(argv, ends[1], log, parent);
    close(ends[1]);
    if (pid < 0)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot start qemu-img");
    bool whole = follow(in, share, cancel_fd);
    if (!whole)
        kill(pid, SIGKILL);
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
        ;
    if (!whole)
        return lb_fail(err, LB_E_CANCELLED, "cancelled");
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0)
        return 0;
    last_words(log, text);
    bool full = strstr(text, "No space left");
    lb_fail(err, full ? LB_E_NO_SPACE : LB_E_HV, "qemu-img %s: %s", argv[1], text[0] ? text : "was killed");
    if (WIFEXITED(status) && WEXITSTATUS(status) == 127)
        lb_remedy(err, "install qemu-img (Debian: qemu-utils)");
    return -1;
}
