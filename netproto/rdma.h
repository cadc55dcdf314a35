/*
 * netproto/rdma.h - bulk connections over RDMA (libibverbs and librdmacm; an optional build feature).
 *
 * The supervisor cannot hand an RDMA connection to a session, so the receiving session listens itself:
 *
 *   source                                    destination
 *   MigrateRequest.rdma: its addresses  --->  lb_rdma_common: which of ours is on a network of theirs
 *                                       <---  lb_rdma_listen; Ready.rdma: addresses and ports
 *   lb_rdma_connect (session id in the  --->  lb_rdma_accept (another id: rejected)
 *     connection request)
 *   lb_bulk_open  ---- greeting, keys, records exactly as over TCP ----  lb_bulk_accept
 *
 * A connection is a byte stream (struct lb_transport_ops) of SENDs from and into rings of registered
 * buffers, with credits: nothing is sent that the other side has no buffer for.  Octets: STREAM.md, 7.
 *
 * Besides, one side may write into memory of the other that was registered for it (lb_rdma_write): what
 * was written before something was sent is there when that is received.  Guest RAM travels so with
 * --trusted-fabric.
 *
 * Built without the libraries everything here answers LB_E_UNSUPPORTED, or "no addresses".
 *
 * For tests, per connection: LIFEBOAT_RDMA_BREAK=N breaks it after N messages and writes (nothing is said to
 * the peer); LIFEBOAT_RDMA_FLIP=N flips a bit of the Nth write on its way, =all of every one.
 *
 * Threads: as of a transport; registering and lb_rdma_write are the sending thread's, or (registering on
 * the receiving side) the receiving thread's.
 */
#ifndef LB_RDMA_H
#define LB_RDMA_H

#include "netproto/netproto.h"

#define LB_RDMA_MAX_ADDRS 16u

struct lb_rdma_addr {
    char ip[46];
    unsigned prefix;      /* bits of its network */
    uint16_t port;        /* 0: nobody listens */
    char device[64];      /* "rxe0"; "" of a peer's */
};

bool lb_rdma_built(void);
/* Addresses of this host that belong to an RDMA device with a port that is up; loopback left out. Costs
 * nothing on a host without devices. */
unsigned lb_rdma_addresses(struct lb_rdma_addr *v, unsigned max);
/* Is it the text of an address, with a prefix that its family has? */
bool lb_rdma_addr_valid(const struct lb_rdma_addr *a);
/* Are two addresses on the same network, as both see it? */
bool lb_rdma_same_network(const struct lb_rdma_addr *a, const struct lb_rdma_addr *b);

struct lb_rdma_listener;
/* Listen on every v[i] and fill its port. */
int lb_rdma_listen(struct lb_rdma_addr *v, unsigned n, const uint8_t session_id[LB_SESSION_ID_BYTES],
                   struct lb_rdma_listener **out, struct lb_error *err);
/* The next connection of that session; LB_E_NET with ETIMEDOUT when none came. */
int lb_rdma_accept(struct lb_rdma_listener *l, unsigned timeout_ms, struct lb_transport **out,
                   struct lb_error *err);
void lb_rdma_listener_close(struct lb_rdma_listener *l); /* NULL is fine */
/* cancel_fd: -1, or readable = give up. */
int lb_rdma_connect(const struct lb_rdma_addr *to, const uint8_t session_id[LB_SESSION_ID_BYTES],
                    unsigned timeout_ms, int cancel_fd, struct lb_transport **out,
                    struct lb_error *err);

/* The functions below take any transport: what is none of ours has nothing to do, or fails. */
bool lb_rdma_is(const struct lb_transport *t);
/* Wait until all that was written is in the peer's memory. Sending thread. */
int lb_rdma_drain(struct lb_transport *t, uint64_t deadline_ns, struct lb_error *err);

/* ---- one-sided writes */

struct lb_rdma_mr {
    void *handle;
    uint64_t addr;        /* as the writing side names it */
    uint64_t bytes;
    uint32_t lkey, rkey;
};
/* Pin and register [addr, addr + len); for_peer: the peer may write there. */
int lb_rdma_register(struct lb_transport *t, void *addr, size_t len, bool for_peer,
                     struct lb_rdma_mr *out, struct lb_error *err);
/* Undone; an mr that is zeroed is fine. The caller knows that nothing is under way into or out of it. */
void lb_rdma_deregister(struct lb_rdma_mr *mr);
/* Write len bytes at src (inside `local`) to the peer's address. On its way when this returns; read until
 * lb_rdma_drain. `more`: another write or send follows at once. */
int lb_rdma_write(struct lb_transport *t, const struct lb_rdma_mr *local, const void *src, size_t len,
                  uint64_t remote_addr, uint32_t rkey, bool more, struct lb_error *err);
/* Registered by this process now, and at most so far: rings and windows. */
void lb_rdma_registered(uint64_t *now_bytes, uint64_t *max_bytes);

/* ---- the window of registered chunks of guest RAM: which ones (the writing side decides) */

#define LB_RDMA_CHUNK_BYTES (16u << 20)
#define LB_RDMA_CHUNK_PAGES (LB_RDMA_CHUNK_BYTES / 4096u)
#define LB_RDMA_WINDOW_BYTES (UINT64_C(256) << 20)  /* of all connections of a session together */
#define LB_RDMA_MAX_SLOTS (LB_RDMA_WINDOW_BYTES / LB_RDMA_CHUNK_BYTES)

struct lb_rdma_window {
    unsigned n_slots;
    uint64_t clock;
    struct {
        bool full;
        uint32_t block;
        uint64_t chunk, used; /* used: clock of the last find */
    } slot[LB_RDMA_MAX_SLOTS];
};
/* The share of one of n connections: two chunks at least. */
void lb_rdma_window_init(struct lb_rdma_window *w, unsigned n_connections);
/* Slot that has this chunk (now the most recently used), or -1. */
int lb_rdma_window_find(struct lb_rdma_window *w, uint32_t block, uint64_t chunk);
/* Slot to put a chunk into that is not there: an empty one or the least recently used, which the caller
 * has to empty first (slot[i].full). */
unsigned lb_rdma_window_victim(const struct lb_rdma_window *w);
void lb_rdma_window_put(struct lb_rdma_window *w, unsigned slot, uint32_t block, uint64_t chunk);

#endif
