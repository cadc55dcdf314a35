/*
 * remus/backup_internal.h - the backup's session, shared by its files only.
 *
 *   backup.c          its life from above; setup: checks, launch, first copy
 *   backup_follow.c   epochs, the promise, waiting for a primary that is silent
 *   backup_promote.c  load, claim, run
 *
 *   PREFLIGHT -> LAUNCH -> RECEIVE -> STANDBY ---------------------> LOADED -> CLAIMING -> PROMOTED
 *                                        |   yielded                  ^  |        |
 *                                        +-----> ORPHAN --------------+  |        |
 *                                        |          |  primary silent    |        |
 *   any of them ----> FAILED             +----------+--------------------+--------+--> DISCARDED
 *
 * ORPHAN: nothing comes from the primary any more, or will be listened to; waits for the promise
 * to end, or for a person. From LOADED on there is no way back to STANDBY: a machine that
 * has loaded its state cannot follow. Only CLAIMING can decide that it runs here:
 * the journal of the protection's id says RUNNING, durably, before the guest does.
 *
 * Threads: the engine; the control reader (on_message: promise and flags, nothing that
 * waits); while the first copy lasts, a reader of its disk operations.
 */
#ifndef LB_BACKUP_INTERNAL_H
#define LB_BACKUP_INTERNAL_H

#include <pthread.h>

#include "migrate/rx.h"
#include "remus/disk.h"
#include "remus/lease.h"
#include "remus/remus.h"
#include "remus/stage.h"
#include "remus/witness.h"

enum lb_bk_state {
    BK_PREFLIGHT, BK_LAUNCH, BK_RECEIVE, BK_STANDBY, BK_ORPHAN, BK_LOADED, BK_CLAIMING,
    BK_PROMOTED, BK_DISCARDED, BK_FAILED, BK_N_STATES
};

/* What the primary has said, for the engine. */
struct lb_bk_said {
    bool armed, discard, yielded;
    uint64_t revision;       /* armed */
    uint64_t yielded_epoch;
    uint64_t yielded_ns;     /* when we heard it */
    char reason[128];        /* discard */
};

struct lb_bk {
    /* immutable after setup */
    const struct lb_remus_env *env;
    const Lb__ProtectSpec *spec;
    struct lb_witness *witness;
    struct lb_disk_target **targets;
    unsigned n_targets;

    /* engine thread */
    struct lb_rx rx;
    struct lb_sm sm;
    struct lb_protect_wish wish;
    struct lb_remus_record rec;
    struct lb_collector *coll;
    struct lb_bulk *bulk;    /* of disk operations and epochs; while `copying` the copy thread's */
    uint64_t epoch;          /* last complete one: acknowledged and applied */
    bool yield_asked;
    uint64_t yield_asked_ns, checked_ns;
    struct lb_protect_status st;
    uint64_t reported_ns, rate_ns, rate_epochs, rate_bytes;

    /* the first copy's thread */
    pthread_t copy_thread;
    bool copying;            /* engine: the thread is to be joined */
    struct lb_error copy_error;
    uint64_t copy_epoch;     /* first epoch, when it came already */

    /* locked by mu */
    pthread_mutex_t mu;
    bool copy_done;
    struct lb_lease lease;   /* the promise, from Armed on */
    bool claiming;           /* no beat is answered any more: the promise is not renewed */
    struct lb_bk_said said;
    bool priority_set;       /* control reader */
};

/* --- backup_follow.c */
/* In the control reader: beats are answered at once, the rest is noted; true: dealt with. */
bool lb_bk_on_message(const Lb__Control *m, void *arg);
struct lb_bk_said lb_bk_said(struct lb_bk *b);
/* The first complete epoch has been received: acknowledge, apply, be a standby. */
int lb_bk_take_epoch(struct lb_bk *b, uint64_t epoch, struct lb_error *err);
/* Until it is to be promoted (0), was discarded (sm says so, 0) or failed (-1). */
int lb_bk_follow(struct lb_bk *b, struct lb_error *err);
/* Somebody ends this here: the operator, the death of the receiver, the primary through another
 * connection (the journal says REFUSED). -1 and why. Cheap. */
int lb_bk_check(struct lb_bk *b, struct lb_error *err);
void lb_bk_status(struct lb_bk *b, bool now);
/* For status and log. */
void lb_bk_note(struct lb_bk *b, const char *fmt, ...) LB_PRINTF(2, 3);

/* --- backup_promote.c */
/* Load the last complete epoch; the disks are free for the guest afterwards; the record says PROMOTING. */
int lb_bk_load(struct lb_bk *b, struct lb_error *err);
/* Claim and run. 0: it runs here, or it was lost or discarded (sm says which). */
int lb_bk_claim(struct lb_bk *b, uint64_t since_ns, struct lb_error *err);

/* --- recover.c */
/* No record and no wish of a VM that is not here. */
void lb_bk_forget(const char *state_dir, const char *vm);
/* The registry, history and the wish after a failover; the record is gone afterwards. */
void lb_bk_settle(const struct lb_session_env *env, struct lb_vm_entry *e, struct lb_remus_record *rec,
                  double took_ms);

#endif
