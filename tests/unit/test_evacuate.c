/*
 * migrate/evacuate.c in a simulated world: hosts that refuse, vanish and come back, sessions that fail, are
 * killed and hand over without an answer, a supervisor that is restarted from its file at any step.
 *
 * After each run: every VM is DONE and not here, or LEFT with a reason and here; none was ever begun while a
 * session worked on it, and no more sent at once than the links carry.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <jansson.h>
#include <string.h>

#include "migrate/evacuate.h"

/* ------------------------------------------------------------------------------- the world */

#define N_HOSTS 4 /* "a" is emptied */
#define MAX_VMS 24
#define STEP_MS 250
#define LINK 100e6

static const char *const host_names[N_HOSTS] = {"a", "b", "c", "d"};

enum work { NOTHING, SETUP, READY, SENDING, HANDED_OVER, UNDECIDED };
struct vm {
    char name[16];
    int host;
    double dirty;
    bool suspended, has_backup_here;
    /* the session at work on it */
    enum work work;
    enum lb_evac_kind kind;
    int to;
    unsigned left;         /* steps of this phase */
    bool cancelled, go;
    int begun;
};
struct world {
    uint64_t now;
    unsigned seed;
    struct vm v[MAX_VMS];
    unsigned n;
    bool down[N_HOSTS], full[N_HOSTS];
    unsigned trouble;      /* of 1000 per session and step: it fails */
    unsigned outage;       /* of 1000 per step: a host goes, or comes back */
    bool plan_asked;
    unsigned plan_left, plans;
    struct lb_evac *e;
    unsigned steps, begun, restarts;
    unsigned hot_vm;       /* index + 1: never converges */
    bool never_plan;
};

static unsigned pick(struct world *w, unsigned n)
{
    w->seed = w->seed * 1103515245u + 12345u;
    return (w->seed >> 8) % n;
}

static bool chance(struct world *w, unsigned of_1000)
{
    return pick(w, 1000) < of_1000;
}

static struct vm *vm_of(struct world *w, const char *name)
{
    for (unsigned i = 0; i < w->n; i++)
        if (!strcmp(w->v[i].name, name))
            return &w->v[i];
    fail_msg("no VM %s", name);
    return NULL;
}

static int host_of(const char *name)
{
    for (int h = 0; h < N_HOSTS; h++)
        if (!strcmp(host_names[h], name))
            return h;
    fail_msg("no host \"%s\"", name);
    return -1;
}

/* ----------------------------------------------------------------------------- the planner */

static bool excluded(struct world *w, const char *vm, int host)
{
    char **v = lb_evac_excluded(w->e);
    LB_AUTO_FREE char *want = lb_asprintf("%s\t%s", vm, host_names[host]);
    bool found = false;

    for (char **p = v; *p; p++)
        found |= !strcmp(*p, want);
    lb_strv_free(v);
    return found;
}

static json_t *plan_step(const char *vm, const char *kind, const char *from, const char *to, double start, double dirty)
{
    return json_pack("{s:s, s:s, s:s, s:s, s:f, s:f, s:f, s:f, s:f, s:f, s:b}", "vm", vm, "kind", kind, "from", from, "to", to,
                     "start_s", start, "end_s", start + 5, "downtime_ms", 20.0, "bytes", 1e8, "memory_bytes", 1e8,
                     "dirty_bytes_per_s", dirty, "alone", 0);
}

/* Hosts by turns; what no host may take stays. */
static json_t *make_plan(struct world *w)
{
    json_t *steps = json_array(), *stays = json_array(), *hosts = json_array();
    unsigned turn = 0, n = 0;

    for (unsigned i = 0; i < w->n; i++) {
        struct vm *v = &w->v[i];
        int to = 0;

        for (unsigned k = 0; k < N_HOSTS - 1 && !to; k++) {
            int h = 1 + (int)((turn + k) % (N_HOSTS - 1));

            if (!w->down[h] && !w->full[h] && !excluded(w, v->name, h))
                to = h;
        }
        turn++;
        if (v->has_backup_here && to && v->host != 0)
            json_array_append_new(steps, plan_step(v->name, "backup", host_names[v->host], host_names[to == v->host ? 1 + to % 3 : to],
                                                   n++, v->dirty));
        if (v->host != 0 || v->suspended)
            continue;
        if (to)
            json_array_append_new(steps, plan_step(v->name, "copy", "a", host_names[to], n++, v->dirty));
        else
            json_array_append_new(stays, json_pack("{s:s, s:b, s:s, s:s}", "vm", v->name, "backup", 0, "reason",
                                                   "no host has room", "remedy", "make room"));
    }
    for (int h = 0; h < N_HOSTS; h++)
        json_array_append_new(hosts, json_pack("{s:s, s:f}", "name", host_names[h], "link_bytes_per_s", LINK));
    return json_pack("{s:s, s:s, s:f, s:i, s:f, s:o, s:o, s:o}", "event", "plan", "id", "p1", "makespan_s", n * 2.5,
                     "parallel", 3, "margin", 2.0, "steps", steps, "stays", stays, "hosts", hosts);
}

static void work_plan(struct world *w)
{
    struct lb_error err = LB_ERROR_INIT;
    json_t *plan;

    if (!w->plan_asked || w->plan_left--)
        return;
    w->plan_asked = false;
    w->plans++;
    if (!w->e->planning)
        return;
    if (w->never_plan || chance(w, w->trouble)) {
        lb_fail(&err, LB_E_INTERNAL, "the planner was killed");
        lb_evac_not_planned(w->e, &err, w->now);
        return;
    }
    plan = make_plan(w);
    assert_int_equal(lb_evac_planned(w->e, plan, w->now, &err), 0);
    json_decref(plan);
}

/* ---------------------------------------------------------------------------- the sessions */

static struct lb_evac_item *item_of(struct world *w, const struct vm *v)
{
    struct lb_evac_item *it = lb_evac_active(w->e, v->name);

    return it && it->kind == v->kind && it->session ? it : NULL;
}

static void tell(struct world *w, struct vm *v)
{
    static const enum lb_evac_state said[] = {[SETUP] = LB_EVAC_SETUP, [READY] = LB_EVAC_READY,
                                              [SENDING] = LB_EVAC_SENDING, [HANDED_OVER] = LB_EVAC_SENDING};
    struct lb_evac_progress p = {.state = said[v->work], .handed_over = v->work == HANDED_OVER, .percent = 50,
                                 .bytes = v->work >= SENDING ? 5e7 : 0, .dirty_bytes_per_s = v->dirty, .eta_s = 1};
    struct lb_evac_item *it = item_of(w, v);

    if (it)
        lb_evac_progress(w->e, it, &p);
}

/* Its process is gone; what it said last may not have been heard. */
static void session_ends(struct world *w, struct vm *v, enum lb_errcode code)
{
    struct lb_evac_item *it = item_of(w, v);
    struct lb_error err = LB_ERROR_INIT;

    v->work = v->work == HANDED_OVER && code == LB_E_UNDECIDED ? UNDECIDED : NOTHING;
    if (v->work == UNDECIDED)
        v->left = pick(w, 20);
    if (code)
        lb_fail(&err, code, "failed with %s", lb_errcode_name(code));
    if (it)
        lb_evac_ended(w->e, it, code ? &err : NULL, w->now);
}

static enum lb_errcode some_failure(struct world *w)
{
    static const enum lb_errcode codes[] = {LB_E_INTERNAL, LB_E_EXISTS, LB_E_STATE,    LB_E_PREFLIGHT,   LB_E_NET,
                                            LB_E_AUTH,     LB_E_PROTO,  LB_E_HV,       LB_E_NO_CONVERGE, LB_E_NO_SPACE,
                                            LB_E_UNSUPPORTED, LB_E_NOT_FOUND, LB_E_USAGE, LB_E_CANCELLED};

    return codes[pick(w, LB_ARRAY_LEN(codes))];
}

static void arrive(struct world *w, struct vm *v)
{
    if (v->kind == LB_EVAC_COPY)
        v->host = v->to;
    else if (v->kind == LB_EVAC_SUSPEND)
        v->suspended = true;
    else if (v->kind == LB_EVAC_BACKUP)
        v->has_backup_here = false;
    session_ends(w, v, LB_OK);
}

static void work_session(struct world *w, struct vm *v)
{
    if (v->work == UNDECIDED) { /* recovery */
        if (v->left--)
            return;
        v->work = NOTHING;
        if (chance(w, 500))
            v->host = v->to;
        return;
    }
    if (v->work == NOTHING)
        return;
    if (v->cancelled && v->work < HANDED_OVER) {
        session_ends(w, v, LB_E_CANCELLED);
        return;
    }
    if (v->work == HANDED_OVER && (w->down[v->to] || chance(w, w->trouble))) {
        session_ends(w, v, LB_E_UNDECIDED);
        return;
    }
    if (v->kind != LB_EVAC_SUSPEND && w->down[v->to]) {
        session_ends(w, v, LB_E_NET);
        return;
    }
    if (v->kind == LB_EVAC_COPY && v->work == SETUP && w->full[v->to]) {
        session_ends(w, v, LB_E_NO_SPACE);
        return;
    }
    if (v->work == SENDING && w->hot_vm && v == &w->v[w->hot_vm - 1]) {
        session_ends(w, v, LB_E_NO_CONVERGE);
        return;
    }
    if (v->work < HANDED_OVER && chance(w, w->trouble)) {
        session_ends(w, v, some_failure(w));
        return;
    }
    if (v->work == READY && !v->go) {
        tell(w, v);
        return;
    }
    if (v->left--) {
        tell(w, v);
        return;
    }
    v->left = pick(w, 6);
    if (v->kind != LB_EVAC_COPY || v->work == HANDED_OVER) {
        arrive(w, v);
        return;
    }
    v->work++;
    tell(w, v);
}

/* ----------------------------------------------------------- the supervisor, as in cmd/daemon/evacuate.c */

static bool reached(const struct lb_evac_item *it, const struct vm *v)
{
    return it->kind == LB_EVAC_BACKUP ? !v->has_backup_here : v->host != 0 || v->suspended;
}

static void settle(struct world *w, struct lb_evac_item *it)
{
    struct vm *v = vm_of(w, it->vm);

    if (v->work == UNDECIDED)
        return;
    if (v->work != NOTHING && v->kind == it->kind) {
        lb_evac_found(w->e, it, host_names[v->to], w->now);
        tell(w, v);
    } else if (v->work == NOTHING && it->kind == LB_EVAC_BACKUP) {
        lb_evac_settled(w->e, it, w->now);
    } else if (v->work == NOTHING && reached(it, v)) {
        lb_evac_gone(w->e, it, w->now);
    } else if (v->work == NOTHING) {
        lb_evac_settled(w->e, it, w->now);
    }
}

static unsigned count(struct world *w, enum work from, enum work to)
{
    unsigned n = 0;

    for (unsigned i = 0; i < w->n; i++)
        n += w->v[i].kind == LB_EVAC_COPY && w->v[i].work >= from && w->v[i].work <= to;
    return n;
}

static void begin(struct world *w, struct lb_evac_item *it)
{
    struct vm *v = vm_of(w, it->vm);

    assert_false(lb_evac_over(w->e));
    assert_int_not_equal(w->e->phase, LB_EVAC_CANCELLING);
    if (v->work == UNDECIDED || chance(w, w->trouble)) {
        lb_evac_hold(w->e, it, "a checkpoint is taken", w->now);
        return;
    }
    if (v->work != NOTHING) { /* the file was old */
        assert_true(w->restarts > 0);
        if (v->kind == it->kind) {
            lb_evac_found(w->e, it, host_names[v->to], w->now);
            tell(w, v);
        } else {
            lb_evac_hold(w->e, it, "something else works on it", w->now);
        }
        return;
    }
    if (reached(it, v)) {
        lb_evac_gone(w->e, it, w->now);
        return;
    }
    if (it->kind == LB_EVAC_COPY)
        assert_false(excluded(w, it->vm, host_of(it->to)) && it->error.code == LB_E_PREFLIGHT);
    v->work = SETUP;
    v->kind = it->kind;
    v->to = it->kind == LB_EVAC_SUSPEND ? 0 : host_of(it->to);
    v->left = pick(w, 6);
    v->cancelled = v->go = false;
    v->begun++;
    w->begun++;
    if (it->kind == LB_EVAC_COPY && !w->restarts)
        assert_true(count(w, SETUP, HANDED_OVER) <= w->e->parallel);
}

/* One more sends: do the links carry it? */
static void check_links(struct world *w, const struct lb_evac_item *it)
{
    const struct vm *me = vm_of(w, it->vm);
    double hottest = it->dirty_bytes_per_s;
    unsigned n = 1;

    for (unsigned i = 0; i < w->n; i++)
        if (&w->v[i] != me && w->v[i].kind == LB_EVAC_COPY && (w->v[i].work == SENDING || w->v[i].work == HANDED_OVER)) {
            n++;
            hottest = LB_MAX(hottest, w->v[i].dirty);
        }
    if (n > 1 && !w->restarts)
        assert_true(LINK / n >= 2.0 * hottest && !it->alone);
}

static void orders(struct world *w)
{
    struct lb_evac_order o;

    for (unsigned i = 0; i < w->e->n_items; i++)
        if (w->e->items[i].unsettled)
            settle(w, &w->e->items[i]);
    while (lb_evac_next(w->e, w->now, &o)) {
        struct vm *v = o.item ? vm_of(w, o.item->vm) : NULL;

        switch (o.what) {
        case LB_EVAC_DO_PLAN:
            w->plan_asked = true;
            w->plan_left = pick(w, 10);
            break;
        case LB_EVAC_DO_BEGIN:
            begin(w, o.item);
            break;
        case LB_EVAC_DO_GO:
            assert_int_equal(v->work, READY);
            check_links(w, o.item);
            if (chance(w, w->trouble))
                lb_evac_not_told(w->e, o.item);
            else
                v->go = true;
            break;
        case LB_EVAC_DO_CANCEL:
            assert_int_equal(w->e->phase, LB_EVAC_CANCELLING);
            v->cancelled = true;
            break;
        case LB_EVAC_DO_END:
            assert_true(lb_evac_over(w->e));
            break;
        }
    }
}

static void restart(struct world *w, json_t *file)
{
    struct lb_error err = LB_ERROR_INIT;
    struct lb_evac *e = lb_evac_parse(file, &err);

    assert_non_null(e);
    json_decref(file);
    lb_evac_free(w->e);
    w->e = e;
    w->plan_asked = false;
    w->restarts++;
    if (!lb_evac_over(e))
        lb_evac_start(e, w->now, 0);
}

static void world_step(struct world *w)
{
    w->steps++;
    w->now += STEP_MS;
    if (chance(w, w->outage)) {
        int h = 1 + (int)pick(w, N_HOSTS - 1);
        w->down[h] = !w->down[h];
    }
    if (chance(w, w->outage))
        w->full[1 + pick(w, N_HOSTS - 1)] ^= true;
    work_plan(w);
    for (unsigned i = 0; i < w->n; i++)
        work_session(w, &w->v[i]);
    orders(w);
}

static void world_new(struct world *w, unsigned seed, unsigned n, const struct lb_evac_opts *opts)
{
    *w = (struct world){.now = 1000000, .seed = seed * 2654435761u + 1, .n = n};
    for (unsigned i = 0; i < n; i++) {
        snprintf(w->v[i].name, sizeof(w->v[i].name), "vm%u", i);
        w->v[i].dirty = pick(w, 40) * 1e6;
    }
    w->e = lb_evac_new("a", opts, false);
    lb_evac_start(w->e, w->now, 1);
}

static void check_end(struct world *w)
{
    unsigned left = 0;

    if (!lb_evac_over(w->e)) {
        json_t *o = lb_evac_event(w->e, true, w->now);
        fail_msg("it does not end: %s", json_dumps(o, 0));
    }
    for (unsigned i = 0; i < w->n; i++)
        assert_int_equal(w->v[i].work, NOTHING);
    for (unsigned i = 0; i < w->e->n_items; i++) {
        const struct lb_evac_item *it = &w->e->items[i];
        const struct vm *v = vm_of(w, it->vm);

        left += it->state == LB_EVAC_LEFT;
        if (w->e->phase != LB_EVAC_CANCELLED)
            assert_true(it->state == LB_EVAC_DONE || it->state == LB_EVAC_LEFT);
        if (it->kind == LB_EVAC_BACKUP)
            continue;
        assert_int_equal(it->state == LB_EVAC_DONE, v->host != 0 || v->suspended);
        if (it->state == LB_EVAC_LEFT)
            assert_true(it->message[0] != '\0');
    }
    if (w->e->phase != LB_EVAC_CANCELLED && w->e->id[0])
        assert_int_equal(w->e->phase, left ? LB_EVAC_INCOMPLETE : LB_EVAC_FINISHED);
    for (unsigned i = 0; i < w->n && w->e->phase == LB_EVAC_FINISHED; i++)
        assert_true(w->v[i].host != 0 || w->v[i].suspended);
}

static void run(struct world *w)
{
    while (!lb_evac_over(w->e) && w->steps < 40000)
        world_step(w);
    check_end(w);
    lb_evac_free(w->e);
}

static const struct lb_evac_opts plain = {.hot = LB_PLAN_THROTTLE};

/* ---------------------------------------------------------------------------------- tests */

static void test_calm(void **state)
{
    struct world w;
    (void)state;

    for (unsigned seed = 1; seed < 30; seed++) {
        world_new(&w, seed, 12, &plain);
        while (!lb_evac_over(w.e) && w.steps < 40000)
            world_step(&w);
        check_end(&w);
        assert_int_equal(w.e->phase, LB_EVAC_FINISHED);
        assert_int_equal(w.begun, 12);
        assert_int_equal(w.plans, 1);
        lb_evac_free(w.e);
    }
}

static void test_trouble(void **state)
{
    unsigned all_left = 0, begun = 0;
    (void)state;

    for (unsigned seed = 1; seed < 3000; seed++) {
        struct world w;
        struct lb_evac_opts o = plain;

        o.suspend_rest = seed % 5 == 0;
        o.parallel = seed % 3 == 0 ? 5 : 0;
        world_new(&w, seed, 3 + seed % 15, &o);
        w.trouble = seed % 50;
        w.outage = seed % 7;
        run(&w);
        begun += w.begun;
        all_left += w.begun > 0;
    }
    assert_true(all_left > 300 && begun > 3000); /* it was about something */
}

/* The file of each moment, or an old one; the sessions go on or die with the supervisor. */
static void test_restarts(void **state)
{
    (void)state;
    for (unsigned seed = 1; seed < 1500; seed++) {
        struct world w;
        json_t *old = NULL;

        world_new(&w, seed, 8, &plain);
        w.trouble = seed % 4 ? 0 : 20;
        while (!lb_evac_over(w.e) && w.steps < 40000) {
            world_step(&w);
            if (!chance(&w, 100))
                continue;
            if (!old)
                old = lb_evac_json(w.e);
            if (chance(&w, 300)) { /* what was written long ago */
                restart(&w, old);
                old = NULL;
                continue;
            }
            for (unsigned i = 0; i < w.n && chance(&w, 300); i++)
                if (w.v[i].work != NOTHING && w.v[i].work != UNDECIDED && w.v[i].work != HANDED_OVER)
                    w.v[i].work = NOTHING; /* killed at the same moment */
            restart(&w, lb_evac_json(w.e));
        }
        json_decref(old);
        check_end(&w);
        lb_evac_free(w.e);
    }
}

/* At every single step of one run. */
static void test_restart_everywhere(void **state)
{
    (void)state;
    for (unsigned at = 1; at < 150; at++) {
        struct world w;

        world_new(&w, 77, 6, &plain);
        while (!lb_evac_over(w.e) && w.steps < 40000) {
            world_step(&w);
            if (w.steps == at)
                restart(&w, lb_evac_json(w.e));
        }
        check_end(&w);
        assert_int_equal(w.e->phase, LB_EVAC_FINISHED);
        assert_int_equal(w.begun, 6); /* none twice */
        lb_evac_free(w.e);
    }
}

static void test_cancel(void **state)
{
    unsigned stayed = 0;
    (void)state;

    for (unsigned at = 1; at < 120; at++) {
        struct world w;

        world_new(&w, at, 8, &plain);
        w.trouble = at % 3 ? 0 : 30;
        while (!lb_evac_over(w.e) && w.steps < 40000) {
            world_step(&w);
            if (w.steps == at)
                lb_evac_cancel(w.e);
            if (w.steps == at + 2 && !lb_evac_over(w.e))
                restart(&w, lb_evac_json(w.e));
        }
        check_end(&w);
        for (unsigned i = 0; i < w.n; i++)
            stayed += w.v[i].host == 0;
        lb_evac_free(w.e);
        /* a second one finishes the job */
        w.e = lb_evac_new("a", &plain, false);
        lb_evac_start(w.e, w.now, 1);
        w.trouble = w.steps = 0;
        w.plan_asked = false;
        while (!lb_evac_over(w.e) && w.steps < 40000)
            world_step(&w);
        check_end(&w);
        assert_int_equal(w.e->phase, LB_EVAC_FINISHED);
        lb_evac_free(w.e);
    }
    assert_true(stayed > 100);
}

/* A host that goes for some seconds costs nobody a try; one that stays away costs no VM anything but time
 * when there is another. */
static void test_outage(void **state)
{
    struct world w;
    (void)state;

    world_new(&w, 5, 12, &plain);
    for (int h = 1; h < N_HOSTS; h++)
        w.down[h] = false;
    while (!lb_evac_over(w.e) && w.steps < 40000) {
        world_step(&w);
        if (w.steps == 30)
            w.down[1] = w.down[2] = w.down[3] = true;
        if (w.steps == 30 + 40) /* 10 s */
            w.down[1] = w.down[2] = w.down[3] = false;
    }
    check_end(&w);
    assert_int_equal(w.e->phase, LB_EVAC_FINISHED);
    lb_evac_free(w.e);

    world_new(&w, 6, 12, &plain);
    while (!lb_evac_over(w.e) && w.steps < 40000) {
        world_step(&w);
        w.down[2] = w.steps > 40;
    }
    for (unsigned i = 0; i < w.n; i++) /* what it had before, it has */
        if (w.v[i].host == 0)
            fail_msg("%s did not leave", w.v[i].name);
    assert_int_equal(w.e->phase, LB_EVAC_FINISHED);
    lb_evac_free(w.e);

    /* nowhere to go, for ever */
    world_new(&w, 7, 12, &plain);
    while (!lb_evac_over(w.e) && w.steps < 40000) {
        world_step(&w);
        w.down[1] = w.down[2] = w.down[3] = w.steps > 20;
    }
    check_end(&w);
    assert_int_equal(w.e->phase, LB_EVAC_INCOMPLETE);
    assert_true(w.steps < 1200); /* five minutes */
    lb_evac_free(w.e);
}

static void test_full(void **state)
{
    struct world w;
    (void)state;

    world_new(&w, 8, 12, &plain);
    while (!lb_evac_over(w.e) && w.steps < 40000) {
        world_step(&w);
        w.full[1] = w.full[3] = w.steps > 20;
    }
    check_end(&w);
    assert_int_equal(w.e->phase, LB_EVAC_FINISHED);
    assert_true(w.plans > 1);
    lb_evac_free(w.e);
}

/* Shared, then alone; then left, or slowed or stopped as `hot` says, or suspended. */
static void test_no_converge(void **state)
{
    (void)state;
    for (int what = 0; what < 4; what++) {
        struct lb_evac_opts o = plain;
        const struct lb_evac_item *it;
        struct world w;

        o.suspend_rest = what == 3;
        o.hot = what == 1 ? LB_PLAN_SUSPEND : what >= 2 ? LB_PLAN_LEAVE : LB_PLAN_THROTTLE;
        world_new(&w, 9, 6, &o);
        w.hot_vm = 3;
        while (!lb_evac_over(w.e) && w.steps < 40000) {
            struct lb_evac_item *hot;

            world_step(&w);
            hot = lb_evac_mover(w.e, "vm2");
            if (what <= 1 && hot && hot->last_resort && hot->state == LB_EVAC_SETUP) {
                assert_int_equal(lb_evac_may_throttle(w.e, hot), what == 0);
                assert_int_equal(lb_evac_may_pause(w.e, hot), what == 1);
                w.hot_vm = 0; /* that helps */
            }
        }
        it = lb_evac_mover(w.e, "vm2");
        check_end(&w);
        assert_true(it->last_resort);
        assert_int_equal(it->state, what == 2 ? LB_EVAC_LEFT : LB_EVAC_DONE);
        assert_int_equal(it->kind, what == 3 ? LB_EVAC_SUSPEND : LB_EVAC_COPY);
        if (what == 2)
            assert_string_equal(it->message, "failed with no-converge");
        assert_int_equal(w.v[2].begun, what == 3 ? 3 : 2);
        lb_evac_free(w.e);
    }
}

/* A new backup comes after the move, and from where the VM is then. */
static void test_backup(void **state)
{
    struct lb_evac *e = lb_evac_new("a", &plain, false);
    struct lb_evac_order o;
    struct lb_evac_item *it;
    json_t *plan = json_pack("{s:s, s:f, s:i, s:[o, o, o], s:[], s:[]}", "id", "x", "makespan_s", 10.0, "parallel", 2, "steps",
                             plan_step("v", "swap", "a", "b", 0, 0), plan_step("v", "backup", "b", "c", 1, 0),
                             plan_step("other", "backup", "d", "b", 2, 0), "stays", "hosts");
    (void)state;

    assert_int_equal(lb_evac_planned(e, plan, 1, NULL), 0);
    assert_int_equal(e->phase, LB_EVAC_PLANNED);
    assert_false(lb_evac_next(e, 1, &o));
    lb_evac_start(e, 1, 1);
    assert_true(lb_evac_next(e, 1, &o));
    assert_int_equal(o.item->kind, LB_EVAC_SWAP);
    it = o.item;
    assert_true(lb_evac_next(e, 1, &o)); /* of a VM of another host: at once */
    assert_string_equal(o.item->vm, "other");
    lb_evac_ended(e, o.item, NULL, 2);
    assert_int_equal(o.item->state, LB_EVAC_DONE);
    assert_false(lb_evac_next(e, 2, &o));
    lb_evac_ended(e, it, NULL, 3);
    assert_false(lb_evac_next(e, 3, &o));
    assert_true(it->unsettled);
    lb_evac_gone(e, it, 4);
    assert_true(lb_evac_next(e, 4, &o));
    assert_int_equal(o.item->kind, LB_EVAC_BACKUP);
    assert_string_equal(o.item->from, "b");
    assert_string_equal(o.item->to, "c");
    lb_evac_ended(e, o.item, NULL, 5);
    assert_true(lb_evac_next(e, 5, &o));
    assert_int_equal(o.what, LB_EVAC_DO_END);
    assert_int_equal(e->phase, LB_EVAC_FINISHED);
    lb_evac_free(e);
    /* it does not move: its backup is elsewhere and stays */
    e = lb_evac_new("a", &plain, false);
    assert_int_equal(lb_evac_planned(e, plan, 1, NULL), 0);
    lb_evac_start(e, 1, 1);
    while (lb_evac_next(e, 1, &o) && o.what != LB_EVAC_DO_END) {
        struct lb_error err = {.code = LB_E_USAGE, .message = "no"};
        assert_true(o.item->kind == LB_EVAC_SWAP || !strcmp(o.item->vm, "other"));
        lb_evac_ended(e, o.item, o.item->kind == LB_EVAC_SWAP ? &err : NULL, 1);
        if (o.item->unsettled)
            lb_evac_settled(e, o.item, 1);
    }
    assert_int_equal(e->phase, LB_EVAC_INCOMPLETE);
    lb_evac_free(e);
    json_decref(plan);
}

static json_t *plan_of(json_t *steps)
{
    return json_pack("{s:s, s:f, s:i, s:o, s:[], s:[]}", "id", "x", "makespan_s", 10.0, "parallel", 2, "steps", steps, "stays",
                     "hosts");
}

static void new_plan(struct lb_evac *e, json_t *steps, uint64_t now)
{
    json_t *plan = plan_of(steps);

    assert_int_equal(lb_evac_planned(e, plan, now, NULL), 0);
    json_decref(plan);
}

/* It was to swap and get c as its backup; planned anew it goes to c and keeps the backup that it has. */
static void test_backup_not_needed(void **state)
{
    struct lb_evac *e = lb_evac_new("a", &plain, false);
    struct lb_evac_order o;
    (void)state;

    new_plan(e, json_pack("[o, o, o]", plan_step("v", "swap", "a", "b", 5, 0), plan_step("v", "backup", "b", "c", 6, 0),
                          plan_step("w", "backup", "d", "c", 7, 0)), 1);
    new_plan(e, json_pack("[o]", plan_step("v", "copy", "a", "c", 5, 0)), 2);
    assert_null(lb_evac_find(e, "v", LB_EVAC_BACKUP));
    assert_non_null(lb_evac_find(e, "w", LB_EVAC_BACKUP)); /* it runs elsewhere: perhaps nobody could say what it has */
    assert_int_equal(e->n_items, 2);
    lb_evac_start(e, 2, 2);
    while (lb_evac_next(e, 2, &o))
        assert_string_equal(o.item->to, "c");
    lb_evac_free(e);
}

/* The new backup was refused when the old one had been given up: no plan knows of it, and it is tried again. */
static void test_backup_again(void **state)
{
    struct lb_error silent = {.code = LB_E_PREFLIGHT, .message = "no room"};
    struct lb_evac *e = lb_evac_new("a", &plain, false);
    unsigned begun = 0;
    struct lb_evac_order o;
    (void)state;

    new_plan(e, json_pack("[o]", plan_step("v", "backup", "b", "c", 0, 0)), 1);
    lb_evac_start(e, 1, 1);
    for (uint64_t now = 1; !lb_evac_over(e) && now < 100000; now += 250)
        while (lb_evac_next(e, now, &o))
            if (o.what == LB_EVAC_DO_PLAN) {
                new_plan(e, json_array(), now);
            } else if (o.what == LB_EVAC_DO_BEGIN) {
                begun++;
                lb_evac_ended(e, o.item, begun < 3 ? &silent : NULL, now);
            }
    assert_int_equal(begun, 3);
    assert_int_equal(e->phase, LB_EVAC_FINISHED);
    lb_evac_free(e);
}

/* Something works on one that no plan has: it is not over before that is, and then it leaves as well. */
static void test_awaited(void **state)
{
    struct lb_evac *e = lb_evac_new("a", &plain, false);
    struct lb_evac_item *it;
    struct lb_evac_order o;
    json_t *on_disk;
    (void)state;

    new_plan(e, json_array(), 1);
    lb_evac_start(e, 1, 1);
    lb_evac_await(e, "v", "it is migrated by hand", 1);
    assert_false(lb_evac_next(e, 2, &o));
    on_disk = lb_evac_json(e);
    assert_int_equal(json_array_size(json_object_get(on_disk, "items")), 0);
    json_decref(on_disk);
    new_plan(e, json_array(), 3); /* of something else */
    it = lb_evac_mover(e, "v");
    assert_true(it->awaited && !it->unsettled);
    lb_evac_free_again(e, it);
    assert_true(lb_evac_next(e, 10000, &o));
    assert_int_equal(o.what, LB_EVAC_DO_PLAN);
    new_plan(e, json_pack("[o]", plan_step("v", "copy", "a", "b", 0, 0)), 10000);
    assert_true(lb_evac_next(e, 10000, &o));
    assert_int_equal(o.what, LB_EVAC_DO_BEGIN);
    lb_evac_free(e);
    /* it does not end */
    e = lb_evac_new("a", &plain, false);
    new_plan(e, json_array(), 1);
    lb_evac_start(e, 1, 1);
    lb_evac_await(e, "v", "it is migrated by hand", 1);
    for (uint64_t now = 1; now < 3600000 && !lb_evac_over(e); now += 250)
        while (lb_evac_next(e, now, &o))
            assert_int_equal(o.what, LB_EVAC_DO_END);
    assert_int_equal(e->phase, LB_EVAC_INCOMPLETE);
    assert_string_equal(e->items[0].message, "it is migrated by hand");
    lb_evac_free(e);
}

/* A plan that was shown and has no step: nothing else is to be planned. */
static void test_nothing_to_do(void **state)
{
    struct lb_evac *e = lb_evac_new("a", &plain, false);
    struct lb_evac_order o;
    (void)state;

    new_plan(e, json_array(), 1);
    lb_evac_start(e, 1, 1);
    assert_true(lb_evac_next(e, 1, &o));
    assert_int_equal(o.what, LB_EVAC_DO_END);
    assert_int_equal(e->phase, LB_EVAC_FINISHED);
    lb_evac_free(e);
}

/* Its guest powers off: the host is emptied all the same, and nobody looks for a backup of it. */
static void test_died(void **state)
{
    struct lb_evac *e = lb_evac_new("a", &plain, false);
    struct lb_error lost = {.code = LB_E_HV, .message = "QEMU closed the connection"};
    struct lb_evac_order o;
    struct lb_evac_item *it;
    (void)state;

    new_plan(e, json_pack("[o, o]", plan_step("v", "swap", "a", "b", 0, 0), plan_step("v", "backup", "b", "c", 0, 0)), 1);
    lb_evac_start(e, 1, 1);
    assert_true(lb_evac_next(e, 1, &o));
    it = o.item;
    lb_evac_ended(e, it, &lost, 2);
    assert_false(lb_evac_next(e, 2, &o));
    lb_evac_died(e, it, 3);
    assert_true(it->state == LB_EVAC_DONE && it->message[0]);
    assert_true(lb_evac_next(e, 3, &o));
    assert_int_equal(o.what, LB_EVAC_DO_END);
    assert_int_equal(e->phase, LB_EVAC_FINISHED);
    lb_evac_free(e);
}

/* The backup that was to take it over is gone: that says nothing against its host. What else fails there does. */
static void test_swap_without_backup(void **state)
{
    struct lb_error gone = {.code = LB_E_NOT_FOUND, .message = "there is no VM of that name here"};
    struct lb_evac *e = lb_evac_new("a", &plain, false);
    struct lb_evac_item *v, *w;
    struct lb_evac_order o;
    (void)state;

    new_plan(e, json_pack("[o, o]", plan_step("v", "swap", "a", "b", 0, 0), plan_step("w", "copy", "a", "b", 0, 0)), 1);
    lb_evac_start(e, 1, 1);
    while (lb_evac_next(e, 1, &o))
        assert_int_equal(o.what, LB_EVAC_DO_BEGIN);
    v = lb_evac_find(e, "v", LB_EVAC_SWAP);
    w = lb_evac_find(e, "w", LB_EVAC_COPY);
    lb_evac_ended(e, v, &gone, 2);
    lb_evac_settled(e, v, 2);
    assert_null(v->excluded);
    assert_false(v->replan);
    assert_true(v->retry_ms > 2 && v->retry_ms < 60000);
    lb_evac_ended(e, w, &gone, 2);
    lb_evac_settled(e, w, 2);
    assert_string_equal(w->excluded[0], "b");
    lb_evac_free(e);
}

/* The other way: each from where it is; what refuses stays there. */
static void test_return(void **state)
{
    struct lb_evac_opts two = {.parallel = 2};
    struct lb_evac *e = lb_evac_new("a", &two, true);
    struct lb_error refused = {.code = LB_E_PREFLIGHT, .message = "no room"};
    struct lb_evac_order o;
    unsigned begun = 0;
    (void)state;

    for (int i = 0; i < 5; i++) {
        char name[16];
        struct lb_evac_item *it;

        snprintf(name, sizeof(name), "v%d", i);
        it = lb_evac_add(e, name, i == 4 ? LB_EVAC_RESUME : LB_EVAC_BACK);
        strcpy(it->from, "b");
        strcpy(it->to, "a");
    }
    lb_evac_start(e, 1, 1);
    assert_string_equal(lb_evac_phase_name(e), "returning");
    while (lb_evac_next(e, 1, &o)) {
        assert_int_equal(o.what, LB_EVAC_DO_BEGIN);
        begun++;
    }
    assert_int_equal(begun, 3); /* two, and the one from the disk */
    for (uint64_t now = 2; !lb_evac_over(e) && now < 100; now++) {
        for (unsigned i = 0; i < e->n_items; i++) {
            if (e->items[i].session)
                lb_evac_ended(e, &e->items[i], i == 1 ? &refused : NULL, now);
            if (e->items[i].unsettled && i == 1)
                lb_evac_settled(e, &e->items[i], now);
            else if (e->items[i].unsettled)
                lb_evac_gone(e, &e->items[i], now);
        }
        while (lb_evac_next(e, now, &o))
            assert_int_not_equal(o.what, LB_EVAC_DO_PLAN);
    }
    assert_int_equal(e->phase, LB_EVAC_INCOMPLETE);
    for (unsigned i = 0; i < e->n_items; i++)
        assert_int_equal(e->items[i].state, i == 1 ? LB_EVAC_LEFT : LB_EVAC_DONE);
    assert_string_equal(e->items[1].message, "no room");
    lb_evac_free(e);
}

/* Without a plan nothing leaves, and it ends. */
static void test_no_plan(void **state)
{
    struct world w;
    (void)state;

    world_new(&w, 3, 4, &plain);
    lb_evac_add(w.e, "vm1", LB_EVAC_COPY);
    w.never_plan = true;
    while (!lb_evac_over(w.e) && w.steps < 1000)
        world_step(&w);
    assert_int_equal(w.e->phase, LB_EVAC_INCOMPLETE);
    assert_string_equal(w.e->items[0].message, "the planner was killed");
    assert_int_equal(w.begun, 0);
    lb_evac_free(w.e);
}

/* ------------------------------------------------------------------------------ what is said */

/* Ten VMs one after the other, at half the speed that was planned. */
static void test_eta(void **state)
{
    struct lb_evac *e = lb_evac_new("a", &plain, false);
    json_t *steps = json_array(), *plan;
    double last_percent = 0, last_eta = -1;
    unsigned said = 0;
    const double true_end = 100;
    (void)state;

    for (int i = 0; i < 10; i++) {
        char name[16];
        snprintf(name, sizeof(name), "v%d", i);
        json_array_append_new(steps, plan_step(name, "copy", "a", "b", 5.0 * i, 0));
    }
    plan = json_pack("{s:s, s:f, s:i, s:o, s:[], s:[]}", "id", "x", "makespan_s", 50.0, "parallel", 1, "steps", steps, "stays",
                     "hosts");
    assert_int_equal(lb_evac_planned(e, plan, 1, NULL), 0);
    json_decref(plan);
    lb_evac_start(e, 1, 1);
    for (uint64_t now = 1; !lb_evac_over(e); now += 250) {
        struct lb_evac_order o;
        json_t *ev, *eta;

        for (unsigned i = 0; i < e->n_items; i++) {
            struct lb_evac_item *it = &e->items[i];
            double took = (double)(now - it->begun_ms) / 1000;
            struct lb_evac_progress p = {.state = LB_EVAC_READY, .percent = took * 10, .bytes = took * 1e7, .eta_s = -1};

            if (it->session)
                lb_evac_progress(e, it, &p);
            if (it->session && took >= 10) {
                lb_evac_ended(e, it, NULL, now);
                lb_evac_gone(e, it, now);
            }
        }
        while (lb_evac_next(e, now, &o))
            ;
        ev = lb_evac_event(e, false, now);
        eta = json_object_get(ev, "eta_s");
        assert_true(json_number_value(json_object_get(ev, "percent")) >= last_percent);
        last_percent = json_number_value(json_object_get(ev, "percent"));
        if (json_is_number(eta) && !lb_evac_over(e)) {
            double is = json_number_value(eta), truth = true_end - e->elapsed_s;

            said++;
            if (e->elapsed_s > 30)
                assert_true(is > 0.6 * truth - 2 && is < 1.4 * truth + 2);
            if (last_eta >= 0 && e->elapsed_s > 20)
                assert_true(is < last_eta + 1);
            last_eta = is;
        }
        json_decref(ev);
    }
    assert_true(said > 300);
    assert_true(last_percent == 100);
    lb_evac_free(e);
}

static void test_event(void **state)
{
    struct world w;
    json_t *ev;
    unsigned full;
    (void)state;

    world_new(&w, 4, 6, &plain);
    ev = lb_evac_event(w.e, true, w.now);
    orders(&w);
    json_decref(ev);
    ev = lb_evac_event(w.e, true, w.now);
    assert_string_equal(json_string_value(json_object_get(ev, "phase")), "planning");
    assert_true(json_is_null(json_object_get(ev, "eta_s")));
    json_decref(ev);
    while (w.begun < 2)
        world_step(&w);
    ev = lb_evac_event(w.e, false, w.now);
    full = (unsigned)json_array_size(json_object_get(ev, "items"));
    assert_int_equal(full, 6); /* the first since they are planned */
    json_decref(ev);
    ev = lb_evac_event(w.e, false, w.now);
    assert_int_equal(json_array_size(json_object_get(ev, "items")), 0);
    assert_null(json_object_get(ev, "ok"));
    json_decref(ev);
    run(&w);
}

static void test_damage(void **state)
{
    struct lb_error err = LB_ERROR_INIT;
    struct world w;
    json_t *good, *twice;
    const char *key;
    json_t *v;
    void *tmp;
    struct lb_evac *e;
    (void)state;

    world_new(&w, 4, 6, &plain);
    w.trouble = 100;
    while (w.begun < 4)
        world_step(&w);
    good = lb_evac_json(w.e);
    e = lb_evac_parse(good, &err);
    assert_non_null(e);
    twice = lb_evac_json(e);
    assert_true(json_equal(good, twice));
    lb_evac_free(e);
    json_decref(twice);
    twice = json_deep_copy(good);
    json_object_foreach_safe (good, tmp, key, v) {
        json_t *less = json_deep_copy(good);

        json_object_del(less, key);
        assert_null(lb_evac_parse(less, &err));
        assert_int_equal(err.code, LB_E_STATE);
        json_decref(less);
    }
    json_object_foreach_safe (json_array_get(json_object_get(twice, "items"), 0), tmp, key, v) {
        json_t *less = json_deep_copy(good);

        json_object_del(json_array_get(json_object_get(less, "items"), 0), key);
        assert_null(lb_evac_parse(less, &err));
        json_object_set_new(json_array_get(json_object_get(less, "items"), 0), key, json_null());
        assert_null(lb_evac_parse(less, &err));
        json_decref(less);
    }
    assert_null(lb_evac_parse(NULL, &err));
    json_decref(good);
    json_decref(twice);
    lb_evac_free(w.e);
}

static void test_bad_plans(void **state)
{
    static const char *const texts[] = {
        "{}", "[]", "{\"steps\":[],\"stays\":[]}", "{\"steps\":[{}],\"id\":\"x\",\"stays\":[],\"hosts\":[]}",
        "{\"steps\":[],\"stays\":[],\"hosts\":[]}",
        "{\"id\":\"x\",\"steps\":[{\"vm\":\"v\",\"kind\":\"copy\",\"from\":\"a\"}],\"stays\":[],\"hosts\":[]}",
        "{\"id\":\"x\",\"steps\":[{\"vm\":\"v\",\"kind\":\"dance\",\"from\":\"a\",\"to\":\"b\"}],\"stays\":[],\"hosts\":[]}",
        "{\"steps\":[],\"id\":\"x\",\"stays\":[{}],\"hosts\":[]}", "{\"steps\":[],\"stays\":[],\"id\":\"x\",\"hosts\":[{\"name\":\"\"}]}",
    };
    (void)state;

    for (size_t i = 0; i < LB_ARRAY_LEN(texts); i++) {
        struct lb_evac *e = lb_evac_new("a", &plain, false);
        struct lb_error err = LB_ERROR_INIT;
        json_t *o = json_loads(texts[i], 0, NULL);

        assert_int_equal(lb_evac_planned(e, o, 1, &err), -1);
        assert_int_equal(err.code, LB_E_PROTO);
        assert_int_equal(e->n_items, 0);
        json_decref(o);
        lb_evac_free(e);
    }
}

static void test_file(void **state)
{
    char dir[] = "/tmp/lb-test-evacuate-XXXXXX";
    struct lb_error err = LB_ERROR_INIT;
    struct lb_evac *e;
    struct world w;
    (void)state;

    assert_non_null(mkdtemp(dir));
    assert_null(lb_evac_load(dir, &err));
    assert_int_equal(err.code, LB_E_NOT_FOUND);
    world_new(&w, 4, 6, &plain);
    while (w.begun < 2)
        world_step(&w);
    assert_int_equal(lb_evac_save(dir, w.e, &err), 0);
    e = lb_evac_load(dir, &err);
    assert_non_null(e);
    assert_int_equal(e->n_items, w.e->n_items);
    lb_evac_free(e);
    assert_int_equal(lb_evac_remove(dir, &err), 0);
    assert_null(lb_evac_load(dir, &err));
    lb_evac_free(w.e);
    lb_remove_tree(dir, NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_calm),      cmocka_unit_test(test_trouble),
        cmocka_unit_test(test_restarts),  cmocka_unit_test(test_restart_everywhere),
        cmocka_unit_test(test_cancel),    cmocka_unit_test(test_outage),
        cmocka_unit_test(test_full),      cmocka_unit_test(test_no_converge),
        cmocka_unit_test(test_backup),    cmocka_unit_test(test_return),
        cmocka_unit_test(test_no_plan),   cmocka_unit_test(test_eta),
        cmocka_unit_test(test_event),     cmocka_unit_test(test_damage),
        cmocka_unit_test(test_bad_plans), cmocka_unit_test(test_file),
        cmocka_unit_test(test_swap_without_backup),
        cmocka_unit_test(test_backup_not_needed), cmocka_unit_test(test_backup_again),
        cmocka_unit_test(test_awaited),   cmocka_unit_test(test_died),
        cmocka_unit_test(test_nothing_to_do),
    };
    return cmocka_run_group_tests_name("evacuate", tests, NULL, NULL);
}
