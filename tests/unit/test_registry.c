/* The registry: entries come back as they were saved, damage is an error, locks exclude. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <signal.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "core/registry.h"

static char dir[64];

static int setup(void **s)
{
    (void)s;
    strcpy(dir, "/tmp/lb-registry-XXXXXX");
    return mkdtemp(dir) ? 0 : -1;
}

static int teardown(void **s)
{
    (void)s;
    return lb_remove_tree(dir, NULL);
}

static struct lb_vm_entry sample(const char *name)
{
    struct lb_vm_entry e = {.hypervisor = "qemu", .qmp_path = "/run/x/qmp.sock", .origin = "run",
                            .state = LB_VM_HANDED_OVER, .token = "00112233445566778899aabbccddeeff",
                            .peer = "hostB", .came_by = "one two", .created_ms = 12345, .note = "a \"note\"\xff"};
    snprintf(e.name, sizeof(e.name), "%s", name);
    e.proc = (struct lb_proc_id){.pid = 2000000000, .start_ticks = UINT64_C(1) << 40};
    return e;
}

static void test_names(void **s)
{
    (void)s;
    char longest[65];
    memset(longest, 'a', 64);
    longest[64] = '\0';
    assert_false(lb_vm_name_valid(longest));
    longest[63] = '\0';
    assert_true(lb_vm_name_valid(longest));
    assert_true(lb_vm_name_valid("web-1.a_b"));
    static const char *const bad[] = {"", ".", "..", ".a", "-a", "_a", "a/b", "a b", "a\n", "\xc3\xa4"};
    for (size_t i = 0; i < LB_ARRAY_LEN(bad); i++) {
        struct lb_error err = LB_ERROR_INIT;
        struct lb_vm_entry e = sample("x");
        assert_false(lb_vm_name_valid(bad[i]));
        snprintf(e.name, sizeof(e.name), "%s", bad[i]);
        assert_int_equal(lb_vm_entry_save(dir, &e, &err), -1);
        assert_int_equal(err.code, LB_E_USAGE);
        assert_int_equal(lb_vm_entry_load(dir, bad[i], &e, NULL), -1);
        assert_int_equal(lb_vm_entry_remove(dir, bad[i], NULL), -1);
        assert_int_equal(lb_vm_lock(dir, bad[i], NULL), -1);
        assert_false(lb_vm_is_locked(dir, bad[i]));
    }
}

static void test_states(void **s)
{
    (void)s;
    for (int i = LB_VM_RUNNING; i <= LB_VM_DEAD; i++) {
        enum lb_vm_state back = LB_VM_RUNNING;
        assert_int_equal(lb_vm_state_parse(lb_vm_state_name((enum lb_vm_state)i), &back), 0);
        assert_int_equal(back, i);
    }
    enum lb_vm_state x;
    assert_int_equal(lb_vm_state_parse("unknown", &x), -1);
    assert_string_equal(lb_vm_state_name((enum lb_vm_state)99), "unknown");
}

static void test_came_by(void **s)
{
    (void)s;
    char list[LB_CAME_BY_BYTES] = "", key[80], first[80] = "", last[80] = "";
    assert_false(lb_came_by_has(list, "k1"));
    assert_false(lb_came_by_has(list, ""));
    lb_came_by_add(list, "k1");
    lb_came_by_add(list, "k12");
    assert_string_equal(list, "k1 k12");
    assert_true(lb_came_by_has(list, "k1") && lb_came_by_has(list, "k12"));
    assert_false(lb_came_by_has(list, "k") || lb_came_by_has(list, "12") || lb_came_by_has(list, "k1 "));
    lb_came_by_add(list, "k1"); /* again: now the latest */
    assert_string_equal(list, "k12 k1");
    lb_came_by_add(list, "k1");
    assert_string_equal(list, "k12 k1");
    list[0] = 0;
    for (int i = 0; i < 30; i++) { /* the oldest make room */
        snprintf(key, sizeof(key), "%02d%065d", i, 0);
        snprintf(i ? last : first, sizeof(last), "%s", key);
        lb_came_by_add(list, key);
        assert_true(lb_came_by_has(list, key));
        assert_int_equal(lb_came_by_has(list, first), i < 8);
    }
    assert_int_equal(strlen(list), 8 * 67 + 7);
    assert_string_equal(list + strlen(list) - 67, last);
}

static void test_round_trip(void **s)
{
    (void)s;
    struct lb_vm_entry e = sample("web1"), back;
    uint64_t before = lb_wall_ms();
    assert_int_equal(lb_vm_entry_save(dir, &e, NULL), 0);
    assert_int_equal(lb_vm_entry_load(dir, "web1", &back, NULL), 0);
    assert_string_equal(back.name, "web1");
    assert_string_equal(back.hypervisor, "qemu");
    assert_string_equal(back.qmp_path, e.qmp_path);
    assert_string_equal(back.origin, "run");
    assert_string_equal(back.token, e.token);
    assert_string_equal(back.peer, "hostB");
    assert_string_equal(back.came_by, "one two");
    assert_string_equal(back.note, "a \"note\"?"); /* not UTF-8 */
    assert_int_equal(back.state, LB_VM_HANDED_OVER);
    assert_int_equal(back.proc.pid, e.proc.pid);
    assert_true(back.proc.start_ticks == e.proc.start_ticks);
    assert_int_equal(back.created_ms, 12345);
    assert_true(back.changed_ms >= before);
    struct stat st;
    char path[128];
    snprintf(path, sizeof(path), "%s/vms/web1", dir);
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0700);
}

static void test_missing_and_damaged(void **s)
{
    (void)s;
    struct lb_error err = LB_ERROR_INIT;
    struct lb_vm_entry e = sample("web1"), *v;
    unsigned n;
    assert_int_equal(lb_vm_entry_list(dir, &v, &n, NULL), 0);
    assert_int_equal(n, 0);
    assert_int_equal(lb_vm_entry_load(dir, "web1", &e, &err), -1);
    assert_int_equal(err.code, LB_E_NOT_FOUND);
    e = sample("web1");
    assert_int_equal(lb_vm_entry_save(dir, &e, NULL), 0);
    char path[128];
    char *text;
    size_t len;
    snprintf(path, sizeof(path), "%s/vms/web1/vm.json", dir);
    assert_int_equal(lb_file_read(path, 1 << 20, &text, &len, NULL), 0);
    /* a damaged entry may be all that says that a VM runs: it is not removed */
    assert_int_equal(lb_file_write_atomic(path, text, len / 2, 0600, NULL), 0);
    assert_int_equal(lb_vm_entry_remove(dir, "web1", &err), -1);
    assert_int_equal(err.code, LB_E_STATE);
    assert_int_equal(access(path, F_OK), 0);
    for (size_t cut = 0; cut < len; cut += 7) { /* every prefix is an error, never another entry */
        assert_int_equal(lb_file_write_atomic(path, text, cut, 0600, NULL), 0);
        assert_int_equal(lb_vm_entry_load(dir, "web1", &e, &err), -1);
        assert_int_equal(err.code, LB_E_STATE);
    }
    static const char *const swaps[][2] = {{"\"handed-over\"", "\"whatever!!!\""},
                                           {"\"web1\"", "\"web2\""},
                                           {"2000000000", "9000000000"},
                                           {"12345", "-1234"}};
    for (size_t i = 0; i < LB_ARRAY_LEN(swaps); i++) {
        char *copy = lb_strdup(text), *at = strstr(copy, swaps[i][0]);
        assert_non_null(at);
        memcpy(at, swaps[i][1], strlen(swaps[i][1]));
        assert_int_equal(lb_file_write_atomic(path, copy, len, 0600, NULL), 0);
        assert_int_equal(lb_vm_entry_load(dir, "web1", &e, &err), -1);
        assert_int_equal(err.code, LB_E_STATE);
        free(copy);
    }
    free(text);
    lb_log_set_level(LB_LOG_ERROR);
    assert_int_equal(lb_vm_entry_list(dir, &v, &n, NULL), 0);
    assert_int_equal(n, 0);
    free(v);
}

static void test_list_and_remove(void **s)
{
    (void)s;
    struct lb_vm_entry *v;
    unsigned n;
    static const char *const names[] = {"c", "a", "b10", "b"};
    for (size_t i = 0; i < LB_ARRAY_LEN(names); i++) {
        struct lb_vm_entry e = sample(names[i]);
        assert_int_equal(lb_vm_entry_save(dir, &e, NULL), 0);
    }
    assert_int_equal(lb_vm_entry_list(dir, &v, &n, NULL), 0);
    assert_int_equal(n, 4);
    assert_string_equal(v[0].name, "a");
    assert_string_equal(v[1].name, "b");
    assert_string_equal(v[2].name, "b10");
    assert_string_equal(v[3].name, "c");
    free(v);
    assert_int_equal(lb_vm_entry_remove(dir, "b", NULL), 0);
    assert_int_equal(lb_vm_entry_remove(dir, "b", NULL), 0);
    char path[128];
    snprintf(path, sizeof(path), "%s/vms/b", dir);
    assert_int_equal(access(path, F_OK), -1);
    assert_int_equal(lb_vm_entry_list(dir, &v, &n, NULL), 0);
    assert_int_equal(n, 3);
    free(v);
}

/* Forgetting a VM that runs leaves it its control socket. */
static void test_remove_alive(void **s)
{
    (void)s;
    struct lb_vm_entry e = sample("self");
    char path[128];
    assert_int_equal(lb_proc_identify(getpid(), &e.proc, NULL), 0);
    assert_int_equal(lb_vm_entry_save(dir, &e, NULL), 0);
    snprintf(path, sizeof(path), "%s/vms/self/qmp.sock", dir);
    assert_int_equal(lb_file_write_atomic(path, "", 0, 0600, NULL), 0);
    assert_int_equal(lb_vm_entry_remove(dir, "self", NULL), 0);
    assert_int_equal(access(path, F_OK), 0);
    struct lb_error err = LB_ERROR_INIT;
    assert_int_equal(lb_vm_entry_load(dir, "self", &e, &err), -1);
    assert_int_equal(err.code, LB_E_NOT_FOUND);
    assert_int_equal(lb_vm_entry_remove(dir, "self", NULL), 0);
    assert_int_equal(access(path, F_OK), 0);
    assert_int_equal(unlink(path), 0); /* nothing of the VM's left: now the directory goes */
    assert_int_equal(lb_vm_entry_remove(dir, "self", NULL), 0);
    snprintf(path, sizeof(path), "%s/vms/self", dir);
    assert_int_equal(access(path, F_OK), -1);
}

static void test_lock(void **s)
{
    (void)s;
    struct lb_error err = LB_ERROR_INIT;
    struct lb_vm_entry e = sample("v");
    assert_false(lb_vm_is_locked(dir, "v"));
    assert_int_equal(lb_vm_entry_save(dir, &e, NULL), 0);
    assert_false(lb_vm_is_locked(dir, "v"));
    int fd = lb_vm_lock(dir, "v", NULL);
    assert_true(fd >= 0);
    assert_true(lb_vm_is_locked(dir, "v"));
    assert_int_equal(lb_vm_lock(dir, "v", &err), -1);
    assert_int_equal(err.code, LB_E_STATE);
    assert_true(lb_vm_is_locked(dir, "v")); /* neither look nor failure took it away */
    close(fd);
    assert_false(lb_vm_is_locked(dir, "v"));

    /* the death of the holder gives it back */
    int ready[2];
    assert_int_equal(pipe(ready), 0);
    pid_t pid = fork();
    if (pid == 0) {
        char c = lb_vm_lock(dir, "v", NULL) >= 0 ? 'y' : 'n';
        if (write(ready[1], &c, 1) == 1)
            pause();
        _exit(1);
    }
    char c = 'n';
    assert_int_equal(read(ready[0], &c, 1), 1);
    assert_int_equal(c, 'y');
    assert_int_equal(lb_vm_lock(dir, "v", NULL), -1);
    kill(pid, 9);
    waitpid(pid, NULL, 0);
    fd = lb_vm_lock(dir, "v", NULL);
    assert_true(fd >= 0);

    /* a new entry of the same name is not locked by the removed one's holder */
    assert_int_equal(lb_vm_entry_remove(dir, "v", NULL), 0);
    assert_false(lb_vm_is_locked(dir, "v"));
    int fd2 = lb_vm_lock(dir, "v", NULL);
    assert_true(fd2 >= 0);
    close(fd);
    assert_true(lb_vm_is_locked(dir, "v"));
    close(fd2);
    close(ready[0]);
    close(ready[1]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_names),
        cmocka_unit_test(test_states),
        cmocka_unit_test_setup_teardown(test_came_by, setup, teardown),
        cmocka_unit_test_setup_teardown(test_round_trip, setup, teardown),
        cmocka_unit_test_setup_teardown(test_missing_and_damaged, setup, teardown),
        cmocka_unit_test_setup_teardown(test_list_and_remove, setup, teardown),
        cmocka_unit_test_setup_teardown(test_remove_alive, setup, teardown),
        cmocka_unit_test_setup_teardown(test_lock, setup, teardown),
    };
    return cmocka_run_group_tests_name("registry", tests, NULL, NULL);
}
