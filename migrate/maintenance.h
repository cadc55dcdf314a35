/*
 * migrate/maintenance.h - a host in maintenance: it takes no VM and is no backup for a new one.
 *
 * STATE_DIR/maintenance.json:
 *   { "on": true, "since_ms": 0, "reason": "evacuation",
 *     "left": [{"vm": "web1", "to": "b", "protected": false, "suspended": false}] }
 * "left" is what leaves, or has left, and what --bring-back asks for: written before a VM leaves (with its "to"), taken
 * out when it is back or did not leave. A suspended one is on this host's disk. With "on" false maintenance is
 * over and the rest of the list is still to be brought back; no file: neither.
 */
#ifndef LB_MAINTENANCE_H
#define LB_MAINTENANCE_H

#include "core/core.h"

struct lb_left_vm {
    char vm[128], to[128];
    bool is_protected, suspended;
};
struct lb_maintenance {
    bool on;
    uint64_t since_ms;         /* wall clock */
    char reason[128];
    struct lb_left_vm *left;   /* each VM once */
    unsigned n_left;
};

/* Any thread. A missing file: zeroed, success. LB_E_STATE: it is damaged; then *m is zeroed but for `on`: who
 * cannot tell takes no VM. */
int lb_maintenance_load(const char *state_dir, struct lb_maintenance *m, struct lb_error *err);
/* Durable; removes the file when there is nothing to say. */
int lb_maintenance_save(const char *state_dir, const struct lb_maintenance *m, struct lb_error *err);
void lb_maintenance_free(struct lb_maintenance *m); /* leaves it zeroed */

struct lb_left_vm *lb_left_find(const struct lb_maintenance *m, const char *vm); /* NULL: not in it */
struct lb_left_vm *lb_left_add(struct lb_maintenance *m, const char *vm);        /* or the one that is there */
void lb_left_remove(struct lb_maintenance *m, const char *vm);

/* The whole as JSON text, as in the file; caller frees. */
char *lb_maintenance_json(const struct lb_maintenance *m);

#endif
