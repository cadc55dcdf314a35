/* The compression model against a simulated link, cipher and data. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <math.h>

#include "migrate/tuner.h"

struct world {
    double link;          /* bytes/s */
    double base_ns;       /* per page, without compression */
    double ns[3], bytes[3];
    unsigned workers;
};
static const double zstd_ns[3] = {0, 8000, 14000};

static double true_rate(const struct world *w, unsigned i)
{
    return fmin(w->workers * 1e9 / (w->base_ns + w->ns[i]), w->link / w->bytes[i]);
}

/* `seconds` of sending in windows of 60 ms; returns the level in use at the end. */
static unsigned run(struct lb_tuner *t, const struct world *w, double seconds, unsigned *changes)
{
    unsigned now = t->now;

    *changes = 0;
    for (double at = 0; at < seconds; at += 0.06) {
        double r = true_rate(w, now), busy = r * (w->base_ns + w->ns[now]);
        unsigned next;

        for (unsigned i = 1; i < 3; i++)
            lb_tuner_sample(t, i, 32, (uint64_t)(w->ns[i] * 32), (uint64_t)(w->bytes[i] * 32));
        next = lb_tuner_window(t, w->workers, 60000000,
                               (uint64_t)(0.06 * (w->workers * 1e9 - busy)), (uint64_t)(r * 0.06),
                               (uint64_t)(r * 0.06 * w->bytes[now]));
        *changes += next != now;
        now = next;
    }
    return now;
}

/* Whatever the world, it ends within 8 % of the best level and stays there. */
static void test_finds_the_best(void **s)
{
    static const double links[] = {10e6, 117e6, 500e6, 1.2e9, 5e9};
    static const double ratios[] = {0.05, 0.27, 0.5, 0.8, 1.0};
    unsigned changes;

    (void)s;
    for (unsigned a = 0; a < LB_ARRAY_LEN(links); a++)
    for (unsigned b = 0; b < LB_ARRAY_LEN(ratios); b++)
    for (unsigned n = 1; n <= 4; n++) {
        struct world w = {.link = links[a], .base_ns = 2000, .workers = n,
                          .bytes = {4096, 4096 * ratios[b], 4096 * ratios[b] * 0.93}};
        struct lb_tuner t;
        double best = 0;

        for (unsigned i = 0; i < 3; i++)
            w.ns[i] = zstd_ns[i];
        lb_tuner_init(&t);
        run(&t, &w, 1.0, &changes);
        for (unsigned i = 0; i < 3; i++)
            best = fmax(best, true_rate(&w, i));
        assert_true(true_rate(&w, t.now) * 1.1 >= best);
        /* it may look again now and then, not all the time */
        run(&t, &w, 3.0, &changes);
        assert_true(changes <= 6);
        assert_true(true_rate(&w, t.now) * 1.1 >= best);
    }
}

/* 1 Gb/s and memory that compresses 4:1: on within a fifth of a second. Then a fast link:
 * off again. */
static void test_follows(void **s)
{
    struct world w = {.link = 117e6, .base_ns = 2000, .workers = 1,
                      .ns = {0, 8000, 14000}, .bytes = {4096, 1024, 990}};
    struct lb_tuner t;
    unsigned changes;

    (void)s;
    lb_tuner_init(&t);
    assert_true(run(&t, &w, 0.2, &changes) > 0);
    assert_true(lb_tuner_compressible(&t));
    w.link = 20e9;
    w.bytes[1] = w.bytes[2] = 4096; /* and data that does not compress */
    assert_int_equal(run(&t, &w, 1.0, &changes), 0);
    assert_false(lb_tuner_compressible(&t));
}

static void test_nothing_known(void **s)
{
    struct lb_tuner t;

    (void)s;
    lb_tuner_init(&t);
    assert_int_equal(lb_tuner_window(&t, 1, 0, 0, 0, 0), 0);
    assert_int_equal(lb_tuner_window(&t, 1, 1000, 900, 10, 40960), 0);
    assert_false(lb_tuner_compressible(&t));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_finds_the_best), cmocka_unit_test(test_follows),
        cmocka_unit_test(test_nothing_known),
    };
    return cmocka_run_group_tests_name("tuner", tests, NULL, NULL);
}
