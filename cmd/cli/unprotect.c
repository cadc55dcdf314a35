/* cmd/cli/unprotect.c - lifeboat unprotect NAME */
#include "cmd/cli/cli.h"

static void show(const json_t *o)
{
    printf("VM %s is not protected any more; it runs on here\n", lb_jstr(o, "vm"));
}

static int run(struct lb_cli *cli, int argc, char **argv)
{
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;
    Lb__RpcName m = LB__RPC_NAME__INIT;
    struct lb_name_args a;

    lb_parse_name(cli, &lb_cmd_unprotect,
                  "End the protection of a VM, also one that has only begun. The VM runs on, "
                  "its standby is removed. To be said on the host where the VM runs.",
                  0, NULL, argc, argv, &a);
    m.name = (char *)a.name;
    r.kind_case = LB__RPC_REQUEST__KIND_UNPROTECT;
    r.unprotect = &m;
    return lb_ask(cli, &r, show);
}

const struct lb_cmd lb_cmd_unprotect = {"unprotect", "NAME", "End the protection of a VM", run};
