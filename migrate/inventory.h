/*
 * migrate/inventory.h - hosts and VMs as the planner of evacuations (plan.h) sees them, and their JSON.
 *
 *   {
 *     "setup_s": 0.35,                  fixed work of one migration: launch, handshake, hand-over (seconds of one CPU)
 *     "downtime_ms": 30,                last part of memory that a pause may cost
 *     "evacuate": ["a"], "to": ["b"],   defaults of --evacuate and --to
 *     "hosts": [{
 *       "name": "a",                    unique
 *       "memory_bytes": "64G",
 *       "reserved_bytes": "1G",         never given to VMs
 *       "used_bytes": 0,                taken by what is not in "vms"
 *       "cpus": 8,
 *       "cpu": "epyc", "generation": 3, model of the processor, newer ones have higher numbers
 *       "features": ["avx2"], "tags": ["ssd"],
 *       "link_bytes_per_s": "10Gbit",   each way
 *       "maintenance": false            takes no VMs
 *     }],
 *     "vms": [{
 *       "name": "web1", "host": "a",    unique; one of the hosts
 *       "memory_bytes": "4G",
 *       "touched_bytes": "1G",          what is sent first; missing or above memory_bytes: all of it
 *       "dirty_bytes_per_s": "20M",     sampled
 *       "cpu": "epyc", "generation": 2, runs on this model only, of this generation or newer
 *       "features": ["avx2"],           the host must have them
 *       "require_tags": ["ssd"], "forbid_tags": ["test"],
 *       "together": ["db"],             groups that share one host
 *       "apart": ["web"],               groups of which no two share a host
 *       "priority": 10,                 higher ones leave first
 *       "backup": "b",                  protected: a copy is on that host and takes memory_bytes there
 *       "blockers": [{"message": "has a passed-through card", "remedy": "unplug it"}]
 *     }]
 *   }
 *
 * Of a host "name", "memory_bytes" and "link_bytes_per_s" are needed, of a VM "name", "host" and
 * "memory_bytes". Bytes are numbers or strings with a unit. A field that is not listed is an error.
 */
#ifndef LB_INVENTORY_H
#define LB_INVENTORY_H

#include "core/core.h"

#define LB_INV_NONE UINT32_MAX
#define LB_INV_MAX_BYTES (UINT64_C(1) << 50)  /* of one field: no sum of them overflows */
#define LB_INV_MAX_FILE (UINT64_C(1) << 30)

/* Ascending, each once: indices of words (features, tags, groups) or hosts. */
struct lb_inv_set {
    uint32_t *ids;
    uint32_t n;
};
struct lb_inv_blocker {
    char *message, *remedy;   /* remedy: "" when there is none */
};
struct lb_inv_host {
    char *name;
    uint64_t memory_bytes, reserved_bytes, used_bytes;
    uint32_t cpus;            /* default 1 */
    char *cpu;                /* NULL: not said */
    uint32_t generation;
    struct lb_inv_set features, tags;
    uint64_t link_bytes_per_s;
    bool maintenance;
};
struct lb_inv_vm {
    char *name;
    uint32_t host, backup;    /* indices; backup LB_INV_NONE: not protected */
    uint64_t memory_bytes, touched_bytes, dirty_bytes_per_s;
    char *cpu;                /* NULL: any */
    uint32_t generation;
    struct lb_inv_set features, require_tags, forbid_tags, together, apart;
    uint32_t priority;
    struct lb_inv_blocker *blockers;
    uint32_t n_blockers;
};
struct lb_inventory {
    double setup_s, downtime_ms;
    struct lb_inv_host *hosts;
    struct lb_inv_vm *vms;
    char **words;             /* what the ids of features, tags and groups mean */
    uint32_t n_hosts, n_vms, n_words;
    struct lb_inv_set evacuate, to;
};

/* Any thread. LB_E_USAGE names the line (no JSON) or the field; *out is untouched on failure. */
int lb_inventory_parse(const char *text, size_t len, struct lb_inventory *out, struct lb_error *err);
int lb_inventory_load(const char *path, struct lb_inventory *out, struct lb_error *err);
/* The same as JSON text (caller frees). */
char *lb_inventory_dump(const struct lb_inventory *inv);
void lb_inventory_free(struct lb_inventory *inv); /* leaves it zeroed */

bool lb_inv_has(const struct lb_inv_set *s, uint32_t id);
/* Index of a host, LB_INV_NONE when there is none of that name. */
uint32_t lb_inv_host_find(const struct lb_inventory *inv, const char *name);

#endif
