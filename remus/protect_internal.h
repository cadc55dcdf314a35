/*
 * remus/protect_internal.h - the primary's session, shared by its files only.
 *
 *   protect.c        its life from above: states, record
 *   protect_end.c    how it ends
 *   protect_setup.c  checks, standby, disks, pre-copy rounds, arming
 *   protect_epoch.c  the engine: when an epoch ends, and its pause
 *   protect_ship.c   shipper thread, messages of the backup, release of output
 *   guard.c          the lease: who may run (guard.h)
 *   status.c         what people see
 *
 *      connecting -> preflight -> launching -> disk-sync -> pre-copy -> arming -> protected
 *           |            |            |            |           |          |  \        |
 *           +------------+------------+-----------failed (runs here)------+   \       |  unprotect, yield,
 *                                                                              \      |  backup lost, broken
 *                                        who may run?  deciding  <--------------+-----+
 *                                                       |   |   |
 *                       alone, free: RUNNING  <---------+   |   +----->  undecided: frozen here
 *                                                           fenced: nothing left here
 *
 * From the moment the revision of the armed witness is on disk, nothing but the guard's verdict
 * ends a protection: Discarded from the backup, or the claim at the witness.
 */
#ifndef LB_PROTECT_INTERNAL_H
#define LB_PROTECT_INTERNAL_H

#include <pthread.h>

#include "migrate/tx.h"
#include "remus/disk.h"
#include "remus/guard.h"
#include "remus/output.h"
#include "remus/remus.h"
#include "remus/stage.h"
#include "remus/witness.h"

#define LB_PROT_SLOTS 2                        /* epochs captured and not acked */
#define LB_PROT_FRAMES_MAX (1u << 20)          /* of an epoch's output that the backup gets */
#define LB_PROT_DISCARD_NS UINT64_C(2000000000)  /* Discarded after Discard */
#define LB_PROT_YIELD_NS UINT64_C(10000000000)   /* last Ack, Promoted */
#define LB_PROT_CONT_FOR_NS UINT64_C(10000000000) /* a guest that cannot be continued */

enum lb_prot_state {
    P_CONNECT, P_PREFLIGHT, P_LAUNCH, P_DISKS, P_ROUNDS, P_ARM, P_PROTECTED, P_UNPROTECT, P_DECIDING,
    P_ALONE, P_FENCED, P_DONE, P_FAILED, P_UNDECIDED,
};

/* Why the engine stopped making epochs. */
enum lb_prot_why {
    WHY_CANCEL,   /* unprotect */
    WHY_YIELD,    /* the backup asks for it */
    WHY_VERDICT,  /* the guard has decided */
    WHY_LOST,     /* the backup, or the way to it, is gone */
    WHY_BROKEN,   /* something here failed: the hypervisor, the disks, the output */
    WHY_KILLED,   /* the hypervisor's process is gone */
    WHY_POWEROFF, /* the guest switched itself off */
};

/* Epoch n is in slot n % LB_PROT_SLOTS. FREE: the engine's; SENT: the engine's again once it is acked. */
enum lb_slot_state { SLOT_FREE, SLOT_FULL, SLOT_SENDING, SLOT_SENT };
struct lb_prot_slot {
    struct lb_epoch e;           /* SENDING: the shipper's; otherwise nobody writes it */
    enum lb_slot_state state;    /* locked by mu */
};

/* Of the last epochs, for percentiles. */
struct lb_pause_log {
    float ms[LB_REMUS_EPOCH_LOG];
    unsigned n, at;
};
void lb_pause_add(struct lb_pause_log *l, double ms);

/* Counters of a moment, for rates. */
struct lb_rate_mark {
    uint64_t ns, epochs, pages, raw, wire;
};

struct prot {
    /* immutable after setup */
    const struct lb_remus_env *env;
    const struct lb_session_env *base;
    const struct lb_host *backup;
    struct lb_protect_opts opts;       /* defaults filled in */
    struct lb_migrate_opts mopts;      /* of the pre-copy */
    char *run_dir;
    struct lb_hv_disk *disks;
    unsigned n_disks;
    char *parts;                       /* cards and disks of the VM, as text */
    struct lb_output *output;
    struct lb_disk_source *disk;
    struct lb_encoder *enc;
    struct lb_bulk *bulk;              /* disk reader until the queue begins, then the shipper */
    struct lb_witness *witness;

    /* engine thread */
    struct lb_tx tx;
    struct lb_sm sm;
    struct lb_vm_entry entry;
    struct lb_remus_record rec;
    struct lb_protect_wish wish;
    struct lb_protect_status st;
    struct lb_pause_log *pauses;
    struct lb_rate_mark mark;          /* at the last look at the rates */
    uint64_t t_report, last_dirty, total_pages;
    uint64_t t_stop, t_cont;           /* of the last pause */
    uint64_t lag_ns, corrected_ns, t_clock, t_parts;
    bool touched;                      /* registry, log, output: something is there to undo */
    bool mirroring, saving, out_armed, disk_queued, no_clock, scan_after_save, yielding;
    double extra_percent;              /* of the state it is in */

    /* locked by mu */
    struct lb_guard *guard;            /* from arming on; the engine reads it as it likes */
    pthread_mutex_t mu;
    pthread_cond_t cond;
    struct lb_prot_slot slot[LB_PROT_SLOTS];
    uint64_t captured, sent, acked, released;   /* epoch numbers: ascending, released <= ... <= captured */
    bool may_release;                  /* the record says PROTECTED */
    bool cancel, lost, yield, promoted, discarded, pressure, quit;
    bool disk_failed;
    struct lb_error why;               /* of lost and disk_failed, the first */
    bool stretched;
    uint64_t paced_ns;                 /* bandwidth used up until then */

    pthread_t shipper;
    bool shipping;
    bool reader_priority;              /* control reader */
};

/* protect.c */
void lb_prot_move(struct prot *p, enum lb_prot_state to);
void lb_prot_note(struct prot *p, const char *fmt, ...) LB_PRINTF(2, 3);
/* Any thread: the backup is gone; ask who may run it, wake the engine. */
void lb_prot_lost(struct prot *p, const struct lb_error *why);
void lb_prot_guard_changed(void *prot);
enum lb_verdict_on_us lb_prot_claim_lost(void *prot);
/* mu held; until the deadline or a wake. */
void lb_prot_wait(struct prot *p, uint64_t deadline_ns);

/* protect_end.c: decides who has the guest and leaves it so; *end says how. 0 or why not. */
int lb_prot_abandon(struct prot *p, struct lb_error *err); /* before p->guard */
int lb_prot_settle(struct prot *p, enum lb_prot_why why, enum lb_protect_end *end,
                   struct lb_error *err);

/* protect_setup.c: everything up to (not including) epoch 1. On failure before p->guard is set
 * the guest was never at stake. */
int lb_prot_setup(struct prot *p, struct lb_error *err);

/* protect_epoch.c */
enum lb_prot_why lb_prot_engine(struct prot *p, struct lb_error *err);
/* One epoch; -1: incomplete, the guest may be paused (lb_prot_resume). `last`: it stays paused. */
int lb_prot_epoch(struct prot *p, bool last, struct lb_error *err);
/* Whatever happened, let the guest run. */
int lb_prot_resume(struct prot *p, struct lb_error *err);
void lb_prot_drop_save(struct prot *p); /* of a state that is being saved, if one is */
/* The cards and writable disks that the VM has now; caller frees. NULL: err. */
char *lb_prot_parts(struct prot *p, struct lb_error *err);
/* Until every captured epoch is acked; false: it will not be. */
bool lb_prot_drain(struct prot *p, uint64_t deadline_ns);

/* protect_ship.c */
int lb_prot_ship_start(struct prot *p, struct lb_error *err);
void lb_prot_ship_stop(struct prot *p);
bool lb_prot_on_message(const Lb__Control *m, void *prot); /* control reader */
/* Wait for the link's limit after `bytes` went out; false when told to stop. */
void lb_prot_pace(struct prot *p, uint64_t bytes);
uint64_t lb_prot_acked(struct prot *p); /* the last epoch that the backup has; 0: none */
/* From now on Acks release output. Engine thread, record is PROTECTED. */
void lb_prot_release_from_now(struct prot *p);
int lb_prot_send(struct prot *p, Lb__Control *m, struct lb_error *err);

/* status.c */
void lb_prot_report(struct prot *p, bool force);

/* ahead.c */
/* Keeps what the backup was told of the VM, for lb_remus_ask_ahead; best effort. */
void lb_prot_keep_request(const struct prot *p, Lb__ProtectSpec *spec);

#endif
