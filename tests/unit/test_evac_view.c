/* What people see of a plan and of an evacuation: events are replayed, and what is written is shown by a small terminal
 * of the test's own, so that a line that is drawn over at the wrong place is seen as on a real one. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <string.h>

#include "cmd/cli/evac_view.h"
#include "cmd/cli/evacuate.h"

/* ------------------------------------------------------------------------ the terminal */

#define MAX_LINES 4000
#define MAX_COLS 200

/* Lines since the beginning; the last `rows` of them are the screen. */
struct terminal {
    unsigned cols, rows, row, col;
    unsigned n;                    /* lines in use */
    char line[MAX_LINES][MAX_COLS + 1];
};

static struct terminal term;

static void term_reset(unsigned cols, unsigned rows)
{
    memset(&term, 0, sizeof(term));
    term.cols = cols;
    term.rows = rows;
    term.n = 1;
}

static void term_down(void)
{
    if (++term.row == term.n)
        term.n++;
    assert_true(term.n < MAX_LINES);
}

static void term_put(char c)
{
    if (term.col == term.cols) { /* it wraps when the next one comes */
        term.col = 0;
        term_down();
    }
    for (unsigned i = (unsigned)strlen(term.line[term.row]); i < term.col; i++)
        term.line[term.row][i] = ' ';
    term.line[term.row][term.col++] = c;
}

static const char *term_escape(const char *p)
{
    unsigned n = 0;

    assert_int_equal(*p, '[');
    for (p++; *p >= '0' && *p <= '9'; p++)
        n = n * 10 + (unsigned)(*p - '0');
    if (*p == 'A') {
        /* never above the screen: a real terminal stays in its first row */
        assert_true(n && n <= term.row && term.row - n + term.rows >= term.n);
        term.row -= n;
    } else {
        assert_int_equal(*p, 'J');
        assert_int_equal(n, 0);
        memset(&term.line[term.row][term.col], 0, sizeof(term.line[0]) - term.col);
        memset(&term.line[term.row + 1], 0, (term.n - term.row - 1) * sizeof(term.line[0]));
        term.n = term.row + 1;
    }
    return p;
}

static void term_feed(const char *text)
{
    for (const char *p = text; *p; p++) {
        if (*p == '\r') {
            term.col = 0;
        } else if (*p == '\n') {
            term.col = 0;
            term_down();
        } else if (*p == '\033') {
            p = term_escape(p + 1);
        } else {
            assert_true((unsigned char)*p >= 0x20 && *p != 0x7f);
            term_put(*p);
        }
    }
}

/* Lines that no longer fit are wrapped, as most terminals do; the cursor stays at the end. */
static void term_narrow(unsigned cols)
{
    static struct terminal old;

    old = term;
    term_reset(cols, old.rows);
    for (unsigned i = 0; i < old.n; i++) {
        if (i)
            term_feed("\n");
        term_feed(old.line[i]);
    }
}

/* Line i of what is there, from the end: 0 is the last. */
static const char *last(unsigned i)
{
    assert_true(i < term.n);
    return term.line[term.n - 1 - i];
}

static unsigned count(const char *text)
{
    unsigned n = 0;

    for (unsigned i = 0; i < term.n; i++)
        n += !strcmp(term.line[i], text);
    return n;
}

/* -------------------------------------------------------------------------- the replay */

struct replay {
    struct lb_evac_view *view;
    char *out;
    size_t n, fed;
    FILE *f;
    unsigned cols, rows;
};

static void begin_as(struct replay *r, bool returning, bool tty, unsigned cols, unsigned rows)
{
    memset(r, 0, sizeof(*r));
    r->f = open_memstream(&r->out, &r->n);
    r->view = lb_evac_view_new(r->f, tty, returning);
    r->cols = cols;
    r->rows = rows;
    term_reset(tty ? cols : MAX_COLS, rows);
}

static void begin(struct replay *r, bool tty, unsigned cols, unsigned rows)
{
    begin_as(r, false, tty, cols, rows);
}

static void feed(struct replay *r)
{
    fflush(r->f);
    term_feed(r->out + r->fed);
    r->fed = r->n;
}

static json_t *json(const char *text)
{
    json_error_t why;
    json_t *o = json_loads(text, 0, &why);

    if (!o)
        fail_msg("%s: %s", why.text, text);
    return o;
}

static void event(struct replay *r, const char *text)
{
    json_t *o = json(text);

    lb_evac_view_event(r->view, o, r->cols, r->rows);
    json_decref(o);
    feed(r);
}

static void result(struct replay *r, const char *text)
{
    json_t *o = json(text);

    lb_evac_view_result(r->view, o);
    json_decref(o);
    feed(r);
}

static void end(struct replay *r)
{
    lb_evac_view_free(r->view);
    fclose(r->f);
    free(r->out);
}

/* ----------------------------------------------------------------------------- a story */

#define HEAD(...) NOTED("", __VA_ARGS__)
#define NOTED(note, phase, percent, s, eta, done, failed, left, active, bytes, rate) \
    "{\"event\":\"evacuation\",\"phase\":\"" phase "\",\"percent\":" percent ",\"elapsed_s\":" s ",\"eta_s\":" eta \
    ",\"vms\":4,\"done\":" done ",\"failed\":" failed ",\"left\":" left ",\"active\":" active ",\"bytes\":" bytes \
    ",\"bytes_planned\":4294967296,\"throughput_bytes_per_s\":" rate ",\"note\":\"" note "\",\"items\":["
#define ITEM(vm, kind, from, to, state, percent, bytes, rate, eta, s, pause, tries, message, remedy) \
    "{\"vm\":\"" vm "\",\"kind\":\"" kind "\",\"from\":\"" from "\",\"to\":\"" to "\",\"state\":\"" state "\",\"percent\":" percent \
    ",\"bytes\":" bytes ",\"throughput_bytes_per_s\":" rate ",\"eta_s\":" eta ",\"elapsed_s\":" s ",\"downtime_ms\":" pause \
    ",\"tries\":" tries ",\"message\":\"" message "\",\"remedy\":\"" remedy "\"}"
#define DONE(vm, kind, to, pause) ITEM(vm, kind, "a", to, "done", "100", "1", "0", "null", "1", pause, "1", "", "")
#define WAITS(vm, kind, to) ITEM(vm, kind, "a", to, "waits", "0", "0", "0", "null", "0", "0", "0", "", "")

static const char *const story[] = {
    "{\"event\":\"plan\",\"id\":\"1\",\"host\":\"a\",\"steps\":[]}",
    HEAD("running", "0", "0.1", "null", "0", "0", "1", "0", "0", "0")
        WAITS("web1", "copy", "b") "," WAITS("web2", "copy", "c") "," WAITS("db", "swap", "b") ","
        ITEM("card", "copy", "a", "", "left", "0", "0", "0", "null", "0", "0", "0", "has a passed-through card", "unplug it") "]}",
    HEAD("running", "10", "1.5", "30", "0", "0", "1", "3", "104857600", "104857600")
        ITEM("web1", "copy", "a", "b", "sending", "25.5", "104857600", "104857600", "3.2", "1.4", "0", "1", "", "") ","
        ITEM("web2", "copy", "a", "c", "ready", "0", "0", "0", "null", "1.0", "0", "1", "", "") ","
        ITEM("db", "swap", "a", "b", "setup", "0", "0", "0", "null", "0.1", "0", "1", "", "") "]}",
    HEAD("running", "40", "12", "140", "2", "0", "1", "1", "1288490188", "104857600")
        ITEM("web1", "copy", "a", "b", "done", "100", "1288490188", "0", "null", "4.1", "21", "1", "", "") ","
        ITEM("db", "swap", "a", "b", "done", "100", "0", "0", "null", "0.31", "45.5", "1", "", "") ","
        ITEM("web2", "copy", "a", "c", "sending", "5", "1048576", "1048576", "9", "8", "0", "1", "", "") "]}",
    NOTED("web2 failed: host c has gone away", "replanning", "40", "13", "null", "2", "1", "1", "0", "1288490188", "0")
        ITEM("web2", "copy", "a", "c", "failed", "0", "0", "0", "null", "8.2", "0", "1", "host c has gone away", "see to it") "]}",
    "{\"event\":\"plan\",\"id\":\"2\",\"host\":\"a\",\"steps\":[{}],\"makespan_s\":6.5}",
    NOTED("web2 failed: host c has gone away", "running", "38", "14", "5", "2", "0", "1", "1", "1288490188", "0")
        ITEM("web2", "copy", "a", "b", "setup", "0", "0", "0", "null", "0.1", "0", "2", "", "") "]}",
};
static const char story_end[] = HEAD("incomplete", "100", "18", "0", "3", "0", "1", "0", "2576980377", "0")
    ITEM("web1", "copy", "a", "b", "done", "100", "1288490188", "0", "null", "4.1", "21", "1", "", "") ","
    ITEM("web2", "copy", "a", "b", "done", "100", "1288490188", "0", "null", "3.9", "19.5", "2", "", "") ","
    ITEM("db", "swap", "a", "b", "done", "100", "0", "0", "null", "0.31", "45.5", "1", "", "") ","
    ITEM("card", "copy", "a", "", "left", "0", "0", "0", "null", "0", "0", "0", "has a passed-through card", "unplug it")
    "],\"ok\":false}";

static void test_terminal(void **state)
{
    struct replay r;
    size_t before;

    (void)state;
    begin(&r, true, 120, 24);
    event(&r, story[0]);
    event(&r, story[1]);
    assert_int_equal(term.n, 1); /* what stays was in the plan */
    assert_string_equal(last(0), "[--------------------]   0%  0 of 4 VMs, 1 cannot  0 B of 4.0 GiB");
    event(&r, story[2]);
    assert_int_equal(term.n, 4);
    assert_string_equal(last(3), "[#####---------------]  25%  web1 -> b  sending  100.0 MiB/s  100.0 MiB sent  ETA 4 s");
    assert_string_equal(last(2), "[--------------------]   0%  web2 -> c  ready, waits for the link");
    assert_string_equal(last(1), "[--------------------]   0%  db -> b    its backup takes over");
    assert_string_equal(last(0), "[##------------------]  10%  0 of 4 VMs, 1 cannot  100.0 MiB/s  100.0 MiB of 4.0 GiB  ETA 30 s");
    before = r.n;
    event(&r, story[2]);
    assert_int_equal(r.n, before); /* nothing new: not a byte */
    event(&r, story[3]);
    assert_int_equal(term.n, 4);
    assert_string_equal(last(3), "web1 -> b: 1.2 GiB in 4.10 s, paused 21.0 ms");
    assert_string_equal(last(2), "db -> b: its backup has taken over in 310.0 ms, paused 45.5 ms");
    assert_string_equal(last(1), "[#-------------------]   5%  web2 -> c  sending  1.0 MiB/s  1.0 MiB sent  ETA 9 s");
    event(&r, story[4]);
    assert_string_equal(last(1), "web2 -> c failed: host c has gone away");
    event(&r, story[5]);
    assert_string_equal(last(0), ""); /* printed with a line end; what was drawn over is gone */
    assert_string_equal(last(1), "  planned anew: 1 steps in 6.50 s");
    event(&r, story[6]);
    assert_string_equal(last(1), "[--------------------]   0%  web2 -> b  setting up");
    assert_memory_equal(last(0), "[########------------]  40%", 27); /* never less than it was */
    result(&r, story_end);
    assert_string_equal(last(6), "  planned anew: 1 steps in 6.50 s");
    assert_string_equal(last(5), "web2 -> b: 1.2 GiB in 3.90 s, paused 19.5 ms");
    assert_string_equal(last(4), "not empty: 3 VMs left in 18.00 s, 2.4 GiB sent, paused 21.0 ms (median), 45.5 ms at most");
    assert_string_equal(last(2), "  card: has a passed-through card");
    assert_string_equal(last(1), "    remedy: unplug it");
    for (unsigned i = 0; i < term.n; i++)
        assert_int_not_equal(term.line[i][0], '[');
    end(&r);
}

static void test_no_terminal(void **state)
{
    static const char want[] =
        "web1 -> b: begun\n"
        "web2 -> c: begun\n"
        "db -> b: begun\n"
        "web1 -> b: 1.2 GiB in 4.10 s, paused 21.0 ms\n"
        "db -> b: its backup has taken over in 310.0 ms, paused 45.5 ms\n"
        " 40%  2 of 4 VMs, 1 cannot  100.0 MiB/s  1.2 GiB of 4.0 GiB  ETA 2 min 20 s\n"
        "web2 -> c failed: host c has gone away\n"
        "  planned anew: 1 steps in 6.50 s\n"
        "web2 -> b: begun\n";
    struct replay r;

    (void)state;
    begin(&r, false, 0, 0);
    for (size_t i = 0; i < LB_ARRAY_LEN(story); i++)
        event(&r, story[i]);
    assert_string_equal(r.out, want);
    end(&r);
}

static void test_words_of_the_end(void **state)
{
    static const struct {
        const char *result, *line[3];
        bool returning;
    } ends[] = {
        {HEAD("done", "100", "80.2", "0", "4", "0", "0", "0", "4294967296", "0")
             DONE("web1", "copy", "b", "20") "," DONE("web2", "swap", "b", "30.5") "," DONE("web2", "backup", "c", "0") "],\"ok\":true}",
         {"host a is empty: 2 VMs left it in 80.20 s, 4.0 GiB sent, paused 20.0 ms (median), 30.5 ms at most",
          "it takes no VM until `lifeboat maintenance off`; with --bring-back those that left return"}, false},
        {HEAD("done", "100", "8", "0", "2", "0", "0", "0", "1073741824", "0") DONE("web1", "copy", "b", "20") ","
             ITEM("web2", "copy", "a", "b", "done", "100", "1", "0", "null", "1", "50", "1", "its process has ended", "release it")
             "],\"ok\":true}",
         {"host a is empty: 1 VM left it in 8.00 s, 1.0 GiB sent, paused 20.0 ms (median), 20.0 ms at most",
          "  web2: its process has ended", "    remedy: release it"}, false},
        {HEAD("done", "100", "1", "0", "0", "0", "0", "0", "0", "0") "],\"ok\":true}", {"host a is empty: 0 VMs left it"}, false},
        {HEAD("cancelled", "50", "8", "null", "1", "0", "0", "0", "1073741824", "0")
             DONE("web1", "copy", "b", "20") "," WAITS("web2", "copy", "b") "],\"ok\":false}",
         {"cancelled: 1 VM left in 8.00 s, 1.0 GiB sent, paused 20.0 ms (median), 20.0 ms at most",
          "1 runs here; `lifeboat evacuate` goes on, `lifeboat maintenance off --bring-back` reverses what was done"}, false},
        {HEAD("incomplete", "100", "8", "0", "4", "0", "0", "0", "1073741824", "0")
             ITEM("web1", "back", "b", "a", "done", "100", "1", "0", "null", "1", "0", "1", "", "") ","
             ITEM("web2", "back", "b", "a", "left", "0", "0", "0", "null", "0", "0", "1", "host b does not answer", "") "],\"ok\":false}",
         {"maintenance mode is off; 1 VM came back in 8.00 s, 1.0 GiB sent", "1 did not; `lifeboat maintenance off --bring-back` tries it again",
          "  web2: host b does not answer"}, true},
        {HEAD("done", "100", "8", "0", "1", "0", "0", "0", "1", "0") ITEM("web1", "resume", "", "a", "done", "100", "1", "0", "null",
             "1", "0", "1", "", "") "],\"ok\":true}", {"maintenance mode is off; 1 VM came back in 8.00 s, 1 B sent"}, true},
    };

    (void)state;
    for (size_t i = 0; i < LB_ARRAY_LEN(ends); i++) {
        struct replay r;

        begin_as(&r, ends[i].returning, true, 150, 24);
        event(&r, story[0]);
        result(&r, ends[i].result);
        for (size_t k = 0; k < 3 && ends[i].line[k]; k++)
            assert_int_equal(count(ends[i].line[k]), 1);
        end(&r);
    }
}

/* ------------------------------------------------------------------ many, and a small one */

static json_t *item(const char *vm, const char *state, double percent)
{
    return json_pack("{s:s,s:s,s:s,s:s,s:s,s:f,s:f,s:f,s:f,s:i,s:s}", "vm", vm, "kind", "copy", "from", "a", "to", "b", "state",
                     state, "percent", percent, "bytes", percent * 1e6, "elapsed_s", 2.0, "downtime_ms", 20.0, "tries", 1, "message", "");
}

static json_t *evacuation(json_t *items, double elapsed_s, double percent)
{
    return json_pack("{s:s,s:s,s:f,s:f,s:f,s:i,s:i,s:o}", "event", "evacuation", "phase", "running", "percent", percent, "elapsed_s",
                     elapsed_s, "eta_s", 100 - elapsed_s, "vms", 60, "done", 0, "items", items);
}

static void give(struct replay *r, json_t *items, double elapsed_s, double percent)
{
    json_t *ev = evacuation(items, elapsed_s, percent);

    lb_evac_view_event(r->view, ev, r->cols, r->rows);
    json_decref(ev);
    feed(r);
}

static void test_more_than_fit(void **state)
{
    struct replay r;
    json_t *items = json_array();

    (void)state;
    begin(&r, true, 60, 10);
    for (int i = 0; i < 20; i++) {
        char vm[16];

        snprintf(vm, sizeof(vm), "vm%d", i);
        json_array_append_new(items, item(vm, i < 14 ? "setup" : "sending", i));
    }
    give(&r, items, 1, 1);
    assert_int_equal(term.n, 9); /* of 10 rows */
    assert_non_null(strstr(last(8), "vm14 -> b  sending")); /* those that send come first */
    assert_non_null(strstr(last(2), "vm0 -> b   setting up"));
    assert_string_equal(last(1), "and 13 more");
    end(&r);
}

static void test_narrower(void **state)
{
    struct replay r;

    (void)state;
    begin(&r, true, 100, 24);
    event(&r, story[1]);
    event(&r, story[2]);
    term_narrow(30);
    r.cols = 30;
    event(&r, story[3]);
    assert_string_equal(term.line[0], "web1 -> b: 1.2 GiB in 4.10 s, ");
    assert_string_equal(last(1), "[--------]   5%  web2 -> c  s");
    assert_int_equal(term.n, 7);
    end(&r);
}

/* The terminal writes "^C" behind the last line by itself. */
static void test_interrupted(void **state)
{
    struct replay r;

    (void)state;
    begin(&r, true, 40, 24);
    event(&r, story[1]);
    event(&r, story[2]);
    term_feed("^C");
    lb_evac_view_wipe(r.view);
    feed(&r);
    assert_int_equal(term.n, 1);
    assert_string_equal(last(0), "");
    end(&r);
}

/* A long evacuation of random events: each VM's end is told once, nothing is left on the screen that is not so. */
static void random_evacuation(unsigned seed)
{
    enum { VMS = 60 };
    static const char *const names[] = {"waits", "setup", "ready", "sending", "done"};
    unsigned at[VMS] = {0}, done = 0;
    struct replay r;

    begin(&r, true, 40 + seed * 7 % 100, 5 + seed * 3 % 20);
    for (unsigned t = 1; done < VMS; t++) {
        json_t *items = json_array();

        for (unsigned i = 0; i < VMS; i++) {
            char vm[32];

            snprintf(vm, sizeof(vm), i % 7 ? "vm%u" : "\033[2Jvm\n%u", i); /* what a peer may say */
            if (at[i] < 4 && rand_r(&seed) % 5 == 0) {
                at[i] += at[i] == 3 ? 1 : 1 + (unsigned)rand_r(&seed) % 2;
                at[i] = LB_MIN(at[i], 4u);
                done += at[i] == 4;
            } else if (t > 1 && at[i] != 3) {
                continue;
            }
            json_array_append_new(items, item(vm, names[at[i]], rand_r(&seed) % 100));
        }
        give(&r, items, t / 4.0, LB_MIN(t, 99u));
    }
    lb_evac_view_wipe(r.view);
    feed(&r);
    for (unsigned i = 0; i < term.n; i++)
        assert_true(term.line[i][0] != '[' && strncmp(term.line[i], "and ", 4));
    for (unsigned i = 0; i < VMS; i++) {
        char want[80];

        snprintf(want, sizeof(want), i % 7 ? "vm%u -> b:" : " [2Jvm %u -> b:", i);
        unsigned found = 0;
        for (unsigned k = 0; k < term.n; k++)
            found += !strncmp(term.line[k], want, strlen(want));
        assert_int_equal(found, 1);
    }
    end(&r);
}

static void test_random(void **state)
{
    (void)state;
    for (unsigned seed = 1; seed <= 40; seed++)
        random_evacuation(seed);
}

/* Who watches one that is under way is not told again what has ended; a cancelled transfer is told. */
static void test_attached(void **state)
{
    struct replay r;

    (void)state;
    begin(&r, false, 0, 0);
    event(&r, NOTED("old news", "running", "40", "12", "140", "2", "0", "0", "1", "0", "0") DONE("web1", "copy", "b", "21") ","
                  ITEM("web2", "copy", "a", "c", "sending", "5", "1048576", "1048576", "9", "8", "0", "1", "", "") "]}");
    assert_string_equal(r.out, "web2 -> c: begun\n");
    event(&r, NOTED("not the end", "cancelling", "41", "13", "null", "2", "0", "0", "0", "0", "0") WAITS("web2", "copy", "c") "]}");
    assert_string_equal(r.out, "web2 -> c: begun\nweb2: stopped, it runs on where it was\n  not the end\n");
    end(&r);
}

/* ------------------------------------------------------------------------------- plans */

static char *printed_plan(const char *text)
{
    json_t *o = json(text);
    char *out = NULL;
    size_t n;
    FILE *f = open_memstream(&out, &n);

    lb_plan_print(f, o);
    fclose(f);
    json_decref(o);
    return out;
}

static void test_plan(void **state)
{
    LB_AUTO_FREE char *out = printed_plan(
        "{\"id\":\"1\",\"host\":\"a\",\"makespan_s\":65.5,\"bytes\":2147483648,\"steps\":["
        "{\"vm\":\"web\",\"kind\":\"copy\",\"from\":\"a\",\"to\":\"c\",\"start_s\":0,\"end_s\":65.5,\"downtime_ms\":30,\"bytes\":2147483648,"
        "\"memory_bytes\":1073741824,\"dirty_bytes_per_s\":20971520,\"alone\":true,\"throttled\":false,\"suspended\":false},"
        "{\"vm\":\"db\",\"kind\":\"swap\",\"from\":\"a\",\"to\":\"b\",\"start_s\":64.9,\"end_s\":65.2,\"downtime_ms\":0,\"bytes\":0,"
        "\"memory_bytes\":1073741824,\"dirty_bytes_per_s\":0}],"
        "\"stays\":[{\"vm\":\"card\",\"backup\":false,\"reason\":\"has a passed-through card\",\"remedy\":\"unplug it\"},"
        "{\"vm\":\"db\",\"host\":\"a\",\"backup\":true,\"reason\":\"no host has room\",\"remedy\":\"\"}],"
        "\"hosts\":[{\"name\":\"a\",\"memory_bytes\":8589934592,\"before_bytes\":2147483648,\"after_bytes\":0,\"parallel\":1},"
        "{\"name\":\"c\",\"memory_bytes\":8589934592,\"reserved_bytes\":268435456,\"before_bytes\":0,\"after_bytes\":1073741824,"
        "\"link_bytes_per_s\":125000000},"
        "{\"name\":\"d\",\"memory_bytes\":0,\"before_bytes\":0,\"after_bytes\":0,\"error\":\"does not answer\",\"remedy\":\"see whether lifeboatd runs there\"},"
        "{\"name\":\"e\",\"memory_bytes\":1,\"before_bytes\":0,\"after_bytes\":0,\"maintenance\":true}]}");

    (void)state;
    assert_string_equal(out,
        "START  VM   STEP  FROM  TO  MEMORY   CHANGES     SENT     TAKES     PAUSED   NOTE\n"
        "0:00   web  copy  a     c   1.0 GiB  20.0 MiB/s  2.0 GiB  65.50 s   30.0 ms  alone on its link\n"
        "1:04   db   swap  a     b   1.0 GiB  -           -        300.0 ms  -        its backup takes over\n"
        "\n"
        "HOST  MEMORY   BEFORE   AFTER    FREE     LINK         AT ONCE  NOTE\n"
        "a     8.0 GiB  2.0 GiB  0 B      8.0 GiB  -            1        -\n"
        "c     8.0 GiB  0 B      1.0 GiB  6.8 GiB  119.2 MiB/s  -        -\n"
        "e     1 B      0 B      0 B      1 B      -            -        in maintenance: takes no VM\n"
        "\n"
        "not used: host d: does not answer\n"
        "  remedy: see whether lifeboatd runs there\n"
        "stays: card: has a passed-through card\n"
        "  remedy: unplug it\n"
        "no new backup for db on a: no host has room\n"
        "2 steps, 2.0 GiB sent in 65.50 s; 2 cannot be done\n");
}

/* -------------------------------------------------------------------------- priorities */

static const char vms[] = "[{\"name\":\"web1\"},{\"name\":\"db\"}]";

static enum lb_errcode priorities(const char *text, char **out, struct lb_error *err)
{
    LB_AUTO_FREE char *copy = lb_strdup(text);
    json_t *list = json(vms);
    int rc = lb_priorities_parse("order", copy, list, out, err);

    json_decref(list);
    return rc ? err->code : LB_OK;
}

static void test_priorities(void **state)
{
    static const struct {
        const char *text;
        enum lb_errcode code;
        const char *message;
    } wrong[] = {
        {"db: 1\nweb1 2\n", LB_E_USAGE, "order:2: \"web1 2\" has no \":\""},
        {"db: 1\r\n\n# x\nweb1: 10 000", LB_E_USAGE, "order:4: \"10 000\" is no number from 0 to 1000000"},
        {"web1: -1", LB_E_USAGE, "order:1: \"-1\" is no number from 0 to 1000000"},
        {"web1: 1000001", LB_E_USAGE, "order:1: \"1000001\" is no number from 0 to 1000000"},
        {" : 3", LB_E_USAGE, "order:1: there is no name before the \":\""},
        {"db: 1\ndb: 2", LB_E_USAGE, "order:2: db has a priority already"},
        {"\nweb9: 5", LB_E_NOT_FOUND, "order:2: there is no VM \"web9\" on this host"},
        {"w\xff*: 5", LB_E_USAGE, "order:1: a name must be UTF-8"},
    };
    struct lb_error err = LB_ERROR_INIT;
    char *out = NULL;

    (void)state;
    assert_int_equal(priorities("# who first\n db : 20 # the one\n\nweb*:10\nold-*: 3", &out, &err), LB_OK);
    assert_string_equal(out, "{\"db\":20,\"web*\":10,\"old-*\":3}");
    free(out);
    out = NULL;
    for (size_t i = 0; i < LB_ARRAY_LEN(wrong); i++) {
        err = (struct lb_error)LB_ERROR_INIT;
        assert_int_equal(priorities(wrong[i].text, &out, &err), wrong[i].code);
        assert_string_equal(err.message, wrong[i].message);
        assert_null(out);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_terminal),
        cmocka_unit_test(test_no_terminal),
        cmocka_unit_test(test_words_of_the_end),
        cmocka_unit_test(test_more_than_fit),
        cmocka_unit_test(test_narrower),
        cmocka_unit_test(test_interrupted),
        cmocka_unit_test(test_random),
        cmocka_unit_test(test_attached),
        cmocka_unit_test(test_plan),
        cmocka_unit_test(test_priorities),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
