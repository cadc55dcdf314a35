/*
 * Restores of in-process guests that know what every page of theirs must hold: every mode, every call of the hypervisor
 * failing or being its last, deaths of who fills, clones.
 *
 * After each of these the VM is in exactly one place - a guest that runs, or a file that is whole - and a second
 * try brings it back with every page as it left it.
 */
#include "tests/integration/ckpt_fake_util.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/eventfd.h>

#include "checkpoint/fill.h"

#define RAM (4u << 20)

static const struct lb_fake_config idle = {.name = "vm", .ram_bytes = RAM, .vram_bytes = 64 << 10,
                                           .touched_pages = 400, .rate_pages_per_s = 400, .working_set_pages = 300};

static int setup(void **state)
{
    (void)state;
    dir_up();
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    lb_fake_reset();
    if (seen.cancel_fd >= 0)
        close(seen.cancel_fd);
    return lb_remove_tree(dir, NULL);
}

/* ------------------------------------------------------------------------ the guest */

static uint64_t nonce;

static void boot_as(const struct lb_fake_config *c)
{
    struct lb_vm_entry e;

    nonce = stats_of(boot_fake(dir, c, &e)).nonce;
}

static void boot(void)
{
    boot_as(&idle);
}

/* It runs, it is the one that was, and all its memory is as it left it. */
static void assert_good(const char *name)
{
    lb_fake_id id = fake_in(dir, name);
    struct lb_fake_stats st, later;
    uint64_t bad = UINT64_MAX;

    assert_int_equal(entry_in(dir, name).state, LB_VM_RUNNING);
    assert_int_equal(lb_fake_stats(id, &st, NULL), 0);
    assert_true(st.alive && st.running);
    assert_int_equal(st.nonce, nonce);
    assert_int_equal(st.missing, 0);
    assert_int_equal(lb_fake_verify(id, &bad, NULL), 0);
    assert_int_equal(bad, 0);
    for (int i = 0; i < 2000; i++, lb_sleep_ms(1)) {
        assert_int_equal(lb_fake_stats(id, &later, NULL), 0);
        if (later.writes > st.writes)
            return;
    }
    fail_msg("guest %s does not go on", name);
}

static void take(bool suspend)
{
    struct lb_ckpt_env env = env_here();
    struct lb_take_opts o = {.suspend = suspend, .no_disk = true};
    struct lb_vm_entry e = entry_in(dir, "vm");
    struct lb_error err = LB_ERROR_INIT;
    struct lb_take_result res;

    if (lb_ckpt_take(&env, &e, &o, &res, &err))
        fail_msg("%s", err.message);
}

static bool file_there(void)
{
    char path[160];

    snprintf(path, sizeof(path), "%s/vm/suspend.lbc", catalog);
    return access(path, F_OK) == 0;
}

/* Restore and fill; how far it came. */
enum end { FAILED, RUNS, FILLED };
static enum end restore(const char *ref, const struct lb_restore_opts *o, struct lb_error *err)
{
    struct lb_ckpt_env env = env_here();
    struct lb_restore_result res;
    struct lb_fill *f;

    if (lb_ckpt_restore(&env, ref, o, &f, &res, err))
        return FAILED;
    assert_int_equal(res.filling, f != NULL);
    return f && lb_ckpt_fill(f, err) ? RUNS : FILLED;
}

static void restore_well(const char *ref, const struct lb_restore_opts *o)
{
    struct lb_error err = LB_ERROR_INIT;

    if (restore(ref, o, &err) != FILLED)
        fail_msg("%s: %s", ref, err.message);
}

/* ------------------------------------------------------------------------- modes */

static void test_resume(void **state)
{
    (void)state;
    boot();
    for (int i = 0; i < 4; i++) {
        struct lb_restore_opts o = {.eager = i % 2};

        take(true);
        assert_int_equal(entry_in(dir, "vm").state, LB_VM_SUSPENDED);
        assert_int_equal(lb_fake_count(NULL), 0);
        restore_well("vm@suspend", &o);
        assert_good("vm");
        assert_false(file_there());
        assert_int_equal(lb_fake_count(NULL), 1);
    }
}

static void test_paused(void **state)
{
    struct lb_restore_opts o = {.eager = true, .paused = true};
    struct lb_fake_stats st;

    (void)state;
    boot();
    take(true);
    restore_well("vm@suspend", &o);
    assert_int_equal(entry_in(dir, "vm").state, LB_VM_RUNNING);
    assert_int_equal(lb_fake_stats(fake_in(dir, "vm"), &st, NULL), 0);
    assert_true(st.alive && !st.running);
}

static void test_others(void **state)
{
    struct lb_restore_opts o = {.as = "other"};
    struct lb_error err = LB_ERROR_INIT;

    (void)state;
    boot();
    take(false);
    take(false);
    restore_well("vm@1", &o);
    assert_good("other");
    assert_good("vm");
    assert_string_equal(entry_in(dir, "other").origin, "restored");
    assert_int_equal(restore("vm@2", &o, &err), FAILED); /* the name is taken */
    assert_int_equal(err.code, LB_E_EXISTS);
    assert_good("other");
    o.as[0] = 0;
    assert_int_equal(restore("vm@2", &o, &err), FAILED);
    assert_int_equal(err.code, LB_E_EXISTS);
    /* one that has died may come back under its name */
    assert_int_equal(lb_fake_kill(fake_in(dir, "vm"), NULL), 0);
    struct lb_vm_entry e = entry_in(dir, "vm");
    e.state = LB_VM_DEAD;
    assert_int_equal(lb_vm_entry_save(dir, &e, NULL), 0);
    restore_well("vm@2", &o);
    assert_good("vm");
    strcpy(o.as, "no/name");
    assert_int_equal(restore("vm@2", &o, &err), FAILED);
    assert_int_equal(err.code, LB_E_USAGE);
}

static void test_clones(void **state)
{
    struct lb_ckpt_env env;
    struct lb_clone_opts o = {.count = 5, .name = "c"};
    struct lb_clone_result res;
    struct lb_error err = LB_ERROR_INIT;

    (void)state;
    boot();
    take(false);
    env = env_here();
    if (lb_ckpt_clone(&env, "vm@1", &o, &res, &err))
        fail_msg("%s", err.message);
    assert_int_equal(res.n, 5);
    for (unsigned i = 0; i < res.n; i++) {
        assert_good(res.names[i]);
        assert_false(lb_vm_is_locked(dir, res.names[i]));
    }
    free(res.names);
    free(res.running_ms);
    /* one fails: the others stay, nothing of it does */
    env = env_here();
    o.count = 3;
    lb_fake_fail(LB_FAKE_LOAD_STATE, 2, LB_E_HV);
    assert_int_equal(lb_ckpt_clone(&env, "vm@1", &o, &res, &err), -1);
    assert_non_null(strstr(err.message, "clone c-"));
    assert_in_range(res.n, 1, 2);
    for (unsigned i = 0; i < res.n; i++)
        assert_good(res.names[i]);
    assert_int_equal(lb_fake_count(NULL), 1 + 5 + res.n);
    free(res.names);
    free(res.running_ms);
    o.count = 0;
    assert_int_equal(lb_ckpt_clone(&env, "vm@1", &o, &res, &err), -1);
    assert_int_equal(err.code, LB_E_USAGE);
    free(res.names);
    free(res.running_ms);
    assert_good("vm");
}

/* ---------------------------------------------------------------------- failures */

static void refill(void)
{
    struct lb_ckpt_env env = env_here();
    struct lb_vm_entry e = entry_in(dir, "vm");
    struct lb_error err = LB_ERROR_INIT;
    char text[512];
    bool fill = false;

    if (lb_ckpt_recover(&env, "vm", &fill, text, &err))
        fail_msg("%s", err.message);
    assert_true(fill);
    env = env_here();
    if (lb_ckpt_refill(&env, &e, NULL, &err))
        fail_msg("%s", err.message);
}

/* However it ended, the VM is in one place, and comes back. */
static void assert_comes_back(const struct lb_restore_opts *o)
{
    struct lb_vm_entry e = entry_in(dir, "vm");

    switch (e.state) {
    case LB_VM_RUNNING:
        break;
    case LB_VM_FILLING:
        refill();
        break;
    case LB_VM_SUSPENDED:
    case LB_VM_DEAD: /* it ended when it ran already; the file is what is left */
        assert_int_equal(lb_fake_count(NULL), 0);
        assert_true(file_there());
        restore_well("vm@suspend", o);
        break;
    default:
        fail_msg("the VM is %s", lb_vm_state_name(e.state));
    }
    assert_good("vm");
    assert_int_equal(lb_fake_count(NULL), 1);
    assert_false(file_there());
}

static const enum lb_fake_slot slots[] = {
    LB_FAKE_LAUNCH, LB_FAKE_BLOCKS, LB_FAKE_PREPARE_RAM, LB_FAKE_POPULATED, LB_FAKE_READ, LB_FAKE_WRITE,
    LB_FAKE_LOAD_STATE, LB_FAKE_RUN, LB_FAKE_ANNOUNCE, LB_FAKE_LAZY_BEGIN, LB_FAKE_LAZY_MISSING,
    LB_FAKE_LAZY_FAULT, LB_FAKE_LAZY_PLACE, LB_FAKE_LAZY_END};

#define FIRST_CALLS 6u  /* of a slot that is called for every page */

static void sweep(bool eager, bool die)
{
    struct lb_restore_opts o = {.eager = eager};

    boot();
    for (unsigned i = 0; i < LB_ARRAY_LEN(slots); i++)
        for (unsigned nth = 1; nth <= FIRST_CALLS; nth++) {
            struct lb_error err = LB_ERROR_INIT;
            uint64_t calls;

            /* one that dies when all of it is there and runs is only a VM that died */
            if (die && (slots[i] == LB_FAKE_LAUNCH || (eager && slots[i] == LB_FAKE_ANNOUNCE)))
                continue;
            take(true);
            calls = lb_fake_calls(slots[i]);
            if (die)
                lb_fake_die(slots[i], nth);
            else
                lb_fake_fail(slots[i], nth, LB_E_HV);
            restore("vm@suspend", &o, &err);
            lb_fake_fail(slots[i], 0, LB_E_HV);
            calls = lb_fake_calls(slots[i]) - calls;
            assert_comes_back(&o);
            if (calls < nth)
                break;
        }
}

static void test_sweep_lazy(void **state)
{
    (void)state;
    sweep(false, false);
}

static void test_sweep_eager(void **state)
{
    (void)state;
    sweep(true, false);
}

static void test_sweep_lazy_dies(void **state)
{
    (void)state;
    sweep(false, true);
}

static void test_sweep_eager_dies(void **state)
{
    (void)state;
    sweep(true, true);
}

/* Run was done, but its answer was lost. */
static void test_run_late(void **state)
{
    (void)state;
    boot();
    for (int i = 0; i < 2; i++) {
        struct lb_restore_opts o = {.eager = i};
        struct lb_error err = LB_ERROR_INIT;

        take(true);
        lb_fake_fail_late(LB_FAKE_RUN, 1, LB_E_HV);
        assert_int_equal(restore("vm@suspend", &o, &err), FILLED);
        assert_good("vm");
        assert_false(file_there());
    }
}

struct late {
    pthread_t thread;
    enum end how;
    struct lb_error err;
};

static void *late_main(void *arg)
{
    struct lb_restore_opts o = {.as = "other", .eager = true};
    struct lb_ckpt_env env = {.state_dir = dir, .catalog_dir = catalog, .hv = &lb_hv_fake, .cancel_fd = -1};
    struct lb_restore_result res;
    struct late *l = arg;
    struct lb_fill *f;

    l->how = lb_ckpt_restore(&env, "vm@1", &o, &f, &res, &l->err) ? FAILED : FILLED;
    return NULL;
}

/* The checkpoint goes after the restore has begun, before it has the catalog: its images may be the guest's again then. */
static void test_removed_meanwhile(void **state)
{
    LB_AUTO_FREE char *disk = lb_asprintf("%s/d.img", dir), *file = lb_asprintf("%s/vm/1.lbc", catalog);
    LB_AUTO_FREE char *overlay = lb_asprintf("%s/other.lb-1.qcow2", dir);
    struct lb_fake_config c = idle;
    struct lb_ckpt_env env = env_here();
    struct lb_take_opts o = {.full = true};
    struct lb_take_result res;
    struct lb_vm_entry e;
    struct late l = {.err = LB_ERROR_INIT};
    int lock;

    (void)state;
    c.disk_bytes = 1 << 20;
    c.disk_path = disk;
    close(open(disk, O_RDWR | O_CREAT, 0600));
    assert_int_equal(truncate(disk, 1 << 20), 0);
    boot_as(&c);
    e = entry_in(dir, "vm");
    assert_int_equal(lb_ckpt_take(&env, &e, &o, &res, NULL), 0);
    lock = lb_catalog_lock(catalog, "vm", 0, NULL);
    assert_true(lock >= 0);
    assert_int_equal(pthread_create(&l.thread, NULL, late_main, &l), 0);
    for (int i = 0; i < 5000 && lb_vm_entry_load(dir, "other", &e, NULL); i++)
        lb_sleep_ms(1);
    lb_sleep_ms(200); /* it has read what it wants to */
    assert_int_equal(unlink(file), 0);
    close(lock);
    assert_int_equal(pthread_join(l.thread, NULL), 0);
    assert_int_equal(l.how, FAILED);
    assert_int_equal(l.err.code, LB_E_NOT_FOUND);
    assert_int_equal(access(overlay, F_OK), -1);
    assert_int_equal(lb_vm_entry_load(dir, "other", &e, NULL), -1);
    assert_good("vm");
}

static void test_cancel(void **state)
{
    struct lb_restore_opts o = {.eager = true};
    uint64_t n;

    (void)state;
    boot();
    seen.cancel_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    for (unsigned at = 1;; at++) {
        struct lb_error err = LB_ERROR_INIT;
        enum end how;

        seen.cancel_at = 0;
        take(true);
        seen.cancel_at = at;
        how = restore("vm@suspend", &o, &err);
        seen.cancel_at = 0;
        if (read(seen.cancel_fd, &n, sizeof(n)) < 0)
            n = 0;
        if (how == FAILED)
            assert_int_equal(err.code, LB_E_CANCELLED);
        assert_comes_back(&o);
        if (how == FILLED)
            break;
        assert_true(at < 50);
    }
}

/* ------------------------------------------------------------------- working set */

static void test_working_set(void **state)
{
    struct lb_ckpt_id id = {{1, 2, 3}}, other = {{1, 2, 4}};
    uint64_t faults[] = {5, UINT64_C(1) << 40 | 7, 3}, before[] = {3, 9, 5}, *v, n;
    LB_AUTO_FREE char *path = lb_asprintf("%s/1.ws", dir);
    int fd;

    (void)state;
    lb_ws_load(path, &id, &v, &n);
    assert_null(v);
    assert_int_equal(lb_ws_save(path, &id, faults, 3, before, 3, NULL), 0);
    lb_ws_load(path, &id, &v, &n);
    assert_int_equal(n, 4);
    assert_memory_equal(v, faults, sizeof(faults));
    assert_int_equal(v[3], 9);
    free(v);
    lb_ws_load(path, &other, &v, &n);
    assert_null(v);
    for (off_t at = 0; at < 32 + 4 * 8 + 8; at++) { /* a hint that is damaged is none */
        uint8_t b;
        fd = open(path, O_RDWR);
        assert_int_equal(pread(fd, &b, 1, at), 1);
        b ^= 1;
        assert_int_equal(pwrite(fd, &b, 1, at), 1);
        lb_ws_load(path, &id, &v, &n);
        assert_null(v);
        b ^= 1;
        assert_int_equal(pwrite(fd, &b, 1, at), 1);
        close(fd);
    }
    assert_int_equal(truncate(path, 40), 0);
    lb_ws_load(path, &id, &v, &n);
    assert_null(v);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_resume, setup, teardown),
        cmocka_unit_test_setup_teardown(test_removed_meanwhile, setup, teardown),
        cmocka_unit_test_setup_teardown(test_paused, setup, teardown),
        cmocka_unit_test_setup_teardown(test_others, setup, teardown),
        cmocka_unit_test_setup_teardown(test_clones, setup, teardown),
        cmocka_unit_test_setup_teardown(test_sweep_lazy, setup, teardown),
        cmocka_unit_test_setup_teardown(test_sweep_eager, setup, teardown),
        cmocka_unit_test_setup_teardown(test_sweep_lazy_dies, setup, teardown),
        cmocka_unit_test_setup_teardown(test_sweep_eager_dies, setup, teardown),
        cmocka_unit_test_setup_teardown(test_run_late, setup, teardown),
        cmocka_unit_test_setup_teardown(test_cancel, setup, teardown),
        cmocka_unit_test_setup_teardown(test_working_set, setup, teardown),
    };

    lb_log_set_level(LB_LOG_ERROR);
    if (getenv("LB_TEST_ONLY"))
        cmocka_set_test_filter(getenv("LB_TEST_ONLY"));
    return cmocka_run_group_tests(tests, NULL, NULL);
}
