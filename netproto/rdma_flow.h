/*
 * netproto/rdma_flow.h - credits of an RDMA stream: pure accounting.
 *
 * Each side has posted `own` receive buffers for data and LB_RDMA_SPARE more. Data takes a credit of the
 * peer's; every message carries in its immediate value how many buffers have become free since the last
 * one. When half of them are free and nothing is going that way, an empty message carries the number. It
 * takes no credit: a peer that does not look can have at most two of them waiting, since it has to look
 * before it can send what makes a third one due.
 */
#ifndef LB_RDMA_FLOW_H
#define LB_RDMA_FLOW_H

#include "core/core.h"

#define LB_RDMA_SPARE 3u

struct lb_rdma_flow {
    unsigned own, peers; /* data buffers there are */
    unsigned credits;    /* of the peer's buffers, that we may fill */
    unsigned owed;       /* of our buffers, free again and not told */
};
void lb_rdma_flow_init(struct lb_rdma_flow *f, unsigned own, unsigned peers);
/* Data goes out (credits > 0): its immediate value. */
uint32_t lb_rdma_flow_send(struct lb_rdma_flow *f);
/* Is an empty message due? Then tell() gives its immediate value. */
bool lb_rdma_flow_due(const struct lb_rdma_flow *f);
uint32_t lb_rdma_flow_tell(struct lb_rdma_flow *f);
/* A message came. LB_E_PROTO when it gives back more than we have sent. */
int lb_rdma_flow_got(struct lb_rdma_flow *f, uint32_t immediate, struct lb_error *err);
/* A data buffer was read and posted again. */
void lb_rdma_flow_freed(struct lb_rdma_flow *f);

/* What both sides say when they connect, after the preamble (source only). */
#define LB_RDMA_HELLO_BYTES 8u
struct lb_rdma_hello {
    uint32_t buffers, buffer_bytes;
};
void lb_rdma_hello_write(uint8_t out[LB_RDMA_HELLO_BYTES], const struct lb_rdma_hello *h);
int lb_rdma_hello_parse(const uint8_t *in, size_t len, struct lb_rdma_hello *h,
                        struct lb_error *err);

#endif
