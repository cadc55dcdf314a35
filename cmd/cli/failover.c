/* cmd/cli/failover.c - lifeboat failover NAME */
#include "cmd/cli/cli.h"

static void show(const json_t *o)
{
    char took[32];
    double ms = lb_jnum(o, "last_failover_took_ms");

    printf("VM %s runs here now", lb_jstr(o, "vm"));
    if (ms > 0)
        printf(", %s after the last sign of host %s", lb_span(took, sizeof(took), ms),
               lb_jstr(o, "host"));
    putchar('\n');
}

static int run(struct lb_cli *cli, int argc, char **argv)
{
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;
    Lb__RpcName m = LB__RPC_NAME__INIT;
    struct lb_name_args a;

    lb_parse_name(cli, &lb_cmd_failover,
                  "Bring a protected VM to this host, which holds its standby. The host where it runs "
                  "is asked to give way; when it is silent the witness decides.",
                  LB_NAME_FORCE,
                  "I vouch for it: the host where it ran is dead and stays dead", argc, argv, &a);
    m.name = (char *)a.name;
    m.force = a.force;
    r.kind_case = LB__RPC_REQUEST__KIND_FAILOVER;
    r.failover = &m;
    return lb_ask(cli, &r, show);
}

const struct lb_cmd lb_cmd_failover = {"failover", "NAME", "Bring a VM to its backup", run};
