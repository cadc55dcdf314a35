/*
 * migrate/tx.h - the source's side of a transfer, up to and including the pre-copy rounds: what a
 * migration and the beginning of a protection have in common.
 *
 *   init -> open (attach, connect) -> preflight -> launch (log, Ready, block table) -> connect
 *        -> { round: sender, RoundDone; pause / micro-stop }* -> close
 *
 * All functions are called by the engine thread and return 0 or -1; undoing is the caller's.
 * Ending it early: the watcher thread (cancel_fd) and the control reader (the peer failed or went
 * away) set a flag, abort the bulk connections and end the wait for a message, so that the engine,
 * wherever it waits, comes back with an error; none of it once `decided` is set.
 */
#ifndef LB_TX_H
#define LB_TX_H

#include <pthread.h>

#include "migrate/ctl.h"
#include "migrate/journal.h"
#include "migrate/migrate.h"
#include "migrate/preflight.h"
#include "migrate/sender.h"
#include "migrate/transport.h"

#define LB_TX_ROUND_TIMEOUT_NS UINT64_C(20000000000) /* placing the last page of a round */

struct lb_tx {
    /* set by the caller between init and open */
    const struct lb_session_env *env;
    const struct lb_host *to;
    const struct lb_vm_entry *entry;
    const struct lb_migrate_opts *opts;
    const char *what, *verb;          /* "migration", "migrate": for messages */
    uint8_t token[LB_TOKEN_BYTES];
    Lb__ProtectSpec *protect;         /* NULL: a migration */
    /* Besides the above: somebody wants us to stop (cancel), or the peer is gone. May run more
     * than once, in the watcher or the control reader, also when decided. May be NULL. */
    void (*on_interrupt)(bool cancel, void *arg);
    void *arg;

    /* engine thread */
    struct lb_host_config cfg;
    struct lb_hv_vm *vm;
    struct lb_vm_desc desc;
    struct lb_chan *chan;
    struct lb_ctl_queue *ctl;
    struct lb_bulk_keys keys;
    Lb__TransportWish *wish;          /* as sent */
    struct lb_rdma_addr rdma[LB_RDMA_MAX_ADDRS]; /* where the destination listens */
    unsigned n_rdma;                  /* 0: TCP, from the beginning or since a connection failed */
    char why_tcp[512];                /* RDMA was agreed, and cannot be had; "" when it can */
    bool zero_copy;
    Lb__Control *last_done;           /* RoundDone of the last round: what is bad there */
    uint64_t damaged_pages;           /* bad without having been written by the guest */
    const struct lb_ram_block *blocks;
    unsigned n_blocks, n_threads;
    struct lb_bitmap *dirty;          /* per block: what is to be sent */
    struct lb_sender *sender;
    bool have_cfg, logging, reached_peer;
    bool stopped;                     /* the guest is, or may be, paused by us */
    uint64_t t_stop, t_clean;         /* of the last pause; when the log was last fetched */
    double stop_ms;                   /* of recent micro-stops: what a pause costs here */

    /* locked by mu */
    pthread_mutex_t mu;
    bool cancelled, decided, aborting;
    struct lb_sender *abort_sender;
    struct lb_ctl_queue *abort_ctl;

    pthread_t watcher;
    int watcher_stop;
    bool watching;
};

/* Zeroes *t, makes the keys. All five pointers must outlive *t. */
void lb_tx_init(struct lb_tx *t, const struct lb_session_env *env, const struct lb_host *to,
                const struct lb_vm_entry *entry, const struct lb_migrate_opts *opts);
int lb_tx_open(struct lb_tx *t, struct lb_report *mine, struct lb_error *err);
/* The request, both reports shown; LB_E_PREFLIGHT when either refuses. */
int lb_tx_preflight(struct lb_tx *t, const struct lb_report *mine, struct lb_error *err);
/* Both sides' checks, either may be NULL, as one report to env->preflight. */
void lb_tx_show_report(const struct lb_session_env *env, const struct lb_report *mine,
                       const Lb__PreflightReport *theirs);
/* The dirty log, while the destination launches its receiver; the block table. On return dirty[]
 * is what round 0 has to send. */
int lb_tx_launch(struct lb_tx *t, struct lb_error *err);
/* The sender's connections; *extra, when not NULL: one more with the next index. */
int lb_tx_connect(struct lb_tx *t, struct lb_bulk **extra, struct lb_error *err);

/* stop, fetch the log into dirty[] and clear it; the guest stays paused. */
int lb_tx_pause(struct lb_tx *t, uint64_t *pages, struct lb_error *err);
/* Guest paused: once more. */
int lb_tx_fetch_log(struct lb_tx *t, uint64_t *pages, struct lb_error *err);
int lb_tx_continue(struct lb_tx *t, struct lb_error *err);
/* The log begins anew; what was in it is to be sent, besides what is in dirty[] already. */
int lb_tx_restart_log(struct lb_tx *t, struct lb_error *err);
/* pause + continue */
int lb_tx_micro_stop(struct lb_tx *t, struct lb_error *err);
/* What the guest wrote since the log was fetched, without clearing. */
int lb_tx_count_dirty(struct lb_tx *t, uint64_t *pages, struct lb_error *err);
uint64_t lb_tx_dirty_total(const struct lb_tx *t); /* pages in dirty[] */
/* Until the destination has placed the round. tick: now and then, -1 ends it; may be NULL. */
int lb_tx_wait_round(struct lb_tx *t, uint32_t round,
                     int (*tick)(void *arg, struct lb_error *err), void *arg,
                     struct lb_error *err);

/* The same for the last rounds, after the sender is done with them: RoundDone of earlier ones is passed over. */
int lb_tx_wait_done(struct lb_tx *t, uint32_t round, bool last, struct lb_error *err);
/* Pages that the last round left bad at the destination become dirty. Returns how many were not. */
uint64_t lb_tx_add_bad(struct lb_tx *t);

/* An error that only says "connection aborted" hides who aborted and why: put that. -1. */
int lb_tx_explain(struct lb_tx *t, struct lb_error *err);
/* -1 when somebody wants us to stop. */
int lb_tx_check_interrupt(struct lb_tx *t, struct lb_error *err);
/* No message is heard or sent from now on: aborts the channel, joins its reader. */
void lb_tx_hang_up(struct lb_tx *t);
/* Joins, closes, detaches from the VM, frees. */
void lb_tx_close(struct lb_tx *t);

#endif
