/* checkpoint/meta.c - what there is to know of a checkpoint, as JSON; FORMAT.md, "META".
 *
 * The description of the VM is in it as it travels between hosts (base64 of the protobuf message), so that
 * there is one list of rules for what a description may hold, whoever it comes from. */
#include "checkpoint/store_internal.h"

#include <jansson.h>
#include <sodium.h>
#include <string.h>

#include "core/registry.h"
#include "netproto/desc_proto.h"

enum { MAX_DISKS = 4096 };

void lb_ckpt_meta_free(struct lb_ckpt_meta *m)
{
    lb_vm_desc_free(&m->desc);
    free(m->disks);
    memset(m, 0, sizeof(*m));
}

/* -------------------------------------------------------------------------- to JSON */

static json_t *desc_json(const struct lb_vm_desc *d, struct lb_error *err)
{
    Lb__VmDescription *p = NULL;
    if (lb_desc_to_proto(d, &p, err) < 0)
        return NULL;
    size_t len = lb__vm_description__get_packed_size(p);
    size_t text_cap = sodium_base64_ENCODED_LEN(len, sodium_base64_VARIANT_ORIGINAL);
    LB_AUTO_FREE uint8_t *packed = lb_alloc(len);
    LB_AUTO_FREE char *text = lb_alloc(text_cap);

    lb__vm_description__pack(p, packed);
    lb__vm_description__free_unpacked(p, NULL);
    sodium_bin2base64(text, text_cap, packed, len, sodium_base64_VARIANT_ORIGINAL);
    return json_string(text);
}

struct json_t *lb_ckpt_disk_json(const struct lb_ckpt_disk *d)
{
    return json_pack("{s:s, s:s, s:s, s:s, s:I, s:I, s:I, s:I, s:I}", "id", d->id, "argv_path", d->argv_path, "path",
                     d->path, "format", d->format, "size_bytes", (json_int_t)d->size_bytes, "file_bytes",
                     (json_int_t)d->file_bytes, "mtime_ns", (json_int_t)d->mtime_ns, "inode", (json_int_t)d->inode,
                     "device", (json_int_t)d->device);
}

/* NULL when one has a name that is no text */
static json_t *disks_json(const struct lb_ckpt_meta *m)
{
    json_t *v = json_array();
    for (unsigned i = 0; i < m->n_disks; i++)
        if (json_array_append_new(v, lb_ckpt_disk_json(&m->disks[i])) < 0) {
            json_decref(v);
            return NULL;
        }
    return v;
}

static json_t *stats_json(const struct lb_ckpt_stats *s)
{
    return json_pack("{s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I}", "pages", (json_int_t)s->pages, "zero_pages",
                     (json_int_t)s->zero_pages, "same_pages", (json_int_t)s->same_pages, "unchanged_pages",
                     (json_int_t)s->unchanged_pages, "delta_pages", (json_int_t)s->delta_pages, "stored_pages",
                     (json_int_t)s->stored_pages, "raw_bytes", (json_int_t)s->raw_bytes, "file_bytes",
                     (json_int_t)s->file_bytes);
}

char *lb_ckpt_meta_json(const struct lb_ckpt_meta *m, const struct lb_ckpt_stats *s, struct lb_error *err)
{
    json_t *desc = desc_json(&m->desc, err);
    if (!desc)
        return NULL;
    json_t *disks = disks_json(m);
    json_t *o = json_pack("{s:s, s:s, s:I, s:b, s:b, s:b, s:I, s:f, s:o, s:o}", "vm", m->vm, "label", m->label,
                          "number", (json_int_t)m->number, "suspend", m->suspend, "no_disk", m->no_disk, "paused",
                          m->paused, "created_ms", (json_int_t)m->created_ms, "pause_ms", m->pause_ms, "disks", disks,
                          "description", desc);
    if (o && s)
        json_object_set_new(o, "stats", stats_json(s));
    char *text = o ? json_dumps(o, JSON_COMPACT) : NULL;
    json_decref(o);
    if (!text)
        lb_fail(err, LB_E_UNSUPPORTED, "a label or the name of a disk is not UTF-8");
    return text;
}

/* ------------------------------------------------------------------------ from JSON */

static int get_text(const json_t *o, const char *key, char *out, size_t cap, struct lb_error *err)
{
    const char *s = json_string_value(json_object_get(o, key));
    if (!s || strlen(s) >= cap)
        return lb_fail(err, LB_E_PROTO, "meta: \"%s\" is missing or too long", key);
    memcpy(out, s, strlen(s) + 1);
    return 0;
}

/* 64 bits of any kind travel as JSON's signed ones */
static int get_u64(const json_t *o, const char *key, uint64_t *out, struct lb_error *err)
{
    const json_t *v = json_object_get(o, key);
    if (!json_is_integer(v))
        return lb_fail(err, LB_E_PROTO, "meta: \"%s\" is missing or no integer", key);
    *out = (uint64_t)json_integer_value(v);
    return 0;
}

static int get_bool(const json_t *o, const char *key, bool *out, struct lb_error *err)
{
    const json_t *v = json_object_get(o, key);
    if (!json_is_boolean(v))
        return lb_fail(err, LB_E_PROTO, "meta: \"%s\" is missing or neither true nor false", key);
    *out = json_is_true(v);
    return 0;
}

int lb_ckpt_disk_parse(const struct json_t *o, struct lb_ckpt_disk *d, struct lb_error *err)
{
    if (get_text(o, "id", d->id, sizeof(d->id), err) < 0 ||
        get_text(o, "argv_path", d->argv_path, sizeof(d->argv_path), err) < 0 ||
        get_text(o, "path", d->path, sizeof(d->path), err) < 0 ||
        get_text(o, "format", d->format, sizeof(d->format), err) < 0)
        return -1;
    if (get_u64(o, "size_bytes", &d->size_bytes, err) < 0 || get_u64(o, "file_bytes", &d->file_bytes, err) < 0 ||
        get_u64(o, "mtime_ns", &d->mtime_ns, err) < 0)
        return -1;
    if (get_u64(o, "inode", &d->inode, err) < 0 || get_u64(o, "device", &d->device, err) < 0)
        return -1;
    return 0;
}

static int get_disks(const json_t *o, struct lb_ckpt_meta *m, struct lb_error *err)
{
    const json_t *v = json_object_get(o, "disks");
    if (!json_is_array(v) || json_array_size(v) > MAX_DISKS)
        return lb_fail(err, LB_E_PROTO, "meta: \"disks\" is missing or too long");
    size_t n = json_array_size(v);
    m->disks = lb_alloc((n ? n : 1) * sizeof(*m->disks));
    for (size_t i = 0; i < n; i++)
        if (lb_ckpt_disk_parse(json_array_get(v, i), &m->disks[i], err) < 0)
            return -1;
    m->n_disks = (unsigned)n;
    return 0;
}

static int get_desc(const json_t *o, struct lb_vm_desc *out, struct lb_error *err)
{
    const char *text = json_string_value(json_object_get(o, "description"));
    if (!text)
        return lb_fail(err, LB_E_PROTO, "meta: \"description\" is missing");
    size_t cap = strlen(text) + 1, len = 0;
    LB_AUTO_FREE uint8_t *packed = lb_alloc(cap);
    if (sodium_base642bin(packed, cap, text, strlen(text), NULL, &len, NULL, sodium_base64_VARIANT_ORIGINAL) < 0)
        return lb_fail(err, LB_E_PROTO, "meta: \"description\" is no base64");
    Lb__VmDescription *p = lb__vm_description__unpack(NULL, len, packed);
    if (!p)
        return lb_fail(err, LB_E_PROTO, "meta: \"description\" is no description of a VM");
    int rc = lb_desc_from_proto(p, out, err);
    lb__vm_description__free_unpacked(p, NULL);
    return rc;
}

static int get_all(const json_t *o, struct lb_ckpt_meta *m, struct lb_error *err)
{
    uint64_t number = 0;
    const json_t *pause = json_object_get(o, "pause_ms");

    if (get_text(o, "vm", m->vm, sizeof(m->vm), err) < 0 || get_text(o, "label", m->label, sizeof(m->label), err) < 0)
        return -1;
    if (!lb_vm_name_valid(m->vm)) /* it becomes the name of a directory */
        return lb_fail(err, LB_E_PROTO, "meta: \"vm\" is not the name of a VM");
    if (get_bool(o, "suspend", &m->suspend, err) < 0 || get_bool(o, "no_disk", &m->no_disk, err) < 0 ||
        get_bool(o, "paused", &m->paused, err) < 0)
        return -1;
    if (get_u64(o, "created_ms", &m->created_ms, err) < 0 || get_u64(o, "number", &number, err) < 0)
        return -1;
    if (number > UINT32_MAX || !json_is_number(pause))
        return lb_fail(err, LB_E_PROTO, "meta: \"number\" or \"pause_ms\" is no such number");
    m->number = (uint32_t)number;
    m->pause_ms = json_number_value(pause);
    if (get_disks(o, m, err) < 0)
        return -1;
    return get_desc(o, &m->desc, err);
}

static void get_stats(const json_t *o, struct lb_ckpt_stats *s)
{
    const struct {
        const char *key;
        uint64_t *to;
    } all[] = {
        {"pages", &s->pages},
        {"zero_pages", &s->zero_pages},
        {"same_pages", &s->same_pages},
        {"unchanged_pages", &s->unchanged_pages},
        {"delta_pages", &s->delta_pages},
        {"stored_pages", &s->stored_pages},
        {"raw_bytes", &s->raw_bytes},
        {"file_bytes", &s->file_bytes},
    };
    for (size_t i = 0; i < LB_ARRAY_LEN(all); i++)
        *all[i].to = (uint64_t)json_integer_value(json_object_get(o, all[i].key));
}

int lb_ckpt_meta_parse(const char *json, struct lb_ckpt_meta *out, struct lb_ckpt_stats *s, struct lb_error *err)
{
    struct lb_ckpt_meta m;
    json_error_t je;
    json_t *o = json_loads(json, JSON_REJECT_DUPLICATES, &je);

    if (!json_is_object(o)) {
        json_decref(o);
        return lb_fail(err, LB_E_PROTO, "meta: no JSON object: %s", o ? "something else" : je.text);
    }
    memset(&m, 0, sizeof(m));
    int rc = get_all(o, &m, err);
    if (rc == 0) {
        *out = m;
        if (s)
            get_stats(json_object_get(o, "stats"), s);
    } else {
        lb_ckpt_meta_free(&m);
    }
    json_decref(o);
    return rc;
}
