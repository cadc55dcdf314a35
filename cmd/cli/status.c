/* cmd/cli/status.c - lifeboat status NAME */
#include "cmd/cli/cli.h"

static void line(const char *key, const char *value)
{
    if (!value[0])
        return;
    printf("%-12s", key);
    lb_print_text(stdout, value);
    putchar('\n');
}

/* What was asked for and what is the case. */
static void protection(const json_t *o)
{
    const json_t *w = json_object_get(o, "wish"), *b;
    size_t i;

    lb_print_protection(json_object_get(o, "protect"));
    if (!json_is_object(w))
        return;
    printf("%-12s", "wanted");
    json_array_foreach (json_object_get(w, "backups"), i, b) {
        fputs(i ? ", " : "on ", stdout);
        lb_print_text(stdout, json_string_value(b) ? json_string_value(b) : "");
    }
    if (!json_array_size(json_object_get(w, "backups")))
        fputs("on any trusted host", stdout);
    printf(", every %lld ms, decided by ", (long long)lb_jint(w, "interval_ms"));
    lb_print_text(stdout, lb_jstr(w, "witness"));
    putchar('\n');
}

/* Where its memory is, or comes from; what is taken of it by schedule. */
static void checkpoints(const json_t *o)
{
    const json_t *suspended = json_object_get(o, "suspended"), *fill = json_object_get(o, "fill");
    const json_t *schedule = json_object_get(o, "schedule");
    char bytes[32];

    if (json_is_object(suspended)) {
        printf("%-12s%s, in ", "suspended", lb_human_bytes(bytes, sizeof(bytes), lb_jnum(suspended, "file_bytes")));
        lb_print_text(stdout, lb_jstr(suspended, "path"));
        putchar('\n');
    } else {
        line("checkpoint", lb_jstr(o, "checkpoint"));
    }
    if (json_is_object(fill)) {
        if (json_is_number(json_object_get(fill, "percent")))
            printf("%-12s%.0f%% there, the rest comes\n", "memory", lb_jnum(fill, "percent"));
        else
            line("memory", "incomplete, and nobody reads the rest at the moment");
        line("", lb_jstr(fill, "problem"));
    }
    if (json_is_object(schedule)) {
        printf("%-12s", "schedule");
        lb_print_schedule(schedule);
    }
}

/* Of a migration, or of something about a checkpoint, which says `what`. */
static void progress(const json_t *p)
{
    char rate[32], sent[32], total[32];

    if (json_is_string(json_object_get(p, "what"))) {
        printf("%-12s%.0f%% %s %s", "progress", lb_jnum(p, "percent"), lb_jstr(p, "what"), lb_jstr(p, "phase"));
        if (lb_jnum(p, "total_bytes") > 0)
            printf(", %s of %s", lb_human_bytes(sent, sizeof(sent), lb_jnum(p, "done_bytes")),
                   lb_human_bytes(total, sizeof(total), lb_jnum(p, "total_bytes")));
        if (lb_jnum(p, "bytes_per_s") > 0)
            printf(", %s/s", lb_human_bytes(rate, sizeof(rate), lb_jnum(p, "bytes_per_s")));
        putchar('\n');
    } else {
        printf("%-12s%.0f%% %s, round %lld, %s sent, %s/s\n", "progress", lb_jnum(p, "percent"),
               lb_jstr(p, "state"), (long long)lb_jint(p, "round"),
               lb_human_bytes(sent, sizeof(sent), lb_jnum(p, "sent_bytes")),
               lb_human_bytes(rate, sizeof(rate), lb_jnum(p, "throughput_bytes_per_s")));
    }
    line("", lb_jstr(p, "note"));
}

void lb_show_status(const json_t *o)
{
    const json_t *running = json_object_get(o, "running"), *s = json_object_get(o, "session");
    const json_t *p = json_object_get(s, "progress");
    char when[32];

    line("name", lb_jstr(o, "name"));
    printf("%-12s%s%s\n", "state", lb_vm_state_text(o),
           json_is_false(running) ? " (paused)" : "");
    if (lb_jint(o, "pid"))
        printf("%-12s%lld%s\n", "process", (long long)lb_jint(o, "pid"), lb_jbool(o, "alive") ? "" : " (gone)");
    line("origin", lb_jstr(o, "origin"));
    line("control", lb_jstr(o, "qmp"));
    line("peer", lb_jstr(o, "peer"));
    line("since", lb_when(when, lb_jnum(o, "changed_ms")));
    line("note", lb_jstr(o, "note"));
    line("problem", lb_jstr(o, "problem"));
    checkpoints(o);
    if (json_is_object(json_object_get(o, "protect")))
        protection(o);
    if (!json_is_object(s))
        return;
    printf("%-12s%s%s%s, process %lld, %s\n", "session", lb_jstr(s, "role"), lb_jstr(s, "host")[0] ? ", host " : "",
           lb_jstr(s, "host"), (long long)lb_jint(s, "pid"), lb_jstr(s, "id"));
    if (json_is_object(p))
        progress(p);
}

static int run(struct lb_cli *cli, int argc, char **argv)
{
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;
    Lb__RpcName m = LB__RPC_NAME__INIT;
    struct lb_name_args a;

    lb_parse_name(cli, &lb_cmd_status, "Show where a VM is and what happens to it.", 0, NULL, argc,
                  argv, &a);
    m.name = (char *)a.name;
    r.kind_case = LB__RPC_REQUEST__KIND_STATUS;
    r.status = &m;
    return lb_ask(cli, &r, lb_show_status);
}

const struct lb_cmd lb_cmd_status = {"status", "NAME", "Show the state of a VM", run};
