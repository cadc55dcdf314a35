/*
 * core/qemu/state.c - device state out of a stopped QEMU and into a waiting one.
 *
 * Out: xen-save-devices-state (in every x86 build) writes all devices and CPUs,
 * but no RAM, to a file name; "/dev/fdset/N" makes that our memfd, handed over
 * once by add-fd.  QEMU requires the access mode it asks for, so the descriptor
 * it gets is opened O_WRONLY.  Both share one file offset: rewound before each
 * save, and afterwards it is the length.
 *
 * In: `-incoming defer -S` + capability late-block-activate, migrate-incoming from
 * a memfd.  What QEMU saved lacks what a migration stream has; it is added:
 *
 *    QEVM 00000003 | 07 len machine | ...sections, EOF... | 06 00000002 "{}"
 *    saved           ^ added          saved                 ^ added
 *
 * The VM is then loaded and paused, its disks neither locked nor activated; cont
 * does both, and fails harmlessly while the source still holds a disk.
 */
#include "core/qemu/qemu_internal.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>

#define STATE_MAX (1u << 30)
#define STREAM_HEADER 8
/* How long run waits for the source's locks to be gone (network file systems). */
#define LOCK_MS 3000

static const char magic[STREAM_HEADER] = {'Q', 'E', 'V', 'M', 0, 0, 0, 3};

static int open_fdset(struct lb_hv_vm *vm, struct lb_error *err)
{
    char path[64];
    LB_AUTO_FD int fd = memfd_create("lifeboat-state", MFD_CLOEXEC);
    if (fd < 0)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot make a memory file");
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    LB_AUTO_FD int wfd = open(path, O_WRONLY | O_CLOEXEC);
    if (wfd < 0)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot reopen a memory file");
    json_t *ret = NULL;
    if (lb_qmp_send(vm->qmp, "add-fd", NULL, wfd, NULL, err) < 0 ||
        lb_qmp_wait(vm->qmp, "add-fd", LB_QMP_MS, &ret, err) < 0)
        return -1;
    json_t *id = json_object_get(ret, "fdset-id");
    vm->fdset = json_is_integer(id) ? (int)json_integer_value(id) : -1;
    json_decref(ret);
    if (vm->fdset < 0)
        return lb_fail(err, LB_E_HV, "QEMU's answer to add-fd has no fdset-id");
    vm->state_fd = LB_STEAL_FD(fd);
    vm->state_wfd = LB_STEAL_FD(wfd);
    return 0;
}

void lb_qemu_state_close(struct lb_hv_vm *vm)
{
    if (vm->fdset >= 0 && vm->qmp && !lb_qemu_dead(vm->pidfd)) {
        char args[48];
        snprintf(args, sizeof(args), "{\"fdset-id\":%d}", vm->fdset);
        lb_qmp_cmd(vm->qmp, "remove-fd", args, NULL, NULL);
    }
    vm->fdset = -1;
    lb_cleanup_fd(&vm->state_fd);
    lb_cleanup_fd(&vm->state_wfd);
    vm->state_fd = vm->state_wfd = -1;
}

static void save_args(char out[80], const struct lb_hv_vm *vm, bool final)
{
    snprintf(out, 80, "{\"filename\":\"/dev/fdset/%d\",\"live\":%s}", vm->fdset,
             final ? "true" : "false");
}

int lb_qemu_save_prepare(struct lb_hv_vm *vm, struct lb_error *err)
{
    char args[80];
    if (vm->fdset < 0 && open_fdset(vm, err) < 0)
        return -1;
    save_args(args, vm, false);
    vm->save_text = lb_qmp_text("xen-save-devices-state", args);
    return 0;
}

int lb_qemu_save_begin(struct lb_hv_vm *vm, bool final, struct lb_error *err)
{
    char args[80];
    if (vm->fdset < 0 && open_fdset(vm, err) < 0)
        return -1;
    if (lseek(vm->state_wfd, 0, SEEK_SET) < 0)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot rewind a memory file");
    save_args(args, vm, final);
    vm->released |= final;
    return lb_qmp_send(vm->qmp, "xen-save-devices-state", args, -1, LB_QMP_CONT, err);
}

int lb_qemu_save_end(struct lb_hv_vm *vm, void **buf, size_t *len, struct lb_error *err)
{
    if (lb_qmp_wait(vm->qmp, "xen-save-devices-state", LB_QMP_SLOW_MS, NULL, err) < 0)
        return lb_remedy(err, "a device of this VM cannot be saved while it works: see the message");
    off_t n = lseek(vm->state_wfd, 0, SEEK_CUR);
    if (n < STREAM_HEADER + 1 || n > STATE_MAX)
        return lb_fail(err, LB_E_HV, "QEMU saved a device state of %lld bytes", (long long)n);
    LB_AUTO_FREE char *p = lb_try_alloc((size_t)n, err);
    if (!p)
        return -1;
    for (off_t at = 0; at < n;) {
        ssize_t r = pread(vm->state_fd, p + at, (size_t)(n - at), at);
        if (r < 0 && errno == EINTR)
            continue;
        if (r <= 0)
            return lb_fail_errno(err, LB_E_INTERNAL, r < 0 ? errno : EIO,
                                 "cannot read the device state");
        at += r;
    }
    if (memcmp(p, magic, sizeof(magic)) != 0)
        return lb_fail(err, LB_E_HV, "QEMU saved a device state of an unknown format");
    *buf = LB_STEAL_PTR(p);
    *len = (size_t)n;
    return 0;
}

/* The saved state as a migration stream in a memfd, or -1. */
static int make_stream(const char *machine, const void *buf, size_t len, struct lb_error *err)
{
    if (len < STREAM_HEADER + 1 || len > STATE_MAX || memcmp(buf, magic, sizeof(magic)) != 0) {
        lb_fail(err, LB_E_PROTO, "the device state is not one of QEMU (%zu bytes)", len);
        return lb_remedy(err, "it was damaged on the way or on disk: try again");
    }
    LB_AUTO_FD int fd = memfd_create("lifeboat-incoming", MFD_CLOEXEC);
    if (fd < 0)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot make a memory file");
    uint32_t be = htobe32((uint32_t)strlen(machine));
    const unsigned char configuration = 7;
    const unsigned char description[] = {6, 0, 0, 0, 2, '{', '}'};
    if (lb_write_all(fd, buf, STREAM_HEADER, err) < 0 ||
        lb_write_all(fd, &configuration, 1, err) < 0 || lb_write_all(fd, &be, 4, err) < 0 ||
        lb_write_all(fd, machine, strlen(machine), err) < 0 ||
        lb_write_all(fd, (const char *)buf + STREAM_HEADER, len - STREAM_HEADER, err) < 0 ||
        lb_write_all(fd, description, sizeof(description), err) < 0)
        return -1;
    if (lseek(fd, 0, SEEK_SET) < 0)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot rewind a memory file");
    return LB_STEAL_FD(fd);
}

static int load(struct lb_hv_vm *vm, int fd, struct lb_error *err)
{
    char status[32];
    lb_qmp_clear_migration(vm->qmp);
    if (lb_qmp_send(vm->qmp, "getfd", "{\"fdname\":\"lb\"}", fd, NULL, err) < 0 ||
        lb_qmp_wait(vm->qmp, "getfd", LB_QMP_MS, NULL, err) < 0 ||
        lb_qmp_send(vm->qmp, "migrate-incoming", "{\"uri\":\"fd:lb\"}", -1, LB_QMP_CONT, err) < 0 ||
        lb_qmp_wait(vm->qmp, "migrate-incoming", LB_QMP_SLOW_MS, NULL, err) < 0 ||
        lb_qmp_wait_migration(vm->qmp, LB_QMP_SLOW_MS, status, err) < 0)
        return -1;
    if (strcmp(status, "completed") != 0)
        return lb_fail(err, LB_E_HV, "QEMU could not load the device state");
    return 0;
}

int lb_qemu_load_state(struct lb_hv_vm *vm, const void *buf, size_t len, struct lb_error *err)
{
    LB_AUTO_FD int fd = make_stream(vm->machine, buf, len, err);
    if (fd < 0)
        return -1;
    if (load(vm, fd, err) < 0) {
        lb_remedy(err, "the receiving QEMU must have the same devices and at least the same "
                       "version as the source");
        if (vm->run_dir)
            lb_qemu_add_log(vm->run_dir, err);
        return -1;
    }
    return 0;
}

int lb_qemu_run(struct lb_hv_vm *vm, struct lb_error *err)
{
    uint64_t deadline = lb_now_ns() + LOCK_MS * UINT64_C(1000000);
    if (lb_qemu_connect(vm, err) < 0)
        return -1;
    for (;;) {
        struct lb_error why = LB_ERROR_INIT;
        if (lb_qmp_send(vm->qmp, "cont", NULL, -1, NULL, &why) == 0 &&
            lb_qmp_wait(vm->qmp, "cont", LB_QMP_SLOW_MS, NULL, &why) == 0)
            return 0;
        bool lock = strstr(why.message, "lock") != NULL;
        if (lock && lb_now_ns() < deadline && !lb_qemu_dead(vm->pidfd)) {
            lb_sleep_ms(5);
            continue;
        }
        if (lock)
            lb_remedy(&why, "another process uses a disk of this VM: end it, then run again");
        if (err)
            *err = why;
        return -1;
    }
}
