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
/* A list of operations that owns its data: each WRITE's is malloc'ed by itself. As a cut gives them they
 * are sorted by disk and offset and none overlaps another: what was overwritten is gone. */
struct lb_disk_ops {
    struct lb_disk_op *v;
    unsigned n;
    uint64_t bytes;        /* sum of data */
};
void lb_disk_ops_free(struct lb_disk_ops *o); /* contents; NULL is fine */

/* ---- primary */
struct lb_disk_source;
struct lb_disk_source_opts {
    const char *run_dir;     /* private directory: a socket; the VM's group is let in (g+x) when it has to be */
    uint32_t uid, gid;       /* of the VM's process: nobody else may connect */
    uint64_t limit_bytes;    /* of one epoch; beyond it `pressure` is called once per epoch; 0 = 64 MiB */
    /* Reader thread. A first-copy operation; blocks while the link is busy (back-pressure). */
    int (*direct)(const struct lb_disk_op *op, void *arg, struct lb_error *err);
    void (*pressure)(void *arg);   /* reader thread: stop the guest soon */
    /* Reader thread, its last call: nbdkit died, `direct` failed, no memory. The guest goes on, its mirror ends. */
    void (*failed)(const struct lb_error *why, void *arg);
    void *arg;
};
/* Is nbdkit with our plugin there? (for preflight) */
int lb_disk_source_check(struct lb_error *err);
/* Disks that cannot be replicated (shared writable, unknown size): "what: why: remedy", malloc'ed vector. */
char **lb_disk_blockers(const struct lb_hv_disk *disks, unsigned n);
/* Starts nbdkit, exports "0", "1", ... It outlives us: what QEMU still writes is dropped then, and it ends when QEMU has ended
 * its mirrors. */
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
/* A `direct` that still waits must return first: abort its link. NULL is fine. */
void lb_disk_source_close(struct lb_disk_source *s);

/* ---- backup */
struct lb_disk_target;
struct lb_disk_target_opts {
    const char *path;
    const char *format;      /* "raw" | "qcow2" */
    uint64_t size_bytes;     /* as the guest sees it */
    const char *same_as;     /* lb_disk_file_identity of the primary's file; "" or NULL unknown */
    const char *run_dir;     /* private directory: a socket while a qcow2 is opened */
    uint32_t uid, gid;       /* owner of an image that is made: the standby's process */
};
/* The image that is there, of that size (a block device may be larger), or a new sparse one. Open it
 * before the standby is launched: QEMU remembers the size. qcow2 goes through qemu-nbd (ends with the
 * calling thread) and libnbd. Locked as QEMU locks while open: an image in use is refused
 * (LB_E_EXISTS), others are refused it; a standby that waits for its state takes no lock.
 * LB_E_PREFLIGHT: it may be the primary's own file (map its path), or has another size. */
int lb_disk_target_open(const struct lb_disk_target_opts *opts, struct lb_disk_target **out,
                        struct lb_error *err);
/* What tells whether two hosts mean the same storage; "" when there is no such file. */
void lb_disk_file_identity(char out[128], const char *path);
/* In order; op->data is not needed any more on return. A failure may be reported by a later call; it is
 * final. */
int lb_disk_target_apply(struct lb_disk_target *t, const struct lb_disk_op *op,
                         struct lb_error *err);
/* Durable on return. */
int lb_disk_target_flush(struct lb_disk_target *t, struct lb_error *err);
/* Flushes; the image can be opened by QEMU on return. NULL is fine. */
int lb_disk_target_close(struct lb_disk_target *t, struct lb_error *err);

#endif
