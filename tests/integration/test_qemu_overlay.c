/* Disks of a real guest that keep a moment: the guest writes and reads back with O_DIRECT all the time while
 * its disks are frozen, joined, and carried to another QEMU. */
#include "tests/integration/guest_util.h"

#include <sys/socket.h>
#include <sys/un.h>

enum { FREEZES = 20, INTERVAL_MS = 60 };

static struct {
    struct qemu q;
    struct lb_hv_vm *vm;
    char spare[96];         /* a second monitor, for what an operator does */
    double freeze_ms[FREEZES];
} g;

static void assert_guest_well(void)
{
    wait_writes(&g.q, 100);
    assert_int_equal(guest_says(&g.q, "disk_bad"), 0);
    assert_int_equal(guest_says(&g.q, "disk_errors"), 0);
}

/* An operator's command; its answer is thrown away but for an error. */
static void operator_says(const char *command)
{
    struct sockaddr_un sa = {.sun_family = AF_UNIX};
    char line[4096] = "";
    snprintf(sa.sun_path, sizeof(sa.sun_path), "%s", g.spare);
    LB_AUTO_FD int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(connect(fd, (struct sockaddr *)&sa, sizeof(sa)), 0);
    LB_AUTO_FILE FILE *f = fdopen(dup(fd), "r");
    assert_non_null(fgets(line, sizeof(line), f));
    dprintf(fd, "{\"execute\":\"qmp_capabilities\"}\n");
    assert_non_null(fgets(line, sizeof(line), f));
    dprintf(fd, "%s\n", command);
    while (fgets(line, sizeof(line), f) && strstr(line, "\"event\""))
        ;
    if (!strstr(line, "\"return\""))
        fail_msg("%s: %s", command, line);
}

/* drives: what the guest's disks are; vda is written. @D: the scratch folder. */
static void start_guest(const char *drives)
{
    char args[2048];
    snprintf(g.spare, sizeof(g.spare), "%s/spare", g.q.dir);
    snprintf(args, sizeof(args),
             "-machine pc,accel=tcg -cpu max -m 128 -nodefaults -display none -serial file:@D/serial "
             "-kernel %s/vmlinuz -initrd %s/initrd.img -append console=ttyS0\tquiet\tlb.disk=vda "
             "-qmp unix:@D/src.qmp,server=on,wait=off -qmp unix:@D/spare,server=on,wait=off %s",
             guest_dir(), guest_dir(), drives);
    qemu_start(&g.q, args);
    wait_writes(&g.q, 20);
    struct lb_vm_ident id = {.name = "t", .qmp_path = g.q.qmp};
    OK(lb_proc_identify(g.q.pid, &id.proc, err));
    OK(lb_hv_attach(&lb_hv_qemu, &id, &g.vm, err));
}

static void end_guest(void)
{
    lb_hv_detach(g.vm);
    qemu_end(&g.q);
}

static void find_disk(unsigned which, struct lb_hv_disk *out)
{
    struct lb_hv_disk *v;
    unsigned n;
    OK(lb_hv_disks(g.vm, &v, &n, err));
    assert_true(which < n);
    *out = v[which];
    free(v);
}

static void make_ready(unsigned which, char path[512])
{
    struct lb_hv_disk d;
    find_disk(which, &d);
    const char *mark = strstr(d.path, ".lb-");
    unsigned n = mark ? (unsigned)atoi(mark + 4) : 0;
    do
        snprintf(path, 512, "%.*s.lb-%u.qcow2", mark ? (int)(mark - d.path) : 400, d.path, ++n);
    while (access(path, F_OK) == 0);
    OK(lb_hv_disk_overlay(g.vm, d.id, path, err));
}

/* What the guest sees of the disk, as a raw file of its own. */
static void take_copy(const struct lb_hv_disk *d, const char *to)
{
    run("qemu-img convert -U -f %s -O raw %s %s/%s", d->format, d->path, g.q.dir, to);
}

static void compare(const struct lb_hv_disk *frozen, const char *copy)
{
    run("qemu-img compare -q -U -f %s -F raw %s %s/%s", frozen->format, frozen->path, g.q.dir, copy);
}

static int by_number(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* One moment: what the image was when the guest stopped, it stays. */
static void freeze_once(unsigned k, struct lb_hv_disk *frozen)
{
    char overlay[512], copy[32];
    struct lb_hv_disk now;
    make_ready(0, overlay);
    lb_sleep_ms(INTERVAL_MS);
    OK(lb_hv_stop(g.vm, err));
    find_disk(0, frozen);
    snprintf(copy, sizeof(copy), "copy%u", k);
    take_copy(frozen, copy);
    uint64_t t0 = lb_now_ns();
    OK(lb_hv_disk_freeze(g.vm, err));
    g.freeze_ms[k] = ms_since(t0);
    OK(lb_hv_cont(g.vm, err));
    find_disk(0, &now);
    assert_string_equal(now.path, overlay);
    assert_string_equal(now.format, "qcow2");
    assert_string_equal(now.id, frozen->id);
    assert_int_equal(now.size_bytes, frozen->size_bytes);
    compare(frozen, copy);
}

static int count_ticks(uint64_t done, uint64_t total, void *arg)
{
    assert_true(done <= total || total == 0);
    ++*(unsigned *)arg;
    return 0;
}

static int say_no(uint64_t done, uint64_t total, void *arg)
{
    (void)done, (void)total, (void)arg;
    return -1;
}

/* 20 moments under load, all still what they were at the end; then back to one image. */
static void moments(const char *drives, const char *first_format)
{
    static struct lb_hv_disk frozen[FREEZES];
    struct lb_hv_disk last;
    unsigned ticks = 0;
    char copy[32];
    start_guest(drives);
    for (unsigned k = 0; k < FREEZES; k++)
        freeze_once(k, &frozen[k]);
    assert_string_equal(frozen[0].format, first_format);
    assert_guest_well();
    for (unsigned k = 0; k < FREEZES; k++) {
        snprintf(copy, sizeof(copy), "copy%u", k);
        compare(&frozen[k], copy);
    }
    qsort(g.freeze_ms, FREEZES, sizeof(g.freeze_ms[0]), by_number);
    print_message("%s: %u freezes, p50 %.1f max %.1f ms\n", drives, FREEZES, g.freeze_ms[FREEZES / 2],
                  g.freeze_ms[FREEZES - 1]);

    /* running: in the middle, then cancelled, then a part of the chain */
    OK(lb_hv_disk_join(g.vm, frozen[0].id, frozen[3].path, frozen[2].path, count_ticks, &ticks, err));
    snprintf(copy, sizeof(copy), "copy%u", 3);
    compare(&frozen[2], copy);
    run("qemu-img info -U %s | grep -q \"backing file: $(basename %s)\"", frozen[4].path, frozen[2].path);
    assert_int_equal(unlink(frozen[3].path), 0);
    find_disk(0, &last);
    struct lb_error why = LB_ERROR_INIT;
    assert_int_equal(lb_hv_disk_join(g.vm, last.id, last.path, frozen[10].path, say_no, NULL, &why), -1);
    assert_int_equal(why.code, LB_E_CANCELLED);
    assert_guest_well();
    OK(lb_hv_disk_join(g.vm, last.id, last.path, frozen[10].path, count_ticks, &ticks, err));
    assert_guest_well();

    /* stopped: everything is in the first image, which is what the guest saw */
    OK(lb_hv_stop(g.vm, err));
    find_disk(0, &last);
    assert_string_equal(last.path, frozen[10].path);
    take_copy(&last, "whole");
    OK(lb_hv_disk_join(g.vm, last.id, last.path, frozen[0].path, count_ticks, &ticks, err));
    find_disk(0, &last);
    assert_string_equal(last.path, frozen[0].path);
    assert_string_equal(last.format, first_format);
    compare(&last, "whole");
    OK(lb_hv_cont(g.vm, err));
    assert_guest_well();
    assert_true(ticks > 0);
    /* and it can be frozen again */
    freeze_once(0, &last);
    assert_guest_well();
    end_guest();
}

static void test_raw_direct(void **state)
{
    (void)state;
    qemu_dir(&g.q);
    run("qemu-img create -q -f raw %s/a.img 80M", g.q.dir);
    moments("-drive if=none,id=d0,file=@D/a.img,format=raw,cache=none,discard=unmap,aio=native "
            "-device virtio-blk-pci,drive=d0", "raw");
}

static void test_qcow2_blockdev(void **state)
{
    (void)state;
    qemu_dir(&g.q);
    run("qemu-img create -q -f qcow2 %s/a.qcow2 80M", g.q.dir);
    moments("-blockdev driver=file,filename=@D/a.qcow2,node-name=s0 "
            "-blockdev {\"driver\":\"qcow2\",\"file\":\"s0\",\"node-name\":\"f0\"} "
            "-device virtio-blk-pci,drive=f0,id=vda", "qcow2");
}

/* What QEMU opened the overlay with: O_DIRECT stays O_DIRECT. */
static bool opened_direct(const char *path)
{
    bool found = false, direct = false;
    for (int fd = 0; fd < 200; fd++) {
        char link[64], info[64], target[512];
        LB_AUTO_FREE char *text = NULL;
        snprintf(link, sizeof(link), "/proc/%d/fd/%d", (int)g.q.pid, fd);
        ssize_t n = readlink(link, target, sizeof(target) - 1);
        if (n < 0 || strncmp(target, path, (size_t)n) != 0 || path[n])
            continue;
        snprintf(info, sizeof(info), "/proc/%d/fdinfo/%d", (int)g.q.pid, fd);
        OK(lb_file_read(info, 4096, &text, NULL, err));
        unsigned flags = 0;
        assert_int_equal(sscanf(strstr(text, "flags:"), "flags: %o", &flags), 1);
        found = true;
        direct |= (flags & O_DIRECT) != 0;
    }
    assert_true(found);
    return direct;
}

/* Two disks at one moment; when one cannot be frozen, neither is. */
static void test_two_disks(void **state)
{
    (void)state;
    char a[512], b[512];
    struct lb_hv_disk first, second, now;
    struct lb_error why = LB_ERROR_INIT;
    qemu_dir(&g.q);
    assert_int_equal(chmod(g.q.dir, 0777), 0);
    run("cd %s && qemu-img create -q -f raw a.img 80M && qemu-img create -q -f qcow2 b.qcow2 16M && "
        "qemu-img create -q -f raw c.img 16M && chmod 0640 a.img && chown 12345:23456 b.qcow2", g.q.dir);
    /* the idle one is served by a thread of its own: QEMU 10.0 without KVM loses interrupts of a busy one when
     * the VM is stopped and continued, whatever happens in between */
    start_guest("-drive if=none,id=first,file=@D/a.img,format=raw,cache=none -device virtio-blk-pci,drive=first "
                "-object iothread,id=io -drive if=none,id=second,file=@D/b.qcow2 -device virtio-blk-pci,drive=second,iothread=io "
                "-drive if=virtio,file=@D/c.img,format=raw,readonly=on");
    find_disk(0, &first);
    find_disk(1, &second);

    make_ready(0, a);
    make_ready(1, b);
    assert_int_equal(lb_hv_disk_overlay(g.vm, first.id, "/nowhere/x", &why), -1);
    assert_int_equal(why.code, LB_E_EXISTS);
    struct stat st;
    assert_int_equal(stat(a, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0640);
    assert_int_equal(stat(b, &st), 0);
    assert_true(st.st_uid == 12345 && st.st_gid == 23456);
    /* meanwhile somebody puts a snapshot of his own on the second: its overlay does not fit any more */
    char line[512];
    snprintf(line, sizeof(line), "{\"execute\":\"blockdev-snapshot-sync\",\"arguments\":{\"device\":\"%s\","
             "\"snapshot-file\":\"%s/theirs\"}}", second.id, g.q.dir);
    operator_says(line);
    OK(lb_hv_stop(g.vm, err));
    why = (struct lb_error){0};
    assert_int_equal(lb_hv_disk_freeze(g.vm, &why), -1);
    print_message("one of two: %s\n", why.message);
    OK(lb_hv_cont(g.vm, err));
    lb_hv_disk_overlay_drop(g.vm);
    assert_int_equal(access(a, F_OK), -1);
    assert_int_equal(access(b, F_OK), -1);
    find_disk(0, &now);
    assert_string_equal(now.path, first.path);
    find_disk(1, &second);
    assert_non_null(strstr(second.path, "/theirs"));
    assert_guest_well();

    make_ready(0, a);
    make_ready(1, b);
    assert_true(opened_direct(a));
    assert_false(opened_direct(b));
    OK(lb_hv_stop(g.vm, err));
    take_copy(&first, "copy-a");
    take_copy(&second, "copy-b");
    OK(lb_hv_disk_freeze(g.vm, err));
    OK(lb_hv_cont(g.vm, err));
    find_disk(0, &now);
    assert_string_equal(now.path, a);
    find_disk(1, &now);
    assert_string_equal(now.path, b);
    assert_guest_well();
    compare(&first, "copy-a");
    compare(&second, "copy-b");
    end_guest();
}

static void refused(const char *id, const char *word)
{
    struct lb_error why = LB_ERROR_INIT;
    char path[512];
    snprintf(path, sizeof(path), "%s/no.qcow2", g.q.dir);
    assert_int_equal(lb_hv_disk_overlay(g.vm, id, path, &why), -1);
    print_message("%s: %s (%s)\n", id, why.message, why.remedy);
    assert_non_null(strstr(why.message, word));
    assert_true(why.remedy[0]);
    assert_int_equal(access(path, F_OK), -1);
}

/* What cannot be frozen says why and what to do, and leaves nothing behind. */
static void test_refusals(void **state)
{
    (void)state;
    char left[512], path[512];
    qemu_dir(&g.q);
    run("cd %s && qemu-img create -q -f raw a.img 80M && for i in ro sh pa db to; do truncate -s 80M $i.img; "
        "done && qemu-img create -q -f vmdk v.vmdk 16M", g.q.dir);
    start_guest("-drive if=none,id=d0,file=@D/a.img,format=raw -device virtio-blk-pci,drive=d0 "
                "-drive if=none,id=ro,file=@D/ro.img,format=raw,readonly=on -device virtio-blk-pci,drive=ro "
                "-drive if=none,id=sh,file=@D/sh.img,format=raw -device virtio-blk-pci,drive=sh,share-rw=on "
                "-drive if=none,id=pa,file=@D/pa.img,format=raw,offset=1048576,size=1048576 "
                "-device virtio-blk-pci,drive=pa "
                "-drive if=none,id=nu,driver=null-co,read-zeroes=on -device virtio-blk-pci,drive=nu "
                "-drive if=none,id=vm,file=@D/v.vmdk,format=vmdk -device virtio-blk-pci,drive=vm "
                "-drive if=none,id=db,file=@D/db.img,format=raw,snapshot=on -device virtio-blk-pci,drive=db "
                "-drive if=ide,id=cd,media=cdrom");
    refused("ro", "read only");
    refused("sh", "share-rw");
    refused("pa", "part");
    refused("nu", "raw nor qcow2");
    refused("vm", "raw nor qcow2");
    refused("db", "No such file");
    refused("cd", "empty");
    struct lb_error why = LB_ERROR_INIT;
    assert_int_equal(lb_hv_disk_overlay(g.vm, "none", "/nowhere/x", &why), -1);
    assert_int_equal(why.code, LB_E_NOT_FOUND);
    assert_int_equal(lb_hv_disk_overlay(g.vm, "d0", g.q.disk, &why), -1); /* there is something */
    assert_int_equal(why.code, LB_E_EXISTS);
    /* a protected VM */
    char add[256];
    snprintf(add, sizeof(add), "%s/mirror", g.q.dir);
    run("qemu-nbd --fork -x 0 -f raw -k %s %s/to.img --pid-file %s/nbd.pid", add, g.q.dir, g.q.dir);
    OK(lb_hv_disk_mirror(g.vm, "d0", add, "0", err));
    refused("d0", "copied");
    OK(lb_hv_disk_mirror_end(g.vm, "d0", err));
    run("kill $(cat %s/nbd.pid) || true", g.q.dir); /* it ends by itself when its last client goes */
    /* an operator's job */
    snprintf(add, sizeof(add), "{\"execute\":\"drive-mirror\",\"arguments\":{\"device\":\"d0\",\"job-id\":\"op\","
             "\"sync\":\"full\",\"target\":\"%s/copy\"}}", g.q.dir);
    operator_says(add);
    refused("d0", "copied");
    operator_says("{\"execute\":\"block-job-cancel\",\"arguments\":{\"device\":\"op\",\"force\":true}}");
    lb_sleep_ms(200); /* it ends by itself */
    /* a session that dies leaves its overlay open in QEMU; the next one closes it */
    make_ready(0, left);
    lb_hv_detach(g.vm);
    struct lb_vm_ident id = {.name = "t", .qmp_path = g.q.qmp};
    OK(lb_proc_identify(g.q.pid, &id.proc, err));
    OK(lb_hv_attach(&lb_hv_qemu, &id, &g.vm, err));
    lb_hv_disk_overlay_drop(g.vm);
    assert_int_equal(unlink(left), 0); /* the caller's */
    make_ready(0, path);
    assert_string_equal(path, left);
    lb_hv_disk_overlay_drop(g.vm);
    assert_guest_well();
    end_guest();
}

static const char *word_of(char *const *argv, const char *part)
{
    for (; *argv; argv++)
        if (strstr(*argv, part))
            return *argv;
    return "";
}

/* The VM goes to another QEMU: with the image it writes now, not the one of its command line. */
static void carry(const char *drives, const char *expect)
{
    struct lb_vm_desc desc;
    struct lb_hv_vm *dst;
    struct lb_hv_disk before, after;
    char overlay[512], run_dir[96];
    void *buf = NULL;
    size_t len = 0;
    start_guest(drives);
    for (unsigned k = 0; k < 2; k++) {
        make_ready(0, overlay);
        OK(lb_hv_stop(g.vm, err));
        OK(lb_hv_disk_freeze(g.vm, err));
        OK(lb_hv_cont(g.vm, err));
    }
    assert_guest_well();
    find_disk(0, &before);
    OK(lb_hv_describe(g.vm, &desc, err));
    if (desc.blockers[0])
        fail_msg("%s", desc.blockers[0]);
    assert_string_equal(desc.disks[0].path, overlay);
    assert_non_null(strstr(desc.disks[0].argv_path, "a.img"));
    assert_string_equal(desc.disks[0].id, before.id);
    assert_int_equal(desc.n_disks, 3);
    assert_true(desc.disks[1].backing && desc.disks[2].backing && !desc.disks[0].backing);

    snprintf(run_dir, sizeof(run_dir), "%s/run", g.q.dir);
    struct lb_launch_opts opts = {.name = "t", .run_dir = run_dir, .emulator = getenv("LB_TEST_QEMU_DST")};
    char **argv;
    OK(lb_qemu_receiver_argv(&desc, &opts, &argv, err));
    LB_AUTO_FREE char *want = lb_asprintf("a.img.lb-2.qcow2%s", expect);
    print_message("%s\n", word_of(argv, "a.img"));
    assert_non_null(strstr(word_of(argv, "a.img"), want));
    lb_strv_free(argv);
    OK(lb_hv_launch(&lb_hv_qemu, &desc, &opts, &dst, err));
    OK(lb_hv_prepare_ram(dst, err));
    OK(lb_hv_stop(g.vm, err));
    copy_ram(g.vm, dst, false);
    OK(lb_hv_save_begin(g.vm, true, err));
    OK(lb_hv_save_end(g.vm, &buf, &len, err));
    OK(lb_hv_load_state(dst, buf, len, err));
    free(buf);
    OK(lb_hv_run(dst, err));
    lb_hv_detach(g.vm);
    kill(g.q.pid, SIGKILL);
    waitpid(g.q.pid, NULL, 0);
    g.q.pid = 0;
    g.vm = dst;
    lb_vm_desc_free(&desc);
    find_disk(0, &after);
    assert_string_equal(after.path, overlay);
    assert_string_equal(after.id, before.id);
    assert_guest_well();

    /* it is what its own command line says there, and its images can be joined */
    OK(lb_hv_describe(dst, &desc, err));
    assert_string_equal(desc.disks[0].path, overlay);
    assert_true(!desc.disks[0].argv_path || !desc.disks[0].argv_path[0]);
    LB_AUTO_FREE char *base = lb_asprintf("%s/a.img", g.q.dir);
    OK(lb_hv_disk_join(dst, after.id, overlay, base, NULL, NULL, err));
    assert_guest_well();
    lb_vm_desc_free(&desc);
    OK(lb_hv_describe(dst, &desc, err));
    assert_string_equal(desc.disks[0].path, base);
    assert_string_equal(desc.disks[0].argv_path, overlay);
    lb_vm_desc_free(&desc);
    OK(lb_hv_destroy(dst, err));
    qemu_end(&g.q);
}

static void raw_image(void)
{
    qemu_dir(&g.q);
    run("qemu-img create -q -f raw %s/a.img 80M", g.q.dir);
}

static void test_carry_drive(void **state)
{
    (void)state;
    raw_image();
    carry("-drive if=virtio,file=@D/a.img,format=raw,cache=none", ",format=qcow2");
}

static void test_carry_blockdev(void **state)
{
    (void)state;
    raw_image();
    carry("-blockdev {\"driver\":\"file\",\"filename\":\"@D/a.img\",\"node-name\":\"s0\"} "
          "-blockdev driver=raw,file=s0,node-name=f0 -device virtio-blk-pci,drive=f0", "");
}

/* The device stands on the file itself. */
static void test_carry_bare_file(void **state)
{
    (void)state;
    raw_image();
    carry("-blockdev driver=file,filename=@D/a.img,node-name=s0,cache.direct=on "
          "-device virtio-blk-pci,drive=s0,id=disk", "");
}

/* An operator copies the disk to another image and goes on there. */
static void test_mirror_pivot(void **state)
{
    (void)state;
    struct lb_vm_desc desc;
    char line[512], want[128];
    raw_image();
    start_guest("-drive if=virtio,file=@D/a.img,format=raw");
    snprintf(line, sizeof(line), "{\"execute\":\"drive-mirror\",\"arguments\":{\"device\":\"virtio0\","
             "\"job-id\":\"op\",\"sync\":\"full\",\"format\":\"qcow2\",\"target\":\"%s/moved\"}}", g.q.dir);
    operator_says(line);
    uint64_t until = lb_now_ns() + UINT64_C(30000000000);
    for (int i = 0;; i++) { /* until it is ready to be completed */
        struct lb_hv_disk d;
        lb_sleep_ms(200);
        if (i == 5)
            operator_says("{\"execute\":\"block-job-complete\",\"arguments\":{\"device\":\"op\"}}");
        find_disk(0, &d);
        if (strstr(d.path, "/moved"))
            break;
        if (lb_now_ns() > until)
            fail_msg("the mirror does not end");
    }
    OK(lb_hv_describe(g.vm, &desc, err));
    snprintf(want, sizeof(want), "%s/moved", g.q.dir);
    assert_string_equal(desc.disks[0].path, want);
    assert_string_equal(desc.disks[0].format, "qcow2");
    snprintf(want, sizeof(want), "%s/a.img", g.q.dir);
    assert_string_equal(desc.disks[0].argv_path, want);
    assert_null(desc.blockers[0]);
    lb_vm_desc_free(&desc);
    assert_guest_well();
    end_guest();
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_raw_direct),
        cmocka_unit_test(test_qcow2_blockdev),
        cmocka_unit_test(test_two_disks),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_carry_drive),
        cmocka_unit_test(test_carry_blockdev),
        cmocka_unit_test(test_carry_bare_file),
        cmocka_unit_test(test_mirror_pivot),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
