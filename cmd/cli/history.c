/* cmd/cli/history.c - lifeboat history [NAME] */
#include "cmd/cli/cli.h"

#include <string.h>

/* What came of it, when it went well: a migration as seen from either host, a failover, a suspended VM. */
static const char *result(const json_t *e)
{
    static const struct {
        const char *direction, *text;
    } results[] = {{"out", "moved"}, {"in", "moved"}, {"failover", "taken over"}, {"failed-over", "gave way"},
                   {"suspend", "suspended"}, {"resume", "resumed"}, {"restore", "restored"}, {"clone", "cloned"}};

    if (!lb_jbool(e, "ok"))
        return lb_jstr(json_object_get(e, "error"), "code");
    for (size_t i = 0; i < LB_ARRAY_LEN(results); i++)
        if (!strcmp(lb_jstr(e, "direction"), results[i].direction))
            return results[i].text;
    return "ok";
}

static void show(const json_t *o)
{
    static const char *const heads[] = {"STARTED", "VM",       "DIRECTION", "HOST",  "RESULT",
                                        "TOTAL",   "DOWNTIME", "BYTES",     "ROUNDS"};
    struct lb_table *t = lb_table_new(LB_ARRAY_LEN(heads), heads);
    size_t i;
    json_t *e;

    json_array_foreach (json_object_get(o, "history"), i, e) {
        bool ok = lb_jbool(e, "ok"), out = !strcmp(lb_jstr(e, "direction"), "out");
        double total_ms = lb_jnum(e, json_object_get(e, "total_ms") ? "total_ms" : "running_ms");
        double bytes = lb_jnum(e, out ? "wire_bytes" : "file_bytes");
        char when[32], span[32];

        lb_table_cell(t, "%s", lb_when(when, lb_jnum(e, "started_ms")));
        lb_table_cell(t, "%s", lb_jstr(e, "vm"));
        lb_table_cell(t, "%s", lb_jstr(e, "direction"));
        lb_table_cell(t, "%s", lb_jstr(e, "host"));
        lb_table_cell(t, "%s", result(e));
        lb_table_cell(t, "%s",
                      total_ms > 0 ? lb_span(span, sizeof(span), total_ms) : "");
        if (ok && out)
            lb_table_cell(t, "%s", lb_span(span, sizeof(span), lb_jnum(e, "downtime_ms")));
        else
            lb_table_cell(t, "%s", "");
        lb_table_cell(t, "%s",
                      out || bytes > 0 ? lb_human_bytes(span, sizeof(span), bytes) : "");
        if (lb_jint(e, "rounds") > 0)
            lb_table_cell(t, "%lld", (long long)lb_jint(e, "rounds"));
        else
            lb_table_cell(t, "%s", "");
    }
    lb_table_print(t);
}

static int run(struct lb_cli *cli, int argc, char **argv)
{
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;
    Lb__RpcName m = LB__RPC_NAME__INIT;
    struct lb_name_args a;

    lb_parse_name(cli, &lb_cmd_history, "List the migrations, failovers, suspends and restores of this host, of one VM or all.",
                  LB_NAME_OPTIONAL | LB_NAME_LIMIT, NULL, argc, argv, &a);
    m.name = (char *)(a.name ? a.name : "");
    m.limit = a.limit;
    r.kind_case = LB__RPC_REQUEST__KIND_HISTORY;
    r.history = &m;
    return lb_ask(cli, &r, show);
}

const struct lb_cmd lb_cmd_history = {"history", "[NAME]", "List past migrations, failovers, suspends and restores", run};
