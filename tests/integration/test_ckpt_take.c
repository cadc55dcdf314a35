/*
 * Checkpoints of real VMs: taken while they run, with their disks, as increments; suspended; the session killed at
 * every point.
 *
 * The guest counts in 32 pages, one after the other: in a consistent copy of it no two differ by more than one. What
 * is in a file is judged by a QEMU made of it here, by hand.
 */
#include "tests/integration/qemu_util.h"

#include "checkpoint/checkpoint.h"

static const char pc_args[] =
    "-machine pc,accel=tcg -m 64 -nodefaults -display none -drive if=none,id=d0,file=@D/disk.raw,"
    "format=raw,cache=none -device virtio-blk-pci,drive=d0,bootindex=1 -vga std";
static const char memfd_args[] =
    "-object memory-backend-memfd,id=m,size=64M,share=on -machine pc,accel=tcg,memory-backend=m -m 64 "
    "-nodefaults -display none -drive if=none,id=d0,file=@D/disk.raw,format=raw,cache=none "
    "-device virtio-blk-pci,drive=d0,bootindex=1 -vga std";

struct machine {
    struct qemu q;
    char state[96], catalog[128];
    struct lb_vm_entry entry;
    struct lb_ckpt_env env;
};

static void machine_start(struct machine *m, const char *args)
{
    struct lb_hv_vm *vm;

    memset(m, 0, sizeof(*m));
    qemu_dir(&m->q);
    qemu_start(&m->q, args);
    snprintf(m->state, sizeof(m->state), "%s/state", m->q.dir);
    snprintf(m->catalog, sizeof(m->catalog), "%s/checkpoints", m->state);
    m->env = (struct lb_ckpt_env){.state_dir = m->state, .catalog_dir = m->catalog, .hv = &lb_hv_qemu, .cancel_fd = -1};
    strcpy(m->entry.name, "t");
    strcpy(m->entry.hypervisor, "qemu");
    strcpy(m->entry.origin, "adopted");
    snprintf(m->entry.qmp_path, sizeof(m->entry.qmp_path), "%s", m->q.qmp);
    OK(lb_proc_identify(m->q.pid, &m->entry.proc, err));
    OK(lb_vm_entry_save(m->state, &m->entry, err));
    vm = qemu_attach(&m->q);
    wait_guest(vm);
    lb_hv_detach(vm);
}

static void machine_end(struct machine *m)
{
    qemu_end(&m->q);
}

static struct lb_vm_entry entry_now(struct machine *m)
{
    struct lb_vm_entry e;

    OK(lb_vm_entry_load(m->state, "t", &e, err));
    return e;
}

static void take(struct machine *m, const struct lb_take_opts *o, struct lb_take_result *res)
{
    struct lb_vm_entry e = entry_now(m);

    OK(lb_ckpt_take(&m->env, &e, o, res, err));
    print_message("# %s: %u rounds, pause %.1f ms, total %.1f ms, %llu of %llu pages stored, %llu unchanged, file %llu KiB\n",
                  res->ref, res->rounds, res->pause_ms, res->total_ms, (unsigned long long)res->stats.stored_pages,
                  (unsigned long long)res->stats.pages, (unsigned long long)res->stats.unchanged_pages,
                  (unsigned long long)res->stats.file_bytes >> 10);
}

/* The guest runs, here. */
static void assert_goes_on(struct machine *m)
{
    struct lb_hv_vm *vm = qemu_attach(&m->q);
    bool alive, running;

    OK(lb_hv_status(vm, &alive, &running, err));
    assert_true(alive && running);
    wait_guest(vm);
    lb_hv_detach(vm);
}

/* ----------------------------------------------------------------- what is in a file */

struct placing {
    struct lb_hv_vm *vm;
    const struct lb_ckpt_block *blocks;
};

static int place(unsigned block, uint64_t first, uint64_t count, const void *data, void *arg, struct lb_error *err)
{
    struct placing *p = arg;
    const struct lb_ram_block *b = block_named(p->vm, p->blocks[block].name);

    if (!b)
        return lb_fail(err, LB_E_PROTO, "no block %s", p->blocks[block].name);
    if (p->blocks[block].kind == LB_RAM_ROM && !b->hva)
        return 0;
    return lb_hv_write(p->vm, b, first, count, data, err);
}

/* Loaded and paused. *c stays open. */
static struct lb_hv_vm *made_of(struct machine *m, const char *ref, char run_dir[160])
{
    struct lb_chain_read_all all = {.threads = 1, .fn = place, .cancel_fd = -1};
    struct lb_launch_opts opts = {.name = "made", .run_dir = run_dir};
    struct placing p = {0};
    struct lb_ckpt_entry e;
    struct lb_chain *c;
    void *state = NULL;
    unsigned n;
    size_t len;

    snprintf(run_dir, 160, "%s/made", m->q.dir);
    OK(lb_catalog_find(m->catalog, ref, NULL, &e, err));
    OK(lb_catalog_open(m->catalog, &e, NULL, &c, err));
    assert_true(e.readable);
    OK(lb_hv_launch(&lb_hv_qemu, &e.info.meta.desc, &opts, &p.vm, err));
    OK(lb_hv_prepare_ram(p.vm, err));
    p.blocks = lb_chain_blocks(c, &n);
    all.arg = &p;
    OK(lb_chain_read_all(c, &all, err));
    OK(lb_chain_state(c, &state, &len, err));
    OK(lb_hv_load_state(p.vm, state, len, err));
    free(state);
    lb_chain_close(c);
    lb_ckpt_entry_free(&e);
    return p.vm;
}

/* The count of the guest in a checkpoint, which must be whole. */
static uint32_t count_in(struct machine *m, const char *ref)
{
    char run_dir[160];
    struct lb_hv_vm *vm = made_of(m, ref, run_dir);
    uint32_t count = counter(vm, 0);

    for (unsigned p = 1; p < BOOT_N_PAGES; p++)
        assert_in_range(count - counter(vm, p), 0, 1);
    OK(lb_hv_destroy(vm, err));
    return count;
}

static uint32_t count_now(struct machine *m)
{
    struct lb_hv_vm *vm = qemu_attach(&m->q);
    uint32_t count = counter(vm, 0);

    lb_hv_detach(vm);
    return count;
}

static bool left(const char *dir, const char *part)
{
    char cmd[256];

    snprintf(cmd, sizeof(cmd), "find %s -name '*%s*' | grep -q .", dir, part);
    return system(cmd) == 0;
}

/* -------------------------------------------------------------------------- live */

static void live_with(const char *args, bool no_disk)
{
    struct lb_take_opts o = {.no_disk = no_disk};
    struct lb_take_result first, res;
    struct machine m;
    uint32_t before, count, last;

    machine_start(&m, args);
    before = count_now(&m);
    take(&m, &o, &first);
    assert_goes_on(&m);
    assert_int_equal(entry_now(&m).state, LB_VM_RUNNING);
    count = count_in(&m, "t@1");
    assert_true(count >= before && count <= count_now(&m));
    last = count;
    for (unsigned i = 2; i <= 4; i++) {
        char ref[16];

        usleep(50000);
        take(&m, &o, &res);
        assert_true(res.stats.file_bytes < first.stats.file_bytes / 2);
        snprintf(ref, sizeof(ref), "t@%u", i);
        count = count_in(&m, ref);
        assert_true(count > last);
        last = count;
    }
    assert_int_equal(res.disks, no_disk ? 0 : 1);
    assert_true(count_in(&m, "t@1") < last);
    assert_false(left(m.q.dir, ".tmp") || left(m.state, "take.json"));
    assert_int_equal(left(m.q.dir, ".lb-t-4"), !no_disk);
    assert_goes_on(&m);
    machine_end(&m);
}

static void test_live_anon(void **state)
{
    (void)state;
    live_with(pc_args, true);
}

static void test_live_memfd(void **state)
{
    (void)state;
    live_with(memfd_args, true);
}

static void test_live_disk(void **state)
{
    (void)state;
    live_with(pc_args, false);
}

/* What its operator paused stays paused; what he continues meanwhile is stopped for the moment it needs. */
static void test_paused(void **state)
{
    struct lb_take_opts o = {.no_disk = true};
    struct lb_take_result res;
    struct lb_hv_vm *vm;
    struct machine m;
    bool alive, running;
    uint32_t count;

    (void)state;
    machine_start(&m, pc_args);
    vm = qemu_attach(&m.q);
    OK(lb_hv_stop(vm, err));
    lb_hv_detach(vm);
    count = count_now(&m);
    take(&m, &o, &res);
    vm = qemu_attach(&m.q);
    OK(lb_hv_status(vm, &alive, &running, err));
    assert_false(running);
    lb_hv_detach(vm);
    assert_int_equal(count_in(&m, "t@1"), count);
    machine_end(&m);
}

/* ------------------------------------------------------------------------ suspend */

static void suspend_with(const char *args)
{
    struct lb_take_opts o = {.suspend = true};
    struct lb_take_result res;
    struct lb_vm_entry e;
    struct lb_hv_vm *vm;
    struct machine m;
    char run_dir[160];
    uint32_t before, count;

    machine_start(&m, args);
    before = count_now(&m);
    take(&m, &o, &res);
    e = entry_now(&m);
    assert_int_equal(e.state, LB_VM_SUSPENDED);
    assert_int_equal(e.proc.pid, 0);
    assert_int_equal(waitpid(m.q.pid, NULL, 0), m.q.pid);
    m.q.pid = 0;
    assert_false(left(m.q.dir, ".tmp") || left(m.state, "take.json") || left(m.q.dir, ".lb-"));
    vm = made_of(&m, "t@suspend", run_dir);
    count = counter(vm, 0);
    assert_true(count >= before);
    OK(lb_hv_run(vm, err)); /* nobody has its disk */
    for (int i = 0; i < 500 && counter(vm, BOOT_N_PAGES - 1) <= count + 2; i++)
        usleep(10000);
    assert_true(counter(vm, BOOT_N_PAGES - 1) > count + 2);
    OK(lb_hv_stop(vm, err));
    for (unsigned p = 1; p < BOOT_N_PAGES; p++)
        assert_in_range(counter(vm, 0) - counter(vm, p), 0, 1);
    OK(lb_hv_destroy(vm, err));
    machine_end(&m);
}

static void test_suspend_anon(void **state)
{
    (void)state;
    suspend_with(pc_args);
}

static void test_suspend_memfd(void **state)
{
    (void)state;
    suspend_with(memfd_args);
}

/* ------------------------------------------------------------------------ kill -9 */

/* A session that is killed at a point. */
static void kill_at(struct machine *m, const char *point, const struct lb_take_opts *o)
{
    char file[160];
    pid_t pid;

    snprintf(file, sizeof(file), "%s/reached", m->q.dir);
    unlink(file);
    pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        struct lb_vm_entry e = entry_now(m);
        struct lb_take_result res;
        struct lb_error why = LB_ERROR_INIT;

        prctl(PR_SET_PDEATHSIG, SIGKILL);
        setenv("LIFEBOAT_PAUSE_AT", point, 1);
        setenv("LIFEBOAT_PAUSE_FILE", file, 1);
        lb_ckpt_take(&m->env, &e, o, &res, &why);
        fprintf(stderr, "not killed at %s: %s\n", point, why.message);
        _exit(1);
    }
    for (int i = 0; i < 3000 && access(file, F_OK); i++) {
        assert_int_equal(waitpid(pid, NULL, WNOHANG), 0);
        usleep(10000);
    }
    assert_int_equal(access(file, F_OK), 0);
    kill(pid, SIGKILL);
    assert_int_equal(waitpid(pid, NULL, 0), pid);
}

static void recover(struct machine *m)
{
    char text[512];
    bool fill_wanted;

    OK(lb_ckpt_recover(&m->env, "t", &fill_wanted, text, err));
    print_message("# %s\n", text);
    assert_false(fill_wanted);
}

static void test_kill_live(void **state)
{
    static const char *const points[] = {"take-opened", "take-copied", "take-paused", "take-written"};
    struct lb_take_opts o = {0};
    struct lb_take_result res;
    struct machine m;
    uint32_t before;

    (void)state;
    machine_start(&m, pc_args);
    for (unsigned i = 0; i < LB_ARRAY_LEN(points); i++) {
        kill_at(&m, points[i], &o);
        assert_int_equal(entry_now(&m).state, LB_VM_CHECKPOINTING);
        recover(&m);
        assert_int_equal(entry_now(&m).state, LB_VM_RUNNING);
        assert_goes_on(&m);
        assert_false(left(m.q.dir, ".tmp") || left(m.state, "take.json") || left(m.state, LB_CKPT_SUFFIX) ||
                     left(m.q.dir, ".lb-"));
    }
    before = count_now(&m);
    kill_at(&m, "take-committed", &o); /* too late: it is there, and its disk is frozen */
    recover(&m);
    assert_goes_on(&m);
    assert_true(count_in(&m, "t") >= before);
    assert_true(left(m.q.dir, ".lb-"));
    take(&m, &o, &res);
    assert_true(res.stats.unchanged_pages > 0);
    assert_goes_on(&m);
    machine_end(&m);
}

static void test_kill_suspend(void **state)
{
    static const char *const points[] = {"take-opened", "take-paused", "take-written", "take-committed"};
    struct lb_take_opts o = {.suspend = true};
    struct machine m;

    (void)state;
    machine_start(&m, pc_args);
    for (unsigned i = 0; i < LB_ARRAY_LEN(points); i++) {
        kill_at(&m, points[i], &o);
        assert_int_equal(entry_now(&m).state, LB_VM_CHECKPOINTING);
        recover(&m);
        assert_int_equal(entry_now(&m).state, LB_VM_RUNNING);
        assert_goes_on(&m);
        assert_false(left(m.q.dir, ".tmp") || left(m.state, "take.json") || left(m.state, LB_CKPT_SUFFIX));
    }
    kill_at(&m, "suspend-decided", &o);
    assert_int_equal(entry_now(&m).state, LB_VM_SUSPENDED);
    recover(&m);
    assert_int_equal(waitpid(m.q.pid, NULL, 0), m.q.pid);
    m.q.pid = 0;
    assert_int_equal(entry_now(&m).state, LB_VM_SUSPENDED);
    assert_true(count_in(&m, "t@suspend") > 0);
    machine_end(&m);
}

/* The guest dies with the session, when everything is in the file: it is suspended. */
static void test_kill_both(void **state)
{
    struct lb_take_opts o = {.suspend = true};
    struct machine m;

    (void)state;
    machine_start(&m, pc_args);
    kill_at(&m, "take-committed", &o);
    kill(m.q.pid, SIGKILL);
    assert_int_equal(waitpid(m.q.pid, NULL, 0), m.q.pid);
    m.q.pid = 0;
    recover(&m);
    assert_int_equal(entry_now(&m).state, LB_VM_SUSPENDED);
    assert_true(count_in(&m, "t@suspend") > 0);
    machine_end(&m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_live_anon),    cmocka_unit_test(test_live_memfd),
        cmocka_unit_test(test_live_disk),    cmocka_unit_test(test_paused),
        cmocka_unit_test(test_suspend_anon), cmocka_unit_test(test_suspend_memfd),
        cmocka_unit_test(test_kill_live),    cmocka_unit_test(test_kill_suspend),
        cmocka_unit_test(test_kill_both),
    };
    lb_log_set_level(LB_LOG_WARN);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
