/* cmd/cli/restore.c - lifeboat restore REF, lifeboat clone REF N */
#include "cmd/cli/keys.h"

#include <string.h>

enum { OPT_AS = 256, OPT_EAGER, OPT_WAIT, OPT_PAUSED, OPT_FORCE, OPT_TAP, OPT_NAME };
enum { MAX_TAPS = 64 };

struct args {
    struct lb_work work;
    char *ref, *as, *name, *tap;
    unsigned long count;
    bool eager, wait, paused, force;
    Lb__RpcTap taps[MAX_TAPS], *tap_list[MAX_TAPS];
    unsigned n_taps;
};

void lb_show_running(const json_t *ev)
{
    const json_t *r = json_object_get(ev, "result");
    char span[32];

    if (!strcmp(lb_jstr(ev, "event"), "running"))
        printf("VM %s runs after %s; its memory still comes\n", lb_jstr(ev, "vm"),
               lb_span(span, sizeof(span), lb_jnum(r, "running_ms")));
}

void lb_show_restored(const json_t *o)
{
    char running[32], total[32], bytes[32];

    printf("VM %s runs: %s after %s", lb_jstr(o, "vm"), lb_jbool(o, "resumed") ? "resumed" : "restored",
           lb_span(running, sizeof(running), lb_jnum(o, "running_ms")));
    if (lb_jbool(o, "filling"))
        printf("; its memory comes when it is touched, the rest in the background (`lifeboat status %s`)\n", lb_jstr(o, "vm"));
    else
        printf(", all memory (%s) there after %s\n", lb_human_bytes(bytes, sizeof(bytes), lb_jnum(o, "placed_bytes")),
               lb_span(total, sizeof(total), lb_jnum(o, "total_ms")));
}

static void add_tap(struct args *a, char *arg, struct argp_state *state)
{
    char *eq = strchr(arg, '=');

    if (!eq || eq == arg || !eq[1])
        argp_error(state, "--tap takes OLD=NEW");
    if (a->n_taps == MAX_TAPS)
        argp_error(state, "more than %d --tap", MAX_TAPS);
    *eq = 0;
    lb__rpc_tap__init(&a->taps[a->n_taps]);
    a->taps[a->n_taps].from = arg;
    a->taps[a->n_taps].to = eq + 1;
    a->tap_list[a->n_taps] = &a->taps[a->n_taps];
    a->n_taps++;
}

static error_t parse_restore(int key, char *arg, struct argp_state *state)
{
    struct args *a = state->input;

    switch (key) {
    case ARGP_KEY_INIT:
        lb_work_inputs(&a->work, state);
        return 0;
    case OPT_AS:
        a->as = arg;
        return 0;
    case OPT_EAGER:
        a->eager = true;
        return 0;
    case OPT_WAIT:
        a->wait = true;
        return 0;
    case OPT_PAUSED:
        a->paused = a->eager = true;
        return 0;
    case OPT_FORCE:
        a->force = true;
        return 0;
    case OPT_TAP:
        add_tap(a, arg, state);
        return 0;
    case ARGP_KEY_ARG:
        lb_arg_word(arg, state, &a->ref, NULL);
        return 0;
    case ARGP_KEY_END:
        if (!a->ref)
            argp_error(state, "CHECKPOINT is needed: NAME@NUMBER, NAME@LABEL, or NAME for the latest");
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static int run_restore(struct lb_cli *cli, int argc, char **argv)
{
    static const struct argp_option options[] = {
        {"as", OPT_AS, "NEW", 0, "As another VM of that name, with disks of its own; the one it was taken of may go on", 0},
        {"eager", OPT_EAGER, NULL, 0, "Read all memory first, run then", 0},
        {"wait", OPT_WAIT, NULL, 0, "Return when all memory is there, not when the guest runs", 0},
        {"paused", OPT_PAUSED, NULL, 0, "Leave it paused (reads all memory)", 0},
        {"force", OPT_FORCE, NULL, 0, "Although a disk has changed since: the guest does not know that", 0},
        {"tap", OPT_TAP, "OLD=NEW", 0, "Use tap NEW for a card that was on OLD; may be given again", 0},
        {0},
    };
    const struct argp argp = {options, parse_restore, lb_cmd_restore.args,
                              "Run a VM from a checkpoint. Its disks begin as they were then; what was written since is kept "
                              "beside them.", lb_work_children, NULL, NULL};
    struct args a = {.work.watch.cli = cli};
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;
    Lb__RpcRestore m = LB__RPC_RESTORE__INIT;
    char vm[128];

    lb_parse("restore", &argp, 0, argc, argv, &a);
    m.ref = a.ref;
    m.as = a.as ? a.as : (char *)"";
    m.eager = a.eager;
    m.wait = a.wait;
    m.paused = a.paused;
    m.force = a.force;
    m.taps = a.tap_list;
    m.n_taps = a.n_taps;
    snprintf(vm, sizeof(vm), "%.*s", (int)strcspn(a.ref, "@"), a.ref);
    a.work.watch.vm = a.as ? a.as : vm;
    r.kind_case = LB__RPC_REQUEST__KIND_RESTORE;
    r.restore = &m;
    return lb_work_run(&a.work, false, &r, &m.key, lb_show_restored, a.wait ? lb_show_running : NULL);
}

const struct lb_cmd lb_cmd_restore = {"restore", "CHECKPOINT", "Run a VM from a checkpoint", run_restore};

/* --------------------------------------------------------------------------- clone */

static error_t parse_clone(int key, char *arg, struct argp_state *state)
{
    struct args *a = state->input;

    switch (key) {
    case ARGP_KEY_INIT:
        lb_work_inputs(&a->work, state);
        return 0;
    case OPT_NAME:
        a->name = arg;
        return 0;
    case OPT_TAP:
        a->tap = arg;
        return 0;
    case ARGP_KEY_ARG:
        if (!a->ref)
            a->ref = arg;
        else if (a->count || !lb_arg_number(arg, 1, 256, &a->count))
            argp_error(state, "N is a number from 1 to 256");
        return 0;
    case ARGP_KEY_END:
        if (!a->count)
            argp_error(state, "CHECKPOINT and N are needed");
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static void show_clones(const json_t *o)
{
    size_t i;
    json_t *e;
    char span[32];

    json_array_foreach (json_object_get(o, "clones"), i, e)
        printf("VM %s runs after %s\n", lb_jstr(e, "name"), lb_span(span, sizeof(span), lb_jnum(e, "running_ms")));
}

static int run_clone(struct lb_cli *cli, int argc, char **argv)
{
    static const struct argp_option options[] = {
        {"name", OPT_NAME, "PREFIX", 0, "Names are PREFIX-1, PREFIX-2 ... (default: the name of the VM)", 0},
        {"tap", OPT_TAP, "PATTERN", 0, "Tap of the first card, with %d for the clone's number (default: OLD-N when it exists, "
         "else the card has no link)", 0},
        {0},
    };
    const struct argp argp = {options, parse_clone, lb_cmd_clone.args,
                              "Start N VMs from one checkpoint. They share the memory that none of them writes; each has disks, "
                              "and after its next boot MAC addresses and a UUID, of its own.", lb_work_children, NULL, NULL};
    struct args a = {.work.watch = {.cli = cli, .stops = true}};
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;
    Lb__RpcClone m = LB__RPC_CLONE__INIT;

    lb_parse("clone", &argp, 0, argc, argv, &a);
    m.ref = a.ref;
    m.count = (uint32_t)a.count;
    m.name = a.name ? a.name : (char *)"";
    m.tap = a.tap ? a.tap : (char *)"";
    a.work.watch.vm = a.ref;
    r.kind_case = LB__RPC_REQUEST__KIND_CLONE;
    r.clone = &m;
    return lb_work_run(&a.work, false, &r, &m.key, show_clones, NULL);
}

const struct lb_cmd lb_cmd_clone = {"clone", "CHECKPOINT N", "Start several VMs from a checkpoint", run_clone};
