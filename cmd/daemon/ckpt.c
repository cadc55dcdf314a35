/* cmd/daemon/ckpt.c - see ckpt.h. */
#include "cmd/daemon/ckpt.h"

#include <math.h>
#include <sodium.h>
#include <string.h>

#include "core/qemu/qemu.h"

int lb_ckpt_host_open(struct lb_ckpt_host *h, const char *state_dir, const char *config_path,
                      struct lb_error *err)
{
    memset(h, 0, sizeof(*h));
    if (lb_config_load(config_path, &h->cfg, err))
        return -1;
    h->catalog_dir = h->cfg.checkpoint_dir[0] ? lb_strdup(h->cfg.checkpoint_dir)
                                              : lb_asprintf("%s/checkpoints", state_dir);
    h->env = (struct lb_ckpt_env){.state_dir = state_dir, .catalog_dir = h->catalog_dir,
                                  .hv = &lb_hv_qemu, .launch = &h->launch, .cancel_fd = -1};
    return 0;
}

void lb_ckpt_host_close(struct lb_ckpt_host *h)
{
    lb_config_free(&h->cfg);
    free(h->catalog_dir);
    memset(h, 0, sizeof(*h));
}

/* ----------------------------------------------------------------------- keys */

Lb__RpcKey *lb_ckpt_key_of(const Lb__RpcRequest *r)
{
    if (!r)
        return NULL;
    switch (r->kind_case) {
    case LB__RPC_REQUEST__KIND_CHECKPOINT:
        return r->checkpoint->key;
    case LB__RPC_REQUEST__KIND_RESTORE:
        return r->restore->key;
    case LB__RPC_REQUEST__KIND_CLONE:
        return r->clone->key;
    case LB__RPC_REQUEST__KIND_CATALOG:
        return r->catalog->key;
    case LB__RPC_REQUEST__KIND_FILL_KEY:
        return r->fill_key;
    default:
        return NULL;
    }
}

void lb_ckpt_key_wipe(Lb__RpcKey *k)
{
    if (k && k->passphrase.len)
        sodium_memzero(k->passphrase.data, k->passphrase.len);
}

int lb_ckpt_key_for(const struct lb_ckpt_host *h, Lb__RpcKey *k, const char *remembered, bool to_write,
                    struct lb_ckpt_key **out, struct lb_error *err)
{
    struct lb_error why = LB_ERROR_INIT;
    int rc;

    *out = NULL;
    if (k && k->passphrase.len) {
        rc = lb_ckpt_key_passphrase((const char *)k->passphrase.data, k->passphrase.len, out, err);
        lb_ckpt_key_wipe(k);
        return rc;
    }
    if (k && k->key_file[0]) {
        if (k->key_file[0] != '/')
            return lb_fail(err, LB_E_USAGE, "the key file %.200s is not an absolute path", k->key_file);
        return lb_ckpt_key_file(k->key_file, out, err);
    }
    if (remembered)
        return lb_ckpt_key_file(remembered, out, err);
    if (!h->cfg.checkpoint_key[0] || !lb_ckpt_key_file(h->cfg.checkpoint_key, out, &why))
        return 0;
    if (to_write) {
        if (err)
            *err = why;
        return lb_context(err, "checkpoint-key of the configuration");
    }
    lb_log_error(LB_LOG_WARN, &why); /* what is to be read may not be encrypted */
    return 0;
}

static char *key_file_path(const char *state_dir, const char *vm)
{
    return lb_asprintf("%s/vms/%s/key-file", state_dir, vm);
}

void lb_ckpt_remember_key(const char *state_dir, const char *vm, const char *key_file)
{
    LB_AUTO_FREE char *path = key_file_path(state_dir, vm);
    struct lb_error err = LB_ERROR_INIT;

    if (!key_file[0])
        unlink(path);
    else if (lb_file_write_atomic(path, key_file, strlen(key_file), 0600, &err))
        lb_log_error(LB_LOG_WARN, &err);
}

char *lb_ckpt_remembered_key(const char *state_dir, const char *vm)
{
    LB_AUTO_FREE char *path = key_file_path(state_dir, vm);
    char *text = NULL;
    size_t len;

    return lb_file_read(path, 4096, &text, &len, NULL) ? NULL : text;
}

/* ----------------------------------------------------------------------- JSON */

json_t *lb_ckpt_real(double v)
{
    return isfinite(v) && v >= 0 ? json_real(round(v * 1000) / 1000) : json_null();
}

static void put_int(json_t *o, const char *key, uint64_t v)
{
    json_object_set_new(o, key, json_integer((json_int_t)v));
}

void lb_ckpt_stats_json(json_t *o, const struct lb_ckpt_stats *st)
{
    put_int(o, "pages", st->pages);
    put_int(o, "zero_pages", st->zero_pages);
    put_int(o, "same_pages", st->same_pages);
    put_int(o, "unchanged_pages", st->unchanged_pages);
    put_int(o, "delta_pages", st->delta_pages);
    put_int(o, "stored_pages", st->stored_pages);
    put_int(o, "raw_bytes", st->raw_bytes);
    put_int(o, "file_bytes", st->file_bytes);
}

void lb_ckpt_number_ref(char out[160], const char *vm, uint32_t number)
{
    if (number)
        snprintf(out, 160, "%.127s@%u", vm, number);
    else
        snprintf(out, 160, "%.127s@suspend", vm);
}

static json_t *id_json(const struct lb_ckpt_id *id)
{
    static const struct lb_ckpt_id none;
    char hex[2 * LB_CKPT_ID_BYTES + 1];

    if (!memcmp(id, &none, sizeof(none)))
        return json_string("");
    lb_hex(hex, id->b, sizeof(id->b));
    return json_string(hex);
}

static const char *key_name(enum lb_key_kind k)
{
    return k == LB_KEY_FILE ? "file" : k == LB_KEY_PASSPHRASE ? "passphrase" : "none";
}

/* What only the meta says. */
static void meta_json(json_t *o, const struct lb_ckpt_info *i)
{
    const struct lb_ckpt_meta *m = &i->meta;

    json_object_set_new(o, "label", lb_json_text(m->label));
    put_int(o, "created_ms", m->created_ms);
    json_object_set_new(o, "pause_ms", lb_ckpt_real(m->pause_ms));
    json_object_set_new(o, "no_disk", json_boolean(m->no_disk));
    put_int(o, "ram_bytes", m->desc.ram_bytes);
    lb_ckpt_stats_json(o, &i->stats);
}

json_t *lb_ckpt_entry_json(const struct lb_ckpt_entry *e)
{
    static const char *const unknown[] = {"label", "created_ms", "pause_ms", "no_disk", "ram_bytes"};
    json_t *o = json_object(), *parent = id_json(&e->info.parent);

    json_object_set_new(o, "ref", lb_json_text(e->ref));
    json_object_set_new(o, "vm", lb_json_text(e->vm));
    put_int(o, "number", e->number);
    json_object_set_new(o, "suspend", json_boolean(!e->number));
    json_object_set_new(o, "path", lb_json_text(e->path));
    put_int(o, "file_bytes", e->info.file_bytes);
    json_object_set_new(o, "encrypted", json_boolean(e->info.encrypted));
    json_object_set_new(o, "key", json_string(key_name(e->info.key_kind)));
    json_object_set_new(o, "increment", json_boolean(json_string_length(parent) > 0));
    json_object_set_new(o, "id", id_json(&e->info.id));
    json_object_set_new(o, "parent", parent);
    put_int(o, "depth", e->depth);
    json_object_set_new(o, "readable", json_boolean(e->readable));
    json_object_set_new(o, "error", lb_json_text(e->readable ? "" : e->error.message));
    json_object_set_new(o, "remedy", lb_json_text(e->readable ? "" : e->error.remedy));
    if (e->readable)
        meta_json(o, &e->info);
    for (size_t i = 0; !e->readable && i < LB_ARRAY_LEN(unknown); i++)
        json_object_set_new(o, unknown[i], json_null());
    put_int(o, "file_bytes", e->info.file_bytes); /* of the file as it is, not as it was written */
    return o;
}
