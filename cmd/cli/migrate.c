/*
 * cmd/cli/migrate.c - lifeboat migrate NAME HOST
 *
 * The daemon streams events; on a terminal they become one line that is drawn over and
 * over, elsewhere one line per change of state. Ctrl-C lets go of the migration,
 * it does not stop it: it belongs to the daemon.
 */
#include "cmd/cli/cli.h"

#include <math.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

struct view {
    struct lb_cli *cli;
    const Lb__RpcMigrate *m;
    bool quiet, detach, progress_json, tty;
    double percent;        /* never goes down */
    char state[32], note[200];
    json_int_t round;
    bool drawn;            /* a live line stands on the terminal */
    bool warned;
};

static void wipe(struct view *v)
{
    if (v->drawn)
        fputs("\r\033[K", stdout);
    v->drawn = false;
}

/* "pre-copy 2  78.0 MiB/s  dirty 20.0 MiB/s  ETA 3 s  pause 22 ms  300.0 MiB sent  converges":
 * a narrow terminal loses the end. */
static void numbers(const json_t *p, char *buf, size_t n)
{
    const json_t *eta = json_object_get(p, "eta_s"), *conv = json_object_get(p, "converges");
    char h[32], round[24] = "", rates[48] = "", dirty[48] = "", etas[32] = "", pause[48] = "", sent[48] = "";

    /* A rate that is hardly measured yet makes years of it. */
    if (json_is_number(eta) && json_number_value(eta) < 864000 && strcmp(lb_jstr(p, "state"), "done"))
        snprintf(etas, sizeof(etas), "  ETA %.0f s", ceil(json_number_value(eta)));
    if (lb_jnum(p, "predicted_downtime_ms") > 0)
        snprintf(pause, sizeof(pause), "  pause %.0f ms", lb_jnum(p, "predicted_downtime_ms"));
    /* What there is none of yet is not said. */
    if (lb_jnum(p, "throughput_bytes_per_s") > 0)
        snprintf(rates, sizeof(rates), "  %s/s", lb_human_bytes(h, sizeof(h), lb_jnum(p, "throughput_bytes_per_s")));
    if (lb_jnum(p, "dirty_rate_bytes_per_s") > 0)
        snprintf(dirty, sizeof(dirty), "  dirty %s/s", lb_human_bytes(h, sizeof(h), lb_jnum(p, "dirty_rate_bytes_per_s")));
    if (lb_jnum(p, "sent_bytes") > 0) {
        snprintf(round, sizeof(round), " %lld", (long long)lb_jint(p, "round"));
        snprintf(sent, sizeof(sent), "  %s sent", lb_human_bytes(h, sizeof(h), lb_jnum(p, "sent_bytes")));
    }
    snprintf(buf, n, "%s%s%s%s%s%s%s%s", lb_jstr(p, "state"), round, rates, dirty, etas, pause, sent,
             json_is_true(conv)    ? "  converges"
             : json_is_false(conv) ? "  does not converge yet"
                                   : "");
}

static void draw(struct view *v, const json_t *p)
{
    char text[400];

    numbers(p, text, sizeof(text));
    lb_draw_bar(v->percent, text);
    v->drawn = true;
}

static void progress(struct view *v, const json_t *p)
{
    const char *state = lb_jstr(p, "state"), *note = lb_jstr(p, "note");
    bool change = strcmp(state, v->state) || lb_jint(p, "round") != v->round;

    if (lb_jnum(p, "percent") > v->percent)
        v->percent = LB_MIN(lb_jnum(p, "percent"), 100.0);
    if (note[0] && strcmp(note, v->note)) {
        wipe(v);
        printf("  ");
        lb_print_text(stdout, note);
        putchar('\n');
        snprintf(v->note, sizeof(v->note), "%s", note);
    }
    if (json_is_false(json_object_get(p, "converges")) && !v->warned) {
        wipe(v);
        fflush(stdout);
        fprintf(stderr, "lifeboat: warning: at present the guest writes faster than the link "
                        "carries; steps against it follow\n");
        v->warned = true;
    }
    snprintf(v->state, sizeof(v->state), "%s", state);
    v->round = lb_jint(p, "round");
    if (v->tty) {
        draw(v, p);
    } else if (change) {
        char text[400];

        numbers(p, text, sizeof(text));
        printf("%3.0f%%  %s\n", floor(v->percent), text);
        fflush(stdout);
    }
}

static void preflight(struct view *v, const json_t *ev)
{
    wipe(v);
    lb_print_preflight(json_object_get(ev, "checks"), v->m->options->dry_run);
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
        if (!strcmp(kind, "preflight"))
            preflight(v, ev);
        else if (!strcmp(kind, "progress"))
            progress(v, ev);
    }
    return !(v->detach && !strcmp(kind, "started"));
}

static void show_result(struct view *v, const json_t *o)
{
    char total[32], down[32], sent[32];

    wipe(v);
    if (v->m->options->dry_run) {
        printf("VM %s can move to host %s (nothing was changed)\n", v->m->name, v->m->host);
        return;
    }
    if (lb_jbool(o, "promoted") || lb_jbool(o, "already")) {
        printf("VM %s runs on host %s, which was its backup and has taken it over\n", v->m->name, v->m->host);
        return;
    }
    printf("VM %s runs on host %s: %s in all, %s downtime, %lld rounds, %s sent%s\n", v->m->name,
           v->m->host, lb_span(total, sizeof(total), lb_jnum(o, "total_ms")),
           lb_span(down, sizeof(down), lb_jnum(o, "downtime_ms")), (long long)lb_jint(o, "rounds"),
           lb_human_bytes(sent, sizeof(sent), lb_jnum(o, "wire_bytes")),
           lb_jstr(o, "digest")[0] ? ", memory verified" : "");
}

static int detached(struct view *v)
{
    wipe(v);
    if (v->cli->json)
        printf("{\"vm\":\"%s\",\"host\":\"%s\",\"detached\":true}\n", v->m->name, v->m->host);
    fprintf(stderr, "lifeboat: the migration of %s goes on in the background: `lifeboat status %s` "
                    "shows it, `lifeboat cancel %s` stops it\n", v->m->name, v->m->name,
            v->m->name);
    return LB_EXIT_DETACHED;
}

int lb_migrate_request(struct lb_cli *cli, const Lb__RpcMigrate *m, bool quiet, bool detach,
                       bool progress_json)
{
    struct view v = {.cli = cli, .m = m, .quiet = quiet, .detach = detach,
                     .progress_json = progress_json, .tty = isatty(STDOUT_FILENO), .round = -1};
    int sigint_fd = m->options->dry_run ? -1 : lb_catch_sigint();
    struct lb_error err = LB_ERROR_INIT;
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;
    json_t *o;

    r.kind_case = LB__RPC_REQUEST__KIND_MIGRATE;
    r.migrate = (Lb__RpcMigrate *)m;
    LB_AUTO_FREE char *text = lb_request(cli, &r, on_event, &v, sigint_fd, &err);
    if (!text) {
        wipe(&v);
        fflush(stdout);
        if (err.code == LB_E_CANCELLED && eventfd_read(sigint_fd, &(eventfd_t){0}) == 0)
            return detached(&v);
        return lb_cli_fail(cli, &err);
    }
    if (cli->json) {
        puts(text);
        return 0;
    }
    o = json_loads(text, 0, NULL);
    if (detach)
        printf("migration of %s to %s started, session %s\n", m->name, m->host,
               lb_jstr(o, "session"));
    else if (!quiet)
        show_result(&v, o);
    json_decref(o);
    return 0;
}

/* ------------------------------------------------------------------- arguments */

enum {
    OPT_BANDWIDTH = 256, OPT_DOWNTIME, OPT_CHANNELS, OPT_COMPRESS, OPT_VERIFY, OPT_TIMEOUT,
    OPT_DRY_RUN, OPT_PLAINTEXT, OPT_NO_THROTTLE, OPT_DETACH, OPT_PROGRESS,
    OPT_TRANSPORT, OPT_TRUSTED,
};

struct args {
    struct lb_cli *cli;
    char *name, *host;
    Lb__MigrateOptions *o;
    bool quiet, detach, progress;
};

static void set_compress(struct args *a, const char *arg, struct argp_state *state)
{
    unsigned long level = 0;

    if (!strcmp(arg, "auto"))
        a->o->compress = 0;
    else if (!strcmp(arg, "off"))
        a->o->compress = 1;
    else if (!strcmp(arg, "zstd") || (!strncmp(arg, "zstd:", 5) && lb_arg_number(arg + 5, 1, 19, &level)))
        a->o->compress = 2;
    else
        argp_error(state, "--compress takes auto, off, zstd or zstd:LEVEL with LEVEL from 1 to 19");
    a->o->zstd_level = (int32_t)level;
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct args *a = state->input;
    unsigned long n = 0;

    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = a->cli;
        return 0;
    case OPT_BANDWIDTH:
        a->o->bandwidth_bytes_per_s = lb_arg_rate(arg, state);
        return 0;
    case OPT_DOWNTIME:
        a->o->max_downtime_ms = (uint32_t)lb_arg_duration(arg, 1, "--max-downtime", state);
        return 0;
    case OPT_CHANNELS:
        if (!lb_arg_number(arg, 1, 64, &n))
            argp_error(state, "--channels takes a number from 1 to 64");
        a->o->channels = (uint32_t)n;
        return 0;
    case OPT_COMPRESS:
        set_compress(a, arg, state);
        return 0;
    case OPT_VERIFY:
        a->o->verify = true;
        return 0;
    case OPT_TIMEOUT:
        a->o->timeout_ms = lb_arg_duration(arg, 1000, "--timeout", state);
        return 0;
    case OPT_DRY_RUN:
        a->o->dry_run = true;
        return 0;
    case OPT_PLAINTEXT:
        a->o->insecure_plaintext = true;
        return 0;
    case OPT_TRANSPORT:
        a->o->transport = lb_arg_transport(arg, state);
        return 0;
    case OPT_TRUSTED:
        a->o->trusted_fabric = true;
        return 0;
    case OPT_NO_THROTTLE:
        a->o->no_throttle = true;
        return 0;
    case 'q':
        a->quiet = true;
        return 0;
    case OPT_DETACH:
        a->detach = true;
        return 0;
    case OPT_PROGRESS:
        a->progress = true;
        return 0;
    case ARGP_KEY_ARG:
        lb_arg_word(arg, state, &a->name, &a->host);
        return 0;
    case ARGP_KEY_END:
        if (!a->host)
            argp_error(state, "NAME and HOST are needed");
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static int run(struct lb_cli *cli, int argc, char **argv)
{
    static const struct argp_option options[] = {
        {"bandwidth", OPT_BANDWIDTH, "RATE", 0, "At most this much, e.g. 1Gbit or 50MB", 0},
        {"max-downtime", OPT_DOWNTIME, "MS", 0, "Longest pause allowed (default 300); the aim is 30 ms or less", 0},
        {"channels", OPT_CHANNELS, "N", 0, "Connections side by side (default: by the processors)",
         0},
        {"compress", OPT_COMPRESS, "HOW", 0,
         "auto (default: where it makes the migration faster), off, zstd or zstd:LEVEL", 0},
        {"verify", OPT_VERIFY, NULL, 0,
         "Compare a digest of all memory on both hosts before the hand-over", 0},
        {"timeout", OPT_TIMEOUT, "TIME", 0,
         "Give up after this (the VM goes on here): seconds, or with a unit", 0},
        {"dry-run", OPT_DRY_RUN, NULL, 0, "Only check, as `lifeboat preflight`", 0},
        {"no-throttle", OPT_NO_THROTTLE, NULL, 0, "Never slow the guest to let it converge", 0},
        {"transport", OPT_TRANSPORT, "HOW", 0,
         "auto (default: RDMA when both hosts have a device on a common network), tcp or rdma", 0},
        {"trusted-fabric", OPT_TRUSTED, NULL, 0,
         "With RDMA: write guest memory straight into the other host's, unencrypted", 0},
        {"insecure-plaintext", OPT_PLAINTEXT, NULL, 0,
         "Send guest memory without encryption; for benchmarks only", 0},
        {"quiet", 'q', NULL, 0, "Print nothing but errors", 1},
        {"detach", OPT_DETACH, NULL, 0, "Return when the migration has started", 1},
        {"progress", OPT_PROGRESS, NULL, 0, "With --json: one line of JSON per event before the result",
         1},
        {0},
    };
    static const struct argp_child children[] = {{&lb_json_argp, 0, NULL, 0}, {0}};
    const struct argp argp = {options, parse, lb_cmd_migrate.args,
                              "Move a running VM to a trusted host.\v"
                              "Ctrl-C only stops watching: `lifeboat cancel NAME` stops the migration.",
                              children, NULL, NULL};
    Lb__MigrateOptions o = LB__MIGRATE_OPTIONS__INIT;
    Lb__RpcMigrate m = LB__RPC_MIGRATE__INIT;
    struct args a = {.cli = cli, .o = &o};

    o.compress = LB_RPC_COMPRESS_CONFIGURED;
    lb_parse("migrate", &argp, 0, argc, argv, &a);
    m.name = a.name;
    m.host = a.host;
    m.options = &o;
    if (o.insecure_plaintext)
        fputs("lifeboat: warning: guest memory travels readable for anybody on the way\n", stderr);
    return lb_migrate_request(cli, &m, a.quiet, a.detach, a.progress);
}

const struct lb_cmd lb_cmd_migrate = {"migrate", "NAME HOST", "Move a running VM to another host",
                                      run};
