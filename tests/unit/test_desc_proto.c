/* VM descriptions on the wire: a round trip through bytes, every limit from both
 * sides, and damaged messages. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <string.h>

#include "netproto/desc_proto.h"

static char **strv(const char *const *v)
{
    size_t n = 0;
    while (v[n])
        n++;
    char **out = lb_alloc((n + 1) * sizeof(*out));
    for (size_t i = 0; i < n; i++)
        out[i] = lb_strdup(v[i]);
    return out;
}

static struct lb_vm_desc sample(void)
{
    struct lb_vm_desc d = {
        .name = lb_strdup("web1"),
        .hypervisor = lb_strdup("qemu"),
        .hv_version = lb_strdup("7.2.22"),
        .emulator = lb_strdup("/usr/bin/qemu-system-x86_64"),
        .argv = strv((const char *const[]){"qemu-system-x86_64", "-m", "1G", "-append",
                                           "quiet name=Jörg €", "", NULL}),
        .cwd = lb_strdup("/root"),
        .uid = 1000,
        .gid = 64055,
        .machine = lb_strdup("pc-i440fx-7.2"),
        .accel = lb_strdup("tcg"),
        .cpu_model = lb_strdup("max-x86_64-cpu"),
        .vcpus = 2,
        .ram_bytes = UINT64_C(5) << 30,
        .uuid = NULL,
        .n_disks = 2,
        .features = strv((const char *const[]){"avx", "sse2", NULL}),
        .blockers = strv((const char *const[]){NULL}),
        .kernel_release = lb_strdup("6.1.0"),
    };
    d.disks = lb_alloc(2 * sizeof(*d.disks));
    d.disks[0] = (struct lb_disk_desc){lb_strdup("d0"), lb_strdup("/srv/a.qcow2"),
                                       lb_strdup("qcow2"), false, true, lb_strdup("/srv/old.img"), false};
    d.disks[1] = (struct lb_disk_desc){lb_strdup("d1"), lb_strdup("/srv/b.iso"), NULL, true, false, NULL, true};
    return d;
}

/* Through real bytes, so that what is tested is what travels. */
static Lb__VmDescription *wire(const struct lb_vm_desc *d, uint8_t **bytes, size_t *len)
{
    Lb__VmDescription *p;
    struct lb_error err = LB_ERROR_INIT;
    if (lb_desc_to_proto(d, &p, &err) < 0)
        fail_msg("%s", err.message);
    *len = lb__vm_description__get_packed_size(p);
    *bytes = lb_alloc(*len);
    assert_int_equal(lb__vm_description__pack(p, *bytes), *len);
    lb__vm_description__free_unpacked(p, NULL);
    p = lb__vm_description__unpack(NULL, *len, *bytes);
    assert_non_null(p);
    return p;
}

static void same_list(char *const *a, char *const *b)
{
    size_t i;
    for (i = 0; a[i] && b[i]; i++)
        assert_string_equal(a[i], b[i]);
    assert_null(a[i]);
    assert_null(b[i]);
}

static void test_round_trip(void **s)
{
    (void)s;
    struct lb_vm_desc d = sample(), back;
    uint8_t *bytes;
    size_t len;
    Lb__VmDescription *p = wire(&d, &bytes, &len);
    assert_int_equal(lb_desc_from_proto(p, &back, NULL), 0);
    lb__vm_description__free_unpacked(p, NULL);
    assert_string_equal(back.name, d.name);
    assert_string_equal(back.hypervisor, d.hypervisor);
    assert_string_equal(back.hv_version, d.hv_version);
    assert_string_equal(back.emulator, d.emulator);
    same_list(back.argv, d.argv);
    assert_string_equal(back.cwd, d.cwd);
    assert_int_equal(back.uid, d.uid);
    assert_int_equal(back.gid, d.gid);
    assert_string_equal(back.machine, d.machine);
    assert_string_equal(back.accel, d.accel);
    assert_string_equal(back.cpu_model, d.cpu_model);
    assert_int_equal(back.vcpus, d.vcpus);
    assert_int_equal(back.ram_bytes, d.ram_bytes);
    assert_string_equal(back.uuid, ""); /* NULL travels as "" */
    assert_int_equal(back.n_disks, 2);
    assert_string_equal(back.disks[0].id, "d0");
    assert_string_equal(back.disks[0].path, "/srv/a.qcow2");
    assert_string_equal(back.disks[0].format, "qcow2");
    assert_false(back.disks[0].read_only);
    assert_true(back.disks[0].shareable);
    assert_string_equal(back.disks[0].argv_path, "/srv/old.img");
    assert_true(!back.disks[0].backing && back.disks[1].backing);
    assert_string_equal(back.disks[0].argv_path, "/srv/old.img");
    assert_true(back.disks[1].read_only);
    assert_string_equal(back.disks[1].format, "");
    same_list(back.features, d.features);
    same_list(back.blockers, d.blockers);
    assert_string_equal(back.kernel_release, d.kernel_release);
    lb_vm_desc_free(&back);
    lb_vm_desc_free(&d);
    free(bytes);
}

static void set(char **field, const char *text)
{
    free(*field);
    *field = lb_strdup(text);
}

static char *filled(size_t n)
{
    char *s = lb_alloc(n + 1);
    memset(s, 'x', n);
    return s;
}

/* Break one thing of a good message as a hostile peer would. */
static void damage(Lb__VmDescription *p, unsigned what)
{
    char *big;
    switch (what) {
    case 0: set(&p->name, "../../etc"); break;
    case 1: set(&p->name, ""); break;
    case 2: set(&p->name, "a\nb"); break;
    case 3: big = filled(64); set(&p->name, big); free(big); break;
    case 4: set(&p->emulator, "qemu"); break;
    case 5: set(&p->emulator, "/bin/q\x1b[2J"); break;
    case 6: set(&p->cwd, "root"); break;
    case 7: set(&p->machine, ""); break;
    case 8: set(&p->machine, "pc\x7f"); break;
    case 9: p->vcpus = 0; break;
    case 10: p->vcpus = 100000; break;
    case 11: p->ram_bytes = 0; break;
    case 12: p->ram_bytes = UINT64_MAX & ~UINT64_C(4095); break;
    case 13: p->ram_bytes += 1; break;
    case 14: p->uid = UINT32_MAX; break;
    case 15: p->gid = UINT32_MAX; break;
    case 16: set(&p->argv[0], ""); break;
    case 17: big = filled(LB_DESC_MAX_ARG_BYTES + 1); set(&p->argv[1], big); free(big); break;
    case 18: set(&p->argv[1], "a\x01"); break;
    case 19: set(&p->argv[1], "\xff\xfe"); break;         /* not UTF-8 */
    case 20: set(&p->argv[1], "\xc0\xaf"); break;         /* overlong '/' */
    case 21: set(&p->argv[1], "\xed\xa0\x80"); break;     /* surrogate */
    case 22: set(&p->argv[1], "a\xc2\x9b" "b"); break;    /* C1 control */
    case 23: set(&p->argv[1], "cut \xe2\x82"); break;
    case 24: big = filled(4097); set(&p->disks[0]->path, big); free(big); break;
    case 25: set(&p->disks[1]->id, "\t"); break;
    case 26: big = filled(129); set(&p->features[0], big); free(big); break;
    case 27: set(&p->hypervisor, ""); break;
    case 28: p->uuid = lb_strdup("\r"); break; /* was the library's constant "" */
    case 29: set(&p->argv[1], "\xf4\x90\x80\x80"); break; /* above U+10FFFF */
    }
}

static void test_refusals(void **s)
{
    (void)s;
    for (unsigned what = 0; what < 30; what++) {
        struct lb_vm_desc d = sample(), back = {.vcpus = 77};
        struct lb_error err = LB_ERROR_INIT;
        uint8_t *bytes;
        size_t len;
        Lb__VmDescription *p = wire(&d, &bytes, &len);
        damage(p, what);
        if (lb_desc_from_proto(p, &back, &err) == 0)
            fail_msg("damage %u was accepted", what);
        assert_int_equal(err.code, LB_E_PROTO);
        assert_int_equal(back.vcpus, 77);
        lb__vm_description__free_unpacked(p, NULL);
        lb_vm_desc_free(&d);
        free(bytes);
    }
    struct lb_vm_desc back;
    assert_int_equal(lb_desc_from_proto(NULL, &back, NULL), -1);
}

static void grow(char ***v, size_t *n, size_t to, const char *text)
{
    *v = lb_realloc(*v, to * sizeof(**v));
    for (; *n < to; ++*n)
        (*v)[*n] = lb_strdup(text);
}

static int decode(Lb__VmDescription *p)
{
    struct lb_vm_desc back;
    int rc = lb_desc_from_proto(p, &back, NULL);
    if (rc == 0)
        lb_vm_desc_free(&back);
    return rc;
}

/* At the limit it passes, one above it does not. */
static void test_counts(void **s)
{
    (void)s;
    struct lb_vm_desc d = sample();
    uint8_t *bytes;
    size_t len;
    Lb__VmDescription *p = wire(&d, &bytes, &len);
    grow(&p->argv, &p->n_argv, LB_DESC_MAX_ARGS, "-S");
    assert_int_equal(decode(p), 0);
    grow(&p->argv, &p->n_argv, LB_DESC_MAX_ARGS + 1, "-S");
    assert_int_equal(decode(p), -1);
    lb__vm_description__free_unpacked(p, NULL);

    p = lb__vm_description__unpack(NULL, len, bytes);
    char *k60 = filled(60 << 10);
    grow(&p->argv, &p->n_argv, 6 + 17, k60); /* 17 * 60 KiB < 1 MiB */
    assert_int_equal(decode(p), 0);
    grow(&p->argv, &p->n_argv, 6 + 18, k60);
    assert_int_equal(decode(p), -1);
    free(k60);
    lb__vm_description__free_unpacked(p, NULL);

    p = lb__vm_description__unpack(NULL, len, bytes);
    grow(&p->features, &p->n_features, LB_DESC_MAX_FEATURES, "f");
    grow(&p->blockers, &p->n_blockers, LB_DESC_MAX_BLOCKERS, "b: c: d");
    assert_int_equal(decode(p), 0);
    grow(&p->blockers, &p->n_blockers, LB_DESC_MAX_BLOCKERS + 1, "b: c: d");
    assert_int_equal(decode(p), -1);
    lb__vm_description__free_unpacked(p, NULL);

    p = lb__vm_description__unpack(NULL, len, bytes);
    p->disks = lb_realloc(p->disks, (LB_DESC_MAX_DISKS + 1) * sizeof(*p->disks));
    for (; p->n_disks <= LB_DESC_MAX_DISKS; p->n_disks++) {
        p->disks[p->n_disks] = lb_alloc(sizeof(Lb__Disk));
        lb__disk__init(p->disks[p->n_disks]);
    }
    assert_int_equal(decode(p), -1);
    p->n_disks--;
    assert_int_equal(decode(p), 0);
    p->n_disks++;
    lb__vm_description__free_unpacked(p, NULL);
    lb_vm_desc_free(&d);
    free(bytes);
}

static void test_sender_checks_too(void **s)
{
    (void)s;
    struct lb_vm_desc d = sample();
    struct lb_error err = LB_ERROR_INIT;
    Lb__VmDescription *p = NULL;
    set(&d.argv[1], "line\nbreak");
    assert_int_equal(lb_desc_to_proto(&d, &p, &err), -1);
    assert_int_equal(err.code, LB_E_UNSUPPORTED);
    assert_true(err.remedy[0] != '\0');
    assert_null(p);
    lb_vm_desc_free(&d);
}

/* Any flipped bit or cut: unpack or decode fails, or gives something within the
 * limits; nothing crashes (run under ASan for the full meaning). */
static void test_damaged_bytes(void **s)
{
    (void)s;
    struct lb_vm_desc d = sample();
    uint8_t *bytes;
    size_t len, refused = 0;
    Lb__VmDescription *p = wire(&d, &bytes, &len);
    lb__vm_description__free_unpacked(p, NULL);
    for (size_t bit = 0; bit < 8 * len + len; bit++) {
        size_t n = bit < 8 * len ? len : bit - 8 * len;
        if (n == len)
            bytes[bit / 8] ^= (uint8_t)(1u << bit % 8);
        p = lb__vm_description__unpack(NULL, n, bytes);
        refused += !p || decode(p) < 0;
        if (p)
            lb__vm_description__free_unpacked(p, NULL);
        if (n == len)
            bytes[bit / 8] ^= (uint8_t)(1u << bit % 8);
    }
    assert_true(refused > len); /* it does look at what it gets */
    lb_vm_desc_free(&d);
    free(bytes);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip),        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_counts),            cmocka_unit_test(test_sender_checks_too),
        cmocka_unit_test(test_damaged_bytes),
    };
    return cmocka_run_group_tests_name("desc_proto", tests, NULL, NULL);
}
