/*
 * remus/record.h - what is on disk about protection, per VM, in vms/NAME/:
 *
 *   protect.json   the operator's wish: protect this VM, on one of these hosts, this way. Written by
 *                  `lifeboat protect`, removed by `unprotect`, travels to the backup and stays with
 *                  the VM across failover, so that the new primary protects itself again.
 *   remus.json     what a session is doing about it: one side of one protection. Written before the
 *                  step it names, so that recovery (lb_remus_recover) can end it.
 *
 *   phase      side     meaning                                  after a crash
 *   arming     primary  no complete checkpoint known yet         revision 0: goes on here, freely; else as protected
 *   protected  primary  the backup may take over                 only the witness knows
 *   alone      primary  claimed: the backup never will           the guest goes on here, freely
 *   yielded    primary  planned failover: last checkpoint acked  only the witness, or the backup, knows
 *   fenced     primary  the backup has won                       destroy what is left
 *   receiving  backup   no complete checkpoint yet               destroy the receiver
 *   standby    backup   follows                                  destroy the receiver
 *   promoting  backup   loaded; the claim may have been won      ask the witness; run or destroy
 *   promoted   backup   won                                      run it (again: harmless), announce
 *
 *   none -> arming -> protected [-> yielded];  arming, protected, yielded -> alone or fenced
 *   none -> receiving -> standby -> promoting -> promoted
 *   every phase -> itself, to save its other fields; every phase -> none by lb_record_remove
 *
 * The revision is saved (arming -> arming) before Armed is sent: from then on the backup may win
 * with an epoch whose Ack this side has not seen. A nonce is saved before it is used in a claim. "alone"
 * is written before the witness is disarmed, as a record without its key decides nothing.
 */
#ifndef LB_REMUS_RECORD_H
#define LB_REMUS_RECORD_H

#include "core/core.h"

#define LB_PROTECT_ID_HEX 33       /* 16 random bytes, with NUL */
#define LB_PROTECT_MAX_BACKUPS 16
#define LB_WITNESS_SPEC_MAX 1024

enum lb_disk_mode { LB_DISK_REPLICATE = 0, LB_DISK_NONE };

struct lb_protect_opts {
    uint32_t interval_ms;          /* 1..1000; 0 = LB_REMUS_INTERVAL_MS */
    bool adaptive;                 /* earlier when output waits, later when idle */
    enum lb_disk_mode disk;
    char witness[LB_WITNESS_SPEC_MAX]; /* "etcd:URL[,URL...]" | "fence:CMD" | "manual" */
    uint32_t lease_ms;             /* 0 = LB_LEASE_MS (lease.h) */
    uint64_t bandwidth_bytes_per_s;/* of the first copy and of epochs; 0 none */
    uint64_t delta_cache_bytes;    /* primary's memory for deltas; 0 = a quarter of the guest's */
    uint32_t channels;             /* of the pre-copy rounds; 0 auto */
    bool insecure_plaintext;       /* benchmarks only */
    uint32_t transport;            /* enum lb_transport_wish (migrate/migrate.h) */
};

/* protect.json */
struct lb_protect_wish {
    struct lb_protect_opts opts;
    char backups[LB_PROTECT_MAX_BACKUPS][128]; /* trusted hosts' names, in order of preference; none: any */
    unsigned n_backups;
    unsigned failovers;
    uint64_t last_failover_ms;     /* wall clock */
    double last_failover_took_ms;
    uint64_t unprotected_since_ms; /* wall clock, by the host where it was protected last; 0: it is, or never was */
    uint64_t last_gap_ms;          /* how long it was not protected the last time; 0: never */
};
int lb_wish_load(const char *state_dir, const char *vm, struct lb_protect_wish *out,
                 struct lb_error *err); /* LB_E_NOT_FOUND */
int lb_wish_save(const char *state_dir, const char *vm, const struct lb_protect_wish *w,
                 struct lb_error *err);
int lb_wish_remove(const char *state_dir, const char *vm, struct lb_error *err);
/* The text of protect.json, for the control channel; caller frees. */
char *lb_wish_json(const struct lb_protect_wish *w);
/* LB_E_PROTO when it is wrong: it may be a peer's. */
int lb_wish_parse(const char *json, struct lb_protect_wish *out, struct lb_error *err);

enum lb_phase {
    LB_PH_NONE = 0,
    LB_PH_ARMING, LB_PH_PROTECTED, LB_PH_ALONE, LB_PH_YIELDED, LB_PH_FENCED,  /* primary */
    LB_PH_RECEIVING, LB_PH_STANDBY, LB_PH_PROMOTING, LB_PH_PROMOTED,          /* backup */
};
const char *lb_phase_name(enum lb_phase p);

/* remus.json */
struct lb_remus_record {
    char id[LB_PROTECT_ID_HEX];    /* of this protection, both sides */
    enum lb_phase phase;
    char peer[128];                /* name of the other host here */
    char peer_key[72];             /* its key as text */
    char witness[LB_WITNESS_SPEC_MAX];
    char key[160];                 /* the witness's key of this VM */
    uint64_t revision;             /* fencing revision armed; 0: not armed */
    char nonce[LB_PROTECT_ID_HEX]; /* of our claim, so that a claim whose answer was lost is known again */
    uint64_t changed_ms;
    char detail[256];
};
/* LB_PH_NONE and 0 when there is none; damaged: LB_E_STATE. */
int lb_record_load(const char *state_dir, const char *vm, struct lb_remus_record *out,
                   struct lb_error *err);
/* Durable on return; checks that the move is allowed (assert) and sets phase, changed_ms. r->id is set.
 * LB_E_STATE when the file is not where *r is: another process, or a record that awaits recovery. On
 * failure *r is unchanged. */
int lb_record_move(const char *state_dir, const char *vm, struct lb_remus_record *r,
                   enum lb_phase to, struct lb_error *err);
int lb_record_remove(const char *state_dir, const char *vm, struct lb_error *err);

#endif
