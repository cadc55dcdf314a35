/*
 * cmd/cli/watch.c - long work of the daemon, watched: one line that is drawn over and over on a
 * terminal, elsewhere one line per phase.
 */
#include "cmd/cli/keys.h"

#include <math.h>
#include <string.h>
#include <sys/eventfd.h>

enum { OPT_DETACH = 2100, OPT_PROGRESS };

static error_t parse_watch(int key, char *arg, struct argp_state *state)
{
    struct lb_watch *w = state->input;

    (void)arg;
    switch (key) {
    case 'q':
        w->quiet = true;
        return 0;
    case OPT_DETACH:
        w->detach = true;
        return 0;
    case OPT_PROGRESS:
        w->progress_json = true;
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp_option watch_options[] = {
    {"quiet", 'q', NULL, 0, "Print nothing but errors", 10},
    {"detach", OPT_DETACH, NULL, 0, "Return when it has started", 10},
    {"progress", OPT_PROGRESS, NULL, 0, "With --json: one line of JSON per event before the result", 10},
    {0},
};
const struct argp lb_watch_argp = {watch_options, parse_watch, NULL, NULL, NULL, NULL, NULL};

static void wipe(struct lb_watch *w)
{
    if (w->drawn)
        fputs("\r\033[K", stdout);
    w->drawn = false;
}

/* "copying  1.2 GiB of 4.0 GiB  512 MiB/s  ETA 6 s  file 700 MiB" */
static void numbers(const json_t *p, char *buf, size_t n)
{
    const json_t *eta = json_object_get(p, "eta_s");
    char done[32], total[32], rate[32], file[32], etas[32] = "", of[80] = "", files[48] = "", rates[48] = "";

    if (json_is_number(eta) && json_number_value(eta) >= 0 && json_number_value(eta) < 864000)
        snprintf(etas, sizeof(etas), "  ETA %.0f s", ceil(json_number_value(eta)));
    if (lb_jnum(p, "total_bytes") > 0)
        snprintf(of, sizeof(of), "  %s of %s", lb_human_bytes(done, sizeof(done), lb_jnum(p, "done_bytes")),
                 lb_human_bytes(total, sizeof(total), lb_jnum(p, "total_bytes")));
    if (lb_jnum(p, "bytes_per_s") > 0)
        snprintf(rates, sizeof(rates), "  %s/s", lb_human_bytes(rate, sizeof(rate), lb_jnum(p, "bytes_per_s")));
    if (lb_jnum(p, "file_bytes") > 0)
        snprintf(files, sizeof(files), "  file %s", lb_human_bytes(file, sizeof(file), lb_jnum(p, "file_bytes")));
    snprintf(buf, n, "%s %s%s%s%s%s", lb_jstr(p, "what"), lb_jstr(p, "phase"), of, rates, etas, files);
}

static void progress(struct lb_watch *w, const json_t *p)
{
    const char *phase = lb_jstr(p, "phase"), *note = lb_jstr(p, "note");
    bool change = strcmp(phase, w->phase) != 0;
    char text[400];

    if (lb_jnum(p, "percent") > w->percent)
        w->percent = LB_MIN(lb_jnum(p, "percent"), 100.0);
    if (note[0] && strcmp(note, w->note)) {
        wipe(w);
        printf("  ");
        lb_print_text(stdout, note);
        putchar('\n');
        snprintf(w->note, sizeof(w->note), "%s", note);
    }
    snprintf(w->phase, sizeof(w->phase), "%s", phase);
    numbers(p, text, sizeof(text));
    if (w->tty) {
        lb_draw_bar(w->percent, text);
        w->drawn = true;
    } else if (change) {
        printf("%3.0f%%  %s\n", floor(w->percent), text);
        fflush(stdout);
    }
}

struct watching {
    struct lb_watch *w;
    void (*on_event)(const json_t *event);
};

static bool on_event(const json_t *ev, const char *text, void *arg)
{
    struct watching *x = arg;
    struct lb_watch *w = x->w;
    const char *kind = lb_jstr(ev, "event");

    if (w->cli->json) {
        if (w->progress_json) {
            puts(text);
            fflush(stdout);
        }
    } else if (!w->quiet && !strcmp(kind, "progress")) {
        progress(w, ev);
    } else if (!w->quiet && x->on_event) {
        wipe(w);
        x->on_event(ev);
        fflush(stdout);
    }
    return !(w->detach && !strcmp(kind, "started"));
}

static int detached(struct lb_watch *w)
{
    wipe(w);
    if (w->stops) {
        fprintf(stderr, "lifeboat: given up\n");
        return LB_EXIT_DETACHED;
    }
    if (w->cli->json)
        printf("{\"vm\":\"%s\",\"detached\":true}\n", w->vm);
    fprintf(stderr, "lifeboat: it goes on in the background: `lifeboat status %s` shows it, `lifeboat cancel %s` stops it\n",
            w->vm, w->vm);
    return LB_EXIT_DETACHED;
}

int lb_watch(struct lb_watch *w, const Lb__RpcRequest *r, void (*show)(const json_t *result),
             void (*event)(const json_t *event))
{
    struct watching x = {w, event};
    struct lb_error err = LB_ERROR_INIT;
    int sigint_fd = lb_catch_sigint(), rc;
    json_t *o;

    w->tty = isatty(STDOUT_FILENO);
    LB_AUTO_FREE char *text = lb_request(w->cli, r, on_event, &x, sigint_fd, &err);
    wipe(w);
    fflush(stdout);
    if (!text) {
        if (err.code == LB_E_CANCELLED && eventfd_read(sigint_fd, &(eventfd_t){0}) == 0)
            return detached(w);
        return lb_cli_fail(w->cli, &err);
    }
    o = json_loads(text, 0, NULL);
    if (w->cli->json)
        puts(text);
    else if (w->detach)
        printf("started, session %s\n", lb_jstr(o, "session"));
    else if (!w->quiet)
        show(o);
    rc = w->judge && !w->detach ? w->judge(o) : 0;
    json_decref(o);
    return rc;
}

/* ------------------------------------------------------------------ with a key */

const struct argp_child lb_work_children[] = {{&lb_json_argp, 0, NULL, 0}, {&lb_key_argp, 0, NULL, 0},
                                              {&lb_watch_argp, 0, NULL, 0}, {0}};

void lb_work_inputs(struct lb_work *w, struct argp_state *state)
{
    state->child_inputs[0] = w->watch.cli;
    state->child_inputs[1] = &w->key;
    state->child_inputs[2] = &w->watch;
}

int lb_work_run(struct lb_work *w, bool make, const Lb__RpcRequest *r, Lb__RpcKey **slot,
                void (*show)(const json_t *result), void (*event)(const json_t *event))
{
    Lb__RpcKey key = LB__RPC_KEY__INIT;
    struct lb_error err = LB_ERROR_INIT;
    int rc;

    if (lb_key_get(&w->key, make, &key, &err) < 0)
        return lb_cli_fail(w->watch.cli, &err);
    *slot = &key;
    rc = lb_watch(&w->watch, r, show, event);
    *slot = NULL;
    lb_key_wipe(&key);
    return rc;
}
