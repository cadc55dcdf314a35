/*
 * remus/disk.h - disks that follow their VM, epoch by epoch.
 *
 * Primary: QEMU's blockdev-mirror (write-blocking) -> nbdkit with our plugin
 * (remus/nbdkit/lifeboat-nbdkit-plugin.c), one export per disk -> unix socket -> our reader thread, which
 * always reads (a full socket would keep QEMU's `stop` from draining) and queues in memory.
 * The plugin answers a request when its bytes are in the socket: so when lb_hv_stop has returned, every
 * write of the epoch can be read until EAGAIN.
 *
 *   syncing  operations are handed to `direct` in order, as they come (the first copy)
 *   epochs   they are queued; cut() takes what belongs to the epoch that ends
 *
 * Backup: one target per disk, raw or qcow2. An epoch's operations are applied together, in their
 * order, and made durable (guest flushes are not forwarded).
 */
#ifndef LB_REMUS_DISK_H
#define LB_REMUS_DISK_H

#include "core/hv.h"

#define LB_DISK_OP_MAX (1u << 20)  /* bytes of one write; longer ones are split */

enum lb_disk_op_kind { LB_DISK_WRITE = 1, LB_DISK_ZERO = 2 };
struct lb_disk_op {
    uint32_t disk;         /* index in the disk table of the protection */
    enum lb_disk_op_kind kind;
    uint64_t offset, len;  /* bytes; WRITE: len <= LB_DISK_OP_MAX */
    const void *data;      /* WRITE: len bytes */
};
/* An ordered list of operations that owns its data. Overwritten operations may have been dropped. */
struct lb_disk_ops {
    struct lb_disk_op *v;
    unsigned n;
    uint64_t bytes;        /* sum of data */
};
void lb_disk_ops_free(struct lb_disk_ops *o); /* contents; NULL is fine */

/* ---- primary */
struct lb_disk_source;
struct lb_disk_source_opts {
    const char *run_dir;     /* private directory: sockets, log */
    uint64_t limit_bytes;    /* of one epoch; beyond it `pressure` is called once per epoch; 0 = 64 MiB */
    /* Reader thread. A first-copy operation; blocks while the link is busy (back-pressure). */
    int (*direct)(const struct lb_disk_op *op, void *arg, struct lb_error *err);
    void (*pressure)(void *arg);   /* reader thread: stop the guest soon */
    void (*failed)(const struct lb_error *why, void *arg); /* reader thread: nbdkit died, ... */
    void *arg;
};
/* Is nbdkit with our plugin there? (for preflight) */
int lb_disk_source_check(struct lb_error *err);
/* Disks that cannot be replicated (shared writable, unknown size): "what: why: remedy", malloc'ed vector. */
char **lb_disk_blockers(const struct lb_hv_disk *disks, unsigned n);
/* Starts nbdkit (ends with us: PR_SET_PDEATHSIG), exports "0", "1", ... */
int lb_disk_source_open(const struct lb_hv_disk *disks, unsigned n,
                        const struct lb_disk_source_opts *opts, struct lb_disk_source **out,
                        struct lb_error *err);
const char *lb_disk_source_socket(const struct lb_disk_source *s);
/* From now on queue. VM stopped. On return every earlier operation has gone through `direct`. */
int lb_disk_source_queue(struct lb_disk_source *s, struct lb_error *err);
/* VM stopped: everything written since the last cut. begin returns at once, end waits until all is read. */
void lb_disk_source_cut_begin(struct lb_disk_source *s);
int lb_disk_source_cut_end(struct lb_disk_source *s, struct lb_disk_ops *out, struct lb_error *err);
uint64_t lb_disk_source_backlog(struct lb_disk_source *s); /* bytes queued in this epoch; any thread */
void lb_disk_source_close(struct lb_disk_source *s);

/* ---- backup */
struct lb_disk_target;
/* An existing image of at least size_bytes (raw: regular file or block device), or a new one when
 * missing. qcow2 goes through qemu-nbd and libnbd. Locked against others while open. LB_E_EXISTS-like
 * errors say what to do. same_as: dev:inode:boot-id of the primary's file ("" unknown): the very same
 * file is refused (LB_E_PREFLIGHT: map its path). */
int lb_disk_target_open(const char *path, const char *format, uint64_t size_bytes,
                        const char *same_as, const char *run_dir, struct lb_disk_target **out,
                        struct lb_error *err);
/* "dev:inode:boot-id" of a file of this host. */
void lb_disk_file_identity(char out[128], const char *path);
int lb_disk_target_apply(struct lb_disk_target *t, const struct lb_disk_op *op,
                         struct lb_error *err);
/* Durable on return. */
int lb_disk_target_flush(struct lb_disk_target *t, struct lb_error *err);
/* Flushes; the image can be opened by QEMU on return. NULL is fine. */
int lb_disk_target_close(struct lb_disk_target *t, struct lb_error *err);

#endif
