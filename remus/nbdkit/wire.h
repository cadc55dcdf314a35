/*
 * remus/nbdkit/wire.h - from the plugin in nbdkit to the reader of remus/disk_source.c, both on this
 * host: a stream of { header, len bytes of data for a write }. Nothing comes back.
 */
#ifndef LB_DISK_WIRE_H
#define LB_DISK_WIRE_H

#include <stdint.h>

#define LB_DISK_WIRE_MAGIC 0x4c42444bu /* "LBDK" */
#define LB_DISK_WIRE_MAX (32u << 20)   /* bytes of one request, as QEMU's NBD client has it */
#define LB_DISK_SECTOR 512u            /* every offset and length is a multiple */

struct lb_disk_wire {
    uint32_t magic;
    uint32_t kind;    /* enum lb_disk_op_kind: 1 write, 2 zero */
    uint32_t disk;
    uint32_t reserved;
    uint64_t offset, len;
};

#endif
