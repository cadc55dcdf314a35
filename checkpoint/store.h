/*
 * checkpoint/store.h - one checkpoint, one file: writing and reading.
 *
 * FORMAT.md beside this is the specification; it is what an independent reader (tests/reader) is
 * written from.  A file is
 *
 *      header | chunk, chunk, ... | index | hashes | hot pages | device state | meta | trailer
 *
 * written once, front to back, to a temporary name, and made visible by fsync + rename + fsync of
 * the directory: a file that has its final name is whole.  Every part is checksummed (XXH3-128, or
 * the tag of XChaCha20-Poly1305 when the file is encrypted; each part is bound to its file and its
 * place), and the trailer has a checksum over the checksums of all parts in order.
 *
 * Pages live in chunks of up to LB_CKPT_CHUNK_PAGES pages, compressed together: the unit of reading,
 * of checking and of encryption.  A page that is all zeros, or whose content is in the file already,
 * is only an entry of the index.  An increment holds what differs from its parent; a page may be
 * stored as its difference (XOR) from the parent's where that is smaller, but only when the parent
 * holds that page itself whole: to read one page never takes more than two chunks.
 *
 * "The same content" is decided by XXH3-128 with a random secret seed that all files of a chain share
 * and no guest can know.  The hashes stay in the file for the next increment.
 */
#ifndef LB_CKPT_STORE_H
#define LB_CKPT_STORE_H

#include "checkpoint/key.h"
#include "core/core.h"
#include "core/hv.h"

#define LB_CKPT_SUFFIX ".lbc"
#define LB_CKPT_CHUNK_PAGES 32u      /* 128 KiB; the file says what it was written with */
#define LB_CKPT_ID_BYTES 16

struct lb_ckpt_id {
    uint8_t b[LB_CKPT_ID_BYTES];     /* random; all zero: none */
};

/* A page as one number, ascending as runs are. */
static inline uint64_t lb_page_key(unsigned block, uint64_t page)
{
    return (uint64_t)block << 40 | page;
}
static inline unsigned lb_key_block(uint64_t key)
{
    return (unsigned)(key >> 40);
}
static inline uint64_t lb_key_page(uint64_t key)
{
    return key & ((UINT64_C(1) << 40) - 1);
}

/* A block of guest memory, as in lb_ram_block. Index in the table = id of the block in the file. */
struct lb_ckpt_block {
    char name[LB_BLOCK_NAME_MAX];
    uint64_t n_pages;
    enum lb_ram_kind kind;
};

/* One disk of the guest at the moment of the checkpoint. */
struct lb_ckpt_disk {
    char id[256];                    /* lb_hv_disk.id */
    char argv_path[512];             /* the file name by which the command line knows it */
    char path[512];                  /* image that holds this moment (frozen, or unchanged since a suspend) */
    char format[32];
    uint64_t size_bytes;             /* as the guest sees it */
    uint64_t file_bytes, mtime_ns, inode, device; /* of `path` then: a suspended VM's disk must not have changed */
};

/* What there is to know without reading memory: JSON inside the file. */
struct lb_ckpt_meta {
    char vm[128];
    char label[128];                 /* "" none */
    uint32_t number;                 /* NAME@NUMBER; 0: NAME@suspend */
    bool suspend;                    /* the VM ended with it */
    bool no_disk;                    /* taken without its disks */
    bool paused;                     /* the operator had paused the guest: it comes back paused */
    uint64_t created_ms;             /* wall clock, when the guest was paused */
    double pause_ms;                 /* of the guest; 0 for a suspend */
    struct lb_vm_desc desc;
    struct lb_ckpt_disk *disks;
    unsigned n_disks;
};
void lb_ckpt_meta_free(struct lb_ckpt_meta *m); /* leaves it zeroed */

/* ---------------------------------------------------------------- writing */

struct lb_chain;

struct lb_ckpt_create {
    const char *path;                /* final name; written as PATH.tmp-PID beside it */
    const struct lb_ckpt_block *blocks;
    unsigned n_blocks;
    struct lb_chain *parent;         /* NULL: a full checkpoint. Must stay open until commit or abort */
    /* NULL, or the checkpoint that is written again in another form (its chain merged), open until commit or abort:
     * same id, same seed of the hashes, `path` may exist and is replaced. Increments of it may hold differences from
     * its pages, so every page given is stored whole: none is left out because the parent has it, none becomes a
     * difference itself. */
    struct lb_chain *again;
    const struct lb_ckpt_key *key;   /* NULL: not encrypted */
    int zstd_level;                  /* 0: 1; negative: zstd's fast levels */
    unsigned threads;                /* that compress; 0: one per processor */
    bool buffered;                   /* not O_DIRECT (a file system without it is noticed by itself) */
};

struct lb_ckpt_stats {
    uint64_t pages, zero_pages, same_pages /* as another of the file */, unchanged_pages /* as the parent's */,
        delta_pages, stored_pages;
    uint64_t raw_bytes, file_bytes;  /* so far */
};

struct lb_ckpt_writer;
/* LB_E_EXISTS when path exists, LB_E_NO_SPACE, LB_E_STATE when the parent's blocks differ or one of the two
 * is encrypted and the other is not. A stale temporary file of a dead writer of the same path is removed. */
int lb_ckpt_create(const struct lb_ckpt_create *c, struct lb_ckpt_writer **out, struct lb_error *err);
/* A buffer of LB_CKPT_CHUNK_PAGES pages, page aligned, to fill and to give to lb_ckpt_put. Waits while all are
 * in use: memory is bounded by threads, not by the guest. NULL: the writer failed (*err says how). Any thread. */
void *lb_ckpt_buffer(struct lb_ckpt_writer *w, struct lb_error *err);
/* n <= LB_CKPT_CHUNK_PAGES pages of one block, ascending, their content in buf one after the other; the buffer
 * is the writer's again, whatever is returned. A page given twice: the later call counts. One thread at a time. */
int lb_ckpt_put(struct lb_ckpt_writer *w, unsigned block, const uint32_t *pages, unsigned n, void *buf,
                struct lb_error *err);
/* Pages that are all zeros: [first, first + n). */
int lb_ckpt_put_zero(struct lb_ckpt_writer *w, unsigned block, uint64_t first, uint64_t n, struct lb_error *err);
/* Pages the guest is likely to need first, the likeliest first; stays the caller's. May be called once. */
int lb_ckpt_put_hot(struct lb_ckpt_writer *w, const uint64_t *keys /* lb_page_key */, uint64_t n,
                    struct lb_error *err);
/* Everything given so far is compressed and, but for the last megabytes, in the file (not yet durable); the stats are
 * final but for what follows. */
int lb_ckpt_flush(struct lb_ckpt_writer *w, struct lb_error *err);
void lb_ckpt_writer_stats(struct lb_ckpt_writer *w, struct lb_ckpt_stats *out); /* any thread */
/* The rest, durable, under its final name; frees w in any case. A page of a full checkpoint that was never given
 * is zero; of an increment: as in the parent. *id may be NULL. On failure nothing is left but what was there. */
int lb_ckpt_commit(struct lb_ckpt_writer *w, const struct lb_ckpt_meta *meta, const void *state,
                   size_t state_bytes, struct lb_ckpt_id *id, struct lb_error *err);
void lb_ckpt_abort(struct lb_ckpt_writer *w); /* removes the temporary file; NULL is fine */

/* ---------------------------------------------------------------- reading */

/* One file, as far as `ls` needs it: header and meta, both checked. LB_E_AUTH: encrypted and no or a wrong key
 * (what is not secret is filled all the same: id, parent, encrypted). */
struct lb_ckpt_info {
    struct lb_ckpt_id id, parent;
    bool encrypted;
    enum lb_key_kind key_kind;
    uint64_t file_bytes;
    struct lb_ckpt_stats stats;      /* as written */
    struct lb_ckpt_meta meta;
};
int lb_ckpt_info(const char *path, const struct lb_ckpt_key *key, struct lb_ckpt_info *out, struct lb_error *err);
void lb_ckpt_info_free(struct lb_ckpt_info *i);

/* A checkpoint with all its parents, open for reading. paths[0] is the checkpoint, each next one the parent of
 * the one before; the last one is a full checkpoint. Stays readable when the files are unlinked or replaced. */
int lb_chain_open(const char *const *paths, unsigned n, const struct lb_ckpt_key *key, struct lb_chain **out,
                  struct lb_error *err);
void lb_chain_close(struct lb_chain *c); /* NULL is fine */
const struct lb_ckpt_info *lb_chain_info(const struct lb_chain *c); /* of the checkpoint */
unsigned lb_chain_depth(const struct lb_chain *c);
const struct lb_ckpt_block *lb_chain_blocks(const struct lb_chain *c, unsigned *n);
/* Device state; *buf malloc'ed. */
int lb_chain_state(struct lb_chain *c, void **buf, size_t *len, struct lb_error *err);
/* As lb_ckpt_put_hot had it; *v malloc'ed, NULL and 0 when there is none. */
int lb_chain_hot(struct lb_chain *c, uint64_t **v, uint64_t *n, struct lb_error *err);
/* Reads and unpacks in advance what these pages (as in lb_chain_hot; a hint) are in: as much as is kept for a while, or
 * until *stop. Any thread. */
void lb_chain_warm(struct lb_chain *c, const uint64_t *v, uint64_t n, _Atomic bool *stop);
/* Set the bits of the pages that are not zero. */
int lb_chain_populated(struct lb_chain *c, unsigned block, struct lb_bitmap *pages, struct lb_error *err);

/* Set the bits of the pages that one of the newest `files` files of the chain names, zeros included: whatever differs
 * from the chain without them is among these. */
int lb_chain_named(struct lb_chain *c, unsigned block, unsigned files, struct lb_bitmap *pages, struct lb_error *err);

/* Pages out of chunks. on_pages: count pages of a block from `first`, adjacent, valid during the call. -1 ends it.
 * May be called from several threads at once by lb_chain_read_all. */
typedef int lb_chain_pages_fn(unsigned block, uint64_t first, uint64_t count, const void *data, void *arg,
                              struct lb_error *err);
/* The page (which must be populated), in the first call, and others that are in the same chunk and current in this
 * checkpoint: all that take no other chunk than the page does or is at hand, and under its own name or next to the
 * page. Every chunk is checked before a byte of it is used; LB_E_PROTO "VM@7: part N (pages F-L of BLOCK) is damaged: WHY".
 * Any thread, several at once. */
int lb_chain_read(struct lb_chain *c, unsigned block, uint64_t page, lb_chain_pages_fn *fn, void *arg,
                  struct lb_error *err);
/* Every populated page once, chunks in the order of the files, decompressed by `threads` (0: one per processor).
 * skip: NULL, or may say that nobody needs a page any more. cancel_fd as in lb_read_all_until. */
struct lb_chain_read_all {
    unsigned threads;
    bool (*skip)(unsigned block, uint64_t page, void *arg);
    lb_chain_pages_fn *fn;
    void *arg;
    int cancel_fd;
    bool dont_cache;                 /* leave the host's page cache as it is: nobody else reads this soon */
};
int lb_chain_read_all(struct lb_chain *c, const struct lb_chain_read_all *r, struct lb_error *err);

/* Everything there is to check, of one file: every part, the whole, that the index names only what is there; with
 * `deep` the hash of every page is compared, too (not of differences: lb_chain_verify). Damage found is told by `found` (one line each: what, VM,
 * block, page range) as long as one can go on; the error is the first. */
int lb_ckpt_verify(const char *path, const struct lb_ckpt_key *key, bool deep,
                   void (*found)(const char *what, void *arg), void *arg, struct lb_error *err);
/* The same, with a word after every chunk on how much of the file has been looked at; -1 ends it: LB_E_CANCELLED. */
int lb_ckpt_verify_watched(const char *path, const struct lb_ckpt_key *key, bool deep,
                           void (*found)(const char *what, void *arg),
                           int (*tick)(uint64_t done_bytes, void *arg), void *arg, struct lb_error *err);
/* What one file cannot tell: that each page stored as a difference becomes, with the parents, what its hash says. `found`
 * is called by one thread at a time. */
int lb_chain_verify(struct lb_chain *c, void (*found)(const char *what, void *arg), void *arg, int cancel_fd,
                    struct lb_error *err);

#endif
