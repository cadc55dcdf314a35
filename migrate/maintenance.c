/* migrate/maintenance.c - maintenance.json. See maintenance.h. */
#include "migrate/maintenance.h"

#include <string.h>

#include "core/json.h"

#define MAX_BYTES (16u << 20)

static char *path_of(const char *state_dir)
{
    return lb_asprintf("%s/maintenance.json", state_dir);
}

/* ------------------------------------------------------------------------ the list */

struct lb_left_vm *lb_left_find(const struct lb_maintenance *m, const char *vm)
{
    for (unsigned i = 0; i < m->n_left; i++)
        if (!strcmp(m->left[i].vm, vm))
            return &m->left[i];
    return NULL;
}

struct lb_left_vm *lb_left_add(struct lb_maintenance *m, const char *vm)
{
    struct lb_left_vm *v = lb_left_find(m, vm);

    if (v)
        return v;
    m->left = lb_realloc(m->left, (m->n_left + 1) * sizeof(*m->left));
    v = &m->left[m->n_left++];
    *v = (struct lb_left_vm){0};
    snprintf(v->vm, sizeof(v->vm), "%s", vm);
    return v;
}

void lb_left_remove(struct lb_maintenance *m, const char *vm)
{
    struct lb_left_vm *v = lb_left_find(m, vm);

    if (v)
        memmove(v, v + 1, (size_t)(m->left + m->n_left-- - v - 1) * sizeof(*v));
}

void lb_maintenance_free(struct lb_maintenance *m)
{
    free(m->left);
    *m = (struct lb_maintenance){0};
}

/* ------------------------------------------------------------------------ the file */

static int parse_left(const json_t *o, struct lb_maintenance *m)
{
    struct lb_left_vm v = {0}, *at;

    if (lb_json_get_string(o, "vm", v.vm, sizeof(v.vm)) || !v.vm[0] || lb_left_find(m, v.vm) ||
        lb_json_get_string(o, "to", v.to, sizeof(v.to)) || !json_is_boolean(json_object_get(o, "protected")) ||
        !json_is_boolean(json_object_get(o, "suspended")))
        return -1;
    at = lb_left_add(m, v.vm);
    v.is_protected = json_is_true(json_object_get(o, "protected"));
    v.suspended = json_is_true(json_object_get(o, "suspended"));
    *at = v;
    return 0;
}

static int parse(const json_t *o, struct lb_maintenance *m)
{
    const json_t *left = json_object_get(o, "left"), *v;
    size_t i;

    if (!json_is_boolean(json_object_get(o, "on")) || !json_is_array(left) ||
        lb_json_get_u64(o, "since_ms", INT64_MAX, &m->since_ms) ||
        lb_json_get_string(o, "reason", m->reason, sizeof(m->reason)))
        return -1;
    m->on = json_is_true(json_object_get(o, "on"));
    json_array_foreach (left, i, v)
        if (parse_left(v, m))
            return -1;
    return 0;
}

int lb_maintenance_load(const char *state_dir, struct lb_maintenance *m, struct lb_error *err)
{
    LB_AUTO_FREE char *path = path_of(state_dir);
    LB_AUTO_FREE char *text = NULL;
    struct lb_error why = LB_ERROR_INIT;
    json_t *o;
    size_t len;
    int rc;

    *m = (struct lb_maintenance){0};
    if (lb_file_read(path, MAX_BYTES, &text, &len, &why)) {
        if (why.code == LB_E_NOT_FOUND)
            return 0;
        m->on = true;
        if (err)
            *err = why;
        return -1;
    }
    o = json_loadb(text, len, JSON_REJECT_DUPLICATES, NULL);
    rc = parse(o, m);
    json_decref(o);
    if (!rc)
        return 0;
    lb_maintenance_free(m);
    m->on = true;
    lb_fail(err, LB_E_STATE, "%s is damaged", path);
    return lb_remedy(err, "remove it if this host is not in maintenance, else remove it and say `lifeboat maintenance "
                          "on`; which VMs have left is then only in `lifeboat history`");
}

char *lb_maintenance_json(const struct lb_maintenance *m)
{
    json_t *o = json_object(), *left = json_array();
    char *text;

    for (unsigned i = 0; i < m->n_left; i++) {
        const struct lb_left_vm *v = &m->left[i];
        json_t *e = json_object();

        json_object_set_new(e, "vm", lb_json_text(v->vm));
        json_object_set_new(e, "to", lb_json_text(v->to));
        json_object_set_new(e, "protected", json_boolean(v->is_protected));
        json_object_set_new(e, "suspended", json_boolean(v->suspended));
        json_array_append_new(left, e);
    }
    json_object_set_new(o, "on", json_boolean(m->on));
    json_object_set_new(o, "since_ms", json_integer((json_int_t)m->since_ms));
    json_object_set_new(o, "reason", lb_json_text(m->reason));
    json_object_set_new(o, "left", left);
    text = json_dumps(o, JSON_COMPACT);
    json_decref(o);
    return text;
}

int lb_maintenance_save(const char *state_dir, const struct lb_maintenance *m, struct lb_error *err)
{
    LB_AUTO_FREE char *path = path_of(state_dir);
    LB_AUTO_FREE char *text = lb_maintenance_json(m);

    if (!m->on && !m->n_left)
        return lb_file_remove(path, err);
    return lb_file_write_atomic(path, text, strlen(text), 0600, err);
}
