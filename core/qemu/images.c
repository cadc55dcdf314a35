/*
 * core/qemu/images.c - disk images on a QEMU command line: which there are, which disk of the
 * running VM each one is, and another image in the place of one.
 *
 *      -drive file=a.img,if=none,id=d0         one option: drive and file
 *      -hda a.img, -cdrom, a bare a.img ...    the same, shorter: read as the -drive that QEMU makes of it
 *      -blockdev driver=qcow2,file=s,node-name=f
 *      -blockdev driver=file,filename=a.img,node-name=s
 *                                              two (or one, nested): format and file
 *
 * While the VM runs, a disk changes its image and its node (overlays, mirrors, other media), but not
 * its name: the drive's id, or the device that refers to the node.
 */
#include "core/qemu/qemu_internal.h"

#include <string.h>

/* Options that are short for a -drive. The bare argument is "". */
static const struct {
    const char *name, *drive;
} short_drives[] = {
    {"", "index=0,media=disk"},    {"hda", "index=0,media=disk"}, {"hdb", "index=1,media=disk"},
    {"hdc", "index=2,media=disk"}, {"hdd", "index=3,media=disk"}, {"cdrom", "index=2,media=cdrom"},
    {"fda", "if=floppy,index=0"},  {"fdb", "if=floppy,index=1"},  {"sd", "if=sd"},
    {"mtdblock", "if=mtd"},        {"pflash", "if=pflash"},
};

/* What only one format knows: goes when the format does. */
static const char *const format_keys[] = {
    "offset", "size", "lazy-refcounts", "pass-discard-request", "pass-discard-snapshot",
    "pass-discard-other", "discard-no-unref", "overlap-check", "cache-size", "l2-cache-size",
    "l2-cache-entry-size", "refcount-cache-size", "cache-clean-interval",
};

/* As a -drive; NULL: it is none. */
static char *drive_value(const struct lb_qemu_opt *o)
{
    if (lb_qemu_opt_is(o, "drive"))
        return lb_strdup(o->value);
    for (unsigned i = 0; o->value && i < LB_ARRAY_LEN(short_drives); i++)
        if (lb_qemu_opt_is(o, short_drives[i].name))
            return lb_qemu_prop_set(short_drives[i].drive, "file", o->value);
    return NULL;
}

/* ---------------------------------------------- values, as a list or as JSON */

static json_t *json_at(json_t *j, const char *key, const char **last)
{
    for (const char *dot; (dot = strchr(key, '.')); key = dot + 1) {
        LB_AUTO_FREE char *part = lb_asprintf("%.*s", (int)(dot - key), key);
        j = json_object_get(j, part);
    }
    *last = key;
    return j;
}

char *lb_qemu_get(const char *value, const char *key)
{
    const char *last = key;
    if (!value || value[0] != '{')
        return value ? lb_qemu_prop(value, key) : NULL;
    json_t *j = json_loads(value, 0, NULL);
    char *s = lb_strdup(json_string_value(json_object_get(json_at(j, key, &last), last)));
    json_decref(j);
    return s;
}

void lb_qemu_put(char **value, const char *key, const char *val)
{
    const char *last = key;
    char *out = NULL;
    if ((*value)[0] != '{') {
        out = lb_qemu_prop_set(*value, key, val);
    } else {
        json_t *j = json_loads(*value, 0, NULL), *at = json_at(j, key, &last);
        if (val)
            json_object_set_new(at, last, json_string(val));
        else
            json_object_del(at, last);
        out = json_dumps(j, JSON_COMPACT);
        json_decref(j);
    }
    free(*value);
    *value = out;
}

/* Without key and everything under it. */
static void drop(char **value, const char *key)
{
    lb_qemu_put(value, key, NULL);
    LB_AUTO_FREE char *under = lb_asprintf(",%s.", key);
    for (char *at; (*value)[0] != '{' && (at = strstr(*value, under));) {
        LB_AUTO_FREE char *whole = lb_asprintf("%.*s", (int)strcspn(at + 1, "="), at + 1);
        lb_qemu_put(value, whole, NULL);
    }
}

/* "raw,file=..." and "driver=raw,file=..." are the same. */
static char *driver_of(const char *value)
{
    char *d = lb_qemu_get(value, "driver");
    return d || value[0] == '{' ? d : lb_qemu_prop(value, NULL);
}

static void set_driver(char **value, const char *driver)
{
    if ((*value)[0] != '{') {
        char *bare = lb_qemu_prop_set(*value, NULL, NULL);
        free(*value);
        *value = bare;
    }
    lb_qemu_put(value, "driver", driver);
}

/* -------------------------------------------------------------------- scan */

static bool is_protocol(const char *driver)
{
    return driver && (strcmp(driver, "file") == 0 || strcmp(driver, "host_device") == 0);
}

/* Number of the -blockdev of that name, or o->n. */
static unsigned find_node(const struct lb_qemu_opts *o, const char *name)
{
    unsigned i;
    for (i = 0; name && i < o->n; i++) {
        if (!lb_qemu_opt_is(&o->v[i], "blockdev"))
            continue;
        LB_AUTO_FREE char *have = lb_qemu_get(o->v[i].value, "node-name");
        if (have && strcmp(have, name) == 0)
            return i;
    }
    return o->n;
}

static bool stands_below(const struct lb_qemu_opts *o, const char *node)
{
    bool found = false;
    for (unsigned i = 0; node && i < o->n && !found; i++) {
        if (!lb_qemu_opt_is(&o->v[i], "blockdev"))
            continue;
        LB_AUTO_FREE char *file = lb_qemu_get(o->v[i].value, "file");
        found = file && strcmp(file, node) == 0;
    }
    return found;
}

static void add(struct lb_qemu_images *im, struct lb_qemu_image image)
{
    im->v = lb_realloc(im->v, (im->n + 1) * sizeof(*im->v));
    im->v[im->n++] = image;
}

static void scan_drive(struct lb_qemu_images *im, unsigned i, const char *value)
{
    struct lb_qemu_image d = {.opt = i, .file_opt = i, .file_key = "file", .drive = true};
    d.path = lb_qemu_prop(value, "file");
    if (!d.path) {
        d.path = lb_qemu_prop(value, "file.filename");
        d.file_key = d.path ? "file.filename" : "file";
    }
    d.id = lb_qemu_prop(value, "id");
    add(im, d);
}

static void scan_blockdev(const struct lb_qemu_opts *o, struct lb_qemu_images *im, unsigned i)
{
    const char *value = o->v[i].value;
    LB_AUTO_FREE char *driver = driver_of(value);
    LB_AUTO_FREE char *node = lb_qemu_get(value, "node-name");
    struct lb_qemu_image d = {.opt = i, .file_opt = i, .file_key = "filename"};
    if (is_protocol(driver)) {
        if (stands_below(o, node))
            return; /* found by who stands on it */
        d.path = lb_qemu_get(value, "filename");
    } else {
        LB_AUTO_FREE char *below = lb_qemu_get(value, "file");
        unsigned k = find_node(o, below);
        LB_AUTO_FREE char *there = k < o->n ? driver_of(o->v[k].value) : NULL;
        if (is_protocol(there)) {
            d.file_opt = k;
            d.path = lb_qemu_get(o->v[k].value, "filename");
        } else if (!below) {
            d.file_key = "file.filename";
            d.path = lb_qemu_get(value, "file.filename");
        }
    }
    if (!d.path)
        return;
    d.node = LB_STEAL_PTR(node);
    add(im, d);
}

void lb_qemu_images_scan(const struct lb_qemu_opts *o, struct lb_qemu_images *out)
{
    *out = (struct lb_qemu_images){0};
    for (unsigned i = 0; i < o->n; i++) {
        LB_AUTO_FREE char *drive = drive_value(&o->v[i]);
        if (drive)
            scan_drive(out, i, drive);
        else if (lb_qemu_opt_is(&o->v[i], "blockdev"))
            scan_blockdev(o, out, i);
    }
}

void lb_qemu_images_free(struct lb_qemu_images *im)
{
    for (unsigned i = 0; i < im->n; i++) {
        free(im->v[i].path);
        free(im->v[i].id);
        free(im->v[i].node);
    }
    free(im->v);
    *im = (struct lb_qemu_images){0};
}

/* ------------------------------------------------------------------- match */

static const char *str(const json_t *obj, const char *key)
{
    return json_string_value(json_object_get(obj, key));
}

/* The image of the node, or of what the node stands on (filters). */
static const struct lb_qemu_image *of_node(const struct lb_qemu_opts *o, const struct lb_qemu_images *im,
                                           const char *node)
{
    LB_AUTO_FREE char *name = lb_strdup(node);
    for (unsigned depth = 0; name && depth < o->n; depth++) {
        for (unsigned i = 0; i < im->n; i++)
            if (im->v[i].node && strcmp(im->v[i].node, name) == 0)
                return &im->v[i];
        unsigned k = find_node(o, name);
        free(name);
        name = k < o->n ? lb_qemu_get(o->v[k].value, "file") : NULL;
    }
    return NULL;
}

/* Value of the -device behind a QOM path or id, or NULL. Those without an id are numbered: the lists
 * first, then the drives with if=virtio, then those in JSON. */
static const char *device_of(const struct lb_qemu_opts *o, const char *qdev)
{
    static const char named[] = "/machine/peripheral/", anon[] = "/machine/peripheral-anon/device[";
    bool number = strncmp(qdev, anon, strlen(anon)) == 0;
    unsigned want = number ? (unsigned)strtoul(qdev + strlen(anon), NULL, 10) : 0, at = 0;
    if (strncmp(qdev, named, strlen(named)) == 0)
        qdev += strlen(named);
    LB_AUTO_FREE char *id = lb_asprintf("%.*s", (int)strcspn(qdev, "/"), qdev);
    for (int pass = 0; pass < 3; pass++) {
        for (unsigned i = 0; i < o->n; i++) {
            const char *v = o->v[i].value;
            bool device = lb_qemu_opt_is(&o->v[i], "device");
            if (pass == 1) {
                LB_AUTO_FREE char *bus = lb_qemu_opt_is(&o->v[i], "drive") ? lb_qemu_prop(v, "if") : NULL;
                at += bus && strcmp(bus, "virtio") == 0;
            }
            if (!device || pass == 1 || (v[0] == '{') != (pass == 2))
                continue;
            LB_AUTO_FREE char *have = lb_qemu_get(v, "id");
            if (number ? !have && at++ == want : have && strcmp(have, id) == 0)
                return v;
        }
    }
    return NULL;
}

/* Is path the image or one of those below it? */
static bool in_chain(const json_t *image, const char *path)
{
    for (; image; image = json_object_get(image, "backing-image")) {
        LB_AUTO_FREE char *file = lb_qemu_image_file(str(image, "filename"));
        if (file && strcmp(file, path) == 0)
            return true;
    }
    return false;
}

static const struct lb_qemu_image *with_id(const struct lb_qemu_images *im, const char *id)
{
    for (unsigned i = 0; i < im->n; i++)
        if (im->v[i].drive && im->v[i].id && strcmp(im->v[i].id, id) == 0)
            return &im->v[i];
    return NULL;
}

static bool in_any_chain(const json_t *all, const char *path)
{
    const json_t *b;
    size_t i;
    bool found = false;
    json_array_foreach(all, i, b)
        found |= in_chain(json_object_get(json_object_get(b, "inserted"), "image"), path);
    return found;
}

/* A drive without an id: what its chain says, else its place (QEMU makes the drives of the command line
 * in its order, then others) when nothing speaks against that. */
static const struct lb_qemu_image *unnamed(const struct lb_qemu_images *im, const json_t *all, const json_t *b)
{
    const json_t *image = json_object_get(json_object_get(b, "inserted"), "image"), *other;
    size_t i, place = 0;
    for (i = 0; i < im->n; i++)
        if (im->v[i].drive && !im->v[i].id && im->v[i].path && in_chain(image, im->v[i].path))
            return &im->v[i];
    json_array_foreach(all, i, other)
    {
        if (other == b)
            break;
        const char *name = str(other, "device");
        place += name && *name && !with_id(im, name);
    }
    for (i = 0; i < im->n; i++)
        if (im->v[i].drive && !im->v[i].id && place-- == 0)
            return im->v[i].path && in_any_chain(all, im->v[i].path) ? NULL : &im->v[i];
    return NULL;
}

const struct lb_qemu_image *lb_qemu_image_of(const struct lb_qemu_opts *o, const struct lb_qemu_images *im,
                                             const json_t *all, const json_t *b)
{
    const char *name = str(b, "device"), *qdev = str(b, "qdev");
    if (name && *name) {
        const struct lb_qemu_image *d = with_id(im, name);
        return d ? d : unnamed(im, all, b);
    }
    const char *device = qdev ? device_of(o, qdev) : NULL;
    LB_AUTO_FREE char *node = device ? lb_qemu_get(device, "drive") : NULL;
    return of_node(o, im, node ? node : str(json_object_get(b, "inserted"), "node-name"));
}

/* ----------------------------------------------------------------- replace */

static void forget_format(char **value)
{
    drop(value, "encrypt");
    for (unsigned i = 0; i < LB_ARRAY_LEN(format_keys); i++)
        lb_qemu_put(value, format_keys[i], NULL);
}

/* A device stands on the file itself: a format has to come between. The file keeps what was said, and
 * so does the format where it knows it. */
static char *between(const char *value, const char *format)
{
    static const char *const both[] = {"cache.direct", "cache.no-flush", "read-only", "auto-read-only",
                                       "discard", "detect-zeroes", "force-share"};
    if (value[0] == '{') {
        json_t *file = json_loads(value, 0, NULL), *j = json_object();
        json_object_set(j, "node-name", json_object_get(file, "node-name"));
        json_object_del(file, "node-name");
        json_object_set_new(j, "driver", json_string(format));
        for (unsigned i = 0; i < LB_ARRAY_LEN(both); i++)
            if (!strchr(both[i], '.') && json_object_get(file, both[i]))
                json_object_set(j, both[i], json_object_get(file, both[i]));
        if (json_object_get(file, "cache"))
            json_object_set(j, "cache", json_object_get(file, "cache"));
        json_object_set_new(j, "file", file);
        char *text = json_dumps(j, JSON_COMPACT);
        json_decref(j);
        return text;
    }
    char *out = lb_asprintf("driver=%s", format);
    LB_AUTO_FREE char *node = lb_qemu_prop(value, "node-name");
    LB_AUTO_FREE char *bare = lb_qemu_prop_set(value, "node-name", NULL);
    lb_qemu_put(&out, "node-name", node);
    for (unsigned i = 0; i < LB_ARRAY_LEN(both); i++) {
        LB_AUTO_FREE char *v = lb_qemu_prop(bare, both[i]);
        if (v)
            lb_qemu_put(&out, both[i], v);
    }
    for (const char *p = bare; *p;) {
        const char *end = p;
        while (*end && !(*end == ',' && end[1] != ','))
            end += *end == ',' ? 2 : 1;
        char *longer = lb_asprintf("%s,file.%.*s", out, (int)(end - p), p);
        free(out);
        out = longer;
        p = *end ? end + 1 : end;
    }
    return out;
}

static void replace_drive(struct lb_qemu_opt *o, const struct lb_qemu_image *im, const char *path,
                          const char *format)
{
    char *v = drive_value(o);
    drop(&v, "backing");
    LB_AUTO_FREE char *driver = lb_qemu_prop(v, "file.driver");
    lb_qemu_put(&v, im->file_key, path);
    if (driver)
        lb_qemu_put(&v, "file.driver", "file");
    if (format) {
        lb_qemu_put(&v, "driver", NULL);
        forget_format(&v);
        lb_qemu_put(&v, "format", format);
    }
    free(o->name);
    free(o->value);
    o->name = lb_strdup("drive");
    o->value = v;
}

static void replace_blockdev(struct lb_qemu_opts *o, const struct lb_qemu_image *im, const char *path,
                             const char *format)
{
    char **file = &o->v[im->file_opt].value, **top = &o->v[im->opt].value;
    bool nested = strcmp(im->file_key, "file.filename") == 0;
    lb_qemu_put(file, im->file_key, path);
    if (nested)
        lb_qemu_put(file, "file.driver", "file");
    else
        set_driver(file, "file");
    if (im->opt == im->file_opt && !nested) {
        if (!format || strcmp(format, "raw") == 0 || strcmp(format, "file") == 0)
            return;
        char *wrapped = between(*top, format);
        free(*top);
        *top = wrapped;
        return;
    }
    drop(top, "backing"); /* the image says itself what it stands on */
    if (format) {
        forget_format(top);
        set_driver(top, format);
    }
}

void lb_qemu_image_replace(struct lb_qemu_opts *o, const struct lb_qemu_image *im, const char *path,
                           const char *format)
{
    const char *as = format && *format ? format : NULL;
    if (im->drive)
        replace_drive(&o->v[im->opt], im, path, as);
    else
        replace_blockdev(o, im, path, as);
}

/* ------------------------------------------------------- a command line as it is */

static bool same(const char *a, const char *b)
{
    return a == b || (a && b && strcmp(a, b) == 0);
}

/* argv with the options that are others in `now`; every other word stays as it was typed. */
static char **with_changes(char *const *argv, const struct lb_qemu_opts *was, const struct lb_qemu_opts *now)
{
    unsigned words = 1, n = 0;
    for (unsigned i = 0; i < was->n; i++)
        words += (was->v[i].name[0] != 0) + (was->v[i].value != NULL);
    char **out = lb_alloc((words + now->n + 1) * sizeof(*out)); /* a bare image becomes an option: a word more */
    out[n++] = lb_strdup(argv[0]);
    for (unsigned i = 0, at = 1; i < was->n; i++) {
        const struct lb_qemu_opt *a = &was->v[i], *b = &now->v[i];
        bool as_is = same(a->name, b->name) && same(a->value, b->value);
        unsigned old = (a->name[0] != 0) + (a->value != NULL);
        for (unsigned k = 0; as_is && k < old; k++)
            out[n++] = lb_strdup(argv[at + k]);
        if (!as_is) {
            out[n++] = lb_asprintf("-%s", b->name);
            out[n++] = lb_strdup(b->value);
        }
        at += old;
    }
    return out;
}

int lb_qemu_argv_image(char *const *argv, const char *path, const char *to, const char *format, char ***out,
                       struct lb_error *err)
{
    struct lb_qemu_opts was, now;
    struct lb_qemu_images images;
    unsigned found = 0;
    if (lb_qemu_opts_parse(argv, &was, err) < 0)
        return -1;
    lb_qemu_opts_parse(argv, &now, NULL); /* as it did a moment ago */
    lb_qemu_images_scan(&now, &images);
    for (unsigned i = 0; i < images.n; i++) {
        if (!same(images.v[i].path, path))
            continue;
        lb_qemu_image_replace(&now, &images.v[i], to, format);
        found++;
    }
    if (found)
        *out = with_changes(argv, &was, &now);
    lb_qemu_images_free(&images);
    lb_qemu_opts_free(&was);
    lb_qemu_opts_free(&now);
    return found ? 0 : lb_fail(err, LB_E_UNSUPPORTED, "the command line names %s in a way that is not understood", path);
}
