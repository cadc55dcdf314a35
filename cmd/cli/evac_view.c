/* cmd/cli/evac_view.c - see evac_view.h */
#include "cmd/cli/evac_view.h"

#include <math.h>
#include <string.h>

#include "cmd/cli/cli.h"

#define BAR_WIDE 20u          /* on a terminal of WIDE columns or more */
#define BAR_NARROW 8u
#define WIDE 90u
#define ECHOED 2u             /* "^C" is written behind the last line by the terminal itself, and must not wrap it */
#define WHOLE_EVERY_S 10.0    /* without a terminal */
#define ETA_MAX_S 864000      /* a rate that is hardly measured yet makes years of it */

struct lb_evac_view {
    FILE *f;
    bool tty, begun;          /* begun: an event has come */
    bool returning;           /* VMs come back */
    double percent;           /* never goes down */
    double whole_s;           /* without a terminal: when the whole is due */
    char host[256], plan_id[64], phase[16], note[200];
    json_t *items;            /* "VM" or "VM\nbackup": the item as it was told last; in the order of the first event */
    char *drawn;              /* lines that stand on the terminal; NULL: none */
    unsigned cols, rows;
};

struct lb_evac_view *lb_evac_view_new(FILE *f, bool tty, bool returning)
{
    struct lb_evac_view *v = lb_alloc(sizeof(*v));

    v->f = f;
    v->tty = tty;
    v->returning = returning;
    v->items = json_object();
    return v;
}

void lb_evac_view_free(struct lb_evac_view *v)
{
    if (!v)
        return;
    json_decref(v->items);
    free(v->drawn);
    free(v);
}

/* ------------------------------------------------------------------ words of an item */

static bool is(const json_t *item, const char *key, const char *word)
{
    return !strcmp(lb_jstr(item, key), word);
}

static bool active(const json_t *item)
{
    return is(item, "state", "setup") || is(item, "state", "ready") || is(item, "state", "sending");
}

static bool settled(const json_t *item)
{
    return is(item, "state", "done") || is(item, "state", "left");
}

/* It has not gone anywhere, but is no VM any more. */
static bool died(const json_t *item)
{
    return is(item, "state", "done") && lb_jstr(item, "message")[0];
}

/* "web1 -> b", "web1 <- b" when it comes back, "web1: new backup c" */
static void print_label(const struct lb_evac_view *v, FILE *f, const json_t *item)
{
    lb_print_text(f, lb_jstr(item, "vm"));
    if (is(item, "kind", "suspend") || is(item, "kind", "resume")) {
        fputs(is(item, "kind", "resume") ? ": from disk" : ": to disk", f);
        return;
    }
    fputs(is(item, "kind", "backup") ? ": new backup " : v->returning ? " <- " : " -> ", f);
    lb_print_text(f, lb_jstr(item, v->returning ? "from" : "to"));
}

static void print_done(const struct lb_evac_view *v, FILE *f, const json_t *item)
{
    double bytes = lb_jnum(item, "bytes"), s = lb_jnum(item, "elapsed_s"), pause = lb_jnum(item, "downtime_ms");
    char buf[32];

    print_label(v, f, item);
    fputs(is(item, "kind", "swap") ? ": its backup has taken over" : ":", f);
    if (bytes > 0)
        fprintf(f, " %s", lb_human_bytes(buf, sizeof(buf), bytes));
    fprintf(f, bytes > 0 || is(item, "kind", "swap") ? " in %s" : " done in %s", lb_span(buf, sizeof(buf), s * 1000));
    if (pause > 0)
        fprintf(f, ", paused %s", lb_span(buf, sizeof(buf), pause));
    fputc('\n', f);
}

static void print_trouble(const struct lb_evac_view *v, FILE *f, const json_t *item, const char *what)
{
    print_label(v, f, item);
    fprintf(f, " %s: ", what);
    lb_print_text(f, lb_jstr(item, "message"));
    fputc('\n', f);
}

/* What deserves a line of its own. */
static void print_change(const struct lb_evac_view *v, FILE *f, const json_t *was, const json_t *now)
{
    if (is(now, "state", lb_jstr(was, "state")) && lb_jint(was, "tries") == lb_jint(now, "tries"))
        return;
    if (died(now)) {
        print_trouble(v, f, now, "is dead");
    } else if (is(now, "state", "done")) {
        print_done(v, f, now);
    } else if (is(now, "state", "failed")) {
        print_trouble(v, f, now, "failed");
    } else if (is(now, "state", "left")) {
        print_trouble(v, f, now, v->returning ? "is not back" : "stays");
    } else if (active(now) && !active(was) && !v->tty) {
        print_label(v, f, now);
        fputs(": begun\n", f);
    } else if (active(was) && !active(now) && !strncmp(v->phase, "cancel", 6)) {
        lb_print_text(f, lb_jstr(now, "vm"));
        fputs(": stopped, it runs on where it was\n", f);
    }
}

/* ----------------------------------------------------------------------- live lines */

/* Columns that text takes; those of UTF-8 that are wider are not known here. */
static unsigned columns_of(const char *text)
{
    unsigned n = 0;

    for (; *text; text++)
        n += ((unsigned char)*text & 0xc0) != 0x80;
    return n;
}

/* Cut, not wrapped: a wrapped line cannot be drawn over. */
static void print_cut(FILE *f, const char *text, unsigned cols)
{
    size_t n = 0;

    for (unsigned left = cols; text[n]; n++)
        if (((unsigned char)text[n] & 0xc0) != 0x80 && !left--)
            break;
    LB_AUTO_FREE char *cut = lb_asprintf("%.*s", (int)n, text);
    lb_print_text(f, cut);
    fputc('\n', f);
}

static void print_bar(FILE *f, double percent, unsigned cols)
{
    unsigned bar = cols >= WIDE ? BAR_WIDE : BAR_NARROW;
    double part = LB_MIN(LB_MAX(percent, 0.0), 100.0);

    fputc('[', f);
    for (unsigned i = 0; i < bar; i++)
        fputc(i < (unsigned)(part / 100 * bar) ? '#' : '-', f);
    fprintf(f, "] %3.0f%%  ", floor(part));
}

static void print_eta(FILE *f, const json_t *o)
{
    const json_t *eta = json_object_get(o, "eta_s");
    double s = ceil(json_number_value(eta));
    char buf[32];

    if (!json_is_number(eta) || s < 0 || s >= ETA_MAX_S)
        return;
    if (s < 120)
        fprintf(f, "  ETA %.0f s", s);
    else
        fprintf(f, "  ETA %s", lb_span(buf, sizeof(buf), s * 1000));
}

static void print_rate(FILE *f, const json_t *o)
{
    char buf[32];

    if (lb_jnum(o, "throughput_bytes_per_s") >= 1)
        fprintf(f, "  %s/s", lb_human_bytes(buf, sizeof(buf), lb_jnum(o, "throughput_bytes_per_s")));
}

static const char *working(const json_t *item)
{
    if (is(item, "kind", "swap"))
        return "its backup takes over";
    if (is(item, "state", "ready"))
        return "ready, waits for the link";
    return is(item, "state", "sending") || is(item, "kind", "suspend") ? "sending" : "setting up";
}

static void print_active(const struct lb_evac_view *v, FILE *f, const json_t *item, unsigned label_cols, unsigned cols)
{
    char *text = NULL, *label = NULL, bytes[32];
    size_t n;
    FILE *m = open_memstream(&label, &n);

    print_label(v, m, item);
    fclose(m);
    m = open_memstream(&text, &n);
    print_bar(m, lb_jnum(item, "percent"), cols);
    fprintf(m, "%s%*s  %s", label, (int)label_cols - (int)LB_MIN(columns_of(label), label_cols), "", working(item));
    if (is(item, "state", "sending")) {
        print_rate(m, item);
        if (lb_jnum(item, "bytes") >= 1)
            fprintf(m, "  %s sent", lb_human_bytes(bytes, sizeof(bytes), lb_jnum(item, "bytes")));
        print_eta(m, item);
    }
    fclose(m);
    print_cut(f, text, cols - 1);
    free(label);
    free(text);
}

/* VMs in that state; NULL: all. The event counts new backups, too. */
static unsigned vms_that(const struct lb_evac_view *v, const char *state)
{
    unsigned n = 0;
    const char *key;
    json_t *item;

    json_object_foreach (v->items, key, item)
        n += !is(item, "kind", "backup") && !died(item) && (!state || is(item, "state", state));
    return n;
}

/* "12 of 30 VMs, 1 cannot  210.0 MiB/s  14.8 GiB of 36.0 GiB  ETA 80 s" */
static void print_whole(const struct lb_evac_view *v, FILE *f, const json_t *ev)
{
    char sent[32], all[32];

    fprintf(f, "%u of %u VMs", vms_that(v, "done"), vms_that(v, NULL));
    if (vms_that(v, "failed"))
        fprintf(f, ", %u failed", vms_that(v, "failed"));
    if (vms_that(v, "left"))
        fprintf(f, ", %u cannot", vms_that(v, "left"));
    if (v->phase[0] && strcmp(v->phase, "running") && strcmp(v->phase, "returning"))
        fprintf(f, "  %s", v->phase);
    print_rate(f, ev);
    if (lb_jnum(ev, "bytes_planned") > 0)
        fprintf(f, "  %s of %s", lb_human_bytes(sent, sizeof(sent), lb_jnum(ev, "bytes")),
                lb_human_bytes(all, sizeof(all), LB_MAX(lb_jnum(ev, "bytes_planned"), lb_jnum(ev, "bytes"))));
    print_eta(f, ev);
}

static unsigned label_width(const struct lb_evac_view *v, unsigned cols)
{
    unsigned widest = 0;
    const char *key;
    json_t *item;

    json_object_foreach (v->items, key, item) {
        if (!active(item))
            continue;
        char *label = NULL;
        size_t n;
        FILE *m = open_memstream(&label, &n);

        print_label(v, m, item);
        fclose(m);
        widest = LB_MAX(widest, columns_of(label));
        free(label);
    }
    return LB_MIN(widest, cols / 3);
}

/* Those that send come first: when there are too many for the screen, they are what is left out last. */
static void print_all_active(const struct lb_evac_view *v, FILE *f, unsigned cols, unsigned rows)
{
    unsigned width = label_width(v, cols), n = 0, shown = 0, room;
    const char *key;
    json_t *item;

    json_object_foreach (v->items, key, item)
        n += active(item);
    room = rows > 4 ? rows - 2 : 2; /* the whole, and one more row: the last line of a terminal would scroll */
    if (n > room)
        room--;
    for (int sending = 1; sending >= 0; sending--)
        json_object_foreach (v->items, key, item)
            if (active(item) && is(item, "state", "sending") == sending && shown < room) {
                print_active(v, f, item, width, cols);
                shown++;
            }
    if (n > shown)
        fprintf(f, "and %u more\n", n - shown);
}

/* Lines on the terminal now, which may have become narrower since they were drawn. */
static unsigned rows_of(const char *drawn, unsigned cols)
{
    unsigned rows = 0;
    size_t len;

    for (const char *p = drawn; *p; p += len + (p[len] == '\n')) {
        len = strcspn(p, "\n");
        LB_AUTO_FREE char *line = lb_asprintf("%.*s", (int)len, p);
        rows += LB_MAX((columns_of(line) + cols - 1) / cols, 1u);
    }
    return rows;
}

static void print_wipe(const struct lb_evac_view *v, FILE *f)
{
    if (!v->drawn)
        return;
    fputc('\r', f);
    if (rows_of(v->drawn, v->cols) > 1)
        fprintf(f, "\033[%uA", rows_of(v->drawn, v->cols) - 1);
    fputs("\033[J", f);
}

void lb_evac_view_wipe(struct lb_evac_view *v)
{
    print_wipe(v, v->f);
    fflush(v->f);
    free(v->drawn);
    v->drawn = NULL;
}

/* All of it in one write, and only when there is something new. */
static void draw(struct lb_evac_view *v, const json_t *ev, const char *lines, unsigned rows)
{
    char *live = NULL, *whole = NULL, *out = NULL;
    size_t n;
    FILE *m = open_memstream(&whole, &n);

    print_bar(m, v->percent, v->cols);
    print_whole(v, m, ev);
    fclose(m);
    m = open_memstream(&live, &n);
    print_all_active(v, m, v->cols, rows);
    print_cut(m, whole, v->cols - 1 - ECHOED);
    fclose(m);
    live[n - 1] = '\0'; /* the cursor stays behind the last line */
    if (lines[0] || !v->drawn || strcmp(v->drawn, live)) {
        m = open_memstream(&out, &n);
        print_wipe(v, m);
        fprintf(m, "%s%s", lines, live);
        fclose(m);
        fwrite(out, 1, n, v->f);
        fflush(v->f);
        free(out);
    }
    free(whole);
    free(v->drawn);
    v->drawn = live;
}

/* ---------------------------------------------------------------------------- events */

/* Remembers it; what has ended before the watching began is no news. */
static void take_item(struct lb_evac_view *v, FILE *f, const json_t *item)
{
    /* How it leaves may change; a new backup is another thing than where it runs. */
    LB_AUTO_FREE char *key = lb_asprintf("%s%s", lb_jstr(item, "vm"), is(item, "kind", "backup") ? "\nbackup" : "");
    json_t *was = json_object_get(v->items, key);

    if (v->begun || !settled(item))
        print_change(v, f, was, item);
    if (was)
        json_object_update(was, (json_t *)item);
    else
        json_object_set_new(v->items, key, json_copy((json_t *)item));
}

static void take_note(struct lb_evac_view *v, FILE *f, const char *note)
{
    if (!note[0] || !strcmp(note, v->note))
        return;
    snprintf(v->note, sizeof(v->note), "%s", note);
    fputs("  ", f);
    lb_print_text(f, note);
    fputc('\n', f);
}

/* "web1 failed: ...": its item has a line that says more. */
static bool is_of_item(const json_t *items, const char *note)
{
    size_t i, n;
    json_t *item;

    json_array_foreach (items, i, item) {
        n = strlen(lb_jstr(item, "vm"));
        if (!strncmp(note, lb_jstr(item, "vm"), n) && note[n] == ' ')
            return true;
    }
    return false;
}

static void take_evacuation(struct lb_evac_view *v, FILE *f, const json_t *ev)
{
    size_t i;
    json_t *item;

    snprintf(v->phase, sizeof(v->phase), "%s", lb_jstr(ev, "phase"));
    v->percent = LB_MIN(LB_MAX(v->percent, lb_jnum(ev, "percent")), 100.0);
    json_array_foreach (json_object_get(ev, "items"), i, item)
        take_item(v, f, item);
    if (!v->begun || is_of_item(json_object_get(ev, "items"), lb_jstr(ev, "note")))
        snprintf(v->note, sizeof(v->note), "%s", lb_jstr(ev, "note"));
    take_note(v, f, lb_jstr(ev, "note"));
    if (!v->begun)
        v->whole_s = lb_jnum(ev, "elapsed_s") + WHOLE_EVERY_S;
    v->begun = true;
    if (!v->tty && lb_jnum(ev, "elapsed_s") >= v->whole_s) {
        fprintf(f, "%3.0f%%  ", floor(v->percent));
        print_whole(v, f, ev);
        fputc('\n', f);
        v->whole_s = lb_jnum(ev, "elapsed_s") + WHOLE_EVERY_S;
    }
}

/* The first one was shown before it was begun. */
static void take_plan(struct lb_evac_view *v, FILE *f, const json_t *plan)
{
    char span[32];

    snprintf(v->host, sizeof(v->host), "%s", lb_jstr(plan, "host"));
    if (v->plan_id[0] && strcmp(v->plan_id, lb_jstr(plan, "id")))
        fprintf(f, "  planned anew: %zu steps in %s\n", json_array_size(json_object_get(plan, "steps")),
                lb_span(span, sizeof(span), lb_jnum(plan, "makespan_s") * 1000));
    snprintf(v->plan_id, sizeof(v->plan_id), "%s", lb_jstr(plan, "id"));
}

void lb_evac_view_event(struct lb_evac_view *v, const json_t *ev, unsigned cols, unsigned rows)
{
    char *lines = NULL;
    size_t n;
    FILE *m = open_memstream(&lines, &n);
    bool whole = is(ev, "event", "evacuation");

    v->cols = cols;
    v->rows = rows;
    if (is(ev, "event", "note"))
        take_note(v, m, lb_jstr(ev, "text"));
    else if (is(ev, "event", "plan"))
        take_plan(v, m, ev);
    else if (whole)
        take_evacuation(v, m, ev);
    fclose(m);
    if (v->tty && whole) {
        draw(v, ev, lines, rows);
    } else if (lines[0]) {
        lb_evac_view_wipe(v);
        fputs(lines, v->f);
        fflush(v->f);
    }
    free(lines);
}

/* ---------------------------------------------------------------------------- result */

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

/* ", paused 21.0 ms (median), 45.0 ms at most" */
static void print_pauses(FILE *f, const json_t *items)
{
    LB_AUTO_FREE double *ms = lb_alloc((json_array_size(items) + 1) * sizeof(*ms));
    char median[32], most[32];
    size_t n = 0, i;
    json_t *item;

    json_array_foreach (items, i, item)
        if (is(item, "state", "done") && !died(item) && lb_jnum(item, "downtime_ms") > 0)
            ms[n++] = lb_jnum(item, "downtime_ms");
    if (!n)
        return;
    qsort(ms, n, sizeof(*ms), by_size);
    fprintf(f, ", paused %s (median), %s at most", lb_span(median, sizeof(median), ms[(n - 1) / 2]),
            lb_span(most, sizeof(most), ms[n - 1]));
}

static void print_left(FILE *f, const json_t *evacuation)
{
    size_t i;
    json_t *item;

    json_array_foreach (json_object_get(evacuation, "items"), i, item) {
        if (!is(item, "state", "left") && !is(item, "state", "failed") && !died(item))
            continue;
        fputs("  ", f);
        lb_print_text(f, lb_jstr(item, "vm"));
        fputs(is(item, "kind", "backup") ? " has no new backup: " : ": ", f);
        lb_print_text(f, lb_jstr(item, "message"));
        if (lb_jstr(item, "remedy")[0]) {
            fputs("\n    remedy: ", f);
            lb_print_text(f, lb_jstr(item, "remedy"));
        }
        fputc('\n', f);
    }
}

static void print_sums(FILE *f, const json_t *o)
{
    char span[32], bytes[32];

    if (!json_array_size(json_object_get(o, "items"))) {
        fputc('\n', f);
        return;
    }
    fprintf(f, " in %s, %s sent", lb_span(span, sizeof(span), lb_jnum(o, "elapsed_s") * 1000),
            lb_human_bytes(bytes, sizeof(bytes), lb_jnum(o, "bytes")));
    print_pauses(f, json_object_get(o, "items"));
    fputc('\n', f);
}

void lb_evac_view_result(struct lb_evac_view *v, const json_t *o)
{
    unsigned done, left;
    bool ok = lb_jbool(o, "ok");

    lb_evac_view_event(v, o, v->cols, v->rows);
    lb_evac_view_wipe(v);
    done = vms_that(v, "done");
    left = vms_that(v, NULL) - done;
    if (v->returning) {
        fprintf(v->f, "maintenance mode is off; %u VM%s came back", done, done == 1 ? "" : "s");
        print_sums(v->f, o);
        if (!ok)
            fprintf(v->f, "%u did not; `lifeboat maintenance off --bring-back` tries it again\n", left);
    } else if (ok) {
        fprintf(v->f, "%s%s is empty: %u VM%s left it", v->host[0] ? "host " : "this host", v->host, done, done == 1 ? "" : "s");
        print_sums(v->f, o);
        fputs("it takes no VM until `lifeboat maintenance off`; with --bring-back those that left return\n", v->f);
    } else {
        fprintf(v->f, "%s: %u VM%s left", is(o, "phase", "cancelled") ? "cancelled" : "not empty", done, done == 1 ? "" : "s");
        print_sums(v->f, o);
        fprintf(v->f, "%u run%s here; `lifeboat evacuate` goes on%s\n", left, left == 1 ? "s" : "",
                done ? ", `lifeboat maintenance off --bring-back` reverses what was done" : "");
    }
    print_left(v->f, o);
    fflush(v->f);
}
