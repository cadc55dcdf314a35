/*
 * migrate/migrate_internal.h - shared by the files of this folder only.
 *
 *   out.c       source session: the state machine from CONNECT to DONE
 *   sender.c    bulk workers of the source, see sender.h
 *   in.c        destination session
 *   receiver.c  bulk workers of the destination: records -> guest RAM
 *   handover.c  asking the peer, recovery after a crash
 *   ctl.c       control messages, see ctl.h
 *   digest.c    digest of all memory
 */
#ifndef LB_MIGRATE_INTERNAL_H
#define LB_MIGRATE_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>

#include "migrate/ctl.h"
#include "migrate/journal.h"
#include "migrate/migrate.h"
#include "migrate/policy.h"
#include "migrate/preflight.h"
#include "migrate/sender.h"
#include "netproto/control.pb-c.h"

/* -------------------------------------------------- destination (receiver.c) */

struct lb_receiver;
/* map[i]: local block for the source's block id i, NULL: not expected (ROM that agrees).
 * Takes over the connections. on_event: a round or the state is complete, or a worker
 * failed; from a worker thread. */
int lb_receiver_new(struct lb_hv_vm *vm, const struct lb_ram_block *const *map, unsigned n_map,
                    struct lb_bulk **conns, unsigned n_conns, void (*on_event)(void *arg),
                    void *arg, struct lb_receiver **out, struct lb_error *err);
/* 0 + the last complete round (-1: none yet) or -1 with the first worker's error. */
int lb_receiver_poll(struct lb_receiver *r, int64_t *round, bool *ended, struct lb_error *err);
/* After `ended`: the device state, owned by r. */
void lb_receiver_state(struct lb_receiver *r, const void **buf, size_t *len);
uint64_t lb_receiver_pages(struct lb_receiver *r);
void lb_receiver_abort(struct lb_receiver *r);
void lb_receiver_free(struct lb_receiver *r);

/* ----------------------------------------------------------- digest (digest.c) */

/* 128-bit digest of every non-zero page of the blocks that travel; ids[i] is the
 * number of blocks[i] on the source. VM stopped. Uses n_threads. */
int lb_memory_digest(struct lb_hv_vm *vm, const struct lb_ram_block *const *blocks,
                     const uint32_t *ids, unsigned n_blocks, unsigned n_threads, uint8_t out[16],
                     struct lb_error *err);
/* XXH3-128 of the bytes of one (ROM) block. */
int lb_block_digest(struct lb_hv_vm *vm, const struct lb_ram_block *blk, uint8_t out[16],
                    struct lb_error *err);

/* --------------------------------------------------------- hand-over (handover.c) */

enum lb_verdict { LB_VERDICT_RUNNING, LB_VERDICT_REFUSED };
/* Ask the destination once. LB_E_UNDECIDED when it cannot be reached. */
int lb_handover_ask(const struct lb_session_env *env, const struct lb_host *peer,
                    const char *token_hex, const char *vm, enum lb_verdict *out,
                    struct lb_error *err);
/* Answer such a question (destination). */
int lb_handover_answer(const struct lb_session_env *env, struct lb_chan *chan, const char *peer,
                       const Lb__HandoverQuery *q, struct lb_error *err);
/* Destination: it never ran and never will: destroy the receiver, forget the entry. */
int lb_receiver_discard(const struct lb_session_env *env, const struct lb_vm_entry *e,
                        struct lb_error *err);

#endif
