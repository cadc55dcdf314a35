/* Keys and trusted hosts on disk. */
#include "netproto/netproto_internal.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
/* after the headers above */
#include <cmocka.h>

static char g_dir[] = "/tmp/lb-identity-XXXXXX";

static char *in_dir(const char *name)
{
    static char path[256];
    snprintf(path, sizeof(path), "%s/%s", g_dir, name);
    return path;
}

static int fresh(void **state)
{
    (void)state;
    lb_remove_tree(g_dir, NULL);
    return mkdir(g_dir, 0700);
}

static void key_is_made_once(void **state)
{
    (void)state;
    struct lb_identity a, b;
    struct lb_error err = LB_ERROR_INIT;
    struct stat st;
    char sub[256];
    snprintf(sub, sizeof(sub), "%s/deeper", g_dir); /* made when missing */
    assert_int_equal(lb_identity_load(sub, &a, &err), 0);
    assert_int_equal(lb_identity_load(sub, &b, &err), 0);
    assert_memory_equal(&a, &b, sizeof(a));
    assert_false(lb_is_zero(&a, sizeof(a)));
    assert_int_equal(stat(in_dir("deeper/identity.key"), &st), 0);
    assert_int_equal(st.st_mode & 0777, 0600);
    lb_identity_wipe(&a);
    assert_true(lb_is_zero(&a, sizeof(a)));
}

static void key_is_made_once_by_many(void **state)
{
    (void)state;
    struct lb_identity mine;
    int pipes[2];
    assert_int_equal(pipe(pipes), 0);
    for (int i = 0; i < 8; i++)
        if (fork() == 0) {
            struct lb_identity id;
            if (lb_identity_load(g_dir, &id, NULL) < 0 || write(pipes[1], &id, sizeof(id)) < 0)
                _exit(1);
            _exit(0);
        }
    for (int i = 0; i < 8; i++) {
        int status;
        wait(&status);
        assert_int_equal(status, 0);
    }
    assert_int_equal(lb_identity_load(g_dir, &mine, NULL), 0);
    for (int i = 0; i < 8; i++) {
        struct lb_identity id;
        assert_int_equal(read(pipes[0], &id, sizeof(id)), sizeof(id));
        assert_memory_equal(&id, &mine, sizeof(id));
    }
    close(pipes[0]);
    close(pipes[1]);
}

static void bad_key_files(void **state)
{
    (void)state;
    struct lb_identity id;
    struct lb_error err = LB_ERROR_INIT;
    assert_int_equal(lb_identity_load(g_dir, &id, &err), 0);
    assert_int_equal(chmod(in_dir("identity.key"), 0640), 0);
    assert_int_equal(lb_identity_load(g_dir, &id, &err), -1);
    assert_int_equal(err.code, LB_E_AUTH);
    assert_non_null(strstr(err.remedy, "chmod 600"));
    static const char *const texts[] = {"", "abcd\n", "zz\n",
        "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff00\n"};
    for (size_t i = 0; i < LB_ARRAY_LEN(texts); i++) {
        assert_int_equal(lb_file_write_atomic(in_dir("identity.key"), texts[i], strlen(texts[i]),
                                              0600, NULL), 0);
        assert_int_equal(lb_identity_load(g_dir, &id, &err), -1);
        assert_int_equal(err.code, LB_E_AUTH);
    }
}

static void key_text(void **state)
{
    (void)state;
    uint8_t pub[LB_KEY_BYTES], back[LB_KEY_BYTES];
    char text[LB_KEY_TEXT_BYTES], bad[LB_KEY_TEXT_BYTES + 2];
    struct lb_error err = LB_ERROR_INIT;
    for (unsigned i = 0; i < sizeof(pub); i++)
        pub[i] = (uint8_t)(i * 11);
    lb_key_format(text, pub);
    assert_int_equal(strlen(text), LB_KEY_TEXT_BYTES - 1);
    assert_int_equal(lb_key_parse(text, back, &err), 0);
    assert_memory_equal(pub, back, sizeof(pub));
    for (size_t i = 0; i < strlen(text); i++) { /* any wrong character, any length */
        strcpy(bad, text);
        bad[i] = 'x';
        assert_int_equal(lb_key_parse(bad, back, &err), -1);
        assert_int_equal(err.code, LB_E_USAGE);
        bad[i] = 0;
        assert_int_equal(lb_key_parse(bad, back, &err), -1);
    }
    snprintf(bad, sizeof(bad), "%s0", text);
    assert_int_equal(lb_key_parse(bad, back, &err), -1);
}

static struct lb_host host(const char *name, const char *address, uint8_t key)
{
    struct lb_host h = {0};
    snprintf(h.name, sizeof(h.name), "%s", name);
    snprintf(h.address, sizeof(h.address), "%s", address);
    memset(h.pub, key, sizeof(h.pub));
    return h;
}

static void trust_and_forget(void **state)
{
    (void)state;
    struct lb_host a = host("a", "10.0.0.1", 1), b = host("b.example", "[fe80::1]:8000", 2),
                   c = host("c", "", 3), other = host("a", "10.0.0.1", 4), same = host("d", "", 2);
    struct lb_hosts all;
    struct lb_error err = LB_ERROR_INIT;
    assert_int_equal(lb_hosts_load(g_dir, &all, &err), 0);
    assert_int_equal(all.n, 0);
    lb_hosts_free(&all);
    assert_int_equal(lb_hosts_trust(g_dir, &a, &err), 0);
    assert_int_equal(lb_hosts_trust(g_dir, &b, &err), 0);
    assert_int_equal(lb_hosts_trust(g_dir, &c, &err), 0);
    assert_int_equal(lb_hosts_trust(g_dir, &other, &err), -1);
    assert_int_equal(err.code, LB_E_EXISTS);
    assert_non_null(strstr(err.remedy, "forget"));
    assert_int_equal(lb_hosts_trust(g_dir, &same, &err), -1);
    assert_int_equal(err.code, LB_E_EXISTS);
    strcpy(a.address, "10.0.0.9:7");
    assert_int_equal(lb_hosts_trust(g_dir, &a, &err), 0); /* a new address */
    assert_int_equal(lb_hosts_load(g_dir, &all, &err), 0);
    assert_int_equal(all.n, 3);
    assert_string_equal(lb_hosts_by_name(&all, "a")->address, "10.0.0.9:7");
    assert_string_equal(lb_hosts_by_key(&all, b.pub)->name, "b.example");
    assert_null(lb_hosts_by_name(&all, "x"));
    assert_null(lb_hosts_by_key(&all, other.pub));
    lb_hosts_free(&all);
    assert_int_equal(lb_hosts_forget(g_dir, "a", &err), 0);
    assert_int_equal(lb_hosts_forget(g_dir, "a", &err), -1);
    assert_int_equal(err.code, LB_E_NOT_FOUND);
    assert_int_equal(lb_hosts_trust(g_dir, &other, &err), 0);
    assert_int_equal(lb_hosts_load(g_dir, &all, &err), 0);
    assert_int_equal(all.n, 3);
    lb_hosts_free(&all);
    static const char *const names[] = {"", "a b", "a/b", "a\nb", "ü"};
    for (size_t i = 0; i < LB_ARRAY_LEN(names); i++) {
        struct lb_host h = host(names[i], "", 9);
        assert_int_equal(lb_hosts_trust(g_dir, &h, &err), -1);
        assert_int_equal(err.code, LB_E_USAGE);
    }
    struct lb_host h = host("h", "bad address:99999", 9);
    assert_int_equal(lb_hosts_trust(g_dir, &h, &err), -1);
}

static void many_writers(void **state)
{
    (void)state;
    struct lb_hosts all;
    for (int i = 0; i < 6; i++)
        if (fork() == 0) {
            int rc = 0;
            for (int k = 0; k < 5; k++) {
                char name[32];
                snprintf(name, sizeof(name), "h%d-%d", i, k);
                struct lb_host h = host(name, "", (uint8_t)(i * 5 + k + 1));
                rc |= lb_hosts_trust(g_dir, &h, NULL);
            }
            _exit(rc != 0);
        }
    for (int i = 0; i < 6; i++) {
        int status;
        wait(&status);
        assert_int_equal(status, 0);
    }
    assert_int_equal(lb_hosts_load(g_dir, &all, NULL), 0);
    assert_int_equal(all.n, 30); /* none lost */
    lb_hosts_free(&all);
}

#define KEY "lb10000000000000000000000000000000000000000000000000000000000000001"
static void bad_host_files(void **state)
{
    (void)state;
    static const char *const texts[] = {
        "", "[]", "{", "{\"version\":1}", "{\"version\":2,\"hosts\":[]}",
        "{\"version\":1,\"hosts\":{}}", "{\"version\":1,\"hosts\":[3]}",
        "{\"version\":1,\"hosts\":[{\"name\":\"a\",\"address\":\"\"}]}",
        "{\"version\":1,\"hosts\":[{\"name\":\"a\",\"address\":\"\",\"key\":\"lb1\"}]}",
        "{\"version\":1,\"hosts\":[{\"name\":\"a b\",\"address\":\"\",\"key\":\"" KEY "\"}]}",
        "{\"version\":1,\"hosts\":[{\"name\":\"a\",\"address\":\"\",\"key\":\"" KEY "\"},"
        "{\"name\":\"b\",\"address\":\"\",\"key\":\"" KEY "\"}]}",
    };
    for (size_t i = 0; i < LB_ARRAY_LEN(texts); i++) {
        struct lb_hosts all = {0};
        struct lb_error err = LB_ERROR_INIT;
        assert_int_equal(lb_file_write_atomic(in_dir("hosts.json"), texts[i], strlen(texts[i]),
                                              0600, NULL), 0);
        if (lb_hosts_load(g_dir, &all, &err) == 0)
            fail_msg("accepted: %s", texts[i]);
        assert_int_equal(err.code, LB_E_USAGE);
        assert_true(err.remedy[0] != 0);
        assert_int_equal(lb_hosts_forget(g_dir, "a", &err), -1); /* and never overwritten */
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(key_is_made_once, fresh),
        cmocka_unit_test_setup(key_is_made_once_by_many, fresh),
        cmocka_unit_test_setup(bad_key_files, fresh),
        cmocka_unit_test_setup(key_text, fresh),
        cmocka_unit_test_setup(trust_and_forget, fresh),
        cmocka_unit_test_setup(many_writers, fresh),
        cmocka_unit_test_setup(bad_host_files, fresh),
    };
    if (!mkdtemp(g_dir))
        return 1;
    int rc = cmocka_run_group_tests(tests, NULL, NULL);
    lb_remove_tree(g_dir, NULL);
    return rc;
}
