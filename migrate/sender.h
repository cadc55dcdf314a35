/*
 * migrate/sender.h - the bulk workers of a source: dirty bitmaps -> records on N connections.
 *
 * Used by migrations and by the first copy of a protection. The engine thread calls everything
 * but lb_sender_abort.
 */
#ifndef LB_SENDER_H
#define LB_SENDER_H

#include "migrate/migrate.h"

struct lb_sender;
struct lb_sender_stats {
    struct lb_bulk_stats bulk; /* of all connections that there are and were */
    uint64_t done_pages;     /* this round: sent, skipped or zero */
    uint64_t skipped_pages;  /* this round */
    int zstd_level;
    unsigned rdma_conns;     /* now */
    unsigned replaced;       /* RDMA connections that broke, and go on over TCP */
};
/* Takes over the connections. dirty[i] belongs to blocks[i] and is read only between
 * round_begin and round_wait. */
int lb_sender_new(struct lb_hv_vm *vm, const struct lb_ram_block *blocks,
                  struct lb_bitmap *dirty, unsigned n_blocks, struct lb_bulk **conns,
                  unsigned n_conns, const struct lb_migrate_opts *opts, struct lb_sender **out,
                  struct lb_error *err);
/* Before the first round. reconnect: another connection with that index, over TCP, when an RDMA connection
 * broke: what it had sent since the last round's end is sent again. Worker threads. Without, or when that
 * fails too, the sender fails. */
void lb_sender_set_reconnect(struct lb_sender *s,
                             int (*reconnect)(unsigned index, struct lb_bulk **out,
                                              struct lb_error *err, void *arg),
                             void *arg);
/* Before the first round: pages go straight into the receiver's memory over connections that are RDMA, as
 * the receiver has agreed; those of chunks of which little is to be sent still go as records. */
int lb_sender_set_zero_copy(struct lb_sender *s, struct lb_error *err);
/* Start sending every set bit. `peek`: leave out pages that are dirty again. */
void lb_sender_round_begin(struct lb_sender *s, uint32_t round, bool peek);
/* Wait at most timeout_ms: 1 = still working, 0 = all sent and flushed, -1 = failed. */
int lb_sender_round_wait(struct lb_sender *s, unsigned timeout_ms, struct lb_error *err);
void lb_sender_get_stats(struct lb_sender *s, struct lb_sender_stats *out);
/* Allow compression now (ladder step), as if the operator had said zstd:1. */
void lb_sender_force_compress(struct lb_sender *s);
/* Would compression of what was sent lately save >= 1/8? From samples. */
bool lb_sender_compressible(struct lb_sender *s);
/* Device state on connection 0, then END on all; between rounds only. */
int lb_sender_state(struct lb_sender *s, uint32_t round, const void *buf, size_t len,
                    struct lb_error *err);
void lb_sender_abort(struct lb_sender *s); /* any thread: every connection fails at once */
void lb_sender_free(struct lb_sender *s);  /* joins, closes; NULL is fine */

#endif
