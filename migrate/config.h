/*
 * migrate/config.h - the configuration file of one host (lifeboatd --config).
 *
 * Lines of `key = value`, # comments:
 *   listen = 0.0.0.0:7007
 *   name = hostA                          # how we call ourselves in messages
 *   emulator = /usr/bin/qemu-system-x86_64 -> /opt/qemu/bin/qemu-system-x86_64
 *   path = /run/vm-a -> /run/vm-b         # prefix, in files and sockets of incoming command lines
 *   tap = tap0 -> vnet3
 *   memory-reserve = 512M                 # never promised to an incoming VM
 *   bandwidth = 1Gbit                     # default of migrate
 *   max-downtime = 300ms                  # allowed; we aim at 30 ms
 *   channels = 2
 *   compress = auto
 *   throttle = yes
 *   witness = etcd:http://w1:2379,http://w2:2379   # defaults of protect
 *   backup = hostB, hostC
 *   lease = 200ms
 *   checkpoint-dir = /srv/lifeboat        # default: STATE_DIR/checkpoints
 *   checkpoint-key = /etc/lifeboat/ckpt.key   # encrypt every checkpoint of this host with it
 *   checkpoint-level = 1                  # zstd
 *   tag = ssd                             # what VMs may need of a host, or avoid; any number of times
 *   link = 10Gbit                         # of this host to others, each way; default: measured
 *   together = db: db1, db2               # a group: on one host. Names or patterns (fnmatch) of VMs
 *   apart = web: web1, web2*              # a group: no two on one host
 *   require-tag = db1: ssd                # VMs of this pattern go to hosts with these tags only
 *   forbid-tag = web*: slow               # ... never to hosts with one of these
 *   vm-priority = web1: 10                # higher ones leave first; default 0
 *   directory = etcd:http://w1:2379       # where hosts find each other; default: the witness, when that is etcd
 */
#ifndef LB_CONFIG_H
#define LB_CONFIG_H

#include "core/core.h"
#include "core/hv.h"

/* "NAME: ITEM, ITEM": a group and its VMs, or a pattern of VMs and what holds for them. */
struct lb_vm_rule {
    char *name;
    char **items;                    /* NULL-terminated; of vm-priority none */
    uint32_t priority;               /* of vm-priority */
};
struct lb_vm_rules {
    struct lb_vm_rule *v;
    unsigned n;
};
struct lb_host_config {
    char listen[280];
    char name[128];
    struct lb_path_map *emulators, *paths, *taps;
    unsigned n_emulators, n_paths, n_taps;
    uint64_t memory_reserve_bytes;   /* default 256 MiB */
    uint64_t bandwidth_bytes_per_s;  /* default 0: no limit */
    uint32_t max_downtime_ms;        /* default 300 */
    uint32_t channels;               /* default 0: automatic */
    char compress[32];               /* "auto" | "off" | "zstd" | "zstd:LEVEL" */
    bool throttle;
    char witness[1024];              /* "": none; else as lb_witness_open takes it */
    char backup[1024];               /* names of hosts, separated by commas; "": none */
    uint32_t lease_ms;               /* 0: LB_LEASE_MS (remus/lease.h) */
    char checkpoint_dir[512];        /* "": STATE_DIR/checkpoints */
    char checkpoint_key[512];        /* "": not encrypted unless asked */
    int checkpoint_level;            /* 0: 1 */
    char **tags;                     /* NULL-terminated; NULL: none */
    uint64_t link_bytes_per_s;       /* 0: to be measured */
    struct lb_vm_rules together, apart, require_tags, forbid_tags, priorities;
    char directory[1024];            /* as witness: "etcd:URL,..."; "": none */
};
#define LB_LEASE_LOWEST_MS 50u
#define LB_LEASE_HIGHEST_MS 60000u
#define LB_CONFIG_DEFAULT_PATH "/etc/lifeboat/lifeboatd.conf"

/* path NULL: defaults. LB_CONFIG_DEFAULT_PATH may be missing (defaults), any other
 * path may not. Errors (LB_E_USAGE) name file and line; *out is untouched on failure. */
int lb_config_load(const char *path, struct lb_host_config *out, struct lb_error *err);
void lb_config_free(struct lb_host_config *c); /* leaves it zeroed; NULL is fine */

/* Does the spec of a witness name a kind of witness? The rest is lb_witness_open's to judge. */
int lb_witness_spec_check(const char *spec, struct lb_error *err);

/* The directory of hosts: as configured, or the witness when it is an etcd; NULL: none. Owned by c. */
const char *lb_config_directory(const struct lb_host_config *c);
/* Does a pattern of a rule mean this VM? */
bool lb_vm_matches(const char *pattern, const char *vm);
/* By the exact name, else by the first pattern that fits; 0: by none. */
uint32_t lb_config_priority(const struct lb_host_config *c, const char *vm);

/* What a file name of an incoming command line is called here: the longest matching
 * prefix is replaced, whole path components only ("/run/vm-a" does not match
 * "/run/vm-ab"). Caller frees. */
char *lb_map_path(const struct lb_path_map *maps, unsigned n, const char *path);
/* Whole-name replacement (emulators, taps). Returns `name` or a string owned by maps. */
const char *lb_map_name(const struct lb_path_map *maps, unsigned n, const char *name);

#endif
