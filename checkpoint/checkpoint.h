/*
 * checkpoint/checkpoint.h - suspend, resume, live checkpoints, restore, clones: what the sessions do.
 *
 *   take      OPEN     attach, describe, disks; names, parent, space; overlays of the disks made ready
 *             ROUNDS   log on; all pages, then what was written meanwhile, until little is left (a suspend has none)
 *             PAUSE    stop; last pages to memory; device state; disks switched to their overlays
 *             RUN      cont (a suspend stays stopped); last pages to the file; commit
 *             suspend: entry SUSPENDED (fsync), then the hypervisor's process ends
 *   restore   OPEN     chain, key, disks as they were; overlays on the frozen images (a resume uses the disks themselves)
 *             LAUNCH   receiver; lazy: memory that waits for its pages, device blocks and the state's pages first
 *             LOAD     state loaded, paused
 *             RUN      entry FILLING (fsync), then it runs; from here it never goes back; all memory there: RUNNING
 *   fill      hot pages, faults first; then everything; entry RUNNING; a suspend's file is removed
 *
 *   entry state    meaning                                      after a crash (lb_ckpt_recover)
 *   CHECKPOINTING  the guest is ours, perhaps paused            continue it; temporary files go; RUNNING
 *   SUSPENDED      the file is the VM                           a process that is still there ends
 *   RESTORING      a receiver, not a VM yet                     end it; SUSPENDED when its file is a suspend's, else forget it
 *   FILLING        runs here (decided), memory still comes      the guest waits for pages, it never reads wrong ones:
 *                                                               fill again; run it if it does not; gone: DEAD
 *
 * Before the entry says SUSPENDED any failure leaves the guest running.  A suspended VM's disks must be what they were
 * (size, time, inode): else refused, unless forced.
 *
 * A process that fills keeps no secret: QEMU holds the userfaultfd too, so that the end of ours makes the guest wait,
 * not read zeros.
 *
 * Functions block; engine thread of a session, which holds the VM's lock (lb_vm_lock).
 */
#ifndef LB_CHECKPOINT_H
#define LB_CHECKPOINT_H

#include "checkpoint/catalog.h"
#include "core/hv.h"
#include "core/registry.h"

enum lb_ckpt_phase {
    LB_CKPT_PREPARING = 0, LB_CKPT_COPYING, LB_CKPT_PAUSED, LB_CKPT_WRITING, LB_CKPT_LAUNCHING, LB_CKPT_LOADING,
    LB_CKPT_FILLING, LB_CKPT_DONE,
};
const char *lb_ckpt_phase_name(enum lb_ckpt_phase p);

struct lb_ckpt_progress {
    const char *what;                /* "suspend" | "checkpoint" | "resume" | "restore" | "clone" | "fill" | ... */
    enum lb_ckpt_phase phase;
    double percent;                  /* of the whole, never goes down */
    uint64_t done_bytes, total_bytes;/* guest memory */
    uint64_t file_bytes;
    double bytes_per_s, eta_s;       /* < 0 unknown */
    char note[200];
};

struct lb_ckpt_env {
    const char *state_dir, *catalog_dir;
    const struct lb_hv_ops *hv;
    /* This host's maps for a receiver; name and run_dir are the engine's to fill. */
    const struct lb_launch_opts *launch;
    int cancel_fd;                   /* readable = cancel wanted; polled, never read */
    void (*report)(const struct lb_ckpt_progress *p, void *arg); /* engine thread; at most 10/s and at every phase */
    void *arg;
};

/* ---- taking */
struct lb_take_opts {
    bool suspend;
    char label[128];
    bool no_disk;                    /* live: leave the disks out (restore then runs on the disk as it is: crash
                                        consistent at best) */
    bool full;                       /* no increment even when there is a parent */
    struct lb_ckpt_key *key;         /* NULL: not encrypted */
    int zstd_level;
    uint64_t bandwidth_bytes_per_s;  /* of reading memory while the guest runs; 0 no limit */
};
struct lb_take_result {
    char ref[160], path[512];
    struct lb_ckpt_stats stats;
    unsigned rounds, disks;
    double pause_ms;                 /* the guest did not run */
    double total_ms;
};
/* A live checkpoint, or a suspend. On return the entry says how it is: RUNNING, or SUSPENDED and the process gone. */
int lb_ckpt_take(const struct lb_ckpt_env *env, const struct lb_vm_entry *vm, const struct lb_take_opts *opts,
                 struct lb_take_result *res, struct lb_error *err);

/* ---- restoring */
struct lb_restore_opts {
    char as[128];                    /* new name: another VM (new disks overlays, new MACs and uuid on the command
                                        line). "": the VM's own name, which must not be in use */
    bool eager;
    bool force;                      /* although a disk has changed */
    bool paused;                     /* leave it paused (only eager) */
    struct lb_ckpt_key *key;
    const struct lb_path_map *taps;  /* besides the host's */
    unsigned n_taps;
    int shared_memory_fd;            /* clones: a sealed memfd with main memory; then no memory is read. 0: none */
};
struct lb_restore_result {
    char vm[128];
    bool filling;                    /* runs; lb_ckpt_fill is to follow */
    double running_ms;               /* from the call to the guest running */
    double total_ms;
    uint64_t ram_bytes, placed_bytes;
    char note[256];                  /* what the user must know; "" nothing */
};
/* `resume` is this with the ref NAME@suspend and the VM's own name. When it returns with `filling`, call lb_ckpt_fill
 * in the same process (f takes it along), else it is complete. on_running: the guest runs (lazy: long before the end). */
struct lb_fill;
int lb_ckpt_restore(const struct lb_ckpt_env *env, const char *ref, const struct lb_restore_opts *opts,
                    struct lb_fill **f, struct lb_restore_result *res, struct lb_error *err);
/* Serve until everything is there. Does not end early: cancel is not heard, the guest needs it. On error the entry
 * stays FILLING (recovery calls lb_ckpt_refill again and again). Frees f. */
int lb_ckpt_fill(struct lb_fill *f, struct lb_error *err);
/* FILLING and nobody serves it: take it up again. The key comes from who asks (an encrypted one waits for it:
 * LB_E_AUTH, the guest waits too). */
int lb_ckpt_refill(const struct lb_ckpt_env *env, const struct lb_vm_entry *vm, struct lb_ckpt_key *key,
                   struct lb_error *err);

/* ---- clones: memory once in a sealed memfd, each clone a private view of it: pages nobody writes are shared */
#define LB_CKPT_CLONES_MAX 256u
struct lb_clone_opts {
    unsigned count;                  /* 1..LB_CKPT_CLONES_MAX */
    char name[100];                  /* clones are NAME-1, NAME-2 ... (numbers in use are left out); "": the VM's name */
    char tap[16];                    /* "%d" in it is the clone's number: tap of its first card, "T%d", "T%d-2" ...; "":
                                        the cards of clones are on taps named OLD-N when those exist, else on a tap that
                                        is connected to nothing */
    struct lb_ckpt_key *key;
};
/* Filled whatever is returned: those that run stay when one fails. */
struct lb_clone_result {
    unsigned n;                      /* that run */
    char (*names)[128];              /* malloc'ed */
    double *running_ms;              /* malloc'ed; of each, from the call */
};
int lb_ckpt_clone(const struct lb_ckpt_env *env, const char *ref, const struct lb_clone_opts *opts,
                  struct lb_clone_result *res, struct lb_error *err);

/* ---- after a crash; the caller holds the lock and the entry has one of the four states. `fill_wanted`: a session has
 * to call lb_ckpt_refill. */
int lb_ckpt_recover(const struct lb_ckpt_env *env, const char *vm, bool *fill_wanted, char text[512],
                    struct lb_error *err);

/* ---- schedule: vms/NAME/schedule.json, the operator's wish */
struct lb_ckpt_schedule {
    uint64_t every_ms;               /* >= 10 s */
    unsigned keep;                   /* >= 1 */
    bool no_disk;
    char key_file[256];              /* "" not encrypted */
    uint64_t last_ms;                /* wall clock, of the beginning of the last one that came to an end */
    unsigned failures;               /* since the last good one */
    char error[256];                 /* of the last bad one */
};
int lb_schedule_load(const char *state_dir, const char *vm, struct lb_ckpt_schedule *out, struct lb_error *err);
int lb_schedule_save(const char *state_dir, const char *vm, const struct lb_ckpt_schedule *s, struct lb_error *err);
int lb_schedule_remove(const char *state_dir, const char *vm, struct lb_error *err);
/* Wall clock of the next run; after failures later each time, at most every_ms * 8 or an hour. */
uint64_t lb_schedule_next_ms(const struct lb_ckpt_schedule *s, uint64_t now_ms);

#endif
