/*
 * core/hv.h - the hypervisor interface.
 *
 * One table of functions per hypervisor, named after Xen's log-dirty control
 * (enable / peek / clean / disable).  Implementations: core/qemu (stock QEMU
 * from outside), core/fake (a process-local guest for tests); Xen later.
 *
 * Life of a source VM
 *      attach -> [describe] -> blocks -> log_enable -> { stop -> log_clean -> cont -> read }*
 *             -> stop -> log_clean -> save_state -> (hand-over) -> destroy
 *                                               \-> cont (anything failed)      -> detach
 * Life of a receiver
 *      launch -> blocks -> prepare_ram -> place pages -> load_state (paused, disks untouched)
 *             -> run -> announce -> detach            or destroy at any earlier point
 * Life of a protected VM (remus/)
 *      as a source, then checkpoint_mode -> { stop -> save_begin -> log_clean, copy -> save_end -> cont }*
 * Life of a receiver whose memory comes when it is touched (checkpoint/)
 *      launch -> blocks -> lazy_begin -> place device blocks -> load_state (while a thread serves faults)
 *             -> run -> { lazy_fault, lazy_place }* -> lazy_end -> detach
 *
 * Every slot is mandatory.  Slots are called only through the lb_hv_* wrappers
 * below, which check the state, from one thread at a time per VM (the engine
 * thread of the session) - except lb_hv_read, lb_hv_read_pages, lb_hv_write,
 * lb_hv_log_peek, lb_hv_freeze, and lb_hv_lazy_fault, _place, _offer, _touched and
 * _missing, which any thread may call concurrently.
 */
#ifndef LB_HV_H
#define LB_HV_H

#include "core/core.h"

#define LB_PAGE_SIZE 4096u   /* unit of every page index in Lifeboat */
#define LB_PAGE_SHIFT 12
#define LB_BLOCK_NAME_MAX 256

enum lb_ram_kind {
    LB_RAM_MAIN = 0,   /* guest memory: sent, sparse (unpopulated = zero on both sides) */
    LB_RAM_DEVICE = 1, /* vga.vram, device RAM, pflash: sent whole in round 0 */
    LB_RAM_ROM = 2,    /* identical when firmware is; digest compared, sent when it differs */
};

enum lb_ram_backing { LB_BACK_ANON, LB_BACK_SHARED, LB_BACK_HUGETLB };

/* A RAM block. Owned by the VM handle, valid until detach/destroy. */
struct lb_ram_block {
    uint32_t id;                  /* index in the table */
    char name[LB_BLOCK_NAME_MAX]; /* hypervisor's own name, e.g. "pc.ram" */
    uint64_t size_bytes;          /* multiple of LB_PAGE_SIZE */
    uint32_t track_bytes;         /* granularity of the dirty log: 4096, or 2 MiB for hugetlb */
    enum lb_ram_kind kind;
    enum lb_ram_backing backing;
    uint64_t hva;                 /* address in the VM's process; 0 when not located (ROM only) */
    void *map;                    /* our own MAP_SHARED view, or NULL: use lb_hv_read/write. NULL for main memory
                                     between lazy_begin and lazy_end: to touch a missing page of it would
                                     make it zeros behind the guest's back */
};

/* Which VM. All strings owned by the caller of attach. */
struct lb_vm_ident {
    const char *name;
    struct lb_proc_id proc;
    const char *qmp_path;   /* control socket; NULL: find one on the command line */
};

struct lb_disk_desc {
    char *id;          /* device or node name */
    char *path;        /* file name as the hypervisor reports it: what the guest writes to now */
    char *format;
    bool read_only;
    bool shareable;    /* share-rw / locking off */
    char *argv_path;   /* by which the command line knows it; differs from path when the image was
                          replaced while the VM ran (overlay, mirror). NULL or "": as path */
    bool backing;      /* only another image stands on it: the guest never writes it */
};

/* What a VM is: everything preflight and the launch of a receiver need.
 * Travels as protobuf (netproto/control.proto VmDescription). */
struct lb_vm_desc {
    char *name;
    char *hypervisor;      /* "qemu" */
    char *hv_version;      /* "7.2.22" */
    char *emulator;        /* path of the binary */
    char **argv;           /* source command line, argv[0] included, Lifeboat's own additions removed */
    char *cwd;
    uint32_t uid, gid;
    char *machine;         /* versioned: "pc-i440fx-7.2" */
    char *accel;           /* "kvm" | "tcg" */
    char *cpu_model;       /* e.g. "max-x86_64-cpu" */
    uint32_t vcpus;
    uint64_t ram_bytes;
    char *uuid;
    struct lb_disk_desc *disks;
    unsigned n_disks;
    char **features;       /* guest-visible CPU feature names/words, sorted; NULL-terminated */
    char **blockers;       /* "what: why: remedy" per thing that cannot travel; NULL-terminated */
    char *kernel_release;  /* source host */
};
void lb_vm_desc_free(struct lb_vm_desc *d);

/* How a receiver is launched on this host: from the host's configuration. */
struct lb_path_map { char *from, *to; };          /* prefix replacement */
struct lb_disk_map { char *argv_path, *path, *format; };
struct lb_launch_opts {
    const char *name;
    const char *run_dir;             /* private directory of this VM: qmp.sock, log */
    const char *emulator;            /* NULL: same path as the source's */
    const struct lb_path_map *paths; /* sockets, files */
    unsigned n_paths;
    const struct lb_path_map *taps;  /* whole-name replacement of ifname=; to "": a tap that is connected to nothing */
    unsigned n_taps;
    /* Disks whose image is another one than the command line says (an overlay took its place, or a
     * clone has its own): by the file name on the source's command line (lb_disk_desc.argv_path, or path
     * when that is empty). `path` is one of this host, it is not mapped. What is not here follows
     * desc->disks: argv_path is replaced by path, mapped by `paths`. LB_E_UNSUPPORTED when the command
     * line has no such disk. */
    const struct lb_disk_map *disks;
    unsigned n_disks;
    /* Another machine from the same state: what the next boot of the guest should see (the one that runs
     * keeps the MACs and the UUID that it has in memory). NULL/"": as is. */
    const char *new_name;            /* of the VM: -name */
    const char *new_uuid;
    const char *mac_seed;            /* new MACs (locally administered), a function of this and the old one */
    /* Main memory as a private view of this memfd: absent pages are the memfd's, writes are the VM's own.
     * It has exactly main memory's size and is sealed (F_SEAL_SHRINK, GROW, WRITE: its writable mappings are
     * gone). prepare_ram is to be called; then nothing of main memory is placed. LB_E_UNSUPPORTED: the VM has
     * several pieces of memory. 0: memory of its own. The caller may close it after launch. */
    int shared_memory_fd;
};

/* ---- what checkpointing needs (remus/) */

enum lb_nic_kind {
    LB_NIC_TAP,    /* a kernel tap: its output can be held outside the hypervisor */
    LB_NIC_INSIDE, /* the hypervisor can hold it: nic_hold */
    LB_NIC_NONE,   /* connected to nothing */
    LB_NIC_OPAQUE, /* can not be held: `why` says what it is and what to do */
};
struct lb_nic {
    char id[128];     /* of the back end: QEMU's netdev id */
    enum lb_nic_kind kind;
    char ifname[16];  /* TAP: in the network namespace of the VM's process */
    unsigned queues;  /* TAP: 1.. */
    bool vhost;
    char why[256];    /* OPAQUE: "what it is: remedy" */
};
/* One writable disk as the guest has it. */
struct lb_hv_disk {
    char id[256];          /* what disk_mirror takes: QEMU's drive, else its device; stable while the VM lives, and the
                              same in a receiver, whatever becomes of its image and nodes */
    char path[512];        /* file under it, "" when it is none */
    char format[32];       /* "raw", "qcow2", ... */
    uint64_t size_bytes;   /* as the guest sees it */
    bool shareable;
};
struct lb_mirror_status {
    bool ready;            /* source and target are the same, every later write goes to both */
    bool failed;           /* ended by itself: the disk is no longer copied */
    uint64_t done_bytes, total_bytes;
    char error[256];
};

struct lb_hv_vm;   /* opaque: a handle on one VM, source or receiver */

struct lb_hv_ops {
    const char *name;   /* "qemu" */

    /* ---- source ---- */
    /* Open a handle on a running VM. Does not disturb it. */
    int (*attach)(const struct lb_vm_ident *ident, struct lb_hv_vm **out, struct lb_error *err);
    /* Fill *out (caller: lb_vm_desc_free). May take tens of ms; guest keeps running. Works on
     * a receiver too (its CPU features are compared with the source's). */
    int (*describe)(struct lb_hv_vm *vm, struct lb_vm_desc *out, struct lb_error *err);
    /* Only the features of describe, at once; *out: caller frees each and the list. */
    int (*cpu_features)(struct lb_hv_vm *vm, char ***out, struct lb_error *err);
    /* Locate RAM blocks; table owned by vm. */
    int (*blocks)(struct lb_hv_vm *vm, const struct lb_ram_block **out, unsigned *n,
                  struct lb_error *err);
    /* Start logging writes on every block that is not ROM. Pages written before
     * this call are not in the log. Guest running or stopped. */
    int (*log_enable)(struct lb_hv_vm *vm, struct lb_error *err);
    /* OR the pages written since the last clean (or enable) into dirty (one bit
     * per LB_PAGE_SIZE, n_bits = size/4096) and forget them. ONLY while stopped
     * (asserted): in-flight DMA would be lost otherwise, see DESIGN 2a. */
    int (*log_clean)(struct lb_hv_vm *vm, const struct lb_ram_block *blk, struct lb_bitmap *dirty,
                     struct lb_error *err);
    /* As clean but without forgetting, for pages [first, first+count), any time,
     * any thread: a hint which pages will be in the next round anyway. dirty has at
     * least `count` bits, bit 0 is page `first`; bits are only set, never cleared. */
    int (*log_peek)(struct lb_hv_vm *vm, const struct lb_ram_block *blk, uint64_t first,
                    uint64_t count, struct lb_bitmap *dirty, struct lb_error *err);
    int (*log_disable)(struct lb_hv_vm *vm, struct lb_error *err);
    /* Set bits of pages that may hold something other than zeros. */
    int (*populated)(struct lb_hv_vm *vm, const struct lb_ram_block *blk, struct lb_bitmap *pages,
                     struct lb_error *err);
    /* Copy pages into buf. For blocks without a map. Any thread. */
    int (*read)(struct lb_hv_vm *vm, const struct lb_ram_block *blk, uint64_t first_page,
                uint64_t n_pages, void *buf, struct lb_error *err);
    /* The same for n pages anywhere in the block, ascending, into buf one after the other: one
     * system call per thousand instead of one each. */
    int (*read_pages)(struct lb_hv_vm *vm, const struct lb_ram_block *blk, const uint32_t *pages,
                      uint64_t n, void *buf, struct lb_error *err);
    /* Pause: on return the guest does not run and no device I/O is in flight. */
    int (*stop)(struct lb_hv_vm *vm, struct lb_error *err);
    /* Continue; also re-acquires disks released by save_state(final). */
    int (*cont)(struct lb_hv_vm *vm, struct lb_error *err);
    /* Device and CPU state while stopped; *buf malloc'ed, caller frees. `final`
     * also releases the disks (image locks) for the receiver. `begin` returns at
     * once, `end` waits, so that page copying overlaps. */
    int (*save_begin)(struct lb_hv_vm *vm, bool final, struct lb_error *err);
    int (*save_end)(struct lb_hv_vm *vm, void **buf, size_t *len, struct lb_error *err);
    /* Slow the guest: percent of CPU taken away, 0 = full speed, max 99. LB_E_UNSUPPORTED
     * when this host offers no way. Undone by detach and by death of the caller's daemon
     * at the next start (recorded in run_dir by the implementation when needed). */
    int (*throttle)(struct lb_hv_vm *vm, unsigned percent, struct lb_error *err);

    /* ---- checkpoints (source) ---- */
    /* A hint: from now on (on) every stop is followed by save_begin and that by cont, so that the
     * commands can be prepared ahead; and where the guest's clock stands, for clock_step. */
    int (*checkpoint_mode)(struct lb_hv_vm *vm, bool on, struct lb_error *err);
    /* Keep the guest from running, now, whatever the hypervisor is doing (QEMU: SIGSTOP by pidfd).
     * Any thread. off: as before. */
    int (*freeze)(struct lb_hv_vm *vm, bool on, struct lb_error *err);
    /* *out malloc'ed, caller frees; every network card back end of the VM. */
    int (*nics)(struct lb_hv_vm *vm, struct lb_nic **out, unsigned *n, struct lb_error *err);
    /* Hold what the guest sends on an INSIDE card. fds[0]: frames come out of it (u32 BE length,
     * then the frame); fds[1]: the same frames written to it go on their way. The reader must never
     * stop reading: a full socket blocks the hypervisor. A dead reader drops (fails closed). */
    int (*nic_hold)(struct lb_hv_vm *vm, const char *id, int fds[2], struct lb_error *err);
    /* While stopped (else LB_E_STATE), everything read and released before. Closes neither fd. */
    int (*nic_unhold)(struct lb_hv_vm *vm, const char *id, struct lb_error *err);
    /* *out malloc'ed, caller frees; only writable disks. */
    int (*disks)(struct lb_hv_vm *vm, struct lb_hv_disk **out, unsigned *n, struct lb_error *err);
    /* Copy a disk to an NBD export on a unix socket (whole, then every write before the guest's
     * completes). Returns when the copying has begun. At every stop the export has every write. */
    int (*disk_mirror)(struct lb_hv_vm *vm, const char *id, const char *nbd_socket,
                       const char *export_name, struct lb_error *err);
    /* With poll the hypervisor is asked for the progress (a command: not between checkpoints);
     * without, only what it said by itself counts: `ready` and `failed`. Costs nothing. */
    int (*disk_mirror_status)(struct lb_hv_vm *vm, const char *id, bool poll,
                              struct lb_mirror_status *out, struct lb_error *err);
    /* End it and forget the export; failed or never begun is success. */
    int (*disk_mirror_end)(struct lb_hv_vm *vm, const char *id, struct lb_error *err);
    /* ---- disks that keep a moment (source) ---- */
    /* Make a disk ready to be frozen: an empty qcow2 image at `path` (made here; must not exist) whose
     * backing file is the disk's present image. Guest running or stopped; tens of ms. The command line user of
     * the VM must be able to write it: it gets the owner of the image. LB_E_UNSUPPORTED with the remedy
     * when the disk cannot have an overlay. */
    int (*disk_overlay)(struct lb_hv_vm *vm, const char *id, const char *path, struct lb_error *err);
    /* While stopped: from now on the guest writes to the overlays made ready, all of them or (on
     * error) none; what was the image of each disk is frozen. */
    int (*disk_freeze)(struct lb_hv_vm *vm, struct lb_error *err);
    /* Forget the overlays made ready and not used, and their files. On a new handle, after a process that
     * died: what that one left in the hypervisor; the files are the caller's then. */
    void (*disk_overlay_drop)(struct lb_hv_vm *vm);
    /* Join two images of a disk's chain, guest running or stopped: what is in `top` goes into its backing file
     * `base`, then whoever stood on top stands on base. Blocks (progress by `tick`, -1 cancels: the chain stays as
     * it is and valid, but `base` keeps no moment from the beginning on). The file `top` is left to the caller. */
    int (*disk_join)(struct lb_hv_vm *vm, const char *id, const char *top, const char *base,
                     int (*tick)(uint64_t done, uint64_t total, void *arg), void *arg,
                     struct lb_error *err);
    /* Set the guest's paravirtual clock forward by *step_ns, but not further than it has fallen
     * behind since checkpoint_mode(on); *step_ns becomes what was done. A pause as the caller sees
     * it is longer than what the guest lost. Guest running (KVM; LB_E_UNSUPPORTED elsewhere). */
    int (*clock_step)(struct lb_hv_vm *vm, uint64_t *step_ns, struct lb_error *err);

    /* ---- receiver ---- */
    /* Start an empty receiver as its own process (setsid, survives us), derived from
     * desc; returns when it accepts control commands. On failure nothing is left. */
    int (*launch)(const struct lb_vm_desc *desc, const struct lb_launch_opts *opts,
                  struct lb_hv_vm **out, struct lb_error *err);
    /* Make main RAM read as zeros everywhere (drop what launch put there; with shared_memory_fd: as that
     * memory) and get it ready for fast placing. Once, before the first page. */
    int (*prepare_ram)(struct lb_hv_vm *vm, struct lb_error *err);
    /* Instead of prepare_ram: main memory is empty, and whoever touches a page of it waits until it is
     * placed. Until lazy_end it is not read or written in any other way than lazy_place (asserted). LB_E_UNSUPPORTED: not here (use prepare_ram; nothing has changed). The guest goes on waiting when our
     * process dies (QEMU holds the userfaultfd too). After Xen's memory paging (xenpaging): evict, populate. */
    int (*lazy_begin)(struct lb_hv_vm *vm, struct lb_error *err);
    /* The same on a handle from attach: another process began it and died. Wakes whoever waits. LB_E_NOT_FOUND: nothing
     * is missing (it had ended). The guest may be running, waiting or not yet started; QMP may not answer while it waits:
     * this needs none, and the handle has none before run or lazy_end asks for it. */
    int (*lazy_attach)(const struct lb_vm_ident *ident, struct lb_hv_vm **out, struct lb_error *err);
    /* Next page that somebody waits for: 1; 0 when there was none within timeout_ms. A page may come twice. */
    int (*lazy_fault)(struct lb_hv_vm *vm, unsigned timeout_ms, const struct lb_ram_block **blk,
                      uint64_t *page, struct lb_error *err);
    /* Place pages that are missing and wake who waits for them; pages that are there stay as they are. buf NULL:
     * zeros. *placed (may be NULL): how many. Any thread. */
    int (*lazy_place)(struct lb_hv_vm *vm, const struct lb_ram_block *blk, uint64_t first,
                      uint64_t n, const void *buf, uint64_t *placed, struct lb_error *err);
    /* The same for pages that nobody is known to wait for, so that lazy_touched can tell whether somebody came. A wait for
     * one of them may go on until lazy_place says it again. buf not NULL. Any thread. */
    int (*lazy_offer)(struct lb_hv_vm *vm, const struct lb_ram_block *blk, uint64_t first, uint64_t n,
                      const void *buf, struct lb_error *err);
    /* Set the bits of the pages that were placed or that, offered, the guest or its devices have touched. LB_E_UNSUPPORTED:
     * cannot be known here. Any thread. */
    int (*lazy_touched)(struct lb_hv_vm *vm, const struct lb_ram_block *blk, struct lb_bitmap *pages,
                        struct lb_error *err);
    /* Set the bits of the pages that are missing. */
    int (*lazy_missing)(struct lb_hv_vm *vm, const struct lb_ram_block *blk, struct lb_bitmap *pages,
                        struct lb_error *err);
    /* Nothing is missing any more (what still is reads as zeros): the memory is ordinary from now on, also for the
     * dirty log. No other lazy_* is under way. Again is success. */
    int (*lazy_end)(struct lb_hv_vm *vm, struct lb_error *err);
    /* Place pages. For blocks without a map. Any thread. */
    int (*write)(struct lb_hv_vm *vm, const struct lb_ram_block *blk, uint64_t first_page,
                 uint64_t n_pages, const void *buf, struct lb_error *err);
    /* Load device state. On return the VM is complete but PAUSED and has not touched
     * its disks (QEMU: -S + late-block-activate). */
    int (*load_state)(struct lb_hv_vm *vm, const void *buf, size_t len, struct lb_error *err);
    /* Take the disks and run. */
    int (*run)(struct lb_hv_vm *vm, struct lb_error *err);
    /* Gratuitous ARP / RARP from every NIC, repeated by the hypervisor. */
    int (*announce)(struct lb_hv_vm *vm, struct lb_error *err);

    /* ---- both ---- */
    /* Is it there, and does the guest run? */
    int (*status)(struct lb_hv_vm *vm, bool *alive, bool *running, struct lb_error *err);
    /* Did the guest end, or is it ending, by itself or by somebody's wish (power off, quit, SIGTERM),
     * as far as the hypervisor could still say? false: it was killed, crashed, or goes on. */
    bool (*shut_down)(struct lb_hv_vm *vm);
    /* Identity and control path for the registry. Strings owned by vm. */
    void (*ident)(struct lb_hv_vm *vm, struct lb_vm_ident *out);
    /* Without a handle, for recovery after a crash: is that VM or receiver there, in
     * whatever state?  Identity by proc (QEMU) or by what ident.qmp_path names. */
    bool (*exists)(const struct lb_vm_ident *ident);
    /* End it, in whatever state; on 0 it is gone. Gone already is success. proc.pid 0: a receiver that may have been
     * started with RUN_DIR/qmp.sock = qmp_path by somebody who did not live to note it. */
    int (*end)(const struct lb_vm_ident *ident, struct lb_error *err);
    /* Stop tracking and throttling, close, free. VM stays as it is. NULL is fine. */
    void (*detach)(struct lb_hv_vm *vm);
    /* Kill the VM (waits until gone, removes what launch made), close, free. */
    int (*destroy)(struct lb_hv_vm *vm, struct lb_error *err);
};

extern const struct lb_hv_ops lb_hv_qemu;
extern const struct lb_hv_ops lb_hv_fake;

/* Wrappers. lb_hv_vm implementations embed struct lb_hv_vm_base first. */
enum lb_hv_run_state { LB_HV_RUNNING, LB_HV_STOPPED, LB_HV_INCOMING, LB_HV_LOADED };
struct lb_hv_vm_base {
    const struct lb_hv_ops *ops;
    enum lb_hv_run_state state;  /* engine thread */
    bool logging;                /* engine thread */
    bool saving;                 /* engine thread: between save_begin and save_end */
    bool lazy;                   /* engine thread: between lazy_begin or lazy_attach and lazy_end */
};

/* Does a host offer all that a guest uses? Lists as in lb_vm_desc.features; NULL: nothing. LB_E_PREFLIGHT names what is
 * lacking; the remedy is that of a VM that runs elsewhere. */
int lb_cpu_features_check(char *const *guest, char *const *host, struct lb_error *err);

int lb_hv_attach(const struct lb_hv_ops *ops, const struct lb_vm_ident *ident,
                 struct lb_hv_vm **out, struct lb_error *err);
int lb_hv_describe(struct lb_hv_vm *vm, struct lb_vm_desc *out, struct lb_error *err);
int lb_hv_cpu_features(struct lb_hv_vm *vm, char ***out, struct lb_error *err);
int lb_hv_blocks(struct lb_hv_vm *vm, const struct lb_ram_block **out, unsigned *n,
                 struct lb_error *err);
int lb_hv_log_enable(struct lb_hv_vm *vm, struct lb_error *err);
int lb_hv_log_clean(struct lb_hv_vm *vm, const struct lb_ram_block *blk, struct lb_bitmap *dirty,
                    struct lb_error *err);
int lb_hv_log_peek(struct lb_hv_vm *vm, const struct lb_ram_block *blk, uint64_t first,
                   uint64_t count, struct lb_bitmap *dirty, struct lb_error *err);
int lb_hv_log_disable(struct lb_hv_vm *vm, struct lb_error *err);
int lb_hv_populated(struct lb_hv_vm *vm, const struct lb_ram_block *blk, struct lb_bitmap *pages,
                    struct lb_error *err);
int lb_hv_read(struct lb_hv_vm *vm, const struct lb_ram_block *blk, uint64_t first_page,
               uint64_t n_pages, void *buf, struct lb_error *err);
int lb_hv_read_pages(struct lb_hv_vm *vm, const struct lb_ram_block *blk, const uint32_t *pages,
                     uint64_t n, void *buf, struct lb_error *err);
int lb_hv_stop(struct lb_hv_vm *vm, struct lb_error *err);
int lb_hv_cont(struct lb_hv_vm *vm, struct lb_error *err);
int lb_hv_save_begin(struct lb_hv_vm *vm, bool final, struct lb_error *err);
int lb_hv_save_end(struct lb_hv_vm *vm, void **buf, size_t *len, struct lb_error *err);
int lb_hv_throttle(struct lb_hv_vm *vm, unsigned percent, struct lb_error *err);
int lb_hv_checkpoint_mode(struct lb_hv_vm *vm, bool on, struct lb_error *err);
int lb_hv_freeze(struct lb_hv_vm *vm, bool on, struct lb_error *err);
int lb_hv_nics(struct lb_hv_vm *vm, struct lb_nic **out, unsigned *n, struct lb_error *err);
int lb_hv_nic_hold(struct lb_hv_vm *vm, const char *id, int fds[2], struct lb_error *err);
int lb_hv_nic_unhold(struct lb_hv_vm *vm, const char *id, struct lb_error *err);
int lb_hv_disks(struct lb_hv_vm *vm, struct lb_hv_disk **out, unsigned *n, struct lb_error *err);
int lb_hv_disk_mirror(struct lb_hv_vm *vm, const char *id, const char *nbd_socket,
                      const char *export_name, struct lb_error *err);
int lb_hv_disk_mirror_status(struct lb_hv_vm *vm, const char *id, bool poll,
                             struct lb_mirror_status *out, struct lb_error *err);
int lb_hv_disk_mirror_end(struct lb_hv_vm *vm, const char *id, struct lb_error *err);
int lb_hv_disk_overlay(struct lb_hv_vm *vm, const char *id, const char *path, struct lb_error *err);
int lb_hv_disk_freeze(struct lb_hv_vm *vm, struct lb_error *err);
void lb_hv_disk_overlay_drop(struct lb_hv_vm *vm);
int lb_hv_disk_join(struct lb_hv_vm *vm, const char *id, const char *top, const char *base,
                    int (*tick)(uint64_t done, uint64_t total, void *arg), void *arg,
                    struct lb_error *err);
int lb_hv_clock_step(struct lb_hv_vm *vm, uint64_t *step_ns, struct lb_error *err);
int lb_hv_launch(const struct lb_hv_ops *ops, const struct lb_vm_desc *desc,
                 const struct lb_launch_opts *opts, struct lb_hv_vm **out, struct lb_error *err);
int lb_hv_prepare_ram(struct lb_hv_vm *vm, struct lb_error *err);
int lb_hv_lazy_begin(struct lb_hv_vm *vm, struct lb_error *err);
int lb_hv_lazy_attach(const struct lb_hv_ops *ops, const struct lb_vm_ident *ident,
                      struct lb_hv_vm **out, struct lb_error *err);
int lb_hv_lazy_fault(struct lb_hv_vm *vm, unsigned timeout_ms, const struct lb_ram_block **blk,
                     uint64_t *page, struct lb_error *err);
int lb_hv_lazy_place(struct lb_hv_vm *vm, const struct lb_ram_block *blk, uint64_t first, uint64_t n,
                     const void *buf, uint64_t *placed, struct lb_error *err);
int lb_hv_lazy_offer(struct lb_hv_vm *vm, const struct lb_ram_block *blk, uint64_t first, uint64_t n,
                     const void *buf, struct lb_error *err);
int lb_hv_lazy_touched(struct lb_hv_vm *vm, const struct lb_ram_block *blk, struct lb_bitmap *pages,
                       struct lb_error *err);
int lb_hv_lazy_missing(struct lb_hv_vm *vm, const struct lb_ram_block *blk, struct lb_bitmap *pages,
                       struct lb_error *err);
int lb_hv_lazy_end(struct lb_hv_vm *vm, struct lb_error *err);
int lb_hv_write(struct lb_hv_vm *vm, const struct lb_ram_block *blk, uint64_t first_page,
                uint64_t n_pages, const void *buf, struct lb_error *err);
int lb_hv_load_state(struct lb_hv_vm *vm, const void *buf, size_t len, struct lb_error *err);
int lb_hv_run(struct lb_hv_vm *vm, struct lb_error *err);
int lb_hv_announce(struct lb_hv_vm *vm, struct lb_error *err);
int lb_hv_status(struct lb_hv_vm *vm, bool *alive, bool *running, struct lb_error *err);
bool lb_hv_shut_down(struct lb_hv_vm *vm);
void lb_hv_ident(struct lb_hv_vm *vm, struct lb_vm_ident *out);
bool lb_hv_exists(const struct lb_hv_ops *ops, const struct lb_vm_ident *ident);
int lb_hv_end(const struct lb_hv_ops *ops, const struct lb_vm_ident *ident, struct lb_error *err);
void lb_hv_detach(struct lb_hv_vm *vm);
int lb_hv_destroy(struct lb_hv_vm *vm, struct lb_error *err);

#endif
