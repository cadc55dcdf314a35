/*
 * checkpoint/restore_disk.c - disks of a restored VM: overlays on the images of the checkpoint.
 *
 *      VM web, running          web.qcow2 <- web.lb-1.qcow2 <- web.lb-2.qcow2     (web@1, web@2: frozen; the last one active)
 *      restored as test              \<- test.lb-1.qcow2
 *
 * An overlay is beside the image it stands on and belongs to the new VM for good; the catalog knows that it stands there
 * (so that pruning leaves the image), and vms/NAME/overlays lists those that no VM uses yet, one "CATALOG-VM PATH" a
 * line, so that a crash leaves none behind.  The paths are reserved first, with O_EXCL: what is listed is ours.
 */
#include "checkpoint/restore_internal.h"

#include "checkpoint/catalog_internal.h"
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>

#define LIST_MAX_BYTES (1u << 20)
#define CATALOG_WAIT_MS 30000u
#define MAX_OVERLAY 10000u

static char *list_path(const struct lb_ckpt_env *env, const char *name)
{
    LB_AUTO_FREE char *dir = lb_vm_dir(env->state_dir, name, false);

    return lb_asprintf("%s/overlays", dir);
}

/* --------------------------------------------------------------------- catalog */

/* VM's images are the catalog's business only when the catalog has a folder of it; then *lock holds it. */
static int lock_images(const struct lb_ckpt_env *env, const char *vm, int *lock, struct lb_error *err)
{
    LB_AUTO_FREE char *dir = lb_asprintf("%s/%s", env->catalog_dir, vm);

    *lock = -1;
    if (access(dir, F_OK) < 0)
        return 0;
    *lock = lb_catalog_lock(env->catalog_dir, vm, CATALOG_WAIT_MS, err);
    return *lock < 0 ? -1 : 0;
}

static int forget_user(const struct lb_ckpt_env *env, const char *vm, const char *image, const char *user,
                       struct lb_error *err)
{
    LB_AUTO_FD int lock = -1;

    if (lock_images(env, vm, &lock, err))
        return -1;
    return lock < 0 ? 0 : lb_catalog_use_image(env->catalog_dir, vm, image, user, false, err);
}

/* Lock held. Whoever had it before us may have removed the checkpoint or joined its images: to stand on what was its image
 * would be to stand on what another guest writes. */
static int check_still_there(const struct lb_restore *r, struct lb_error *err)
{
    struct lb_ckpt_entry now;
    bool same;

    if (lb_catalog_find(r->env->catalog_dir, r->ck.ref, r->opts->key, &now, err))
        return -1;
    same = now.n_disks == r->ck.n_disks && !memcmp(&now.info.id, &r->ck.info.id, sizeof(now.info.id));
    for (unsigned i = 0; same && i < now.n_disks; i++)
        same = !strcmp(now.disks[i].path, r->ck.disks[i].path);
    lb_ckpt_entry_free(&now);
    if (same)
        return 0;
    lb_fail(err, LB_E_STATE, "the disks of %s have been joined with others meanwhile", r->ck.ref);
    return lb_remedy(err, "try again");
}

/* ------------------------------------------------------------------------ list */

static int write_list(const struct lb_restore *r, struct lb_error *err)
{
    LB_AUTO_FREE char *path = list_path(r->env, r->entry.name);
    char *text = lb_strdup("");
    int rc;

    for (char **o = r->overlays; *o; o++) {
        char *more = lb_asprintf("%s%s %s\n", text, r->ck.vm, *o);
        free(text);
        text = more;
    }
    rc = lb_file_write_atomic(path, text, strlen(text), 0600, err);
    free(text);
    return rc;
}

static int drop_overlay(const struct lb_ckpt_env *env, const char *name, char *line, struct lb_error *err)
{
    char *image = strchr(line, ' ');

    if (!image || strchr(image + 1, '\n'))
        return lb_fail(err, LB_E_STATE, "the list of overlays of VM %s is damaged", name);
    *image++ = '\0';
    if (unlink(image) < 0 && errno != ENOENT)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot remove %s", image);
    return forget_user(env, line, image, name, err);
}

int lb_restore_drop_disks(const struct lb_ckpt_env *env, const char *name, struct lb_error *err)
{
    LB_AUTO_FREE char *path = list_path(env, name);
    LB_AUTO_FREE char *text = NULL;
    struct lb_error why = LB_ERROR_INIT;
    char *save = NULL;

    if (lb_file_read(path, LIST_MAX_BYTES, &text, NULL, &why)) {
        if (why.code == LB_E_NOT_FOUND)
            return 0;
        if (err)
            *err = why;
        return -1;
    }
    for (char *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save))
        if (drop_overlay(env, name, line, err))
            return -1;
    lb_restore_keep_disks(env, name);
    return 0;
}

void lb_restore_keep_disks(const struct lb_ckpt_env *env, const char *name)
{
    LB_AUTO_FREE char *path = list_path(env, name);

    if (unlink(path) < 0 && errno != ENOENT)
        lb_log(LB_LOG_WARN, "cannot remove %s: %s", path, strerror(errno));
}

/* -------------------------------------------------------------------- overlays */

/* An empty file NAME.lb-N.qcow2 beside the image, with its owner and its mode. */
static char *reserve(const struct lb_restore *r, const char *image, struct lb_error *err)
{
    LB_AUTO_FREE char *dir = lb_path_parent(image);
    const struct lb_vm_desc *d = &r->ck.info.meta.desc;
    struct stat st;

    if (stat(image, &st) < 0)
        return lb_fail_errno(err, LB_E_NOT_FOUND, errno, "disk %s", image), NULL;
    for (unsigned n = 1; n <= MAX_OVERLAY; n++) {
        LB_AUTO_FREE char *path = lb_asprintf("%s/%s.lb-%u.qcow2", dir, r->entry.name, n);
        LB_AUTO_FD int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);

        if (fd < 0 && errno == EEXIST)
            continue;
        if (fd < 0) {
            lb_fail_errno(err, LB_E_PREFLIGHT, errno, "cannot make an overlay of disk %s", image);
            lb_remedy(err, "the folder of the image must be writable: the disk of the restored VM is made there");
            return NULL;
        }
        if (geteuid() == 0 && fchown(fd, d->uid, d->gid) < 0) {
            lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot give %s to user %u", path, d->uid);
            unlink(path);
            return NULL;
        }
        fchmod(fd, (st.st_mode & 0777) | 0600);
        return LB_STEAL_PTR(path);
    }
    return lb_fail(err, LB_E_EXISTS, "there are too many overlays of VM %s in %s", r->entry.name, dir), NULL;
}

/* The base is not opened (-u), and so not locked: it may be in use below another VM's overlay. */
static int create(const struct lb_restore *r, const char *overlay, const struct lb_ckpt_disk *d, struct lb_error *err)
{
    LB_AUTO_FREE char *size = lb_asprintf("%llu", (unsigned long long)d->size_bytes);
    const char *const argv[] = {"qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", d->format,
                                "-b", d->path, overlay, size, NULL};

    if (lb_qemu_img(argv, NULL, r->env->cancel_fd, err))
        return -1;
    LB_AUTO_FD int fd = open(overlay, O_RDONLY | O_CLOEXEC);
    return fd < 0 || fsync(fd) < 0 ? lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot sync %s", overlay) : 0;
}

static int make_overlays(struct lb_restore *r, struct lb_error *err)
{
    const struct lb_ckpt_entry *ck = &r->ck;
    LB_AUTO_FD int lock = -1; /* until the images say themselves what they stand on */

    r->overlays = lb_alloc(sizeof(*r->overlays) * (ck->n_disks + 1));
    if (lock_images(r->env, ck->vm, &lock, err) || check_still_there(r, err))
        return -1;
    for (unsigned i = 0; i < ck->n_disks; i++) {
        r->overlays[i] = reserve(r, ck->disks[i].path, err);
        if (!r->overlays[i])
            return -1;
    }
    if (write_list(r, err))
        return -1;
    for (unsigned i = 0; i < ck->n_disks; i++) {
        if (lock >= 0 &&
            lb_catalog_use_image(r->env->catalog_dir, ck->vm, r->overlays[i], r->entry.name, true, err))
            return -1;
        if (create(r, r->overlays[i], &ck->disks[i], err))
            return -1;
        r->disks[r->n_disks++] = (struct lb_disk_map){.argv_path = (char *)ck->disks[i].argv_path,
                                                      .path = r->overlays[i], .format = (char *)"qcow2"};
    }
    return 0;
}

static void unreserve(struct lb_restore *r)
{
    for (char **o = r->overlays; *o; o++)
        unlink(*o);
    lb_restore_drop_disks(r->env, r->entry.name, NULL);
}

int lb_restore_disks(struct lb_restore *r, struct lb_error *err)
{
    const struct lb_ckpt_entry *ck = &r->ck;

    if (ck->info.meta.no_disk || !ck->n_disks)
        return 0;
    r->disks = lb_alloc(sizeof(*r->disks) * ck->n_disks);
    for (unsigned i = 0; r->own && i < ck->n_disks; i++)
        if (ck->disks[i].path[0]) /* else it is on no file of this host */
            r->disks[r->n_disks++] = (struct lb_disk_map){.argv_path = (char *)ck->disks[i].argv_path,
                                           .path = (char *)ck->disks[i].path, .format = (char *)ck->disks[i].format};
    if (r->own || !make_overlays(r, err))
        return 0;
    unreserve(r);
    return -1;
}
