/* cmd/cli/cancel.c - lifeboat cancel NAME */
#include "cmd/cli/cli.h"

static void show(const json_t *o)
{
    if (lb_jbool(o, "cancelled"))
        printf("migration of %s cancelled; the VM runs here\n", lb_jstr(o, "vm"));
    else
        printf("migration of %s had ended already: %s\n", lb_jstr(o, "vm"), lb_jstr(o, "message"));
}

static int run(struct lb_cli *cli, int argc, char **argv)
{
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;
    Lb__RpcName m = LB__RPC_NAME__INIT;
    struct lb_name_args a;

    lb_parse_name(cli, &lb_cmd_cancel,
                  "Stop a migration; the VM goes on here. Refused once the VM was handed over.", 0,
                  NULL, argc, argv, &a);
    m.name = (char *)a.name;
    r.kind_case = LB__RPC_REQUEST__KIND_CANCEL;
    r.cancel = &m;
    return lb_ask(cli, &r, show);
}

const struct lb_cmd lb_cmd_cancel = {"cancel", "NAME", "Stop a migration that is under way", run};
