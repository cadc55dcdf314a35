/*
 * core/fake/fake.h - the test side of the in-process guest lb_hv_fake.
 *
 * A fake guest is RAM ("fake.ram" main, "fake.vram" device; memfds) and a thread
 * that, while the guest runs, rewrites pages at a set rate.  Every page it writes
 * is stamped: its content follows from the guest's nonce, the page and a write
 * number, and the guest remembers the number of every page.  That table is part
 * of the device state, so a receiver knows exactly what each of its pages must
 * hold: a page that is lost, stale or misplaced is found by lb_fake_verify.
 *
 * Like a real machine it holds a lock on its disk while it runs: a save with
 * final = true gives the lock up, cont and run take it and fail while another
 * guest with the same uuid has it.
 *
 * It may have a network card that sends numbered frames (lb_fake_set_wire sees what
 * leaves the host) and a disk that it writes in a fixed sequence (lb_fake_disk_fill
 * says what it must hold after so many writes).  Both numbers are part of the device
 * state: a frame that left, or a block a backup holds, tells which state it belongs to.
 *
 * Its memory may be lazy: a missing page that it writes, that lb_fake_verify reads, or that the load of the
 * state touches (page 0) is waited for; a load that nobody serves fails.
 *
 * Guests live until destroyed, killed or reset; handles come and go (one at a
 * time per guest).  All functions here may be called from any thread.
 */
#ifndef LB_FAKE_H
#define LB_FAKE_H

#include "core/hv.h"

struct lb_fake_config {
    const char *name;           /* several guests may share a name (two "hosts") */
    uint64_t ram_bytes;         /* multiple of LB_PAGE_SIZE; 0: 16 MiB */
    uint64_t vram_bytes;        /* multiple of LB_PAGE_SIZE; 0: 1 MiB */
    uint64_t touched_pages;     /* stamped before it starts, from page 0 of fake.ram */
    uint64_t rate_pages_per_s;  /* rewrites per second, one of 16 in fake.vram; 0: idle */
    uint64_t working_set_pages; /* rewrites stay in the first N pages of fake.ram; 0: all */
    uint32_t random_bytes;      /* incompressible part of a stamped page, 32..4096; 0: 512 */
    uint32_t state_bytes;       /* device state is padded to at least this */
    bool nic;                   /* has the card "net0" */
    bool nic_opaque;            /* which can not be held */
    uint64_t frames_per_s;      /* what it sends while it runs */
    uint64_t disk_bytes;        /* multiple of LB_PAGE_SIZE; the disk "disk0"; 0: none. Each copy
                                   of the machine has one of its own then: no lock between them */
    uint64_t disk_writes_per_s; /* blocks of LB_PAGE_SIZE written while it runs */
    const char *disk_path;      /* what disks() says; a receiver has "" */
    bool no_overlay;            /* the disk cannot be frozen */
    bool no_clock;              /* clock_step is not supported */
    bool no_map;                /* blocks without a map: engine has to use lb_hv_read/write */
    bool start_paused;
};

/* A guest, valid forever: functions on one that is gone say so. */
typedef uint64_t lb_fake_id;

/* Boot a guest. */
int lb_fake_start(const struct lb_fake_config *config, lb_fake_id *out, struct lb_error *err);
/* The guest behind a handle of lb_hv_fake. */
lb_fake_id lb_fake_of(struct lb_hv_vm *vm);
/* "fake:N", to be given as lb_vm_ident.qmp_path; buf holds 32 bytes; returns buf.
 * Attaching by name alone works while just one living guest has the name. */
const char *lb_fake_address(lb_fake_id id, char buf[32]);

/* The hypervisor process dies: slots fail with LB_E_HV from now on. */
int lb_fake_kill(lb_fake_id id, struct lb_error *err);
/* As kill, but the guest switched itself off. */
int lb_fake_power_off(lb_fake_id id, struct lb_error *err);
int lb_fake_set_rate(lb_fake_id id, uint64_t rate_pages_per_s, struct lb_error *err);
/* The guest itself rewrites one page now, running or not (block 0 ram, 1 vram). */
int lb_fake_touch(lb_fake_id id, unsigned block, uint64_t page, struct lb_error *err);
/* Compare every page with what the guest knows it wrote; the guest is held
 * meanwhile.  Missing pages are touched, and bad when they do not come in time.  LB_E_NOT_FOUND when gone; *bad_pages may be non-zero on success. */
int lb_fake_verify(lb_fake_id id, uint64_t *bad_pages, struct lb_error *err);

struct lb_fake_stats {
    bool alive, running, holds_disk, attached;
    unsigned throttle_percent;
    uint64_t writes;      /* since boot, kept across migration */
    uint64_t announces;   /* of this copy */
    uint64_t nonce;       /* the same before and after migration */
    bool frozen, checkpoint_mode, nic_held, mirroring;
    uint64_t frames;         /* sent since boot, kept across migration */
    uint64_t frames_blocked; /* how often the reader left no room: QEMU would have hung */
    uint64_t frames_dropped; /* the reader had gone */
    uint64_t disk_writes;    /* since boot, kept across migration */
    uint64_t clock_stepped_ns;
    uint64_t missing;        /* pages of fake.ram that have not come yet */
};
int lb_fake_stats(lb_fake_id id, struct lb_fake_stats *out, struct lb_error *err);

/* ---- network card. Frame n carries the nonce and n, from 1. */
#define LB_FAKE_FRAME_BYTES 64
/* The guest sends one frame now, running or not. LB_E_STATE when the holder leaves no room. */
int lb_fake_send(lb_fake_id id, struct lb_error *err);
/* A guest without a card gets one now. */
int lb_fake_plug_card(lb_fake_id id, struct lb_error *err);
/* The hypervisor ends the hold of the card by itself: what the guest sends is lost from now on. */
int lb_fake_break_hold(lb_fake_id id, struct lb_error *err);
/* false: no frame of a fake guest */
bool lb_fake_frame_parse(const void *frame, size_t len, uint64_t *nonce, uint64_t *seq);
/* Sees every frame that leaves a host, in order per guest, from threads of the fake. Must not call
 * back. A dead or frozen guest lets nothing out. NULL removes; so does reset. */
typedef void lb_fake_wire_fn(lb_fake_id from, const void *frame, size_t len, void *arg);
void lb_fake_set_wire(lb_fake_wire_fn *fn, void *arg);

/* ---- disk. Write n, from 1, fills one block with what follows from the nonce and n. */
/* The whole disk after so many writes; zeros before the first. */
void lb_fake_disk_fill(void *image, uint64_t disk_bytes, uint64_t nonce, uint64_t writes);
/* How many writes an image of its disk holds, frozen or not. LB_E_NOT_FOUND: the disk stands on no such. */
int lb_fake_image(lb_fake_id id, const char *path, uint64_t *writes, struct lb_error *err);
/* The NBD server of every mirror: gets each block of the first copy, then each write before it
 * counts as done. -1: the mirror fails as when the server is gone. As set_wire. */
typedef int lb_fake_mirror_fn(lb_fake_id from, const char *nbd_socket, const char *export_name,
                              uint64_t offset, const void *data, size_t len, void *arg);
void lb_fake_set_mirror(lb_fake_mirror_fn *fn, void *arg);

/* Living guests / running guests (not the frozen) of that name (NULL: of any name). */
unsigned lb_fake_count(const char *name);
unsigned lb_fake_running(const char *name);
/* End of a test: end every guest without a handle, disarm all faults.  Returns
 * how many guests had been left over (handles in use stay and are counted). */
unsigned lb_fake_reset(void);

/* ---- faults: armed for the whole process ---- */
enum lb_fake_slot {
    LB_FAKE_ATTACH, LB_FAKE_DESCRIBE, LB_FAKE_BLOCKS, LB_FAKE_LOG_ENABLE, LB_FAKE_LOG_CLEAN,
    LB_FAKE_LOG_PEEK, LB_FAKE_LOG_DISABLE, LB_FAKE_POPULATED, LB_FAKE_READ, LB_FAKE_STOP,
    LB_FAKE_CONT, LB_FAKE_SAVE_BEGIN, LB_FAKE_SAVE_END, LB_FAKE_THROTTLE, LB_FAKE_LAUNCH,
    LB_FAKE_PREPARE_RAM, LB_FAKE_WRITE, LB_FAKE_LOAD_STATE, LB_FAKE_RUN, LB_FAKE_ANNOUNCE,
    LB_FAKE_STATUS, LB_FAKE_DESTROY, LB_FAKE_CHECKPOINT_MODE, LB_FAKE_FREEZE, LB_FAKE_NICS,
    LB_FAKE_NIC_HOLD, LB_FAKE_NIC_UNHOLD, LB_FAKE_DISKS, LB_FAKE_DISK_MIRROR,
    LB_FAKE_DISK_MIRROR_STATUS, LB_FAKE_DISK_MIRROR_END, LB_FAKE_CLOCK_STEP,
    LB_FAKE_DISK_OVERLAY, LB_FAKE_DISK_FREEZE, LB_FAKE_DISK_JOIN,
    LB_FAKE_LAZY_BEGIN, LB_FAKE_LAZY_ATTACH, LB_FAKE_LAZY_FAULT, LB_FAKE_LAZY_PLACE,
    LB_FAKE_LAZY_OFFER, LB_FAKE_LAZY_TOUCHED, LB_FAKE_LAZY_MISSING, LB_FAKE_LAZY_END,
    LB_FAKE_CPU_FEATURES, LB_FAKE_N_SLOTS
};
/* The nth call from now (1: the next) fails with code, before it has any effect;
 * calls after it work again.  One fault per slot; nth 0 disarms.  A failing
 * destroy does end and free the guest, as its contract says, and then fails. */
void lb_fake_fail(enum lb_fake_slot slot, unsigned nth, enum lb_errcode code);
/* As above, but the call has its whole effect before it fails, as when the answer of a
 * hypervisor is lost (stop, cont and run only). */
void lb_fake_fail_late(enum lb_fake_slot slot, unsigned nth, enum lb_errcode code);
/* As lb_fake_fail, but the guest dies at that call (not for attach and launch). */
void lb_fake_die(enum lb_fake_slot slot, unsigned nth);
/* Every call of the slot takes that much longer. */
void lb_fake_delay(enum lb_fake_slot slot, unsigned ms);
/* Calls of the slot since the start or the last reset: bounds for a sweep. */
uint64_t lb_fake_calls(enum lb_fake_slot slot);
const char *lb_fake_slot_name(enum lb_fake_slot slot);

#endif
