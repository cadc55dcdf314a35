/* cmd/cli/preflight.c - lifeboat preflight NAME HOST: would it move? Nothing is touched. */
#include "cmd/cli/cli.h"

struct args {
    struct lb_cli *cli;
    char *name, *host;
};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct args *a = state->input;

    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = a->cli;
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
    static const struct argp_child children[] = {{&lb_json_argp, 0, NULL, 0}, {0}};
    const struct argp argp = {NULL, parse, lb_cmd_preflight.args,
                              "Check whether a VM can move to a host, without touching anything: "
                              "the same checks that every migration begins with.",
                              children, NULL, NULL};
    struct args a = {.cli = cli};
    Lb__MigrateOptions o = LB__MIGRATE_OPTIONS__INIT;
    Lb__RpcMigrate m = LB__RPC_MIGRATE__INIT;

    lb_parse("preflight", &argp, 0, argc, argv, &a);
    o.dry_run = true;
    o.compress = LB_RPC_COMPRESS_CONFIGURED;
    m.name = a.name;
    m.host = a.host;
    m.options = &o;
    m.preflight_only = true;
    return lb_migrate_request(cli, &m, false, false, false);
}

const struct lb_cmd lb_cmd_preflight = {"preflight", "NAME HOST",
                                        "Check whether a VM can move to a host", run};
