/*
 * core/fake/fake_internal.h - inside of the fake guest.
 *
 *   fake.c      memory, life, faults, the test API, the table of functions
 *   fake_io.c   its network card, disk and clock
 *   fake_store.c  overlays of its disk
 *   fake_lazy.c memory that comes when it is touched
 */
#ifndef LB_FAKE_INTERNAL_H
#define LB_FAKE_INTERNAL_H

#include <pthread.h>

#include "core/fake/fake.h"

enum { N_BLOCKS = 2, MAIN = 0, VRAM = 1 };

struct fake_block {
    struct lb_ram_block pub; /* immutable */
    uint64_t n_pages;        /* immutable */
    int fd;                  /* immutable */
    uint8_t *guest_map;      /* immutable pointer; content by lock or incoming */
    uint8_t *our_map;        /* immutable pointer */
    uint32_t *seq;           /* locked: write number of each page, 0 = never written */
    struct lb_bitmap dirty;  /* locked */
};

/* Something done at a rate, while the guest runs. */
struct fake_pace {
    uint64_t rate;           /* per second */
    uint64_t from_ns;        /* up to here it has been done */
};

struct fake_nic {
    bool held;
    int out, in;             /* our ends: frames go out for keeping, and come back */
    pthread_t thread;        /* reads `in`; engine thread starts and joins it */
    uint64_t blocked, dropped;
};

struct fake_mirror {
    bool on, failed;
    char *socket, *export_name;
    char error[128];
};

/* What the guest wrote until it was frozen. */
struct fake_image {
    char *path;
    uint64_t writes;
};

struct guest {
    /* immutable */
    lb_fake_id id;
    char *name;
    char address[32];
    char uuid[40];
    struct lb_fake_config config; /* its name and disk_path are not used */
    struct fake_block blocks[N_BLOCKS];
    int shared_fd;           /* main memory as launch was given it; -1 */
    struct lb_ram_block table[N_BLOCKS]; /* but for map of MAIN: NULL while lazy */
    pthread_t worker;

    /* locked by registry_lock */
    struct guest *next;
    bool attached;

    /* locked by lock */
    pthread_mutex_t lock;
    pthread_cond_t wake;
    bool quit, dead, powered_off, running, frozen, logging, holds_disk, checkpoint_mode;
    unsigned throttle_percent;
    struct fake_pace pages, sends, stores;
    uint64_t nonce, rng, writes, announces;
    uint64_t frames, disk_writes; /* part of the state */
    uint64_t clock_stepped_ns;
    uint32_t next_seq;
    char *disk_path;              /* what it writes now */
    struct fake_image *images;    /* below that, oldest first */
    unsigned n_images;
    struct fake_nic nic;
    struct fake_mirror mirror;
    bool lazy;                    /* fake_lazy.c */
    unsigned lazy_round;          /* another process has begun to serve */
    struct lb_bitmap missing, asked; /* pages of MAIN; asked: somebody waits and nobody has been told */

    char *overlay;                /* engine thread: made ready, not used yet */
};

struct lb_hv_vm {
    struct lb_hv_vm_base base;
    struct guest *guest;
};

/* Start of every slot: counts, waits, fails as armed.  g may be NULL. */
int lb_fake_enter(enum lb_fake_slot slot, struct guest *g, struct lb_error *err);
/* The guest with its lock held (and the registry's, so that it stays), or NULL. */
struct guest *lb_fake_hold(lb_fake_id id, struct lb_error *err);
void lb_fake_let_go(struct guest *g);
/* A handle on the guest that ident names. */
int lb_fake_find(const struct lb_vm_ident *ident, struct lb_hv_vm **out, struct lb_error *err);

/* ---- fake_lazy.c */
/* Lock held, given up meanwhile: wait until a page of MAIN is there. false: the guest ended, or (not forever)
 * nobody placed it in time. */
bool lb_fake_page_wait(struct guest *g, uint64_t page, bool forever);
int lb_fake_load_touches(struct guest *g, struct lb_error *err);
void lb_fake_lazy_free(struct guest *g);

/* ---- fake_io.c; lock held where a line says so */
bool lb_fake_send_frame(struct guest *g);  /* locked; false: no room, try again */
void lb_fake_store_block(struct guest *g); /* locked */
/* locked: the hypervisor is gone, nothing it has leaves any more */
void lb_fake_io_die(struct guest *g);
void lb_fake_io_free(struct guest *g);     /* no thread of the guest's left but the card's */
void lb_fake_io_reset(void);

int lb_fake_nics(struct lb_hv_vm *vm, struct lb_nic **out, unsigned *n, struct lb_error *err);
int lb_fake_nic_hold(struct lb_hv_vm *vm, const char *id, int fds[2], struct lb_error *err);
int lb_fake_nic_unhold(struct lb_hv_vm *vm, const char *id, struct lb_error *err);
int lb_fake_disks(struct lb_hv_vm *vm, struct lb_hv_disk **out, unsigned *n, struct lb_error *err);
int lb_fake_disk_mirror(struct lb_hv_vm *vm, const char *id, const char *nbd_socket,
                        const char *export_name, struct lb_error *err);
int lb_fake_disk_mirror_status(struct lb_hv_vm *vm, const char *id, bool poll,
                               struct lb_mirror_status *out, struct lb_error *err);
int lb_fake_disk_mirror_end(struct lb_hv_vm *vm, const char *id, struct lb_error *err);
int lb_fake_disk_overlay(struct lb_hv_vm *vm, const char *id, const char *path, struct lb_error *err);
int lb_fake_disk_freeze(struct lb_hv_vm *vm, struct lb_error *err);
void lb_fake_disk_overlay_drop(struct lb_hv_vm *vm);
int lb_fake_disk_join(struct lb_hv_vm *vm, const char *id, const char *top, const char *base,
                      int (*tick)(uint64_t done, uint64_t total, void *arg), void *arg,
                      struct lb_error *err);
void lb_fake_images_free(struct guest *g);
int lb_fake_lazy_begin(struct lb_hv_vm *vm, struct lb_error *err);
int lb_fake_lazy_attach(const struct lb_vm_ident *ident, struct lb_hv_vm **out, struct lb_error *err);
int lb_fake_lazy_fault(struct lb_hv_vm *vm, unsigned timeout_ms, const struct lb_ram_block **blk,
                       uint64_t *page, struct lb_error *err);
int lb_fake_lazy_place(struct lb_hv_vm *vm, const struct lb_ram_block *blk, uint64_t first, uint64_t n,
                       const void *buf, uint64_t *placed, struct lb_error *err);
int lb_fake_lazy_offer(struct lb_hv_vm *vm, const struct lb_ram_block *blk, uint64_t first, uint64_t n,
                       const void *buf, struct lb_error *err);
int lb_fake_lazy_touched(struct lb_hv_vm *vm, const struct lb_ram_block *blk, struct lb_bitmap *pages,
                         struct lb_error *err);
int lb_fake_lazy_missing(struct lb_hv_vm *vm, const struct lb_ram_block *blk, struct lb_bitmap *pages,
                         struct lb_error *err);
int lb_fake_lazy_end(struct lb_hv_vm *vm, struct lb_error *err);
int lb_fake_clock_step(struct lb_hv_vm *vm, uint64_t *step_ns, struct lb_error *err);

#endif
