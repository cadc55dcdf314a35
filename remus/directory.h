/*
 * remus/directory.h - where hosts find each other: keys of an etcd, by default the one that is the witness.
 *
 *   lifeboat/hosts/NAME/FINGERPRINT   under a lease of LB_DIRECTORY_LEASE_S, written again every LB_DIRECTORY_EVERY_S
 *   { "name", "key": "lb1...", "address": "HOST:PORT", "host": {... as in a fragment (migrate/capacity.h), without "features"},
 *     "vms": how many run there }
 *
 * Anybody who reaches the etcd can write it: what is read says where to ask, and of whom to tell. Whether a host is trusted
 * is decided by its key alone, and what it has is what it answers itself.
 */
#ifndef LB_DIRECTORY_H
#define LB_DIRECTORY_H

#include <jansson.h>

#include "core/core.h"
#include "netproto/netproto.h"

#define LB_DIRECTORY_LEASE_S 30
#define LB_DIRECTORY_EVERY_S 10

struct lb_directory_host {
    struct lb_host host;       /* as it calls itself; checked: can be shown and connected to */
    uint64_t memory_bytes;     /* 0: it does not say */
    bool maintenance;
};

/* The address by which this host says it can be reached: of `listen`, with the address that it has towards the directory when
 * that names none. LB_E_NET. */
int lb_directory_address(const char *spec, const char *listen, char out[280], struct lb_error *err);
/* Blocks until deadline_ns at most. fragment: lb_capacity_fragment's. */
int lb_directory_publish(const char *spec, const char *address, const json_t *fragment, uint64_t deadline_ns,
                         struct lb_error *err);
/* Every host that is there, this one too; entries that make no sense are left out. Caller frees. */
int lb_directory_read(const char *spec, uint64_t deadline_ns, struct lb_directory_host **v, unsigned *n, struct lb_error *err);

#endif
