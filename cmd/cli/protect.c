/*
 * cmd/cli/protect.c - lifeboat protect NAME
 *
 * Says what will be done before it is done, then how far it is; returns when the first checkpoint
 * is complete. Ctrl-C only stops watching.
 */
#include "cmd/cli/cli.h"

#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

/* ------------------------------------------------------------------ in words */

const char *lb_vm_state_text(const json_t *vm)
{
    static const char *const before[] = {"connecting", "preflight", "launching", "disk-sync", "pre-copy", "arming"};
    const char *state = lb_jstr(vm, "state"), *of = lb_jstr(json_object_get(vm, "protect"), "state");

    for (size_t i = 0; !strcmp(state, "protected") && i < LB_ARRAY_LEN(before); i++)
        if (!strcmp(of, before[i]))
            return "protecting";
    return state;
}

const char *lb_protect_state(const json_t *p, char *buf, size_t n)
{
    const char *state = lb_jstr(p, "state");

    if (!strcmp(state, "disk-sync") || !strcmp(state, "pre-copy") || !strcmp(state, "receiving"))
        snprintf(buf, n, "%.0f%% %s", lb_jnum(p, "percent"), state);
    else if (!strcmp(state, "protected"))
        snprintf(buf, n, "%.1f epochs/s", lb_jnum(p, "epochs_per_s"));
    else
        snprintf(buf, n, "%s", state);
    return buf;
}

static void line(const char *key, const char *text)
{
    printf("%-12s", key);
    lb_print_text(stdout, text);
    putchar('\n');
}

/* What the state means for the operator. */
static void print_state(const json_t *p)
{
    const char *state = lb_jstr(p, "state"), *host = lb_jstr(p, "host");
    bool backup = !strcmp(lb_jstr(p, "role"), "backup");
    char text[300];

    if (!strcmp(state, "protected"))
        snprintf(text, sizeof(text), "protected: host %.100s can take over", host);
    else if (!strcmp(state, "standby"))
        snprintf(text, sizeof(text), "standby: this host can take over from %.100s", host);
    else if (!strcmp(state, "alone"))
        snprintf(text, sizeof(text), "NOT protected: host %.100s was lost, the guest runs on", host);
    else if (!strcmp(state, "no-lease"))
        snprintf(text, sizeof(text), "STOPPED: host %.100s is silent, and the witness has not said yet "
                                     "who may run", host);
    else if (!strcmp(state, "fenced") || !strcmp(state, "promoted"))
        snprintf(text, sizeof(text), "%s: the guest runs %s%.100s", state,
                 backup ? "here" : "on host ", backup ? "" : host);
    else if (!strcmp(state, "waiting"))
        snprintf(text, sizeof(text), "NOT protected: no backup; tried again in %.0f s",
                 lb_jnum(p, "retry_s"));
    else if (!strcmp(state, "recovering"))
        snprintf(text, sizeof(text), "its session died: being decided who runs the guest");
    else if (backup)
        snprintf(text, sizeof(text), "%s from host %.100s: cannot take over yet", state, host);
    else
        snprintf(text, sizeof(text), "NOT protected yet: %s, %.0f%%, host %.100s", state,
                 lb_jnum(p, "percent"), host);
    line("protection", text);
}

static void print_numbers(const json_t *p)
{
    char a[32], b[32], c[32], text[300];
    double raw = lb_jnum(p, "raw_bytes_per_s");

    snprintf(text, sizeof(text), "%lld, acknowledged %lld, %.1f/s of %lld ms%s",
             (long long)lb_jint(p, "epoch"), (long long)lb_jint(p, "acked"),
             lb_jnum(p, "epochs_per_s"), (long long)lb_jint(p, "interval_ms"),
             lb_jbool(p, "stretched") ? ": longer than wanted, the link or the backup is slower than "
                                        "the guest writes" : "");
    line("epochs", text);
    if (!strcmp(lb_jstr(p, "role"), "backup"))
        return;
    snprintf(text, sizeof(text), "p50 %.1f ms, p99 %.1f ms, longest %.1f ms; %.0f dirty pages an epoch",
             lb_jnum(p, "pause_p50_ms"), lb_jnum(p, "pause_p99_ms"), lb_jnum(p, "pause_max_ms"),
             lb_jnum(p, "dirty_pages"));
    line("pause", text);
    snprintf(text, sizeof(text), "%s/s for %s/s that changed (%.2f)",
             lb_human_bytes(a, sizeof(a), lb_jnum(p, "wire_bytes_per_s")),
             lb_human_bytes(b, sizeof(b), raw),
             raw > 0 ? lb_jnum(p, "wire_bytes_per_s") / raw : 0.0);
    line("wire", text);
    snprintf(text, sizeof(text), "%.1f ms; %lld packets (%s) held, %s of disk writes on the way",
             lb_jnum(p, "lag_ms"), (long long)lb_jint(p, "held_packets"),
             lb_human_bytes(a, sizeof(a), lb_jnum(p, "held_bytes")),
             lb_human_bytes(c, sizeof(c), lb_jnum(p, "disk_backlog_bytes")));
    line("lag", text);
    if (lb_jnum(p, "clock_lag_ms") > 0) {
        snprintf(text, sizeof(text), "guest behind by %.0f ms of pauses, %.0f ms made up for",
                 lb_jnum(p, "clock_lag_ms"), lb_jnum(p, "clock_corrected_ms"));
        line("clock", text);
    }
}

void lb_print_protection(const json_t *p)
{
    char when[32], span[32], text[300];

    print_state(p);
    if (json_object_get(p, "epoch"))
        print_numbers(p);
    if (lb_jnum(p, "lease_left_ms") >= 0 && json_object_get(p, "lease_left_ms")) {
        snprintf(text, sizeof(text), "%.0f ms left", lb_jnum(p, "lease_left_ms"));
        line("lease", text);
    }
    if (lb_jstr(p, "witness")[0]) {
        snprintf(text, sizeof(text), "%s%.200s", lb_jbool(p, "witness_ok") ? "" : "DOES NOT ANSWER: ",
                 lb_jstr(p, "witness"));
        line("witness", text);
    }
    if (lb_jint(p, "failovers") > 0) {
        snprintf(text, sizeof(text), "%lld, the last at %s in %.0f ms",
                 (long long)lb_jint(p, "failovers"), lb_when(when, lb_jnum(p, "last_failover_ms")),
                 lb_jnum(p, "last_failover_took_ms"));
        line("failovers", text);
    }
    if (lb_jnum(p, "unprotected_since_ms") > 0) {
        snprintf(text, sizeof(text), "without a backup since %s",
                 lb_when(when, lb_jnum(p, "unprotected_since_ms")));
        line("gap", text);
    } else if (lb_jnum(p, "unprotected_ms") > 0) {
        snprintf(text, sizeof(text), "the last time without a backup was %s long",
                 lb_span(span, sizeof(span), lb_jnum(p, "unprotected_ms")));
        line("gap", text);
    }
    if (lb_jstr(p, "note")[0])
        line("note", lb_jstr(p, "note"));
}

/* ------------------------------------------------------------------- watching */

struct view {
    struct lb_cli *cli;
    const char *name;
    bool quiet, detach, progress_json, tty, drawn, announced;
    double percent;
    char state[32], note[256];
};

static void wipe(struct view *v)
{
    if (v->drawn)
        fputs("\r\033[K", stdout);
    v->drawn = false;
}

static void announce(struct view *v, const json_t *ev)
{
    const json_t *w = json_object_get(ev, "wish"), *b;
    const char *host = lb_jstr(ev, "host"), *witness = lb_jstr(w, "witness");
    bool more = false;
    size_t i;

    wipe(v);
    printf("VM %s: protection by host %s begins; the guest runs on meanwhile\n", v->name, host);
    if (v->announced)
        return;
    v->announced = true;
    printf("  every %lld ms%s its changes go there; what it sends leaves this host when they have "
           "arrived\n", (long long)lb_jint(w, "interval_ms"),
           lb_jbool(w, "adaptive") ? " (adapted to what it does)" : "");
    printf("  disks: %s\n", !strcmp(lb_jstr(w, "disk"), "none")
                                ? "not copied; they must be reachable from there, and are not rolled back"
                                : "copied there, then kept the same epoch by epoch");
    printf("  when this host is silent for %lld ms: ", (long long)lb_jint(w, "lease_ms"));
    if (!strcmp(witness, "manual")) {
        puts("nothing, until somebody says `lifeboat failover` there");
    } else {
        printf("it takes over, if %s ",
               !strncmp(witness, "fence:", 6) ? "this host was cut off by" : "it is allowed to by");
        lb_print_text(stdout, strchr(witness, ':') ? strchr(witness, ':') + 1 : witness);
        putchar('\n');
    }
    json_array_foreach (json_object_get(w, "backups"), i, b) {
        const char *other = json_string_value(b);

        if (!other || !strcmp(other, host))
            continue;
        fputs(more ? ", " : "  when that host is lost: ", stdout);
        lb_print_text(stdout, other);
        more = true;
    }
    if (more)
        putchar('\n');
    else if (!json_array_size(json_object_get(w, "backups")))
        puts("  when that host is lost: any other trusted one");
    fflush(stdout);
}

static void progress(struct view *v, const json_t *p)
{
    const char *state = lb_jstr(p, "state"), *note = lb_jstr(p, "note");
    char text[300], wire[32];

    v->percent = LB_MAX(v->percent, LB_MIN(lb_jnum(p, "percent"), 100.0));
    if (note[0] && strcmp(note, v->note)) {
        wipe(v);
        fputs("  ", stdout);
        lb_print_text(stdout, note);
        putchar('\n');
        snprintf(v->note, sizeof(v->note), "%s", note);
    }
    snprintf(text, sizeof(text), "%s  %s/s", state,
             lb_human_bytes(wire, sizeof(wire), lb_jnum(p, "wire_bytes_per_s")));
    if (v->tty) {
        lb_draw_bar(v->percent, text);
        v->drawn = true;
    } else if (strcmp(state, v->state)) {
        printf("%3.0f%%  %s\n", v->percent, text);
        fflush(stdout);
    }
    snprintf(v->state, sizeof(v->state), "%s", state);
}

static void host_failed(struct view *v, const json_t *ev)
{
    wipe(v);
    fflush(stdout);
    fprintf(stderr, "lifeboat: warning: host %s: ", lb_jstr(ev, "host"));
    lb_print_text(stderr, lb_jstr(ev, "message"));
    fputs("; the next one is tried\n", stderr);
    v->percent = 0;
}

static bool on_event(const json_t *ev, const char *text, void *arg)
{
    struct view *v = arg;
    const char *kind = lb_jstr(ev, "event");

    if (v->cli->json) {
        if (v->progress_json) {
            puts(text);
            fflush(stdout);
        }
    } else if (!v->quiet) {
        if (!strcmp(kind, "started")) {
            announce(v, ev);
        } else if (!strcmp(kind, "preflight")) {
            wipe(v);
            lb_print_preflight(json_object_get(ev, "checks"), false);
        } else if (!strcmp(kind, "host-failed")) {
            host_failed(v, ev);
        } else if (!strcmp(kind, "protect")) {
            progress(v, ev);
        }
    }
    return !(v->detach && !strcmp(kind, "started"));
}

static int detached(struct view *v)
{
    wipe(v);
    if (v->cli->json)
        printf("{\"vm\":\"%s\",\"detached\":true}\n", v->name);
    fprintf(stderr, "lifeboat: it goes on in the background: `lifeboat status %s` shows how far it is, "
                    "`lifeboat unprotect %s` ends it\n", v->name, v->name);
    return LB_EXIT_DETACHED;
}

static int request(struct view *v, Lb__RpcProtect *m)
{
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;
    struct lb_error err = LB_ERROR_INIT;
    int sigint_fd = lb_catch_sigint();
    json_t *o;

    r.kind_case = LB__RPC_REQUEST__KIND_PROTECT;
    r.protect = m;
    LB_AUTO_FREE char *text = lb_request(v->cli, &r, on_event, v, sigint_fd, &err);
    wipe(v);
    fflush(stdout);
    if (!text) {
        if (err.code == LB_E_CANCELLED && eventfd_read(sigint_fd, &(eventfd_t){0}) == 0)
            return detached(v);
        return lb_cli_fail(v->cli, &err);
    }
    if (v->cli->json) {
        puts(text);
        return 0;
    }
    o = json_loads(text, 0, NULL);
    if (v->detach)
        printf("protection of VM %s by host %s started, session %s\n", v->name, lb_jstr(o, "host"),
               lb_jstr(o, "session"));
    else if (!v->quiet)
        printf("VM %s is protected by host %s\n", v->name, lb_jstr(o, "host"));
    json_decref(o);
    return 0;
}

/* ------------------------------------------------------------------ arguments */

enum {
    OPT_BACKUP = 256, OPT_INTERVAL, OPT_ADAPTIVE, OPT_WITNESS, OPT_FENCE, OPT_MANUAL, OPT_DISK,
    OPT_LEASE, OPT_BANDWIDTH, OPT_DELTA_CACHE, OPT_CHANNELS, OPT_PLAINTEXT, OPT_WAIT, OPT_NO_WAIT,
    OPT_PROGRESS, OPT_TRANSPORT,
};

#define MAX_BACKUPS 16u /* LB_PROTECT_MAX_BACKUPS */

struct args {
    struct view *v;
    Lb__RpcProtect *m;
    char *backups[MAX_BACKUPS];
    char *witness;       /* as sent; owned */
    unsigned n_witness;  /* options that named one */
};

static void add_backups(struct args *a, char *list, struct argp_state *state)
{
    char *save = NULL;

    for (char *name = strtok_r(list, ",", &save); name; name = strtok_r(NULL, ",", &save)) {
        if (a->m->n_backups == MAX_BACKUPS)
            argp_error(state, "--backup: at most %u hosts", MAX_BACKUPS);
        a->backups[a->m->n_backups++] = name;
    }
    if (!a->m->n_backups)
        argp_error(state, "--backup takes names of hosts, separated by commas");
}

static void set_witness(struct args *a, const char *kind, const char *arg, struct argp_state *state)
{
    if (!arg[0])
        argp_error(state, "--fence takes a command");
    free(a->witness);
    a->witness = lb_asprintf("%s%s", kind, arg);
    if (a->n_witness++)
        argp_error(state, "only one of --witness, --fence and --manual can be given");
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct lb_error err = LB_ERROR_INIT;
    struct args *a = state->input;
    unsigned long n = 0;

    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = a->v->cli;
        return 0;
    case OPT_BACKUP:
        add_backups(a, arg, state);
        return 0;
    case OPT_INTERVAL:
        a->m->interval_ms = (uint32_t)lb_arg_duration(arg, 1, "--interval", state);
        if (a->m->interval_ms > 1000)
            argp_error(state, "--interval is from 1ms to 1s");
        return 0;
    case OPT_ADAPTIVE:
        a->m->adaptive = true;
        return 0;
    case OPT_WITNESS:
        if (strncmp(arg, "etcd:", 5) || !arg[5])
            argp_error(state, "--witness takes etcd:URL[,URL...]");
        set_witness(a, "", arg, state);
        return 0;
    case OPT_FENCE:
        set_witness(a, "fence:", arg, state);
        return 0;
    case OPT_MANUAL:
        set_witness(a, "", "manual", state);
        return 0;
    case OPT_DISK:
        a->m->disk = !strcmp(arg, "none");
        if (!a->m->disk && strcmp(arg, "replicate"))
            argp_error(state, "--disk takes replicate or none");
        return 0;
    case OPT_LEASE:
        a->m->lease_ms = (uint32_t)lb_arg_duration(arg, 1, "--lease", state);
        if (a->m->lease_ms < 50 || a->m->lease_ms > 60000)
            argp_error(state, "--lease is from 50ms to 60s");
        return 0;
    case OPT_BANDWIDTH:
        a->m->bandwidth_bytes_per_s = lb_arg_rate(arg, state);
        return 0;
    case OPT_DELTA_CACHE:
        if (lb_parse_size(arg, &a->m->delta_cache_bytes, &err))
            argp_error(state, "--delta-cache: %s; %s", err.message, err.remedy);
        return 0;
    case OPT_CHANNELS:
        if (!lb_arg_number(arg, 1, 64, &n))
            argp_error(state, "--channels takes a number from 1 to 64");
        a->m->channels = (uint32_t)n;
        return 0;
    case OPT_TRANSPORT:
        a->m->transport = lb_arg_transport(arg, state);
        return 0;
    case OPT_PLAINTEXT:
        a->m->insecure_plaintext = true;
        return 0;
    case OPT_WAIT:
        a->v->detach = false;
        return 0;
    case OPT_NO_WAIT:
        a->v->detach = true;
        return 0;
    case OPT_PROGRESS:
        a->v->progress_json = true;
        return 0;
    case 'q':
        a->v->quiet = true;
        return 0;
    case ARGP_KEY_ARG:
        if (a->m->name[0])
            argp_error(state, "unexpected argument \"%s\"", arg);
        a->m->name = arg;
        return 0;
    case ARGP_KEY_END:
        if (!a->m->name[0])
            argp_error(state, "NAME is missing");
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp_option options[] = {
    {"backup", OPT_BACKUP, "HOST[,HOST...]", 0,
     "Hosts that may hold the backup, the preferred one first (default: as configured, else any "
     "trusted one)", 0},
    {"interval", OPT_INTERVAL, "TIME", 0, "Length of an epoch, 1ms to 1s (default 25ms)", 0},
    {"adaptive", OPT_ADAPTIVE, NULL, 0, "Epochs shorter while output waits, longer while idle", 0},
    {"witness", OPT_WITNESS, "etcd:URL[,URL...]", 0, "An etcd decides who runs when a host is silent",
     1},
    {"fence", OPT_FENCE, "CMD", 0, "`CMD off HOST` cuts the other host off; it exits with 0 when that is "
                                   "certain", 1},
    {"manual", OPT_MANUAL, NULL, 0, "A person decides, by `lifeboat failover`", 1},
    {"disk", OPT_DISK, "HOW", 0, "replicate (default) or none: the disks are shared or do not matter", 0},
    {"lease", OPT_LEASE, "TIME", 0, "How long a silent host is waited for (default 150ms; with --fence 1s)", 0},
    {"bandwidth", OPT_BANDWIDTH, "RATE", 0, "At most this much, e.g. 1Gbit or 50MB", 0},
    {"delta-cache", OPT_DELTA_CACHE, "SIZE", 0,
     "Memory of this host for sending differences only (default: a quarter of the guest's)", 0},
    {"channels", OPT_CHANNELS, "N", 0, "Connections of the first copy (default: by the processors)", 0},
    {"transport", OPT_TRANSPORT, "HOW", 0,
     "auto (default: RDMA when both hosts have a device on a common network), tcp or rdma", 0},
    {"insecure-plaintext", OPT_PLAINTEXT, NULL, 0,
     "Send guest memory without encryption; for benchmarks only", 0},
    {"wait", OPT_WAIT, NULL, 0, "Return when the VM is protected (default)", 2},
    {"no-wait", OPT_NO_WAIT, NULL, 0, "Return when it has begun", 2},
    {"quiet", 'q', NULL, 0, "Print nothing but errors", 2},
    {"progress", OPT_PROGRESS, NULL, 0, "With --json: one line of JSON per event before the result", 2},
    {0},
};

static int run(struct lb_cli *cli, int argc, char **argv)
{
    static const struct argp_child children[] = {{&lb_json_argp, 0, NULL, 0}, {0}};
    const struct argp argp = {options, parse, lb_cmd_protect.args,
                              "Keep a standby of a running VM on another host, checkpoint by checkpoint, "
                              "so that nothing is lost when this host dies.\v"
                              "One of --witness, --fence and --manual is needed unless the host's "
                              "configuration names a witness. Ctrl-C only stops watching: `lifeboat "
                              "unprotect NAME` ends the protection.",
                              children, NULL, NULL};
    struct view v = {.cli = cli, .tty = isatty(STDOUT_FILENO)};
    Lb__RpcProtect m = LB__RPC_PROTECT__INIT;
    struct args a = {.v = &v, .m = &m};
    int rc;

    lb_parse("protect", &argp, 0, argc, argv, &a);
    m.backups = a.backups;
    if (a.witness)
        m.witness = a.witness;
    v.name = m.name;
    if (m.insecure_plaintext)
        fputs("lifeboat: warning: guest memory travels readable for anybody on the way\n", stderr);
    rc = request(&v, &m);
    free(a.witness);
    return rc;
}

const struct lb_cmd lb_cmd_protect = {"protect", "NAME", "Keep a standby of a VM on another host", run};
