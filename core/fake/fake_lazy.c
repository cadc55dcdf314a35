/*
 * core/fake/fake_lazy.c - the fake guest's memory that comes when it is touched.
 *
 * A bitmap says which pages of main memory are missing.  Whoever touches one (the worker, the load of the
 * device state, a test that verifies) marks it as asked for and waits under the guest's lock, as a thread of
 * a hypervisor waits in the kernel; lazy_fault hands out what is asked for, lazy_place wakes.
 *
 * All of it is the guest's, not the handle's: when the handle goes, whoever waits goes on waiting.
 */
#include "core/fake/fake_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <time.h>

/* How long the load of a state and a test wait for a page before they say that nobody serves it. */
#define SERVED_MS 10000

static struct timespec in_ms(unsigned ms)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    t.tv_sec += ms / 1000;
    t.tv_nsec += (long)(ms % 1000) * 1000000;
    if (t.tv_nsec >= 1000000000) {
        t.tv_nsec -= 1000000000;
        t.tv_sec++;
    }
    return t;
}

static bool missing(const struct guest *g, uint64_t page)
{
    return g->lazy && lb_bitmap_test(&g->missing, page);
}

bool lb_fake_page_wait(struct guest *g, uint64_t page, bool forever)
{
    struct timespec until = in_ms(SERVED_MS);
    unsigned asked = g->lazy_round - 1;
    int rc = 0;

    while (missing(g, page) && !g->quit && !g->dead && rc == 0) {
        if (asked != g->lazy_round) { /* not asked yet, or who was asked has gone */
            lb_bitmap_set(&g->asked, page);
            pthread_cond_broadcast(&g->wake);
            asked = g->lazy_round;
        }
        if (forever)
            pthread_cond_wait(&g->wake, &g->lock);
        else
            rc = pthread_cond_timedwait(&g->wake, &g->lock, &until);
    }
    return !missing(g, page);
}

int lb_fake_load_touches(struct guest *g, struct lb_error *err)
{
    pthread_mutex_lock(&g->lock);
    bool there = lb_fake_page_wait(g, 0, false);
    pthread_mutex_unlock(&g->lock);
    return there ? 0 : lb_fail(err, LB_E_HV, "fake: page 0 of %s is missing and nobody serves it", g->name);
}

/* Lock held. */
static void forget(struct guest *g)
{
    g->lazy = false;
    lb_bitmap_free(&g->missing);
    lb_bitmap_free(&g->asked);
    g->table[MAIN].map = g->config.no_map ? NULL : g->blocks[MAIN].our_map;
    pthread_cond_broadcast(&g->wake);
}

void lb_fake_lazy_free(struct guest *g)
{
    lb_bitmap_free(&g->missing);
    lb_bitmap_free(&g->asked);
}

int lb_fake_lazy_begin(struct lb_hv_vm *vm, struct lb_error *err)
{
    struct guest *g = vm->guest;
    struct fake_block *b = &g->blocks[MAIN];

    if (lb_fake_enter(LB_FAKE_LAZY_BEGIN, g, err) < 0)
        return -1;
    if (g->shared_fd >= 0)
        return lb_fail(err, LB_E_UNSUPPORTED, "fake: memory of %s is shared", g->name);
    if (fallocate(b->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)b->pub.size_bytes) < 0)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "fake: cannot empty %s", b->pub.name);
    if (lb_bitmap_init(&g->missing, b->n_pages, err) < 0)
        return -1;
    if (lb_bitmap_init(&g->asked, b->n_pages, err) < 0) {
        lb_bitmap_free(&g->missing);
        return -1;
    }
    pthread_mutex_lock(&g->lock);
    lb_bitmap_set_all(&g->missing);
    g->lazy = true;
    g->table[MAIN].map = NULL;
    pthread_mutex_unlock(&g->lock);
    return 0;
}

int lb_fake_lazy_attach(const struct lb_vm_ident *ident, struct lb_hv_vm **out, struct lb_error *err)
{
    struct lb_hv_vm *vm = NULL;

    if (lb_fake_enter(LB_FAKE_LAZY_ATTACH, NULL, err) < 0 || lb_fake_find(ident, &vm, err) < 0)
        return -1;
    struct guest *g = vm->guest;
    pthread_mutex_lock(&g->lock);
    bool lazy = g->lazy;
    g->lazy_round++; /* who waits asks again */
    pthread_cond_broadcast(&g->wake);
    pthread_mutex_unlock(&g->lock);
    if (!lazy) {
        lb_fail(err, LB_E_NOT_FOUND, "fake: no memory of %s is missing", g->name);
        lb_hv_fake.detach(vm);
        return -1;
    }
    *out = vm;
    return 0;
}

int lb_fake_lazy_fault(struct lb_hv_vm *vm, unsigned timeout_ms, const struct lb_ram_block **blk,
                       uint64_t *page, struct lb_error *err)
{
    struct guest *g = vm->guest;
    struct timespec until = in_ms(timeout_ms);
    uint64_t n;
    int rc = 0, wait = 0;

    if (lb_fake_enter(LB_FAKE_LAZY_FAULT, g, err) < 0)
        return -1;
    pthread_mutex_lock(&g->lock);
    while (rc == 0) {
        if (g->dead) {
            rc = lb_fail(err, LB_E_HV, "fake: %s died while its memory was being filled", g->name);
        } else if (g->lazy && lb_bitmap_next_run(&g->asked, 0, 1, page, &n)) {
            lb_bitmap_clear(&g->asked, *page);
            *blk = &g->table[MAIN];
            rc = 1;
        } else if (wait == ETIMEDOUT) {
            break;
        } else {
            wait = pthread_cond_timedwait(&g->wake, &g->lock, &until);
        }
    }
    pthread_mutex_unlock(&g->lock);
    return rc;
}

static uint64_t place(struct guest *g, const struct lb_ram_block *blk, uint64_t first, uint64_t n, const void *buf)
{
    uint64_t count = 0;

    pthread_mutex_lock(&g->lock);
    for (uint64_t i = 0; i < n; i++) {
        if (blk->id != MAIN || !missing(g, first + i))
            continue;
        if (buf)
            memcpy(g->blocks[MAIN].our_map + (first + i) * LB_PAGE_SIZE, (const uint8_t *)buf + i * LB_PAGE_SIZE,
                   LB_PAGE_SIZE);
        lb_bitmap_clear(&g->missing, first + i);
        count++;
    }
    pthread_cond_broadcast(&g->wake);
    pthread_mutex_unlock(&g->lock);
    return count;
}

int lb_fake_lazy_place(struct lb_hv_vm *vm, const struct lb_ram_block *blk, uint64_t first, uint64_t n,
                       const void *buf, uint64_t *placed, struct lb_error *err)
{
    if (lb_fake_enter(LB_FAKE_LAZY_PLACE, vm->guest, err) < 0)
        return -1;
    uint64_t count = place(vm->guest, blk, first, n, buf);
    if (placed)
        *placed = count;
    return 0;
}

int lb_fake_lazy_offer(struct lb_hv_vm *vm, const struct lb_ram_block *blk, uint64_t first, uint64_t n,
                       const void *buf, struct lb_error *err)
{
    if (lb_fake_enter(LB_FAKE_LAZY_OFFER, vm->guest, err) < 0)
        return -1;
    place(vm->guest, blk, first, n, buf);
    return 0;
}

/* A page that is there is touched unseen. */
int lb_fake_lazy_touched(struct lb_hv_vm *vm, const struct lb_ram_block *blk, struct lb_bitmap *pages,
                         struct lb_error *err)
{
    (void)blk, (void)pages;
    if (lb_fake_enter(LB_FAKE_LAZY_TOUCHED, vm->guest, err) < 0)
        return -1;
    return lb_fail(err, LB_E_UNSUPPORTED, "fake: nobody knows what was touched");
}

int lb_fake_lazy_missing(struct lb_hv_vm *vm, const struct lb_ram_block *blk, struct lb_bitmap *pages,
                         struct lb_error *err)
{
    struct guest *g = vm->guest;

    if (lb_fake_enter(LB_FAKE_LAZY_MISSING, g, err) < 0)
        return -1;
    pthread_mutex_lock(&g->lock);
    if (blk->id == MAIN && g->lazy)
        lb_bitmap_or(pages, &g->missing);
    pthread_mutex_unlock(&g->lock);
    return 0;
}

int lb_fake_lazy_end(struct lb_hv_vm *vm, struct lb_error *err)
{
    struct guest *g = vm->guest;

    if (lb_fake_enter(LB_FAKE_LAZY_END, g, err) < 0)
        return -1;
    pthread_mutex_lock(&g->lock);
    if (g->lazy)
        forget(g);
    if (g->running) /* a handle from lazy_attach does not know yet */
        vm->base.state = LB_HV_RUNNING;
    pthread_mutex_unlock(&g->lock);
    return 0;
}
