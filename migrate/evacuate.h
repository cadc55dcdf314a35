/*
 * migrate/evacuate.h - carrying out the plan of an evacuation, and what is on disk about it.
 *
 * Pure but for load and save: it is told what has happened and says what to do next. The
 * supervisor (cmd/daemon/evacuate.c) starts the sessions and tells it; nothing here knows of processes.
 *
 *   phase      meaning                                        next
 *   planned    a plan was shown; nothing is done              running, or forgotten
 *   planning   the first plan of a run is made                running
 *   running    items are begun and end; maintenance is on     replanning, done, incomplete, cancelling
 *   replanning something failed or has changed: what is left is planned anew
 *   cancelling nothing new begins; what has not handed over goes back to running here
 *   cancelled  the rest runs here; `evacuate` goes on
 *   incomplete what is left cannot leave: each has its reason and remedy
 *   done       the host is empty
 *
 *   item:  WAITS -> SETUP -> READY -> SENDING -> DONE
 *            |        +--------+---------+-----> FAILED -> tried again, or planned anew: elsewhere first
 *            +-> LEFT (a blocker, or too many failures: runs on here)
 *   kinds without a transfer of their own (swap, backup, suspend, resume) go from SETUP to DONE. READY is where a copy
 *   waits for its go: alone on its link, or every share of it at least `margin` times what its guest dirties. Those
 *   that are set up meanwhile count as begun: `parallel` are begun and not done, so that the setup of the next one
 *   overlaps the sending of the last.
 *   A protected VM that is copied: its protection ends first, so it does not wait for a go but begins when it could
 *   send; its plan has a backup step after it, which names its new backup.
 *
 *   failed with           then
 *   net                   the same host 2, 4, 8 ... s later, and nothing else is begun to it before; planned anew
 *                         from the second time on; it counts as a try only if something was sent
 *   internal, state, undecided
 *                         the same host, later; the last try elsewhere, if there is another host
 *   hv, proto             elsewhere; the same host if there is no other
 *   preflight, no-space, exists, auth, unsupported, not-found
 *                         elsewhere
 *                         (of a swap not-found and auth: its backup is gone; the same host, later, as a copy)
 *   no-converge           alone, with what `hot` allows: throttled, or paused for its last part; then LEFT
 *   cancelled (by an operator), usage
 *                         LEFT
 * At most LB_EVAC_TRIES tries. With suspend_rest what would be LEFT is suspended to disk.
 *
 * Rules: a VM is never begun twice; one that a session works on already (found after a restart) is taken up, not
 * begun; what is DONE is known from the registry (it is not here any more), never from this file alone. So a
 * file that is lost or old costs at most the retries it had counted.
 *
 * STATE_DIR/evacuation.json: the whole of struct lb_evac. STATE_DIR/maintenance.json: maintenance.h.
 *
 * JSON that `evacuate` streams and `--json` prints (one object a line):
 *   {"event":"note","text":"measuring the link to b"}                                     while it plans
 *   {"event":"plan","id":"...","host":"a","makespan_s":,"bytes":,"parallel":,"margin":,"vms":,
 *    "steps":[{"vm","kind":"copy|swap|backup|suspend","from","to","start_s","end_s","downtime_ms","bytes","memory_bytes",
 *              "dirty_bytes_per_s","alone","throttled","suspended"}],
 *    "stays":[{"vm","backup":false,"reason","remedy"}],
 *    "hosts":[{"name","memory_bytes","before_bytes","after_bytes","link_bytes_per_s","maintenance","error"}]}
 *   {"event":"evacuation","phase":,"percent":,"elapsed_s":,"eta_s":(null: not known),"vms":,"done":,"failed":,"left":,"active":,
 *    "bytes":,"bytes_planned":,"throughput_bytes_per_s":,"note":"",
 *    "items":[{"vm","kind","from","to","state","percent","bytes","throughput_bytes_per_s","eta_s","elapsed_s","downtime_ms",
 *              "tries","message","remedy"}]}        at most 4/s; the first and the last have all items, others those that changed
 *   result: the last "evacuation" event with "ok": nothing is left
 * state: a word of the drawing above in lower case. elapsed_s: since this try began, of one that has ended what it
 * took. A "plan" in the middle (another "id") is what is left, planned anew.
 * vms, done, failed, left, active count items: a VM and its new backup are two. eta_s: what is left of the plan, at the pace
 * seen so far.
 * Result of "plan": the last "plan" event. Of "status" and "cancel" (when it has come to rest): an "evacuation" with all
 * items; phase "none" when there is none; cancel is refused then (LB_E_STATE).
 * `maintenance` on, off, status: {"maintenance":true,"since_ms":,"reason":"","left":[as in maintenance.json]}.
 * off with bring_back streams "evacuation" events of phase "returning" (item: from where it is, to this host); the
 * result is the last one, with "ok": all are back.
 */
#ifndef LB_EVACUATE_H
#define LB_EVACUATE_H

#include "migrate/plan.h"

#define LB_EVAC_TRIES 3u
#define LB_EVAC_HOST_FAILURES 5u /* in a row: a host that no other can stand in for is given up */

enum lb_evac_phase {
    LB_EVAC_PLANNED = 0,
    LB_EVAC_RUNNING,
    LB_EVAC_REPLANNING,
    LB_EVAC_CANCELLING,
    LB_EVAC_CANCELLED,
    LB_EVAC_INCOMPLETE,
    LB_EVAC_FINISHED,     /* "done" */
};
enum lb_evac_state {
    LB_EVAC_WAITS = 0, LB_EVAC_SETUP, LB_EVAC_READY, LB_EVAC_SENDING, LB_EVAC_DONE, LB_EVAC_FAILED, LB_EVAC_LEFT,
};
enum lb_evac_kind {
    LB_EVAC_COPY = 0, LB_EVAC_SWAP, LB_EVAC_BACKUP, /* as lb_plan_kind */
    LB_EVAC_SUSPEND,
    LB_EVAC_BACK,         /* returning: migrated from where it is to this host */
    LB_EVAC_RESUME,       /* returning: resumed from this host's disk */
};

/* What was asked for. */
struct lb_evac_opts {
    char **to;                  /* NULL-terminated names of hosts; NULL or empty: any */
    uint32_t parallel;          /* 0: as planned */
    uint64_t bandwidth_bytes_per_s;
    char *priorities_json;      /* NULL: none */
    bool suspend_rest;
    enum lb_plan_hot hot;
};

struct lb_evac_item {
    char vm[128], from[128], to[128];
    enum lb_evac_kind kind;
    enum lb_evac_state state;
    /* of the plan */
    double start_s, end_s, downtime_ms;   /* downtime: measured when it is done */
    double bytes_planned, memory_bytes, dirty_bytes_per_s;
    bool alone, throttled, suspended;
    bool is_protected;
    /* of this run */
    uint32_t tries, soft;       /* soft: net failures before anything was sent */
    bool last_resort;           /* it did not converge: alone, and with what `hot` allows */
    bool replan, same_ok;       /* FAILED: planned anew first; the same host is better than none */
    char **excluded;            /* hosts where it has failed; NULL-terminated; NULL: none */
    /* of this try */
    double percent, bytes, throughput, eta_s, elapsed_s; /* eta < 0: not known */
    bool handed_over;           /* nothing cancels it any more */
    char message[512], remedy[384];

    /* not on disk. Monotonic ms */
    bool session, unsettled;    /* a session works on it; it has ended, and where the VM is is to be found out */
    bool cancel_asked, changed;
    bool awaited;               /* something works on it; when that is over it is planned, if it is still here */
    uint64_t begun_ms, retry_ms, held_ms;
    uint64_t unsettled_ms;      /* since when; 0: lb_evac_next has not seen it yet */
    struct lb_error error;      /* of the session that has ended */
};
struct lb_evac_host {
    char name[128];
    double link_bytes_per_s;    /* 0: not known */
    unsigned failures;          /* in a row; not on disk, like the next */
    uint64_t not_before_ms;
};

struct lb_evac {
    enum lb_evac_phase phase;
    bool returning;
    char id[33], host[128];     /* of the plan; this host */
    struct lb_evac_opts opts;   /* owned */
    uint64_t started_wall_ms;
    double elapsed_s;           /* since it runs */
    uint32_t parallel;
    double margin, makespan_s, bytes_planned;
    double lost_bytes;          /* sent by tries that came to nothing */
    double concurrency;         /* of the plan: steps at once on average */
    char note[256];
    struct lb_evac_item *items; /* in the order of the plan */
    struct lb_evac_host *hosts;
    unsigned n_items, n_hosts;

    /* not on disk */
    bool need_plan, planning;
    unsigned plan_failures;
    uint64_t plan_ms, seen_ms;  /* monotonic: plan not before; last call of lb_evac_next */
    double percent;             /* said; never goes down */
    double finish_s, finish_at; /* when it should end, and when that was estimated; both as elapsed_s */
};

enum lb_evac_do {
    LB_EVAC_DO_PLAN,   /* answer: lb_evac_planned or lb_evac_not_planned */
    LB_EVAC_DO_BEGIN,  /* lb_evac_hold, lb_evac_found, lb_evac_gone, lb_evac_ended; it is SETUP already */
    LB_EVAC_DO_GO,     /* lb_evac_not_told when that cannot be said now; it is SENDING already */
    LB_EVAC_DO_CANCEL, /* lb_evac_not_told; lb_evac_ended comes */
    LB_EVAC_DO_END,    /* phase is one of the last three */
};
struct lb_evac_order {
    enum lb_evac_do what;
    struct lb_evac_item *item;  /* until items are added: lb_evac_planned, lb_evac_add */
};
/* What a session says of its work. */
struct lb_evac_progress {
    enum lb_evac_state state;   /* SETUP, READY or SENDING */
    bool handed_over;
    double percent, bytes, throughput, dirty_bytes_per_s, eta_s; /* < 0: not said */
};

/* opts are copied. */
struct lb_evac *lb_evac_new(const char *host, const struct lb_evac_opts *opts, bool returning);
void lb_evac_free(struct lb_evac *e); /* NULL is fine */
/* The event "plan" (for replacement of what is left: the newest). PLANNED stays so, else it goes on by it.
 * LB_E_PROTO: it is none; nothing has changed. */
int lb_evac_planned(struct lb_evac *e, const json_t *plan, uint64_t now_ms, struct lb_error *err);
void lb_evac_not_planned(struct lb_evac *e, const struct lb_error *why, uint64_t now_ms);
/* A VM that is to leave and is in no plan yet (or to come back: with a host). */
struct lb_evac_item *lb_evac_add(struct lb_evac *e, const char *vm, enum lb_evac_kind kind);
/* From PLANNED, or after a restart from any phase that is not over: begins, or goes on. What was at work is
 * unsettled until lb_evac_found, _settled or _gone. */
void lb_evac_start(struct lb_evac *e, uint64_t now_ms, uint64_t wall_ms);
/* A VM of this host that no plan could take, as it is migrated by hand, or its memory still comes. Until lb_evac_free_again or
 * lb_evac_gone, but not for ever. It is not on disk: who comes after a restart finds it again. */
void lb_evac_await(struct lb_evac *e, const char *vm, const char *why, uint64_t now_ms);
void lb_evac_free_again(struct lb_evac *e, struct lb_evac_item *it);
void lb_evac_cancel(struct lb_evac *e);

/* What to do next, one at a time; false: nothing before something happens or time passes. */
bool lb_evac_next(struct lb_evac *e, uint64_t now_ms, struct lb_evac_order *o);

/* Something else works on the VM at the moment, and why. */
void lb_evac_hold(struct lb_evac *e, struct lb_evac_item *it, const char *why, uint64_t now_ms);
/* A session of it was found at work, to this host ("": as planned). */
void lb_evac_found(struct lb_evac *e, struct lb_evac_item *it, const char *to, uint64_t now_ms);
void lb_evac_not_told(struct lb_evac *e, struct lb_evac_item *it);
void lb_evac_progress(struct lb_evac *e, struct lb_evac_item *it, const struct lb_evac_progress *p);
/* Its session is gone. err NULL: it ended well. Copies, swaps and suspends are unsettled then. */
void lb_evac_ended(struct lb_evac *e, struct lb_evac_item *it, const struct lb_error *err, uint64_t now_ms);
/* Of an unsettled one: the VM runs here and nobody works on it; it is not here any more (or is suspended). */
void lb_evac_settled(struct lb_evac *e, struct lb_evac_item *it, uint64_t now_ms);
void lb_evac_gone(struct lb_evac *e, struct lb_evac_item *it, uint64_t now_ms);
/* It was here, and its process has ended: it keeps nobody from emptying the host. DONE, with a message. */
void lb_evac_died(struct lb_evac *e, struct lb_evac_item *it, uint64_t now_ms);
/* It will not leave, and why: no try can change that. */
void lb_evac_leave(struct lb_evac *e, struct lb_evac_item *it, const char *message, const char *remedy);

/* NULL: none. */
struct lb_evac_item *lb_evac_find(const struct lb_evac *e, const char *vm, enum lb_evac_kind kind);
/* The one that is about where the VM runs, not about its backup. */
struct lb_evac_item *lb_evac_mover(const struct lb_evac *e, const char *vm);
/* The one of the VM that is at work, or unsettled. */
struct lb_evac_item *lb_evac_active(const struct lb_evac *e, const char *vm);
bool lb_evac_over(const struct lb_evac *e);
/* May its guest be slowed, or stopped for as long as the rest takes? */
bool lb_evac_may_throttle(const struct lb_evac *e, const struct lb_evac_item *it);
bool lb_evac_may_pause(const struct lb_evac *e, const struct lb_evac_item *it);
/* "VM\tHOST" of what has failed there; NULL-terminated, caller: lb_strv_free. */
char **lb_evac_excluded(const struct lb_evac *e);

const char *lb_evac_kind_name(enum lb_evac_kind k);
const char *lb_evac_state_name(enum lb_evac_state s);
const char *lb_evac_phase_name(const struct lb_evac *e);

/* evacuate_json.c */
/* The event; of items those that have changed since the last one, or all. */
json_t *lb_evac_event(struct lb_evac *e, bool all, uint64_t now_ms);
/* All of it that is on disk, and back: LB_E_STATE when it is damaged. */
json_t *lb_evac_json(const struct lb_evac *e);
struct lb_evac *lb_evac_parse(const json_t *o, struct lb_error *err);
/* STATE_DIR/evacuation.json; load: NULL and LB_E_NOT_FOUND when there is none. */
int lb_evac_save(const char *state_dir, const struct lb_evac *e, struct lb_error *err);
struct lb_evac *lb_evac_load(const char *state_dir, struct lb_error *err);
int lb_evac_remove(const char *state_dir, struct lb_error *err);

#endif
