/* checkpoint/restore_mem.c - memory of a checkpoint into a machine: which block is which, small blocks, all of it. */
#include "checkpoint/fill.h"

#include <stdatomic.h>
#include <string.h>

/* ---------------------------------------------------------------- which is which */

static const struct lb_ram_block *block_named(const struct lb_ram_block *v, unsigned n, const char *name)
{
    for (unsigned i = 0; i < n; i++)
        if (!strcmp(v[i].name, name))
            return &v[i];
    return NULL;
}

/* The only main block under another name is still the main block. */
static const struct lb_ram_block *the_main(const struct lb_mem *m, const struct lb_ram_block *v, unsigned n)
{
    const struct lb_ram_block *found = NULL;
    unsigned theirs = 0, ours = 0;

    for (unsigned i = 0; i < m->n; i++)
        theirs += m->blocks[i].kind == LB_RAM_MAIN;
    for (unsigned i = 0; i < n; i++)
        if (v[i].kind == LB_RAM_MAIN) {
            found = &v[i];
            ours++;
        }
    return theirs == 1 && ours == 1 ? found : NULL;
}

static int map_block(struct lb_mem *m, unsigned i, const struct lb_ram_block *v, unsigned n, struct lb_error *err)
{
    const struct lb_ckpt_block *b = &m->blocks[i];
    const struct lb_ram_block *mine = block_named(v, n, b->name);

    if (b->kind == LB_RAM_ROM) {
        if (mine && mine->hva && mine->size_bytes >> LB_PAGE_SHIFT == b->n_pages)
            m->map[i] = mine;
        else
            lb_log(LB_LOG_DEBUG, "ROM %s cannot be compared", b->name);
        return 0;
    }
    if (!mine && b->kind == LB_RAM_MAIN)
        mine = the_main(m, v, n);
    if (!mine || mine->size_bytes >> LB_PAGE_SHIFT != b->n_pages ||
        (mine->kind == LB_RAM_MAIN) != (b->kind == LB_RAM_MAIN)) {
        lb_fail(err, LB_E_PREFLIGHT, "memory block %s of %llu pages %s", b->name, (unsigned long long)b->n_pages,
                mine ? "is another one here" : "does not exist here");
        return lb_remedy(err, "the hypervisor here builds another machine from the same command line: use the version "
                              "the checkpoint was taken with, or map the emulator in lifeboat.conf");
    }
    m->map[i] = mine;
    return 0;
}

int lb_mem_init(struct lb_mem *m, struct lb_hv_vm *vm, struct lb_chain *chain, bool only_main, struct lb_error *err)
{
    const struct lb_ram_block *v;
    unsigned n;

    memset(m, 0, sizeof(*m));
    m->vm = vm;
    m->chain = chain;
    m->blocks = lb_chain_blocks(chain, &m->n);
    m->map = lb_alloc(sizeof(*m->map) * (m->n + 1));
    m->populated = lb_alloc(sizeof(*m->populated) * (m->n + 1));
    if (lb_hv_blocks(vm, &v, &n, err))
        return -1;
    for (unsigned i = 0; i < m->n; i++) {
        bool main_block = m->blocks[i].kind == LB_RAM_MAIN;

        if ((main_block || !only_main) && map_block(m, i, v, n, err))
            return -1;
        if (!main_block)
            continue;
        if (lb_bitmap_init(&m->populated[i], m->blocks[i].n_pages, err) ||
            lb_chain_populated(chain, i, &m->populated[i], err))
            return -1;
        m->populated_pages += lb_bitmap_count(&m->populated[i]);
        m->main_bytes += m->blocks[i].n_pages << LB_PAGE_SHIFT;
    }
    return 0;
}

void lb_mem_free(struct lb_mem *m)
{
    for (unsigned i = 0; m->populated && i < m->n; i++)
        lb_bitmap_free(&m->populated[i]);
    free(m->populated);
    free(m->map);
    memset(m, 0, sizeof(*m));
}

/* ---------------------------------------------------------------- small blocks */

struct small {
    struct lb_mem *m;
    unsigned block;
    struct lb_bitmap *left;
    uint8_t page[LB_PAGE_SIZE];
};

static int place_page(struct small *s, uint64_t page, const void *data, struct lb_error *err)
{
    const struct lb_ram_block *blk = s->m->map[s->block];

    if (lb_hv_read(s->m->vm, blk, page, 1, s->page, err))
        return -1;
    return memcmp(s->page, data, LB_PAGE_SIZE) ? lb_hv_write(s->m->vm, blk, page, 1, data, err) : 0;
}

static int on_small(unsigned block, uint64_t first, uint64_t count, const void *data, void *arg, struct lb_error *err)
{
    struct small *s = arg;

    for (uint64_t i = 0; block == s->block && i < count; i++) {
        if (place_page(s, first + i, (const char *)data + (i << LB_PAGE_SHIFT), err))
            return -1;
        lb_bitmap_clear(s->left, first + i);
    }
    return 0;
}

static int place_stored(struct small *s, struct lb_error *err)
{
    uint64_t first, count;

    for (uint64_t from = 0; lb_bitmap_next_run(s->left, from, 1, &first, &count); from = first + 1)
        if (lb_chain_read(s->m->chain, s->block, first, on_small, s, err))
            return -1;
    return 0;
}

/* What the hypervisor put where the checkpoint has nothing. */
static int place_zeros(struct small *s, const struct lb_bitmap *stored, struct lb_error *err)
{
    static const uint8_t zeros[LB_PAGE_SIZE];
    const struct lb_ram_block *blk = s->m->map[s->block];
    struct lb_bitmap there = {0};
    uint64_t first, count;
    int rc = lb_bitmap_init(&there, stored->n_bits, err);

    if (!rc)
        rc = lb_hv_populated(s->m->vm, blk, &there, err);
    if (!rc)
        lb_bitmap_andnot(&there, stored);
    for (uint64_t from = 0; !rc && lb_bitmap_next_run(&there, from, 1, &first, &count); from = first + 1)
        rc = place_page(s, first, zeros, err);
    lb_bitmap_free(&there);
    return rc;
}

int lb_mem_place_small(struct lb_mem *m, struct lb_error *err)
{
    int rc = 0;

    for (unsigned i = 0; i < m->n && !rc; i++) {
        struct lb_bitmap left = {0}, stored = {0};
        struct small s = {.m = m, .block = i, .left = &left};

        if (m->blocks[i].kind == LB_RAM_MAIN || !m->map[i])
            continue;
        rc = lb_bitmap_init(&left, m->blocks[i].n_pages, err) ||
             lb_bitmap_init(&stored, m->blocks[i].n_pages, err) || lb_chain_populated(m->chain, i, &stored, err)
                 ? -1
                 : 0;
        /* A ROM of zeros is one that could not be read when the checkpoint was taken. */
        if (!rc && (lb_bitmap_count(&stored) || m->blocks[i].kind != LB_RAM_ROM)) {
            lb_bitmap_or(&left, &stored);
            rc = place_stored(&s, err) || place_zeros(&s, &stored, err) ? -1 : 0;
        }
        lb_bitmap_free(&left);
        lb_bitmap_free(&stored);
    }
    return rc;
}

/* ---------------------------------------------------------------- all of main memory */

struct reading {
    struct lb_chain *chain;
    const struct lb_ckpt_block *blocks;
    lb_chain_pages_fn *place;
    void *arg;
    int cancel_fd;
    _Atomic uint64_t pages;
    pthread_mutex_t mu;
    pthread_cond_t cond;
    bool ended;                       /* locked by mu, like the two below */
    int rc;
    struct lb_error err;
};

static bool skip_small(unsigned block, uint64_t page, void *arg)
{
    const struct reading *r = arg;

    (void)page;
    return r->blocks[block].kind != LB_RAM_MAIN;
}

static int on_main(unsigned block, uint64_t first, uint64_t count, const void *data, void *arg, struct lb_error *err)
{
    struct reading *r = arg;

    if (skip_small(block, first, r)) /* another block's pages in a chunk that is needed */
        return 0;
    if (r->place(block, first, count, data, r->arg, err))
        return -1;
    atomic_fetch_add(&r->pages, count);
    return 0;
}

static void *reading_main(void *arg)
{
    struct reading *r = arg;
    struct lb_error err = LB_ERROR_INIT;
    struct lb_chain_read_all all = {.skip = skip_small, .fn = on_main, .arg = r, .cancel_fd = r->cancel_fd,
                                    .dont_cache = true};
    int rc = lb_chain_read_all(r->chain, &all, &err);

    pthread_mutex_lock(&r->mu);
    r->rc = rc;
    r->err = err;
    r->ended = true;
    pthread_cond_signal(&r->cond);
    pthread_mutex_unlock(&r->mu);
    return NULL;
}

/* True when it has ended. */
static bool wait_reading(struct reading *r, unsigned ms)
{
    struct timespec ts;
    bool ended;

    clock_gettime(CLOCK_REALTIME, &ts);
    ts.tv_nsec += (long)ms * 1000000;
    ts.tv_sec += ts.tv_nsec / 1000000000;
    ts.tv_nsec %= 1000000000;
    pthread_mutex_lock(&r->mu);
    while (!r->ended && !pthread_cond_timedwait(&r->cond, &r->mu, &ts))
        ;
    ended = r->ended;
    pthread_mutex_unlock(&r->mu);
    return ended;
}

int lb_mem_read_main(struct lb_chain *chain, lb_chain_pages_fn *place, void *arg, struct lb_ckpt_meter *meter,
                     double from, double to, struct lb_error *err)
{
    struct reading r = {.chain = chain, .place = place, .arg = arg, .cancel_fd = meter->env->cancel_fd};
    uint64_t total = LB_MAX(meter->p.total_bytes, UINT64_C(1));
    unsigned n;
    pthread_t t;
    int e;

    r.blocks = lb_chain_blocks(chain, &n);
    pthread_mutex_init(&r.mu, NULL);
    pthread_cond_init(&r.cond, NULL);
    e = pthread_create(&t, NULL, reading_main, &r);
    if (e)
        return lb_fail_errno(err, LB_E_NO_SPACE, e, "cannot start a thread");
    for (bool ended = false; !ended;) {
        uint64_t bytes;

        ended = wait_reading(&r, 100);
        bytes = atomic_load(&r.pages) << LB_PAGE_SHIFT;
        lb_ckpt_meter_bytes(meter, bytes, from + (to - from) * (double)bytes / (double)total);
    }
    pthread_join(t, NULL);
    pthread_mutex_destroy(&r.mu);
    pthread_cond_destroy(&r.cond);
    if (r.rc && err)
        *err = r.err;
    return r.rc;
}
