/* migrate/plan_json.c - a plan as JSON: the same of `lifeboat plan` and of an evacuation. */
#include "core/json.h"
#include "migrate/plan.h"

static json_t *step(const struct lb_inventory *inv, const struct lb_plan_step *t)
{
    const struct lb_inv_vm *vm = &inv->vms[t->vm];

    return json_pack("{s:o, s:s, s:o, s:o, s:f, s:f, s:f, s:f, s:I, s:I, s:b, s:b, s:b}", "vm", lb_json_text(vm->name),
                     "kind", lb_plan_kind_name(t->kind), "from", lb_json_text(inv->hosts[t->from].name), "to",
                     lb_json_text(inv->hosts[t->to].name), "start_s", t->start_s, "end_s", t->end_s, "downtime_ms",
                     t->downtime_ms, "bytes", t->bytes, "memory_bytes", (json_int_t)vm->memory_bytes,
                     "dirty_bytes_per_s", (json_int_t)vm->dirty_bytes_per_s, "alone", t->alone, "throttled",
                     t->throttled, "suspended", t->suspended);
}

static json_t *stay(const struct lb_inventory *inv, const struct lb_plan_stay *s)
{
    const struct lb_inv_vm *vm = &inv->vms[s->vm];

    return json_pack("{s:o, s:o, s:b, s:o, s:o}", "vm", lb_json_text(vm->name), "host",
                     lb_json_text(inv->hosts[vm->host].name), "backup", s->backup, "reason", lb_json_text(s->reason),
                     "remedy", lb_json_text(s->remedy));
}

static json_t *host(const struct lb_inventory *inv, const struct lb_plan *p, uint32_t h)
{
    const struct lb_inv_host *of = &inv->hosts[h];

    return json_pack("{s:o, s:I, s:I, s:I, s:I, s:I, s:i, s:b}", "name", lb_json_text(of->name), "memory_bytes",
                     (json_int_t)of->memory_bytes, "reserved_bytes", (json_int_t)of->reserved_bytes,
                     "before_bytes", (json_int_t)p->before[h], "after_bytes", (json_int_t)p->after[h],
                     "link_bytes_per_s", (json_int_t)of->link_bytes_per_s, "parallel", (int)p->parallel[h],
                     "maintenance", of->maintenance);
}

json_t *lb_plan_json(const struct lb_inventory *inv, const struct lb_plan *p)
{
    json_t *steps = json_array(), *stays = json_array(), *hosts = json_array();

    for (uint32_t i = 0; i < p->n_steps; i++)
        json_array_append_new(steps, step(inv, &p->steps[i]));
    for (uint32_t i = 0; i < p->n_stays; i++)
        json_array_append_new(stays, stay(inv, &p->stays[i]));
    for (uint32_t h = 0; h < p->n_hosts; h++)
        json_array_append_new(hosts, host(inv, p, h));
    return json_pack("{s:o, s:o, s:o, s:f, s:f, s:f}", "steps", steps, "stays", stays, "hosts", hosts, "makespan_s",
                     p->makespan_s, "bytes", p->bytes, "margin", p->margin);
}
