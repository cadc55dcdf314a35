/*
 * core/qemu/qemu_internal.h - inside of the QEMU backend.
 *
 *   qemu.c        table of functions, attach and detach
 *   qmp.c         control socket: commands, events, deadlines
 *   inject.c      system calls executed by QEMU's main thread (ptrace)
 *   ramblocks.c   where guest memory is in QEMU's address space
 *   ram.c         reading, placing, emptying and listing populated pages
 *   dirty_*.c     the dirty log: userfaultfd write protection, or soft-dirty
 *   state.c       device state out of and into QEMU
 *   describe.c    what the VM is, and what keeps it from travelling
 *   cmdline.c     QEMU command lines as a list of options
 *   launch.c      a receiver: derived command line, start, end
 *   throttle.c    less CPU for the guest
 *   net.c         network cards: what they are connected to; holding what they send
 *   disk.c        disks, and copying them while they are written
 *   overlay.c     disks that keep a moment: overlays, freezing, joining
 *   images.c      disk images on a command line
 *   qcow2.c       what a qcow2 image stands on
 *   another.c     another machine from the same state
 *   lazy.c        memory that comes when it is touched
 *   clock.c       the guest's paravirtual clock (KVM)
 */
#ifndef LB_QEMU_INTERNAL_H
#define LB_QEMU_INTERNAL_H

#include <jansson.h>

#include "core/hv.h"
#include "core/qemu/qemu.h"

/* How long QEMU may take, ms. stop, cont and save wait for the disks. */
#define LB_QMP_MS 10000u
#define LB_QMP_SLOW_MS 30000u

/* ------------------------------------------------------------------- qmp.c */

struct lb_qmp;

/* Connect and negotiate. pidfd watches QEMU (borrowed), expect_pid is who must
 * be at the other end. retry_until_ns: keep trying to connect while the socket
 * is not there yet (0: once), and wait for the greeting for at least as long. */
int lb_qmp_open(const char *path, pid_t expect_pid, int pidfd, uint64_t retry_until_ns,
                struct lb_qmp **out, struct lb_error *err);
void lb_qmp_close(struct lb_qmp *q);

/* Send a command; args is the JSON text of its arguments or NULL; pass_fd goes
 * along when >= 0; next is the text (lb_qmp_text) of a command to send ahead (see
 * qmp.c), or NULL. */
int lb_qmp_send(struct lb_qmp *q, const char *cmd, const char *args, int pass_fd,
                const char *next, struct lb_error *err);
/* A command but for its last byte, as sent ahead. malloc'ed. */
char *lb_qmp_text(const char *cmd, const char *args);
#define LB_QMP_CONT "{\"execute\":\"cont\""
#define LB_QMP_STOP "{\"execute\":\"stop\""
/* Reply of the oldest command sent and not yet waited for. *ret (may be NULL)
 * is a new reference. */
int lb_qmp_wait(struct lb_qmp *q, const char *cmd, unsigned timeout_ms, json_t **ret,
                struct lb_error *err);
/* Both. */
int lb_qmp_cmd(struct lb_qmp *q, const char *cmd, const char *args, json_t **ret,
               struct lb_error *err);
/* A line of the human monitor; *text is malloc'ed. */
int lb_qmp_hmp(struct lb_qmp *q, const char *line, char **text, struct lb_error *err);
int lb_qmp_send_hmp(struct lb_qmp *q, const char *line, struct lb_error *err);
int lb_qmp_wait_hmp(struct lb_qmp *q, const char *line, char **text, struct lb_error *err);
/* Wait for a MIGRATION event that says "completed" or "failed" (copied to status). */
int lb_qmp_wait_migration(struct lb_qmp *q, unsigned timeout_ms, char status[32],
                          struct lb_error *err);
/* Forget the last MIGRATION event. */
void lb_qmp_clear_migration(struct lb_qmp *q);

/* Called for every event that is read; data is borrowed and may be NULL. */
typedef void lb_qmp_event_fn(const char *event, const json_t *data, void *arg);
void lb_qmp_on_event(struct lb_qmp *q, lb_qmp_event_fn *fn, void *arg);
/* Wait for the next event of any kind, when no reply is waited for. */
int lb_qmp_wait_event(struct lb_qmp *q, unsigned timeout_ms, const char *doing,
                      struct lb_error *err);
/* Read the events that have come, without waiting and without touching a reply. */
int lb_qmp_drain(struct lb_qmp *q, struct lb_error *err);

/* ---------------------------------------------------------------- inject.c */

struct lb_injector;
/* Run body in a thread of its own that has QEMU's main thread seized and
 * stopped.  Nothing of the caller may waitpid(-1) meanwhile. */
int lb_inject(pid_t pid, int (*body)(struct lb_injector *in, void *arg, struct lb_error *err),
              void *arg, struct lb_error *err);
/* From body: have QEMU execute a system call; *ret is the kernel's answer
 * (-errno on failure). */
int lb_inject_syscall(struct lb_injector *in, long nr, const uint64_t args[6], long *ret,
                      struct lb_error *err);
/* From body: address of len <= 4096 bytes of QEMU's memory that a call may use; its content is put
 * back at the end. Once per injection. */
int lb_inject_scratch(struct lb_injector *in, size_t len, uint64_t *addr, struct lb_error *err);

/* ------------------------------------------------------------- ramblocks.c */

struct lb_qemu_block {
    struct lb_ram_block pub;
    uint64_t total_bytes;    /* allocated length; pub.size_bytes may be shorter */
    bool read_only;          /* as QEMU >= 8 prints it */
    bool file_private;       /* MAP_PRIVATE of a file: absent pages are the file's */
    int map_fd;              /* the backing file, else -1 */
    uint64_t map_offset;     /* of the block in that file */
};

/* ------------------------------------------------------------------- dirty */

/* Source of the dirty log. Calls come as in hv.h; peek from any thread. */
struct lb_dirty_ops {
    const char *name;
    bool (*supported)(void);   /* by the running kernel */
    /* On return every later write is logged. Guest may run. */
    int (*enable)(struct lb_hv_vm *vm, struct lb_error *err);
    int (*clean)(struct lb_hv_vm *vm, const struct lb_qemu_block *b, struct lb_bitmap *dirty,
                 struct lb_error *err);
    int (*peek)(struct lb_hv_vm *vm, const struct lb_qemu_block *b, uint64_t first,
                uint64_t count, struct lb_bitmap *dirty, struct lb_error *err);
    void (*disable)(struct lb_hv_vm *vm);
};
extern const struct lb_dirty_ops lb_dirty_uffd;
extern const struct lb_dirty_ops lb_dirty_softdirty;
/* The best one this kernel has, or the one $LIFEBOAT_DIRTY_LOG names. */
const struct lb_dirty_ops *lb_dirty_choose(struct lb_error *err);

struct lb_hv_vm {
    struct lb_hv_vm_base base;

    /* immutable after attach or launch */
    char *name;
    struct lb_proc_id proc;
    int pidfd;
    int pagemap_fd;
    char *qmp_path;
    char *run_dir;               /* launched by us: removed by destroy; else NULL */
    char **sockets;              /* launched by us: what it listens on; else NULL */
    int version[3];              /* QEMU's */
    char *machine;               /* versioned */

    /* engine thread */
    struct lb_qmp *qmp;          /* NULL after lazy_attach: see lb_qemu_connect */
    char *save_text;             /* checkpoint mode: the save, as sent ahead at stop; else NULL */
    bool stopped_by_us;          /* from before "stop" to the answer to "cont" */
    bool paused_by_others;       /* by a STOP event that was not ours */
    bool shut_down;              /* by a SHUTDOWN event */
    bool released;               /* a final save gave the disks up */
    bool clock_based;            /* clock.c */
    int64_t clock_base_ns;       /* guest's clock minus ours */
    struct lb_qemu_hold *holds;  /* net.c */
    unsigned n_holds;
    struct lb_qemu_mirror *mirrors; /* disk.c */
    unsigned n_mirrors;
    struct lb_qemu_overlay *overlays; /* overlay.c: made ready, not used yet */
    unsigned n_overlays;
    struct lb_qemu_join *join;        /* overlay.c: what disk_join waits for; NULL: nothing */
    uint64_t stop_count;         /* how often the guest was stopped */
    const struct lb_dirty_ops *dirty;   /* chosen at log_enable */
    int uffd;                    /* dirty_uffd.c */
    struct lb_bitmap *sd_pending;       /* dirty_softdirty.c: per block, read but not handed out */
    struct lb_bitmap *sd_own;           /* per block: had a page of its own when last read */
    uint64_t sd_stop_count;
    bool *sd_given;              /* per block: handed out in this stop */
    int state_fd;                /* memfd that receives device states */
    int state_wfd;               /* the same, O_WRONLY, shared with QEMU */
    int fdset;                   /* number of QEMU's fd set, -1 */
    char *throttle_path;         /* record of what throttling did, NULL when it did nothing */
    int lazy_uffd;               /* lazy.c; used by any thread between begin or attach and end */
    int lazy_view_uffd;          /* of our own views of main memory; -1: offered pages are placed */
    int lazy_remote_fd;          /* its number in QEMU */
    char *lazy_path;             /* record of it, for the process after us */

    /* filled once by blocks, then immutable */
    struct lb_qemu_block *blocks;
    struct lb_ram_block *table;  /* what callers see, same order */
    unsigned n_blocks;
};

#define LB_QEMU_MAX_BLOCKS 4096u
int lb_qemu_find_blocks(struct lb_hv_vm *vm, struct lb_error *err);
/* The same without asking QEMU: names, sizes and addresses are in vm->blocks already. */
int lb_qemu_locate_blocks(struct lb_hv_vm *vm, struct lb_error *err);
void lb_qemu_free_blocks(struct lb_hv_vm *vm);
/* The private part of a block of vm's table. */
const struct lb_qemu_block *lb_qemu_block(struct lb_hv_vm *vm, const struct lb_ram_block *blk);

/* ------------------------------------------------------------------- ram.c */
int lb_qemu_populated(struct lb_hv_vm *vm, const struct lb_ram_block *blk,
                      struct lb_bitmap *pages, struct lb_error *err);
int lb_qemu_read_pages(struct lb_hv_vm *vm, const struct lb_ram_block *blk, const uint32_t *pages,
                       uint64_t n, void *buf, struct lb_error *err);
int lb_qemu_read(struct lb_hv_vm *vm, const struct lb_ram_block *blk, uint64_t first_page,
                 uint64_t n_pages, void *buf, struct lb_error *err);
int lb_qemu_write(struct lb_hv_vm *vm, const struct lb_ram_block *blk, uint64_t first_page,
                  uint64_t n_pages, const void *buf, struct lb_error *err);
int lb_qemu_prepare_ram(struct lb_hv_vm *vm, struct lb_error *err);
/* Drop all pages of a block. */
int lb_qemu_empty_block(struct lb_hv_vm *vm, const struct lb_qemu_block *b, struct lb_error *err);
/* Set the bits of pages that have been touched, also those that are all zeros. */
int lb_qemu_pages_there(struct lb_hv_vm *vm, const struct lb_qemu_block *b, struct lb_bitmap *pages,
                        struct lb_error *err);

/* --------------------------------------------------------------- pagemap.c */
/* PAGEMAP_SCAN over [start, end) of fd (/proc/PID/pagemap); each region found
 * goes to on_region. */
struct lb_pagemap_query {
    uint64_t flags, inverted, mask, anyof, ret;
};
int lb_pagemap_scan(int fd, const struct lb_pagemap_query *q, uint64_t start, uint64_t end,
                    void (*on_region)(uint64_t start, uint64_t end, void *arg), void *arg,
                    struct lb_error *err);
/* A scan of a process that died finds an empty address space and reports nothing:
 * call this after it, with an address that must be there. */
int lb_qemu_mm_alive(pid_t pid, uint64_t addr, struct lb_error *err);
/* pagemap words of n pages from addr */
int lb_pagemap_read(int fd, uint64_t addr, uint64_t n, uint64_t *words, struct lb_error *err);

/* ----------------------------------------------------------------- state.c */
/* Checkpoint mode: fills vm->save_text. */
int lb_qemu_save_prepare(struct lb_hv_vm *vm, struct lb_error *err);
int lb_qemu_save_begin(struct lb_hv_vm *vm, bool final, struct lb_error *err);
int lb_qemu_save_end(struct lb_hv_vm *vm, void **buf, size_t *len, struct lb_error *err);
int lb_qemu_load_state(struct lb_hv_vm *vm, const void *buf, size_t len, struct lb_error *err);
int lb_qemu_run(struct lb_hv_vm *vm, struct lb_error *err);
void lb_qemu_state_close(struct lb_hv_vm *vm);

/* ---------------------------------------------------------------- launch.c */
int lb_qemu_launch(const struct lb_vm_desc *desc, const struct lb_launch_opts *opts,
                   struct lb_hv_vm **out, struct lb_error *err);
/* -object of a clone's memory as that of a VM of its own (new string), or NULL when it is none. */
char *lb_qemu_ordinary_memory(const char *value);
/* Put the last lines of RUN_DIR/qemu.log behind the message of err. */
void lb_qemu_add_log(const char *run_dir, struct lb_error *err);
void lb_qemu_remove_run_files(const char *run_dir);

/* -------------------------------------------------------------- describe.c */
int lb_qemu_describe(struct lb_hv_vm *vm, struct lb_vm_desc *out, struct lb_error *err);
int lb_qemu_cpu_features(struct lb_hv_vm *vm, char ***out, struct lb_error *err);

/* --------------------------------------------------------------- cmdline.c */

/* One option of a QEMU command line. */
struct lb_qemu_opt {
    char *name;     /* without dashes; "" for a bare argument (a disk image) */
    char *value;    /* NULL when the option takes none */
};
struct lb_qemu_opts {
    char *emulator;
    struct lb_qemu_opt *v;
    unsigned n;
};
int lb_qemu_opts_parse(char *const *argv, struct lb_qemu_opts *out, struct lb_error *err);
void lb_qemu_opts_free(struct lb_qemu_opts *o);
/* Append; strings are copied. */
void lb_qemu_opts_add(struct lb_qemu_opts *o, const char *name, const char *value);
char **lb_qemu_opts_argv(const struct lb_qemu_opts *o);
bool lb_qemu_opt_is(const struct lb_qemu_opt *o, const char *name);
/* "a,b=c,,d,e": value of a key, malloc'ed (",," read as ","), or NULL.
 * key NULL: the first element when it has no '='. */
char *lb_qemu_prop(const char *value, const char *key);
/* New string with key=val replaced or added; val NULL: removed. */
char *lb_qemu_prop_set(const char *value, const char *key, const char *val);

/* ---------------------------------------------------------------- images.c */

/* An image (or an empty drive) of a command line. */
struct lb_qemu_image {
    char *path;            /* as it is written there; NULL: an empty drive */
    char *id;              /* of the drive, or NULL */
    char *node;            /* of the format, or NULL */
    unsigned opt;          /* number of the option that is the drive or the format */
    unsigned file_opt;     /* of the option with the file's name */
    const char *file_key;  /* and where it is there; static */
    bool drive;            /* -drive and what is short for it; else -blockdev */
};
struct lb_qemu_images {
    struct lb_qemu_image *v;
    unsigned n;
};
void lb_qemu_images_scan(const struct lb_qemu_opts *o, struct lb_qemu_images *out);
void lb_qemu_images_free(struct lb_qemu_images *im);
/* Which of them a disk was started with; b is one of `all`, the answer to query-block. NULL: none. */
const struct lb_qemu_image *lb_qemu_image_of(const struct lb_qemu_opts *o, const struct lb_qemu_images *im,
                                             const json_t *all, const json_t *b);
/* Another image there; format NULL or "": the same. Numbers of options stay. */
void lb_qemu_image_replace(struct lb_qemu_opts *o, const struct lb_qemu_image *im, const char *path,
                           const char *format);
/* Value of a dotted key of an option, whether it is a list or JSON; malloc'ed, or NULL. */
char *lb_qemu_get(const char *value, const char *key);
/* Set it there; val NULL: without it. */
void lb_qemu_put(char **value, const char *key, const char *val);

/* --------------------------------------------------------------- another.c */
/* What launch's new_name, new_uuid and mac_seed say. */
void lb_qemu_another(struct lb_qemu_opts *o, const struct lb_launch_opts *opts);

/* -------------------------------------------------------------- throttle.c */
int lb_qemu_throttle(struct lb_hv_vm *vm, unsigned percent, struct lb_error *err);

/* ------------------------------------------------------------------- net.c */
int lb_qemu_nics(struct lb_hv_vm *vm, struct lb_nic **out, unsigned *n, struct lb_error *err);
int lb_qemu_nic_hold(struct lb_hv_vm *vm, const char *id, int fds[2], struct lb_error *err);
int lb_qemu_nic_unhold(struct lb_hv_vm *vm, const char *id, struct lb_error *err);
void lb_qemu_holds_free(struct lb_hv_vm *vm);

/* ------------------------------------------------------------------ disk.c */
int lb_qemu_disks(struct lb_hv_vm *vm, struct lb_hv_disk **out, unsigned *n, struct lb_error *err);
int lb_qemu_disk_mirror(struct lb_hv_vm *vm, const char *id, const char *nbd_socket,
                        const char *export_name, struct lb_error *err);
int lb_qemu_disk_mirror_status(struct lb_hv_vm *vm, const char *id, bool poll,
                               struct lb_mirror_status *out, struct lb_error *err);
int lb_qemu_disk_mirror_end(struct lb_hv_vm *vm, const char *id, struct lb_error *err);
/* A BLOCK_JOB_* event. */
void lb_qemu_mirror_event(struct lb_hv_vm *vm, const char *event, const json_t *data);
void lb_qemu_mirrors_free(struct lb_hv_vm *vm);
/* Name of job and node of a disk's mirror. */
void lb_qemu_mirror_name(char name[20], const char *id);
/* What disks() calls it: an entry of query-block. Stays the same whatever its image and its nodes become:
 * the drive's id, else the device's (or its QOM path). malloc'ed. */
char *lb_qemu_disk_id(const json_t *entry);
/* The entry of query-block of that disk, new reference; NULL: err. */
json_t *lb_qemu_disk_entry(struct lb_hv_vm *vm, const char *id, struct lb_error *err);
/* File of an image as QEMU names it, out of "json:{...}" too; NULL: it is in no file. malloc'ed. */
char *lb_qemu_image_file(const char *name);
/* That, as a path of this host (a relative one is in the VM's directory); "" when it is no file. */
void lb_qemu_disk_path(char out[512], pid_t pid, const char *name);
/* Does the device say that others may write its disk too? qdev: QOM path or id, may be NULL. */
bool lb_qemu_share_rw(struct lb_hv_vm *vm, const char *qdev);

/* --------------------------------------------------------------- overlay.c */
int lb_qemu_disk_overlay(struct lb_hv_vm *vm, const char *id, const char *path, struct lb_error *err);
int lb_qemu_disk_freeze(struct lb_hv_vm *vm, struct lb_error *err);
/* A BLOCK_JOB_* event. */
void lb_qemu_join_event(struct lb_hv_vm *vm, const char *event, const json_t *data);
/* A node that a job may not have let go of yet; that there is none is fine. */
int lb_qemu_close_node(struct lb_hv_vm *vm, const char *node, struct lb_error *err);
void lb_qemu_overlays_free(struct lb_hv_vm *vm);
/* File of the i-th overlay made ready. */
const char *lb_qemu_overlay_path(const struct lb_hv_vm *vm, unsigned i);
void lb_qemu_disk_overlay_drop(struct lb_hv_vm *vm);
int lb_qemu_disk_join(struct lb_hv_vm *vm, const char *id, const char *top, const char *base,
                      int (*tick)(uint64_t done, uint64_t total, void *arg), void *arg,
                      struct lb_error *err);

/* ------------------------------------------------------------------ lazy.c */
#define LB_QEMU_LAZY_FILE "lazy" /* in run_dir */
int lb_qemu_lazy_begin(struct lb_hv_vm *vm, struct lb_error *err);
int lb_qemu_lazy_attach(const struct lb_vm_ident *ident, struct lb_hv_vm **out, struct lb_error *err);
int lb_qemu_lazy_fault(struct lb_hv_vm *vm, unsigned timeout_ms, const struct lb_ram_block **blk,
                       uint64_t *page, struct lb_error *err);
int lb_qemu_lazy_place(struct lb_hv_vm *vm, const struct lb_ram_block *blk, uint64_t first, uint64_t n,
                       const void *buf, uint64_t *placed, struct lb_error *err);
int lb_qemu_lazy_offer(struct lb_hv_vm *vm, const struct lb_ram_block *blk, uint64_t first, uint64_t n,
                       const void *buf, struct lb_error *err);
int lb_qemu_lazy_touched(struct lb_hv_vm *vm, const struct lb_ram_block *blk, struct lb_bitmap *pages,
                         struct lb_error *err);
int lb_qemu_lazy_missing(struct lb_hv_vm *vm, const struct lb_ram_block *blk, struct lb_bitmap *pages,
                         struct lb_error *err);
int lb_qemu_lazy_end(struct lb_hv_vm *vm, struct lb_error *err);
void lb_qemu_lazy_close(struct lb_hv_vm *vm); /* of a handle that goes; the guest goes on waiting */

/* ----------------------------------------------------------------- clock.c */
int lb_qemu_clock_step(struct lb_hv_vm *vm, uint64_t *step_ns, struct lb_error *err);
/* Note how the guest's clock stands to ours now; nothing without KVM. */
int lb_qemu_clock_base(struct lb_hv_vm *vm, struct lb_error *err);

/* ------------------------------------------------------------------ qemu.c */
struct lb_hv_vm *lb_qemu_vm_new(const char *name);
/* Close everything, free; the VM stays as it is. */
void lb_qemu_vm_free(struct lb_hv_vm *vm);
/* After qmp is open: version, machine, run state. */
int lb_qemu_identify(struct lb_hv_vm *vm, struct lb_error *err);
/* Open qmp, at qmp_path or at what the command line names, and identify; nothing when it is open. */
int lb_qemu_connect(struct lb_hv_vm *vm, struct lb_error *err);
int lb_qemu_open_pagemap(struct lb_hv_vm *vm, struct lb_error *err);
/* The process has ended. */
bool lb_qemu_dead(int pidfd);

#endif
