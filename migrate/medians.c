/*
 * migrate/medians.c - what migrations from this host cost lately.
 *
 * What a setup takes is wanted in seconds of one processor: several at once share them, and history has only how long each took. So each
 * is divided by how many were being set up meanwhile, on average, for each processor.
 */
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>

#include "core/json.h"
#include "migrate/capacity.h"

#define LAST 20u         /* that count */
#define LOOKED_AT 64u    /* that may have been set up at the same time as those */
#define TAIL_BYTES 65536 /* more than so many lines are long */

struct record {
    double begin_ms, setup_ms, downtime_ms;
};

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

static double median(double *v, unsigned n)
{
    qsort(v, n, sizeof(*v), by_value);
    return n % 2 ? v[n / 2] : (v[n / 2 - 1] + v[n / 2]) / 2;
}

static double number(const json_t *o, const char *key)
{
    return LB_MAX(json_number_value(json_object_get(o, key)), 0.0);
}

static bool parse(const char *line, struct record *r)
{
    json_t *o = json_loads(line, 0, NULL);
    const char *direction = json_string_value(json_object_get(o, "direction"));
    bool good = direction && !strcmp(direction, "out") && json_is_true(json_object_get(o, "ok")) &&
                !json_object_get(o, "dry_run") && json_is_number(json_object_get(o, "setup_ms"));

    if (good)
        *r = (struct record){number(o, "started_ms"), number(o, "setup_ms") + number(o, "load_ms"), number(o, "downtime_ms")};
    json_decref(o);
    return good;
}

/* How many were being set up while v[i] was, itself included. */
static double at_once(const struct record *v, unsigned n, unsigned i)
{
    double sum = 0, from, to;

    for (unsigned k = 0; k < n; k++) {
        from = LB_MAX(v[k].begin_ms, v[i].begin_ms);
        to = LB_MIN(v[k].begin_ms + v[k].setup_ms, v[i].begin_ms + v[i].setup_ms);
        sum += LB_MAX(to - from, 0.0);
    }
    return v[i].setup_ms > 0 ? sum / v[i].setup_ms : 1;
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
    double cpus = (double)LB_MAX(sysconf(_SC_NPROCESSORS_ONLN), 1), setups[LAST], downtimes[LAST];
    struct record v[LOOKED_AT];
    unsigned n = 0, last;

    /* from the newest; a line that is cut, at the end or where we began, is no JSON */
    for (char *nl; (nl = strrchr(text, '\n')) && n < LOOKED_AT; *nl = '\0')
        n += parse(nl + 1, &v[n]);
    last = LB_MIN(n, LAST);
    for (unsigned i = 0; i < last; i++) {
        setups[i] = v[i].setup_ms / LB_MAX(at_once(v, n, i) / cpus, 1.0);
        downtimes[i] = v[i].downtime_ms;
    }
    if (!last)
        return;
    *setup_s = median(setups, last) / 1000;
    *downtime_ms = median(downtimes, last);
}
