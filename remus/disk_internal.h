/*
 * remus/disk_internal.h - inside of disk replication.
 *
 *   disk_queue.c    what an epoch has written: non-overlapping extents
 *   disk_source.c   primary: nbdkit, the reader thread, cuts
 *   disk_target.c   backup: checks, locks, raw images
 *   disk_qcow2.c    backup: qcow2 by way of qemu-nbd
 *   disk_child.c    the two server programs
 */
#ifndef LB_DISK_INTERNAL_H
#define LB_DISK_INTERNAL_H

#include "remus/disk.h"
#include "remus/nbdkit/wire.h"

/* ------------------------------------------------------------ disk_queue.c */

/* The writes of an epoch, the last one of each byte. One thread. Per disk a treap of extents that do not
 * overlap: memory is bounded by what is distinct, however often it is written, and a large zero
 * request is one extent. Whole sectors only (asserted). */
struct lb_disk_queue;
struct lb_disk_queue *lb_disk_queue_new(unsigned n_disks);
void lb_disk_queue_free(struct lb_disk_queue *q); /* NULL is fine */
/* op->data becomes the queue's (malloc'ed). */
void lb_disk_queue_add(struct lb_disk_queue *q, const struct lb_disk_op *op, void *data);
uint64_t lb_disk_queue_bytes(const struct lb_disk_queue *q); /* memory held by data */
/* All of it, sorted by disk and offset; the queue is empty then. */
void lb_disk_queue_take(struct lb_disk_queue *q, struct lb_disk_ops *out);

/* ------------------------------------------------------------ disk_child.c */

/* A server program with a listening unix socket handed to it by the LISTEN_FDS protocol: it can be
 * connected to at once. SIGKILL when the thread that started it dies, unless it outlives that. */
struct lb_disk_child {
    char name[16];
    char socket[108];   /* "" when removed */
    pid_t pid;          /* 0: none */
    int pidfd, log_fd;  /* its stderr: a memfd */
    bool outlives;
};
struct lb_disk_child_opts {
    const char *const *argv;   /* argv[0]: whole path; NULL-terminated */
    const char *socket;
    uint32_t uid, gid;         /* owner of the socket */
    int pass_fd;               /* becomes LB_DISK_CHILD_FD there; -1 none */
    bool outlives;             /* it knows by itself when it is not needed any more */
};
#define LB_DISK_CHILD_FD 4
int lb_disk_child_start(const struct lb_disk_child_opts *opts, struct lb_disk_child *out,
                        struct lb_error *err);
/* Why it is no good (its last words, its exit status when it ends within wait_ms), as *err; -1. */
int lb_disk_child_failed(struct lb_disk_child *c, unsigned wait_ms, struct lb_error *err);
void lb_disk_child_unlink(struct lb_disk_child *c);
/* Wait until it ends by itself, at most grace_ms; then SIGTERM, SIGKILL, or it is left to itself. Frees. None there: fine. */
void lb_disk_child_end(struct lb_disk_child *c, unsigned grace_ms);
/* A program in the usual places; 0 or LB_E_UNSUPPORTED, remedy: the Debian package. */
int lb_disk_find_program(const char *name, const char *package, char path[128],
                         struct lb_error *err);

/* ----------------------------------------------------------- disk_target.c */

/* Implementations of a target: a private struct, freed by close. Offsets were checked. */
struct lb_disk_target_ops {
    int (*apply)(void *priv, const struct lb_disk_op *op, struct lb_error *err);
    int (*flush)(void *priv, struct lb_error *err);
    int (*close)(void *priv, struct lb_error *err);
};
/* ENOSPC and the like, in the words of an operator. */
int lb_disk_write_failed(const char *path, int sys_errno, struct lb_error *err);

/* ------------------------------------------------------------ disk_qcow2.c */

extern const struct lb_disk_target_ops lb_disk_qcow2_ops;
int lb_disk_qcow2_create(const struct lb_disk_target_opts *opts, struct lb_error *err);
int lb_disk_qcow2_open(const struct lb_disk_target_opts *opts, void **priv, uint64_t *size_bytes,
                       struct lb_error *err);

#endif
