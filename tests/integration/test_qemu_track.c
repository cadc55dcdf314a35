/* RAM blocks, the dirty log and injection against real QEMU processes whose guest
 * writes a known set of pages. */
#include "tests/integration/qemu_util.h"

#include <linux/kvm.h>
#include <sched.h>
#include <time.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#include "core/qemu/pm_defs.h"
#include "core/qemu/qemu_internal.h"

/* IDE: a virtio disk writes its ring at every cont, which the log would rightly show */
#define COMMON " -m 64 -nodefaults -display none -drive if=ide,file=@D/disk.raw,format=raw,cache=none "

static struct {
    const char *name, *args;
    enum lb_ram_backing backing;
} const machines[] = {
    {"pc, anonymous", "-machine pc,accel=tcg -vga std" COMMON, LB_BACK_ANON},
    {"q35, anonymous",
     "-machine q35,accel=tcg -vga std -device qemu-xhci -device ahci -device virtio-rng-pci" COMMON,
     LB_BACK_ANON},
    {"pc, memfd",
     "-object memory-backend-memfd,id=m,size=64M,share=on -machine pc,accel=tcg,memory-backend=m" COMMON,
     LB_BACK_SHARED},
    {"q35, memfd",
     "-object memory-backend-memfd,id=m,size=64M,share=on -machine q35,accel=tcg,memory-backend=m "
     "-vga std" COMMON,
     LB_BACK_SHARED},
};

static void test_blocks(void **state)
{
    (void)state;
    for (unsigned m = 0; m < LB_ARRAY_LEN(machines); m++) {
        struct qemu q;
        const struct lb_ram_block *b;
        unsigned n, mains = 0, located = 0, vram = 0;
        qemu_dir(&q);
        qemu_start(&q, machines[m].args);
        struct lb_hv_vm *vm = qemu_attach(&q);
        wait_guest(vm);
        OK(lb_hv_blocks(vm, &b, &n, err));
        for (unsigned i = 0; i < n; i++) {
            located += b[i].hva != 0;
            vram += strstr(b[i].name, "vga.vram") != NULL && b[i].size_bytes == 16u << 20 &&
                    b[i].kind == LB_RAM_DEVICE;
            if (b[i].kind != LB_RAM_MAIN)
                continue;
            mains++;
            assert_int_equal(b[i].size_bytes, 64u << 20);
            assert_int_equal(b[i].backing, machines[m].backing);
            assert_int_equal(b[i].map != NULL, machines[m].backing == LB_BACK_SHARED);
        }
        print_message("%s: %u blocks, %u located\n", machines[m].name, n, located);
        assert_int_equal(mains, 1);
        assert_int_equal(vram, strstr(machines[m].args, "-vga std") != NULL);
        lb_hv_detach(vm);
        qemu_end(&q);
    }
}

/* The log of one stop: exactly the boot sector's pages. */
static void exact_log(struct lb_hv_vm *vm)
{
    const struct lb_ram_block *b = main_block(vm);
    struct lb_bitmap dirty, hint;
    OK(lb_bitmap_init(&dirty, b->size_bytes / LB_PAGE_SIZE, err));
    OK(lb_bitmap_init(&hint, b->size_bytes / LB_PAGE_SIZE, err));
    OK(lb_hv_stop(vm, err));
    OK(lb_hv_log_clean(vm, b, &dirty, err));
    for (int round = 0; round < 20; round++) {
        lb_bitmap_clear_all(&dirty);
        lb_bitmap_clear_all(&hint);
        uint32_t before = counter(vm, BOOT_N_PAGES - 1);
        OK(lb_hv_log_clean(vm, b, &dirty, err)); /* stopped: nothing */
        assert_int_equal(lb_bitmap_count(&dirty), 0);
        OK(lb_hv_cont(vm, err));
        while (counter(vm, BOOT_N_PAGES - 1) < before + 3)
            sched_yield();
        OK(lb_hv_log_peek(vm, b, BOOT_FIRST_PAGE, 8, &hint, err));
        assert_int_equal(lb_bitmap_count(&hint), 8); /* and nothing outside the range */
        OK(lb_hv_stop(vm, err));
        OK(lb_hv_log_clean(vm, b, &dirty, err));
        if (lb_bitmap_count(&dirty) != BOOT_N_PAGES)
            for (uint64_t p = 0; p < dirty.n_bits; p++)
                if (lb_bitmap_test(&dirty, p))
                    print_message("round %d: page %#llx\n", round, (unsigned long long)p);
        assert_int_equal(lb_bitmap_count(&dirty), BOOT_N_PAGES);
        for (unsigned p = 0; p < BOOT_N_PAGES; p++)
            assert_true(lb_bitmap_test(&dirty, BOOT_FIRST_PAGE + p));
    }
    OK(lb_hv_cont(vm, err));
    lb_bitmap_free(&dirty);
    lb_bitmap_free(&hint);
}

static void test_log_exact(void **state)
{
    (void)state;
    for (unsigned m = 0; m < LB_ARRAY_LEN(machines); m++) {
        struct qemu q;
        qemu_dir(&q);
        qemu_start(&q, machines[m].args);
        struct lb_hv_vm *vm = qemu_attach(&q);
        wait_guest(vm);
        const struct lb_ram_block *b = main_block(vm);
        struct lb_bitmap before, after;
        OK(lb_bitmap_init(&before, b->size_bytes / LB_PAGE_SIZE, err));
        OK(lb_bitmap_init(&after, b->size_bytes / LB_PAGE_SIZE, err));
        OK(lb_hv_populated(vm, b, &before, err));
        OK(lb_hv_log_enable(vm, err));
        /* the log's own marks on absent pages must not make them look used */
        OK(lb_hv_populated(vm, b, &after, err));
        assert_in_range(lb_bitmap_count(&before), BOOT_N_PAGES, 4000);
        assert_int_equal(lb_bitmap_count(&after), lb_bitmap_count(&before));
        exact_log(vm);
        OK(lb_hv_log_disable(vm, err));
        OK(lb_hv_log_enable(vm, err)); /* and again */
        exact_log(vm);
        lb_bitmap_free(&before);
        lb_bitmap_free(&after);
        lb_hv_detach(vm);
        qemu_end(&q);
    }
}

/* Unpopulated means zero: everything populated() leaves out reads as zeros. */
static void test_populated_is_complete(void **state)
{
    (void)state;
    for (unsigned m = 0; m < LB_ARRAY_LEN(machines); m++) {
        struct qemu q;
        qemu_dir(&q);
        qemu_start(&q, machines[m].args);
        struct lb_hv_vm *vm = qemu_attach(&q);
        wait_guest(vm);
        const struct lb_ram_block *b = main_block(vm);
        struct lb_bitmap set;
        static char page[4096], zero[4096];
        OK(lb_bitmap_init(&set, b->size_bytes / LB_PAGE_SIZE, err));
        OK(lb_hv_log_enable(vm, err));
        OK(lb_hv_populated(vm, b, &set, err));
        unsigned used = 0;
        for (uint64_t p = 0; p < set.n_bits; p++) {
            OK(lb_hv_read(vm, b, p, 1, page, err));
            bool is_zero = memcmp(page, zero, sizeof(page)) == 0;
            used += !is_zero;
            assert_true(is_zero || lb_bitmap_test(&set, p));
        }
        assert_true(used >= BOOT_N_PAGES);
        lb_bitmap_free(&set);
        lb_hv_detach(vm);
        qemu_end(&q);
    }
}

/* Many places in one call are what one call each would have read, more of them than the kernel takes at once. */
static void test_read_pages(void **state)
{
    (void)state;
    enum { N = 3000 };
    for (unsigned m = 0; m < LB_ARRAY_LEN(machines); m++) {
        struct qemu q;
        qemu_dir(&q);
        qemu_start(&q, machines[m].args);
        struct lb_hv_vm *vm = qemu_attach(&q);
        wait_guest(vm);
        const struct lb_ram_block *b = main_block(vm);
        static char page[4096], many[N * 4096];
        static uint32_t list[N];
        for (uint32_t i = 0; i < N; i++) /* runs of two, up to the last of the block */
            list[i] = i % 2 ? list[i - 1] + 1 : i * 4;
        list[N - 1] = (uint32_t)(b->size_bytes / LB_PAGE_SIZE - 1);
        OK(lb_hv_stop(vm, err));
        OK(lb_hv_read_pages(vm, b, list, N, many, err));
        for (uint32_t i = 0; i < N; i++) {
            OK(lb_hv_read(vm, b, list[i], 1, page, err));
            assert_memory_equal(page, many + i * 4096, 4096);
        }
        OK(lb_hv_cont(vm, err));
        lb_hv_detach(vm);
        qemu_end(&q);
    }
}

static void test_stop_cont(void **state)
{
    (void)state;
    struct qemu q;
    qemu_dir(&q);
    qemu_start(&q, machines[0].args);
    struct lb_hv_vm *vm = qemu_attach(&q);
    wait_guest(vm);
    OK(lb_hv_log_enable(vm, err));
    double worst = 0, sum = 0;
    for (int i = 0; i < 200; i++) {
        uint64_t t0 = lb_now_ns();
        OK(lb_hv_stop(vm, err));
        if (i % 20 == 0) {
            bool alive, running;
            uint32_t at = counter(vm, 3);
            OK(lb_hv_status(vm, &alive, &running, err));
            assert_true(alive && !running);
            usleep(5000);
            assert_int_equal(counter(vm, 3), at);
        }
        uint64_t t1 = lb_now_ns();
        OK(lb_hv_cont(vm, err));
        double ms = ms_since(t1);
        (void)t0;
        sum += ms;
        worst = LB_MAX(worst, ms);
        usleep(2000);
    }
    print_message("cont: mean %.2f, worst %.2f ms\n", sum / 200, worst);
    /* detached with a "stop" sent ahead but for its last byte: it must not happen */
    lb_hv_detach(vm);
    vm = qemu_attach(&q);
    bool alive, running;
    OK(lb_hv_status(vm, &alive, &running, err));
    assert_true(alive && running);
    wait_guest(vm);
    lb_hv_detach(vm);
    qemu_end(&q);
}

static int getpid_body(struct lb_injector *in, void *arg, struct lb_error *err)
{
    uint64_t none[6] = {0};
    return lb_inject_syscall(in, SYS_getpid, none, arg, err);
}

static unsigned count_fds(pid_t pid)
{
    char path[64];
    unsigned n = 0;
    for (int fd = 0; fd < 1024; fd++) {
        snprintf(path, sizeof(path), "/proc/%d/fd/%d", (int)pid, fd);
        struct stat st;
        n += lstat(path, &st) == 0;
    }
    return n;
}

static void test_inject_300(void **state)
{
    (void)state;
    struct qemu q;
    qemu_dir(&q);
    qemu_start(&q, machines[0].args);
    struct lb_hv_vm *vm = qemu_attach(&q);
    wait_guest(vm);
    unsigned fds = count_fds(q.pid);
    uint64_t total = 0;
    for (int i = 0; i < 300; i++) {
        long pid = 0;
        uint64_t t0 = lb_now_ns();
        OK(lb_inject(q.pid, getpid_body, &pid, err));
        total += lb_now_ns() - t0;
        assert_int_equal(pid, q.pid);
        if (i % 3 == 0) { /* its main loop must still answer */
            bool alive, running;
            OK(lb_hv_status(vm, &alive, &running, err));
            assert_true(alive && running);
        }
        if (i % 10 == 0) {
            OK(lb_hv_log_enable(vm, err));
            OK(lb_hv_log_disable(vm, err));
        }
    }
    print_message("injection: %.0f us each\n", (double)total / 300e3);
    assert_int_equal(count_fds(q.pid), fds);
    wait_guest(vm);
    lb_hv_detach(vm);
    qemu_end(&q);
}

static void test_unprivileged_sandbox(void **state)
{
    (void)state;
    if (getenv("LB_TEST_QEMU")) {
        print_message("another QEMU is given, which may be a wrapper that needs root\n");
        skip();
    }
    struct qemu q;
    qemu_dir(&q);
    assert_int_equal(chown(q.dir, 65534, 65534), 0);
    qemu_start_as(&q, 65534,
                  "-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny "
                  "-machine pc,accel=tcg -vga std" COMMON);
    struct lb_hv_vm *vm = qemu_attach(&q);
    wait_guest(vm);
    OK(lb_hv_log_enable(vm, err));
    exact_log(vm);
    lb_hv_detach(vm);
    qemu_end(&q);
}

static void test_busy_monitor(void **state)
{
    (void)state;
    struct qemu q;
    qemu_dir(&q);
    qemu_start(&q, machines[0].args);
    struct lb_hv_vm *first = qemu_attach(&q), *second = NULL;
    struct lb_vm_ident id = {.name = "t"};
    struct lb_error why = LB_ERROR_INIT;
    OK(lb_proc_identify(q.pid, &id.proc, err));
    assert_int_equal(lb_hv_attach(&lb_hv_qemu, &id, &second, &why), -1);
    assert_int_equal(why.code, LB_E_HV);
    assert_non_null(strstr(why.remedy, "close the other client"));
    lb_hv_detach(first);
    OK(lb_hv_attach(&lb_hv_qemu, &id, &second, err));
    lb_hv_detach(second);
    /* somebody else's socket */
    struct qemu other;
    qemu_dir(&other);
    qemu_start(&other, machines[0].args);
    id.qmp_path = other.qmp;
    assert_int_equal(lb_hv_attach(&lb_hv_qemu, &id, &second, &why), -1);
    assert_int_equal(why.code, LB_E_USAGE);
    assert_non_null(strstr(why.message, "belongs to process"));
    qemu_end(&other);
    /* no QEMU at all */
    assert_int_equal(lb_proc_identify(getpid(), &id.proc, NULL), 0);
    id.qmp_path = NULL;
    assert_int_equal(lb_hv_attach(&lb_hv_qemu, &id, &second, &why), -1);
    assert_int_equal(why.code, LB_E_NOT_FOUND);
    qemu_end(&q);
}

static void test_dies_midway(void **state)
{
    (void)state;
    struct qemu q;
    qemu_dir(&q);
    qemu_start(&q, machines[0].args);
    struct lb_hv_vm *vm = qemu_attach(&q);
    wait_guest(vm);
    OK(lb_hv_log_enable(vm, err));
    OK(lb_hv_stop(vm, err));
    kill(q.pid, SIGKILL);
    waitpid(q.pid, NULL, 0);
    q.pid = 0;
    struct lb_error why = LB_ERROR_INIT;
    uint64_t t0 = lb_now_ns();
    struct lb_bitmap dirty;
    const struct lb_ram_block *b = main_block(vm);
    OK(lb_bitmap_init(&dirty, b->size_bytes / LB_PAGE_SIZE, err));
    assert_int_equal(lb_hv_log_clean(vm, b, &dirty, &why), -1);
    assert_int_equal(why.code, LB_E_HV);
    static char page[4096];
    assert_int_equal(lb_hv_read(vm, b, 0, 1, page, &why), -1);
    assert_int_equal(why.code, LB_E_HV);
    assert_int_equal(lb_hv_cont(vm, &why), -1);
    assert_int_equal(why.code, LB_E_HV);
    assert_non_null(strstr(why.message, "died"));
    bool alive = true, running = true;
    OK(lb_hv_status(vm, &alive, &running, err));
    assert_false(alive);
    assert_true(ms_since(t0) < 2000);
    lb_bitmap_free(&dirty);
    OK(lb_hv_destroy(vm, err));
    qemu_end(&q);
}

/* CPU time of the whole process per wall time. */
static double cpu_share(pid_t pid)
{
    clockid_t clock;
    assert_int_equal(clock_getcpuclockid(pid, &clock), 0);
    struct timespec a, b;
    uint64_t t0 = lb_now_ns();
    assert_int_equal(clock_gettime(clock, &a), 0);
    usleep(700000);
    assert_int_equal(clock_gettime(clock, &b), 0);
    return ((double)(b.tv_sec - a.tv_sec) * 1e3 + (double)(b.tv_nsec - a.tv_nsec) / 1e6) / ms_since(t0);
}

/* Other work may take the processors for a while: only a share that stays low is a throttled one. */
static double share_above(pid_t pid, double least)
{
    double share = 0;
    for (unsigned i = 0; i < 20 && share <= least; i++)
        share = cpu_share(pid);
    return share;
}

static void test_throttle(void **state)
{
    (void)state;
    struct qemu q;
    qemu_dir(&q);
    qemu_start(&q, machines[0].args);
    struct lb_hv_vm *vm = qemu_attach(&q);
    char record[96];
    wait_guest(vm);
    lb_qemu_set_throttle_dir(q.dir);
    snprintf(record, sizeof(record), "%s/throttle-%d", q.dir, (int)q.pid);
    struct lb_error why = LB_ERROR_INIT;
    double full = cpu_share(q.pid);
    if (lb_hv_throttle(vm, 90, &why) < 0) {
        assert_int_equal(why.code, LB_E_UNSUPPORTED);
        print_message("no writable cpu cgroup here: %s\n", why.message);
        lb_hv_detach(vm);
        qemu_end(&q);
        skip();
    }
    assert_int_equal(access(record, F_OK), 0);
    double slow = cpu_share(q.pid);
    OK(lb_hv_throttle(vm, 0, err));
    assert_int_equal(access(record, F_OK), -1);
    double again = share_above(q.pid, 0.2);
    print_message("CPU: full %.2f, throttled by 90%% %.2f, again %.2f\n", full, slow, again);
    assert_true(slow < 0.2);
    assert_true(again > 0.2);
    /* what a dead daemon left is undone from the record */
    OK(lb_hv_throttle(vm, 90, err));
    OK(lb_qemu_throttle_undo(record, err));
    assert_true(share_above(q.pid, 0.2) > 0.2);
    lb_hv_detach(vm);
    qemu_end(&q);
}

/* A vCPU under KVM in real mode (all this needs of /dev/kvm) writes known pages of
 * this process's memory; the kernel's log of them is exact, absent pages included. */
#define KVM_PAGES 512u
static const unsigned char kvm_code[] = {
    /* 16 segments from 0x1000, 0x300 (three pages) apart: word 8 of each += 1 */
    0xb9, 0x10, 0x00,             /* mov cx,16 */
    0xb8, 0x00, 0x10,             /* mov ax,0x1000 */
    0x8e, 0xd8,                   /* l: mov ds,ax */
    0xff, 0x06, 0x08, 0x00,       /* inc word [8] */
    0x05, 0x00, 0x03,             /* add ax,0x300 */
    0xe2, 0xf5,                   /* loop l */
    0xf4,                         /* hlt */
};

static void test_kvm_exact(void **state)
{
    (void)state;
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (kvm < 0 || !lb_dirty_uffd.supported()) {
        print_message("no /dev/kvm or no userfaultfd WP_ASYNC here\n");
        skip();
    }
    size_t len = KVM_PAGES * 4096;
    char *ram = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_true(ram != MAP_FAILED);
    memcpy(ram, kvm_code, sizeof(kvm_code));
    int vmfd = ioctl(kvm, KVM_CREATE_VM, 0);
    assert_true(vmfd >= 0);
    struct kvm_userspace_memory_region mr = {.memory_size = len, .userspace_addr = (uintptr_t)ram};
    assert_int_equal(ioctl(vmfd, KVM_SET_USER_MEMORY_REGION, &mr), 0);
    int vcpu = ioctl(vmfd, KVM_CREATE_VCPU, 0);
    assert_true(vcpu >= 0);
    size_t run_len = (size_t)ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    struct kvm_run *run = mmap(NULL, run_len, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    assert_true(run != MAP_FAILED);

    /* the log of dirty_uffd.c, on ourselves: a handle made by hand, the descriptor ours already */
    int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | LB_UFFD_USER_MODE_ONLY);
    struct uffdio_api api = {.api = UFFD_API, .features = LB_UFFD_FEATURES};
    struct uffdio_register reg = {.range = {(uintptr_t)ram, len}, .mode = UFFDIO_REGISTER_MODE_WP};
    assert_int_equal(ioctl(uffd, UFFDIO_API, &api), 0);
    assert_int_equal(ioctl(uffd, UFFDIO_REGISTER, &reg), 0);
    struct lb_qemu_block blk = {.pub = {.size_bytes = len, .track_bytes = 4096, .hva = (uintptr_t)ram}};
    struct lb_hv_vm vm = {.proc = {.pid = getpid()},
                          .pagemap_fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC)};
    struct lb_bitmap dirty;
    OK(lb_bitmap_init(&dirty, KVM_PAGES, err));
    OK(lb_dirty_uffd.clean(&vm, &blk, &dirty, err));
    for (int round = 1; round <= 3; round++) {
        struct kvm_sregs sr;
        struct kvm_regs r = {.rflags = 2};
        assert_int_equal(ioctl(vcpu, KVM_GET_SREGS, &sr), 0);
        sr.cs.base = sr.cs.selector = 0;
        assert_int_equal(ioctl(vcpu, KVM_SET_SREGS, &sr), 0);
        assert_int_equal(ioctl(vcpu, KVM_SET_REGS, &r), 0);
        lb_bitmap_clear_all(&dirty);
        assert_int_equal(ioctl(vcpu, KVM_RUN, 0), 0);
        assert_int_equal(run->exit_reason, KVM_EXIT_HLT);
        OK(lb_dirty_uffd.clean(&vm, &blk, &dirty, err));
        assert_int_equal(lb_bitmap_count(&dirty), 16);
        for (unsigned i = 0; i < 16; i++) {
            assert_true(lb_bitmap_test(&dirty, 16 + 3 * i));
            assert_int_equal(*(uint16_t *)(void *)(ram + (16 + 3 * (size_t)i) * 4096 + 8), round);
        }
    }
    lb_bitmap_free(&dirty);
    close(vm.pagemap_fd);
    close(uffd);
    munmap(run, run_len);
    close(vcpu);
    close(vmfd);
    close(kvm);
    munmap(ram, len);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_blocks),
        cmocka_unit_test(test_log_exact),
        cmocka_unit_test(test_populated_is_complete),
        cmocka_unit_test(test_read_pages),
        cmocka_unit_test(test_stop_cont),
        cmocka_unit_test(test_inject_300),
        cmocka_unit_test(test_unprivileged_sandbox),
        cmocka_unit_test(test_busy_monitor),
        cmocka_unit_test(test_dies_midway),
        cmocka_unit_test(test_throttle),
        cmocka_unit_test(test_kvm_exact),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
