/* checkpoint/flatten.c - a checkpoint written again without (some of) its parents.
 *
 * The pages that the merged files name are read through the chain, which undoes differences, and given to a writer
 * that makes "the same checkpoint in another form": same id, same seed of the hashes.  What stands on this
 * checkpoint therefore stays valid, byte for byte. */
#include "checkpoint/catalog_internal.h"
#include "checkpoint/store_internal.h"

#include <string.h>

enum { TELL_EVERY_MS = 100 };

struct merge {
    struct lb_chain *chain;
    const struct lb_ckpt_block *blocks;
    unsigned n_blocks;
    struct lb_bitmap *wanted;        /* by block: to be read and written */
    uint64_t total_pages;
    struct lb_ckpt_writer *writer;
    lb_progress_fn *progress;
    void *arg;

    pthread_mutex_t lock;            /* the writer takes one put at a time */
    uint64_t done_pages, told_ns;    /* lock */
};

static void tell(struct merge *m, unsigned n_pages)
{
    uint64_t now = lb_now_ns();

    m->done_pages += n_pages;
    if (!m->progress || (now - m->told_ns < (uint64_t)TELL_EVERY_MS * 1000000 && m->done_pages < m->total_pages))
        return;
    m->told_ns = now;
    m->progress(m->done_pages * LB_PAGE_SIZE, m->total_pages * LB_PAGE_SIZE, m->arg);
}

static int put(struct merge *m, unsigned block, const uint32_t *pages, unsigned n, void *buf, struct lb_error *err)
{
    pthread_mutex_lock(&m->lock);
    int rc = lb_ckpt_put(m->writer, block, pages, n, buf, err);
    if (rc == 0)
        tell(m, n);
    pthread_mutex_unlock(&m->lock);
    return rc;
}

/* Of the pages that come out of a chunk, those that are wanted go on. Several threads. */
static int on_pages(unsigned block, uint64_t first, uint64_t count, const void *data, void *arg, struct lb_error *err)
{
    struct merge *m = arg;
    const char *bytes = data;
    uint64_t i = 0;

    while (i < count) {
        uint32_t pages[LB_CKPT_CHUNK_PAGES];
        unsigned n = 0;
        char *buf = NULL;
        for (; i < count && n < LB_CKPT_CHUNK_PAGES; i++) {
            if (!lb_bitmap_test(&m->wanted[block], first + i))
                continue;
            if (!buf && !(buf = lb_ckpt_buffer(m->writer, err)))
                return -1;
            memcpy(buf + (size_t)n * LB_PAGE_SIZE, bytes + i * LB_PAGE_SIZE, LB_PAGE_SIZE);
            pages[n++] = (uint32_t)(first + i);
        }
        if (buf && put(m, block, pages, n, buf, err))
            return -1;
    }
    return 0;
}

static bool not_wanted(unsigned block, uint64_t page, void *arg)
{
    const struct merge *m = arg;

    return !lb_bitmap_test(&m->wanted[block], page);
}

/* Pages that became zero since the parent: named and not populated. */
static int put_zeros(struct merge *m, unsigned block, const struct lb_bitmap *named, const struct lb_bitmap *populated,
                     struct lb_error *err)
{
    struct lb_bitmap zero;
    uint64_t at = 0, first, n;
    int rc = 0;

    if (lb_bitmap_init(&zero, named->n_bits, err))
        return -1;
    lb_bitmap_or(&zero, named);
    lb_bitmap_andnot(&zero, populated);
    for (; rc == 0 && lb_bitmap_next_run(&zero, at, UINT64_MAX, &first, &n); at = first + n)
        rc = lb_ckpt_put_zero(m->writer, block, first, n, err);
    lb_bitmap_free(&zero);
    return rc;
}

/* wanted: populated, becomes what of it the merged files name. */
static int only_named(struct merge *m, unsigned block, unsigned files, struct lb_bitmap *wanted, struct lb_error *err)
{
    struct lb_bitmap named = {0}, rest = {0};
    int rc = -1;

    if (lb_bitmap_init(&named, wanted->n_bits, err) == 0 && lb_bitmap_init(&rest, wanted->n_bits, err) == 0 &&
        lb_chain_named(m->chain, block, files, &named, err) == 0 && put_zeros(m, block, &named, wanted, err) == 0) {
        lb_bitmap_or(&rest, wanted);
        lb_bitmap_andnot(&rest, &named);
        lb_bitmap_andnot(wanted, &rest);
        rc = 0;
    }
    lb_bitmap_free(&rest);
    lb_bitmap_free(&named);
    return rc;
}

/* What of a block goes to the file: of a full one all that is not zero, else what the merged files name. */
static int choose(struct merge *m, unsigned block, unsigned files, bool full, struct lb_error *err)
{
    struct lb_bitmap *wanted = &m->wanted[block];

    if (lb_bitmap_init(wanted, m->blocks[block].n_pages, err) || lb_chain_populated(m->chain, block, wanted, err))
        return -1;
    return full ? 0 : only_named(m, block, files, wanted, err);
}

static int copy_pages(struct merge *m, unsigned files, bool full, int cancel_fd, struct lb_error *err)
{
    struct lb_chain_read_all all = {.skip = not_wanted, .fn = on_pages, .arg = m, .cancel_fd = cancel_fd,
                                    .dont_cache = true};

    for (unsigned b = 0; b < m->n_blocks; b++) {
        if (choose(m, b, files, full, err))
            return -1;
        m->total_pages += lb_bitmap_count(&m->wanted[b]);
    }
    return lb_chain_read_all(m->chain, &all, err);
}

static int copy_hot(struct merge *m, struct lb_error *err)
{
    LB_AUTO_FREE uint64_t *hot = NULL;
    uint64_t n;

    if (lb_chain_hot(m->chain, &hot, &n, err))
        return -1;
    return n ? lb_ckpt_put_hot(m->writer, hot, n, err) : 0;
}

/* Everything, up to the file's name; uses up m->writer. */
static int write_again(struct merge *m, unsigned files, bool full, const struct lb_ckpt_meta *meta, int cancel_fd,
                       struct lb_error *err)
{
    LB_AUTO_FREE void *state = NULL;
    size_t len;

    if (copy_pages(m, files, full, cancel_fd, err) || copy_hot(m, err) ||
        lb_chain_state(m->chain, &state, &len, err))
        return -1;
    if (lb_readable(cancel_fd, 0))
        return lb_fail(err, LB_E_CANCELLED, "cancelled");
    return lb_ckpt_commit(LB_STEAL_PTR(m->writer), meta, state, len, NULL, err);
}

int lb_chain_merge(struct lb_chain *c, unsigned files, struct lb_chain *parent, const struct lb_ckpt_meta *meta,
                   const char *path, const struct lb_ckpt_key *key, lb_progress_fn *progress, void *arg,
                   int cancel_fd, struct lb_error *err)
{
    struct merge m = {.chain = c, .progress = progress, .arg = arg, .lock = PTHREAD_MUTEX_INITIALIZER};

    m.blocks = lb_chain_blocks(c, &m.n_blocks);
    m.wanted = lb_alloc((m.n_blocks + 1) * sizeof(*m.wanted));
    const struct lb_ckpt_create create = {
        .path = path, .blocks = m.blocks, .n_blocks = m.n_blocks, .parent = parent, .again = c,
        .key = lb_chain_info(c)->encrypted ? key : NULL,
    };
    int rc = lb_ckpt_create(&create, &m.writer, err);
    if (rc == 0)
        rc = write_again(&m, files, !parent, meta, cancel_fd, err);
    lb_ckpt_abort(m.writer);
    for (unsigned b = 0; b < m.n_blocks; b++)
        lb_bitmap_free(&m.wanted[b]);
    free(m.wanted);
    return rc;
}
