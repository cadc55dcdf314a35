/* core/hv.c - the only door to a hypervisor's table of functions.
 *
 * Each wrapper asserts what the contract in hv.h asks of the caller (state,
 * bounds, sizes), calls the slot, and keeps the state of the handle:
 *
 *      attach -> RUNNING <- cont / stop -> STOPPED
 *      launch -> INCOMING - load_state -> LOADED - run -> RUNNING (a source like any other)
 *
 * stop and cont may be repeated, so that a failure path can always say cont.
 * The state changes only when the slot succeeded; `saving` alone ends with
 * save_end whatever its result, and a failure path calls save_end before cont.
 * destroy frees the handle even when it fails.  lb_hv_read, _write, _log_peek, _freeze
 * and the lazy ones run on any thread and therefore check their arguments only, never the state. */
#include "core/hv.h"

#include <assert.h>

static struct lb_hv_vm_base *base_of(struct lb_hv_vm *vm)
{
    assert(vm);
    struct lb_hv_vm_base *base = (struct lb_hv_vm_base *)vm;
    assert(base->ops);
    return base;
}

static const struct lb_hv_ops *ops_of(struct lb_hv_vm *vm)
{
    return base_of(vm)->ops;
}

/* Every slot is mandatory: seen once, when a handle is made. */
static void check_ops(const struct lb_hv_ops *ops)
{
    assert(ops && ops->name);
    assert(ops->attach && ops->describe && ops->cpu_features && ops->blocks);
    assert(ops->log_enable && ops->log_clean && ops->log_peek && ops->log_disable);
    assert(ops->populated && ops->read && ops->stop && ops->cont);
    assert(ops->save_begin && ops->save_end && ops->throttle);
    assert(ops->launch && ops->prepare_ram && ops->write && ops->load_state);
    assert(ops->run && ops->announce);
    assert(ops->checkpoint_mode && ops->freeze && ops->nics && ops->nic_hold && ops->nic_unhold);
    assert(ops->disks && ops->disk_mirror && ops->disk_mirror_status && ops->disk_mirror_end);
    assert(ops->disk_overlay && ops->disk_freeze && ops->disk_overlay_drop && ops->disk_join);
    assert(ops->clock_step);
    assert(ops->lazy_begin && ops->lazy_attach && ops->lazy_fault);
    assert(ops->lazy_place && ops->lazy_offer && ops->lazy_touched && ops->lazy_missing && ops->lazy_end);
    assert(ops->status && ops->shut_down && ops->ident && ops->exists && ops->end && ops->detach && ops->destroy);
}

static uint64_t pages_of(const struct lb_ram_block *blk)
{
    assert(blk && blk->size_bytes % LB_PAGE_SIZE == 0);
    return blk->size_bytes / LB_PAGE_SIZE;
}

static void check_pages(const struct lb_ram_block *blk, uint64_t first, uint64_t count)
{
    uint64_t total = pages_of(blk);
    assert(first <= total && count <= total - first);
}

static void check_bitmap(const struct lb_ram_block *blk, const struct lb_bitmap *bits)
{
    assert(bits && bits->words && bits->n_bits == pages_of(blk));
}

/* Memory that may be missing is only placed. */
static void check_not_lazy(struct lb_hv_vm *vm, const struct lb_ram_block *blk)
{
    assert(!base_of(vm)->lazy || blk->kind != LB_RAM_MAIN);
    (void)vm, (void)blk;
}

static bool is_source(const struct lb_hv_vm_base *base)
{
    return base->state == LB_HV_RUNNING || base->state == LB_HV_STOPPED;
}

int lb_hv_attach(const struct lb_hv_ops *ops, const struct lb_vm_ident *ident,
                 struct lb_hv_vm **out, struct lb_error *err)
{
    check_ops(ops);
    assert(ident && out);
    struct lb_hv_vm *vm = NULL;
    if (ops->attach(ident, &vm, err) < 0)
        return -1;
    struct lb_hv_vm_base *base = (struct lb_hv_vm_base *)vm;
    base->ops = ops;
    assert(is_source(base) && !base->logging && !base->saving && !base->lazy);
    *out = vm;
    return 0;
}

int lb_hv_cpu_features(struct lb_hv_vm *vm, char ***out, struct lb_error *err)
{
    assert(out);
    return ops_of(vm)->cpu_features(vm, out, err);
}

int lb_hv_describe(struct lb_hv_vm *vm, struct lb_vm_desc *out, struct lb_error *err)
{
    assert(out);
    return ops_of(vm)->describe(vm, out, err);
}

int lb_hv_blocks(struct lb_hv_vm *vm, const struct lb_ram_block **out, unsigned *n,
                 struct lb_error *err)
{
    assert(out && n);
    return ops_of(vm)->blocks(vm, out, n, err);
}

int lb_hv_log_enable(struct lb_hv_vm *vm, struct lb_error *err)
{
    struct lb_hv_vm_base *base = base_of(vm);
    assert(is_source(base) && !base->logging && !base->lazy);
    if (base->ops->log_enable(vm, err) < 0)
        return -1;
    base->logging = true;
    return 0;
}

int lb_hv_log_clean(struct lb_hv_vm *vm, const struct lb_ram_block *blk, struct lb_bitmap *dirty,
                    struct lb_error *err)
{
    struct lb_hv_vm_base *base = base_of(vm);
    /* allowed between save_begin and save_end: the two overlap at hand-over */
    assert(base->logging && base->state == LB_HV_STOPPED);
    assert(blk && blk->kind != LB_RAM_ROM);
    check_bitmap(blk, dirty);
    return base->ops->log_clean(vm, blk, dirty, err);
}

int lb_hv_log_peek(struct lb_hv_vm *vm, const struct lb_ram_block *blk, uint64_t first,
                   uint64_t count, struct lb_bitmap *dirty, struct lb_error *err)
{
    assert(blk && blk->kind != LB_RAM_ROM);
    assert(dirty && dirty->words && dirty->n_bits >= count);
    check_pages(blk, first, count);
    return ops_of(vm)->log_peek(vm, blk, first, count, dirty, err);
}

int lb_hv_log_disable(struct lb_hv_vm *vm, struct lb_error *err)
{
    struct lb_hv_vm_base *base = base_of(vm);
    assert(base->logging);
    if (base->ops->log_disable(vm, err) < 0)
        return -1;
    base->logging = false;
    return 0;
}

int lb_hv_populated(struct lb_hv_vm *vm, const struct lb_ram_block *blk, struct lb_bitmap *pages,
                    struct lb_error *err)
{
    check_bitmap(blk, pages);
    check_not_lazy(vm, blk);
    return ops_of(vm)->populated(vm, blk, pages, err);
}

int lb_hv_read(struct lb_hv_vm *vm, const struct lb_ram_block *blk, uint64_t first_page,
               uint64_t n_pages, void *buf, struct lb_error *err)
{
    check_pages(blk, first_page, n_pages);
    check_not_lazy(vm, blk);
    assert(buf);
    return ops_of(vm)->read(vm, blk, first_page, n_pages, buf, err);
}

int lb_hv_read_pages(struct lb_hv_vm *vm, const struct lb_ram_block *blk, const uint32_t *pages,
                     uint64_t n, void *buf, struct lb_error *err)
{
    assert(n > 0 && buf);
    for (uint64_t i = 0; i < n; i++)
        check_pages(blk, pages[i], 1);
    check_not_lazy(vm, blk);
    return ops_of(vm)->read_pages(vm, blk, pages, n, buf, err);
}

int lb_hv_stop(struct lb_hv_vm *vm, struct lb_error *err)
{
    struct lb_hv_vm_base *base = base_of(vm);
    assert(is_source(base) && !base->saving);
    if (base->ops->stop(vm, err) < 0)
        return -1;
    base->state = LB_HV_STOPPED;
    return 0;
}

int lb_hv_cont(struct lb_hv_vm *vm, struct lb_error *err)
{
    struct lb_hv_vm_base *base = base_of(vm);
    assert(is_source(base) && !base->saving);
    if (base->ops->cont(vm, err) < 0)
        return -1;
    base->state = LB_HV_RUNNING;
    return 0;
}

int lb_hv_save_begin(struct lb_hv_vm *vm, bool final, struct lb_error *err)
{
    struct lb_hv_vm_base *base = base_of(vm);
    assert(base->state == LB_HV_STOPPED && !base->saving);
    if (base->ops->save_begin(vm, final, err) < 0)
        return -1;
    base->saving = true;
    return 0;
}

int lb_hv_save_end(struct lb_hv_vm *vm, void **buf, size_t *len, struct lb_error *err)
{
    struct lb_hv_vm_base *base = base_of(vm);
    assert(base->saving && buf && len);
    void *state = NULL;
    size_t state_len = 0;
    base->saving = false;
    if (base->ops->save_end(vm, &state, &state_len, err) < 0)
        return -1;
    if (!state || state_len == 0) {
        free(state);
        return lb_fail(err, LB_E_HV, "%s saved an empty device state", base->ops->name);
    }
    *buf = state;
    *len = state_len;
    return 0;
}

int lb_hv_throttle(struct lb_hv_vm *vm, unsigned percent, struct lb_error *err)
{
    assert(is_source(base_of(vm)) && percent <= 99);
    return ops_of(vm)->throttle(vm, percent, err);
}

int lb_hv_checkpoint_mode(struct lb_hv_vm *vm, bool on, struct lb_error *err)
{
    struct lb_hv_vm_base *base = base_of(vm);
    assert(is_source(base) && !base->saving);
    return base->ops->checkpoint_mode(vm, on, err);
}

int lb_hv_freeze(struct lb_hv_vm *vm, bool on, struct lb_error *err)
{
    return ops_of(vm)->freeze(vm, on, err);
}

int lb_hv_nics(struct lb_hv_vm *vm, struct lb_nic **out, unsigned *n, struct lb_error *err)
{
    assert(!base_of(vm)->saving && out && n);
    return ops_of(vm)->nics(vm, out, n, err);
}

int lb_hv_nic_hold(struct lb_hv_vm *vm, const char *id, int fds[2], struct lb_error *err)
{
    struct lb_hv_vm_base *base = base_of(vm);
    assert(is_source(base) && !base->saving && id && fds);
    return base->ops->nic_hold(vm, id, fds, err);
}

int lb_hv_nic_unhold(struct lb_hv_vm *vm, const char *id, struct lb_error *err)
{
    struct lb_hv_vm_base *base = base_of(vm);
    assert(!base->saving && id);
    if (base->state != LB_HV_STOPPED) /* an end that could not stop the guest first */
        return lb_fail(err, LB_E_STATE, "the hold of %s ends only while the guest is stopped", id);
    return base->ops->nic_unhold(vm, id, err);
}

int lb_hv_disks(struct lb_hv_vm *vm, struct lb_hv_disk **out, unsigned *n, struct lb_error *err)
{
    assert(!base_of(vm)->saving && out && n);
    return ops_of(vm)->disks(vm, out, n, err);
}

int lb_hv_disk_mirror(struct lb_hv_vm *vm, const char *id, const char *nbd_socket,
                      const char *export_name, struct lb_error *err)
{
    struct lb_hv_vm_base *base = base_of(vm);
    assert(is_source(base) && !base->saving && id && nbd_socket && export_name);
    return base->ops->disk_mirror(vm, id, nbd_socket, export_name, err);
}

int lb_hv_disk_mirror_status(struct lb_hv_vm *vm, const char *id, bool poll,
                             struct lb_mirror_status *out, struct lb_error *err)
{
    struct lb_hv_vm_base *base = base_of(vm);
    assert(is_source(base) && !(poll && base->saving) && id && out);
    return base->ops->disk_mirror_status(vm, id, poll, out, err);
}

int lb_hv_disk_mirror_end(struct lb_hv_vm *vm, const char *id, struct lb_error *err)
{
    struct lb_hv_vm_base *base = base_of(vm);
    assert(is_source(base) && !base->saving && id);
    return base->ops->disk_mirror_end(vm, id, err);
}

int lb_hv_disk_overlay(struct lb_hv_vm *vm, const char *id, const char *path, struct lb_error *err)
{
    struct lb_hv_vm_base *base = base_of(vm);
    assert(is_source(base) && !base->saving && id && path);
    return base->ops->disk_overlay(vm, id, path, err);
}

int lb_hv_disk_freeze(struct lb_hv_vm *vm, struct lb_error *err)
{
    struct lb_hv_vm_base *base = base_of(vm);
    assert(base->state == LB_HV_STOPPED && !base->saving);
    return base->ops->disk_freeze(vm, err);
}

void lb_hv_disk_overlay_drop(struct lb_hv_vm *vm)
{
    assert(!base_of(vm)->saving);
    ops_of(vm)->disk_overlay_drop(vm);
}

int lb_hv_disk_join(struct lb_hv_vm *vm, const char *id, const char *top, const char *base,
                    int (*tick)(uint64_t done, uint64_t total, void *arg), void *arg,
                    struct lb_error *err)
{
    assert(is_source(base_of(vm)) && !base_of(vm)->saving && id && top && base);
    return ops_of(vm)->disk_join(vm, id, top, base, tick, arg, err);
}

int lb_hv_clock_step(struct lb_hv_vm *vm, uint64_t *step_ns, struct lb_error *err)
{
    struct lb_hv_vm_base *base = base_of(vm);
    assert(base->state == LB_HV_RUNNING && step_ns);
    return base->ops->clock_step(vm, step_ns, err);
}

int lb_hv_launch(const struct lb_hv_ops *ops, const struct lb_vm_desc *desc,
                 const struct lb_launch_opts *opts, struct lb_hv_vm **out, struct lb_error *err)
{
    check_ops(ops);
    assert(desc && opts && out);
    struct lb_hv_vm *vm = NULL;
    if (ops->launch(desc, opts, &vm, err) < 0)
        return -1;
    struct lb_hv_vm_base *base = (struct lb_hv_vm_base *)vm;
    base->ops = ops;
    base->state = LB_HV_INCOMING;
    base->logging = false;
    base->saving = false;
    base->lazy = false;
    *out = vm;
    return 0;
}

int lb_hv_prepare_ram(struct lb_hv_vm *vm, struct lb_error *err)
{
    assert(base_of(vm)->state == LB_HV_INCOMING && !base_of(vm)->lazy);
    return ops_of(vm)->prepare_ram(vm, err);
}

int lb_hv_lazy_begin(struct lb_hv_vm *vm, struct lb_error *err)
{
    struct lb_hv_vm_base *base = base_of(vm);
    assert(base->state == LB_HV_INCOMING && !base->lazy);
    if (base->ops->lazy_begin(vm, err) < 0)
        return -1;
    base->lazy = true;
    return 0;
}

int lb_hv_lazy_attach(const struct lb_hv_ops *ops, const struct lb_vm_ident *ident,
                      struct lb_hv_vm **out, struct lb_error *err)
{
    check_ops(ops);
    assert(ident && out);
    struct lb_hv_vm *vm = NULL;
    if (ops->lazy_attach(ident, &vm, err) < 0)
        return -1;
    struct lb_hv_vm_base *base = (struct lb_hv_vm_base *)vm;
    base->ops = ops;
    base->state = LB_HV_LOADED; /* run may be said again */
    base->logging = false;
    base->saving = false;
    base->lazy = true;
    *out = vm;
    return 0;
}

int lb_hv_lazy_fault(struct lb_hv_vm *vm, unsigned timeout_ms, const struct lb_ram_block **blk,
                     uint64_t *page, struct lb_error *err)
{
    assert(base_of(vm)->lazy && blk && page);
    return ops_of(vm)->lazy_fault(vm, timeout_ms, blk, page, err);
}

int lb_hv_lazy_place(struct lb_hv_vm *vm, const struct lb_ram_block *blk, uint64_t first, uint64_t n,
                     const void *buf, uint64_t *placed, struct lb_error *err)
{
    check_pages(blk, first, n);
    assert(base_of(vm)->lazy && blk->kind == LB_RAM_MAIN);
    return ops_of(vm)->lazy_place(vm, blk, first, n, buf, placed, err);
}

int lb_hv_lazy_offer(struct lb_hv_vm *vm, const struct lb_ram_block *blk, uint64_t first, uint64_t n,
                     const void *buf, struct lb_error *err)
{
    check_pages(blk, first, n);
    assert(base_of(vm)->lazy && blk->kind == LB_RAM_MAIN && buf);
    return ops_of(vm)->lazy_offer(vm, blk, first, n, buf, err);
}

int lb_hv_lazy_touched(struct lb_hv_vm *vm, const struct lb_ram_block *blk, struct lb_bitmap *pages,
                       struct lb_error *err)
{
    check_bitmap(blk, pages);
    assert(base_of(vm)->lazy && blk->kind == LB_RAM_MAIN);
    return ops_of(vm)->lazy_touched(vm, blk, pages, err);
}

int lb_hv_lazy_missing(struct lb_hv_vm *vm, const struct lb_ram_block *blk, struct lb_bitmap *pages,
                       struct lb_error *err)
{
    check_bitmap(blk, pages);
    assert(base_of(vm)->lazy);
    return ops_of(vm)->lazy_missing(vm, blk, pages, err);
}

int lb_hv_lazy_end(struct lb_hv_vm *vm, struct lb_error *err)
{
    struct lb_hv_vm_base *base = base_of(vm);
    assert(!base->logging);
    if (base->ops->lazy_end(vm, err) < 0)
        return -1;
    base->lazy = false;
    return 0;
}

int lb_hv_write(struct lb_hv_vm *vm, const struct lb_ram_block *blk, uint64_t first_page,
                uint64_t n_pages, const void *buf, struct lb_error *err)
{
    check_pages(blk, first_page, n_pages);
    check_not_lazy(vm, blk);
    assert(buf);
    return ops_of(vm)->write(vm, blk, first_page, n_pages, buf, err);
}

int lb_hv_load_state(struct lb_hv_vm *vm, const void *buf, size_t len, struct lb_error *err)
{
    struct lb_hv_vm_base *base = base_of(vm);
    assert(base->state == LB_HV_INCOMING && buf);
    if (base->ops->load_state(vm, buf, len, err) < 0)
        return -1;
    base->state = LB_HV_LOADED;
    return 0;
}

int lb_hv_run(struct lb_hv_vm *vm, struct lb_error *err)
{
    struct lb_hv_vm_base *base = base_of(vm);
    assert(base->state == LB_HV_LOADED);
    if (base->ops->run(vm, err) < 0)
        return -1;
    base->state = LB_HV_RUNNING;
    return 0;
}

int lb_hv_announce(struct lb_hv_vm *vm, struct lb_error *err)
{
    assert(base_of(vm)->state == LB_HV_RUNNING);
    return ops_of(vm)->announce(vm, err);
}

int lb_hv_status(struct lb_hv_vm *vm, bool *alive, bool *running, struct lb_error *err)
{
    assert(alive && running);
    return ops_of(vm)->status(vm, alive, running, err);
}

bool lb_hv_shut_down(struct lb_hv_vm *vm)
{
    return ops_of(vm)->shut_down(vm);
}

void lb_hv_ident(struct lb_hv_vm *vm, struct lb_vm_ident *out)
{
    assert(out);
    ops_of(vm)->ident(vm, out);
}

bool lb_hv_exists(const struct lb_hv_ops *ops, const struct lb_vm_ident *ident)
{
    check_ops(ops);
    assert(ident);
    return ops->exists(ident);
}

int lb_hv_end(const struct lb_hv_ops *ops, const struct lb_vm_ident *ident, struct lb_error *err)
{
    check_ops(ops);
    assert(ident);
    return ops->end(ident, err);
}

void lb_hv_detach(struct lb_hv_vm *vm)
{
    if (vm)
        ops_of(vm)->detach(vm);
}

int lb_hv_destroy(struct lb_hv_vm *vm, struct lb_error *err)
{
    return ops_of(vm)->destroy(vm, err);
}

void lb_vm_desc_free(struct lb_vm_desc *d)
{
    if (!d)
        return;
    free(d->name);
    free(d->hypervisor);
    free(d->hv_version);
    free(d->emulator);
    lb_strv_free(d->argv);
    free(d->cwd);
    free(d->machine);
    free(d->accel);
    free(d->cpu_model);
    free(d->uuid);
    for (unsigned i = 0; i < d->n_disks; i++) {
        free(d->disks[i].id);
        free(d->disks[i].path);
        free(d->disks[i].format);
        free(d->disks[i].argv_path);
    }
    free(d->disks);
    lb_strv_free(d->features);
    lb_strv_free(d->blockers);
    free(d->kernel_release);
    *d = (struct lb_vm_desc){0};
}
