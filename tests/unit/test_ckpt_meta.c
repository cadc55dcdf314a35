/* checkpoint/meta.c: there and back, and what a file may say wrongly. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <jansson.h>
#include <string.h>

#include "checkpoint/store_internal.h"

static struct lb_ckpt_disk g_disks[2] = {
    {.id = "virtio0", .argv_path = "/vm/web1.raw", .path = "/vm/web1.lb-1.qcow2", .format = "qcow2",
     .size_bytes = UINT64_C(1) << 40, .file_bytes = 12345, .mtime_ns = 1700000000123456789, .inode = UINT64_MAX,
     .device = 64768},
    {.id = "ide1-cd0", .argv_path = "/vm/\303\244.iso", .path = "/vm/\303\244.iso", .format = "raw"},
};

static struct lb_ckpt_meta sample(void)
{
    static char *argv[] = {"/usr/bin/qemu-system-x86_64", "-name", "web1", "-append", "a \"quoted\" word", NULL};
    struct lb_ckpt_meta m = {
        .number = 7, .suspend = true, .paused = true, .created_ms = 1700000000123, .pause_ms = 12.625,
        .desc = {.name = "web1", .hypervisor = "qemu", .hv_version = "7.2.22",
                 .emulator = "/usr/bin/qemu-system-x86_64", .argv = argv, .machine = "pc-i440fx-7.2", .vcpus = 2,
                 .ram_bytes = 64 << 20},
        .disks = g_disks, .n_disks = 2,
    };
    strcpy(m.vm, "web1");
    strcpy(m.label, "before \"the\" upgrade");
    return m;
}

static void test_round_trip(void **state)
{
    struct lb_ckpt_meta m = sample(), r;
    struct lb_ckpt_stats s = {1, 2, 3, 4, 5, 6, 7, UINT64_C(1) << 62}, t;
    struct lb_error err = LB_ERROR_INIT;
    (void)state;

    LB_AUTO_FREE char *json = lb_ckpt_meta_json(&m, &s, &err);
    assert_non_null(json);
    assert_int_equal(lb_ckpt_meta_parse(json, &r, &t, &err), 0);
    assert_memory_equal(&s, &t, sizeof(s));
    assert_string_equal(r.vm, m.vm);
    assert_string_equal(r.label, m.label);
    assert_int_equal(r.number, 7);
    assert_true(r.suspend && r.paused && !r.no_disk);
    assert_int_equal(r.created_ms, m.created_ms);
    assert_true(r.pause_ms == 12.625);
    assert_string_equal(r.desc.machine, "pc-i440fx-7.2");
    assert_string_equal(r.desc.argv[4], "a \"quoted\" word");
    assert_null(r.desc.argv[5]);
    assert_int_equal(r.n_disks, 2);
    assert_memory_equal(r.disks, g_disks, sizeof(g_disks));
    lb_ckpt_meta_free(&r);
    assert_null(r.disks);

    LB_AUTO_FREE char *plain = lb_ckpt_meta_json(&m, NULL, &err);
    assert_non_null(plain);
    assert_null(strstr(plain, "stats"));
    assert_int_equal(lb_ckpt_meta_parse(plain, &r, NULL, &err), 0);
    lb_ckpt_meta_free(&r);
}

static void test_unwritable(void **state)
{
    struct lb_ckpt_meta m = sample();
    struct lb_error err = LB_ERROR_INIT;
    char path[sizeof(g_disks[0].path)];
    (void)state;

    strcpy(m.label, "\xff");
    assert_null(lb_ckpt_meta_json(&m, NULL, &err));
    assert_int_equal(err.code, LB_E_UNSUPPORTED);
    m = sample();
    strcpy(path, g_disks[1].path);
    strcpy(g_disks[1].path, "\xff");
    assert_null(lb_ckpt_meta_json(&m, NULL, &err));
    strcpy(g_disks[1].path, path);
    m.desc.machine = NULL;
    err = (struct lb_error)LB_ERROR_INIT;
    assert_null(lb_ckpt_meta_json(&m, NULL, &err));
    assert_int_equal(err.code, LB_E_UNSUPPORTED);
}

static void refuse(json_t *o, const char *says)
{
    struct lb_ckpt_meta r;
    struct lb_error err = LB_ERROR_INIT;
    LB_AUTO_FREE char *json = json_dumps(o, 0);
    assert_int_equal(lb_ckpt_meta_parse(json, &r, NULL, &err), -1);
    assert_int_equal(err.code, LB_E_PROTO);
    if (!strstr(err.message, says))
        fail_msg("\"%s\" does not say \"%s\"", err.message, says);
}

/* Each member left out, and each of a kind it is not. */
static void test_damaged(void **state)
{
    static const char *const keys[] = {"vm", "label", "number", "suspend", "no_disk", "paused", "created_ms",
                                       "pause_ms", "disks", "description"};
    static const char *const disk_keys[] = {"id", "argv_path", "path", "format", "size_bytes", "file_bytes",
                                            "mtime_ns", "inode", "device"};
    struct lb_ckpt_meta m = sample();
    LB_AUTO_FREE char *json = lb_ckpt_meta_json(&m, NULL, NULL);
    (void)state;

    for (unsigned bad = 0; bad < 2; bad++) {
        for (unsigned i = 0; i < LB_ARRAY_LEN(keys); i++) {
            json_t *o = json_loads(json, 0, NULL);
            assert_int_equal(bad ? json_object_set_new(o, keys[i], json_object()) : json_object_del(o, keys[i]), 0);
            refuse(o, keys[i]);
            json_decref(o);
        }
        for (unsigned i = 0; i < LB_ARRAY_LEN(disk_keys); i++) {
            json_t *o = json_loads(json, 0, NULL), *d = json_array_get(json_object_get(o, "disks"), 1);
            assert_int_equal(bad ? json_object_set_new(d, disk_keys[i], json_null()) : json_object_del(d, disk_keys[i]),
                             0);
            refuse(o, disk_keys[i]);
            json_decref(o);
        }
    }
}

static void test_hostile(void **state)
{
    struct lb_ckpt_meta m = sample(), r;
    struct lb_error err = LB_ERROR_INIT;
    LB_AUTO_FREE char *json = lb_ckpt_meta_json(&m, NULL, NULL);
    char longer[200];
    (void)state;

    memset(longer, 'x', sizeof(longer) - 1);
    longer[sizeof(longer) - 1] = '\0';
    const struct {
        const char *key;
        json_t *value;
        const char *says;
    } tries[] = {
        {"vm", json_string("../../etc"), "not the name"},
        {"vm", json_string(""), "not the name"},
        {"label", json_string(longer), "label"},
        {"number", json_integer(INT64_C(1) << 33), "number"},
        {"number", json_integer(-1), "number"},
        {"description", json_string("*"), "base64"},
        {"description", json_string("/////w=="), "description"},
        {"description", json_string(""), "description"},
    };
    for (unsigned i = 0; i < LB_ARRAY_LEN(tries); i++) {
        json_t *o = json_loads(json, 0, NULL);
        json_object_set_new(o, tries[i].key, tries[i].value);
        refuse(o, tries[i].says);
        json_decref(o);
    }
    static const char *const texts[] = {"", "{", "[]", "3", "{\"vm\":\"a\",\"vm\":\"b\"}", "null"};
    for (unsigned i = 0; i < LB_ARRAY_LEN(texts); i++) {
        assert_int_equal(lb_ckpt_meta_parse(texts[i], &r, NULL, &err), -1);
        assert_int_equal(err.code, LB_E_PROTO);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_unwritable),
        cmocka_unit_test(test_damaged),
        cmocka_unit_test(test_hostile),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
