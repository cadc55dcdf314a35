/* What needs KVM: the dirty log of a running vCPU, and the guest's paravirtual clock.  The guest runs
 * in real mode only (kvmrom.S), which every /dev/kvm can do, also one that boots no Linux. */
#include "tests/integration/qemu_util.h"

#include <sched.h>

#include "core/qemu/qemu_internal.h"

/* kvmrom.S */
static const unsigned char rom_code[] = {
    0xfa, 0x66, 0xb9, 0x01, 0x4d, 0x56, 0x4b, 0x66, 0xb8, 0x01, 0x00, 0x01, 0x00, 0x66, 0x31,
    0xd2, 0x0f, 0x30, 0x66, 0x31, 0xdb, 0x66, 0x43, 0xb8, 0x00, 0x20, 0x8e, 0xd8, 0x66, 0x89,
    0x1e, 0x00, 0x00, 0x05, 0x00, 0x01, 0x3d, 0x00, 0x40, 0x72, 0xf1, 0xb8, 0x00, 0x10, 0x8e,
    0xd8, 0x0f, 0x31, 0x66, 0xa3, 0x00, 0x08, 0x66, 0x89, 0x16, 0x04, 0x08, 0xeb, 0xda,
};
static const unsigned char rom_reset[] = {0xea, 0x00, 0x00, 0x00, 0xf0}; /* jmp 0xf000:0 */
#define ROM_BYTES 65536
#define ROM_RESET_AT 0xfff0
#define CLOCK_PAGE 0x10u
#define TSC_AT 0x800u

/* What KVM writes into the guest's memory. */
struct pvclock {
    uint32_t version, pad0;
    uint64_t tsc_timestamp, system_time_ns;
    uint32_t tsc_to_system_mul;
    int8_t tsc_shift;
    uint8_t flags, pad[2];
};
_Static_assert(sizeof(struct pvclock) == 32, "the layout is KVM's");

static bool start(struct qemu *q)
{
    char path[96];
    unsigned char *rom = lb_alloc(ROM_BYTES);
    if (access("/dev/kvm", R_OK | W_OK) < 0) {
        print_message("no /dev/kvm here\n");
        free(rom);
        return false;
    }
    qemu_dir(q);
    snprintf(path, sizeof(path), "%s/rom.bin", q->dir);
    memcpy(rom, rom_code, sizeof(rom_code));
    memcpy(rom + ROM_RESET_AT, rom_reset, sizeof(rom_reset));
    OK(lb_file_write_atomic(path, rom, ROM_BYTES, 0644, err));
    free(rom);
    qemu_start(q, "-machine pc,accel=kvm -m 64 -nodefaults -display none -bios @D/rom.bin");
    return true;
}

/* What time it is in the guest, by what its own reading of the clock would give. */
static uint64_t guest_ns(struct lb_hv_vm *vm)
{
    static unsigned char page[4096];
    struct pvclock c, again;
    uint64_t tsc, check;
    for (int i = 0; i < 100000; i++) {
        OK(lb_hv_read(vm, main_block(vm), CLOCK_PAGE, 1, page, err));
        memcpy(&c, page, sizeof(c));
        memcpy(&tsc, page + TSC_AT, sizeof(tsc));
        OK(lb_hv_read(vm, main_block(vm), CLOCK_PAGE, 1, page, err));
        memcpy(&again, page, sizeof(again));
        memcpy(&check, page + TSC_AT, sizeof(check));
        if (!(c.version & 1) && memcmp(&c, &again, sizeof(c)) == 0 && c.tsc_to_system_mul &&
            tsc > c.tsc_timestamp && tsc >> 32 == check >> 32) {
            uint64_t d = tsc - c.tsc_timestamp;
            d = c.tsc_shift >= 0 ? d << c.tsc_shift : d >> -c.tsc_shift;
            return c.system_time_ns +
                   (uint64_t)((unsigned __int128)d * c.tsc_to_system_mul >> 32);
        }
        sched_yield();
    }
    fail_msg("the guest has no clock");
    return 0;
}

/* The guest's time minus ours, newest of some readings: the guest may have been slow to look. */
static double offset_ms(struct lb_hv_vm *vm)
{
    double best = -1e18;
    for (int i = 0; i < 50; i++) {
        double at = ((double)guest_ns(vm) - (double)lb_now_ns()) / 1e6;
        best = LB_MAX(best, at);
        usleep(1000);
    }
    return best;
}

/* Stop for about `ms`; the least and the most that the guest can have lost by it. */
static void pause_for(struct lb_hv_vm *vm, unsigned ms, double *least, double *most)
{
    uint64_t t0 = lb_now_ns();
    OK(lb_hv_stop(vm, err));
    uint64_t t1 = lb_now_ns();
    usleep(ms * 1000);
    *least = ms_since(t1);
    OK(lb_hv_cont(vm, err));
    *most = ms_since(t0);
}

static void expect_between(const char *what, double got, double least, double most)
{
    print_message("%s: %.2f ms (expected %.2f to %.2f)\n", what, got, least, most);
    assert_true(got > least - 2 && got < most + 2);
}

static void test_dirty_log(void **state)
{
    (void)state;
    struct qemu q;
    if (!start(&q))
        skip();
    struct lb_hv_vm *vm = qemu_attach(&q);
    wait_guest(vm);
    OK(lb_hv_log_enable(vm, err));
    OK(lb_hv_checkpoint_mode(vm, true, err));
    const struct lb_ram_block *b = main_block(vm);
    struct lb_bitmap dirty;
    OK(lb_bitmap_init(&dirty, b->size_bytes / LB_PAGE_SIZE, err));
    OK(lb_hv_stop(vm, err));
    OK(lb_hv_log_clean(vm, b, &dirty, err));
    for (int e = 0; e < 30; e++) {
        void *buf = NULL;
        size_t len;
        uint32_t before = counter(vm, BOOT_N_PAGES - 1);
        OK(lb_hv_cont(vm, err));
        while (counter(vm, BOOT_N_PAGES - 1) < before + 3)
            sched_yield();
        OK(lb_hv_stop(vm, err));
        OK(lb_hv_save_begin(vm, false, err));
        lb_bitmap_clear_all(&dirty);
        OK(lb_hv_log_clean(vm, b, &dirty, err)); /* while QEMU saves */
        OK(lb_hv_save_end(vm, &buf, &len, err));
        free(buf);
        assert_true(lb_bitmap_test(&dirty, CLOCK_PAGE));
        lb_bitmap_clear(&dirty, CLOCK_PAGE);
        assert_int_equal(lb_bitmap_count(&dirty), BOOT_N_PAGES);
        for (unsigned p = 0; p < BOOT_N_PAGES; p++)
            assert_true(lb_bitmap_test(&dirty, BOOT_FIRST_PAGE + p));
        lb_bitmap_clear_all(&dirty);
        OK(lb_hv_log_clean(vm, b, &dirty, err)); /* saving wrote nothing */
        assert_int_equal(lb_bitmap_count(&dirty), 0);
    }
    OK(lb_hv_cont(vm, err));
    lb_bitmap_free(&dirty);
    lb_hv_detach(vm);
    qemu_end(&q);
}

static void test_clock(void **state)
{
    (void)state;
    struct qemu q;
    if (!start(&q))
        skip();
    struct lb_hv_vm *vm = qemu_attach(&q);
    wait_guest(vm);
    uint64_t step = 500000000;
    double at = offset_ms(vm), now, least, most;
    OK(lb_hv_clock_step(vm, &step, err)); /* no start noted: as asked */
    assert_int_equal(step, 500000000);
    now = offset_ms(vm);
    expect_between("step by 500 ms", now - at, 500, 500);
    at = now;
    pause_for(vm, 200, &least, &most);
    now = offset_ms(vm);
    expect_between("lost by a pause of 200 ms", at - now, least, most);

    /* epochs: asked for is the pause as the caller sees it; done is what the guest has lost */
    double seen = 0, done = 0, cost = 0;
    OK(lb_hv_log_enable(vm, err));
    OK(lb_hv_checkpoint_mode(vm, true, err));
    at = offset_ms(vm);
    for (int e = 0; e < 100; e++) {
        void *buf = NULL;
        size_t len;
        uint64_t t0 = lb_now_ns();
        OK(lb_hv_stop(vm, err));
        OK(lb_hv_save_begin(vm, false, err));
        OK(lb_hv_save_end(vm, &buf, &len, err));
        OK(lb_hv_cont(vm, err));
        free(buf);
        step = lb_now_ns() - t0;
        seen += (double)step / 1e6;
        t0 = lb_now_ns();
        OK(lb_hv_clock_step(vm, &step, err));
        cost += (double)(lb_now_ns() - t0) / 1e3;
        done += (double)step / 1e6;
        usleep(5000);
    }
    now = offset_ms(vm);
    print_message("100 epochs: %.1f ms of pauses seen, %.1f lost and made up for; a step takes %.0f us\n",
                  seen, done, cost / 100);
    assert_true(done > 10 && done <= seen);
    expect_between("lost after them", at - now, 0, 0);

    /* a pause that nobody asks to make up for stays lost, now and later */
    pause_for(vm, 300, &least, &most);
    for (int i = 0; i < 3; i++) {
        step = 20000000;
        OK(lb_hv_clock_step(vm, &step, err));
        assert_true(i == 0 ? step == 20000000 : step < 1000000);
    }
    at = now;
    now = offset_ms(vm);
    expect_between("lost by 300 ms of which 20 were asked for", at - now, least - 20, most - 20);
    bool alive, running;
    OK(lb_hv_status(vm, &alive, &running, err));
    assert_true(alive && running);
    lb_hv_detach(vm);
    qemu_end(&q);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_dirty_log),
        cmocka_unit_test(test_clock),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
