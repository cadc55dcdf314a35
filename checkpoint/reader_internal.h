/*
 * checkpoint/reader_internal.h - the reader of checkpoint files, between its own .c files and their
 * tests.
 *
 *   reader.c        one file: header, key, trailer, parts, sections, meta
 *   reader_index.c  its INDEX: blocks and runs, checked
 *   chain.c         files that stand on each other, one index over all of them
 *   chain_read.c    chunks: read, checked, unpacked, kept; the pages around one page
 *   chain_all.c     every page, in the order of the files, by several threads
 *   verify.c        everything of one file
 */
#ifndef LB_CKPT_READER_INTERNAL_H
#define LB_CKPT_READER_INTERNAL_H

#include "checkpoint/store_internal.h"

#include <stdatomic.h>
#include <zstd.h>

/* The parts of one kind, one after the other; their unpacked bytes joined are what it holds. */
struct lb_cf_section {
    uint64_t at;       /* of the first part's head; 0: there is none */
    uint32_t first, n; /* number of the first part, how many */
    uint64_t bytes;    /* joined; as the heads say, which are not checked yet */
};

/* One open file. Constant once open; any thread reads. */
struct lb_cf_file {
    int fd;
    char *path;
    char name[192]; /* "web@7" when the meta is read, else the path's end */
    uint64_t bytes;
    struct lb_cf_header head; /* as in the file */
    uint32_t chunk_pages, n_blocks;
    bool increment;
    uint8_t *data_key; /* guarded memory; NULL: not encrypted */
    struct lb_cf_seal seal;
    uint64_t trailer_at;
    struct lb_cf_trailer trailer; /* host order */
    struct lb_cf_section sections[LB_CF_PARTS + 1]; /* by kind; not PAGES, not TRAILER */
    uint32_t n_chunks;
    struct lb_cf_part_entry *chunks; /* lb_cf_open_chunks; host order */
    uint64_t *chunk_at;              /* n_chunks + 1: the last one is where PARTS begins */
    struct lb_ckpt_info info;
};

/* Header, key, trailer, where the sections are, and the meta, all checked. On failure with
 * LB_E_AUTH f->info has what is not secret. f is zeroed before; lb_cf_close in any case. */
int lb_cf_open(struct lb_cf_file *f, const char *path, const struct lb_ckpt_key *key,
               struct lb_error *err);
/* Where the chunks are, and the checksum of the whole. */
int lb_cf_open_chunks(struct lb_cf_file *f, struct lb_error *err);
void lb_cf_close(struct lb_cf_file *f);
/* A section, joined; *buf is malloc'ed, with a NUL behind it. LB_E_PROTO when it has more than max
 * bytes. */
int lb_cf_section(const struct lb_cf_file *f, enum lb_cf_part_kind kind, uint64_t max, void **buf,
                  size_t *len, struct lb_error *err);
const char *lb_cf_kind_name(uint32_t kind);
static inline uint64_t lb_cf_align(uint64_t at)
{
    return (at + LB_CF_ALIGN - 1) / LB_CF_ALIGN * LB_CF_ALIGN;
}
/* All of them: LB_E_PROTO "FILE is too short" when the file ends before. */
int lb_cf_pread(int fd, const char *name, void *buf, size_t len, uint64_t at, struct lb_error *err);

/* ---- parts */
/* Everything a head alone can tell: `limit` is where the next thing begins at the latest. NULL or
 * what is wrong. */
const char *lb_cf_head_fault(const struct lb_cf_file *f, const struct lb_cf_part *head,
                             uint32_t number, uint64_t at, uint64_t limit);
/* Check, decrypt (in place) and unpack: le32toh(head->unpacked_bytes) to out. NULL or what is
 * wrong; then out is not to be used. */
const char *lb_cf_unpack(const struct lb_cf_file *f, const struct lb_cf_part *head, void *stored,
                         void *out, ZSTD_DCtx *z);

/* ---- index */
struct lb_cf_index {
    void *buf;
    struct lb_ckpt_block *blocks;
    unsigned n_blocks;
    const uint8_t *runs; /* lb_cf_run each, not aligned: lb_cf_run_at */
    uint64_t n_runs;
    uint64_t n_stored; /* pages in runs of kind WHOLE and XOR */
    uint64_t n_xor;    /* of these in runs of kind XOR */
};
/* In host order. count and what follows it from `packed`. */
struct lb_cf_run_host {
    unsigned block;
    enum lb_cf_run_kind kind;
    uint64_t first, count;
    uint32_t part, slot; /* not ZERO */
};
void lb_cf_run_at(const struct lb_cf_index *ix, uint64_t i, struct lb_cf_run_host *out);
/* Every run is within its block, its part and the order. lb_cf_open_chunks came before. */
int lb_cf_index_load(const struct lb_cf_file *f, struct lb_cf_index *ix, struct lb_error *err);
void lb_cf_index_free(struct lb_cf_index *ix);

/* ---- chunks */
struct lb_cf_chunk {
    unsigned refs; /* under the cache's lock */
    unsigned file;
    uint32_t part, n_pages;
    size_t cap;
    uint8_t *body; /* the page table, then the pages */
};
void lb_cf_chunk_entry(const struct lb_cf_chunk *c, uint32_t slot, unsigned *block, uint32_t *kind,
                       uint64_t *page);
static inline const uint8_t *lb_cf_chunk_page(const struct lb_cf_chunk *c, uint32_t slot)
{
    return c->body + (size_t)c->n_pages * sizeof(struct lb_cf_page) + (size_t)slot * LB_PAGE_SIZE;
}
/* The most that a chunk of f unpacks to. */
static inline size_t lb_cf_chunk_bytes(const struct lb_cf_file *f)
{
    return f->chunk_pages * (sizeof(struct lb_cf_page) + LB_PAGE_SIZE);
}
/* raw: head and stored bytes of chunk `part`, as many as PARTS says; used up. Fills c, whose body
 * has lb_cf_chunk_bytes. NULL or what is wrong. */
const char *lb_cf_chunk_unpack(const struct lb_cf_file *f, const struct lb_ckpt_block *blocks,
                               uint32_t part, void *raw, struct lb_cf_chunk *c, ZSTD_DCtx *z);
static inline size_t lb_cf_chunk_raw_bytes(const struct lb_cf_file *f, uint32_t part)
{
    return sizeof(struct lb_cf_part) + f->chunks[part].stored_bytes;
}

/* ---- chain */
/* Where a page is, in 64 bits: bit 63 stored, bit 62 as a difference, 48..59 file, 8..39 part, 0..7
 * slot. Not stored: zeros; then bit 61 says that the file names it (in an increment), else nobody
 * does. */
#define LB_ENTRY_STORED (UINT64_C(1) << 63)
#define LB_ENTRY_XOR (UINT64_C(1) << 62)
#define LB_ENTRY_NAMED (UINT64_C(1) << 61)
static inline unsigned lb_entry_file(uint64_t e)
{
    return (unsigned)(e >> 48) & 0xfff;
}
static inline uint32_t lb_entry_part(uint64_t e)
{
    return (uint32_t)(e >> 8);
}
static inline uint32_t lb_entry_slot(uint64_t e)
{
    return (uint32_t)(e & 0xff);
}
static inline uint64_t lb_entry(unsigned file, uint32_t part, uint32_t slot, bool is_xor)
{
    return LB_ENTRY_STORED | (is_xor ? LB_ENTRY_XOR : 0) | (uint64_t)file << 48 |
           (uint64_t)part << 8 | slot;
}
_Static_assert(LB_CF_MAX_DEPTH <= 0xfff && LB_CF_MAX_CHUNK_PAGES <= 0x100, "an entry holds them");

/* What a page stored as a difference differs from: the entry that the index had before this file.
 */
struct lb_xor_ref {
    uint64_t key, base;
};

/* Hashes of one file by part and slot. */
struct lb_chain_hashes {
    uint64_t *base; /* n_chunks: where a part's begin */
    uint8_t (*v)[16];
};

struct lb_scratch {
    ZSTD_DCtx *z;
    uint8_t *raw, *pages; /* a chunk as it is stored; pages put together for a callback */
    size_t raw_cap, pages_cap;
    struct lb_scratch *next;
};

enum { LB_CHUNK_CACHE = 64 };

struct lb_chain {
    /* constant */
    struct lb_cf_file *files; /* 0: the checkpoint */
    unsigned n_files;
    struct lb_ckpt_block *blocks;
    unsigned n_blocks;
    uint64_t **map;           /* of each block, an entry a page */
    struct lb_xor_ref **xors; /* of each file, ascending */
    uint64_t *n_xors;
    /* lb_chain_seed makes them, constant then */
    struct lb_chain_hashes *hashes;
    uint64_t seed;
    /* under lock */
    pthread_mutex_t lock;
    struct lb_cf_chunk *cache[LB_CHUNK_CACHE];
    uint64_t used[LB_CHUNK_CACHE], clock;
    struct lb_scratch *scratch; /* not in use now */
};

struct lb_page_ref {
    uint64_t key;
    uint32_t slot;
    bool is_xor;
};
struct lb_scratch *lb_scratch_get(struct lb_chain *c, struct lb_error *err);
void lb_scratch_put(struct lb_chain *c, struct lb_scratch *s);
/* At least `bytes` of *buf; what was in it is lost. */
int lb_scratch_grow(uint8_t **buf, size_t *cap, size_t bytes, struct lb_error *err);
void lb_chain_cache_free(struct lb_chain *c);
/* Pages of an unpacked chunk to fn, adjacent ones together; the run with `wanted` first. refs
 * ascend. */
int lb_chunk_give(struct lb_chain *c, struct lb_scratch *s, const struct lb_cf_chunk *chunk,
                  const struct lb_page_ref *refs, unsigned n, uint64_t wanted,
                  lb_chain_pages_fn *fn, void *arg, struct lb_error *err);
/* "web@7: part 12 (pages 512-543 of pc.ram) is damaged: WHY" */
int lb_chain_damaged(const struct lb_chain *c, unsigned file, uint32_t part, const char *why,
                     struct lb_error *err);

#endif
