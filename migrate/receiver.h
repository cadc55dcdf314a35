/*
 * migrate/receiver.h - the bulk workers of a destination: records of N connections -> guest RAM.
 *
 * Used by migrations and by the first copy of a protection. The engine thread calls everything
 * but lb_receiver_replace.
 */
#ifndef LB_RECEIVER_H
#define LB_RECEIVER_H

#include "core/hv.h"
#include "netproto/netproto.h"

struct lb_receiver;
/* map[i]: local block for the source's block id i, NULL: not expected (ROM that agrees).
 * Takes over the connections. zero_copy: over those that are RDMA the source may write into our memory
 * (direct.h), until they end. on_event: a round or the state is complete, or a worker
 * failed; from a worker thread. */
int lb_receiver_new(struct lb_hv_vm *vm, const struct lb_ram_block *const *map, unsigned n_map,
                    struct lb_bulk **conns, unsigned n_conns, bool zero_copy,
                    void (*on_event)(void *arg), void *arg, struct lb_receiver **out, struct lb_error *err);
/* 0 + the last complete round (-1: none yet) or -1 with the first worker's error. */
int lb_receiver_poll(struct lb_receiver *r, int64_t *round, bool *ended, struct lb_error *err);
/* After `ended`: the device state, owned by r. */
void lb_receiver_state(struct lb_receiver *r, const void **buf, size_t *len);
/* Pages whose last record says that they are not what was written; at most max runs of them, by the source's
 * block id. Returns how many pages there are in all. */
struct lb_bad_run {
    uint32_t block;
    struct lb_page_run run;
};
uint64_t lb_receiver_bad(struct lb_receiver *r, struct lb_bad_run *out, unsigned max, unsigned *n);
/* Instead of the RDMA connection with that index, which broke or is to be given up: the worker goes on with
 * this one, which sends the round again. Takes it over; -1 when there is nothing to replace. Any thread. */
int lb_receiver_replace(struct lb_receiver *r, unsigned index, struct lb_bulk *fresh,
                        struct lb_error *err);
uint64_t lb_receiver_pages(struct lb_receiver *r);
void lb_receiver_free(struct lb_receiver *r);  /* joins, closes; NULL is fine */

#endif
