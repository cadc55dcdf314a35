/*
 * cmd/daemon/ckpt.h - what sessions, workers and the supervisor have in common about checkpoints.
 */
#ifndef LB_DAEMON_CKPT_H
#define LB_DAEMON_CKPT_H

#include "checkpoint/checkpoint.h"
#include "cmd/daemon/daemon.h"

/* This host's configuration as an engine wants it. `env` has no report and no cancel_fd. */
struct lb_ckpt_host {
    struct lb_host_config cfg;
    char *catalog_dir;
    struct lb_launch_opts launch;
    struct lb_ckpt_env env;
};
int lb_ckpt_host_open(struct lb_ckpt_host *h, const char *state_dir, const char *config_path,
                      struct lb_error *err);
void lb_ckpt_host_close(struct lb_ckpt_host *h); /* leaves it zeroed */

/* The key that was asked for (wiped from k), else that of the file `remembered`, else this host's own;
 * *out NULL: none. `to_write`: this host's own must then be usable; else, to read, it is tried. */
int lb_ckpt_key_for(const struct lb_ckpt_host *h, Lb__RpcKey *k, const char *remembered, bool to_write,
                    struct lb_ckpt_key **out, struct lb_error *err);
/* The key of a request, NULL: it has none. */
Lb__RpcKey *lb_ckpt_key_of(const Lb__RpcRequest *r);
/* Overwrite the passphrase that a request carries; NULL is fine. */
void lb_ckpt_key_wipe(Lb__RpcKey *k);

/* Name of the key file with which a VM was suspended or restored (vms/NAME/key-file): it is needed again by
 * whoever fills its memory after a crash, and by `resume`. "" forgets. */
void lb_ckpt_remember_key(const char *state_dir, const char *vm, const char *key_file);
char *lb_ckpt_remembered_key(const char *state_dir, const char *vm); /* caller frees; NULL none */

/* ---- JSON; see checkpoint.c */
json_t *lb_ckpt_real(double v);      /* null when unknown (< 0) */
json_t *lb_ckpt_entry_json(const struct lb_ckpt_entry *e);
void lb_ckpt_stats_json(json_t *o, const struct lb_ckpt_stats *st);
void lb_ckpt_number_ref(char out[160], const char *vm, uint32_t number);

/* ---- catalog (ckpt_catalog.c), in a worker: ls, show; malloc'ed JSON or NULL */
char *lb_op_catalog_read(struct daemon *d, Lb__RpcCatalog *r, struct lb_error *err);
/* Remove checkpoints of vm (numbers), but none that a VM of this host needs (suspended, or its memory comes from it);
 * its images are joined when it runs here, which needs its lock: it is held by the caller (vm_locked), or taken, or else
 * the images stay. progress as in catalog.h. */
struct sess;
int lb_ckpt_remove(const struct lb_ckpt_host *h, struct sess *s, const char *vm, bool vm_locked,
                   const uint32_t *numbers, unsigned n, const struct lb_ckpt_key *key,
                   void (*progress)(uint64_t done, uint64_t total, void *arg), void *arg,
                   struct lb_prune_result *res, struct lb_error *err);

#endif
