/*
 * migrate/policy.h - convergence: a pure function from statistics to a decision.
 *
 * Called at the end of every pre-copy round, when the next dirty set is known.
 * The ladder when it does not converge, each step with its reason:
 *   more time -> the whole allowed downtime -> compression -> throttle the guest -> give up
 */
#ifndef LB_POLICY_H
#define LB_POLICY_H

#include "core/core.h"
#include "migrate/migrate.h"

struct lb_round_stats {
    uint32_t round;            /* 0 = all memory */
    uint64_t pages_sent;
    uint64_t pages_skipped;    /* dirty again before they were sent: peek said so */
    uint64_t wire_bytes;
    uint64_t duration_ns;
    uint64_t guest_ran_ns;     /* part of it while the guest ran */
    uint64_t dirty_pages_after;/* in the log at the end of the round */
};

enum lb_decision {
    LB_POLICY_CONTINUE,
    LB_POLICY_STOP_AND_COPY,
    LB_POLICY_COMPRESS,        /* continue with compression on */
    LB_POLICY_THROTTLE,        /* continue, guest slowed to `throttle_percent` */
    LB_POLICY_ABORT,
};

struct lb_policy_in {
    const struct lb_round_stats *rounds;  /* all rounds so far, oldest first */
    unsigned n_rounds;
    uint32_t max_downtime_ms;     /* what the operator allows */
    uint32_t aim_downtime_ms;     /* what we try for first; 0: the same */
    double fixed_downtime_ms;     /* measured/estimated: stop + state + load + commits */
    double bytes_per_page;        /* on the wire, recent */
    uint64_t elapsed_ms, timeout_ms;
    uint64_t bandwidth_limit;     /* bytes/s; 0 none */
    bool compress_possible;       /* not on yet, allowed, and it would save */
    bool throttle_possible;       /* allowed, hypervisor can */
    unsigned throttle_percent;    /* now */
};
struct lb_policy_out {
    enum lb_decision decision;
    unsigned throttle_percent;
    double predicted_downtime_ms;
    double eta_s;                 /* < 0 unknown */
    int converges;                /* 1, 0, -1 */
    char reason[200];
};
void lb_policy_decide(const struct lb_policy_in *in, struct lb_policy_out *out);

/* Before it starts: will it converge? From a sampled dirty rate and a link estimate
 * (0 = unknown). Same outputs, decision unused. */
void lb_policy_forecast(uint64_t populated_bytes, double dirty_bytes_per_s, uint64_t working_set_bytes,
                        double link_bytes_per_s, uint32_t max_downtime_ms,
                        struct lb_policy_out *out);

#endif
