/* Errors, log, allocation helpers, clocks, state machines. */
#include "core/core.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <cmocka.h>

static void errors(void **state)
{
    (void)state;
    struct lb_error err = LB_ERROR_INIT;
    assert_int_equal(lb_fail(&err, LB_E_PREFLIGHT, "no room for %s", "web1"), -1);
    assert_int_equal(err.code, LB_E_PREFLIGHT);
    assert_int_equal(err.sys_errno, 0);
    assert_string_equal(err.message, "no room for web1");
    assert_string_equal(err.remedy, "");
    assert_int_equal(lb_remedy(&err, "free %d MiB", 7), -1);
    assert_string_equal(err.remedy, "free 7 MiB");
    assert_int_equal(lb_context(&err, "host %s", "b"), -1);
    assert_string_equal(err.message, "host b: no room for web1");
    assert_string_equal(err.remedy, "free 7 MiB");

    lb_fail(&err, LB_E_NET, "again: %s", err.message); /* its own text as argument */
    assert_string_equal(err.message, "again: host b: no room for web1");
    assert_string_equal(err.remedy, ""); /* the old remedy is not the new one's */

    lb_fail_errno(&err, LB_E_NOT_FOUND, ENOENT, "open %s", "/x\n\x1b[31m");
    assert_int_equal(err.sys_errno, ENOENT);
    assert_string_equal(err.message, "open /x  [31m: No such file or directory");

    char big[2000];
    memset(big, 'a', sizeof(big) - 1);
    big[sizeof(big) - 1] = '\0';
    lb_fail_errno(&err, LB_E_NET, EIO, "%s", big);
    assert_int_equal(strlen(err.message), sizeof(err.message) - 1);
    lb_context(&err, "ctx");
    assert_int_equal(strlen(err.message), sizeof(err.message) - 1);
    assert_memory_equal(err.message, "ctx: aaa", 8);
    lb_context(&err, "%s", big);
    lb_remedy(&err, "%s", big);
    assert_int_equal(strlen(err.remedy), sizeof(err.remedy) - 1);

    assert_int_equal(lb_fail(NULL, LB_E_NET, "x"), -1);
    assert_int_equal(lb_fail_errno(NULL, LB_E_NET, EIO, "x"), -1);
    assert_int_equal(lb_remedy(NULL, "x"), -1);
    assert_int_equal(lb_context(NULL, "x"), -1);
}

static void error_names(void **state)
{
    (void)state;
    for (int a = 0; a <= LB_E_UNSUPPORTED; a++) {
        assert_string_not_equal(lb_errcode_name((enum lb_errcode)a), "unknown");
        assert_int_equal(lb_errcode_exit((enum lb_errcode)a), a);
        for (int b = 0; b < a; b++)
            assert_string_not_equal(lb_errcode_name((enum lb_errcode)a),
                                    lb_errcode_name((enum lb_errcode)b));
    }
    assert_string_equal(lb_errcode_name(LB_E_PREFLIGHT), "preflight");
    assert_string_equal(lb_errcode_name((enum lb_errcode)999), "unknown");
    assert_int_not_equal(lb_errcode_exit((enum lb_errcode)256), 0);
}

static void cleanup(void **state)
{
    (void)state;
    int kept, closed, stolen = -1;
    {
        LB_AUTO_FD int a = dup(0);
        LB_AUTO_FD int b = dup(0);
        LB_AUTO_FD int none = -1;
        LB_AUTO_FREE char *text = lb_strdup("x");
        LB_AUTO_FILE FILE *f = fopen("/dev/null", "r");
        assert_non_null(f);
        assert_string_equal(text, "x");
        assert_int_equal(none, -1);
        closed = a;
        stolen = LB_STEAL_FD(b);
        assert_int_equal(b, -1);
        errno = 1234;
    }
    assert_int_equal(errno, 1234);
    kept = stolen;
    assert_int_equal(fcntl(closed, F_GETFD), -1);
    assert_int_not_equal(fcntl(kept, F_GETFD), -1);
    close(kept);
    char *p = lb_asprintf("%d-%s", 5, "z");
    char *q = LB_STEAL_PTR(p);
    assert_null(p);
    assert_string_equal(q, "5-z");
    free(q);
    assert_null(lb_strdup(NULL));
    lb_strv_free(NULL);
    char **v = lb_alloc(3 * sizeof(*v));
    v[0] = lb_strdup("a");
    v[1] = lb_strdup("b");
    v = lb_realloc(v, 8 * sizeof(*v));
    lb_strv_free(v);
    unsigned char *zeroed = lb_alloc(4096);
    for (int i = 0; i < 4096; i++)
        assert_int_equal(zeroed[i], 0);
    free(zeroed);
    struct lb_error err = LB_ERROR_INIT;
    assert_null(lb_try_alloc(SIZE_MAX / 2, &err));
    assert_int_equal(err.code, LB_E_NO_SPACE);
    assert_true(err.remedy[0]);
    free(lb_try_alloc(0, NULL));
}

static char *log_text(int fd)
{
    static char text[65536];
    ssize_t n = pread(fd, text, sizeof(text) - 1, 0);
    assert_true(n >= 0);
    text[n] = '\0';
    return text;
}

static void *log_many(void *arg)
{
    for (int i = 0; i < 100; i++)
        lb_log(LB_LOG_INFO, "thread %s line", (const char *)arg);
    return NULL;
}

static void logging(void **state)
{
    (void)state;
    enum lb_log_level level = LB_LOG_ERROR;
    assert_int_equal(lb_log_parse_level("DEBUG", &level), 0);
    assert_int_equal(level, LB_LOG_DEBUG);
    assert_int_equal(lb_log_parse_level("loud", &level), -1);
    assert_int_equal(lb_log_parse_level(NULL, &level), -1);

    int fd = memfd_create("log", MFD_CLOEXEC);
    assert_true(fd >= 0);
    assert_int_equal(fcntl(fd, F_SETFL, O_APPEND), 0);
    lb_log_set_fd(fd);
    lb_log_set_level(LB_LOG_INFO);
    lb_log(LB_LOG_DEBUG, "not shown");
    assert_string_equal(log_text(fd), "");
    lb_log_set_fields("vm=web1");
    errno = 77;
    lb_log(LB_LOG_WARN, "a\nb %d", 3);
    assert_int_equal(errno, 77);
    char *text = log_text(fd);
    assert_non_null(strstr(text, "Z warn  vm=web1 a b 3\n"));
    assert_true(text[0] >= '0' && text[0] <= '9'); /* no priority prefix in a file */

    struct lb_error err = LB_ERROR_INIT;
    lb_fail(&err, LB_E_NET, "lost");
    lb_remedy(&err, "plug it in");
    lb_log_error(LB_LOG_ERROR, &err);
    assert_non_null(strstr(log_text(fd), "vm=web1 net: lost (remedy: plug it in)\n"));

    lb_log_set_fields(NULL);
    assert_int_equal(ftruncate(fd, 0), 0);
    char big[8000];
    memset(big, 'x', sizeof(big) - 1);
    big[sizeof(big) - 1] = '\0';
    lb_log(LB_LOG_INFO, "%s", big);
    text = log_text(fd);
    assert_true(strlen(text) < 2100);
    assert_int_equal(text[strlen(text) - 1], '\n');

    assert_int_equal(ftruncate(fd, 0), 0);
    pthread_t t[4];
    const char *const names[] = {"a", "b", "c", "d"};
    for (int i = 0; i < 4; i++)
        assert_int_equal(pthread_create(&t[i], NULL, log_many, (void *)(uintptr_t)names[i]), 0);
    for (int i = 0; i < 4; i++)
        pthread_join(t[i], NULL);
    int lines = 0;
    for (char *line = strtok(log_text(fd), "\n"); line; line = strtok(NULL, "\n"), lines++) {
        const char *at = strstr(line, "thread ");
        assert_non_null(at);
        assert_string_equal(at + 8, " line"); /* whole, nothing mixed in */
    }
    assert_int_equal(lines, 400);
    lb_log_set_fd(-1);
    close(fd);
}

static void journal_prefix(void **state)
{
    (void)state;
    int p[2];
    assert_int_equal(pipe(p), 0);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) { /* a fresh image decides about the journal by itself */
        dup2(p[1], 2);
        execl("/proc/self/exe", "test", "--log-one-line", (char *)NULL);
        _exit(99);
    }
    close(p[1]);
    char text[256] = "";
    assert_true(read(p[0], text, sizeof(text) - 1) > 0);
    close(p[0]);
    int status;
    waitpid(pid, &status, 0);
    assert_int_equal(status, 0);
    assert_memory_equal(text, "<4>", 3);
}

static void clocks(void **state)
{
    (void)state;
    uint64_t a = lb_now_ns();
    lb_sleep_ms(20);
    uint64_t b = lb_now_ns();
    assert_true(b - a >= 20000000);
    assert_true(lb_wall_ms() > UINT64_C(1600000000000));
}

enum { IDLE, BUSY, DONE, N_STATES };
static const struct lb_sm_state table[N_STATES] = {
    [IDLE] = {"idle", LB_SM_TO(BUSY)},
    [BUSY] = {"busy", LB_SM_TO(IDLE) | LB_SM_TO(DONE)},
    [DONE] = {"done", 0},
};
static int moves, checks;
static unsigned last_from;

static void on_move(const struct lb_sm *sm, unsigned from, void *arg)
{
    assert_ptr_equal(arg, &moves);
    assert_int_equal(checks, moves + 1); /* the invariant is looked at first */
    assert_int_not_equal(sm->state, from);
    last_from = from;
    moves++;
}

static void invariant(const struct lb_sm *sm, void *arg)
{
    (void)arg;
    assert_true(sm->state < N_STATES);
    checks++;
}

static void machine(void **state)
{
    (void)state;
    struct lb_sm sm;
    lb_sm_init(&sm, "test", table, N_STATES, IDLE);
    sm.on_move = on_move;
    sm.invariant = invariant;
    sm.arg = &moves;
    assert_string_equal(lb_sm_name(&sm), "idle");
    assert_true(lb_sm_may(&sm, BUSY));
    assert_false(lb_sm_may(&sm, DONE));
    assert_false(lb_sm_may(&sm, IDLE));
    assert_false(lb_sm_may(&sm, 63));
    assert_false(lb_sm_may(&sm, 64));
    lb_sm_move(&sm, BUSY);
    lb_sm_move(&sm, DONE);
    assert_int_equal(moves, 2);
    assert_int_equal(last_from, BUSY);
    assert_string_equal(lb_sm_name(&sm), "done");
}

static int illegal_move(unsigned from, unsigned to)
{
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        struct rlimit none = {0, 0};
        setrlimit(RLIMIT_CORE, &none);
        signal(SIGABRT, SIG_DFL); /* cmocka's own handler off */
        int null = open("/dev/null", O_WRONLY);
        dup2(null, 2);
        struct lb_sm sm;
        lb_sm_init(&sm, "test", table, N_STATES, from);
        lb_sm_move(&sm, to);
        _exit(0);
    }
    int status;
    waitpid(pid, &status, 0);
    return status;
}

static void machine_illegal(void **state)
{
    (void)state;
    assert_int_equal(illegal_move(IDLE, BUSY), 0); /* the harness itself works */
    int status = illegal_move(IDLE, DONE);
    assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT);
    status = illegal_move(DONE, IDLE);
    assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT);
    status = illegal_move(BUSY, 77);
    assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT);
}

/* Run as a program of its own: stderr pretends to be the journal. */
static int log_one_line(void)
{
    struct stat st;
    char text[64];
    if (fstat(2, &st) < 0)
        return 1;
    snprintf(text, sizeof(text), "%llu:%llu", (unsigned long long)st.st_dev,
             (unsigned long long)st.st_ino);
    setenv("JOURNAL_STREAM", text, 1);
    lb_log(LB_LOG_WARN, "to the journal");
    return 0;
}

int main(int argc, char **argv)
{
    if (argc == 2 && !strcmp(argv[1], "--log-one-line"))
        return log_one_line();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(errors),       cmocka_unit_test(error_names),
        cmocka_unit_test(cleanup),      cmocka_unit_test(logging),
        cmocka_unit_test(journal_prefix), cmocka_unit_test(clocks),
        cmocka_unit_test(machine),      cmocka_unit_test(machine_illegal),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
