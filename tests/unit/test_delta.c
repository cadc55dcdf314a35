/* The cache of what the backup holds: differences against a plain model, its bound, what it gives up. */
#include "remus/delta.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>
/* after the headers above */
#include <cmocka.h>

#define PAGE LB_PAGE_SIZE

static uint64_t g_rng = 7;
static uint8_t g_xored[PAGE] __attribute__((aligned(64)));

static uint64_t rnd(uint64_t below)
{
    g_rng = g_rng * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (g_rng >> 33) % below;
}

static struct lb_delta *cache_new(uint64_t pages)
{
    static const uint64_t sizes[] = {500, 0, 40};
    struct lb_delta *d;
    assert_int_equal(lb_delta_new(sizes, 3, pages * PAGE + 100, &d, NULL), 0);
    return d;
}

static void change_words(uint8_t *page, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        page[i * 8] ^= 1;
}

static void kinds(void **state)
{
    (void)state;
    static uint8_t page[PAGE] __attribute__((aligned(64))), old[PAGE];
    struct lb_delta *d = cache_new(10);

    assert_int_equal(lb_delta_update(d, 2, 39, page, true, g_xored), LB_DELTA_NEW);
    assert_int_equal(lb_delta_bytes(d), 0); /* zeros are not kept */
    memset(page, 5, PAGE);
    assert_int_equal(lb_delta_update(d, 2, 39, page, false, g_xored), LB_DELTA_NEW);
    assert_int_equal(lb_delta_bytes(d), PAGE);
    assert_int_equal(lb_delta_update(d, 0, 39, page, false, g_xored), LB_DELTA_NEW);
    assert_int_equal(lb_delta_update(d, 2, 39, page, false, g_xored), LB_DELTA_SAME);
    memcpy(old, page, PAGE);
    change_words(page, 384);
    assert_int_equal(lb_delta_update(d, 2, 39, page, false, g_xored), LB_DELTA_SPARSE);
    for (unsigned i = 0; i < PAGE; i++)
        assert_int_equal(g_xored[i], old[i] ^ page[i]);
    change_words(page, 385);
    assert_int_equal(lb_delta_update(d, 2, 39, page, false, g_xored), LB_DELTA_DENSE);
    for (unsigned i = 0; i < PAGE; i++) { /* any one octet counts */
        page[i] ^= 0x80;
        assert_int_equal(lb_delta_update(d, 2, 39, page, false, g_xored), LB_DELTA_SPARSE);
    }
    assert_int_equal(lb_delta_update(d, 2, 39, page, false, g_xored), LB_DELTA_SAME);
    /* zeros are a change like another for a page that is held */
    memset(page, 0, PAGE);
    assert_int_equal(lb_delta_update(d, 2, 39, page, true, g_xored), LB_DELTA_DENSE);
    assert_int_equal(lb_delta_update(d, 2, 39, page, true, g_xored), LB_DELTA_SAME);
    lb_delta_free(d);
}

static void no_room_at_all(void **state)
{
    (void)state;
    static uint8_t page[PAGE] __attribute__((aligned(64)));
    struct lb_delta *d = cache_new(0);
    for (unsigned i = 0; i < 100; i++) {
        page[0] = (uint8_t)i;
        assert_int_equal(lb_delta_update(d, 0, i % 3, page, false, g_xored), LB_DELTA_NEW);
    }
    assert_int_equal(lb_delta_bytes(d), 0);
    lb_delta_free(d);
}

/* Whatever has been given up since: a difference is always one to what was given last. */
static void against_a_model(void **state)
{
    (void)state;
    static uint8_t last[540][PAGE], now[PAGE] __attribute__((aligned(64)));
    static bool given[540];

    for (uint64_t cap = 1; cap <= 600; cap = cap * 3 + 1) {
        struct lb_delta *d = cache_new(cap);
        unsigned hits = 0;
        memset(given, 0, sizeof(given));
        for (unsigned n = 0; n < 30000; n++) {
            unsigned k = (unsigned)(rnd(2) ? rnd(540) : rnd(30));
            memcpy(now, last[k], PAGE);
            for (uint64_t c = rnd(4); c > 0; c--)
                now[rnd(PAGE)] = (uint8_t)rnd(256);
            now[0] |= 1; /* not zero */
            enum lb_delta_kind kind = lb_delta_update(d, k < 500 ? 0 : 2, k < 500 ? k : k - 500,
                                                      now, false, g_xored);
            if (kind != LB_DELTA_NEW) {
                hits++;
                assert_true(given[k]);
                for (unsigned i = 0; i < PAGE; i++)
                    last[k][i] ^= g_xored[i];
                assert_int_equal(memcmp(last[k], now, PAGE), 0);
            }
            assert_true(cap < 540 || !given[k] || kind != LB_DELTA_NEW);
            memcpy(last[k], now, PAGE);
            given[k] = true;
            assert_true(lb_delta_bytes(d) <= cap * PAGE);
        }
        assert_int_equal(lb_delta_bytes(d), LB_MIN(cap, 540) * PAGE);
        assert_true(hits > 0);
        lb_delta_free(d);
    }
}

/* Pages written all the time stay, though more pages than there is room for come by once. */
static void hot_pages_stay(void **state)
{
    (void)state;
    static uint8_t page[PAGE] __attribute__((aligned(64)));
    struct lb_delta *d = cache_new(60);
    unsigned lost = 0;

    for (unsigned n = 0; n < 20000; n++) {
        memcpy(page, &n, sizeof(n));
        page[8] = 1;
        if (n % 2)
            lb_delta_update(d, 0, 100 + n / 2 % 400, page, false, g_xored);
        else if (lb_delta_update(d, 0, n / 2 % 30, page, false, g_xored) == LB_DELTA_NEW)
            lost++;
    }
    assert_true(lost <= 60);
    lb_delta_free(d);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(kinds),
        cmocka_unit_test(no_room_at_all),
        cmocka_unit_test(against_a_model),
        cmocka_unit_test(hot_pages_stay),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
