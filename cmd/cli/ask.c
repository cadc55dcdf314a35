/*
 * cmd/cli/ask.c - lifeboat ask HOST failover|migrate|protect|status NAME
 *
 * Another host does it as if it were said there, when this host may ask for it (remus/ask.h).
 */
#include "cmd/cli/keys.h"

#include <string.h>

enum { OPT_BACKUP = 256 };

struct args {
    struct lb_watch watch;
    const char *host, *what, *name;
    char **backups;
    size_t n_backups;
};

static const char *const whats[] = {"failover", "migrate", "protect", "status"};

static void add_backups(struct args *a, char *list)
{
    char *save = NULL;

    for (char *h = strtok_r(list, ",", &save); h; h = strtok_r(NULL, ",", &save)) {
        a->backups = lb_realloc(a->backups, sizeof(*a->backups) * (a->n_backups + 1));
        a->backups[a->n_backups++] = h;
    }
}

static bool known(const char *what)
{
    for (size_t i = 0; i < LB_ARRAY_LEN(whats); i++)
        if (!strcmp(what, whats[i]))
            return true;
    return false;
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct args *a = state->input;

    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = a->watch.cli;
        state->child_inputs[1] = &a->watch;
        return 0;
    case OPT_BACKUP:
        add_backups(a, arg);
        return 0;
    case ARGP_KEY_ARG:
        if (!a->host)
            a->host = arg;
        else if (!a->what)
            a->what = arg;
        else if (!a->name)
            a->name = arg;
        else
            argp_error(state, "unexpected argument \"%s\"", arg);
        return 0;
    case ARGP_KEY_END:
        if (!a->name)
            argp_error(state, "HOST, what to do there and NAME are needed");
        else if (!known(a->what))
            argp_error(state, "a host can be asked for failover, migrate, protect and status, not for \"%s\"",
                       a->what);
        else if ((a->n_backups > 0) != !strcmp(a->what, "protect"))
            argp_error(state, "--backup is for protect, which needs it");
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static struct args args; /* show has no other way to it */

static void show(const json_t *o)
{
    char span[32];

    if (!strcmp(args.what, "status")) {
        lb_show_status(o);
        return;
    }
    printf("VM %s ", args.name);
    if (!strcmp(args.what, "protect")) {
        printf("has its backup on host %s", lb_jstr(o, "host"));
        if (lb_jnum(json_object_get(o, "protect"), "unprotected_ms") > 0)
            printf("; it had none for %s",
                   lb_span(span, sizeof(span), lb_jnum(json_object_get(o, "protect"), "unprotected_ms")));
        putchar('\n');
    } else {
        printf("runs %s\n", !strcmp(args.what, "migrate") ? "here" : "on the host that was asked");
    }
}

/* What is asked for, packed. */
static uint8_t *pack(const struct args *a, size_t *len)
{
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;
    Lb__RpcName name = LB__RPC_NAME__INIT;
    Lb__RpcMigrate migrate = LB__RPC_MIGRATE__INIT;
    Lb__RpcProtect protect = LB__RPC_PROTECT__INIT;
    uint8_t *buf;

    name.name = migrate.name = protect.name = (char *)a->name;
    protect.backups = a->backups;
    protect.n_backups = a->n_backups;
    if (!strcmp(a->what, "failover")) {
        r.kind_case = LB__RPC_REQUEST__KIND_FAILOVER;
        r.failover = &name;
    } else if (!strcmp(a->what, "migrate")) {
        r.kind_case = LB__RPC_REQUEST__KIND_MIGRATE;
        r.migrate = &migrate;
    } else if (!strcmp(a->what, "protect")) {
        r.kind_case = LB__RPC_REQUEST__KIND_PROTECT;
        r.protect = &protect;
    } else {
        r.kind_case = LB__RPC_REQUEST__KIND_STATUS;
        r.status = &name;
    }
    *len = lb__rpc_request__get_packed_size(&r);
    buf = lb_alloc(*len + 1);
    lb__rpc_request__pack(&r, buf);
    return buf;
}

static int run(struct lb_cli *cli, int argc, char **argv)
{
    static const struct argp_option options[] = {
        {"backup", OPT_BACKUP, "HOST[,HOST...]", 0, "protect: hosts that are to hold the backup, the preferred one first", 0},
        {0},
    };
    static const struct argp_child children[] = {{&lb_json_argp, 0, NULL, 0}, {&lb_watch_argp, 0, NULL, 0}, {0}};
    const struct argp argp = {options, parse, lb_cmd_ask.args,
                              "Have a trusted host do something with a VM that concerns this host too: take over one that it "
                              "backs up for us (failover), send one back that came from here (migrate), choose another "
                              "backup for one that we back up (protect), tell how it is (status).\v"
                              "Ctrl-C only stops watching.",
                              children, NULL, NULL};
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;
    Lb__RpcAsk ask = LB__RPC_ASK__INIT;
    LB_AUTO_FREE uint8_t *packed = NULL;
    int rc;

    args.watch.cli = cli;
    lb_parse("ask", &argp, 0, argc, argv, &args);
    args.watch.vm = args.name;
    packed = pack(&args, &ask.request.len);
    ask.request.data = packed;
    ask.host = (char *)args.host;
    r.kind_case = LB__RPC_REQUEST__KIND_ASK;
    r.ask = &ask;
    rc = lb_watch(&args.watch, &r, show, NULL);
    free(args.backups);
    return rc;
}

const struct lb_cmd lb_cmd_ask = {"ask", "HOST WHAT NAME", "Have another host do something with a VM", run};
