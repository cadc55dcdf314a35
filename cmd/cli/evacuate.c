/*
 * cmd/cli/evacuate.c - lifeboat evacuate: plan, ask, watch
 *
 * The evacuation belongs to the daemon. Ctrl-C only stops the watching; `lifeboat evacuate` while one is under way
 * watches it again, and so does this one when the daemon was away for a while.
 */
#include "cmd/cli/evacuate.h"

#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "cmd/cli/evac_view.h"

#define DAEMON_AWAY_MS 30000   /* a restart; the evacuation goes on when it is over */
#define DAEMON_LOOK_MS 500
#define MAX_TARGETS 256u

/* ------------------------------------------------------------------------- watching */

struct following {
    struct lb_cli *cli;
    struct lb_evac_view *view;
    const char *shown_plan;    /* its id; "" */
    bool begun;                /* the daemon has taken the request */
};

static bool on_event(const json_t *ev, const char *text, void *arg)
{
    struct following *w = arg;

    w->begun = true;
    if (!w->cli->json) {
        lb_evac_view_event(w->view, ev, lb_columns(), lb_rows());
    } else if (strcmp(lb_jstr(ev, "event"), "plan") || strcmp(lb_jstr(ev, "id"), w->shown_plan)) {
        puts(text);
        fflush(stdout);
    }
    return true;
}

/* Whether the daemon answers again; false when it does not, or on Ctrl-C. */
static bool daemon_returns(struct following *w, int sigint_fd)
{
    if (!w->cli->json)
        lb_evac_view_wipe(w->view);
    fprintf(stderr, "lifeboat: lifeboatd has gone away; what it has begun goes on. Waiting for it\n");
    for (int ms = 0; ms < DAEMON_AWAY_MS && !lb_readable(sigint_fd, DAEMON_LOOK_MS); ms += DAEMON_LOOK_MS) {
        int fd = lb_unix_connect(w->cli->socket, NULL);

        if (fd >= 0) {
            close(fd);
            return true;
        }
    }
    return false;
}

static int detached(struct following *w, const char *goes_on)
{
    if (w->cli->json)
        puts("{\"detached\":true}");
    else
        lb_evac_view_wipe(w->view);
    fprintf(stderr, "lifeboat: %s\n", goes_on);
    return LB_EXIT_DETACHED;
}

static int judge(struct following *w, const char *text)
{
    json_t *o = json_loads(text, 0, NULL);
    bool ok = lb_jbool(o, "ok"), cancelled = !strcmp(lb_jstr(o, "phase"), "cancelled");

    if (w->cli->json) {
        puts(text);
    } else {
        lb_evac_view_result(w->view, o);
    }
    json_decref(o);
    return ok ? 0 : lb_errcode_exit(cancelled ? LB_E_CANCELLED : LB_E_PREFLIGHT);
}

int lb_evac_follow(struct lb_cli *cli, const Lb__RpcRequest *r, const Lb__RpcRequest *again, const json_t *plan,
                   const char *goes_on)
{
    struct following w = {.cli = cli, .shown_plan = lb_jstr(plan, "id")};
    int sigint_fd = lb_catch_sigint(), rc;
    struct lb_error err = LB_ERROR_INIT;
    char *text;

    w.view = lb_evac_view_new(stdout, isatty(STDOUT_FILENO), r->kind_case == LB__RPC_REQUEST__KIND_MAINTENANCE);
    if (plan)
        lb_evac_view_event(w.view, plan, lb_columns(), lb_rows());
    text = lb_request(cli, r, on_event, &w, sigint_fd, &err);
    while (!text && cli->lost && w.begun && again && daemon_returns(&w, sigint_fd)) {
        err = (struct lb_error)LB_ERROR_INIT;
        text = lb_request(cli, again, on_event, &w, sigint_fd, &err);
    }
    if (text) {
        rc = judge(&w, text);
    } else if (lb_readable(sigint_fd, 0)) {
        rc = detached(&w, goes_on);
    } else {
        lb_evac_view_wipe(w.view);
        rc = lb_cli_fail(cli, &err);
    }
    free(text);
    lb_evac_view_free(w.view);
    return rc;
}

/* ------------------------------------------------------------------------ arguments */

enum { OPT_TO = 256, OPT_PARALLEL, OPT_BANDWIDTH, OPT_PRIORITY, OPT_HOT, OPT_DRY_RUN, OPT_SUSPEND_REST };

struct args {
    struct lb_cli *cli;
    Lb__RpcEvacuate *m;
    const char *priorities;
    char *to[MAX_TARGETS];
    bool dry_run, yes;
};

static void add_targets(struct args *a, char *list, struct argp_state *state)
{
    size_t before = a->m->n_to;
    char *save = NULL;

    for (char *name = strtok_r(list, ",", &save); name; name = strtok_r(NULL, ",", &save)) {
        if (a->m->n_to == MAX_TARGETS)
            argp_error(state, "--to: at most %u hosts", MAX_TARGETS);
        a->to[a->m->n_to++] = name;
    }
    if (a->m->n_to == before)
        argp_error(state, "--to takes names of hosts, separated by commas");
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct args *a = state->input;

    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = a->cli;
        return 0;
    case OPT_TO:
        add_targets(a, arg, state);
        return 0;
    case OPT_PARALLEL:
        a->m->parallel = lb_arg_parallel(arg, state);
        return 0;
    case OPT_BANDWIDTH:
        a->m->bandwidth_bytes_per_s = lb_arg_rate(arg, state);
        return 0;
    case OPT_PRIORITY:
        a->priorities = arg;
        return 0;
    case OPT_HOT:
        lb_arg_hot(arg, state);
        a->m->hot = arg;
        return 0;
    case OPT_DRY_RUN:
        a->dry_run = true;
        return 0;
    case OPT_SUSPEND_REST:
        a->m->suspend_rest = true;
        return 0;
    case 'y':
        a->yes = true;
        return 0;
    case ARGP_KEY_ARG:
        argp_error(state, "unexpected argument \"%s\"", arg);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

/* --------------------------------------------------------------------- plan and run */

static Lb__RpcRequest request(Lb__RpcEvacuate *m, const char *op)
{
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;

    m->op = (char *)op;
    r.kind_case = LB__RPC_REQUEST__KIND_EVACUATE;
    r.evacuate = m;
    return r;
}

/* 1 yes, 0 no, -1 *err */
static int under_way(struct lb_cli *cli, struct lb_error *err)
{
    static const char *const phases[] = {"planning", "running", "replanning", "cancelling"};
    Lb__RpcEvacuate m = LB__RPC_EVACUATE__INIT;
    Lb__RpcRequest r = request(&m, "status");
    LB_AUTO_FREE char *text = lb_request(cli, &r, NULL, NULL, -1, err);
    json_t *o = text ? json_loads(text, 0, NULL) : NULL;
    int found = 0;

    for (size_t i = 0; i < LB_ARRAY_LEN(phases); i++)
        found |= !strcmp(lb_jstr(o, "phase"), phases[i]);
    json_decref(o);
    return text ? found : -1;
}

static bool on_planning(const json_t *ev, const char *text, void *arg)
{
    struct lb_cli *cli = arg;

    if (!strcmp(lb_jstr(ev, "event"), "plan"))
        return true; /* it is the result */
    if (cli->json) {
        puts(text);
    } else {
        lb_print_text(stdout, lb_jstr(ev, "text"));
        putchar('\n');
    }
    fflush(stdout);
    return true;
}

/* Shows it, too; NULL and *err. */
static json_t *make_plan(struct args *a, struct lb_error *err)
{
    Lb__RpcRequest r = request(a->m, "plan");
    LB_AUTO_FREE char *text = lb_request(a->cli, &r, on_planning, a->cli, -1, err);
    json_t *plan = text ? json_loads(text, 0, NULL) : NULL;

    if (text && !plan)
        lb_fail(err, LB_E_PROTO, "lifeboatd answered something that is no JSON");
    if (!plan)
        return NULL;
    if (a->cli->json) {
        puts(text);
    } else {
        putchar('\n');
        lb_plan_print(stdout, plan);
    }
    fflush(stdout);
    return plan;
}

static bool sure(const struct args *a, const json_t *plan)
{
    unsigned n = 0;
    char answer[16];
    size_t i;
    json_t *s;

    if (a->yes)
        return true;
    json_array_foreach (json_object_get(plan, "steps"), i, s)
        n += strcmp(lb_jstr(s, "kind"), "backup") != 0;
    if (n)
        printf("\nEvacuate %u VM%s? [y/N] ", n, n == 1 ? "" : "s");
    else
        printf("\nNo VM leaves. Put this host into maintenance mode? [y/N] ");
    fflush(stdout);
    return fgets(answer, sizeof(answer), stdin) && (answer[0] == 'y' || answer[0] == 'Y');
}

#define GOES_ON "the evacuation goes on: `lifeboat evacuate` watches it again, `lifeboat cancel --evacuation` stops it"

static int attach(struct lb_cli *cli)
{
    Lb__RpcEvacuate m = LB__RPC_EVACUATE__INIT;
    Lb__RpcRequest r = request(&m, "watch");

    fprintf(stderr, "lifeboat: an evacuation of this host is under way, with the options it was begun with; watching it\n");
    return lb_evac_follow(cli, &r, &r, NULL, GOES_ON);
}

static int run_plan(struct args *a, const json_t *plan)
{
    Lb__RpcEvacuate m = *a->m, again = LB__RPC_EVACUATE__INIT;
    Lb__RpcRequest r = request(&m, "run"), watch = request(&again, "watch");

    m.plan_id = (char *)lb_jstr(plan, "id");
    m.replan = a->yes; /* nobody has judged that one: any other is as good */
    return lb_evac_follow(a->cli, &r, &watch, plan, GOES_ON);
}

static int evacuate(struct args *a, struct lb_error *err)
{
    bool can_ask = isatty(STDIN_FILENO) && !a->cli->json;
    int busy = a->dry_run ? 0 : under_way(a->cli, err), rc;
    json_t *plan;

    if (busy)
        return busy < 0 ? -1 : attach(a->cli);
    if (!a->yes && !a->dry_run && !can_ask) {
        lb_fail(err, LB_E_USAGE, "evacuate asks before it begins, and here is nobody to ask");
        return lb_remedy(err, "add --yes; or --dry-run, which only shows the plan");
    }
    plan = make_plan(a, err);
    if (!plan)
        return -1;
    if (a->dry_run)
        rc = json_array_size(json_object_get(plan, "stays")) ? lb_errcode_exit(LB_E_PREFLIGHT) : 0;
    else if (sure(a, plan))
        rc = run_plan(a, plan);
    else
        rc = lb_fail(err, LB_E_CANCELLED, "nothing was done");
    json_decref(plan);
    return rc;
}

static int run(struct lb_cli *cli, int argc, char **argv)
{
    static const struct argp_option options[] = {
        {"to", OPT_TO, "HOST[,HOST...]", 0, "Only to these hosts (default: every trusted one that may take VMs)", 0},
        {"parallel", OPT_PARALLEL, "auto|N", 0, "Transfers at once (default auto: what is fastest)", 0},
        {"bandwidth", OPT_BANDWIDTH, "RATE", 0, "At most this much in all, e.g. 1Gbit or 50MB", 0},
        {"priority", OPT_PRIORITY, "FILE", 0, "Which VMs leave first: lines \"NAME: NUMBER\", higher ones first", 0},
        {"hot", OPT_HOT, "throttle|suspend|leave", 0,
         "A VM that dirties memory faster than its link carries: slow it (default), pause it while it is sent, leave it", 0},
        {"suspend-rest", OPT_SUSPEND_REST, NULL, 0, "What cannot leave is suspended to this host's disk", 0},
        {"dry-run", OPT_DRY_RUN, NULL, 0, "Only show the plan", 0},
        {"yes", 'y', NULL, 0, "Do not ask", 0},
        {0},
    };
    static const struct argp_child children[] = {{&lb_json_argp, 0, NULL, 0}, {0}};
    const struct argp argp = {options, parse, lb_cmd_evacuate.args,
                              "Move every VM of this host to other hosts, and let it take none (maintenance mode). A plan is shown first. "
                              "One that is under way is watched.\v"
                              "Ctrl-C only stops watching: `lifeboat cancel --evacuation` stops the evacuation, a second evacuate goes on "
                              "with it, `lifeboat maintenance off --bring-back` reverses it.",
                              children, NULL, NULL};
    Lb__RpcEvacuate m = LB__RPC_EVACUATE__INIT;
    struct args a = {.cli = cli, .m = &m};
    struct lb_error err = LB_ERROR_INIT;
    char *priorities = NULL;
    int rc = -1;

    m.to = a.to;
    lb_parse("evacuate", &argp, 0, argc, argv, &a);
    if (!a.priorities || !lb_priorities_load(cli, a.priorities, &priorities, &err)) {
        if (priorities)
            m.priorities_json = priorities;
        rc = evacuate(&a, &err);
    }
    free(priorities);
    return rc < 0 ? lb_cli_fail(cli, &err) : rc;
}

const struct lb_cmd lb_cmd_evacuate = {"evacuate", "", "Move every VM of this host to others", run};
