/* checkpoint/restore_check.c - what could go wrong with a restore, said before anything is touched. */
#include "checkpoint/restore_internal.h"

#include "core/host.h"

#include <errno.h>
#include <string.h>
#include <sys/stat.h>

/* ------------------------------------------------------------------------ name */

static int name_taken(const struct lb_vm_entry *e, struct lb_error *err)
{
    lb_fail(err, LB_E_EXISTS, "a VM named %s is already here (%s)", e->name, lb_vm_state_name(e->state));
    if (e->state == LB_VM_SUSPENDED)
        return lb_remedy(err, "`lifeboat resume %s` brings it back; or give the restored one another name: --as NAME",
                         e->name);
    if (e->state == LB_VM_RESTORING)
        return lb_remedy(err, "a restore did not come to its end: `lifeboat recover %s` first", e->name);
    return lb_remedy(err, "give the restored one another name (--as NAME), or `lifeboat stop %s` first", e->name);
}

static int check_name(struct lb_restore *r, struct lb_error *err)
{
    const char *as = r->opts->as, *name = as[0] ? as : r->ck.vm;
    struct lb_error why = LB_ERROR_INIT;
    struct lb_vm_ident id;

    if (!lb_vm_name_valid(name)) {
        lb_fail(err, LB_E_USAGE, "\"%.64s\" is not a valid VM name", name);
        return lb_remedy(err, "use at most 63 letters, digits, '.', '_' and '-', beginning with a letter or a digit");
    }
    r->own = r->ck.info.meta.suspend && !strcmp(name, r->ck.vm);
    if (lb_vm_entry_load(r->env->state_dir, name, &r->before, &why)) {
        if (why.code == LB_E_NOT_FOUND)
            return 0;
        if (err)
            *err = why;
        return -1;
    }
    id = lb_ckpt_ident(&r->before);
    if (!(r->own && r->before.state == LB_VM_SUSPENDED) &&
        !(r->before.state == LB_VM_DEAD && !lb_hv_exists(r->env->hv, &id)))
        return name_taken(&r->before, err);
    r->had_entry = true;
    return 0;
}

static void make_entry(struct lb_restore *r)
{
    struct lb_vm_entry *e = &r->entry;

    if (r->own && r->had_entry) {
        *e = r->before;
    } else {
        snprintf(e->name, sizeof(e->name), "%s", r->opts->as[0] ? r->opts->as : r->ck.vm);
        snprintf(e->origin, sizeof(e->origin), "%s", r->opts->shared_memory_fd ? "clone" : "restored");
        e->created_ms = lb_wall_ms();
    }
    snprintf(e->hypervisor, sizeof(e->hypervisor), "%s", r->env->hv->name);
    e->state = LB_VM_RESTORING;
    e->proc = (struct lb_proc_id){0};
    e->qmp_path[0] = e->token[0] = e->peer[0] = e->note[0] = '\0';
    snprintf(e->checkpoint, sizeof(e->checkpoint), "%s", r->ck.ref);
}

/* ----------------------------------------------------------------------- disks */

/* Did the file change since? One that has been replaced or joined with another has another inode: not ours to say. */
static bool changed(const struct lb_ckpt_disk *d, const struct stat *st)
{
    uint64_t mtime_ns = (uint64_t)st->st_mtim.tv_sec * 1000000000 + (uint64_t)st->st_mtim.tv_nsec;

    return mtime_ns != d->mtime_ns || (S_ISREG(st->st_mode) && (uint64_t)st->st_size != d->file_bytes);
}

static int disk_changed(const struct lb_restore *r, const struct lb_ckpt_disk *d, struct lb_error *err)
{
    lb_fail(err, LB_E_STATE, "disk %s has changed since %s %s", d->path, r->ck.ref,
            r->own ? "was suspended" : "was taken");
    return lb_remedy(err, "its memory does not fit that disk any more: bring the disk back as it was; --force uses it "
                          "all the same, and can destroy what is on it");
}

static int check_disk(const struct lb_restore *r, const struct lb_ckpt_disk *d, struct lb_error *err)
{
    struct stat st;

    if (!d->inode) /* no file of this host */
        return 0;
    if (stat(d->path, &st) < 0) {
        lb_fail_errno(err, errno == ENOENT ? LB_E_NOT_FOUND : LB_E_PREFLIGHT, errno, "disk %s of %s", d->path,
                      r->ck.ref);
        return lb_remedy(err, "bring the image back to where it was");
    }
    if (r->own && lb_host_locked(d->path) > 0) {
        lb_fail(err, LB_E_STATE, "disk %s is in use by another process", d->path);
        return lb_remedy(err, "end what uses it: `fuser -v %s`", d->path);
    }
    if (r->opts->force)
        return 0;
    if (r->own ? (uint64_t)st.st_ino != d->inode || changed(d, &st)
               : (uint64_t)st.st_ino == d->inode && changed(d, &st))
        return disk_changed(r, d, err);
    return 0;
}

/* Taken without its disks: it runs on what they hold now. */
static int check_present_disks(const struct lb_restore *r, struct lb_error *err)
{
    const struct lb_vm_desc *d = &r->ck.info.meta.desc;

    for (unsigned i = 0; i < d->n_disks; i++) {
        const struct lb_disk_desc *k = &d->disks[i];

        if (k->read_only || k->shareable || !k->path || lb_host_locked(k->path) <= 0)
            continue;
        lb_fail(err, LB_E_STATE, "%s was taken without its disks, and %s is in use by another process", r->ck.ref,
                k->path);
        return lb_remedy(err, "stop the VM that uses it, or take a checkpoint with its disks");
    }
    return 0;
}

static int check_disks(const struct lb_restore *r, struct lb_error *err)
{
    if (r->ck.info.meta.no_disk)
        return check_present_disks(r, err);
    if (r->ck.info.meta.suspend && !r->own && r->ck.n_disks) {
        lb_fail(err, LB_E_STATE, "%s is a suspended VM: its disks are its own, and a copy would change them",
                r->ck.ref);
        return lb_remedy(err, "`lifeboat resume %s`, then take a checkpoint and restore that", r->ck.vm);
    }
    for (unsigned i = 0; i < r->ck.n_disks; i++)
        if (check_disk(r, &r->ck.disks[i], err))
            return -1;
    return 0;
}

/* ------------------------------------------------------------------ the host */

static int check_memory(const struct lb_restore *r, struct lb_error *err)
{
    int64_t available = lb_host_meminfo("MemAvailable");
    uint64_t need = r->ck.info.meta.desc.ram_bytes;
    char a[32], b[32];

    /* A clone shares what was read for all of them. */
    if (r->opts->shared_memory_fd || available < 0 || need <= (uint64_t)available)
        return 0;
    lb_fail(err, LB_E_PREFLIGHT, "the VM needs %s, this host has %s available", lb_human_bytes(a, sizeof(a), (double)need),
            lb_human_bytes(b, sizeof(b), (double)available));
    return lb_remedy(err, "stop, suspend or move other VMs away");
}

static int check_emulator(const struct lb_restore *r, struct lb_error *err)
{
    const char *path = r->env->launch && r->env->launch->emulator ? r->env->launch->emulator
                                                                  : r->ck.info.meta.desc.emulator;

    if (!path || !strchr(path, '/') || access(path, X_OK) == 0)
        return 0;
    lb_fail_errno(err, LB_E_PREFLIGHT, errno, "the hypervisor %s", path);
    return lb_remedy(err, "install it on this host or set the emulator of this host's configuration");
}

static const char *mapped_tap(const struct lb_restore *r, const char *name)
{
    for (unsigned i = 0; i < r->n_taps; i++)
        if (!strcmp(r->taps[i].from, name))
            return r->taps[i].to;
    return name;
}

static int check_tap(const struct lb_restore *r, const struct lb_arg_item *it, struct lb_error *err)
{
    const char *name = mapped_tap(r, it->value);
    int e = name[0] ? lb_host_tap_free(name) : 0; /* "": connected to nothing */

    /* QEMU makes the one that its script connects. */
    if (!e || (e == ENODEV && it->scripted && r->ck.info.meta.desc.uid == 0))
        return 0;
    if (e == EBUSY)
        lb_fail(err, LB_E_PREFLIGHT, "the tap %s is in use by another process here", name);
    else
        lb_fail(err, LB_E_PREFLIGHT, "%s cannot be used as a tap here: %s", name,
                e == ENODEV ? "no such interface" : strerror(e));
    return lb_remedy(err, "make one (`ip tuntap add NEW mode tap`, `ip link set NEW master BRIDGE up`) and give it: "
                          "--tap %s=NEW", it->value);
}

static void merge_taps(struct lb_restore *r)
{
    const struct lb_launch_opts *host = r->env->launch;
    unsigned n_host = host ? host->n_taps : 0;

    r->n_taps = r->opts->n_taps + n_host;
    r->taps = lb_alloc(sizeof(*r->taps) * (r->n_taps + 1));
    if (r->opts->n_taps) /* first: the first that fits counts */
        memcpy(r->taps, r->opts->taps, sizeof(*r->taps) * r->opts->n_taps);
    if (n_host)
        memcpy(r->taps + r->opts->n_taps, host->taps, sizeof(*r->taps) * n_host);
}

static int check_taps(struct lb_restore *r, struct lb_error *err)
{
    merge_taps(r);
    if (r->ck.info.meta.desc.argv)
        lb_argv_scan(r->ck.info.meta.desc.argv, &r->items, &r->n_items);
    for (unsigned i = 0; i < r->n_items; i++)
        if (r->items[i].kind == LB_ARG_TAP && check_tap(r, &r->items[i], err))
            return -1;
    return 0;
}

int lb_restore_check(struct lb_restore *r, struct lb_error *err)
{
    const struct lb_vm_desc *d = &r->ck.info.meta.desc;

    if (d->hypervisor && strcmp(d->hypervisor, r->env->hv->name))
        return lb_fail(err, LB_E_UNSUPPORTED, "%s is of a VM of %s", r->ck.ref, d->hypervisor);
    if (check_name(r, err) || check_disks(r, err) || check_memory(r, err) || check_emulator(r, err) ||
        check_taps(r, err))
        return -1;
    make_entry(r);
    return 0;
}
