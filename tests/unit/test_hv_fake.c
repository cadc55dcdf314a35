/* The fake guest, and through it the wrappers of core/hv.h: a whole pre-copy
 * migration, every fault, every misuse that must abort. */
#include "core/fake/fake.h"

#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <cmocka.h>

static const struct lb_fake_config busy = {
    .name = "web1",
    .ram_bytes = 8u << 20,
    .vram_bytes = 256u << 10,
    .touched_pages = 600,
    .rate_pages_per_s = 20000,
    .working_set_pages = 900,
};

static struct lb_hv_vm *attach(lb_fake_id id)
{
    char address[32];
    struct lb_vm_ident ident = {.name = "web1", .qmp_path = lb_fake_address(id, address)};
    struct lb_hv_vm *vm = NULL;
    assert_int_equal(lb_hv_attach(&lb_hv_fake, &ident, &vm, NULL), 0);
    assert_true(lb_fake_of(vm) == id);
    return vm;
}

static lb_fake_id start(const struct lb_fake_config *config)
{
    lb_fake_id id = 0;
    assert_int_equal(lb_fake_start(config, &id, NULL), 0);
    return id;
}

static uint64_t bad_pages(lb_fake_id id)
{
    uint64_t bad = UINT64_MAX;
    assert_int_equal(lb_fake_verify(id, &bad, NULL), 0);
    return bad;
}

/* One pass of the engine over the pages in `set`. */
static int copy(struct lb_hv_vm *src, const struct lb_ram_block *from, struct lb_hv_vm *dst,
                const struct lb_ram_block *to, const struct lb_bitmap *set, struct lb_error *err)
{
    static uint8_t buf[16 * LB_PAGE_SIZE];
    uint64_t at = 0, first, n;
    for (; lb_bitmap_next_run(set, at, 16, &first, &n); at = first + n) {
        if (from->map)
            memcpy(buf, (char *)from->map + first * LB_PAGE_SIZE, n * LB_PAGE_SIZE);
        else if (lb_hv_read(src, from, first, n, buf, err) < 0)
            return -1;
        if (to->map)
            memcpy((char *)to->map + first * LB_PAGE_SIZE, buf, n * LB_PAGE_SIZE);
        else if (lb_hv_write(dst, to, first, n, buf, err) < 0)
            return -1;
    }
    return 0;
}

struct options {
    unsigned rounds;
    bool skip_last_scan; /* the mistake that verify has to find */
    bool skip_prepare;   /* and another one */
};

/* A complete migration; on failure the source runs and nothing else is left. */
static int migrate(lb_fake_id id, const struct options *o, lb_fake_id *arrived,
                   struct lb_error *err)
{
    struct lb_vm_desc desc = {0};
    struct lb_launch_opts opts = {.name = "web1"};
    struct lb_hv_vm *src = NULL, *dst = NULL;
    const struct lb_ram_block *from, *to;
    struct lb_bitmap set[2] = {{0}};
    unsigned n_from, n_to;
    void *state = NULL;
    size_t len = 0;
    int rc = -1;
    char address[32];
    struct lb_vm_ident ident = {.qmp_path = lb_fake_address(id, address)};

    if (lb_hv_attach(&lb_hv_fake, &ident, &src, err) < 0)
        return -1;
    if (lb_hv_describe(src, &desc, err) < 0 || lb_hv_blocks(src, &from, &n_from, err) < 0 ||
        lb_hv_launch(&lb_hv_fake, &desc, &opts, &dst, err) < 0 ||
        lb_hv_blocks(dst, &to, &n_to, err) < 0)
        goto out;
    if (!o->skip_prepare && lb_hv_prepare_ram(dst, err) < 0)
        goto out;
    assert_int_equal(n_from, 2);
    assert_int_equal(n_to, 2);
    if (lb_hv_log_enable(src, err) < 0)
        goto out;
    for (unsigned i = 0; i < 2; i++) {
        if (lb_bitmap_init(&set[i], from[i].size_bytes / LB_PAGE_SIZE, err) < 0 ||
            lb_hv_populated(src, &from[i], &set[i], err) < 0)
            goto out;
        if (from[i].kind == LB_RAM_DEVICE)
            lb_bitmap_set_all(&set[i]);
    }
    for (unsigned round = 0; round <= o->rounds; round++) {
        bool last = round == o->rounds;
        for (unsigned i = 0; i < 2; i++)
            if (copy(src, &from[i], dst, &to[i], &set[i], err) < 0)
                goto out;
        lb_sleep_ms(3);
        if (lb_hv_log_peek(src, &from[0], 10, 100, &set[0], err) < 0 ||
            lb_hv_stop(src, err) < 0)
            goto out;
        for (unsigned i = 0; i < 2 && !(last && o->skip_last_scan); i++) {
            lb_bitmap_clear_all(&set[i]);
            if (lb_hv_log_clean(src, &from[i], &set[i], err) < 0)
                goto out;
        }
        if (!last && lb_hv_cont(src, err) < 0)
            goto out;
    }
    if (lb_hv_save_begin(src, true, err) < 0)
        goto out;
    for (unsigned i = 0; i < 2 && !o->skip_last_scan; i++) {
        if (copy(src, &from[i], dst, &to[i], &set[i], err) < 0) {
            lb_hv_save_end(src, &state, &len, NULL);
            goto out;
        }
    }
    if (lb_hv_save_end(src, &state, &len, err) < 0 ||
        lb_hv_load_state(dst, state, len, err) < 0 || lb_hv_run(dst, err) < 0)
        goto out;
    rc = lb_hv_announce(dst, NULL); /* too late to go back: tried once more instead */
    if (rc < 0)
        rc = lb_hv_announce(dst, err);
    *arrived = lb_fake_of(dst);
    lb_hv_detach(dst);
    dst = NULL;
    lb_hv_destroy(src, NULL);
    src = NULL;
out:
    if (dst)
        lb_hv_destroy(dst, NULL);
    if (src) {
        struct lb_error again = LB_ERROR_INIT;
        bool alive = false, running;
        /* faults are single: a second cont has to work unless the guest died */
        if (lb_hv_cont(src, NULL) < 0 && lb_hv_cont(src, &again) < 0) {
            assert_int_equal(lb_hv_status(src, &alive, &running, NULL), 0);
            assert_false(alive);
        }
        lb_hv_detach(src);
    }
    lb_vm_desc_free(&desc);
    lb_bitmap_free(&set[0]);
    lb_bitmap_free(&set[1]);
    free(state);
    return rc;
}

static void there_and_back(void **state)
{
    (void)state;
    for (int no_map = 0; no_map < 2; no_map++) {
        struct lb_fake_config config = busy;
        struct lb_fake_stats before, after;
        config.no_map = no_map;
        config.state_bytes = 100000;
        config.random_bytes = 1001;
        lb_fake_id id = start(&config);
        assert_int_equal(lb_fake_stats(id, &before, NULL), 0);
        for (int hop = 0; hop < 4; hop++) {
            lb_fake_id next = 0;
            struct lb_error err = LB_ERROR_INIT;
            if (migrate(id, &(struct options){.rounds = 3}, &next, &err) < 0)
                fail_msg("%s", err.message);
            assert_int_equal(bad_pages(next), 0);
            lb_sleep_ms(5);
            assert_int_equal(bad_pages(next), 0); /* and while it goes on writing */
            assert_int_equal(lb_fake_count(NULL), 1);
            assert_int_equal(lb_fake_running("web1"), 1);
            assert_int_equal(lb_fake_stats(next, &after, NULL), 0);
            assert_true(after.nonce == before.nonce);
            assert_true(after.writes > before.writes);
            assert_int_equal(after.announces, 1);
            before = after;
            id = next;
        }
        assert_int_equal(lb_fake_reset(), 1);
    }
}

/* The guest's check must be able to fail: leave out what a correct engine does. */
static void mistakes_are_found(void **state)
{
    (void)state;
    lb_fake_id next = 0;
    lb_fake_id id = start(&busy);
    assert_int_equal(
        migrate(id, &(struct options){.rounds = 2, .skip_last_scan = true}, &next, NULL), 0);
    assert_true(bad_pages(next) > 0);
    lb_fake_reset();

    struct lb_fake_config empty = {.name = "empty"};
    id = start(&empty);
    assert_int_equal(migrate(id, &(struct options){.skip_prepare = true}, &next, NULL), 0);
    assert_int_equal(bad_pages(next), 16);
    lb_fake_reset();

    id = start(&busy);
    struct lb_hv_vm *vm = attach(id);
    const struct lb_ram_block *blocks;
    unsigned n;
    assert_int_equal(lb_hv_stop(vm, NULL), 0);
    assert_int_equal(lb_hv_blocks(vm, &blocks, &n, NULL), 0);
    assert_int_equal(bad_pages(id), 0);
    ((uint8_t *)blocks[0].map)[5 * LB_PAGE_SIZE + 4095] ^= 1; /* one bit */
    assert_int_equal(bad_pages(id), 1);
    lb_hv_detach(vm);
    assert_int_equal(lb_fake_reset(), 1);
}

static void dirty_log(void **state)
{
    (void)state;
    struct lb_fake_config config = busy;
    config.rate_pages_per_s = 0;
    lb_fake_id id = start(&config);
    struct lb_hv_vm *vm = attach(id);
    const struct lb_ram_block *b;
    struct lb_bitmap ram, vram;
    unsigned n;
    assert_int_equal(lb_hv_blocks(vm, &b, &n, NULL), 0);
    assert_string_equal(b[0].name, "fake.ram");
    assert_string_equal(b[1].name, "fake.vram");
    assert_int_equal(b[0].kind, LB_RAM_MAIN);
    assert_int_equal(b[1].kind, LB_RAM_DEVICE);
    assert_int_equal(lb_bitmap_init(&ram, b[0].size_bytes / LB_PAGE_SIZE, NULL), 0);
    assert_int_equal(lb_bitmap_init(&vram, b[1].size_bytes / LB_PAGE_SIZE, NULL), 0);

    assert_int_equal(lb_hv_populated(vm, &b[0], &ram, NULL), 0);
    for (uint64_t i = 0; i < 600; i++)
        assert_true(lb_bitmap_test(&ram, i));
    assert_false(lb_bitmap_test(&ram, ram.n_bits - 1));
    lb_bitmap_clear_all(&ram);

    lb_fake_touch(id, 0, 3, NULL); /* before enable: not in the log */
    assert_int_equal(lb_hv_log_enable(vm, NULL), 0);
    lb_fake_touch(id, 0, 64, NULL);
    lb_fake_touch(id, 0, 65, NULL);
    lb_fake_touch(id, 0, 2047, NULL);
    lb_fake_touch(id, 1, 7, NULL);
    assert_int_equal(lb_hv_log_peek(vm, &b[0], 60, 5, &ram, NULL), 0);
    assert_int_equal(lb_bitmap_count(&ram), 1); /* 65 is outside of [60, 65) */
    assert_true(lb_bitmap_test(&ram, 4));       /* bit 0 is the first page asked for */
    assert_int_equal(lb_hv_log_peek(vm, &b[0], 100, 50, &ram, NULL), 0);
    assert_int_equal(lb_bitmap_count(&ram), 1);
    lb_bitmap_clear_all(&ram);
    assert_int_equal(lb_hv_log_peek(vm, &b[0], 0, ram.n_bits, &ram, NULL), 0);
    assert_int_equal(lb_bitmap_count(&ram), 3);
    lb_bitmap_clear_all(&ram);
    lb_bitmap_set(&ram, 1); /* clean ORs */
    assert_int_equal(lb_hv_stop(vm, NULL), 0);
    assert_int_equal(lb_hv_log_clean(vm, &b[0], &ram, NULL), 0);
    assert_int_equal(lb_hv_log_clean(vm, &b[1], &vram, NULL), 0);
    assert_int_equal(lb_bitmap_count(&ram), 4);
    assert_true(lb_bitmap_test(&ram, 1) && lb_bitmap_test(&ram, 64) && lb_bitmap_test(&ram, 2047));
    assert_int_equal(lb_bitmap_count(&vram), 1);
    lb_bitmap_clear_all(&ram);
    assert_int_equal(lb_hv_log_clean(vm, &b[0], &ram, NULL), 0);
    assert_int_equal(lb_bitmap_count(&ram), 0); /* forgotten */
    assert_int_equal(lb_hv_log_disable(vm, NULL), 0);
    lb_fake_touch(id, 0, 9, NULL);
    assert_int_equal(lb_hv_log_enable(vm, NULL), 0);
    assert_int_equal(lb_hv_log_clean(vm, &b[0], &ram, NULL), 0);
    assert_int_equal(lb_bitmap_count(&ram), 0);
    lb_bitmap_free(&ram);
    lb_bitmap_free(&vram);
    lb_hv_detach(vm);
    lb_fake_reset();
}

static uint64_t writes(lb_fake_id id)
{
    struct lb_fake_stats s;
    assert_int_equal(lb_fake_stats(id, &s, NULL), 0);
    return s.writes;
}

static void rate_and_stop(void **state)
{
    (void)state;
    lb_fake_id id = start(&busy);
    struct lb_hv_vm *vm = attach(id);
    uint64_t a = writes(id), t = lb_now_ns();
    lb_sleep_ms(200);
    double rate = (double)(writes(id) - a) * 1e9 / (double)(lb_now_ns() - t);
    assert_true(rate > 2000 && rate < 30000); /* 20000 asked for, on a busy machine */

    assert_int_equal(lb_hv_throttle(vm, 90, NULL), 0);
    lb_sleep_ms(2);
    a = writes(id), t = lb_now_ns();
    lb_sleep_ms(200);
    rate = (double)(writes(id) - a) * 1e9 / (double)(lb_now_ns() - t);
    assert_true(rate > 200 && rate < 3000);
    assert_int_equal(lb_hv_throttle(vm, 0, NULL), 0);

    bool alive, running;
    assert_int_equal(lb_hv_stop(vm, NULL), 0);
    a = writes(id);
    lb_sleep_ms(50);
    assert_true(writes(id) == a);
    assert_int_equal(lb_hv_status(vm, &alive, &running, NULL), 0);
    assert_true(alive && !running);
    assert_int_equal(lb_hv_stop(vm, NULL), 0); /* may be repeated */
    assert_int_equal(lb_hv_cont(vm, NULL), 0);
    assert_int_equal(lb_hv_cont(vm, NULL), 0);
    lb_sleep_ms(50);
    assert_true(writes(id) > a);
    lb_fake_set_rate(id, 10, NULL); /* a slow rate is not rounded to nothing */
    lb_sleep_ms(5);
    a = writes(id);
    lb_sleep_ms(450);
    assert_true(writes(id) - a >= 2 && writes(id) - a <= 6);
    lb_hv_throttle(vm, 50, NULL);
    lb_hv_stop(vm, NULL);
    lb_hv_detach(vm);
    struct lb_fake_stats s;
    lb_fake_stats(id, &s, NULL);
    assert_int_equal(s.throttle_percent, 0);
    assert_false(s.running);
    vm = attach(id); /* a paused guest is attached as such: clean is allowed at once */
    assert_int_equal(lb_hv_log_enable(vm, NULL), 0);
    assert_int_equal(lb_hv_destroy(vm, NULL), 0);
    assert_int_equal(lb_fake_reset(), 0);
}

static void names_and_handles(void **state)
{
    (void)state;
    struct lb_error err = LB_ERROR_INIT;
    struct lb_hv_vm *vm = NULL, *second = NULL;
    struct lb_vm_ident ident = {.name = "web1"}, who;
    assert_int_equal(lb_hv_attach(&lb_hv_fake, &ident, &vm, &err), -1);
    assert_int_equal(err.code, LB_E_NOT_FOUND);
    lb_fake_id a = start(&busy);
    assert_int_equal(lb_hv_attach(&lb_hv_fake, &ident, &vm, &err), 0);
    assert_int_equal(lb_hv_attach(&lb_hv_fake, &ident, &second, &err), -1);
    assert_int_equal(err.code, LB_E_STATE); /* one handle at a time */
    lb_hv_ident(vm, &who);
    assert_string_equal(who.name, "web1");
    assert_int_equal(who.proc.pid, getpid());
    assert_true(lb_proc_alive(&who.proc));
    char address[32];
    assert_string_equal(who.qmp_path, lb_fake_address(a, address));
    lb_hv_detach(vm);
    lb_hv_detach(NULL);
    start(&busy);
    assert_int_equal(lb_hv_attach(&lb_hv_fake, &ident, &vm, &err), -1);
    assert_int_equal(err.code, LB_E_STATE); /* two of that name */
    lb_hv_detach(attach(a));
    struct lb_vm_ident by_address = {.qmp_path = address}; /* without a handle */
    assert_true(lb_hv_exists(&lb_hv_fake, &by_address));
    assert_int_equal(lb_hv_end(&lb_hv_fake, &by_address, &err), 0);
    assert_false(lb_hv_exists(&lb_hv_fake, &by_address));
    assert_int_equal(lb_hv_end(&lb_hv_fake, &by_address, &err), 0);
    assert_int_equal(lb_fake_kill(a, &err), -1);
    assert_int_equal(err.code, LB_E_NOT_FOUND);
    assert_int_equal(lb_hv_attach(&lb_hv_fake, &ident, &vm, &err), 0);
    lb_hv_detach(vm);
    assert_int_equal(lb_fake_reset(), 1);
}

static void bad_input(void **state)
{
    (void)state;
    struct lb_error err = LB_ERROR_INIT;
    lb_fake_id id = start(&busy);
    struct lb_hv_vm *src = attach(id), *dst = NULL;
    struct lb_launch_opts opts = {.name = "copy"};
    struct lb_vm_desc d = {0};
    uint8_t *blob;
    size_t len;
    assert_int_equal(lb_hv_describe(src, &d, NULL), 0);

    char *keep = d.hypervisor;
    d.hypervisor = (char[]){"qemu"};
    assert_int_equal(lb_hv_launch(&lb_hv_fake, &d, &opts, &dst, &err), -1);
    assert_int_equal(err.code, LB_E_UNSUPPORTED);
    d.hypervisor = keep;
    uint64_t ram = d.ram_bytes;
    const uint64_t sizes[] = {0, 4095, UINT64_MAX, UINT64_MAX - 4095};
    for (size_t i = 0; i < LB_ARRAY_LEN(sizes); i++) {
        d.ram_bytes = sizes[i];
        assert_int_equal(lb_hv_launch(&lb_hv_fake, &d, &opts, &dst, &err), -1);
        assert_int_equal(err.code, LB_E_PROTO);
    }
    d.ram_bytes = ram;
    keep = d.argv[1];
    d.argv[1] = (char[]){"vram_bytes=-4096"};
    assert_int_equal(lb_hv_launch(&lb_hv_fake, &d, &opts, &dst, &err), -1);
    assert_int_equal(err.code, LB_E_PROTO);
    d.argv[1] = keep;
    assert_int_equal(lb_fake_count(NULL), 1); /* nothing left of the refused */

    assert_int_equal(lb_hv_launch(&lb_hv_fake, &d, &opts, &dst, &err), 0);
    assert_int_equal(lb_hv_stop(src, NULL), 0);
    assert_int_equal(lb_hv_save_begin(src, false, NULL), 0);
    assert_int_equal(lb_hv_save_end(src, (void **)&blob, &len, NULL), 0);
    for (size_t cut = 0; cut < len; cut += len / 7)
        assert_int_equal(lb_hv_load_state(dst, blob, cut, &err), -1);
    for (size_t at = 0; at < len; at += len / 50) {
        blob[at] ^= 0x10;
        err.code = LB_OK;
        assert_int_equal(lb_hv_load_state(dst, blob, len, &err), -1);
        assert_int_equal(err.code, LB_E_PROTO);
        blob[at] ^= 0x10;
    }
    assert_int_equal(lb_hv_load_state(dst, blob, len, &err), 0);
    free(blob);
    /* not a final save: the source has the disk still */
    assert_int_equal(lb_hv_run(dst, &err), -1);
    assert_int_equal(err.code, LB_E_HV);
    assert_int_equal(lb_hv_save_begin(src, true, NULL), 0);
    assert_int_equal(lb_hv_save_end(src, (void **)&blob, &len, NULL), 0);
    free(blob);
    assert_int_equal(lb_hv_run(dst, &err), 0);
    assert_int_equal(lb_hv_cont(src, &err), -1); /* and now it cannot come back */
    assert_non_null(strstr(err.message, "write lock"));
    assert_int_equal(lb_fake_running(NULL), 1);
    assert_int_equal(lb_hv_destroy(dst, NULL), 0);
    assert_int_equal(lb_hv_cont(src, &err), 0);
    lb_hv_detach(src);
    lb_vm_desc_free(&d);
    lb_vm_desc_free(NULL);
    lb_fake_reset();
}

/* Fail, then kill, each call of each slot in turn: exactly one guest runs in the
 * end with every page right (none when it was killed), and nothing is left. */
static void sweep(bool die)
{
    const struct options o = {.rounds = 1};
    struct lb_fake_config config = busy;
    lb_fake_id next;
    uint64_t calls[LB_FAKE_N_SLOTS];
    unsigned faults = 0;

    config.ram_bytes = 1u << 20;
    config.touched_pages = 100;
    config.working_set_pages = 0;
    config.no_map = true;
    lb_fake_reset();
    lb_fake_id id = start(&config);
    assert_int_equal(migrate(id, &o, &next, NULL), 0);
    for (int s = 0; s < LB_FAKE_N_SLOTS; s++)
        calls[s] = lb_fake_calls((enum lb_fake_slot)s);
    assert_int_equal(lb_fake_reset(), 1);

    for (int s = 0; s < LB_FAKE_N_SLOTS; s++) {
        enum lb_fake_slot slot = (enum lb_fake_slot)s;
        if (slot == LB_FAKE_THROTTLE || slot == LB_FAKE_STATUS || slot >= LB_FAKE_DESTROY ||
            slot == LB_FAKE_LOG_DISABLE) /* not part of this migration, or after it */
            continue;
        if (die && (slot == LB_FAKE_ATTACH || slot == LB_FAKE_LAUNCH))
            continue;
        assert_true(calls[s] > 0);
        for (unsigned nth = 1; nth <= LB_MIN(calls[s], 12u); nth++, faults++) {
            struct lb_error err = LB_ERROR_INIT;
            id = start(&config);
            if (die)
                lb_fake_die(slot, nth);
            else
                lb_fake_fail(slot, nth, LB_E_HV);
            next = id;
            int rc = migrate(id, &o, &next, &err);
            if (lb_fake_calls(slot) < nth) /* fewer pages this time */
                assert_int_equal(rc, 0);
            else if (!die && slot != LB_FAKE_ANNOUNCE)
                assert_int_equal(rc, -1);
            if (rc < 0)
                assert_int_equal(err.code, LB_E_HV);
            unsigned left = lb_fake_count(NULL);
            assert_true(die ? left <= 1 : left == 1);
            assert_int_equal(lb_fake_running(NULL), left);
            if (left == 1) {
                assert_int_equal(bad_pages(rc < 0 ? id : next), 0);
                struct lb_fake_stats s2;
                lb_fake_stats(rc < 0 ? id : next, &s2, NULL);
                assert_false(s2.attached);
            }
            assert_int_equal(lb_fake_reset(), left);
        }
    }
    assert_true(faults > 40);
}

static void every_fault(void **state)
{
    (void)state;
    sweep(false);
}

static void every_death(void **state)
{
    (void)state;
    sweep(true);
}

static void fault_hooks(void **state)
{
    (void)state;
    struct lb_error err = LB_ERROR_INIT;
    bool alive, running;
    lb_fake_id id = start(&busy);
    struct lb_hv_vm *vm = attach(id);
    lb_fake_fail(LB_FAKE_STOP, 2, LB_E_NET);
    assert_int_equal(lb_hv_stop(vm, &err), 0);
    assert_int_equal(lb_hv_stop(vm, &err), -1);
    assert_int_equal(err.code, LB_E_NET);
    assert_int_equal(lb_hv_stop(vm, &err), 0);
    assert_int_equal(lb_fake_calls(LB_FAKE_STOP), 3);
    lb_fake_delay(LB_FAKE_CONT, 40);
    uint64_t t = lb_now_ns();
    assert_int_equal(lb_hv_cont(vm, &err), 0);
    assert_true(lb_now_ns() - t >= 40000000);
    lb_fake_fail(LB_FAKE_STATUS, 1, LB_E_HV);
    assert_int_equal(lb_hv_status(vm, &alive, &running, &err), -1);
    assert_int_equal(lb_fake_kill(id, NULL), 0);
    assert_int_equal(lb_hv_status(vm, &alive, &running, &err), 0);
    assert_false(alive || running);
    assert_int_equal(lb_hv_stop(vm, &err), -1);
    assert_int_equal(err.code, LB_E_HV);
    assert_int_equal(lb_fake_count(NULL), 0);
    lb_fake_fail(LB_FAKE_DESTROY, 1, LB_E_HV);
    assert_int_equal(lb_hv_destroy(vm, &err), -1); /* freed all the same */
    assert_int_equal(lb_fake_reset(), 0);
    for (int a = 0; a < LB_FAKE_N_SLOTS; a++)
        for (int b = 0; b < a; b++)
            assert_string_not_equal(lb_fake_slot_name((enum lb_fake_slot)a),
                                    lb_fake_slot_name((enum lb_fake_slot)b));
}

/* ---- checkpoints: card, disk, freeze, clock */

struct wire {
    uint64_t last, nonce;
    _Atomic uint64_t count, from;
    bool gap;
};

static void on_wire(lb_fake_id from, const void *frame, size_t len, void *arg)
{
    struct wire *w = arg;
    uint64_t seq;
    if (!lb_fake_frame_parse(frame, len, &w->nonce, &seq) || seq != w->last + 1)
        w->gap = true;
    w->last = seq;
    w->count++;
    w->from = from;
}

static const struct lb_fake_config with_io = {
    .name = "web1", .ram_bytes = 1u << 20, .vram_bytes = 64u << 10, .touched_pages = 10,
    .nic = true, .disk_bytes = 1u << 20,
};

/* What came out of the card, `n` frames at most, without waiting. */
static unsigned take_frames(int fd, uint8_t frames[][4 + LB_FAKE_FRAME_BYTES], unsigned max)
{
    unsigned n = 0;
    while (n < max && recv(fd, frames[n], sizeof(frames[n]), MSG_DONTWAIT) ==
                          (ssize_t)sizeof(frames[n])) {
        assert_int_equal(frames[n][3], LB_FAKE_FRAME_BYTES);
        n++;
    }
    return n;
}

static void card(void **state)
{
    (void)state;
    static uint8_t kept[64][4 + LB_FAKE_FRAME_BYTES];
    struct wire w = {0};
    struct lb_error err = LB_ERROR_INIT;
    lb_fake_id id = start(&with_io);
    struct lb_hv_vm *vm = attach(id);
    struct lb_nic *nics;
    unsigned n;
    int fds[2];
    lb_fake_set_wire(on_wire, &w);
    assert_int_equal(lb_hv_nics(vm, &nics, &n, NULL), 0);
    assert_int_equal(n, 1);
    assert_string_equal(nics[0].id, "net0");
    assert_int_equal(nics[0].kind, LB_NIC_INSIDE);
    free(nics);
    assert_int_equal(lb_fake_send(id, NULL), 0);
    assert_int_equal(w.count, 1); /* not held: it leaves */

    assert_int_equal(lb_hv_nic_hold(vm, "net1", fds, &err), -1);
    assert_int_equal(err.code, LB_E_NOT_FOUND);
    assert_int_equal(lb_hv_nic_hold(vm, "net0", fds, NULL), 0);
    for (int i = 0; i < 20; i++)
        assert_int_equal(lb_fake_send(id, NULL), 0);
    assert_int_equal(w.count, 1); /* held */
    assert_int_equal(take_frames(fds[0], kept, 64), 20);
    assert_int_equal(lb_write_all(fds[1], kept, 12 * sizeof(kept[0]), NULL), 0);
    for (int i = 0; i < 1000 && w.count < 13; i++)
        lb_sleep_ms(1);
    assert_int_equal(w.count, 13);

    /* a frozen hypervisor lets nothing out, even when it is released */
    assert_int_equal(lb_hv_freeze(vm, true, NULL), 0);
    assert_int_equal(lb_write_all(fds[1], kept + 12, 4 * sizeof(kept[0]), NULL), 0);
    lb_sleep_ms(20);
    assert_int_equal(w.count, 13);
    assert_int_equal(lb_fake_running(NULL), 0);
    assert_int_equal(lb_hv_stop(vm, &err), -1);
    assert_int_equal(err.code, LB_E_HV);
    assert_int_equal(lb_hv_freeze(vm, false, NULL), 0);
    assert_int_equal(lb_fake_running(NULL), 1);

    assert_int_equal(lb_hv_nic_unhold(vm, "net0", &err), -1); /* not while it runs */
    assert_int_equal(err.code, LB_E_STATE);

    /* unhold: the rest goes first, then what is sent directly */
    assert_int_equal(lb_hv_stop(vm, NULL), 0);
    assert_int_equal(lb_write_all(fds[1], kept + 16, 4 * sizeof(kept[0]), NULL), 0);
    assert_int_equal(lb_hv_nic_unhold(vm, "net0", NULL), 0);
    assert_int_equal(w.count, 21);
    assert_int_equal(lb_fake_send(id, NULL), 0);
    assert_int_equal(w.count, 22);
    assert_false(w.gap);
    close(fds[0]);
    close(fds[1]);

    /* a holder that is gone: dropped, not leaked; one that does not read: counted */
    struct lb_fake_stats st;
    assert_int_equal(lb_hv_nic_hold(vm, "net0", fds, NULL), 0);
    close(fds[0]);
    close(fds[1]);
    assert_int_equal(lb_fake_send(id, NULL), 0);
    assert_int_equal(w.count, 22);
    assert_int_equal(lb_hv_nic_hold(vm, "net0", fds, NULL), 0); /* a new one takes over */
    int rc = 0;
    for (int i = 0; i < 100000 && rc == 0; i++)
        rc = lb_fake_send(id, NULL);
    assert_int_equal(rc, -1);
    assert_int_equal(lb_fake_stats(id, &st, NULL), 0);
    assert_true(st.nic_held && st.frames_blocked == 1 && st.frames_dropped == 1);
    /* death: what was released a moment before stays inside */
    assert_int_equal(lb_fake_kill(id, NULL), 0);
    assert_int_equal(w.count, 22);
    close(fds[0]);
    close(fds[1]);
    assert_int_equal(lb_hv_destroy(vm, NULL), 0);
    lb_fake_reset();
}

struct image {
    uint8_t bytes[1u << 20];
    _Atomic int fail_after;
};

static int on_mirror(lb_fake_id from, const char *sock, const char *name, uint64_t offset,
                     const void *data, size_t len, void *arg)
{
    struct image *im = arg;
    (void)from;
    if (strcmp(sock, "nbd.sock") || strcmp(name, "0") || im->fail_after-- == 0)
        return -1;
    memcpy(im->bytes + offset, data, len);
    return 0;
}

static void mirrored_disk(void **state)
{
    (void)state;
    static struct image im;
    static uint8_t want[sizeof(im.bytes)];
    struct lb_fake_config c = with_io;
    struct lb_mirror_status ms;
    struct lb_fake_stats st;
    struct lb_error err = LB_ERROR_INIT;
    c.disk_writes_per_s = 5000;
    lb_fake_id id = start(&c);
    struct lb_hv_vm *vm = attach(id);
    struct lb_hv_disk *disks;
    unsigned n;
    assert_int_equal(lb_hv_disks(vm, &disks, &n, NULL), 0);
    assert_int_equal(n, 1);
    assert_true(disks[0].size_bytes == 1u << 20);
    free(disks);
    im.fail_after = -1;
    lb_fake_set_mirror(on_mirror, &im);
    assert_int_equal(lb_hv_disk_mirror_status(vm, "disk0", true, &ms, &err), -1);
    lb_sleep_ms(20); /* some writes before the mirror: in the first copy */
    assert_int_equal(lb_hv_disk_mirror(vm, "disk0", "nbd.sock", "0", NULL), 0);
    assert_int_equal(lb_hv_disk_mirror(vm, "disk0", "nbd.sock", "0", &err), -1);
    assert_int_equal(err.code, LB_E_EXISTS);
    for (int i = 0; i < 10; i++) {
        lb_sleep_ms(5);
        assert_int_equal(lb_hv_stop(vm, NULL), 0);
        assert_int_equal(lb_fake_stats(id, &st, NULL), 0);
        lb_fake_disk_fill(want, sizeof(want), st.nonce, st.disk_writes);
        assert_memory_equal(im.bytes, want, sizeof(want));
        assert_int_equal(lb_hv_cont(vm, NULL), 0);
    }
    assert_true(st.disk_writes > 20 && st.mirroring);
    assert_int_equal(lb_hv_disk_mirror_status(vm, "disk0", false, &ms, NULL), 0);
    assert_true(ms.ready && !ms.failed);
    im.fail_after = 0;
    for (int i = 0; i < 2000 && !ms.failed; i++) {
        lb_sleep_ms(1);
        assert_int_equal(lb_hv_disk_mirror_status(vm, "disk0", false, &ms, NULL), 0);
    }
    assert_true(ms.failed && !ms.ready && ms.error[0]);
    assert_int_equal(lb_hv_disk_mirror_end(vm, "disk0", NULL), 0);
    assert_int_equal(lb_hv_disk_mirror_end(vm, "disk0", NULL), 0);
    lb_hv_detach(vm);
    lb_fake_reset();
}

static int count_to(uint64_t done, uint64_t total, void *arg)
{
    assert_true(done <= total);
    ++*(int *)arg;
    return 0;
}

static int stop_at_once(uint64_t done, uint64_t total, void *arg)
{
    (void)done, (void)total, (void)arg;
    return -1;
}

static uint64_t writes_of(lb_fake_id id, const char *image)
{
    uint64_t n = 0;
    struct lb_error err = LB_ERROR_INIT;
    if (lb_fake_image(id, image, &n, &err) < 0)
        fail_msg("%s", err.message);
    return n;
}

/* One moment of the disk; returns how many writes it holds. */
static uint64_t freeze_to(struct lb_hv_vm *vm, lb_fake_id id, const char *overlay)
{
    struct lb_fake_stats st;
    assert_int_equal(lb_fake_stats(id, &st, NULL), 0);
    for (uint64_t had = st.disk_writes; st.disk_writes < had + 3; lb_sleep_ms(1))
        assert_int_equal(lb_fake_stats(id, &st, NULL), 0);
    assert_int_equal(lb_hv_disk_overlay(vm, "disk0", overlay, NULL), 0);
    assert_int_equal(lb_hv_stop(vm, NULL), 0);
    assert_int_equal(lb_hv_disk_freeze(vm, NULL), 0);
    assert_int_equal(lb_fake_stats(id, &st, NULL), 0);
    assert_int_equal(lb_hv_cont(vm, NULL), 0);
    return st.disk_writes;
}

static void frozen_disk(void **state)
{
    (void)state;
    struct lb_fake_config c = with_io;
    struct lb_error err = LB_ERROR_INIT;
    struct lb_hv_disk *disks;
    char dir[] = "/tmp/lbf.XXXXXX";
    unsigned n;
    int ticks = 0;
    uint64_t at[4], writes;
    assert_non_null(mkdtemp(dir));
    LB_AUTO_FREE char *base = lb_asprintf("%s/a", dir);
    char *over[4];
    for (unsigned i = 0; i < 4; i++)
        over[i] = lb_asprintf("%s/a.%u", dir, i);
    c.disk_writes_per_s = 5000;
    c.disk_path = base;
    lb_fake_id id = start(&c);
    struct lb_hv_vm *vm = attach(id);

    /* made ready and dropped: nothing happened */
    assert_int_equal(lb_hv_disk_overlay(vm, "disk0", over[0], NULL), 0);
    assert_int_equal(lb_hv_disk_overlay(vm, "disk0", over[1], &err), -1);
    assert_int_equal(err.code, LB_E_EXISTS);
    lb_hv_disk_overlay_drop(vm);
    assert_int_equal(access(over[0], F_OK), -1);

    for (unsigned i = 0; i < 4; i++)
        at[i] = freeze_to(vm, id, over[i]);
    assert_int_equal(lb_hv_disks(vm, &disks, &n, NULL), 0);
    assert_string_equal(disks[0].path, over[3]);
    assert_string_equal(disks[0].format, "qcow2");
    free(disks);
    assert_true(writes_of(id, base) == at[0] && writes_of(id, over[0]) == at[1] && at[0] < at[1]);
    assert_true(writes_of(id, over[2]) == at[3] && writes_of(id, over[3]) >= at[3]);

    assert_int_equal(lb_hv_disk_join(vm, "disk0", over[1], over[0], stop_at_once, NULL, &err), -1);
    assert_int_equal(err.code, LB_E_CANCELLED);
    assert_int_equal(lb_hv_disk_join(vm, "disk0", base, over[0], NULL, NULL, &err), -1);
    assert_int_equal(err.code, LB_E_NOT_FOUND);
    assert_int_equal(lb_hv_disk_join(vm, "disk0", over[1], over[0], count_to, &ticks, NULL), 0);
    assert_true(ticks > 1);
    assert_true(writes_of(id, over[0]) == at[2] && writes_of(id, base) == at[0]);
    assert_int_equal(lb_fake_image(id, over[1], &writes, &err), -1);
    assert_int_equal(lb_hv_disk_join(vm, "disk0", over[3], base, NULL, NULL, NULL), 0);
    assert_int_equal(lb_hv_disks(vm, &disks, &n, NULL), 0);
    assert_string_equal(disks[0].path, base);
    assert_string_equal(disks[0].format, "raw");
    free(disks);
    assert_true(writes_of(id, base) >= at[3]);
    lb_hv_detach(vm);
    lb_fake_reset();
    for (unsigned i = 0; i < 4; i++)
        free(over[i]);
    lb_remove_tree(dir, NULL);
}

/* Card and disk of a copy go on where the state says; each copy may run: no lock. */
static void io_travels(void **state)
{
    (void)state;
    struct wire w = {0};
    struct lb_fake_stats before, after;
    struct lb_fake_config c = with_io;
    c.frames_per_s = 2000;
    c.disk_writes_per_s = 2000;
    lb_fake_id id = start(&c), next = 0;
    lb_fake_set_wire(on_wire, &w);
    for (int i = 0; i < 2000 && w.count < 5; i++)
        lb_sleep_ms(1);
    assert_int_equal(migrate(id, &(struct options){.rounds = 1}, &next, NULL), 0);
    assert_int_equal(lb_fake_stats(next, &before, NULL), 0);
    for (int i = 0; i < 2000 && w.from != next; i++)
        lb_sleep_ms(1);
    assert_int_equal(lb_fake_stats(next, &after, NULL), 0);
    assert_true(after.frames >= before.frames && before.frames > 5 && before.disk_writes > 0);
    lb_fake_reset();
    assert_true(w.from == next && !w.gap);
}

static void clock_and_mode(void **state)
{
    (void)state;
    struct lb_fake_stats st;
    struct lb_error err = LB_ERROR_INIT;
    lb_fake_id id = start(&busy);
    struct lb_hv_vm *vm = attach(id);
    struct lb_nic *nics;
    unsigned n;
    assert_int_equal(lb_hv_nics(vm, &nics, &n, NULL), 0);
    assert_int_equal(n, 0);
    free(nics);
    uint64_t step = 5;
    assert_int_equal(lb_hv_clock_step(vm, &step, NULL), 0);
    step = 7;
    assert_int_equal(lb_hv_clock_step(vm, &step, NULL), 0);
    assert_true(step == 7);
    assert_int_equal(lb_hv_checkpoint_mode(vm, true, NULL), 0);
    assert_int_equal(lb_fake_stats(id, &st, NULL), 0);
    assert_true(st.clock_stepped_ns == 12 && st.checkpoint_mode);
    uint64_t a;
    assert_int_equal(lb_hv_freeze(vm, true, NULL), 0);
    a = writes(id);
    lb_sleep_ms(30);
    assert_true(writes(id) == a); /* frozen, though never stopped */
    assert_int_equal(lb_hv_freeze(vm, false, NULL), 0);
    for (int i = 0; i < 1000 && writes(id) == a; i++)
        lb_sleep_ms(1);
    assert_true(writes(id) > a);
    lb_hv_detach(vm);
    lb_fake_reset();
    struct lb_fake_config c = busy;
    c.no_clock = true;
    vm = attach(start(&c));
    assert_int_equal(lb_hv_clock_step(vm, &step, &err), -1);
    assert_int_equal(err.code, LB_E_UNSUPPORTED);
    lb_hv_detach(vm);
    lb_fake_reset();
}

/* ------------------------------------------------------------ lazy memory */

struct lazy_server {
    struct lb_hv_vm *vm;
    const uint8_t *image; /* what fake.ram held */
    _Atomic bool stop;
    _Atomic unsigned faults;
    pthread_t thread;
};

static void *serve(void *arg)
{
    struct lazy_server *s = arg;
    while (!s->stop) {
        const struct lb_ram_block *b;
        uint64_t page, placed = 9;
        int got = lb_hv_lazy_fault(s->vm, 5, &b, &page, NULL);
        assert_true(got >= 0);
        if (got == 0)
            continue;
        s->faults++;
        assert_int_equal(lb_hv_lazy_place(s->vm, b, page, 1, s->image + page * LB_PAGE_SIZE, &placed, NULL), 0);
        assert_true(placed <= 1);
    }
    return NULL;
}

static void serve_start(struct lazy_server *s, struct lb_hv_vm *vm, const uint8_t *image)
{
    *s = (struct lazy_server){.vm = vm, .image = image};
    assert_int_equal(pthread_create(&s->thread, NULL, serve, s), 0);
}

static void serve_stop(struct lazy_server *s)
{
    s->stop = true;
    pthread_join(s->thread, NULL);
}

/* A guest saved into image and state, and gone; its receiver. */
static struct lb_hv_vm *save_and_launch(uint8_t **image, void **state, size_t *len)
{
    lb_fake_id id = start(&busy);
    struct lb_hv_vm *src = attach(id), *dst = NULL;
    const struct lb_ram_block *b, *d;
    struct lb_vm_desc desc;
    unsigned n;
    lb_sleep_ms(20);
    assert_int_equal(lb_hv_describe(src, &desc, NULL), 0);
    assert_int_equal(lb_hv_stop(src, NULL), 0);
    assert_int_equal(lb_hv_save_begin(src, false, NULL), 0);
    assert_int_equal(lb_hv_save_end(src, state, len, NULL), 0);
    assert_int_equal(lb_hv_blocks(src, &b, &n, NULL), 0);
    *image = malloc(b[0].size_bytes);
    assert_int_equal(lb_hv_read(src, &b[0], 0, b[0].size_bytes / LB_PAGE_SIZE, *image, NULL), 0);
    struct lb_launch_opts opts = {.name = "web1", .run_dir = "/nonexistent"};
    assert_int_equal(lb_hv_launch(&lb_hv_fake, &desc, &opts, &dst, NULL), 0);
    assert_int_equal(lb_hv_blocks(dst, &d, &n, NULL), 0);
    assert_non_null(d[0].map);
    assert_int_equal(lb_hv_lazy_begin(dst, NULL), 0);
    assert_null(d[0].map);
    memcpy(d[1].map, b[1].map, b[1].size_bytes);
    assert_int_equal(lb_hv_destroy(src, NULL), 0);
    lb_vm_desc_free(&desc);
    return dst;
}

/* A clone: main memory is what a memfd holds, and its own from then on. */
static void shared_memory(void **state_)
{
    (void)state_;
    lb_fake_id id = start(&busy);
    struct lb_hv_vm *src = attach(id), *dst = NULL;
    const struct lb_ram_block *b, *d;
    struct lb_vm_desc desc;
    struct lb_error err = LB_ERROR_INIT;
    void *state;
    size_t len;
    unsigned n;
    assert_int_equal(lb_hv_describe(src, &desc, NULL), 0);
    assert_int_equal(lb_hv_stop(src, NULL), 0);
    assert_int_equal(lb_hv_save_begin(src, false, NULL), 0);
    assert_int_equal(lb_hv_save_end(src, &state, &len, NULL), 0);
    assert_int_equal(lb_hv_blocks(src, &b, &n, NULL), 0);
    int fd = memfd_create("shared", MFD_CLOEXEC);
    assert_int_equal(write(fd, b[0].map, b[0].size_bytes), b[0].size_bytes);
    struct lb_launch_opts opts = {.name = "clone", .run_dir = "/nonexistent", .shared_memory_fd = fd};
    assert_int_equal(lb_hv_launch(&lb_hv_fake, &desc, &opts, &dst, NULL), 0);
    close(fd);
    assert_int_equal(lb_hv_lazy_begin(dst, &err), -1);
    assert_int_equal(err.code, LB_E_UNSUPPORTED);
    assert_int_equal(lb_hv_prepare_ram(dst, NULL), 0);
    assert_int_equal(lb_hv_blocks(dst, &d, &n, NULL), 0);
    memcpy(d[1].map, b[1].map, b[1].size_bytes);
    assert_int_equal(lb_hv_load_state(dst, state, len, NULL), 0);
    assert_true(bad_pages(lb_fake_of(dst)) == 0);
    assert_int_equal(lb_hv_destroy(src, NULL), 0);
    assert_int_equal(lb_hv_destroy(dst, NULL), 0);
    lb_vm_desc_free(&desc);
    free(state);
    assert_int_equal(lb_fake_reset(), 0);
}

static uint64_t n_missing(struct lb_hv_vm *vm)
{
    const struct lb_ram_block *b;
    struct lb_bitmap m;
    unsigned n;
    assert_int_equal(lb_hv_blocks(vm, &b, &n, NULL), 0);
    assert_int_equal(lb_bitmap_init(&m, b[0].size_bytes / LB_PAGE_SIZE, NULL), 0);
    assert_int_equal(lb_hv_lazy_missing(vm, &b[0], &m, NULL), 0);
    uint64_t count = lb_bitmap_count(&m);
    lb_bitmap_free(&m);
    return count;
}

static void lazy_memory(void **state_)
{
    (void)state_;
    uint8_t *image;
    void *state;
    size_t len;
    struct lb_error err = LB_ERROR_INIT;
    struct lb_fake_stats st;
    const struct lb_ram_block *b;
    unsigned n;
    uint64_t page;
    struct lazy_server s;
    struct lb_hv_vm *vm = save_and_launch(&image, &state, &len);
    lb_fake_id id = lb_fake_of(vm);
    const uint64_t all = busy.ram_bytes / LB_PAGE_SIZE;

    assert_true(n_missing(vm) == all);
    assert_int_equal(lb_hv_lazy_fault(vm, 1, &b, &page, NULL), 0);
    serve_start(&s, vm, image);
    assert_int_equal(lb_hv_load_state(vm, state, len, NULL), 0);
    assert_int_equal(s.faults, 1); /* loading touched one */
    assert_int_equal(lb_hv_run(vm, NULL), 0);
    for (int i = 0; i < 1000 && s.faults < 20; i++)
        lb_sleep_ms(5);
    serve_stop(&s);
    assert_in_range(s.faults, 20, all - 1);

    /* who serves goes: the guest stands still, and goes on with the next one */
    uint64_t before = n_missing(vm);
    lb_hv_detach(vm);
    lb_sleep_ms(20);
    uint64_t wrote = (lb_fake_stats(id, &st, NULL), st.writes);
    lb_sleep_ms(50);
    lb_fake_stats(id, &st, NULL);
    assert_true(st.running && st.writes == wrote && st.missing == before);
    char address[32];
    struct lb_vm_ident ident = {.name = "web1", .qmp_path = lb_fake_address(id, address)};
    assert_int_equal(lb_hv_lazy_attach(&lb_hv_fake, &ident, &vm, NULL), 0);
    assert_int_equal(lb_hv_run(vm, NULL), 0);
    serve_start(&s, vm, image);
    assert_true(bad_pages(id) == 0); /* touches all */
    assert_true(n_missing(vm) == 0);
    serve_stop(&s);
    assert_int_equal(lb_hv_lazy_end(vm, NULL), 0);
    assert_int_equal(lb_hv_blocks(vm, &b, &n, NULL), 0);
    assert_non_null(b[0].map);
    lb_sleep_ms(20);
    assert_int_equal(lb_hv_stop(vm, NULL), 0); /* an ordinary guest */
    assert_true(bad_pages(id) == 0);
    lb_hv_detach(vm);
    assert_int_equal(lb_hv_lazy_attach(&lb_hv_fake, &ident, &vm, &err), -1);
    assert_int_equal(err.code, LB_E_NOT_FOUND);
    free(image);
    free(state);
    assert_int_equal(lb_fake_reset(), 1);
}

/* What is placed stays as the guest has it; what never comes is zeros; a wrong page is found. */
static void lazy_places_once(void **state_)
{
    (void)state_;
    uint8_t *image, junk[LB_PAGE_SIZE];
    void *state;
    size_t len;
    uint64_t placed;
    const struct lb_ram_block *b;
    unsigned n;
    struct lb_hv_vm *vm = save_and_launch(&image, &state, &len);
    lb_fake_id id = lb_fake_of(vm);
    const uint64_t all = busy.ram_bytes / LB_PAGE_SIZE;

    assert_int_equal(lb_hv_blocks(vm, &b, &n, NULL), 0);
    assert_int_equal(lb_hv_lazy_place(vm, &b[0], 0, 1000, image, &placed, NULL), 0);
    assert_true(placed == 1000);
    memset(junk, 0x5a, sizeof(junk));
    assert_int_equal(lb_hv_lazy_place(vm, &b[0], 7, 1, junk, &placed, NULL), 0);
    assert_true(placed == 0);
    assert_int_equal(lb_hv_lazy_place(vm, &b[0], 999, 2, NULL, &placed, NULL), 0);
    assert_true(placed == 1 && n_missing(vm) == all - 1001);
    assert_int_equal(lb_hv_load_state(vm, state, len, NULL), 0); /* page 0 is there */
    assert_int_equal(lb_hv_lazy_end(vm, NULL), 0);
    assert_true(bad_pages(id) == 0); /* the guest had written 900 pages */
    assert_int_equal(lb_hv_destroy(vm, NULL), 0);
    free(image);
    free(state);

    vm = save_and_launch(&image, &state, &len);
    id = lb_fake_of(vm);
    assert_int_equal(lb_hv_blocks(vm, &b, &n, NULL), 0);
    assert_int_equal(lb_hv_lazy_place(vm, &b[0], 5, 1, junk, NULL, NULL), 0);
    assert_int_equal(lb_hv_lazy_place(vm, &b[0], 0, all, image, NULL, NULL), 0);
    assert_int_equal(lb_hv_load_state(vm, state, len, NULL), 0);
    assert_int_equal(lb_hv_lazy_end(vm, NULL), 0);
    assert_true(bad_pages(id) == 1);
    assert_int_equal(lb_fake_kill(id, NULL), 0);
    assert_int_equal(lb_hv_lazy_end(vm, NULL), -1);
    lb_hv_detach(vm);
    free(image);
    free(state);
    assert_int_equal(lb_fake_reset(), 0);
}

/* ---- misuse: each of these is our own bug, so the wrapper has to abort ---- */

static struct lb_hv_vm *m_vm;
static const struct lb_ram_block *m_blocks;
static struct lb_bitmap m_small, m_right;
static char m_buf[LB_PAGE_SIZE];

static void m_nothing(void) { lb_hv_stop(m_vm, NULL); }
static void m_clean_running(void)
{
    lb_hv_log_enable(m_vm, NULL);
    lb_hv_log_clean(m_vm, &m_blocks[0], &m_right, NULL);
}
static void m_clean_unlogged(void)
{
    lb_hv_stop(m_vm, NULL);
    lb_hv_log_clean(m_vm, &m_blocks[0], &m_right, NULL);
}
static void m_clean_small(void)
{
    lb_hv_log_enable(m_vm, NULL);
    lb_hv_stop(m_vm, NULL);
    lb_hv_log_clean(m_vm, &m_blocks[0], &m_small, NULL);
}
static void m_enable_twice(void)
{
    lb_hv_log_enable(m_vm, NULL);
    lb_hv_log_enable(m_vm, NULL);
}
static void m_save_running(void) { lb_hv_save_begin(m_vm, false, NULL); }
static void m_cont_saving(void)
{
    lb_hv_stop(m_vm, NULL);
    lb_hv_save_begin(m_vm, false, NULL);
    lb_hv_cont(m_vm, NULL);
}
static void m_end_unbegun(void)
{
    void *p;
    size_t n;
    lb_hv_save_end(m_vm, &p, &n, NULL);
}
static void m_load_source(void) { lb_hv_load_state(m_vm, "x", 1, NULL); }
static void m_run_source(void) { lb_hv_run(m_vm, NULL); }
static void m_prepare_source(void) { lb_hv_prepare_ram(m_vm, NULL); }
static void m_poll_saving(void)
{
    struct lb_mirror_status ms;
    lb_hv_stop(m_vm, NULL);
    lb_hv_save_begin(m_vm, false, NULL);
    lb_hv_disk_mirror_status(m_vm, "disk0", true, &ms, NULL);
}
static void m_throttle_100(void) { lb_hv_throttle(m_vm, 100, NULL); }
static void m_read_beyond(void)
{
    lb_hv_read(m_vm, &m_blocks[0], m_right.n_bits, 1, m_buf, NULL);
}
static void m_read_wraps(void)
{
    lb_hv_read(m_vm, &m_blocks[0], 1, UINT64_MAX, m_buf, NULL);
}
static void m_missing_slot(void)
{
    struct lb_hv_ops holes = lb_hv_fake;
    struct lb_vm_ident ident = {.name = "web1"};
    struct lb_hv_vm *vm;
    holes.announce = NULL;
    lb_hv_attach(&holes, &ident, &vm, NULL);
}

static int in_child(void (*misuse)(void))
{
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        struct rlimit none = {0, 0};
        setrlimit(RLIMIT_CORE, &none);
        signal(SIGABRT, SIG_DFL);
        dup2(open("/dev/null", O_WRONLY), 2);
        misuse();
        _exit(0);
    }
    int status;
    waitpid(pid, &status, 0);
    return status;
}

static void misuse_aborts(void **state)
{
    (void)state;
    void (*const all[])(void) = {
        m_clean_running, m_clean_unlogged, m_clean_small,    m_enable_twice, m_save_running,
        m_cont_saving,   m_end_unbegun,    m_load_source,    m_run_source,   m_prepare_source,
        m_throttle_100,  m_read_beyond,    m_read_wraps,     m_missing_slot,
        m_poll_saving,
    };
    struct lb_fake_config idle = busy;
    unsigned n;
    idle.rate_pages_per_s = 0; /* the worker must hold no lock at fork */
    m_vm = attach(start(&idle));
    assert_int_equal(lb_hv_blocks(m_vm, &m_blocks, &n, NULL), 0);
    assert_int_equal(lb_bitmap_init(&m_small, 5, NULL), 0);
    assert_int_equal(lb_bitmap_init(&m_right, m_blocks[0].size_bytes / LB_PAGE_SIZE, NULL), 0);
    lb_sleep_ms(5);
    assert_int_equal(in_child(m_nothing), 0);
    for (size_t i = 0; i < LB_ARRAY_LEN(all); i++) {
        int status = in_child(all[i]);
        if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGABRT)
            fail_msg("misuse %zu ended with status %#x", i, status);
    }
    lb_bitmap_free(&m_small);
    lb_bitmap_free(&m_right);
    lb_hv_detach(m_vm);
    lb_fake_reset();
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(dirty_log),          cmocka_unit_test(rate_and_stop),
        cmocka_unit_test(names_and_handles),  cmocka_unit_test(there_and_back),
        cmocka_unit_test(mistakes_are_found), cmocka_unit_test(bad_input),
        cmocka_unit_test(fault_hooks),        cmocka_unit_test(every_fault),
        cmocka_unit_test(every_death),        cmocka_unit_test(card),
        cmocka_unit_test(mirrored_disk),      cmocka_unit_test(frozen_disk),
             cmocka_unit_test(io_travels),
        cmocka_unit_test(clock_and_mode),     cmocka_unit_test(misuse_aborts),
        cmocka_unit_test(lazy_memory),        cmocka_unit_test(lazy_places_once),
        cmocka_unit_test(shared_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
