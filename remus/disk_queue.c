/* remus/disk_queue.c - what an epoch has written.
 *
 * The backup applies an epoch as a whole, so only the last content of each sector matters. Extents that
 * do not overlap say just that: their order is no longer of any importance, and their data is never
 * more than what is distinct on the disk (an extent that was cut gives memory back once more than
 * half of it is unused).
 *
 *      before   |---- A (data) ----|      |== B (zero) ================|
 *      write            |--- C ---|            |- D -|
 *      after    |---- A (data) ----|      |=B=|- D -|======= B' =======|
 *                C was copied into A                B split in two: no data to be copied
 *
 * So a write extent never has to be split: a request that lies within one goes into its data, a zero
 * request too. Any other overlap cuts an end off. The tree is a treap: priorities are random, split
 * and merge are all it needs. */
#include "remus/disk_internal.h"

#include <assert.h>
#include <string.h>

struct extent {
    uint64_t offset, len;
    uint8_t *data;          /* NULL: zeros */
    uint64_t capacity;      /* bytes of data */
    uint32_t priority;
    struct extent *left, *right;
};
struct lb_disk_queue {
    struct extent **roots;  /* per disk */
    unsigned n_disks, n_extents;
    uint64_t bytes, random;
};

static uint64_t end_of(const struct extent *e)
{
    return e->offset + e->len;
}

/* Extents that begin before `at` go left. */
static void split(struct extent *t, uint64_t at, struct extent **left, struct extent **right)
{
    if (!t) {
        *left = *right = NULL;
    } else if (t->offset < at) {
        split(t->right, at, &t->right, right);
        *left = t;
    } else {
        split(t->left, at, left, &t->left);
        *right = t;
    }
}

/* Everything in a is before everything in b. */
static struct extent *merge(struct extent *a, struct extent *b)
{
    if (!a || !b)
        return a ? a : b;
    if (a->priority > b->priority) {
        a->right = merge(a->right, b);
        return a;
    }
    b->left = merge(a, b->left);
    return b;
}

static struct extent *last_of(struct extent *t)
{
    while (t && t->right)
        t = t->right;
    return t;
}

static struct extent *make(struct lb_disk_queue *q, uint64_t offset, uint64_t len, void *data)
{
    struct extent *e = lb_alloc(sizeof(*e));
    q->random ^= q->random << 13;
    q->random ^= q->random >> 7;
    q->random ^= q->random << 17;
    *e = (struct extent){.offset = offset, .len = len, .data = data, .capacity = data ? len : 0,
                         .priority = (uint32_t)(q->random >> 32)};
    q->bytes += e->capacity;
    q->n_extents++;
    return e;
}

static void drop(struct lb_disk_queue *q, struct extent *t)
{
    if (!t)
        return;
    drop(q, t->left);
    drop(q, t->right);
    q->bytes -= t->capacity;
    q->n_extents--;
    free(t->data);
    free(t);
}

/* Give memory back that the rest does not need. */
static void shrink(struct lb_disk_queue *q, struct extent *e)
{
    if (!e->data || e->capacity <= 2 * e->len)
        return;
    e->data = lb_realloc(e->data, e->len);
    q->bytes -= e->capacity - e->len;
    e->capacity = e->len;
}

static void cut_end(struct lb_disk_queue *q, struct extent *e, uint64_t end)
{
    e->len = end - e->offset;
    shrink(q, e);
}

static void cut_front(struct lb_disk_queue *q, struct extent *e, uint64_t from)
{
    uint64_t gone = from - e->offset;
    e->offset = from;
    e->len -= gone;
    if (e->data)
        memmove(e->data, e->data + gone, e->len);
    shrink(q, e);
}

/* The extent that covers [offset, end) wholly, or NULL. */
static struct extent *covering(struct extent *t, uint64_t offset, uint64_t end)
{
    struct extent *best = NULL;
    while (t) {
        if (t->offset <= offset) {
            best = t;
            t = t->right;
        } else {
            t = t->left;
        }
    }
    return best && end_of(best) >= end ? best : NULL;
}

static bool written_in_place(struct lb_disk_queue *q, const struct lb_disk_op *op, void *data)
{
    struct extent *e = covering(q->roots[op->disk], op->offset, op->offset + op->len);
    if (!e || (!e->data && data))
        return false;
    if (e->data && !data && op->len == e->len)
        return false; /* zeros over all of it: no data is better */
    if (data)
        memcpy(e->data + (op->offset - e->offset), data, op->len);
    else if (e->data)
        memset(e->data + (op->offset - e->offset), 0, op->len);
    free(data);
    return true;
}

void lb_disk_queue_add(struct lb_disk_queue *q, const struct lb_disk_op *op, void *data)
{
    uint64_t end = op->offset + op->len;
    struct extent *before, *over, *after, *last, *rest = NULL;

    assert(op->disk < q->n_disks && op->len > 0 && (op->offset | op->len) % LB_DISK_SECTOR == 0);
    assert((op->kind == LB_DISK_WRITE) == (data != NULL));
    if (written_in_place(q, op, data))
        return;
    split(q->roots[op->disk], op->offset, &before, &after);
    split(after, end, &over, &after);
    last = last_of(over ? over : before);
    if (last && end_of(last) > end && last->offset >= op->offset) {
        /* begins within, ends behind: only its front is overwritten */
        split(over, last->offset, &over, &rest);
        cut_front(q, rest, end);
    } else if (last && end_of(last) > end) {
        rest = make(q, end, end_of(last) - end, NULL); /* zeros on both sides */
    }
    drop(q, over);
    last = last_of(before);
    if (last && end_of(last) > op->offset)
        cut_end(q, last, op->offset);
    if (last && !last->data && !data && end_of(last) == op->offset)
        last->len += op->len; /* a long run of zeros comes in pieces */
    else
        before = merge(before, make(q, op->offset, op->len, data));
    q->roots[op->disk] = merge(merge(before, rest), after);
}

uint64_t lb_disk_queue_bytes(const struct lb_disk_queue *q)
{
    return q->bytes;
}

static void emit(struct extent *t, uint32_t disk, struct lb_disk_ops *out)
{
    if (!t)
        return;
    emit(t->left, disk, out);
    out->v[out->n++] = (struct lb_disk_op){.disk = disk, .offset = t->offset, .len = t->len,
                                           .kind = t->data ? LB_DISK_WRITE : LB_DISK_ZERO,
                                           .data = t->data};
    out->bytes += t->data ? t->len : 0;
    emit(t->right, disk, out);
    free(t);
}

void lb_disk_queue_take(struct lb_disk_queue *q, struct lb_disk_ops *out)
{
    *out = (struct lb_disk_ops){0};
    if (q->n_extents > 0)
        out->v = lb_alloc(q->n_extents * sizeof(*out->v));
    for (unsigned i = 0; i < q->n_disks; i++) {
        emit(q->roots[i], i, out);
        q->roots[i] = NULL;
    }
    assert(out->n == q->n_extents);
    q->n_extents = 0;
    q->bytes = 0;
}

struct lb_disk_queue *lb_disk_queue_new(unsigned n_disks)
{
    struct lb_disk_queue *q = lb_alloc(sizeof(*q));
    q->roots = lb_alloc(LB_MAX(n_disks, 1u) * sizeof(struct extent *));
    q->n_disks = n_disks;
    q->random = 0x9e3779b97f4a7c15; /* balance, not secrecy */
    return q;
}

void lb_disk_queue_free(struct lb_disk_queue *q)
{
    if (!q)
        return;
    for (unsigned i = 0; i < q->n_disks; i++)
        drop(q, q->roots[i]);
    free(q->roots);
    free(q);
}

void lb_disk_ops_free(struct lb_disk_ops *o)
{
    if (!o)
        return;
    for (unsigned i = 0; i < o->n; i++)
        free((void *)o->v[i].data);
    free(o->v);
    *o = (struct lb_disk_ops){0};
}
