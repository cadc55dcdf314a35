/* The planner of evacuations: what it reads, where it puts VMs, and whether its times are near the best possible.
 * Plans are judged by a checker and a simulator of their own, which share nothing with the planner. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <math.h>
#include <string.h>

#include "migrate/plan.h"

#define GIB (UINT64_C(1) << 30)
#define A {.ids = (uint32_t[]){0}, .n = 1}

static unsigned seed;

static unsigned below(unsigned n)
{
    return (unsigned)rand_r(&seed) % n;
}

static void parse(const char *text, struct lb_inventory *inv)
{
    struct lb_error err = LB_ERROR_INIT;

    if (lb_inventory_parse(text, strlen(text), inv, &err))
        fail_msg("%s", err.message);
}

static void make(const struct lb_inventory *inv, const struct lb_plan_opts *o, struct lb_plan *p)
{
    struct lb_error err = LB_ERROR_INIT;

    if (lb_plan_make(inv, o, p, &err))
        fail_msg("%s", err.message);
}

/* ------------------------------------------------------------------------- the checker */

static bool in(const struct lb_inv_set *s, uint32_t id)
{
    for (uint32_t i = 0; i < s->n; i++)
        if (s->ids[i] == id)
            return true;
    return false;
}

static bool share(const struct lb_inv_set *a, const struct lb_inv_set *b)
{
    for (uint32_t i = 0; i < a->n; i++)
        if (in(b, a->ids[i]))
            return true;
    return false;
}

static void check_host_suits(const struct lb_inventory *inv, const struct lb_plan_opts *o, uint32_t vm, uint32_t h, bool backup)
{
    const struct lb_inv_vm *v = &inv->vms[vm];
    const struct lb_inv_host *host = &inv->hosts[h];

    assert_false(in(&o->evacuate, h));
    assert_false(host->maintenance);
    assert_true(!o->to.n || in(&o->to, h) || backup);
    for (uint32_t i = 0; i < v->features.n; i++)
        assert_true(in(&host->features, v->features.ids[i]));
    for (uint32_t i = 0; i < v->require_tags.n; i++)
        assert_true(in(&host->tags, v->require_tags.ids[i]));
    assert_false(share(&v->forbid_tags, &host->tags));
    assert_true(!v->cpu || (host->cpu && !strcmp(v->cpu, host->cpu)));
    assert_true(v->generation <= host->generation);
}

/* Where everything ends; asserts what is true of single steps. */
static void follow(const struct lb_inventory *inv, const struct lb_plan_opts *o, const struct lb_plan *p, uint32_t *at,
                   uint32_t *backup)
{
    for (uint32_t v = 0; v < inv->n_vms; v++) {
        at[v] = inv->vms[v].host;
        backup[v] = inv->vms[v].backup;
    }
    for (uint32_t i = 0; i < p->n_steps; i++) {
        const struct lb_plan_step *s = &p->steps[i];

        assert_true(!i || s->start_s >= p->steps[i - 1].start_s);
        assert_true(isfinite(s->end_s) && s->end_s >= s->start_s && s->end_s <= p->makespan_s + 1e-6);
        assert_int_equal(s->from, at[s->vm]);
        check_host_suits(inv, o, s->vm, s->to, s->kind == LB_PLAN_BACKUP);
        if (s->kind == LB_PLAN_BACKUP) {
            backup[s->vm] = s->to;
        } else {
            assert_true(in(&o->evacuate, s->from));
            assert_int_equal(inv->vms[s->vm].n_blockers, 0);
            if (s->kind == LB_PLAN_SWAP) {
                assert_int_equal(s->to, backup[s->vm]);
                backup[s->vm] = LB_INV_NONE;
            }
            at[s->vm] = s->to;
        }
        assert_int_not_equal(backup[s->vm], at[s->vm]);
    }
}

static void check_groups(const struct lb_inventory *inv, const uint32_t *at)
{
    for (uint32_t v = 0; v < inv->n_vms; v++)
        for (uint32_t w = 0; (inv->vms[v].together.n || inv->vms[v].apart.n) && w < inv->n_vms; w++) {
            const struct lb_inv_vm *a = &inv->vms[v], *b = &inv->vms[w];

            if (v == w || (at[v] == a->host && at[w] == b->host))
                continue;
            /* those that were on one host are still, unless the rest of the group was split before */
            if (share(&a->together, &b->together) && a->host == b->host)
                assert_int_equal(at[v], at[w]);
            if (share(&a->apart, &b->apart))
                assert_int_not_equal(at[v], at[w]);
        }
}

static void check(const struct lb_inventory *inv, const struct lb_plan_opts *o, const struct lb_plan *p)
{
    LB_AUTO_FREE uint32_t *at = lb_alloc((inv->n_vms + 1) * sizeof(*at));
    LB_AUTO_FREE uint32_t *backup = lb_alloc((inv->n_vms + 1) * sizeof(*backup));
    LB_AUTO_FREE uint64_t *load = lb_alloc(inv->n_hosts * sizeof(*load));
    LB_AUTO_FREE bool *named = lb_alloc(inv->n_vms + 1);

    follow(inv, o, p, at, backup);
    check_groups(inv, at);
    for (uint32_t i = 0; i < p->n_stays; i++) {
        assert_true(p->stays[i].reason[0]);
        named[p->stays[i].vm] |= !p->stays[i].backup;
    }
    for (uint32_t h = 0; h < inv->n_hosts; h++)
        load[h] = inv->hosts[h].used_bytes;
    for (uint32_t v = 0; v < inv->n_vms; v++) {
        uint32_t kept = backup[v] == LB_INV_NONE && inv->vms[v].backup != at[v] ? inv->vms[v].backup : backup[v];

        load[at[v]] += inv->vms[v].memory_bytes;
        if (kept != LB_INV_NONE)
            load[kept] += inv->vms[v].memory_bytes;
        if (in(&o->evacuate, inv->vms[v].host)) /* gone, or said why not */
            assert_int_not_equal(in(&o->evacuate, at[v]), !named[v]);
    }
    for (uint32_t h = 0; h < inv->n_hosts; h++) {
        assert_int_equal(load[h], p->after[h]);
        if (p->after[h] > p->before[h])
            assert_true(load[h] + inv->hosts[h].reserved_bytes <= inv->hosts[h].memory_bytes);
    }
}

/* ----------------------------------------------------------------------- inventories */

/* Hosts of 64 to 256 GiB filled to about `percent`, VMs with every kind of constraint. Caller frees. */
static char *generate(unsigned n_hosts, unsigned n_vms, unsigned percent, unsigned emptied)
{
    char *text = NULL;
    size_t len;
    FILE *f = open_memstream(&text, &len);
    unsigned per_host = LB_MAX(n_vms / n_hosts, 1);

    fprintf(f, "{\"hosts\":[");
    for (unsigned h = 0; h < n_hosts; h++)
        fprintf(f, "%s{\"name\":\"h%u\",\"memory_bytes\":%llu,\"reserved_bytes\":\"1G\",\"used_bytes\":\"%uM\",\"cpus\":%u,"
                "\"cpu\":\"epyc\",\"generation\":%u,\"link_bytes_per_s\":\"%s\",\"features\":[\"a\"%s],\"tags\":[\"%s\"],"
                "\"maintenance\":%s}", h ? "," : "", h, (unsigned long long)(GIB * 5 * per_host * 100 / percent), below(900),
                2 + below(30), 2 + below(3), below(3) ? "10Gbit" : "1Gbit", below(4) ? ",\"b\"" : "",
                below(2) ? "ssd" : "disk", h >= emptied && !below(20) ? "true" : "false");
    fprintf(f, "],\"vms\":[");
    for (unsigned v = 0; v < n_vms; v++) {
        unsigned h = v % n_hosts, mib = 512 + below(8192);

        fprintf(f, "%s{\"name\":\"v%u\",\"host\":\"h%u\",\"memory_bytes\":\"%uM\",\"touched_bytes\":\"%uM\","
                "\"dirty_bytes_per_s\":\"%uM\",\"priority\":%u", v ? "," : "", v, h, mib, 1 + below(mib),
                below(30) ? below(60) : below(2000), below(3));
        if (!below(8))
            fprintf(f, ",\"features\":[\"b\"]");
        if (!below(10))
            fprintf(f, ",\"%s_tags\":[\"ssd\"]", below(2) ? "require" : "forbid");
        if (!below(8))
            fprintf(f, ",\"generation\":%u,\"cpu\":\"epyc\"", below(5));
        if (!below(10))
            fprintf(f, ",\"together\":[\"t%u\"]", below(n_vms / 10 + 1));
        if (!below(6))
            fprintf(f, ",\"apart\":[\"g%u\"]", below(n_vms / 20 + 1));
        if (!below(12))
            fprintf(f, ",\"backup\":\"h%u\"", (h + 1 + below(n_hosts - 1)) % n_hosts);
        if (!below(60))
            fprintf(f, ",\"blockers\":[{\"message\":\"has a card\",\"remedy\":\"unplug it\"}]");
        fputc('}', f);
    }
    fprintf(f, "],\"evacuate\":[");
    for (unsigned h = 0; h < emptied; h++)
        fprintf(f, "%s\"h%u\"", h ? "," : "", h);
    fprintf(f, "]}");
    fclose(f);
    return text;
}

static void test_random(void **state)
{
    unsigned steps = 0, stays = 0, swaps = 0, backups = 0;

    (void)state;
    for (unsigned i = 0; i < 150; i++) {
        LB_AUTO_FREE char *text = NULL;
        struct lb_inventory inv;
        struct lb_plan p;

        seed = 100 + i;
        text = generate(2 + below(12), 1 + below(120), 40 + below(60), 1);
        parse(text, &inv);
        struct lb_plan_opts o = {.evacuate = inv.evacuate, .parallel = below(3), .hot = (enum lb_plan_hot)below(3)};
        make(&inv, &o, &p);
        check(&inv, &o, &p);
        steps += p.n_steps;
        stays += p.n_stays;
        for (uint32_t s = 0; s < p.n_steps; s++) {
            swaps += p.steps[s].kind == LB_PLAN_SWAP;
            backups += p.steps[s].kind == LB_PLAN_BACKUP;
        }
        lb_plan_free(&p);
        lb_inventory_free(&inv);
    }
    print_message("# 150 inventories: %u steps (%u swaps, %u backups), %u cannot\n", steps, swaps, backups, stays);
    assert_true(steps > 500 && stays > 20 && swaps > 5 && backups > 20);
}

static void test_big(void **state)
{
    LB_AUTO_FREE char *text = NULL;
    struct lb_inventory inv;
    struct lb_plan p, again;
    uint64_t t0, t1, t2;

    (void)state;
    seed = 7;
    text = generate(200, 10000, 70, 10);
    t0 = lb_now_ns();
    parse(text, &inv);
    t1 = lb_now_ns();
    struct lb_plan_opts o = {.evacuate = inv.evacuate};
    make(&inv, &o, &p);
    t2 = lb_now_ns();
    print_message("# 10000 VMs, 200 hosts, 10 to empty: read in %.0f ms, planned in %.0f ms: %u steps, %u cannot, %.0f s\n",
                  (double)(t1 - t0) / 1e6, (double)(t2 - t1) / 1e6, p.n_steps, p.n_stays, p.makespan_s);
    check(&inv, &o, &p);
    assert_true(p.n_steps > 450 && p.n_stays < 50);
    /* the same again */
    make(&inv, &o, &again);
    assert_int_equal(p.n_steps, again.n_steps);
    for (uint32_t i = 0; i < p.n_steps; i++) {
        assert_int_equal(p.steps[i].vm, again.steps[i].vm);
        assert_int_equal(p.steps[i].to, again.steps[i].to);
        assert_true(p.steps[i].start_s == again.steps[i].start_s && p.steps[i].end_s == again.steps[i].end_s);
    }
    lb_plan_free(&again);
    lb_plan_free(&p);
    lb_inventory_free(&inv);
}

/* --------------------------------------------------------------------- constraints */

#define HOST(name, mem, more) "{\"name\":\"" name "\",\"memory_bytes\":\"" mem "\",\"link_bytes_per_s\":\"1Gbit\"" more "}"
#define VM(name, host, mem, more) "{\"name\":\"" name "\",\"host\":\"" host "\",\"memory_bytes\":\"" mem "\"" more "}"
#define INV(hosts, vms) "{\"hosts\":[" hosts "],\"vms\":[" vms "]}"

/* Of VM 0, with host 0 emptied: the host it goes to, or its reason (a part of it) to stay. */
static void expect(const char *text, const char *to, const char *reason)
{
    struct lb_plan_opts o = {.evacuate = A};
    const char *went = NULL, *why = NULL;
    struct lb_inventory inv;
    struct lb_plan p;

    parse(text, &inv);
    make(&inv, &o, &p);
    check(&inv, &o, &p);
    for (uint32_t i = 0; i < p.n_steps; i++)
        if (p.steps[i].vm == 0 && p.steps[i].kind != LB_PLAN_BACKUP)
            went = inv.hosts[p.steps[i].to].name;
    for (uint32_t i = 0; i < p.n_stays && !why; i++)
        why = p.stays[i].vm == 0 ? p.stays[i].reason : NULL;
    if (to && (!went || strcmp(went, to)))
        fail_msg("went to %s, not to %s (%s)", went ? went : "nowhere", to, why ? why : "-");
    if (reason && (!why || !strstr(why, reason)))
        fail_msg("stays because \"%s\", not \"%s\"", why ? why : "-", reason);
    lb_plan_free(&p);
    lb_inventory_free(&inv);
}

static void test_constraints(void **state)
{
    (void)state;
    expect(INV(HOST("a", "8G", "") "," HOST("b", "2G", "") "," HOST("c", "8G", ""), VM("v", "a", "4G", "")), "c", NULL);
    expect(INV(HOST("a", "8G", "") "," HOST("b", "64G", "") "," HOST("c", "8G", ",\"features\":[\"avx512f\"]"),
               VM("v", "a", "4G", ",\"features\":[\"avx512f\"]")), "c", NULL);
    expect(INV(HOST("a", "8G", "") "," HOST("b", "64G", ",\"tags\":[\"x\"]") "," HOST("c", "8G", ""),
               VM("v", "a", "4G", ",\"forbid_tags\":[\"x\"]")), "c", NULL);
    expect(INV(HOST("a", "8G", "") "," HOST("b", "8G", "") "," HOST("c", "64G", ""),
               VM("v", "a", "1G", ",\"together\":[\"g\"]") "," VM("w", "b", "1G", ",\"together\":[\"g\"]")), "b", NULL);
    expect(INV(HOST("a", "8G", "") "," HOST("b", "8G", "") "," HOST("c", "64G", ""),
               VM("v", "a", "1G", ",\"apart\":[\"g\"]") "," VM("w", "c", "1G", ",\"apart\":[\"g\"]")), "b", NULL);
    /* its backup's host, although another is emptier */
    expect(INV(HOST("a", "8G", "") "," HOST("b", "2G", "") "," HOST("c", "64G", ""), VM("v", "a", "2G", ",\"backup\":\"b\"")), "b", NULL);
    expect(INV(HOST("a", "8G", "") "," HOST("b", "8G", ",\"maintenance\":true"), VM("v", "a", "1G", "")), NULL, "no host to go to");
}

static void test_reasons(void **state)
{
    (void)state;
    expect(INV(HOST("a", "8G", "") "," HOST("b", "64G", "") "," HOST("c", "4G", ",\"features\":[\"avx512f\"],\"used_bytes\":\"512M\""),
               VM("v", "a", "4G", ",\"features\":[\"avx512f\"]")), NULL, "host c lacks 512.0 MiB; host b lacks avx512f");
    expect(INV(HOST("a", "8G", "") "," HOST("b", "64G", ""), VM("v", "a", "4G", ",\"require_tags\":[\"ssd\"]")), NULL, "host b has no tag ssd");
    expect(INV(HOST("a", "8G", "") "," HOST("b", "64G", ",\"cpu\":\"xeon\",\"generation\":9"), VM("v", "a", "4G", ",\"cpu\":\"epyc\"")),
           NULL, "host b has not the processor that v needs");
    expect(INV(HOST("a", "8G", "") "," HOST("b", "64G", ""),
               VM("v", "a", "4G", ",\"apart\":[\"g\"]") "," VM("w", "b", "1G", ",\"apart\":[\"g\"]")), NULL, "host b runs w");
    expect(INV(HOST("a", "8G", "") "," HOST("b", "64G", ""), VM("v", "a", "4G", ",\"blockers\":[{\"message\":\"has a card\"}]")), NULL, "has a card");
    expect(INV(HOST("a", "8G", "") "," HOST("b", "64G", ""), VM("v", "a", "4G", ",\"together\":[\"g\"]") ","
               VM("w", "a", "1G", ",\"together\":[\"g\"],\"blockers\":[{\"message\":\"has a card\"}]")), NULL, "together with w, which cannot leave: has a card");
    expect(INV(HOST("a", "8G", "") "," HOST("b", "64G", ""), VM("v", "a", "4G", ",\"together\":[\"g\"],\"apart\":[\"h\"]") ","
               VM("w", "a", "1G", ",\"together\":[\"g\"],\"apart\":[\"h\"]")), NULL, "apart from w and together with it");
    /* swapped with its only possible backup */
    expect(INV(HOST("a", "8G", "") "," HOST("b", "8G", ""), VM("v", "a", "2G", ",\"backup\":\"b\"")), "b", "host b runs it itself");
}

/* The new backup of v goes to a host that was asked for; to another one only when none of these can be it. */
static void test_backup_elsewhere(void **state)
{
    static const struct {
        const char *c_memory;
        uint32_t to[2], n, backup;
    } cases[] = {{"8G", {1, 2}, 2, 2}, {"8G", {1}, 1, 3}, {"1G", {1, 2}, 2, 3}};
    (void)state;

    for (size_t i = 0; i < LB_ARRAY_LEN(cases); i++) {
        struct lb_plan_opts o = {.evacuate = A, .to = {(uint32_t *)cases[i].to, cases[i].n}};
        LB_AUTO_FREE char *text = lb_asprintf(INV(HOST("a", "8G", "") "," HOST("b", "8G", "") "," HOST("c", "%s", "") ","
                                                  HOST("d", "64G", ""), VM("v", "a", "2G", ",\"backup\":\"b\"")), cases[i].c_memory);
        struct lb_inventory inv;
        struct lb_plan p;

        parse(text, &inv);
        make(&inv, &o, &p);
        check(&inv, &o, &p);
        assert_int_equal(p.n_steps, 2);
        assert_int_equal(p.steps[0].kind, LB_PLAN_SWAP);
        assert_int_equal(p.steps[1].kind, LB_PLAN_BACKUP);
        assert_int_equal(p.steps[1].to, cases[i].backup);
        lb_plan_free(&p);
        lb_inventory_free(&inv);
    }
}

/* Spreading v1 and v2 first leaves no 4 GiB for v3; packing or repair does. */
static void test_tight(void **state)
{
    struct lb_plan_opts o = {.evacuate = A};
    struct lb_inventory inv;
    struct lb_plan p;

    (void)state;
    parse(INV(HOST("a", "32G", "") "," HOST("b", "9G", "") "," HOST("c", "9G", ""),
              VM("v1", "a", "5G", "") "," VM("v2", "a", "4G", "") "," VM("v3", "a", "3G", "") "," VM("v4", "a", "3G", "") ","
              VM("v5", "a", "3G", "")), &inv);
    make(&inv, &o, &p);
    check(&inv, &o, &p);
    assert_int_equal(p.n_steps, 5);
    assert_int_equal(p.n_stays, 0);
    lb_plan_free(&p);
    lb_inventory_free(&inv);
}

/* Hosts that their VMs fill to 98 %, cut at random: there is a way, and mostly it is found. */
static void test_full(void **state)
{
    unsigned whole = 0, cases = 100;

    (void)state;
    seed = 11;
    for (unsigned c = 0; c < cases; c++) {
        struct lb_inv_host hosts[5] = {{0}};
        struct lb_inv_vm vms[100] = {{0}};
        struct lb_inventory inv = {.hosts = hosts, .vms = vms, .n_hosts = 5, .setup_s = 1, .downtime_ms = 30};
        struct lb_plan_opts o = {.evacuate = A, .parallel = 1};
        struct lb_plan p;

        for (unsigned h = 0; h < 5; h++)
            hosts[h] = (struct lb_inv_host){.name = (char *)"h", .memory_bytes = 1000, .cpus = 1, .link_bytes_per_s = 1000};
        for (unsigned h = 1; h < 5; h++)
            for (unsigned left = 980, take; left; left -= take) {
                take = left < 100 ? left : 50 + below(LB_MIN(left, 450) - 50 + 1);
                vms[inv.n_vms++] = (struct lb_inv_vm){.name = (char *)"v", .backup = LB_INV_NONE, .memory_bytes = take};
            }
        make(&inv, &o, &p);
        check(&inv, &o, &p);
        whole += !p.n_stays;
        lb_plan_free(&p);
    }
    print_message("# %u of %u full sets of hosts packed whole\n", whole, cases);
    assert_true(whole >= 90);
}

/* v, the larger one, takes the faster and fuller host first: u must be apart from w, so v makes room. */
static void test_repair(void **state)
{
    (void)state;
    expect(INV(HOST("a", "8G", "") "," HOST("b", "3G", "") ",{\"name\":\"c\",\"memory_bytes\":\"5G\",\"link_bytes_per_s\":\"100Mbit\"}",
               VM("u", "a", "2G", ",\"apart\":[\"g\"]") "," VM("v", "a", "3G", "") "," VM("w", "c", "1G", ",\"apart\":[\"g\"]")), "b", NULL);
}

static void test_hot(void **state)
{
    struct lb_plan_opts o = {.evacuate = A};
    struct lb_inventory inv;
    struct lb_plan p;

    (void)state;
    parse(INV(HOST("a", "8G", "") "," HOST("b", "8G", ""), VM("v", "a", "1G", ",\"dirty_bytes_per_s\":\"200M\"")), &inv);
    make(&inv, &o, &p);
    assert_true(p.steps[0].throttled && p.steps[0].alone && p.steps[0].downtime_ms < 31);
    lb_plan_free(&p);
    o.hot = LB_PLAN_SUSPEND;
    make(&inv, &o, &p);
    assert_true(p.steps[0].suspended);
    assert_true(fabs(p.steps[0].downtime_ms - 8589.9) < 1); /* 1 GiB at 125 MB/s */
    lb_plan_free(&p);
    o.hot = LB_PLAN_LEAVE;
    make(&inv, &o, &p);
    assert_int_equal(p.n_steps, 0);
    assert_non_null(strstr(p.stays[0].reason, "no link as fast as memory is dirtied"));
    lb_plan_free(&p);
    lb_inventory_free(&inv);
}

static void test_options(void **state)
{
    struct lb_error err = LB_ERROR_INIT;
    struct lb_inventory inv;
    struct lb_plan p;

    (void)state;
    parse(INV(HOST("a", "8G", "") "," HOST("b", "8G", ",\"maintenance\":true"), ""), &inv);
    assert_int_equal(lb_plan_make(&inv, &(struct lb_plan_opts){0}, &p, &err), -1);
    assert_non_null(strstr(err.message, "no host to empty"));
    assert_int_equal(lb_plan_make(&inv, &(struct lb_plan_opts){.evacuate = A, .to = A}, &p, &err), -1);
    assert_non_null(strstr(err.message, "host a is to be emptied and filled"));
    assert_int_equal(lb_plan_make(&inv, &(struct lb_plan_opts){.evacuate = A, .to = {(uint32_t[]){1}, 1}}, &p, &err), -1);
    assert_non_null(strstr(err.message, "host b is in maintenance"));
    lb_inventory_free(&inv);
}

/* ------------------------------------------------- concurrency against every possibility */

#define MOST 5
#define AIM_S 0.03
struct move {
    double touched, dirty, in_link;
    unsigned dst;
    int phase;                       /* 0 not begun, 1 setup, 2 rounds, 3 paused, 4 done, 5 set up */
    double left, in_round;
};

/* Rounds as they are, one host emptied, `k` at once in that order; who is set up sends at once, or in turn. */
enum turns { AT_ONCE, ONE_OUT, ONE_IN, N_TURNS };

static double replay(struct move *m, unsigned n, const unsigned *order, unsigned k, enum turns turns, double setup, double cpus,
                     double link)
{
    double now = 0;
    unsigned done = 0, begun = 0, events = 0;

    for (unsigned i = 0; i < n; i++)
        m[i].phase = 0;
    while (done < n && events++ < 5000) {
        double dt = INFINITY, speed[MOST] = {0};
        unsigned setups = 0, sending = 0, into[MOST] = {0};

        while (begun < n && begun - done < k) {
            m[order[begun]].phase = 1;
            m[order[begun++]].left = setup;
        }
        for (unsigned i = 0; i < n; i++)
            if (m[i].phase == 2 || m[i].phase == 3) {
                sending++;
                into[m[i].dst]++;
            }
        for (unsigned i = 0; i < n; i++) {
            struct move *t = &m[order[i]];

            if (t->phase != 5 || (turns == ONE_OUT && sending) || (turns == ONE_IN && into[t->dst]))
                continue;
            t->phase = 2;
            t->left = t->touched;
            sending++;
            into[t->dst]++;
        }
        for (unsigned i = 0; i < n; i++) {
            setups += m[i].phase == 1;
        }
        for (unsigned i = 0; i < n; i++) {
            if (m[i].phase == 0 || m[i].phase >= 4)
                continue;
            speed[i] = m[i].phase == 1 ? fmin(1, cpus / setups) : fmin(link / sending, m[i].in_link / into[m[i].dst]);
            dt = fmin(dt, m[i].left / speed[i]);
        }
        now += dt;
        for (unsigned i = 0; i < n; i++) {
            double next;

            if (m[i].phase == 0 || m[i].phase >= 4)
                continue;
            m[i].left -= speed[i] * dt;
            m[i].in_round += dt;
            if (m[i].left > speed[i] * 1e-9)
                continue;
            next = fmin(m[i].touched, m[i].dirty * m[i].in_round);
            if (m[i].phase == 1) {
                m[i].phase = 5;
            } else if (m[i].phase == 3 || next <= 0) {
                m[i].phase = 4;
                done++;
            } else {
                m[i].phase = next <= speed[i] * AIM_S ? 3 : 2;
                m[i].left = next;
            }
            m[i].in_round = 0;
        }
    }
    return done == n ? now : INFINITY;
}

static double best_of_all(struct move *m, unsigned n, unsigned *order, unsigned at, double setup, double cpus, double link)
{
    double best = INFINITY;

    if (at == n) {
        for (unsigned k = 1; k <= n; k++)
            for (int t = 0; t < N_TURNS; t++)
                best = fmin(best, replay(m, n, order, k, (enum turns)t, setup, cpus, link));
        return best;
    }
    for (unsigned i = at; i < n; i++) {
        unsigned o = order[at];

        order[at] = order[i];
        order[i] = o;
        best = fmin(best, best_of_all(m, n, order, at + 1, setup, cpus, link));
        order[i] = order[at];
        order[at] = o;
    }
    return best;
}

static void test_concurrency(void **state)
{
    static const double links[] = {125e6, 312.5e6, 1250e6};
    double least = 1, worst = 0, sum = 0, one = 0;
    unsigned cases = 120, many = 0;

    (void)state;
    for (unsigned c = 0; c < cases; c++) {
        unsigned n, order[MOST] = {0, 1, 2, 3, 4};
        struct move m[MOST] = {{0}};
        struct lb_inv_host hosts[4] = {{0}};
        struct lb_inv_vm vms[MOST] = {{0}};
        struct lb_inventory inv = {.hosts = hosts, .vms = vms, .n_hosts = 3, .downtime_ms = AIM_S * 1000};
        struct lb_plan_opts o = {.evacuate = A};
        struct lb_plan p;
        double best, hot;

        seed = 1000 + c;
        n = 2 + below(MOST - 1);
        inv.n_vms = n;
        inv.setup_s = 0.05 + below(100) / 50.0;
        for (unsigned h = 0; h < 3; h++)
            hosts[h] = (struct lb_inv_host){.name = (char *)"h", .memory_bytes = 100 * GIB, .cpus = 1 + below(4),
                                            .link_bytes_per_s = (uint64_t)links[below(3)]};
        hosts[1].cpus = hosts[2].cpus = 64; /* the source decides */
        hot = (double)LB_MIN(hosts[0].link_bytes_per_s, LB_MIN(hosts[1].link_bytes_per_s, hosts[2].link_bytes_per_s));
        for (unsigned i = 0; i < n; i++)
            vms[i] = (struct lb_inv_vm){.name = (char *)"v", .backup = LB_INV_NONE, .memory_bytes = 4 * GIB,
                                        .touched_bytes = (20 + below(c % 2 ? 300 : 4000)) * UINT64_C(1000000),
                                        .dirty_bytes_per_s = (uint64_t)(hot * below(below(2) ? 70 : 10) / 100)};
        make(&inv, &o, &p);
        assert_int_equal(p.n_steps, n);
        for (unsigned i = 0; i < n; i++) {
            const struct lb_plan_step *s = &p.steps[i];

            m[s->vm] = (struct move){.touched = (double)vms[s->vm].touched_bytes, .dirty = (double)vms[s->vm].dirty_bytes_per_s,
                                     .in_link = (double)hosts[s->to].link_bytes_per_s, .dst = s->to};
        }
        best = best_of_all(m, n, order, 0, inv.setup_s, hosts[0].cpus, (double)hosts[0].link_bytes_per_s);
        if (p.makespan_s > best * 1.1 || p.makespan_s < best * 0.9)
            fail_msg("case %u: %.3f s, the best of all is %.3f s", c, p.makespan_s, best);
        worst = fmax(worst, p.makespan_s / best);
        least = fmin(least, p.makespan_s / best);
        sum += p.makespan_s / best;
        many += p.parallel[0] > 1;
        lb_plan_free(&p);
        o.parallel = 1;
        make(&inv, &o, &p);
        one += p.makespan_s / best;
        lb_plan_free(&p);
    }
    print_message("# %u cases against every order and number: mean %.3f, %.3f to %.3f of the best; one by one %.3f; "
                  "more than one in %u\n", cases, sum / cases, least, worst, one / cases, many);
    assert_true(many > cases / 4 && many < cases);
    assert_true(one / cases > sum / cases + 0.05);
}

/* -------------------------------------------------------------------- bad inventories */

static const char good[] =
    "{\"setup_s\": 0.5, \"downtime_ms\": 20, \"evacuate\": [\"a\"], \"to\": [\"b\"],\n"
    " \"hosts\": [{\"name\": \"a\", \"memory_bytes\": \"8G\", \"link_bytes_per_s\": \"1Gbit\", \"cpu\": \"x\", \"generation\": 1},\n"
    "  {\"name\": \"b\", \"memory_bytes\": 9000000000, \"reserved_bytes\": 1, \"used_bytes\": 2, \"cpus\": 3, \"link_bytes_per_s\": 125000000,\n"
    "   \"features\": [\"f\", \"g\"], \"tags\": [\"t\"], \"maintenance\": false, \"cpu\": \"x\", \"generation\": 2}],\n"
    " \"vms\": [{\"name\": \"v\", \"host\": \"a\", \"memory_bytes\": \"1G\", \"touched_bytes\": \"2G\", \"dirty_bytes_per_s\": 7,\n"
    "   \"cpu\": \"x\", \"generation\": 1, \"features\": [\"g\", \"f\", \"g\"], \"require_tags\": [\"t\"], \"forbid_tags\": [\"u\"],\n"
    "   \"together\": [\"p\"], \"apart\": [\"q\"], \"priority\": 5, \"backup\": \"b\",\n"
    "   \"blockers\": [{\"message\": \"m\", \"remedy\": \"r\"}, {\"message\": \"n\"}]}]}";

static void test_there_and_back(void **state)
{
    LB_AUTO_FREE char *text = NULL, *twice = NULL;
    struct lb_inventory inv, back;

    (void)state;
    parse(good, &inv);
    assert_int_equal(inv.hosts[0].memory_bytes, 8 * GIB);
    assert_int_equal(inv.hosts[0].link_bytes_per_s, 125000000);
    assert_int_equal(inv.vms[0].touched_bytes, GIB); /* no more than there is */
    assert_int_equal(inv.vms[0].features.n, 2);
    assert_int_equal(inv.vms[0].n_blockers, 2);
    text = lb_inventory_dump(&inv);
    parse(text, &back);
    twice = lb_inventory_dump(&back);
    assert_string_equal(text, twice);
    assert_non_null(strstr(text, "\"remedy\": \"r\""));
    assert_non_null(strstr(text, "\"backup\": \"b\""));
    lb_inventory_free(&inv);
    lb_inventory_free(&back);
}

static void test_bad(void **state)
{
    static const char *const cases[][2] = {
        {"{\n\"hosts\": [\n}", "line 3"},
        {"[]", "no object"},
        {"{\"vms\": []}", "hosts is missing"},
        {"{\"hosts\": {}, \"vms\": []}", "hosts is no list"},
        {"{\"hosts\": [], \"vms\": [], \"to\": [\"x\"]}", "to names a host that is not"},
        {INV("{\"name\":\"a\",\"memory_bytes\":1}", ""), "hosts[0] (\"a\").link_bytes_per_s is missing"},
        {INV(HOST("a", "1G", "") "," HOST("a", "1G", ""), ""), "hosts[1] (\"a\").name is there twice"},
        {INV(HOST("a", "lots", ""), ""), "hosts[0] (\"a\").memory_bytes is no size"},
        {INV(HOST("a", "1G", ",\"used_bytes\":-1"), ""), "used_bytes is no size"},
        {INV(HOST("a", "1G", ",\"used_bytes\":1e300"), ""), "used_bytes is no size"},
        {INV(HOST("a", "1G", ",\"colour\":1"), ""), "hosts[0] (\"a\").colour is not known"},
        {INV(HOST("a", "1G", ",\"cpus\":0"), ""), "cpus is 0"},
        {INV(HOST("a", "1G", ",\"tags\":[1]"), ""), "tags has an entry that is no name"},
        {INV(HOST("a", "1G", ",\"maintenance\":1"), ""), "maintenance is neither"},
        {INV("7", ""), "hosts[0] is no object"},
        {INV(HOST("a", "1G", ""), VM("v", "z", "1G", "")), "vms[0] (\"v\").host names a host that is not"},
        {INV(HOST("a", "1G", ""), VM("v", "a", "1G", ",\"backup\":\"a\"")), "backup is the host it runs on"},
        {INV(HOST("a", "1G", ""), VM("v", "a", "1G", ",\"priority\":\"high\"")), "priority is no whole number"},
        {INV(HOST("a", "1G", ""), VM("v", "a", "1G", ",\"blockers\":[\"x\"]")), "blockers has an entry"},
        {INV(HOST("a", "1G", ""), VM("v", "a", "1G", ",\"host\":\"a\"")), "duplicate"},
    };
    struct lb_inventory inv;

    (void)state;
    for (size_t i = 0; i < LB_ARRAY_LEN(cases); i++) {
        struct lb_error err = LB_ERROR_INIT;

        assert_int_equal(lb_inventory_parse(cases[i][0], strlen(cases[i][0]), &inv, &err), -1);
        assert_int_equal(err.code, LB_E_USAGE);
        assert_true(err.remedy[0]);
        if (!strstr(err.message, cases[i][1]))
            fail_msg("\"%s\" does not say \"%s\"", err.message, cases[i][1]);
    }
}

/* Whatever is changed, it is an error or a plan that holds. */
static void test_damaged(void **state)
{
    unsigned planned = 0, refused = 0;

    (void)state;
    seed = 3;
    for (unsigned i = 0; i < 20000; i++) {
        struct lb_error err = LB_ERROR_INIT;
        size_t len = strlen(good);
        struct lb_inventory inv;
        struct lb_plan p;
        char text[sizeof(good)];

        memcpy(text, good, sizeof(good));
        for (unsigned n = 1 + below(2); n; n--)
            text[below((unsigned)len)] = "0123456789abtuvx\"[]{},:-. "[below(26)];
        if (!below(10))
            len = below((unsigned)len);
        if (lb_inventory_parse(text, len, &inv, &err)) {
            assert_true(err.message[0] && err.remedy[0]);
            refused++;
            continue;
        }
        struct lb_plan_opts o = {.evacuate = inv.evacuate, .to = inv.to};
        if (!lb_plan_make(&inv, &o, &p, &err)) {
            check(&inv, &o, &p);
            planned++;
            lb_plan_free(&p);
        }
        lb_inventory_free(&inv);
    }
    assert_true(planned > 100 && refused > 1000);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_there_and_back), cmocka_unit_test(test_bad),     cmocka_unit_test(test_damaged),
        cmocka_unit_test(test_constraints),    cmocka_unit_test(test_reasons),
        cmocka_unit_test(test_backup_elsewhere), cmocka_unit_test(test_tight),
        cmocka_unit_test(test_full),           cmocka_unit_test(test_repair), cmocka_unit_test(test_hot),            cmocka_unit_test(test_options), cmocka_unit_test(test_concurrency),
        cmocka_unit_test(test_random),         cmocka_unit_test(test_big),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
