/*
 * remus/output_internal.h - the parts output.c is made of.
 *
 *   output_queue.c   frames of one card, in order, with marks between epochs. Pure
 *   output_bpf.c     the three small programs and the gate they share with us, by bpf(2)
 *   output_rtnl.c    links, queueing disciplines and filters by rtnetlink; network namespaces
 *   output_tap.c     a card held outside, from those two
 *   output_inside.c  a card held by the hypervisor, and its stream of frames
 *   output.c         the loop, the epochs, the record on disk
 *   output_recover.c what is done without a loop
 */
#ifndef LB_REMUS_OUTPUT_INTERNAL_H
#define LB_REMUS_OUTPUT_INTERNAL_H

#include "remus/output.h"

#define LB_VNET_HDR 12u              /* struct virtio_net_hdr_mrg_rxbuf, before every frame */
#define LB_FRAME_MAX (256u * 1024)   /* longest read, vnet header included */

/* ------------------------------------------------------------------- queue */

/* Frames of one card in the order they came:
 *
 *      head                  allowed        marked            in
 *       |-- may leave ---------|-- epochs ----|-- running epoch --|
 *
 * A mark says how many frames had come when its epoch ended, so a frame itself knows no epoch.
 * The bytes lie in chunks and are read from the kernel right where they stay. Not thread safe,
 * but the frame got by lb_oq_head stays where it is until lb_oq_pop. */
struct lb_oq_chunk;
struct lb_oq_mark {
    uint64_t epoch;
    uint64_t first, end;             /* frames [first, end) of all that ever came */
    struct lb_oq_chunk *chunk;       /* where `first` is */
    size_t off;
};
struct lb_oq {
    struct lb_oq_chunk *oldest, *newest, *spare;
    uint64_t in, marked, allowed, out;   /* counts of frames; out <= allowed <= marked <= in */
    uint64_t held_bytes;
    struct lb_oq_chunk *open_chunk;  /* the first frame after the last mark, when in > marked */
    size_t open_off;
    struct lb_oq_mark *marks;        /* of epochs not allowed yet, ascending */
    unsigned n_marks, cap_marks;
};
struct lb_oq_frame {
    uint64_t came_ns;
    uint64_t len;                    /* of data */
    unsigned char data[];            /* vnet header, frame */
};
/* Room for one frame of at most LB_FRAME_MAX bytes. The next call or commit ends it. */
void *lb_oq_room(struct lb_oq *q, struct lb_error *err);
void lb_oq_commit(struct lb_oq *q, size_t len, uint64_t now_ns);
/* All that has come and is not in an earlier epoch is of `epoch`. */
void lb_oq_mark(struct lb_oq *q, uint64_t epoch);
void lb_oq_allow(struct lb_oq *q, uint64_t epoch);  /* every epoch <= epoch */
void lb_oq_allow_all(struct lb_oq *q);              /* also what is not marked */
const struct lb_oq_frame *lb_oq_head(const struct lb_oq *q); /* next that may leave, or NULL */
const struct lb_oq_frame *lb_oq_oldest(const struct lb_oq *q); /* next of all, or NULL */
void lb_oq_pop(struct lb_oq *q);                    /* the head */
void lb_oq_free(struct lb_oq *q);

/* The frames of an epoch of all cards by their age, the newest that fit, as lb_output_copy has it. */
int lb_oq_copy(const struct lb_oq *const *cards, unsigned n_cards, uint64_t epoch, size_t max_bytes,
               void **buf, size_t *len, struct lb_error *err);
#define LB_OQ_COPY_HDR 6u            /* u16 card, u32 length */

/* Where the holder writes what it has put in place; caller frees. */
char *lb_output_record_path(const char *run_dir);

/* --------------------------------------------------------------------- bpf */

/* Shared with the programs in the kernel: what is stored here holds from that instant. */
struct lb_gate {
    uint64_t until_ns;               /* CLOCK_MONOTONIC */
    uint64_t dropped;                /* frames that came too late */
};
/* Maps it; the kernel keeps it for as long as a program uses it. *fd: of the map. */
int lb_bpf_gate(int *fd, struct lb_gate **gate, struct lb_error *err);
void lb_bpf_gate_unmap(struct lb_gate *gate);

/* On the guest's tap: a frame with the mark is one that we released: take the mark off and let it
 * pass if the gate is open, else drop it. Everything else goes out of `hold`. */
int lb_bpf_prog_hold(uint32_t mark, int hold_ifindex, int gate_fd, struct lb_error *err);
/* On the taps that we write to: mark, and go on with the action that the filter has. */
int lb_bpf_prog_mark(uint32_t mark, struct lb_error *err);
/* On the holding tap: what does not carry the mark is not the guest's, but something of the host that takes
 * every link for a network (LLDP, DHCP). Dropped. */
int lb_bpf_prog_only(uint32_t mark, struct lb_error *err);
int lb_bpf_prog_id(int prog_fd, uint32_t *id, struct lb_error *err);
/* Programs that run before ours on this link (tcx). */
int lb_bpf_tcx_count(int ifindex, unsigned *n, struct lb_error *err);

/* --------------------------------------------------------------- rtnetlink */

/* A socket of one network namespace: that of the thread that opened it, whoever uses it later. */
struct lb_rtnl {
    int fd;
    uint32_t seq;
};
int lb_rtnl_open(struct lb_rtnl *nl, struct lb_error *err);
void lb_rtnl_close(struct lb_rtnl *nl);

struct lb_rtnl_link {
    int ifindex;
    unsigned char mac[6];
    bool carrier;
    bool xdp;                        /* an XDP program is attached */
    uint64_t tx_dropped;
};
int lb_rtnl_link_get(struct lb_rtnl *nl, const char *ifname, struct lb_rtnl_link *out,
                     struct lb_error *err);             /* LB_E_NOT_FOUND */
/* mac NULL: leave it. */
int lb_rtnl_link_setup(struct lb_rtnl *nl, int ifindex, unsigned mtu, unsigned txqlen,
                       const unsigned char *mac, struct lb_error *err);
int lb_rtnl_link_up(struct lb_rtnl *nl, int ifindex, struct lb_error *err);
int lb_rtnl_link_delete(struct lb_rtnl *nl, int ifindex, struct lb_error *err); /* gone: success */
int lb_rtnl_noqueue(struct lb_rtnl *nl, int ifindex, struct lb_error *err);
/* *created false: there was one already. */
int lb_rtnl_clsact_add(struct lb_rtnl *nl, int ifindex, bool *created, struct lb_error *err);
/* Only when no filter uses it any more. */
int lb_rtnl_clsact_remove_unused(struct lb_rtnl *nl, int ifindex, struct lb_error *err);

enum lb_rtnl_hook { LB_INGRESS, LB_EGRESS };
struct lb_rtnl_filter {
    bool bpf;
    char name[64];
    uint32_t prog_id;
};
/* The first filter on ingress (priority 1, handle 1). LB_E_NOT_FOUND when there is none. */
int lb_rtnl_filter_get(struct lb_rtnl *nl, int ifindex, struct lb_rtnl_filter *out,
                       struct lb_error *err);
/* redirect_ifindex 0: the program decides; otherwise what it matches comes in again there. Replaces. */
int lb_rtnl_filter_add(struct lb_rtnl *nl, int ifindex, enum lb_rtnl_hook hook, int prog_fd,
                       const char *name, int redirect_ifindex, struct lb_error *err);
int lb_rtnl_filter_delete(struct lb_rtnl *nl, int ifindex, struct lb_error *err); /* gone: success */

/* Run f in the network namespace behind fd, on a thread of its own. */
int lb_netns_run(int netns_fd, int (*f)(void *arg, struct lb_error *err), void *arg,
                 struct lb_error *err);
/* That of a process; when it is gone, the one that has this inode (0: our own) as far as it can still
 * be found. Returns an fd or -1. */
int lb_netns_open(const struct lb_proc_id *proc, uint64_t inode, struct lb_error *err);

/* --------------------------------------------------------------------- tap */

#define LB_FILTER_PREFIX "lifeboat:" /* then the name of the holding tap */
#define LB_RPS_MAX 256               /* text of all queues' rps_cpus */

struct lb_otap {
    char ifname[16];
    int ifindex;
    char hold[16], inj[16];
    int hold_ifindex, inj_ifindex;
    int hold_fd, inj_fd;
    int prog_fd;                     /* of the filter on the guest's tap */
    uint32_t prog_id;
    bool clsact_ours, armed;
    char rps[LB_RPS_MAX];            /* as found, to put back: one mask a queue, space between */
};
#define LB_OTAP_INIT { .hold_fd = -1, .inj_fd = -1, .prog_fd = -1 }

/* Called in the namespace of the tap: can it be held? -1: "what: why", with remedy. */
int lb_otap_check(struct lb_rtnl *nl, const char *ifname, struct lb_error *err);
/* Called in the namespace: taps, programs; the guest's frames go on as before. */
int lb_otap_open(struct lb_otap *t, struct lb_rtnl *nl, const char *ifname, int sysfs_fd,
                 uint32_t mark, int gate_fd, struct lb_error *err);
int lb_otap_arm(struct lb_otap *t, struct lb_rtnl *nl, struct lb_error *err);
/* 1: was not in place, and is again; 0: all well; -1: not in place. dropped: by the kernel. */
int lb_otap_verify(struct lb_otap *t, struct lb_rtnl *nl, uint64_t *dropped, struct lb_error *err);
int lb_otap_disarm(struct lb_otap *t, struct lb_rtnl *nl, struct lb_error *err);
/* Not armed: nothing of ours is left. Armed: the hold stays. */
void lb_otap_close(struct lb_otap *t, struct lb_rtnl *nl, int sysfs_fd);
struct lb_otap_left {            /* as far as it is known */
    const char *ifname, *hold, *rps;
    bool clsact_ours;
    bool ours;                   /* the holder is this process, which gives it up */
};
/* Take off a tap what a dead holder left, and the tap that its filter names. LB_E_STATE: it lives. */
int lb_otap_clear(struct lb_rtnl *nl, const struct lb_otap_left *left, int sysfs_fd,
                  struct lb_error *err);
/* A tap to send frames as if the guest had: 0 and *fd; it vanishes when closed. */
int lb_otap_inject_open(struct lb_rtnl *nl, const char *ifname, int sysfs_fd, int *fd,
                        struct lb_error *err);
/* A view of this namespace's /sys, or -1 (queue placement is then left alone). */
int lb_sysfs_open(void);

/* ------------------------------------------------------------------ inside */

struct lb_oinside {
    char id[128];                    /* of the hypervisor's back end */
    int in_fd, out_fd;               /* frames come; released ones go */
    bool held, broken;               /* broken: the hypervisor closed it */
    unsigned char *buf;              /* bytes of a frame that is not whole yet */
    size_t have;
    size_t sent;                     /* bytes of the queue's head that are written */
};
#define LB_OINSIDE_INIT { .in_fd = -1, .out_fd = -1 }
int lb_oinside_arm(struct lb_oinside *c, struct lb_hv_vm *vm, struct lb_error *err);
/* At most max_frames into q. Frames read, 0: none there now, -1: closed or nonsense. */
int lb_oinside_read(struct lb_oinside *c, struct lb_oq *q, unsigned max_frames,
                    struct lb_error *err);
/* 1: written whole, 0: would block (call again with the same frame), -1. */
int lb_oinside_write(struct lb_oinside *c, const struct lb_oq_frame *f, struct lb_error *err);
/* VM stopped, everything written; or broken. */
int lb_oinside_disarm(struct lb_oinside *c, struct lb_hv_vm *vm, struct lb_error *err);
void lb_oinside_close(struct lb_oinside *c);

#endif
