/* checkpoint/catalog_held.c - images that nobody may write to any more, and where their guest went on.
 *
 *      disk.img  <-  disk.img.lb-web-1  <-  disk.img.lb-web-2
 *      web@1         web@2                  newest
 *
 * After a live checkpoint the guest writes to an overlay, but the command line it was started with still names the image
 * below.  disks.json says which images checkpoints hold; what stands on them say the images themselves, as for the joining
 * of images (catalog_images.c). */
#include "checkpoint/catalog_internal.h"

#include "core/registry.h"

#include <dirent.h>
#include <string.h>

#define MAX_DEPTH 512u /* of a chain of images */

struct books {
    struct {
        char vm[128];
        struct lb_disks d;
    } *v;
    unsigned n;
    const char **known;              /* every image in them; the books' strings */
    unsigned n_known;
};

static void know(struct books *b, const char *image)
{
    b->known = lb_realloc(b->known, (b->n_known + 1) * sizeof(*b->known));
    b->known[b->n_known++] = image;
}

static void know_all(struct books *b, const struct lb_disks *d)
{
    for (unsigned i = 0; i < d->n_of; i++)
        for (unsigned k = 0; k < d->of[i].n; k++)
            know(b, d->of[i].v[k].path);
    for (unsigned i = 0; i < d->n_spare; i++)
        know(b, d->spare[i].path);
    for (unsigned i = 0; i < d->n_users; i++)
        know(b, d->users[i].image);
}

static void books_add(struct books *b, const char *dir, const char *vm)
{
    struct lb_error why = LB_ERROR_INIT;
    struct lb_disks d;

    if (lb_disks_load(dir, vm, &d, &why)) {
        lb_log_error(LB_LOG_WARN, &why);
        return;
    }
    lb_disks_tidy(dir, vm, &d); /* as it is; the file stays to who has the lock */
    b->v = lb_realloc(b->v, (b->n + 1) * sizeof(*b->v));
    snprintf(b->v[b->n].vm, sizeof(b->v->vm), "%s", vm);
    b->v[b->n++].d = d;
    know_all(b, &d);
}

static void books_open(struct books *b, const char *dir)
{
    DIR *v = opendir(dir);
    struct dirent *e;

    *b = (struct books){0};
    while (v && (e = readdir(v)))
        if (lb_vm_name_valid(e->d_name) && e->d_type != DT_REG)
            books_add(b, dir, e->d_name);
    if (v)
        closedir(v);
}

static void books_close(struct books *b)
{
    for (unsigned i = 0; i < b->n; i++)
        lb_disks_free(&b->v[i].d);
    free(b->v);
    free(b->known);
}

/* A spare image on which nothing stands is one of a checkpoint that came to nothing: its guest still writes to it. */
static bool holds_others(const char *image)
{
    char **above = lb_images_above(image, NULL, 0);
    bool any = *above != NULL;

    lb_strv_free(above);
    return any;
}

/* By the newest checkpoint of those that hold it; a suspended VM's before all. */
static bool held_by(const char *vm, const struct lb_disks *d, const char *image, struct lb_image_held *out)
{
    bool found = false;
    uint32_t newest = 0;

    for (unsigned i = 0; i < d->n_of && !out->suspended; i++)
        for (unsigned k = 0; k < d->of[i].n; k++) {
            if (!lb_same_file(d->of[i].v[k].path, image))
                continue;
            found = true;
            newest = LB_MAX(newest, d->of[i].number);
            out->suspended |= !d->of[i].number;
        }
    if (out->suspended)
        snprintf(out->by, sizeof(out->by), "%s@suspend", vm);
    else if (found)
        snprintf(out->by, sizeof(out->by), "%s@%u", vm, newest);
    for (unsigned i = 0; i < d->n_spare && !found; i++)
        if (lb_same_file(d->spare[i].path, image) && holds_others(image)) {
            found = true;
            snprintf(out->by, sizeof(out->by), "a checkpoint of VM %s that was removed", vm);
        }
    if (found)
        snprintf(out->vm, sizeof(out->vm), "%s", vm);
    return found;
}

static bool held(const struct books *b, const char *image, struct lb_image_held *out)
{
    for (unsigned i = 0; i < b->n; i++)
        if (held_by(b->v[i].vm, &b->v[i].d, image, out))
            return true;
    return false;
}

static bool of_another(const struct books *b, const char *image, const char *user)
{
    for (unsigned i = 0; i < b->n; i++)
        for (unsigned k = 0; k < b->v[i].d.n_users; k++)
            if (strcmp(b->v[i].d.users[k].user, user) && lb_same_file(b->v[i].d.users[k].image, image))
                return true;
    return false;
}

/* The ends of what stands on image. One of a suspended VM is told in out->suspended. */
static void find_newest(const struct books *b, const char *image, const char *user, unsigned depth,
                        struct lb_image_held *out, unsigned *n)
{
    char **above = lb_images_above(image, b->known, b->n_known);
    struct lb_image_held end = {0};

    for (char **a = above; *a && depth < MAX_DEPTH; a++)
        find_newest(b, *a, user, depth + 1, out, n);
    if (!*above && depth) {
        if (held(b, image, &end)) {
            if (end.suspended && !out->suspended) {
                out->suspended = true;
                snprintf(out->vm, sizeof(out->vm), "%s", end.vm);
            }
        } else if (!of_another(b, image, user)) {
            out->newest = lb_realloc(out->newest, (*n + 2) * sizeof(*out->newest));
            out->newest[(*n)++] = lb_strdup(image);
            out->newest[*n] = NULL;
        }
    }
    lb_strv_free(above);
}

int lb_catalog_image_held(const char *dir, const char *image, const char *user, struct lb_image_held *out)
{
    struct books b;
    unsigned n = 0;
    bool is;

    *out = (struct lb_image_held){0};
    books_open(&b, dir);
    is = held(&b, image, out);
    if (is) {
        out->newest = lb_alloc(sizeof(*out->newest));
        find_newest(&b, image, user, 0, out, &n);
    }
    books_close(&b);
    return is;
}

void lb_image_held_free(struct lb_image_held *h)
{
    lb_strv_free(h->newest);
    *h = (struct lb_image_held){0};
}
