/*
 * migrate/migrate.h - live migration: the two session roles, their policy and
 * their journal.
 *
 *   source (migrate-out)                       destination (migrate-in)
 *   CONNECT    Noise channel, MigrateRequest   PREFLIGHT  checks, report
 *   PREFLIGHT  report read                     LAUNCH     receiver started, RAM mapped
 *   READY      with opts.wait_go: for the go
 *   ROUNDS     stop/clean/cont, send           RECEIVE    pages placed as they come
 *   FINAL      stop, last pages, device state  LOAD       state loaded, still paused, digest
 *   WAIT       for Prepared               <--- PREPARED
 *   HANDED_OVER journal, fsync, Commit    ---> COMMIT     journal RUNNING, fsync, run
 *   DONE       destroy own copy           <--- RUNNING    announce
 *   Anything wrong before HANDED_OVER: the guest continues on the source, the
 *   destination throws its receiver away. After it, the destination's journal
 *   alone decides (lb_handover_*): see journal.h.
 *
 * Each role is one process with these threads: the engine thread (this API, all
 * state), one worker per bulk connection, and a control reader on the source.
 */
#ifndef LB_MIGRATE_H
#define LB_MIGRATE_H

#include "core/core.h"
#include "core/hv.h"
#include "core/registry.h"
#include "netproto/control.pb-c.h"
#include "netproto/netproto.h"

/* Of the bulk connections. AUTO: RDMA when both hosts have a device on a common network. */
enum lb_transport_wish { LB_TRANSPORT_AUTO = 0, LB_TRANSPORT_TCP, LB_TRANSPORT_RDMA };
enum lb_compress { LB_COMPRESS_AUTO = 0, LB_COMPRESS_OFF, LB_COMPRESS_ZSTD };

/* We always try for a pause that clients do not notice, and use more of what is
 * allowed only when the guest does not let us (policy.h). */
#define LB_AIM_DOWNTIME_MS 30
#define LB_DEFAULT_MAX_DOWNTIME_MS 300

struct lb_migrate_opts {
    uint64_t bandwidth_bytes_per_s; /* 0 = no limit */
    const char *budget_path;        /* the limit is shared by all who name this file (budget.h); NULL: not shared */
    uint32_t max_downtime_ms;       /* longest pause allowed; 0 = LB_DEFAULT_MAX_DOWNTIME_MS */
    uint32_t channels;              /* 0 = auto */
    enum lb_compress compress;
    int zstd_level;                 /* with LB_COMPRESS_ZSTD; 0 = 1 */
    bool verify;
    uint64_t timeout_ms;            /* 0 = none: give up (source continues) after this */
    bool dry_run;
    bool insecure_plaintext;
    bool allow_throttle;            /* default true: last but one step of the ladder */
    bool wait_go;                   /* set up, report "ready", send nothing before env->go_fd says so */
    enum lb_transport_wish transport;
    bool trusted_fabric;            /* with RDMA: pages are written straight into the receiver, in clear */
    const char *wish_json;          /* it is to be protected where it goes: kept there (keep_wish); NULL */
};

/* What the outside sees while it works. Numbers are for people and JSON alike;
 * percent never goes down. */
struct lb_progress {
    const char *state;          /* name of the session state, lower case */
    uint32_t round;
    double percent;             /* 0..100 of the whole job, monotonic */
    uint64_t ram_bytes;         /* all guest memory */
    uint64_t sent_bytes;        /* wire */
    uint64_t remaining_pages;   /* of this round */
    uint64_t dirty_pages;       /* found at the start of this round */
    double dirty_rate_bytes_per_s;
    double throughput_bytes_per_s;  /* wire, last second */
    double predicted_downtime_ms;
    double eta_s;               /* < 0: unknown */
    int converges;              /* 1 yes, 0 no, -1 not known yet */
    unsigned throttle_percent;
    int zstd_level;
    char transport[32];         /* "tcp" | "rdma" | "rdma zero-copy" | "rdma+tcp": some connections broke; "": none yet */
    uint64_t registered_bytes;  /* for RDMA, now */
    char note[200];             /* last ladder step and its reason */
};

struct lb_migrate_result {
    bool ok;                    /* the VM runs on the destination */
    bool dry_run;
    uint32_t rounds;
    uint64_t wire_bytes, zero_pages, raw_pages, zstd_pages;
    double total_ms;            /* connect to acknowledged, without waiting for a go */
    double setup_ms;            /* connect, preflight, launch of the receiver */
    double downtime_ms;         /* stop on the source to Running from the destination */
    double load_ms, final_dirty_pages;
    char digest[33];            /* hex when verified */
    char transport[32];         /* as of lb_progress */
    char why_tcp[512];          /* RDMA was agreed, and could not be had; "" when it could */
    unsigned replaced_connections; /* RDMA ones that broke and went on over TCP */
    uint64_t copied_bytes;      /* lb_bulk_stats */
    uint64_t registered_max_bytes;
    uint64_t direct_pages;      /* written straight into the receiver's memory */
    uint64_t damaged_pages;     /* of them, that were other than their checksums without having been written, and sent again */
    struct lb_error error;      /* when !ok */
    char final_state[32];       /* source: "running" | "handed-over" | "moved" */
};

struct lb_report;

/* Provided by the session process (cmd/daemon/session.c), or a test. */
struct lb_session_env {
    const char *state_dir;
    uint8_t session_id[LB_SESSION_ID_BYTES];
    const struct lb_hv_ops *hv;
    const struct lb_identity *identity;
    int cancel_fd;              /* readable = cancel wanted (eventfd); polled, never read */
    int go_fd;                  /* the same for opts.wait_go: readable = send now */
    /* Called from the engine thread, at most 10/s and on every state change. */
    void (*report)(const struct lb_progress *p, void *arg);
    /* Preflight lines, once, before anything is touched. json: array of {id,status,message,remedy}. */
    void (*preflight)(const char *json, void *arg);
    /* Destination: from now on route bulk connections of this session to us. Returns when the
     * supervisor knows. */
    int (*want_conns)(const uint8_t session_id[LB_SESSION_ID_BYTES], const char *vm,
                      struct lb_error *err, void *arg);
    /* Destination: wait for the next bulk connection of this session routed to us by the
     * supervisor (preamble consumed). Returns a socket or -1. */
    int (*take_conn)(unsigned timeout_ms, struct lb_error *err, void *arg);
    void *arg;
    const char *config_path;    /* host configuration (migrate/config.h); NULL = none */
    /* Destination: what the other side wants kept with the VM (MigrateRequest.wish_json). check_wish adds a line
     * "protection" to the report; keep_wish puts it beside the entry, which exists. Both NULL: refused. */
    void (*check_wish)(const char *json, struct lb_report *rep, void *arg);
    int (*keep_wish)(const char *vm, const char *json, struct lb_error *err, void *arg);
    /* A channel whose first message is not migrate's (MigrateRequest with `protect`, Ask): the layer
     * above serves it; owns neither chan nor first. NULL: refused. */
    int (*serve_other)(const struct lb_session_env *env, struct lb_chan *chan, const char *peer,
                       Lb__Control *first, char *vm_name, struct lb_error *err);
};

/* Source. vm entry must be locked by this process. Blocks until the end. On
 * return the registry entry says where the VM is; res is always filled; returns
 * 0 when the VM moved (or the dry run passed). */
int lb_migrate_out(const struct lb_session_env *env, const struct lb_vm_entry *vm,
                   const struct lb_host *to, const struct lb_migrate_opts *opts,
                   struct lb_migrate_result *res, struct lb_error *err);

/* Destination: serve one channel whose peer is trusted: MigrateRequest,
 * HandoverQuery or Ping. Blocks until the channel's work is done. `peer` is the
 * trusted host's name. vm_name[128] is filled as soon as it is known. */
int lb_serve_channel(const struct lb_session_env *env, struct lb_chan *chan, const char *peer,
                     char *vm_name, struct lb_error *err);

/* Bring one VM of this host to a decided state after a crash; called by the
 * supervisor at start, when a session died, and by `lifeboat recover`. The
 * caller holds the VM's lock. Looks at the entry, the journal, the process, and asks the peer
 * when only the peer knows. text: one line for people, what was found and done.
 * LB_E_UNDECIDED: the peer could not be asked; the VM stays paused. */
int lb_recover_vm(const struct lb_session_env *env, const char *vm_name, char text[512],
                  struct lb_error *err);

/* One line of history.jsonl as JSON text; caller frees. */
char *lb_migrate_result_json(const struct lb_vm_entry *vm, const char *peer, const char *direction,
                             uint64_t started_wall_ms, const struct lb_migrate_result *res);
char *lb_progress_json(const struct lb_progress *p);

/* The identity of a registry entry; strings point into e. */
struct lb_vm_ident lb_entry_ident(const struct lb_vm_entry *e);
void lb_host_address(const struct lb_host *h, char host[256], uint16_t *port);

#endif
