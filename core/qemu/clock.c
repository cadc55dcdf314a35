/*
 * core/qemu/clock.c - the guest's paravirtual clock under KVM.
 *
 * QEMU keeps kvm-clock at `stop` and sets it back at `cont`, so every pause is time the guest
 * never has.  KVM_GET_CLOCK and KVM_SET_CLOCK belong to the process that made the VM: both are
 * executed by QEMU's main thread (inject.c), 10-20 us in all.
 *
 *      get: clock at real time R  ->  clock += step  ->  set: "it was that at R"
 *
 * The kernel adds what has passed since R, so nothing is lost between the two calls.  A kernel
 * that does not say R (no TSC clock source) loses those microseconds.  The guest sees a step
 * forward, never one back.
 *
 * How far the clock is behind is its distance to CLOCK_MONOTONIC_RAW, which it follows, against
 * what that was at the start.  More than the caller knows of (somebody else's pause) is not ours
 * to make up for: it becomes part of the start.
 */
#include "core/qemu/qemu_internal.h"

#include <dirent.h>
#include <errno.h>
#include <linux/kvm.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>

#ifndef KVM_CLOCK_REALTIME
#define KVM_CLOCK_REALTIME (1u << 2)
#endif

/* struct kvm_clock_data as of Linux 5.16, whatever the headers know */
struct clock_data {
    uint64_t clock_ns;
    uint32_t flags, pad0;
    uint64_t realtime_ns, host_tsc;
    uint32_t pad[4];
};
_Static_assert(sizeof(struct clock_data) == sizeof(struct kvm_clock_data), "size in the ioctl number");

struct step {
    pid_t pid;
    int vm_fd;
    bool set;             /* else only look */
    uint64_t step_ns;
    const int64_t *base;  /* NULL: step in any case */
    int64_t distance_ns;  /* result: guest's clock minus ours, before the step */
};

/* Number of the VM's descriptor in QEMU, or -1. */
static int find_vm_fd(pid_t pid)
{
    char path[64], to[64];
    int found = -1;
    snprintf(path, sizeof(path), "/proc/%d/fd", (int)pid);
    DIR *d = opendir(path);
    for (struct dirent *e; d && found < 0 && (e = readdir(d));) {
        ssize_t n = readlinkat(dirfd(d), e->d_name, to, sizeof(to) - 1);
        to[n > 0 ? n : 0] = 0;
        if (strcmp(to, "anon_inode:kvm-vm") == 0)
            found = atoi(e->d_name);
    }
    if (d)
        closedir(d);
    return found;
}

static int call(struct lb_injector *in, const struct step *s, unsigned long what, uint64_t addr,
                struct lb_error *err)
{
    long rc;
    uint64_t args[6] = {(uint64_t)s->vm_fd, what, addr};
    if (lb_inject_syscall(in, SYS_ioctl, args, &rc, err) < 0)
        return -1;
    return rc < 0 ? lb_fail_errno(err, LB_E_UNSUPPORTED, (int)-rc, "KVM does not %s its clock",
                                  what == KVM_GET_CLOCK ? "tell" : "set")
                  : 0;
}

static int64_t clock_ns(clockid_t which)
{
    struct timespec t;
    clock_gettime(which, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* CLOCK_MONOTONIC_RAW at the moment of the reading. */
static int64_t raw_of(const struct clock_data *data)
{
    int64_t raw = clock_ns(CLOCK_MONOTONIC_RAW);
    if (data->flags & KVM_CLOCK_REALTIME)
        raw -= clock_ns(CLOCK_REALTIME) - (int64_t)data->realtime_ns;
    return raw;
}

/* What of the step asked for is owed. */
static uint64_t owed(const struct step *s)
{
    int64_t behind = s->base ? *s->base - s->distance_ns : (int64_t)s->step_ns;
    return behind <= 0 ? 0 : LB_MIN((uint64_t)behind, s->step_ns);
}

static int step_body(struct lb_injector *in, void *arg, struct lb_error *err)
{
    struct step *s = arg;
    struct clock_data data = {0};
    uint64_t addr;
    if (lb_inject_scratch(in, sizeof(data), &addr, err) < 0)
        return -1;
    struct iovec ours = {&data, sizeof(data)}, theirs = {(void *)addr, sizeof(data)};
    if (call(in, s, KVM_GET_CLOCK, addr, err) < 0)
        return -1;
    if (process_vm_readv(s->pid, &ours, 1, &theirs, 1, 0) != (ssize_t)sizeof(data))
        return lb_fail_errno(err, LB_E_HV, errno, "cannot read the clock from QEMU");
    s->distance_ns = (int64_t)data.clock_ns - raw_of(&data);
    s->step_ns = owed(s);
    if (!s->set || !s->step_ns)
        return 0;
    data.clock_ns += s->step_ns;
    data.flags &= KVM_CLOCK_REALTIME;
    if (process_vm_writev(s->pid, &ours, 1, &theirs, 1, 0) != (ssize_t)sizeof(data))
        return lb_fail_errno(err, LB_E_HV, errno, "cannot give the clock to QEMU");
    return call(in, s, KVM_SET_CLOCK, addr, err);
}

int lb_qemu_clock_base(struct lb_hv_vm *vm, struct lb_error *err)
{
    struct step s = {.pid = vm->proc.pid, .vm_fd = find_vm_fd(vm->proc.pid)};
    if (s.vm_fd < 0)
        return 0;
    if (lb_inject(vm->proc.pid, step_body, &s, err) < 0)
        return -1;
    vm->clock_base_ns = s.distance_ns;
    vm->clock_based = true;
    return 0;
}

int lb_qemu_clock_step(struct lb_hv_vm *vm, uint64_t *step_ns, struct lb_error *err)
{
    struct step s = {.pid = vm->proc.pid, .vm_fd = find_vm_fd(vm->proc.pid), .set = true,
                     .step_ns = *step_ns, .base = vm->clock_based ? &vm->clock_base_ns : NULL};
    if (s.vm_fd < 0)
        return lb_fail(err, LB_E_UNSUPPORTED, "VM %s does not run under KVM: its clock cannot be set",
                       vm->name);
    if (lb_inject(vm->proc.pid, step_body, &s, err) < 0)
        return -1;
    vm->clock_base_ns = LB_MIN(vm->clock_base_ns, s.distance_ns + (int64_t)*step_ns);
    *step_ns = s.step_ns;
    return 0;
}
