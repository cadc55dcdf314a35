/*
 * Checkpoints of in-process guests that know what every page of theirs and their disk must hold: every mode, every
 * call of the hypervisor failing or being its last, cancelled at every phase, no room for the file.
 *
 * What is in a file is judged by a guest made of it here, by hand: place what the chain holds, load the state,
 * ask the guest whether it finds every page as it left it.
 */
#include "tests/integration/ckpt_fake_util.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/mount.h>
#include <sys/stat.h>

#include "checkpoint/take.h"

#define RAM (8u << 20)
#define DISK (1u << 20)

static char disk[96];

static const struct lb_fake_config busy = {.name = "vm", .ram_bytes = RAM, .touched_pages = 900,
                                           .rate_pages_per_s = 3000, .working_set_pages = 600,
                                           .disk_bytes = DISK, .disk_writes_per_s = 200, .disk_path = disk};

static int setup(void **state)
{
    (void)state;
    dir_up();
    snprintf(disk, sizeof(disk), "%s/d.img", dir);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    lb_fake_reset();
    umount2(catalog, MNT_DETACH); /* of a test that failed */
    return lb_remove_tree(dir, NULL);
}

/* ------------------------------------------------------------------------ the guest */

static lb_fake_id boot(const struct lb_fake_config *c, struct lb_vm_entry *e)
{
    close(open(disk, O_RDWR | O_CREAT, 0600));
    assert_int_equal(truncate(disk, DISK), 0);
    return boot_fake(dir, c, e);
}

static uint64_t bad_pages(lb_fake_id id)
{
    uint64_t bad = UINT64_MAX;

    assert_int_equal(lb_fake_verify(id, &bad, NULL), 0);
    return bad;
}

/* It writes, now. */
static void assert_goes_on(lb_fake_id id)
{
    uint64_t from = stats_of(id).writes;

    for (int i = 0; i < 2000 && stats_of(id).writes == from; i++)
        lb_sleep_ms(1);
    assert_true(stats_of(id).writes > from);
}

/* ----------------------------------------------------------------- what is in a file */

struct placing {
    struct lb_hv_vm *vm;
    const struct lb_ram_block *blocks;
};

static int place(unsigned block, uint64_t first, uint64_t count, const void *data, void *arg, struct lb_error *err)
{
    struct placing *p = arg;

    return lb_hv_write(p->vm, &p->blocks[block], first, count, data, err);
}

static struct lb_hv_vm *made_of(struct lb_chain *c, const struct lb_ckpt_meta *m)
{
    struct lb_chain_read_all all = {.threads = 1, .fn = place, .cancel_fd = -1};
    struct lb_launch_opts opts = {.name = "made", .run_dir = dir};
    struct lb_error err = LB_ERROR_INIT;
    struct placing p = {0};
    void *state = NULL;
    unsigned n, n_blocks;
    size_t len;

    lb_chain_blocks(c, &n_blocks);
    if (lb_hv_launch(&lb_hv_fake, &m->desc, &opts, &p.vm, &err) || lb_hv_blocks(p.vm, &p.blocks, &n, &err) ||
        lb_hv_prepare_ram(p.vm, &err))
        fail_msg("%s", err.message);
    assert_int_equal(n, n_blocks);
    all.arg = &p;
    if (lb_chain_read_all(c, &all, &err) || lb_chain_state(c, &state, &len, &err) ||
        lb_hv_load_state(p.vm, state, len, &err))
        fail_msg("%s", err.message);
    free(state);
    return p.vm;
}

/* What the guest was when it was taken. of: the guest it was taken of, 0: gone. */
static void assert_good(const char *ref, lb_fake_id of, bool with_disk)
{
    struct lb_error err = LB_ERROR_INIT;
    struct lb_ckpt_entry e;
    struct lb_chain *c;
    struct lb_hv_vm *vm;
    struct lb_fake_stats st;
    uint64_t writes;

    if (lb_catalog_find(catalog, ref, NULL, &e, &err) || lb_catalog_open(catalog, &e, NULL, &c, &err))
        fail_msg("%s: %s", ref, err.message);
    assert_true(e.readable);
    vm = made_of(c, &e.info.meta);
    st = stats_of(lb_fake_of(vm));
    assert_int_equal(bad_pages(lb_fake_of(vm)), 0);
    if (of)
        assert_int_equal(st.nonce, stats_of(of).nonce);
    assert_int_equal(e.info.meta.n_disks, with_disk ? 1 : 0);
    /* the image it stands on ends with the write the memory knows as the last */
    if (of && with_disk && !e.info.meta.suspend) {
        if (lb_fake_image(of, e.info.meta.disks[0].path, &writes, &err))
            fail_msg("%s", err.message);
        assert_int_equal(st.disk_writes, writes);
    }
    assert_int_equal(lb_hv_destroy(vm, NULL), 0);
    lb_chain_close(c);
    lb_ckpt_entry_free(&e);
}

static unsigned count_files(const char *path, const char *part)
{
    unsigned n = 0;
    struct dirent *d;
    DIR *v = opendir(path);

    while (v && (d = readdir(v)))
        n += strstr(d->d_name, part) != NULL;
    if (v)
        closedir(v);
    return n;
}

static unsigned checkpoints(void)
{
    char path[128];

    snprintf(path, sizeof(path), "%s/vm", catalog);
    return count_files(path, LB_CKPT_SUFFIX) - count_files(path, ".tmp-");
}

/* No temporary file, no record, `overlays` overlays. */
static void assert_nothing_left(unsigned overlays)
{
    char path[128];

    snprintf(path, sizeof(path), "%s/vm", catalog);
    assert_int_equal(count_files(path, ".tmp"), 0);
    snprintf(path, sizeof(path), "%s/vms/vm", dir);
    assert_int_equal(count_files(path, "take.json"), 0);
    assert_int_equal(count_files(dir, ".lb-"), overlays);
}

static int take(const struct lb_take_opts *o, struct lb_take_result *res, struct lb_error *err)
{
    struct lb_ckpt_env env = env_here();
    struct lb_vm_entry e = entry_in(dir, "vm");
    struct lb_error why = LB_ERROR_INIT;
    int rc = lb_ckpt_take(&env, &e, o, res, &why);

    assert_true(rc == 0 || (why.code && why.message[0]));
    if (err)
        *err = why;
    else if (rc)
        fail_msg("%s", why.message);
    return rc;
}

/* ------------------------------------------------------------------------- every mode */

static void live_with(const struct lb_fake_config *c)
{
    struct lb_take_opts o = {.label = "first"};
    struct lb_take_result res;
    struct lb_ckpt_entry ck;
    struct lb_vm_entry e;
    lb_fake_id id = boot(c, &e);

    take(&o, &res, NULL);
    assert_goes_on(id);
    assert_int_equal(bad_pages(id), 0);
    assert_string_equal(res.ref, "vm@1");
    assert_true(res.pause_ms > 0 && res.rounds >= 1 && res.stats.stored_pages > 0);
    assert_int_equal(res.disks, 1);
    e = entry_in(dir, "vm");
    assert_int_equal(e.state, LB_VM_RUNNING);
    assert_string_equal(e.checkpoint, "vm@1");
    assert_good("vm@1", id, true);
    assert_good("vm@first", id, true);
    assert_nothing_left(1);
    assert_int_equal(lb_catalog_find(catalog, "vm", NULL, &ck, NULL), 0);
    assert_true(ck.info.meta.pause_ms > 0 && !ck.info.meta.paused && !ck.info.meta.suspend);
    assert_string_equal(ck.info.meta.disks[0].path, disk);
    assert_int_equal(ck.info.meta.disks[0].file_bytes, DISK);
    lb_ckpt_entry_free(&ck);
}

static void test_live(void **state)
{
    (void)state;
    live_with(&busy);
}

static void test_live_no_map(void **state)
{
    struct lb_fake_config c = busy;

    (void)state;
    c.no_map = true;
    live_with(&c);
}

static void test_increments(void **state)
{
    struct lb_take_opts o = {0};
    struct lb_take_result first, res;
    struct lb_vm_entry e;
    lb_fake_id id = boot(&busy, &e);
    char ref[32];

    (void)state;
    take(&o, &first, NULL);
    assert_int_equal(first.stats.unchanged_pages, 0);
    for (unsigned i = 2; i <= 10; i++) {
        lb_sleep_ms(10);
        take(&o, &res, NULL);
        assert_true(res.stats.unchanged_pages > 0);
        assert_true(res.stats.stored_pages < first.stats.stored_pages);
        snprintf(ref, sizeof(ref), "vm@%u", i);
        assert_good(ref, id, true);
    }
    assert_good("vm@1", id, true);
    o.full = true;
    take(&o, &res, NULL);
    assert_int_equal(res.stats.unchanged_pages, 0);
    assert_good("vm@11", id, true);
    assert_int_equal(checkpoints(), 11);
    assert_nothing_left(11);
}

/* A guest that writes faster than a round: a second one is tried, then it is stopped all the same. */
static void test_rounds(void **state)
{
    struct lb_take_opts o = {0};
    struct lb_take_result res = {0};
    struct lb_fake_config c = busy;
    struct lb_vm_entry e;
    lb_fake_id id;

    (void)state;
    c.rate_pages_per_s = 1000000;
    c.working_set_pages = 1900;
    c.random_bytes = 32;
    id = boot(&c, &e);
    for (unsigned i = 0; i < 20 && res.rounds < 2; i++) { /* the guest may get no processor meanwhile */
        take(&o, &res, NULL);
        assert_true(res.rounds <= 8);
        assert_good(res.ref, id, true);
    }
    assert_true(res.rounds >= 2);
    assert_goes_on(id);
    assert_int_equal(bad_pages(id), 0);
}

/* Less room for the pages of the pause than there are: the guest waits for the file, nothing is lost. By hand, because
 * a host that has so little cannot be had. */
static void test_little_room(void **state)
{
    struct lb_ckpt_env env = env_here();
    struct lb_take_opts o = {0};
    struct lb_take_result res = {0};
    struct lb_vm_entry e;
    struct lb_error err = LB_ERROR_INIT;
    lb_fake_id id = boot(&busy, &e);
    uint64_t cap;
    struct lb_take t = {.env = &env, .opts = &o, .res = &res, .what = "checkpoint", .before = e, .entry = e, .lock = -1};

    (void)state;
    lb_ckpt_meter_init(&t.meter, &env, "checkpoint", 0);
    if (lb_take_open(&t, &err) || lb_take_begin_log(&t, &err) || lb_take_rounds(&t, &err) || lb_take_reserve(&t, &err))
        fail_msg("%s", err.message);
    cap = t.late.cap;
    t.late.cap = 7;
    lb_sleep_ms(100);
    if (lb_take_pause(&t, &err) || lb_hv_save_begin(t.vm, false, &err) || lb_take_last_pages(&t, &err) ||
        lb_hv_save_end(t.vm, &t.state, &t.state_len, &err) || lb_take_continue(&t, &err))
        fail_msg("%s", err.message);
    assert_int_equal(t.late.n, 7);
    assert_true(t.meter.p.note[0]);
    if (lb_take_write_late(&t, &err) || lb_take_put_hot(&t, &err) ||
        lb_ckpt_commit(LB_STEAL_PTR(t.writer), &t.meta, t.state, t.state_len, NULL, &err))
        fail_msg("%s", err.message);
    lb_hv_detach(t.vm);
    t.late.cap = cap; /* of the mapping */
    lb_take_free_pages(&t);
    lb_ckpt_meta_free(&t.meta);
    free(t.disks);
    free(t.state);
    close(t.lock);
    assert_good("vm@1", 0, true);
    assert_goes_on(id);
}

static void test_suspend(void **state)
{
    struct lb_take_opts o = {.suspend = true};
    struct lb_take_result res;
    struct lb_vm_entry e;

    (void)state;
    boot(&busy, &e);
    take(&o, &res, NULL);
    e = entry_in(dir, "vm");
    assert_int_equal(e.state, LB_VM_SUSPENDED);
    assert_int_equal(e.proc.pid, 0);
    assert_string_equal(e.checkpoint, "vm@suspend");
    assert_int_equal(lb_fake_count("vm"), 0);
    assert_good("vm@suspend", 0, true);
    assert_nothing_left(0);
}

/* What its operator has paused stays paused. */
static void test_paused(void **state)
{
    struct lb_take_opts o = {0};
    struct lb_take_result res;
    struct lb_fake_config c = busy;
    struct lb_ckpt_entry ck;
    struct lb_vm_entry e;
    lb_fake_id id;

    (void)state;
    c.start_paused = true;
    id = boot(&c, &e);
    take(&o, &res, NULL);
    assert_false(stats_of(id).running);
    assert_true(res.pause_ms == 0);
    assert_good("vm@1", id, true);
    assert_int_equal(lb_catalog_find(catalog, "vm@1", NULL, &ck, NULL), 0);
    assert_true(ck.info.meta.paused);
    lb_ckpt_entry_free(&ck);
    assert_int_equal(entry_in(dir, "vm").state, LB_VM_RUNNING);
    o.suspend = true;
    take(&o, &res, NULL);
    assert_int_equal(lb_catalog_find(catalog, "vm@suspend", NULL, &ck, NULL), 0);
    assert_true(ck.info.meta.paused);
    lb_ckpt_entry_free(&ck);
    assert_good("vm@suspend", 0, true);
}

static void test_no_disk(void **state)
{
    struct lb_take_opts o = {0};
    struct lb_take_result res;
    struct lb_fake_config c = busy;
    struct lb_error err = LB_ERROR_INIT;
    struct lb_vm_entry e;
    lb_fake_id id;

    (void)state;
    c.no_overlay = true;
    id = boot(&c, &e);
    assert_int_equal(take(&o, &res, &err), -1);
    assert_int_equal(err.code, LB_E_UNSUPPORTED);
    assert_non_null(strstr(err.remedy, "--no-disk"));
    assert_goes_on(id);
    assert_nothing_left(0);
    assert_int_equal(checkpoints(), 0);
    o.no_disk = true;
    take(&o, &res, NULL);
    assert_good(res.ref, id, false);
}

/* The VM ran on another host that used the same number: an image of that name is in its chain, and stays. */
static void test_name_in_use(void **state)
{
    LB_AUTO_FREE char *there = lb_asprintf("%s.lb-vm-1", disk), *ours = lb_asprintf("%s.lb-vm-2", disk);
    struct lb_take_opts o = {0};
    struct lb_take_result res;
    struct lb_vm_entry e;
    struct stat st;
    lb_fake_id id = boot(&busy, &e);

    (void)state;
    close(open(there, O_RDWR | O_CREAT, 0600));
    take(&o, &res, NULL);
    assert_good("vm@2", id, true);
    assert_int_equal(stat(there, &st), 0);
    assert_int_equal(st.st_size, 0);
    assert_int_equal(access(ours, F_OK), 0);
    assert_int_equal(unlink(there), 0);
}

static void test_refused(void **state)
{
    static const enum lb_vm_state not[] = {LB_VM_MIGRATING_OUT, LB_VM_INCOMING, LB_VM_HANDED_OVER, LB_VM_DEAD,
                                           LB_VM_PROTECTED, LB_VM_STANDBY, LB_VM_CHECKPOINTING, LB_VM_SUSPENDED,
                                           LB_VM_RESTORING, LB_VM_FILLING};
    struct lb_take_opts o = {0};
    struct lb_take_result res;
    struct lb_error err;
    struct lb_vm_entry e;
    lb_fake_id id = boot(&busy, &e);

    (void)state;
    for (unsigned i = 0; i < LB_ARRAY_LEN(not); i++)
        for (int suspend = 0; suspend < 2; suspend++) {
            o.suspend = suspend;
            e.state = not[i];
            assert_int_equal(lb_vm_entry_save(dir, &e, NULL), 0);
            assert_int_equal(take(&o, &res, &err), -1);
            assert_int_equal(err.code, LB_E_STATE);
            assert_true(err.remedy[0]);
            assert_int_equal(entry_in(dir, "vm").state, not[i]);
            assert_int_equal(lb_fake_calls(LB_FAKE_STOP), 0);
        }
    assert_goes_on(id);
}

/* ------------------------------------------------------------------ everything goes wrong */

static void assert_as_before(lb_fake_id id)
{
    assert_goes_on(id);
    assert_int_equal(bad_pages(id), 0);
    assert_int_equal(entry_in(dir, "vm").state, LB_VM_RUNNING);
    assert_int_equal(lb_fake_running("vm"), 1);
    assert_nothing_left(0);
}

static void test_cancel(void **state)
{
    struct lb_take_opts o = {0};
    struct lb_take_result res;
    struct lb_vm_entry e;
    lb_fake_id id = boot(&busy, &e);

    (void)state;
    for (int suspend = 0; suspend < 2; suspend++)
        for (seen.cancel_at = 1;; seen.cancel_at++) {
            struct lb_error err = LB_ERROR_INIT;
            int rc;

            o.suspend = suspend;
            seen.cancel_fd = eventfd(0, EFD_CLOEXEC);
            rc = take(&o, &res, &err);
            close(seen.cancel_fd);
            if (!rc) { /* the last report is that it is done */
                assert_true(seen.cancel_at >= 4 && seen.reports == seen.cancel_at);
                if (!suspend)
                    assert_good(res.ref, id, true);
                break;
            }
            assert_int_equal(err.code, LB_E_CANCELLED);
            assert_int_equal(checkpoints(), (unsigned)suspend);
            assert_goes_on(id);
            assert_int_equal(entry_in(dir, "vm").state, LB_VM_RUNNING);
            assert_nothing_left((unsigned)suspend);
        }
    assert_int_equal(entry_in(dir, "vm").state, LB_VM_SUSPENDED);
    assert_good("vm@suspend", 0, true);
}

/* The guest's disk was frozen and nothing came of it, and the images cannot be joined either: the next one does. */
static void test_undo_later(void **state)
{
    struct lb_take_opts o = {0};
    struct lb_take_result res;
    struct lb_error err;
    struct lb_vm_entry e;
    struct lb_ckpt_entry ck;
    lb_fake_id id = boot(&busy, &e);
    char path[128];

    (void)state;
    seen.cancel_fd = eventfd(0, EFD_CLOEXEC);
    seen.cancel_at = 4; /* writing: after the pause */
    lb_fake_fail(LB_FAKE_DISK_JOIN, 1, LB_E_HV);
    assert_int_equal(take(&o, &res, &err), -1);
    assert_int_equal(err.code, LB_E_CANCELLED);
    close(seen.cancel_fd);
    seen.cancel_fd = -1;
    seen.cancel_at = 0;
    assert_int_equal(lb_fake_calls(LB_FAKE_DISK_JOIN), 1);
    assert_goes_on(id);
    assert_int_equal(entry_in(dir, "vm").state, LB_VM_RUNNING);
    snprintf(path, sizeof(path), "%s/vms/vm", dir);
    assert_int_equal(count_files(path, "take.json"), 1);
    assert_int_equal(count_files(dir, ".lb-vm-1"), 1);

    take(&o, &res, NULL);
    assert_int_equal(lb_fake_calls(LB_FAKE_DISK_JOIN), 2);
    assert_string_equal(res.ref, "vm@2");
    assert_good("vm@2", id, true);
    assert_int_equal(lb_catalog_find(catalog, "vm@2", NULL, &ck, NULL), 0);
    assert_string_equal(ck.info.meta.disks[0].path, disk);
    lb_ckpt_entry_free(&ck);
    assert_int_equal(count_files(dir, ".lb-vm-1"), 0);
    assert_nothing_left(1);
    assert_goes_on(id);
}

enum how { FAILS, FAILS_LATE, DIES };

/* One take with the nth call of a slot going wrong. false: there was no nth call. */
static bool one_fault(enum lb_fake_slot slot, unsigned nth, enum how how, bool suspend)
{
    struct lb_take_opts o = {.suspend = suspend};
    struct lb_error err = LB_ERROR_INIT;
    struct lb_take_result res;
    struct lb_vm_entry e;
    lb_fake_id id = boot(&busy, &e);
    bool reached, died;
    int rc;

    (how == DIES ? lb_fake_die(slot, nth)
                 : how == FAILS ? lb_fake_fail(slot, nth, LB_E_HV) : lb_fake_fail_late(slot, nth, LB_E_HV));
    rc = take(&o, &res, &err);
    reached = lb_fake_calls(slot) >= nth;
    died = how == DIES && reached;
    lb_fake_fail(slot, 0, LB_E_HV);
    e = entry_in(dir, "vm");
    if (suspend && !rc) {
        assert_int_equal(e.state, LB_VM_SUSPENDED);
        assert_int_equal(lb_fake_count("vm"), 0);
        assert_good("vm@suspend", 0, true);
        assert_nothing_left(0);
    } else if (died) {
        assert_int_equal(e.state, LB_VM_DEAD);
        assert_int_equal(lb_fake_count("vm"), 0);
        if (!rc) /* it was all there */
            assert_good(res.ref, 0, true);
        else
            assert_int_equal(checkpoints(), 0);
    } else if (rc) {
        assert_int_equal(checkpoints(), 0);
        assert_as_before(id);
    } else {
        assert_goes_on(id);
        assert_good(res.ref, id, true);
        assert_int_equal(e.state, LB_VM_RUNNING);
        assert_nothing_left(1);
    }
    lb_fake_reset();
    lb_remove_tree(catalog, NULL);
    assert_int_equal(lb_vm_entry_remove(dir, "vm", NULL), 0);
    for (DIR *v = opendir(dir); v; closedir(v), v = NULL) /* overlays of the dead and of the good */
        for (struct dirent *d; (d = readdir(v));) {
            char path[512];

            snprintf(path, sizeof(path), "%s/%.200s", dir, d->d_name);
            if (strstr(d->d_name, ".lb-"))
                unlink(path);
        }
    return reached;
}

static void sweep(bool suspend)
{
    static const enum lb_fake_slot slots[] = {
        LB_FAKE_ATTACH, LB_FAKE_DESCRIBE, LB_FAKE_BLOCKS, LB_FAKE_STATUS, LB_FAKE_DISKS, LB_FAKE_LOG_ENABLE,
        LB_FAKE_LOG_CLEAN, LB_FAKE_LOG_PEEK, LB_FAKE_LOG_DISABLE, LB_FAKE_POPULATED, LB_FAKE_STOP, LB_FAKE_CONT,
        LB_FAKE_SAVE_BEGIN, LB_FAKE_SAVE_END, LB_FAKE_CHECKPOINT_MODE, LB_FAKE_CLOCK_STEP, LB_FAKE_DESTROY,
        LB_FAKE_DISK_OVERLAY, LB_FAKE_DISK_FREEZE,
    };
    unsigned n = 0;

    for (unsigned s = 0; s < LB_ARRAY_LEN(slots); s++)
        for (int how = FAILS; how <= DIES; how++) {
            bool late = slots[s] == LB_FAKE_STOP || slots[s] == LB_FAKE_CONT;

            if ((how == FAILS_LATE && !late) || (how == DIES && slots[s] == LB_FAKE_ATTACH))
                continue;
            /* a slot is called for every few pages: the first calls are as good as all */
            for (unsigned nth = 1; nth <= 12 && one_fault(slots[s], nth, (enum how)how, suspend); nth++)
                n++;
        }
    assert_true(n > 30);
    print_message("# %u faults\n", n);
}

static void test_faults_live(void **state)
{
    (void)state;
    sweep(false);
}

static void test_faults_suspend(void **state)
{
    (void)state;
    sweep(true);
}

/* As a session leaves it that is killed in the pause. */
static void killed_in_pause(struct lb_vm_entry *e, const char *ref, const struct lb_take_record *rec)
{
    struct lb_vm_ident ident = {.name = "vm", .qmp_path = e->qmp_path};
    struct lb_hv_vm *vm;

    assert_int_equal(lb_hv_attach(&lb_hv_fake, &ident, &vm, NULL), 0);
    assert_int_equal(lb_hv_stop(vm, NULL), 0);
    lb_hv_detach(vm);
    e->state = LB_VM_CHECKPOINTING;
    snprintf(e->checkpoint, sizeof(e->checkpoint), "%s", ref);
    assert_int_equal(lb_vm_entry_save(dir, e, NULL), 0);
    assert_int_equal(lb_take_record_save(dir, "vm", rec, NULL), 0);
}

static void recover(struct lb_error *err)
{
    struct lb_ckpt_env env = env_here();
    struct lb_error why = LB_ERROR_INIT;
    bool fill_wanted = true;
    char text[512];
    int rc = lb_ckpt_recover(&env, "vm", &fill_wanted, text, &why);

    assert_false(fill_wanted);
    if (err)
        *err = why;
    else if (rc)
        fail_msg("%s", why.message);
}

static void test_recover_pause(void **state)
{
    struct lb_take_record rec = {.number = 0};
    struct lb_vm_entry e;
    lb_fake_id id = boot(&busy, &e);

    (void)state;
    killed_in_pause(&e, "vm@suspend", &rec);
    recover(NULL);
    assert_as_before(id);
    rec.number = 7;
    killed_in_pause(&e, "vm@7", &rec);
    lb_fake_fail(LB_FAKE_CONT, 1, LB_E_HV);
    struct lb_error err;
    recover(&err); /* not this time: the entry still says what it is */
    assert_int_equal(err.code, LB_E_HV);
    assert_int_equal(entry_in(dir, "vm").state, LB_VM_CHECKPOINTING);
    assert_false(stats_of(id).running);
    recover(NULL);
    assert_as_before(id);
    rec.paused = true;
    killed_in_pause(&e, "vm@7", &rec);
    recover(NULL);
    assert_false(stats_of(id).running);
    assert_int_equal(entry_in(dir, "vm").state, LB_VM_RUNNING);
}

/* Killed when the file had its name and nothing else was said: the guest decides which of the two it is. */
static void test_recover_committed(void **state)
{
    struct lb_take_opts o = {.suspend = true};
    struct lb_take_record rec = {.number = 0};
    struct lb_take_result res;
    struct lb_vm_entry e;
    lb_fake_id id = boot(&busy, &e);

    (void)state;
    take(&o, &res, NULL); /* the guest has ended: as when it died after the session */
    e = entry_in(dir, "vm");
    e.state = LB_VM_CHECKPOINTING;
    assert_int_equal(lb_vm_entry_save(dir, &e, NULL), 0);
    assert_int_equal(lb_take_record_save(dir, "vm", &rec, NULL), 0);
    recover(NULL);
    assert_int_equal(entry_in(dir, "vm").state, LB_VM_SUSPENDED);
    assert_good("vm@suspend", 0, true);
    assert_nothing_left(0);

    id = boot(&busy, &e); /* it is still there, paused: it goes on, the file goes */
    killed_in_pause(&e, "vm@suspend", &rec);
    recover(NULL);
    assert_as_before(id);
    assert_int_equal(checkpoints(), 0);

    o.suspend = false;
    take(&o, &res, NULL);
    e = entry_in(dir, "vm");
    rec.number = 1;
    rec.frozen = true;
    rec.disks = lb_alloc(sizeof(*rec.disks));
    rec.n_disks = 1;
    strcpy(rec.disks[0].id, "disk0");
    snprintf(rec.disks[0].overlay, sizeof(rec.disks[0].overlay), "%s.lb-vm-1", disk);
    strcpy(rec.disks[0].base, disk);
    killed_in_pause(&e, "vm@1", &rec);
    recover(NULL); /* the overlay is the disk, its base the checkpoint's */
    assert_goes_on(id);
    assert_good("vm@1", id, true);
    assert_nothing_left(1);
    assert_string_equal(entry_in(dir, "vm").checkpoint, "vm@1");

    lb_fake_kill(id, NULL); /* a checkpoint that came to nothing, then the guest died */
    e.state = LB_VM_CHECKPOINTING;
    rec.number = 2;
    rec.frozen = false;
    assert_int_equal(lb_vm_entry_save(dir, &e, NULL), 0);
    snprintf(rec.disks[0].overlay, sizeof(rec.disks[0].overlay), "%s.lb-vm-2", disk);
    close(open(rec.disks[0].overlay, O_CREAT | O_RDWR, 0600));
    assert_int_equal(lb_take_record_save(dir, "vm", &rec, NULL), 0);
    recover(NULL);
    assert_int_equal(entry_in(dir, "vm").state, LB_VM_DEAD);
    assert_nothing_left(1);
    lb_take_record_free(&rec);
}

static void test_recover_suspended(void **state)
{
    struct lb_take_opts o = {.suspend = true};
    struct lb_take_result res;
    struct lb_error err;
    struct lb_vm_entry e, sus;
    lb_fake_id id;

    (void)state;
    boot(&busy, &e);
    take(&o, &res, NULL);
    sus = entry_in(dir, "vm");
    id = boot(&busy, &e); /* decided, but the process is still there */
    sus.proc = e.proc;
    memcpy(sus.qmp_path, e.qmp_path, sizeof(sus.qmp_path));
    assert_int_equal(lb_vm_entry_save(dir, &sus, NULL), 0);
    assert_int_equal(rename(res.path, disk), 0); /* its file cannot be seen: nothing is ended for it */
    recover(&err);
    assert_int_equal(err.code, LB_E_NOT_FOUND);
    assert_int_equal(lb_fake_count("vm"), 1);
    assert_int_equal(rename(disk, res.path), 0);
    recover(NULL);
    assert_int_equal(lb_fake_count("vm"), 0);
    assert_int_equal(entry_in(dir, "vm").state, LB_VM_SUSPENDED);
    assert_int_equal(entry_in(dir, "vm").proc.pid, 0);

    id = boot(&busy, &e); /* a receiver that was to become it */
    e.state = LB_VM_RESTORING;
    strcpy(e.checkpoint, "vm@suspend");
    assert_int_equal(lb_vm_entry_save(dir, &e, NULL), 0);
    recover(NULL);
    assert_int_equal(lb_fake_count("vm"), 0);
    assert_int_equal(entry_in(dir, "vm").state, LB_VM_SUSPENDED);
    id = boot(&busy, &e); /* or another VM */
    e.state = LB_VM_RESTORING;
    strcpy(e.checkpoint, "other@suspend");
    assert_int_equal(lb_vm_entry_save(dir, &e, NULL), 0);
    recover(NULL);
    assert_int_equal(lb_fake_count("vm"), 0);
    assert_int_equal(lb_vm_entry_load(dir, "vm", &e, &err), -1);
    assert_int_equal(err.code, LB_E_NOT_FOUND);
    (void)id;
}

static void test_full_disk(void **state)
{
    struct lb_take_opts o = {0};
    struct lb_take_result res;
    struct lb_error err;
    struct lb_fake_config c = busy;
    struct lb_vm_entry e;
    lb_fake_id id;

    (void)state;
    c.random_bytes = LB_PAGE_SIZE; /* does not compress */
    id = boot(&c, &e);
    if (mkdir(catalog, 0700) || mount("tmpfs", catalog, "tmpfs", 0, "size=1m"))
        skip(); /* not root */
    for (int suspend = 0; suspend < 2; suspend++) {
        o.suspend = suspend;
        assert_int_equal(take(&o, &res, &err), -1);
        assert_int_equal(err.code, LB_E_NO_SPACE);
        assert_int_equal(checkpoints(), 0);
        assert_as_before(id);
    }
    assert_int_equal(umount(catalog), 0);
}

int main(void)
{
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
    const struct CMUnitTest tests[] = {
        T(test_live), T(test_live_no_map), T(test_increments), T(test_rounds),
        T(test_little_room), T(test_suspend), T(test_paused), T(test_no_disk),
        T(test_name_in_use),
        T(test_refused), T(test_cancel), T(test_undo_later), T(test_faults_live), T(test_faults_suspend),
        T(test_recover_pause), T(test_recover_committed), T(test_recover_suspended), T(test_full_disk),
    };
    lb_log_set_level(LB_LOG_ERROR);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
