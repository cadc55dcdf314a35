/* netproto/codec_zstd.c - page payloads through zstd.
 *
 * One frame per record, with its content size in the frame header. Data that
 * does not compress costs little: a sample of the record is tried first. */
#include "netproto/netproto_internal.h"

#include <assert.h>
#include <string.h>
#include <zstd.h>

enum {
    PROBE_PAGES = 8,      /* spread over the record */
    PROBE_MIN_PAGES = 32, /* smaller records are just compressed */
};

struct lb_zstd {
    ZSTD_CCtx *c;
    ZSTD_DCtx *d;
    int level; /* set in c */
    uint8_t *out;
    size_t out_cap;
    uint8_t probe[PROBE_PAGES * LB_WIRE_PAGE_BYTES];
};

struct lb_zstd *lb_zstd_new(void)
{
    return lb_alloc(sizeof(struct lb_zstd));
}

void lb_zstd_free(struct lb_zstd *z)
{
    if (!z)
        return;
    ZSTD_freeCCtx(z->c);
    ZSTD_freeDCtx(z->d);
    free(z->out);
    free(z);
}

static bool prepare(struct lb_zstd *z, int level)
{
    if (!z->c) {
        z->c = ZSTD_createCCtx();
        z->out_cap = ZSTD_compressBound(LB_REC_MAX_PAYLOAD);
        z->out = malloc(z->out_cap);
        z->level = 0;
    }
    if (!z->c || !z->out)
        return false;
    if (z->level != level) {
        if (ZSTD_isError(ZSTD_CCtx_setParameter(z->c, ZSTD_c_compressionLevel, level)))
            return false;
        z->level = level;
    }
    return true;
}

/* Room for the output is what may be used at most: zstd stops when it is full. */
static size_t squeeze(struct lb_zstd *z, const void *in, size_t len)
{
    size_t n = ZSTD_compress2(z->c, z->out, LB_MIN(z->out_cap, len - len / 8), in, len);
    return ZSTD_isError(n) ? 0 : n;
}

size_t lb_zstd_pack(struct lb_zstd *z, const void *in, size_t len, int level, const uint8_t **out)
{
    assert(len > 0 && len <= LB_REC_MAX_PAYLOAD && level != 0);
    if (!prepare(z, level))
        return 0;
    *out = z->out;
    return squeeze(z, in, len);
}

size_t lb_zstd_compress(struct lb_zstd *z, const void *in, size_t len, int level,
                        const uint8_t **out)
{
    assert(len > 0 && len <= LB_REC_MAX_PAYLOAD && level != 0);
    if (!prepare(z, level))
        return 0;
    size_t n_pages = len / LB_WIRE_PAGE_BYTES;
    if (n_pages >= PROBE_MIN_PAGES) {
        for (size_t i = 0; i < PROBE_PAGES; i++)
            memcpy(z->probe + i * LB_WIRE_PAGE_BYTES,
                   (const uint8_t *)in + i * n_pages / PROBE_PAGES * LB_WIRE_PAGE_BYTES,
                   LB_WIRE_PAGE_BYTES);
        if (squeeze(z, z->probe, sizeof(z->probe)) == 0)
            return 0;
    }
    *out = z->out;
    return squeeze(z, in, len);
}

int lb_zstd_content_bytes(const void *in, size_t len, size_t max, size_t *out,
                          struct lb_error *err)
{
    /* unknown and error are zstd's two largest values */
    unsigned long long n = ZSTD_getFrameContentSize(in, len);
    if (n == 0 || n > max)
        return lb_fail(err, LB_E_PROTO, "a compressed record does not say how much it holds");
    *out = (size_t)n;
    return 0;
}

int lb_zstd_decompress(struct lb_zstd *z, const void *in, size_t len, void *out, size_t out_len,
                       struct lb_error *err)
{
    if (!z->d && !(z->d = ZSTD_createDCtx()))
        return lb_fail(err, LB_E_NO_SPACE, "no memory for zstd");
    /* an unknown or wrong size comes back as one of zstd's two huge error values */
    if (ZSTD_getFrameContentSize(in, len) != out_len)
        return lb_fail(err, LB_E_PROTO, "a compressed record does not hold %zu bytes", out_len);
    size_t frame = ZSTD_findFrameCompressedSize(in, len);
    if (ZSTD_isError(frame) || frame != len)
        return lb_fail(err, LB_E_PROTO, "a compressed record is not exactly one frame");
    size_t n = ZSTD_decompressDCtx(z->d, out, out_len, in, len);
    if (ZSTD_isError(n))
        return lb_fail(err, LB_E_PROTO, "a compressed record is damaged: %s", ZSTD_getErrorName(n));
    if (n != out_len)
        return lb_fail(err, LB_E_PROTO, "a compressed record holds %zu bytes, not %zu", n, out_len);
    return 0;
}
