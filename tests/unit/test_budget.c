/* A limit of bandwidth that several processes share: all together keep to it, what one does not use the others have, and what is
 * urgent waits for nobody. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "migrate/budget.h"

#define MS UINT64_C(1000000)
#define RATE 1000000u /* bytes/s: a byte is a microsecond */

static char dir[] = "/tmp/lb-budget-XXXXXX";
static char path[64];

static int make_dir(void **state)
{
    (void)state;
    assert_non_null(mkdtemp(dir));
    snprintf(path, sizeof(path), "%s/budget", dir);
    return 0;
}

static int remove_dir(void **state)
{
    (void)state;
    unlink(path);
    return rmdir(dir);
}

static struct lb_budget opened(uint64_t rate, const char *file)
{
    struct lb_error err = LB_ERROR_INIT;
    struct lb_budget b;

    if (lb_budget_open(&b, rate, file, &err))
        fail_msg("%s", err.message);
    return b;
}

/* In ms from then on; a little more has passed by now. */
static void assert_about(uint64_t when_ns, uint64_t from_ns, uint64_t ms)
{
    assert_in_range(when_ns, from_ns + ms * MS, from_ns + (ms + 200) * MS);
}

static void alone(void **state)
{
    (void)state;
    struct lb_budget none = opened(0, NULL), b = opened(RATE, NULL);
    uint64_t from = lb_now_ns();

    assert_about(lb_budget_take(&none, UINT64_MAX, false), from, 0);
    assert_about(lb_budget_take(&b, 1000000, false), from, 1000);
    assert_about(lb_budget_take(&b, 1000000, false), from, 2000);
    lb_budget_close(&none);
    lb_budget_close(&b);
}

/* What was not used is not saved up. */
static void nothing_is_saved(void **state)
{
    (void)state;
    struct lb_budget b = opened(RATE, NULL);
    uint64_t first = lb_budget_take(&b, 1000, false), from;

    while ((from = lb_now_ns()) < first + 50 * MS)
        ;
    assert_about(lb_budget_take(&b, 1000000, false), from, 1000);
    lb_budget_close(&b);
}

static void urgent_goes_first(void **state)
{
    (void)state;
    struct lb_budget a = opened(RATE, path), b = opened(RATE, path);
    uint64_t from = lb_now_ns();

    assert_about(lb_budget_take(&a, 5000000, false), from, 5000);
    assert_about(lb_budget_take(&b, 1000000, true), from, 1000);
    assert_about(lb_budget_take(&b, 1000000, false), from, 7000);
    assert_about(lb_budget_take(&a, 0, false), from, 7000);
    lb_budget_close(&a);
    lb_budget_close(&b);
    unlink(path);
}

/* A file that was left by an earlier boot, when the clock showed more. */
static void another_boot(void **state)
{
    (void)state;
    struct lb_error err = LB_ERROR_INIT;
    uint64_t late = lb_now_ns() + UINT64_C(86400) * 1000 * MS, from;
    struct lb_budget b;

    assert_int_equal(lb_file_write_atomic(path, &late, sizeof(late), 0600, &err), 0);
    b = opened(RATE, path);
    from = lb_now_ns();
    assert_about(lb_budget_take(&b, 1000000, false), from, 1000);
    lb_budget_close(&b);
    unlink(path);
}

/* Sends for as long as the time is not up, as a sender would. */
static void spend(uint64_t end_ns, int report)
{
    struct lb_budget b = opened(20 * RATE, path);
    uint64_t sent = 0, next = 0;

    while (next < end_ns) {
        struct timespec ts;

        next = lb_budget_take(&b, 2000, false);
        sent += 2000;
        ts = (struct timespec){(time_t)(next / 1000000000u), (long)(next % 1000000000u)};
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &ts, NULL);
    }
    assert_int_equal(write(report, &sent, sizeof(sent)), sizeof(sent));
    lb_budget_close(&b);
}

static void four_processes(void **state)
{
    (void)state;
    uint64_t from = lb_now_ns(), sum = 0, sent;
    int report[2];

    assert_int_equal(pipe(report), 0);
    for (int i = 0; i < 4; i++)
        if (!fork()) { /* half of them end early: the others have all of it */
            spend(from + (i % 2 ? 500 : 1000) * MS, report[1]);
            _exit(0);
        }
    for (int i = 0; i < 4; i++) {
        assert_int_equal(read(report[0], &sent, sizeof(sent)), sizeof(sent));
        assert_true(sent >= 2 * 2000); /* none was left out */
        sum += sent;
        wait(NULL);
    }
    close(report[0]);
    close(report[1]);
    /* 20 MB in the second, and the one record of each that goes beyond its end; less when the machine lets us sleep too long */
    assert_in_range(sum, 10 * RATE, 20 * RATE + 4 * 2000);
    unlink(path);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(alone),        cmocka_unit_test(nothing_is_saved), cmocka_unit_test(urgent_goes_first),
        cmocka_unit_test(another_boot), cmocka_unit_test(four_processes),
    };

    return cmocka_run_group_tests(tests, make_dir, remove_dir);
}
