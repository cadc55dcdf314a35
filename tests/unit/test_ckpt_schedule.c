/* checkpoint/schedule.c and progress.c: the file, the time of the next run, what a person is told. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <fcntl.h>
#include <string.h>
#include <sys/eventfd.h>

#include "checkpoint/checkpoint_internal.h"

static char dir[64];

static int setup(void **state)
{
    (void)state;
    strcpy(dir, "/tmp/lb-test-schedule-XXXXXX");
    return mkdtemp(dir) ? 0 : -1;
}

static int teardown(void **state)
{
    (void)state;
    return lb_remove_tree(dir, NULL);
}

static struct lb_ckpt_schedule sample(void)
{
    struct lb_ckpt_schedule s = {.every_ms = 600000, .keep = 24, .no_disk = true, .last_ms = 1700000000123,
                                 .failures = 2};
    strcpy(s.key_file, "/etc/lifeboat/ckpt.key");
    strcpy(s.error, "disk \"vda\": no space\xff");
    return s;
}

static void test_round_trip(void **state)
{
    struct lb_ckpt_schedule s = sample(), r;
    struct lb_error err = LB_ERROR_INIT;
    (void)state;

    assert_int_equal(lb_schedule_load(dir, "web1", &r, &err), -1);
    assert_int_equal(err.code, LB_E_NOT_FOUND);
    assert_int_equal(lb_schedule_save(dir, "web1", &s, NULL), 0);
    assert_int_equal(lb_schedule_load(dir, "web1", &r, NULL), 0);
    assert_int_equal(r.every_ms, s.every_ms);
    assert_int_equal(r.keep, 24);
    assert_true(r.no_disk);
    assert_int_equal(r.last_ms, s.last_ms);
    assert_int_equal(r.failures, 2);
    assert_string_equal(r.key_file, s.key_file);
    assert_string_equal(r.error, "disk \"vda\": no space?");
    assert_int_equal(lb_schedule_remove(dir, "web1", NULL), 0);
    assert_int_equal(lb_schedule_remove(dir, "web1", NULL), 0);
    assert_int_equal(lb_schedule_load(dir, "web1", &r, NULL), -1);
}

static void test_refused(void **state)
{
    struct lb_ckpt_schedule s = sample();
    struct lb_error err = LB_ERROR_INIT;
    (void)state;

    s.every_ms = 9999;
    assert_int_equal(lb_schedule_save(dir, "web1", &s, &err), -1);
    assert_int_equal(err.code, LB_E_USAGE);
    s = sample();
    s.keep = 0;
    assert_int_equal(lb_schedule_save(dir, "web1", &s, &err), -1);
    assert_int_equal(err.code, LB_E_USAGE);
    s = sample();
    assert_int_equal(lb_schedule_save(dir, "../web1", &s, &err), -1);
    assert_int_equal(err.code, LB_E_USAGE);
}

/* Every member must be there and of its kind: what is missing is never guessed. */
static void test_damaged(void **state)
{
    static const char *const good = "{\"every_ms\":60000,\"keep\":3,\"no_disk\":false,\"key_file\":\"\","
                                    "\"last_ms\":0,\"failures\":0,\"error\":\"\"}";
    static const char *const bad[] = {
        "", "{", "[]", "{\"every_ms\":60000}",
        "{\"every_ms\":5,\"keep\":3,\"no_disk\":false,\"key_file\":\"\",\"last_ms\":0,\"failures\":0,\"error\":\"\"}",
        "{\"every_ms\":60000,\"keep\":0,\"no_disk\":false,\"key_file\":\"\",\"last_ms\":0,\"failures\":0,\"error\":\"\"}",
        "{\"every_ms\":60000,\"keep\":3,\"no_disk\":0,\"key_file\":\"\",\"last_ms\":0,\"failures\":0,\"error\":\"\"}",
        "{\"every_ms\":60000,\"keep\":3,\"no_disk\":false,\"key_file\":7,\"last_ms\":0,\"failures\":0,\"error\":\"\"}",
        "{\"every_ms\":60000,\"keep\":3,\"no_disk\":false,\"key_file\":\"\",\"last_ms\":-1,\"failures\":0,\"error\":\"\"}",
        "{\"every_ms\":60000,\"keep\":3,\"no_disk\":false,\"key_file\":\"\",\"last_ms\":0,\"failures\":0}",
    };
    struct lb_ckpt_schedule s;
    struct lb_error err = LB_ERROR_INIT;
    LB_AUTO_FREE char *d = lb_vm_dir(dir, "web2", true);
    LB_AUTO_FREE char *path = lb_asprintf("%s/schedule.json", d);
    (void)state;

    assert_int_equal(lb_file_write_atomic(path, good, strlen(good), 0600, NULL), 0);
    assert_int_equal(lb_schedule_load(dir, "web2", &s, NULL), 0);
    assert_int_equal(s.keep, 3);
    for (unsigned i = 0; i < LB_ARRAY_LEN(bad); i++) {
        assert_int_equal(lb_file_write_atomic(path, bad[i], strlen(bad[i]), 0600, NULL), 0);
        memset(&err, 0, sizeof(err));
        assert_int_equal(lb_schedule_load(dir, "web2", &s, &err), -1);
        assert_int_equal(err.code, LB_E_STATE);
        assert_non_null(strstr(err.message, "damaged"));
    }
}

static void test_next(void **state)
{
    const uint64_t now = 1000000000;
    struct lb_ckpt_schedule s = {.every_ms = 600000, .keep = 1};
    (void)state;

    assert_int_equal(lb_schedule_next_ms(&s, now), now); /* never done: at once */
    s.last_ms = now - 100000;
    assert_int_equal(lb_schedule_next_ms(&s, now), now + 500000);
    s.failures = 1;
    assert_int_equal(lb_schedule_next_ms(&s, now), now - 100000 + 1200000);
    s.failures = 2;
    assert_int_equal(lb_schedule_next_ms(&s, now), now - 100000 + 2400000);
    s.failures = 1000; /* 80 minutes would be too long */
    assert_int_equal(lb_schedule_next_ms(&s, now), now - 100000 + 3600000);
    s.every_ms = 10000;
    assert_int_equal(lb_schedule_next_ms(&s, now), now - 100000 + 80000);
    s.every_ms = 24 * 3600000; /* longer than an hour by itself */
    assert_int_equal(lb_schedule_next_ms(&s, now), now - 100000 + 24 * 3600000);
    s.every_ms = 600000;
    s.failures = 0;
    s.last_ms = now + 90000000; /* the clock was set back */
    assert_int_equal(lb_schedule_next_ms(&s, now), now + 600000);
}

static struct {
    unsigned n, phases;
    enum lb_ckpt_phase phase;
    double percent;
    char note[200];
} seen;

static void on_report(const struct lb_ckpt_progress *p, void *arg)
{
    (void)arg;
    seen.n++;
    seen.phases += p->phase != seen.phase;
    seen.phase = p->phase;
    assert_true(p->percent >= seen.percent && p->percent <= 100);
    seen.percent = p->percent;
    memcpy(seen.note, p->note, sizeof(seen.note));
}

static void test_progress(void **state)
{
    struct lb_ckpt_env env = {.report = on_report, .cancel_fd = eventfd(0, EFD_CLOEXEC)};
    struct lb_error err = LB_ERROR_INIT;
    struct lb_ckpt_meter m;
    uint64_t one = 1, from = lb_now_ns();
    (void)state;

    lb_ckpt_meter_init(&m, &env, "suspend", 1000);
    lb_ckpt_meter_phase(&m, LB_CKPT_COPYING, 10);
    for (unsigned i = 0; i <= 1000; i++)
        lb_ckpt_meter_bytes(&m, i, 10 + i * 0.08);
    assert_true(seen.n <= 2 + (lb_now_ns() - from) / 100000000u);
    assert_true(m.p.percent > 89 && m.p.percent < 91);
    lb_ckpt_meter_bytes(&m, 1000, 20); /* never back */
    lb_ckpt_meter_note(&m, "%s is %d", "this", 1);
    lb_ckpt_meter_phase(&m, LB_CKPT_WRITING, 15);
    assert_string_equal(seen.note, "this is 1");
    assert_true(seen.percent > 89);
    lb_ckpt_meter_phase(&m, LB_CKPT_DONE, -1);
    assert_int_equal(seen.phases, 3);
    assert_true(seen.percent > 99.9);

    assert_int_equal(lb_ckpt_check_cancel(&env, "suspend", "web1", &err), 0);
    assert_int_equal(write(env.cancel_fd, &one, sizeof(one)), sizeof(one));
    for (int i = 0; i < 2; i++) { /* looked at, not read */
        assert_int_equal(lb_ckpt_check_cancel(&env, "suspend", "web1", &err), -1);
        assert_int_equal(err.code, LB_E_CANCELLED);
    }
    close(env.cancel_fd);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip), cmocka_unit_test(test_refused), cmocka_unit_test(test_damaged),
        cmocka_unit_test(test_next), cmocka_unit_test(test_progress),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
