/* Durable files: atomic replacement under SIGKILL and a full disk, torn lines, trees. */
#include "core/core.h"

#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <dirent.h>
#include <cmocka.h>

static char dir[] = "/tmp/lb-test-file.XXXXXX";

static const char *in_dir(const char *name)
{
    static char path[4][512];
    static int turn;
    turn = (turn + 1) % 4;
    snprintf(path[turn], sizeof(path[turn]), "%s/%s", dir, name);
    return path[turn];
}

static unsigned entries(const char *path)
{
    unsigned n = 0;
    DIR *d = opendir(path);
    assert_non_null(d);
    while (readdir(d))
        n++;
    closedir(d);
    return n - 2;
}

static void write_and_read(void **state)
{
    (void)state;
    const char *path = in_dir("a");
    char *text = NULL;
    size_t len = 0;
    struct stat st;
    struct lb_error err = {.code = LB_E_STATE};

    assert_int_equal(lb_file_write_atomic(path, "one\0two", 7, 0640, &err), 0);
    assert_int_equal(err.code, LB_E_STATE); /* untouched on success */
    assert_int_equal(lb_file_read(path, 7, &text, &len, &err), 0);
    assert_int_equal(len, 7);
    assert_memory_equal(text, "one\0two\0", 8);
    free(text);
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(st.st_mode & 07777, 0640);
    assert_int_equal(lb_file_write_atomic(path, "", 0, 0600, &err), 0);
    assert_int_equal(lb_file_read(path, 0, &text, NULL, &err), 0);
    assert_string_equal(text, "");
    free(text);

    assert_int_equal(lb_file_write_atomic(path, "123456", 6, 0600, &err), 0);
    assert_int_equal(lb_file_read(path, 5, &text, &len, &err), -1);
    assert_int_equal(err.code, LB_E_PROTO);
    assert_int_equal(lb_file_read(in_dir("missing"), 5, &text, &len, &err), -1);
    assert_int_equal(err.code, LB_E_NOT_FOUND);
    assert_int_equal(err.sys_errno, ENOENT);
    assert_int_equal(lb_file_read("/proc/self/status", 1 << 20, &text, &len, &err), 0);
    assert_true(len > 0 && strlen(text) == len); /* st_size says 0 there */
    free(text);
    assert_int_equal(lb_file_read(dir, 5, &text, &len, &err), -1);
    assert_int_equal(err.sys_errno, EISDIR);
    assert_int_equal(lb_file_write_atomic(in_dir("no/such"), "x", 1, 0600, &err), -1);
    assert_int_equal(err.code, LB_E_NOT_FOUND);
    assert_int_equal(entries(dir), 1);
}

/* A writer is killed again and again at any moment: whoever reads finds one of
 * the two whole contents, always. */
static void killed_writer(void **state)
{
    (void)state;
    enum { LEN = 300000 };
    const char *path = in_dir("killed");
    char *a = lb_alloc(LEN), *text;
    size_t len;
    memset(a, 'a', LEN);
    assert_int_equal(lb_file_write_atomic(path, a, LEN, 0600, NULL), 0);
    for (int i = 0; i < 40; i++) {
        pid_t pid = fork();
        assert_true(pid >= 0);
        if (pid == 0) {
            for (int j = 0;; j++) {
                memset(a, j % 2 ? 'a' : 'b', LEN);
                if (lb_file_write_atomic(path, a, LEN, 0600, NULL) < 0)
                    _exit(1);
            }
        }
        usleep((unsigned)(i * 137 % 5000));
        kill(pid, SIGKILL);
        int status;
        waitpid(pid, &status, 0);
        assert_true(WIFSIGNALED(status));
        assert_int_equal(lb_file_read(path, LEN, &text, &len, NULL), 0);
        assert_int_equal(len, LEN);
        for (int k = 1; k < LEN; k++)
            if (text[k] != text[0])
                fail_msg("mixed content at %d", k);
        free(text);
    }
    free(a);
}

/* A write that fails half way (file size limit) keeps the old and leaves no rest. */
static void failed_write(void **state)
{
    (void)state;
    const char *sub = in_dir("limited");
    assert_int_equal(mkdir(sub, 0700), 0);
    const char *path = in_dir("limited/file"), *lines = in_dir("limited/lines");
    assert_int_equal(lb_file_write_atomic(path, "old", 3, 0600, NULL), 0);
    assert_int_equal(lb_file_append_line(lines, "first", NULL), 0);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        static char big[100000];
        struct rlimit limit = {4096, 4096};
        struct lb_error err = LB_ERROR_INIT;
        memset(big, 'b', sizeof(big) - 1);
        signal(SIGXFSZ, SIG_IGN);
        setrlimit(RLIMIT_FSIZE, &limit);
        if (lb_file_write_atomic(path, big, sizeof(big), 0600, &err) != -1 ||
            err.sys_errno != EFBIG)
            _exit(1);
        if (lb_file_append_line(lines, big, &err) != -1 || err.sys_errno != EFBIG)
            _exit(2);
        _exit(0);
    }
    int status;
    waitpid(pid, &status, 0);
    assert_int_equal(status, 0);
    char *text;
    assert_int_equal(lb_file_read(path, 100, &text, NULL, NULL), 0);
    assert_string_equal(text, "old");
    free(text);
    assert_int_equal(lb_file_read(lines, 100, &text, NULL, NULL), 0);
    assert_string_equal(text, "first\n");
    free(text);
    assert_int_equal(entries(sub), 2);
}

static void append(void **state)
{
    (void)state;
    const char *path = in_dir("lines");
    char *text;
    assert_int_equal(lb_file_append_line(path, "one", NULL), 0);
    assert_int_equal(lb_file_append_line(path, "", NULL), 0);
    int fd = open(path, O_WRONLY | O_APPEND);
    assert_int_equal(write(fd, "torn", 4), 4); /* a crash in the middle of a line */
    close(fd);
    assert_int_equal(lb_file_append_line(path, "two", NULL), 0);
    assert_int_equal(lb_file_read(path, 100, &text, NULL, NULL), 0);
    assert_string_equal(text, "one\n\ntorn\ntwo\n");
    free(text);

    const char *many = in_dir("many");
    for (int i = 0; i < 4; i++) {
        pid_t pid = fork();
        assert_true(pid >= 0);
        if (pid == 0) {
            for (int j = 0; j < 25; j++)
                if (lb_file_append_line(many, "a line of some length", NULL) < 0)
                    _exit(1);
            _exit(0);
        }
    }
    int status;
    while (wait(&status) > 0)
        assert_int_equal(status, 0);
    assert_int_equal(lb_file_read(many, 10000, &text, NULL, NULL), 0);
    assert_int_equal(strlen(text), 100 * strlen("a line of some length\n"));
    free(text);
}

static void trees(void **state)
{
    (void)state;
    struct lb_error err = LB_ERROR_INIT;
    struct stat st;
    assert_int_equal(lb_mkdir_p(in_dir("t/a//b/c/"), 0700, &err), 0);
    assert_int_equal(lb_mkdir_p(in_dir("t/a/b/c"), 0700, &err), 0);
    assert_int_equal(stat(in_dir("t/a/b/c"), &st), 0);
    assert_int_equal(lb_file_write_atomic(in_dir("t/file"), "x", 1, 0600, NULL), 0);
    assert_int_equal(lb_mkdir_p(in_dir("t/file/x"), 0700, &err), -1);
    assert_int_equal(err.sys_errno, ENOTDIR);

    /* links out of the tree are removed, what they name is not */
    assert_int_equal(lb_mkdir_p(in_dir("outside"), 0700, NULL), 0);
    assert_int_equal(lb_file_write_atomic(in_dir("outside/keep"), "x", 1, 0600, NULL), 0);
    assert_int_equal(symlink(in_dir("outside"), in_dir("t/a/link")), 0);
    assert_int_equal(symlink(in_dir("outside"), in_dir("toplink")), 0);
    assert_int_equal(lb_remove_tree(in_dir("t"), &err), 0);
    assert_int_equal(stat(in_dir("t"), &st), -1);
    assert_int_equal(lb_remove_tree(in_dir("toplink/"), &err), 0);
    assert_int_equal(lstat(in_dir("toplink"), &st), -1);
    assert_int_equal(stat(in_dir("outside/keep"), &st), 0);
    assert_int_equal(lb_remove_tree(in_dir("t"), &err), 0); /* missing is success */
    assert_int_equal(lb_remove_tree(in_dir("outside/keep"), &err), 0);
    assert_int_equal(stat(in_dir("outside/keep"), &st), -1);

    char *deep = lb_strdup(in_dir("deep"));
    for (int i = 0; i < 80; i++) {
        char *more = lb_asprintf("%s/d", deep);
        free(deep);
        deep = more;
    }
    assert_int_equal(lb_mkdir_p(deep, 0700, NULL), 0);
    assert_int_equal(lb_remove_tree(in_dir("deep"), &err), -1); /* refused, no crash */
    deep[strlen(deep) - 2 * 30] = '\0';
    assert_int_equal(lb_remove_tree(deep, &err), 0);
    assert_int_equal(lb_remove_tree(in_dir("deep"), &err), 0);
    free(deep);
}

static int make_dir(void **state)
{
    (void)state;
    return mkdtemp(dir) ? 0 : -1;
}

static int remove_dir(void **state)
{
    (void)state;
    return lb_remove_tree(dir, NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(write_and_read), cmocka_unit_test(killed_writer),
        cmocka_unit_test(failed_write),   cmocka_unit_test(append),
        cmocka_unit_test(trees),
    };
    return cmocka_run_group_tests(tests, make_dir, remove_dir);
}
