/* checkpoint/export.c - a checkpoint as a folder that stands alone: its chain in one file, its disks in one each.
 *
 * Everything is made in FOLDER.tmp-PID and fsynced; rename makes it FOLDER.  An encrypted checkpoint stays encrypted
 * with the same key; its disks were never encrypted by us and are not in the folder either. */
#include "checkpoint/catalog_manifest.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>

/* Of what a file costs, the part that is reading it again for its checksum, in percent. */
enum { SUM_PERCENT = 20 };

struct export {
    const char *folder;              /* the temporary one */
    const struct lb_ckpt_entry *e;
    const struct lb_ckpt_key *key;
    bool no_disk;
    struct lb_share share;
    int cancel_fd;
    struct lb_manifest manifest;
};

static uint64_t memory_weight(const struct lb_ckpt_entry *e)
{
    return e->info.stats.pages * LB_PAGE_SIZE + 1;
}

static void begin_part(struct export *x, uint64_t weight)
{
    x->share.before += x->share.weight;
    x->share.weight = weight;
}

static int sum(struct export *x, struct lb_manifest_file *f, const char *path, struct lb_error *err)
{
    LB_AUTO_FD int fd = open(path, O_RDONLY | O_CLOEXEC);

    if (fd < 0 || fsync(fd) < 0) /* qemu-img's cache mode may not have done it */
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot sync %s", path);
    return lb_copy_sum(path, NULL, f, &x->share, x->cancel_fd, err);
}

static int memory(struct export *x, const char *dir, struct lb_error *err)
{
    LB_AUTO_FREE char *path = lb_asprintf("%s/" LB_EXPORT_CHECKPOINT, x->folder);
    struct lb_manifest_file *f = &x->manifest.checkpoint;
    uint64_t weight = memory_weight(x->e), sums = weight * SUM_PERCENT / 100;
    struct lb_chain *c;

    if (lb_catalog_open(dir, x->e, x->key, &c, err))
        return -1;
    /* The file is a checkpoint of its own from now on: no VM ended with it, and its disks are those beside it. */
    struct lb_ckpt_meta meta = x->e->info.meta;
    meta.suspend = false;
    meta.no_disk |= x->no_disk;
    meta.disks = x->e->disks;
    meta.n_disks = x->no_disk ? 0 : x->e->n_disks;
    begin_part(x, weight - sums);
    int rc = lb_chain_merge(c, lb_chain_depth(c), NULL, &meta, path, x->key, lb_share_progress, &x->share,
                            x->cancel_fd, err);
    lb_chain_close(c);
    if (rc)
        return -1;
    begin_part(x, sums);
    snprintf(f->name, sizeof(f->name), LB_EXPORT_CHECKPOINT);
    return sum(x, f, path, err);
}

/* The image must be what the checkpoint saw.  That of a live one is frozen, and moves only with us; that of a
 * suspended VM lies there for anybody to write to. */
static int check_image(const struct lb_ckpt_entry *e, const struct lb_ckpt_disk *d, struct lb_error *err)
{
    struct lb_ckpt_disk now = *d;

    if (lb_disk_identify(&now, err)) {
        lb_context(err, "disk %s of %s", d->id, e->ref);
        return lb_remedy(err, "bring the image back, or export without disks (--no-disk)");
    }
    if (!e->info.meta.suspend || (now.file_bytes == d->file_bytes && now.mtime_ns == d->mtime_ns))
        return 0;
    lb_fail(err, LB_E_STATE, "%s has changed since %s was suspended", d->path, e->vm);
    return lb_remedy(err, "export without disks (--no-disk)");
}

static int disk(struct export *x, unsigned i, struct lb_error *err)
{
    const struct lb_ckpt_disk *d = &x->e->disks[i];
    struct lb_manifest_disk *m = &x->manifest.disks[i];
    uint64_t weight = d->size_bytes, sums = weight * SUM_PERCENT / 100;

    snprintf(m->file.name, sizeof(m->file.name), LB_EXPORT_DISK, i);
    memcpy(m->id, d->id, sizeof(m->id));
    memcpy(m->argv_path, d->argv_path, sizeof(m->argv_path));
    m->size_bytes = d->size_bytes;
    LB_AUTO_FREE char *path = lb_asprintf("%s/%s", x->folder, m->file.name);
    /* -U: QEMU has the frozen image open and locked, below the overlay. "file:" keeps a ':' in the name from being
     * a protocol's. */
    LB_AUTO_FREE char *from = lb_asprintf("file:%s", d->path), *to = lb_asprintf("file:%s", path);
    const char *const argv[] = {"qemu-img", "convert", "-p", "-U", "-f", d->format, "-O", "qcow2", from, to, NULL};
    begin_part(x, weight - sums);
    if (lb_qemu_img(argv, &x->share, x->cancel_fd, err))
        return lb_context(err, "disk %s of %s", d->id, x->e->ref);
    begin_part(x, sums);
    return sum(x, &m->file, path, err);
}

/* Whoever removes the checkpoint may join its images afterwards, and the guest then writes to them. */
static int check_end(const struct lb_ckpt_entry *e, unsigned n_disks, struct lb_error *err)
{
    if (n_disks && access(e->path, F_OK) < 0)
        return lb_fail_errno(err, LB_E_NOT_FOUND, errno, "%s went away while it was exported", e->ref);
    for (unsigned i = 0; e->info.meta.suspend && i < n_disks; i++)
        if (check_image(e, &e->disks[i], err))
            return -1;
    return 0;
}

static int fill(struct export *x, const char *dir, struct lb_error *err)
{
    const struct lb_ckpt_entry *e = x->e;
    unsigned n_disks = x->no_disk ? 0 : e->n_disks;

    x->share.total = memory_weight(e);
    for (unsigned i = 0; i < n_disks; i++) {
        if (check_image(e, &e->disks[i], err))
            return -1;
        x->share.total += e->disks[i].size_bytes;
    }
    snprintf(x->manifest.vm, sizeof(x->manifest.vm), "%s", e->vm);
    x->manifest.number = e->number;
    x->manifest.encrypted = e->info.encrypted;
    x->manifest.disks = lb_alloc((n_disks + 1) * sizeof(*x->manifest.disks));
    x->manifest.n_disks = n_disks;
    if (memory(x, dir, err))
        return -1;
    for (unsigned i = 0; i < n_disks; i++)
        if (disk(x, i, err))
            return -1;
    if (check_end(e, n_disks, err))
        return -1;
    return lb_manifest_save(x->folder, &x->manifest, err) || lb_sync_dir(x->folder, err) ? -1 : 0;
}

static int take_name(const char *folder, const char *to, struct lb_error *err)
{
    LB_AUTO_FREE char *parent = lb_path_parent(to);

    if (rename(folder, to) < 0) { /* over an empty directory it works */
        if (errno != EEXIST && errno != ENOTEMPTY && errno != ENOTDIR)
            return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot make %s", to);
        lb_fail(err, LB_E_EXISTS, "%s is there already", to);
        return lb_remedy(err, "name a folder that does not exist or is empty");
    }
    return lb_sync_dir(parent, err);
}

/* "/a/b/" is "/a/b". */
static char *without_slashes(const char *to)
{
    size_t len = strlen(to);

    while (len > 1 && to[len - 1] == '/')
        len--;
    return lb_asprintf("%.*s", (int)len, to);
}

int lb_catalog_export(const char *dir, const struct lb_ckpt_entry *e, const struct lb_ckpt_key *key,
                      const char *to, bool no_disk, void (*progress)(uint64_t done, uint64_t total, void *arg),
                      void *arg, int cancel_fd, struct lb_error *err)
{
    LB_AUTO_FREE char *end = without_slashes(to);
    LB_AUTO_FREE char *folder = lb_asprintf("%s.tmp-%d", end, (int)getpid());
    struct export x = {.folder = folder, .e = e, .key = key, .no_disk = no_disk, .cancel_fd = cancel_fd,
                       .share = {.progress = progress, .arg = arg}};

    if (!e->readable) {
        if (err)
            *err = e->error;
        return -1;
    }
    /* An empty directory takes rename; what is in the way is said before the work, not after. */
    if (rmdir(end) < 0 && errno != ENOENT) {
        lb_fail(err, LB_E_EXISTS, "%s is there already", end);
        return lb_remedy(err, "name a folder that does not exist or is empty");
    }
    if (lb_mkdir_p(folder, 0700, err))
        return -1;
    int rc = fill(&x, dir, err) || take_name(folder, end, err) ? -1 : 0;
    if (rc)
        lb_remove_tree(folder, NULL);
    lb_manifest_free(&x.manifest);
    return rc;
}
