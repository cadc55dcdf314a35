/* cmd/cli/priorities.c - which VMs leave first, from a file */
#include "cmd/cli/evacuate.h"

#include <string.h>

#define MAX_BYTES (1u << 20)
#define MAX_PRIORITY 1000000ul

static bool is_pattern(const char *name)
{
    return strpbrk(name, "*?[") != NULL;
}

static bool is_here(const json_t *vms, const char *name)
{
    size_t i;
    json_t *vm;

    json_array_foreach (vms, i, vm)
        if (!strcmp(lb_jstr(vm, "name"), name))
            return true;
    return false;
}

static char *trim(char *s)
{
    size_t n;

    s += strspn(s, " \t\r");
    for (n = strlen(s); n && strchr(" \t\r", s[n - 1]); n--)
        s[n - 1] = '\0';
    return s;
}

static int take_line(json_t *o, char *line, const json_t *vms, struct lb_error *err)
{
    char *comment = strchr(line, '#'), *name, *number;
    unsigned long n = 0;

    if (comment)
        *comment = '\0';
    name = trim(line);
    if (!*name)
        return 0;
    number = strchr(name, ':');
    if (!number) {
        lb_fail(err, LB_E_USAGE, "\"%.100s\" has no \":\"", name);
        return lb_remedy(err, "write NAME: NUMBER");
    }
    *number++ = '\0';
    name = trim(name);
    number = trim(number);
    if (!*name)
        return lb_fail(err, LB_E_USAGE, "there is no name before the \":\"");
    if (!lb_arg_number(number, 0, MAX_PRIORITY, &n))
        return lb_fail(err, LB_E_USAGE, "\"%.100s\" is no number from 0 to %lu", number, MAX_PRIORITY);
    if (json_object_get(o, name))
        return lb_fail(err, LB_E_USAGE, "%.100s has a priority already", name);
    if (!is_pattern(name) && !is_here(vms, name)) {
        lb_fail(err, LB_E_NOT_FOUND, "there is no VM \"%.100s\" on this host", name);
        return lb_remedy(err, "correct the name (`lifeboat ls`), or make it a pattern, which may fit none: \"%.100s*\"", name);
    }
    if (json_object_set_new(o, name, json_integer((json_int_t)n)))
        return lb_fail(err, LB_E_USAGE, "a name must be UTF-8");
    return 0;
}

int lb_priorities_parse(const char *file, char *text, const json_t *vms, char **out, struct lb_error *err)
{
    json_t *o = json_object();
    unsigned number = 1;
    int rc = 0;

    for (char *line = text, *next; line && !rc; line = next, number++) {
        next = strchr(line, '\n');
        if (next)
            *next++ = '\0';
        rc = take_line(o, line, vms, err);
        if (rc)
            lb_context(err, "%s:%u", file, number);
    }
    if (!rc)
        *out = json_dumps(o, JSON_COMPACT);
    json_decref(o);
    return rc;
}

int lb_priorities_load(struct lb_cli *cli, const char *file, char **out, struct lb_error *err)
{
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;
    Lb__RpcName all = LB__RPC_NAME__INIT;
    LB_AUTO_FREE char *text = NULL, *ls = NULL;
    json_t *o;
    int rc;

    if (lb_file_read(file, MAX_BYTES, &text, NULL, err))
        return -1;
    r.kind_case = LB__RPC_REQUEST__KIND_LS;
    r.ls = &all;
    ls = lb_request(cli, &r, NULL, NULL, -1, err);
    if (!ls)
        return -1;
    o = json_loads(ls, 0, NULL);
    rc = lb_priorities_parse(file, text, json_object_get(o, "vms"), out, err);
    json_decref(o);
    return rc;
}
