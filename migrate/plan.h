/*
 * migrate/plan.h - the plan of an evacuation: which VM goes where, in what order, how many at once.
 *
 * Pure: an inventory (inventory.h) in, a plan out; no clock, no threads, the same plan for the same input.
 *
 *   inventory --> place (plan_place.c) --> steps --> time (plan_time.c) --> plan
 *                 largest first, spread          every order and number at once
 *                 by memory and link; packed     worth trying is simulated, the
 *                 and repaired when tight        shortest is kept
 *
 * Memory: a host's reserved and used bytes, its VMs and the backups it keeps never exceed what it
 * has; a host that has too little already gets nothing. Groups: what is "together" moves as one or joins
 * those that stay. A protected VM that goes to the host of its backup swaps roles with it (hardly anything
 * is copied) and gets a new backup; so does every VM whose backup is on a host to empty.
 */
#ifndef LB_PLAN_H
#define LB_PLAN_H

#include <jansson.h>

#include "migrate/inventory.h"

/* What to do with a VM that dirties memory faster than its link carries even when alone on it. */
enum lb_plan_hot { LB_PLAN_THROTTLE, LB_PLAN_SUSPEND, LB_PLAN_LEAVE };

struct lb_plan_opts {
    struct lb_inv_set evacuate;  /* hosts; at least one */
    /* n 0: every host that is not emptied and not in maintenance. Of new backups only those that fit there. */
    struct lb_inv_set to;
    uint32_t parallel;           /* transfers at once out of a host; 0: the best */
    enum lb_plan_hot hot;
};

enum lb_plan_kind {
    LB_PLAN_COPY,    /* migrate */
    LB_PLAN_SWAP,    /* its backup takes over; no memory is copied */
    LB_PLAN_BACKUP,  /* a new backup; the VM runs on */
};
struct lb_plan_step {
    uint32_t vm, from, to;       /* of a backup: from the host that the VM is on then */
    enum lb_plan_kind kind;
    double start_s, end_s, downtime_ms, bytes;  /* expected; bytes sent in all rounds */
    bool alone;                  /* too hot to share a link */
    bool throttled, suspended;   /* opts.hot */
};
struct lb_plan_stay {
    uint32_t vm;
    bool backup;                 /* not the VM but its backup cannot leave or be kept */
    char *reason, *remedy;       /* remedy may be "" */
};
struct lb_plan {
    struct lb_plan_step *steps;  /* by start */
    struct lb_plan_stay *stays;  /* by index of the VM */
    uint32_t n_steps, n_stays, n_hosts;
    uint64_t *before, *after;    /* per host: bytes in use, without what is reserved */
    uint32_t *parallel;          /* per host: transfers at once out of it; 0: nothing leaves */
    double makespan_s, bytes;
    /* One that is set up begins to send only when it is alone on its links, or every share of them is at
     * least this many times what its guest dirties. */
    double margin;
};

/* Any thread. LB_E_USAGE when the options make no sense; VMs that cannot move are no error. */
int lb_plan_make(const struct lb_inventory *inv, const struct lb_plan_opts *opts, struct lb_plan *out,
                 struct lb_error *err);
void lb_plan_free(struct lb_plan *p); /* leaves it zeroed */
const char *lb_plan_kind_name(enum lb_plan_kind kind);
/* plan_json.c: what `lifeboat plan --json` prints, and the most of an evacuation's event "plan" (evacuate.h). */
json_t *lb_plan_json(const struct lb_inventory *inv, const struct lb_plan *p);

#endif
