/*
 * migrate/evacuate.c - what is done next, and what follows from what has happened. See evacuate.h.
 *
 * lb_evac_next looks at everything anew each time: with some hundreds of items that is cheap, and there is
 * no list of its own that could disagree with the items.
 */
#include "migrate/evacuate.h"

#include <math.h>
#include <string.h>

#include "core/json.h"

#define RETRY_FIRST_MS UINT64_C(2000)
#define RETRY_LONGEST_MS UINT64_C(30000)
#define REPLAN_MS UINT64_C(3000)     /* at most so often */
#define PLAN_FAILURES 3u
#define HOLD_MS UINT64_C(1000)
#define HOLD_LONGEST_MS UINT64_C(600000)
#define UNSETTLED_LONGEST_MS UINT64_C(600000)
#define MARGIN_DEFAULT 2.0
#define AT_ONCE_BACKUPS 2u           /* they have links of other hosts */
#define AT_ONCE_DISK 2u              /* suspended or resumed */

const char *lb_evac_kind_name(enum lb_evac_kind k)
{
    static const char *const names[] = {"copy", "swap", "backup", "suspend", "back", "resume"};

    return names[k];
}

const char *lb_evac_state_name(enum lb_evac_state s)
{
    static const char *const names[] = {"waits", "setup", "ready", "sending", "done", "failed", "left"};

    return names[s];
}

const char *lb_evac_phase_name(const struct lb_evac *e)
{
    static const char *const names[] = {"planned",   "running",    "replanning", "cancelling",
                                        "cancelled", "incomplete", "done"};

    if (e->phase == LB_EVAC_REPLANNING && !e->id[0])
        return "planning";
    return e->returning && e->phase == LB_EVAC_RUNNING ? "returning" : names[e->phase];
}

/* ----------------------------------------------------------------- life, and small questions */

static char **strv_copy(char *const *v)
{
    size_t n = 0;
    char **out;

    while (v && v[n])
        n++;
    out = lb_alloc((n + 1) * sizeof(*out));
    for (size_t i = 0; i < n; i++)
        out[i] = lb_strdup(v[i]);
    return out;
}

struct lb_evac *lb_evac_new(const char *host, const struct lb_evac_opts *opts, bool returning)
{
    struct lb_evac *e = lb_alloc(sizeof(*e));

    snprintf(e->host, sizeof(e->host), "%s", host);
    e->opts = *opts;
    e->opts.to = strv_copy(opts->to);
    e->opts.priorities_json = lb_strdup(opts->priorities_json);
    e->returning = returning;
    e->parallel = LB_MAX(opts->parallel, 1u);
    e->margin = MARGIN_DEFAULT;
    e->concurrency = 1;
    return e;
}

void lb_evac_free(struct lb_evac *e)
{
    if (!e)
        return;
    for (unsigned i = 0; i < e->n_items; i++)
        lb_strv_free(e->items[i].excluded);
    lb_strv_free(e->opts.to);
    free(e->opts.priorities_json);
    free(e->items);
    free(e->hosts);
    free(e);
}

static bool at_work(const struct lb_evac_item *it)
{
    return it->session || it->unsettled;
}

static bool ended(const struct lb_evac_item *it)
{
    return it->state == LB_EVAC_DONE || it->state == LB_EVAC_LEFT;
}

/* It has a link of this host to itself, or a share of it. */
static bool is_transfer(const struct lb_evac_item *it)
{
    return it->kind == LB_EVAC_COPY || it->kind == LB_EVAC_SWAP || it->kind == LB_EVAC_BACK;
}

bool lb_evac_over(const struct lb_evac *e)
{
    return e->phase >= LB_EVAC_CANCELLED;
}

struct lb_evac_item *lb_evac_find(const struct lb_evac *e, const char *vm, enum lb_evac_kind kind)
{
    for (unsigned i = 0; i < e->n_items; i++)
        if (e->items[i].kind == kind && !strcmp(e->items[i].vm, vm))
            return &e->items[i];
    return NULL;
}

struct lb_evac_item *lb_evac_mover(const struct lb_evac *e, const char *vm)
{
    for (unsigned i = 0; i < e->n_items; i++)
        if (e->items[i].kind != LB_EVAC_BACKUP && !strcmp(e->items[i].vm, vm))
            return &e->items[i];
    return NULL;
}

struct lb_evac_item *lb_evac_active(const struct lb_evac *e, const char *vm)
{
    for (unsigned i = 0; i < e->n_items; i++)
        if (at_work(&e->items[i]) && !strcmp(e->items[i].vm, vm))
            return &e->items[i];
    return NULL;
}

bool lb_evac_may_throttle(const struct lb_evac *e, const struct lb_evac_item *it)
{
    return it->throttled || (it->last_resort && e->opts.hot == LB_PLAN_THROTTLE);
}

bool lb_evac_may_pause(const struct lb_evac *e, const struct lb_evac_item *it)
{
    return it->suspended || (it->last_resort && e->opts.hot == LB_PLAN_SUSPEND);
}

char **lb_evac_excluded(const struct lb_evac *e)
{
    char **out = NULL;
    size_t n = 0;

    for (unsigned i = 0; i < e->n_items; i++)
        for (char **p = e->items[i].excluded; p && *p; p++) {
            out = lb_realloc(out, (n + 2) * sizeof(*out));
            out[n++] = lb_asprintf("%s\t%s", e->items[i].vm, *p);
        }
    if (!out)
        out = lb_alloc(sizeof(*out));
    out[n] = NULL;
    return out;
}

static struct lb_evac_host *host_of(const struct lb_evac *e, const char *name)
{
    for (unsigned i = 0; i < e->n_hosts; i++)
        if (!strcmp(e->hosts[i].name, name))
            return &e->hosts[i];
    return NULL;
}

static struct lb_evac_host *host_add(struct lb_evac *e, const char *name)
{
    struct lb_evac_host *h = host_of(e, name);

    if (h)
        return h;
    e->hosts = lb_realloc(e->hosts, (e->n_hosts + 1) * sizeof(*e->hosts));
    h = &e->hosts[e->n_hosts++];
    *h = (struct lb_evac_host){0};
    snprintf(h->name, sizeof(h->name), "%s", name);
    return h;
}

struct lb_evac_item *lb_evac_add(struct lb_evac *e, const char *vm, enum lb_evac_kind kind)
{
    struct lb_evac_item *it;

    e->items = lb_realloc(e->items, (e->n_items + 1) * sizeof(*e->items));
    it = &e->items[e->n_items++];
    *it = (struct lb_evac_item){.kind = kind, .eta_s = -1, .changed = true};
    snprintf(it->vm, sizeof(it->vm), "%s", vm);
    snprintf(it->from, sizeof(it->from), "%s", e->host);
    if (kind != LB_EVAC_BACK && kind != LB_EVAC_RESUME && kind != LB_EVAC_SUSPEND)
        e->need_plan = true;
    return it;
}

/* The host that its session talks to. NULL: none. */
static struct lb_evac_host *peer_of(struct lb_evac *e, const struct lb_evac_item *it)
{
    const char *name = it->kind == LB_EVAC_BACK || it->kind == LB_EVAC_BACKUP ? it->from : it->to;

    return name[0] && it->kind != LB_EVAC_SUSPEND && it->kind != LB_EVAC_RESUME ? host_add(e, name) : NULL;
}

static void note(struct lb_evac *e, const struct lb_evac_item *it, const char *what, const char *why)
{
    snprintf(e->note, sizeof(e->note), "%.100s %s%s%.100s", it->vm, what, why[0] ? ": " : "", why);
}

/* -------------------------------------------------------------------------------- the plan */

static double number(const json_t *o, const char *key)
{
    double v = json_number_value(json_object_get(o, key));

    return isfinite(v) && v > 0 ? v : 0;
}

static bool kind_of(const char *name, enum lb_evac_kind *kind)
{
    for (int k = LB_EVAC_COPY; name && k <= LB_EVAC_SUSPEND; k++)
        if (!strcmp(name, lb_evac_kind_name((enum lb_evac_kind)k))) {
            *kind = (enum lb_evac_kind)k;
            return true;
        }
    return false;
}

static bool valid_name(const json_t *o, const char *key)
{
    char name[128];

    return !lb_json_get_string(o, key, name, sizeof(name)) && name[0];
}

/* All of it is looked at before anything changes. */
static bool valid_plan(const json_t *plan)
{
    const json_t *steps = json_object_get(plan, "steps"), *stays = json_object_get(plan, "stays"),
                 *hosts = json_object_get(plan, "hosts"), *v;
    enum lb_evac_kind kind;
    size_t i;

    if (!json_is_array(steps) || !json_is_array(stays) || !json_is_array(hosts))
        return false;
    if (!valid_name(plan, "id"))
        return false;
    json_array_foreach (steps, i, v)
        if (!valid_name(v, "vm") || !valid_name(v, "from") || !kind_of(json_string_value(json_object_get(v, "kind")), &kind) ||
            (kind != LB_EVAC_SUSPEND && !valid_name(v, "to")))
            return false;
    json_array_foreach (stays, i, v)
        if (!valid_name(v, "vm"))
            return false;
    json_array_foreach (hosts, i, v)
        if (!valid_name(v, "name"))
            return false;
    return true;
}

/* The item that a step or a stay is about. NULL: a new plan does not matter to it any more. */
static struct lb_evac_item *item_for(struct lb_evac *e, const char *vm, bool backup, enum lb_evac_kind kind)
{
    struct lb_evac_item *it = backup ? lb_evac_find(e, vm, LB_EVAC_BACKUP) : lb_evac_mover(e, vm);

    if (!it)
        it = lb_evac_add(e, vm, kind);
    return at_work(it) || it->state == LB_EVAC_DONE || it->kind == LB_EVAC_SUSPEND || (it->state == LB_EVAC_LEFT && it->tries)
               ? NULL
               : it;
}

static bool is_excluded(const struct lb_evac_item *it, const char *host)
{
    for (char **p = it->excluded; p && *p; p++)
        if (host && !strcmp(*p, host))
            return true;
    return false;
}

static void take_step(struct lb_evac *e, const json_t *v)
{
    const char *vm = json_string_value(json_object_get(v, "vm")), *to = json_string_value(json_object_get(v, "to"));
    enum lb_evac_kind kind = LB_EVAC_COPY;
    struct lb_evac_item *it;

    kind_of(json_string_value(json_object_get(v, "kind")), &kind);
    it = item_for(e, vm, kind == LB_EVAC_BACKUP, kind);
    if (!it || is_excluded(it, to)) /* the latter: since it was asked for */
        return;
    it->kind = kind;
    if (strcmp(it->to, to ? to : ""))
        it->retry_ms = 0;
    it->to[0] = '\0';
    lb_json_get_string(v, "from", it->from, sizeof(it->from));
    lb_json_get_string(v, "to", it->to, sizeof(it->to));
    it->start_s = number(v, "start_s");
    it->end_s = number(v, "end_s");
    it->downtime_ms = number(v, "downtime_ms");
    it->bytes_planned = number(v, "bytes");
    it->memory_bytes = number(v, "memory_bytes");
    it->dirty_bytes_per_s = number(v, "dirty_bytes_per_s");
    it->alone = json_is_true(json_object_get(v, "alone")) || it->last_resort;
    it->throttled = json_is_true(json_object_get(v, "throttled"));
    it->suspended = json_is_true(json_object_get(v, "suspended"));
    it->is_protected = json_is_true(json_object_get(v, "protected")) || kind == LB_EVAC_SWAP;
    it->state = LB_EVAC_WAITS;
    it->replan = it->awaited = false;
    it->changed = true;
    if (it->to[0])
        host_add(e, it->to);
}

/* No host can take it - unless the one that it was for is only silent for a while, or is the only one
 * there is for a second try. */
static void take_stay(struct lb_evac *e, const json_t *v, uint64_t now)
{
    const char *vm = json_string_value(json_object_get(v, "vm"));
    const char *reason = json_string_value(json_object_get(v, "reason"));
    const char *remedy = json_string_value(json_object_get(v, "remedy"));
    bool backup = json_is_true(json_object_get(v, "backup"));
    struct lb_evac_item *it = item_for(e, vm, backup, backup ? LB_EVAC_BACKUP : LB_EVAC_COPY);
    struct lb_evac_host *h = it ? host_of(e, it->to) : NULL;
    char text[sizeof(it->message)];

    if (!it)
        return;
    it->changed = true;
    if (h && ((h->failures && h->failures < LB_EVAC_HOST_FAILURES) || (it->same_ok && it->tries < LB_EVAC_TRIES))) {
        it->retry_ms = LB_MAX(now + RETRY_FIRST_MS, h->not_before_ms);
        it->replan = false;
        return;
    }
    if (it->tries && it->message[0])
        snprintf(text, sizeof(text), "%.250s; elsewhere: %.240s", it->message, reason ? reason : "");
    else
        snprintf(text, sizeof(text), "%s", reason ? reason : "no host can take it");
    lb_evac_leave(e, it, text, remedy ? remedy : "");
}

static void take_hosts(struct lb_evac *e, const json_t *hosts)
{
    const json_t *v;
    size_t i;

    json_array_foreach (hosts, i, v)
        host_add(e, json_string_value(json_object_get(v, "name")))->link_bytes_per_s = number(v, "link_bytes_per_s");
}

/* Those that are at work or have ended keep their places before all others, which go by their planned start. New
 * steps come in that order, so hardly anything moves. */
static bool comes_before(const struct lb_evac_item *x, const struct lb_evac_item *y)
{
    bool old_x = at_work(x) || ended(x), old_y = at_work(y) || ended(y);

    return old_x != old_y ? old_x : !old_x && x->start_s < y->start_s;
}

static void sort_items(struct lb_evac *e)
{
    for (unsigned i = 1; i < e->n_items; i++) {
        struct lb_evac_item it = e->items[i];
        unsigned k = i;

        while (k > 0 && comes_before(&it, &e->items[k - 1]))
            k--;
        memmove(&e->items[k + 1], &e->items[k], (i - k) * sizeof(it));
        e->items[k] = it;
    }
}

/* How many steps the plan has at work at once, on average: what its progress is measured by. */
static double concurrency_of(const json_t *steps, double makespan)
{
    const json_t *v;
    double sum = 0;
    size_t i;

    json_array_foreach (steps, i, v)
        sum += LB_MAX(number(v, "end_s") - number(v, "start_s"), 0);
    return makespan > 0 ? LB_MAX(sum / makespan, 1) : 1;
}

static bool needs_plan(const struct lb_evac_item *it)
{
    return !ended(it) && !it->awaited && (it->replan || (!it->to[0] && it->kind != LB_EVAC_SUSPEND && it->kind != LB_EVAC_RESUME));
}

/* The plan says nothing of it: it has left already, or it stays. Of a VM that runs elsewhere, and has lost its
 * backup meanwhile, no plan knows that it needs one. */
static void not_in_plan(struct lb_evac_item *it)
{
    if (it->kind == LB_EVAC_BACKUP && it->to[0] && it->tries < LB_EVAC_TRIES) {
        it->replan = false;
        return;
    }
    if (!it->error.code)
        it->error = (struct lb_error){.code = LB_E_STATE, .message = "it was not there when this was planned",
                                      .remedy = "evacuate again"};
    it->tries = LB_EVAC_TRIES;
    it->replan = false;
    it->unsettled = true;
}

static bool plans_backup(const json_t *plan, const char *vm)
{
    static const char *const lists[] = {"steps", "stays"};
    const json_t *v;
    size_t i;

    for (size_t k = 0; k < LB_ARRAY_LEN(lists); k++)
        json_array_foreach (json_object_get(plan, lists[k]), i, v)
            if (!strcmp(json_string_value(json_object_get(v, "vm")), vm) &&
                (k ? json_is_true(json_object_get(v, "backup"))
                   : !strcmp(json_string_value(json_object_get(v, "kind")), "backup")))
                return true;
    return false;
}

/* Of a VM that is still here the plan knows what backup it has: one that was planned before may not be needed any more, as
 * the VM goes to just that host now. */
static void forget_backups(struct lb_evac *e, const json_t *plan)
{
    unsigned n = 0;

    for (unsigned i = 0; i < e->n_items; i++) {
        struct lb_evac_item *it = &e->items[i], *m = lb_evac_mover(e, it->vm);

        if (it->kind == LB_EVAC_BACKUP && !at_work(it) && !ended(it) && m && !at_work(m) && !ended(m) &&
            !plans_backup(plan, it->vm))
            lb_strv_free(it->excluded);
        else
            e->items[n++] = *it;
    }
    e->n_items = n;
}

int lb_evac_planned(struct lb_evac *e, const json_t *plan, uint64_t now_ms, struct lb_error *err)
{
    const json_t *steps = json_object_get(plan, "steps"), *v;
    bool again = e->need_plan; /* something has failed since it was asked for */
    uint64_t parallel = 0;
    size_t i;

    if (!valid_plan(plan)) {
        lb_fail(err, LB_E_PROTO, "the plan cannot be understood");
        return lb_remedy(err, "this should never happen: keep the log of lifeboatd and report it");
    }
    lb_json_get_string(plan, "id", e->id, sizeof(e->id));
    lb_json_get_string(plan, "host", e->host, sizeof(e->host));
    lb_json_get_u64(plan, "parallel", 1000, &parallel);
    e->parallel = e->opts.parallel ? e->opts.parallel : LB_MAX((uint32_t)parallel, 1u);
    e->margin = LB_MAX(number(plan, "margin"), 1);
    e->makespan_s = number(plan, "makespan_s");
    e->concurrency = concurrency_of(steps, e->makespan_s);
    take_hosts(e, json_object_get(plan, "hosts"));
    json_array_foreach (steps, i, v)
        take_step(e, v);
    json_array_foreach (json_object_get(plan, "stays"), i, v)
        take_stay(e, v, now_ms);
    forget_backups(e, plan);
    for (unsigned k = 0; !again && k < e->n_items; k++)
        if (!at_work(&e->items[k]) && needs_plan(&e->items[k]))
            not_in_plan(&e->items[k]);
    e->bytes_planned = 0;
    for (unsigned k = 0; k < e->n_items; k++)
        e->bytes_planned += e->items[k].bytes_planned;
    sort_items(e);
    e->planning = false;
    e->need_plan = again;
    e->plan_failures = 0;
    e->plan_ms = now_ms + REPLAN_MS;
    if (e->phase == LB_EVAC_REPLANNING)
        e->phase = LB_EVAC_RUNNING;
    return 0;
}

void lb_evac_not_planned(struct lb_evac *e, const struct lb_error *why, uint64_t now_ms)
{
    e->planning = false;
    if (e->phase == LB_EVAC_REPLANNING)
        e->phase = LB_EVAC_RUNNING;
    if (++e->plan_failures < PLAN_FAILURES) {
        e->need_plan = true;
        e->plan_ms = now_ms + (RETRY_FIRST_MS << e->plan_failures);
        return;
    }
    e->need_plan = false;
    e->plan_failures = 0;
    for (unsigned i = 0; i < e->n_items; i++) {
        struct lb_evac_item *it = &e->items[i];

        if (!at_work(it) && needs_plan(it))
            lb_evac_leave(e, it, it->message[0] ? it->message : why->message,
                          it->message[0] ? it->remedy : why->remedy);
    }
    snprintf(e->note, sizeof(e->note), "no new plan: %.200s", why->message);
}

void lb_evac_start(struct lb_evac *e, uint64_t now_ms, uint64_t wall_ms)
{
    if (!e->started_wall_ms)
        e->started_wall_ms = wall_ms;
    if (e->phase != LB_EVAC_CANCELLING)
        e->phase = LB_EVAC_RUNNING;
    e->seen_ms = now_ms;
    if (!e->id[0] && !e->returning)
        e->need_plan = true;
    for (unsigned i = 0; i < e->n_items; i++) {
        struct lb_evac_item *it = &e->items[i];

        it->changed = true;
        it->unsettled |= !it->session && it->state >= LB_EVAC_SETUP && it->state <= LB_EVAC_SENDING;
        e->need_plan |= !it->unsettled && !e->returning && needs_plan(it);
    }
}

void lb_evac_cancel(struct lb_evac *e)
{
    if (lb_evac_over(e))
        return;
    e->phase = LB_EVAC_CANCELLING;
    e->need_plan = e->planning = false;
    snprintf(e->note, sizeof(e->note), "cancelled: what has not been handed over runs on here");
}

/* ------------------------------------------------------------------------- what happens */

void lb_evac_await(struct lb_evac *e, const char *vm, const char *why, uint64_t now_ms)
{
    struct lb_evac_item *it = lb_evac_mover(e, vm);
    bool need_plan = e->need_plan;

    if (!it)
        it = lb_evac_add(e, vm, LB_EVAC_COPY);
    e->need_plan = need_plan;
    it->state = LB_EVAC_WAITS;
    it->awaited = it->changed = true;
    it->held_ms = now_ms;
    snprintf(it->message, sizeof(it->message), "%s", why);
    note(e, it, "is waited for", why);
}

void lb_evac_free_again(struct lb_evac *e, struct lb_evac_item *it)
{
    it->awaited = false;
    it->held_ms = 0;
    it->replan = it->changed = true;
    e->need_plan = true;
}

void lb_evac_leave(struct lb_evac *e, struct lb_evac_item *it, const char *message, const char *remedy)
{
    /* message may be it->message */
    LB_AUTO_FREE char *m = lb_strdup(message), *r = lb_strdup(remedy);

    it->session = it->unsettled = it->replan = it->awaited = false;
    it->changed = true;
    it->eta_s = -1;
    it->throughput = 0;
    snprintf(it->message, sizeof(it->message), "%s", m);
    snprintf(it->remedy, sizeof(it->remedy), "%s", r);
    if (e->opts.suspend_rest && (it->kind == LB_EVAC_COPY || it->kind == LB_EVAC_SWAP)) {
        it->kind = LB_EVAC_SUSPEND;
        it->state = LB_EVAC_WAITS;
        it->to[0] = '\0';
        it->tries = it->soft = 0;
        it->retry_ms = 0;
        return;
    }
    it->state = LB_EVAC_LEFT;
    note(e, it, "stays", m);
}

static void done(struct lb_evac *e, struct lb_evac_item *it, uint64_t now)
{
    struct lb_evac_host *h = peer_of(e, it);

    it->session = it->unsettled = it->awaited = false;
    it->state = LB_EVAC_DONE;
    it->tries = LB_MAX(it->tries, 1u); /* one that an earlier supervisor began may not be counted */
    it->percent = 100;
    it->throughput = 0;
    it->eta_s = -1;
    it->message[0] = it->remedy[0] = '\0';
    if (it->begun_ms)
        it->elapsed_s = (double)(now - it->begun_ms) / 1000;
    it->changed = true;
    if (h)
        h->failures = 0;
}

/* Not there again: what is left is planned anew. */
static void elsewhere(struct lb_evac *e, struct lb_evac_item *it)
{
    size_t n = 0;

    it->replan = true;
    e->need_plan = true;
    if (!it->to[0] || is_excluded(it, it->to))
        return;
    while (it->excluded && it->excluded[n])
        n++;
    it->excluded = lb_realloc(it->excluded, (n + 2) * sizeof(*it->excluded));
    it->excluded[n] = lb_strdup(it->to);
    it->excluded[n + 1] = NULL;
}

/* Several that fail in the same outage count once. */
static void host_failed(struct lb_evac *e, struct lb_evac_host *h, uint64_t now)
{
    if (now < h->not_before_ms)
        return;
    h->failures++;
    h->not_before_ms = now + LB_MIN(RETRY_FIRST_MS << LB_MIN(h->failures - 1, 8u), RETRY_LONGEST_MS);
    if (h->failures > 1 && !e->returning)
        e->need_plan = true;
}

/* A silent host says nothing about the VM: that is a try only if something was sent, or if it has been silent
 * for this one VM again and again. */
static void net_failure(struct lb_evac *e, struct lb_evac_item *it, bool sent, uint64_t now)
{
    struct lb_evac_host *h = peer_of(e, it);

    if (h)
        host_failed(e, h, now);
    it->retry_ms = h ? h->not_before_ms : now + RETRY_FIRST_MS;
    if (sent)
        return;
    if (++it->soft < LB_EVAC_HOST_FAILURES) {
        it->tries--;
        return;
    }
    it->soft = 0;
    if (e->returning)
        return;
    elsewhere(e, it);
}

/* What a failure is about, and so where the next try is. */
enum blame {
    NOBODY,      /* the same host, later */
    PERHAPS,     /* another host; this one again when there is no other */
    HOST,        /* another host */
    OPERATOR,    /* nowhere */
};

static enum blame blame_of(const struct lb_evac_item *it)
{
    enum lb_errcode code = it->error.code;

    if (it->kind == LB_EVAC_SWAP && (code == LB_E_NOT_FOUND || code == LB_E_AUTH))
        return NOBODY; /* the backup is not there any more: a copy may still go there */
    switch (code) {
    case LB_E_HV:
    case LB_E_PROTO:
        return PERHAPS;
    case LB_E_PREFLIGHT:
    case LB_E_NO_SPACE:
    case LB_E_EXISTS:
    case LB_E_AUTH:
    case LB_E_UNSUPPORTED:
    case LB_E_NOT_FOUND:
        return HOST;
    case LB_E_CANCELLED:
    case LB_E_USAGE:
        return OPERATOR;
    default:
        return NOBODY;
    }
}

/* Can a new plan give it another host? */
static bool has_choice(const struct lb_evac_item *it)
{
    return it->kind == LB_EVAC_COPY || it->kind == LB_EVAC_SWAP || it->kind == LB_EVAC_BACKUP;
}

/* It did fail: when and where again? */
static void judge(struct lb_evac *e, struct lb_evac_item *it, bool sent, uint64_t now)
{
    bool hot = it->error.code == LB_E_NO_CONVERGE;
    enum blame b = blame_of(it);

    snprintf(it->message, sizeof(it->message), "%s", it->error.message);
    snprintf(it->remedy, sizeof(it->remedy), "%s", it->error.remedy);
    it->state = LB_EVAC_FAILED;
    note(e, it, "failed", it->message);
    it->retry_ms = now + LB_MIN(RETRY_FIRST_MS << LB_MIN(it->tries, 8u), RETRY_LONGEST_MS);
    if (it->error.code == LB_E_NET)
        net_failure(e, it, sent, now);
    if (b == NOBODY && !hot && it->tries + 1 == LB_EVAC_TRIES) /* the last one is not for the same again */
        b = PERHAPS;
    if (b == OPERATOR || it->tries >= LB_EVAC_TRIES || (hot && it->last_resort) || (b == HOST && !has_choice(it))) {
        lb_evac_leave(e, it, it->message, it->remedy);
    } else if (hot) {
        it->last_resort = it->alone = true;
    } else if (b != NOBODY && has_choice(it)) {
        it->same_ok = b == PERHAPS;
        elsewhere(e, it);
    }
}

void lb_evac_settled(struct lb_evac *e, struct lb_evac_item *it, uint64_t now_ms)
{
    bool sent = it->state == LB_EVAC_SENDING, ours = it->cancel_asked || e->phase == LB_EVAC_CANCELLING;

    e->lost_bytes += it->bytes;
    it->session = it->unsettled = it->handed_over = it->cancel_asked = false;
    it->percent = it->bytes = it->throughput = 0;
    it->eta_s = -1;
    it->changed = true;
    if (it->error.code && !ours) {
        judge(e, it, sent, now_ms);
        return;
    }
    it->state = LB_EVAC_WAITS;
    it->tries -= it->tries > 0;
}

void lb_evac_gone(struct lb_evac *e, struct lb_evac_item *it, uint64_t now_ms)
{
    done(e, it, now_ms);
}

void lb_evac_died(struct lb_evac *e, struct lb_evac_item *it, uint64_t now_ms)
{
    done(e, it, now_ms);
    snprintf(it->message, sizeof(it->message), "its process has ended");
    snprintf(it->remedy, sizeof(it->remedy), "`lifeboat release` forgets it");
    note(e, it, "is dead", it->message);
}

void lb_evac_ended(struct lb_evac *e, struct lb_evac_item *it, const struct lb_error *err, uint64_t now_ms)
{
    it->error = err ? *err : (struct lb_error)LB_ERROR_INIT;
    it->session = false;
    it->changed = true;
    it->held_ms = it->unsettled_ms = 0;
    it->unsettled = it->kind != LB_EVAC_BACKUP;
    if (!it->unsettled && err)
        lb_evac_settled(e, it, now_ms);
    else if (!it->unsettled)
        done(e, it, now_ms);
}

void lb_evac_hold(struct lb_evac *e, struct lb_evac_item *it, const char *why, uint64_t now_ms)
{
    it->session = false;
    it->changed = true;
    it->tries--;
    it->state = LB_EVAC_WAITS;
    it->retry_ms = now_ms + HOLD_MS;
    if (!it->held_ms)
        it->held_ms = now_ms;
    snprintf(it->message, sizeof(it->message), "%s", why);
    if (now_ms - it->held_ms > HOLD_LONGEST_MS)
        lb_evac_leave(e, it, it->message, "end that, then evacuate again");
}

void lb_evac_found(struct lb_evac *e, struct lb_evac_item *it, const char *to, uint64_t now_ms)
{
    it->session = true;
    it->unsettled = it->replan = false;
    it->changed = true;
    if (!it->begun_ms)
        it->begun_ms = now_ms;
    it->state = LB_EVAC_SETUP; /* what it says of itself comes next */
    if (to[0] && it->kind == LB_EVAC_COPY) {
        snprintf(it->to, sizeof(it->to), "%s", to);
        host_add(e, to);
    }
}

void lb_evac_not_told(struct lb_evac *e, struct lb_evac_item *it)
{
    it->retry_ms = e->seen_ms + HOLD_MS / 4;
    it->changed = true;
    if (it->cancel_asked)
        it->cancel_asked = false;
    else if (it->state == LB_EVAC_SENDING)
        it->state = LB_EVAC_READY;
}

static void keep(double *slot, double said)
{
    if (said >= 0)
        *slot = said;
}

void lb_evac_progress(struct lb_evac *e, struct lb_evac_item *it, const struct lb_evac_progress *p)
{
    struct lb_evac_host *h = p->state >= LB_EVAC_READY ? peer_of(e, it) : NULL;

    if (!it->session)
        return;
    if (h)
        h->failures = 0;
    it->held_ms = 0;
    it->changed = true;
    it->message[0] = it->remedy[0] = '\0';
    if (p->state > it->state)
        it->state = p->state;
    it->handed_over |= p->handed_over;
    keep(&it->percent, p->percent);
    keep(&it->bytes, p->bytes);
    keep(&it->throughput, p->throughput);
    keep(&it->dirty_bytes_per_s, p->dirty_bytes_per_s);
    it->eta_s = p->eta_s;
}

/* ------------------------------------------------------------------------- what is next */

static bool order(struct lb_evac_order *o, enum lb_evac_do what, struct lb_evac_item *it)
{
    o->what = what;
    o->item = it;
    if (it)
        it->changed = true;
    return true;
}

static bool next_cancel(struct lb_evac *e, uint64_t now, struct lb_evac_order *o)
{
    for (unsigned i = 0; e->phase == LB_EVAC_CANCELLING && i < e->n_items; i++) {
        struct lb_evac_item *it = &e->items[i];

        if (!it->session || it->cancel_asked || it->handed_over || now < it->retry_ms ||
            (it->kind != LB_EVAC_COPY && it->kind != LB_EVAC_SUSPEND && it->kind != LB_EVAC_BACK))
            continue;
        it->cancel_asked = true;
        return order(o, LB_EVAC_DO_CANCEL, it);
    }
    return false;
}

static bool next_plan(struct lb_evac *e, uint64_t now, struct lb_evac_order *o)
{
    if (!e->need_plan || e->planning || now < e->plan_ms)
        return false;
    e->planning = true;
    e->need_plan = false;
    e->phase = LB_EVAC_REPLANNING;
    return order(o, LB_EVAC_DO_PLAN, NULL);
}

struct load {
    unsigned n;
    double hottest;
    bool alone;
};

static void add_load(struct load *l, const struct lb_evac_item *it)
{
    l->n++;
    l->hottest = fmax(l->hottest, it->dirty_bytes_per_s);
    l->alone |= it->alone;
}

static bool has_share(const struct lb_evac *e, const struct load *l, double link, double dirty)
{
    return !link || link / (l->n + 1) >= e->margin * fmax(l->hottest, dirty);
}

/* As the planner has it (plan_time.c), with what is really sent now. */
static bool admits(const struct lb_evac *e, const struct lb_evac_item *it)
{
    const struct lb_evac_host *here = host_of(e, e->host), *there = host_of(e, it->to);
    struct load out = {0}, in = {0};

    for (unsigned i = 0; i < e->n_items; i++) {
        const struct lb_evac_item *x = &e->items[i];

        if (x->kind != LB_EVAC_COPY || x->state != LB_EVAC_SENDING || !at_work(x))
            continue;
        add_load(&out, x);
        if (!strcmp(x->to, it->to))
            add_load(&in, x);
    }
    if (!out.n)
        return true;
    return !it->alone && !out.alone && has_share(e, &out, here ? here->link_bytes_per_s : 0, it->dirty_bytes_per_s) &&
           has_share(e, &in, there ? there->link_bytes_per_s : 0, it->dirty_bytes_per_s);
}

static bool next_go(struct lb_evac *e, uint64_t now, struct lb_evac_order *o)
{
    for (unsigned i = 0; i < e->n_items; i++) {
        struct lb_evac_item *it = &e->items[i];

        if (it->state != LB_EVAC_READY || !it->session || now < it->retry_ms || !admits(e, it))
            continue;
        it->state = LB_EVAC_SENDING;
        return order(o, LB_EVAC_DO_GO, it);
    }
    return false;
}

/* What is at work, of each kind that has places of its own. */
struct places {
    unsigned transfers, kinds[LB_EVAC_RESUME + 1];
};

static struct places places_of(const struct lb_evac *e)
{
    struct places p = {0};

    for (unsigned i = 0; i < e->n_items; i++)
        if (at_work(&e->items[i])) {
            p.transfers += is_transfer(&e->items[i]);
            p.kinds[e->items[i].kind]++;
        }
    return p;
}

/* Is there room for one more of its kind? */
static bool has_place(const struct lb_evac *e, const struct places *p, const struct lb_evac_item *it)
{
    if (is_transfer(it))
        return p->transfers < e->parallel;
    return p->kinds[it->kind] < (it->kind == LB_EVAC_BACKUP ? AT_ONCE_BACKUPS : AT_ONCE_DISK);
}

/* A new backup of a VM that moves waits for that; of one that does not leave, none is needed: its old one is
 * elsewhere. */
static bool move_is_over(struct lb_evac *e, struct lb_evac_item *it, uint64_t now)
{
    const struct lb_evac_item *m = it->kind == LB_EVAC_BACKUP ? lb_evac_mover(e, it->vm) : NULL;

    if (!m)
        return true;
    if (m->state == LB_EVAC_LEFT || (m->state == LB_EVAC_DONE && (m->kind == LB_EVAC_SUSPEND || m->message[0])))
        done(e, it, now); /* it runs on here, or not at all */
    if (m->state != LB_EVAC_DONE || ended(it))
        return false;
    snprintf(it->from, sizeof(it->from), "%s", m->to);
    return true;
}

static bool is_due(struct lb_evac *e, const struct places *p, struct lb_evac_item *it, uint64_t now)
{
    const struct lb_evac_host *h;

    if ((it->state != LB_EVAC_WAITS && it->state != LB_EVAC_FAILED) || at_work(it) || it->replan || it->awaited ||
        now < it->retry_ms)
        return false;
    if (!it->to[0] && it->kind != LB_EVAC_SUSPEND && it->kind != LB_EVAC_RESUME)
        return false;
    if (!has_place(e, p, it) || !move_is_over(e, it, now))
        return false;
    h = peer_of(e, it);
    if ((h && now < h->not_before_ms) || lb_evac_active(e, it->vm))
        return false;
    /* its protection ends before it is copied: it does not wait for a go later */
    return !it->is_protected || it->kind != LB_EVAC_COPY || admits(e, it);
}

static bool next_begin(struct lb_evac *e, uint64_t now, struct lb_evac_order *o)
{
    struct places p = places_of(e);

    for (unsigned i = 0; i < e->n_items; i++) {
        struct lb_evac_item *it = &e->items[i];

        if (!is_due(e, &p, it, now))
            continue;
        it->state = LB_EVAC_SETUP;
        it->session = true;
        it->cancel_asked = false;
        it->tries++;
        it->begun_ms = now;
        it->elapsed_s = 0;
        it->error = (struct lb_error)LB_ERROR_INIT;
        return order(o, LB_EVAC_DO_BEGIN, it);
    }
    return false;
}

static bool next_end(struct lb_evac *e, struct lb_evac_order *o)
{
    enum lb_evac_phase end = e->phase == LB_EVAC_CANCELLING ? LB_EVAC_CANCELLED : LB_EVAC_FINISHED;

    if (end == LB_EVAC_FINISHED && (e->planning || e->need_plan))
        return false;
    for (unsigned i = 0; i < e->n_items; i++) {
        if (at_work(&e->items[i]) || (end == LB_EVAC_FINISHED && !ended(&e->items[i])))
            return false;
    }
    for (unsigned i = 0; end == LB_EVAC_FINISHED && i < e->n_items; i++)
        if (e->items[i].state == LB_EVAC_LEFT)
            end = LB_EVAC_INCOMPLETE;
    if (end == LB_EVAC_FINISHED && !e->returning && !e->id[0]) /* nothing was ever planned */
        end = LB_EVAC_INCOMPLETE;
    e->phase = end;
    return order(o, LB_EVAC_DO_END, NULL);
}

/* What is waited for does not come, for long: a host that took a VM over cannot be asked - recovery goes on without
 * us -, or what works on it does not end. */
static void give_up_waiting(struct lb_evac *e, uint64_t now)
{
    for (unsigned i = 0; i < e->n_items; i++) {
        struct lb_evac_item *it = &e->items[i];

        if (it->awaited && now - it->held_ms > HOLD_LONGEST_MS)
            lb_evac_leave(e, it, it->message, "end that, then evacuate again");
        if (!it->unsettled)
            continue;
        if (!it->unsettled_ms)
            it->unsettled_ms = now;
        if (now - it->unsettled_ms > UNSETTLED_LONGEST_MS)
            lb_evac_leave(e, it, it->error.code ? it->error.message : "where it runs is not known yet",
                          "`lifeboat status` of it here, and `lifeboat recover`");
    }
}

bool lb_evac_next(struct lb_evac *e, uint64_t now_ms, struct lb_evac_order *o)
{
    if (e->phase == LB_EVAC_PLANNED || lb_evac_over(e))
        return false;
    if (e->seen_ms)
        e->elapsed_s += (double)(now_ms - e->seen_ms) / 1000;
    e->seen_ms = now_ms;
    give_up_waiting(e, now_ms);
    if (e->phase == LB_EVAC_CANCELLING)
        return next_cancel(e, now_ms, o) || next_end(e, o);
    return next_plan(e, now_ms, o) || next_go(e, now_ms, o) || next_begin(e, now_ms, o) || next_end(e, o);
}
