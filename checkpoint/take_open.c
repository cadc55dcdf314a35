/*
 * checkpoint/take_open.c - before the guest is touched: may it be done, what is the VM, where does the file go.
 */
#include "checkpoint/take.h"

#include "checkpoint/catalog_internal.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>

#define LOCK_MS 10000u
#define DEPTH_MAX 128u               /* files of a chain are all open while it is read */

/* ----------------------------------------------------------------------- the VM */

static int check_state(const struct lb_take *t, struct lb_error *err)
{
    const struct lb_vm_entry *e = &t->entry;

    if (e->state == LB_VM_RUNNING)
        return 0;
    lb_fail(err, LB_E_STATE, "VM %s is %s: no %s is possible", e->name, lb_vm_state_name(e->state), t->what);
    switch (e->state) {
    case LB_VM_PROTECTED:
        return lb_remedy(err, "its backup is never further behind than an epoch; `lifeboat unprotect %s` first",
                         e->name);
    case LB_VM_FILLING:
        return lb_remedy(err, "its memory still comes from %s: wait until `lifeboat status %s` says running",
                         e->checkpoint, e->name);
    case LB_VM_SUSPENDED:
        return lb_remedy(err, "`lifeboat resume %s` brings it back", e->name);
    case LB_VM_DEAD:
        return lb_remedy(err, "its process is gone; `lifeboat checkpoint ls %s` shows what there is to restore",
                         e->name);
    default:
        return lb_remedy(err, "wait until `lifeboat status %s` says running, or `lifeboat recover %s`", e->name,
                         e->name);
    }
}

/* A blocker is "what: why: remedy". */
static int check_blockers(const struct lb_vm_desc *d, struct lb_error *err)
{
    const char *text = d->blockers ? d->blockers[0] : NULL, *what, *why;

    if (!text)
        return 0;
    what = strchr(text, ':');
    why = what ? strchr(what + 1, ':') : NULL;
    lb_fail(err, LB_E_PREFLIGHT, "%.*s", why ? (int)(why - text) : (int)strlen(text), text);
    return lb_remedy(err, "%s", why ? why + 1 + strspn(why + 1, " ") : "remove it from the VM");
}

static int attach(struct lb_take *t, struct lb_error *err)
{
    struct lb_vm_ident id = lb_ckpt_ident(&t->entry);
    bool alive, running;

    if (lb_hv_attach(t->env->hv, &id, &t->vm, err) || lb_hv_status(t->vm, &alive, &running, err))
        return -1;
    if (!alive)
        return lb_fail(err, LB_E_HV, "the process of VM %s is gone", t->entry.name);
    t->paused = !running;
    return 0;
}

static int look_at_vm(struct lb_take *t, struct lb_error *err)
{
    if (lb_hv_describe(t->vm, &t->meta.desc, err))
        return -1;
    free(t->meta.desc.name);
    t->meta.desc.name = lb_strdup(t->entry.name);
    if (check_blockers(&t->meta.desc, err))
        return -1;
    return lb_hv_blocks(t->vm, &t->blocks, &t->n_blocks, err) ||
                   lb_hv_disks(t->vm, &t->disks, &t->n_disks, err)
               ? -1
               : 0;
}

/* ---------------------------------------------------------------------- its disks */

static bool ends_with_file(const char *path, const char *name)
{
    size_t len = strlen(path), tail = strlen(name);

    return tail && tail < len && path[len - tail - 1] == '/' && !strcmp(path + len - tail, name);
}

/* The description of a disk; it may be known there by its device and a relative path. */
static const struct lb_disk_desc *described(const struct lb_vm_desc *d, const struct lb_hv_disk *disk)
{
    for (unsigned i = 0; i < d->n_disks; i++)
        if (!strcmp(d->disks[i].id, disk->id) || !strcmp(d->disks[i].path, disk->path))
            return &d->disks[i];
    for (unsigned i = 0; i < d->n_disks; i++)
        if (ends_with_file(disk->path, d->disks[i].path))
            return &d->disks[i];
    return NULL;
}

static void describe_disks(struct lb_take *t)
{
    struct lb_ckpt_meta *m = &t->meta;

    m->no_disk = t->opts->no_disk && !t->opts->suspend;
    if (m->no_disk)
        return;
    m->disks = lb_alloc((t->n_disks + 1) * sizeof(*m->disks));
    for (unsigned i = 0; i < t->n_disks; i++) {
        const struct lb_hv_disk *from = &t->disks[i];
        const struct lb_disk_desc *d = described(&m->desc, from);
        struct lb_ckpt_disk *to = &m->disks[m->n_disks++];
        const char *name = d && d->argv_path && *d->argv_path ? d->argv_path : d ? d->path : from->path;

        snprintf(to->id, sizeof(to->id), "%s", from->id);
        snprintf(to->argv_path, sizeof(to->argv_path), "%s", name);
        snprintf(to->path, sizeof(to->path), "%s", from->path);
        snprintf(to->format, sizeof(to->format), "%s", from->format);
        to->size_bytes = from->size_bytes;
    }
}

int lb_take_identify_disks(struct lb_take *t, struct lb_error *err)
{
    for (unsigned i = 0; i < t->meta.n_disks; i++) {
        struct lb_ckpt_disk *d = &t->meta.disks[i];
        struct stat st;

        if (!d->path[0])
            continue; /* not an image of this host: there is nothing to look at */
        if (stat(d->path, &st) < 0)
            return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot look at image %s", d->path);
        d->file_bytes = (uint64_t)st.st_size;
        d->mtime_ns = (uint64_t)st.st_mtim.tv_sec * UINT64_C(1000000000) + (uint64_t)st.st_mtim.tv_nsec;
        d->inode = st.st_ino;
        d->device = st.st_dev;
    }
    return 0;
}

/* ----------------------------------------------------------------------- the file */

/* Of an earlier checkpoint that could not undo everything itself. Not a reason to have no other. */
static void undo_earlier(struct lb_take *t)
{
    struct lb_error why = LB_ERROR_INIT;
    struct lb_take_record r;

    if (lb_take_record_load(t->env->state_dir, t->entry.name, &r, &why)) {
        if (why.code != LB_E_NOT_FOUND)
            lb_log_error(LB_LOG_WARN, &why);
        return;
    }
    if (lb_take_record_undo(t->env->catalog_dir, t->entry.name, t->vm, &r, &why))
        lb_log_error(LB_LOG_WARN, &why);
    lb_take_record_free(&r);
}

static int choose_path(struct lb_take *t, struct lb_error *err)
{
    const char *dir = t->env->catalog_dir, *vm = t->entry.name;

    if (!t->opts->suspend) {
        /* A catalog that was emptied counts from 1 again, and images of before may be in use. */
        do {
            if (lb_catalog_next(dir, vm, &t->record.number, t->path, err))
                return -1;
        } while (!t->opts->no_disk && lb_take_overlay_exists(t));
        snprintf(t->res->ref, sizeof(t->res->ref), "%s@%" PRIu32, vm, t->record.number);
    } else {
        LB_AUTO_FREE char *path = lb_catalog_suspend_path(dir, vm);

        if (strlen(path) >= sizeof(t->path))
            return lb_fail(err, LB_E_USAGE, "the path %s is too long", path);
        memcpy(t->path, path, strlen(path) + 1);
        snprintf(t->res->ref, sizeof(t->res->ref), "%s@suspend", vm);
        /* The VM runs: this is not it. Durably: after a crash of the host it would be taken for the new one. */
        if (unlink(path) < 0 && errno != ENOENT)
            return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot remove %s", path);
        LB_AUTO_FREE char *folder = lb_asprintf("%s/%s", dir, vm);
        if (lb_sync_dir(folder, err))
            return -1;
    }
    snprintf(t->res->path, sizeof(t->res->path), "%s", t->path);
    return 0;
}

/* The checkpoint an increment stands on: nothing else has to be remembered between two checkpoints, because the
 * writer finds what has changed by the hashes of the pages in it. Any reason against it makes a full one. */
static void open_parent(struct lb_take *t)
{
    struct lb_error why = LB_ERROR_INIT;
    struct lb_ckpt_entry e;

    if (t->opts->full || t->opts->suspend)
        return;
    if (lb_catalog_latest(t->env->catalog_dir, t->entry.name, t->opts->key, &e, &why)) {
        if (why.code != LB_E_NOT_FOUND)
            lb_ckpt_meter_note(&t->meter, "a full checkpoint: %.150s", why.message);
        return;
    }
    if (e.depth >= DEPTH_MAX)
        lb_ckpt_meter_note(&t->meter, "a full checkpoint: %s stands on %u others", e.ref, e.depth - 1);
    else if (lb_catalog_open(t->env->catalog_dir, &e, t->opts->key, &t->parent, &why))
        lb_ckpt_meter_note(&t->meter, "a full checkpoint: %.150s", why.message);
    lb_ckpt_entry_free(&e);
}

static int create(struct lb_take *t, struct lb_error *err)
{
    LB_AUTO_FREE struct lb_ckpt_block *v = lb_alloc((t->n_blocks + 1) * sizeof(*v));
    struct lb_ckpt_create c = {.path = t->path, .blocks = v, .n_blocks = t->n_blocks, .parent = t->parent,
                               .key = t->opts->key, .zstd_level = t->opts->zstd_level};
    struct lb_error why = LB_ERROR_INIT;

    for (unsigned b = 0; b < t->n_blocks; b++) {
        snprintf(v[b].name, sizeof(v[b].name), "%s", t->blocks[b].name);
        v[b].n_pages = t->blocks[b].size_bytes / LB_PAGE_SIZE;
        v[b].kind = t->blocks[b].kind;
    }
    if (!lb_ckpt_create(&c, &t->writer, &why))
        return 0;
    if (t->parent && why.code == LB_E_STATE) { /* of another machine, or encrypted and this one not */
        lb_ckpt_meter_note(&t->meter, "a full checkpoint: %.150s", why.message);
        lb_chain_close(t->parent);
        c.parent = t->parent = NULL;
        return lb_ckpt_create(&c, &t->writer, err);
    }
    if (err)
        *err = why;
    return -1;
}

/* Not a refusal: nobody knows how far it compresses, and a full disk is found without harm. */
static void look_at_space(struct lb_take *t)
{
    struct statvfs fs;
    uint64_t there;
    char a[32], b[32];

    if (statvfs(t->env->catalog_dir, &fs) < 0)
        return;
    there = (uint64_t)fs.f_bavail * fs.f_frsize;
    if (there < t->meta.desc.ram_bytes)
        lb_ckpt_meter_note(&t->meter, "%s are free in %.80s, the VM has %s of memory: it may not fit",
                           lb_human_bytes(a, sizeof(a), (double)there), t->env->catalog_dir,
                           lb_human_bytes(b, sizeof(b), (double)t->meta.desc.ram_bytes));
}

int lb_take_open(struct lb_take *t, struct lb_error *err)
{
    if (check_state(t, err) || attach(t, err))
        return -1;
    t->lock = lb_catalog_lock(t->env->catalog_dir, t->entry.name, LOCK_MS, err);
    if (t->lock < 0)
        return -1;
    undo_earlier(t); /* its disks are others then */
    if (look_at_vm(t, err))
        return -1;
    describe_disks(t);
    if (choose_path(t, err))
        return -1;
    open_parent(t);
    look_at_space(t);
    if (create(t, err))
        return -1;
    snprintf(t->meta.vm, sizeof(t->meta.vm), "%s", t->entry.name);
    snprintf(t->meta.label, sizeof(t->meta.label), "%s", t->opts->label);
    t->meta.number = t->record.number;
    t->meta.suspend = t->opts->suspend;
    return 0;
}
