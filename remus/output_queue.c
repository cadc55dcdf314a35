/* remus/output_queue.c - frames that wait for their epoch. The drawing is in output_internal.h.
 *
 * A chunk is filled once from front to back and freed when its last frame has left, except the newest,
 * which begins again. A frame begins at a multiple of 8. */
#include "remus/output_internal.h"

#include <assert.h>
#include <string.h>

#define CHUNK_BYTES (1024u * 1024)

struct lb_oq_chunk {
    struct lb_oq_chunk *next;
    size_t head, used;               /* offsets into bytes: of the oldest frame, behind the newest */
    _Alignas(8) unsigned char bytes[CHUNK_BYTES];
};

static size_t frame_size(uint64_t len)
{
    return (sizeof(struct lb_oq_frame) + (size_t)len + 7) & ~(size_t)7;
}

static const struct lb_oq_frame *frame_at(const struct lb_oq_chunk *c, size_t off)
{
    return (const struct lb_oq_frame *)(c->bytes + off);
}

void *lb_oq_room(struct lb_oq *q, struct lb_error *err)
{
    struct lb_oq_chunk *c = q->newest;
    if (!c || CHUNK_BYTES - c->used < frame_size(LB_FRAME_MAX)) {
        if (q->spare) {
            c = LB_STEAL_PTR(q->spare);
        } else {
            c = malloc(sizeof(*c)); /* not cleared: only what was written is read */
            if (!c) {
                lb_fail(err, LB_E_NO_SPACE, "no memory for the network output of the guest");
                return NULL;
            }
        }
        c->next = NULL;
        c->head = c->used = 0;
        if (q->newest)
            q->newest->next = c;
        else
            q->oldest = c;
        q->newest = c;
    }
    return c->bytes + c->used + sizeof(struct lb_oq_frame);
}

void lb_oq_commit(struct lb_oq *q, size_t len, uint64_t now_ns)
{
    struct lb_oq_chunk *c = q->newest;
    assert(len <= LB_FRAME_MAX);
    struct lb_oq_frame *f = (struct lb_oq_frame *)(c->bytes + c->used);
    f->came_ns = now_ns;
    f->len = len;
    if (q->in == q->marked) {
        q->open_chunk = c;
        q->open_off = c->used;
    }
    c->used += frame_size(len);
    q->in++;
    q->held_bytes += len;
}

void lb_oq_mark(struct lb_oq *q, uint64_t epoch)
{
    assert(q->n_marks == 0 || q->marks[q->n_marks - 1].epoch < epoch);
    if (q->in == q->marked)
        return; /* nothing to find later */
    if (q->n_marks == q->cap_marks) {
        q->cap_marks = LB_MAX(8u, 2 * q->cap_marks);
        q->marks = lb_realloc(q->marks, q->cap_marks * sizeof(*q->marks));
    }
    q->marks[q->n_marks++] = (struct lb_oq_mark){
        .epoch = epoch, .first = q->marked, .end = q->in,
        .chunk = q->open_chunk, .off = q->open_off,
    };
    q->marked = q->in;
}

void lb_oq_allow(struct lb_oq *q, uint64_t epoch)
{
    unsigned n = 0;
    while (n < q->n_marks && q->marks[n].epoch <= epoch)
        q->allowed = q->marks[n++].end;
    q->n_marks -= n;
    if (n && q->n_marks)
        memmove(q->marks, q->marks + n, q->n_marks * sizeof(*q->marks));
    assert(q->out <= q->allowed && q->allowed <= q->marked && q->marked <= q->in);
}

void lb_oq_allow_all(struct lb_oq *q)
{
    q->n_marks = 0;
    q->allowed = q->marked = q->in;
}

const struct lb_oq_frame *lb_oq_oldest(const struct lb_oq *q)
{
    return q->out < q->in ? frame_at(q->oldest, q->oldest->head) : NULL;
}

const struct lb_oq_frame *lb_oq_head(const struct lb_oq *q)
{
    return q->out < q->allowed ? lb_oq_oldest(q) : NULL;
}

void lb_oq_pop(struct lb_oq *q)
{
    assert(q->out < q->allowed);
    struct lb_oq_chunk *c = q->oldest;
    const struct lb_oq_frame *f = frame_at(c, c->head);
    q->held_bytes -= f->len;
    q->out++;
    c->head += frame_size(f->len);
    if (c->head < c->used)
        return;
    if (c == q->newest) {
        c->head = c->used = 0;
        return;
    }
    q->oldest = c->next;
    if (q->spare)
        free(c);
    else
        q->spare = c;
}

void lb_oq_free(struct lb_oq *q)
{
    while (q->oldest) {
        struct lb_oq_chunk *c = q->oldest;
        q->oldest = c->next;
        free(c);
    }
    free(q->spare);
    free(q->marks);
    *q = (struct lb_oq){0};
}

/* ---------------------------------------------------------------- an epoch */

/* A walk through the frames of one epoch that has been marked and not allowed. */
struct cursor {
    const struct lb_oq_chunk *chunk;
    size_t off;
    uint64_t left; /* frames */
};

static void walk_begin(const struct lb_oq *q, uint64_t epoch, struct cursor *c)
{
    *c = (struct cursor){0};
    for (unsigned i = 0; i < q->n_marks; i++) {
        const struct lb_oq_mark *m = &q->marks[i];
        if (m->epoch == epoch)
            *c = (struct cursor){.chunk = m->chunk, .off = m->off, .left = m->end - m->first};
    }
}

/* NULL at the end. */
static const struct lb_oq_frame *walk_peek(struct cursor *c)
{
    if (!c->left)
        return NULL;
    if (c->off == c->chunk->used) {
        c->chunk = c->chunk->next;
        c->off = 0;
    }
    return frame_at(c->chunk, c->off);
}

static void walk_next(struct cursor *c)
{
    const struct lb_oq_frame *f = walk_peek(c);
    c->off += frame_size(f->len);
    c->left--;
}

/* The oldest frame at any of the cursors, and whose it is. */
static const struct lb_oq_frame *oldest_of(struct cursor *c, unsigned n, unsigned *which)
{
    const struct lb_oq_frame *best = NULL;
    for (unsigned i = 0; i < n; i++) {
        const struct lb_oq_frame *f = walk_peek(&c[i]);
        if (f && (!best || f->came_ns < best->came_ns)) {
            best = f;
            *which = i;
        }
    }
    return best;
}

static size_t cursors_at(const struct lb_oq *const *cards, unsigned n, uint64_t epoch,
                         struct cursor *c)
{
    size_t bytes = 0;
    for (unsigned i = 0; i < n; i++) {
        walk_begin(cards[i], epoch, &c[i]);
        for (struct cursor walk = c[i]; walk.left; walk_next(&walk))
            bytes += LB_OQ_COPY_HDR + (size_t)walk_peek(&walk)->len;
    }
    return bytes;
}

static unsigned char *put_frame(unsigned char *p, unsigned card, const struct lb_oq_frame *f)
{
    uint32_t len = (uint32_t)f->len;
    p[0] = (unsigned char)card;
    p[1] = (unsigned char)(card >> 8);
    for (unsigned i = 0; i < 4; i++)
        p[2 + i] = (unsigned char)(len >> (8 * i));
    memcpy(p + LB_OQ_COPY_HDR, f->data, len);
    return p + LB_OQ_COPY_HDR + len;
}

int lb_oq_copy(const struct lb_oq *const *cards, unsigned n_cards, uint64_t epoch, size_t max_bytes,
               void **buf, size_t *len, struct lb_error *err)
{
    struct cursor *c = lb_alloc(LB_MAX(n_cards, 1u) * sizeof(*c));
    size_t bytes = cursors_at(cards, n_cards, epoch, c);
    unsigned card = 0;
    const struct lb_oq_frame *f;
    for (; bytes > max_bytes && (f = oldest_of(c, n_cards, &card)); walk_next(&c[card]))
        bytes -= LB_OQ_COPY_HDR + (size_t)f->len;
    unsigned char *out = lb_try_alloc(LB_MAX(bytes, (size_t)1), err);
    if (out) {
        unsigned char *p = out;
        for (; (f = oldest_of(c, n_cards, &card)); walk_next(&c[card]))
            p = put_frame(p, card, f);
        assert(p == out + bytes);
        *buf = out;
        *len = bytes;
    }
    free(c);
    return out ? 0 : -1;
}
