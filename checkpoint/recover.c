/*
 * checkpoint/recover.c - after a crash of whoever took or restored a checkpoint. The table is in checkpoint.h.
 *
 * Every step can be repeated: what was begun is found again by the entry, the record (take.h) and the file, and the
 * entry changes last.
 */
#include "checkpoint/restore_internal.h"
#include "checkpoint/take.h"

#include <errno.h>
#include <string.h>

#define LOCK_MS 10000u

struct recovery {
    const struct lb_ckpt_env *env;
    struct lb_vm_entry e;
    struct lb_vm_ident id;
    char *text;                      /* 512 bytes */
};

static int save(struct recovery *r, enum lb_vm_state state, struct lb_error *err)
{
    r->e.state = state;
    if (state == LB_VM_SUSPENDED)
        r->e.proc = (struct lb_proc_id){0};
    return lb_vm_entry_save(r->env->state_dir, &r->e, err);
}

static bool is_own_suspend(const struct lb_vm_entry *e)
{
    LB_AUTO_FREE char *ref = lb_asprintf("%s@suspend", e->name);

    return !strcmp(e->checkpoint, ref);
}

/* Whole, as far as that can be known without the key. */
static bool suspend_is_whole(const struct recovery *r)
{
    LB_AUTO_FREE char *path = lb_catalog_suspend_path(r->env->catalog_dir, r->e.name);
    struct lb_error why = LB_ERROR_INIT;
    struct lb_ckpt_info info;
    bool whole;

    if (lb_ckpt_info(path, NULL, &info, &why))
        return why.code == LB_E_AUTH;
    whole = info.meta.suspend;
    lb_ckpt_info_free(&info);
    return whole;
}

/* ----------------------------------------------------------------- CHECKPOINTING */

static int took_gone(struct recovery *r, const struct lb_take_record *rec, struct lb_error *err)
{
    struct lb_error why = LB_ERROR_INIT;

    if (is_own_suspend(&r->e) && suspend_is_whole(r)) {
        /* The guest stood still from then on; should its disks say otherwise, resume refuses. */
        snprintf(r->e.note, sizeof(r->e.note), "its process died when all of it was in the file");
        if (save(r, LB_VM_SUSPENDED, err))
            return -1;
        snprintf(r->text, 512, "%s: suspended; its process died when all of it was in %s", r->e.name,
                 r->e.checkpoint);
        return 0;
    }
    if (lb_take_record_undo(r->env->catalog_dir, r->e.name, NULL, rec, &why))
        lb_log_error(LB_LOG_WARN, &why);
    snprintf(r->e.note, sizeof(r->e.note), "its process is gone");
    snprintf(r->text, 512, "%s: its process is gone, in the middle of a checkpoint", r->e.name);
    return save(r, LB_VM_DEAD, err);
}

/* A file of a suspend that was not decided must go before the guest does: it would be of before. */
static int remove_suspend(struct recovery *r, struct lb_error *err)
{
    LB_AUTO_FREE char *path = lb_catalog_suspend_path(r->env->catalog_dir, r->e.name);

    if (is_own_suspend(&r->e) && unlink(path) < 0 && errno != ENOENT)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot remove %s", path);
    return 0;
}

static int continue_guest(struct recovery *r, struct lb_hv_vm *vm, const struct lb_take_record *rec,
                          struct lb_error *err)
{
    bool alive, running;

    if (lb_hv_status(vm, &alive, &running, err))
        return -1;
    if (!alive)
        return lb_fail(err, LB_E_HV, "the process of VM %s is gone", r->e.name);
    return running || rec->paused ? 0 : lb_hv_cont(vm, err);
}

static int took_alive(struct recovery *r, const struct lb_take_record *rec, struct lb_error *err)
{
    struct lb_error why = LB_ERROR_INIT;
    struct lb_hv_vm *vm = NULL;
    bool whole;
    int rc;

    if (remove_suspend(r, err) || lb_hv_attach(r->env->hv, &r->id, &vm, err))
        return -1;
    rc = continue_guest(r, vm, rec, err);
    if (!rc && lb_take_record_undo(r->env->catalog_dir, r->e.name, vm, rec, &why))
        lb_log_error(LB_LOG_WARN, &why); /* the next checkpoint tries it again */
    lb_hv_detach(vm);
    if (rc)
        return -1;
    whole = rec->number && lb_take_is_committed(r->env->catalog_dir, r->e.name, rec->number);
    if (!whole)
        r->e.checkpoint[0] = '\0';
    snprintf(r->e.note, sizeof(r->e.note), whole ? "" : "a checkpoint of it was interrupted");
    snprintf(r->text, 512, "%s: %s on this host (a checkpoint was %s)", r->e.name,
             rec->paused ? "paused, as its operator left it," : "running", whole ? "whole already" : "interrupted");
    return save(r, LB_VM_RUNNING, err);
}

static int recover_taking(struct recovery *r, struct lb_error *err)
{
    struct lb_error why = LB_ERROR_INIT;
    struct lb_take_record rec = {0};
    int rc, lock;

    /* Taking it removes what a dead writer left. */
    lock = lb_catalog_lock(r->env->catalog_dir, r->e.name, LOCK_MS, err);
    if (lock < 0)
        return -1;
    if (lb_take_record_load(r->env->state_dir, r->e.name, &rec, &why) && why.code != LB_E_NOT_FOUND)
        lb_log_error(LB_LOG_WARN, &why);
    rc = lb_hv_exists(r->env->hv, &r->id) ? took_alive(r, &rec, err) : took_gone(r, &rec, err);
    if (!rc && !why.code)
        rc = lb_take_record_remove(r->env->state_dir, r->e.name, err);
    lb_take_record_free(&rec);
    close(lock);
    return rc;
}

/* ------------------------------------------------------------------------ the rest */

static int recover_suspended(struct recovery *r, struct lb_error *err)
{
    LB_AUTO_FREE char *path = lb_catalog_suspend_path(r->env->catalog_dir, r->e.name);

    if (access(path, F_OK) < 0) {
        /* The process, should there be one, is then all there is. */
        lb_fail_errno(err, LB_E_NOT_FOUND, errno, "VM %s is suspended, but its file %s cannot be seen", r->e.name,
                      path);
        return lb_remedy(err, "bring the file back (is its file system mounted?)");
    }
    if (lb_hv_exists(r->env->hv, &r->id) && lb_hv_end(r->env->hv, &r->id, err))
        return -1;
    if (lb_take_record_remove(r->env->state_dir, r->e.name, err))
        return -1;
    snprintf(r->text, 512, "%s: suspended", r->e.name);
    return r->e.proc.pid ? save(r, LB_VM_SUSPENDED, err) : 0;
}

static int recover_restoring(struct recovery *r, struct lb_error *err)
{
    /* Asked even when no process is known: it may have been started and not written down. */
    if (lb_hv_end(r->env->hv, &r->id, err) || lb_restore_drop_disks(r->env, r->e.name, err))
        return -1;
    if (is_own_suspend(&r->e)) {
        snprintf(r->text, 512, "%s: suspended; an unfinished resume was removed", r->e.name);
        return save(r, LB_VM_SUSPENDED, err);
    }
    snprintf(r->text, 512, "%s: an unfinished restore of %s was removed", r->e.name, r->e.checkpoint);
    return lb_vm_entry_remove(r->env->state_dir, r->e.name, err);
}

static int recover_filling(struct recovery *r, bool *fill_wanted, struct lb_error *err)
{
    if (lb_hv_exists(r->env->hv, &r->id)) {
        *fill_wanted = true;
        snprintf(r->text, 512, "%s: its memory still comes from %s", r->e.name, r->e.checkpoint);
        return 0;
    }
    snprintf(r->e.note, sizeof(r->e.note), "its process is gone");
    snprintf(r->text, 512, "%s: its process is gone; %s is still there", r->e.name, r->e.checkpoint);
    return save(r, LB_VM_DEAD, err);
}

int lb_ckpt_recover(const struct lb_ckpt_env *env, const char *vm, bool *fill_wanted, char text[512],
                    struct lb_error *err)
{
    struct recovery r = {.env = env, .text = text};

    text[0] = '\0';
    *fill_wanted = false;
    if (lb_vm_entry_load(env->state_dir, vm, &r.e, err))
        return -1;
    r.id = lb_ckpt_ident(&r.e);
    switch (r.e.state) {
    case LB_VM_CHECKPOINTING:
        return recover_taking(&r, err);
    case LB_VM_SUSPENDED:
        return recover_suspended(&r, err);
    case LB_VM_RESTORING:
        return recover_restoring(&r, err);
    case LB_VM_FILLING:
        return recover_filling(&r, fill_wanted, err);
    default:
        return lb_fail(err, LB_E_INTERNAL, "VM %s is %s: not a matter of checkpoints", vm,
                       lb_vm_state_name(r.e.state));
    }
}
