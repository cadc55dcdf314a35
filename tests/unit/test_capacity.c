/* What hosts say of themselves, put together: names, groups, refusals, kept memory, processors; what cannot be believed. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <string.h>

#include "migrate/capacity.h"
#include "migrate/plan.h"

#define KEY(c) "lb1" c c c c c c c c c c c c c c c c c c c c c c c c c c c c c c c c
#define KEY_A KEY("aa")
#define KEY_B KEY("bb")
#define KEY_C KEY("cc")
#define GIB (UINT64_C(1) << 30)

static struct lb_host_config cfg;
static struct lb_survey_vm vms[4];
static struct lb_peer peers[2];
static struct lb_merge m;
static struct lb_inventory inv;

static json_t *fragment(const char *text)
{
    json_t *o = json_loads(text, 0, NULL);

    assert_non_null(o);
    return o;
}

#define HOST(mem) "\"host\":{\"name\":\"x\",\"memory_bytes\":" mem ",\"reserved_bytes\":1024,\"used_bytes\":4096,\"cpus\":2," \
                  "\"cpu\":\"GenuineIntel\",\"features\":[\"CPUID.7.0.EBX:0x00000003\",\"CPUID.1.0.ECX:0x0000000f\"]," \
                  "\"tags\":[\"ssd\"],\"maintenance\":false}"

static void add_peer(const char *name, const char *key, json_t *said)
{
    struct lb_peer *p = &peers[m.n_peers++];

    memset(p, 0, sizeof(*p));
    snprintf(p->host.name, sizeof(p->host.name), "%s", name);
    snprintf(p->key, sizeof(p->key), "%s", key);
    p->fragment = said;
    p->link_bytes_per_s = 100000000;
}

static struct lb_survey_vm *add_vm(const char *name)
{
    struct lb_survey_vm *v = &vms[m.n_vms++];

    memset(v, 0, sizeof(*v));
    snprintf(v->name, sizeof(v->name), "%s", name);
    v->memory_bytes = GIB;
    v->touched_bytes = GIB / 4;
    v->dirty_bytes_per_s = 1000;
    return v;
}

static int setup(void **state)
{
    (void)state;
    assert_int_equal(lb_config_load(NULL, &cfg, NULL), 0);
    memset(&m, 0, sizeof(m));
    m = (struct lb_merge){.cfg = &cfg, .self = "a", .vms = vms, .peers = peers, .setup_s = 0.5, .downtime_ms = 20};
    m.fragment = fragment("{\"key\":\"" KEY_A "\"," HOST("17179869184") ",\"vms\":[],\"kept\":[]}");
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    lb_inventory_free(&inv);
    for (unsigned i = 0; i < m.n_peers; i++)
        lb_peer_free(&peers[i]);
    for (unsigned i = 0; i < m.n_vms; i++) {
        lb_vm_desc_free(&vms[i].desc);
        lb_report_free(&vms[i].blockers);
    }
    json_decref(m.fragment);
    lb_config_free(&cfg);
    return 0;
}

static void merge(void)
{
    struct lb_error err = LB_ERROR_INIT;

    if (lb_capacity_merge(&m, &inv, &err))
        fail_msg("%s", err.message);
}

static const struct lb_inv_vm *vm_named(const char *name)
{
    for (uint32_t i = 0; i < inv.n_vms; i++)
        if (!strcmp(inv.vms[i].name, name))
            return &inv.vms[i];
    fail_msg("no VM %s", name);
    return NULL;
}

static bool has_word(const struct lb_inv_set *s, const char *word)
{
    for (uint32_t i = 0; i < s->n; i++)
        if (!strcmp(inv.words[s->ids[i]], word))
            return true;
    return false;
}

static void two_hosts(void **state)
{
    (void)state;
    add_vm("web1");
    add_peer("b", KEY_B, fragment("{\"key\":\"" KEY_B "\"," HOST("8589934592") ",\"vms\":[{\"name\":\"web1\",\"memory_bytes\":"
                                  "1000,\"touched_bytes\":300,\"together\":[\"g\"],\"apart\":[],\"priority\":3}],\"kept\":[]}"));
    merge();
    assert_int_equal(inv.n_hosts, 2);
    assert_string_equal(inv.hosts[0].name, "a");
    assert_string_equal(inv.hosts[1].name, "b");
    assert_int_equal(inv.hosts[1].memory_bytes, 8 * GIB);
    assert_int_equal(inv.hosts[1].used_bytes, 4096);
    assert_int_equal(inv.hosts[1].link_bytes_per_s, 100000000);
    assert_int_equal(inv.hosts[0].link_bytes_per_s, 100000000); /* the best that was measured */
    assert_int_equal(inv.evacuate.n, 1);
    assert_int_equal(inv.evacuate.ids[0], 0);
    assert_int_equal(vm_named("web1")->host, 0);
    assert_int_equal(vm_named("web1")->dirty_bytes_per_s, 1000);
    assert_int_equal(vm_named("web1 (b)")->host, 1); /* another VM of the same name */
    assert_int_equal(vm_named("web1 (b)")->priority, 3);
    assert_int_equal(vm_named("web1 (b)")->touched_bytes, 300);
    assert_true(has_word(&vm_named("web1 (b)")->together, "g"));
    assert_true(inv.setup_s == 0.5);
}

/* The own link: what it carried to all at once; as configured; no more than is allowed. */
static void links(void **state)
{
    (void)state;
    add_peer("b", KEY_B, fragment("{\"key\":\"" KEY_B "\"," HOST("8589934592") ",\"vms\":[],\"kept\":[]}"));
    m.own_link_bytes_per_s = 180000000;
    merge();
    assert_int_equal(inv.hosts[0].link_bytes_per_s, 180000000);
    lb_inventory_free(&inv);
    m.own_link_bytes_per_s = 80000000; /* disturbed: it did carry more */
    merge();
    assert_int_equal(inv.hosts[0].link_bytes_per_s, 100000000);
    lb_inventory_free(&inv);
    json_object_set_new(json_object_get(m.fragment, "host"), "link_bytes_per_s", json_integer(7000000));
    merge();
    assert_int_equal(inv.hosts[0].link_bytes_per_s, 7000000);
    lb_inventory_free(&inv);
    m.bandwidth_bytes_per_s = 5000000;
    merge();
    assert_int_equal(inv.hosts[0].link_bytes_per_s, 5000000);
    assert_int_equal(inv.hosts[1].link_bytes_per_s, 5000000);
}

static char *items(const char *list)
{
    return (char *)list;
}

/* This host's rules count for VMs of others, too. */
static void rules(void **state)
{
    static char *web[] = {NULL, NULL}, *ssd[] = {NULL, NULL}, *slow[] = {NULL, NULL};
    struct lb_vm_rule apart = {items("web"), web, 0}, require = {items("db*"), ssd, 0}, forbid = {items("web1"), slow, 0},
                      prio = {items("db*"), NULL, 7};
    json_t *wish = json_pack("{s:i, s:i}", "db*", 9, "db2", 11);

    (void)state;
    web[0] = items("web*");
    ssd[0] = items("ssd");
    slow[0] = items("slow");
    cfg.apart = (struct lb_vm_rules){&apart, 1};
    cfg.require_tags = (struct lb_vm_rules){&require, 1};
    cfg.forbid_tags = (struct lb_vm_rules){&forbid, 1};
    cfg.priorities = (struct lb_vm_rules){&prio, 1};
    add_vm("web1");
    add_vm("db1");
    add_vm("db2");
    add_peer("b", KEY_B, fragment("{\"key\":\"" KEY_B "\"," HOST("8589934592") ",\"vms\":[{\"name\":\"web2\",\"memory_bytes\":"
                                  "1000}],\"kept\":[]}"));
    merge();
    assert_true(has_word(&vm_named("web1")->apart, "web"));
    assert_true(has_word(&vm_named("web2")->apart, "web"));
    assert_true(has_word(&vm_named("web1")->forbid_tags, "slow"));
    assert_true(has_word(&vm_named("db1")->require_tags, "ssd"));
    assert_int_equal(vm_named("web1")->require_tags.n, 0);
    assert_int_equal(vm_named("db1")->priority, 7);
    lb_inventory_free(&inv);
    m.priorities = wish; /* of the request: before the configuration's, its own name before a pattern */
    merge();
    assert_int_equal(vm_named("db1")->priority, 9);
    assert_int_equal(vm_named("db2")->priority, 11);
    json_decref(wish);
    cfg.apart = cfg.require_tags = cfg.forbid_tags = cfg.priorities = (struct lb_vm_rules){0};
}

static void refused_and_excluded(void **state)
{
    static char *const excluded[] = {(char *)"web2\tc", (char *)"web\tb"};
    struct lb_refused *r = lb_alloc(sizeof(*r));
    const char *remedy;
    struct lb_plan_opts o = {0};
    struct lb_plan plan;

    (void)state;
    add_vm("web1");
    add_vm("web2");
    add_peer("b", KEY_B, fragment("{\"key\":\"" KEY_B "\"," HOST("8589934592") ",\"vms\":[],\"kept\":[]}"));
    add_peer("c", KEY_C, fragment("{\"key\":\"" KEY_C "\"," HOST("8589934592") ",\"vms\":[],\"kept\":[]}"));
    *r = (struct lb_refused){lb_strdup("web1"), lb_strdup("disk x is missing"), lb_strdup("copy it")};
    peers[0].refused = r;
    peers[0].n_refused = 1;
    m.excluded = excluded;
    m.n_excluded = 2;
    merge();
    assert_string_equal(lb_merge_refusal(&m, "web1", "b", &remedy), "disk x is missing");
    assert_string_equal(remedy, "copy it");
    assert_non_null(lb_merge_refusal(&m, "web2", "c", &remedy));
    assert_null(lb_merge_refusal(&m, "web2", "b", &remedy));
    o.evacuate = inv.evacuate;
    assert_int_equal(lb_plan_make(&inv, &o, &plan, NULL), 0);
    assert_int_equal(plan.n_steps, 2);
    for (uint32_t i = 0; i < plan.n_steps; i++) /* each goes to the only host that is left to it */
        assert_string_equal(inv.hosts[plan.steps[i].to].name, strcmp(inv.vms[plan.steps[i].vm].name, "web1") ? "b" : "c");
    lb_plan_free(&plan);
}

/* Backups by keys, standbys that are counted once, memory kept for who is not there. */
static void backups(void **state)
{
    (void)state;
    snprintf(add_vm("db1")->backup, sizeof(vms[0].backup), "b");
    snprintf(add_vm("db2")->backup, sizeof(vms[0].backup), "gone");
    add_peer("b", KEY_B,
             fragment("{\"key\":\"" KEY_B "\"," HOST("8589934592") ",\"vms\":[{\"name\":\"mail\",\"memory_bytes\":1000,\"backup\":\"" KEY_A
                      "\"},{\"name\":\"log\",\"memory_bytes\":1000,\"backup\":\"" KEY_C "\"}],\"kept\":["
                      "{\"name\":\"db1\",\"memory_bytes\":1073741824,\"of\":\"" KEY_A "\"},"
                      "{\"name\":\"db\",\"memory_bytes\":7,\"of\":\"" KEY_A "\"},"
                      "{\"name\":\"far\",\"memory_bytes\":500,\"of\":\"\"},{\"name\":\"farther\",\"memory_bytes\":70,\"of\":\"" KEY_C
                      "\"}]}"));
    merge();
    assert_int_equal(vm_named("db1")->backup, 1);
    assert_int_equal(vm_named("db2")->backup, LB_INV_NONE);
    assert_int_equal(vm_named("mail")->backup, 0);
    assert_int_equal(vm_named("log")->backup, LB_INV_NONE);
    assert_int_equal(inv.hosts[1].used_bytes, 4096 + 7 + 500 + 70);
}

static char **strv(const char *a, const char *b)
{
    char **v = lb_alloc(3 * sizeof(*v));

    v[0] = lb_strdup(a);
    v[1] = lb_strdup(b);
    return v;
}

/* A bit counts when the guest sees it, its host has it, and some host lacks it. */
static void processors(void **state)
{
    struct lb_survey_vm *kvm = add_vm("k"), *tcg = add_vm("t");

    (void)state;
    kvm->described = tcg->described = true;
    kvm->desc.accel = lb_strdup("kvm");
    tcg->desc.accel = lb_strdup("tcg");
    /* bit 31: made up by KVM; bit 2 of EBX: the host has it not */
    kvm->desc.features = strv("CPUID.7.0.EBX:0x00000007", "CPUID.1.0.ECX:0x80000003");
    tcg->desc.features = strv("CPUID.7.0.EBX:0xffffffff", "CPUID.1.0.ECX:0xffffffff");
    add_peer("b", KEY_B, fragment("{\"key\":\"" KEY_B "\",\"host\":{\"memory_bytes\":8589934592,\"cpu\":\"GenuineIntel\",\"features\":["
                                  "\"CPUID.7.0.EBX:0x00000001\",\"CPUID.1.0.ECX:0x0000000f\"]},\"vms\":[],\"kept\":[]}"));
    merge();
    assert_int_equal(vm_named("k")->features.n, 1);
    assert_true(has_word(&vm_named("k")->features, "CPUID.7.0.EBX bit 1"));
    assert_string_equal(vm_named("k")->cpu, "GenuineIntel");
    assert_int_equal(vm_named("t")->features.n, 0);
    assert_null(vm_named("t")->cpu);
    assert_true(has_word(&inv.hosts[0].features, "CPUID.7.0.EBX bit 1"));
    assert_int_equal(inv.hosts[1].features.n, 0);
}

static void blockers_stay(void **state)
{
    struct lb_survey_vm *v = add_vm("pt");

    (void)state;
    lb_report_add(&v->blockers, "passthrough", LB_CHECK_FAIL, "unplug it", "it has a card of the host");
    add_peer("b", KEY_B, fragment("{\"key\":\"" KEY_B "\"," HOST("8589934592") ",\"vms\":[],\"kept\":[]}"));
    merge();
    assert_int_equal(vm_named("pt")->n_blockers, 1);
    assert_string_equal(vm_named("pt")->blockers[0].remedy, "unplug it");
}

/* A peer that talks nonsense is not used, the others are. */
static void nonsense(void **state)
{
    static const char *const bad[] = {
        "{\"key\":\"" KEY_B "\"}",
        "{\"key\":\"" KEY_B "\",\"host\":7,\"vms\":[]}",
        "{\"key\":\"" KEY_B "\",\"host\":{\"memory_bytes\":-5},\"vms\":[]}",
        "{\"key\":\"" KEY_C "\"," HOST("8589934592") ",\"vms\":[]}",
        "{\"key\":\"" KEY_B "\"," HOST("8589934592") ",\"vms\":[{\"memory_bytes\":5}]}",
        "{\"key\":\"" KEY_B "\"," HOST("8589934592") ",\"vms\":[{\"name\":\"x\"}]}",
        "{\"key\":\"" KEY_B "\"," HOST("8589934592") ",\"vms\":[7]}",
        "{\"key\":\"" KEY_B "\"," HOST("8589934592") ",\"vms\":[{\"name\":\"x\",\"memory_bytes\":5,\"priority\":\"y\"}]}",
        "{\"key\":\"" KEY_B "\"," HOST("8589934592") ",\"vms\":[{\"name\":\"x\",\"memory_bytes\":5},{\"name\":\"x\",\"memory_bytes\":5}]}",
        "[]",
    };

    (void)state;
    add_vm("web1");
    for (unsigned i = 0; i < LB_ARRAY_LEN(bad); i++) {
        m.n_peers = 0;
        add_peer("b", KEY_B, fragment(bad[i]));
        add_peer("c", KEY_C, fragment("{\"key\":\"" KEY_C "\"," HOST("8589934592") ",\"vms\":[],\"kept\":[]}"));
        merge();
        assert_int_equal(inv.n_hosts, 2);
        assert_string_equal(inv.hosts[1].name, "c");
        assert_null(peers[0].fragment);
        assert_true(peers[0].error.code != LB_OK && peers[0].error.remedy[0]);
        lb_inventory_free(&inv);
        lb_peer_free(&peers[0]);
        lb_peer_free(&peers[1]);
    }
    m.n_peers = 0;
}

static void memory_of_command_lines(void **state)
{
    static const struct {
        const char *value;
        uint64_t mib;
    } cases[] = {{"512", 512}, {"1G", 1024}, {"size=2G,slots=4,maxmem=8G", 2048}, {"slots=4,size=64M", 64}, {"96,maxmem=1G", 96},
                 {"nonsense", 128}};

    (void)state;
    for (unsigned i = 0; i < LB_ARRAY_LEN(cases); i++) {
        char *argv[] = {(char *)"qemu", (char *)"-m", (char *)cases[i].value, (char *)"-nodefaults", NULL};

        assert_int_equal(lb_capacity_ram_of(argv), cases[i].mib << 20);
    }
    char *none[] = {(char *)"qemu", (char *)"-m", NULL};
    assert_int_equal(lb_capacity_ram_of(none), UINT64_C(128) << 20);
}

static void medians(void **state)
{
    char dir[] = "/tmp/lb-medians-XXXXXX";
    double setup_s = 0.35, downtime_ms = 30;

    (void)state;
    assert_non_null(mkdtemp(dir));
    LB_AUTO_FREE char *path = lb_asprintf("%s/history.jsonl", dir);
    lb_migration_medians(dir, &setup_s, &downtime_ms);
    assert_true(setup_s == 0.35 && downtime_ms == 30);
    assert_int_equal(lb_file_append_line(path, "{\"direction\":\"out\",\"ok\":true,\"started_ms\":5000,\"setup_ms\":200,\"load_ms\":10,\"downtime_ms\":12}",
                                         NULL), 0);
    lb_migration_medians(dir, &setup_s, &downtime_ms);
    assert_true(setup_s == 0.21 && downtime_ms == 12);
    for (int i = 0; i < 19; i++) {
        LB_AUTO_FREE char *line = lb_asprintf("{\"direction\":\"out\",\"ok\":true,\"started_ms\":%d,\"setup_ms\":%d,\"downtime_ms\":%d}",
                                               10000 * (i + 1), 300 + i, 20 + i);

        assert_int_equal(lb_file_append_line(path, "{\"direction\":\"in\",\"ok\":true,\"total_ms\":5}", NULL), 0);
        assert_int_equal(lb_file_append_line(path, "{\"direction\":\"out\",\"ok\":false,\"setup_ms\":1,\"downtime_ms\":1}", NULL), 0);
        assert_int_equal(lb_file_append_line(path, line, NULL), 0);
    }
    lb_migration_medians(dir, &setup_s, &downtime_ms); /* 210, 300..318 */
    assert_true(setup_s > 0.3084 && setup_s < 0.3086);
    assert_true(downtime_ms == 28.5);

    /* many at once share the processors: it is the time of one of these that is wanted */
    double cpus = (double)sysconf(_SC_NPROCESSORS_ONLN), k;
    for (int i = 0; i < 20; i++)
        assert_int_equal(lb_file_append_line(path, "{\"direction\":\"out\",\"ok\":true,\"started_ms\":900000,\"setup_ms\":4000,"
                                                   "\"downtime_ms\":7}", NULL), 0);
    lb_migration_medians(dir, &setup_s, &downtime_ms);
    k = 20 > cpus ? 4.0 * cpus / 20 : 4.0;
    assert_true(setup_s > k - 1e-6 && setup_s < k + 1e-6);
    lb_remove_tree(dir, NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(two_hosts, setup, teardown),
        cmocka_unit_test_setup_teardown(links, setup, teardown),
        cmocka_unit_test_setup_teardown(rules, setup, teardown),
        cmocka_unit_test_setup_teardown(refused_and_excluded, setup, teardown),
        cmocka_unit_test_setup_teardown(backups, setup, teardown),
        cmocka_unit_test_setup_teardown(processors, setup, teardown),
        cmocka_unit_test_setup_teardown(blockers_stay, setup, teardown),
        cmocka_unit_test_setup_teardown(nonsense, setup, teardown),
        cmocka_unit_test(memory_of_command_lines),
        cmocka_unit_test(medians),
    };

    return cmocka_run_group_tests_name("capacity", tests, NULL, NULL);
}
