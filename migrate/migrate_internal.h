/*
 * migrate/migrate_internal.h - shared by the files of this folder only.
 *
 *   out.c       source session: the state machine from CONNECT to DONE
 *   sender.c    bulk workers of the source: dirty bitmaps -> records
 *   in.c        destination session
 *   receiver.c  bulk workers of the destination: records -> guest RAM
 *   handover.c  asking the peer, recovery after a crash
 *   ctl.c       control messages: pack, unpack, a queue fed by a reader thread
 *   digest.c    digest of all memory
 */
#ifndef LB_MIGRATE_INTERNAL_H
#define LB_MIGRATE_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>

#include "migrate/journal.h"
#include "migrate/migrate.h"
#include "migrate/policy.h"
#include "migrate/preflight.h"
#include "netproto/control.pb-c.h"

/* ------------------------------------------------------------ control (ctl.c) */

/* Pack and send one message; exactly one member of `kind` set by the caller. */
int lb_ctl_send(struct lb_chan *c, const Lb__Control *msg, struct lb_error *err);
/* Unpacked; free with lb__control__free_unpacked(m, NULL). A Failure from the peer becomes
 * -1 with the peer's own error; Keepalives are swallowed. */
int lb_ctl_recv(struct lb_chan *c, Lb__Control **out, uint64_t deadline_ns, struct lb_error *err);
/* As lb_ctl_recv, and the kind must be `want` (LB_E_PROTO otherwise). */
int lb_ctl_expect(struct lb_chan *c, Lb__Control__KindCase want, Lb__Control **out,
                  uint64_t deadline_ns, struct lb_error *err);
int lb_ctl_send_failure(struct lb_chan *c, const struct lb_error *failure, struct lb_error *err);
void lb_ctl_failure_to_error(const Lb__Failure *f, struct lb_error *err);
void lb_ctl_hello(Lb__Hello *h, const struct lb_host_config *cfg);

/* A reader thread that fills a queue, so that a Failure or a closed channel is
 * noticed in the middle of a round. on_end runs once, in the reader thread, when
 * the channel failed or the peer sent a Failure. */
struct lb_ctl_queue;
struct lb_ctl_queue *lb_ctl_queue_start(struct lb_chan *c, void (*on_end)(void *arg), void *arg);
/* Next message or -1 (peer's Failure, LB_E_NET at the end, LB_E_NET on deadline). */
int lb_ctl_queue_pop(struct lb_ctl_queue *q, Lb__Control **out, uint64_t deadline_ns,
                     struct lb_error *err);
int lb_ctl_queue_expect(struct lb_ctl_queue *q, Lb__Control__KindCase want, Lb__Control **out,
                        uint64_t deadline_ns, struct lb_error *err);
/* Any thread: who waits for a message comes back with LB_E_CANCELLED, now and from now on.
 * The channel itself stays up, so that a Cancel can still be sent. */
void lb_ctl_queue_interrupt(struct lb_ctl_queue *q);
/* The error the channel ended with; false while it is up. */
bool lb_ctl_queue_ended(struct lb_ctl_queue *q, struct lb_error *err);
void lb_ctl_queue_stop(struct lb_ctl_queue *q); /* aborts the channel, joins; NULL is fine */

/* --------------------------------------------------------- source (sender.c) */

struct lb_sender;
struct lb_sender_stats {
    uint64_t wire_bytes;
    uint64_t zero_pages, raw_pages, zstd_pages;
    uint64_t zstd_in_bytes, zstd_out_bytes;
    uint64_t done_pages;     /* this round: sent, skipped or zero */
    uint64_t skipped_pages;  /* this round */
    int zstd_level;
};
/* Takes over the connections. dirty[i] belongs to blocks[i] and is read only between
 * round_begin and round_wait. */
int lb_sender_new(struct lb_hv_vm *vm, const struct lb_ram_block *blocks,
                  struct lb_bitmap *dirty, unsigned n_blocks, struct lb_bulk **conns,
                  unsigned n_conns, const struct lb_migrate_opts *opts, struct lb_sender **out,
                  struct lb_error *err);
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

/* The identity of a registry entry; strings point into e. */
struct lb_vm_ident lb_entry_ident(const struct lb_vm_entry *e);
void lb_host_address(const struct lb_host *h, char host[256], uint16_t *port);

#endif
