/*
 * checkpoint/catalog.h - the checkpoints of this host: names, chains, disks.
 *
 *   DIR/VM/N.lbc            checkpoint N of VM (1, 2, 3 ...; a number is never used again)
 *   DIR/VM/suspend.lbc      what a suspended VM is
 *   DIR/VM/next             the next number
 *   DIR/VM/disks.json       which image holds which disk of which checkpoint (images move when chains are
 *                           joined, the files of checkpoints never change), and who else stands on them
 *   DIR/VM/lock             flock: exclusive for whoever makes, removes or joins; readers take none (an open
 *                           file stays readable)
 *   DIR/VM/N.ws             working set learned by lazy restores, most needed first (checkpoint/fill.h)
 *   DIR/VM/suspend.ws       the same of its last lazy resume, for its next suspend
 *
 * DIR is STATE_DIR/checkpoints, or `checkpoint-dir` of the configuration.  A reference is what a user
 * types: "VM@7", "VM@LABEL", "VM@suspend", "VM" (the latest), or a path of a file (has a '/').
 *
 * VM's directory outlives the VM: `lifeboat release` or the end of the guest takes no checkpoint away.
 */
#ifndef LB_CKPT_CATALOG_H
#define LB_CKPT_CATALOG_H

#include "checkpoint/store.h"

struct lb_ckpt_entry {
    char vm[128];
    uint32_t number;                 /* 0: suspend */
    char ref[160];                   /* "VM@7" */
    char path[512];
    struct lb_ckpt_info info;
    bool readable;                   /* info.meta is there */
    struct lb_error error;           /* when not: why (damaged, or encrypted and no key: then only info's rest) */
    unsigned depth;                  /* files that a restore reads; 0: a parent is missing */
    struct lb_ckpt_disk *disks;      /* by disks.json, else as in the meta */
    unsigned n_disks;
};
void lb_ckpt_entry_free(struct lb_ckpt_entry *e);

/* An entry's vm and number (also in info.meta) are those of its place, whatever the file was called where it was made.
 * Sorted by VM, then number. vm NULL: all. *v malloc'ed; each to be freed. */
int lb_catalog_list(const char *dir, const char *vm, const struct lb_ckpt_key *key, struct lb_ckpt_entry **v,
                    unsigned *n, struct lb_error *err);
/* LB_E_NOT_FOUND names what there is. */
int lb_catalog_find(const char *dir, const char *ref, const struct lb_ckpt_key *key, struct lb_ckpt_entry *out,
                    struct lb_error *err);
/* The chain of an entry. LB_E_NOT_FOUND "parent of VM@7 (id ...) is missing". */
int lb_catalog_open(const char *dir, const struct lb_ckpt_entry *e, const struct lb_ckpt_key *key,
                    struct lb_chain **out, struct lb_error *err);

/* Exclusive, waits up to wait_ms; fd or -1 with LB_E_STATE. Makes the directory. Whoever takes it removes the
 * temporary files that dead writers left. */
int lb_catalog_lock(const char *dir, const char *vm, unsigned wait_ms, struct lb_error *err);

/* ---- with the lock held */
/* Number and path of the next checkpoint (the number is used up, durably, even when nothing comes of it). */
int lb_catalog_next(const char *dir, const char *vm, uint32_t *number, char path[512], struct lb_error *err);
char *lb_catalog_suspend_path(const char *dir, const char *vm); /* caller frees */
/* The latest checkpoint that an increment can stand on: readable with this key, chain whole, no suspend. NOT_FOUND. */
int lb_catalog_latest(const char *dir, const char *vm, const struct lb_ckpt_key *key, struct lb_ckpt_entry *out,
                      struct lb_error *err);
/* Where the images of a checkpoint are; until somebody says so, where its file says. Said before the file has its name:
 * when nothing comes of the checkpoint, its frozen images are joined by the next removal like those of one that went. */
int lb_catalog_set_disks(const char *dir, const char *vm, uint32_t number, const struct lb_ckpt_disk *v, unsigned n,
                         struct lb_error *err);
/* An image that stands on (has as backing file) an image of a checkpoint: a restored VM's, a clone's. user: VM's name;
 * on false: no longer (an image that is deleted counts as that). Hold the lock from before the image is made. */
int lb_catalog_use_image(const char *dir, const char *vm, const char *image, const char *user, bool on,
                         struct lb_error *err);
/* Who starts a VM on an image of a checkpoint writes to what must not change. Newest: where the guest went on. */
struct lb_image_held {
    char by[200];                    /* "web1@7", "web1@suspend", "a checkpoint of VM web1 that was removed" */
    char vm[128];
    bool suspended;                  /* its newest state waits for `resume` of that VM */
    char **newest;                   /* qcow2 images that stand on it, directly or not, that nobody stands on, and that are
                                        neither held themselves nor another VM's than `user`; NULL-terminated */
};
/* 1: held, fills *out (caller: lb_image_held_free); 0: anybody may write to it. A disks.json that cannot be read is left out,
 * with a warning in the log: no VM's books keep another from starting. No lock is needed. */
int lb_catalog_image_held(const char *dir, const char *image, const char *user, struct lb_image_held *out);
void lb_image_held_free(struct lb_image_held *h); /* leaves it zeroed */
/* Joins images of checkpoints that go: `top` goes into `base` (files; the guest sees no difference), after which
 * whoever used `top` uses `base`. NULL: images stay. LB_E_STATE: cannot now; they stay too. */
struct lb_image_join {
    int (*join)(const char *vm, const char *disk_id, const char *top, const char *base, void *arg,
                struct lb_error *err);
    void *arg;
};
struct lb_prune_result {
    unsigned removed, joined;        /* checkpoints that went; files written again without their parent */
    unsigned images_joined, images_kept; /* kept: somebody else stands on them, or the VM does not run */
    uint64_t freed_bytes;
};
/* Remove checkpoints; those that stand on them are first written again to hold what they need themselves (temporary
 * file, fsync, rename over the old one: at every moment each one is whole, a reader that has the old one open reads
 * on). An encrypted one needs its key. progress: bytes done of all. */
int lb_catalog_remove(const char *dir, const char *vm, const uint32_t *numbers, unsigned n,
                      const struct lb_ckpt_key *key, const struct lb_image_join *join,
                      void (*progress)(uint64_t done, uint64_t total, void *arg), void *arg, int cancel_fd,
                      struct lb_prune_result *res, struct lb_error *err);
/* The numbers `prune` would remove: all but the latest `keep`, older than max_age_ms when not 0; labelled ones stay
 * unless `labelled`, those that cannot be read (with this key) always: nobody knows what they are. *v malloc'ed. */
int lb_catalog_prunable(const char *dir, const char *vm, const struct lb_ckpt_key *key, unsigned keep,
                        uint64_t max_age_ms, bool labelled, uint32_t **v, unsigned *n, struct lb_error *err);

/* ---- to and from elsewhere. A folder: checkpoint.lbc (full: the chain in one file) and disk-K.qcow2 per disk
 * (qemu-img convert of the frozen image), manifest.json with the SHA-256 of each. An encrypted checkpoint stays
 * encrypted, its disks are as plain as they were. `to` must not exist, or be empty. Import takes the lock itself and gives
 * it a number of VM (as: NULL = the manifest's); its disks are DIR/VM/disk-N-K.qcow2. */
int lb_catalog_export(const char *dir, const struct lb_ckpt_entry *e, const struct lb_ckpt_key *key,
                      const char *to, bool no_disk, void (*progress)(uint64_t done, uint64_t total, void *arg),
                      void *arg, int cancel_fd, struct lb_error *err);
int lb_catalog_import(const char *dir, const char *from, const char *as, const struct lb_ckpt_key *key,
                      void (*progress)(uint64_t done, uint64_t total, void *arg), void *arg, int cancel_fd,
                      struct lb_ckpt_entry *out, struct lb_error *err);

#endif
