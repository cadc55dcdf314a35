/*
 * remus/output.h - output commit: what the guest sends leaves the host only when the backup has
 * the epoch it was sent in. Two ways, chosen per network card (DESIGN 2a):
 *
 *   outside  kernel taps, also vhost and multiqueue. A BPF classifier on the tap's ingress redirects
 *            frames to a tap of ours (hold), released ones re-enter the same port through another (inj):
 *              guest -> vtap ingress -> redirect -> hold -> queue -> write inj -> mark, redirect -> vtap ingress
 *            It drops released frames after the gate's time, in the kernel: a holder that was
 *            stopped for longer than its lease and wakes in the middle of a write lets nothing
 *            out. Kernel objects persist when the holder dies: nothing leaks.
 *   inside   everything else QEMU can filter: lb_hv_nic_hold.
 *
 * Frames the network sends to the guest are never touched.
 *
 * One loop thread owns all queues; the calls below are for the engine thread unless they say
 * otherwise. Epochs are numbered as the engine does, ascending.
 */
#ifndef LB_OUTPUT_H
#define LB_OUTPUT_H

#include "core/hv.h"

/* The guest has to be stopped well before this many held_bytes: from here on frames stay in the kernel, which
 * drops them in the end (dropped_packets). */
#define LB_OUTPUT_LIMIT_BYTES (256u << 20)
struct lb_output_stats {          /* any thread, any time */
    uint64_t held_packets, held_bytes;         /* now */
    uint64_t oldest_held_ns;                   /* when it came, 0 none */
    uint64_t released_packets, released_bytes; /* since open */
    uint64_t dropped_packets;                  /* by the kernel before we read them, or at the gate */
};
struct lb_output;

/* Would it work? NULL-terminated "what: why: remedy" per card that cannot be held, malloc'ed. */
char **lb_output_blockers(struct lb_hv_vm *vm, struct lb_error *err);
/* Find the cards, make our taps (names lbh<N>/lbi<N>, in the network namespace of the VM's process),
 * start the loop. Nothing is held yet. vm is used by arm and disarm only. A card of a VM without network: fine. */
int lb_output_open(struct lb_hv_vm *vm, const struct lb_vm_ident *ident, const char *run_dir,
                   struct lb_output **out, struct lb_error *err);
/* Guest stopped. From now on everything it sends is held. */
int lb_output_arm(struct lb_output *o, struct lb_error *err);
/* Guest stopped (lb_hv_stop returned): everything it has sent belongs to `epoch` or before. begin
 * returns at once, end waits until every frame is in our queue. */
void lb_output_mark_begin(struct lb_output *o, uint64_t epoch);
int lb_output_mark_end(struct lb_output *o, struct lb_error *err);
/* The frames of `epoch`, newest last, at most max_bytes (the newest when there are more), as
 * { u16 LE card index, u32 LE length, vnet header of 12 bytes, frame }*. malloc'ed. Between mark_end
 * and release of that epoch, any thread. */
int lb_output_copy(struct lb_output *o, uint64_t epoch, size_t max_bytes, void **buf, size_t *len,
                   struct lb_error *err);
/* Frames of every epoch <= epoch may leave. Any thread, returns at once. */
void lb_output_release(struct lb_output *o, uint64_t epoch);
/* Nothing leaves after until_ns (CLOCK_MONOTONIC; UINT64_MAX: no limit). Any thread. Initially 0: closed. */
void lb_output_gate(struct lb_output *o, uint64_t until_ns);
/* Is everything still in place (somebody may have removed a filter)? 1: it was not and is again, output
 * may have left unheld meanwhile: *err says so. -1: it is not, and cannot be put back. Cheap enough for every epoch (one netlink dump a card
 * at most; may alternate cards). */
int lb_output_verify(struct lb_output *o, struct lb_error *err);
/* Guest stopped. Release (or drop) everything held, in order, and hold no more; the guest may run on return.
 * To release, the gate must be open; -1 without any change when it is not. Our taps go with close. */
int lb_output_disarm(struct lb_output *o, bool release, struct lb_error *err);
void lb_output_get_stats(struct lb_output *o, struct lb_output_stats *out);
/* Has the guest sent anything since the last mark? Any thread; for the adaptive interval. */
bool lb_output_waiting(struct lb_output *o);
/* Ends the loop, frees. Armed and not disarmed: the kernel's side stays and holds. NULL is fine. */
void lb_output_close(struct lb_output *o);

/* Recovery: a holder died and left its taps and filters for this VM. Removes them; frames it had read are lost
 * (TCP sends them again). Guest stopped, or dead (vm may be NULL). None there: success. LB_E_STATE: the holder
 * lives, in another process. Taps outlive VMs: to be called also for a VM that died while protected, and
 * before one runs where that may have happened. */
int lb_output_clear_stale(const struct lb_vm_ident *ident, struct lb_hv_vm *vm, const char *run_dir,
                          struct lb_error *err);
/* Failover: send frames (format of lb_output_copy) as if the guest of vm had just sent them. Best effort. */
int lb_output_inject(struct lb_hv_vm *vm, const struct lb_vm_ident *ident, const void *buf,
                     size_t len, struct lb_error *err);

#endif
