/* cmd/cli/cancel.c - lifeboat cancel NAME|--evacuation */
#include "cmd/cli/cli.h"

#include "cmd/cli/evac_view.h"

enum { OPT_EVACUATION = 256 };

struct args {
    struct lb_cli *cli;
    char *name;
    bool evacuation;
};

static void show(const json_t *o)
{
    if (lb_jbool(o, "cancelled"))
        printf("migration of %s cancelled; the VM runs here\n", lb_jstr(o, "vm"));
    else
        printf("migration of %s had ended already: %s\n", lb_jstr(o, "vm"), lb_jstr(o, "message"));
}

static void show_evacuation(const json_t *o)
{
    struct lb_evac_view *v = lb_evac_view_new(stdout, false, false);

    lb_evac_view_result(v, o);
    lb_evac_view_free(v);
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct args *a = state->input;

    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = a->cli;
        return 0;
    case OPT_EVACUATION:
        a->evacuation = true;
        return 0;
    case ARGP_KEY_ARG:
        lb_arg_word(arg, state, &a->name, NULL);
        return 0;
    case ARGP_KEY_END:
        if (!a->name == !a->evacuation)
            argp_error(state, "NAME or --evacuation is needed");
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static int run(struct lb_cli *cli, int argc, char **argv)
{
    static const struct argp_option options[] = {
        {"evacuation", OPT_EVACUATION, NULL, 0, "The evacuation of this host: what has not been handed over goes on here", 0},
        {0},
    };
    static const struct argp_child children[] = {{&lb_json_argp, 0, NULL, 0}, {0}};
    const struct argp argp = {options, parse, lb_cmd_cancel.args,
                              "Stop a migration; the VM goes on here. Refused once the VM was handed over.", children, NULL, NULL};
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;
    Lb__RpcName m = LB__RPC_NAME__INIT;
    Lb__RpcEvacuate e = LB__RPC_EVACUATE__INIT;
    struct args a = {.cli = cli};

    lb_parse("cancel", &argp, 0, argc, argv, &a);
    if (a.evacuation) {
        e.op = "cancel";
        r.kind_case = LB__RPC_REQUEST__KIND_EVACUATE;
        r.evacuate = &e;
        return lb_ask(cli, &r, show_evacuation);
    }
    m.name = a.name;
    r.kind_case = LB__RPC_REQUEST__KIND_CANCEL;
    r.cancel = &m;
    return lb_ask(cli, &r, show);
}

const struct lb_cmd lb_cmd_cancel = {"cancel", "NAME|--evacuation", "Stop a migration, or an evacuation", run};
