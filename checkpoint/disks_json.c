/* checkpoint/disks_json.c - which image holds which disk of which checkpoint.
 *
 *   {"version": 1,
 *    "checkpoints": {"7": [{disk}, ...]},       "0": the suspended VM's
 *    "users": [{"image", "user"}],              images that stand on one of ours, and the VM that writes to them
 *    "spare": [{disk}, ...],                    images whose checkpoint is gone: they can be joined with the next one
 *    "joining": {"id", "top", "base", "base_format", "above", "done"}}
 *
 * A disk has the fields of struct lb_ckpt_disk.  The file is replaced as a whole, by whoever holds the lock of the
 * catalog.  A spare image is one of a live checkpoint: such an image is frozen, the guest writes elsewhere; the
 * image of a suspended VM is where its guest will go on, and never becomes spare. */
#include "checkpoint/catalog_internal.h"
#include "checkpoint/store_internal.h"
#include "core/json.h"

#include <errno.h>
#include <inttypes.h>
#include <jansson.h>
#include <string.h>
#include <sys/stat.h>

enum { MAX_BYTES = 64 << 20, VERSION = 1 };

static char *file_of(const char *dir, const char *vm)
{
    return lb_asprintf("%s/%s/disks.json", dir, vm);
}

/* -------------------------------------------------------------------- in memory */

void lb_disks_free(struct lb_disks *d)
{
    for (unsigned i = 0; i < d->n_of; i++)
        free(d->of[i].v);
    free(d->of);
    free(d->users);
    free(d->spare);
    *d = (struct lb_disks){0};
}

struct lb_ckpt_disk *lb_disks_dup(const struct lb_ckpt_disk *v, unsigned n)
{
    if (!n)
        return NULL;
    struct lb_ckpt_disk *copy = lb_alloc(n * sizeof(*copy));
    memcpy(copy, v, n * sizeof(*copy));
    return copy;
}

const struct lb_disks_of *lb_disks_find(const struct lb_disks *d, uint32_t number)
{
    for (unsigned i = 0; i < d->n_of; i++)
        if (d->of[i].number == number)
            return &d->of[i];
    return NULL;
}

/* Takes v. */
static void put_own(struct lb_disks *d, uint32_t number, struct lb_ckpt_disk *v, unsigned n)
{
    for (unsigned i = 0; i < d->n_of; i++)
        if (d->of[i].number == number) {
            free(d->of[i].v);
            d->of[i].v = v;
            d->of[i].n = n;
            return;
        }
    d->of = lb_realloc(d->of, (d->n_of + 1) * sizeof(*d->of));
    d->of[d->n_of++] = (struct lb_disks_of){.number = number, .v = v, .n = n};
}

void lb_disks_put(struct lb_disks *d, uint32_t number, const struct lb_ckpt_disk *v, unsigned n)
{
    put_own(d, number, lb_disks_dup(v, n), n);
}

bool lb_disks_held(const struct lb_disks *d, const char *path)
{
    for (unsigned i = 0; i < d->n_of; i++)
        for (unsigned k = 0; k < d->of[i].n; k++)
            if (!strcmp(d->of[i].v[k].path, path))
                return true;
    return false;
}

void lb_disks_drop_spare(struct lb_disks *d, unsigned i)
{
    memmove(&d->spare[i], &d->spare[i + 1], (d->n_spare - i - 1) * sizeof(*d->spare));
    d->n_spare--;
}

static void add_spare(struct lb_disks *d, const struct lb_ckpt_disk *image)
{
    for (unsigned i = 0; i < d->n_spare; i++)
        if (!strcmp(d->spare[i].path, image->path))
            return;
    d->spare = lb_realloc(d->spare, (d->n_spare + 1) * sizeof(*d->spare));
    d->spare[d->n_spare++] = *image;
}

bool lb_disks_tidy(const char *dir, const char *vm, struct lb_disks *d)
{
    bool changed = false;

    for (unsigned i = d->n_of; i-- > 0;) {
        struct lb_disks_of of = d->of[i];
        LB_AUTO_FREE char *path = lb_catalog_file(dir, vm, of.number);
        if (access(path, F_OK) == 0 || errno != ENOENT)
            continue;
        d->of[i] = d->of[--d->n_of];
        for (unsigned k = 0; of.number && k < of.n; k++)
            add_spare(d, &of.v[k]);
        free(of.v);
        changed = true;
    }
    for (unsigned i = d->n_spare; i-- > 0;)
        if (lb_disks_held(d, d->spare[i].path) || (access(d->spare[i].path, F_OK) < 0 && errno == ENOENT)) {
            lb_disks_drop_spare(d, i);
            changed = true;
        }
    for (unsigned i = d->n_users; i-- > 0;)
        if (access(d->users[i].image, F_OK) < 0 && errno == ENOENT) {
            d->users[i] = d->users[--d->n_users];
            changed = true;
        }
    return changed;
}

/* ------------------------------------------------------------------------- JSON */

static json_t *disks_json(const struct lb_ckpt_disk *v, unsigned n)
{
    json_t *a = json_array();

    for (unsigned i = 0; i < n; i++)
        json_array_append_new(a, lb_ckpt_disk_json(&v[i]));
    return json_array_size(a) == n ? a : (json_decref(a), NULL);
}

static int disks_parse(const json_t *a, struct lb_ckpt_disk **v, unsigned *n)
{
    if (!json_is_array(a))
        return -1;
    *n = (unsigned)json_array_size(a);
    *v = *n ? lb_alloc(*n * sizeof(**v)) : NULL;
    for (unsigned i = 0; i < *n; i++)
        if (lb_ckpt_disk_parse(json_array_get(a, i), &(*v)[i], NULL))
            return -1;
    return 0;
}

static const char *parse_checkpoints(json_t *o, struct lb_disks *d)
{
    const char *key;
    json_t *a;

    if (!json_is_object(o))
        return "\"checkpoints\" is missing";
    json_object_foreach(o, key, a) {
        LB_AUTO_FREE struct lb_ckpt_disk *v = NULL;
        unsigned n;
        size_t digits = strspn(key, "0123456789");
        unsigned long long number = strtoull(key, NULL, 10);
        if (!digits || digits > 10 || key[digits] || number > UINT32_MAX || disks_parse(a, &v, &n))
            return "an entry of \"checkpoints\" is wrong";
        put_own(d, (uint32_t)number, LB_STEAL_PTR(v), n);
    }
    return NULL;
}

static const char *parse_users(const json_t *a, struct lb_disks *d)
{
    if (!json_is_array(a))
        return "\"users\" is missing";
    d->users = lb_alloc((json_array_size(a) + 1) * sizeof(*d->users));
    for (size_t i = 0; i < json_array_size(a); i++) {
        struct lb_disks_user *u = &d->users[d->n_users++];
        const json_t *o = json_array_get(a, i);
        if (lb_json_get_string(o, "image", u->image, sizeof(u->image)) || lb_json_get_string(o, "user", u->user, sizeof(u->user)))
            return "an entry of \"users\" is wrong";
    }
    return NULL;
}

static const char *parse_joining(const json_t *o, struct lb_disks_joining *j)
{
    if (!o)
        return NULL;
    if (lb_json_get_string(o, "id", j->id, sizeof(j->id)) || lb_json_get_string(o, "top", j->top, sizeof(j->top)) || !j->top[0] ||
        lb_json_get_string(o, "base", j->base, sizeof(j->base)) ||
        lb_json_get_string(o, "base_format", j->base_format, sizeof(j->base_format)) || lb_json_get_string(o, "above", j->above, sizeof(j->above)) ||
        !json_is_boolean(json_object_get(o, "done")))
        return "\"joining\" is wrong";
    j->done = json_is_true(json_object_get(o, "done"));
    return NULL;
}

static const char *parse(json_t *o, struct lb_disks *d)
{
    const char *wrong;

    if (json_integer_value(json_object_get(o, "version")) != VERSION)
        return "it is of another version";
    if ((wrong = parse_checkpoints(json_object_get(o, "checkpoints"), d)) ||
        (wrong = parse_users(json_object_get(o, "users"), d)) ||
        (wrong = parse_joining(json_object_get(o, "joining"), &d->joining)))
        return wrong;
    return disks_parse(json_object_get(o, "spare"), &d->spare, &d->n_spare) ? "\"spare\" is missing or wrong" : NULL;
}

int lb_disks_load(const char *dir, const char *vm, struct lb_disks *out, struct lb_error *err)
{
    LB_AUTO_FREE char *path = file_of(dir, vm);
    LB_AUTO_FREE char *text = NULL;
    struct lb_error why = LB_ERROR_INIT;
    json_error_t jerr = {0};
    size_t len;

    *out = (struct lb_disks){0};
    if (lb_file_read(path, MAX_BYTES, &text, &len, &why)) {
        if (why.code == LB_E_NOT_FOUND)
            return 0;
        if (err)
            *err = why;
        return -1;
    }
    json_t *o = json_loadb(text, len, JSON_REJECT_DUPLICATES, &jerr);
    const char *wrong = o ? parse(o, out) : jerr.text;
    if (wrong) {
        lb_disks_free(out);
        lb_fail(err, LB_E_STATE, "%s is damaged: %s", path, wrong);
        lb_remedy(err, "it says which disk image belongs to which checkpoint; bring it back from a backup");
    }
    json_decref(o);
    return wrong ? -1 : 0;
}

static json_t *as_json(const struct lb_disks *d)
{
    json_t *of = json_object(), *users = json_array(), *spare = disks_json(d->spare, d->n_spare);
    const struct lb_disks_joining *j = &d->joining;
    char key[16];
    bool bad = !spare;

    for (unsigned i = 0; i < d->n_of; i++) {
        snprintf(key, sizeof(key), "%" PRIu32, d->of[i].number);
        bad |= json_object_set_new(of, key, disks_json(d->of[i].v, d->of[i].n)) < 0;
    }
    for (unsigned i = 0; i < d->n_users; i++)
        bad |= json_array_append_new(users, json_pack("{s:s, s:s}", "image", d->users[i].image, "user",
                                                      d->users[i].user)) < 0;
    json_t *o = json_pack("{s:i, s:o, s:o, s:o*}", "version", VERSION, "checkpoints", of, "users", users, "spare", spare);
    if (o && j->top[0])
        bad |= json_object_set_new(o, "joining",
                                   json_pack("{s:s, s:s, s:s, s:s, s:s, s:b}", "id", j->id, "top", j->top, "base", j->base,
                                             "base_format", j->base_format, "above", j->above, "done", (int)j->done)) < 0;
    if (bad && o) {
        json_decref(o);
        o = NULL;
    }
    return o;
}

int lb_disks_save(const char *dir, const char *vm, const struct lb_disks *d, struct lb_error *err)
{
    LB_AUTO_FREE char *path = file_of(dir, vm);
    json_t *o = as_json(d);
    LB_AUTO_FREE char *text = o ? json_dumps(o, JSON_INDENT(1)) : NULL;

    json_decref(o);
    if (!text) {
        lb_fail(err, LB_E_UNSUPPORTED, "cannot note the images of VM %s: a name is not UTF-8", vm);
        return lb_remedy(err, "rename the image files");
    }
    return lb_file_write_atomic(path, text, strlen(text), 0600, err);
}

/* --------------------------------------------------------------------- for others */

int lb_catalog_set_disks(const char *dir, const char *vm, uint32_t number, const struct lb_ckpt_disk *v, unsigned n,
                         struct lb_error *err)
{
    struct lb_disks d;

    if (lb_disks_load(dir, vm, &d, err))
        return -1;
    lb_disks_put(&d, number, v, n);
    int rc = lb_disks_save(dir, vm, &d, err);
    lb_disks_free(&d);
    return rc;
}

static void use(struct lb_disks *d, const char *image, const char *user, bool on)
{
    for (unsigned i = d->n_users; i-- > 0;)
        if (!strcmp(d->users[i].image, image) && !strcmp(d->users[i].user, user))
            d->users[i] = d->users[--d->n_users];
    if (!on)
        return;
    d->users = lb_realloc(d->users, (d->n_users + 1) * sizeof(*d->users));
    struct lb_disks_user *u = &d->users[d->n_users++];
    snprintf(u->image, sizeof(u->image), "%s", image);
    snprintf(u->user, sizeof(u->user), "%s", user);
}

int lb_catalog_use_image(const char *dir, const char *vm, const char *image, const char *user, bool on,
                         struct lb_error *err)
{
    struct lb_disks d;

    if (strlen(image) >= sizeof(d.users->image) || strlen(user) >= sizeof(d.users->user))
        return lb_fail(err, LB_E_USAGE, "the name of the image is too long: %.200s...", image);
    if (lb_disks_load(dir, vm, &d, err))
        return -1;
    use(&d, image, user, on);
    int rc = lb_disks_save(dir, vm, &d, err);
    lb_disks_free(&d);
    return rc;
}

int lb_disk_identify(struct lb_ckpt_disk *d, struct lb_error *err)
{
    struct stat st;

    if (stat(d->path, &st) < 0)
        return lb_fail_errno(err, errno == ENOENT ? LB_E_NOT_FOUND : LB_E_INTERNAL, errno, "cannot look at %s", d->path);
    d->file_bytes = (uint64_t)st.st_size;
    d->mtime_ns = (uint64_t)st.st_mtim.tv_sec * 1000000000 + (uint64_t)st.st_mtim.tv_nsec;
    d->inode = st.st_ino;
    d->device = st.st_dev;
    return 0;
}
