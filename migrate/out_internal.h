/*
 * migrate/out_internal.h - the source session, shared by its files only.
 *
 *   out.c         the whole from above, interruption, hand-over, failure
 *   out_setup.c   attach, connect, preflight, agreement about blocks and connections
 *   out_rounds.c  pre-copy rounds and the stop-and-copy
 *
 * All functions are called by the engine thread, return 0 or -1, and leave undoing to
 * the end of lb_migrate_out.
 */
#ifndef LB_OUT_INTERNAL_H
#define LB_OUT_INTERNAL_H

#include "migrate/migrate_internal.h"

enum lb_out_state {
    S_CONNECT, S_PREFLIGHT, S_LAUNCH, S_ROUNDS, S_FINAL, S_WAIT, S_HANDED_OVER, S_DONE, S_FAILED,
    S_UNDECIDED,
};

#define MAX_ROUNDS 256
#define SETUP_TIMEOUT_NS UINT64_C(60000000000)
/* The guest is paused meanwhile. --verify reads all memory at both ends: 2 s a GiB on top. */
#define PREPARED_TIMEOUT_NS UINT64_C(20000000000)
#define RUNNING_TIMEOUT_NS UINT64_C(20000000000)
#define RESUME_FOR_NS UINT64_C(60000000000)
#define RESOLVE_FOR_NS UINT64_C(30000000000)

struct out {
    /* immutable */
    const struct lb_session_env *env;
    const struct lb_host *to;
    const struct lb_migrate_opts *opts;
    struct lb_migrate_result *res;
    struct lb_host_config cfg;
    bool have_cfg;

    /* engine thread */
    struct lb_sm sm;
    struct lb_vm_entry entry;
    struct lb_journal journal;
    bool journalled;
    struct lb_hv_vm *vm;
    struct lb_vm_desc desc;
    struct lb_chan *chan;
    struct lb_ctl_queue *ctl;
    struct lb_bulk_keys keys;
    const struct lb_ram_block *blocks;
    unsigned n_blocks, n_threads;
    struct lb_bitmap *dirty;
    struct lb_sender *sender;
    struct lb_frames *frames;
    bool logging, throttled, stopped, saving, reached_peer;
    unsigned throttle_percent;
    uint64_t t_start, t_round, t_clean, t_stop, t_report;
    double stop_ms;          /* of recent micro-stops: what a pause costs here */
    double dirty_rate, throughput;
    uint64_t bytes_seen, bytes_seen_ns;
    struct lb_round_stats rounds[MAX_ROUNDS];
    unsigned n_rounds;
    uint64_t round_pages, wire_before;
    struct lb_progress prog;

    /* locked by mu */
    pthread_mutex_t mu;
    bool cancelled, decided, aborting;
    struct lb_sender *abort_sender;
    struct lb_ctl_queue *abort_ctl;

    pthread_t watcher;
    int watcher_stop;
    bool watching;
};

/* out.c */
uint64_t lb_out_ms_since(uint64_t t_ns);
/* An error that only says "connection aborted" hides who aborted and why: put that. -1. */
int lb_out_explain(struct out *o, struct lb_error *err);
/* -1 when somebody wants us to stop. */
int lb_out_check_interrupt(struct out *o, struct lb_error *err);
void lb_out_report(struct out *o, bool force);
void lb_out_move(struct out *o, enum lb_out_state to);
void lb_out_note(struct out *o, const char *text);
void *lb_out_watcher(void *out);     /* thread: cancel_fd -> interruption */
void lb_out_channel_ended(void *out); /* the control reader's on_end */

/* out_setup.c, in this order */
int lb_out_open(struct out *o, struct lb_report *mine, struct lb_error *err);
int lb_out_preflight(struct out *o, struct lb_report *mine, struct lb_error *err);
/* From now on a crash leaves something to clean up: says so on disk. */
int lb_out_begin_journal(struct out *o, struct lb_error *err);
int lb_out_setup(struct out *o, struct lb_error *err);

/* out_rounds.c */
/* stop, fetch and clear the log into dirty[], continue. */
int lb_out_micro_stop(struct out *o, struct lb_error *err);
/* What the guest wrote since the last clean, without clearing. */
int lb_out_count_dirty(struct out *o, uint64_t *pages, struct lb_error *err);
int lb_out_precopy(struct out *o, struct lb_error *err);
int lb_out_stop_and_copy(struct out *o, struct lb_error *err);
int lb_out_wait_prepared(struct out *o, struct lb_error *err);

#endif
