/*
 * remus/guard.h - sees to it that the primary never runs, and never speaks, when the backup might.
 *
 *   beat thread    a Beat every LB_BEAT_MS; answers renew the lease (lease.h)
 *   guard thread   opens the gate of the output until the end of the lease; asks when it is
 *                  nearly over; freezes the guest when it is. No I/O that could wait.
 *   asker thread   the claim at the witness, as often as it takes to know
 *
 *           lease   ok --------> ask ----------> lapsed: guest frozen
 *                      silence |   |  answered      |
 *                              v   +----> ok <------+    (the claim goes on all the same: one that
 *                            asking                       has silently won is the end of protection)
 *                              |
 *               won: gate open for ever, guest runs      lost: guest barred      undecided: frozen
 *                                                        | the backup is asked: does it run there?
 *                                             it never will: as won    it does: guest killed
 *
 * All threads run with real-time priority when this host allows it. Functions may be called from any thread.
 */
#ifndef LB_GUARD_H
#define LB_GUARD_H

#include "core/hv.h"
#include "netproto/netproto.h"
#include "remus/lease.h"
#include "remus/output.h"
#include "remus/witness.h"

enum lb_verdict_on_us {
    LB_GUARD_OPEN,      /* nothing decided: the lease counts */
    LB_GUARD_OURS,      /* the backup never will run it */
    LB_GUARD_THEIRS,    /* the backup has it; the guest here was killed */
    LB_GUARD_UNDECIDED, /* lapsed, and the witness could not be asked for LB_GUARD_UNDECIDED_MS; or the
                         * guest here is dead: no claim stands in the way of a backup that may run it */
};
#define LB_GUARD_UNDECIDED_MS 60000

struct lb_guard;
struct lb_guard_opts {
    struct lb_chan *chan;            /* for Beats */
    struct lb_hv_vm *vm;             /* frozen and unfrozen */
    const struct lb_hv_ops *hv;
    struct lb_vm_ident ident;        /* killed when lost; strings outlive the guard */
    struct lb_output *output;        /* gate; may be NULL */
    struct lb_witness *witness;
    const struct lb_remus_record *rec; /* copied; nonce and revision are set and saved */
    uint32_t lease_ms;
    uint64_t since_ns;               /* first lease: before Armed was sent */
    /* The claim is lost, the guest barred from running: what has become of it at the backup? OURS: it never ran
     * there and never will; THEIRS; OPEN: not known yet, asked again. Asker thread, may take seconds. */
    enum lb_verdict_on_us (*lost)(void *arg);
    void (*changed)(void *arg);      /* the verdict, the freezing: any of the threads */
    void *arg;
};
int lb_guard_start(const struct lb_guard_opts *opts, struct lb_guard **out, struct lb_error *err);
void lb_guard_answered(struct lb_guard *g, uint64_t sent_ns);
/* Claim now: the backup or the way to it is known to be gone. */
void lb_guard_ask(struct lb_guard *g, const char *why);
/* The backup has durably said that it never will run it. */
void lb_guard_discarded(struct lb_guard *g);
/* The guest switched itself off: a claim is made for it all the same, so that nobody runs it again. */
void lb_guard_switched_off(struct lb_guard *g);
/* A planned failover: the guest is stopped for good; silence is no reason to claim (off: it is again).
 * on: false when it is too late, and the verdict counts: there is one, or a claim is under way at a
 * witness that would not tell the backup. Nothing leaves through the gate meanwhile. */
bool lb_guard_yield(struct lb_guard *g, bool on);
/* The backup said that it runs the guest: as if a claim had been lost. */
void lb_guard_promoted(struct lb_guard *g);
enum lb_verdict_on_us lb_guard_verdict(struct lb_guard *g);
/* Until decided or the deadline. */
enum lb_verdict_on_us lb_guard_wait(struct lb_guard *g, uint64_t deadline_ns);
bool lb_guard_frozen(struct lb_guard *g);
/* What is left of the lease, negative when lapsed. */
double lb_guard_left_ms(struct lb_guard *g);
/* What the last claim said; "" when none failed. */
void lb_guard_trouble(struct lb_guard *g, char text[256]);
/* Joins; waits for a claim under way. The channel is aborted: a Beat may be stuck in it. The guest
 * stays as it is. NULL is fine. */
void lb_guard_stop(struct lb_guard *g);

#endif
