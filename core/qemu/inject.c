/*
 * core/qemu/inject.c - system calls executed by QEMU's main thread.
 *
 * A userfaultfd can only be made by the process whose memory it watches.  So the
 * main thread is seized for 100-250 us, stopped where it is (nearly always
 * blocked in ppoll), its registers saved, a system call put in place, executed
 * between two PTRACE_SYSCALL stops, and the registers put back.
 *
 *   seize, interrupt -> [stopped] -> block signals
 *       -> regs := call -> SYSCALL (entry stop) -> SYSCALL (exit stop) -> rax   (repeat)
 *   -> unblock signals, regs := saved -> detach
 *
 * The call that was interrupted is not restarted by the kernel any more, because
 * we went through other calls: it is started again by hand (restart_call).
 * Signals stay pending while we are inside, so that none is lost or delivered
 * into the middle.
 *
 * Failure: tracing ends with the tracing thread, and a SEIZEd process goes on
 * running then; so the work is done in a thread of its own that is left behind
 * with the problem.  EXITKILL is never set.
 */
#include "core/qemu/qemu_internal.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <time.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>

#define STOP_S 3
#define SCRATCH_MAX 4096u
/* the System V ABI lets a function use this much below its stack pointer */
#define RED_ZONE 128u

#if defined(__x86_64__)

struct lb_injector {
    pid_t pid;
    struct user_regs_struct saved;
    uint64_t sigmask;
    uint64_t insn;      /* address of a syscall instruction */
    uint64_t scratch;   /* lent memory, 0 none, and what was there */
    size_t scratch_len;
    unsigned char kept[SCRATCH_MAX];
    bool dead;
};

struct job {
    pid_t pid;
    int (*body)(struct lb_injector *, void *, struct lb_error *);
    void *arg;
    int rc;
    struct lb_error err;
};

/* Wait for the next stop. waitpid has no deadline: lb_inject cancels the thread
 * here, and only here, when it takes too long. */
static int wait_stop(struct lb_injector *in, int *status, struct lb_error *err)
{
    pid_t r;
    do {
        pthread_setcancelstate(PTHREAD_CANCEL_ENABLE, NULL);
        r = waitpid(in->pid, status, __WALL);
        pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, NULL);
    } while (r < 0 && errno == EINTR);
    if (r != in->pid) {
        in->dead = true;
        return lb_fail_errno(err, LB_E_HV, errno, "lost the trace of process %d", (int)in->pid);
    }
    if (WIFSTOPPED(*status))
        return 0;
    in->dead = true;
    return lb_fail(err, LB_E_HV, "QEMU (process %d) died while it was being traced", (int)in->pid);
}

/* After PTRACE_INTERRUPT: pass real signals on until our stop comes. */
static int wait_interrupt(struct lb_injector *in, struct lb_error *err)
{
    for (;;) {
        int st;
        if (wait_stop(in, &st, err) < 0)
            return -1;
        if (st >> 16 == PTRACE_EVENT_STOP) {
            if (WSTOPSIG(st) == SIGTRAP)
                return 0;
            lb_fail(err, LB_E_STATE, "process %d is stopped by a signal (SIGSTOP)", (int)in->pid);
            return lb_remedy(err, "let it go on: kill -CONT %d", (int)in->pid);
        }
        ptrace(PTRACE_CONT, in->pid, NULL, (void *)(uintptr_t)WSTOPSIG(st));
    }
}

/* A syscall instruction in the vdso, for a thread stopped in user mode. */
static uint64_t find_insn(pid_t pid)
{
    char path[64];
    LB_AUTO_FREE char *maps = NULL;
    snprintf(path, sizeof(path), "/proc/%d/maps", (int)pid);
    if (lb_file_read(path, 64 << 20, &maps, NULL, NULL) < 0)
        return 0;
    const char *p = strstr(maps, "[vdso]");
    if (!p)
        return 0;
    while (p > maps && p[-1] != '\n')
        p--;
    unsigned long start, end;
    if (sscanf(p, "%lx-%lx", &start, &end) != 2 || end - start > 65536)
        return 0;
    LB_AUTO_FREE unsigned char *code = lb_alloc(end - start);
    struct iovec to = {code, end - start}, from = {(void *)start, end - start};
    if (process_vm_readv(pid, &to, 1, &from, 1, 0) != (ssize_t)(end - start))
        return 0;
    for (size_t i = 0; i + 1 < end - start; i++)
        if (code[i] == 0x0f && code[i + 1] == 0x05)
            return start + i;
    return 0;
}

/* Where the thread would have gone on: at its system call again, as the kernel
 * does after a stop without a signal. */
static struct user_regs_struct restart_call(const struct user_regs_struct *at)
{
    struct user_regs_struct r = *at;
    if ((long)r.orig_rax >= 0) {
        long res = (long)r.rax;
        if (res == -512 || res == -513 || res == -514) { /* ERESTARTSYS, NOINTR, NOHAND */
            r.rip -= 2;
            r.rax = r.orig_rax;
        } else if (res == -516) { /* ERESTART_RESTARTBLOCK */
            r.rip -= 2;
            r.rax = SYS_restart_syscall;
        }
    }
    r.orig_rax = (unsigned long long)-1;
    return r;
}

static int setup(struct lb_injector *in, struct lb_error *err)
{
    if (ptrace(PTRACE_GETREGS, in->pid, NULL, &in->saved) < 0)
        return lb_fail_errno(err, LB_E_HV, errno, "cannot read the registers of QEMU");
    uint16_t code = 0;
    struct iovec to = {&code, 2}, from = {(void *)(in->saved.rip - 2), 2};
    bool in_call = (long)in->saved.orig_rax >= 0 &&
                   process_vm_readv(in->pid, &to, 1, &from, 1, 0) == 2 && code == 0x050f;
    in->insn = in_call ? in->saved.rip - 2 : find_insn(in->pid);
    if (!in->insn)
        return lb_fail(err, LB_E_UNSUPPORTED, "no system call instruction found in process %d",
                       (int)in->pid);
    if (ptrace(PTRACE_GETSIGMASK, in->pid, (void *)sizeof(in->sigmask), &in->sigmask) < 0)
        return lb_fail_errno(err, LB_E_HV, errno, "cannot read the signal mask of QEMU");
    uint64_t all = ~UINT64_C(0);
    if (ptrace(PTRACE_SETSIGMASK, in->pid, (void *)sizeof(all), &all) < 0)
        return lb_fail_errno(err, LB_E_HV, errno, "cannot set the signal mask of QEMU");
    return 0;
}

int lb_inject_scratch(struct lb_injector *in, size_t len, uint64_t *addr, struct lb_error *err)
{
    assert(len <= SCRATCH_MAX && !in->scratch);
    uint64_t at = (in->saved.rsp - RED_ZONE - len) & ~UINT64_C(63);
    struct iovec to = {in->kept, len}, from = {(void *)at, len};
    if (process_vm_readv(in->pid, &to, 1, &from, 1, 0) != (ssize_t)len)
        return lb_fail_errno(err, LB_E_HV, errno, "cannot read the stack of QEMU");
    in->scratch = *addr = at;
    in->scratch_len = len;
    return 0;
}

static void restore(struct lb_injector *in)
{
    if (in->scratch) {
        struct iovec from = {in->kept, in->scratch_len}, to = {(void *)in->scratch, in->scratch_len};
        process_vm_writev(in->pid, &from, 1, &to, 1, 0);
    }
    struct user_regs_struct back = restart_call(&in->saved);
    ptrace(PTRACE_SETSIGMASK, in->pid, (void *)sizeof(in->sigmask), &in->sigmask);
    ptrace(PTRACE_SETREGS, in->pid, NULL, &back);
}

int lb_inject_syscall(struct lb_injector *in, long nr, const uint64_t args[6], long *ret,
                      struct lb_error *err)
{
    struct user_regs_struct r = in->saved;
    r.rip = in->insn;
    r.rax = (unsigned long long)nr;
    r.orig_rax = (unsigned long long)-1;
    r.rdi = args[0];
    r.rsi = args[1];
    r.rdx = args[2];
    r.r10 = args[3];
    r.r8 = args[4];
    r.r9 = args[5];
    if (ptrace(PTRACE_SETREGS, in->pid, NULL, &r) < 0)
        return lb_fail_errno(err, LB_E_HV, errno, "cannot set the registers of QEMU");
    for (int stop = 0; stop < 2;) { /* entry, exit */
        int st;
        if (ptrace(PTRACE_SYSCALL, in->pid, NULL, NULL) < 0)
            return lb_fail_errno(err, LB_E_HV, errno, "cannot step QEMU through a system call");
        if (wait_stop(in, &st, err) < 0)
            return -1;
        if (WSTOPSIG(st) == (SIGTRAP | 0x80))
            stop++;
        else if (st >> 16 != PTRACE_EVENT_STOP) /* every signal we can block is blocked */
            return lb_fail(err, LB_E_HV, "process %d got signal %d in an injected call",
                           (int)in->pid, WSTOPSIG(st));
    }
    if (ptrace(PTRACE_GETREGS, in->pid, NULL, &r) < 0)
        return lb_fail_errno(err, LB_E_HV, errno, "cannot read the registers of QEMU");
    *ret = (long)r.rax;
    return 0;
}

static int inject_here(struct job *j, struct lb_error *err)
{
    struct lb_injector in = {.pid = j->pid};
    if (ptrace(PTRACE_SEIZE, j->pid, NULL, (void *)(uintptr_t)PTRACE_O_TRACESYSGOOD) < 0) {
        int e = errno;
        lb_fail_errno(err, e == ESRCH ? LB_E_HV : LB_E_UNSUPPORTED, e, "cannot trace process %d",
                      (int)j->pid);
        return lb_remedy(err, e == EPERM ? "end the debugger that holds it, and allow ptrace to "
                                           "lifeboatd (root, kernel.yama.ptrace_scope < 3)"
                                         : "");
    }
    if (ptrace(PTRACE_INTERRUPT, j->pid, NULL, NULL) < 0)
        return lb_fail_errno(err, LB_E_HV, errno, "cannot interrupt process %d", (int)j->pid);
    if (wait_interrupt(&in, err) < 0)
        return -1;
    int rc = setup(&in, err);
    if (rc == 0) {
        rc = j->body(&in, j->arg, err);
        if (!in.dead)
            restore(&in);
    }
    if (!in.dead)
        ptrace(PTRACE_DETACH, j->pid, NULL, NULL);
    return rc;
}

static void *job_thread(void *arg)
{
    struct job *j = arg;
    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, NULL);
    j->rc = inject_here(j, &j->err);
    return NULL;
}

int lb_inject(pid_t pid, int (*body)(struct lb_injector *in, void *arg, struct lb_error *err),
              void *arg, struct lb_error *err)
{
    struct job j = {.pid = pid, .body = body, .arg = arg, .rc = -1};
    pthread_t t;
    int e = pthread_create(&t, NULL, job_thread, &j);
    if (e)
        return lb_fail_errno(err, LB_E_INTERNAL, e, "cannot start a thread");
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += STOP_S;
    if (pthread_clockjoin_np(t, NULL, CLOCK_MONOTONIC, &until) != 0) {
        void *how;
        pthread_cancel(t); /* its end ends the trace */
        pthread_join(t, &how);
        if (how == PTHREAD_CANCELED) {
            lb_fail(err, LB_E_HV, "process %d cannot be stopped by ptrace within %d s", (int)pid,
                    STOP_S);
            return lb_remedy(err, "its main thread hangs in the kernel: check the storage behind "
                                  "its disks");
        }
    }
    if (j.rc < 0 && err)
        *err = j.err;
    return j.rc;
}

#else /* not x86-64 */

int lb_inject(pid_t pid, int (*body)(struct lb_injector *in, void *arg, struct lb_error *err),
              void *arg, struct lb_error *err)
{
    (void)pid, (void)body, (void)arg;
    return lb_fail(err, LB_E_UNSUPPORTED, "tracing QEMU needs an x86-64 host");
}
int lb_inject_syscall(struct lb_injector *in, long nr, const uint64_t args[6], long *ret,
                      struct lb_error *err)
{
    (void)in, (void)nr, (void)args, (void)ret;
    return lb_fail(err, LB_E_UNSUPPORTED, "tracing QEMU needs an x86-64 host");
}
int lb_inject_scratch(struct lb_injector *in, size_t len, uint64_t *addr, struct lb_error *err)
{
    (void)in, (void)len, (void)addr;
    return lb_fail(err, LB_E_UNSUPPORTED, "tracing QEMU needs an x86-64 host");
}

#endif
