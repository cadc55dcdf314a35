/*
 * checkpoint/store_internal.h - what the writer and the reader of a checkpoint file share.
 *
 * The layout in C of what FORMAT.md specifies, and how a part is sealed and opened.  Integers in these
 * structs are little-endian: htole64 and le64toh around each use.
 */
#ifndef LB_CKPT_STORE_INTERNAL_H
#define LB_CKPT_STORE_INTERNAL_H

#include "checkpoint/store.h"

#include <endian.h>

#define LB_CF_MAGIC "LBCKPT1\n"
#define LB_CF_END_MAGIC "LBCKEND\n"
#define LB_CF_PART_MAGIC 0x5450424cu      /* "LBPT" */
#define LB_CF_VERSION 1u
#define LB_CF_HEADER_BYTES 4096u
#define LB_CF_BIND_BYTES 72u              /* of the header, bound to the wrapped key */
#define LB_CF_FILE_ALIGN 4096u            /* of the end of the file */
#define LB_CF_ALIGN 16u                   /* of parts */

#define LB_CF_MAX_PART_BYTES (64u << 20)
#define LB_CF_MAX_CHUNK_PAGES 256u
#define LB_CF_MAX_BLOCKS 4096u
#define LB_CF_MAX_BLOCK_PAGES (UINT64_C(1) << 36)
#define LB_CF_MAX_META_BYTES (256u << 20) /* META joined, STATE joined */
#define LB_CF_MAX_ARGON_BYTES (UINT64_C(1) << 30)
#define LB_CF_MAX_ARGON_OPS 16u
#define LB_CF_MAX_DEPTH 1024u

enum lb_cf_header_flag { LB_CF_ENCRYPTED = 1, LB_CF_INCREMENT = 2 };
enum lb_cf_part_kind {
    LB_CF_PAGES = 1, LB_CF_INDEX, LB_CF_HASHES, LB_CF_HOT, LB_CF_STATE, LB_CF_META, LB_CF_TRAILER, LB_CF_PARTS,
};
enum lb_cf_part_flag { LB_CF_ZSTD = 1 };
enum lb_cf_page_kind { LB_CF_WHOLE = 0, LB_CF_XOR = 1 };
enum lb_cf_run_kind { LB_CF_RUN_ZERO = 0, LB_CF_RUN_WHOLE = 1, LB_CF_RUN_XOR = 2 };

struct lb_cf_header {
    uint8_t magic[8];
    uint32_t version, flags;
    uint8_t id[16], parent[16];
    uint64_t page_bytes;
    uint32_t chunk_pages, n_blocks;
    uint32_t key_kind, zero;
    uint8_t salt[16];
    uint64_t ops_limit, mem_limit;
    uint8_t nonce[24], wrapped[48];
    uint8_t zeros[3904];
    uint8_t check[16];
};
_Static_assert(sizeof(struct lb_cf_header) == LB_CF_HEADER_BYTES, "FORMAT.md: header");
_Static_assert(offsetof(struct lb_cf_header, salt) == LB_CF_BIND_BYTES, "FORMAT.md: header");

struct lb_cf_part {
    uint32_t magic, kind, number, flags;
    uint32_t stored_bytes, unpacked_bytes;
    uint32_t n_pages, table_bytes;
    uint8_t check[16];
};
_Static_assert(sizeof(struct lb_cf_part) == 48, "FORMAT.md: part");

struct lb_cf_page {
    uint32_t block, kind;
    uint64_t page;
};
_Static_assert(sizeof(struct lb_cf_page) == 16, "FORMAT.md: page table");

struct lb_cf_block {
    uint32_t name_bytes, kind;
    uint64_t n_pages;
};
_Static_assert(sizeof(struct lb_cf_block) == 16, "FORMAT.md: blocks of the index");

struct lb_cf_run {
    uint32_t block, kind;
    uint64_t first, packed;
};
_Static_assert(sizeof(struct lb_cf_run) == 24, "FORMAT.md: runs");
/* packed of a stored run */
#define LB_CF_PACK(count, part, slot) ((uint64_t)(count) << 48 | (uint64_t)(part) << 16 | (uint64_t)(slot))
#define LB_CF_RUN_COUNT(packed) ((uint32_t)((packed) >> 48))
#define LB_CF_RUN_PART(packed) ((uint32_t)((packed) >> 16))
#define LB_CF_RUN_SLOT(packed) ((uint32_t)((packed) & 0xffff))

/* Of every PAGES part, in order. No padding inside: 20 bytes each */
struct lb_cf_part_entry {
    uint32_t stored_bytes;
    uint8_t check[16];
};
_Static_assert(sizeof(struct lb_cf_part_entry) == 20, "FORMAT.md: parts");

struct lb_cf_trailer {
    uint64_t parts, index, hashes, hot, state, meta; /* offsets of the first part of each */
    uint64_t n_parts, bytes;
    uint64_t stored_pages, runs, n_pages_parts;
    uint64_t zero;
    uint8_t whole[16];
};
_Static_assert(sizeof(struct lb_cf_trailer) == 112, "FORMAT.md: trailer");

struct lb_cf_end {
    uint64_t trailer;
    uint8_t magic[8];
};

/* ---- sealing. How the parts of one file are checked; constant once made, any thread. */
struct lb_cf_seal {
    uint8_t id[16];
    bool encrypted;
    const uint8_t *data_key;         /* 32 bytes of guarded memory, its owner's; encrypted only */
};
/* `stored`, head->stored_bytes of them, to `out` (encrypted on the way; may be the same place), and head->check.
 * The rest of the head is filled. */
void lb_cf_seal_part(const struct lb_cf_seal *s, struct lb_cf_part *head, const void *stored, void *out);
/* False: the check is wrong, and `out` has no byte of the part. out == stored: in place (then it is wiped). */
bool lb_cf_open_part(const struct lb_cf_seal *s, const struct lb_cf_part *head, const void *stored, void *out);
/* XXH3-128 in the form of the file. */
void lb_cf_hash(uint8_t out[16], const void *data, size_t len, uint64_t seed);

/* ---- meta. s (may be NULL) is in the file's JSON as "stats". Caller frees; NULL: the description has what no
 * other host would accept. */
char *lb_ckpt_meta_json(const struct lb_ckpt_meta *m, const struct lb_ckpt_stats *s, struct lb_error *err);
/* stats that are not there are 0 */
int lb_ckpt_meta_parse(const char *json, struct lb_ckpt_meta *m, struct lb_ckpt_stats *s, struct lb_error *err);

/* One disk, there and in disks.json; NULL: a name is not UTF-8 */
struct json_t;
struct json_t *lb_ckpt_disk_json(const struct lb_ckpt_disk *d);
int lb_ckpt_disk_parse(const struct json_t *o, struct lb_ckpt_disk *out, struct lb_error *err);

/* ---- what a writer asks of the parent; the reader's. Any thread. */
/* The seed of the chain's hashes. Reads the hashes of all its files: call it first, once; then lb_chain_hash cannot
 * fail. */
int lb_chain_seed(struct lb_chain *c, uint64_t *seed, struct lb_error *err);
/* False: the page is all zeros. True: hash is its content's; *whole: the nearest file whose index names it has it as
 * LB_CF_RUN_WHOLE, so that a child may store a difference. */
bool lb_chain_hash(const struct lb_chain *c, unsigned block, uint64_t page, uint8_t hash[16], bool *whole);

#endif
