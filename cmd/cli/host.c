/* cmd/cli/host.c - lifeboat host id|trust|ls|forget */
#include "cmd/cli/cli.h"

#include <string.h>
#include <unistd.h>

/* ------------------------------------------------------------------------- id */

static void show_id(const json_t *o)
{
    const char *listen = lb_jstr(o, "listen"), *name = lb_jstr(o, "name");
    const char *colon = strrchr(listen, ':');
    bool any = !colon || colon == listen || !strncmp(listen, "0.0.0.0", 7) ||
               !strncmp(listen, "[::]", 4);
    bool default_port = !colon || !strcmp(colon, ":7007");

    printf("%s\n", lb_jstr(o, "key"));
    fprintf(stderr, "\nOn the other host type:\n  lifeboat host trust %s %s", name,
            lb_jstr(o, "key"));
    if (!strcmp(listen, "none"))
        fprintf(stderr, "\n(this host accepts no connections: --listen none)\n");
    else if (any)
        fprintf(stderr, " %s%s\n", name, default_port ? "" : colon);
    else
        fprintf(stderr, " %s\n", listen);
}

static const struct lb_cmd cmd_id = {"host id", "", "", NULL};

static int run_id(struct lb_cli *cli, int argc, char **argv)
{
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;
    Lb__RpcName m = LB__RPC_NAME__INIT;
    struct lb_name_args a;

    lb_parse_name(cli, &cmd_id,
                  "Print the public key of this host (standard output) and what to type on the "
                  "other host (standard error).",
                  LB_NAME_NONE, NULL, argc, argv, &a);
    r.kind_case = LB__RPC_REQUEST__KIND_HOST_ID;
    r.host_id = &m;
    return lb_ask(cli, &r, show_id);
}

/* ---------------------------------------------------------------------- trust */

struct trust_args {
    struct lb_cli *cli;
    char *v[3];
    unsigned n;
};

static error_t parse_trust(int key, char *arg, struct argp_state *state)
{
    struct trust_args *a = state->input;

    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = a->cli;
        return 0;
    case ARGP_KEY_ARG:
        if (a->n == 3)
            argp_error(state, "unexpected argument \"%s\"", arg);
        a->v[a->n++] = arg;
        return 0;
    case ARGP_KEY_END:
        if (a->n < 2)
            argp_error(state, "NAME and KEY are needed");
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static void show_trust(const json_t *o)
{
    const char *address = lb_jstr(o, "address");

    printf("host %s is trusted%s%s\n", lb_jstr(o, "name"), address[0] ? ", address " : "", address);
    if (!address[0])
        printf("it may send VMs here; to send VMs there, repeat this with its ADDRESS\n");
}

static bool looks_like_key(const char *s)
{
    return !strncmp(s, "lb1", 3) && strlen(s) > 40;
}

static int run_trust(struct lb_cli *cli, int argc, char **argv)
{
    static const struct argp_child children[] = {{&lb_json_argp, 0, NULL, 0}, {0}};
    const struct argp argp = {NULL, parse_trust, "NAME KEY [ADDRESS]",
                              "Trust the host with this key, under a name of your choice. VMs can "
                              "be sent to a host only when it trusts this one too.\v"
                              "KEY is what `lifeboat host id` prints there; ADDRESS is HOST or "
                              "HOST:PORT. NAME ADDRESS KEY is accepted too.",
                              children, NULL, NULL};
    struct trust_args a = {.cli = cli};
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;
    Lb__RpcHostTrust m = LB__RPC_HOST_TRUST__INIT;
    bool swapped;

    lb_parse("host trust", &argp, 0, argc, argv, &a);
    swapped = a.n == 3 && looks_like_key(a.v[2]) && !looks_like_key(a.v[1]);
    m.name = a.v[0];
    m.key = swapped ? a.v[2] : a.v[1];
    m.address = a.n < 3 ? (char *)"" : swapped ? a.v[1] : a.v[2];
    r.kind_case = LB__RPC_REQUEST__KIND_HOST_TRUST;
    r.host_trust = &m;
    return lb_ask(cli, &r, show_trust);
}

/* ------------------------------------------------------------------ ls, forget */

static void show_ls(const json_t *o)
{
    static const char *const heads[] = {"NAME", "ADDRESS", "KEY"};
    struct lb_table *t = lb_table_new(LB_ARRAY_LEN(heads), heads);
    size_t i;
    json_t *h;

    json_array_foreach (json_object_get(o, "hosts"), i, h) {
        lb_table_cell(t, "%s", lb_jstr(h, "name"));
        lb_table_cell(t, "%s", lb_jstr(h, "address"));
        lb_table_cell(t, "%s", lb_jstr(h, "key"));
    }
    lb_table_print(t);
}

static const struct lb_cmd cmd_ls = {"host ls", "", "", NULL};

static int run_ls(struct lb_cli *cli, int argc, char **argv)
{
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;
    Lb__RpcName m = LB__RPC_NAME__INIT;
    struct lb_name_args a;

    lb_parse_name(cli, &cmd_ls, "List the hosts that are trusted here.", LB_NAME_NONE, NULL, argc,
                  argv, &a);
    r.kind_case = LB__RPC_REQUEST__KIND_HOST_LS;
    r.host_ls = &m;
    return lb_ask(cli, &r, show_ls);
}

static void show_forget(const json_t *o)
{
    printf("host %s is no longer trusted\n", lb_jstr(o, "name"));
}

static const struct lb_cmd cmd_forget = {"host forget", "NAME", "", NULL};

static int run_forget(struct lb_cli *cli, int argc, char **argv)
{
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;
    Lb__RpcName m = LB__RPC_NAME__INIT;
    struct lb_name_args a;

    lb_parse_name(cli, &cmd_forget, "Trust a host no longer. Sessions under way go on.",
                  LB_NAME_FORCE, "Also when it is needed to decide about a VM", argc, argv, &a);
    m.name = (char *)a.name;
    m.force = a.force;
    r.kind_case = LB__RPC_REQUEST__KIND_HOST_FORGET;
    r.host_forget = &m;
    return lb_ask(cli, &r, show_forget);
}

/* ----------------------------------------------------------------------- host */

struct host_args {
    struct lb_cli *cli;
    int at;
};

static error_t parse_host(int key, char *arg, struct argp_state *state)
{
    struct host_args *a = state->input;

    (void)arg;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = a->cli;
        return 0;
    case ARGP_KEY_ARG:
        a->at = state->next - 1;
        state->next = state->argc;
        return 0;
    case ARGP_KEY_NO_ARGS:
        argp_error(state, "one of id, trust, ls, forget is needed");
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static int run(struct lb_cli *cli, int argc, char **argv)
{
    static const struct {
        const char *name;
        int (*run)(struct lb_cli *, int, char **);
    } subs[] = {{"id", run_id}, {"trust", run_trust}, {"ls", run_ls}, {"forget", run_forget}};
    static const struct argp_child children[] = {{&lb_json_argp, 0, NULL, 0}, {0}};
    const struct argp argp = {NULL, parse_host, "id\ntrust NAME KEY [ADDRESS]\nls\nforget NAME",
                              "Keys and trust between hosts.\v"
                              "`lifeboat host SUBCOMMAND --help` explains one.",
                              children, NULL, NULL};
    struct host_args a = {.cli = cli};
    struct lb_error err = LB_ERROR_INIT;

    lb_parse("host", &argp, ARGP_IN_ORDER, argc, argv, &a);
    for (size_t i = 0; i < LB_ARRAY_LEN(subs); i++)
        if (!strcmp(argv[a.at], subs[i].name))
            return subs[i].run(cli, argc - a.at, argv + a.at);
    lb_fail(&err, LB_E_USAGE, "there is no subcommand \"host %.60s\"", argv[a.at]);
    lb_remedy(&err, "one of: lifeboat host id, trust, ls, forget");
    return lb_cli_fail(cli, &err);
}

const struct lb_cmd lb_cmd_host = {"host", "id|trust|ls|forget", "Keys and trust between hosts",
                                   run};
