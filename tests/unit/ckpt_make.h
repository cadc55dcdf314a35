/*
 * tests/unit/ckpt_make.h - checkpoint files made byte by byte, from FORMAT.md alone.
 *
 * For tests of the reader: but for the text of the meta this shares no line with the writer, and it
 * can make what the writer never would. A file is made in memory: mk_begin, mk_chunk and mk_run as
 * often as wanted, mk_finish; then mk->buf is the file.
 */
#ifndef CKPT_MAKE_H
#define CKPT_MAKE_H

#include <sodium.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>
#include <zstd.h>

#include "checkpoint/store_internal.h"

#define MK_PAGE 4096u
enum { MK_PAGES = 1, MK_INDEX, MK_HASHES, MK_HOT, MK_STATE, MK_META, MK_TRAILER, MK_PARTS };
enum { MK_ZERO = 0, MK_WHOLE = 1, MK_XOR = 2 };

struct mk_block {
    const char *name;
    uint32_t kind;
    uint64_t n_pages;
};
struct mk_run {
    uint32_t block, kind;
    uint64_t first, packed;
    uint32_t n_hashes;
    uint8_t (*hashes)[16];
};
struct mk {
    uint8_t *buf;
    size_t len, cap;
    uint8_t id[16], data_key[32];
    bool encrypted;
    uint64_t seed;
    const struct mk_block *blocks;
    uint32_t n_blocks, n_parts, n_chunks;
    uint64_t n_pages;
    uint8_t (*checks)[16];
    uint32_t *stored;
    struct mk_run *runs;
    size_t n_runs;
    size_t split; /* bytes of a part of a section; 0: one part */
};

static inline void mk_put32(uint8_t *p, uint32_t v)
{
    for (int i = 0; i < 4; i++)
        p[i] = (uint8_t)(v >> 8 * i);
}
static inline void mk_put64(uint8_t *p, uint64_t v)
{
    mk_put32(p, (uint32_t)v);
    mk_put32(p + 4, (uint32_t)(v >> 32));
}
static inline void *mk_grow(void *p, size_t bytes)
{
    p = realloc(p, bytes ? bytes : 1);
    if (!p)
        abort();
    return p;
}
static inline void mk_hash(uint8_t out[16], const void *data, size_t len, uint64_t seed)
{
    XXH128_hash_t h = XXH3_128bits_withSeed(data, len, seed);
    for (int i = 0; i < 8; i++) {
        out[i] = (uint8_t)(h.high64 >> (56 - 8 * i));
        out[8 + i] = (uint8_t)(h.low64 >> (56 - 8 * i));
    }
}
static inline void mk_append(struct mk *m, const void *data, size_t len)
{
    if (m->len + len > m->cap) {
        m->cap = (m->len + len) * 2;
        m->buf = mk_grow(m->buf, m->cap);
    }
    if (data)
        memcpy(m->buf + m->len, data, len);
    else
        memset(m->buf + m->len, 0, len);
    m->len += len;
}
static inline void mk_free(struct mk *m)
{
    for (size_t i = 0; i < m->n_runs; i++)
        free(m->runs[i].hashes);
    free(m->runs);
    free(m->checks);
    free(m->stored);
    free(m->buf);
    memset(m, 0, sizeof(*m));
}

/* The header's own hash, after a change of the header. */
static inline void mk_seal_header(uint8_t *header)
{
    mk_hash(header + 4080, header, 4080, 0);
}

/* key: 32 bytes of a key file, or NULL */
static inline void mk_begin(struct mk *m, uint8_t id, uint8_t parent, const struct mk_block *blocks,
                            uint32_t n_blocks, uint32_t chunk_pages, const uint8_t *key)
{
    uint8_t h[4096] = "LBCKPT1\n";
    memset(m, 0, sizeof(*m));
    memset(m->id, id, 16);
    m->seed = 0x0123456789abcdef;
    m->blocks = blocks;
    m->n_blocks = n_blocks;
    m->encrypted = key;
    mk_put32(h + 8, 1);
    mk_put32(h + 12, (key ? 1u : 0) | (parent ? 2u : 0));
    memset(h + 16, id, 16);
    memset(h + 32, parent, 16);
    mk_put64(h + 48, 4096);
    mk_put32(h + 56, chunk_pages);
    mk_put32(h + 60, n_blocks);
    if (key) {
        if (sodium_init() < 0)
            abort();
        mk_put32(h + 64, 1);
        memset(m->data_key, 0x40 + id, 32);
        memset(h + 104, 0x77, 24);
        crypto_aead_xchacha20poly1305_ietf_encrypt(h + 128, NULL, m->data_key, 32, h, 72, NULL,
                                                   h + 104, key);
    }
    mk_seal_header(h);
    mk_append(m, h, sizeof(h));
}

/* head[0..31] filled and the stored bytes behind it in clear: fills the check, encrypts. */
static inline void mk_seal(const struct mk *m, uint8_t *part, size_t stored)
{
    uint8_t ad[48], nonce[24] = {0};
    if (!m->encrypted) {
        uint8_t *both = mk_grow(NULL, 32 + stored);
        uint64_t seed = 0;
        for (int i = 0; i < 8; i++)
            seed |= (uint64_t)m->id[i] << 8 * i;
        memcpy(both, part, 32);
        memcpy(both + 32, part + 48, stored);
        mk_hash(part + 32, both, 32 + stored, seed);
        free(both);
        return;
    }
    memcpy(ad, part, 32);
    memcpy(ad + 32, m->id, 16);
    memcpy(nonce + 16, part + 8, 4);
    crypto_aead_xchacha20poly1305_ietf_encrypt_detached(
        part + 48, part + 32, NULL, part + 48, stored, ad, sizeof(ad), NULL, nonce, m->data_key);
}

static inline void mk_part(struct mk *m, uint32_t kind, bool zstd, const void *data, size_t len,
                           uint32_t n_pages)
{
    size_t cap = ZSTD_compressBound(len), stored = len;
    uint8_t *part = mk_grow(NULL, 48 + cap);

    if (zstd)
        stored = ZSTD_compress(part + 48, cap, data, len, 3);
    else if (len > 0)
        memcpy(part + 48, data, len);
    mk_put32(part, 0x5450424c);
    mk_put32(part + 4, kind);
    mk_put32(part + 8, m->n_parts);
    mk_put32(part + 12, zstd);
    mk_put32(part + 16, (uint32_t)stored);
    mk_put32(part + 20, (uint32_t)len);
    mk_put32(part + 24, n_pages);
    mk_put32(part + 28, n_pages * 16);
    mk_seal(m, part, stored);
    m->checks = mk_grow(m->checks, (m->n_parts + 1) * sizeof(*m->checks));
    m->stored = mk_grow(m->stored, (m->n_parts + 1) * sizeof(*m->stored));
    memcpy(m->checks[m->n_parts], part + 32, 16);
    m->stored[m->n_parts++] = (uint32_t)stored;
    mk_append(m, NULL, -m->len % 16);
    mk_append(m, part, 48 + stored);
    free(part);
}

/* kinds NULL: all whole. pages: n * 4096 bytes as they are to be in the file. Returns the part's
 * number. */
static inline uint32_t mk_chunk(struct mk *m, uint32_t block, uint32_t n, const uint64_t *numbers,
                                const uint32_t *kinds, const uint8_t *pages, bool zstd)
{
    uint8_t *body = mk_grow(NULL, n * (16 + MK_PAGE));
    for (uint32_t i = 0; i < n; i++) {
        mk_put32(body + 16 * i, block);
        mk_put32(body + 16 * i + 4, kinds ? kinds[i] : 0);
        mk_put64(body + 16 * i + 8, numbers[i]);
    }
    memcpy(body + 16 * n, pages, n * MK_PAGE);
    mk_part(m, MK_PAGES, zstd, body, n * (16 + MK_PAGE), n);
    free(body);
    m->n_pages += n;
    return m->n_chunks++;
}

/* content: what the pages are, for the hashes; count * 4096 bytes. */
static inline void mk_run(struct mk *m, uint32_t block, uint32_t kind, uint64_t first,
                          uint32_t count, uint32_t part, uint32_t slot, const uint8_t *content)
{
    if ((m->n_runs & (m->n_runs - 1)) == 0)
        m->runs = mk_grow(m->runs, (m->n_runs ? 2 * m->n_runs : 1) * sizeof(*m->runs));
    struct mk_run *r = &m->runs[m->n_runs++];
    *r = (struct mk_run){block, kind, first, count, 0, NULL};
    if (kind == MK_ZERO)
        return;
    r->packed = (uint64_t)count << 48 | (uint64_t)part << 16 | slot;
    r->n_hashes = count;
    r->hashes = mk_grow(NULL, count * sizeof(*r->hashes));
    for (uint32_t i = 0; i < count; i++)
        mk_hash(r->hashes[i], content + (size_t)i * MK_PAGE, MK_PAGE, m->seed);
}

static inline int mk_run_order(const void *a, const void *b)
{
    const struct mk_run *x = a, *y = b;
    if (x->block != y->block)
        return x->block < y->block ? -1 : 1;
    return (x->first > y->first) - (x->first < y->first);
}

/* Where its first part begins. */
static inline uint64_t mk_section(struct mk *m, uint32_t kind, const struct mk *data)
{
    size_t step = m->split ? m->split : data->len + 1, at = 0, begin = (m->len + 15) / 16 * 16;
    do {
        size_t n = data->len - at < step ? data->len - at : step;
        mk_part(m, kind, n > 64, data->buf + at, n, 0);
        at += n;
    } while (at < data->len);
    return begin;
}

/* What comes after the chunks, with the runs in order. A section that is to be something else:
 * given, else NULL. */
struct mk_rest {
    const char *meta;
    const void *state;
    size_t state_len;
    const uint64_t *hot;
    size_t n_hot;
    const void *index; /* instead of what the runs say */
    size_t index_len;
};

static inline void mk_index(const struct mk *m, struct mk *out)
{
    uint8_t b[24];
    for (uint32_t i = 0; i < m->n_blocks; i++) {
        mk_put32(b, (uint32_t)strlen(m->blocks[i].name));
        mk_put32(b + 4, m->blocks[i].kind);
        mk_put64(b + 8, m->blocks[i].n_pages);
        mk_append(out, b, 16);
        mk_append(out, m->blocks[i].name, strlen(m->blocks[i].name));
    }
    mk_put64(b, m->n_runs);
    mk_append(out, b, 8);
    for (size_t i = 0; i < m->n_runs; i++) {
        mk_put32(b, m->runs[i].block);
        mk_put32(b + 4, m->runs[i].kind);
        mk_put64(b + 8, m->runs[i].first);
        mk_put64(b + 16, m->runs[i].packed);
        mk_append(out, b, 24);
    }
}

static inline void mk_trailer(struct mk *m, uint8_t t[112])
{
    uint64_t at = (m->len + 15) / 16 * 16;
    mk_put64(t + 48, m->n_parts);
    mk_put64(t + 56, at);
    mk_put64(t + 64, m->n_pages);
    mk_put64(t + 72, m->n_runs);
    mk_put64(t + 80, m->n_chunks);
    mk_hash(t + 96, m->checks, m->n_parts * sizeof(*m->checks), 0);
    mk_part(m, MK_TRAILER, false, t, 112, 0);
    mk_append(m, NULL, -(m->len + 16) % 4096);
    uint8_t end[16] = "........LBCKEND\n";
    mk_put64(end, at);
    mk_append(m, end, 16);
}

static inline void mk_finish(struct mk *m, const struct mk_rest *rest)
{
    struct mk s = {0};
    uint8_t t[112] = {0}, b[20];

    if (m->n_runs)
        qsort(m->runs, m->n_runs, sizeof(*m->runs), mk_run_order);
    for (uint32_t i = 0; i < m->n_chunks; i++) {
        mk_put32(b, m->stored[i]);
        memcpy(b + 4, m->checks[i], 16);
        mk_append(&s, b, 20);
    }
    mk_put64(t, mk_section(m, MK_PARTS, &s));
    s.len = 0;
    if (rest->index)
        mk_append(&s, rest->index, rest->index_len);
    else
        mk_index(m, &s);
    mk_put64(t + 8, mk_section(m, MK_INDEX, &s));
    s.len = 0;
    mk_put64(b, m->seed);
    mk_append(&s, b, 8);
    for (size_t i = 0; i < m->n_runs; i++)
        mk_append(&s, m->runs[i].hashes, m->runs[i].n_hashes * 16);
    mk_put64(t + 16, mk_section(m, MK_HASHES, &s));
    s.len = 0;
    for (size_t i = 0; i < rest->n_hot; i++) {
        mk_put64(b, rest->hot[i]);
        mk_append(&s, b, 8);
    }
    if (rest->n_hot)
        mk_put64(t + 24, mk_section(m, MK_HOT, &s));
    s.len = 0;
    mk_append(&s, rest->state, rest->state_len);
    mk_put64(t + 32, mk_section(m, MK_STATE, &s));
    s.len = 0;
    mk_append(&s, rest->meta, strlen(rest->meta));
    mk_put64(t + 40, mk_section(m, MK_META, &s));
    mk_free(&s);
    mk_trailer(m, t);
}

/* Caller frees. number 0: a suspend */
static inline char *mk_meta(const char *vm, uint32_t number)
{
    char *argv[] = {(char *)"qemu", NULL}, *none[] = {NULL};
    struct lb_ckpt_meta meta = {
        .number = number, .suspend = !number, .created_ms = 1000, .pause_ms = 2.5};
    struct lb_ckpt_stats stats = {.pages = 77, .stored_pages = 5};
    struct lb_error err = LB_ERROR_INIT;
    meta.desc = (struct lb_vm_desc){.name = (char *)vm,
                                    .hypervisor = (char *)"qemu",
                                    .emulator = (char *)"/usr/bin/qemu",
                                    .argv = argv,
                                    .machine = (char *)"pc",
                                    .features = none,
                                    .blockers = none,
                                    .vcpus = 1,
                                    .ram_bytes = 1 << 20};
    snprintf(meta.vm, sizeof(meta.vm), "%s", vm);
    char *json = lb_ckpt_meta_json(&meta, &stats, &err);
    if (!json) {
        fprintf(stderr, "%s\n", err.message);
        abort();
    }
    return json;
}

static inline void mk_write(const struct mk *m, const char *path)
{
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(m->buf, 1, m->len, f) != m->len || fclose(f) != 0)
        abort();
}

#endif
