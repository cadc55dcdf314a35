/* remus/record.c - protect.json and remus.json of a VM: one JSON object each, replaced as a whole.
 *
 * remus.json decides after a crash which of two copies of a guest may run. So what cannot be
 * understood is an error, never "none"; and a move first compares the caller's copy with the
 * file: two processes that work on the same protection cannot both go on. */
#include "remus/record.h"
#include "core/registry.h"
#include "remus/lease.h"
#include "core/json.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <string.h>

enum {
    MAX_BYTES = 64 << 10,
    MAX_INTERVAL_MS = 1000,
    MAX_LEASE_MS = 60000,
    MAX_CHANNELS = 64,
};

/* What may follow what; the table in record.h says what each phase means. A phase may be written
 * again: its other fields (revision, nonce, detail) become known while it lasts. */
static const struct lb_sm_state moves[] = {
    [LB_PH_NONE] = {"none", LB_SM_TO(LB_PH_ARMING) | LB_SM_TO(LB_PH_RECEIVING)},
    [LB_PH_ARMING] = {"arming", LB_SM_TO(LB_PH_ARMING) | LB_SM_TO(LB_PH_PROTECTED) |
                                    LB_SM_TO(LB_PH_ALONE) | LB_SM_TO(LB_PH_FENCED)},
    [LB_PH_PROTECTED] = {"protected", LB_SM_TO(LB_PH_PROTECTED) | LB_SM_TO(LB_PH_ALONE) |
                                          LB_SM_TO(LB_PH_YIELDED) | LB_SM_TO(LB_PH_FENCED)},
    [LB_PH_ALONE] = {"alone", LB_SM_TO(LB_PH_ALONE)},
    [LB_PH_YIELDED] = {"yielded", LB_SM_TO(LB_PH_YIELDED) | LB_SM_TO(LB_PH_ALONE) |
                                      LB_SM_TO(LB_PH_FENCED)},
    [LB_PH_FENCED] = {"fenced", LB_SM_TO(LB_PH_FENCED)},
    [LB_PH_RECEIVING] = {"receiving", LB_SM_TO(LB_PH_RECEIVING) | LB_SM_TO(LB_PH_STANDBY)},
    [LB_PH_STANDBY] = {"standby", LB_SM_TO(LB_PH_STANDBY) | LB_SM_TO(LB_PH_PROMOTING)},
    [LB_PH_PROMOTING] = {"promoting", LB_SM_TO(LB_PH_PROMOTING) | LB_SM_TO(LB_PH_PROMOTED)},
    [LB_PH_PROMOTED] = {"promoted", LB_SM_TO(LB_PH_PROMOTED)},
};

static const char *const transports[] = {"auto", "tcp", "rdma"}; /* by enum lb_transport_wish */
static const char *const disk_modes[] = {
    [LB_DISK_REPLICATE] = "replicate",
    [LB_DISK_NONE] = "none",
};

const char *lb_phase_name(enum lb_phase p)
{
    return (unsigned)p < LB_ARRAY_LEN(moves) ? moves[p].name : "unknown";
}

/* ------------------------------------------------------------------- reading */

static int get_u32(const json_t *o, const char *key, uint32_t max, uint32_t *out)
{
    uint64_t v;

    if (lb_json_get_u64(o, key, max, &v))
        return -1;
    *out = (uint32_t)v;
    return 0;
}

static int get_bool(const json_t *o, const char *key, bool *out)
{
    const json_t *v = json_object_get(o, key);

    if (!json_is_boolean(v))
        return -1;
    *out = json_is_true(v);
    return 0;
}

static int get_name(const json_t *o, const char *key, const char *const *names, unsigned n,
                    unsigned *out)
{
    const char *s = json_string_value(json_object_get(o, key));

    for (unsigned i = 0; s && i < n; i++)
        if (names[i] && !strcmp(names[i], s)) {
            *out = i;
            return 0;
        }
    return -1;
}

/* *text: NULL when there is no such file. */
static int read_file(const char *state_dir, const char *vm, const char *file, char **path,
                     char **text, struct lb_error *err)
{
    struct lb_error why = LB_ERROR_INIT;
    size_t len;

    *text = NULL;
    if (!lb_vm_name_valid(vm))
        return lb_fail(err, LB_E_USAGE, "\"%.80s\" is not a valid VM name", vm);
    *path = lb_asprintf("%s/vms/%s/%s", state_dir, vm, file);
    if (!lb_file_read(*path, MAX_BYTES, text, &len, &why) || why.code == LB_E_NOT_FOUND)
        return 0;
    if (err)
        *err = why;
    return -1;
}

static int save_file(const char *state_dir, const char *vm, const char *file, const char *text,
                     struct lb_error *err)
{
    if (!lb_vm_name_valid(vm))
        return lb_fail(err, LB_E_USAGE, "\"%.80s\" is not a valid VM name", vm);
    LB_AUTO_FREE char *dir = lb_vm_dir(state_dir, vm, true);
    LB_AUTO_FREE char *path = lb_asprintf("%s/%s", dir, file);
    return lb_file_write_atomic(path, text, strlen(text), 0600, err);
}

static int remove_file(const char *state_dir, const char *vm, const char *file, struct lb_error *err)
{
    if (!lb_vm_name_valid(vm))
        return lb_fail(err, LB_E_USAGE, "\"%.80s\" is not a valid VM name", vm);
    LB_AUTO_FREE char *dir = lb_vm_dir(state_dir, vm, false);
    LB_AUTO_FREE char *path = lb_asprintf("%s/%s", dir, file);

    return lb_file_remove(path, err);
}

/* ------------------------------------------------------------------ the wish */

static const char *parse_opts(const json_t *o, struct lb_protect_opts *p)
{
    unsigned mode;

    if (get_u32(o, "interval_ms", MAX_INTERVAL_MS, &p->interval_ms))
        return "\"interval_ms\" is missing or wrong";
    if (get_bool(o, "adaptive", &p->adaptive))
        return "\"adaptive\" is missing or wrong";
    if (get_name(o, "disk", disk_modes, LB_ARRAY_LEN(disk_modes), &mode))
        return "\"disk\" is missing or unknown";
    p->disk = (enum lb_disk_mode)mode;
    if (lb_json_get_string(o, "witness", p->witness, sizeof(p->witness)) || !*p->witness)
        return "\"witness\" is missing or wrong";
    if (get_u32(o, "lease_ms", MAX_LEASE_MS, &p->lease_ms) ||
        (p->lease_ms && p->lease_ms < LB_LEASE_MIN_MS))
        return "\"lease_ms\" is missing or wrong";
    if (lb_json_get_u64(o, "bandwidth_bytes_per_s", INT64_MAX, &p->bandwidth_bytes_per_s))
        return "\"bandwidth_bytes_per_s\" is missing or wrong";
    if (lb_json_get_u64(o, "delta_cache_bytes", INT64_MAX, &p->delta_cache_bytes))
        return "\"delta_cache_bytes\" is missing or wrong";
    if (get_u32(o, "channels", MAX_CHANNELS, &p->channels))
        return "\"channels\" is missing or wrong";
    if (get_bool(o, "insecure_plaintext", &p->insecure_plaintext))
        return "\"insecure_plaintext\" is missing or wrong";
    /* not known to the first version */
    if (json_object_get(o, "transport") &&
        get_name(o, "transport", transports, LB_ARRAY_LEN(transports), &p->transport))
        return "\"transport\" is unknown";
    return NULL;
}

static const char *parse_wish(const json_t *o, struct lb_protect_wish *w)
{
    const json_t *backups = json_object_get(o, "backups"), *took;
    const char *wrong = parse_opts(o, &w->opts);
    uint32_t failovers;

    if (wrong)
        return wrong;
    if (!json_is_array(backups) || json_array_size(backups) > LB_PROTECT_MAX_BACKUPS)
        return "\"backups\" is missing or too long";
    for (w->n_backups = 0; w->n_backups < json_array_size(backups); w->n_backups++) {
        const json_t *v = json_array_get(backups, w->n_backups);

        if (!json_is_string(v) || !json_string_length(v) ||
            json_string_length(v) >= sizeof(w->backups[0]))
            return "a host in \"backups\" is no name";
        snprintf(w->backups[w->n_backups], sizeof(w->backups[0]), "%s", json_string_value(v));
    }
    if (get_u32(o, "failovers", UINT32_MAX, &failovers) ||
        lb_json_get_u64(o, "last_failover_ms", INT64_MAX, &w->last_failover_ms))
        return "\"failovers\" or \"last_failover_ms\" is missing or wrong";
    w->failovers = failovers;
    took = json_object_get(o, "last_failover_took_ms");
    if (!json_is_number(took) || json_number_value(took) < 0)
        return "\"last_failover_took_ms\" is missing or wrong";
    w->last_failover_took_ms = json_number_value(took);
    /* absent in files of older versions */
    if ((json_object_get(o, "unprotected_since_ms") &&
         lb_json_get_u64(o, "unprotected_since_ms", INT64_MAX, &w->unprotected_since_ms)) ||
        (json_object_get(o, "last_gap_ms") && lb_json_get_u64(o, "last_gap_ms", INT64_MAX, &w->last_gap_ms)))
        return "\"unprotected_since_ms\" or \"last_gap_ms\" is wrong";
    return NULL;
}

int lb_wish_parse(const char *json, struct lb_protect_wish *out, struct lb_error *err)
{
    struct lb_protect_wish w;
    const char *wrong;
    json_error_t jerr;
    json_t *o;

    memset(&w, 0, sizeof(w));
    if (strlen(json) > MAX_BYTES)
        return lb_fail(err, LB_E_PROTO, "a wish for protection of %zu bytes", strlen(json));
    o = json_loads(json, JSON_REJECT_DUPLICATES, &jerr);
    if (!o)
        return lb_fail(err, LB_E_PROTO, "a wish for protection that is no JSON: %s", jerr.text);
    wrong = parse_wish(o, &w);
    json_decref(o);
    if (wrong)
        return lb_fail(err, LB_E_PROTO, "a wish for protection that is wrong: %s", wrong);
    *out = w;
    return 0;
}

char *lb_wish_json(const struct lb_protect_wish *w)
{
    const struct lb_protect_opts *p = &w->opts;
    json_t *o = json_object(), *backups = json_array();
    char *text;

    json_object_set_new(o, "interval_ms", json_integer(p->interval_ms));
    json_object_set_new(o, "adaptive", json_boolean(p->adaptive));
    json_object_set_new(o, "disk", json_string(disk_modes[p->disk]));
    json_object_set_new(o, "witness", lb_json_text(p->witness));
    json_object_set_new(o, "lease_ms", json_integer(p->lease_ms));
    json_object_set_new(o, "bandwidth_bytes_per_s",
                        json_integer((json_int_t)p->bandwidth_bytes_per_s));
    json_object_set_new(o, "delta_cache_bytes", json_integer((json_int_t)p->delta_cache_bytes));
    json_object_set_new(o, "channels", json_integer(p->channels));
    json_object_set_new(o, "insecure_plaintext", json_boolean(p->insecure_plaintext));
    json_object_set_new(o, "transport", json_string(transports[p->transport]));
    for (unsigned i = 0; i < w->n_backups; i++)
        json_array_append_new(backups, lb_json_text(w->backups[i]));
    json_object_set_new(o, "backups", backups);
    json_object_set_new(o, "failovers", json_integer(w->failovers));
    json_object_set_new(o, "last_failover_ms", json_integer((json_int_t)w->last_failover_ms));
    json_object_set_new(o, "last_failover_took_ms", json_real(w->last_failover_took_ms));
    json_object_set_new(o, "unprotected_since_ms", json_integer((json_int_t)w->unprotected_since_ms));
    json_object_set_new(o, "last_gap_ms", json_integer((json_int_t)w->last_gap_ms));
    text = json_dumps(o, JSON_INDENT(2));
    json_decref(o);
    assert(text);
    return text;
}

int lb_wish_load(const char *state_dir, const char *vm, struct lb_protect_wish *out,
                 struct lb_error *err)
{
    LB_AUTO_FREE char *path = NULL;
    LB_AUTO_FREE char *text = NULL;
    struct lb_error why = LB_ERROR_INIT;

    if (read_file(state_dir, vm, "protect.json", &path, &text, err))
        return -1;
    if (!text) {
        lb_fail(err, LB_E_NOT_FOUND, "VM %s is not protected", vm);
        return lb_remedy(err, "`lifeboat protect %s` does that", vm);
    }
    if (lb_wish_parse(text, out, &why)) {
        lb_fail(err, LB_E_STATE, "%s is damaged: %s", path, why.message);
        return lb_remedy(err, "`lifeboat unprotect %s`, then protect it again", vm);
    }
    return 0;
}

int lb_wish_save(const char *state_dir, const char *vm, const struct lb_protect_wish *w,
                 struct lb_error *err)
{
    LB_AUTO_FREE char *text = lb_wish_json(w);

    return save_file(state_dir, vm, "protect.json", text, err);
}

int lb_wish_remove(const char *state_dir, const char *vm, struct lb_error *err)
{
    return remove_file(state_dir, vm, "protect.json", err);
}

/* ---------------------------------------------------------------- the record */

static int get_phase(const json_t *o, enum lb_phase *out)
{
    const char *s = json_string_value(json_object_get(o, "phase"));

    for (unsigned i = LB_PH_NONE + 1; s && i < LB_ARRAY_LEN(moves); i++)
        if (!strcmp(moves[i].name, s)) {
            *out = (enum lb_phase)i;
            return 0;
        }
    return -1;
}

static const char *parse_record(const json_t *o, struct lb_remus_record *r)
{
    if (lb_json_get_string(o, "id", r->id, sizeof(r->id)) || strlen(r->id) != LB_PROTECT_ID_HEX - 1)
        return "\"id\" is missing or wrong";
    if (get_phase(o, &r->phase))
        return "\"phase\" is missing or unknown";
    if (lb_json_get_string(o, "peer", r->peer, sizeof(r->peer)) ||
        lb_json_get_string(o, "peer_key", r->peer_key, sizeof(r->peer_key)))
        return "\"peer\" or \"peer_key\" is missing or wrong";
    if (lb_json_get_string(o, "witness", r->witness, sizeof(r->witness)) ||
        lb_json_get_string(o, "key", r->key, sizeof(r->key)))
        return "\"witness\" or \"key\" is missing or wrong";
    if (lb_json_get_u64(o, "revision", INT64_MAX, &r->revision))
        return "\"revision\" is missing or wrong";
    if (lb_json_get_string(o, "nonce", r->nonce, sizeof(r->nonce)) ||
        lb_json_get_string(o, "detail", r->detail, sizeof(r->detail)))
        return "\"nonce\" or \"detail\" is missing or wrong";
    if (lb_json_get_u64(o, "changed_ms", INT64_MAX, &r->changed_ms))
        return "\"changed_ms\" is missing or wrong";
    return NULL;
}

int lb_record_load(const char *state_dir, const char *vm, struct lb_remus_record *out,
                   struct lb_error *err)
{
    LB_AUTO_FREE char *path = NULL;
    LB_AUTO_FREE char *text = NULL;
    struct lb_remus_record r;
    const char *wrong;
    json_error_t jerr;
    json_t *o;

    memset(&r, 0, sizeof(r));
    if (read_file(state_dir, vm, "remus.json", &path, &text, err))
        return -1;
    if (!text) {
        *out = r;
        return 0;
    }
    o = json_loads(text, JSON_REJECT_DUPLICATES, &jerr);
    wrong = o ? parse_record(o, &r) : jerr.text;
    json_decref(o);
    if (wrong) {
        lb_fail(err, LB_E_STATE, "%s is damaged: %s", path, wrong);
        return lb_remedy(err, "it says which copy of VM %s may run: find out on the other host first, "
                              "then stop the VM here or move this file away", vm);
    }
    *out = r;
    return 0;
}

static char *record_json(const struct lb_remus_record *r)
{
    json_t *o = json_object();
    char *text;

    json_object_set_new(o, "id", lb_json_text(r->id));
    json_object_set_new(o, "phase", json_string(lb_phase_name(r->phase)));
    json_object_set_new(o, "peer", lb_json_text(r->peer));
    json_object_set_new(o, "peer_key", lb_json_text(r->peer_key));
    json_object_set_new(o, "witness", lb_json_text(r->witness));
    json_object_set_new(o, "key", lb_json_text(r->key));
    json_object_set_new(o, "revision", json_integer((json_int_t)r->revision));
    json_object_set_new(o, "nonce", lb_json_text(r->nonce));
    json_object_set_new(o, "changed_ms", json_integer((json_int_t)r->changed_ms));
    json_object_set_new(o, "detail", lb_json_text(r->detail));
    text = json_dumps(o, JSON_INDENT(2));
    json_decref(o);
    assert(text);
    return text;
}

int lb_record_move(const char *state_dir, const char *vm, struct lb_remus_record *r,
                   enum lb_phase to, struct lb_error *err)
{
    struct lb_remus_record on_disk, next = *r;
    struct lb_sm sm;

    assert(strlen(r->id) == LB_PROTECT_ID_HEX - 1);
    lb_sm_init(&sm, "protection", moves, LB_ARRAY_LEN(moves), r->phase);
    lb_sm_move(&sm, to);
    if (lb_record_load(state_dir, vm, &on_disk, err))
        return -1;
    if (on_disk.phase != r->phase || (on_disk.phase != LB_PH_NONE && strcmp(on_disk.id, r->id)))
        return lb_fail(err, LB_E_STATE,
                       "the record of VM %s is at \"%s\" of protection %.8s, not at \"%s\" of %.8s: "
                       "somebody else works on it or an earlier one was not recovered",
                       vm, lb_phase_name(on_disk.phase), on_disk.id, lb_phase_name(r->phase), r->id);
    next.phase = to;
    next.changed_ms = lb_wall_ms();
    LB_AUTO_FREE char *text = record_json(&next);
    if (save_file(state_dir, vm, "remus.json", text, err))
        return -1;
    *r = next;
    return 0;
}

int lb_record_remove(const char *state_dir, const char *vm, struct lb_error *err)
{
    return remove_file(state_dir, vm, "remus.json", err);
}
