/* The configuration file: every key, every kind of mistake, and the mapping rule. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <string.h>

#include "migrate/config.h"

static char dir[] = "/tmp/lb-config-XXXXXX";
static char file[64];

static int setup(void **s)
{
    (void)s;
    snprintf(file, sizeof(file), "%s/conf", mkdtemp(dir));
    return 0;
}

static int teardown(void **s)
{
    (void)s;
    return lb_remove_tree(dir, NULL);
}

static int load(const char *text, struct lb_host_config *c, struct lb_error *err)
{
    assert_int_equal(lb_file_write_atomic(file, text, strlen(text), 0600, NULL), 0);
    return lb_config_load(file, c, err);
}

static void test_all_keys(void **s)
{
    (void)s;
    struct lb_host_config c;
    struct lb_error err = LB_ERROR_INIT;
    int rc = load("# a comment\n"
                  "\n"
                  "listen = 0.0.0.0:7007   # trailing comment\n"
                  "name=hostA\r\n"
                  "emulator = /usr/bin/q -> /opt/qemu/bin/q\n"
                  "path = /run/vm-a -> /run/vm-b\n"
                  "path = /srv/img#1 -> /mnt/img\n"
                  "tap = tap0 -> vnet3\n"
                  "memory-reserve = 512M\n"
                  "bandwidth = 1Gbit\n"
                  "max-downtime = 45ms\n"
                  "channels = 2\n"
                  "compress = zstd:3\n"
                  "witness = etcd:http://w1:2379,http://w2:2379\n"
                  "backup = hostB, hostC\n"
                  "lease = 300ms\n"
                  "checkpoint-dir = /srv/lifeboat\n"
                  "checkpoint-key = /etc/lifeboat/ckpt.key\n"
                  "checkpoint-level = -5\n"
                  "tag = ssd\n"
                  "tag = rack-7\n"
                  "link = 10Gbit\n"
                  "together = db: db1, db2\n"
                  "apart = web: web1,web2*\n"
                  "apart = web: web3\n"
                  "require-tag = db1: ssd, rack-7\n"
                  "forbid-tag = web*: slow\n"
                  "vm-priority = web*: 5\n"
                  "vm-priority = web1 : 10\n"
                  "directory = etcd:http://d1:2379\n"
                  "throttle = no", &c, &err);
    assert_string_equal(err.message, "");
    assert_int_equal(rc, 0);
    assert_string_equal(c.listen, "0.0.0.0:7007");
    assert_string_equal(c.name, "hostA");
    assert_int_equal(c.n_emulators, 1);
    assert_string_equal(c.emulators[0].to, "/opt/qemu/bin/q");
    assert_int_equal(c.n_paths, 2);
    assert_string_equal(c.paths[0].from, "/run/vm-a");
    assert_string_equal(c.paths[1].from, "/srv/img#1");
    assert_string_equal(c.paths[1].to, "/mnt/img");
    assert_int_equal(c.n_taps, 1);
    assert_string_equal(c.taps[0].to, "vnet3");
    assert_int_equal(c.memory_reserve_bytes, 512u << 20);
    assert_int_equal(c.bandwidth_bytes_per_s, 125000000);
    assert_int_equal(c.max_downtime_ms, 45);
    assert_int_equal(c.channels, 2);
    assert_string_equal(c.compress, "zstd:3");
    assert_false(c.throttle);
    assert_string_equal(c.witness, "etcd:http://w1:2379,http://w2:2379");
    assert_string_equal(c.backup, "hostB, hostC");
    assert_int_equal(c.lease_ms, 300);
    assert_string_equal(c.checkpoint_dir, "/srv/lifeboat");
    assert_string_equal(c.checkpoint_key, "/etc/lifeboat/ckpt.key");
    assert_int_equal(c.checkpoint_level, -5);
    assert_string_equal(c.tags[0], "ssd");
    assert_string_equal(c.tags[1], "rack-7");
    assert_null(c.tags[2]);
    assert_int_equal(c.link_bytes_per_s, 1250000000);
    assert_int_equal(c.together.n, 1);
    assert_string_equal(c.together.v[0].name, "db");
    assert_string_equal(c.together.v[0].items[1], "db2");
    assert_null(c.together.v[0].items[2]);
    assert_int_equal(c.apart.n, 1); /* two lines of one group */
    assert_string_equal(c.apart.v[0].items[1], "web2*");
    assert_string_equal(c.apart.v[0].items[2], "web3");
    assert_string_equal(c.require_tags.v[0].name, "db1");
    assert_string_equal(c.require_tags.v[0].items[1], "rack-7");
    assert_string_equal(c.forbid_tags.v[0].items[0], "slow");
    assert_int_equal(lb_config_priority(&c, "web1"), 10); /* its name before a pattern that comes first */
    assert_int_equal(lb_config_priority(&c, "web9"), 5);
    assert_int_equal(lb_config_priority(&c, "db1"), 0);
    assert_string_equal(lb_config_directory(&c), "etcd:http://d1:2379");
    lb_config_free(&c);
    assert_null(c.paths);
    assert_null(c.apart.v);
    lb_config_free(&c);
    lb_config_free(NULL);
}

static void test_defaults(void **s)
{
    (void)s;
    struct lb_host_config c;
    assert_int_equal(lb_config_load(NULL, &c, NULL), 0);
    assert_string_equal(c.listen, ":7007");
    assert_true(c.name[0] != '\0');
    assert_int_equal(c.max_downtime_ms, 300);
    assert_string_equal(c.compress, "auto");
    assert_true(c.throttle);
    assert_int_equal(c.bandwidth_bytes_per_s, 0);
    assert_int_equal(c.memory_reserve_bytes, 256u << 20);
    assert_string_equal(c.checkpoint_dir, "");
    assert_string_equal(c.checkpoint_key, "");
    assert_int_equal(c.checkpoint_level, 0);
    lb_config_free(&c);
    assert_null(lb_config_directory(&c));
    assert_int_equal(load("witness = etcd:http://w1:2379\n", &c, NULL), 0);
    assert_string_equal(lb_config_directory(&c), "etcd:http://w1:2379");
    lb_config_free(&c);
    assert_int_equal(load("witness = manual\n", &c, NULL), 0);
    assert_null(lb_config_directory(&c));
    lb_config_free(&c);
    assert_int_equal(load("", &c, NULL), 0);
    assert_int_equal(c.channels, 0);
    lb_config_free(&c);
}

static void test_mistakes(void **s)
{
    (void)s;
    static const struct {
        const char *text, *line, *say;
    } bad[] = {
        {"nonsense\n", ":1:", "key = value"},
        {"name = a\nspeed = 9\n", ":2:", "unknown key \"speed\""},
        {"name = a\nname = b\n", ":2:", "given twice"},
        {"\n\nlisten =\n", ":3:", "no value"},
        {"listen = host:99999\n", ":1:", "listen"},
        {"name = a b\n", ":1:", "blanks"},
        {"path = /a /b\n", ":1:", "FROM -> TO"},
        {"path = /a ->\n", ":1:", "empty"},
        {"path = -> /a\n", ":1:", "empty"},
        {"path = a -> /b\n", ":1:", "absolute"},
        {"path = /a -> /b -> /c\n", ":1:", "more than one"},
        {"path = /a -> /b\npath = /a -> /c\n", ":2:", "already mapped"},
        {"emulator = qemu -> /b\n", ":1:", "absolute"},
        {"tap = tap0 -> abcdefghijklmnop\n", ":1:", "15 characters"},
        {"memory-reserve = lots\n", ":1:", "size"},
        {"bandwidth = fast\n", ":1:", "rate"},
        {"max-downtime = 0ms\n", ":1:", "max-downtime"},
        {"max-downtime = 30\n", ":1:", "duration"},
        {"channels = 0\n", ":1:", "channels"},
        {"channels = 65\n", ":1:", "channels"},
        {"compress = gzip\n", ":1:", "compress"},
        {"compress = zstd:20\n", ":1:", "compress"},
        {"throttle = maybe\n", ":1:", "throttle"},
        {"witness = w1:2379\n", ":1:", "no witness"},
        {"witness = etcd:\n", ":1:", "no witness"},
        {"witness = fence:\n", ":1:", "no witness"},
        {"tag = a b\n", ":1:", "not a name"},
        {"link = 0\n", ":1:", "carries nothing"},
        {"link = fast\n", ":1:", "rate"},
        {"together = db1, db2\n", ":1:", "NAME: VALUE"},
        {"together = db:\n", ":1:", "nothing follows"},
        {"together = : db1\n", ":1:", "not a name"},
        {"apart = web: web1,,web2\n", ":1:", "not a name"},
        {"require-tag = db1: a:b\n", ":1:", "not a name"},
        {"forbid-tag = db1\n", ":1:", "NAME: VALUE"},
        {"vm-priority = web1: high\n", ":1:", "priority"},
        {"vm-priority = web1: -1\n", ":1:", "priority"},
        {"vm-priority = web1: 1\nvm-priority = web1: 2\n", ":2:", "already"},
        {"directory = manual\n", ":1:", "no directory"},
        {"directory = etcd:\n", ":1:", "no directory"},
        {"lease = 49ms\n", ":1:", "lease is from 50ms"},
        {"lease = 61s\n", ":1:", "lease is from 50ms"},
        {"checkpoint-dir = ckpt\n", ":1:", "not an absolute path"},
        {"checkpoint-key = key\n", ":1:", "not an absolute path"},
        {"checkpoint-level = 0\n", ":1:", "checkpoint-level is"},
        {"checkpoint-level = 20\n", ":1:", "checkpoint-level is"},
        {"checkpoint-level = 3x\n", ":1:", "checkpoint-level is"},
    };
    for (size_t i = 0; i < LB_ARRAY_LEN(bad); i++) {
        struct lb_host_config c = {.channels = 77};
        struct lb_error err = LB_ERROR_INIT;
        assert_int_equal(load(bad[i].text, &c, &err), -1);
        assert_int_equal(err.code, LB_E_USAGE);
        if (!strstr(err.message, bad[i].line) || !strstr(err.message, bad[i].say) ||
            !strstr(err.message, file))
            fail_msg("\"%s\" said: %s", bad[i].text, err.message);
        assert_int_equal(c.channels, 77); /* untouched */
    }
}

static void test_files(void **s)
{
    (void)s;
    struct lb_host_config c;
    struct lb_error err = LB_ERROR_INIT;
    assert_int_equal(lb_config_load("/nonexistent/lifeboatd.conf", &c, &err), -1);
    assert_int_equal(err.code, LB_E_NOT_FOUND);
    assert_true(err.remedy[0] != '\0');
    assert_int_equal(lb_file_write_atomic(file, "name = a\0b\n", 11, 0600, NULL), 0);
    assert_int_equal(lb_config_load(file, &c, &err), -1);
    assert_non_null(strstr(err.message, "not a text file"));
}

static void test_map(void **s)
{
    (void)s;
    struct lb_path_map maps[] = {
        {(char *)"/run/vm-a", (char *)"/run/vm-b"},
        {(char *)"/run/vm-a/deep", (char *)"/deep/"},
        {(char *)"/img/", (char *)"/mnt/img"},
        {(char *)"/gone", (char *)"/"},
    };
    static const char *const cases[][2] = {
        {"/run/vm-a", "/run/vm-b"},
        {"/run/vm-a/qmp.sock", "/run/vm-b/qmp.sock"},
        {"/run/vm-ab/qmp.sock", "/run/vm-ab/qmp.sock"},
        {"/run/vm-a/deep/x", "/deep/x"},
        {"/run/vm-a/deeper/x", "/run/vm-b/deeper/x"},
        {"/img/disk.qcow2", "/mnt/img/disk.qcow2"},
        {"/imgx", "/imgx"},
        {"/gone/x", "/x"},
        {"relative", "relative"},
        {"", ""},
    };
    for (size_t i = 0; i < LB_ARRAY_LEN(cases); i++) {
        char *got = lb_map_path(maps, LB_ARRAY_LEN(maps), cases[i][0]);
        assert_string_equal(got, cases[i][1]);
        free(got);
    }
    struct lb_path_map root = {(char *)"/", (char *)"/newroot"};
    char *got = lb_map_path(&root, 1, "/etc/x");
    assert_string_equal(got, "/newroot/etc/x");
    free(got);
    struct lb_path_map tap = {(char *)"tap0", (char *)"vnet3"};
    assert_string_equal(lb_map_name(&tap, 1, "tap0"), "vnet3");
    assert_string_equal(lb_map_name(&tap, 1, "tap01"), "tap01");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_all_keys), cmocka_unit_test(test_defaults),
        cmocka_unit_test(test_mistakes), cmocka_unit_test(test_files), cmocka_unit_test(test_map),
    };
    return cmocka_run_group_tests_name("config", tests, setup, teardown);
}
