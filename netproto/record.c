/* netproto/record.c - page records: octets and limits, without I/O (STREAM.md, "Records").
 *
 * Everything here comes from a peer that is not believed: each field is checked
 * against a hard limit or against the others before anybody uses it. */
#include "netproto/netproto_internal.h"

#include <string.h>

/*      0   2     4     5        8     12    16     20      24            28       32
 *      type flags codec 0 0 0   block round n_runs n_pages payload_bytes 0 0 0 0
 */
void lb_rec_write_header(uint8_t out[LB_REC_HEADER_BYTES], const struct lb_rec_header *h)
{
    memset(out, 0, LB_REC_HEADER_BYTES);
    lb_put16(out, h->type);
    lb_put16(out + 2, h->flags);
    out[4] = h->codec;
    lb_put32(out + 8, h->block_id);
    lb_put32(out + 12, h->round);
    lb_put32(out + 16, h->n_runs);
    lb_put32(out + 20, h->n_pages);
    lb_put32(out + 24, h->payload_bytes);
}

static int bad(const struct lb_rec_header *h, const char *why, struct lb_error *err)
{
    return lb_fail(err, LB_E_PROTO, "record of type %u: %s", h->type, why);
}

static int check_block(const struct lb_rec_header *h, const struct lb_rec_limits *l,
                       struct lb_error *err)
{
    if (h->block_id >= l->n_blocks)
        return lb_fail(err, LB_E_PROTO, "record for memory block %u of %u", h->block_id,
                       l->n_blocks);
    if (h->n_runs == 0 || h->n_pages < h->n_runs)
        return bad(h, "runs and pages do not fit each other", err);
    if (h->n_pages > l->n_pages_of_block[h->block_id])
        return bad(h, "more pages than the block has", err);
    return 0;
}

static int check_pages(const struct lb_rec_header *h, const struct lb_rec_limits *l,
                       struct lb_error *err)
{
    if (check_block(h, l, err) < 0)
        return -1;
    if (h->n_pages > LB_REC_MAX_PAGES)
        return bad(h, "too many pages", err);
    uint32_t raw_bytes = h->n_pages * LB_WIRE_PAGE_BYTES;
    switch (h->codec) {
    case LB_CODEC_RAW:
        if (h->payload_bytes != raw_bytes)
            return bad(h, "raw payload does not match the pages", err);
        return 0;
    case LB_CODEC_ZSTD:
        if (h->payload_bytes == 0 || h->payload_bytes >= raw_bytes)
            return bad(h, "compressed payload is empty or larger than the pages", err);
        return 0;
    default:
        return bad(h, "unknown codec", err);
    }
}

static int check_zero(const struct lb_rec_header *h, const struct lb_rec_limits *l,
                      struct lb_error *err)
{
    if (h->payload_bytes != 0 || h->codec != LB_CODEC_RAW)
        return bad(h, "zero pages have no payload", err);
    return check_block(h, l, err);
}

static int check_delta(const struct lb_rec_header *h, const struct lb_rec_limits *l,
                       struct lb_error *err)
{
    if (check_block(h, l, err) < 0)
        return -1;
    if (h->n_pages > LB_REC_MAX_PAGES)
        return bad(h, "too many pages", err);
    if (h->codec != LB_CODEC_ZSTD)
        return bad(h, "unknown codec", err);
    if (h->payload_bytes <= LB_REC_CHECKSUM_BYTES ||
        h->payload_bytes - LB_REC_CHECKSUM_BYTES >= h->n_pages * LB_WIRE_PAGE_BYTES)
        return bad(h, "compressed payload is empty or larger than the pages", err);
    return 0;
}

static int check_mark(const struct lb_rec_header *h, const struct lb_rec_limits *l,
                      struct lb_error *err)
{
    bool state = h->type == LB_REC_STATE;
    if (h->codec != LB_CODEC_RAW || h->block_id || h->n_runs || h->n_pages)
        return bad(h, "fields that belong to pages are set", err);
    if (state != (h->payload_bytes > 0))
        return bad(h, "payload missing or out of place", err);
    if (state && l->index != 0)
        return bad(h, "device state travels on connection 0 only", err);
    return 0;
}

/* STATE, DISK, FRAMES, EPOCH_END of a checkpoint. The number of the disk is its taker's to check. */
static int check_data(const struct lb_rec_header *h, struct lb_error *err)
{
    uint8_t best = h->type == LB_REC_EPOCH_END ? LB_CODEC_RAW
                   : h->type == LB_REC_STATE   ? LB_CODEC_XOR_ZSTD
                                               : LB_CODEC_ZSTD;
    if (h->n_runs || h->n_pages || (h->block_id && h->type != LB_REC_DISK))
        return bad(h, "fields that belong to pages are set", err);
    if (h->codec > best)
        return bad(h, "unknown codec", err);
    if (h->payload_bytes == 0)
        return bad(h, "payload missing", err);
    if (h->type == LB_REC_EPOCH_END && h->payload_bytes != LB_REC_EPOCH_END_BYTES)
        return bad(h, "its payload is not the number of an epoch", err);
    return 0;
}

/* WRITTEN, ASK, GRANT: runs and a payload whose size they give. */
static int check_direct(const struct lb_rec_header *h, const struct lb_rec_limits *l,
                        struct lb_error *err)
{
    bool written = h->type == LB_REC_WRITTEN;
    uint32_t bytes = written                  ? h->n_pages * 8
                     : h->type == LB_REC_ASK  ? LB_REC_ASK_BYTES
                                              : LB_REC_GRANT_BYTES;

    if (check_block(h, l, err) < 0)
        return -1;
    if (h->n_pages > (written ? LB_REC_MAX_PAGES : LB_REC_MAX_ASK_PAGES))
        return bad(h, "too many pages", err);
    if (h->codec != LB_CODEC_RAW || h->payload_bytes != bytes || (!written && h->n_runs != 1))
        return bad(h, "its payload or its runs are not what they should be", err);
    return 0;
}

/* By type, of a known one. */
static int check_content(const struct lb_rec_header *h, const struct lb_rec_limits *l,
                         struct lb_error *err)
{
    switch (h->type) {
    case LB_REC_PAGES:
        return check_pages(h, l, err);
    case LB_REC_ZERO:
        return check_zero(h, l, err);
    case LB_REC_DELTA:
        return check_delta(h, l, err);
    case LB_REC_STATE:
        return l->checkpoint ? check_data(h, err) : check_mark(h, l, err);
    case LB_REC_ROUND_END:
    case LB_REC_END:
        return check_mark(h, l, err);
    case LB_REC_WRITTEN:
    case LB_REC_ASK:
    case LB_REC_GRANT:
        return check_direct(h, l, err);
    default:
        return check_data(h, err);
    }
}

enum where {
    NOWHERE,
    ROUNDS = 1,
    CHECKPOINTS = 2,
    EVERYWHERE = 3,
    TO_DEST = 4,   /* with zero copy, from the source */
    TO_SOURCE = 8, /* and back */
};

/* On which connections a type may appear; NOWHERE: this version does not know it. */
static enum where place_of(uint16_t type)
{
    switch (type) {
    case LB_REC_PAGES:
    case LB_REC_ZERO:
    case LB_REC_STATE:
    case LB_REC_END:
        return EVERYWHERE;
    case LB_REC_ROUND_END:
        return ROUNDS;
    case LB_REC_DELTA:
    case LB_REC_DISK:
    case LB_REC_FRAMES:
    case LB_REC_EPOCH_END:
        return CHECKPOINTS;
    case LB_REC_WRITTEN:
    case LB_REC_ASK:
        return TO_DEST;
    case LB_REC_GRANT:
        return TO_SOURCE;
    default:
        return NOWHERE;
    }
}

int lb_rec_parse_header(const uint8_t in[LB_REC_HEADER_BYTES], const struct lb_rec_limits *l,
                        struct lb_rec_header *h, struct lb_error *err)
{
    *h = (struct lb_rec_header){
        .type = lb_get16(in),
        .flags = lb_get16(in + 2),
        .codec = in[4],
        .block_id = lb_get32(in + 8),
        .round = lb_get32(in + 12),
        .n_runs = lb_get32(in + 16),
        .n_pages = lb_get32(in + 20),
        .payload_bytes = lb_get32(in + 24),
    };
    if (h->payload_bytes > LB_REC_MAX_PAYLOAD || h->n_runs > LB_REC_MAX_RUNS)
        return bad(h, "larger than the limits allow", err);
    if (in[5] | in[6] | in[7] | in[28] | in[29] | in[30] | in[31])
        return bad(h, "reserved bytes are not zero", err);
    if (h->flags & ~LB_REC_FLAG_OPTIONAL)
        return bad(h, "unknown flags", err);
    enum where where = place_of(h->type);
    if (where == NOWHERE) {
        h->skip = h->flags & LB_REC_FLAG_OPTIONAL;
        if (h->skip)
            return 0;
        bad(h, "unknown, and not optional", err);
        return lb_remedy(err, "install the same version of lifeboat on both hosts");
    }
    if (h->flags)
        return bad(h, "marked optional", err);
    enum where here = l->checkpoint                      ? CHECKPOINTS
                      : l->direct == LB_DIRECT_SOURCE ? TO_SOURCE
                      : l->direct == LB_DIRECT_DEST   ? ROUNDS | TO_DEST
                                                      : ROUNDS;
    if (!(where & here))
        return bad(h, "does not belong on this connection", err);
    return check_content(h, l, err);
}

int lb_rec_parse_runs(const uint8_t *in, const struct lb_rec_limits *l,
                      const struct lb_rec_header *h, struct lb_page_run *out,
                      struct lb_error *err)
{
    uint64_t n_block = l->n_pages_of_block[h->block_id]; /* the header was checked */
    uint64_t next = 0, sum = 0;

    for (uint32_t i = 0; i < h->n_runs; i++, in += LB_REC_RUN_BYTES) {
        uint64_t first = lb_get32(in), count = lb_get32(in + 4);
        if (count == 0)
            return bad(h, "an empty run", err);
        if (first < next)
            return bad(h, "runs overlap or are not sorted", err);
        if (first + count > n_block)
            return bad(h, "a run ends behind its block", err);
        next = first + count;
        sum += count;
        out[i] = (struct lb_page_run){.first = (uint32_t)first, .count = (uint32_t)count};
    }
    if (sum != h->n_pages)
        return bad(h, "runs do not add up to its pages", err);
    return 0;
}
