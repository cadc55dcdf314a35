/*
 * migrate/out_internal.h - the source session, shared by its files only.
 *
 *   out.c         the whole from above, interruption, hand-over, failure
 *   tx.c          attach, connect, preflight, blocks, connections: also of a protection
 *   out_setup.c   journal, forecast
 *   out_rounds.c  pre-copy rounds and the stop-and-copy
 *
 * All functions are called by the engine thread, return 0 or -1, and leave undoing to
 * the end of lb_migrate_out.
 */
#ifndef LB_OUT_INTERNAL_H
#define LB_OUT_INTERNAL_H

#include "migrate/migrate_internal.h"
#include "migrate/tx.h"

enum lb_out_state {
    S_CONNECT, S_PREFLIGHT, S_LAUNCH, S_READY, S_ROUNDS, S_FINAL, S_WAIT, S_HANDED_OVER, S_DONE, S_FAILED,
    S_UNDECIDED,
};

#define MAX_ROUNDS 256
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

    struct lb_tx tx;         /* VM, connections, dirty[]; see there for threads */

    /* engine thread */
    struct lb_sm sm;
    struct lb_vm_entry entry;
    struct lb_journal journal;
    bool journalled;
    struct lb_frames *frames;
    bool throttled, saving;
    unsigned throttle_percent;
    uint64_t t_start;        /* moved on by the time spent waiting for a go */
    uint64_t t_round, t_report;
    double dirty_rate, throughput;
    uint64_t bytes_seen, bytes_seen_ns;
    struct lb_round_stats rounds[MAX_ROUNDS];
    unsigned n_rounds;
    uint64_t round_pages, wire_before;
    unsigned replaced_seen;
    struct lb_progress prog;
};

/* out.c */
uint64_t lb_out_ms_since(uint64_t t_ns);
void lb_out_report(struct out *o, bool force);
void lb_out_move(struct out *o, enum lb_out_state to);
void lb_out_note(struct out *o, const char *text);

/* out_setup.c, in this order */
/* From now on a crash leaves something to clean up: says so on disk. */
int lb_out_begin_journal(struct out *o, struct lb_error *err);
int lb_out_setup(struct out *o, struct lb_error *err);
/* Nothing without opts.wait_go. */
int lb_out_wait_go(struct out *o, struct lb_error *err);

/* out_rounds.c */
int lb_out_precopy(struct out *o, struct lb_error *err);
int lb_out_stop_and_copy(struct out *o, struct lb_error *err);
int lb_out_wait_prepared(struct out *o, struct lb_error *err);

#endif
