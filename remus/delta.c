/* remus/delta.c - see delta.h.
 *
 *      index[block][page] --> slot number + 1 (0: not held)
 *      slots   [ block page used ] [ block page used ] ...     hand: where the next victim is looked for
 *      data    [ 4096 bytes      ] [ 4096 bytes      ] ...     mapped whole, given pages as they are touched
 */
#include "remus/delta.h"

#include <assert.h>
#include <errno.h>
#include <string.h>
#include <sys/mman.h>

/* Of 512 words of 8 bytes: with more of them changed the difference is as hard to compress as the page. */
enum { SPARSE_WORDS = 384 };

struct slot {
    uint32_t block, page;
    bool used; /* written again since the hand was here */
};

struct lb_delta {
    uint32_t **index; /* by block */
    unsigned n_blocks;
    struct slot *slots;
    uint8_t *data;
    uint32_t n, cap, hand;
};

int lb_delta_new(const uint64_t *n_pages_of_block, unsigned n_blocks, uint64_t max_bytes,
                 struct lb_delta **out, struct lb_error *err)
{
    struct lb_delta *d = lb_alloc(sizeof(*d));
    uint64_t total = 0;

    d->index = lb_alloc((n_blocks ? n_blocks : 1) * sizeof(*d->index));
    d->n_blocks = n_blocks;
    for (unsigned i = 0; i < n_blocks; i++) {
        total += n_pages_of_block[i];
        if (!(d->index[i] = lb_try_alloc(n_pages_of_block[i] * sizeof(**d->index) + 1, err)))
            goto fail;
    }
    d->cap = (uint32_t)LB_MIN(LB_MIN(max_bytes / LB_PAGE_SIZE, total), (uint64_t)UINT32_MAX - 1);
    if (d->cap > 0) {
        if (!(d->slots = lb_try_alloc(d->cap * sizeof(*d->slots), err)))
            goto fail;
        d->data = mmap(NULL, (size_t)d->cap * LB_PAGE_SIZE, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (d->data == MAP_FAILED) {
            d->data = NULL;
            lb_fail_errno(err, LB_E_NO_SPACE, errno, "no memory for differences between pages");
            lb_remedy(err, "give protection a smaller delta cache");
            goto fail;
        }
        madvise(d->data, (size_t)d->cap * LB_PAGE_SIZE, MADV_HUGEPAGE);
    }
    *out = d;
    return 0;
fail:
    lb_delta_free(d);
    return -1;
}

void lb_delta_free(struct lb_delta *d)
{
    if (!d)
        return;
    for (unsigned i = 0; i < d->n_blocks; i++)
        free(d->index[i]);
    if (d->data)
        munmap(d->data, (size_t)d->cap * LB_PAGE_SIZE);
    free(d->index);
    free(d->slots);
    free(d);
}

uint64_t lb_delta_bytes(const struct lb_delta *d)
{
    return (uint64_t)d->n * LB_PAGE_SIZE;
}

static uint8_t *data_of(struct lb_delta *d, uint32_t slot)
{
    return d->data + (size_t)slot * LB_PAGE_SIZE;
}

/* A free slot, or the first from the hand on that has not been used since it last came by. */
static uint32_t take_slot(struct lb_delta *d)
{
    if (d->n < d->cap)
        return d->n++;
    for (;; d->hand++) {
        if (d->hand >= d->cap)
            d->hand = 0;
        struct slot *s = &d->slots[d->hand];
        if (!s->used)
            break;
        s->used = false;
    }
    d->index[d->slots[d->hand].block][d->slots[d->hand].page] = 0;
    return d->hand++;
}

typedef uint64_t words __attribute__((vector_size(32), aligned(32), may_alias));

/* xored = now ^ held, held = now. Returns how many words differ. */
static unsigned replace(uint8_t *held, const uint8_t *now, uint8_t *xored)
{
    words same = {0};
    for (size_t i = 0; i < LB_PAGE_SIZE; i += sizeof(words)) {
        words n = *(const words *)(now + i), x = n ^ *(const words *)(held + i);
        *(words *)(held + i) = n;
        *(words *)(xored + i) = x;
        same -= (words)(x == 0); /* true is all ones */
    }
    return (unsigned)(LB_PAGE_SIZE / 8 - (same[0] + same[1] + same[2] + same[3]));
}

enum lb_delta_kind lb_delta_update(struct lb_delta *d, uint32_t block, uint32_t page,
                                   const void *now, bool zero, void *xored)
{
    assert(block < d->n_blocks);
    uint32_t *slot = &d->index[block][page];
    if (*slot == 0) {
        if (zero || d->cap == 0)
            return LB_DELTA_NEW;
        uint32_t at = take_slot(d);
        d->slots[at] = (struct slot){.block = block, .page = page};
        *slot = at + 1;
        memcpy(data_of(d, at), now, LB_PAGE_SIZE);
        return LB_DELTA_NEW;
    }
    d->slots[*slot - 1].used = true;
    unsigned differ = replace(data_of(d, *slot - 1), now, xored);
    return differ == 0 ? LB_DELTA_SAME : differ <= SPARSE_WORDS ? LB_DELTA_SPARSE : LB_DELTA_DENSE;
}
