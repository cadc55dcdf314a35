/*
 * checkpoint/take.c - a live checkpoint, or a suspend: the order of it all.
 *
 * Happy path: live() and suspend() read top to bottom. What fails before the file has its name (a suspend: before
 * the entry says SUSPENDED) ends in give_up(): the guest runs on first, then everything else is undone. A live
 * checkpoint needs the guest until its pause ends; should the guest die after that, the checkpoint is good.
 *
 * A suspend keeps the disks' locks until all memory is in the file: nobody else can take a disk while the guest
 * might still have to go on with it. Its device state is of before, which fails early where it can fail; the second
 * save only makes the hypervisor write back and release the disks, so that what is recorded of them stays true.
 */
#include "checkpoint/take.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>

#define RESUME_FOR_NS UINT64_C(10000000000)

enum { S_OPEN, S_COPY, S_PAUSED, S_CAPTURED, S_COMMITTED, S_SUSPENDED, S_DONE, S_FAILED };

static const struct lb_sm_state states[] = {
    [S_OPEN] = {"opening", LB_SM_TO(S_COPY) | LB_SM_TO(S_PAUSED) | LB_SM_TO(S_FAILED)},
    [S_COPY] = {"copying", LB_SM_TO(S_PAUSED) | LB_SM_TO(S_FAILED)},
    [S_PAUSED] = {"paused", LB_SM_TO(S_CAPTURED) | LB_SM_TO(S_FAILED)},
    [S_CAPTURED] = {"captured", LB_SM_TO(S_COMMITTED) | LB_SM_TO(S_FAILED)},
    [S_COMMITTED] = {"committed", LB_SM_TO(S_SUSPENDED) | LB_SM_TO(S_DONE) | LB_SM_TO(S_FAILED)},
    [S_SUSPENDED] = {"suspended", LB_SM_TO(S_DONE)},
    [S_DONE] = {"done", 0},
    [S_FAILED] = {"failed", 0},
};

int lb_take_check_cancel(struct lb_take *t, struct lb_error *err)
{
    if (!lb_ckpt_check_cancel(t->env, t->what, t->entry.name, err))
        return 0;
    return lb_remedy(err, "the VM runs on; no checkpoint was made");
}

/* ----------------------------------------------------------------------- pauses */

int lb_take_pause(struct lb_take *t, struct lb_error *err)
{
    bool alive, running;

    if (t->paused) { /* unless its operator has thought better of it */
        if (lb_hv_status(t->vm, &alive, &running, err))
            return -1;
        t->paused = !running;
    }
    t->t_stop = lb_now_ns();
    t->stopped = true; /* also when it fails half way: continuing twice does no harm */
    return lb_hv_stop(t->vm, err);
}

int lb_take_continue(struct lb_take *t, struct lb_error *err)
{
    if (!t->paused && lb_hv_cont(t->vm, err))
        return -1;
    t->stopped = false;
    return 0;
}

static int save_begin(struct lb_take *t, bool final, struct lb_error *err)
{
    if (lb_hv_save_begin(t->vm, final, err))
        return -1;
    t->saving = true;
    return 0;
}

static int save_end(struct lb_take *t, void **state, size_t *len, struct lb_error *err)
{
    t->saving = false;
    return lb_hv_save_end(t->vm, state, len, err);
}

/* ------------------------------------------------------------------ entry, record */

static int mark(struct lb_take *t, struct lb_error *err)
{
    const char *dir = t->env->state_dir;

    t->record.paused = t->paused;
    if (lb_take_record_save(dir, t->entry.name, &t->record, err))
        return -1;
    t->recorded = true;
    t->entry.state = LB_VM_CHECKPOINTING;
    snprintf(t->entry.checkpoint, sizeof(t->entry.checkpoint), "%s", t->res->ref);
    return lb_vm_entry_save(dir, &t->entry, err);
}

/* The VM is what it was before, or dead; it has a checkpoint more. */
static int unmark(struct lb_take *t, struct lb_error *err)
{
    struct lb_vm_ident id = lb_ckpt_ident(&t->entry);

    t->entry.state = lb_hv_exists(t->env->hv, &id) ? LB_VM_RUNNING : LB_VM_DEAD;
    if (t->entry.state == LB_VM_DEAD)
        snprintf(t->entry.note, sizeof(t->entry.note), "its process died while a checkpoint was written");
    if (lb_vm_entry_save(t->env->state_dir, &t->entry, err))
        return -1;
    return lb_take_record_remove(t->env->state_dir, t->entry.name, err);
}

/* ------------------------------------------------------------------------- failure */

static int try_continue(struct lb_take *t, struct lb_error *err)
{
    struct lb_vm_ident id = lb_ckpt_ident(&t->entry);
    uint64_t until = lb_now_ns() + RESUME_FOR_NS;

    if (t->saving) {
        void *buf = NULL;
        size_t len;

        if (!save_end(t, &buf, &len, NULL))
            free(buf);
    }
    while (t->stopped) {
        struct lb_error why = LB_ERROR_INIT;

        if (!lb_take_continue(t, &why))
            return 0;
        if (!lb_hv_exists(t->env->hv, &id) || lb_now_ns() > until) {
            *err = why;
            return -1;
        }
        lb_sleep_ms(100);
    }
    return 0;
}

/* What the entry says after a failure; *err as a person should read it. */
static void entry_after_failure(struct lb_take *t, bool continued, const struct lb_error *why, struct lb_error *err)
{
    struct lb_vm_ident id = lb_ckpt_ident(&t->entry);
    struct lb_error first = *err;

    memcpy(t->entry.checkpoint, t->before.checkpoint, sizeof(t->entry.checkpoint));
    if (!lb_hv_exists(t->env->hv, &id)) {
        t->entry.state = LB_VM_DEAD;
        snprintf(t->entry.note, sizeof(t->entry.note), "its process died during a %s", t->what);
        lb_fail(err, LB_E_HV, "VM %s died during the %s (process %d is gone): %.250s", t->entry.name, t->what,
                (int)t->entry.proc.pid, first.message);
        lb_remedy(err, "see the log of the VM in %s/vms/%s", t->env->state_dir, t->entry.name);
    } else if (!continued) { /* not RUNNING: recovery goes on trying */
        t->entry.state = LB_VM_CHECKPOINTING;
        snprintf(t->entry.note, sizeof(t->entry.note), "paused, could not be continued: %.180s", why->message);
        lb_fail(err, LB_E_HV, "VM %s is paused and could not be continued (%.150s) after: %.250s", t->entry.name,
                why->message, first.message);
        lb_remedy(err, "it is tried again by itself; `lifeboat recover %s` tries at once and says what is wrong",
                  t->entry.name);
    } else {
        t->entry.state = LB_VM_RUNNING;
        snprintf(t->entry.note, sizeof(t->entry.note), "%s failed: %.200s", t->what, first.message);
    }
}

/* The guest first; then what was done to it is undone; then the entry says so. */
static void give_up(struct lb_take *t, struct lb_error *err)
{
    struct lb_vm_ident id = lb_ckpt_ident(&t->entry);
    struct lb_error why = LB_ERROR_INIT;
    bool continued;

    if (t->committed) /* of a suspend: not the VM, as soon as the guest goes on */
        lb_ckpt_remove_file(t->path);
    continued = !try_continue(t, &why);
    lb_sm_move(&t->sm, S_FAILED);
    /* Nothing was done to it; only of its death is to be told. */
    if (!t->recorded && (t->before.state != LB_VM_RUNNING || lb_hv_exists(t->env->hv, &id)))
        return;
    entry_after_failure(t, continued, &why, err);
    if (t->overlays) {
        bool alive = lb_hv_exists(t->env->hv, &id);

        memset(&why, 0, sizeof(why));
        if (lb_take_record_undo(t->env->catalog_dir, t->entry.name, alive ? t->vm : NULL, &t->record, &why)) {
            lb_log_error(LB_LOG_WARN, &why); /* the next one tries it again: the record stays */
            lb_vm_entry_save(t->env->state_dir, &t->entry, NULL);
            return;
        }
    }
    if (lb_vm_entry_save(t->env->state_dir, &t->entry, NULL) == 0 && t->entry.state != LB_VM_CHECKPOINTING)
        lb_take_record_remove(t->env->state_dir, t->entry.name, NULL);
}

/* ---------------------------------------------------------------------------- disks */

static int sync_disks(const struct lb_take *t, struct lb_error *err)
{
    for (unsigned i = 0; i < t->meta.n_disks; i++) {
        const char *path = t->meta.disks[i].path;

        if (!path[0])
            continue;
        LB_AUTO_FD int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || (fsync(fd) < 0 && errno != EINVAL && errno != EROFS))
            return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot sync image %s", path);
    }
    return 0;
}

/* ---------------------------------------------------------------------------- live */

/* Only what has to be. */
static int capture(struct lb_take *t, struct lb_error *err)
{
    if (lb_take_pause(t, err))
        return -1;
    t->meta.created_ms = lb_wall_ms();
    t->meta.paused = t->paused;
    lb_point("take-paused");
    if (save_begin(t, false, err) || lb_take_last_pages(t, err) || save_end(t, &t->state, &t->state_len, err))
        return -1;
    if (t->overlays && lb_hv_disk_freeze(t->vm, err))
        return -1;
    if (lb_take_continue(t, err))
        return -1;
    if (!t->paused)
        t->meta.pause_ms = (double)(lb_now_ns() - t->t_stop) / 1e6;
    return 0;
}

/* What stood still with the guest. Not every guest has a clock that can be set. */
static void step_clock(struct lb_take *t)
{
    uint64_t step = (uint64_t)(t->meta.pause_ms * 1e6);

    if (step && lb_hv_clock_step(t->vm, &step, NULL))
        lb_log(LB_LOG_DEBUG, "the guest's clock was not set forward by %.1f ms", t->meta.pause_ms);
}

static int prepare_pause(struct lb_take *t, struct lb_error *err)
{
    if (t->overlays) {
        sync_disks(t, NULL);     /* the pause waits for it otherwise */
        t->record.frozen = true; /* from here on nobody knows, should we die */
        if (lb_take_record_save(t->env->state_dir, t->entry.name, &t->record, err))
            return -1;
    }
    return lb_take_reserve(t, err) || lb_hv_checkpoint_mode(t->vm, true, err) ? -1 : 0;
}

/* Before the file has its name: then no image of a checkpoint is unknown, of an encrypted one neither. */
static int note_images(struct lb_take *t, struct lb_error *err)
{
    if (t->meta.no_disk || !t->meta.n_disks)
        return 0;
    return lb_catalog_set_disks(t->env->catalog_dir, t->entry.name, t->meta.number, t->meta.disks, t->meta.n_disks, err);
}

static int commit(struct lb_take *t, struct lb_error *err)
{
    struct lb_ckpt_writer *w = t->writer;

    if (lb_take_put_hot(t, err) || lb_ckpt_flush(w, err))
        return -1;
    lb_ckpt_writer_stats(w, &t->res->stats);
    lb_point("take-written");
    if (lb_take_check_cancel(t, err) || note_images(t, err))
        return -1;
    t->writer = NULL;
    if (lb_ckpt_commit(w, &t->meta, t->state, t->state_len, NULL, err))
        return -1;
    t->committed = true;
    lb_sm_move(&t->sm, S_COMMITTED);
    lb_point("take-committed");
    return 0;
}

static int live(struct lb_take *t, struct lb_error *err)
{
    lb_sm_move(&t->sm, S_COPY);
    if (!t->meta.no_disk && t->n_disks && lb_take_overlays(t, err))
        return -1;
    lb_ckpt_meter_phase(&t->meter, LB_CKPT_COPYING, 3);
    if (lb_take_begin_log(t, err) || lb_take_rounds(t, err) || lb_take_check_cancel(t, err))
        return -1;
    lb_point("take-copied");
    if (prepare_pause(t, err))
        return -1;
    lb_sm_move(&t->sm, S_PAUSED);
    lb_ckpt_meter_phase(&t->meter, LB_CKPT_PAUSED, 88);
    if (capture(t, err))
        return -1;
    lb_sm_move(&t->sm, S_CAPTURED);
    lb_ckpt_meter_phase(&t->meter, LB_CKPT_WRITING, 90);
    step_clock(t);
    lb_hv_log_disable(t->vm, NULL); /* ends with the handle anyway */
    if (lb_take_write_late(t, err) || lb_take_identify_disks(t, err) || commit(t, err))
        return -1;
    t->res->pause_ms = t->meta.pause_ms;
    return 0;
}

/* ------------------------------------------------------------------------- suspend */

/* Nobody may have continued it: what is in the file would be of before. */
static int check_still(struct lb_take *t, struct lb_error *err)
{
    bool alive, running;

    if (lb_hv_status(t->vm, &alive, &running, err))
        return -1;
    if (!alive)
        return lb_fail(err, LB_E_HV, "the process of VM %s is gone", t->entry.name);
    if (!running)
        return 0;
    t->paused = t->stopped = false;
    lb_fail(err, LB_E_STATE, "VM %s was continued by somebody else while it was suspended", t->entry.name);
    return lb_remedy(err, "it runs; suspend it again when it may be");
}

static int release_disks(struct lb_take *t, struct lb_error *err)
{
    LB_AUTO_FREE void *again = NULL;
    size_t len;

    if (check_still(t, err) || save_begin(t, true, err) || save_end(t, &again, &len, err))
        return -1;
    /* What is in no process's memory any more must be on the disk before the process ends. */
    return sync_disks(t, err) || lb_take_identify_disks(t, err) ? -1 : 0;
}

/* From here on the file is the VM. A save that fails may have got as far as that: who reads the entry decides. */
static int become_suspended(struct lb_take *t, struct lb_error *err)
{
    struct lb_error why = LB_ERROR_INIT;
    struct lb_vm_entry now;

    t->entry.state = LB_VM_SUSPENDED;
    t->entry.note[0] = '\0';
    if (lb_vm_entry_save(t->env->state_dir, &t->entry, &why) &&
        (lb_vm_entry_load(t->env->state_dir, t->entry.name, &now, NULL) || now.state != LB_VM_SUSPENDED)) {
        if (err)
            *err = why;
        return -1;
    }
    lb_sm_move(&t->sm, S_SUSPENDED);
    lb_point("suspend-decided");
    return 0;
}

static int end_process(struct lb_take *t, struct lb_error *err)
{
    struct lb_vm_ident id = lb_ckpt_ident(&t->entry);
    struct lb_error why = LB_ERROR_INIT;

    if (lb_hv_destroy(LB_STEAL_PTR(t->vm), &why)) {
        lb_log_error(LB_LOG_WARN, &why);
        if (lb_hv_end(t->env->hv, &id, err)) {
            lb_context(err, "VM %s is suspended, but its process did not end", t->entry.name);
            return lb_remedy(err, "`lifeboat recover %s` ends it", t->entry.name);
        }
    }
    t->entry.proc = (struct lb_proc_id){0};
    return lb_vm_entry_save(t->env->state_dir, &t->entry, err) ||
                   lb_take_record_remove(t->env->state_dir, t->entry.name, err)
               ? -1
               : 0;
}

static int suspend(struct lb_take *t, struct lb_error *err)
{
    lb_sm_move(&t->sm, S_COPY);
    lb_ckpt_meter_phase(&t->meter, LB_CKPT_COPYING, 3);
    if (lb_take_sample(t, err) || lb_take_check_cancel(t, err))
        return -1;
    lb_sm_move(&t->sm, S_PAUSED);
    if (lb_take_pause(t, err))
        return -1;
    lb_point("take-paused");
    t->meta.created_ms = lb_wall_ms();
    t->meta.paused = t->paused;
    if (save_begin(t, false, err) || save_end(t, &t->state, &t->state_len, err))
        return -1;
    if (lb_take_all_pages(t, err))
        return -1;
    lb_sm_move(&t->sm, S_CAPTURED);
    lb_ckpt_meter_phase(&t->meter, LB_CKPT_WRITING, 90);
    if (release_disks(t, err) || commit(t, err) || lb_take_check_cancel(t, err) || check_still(t, err) ||
        become_suspended(t, err))
        return -1;
    return 0;
}

/* --------------------------------------------------------------------------- entry */

static void close_all(struct lb_take *t)
{
    lb_ckpt_abort(t->writer);
    lb_chain_close(t->parent);
    lb_hv_detach(t->vm);
    lb_take_free_pages(t);
    lb_take_record_free(&t->record);
    lb_ckpt_meta_free(&t->meta);
    free(t->disks);
    free(t->state);
    if (t->lock >= 0)
        close(t->lock);
}

static int take(struct lb_take *t, struct lb_error *err)
{
    lb_ckpt_meter_phase(&t->meter, LB_CKPT_PREPARING, 0);
    if (lb_take_open(t, err) || lb_take_check_cancel(t, err))
        return -1;
    t->res->disks = t->meta.n_disks;
    if (mark(t, err))
        return -1;
    lb_point("take-opened");
    return t->opts->suspend ? suspend(t, err) : live(t, err);
}

int lb_ckpt_take(const struct lb_ckpt_env *env, const struct lb_vm_entry *vm, const struct lb_take_opts *opts,
                 struct lb_take_result *res, struct lb_error *err)
{
    struct lb_take *t = lb_alloc(sizeof(*t));
    struct lb_error why = LB_ERROR_INIT;
    int rc;

    memset(res, 0, sizeof(*res));
    t->env = env;
    t->opts = opts;
    t->res = res;
    t->what = opts->suspend ? "suspend" : "checkpoint";
    t->before = t->entry = *vm;
    t->lock = -1;
    t->t_start = lb_now_ns();
    lb_sm_init(&t->sm, t->what, states, LB_ARRAY_LEN(states), S_OPEN);
    lb_ckpt_meter_init(&t->meter, env, t->what, 0);
    rc = take(t, &why);
    if (rc)
        give_up(t, &why);
    else
        rc = opts->suspend ? end_process(t, &why) : unmark(t, &why);
    if (!rc) {
        lb_sm_move(&t->sm, S_DONE);
        lb_ckpt_meter_phase(&t->meter, LB_CKPT_DONE, 100);
    }
    res->total_ms = (double)(lb_now_ns() - t->t_start) / 1e6;
    close_all(t);
    free(t);
    if (rc && err)
        *err = why;
    return rc;
}
