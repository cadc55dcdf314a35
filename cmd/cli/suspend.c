/* cmd/cli/suspend.c - lifeboat suspend NAME|--all, lifeboat resume NAME|--all */
#include "cmd/cli/keys.h"

#include <string.h>

enum { OPT_ALL = 256, OPT_LEVEL, OPT_EAGER, OPT_WAIT, OPT_FORCE };

struct args {
    struct lb_work work;
    char *name;
    bool all, eager, wait, force;
    int level;
};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct args *a = state->input;

    switch (key) {
    case ARGP_KEY_INIT:
        lb_work_inputs(&a->work, state);
        return 0;
    case OPT_ALL:
        a->all = true;
        return 0;
    case OPT_LEVEL:
        a->level = lb_arg_level(arg, state);
        return 0;
    case OPT_EAGER:
        a->eager = true;
        return 0;
    case OPT_WAIT:
        a->wait = true;
        return 0;
    case OPT_FORCE:
        a->force = true;
        return 0;
    case ARGP_KEY_ARG:
        lb_arg_word(arg, state, &a->name, NULL);
        return 0;
    case ARGP_KEY_END:
        if (!a->name == !a->all)
            argp_error(state, "NAME or --all is needed");
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

/* ---------------------------------------------------------------------- all of them */

static bool has_key(const struct args *a)
{
    return a->work.key.file || a->work.key.ask || a->work.key.passphrase_file;
}

static void on_vm(const json_t *ev)
{
    const char *remedy = lb_jstr(ev, "remedy");

    if (strcmp(lb_jstr(ev, "event"), "vm"))
        return;
    printf("[%lld/%lld] %s: ", (long long)lb_jint(ev, "done"), (long long)lb_jint(ev, "total"), lb_jstr(ev, "vm"));
    lb_print_text(stdout, lb_jbool(ev, "ok") ? "ok" : lb_jstr(ev, "message"));
    putchar('\n');
    if (!lb_jbool(ev, "ok") && remedy[0]) {
        printf("    remedy: ");
        lb_print_text(stdout, remedy);
        putchar('\n');
    }
}

static void show_all(const json_t *o)
{
    size_t i;
    json_t *e;

    json_array_foreach (json_object_get(o, "left"), i, e) {
        printf("left alone: %s (%s): ", lb_jstr(e, "vm"), lb_jstr(e, "state"));
        lb_print_text(stdout, lb_jstr(e, "message"));
        putchar('\n');
    }
    printf("%zu done, %zu failed, %zu left alone\n", json_array_size(json_object_get(o, "done")),
           json_array_size(json_object_get(o, "failed")), json_array_size(json_object_get(o, "left")));
}

/* The kind of the first failure. What was left alone is none: it was not to be touched. */
static int judge_all(const json_t *o)
{
    const json_t *first = json_array_get(json_object_get(o, "failed"), 0);

    return first ? lb_errcode_exit((enum lb_errcode)lb_jint(first, "code")) : 0;
}

/* ------------------------------------------------------------------------- suspend */

static void show_suspend(const json_t *o)
{
    char total[32], raw[32], file[32];

    printf("VM %s is suspended to %s: %s of memory in %s on disk, %s; `lifeboat resume %s` brings it back\n",
           lb_jstr(o, "vm"), lb_jstr(o, "path"), lb_human_bytes(raw, sizeof(raw), lb_jnum(o, "raw_bytes")),
           lb_human_bytes(file, sizeof(file), lb_jnum(o, "file_bytes")),
           lb_span(total, sizeof(total), lb_jnum(o, "total_ms")), lb_jstr(o, "vm"));
}

static int run_suspend(struct lb_cli *cli, int argc, char **argv)
{
    static const struct argp_option options[] = {
        {"all", OPT_ALL, NULL, 0, "Every VM of this host; `lifeboat resume --all` brings those back", 0},
        {"level", OPT_LEVEL, "N", 0, "zstd level, -7 (fastest) to 19 (default 1)", 0},
        {0},
    };
    const struct argp argp = {options, parse, lb_cmd_suspend.args,
                              "Write a running VM to disk and end its process. Whatever fails before the file is complete and "
                              "durable, the VM goes on running.", lb_work_children, NULL, NULL};
    struct args a = {.work.watch.cli = cli};
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;
    Lb__RpcCheckpoint m = LB__RPC_CHECKPOINT__INIT;
    Lb__RpcName all = LB__RPC_NAME__INIT;
    struct lb_error err = LB_ERROR_INIT;

    lb_parse("suspend", &argp, 0, argc, argv, &a);
    if (a.all && has_key(&a)) {
        lb_fail(&err, LB_E_USAGE, "a key cannot be given for all VMs");
        lb_remedy(&err, "set checkpoint-key in lifeboatd.conf(5)");
        return lb_cli_fail(cli, &err);
    }
    if (a.all) {
        r.kind_case = LB__RPC_REQUEST__KIND_SUSPEND_ALL;
        r.suspend_all = &all;
        a.work.watch.judge = judge_all;
        return lb_watch(&a.work.watch, &r, show_all, on_vm);
    }
    a.work.watch.vm = a.name;
    m.name = a.name;
    m.suspend = true;
    m.zstd_level = a.level;
    r.kind_case = LB__RPC_REQUEST__KIND_CHECKPOINT;
    r.checkpoint = &m;
    return lb_work_run(&a.work, true, &r, &m.key, show_suspend, NULL);
}

const struct lb_cmd lb_cmd_suspend = {"suspend", "NAME|--all", "Write a VM to disk and end it", run_suspend};

/* -------------------------------------------------------------------------- resume */

static int run_resume(struct lb_cli *cli, int argc, char **argv)
{
    static const struct argp_option options[] = {
        {"all", OPT_ALL, NULL, 0, "Those that `lifeboat suspend --all` suspended; with a key: those that run and wait for it", 0},
        {"eager", OPT_EAGER, NULL, 0, "Read all memory first, run then", 0},
        {"wait", OPT_WAIT, NULL, 0, "Return when all memory is there, not when the guest runs", 0},
        {"force", OPT_FORCE, NULL, 0, "Although a disk has changed since: the guest does not know that", 0},
        {0},
    };
    const struct argp argp = {options, parse, lb_cmd_resume.args,
                              "Bring a suspended VM back. It runs at once, its memory comes from the file when it is touched, "
                              "and the rest in the background.", lb_work_children, NULL, NULL};
    struct args a = {.work.watch.cli = cli};
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;
    Lb__RpcRestore m = LB__RPC_RESTORE__INIT;
    Lb__RpcName all = LB__RPC_NAME__INIT;

    lb_parse("resume", &argp, 0, argc, argv, &a);
    if (a.all && !has_key(&a)) {
        r.kind_case = LB__RPC_REQUEST__KIND_RESUME_ALL;
        r.resume_all = &all;
        a.work.watch.judge = judge_all;
        return lb_watch(&a.work.watch, &r, show_all, on_vm);
    }
    if (a.all) {
        r.kind_case = LB__RPC_REQUEST__KIND_FILL_KEY;
        a.work.watch.judge = judge_all;
        return lb_work_run(&a.work, false, &r, &r.fill_key, show_all, on_vm);
    }
    a.work.watch.vm = a.name;
    m.ref = a.name;
    m.resume = true;
    m.eager = a.eager;
    m.wait = a.wait;
    m.force = a.force;
    r.kind_case = LB__RPC_REQUEST__KIND_RESTORE;
    r.restore = &m;
    return lb_work_run(&a.work, false, &r, &m.key, lb_show_restored, a.wait ? lb_show_running : NULL);
}

const struct lb_cmd lb_cmd_resume = {"resume", "NAME|--all", "Bring a suspended VM back", run_resume};
