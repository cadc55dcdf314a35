/*
 * migrate/capacity.h - what hosts have and run, as the planner of evacuations (plan.h) needs it.
 *
 *   this host    survey.c          its VMs: their memory, how fast they dirty it, what hinders them
 *                capacity.c        the fragment: what a host tells others of itself
 *   other hosts  capacity.c        asking for theirs, and which of our VMs they could not take
 *                link.c            what the network carries to them
 *   all of it    capacity_merge.c  one inventory (inventory.h)
 *
 * A fragment is JSON:
 *   { "key": "lb1...",              the host's
 *     "host": {...},                as in "hosts" of inventory.h; "features" are words "CPUID.7.0.EBX:0x0..." (32 bits each);
 *                                   "link_bytes_per_s" only when it is configured there
 *     "vms": [{"name", "memory_bytes", "touched_bytes", "together", "apart", "priority", "backup": KEY}],  those that run
 *                                   there; touched: what the process occupies
 *     "kept": [{"name", "memory_bytes", "of": KEY}] }    memory that VMs of other hosts have there: standbys, and those coming
 * Hosts mean each other by their keys, as each has names of its own for the others ("": a key it does not know).
 *
 * Memory: a VM counts with all that a receiver of it asks for (lb_preflight_need_bytes), whatever it has touched so far;
 * "used" is what is not available on the host and not in the processes of its VMs.
 *
 * Processors: under KVM a guest may go where all features that it sees and that the processor of its host has are there too;
 * what KVM or TCG make up is the same everywhere. The receiver compares all of them before anything is sent.
 */
#ifndef LB_CAPACITY_H
#define LB_CAPACITY_H

#include <jansson.h>

#include "migrate/inventory.h"
#include "migrate/migrate.h"
#include "migrate/preflight.h"

/* ---- this host (capacity.c). Any thread. */
/* "host" of the fragment, of "vms" and "kept" as above. NULL and *err. */
json_t *lb_capacity_fragment(const char *state_dir, const struct lb_host_config *cfg, const uint8_t pub[LB_KEY_BYTES],
                             struct lb_error *err);
/* Guest memory as the command line of a QEMU says. */
uint64_t lb_capacity_ram_of(char *const *argv);
/* What a process occupies, huge pages too; 0: it is gone. */
uint64_t lb_capacity_resident(pid_t pid);

/* ---- its VMs (survey.c) */
struct lb_survey_vm {
    char name[128];
    char backup[128];            /* protected: the host's name here; "": it is not */
    uint64_t memory_bytes;       /* lb_preflight_need_bytes */
    uint64_t touched_bytes;
    uint64_t dirty_bytes_per_s;  /* now, or the last time when a session is at work on it */
    bool sampled;                /* now */
    bool described;
    struct lb_vm_desc desc;      /* with described */
    struct lb_report blockers;   /* only what fails */
};
struct lb_survey_opts {
    const char *state_dir;
    const struct lb_hv_ops *hv;
    unsigned window_ms;          /* how long each is watched; 0: LB_SURVEY_WINDOW_MS */
    unsigned parallel;           /* at once; 0: LB_SURVEY_PARALLEL */
    int cancel_fd;               /* -1: none */
};
#define LB_SURVEY_WINDOW_MS 400u
#define LB_SURVEY_PARALLEL 16u
/* Every VM that runs here and could leave, sorted by name. Each is held by its lock while it is looked at; its guest runs on. What
 * cannot be looked at is in the list all the same, with what is known without. Blocks (threads of its own). */
int lb_survey(const struct lb_survey_opts *o, struct lb_survey_vm **v, unsigned *n, struct lb_error *err);
void lb_survey_free(struct lb_survey_vm *v, unsigned n);

/* ---- other hosts */
struct lb_refused {
    char *vm, *message, *remedy;
};
/* What one other host said, or why it said nothing. */
struct lb_peer {
    struct lb_host host;         /* name: as it is called here; address: where it was asked */
    char key[LB_KEY_TEXT_BYTES];
    json_t *fragment;            /* NULL: error says why */
    struct lb_error error;
    struct lb_refused *refused;  /* what it said of our VMs */
    unsigned n_refused;
    uint64_t link_bytes_per_s;   /* measured or configured there; 0: not known */
    bool measured;
};
/* p->host is set. Fills the rest but for the link; -1 with p->error, too. Blocks for some seconds at most. */
int lb_capacity_ask(const struct lb_identity *me, struct lb_peer *p, const struct lb_vm_desc *const *check,
                    unsigned n_check, int cancel_fd);
void lb_peer_free(struct lb_peer *p);

/* What a session to that host would reach, bytes/s: a quarter of a second, or what STATE_DIR/links.json has from the last
 * ten minutes. */
int lb_link_measure(const char *state_dir, const struct lb_identity *me, struct lb_peer *p, int cancel_fd,
                    struct lb_error *err);
/* What this host sends to several at the same time, the first LB_LINK_AT_ONCE of v: more than to one when its own link is the wider
 * one. As above. */
#define LB_LINK_AT_ONCE 4u
int lb_link_measure_own(const char *state_dir, const struct lb_identity *me, struct lb_peer *const *v, unsigned n,
                        int cancel_fd, uint64_t *bytes_per_s, struct lb_error *err);

/* Serving (in.c): the first message came. */
int lb_capacity_serve(const struct lb_session_env *env, struct lb_chan *chan, const char *peer,
                      const Lb__CapacityQuery *q, struct lb_error *err);
int lb_link_serve(struct lb_chan *chan, const Lb__LinkTest *t, struct lb_error *err);

/* ---- what a migration costs beside its bytes (medians.c): medians of the last 20 that left this host and went well; untouched when
 * there is none. */
void lb_migration_medians(const char *state_dir, double *setup_s, double *downtime_ms);

/* ---- all of it (capacity_merge.c) */
struct lb_merge {
    const struct lb_host_config *cfg;
    const char *self;                    /* name of this host, none of the peers' */
    json_t *fragment;                    /* its own */
    const struct lb_survey_vm *vms;
    unsigned n_vms;
    struct lb_peer *peers;               /* one whose fragment is wrong gets its error here, and is not used */
    unsigned n_peers;
    const json_t *priorities;            /* {"NAME or pattern": 10}; NULL: as configured */
    char *const *excluded;               /* "VM\tHOST" */
    size_t n_excluded;
    uint64_t bandwidth_bytes_per_s;      /* 0: what the links carry */
    uint64_t own_link_bytes_per_s;       /* measured to several at once; 0: not */
    double setup_s, downtime_ms;
};
int lb_capacity_merge(struct lb_merge *m, struct lb_inventory *out, struct lb_error *err);
/* Why VM may not go to the host of that name, of what a peer said or was excluded; NULL: nothing is said. */
const char *lb_merge_refusal(const struct lb_merge *m, const char *vm, const char *host, const char **remedy);

#endif
