/*
 * cmd/daemon/protect.c - protections, as the supervisor sees them.
 *
 * What is wanted is a file, the wish (vms/NAME/protect.json); what is done about it is a session of
 * role "protect" on the primary and "backup" on the other host. A VM that runs here, has
 * a wish and no session gets one: after `lifeboat protect`, after the failover that brought it here,
 * after its backup was lost, after a restart of all.
 *
 *   protect    writes the wish, tries each host once; none: the wish goes again
 *   scan       tries the hosts in the operator's order for ever, the one just lost last,
 *              1 s .. 30 s apart
 *   unprotect  removes the wish, tells the session
 *   another place for the VM or its backup: rehome.c; the wish stays
 *
 * In memory is only when and with whom to try next (struct ward), and the last events of sessions:
 * a new supervisor begins at once with the first host.
 */
#include "cmd/daemon/daemon.h"

#include <string.h>

#include "remus/lease.h"
#include "remus/remus.h"

#define RETRY_FIRST_NS UINT64_C(1000000000)
#define RECOVER_FIRST_NS UINT64_C(2000000000)
#define RETRY_LONGEST_NS UINT64_C(30000000000)
#define LASTED_NS UINT64_C(30000000000) /* a protection that lasted so long begins a new count of failures */
#define UNPROTECT_TIMEOUT_S 60u
#define FAILOVER_TIMEOUT_S 30u
#define REFUSED_AGAIN_NS UINT64_C(15000000000) /* the same words count as a new answer */
#define MAX_INTERVAL_MS 1000u
#define MAX_CHANNELS 64u

/* What the supervisor remembers of one VM. */
struct ward {
    LIST_ENTRY(ward) link;
    char vm[128];
    bool first;           /* the operator's own `protect` is under way */
    bool off;             /* unprotect was asked for: tell the session as soon as it listens */
    unsigned tried;       /* hosts, since the last one was lost */
    unsigned failures;    /* in a row */
    uint64_t next_ns;     /* not before */
    char lost[128];       /* the host that was the backup last */
    char why[512];        /* there is no backup */
    unsigned recoveries;  /* that decided nothing, in a row */
    uint64_t recover_ns;  /* not before */
    char fill_why[512];   /* its memory could not be filled; "" */
    uint64_t failover_ns; /* when a failover was asked for */
    char refused[256];    /* the refusal that stood before that */
    char prefer[128];     /* host to be tried first; "" as the wish says */
    uint64_t since_ms, gap_ms; /* as in the wish: not protected since; for how long the last time */
};

static struct ward *ward_find(struct daemon *d, const char *vm)
{
    struct ward *w;

    LIST_FOREACH (w, &d->wards, link)
        if (!strcmp(w->vm, vm))
            return w;
    return NULL;
}

/* How long it has been without protection, from the wish. */
static void note_gap(struct daemon *d, struct ward *w)
{
    LB_AUTO_FREE struct lb_protect_wish *wish = lb_alloc(sizeof(*wish));

    if (!lb_vm_name_valid(w->vm) || lb_wish_load(d->opt.state_dir, w->vm, wish, NULL))
        return;
    w->since_ms = wish->unprotected_since_ms;
    w->gap_ms = wish->last_gap_ms;
}

static struct ward *ward_of(struct daemon *d, const char *vm)
{
    struct ward *w = ward_find(d, vm);

    if (w)
        return w;
    w = lb_alloc(sizeof(*w));
    snprintf(w->vm, sizeof(w->vm), "%s", vm);
    LIST_INSERT_HEAD(&d->wards, w, link);
    note_gap(d, w);
    return w;
}

void lb_wards_prune(struct daemon *d, const struct lb_vm_entry *v, unsigned n)
{
    struct ward *w, *next;

    for (w = LIST_FIRST(&d->wards); w; w = next) {
        bool there = lb_session_of_vm(d, w->vm) != NULL;

        next = LIST_NEXT(w, link);
        for (unsigned i = 0; i < n && !there; i++)
            there = !strcmp(v[i].name, w->vm);
        if (!there) {
            LIST_REMOVE(w, link);
            free(w);
        }
    }
}

static void on_due(evutil_socket_t fd, short what, void *arg)
{
    (void)fd;
    (void)what;
    lb_daemon_scan(arg);
}

/* first, doubled with every failure after the first one, at most RETRY_LONGEST_NS; the scan that
 * acts on it comes then. */
static uint64_t later(struct daemon *d, uint64_t first_ns, unsigned failures)
{
    uint64_t ns = failures ? first_ns << LB_MIN(failures - 1, 5u) : 0;
    struct timeval tv;

    ns = LB_MIN(ns, RETRY_LONGEST_NS);
    /* a little after the time, not before it */
    tv = (struct timeval){(time_t)(ns / 1000000000), (suseconds_t)(ns % 1000000000 / 1000 + 1000)};
    if (ns)
        event_base_once(d->base, -1, EV_TIMEOUT, on_due, d, &tv);
    return lb_now_ns() + ns;
}

static char *wish_path(struct daemon *d, const char *vm)
{
    return lb_asprintf("%s/vms/%s/protect.json", d->opt.state_dir, vm);
}

static bool has_wish(struct daemon *d, const char *vm)
{
    LB_AUTO_FREE char *path = lb_vm_name_valid(vm) ? wish_path(d, vm) : NULL;

    return path && !access(path, F_OK);
}

static bool is(const struct session *s, const char *role)
{
    return s && !strcmp(s->role, role);
}

bool lb_protect_wanted(struct daemon *d, const char *vm)
{
    return has_wish(d, vm) || is(lb_session_of_vm(d, vm), "protect");
}

/* Protected, but nobody works on it: its session died, and recovery has not been there yet. */
static int unsettled(struct daemon *d, const struct lb_vm_entry *e, struct lb_error *err)
{
    if (e->state != LB_VM_PROTECTED || is(lb_session_of_vm(d, e->name), "protect"))
        return 0;
    lb_fail(err, LB_E_UNDECIDED, "who may run VM %s is still to be decided: the session that protected it "
                                 "died", e->name);
    return lb_remedy(err, "wait, or `lifeboat recover %s`", e->name);
}

int lb_protect_refuse(struct daemon *d, const struct lb_vm_entry *e, const char *what,
                      struct lb_error *err)
{
    struct session *s = lb_session_of_vm(d, e->name);

    if (e->state == LB_VM_STANDBY || is(s, "backup")) {
        lb_fail(err, LB_E_STATE, "VM %s runs on host %s, here is its standby", e->name,
                s ? s->peer : e->peer);
        return lb_remedy(err, "`lifeboat failover %s` brings it here; else say `lifeboat %s %s` there",
                         e->name, what, e->name);
    }
    if (e->state == LB_VM_DEAD || (e->state != LB_VM_PROTECTED && !lb_protect_wanted(d, e->name)))
        return 0;
    if (is(s, "out")) /* on its way, and its wish with it */
        return 0;
    if (!strcmp(what, "migrate"))
        return unsettled(d, e, err);
    lb_fail(err, LB_E_STATE, "VM %s is %s", e->name,
            is(s, "protect") ? "protected" : "to be protected, and waits for a host that can");
    return lb_remedy(err, "`lifeboat unprotect %s` first", e->name);
}

/* ------------------------------------------------------------ whom to try next */

/* The hosts to try, in order, as pointers into hosts; none that does not have an address here, so never
 * this one itself. Caller frees. */
static const struct lb_host **candidates(const struct lb_protect_wish *wish,
                                         const struct lb_hosts *hosts, const char *prefer,
                                         const char *lost, unsigned *n)
{
    unsigned all = wish->n_backups ? wish->n_backups : hosts->n;
    const struct lb_host **v = lb_alloc(sizeof(*v) * (all + 2));
    const struct lb_host *last = NULL, *first = lb_hosts_by_name(hosts, prefer);

    *n = 0;
    if (first && first->address[0])
        v[(*n)++] = first;
    for (unsigned i = 0; i < all; i++) {
        const struct lb_host *h = wish->n_backups ? lb_hosts_by_name(hosts, wish->backups[i])
                                                  : &hosts->v[i];

        if (!h || !h->address[0] || h == first)
            continue;
        if (!strcmp(h->name, lost))
            last = h;
        else
            v[(*n)++] = h;
    }
    if (last)
        v[(*n)++] = last;
    return v;
}

static void tell_started(struct daemon *d, const struct session *s,
                         const struct lb_protect_wish *wish)
{
    LB_AUTO_FREE char *text = lb_wish_json(wish);
    json_t *o = json_object(), *w = json_loads(text, 0, NULL);

    json_object_set_new(o, "event", json_string("started"));
    json_object_set_new(o, "vm", json_string(s->vm));
    json_object_set_new(o, "host", lb_json_text(s->peer));
    json_object_set_new(o, "session", json_string(s->id));
    json_object_set_new(o, "wish", w ? w : json_null());
    LB_AUTO_FREE char *json = lb_json_dump(o);
    lb_clients_tell(d, s->vm, json);
}

/* The operator's own attempt has come to nothing. */
static void give_up(struct daemon *d, struct ward *w, const struct lb_error *e)
{
    struct lb_error err = LB_ERROR_INIT;

    w->first = false;
    if (lb_wish_remove(d->opt.state_dir, w->vm, &err))
        lb_log_error(LB_LOG_ERROR, &err);
    lb_clients_settle(d, w->vm, LB_WAIT_PROTECTED, NULL, e);
}

static void not_now(struct daemon *d, struct ward *w, const struct lb_error *e)
{
    if (w->first) {
        give_up(d, w, e);
        return;
    }
    if (strcmp(w->why, e->message))
        lb_log(LB_LOG_WARN, "vm=%s cannot be protected: %s", w->vm, e->message);
    snprintf(w->why, sizeof(w->why), "%s", e->message);
    w->failures++;
    w->next_ns = later(d, RETRY_FIRST_NS, w->failures);
}

static void try_next(struct daemon *d, struct ward *w)
{
    LB_AUTO_FREE struct lb_protect_wish *wish = lb_alloc(sizeof(*wish));
    LB_AUTO_FREE const struct lb_host **v = NULL;
    struct lb_error err = LB_ERROR_INIT;
    struct lb_hosts hosts = {0};
    struct session *s = NULL;
    unsigned n = 0;

    if (!lb_wish_load(d->opt.state_dir, w->vm, wish, &err) &&
        !lb_hosts_load(d->opt.state_dir, &hosts, &err)) {
        v = candidates(wish, &hosts, w->prefer, w->lost, &n);
        if (n) {
            s = lb_session_spawn(d, "protect", w->vm, v[w->tried % n]->name, NULL, -1, &err);
        } else {
            lb_fail(&err, LB_E_NOT_FOUND, "no host that may hold the backup of VM %s is known here",
                    w->vm);
            lb_remedy(&err, "`lifeboat host trust` one, with its address");
        }
    }
    lb_hosts_free(&hosts);
    if (s) {
        w->tried++;
        tell_started(d, s, wish);
    } else {
        not_now(d, w, &err);
    }
}

void lb_protect_scan(struct daemon *d, const struct lb_vm_entry *e)
{
    struct ward *w = ward_find(d, e->name);

    if (w)
        w->recoveries = 0;
    if (!has_wish(d, e->name) || lb_session_of_vm(d, e->name) ||
        lb_vm_is_locked(d->opt.state_dir, e->name))
        return;
    w = ward_of(d, e->name);
    if (lb_now_ns() >= w->next_ns)
        try_next(d, w);
}

void lb_recover_scan(struct daemon *d, const struct lb_vm_entry *e)
{
    struct lb_error err = LB_ERROR_INIT;

    if (!lb_recover_due(d, e->name))
        return;
    if (!lb_session_spawn(d, "recover", e->name, NULL, NULL, -1, &err))
        lb_log_error(LB_LOG_ERROR, &err);
}

/* -------------------------------------------------- what sessions say and how they end */

static void add_gap(struct daemon *d, const char *vm, json_t *o)
{
    const struct ward *w = ward_find(d, vm);

    if (w && w->since_ms)
        json_object_set_new(o, "unprotected_since_ms", json_integer((json_int_t)w->since_ms));
    if (w && w->gap_ms)
        json_object_set_new(o, "unprotected_ms", json_integer((json_int_t)w->gap_ms));
}

static json_t *event_to_json(const struct session *s)
{
    json_t *o = s->protect ? json_loads(s->protect, 0, NULL) : NULL;

    if (!o) {
        o = json_object();
        json_object_set_new(o, "role", json_string(is(s, "protect") ? "primary" : "backup"));
        json_object_set_new(o, "state", json_string("starting"));
    }
    json_object_del(o, "event");
    json_object_set_new(o, "vm", json_string(s->vm));
    json_object_set_new(o, "host", lb_json_text(s->peer));
    json_object_set_new(o, "session", json_string(s->id));
    add_gap(s->d, s->vm, o);
    return o;
}

/* From here on the VM has no backup, and is to have one; until the first epoch is complete somewhere. */
static void gap_begins(struct daemon *d, struct ward *w)
{
    LB_AUTO_FREE struct lb_protect_wish *wish = lb_alloc(sizeof(*wish));
    struct lb_error err = LB_ERROR_INIT;

    if (lb_wish_load(d->opt.state_dir, w->vm, wish, NULL) || wish->unprotected_since_ms)
        return;
    wish->unprotected_since_ms = lb_wall_ms();
    if (lb_wish_save(d->opt.state_dir, w->vm, wish, &err))
        lb_log_error(LB_LOG_WARN, &err);
    w->since_ms = wish->unprotected_since_ms;
}

/* Of a VM that has moved it began by the clock of another host. */
static void gap_ends(struct daemon *d, struct ward *w)
{
    LB_AUTO_FREE struct lb_protect_wish *wish = lb_alloc(sizeof(*wish));
    struct lb_error err = LB_ERROR_INIT;
    uint64_t now = lb_wall_ms();

    if (lb_wish_load(d->opt.state_dir, w->vm, wish, NULL) || !wish->unprotected_since_ms)
        return;
    wish->last_gap_ms = LB_MAX(now, wish->unprotected_since_ms + 1) - wish->unprotected_since_ms;
    wish->unprotected_since_ms = 0;
    if (lb_wish_save(d->opt.state_dir, w->vm, wish, &err))
        lb_log_error(LB_LOG_WARN, &err);
    lb_log(LB_LOG_INFO, "vm=%s is protected again; it was not for %.1f s", w->vm,
           (double)wish->last_gap_ms / 1e3);
    w->since_ms = 0;
    w->gap_ms = wish->last_gap_ms;
}

/* The answer to `protect`. */
static char *protected_json(const struct session *s)
{
    json_t *o = json_object();

    json_object_set_new(o, "vm", json_string(s->vm));
    json_object_set_new(o, "host", lb_json_text(s->peer));
    json_object_set_new(o, "protected", json_true());
    json_object_set_new(o, "protect", event_to_json(s));
    return lb_json_dump(o);
}

/* A standby that does not take over stays one, and says why in its note: an answer to who asked, unless
 * it is what it said before. */
static void failover_refused(struct session *s, struct ward *w, const char *note)
{
    struct lb_error e = LB_ERROR_INIT;

    if (strncmp(note, "failover refused", 16) ||
        (!strcmp(note, w->refused) && lb_now_ns() - w->failover_ns < REFUSED_AGAIN_NS))
        return;
    lb_fail(&e, LB_E_STATE, "VM %s: %s", s->vm, note);
    lb_remedy(&e, "`lifeboat status %s` shows the standby and its witness", s->vm);
    lb_clients_settle(s->d, s->vm, LB_WAIT_HERE, NULL, &e);
}

void lb_protect_event(struct session *s, const char *state, const char *note, const char *json)
{
    struct daemon *d = s->d;
    struct ward *w = ward_of(d, s->vm);

    lb_clients_tell(d, s->vm, json);
    if (is(s, "backup"))
        failover_refused(s, w, note);
    if (is(s, "protect") && !s->protected_ns && !strcmp(state, "protected")) {
        s->protected_ns = lb_now_ns();
        w->first = false;
        w->why[0] = '\0';
        gap_ends(d, w);
        LB_AUTO_FREE char *result = protected_json(s);
        lb_clients_settle(d, s->vm, LB_WAIT_PROTECTED, result, NULL);
        lb_rehome_protected(s, result);
    }
    if (is(s, "protect") && w->off && s->conn) {
        struct lb_error err = LB_ERROR_INIT;

        w->off = lb_session_order_cancel(s, &err) != 0;
        if (w->off)
            lb_log_error(LB_LOG_WARN, &err);
    }
}

/* It failed because of that host: another one may do. */
static bool another_may_do(enum lb_errcode code)
{
    return code == LB_E_NET || code == LB_E_AUTH || code == LB_E_PROTO || code == LB_E_PREFLIGHT ||
           code == LB_E_NO_SPACE || code == LB_E_EXISTS || code == LB_E_NOT_FOUND;
}

static bool hosts_left(struct daemon *d, struct ward *w)
{
    LB_AUTO_FREE struct lb_protect_wish *wish = lb_alloc(sizeof(*wish));
    LB_AUTO_FREE const struct lb_host **v = NULL;
    struct lb_hosts hosts = {0};
    unsigned n = 0;

    if (!lb_wish_load(d->opt.state_dir, w->vm, wish, NULL) &&
        !lb_hosts_load(d->opt.state_dir, &hosts, NULL))
        v = candidates(wish, &hosts, w->prefer, w->lost, &n);
    lb_hosts_free(&hosts);
    return w->tried < n;
}

static void tell_refused(struct daemon *d, const struct session *s)
{
    json_t *o = json_object();

    json_object_set_new(o, "event", json_string("host-failed"));
    json_object_set_new(o, "vm", json_string(s->vm));
    json_object_set_new(o, "host", lb_json_text(s->peer));
    json_object_set_new(o, "message", lb_json_text(s->error.message));
    json_object_set_new(o, "remedy", lb_json_text(s->error.remedy));
    LB_AUTO_FREE char *json = lb_json_dump(o);
    lb_clients_tell(d, s->vm, json);
}

/* The VM goes on here without a backup. */
static void lost_backup(struct session *s, struct ward *w)
{
    struct daemon *d = s->d;
    bool lasted = s->protected_ns && lb_now_ns() - s->protected_ns > LASTED_NS;

    if (w->first) {
        if (another_may_do(s->error.code) && hosts_left(d, w))
            tell_refused(d, s);
        else
            give_up(d, w, &s->error);
        return;
    }
    w->failures = lasted ? 0 : w->failures + 1;
    if (s->protected_ns) {
        w->tried = 0;
        w->prefer[0] = '\0';
        snprintf(w->lost, sizeof(w->lost), "%s", s->peer);
    } else if (another_may_do(s->error.code) && hosts_left(d, w)) {
        w->failures = 0; /* it is that host's fault: the next one at once */
    } else {
        lb_rehome_unprotected(d, s->vm, &s->error);
    }
    if (strstr(s->error.message, s->peer))
        snprintf(w->why, sizeof(w->why), "%s", s->error.message);
    else
        snprintf(w->why, sizeof(w->why), "host %.100s: %.400s", s->peer, s->error.message);
    w->next_ns = later(d, RETRY_FIRST_NS, w->failures);
    lb_log(LB_LOG_WARN, "vm=%s is not protected: %s", s->vm, w->why);
}

static char *off_json(const struct session *s)
{
    json_t *o = json_object();

    json_object_set_new(o, "vm", json_string(s->vm));
    json_object_set_new(o, "host", lb_json_text(s->peer));
    json_object_set_new(o, "unprotected", json_true());
    return lb_json_dump(o);
}

static void primary_ended(struct session *s)
{
    struct daemon *d = s->d;
    struct ward *w = ward_of(d, s->vm);
    bool off = !strcmp(s->end, "off"), alone = !strcmp(s->end, "alone") || !strcmp(s->end, "failed");
    LB_AUTO_FREE char *result = off_json(s);
    struct lb_error e = s->error;

    if (!has_wish(d, s->vm)) {
        w->first = w->off = false;
        w->failures = 0;
    }
    /* Without a wish it does not matter why there is no backup any more. */
    if (off || (alone && !has_wish(d, s->vm)))
        lb_clients_settle(d, s->vm, LB_WAIT_OFF, result, NULL);
    if (s->protected_ns && (off || alone))
        gap_begins(d, w);
    if (lb_rehome_ended(s, off || alone))
        return;
    if (!e.code) {
        if (off)
            lb_fail(&e, LB_E_CANCELLED, "the protection of VM %s was ended", s->vm);
        else
            lb_fail(&e, LB_E_STATE, "VM %s runs on host %s now", s->vm, s->peer);
        lb_remedy(&e, "`lifeboat status %s` there shows it", s->vm);
    }
    lb_clients_settle(d, s->vm, LB_WAIT_OFF, NULL, &e);
    if (has_wish(d, s->vm) && !off && strcmp(s->end, "fenced") && strcmp(s->end, "yielded") &&
        strcmp(s->end, "undecided"))
        lost_backup(s, w);
    else
        lb_clients_settle(d, s->vm, LB_WAIT_PROTECTED, NULL, &e);
}

/* It runs here now: protected onward at once, and not by the host that it came from, which has failed or does not
 * want it. */
static void came_from(struct session *s)
{
    struct ward *w = ward_of(s->d, s->vm);

    w->tried = w->failures = 0;
    w->next_ns = 0;
    w->prefer[0] = '\0';
    snprintf(w->lost, sizeof(w->lost), "%s", s->peer);
    note_gap(s->d, w);
}

static void backup_ended(struct session *s)
{
    bool promoted = !strcmp(s->end, "promoted");
    struct ward *w = ward_of(s->d, s->vm);
    struct lb_error e = s->error;
    json_t *o;

    if (promoted) {
        came_from(s);
        gap_begins(s->d, w);
        o = event_to_json(s);
        json_object_set_new(o, "promoted", json_true());
        LB_AUTO_FREE char *json = lb_json_dump(o);
        lb_clients_settle(s->d, s->vm, LB_WAIT_HERE, json, NULL);
        return;
    }
    if (!e.code) {
        lb_fail(&e, LB_E_STATE, "the standby of VM %s was given up: it goes on on host %s", s->vm,
                s->peer);
        lb_remedy(&e, "`lifeboat status %s` there shows it", s->vm);
    }
    lb_clients_settle(s->d, s->vm, LB_WAIT_HERE, NULL, &e);
}

bool lb_recover_due(struct daemon *d, const char *vm)
{
    struct ward *w = ward_find(d, vm);

    return !lb_session_of_vm(d, vm) && !lb_vm_is_locked(d->opt.state_dir, vm) &&
           (!w || lb_now_ns() >= w->recover_ns);
}

const char *lb_fill_problem(struct daemon *d, const char *vm)
{
    const struct ward *w = ward_find(d, vm);

    return w ? w->fill_why : "";
}

static void recovery_ended(struct session *s)
{
    struct ward *w = ward_of(s->d, s->vm);

    w->fill_why[0] = '\0';
    if (!s->error.code) {
        w->recoveries = 0;
        w->recover_ns = 0;
        return;
    }
    if (is(s, "fill"))
        snprintf(w->fill_why, sizeof(w->fill_why), "%.300s: %.200s", s->error.message, s->error.remedy);
    w->recoveries++;
    w->recover_ns = later(s->d, RECOVER_FIRST_NS, w->recoveries);
}

void lb_protect_ended(struct session *s)
{
    if (is(s, "in") && !s->error.code && has_wish(s->d, s->vm))
        came_from(s);
    if (is(s, "check"))
        lb_rehome_checked(s);
    else if (is(s, "protect"))
        primary_ended(s);
    else if (is(s, "backup"))
        backup_ended(s);
    else if (is(s, "recover") || is(s, "fill"))
        recovery_ended(s);
}

/* -------------------------------------------------------------------- protect */

static int add_backup(struct lb_protect_wish *w, const struct lb_hosts *hosts, const char *name,
                      struct lb_error *err)
{
    const struct lb_host *h = lb_hosts_by_name(hosts, name);

    if (!h) {
        lb_fail(err, LB_E_NOT_FOUND, "host %.100s is not known here", name);
        return lb_remedy(err, "run `lifeboat host id` there, then `lifeboat host trust %.60s KEY "
                              "ADDRESS` here; `lifeboat host ls` lists the known ones", name);
    }
    if (!h->address[0]) {
        lb_fail(err, LB_E_USAGE, "host %s is known here without an address", name);
        return lb_remedy(err, "`lifeboat host trust %s KEY ADDRESS`", name);
    }
    for (unsigned i = 0; i < w->n_backups; i++)
        if (!strcmp(w->backups[i], name))
            return lb_fail(err, LB_E_USAGE, "host %s is named twice", name);
    if (w->n_backups == LB_PROTECT_MAX_BACKUPS)
        return lb_fail(err, LB_E_USAGE, "at most %d hosts can be named", LB_PROTECT_MAX_BACKUPS);
    snprintf(w->backups[w->n_backups++], sizeof(w->backups[0]), "%s", name);
    return 0;
}

static int fill_backups(const Lb__RpcProtect *r, const char *configured, const struct lb_hosts *hosts,
                        struct lb_protect_wish *w, struct lb_error *err)
{
    LB_AUTO_FREE char *list = lb_strdup(configured);
    char *save = NULL;

    for (size_t i = 0; i < r->n_backups; i++)
        if (add_backup(w, hosts, r->backups[i], err))
            return -1;
    for (char *name = r->n_backups ? NULL : strtok_r(list, ", \t", &save); name;
         name = strtok_r(NULL, ", \t", &save))
        if (add_backup(w, hosts, name, err))
            return lb_context(err, "backup of the configuration");
    if (!w->n_backups) {
        LB_AUTO_FREE const struct lb_host **v = NULL;
        unsigned n;

        v = candidates(w, hosts, "", "", &n);
        if (!n) {
            lb_fail(err, LB_E_NOT_FOUND, "no trusted host with an address is known here");
            return lb_remedy(err, "`lifeboat host trust` one; name it with --backup");
        }
    }
    return 0;
}

static int fill_options(const Lb__RpcProtect *r, const struct lb_host_config *c,
                        struct lb_protect_opts *o, struct lb_error *err)
{
    const char *witness = r->witness[0] ? r->witness : c->witness;

    if (!witness[0]) {
        lb_fail(err, LB_E_USAGE, "it is not said who decides when a host is silent");
        return lb_remedy(err, "give one of --witness etcd:URL, --fence CMD and --manual, or set witness "
                              "in %.200s", LB_CONFIG_DEFAULT_PATH);
    }
    if (lb_witness_spec_check(witness, err))
        return -1;
    if (strlen(witness) >= sizeof(o->witness))
        return lb_fail(err, LB_E_USAGE, "the witness has more than %zu characters",
                       sizeof(o->witness) - 1);
    if (r->interval_ms > MAX_INTERVAL_MS)
        return lb_fail(err, LB_E_USAGE, "the interval is from 1 ms to %u ms", MAX_INTERVAL_MS);
    if (r->lease_ms && (r->lease_ms < LB_LEASE_MIN_MS || r->lease_ms > LB_LEASE_HIGHEST_MS))
        return lb_fail(err, LB_E_USAGE, "the lease is from %d ms to %u ms", LB_LEASE_MIN_MS,
                       LB_LEASE_HIGHEST_MS);
    if (r->disk > LB_DISK_NONE || r->channels > MAX_CHANNELS)
        return lb_fail(err, LB_E_USAGE, "at most %u channels are possible, and disks are replicated or "
                                        "not", MAX_CHANNELS);
    if (r->transport > LB_TRANSPORT_RDMA)
        return lb_fail(err, LB_E_USAGE, "transport %u is not known here", r->transport);
    *o = (struct lb_protect_opts){
        .interval_ms = r->interval_ms ? r->interval_ms : LB_REMUS_INTERVAL_MS,
        .adaptive = r->adaptive,
        .disk = (enum lb_disk_mode)r->disk,
        .lease_ms = r->lease_ms ? r->lease_ms : c->lease_ms ? c->lease_ms : lb_lease_default_ms(witness),
        .bandwidth_bytes_per_s = r->bandwidth_bytes_per_s ? r->bandwidth_bytes_per_s
                                                          : c->bandwidth_bytes_per_s,
        .delta_cache_bytes = r->delta_cache_bytes,
        .channels = r->channels ? r->channels : c->channels,
        .insecure_plaintext = r->insecure_plaintext,
        .transport = r->transport,
    };
    snprintf(o->witness, sizeof(o->witness), "%s", witness);
    return 0;
}

static int fill_wish(struct daemon *d, const Lb__RpcProtect *r, struct lb_protect_wish *w,
                     struct lb_error *err)
{
    struct lb_hosts hosts = {0};
    struct lb_host_config c;
    int rc;

    if (lb_config_load(d->opt.config_path, &c, err))
        return -1;
    rc = fill_options(r, &c, &w->opts, err);
    if (!rc)
        rc = lb_hosts_load(d->opt.state_dir, &hosts, err);
    if (!rc)
        rc = fill_backups(r, c.backup, &hosts, w, err);
    lb_hosts_free(&hosts);
    lb_config_free(&c);
    return rc;
}

static int check_protectable(struct daemon *d, const char *name, struct lb_error *err)
{
    struct session *s = lb_session_of_vm(d, name);
    struct lb_vm_entry e;

    if (lb_vm_entry_load(d->opt.state_dir, name, &e, err) ||
        lb_protect_refuse(d, &e, "protect", err) || lb_ckpt_refuse(d, &e, err))
        return -1;
    if (is(s, "out")) {
        lb_fail(err, LB_E_STATE, "VM %s is being migrated to host %s", name, s->peer);
        return lb_remedy(err, "protect it there, or `lifeboat cancel %s`", name);
    }
    if (e.state == LB_VM_DEAD || !lb_proc_alive(&e.proc)) {
        lb_fail(err, LB_E_STATE, "VM %s is dead: its process %d is gone", name, (int)e.proc.pid);
        return lb_remedy(err, "`lifeboat release %s` forgets it", name);
    }
    /* One that has just come in may be protected at once: the session waits for its lock. */
    if (lb_session_blocks(s, &e) || (e.state != LB_VM_RUNNING && !is(s, "in"))) {
        lb_fail(err, LB_E_STATE, "VM %s is %s%s", name, lb_vm_state_name(e.state),
                is(s, "recover") ? " and being recovered" : "");
        return lb_remedy(err, "wait, or `lifeboat recover %s`", name);
    }
    return 0;
}

void lb_op_protect(struct daemon *d, struct client *c, const Lb__RpcProtect *r)
{
    LB_AUTO_FREE struct lb_protect_wish *wish = lb_alloc(sizeof(*wish));
    struct lb_error err = LB_ERROR_INIT;
    struct ward *w;

    if (r->change && lb_protect_wanted(d, r->name)) {
        lb_op_change_backup(d, c, r);
        return;
    }
    if (check_protectable(d, r->name, &err) || fill_wish(d, r, wish, &err) ||
        lb_wish_save(d->opt.state_dir, r->name, wish, &err)) {
        lb_client_failure(c, &err, NULL);
        return;
    }
    w = ward_of(d, r->name);
    w->first = true;
    w->off = false;
    w->tried = w->failures = 0;
    w->next_ns = 0;
    w->prefer[0] = w->lost[0] = '\0';
    lb_client_wait(c, r->name, LB_WAIT_PROTECTED, 0, NULL);
    try_next(d, w);
}

/* ------------------------------------------------------------------- for rehome.c */

int lb_protect_backups(struct daemon *d, const Lb__RpcProtect *r, struct lb_protect_wish *out,
                       struct lb_error *err)
{
    struct lb_hosts hosts = {0};
    int rc = lb_hosts_load(d->opt.state_dir, &hosts, err);

    if (!rc)
        rc = fill_backups(r, "", &hosts, out, err);
    lb_hosts_free(&hosts);
    return rc;
}

void lb_protect_end_for_now(struct daemon *d, const char *vm)
{
    struct session *s = lb_session_of_vm(d, vm);
    struct ward *w = ward_of(d, vm);
    struct lb_error err = LB_ERROR_INIT;

    w->first = false; /* the wish is there to stay */
    gap_begins(d, w);
    /* One that is connecting again is told when it speaks. */
    w->off = lb_session_order_cancel(s, &err) != 0;
}

void lb_protect_next(struct daemon *d, const char *vm, const char *prefer, const char *lost)
{
    struct ward *w = ward_of(d, vm);

    w->first = w->off = false;
    w->tried = w->failures = 0;
    w->next_ns = 0;
    snprintf(w->prefer, sizeof(w->prefer), "%s", prefer);
    snprintf(w->lost, sizeof(w->lost), "%s", lost);
    try_next(d, w);
}

/* ---------------------------------------------------------- unprotect, failover */

static int check_unprotectable(struct daemon *d, const char *vm, const struct lb_vm_entry *e,
                               struct lb_error *err)
{
    struct session *s = lb_session_of_vm(d, vm);

    if (e->state == LB_VM_STANDBY || is(s, "backup")) {
        lb_fail(err, LB_E_STATE, "here is only the standby of VM %s", vm);
        return lb_remedy(err, "`lifeboat unprotect %s` on host %s, where it runs", vm,
                         s ? s->peer : e->peer);
    }
    if (is(s, "out")) {
        lb_fail(err, LB_E_STATE, "VM %s is being migrated to host %s, where it is to be protected again", vm,
                s->peer);
        return lb_remedy(err, "`lifeboat unprotect %s` there, or `lifeboat cancel %s` here first", vm, vm);
    }
    if (!lb_protect_wanted(d, vm) && e->state != LB_VM_PROTECTED) {
        lb_fail(err, LB_E_STATE, "VM %s is not protected", vm);
        return lb_remedy(err, "`lifeboat ls` shows which ones are");
    }
    return lb_wish_remove(d->opt.state_dir, vm, err);
}

void lb_op_unprotect(struct daemon *d, struct client *c, const char *vm,
                     const Lb__RpcRequest *then)
{
    struct session *s = lb_session_of_vm(d, vm);
    struct lb_error err = LB_ERROR_INIT;
    struct lb_vm_entry e;

    if (lb_vm_entry_load(d->opt.state_dir, vm, &e, &err) ||
        check_unprotectable(d, vm, &e, &err)) {
        lb_client_failure(c, &err, NULL);
        return;
    }
    if (!is(s, "protect") && e.state == LB_VM_PROTECTED) {
        lb_fail(&err, LB_E_UNDECIDED, "VM %s will not be protected again, but who may run it is "
                                      "still to be decided: its session died", vm);
        lb_remedy(&err, "wait, or `lifeboat recover %s`", vm);
        lb_client_failure(c, &err, NULL);
        return;
    }
    lb_rehome_drop(d, vm);
    lb_client_wait(c, vm, LB_WAIT_OFF, UNPROTECT_TIMEOUT_S, then);
    if (!is(s, "protect")) {
        json_t *o = json_object();

        json_object_set_new(o, "vm", json_string(vm));
        json_object_set_new(o, "host", json_string(""));
        json_object_set_new(o, "unprotected", json_true());
        LB_AUTO_FREE char *json = lb_json_dump(o);
        lb_clients_settle(d, vm, LB_WAIT_OFF, json, NULL);
        return;
    }
    /* One that has not connected yet, or is connecting again, is told when it speaks. */
    ward_of(d, vm)->off = lb_session_order_cancel(s, &err) != 0;
}

static void ask_failover(struct daemon *d, struct session *s, bool force, struct lb_error *err)
{
    json_t *o = event_to_json(s);
    const char *note = json_string_value(json_object_get(o, "note"));
    struct ward *w = ward_of(d, s->vm);

    w->failover_ns = lb_now_ns();
    snprintf(w->refused, sizeof(w->refused), "%s", note ? note : "");
    json_decref(o);
    lb_session_order_failover(s, force, err);
}

void lb_op_failover(struct daemon *d, struct client *c, const Lb__RpcName *r)
{
    struct session *s = lb_session_of_vm(d, r->name);
    struct lb_error err = LB_ERROR_INIT;
    struct lb_vm_entry e;

    if (lb_vm_entry_load(d->opt.state_dir, r->name, &e, &err)) {
        /* err says it */
    } else if (is(s, "backup")) {
        ask_failover(d, s, r->force, &err);
    } else if (e.state == LB_VM_STANDBY) {
        lb_fail(&err, LB_E_UNDECIDED, "the session of the standby of VM %s died", r->name);
        lb_remedy(&err, "`lifeboat recover %s` decides; without it the daemon does, in a moment",
                  r->name);
    } else if (e.state == LB_VM_PROTECTED || lb_protect_wanted(d, r->name)) {
        lb_fail(&err, LB_E_STATE, "VM %s runs here: its backup takes it over", r->name);
        lb_remedy(&err, "`lifeboat failover %s` on host %s", r->name, s ? s->peer : e.peer);
    } else {
        lb_fail(&err, LB_E_STATE, "there is no standby of VM %s here", r->name);
        lb_remedy(&err, "`lifeboat failover` is for the host that holds the backup; `lifeboat ls` "
                        "shows it there as standby");
    }
    if (err.code)
        lb_client_failure(c, &err, NULL);
    else
        lb_client_wait(c, r->name, LB_WAIT_HERE, FAILOVER_TIMEOUT_S, NULL);
}

/* ------------------------------------------------------------------------ top */

static json_t *without_session(struct daemon *d, const struct lb_vm_entry *e)
{
    struct ward *w = ward_find(d, e->name);
    uint64_t now = lb_now_ns(), next;
    bool waits = e->state == LB_VM_RUNNING && has_wish(d, e->name);
    json_t *o;

    if (!waits && e->state != LB_VM_PROTECTED && e->state != LB_VM_STANDBY)
        return NULL;
    next = !w ? 0 : waits ? w->next_ns : w->recover_ns;
    o = json_object();
    json_object_set_new(o, "vm", lb_json_text(e->name));
    json_object_set_new(o, "host", lb_json_text(waits ? "" : e->peer));
    json_object_set_new(o, "role", json_string(e->state == LB_VM_STANDBY ? "backup" : "primary"));
    json_object_set_new(o, "state", json_string(waits ? "waiting" : "recovering"));
    json_object_set_new(o, "retry_s", json_real(next > now ? (double)(next - now) / 1e9 : 0));
    json_object_set_new(o, "note", lb_json_text(waits && w ? w->why : e->note));
    add_gap(d, e->name, o);
    return o;
}

json_t *lb_protect_json(struct daemon *d, const struct lb_vm_entry *e)
{
    struct session *s = lb_session_of_vm(d, e->name);

    return is(s, "protect") || is(s, "backup") ? event_to_json(s) : without_session(d, e);
}

char *lb_op_top(struct daemon *d, struct lb_error *err)
{
    LB_AUTO_FREE struct lb_vm_entry *v = NULL;
    json_t *o, *list;
    unsigned n = 0;

    if (lb_vm_entry_list(d->opt.state_dir, &v, &n, err))
        return NULL;
    o = json_object();
    list = json_array();
    for (unsigned i = 0; i < n; i++) {
        json_t *p = lb_protect_json(d, &v[i]);

        if (p)
            json_array_append_new(list, p);
    }
    json_object_set_new(o, "protections", list);
    return lb_json_dump(o);
}
