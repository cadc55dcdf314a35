/* Records as a peer with good keys could write them: header, run table and compressed payload.
 *
 * Input: one octet (bit 0: connection index, bit 1: checkpoint connection), then records in clear (header, runs,
 * payload; no tags).
 * Whatever passes the checks must be within every limit: that is asserted here again. */
#include "netproto/netproto_internal.h"

#include <assert.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const uint64_t BLOCKS[] = {262144, 4096, 1, UINT32_MAX};

static void take_zstd(const struct lb_rec_header *h, const uint8_t *payload, size_t len)
{
    static struct lb_zstd *z;
    static uint8_t out[LB_REC_MAX_PAYLOAD];
    size_t want = (size_t)h->n_pages * LB_WIRE_PAGE_BYTES;
    if (!z)
        z = lb_zstd_new();
    lb_zstd_decompress(z, payload, len, out, want, NULL);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct lb_page_run runs[LB_REC_MAX_RUNS];
    struct lb_rec_limits limits = {.n_pages_of_block = BLOCKS, .n_blocks = LB_ARRAY_LEN(BLOCKS)};
    struct lb_error err = LB_ERROR_INIT;
    if (size < 1)
        return 0;
    limits.index = data[0] & 1;
    limits.checkpoint = data[0] & 2;
    for (data++, size--; size >= LB_REC_HEADER_BYTES;) {
        struct lb_rec_header h;
        uint8_t again[LB_REC_HEADER_BYTES];
        if (lb_rec_parse_header(data, &limits, &h, &err) < 0) {
            assert(err.code == LB_E_PROTO && err.message[0]);
            return 0;
        }
        assert(h.payload_bytes <= LB_REC_MAX_PAYLOAD && h.n_runs <= LB_REC_MAX_RUNS);
        lb_rec_write_header(again, &h); /* nothing that was accepted is left out */
        assert(memcmp(again, data, sizeof(again)) == 0);
        data += LB_REC_HEADER_BYTES;
        size -= LB_REC_HEADER_BYTES;
        size_t table = h.n_runs * LB_REC_RUN_BYTES;
        if (size < table)
            return 0;
        if (!h.skip && table) {
            if (lb_rec_parse_runs(data, &limits, &h, runs, &err) < 0)
                return 0;
            uint64_t sum = 0, next = 0;
            for (uint32_t i = 0; i < h.n_runs; i++) {
                assert(runs[i].count > 0 && runs[i].first >= next);
                next = (uint64_t)runs[i].first + runs[i].count;
                sum += runs[i].count;
            }
            assert(sum == h.n_pages && next <= BLOCKS[h.block_id]);
        }
        data += table;
        size -= table;
        size_t payload = LB_MIN(size, (size_t)h.payload_bytes);
        if (h.type == LB_REC_PAGES && h.codec == LB_CODEC_ZSTD)
            take_zstd(&h, data, payload);
        if (h.type == LB_REC_DELTA && payload > LB_REC_CHECKSUM_BYTES)
            take_zstd(&h, data + LB_REC_CHECKSUM_BYTES, payload - LB_REC_CHECKSUM_BYTES);
        data += payload;
        size -= payload;
    }
    return 0;
}
