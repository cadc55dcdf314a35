/*
 * core/fake/fake_store.c - what checkpoints need of the fake guest: overlays of its disk, memory
 * that comes when it is touched.
 */
#include "core/fake/fake_internal.h"

int lb_fake_disk_overlay(struct lb_hv_vm *vm, const char *id, const char *path, struct lb_error *err)
{
    (void)vm, (void)path;
    return lb_fail(err, LB_E_UNSUPPORTED, "disk %s cannot have an overlay", id);
}

int lb_fake_disk_freeze(struct lb_hv_vm *vm, struct lb_error *err)
{
    (void)vm, (void)err;
    return 0;
}

void lb_fake_disk_overlay_drop(struct lb_hv_vm *vm)
{
    (void)vm;
}

int lb_fake_disk_join(struct lb_hv_vm *vm, const char *id, const char *top, const char *base,
                      int (*tick)(uint64_t done, uint64_t total, void *arg), void *arg,
                      struct lb_error *err)
{
    (void)vm, (void)top, (void)base, (void)tick, (void)arg;
    return lb_fail(err, LB_E_UNSUPPORTED, "images of disk %s cannot be joined", id);
}

int lb_fake_lazy_begin(struct lb_hv_vm *vm, struct lb_error *err)
{
    (void)vm;
    return lb_fail(err, LB_E_UNSUPPORTED, "memory cannot be filled while the guest runs");
}

int lb_fake_lazy_attach(const struct lb_vm_ident *ident, struct lb_hv_vm **out, struct lb_error *err)
{
    (void)out;
    return lb_fail(err, LB_E_NOT_FOUND, "no memory of VM %s is missing", ident->name);
}

int lb_fake_lazy_fault(struct lb_hv_vm *vm, unsigned timeout_ms, const struct lb_ram_block **blk,
                       uint64_t *page, struct lb_error *err)
{
    (void)vm, (void)timeout_ms, (void)blk, (void)page, (void)err;
    return 0;
}

int lb_fake_lazy_place(struct lb_hv_vm *vm, const struct lb_ram_block *blk, uint64_t first, uint64_t n,
                       const void *buf, uint64_t *placed, struct lb_error *err)
{
    (void)vm, (void)blk, (void)first, (void)n, (void)buf, (void)placed;
    return lb_fail(err, LB_E_STATE, "no memory is missing");
}

int lb_fake_lazy_missing(struct lb_hv_vm *vm, const struct lb_ram_block *blk, struct lb_bitmap *pages,
                         struct lb_error *err)
{
    (void)vm, (void)blk, (void)pages, (void)err;
    return 0;
}

int lb_fake_lazy_end(struct lb_hv_vm *vm, struct lb_error *err)
{
    (void)vm, (void)err;
    return 0;
}
