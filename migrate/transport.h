/*
 * migrate/transport.h - what carries the bulk connections: RDMA or TCP, agreed before anything is touched.
 *
 * The source says in its request what is wanted and which of its addresses have an RDMA device; the
 * destination chooses, says why in the preflight report (line "transport"), and, when it is RDMA,
 * listens and tells where in Ready. A source that cannot connect there takes TCP, unless RDMA was
 * demanded. A destination or a source of an older version knows nothing of this: TCP.
 */
#ifndef LB_TRANSPORT_H
#define LB_TRANSPORT_H

#include "migrate/migrate.h"
#include "migrate/preflight.h"
#include "netproto/control.pb-c.h"
#include "netproto/rdma.h"

struct lb_transport_choice {
    bool rdma, zero_copy;
    struct lb_rdma_addr at[LB_RDMA_MAX_ADDRS]; /* ours, to listen on */
    unsigned n;
};

/* The source's side; free with lb_transport_wish_free. Adds a failing line when RDMA is demanded and this
 * host has none. */
Lb__TransportWish *lb_transport_wish(const struct lb_migrate_opts *o, struct lb_report *mine);
void lb_transport_wish_free(Lb__TransportWish *w); /* NULL is fine */
/* The destination's, whose addresses are mine[]. wish: of the request, NULL: an older source. */
void lb_transport_choose(const Lb__TransportWish *wish, const struct lb_rdma_addr *mine, unsigned n,
                         struct lb_transport_choice *out, struct lb_report *rep);
/* Addresses as they travel; free with lb_rdma_addrs_free. */
Lb__RdmaAddress **lb_rdma_addrs_pack(const struct lb_rdma_addr *v, unsigned n);
void lb_rdma_addrs_free(Lb__RdmaAddress **v, unsigned n);
/* Those that make sense, at most LB_RDMA_MAX_ADDRS; returns how many. */
unsigned lb_rdma_addrs_parse(Lb__RdmaAddress *const *v, size_t n, struct lb_rdma_addr *out);

#endif
