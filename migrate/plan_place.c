/*
 * migrate/plan_place.c - which host each VM goes to.
 *
 * Units (VMs that must stay together) are placed one after the other: first those that few hosts can take, then the
 * largest. A unit goes where memory and link are used least afterwards; what then fits nowhere is given room by
 * moving one unit that was placed already. If some are left, all is done again packing hosts as full as they get,
 * which wastes less, and kept if it leaves fewer. Backups come last, by the same rules.
 *
 * Every choice looks at all hosts once: units x hosts, no more.
 */
#include <math.h>
#include <string.h>

#include "migrate/plan_internal.h"

#define REPAIR_TRIES 4096u   /* hosts looked at to make room for one unit */
#define REASONS 4u           /* hosts named when a VM fits nowhere */

enum why { FITS, WRONG_CPU, LACKS_FEATURE, LACKS_TAG, HAS_TAG, NOT_TOGETHER, NOT_APART, RUNS_IT, TOO_HOT,
           LACKS_MEMORY };
struct verdict {
    enum why why;
    uint32_t what;           /* word or VM */
    uint64_t bytes;
};
struct unit {
    uint32_t begin, n;       /* in place.members */
    uint64_t bytes;
    uint32_t host;           /* LB_INV_NONE: not placed */
    uint32_t options;        /* hosts that could take it if they were empty */
    bool blocked;
};
/* Members of each group, by word. */
struct groups {
    uint32_t *begin, *vms;
};
struct place {
    const struct lb_inventory *inv;
    const struct lb_plan_opts *opts;
    struct groups together, apart;
    uint32_t *targets, n_targets;
    uint32_t *others, n_others; /* that were not asked for, but could take VMs */
    uint64_t *load;          /* per host, as planned so far */
    double *incoming;        /* per host, bytes to be sent to it */
    uint32_t *where;         /* per VM, as planned so far */
    uint32_t *unit_of;       /* per VM; LB_INV_NONE: it does not leave */
    uint32_t *members, *order;
    struct unit *units;
    uint32_t n_units;
    uint32_t *mark, *mark_vm, stamp; /* per host: somebody there must be apart from the unit at hand */
    double drain_s;          /* all that comes, over all links */
    bool pack;
};

static uint64_t room(const struct place *p, uint32_t h)
{
    const struct lb_inv_host *host = &p->inv->hosts[h];
    uint64_t taken = host->reserved_bytes + p->load[h];

    return taken < host->memory_bytes ? host->memory_bytes - taken : 0;
}

/* ---------------------------------------------------------------------------- groups */

static const struct lb_inv_set *set_of(const struct lb_inv_vm *v, bool together)
{
    return together ? &v->together : &v->apart;
}

static void index_groups(const struct lb_inventory *inv, bool together, struct groups *g)
{
    size_t total = 0;

    g->begin = lb_alloc((inv->n_words + 2) * sizeof(*g->begin));
    for (uint32_t v = 0; v < inv->n_vms; v++) {
        const struct lb_inv_set *s = set_of(&inv->vms[v], together);

        for (uint32_t i = 0; i < s->n; i++)
            g->begin[s->ids[i] + 2]++;
        total += s->n;
    }
    for (uint32_t w = 2; w < inv->n_words + 2; w++)
        g->begin[w] += g->begin[w - 1];
    g->vms = lb_alloc((total + 1) * sizeof(*g->vms));
    for (uint32_t v = 0; v < inv->n_vms; v++) {
        const struct lb_inv_set *s = set_of(&inv->vms[v], together);

        for (uint32_t i = 0; i < s->n; i++)
            g->vms[g->begin[s->ids[i] + 1]++] = v;
    }
}

static bool leaves(const struct place *p, uint32_t vm)
{
    return lb_inv_has(&p->opts->evacuate, p->inv->vms[vm].host);
}

/* Everybody that is tied to vm by groups, and to those in turn. */
static void collect(struct place *p, uint32_t vm, uint32_t *n_members)
{
    struct unit *u = &p->units[p->n_units];

    *u = (struct unit){.begin = *n_members, .host = LB_INV_NONE};
    p->unit_of[vm] = p->n_units;
    p->members[(*n_members)++] = vm;
    for (uint32_t at = u->begin; at < *n_members; at++) {
        const struct lb_inv_vm *v = &p->inv->vms[p->members[at]];

        u->bytes += v->memory_bytes;
        u->blocked |= v->n_blockers > 0;
        for (uint32_t g = 0; g < v->together.n; g++) {
            uint32_t word = v->together.ids[g];

            for (uint32_t i = p->together.begin[word]; i < p->together.begin[word + 1]; i++) {
                uint32_t other = p->together.vms[i];

                if (p->unit_of[other] != LB_INV_NONE || !leaves(p, other))
                    continue;
                p->unit_of[other] = p->n_units;
                p->members[(*n_members)++] = other;
            }
        }
    }
    u->n = *n_members - u->begin;
    p->n_units++;
}

/* ----------------------------------------------------------------------- constraints */

/* First of what is needed and not there, or of what is there and must not be. */
static bool find(const struct lb_inv_set *want, const struct lb_inv_set *have, bool there, uint32_t *what)
{
    for (uint32_t i = 0; i < want->n; i++)
        if (lb_inv_has(have, want->ids[i]) == there) {
            *what = want->ids[i];
            return true;
        }
    return false;
}

static bool right_cpu(const struct lb_inv_vm *v, const struct lb_inv_host *h)
{
    if (v->cpu && (!h->cpu || strcmp(v->cpu, h->cpu)))
        return false;
    return v->generation <= h->generation;
}

/* What does not depend on the others that move. */
static struct verdict vm_suits(const struct lb_inventory *inv, uint32_t vm, uint32_t h)
{
    const struct lb_inv_vm *v = &inv->vms[vm];
    const struct lb_inv_host *host = &inv->hosts[h];
    struct verdict r = {FITS, vm, 0};

    if (!right_cpu(v, host))
        r.why = WRONG_CPU;
    else if (find(&v->features, &host->features, false, &r.what))
        r.why = LACKS_FEATURE;
    else if (find(&v->require_tags, &host->tags, false, &r.what))
        r.why = LACKS_TAG;
    else if (find(&v->forbid_tags, &host->tags, true, &r.what))
        r.why = HAS_TAG;
    return r;
}

/* Those of its groups that do not leave must be on h: on any one such host, if they are on several. */
static bool joins(const struct place *p, uint32_t vm, uint32_t h, uint32_t *other)
{
    const struct lb_inv_set *s = &p->inv->vms[vm].together;

    for (uint32_t g = 0; g < s->n; g++) {
        bool stays = false, here = false;

        for (uint32_t i = p->together.begin[s->ids[g]]; i < p->together.begin[s->ids[g] + 1] && !here; i++) {
            uint32_t m = p->together.vms[i];

            if (leaves(p, m))
                continue;
            stays = true;
            *other = m;
            here = p->inv->vms[m].host == h;
        }
        if (stays && !here)
            return false;
    }
    return true;
}

static struct verdict unit_suits(const struct place *p, const struct unit *u, uint32_t h)
{
    struct verdict r = {FITS, 0, 0};

    for (uint32_t i = 0; i < u->n; i++) {
        uint32_t vm = p->members[u->begin + i];
        const struct lb_inv_vm *v = &p->inv->vms[vm];

        r = vm_suits(p->inv, vm, h);
        if (r.why != FITS)
            return r;
        if (!joins(p, vm, h, &r.what))
            r.why = NOT_TOGETHER;
        else if (p->opts->hot == LB_PLAN_LEAVE && v->backup != h &&
                 LB_PLAN_MARGIN * (double)v->dirty_bytes_per_s > lb_plan_link(p->inv, v->host, h))
            r.why = TOO_HOT;
        if (r.why != FITS)
            return r;
    }
    return r;
}

/* Marks the hosts of those that must be apart from the unit; two of its own: *vm is one of them. */
static bool mark_apart(struct place *p, const struct unit *u, uint32_t *vm)
{
    p->stamp++;
    for (uint32_t i = 0; i < u->n; i++) {
        uint32_t me = p->members[u->begin + i];
        const struct lb_inv_set *s = &p->inv->vms[me].apart;

        for (uint32_t g = 0; g < s->n; g++)
            for (uint32_t k = p->apart.begin[s->ids[g]]; k < p->apart.begin[s->ids[g] + 1]; k++) {
                uint32_t other = p->apart.vms[k];

                if (other == me)
                    continue;
                if (p->unit_of[other] == p->unit_of[me]) {
                    *vm = other;
                    return false;
                }
                p->mark[p->where[other]] = p->stamp;
                p->mark_vm[p->where[other]] = other;
            }
    }
    return true;
}

/* A backup's memory is there already. */
static uint64_t needs(const struct place *p, const struct unit *u, uint32_t h)
{
    uint64_t bytes = u->bytes;

    for (uint32_t i = 0; i < u->n; i++) {
        const struct lb_inv_vm *v = &p->inv->vms[p->members[u->begin + i]];

        bytes -= v->backup == h ? v->memory_bytes : 0;
    }
    return bytes;
}

/* After mark_apart. */
static struct verdict fits(const struct place *p, const struct unit *u, uint32_t h)
{
    uint64_t need = needs(p, u, h), free_bytes = room(p, h);
    struct verdict r;

    if (p->mark[h] == p->stamp)
        return (struct verdict){NOT_APART, p->mark_vm[h], 0};
    if (need > free_bytes)
        return (struct verdict){LACKS_MEMORY, 0, need - free_bytes};
    r = unit_suits(p, u, h);
    return r;
}

/* ------------------------------------------------------------------------- placement */

/* Less is better. What has its backup there is hardly copied. */
static double score(const struct place *p, uint64_t need, uint64_t bytes, uint32_t h)
{
    const struct lb_inv_host *host = &p->inv->hosts[h];
    double swapped = bytes ? (double)(bytes - need) / (double)bytes : 0;
    double usable = (double)(host->memory_bytes - LB_MIN(host->reserved_bytes, host->memory_bytes));
    double busy_s = (p->incoming[h] + (double)need) / (double)host->link_bytes_per_s;

    if (p->pack)
        return (double)(room(p, h) - need) / (double)LB_INV_MAX_BYTES - swapped;
    return (usable > 0 ? ((double)p->load[h] + (double)need) / usable : 1) +
           (p->drain_s > 0 ? busy_s / p->drain_s / 2 : 0) - 10 * swapped;
}

static void put(struct place *p, struct unit *u, uint32_t h, int sign)
{
    uint64_t need = needs(p, u, h);

    p->load[h] = sign > 0 ? p->load[h] + need : p->load[h] - need;
    p->incoming[h] += sign * (double)need;
    u->host = sign > 0 ? h : LB_INV_NONE;
    for (uint32_t i = 0; i < u->n; i++) {
        uint32_t vm = p->members[u->begin + i];

        p->where[vm] = sign > 0 ? h : p->inv->vms[vm].host;
    }
}

static bool place_unit(struct place *p, struct unit *u, uint32_t except, uint32_t *tries)
{
    uint32_t best = LB_INV_NONE, other;
    double best_score = INFINITY;

    if (!mark_apart(p, u, &other))
        return false;
    for (uint32_t t = 0; t < p->n_targets && *tries; t++, (*tries)--) {
        uint32_t h = p->targets[t];
        double s;

        if (h == except || fits(p, u, h).why != FITS)
            continue;
        s = score(p, needs(p, u, h), u->bytes, h);
        if (s < best_score) {
            best_score = s;
            best = h;
        }
    }
    if (best == LB_INV_NONE)
        return false;
    put(p, u, best, 1);
    return true;
}

/* Can u go to h once another unit has left it? */
static bool make_room(struct place *p, struct unit *u, uint32_t h, uint64_t lacking, uint32_t *tries)
{
    for (uint32_t i = 0; i < p->n_units && *tries; i++) {
        struct unit *v = &p->units[p->order[i]];

        if (v->host != h || needs(p, v, h) < lacking)
            continue;
        put(p, v, h, -1);
        if (place_unit(p, v, h, tries)) {
            put(p, u, h, 1);
            return true;
        }
        put(p, v, h, 1);
    }
    return false;
}

static bool repair(struct place *p, struct unit *u)
{
    uint32_t tries = REPAIR_TRIES, other;

    for (uint32_t t = 0; t < p->n_targets && tries; t++) {
        struct verdict r;

        if (!mark_apart(p, u, &other))
            return false;
        r = fits(p, u, p->targets[t]);
        if (r.why == LACKS_MEMORY && unit_suits(p, u, p->targets[t]).why == FITS &&
            make_room(p, u, p->targets[t], r.bytes, &tries))
            return true;
    }
    return false;
}

/* Returns the bytes of units that fit nowhere. */
static uint64_t place_all(struct place *p, bool pack)
{
    uint64_t left = 0;

    p->pack = pack;
    for (uint32_t i = 0; i < p->n_units; i++)
        if (p->units[i].host != LB_INV_NONE)
            put(p, &p->units[i], p->units[i].host, -1);
    for (uint32_t i = 0; i < p->n_units; i++) {
        struct unit *u = &p->units[p->order[i]];
        uint32_t all = UINT32_MAX;

        if (!u->blocked && !place_unit(p, u, LB_INV_NONE, &all) && !repair(p, u))
            left += u->bytes;
    }
    return left;
}

static int by_difficulty(const void *a, const void *b, void *arg)
{
    const struct place *p = arg;
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    const struct unit *u = &p->units[x], *v = &p->units[y];
    /* half as many options are a difference, one less of many is none */
    int s = u->options ? ilogb(u->options) : -1, t = v->options ? ilogb(v->options) : -1;

    if (s != t)
        return s < t ? -1 : 1;
    if (u->bytes != v->bytes)
        return u->bytes > v->bytes ? -1 : 1;
    return (x > y) - (x < y);
}

static void place_units(struct place *p)
{
    double links = 0, bytes = 0;

    for (uint32_t i = 0; i < p->n_targets; i++)
        links += (double)p->inv->hosts[p->targets[i]].link_bytes_per_s;
    for (uint32_t i = 0; i < p->n_units; i++) {
        struct unit *u = &p->units[i];

        p->order[i] = i;
        bytes += (double)u->bytes;
        for (uint32_t t = 0; t < p->n_targets; t++)
            u->options += unit_suits(p, u, p->targets[t]).why == FITS;
    }
    p->drain_s = links > 0 ? bytes / links : 0;
    qsort_r(p->order, p->n_units, sizeof(*p->order), by_difficulty, p);
    if (p->n_units) {
        uint64_t spread = place_all(p, false);

        if (spread && place_all(p, true) >= spread)
            place_all(p, false);
    }
}

/* --------------------------------------------------------------------------- reasons */

struct refusal {
    uint32_t host;
    struct verdict v;
};

/* What is lacking least first: it is the easiest to help with. */
static int by_hope(const void *a, const void *b)
{
    const struct refusal *x = a, *y = b;
    bool mx = x->v.why == LACKS_MEMORY, my = y->v.why == LACKS_MEMORY;

    if (mx != my)
        return mx ? -1 : 1;
    if (x->v.bytes != y->v.bytes)
        return x->v.bytes < y->v.bytes ? -1 : 1;
    return (x->host > y->host) - (x->host < y->host);
}

static void say(FILE *f, const struct place *p, const struct refusal *r)
{
    const struct lb_inventory *inv = p->inv;
    char bytes[32];

    fprintf(f, "host %s ", inv->hosts[r->host].name);
    switch (r->v.why) {
    case FITS:
        break;
    case WRONG_CPU:
        fprintf(f, "has not the processor that %s needs", inv->vms[r->v.what].name);
        break;
    case LACKS_FEATURE:
        fprintf(f, "lacks %s", inv->words[r->v.what]);
        break;
    case LACKS_TAG:
        fprintf(f, "has no tag %s", inv->words[r->v.what]);
        break;
    case HAS_TAG:
        fprintf(f, "has the forbidden tag %s", inv->words[r->v.what]);
        break;
    case NOT_TOGETHER:
        fprintf(f, "is not where %s is", inv->vms[r->v.what].name);
        break;
    case NOT_APART:
        fprintf(f, "runs %s, from which it is to be apart", inv->vms[r->v.what].name);
        break;
    case RUNS_IT:
        fprintf(f, "runs it itself");
        break;
    case TOO_HOT:
        fprintf(f, "has no link as fast as memory is dirtied");
        break;
    case LACKS_MEMORY:
        fprintf(f, "lacks %s", lb_human_bytes(bytes, sizeof(bytes), (double)r->v.bytes));
        break;
    }
}

/* Frees list. */
static char *refusals(const struct place *p, struct refusal *list, uint32_t n)
{
    char *text = NULL;
    size_t len;
    FILE *f = open_memstream(&text, &len);

    if (!n)
        fprintf(f, "there is no host to go to");
    else
        qsort(list, n, sizeof(*list), by_hope);
    for (uint32_t i = 0; i < n && i < REASONS; i++) {
        fputs(i ? "; " : "", f);
        say(f, p, &list[i]);
    }
    if (n > REASONS)
        fprintf(f, "; and %u more hosts", n - REASONS);
    fclose(f);
    free(list);
    return text;
}

static char *why_nowhere(struct place *p, const struct unit *u)
{
    struct refusal *list;
    uint32_t other;

    if (!mark_apart(p, u, &other))
        return lb_asprintf("it is to be apart from %s and together with it", p->inv->vms[other].name);
    list = lb_alloc((p->n_targets + 1) * sizeof(*list));
    for (uint32_t t = 0; t < p->n_targets; t++) {
        struct verdict v = unit_suits(p, u, p->targets[t]);

        list[t] = (struct refusal){p->targets[t], v.why != FITS ? v : fits(p, u, p->targets[t])};
    }
    return refusals(p, list, p->n_targets);
}

static void stay_blocked(struct place *p, struct lb_plan *plan, const struct unit *u)
{
    const struct lb_inv_vm *blocked = NULL;

    for (uint32_t i = 0; i < u->n && !blocked; i++)
        if (p->inv->vms[p->members[u->begin + i]].n_blockers)
            blocked = &p->inv->vms[p->members[u->begin + i]];
    for (uint32_t i = 0; i < u->n; i++) {
        uint32_t vm = p->members[u->begin + i];
        const struct lb_inv_vm *v = &p->inv->vms[vm];

        for (uint32_t b = 0; b < v->n_blockers; b++)
            lb_plan_add_stay(plan, vm, false, lb_strdup(v->blockers[b].message), v->blockers[b].remedy);
        if (!v->n_blockers && blocked)
            lb_plan_add_stay(plan, vm, false,
                             lb_asprintf("it is to be together with %s, which cannot leave: %s", blocked->name,
                                         blocked->blockers[0].message), blocked->blockers[0].remedy);
    }
}

static void emit_unit(struct place *p, struct lb_plan *plan, struct unit *u)
{
    if (u->blocked) {
        stay_blocked(p, plan, u);
        return;
    }
    for (uint32_t i = 0; i < u->n; i++) {
        uint32_t vm = p->members[u->begin + i];
        const struct lb_inv_vm *v = &p->inv->vms[vm];

        if (u->host == LB_INV_NONE) {
            lb_plan_add_stay(plan, vm, false, why_nowhere(p, u), "make room, allow more hosts, or suspend it");
            continue;
        }
        lb_plan_add_step(plan, v->backup == u->host ? LB_PLAN_SWAP : LB_PLAN_COPY, vm, v->host, u->host);
        p->load[v->host] -= v->memory_bytes;
    }
}

/* --------------------------------------------------------------------------- backups */

static bool needs_backup(const struct place *p, uint32_t vm)
{
    const struct lb_inv_vm *v = &p->inv->vms[vm];

    return v->backup != LB_INV_NONE && (p->where[vm] == v->backup || lb_inv_has(&p->opts->evacuate, v->backup));
}

static struct verdict backup_fits(const struct place *p, uint32_t vm, uint32_t h)
{
    const struct lb_inv_vm *v = &p->inv->vms[vm];
    uint64_t free_bytes = room(p, h);

    if (h == p->where[vm])
        return (struct verdict){RUNS_IT, vm, 0};
    if (v->memory_bytes > free_bytes)
        return (struct verdict){LACKS_MEMORY, 0, v->memory_bytes - free_bytes};
    return vm_suits(p->inv, vm, h);
}

static const char *remedy_of_backup(const struct place *p, uint32_t vm)
{
    if (p->where[vm] == p->inv->vms[vm].backup)
        return "trust one more host, or make room; where it runs then, its protection looks for one by itself as well";
    return "it keeps the old one: trust one more host, make room, or end its protection";
}

/* The best of them; LB_INV_NONE: none. Appends to list why. */
static uint32_t best_backup(const struct place *p, uint32_t vm, const uint32_t *hosts, uint32_t n, struct refusal *list)
{
    uint64_t bytes = p->inv->vms[vm].memory_bytes;
    uint32_t best = LB_INV_NONE;
    double best_score = INFINITY;

    for (uint32_t t = 0; t < n; t++) {
        uint32_t h = hosts[t];
        double s;

        list[t] = (struct refusal){h, backup_fits(p, vm, h)};
        if (list[t].v.why != FITS)
            continue;
        s = score(p, bytes, bytes, h);
        if (s < best_score) {
            best_score = s;
            best = h;
        }
    }
    return best;
}

/* Hosts that were not asked for are better than none: where VMs run is what was asked. */
static void place_backup(struct place *p, struct lb_plan *plan, uint32_t vm)
{
    const struct lb_inv_vm *v = &p->inv->vms[vm];
    struct refusal *list = lb_alloc((p->n_targets + p->n_others + 1) * sizeof(*list));
    uint32_t best = best_backup(p, vm, p->targets, p->n_targets, list);

    if (best == LB_INV_NONE)
        best = best_backup(p, vm, p->others, p->n_others, list + p->n_targets);
    if (best == LB_INV_NONE) {
        lb_plan_add_stay(plan, vm, true, refusals(p, list, p->n_targets + p->n_others), remedy_of_backup(p, vm));
        return;
    }
    free(list);
    lb_plan_add_step(plan, LB_PLAN_BACKUP, vm, p->where[vm], best);
    p->load[best] += v->memory_bytes;
    p->incoming[best] += (double)v->touched_bytes;
    if (p->where[vm] != v->backup) /* else the backup became the VM */
        p->load[v->backup] -= v->memory_bytes;
}

static int by_memory(const void *a, const void *b, void *arg)
{
    const struct lb_inventory *inv = arg;
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    uint64_t m = inv->vms[x].memory_bytes, n = inv->vms[y].memory_bytes;

    return m != n ? (m < n) - (m > n) : (x > y) - (x < y);
}

static void place_backups(struct place *p, struct lb_plan *plan)
{
    LB_AUTO_FREE uint32_t *list = lb_alloc((p->inv->n_vms + 1) * sizeof(*list));
    uint32_t n = 0;

    for (uint32_t vm = 0; vm < p->inv->n_vms; vm++)
        if (needs_backup(p, vm))
            list[n++] = vm;
    qsort_r(list, n, sizeof(*list), by_memory, (void *)p->inv);
    for (uint32_t i = 0; i < n; i++)
        place_backup(p, plan, list[i]);
}

/* ------------------------------------------------------------------------------- all */

static void prepare(struct place *p)
{
    const struct lb_inventory *inv = p->inv;
    uint32_t n_members = 0;

    for (uint32_t h = 0; h < inv->n_hosts; h++) {
        bool asked = !p->opts->to.n || lb_inv_has(&p->opts->to, h);

        p->load[h] = inv->hosts[h].used_bytes;
        if (inv->hosts[h].maintenance || lb_inv_has(&p->opts->evacuate, h))
            continue;
        if (asked)
            p->targets[p->n_targets++] = h;
        else
            p->others[p->n_others++] = h;
    }
    for (uint32_t v = 0; v < inv->n_vms; v++) {
        const struct lb_inv_vm *vm = &inv->vms[v];

        p->where[v] = vm->host;
        p->unit_of[v] = LB_INV_NONE;
        p->load[vm->host] += vm->memory_bytes;
        if (vm->backup != LB_INV_NONE)
            p->load[vm->backup] += vm->memory_bytes;
    }
    index_groups(inv, true, &p->together);
    index_groups(inv, false, &p->apart);
    for (uint32_t v = 0; v < inv->n_vms; v++)
        if (leaves(p, v) && p->unit_of[v] == LB_INV_NONE)
            collect(p, v, &n_members);
}

void lb_plan_place(const struct lb_inventory *inv, const struct lb_plan_opts *opts, struct lb_plan *plan)
{
    size_t hosts = (size_t)inv->n_hosts + 1, vms = (size_t)inv->n_vms + 1;
    LB_AUTO_FREE uint32_t *per_host = lb_alloc(4 * hosts * sizeof(uint32_t));
    LB_AUTO_FREE uint32_t *per_vm = lb_alloc(4 * vms * sizeof(uint32_t));
    LB_AUTO_FREE double *incoming = lb_alloc(hosts * sizeof(double));
    LB_AUTO_FREE struct unit *units = lb_alloc(vms * sizeof(struct unit));
    struct place p = {.inv = inv, .opts = opts, .units = units, .load = plan->after, .incoming = incoming};

    p.targets = per_host;
    p.mark = per_host + hosts;
    p.mark_vm = per_host + 2 * hosts;
    p.others = per_host + 3 * hosts;
    p.where = per_vm;
    p.unit_of = per_vm + vms;
    p.members = per_vm + 2 * vms;
    p.order = per_vm + 3 * vms;
    prepare(&p);
    memcpy(plan->before, p.load, inv->n_hosts * sizeof(*plan->before));
    place_units(&p);
    for (uint32_t i = 0; i < p.n_units; i++)
        emit_unit(&p, plan, &units[i]);
    place_backups(&p, plan);
    free(p.together.begin);
    free(p.together.vms);
    free(p.apart.begin);
    free(p.apart.vms);
}
