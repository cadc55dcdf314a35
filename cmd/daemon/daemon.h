/*
 * cmd/daemon/daemon.h - the supervisor and the processes it starts.
 *
 *   supervisor.c   the loop: start, scan every 2 s, stop
 *   rpc_server.c   requests of the CLI: dispatch
 *   ops_host.c     requests answered from files at once (ls, history, host ...)
 *   ops_vm.c       requests that may wait for a hypervisor: run in a worker
 *   worker.c       a worker: a forked copy that answers one request and exits
 *   sessions.c     session processes: start, connection, routing, end
 *   protect.c      protections: requests, whom to try next and when, what they say of themselves
 *   checkpoint.c   checkpoints: requests, schedules, fills; batch.c all VMs at once; what is said of them
 *   evacuate.c     emptying this host; evac_work.c what is done with each VM, maintenance.c maintenance mode
 *   ckpt.c         keys, this host's configuration, JSON of checkpoints
 *   directory.c    this host in the directory of hosts
 *   peers.c        the listening port: preambles, routing of bulk connections
 *   session.c      the session process itself (lifeboatd --session); ckpt_session.c and ckpt_catalog.c
 *                  its work with checkpoints
 *   vm_run.c       starting QEMU as a process of its own; qmp.c its greeting and end
 *
 * The supervisor has one thread and never blocks on a peer, a guest or a session; what
 * can block runs in a worker or a session.  Nothing is kept in memory that the
 * files of the state directory and the sessions that reconnect do not say: kill -9
 * of the supervisor loses nothing.
 */
#ifndef LB_DAEMON_H
#define LB_DAEMON_H

#include <event2/bufferevent.h>
#include <event2/event.h>
#include <jansson.h>
#include <sys/queue.h>

#include "cmd/common/rpc.h"
#include "core/json.h"
#include "core/registry.h"
#include "migrate/config.h"
#include "migrate/migrate.h"
#include "netproto/rpc.pb-c.h"
#include "remus/record.h"

enum {
    MAX_CLIENTS = 128,
    MAX_WORKERS = 32,
    MAX_SESSIONS_IN = 32,     /* transient ones; a standby counts no more once it is one */
    MAX_UNAUTHENTICATED = 64, /* peers whose preamble has not come */
    MAX_PARKED = 64,          /* bulk connections ahead of their session */
    PREAMBLE_TIMEOUT_S = 10,
    PARK_TIMEOUT_S = 5,
    SCAN_INTERVAL_S = 2,
};

struct daemon_options {
    char *state_dir, *socket, *listen, *config_path; /* listen NULL: as configured */
    enum lb_log_level log_level;
};

#define LB_BATCH_NAME "*" /* no VM's */
#define LB_EVAC_NAME "*evacuation"

struct batch;
struct client;
struct evacuation;
struct directory;
struct peer;
struct worker;
struct ward;
struct rehome;

/* What a client waits for that is no single session's to say. */
enum lb_wait {
    LB_WAIT_NONE = 0,
    LB_WAIT_PROTECTED, /* `protect`: the first epoch is complete */
    LB_WAIT_OFF,       /* `unprotect`, or the `stop` of a protected VM */
    LB_WAIT_HERE,      /* `failover`: the VM runs on this host */
    LB_WAIT_REHOMED,   /* `migrate` of a protected VM, `protect` with another backup: see rehome.c */
    LB_WAIT_BATCH,     /* `suspend --all` and the like; the VM's name is LB_BATCH_NAME */
    LB_WAIT_PLAN,      /* what an evacuation would do; LB_EVAC_NAME */
    LB_WAIT_EVACUATED, /* it has come to rest, or what was brought back has; LB_EVAC_NAME */
};

/* One session process, as the supervisor sees it. */
struct session {
    LIST_ENTRY(session) link;
    struct daemon *d;
    pid_t pid;
    int pidfd;
    struct event *on_exit;  /* of the pidfd; then of the wait for its last words */
    int exit_status;        /* as waitpid has it */
    char id[33];            /* names its log */
    char role[16], vm[128], peer[128];
    struct link *conn;      /* NULL: not connected (yet, or any more) */
    bool wants_conns;
    uint8_t want_id[LB_SESSION_ID_BYTES];
    char state[32];         /* of the last progress event */
    char *preflight, *progress, *protect; /* last events, JSON; NULL */
    char *result;           /* JSON, of a good end; NULL */
    bool abandoned;         /* to be cancelled as soon as it connects */
    uint64_t begun_ms;      /* wall clock; when it came back to us, if it was adopted */
    uint64_t protected_ns;  /* roles protect: when it first said "protected"; 0: not yet */
    char end[16];           /* roles protect, backup: how, as lb_protect_end_name has it, or "promoted" */
    struct lb_error error;  /* of a bad end */
    bool ended;             /* result or failure came */
};

struct daemon {
    /* immutable after start */
    struct daemon_options opt;
    struct lb_host_config cfg;
    struct event_base *base;
    char *sessions_path;
    int lock_fd;

    /* loop only */
    struct evconnlistener *rpc_listener, *sessions_listener, *peer_listener;
    struct event *scan_timer, *on_term, *on_int, *on_hup;
    LIST_HEAD(, client) clients;
    LIST_HEAD(, session) sessions;
    LIST_HEAD(, peer) peers;
    LIST_HEAD(, worker) workers;
    LIST_HEAD(, ward) wards;
    LIST_HEAD(, rehome) rehomes;
    unsigned n_clients, n_workers, n_unauthenticated, n_parked, n_in;
    struct batch *batch;    /* NULL: none */
    struct evacuation *evacuation; /* NULL: nobody has asked yet */
    struct directory *directory; /* NULL: none configured */
    uint64_t last_prune_ms, last_orphans_ns;
};

/* ---- supervisor.c: runs until SIGTERM/SIGINT; 0 or -1 when it could not start */
int lb_daemon_run(const struct daemon_options *opt, struct lb_error *err);
/* Look at every VM now (start recoveries, notice deaths). */
void lb_daemon_scan(struct daemon *d);

/* ---- rpc_server.c */
int lb_rpc_server_start(struct daemon *d, struct lb_error *err);
/* Answers of one client; the last two close it. NULL-safe json: taken as is. */
void lb_client_event(struct client *c, const char *json);
void lb_client_result(struct client *c, const char *json);
void lb_client_failure(struct client *c, const struct lb_error *e, const char *json);
/* Called by sessions.c for every client that watches s. */
void lb_clients_event(struct session *s, const char *json);
void lb_clients_result(struct session *s, const char *json);
void lb_clients_failure(struct session *s, const struct lb_error *e, const char *json);
/* The client's answer is the session's. all: also of a lazy restore only when all memory is there. */
void lb_client_watch(struct client *c, struct session *s, bool all);
/* The guest of s runs; its session goes on: the answer for who does not wait for all. */
void lb_clients_running(struct session *s, const char *json);
/* The client's answer comes by lb_clients_settle. then: carried out when it went well, and that is the
 * answer; NULL: none. */
void lb_client_wait(struct client *c, const char *vm, enum lb_wait what, unsigned timeout_s,
                    const Lb__RpcRequest *then);
/* Who waits for this gets the session's answer from now on. */
void lb_clients_pass_on(struct daemon *d, const char *vm, enum lb_wait what, struct session *s);
/* To every client that waits for something of the VM. */
void lb_clients_tell(struct daemon *d, const char *vm, const char *json);
/* Result (e NULL) or failure of every client that waits for this. */
void lb_clients_settle(struct daemon *d, const char *vm, enum lb_wait what, const char *json,
                       const struct lb_error *e);

/* ---- ops_host.c: malloc'ed JSON, or NULL and *err */
char *lb_op_ls(struct daemon *d, struct lb_error *err);
char *lb_op_history(struct daemon *d, const Lb__RpcName *r, struct lb_error *err);
char *lb_op_host_id(struct daemon *d, struct lb_error *err);
char *lb_op_host_trust(struct daemon *d, const Lb__RpcHostTrust *r, struct lb_error *err);
char *lb_op_host_ls(struct daemon *d, struct lb_error *err);
char *lb_op_host_forget(struct daemon *d, const Lb__RpcName *r, struct lb_error *err);
json_t *lb_entry_to_json(const struct lb_vm_entry *e);
json_t *lb_session_to_json(const struct session *s); /* NULL in, NULL out */
char *lb_json_dump(json_t *o); /* takes o */

/* ---- ops_vm.c: in a worker; malloc'ed JSON, or NULL and *err */
char *lb_op_vm(struct daemon *d, const Lb__RpcRequest *r, struct lb_error *err);
/* lb_recover_vm with an environment of its own; the caller holds the lock. */
int lb_recover_here(const char *state_dir, const char *config_path, const char *vm, char text[512],
                    struct lb_error *err);

/* ---- worker.c */
/* Fork; the child answers on fd and exits. Closes fd here in any case. */
int lb_worker_start(struct daemon *d, int fd, const Lb__RpcRequest *r, struct lb_error *err);
/* In any forked child, before it does anything: signals as in a fresh process, own session. */
void lb_child_reset(void);

/* ---- sessions.c */
int lb_sessions_start(struct daemon *d, struct lb_error *err);
/* Start a session process; conn_fd >= 0 for role "in" (closed here in any case). */
struct session *lb_session_spawn(struct daemon *d, const char *role, const char *vm,
                                 const char *host, const Lb__MigrateOptions *opts, int conn_fd,
                                 struct lb_error *err);
/* The same for what a request asks for; vm "": none yet, or never one; host "": no other is asked. */
struct session *lb_session_spawn_for(struct daemon *d, const char *role, const char *vm,
                                     const char *host, const Lb__RpcRequest *r,
                                     struct lb_error *err);
/* The session at work on it; one that has said its result is as good as gone (its lock goes
 * with its process: lb_vm_lock_patiently). One that only asks another host about the VM does not count. */
struct session *lb_session_of_vm(struct daemon *d, const char *vm);
/* Does it keep the VM from anything new? One that brings it in, or has just filled it, is about to end: whoever
 * comes next waits for the lock. NULL does not. */
bool lb_session_blocks(const struct session *s, const struct lb_vm_entry *e);
struct session *lb_session_wanting(struct daemon *d, const uint8_t id[LB_SESSION_ID_BYTES]);
int lb_session_order_cancel(struct session *s, struct lb_error *err);
/* One that has said "ready" may send. */
int lb_session_order_go(struct session *s, struct lb_error *err);
int lb_session_order_failover(struct session *s, bool force, struct lb_error *err);
/* Passes the connection on; fd is closed here in any case. */
int lb_session_order_conn(struct session *s, int fd, struct lb_error *err);

/* ---- protect.c. Requests; they answer the client or make it wait. */
void lb_op_protect(struct daemon *d, struct client *c, const Lb__RpcProtect *r);
void lb_op_unprotect(struct daemon *d, struct client *c, const char *vm,
                     const Lb__RpcRequest *then);
void lb_op_failover(struct daemon *d, struct client *c, const Lb__RpcName *r);
char *lb_op_top(struct daemon *d, struct lb_error *err);
/* What protects the VM or is wanted to; NULL: nothing. */
json_t *lb_protect_json(struct daemon *d, const struct lb_vm_entry *e);
/* Is it to be protected, or is a session protecting it? */
bool lb_protect_wanted(struct daemon *d, const char *vm);
/* LB_E_STATE with the remedy when it is protected or a standby. */
int lb_protect_refuse(struct daemon *d, const struct lb_vm_entry *e, const char *what,
                      struct lb_error *err);
/* From sessions.c: a session said {"event":"protect"}; is gone (s is still complete). */
void lb_protect_event(struct session *s, const char *state, const char *note, const char *json);
void lb_protect_ended(struct session *s);
/* From the scan: protect a VM that runs and is to be; recover one that nobody works on. */
void lb_protect_scan(struct daemon *d, const struct lb_vm_entry *e);
void lb_recover_scan(struct daemon *d, const struct lb_vm_entry *e);
/* May it be recovered, or filled, now? Later and later after failures. */
bool lb_recover_due(struct daemon *d, const char *vm);
/* Why its memory could not be filled at the last try, or "". */
const char *lb_fill_problem(struct daemon *d, const char *vm);
void lb_wards_prune(struct daemon *d, const struct lb_vm_entry *v, unsigned n);

/* For rehome.c. The hosts that r names, all of them good; the rest of *out is not touched. */
int lb_protect_backups(struct daemon *d, const Lb__RpcProtect *r, struct lb_protect_wish *out,
                       struct lb_error *err);
/* The session of role "protect" is told to end; the wish stays, and how long there is no backup is counted. */
void lb_protect_end_for_now(struct daemon *d, const char *vm);
/* Begin with these hosts now: `prefer` first, `lost` last. */
void lb_protect_next(struct daemon *d, const char *vm, const char *prefer, const char *lost);

/* ---- rehome.c. A protected VM changes host, or its backup; the wish outlives every step. */
/* s, the session of a VM or NULL, protects it by that host, which has all of it: it could take over. */
bool lb_protect_backed_by(const struct session *s, const char *host);
/* That host is asked to take the VM over: session "ask". */
struct session *lb_protect_swap(struct daemon *d, const char *vm, const char *host, struct lb_error *err);
/* The protection ends, then the migration has begun: `out` is its session (role "out"; "ask" when the host is
 * its backup). Or e says why not. Called once,
 * perhaps before lb_protect_move returns. */
typedef void lb_moved_fn(struct daemon *d, const char *vm, struct session *out, const struct lb_error *e);
void lb_protect_move(struct daemon *d, const Lb__RpcMigrate *r, lb_moved_fn *done);
/* Requests, for a VM that is to be protected; they answer the client or make it wait. */
void lb_op_move(struct daemon *d, struct client *c, const Lb__RpcMigrate *r);
void lb_op_change_backup(struct daemon *d, struct client *c, const Lb__RpcProtect *r);
/* From protect.c. A session of role "check" is gone. */
void lb_rehome_checked(struct session *s);
/* A session of role "protect" is gone; here: the guest goes on here. True: what follows has begun. */
bool lb_rehome_ended(struct session *s, bool here);
/* It is protected; json is what who waits is told. */
void lb_rehome_protected(struct session *s, const char *json);
/* No host of the wish wants to be the backup. */
void lb_rehome_unprotected(struct daemon *d, const char *vm, const struct lb_error *e);
/* Nobody wants it protected any more. */
void lb_rehome_drop(struct daemon *d, const char *vm);

/* ---- ask.c */
void lb_op_ask(struct daemon *d, struct client *c, const Lb__RpcAsk *r);

/* ---- checkpoint.c. Requests; they answer the client or make it watch a session. */
void lb_op_checkpoint(struct daemon *d, struct client *c, const Lb__RpcRequest *r);
void lb_op_restore(struct daemon *d, struct client *c, const Lb__RpcRequest *r);
void lb_op_clone(struct daemon *d, struct client *c, const Lb__RpcRequest *r);
void lb_op_catalog(struct daemon *d, struct client *c, const Lb__RpcRequest *r);
char *lb_op_schedule(struct daemon *d, const Lb__RpcSchedule *r, struct lb_error *err);
/* LB_E_STATE with the remedy when it is suspended, or a session takes a checkpoint of it, restores or
 * fills it. */
int lb_ckpt_refuse(struct daemon *d, const struct lb_vm_entry *e, struct lb_error *err);
/* May a VM be suspended, or a checkpoint of it be taken? */
int lb_ckpt_takeable(struct daemon *d, const struct lb_vm_entry *e, const char *what, struct lb_error *err);
/* Nobody wants the work of a session that is of no VM any more. */
void lb_ckpt_abandon(struct session *s);
/* Can `cancel` stop it? */
bool lb_ckpt_cancellable(const struct session *s);
/* What ls, status and show say besides; see there. */
void lb_ckpt_add_json(struct daemon *d, const struct lb_vm_entry *e, json_t *o);
/* From sessions.c: a session said something (o is text); is gone (s is still complete). */
void lb_ckpt_event(struct session *s, const char *kind, const json_t *o, const char *text);
void lb_ckpt_ended(struct session *s);
/* From the scan: take what is due of a VM that runs; fill one that nobody fills. */
void lb_schedule_scan(struct daemon *d, const struct lb_vm_entry *e);
void lb_fill_scan(struct daemon *d, const struct lb_vm_entry *e);

/* ---- batch.c: suspend_all, resume_all, fill_key */
void lb_op_batch(struct daemon *d, struct client *c, const Lb__RpcRequest *r);
/* Begin what can begin, end when all is done. */
void lb_batch_step(struct daemon *d);
bool lb_batch_suspends(struct daemon *d);
void lb_batch_event(struct session *s, const char *kind, const json_t *o, const char *text);
void lb_batch_ended(struct session *s);

/* ---- directory.c: from now on this host is in the directory of hosts, if one is configured */
int lb_directory_start(struct daemon *d, struct lb_error *err);

/* ---- evacuate.c. Requests; they answer the client or make it wait. */
void lb_op_evacuate(struct daemon *d, struct client *c, const Lb__RpcEvacuate *r);
void lb_op_maintenance(struct daemon *d, struct client *c, const Lb__RpcMaintenance *r);
/* As `maintenance status`. */
json_t *lb_maintenance_status(struct daemon *d);
/* From sessions.c: a session said something; is gone (s is still complete). */
void lb_evac_heard(struct session *s, const char *kind, const char *text);
void lb_evac_session_over(struct session *s);
/* Something may have become possible. */
void lb_evac_step(struct daemon *d);
/* At start: one that an earlier supervisor did not end goes on. */
void lb_evac_resume(struct daemon *d);

/* ---- peers.c */
int lb_peers_start(struct daemon *d, const char *listen, struct lb_error *err);
void lb_peers_unpark(struct daemon *d, struct session *s);

/* ---- session.c: main of `lifeboatd --session`; the exit status */
int lb_session_main(void);

/* ---- vm_images.c */
/* In argv (a vector of ours), images that checkpoints hold become those where the guest went on, each with a warning; or else
 * LB_E_STATE. */
int lb_vm_newest_images(struct daemon *d, const char *vm, const char *cwd, char ***argv, json_t *warnings,
                        struct lb_error *err);
/* A VM that is found writing to such images: a text each, logged too. */
void lb_vm_warn_images(struct daemon *d, const char *vm, const struct lb_vm_desc *desc, json_t *damages);

/* ---- vm_run.c */
/* Start argv detached (own session, stdio to log_path, in cwd); *out names it. */
int lb_vm_start(char *const argv[], const char *cwd, const char *log_path, struct lb_proc_id *out,
                struct lb_error *err);
/* Last lines of a log on one line, for messages. Caller frees; never NULL. */
char *lb_log_tail(const char *path, size_t max_bytes);

/* ---- qmp.c: the few words of QMP needed around a VM's life */
/* Wait until the socket greets, or *proc dies (LB_E_HV), or the deadline. */
int lb_qmp_wait_greeting(const char *path, const struct lb_proc_id *proc, uint64_t deadline_ns,
                         struct lb_error *err);
/* `quit`, and wait until the process is gone. */
int lb_qmp_quit(const char *path, const struct lb_proc_id *proc, uint64_t deadline_ns,
                struct lb_error *err);

#endif
