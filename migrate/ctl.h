/*
 * migrate/ctl.h - control messages over a channel: pack, unpack, a queue fed by a reader thread.
 *
 * Used by both sides of a migration and of a protection. Sending is safe from any thread.
 */
#ifndef LB_CTL_H
#define LB_CTL_H

#include "migrate/config.h"
#include "netproto/control.pb-c.h"
#include "netproto/netproto.h"

/* Pack and send one message; exactly one member of `kind` set by the caller. */
int lb_ctl_send(struct lb_chan *c, const Lb__Control *msg, struct lb_error *err);
/* Unpacked; free with lb__control__free_unpacked(m, NULL). A Failure from the peer becomes
 * -1 with the peer's own error; Keepalives are swallowed. */
int lb_ctl_recv(struct lb_chan *c, Lb__Control **out, uint64_t deadline_ns, struct lb_error *err);
/* As lb_ctl_recv, and the kind must be `want` (LB_E_PROTO otherwise). */
int lb_ctl_expect(struct lb_chan *c, Lb__Control__KindCase want, Lb__Control **out,
                  uint64_t deadline_ns, struct lb_error *err);
int lb_ctl_send_failure(struct lb_chan *c, const struct lb_error *failure, struct lb_error *err);
/* The first check that failed as LB_E_PREFLIGHT; -1. */
int lb_ctl_refusal(const Lb__PreflightReport *rep, struct lb_error *err);
void lb_ctl_hello(Lb__Hello *h, const struct lb_host_config *cfg);

/* A reader thread that fills a queue, so that a Failure or a closed channel is
 * noticed in the middle of a round. on_end runs once, in the reader thread, when
 * the channel failed or the peer sent a Failure. */
struct lb_ctl_queue;
struct lb_ctl_queue *lb_ctl_queue_start(struct lb_chan *c, void (*on_end)(void *arg), void *arg);
/* The same, with lb_ctl_queue_tap from the first message on. */
struct lb_ctl_queue *lb_ctl_queue_start_first(struct lb_chan *c,
                                              bool (*tap)(const Lb__Control *m, void *arg),
                                              void *tap_arg, void (*on_end)(void *arg),
                                              void *arg);
/* From now on every message is shown to `tap` in the reader thread first; one for which it returns
 * true is done with (and freed), the others are queued. For what cannot wait for the engine. */
void lb_ctl_queue_tap(struct lb_ctl_queue *q, bool (*tap)(const Lb__Control *m, void *arg),
                      void *arg);
/* Next message or -1 (peer's Failure, LB_E_NET at the end, LB_E_NET on deadline). */
int lb_ctl_queue_pop(struct lb_ctl_queue *q, Lb__Control **out, uint64_t deadline_ns,
                     struct lb_error *err);
int lb_ctl_queue_expect(struct lb_ctl_queue *q, Lb__Control__KindCase want, Lb__Control **out,
                        uint64_t deadline_ns, struct lb_error *err);
/* Any thread: who waits for a message comes back with LB_E_CANCELLED, now and from now on.
 * The channel itself stays up, so that a Cancel can still be sent. */
void lb_ctl_queue_interrupt(struct lb_ctl_queue *q);
/* Messages that came, Keepalives too: a sign of life. Any thread. */
unsigned lb_ctl_queue_heard(struct lb_ctl_queue *q);
/* The error the channel ended with; false while it is up. */
bool lb_ctl_queue_ended(struct lb_ctl_queue *q, struct lb_error *err);
void lb_ctl_queue_stop(struct lb_ctl_queue *q); /* aborts the channel, joins; NULL is fine */

#endif
