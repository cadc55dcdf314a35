/* core/bitmap.c - fixed-size set of bits.
 *
 * Bits of the last word beyond n_bits are always zero, so that counting and
 * searching need no special case. */
#include "core/core.h"

#include <assert.h>
#include <string.h>

static uint64_t n_words(uint64_t n_bits)
{
    return n_bits / 64 + (n_bits % 64 != 0);
}

int lb_bitmap_init(struct lb_bitmap *b, uint64_t n_bits, struct lb_error *err)
{
    uint64_t *words = lb_try_alloc(n_words(n_bits) * sizeof(*words), err);
    if (!words)
        return -1;
    b->n_bits = n_bits;
    b->words = words;
    return 0;
}

void lb_bitmap_free(struct lb_bitmap *b)
{
    free(b->words);
    b->words = NULL;
    b->n_bits = 0;
}

bool lb_bitmap_test(const struct lb_bitmap *b, uint64_t bit)
{
    assert(bit < b->n_bits);
    return b->words[bit / 64] >> (bit % 64) & 1;
}

void lb_bitmap_set(struct lb_bitmap *b, uint64_t bit)
{
    assert(bit < b->n_bits);
    b->words[bit / 64] |= UINT64_C(1) << (bit % 64);
}

void lb_bitmap_clear(struct lb_bitmap *b, uint64_t bit)
{
    assert(bit < b->n_bits);
    b->words[bit / 64] &= ~(UINT64_C(1) << (bit % 64));
}

/* Bits [lo, hi) of one word, 0 <= lo < hi <= 64. */
static uint64_t word_mask(unsigned lo, unsigned hi)
{
    uint64_t upto = hi == 64 ? UINT64_MAX : (UINT64_C(1) << hi) - 1;
    return upto & (UINT64_MAX << lo);
}

static void change_range(struct lb_bitmap *b, uint64_t first, uint64_t count, bool on)
{
    assert(first <= b->n_bits && count <= b->n_bits - first);
    uint64_t end = first + count;
    while (first < end) {
        uint64_t stop = LB_MIN(end, (first / 64 + 1) * 64);
        uint64_t mask = word_mask(first % 64, (unsigned)(stop - first / 64 * 64));
        if (on)
            b->words[first / 64] |= mask;
        else
            b->words[first / 64] &= ~mask;
        first = stop;
    }
}

void lb_bitmap_set_range(struct lb_bitmap *b, uint64_t first, uint64_t count)
{
    change_range(b, first, count, true);
}

void lb_bitmap_clear_range(struct lb_bitmap *b, uint64_t first, uint64_t count)
{
    change_range(b, first, count, false);
}

void lb_bitmap_clear_all(struct lb_bitmap *b)
{
    memset(b->words, 0, n_words(b->n_bits) * sizeof(*b->words));
}

void lb_bitmap_set_all(struct lb_bitmap *b)
{
    lb_bitmap_set_range(b, 0, b->n_bits);
}

uint64_t lb_bitmap_count(const struct lb_bitmap *b)
{
    uint64_t n = 0;
    for (uint64_t i = 0; i < n_words(b->n_bits); i++)
        n += (uint64_t)__builtin_popcountll(b->words[i]);
    return n;
}

void lb_bitmap_or(struct lb_bitmap *dst, const struct lb_bitmap *src)
{
    assert(dst->n_bits == src->n_bits);
    for (uint64_t i = 0; i < n_words(dst->n_bits); i++)
        dst->words[i] |= src->words[i];
}

void lb_bitmap_andnot(struct lb_bitmap *dst, const struct lb_bitmap *src)
{
    assert(dst->n_bits == src->n_bits);
    for (uint64_t i = 0; i < n_words(dst->n_bits); i++)
        dst->words[i] &= ~src->words[i];
}

/* First bit >= from that is set (flip 0) or clear (flip ~0), at most `end`. */
static uint64_t find(const struct lb_bitmap *b, uint64_t from, uint64_t end, uint64_t flip)
{
    while (from < end) {
        uint64_t w = (b->words[from / 64] ^ flip) & (UINT64_MAX << (from % 64));
        if (w)
            return LB_MIN(end, from / 64 * 64 + (uint64_t)__builtin_ctzll(w));
        from = (from / 64 + 1) * 64;
    }
    return end;
}

bool lb_bitmap_next_run(const struct lb_bitmap *b, uint64_t from, uint64_t max, uint64_t *first,
                        uint64_t *count)
{
    assert(max > 0);
    uint64_t start = find(b, from, b->n_bits, 0);
    if (start >= b->n_bits)
        return false;
    uint64_t end = start + LB_MIN(max, b->n_bits - start);
    *first = start;
    *count = find(b, start, end, UINT64_MAX) - start;
    return true;
}
