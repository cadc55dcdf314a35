/* cmd/cli/show.c - lifeboat show NAME: all that is known, JSON for people too */
#include "cmd/cli/cli.h"

static void show(const json_t *o)
{
    LB_AUTO_FREE char *text = json_dumps(o, JSON_INDENT(2) | JSON_REAL_PRECISION(12));

    puts(text ? text : "{}");
}

static int run(struct lb_cli *cli, int argc, char **argv)
{
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;
    Lb__RpcName m = LB__RPC_NAME__INIT;
    struct lb_name_args a;

    lb_parse_name(cli, &lb_cmd_show,
                  "Show everything about a VM: machine, command line, disks, CPU features and what "
                  "hinders a migration.",
                  0, NULL, argc, argv, &a);
    m.name = (char *)a.name;
    r.kind_case = LB__RPC_REQUEST__KIND_SHOW;
    r.show = &m;
    return lb_ask(cli, &r, show);
}

const struct lb_cmd lb_cmd_show = {"show", "NAME", "Describe a VM in full", run};
