/*
 * checkpoint/writer_internal.h - the parts of the writer of a checkpoint file.
 *
 *   caller --buffer, put--> queue --> workers (writer_pack.c)                       --> out (writer_file.c)
 *                                     zero? unchanged? in the file already?              a ring of memory, one
 *                                     a difference? else into the chunk that is open     thread that writes it
 *                                     chunk full: compress, take a place, seal
 *                                           |
 *                                           v
 *                                     index (writer_index.c): what each page is; hashes of what is stored
 *
 * Three locks, none held while another is taken: the queue's (once per put), the index's (once per put and worker) and
 * the out's (once per chunk).  Nobody allocates per page, and a page is copied only when other pages of its
 * put were left out.
 *
 * A chunk gets its number in the file when it is sealed, but pages point to it from the moment it is opened: by its
 * serial.  Every chunk that is opened is sealed, or the whole file fails.
 */
#ifndef LB_CKPT_WRITER_INTERNAL_H
#define LB_CKPT_WRITER_INTERNAL_H

#include "checkpoint/store_internal.h"

#include <pthread.h>
#include <stdatomic.h>

/* ------------------------------------------------------------------------ the file */

/* A place for a part: its number, and where its head begins. */
struct lb_out_place {
    uint32_t number;
    uint64_t offset;
};

struct lb_out;
/* A temporary file beside `path`, locked as long as it is open; those that dead writers left are removed. */
int lb_out_open(const char *path, bool buffered, struct lb_out **out, struct lb_error *err);
/* The bytes at the beginning, before any part. */
void lb_out_header(struct lb_out *o, const struct lb_cf_header *h);
/* Seals a part (head: all but number and check) and gives it the next place; waits for room in the ring. `stored` may
 * be changed. Any thread; place may be NULL. */
int lb_out_part(struct lb_out *o, const struct lb_cf_seal *seal, struct lb_cf_part *head, void *stored,
                struct lb_out_place *place, struct lb_error *err);
/* Bytes given so far. Any thread. */
uint64_t lb_out_bytes(struct lb_out *o);
/* Wait until what the ring need not keep is in the file. */
int lb_out_settle(struct lb_out *o, struct lb_error *err);
/* Of parts [0, n), as long as nobody adds any. */
void lb_out_entries(struct lb_out *o, const struct lb_cf_part_entry **v, uint32_t *n);
/* The end of the file: `end` is its last bytes. Durable, then under its name; `replace`: there may be one. */
int lb_out_finish(struct lb_out *o, const struct lb_cf_end *end, bool replace, struct lb_error *err);
/* Any thread: every call from now on, and those that wait, fail. The first one counts. */
void lb_out_fail(struct lb_out *o, const struct lb_error *why);
/* Removes the temporary file when it has not got its name; NULL is fine. */
void lb_out_close(struct lb_out *o);

/* ----------------------------------------------------------------------- the index */

enum lb_loc_kind { LB_LOC_NONE = 0, LB_LOC_ZERO, LB_LOC_WHOLE, LB_LOC_XOR };
/* What a page is: kind, and of those stored the chunk's serial and the slot. */
typedef uint64_t lb_loc;
#define LB_LOC(kind, serial, slot) ((lb_loc)(kind) | (lb_loc)(slot) << 2 | (lb_loc)(serial) << 10)
#define LB_LOC_KIND(l) ((enum lb_loc_kind)((l) & 3))
#define LB_LOC_SLOT(l) ((unsigned)((l) >> 2 & 255))
#define LB_LOC_SERIAL(l) ((uint64_t)((l) >> 10))

struct lb_chunk_rec {
    uint32_t part;                               /* known once it is sealed */
    uint8_t hash[LB_CKPT_CHUNK_PAGES][16];       /* of the pages' contents */
};

/* All calls but new and free with the lock held. */
struct lb_widx {
    pthread_mutex_t lock;
    const struct lb_ckpt_block *blocks;
    unsigned n_blocks;
    lb_loc **loc;                                /* per block and page */
    uint32_t **seq;                              /* the put that says so */
    struct lb_chunk_rec **slabs;                 /* of chunks, by serial */
    uint64_t n_chunks, n_slabs;
    struct lb_seen *seen;                        /* contents that are in the file */
    uint64_t seen_mask;
};
int lb_widx_new(const struct lb_ckpt_block *blocks, unsigned n_blocks, struct lb_widx **out, struct lb_error *err);
void lb_widx_free(struct lb_widx *x);
/* A later put of the same page counts. */
void lb_widx_set(struct lb_widx *x, unsigned block, uint64_t page, uint32_t seq, lb_loc loc);
uint64_t lb_widx_open_chunk(struct lb_widx *x);  /* its serial */
struct lb_chunk_rec *lb_widx_chunk(struct lb_widx *x, uint64_t serial);
/* Where this content is; LB_LOC_NONE: nowhere known. */
lb_loc lb_widx_find(struct lb_widx *x, const uint8_t hash[16]);
/* From now on it is there; not noted where the table is full: a page may be stored twice then, no harm. */
void lb_widx_add(struct lb_widx *x, const uint8_t hash[16], lb_loc loc);

/* ---------------------------------------------------------------------- the writer */

/* A buffer as the caller knows it begins after a page of ours; the end of that page is where the page table goes, so
 * that table and pages are one piece. */
struct lb_wbuf {
    struct lb_wbuf *next;
    unsigned block, n;                           /* pages in it */
    uint32_t seq;
    uint64_t serial;                             /* of the chunk that it is */
    uint32_t page[LB_CKPT_CHUNK_PAGES];
    uint8_t kind[LB_CKPT_CHUNK_PAGES];           /* enum lb_cf_page_kind */
};
#define LB_WBUF_TABLE_MAX (LB_CKPT_CHUNK_PAGES * sizeof(struct lb_cf_page))
_Static_assert(sizeof(struct lb_wbuf) + LB_WBUF_TABLE_MAX <= LB_PAGE_SIZE, "a buffer's first page");

struct lb_packer;                                /* a worker */
struct lb_ckpt_writer {
    /* constant */
    struct lb_cf_header header;
    struct lb_cf_seal seal;
    uint8_t *data_key;                           /* guarded memory */
    struct lb_ckpt_block *blocks;
    unsigned n_blocks, n_workers;
    struct lb_chain *parent;
    bool compare;                                /* with the parent: leave out, store differences */
    bool replace;                                /* the file of that name */
    uint64_t seed;
    int level;
    struct lb_out *out;
    struct lb_packer *workers;

    struct lb_widx *index;                       /* has a lock of its own */
    struct lb_ckpt_stats stats;                  /* with the index's lock */

    uint64_t *hot, n_hot;                        /* caller's thread */

    /* queue */
    pthread_mutex_t lock;
    pthread_cond_t room, work, idle;
    uint8_t *memory;                             /* of all buffers */
    size_t memory_bytes;
    struct lb_wbuf *unused, *first, **last;
    unsigned n_busy, n_open;                     /* workers at work; with a chunk that is not full */
    uint32_t seq;
    bool flushing, stopping;
    bool failed;
    struct lb_error error;
};

/* The writer cannot go on, for this reason (the first counts). Any thread. */
void lb_writer_fail(struct lb_ckpt_writer *w, const struct lb_error *why);
int lb_packers_start(struct lb_ckpt_writer *w, struct lb_error *err);
void lb_packers_stop(struct lb_ckpt_writer *w);  /* they end when the queue is empty */
/* index, hashes, hot, state, meta, trailer; the file under its name. Workers have ended. */
int lb_writer_finish(struct lb_ckpt_writer *w, const struct lb_ckpt_meta *meta, const void *state, size_t state_bytes,
                     struct lb_error *err);

#endif
