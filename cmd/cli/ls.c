/* cmd/cli/ls.c - lifeboat ls */
#include "cmd/cli/cli.h"

static void show(const json_t *o)
{
    static const char *const heads[] = {"NAME", "STATE", "PID", "PEER", "PROGRESS", "SINCE", "NOTE"};
    struct lb_table *t = lb_table_new(LB_ARRAY_LEN(heads), heads);
    size_t i;
    json_t *e;

    json_array_foreach (json_object_get(o, "vms"), i, e) {
        json_t *p = json_object_get(json_object_get(e, "session"), "progress");
        json_t *protect = json_object_get(e, "protect");
        char when[32], text[64];

        lb_table_cell(t, "%s", lb_jstr(e, "name"));
        lb_table_cell(t, "%s", lb_jstr(e, "state"));
        lb_table_cell(t, "%lld", (long long)lb_jint(e, "pid"));
        lb_table_cell(t, "%s", lb_jstr(e, "peer"));
        if (json_is_object(protect))
            lb_table_cell(t, "%s", lb_protect_state(protect, text, sizeof(text)));
        else if (json_is_object(p))
            lb_table_cell(t, "%.0f%% %s", lb_jnum(p, "percent"), lb_jstr(p, "state"));
        else
            lb_table_cell(t, "%s", "");
        lb_table_cell(t, "%s", lb_when(when, lb_jnum(e, "changed_ms")));
        lb_table_cell(t, "%s", lb_jstr(e, "note"));
    }
    lb_table_print(t);
}

static int run(struct lb_cli *cli, int argc, char **argv)
{
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;
    Lb__RpcName m = LB__RPC_NAME__INIT;
    struct lb_name_args a;

    lb_parse_name(cli, &lb_cmd_ls, "List the VMs of this host.", LB_NAME_NONE, NULL, argc, argv, &a);
    r.kind_case = LB__RPC_REQUEST__KIND_LS;
    r.ls = &m;
    return lb_ask(cli, &r, show);
}

const struct lb_cmd lb_cmd_ls = {"ls", "", "List the VMs of this host", run};
