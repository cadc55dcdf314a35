/* The hand-over journal: allowed moves, two deciders, damage, pruning, and a
 * crash at a random moment of a write. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <dirent.h>
#include <signal.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <utime.h>

#include "migrate/journal.h"
#include "migrate/migrate.h"

static char dir[64];
#define TOKEN "00112233445566778899aabbccddeeff"
#define TOKEN2 "ffffffffffffffffffffffffffffffff"

static int setup(void **s)
{
    (void)s;
    snprintf(dir, sizeof(dir), "/tmp/lb-journal-XXXXXX");
    return mkdtemp(dir) ? 0 : -1;
}

static int teardown(void **s)
{
    (void)s;
    return lb_remove_tree(dir, NULL);
}

static struct lb_journal fresh(const char *token)
{
    struct lb_journal j;
    assert_int_equal(lb_journal_load(dir, token, &j, NULL), 0);
    snprintf(j.vm, sizeof(j.vm), "web1");
    snprintf(j.peer, sizeof(j.peer), "hostB");
    return j;
}

static enum lb_journal_state on_disk(const char *token)
{
    struct lb_journal j;
    struct lb_error err = LB_ERROR_INIT;
    if (lb_journal_load(dir, token, &j, &err) < 0)
        fail_msg("%s", err.message);
    return j.state;
}

static void put(const char *path_in_handover, const char *text)
{
    char *path = lb_asprintf("%s/handover/%s", dir, path_in_handover);
    assert_int_equal(lb_file_write_atomic(path, text, strlen(text), 0600, NULL), 0);
    free(path);
}

/* How to reach each state from nothing. */
static const enum lb_journal_state way[][3] = {
    [LB_J_NONE] = {LB_J_NONE},
    [LB_J_PREPARING] = {LB_J_PREPARING},
    [LB_J_HANDED_OVER] = {LB_J_PREPARING, LB_J_HANDED_OVER},
    [LB_J_DONE] = {LB_J_PREPARING, LB_J_HANDED_OVER, LB_J_DONE},
    [LB_J_ABORTED] = {LB_J_PREPARING, LB_J_ABORTED},
    [LB_J_PREPARED] = {LB_J_PREPARED},
    [LB_J_RUNNING] = {LB_J_PREPARED, LB_J_RUNNING},
    [LB_J_REFUSED] = {LB_J_REFUSED},
};

/* Written out pair by pair, independent of the table in the code. */
static bool allowed(enum lb_journal_state a, enum lb_journal_state b)
{
    return (a == LB_J_NONE && (b == LB_J_PREPARING || b == LB_J_PREPARED || b == LB_J_REFUSED)) ||
           (a == LB_J_PREPARING && (b == LB_J_HANDED_OVER || b == LB_J_ABORTED)) ||
           (a == LB_J_HANDED_OVER && (b == LB_J_DONE || b == LB_J_ABORTED)) ||
           (a == LB_J_PREPARED && (b == LB_J_RUNNING || b == LB_J_REFUSED));
}

static void test_moves(void **s)
{
    (void)s;
    unsigned n = 0;
    for (unsigned a = LB_J_NONE; a <= LB_J_REFUSED; a++) {
        for (unsigned b = LB_J_NONE; b <= LB_J_REFUSED; b++, n++) {
            char token[LB_TOKEN_HEX];
            struct lb_error err = LB_ERROR_INIT;
            snprintf(token, sizeof(token), "%032x", n);
            struct lb_journal j = fresh(token);
            for (unsigned i = 0; i < 3 && way[a][i]; i++)
                assert_int_equal(lb_journal_move(dir, &j, way[a][i], NULL), 0);
            assert_int_equal(j.state, a);
            int rc = lb_journal_move(dir, &j, b, &err);
            assert_int_equal(rc, allowed(a, b) ? 0 : -1);
            assert_int_equal(j.state, rc == 0 ? b : a);
            assert_int_equal(on_disk(token), j.state);
            if (rc < 0)
                assert_int_equal(err.code, LB_E_STATE);
        }
    }
}

static void test_contents(void **s)
{
    (void)s;
    struct lb_journal j = fresh(TOKEN), back;
    uint64_t before = lb_wall_ms();
    snprintf(j.detail, sizeof(j.detail), "a \"quoted\"\n detail \xc3"); /* cut UTF-8 */
    assert_int_equal(lb_journal_move(dir, &j, LB_J_PREPARING, NULL), 0);
    assert_int_equal(lb_journal_load(dir, TOKEN, &back, NULL), 0);
    assert_string_equal(back.token, TOKEN);
    assert_string_equal(back.vm, "web1");
    assert_string_equal(back.peer, "hostB");
    assert_string_equal(back.detail, "a \"quoted\"\n detail ?");
    assert_true(back.changed_ms >= before && back.changed_ms <= lb_wall_ms());
    struct stat st;
    char *path = lb_asprintf("%s/handover/%s.json", dir, TOKEN);
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0600);
    free(path);
}

/* Query and Commit from two copies: only the first decides. */
static void test_two_deciders(void **s)
{
    (void)s;
    struct lb_error err = LB_ERROR_INIT;
    struct lb_journal a = fresh(TOKEN);
    assert_int_equal(lb_journal_move(dir, &a, LB_J_PREPARED, NULL), 0);
    struct lb_journal b = a;
    assert_int_equal(lb_journal_move(dir, &a, LB_J_REFUSED, NULL), 0);
    assert_int_equal(lb_journal_move(dir, &b, LB_J_RUNNING, &err), -1);
    assert_int_equal(err.code, LB_E_STATE);
    assert_non_null(strstr(err.message, "already refused"));
    assert_int_equal(on_disk(TOKEN), LB_J_REFUSED);
}

static void test_retract(void **s)
{
    (void)s;
    struct lb_error err = LB_ERROR_INIT;
    struct lb_journal j = fresh(TOKEN);
    assert_int_equal(lb_journal_move(dir, &j, LB_J_PREPARED, NULL), 0);
    assert_int_equal(lb_journal_retract(dir, &j, "too early", &err), -1);
    assert_int_equal(err.code, LB_E_STATE);
    assert_int_equal(lb_journal_move(dir, &j, LB_J_RUNNING, NULL), 0);
    struct lb_journal stale = j;
    assert_int_equal(lb_journal_retract(dir, &j, "the receiver died before cont", NULL), 0);
    assert_int_equal(on_disk(TOKEN), LB_J_REFUSED);
    assert_string_equal(j.detail, "retracted: the receiver died before cont");
    assert_int_equal(lb_journal_retract(dir, &stale, "again", &err), -1);
}

static void test_bad_tokens(void **s)
{
    (void)s;
    static const char *const bad[] = {"", "../../etc/passwd", "00112233445566778899AABBCCDDEEFF",
                                      TOKEN "0", "0011", "/"};
    for (size_t i = 0; i < LB_ARRAY_LEN(bad); i++) {
        struct lb_journal j;
        struct lb_error err = LB_ERROR_INIT;
        assert_int_equal(lb_journal_load(dir, bad[i], &j, &err), -1);
        assert_int_equal(err.code, LB_E_PROTO);
        assert_int_equal(lb_journal_lock(dir, bad[i], 0, &err), -1);
    }
}

/* Whatever is wrong with a journal, it is never read as "none". */
static void test_damage(void **s)
{
    (void)s;
    struct lb_journal j = fresh(TOKEN);
    assert_int_equal(lb_journal_move(dir, &j, LB_J_PREPARED, NULL), 0);
    char *path = lb_asprintf("%s/handover/%s.json", dir, TOKEN), *good;
    size_t len;
    assert_int_equal(lb_file_read(path, 65536, &good, &len, NULL), 0);

    /* every truncation but the last (which only loses white space at the end) */
    for (size_t cut = 0; cut + 1 < len; cut++) {
        struct lb_error err = LB_ERROR_INIT;
        assert_int_equal(lb_file_write_atomic(path, good, cut, 0600, NULL), 0);
        assert_int_equal(lb_journal_load(dir, TOKEN, &j, &err), -1);
        assert_int_equal(err.code, LB_E_STATE);
        assert_true(err.remedy[0] != '\0');
    }
    static const char *const bad[] = {
        "[]", "{\"version\":2}",
        "{\"version\":1,\"token\":\"" TOKEN2 "\",\"state\":\"prepared\",\"vm\":\"\",\"peer\":\"\","
        "\"detail\":\"\",\"changed_ms\":1}",
        "{\"version\":1,\"token\":\"" TOKEN "\",\"state\":\"none\",\"vm\":\"\",\"peer\":\"\","
        "\"detail\":\"\",\"changed_ms\":1}",
        "{\"version\":1,\"token\":\"" TOKEN "\",\"state\":\"prepared\",\"vm\":7,\"peer\":\"\","
        "\"detail\":\"\",\"changed_ms\":1}",
    };
    for (size_t i = 0; i < LB_ARRAY_LEN(bad); i++) {
        put(TOKEN ".json", bad[i]);
        assert_int_equal(lb_journal_load(dir, TOKEN, &j, NULL), -1);
        struct lb_journal from_none = {.token = TOKEN};
        assert_int_equal(lb_journal_move(dir, &from_none, LB_J_REFUSED, NULL), -1);
    }
    char *big = lb_alloc(100001);
    memset(big, ' ', 100000);
    put(TOKEN ".json", big);
    assert_int_equal(lb_journal_load(dir, TOKEN, &j, NULL), -1);
    free(big);
    /* a damaged one does not hide the others */
    j = fresh(TOKEN2);
    assert_int_equal(lb_journal_move(dir, &j, LB_J_PREPARED, NULL), 0);
    struct lb_journal *v;
    unsigned n;
    lb_log_set_level(LB_LOG_ERROR);
    assert_int_equal(lb_journal_list(dir, &v, &n, NULL), 0);
    assert_int_equal(n, 1);
    assert_string_equal(v[0].token, TOKEN2);
    free(v);
    free(good);
    free(path);
}

static void test_list_empty(void **s)
{
    (void)s;
    struct lb_journal *v;
    unsigned n = 9;
    assert_int_equal(lb_journal_list(dir, &v, &n, NULL), 0);
    assert_int_equal(n, 0);
    assert_null(v);
    assert_int_equal(lb_journal_prune(dir, NULL), 0);
}

static void test_lock(void **s)
{
    (void)s;
    struct lb_error err = LB_ERROR_INIT;
    int fd = lb_journal_lock(dir, TOKEN, 0, NULL);
    assert_true(fd >= 0);
    uint64_t t = lb_now_ns();
    assert_int_equal(lb_journal_lock(dir, TOKEN, 50, &err), -1);
    assert_int_equal(err.code, LB_E_STATE);
    assert_true(lb_now_ns() - t >= 50 * UINT64_C(1000000));
    int other = lb_journal_lock(dir, TOKEN2, 0, NULL);
    assert_true(other >= 0);
    close(other);
    pid_t pid = fork();
    if (pid == 0) { /* waits until we let go, then dies with the lock */
        close(fd);  /* a copy of the descriptor holds the lock as well */
        _exit(lb_journal_lock(dir, TOKEN, 10000, NULL) >= 0 ? 0 : 1);
    }
    lb_sleep_ms(30);
    close(fd);
    int status;
    waitpid(pid, &status, 0);
    assert_int_equal(status, 0);
    fd = lb_journal_lock(dir, TOKEN, 0, NULL);
    assert_true(fd >= 0);
    close(fd);
}

/* Only what runs here can be settled; then it still says so, and cannot be taken back by what is not up to date. */
static void test_settle(void **s)
{
    (void)s;
    struct lb_journal j = fresh(TOKEN), old;
    assert_int_equal(lb_journal_settle(dir, &j, NULL), -1);
    assert_int_equal(lb_journal_move(dir, &j, LB_J_PREPARED, NULL), 0);
    assert_int_equal(lb_journal_settle(dir, &j, NULL), -1);
    old = j;
    assert_int_equal(lb_journal_move(dir, &j, LB_J_RUNNING, NULL), 0);
    assert_false(j.settled);
    assert_int_equal(lb_journal_settle(dir, &old, NULL), -1);
    assert_int_equal(lb_journal_settle(dir, &j, NULL), 0);
    assert_int_equal(lb_journal_load(dir, TOKEN, &old, NULL), 0);
    assert_true(old.state == LB_J_RUNNING && old.settled);
}

static void aged(const char *token, const char *state, bool settled)
{
    char *name = lb_asprintf("%s.json", token);
    char *text = lb_asprintf("{\"version\":1,\"token\":\"%s\",\"state\":\"%s\",\"vm\":\"v\","
                             "\"peer\":\"p\",\"detail\":\"\",\"settled\":%s,\"changed_ms\":%llu}", token, state,
                             settled ? "true" : "false",
                             (unsigned long long)(lb_wall_ms() - UINT64_C(31) * 86400000));
    put(name, text);
    free(text);
    free(name);
}

static void test_prune(void **s)
{
    (void)s;
    static const struct {
        const char *state;
        bool goes, settled;
    } cases[] = {{"preparing", false, false}, {"handed-over", false, false}, {"done", true, false},    {"aborted", true, false},
                 {"prepared", false, false},  {"running", false, false},     {"refused", true, false}, {"running", true, true}};
    char token[LB_TOKEN_HEX];
    struct lb_journal young = fresh(TOKEN2);
    assert_int_equal(lb_journal_move(dir, &young, LB_J_REFUSED, NULL), 0);
    for (unsigned i = 0; i < LB_ARRAY_LEN(cases); i++) {
        snprintf(token, sizeof(token), "%032x", i);
        aged(token, cases[i].state, cases[i].settled);
    }
    snprintf(token, sizeof(token), "%032x", 99);
    aged(token, "refused", false);
    int busy = lb_journal_lock(dir, token, 0, NULL);
    put(".x.json.AAAAAA.tmp", "");
    put(".y.json.AAAAAA.tmp", "");
    char *old_tmp = lb_asprintf("%s/handover/.x.json.AAAAAA.tmp", dir);
    struct utimbuf long_ago = {1000, 1000};
    assert_int_equal(utime(old_tmp, &long_ago), 0);

    assert_int_equal(lb_journal_prune(dir, NULL), 0);
    for (unsigned i = 0; i < LB_ARRAY_LEN(cases); i++) {
        snprintf(token, sizeof(token), "%032x", i);
        assert_int_equal(on_disk(token) == LB_J_NONE, cases[i].goes);
    }
    assert_int_equal(on_disk(TOKEN2), LB_J_REFUSED);
    snprintf(token, sizeof(token), "%032x", 99);
    assert_int_equal(on_disk(token), LB_J_REFUSED); /* somebody holds its lock */
    assert_int_equal(access(old_tmp, F_OK), -1);
    char *new_tmp = lb_asprintf("%s/handover/.y.json.AAAAAA.tmp", dir);
    assert_int_equal(access(new_tmp, F_OK), 0);
    close(busy);
    assert_int_equal(lb_journal_prune(dir, NULL), 0);
    assert_int_equal(on_disk(token), LB_J_NONE);
    free(old_tmp);
    free(new_tmp);
}

/* A child moves journal after journal; we kill it at a random moment. Each file is
 * then in a state that the child had asked for, and what the child knew to be
 * durable (it says so through a pipe) is there. */
static void test_crash(void **s)
{
    (void)s;
    unsigned seed = 20261121, seen[LB_J_REFUSED + 1] = {0}, torn = 0;
    lb_log_set_level(LB_LOG_ERROR);
    /* the kills must have hit different moments, or this test proves nothing: on a busy machine that takes more */
    for (unsigned trial = 0; trial < 150 || (trial < 1500 && !(seen[LB_J_PREPARING] && seen[LB_J_HANDED_OVER] &&
                                                               seen[LB_J_DONE])); trial++) {
        int said[2];
        assert_int_equal(pipe(said), 0);
        pid_t pid = fork();
        if (pid == 0) {
            for (unsigned i = 0; i < 10000; i++) {
                struct lb_journal j = {0};
                snprintf(j.token, sizeof(j.token), "%08x%024x", trial, i);
                snprintf(j.vm, sizeof(j.vm), "vm");
                for (enum lb_journal_state to = LB_J_PREPARING; to <= LB_J_DONE; to++) {
                    if (lb_journal_move(dir, &j, to, NULL) < 0)
                        _exit(1);
                    uint32_t word[2] = {i, to};
                    if (write(said[1], word, sizeof(word)) != sizeof(word))
                        _exit(2);
                }
            }
            _exit(0);
        }
        close(said[1]);
        usleep(300 + (unsigned)rand_r(&seed) % (trial < 150 ? 6000 : 60000));
        kill(pid, SIGKILL);
        int status;
        waitpid(pid, &status, 0);
        assert_true(WIFSIGNALED(status));
        uint32_t word[2], last[2] = {0, LB_J_NONE};
        while (read(said[0], word, sizeof(word)) == sizeof(word))
            memcpy(last, word, sizeof(last));
        close(said[0]);

        /* the journal of the last message is in that state or the next one ... */
        char token[LB_TOKEN_HEX];
        snprintf(token, sizeof(token), "%08x%024x", trial, last[0]);
        enum lb_journal_state now = on_disk(token);
        assert_true(now == last[1] || (last[1] < LB_J_DONE && now == last[1] + 1));
        torn += now != last[1];
        seen[now]++;
        /* ... and the one after it is not there, or in its first state. */
        snprintf(token, sizeof(token), "%08x%024x", trial, last[0] + 1);
        now = on_disk(token);
        assert_true(now == LB_J_NONE || (last[1] == LB_J_DONE && now == LB_J_PREPARING));
    }
    printf("crash: none %u, preparing %u, handed-over %u, done %u; %u between rename and return\n",
           seen[LB_J_NONE], seen[LB_J_PREPARING], seen[LB_J_HANDED_OVER], seen[LB_J_DONE], torn);
    assert_true(seen[LB_J_PREPARING] > 0 && seen[LB_J_HANDED_OVER] > 0 && seen[LB_J_DONE] > 0);
    struct lb_journal *v;
    unsigned n;
    assert_int_equal(lb_journal_list(dir, &v, &n, NULL), 0);
    assert_true(n > 0);
    free(v);
}

/* Points: the file appears, the wait is as long as asked, other names do not wait, nor does anybody while it exists. */
static void test_points(void **s)
{
    (void)s;
    char *flag = lb_asprintf("%s/flag", dir);
    lb_log_set_level(LB_LOG_ERROR);
    setenv("LIFEBOAT_PAUSE_FILE", flag, 1);
    setenv("LIFEBOAT_PAUSE_AT", "handed-over:60", 1);
    uint64_t t = lb_now_ns();
    lb_point("handed");
    lb_point("handed-over-x");
    assert_true(lb_now_ns() - t < 50 * UINT64_C(1000000));
    assert_int_equal(access(flag, F_OK), -1);
    lb_point("handed-over");
    assert_true(lb_now_ns() - t >= 60 * UINT64_C(1000000));
    assert_int_equal(access(flag, F_OK), 0);
    setenv("LIFEBOAT_PAUSE_AT", "handed-over", 1);
    lb_point("handed-over"); /* returns */
    unlink(flag);
    setenv("LIFEBOAT_PAUSE_AT", "handed-over:soon", 1);
    lb_point("handed-over"); /* returns */
    setenv("LIFEBOAT_PAUSE_AT", "prepared", 1);
    pid_t pid = fork();
    if (pid == 0) {
        lb_point("prepared");
        _exit(0);
    }
    for (unsigned i = 0; i < 500 && access(flag, F_OK) < 0; i++)
        lb_sleep_ms(10);
    assert_int_equal(access(flag, F_OK), 0);
    lb_sleep_ms(30);
    assert_int_equal(waitpid(pid, NULL, WNOHANG), 0); /* still waiting */
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    unsetenv("LIFEBOAT_PAUSE_AT");
    lb_point("prepared");
    free(flag);
}

#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
    lb_log_set_level(LB_LOG_WARN);
    const struct CMUnitTest tests[] = {
        T(test_moves),  T(test_contents), T(test_two_deciders), T(test_retract), T(test_bad_tokens),
        T(test_damage), T(test_list_empty), T(test_lock),       T(test_settle),  T(test_prune),   T(test_crash),
        T(test_points),
    };
    return cmocka_run_group_tests_name("journal", tests, NULL, NULL);
}
