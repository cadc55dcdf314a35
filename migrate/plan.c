/* migrate/plan.c - checks of the options, and the plan as an object. See plan.h. */
#include "migrate/plan_internal.h"

#include <string.h>

const char *lb_plan_kind_name(enum lb_plan_kind kind)
{
    static const char *const names[] = {"copy", "swap", "backup"};

    return names[kind];
}

double lb_plan_link(const struct lb_inventory *inv, uint32_t from, uint32_t to)
{
    return (double)LB_MIN(inv->hosts[from].link_bytes_per_s, inv->hosts[to].link_bytes_per_s);
}

/* Room for one more; it is a power of two. */
static void *grown(void *list, uint32_t n, size_t size)
{
    return n & (n - 1) ? list : lb_realloc(list, (n ? 2 * (size_t)n : 1) * size);
}

void lb_plan_add_step(struct lb_plan *p, enum lb_plan_kind kind, uint32_t vm, uint32_t from, uint32_t to)
{
    p->steps = grown(p->steps, p->n_steps, sizeof(*p->steps));
    p->steps[p->n_steps++] = (struct lb_plan_step){.vm = vm, .from = from, .to = to, .kind = kind};
}

void lb_plan_add_stay(struct lb_plan *p, uint32_t vm, bool backup, char *reason, const char *remedy)
{
    p->stays = grown(p->stays, p->n_stays, sizeof(*p->stays));
    p->stays[p->n_stays++] = (struct lb_plan_stay){vm, backup, reason, lb_strdup(remedy)};
}

static int check(const struct lb_inventory *inv, const struct lb_plan_opts *o, struct lb_error *err)
{
    if (!o->evacuate.n) {
        lb_fail(err, LB_E_USAGE, "no host to empty");
        return lb_remedy(err, "name it with --evacuate, or as \"evacuate\" in the inventory");
    }
    for (uint32_t i = 0; i < o->to.n; i++) {
        const struct lb_inv_host *h = &inv->hosts[o->to.ids[i]];

        if (lb_inv_has(&o->evacuate, o->to.ids[i])) {
            lb_fail(err, LB_E_USAGE, "host %s is to be emptied and filled", h->name);
            return lb_remedy(err, "leave it out of one of the two");
        }
        if (h->maintenance) {
            lb_fail(err, LB_E_USAGE, "host %s is in maintenance and takes no VMs", h->name);
            return lb_remedy(err, "end its maintenance, or name another host");
        }
    }
    return 0;
}

static int by_vm(const void *a, const void *b)
{
    const struct lb_plan_stay *x = a, *y = b;

    return x->vm != y->vm ? (x->vm > y->vm) - (x->vm < y->vm) : x->backup - y->backup;
}

int lb_plan_make(const struct lb_inventory *inv, const struct lb_plan_opts *opts, struct lb_plan *out,
                 struct lb_error *err)
{
    struct lb_plan p = {.n_hosts = inv->n_hosts};

    if (check(inv, opts, err))
        return -1;
    p.before = lb_alloc(inv->n_hosts * sizeof(*p.before));
    p.after = lb_alloc(inv->n_hosts * sizeof(*p.after));
    p.parallel = lb_alloc(inv->n_hosts * sizeof(*p.parallel));
    lb_plan_place(inv, opts, &p);
    lb_plan_time(inv, opts, &p);
    if (p.n_stays)
        qsort(p.stays, p.n_stays, sizeof(*p.stays), by_vm);
    *out = p;
    return 0;
}

void lb_plan_free(struct lb_plan *p)
{
    for (uint32_t i = 0; i < p->n_stays; i++) {
        free(p->stays[i].reason);
        free(p->stays[i].remedy);
    }
    free(p->steps);
    free(p->stays);
    free(p->before);
    free(p->after);
    free(p->parallel);
    *p = (struct lb_plan){0};
}
