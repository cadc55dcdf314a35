/* cmd/cli/adopt.c - lifeboat adopt NAME --pid PID [--qmp SOCKET] */
#include "cmd/cli/cli.h"

#include <limits.h>

enum { OPT_PID = 256, OPT_QMP };

struct args {
    struct lb_cli *cli;
    char *name;
    char *qmp;
    int pid;
};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct args *a = state->input;
    char *end;
    long pid;

    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = a->cli;
        return 0;
    case OPT_PID:
        pid = strtol(arg, &end, 10);
        if (end == arg || *end || pid < 1 || pid > INT_MAX)
            argp_error(state, "\"%s\" is not a process number", arg);
        a->pid = (int)pid;
        return 0;
    case OPT_QMP:
        a->qmp = arg;
        return 0;
    case ARGP_KEY_ARG:
        lb_arg_word(arg, state, &a->name, NULL);
        return 0;
    case ARGP_KEY_END:
        if (!a->name)
            argp_error(state, "NAME is missing");
        if (!a->pid)
            argp_error(state, "--pid is missing");
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static void show(const json_t *o)
{
    lb_print_each(o, "warnings", "lifeboat: warning: this VM cannot be migrated as it is: ");
    lb_print_each(o, "damages", "lifeboat: WARNING: ");
    printf("VM %s adopted, process %lld\n", lb_jstr(o, "name"), (long long)lb_jint(o, "pid"));
}

static int run(struct lb_cli *cli, int argc, char **argv)
{
    static const struct argp_option options[] = {
        {"pid", OPT_PID, "PID", 0, "Process of the hypervisor", 0},
        {"qmp", OPT_QMP, "SOCKET", 0,
         "QMP socket for Lifeboat's own use (default: a free one of its command line)", 0},
        {0},
    };
    static const struct argp_child children[] = {{&lb_json_argp, 0, NULL, 0}, {0}};
    const struct argp argp = {options, parse, lb_cmd_adopt.args,
                              "Take over a VM that was started by other means, while it runs.",
                              children, NULL, NULL};
    struct args a = {.cli = cli};
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;
    Lb__RpcAdopt m = LB__RPC_ADOPT__INIT;

    lb_parse("adopt", &argp, 0, argc, argv, &a);
    LB_AUTO_FREE char *qmp = a.qmp ? realpath(a.qmp, NULL) : NULL;
    m.name = a.name;
    m.pid = a.pid;
    m.qmp = qmp ? qmp : a.qmp ? a.qmp : (char *)"";
    r.kind_case = LB__RPC_REQUEST__KIND_ADOPT;
    r.adopt = &m;
    return lb_ask(cli, &r, show);
}

const struct lb_cmd lb_cmd_adopt = {"adopt", "NAME --pid PID", "Take over a running VM", run};
