/* Convergence policy: single decisions, and a model guest driven through whole
 * migrations over a grid of parameters. The table it prints is the result. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <math.h>
#include <string.h>

#include "migrate/policy.h"

#define MB 1e6
#define PAGE 4096.0

/* ---------------------------------------------------------------- the model */

struct guest {
    double mem, set;       /* bytes: all memory, the working set */
    double rate;           /* bytes of pages written per second, unthrottled */
    bool hot;              /* 90 % of the writes go to 10 % of the working set */
    double link;           /* bytes/s */
    double max_ms, fixed_ms;
    bool throttle, compress;
    double noise;          /* relative, of what is dirtied */
};
struct outcome {
    enum lb_decision end;
    unsigned rounds, throttle;
    double wire, predicted_ms, seconds;
    bool compressed;
    char reason[200];
};
#define COMPRESSED 0.4     /* of a page's bytes */
#define ROUND_OVERHEAD_S 0.002

static unsigned seed = 20261121;

static double random_around(double noise)
{
    return 1 + noise * (2.0 * rand_r(&seed) / RAND_MAX - 1);
}

static double touched(double set, double rate, double t)
{
    return set > 0 ? set * -expm1(-rate * t / set) : 0;
}

static double dirtied(const struct guest *g, double rate, double t)
{
    double d = g->hot ? touched(g->set * 0.1, rate * 0.9, t) + touched(g->set * 0.9, rate * 0.1, t)
                      : touched(g->set, rate, t);
    return fmin(d * random_around(g->noise), g->set);
}

static struct outcome migrate(const struct guest *g)
{
    struct lb_round_stats r[80] = {0};
    struct outcome o = {.end = LB_POLICY_CONTINUE};
    double left = g->mem, per_page = PAGE;

    while (o.rounds < 80) {
        double bytes = left / PAGE * per_page, t = bytes / g->link + ROUND_OVERHEAD_S;
        double next = dirtied(g, g->rate * (1 - o.throttle / 100.0), t);
        o.wire += bytes;
        o.seconds += t;
        r[o.rounds] = (struct lb_round_stats){
            .round = o.rounds,
            .pages_sent = (uint64_t)(left / PAGE),
            .wire_bytes = (uint64_t)bytes,
            .duration_ns = (uint64_t)(t * 1e9),
            .guest_ran_ns = (uint64_t)((t - 0.001) * 1e9),
            .dirty_pages_after = (uint64_t)(next / PAGE),
        };
        o.rounds++;
        left = floor(next / PAGE) * PAGE;
        struct lb_policy_in in = {
            .rounds = r,
            .n_rounds = o.rounds,
            .max_downtime_ms = (uint32_t)g->max_ms,
            .fixed_downtime_ms = g->fixed_ms,
            .bytes_per_page = per_page,
            .elapsed_ms = (uint64_t)(o.seconds * 1000),
            .compress_possible = g->compress && !o.compressed,
            .throttle_possible = g->throttle,
            .throttle_percent = o.throttle,
        };
        struct lb_policy_out out;
        lb_policy_decide(&in, &out);
        o.end = out.decision;
        o.predicted_ms = out.predicted_downtime_ms;
        memcpy(o.reason, out.reason, sizeof(o.reason));
        assert_true(out.reason[0] && strlen(out.reason) < sizeof(out.reason) - 1);
        /* a throttle is only ever raised, and only by a THROTTLE decision */
        assert_true(out.throttle_percent >= o.throttle && out.throttle_percent <= 99);
        assert_true((out.decision == LB_POLICY_THROTTLE) == (out.throttle_percent > o.throttle));
        o.throttle = out.throttle_percent;
        if (out.decision == LB_POLICY_COMPRESS) {
            assert_true(g->compress && !o.compressed);
            o.compressed = true;
            per_page = PAGE * COMPRESSED;
        }
        if (out.decision == LB_POLICY_THROTTLE)
            assert_true(g->throttle && (!g->compress || o.compressed)); /* order of the ladder */
        if (out.decision == LB_POLICY_ABORT)
            break;
        if (out.decision == LB_POLICY_STOP_AND_COPY) {
            o.wire += left / PAGE * per_page;
            break;
        }
    }
    return o;
}

/* The best anybody can do without touching the guest: round after round, and stop
 * at the first that fits. < 0: never. */
static double optimum(const struct guest *g)
{
    double left = g->mem, wire = 0, fit = (g->max_ms - g->fixed_ms) / 1000 * g->link;
    struct guest quiet = *g;
    quiet.noise = 0;
    for (unsigned i = 0; i < 400; i++) {
        wire += left;
        left = dirtied(&quiet, g->rate, left / g->link + ROUND_OVERHEAD_S);
        if (left <= fit)
            return wire + left;
    }
    return -1;
}

static const char *decision_name(enum lb_decision d)
{
    static const char *const names[] = {"continue", "stop", "compress", "throttle", "abort"};
    return names[d];
}

static void check_outcome(const struct guest *g, const struct outcome *o)
{
    double best = optimum(g), fit = (g->max_ms - g->fixed_ms) / 1000 * g->link;
    double load = g->rate / g->link;

    assert_true(o->end == LB_POLICY_STOP_AND_COPY || o->end == LB_POLICY_ABORT);
    assert_true(o->rounds <= 64);
    if (o->end == LB_POLICY_STOP_AND_COPY)
        assert_true(o->predicted_ms <= g->max_ms);
    if (load < 0.7) {
        assert_int_equal(o->end, LB_POLICY_STOP_AND_COPY);
        assert_int_equal(o->throttle, 0);
        assert_false(o->compressed);
        /* noise, and at most three rounds that make the pause shorter than allowed */
        assert_true(best > 0 && o->wire <= 1.1 * best + 3 * fit);
    }
    if (g->throttle) /* at 99 % everything in the grid converges */
        assert_int_equal(o->end, LB_POLICY_STOP_AND_COPY);
    if (best < 0 && !g->throttle && !g->compress) {
        assert_int_equal(o->end, LB_POLICY_ABORT);
        assert_non_null(strstr(o->reason, "--max-downtime"));
        assert_non_null(strstr(o->reason, "quieter"));
        assert_true(o->wire <= g->mem + 12 * g->set);
    }
    if (load >= 0.7) /* however it ends, in a handful of working sets */
        assert_true(o->wire <= g->mem + 24 * g->set);
}

static void test_grid(void **s)
{
    (void)s;
    static const double sets[] = {16 * MB, 128 * MB, 512 * MB, 1000 * MB};
    static const double links[] = {12.5 * MB, 125 * MB, 1250 * MB};
    static const double loads[] = {0.02, 0.3, 0.6, 0.69, 0.9, 0.96, 1.1, 2, 5};
    static const double downtimes[] = {30, 300};
    unsigned runs = 0, stops = 0, throttled = 0, worst_rounds = 0;
    double worst_ratio = 0;

    printf("seed %u; 1 GB guest, fixed 12 ms, noise 5 %%; shown: 125 MB/s, 30 ms\n", seed);
    printf("%7s %5s %-8s %-10s | %-6s %6s %6s %8s %8s %9s %9s\n", "set MB", "R/L", "writes",
           "allowed", "end", "rounds", "thr %", "zstd", "pred ms", "wire MB", "optimum");
    for (unsigned a = 0; a < LB_ARRAY_LEN(sets); a++)
    for (unsigned b = 0; b < LB_ARRAY_LEN(links); b++)
    for (unsigned c = 0; c < LB_ARRAY_LEN(loads); c++)
    for (unsigned d = 0; d < LB_ARRAY_LEN(downtimes); d++)
    for (unsigned flags = 0; flags < 16; flags++) {
        struct guest g = {.mem = 1000 * MB, .set = sets[a], .rate = loads[c] * links[b],
                          .hot = flags & 1, .link = links[b], .max_ms = downtimes[d],
                          .fixed_ms = 12, .throttle = flags & 2, .compress = flags & 4,
                          .noise = flags & 8 ? 0.05 : 0};
        struct outcome o = migrate(&g);
        double best = optimum(&g);
        if (b == 1 && d == 0 && (flags & 8) && (flags & 6) != 4)
            printf("%7.0f %5.2f %-8s %-10s | %-6s %6u %6u %8s %8.1f %9.0f %9.0f\n", g.set / MB,
                   loads[c], g.hot ? "hot/cold" : "uniform",
                   !g.throttle ? "-" : g.compress ? "zstd,thr" : "thr", decision_name(o.end),
                   o.rounds, o.throttle, o.compressed ? "yes" : "no", o.predicted_ms, o.wire / MB,
                   best < 0 ? NAN : best / MB); /* nan: never without help */
        check_outcome(&g, &o);
        runs++;
        stops += o.end == LB_POLICY_STOP_AND_COPY;
        throttled += o.throttle > 0;
        worst_rounds = LB_MAX(worst_rounds, o.rounds);
        if (loads[c] < 0.7)
            worst_ratio = fmax(worst_ratio, o.wire / best);
    }
    printf("%u runs: %u stopped, %u gave up, %u throttled, at most %u rounds, wire <= %.2f of the "
           "optimum where R < 0.7 L\n", runs, stops, runs - stops, throttled, worst_rounds,
           worst_ratio);
}

/* ---------------------------------------------------------- single decisions */

static struct lb_round_stats round_of(uint64_t pages, uint64_t ms, uint64_t dirty)
{
    return (struct lb_round_stats){.pages_sent = pages, .wire_bytes = pages * 4096,
                                   .duration_ns = ms * 1000000, .guest_ran_ns = ms * 1000000,
                                   .dirty_pages_after = dirty};
}

static struct lb_policy_in input(const struct lb_round_stats *r, unsigned n)
{
    return (struct lb_policy_in){.rounds = r, .n_rounds = n, .max_downtime_ms = 30,
                                 .fixed_downtime_ms = 10, .bytes_per_page = 4096};
}

static enum lb_decision decide(const struct lb_policy_in *in, struct lb_policy_out *out)
{
    lb_policy_decide(in, out);
    return out->decision;
}

static void test_small_cases(void **s)
{
    (void)s;
    struct lb_policy_out out;
    struct lb_round_stats r[3];
    struct lb_policy_in in = input(NULL, 0);
    assert_int_equal(decide(&in, &out), LB_POLICY_CONTINUE);
    assert_int_equal(out.converges, -1);

    /* 30 pages/ms, idle guest: stop after the first round */
    r[0] = round_of(30000, 1000, 0);
    in = input(r, 1);
    assert_int_equal(decide(&in, &out), LB_POLICY_STOP_AND_COPY);
    assert_true(fabs(out.predicted_downtime_ms - 10) < 0.01);
    assert_int_equal(out.converges, 1);

    /* 250 pages = 8.3 ms of 20: under half of the allowance */
    r[0] = round_of(30000, 1000, 250);
    assert_int_equal(decide(&in, &out), LB_POLICY_STOP_AND_COPY);
    assert_true(fabs(out.predicted_downtime_ms - 18.33) < 0.1);

    /* 500 pages = 16.7 ms fit, and one round ago there were 5000: one more round */
    r[0] = round_of(30000, 1000, 5000);
    r[1] = round_of(5000, 167, 500);
    in = input(r, 2);
    assert_int_equal(decide(&in, &out), LB_POLICY_CONTINUE);
    assert_int_equal(out.converges, 1);
    /* ... but not when it no longer shrinks well */
    r[0].dirty_pages_after = 600;
    assert_int_equal(decide(&in, &out), LB_POLICY_STOP_AND_COPY);
    /* ... nor when the time is over */
    r[0].dirty_pages_after = 5000;
    in.timeout_ms = 1000;
    in.elapsed_ms = 1001;
    assert_int_equal(decide(&in, &out), LB_POLICY_STOP_AND_COPY);
    r[1].dirty_pages_after = 700;
    assert_int_equal(decide(&in, &out), LB_POLICY_ABORT);
    assert_non_null(strstr(out.reason, "timeout"));

    /* a round that sent nothing says nothing about the link */
    r[0] = (struct lb_round_stats){.duration_ns = 1000, .dirty_pages_after = 10};
    in = input(r, 1);
    assert_int_equal(decide(&in, &out), LB_POLICY_CONTINUE);
    r[0].dirty_pages_after = 0;
    assert_int_equal(decide(&in, &out), LB_POLICY_STOP_AND_COPY);
}

/* The fixed part alone is more than allowed: end, and say so. */
static void test_fixed_dominates(void **s)
{
    (void)s;
    struct lb_policy_out out;
    struct lb_round_stats r[2] = {round_of(30000, 1000, 3000), round_of(3000, 100, 50)};
    struct lb_policy_in in = input(r, 2);
    in.fixed_downtime_ms = 45;
    assert_int_equal(decide(&in, &out), LB_POLICY_STOP_AND_COPY);
    assert_non_null(strstr(out.reason, "fixed part"));
    assert_true(out.predicted_downtime_ms > 45 && out.predicted_downtime_ms < 50);
    r[1].dirty_pages_after = 1000;
    assert_int_equal(decide(&in, &out), LB_POLICY_CONTINUE);
}

/* The bandwidth limit holds for the last round as well. */
static void test_bandwidth_limit(void **s)
{
    (void)s;
    struct lb_policy_out out;
    struct lb_round_stats r[1] = {round_of(30000, 1000, 300)};
    struct lb_policy_in in = input(r, 1);
    assert_int_equal(decide(&in, &out), LB_POLICY_STOP_AND_COPY);
    in.bandwidth_limit = 12288000; /* a tenth */
    assert_int_equal(decide(&in, &out), LB_POLICY_CONTINUE);
    assert_true(fabs(out.predicted_downtime_ms - 110) < 1);
}

/* What is allowed beyond the aim is used only when the aim cannot be reached. */
static void test_aim(void **s)
{
    (void)s;
    struct lb_policy_out out;
    struct lb_round_stats r[8];
    struct lb_policy_in in = input(r, 0);

    in.aim_downtime_ms = 30;
    in.max_downtime_ms = 300;
    in.throttle_possible = in.compress_possible = true;
    r[0] = round_of(30000, 1000, 6000);
    in.n_rounds = 1;
    assert_int_equal(decide(&in, &out), LB_POLICY_CONTINUE); /* 210 ms would be allowed */
    for (unsigned i = 1; i < 5; i++) {
        r[i] = round_of(6000, 200, 6000);
        in.n_rounds = i + 1;
        assert_int_equal(decide(&in, &out),
                         i < 4 ? LB_POLICY_CONTINUE : LB_POLICY_STOP_AND_COPY);
    }
    assert_non_null(strstr(out.reason, "allowed downtime"));
    assert_true(out.predicted_downtime_ms > 200 && out.predicted_downtime_ms < 220);
    /* more than is allowed: the next step of the ladder instead */
    in.max_downtime_ms = 150;
    assert_int_equal(decide(&in, &out), LB_POLICY_COMPRESS);
    /* the time is over: what is allowed will do */
    in.max_downtime_ms = 300;
    in.n_rounds = 1;
    in.timeout_ms = in.elapsed_ms = 1000;
    assert_int_equal(decide(&in, &out), LB_POLICY_STOP_AND_COPY);
}

/* The whole ladder on one stalled guest, step by step. */
static void test_ladder(void **s)
{
    (void)s;
    struct lb_policy_out out;
    struct lb_round_stats r[40];
    struct lb_policy_in in = input(r, 0);
    enum lb_decision want[] = {LB_POLICY_CONTINUE, LB_POLICY_CONTINUE, LB_POLICY_CONTINUE,
                               LB_POLICY_CONTINUE, LB_POLICY_COMPRESS};
    unsigned expect[] = {20, 40, 60, 80, 90, 99}, n = 0;

    in.compress_possible = in.throttle_possible = true;
    for (unsigned i = 0; i < 5; i++) {
        r[n] = round_of(9000, 300, 9000);
        in.n_rounds = ++n;
        assert_int_equal(decide(&in, &out), want[i]);
    }
    in.compress_possible = false;
    for (unsigned i = 0; i < LB_ARRAY_LEN(expect); i++) {
        r[n] = round_of(9000, 300, 9000);
        in.n_rounds = ++n;
        assert_int_equal(decide(&in, &out), LB_POLICY_THROTTLE);
        assert_int_equal(out.throttle_percent, expect[i]);
        in.throttle_percent = out.throttle_percent;
        /* a step that works is given time */
        r[n] = round_of(9000, 300, 7500);
        in.n_rounds = n + 1;
        assert_int_equal(decide(&in, &out), LB_POLICY_CONTINUE);
        assert_int_equal(out.throttle_percent, expect[i]);
    }
    r[n] = round_of(9000, 300, 9000);
    in.n_rounds = ++n;
    assert_int_equal(decide(&in, &out), LB_POLICY_ABORT);
    assert_int_equal(out.converges, 0);
    assert_non_null(strstr(out.reason, "even throttled"));
    assert_non_null(strstr(out.reason, "117.2 MiB/s"));
}

static void test_round_limit(void **s)
{
    (void)s;
    struct lb_policy_out out;
    struct lb_round_stats r[64];
    for (unsigned i = 0; i < 64; i++) /* a dirty set that jumps, so that it never stalls for long */
        r[i] = round_of(9000, 300, i % 2 ? 9000 : 5000);
    struct lb_policy_in in = input(r, 64);
    in.throttle_possible = true;
    assert_int_equal(decide(&in, &out), LB_POLICY_ABORT);
    assert_non_null(strstr(out.reason, "rounds"));
    r[63].dirty_pages_after = 500;
    assert_int_equal(decide(&in, &out), LB_POLICY_STOP_AND_COPY);
}

static void test_forecast(void **s)
{
    (void)s;
    struct lb_policy_out out;
    lb_policy_forecast(1u << 30, 50 * MB, 512u << 20, 0, 30, &out);
    assert_int_equal(out.converges, -1);
    assert_true(out.eta_s < 0);
    lb_policy_forecast(1u << 30, 0, 0, 125 * MB, 30, &out);
    assert_int_equal(out.converges, 1);
    assert_true(fabs(out.eta_s - (1u << 30) / (125 * MB) - 0.015) < 0.01);
    /* dirtying at 0.6 of the link costs 1/(1-0.6) as long */
    lb_policy_forecast(1u << 30, 75 * MB, 0, 125 * MB, 30, &out);
    assert_int_equal(out.converges, 1);
    assert_true(out.eta_s > 18 && out.eta_s < 23);
    lb_policy_forecast(1u << 30, 200 * MB, 512u << 20, 125 * MB, 30, &out);
    assert_int_equal(out.converges, 0);
    assert_true(out.predicted_downtime_ms > 1000);
    /* faster than the link, but the working set itself fits the pause */
    lb_policy_forecast(1u << 30, 500 * MB, 1u << 20, 125 * MB, 30, &out);
    assert_int_equal(out.converges, 1);
    assert_true(out.predicted_downtime_ms <= 30);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_small_cases), cmocka_unit_test(test_fixed_dominates),
        cmocka_unit_test(test_bandwidth_limit), cmocka_unit_test(test_ladder),
        cmocka_unit_test(test_aim),
        cmocka_unit_test(test_round_limit), cmocka_unit_test(test_forecast),
        cmocka_unit_test(test_grid),
    };
    return cmocka_run_group_tests_name("policy", tests, NULL, NULL);
}
