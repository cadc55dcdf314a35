/* cmd/cli/release.c - lifeboat release NAME */
#include "cmd/cli/cli.h"

static void show(const json_t *o)
{
    printf("VM %s released; %s\n", lb_jstr(o, "name"),
           lb_jbool(o, "alive") ? "it runs on by itself" : "its process was gone");
}

static int run(struct lb_cli *cli, int argc, char **argv)
{
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;
    Lb__RpcName m = LB__RPC_NAME__INIT;
    struct lb_name_args a;

    lb_parse_name(cli, &lb_cmd_release, "Forget a VM without touching it.", LB_NAME_FORCE,
                  "Also a VM in the middle of a hand-over", argc, argv, &a);
    m.name = (char *)a.name;
    m.force = a.force;
    r.kind_case = LB__RPC_REQUEST__KIND_RELEASE;
    r.release = &m;
    return lb_ask(cli, &r, show);
}

const struct lb_cmd lb_cmd_release = {"release", "NAME", "Forget a VM without touching it", run};
