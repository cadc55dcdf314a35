/* checkpoint/catalog_images.c - the disk images of checkpoints that are gone.
 *
 * Every live checkpoint freezes the image the guest wrote to and puts an overlay on it:
 *
 *      web.qcow2   <-  web.lb-1.qcow2  <-  web.lb-2.qcow2  <-  (the guest)
 *      web@1           web@2               nobody's, written to
 *
 * When web@1 goes, web.qcow2 is spare: what web.lb-1 holds can go into it, web@2 is then web.qcow2, and web.lb-1 goes.
 * That writes to web.qcow2, so nobody else may read it, and removes web.lb-1, so nobody else may stand on that.  Who
 * stands on an image is asked of the images themselves: the qcow2 files in its folder, those that restored VMs and
 * clones said they use, and every image in any disks.json.  Whatever is not understood counts as somebody.
 *
 * Order: `joining` noted, join (by the hypervisor of the running VM), checkpoints noted as moved, file of top unlinked,
 * note removed.  top over base reads the same before, during and after the join, so every step may be the last one;
 * `lb_images_settle` goes on from the note.  An image that nobody stands on is left alone: it may be what an operator starts
 * his VM from.  Only images that an import put into the catalog are deleted. */
#include "checkpoint/catalog_internal.h"

#include "core/host.h"
#include "core/registry.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <limits.h>
#include <string.h>
#include <sys/stat.h>

/* QEMU holds a lock on this byte of an image (block/file-posix.c: permission bytes from 100, bit 1: write) while it
 * may write to it. */
enum { QEMU_WRITE_BYTE = 101 };

/* ------------------------------------------------------------------ who stands on what */

bool lb_same_file(const char *a, const char *b)
{
    struct stat x, y;

    return stat(a, &x) == 0 && stat(b, &y) == 0 && x.st_ino == y.st_ino && x.st_dev == y.st_dev;
}

static bool stands_on(const char *image, const char *base)
{
    struct lb_qcow2_head h;

    return lb_qcow2_head(image, &h, NULL) == 0 && h.backing[0] && lb_same_file(h.backing, base);
}

/* Made by us, beside the image it stands on: STEM.lb-N.qcow2 (an overlay of a restored VM), STEM.lb-VM-N (of a
 * checkpoint). */
static bool our_name(const char *path)
{
    const char *slash = strrchr(path, '/'), *base = slash ? slash + 1 : path;
    const char *mark = NULL, *p = base;

    while ((p = strstr(p, ".lb-")))
        mark = p++;
    if (!mark || mark == base)
        return false;
    mark += strlen(".lb-");
    size_t len = strlen(mark), suffix = strlen(".qcow2");
    if (len > suffix && !strcmp(mark + len - suffix, ".qcow2"))
        len -= suffix;
    size_t digits = 0;
    while (digits < len && mark[len - digits - 1] >= '0' && mark[len - digits - 1] <= '9')
        digits++;
    return digits && (digits == len || mark[len - digits - 1] == '-');
}

/* -------------------------------------------------------------- who stands on whom */

struct candidates {
    char **v;
    unsigned n;
};

static void add(struct candidates *c, const char *path)
{
    c->v = lb_realloc(c->v, (c->n + 2) * sizeof(*c->v));
    c->v[c->n++] = lb_strdup(path);
    c->v[c->n] = NULL;
}

static void add_all(struct candidates *c, const struct lb_disks *d)
{
    for (unsigned i = 0; i < d->n_of; i++)
        for (unsigned k = 0; k < d->of[i].n; k++)
            add(c, d->of[i].v[k].path);
    for (unsigned i = 0; i < d->n_users; i++)
        add(c, d->users[i].image);
    for (unsigned i = 0; i < d->n_spare; i++)
        add(c, d->spare[i].path);
}

static void add_folder_of(struct candidates *c, const char *path)
{
    LB_AUTO_FREE char *real = realpath(path, NULL);
    LB_AUTO_FREE char *folder = lb_path_parent(real ? real : path);
    DIR *v = opendir(folder);
    struct dirent *e;

    while (v && (e = readdir(v))) {
        LB_AUTO_FREE char *file = lb_asprintf("%s/%s", folder, e->d_name);
        if (e->d_type == DT_REG || e->d_type == DT_LNK || e->d_type == DT_UNKNOWN)
            add(c, file);
    }
    if (v)
        closedir(v);
}

/* The disks.json of every other VM: what another VM's checkpoint holds is in use. -1: one cannot be read. */
static int load_others(const char *dir, const char *vm, struct candidates *c, const char *path, bool *held)
{
    DIR *v = opendir(dir);
    struct dirent *e;
    int rc = 0;

    while (v && rc == 0 && (e = readdir(v))) {
        struct lb_disks d;
        if (!lb_vm_name_valid(e->d_name) || e->d_type == DT_REG || !strcmp(e->d_name, vm))
            continue;
        rc = lb_disks_load(dir, e->d_name, &d, NULL);
        *held |= rc == 0 && lb_disks_held(&d, path);
        add_all(c, &d);
        lb_disks_free(&d);
    }
    if (v)
        closedir(v);
    return rc;
}

static bool seen_before(const struct candidates *c, unsigned i)
{
    for (unsigned k = 0; k < i; k++)
        if (lb_same_file(c->v[k], c->v[i]))
            return true;
    return false;
}

/* How many images stand on base, and one of them; more than there are when that is not certain. */
static unsigned standing_on(const char *dir, const char *vm, const struct lb_disks *d, const char *base, char one[512])
{
    struct candidates hits = {0}, c = {0};
    bool held = false;
    unsigned n = 0;

    one[0] = '\0';
    if (load_others(dir, vm, &c, base, &held) || held)
        n = 2;
    add_all(&c, d);
    add_folder_of(&c, base);
    for (unsigned i = 0; i < c.n; i++) {
        struct lb_qcow2_head h;
        if (lb_same_file(c.v[i], base) || lb_qcow2_head(c.v[i], &h, NULL))
            continue;
        if (h.opaque && strstr(h.backing, strrchr(base, '/') ? strrchr(base, '/') + 1 : base))
            n = 2; /* it names our file in a way that is not understood */
        if (h.backing[0] && lb_same_file(h.backing, base))
            add(&hits, c.v[i]);
    }
    for (unsigned i = 0; i < hits.n; i++)
        if (!seen_before(&hits, i)) {
            snprintf(one, 512, "%s", hits.v[i]);
            n += strlen(hits.v[i]) < 512 ? 1 : 2;
        }
    lb_strv_free(c.v);
    lb_strv_free(hits.v);
    return n;
}

char **lb_images_above(const char *base, const char *const *more, unsigned n)
{
    struct candidates c = {0}, hits = {0};

    for (unsigned i = 0; i < n; i++)
        add(&c, more[i]);
    add_folder_of(&c, base);
    hits.v = lb_alloc(sizeof(*hits.v));
    for (unsigned i = 0; i < c.n; i++)
        if (!lb_same_file(c.v[i], base) && !seen_before(&c, i) && stands_on(c.v[i], base))
            add(&hits, c.v[i]);
    lb_strv_free(c.v);
    return hits.v;
}

/* ---------------------------------------------------------------------------- join */

struct reduce {
    const char *dir, *vm;
    struct lb_disks *d;
    const struct lb_image_join *join;
    struct lb_prune_result *res;
    int64_t *freed;
};

static int save(struct reduce *r, struct lb_error *err)
{
    return lb_disks_save(r->dir, r->vm, r->d, err);
}

static int64_t blocks_of(const char *path)
{
    struct stat st;

    return stat(path, &st) == 0 ? (int64_t)st.st_blocks * 512 : 0;
}

/* Whoever had `from` has what `to` is now. */
static void move_image(struct lb_ckpt_disk *disk, const char *from, const struct lb_ckpt_disk *to)
{
    if (strcmp(disk->path, from))
        return;
    memcpy(disk->path, to->path, sizeof(disk->path));
    memcpy(disk->format, to->format, sizeof(disk->format));
    lb_disk_identify(disk, NULL); /* not there any more: shows where it is used */
}

/* What was `from` is what `to` is. */
static void move_all(struct lb_disks *d, const char *from, const struct lb_ckpt_disk *to)
{
    for (unsigned i = 0; i < d->n_of; i++)
        for (unsigned k = 0; k < d->of[i].n; k++)
            move_image(&d->of[i].v[k], from, to);
    for (unsigned i = d->n_spare; i-- > 0;)
        if (!strcmp(d->spare[i].path, from))
            lb_disks_drop_spare(d, i); /* base is spare already */
    for (unsigned i = 0; i < d->n_users; i++)
        if (!strcmp(d->users[i].image, from))
            memcpy(d->users[i].image, to->path, sizeof(to->path));
}

/* The join is over: top -> base everywhere, then top's file goes. */
static int joined(struct reduce *r, struct lb_error *err)
{
    struct lb_disks_joining *j = &r->d->joining;

    if (!j->done) {
        struct lb_ckpt_disk to = {0};
        snprintf(to.path, sizeof(to.path), "%s", j->base);
        snprintf(to.format, sizeof(to.format), "%s", j->base_format);
        move_all(r->d, j->top, &to);
        j->done = true;
        if (save(r, err))
            return -1;
        lb_point("rm-joined");
    }
    *r->freed += blocks_of(j->top);
    if (unlink(j->top) < 0 && errno != ENOENT)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot remove %s", j->top);
    r->res->images_joined++;
    lb_log(LB_LOG_INFO, "%s has been joined with %s", j->top, j->base);
    *j = (struct lb_disks_joining){0};
    lb_disks_tidy(r->dir, r->vm, r->d); /* a checkpoint may hold base again: it is not spare then */
    return save(r, err);
}

static bool qemu_writes(const char *path)
{
    struct flock fl = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = QEMU_WRITE_BYTE, .l_len = 1};
    LB_AUTO_FD int fd = open(path, O_RDONLY | O_CLOEXEC);

    return fd >= 0 && fcntl(fd, F_OFD_GETLK, &fl) == 0 && fl.l_type != F_UNLCK;
}

/* Did the join that is noted come to its end? Its owner may have died at any point of it. */
static bool came_to_its_end(const struct lb_disks_joining *j)
{
    if (j->done)
        return true;
    if (j->above[0])
        return stands_on(j->above, j->base);
    /* The guest wrote to top: now it writes to base, and nobody has top open. */
    return qemu_writes(j->base) && lb_host_locked(j->top) == 0;
}

/* DIR/VM/disk-N-K.qcow2: an image that an import put there, as it was frozen elsewhere. */
static bool imported(const struct reduce *r, const char *path)
{
    LB_AUTO_FREE char *vm_dir = lb_catalog_vm_dir(r->dir, r->vm);
    LB_AUTO_FREE char *parent = lb_path_parent(path);
    unsigned number, k;
    int end = 0;

    return sscanf(path + strlen(parent), "/disk-%u-%u.qcow2%n", &number, &k, &end) == 2 && end &&
           !path[strlen(parent) + (size_t)end] && lb_same_file(vm_dir, parent);
}

/* Is path an image of a checkpoint of this catalog, or was it? */
static bool in_books(const struct lb_disks *d, const char *path)
{
    for (unsigned i = 0; i < d->n_of; i++)
        for (unsigned k = 0; k < d->of[i].n; k++)
            if (lb_same_file(d->of[i].v[k].path, path))
                return true;
    for (unsigned i = 0; i < d->n_spare; i++)
        if (lb_same_file(d->spare[i].path, path))
            return true;
    return false;
}

/* Can base be joined with what stands on it? Then *j says how. */
static bool can_join(struct reduce *r, const struct lb_ckpt_disk *base, struct lb_disks_joining *j)
{
    *j = (struct lb_disks_joining){0};
    if (!r->join || !r->join->join || imported(r, base->path))
        return false;
    if (standing_on(r->dir, r->vm, r->d, base->path, j->top) != 1 || !our_name(j->top))
        return false;
    for (unsigned i = 0; i < r->d->n_users; i++)
        if (lb_same_file(r->d->users[i].image, j->top) && strcmp(r->d->users[i].user, r->vm))
            return false;
    if (standing_on(r->dir, r->vm, r->d, j->top, j->above) > 1)
        return false;
    /* Frozen, but not here: the VM was on another host meanwhile, and a checkpoint there has it. */
    if (j->above[0] && !in_books(r->d, j->top))
        return false;
    /* Nothing stands on top, yet a guest writes to base: it was started from that image again, and what it had written
     * before is in top alone.  It would also look as a join does that came to its end. */
    if (!j->above[0] && qemu_writes(base->path))
        return false;
    memcpy(j->id, base->id, sizeof(j->id));
    memcpy(j->base, base->path, sizeof(j->base));
    memcpy(j->base_format, base->format, sizeof(j->base_format));
    return true;
}

/* Joins what stands on spare image i. *again: base is still spare and may have another one on it now. */
static int join_one(struct reduce *r, unsigned i, bool *again, struct lb_error *err)
{
    struct lb_disks_joining *j = &r->d->joining;
    struct lb_error why = LB_ERROR_INIT;
    struct lb_ckpt_disk base = r->d->spare[i];
    int64_t before = blocks_of(base.path);

    *again = false;
    if (!can_join(r, &base, j)) {
        *j = (struct lb_disks_joining){0};
        return 0;
    }
    if (save(r, err))
        return -1;
    lb_point("rm-joining");
    int rc = r->join->join(r->vm, j->id, j->top, j->base, r->join->arg, &why);
    if (rc && !came_to_its_end(j)) {
        lb_log_error(LB_LOG_INFO, &why);
        *j = (struct lb_disks_joining){0};
        if (save(r, err))
            return -1;
        if (why.code != LB_E_CANCELLED)
            return 0;
        if (err)
            *err = why;
        return -1;
    }
    *again = true;
    rc = joined(r, err);
    *r->freed += before - blocks_of(base.path);
    return rc;
}

int lb_images_settle(const char *dir, const char *vm, struct lb_disks *d, bool give_up, struct lb_prune_result *res,
                     int64_t *freed, struct lb_error *err)
{
    struct reduce r = {.dir = dir, .vm = vm, .d = d, .res = res, .freed = freed};

    if (!d->joining.top[0])
        return 0;
    if (came_to_its_end(&d->joining))
        return joined(&r, err);
    if (!give_up)
        return 0;
    d->joining = (struct lb_disks_joining){0};
    return save(&r, err);
}

/* An imported checkpoint's image is in the catalog, nobody but us put it there. */
static bool delete_imported(struct reduce *r, unsigned i)
{
    const char *path = r->d->spare[i].path;
    char one[512];

    if (!imported(r, path) || standing_on(r->dir, r->vm, r->d, path, one))
        return false;
    int64_t bytes = blocks_of(path);
    if (unlink(path) < 0 && errno != ENOENT)
        return false;
    *r->freed += bytes;
    lb_disks_drop_spare(r->d, i);
    return true;
}

int lb_images_reduce(const char *dir, const char *vm, struct lb_disks *d, const struct lb_image_join *join,
                     struct lb_prune_result *res, int64_t *freed, struct lb_error *err)
{
    struct reduce r = {.dir = dir, .vm = vm, .d = d, .join = join, .res = res, .freed = freed};
    bool again = true;

    if (lb_images_settle(dir, vm, d, true, res, freed, err)) /* not ended: it begins again below */
        return -1;
    while (again) { /* a join changes the list: begin again */
        again = false;
        for (unsigned i = d->n_spare; !again && i-- > 0;)
            if (!delete_imported(&r, i) && join_one(&r, i, &again, err))
                return -1;
    }
    res->images_kept = d->n_spare;
    return save(&r, err);
}
