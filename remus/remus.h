/*
 * remus/remus.h - protection of a running VM by continuous checkpoints.
 *
 * A protected VM runs on its primary host; a standby on the backup host follows it, one
 * complete checkpoint (epoch) after the other. What the guest sends to the network leaves the
 * host only when the backup holds the epoch it was sent in, and what it writes to its disks is
 * applied there with that epoch. So the backup can take over at any moment and nobody outside
 * can have seen anything that it does not know.
 *
 *   primary (session role "protect")                backup (session role "in", then "backup")
 *   CONNECT     MigrateRequest + ProtectSpec        PREFLIGHT  as for a migration
 *   PREFLIGHT   report                              LAUNCH     receiver, -incoming defer, disk targets
 *   SYNC        disks copied, pre-copy rounds  -->  RECEIVE    placed at once: not usable yet
 *   ARM         witness armed, output held,    -->             checkpoint 0 complete:
 *               checkpoint 0
 *   PROTECTED   epochs                         -->  STANDBY    staged, acked, applied
 *      backup silent: claim "alone"
 *   ALONE       runs, output free: unprotected                 primary silent: load, claim, run
 *   FENCED      lost the claim: copy destroyed      PROMOTED   runs here
 *
 * Epoch n of the primary:   stop | scan, copy to staging, mark disk and output, save device state | cont
 *                           then, while the guest works: delta, compress, send; Ack(n) -> release(n).
 *      released <= acked <= sent <= captured, asserted at every change.
 * Staging is two epochs: when both are in use the running epoch stretches (status says so).
 * When the disk or output queue of the running epoch passes its limit the guest is stopped until
 * there is room: memory stays bounded.
 *
 * Who may run: lease.h (how long the backup has promised to keep still) and witness.h (who wins
 * when a side stays silent). What is on disk meanwhile: record.h.
 *
 * Threads of the primary's session: engine (all state, the hypervisor), shipper (delta,
 * compression, the checkpoint connection), control reader (acks, lease), guard (deadlines of the
 * lease: closes the gate, freezes the guest), output loop, disk reader. Of the backup's: engine
 * (receive, apply, promote), control reader (answers heartbeats at once).
 */
#ifndef LB_REMUS_H
#define LB_REMUS_H

#include "migrate/migrate.h"
#include "remus/record.h"

#define LB_REMUS_INTERVAL_MS 25
#define LB_REMUS_EPOCH_LOG 4096   /* pauses kept for the percentiles */

/* What `lifeboat status`, `top` and the tests see. Filled by the session, at most 10/s. */
struct lb_protect_status {
    const char *role;            /* "primary" | "backup" */
    const char *state;           /* "connecting" "preflight" "launching" "disk-sync" "pre-copy" "arming"
                                    "protected" "alone" "fenced" "no-lease" "unprotecting" "done" "failed";
                                    backup: "preflight" "launching" "receiving" "standby" "promoting" "promoted" */
    const char *backup;          /* the other side's name */
    double percent;              /* of disk-sync and pre-copy, monotonic; 100 after */
    uint64_t epoch, acked, released;
    uint32_t interval_ms;        /* wanted */
    double epochs_per_s;         /* last second, like all rates */
    double pause_p50_ms, pause_p99_ms, pause_max_ms; /* of the last LB_REMUS_EPOCH_LOG epochs */
    double dirty_pages;          /* mean per epoch */
    double raw_bytes_per_s;      /* dirty memory + disk + state before encoding */
    double wire_bytes_per_s;
    double lag_ms;               /* age of the oldest epoch without an Ack */
    uint64_t held_packets, held_bytes;
    uint64_t disk_backlog_bytes; /* written in epochs without an Ack */
    double lease_left_ms;        /* < 0: lapsed or none needed */
    bool witness_ok;
    char witness[160];           /* spec, or the error of the last look at it */
    double clock_lag_ms;         /* by how much pauses have put the guest's clock back, since the start */
    double clock_corrected_ms;   /* of it made up for */
    const char *transport;       /* of the checkpoints: "tcp" | "rdma"; "" not connected */
    uint64_t registered_bytes;   /* for RDMA, now */
    bool stretched;              /* epochs are longer than wanted: link or backup slower than the guest writes */
    unsigned failovers;          /* of this VM, as far as known here */
    uint64_t last_failover_ms;   /* wall clock; 0 never */
    double last_failover_took_ms;/* last sign of the primary -> guest running */
    char note[256];              /* last remarkable thing and its reason */
};
/* One JSON object; caller frees. Keys are the member names. */
char *lb_protect_status_json(const struct lb_protect_status *s);

/* What the session process gives the engines besides struct lb_session_env. */
struct lb_remus_env {
    struct lb_session_env base;  /* cancel_fd: unprotect was asked for */
    int failover_fd;             /* backup: readable = an operator asks for failover (eventfd) */
    bool *failover_force;        /* read after failover_fd: the operator vouches for the primary's death */
    void (*status)(const struct lb_protect_status *s, void *arg); /* base.arg; engine thread */
};

enum lb_protect_end {
    LB_PROTECT_OFF,       /* unprotected as asked: runs here; or the guest switched itself off: entry DEAD */
    LB_PROTECT_ALONE,     /* backup lost; runs here, free, unprotected; protect again elsewhere */
    LB_PROTECT_FENCED,    /* the backup has it: nothing is left here */
    LB_PROTECT_YIELDED,   /* planned failover, or the VM's process was killed under us: the backup has it,
                             nothing is left here */
    LB_PROTECT_FAILED,    /* before checkpoint 0: runs here as if nothing had been */
    LB_PROTECT_UNDECIDED, /* no lease and the witness cannot be asked: frozen here; recovery goes on */
};
const char *lb_protect_end_name(enum lb_protect_end e);

/* Primary. The VM's entry is locked by this process and RUNNING. Blocks for as long as the
 * protection lasts. On return the guest is as *end says, the entry is saved, remus.json is gone
 * (except UNDECIDED), kernel and hypervisor hold nothing of ours. 0 for OFF and YIELDED; otherwise
 * -1 and why. */
int lb_protect_run(const struct lb_remus_env *env, const struct lb_vm_entry *vm,
                   const struct lb_host *backup, const struct lb_protect_opts *opts,
                   enum lb_protect_end *end, struct lb_error *err);

/* Backup: first is a MigrateRequest with `protect` set. Blocks until the standby is discarded
 * (0: the primary unprotected; -1: it was lost) or the VM runs here (0, *promoted). */
int lb_backup_serve(const struct lb_remus_env *env, struct lb_chan *chan, const char *peer,
                    Lb__Control *first, char *vm_name, bool *promoted, struct lb_error *err);

/* Would that host take the VM, which is protected now: as its next backup (standby), or migrated to it? Its own
 * preflight, asked by what the running protection told its backup; the protection goes on meanwhile.
 * Needs of env: identity, state_dir, config_path, cancel_fd. 0: yes. LB_E_PREFLIGHT: no, and why. LB_E_NOT_FOUND: there is nothing
 * to ask with. The report is shown by env->preflight. */
int lb_remus_ask_ahead(const struct lb_session_env *env, const char *vm, const struct lb_host *to,
                       const struct lb_protect_wish *wish, bool standby, struct lb_error *err);

/* After a crash of the session that worked on it: entry PROTECTED or STANDBY, lock held by the
 * caller, nobody else at work. PROTECTED: stop the guest, ask the witness who may run, then free or
 * destroy it. STANDBY: destroy it, or, when promotion had been won, finish it. LB_E_UNDECIDED:
 * ask again later; the guest stays stopped. text as in lb_recover_vm. */
int lb_remus_recover(const struct lb_session_env *env, const char *vm_name, char text[512],
                     struct lb_error *err);

#endif
