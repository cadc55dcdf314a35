/*
 * checkpoint/restore_internal.h - a restore on its way; shared by restore*.c and clone.c.
 *
 *   restore.c        the order of things; how it ends when it fails
 *   restore_check.c  before anything is touched: name, disks, memory, taps, emulator
 *   restore_disk.c   overlays, and how they are found after a crash
 *   restore_mem.c    pages into blocks (fill.h)
 *   fill.c           memory that comes while the guest runs (fill.h)
 *   clone.c          memory once for many
 */
#ifndef LB_RESTORE_INTERNAL_H
#define LB_RESTORE_INTERNAL_H

#include "checkpoint/fill.h"
#include "core/qemu/argv_scan.h"

struct lb_restore {
    const struct lb_ckpt_env *env;
    const struct lb_restore_opts *opts;
    struct lb_restore_result *res;
    struct lb_ckpt_meter meter;
    uint64_t t_start, t_step;
    char steps[256];                  /* what took how long, for the log */
    struct lb_ckpt_entry ck;
    bool own;                         /* a suspended VM comes back: its own name, its own disks */
    bool lazy, paused;
    struct lb_vm_entry entry, before; /* of the VM */
    bool had_entry, registered, decided;
    char uuid[37];                    /* for another VM */
    struct lb_disk_map *disks;        /* what disks of the command line are now */
    unsigned n_disks;
    char **overlays;                  /* made for it; NULL-terminated, or NULL */
    struct lb_arg_item *items;        /* what the command line uses of a host */
    unsigned n_items;
    struct lb_path_map *taps;
    unsigned n_taps;
    struct lb_chain *chain;
    void *state;
    size_t state_len;
    uint64_t *hot, n_hot;
    struct lb_hv_vm *vm;
    struct lb_mem mem;
    struct lb_fill *fill;             /* has vm, chain and mem then */
};

/* Everything that can be said before something is done. Fills own, entry, before and taps. */
int lb_restore_check(struct lb_restore *r, struct lb_error *err);
/* Fills disks; a live checkpoint's images get overlays. On failure nothing is left. */
int lb_restore_disks(struct lb_restore *r, struct lb_error *err);
/* Overlays that lb_restore_disks made for VM `name` and that no VM has come to use: files and entries of the catalog
 * go. Also after a crash (they are listed in the VM's directory); none is success. */
int lb_restore_drop_disks(const struct lb_ckpt_env *env, const char *name, struct lb_error *err);
/* The VM uses them from now on. */
void lb_restore_keep_disks(const struct lb_ckpt_env *env, const char *name);

#endif
