/*
 * cmd/daemon/maintenance.c - maintenance mode as requests see it, and what has left this host: all of it is in
 * maintenance.json (migrate/maintenance.h), and is read there each time.
 */
#include "cmd/daemon/evac.h"

#include <string.h>

#include "migrate/maintenance.h"

#define RETURNS_AT_ONCE 4u

bool lb_maintenance_is_on(struct daemon *d)
{
    struct lb_maintenance m;
    bool on;

    lb_maintenance_load(d->opt.state_dir, &m, NULL);
    on = m.on;
    lb_maintenance_free(&m);
    return on;
}

/* reason NULL: as it is. */
int lb_maintenance_set(struct daemon *d, bool on, const char *reason, bool keep_left, struct lb_error *err)
{
    struct lb_maintenance m;
    int rc = lb_maintenance_load(d->opt.state_dir, &m, err);

    if (!rc) {
        if (on && !m.on)
            m.since_ms = lb_wall_ms();
        if (reason)
            snprintf(m.reason, sizeof(m.reason), "%.127s", reason);
        if (!on && !keep_left)
            m.n_left = 0;
        m.on = on;
        rc = lb_maintenance_save(d->opt.state_dir, &m, err);
    }
    lb_maintenance_free(&m);
    return rc;
}

/* What leaves is written down before it does; what has not left, or is back, is taken out. */
int lb_maintenance_note(struct daemon *d, const struct lb_evac_item *it, bool leaves, struct lb_error *err)
{
    struct lb_maintenance m;
    struct lb_left_vm *v;
    int rc = 0;

    if (it->kind == LB_EVAC_BACKUP)
        return 0;
    if (lb_maintenance_load(d->opt.state_dir, &m, err))
        return -1;
    if (leaves) {
        v = lb_left_add(&m, it->vm);
        snprintf(v->to, sizeof(v->to), "%s", it->to);
        v->is_protected = it->is_protected;
        v->suspended = it->kind == LB_EVAC_SUSPEND;
        rc = lb_maintenance_save(d->opt.state_dir, &m, err);
    } else if (lb_left_find(&m, it->vm)) {
        lb_left_remove(&m, it->vm);
        rc = lb_maintenance_save(d->opt.state_dir, &m, err);
    }
    lb_maintenance_free(&m);
    return rc;
}

void lb_maintenance_forget(struct daemon *d, const struct lb_evac_item *it)
{
    struct lb_error err = LB_ERROR_INIT;

    if (lb_maintenance_note(d, it, false, &err))
        lb_log_error(LB_LOG_ERROR, &err);
}

json_t *lb_maintenance_status(struct daemon *d)
{
    struct lb_maintenance m;
    json_t *o, *on;

    lb_maintenance_load(d->opt.state_dir, &m, NULL);
    LB_AUTO_FREE char *text = lb_maintenance_json(&m);
    o = json_loads(text, 0, NULL);
    on = json_incref(json_object_get(o, "on"));
    json_object_del(o, "on");
    json_object_set_new(o, "maintenance", on);
    lb_maintenance_free(&m);
    return o;
}

/* ------------------------------------------------------------------------------- requests */

/* Everything that has left, from where it was sent to. */
static void bring_back(struct daemon *d, struct client *c, uint32_t parallel, struct lb_error *err)
{
    struct evacuation *v = lb_evac_of(d);
    struct lb_evac_opts o = {.parallel = parallel ? parallel : RETURNS_AT_ONCE};
    struct lb_maintenance m;

    if (lb_maintenance_load(d->opt.state_dir, &m, err))
        return;
    lb_evac_free(v->e);
    free(LB_STEAL_PTR(v->plan));
    v->e = lb_evac_new(d->cfg.name, &o, true);
    for (unsigned i = 0; i < m.n_left; i++) {
        struct lb_evac_item *it = lb_evac_add(v->e, m.left[i].vm, m.left[i].suspended ? LB_EVAC_RESUME : LB_EVAC_BACK);

        snprintf(it->from, sizeof(it->from), "%s", m.left[i].suspended ? d->cfg.name : m.left[i].to);
        snprintf(it->to, sizeof(it->to), "%s", d->cfg.name);
        it->is_protected = m.left[i].is_protected;
    }
    lb_maintenance_free(&m);
    lb_client_wait(c, LB_EVAC_NAME, LB_WAIT_EVACUATED, 0, NULL);
    lb_evac_begin(d);
}

static void maintenance_off(struct daemon *d, struct client *c, const Lb__RpcMaintenance *r)
{
    struct evacuation *v = lb_evac_of(d);
    struct lb_error err = LB_ERROR_INIT;

    if (r->bring_back && lb_evac_runs(v) && v->e->returning) {
        lb_evac_attach(d, c);
        return;
    }
    if (!lb_evac_refuse_two(v, &err) && !lb_maintenance_set(d, false, NULL, r->bring_back, &err)) {
        lb_log(LB_LOG_INFO, "maintenance is over: this host takes VMs");
        if (r->bring_back) {
            bring_back(d, c, r->parallel, &err);
        } else {
            LB_AUTO_FREE char *text = lb_json_dump(lb_maintenance_status(d));
            lb_client_result(c, text);
        }
    }
    if (err.code)
        lb_client_failure(c, &err, NULL);
}

static void maintenance_on(struct daemon *d, struct client *c, const Lb__RpcMaintenance *r)
{
    struct lb_error err = LB_ERROR_INIT;

    if (!lb_evac_refuse_two(lb_evac_of(d), &err))
        lb_maintenance_set(d, true, r->reason, true, &err);
    if (err.code) {
        lb_client_failure(c, &err, NULL);
        return;
    }
    lb_log(LB_LOG_INFO, "maintenance: this host takes no VMs from now on");
    LB_AUTO_FREE char *text = lb_json_dump(lb_maintenance_status(d));
    lb_client_result(c, text);
}

void lb_op_maintenance(struct daemon *d, struct client *c, const Lb__RpcMaintenance *r)
{
    struct lb_error err = LB_ERROR_INIT;

    if (!strcmp(r->op, "on")) {
        maintenance_on(d, c, r);
    } else if (!strcmp(r->op, "off")) {
        maintenance_off(d, c, r);
    } else if (!strcmp(r->op, "status")) {
        LB_AUTO_FREE char *text = lb_json_dump(lb_maintenance_status(d));
        lb_client_result(c, text);
    } else {
        lb_fail(&err, LB_E_USAGE, "maintenance is \"on\" or \"off\", not \"%.20s\"", r->op);
        lb_client_failure(c, &err, NULL);
    }
}
