/*
 * checkpoint/fill.h - memory that comes while the guest runs.
 *
 *      who waits for a page --> 2 threads, before all ordinary work: read its chunk, place it
 *      hot pages            --> 1 thread, from before the state is loaded
 *      everything else      --> the same thread, once the guest has run for a moment and asks for little: the files in
 *                               their order, with low priority
 *
 * A page that is all zeros is only placed for who waits for it; at the end those nobody touched are left to the
 * hypervisor, where they read as zeros by themselves.
 *
 * What is damaged is never placed.  Before it is decided that the guest runs here that is the end of the receiver
 * (its loading may wait for that very page); after it, the guest waits when it touches such a page, everything else
 * comes, and what is missing is tried again every few seconds: a disk may come back, a file may be repaired.
 *
 * The working set, DIR/VM/N.ws: pages in the order in which a guest restored from N asked for them, then others that it
 * touched before it was quiet (where that cannot be known: those that an earlier one needed).  Of a suspended VM that comes
 * back it is DIR/VM/suspend.ws: the next suspend puts these pages first into its file, and among the hot ones.  Only a
 * hint: one that is missing, damaged or another checkpoint's is none.
 *      "LBWS1\n\0\0"   8 bytes
 *      id              16, of the checkpoint
 *      n               u64, little-endian as all that follows; at most LB_WS_MAX_PAGES
 *      pages           n times u64, block << 40 | page
 *      check           u64, XXH3-64 of all before
 */
#ifndef LB_CKPT_FILL_H
#define LB_CKPT_FILL_H

#include "checkpoint/checkpoint_internal.h"

#define LB_WS_MAX_PAGES 65536u

/* ---- the blocks of a file and those of a machine (restore_mem.c) */

struct lb_mem {
    struct lb_hv_vm *vm;
    struct lb_chain *chain;
    const struct lb_ckpt_block *blocks;
    unsigned n;
    const struct lb_ram_block **map;  /* block of the machine; NULL: a ROM that it does not have */
    struct lb_bitmap *populated;      /* of main blocks: pages that are not zero */
    uint64_t populated_pages, main_bytes;
};
/* vm and chain stay the caller's. LB_E_PREFLIGHT: another machine. only_main: no other blocks are known. */
int lb_mem_init(struct lb_mem *m, struct lb_hv_vm *vm, struct lb_chain *chain, bool only_main, struct lb_error *err);
void lb_mem_free(struct lb_mem *m);
/* Blocks of devices, and what of the ROMs differs; zeros where the file has zeros. Engine thread. */
int lb_mem_place_small(struct lb_mem *m, struct lb_error *err);
/* Main memory out of the chain through `place` (any thread), all of it; progress from one percentage to another. */
int lb_mem_read_main(struct lb_chain *chain, lb_chain_pages_fn *place, void *arg, struct lb_ckpt_meter *meter,
                     double from, double to, struct lb_error *err);

/* ---- filling (fill.c) */

struct lb_fill {
    /* immutable once started */
    struct lb_ckpt_env env;
    struct lb_vm_entry entry;         /* engine thread; the identity in it is immutable */
    struct lb_mem mem;
    struct lb_hv_vm *vm;
    struct lb_chain *chain;
    char *remove_path;                /* of a suspended VM: the file that is the VM no more once all is there; or NULL */
    char *ws_path;                    /* NULL: not kept */
    struct lb_ckpt_id id;
    uint64_t *hot, n_hot;             /* hot thread */
    _Atomic(uint64_t) **present;      /* by block, one bit a page; main blocks only */
    /* any thread */
    _Atomic uint64_t placed_pages;    /* of the populated ones */
    _Atomic unsigned waiting;         /* faults being served */
    _Atomic bool quit;
    _Atomic bool learning;            /* what the guest needs first; until the filler begins */
    _Atomic uint64_t last_fault_ns;   /* somebody waited for a page that is not zero */
    /* locked by mu */
    pthread_mutex_t mu;
    pthread_cond_t cond;
    bool go;                          /* the filler may begin */
    bool complete;                    /* all there */
    bool decided;                     /* the guest runs here, whatever happens */
    struct lb_error fatal;            /* code LB_OK: none; before `decided` only */
    struct lb_error damage;           /* what cannot be read now; LB_OK: nothing */
    uint64_t damaged_pages, damage_seq;
    uint64_t *faults, n_faults;       /* in their order, at most LB_WS_MAX_PAGES; no longer learning: the filler's, who adds
                                         what was touched */
    bool learned;                     /* filler: faults[] is all that was needed */
    /* locked by half */
    pthread_mutex_t half;
    bool half_said;
    /* engine thread */
    pthread_t server[2], filler;
    unsigned n_servers;
    bool filler_started;
};
/* Takes vm and chain in any case (they are closed by lb_fill_free; vm: detached). env, its launch excepted, must live as
 * long as the result. */
struct lb_fill *lb_fill_new(const struct lb_ckpt_env *env, const struct lb_vm_entry *entry, struct lb_hv_vm *vm,
                            struct lb_chain *chain);
/* mem is set up: pages that are missing now are to come. Starts the threads. */
int lb_fill_start(struct lb_fill *f, struct lb_error *err);
/* 0, or why the threads have ended the receiver. decide: 0 means that the guest runs here, and that they will not. */
int lb_fill_decide(struct lb_fill *f, bool decide, struct lb_error *err);
void lb_fill_stop(struct lb_fill *f);  /* threads end; nothing else changes */
void lb_fill_free(struct lb_fill *f);  /* NULL is fine */

/* ---- the working set (fill_ws.c) */

/* Pages; none is no error. *v malloc'ed. id NULL: of whatever checkpoint. */
void lb_ws_load(const char *path, const struct lb_ckpt_id *id, uint64_t **v, uint64_t *n);
/* `first` and then those of `second` that are not in it. */
int lb_ws_save(const char *path, const struct lb_ckpt_id *id, const uint64_t *first, uint64_t n_first,
               const uint64_t *second, uint64_t n_second, struct lb_error *err);
char *lb_ws_path(const char *catalog_dir, const char *vm, uint32_t number); /* number 0: of the suspends; caller frees */

#endif
