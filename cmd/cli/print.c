/* cmd/cli/print.c - errors, tables and numbers for people. */
#include "cmd/cli/cli.h"

#include <errno.h>
#include <math.h>
#include <signal.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

void lb_print_text(FILE *f, const char *text)
{
    for (; *text; text++) {
        unsigned char c = (unsigned char)*text;

        fputc(c < 0x20 || c == 0x7f ? ' ' : c, f);
    }
}

void lb_print_each(const json_t *o, const char *key, const char *lead)
{
    size_t i;
    json_t *text;

    json_array_foreach (json_object_get(o, key), i, text) {
        fputs(lead, stderr);
        lb_print_text(stderr, json_string_value(text) ? json_string_value(text) : "");
        fputc('\n', stderr);
    }
}

int lb_cli_fail(struct lb_cli *cli, const struct lb_error *err)
{
    fputs("lifeboat: ", stderr);
    lb_print_text(stderr, err->message);
    fputc('\n', stderr);
    if (err->remedy[0]) {
        fputs("  remedy: ", stderr);
        lb_print_text(stderr, err->remedy);
        fputc('\n', stderr);
    }
    if (cli->json) {
        json_t *o = json_object(), *e = json_object();
        json_t *result = cli->failure_json ? json_loads(cli->failure_json, 0, NULL) : NULL;
        char *text;

        json_object_set_new(e, "code", json_string(lb_errcode_name(err->code)));
        json_object_set_new(e, "message", json_string(err->message));
        json_object_set_new(e, "remedy", json_string(err->remedy));
        json_object_set_new(o, "error", e);
        if (result)
            json_object_set_new(o, "result", result);
        text = json_dumps(o, JSON_COMPACT | JSON_REAL_PRECISION(12));
        puts(text ? text : "{\"error\":{\"code\":\"internal\"}}");
        free(text);
        json_decref(o);
    }
    cli->reported = true;
    return lb_errcode_exit(err->code);
}

int lb_ask(struct lb_cli *cli, const Lb__RpcRequest *r, void (*show)(const json_t *result))
{
    struct lb_error err = LB_ERROR_INIT;
    LB_AUTO_FREE char *text = lb_request(cli, r, NULL, NULL, -1, &err);
    json_t *o;

    if (!text)
        return lb_cli_fail(cli, &err);
    if (cli->json) {
        puts(text);
        return 0;
    }
    o = json_loads(text, 0, NULL);
    if (!o) {
        lb_fail(&err, LB_E_PROTO, "lifeboatd answered something that is no JSON");
        return lb_cli_fail(cli, &err);
    }
    show(o);
    json_decref(o);
    return 0;
}

const char *lb_jstr(const json_t *o, const char *key)
{
    const char *s = json_string_value(json_object_get(o, key));

    return s ? s : "";
}

double lb_jnum(const json_t *o, const char *key)
{
    return json_number_value(json_object_get(o, key));
}

json_int_t lb_jint(const json_t *o, const char *key)
{
    return json_integer_value(json_object_get(o, key));
}

bool lb_jbool(const json_t *o, const char *key)
{
    return json_is_true(json_object_get(o, key));
}

const char *lb_when(char *buf, double wall_ms)
{
    time_t t = (time_t)(wall_ms / 1000);
    struct tm tm;

    localtime_r(&t, &tm);
    strftime(buf, 32, "%Y-%m-%d %H:%M:%S", &tm);
    return buf;
}

const char *lb_span(char *buf, size_t n, double ms)
{
    if (ms < 1000)
        snprintf(buf, n, "%.1f ms", ms);
    else if (ms < 120000)
        snprintf(buf, n, "%.2f s", ms / 1000);
    else
        snprintf(buf, n, "%d min %d s", (int)(ms / 60000), (int)fmod(ms / 1000, 60));
    return buf;
}

/* As it was asked for: "90 s", "10 min", "2 h". */
static const char *interval(char *buf, size_t n, double ms)
{
    bool hours = fmod(ms, 3600000) == 0, minutes = fmod(ms, 60000) == 0;

    snprintf(buf, n, "%.10g %s", ms / (hours ? 3600000 : minutes ? 60000 : 1000), hours ? "h" : minutes ? "min" : "s");
    return buf;
}

void lb_print_schedule(const json_t *o)
{
    const char *error = lb_jstr(o, "error");
    char every[32], last[32], next[32];

    if (lb_jnum(o, "every_ms") > 0) {
        printf("a checkpoint every %s, the latest %lld are kept; last %s, next %s\n",
               interval(every, sizeof(every), lb_jnum(o, "every_ms")), (long long)lb_jint(o, "keep"),
               lb_jnum(o, "last_ms") > 0 ? lb_when(last, lb_jnum(o, "last_ms")) : "never",
               lb_when(next, lb_jnum(o, "next_ms")));
    } else {
        printf("no checkpoints by schedule\n");
    }
    if (lb_jint(o, "failures"))
        printf("%-12s%lld failed since: ", "", (long long)lb_jint(o, "failures"));
    else if (error[0])
        printf("%-12s", "");
    if (error[0]) {
        lb_print_text(stdout, error);
        putchar('\n');
    }
}

/* ------------------------------------------------------------------- live lines */

static int sigint_fd = -1;

static void on_sigint(int sig)
{
    uint64_t one = 1;
    int saved = errno;

    (void)sig;
    if (write(sigint_fd, &one, sizeof(one)) < 0)
        _exit(LB_EXIT_DETACHED);
    errno = saved;
}

int lb_catch_sigint(void)
{
    struct sigaction sa = {.sa_handler = on_sigint};

    sigint_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (sigint_fd >= 0)
        sigaction(SIGINT, &sa, NULL);
    return sigint_fd;
}

unsigned lb_columns(void)
{
    struct winsize w;

    return ioctl(STDOUT_FILENO, TIOCGWINSZ, &w) == 0 && w.ws_col >= 20 ? w.ws_col : 80;
}

unsigned lb_rows(void)
{
    struct winsize w;

    return ioctl(STDOUT_FILENO, TIOCGWINSZ, &w) == 0 && w.ws_row >= 4 ? w.ws_row : 24;
}

void lb_draw_bar(double percent, const char *text)
{
    unsigned cols = lb_columns(), bar, full;
    int left = (int)cols - 1 - (int)strlen(text) - 9; /* "[] 100%  " */

    bar = left > 40 ? 40 : left > 8 ? (unsigned)left : 8;
    full = (unsigned)(percent / 100 * bar);
    fputs("\r[", stdout);
    for (unsigned i = 0; i < bar; i++)
        putchar(i < full ? '#' : '-');
    /* Cut, not wrapped: a wrapped line cannot be drawn over. */
    left = (int)cols - 1 - (int)bar - 9;
    printf("] %3.0f%%  %.*s\033[K", floor(percent), left > 0 ? left : 0, text);
    fflush(stdout);
}

/* --------------------------------------------------------------------- tables */

struct lb_table {
    unsigned n_cols, n, cap;
    char **cells;
};

static void add(struct lb_table *t, const char *text)
{
    if (t->n == t->cap) {
        t->cap = t->cap ? 2 * t->cap : 64;
        t->cells = lb_realloc(t->cells, t->cap * sizeof(*t->cells));
    }
    t->cells[t->n++] = lb_strdup(text);
}

struct lb_table *lb_table_new(unsigned n_cols, const char *const *heads)
{
    struct lb_table *t = lb_alloc(sizeof(*t));

    t->n_cols = n_cols;
    for (unsigned i = 0; i < n_cols; i++)
        add(t, heads[i]);
    return t;
}

void lb_table_cell(struct lb_table *t, const char *fmt, ...)
{
    char text[512];
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    add(t, text[0] ? text : "-");
}

void lb_table_print(struct lb_table *t)
{
    lb_table_write(t, stdout);
}

void lb_table_write(struct lb_table *t, FILE *f)
{
    LB_AUTO_FREE size_t *w = lb_alloc(t->n_cols * sizeof(*w));

    for (unsigned i = 0; i < t->n; i++)
        w[i % t->n_cols] = LB_MAX(w[i % t->n_cols], strlen(t->cells[i]));
    for (unsigned i = 0; i < t->n; i++) {
        bool last = i % t->n_cols == t->n_cols - 1;

        lb_print_text(f, t->cells[i]);
        if (last)
            fputc('\n', f);
        else
            fprintf(f, "%*s", (int)(w[i % t->n_cols] - strlen(t->cells[i]) + 2), "");
        free(t->cells[i]);
    }
    free(t->cells);
    free(t);
}

static void print_checks(FILE *f, const json_t *checks, bool all)
{
    size_t i;
    json_t *c;

    json_array_foreach (checks, i, c) {
        const char *status = lb_jstr(c, "status"), *remedy = lb_jstr(c, "remedy");
        bool ok = !strcmp(status, "ok");

        if (ok && !all)
            continue;
        fprintf(f, "  %-4s  ", status);
        fprintf(f, "%-16s  ", lb_jstr(c, "id"));
        lb_print_text(f, lb_jstr(c, "message"));
        fputc('\n', f);
        if (!ok && remedy[0]) {
            fprintf(f, "        %-16s  remedy: ", "");
            lb_print_text(f, remedy);
            fputc('\n', f);
        }
    }
}

void lb_print_preflight(const json_t *checks, bool all)
{
    unsigned warn = 0, fail = 0;
    size_t i;
    json_t *c;

    json_array_foreach (checks, i, c) {
        warn += !strcmp(lb_jstr(c, "status"), "warn");
        fail += !strcmp(lb_jstr(c, "status"), "fail");
    }
    printf("preflight: %zu checks, %u refused, %u warnings\n", json_array_size(checks), fail, warn);
    print_checks(stdout, checks, all);
    fflush(stdout);
}
