/* cmd/cli/top.c - lifeboat top: what protects the VMs of this host, drawn again and again. */
#include "cmd/cli/cli.h"

#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define DEFAULT_INTERVAL_MS 1000u
#define NOTE_CHARS 60

struct args {
    struct lb_cli *cli;
    bool once;
    uint64_t interval_ms;
};

static void lease_cell(struct lb_table *t, const json_t *p)
{
    double left = lb_jnum(p, "lease_left_ms");

    if (json_object_get(p, "lease_left_ms") && left >= 0)
        lb_table_cell(t, "%.0f ms", left);
    else
        lb_table_cell(t, "%s", "");
}

/* Of the primary; a standby knows none of them. */
static void load_cells(struct lb_table *t, const json_t *p)
{
    char bytes[32];

    if (strcmp(lb_jstr(p, "role"), "primary") || !json_object_get(p, "epochs_per_s")) {
        for (int i = 0; i < 5; i++)
            lb_table_cell(t, "%s", "");
        return;
    }
    lb_table_cell(t, "%.1f/%.1f ms", lb_jnum(p, "pause_p50_ms"), lb_jnum(p, "pause_p99_ms"));
    lb_table_cell(t, "%.0f", lb_jnum(p, "dirty_pages"));
    lb_table_cell(t, "%s/s", lb_human_bytes(bytes, sizeof(bytes), lb_jnum(p, "wire_bytes_per_s")));
    lb_table_cell(t, "%.0f ms", lb_jnum(p, "lag_ms"));
    lb_table_cell(t, "%lld", (long long)lb_jint(p, "held_packets"));
}

static void row(struct lb_table *t, const json_t *p)
{
    const char *state = lb_jstr(p, "state");
    char text[64], disk[32];

    lb_table_cell(t, "%s", lb_jstr(p, "vm"));
    lb_table_cell(t, "%s", lb_jstr(p, "role"));
    lb_table_cell(t, "%s%s", !strcmp(state, "protected") ? state : lb_protect_state(p, text, sizeof(text)),
                  lb_jbool(p, "stretched") ? " (slow)" : "");
    lb_table_cell(t, "%s", lb_jstr(p, "host"));
    if (json_object_get(p, "epochs_per_s"))
        lb_table_cell(t, "%.1f", lb_jnum(p, "epochs_per_s"));
    else
        lb_table_cell(t, "%s", "");
    load_cells(t, p);
    lease_cell(t, p);
    if (lb_jnum(p, "disk_backlog_bytes") > 0)
        lb_table_cell(t, "%s", lb_human_bytes(disk, sizeof(disk), lb_jnum(p, "disk_backlog_bytes")));
    else
        lb_table_cell(t, "%s", "");
    lb_table_cell(t, "%.*s", NOTE_CHARS, lb_jstr(p, "note"));
}

static void show(const json_t *o)
{
    static const char *const heads[] = {"NAME", "ROLE", "STATE", "PEER", "EPOCH/s", "PAUSE p50/p99",
                                        "DIRTY", "WIRE", "LAG", "HELD", "LEASE", "DISK", "NOTE"};
    struct lb_table *t = lb_table_new(LB_ARRAY_LEN(heads), heads);
    size_t i;
    json_t *p;

    json_array_foreach (json_object_get(o, "protections"), i, p)
        row(t, p);
    lb_table_print(t);
}

/* The whole screen, without a flicker: over what is there, then the rest is wiped. */
static int live(struct lb_cli *cli, const Lb__RpcRequest *r, unsigned interval_ms)
{
    int rc = 0, sigint_fd = lb_catch_sigint();

    fputs("\033[2J\033[?7l", stdout); /* long lines are cut */
    while (!rc) {
        fputs("\033[H\033[J", stdout);
        rc = lb_ask(cli, r, show);
        fflush(stdout);
        if (!rc && lb_readable(sigint_fd, interval_ms))
            break;
    }
    fputs("\033[?7h", stdout);
    return rc;
}

enum { OPT_ONCE = 256, OPT_INTERVAL };

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct args *a = state->input;

    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = a->cli;
        return 0;
    case OPT_ONCE:
        a->once = true;
        return 0;
    case OPT_INTERVAL:
        a->interval_ms = lb_arg_duration(arg, 1000, "--interval", state);
        return 0;
    case ARGP_KEY_ARG:
        argp_error(state, "unexpected argument \"%s\"", arg);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static int run(struct lb_cli *cli, int argc, char **argv)
{
    static const struct argp_option options[] = {
        {"once", OPT_ONCE, NULL, 0, "Print one table and exit; so without a terminal, and with --json", 0},
        {"interval", OPT_INTERVAL, "TIME", 0, "Between two looks: seconds, or with a unit (default 1s)", 0},
        {0},
    };
    static const struct argp_child children[] = {{&lb_json_argp, 0, NULL, 0}, {0}};
    const struct argp argp = {options, parse, lb_cmd_top.args,
                              "Show the protections of this host live: of VMs that run here, and of "
                              "standbys. Ctrl-C ends it.",
                              children, NULL, NULL};
    struct args a = {.cli = cli, .interval_ms = DEFAULT_INTERVAL_MS};
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;
    Lb__RpcName m = LB__RPC_NAME__INIT;

    lb_parse("top", &argp, 0, argc, argv, &a);
    r.kind_case = LB__RPC_REQUEST__KIND_TOP;
    r.top = &m;
    if (a.once || cli->json || !isatty(STDOUT_FILENO))
        return lb_ask(cli, &r, show);
    return live(cli, &r, (unsigned)LB_MIN(a.interval_ms, UINT64_C(3600000)));
}

const struct lb_cmd lb_cmd_top = {"top", "", "Show protections live", run};
