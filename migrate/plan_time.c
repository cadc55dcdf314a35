/*
 * migrate/plan_time.c - when each step runs, and how many at once.
 *
 * The model. A transfer needs setup_s of a CPU at both ends (shared when there are more of them than CPUs), then
 * its share w of the links: the link out of its source divided by the transfers on it, or the link into
 * its destination likewise, whichever is less. Rounds of pre-copy send T, then what was dirtied meanwhile, T d/w,
 * then T (d/w)^2 ...: a geometric series, which is the same as memory that shrinks by w - d each second. It pauses
 * when the rest takes downtime_ms, or is what a first round leaves if that is less.
 *
 * So k at once on a link cost more bytes the more is dirtied (each takes k times as long), and hide k - 1 of k setups.
 * Where the optimum lies depends on both: it is searched by simulation, with several orders.
 * A transfer that is set up joins a link only if all shares of it stay well above what their guests dirty (how far
 * above is searched, too); one too hot for company waits until it is alone. One that is too hot even then is throttled to half of the link, suspended, or left.
 */
#include <assert.h>
#include <math.h>
#include <string.h>

#include "migrate/plan_internal.h"

enum phase { WAITING, SETUP, READY, COPYING, PAUSED, DONE };
/* What a swap has to send: what was dirtied in the last epoch. */
#define SWAP_EPOCH_S 0.025
#define WINDOW 64u            /* of a queue looked at for one that may start now */
#define BUDGET 20000000u      /* steps of simulation spent on improving a plan */
/* What fewer at once may cost: each guest stands still for less then (of 100 VMs the median 23 ms at 4 at once, 42 at 8, in the same
 * time), and less is under way when something breaks. */
#define FEWER_COSTS 1.02

struct job {
    uint32_t step, src, dst, after;  /* after: a job, or LB_INV_NONE */
    uint32_t priority;
    bool first;                      /* before all others of the host */
    enum lb_plan_kind kind;
    double touched, dirty, link;
    bool pause_first;
    /* of the running simulation */
    enum phase phase;
    double left, rate, speed;        /* left: bytes, or seconds of setup; rate: bytes/s; speed: of `left` */
    double start_s, end_s, pause_s, bytes;
};
struct host {
    double link, cpus;
    uint32_t begin, end, next;       /* its queue in the order */
    uint32_t out, setups, sending, receiving;  /* out: begun and not done */
    double hottest_out, hottest_in;
};
struct sim {
    const struct lb_inventory *inv;
    struct job *jobs;
    struct host *hosts;
    uint32_t *order, *best_order, *active, *k, *best_k, *sources;
    uint32_t n, n_active, n_done, n_sources;
    double aim_s, margin, best_margin, best_s;
    uint64_t work;
};

/* ----------------------------------------------------------------------- simulation */

static bool sends(const struct job *j)
{
    return j->phase == COPYING || j->phase == PAUSED;
}

/* Alone it may always; else everybody on its links must still gain. */
static bool admits(const struct sim *s, const struct job *j)
{
    const struct host *a = &s->hosts[j->src], *b = &s->hosts[j->dst];

    if (!a->sending && !b->receiving)
        return true;
    return a->link / (a->sending + 1) >= s->margin * fmax(a->hottest_out, j->dirty) &&
           b->link / (b->receiving + 1) >= s->margin * fmax(b->hottest_in, j->dirty);
}

static void join(struct sim *s, const struct job *j)
{
    struct host *a = &s->hosts[j->src], *b = &s->hosts[j->dst];

    a->sending++;
    b->receiving++;
    a->hottest_out = fmax(a->hottest_out, j->dirty);
    b->hottest_in = fmax(b->hottest_in, j->dirty);
}

/* Who sends, and who may begin to. */
static void share_links(struct sim *s)
{
    for (uint32_t i = 0; i < s->n_active; i++)
        if (sends(&s->jobs[s->active[i]]))
            join(s, &s->jobs[s->active[i]]);
    for (uint32_t i = 0; i < s->n_active; i++) {
        struct job *j = &s->jobs[s->active[i]];

        if (j->phase == READY && admits(s, j)) {
            j->phase = j->pause_first ? PAUSED : COPYING;
            j->left = j->touched;
            join(s, j);
        }
    }
}

static void start(struct sim *s, uint32_t i, double now)
{
    struct job *j = &s->jobs[i];

    j->phase = SETUP;
    j->left = j->kind == LB_PLAN_SWAP ? 0 : s->inv->setup_s;
    j->start_s = now;
    s->hosts[j->src].out++;
    s->active[s->n_active++] = i;
}

static void admit(struct sim *s, double now)
{
    for (uint32_t q = 0; q < s->n_sources; q++) {
        struct host *h = &s->hosts[s->sources[q]];
        uint32_t looked = 0;

        while (h->next < h->end && s->jobs[s->order[h->next]].phase != WAITING)
            h->next++;
        for (uint32_t i = h->next; i < h->end && looked < WINDOW && h->out < s->k[s->sources[q]]; i++) {
            const struct job *j = &s->jobs[s->order[i]];

            if (j->phase != WAITING)
                continue;
            looked++;
            if (j->after == LB_INV_NONE || s->jobs[j->after].phase == DONE)
                start(s, s->order[i], now);
        }
    }
}

static double rest(const struct sim *s, const struct job *j)
{
    return fmin(j->rate * s->aim_s, j->dirty * j->touched / j->rate);
}

/* Shares of links and CPUs; returns the time to the next end of a phase. */
static double shares(struct sim *s)
{
    double dt = INFINITY;

    for (uint32_t i = 0; i < s->n_active; i++)
        s->hosts[s->jobs[s->active[i]].src].setups = s->hosts[s->jobs[s->active[i]].dst].setups = 0;
    for (uint32_t i = 0; i < s->n_active; i++) {
        const struct job *j = &s->jobs[s->active[i]];

        s->hosts[j->src].setups += j->phase == SETUP;
        s->hosts[j->dst].setups += j->phase == SETUP;
    }
    for (uint32_t i = 0; i < s->n_active; i++) {
        struct job *j = &s->jobs[s->active[i]];
        const struct host *a = &s->hosts[j->src], *b = &s->hosts[j->dst];
        double left = j->left;

        if (j->phase == READY)
            continue;
        if (j->phase == SETUP) {
            j->speed = fmin(1, fmin(a->cpus / a->setups, b->cpus / b->setups));
        } else {
            j->rate = fmin(a->link / a->sending, b->link / b->receiving);
            j->speed = j->phase == COPYING ? j->rate - j->dirty : j->rate;
            left -= j->phase == COPYING ? rest(s, j) : 0;
        }
        dt = fmin(dt, fmax(left, 0) / j->speed);
    }
    s->work += s->n_active;
    return dt;
}

static void next_phase(struct sim *s, struct job *j, double now)
{
    switch (j->phase) {
    case SETUP:
        j->phase = READY;
        return;
    case COPYING:
        if (j->kind != LB_PLAN_BACKUP) {
            j->phase = PAUSED;
            return;
        }
        break;
    default:
        break;
    }
    j->phase = DONE;
    j->end_s = now;
    s->hosts[j->src].out--;
    s->n_done++;
}

static void advance(struct sim *s, double dt, double now)
{
    uint32_t kept = 0;

    for (uint32_t i = 0; i < s->n_active; i++) {
        struct job *j = &s->jobs[s->active[i]];
        double end = j->phase == COPYING ? rest(s, j) : 0;

        if (j->phase == READY)
            continue;
        j->left = fmax(j->left - j->speed * dt, 0);
        j->bytes += sends(j) ? j->rate * dt : 0;
        j->pause_s += j->phase == PAUSED ? dt : 0;
        /* a nanosecond's worth is an error of rounding */
        if (j->left - end <= j->speed * 1e-9)
            next_phase(s, j, now);
    }
    for (uint32_t i = 0; i < s->n_active; i++) {
        struct host *a = &s->hosts[s->jobs[s->active[i]].src], *b = &s->hosts[s->jobs[s->active[i]].dst];

        a->sending = b->receiving = 0;
        a->hottest_out = b->hottest_in = 0;
        if (s->jobs[s->active[i]].phase != DONE)
            s->active[kept++] = s->active[i];
    }
    s->n_active = kept;
    share_links(s);
}

/* With s->order and s->k; returns the makespan. */
static double simulate(struct sim *s)
{
    double now = 0;

    for (uint32_t i = 0; i < s->n; i++) {
        struct job *j = &s->jobs[i];

        j->phase = WAITING;
        j->pause_s = j->bytes = 0;
    }
    for (uint32_t q = 0; q < s->n_sources; q++)
        s->hosts[s->sources[q]].next = s->hosts[s->sources[q]].begin;
    s->n_active = s->n_done = 0;
    while (s->n_done < s->n) {
        double dt;

        admit(s, now);
        assert(s->n_active); /* every job can run alone, and waits only for those of other queues */
        dt = shares(s);
        now += dt;
        advance(s, dt, now);
    }
    return now;
}

/* --------------------------------------------------------------------------- orders */

enum order { LONGEST_FIRST, HOT_LAST, HOT_FIRST, N_ORDERS };
struct sorting {
    const struct sim *s;
    enum order order;
};

static double alone_s(const struct job *j)
{
    return j->touched / (j->link - (j->pause_first ? 0 : j->dirty));
}

static int compare(double a, double b)
{
    return (a > b) - (a < b);
}

static int by_order(const void *a, const void *b, void *arg)
{
    const struct sorting *o = arg;
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    const struct job *p = &o->s->jobs[x], *q = &o->s->jobs[y];
    int c;

    if (p->src != q->src)
        return p->src < q->src ? -1 : 1;
    if (p->first != q->first)
        return p->first ? -1 : 1;
    if (p->priority != q->priority)
        return p->priority > q->priority ? -1 : 1;
    c = o->order == LONGEST_FIRST ? 0 : compare(p->dirty / p->link, q->dirty / q->link);
    if (c)
        return o->order == HOT_LAST ? c : -c;
    c = compare(alone_s(q), alone_s(p));
    return c ? c : (x > y) - (x < y);
}

static void set_order(struct sim *s, enum order order)
{
    struct sorting o = {s, order};

    for (uint32_t i = 0; i < s->n; i++)
        s->order[i] = i;
    qsort_r(s->order, s->n, sizeof(*s->order), by_order, &o);
}

/* Keep order and k if they are better than all before; equal ones are not. */
static bool try(struct sim *s)
{
    double t = simulate(s);

    if (t >= s->best_s * (1 - 1e-6))
        return false;
    s->best_s = t;
    s->best_margin = s->margin;
    memcpy(s->best_k, s->k, s->inv->n_hosts * sizeof(*s->k));
    memcpy(s->best_order, s->order, s->n * sizeof(*s->order));
    return true;
}

/* Each host by itself: fewer or more at once than the others? */
static void improve(struct sim *s)
{
    static const int change[] = {-1, 1, -2, 2, 4};
    bool better = s->n_sources > 1;

    while (better) {
        better = false;
        for (uint32_t q = 0; q < s->n_sources; q++) {
            uint32_t h = s->sources[q];

            for (size_t c = 0; c < LB_ARRAY_LEN(change); c++) {
                if (s->work > BUDGET)
                    return;
                memcpy(s->k, s->best_k, s->inv->n_hosts * sizeof(*s->k));
                memcpy(s->order, s->best_order, s->n * sizeof(*s->order));
                s->margin = s->best_margin;
                if ((int)s->k[h] + change[c] < 1)
                    continue;
                s->k[h] += (uint32_t)change[c];
                better |= try(s);
            }
        }
    }
}

static const uint32_t AT_ONCE[] = {1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48};

/* Every number at once in one order; all hosts the same. */
static void try_numbers(struct sim *s, uint32_t parallel)
{
    for (size_t c = 0; c < LB_ARRAY_LEN(AT_ONCE); c++) {
        for (uint32_t h = 0; h < s->inv->n_hosts; h++)
            s->k[h] = parallel ? parallel : AT_ONCE[c];
        try(s);
        if (parallel || s->work > BUDGET)
            return;
    }
}

/* The least number at once that takes hardly longer than the best. */
static void take_fewer(struct sim *s)
{
    double t;

    s->margin = s->best_margin;
    memcpy(s->order, s->best_order, s->n * sizeof(*s->order));
    for (size_t c = 0; c < LB_ARRAY_LEN(AT_ONCE); c++) {
        for (uint32_t h = 0; h < s->inv->n_hosts; h++)
            s->k[h] = LB_MIN(AT_ONCE[c], s->best_k[h]);
        t = simulate(s);
        if (t > s->best_s * FEWER_COSTS)
            continue;
        s->best_s = t;
        memcpy(s->best_k, s->k, s->inv->n_hosts * sizeof(*s->k));
        return;
    }
}

static void search(struct sim *s, uint32_t parallel)
{
    static const double margins[] = {LB_PLAN_MARGIN, 2, 4, 16};

    s->best_s = INFINITY;
    for (int o = 0; o < N_ORDERS; o++) {
        set_order(s, (enum order)o);
        for (size_t m = 0; m < LB_ARRAY_LEN(margins); m++) {
            s->margin = margins[m];
            try_numbers(s, parallel);
        }
    }
    if (!parallel) {
        improve(s);
        take_fewer(s);
    }
    memcpy(s->k, s->best_k, s->inv->n_hosts * sizeof(*s->k));
    memcpy(s->order, s->best_order, s->n * sizeof(*s->order));
    s->margin = s->best_margin;
    simulate(s);
}

/* ---------------------------------------------------------------------------- steps */

static void job_of_step(struct sim *s, const struct lb_plan_opts *opts, struct lb_plan_step *t, struct job *j)
{
    const struct lb_inv_vm *v = &s->inv->vms[t->vm];

    j->src = t->from;
    j->dst = t->to;
    j->after = LB_INV_NONE;
    j->priority = v->priority;
    j->kind = t->kind;
    j->touched = (double)v->touched_bytes;
    j->dirty = (double)v->dirty_bytes_per_s;
    j->link = lb_plan_link(s->inv, t->from, t->to);
    j->pause_first = t->kind == LB_PLAN_SWAP;
    j->first = t->kind == LB_PLAN_BACKUP && t->from == v->host;
    if (t->kind == LB_PLAN_SWAP) { /* only the last epoch is left to send */
        j->touched = fmin(j->dirty * SWAP_EPOCH_S, j->touched);
        j->dirty = 0;
        return;
    }
    t->alone = 2 * LB_PLAN_MARGIN * j->dirty > j->link;
    if (LB_PLAN_MARGIN * j->dirty <= j->link)
        return;
    /* a backup cannot be sent to one that is suspended: it is slowed meanwhile */
    t->suspended = opts->hot == LB_PLAN_SUSPEND && t->kind == LB_PLAN_COPY;
    t->throttled = !t->suspended;
    j->pause_first = t->suspended;
    j->dirty = t->suspended ? 0 : j->link / 2;
}

/* A backup of a VM that moves comes after the move. */
static void add_dependencies(struct sim *s, const struct lb_plan *p)
{
    LB_AUTO_FREE uint32_t *moved = lb_alloc((s->inv->n_vms + 1) * sizeof(*moved));

    for (uint32_t i = 0; i < s->n; i++)
        if (p->steps[i].kind != LB_PLAN_BACKUP)
            moved[p->steps[i].vm] = i + 1;
    for (uint32_t i = 0; i < s->n; i++)
        if (p->steps[i].kind == LB_PLAN_BACKUP && moved[p->steps[i].vm])
            s->jobs[i].after = moved[p->steps[i].vm] - 1;
}

/* Where each host's queue lies in the order: the same in every order. */
static void find_queues(struct sim *s)
{
    set_order(s, LONGEST_FIRST);
    for (uint32_t i = 0; i < s->n; i++) {
        uint32_t src = s->jobs[s->order[i]].src;

        if (!i || s->jobs[s->order[i - 1]].src != src) {
            s->sources[s->n_sources++] = src;
            s->hosts[src].begin = i;
        }
        s->hosts[src].end = i + 1;
    }
}

static int by_start(const void *a, const void *b)
{
    const struct lb_plan_step *x = a, *y = b;
    int c = compare(x->start_s, y->start_s);

    c = c ? c : compare(x->end_s, y->end_s);
    return c ? c : x->vm != y->vm ? (x->vm > y->vm) - (x->vm < y->vm) : (int)x->kind - (int)y->kind;
}

static void take_results(const struct sim *s, struct lb_plan *p)
{
    p->makespan_s = s->best_s;
    p->margin = s->best_margin;
    for (uint32_t i = 0; i < s->n; i++) {
        const struct job *j = &s->jobs[i];

        p->steps[i].start_s = j->start_s;
        p->steps[i].end_s = j->end_s;
        p->steps[i].downtime_ms = j->pause_s * 1000;
        p->steps[i].bytes = j->bytes;
        p->bytes += j->bytes;
    }
    for (uint32_t q = 0; q < s->n_sources; q++)
        p->parallel[s->sources[q]] = s->k[s->sources[q]];
    qsort(p->steps, p->n_steps, sizeof(*p->steps), by_start);
}

void lb_plan_time(const struct lb_inventory *inv, const struct lb_plan_opts *opts, struct lb_plan *p)
{
    struct sim s = {.inv = inv, .n = p->n_steps, .aim_s = inv->downtime_ms / 1000};
    LB_AUTO_FREE struct job *jobs = lb_alloc((p->n_steps + 1) * sizeof(*jobs));
    LB_AUTO_FREE struct host *hosts = lb_alloc((inv->n_hosts + 1) * sizeof(*hosts));
    LB_AUTO_FREE uint32_t *numbers = lb_alloc((3 * (size_t)s.n + 3 * (size_t)inv->n_hosts + 1) * sizeof(*numbers));

    if (!s.n)
        return;
    s.jobs = jobs;
    s.hosts = hosts;
    s.order = numbers;
    s.best_order = s.order + s.n;
    s.active = s.best_order + s.n;
    s.k = s.active + s.n;
    s.best_k = s.k + inv->n_hosts;
    s.sources = s.best_k + inv->n_hosts;
    for (uint32_t h = 0; h < inv->n_hosts; h++) {
        hosts[h].link = (double)inv->hosts[h].link_bytes_per_s;
        hosts[h].cpus = inv->hosts[h].cpus;
    }
    for (uint32_t i = 0; i < s.n; i++)
        job_of_step(&s, opts, &p->steps[i], &jobs[i]);
    add_dependencies(&s, p);
    find_queues(&s);
    search(&s, opts->parallel);
    take_results(&s, p);
}
