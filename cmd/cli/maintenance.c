/* cmd/cli/maintenance.c - lifeboat maintenance on|off|status */
#include "cmd/cli/evacuate.h"

#include <string.h>

enum { OPT_BRING_BACK = 256, OPT_REASON, OPT_PARALLEL };

struct args {
    struct lb_cli *cli;
    Lb__RpcMaintenance *m;
};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct args *a = state->input;
    bool on = !strcmp(a->m->op, "on"), off = !strcmp(a->m->op, "off");

    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = a->cli;
        return 0;
    case OPT_BRING_BACK:
        a->m->bring_back = true;
        return 0;
    case OPT_REASON:
        a->m->reason = arg;
        return 0;
    case OPT_PARALLEL:
        a->m->parallel = lb_arg_parallel(arg, state);
        return 0;
    case ARGP_KEY_ARG:
        if (a->m->op[0] || (strcmp(arg, "on") && strcmp(arg, "off") && strcmp(arg, "status")))
            argp_error(state, "unexpected argument \"%s\": on, off or status", arg);
        a->m->op = arg;
        return 0;
    case ARGP_KEY_END:
        if (!a->m->op[0])
            argp_error(state, "on, off or status is needed");
        if ((a->m->bring_back || a->m->parallel) && !off)
            argp_error(state, "--bring-back and --parallel are for off");
        if (a->m->reason[0] && !on)
            argp_error(state, "--reason is for on");
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static void show(const json_t *o)
{
    const json_t *left = json_object_get(o, "left");
    char when[32];
    size_t i;
    json_t *vm;

    if (lb_jbool(o, "maintenance"))
        printf("maintenance mode is on: this host takes no VM, and is no backup for a new one\n");
    else
        printf("maintenance mode is off\n");
    if (lb_jbool(o, "maintenance") && lb_jnum(o, "since_ms") > 0) {
        printf("  since %s: ", lb_when(when, lb_jnum(o, "since_ms")));
        lb_print_text(stdout, lb_jstr(o, "reason")[0] ? lb_jstr(o, "reason") : "no reason given");
        putchar('\n');
    }
    json_array_foreach (left, i, vm) {
        fputs("  ", stdout);
        lb_print_text(stdout, lb_jstr(vm, "vm"));
        fputs(lb_jbool(vm, "suspended") ? ": suspended here" : " -> ", stdout);
        lb_print_text(stdout, lb_jbool(vm, "suspended") ? "" : lb_jstr(vm, "to"));
        puts(lb_jbool(vm, "protected") ? ", protected" : "");
    }
    if (json_array_size(left))
        puts("`lifeboat maintenance off --bring-back` brings them back");
}

static int run(struct lb_cli *cli, int argc, char **argv)
{
    static const struct argp_option options[] = {
        {"bring-back", OPT_BRING_BACK, NULL, 0, "off: bring the VMs back that left because of an evacuation", 0},
        {"parallel", OPT_PARALLEL, "auto|N", 0, "off --bring-back: so many at once (default auto)", 0},
        {"reason", OPT_REASON, "TEXT", 0, "on: what others are told that are refused", 0},
        {0},
    };
    static const struct argp_child children[] = {{&lb_json_argp, 0, NULL, 0}, {0}};
    const struct argp argp = {options, parse, lb_cmd_maintenance.args,
                              "In maintenance mode this host takes no VM and is no backup for a new one; what runs here runs on. "
                              "It survives a restart of the daemon and of the host. `lifeboat evacuate` begins it.",
                              children, NULL, NULL};
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;
    Lb__RpcMaintenance m = LB__RPC_MAINTENANCE__INIT;
    struct args a = {cli, &m};

    lb_parse("maintenance", &argp, 0, argc, argv, &a);
    r.kind_case = LB__RPC_REQUEST__KIND_MAINTENANCE;
    r.maintenance = &m;
    if (!m.bring_back)
        return lb_ask(cli, &r, show);
    return lb_evac_follow(cli, &r, NULL, NULL,
                          "they go on coming back: `lifeboat maintenance off --bring-back` watches it again, `lifeboat "
                          "maintenance status` lists those that are still away");
}

const struct lb_cmd lb_cmd_maintenance = {"maintenance", "on|off|status", "Let this host take no VM, and bring back those that left", run};
