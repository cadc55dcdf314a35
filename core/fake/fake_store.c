/*
 * core/fake/fake_store.c - what checkpoints need of the fake guest's disk: overlays.
 */
#include "core/fake/fake_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>

/* ------------------------------------------------------------------- disk
 *
 *      images: [oldest] ... [last frozen]   disk_path: what the guest writes now
 *
 * An image is a name and the number of writes it holds; an overlay made ready is an empty file too. */

static int check_disk(struct guest *g, const char *id, struct lb_error *err)
{
    if (g->config.disk_bytes && strcmp(id, "disk0") == 0)
        return 0;
    return lb_fail(err, LB_E_NOT_FOUND, "fake: %s has no disk %s", g->name, id);
}

int lb_fake_disk_overlay(struct lb_hv_vm *vm, const char *id, const char *path, struct lb_error *err)
{
    struct guest *g = vm->guest;
    if (lb_fake_enter(LB_FAKE_DISK_OVERLAY, g, err) < 0 || check_disk(g, id, err) < 0)
        return -1;
    if (g->config.no_overlay) {
        lb_fail(err, LB_E_UNSUPPORTED, "fake: disk %s cannot be frozen", id);
        return lb_remedy(err, "leave the disks out with --no-disk");
    }
    if (g->overlay)
        return lb_fail(err, LB_E_EXISTS, "fake: disk %s has an overlay made ready already", id);
    LB_AUTO_FD int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0)
        return lb_fail_errno(err, errno == EEXIST ? LB_E_EXISTS : LB_E_INTERNAL, errno,
                             "fake: cannot make the overlay %s", path);
    g->overlay = lb_strdup(path);
    return 0;
}

int lb_fake_disk_freeze(struct lb_hv_vm *vm, struct lb_error *err)
{
    struct guest *g = vm->guest;
    if (lb_fake_enter(LB_FAKE_DISK_FREEZE, g, err) < 0)
        return -1;
    pthread_mutex_lock(&g->lock);
    if (g->overlay) {
        g->images = lb_realloc(g->images, (g->n_images + 1) * sizeof(*g->images));
        g->images[g->n_images++] = (struct fake_image){g->disk_path, g->disk_writes};
        g->disk_path = LB_STEAL_PTR(g->overlay);
    }
    pthread_mutex_unlock(&g->lock);
    return 0;
}

void lb_fake_disk_overlay_drop(struct lb_hv_vm *vm)
{
    struct guest *g = vm->guest;
    if (g->overlay)
        unlink(g->overlay);
    free(LB_STEAL_PTR(g->overlay));
}

void lb_fake_images_free(struct guest *g)
{
    for (unsigned i = 0; i < g->n_images; i++)
        free(g->images[i].path);
    free(g->images);
    free(g->overlay);
}

/* Lock held: number of the image in the chain, n_images for the one that is written. */
static int find_image(const struct guest *g, const char *path, unsigned *out, struct lb_error *err)
{
    for (*out = 0; *out < g->n_images; ++*out)
        if (strcmp(g->images[*out].path, path) == 0)
            return 0;
    if (strcmp(g->disk_path, path) == 0)
        return 0;
    return lb_fail(err, LB_E_NOT_FOUND, "fake: the disk of %s does not stand on %s", g->name, path);
}

/* Lock held: images (base, top] are in base now. */
static void join_images(struct guest *g, unsigned top, unsigned base)
{
    bool active = top == g->n_images;
    if (active) {
        char *left = g->disk_path;
        g->disk_path = g->images[base].path;
        g->images[base].path = left;
    } else {
        g->images[base].writes = g->images[top].writes;
    }
    for (unsigned i = base + !active; i < g->n_images && i <= top; i++)
        free(g->images[i].path);
    unsigned above = active ? 0 : g->n_images - top - 1;
    memmove(&g->images[base + 1], &g->images[LB_MIN(top + 1, g->n_images)], above * sizeof(*g->images));
    g->n_images = base + !active + above;
}

int lb_fake_disk_join(struct lb_hv_vm *vm, const char *id, const char *top, const char *base,
                      int (*tick)(uint64_t done, uint64_t total, void *arg), void *arg,
                      struct lb_error *err)
{
    struct guest *g = vm->guest;
    unsigned t, b;
    if (lb_fake_enter(LB_FAKE_DISK_JOIN, g, err) < 0 || check_disk(g, id, err) < 0)
        return -1;
    for (uint64_t done = 0; tick && done <= g->config.disk_bytes; done += g->config.disk_bytes / 2)
        if (tick(done, g->config.disk_bytes, arg) < 0)
            return lb_fail(err, LB_E_CANCELLED, "fake: the joining of images was cancelled");
    pthread_mutex_lock(&g->lock);
    int rc = find_image(g, top, &t, err) < 0 || find_image(g, base, &b, err) < 0 ? -1 : 0;
    if (rc == 0 && b >= t)
        rc = lb_fail(err, LB_E_NOT_FOUND, "fake: %s does not stand on %s", top, base);
    if (rc == 0)
        join_images(g, t, b);
    pthread_mutex_unlock(&g->lock);
    return rc;
}

int lb_fake_image(lb_fake_id id, const char *path, uint64_t *writes, struct lb_error *err)
{
    unsigned i;
    struct guest *g = lb_fake_hold(id, err);
    if (!g)
        return -1;
    int rc = find_image(g, path, &i, err);
    if (rc == 0)
        *writes = i == g->n_images ? g->disk_writes : g->images[i].writes;
    lb_fake_let_go(g);
    return rc;
}
