/* Leases and promises: when the states change, and that no order of late, lost and doubled
 * messages lets the backup claim while the primary may still let output leave. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "remus/lease.h"

#define MS UINT64_C(1000000)
#define T0 (UINT64_C(7) * 1000 * MS)

static void times_of_a_lease(void **state)
{
    (void)state;
    struct lb_lease l;

    lb_lease_init(&l, 0, T0);
    assert_true(l.lease_ns == LB_LEASE_MS * MS);
    lb_lease_init(&l, 200, T0);
    assert_true(l.lease_ns == 200 * MS);
    assert_true(l.ask_ns == 160 * MS && l.margin_ns == 50 * MS);
    assert_int_equal(lb_lease_state(&l, T0), LB_LEASE_OK);
    assert_true(lb_lease_next_ns(&l, T0) == T0 + 160 * MS);
    assert_int_equal(lb_lease_state(&l, T0 + 160 * MS - 1), LB_LEASE_OK);
    assert_int_equal(lb_lease_state(&l, T0 + 160 * MS), LB_LEASE_ASK);
    assert_true(lb_lease_next_ns(&l, T0 + 160 * MS) == T0 + 200 * MS);
    assert_int_equal(lb_lease_state(&l, T0 + 200 * MS - 1), LB_LEASE_ASK);
    assert_int_equal(lb_lease_state(&l, T0 + 200 * MS), LB_LEASE_LAPSED);
    assert_true(lb_lease_next_ns(&l, T0 + 200 * MS) == UINT64_MAX);
}

static void shortest_lease(void **state)
{
    (void)state;
    struct lb_lease l;

    lb_lease_init(&l, 1, T0);
    assert_true(l.lease_ns == LB_LEASE_MIN_MS * MS);
}

static void answers_count_from_sending(void **state)
{
    (void)state;
    struct lb_lease l;

    lb_lease_init(&l, 100, T0);
    lb_lease_answered(&l, T0 + 50 * MS, T0 + 90 * MS);
    assert_true(l.until_ns == T0 + 150 * MS && l.heard_ns == T0 + 90 * MS);
    assert_int_equal(lb_lease_state(&l, T0 + 129 * MS), LB_LEASE_OK);
    assert_int_equal(lb_lease_state(&l, T0 + 130 * MS), LB_LEASE_ASK);
    /* an older one that was overtaken */
    lb_lease_answered(&l, T0 + 40 * MS, T0 + 95 * MS);
    assert_true(l.until_ns == T0 + 150 * MS);
    /* one that claims to be from the future must not lengthen the lease */
    lb_lease_answered(&l, T0 + 5000 * MS, T0 + 96 * MS);
    assert_true(l.until_ns == T0 + 150 * MS && l.heard_ns == T0 + 95 * MS);
    /* one that comes after the lapse still says what the backup promised */
    assert_int_equal(lb_lease_state(&l, T0 + 150 * MS), LB_LEASE_LAPSED);
    lb_lease_answered(&l, T0 + 80 * MS, T0 + 165 * MS);
    assert_int_equal(lb_lease_state(&l, T0 + 165 * MS), LB_LEASE_ASK);
}

static void promise(void **state)
{
    (void)state;
    struct lb_lease l;

    lb_lease_init(&l, 200, T0);
    assert_true(lb_promise_end_ns(&l) == T0 + 250 * MS);
    lb_promise_heard(&l, T0 + 10 * MS);
    lb_promise_heard(&l, T0 + 5 * MS);
    assert_true(lb_promise_end_ns(&l) == T0 + 260 * MS);
    assert_false(lb_promise_over(&l, T0 + 260 * MS - 1));
    assert_true(lb_promise_over(&l, T0 + 260 * MS));
}

/* Beats with random delays and losses both ways, and a backup whose clock runs up to 1 % faster and
 * is set to anything: at no moment is the promise over while the lease is not. */
struct pair {
    struct lb_lease primary, backup;
    uint64_t offset;
    double speed;
    unsigned loss, delay_ms;  /* percent; at most */
    struct {
        uint64_t at, sent;
        bool answer;
    } wire[512];
    unsigned n_wire;
};

static uint64_t clock_of_backup(const struct pair *p, uint64_t t)
{
    return p->offset + (uint64_t)((double)t * p->speed);
}

static void send_one(struct pair *p, unsigned *seed, uint64_t now, uint64_t sent, bool answer)
{
    if ((unsigned)rand_r(seed) % 100 < p->loss)
        return;
    assert_true(p->n_wire < 512);
    p->wire[p->n_wire].at = now + (unsigned)rand_r(seed) % p->delay_ms * MS;
    p->wire[p->n_wire].sent = sent;
    p->wire[p->n_wire++].answer = answer;
}

static void deliver(struct pair *p, unsigned *seed, uint64_t now)
{
    for (unsigned i = 0; i < p->n_wire;) {
        uint64_t sent = p->wire[i].sent;
        bool answer = p->wire[i].answer;

        if (p->wire[i].at > now) {
            i++;
            continue;
        }
        p->wire[i] = p->wire[--p->n_wire];
        if (answer) {
            lb_lease_answered(&p->primary, sent, now);
        } else if (!lb_promise_over(&p->backup, clock_of_backup(p, now))) {
            /* once the promise is over it answers no more */
            lb_promise_heard(&p->backup, clock_of_backup(p, now));
            send_one(p, seed, now, sent, true);
        }
    }
}

static void never_both(void **state)
{
    (void)state;
    unsigned seed = 20240611, lapses = 0, overs = 0;

    print_message("seed %u\n", seed);
    for (int run = 0; run < 300; run++) {
        struct pair p = {.offset = (uint64_t)rand_r(&seed) * 1000,
                         .speed = 1.0 + rand_r(&seed) % 1000 / 1e5,
                         .loss = (unsigned)rand_r(&seed) % 100,
                         .delay_ms = 1 + (unsigned)rand_r(&seed) % 300};
        bool lapsed = false, over = false;

        lb_lease_init(&p.primary, 200, T0);
        lb_lease_init(&p.backup, 200, clock_of_backup(&p, T0 + MS));
        for (uint64_t t = T0; t < T0 + 3000 * MS; t += MS) {
            if ((t - T0) % (LB_BEAT_MS * MS) == 0)
                send_one(&p, &seed, t, t, false);
            deliver(&p, &seed, t);
            lapsed = lb_lease_state(&p.primary, t) == LB_LEASE_LAPSED;
            over = lb_promise_over(&p.backup, clock_of_backup(&p, t));
            if (over && !lapsed)
                fail_msg("run %d, %.0f ms: the promise is over, the lease is not", run,
                         (double)(t - T0) / 1e6);
        }
        lapses += lapsed;
        overs += over;
    }
    /* the runs were neither all quiet nor all broken */
    assert_in_range(overs, 20, 280);
    assert_in_range(lapses, overs, 299);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(times_of_a_lease), cmocka_unit_test(shortest_lease),
        cmocka_unit_test(answers_count_from_sending), cmocka_unit_test(promise),
        cmocka_unit_test(never_both),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
