/* migrate/medians.c - what migrations from this host cost lately. */
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>

#include "core/json.h"
#include "migrate/capacity.h"

#define LAST 20u
#define TAIL_BYTES 65536 /* more than LAST lines are long */

struct series {
    double v[LAST];
    unsigned n;
};

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

static void settle(struct series *s, double *median)
{
    if (!s->n)
        return;
    qsort(s->v, s->n, sizeof(s->v[0]), by_value);
    *median = s->n % 2 ? s->v[s->n / 2] : (s->v[s->n / 2 - 1] + s->v[s->n / 2]) / 2;
}

static void add(struct series *s, const json_t *o, const char *key, const char *key2)
{
    const json_t *v = json_object_get(o, key), *w = key2 ? json_object_get(o, key2) : NULL;

    if (json_is_number(v) && json_number_value(v) >= 0 && s->n < LAST)
        s->v[s->n++] = json_number_value(v) + LB_MAX(json_number_value(w), 0.0);
}

static void take_line(const char *line, struct series *setup, struct series *downtime)
{
    json_t *o = json_loads(line, 0, NULL);
    const char *direction = json_string_value(json_object_get(o, "direction"));

    if (direction && !strcmp(direction, "out") && json_is_true(json_object_get(o, "ok")) && !json_object_get(o, "dry_run")) {
        add(setup, o, "setup_ms", "load_ms");
        add(downtime, o, "downtime_ms", NULL);
    }
    json_decref(o);
}

/* The end of a file, after a newline. */
static char *tail(const char *path)
{
    LB_AUTO_FD int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat st;
    char *text = lb_alloc(TAIL_BYTES + 2);

    text[0] = '\n';
    if (fd >= 0 && !fstat(fd, &st) && pread(fd, text + 1, TAIL_BYTES, LB_MAX(st.st_size - TAIL_BYTES, 0)) < 0)
        text[1] = '\0';
    return text;
}

void lb_migration_medians(const char *state_dir, double *setup_s, double *downtime_ms)
{
    LB_AUTO_FREE char *path = lb_asprintf("%s/history.jsonl", state_dir), *text = tail(path);
    struct series setup = {0}, downtime = {0};
    double setup_ms = *setup_s * 1000;

    /* from the newest; a line that is cut, at the end or where we began, is no JSON */
    for (char *nl; (nl = strrchr(text, '\n')) && setup.n < LAST; *nl = '\0')
        take_line(nl + 1, &setup, &downtime);
    settle(&setup, &setup_ms);
    settle(&downtime, downtime_ms);
    *setup_s = setup_ms / 1000;
}
