/*
 * core/qemu/lazy.c - memory that comes when it is touched (userfaultfd, missing pages).
 */
#include "core/qemu/qemu_internal.h"

int lb_qemu_lazy_begin(struct lb_hv_vm *vm, struct lb_error *err)
{
    (void)vm;
    return lb_fail(err, LB_E_UNSUPPORTED, "memory cannot be filled while the guest runs");
}

int lb_qemu_lazy_attach(const struct lb_vm_ident *ident, struct lb_hv_vm **out, struct lb_error *err)
{
    (void)out;
    return lb_fail(err, LB_E_NOT_FOUND, "no memory of VM %s is missing", ident->name);
}

int lb_qemu_lazy_fault(struct lb_hv_vm *vm, unsigned timeout_ms, const struct lb_ram_block **blk,
                       uint64_t *page, struct lb_error *err)
{
    (void)vm, (void)timeout_ms, (void)blk, (void)page, (void)err;
    return 0;
}

int lb_qemu_lazy_place(struct lb_hv_vm *vm, const struct lb_ram_block *blk, uint64_t first, uint64_t n,
                       const void *buf, uint64_t *placed, struct lb_error *err)
{
    (void)vm, (void)blk, (void)first, (void)n, (void)buf, (void)placed;
    return lb_fail(err, LB_E_STATE, "no memory is missing");
}

int lb_qemu_lazy_missing(struct lb_hv_vm *vm, const struct lb_ram_block *blk, struct lb_bitmap *pages,
                         struct lb_error *err)
{
    (void)vm, (void)blk, (void)pages, (void)err;
    return 0;
}

int lb_qemu_lazy_end(struct lb_hv_vm *vm, struct lb_error *err)
{
    (void)vm, (void)err;
    return 0;
}

void lb_qemu_lazy_close(struct lb_hv_vm *vm)
{
    (void)vm;
}
