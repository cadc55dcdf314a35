/* migrate/result.c - results and progress as JSON: what --json and history show. */
#include "migrate/migrate_internal.h"

#include <jansson.h>
#include <math.h>
#include <string.h>

static void put(json_t *o, const char *key, double v)
{
    json_object_set_new(o, key, json_real(isfinite(v) ? round(v * 1000) / 1000 : 0));
}

static char *dump(json_t *o)
{
    char *s = json_dumps(o, JSON_COMPACT | JSON_REAL_PRECISION(12));

    json_decref(o);
    return s;
}

char *lb_migrate_result_json(const struct lb_vm_entry *vm, const char *peer, const char *direction,
                             uint64_t started_wall_ms, const struct lb_migrate_result *res)
{
    json_t *o = json_object();

    json_object_set_new(o, "vm", json_string(vm->name));
    json_object_set_new(o, "host", json_string(peer));
    json_object_set_new(o, "direction", json_string(direction));
    json_object_set_new(o, "started_ms", json_integer((json_int_t)started_wall_ms));
    json_object_set_new(o, "ok", json_boolean(res->ok || (res->dry_run && !res->error.code)));
    if (res->dry_run)
        json_object_set_new(o, "dry_run", json_true());
    json_object_set_new(o, "final_state", json_string(res->final_state));
    put(o, "total_ms", res->total_ms);
    if (!strcmp(direction, "out")) {
        put(o, "setup_ms", res->setup_ms);
        put(o, "downtime_ms", res->downtime_ms);
        put(o, "load_ms", res->load_ms);
        put(o, "final_dirty_pages", res->final_dirty_pages);
        json_object_set_new(o, "wire_bytes", json_integer((json_int_t)res->wire_bytes));
        json_object_set_new(o, "zero_pages", json_integer((json_int_t)res->zero_pages));
        json_object_set_new(o, "raw_pages", json_integer((json_int_t)res->raw_pages));
        json_object_set_new(o, "zstd_pages", json_integer((json_int_t)res->zstd_pages));
        json_object_set_new(o, "transport", json_string(res->transport));
        if (res->why_tcp[0])
            json_object_set_new(o, "why_tcp", json_string(res->why_tcp));
        json_object_set_new(o, "replaced_connections", json_integer(res->replaced_connections));
        json_object_set_new(o, "copied_bytes", json_integer((json_int_t)res->copied_bytes));
        json_object_set_new(o, "registered_max_bytes",
                            json_integer((json_int_t)res->registered_max_bytes));
        json_object_set_new(o, "direct_pages", json_integer((json_int_t)res->direct_pages));
        json_object_set_new(o, "damaged_pages", json_integer((json_int_t)res->damaged_pages));
    }
    json_object_set_new(o, "rounds", json_integer(res->rounds));
    if (res->digest[0])
        json_object_set_new(o, "digest", json_string(res->digest));
    if (res->error.code) {
        json_t *e = json_object();

        json_object_set_new(e, "code", json_string(lb_errcode_name(res->error.code)));
        json_object_set_new(e, "message", json_string(res->error.message));
        json_object_set_new(e, "remedy", json_string(res->error.remedy));
        json_object_set_new(o, "error", e);
    }
    return dump(o);
}

char *lb_progress_json(const struct lb_progress *p)
{
    json_t *o = json_object();

    json_object_set_new(o, "event", json_string("progress"));
    json_object_set_new(o, "state", json_string(p->state ? p->state : ""));
    json_object_set_new(o, "round", json_integer(p->round));
    put(o, "percent", p->percent);
    json_object_set_new(o, "ram_bytes", json_integer((json_int_t)p->ram_bytes));
    json_object_set_new(o, "sent_bytes", json_integer((json_int_t)p->sent_bytes));
    json_object_set_new(o, "remaining_pages", json_integer((json_int_t)p->remaining_pages));
    json_object_set_new(o, "dirty_pages", json_integer((json_int_t)p->dirty_pages));
    put(o, "dirty_rate_bytes_per_s", p->dirty_rate_bytes_per_s);
    put(o, "throughput_bytes_per_s", p->throughput_bytes_per_s);
    put(o, "predicted_downtime_ms", p->predicted_downtime_ms);
    if (p->eta_s >= 0)
        put(o, "eta_s", p->eta_s);
    else
        json_object_set_new(o, "eta_s", json_null());
    json_object_set_new(o, "converges",
                        p->converges < 0 ? json_null() : json_boolean(p->converges));
    json_object_set_new(o, "throttle_percent", json_integer(p->throttle_percent));
    json_object_set_new(o, "zstd_level", json_integer(p->zstd_level));
    json_object_set_new(o, "transport", json_string(p->transport));
    json_object_set_new(o, "registered_bytes", json_integer((json_int_t)p->registered_bytes));
    json_object_set_new(o, "note", json_string(p->note));
    return dump(o);
}
