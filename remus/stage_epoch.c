/* remus/stage_epoch.c - the staging buffer of one epoch, filled while the guest is stopped.
 *
 * What counts is the pause: the buffer is faulted in before it (lb_epoch_reserve), pages next to each other
 * are copied together, and a second thread takes half of a large copy (the guest's processors are
 * idle just then). */
#include "remus/stage.h"

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>

enum {
    STEP_PAGES = 512,        /* growth: 2 MiB, what the kernel can give in one page */
    /* Below it waking the second thread costs more than it saves: copies, reads from another process. */
    TWO_COPY_PAGES = 2048,
    TWO_READ_PAGES = 512,
    READ_PAGES = 1024,       /* at once */
    AMPLE_FACTOR = 4,
    AMPLE_CALLS = 256,
};
#define MAX_PAGES (UINT64_C(1) << 36)

/* ---------------------------------------------------------------- a second thread */

struct copy_job {
    const struct lb_epoch *e;
    struct lb_hv_vm *vm;
    const struct lb_ram_block *blk;
    uint64_t from, to; /* indexes in e->pages */
    struct lb_error err;
    int rc;
};

struct lb_copier {
    pthread_t thread; /* immutable */

    /* locked by lock */
    pthread_mutex_t lock;
    pthread_cond_t change;
    struct copy_job *job; /* NULL: idle */
    bool quit;
};

static int read_pages(struct copy_job *j)
{
    uint32_t pages[READ_PAGES];

    for (uint64_t i = j->from, n; i < j->to; i += n) {
        for (n = 0; n < READ_PAGES && i + n < j->to; n++)
            pages[n] = j->e->pages[i + n].page;
        if (lb_hv_read_pages(j->vm, j->blk, pages, n, j->e->data + i * LB_PAGE_SIZE, &j->err) < 0)
            return -1;
    }
    return 0;
}

/* Pages that follow each other in the block do so in the buffer as well. */
static int copy_pages(struct copy_job *j)
{
    const struct lb_epoch_page *p = j->e->pages;
    const uint8_t *map = j->blk->map;

    if (!map)
        return read_pages(j);
    for (uint64_t i = j->from, n; i < j->to; i += n) {
        for (n = 1; i + n < j->to && p[i + n].page == p[i].page + n; n++)
            ;
        memcpy(j->e->data + i * LB_PAGE_SIZE, map + (size_t)p[i].page * LB_PAGE_SIZE,
               n * LB_PAGE_SIZE);
    }
    return 0;
}

static void *copier_main(void *arg)
{
    struct lb_copier *c = arg;

    pthread_mutex_lock(&c->lock);
    while (!c->quit) {
        struct copy_job *j = c->job;
        if (!j) {
            pthread_cond_wait(&c->change, &c->lock);
            continue;
        }
        pthread_mutex_unlock(&c->lock);
        j->rc = copy_pages(j);
        pthread_mutex_lock(&c->lock);
        c->job = NULL;
        pthread_cond_broadcast(&c->change);
    }
    pthread_mutex_unlock(&c->lock);
    return NULL;
}

/* NULL when there can be none: one thread does it then. */
static struct lb_copier *copier_new(void)
{
    struct lb_copier *c = lb_alloc(sizeof(*c));

    pthread_mutex_init(&c->lock, NULL);
    pthread_cond_init(&c->change, NULL);
    if (pthread_create(&c->thread, NULL, copier_main, c) == 0)
        return c;
    pthread_mutex_destroy(&c->lock);
    pthread_cond_destroy(&c->change);
    free(c);
    return NULL;
}

static void copier_free(struct lb_copier *c)
{
    if (!c)
        return;
    pthread_mutex_lock(&c->lock);
    c->quit = true;
    pthread_cond_broadcast(&c->change);
    pthread_mutex_unlock(&c->lock);
    pthread_join(c->thread, NULL);
    pthread_mutex_destroy(&c->lock);
    pthread_cond_destroy(&c->change);
    free(c);
}

static void copier_begin(struct lb_copier *c, struct copy_job *j)
{
    pthread_mutex_lock(&c->lock);
    assert(!c->job);
    c->job = j;
    pthread_cond_broadcast(&c->change);
    pthread_mutex_unlock(&c->lock);
}

static void copier_wait(struct lb_copier *c)
{
    pthread_mutex_lock(&c->lock);
    while (c->job)
        pthread_cond_wait(&c->change, &c->lock);
    pthread_mutex_unlock(&c->lock);
}

static int copy_all(struct copy_job *all, struct lb_epoch *e, struct lb_error *err)
{
    struct copy_job first = *all, second = *all;

    uint64_t two = all->blk->map ? TWO_COPY_PAGES : TWO_READ_PAGES;

    if (all->to - all->from >= two && e->copier) {
        first.to = second.from = all->from + (all->to - all->from) / 2;
        copier_begin(e->copier, &second);
        first.rc = copy_pages(&first);
        copier_wait(e->copier);
    } else {
        second.rc = 0;
        first.rc = copy_pages(&first);
    }
    const struct copy_job *bad = first.rc < 0 ? &first : second.rc < 0 ? &second : NULL;
    if (bad && err)
        *err = bad->err;
    return bad ? -1 : 0;
}

/* --------------------------------------------------------------------- the buffer */

void lb_epoch_init(struct lb_epoch *e)
{
    memset(e, 0, sizeof(*e));
}

void lb_epoch_reset(struct lb_epoch *e)
{
    free(e->state);
    free(e->frames);
    lb_disk_ops_free(&e->disk);
    e->state = e->frames = NULL;
    e->state_len = e->frames_len = 0;
    e->disk = (struct lb_disk_ops){0};
    e->number = e->n_pages = e->stopped_ns = e->cont_ns = 0;
}

void lb_epoch_free(struct lb_epoch *e)
{
    lb_epoch_reset(e);
    copier_free(e->copier);
    if (e->data)
        munmap(e->data, e->pages_cap * LB_PAGE_SIZE);
    if (e->pages)
        munmap(e->pages, e->pages_cap * sizeof(*e->pages));
    lb_epoch_init(e);
}

/* A private mapping made larger or smaller; what is new has its pages. NULL: no memory. */
static void *resize(void *old, size_t old_bytes, size_t bytes)
{
    uint8_t *p = old ? mremap(old, old_bytes, bytes, MREMAP_MAYMOVE)
                     : mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        return NULL;
    if (bytes <= old_bytes)
        return p;
    madvise(p, bytes, MADV_HUGEPAGE);
    /* a kernel that cannot faults them in the pause */
    madvise(p + old_bytes, bytes - old_bytes, MADV_POPULATE_WRITE);
    return p;
}

static int set_capacity(struct lb_epoch *e, uint64_t cap, struct lb_error *err)
{
    cap = (cap + STEP_PAGES - 1) / STEP_PAGES * STEP_PAGES;
    if (cap > MAX_PAGES)
        return lb_fail(err, LB_E_NO_SPACE, "an epoch of %llu pages", (unsigned long long)cap);
    uint64_t old = e->pages_cap, small = LB_MIN(cap, old);
    void *data = resize(e->data, old * LB_PAGE_SIZE, cap * LB_PAGE_SIZE);
    if (!data)
        goto fail;
    e->data = data;
    void *pages = resize(e->pages, old * sizeof(*e->pages), cap * sizeof(*e->pages));
    if (!pages) { /* back to where both agree; making smaller works */
        e->data = resize(e->data, cap * LB_PAGE_SIZE, small * LB_PAGE_SIZE);
        goto fail;
    }
    e->pages = pages;
    e->pages_cap = cap;
    return 0;
fail:
    lb_fail_errno(err, LB_E_NO_SPACE, errno, "no memory to stage an epoch of %llu pages",
                  (unsigned long long)cap);
    return lb_remedy(err, "free memory on this host, or protect with a shorter interval");
}

int lb_epoch_reserve(struct lb_epoch *e, uint64_t n_pages, struct lb_error *err)
{
    if (n_pages > MAX_PAGES)
        return lb_fail(err, LB_E_NO_SPACE, "an epoch of %llu pages", (unsigned long long)n_pages);
    uint64_t want = e->n_pages + n_pages;
    if (want >= TWO_READ_PAGES && !e->copier)
        e->copier = copier_new();
    e->ample = e->n_pages == 0 && LB_MAX(want, (uint64_t)STEP_PAGES) <= e->pages_cap / AMPLE_FACTOR
                   ? e->ample + 1 : 0;
    if (e->ample > AMPLE_CALLS) {
        e->ample = 0;
        return set_capacity(e, LB_MAX(e->pages_cap / 2, (uint64_t)STEP_PAGES), err);
    }
    return want > e->pages_cap ? set_capacity(e, want, err) : 0;
}

int lb_epoch_capture(struct lb_epoch *e, struct lb_hv_vm *vm, const struct lb_ram_block *blk,
                     const struct lb_bitmap *dirty, struct lb_error *err)
{
    struct copy_job job = {.e = e, .vm = vm, .blk = blk, .from = e->n_pages};
    uint64_t at = 0, first, n;

    assert(e->n_pages == 0 || e->pages[e->n_pages - 1].block < blk->id);
    job.to = job.from;
    while (lb_bitmap_next_run(dirty, at, UINT64_MAX, &first, &n)) {
        if (job.to + n > e->pages_cap &&
            set_capacity(e, LB_MAX(job.to + n, e->pages_cap + e->pages_cap / 2), err) < 0)
            return -1;
        for (uint64_t i = 0; i < n; i++)
            e->pages[job.to++] = (struct lb_epoch_page){blk->id, (uint32_t)(first + i)};
        at = first + n;
    }
    if (copy_all(&job, e, err) < 0)
        return -1; /* the pages of this block do not count */
    e->n_pages = job.to;
    return 0;
}
