/* Disks of a real guest under QEMU, epoch by epoch: whenever it is stopped and the epoch is applied, the
 * backup's image is the primary's. The guest writes and reads back with O_DIRECT all the time. */
#include "tests/integration/guest_util.h"

#include <inttypes.h>
#include <stdatomic.h>
#include <sys/mman.h>

#include "remus/disk.h"

enum { EPOCHS = 100, INTERVAL_MS = 25 };

static struct {
    struct qemu q;
    struct lb_hv_vm *vm;
    struct lb_hv_disk disk;
    char copy[96];
    struct lb_disk_target *target;
    struct lb_disk_source *source;
    _Atomic unsigned failed;
    struct lb_error why;
    _Atomic uint64_t direct_bytes, direct_zeros;
} g;

static int on_direct(const struct lb_disk_op *op, void *arg, struct lb_error *err)
{
    (void)arg;
    *(op->kind == LB_DISK_WRITE ? &g.direct_bytes : &g.direct_zeros) += op->len;
    return lb_disk_target_apply(g.target, op, err);
}

static void on_pressure(void *arg)
{
    (void)arg;
}

static void on_failed(const struct lb_error *why, void *arg)
{
    (void)arg;
    g.why = *why;
    g.failed++;
}

/* size: as qemu-img has it. The guest writes within the first 64 MiB. */
static void start_guest(const char *format, const char *size)
{
    char args[1024], image[96];
    memset(&g, 0, sizeof(g));
    qemu_dir(&g.q);
    snprintf(image, sizeof(image), "%s/a.%s", g.q.dir, format);
    snprintf(g.copy, sizeof(g.copy), "%s/b.%s", g.q.dir, format);
    run("qemu-img create -q -f %s %s %s", format, image, size);
    snprintf(args, sizeof(args),
             "-machine pc,accel=tcg -cpu max -m 256 -nodefaults -display none -serial file:@D/serial "
             "-kernel %s/vmlinuz -initrd %s/initrd.img -append console=ttyS0\tquiet\tlb.disk=vda "
             "-drive if=none,id=d0,file=%s,format=%s,cache=none,discard=unmap "
             "-device virtio-blk-pci,drive=d0", guest_dir(), guest_dir(), image, format);
    qemu_start(&g.q, args);
    wait_writes(&g.q, 20);
    g.vm = qemu_attach(&g.q);
}

static void start_replication(const char *format)
{
    struct lb_hv_disk *disks;
    unsigned n;
    OK(lb_hv_disks(g.vm, &disks, &n, err));
    assert_int_equal(n, 1);
    g.disk = disks[0];
    free(disks);
    char same[128];
    lb_disk_file_identity(same, g.disk.path);
    assert_true(same[0] != '\0');
    struct lb_disk_target_opts to = {.path = g.copy, .format = format, .size_bytes = g.disk.size_bytes,
                                     .same_as = same, .run_dir = g.q.dir};
    OK(lb_disk_target_open(&to, &g.target, err));
    struct lb_disk_source_opts so = {.run_dir = g.q.dir, .direct = on_direct,
                                     .pressure = on_pressure, .failed = on_failed};
    OK(lb_disk_source_open(&g.disk, 1, &so, &g.source, err));
    uint64_t t0 = lb_now_ns();
    OK(lb_hv_disk_mirror(g.vm, g.disk.id, lb_disk_source_socket(g.source), "0", err));
    struct lb_mirror_status st = {0};
    while (!st.ready) {
        OK(lb_hv_disk_mirror_status(g.vm, g.disk.id, true, &st, err));
        assert_false(st.failed);
        assert_true(ms_since(t0) < 60000);
        lb_sleep_ms(10);
    }
    print_message("%s: first copy %.0f ms, %.1f MiB of data, %.1f MiB of zeros\n", format,
                  ms_since(t0), (double)g.direct_bytes / 1048576, (double)g.direct_zeros / 1048576);
    OK(lb_hv_stop(g.vm, err));
    OK(lb_disk_source_queue(g.source, err));
    OK(lb_disk_target_flush(g.target, err));
    OK(lb_hv_cont(g.vm, err));
}

static void stop_guest(void)
{
    lb_disk_source_close(g.source);
    OK(lb_disk_target_close(g.target, err));
    lb_hv_detach(g.vm);
    qemu_end(&g.q);
}

static void assert_same_raw(unsigned epoch)
{
    size_t len = g.disk.size_bytes;
    int a = open(g.disk.path, O_RDONLY), b = open(g.copy, O_RDONLY);
    char *pa = mmap(NULL, len, PROT_READ, MAP_SHARED, a, 0), *pb = mmap(NULL, len, PROT_READ, MAP_SHARED, b, 0);
    assert_true(pa != MAP_FAILED && pb != MAP_FAILED);
    for (size_t at = 0; at < len; at += 4096)
        if (memcmp(pa + at, pb + at, 4096) != 0)
            fail_msg("epoch %u: block %zu differs", epoch, at / 4096);
    munmap(pa, len);
    munmap(pb, len);
    close(a);
    close(b);
}

static int by_number(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* One epoch; everything written is in it, nothing comes late. Returns its operations. */
static unsigned one_epoch(double *cut_ms)
{
    struct lb_disk_ops ops;
    lb_sleep_ms(INTERVAL_MS);
    OK(lb_hv_stop(g.vm, err));
    uint64_t t0 = lb_now_ns();
    lb_disk_source_cut_begin(g.source);
    OK(lb_disk_source_cut_end(g.source, &ops, err));
    *cut_ms = ms_since(t0);
    for (unsigned i = 0; i < ops.n; i++)
        OK(lb_disk_target_apply(g.target, &ops.v[i], err));
    OK(lb_disk_target_flush(g.target, err));
    unsigned n = ops.n;
    lb_disk_ops_free(&ops);
    return n;
}

static void follow(const char *format)
{
    double cuts[EPOCHS];
    unsigned ops = 0, busy = 0;
    for (unsigned e = 0; e < EPOCHS; e++) {
        unsigned n = one_epoch(&cuts[e]);
        ops += n;
        busy += n > 0;
        if (strcmp(format, "raw") == 0)
            assert_same_raw(e);
        else
            run("qemu-img compare -q -U -f %s -F %s %s %s", format, format, g.disk.path, g.copy);
        assert_int_equal(lb_disk_source_backlog(g.source), 0);
        OK(lb_hv_cont(g.vm, err));
    }
    qsort(cuts, EPOCHS, sizeof(cuts[0]), by_number);
    print_message("%s: %u epochs, %u with writes, %u operations, cut p50 %.3f max %.3f ms\n", format,
                  EPOCHS, busy, ops, cuts[EPOCHS / 2], cuts[EPOCHS - 1]);
    assert_true(busy > EPOCHS / 2);
    assert_int_equal(g.failed, 0);
}

static void end_replication(void)
{
    OK(lb_hv_stop(g.vm, err));
    uint64_t t0 = lb_now_ns();
    OK(lb_hv_disk_mirror_end(g.vm, g.disk.id, err));
    print_message("mirror ended in %.1f ms\n", ms_since(t0));
    OK(lb_hv_cont(g.vm, err));
    wait_writes(&g.q, 50);
    assert_int_equal(guest_says(&g.q, "disk_bad"), 0);
    assert_int_equal(guest_says(&g.q, "disk_errors"), 0);
    assert_int_equal(g.failed, 0);
}

/* The copy is there already, full of something else: the holes have to be made. */
static void test_raw(void **state)
{
    (void)state;
    start_guest("raw", "128M");
    run("head -c 128M /dev/zero | tr '\\0' x >%s", g.copy);
    start_replication("raw");
    follow("raw");
    end_replication();
    stop_guest();
}

static void test_qcow2(void **state)
{
    (void)state;
    start_guest("qcow2", "128M");
    start_replication("qcow2");
    follow("qcow2");
    end_replication();
    OK(lb_disk_target_close(g.target, err));
    g.target = NULL;
    run("qemu-img check -q %s", g.copy);
    stop_guest();
}

/* A gigabyte of nothing is not sent, and not written. */
static void test_sparse_first_copy(void **state)
{
    (void)state;
    struct stat st;
    start_guest("raw", "1G");
    start_replication("raw");
    assert_true(g.direct_bytes < (128u << 20));
    assert_int_equal(stat(g.copy, &st), 0);
    assert_int_equal(st.st_size, 1u << 30);
    assert_true((uint64_t)st.st_blocks * 512 < (128u << 20));
    end_replication();
    stop_guest();
}

static pid_t find_nbdkit(void)
{
    char line[64] = "";
    snprintf(line, sizeof(line), "pgrep -P %d nbdkit", (int)getpid());
    FILE *f = popen(line, "r");
    if (!fgets(line, sizeof(line), f))
        line[0] = '\0';
    pclose(f);
    return atoi(line);
}

/* nbdkit dies: told by both, the guest goes on as if nothing had been; it can begin again. */
static void test_death_of_the_server(void **state)
{
    (void)state;
    start_guest("raw", "128M");
    start_replication("raw");
    double ignored;
    one_epoch(&ignored);
    OK(lb_hv_cont(g.vm, err));
    pid_t nbdkit = find_nbdkit();
    assert_true(nbdkit > 0);
    uint64_t t0 = lb_now_ns();
    kill(nbdkit, SIGKILL);
    struct lb_mirror_status st = {0};
    while (!g.failed || !st.failed) {
        OK(lb_hv_disk_mirror_status(g.vm, g.disk.id, false, &st, err));
        assert_true(ms_since(t0) < 10000);
        lb_sleep_ms(1);
    }
    print_message("told after %.0f ms: %s; QEMU: %s\n", ms_since(t0), g.why.message, st.error);
    assert_int_equal(g.failed, 1);
    assert_non_null(strstr(g.why.message, "signal 9"));
    wait_writes(&g.q, 100);
    assert_int_equal(guest_says(&g.q, "disk_bad"), 0);
    assert_int_equal(guest_says(&g.q, "disk_errors"), 0);
    OK(lb_hv_disk_mirror_end(g.vm, g.disk.id, err));
    lb_disk_source_close(g.source);
    OK(lb_disk_target_close(g.target, err));
    g.failed = 0;
    start_replication("raw");
    one_epoch(&ignored);
    assert_same_raw(0);
    OK(lb_hv_cont(g.vm, err));
    end_replication();
    stop_guest();
}

/* A standby that waits for its state has the image open, and takes no lock. */
static void standby(const char *format)
{
    struct qemu q;
    char args[512], path[96];
    static char data[4096];
    struct lb_disk_target *t = NULL;
    qemu_dir(&q);
    snprintf(path, sizeof(path), "%s/c.%s", q.dir, format);
    struct lb_disk_target_opts o = {.path = path, .format = format, .size_bytes = 8 << 20,
                                    .run_dir = q.dir};
    OK(lb_disk_target_open(&o, &t, err));
    snprintf(args, sizeof(args),
             "-machine pc,accel=tcg -m 64 -nodefaults -display none -incoming defer -S "
             "-drive if=none,id=d0,file=%s,format=%s,cache=none -device virtio-blk-pci,drive=d0",
             path, format);
    qemu_start(&q, args);
    for (unsigned i = 0; i < 8; i++) {
        struct lb_disk_op op = {.kind = LB_DISK_WRITE, .offset = i << 20, .len = sizeof(data), .data = data};
        memset(data, 'a' + (int)i, sizeof(data));
        OK(lb_disk_target_apply(t, &op, err));
    }
    uint64_t t0 = lb_now_ns();
    OK(lb_disk_target_close(t, err));
    print_message("%s: closed in %.1f ms beside a standby\n", format, ms_since(t0));
    run("qemu-io -U -r -f %s -c 'read -q -P 104 7M 4k' %s | (! grep -i fail)", format, path);
    OK(lb_disk_target_open(&o, &t, err)); /* a new session of the same protection */
    OK(lb_disk_target_close(t, err));
    assert_int_equal(waitpid(q.pid, NULL, WNOHANG), 0);
    qemu_end(&q);
}

static void test_beside_a_standby(void **state)
{
    (void)state;
    standby("raw");
    standby("qcow2");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_beside_a_standby),
        cmocka_unit_test(test_raw),
        cmocka_unit_test(test_qcow2),
        cmocka_unit_test(test_sparse_first_copy),
        cmocka_unit_test(test_death_of_the_server),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
