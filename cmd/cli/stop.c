/* cmd/cli/stop.c - lifeboat stop NAME */
#include "cmd/cli/cli.h"

static void show(const json_t *o)
{
    printf("VM %s %s\n", lb_jstr(o, "name"), lb_jbool(o, "forced") ? "killed" : "stopped");
}

static int run(struct lb_cli *cli, int argc, char **argv)
{
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;
    Lb__RpcName m = LB__RPC_NAME__INIT;
    struct lb_name_args a;

    lb_parse_name(cli, &lb_cmd_stop,
                  "End a VM for good: the hypervisor is told to quit, which is to the guest like "
                  "pulling the plug. Shut the guest down from inside first where that matters.",
                  LB_NAME_FORCE, "Kill the process instead of asking it to quit", argc, argv, &a);
    m.name = (char *)a.name;
    m.force = a.force;
    r.kind_case = LB__RPC_REQUEST__KIND_STOP;
    r.stop = &m;
    return lb_ask(cli, &r, show);
}

const struct lb_cmd lb_cmd_stop = {"stop", "NAME", "End a VM", run};
