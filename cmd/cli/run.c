/* cmd/cli/run.c - lifeboat run NAME -- COMMAND... */
#include "cmd/cli/cli.h"

#include <unistd.h>

struct args {
    struct lb_cli *cli;
    char *name;
    char **argv;
    int argc;
};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct args *a = state->input;

    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = a->cli;
        return 0;
    case ARGP_KEY_ARG:
        if (!a->name) {
            a->name = arg;
            return 0;
        }
        /* From here on everything is the hypervisor's, dashes or not. */
        a->argv = state->argv + state->next - 1;
        a->argc = state->argc - state->next + 1;
        state->next = state->argc;
        return 0;
    case ARGP_KEY_END:
        if (!a->name)
            argp_error(state, "NAME is missing");
        if (!a->argc)
            argp_error(state, "the command of the hypervisor is missing");
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static void show(const json_t *o)
{
    lb_print_each(o, "warnings", "lifeboat: warning: ");
    printf("VM %s runs, process %lld\n", lb_jstr(o, "name"), (long long)lb_jint(o, "pid"));
}

static int run(struct lb_cli *cli, int argc, char **argv)
{
    static const struct argp_child children[] = {{&lb_json_argp, 0, NULL, 0}, {0}};
    const struct argp argp = {NULL, parse, lb_cmd_run.args,
                              "Start a VM under Lifeboat: the command is run detached, with a "
                              "control socket of Lifeboat's own added.",
                              children, NULL, NULL};
    struct args a = {.cli = cli};
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;
    Lb__RpcRun m = LB__RPC_RUN__INIT;

    lb_parse("run", &argp, ARGP_IN_ORDER, argc, argv, &a);
    LB_AUTO_FREE char *cwd = realpath(".", NULL);
    m.name = a.name;
    m.argv = a.argv;
    m.n_argv = (size_t)a.argc;
    m.cwd = cwd ? cwd : (char *)"/";
    r.kind_case = LB__RPC_REQUEST__KIND_RUN;
    r.run = &m;
    return lb_ask(cli, &r, show);
}

const struct lb_cmd lb_cmd_run = {"run", "NAME -- COMMAND [ARGUMENTS...]", "Start a VM", run};
