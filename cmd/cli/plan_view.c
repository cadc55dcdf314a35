/* cmd/cli/plan_view.c - the plan of an evacuation as tables */
#include "cmd/cli/evac_view.h"

#include <math.h>
#include <string.h>

#include "cmd/cli/cli.h"

static bool is_kind(const json_t *step, const char *kind)
{
    return !strcmp(lb_jstr(step, "kind"), kind);
}

static void bytes_cell(struct lb_table *t, const json_t *o, const char *key)
{
    char buf[32];

    lb_table_cell(t, "%s", lb_jnum(o, key) > 0 ? lb_human_bytes(buf, sizeof(buf), lb_jnum(o, key)) : "");
}

static void rate_cell(struct lb_table *t, const json_t *o, const char *key)
{
    char buf[32];

    if (lb_jnum(o, key) > 0)
        lb_table_cell(t, "%s/s", lb_human_bytes(buf, sizeof(buf), lb_jnum(o, key)));
    else
        lb_table_cell(t, "%s", "");
}

static void span_cell(struct lb_table *t, double ms)
{
    char buf[32];

    lb_table_cell(t, "%s", ms > 0 ? lb_span(buf, sizeof(buf), ms) : "");
}

/* From the beginning of all, "1:05". */
static void start_cell(struct lb_table *t, double s)
{
    lb_table_cell(t, "%.0f:%02.0f", floor(s / 60), floor(fmod(s, 60)));
}

static const char *step_note(const json_t *s)
{
    if (is_kind(s, "swap"))
        return "its backup takes over";
    if (is_kind(s, "backup"))
        return "gets a new backup";
    if (is_kind(s, "suspend"))
        return "suspended to disk here";
    return lb_jbool(s, "suspended") ? "too hot: paused while it is sent" :
           lb_jbool(s, "throttled") ? "too hot: throttled" : lb_jbool(s, "alone") ? "alone on its link" : "";
}

static void print_steps(FILE *f, const json_t *steps)
{
    static const char *const heads[] = {"START", "VM", "STEP", "FROM", "TO", "MEMORY", "CHANGES", "SENT", "TAKES", "PAUSED",
                                        "NOTE"};
    struct lb_table *t = lb_table_new(LB_ARRAY_LEN(heads), heads);
    size_t i;
    json_t *s;

    json_array_foreach (steps, i, s) {
        start_cell(t, lb_jnum(s, "start_s"));
        lb_table_cell(t, "%s", lb_jstr(s, "vm"));
        lb_table_cell(t, "%s", lb_jstr(s, "kind"));
        lb_table_cell(t, "%s", lb_jstr(s, "from"));
        lb_table_cell(t, "%s", lb_jstr(s, "to"));
        bytes_cell(t, s, "memory_bytes");
        rate_cell(t, s, "dirty_bytes_per_s");
        bytes_cell(t, s, "bytes");
        span_cell(t, (lb_jnum(s, "end_s") - lb_jnum(s, "start_s")) * 1000);
        span_cell(t, lb_jnum(s, "downtime_ms"));
        lb_table_cell(t, "%s", step_note(s));
    }
    lb_table_write(t, f);
    fputc('\n', f);
}

/* A plan of many hosts lists those that something changes on, and those that could be used but are in maintenance. */
static bool listed(const json_t *h)
{
    return lb_jint(h, "before_bytes") != lb_jint(h, "after_bytes") || lb_jint(h, "parallel") || lb_jbool(h, "maintenance");
}

static void host_row(struct lb_table *t, const json_t *h)
{
    double left = lb_jnum(h, "memory_bytes") - lb_jnum(h, "reserved_bytes") - lb_jnum(h, "after_bytes");
    char buf[32];

    lb_table_cell(t, "%s", lb_jstr(h, "name"));
    bytes_cell(t, h, "memory_bytes");
    lb_table_cell(t, "%s", lb_human_bytes(buf, sizeof(buf), lb_jnum(h, "before_bytes")));
    lb_table_cell(t, "%s", lb_human_bytes(buf, sizeof(buf), lb_jnum(h, "after_bytes")));
    lb_table_cell(t, "%s", lb_human_bytes(buf, sizeof(buf), LB_MAX(left, 0.0)));
    rate_cell(t, h, "link_bytes_per_s");
    snprintf(buf, sizeof(buf), "%d", (int)lb_jint(h, "parallel"));
    lb_table_cell(t, "%s", lb_jint(h, "parallel") ? buf : "");
    lb_table_cell(t, "%s", lb_jbool(h, "maintenance") ? "in maintenance: takes no VM" : "");
}

static void print_hosts(FILE *f, const json_t *hosts)
{
    static const char *const heads[] = {"HOST", "MEMORY", "BEFORE", "AFTER", "FREE", "LINK", "AT ONCE", "NOTE"};
    struct lb_table *t = lb_table_new(LB_ARRAY_LEN(heads), heads);
    size_t i;
    json_t *h;

    json_array_foreach (hosts, i, h)
        if (listed(h))
            host_row(t, h);
    lb_table_write(t, f);
    fputc('\n', f);
}

/* "WHAT: REASON", and what can be done about it */
static void print_reason(FILE *f, const char *what, const json_t *name, const json_t *host, const char *reason, const char *remedy)
{
    fputs(what, f);
    lb_print_text(f, json_string_value(name) ? json_string_value(name) : "");
    if (json_string_value(host)) {
        fputs(" on ", f);
        lb_print_text(f, json_string_value(host));
    }
    fputs(": ", f);
    lb_print_text(f, reason);
    fputc('\n', f);
    if (remedy[0]) {
        fputs("  remedy: ", f);
        lb_print_text(f, remedy);
        fputc('\n', f);
    }
}

static void print_troubles(FILE *f, const json_t *plan)
{
    size_t i;
    json_t *o;

    json_array_foreach (json_object_get(plan, "hosts"), i, o)
        if (lb_jstr(o, "error")[0])
            print_reason(f, "not used: host ", json_object_get(o, "name"), NULL, lb_jstr(o, "error"), lb_jstr(o, "remedy"));
    json_array_foreach (json_object_get(plan, "stays"), i, o)
        print_reason(f, lb_jbool(o, "backup") ? "no new backup for " : "stays: ", json_object_get(o, "vm"),
                     json_object_get(o, "host"), lb_jstr(o, "reason"), lb_jstr(o, "remedy"));
}

void lb_plan_print(FILE *f, const json_t *plan)
{
    const json_t *steps = json_object_get(plan, "steps"), *stays = json_object_get(plan, "stays");
    char span[32], bytes[32];

    if (json_array_size(steps)) {
        print_steps(f, steps);
        print_hosts(f, json_object_get(plan, "hosts"));
    }
    print_troubles(f, plan);
    fprintf(f, "%zu steps, %s sent in %s; %zu cannot be done\n", json_array_size(steps),
            lb_human_bytes(bytes, sizeof(bytes), lb_jnum(plan, "bytes")),
            lb_span(span, sizeof(span), lb_jnum(plan, "makespan_s") * 1000), json_array_size(stays));
}
