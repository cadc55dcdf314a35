/* Bitmaps: word edges, runs, and a random comparison with one byte per bit. */
#include "core/core.h"

#include <setjmp.h>
#include <string.h>
#include <cmocka.h>

static void sizes_and_edges(void **state)
{
    (void)state;
    const uint64_t sizes[] = {0, 1, 63, 64, 65, 127, 128, 129, 1000};
    for (size_t i = 0; i < LB_ARRAY_LEN(sizes); i++) {
        struct lb_bitmap b;
        uint64_t first, count;
        assert_int_equal(lb_bitmap_init(&b, sizes[i], NULL), 0);
        assert_int_equal(lb_bitmap_count(&b), 0);
        assert_false(lb_bitmap_next_run(&b, 0, 1, &first, &count));
        lb_bitmap_set_all(&b);
        assert_int_equal(lb_bitmap_count(&b), sizes[i]);
        if (sizes[i]) {
            assert_true(lb_bitmap_next_run(&b, 0, UINT64_MAX, &first, &count));
            assert_int_equal(first, 0);
            assert_int_equal(count, sizes[i]);
            assert_true(lb_bitmap_next_run(&b, sizes[i] - 1, UINT64_MAX, &first, &count));
            assert_int_equal(first, sizes[i] - 1);
            assert_int_equal(count, 1);
        }
        assert_false(lb_bitmap_next_run(&b, sizes[i], 1, &first, &count));
        assert_false(lb_bitmap_next_run(&b, UINT64_MAX, 1, &first, &count));
        lb_bitmap_clear_all(&b);
        assert_int_equal(lb_bitmap_count(&b), 0);
        lb_bitmap_free(&b);
        assert_null(b.words);
    }
}

static void run_limits(void **state)
{
    (void)state;
    struct lb_bitmap b;
    uint64_t first, count;
    assert_int_equal(lb_bitmap_init(&b, 256, NULL), 0);
    lb_bitmap_set_range(&b, 60, 140); /* crosses two word edges */
    assert_true(lb_bitmap_next_run(&b, 0, 1000, &first, &count));
    assert_int_equal(first, 60);
    assert_int_equal(count, 140);
    assert_true(lb_bitmap_next_run(&b, 0, 4, &first, &count));
    assert_int_equal(first, 60);
    assert_int_equal(count, 4);
    assert_true(lb_bitmap_next_run(&b, 64, 64, &first, &count));
    assert_int_equal(first, 64);
    assert_int_equal(count, 64);
    lb_bitmap_clear(&b, 128);
    assert_true(lb_bitmap_next_run(&b, 100, 1000, &first, &count));
    assert_int_equal(first, 100);
    assert_int_equal(count, 28);
    assert_true(lb_bitmap_next_run(&b, 128, 1000, &first, &count));
    assert_int_equal(first, 129);
    assert_int_equal(count, 71);
    assert_false(lb_bitmap_next_run(&b, 200, 1000, &first, &count));
    lb_bitmap_free(&b);
}

static void against_bytes(void **state)
{
    (void)state;
    enum { N = 517 };
    unsigned char want[N] = {0}, want2[N] = {0};
    struct lb_bitmap b, b2;
    unsigned seed = 4711;
    assert_int_equal(lb_bitmap_init(&b, N, NULL), 0);
    assert_int_equal(lb_bitmap_init(&b2, N, NULL), 0);
    for (int step = 0; step < 3000; step++) {
        uint64_t first = (uint64_t)rand_r(&seed) % (N + 1);
        uint64_t len = (uint64_t)rand_r(&seed) % (N - first + 1);
        switch (rand_r(&seed) % 5) {
        case 0:
            lb_bitmap_set_range(&b, first, len);
            memset(want + first, 1, len);
            break;
        case 1:
            lb_bitmap_clear_range(&b, first, len);
            memset(want + first, 0, len);
            break;
        case 2:
            lb_bitmap_set_range(&b2, first, len);
            memset(want2 + first, 1, len);
            break;
        case 3:
            lb_bitmap_or(&b, &b2);
            for (int i = 0; i < N; i++)
                want[i] |= want2[i];
            break;
        default:
            lb_bitmap_andnot(&b, &b2);
            for (int i = 0; i < N; i++)
                want[i] &= (unsigned char)!want2[i];
            lb_bitmap_clear_all(&b2);
            memset(want2, 0, N);
        }
        uint64_t total = 0, at = 0, run_first, run, seen = 0;
        for (int i = 0; i < N; i++) {
            total += want[i];
            assert_int_equal(lb_bitmap_test(&b, (uint64_t)i), want[i]);
        }
        assert_int_equal(lb_bitmap_count(&b), total);
        uint64_t max = 1 + (uint64_t)rand_r(&seed) % 90;
        while (lb_bitmap_next_run(&b, at, max, &run_first, &run)) {
            assert_true(run_first >= at && run >= 1 && run <= max && run_first + run <= N);
            for (uint64_t i = at; i < run_first; i++)
                assert_int_equal(want[i], 0);
            for (uint64_t i = run_first; i < run_first + run; i++)
                assert_int_equal(want[i], 1);
            assert_true(run == max || run_first + run == N || !want[run_first + run]);
            seen += run;
            at = run_first + run;
        }
        assert_int_equal(seen, total);
    }
    lb_bitmap_free(&b);
    lb_bitmap_free(&b2);
}

static void too_large(void **state)
{
    (void)state;
    struct lb_bitmap b = {0};
    struct lb_error err = LB_ERROR_INIT;
    assert_int_equal(lb_bitmap_init(&b, UINT64_MAX, &err), -1);
    assert_int_equal(err.code, LB_E_NO_SPACE);
    assert_null(b.words);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sizes_and_edges),
        cmocka_unit_test(run_limits),
        cmocka_unit_test(against_bytes),
        cmocka_unit_test(too_large),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
