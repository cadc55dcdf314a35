/* cmd/cli/ls.c - lifeboat ls */
#include "cmd/cli/cli.h"

/* What happens to it, or how far it is. */
static void progress(struct lb_table *t, const json_t *e)
{
    const json_t *p = json_object_get(json_object_get(e, "session"), "progress");
    const json_t *protect = json_object_get(e, "protect"), *fill = json_object_get(e, "fill");
    const json_t *suspended = json_object_get(e, "suspended");
    char text[64];

    if (json_is_object(protect))
        lb_table_cell(t, "%s", lb_protect_state(protect, text, sizeof(text)));
    else if (json_is_object(suspended))
        lb_table_cell(t, "%s", lb_human_bytes(text, sizeof(text), lb_jnum(suspended, "file_bytes")));
    else if (json_is_object(p))
        lb_table_cell(t, "%.0f%% %s", lb_jnum(p, "percent"), lb_jstr(p, "state"));
    else if (json_is_object(fill))
        lb_table_cell(t, "%s", "nobody fills");
    else
        lb_table_cell(t, "%s", "");
}

static void show(const json_t *o)
{
    static const char *const heads[] = {"NAME", "STATE", "PID", "PEER", "PROGRESS", "SINCE", "NOTE"};
    struct lb_table *t = lb_table_new(LB_ARRAY_LEN(heads), heads);
    size_t i;
    json_t *e;

    json_array_foreach (json_object_get(o, "vms"), i, e) {
        char when[32], pid[24] = "";

        lb_table_cell(t, "%s", lb_jstr(e, "name"));
        lb_table_cell(t, "%s", lb_vm_state_text(e));
        if (lb_jint(e, "pid"))
            snprintf(pid, sizeof(pid), "%lld", (long long)lb_jint(e, "pid"));
        lb_table_cell(t, "%s", pid);
        lb_table_cell(t, "%s", lb_jstr(e, "peer"));
        progress(t, e);
        lb_table_cell(t, "%s", lb_when(when, lb_jnum(e, "changed_ms")));
        lb_table_cell(t, "%s", lb_jstr(json_object_get(e, "fill"), "problem")[0]
                                   ? lb_jstr(json_object_get(e, "fill"), "problem") : lb_jstr(e, "note"));
    }
    lb_table_print(t);
    e = json_object_get(o, "host");
    if (lb_jbool(e, "maintenance")) { /* not in the table: others read that by columns */
        fprintf(stderr, "lifeboat: this host is in maintenance and takes no VM%s", lb_jstr(e, "reason")[0] ? ": " : "");
        lb_print_text(stderr, lb_jstr(e, "reason"));
        fputc('\n', stderr);
    }
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
