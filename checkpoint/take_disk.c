/*
 * checkpoint/take_disk.c - the disks of a live checkpoint keep its moment.
 *
 *      before          made ready             in the pause (freeze)
 *      guest           guest                  guest
 *        |               |   (overlay)          |
 *      image           image ---^             overlay -> image, which nobody writes any more
 *
 * An overlay lies beside the image it stands on, named after the first of them, the VM and the checkpoint:
 * disk.img, disk.img.lb-web1-1, disk.img.lb-web1-2.  When no checkpoint comes of it, the overlay is joined with
 * the image again while the guest runs.  What has been done is in a record (take.json), so that after a crash
 * somebody else can do that.
 */
#include "checkpoint/take.h"

#include "core/host.h"
#include "core/json.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <jansson.h>
#include <string.h>
#include <sys/stat.h>

#define RECORD_MAX_BYTES (4u << 20)
#define OVERLAY_MARK ".lb-"
#define MAX_SAME_NAME 1000u /* of overlays beside each other */

/* -------------------------------------------------------------------- the record */

static char *record_path(const char *state_dir, const char *vm)
{
    return lb_asprintf("%s/vms/%s/take.json", state_dir, vm);
}

void lb_take_record_free(struct lb_take_record *r)
{
    free(r->disks);
    *r = (struct lb_take_record){0};
}

int lb_take_record_save(const char *state_dir, const char *vm, const struct lb_take_record *r,
                        struct lb_error *err)
{
    LB_AUTO_FREE char *path = record_path(state_dir, vm);
    LB_AUTO_FREE char *text = NULL;
    json_t *o = json_object(), *disks = json_array();

    json_object_set_new(o, "number", json_integer(r->number));
    json_object_set_new(o, "paused", json_boolean(r->paused));
    json_object_set_new(o, "frozen", json_boolean(r->frozen));
    json_object_set_new(o, "disks", disks);
    for (unsigned i = 0; i < r->n_disks; i++)
        json_array_append_new(disks, json_pack("{s:s, s:s, s:s}", "id", r->disks[i].id, "overlay",
                                               r->disks[i].overlay, "base", r->disks[i].base));
    text = json_array_size(disks) == r->n_disks ? json_dumps(o, JSON_INDENT(2)) : NULL;
    json_decref(o);
    if (!text)
        return lb_fail(err, LB_E_UNSUPPORTED, "the name of a disk or an image of VM %s is not UTF-8", vm);
    return lb_file_write_atomic(path, text, strlen(text), 0600, err);
}

static int get_name(const json_t *o, const char *key, char *out, size_t cap)
{
    return lb_json_get_string(o, key, out, cap) || !out[0] ? -1 : 0;
}

static const char *parse_record(const json_t *o, struct lb_take_record *r)
{
    const json_t *number = json_object_get(o, "number"), *disks = json_object_get(o, "disks"), *d;
    size_t i;

    if (!json_is_integer(number) || json_integer_value(number) < 0 || json_integer_value(number) > UINT32_MAX)
        return "\"number\" is missing or wrong";
    if (!json_is_boolean(json_object_get(o, "paused")) || !json_is_boolean(json_object_get(o, "frozen")))
        return "\"paused\" or \"frozen\" is missing or wrong";
    if (!json_is_array(disks))
        return "\"disks\" is missing or wrong";
    r->number = (uint32_t)json_integer_value(number);
    r->paused = json_is_true(json_object_get(o, "paused"));
    r->frozen = json_is_true(json_object_get(o, "frozen"));
    r->disks = lb_alloc((json_array_size(disks) + 1) * sizeof(*r->disks));
    json_array_foreach(disks, i, d)
    {
        struct lb_take_disk *to = &r->disks[r->n_disks++];

        if (get_name(d, "id", to->id, sizeof(to->id)) ||
            get_name(d, "overlay", to->overlay, sizeof(to->overlay)) ||
            get_name(d, "base", to->base, sizeof(to->base)))
            return "a disk is wrong";
    }
    return NULL;
}

int lb_take_record_load(const char *state_dir, const char *vm, struct lb_take_record *out, struct lb_error *err)
{
    LB_AUTO_FREE char *path = record_path(state_dir, vm);
    LB_AUTO_FREE char *text = NULL;
    struct lb_take_record r = {0};
    json_error_t jerr;
    const char *wrong;
    size_t len;
    json_t *o;

    if (lb_file_read(path, RECORD_MAX_BYTES, &text, &len, err))
        return -1;
    o = json_loadb(text, len, JSON_REJECT_DUPLICATES, &jerr);
    wrong = o ? parse_record(o, &r) : jerr.text;
    json_decref(o);
    if (wrong) {
        lb_take_record_free(&r);
        lb_fail(err, LB_E_STATE, "%s is damaged: %s", path, wrong);
        return lb_remedy(err, "overlays of VM %s named *%s%s-N may be left of a checkpoint that failed; "
                              "move the file away when that is clear", vm, OVERLAY_MARK, vm);
    }
    *out = r;
    return 0;
}

int lb_take_record_remove(const char *state_dir, const char *vm, struct lb_error *err)
{
    LB_AUTO_FREE char *path = record_path(state_dir, vm);

    if (unlink(path) < 0 && errno != ENOENT)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot remove %s", path);
    return 0;
}

/* ---------------------------------------------------------------------- undoing */

static int remove_overlay(const char *path, struct lb_error *err)
{
    if (lb_host_locked(path) > 0)
        return lb_fail(err, LB_E_STATE, "overlay %s is in use: it stays", path);
    if (unlink(path) < 0 && errno != ENOENT)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot remove overlay %s", path);
    return 0;
}

static const struct lb_hv_disk *disk_of(const struct lb_hv_disk *v, unsigned n, const char *id)
{
    for (unsigned i = 0; i < n; i++)
        if (!strcmp(v[i].id, id))
            return &v[i];
    return NULL;
}

bool lb_take_is_committed(const char *catalog_dir, const char *name, uint32_t number)
{
    LB_AUTO_FREE char *file = lb_asprintf("%s/%s/%" PRIu32 LB_CKPT_SUFFIX, catalog_dir, name, number);

    return !access(file, F_OK);
}

int lb_take_record_undo(const char *catalog_dir, const char *name, struct lb_hv_vm *vm,
                        const struct lb_take_record *r, struct lb_error *err)
{
    LB_AUTO_FREE struct lb_hv_disk *v = NULL;
    unsigned n = 0;
    int rc = 0;

    if (lb_take_is_committed(catalog_dir, name, r->number))
        return 0;
    if (!vm && r->frozen && r->n_disks) {
        lb_log(LB_LOG_WARN, "the guest died with its disks on overlays (%s): they are its disks now",
               r->disks[0].overlay);
        return 0;
    }
    if (vm) {
        lb_hv_disk_overlay_drop(vm);
        if (r->n_disks && lb_hv_disks(vm, &v, &n, err))
            return -1;
    }
    for (unsigned i = 0; i < r->n_disks; i++) {
        const struct lb_take_disk *d = &r->disks[i];
        const struct lb_hv_disk *now = disk_of(v, n, d->id);

        if (now && !strcmp(now->path, d->overlay) &&
            lb_hv_disk_join(vm, d->id, d->overlay, d->base, NULL, NULL, err))
            rc = -1; /* the guest needs it; the others can go all the same */
        else if (remove_overlay(d->overlay, err))
            rc = -1;
    }
    return rc;
}

/* ------------------------------------------------------------------ making ready */

static bool is_taken(const struct lb_take_record *r, const char *path)
{
    struct stat st;

    for (unsigned i = 0; i < r->n_disks; i++)
        if (!strcmp(r->disks[i].overlay, path))
            return true;
    return lstat(path, &st) == 0;
}

/* Beside the image; without the end an earlier checkpoint or restore gave it. */
static int overlay_stem(char out[512], const char *image, const char *vm, uint32_t number)
{
    const char *slash = strrchr(image, '/'), *mark = strstr(slash ? slash : image, OVERLAY_MARK);
    int stem = mark ? (int)(mark - image) : (int)strlen(image);

    return snprintf(out, 512, "%.*s" OVERLAY_MARK "%s-%" PRIu32, stem, image, vm, number);
}

/* Several disks of a restored VM differ in that end alone: the overlay of the second is ...-2. */
static int overlay_path(char out[512], const char *image, const char *vm, const struct lb_take_record *r,
                        struct lb_error *err)
{
    char stem[512];
    int len = overlay_stem(stem, image, vm, r->number);

    memcpy(out, stem, sizeof(stem));
    for (unsigned n = 2; len >= 0 && len < 512 && is_taken(r, out) && n <= MAX_SAME_NAME; n++)
        len = snprintf(out, 512, "%s-%u", stem, n);
    if (len < 0 || len >= 512)
        return lb_fail(err, LB_E_UNSUPPORTED, "the path of image %.300s is too long for an overlay beside it",
                       image);
    return 0;
}

bool lb_take_overlay_exists(const struct lb_take *t)
{
    char path[512];

    for (unsigned i = 0; i < t->n_disks; i++)
        if (overlay_stem(path, t->disks[i].path, t->entry.name, t->record.number) < 512 && !access(path, F_OK))
            return true;
    return false;
}

static int check_disk(const struct lb_hv_disk *d, struct lb_error *err)
{
    if (!d->path[0])
        return lb_fail(err, LB_E_UNSUPPORTED, "disk %s is no image of this host: its moment cannot be kept", d->id);
    if (d->shareable)
        return lb_fail(err, LB_E_UNSUPPORTED, "disk %s (%s) is shared with other machines: its moment cannot be "
                       "kept", d->id, d->path);
    return 0;
}

static int prepare(struct lb_take *t, struct lb_error *err)
{
    struct lb_take_record *r = &t->record;

    r->disks = lb_alloc((t->n_disks + 1) * sizeof(*r->disks));
    for (unsigned i = 0; i < t->n_disks; i++) {
        const struct lb_hv_disk *from = &t->disks[i];
        struct lb_take_disk *d = &r->disks[i];

        if (check_disk(from, err) || overlay_path(d->overlay, from->path, t->entry.name, r, err))
            return -1;
        snprintf(d->id, sizeof(d->id), "%s", from->id);
        snprintf(d->base, sizeof(d->base), "%s", from->path);
        r->n_disks++;
    }
    if (lb_take_record_save(t->env->state_dir, t->entry.name, r, err))
        return -1;
    t->overlays = true;
    for (unsigned i = 0; i < r->n_disks; i++)
        if (lb_hv_disk_overlay(t->vm, r->disks[i].id, r->disks[i].overlay, err))
            return -1;
    return 0;
}

int lb_take_overlays(struct lb_take *t, struct lb_error *err)
{
    struct lb_error why = LB_ERROR_INIT;

    if (!prepare(t, &why))
        return 0;
    if (why.code == LB_E_UNSUPPORTED && !strstr(why.remedy, "--no-disk")) {
        char first[sizeof(why.remedy)];

        memcpy(first, why.remedy, sizeof(first));
        lb_remedy(&why, "%.250s%stake it without the disks: --no-disk", first, first[0] ? "; or " : "");
    }
    if (err)
        *err = why;
    return -1;
}
