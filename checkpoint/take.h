/*
 * checkpoint/take.h - one checkpoint being taken. Engine thread only.
 *
 *   take.c        the order of it all; what happens when it fails
 *   take_open.c   before the guest is touched: the VM, its disks, the place of the file
 *   take_copy.c   memory into the file: rounds, the pause, hot pages
 *   take_disk.c   the record of a checkpoint under way; overlays of the disks
 */
#ifndef LB_CKPT_TAKE_H
#define LB_CKPT_TAKE_H

#include "checkpoint/checkpoint_internal.h"

#define LB_TAKE_RECENT 3u            /* rounds whose pages are hot */

/* vms/NAME/take.json: what a checkpoint under way has done to the VM, so that somebody else can undo it. Written
 * before it is done; removed when the checkpoint is whole or undone. */
struct lb_take_disk {
    char id[256];
    char overlay[512], base[512];    /* base: the disk's image until the overlay took its place */
};
struct lb_take_record {
    uint32_t number;                 /* 0: a suspend */
    bool paused;                     /* the operator had paused the guest: it is not continued */
    bool frozen;                     /* the guest may write to the overlays already */
    struct lb_take_disk *disks;
    unsigned n_disks;
};
void lb_take_record_free(struct lb_take_record *r);
int lb_take_record_save(const char *state_dir, const char *vm, const struct lb_take_record *r,
                        struct lb_error *err);
/* LB_E_NOT_FOUND: none. */
int lb_take_record_load(const char *state_dir, const char *vm, struct lb_take_record *out, struct lb_error *err);
int lb_take_record_remove(const char *state_dir, const char *vm, struct lb_error *err);
/* Has the checkpoint got its file? */
bool lb_take_is_committed(const char *catalog_dir, const char *name, uint32_t number);
/* The overlays of a checkpoint that came to nothing go: those the guest writes to are joined with what they stand
 * on. Nothing when there is a file: what they stand on is the checkpoint's. vm NULL: the guest is gone; an overlay
 * it may have written to stays (it is the disk). */
int lb_take_record_undo(const char *catalog_dir, const char *name, struct lb_hv_vm *vm,
                        const struct lb_take_record *r, struct lb_error *err);

/* Pages copied while the guest is paused, to be written when it runs again. */
struct lb_take_part {
    unsigned block;
    uint64_t from, n;                /* in pages[] and mem */
};
struct lb_take_pages {
    uint8_t *mem;
    uint32_t *pages;
    uint64_t n, cap;
    struct lb_take_part *parts;      /* one per block at most */
    unsigned n_parts;
};

struct lb_take {
    const struct lb_ckpt_env *env;
    const struct lb_take_opts *opts;
    struct lb_take_result *res;
    const char *what;                /* "suspend", "checkpoint" */
    struct lb_vm_entry before, entry;
    struct lb_ckpt_meter meter;
    struct lb_sm sm;
    uint64_t t_start, t_stop, t_copy; /* of the call, of the last pause, of the copying */

    struct lb_hv_vm *vm;
    const struct lb_ram_block *blocks;
    unsigned n_blocks;
    struct lb_hv_disk *disks;        /* writable ones */
    unsigned n_disks;
    struct lb_ckpt_meta meta;
    struct lb_take_record record;
    int lock;                        /* of the catalog */
    char path[512];
    struct lb_chain *parent;
    struct lb_ckpt_writer *writer;

    struct lb_bitmap *dirty;         /* per block: what is to be copied next */
    uint64_t *learned, n_learned;    /* a suspend: what the guest needed first when it last came back */
    struct lb_bitmap *recent[LB_TAKE_RECENT]; /* per block: written lately, the latest first; NULL */
    uint64_t copied_pages, total_pages;
    struct lb_take_pages late;
    void *state;
    size_t state_len;

    bool recorded;                   /* the entry says CHECKPOINTING, the record is there */
    bool paused;                     /* by its operator */
    bool stopped;                    /* the guest is, or may be, stopped by us */
    bool saving, logging, overlays;
    bool committed;                  /* the file is there */
};

/* ---- take_open.c */
int lb_take_open(struct lb_take *t, struct lb_error *err);
/* size, time, inode of the images, as they are now, into the meta. */
int lb_take_identify_disks(struct lb_take *t, struct lb_error *err);

/* ---- take_copy.c */
/* From here on the log knows what the guest writes; dirty[] is all there is. */
int lb_take_begin_log(struct lb_take *t, struct lb_error *err);
/* Until what is left is little, or does not become less. */
int lb_take_rounds(struct lb_take *t, struct lb_error *err);
/* Guest running: memory for what the pause will find. */
int lb_take_reserve(struct lb_take *t, struct lb_error *err);
/* Guest stopped: what it wrote since the log was last fetched, to memory; what does not fit to the file. */
int lb_take_last_pages(struct lb_take *t, struct lb_error *err);
int lb_take_write_late(struct lb_take *t, struct lb_error *err);
/* A suspend. The guest runs for a moment more: what it writes, it will want first. Meanwhile copying begins. */
int lb_take_sample(struct lb_take *t, struct lb_error *err);
/* Guest stopped: everything else, straight to the file. */
int lb_take_all_pages(struct lb_take *t, struct lb_error *err);
int lb_take_put_hot(struct lb_take *t, struct lb_error *err);
void lb_take_free_pages(struct lb_take *t);

/* ---- take_disk.c */
/* Overlays of all disks, made ready; in the record. */
int lb_take_overlays(struct lb_take *t, struct lb_error *err);
/* Is a file where an overlay of this number would be? */
bool lb_take_overlay_exists(const struct lb_take *t);

/* ---- take.c */
int lb_take_pause(struct lb_take *t, struct lb_error *err);    /* notices a guest its operator has continued */
int lb_take_continue(struct lb_take *t, struct lb_error *err); /* not a guest its operator had paused */
int lb_take_check_cancel(struct lb_take *t, struct lb_error *err);

#endif
