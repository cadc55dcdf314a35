/* migrate/evacuate_json.c - how far an evacuation is, as JSON: the event, and the file. See evacuate.h. */
#include <math.h>
#include <string.h>

#include "core/json.h"
#include "migrate/evacuate.h"

#define MAX_BYTES (64u << 20)
#define LEAST_S 0.05           /* of any step: the plan may say that a swap takes no time */
#define PRIOR 0.25             /* of the planned time: so much of it is believed, whatever is seen */
#define SMOOTH_S 4.0

/* ------------------------------------------------------------------------------ how far */

static double weight(const struct lb_evac_item *it)
{
    return fmax(it->end_s - it->start_s, LEAST_S);
}

struct sums {
    double whole, done;        /* seconds of steps, as planned */
    double bytes, throughput;
    unsigned n_done, n_left, n_failed, n_active;
};

static struct sums sums_of(const struct lb_evac *e)
{
    struct sums s = {.bytes = e->lost_bytes};

    for (unsigned i = 0; i < e->n_items; i++) {
        const struct lb_evac_item *it = &e->items[i];

        s.n_done += it->state == LB_EVAC_DONE;
        s.n_left += it->state == LB_EVAC_LEFT;
        s.n_failed += it->state == LB_EVAC_FAILED;
        s.n_active += it->session || it->unsettled;
        s.bytes += it->bytes;
        s.throughput += it->session ? it->throughput : 0;
        if (it->state == LB_EVAC_LEFT)
            continue;
        s.whole += weight(it);
        s.done += weight(it) * it->percent / 100;
    }
    return s;
}

static double percent_of(struct lb_evac *e, const struct sums *s)
{
    double now = e->phase == LB_EVAC_FINISHED ? 100 : s->whole > 0 ? 99 * s->done / s->whole : 0;

    e->percent = fmax(e->percent, now);
    return e->percent;
}

/* What is left of the plan, at the pace seen so far: after the part of the plan that is PRIOR half plan, half pace. Smoothed, so
 * that it does not jump with every VM; < 0: not known. */
static double eta_of(struct lb_evac *e, const struct sums *s)
{
    double prior = PRIOR * e->makespan_s, planned = s->done / e->concurrency, left, pace, finish;

    if (e->phase != LB_EVAC_RUNNING || e->makespan_s <= 0 || !s->n_active || s->whole <= s->done) {
        e->finish_at = 0;
        return lb_evac_over(e) ? 0 : -1;
    }
    pace = (e->elapsed_s + prior) / (planned + prior);
    left = (s->whole - s->done) / e->concurrency * pace;
    finish = e->elapsed_s + left;
    if (e->finish_at > 0)
        finish = e->finish_s + (finish - e->finish_s) * (1 - exp(-(e->elapsed_s - e->finish_at) / SMOOTH_S));
    e->finish_s = finish;
    e->finish_at = fmax(e->elapsed_s, 1e-3);
    return fmax(finish - e->elapsed_s, 0);
}

/* ------------------------------------------------------------------------------- writing */

static json_t *rounded(double v)
{
    return json_real(isfinite(v) ? round(v * 1000) / 1000 : 0);
}

static json_t *known(double v)
{
    return v < 0 ? json_null() : rounded(v);
}

/* What both the event and the file have. */
static json_t *item_json(const struct lb_evac_item *it)
{
    json_t *o = json_object();

    json_object_set_new(o, "vm", lb_json_text(it->vm));
    json_object_set_new(o, "kind", json_string(lb_evac_kind_name(it->kind)));
    json_object_set_new(o, "from", lb_json_text(it->from));
    json_object_set_new(o, "to", lb_json_text(it->to));
    json_object_set_new(o, "state", json_string(lb_evac_state_name(it->state)));
    json_object_set_new(o, "percent", rounded(it->percent));
    json_object_set_new(o, "bytes", json_integer((json_int_t)it->bytes));
    json_object_set_new(o, "elapsed_s", rounded(it->elapsed_s));
    json_object_set_new(o, "downtime_ms", rounded(it->downtime_ms));
    json_object_set_new(o, "tries", json_integer(it->tries));
    json_object_set_new(o, "message", lb_json_text(it->message));
    json_object_set_new(o, "remedy", lb_json_text(it->remedy));
    return o;
}

json_t *lb_evac_event(struct lb_evac *e, bool all, uint64_t now_ms)
{
    struct sums s = sums_of(e);
    json_t *o = json_object(), *items = json_array();
    double eta = eta_of(e, &s);

    json_object_set_new(o, "event", json_string("evacuation"));
    json_object_set_new(o, "phase", json_string(lb_evac_phase_name(e)));
    json_object_set_new(o, "percent", rounded(percent_of(e, &s)));
    json_object_set_new(o, "elapsed_s", rounded(e->elapsed_s));
    json_object_set_new(o, "eta_s", known(eta));
    json_object_set_new(o, "vms", json_integer(e->n_items));
    json_object_set_new(o, "done", json_integer(s.n_done));
    json_object_set_new(o, "failed", json_integer(s.n_failed));
    json_object_set_new(o, "left", json_integer(s.n_left));
    json_object_set_new(o, "active", json_integer(s.n_active));
    json_object_set_new(o, "bytes", json_integer((json_int_t)s.bytes));
    json_object_set_new(o, "bytes_planned", json_integer((json_int_t)e->bytes_planned));
    json_object_set_new(o, "throughput_bytes_per_s", rounded(s.throughput));
    json_object_set_new(o, "note", lb_json_text(e->note));
    for (unsigned i = 0; i < e->n_items; i++) {
        struct lb_evac_item *it = &e->items[i];
        json_t *v;

        if (!all && !it->changed)
            continue;
        it->changed = false;
        if (it->session && it->begun_ms)
            it->elapsed_s = (double)(now_ms - it->begun_ms) / 1000;
        v = item_json(it);
        json_object_set_new(v, "throughput_bytes_per_s", rounded(it->throughput));
        json_object_set_new(v, "eta_s", known(it->eta_s));
        json_array_append_new(items, v);
    }
    json_object_set_new(o, "items", items);
    if (lb_evac_over(e))
        json_object_set_new(o, "ok", json_boolean(e->phase == LB_EVAC_FINISHED));
    return o;
}

static json_t *names_json(char *const *v)
{
    json_t *list = json_array();

    while (v && *v)
        json_array_append_new(list, lb_json_text(*v++));
    return list;
}

static json_t *item_on_disk(const struct lb_evac_item *it)
{
    json_t *o = item_json(it);

    json_object_set_new(o, "start_s", rounded(it->start_s));
    json_object_set_new(o, "end_s", rounded(it->end_s));
    json_object_set_new(o, "bytes_planned", rounded(it->bytes_planned));
    json_object_set_new(o, "memory_bytes", rounded(it->memory_bytes));
    json_object_set_new(o, "dirty_bytes_per_s", rounded(it->dirty_bytes_per_s));
    json_object_set_new(o, "alone", json_boolean(it->alone));
    json_object_set_new(o, "throttled", json_boolean(it->throttled));
    json_object_set_new(o, "suspended", json_boolean(it->suspended));
    json_object_set_new(o, "protected", json_boolean(it->is_protected));
    json_object_set_new(o, "last_resort", json_boolean(it->last_resort));
    json_object_set_new(o, "replan", json_boolean(it->replan));
    json_object_set_new(o, "same_ok", json_boolean(it->same_ok));
    json_object_set_new(o, "soft", json_integer(it->soft));
    json_object_set_new(o, "excluded", names_json(it->excluded));
    return o;
}

static json_t *opts_json(const struct lb_evac_opts *p)
{
    json_t *o = json_object();

    json_object_set_new(o, "to", names_json(p->to));
    json_object_set_new(o, "parallel", json_integer(p->parallel));
    json_object_set_new(o, "bandwidth_bytes_per_s", json_integer((json_int_t)p->bandwidth_bytes_per_s));
    json_object_set_new(o, "priorities", lb_json_text(p->priorities_json));
    json_object_set_new(o, "suspend_rest", json_boolean(p->suspend_rest));
    json_object_set_new(o, "hot", json_integer(p->hot));
    return o;
}

json_t *lb_evac_json(const struct lb_evac *e)
{
    json_t *o = json_object(), *items = json_array(), *hosts = json_array();

    for (unsigned i = 0; i < e->n_items; i++)
        if (!e->items[i].awaited)
            json_array_append_new(items, item_on_disk(&e->items[i]));
    for (unsigned i = 0; i < e->n_hosts; i++) {
        json_t *h = json_object();

        json_object_set_new(h, "name", lb_json_text(e->hosts[i].name));
        json_object_set_new(h, "link_bytes_per_s", rounded(e->hosts[i].link_bytes_per_s));
        json_array_append_new(hosts, h);
    }
    json_object_set_new(o, "phase", json_integer(e->phase));
    json_object_set_new(o, "returning", json_boolean(e->returning));
    json_object_set_new(o, "id", lb_json_text(e->id));
    json_object_set_new(o, "host", lb_json_text(e->host));
    json_object_set_new(o, "opts", opts_json(&e->opts));
    json_object_set_new(o, "started_ms", json_integer((json_int_t)e->started_wall_ms));
    json_object_set_new(o, "elapsed_s", rounded(e->elapsed_s));
    json_object_set_new(o, "parallel", json_integer(e->parallel));
    json_object_set_new(o, "margin", rounded(e->margin));
    json_object_set_new(o, "makespan_s", rounded(e->makespan_s));
    json_object_set_new(o, "concurrency", rounded(e->concurrency));
    json_object_set_new(o, "bytes_planned", rounded(e->bytes_planned));
    json_object_set_new(o, "lost_bytes", rounded(e->lost_bytes));
    json_object_set_new(o, "percent", rounded(e->percent));
    json_object_set_new(o, "note", lb_json_text(e->note));
    json_object_set_new(o, "hosts", hosts);
    json_object_set_new(o, "items", items);
    return o;
}

/* ------------------------------------------------------------------------------- reading */

/* Each sets *bad when the field is missing or no such thing. */
static double number(const json_t *o, const char *key, bool *bad)
{
    const json_t *v = json_object_get(o, key);

    *bad |= !json_is_number(v) || !isfinite(json_number_value(v)) || json_number_value(v) < 0;
    return *bad ? 0 : json_number_value(v);
}

static uint32_t count(const json_t *o, const char *key, uint32_t max, bool *bad)
{
    uint64_t v = 0;

    *bad |= lb_json_get_u64(o, key, max, &v) != 0;
    return (uint32_t)v;
}

static bool truth(const json_t *o, const char *key, bool *bad)
{
    const json_t *v = json_object_get(o, key);

    *bad |= !json_is_boolean(v);
    return json_is_true(v);
}

static void text(const json_t *o, const char *key, char *out, size_t cap, bool *bad)
{
    *bad |= lb_json_get_string(o, key, out, cap) != 0;
}

static char **names(const json_t *o, const char *key, bool *bad)
{
    const json_t *list = json_object_get(o, key), *v;
    char **out = lb_alloc((json_array_size(list) + 1) * sizeof(*out));
    size_t i;

    *bad |= !json_is_array(list);
    json_array_foreach (list, i, v) {
        *bad |= !json_is_string(v);
        out[i] = lb_strdup(json_is_string(v) ? json_string_value(v) : "");
    }
    return out;
}

/* Index of the word; bad: none of them. */
static unsigned word(const json_t *o, const char *key, const char *(*name)(unsigned), unsigned n, bool *bad)
{
    const char *s = json_string_value(json_object_get(o, key));

    for (unsigned i = 0; s && i < n; i++)
        if (!strcmp(s, name(i)))
            return i;
    *bad = true;
    return 0;
}

static const char *kind_name(unsigned i)
{
    return lb_evac_kind_name((enum lb_evac_kind)i);
}

static const char *state_name(unsigned i)
{
    return lb_evac_state_name((enum lb_evac_state)i);
}

static void parse_item(const json_t *o, struct lb_evac_item *it, bool *bad)
{
    text(o, "vm", it->vm, sizeof(it->vm), bad);
    text(o, "from", it->from, sizeof(it->from), bad);
    text(o, "to", it->to, sizeof(it->to), bad);
    text(o, "message", it->message, sizeof(it->message), bad);
    text(o, "remedy", it->remedy, sizeof(it->remedy), bad);
    it->kind = (enum lb_evac_kind)word(o, "kind", kind_name, LB_EVAC_RESUME + 1, bad);
    it->state = (enum lb_evac_state)word(o, "state", state_name, LB_EVAC_LEFT + 1, bad);
    it->percent = number(o, "percent", bad);
    it->bytes = number(o, "bytes", bad);
    it->elapsed_s = number(o, "elapsed_s", bad);
    it->downtime_ms = number(o, "downtime_ms", bad);
    it->start_s = number(o, "start_s", bad);
    it->end_s = number(o, "end_s", bad);
    it->bytes_planned = number(o, "bytes_planned", bad);
    it->memory_bytes = number(o, "memory_bytes", bad);
    it->dirty_bytes_per_s = number(o, "dirty_bytes_per_s", bad);
    it->tries = count(o, "tries", UINT32_MAX, bad);
    it->soft = count(o, "soft", UINT32_MAX, bad);
    it->alone = truth(o, "alone", bad);
    it->throttled = truth(o, "throttled", bad);
    it->suspended = truth(o, "suspended", bad);
    it->is_protected = truth(o, "protected", bad);
    it->last_resort = truth(o, "last_resort", bad);
    it->replan = truth(o, "replan", bad);
    it->same_ok = truth(o, "same_ok", bad);
    it->excluded = names(o, "excluded", bad);
    it->eta_s = -1;
}

static void parse_opts(const json_t *o, struct lb_evac_opts *p, bool *bad)
{
    const char *priorities = json_string_value(json_object_get(o, "priorities"));

    p->to = names(o, "to", bad);
    p->parallel = count(o, "parallel", 1000, bad);
    *bad |= lb_json_get_u64(o, "bandwidth_bytes_per_s", INT64_MAX, &p->bandwidth_bytes_per_s) != 0;
    p->priorities_json = priorities && priorities[0] ? lb_strdup(priorities) : NULL;
    p->suspend_rest = truth(o, "suspend_rest", bad);
    p->hot = (enum lb_plan_hot)count(o, "hot", LB_PLAN_LEAVE, bad);
}

static void parse_lists(const json_t *o, struct lb_evac *e, bool *bad)
{
    const json_t *items = json_object_get(o, "items"), *hosts = json_object_get(o, "hosts"), *v;
    size_t i;

    *bad |= !json_is_array(items) || !json_is_array(hosts);
    e->items = lb_alloc((json_array_size(items) + 1) * sizeof(*e->items));
    e->hosts = lb_alloc((json_array_size(hosts) + 1) * sizeof(*e->hosts));
    json_array_foreach (items, i, v)
        parse_item(v, &e->items[e->n_items++], bad);
    json_array_foreach (hosts, i, v) {
        struct lb_evac_host *h = &e->hosts[e->n_hosts++];

        text(v, "name", h->name, sizeof(h->name), bad);
        h->link_bytes_per_s = number(v, "link_bytes_per_s", bad);
    }
}

struct lb_evac *lb_evac_parse(const json_t *o, struct lb_error *err)
{
    struct lb_evac *e = lb_alloc(sizeof(*e));
    bool bad = false;

    e->phase = (enum lb_evac_phase)count(o, "phase", LB_EVAC_FINISHED, &bad);
    e->returning = truth(o, "returning", &bad);
    text(o, "id", e->id, sizeof(e->id), &bad);
    text(o, "host", e->host, sizeof(e->host), &bad);
    text(o, "note", e->note, sizeof(e->note), &bad);
    parse_opts(json_object_get(o, "opts"), &e->opts, &bad);
    bad |= lb_json_get_u64(o, "started_ms", INT64_MAX, &e->started_wall_ms) != 0;
    e->elapsed_s = number(o, "elapsed_s", &bad);
    e->parallel = LB_MAX(count(o, "parallel", 1000, &bad), 1u);
    e->margin = fmax(number(o, "margin", &bad), 1);
    e->makespan_s = number(o, "makespan_s", &bad);
    e->concurrency = fmax(number(o, "concurrency", &bad), 1);
    e->bytes_planned = number(o, "bytes_planned", &bad);
    e->lost_bytes = number(o, "lost_bytes", &bad);
    e->percent = number(o, "percent", &bad);
    parse_lists(o, e, &bad);
    if (!bad)
        return e;
    lb_evac_free(e);
    lb_fail(err, LB_E_STATE, "what is saved of the evacuation is damaged");
    lb_remedy(err, "remove evacuation.json from the state directory, then evacuate again: nothing is lost by that");
    return NULL;
}

/* --------------------------------------------------------------------------------- disk */

static char *path_of(const char *state_dir)
{
    return lb_asprintf("%s/evacuation.json", state_dir);
}

int lb_evac_save(const char *state_dir, const struct lb_evac *e, struct lb_error *err)
{
    LB_AUTO_FREE char *path = path_of(state_dir);
    json_t *o = lb_evac_json(e);
    LB_AUTO_FREE char *json = json_dumps(o, JSON_COMPACT | JSON_REAL_PRECISION(15));

    json_decref(o);
    return lb_file_write_atomic(path, json, strlen(json), 0600, err);
}

struct lb_evac *lb_evac_load(const char *state_dir, struct lb_error *err)
{
    LB_AUTO_FREE char *path = path_of(state_dir);
    LB_AUTO_FREE char *json = NULL;
    struct lb_evac *e;
    json_t *o;
    size_t len;

    if (lb_file_read(path, MAX_BYTES, &json, &len, err))
        return NULL;
    o = json_loadb(json, len, JSON_REJECT_DUPLICATES, NULL);
    e = lb_evac_parse(o, err);
    json_decref(o);
    return e;
}

int lb_evac_remove(const char *state_dir, struct lb_error *err)
{
    LB_AUTO_FREE char *path = path_of(state_dir);

    return lb_file_remove(path, err);
}
