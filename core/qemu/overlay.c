/*
 * core/qemu/overlay.c - disks that keep a moment: overlays, freezing, joining.
 */
#include "core/qemu/qemu_internal.h"

int lb_qemu_disk_overlay(struct lb_hv_vm *vm, const char *id, const char *path, struct lb_error *err)
{
    (void)vm, (void)path;
    return lb_fail(err, LB_E_UNSUPPORTED, "disk %s cannot have an overlay", id);
}

int lb_qemu_disk_freeze(struct lb_hv_vm *vm, struct lb_error *err)
{
    (void)vm, (void)err;
    return 0;
}

void lb_qemu_disk_overlay_drop(struct lb_hv_vm *vm)
{
    (void)vm;
}

int lb_qemu_disk_join(struct lb_hv_vm *vm, const char *id, const char *top, const char *base,
                      int (*tick)(uint64_t done, uint64_t total, void *arg), void *arg,
                      struct lb_error *err)
{
    (void)vm, (void)top, (void)base, (void)tick, (void)arg;
    return lb_fail(err, LB_E_UNSUPPORTED, "images of disk %s cannot be joined", id);
}
