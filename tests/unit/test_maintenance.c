/* migrate/maintenance.c: the file, the list of what has left, damage. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <string.h>

#include "migrate/maintenance.h"

static char dir[64];

static int setup(void **state)
{
    (void)state;
    strcpy(dir, "/tmp/lb-test-maintenance-XXXXXX");
    return mkdtemp(dir) ? 0 : -1;
}

static int teardown(void **state)
{
    (void)state;
    return lb_remove_tree(dir, NULL);
}

static void put(const char *text)
{
    LB_AUTO_FREE char *path = lb_asprintf("%s/maintenance.json", dir);

    assert_int_equal(lb_file_write_atomic(path, text, strlen(text), 0600, NULL), 0);
}

static void test_round_trip(void **state)
{
    struct lb_maintenance m = {.on = true, .since_ms = 1700000000123, .reason = "evacuation \"x\""}, r;
    struct lb_left_vm *v;
    (void)state;

    assert_int_equal(lb_maintenance_load(dir, &r, NULL), 0);
    assert_false(r.on);
    assert_int_equal(r.n_left, 0);
    for (int i = 0; i < 3; i++) {
        char name[16];
        snprintf(name, sizeof(name), "web%d", i);
        snprintf(lb_left_add(&m, name)->to, sizeof(v->to), "host%d", i);
    }
    v = lb_left_add(&m, "web1");
    assert_ptr_equal(v, &m.left[1]);
    v->is_protected = true;
    lb_left_find(&m, "web2")->suspended = true;
    lb_left_remove(&m, "web0");
    lb_left_remove(&m, "web0");
    assert_int_equal(lb_maintenance_save(dir, &m, NULL), 0);
    assert_int_equal(lb_maintenance_load(dir, &r, NULL), 0);
    assert_true(r.on);
    assert_int_equal(r.since_ms, m.since_ms);
    assert_string_equal(r.reason, m.reason);
    assert_int_equal(r.n_left, 2);
    assert_null(lb_left_find(&r, "web0"));
    assert_true(lb_left_find(&r, "web1")->is_protected);
    assert_false(lb_left_find(&r, "web1")->suspended);
    assert_string_equal(lb_left_find(&r, "web2")->to, "host2");
    assert_true(lb_left_find(&r, "web2")->suspended);
    lb_maintenance_free(&r);
    lb_maintenance_free(&m);
}

/* It lasts until it is off and everything is back. */
static void test_end(void **state)
{
    struct lb_maintenance m = {.on = true}, r;
    LB_AUTO_FREE char *path = lb_asprintf("%s/maintenance.json", dir);
    (void)state;

    lb_left_add(&m, "web1");
    m.on = false;
    assert_int_equal(lb_maintenance_save(dir, &m, NULL), 0);
    assert_int_equal(lb_maintenance_load(dir, &r, NULL), 0);
    assert_false(r.on);
    assert_int_equal(r.n_left, 1);
    lb_maintenance_free(&r);
    lb_left_remove(&m, "web1");
    assert_int_equal(lb_maintenance_save(dir, &m, NULL), 0);
    assert_int_equal(access(path, F_OK), -1);
    assert_int_equal(lb_maintenance_save(dir, &m, NULL), 0);
    lb_maintenance_free(&m);
}

static void test_damage(void **state)
{
    static const char *const texts[] = {
        "", "{}", "[]", "{\"on\":1,\"since_ms\":0,\"reason\":\"\",\"left\":[]}",
        "{\"on\":false,\"since_ms\":-1,\"reason\":\"\",\"left\":[]}", "{\"on\":false,\"since_ms\":0,\"left\":[]}",
        "{\"on\":false,\"since_ms\":0,\"reason\":\"\",\"left\":[{\"vm\":\"a\"}]}",
        "{\"on\":false,\"since_ms\":0,\"reason\":\"\",\"left\":[{\"vm\":\"a\",\"to\":\"b\",\"protected\":false}]}",
        "{\"on\":false,\"since_ms\":0,\"reason\":\"\",\"left\":"
        "[{\"vm\":\"a\",\"to\":\"b\",\"protected\":false,\"suspended\":false},"
        "{\"vm\":\"a\",\"to\":\"b\",\"protected\":false,\"suspended\":false}]}",
    };
    (void)state;

    for (size_t i = 0; i < LB_ARRAY_LEN(texts); i++) {
        struct lb_error err = LB_ERROR_INIT;
        struct lb_maintenance m;

        put(texts[i]);
        assert_int_equal(lb_maintenance_load(dir, &m, &err), -1);
        assert_int_equal(err.code, LB_E_STATE);
        assert_true(err.remedy[0] != '\0');
        assert_true(m.on); /* who cannot tell takes no VM */
        assert_int_equal(m.n_left, 0);
        assert_null(m.left);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_round_trip, setup, teardown),
        cmocka_unit_test_setup_teardown(test_end, setup, teardown),
        cmocka_unit_test_setup_teardown(test_damage, setup, teardown),
    };
    return cmocka_run_group_tests_name("maintenance", tests, NULL, NULL);
}
