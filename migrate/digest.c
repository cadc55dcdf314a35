/*
 * migrate/digest.c - one number for all memory, agreed by both ends (--verify).
 *
 * digest = sum over non-zero pages of XXH3-128(page, seed(block, page)), as a
 * 128-bit integer. A sum does not depend on order, so threads share the work and
 * the two ends may keep zero pages in different ways (hole or zeros).
 * XXH3 finds accidents, not forgeries: the stream itself is authenticated.
 */
#include "migrate/migrate_internal.h"

#include <string.h>
#include <xxhash.h>

#define CHUNK_PAGES 1024u

typedef unsigned __int128 u128;

struct job {
    struct lb_hv_vm *vm;
    const struct lb_ram_block *const *blocks;
    const uint32_t *ids;
    const struct lb_bitmap *pages;
    unsigned n_blocks;
    _Atomic uint64_t cursor;
};

struct part {
    struct job *job;
    pthread_t thread;
    u128 sum;
    int rc;
    struct lb_error err;
};

static int chunk(struct part *p, unsigned b, uint64_t first, uint64_t count, uint8_t *bounce)
{
    struct job *j = p->job;
    const struct lb_ram_block *blk = j->blocks[b];
    uint64_t at = first, rf, rc;

    while (at < first + count &&
           lb_bitmap_next_run(&j->pages[b], at, first + count - at, &rf, &rc) &&
           rf < first + count) {
        const uint8_t *src;

        rc = LB_MIN(rc, first + count - rf);
        if (blk->map) {
            src = (const uint8_t *)blk->map + (rf << LB_PAGE_SHIFT);
        } else {
            if (lb_hv_read(j->vm, blk, rf, rc, bounce, &p->err))
                return -1;
            src = bounce;
        }
        for (uint64_t i = 0; i < rc; i++, src += LB_PAGE_SIZE) {
            XXH128_hash_t h;

            if (lb_is_zero(src, LB_PAGE_SIZE))
                continue;
            h = XXH3_128bits_withSeed(src, LB_PAGE_SIZE,
                                      ((uint64_t)j->ids[b] << 40) ^ (rf + i));
            p->sum += ((u128)h.high64 << 64) | h.low64;
        }
        at = rf + rc;
    }
    return 0;
}

static void *part_main(void *arg)
{
    struct part *p = arg;
    struct job *j = p->job;
    LB_AUTO_FREE uint8_t *bounce = aligned_alloc(LB_PAGE_SIZE, (size_t)CHUNK_PAGES * LB_PAGE_SIZE);

    if (!bounce) {
        p->rc = lb_fail(&p->err, LB_E_NO_SPACE, "no memory for the digest");
        return NULL;
    }
    for (;;) {
        uint64_t n = atomic_fetch_add(&j->cursor, 1), left = n;
        unsigned b = 0;

        while (b < j->n_blocks) {
            uint64_t chunks = (j->pages[b].n_bits + CHUNK_PAGES - 1) / CHUNK_PAGES;

            if (left < chunks)
                break;
            left -= chunks;
            b++;
        }
        if (b == j->n_blocks)
            return NULL;
        p->rc = chunk(p, b, left * CHUNK_PAGES,
                      LB_MIN((uint64_t)CHUNK_PAGES, j->pages[b].n_bits - left * CHUNK_PAGES),
                      bounce);
        if (p->rc)
            return NULL;
    }
}

int lb_memory_digest(struct lb_hv_vm *vm, const struct lb_ram_block *const *blocks,
                     const uint32_t *ids, unsigned n_blocks, unsigned n_threads, uint8_t out[16],
                     struct lb_error *err)
{
    struct lb_bitmap *pages = lb_alloc(sizeof(*pages) * (n_blocks + 1));
    struct part *parts = lb_alloc(sizeof(*parts) * n_threads);
    struct job j = {.vm = vm, .blocks = blocks, .ids = ids, .pages = pages, .n_blocks = n_blocks};
    unsigned started = 0;
    u128 sum = 0;
    int rc = 0;

    for (unsigned b = 0; b < n_blocks && !rc; b++) {
        rc = lb_bitmap_init(&pages[b], blocks[b]->size_bytes >> LB_PAGE_SHIFT, err);
        if (!rc)
            rc = lb_hv_populated(vm, blocks[b], &pages[b], err);
    }
    for (; started < n_threads && !rc; started++) {
        parts[started].job = &j;
        if (pthread_create(&parts[started].thread, NULL, part_main, &parts[started]))
            break;
    }
    if (!rc && !started)
        rc = lb_fail(err, LB_E_NO_SPACE, "cannot start a digest thread");
    for (unsigned i = 0; i < started; i++) {
        pthread_join(parts[i].thread, NULL);
        sum += parts[i].sum;
        if (parts[i].rc && !rc) {
            rc = -1;
            if (err)
                *err = parts[i].err;
        }
    }
    memcpy(out, &sum, 16);
    for (unsigned b = 0; b < n_blocks; b++)
        lb_bitmap_free(&pages[b]);
    free(pages);
    free(parts);
    return rc;
}

int lb_block_digest(struct lb_hv_vm *vm, const struct lb_ram_block *blk, uint8_t out[16],
                    struct lb_error *err)
{
    LB_AUTO_FREE uint8_t *buf = lb_try_alloc((size_t)CHUNK_PAGES * LB_PAGE_SIZE, err);
    XXH3_state_t *st = XXH3_createState();
    uint64_t n = blk->size_bytes >> LB_PAGE_SHIFT;
    XXH128_canonical_t c;
    int rc = buf && st ? 0 : -1;

    if (st)
        XXH3_128bits_reset(st);
    for (uint64_t at = 0; at < n && !rc;) {
        uint64_t k = LB_MIN(n - at, (uint64_t)CHUNK_PAGES);

        rc = lb_hv_read(vm, blk, at, k, buf, err);
        if (!rc)
            XXH3_128bits_update(st, buf, (size_t)k << LB_PAGE_SHIFT);
        at += k;
    }
    if (!rc) {
        XXH128_canonicalFromHash(&c, XXH3_128bits_digest(st));
        memcpy(out, c.digest, 16);
    }
    XXH3_freeState(st);
    return rc;
}
