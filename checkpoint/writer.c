/* checkpoint/writer.c - a checkpoint file from the outside: begin, pages, flush, commit or abort.
 *
 * Happy path: create makes the temporary file and the workers; buffers go round between the caller and them
 * (writer_pack.c) and chunks to the file (writer_file.c); commit waits for all of it and writes what is after the
 * pages (writer_end.c).  Whatever fails - a full disk, memory - is kept as the writer's error and comes out of
 * the next call; from then on pages are taken and thrown away, so that nobody waits for ever. */
#include "checkpoint/writer_internal.h"

#include <assert.h>
#include <errno.h>
#include <sched.h>
#include <sodium.h>
#include <string.h>
#include <sys/mman.h>

enum {
    MAX_WORKERS = 64,
    BUFFER_BYTES = (LB_CKPT_CHUNK_PAGES + 1) * LB_PAGE_SIZE,
    BUFFERS_EACH = 3, /* of a worker: its open chunk, at work, waiting */
    BUFFERS_MORE = 8, /* being filled */
};

void lb_writer_fail(struct lb_ckpt_writer *w, const struct lb_error *why)
{
    pthread_mutex_lock(&w->lock);
    if (!w->failed)
        w->error = *why;
    w->failed = true;
    pthread_cond_broadcast(&w->room);
    pthread_cond_broadcast(&w->work);
    pthread_mutex_unlock(&w->lock);
    lb_out_fail(w->out, why);
}

static int failure(const struct lb_ckpt_writer *w, struct lb_error *err)
{
    if (err)
        *err = w->error;
    return -1;
}

/* --------------------------------------------------------------------------- begin */

static int check_blocks(const struct lb_ckpt_create *c, struct lb_error *err)
{
    if (c->n_blocks == 0 || c->n_blocks > LB_CF_MAX_BLOCKS)
        return lb_fail(err, LB_E_UNSUPPORTED, "%u blocks of memory: a checkpoint has 1 to %u", c->n_blocks,
                       LB_CF_MAX_BLOCKS);
    for (unsigned i = 0; i < c->n_blocks; i++)
        if (c->blocks[i].n_pages > UINT32_MAX)
            return lb_fail(err, LB_E_UNSUPPORTED, "memory block %s is larger than 16 TiB", c->blocks[i].name);
    return 0;
}

static int check_parent(const struct lb_ckpt_create *c, struct lb_error *err)
{
    unsigned n = 0;
    const struct lb_ckpt_block *b = lb_chain_blocks(c->parent, &n);
    bool same = n == c->n_blocks;

    for (unsigned i = 0; same && i < n; i++)
        same = b[i].n_pages == c->blocks[i].n_pages && b[i].kind == c->blocks[i].kind &&
               !strcmp(b[i].name, c->blocks[i].name);
    if (!same) {
        lb_fail(err, LB_E_STATE, "the memory of the VM is laid out differently than in the parent checkpoint");
        return lb_remedy(err, "take a full checkpoint");
    }
    if (lb_chain_info(c->parent)->encrypted != (c->key != NULL)) {
        lb_fail(err, LB_E_STATE, "the parent checkpoint is %sencrypted and this one is %s",
                c->key ? "not " : "", c->key ? "to be" : "not");
        return lb_remedy(err, "take a full checkpoint, or %s", c->key ? "leave out the key" : "give the key");
    }
    if (lb_chain_depth(c->parent) >= LB_CF_MAX_DEPTH) {
        lb_fail(err, LB_E_STATE, "the parent is the last of a chain of %u checkpoints", LB_CF_MAX_DEPTH);
        return lb_remedy(err, "take a full checkpoint, or prune");
    }
    return 0;
}

static int choose_identity(struct lb_ckpt_writer *w, const struct lb_ckpt_create *c, struct lb_error *err)
{
    struct lb_chain *relative = c->again ? c->again : c->parent;

    if (relative && lb_chain_seed(relative, &w->seed, err) < 0)
        return -1;
    if (!relative)
        randombytes_buf(&w->seed, sizeof(w->seed));
    if (c->again)
        memcpy(w->seal.id, lb_chain_info(c->again)->id.b, sizeof(w->seal.id));
    else
        randombytes_buf(w->seal.id, sizeof(w->seal.id));
    return 0;
}

static int make_key(struct lb_ckpt_writer *w, const struct lb_ckpt_key *key, struct lb_error *err)
{
    struct lb_cf_header *h = &w->header;
    struct lb_key_slot slot;

    w->data_key = sodium_malloc(32);
    if (!w->data_key)
        return lb_fail_errno(err, LB_E_NO_SPACE, errno, "no memory for a key");
    if (lb_ckpt_key_new(key, h, LB_CF_BIND_BYTES, &slot, w->data_key, err) < 0)
        return -1;
    memcpy(h->salt, slot.salt, sizeof(h->salt));
    h->ops_limit = htole64(slot.ops_limit);
    h->mem_limit = htole64(slot.mem_limit);
    memcpy(h->nonce, slot.nonce, sizeof(h->nonce));
    memcpy(h->wrapped, slot.wrapped, sizeof(h->wrapped));
    w->seal.encrypted = true;
    w->seal.data_key = w->data_key;
    return 0;
}

static int make_header(struct lb_ckpt_writer *w, const struct lb_ckpt_create *c, struct lb_error *err)
{
    struct lb_cf_header *h = &w->header;

    memcpy(h->magic, LB_CF_MAGIC, sizeof(h->magic));
    h->version = htole32(LB_CF_VERSION);
    h->flags = htole32((c->key ? LB_CF_ENCRYPTED : 0) | (c->parent ? LB_CF_INCREMENT : 0));
    memcpy(h->id, w->seal.id, sizeof(h->id));
    if (c->parent)
        memcpy(h->parent, lb_chain_info(c->parent)->id.b, sizeof(h->parent));
    h->page_bytes = htole64(LB_PAGE_SIZE);
    h->chunk_pages = htole32(LB_CKPT_CHUNK_PAGES);
    h->n_blocks = htole32(c->n_blocks);
    h->key_kind = htole32(lb_ckpt_key_kind(c->key));
    if (c->key && make_key(w, c->key, err) < 0)
        return -1;
    lb_cf_hash(h->check, h, offsetof(struct lb_cf_header, check), 0);
    return 0;
}

static unsigned processors(void)
{
    cpu_set_t set;
    return sched_getaffinity(0, sizeof(set), &set) == 0 ? (unsigned)CPU_COUNT(&set) : 1;
}

static int make_buffers(struct lb_ckpt_writer *w, struct lb_error *err)
{
    unsigned n = w->n_workers * BUFFERS_EACH + BUFFERS_MORE;

    w->memory_bytes = (size_t)n * BUFFER_BYTES;
    w->memory = mmap(NULL, w->memory_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (w->memory == MAP_FAILED) {
        w->memory = NULL;
        return lb_fail_errno(err, LB_E_NO_SPACE, errno, "no memory for the pages of a checkpoint");
    }
    for (unsigned i = 0; i < n; i++) {
        struct lb_wbuf *b = (struct lb_wbuf *)(void *)(w->memory + (size_t)i * BUFFER_BYTES);
        b->next = w->unused;
        w->unused = b;
    }
    return 0;
}

static struct lb_ckpt_writer *writer_new(const struct lb_ckpt_create *c)
{
    struct lb_ckpt_writer *w = lb_alloc(sizeof(*w));

    pthread_mutex_init(&w->lock, NULL);
    pthread_cond_init(&w->room, NULL);
    pthread_cond_init(&w->work, NULL);
    pthread_cond_init(&w->idle, NULL);
    w->last = &w->first;
    w->n_blocks = c->n_blocks;
    w->blocks = lb_alloc(c->n_blocks * sizeof(*w->blocks));
    memcpy(w->blocks, c->blocks, c->n_blocks * sizeof(*w->blocks));
    w->parent = c->parent;
    w->compare = c->parent && !c->again;
    w->replace = c->again;
    w->level = c->zstd_level ? c->zstd_level : 1;
    w->n_workers = LB_MIN(c->threads ? c->threads : processors(), (unsigned)MAX_WORKERS);
    return w;
}

static int open_file(struct lb_ckpt_writer *w, const struct lb_ckpt_create *c, struct lb_error *err)
{
    if (!c->again && access(c->path, F_OK) == 0)
        return lb_fail(err, LB_E_EXISTS, "%s exists already", c->path);
    if (lb_out_open(c->path, c->buffered, &w->out, err) < 0)
        return -1;
    lb_out_header(w->out, &w->header);
    return 0;
}

int lb_ckpt_create(const struct lb_ckpt_create *c, struct lb_ckpt_writer **out, struct lb_error *err)
{
    if (sodium_init() < 0) /* 1 when done before */
        return lb_fail(err, LB_E_INTERNAL, "libsodium cannot be initialised");
    if (check_blocks(c, err) < 0 || (c->parent && check_parent(c, err) < 0))
        return -1;
    struct lb_ckpt_writer *w = writer_new(c);
    if (choose_identity(w, c, err) < 0 || make_header(w, c, err) < 0 ||
        lb_widx_new(w->blocks, w->n_blocks, &w->index, err) < 0)
        goto fail;
    if (make_buffers(w, err) < 0 || open_file(w, c, err) < 0 || lb_packers_start(w, err) < 0)
        goto fail;
    *out = w;
    return 0;
fail:
    lb_ckpt_abort(w);
    return -1;
}

/* --------------------------------------------------------------------------- pages */

void *lb_ckpt_buffer(struct lb_ckpt_writer *w, struct lb_error *err)
{
    pthread_mutex_lock(&w->lock);
    while (!w->unused && !w->failed)
        pthread_cond_wait(&w->room, &w->lock);
    struct lb_wbuf *b = w->failed ? NULL : w->unused;
    if (b)
        w->unused = b->next;
    else
        failure(w, err);
    pthread_mutex_unlock(&w->lock);
    return b ? (uint8_t *)b + LB_PAGE_SIZE : NULL;
}

int lb_ckpt_put(struct lb_ckpt_writer *w, unsigned block, const uint32_t *pages, unsigned n, void *buf,
                struct lb_error *err)
{
    struct lb_wbuf *b = (struct lb_wbuf *)(void *)((uint8_t *)buf - LB_PAGE_SIZE);

    assert(block < w->n_blocks && n > 0 && n <= LB_CKPT_CHUNK_PAGES && pages[n - 1] < w->blocks[block].n_pages);
    b->block = block;
    b->n = n;
    b->next = NULL;
    memcpy(b->page, pages, n * sizeof(*pages));

    pthread_mutex_lock(&w->lock);
    b->seq = ++w->seq;
    *w->last = b;
    w->last = &b->next;
    pthread_cond_signal(&w->work);
    int rc = w->failed ? failure(w, err) : 0;
    pthread_mutex_unlock(&w->lock);
    return rc;
}

int lb_ckpt_put_zero(struct lb_ckpt_writer *w, unsigned block, uint64_t first, uint64_t n, struct lb_error *err)
{
    struct lb_widx *x = w->index;
    uint8_t hash[16];
    bool whole;

    assert(block < w->n_blocks && n <= w->blocks[block].n_pages && first <= w->blocks[block].n_pages - n);
    pthread_mutex_lock(&w->lock);
    uint32_t seq = ++w->seq;
    int rc = w->failed ? failure(w, err) : 0;
    pthread_mutex_unlock(&w->lock);

    pthread_mutex_lock(&x->lock);
    for (uint64_t p = first; p < first + n; p++) {
        bool as_parent = w->compare && !lb_chain_hash(w->parent, block, p, hash, &whole);
        lb_widx_set(x, block, p, seq, as_parent ? LB_LOC_NONE : LB_LOC(LB_LOC_ZERO, 0, 0));
        if (as_parent)
            w->stats.unchanged_pages++;
        else
            w->stats.zero_pages++;
    }
    w->stats.pages += n;
    w->stats.raw_bytes += n * LB_PAGE_SIZE;
    pthread_mutex_unlock(&x->lock);
    return rc;
}

int lb_ckpt_put_hot(struct lb_ckpt_writer *w, const uint64_t *keys, uint64_t n, struct lb_error *err)
{
    assert(!w->hot);
    w->hot = lb_try_alloc((n ? n : 1) * sizeof(*w->hot), err);
    if (!w->hot)
        return -1;
    for (uint64_t i = 0; i < n; i++)
        w->hot[i] = htole64(keys[i]);
    w->n_hot = n;
    return 0;
}

int lb_ckpt_flush(struct lb_ckpt_writer *w, struct lb_error *err)
{
    pthread_mutex_lock(&w->lock);
    w->flushing = true;
    pthread_cond_broadcast(&w->work);
    while (w->first || w->n_busy > 0 || w->n_open > 0)
        pthread_cond_wait(&w->idle, &w->lock);
    w->flushing = false;
    int rc = w->failed ? failure(w, err) : 0;
    pthread_mutex_unlock(&w->lock);
    return rc < 0 ? -1 : lb_out_settle(w->out, err);
}

void lb_ckpt_writer_stats(struct lb_ckpt_writer *w, struct lb_ckpt_stats *out)
{
    pthread_mutex_lock(&w->index->lock);
    *out = w->stats;
    pthread_mutex_unlock(&w->index->lock);
    out->file_bytes = lb_out_bytes(w->out);
}

/* ----------------------------------------------------------------------------- end */

int lb_ckpt_commit(struct lb_ckpt_writer *w, const struct lb_ckpt_meta *meta, const void *state, size_t state_bytes,
                   struct lb_ckpt_id *id, struct lb_error *err)
{
    struct lb_ckpt_id made;
    int rc = lb_ckpt_flush(w, err);

    memcpy(made.b, w->seal.id, sizeof(made.b));
    lb_packers_stop(w);
    if (rc == 0)
        rc = lb_writer_finish(w, meta, state, state_bytes, err);
    lb_ckpt_abort(w);
    if (rc == 0 && id)
        *id = made;
    return rc;
}

void lb_ckpt_abort(struct lb_ckpt_writer *w)
{
    if (!w)
        return;
    if (w->workers) { /* what they still have is thrown away */
        struct lb_error why = LB_ERROR_INIT;
        lb_fail(&why, LB_E_CANCELLED, "the checkpoint was given up");
        lb_writer_fail(w, &why);
        lb_packers_stop(w);
    }
    lb_out_close(w->out);
    lb_widx_free(w->index);
    if (w->memory)
        munmap(w->memory, w->memory_bytes);
    sodium_free(w->data_key);
    pthread_cond_destroy(&w->idle);
    pthread_cond_destroy(&w->work);
    pthread_cond_destroy(&w->room);
    pthread_mutex_destroy(&w->lock);
    free(w->hot);
    free(w->blocks);
    free(w);
}
