/* checkpoint/writer_index.c - what each page of a checkpoint that is being written is.
 *
 * Tables that are as long as the guest's memory come zeroed from the kernel and cost memory only where
 * something was given. */
#include "checkpoint/writer_internal.h"

#include <errno.h>
#include <string.h>

enum {
    SLAB_CHUNKS = 512,
    PROBES = 16, /* places of the table that one content may be in */
};
#define SEEN_MIN (UINT64_C(1) << 12)
#define SEEN_MAX (UINT64_C(1) << 22) /* 64 MiB */

/* A content that is in the file. Its whole hash is with its chunk. */
struct lb_seen {
    uint64_t tag; /* of the hash */
    lb_loc loc;   /* LB_LOC_NONE: free */
};

static uint64_t tag_of(const uint8_t hash[16])
{
    uint64_t t;
    memcpy(&t, hash, sizeof(t));
    return t;
}

static int new_tables(struct lb_widx *x, struct lb_error *err)
{
    uint64_t pages = 0;

    for (unsigned i = 0; i < x->n_blocks; i++) {
        uint64_t n = x->blocks[i].n_pages;
        x->loc[i] = calloc(n ? n : 1, sizeof(*x->loc[i]));
        x->seq[i] = calloc(n ? n : 1, sizeof(*x->seq[i]));
        if (!x->loc[i] || !x->seq[i])
            return lb_fail_errno(err, LB_E_NO_SPACE, ENOMEM, "no memory for the index of a checkpoint");
        pages += n;
    }
    uint64_t n = SEEN_MIN;
    while (n < pages * 2 && n < SEEN_MAX)
        n *= 2;
    x->seen = calloc(n, sizeof(*x->seen));
    x->seen_mask = n - 1;
    if (!x->seen)
        return lb_fail_errno(err, LB_E_NO_SPACE, ENOMEM, "no memory for the index of a checkpoint");
    return 0;
}

int lb_widx_new(const struct lb_ckpt_block *blocks, unsigned n_blocks, struct lb_widx **out, struct lb_error *err)
{
    struct lb_widx *x = lb_alloc(sizeof(*x));

    pthread_mutex_init(&x->lock, NULL);
    x->blocks = blocks;
    x->n_blocks = n_blocks;
    x->loc = lb_alloc(n_blocks * sizeof(*x->loc));
    x->seq = lb_alloc(n_blocks * sizeof(*x->seq));
    if (new_tables(x, err) < 0) {
        lb_widx_free(x);
        return -1;
    }
    *out = x;
    return 0;
}

void lb_widx_free(struct lb_widx *x)
{
    if (!x)
        return;
    for (unsigned i = 0; i < x->n_blocks; i++) {
        free(x->loc[i]);
        free(x->seq[i]);
    }
    for (uint64_t i = 0; i < x->n_slabs; i++)
        free(x->slabs[i]);
    free(x->slabs);
    free(x->loc);
    free(x->seq);
    free(x->seen);
    pthread_mutex_destroy(&x->lock);
    free(x);
}

void lb_widx_set(struct lb_widx *x, unsigned block, uint64_t page, uint32_t seq, lb_loc loc)
{
    if (seq < x->seq[block][page])
        return;
    x->seq[block][page] = seq;
    x->loc[block][page] = loc;
}

uint64_t lb_widx_open_chunk(struct lb_widx *x)
{
    if (x->n_chunks == x->n_slabs * SLAB_CHUNKS) {
        x->slabs = lb_realloc(x->slabs, (x->n_slabs + 1) * sizeof(*x->slabs));
        x->slabs[x->n_slabs++] = lb_alloc(SLAB_CHUNKS * sizeof(**x->slabs));
    }
    return x->n_chunks++;
}

struct lb_chunk_rec *lb_widx_chunk(struct lb_widx *x, uint64_t serial)
{
    return &x->slabs[serial / SLAB_CHUNKS][serial % SLAB_CHUNKS];
}

lb_loc lb_widx_find(struct lb_widx *x, const uint8_t hash[16])
{
    uint64_t tag = tag_of(hash);
    for (unsigned i = 0; i < PROBES; i++) {
        const struct lb_seen *s = &x->seen[(tag + i) & x->seen_mask];
        if (s->loc == LB_LOC_NONE)
            return LB_LOC_NONE;
        if (s->tag == tag &&
            !memcmp(lb_widx_chunk(x, LB_LOC_SERIAL(s->loc))->hash[LB_LOC_SLOT(s->loc)], hash, 16))
            return s->loc;
    }
    return LB_LOC_NONE;
}

void lb_widx_add(struct lb_widx *x, const uint8_t hash[16], lb_loc loc)
{
    uint64_t tag = tag_of(hash);
    for (unsigned i = 0; i < PROBES; i++) {
        struct lb_seen *s = &x->seen[(tag + i) & x->seen_mask];
        if (s->loc == LB_LOC_NONE) {
            *s = (struct lb_seen){tag, loc};
            return;
        }
    }
}
