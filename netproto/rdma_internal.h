/* netproto/rdma_internal.h - shared by the .c files of RDMA only.
 *
 *   rdma_cm.c         addresses, listening, connecting (librdmacm)
 *   transport_rdma.c  the byte stream over a connected queue pair
 *   rdma_mem.c        registered memory, one-sided writes
 *   rdma_flow.c       what needs no device
 */
#ifndef LB_RDMA_INTERNAL_H
#define LB_RDMA_INTERNAL_H

#include "netproto/netproto_internal.h"
#include "netproto/rdma.h"
#include "netproto/rdma_flow.h"

#include <infiniband/verbs.h>
#include <pthread.h>
#include <rdma/rdma_cma.h>

#define LB_RDMA_BUF_BYTES (128u << 10) /* one message: what bulk.c writes at once */
#define LB_RDMA_BUFS 16u               /* each way: 2 MiB */
#define LB_RDMA_RX (LB_RDMA_BUFS + LB_RDMA_SPARE)
#define LB_RDMA_SQ_DEPTH 512u          /* sends and writes on their way */
#define LB_RDMA_SQ_KEPT 8u             /* of them, for empty messages */
#define LB_RDMA_SIGNAL_EVERY 16u       /* one of so many writes says that it is done */

/* A message that came and was not read to its end. */
struct lb_rdma_in {
    unsigned index;
    uint32_t bytes;
};

struct lb_rdma_conn {
    struct lb_transport base;
    /* immutable after lb_rdma_conn_start */
    struct rdma_event_channel *events;
    struct rdma_cm_id *id;
    struct ibv_pd *pd;
    struct ibv_comp_channel *comp;
    struct ibv_cq *cq;
    uint8_t *ring;              /* LB_RDMA_BUFS to send from, then LB_RDMA_RX to receive into */
    struct ibv_mr *ring_mr;
    int wake_fd;                /* readable once aborted */
    unsigned sq_depth;
    uint32_t tx_bytes;          /* of one message: the smaller of the two sides' */
    bool connected;             /* may be disconnected */
    uint64_t break_at;          /* LIFEBOAT_RDMA_BREAK; 0: never */

    /* sending thread */
    unsigned tx_next;           /* buffer being filled */
    uint32_t tx_fill;
    unsigned unsignalled;       /* writes since one that says so */

    /* reading thread */
    uint32_t in_pos;            /* of in[0] */

    /* locked by mu */
    pthread_mutex_t mu;
    pthread_cond_t cond;        /* something happened, or nobody polls any more */
    bool polling;               /* one thread waits for all */
    bool aborted, broken, peer_closed;
    struct lb_error why;        /* of broken */
    struct lb_rdma_flow flow;
    unsigned tx_busy;           /* buffers whose sends are under way */
    uint64_t posted, done;      /* work requests of the send queue, counted from 1 */
    struct lb_rdma_in in[LB_RDMA_RX];
    unsigned n_in;
};

/* transport_rdma.c */
extern const struct lb_transport_ops lb_rdma_ops;
struct lb_rdma_conn *lb_rdma_conn_new(struct rdma_event_channel *events, struct rdma_cm_id *id);
/* Queue pair, rings, receives: before connect or accept. Not ours after that: id and events until close. */
int lb_rdma_conn_prepare(struct lb_rdma_conn *c, struct lb_error *err);
/* Connected; what the peer said of its buffers. */
void lb_rdma_conn_start(struct lb_rdma_conn *c, const struct lb_rdma_hello *peers);
static inline struct lb_rdma_conn *lb_rdma_conn_of(struct lb_transport *t)
{
    return (struct lb_rdma_conn *)t; /* base is the first member */
}
/* mu held. Wait for room for one more request in the send queue (and whatever `ready` asks). */
int lb_rdma_wait_room(struct lb_rdma_conn *c, bool (*ready)(const struct lb_rdma_conn *c),
                      uint64_t deadline_ns, struct lb_error *err);
/* mu held. Fills in number and flags. A failure breaks the connection. */
enum lb_rdma_kind { LB_RDMA_DATA, LB_RDMA_TOLD, LB_RDMA_WRITE };
int lb_rdma_post(struct lb_rdma_conn *c, struct ibv_send_wr *wr, enum lb_rdma_kind kind, bool signal,
                 struct lb_error *err);

/* rdma_mem.c: the ring, too, is counted as registered */
struct ibv_mr *lb_rdma_reg(struct ibv_pd *pd, void *addr, size_t len, int access);
void lb_rdma_dereg(struct ibv_mr *mr); /* NULL is fine */

#endif
