/* The epoch's extents against a naive model: an array of sectors. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <string.h>

#include "remus/disk_internal.h"

enum { DISKS = 2, SECTORS = 96, SECTOR = LB_DISK_SECTOR };

/* What a disk holds: the stamp of each sector, OLD when nothing was written in this epoch. */
enum { OLD = -1 };
struct model {
    int stamp[DISKS][SECTORS];
};

static uint64_t random_state = 1;
static unsigned pick(unsigned n)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (unsigned)(random_state >> 33) % n;
}

static void model_clear(struct model *m)
{
    for (int d = 0; d < DISKS; d++)
        for (int s = 0; s < SECTORS; s++)
            m->stamp[d][s] = OLD;
}

/* stamp 0: zeros. Every byte of a sector is its stamp. */
static void put(struct lb_disk_queue *q, struct model *m, unsigned disk, unsigned first, unsigned n,
                int stamp)
{
    struct lb_disk_op op = {.disk = disk, .kind = stamp ? LB_DISK_WRITE : LB_DISK_ZERO,
                            .offset = first * SECTOR, .len = n * SECTOR};
    void *data = NULL;
    if (stamp) {
        data = malloc(op.len);
        assert_non_null(data);
        memset(data, stamp, op.len);
    }
    lb_disk_queue_add(q, &op, data);
    for (unsigned i = first; m && i < first + n; i++)
        m->stamp[disk][i] = stamp;
}

/* Take everything, check that nothing overlaps, order and bytes; compare with the model. */
static unsigned check(struct lb_disk_queue *q, const struct model *m)
{
    struct model got;
    struct lb_disk_ops ops;
    uint64_t bytes = 0;

    model_clear(&got);
    lb_disk_queue_take(q, &ops);
    for (unsigned i = 0; i < ops.n; i++) {
        const struct lb_disk_op *o = &ops.v[i];
        const uint8_t *data = o->data;
        assert_true(o->len > 0 && o->len % SECTOR == 0 && o->offset % SECTOR == 0);
        assert_int_equal(o->kind == LB_DISK_WRITE, data != NULL);
        if (i > 0 && o[-1].disk == o->disk)
            assert_true(o[-1].offset + o[-1].len <= o->offset);
        else if (i > 0)
            assert_true(o[-1].disk < o->disk);
        for (uint64_t at = 0; at < o->len; at++) {
            int *s = &got.stamp[o->disk][(o->offset + at) / SECTOR];
            int value = data ? data[at] : 0;
            assert_true(at % SECTOR ? *s == value : *s == OLD);
            *s = value;
        }
        bytes += data ? o->len : 0;
    }
    assert_int_equal(ops.bytes, bytes);
    assert_memory_equal(&got, m, sizeof(got));
    unsigned n = ops.n;
    lb_disk_ops_free(&ops);
    assert_int_equal(lb_disk_queue_bytes(q), 0);
    return n;
}

static void test_random_against_model(void **state)
{
    (void)state;
    struct lb_disk_queue *q = lb_disk_queue_new(DISKS);
    for (unsigned round = 0; round < 4000; round++) {
        struct model m;
        random_state = 88172645463325252u + round;
        unsigned n_ops = 1 + pick(60), longest = 1 + pick(SECTORS / 2), zeros = 1 + pick(4);
        model_clear(&m);
        for (unsigned i = 0; i < n_ops; i++) {
            unsigned n = 1 + pick(longest), first = pick(SECTORS - n + 1);
            put(q, &m, pick(DISKS), first, n, pick(4) < zeros ? 0 : 1 + (int)pick(120));
            /* never more than twice what is distinct */
            uint64_t distinct = 0;
            for (int s = 0; s < DISKS * SECTORS; s++)
                distinct += (&m.stamp[0][0])[s] != OLD;
            assert_true(lb_disk_queue_bytes(q) <= 2 * distinct * SECTOR);
        }
        check(q, &m);
    }
    lb_disk_queue_free(q);
}

static void test_rewriting_costs_nothing(void **state)
{
    (void)state;
    struct lb_disk_queue *q = lb_disk_queue_new(1);
    for (int i = 0; i < 100000; i++)
        put(q, NULL, 0, 8 * (unsigned)(i % 10), 8, 1 + i % 100);
    assert_int_equal(lb_disk_queue_bytes(q), 10 * 8 * SECTOR);
    struct lb_disk_ops ops;
    lb_disk_queue_take(q, &ops);
    assert_int_equal(ops.n, 10);
    lb_disk_ops_free(&ops);
    lb_disk_queue_free(q);
}

/* A terabyte of zeros is one operation, with a hole where something is written after. */
static void test_large_zeros_stay_one(void **state)
{
    (void)state;
    struct lb_disk_queue *q = lb_disk_queue_new(1);
    const uint64_t piece = 32u << 20, n = 32768;
    for (uint64_t i = 0; i < n; i++) {
        struct lb_disk_op op = {.kind = LB_DISK_ZERO, .offset = i * piece, .len = piece};
        lb_disk_queue_add(q, &op, NULL);
    }
    assert_int_equal(lb_disk_queue_bytes(q), 0);
    put(q, NULL, 0, 1 << 20, 8, 7);
    struct lb_disk_ops ops;
    lb_disk_queue_take(q, &ops);
    assert_int_equal(ops.n, 3);
    assert_int_equal(ops.v[0].len, (uint64_t)SECTOR << 20);
    assert_int_equal(ops.v[1].kind, LB_DISK_WRITE);
    assert_int_equal(ops.v[2].offset + ops.v[2].len, n * piece);
    lb_disk_ops_free(&ops);
    lb_disk_queue_free(q);
}

/* Sequential writes in descending and ascending order: the tree stays shallow enough for recursion. */
static void test_many_extents(void **state)
{
    (void)state;
    struct lb_disk_queue *q = lb_disk_queue_new(1);
    const unsigned n = 200000;
    for (unsigned i = 0; i < n; i++) {
        struct lb_disk_op op = {.kind = LB_DISK_ZERO, .offset = (uint64_t)(n - i) * 2 * SECTOR,
                                .len = SECTOR};
        lb_disk_queue_add(q, &op, NULL);
    }
    struct lb_disk_ops ops;
    lb_disk_queue_take(q, &ops);
    assert_int_equal(ops.n, n);
    for (unsigned i = 1; i < n; i++)
        assert_true(ops.v[i - 1].offset < ops.v[i].offset);
    lb_disk_ops_free(&ops);
    put(q, NULL, 0, 5, 1, 3); /* freed with something in it */
    lb_disk_queue_free(q);
    lb_disk_queue_free(NULL);
    lb_disk_ops_free(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_random_against_model),
        cmocka_unit_test(test_rewriting_costs_nothing),
        cmocka_unit_test(test_large_zeros_stay_one),
        cmocka_unit_test(test_many_extents),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
