/* Sockets, pipes, passed descriptors; processes; what people type. */
#include "core/core.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>

static const uint64_t ms_ns = 1000000;

enum { BIG = 3 << 20 };

static void *send_big(void *arg)
{
    int fd = *(int *)arg;
    unsigned char *data = lb_alloc(BIG);
    for (int i = 0; i < BIG; i++)
        data[i] = (unsigned char)(i * 7 + i / 251);
    int rc = lb_write_all(fd, data, BIG, NULL);
    free(data);
    close(fd);
    return rc ? arg : NULL;
}

static void transfer(int from, int to, bool nonblock, bool deadline)
{
    pthread_t t;
    unsigned char *got = lb_alloc(BIG);
    if (nonblock) {
        assert_int_equal(lb_set_nonblock(from, true), 0);
        assert_int_equal(lb_set_nonblock(to, true), 0);
    }
    assert_int_equal(pthread_create(&t, NULL, send_big, &from), 0);
    struct lb_error err = LB_ERROR_INIT;
    uint64_t until = deadline ? lb_now_ns() + 20000 * ms_ns : 0;
    assert_int_equal(lb_read_all_until(to, got, BIG, until, -1, &err), 0);
    for (int i = 0; i < BIG; i++)
        if (got[i] != (unsigned char)(i * 7 + i / 251))
            fail_msg("wrong byte %d", i);
    void *rc;
    pthread_join(t, &rc);
    assert_null(rc);
    assert_int_equal(lb_read_all(to, got, 1, &err), -1);
    assert_int_equal(err.code, LB_E_NET);
    assert_string_equal(err.message, "connection closed");
    close(to);
    free(got);
}

static void whole_transfers(void **state)
{
    (void)state;
    for (int i = 0; i < 4; i++) {
        int s[2];
        assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, s), 0);
        transfer(s[0], s[1], i & 1, i & 2);
        assert_int_equal(pipe(s), 0);
        transfer(s[1], s[0], i & 1, i & 2);
    }
}

static void limits(void **state)
{
    (void)state;
    struct lb_error err = LB_ERROR_INIT;
    char buf[8];
    static char big[BIG];
    for (int i = 0; i < 2; i++) {
        int s[2];
        int cancel = eventfd(0, 0);
        if (i == 0) {
            assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, s), 0);
        } else {
            assert_int_equal(pipe(s), 0);
        }
        uint64_t start = lb_now_ns();
        assert_int_equal(lb_read_all_until(s[0], buf, 8, start + 30 * ms_ns, cancel, &err), -1);
        assert_int_equal(err.code, LB_E_NET);
        assert_true(err.remedy[0]);
        assert_true(lb_now_ns() - start >= 30 * ms_ns && lb_now_ns() - start < 5000 * ms_ns);
        start = lb_now_ns();
        assert_int_equal(lb_write_all_until(s[1], big, BIG, start + 30 * ms_ns, -1, &err), -1);
        assert_int_equal(err.code, LB_E_NET);
        assert_true(lb_now_ns() - start < 5000 * ms_ns);

        assert_int_equal(lb_write_all(cancel, &(uint64_t){1}, 8, NULL), 0);
        assert_int_equal(lb_write_all_until(s[1], big, BIG, 0, cancel, &err), -1);
        assert_int_equal(err.code, LB_E_CANCELLED);
        /* data that is there is not thrown away by a cancel */
        assert_int_equal(lb_read_all_until(s[0], buf, 8, 0, cancel, &err), 0);
        close(cancel);
        close(s[0]);
        close(s[1]);
    }
    int s[2], cancel = eventfd(1, 0);
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, s), 0);
    assert_int_equal(lb_read_all_until(s[0], buf, 8, 0, cancel, &err), -1);
    assert_int_equal(err.code, LB_E_CANCELLED);
    assert_int_equal(lb_write_all(s[1], "abc", 3, &err), 0);
    close(s[1]);
    assert_int_equal(lb_read_all(s[0], buf, 8, &err), -1);
    assert_string_equal(err.message, "connection closed after 3 of 8 bytes");
    assert_int_equal(lb_write_all(s[0], "abc", 3, &err), -1); /* and no SIGPIPE */
    assert_int_equal(err.sys_errno, EPIPE);
    close(s[0]);
    close(cancel);
}

static int open_fds(void)
{
    int n = 0;
    for (int fd = 0; fd < 256; fd++)
        n += fcntl(fd, F_GETFD) >= 0;
    return n;
}

static void readable(void **state)
{
    (void)state;
    int p[2];
    char c;
    assert_int_equal(pipe2(p, O_CLOEXEC), 0);
    assert_false(lb_readable(-1, 0));
    uint64_t start_ns = lb_now_ns();
    assert_false(lb_readable(p[0], 20));
    assert_true(lb_now_ns() - start_ns >= 20 * ms_ns);
    assert_int_equal(write(p[1], "x", 1), 1);
    assert_true(lb_readable(p[0], 0));
    assert_int_equal(read(p[0], &c, 1), 1);
    assert_false(lb_readable(p[0], 0));
    close(p[1]); /* nothing more to come is also worth a read */
    assert_true(lb_readable(p[0], 60000));
    close(p[0]);
}

static void descriptors(void **state)
{
    (void)state;
    const int types[] = {SOCK_STREAM, SOCK_SEQPACKET};
    for (size_t t = 0; t < LB_ARRAY_LEN(types); t++) {
        int s[2], p[2], many[16], got[16];
        char buf[64];
        struct lb_error err = LB_ERROR_INIT;
        int before = open_fds();
        assert_int_equal(socketpair(AF_UNIX, types[t], 0, s), 0);
        assert_int_equal(pipe(p), 0);
        for (int i = 0; i < 16; i++)
            many[i] = p[1];

        assert_int_equal(lb_send_fds(s[0], "hello", 5, many, 1, &err), 0);
        unsigned n = 16;
        assert_int_equal(lb_recv_fds(s[1], buf, sizeof(buf), got, &n, &err), 5);
        assert_int_equal(n, 1);
        assert_memory_equal(buf, "hello", 5);
        assert_true(fcntl(got[0], F_GETFD) & FD_CLOEXEC);
        assert_int_equal(write(got[0], "x", 1), 1);
        assert_int_equal(read(p[0], buf, 1), 1);
        close(got[0]);

        assert_int_equal(lb_send_fds(s[0], "y", 1, many, 16, &err), 0);
        n = 16;
        assert_int_equal(lb_recv_fds(s[1], buf, sizeof(buf), got, &n, &err), 1);
        assert_int_equal(n, 16);
        for (int i = 0; i < 16; i++)
            close(got[i]);

        assert_int_equal(lb_send_fds(s[0], "z", 1, NULL, 0, &err), 0);
        n = 16;
        assert_int_equal(lb_recv_fds(s[1], buf, sizeof(buf), got, &n, &err), 1);
        assert_int_equal(n, 0);

        /* more than asked for: refused, and none stays open here */
        int now = open_fds();
        assert_int_equal(lb_send_fds(s[0], "w", 1, many, 5, &err), 0);
        n = 4;
        assert_int_equal(lb_recv_fds(s[1], buf, sizeof(buf), got, &n, &err), -1);
        assert_int_equal(err.code, LB_E_PROTO);
        assert_int_equal(open_fds(), now);
        if (types[t] == SOCK_SEQPACKET) {
            assert_int_equal(lb_send_fds(s[0], "too long", 8, many, 2, &err), 0);
            n = 4;
            assert_int_equal(lb_recv_fds(s[1], buf, 3, got, &n, &err), -1);
            assert_int_equal(err.code, LB_E_PROTO);
            assert_int_equal(open_fds(), now);
        }
        int on = 1; /* credentials take room in the same buffer */
        assert_int_equal(setsockopt(s[1], SOL_SOCKET, SO_PASSCRED, &on, sizeof(on)), 0);
        assert_int_equal(lb_send_fds(s[0], "c", 1, many, 16, &err), 0);
        n = 16;
        assert_int_equal(lb_recv_fds(s[1], buf, sizeof(buf), got, &n, &err), 1);
        assert_int_equal(n, 16);
        for (int i = 0; i < 16; i++)
            close(got[i]);

        close(s[0]);
        n = 16;
        assert_int_equal(lb_recv_fds(s[1], buf, sizeof(buf), got, &n, &err), 0);
        assert_int_equal(n, 0);
        assert_int_equal(lb_send_fds(s[1], "c", 1, many, 1, &err), -1);
        assert_int_equal(err.code, LB_E_NET);
        close(s[1]);
        close(p[0]);
        close(p[1]);
        assert_int_equal(open_fds(), before);
    }
}

static pid_t sleeper(const char *name)
{
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (name)
            prctl(PR_SET_NAME, name);
        for (;;)
            pause();
    }
    lb_sleep_ms(20);
    return pid;
}

static void processes(void **state)
{
    (void)state;
    struct lb_proc_id id, other;
    struct lb_error err = LB_ERROR_INIT;
    pid_t pid = sleeper("x) S 1 (y z)"); /* a name made to fool a parser */
    assert_int_equal(lb_proc_identify(pid, &id, &err), 0);
    assert_int_equal(id.pid, pid);
    assert_int_equal(lb_proc_identify(getpid(), &other, &err), 0);
    assert_true(id.start_ticks >= other.start_ticks);
    assert_true(id.start_ticks - other.start_ticks < 100000);
    assert_true(lb_proc_alive(&id));
    int fd = lb_proc_open(&id, &err);
    assert_true(fd >= 0);
    close(fd);

    other = id; /* the same number, another process: a reused pid */
    other.start_ticks--;
    assert_false(lb_proc_alive(&other));
    assert_int_equal(lb_proc_open(&other, &err), -1);
    assert_int_equal(err.code, LB_E_NOT_FOUND);
    assert_int_equal(lb_proc_kill(&other, 100, &err), 0); /* gone is success ... */
    assert_int_equal(kill(pid, 0), 0);                    /* ... and nobody was hit */
    assert_true(lb_proc_alive(&id));

    assert_int_equal(lb_proc_kill(&id, 5000, &err), 0);
    assert_false(lb_proc_alive(&id)); /* a zombie, not reaped yet */
    assert_int_equal(kill(pid, 0), 0);
    int status;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
    assert_false(lb_proc_alive(&id));
    assert_int_equal(lb_proc_kill(&id, 100, &err), 0);
    assert_int_equal(lb_proc_identify(pid, &id, &err), -1);
    assert_int_equal(err.code, LB_E_NOT_FOUND);
    assert_int_equal(lb_proc_identify(0, &id, &err), -1);
    assert_int_equal(lb_proc_identify(-5, &id, &err), -1);
}

static int listen_at(const char *path)
{
    struct sockaddr_un sa = {.sun_family = AF_UNIX};
    strcpy(sa.sun_path, path);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    assert_true(fd >= 0 && bind(fd, (struct sockaddr *)&sa, sizeof(sa)) == 0 && listen(fd, 1) == 0);
    return fd;
}

static void killed_leaves_no_sockets(void **state)
{
    (void)state;
    char dir[] = "/tmp/lb-io-XXXXXX", gone[64], taken[64];
    struct lb_proc_id id;
    struct lb_error err = LB_ERROR_INIT;
    int ready[2], mine;
    char c;
    assert_non_null(mkdtemp(dir));
    snprintf(gone, sizeof(gone), "%s/gone", dir);
    snprintf(taken, sizeof(taken), "%s/taken", dir);
    assert_int_equal(pipe(ready), 0);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        listen_at(gone);
        listen_at(taken);
        if (write(ready[1], "x", 1) != 1)
            _exit(1);
        for (;;)
            pause();
    }
    assert_int_equal(read(ready[0], &c, 1), 1);
    /* somebody else took over one of the two */
    assert_int_equal(unlink(taken), 0);
    mine = listen_at(taken);
    assert_int_equal(lb_proc_identify(pid, &id, &err), 0);
    assert_int_equal(lb_proc_kill(&id, 5000, &err), 0);
    assert_int_equal(waitpid(pid, NULL, 0), pid);
    assert_int_equal(access(gone, F_OK), -1);
    assert_int_equal(access(taken, F_OK), 0);
    close(mine);
    close(ready[0]);
    close(ready[1]);
    unlink(taken);
    assert_int_equal(rmdir(dir), 0);
}

static void *outlive_main(void *arg)
{
    for (;;)
        pause();
    return arg;
}

static void main_thread_gone(void **state)
{
    (void)state;
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        pthread_t t;
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (pthread_create(&t, NULL, outlive_main, NULL))
            _exit(1);
        pthread_exit(NULL); /* /proc now says Z, and yet it runs */
    }
    lb_sleep_ms(100);
    struct lb_proc_id id;
    assert_int_equal(lb_proc_identify(pid, &id, NULL), 0);
    assert_true(lb_proc_alive(&id));
    assert_int_equal(lb_proc_kill(&id, 5000, NULL), 0);
    assert_false(lb_proc_alive(&id));
    waitpid(pid, NULL, 0);
}

static void command_line(void **state)
{
    (void)state;
    struct lb_error err = LB_ERROR_INIT;
    char **argv = NULL;
    int p[2];
    assert_int_equal(pipe(p), 0);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        dup2(p[0], 0);
        execl("/bin/sh", "a name", "-c", "read x; exit 0", "", "z", "", (char *)NULL);
        _exit(99);
    }
    lb_sleep_ms(100);
    assert_int_equal(lb_proc_cmdline(pid, &argv, &err), 0);
    const char *const want[] = {"a name", "-c", "read x; exit 0", "", "z", ""};
    for (size_t i = 0; i < LB_ARRAY_LEN(want); i++)
        assert_string_equal(argv[i], want[i]);
    assert_null(argv[6]);
    lb_strv_free(argv);
    close(p[0]);
    close(p[1]);
    kill(pid, SIGKILL);
    siginfo_t info;
    assert_int_equal(waitid(P_PID, (id_t)pid, &info, WEXITED | WNOWAIT), 0);
    assert_int_equal(lb_proc_cmdline(pid, &argv, &err), -1); /* a zombie has none */
    assert_int_equal(err.code, LB_E_NOT_FOUND);
    waitpid(pid, NULL, 0);
    assert_int_equal(lb_proc_cmdline(pid, &argv, &err), -1);
    assert_int_equal(err.code, LB_E_NOT_FOUND);
}

static void numbers(void **state)
{
    (void)state;
    static const struct {
        int (*parse)(const char *, uint64_t *, struct lb_error *);
        const char *text;
        uint64_t want;
    } good[] = {
        {lb_parse_size, "0", 0},
        {lb_parse_size, "10", 10},
        {lb_parse_size, "64K", 65536},
        {lb_parse_size, "64k", 65536},
        {lb_parse_size, "1G", 1u << 30},
        {lb_parse_size, "1.5M", 1572864},
        {lb_parse_size, "2GiB", UINT64_C(2) << 30},
        {lb_parse_size, "0.1K", 102},
        {lb_parse_size, "18446744073709551615", UINT64_MAX},
        {lb_parse_size, "16777215T", UINT64_C(16777215) << 40},
        {lb_parse_duration_ms, "25ms", 25},
        {lb_parse_duration_ms, "2s", 2000},
        {lb_parse_duration_ms, "1m", 60000},
        {lb_parse_duration_ms, "0.5s", 500},
        {lb_parse_duration_ms, "2h", 7200000},
        {lb_parse_rate, "1Gbit", 125000000},
        {lb_parse_rate, "100Mbit", 12500000},
        {lb_parse_rate, "100mbit/s", 12500000},
        {lb_parse_rate, "50MB", 50000000},
        {lb_parse_rate, "1MiB/s", 1 << 20},
        {lb_parse_rate, "2.5Gbit", 312500000},
        {lb_parse_rate, "1000", 1000},
    };
    for (size_t i = 0; i < LB_ARRAY_LEN(good); i++) {
        uint64_t got = 42;
        if (good[i].parse(good[i].text, &got, NULL) != 0 || got != good[i].want)
            fail_msg("\"%s\" gave %llu", good[i].text, (unsigned long long)got);
    }
    static const struct {
        int (*parse)(const char *, uint64_t *, struct lb_error *);
        const char *text;
    } bad[] = {
        {lb_parse_size, ""},          {lb_parse_size, "-1"},
        {lb_parse_size, "+1"},        {lb_parse_size, " 1"},
        {lb_parse_size, "1 "},        {lb_parse_size, "1X"},
        {lb_parse_size, "K"},         {lb_parse_size, "1."},
        {lb_parse_size, ".5M"},       {lb_parse_size, "1.5"},
        {lb_parse_size, "0x10"},      {lb_parse_size, "1e3"},
        {lb_parse_size, "18446744073709551616"}, {lb_parse_size, "16777216T"},
        {lb_parse_size, "99999999999999999999999"}, {lb_parse_duration_ms, "25"},
        {lb_parse_duration_ms, "ms"}, {lb_parse_duration_ms, "1d"},
        {lb_parse_duration_ms, "9999999999999999999h"}, {lb_parse_rate, "1G"},
        {lb_parse_rate, "fast"},      {lb_parse_rate, "/s"},
        {lb_parse_rate, ""},
    };
    for (size_t i = 0; i < LB_ARRAY_LEN(bad); i++) {
        uint64_t got = 42;
        struct lb_error err = LB_ERROR_INIT;
        if (bad[i].parse(bad[i].text, &got, &err) != -1 || got != 42)
            fail_msg("\"%s\" was taken", bad[i].text);
        assert_int_equal(err.code, LB_E_USAGE);
        assert_true(err.remedy[0]);
    }
}

static void addresses(void **state)
{
    (void)state;
    char host[256];
    uint16_t port;
    static const struct {
        const char *text, *host;
        unsigned port;
    } good[] = {
        {"web1:80", "web1", 80},     {"web1", "web1", 7}, {":80", "", 80},
        {"[::1]:80", "::1", 80},     {"[::1]", "::1", 7}, {"fe80::1%eth0", "fe80::1%eth0", 7},
        {"10.0.0.1:65535", "10.0.0.1", 65535}, {"h:0", "h", 0}, {"[fe80::1%e0]:9", "fe80::1%e0", 9},
    };
    for (size_t i = 0; i < LB_ARRAY_LEN(good); i++) {
        if (lb_parse_hostport(good[i].text, 7, host, &port, NULL) < 0)
            fail_msg("\"%s\" was refused", good[i].text);
        assert_string_equal(host, good[i].host);
        assert_int_equal(port, good[i].port);
    }
    char longest[300];
    memset(longest, 'h', sizeof(longest));
    longest[256] = '\0';
    const char *bad[] = {"",      "h:",    "h:x",   "h:65536", "h:99999999999", "h:-1", "h: 1",
                         "[::1",  "[]",    "[::1]x", "[::1]:", "a b",   "a/b",  "u@h",
                         longest, "h]:1"};
    for (size_t i = 0; i < LB_ARRAY_LEN(bad); i++) {
        struct lb_error err = LB_ERROR_INIT;
        if (lb_parse_hostport(bad[i], 7, host, &port, &err) != -1)
            fail_msg("\"%s\" was taken", bad[i]);
        assert_int_equal(err.code, LB_E_USAGE);
    }
    longest[255] = '\0';
    assert_int_equal(lb_parse_hostport(longest, 7, host, &port, NULL), 0);
}

static void hex_and_human(void **state)
{
    (void)state;
    char text[16];
    unsigned char bytes[4];
    lb_hex(text, "\x00\x7f\xff", 3);
    assert_string_equal(text, "007fff");
    assert_int_equal(lb_unhex(bytes, 4, "007FfF"), 3);
    assert_memory_equal(bytes, "\x00\x7f\xff", 3);
    assert_int_equal(lb_unhex(bytes, 4, ""), 0);
    assert_int_equal(lb_unhex(bytes, 4, "0"), -1);
    assert_int_equal(lb_unhex(bytes, 4, "0g"), -1);
    assert_int_equal(lb_unhex(bytes, 4, "0011223344"), -1);

    char buf[32];
    assert_string_equal(lb_human_bytes(buf, sizeof(buf), 0), "0 B");
    assert_string_equal(lb_human_bytes(buf, sizeof(buf), 1023), "1023 B");
    assert_string_equal(lb_human_bytes(buf, sizeof(buf), 1024), "1.0 KiB");
    assert_string_equal(lb_human_bytes(buf, sizeof(buf), 78.0 * 1048576), "78.0 MiB");
    assert_string_equal(lb_human_bytes(buf, sizeof(buf), 1024 * 1024 - 1), "1.0 MiB");
    assert_string_equal(lb_human_bytes(buf, sizeof(buf), 1.2 * 1073741824), "1.2 GiB");
}

int main(void)
{
    signal(SIGPIPE, SIG_DFL); /* lb_write_all has to manage without */
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(whole_transfers), cmocka_unit_test(limits),
        cmocka_unit_test(readable),        cmocka_unit_test(descriptors),
        cmocka_unit_test(processes),
        cmocka_unit_test(main_thread_gone), cmocka_unit_test(command_line),
        cmocka_unit_test(killed_leaves_no_sockets),
        cmocka_unit_test(numbers),         cmocka_unit_test(addresses),
        cmocka_unit_test(hex_and_human),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
