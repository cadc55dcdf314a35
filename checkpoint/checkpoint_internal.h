/*
 * checkpoint/checkpoint_internal.h - what the engines of checkpoint/ share.
 *
 *   progress.c      what a person sees meanwhile; being told to stop
 *   take.c          the order of a checkpoint; how it ends when it fails
 *   take_open.c     before anything is touched: the VM, its disks, the place of the file
 *   take_copy.c     memory into the file: rounds, the pause, hot pages
 *   take_disk.c     overlays: the moment a disk keeps; undone when no checkpoint comes of it
 *   recover.c       after a crash
 *   schedule.c      checkpoints again and again
 */
#ifndef LB_CHECKPOINT_INTERNAL_H
#define LB_CHECKPOINT_INTERNAL_H

#include "checkpoint/checkpoint.h"

/* ---------------------------------------------------------------- progress. Engine thread. */

struct lb_ckpt_meter {
    const struct lb_ckpt_env *env;
    struct lb_ckpt_progress p;
    uint64_t reported_ns;
    uint64_t rate_ns, rate_bytes;    /* when and what the rate was last taken */
};
/* `what` stays the caller's. Nothing is reported yet. */
void lb_ckpt_meter_init(struct lb_ckpt_meter *m, const struct lb_ckpt_env *env, const char *what,
                        uint64_t total_bytes);
/* A phase begins; reported at once. percent < 0: as it was; it never goes down. DONE is 100. */
void lb_ckpt_meter_phase(struct lb_ckpt_meter *m, enum lb_ckpt_phase phase, double percent);
/* done_bytes of total_bytes; reported when the last report is 100 ms old. */
void lb_ckpt_meter_bytes(struct lb_ckpt_meter *m, uint64_t done_bytes, double percent);
/* In every report from now on; in the log, too. */
void lb_ckpt_meter_note(struct lb_ckpt_meter *m, const char *fmt, ...) LB_PRINTF(2, 3);

/* -1 with LB_E_CANCELLED when somebody wants us to stop. */
int lb_ckpt_check_cancel(const struct lb_ckpt_env *env, const char *what, const char *vm,
                         struct lb_error *err);

/* Durably; that it could not be is only said in the log. */
void lb_ckpt_remove_file(const char *path);

/* Strings are the entry's. */
struct lb_vm_ident lb_ckpt_ident(const struct lb_vm_entry *e);

#endif
