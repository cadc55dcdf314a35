/* migrate/direct.c - see direct.h. Every record is small: the pages go beside the stream. */
#include "migrate/direct.h"

#include <assert.h>
#include <string.h>
#include <xxhash.h>

#define STAGING_BYTES ((size_t)LB_REC_MAX_PAGES * LB_PAGE_SIZE)
#define GRANT_WAIT_NS UINT64_C(20000000000)

static struct lb_page_run chunk_run(const struct lb_ram_block *blk, uint64_t chunk)
{
    uint64_t first = chunk * LB_RDMA_CHUNK_PAGES, all = blk->size_bytes >> LB_PAGE_SHIFT;

    return (struct lb_page_run){(uint32_t)first,
                                (uint32_t)LB_MIN((uint64_t)LB_RDMA_CHUNK_PAGES, all - first)};
}

static uint8_t *page_at(const struct lb_ram_block *blk, uint64_t page)
{
    return (uint8_t *)blk->map + (page << LB_PAGE_SHIFT);
}

/* -------------------------------------------------------------------- source */

struct lb_direct {
    struct lb_bulk *bulk;
    struct lb_transport *t;
    void *staging;
    struct lb_rdma_mr staging_mr;
    bool refused;                  /* here or there nothing more can be registered: no more questions */
    struct lb_rdma_window window;
    struct {
        struct lb_rdma_mr mine;    /* of the block's view; zero when it has none */
        uint64_t addr;             /* of the chunk's first page, as the receiver says */
        uint32_t rkey;
    } slot[LB_RDMA_MAX_SLOTS];
    int flip;                      /* LIFEBOAT_RDMA_FLIP: this write, counted down; -1: all */
    uint8_t *damaged;              /* a page to write instead */
    struct lb_rdma_mr damaged_mr;
};

struct lb_direct *lb_direct_new(struct lb_bulk *b, void *staging, unsigned n_connections)
{
    struct lb_direct *d = lb_alloc(sizeof(*d));
    const char *flip = getenv("LIFEBOAT_RDMA_FLIP");

    d->bulk = b;
    d->t = lb_bulk_transport(b);
    d->staging = staging;
    lb_rdma_window_init(&d->window, n_connections);
    lb_bulk_set_direct(b, LB_DIRECT_SOURCE);
    d->flip = !flip ? 0 : !strcmp(flip, "all") ? -1 : atoi(flip);
    return d;
}

void lb_direct_free(struct lb_direct *d)
{
    if (!d)
        return;
    for (unsigned i = 0; i < LB_RDMA_MAX_SLOTS; i++)
        lb_rdma_deregister(&d->slot[i].mine);
    lb_rdma_deregister(&d->staging_mr);
    lb_rdma_deregister(&d->damaged_mr);
    free(d->damaged);
    free(d);
}

/* The receiver's answer to the question about `run`. */
static int granted(struct lb_direct *d, uint32_t block, const struct lb_page_run *run, unsigned slot,
                   bool *yes, struct lb_error *err)
{
    struct lb_record rec;
    uint8_t p[LB_REC_MAX_DIRECT_BYTES];

    if (lb_bulk_recv(d->bulk, &rec, lb_now_ns() + GRANT_WAIT_NS, err) ||
        (rec.type == LB_REC_GRANT && lb_bulk_recv_direct(d->bulk, &rec, p, err)))
        return -1;
    if (rec.type != LB_REC_GRANT || rec.block_id != block || rec.runs[0].first != run->first ||
        rec.runs[0].count != run->count)
        return lb_fail(err, LB_E_PROTO, "the peer answers another question than ours");
    d->slot[slot].addr = lb_get64(p);
    d->slot[slot].rkey = lb_get32(p + 8);
    *yes = lb_get32(p + 12) == 1;
    return 0;
}

/* What the slot had is on its way no more and registered no more; then ours and theirs. */
static int fill_slot(struct lb_direct *d, const struct lb_ram_block *blk, uint64_t chunk, unsigned slot,
                     struct lb_error *err)
{
    struct lb_page_run run = chunk_run(blk, chunk);
    struct lb_error e = LB_ERROR_INIT;
    uint8_t ask[4];
    bool yes = false;

    if (d->window.slot[slot].full && lb_rdma_drain(d->t, 0, err))
        return -1;
    d->window.slot[slot].full = false;
    lb_rdma_deregister(&d->slot[slot].mine);
    if (blk->map ? lb_rdma_register(d->t, page_at(blk, run.first), (size_t)run.count << LB_PAGE_SHIFT,
                                    false, &d->slot[slot].mine, &e)
                 : !d->staging_mr.handle &&
                       lb_rdma_register(d->t, d->staging, STAGING_BYTES, false, &d->staging_mr, &e)) {
        lb_log_error(LB_LOG_WARN, &e);
        d->refused = true;
        return 0;
    }
    lb_put32(ask, slot);
    if (lb_bulk_send_direct(d->bulk, LB_REC_ASK, 0, blk->id, &run, 1, ask, sizeof(ask), err) ||
        granted(d, blk->id, &run, slot, &yes, err))
        return -1;
    if (!yes) {
        lb_log(LB_LOG_INFO, "the destination registers no more memory: pages go through buffers");
        d->refused = true;
        return 0;
    }
    lb_rdma_window_put(&d->window, slot, blk->id, chunk);
    return 1;
}

int lb_direct_ready(struct lb_direct *d, const struct lb_ram_block *blk, uint64_t chunk, bool worth,
                    struct lb_error *err)
{
    if (lb_rdma_window_find(&d->window, blk->id, chunk) >= 0)
        return 1;
    if (!worth || d->refused || blk->kind == LB_RAM_ROM)
        return 0;
    return fill_slot(d, blk, chunk, lb_rdma_window_victim(&d->window), err);
}

/* For a test: the page is overwritten, after its checksum was taken, by one with a bit turned. */
static int damage(struct lb_direct *d, const void *page, uint64_t remote, uint32_t rkey,
                  struct lb_error *err)
{
    if (d->flip > 0 && --d->flip > 0)
        return 0;
    if (!d->damaged)
        d->damaged = aligned_alloc(LB_PAGE_SIZE, LB_PAGE_SIZE);
    if (!d->damaged || (!d->damaged_mr.handle &&
                        lb_rdma_register(d->t, d->damaged, LB_PAGE_SIZE, false, &d->damaged_mr, err)))
        return -1;
    lb_log(LB_LOG_WARN, "a test: a page is damaged on its way");
    memcpy(d->damaged, page, LB_PAGE_SIZE);
    d->damaged[1000] ^= 4;
    return lb_rdma_write(d->t, &d->damaged_mr, d->damaged, LB_PAGE_SIZE, remote, rkey, false, err) ||
                   lb_rdma_drain(d->t, 0, err)
               ? -1
               : 0;
}

int lb_direct_send(struct lb_direct *d, uint32_t round, const struct lb_ram_block *blk,
                   const struct lb_page_run *runs, const struct iovec *iov, unsigned n_runs,
                   struct lb_error *err)
{
    uint64_t chunk = runs[0].first / LB_RDMA_CHUNK_PAGES;
    int slot = lb_rdma_window_find(&d->window, blk->id, chunk);
    const struct lb_rdma_mr *mr = blk->map ? &d->slot[slot].mine : &d->staging_mr;
    uint8_t sums[LB_REC_MAX_DIRECT_BYTES];
    uint32_t rkey = d->slot[slot].rkey;
    unsigned n = 0;

    assert(slot >= 0);
    for (unsigned i = 0; i < n_runs; i++) {
        const uint8_t *p = iov[i].iov_base;

        for (uint32_t k = 0; k < runs[i].count; k++, p += LB_PAGE_SIZE)
            lb_put64(sums + 8 * (size_t)n++, XXH3_64bits(p, LB_PAGE_SIZE));
    }
    for (unsigned i = 0; i < n_runs; i++) {
        uint64_t to = d->slot[slot].addr +
                      ((runs[i].first - chunk * LB_RDMA_CHUNK_PAGES) << LB_PAGE_SHIFT);

        if (lb_rdma_write(d->t, mr, iov[i].iov_base, iov[i].iov_len, to, rkey, i + 1 < n_runs, err) ||
            (d->flip && damage(d, iov[i].iov_base, to, rkey, err)))
            return -1;
    }
    lb_bulk_count_direct(d->bulk, n, blk->map ? 0 : (uint64_t)n << LB_PAGE_SHIFT);
    if (lb_bulk_send_direct(d->bulk, LB_REC_WRITTEN, round, blk->id, runs, n_runs, sums, 8 * (size_t)n,
                            err))
        return -1;
    return blk->map ? 0 : lb_rdma_drain(d->t, 0, err);
}

/* --------------------------------------------------------------- destination */

struct lb_direct_rx {
    struct lb_bulk *bulk;
    unsigned n_slots;
    struct lb_rdma_mr slot[LB_RDMA_MAX_SLOTS];
};

struct lb_direct_rx *lb_direct_rx_new(struct lb_bulk *b, unsigned n_connections)
{
    struct lb_direct_rx *d = lb_alloc(sizeof(*d));
    struct lb_rdma_window w;

    lb_rdma_window_init(&w, n_connections);
    d->n_slots = w.n_slots;
    d->bulk = b;
    lb_bulk_set_direct(b, LB_DIRECT_DEST);
    return d;
}

void lb_direct_rx_free(struct lb_direct_rx *d)
{
    for (unsigned i = 0; d && i < LB_RDMA_MAX_SLOTS; i++)
        lb_rdma_deregister(&d->slot[i]);
    free(d);
}

int lb_direct_rx_ask(struct lb_direct_rx *d, const struct lb_record *rec,
                     const struct lb_ram_block *blk, struct lb_error *err)
{
    struct lb_page_run run = rec->runs[0];
    struct lb_error e = LB_ERROR_INIT;
    uint8_t p[LB_REC_MAX_DIRECT_BYTES], answer[16];
    uint32_t slot;
    bool yes;

    if (lb_bulk_recv_direct(d->bulk, rec, p, err))
        return -1;
    slot = lb_get32(p);
    if (slot >= d->n_slots || run.first % LB_RDMA_CHUNK_PAGES != 0)
        return lb_fail(err, LB_E_PROTO, "the peer asks for what is no chunk of memory");
    lb_rdma_deregister(&d->slot[slot]);
    yes = blk && blk->map && blk->kind != LB_RAM_ROM &&
          !lb_rdma_register(lb_bulk_transport(d->bulk), page_at(blk, run.first),
                            (size_t)run.count << LB_PAGE_SHIFT, true, &d->slot[slot], &e);
    if (e.code)
        lb_log_error(LB_LOG_WARN, &e);
    lb_put64(answer, d->slot[slot].addr);
    lb_put32(answer + 8, d->slot[slot].rkey);
    lb_put32(answer + 12, yes);
    return lb_bulk_send_direct(d->bulk, LB_REC_GRANT, 0, rec->block_id, &run, 1, answer,
                               sizeof(answer), err);
}

int lb_direct_rx_written(struct lb_direct_rx *d, const struct lb_record *rec,
                         const struct lb_ram_block *blk, uint64_t good[LB_REC_MAX_PAGES / 64],
                         struct lb_error *err)
{
    uint8_t sums[LB_REC_MAX_DIRECT_BYTES];
    unsigned n = 0;

    memset(good, 0, LB_REC_MAX_PAGES / 8);
    if (lb_bulk_recv_direct(d->bulk, rec, sums, err))
        return -1;
    if (!blk->map)
        return lb_fail(err, LB_E_PROTO, "the peer wrote to memory that it could not write to");
    for (uint32_t i = 0; i < rec->n_runs; i++)
        for (uint32_t k = 0; k < rec->runs[i].count; k++, n++)
            if (XXH3_64bits(page_at(blk, (uint64_t)rec->runs[i].first + k), LB_PAGE_SIZE) ==
                lb_get64(sums + 8 * (size_t)n))
                good[n / 64] |= UINT64_C(1) << (n % 64);
    return 0;
}
