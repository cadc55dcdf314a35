/* remus/stage_internal.h - what both sides of remus/stage*.c and their tests share: XOR, and the payload of DISK
 * records:
 *
 *      u32 kind   u32 zero   u64 offset   u64 len   WRITE: len bytes        (little-endian, one after the other)
 */
#ifndef LB_STAGE_INTERNAL_H
#define LB_STAGE_INTERNAL_H

#include "remus/stage.h"

#include <endian.h>
#include <string.h>

#define LB_STAGE_OP_BYTES 24u
/* Longer writes are split; a multiple of any sector size. */
#define LB_STAGE_OP_MAX_DATA (LB_REC_MAX_PAYLOAD - LB_PAGE_SIZE)

static inline void lb_stage_put_op(uint8_t out[LB_STAGE_OP_BYTES], const struct lb_disk_op *op)
{
    uint32_t kind = htole32(op->kind), zero = 0;
    uint64_t offset = htole64(op->offset), len = htole64(op->len);
    memcpy(out, &kind, 4);
    memcpy(out + 4, &zero, 4);
    memcpy(out + 8, &offset, 8);
    memcpy(out + 16, &len, 8);
}

/* The operation at p, left bytes before the end. Returns the bytes it takes, 0: not valid. */
static inline size_t lb_stage_get_op(const uint8_t *p, size_t left, uint32_t disk,
                                     struct lb_disk_op *op)
{
    uint32_t head[2];
    uint64_t place[2];

    if (left < LB_STAGE_OP_BYTES)
        return 0;
    memcpy(head, p, sizeof(head));
    memcpy(place, p + 8, sizeof(place));
    *op = (struct lb_disk_op){.disk = disk, .kind = (enum lb_disk_op_kind)le32toh(head[0]),
                              .offset = le64toh(place[0]), .len = le64toh(place[1]),
                              .data = p + LB_STAGE_OP_BYTES};
    left -= LB_STAGE_OP_BYTES;
    if (head[1] != 0 || op->len == 0 || op->offset > INT64_MAX || op->len > INT64_MAX - op->offset)
        return 0;
    if (op->kind == LB_DISK_ZERO) {
        op->data = NULL;
        return LB_STAGE_OP_BYTES;
    }
    return op->kind == LB_DISK_WRITE && op->len <= left ? LB_STAGE_OP_BYTES + (size_t)op->len : 0;
}

typedef uint64_t lb_words __attribute__((vector_size(32), aligned(1), may_alias));

/* dst = a ^ b; dst may be a or b. */
static inline void lb_stage_xor(uint8_t *dst, const uint8_t *a, const uint8_t *b, size_t len)
{
    size_t i = 0;
    for (; i + sizeof(lb_words) <= len; i += sizeof(lb_words))
        *(lb_words *)(dst + i) = *(const lb_words *)(a + i) ^ *(const lb_words *)(b + i);
    for (; i < len; i++)
        dst[i] = a[i] ^ b[i];
}

#endif
