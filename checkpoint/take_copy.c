/*
 * checkpoint/take_copy.c - memory into the file.
 *
 *   live     |-- everything --|stop|-- written meanwhile --|stop|-- ... --|stop  last pages to memory, state|-- write --|
 *   suspend  |-- 50 ms: what it needed first the last time, some more --|stop  state, written meanwhile, everything else
 *
 * A page that is copied while the guest writes it may be torn; it is in the log then, and copied again. One that
 * the log has already when its turn comes is left to the next round. The log is fetched only while the guest is
 * stopped (DESIGN 2a: DMA in flight).
 *
 * The pause is as long as what was written since the last round needs to be copied to our own memory. When that
 * is more than this host can lend, the rest goes straight to the file: a longer pause, never a failure.
 */
#include "checkpoint/fill.h"
#include "checkpoint/take.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#define LITTLE_PAGES 1024u           /* copied in a few ms: no further round is worth it */
#define ROUNDS_MAX 8u
#define AHEAD_PAGES 1024u            /* how far the log is looked at in advance */
#define SAMPLE_MS 50u
#define SPARE_PAGES 2048u
#define HOT_MAX 65536u               /* 256 MiB: more than a disk reads before the guest asks */
#define LEARNED_MAX 8192u            /* read before the guest runs, or soon after */

/* ------------------------------------------------------------------------- reading */

static bool readable(const struct lb_ram_block *b)
{
    return b->hva || b->map; /* a ROM may be nowhere to be found; the receiver has its own */
}

static int read_pages(struct lb_take *t, const struct lb_ram_block *b, const uint32_t *pages, uint64_t n,
                      uint8_t *to, struct lb_error *err)
{
    if (!b->map)
        return lb_hv_read_pages(t->vm, b, pages, n, to, err);
    for (uint64_t i = 0, run; i < n; i += run) {
        for (run = 1; i + run < n && pages[i + run] == pages[i] + run; run++)
            ;
        memcpy(to + i * LB_PAGE_SIZE, (const uint8_t *)b->map + (size_t)pages[i] * LB_PAGE_SIZE,
               run * LB_PAGE_SIZE);
    }
    return 0;
}

static int put_pages(struct lb_take *t, unsigned block, const uint32_t *pages, unsigned n, struct lb_error *err)
{
    void *buf = lb_ckpt_buffer(t->writer, err);

    if (!buf || read_pages(t, &t->blocks[block], pages, n, buf, err))
        return -1; /* the writer is aborted with all its buffers */
    return lb_ckpt_put(t->writer, block, pages, n, buf, err);
}

/* The guest should notice nothing but its pauses: not faster than asked for. */
static void keep_pace(struct lb_take *t)
{
    uint64_t rate = t->opts->bandwidth_bytes_per_s, due, now = lb_now_ns();

    if (!rate || t->stopped)
        return;
    due = t->t_copy + (uint64_t)((double)t->copied_pages * LB_PAGE_SIZE * 1e9 / (double)rate);
    if (due > now)
        lb_sleep_ms((unsigned)LB_MIN((due - now) / 1000000, UINT64_C(100)));
}

static int after_chunk(struct lb_take *t, uint64_t pages, struct lb_error *err)
{
    double f;

    t->copied_pages += pages;
    keep_pace(t);
    f = t->total_pages ? (double)LB_MIN(t->copied_pages, t->total_pages) / (double)t->total_pages : 1;
    lb_ckpt_meter_bytes(&t->meter, LB_MIN(t->copied_pages, t->total_pages) * LB_PAGE_SIZE, 3 + 82 * f);
    return lb_take_check_cancel(t, err);
}

/* Where the log says already that a page is in the next round. */
struct ahead {
    struct lb_bitmap bits;
    uint64_t from, end;
};

static int look_ahead(struct lb_take *t, const struct lb_ram_block *b, struct ahead *a, uint64_t page,
                      struct lb_error *err)
{
    if (page < a->end)
        return 0;
    a->from = page;
    a->end = LB_MIN(page + AHEAD_PAGES, b->size_bytes / LB_PAGE_SIZE);
    lb_bitmap_clear_all(&a->bits);
    return lb_hv_log_peek(t->vm, b, a->from, a->end - a->from, &a->bits, err);
}

/* The pages of set to the file. a NULL: all; else without those that come again. */
static int copy_block(struct lb_take *t, unsigned block, const struct lb_bitmap *set, struct ahead *a,
                      struct lb_error *err)
{
    const struct lb_ram_block *b = &t->blocks[block];
    uint32_t pages[LB_CKPT_CHUNK_PAGES];
    uint64_t at = 0, first, count;
    unsigned n = 0;

    while (lb_bitmap_next_run(set, at, LB_CKPT_CHUNK_PAGES, &first, &count)) {
        at = first + count;
        for (uint64_t p = first; p < at; p++) {
            if (a && look_ahead(t, b, a, p, err))
                return -1;
            if (a && lb_bitmap_test(&a->bits, p - a->from)) {
                t->copied_pages++; /* of this round it is done */
                continue;
            }
            pages[n++] = (uint32_t)p;
            if (n < LB_CKPT_CHUNK_PAGES)
                continue;
            if (put_pages(t, block, pages, n, err) || after_chunk(t, n, err))
                return -1;
            n = 0;
        }
    }
    return n && (put_pages(t, block, pages, n, err) || after_chunk(t, n, err)) ? -1 : 0;
}

/* dirty[] to the file. */
static int copy_dirty(struct lb_take *t, bool running, struct lb_error *err)
{
    struct ahead a = {0};
    int rc = 0;

    if (running && lb_bitmap_init(&a.bits, AHEAD_PAGES, err))
        return -1;
    for (unsigned b = 0; b < t->n_blocks && !rc; b++) {
        a.from = a.end = 0;
        rc = copy_block(t, b, &t->dirty[b], running && t->blocks[b].kind != LB_RAM_ROM ? &a : NULL, err);
    }
    lb_bitmap_free(&a.bits);
    return rc;
}

/* ------------------------------------------------------------------------- the log */

static int new_bitmaps(struct lb_take *t, struct lb_bitmap **out, struct lb_error *err)
{
    *out = lb_alloc(sizeof(**out) * (t->n_blocks + 1));
    for (unsigned b = 0; b < t->n_blocks; b++)
        if (lb_bitmap_init(&(*out)[b], t->blocks[b].size_bytes / LB_PAGE_SIZE, err))
            return -1;
    return 0;
}

static void free_bitmaps(struct lb_take *t, struct lb_bitmap **v)
{
    for (unsigned b = 0; b < t->n_blocks && *v; b++)
        lb_bitmap_free(&(*v)[b]);
    free(*v);
    *v = NULL;
}

static uint64_t count_dirty(const struct lb_take *t)
{
    uint64_t n = 0;

    for (unsigned b = 0; b < t->n_blocks; b++)
        n += lb_bitmap_count(&t->dirty[b]);
    return n;
}

/* Guest stopped: dirty[] becomes what it wrote since the last time. */
static int fetch_log(struct lb_take *t, struct lb_error *err)
{
    for (unsigned b = 0; b < t->n_blocks; b++) {
        lb_bitmap_clear_all(&t->dirty[b]);
        if (t->blocks[b].kind != LB_RAM_ROM && lb_hv_log_clean(t->vm, &t->blocks[b], &t->dirty[b], err))
            return -1;
    }
    return 0;
}

/* What is dirty[] was written lately: hot. */
static int remember(struct lb_take *t, struct lb_error *err)
{
    struct lb_bitmap *copy;

    free_bitmaps(t, &t->recent[LB_TAKE_RECENT - 1]);
    memmove(t->recent + 1, t->recent, sizeof(t->recent[0]) * (LB_TAKE_RECENT - 1));
    t->recent[0] = NULL;
    if (new_bitmaps(t, &copy, err)) {
        free_bitmaps(t, &copy);
        return -1;
    }
    for (unsigned b = 0; b < t->n_blocks; b++)
        lb_bitmap_or(&copy[b], &t->dirty[b]);
    t->recent[0] = copy;
    return 0;
}

static int count_log(struct lb_take *t, uint64_t *pages, struct lb_error *err)
{
    *pages = 0;
    for (unsigned b = 0; b < t->n_blocks; b++) {
        struct lb_bitmap seen = {0};
        int rc;

        if (t->blocks[b].kind == LB_RAM_ROM)
            continue;
        if (lb_bitmap_init(&seen, t->dirty[b].n_bits, err))
            return -1;
        rc = lb_hv_log_peek(t->vm, &t->blocks[b], 0, seen.n_bits, &seen, err);
        *pages += lb_bitmap_count(&seen);
        lb_bitmap_free(&seen);
        if (rc)
            return -1;
    }
    return 0;
}

/* Main memory as far as there is any; everything of devices and ROMs: what a new process has there is not zero. */
static int all_there_is(struct lb_take *t, struct lb_error *err)
{
    for (unsigned b = 0; b < t->n_blocks; b++) {
        lb_bitmap_clear_all(&t->dirty[b]);
        if (t->blocks[b].kind != LB_RAM_MAIN) {
            if (readable(&t->blocks[b]))
                lb_bitmap_set_all(&t->dirty[b]);
        } else if (lb_hv_populated(t->vm, &t->blocks[b], &t->dirty[b], err)) {
            return -1;
        }
    }
    t->copied_pages = 0;
    t->total_pages = count_dirty(t);
    t->meter.p.total_bytes = t->total_pages * LB_PAGE_SIZE;
    t->t_copy = lb_now_ns();
    return 0;
}

/* An increment is "as the parent" where nothing is said: memory that the guest no longer has must be named. */
static int put_holes(struct lb_take *t, struct lb_error *err)
{
    for (unsigned b = 0; b < t->n_blocks && t->parent; b++) {
        uint64_t total = t->dirty[b].n_bits, at = 0, first, count;

        if (t->blocks[b].kind != LB_RAM_MAIN)
            continue;
        while (at < total) {
            if (!lb_bitmap_next_run(&t->dirty[b], at, total, &first, &count)) {
                first = total;
                count = 0;
            }
            if (first > at && lb_ckpt_put_zero(t->writer, b, at, first - at, err))
                return -1;
            at = first + count;
        }
    }
    return 0;
}

/* -------------------------------------------------------------------------- rounds */

int lb_take_begin_log(struct lb_take *t, struct lb_error *err)
{
    if (new_bitmaps(t, &t->dirty, err) || lb_hv_log_enable(t->vm, err))
        return -1;
    return all_there_is(t, err) || put_holes(t, err) ? -1 : 0;
}

/* before: pages of the round that has ended; left: what was written meanwhile. */
static bool another_round(unsigned rounds, uint64_t before, uint64_t left)
{
    if (left <= LITTLE_PAGES || rounds >= ROUNDS_MAX)
        return false;
    return rounds == 1 || left < before - before / 4;
}

int lb_take_rounds(struct lb_take *t, struct lb_error *err)
{
    for (;;) {
        uint64_t before = count_dirty(t), left;

        /* Flushed: what is left is then decided with nothing under way, and in the pause nobody else wants the
         * processors and the disk. */
        if (copy_dirty(t, true, err) || lb_ckpt_flush(t->writer, err))
            return -1;
        t->res->rounds++;
        if (count_log(t, &left, err))
            return -1;
        lb_log(LB_LOG_DEBUG, "round=%u pages=%llu left=%llu", t->res->rounds, (unsigned long long)before,
               (unsigned long long)left);
        if (!another_round(t->res->rounds, before, left))
            return 0;
        if (lb_take_pause(t, err) || fetch_log(t, err) || lb_take_continue(t, err) || remember(t, err))
            return -1;
    }
}

/* ----------------------------------------------------------------------- the pause */

/* What this host can lend for a moment. */
static uint64_t available_bytes(void)
{
    LB_AUTO_FILE FILE *f = fopen("/proc/meminfo", "r");
    unsigned long long kib;
    char line[128];

    while (f && fgets(line, sizeof(line), f))
        if (sscanf(line, "MemAvailable: %llu kB", &kib) == 1)
            return (uint64_t)kib << 10;
    return 0;
}

static void *map_pages(uint64_t bytes)
{
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    return p == MAP_FAILED ? NULL : p;
}

int lb_take_reserve(struct lb_take *t, struct lb_error *err)
{
    struct lb_take_pages *l = &t->late;
    uint64_t left, most = 0, touch;

    if (count_log(t, &left, err))
        return -1;
    for (unsigned b = 0; b < t->n_blocks; b++)
        most += t->dirty[b].n_bits;
    l->cap = LB_MIN(most, available_bytes() / 4 / LB_PAGE_SIZE + SPARE_PAGES);
    l->mem = map_pages(l->cap * LB_PAGE_SIZE);
    l->pages = map_pages(l->cap * sizeof(*l->pages));
    l->parts = lb_alloc((t->n_blocks + 1) * sizeof(*l->parts));
    if (!l->mem || !l->pages)
        return lb_fail_errno(err, LB_E_NO_SPACE, errno, "no memory for the pages of the pause");
    /* A page of ours that is there already costs the guest's pause nothing but the copying. */
    touch = LB_MIN(l->cap, left + left / 2 + SPARE_PAGES);
    memset(l->mem, 0, touch * LB_PAGE_SIZE);
    memset(l->pages, 0, touch * sizeof(*l->pages));
    return 0;
}

static int collect_block(struct lb_take *t, unsigned block, struct lb_error *err)
{
    struct lb_take_pages *l = &t->late;
    struct lb_take_part *part = &l->parts[l->n_parts];
    struct lb_bitmap *set = &t->dirty[block];
    uint64_t at = 0, first, count;

    *part = (struct lb_take_part){.block = block, .from = l->n};
    while (l->n < l->cap && lb_bitmap_next_run(set, at, l->cap - l->n, &first, &count)) {
        at = first + count;
        for (uint64_t p = first; p < at; p++)
            l->pages[l->n++] = (uint32_t)p;
    }
    part->n = l->n - part->from;
    if (!part->n)
        return 0;
    l->n_parts++;
    if (read_pages(t, &t->blocks[block], l->pages + part->from, part->n, l->mem + part->from * LB_PAGE_SIZE,
                   err))
        return -1;
    lb_bitmap_clear_range(set, 0, at);
    return 0;
}

int lb_take_last_pages(struct lb_take *t, struct lb_error *err)
{
    if (fetch_log(t, err) || remember(t, err))
        return -1;
    for (unsigned b = 0; b < t->n_blocks; b++)
        if (collect_block(t, b, err))
            return -1;
    if (!count_dirty(t))
        return 0;
    lb_ckpt_meter_note(&t->meter, "%llu pages written meanwhile are more than this host has room for: the guest "
                       "waits for the file", (unsigned long long)(t->late.n + count_dirty(t)));
    return copy_dirty(t, false, err);
}

int lb_take_write_late(struct lb_take *t, struct lb_error *err)
{
    const struct lb_take_pages *l = &t->late;

    for (unsigned i = 0; i < l->n_parts; i++)
        for (uint64_t at = 0, n; at < l->parts[i].n; at += n) {
            uint64_t from = l->parts[i].from + at;
            void *buf = lb_ckpt_buffer(t->writer, err);

            if (!buf)
                return -1;
            n = LB_MIN(l->parts[i].n - at, (uint64_t)LB_CKPT_CHUNK_PAGES);
            memcpy(buf, l->mem + from * LB_PAGE_SIZE, n * LB_PAGE_SIZE);
            if (lb_ckpt_put(t->writer, l->parts[i].block, l->pages + from, (unsigned)n, buf, err) ||
                lb_take_check_cancel(t, err))
                return -1;
        }
    return 0;
}

/* ------------------------------------------------------------------------- suspend */

/* Hints, of another machine perhaps that had the name. */
static void load_learned(struct lb_take *t)
{
    LB_AUTO_FREE char *path = lb_ws_path(t->env->catalog_dir, t->entry.name, 0);
    uint64_t n, kept = 0;

    lb_ws_load(path, NULL, &t->learned, &n);
    for (uint64_t i = 0; i < n && kept < LEARNED_MAX; i++) {
        unsigned block = lb_key_block(t->learned[i]);

        if (block < t->n_blocks && t->blocks[block].kind == LB_RAM_MAIN && lb_key_page(t->learned[i]) < t->dirty[block].n_bits)
            t->learned[kept++] = t->learned[i];
    }
    t->n_learned = kept;
}

static int copy_learned(struct lb_take *t, unsigned block, struct lb_error *err)
{
    struct lb_bitmap set = {0};
    int rc = lb_bitmap_init(&set, t->dirty[block].n_bits, err);

    for (uint64_t i = 0; !rc && i < t->n_learned; i++)
        if (lb_key_block(t->learned[i]) == block && lb_bitmap_test(&t->dirty[block], lb_key_page(t->learned[i])))
            lb_bitmap_set(&set, lb_key_page(t->learned[i]));
    if (!rc)
        rc = copy_block(t, block, &set, NULL, err);
    if (!rc)
        lb_bitmap_andnot(&t->dirty[block], &set);
    lb_bitmap_free(&set);
    return rc;
}

/* What will be needed first lies together, at the beginning of the file. */
static int copy_all_learned(struct lb_take *t, struct lb_error *err)
{
    for (unsigned b = 0; b < t->n_blocks; b++)
        if (t->blocks[b].kind == LB_RAM_MAIN && copy_learned(t, b, err))
            return -1;
    return 0;
}

/* Of dirty[], a chunk at a time until it is late; it is taken out of it. */
static int copy_some(struct lb_take *t, unsigned block, uint64_t until_ns, struct lb_error *err)
{
    uint32_t pages[LB_CKPT_CHUNK_PAGES];
    uint64_t at = 0, first, count;

    while (lb_now_ns() < until_ns && lb_bitmap_next_run(&t->dirty[block], at, LB_CKPT_CHUNK_PAGES, &first, &count)) {
        at = first + count;
        for (unsigned i = 0; i < count; i++)
            pages[i] = (uint32_t)(first + i);
        if (put_pages(t, block, pages, (unsigned)count, err) || after_chunk(t, count, err))
            return -1;
        lb_bitmap_clear_range(&t->dirty[block], first, count);
    }
    return 0;
}

int lb_take_sample(struct lb_take *t, struct lb_error *err)
{
    uint64_t until_ns = lb_now_ns() + SAMPLE_MS * UINT64_C(1000000), now;
    struct lb_error why = LB_ERROR_INIT;

    if (new_bitmaps(t, &t->dirty, err))
        return -1;
    load_learned(t);
    if (t->paused)
        return 0;
    /* Without a log everything is copied when the guest is stopped, and nothing is known to be hot. */
    if (lb_hv_log_enable(t->vm, &why)) {
        lb_log_error(LB_LOG_INFO, &why);
        return 0;
    }
    t->logging = true;
    if (all_there_is(t, err) || copy_all_learned(t, err))
        return -1;
    for (unsigned b = 0; b < t->n_blocks; b++)
        if (t->blocks[b].kind == LB_RAM_MAIN && copy_some(t, b, until_ns, err))
            return -1;
    now = lb_now_ns();
    if (now < until_ns)
        lb_sleep_ms((unsigned)((until_ns - now) / 1000000 + 1));
    return 0;
}

/* What was written since is copied (again), and what has not been copied yet. */
static int copy_rest(struct lb_take *t, struct lb_error *err)
{
    struct lb_bitmap *left = LB_STEAL_PTR(t->dirty);
    int rc = new_bitmaps(t, &t->dirty, err) || fetch_log(t, err) || remember(t, err) || copy_dirty(t, false, err) ? -1 : 0;

    for (unsigned b = 0; b < t->n_blocks && !rc; b++) {
        lb_bitmap_andnot(&left[b], &t->dirty[b]);
        rc = copy_block(t, b, &left[b], NULL, err);
    }
    free_bitmaps(t, &left);
    return rc;
}

int lb_take_all_pages(struct lb_take *t, struct lb_error *err)
{
    if (t->logging)
        return copy_rest(t, err);
    return all_there_is(t, err) || copy_all_learned(t, err) || copy_dirty(t, false, err) ? -1 : 0;
}

/* ----------------------------------------------------------------------------- hot */

int lb_take_put_hot(struct lb_take *t, struct lb_error *err)
{
    LB_AUTO_FREE uint64_t *v = lb_try_alloc(HOT_MAX * sizeof(*v), err);
    uint64_t n = 0, first, count;

    if (!v)
        return -1;
    for (uint64_t i = 0; i < t->n_learned; i++) {
        v[n++] = t->learned[i];
        for (unsigned r = 0; r < LB_TAKE_RECENT && t->recent[r]; r++) /* each page once */
            lb_bitmap_clear(&t->recent[r][lb_key_block(t->learned[i])], lb_key_page(t->learned[i]));
    }
    for (unsigned r = 0; r < LB_TAKE_RECENT && t->recent[r]; r++)
        for (unsigned b = 0; b < t->n_blocks; b++) {
            if (t->blocks[b].kind != LB_RAM_MAIN)
                continue;
            for (uint64_t at = 0; n < HOT_MAX && lb_bitmap_next_run(&t->recent[r][b], at, HOT_MAX - n, &first, &count);
                 at = first + count)
                for (uint64_t p = first; p < first + count; p++)
                    v[n++] = lb_page_key(b, p);
            for (unsigned k = r + 1; k < LB_TAKE_RECENT && t->recent[k]; k++)
                lb_bitmap_andnot(&t->recent[k][b], &t->recent[r][b]);
        }
    return n ? lb_ckpt_put_hot(t->writer, v, n, err) : 0;
}

void lb_take_free_pages(struct lb_take *t)
{
    if (t->late.mem)
        munmap(t->late.mem, t->late.cap * LB_PAGE_SIZE);
    if (t->late.pages)
        munmap(t->late.pages, t->late.cap * sizeof(*t->late.pages));
    free(t->late.parts);
    free(t->learned);
    free_bitmaps(t, &t->dirty);
    for (unsigned r = 0; r < LB_TAKE_RECENT; r++)
        free_bitmaps(t, &t->recent[r]);
}
