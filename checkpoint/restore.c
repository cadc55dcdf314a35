/*
 * checkpoint/restore.c - a VM out of a checkpoint.
 *
 *      check -> entry RESTORING -> overlays -> receiver -> memory (all, or what waits for its pages) -> state
 *            -> entry FILLING -> run -> entry RUNNING, unless memory still comes            (restore_internal.h)
 *
 * The file is opened by a second thread while the hypervisor starts.  Until the entry says FILLING (of one that stays
 * paused: RUNNING) every failure ends in undo(): no process, no overlay, and the entry as it was before.  After it the
 * guest is here; a hypervisor that then refuses to run it (a disk that somebody took) is known not to run it before
 * anything is undone.
 */
#include "checkpoint/restore_internal.h"

#include <errno.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/random.h>

#define NOT_RUNNING_TRIES 100u
#define NOT_RUNNING_MS 50u

/* The time since the last step was `what`. */
static void step(struct lb_restore *r, const char *what)
{
    uint64_t now = lb_now_ns();
    size_t len = strlen(r->steps);

    snprintf(r->steps + len, sizeof(r->steps) - len, "%s%s %.1f", len ? ", " : "", what,
             (double)(now - r->t_step) / 1e6);
    r->t_step = now;
}

/* ---------------------------------------------------------- the file, meanwhile */

struct opening {
    struct lb_restore *r;
    pthread_t thread;
    bool started;
    _Atomic bool enough;              /* the hypervisor has started */
    int rc;
    struct lb_error err;
};

/* What the guest needs first: what an earlier one asked for, then what was written last. */
static int open_hot(struct lb_restore *r, struct lb_error *err)
{
    LB_AUTO_FREE char *path = lb_ws_path(r->env->catalog_dir, r->ck.vm, r->ck.number);
    LB_AUTO_FREE uint64_t *ws = NULL;
    LB_AUTO_FREE uint64_t *hot = NULL;
    uint64_t n_ws, n_hot;

    if (lb_chain_hot(r->chain, &hot, &n_hot, err))
        return -1;
    lb_ws_load(path, &r->ck.info.id, &ws, &n_ws);
    r->hot = lb_alloc((n_ws + n_hot) * sizeof(*r->hot) + 1);
    r->n_hot = n_ws + n_hot;
    if (n_ws)
        memcpy(r->hot, ws, n_ws * sizeof(*ws));
    if (n_hot)
        memcpy(r->hot + n_ws, hot, n_hot * sizeof(*hot));
    return 0;
}

static void *opening_main(void *arg)
{
    struct opening *o = arg;
    struct lb_restore *r = o->r;

    o->rc = lb_catalog_open(r->env->catalog_dir, &r->ck, r->opts->key, &r->chain, &o->err) ||
                    lb_chain_state(r->chain, &r->state, &r->state_len, &o->err) || (r->lazy && open_hot(r, &o->err))
                ? -1
                : 0;
    if (!o->rc && r->lazy)
        lb_chain_warm(r->chain, r->hot, r->n_hot, &o->enough);
    return NULL;
}

static int open_begin(struct opening *o, struct lb_error *err)
{
    int e = pthread_create(&o->thread, NULL, opening_main, o);

    o->started = !e;
    return e ? lb_fail_errno(err, LB_E_NO_SPACE, e, "cannot start a thread") : 0;
}

static int open_end(struct opening *o, struct lb_error *err)
{
    atomic_store(&o->enough, true);
    if (o->started)
        pthread_join(o->thread, NULL);
    if (o->started && o->rc && err)
        *err = o->err;
    return o->started ? o->rc : 0;
}

/* ------------------------------------------------------------------- receiver */

static int new_uuid(char out[37], struct lb_error *err)
{
    uint8_t b[16];
    char hex[33];

    if (getrandom(b, sizeof(b), 0) != sizeof(b))
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "no random numbers");
    b[6] = (b[6] & 0x0f) | 0x40;
    b[8] = (b[8] & 0x3f) | 0x80;
    lb_hex(hex, b, sizeof(b));
    snprintf(out, 37, "%.8s-%.4s-%.4s-%.4s-%.12s", hex, hex + 8, hex + 12, hex + 16, hex + 20);
    return 0;
}

static int save_entry(struct lb_restore *r, struct lb_error *err)
{
    return lb_vm_entry_save(r->env->state_dir, &r->entry, err);
}

static bool is_another(const struct lb_restore *r)
{
    return r->opts->as[0] && strcmp(r->opts->as, r->ck.vm);
}

/* Another VM writes its logs and serves its sockets in its own folder: those of the command line are the first one's.
 * The strings of those that are added are `made`. */
static struct lb_path_map *own_paths(const struct lb_restore *r, const char *dir, const struct lb_launch_opts *host,
                                     unsigned *n, char ***made)
{
    struct lb_path_map *v = lb_alloc(sizeof(*v) * (host->n_paths + r->n_items + 1));
    unsigned n_made = 0;

    if (host->n_paths)
        memcpy(v, host->paths, sizeof(*v) * host->n_paths);
    *n = host->n_paths;
    *made = lb_alloc(sizeof(**made) * (r->n_items + 1));
    for (unsigned i = 0; is_another(r) && i < r->n_items; i++) {
        const struct lb_arg_item *it = &r->items[i];
        const char *slash = strrchr(it->value, '/');

        if ((it->kind != LB_ARG_OUTPUT && it->kind != LB_ARG_UNIX_LISTEN) || it->value[0] != '/' || !slash[1])
            continue;
        (*made)[n_made] = lb_asprintf("%s%s", dir, slash);
        v[(*n)++] = (struct lb_path_map){.from = it->value, .to = (*made)[n_made++]};
    }
    return v;
}

/* A guest does not ask again what its processor can do. */
static int check_processor(struct lb_restore *r, struct lb_error *err)
{
    char *const *used = r->ck.info.meta.desc.features;
    char **offered = NULL;
    int rc;

    if (!used || !used[0])
        return 0;
    if (lb_hv_cpu_features(r->vm, &offered, err))
        return -1;
    rc = lb_cpu_features_check(used, offered, err);
    if (rc)
        lb_remedy(err, "bring it back on a host with the processor and the hypervisor it ran on, or newer ones");
    lb_strv_free(offered);
    return rc;
}

static int launch(struct lb_restore *r, struct lb_error *err)
{
    LB_AUTO_FREE char *dir = lb_vm_dir(r->env->state_dir, r->entry.name, true);
    struct lb_launch_opts lo = r->env->launch ? *r->env->launch : (struct lb_launch_opts){0};
    LB_AUTO_FREE struct lb_path_map *paths = NULL;
    struct lb_vm_ident id;
    char **made;
    int rc;

    lo.name = r->entry.name;
    lo.run_dir = dir;
    lo.paths = paths = own_paths(r, dir, &lo, &lo.n_paths, &made);
    lo.taps = r->taps;
    lo.n_taps = r->n_taps;
    lo.disks = r->disks;
    lo.n_disks = r->n_disks;
    lo.shared_memory_fd = r->opts->shared_memory_fd;
    if (is_another(r)) {
        lo.new_name = r->entry.name;
        lo.new_uuid = lo.mac_seed = r->uuid;
    }
    rc = lb_hv_launch(r->env->hv, &r->ck.info.meta.desc, &lo, &r->vm, err);
    lb_strv_free(made);
    if (rc)
        return -1;
    lb_hv_ident(r->vm, &id);
    r->entry.proc = id.proc;
    snprintf(r->entry.qmp_path, sizeof(r->entry.qmp_path), "%s", id.qmp_path ? id.qmp_path : "");
    if (save_entry(r, err))
        return -1;
    lb_point("restore-launched");
    return check_processor(r, err);
}

/* --------------------------------------------------------------------- memory */

static int place_eager(unsigned block, uint64_t first, uint64_t count, const void *data, void *arg,
                       struct lb_error *err)
{
    struct lb_restore *r = arg;

    return lb_hv_write(r->vm, r->mem.map[block], first, count, data, err);
}

static int load_eager(struct lb_restore *r, struct lb_error *err)
{
    if (lb_hv_prepare_ram(r->vm, err) || lb_mem_place_small(&r->mem, err))
        return -1;
    if (!r->opts->shared_memory_fd) {
        if (lb_mem_read_main(r->chain, place_eager, r, &r->meter, 10, 95, err))
            return -1;
        r->res->placed_bytes = r->mem.populated_pages << LB_PAGE_SHIFT;
    }
    return lb_hv_load_state(r->vm, r->state, r->state_len, err);
}

/* From here on the fill has the handle, the chain and the blocks. */
static int begin_fill(struct lb_restore *r, struct lb_error *err)
{
    r->fill = lb_fill_new(r->env, &r->entry, LB_STEAL_PTR(r->vm), LB_STEAL_PTR(r->chain));
    r->fill->mem = r->mem;
    memset(&r->mem, 0, sizeof(r->mem));
    r->fill->id = r->ck.info.id;
    r->fill->hot = LB_STEAL_PTR(r->hot);
    r->fill->n_hot = r->n_hot;
    if (r->own)
        r->fill->remove_path = lb_strdup(r->ck.path);
    r->fill->ws_path = lb_ws_path(r->env->catalog_dir, r->ck.vm, r->ck.number);
    return lb_fill_start(r->fill, err);
}

static int load_lazy(struct lb_restore *r, struct lb_error *err)
{
    if (begin_fill(r, err))
        return -1;
    step(r, "threads");
    if (lb_mem_place_small(&r->fill->mem, err))
        return -1;
    step(r, "devices");
    if (!lb_hv_load_state(r->fill->vm, r->state, r->state_len, err))
        return lb_fill_decide(r->fill, false, err);
    lb_fill_decide(r->fill, false, err); /* it was ended by us: that is why */
    return -1;
}

static int load(struct lb_restore *r, struct lb_error *err)
{
    struct lb_error why = LB_ERROR_INIT;

    lb_ckpt_meter_phase(&r->meter, LB_CKPT_LOADING, 10);
    if (r->lazy && lb_hv_lazy_begin(r->vm, &why)) {
        if (why.code != LB_E_UNSUPPORTED) {
            if (err)
                *err = why;
            return -1;
        }
        lb_ckpt_meter_note(&r->meter, "all memory is read first: %.150s", why.message);
        r->lazy = false;
    }
    step(r, "memory");
    return r->lazy ? load_lazy(r, err) : load_eager(r, err);
}

/* ---------------------------------------------------------------- the decision */

static struct lb_hv_vm *handle(const struct lb_restore *r)
{
    return r->fill ? r->fill->vm : r->vm;
}

/* `run` failed: does the guest run all the same? 0: no, the hypervisor is dead or says so. 1: yes, only the answer was
 * lost. -1: it lives and does not answer; it may be running, so it is here, and recovery sees to the rest. */
static int runs_anyway(struct lb_restore *r, const struct lb_error *why)
{
    struct lb_vm_ident id = lb_ckpt_ident(&r->entry);
    bool alive = false, running = false;

    for (unsigned i = 0; i < NOT_RUNNING_TRIES; i++) {
        if (!lb_hv_exists(r->env->hv, &id))
            return 0;
        if (!lb_hv_status(handle(r), &alive, &running, NULL))
            return running;
        lb_sleep_ms(NOT_RUNNING_MS);
    }
    lb_log(LB_LOG_ERROR, "the hypervisor of VM %s neither answers nor ends: %s", r->entry.name, why->message);
    return -1;
}

static void make_complete(struct lb_restore *r)
{
    r->entry.state = LB_VM_RUNNING;
    r->entry.checkpoint[0] = '\0';
    snprintf(r->entry.note, sizeof(r->entry.note), "%s %s", r->own ? "resumed from" : "restored from", r->ck.ref);
}

/* One with all its memory is FILLING, too, until it runs: whoever comes after us then has to make it run. */
static int decide(struct lb_restore *r, struct lb_error *err)
{
    if (r->fill && lb_fill_decide(r->fill, true, err))
        return -1;
    r->entry.state = LB_VM_FILLING;
    if (r->paused)
        make_complete(r);
    if (save_entry(r, err))
        return -1; /* the file may say so all the same: undo writes it again, whatever it says */
    if (r->fill)
        r->fill->entry.state = r->entry.state; /* nothing else: its threads read who it is */
    lb_point("restore-decided");
    return 0;
}

static int run(struct lb_restore *r, struct lb_error *err)
{
    struct lb_error why = LB_ERROR_INIT;
    int runs = 1;

    if (lb_ckpt_check_cancel(r->env, r->meter.p.what, r->entry.name, err) || decide(r, err))
        return -1;
    step(r, "entry");
    if (!r->paused && lb_hv_run(handle(r), &why)) {
        runs = runs_anyway(r, &why);
        if (runs == 1 && lb_hv_run(handle(r), &why)) /* said again, for the handle to know */
            runs = -1;
    }
    r->decided = runs != 0;
    if (runs <= 0) {
        if (err)
            *err = why;
        return -1;
    }
    r->res->running_ms = (double)(lb_now_ns() - r->t_start) / 1e6;
    step(r, "run");
    lb_log(LB_LOG_INFO, "VM %s is there after %.1f ms: %s", r->entry.name, r->res->running_ms, r->steps);
    if (!r->paused && lb_hv_announce(handle(r), &why))
        lb_log_error(LB_LOG_WARN, &why);
    lb_restore_keep_disks(r->env, r->entry.name);
    if (r->fill)
        return 0;
    make_complete(r);
    if (save_entry(r, &why)) /* recovery writes it, and removes the file then */
        lb_log_error(LB_LOG_WARN, &why);
    else if (r->own)
        lb_ckpt_remove_file(r->ck.path);
    return 0;
}

/* ------------------------------------------------------------------------- order */

static int begin(struct lb_restore *r, const char *ref, struct lb_error *err)
{
    const struct lb_restore_opts *o = r->opts;

    if (lb_catalog_find(r->env->catalog_dir, ref, o->key, &r->ck, err))
        return -1;
    if (!r->ck.readable) {
        if (err)
            *err = r->ck.error;
        return -1;
    }
    if (lb_restore_check(r, err))
        return -1;
    r->paused = o->paused || r->ck.info.meta.paused;
    r->lazy = !o->eager && !r->paused && !o->shared_memory_fd;
    if (new_uuid(r->uuid, err))
        return -1;
    snprintf(r->res->vm, sizeof(r->res->vm), "%s", r->entry.name);
    r->res->ram_bytes = r->ck.info.meta.desc.ram_bytes;
    lb_ckpt_meter_init(&r->meter, r->env, r->own ? "resume" : o->shared_memory_fd ? "clone" : "restore", 0);
    lb_ckpt_meter_phase(&r->meter, LB_CKPT_PREPARING, 0);
    if (r->ck.info.meta.no_disk && r->ck.info.meta.desc.n_disks) {
        snprintf(r->res->note, sizeof(r->res->note), "%.100s was taken without its disks: the guest goes on with what "
                 "they hold now, which may not fit its memory", r->ck.ref);
        lb_ckpt_meter_note(&r->meter, "%.190s", r->res->note);
    }
    return 0;
}

static int receive(struct lb_restore *r, struct lb_error *err)
{
    struct opening o = {.r = r};
    struct lb_error why = LB_ERROR_INIT;
    int rc;
    LB_AUTO_FREE char *qmp = lb_vm_qmp_path(r->env->state_dir, r->entry.name);

    /* By which the receiver is found, should we die before it is known. */
    snprintf(r->entry.qmp_path, sizeof(r->entry.qmp_path), "%s", qmp);
    lb_restore_keep_disks(r->env, r->entry.name); /* those of an earlier VM of that name: not ours to undo */
    if (save_entry(r, err))
        return -1;
    r->registered = true;
    step(r, "entry");
    rc = open_begin(&o, err) || lb_restore_disks(r, err) || launch(r, err) ? -1 : 0;
    step(r, "launch");
    if (open_end(&o, &why) && !rc) {
        rc = -1;
        if (err)
            *err = why;
    }
    if (rc || lb_mem_init(&r->mem, r->vm, r->chain, false, err))
        return -1;
    step(r, "file");
    return 0;
}

static int restore(struct lb_restore *r, const char *ref, struct lb_error *err)
{
    if (begin(r, ref, err))
        return -1;
    step(r, "checks");
    lb_ckpt_meter_phase(&r->meter, LB_CKPT_LAUNCHING, 2);
    if (receive(r, err))
        return -1;
    r->meter.p.total_bytes = r->mem.populated_pages << LB_PAGE_SHIFT;
    if (load(r, err))
        return -1;
    step(r, "state");
    lb_point("restore-loaded");
    return run(r, err);
}

/* Nothing is left of it. What cannot be undone stays RESTORING, which recovery undoes. */
static void undo(struct lb_restore *r, const struct lb_error *why)
{
    struct lb_error err = LB_ERROR_INIT;
    struct lb_vm_ident id = lb_ckpt_ident(&r->entry);
    struct lb_hv_vm *vm;
    int rc = 0;

    if (r->fill)
        lb_fill_stop(r->fill); /* its threads use the handle */
    vm = r->fill ? LB_STEAL_PTR(r->fill->vm) : LB_STEAL_PTR(r->vm);
    if (vm && lb_hv_destroy(vm, NULL))
        rc = lb_hv_end(r->env->hv, &id, &err);
    if (!rc && r->overlays)
        rc = lb_restore_drop_disks(r->env, r->entry.name, &err);
    if (!rc && r->had_entry) {
        snprintf(r->before.note, sizeof(r->before.note), "%.200s", why->message);
        rc = lb_vm_entry_save(r->env->state_dir, &r->before, &err);
    } else if (!rc && r->registered) {
        rc = lb_vm_entry_remove(r->env->state_dir, r->entry.name, &err);
    }
    if (rc)
        lb_log_error(LB_LOG_ERROR, &err);
}

static void free_restore(struct lb_restore *r)
{
    lb_fill_free(r->fill);
    lb_mem_free(&r->mem);
    lb_hv_detach(r->vm);
    lb_chain_close(r->chain);
    lb_ckpt_entry_free(&r->ck);
    free(r->state);
    free(r->hot);
    free(r->disks);
    lb_strv_free(r->overlays);
    free(r->taps);
    lb_argv_items_free(r->items, r->n_items);
}

int lb_ckpt_restore(const struct lb_ckpt_env *env, const char *ref, const struct lb_restore_opts *opts,
                    struct lb_fill **f, struct lb_restore_result *res, struct lb_error *err)
{
    struct lb_restore r = {.env = env, .opts = opts, .res = res, .t_start = lb_now_ns()};
    struct lb_error why = LB_ERROR_INIT;
    int rc;

    r.t_step = r.t_start;
    *f = NULL;
    memset(res, 0, sizeof(*res));
    rc = restore(&r, ref, &why);
    if (rc && !r.decided && r.registered)
        undo(&r, &why);
    if (!rc && r.fill) {
        res->filling = true;
        res->placed_bytes = r.fill->placed_pages << LB_PAGE_SHIFT;
        *f = LB_STEAL_PTR(r.fill);
    } else if (!rc) {
        lb_ckpt_meter_phase(&r.meter, LB_CKPT_DONE, 100);
    }
    res->total_ms = (double)(lb_now_ns() - r.t_start) / 1e6;
    free_restore(&r);
    if (rc && err)
        *err = why;
    return rc;
}
