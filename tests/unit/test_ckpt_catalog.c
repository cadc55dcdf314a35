/* The catalog: names, numbers, lists with damaged files, and removal that never harms what stays. */
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include "checkpoint/catalog_internal.h"
#include "core/registry.h"
#include "tests/unit/ckpt_util.h"

static char dir[64];
static struct lb_error last_error;

static int setup(void **s)
{
    (void)s;
    /* Hundreds of durable files: in memory, where fsync costs nothing, when that is there. */
    snprintf(dir, sizeof(dir), "%s/lb-catalog-XXXXXX", access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm");
    return mkdtemp(dir) ? 0 : -1;
}

static int teardown(void **s)
{
    (void)s;
    return lb_remove_tree(dir, NULL);
}

static int lock(const char *vm)
{
    int fd = -1;
    OK(fd = lb_catalog_lock(dir, vm, 0, err));
    return fd;
}

static void write_text(const char *name, const char *text)
{
    LB_AUTO_FREE char *path = lb_asprintf("%s/%s", dir, name);
    OK(lb_file_write_atomic(path, text, strlen(text), 0600, err));
}

static void flip(const char *name, long at)
{
    LB_AUTO_FREE char *path = lb_asprintf("%s/%s", dir, name);
    LB_AUTO_FD int fd = open(path, O_RDWR);
    uint8_t c;
    assert_int_equal(pread(fd, &c, 1, at), 1);
    c ^= 1;
    assert_int_equal(pwrite(fd, &c, 1, at), 1);
}

/* A chain: machines[i] is what number i + 1 holds. */
static void make_chain(const char *vm, struct machine *machines, unsigned n, struct lb_ckpt_key *key)
{
    unsigned seed = 11;
    struct machine m = {0};
    for (unsigned i = 0; i < n; i++) {
        machine_step(&m, &seed);
        if (i == 0)
            for (unsigned k = 0; k < 5; k++)
                machine_step(&m, &seed);
        assert_int_equal(take(dir, vm, &m, "", false, key, NULL, 0), i + 1);
        machines[i] = m;
    }
}

static struct lb_ckpt_key *test_key(void)
{
    struct lb_ckpt_key *key = NULL;
    LB_AUTO_FREE char *path = lb_asprintf("%s/key", dir);
    OK(lb_file_write_atomic(path, "0123456789abcdef0123456789abcdef", 32, 0600, err));
    OK(lb_ckpt_key_file(path, &key, err));
    return key;
}

/* ------------------------------------------------------------------------ names */

static void test_numbers(void **s)
{
    (void)s;
    uint32_t n;
    char path[512];
    FAILS(lb_catalog_lock(dir, "../x", 0, err), LB_E_USAGE);
    LB_AUTO_FD int held = lock("web");
    for (uint32_t i = 1; i <= 3; i++) {
        OK(lb_catalog_next(dir, "web", &n, path, err));
        assert_int_equal(n, i);
    }
    LB_AUTO_FREE char *want = lb_asprintf("%s/web/3.lbc", dir);
    assert_string_equal(path, want);
    write_text("web/9.lbc", "x"); /* `next` is older than a file: a copy from a backup */
    OK(lb_catalog_next(dir, "web", &n, path, err));
    assert_int_equal(n, 10);
    write_text("web/next", "zehn");
    FAILS(lb_catalog_next(dir, "web", &n, path, err), LB_E_STATE);
    write_text("web/next", "4294967295\n");
    OK(lb_catalog_next(dir, "web", &n, path, err));
    assert_int_equal(n, UINT32_MAX);
    FAILS(lb_catalog_next(dir, "web", &n, path, err), LB_E_STATE);
    LB_AUTO_FREE char *suspend = lb_catalog_suspend_path(dir, "web");
    assert_true(lb_catalog_number("suspend.lbc", &n) && n == 0);
    static const char *const no[] = {"0.lbc", "01.lbc", "4294967296.lbc", "1.lbc.tmp-7", "x.lbc", ".lbc", "1", "1.ws"};
    for (unsigned i = 0; i < LB_ARRAY_LEN(no); i++)
        assert_false(lb_catalog_number(no[i], &n));
}

static void test_lock(void **s)
{
    (void)s;
    int held = lock("web");
    uint64_t t = lb_now_ns();
    FAILS(lb_catalog_lock(dir, "web", 60, err), LB_E_STATE);
    assert_true(lb_now_ns() - t >= 60u * 1000000);
    LB_AUTO_FD int other = lock("db");
    /* What dead writers left goes with the next lock; nothing else does. */
    write_text("web/4.lbc.tmp-99", "half");
    write_text("web/.next.abcdef.tmp", "");
    write_text("web/.5.ws.abcdef.tmp", "somebody writes this without the lock");
    write_text("web/3.lbc", "x");
    close(held);
    held = lock("web");
    assert_int_equal(files_in(dir, "web", "tmp-99"), 0);
    assert_int_equal(files_in(dir, "web", ".next."), 0);
    assert_int_equal(files_in(dir, "web", ".5.ws."), 1);
    assert_int_equal(files_in(dir, "web", "3.lbc"), 1);
    close(held);
}

/* -------------------------------------------------------------------- list, find */

static void test_list(void **s)
{
    (void)s;
    struct machine m[4];
    struct lb_ckpt_entry *v;
    unsigned n;
    OK(lb_catalog_list(dir, NULL, NULL, &v, &n, err));
    assert_int_equal(n, 0);
    free(v);
    struct lb_ckpt_key *key = test_key();
    LB_AUTO_FD int a = lock("web"), b = lock("db"), c = lock("dark");
    make_chain("web", m, 4, NULL);
    make_chain("db", m, 2, NULL);
    make_chain("dark", m, 2, key);
    flip("web/2.lbc", 20); /* in the header: nothing of it can be believed */
    LB_AUTO_FREE char *cut = lb_asprintf("%s/db/2.lbc", dir);
    assert_int_equal(truncate(cut, 8000), 0);

    OK(lb_catalog_list(dir, NULL, NULL, &v, &n, err));
    assert_int_equal(n, 8);
    static const struct {
        const char *ref;
        bool readable;
        unsigned depth;
        enum lb_errcode code;
    } want[] = {
        {"dark@1", false, 1, LB_E_AUTH}, {"dark@2", false, 2, LB_E_AUTH}, {"db@1", true, 1, LB_OK},
        {"db@2", false, 0, LB_E_PROTO},  {"web@1", true, 1, LB_OK},       {"web@2", false, 0, LB_E_PROTO},
        {"web@3", true, 0, LB_OK},       {"web@4", true, 0, LB_OK},
    };
    for (unsigned i = 0; i < n; i++) {
        assert_string_equal(v[i].ref, want[i].ref);
        assert_int_equal(v[i].readable, want[i].readable);
        if (v[i].readable || v[i].error.code == LB_E_AUTH) /* a damaged one's depth is of no matter */
            assert_int_equal(v[i].depth, want[i].depth);
        assert_int_equal(v[i].error.code, want[i].code);
        lb_ckpt_entry_free(&v[i]);
    }
    free(v);
    OK(lb_catalog_list(dir, "dark", key, &v, &n, err));
    assert_int_equal(n, 2);
    assert_true(v[1].readable && v[1].depth == 2 && v[1].info.encrypted);
    assert_string_equal(v[1].info.meta.vm, "dark");
    lb_ckpt_entry_free(&v[0]);
    lb_ckpt_entry_free(&v[1]);
    free(v);

    struct lb_ckpt_entry e;
    struct lb_chain *chain;
    OK(lb_catalog_find(dir, "web@3", NULL, &e, err));
    assert_int_equal(e.depth, 0);
    FAILS(lb_catalog_open(dir, &e, NULL, &chain, err), LB_E_NOT_FOUND);
    assert_non_null(strstr(last_error.message, "parent of web@3 (id "));
    lb_ckpt_entry_free(&e);
    OK(lb_catalog_find(dir, "web@2", NULL, &e, err));
    FAILS(lb_catalog_open(dir, &e, NULL, &chain, err), LB_E_PROTO);
    lb_ckpt_entry_free(&e);
    lb_ckpt_key_free(key);
}

static void found(const char *ref, const char *want, unsigned depth)
{
    struct lb_ckpt_entry e;
    OK(lb_catalog_find(dir, ref, NULL, &e, err));
    assert_string_equal(e.ref, want);
    assert_true(e.readable);
    assert_int_equal(e.depth, depth);
    lb_ckpt_entry_free(&e);
}

static void test_find(void **s)
{
    (void)s;
    struct machine m = {.page = {1, 2, 3}};
    struct lb_ckpt_entry e;
    FAILS(lb_catalog_find(dir, "web", NULL, &e, err), LB_E_NOT_FOUND);
    FAILS(lb_catalog_find(dir, "@3", NULL, &e, err), LB_E_USAGE);
    FAILS(lb_catalog_find(dir, "/nowhere/x.lbc", NULL, &e, err), LB_E_NOT_FOUND);
    LB_AUTO_FD int held = lock("web");
    take(dir, "web", &m, "before", false, NULL, NULL, 0);
    take(dir, "web", &m, "twice", false, NULL, NULL, 0);
    take(dir, "web", &m, "twice", false, NULL, NULL, 0);
    LB_AUTO_FREE char *suspend = lb_catalog_suspend_path(dir, "web");
    struct lb_ckpt_meta meta = {.vm = "web", .suspend = true, .desc = test_desc()};
    write_checkpoint(suspend, &m, &meta, NULL, NULL);
    found("web", "web@3", 3);
    found("web@1", "web@1", 1);
    found("web@before", "web@1", 1);
    found("web@suspend", "web@suspend", 1);
    LB_AUTO_FREE char *in = lb_asprintf("%s/web/../web/2.lbc", dir);
    found(in, "web@2", 2);
    FAILS(lb_catalog_find(dir, "web@twice", NULL, &e, err), LB_E_USAGE);
    assert_non_null(strstr(last_error.message, "web@2 and web@3"));
    FAILS(lb_catalog_find(dir, "web@7", NULL, &e, err), LB_E_NOT_FOUND);
    assert_non_null(strstr(last_error.remedy, "web@suspend, web@1 (before), web@2"));
    FAILS(lb_catalog_find(dir, "web@nolabel", NULL, &e, err), LB_E_NOT_FOUND);
    FAILS(lb_catalog_find(dir, "dbx", NULL, &e, err), LB_E_NOT_FOUND);
    assert_non_null(strstr(last_error.remedy, "web@1"));
    /* A file that is in no catalog, with its parents beside it */
    LB_AUTO_FREE char *away = lb_asprintf("%s.away", dir);
    LB_AUTO_FREE char *cmd = lb_asprintf("cp -r %s/web %s", dir, away);
    assert_int_equal(system(cmd), 0);
    LB_AUTO_FREE char *file = lb_asprintf("%s/3.lbc", away);
    found(file, file, 3);
    OK(lb_remove_tree(away, err));
}

static void test_latest_and_prunable(void **s)
{
    (void)s;
    struct machine m = {.page = {5}};
    struct lb_ckpt_entry e;
    struct lb_ckpt_key *key = test_key();
    LB_AUTO_FD int held = lock("web");
    FAILS(lb_catalog_latest(dir, "web", NULL, &e, err), LB_E_NOT_FOUND);
    take(dir, "web", &m, "", false, NULL, NULL, 0);
    take(dir, "web", &m, "keepme", false, NULL, NULL, 0);
    take(dir, "web", &m, "", false, NULL, NULL, 0);
    take(dir, "web", &m, "", true, key, NULL, 0);
    take(dir, "web", &m, "", false, NULL, NULL, 0);
    OK(lb_catalog_latest(dir, "web", key, &e, err)); /* an increment is encrypted as its parent is */
    assert_string_equal(e.ref, "web@4");
    lb_ckpt_entry_free(&e);
    flip("web/5.lbc", 40);
    OK(lb_catalog_latest(dir, "web", NULL, &e, err)); /* the one before, when the last is damaged */
    assert_string_equal(e.ref, "web@3");
    lb_ckpt_entry_free(&e);

    static const struct {
        unsigned keep;
        uint64_t age_ms;
        bool labelled;
        const char *want;
    } cases[] = {
        {0, 0, true, "3 2 1 "}, {0, 0, false, "3 1 "}, {3, 0, false, "1 "}, {3, 0, true, "2 1 "},
        {9, 0, true, ""},       {0, 3600000, true, ""},
    };
    for (unsigned i = 0; i < LB_ARRAY_LEN(cases); i++) {
        LB_AUTO_FREE uint32_t *v = NULL;
        char text[64] = "";
        unsigned n;
        OK(lb_catalog_prunable(dir, "web", NULL, cases[i].keep, cases[i].age_ms, cases[i].labelled, &v, &n, err));
        for (unsigned k = 0; k < n; k++)
            sprintf(text + strlen(text), "%u ", v[k]);
        assert_string_equal(text, cases[i].want);
    }
    lb_ckpt_key_free(key);
}

/* ----------------------------------------------------------------------- removal */

static int rm(const uint32_t *numbers, unsigned n, const struct lb_ckpt_key *key, struct lb_prune_result *res,
              struct lb_error *err)
{
    return lb_catalog_remove(dir, "web", numbers, n, key, NULL, NULL, NULL, -1, res, err);
}

static void refresh(void)
{
    OK(lb_remove_tree(dir, err));
    assert_int_equal(mkdir(dir, 0700), 0);
}

/* Every set of a chain of five goes, in one step and one by one: what stays is what it was. */
static void check_sets(struct lb_ckpt_key *(*make_key)(void), unsigned step)
{
    enum { N = 5 };
    for (unsigned set = 1; set < 1u << N; set += step) {
        struct machine m[N];
        struct lb_prune_result res;
        uint32_t numbers[N];
        unsigned n = 0, joined = 0;
        refresh();
        struct lb_ckpt_key *key = make_key ? make_key() : NULL;
        LB_AUTO_FD int held = lock("web");
        make_chain("web", m, N, key);
        for (unsigned i = 0; i < N; i++) {
            if (set & 1u << i)
                numbers[n++] = i + 1;
            joined += i > 0 && !(set & 1u << i) && (set & 1u << (i - 1));
        }
        if (set % 3 == 0) { /* as a schedule does */
            for (unsigned i = 0; i < n; i++)
                OK(rm(&numbers[i], 1, key, &res, err));
        } else {
            OK(rm(numbers, n, key, &res, err));
            assert_int_equal(res.removed, n);
            assert_int_equal(res.joined, joined);
        }
        assert_int_equal(files_in(dir, "web", "lbc"), N - n);
        for (unsigned i = 0; i < N; i++) {
            LB_AUTO_FREE char *ref = lb_asprintf("web@%u", i + 1);
            if (!(set & 1u << i))
                holds(dir, ref, key, &m[i]);
        }
        /* and another one stands on what is left */
        struct machine next = m[N - 1];
        unsigned seed = set;
        machine_step(&next, &seed);
        assert_int_equal(take(dir, "web", &next, "", false, key, NULL, 0), N + 1);
        holds(dir, "web@6", key, &next);
        lb_ckpt_key_free(key);
    }
}

static void test_remove_sets(void **s)
{
    (void)s;
    check_sets(NULL, 1);
}

static void test_remove_sets_encrypted(void **s)
{
    (void)s;
    check_sets(test_key, 4);
}

static void test_remove_refusals(void **s)
{
    (void)s;
    struct machine m[4];
    struct lb_prune_result res;
    struct lb_ckpt_key *key = test_key();
    LB_AUTO_FD int held = lock("web");
    make_chain("web", m, 4, key);
    FAILS(rm((uint32_t[]){9}, 1, key, &res, err), LB_E_NOT_FOUND);
    FAILS(rm((uint32_t[]){1}, 1, NULL, &res, err), LB_E_AUTH); /* 2 has to be written again */
    holds(dir, "web@4", key, &m[3]);
    OK(rm((uint32_t[]){4}, 1, NULL, &res, err)); /* nothing stands on it: no key needed */
    assert_int_equal(res.removed, 1);
    assert_true(res.freed_bytes > 0);
    LB_AUTO_FREE char *second = lb_asprintf("%s/web/2.lbc", dir);
    assert_int_equal(truncate(second, 8192), 0);
    FAILS(rm((uint32_t[]){1}, 1, key, &res, err), LB_E_STATE);
    assert_non_null(strstr(last_error.remedy, "web@2"));
    OK(rm((uint32_t[]){1, 2, 3}, 3, key, &res, err));
    assert_int_equal(res.removed, 3);
    assert_int_equal(files_in(dir, "web", "lbc"), 0);
    char path[512];
    uint32_t n;
    OK(lb_catalog_next(dir, "web", &n, path, err)); /* an empty catalog remembers */
    assert_int_equal(n, 5);
    lb_ckpt_key_free(key);
}

/* Who has the files open reads on while they are replaced and removed. */
static void test_reader_goes_on(void **s)
{
    (void)s;
    struct machine m[4];
    struct lb_ckpt_entry e;
    struct lb_chain *c;
    struct lb_prune_result res;
    LB_AUTO_FD int held = lock("web");
    make_chain("web", m, 4, NULL);
    OK(lb_catalog_find(dir, "web@3", NULL, &e, err));
    OK(lb_catalog_open(dir, &e, NULL, &c, err));
    OK(rm((uint32_t[]){1, 2}, 2, NULL, &res, err));
    OK(rm((uint32_t[]){3}, 1, NULL, &res, err));
    chain_holds(c, &m[2]);
    lb_chain_close(c);
    lb_ckpt_entry_free(&e);
    holds(dir, "web@4", NULL, &m[3]);
}

/* In a child: says what is wrong, instead of failing a test of the parent. */
static int read_latest(const struct machine *want, struct lb_error *err)
{
    struct seen seen = {.lock = PTHREAD_MUTEX_INITIALIZER};
    struct lb_chain_read_all all = {.threads = 1, .fn = see_pages, .arg = &seen, .cancel_fd = -1};
    struct lb_ckpt_entry e;
    struct lb_chain *c;
    if (lb_catalog_find(dir, "web", NULL, &e, err))
        return -1;
    int rc = lb_catalog_open(dir, &e, NULL, &c, err);
    lb_ckpt_entry_free(&e);
    if (rc)
        return -1;
    rc = lb_chain_read_all(c, &all, err);
    lb_chain_close(c);
    return rc || !memcmp(&seen.m, want, sizeof(*want)) ? rc : lb_fail(err, LB_E_INTERNAL, "it is another one");
}

static int read_until(int cancel_fd, const struct machine *want)
{
    unsigned times = 0;
    struct lb_error err = LB_ERROR_INIT;
    while (!lb_readable(cancel_fd, 0)) { /* until the other end is closed */
        if (read_latest(want, &err)) {
            fprintf(stderr, "# reader: %s\n", err.message);
            return 1;
        }
        times++;
    }
    return times > 2 ? 0 : 2;
}

/* Who looks for a checkpoint and opens it while those below it go finds it whole each time. */
static void test_reader_beside_removal(void **s)
{
    (void)s;
    enum { N = 12 };
    struct machine m[N];
    struct lb_prune_result res;
    int ends[2], status;
    LB_AUTO_FD int held = lock("web");
    make_chain("web", m, N, NULL);
    assert_int_equal(pipe(ends), 0);
    pid_t pid = fork();
    if (pid == 0) {
        close(ends[1]);
        _exit(read_until(ends[0], &m[N - 1]));
    }
    close(ends[0]);
    for (uint32_t i = 1; i < N; i++)
        OK(rm(&i, 1, NULL, &res, err));
    close(ends[1]);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_int_equal(status, 0);
    holds(dir, "web@12", NULL, &m[N - 1]);
}

struct told {
    uint64_t done, total;
    unsigned times;
};

static void on_progress(uint64_t done, uint64_t total, void *arg)
{
    struct told *t = arg;
    assert_true(done <= total);
    assert_true(done >= t->done);
    assert_true(!t->total || total == t->total);
    *t = (struct told){.done = done, .total = total, .times = t->times + 1};
}

static void test_progress_and_cancel(void **s)
{
    (void)s;
    struct machine m[4];
    struct lb_prune_result res;
    struct told t = {0};
    int ends[2];
    LB_AUTO_FD int held = lock("web");
    make_chain("web", m, 4, NULL);
    assert_int_equal(pipe(ends), 0);
    assert_int_equal(write(ends[1], "x", 1), 1);
    FAILS(lb_catalog_remove(dir, "web", (uint32_t[]){1, 3}, 2, NULL, NULL, NULL, NULL, ends[0], &res, err),
          LB_E_CANCELLED);
    assert_int_equal(files_in(dir, "web", "tmp-"), 0);
    holds(dir, "web@4", NULL, &m[3]);
    holds(dir, "web@1", NULL, &m[0]);
    OK(lb_catalog_remove(dir, "web", (uint32_t[]){1, 3}, 2, NULL, NULL, on_progress, &t, -1, &res, err));
    assert_true(t.times >= 2);
    assert_int_equal(t.done, t.total);
    holds(dir, "web@4", NULL, &m[3]);
    close(ends[0]);
    close(ends[1]);
}

/* ----------------------------------------------------------------------- death */

/* After a death: nothing is in the way, everything that stays is whole, and the removal can be made again. */
static void check_after_death(const struct machine *m, unsigned n)
{
    struct lb_ckpt_entry *v;
    struct lb_prune_result res;
    unsigned count;
    LB_AUTO_FD int held = lock("web");
    assert_int_equal(files_in(dir, "web", "tmp-"), 0);
    OK(lb_catalog_list(dir, "web", NULL, &v, &count, err));
    assert_true(count >= n - 2);
    for (unsigned i = 0; i < count; i++) {
        holds(dir, v[i].ref, NULL, &m[v[i].number - 1]);
        lb_ckpt_entry_free(&v[i]);
    }
    free(v);
    uint32_t numbers[2];
    unsigned left = 0;
    for (uint32_t i = 2; i <= 3; i++) {
        LB_AUTO_FREE char *path = lb_asprintf("%s/web/%u.lbc", dir, i);
        if (access(path, F_OK) == 0)
            numbers[left++] = i;
    }
    OK(rm(numbers, left, NULL, &res, err));
    assert_int_equal(files_in(dir, "web", "lbc"), n - 2);
    for (unsigned i = 0; i < n; i++) {
        LB_AUTO_FREE char *ref = lb_asprintf("web@%u", i + 1);
        if (i != 1 && i != 2)
            holds(dir, ref, NULL, &m[i]);
    }
}

/* In a child: remove 2 and 3 of five, dying on the way. 0: it came to its end. */
static int die_removing(rlim_t max_file, const char *point)
{
    pid_t pid = fork();
    if (pid == 0) {
        struct lb_prune_result res;
        struct rlimit lim = {.rlim_cur = max_file, .rlim_max = max_file};
        LB_AUTO_FREE char *mark = lb_asprintf("%s/at-point", dir);
        if (max_file)
            setrlimit(RLIMIT_FSIZE, &lim); /* the write that goes over it kills */
        if (point) {
            setenv("LIFEBOAT_PAUSE_AT", point, 1);
            setenv("LIFEBOAT_PAUSE_FILE", mark, 1);
        }
        int held = lb_catalog_lock(dir, "web", 0, NULL);
        _exit(held < 0 || rm((uint32_t[]){2, 3}, 2, NULL, &res, NULL) ? 1 : 0);
    }
    LB_AUTO_FREE char *mark = lb_asprintf("%s/at-point", dir);
    int status;
    for (unsigned i = 0; point && i < 5000 && access(mark, F_OK) < 0; i++)
        usleep(1000);
    if (point) {
        assert_int_equal(access(mark, F_OK), 0);
        kill(pid, SIGKILL);
    }
    assert_int_equal(waitpid(pid, &status, 0), pid);
    if (WIFEXITED(status))
        assert_int_equal(WEXITSTATUS(status), 0);
    return WIFSIGNALED(status);
}

static void test_death_at_every_length(void **s)
{
    (void)s;
    enum { N = 5 };
    struct machine m[N];
    unsigned deaths = 0;
    bool died = true;
    for (rlim_t max = 3; died; max += 11111) {
        refresh();
        int held = lock("web");
        make_chain("web", m, N, NULL);
        close(held);
        died = die_removing(max, NULL);
        deaths += died;
        check_after_death(m, N);
    }
    assert_true(deaths >= 4);
}

static void test_death_at_points(void **s)
{
    (void)s;
    enum { N = 5 };
    static const char *const points[] = {"rm-rewritten", "rm-unlinked"};
    struct machine m[N];
    for (unsigned i = 0; i < LB_ARRAY_LEN(points); i++) {
        refresh();
        int held = lock("web");
        make_chain("web", m, N, NULL);
        close(held);
        assert_int_equal(die_removing(0, points[i]), 1);
        check_after_death(m, N);
    }
}

/* ------------------------------------------------------------------------ disks */

static void test_disks_json(void **s)
{
    (void)s;
    struct lb_ckpt_disk a = {.id = "vda", .argv_path = "/img/web.raw", .path = "/img/web.raw", .format = "raw",
                             .size_bytes = 1 << 20, .mtime_ns = 17, .inode = UINT64_MAX, .device = 3};
    struct lb_ckpt_disk b = a;
    struct machine m = {.page = {1}};
    struct lb_ckpt_entry e;
    struct lb_disks d;
    snprintf(b.path, sizeof(b.path), "%s/web.lb-1.qcow2", dir);
    write_text("web.lb-1.qcow2", "an image");
    int held = lock("web");
    take(dir, "web", &m, "", false, NULL, &a, 1);
    OK(lb_catalog_find(dir, "web@1", NULL, &e, err)); /* nothing noted: what the file says */
    assert_int_equal(e.n_disks, 1);
    assert_memory_equal(e.disks, &a, sizeof(a));
    lb_ckpt_entry_free(&e);
    OK(lb_catalog_set_disks(dir, "web", 1, &b, 1, err));
    OK(lb_catalog_use_image(dir, "web", b.path, "web-1", true, err));
    OK(lb_catalog_use_image(dir, "web", b.path, "web-1", true, err));
    OK(lb_catalog_use_image(dir, "web", "/img/gone.qcow2", "web-2", true, err));
    OK(lb_catalog_find(dir, "web@1", NULL, &e, err));
    assert_memory_equal(e.disks, &b, sizeof(b));
    lb_ckpt_entry_free(&e);
    OK(lb_disks_load(dir, "web", &d, err));
    assert_int_equal(d.n_users, 2);
    assert_true(lb_disks_held(&d, b.path) && !lb_disks_held(&d, a.path));
    lb_disks_free(&d);

    /* A checkpoint that never came to be, or is gone: its image is spare. A user without image: forgotten. */
    OK(lb_catalog_set_disks(dir, "web", 0, &a, 1, err));
    LB_AUTO_FREE char *first = lb_asprintf("%s/web/1.lbc", dir);
    assert_int_equal(unlink(first), 0);
    close(held);
    held = lock("web");
    OK(lb_disks_load(dir, "web", &d, err));
    assert_int_equal(d.n_of, 0);
    assert_int_equal(d.n_users, 1);
    assert_int_equal(d.n_spare, 1);
    assert_memory_equal(d.spare, &b, sizeof(b));
    d.joining = (struct lb_disks_joining){.id = "vda", .top = "/t", .base = "/b", .base_format = "raw", .done = true};
    OK(lb_disks_save(dir, "web", &d, err));
    lb_disks_free(&d);
    OK(lb_disks_load(dir, "web", &d, err));
    assert_true(d.joining.done && !strcmp(d.joining.base_format, "raw") && !d.joining.above[0]);
    lb_disks_free(&d);
    OK(lb_catalog_use_image(dir, "web", b.path, "web-1", false, err));

    take(dir, "web", &m, "", false, NULL, &a, 1);
    write_text("web/disks.json", "{\"version\": 1}");
    OK(lb_catalog_find(dir, "web@2", NULL, &e, err)); /* no guess where its disk is */
    assert_false(e.readable);
    assert_int_equal(e.error.code, LB_E_STATE);
    lb_ckpt_entry_free(&e);
    FAILS(lb_catalog_set_disks(dir, "web", 1, &b, 1, err), LB_E_STATE);
    close(held);
}

static void put_be(uint8_t *p, uint64_t v, unsigned bytes)
{
    while (bytes--) {
        p[bytes] = (uint8_t)v;
        v >>= 8;
    }
}

static void test_qcow2_head(void **s)
{
    (void)s;
    static const struct {
        const char *backing, *want;
        bool opaque;
    } cases[] = {
        {"", "", false},
        {"/img/a.raw", "/img/a.raw", false},
        {"a.raw", "@/a.raw", false},
        {"file:/img/a.raw", "/img/a.raw", false},
        {"json:{\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"/img/a.raw\"}}", "/img/a.raw", false},
        {"json:{\"driver\":\"raw\",\"file.filename\":\"a.raw\"}", "@/a.raw", false},
        {"nbd:localhost:10809", "nbd:localhost:10809", false},
        {"json:{\"driver\":\"nbd\"}", NULL, true},
        {"json:{", NULL, true},
    };
    LB_AUTO_FREE char *path = lb_asprintf("%s/x.qcow2", dir);
    struct lb_qcow2_head h;
    for (unsigned i = 0; i < LB_ARRAY_LEN(cases); i++) {
        uint8_t head[512] = {'Q', 'F', 'I', 0xfb};
        size_t len = strlen(cases[i].backing);
        put_be(head + 4, 3, 4);
        put_be(head + 8, len ? 112 : 0, 8);
        put_be(head + 16, len, 4);
        put_be(head + 24, 1 << 20, 8);
        put_be(head + 72, i == 1 ? 4 : 0, 8);
        memcpy(head + 112, cases[i].backing, len);
        OK(lb_file_write_atomic(path, head, sizeof(head), 0600, err));
        OK(lb_qcow2_head(path, &h, err));
        assert_true(h.qcow2);
        assert_int_equal(h.size_bytes, 1 << 20);
        assert_int_equal(h.opaque, cases[i].opaque);
        assert_int_equal(h.data_file, i == 1);
        if (cases[i].want) {
            LB_AUTO_FREE char *want = cases[i].want[0] == '@' ? lb_asprintf("%s%s", dir, cases[i].want + 1)
                                                              : lb_strdup(cases[i].want);
            assert_string_equal(h.backing, want);
        }
    }
    OK(lb_file_write_atomic(path, "QFI", 3, 0600, err));
    OK(lb_qcow2_head(path, &h, err));
    assert_false(h.qcow2);
    FAILS(lb_qcow2_head("/nowhere", &h, err), LB_E_NOT_FOUND);
}

int main(void)
{
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
    const struct CMUnitTest tests[] = {
        T(test_numbers), T(test_lock), T(test_list), T(test_find), T(test_latest_and_prunable), T(test_remove_sets),
        T(test_remove_sets_encrypted), T(test_remove_refusals), T(test_reader_goes_on), T(test_reader_beside_removal),
        T(test_progress_and_cancel),
        T(test_death_at_every_length), T(test_death_at_points), T(test_disks_json), T(test_qcow2_head),
    };
    lb_log_set_level(LB_LOG_ERROR);
    return cmocka_run_group_tests_name("catalog", tests, NULL, NULL);
}
