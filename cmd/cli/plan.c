/* cmd/cli/plan.c - lifeboat plan --inventory FILE: how hosts would be emptied; no daemon is asked */
#include "cmd/cli/cli.h"

#include <string.h>

#include "cmd/cli/evac_view.h"
#include "migrate/plan.h"

enum { OPT_INVENTORY = 256, OPT_EVACUATE, OPT_TO, OPT_PARALLEL, OPT_HOT };

struct args {
    struct lb_cli *cli;
    const char *inventory;
    char *evacuate, *to;         /* names, separated by commas; NULL: as the inventory says */
    uint32_t parallel;           /* 0: auto */
    enum lb_plan_hot hot;
};

static const struct argp_child children[] = {{&lb_json_argp, 0, NULL, 0}, {0}};

static void append(char **list, const char *names)
{
    char *old = *list;

    *list = old ? lb_asprintf("%s,%s", old, names) : lb_strdup(names);
    free(old);
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct args *a = state->input;

    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = a->cli;
        return 0;
    case OPT_INVENTORY:
        a->inventory = arg;
        return 0;
    case OPT_EVACUATE:
        append(&a->evacuate, arg);
        return 0;
    case OPT_TO:
        append(&a->to, arg);
        return 0;
    case OPT_PARALLEL:
        a->parallel = lb_arg_parallel(arg, state);
        return 0;
    case OPT_HOT:
        a->hot = (enum lb_plan_hot)lb_arg_hot(arg, state);
        return 0;
    case ARGP_KEY_ARG:
        argp_error(state, "unexpected argument \"%s\"", arg);
        return 0;
    case ARGP_KEY_END:
        if (!a->inventory)
            argp_error(state, "--inventory FILE is needed");
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static int by_id(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

    return (x > y) - (x < y);
}

/* Replaces *set by the hosts of those names; ascending, each once. */
static int hosts_of(const struct lb_inventory *inv, char *names, struct lb_inv_set *set, struct lb_error *err)
{
    char *save = NULL;
    uint32_t n = 0;

    if (!names)
        return 0;
    set->ids = lb_realloc(set->ids, (strlen(names) + 1) * sizeof(*set->ids));
    set->n = 0;
    for (char *name = strtok_r(names, ",", &save); name; name = strtok_r(NULL, ",", &save)) {
        uint32_t h = lb_inv_host_find(inv, name);

        if (h == LB_INV_NONE) {
            lb_fail(err, LB_E_NOT_FOUND, "there is no host \"%.200s\" in the inventory", name);
            return lb_remedy(err, "add it, or correct its name");
        }
        set->ids[set->n++] = h;
    }
    qsort(set->ids, set->n, sizeof(*set->ids), by_id);
    for (uint32_t i = 0; i < set->n; i++)
        if (!n || set->ids[n - 1] != set->ids[i])
            set->ids[n++] = set->ids[i];
    set->n = n;
    return 0;
}

static void print(struct lb_cli *cli, const struct lb_inventory *inv, const struct lb_plan *p)
{
    json_t *o = lb_plan_json(inv, p);
    LB_AUTO_FREE char *text = cli->json ? json_dumps(o, JSON_COMPACT | JSON_REAL_PRECISION(12)) : NULL;

    if (text)
        puts(text);
    else
        lb_plan_print(stdout, o);
    json_decref(o);
}

static int make_and_print(struct args *a, struct lb_inventory *inv, struct lb_error *err)
{
    struct lb_plan_opts opts = {.parallel = a->parallel, .hot = a->hot};
    struct lb_plan plan;
    bool whole;

    if (hosts_of(inv, a->evacuate, &inv->evacuate, err) || hosts_of(inv, a->to, &inv->to, err))
        return -1;
    opts.evacuate = inv->evacuate;
    opts.to = inv->to;
    if (lb_plan_make(inv, &opts, &plan, err))
        return -1;
    print(a->cli, inv, &plan);
    whole = !plan.n_stays;
    lb_plan_free(&plan);
    return whole ? 0 : LB_E_PREFLIGHT;
}

static int run(struct lb_cli *cli, int argc, char **argv)
{
    static const struct argp_option options[] = {
        {"inventory", OPT_INVENTORY, "FILE", 0, "Hosts and VMs, as JSON", 0},
        {"evacuate", OPT_EVACUATE, "HOST[,HOST...]", 0, "Hosts to empty (default: as the inventory says)", 0},
        {"to", OPT_TO, "HOST[,HOST...]", 0, "Only to these (default: as the inventory says, else all others)", 0},
        {"parallel", OPT_PARALLEL, "auto|N", 0, "Transfers at once out of a host (default auto: what is fastest)", 0},
        {"hot", OPT_HOT, "throttle|suspend|leave", 0,
         "A VM that dirties memory faster than its link carries (default: throttle)", 0},
        {0},
    };
    const struct argp argp = {options, parse, lb_cmd_plan.args,
                              "Plan how hosts would be emptied: which VM goes where, when, how long it takes. Nothing is moved.",
                              children, NULL, NULL};
    struct args a = {.cli = cli};
    struct lb_inventory inv = {0};
    struct lb_error err = LB_ERROR_INIT;
    int rc;

    lb_parse("plan", &argp, 0, argc, argv, &a);
    rc = lb_inventory_load(a.inventory, &inv, &err);
    if (!rc)
        rc = make_and_print(&a, &inv, &err);
    lb_inventory_free(&inv);
    free(a.evacuate);
    free(a.to);
    return rc < 0 ? lb_cli_fail(cli, &err) : rc;
}

const struct lb_cmd lb_cmd_plan = {"plan", "--inventory FILE", "Plan how hosts would be emptied", run};
