/* checkpoint/import.c - an exported folder becomes a checkpoint of this host.
 *
 * What comes in is from elsewhere: sums of the files are compared while they are copied, the checkpoint must be a whole
 * one that stands alone, disks must be plain qcow2 images of the right size that refer to no other file (a backing
 * file named in one would be read with our rights).
 *
 * Everything is copied to temporary names, which the next holder of the lock removes when we die; then disks.json
 * learns the images, they get their names, and the checkpoint, last, gets its own.  Images without a checkpoint
 * are deleted by the next removal (catalog_images.c). */
#include "checkpoint/catalog_manifest.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>

enum { LOCK_WAIT_MS = 10000 };

struct import {
    const char *dir, *vm, *from;
    const struct lb_ckpt_key *key;
    struct lb_share share;
    int cancel_fd;
    struct lb_manifest manifest;
    struct lb_ckpt_info info;
    bool readable;                   /* info.meta is there */
    uint32_t number;
    char path[512];                  /* of the checkpoint */
    struct lb_ckpt_disk *disks;      /* with their final paths */
};

static char *tmp_of(const char *path)
{
    return lb_asprintf("%s.tmp-%d", path, (int)getpid());
}

static int copy(struct import *m, const struct lb_manifest_file *f, const char *path, struct lb_error *err)
{
    LB_AUTO_FREE char *from = lb_asprintf("%s/%s", m->from, f->name);
    LB_AUTO_FREE char *tmp = tmp_of(path);
    struct lb_manifest_file have = {0};

    m->share.before += m->share.weight;
    m->share.weight = f->bytes + 1;
    if (lb_copy_sum(from, tmp, &have, &m->share, m->cancel_fd, err))
        return -1;
    if (have.bytes != f->bytes || strcmp(have.sha256, f->sha256)) {
        lb_fail(err, LB_E_PROTO, "%s is damaged: it is not what the manifest says", from);
        return lb_remedy(err, "copy the folder again, or export again");
    }
    return 0;
}

/* --------------------------------------------------------------------- the checkpoint */

static int check_new(struct import *m, struct lb_error *err)
{
    struct lb_ckpt_entry *v;
    unsigned n;
    int rc = 0;

    if (lb_catalog_list(m->dir, m->vm, m->key, &v, &n, err))
        return -1;
    for (unsigned i = 0; i < n; i++) {
        if (rc == 0 && !memcmp(&v[i].info.id, &m->info.id, sizeof(m->info.id)))
            rc = lb_fail(err, LB_E_EXISTS, "it is here already: %s", v[i].ref);
        lb_ckpt_entry_free(&v[i]);
    }
    free(v);
    return rc;
}

/* The meta and the manifest speak of the same disks. */
static int check_disks_of_meta(const struct import *m, struct lb_error *err)
{
    const struct lb_ckpt_meta *meta = &m->info.meta;
    bool same = meta->n_disks == m->manifest.n_disks;

    for (unsigned i = 0; same && i < meta->n_disks; i++)
        same = !strcmp(meta->disks[i].id, m->manifest.disks[i].id) &&
               !strcmp(meta->disks[i].argv_path, m->manifest.disks[i].argv_path) &&
               meta->disks[i].size_bytes == m->manifest.disks[i].size_bytes;
    return same ? 0 : lb_fail(err, LB_E_PROTO, "%s: the disks of the manifest are not those of the checkpoint", m->from);
}

static int check_checkpoint(struct import *m, struct lb_error *err)
{
    static const struct lb_ckpt_id none;
    LB_AUTO_FREE char *tmp = tmp_of(m->path);
    struct lb_error why = LB_ERROR_INIT;

    m->readable = lb_ckpt_info(tmp, m->key, &m->info, &why) == 0;
    if (!m->readable && (why.code != LB_E_AUTH || m->key)) { /* without a key an encrypted one is taken as it is */
        if (err)
            *err = why;
        return -1;
    }
    if (memcmp(&m->info.parent, &none, sizeof(none)))
        return lb_fail(err, LB_E_PROTO, "%s/" LB_EXPORT_CHECKPOINT " does not stand alone", m->from);
    if (m->info.encrypted != m->manifest.encrypted)
        return lb_fail(err, LB_E_PROTO, "%s: the manifest is of another checkpoint", m->from);
    if (check_new(m, err))
        return -1;
    if (!m->readable)
        return 0;
    return check_disks_of_meta(m, err) || lb_ckpt_verify(tmp, m->key, false, NULL, NULL, err) ? -1 : 0;
}

/* -------------------------------------------------------------------------- disks */

static int check_image(const char *tmp, const struct lb_manifest_disk *d, struct lb_error *err)
{
    struct lb_qcow2_head h;

    if (lb_qcow2_head(tmp, &h, err))
        return -1;
    if (!h.qcow2 || h.backing[0] || h.opaque || h.data_file)
        return lb_fail(err, LB_E_PROTO, "%s is no qcow2 image that stands alone", d->file.name);
    if (h.size_bytes != d->size_bytes)
        return lb_fail(err, LB_E_PROTO, "%s is of %" PRIu64 " bytes, the manifest says %" PRIu64, d->file.name,
                       h.size_bytes, d->size_bytes);
    return 0;
}

static int import_disk(struct import *m, unsigned i, struct lb_error *err)
{
    const struct lb_manifest_disk *from = &m->manifest.disks[i];
    struct lb_ckpt_disk *d = &m->disks[i];
    LB_AUTO_FREE char *path = lb_asprintf("%s/%s/disk-%" PRIu32 "-%u.qcow2", m->dir, m->vm, m->number, i);
    LB_AUTO_FREE char *tmp = tmp_of(path);

    if (strlen(tmp) >= sizeof(d->path))
        return lb_fail(err, LB_E_USAGE, "the path of the checkpoints is too long: %.200s...", m->dir);
    memcpy(d->id, from->id, sizeof(d->id));
    memcpy(d->argv_path, from->argv_path, sizeof(d->argv_path));
    snprintf(d->format, sizeof(d->format), "qcow2");
    d->size_bytes = from->size_bytes;
    if (copy(m, &from->file, path, err) || check_image(tmp, from, err))
        return -1;
    /* A hypervisor that is not root has to read it. */
    const struct lb_vm_desc *desc = &m->info.meta.desc;
    if (m->readable && desc->uid != geteuid() && chown(tmp, desc->uid, desc->gid) < 0)
        lb_log(LB_LOG_WARN, "cannot give %s to user %u: %s", tmp, desc->uid, strerror(errno));
    snprintf(d->path, sizeof(d->path), "%s", tmp); /* the file that is there now */
    if (lb_disk_identify(d, err))
        return -1;
    snprintf(d->path, sizeof(d->path), "%s", path);
    return 0;
}

/* ---------------------------------------------------------------------------- all */

static int take_name(const char *path, struct lb_error *err)
{
    LB_AUTO_FREE char *tmp = tmp_of(path);

    return rename(tmp, path) < 0 ? lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot make %s", path) : 0;
}

static int publish(struct import *m, struct lb_error *err)
{
    LB_AUTO_FREE char *vm_dir = lb_catalog_vm_dir(m->dir, m->vm);

    if (lb_catalog_set_disks(m->dir, m->vm, m->number, m->disks, m->manifest.n_disks, err))
        return -1;
    for (unsigned i = 0; i < m->manifest.n_disks; i++)
        if (take_name(m->disks[i].path, err))
            return -1;
    if (lb_sync_dir(vm_dir, err))
        return -1;
    lb_point("import-disks");
    return take_name(m->path, err) || lb_sync_dir(vm_dir, err) ? -1 : 0;
}

static int import_all(struct import *m, struct lb_error *err)
{
    if (lb_catalog_next(m->dir, m->vm, &m->number, m->path, err))
        return -1;
    m->share.total = m->manifest.checkpoint.bytes + 1;
    for (unsigned i = 0; i < m->manifest.n_disks; i++)
        m->share.total += m->manifest.disks[i].file.bytes + 1;
    m->disks = lb_alloc((m->manifest.n_disks + 1) * sizeof(*m->disks));
    if (copy(m, &m->manifest.checkpoint, m->path, err) || check_checkpoint(m, err))
        return -1;
    for (unsigned i = 0; i < m->manifest.n_disks; i++)
        if (import_disk(m, i, err))
            return -1;
    return publish(m, err);
}

/* Whatever has a name of ours: temporary or not. */
static void undo(struct import *m)
{
    if (!m->number)
        return;
    for (unsigned i = 0; m->disks && i <= m->manifest.n_disks; i++) {
        LB_AUTO_FREE char *path = i < m->manifest.n_disks
            ? lb_asprintf("%s/%s/disk-%" PRIu32 "-%u.qcow2", m->dir, m->vm, m->number, i) : lb_strdup(m->path);
        LB_AUTO_FREE char *tmp = tmp_of(path);
        unlink(tmp);
        unlink(path);
    }
}

int lb_catalog_import(const char *dir, const char *from, const char *as, const struct lb_ckpt_key *key,
                      void (*progress)(uint64_t done, uint64_t total, void *arg), void *arg, int cancel_fd,
                      struct lb_ckpt_entry *out, struct lb_error *err)
{
    struct import m = {.dir = dir, .from = from, .key = key, .cancel_fd = cancel_fd,
                       .share = {.progress = progress, .arg = arg}};

    if (lb_manifest_load(from, &m.manifest, err))
        return -1;
    m.vm = as ? as : m.manifest.vm;
    LB_AUTO_FD int lock = lb_catalog_lock(dir, m.vm, LOCK_WAIT_MS, err);
    int rc = lock < 0 ? -1 : import_all(&m, err);
    if (rc) {
        undo(&m);
    } else {
        LB_AUTO_FREE char *ref = lb_asprintf("%s@%" PRIu32, m.vm, m.number);
        rc = lb_catalog_find(dir, ref, key, out, err);
    }
    lb_ckpt_info_free(&m.info);
    lb_manifest_free(&m.manifest);
    free(m.disks);
    return rc;
}
