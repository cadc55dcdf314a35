/*
 * Checkpoints brought back to life: real VMs whose guest checks every page of its memory and every block of its disk,
 * and has a nonce in its memory alone (tests/guest). It says so once a second on its serial port.
 */
#include "tests/integration/qemu_util.h"

#include <dirent.h>

#include "checkpoint/checkpoint.h"
#include "checkpoint/fill.h"

#define GUEST_S 90
#define MAX_VMS 8

static const char machine_args[] =
    "-machine pc,accel=tcg -m 192 -nodefaults -display none -vga std -chardev file,id=s,path=@D/t.log -serial chardev:s "
    "-drive if=none,id=d0,file=@D/data.raw,format=raw,cache=none -device virtio-blk-pci,drive=d0 "
    "-kernel @K/vmlinuz -initrd @K/initrd.img -append console=ttyS0\tquiet\tlb.dirty=4:24\tlb.disk=vda";

/* One host with one VM, "t". */
static struct machine {
    struct qemu q;
    char state[96], catalog[128];
    struct lb_ckpt_env env;
} m;

struct said {
    unsigned long long nonce, bad, passes, disk_bad, disk_verified;
    bool ready;
};

/* ----------------------------------------------------------------------- guest */

static unsigned long long number(const char *line, const char *key)
{
    const char *at = strstr(line, key);
    return at ? strtoull(at + strlen(key), NULL, 10) : 0;
}

/* Last whole line of the guest of a VM: its own log, or that of its folder when it is another one. */
static bool last_said(const char *name, struct said *out)
{
    char log[256];
    LB_AUTO_FREE char *text = NULL;
    char *line = NULL;

    if (strcmp(name, "t"))
        snprintf(log, sizeof(log), "%s/vms/%s/t.log", m.state, name);
    else
        snprintf(log, sizeof(log), "%s/t.log", m.q.dir);
    if (lb_file_read(log, 8 << 20, &text, NULL, NULL) < 0)
        return false;
    for (char *p = text; (p = strstr(p, "LB {")) && strchr(p, '\n'); p++)
        line = p;
    if (!line)
        return false;
    *strchr(line, '\n') = 0;
    *out = (struct said){
        .nonce = strtoull(strchr(strstr(line, "\"nonce\":"), ':') + 2, NULL, 16),
        .bad = number(line, "\"bad_pages\":"),
        .passes = number(line, "\"verify_passes\":"),
        .disk_bad = number(line, "\"disk_bad\":"),
        .disk_verified = number(line, "\"disk_verified\":"),
        .ready = strstr(line, "\"ready\":true") != NULL,
    };
    if (out->bad || out->disk_bad)
        print_message("%s: %s\n", name, line);
    return true;
}

/* All its pages checked once more, and blocks of its disk; nothing bad. */
static struct said wait_good(const char *name)
{
    struct said first = {0}, now = {0};
    bool have = false;

    for (int i = 0; i < GUEST_S * 20; i++, usleep(50000)) {
        if (!last_said(name, &now) || !now.ready)
            continue;
        if (!have)
            first = now;
        have = true;
        assert_int_equal(now.bad, 0);
        assert_int_equal(now.disk_bad, 0);
        if (now.passes >= first.passes + 2 && now.disk_verified > first.disk_verified + 20)
            return now;
    }
    fail_msg("guest %s does not verify its memory and its disk", name);
    return now;
}

/* --------------------------------------------------------------------- the host */

static void start_vm(void)
{
    struct lb_vm_entry e = {.name = "t", .hypervisor = "qemu", .origin = "adopted"};
    const char *guest = getenv("LB_GUEST");
    char args[1024], *to = args;
    char data[128];
    int fd;

    memset(&m, 0, sizeof(m));
    qemu_dir(&m.q);
    snprintf(data, sizeof(data), "%s/data.raw", m.q.dir);
    fd = open(data, O_RDWR | O_CREAT, 0600);
    assert_return_code(ftruncate(fd, 96 << 20), errno);
    close(fd);
    for (const char *p = machine_args; *p; p++)
        if (p[0] == '@' && p[1] == 'K') {
            to += sprintf(to, "%s", guest ? guest : "build/guest");
            p++;
        } else {
            *to++ = *p;
        }
    *to = 0;
    qemu_start(&m.q, args);
    snprintf(m.state, sizeof(m.state), "%s/state", m.q.dir);
    snprintf(m.catalog, sizeof(m.catalog), "%s/checkpoints", m.state);
    m.env = (struct lb_ckpt_env){.state_dir = m.state, .catalog_dir = m.catalog, .hv = &lb_hv_qemu, .cancel_fd = -1};
    snprintf(e.qmp_path, sizeof(e.qmp_path), "%s", m.q.qmp);
    OK(lb_proc_identify(m.q.pid, &e.proc, err));
    OK(lb_vm_entry_save(m.state, &e, err));
}

static int end_all(void **state)
{
    struct lb_vm_entry *v = NULL;
    unsigned n = 0;

    (void)state;
    unsetenv("LIFEBOAT_PAUSE_AT");
    if (!m.q.dir[0])
        return 0;
    lb_vm_entry_list(m.state, &v, &n, NULL);
    for (unsigned i = 0; i < n; i++) {
        struct lb_vm_ident id = {.name = v[i].name, .proc = v[i].proc, .qmp_path = v[i].qmp_path};
        if (v[i].proc.pid != m.q.pid)
            lb_hv_end(&lb_hv_qemu, &id, NULL);
    }
    free(v);
    qemu_end(&m.q);
    m.q.dir[0] = 0;
    return 0;
}

static struct lb_vm_entry entry_of(const char *name)
{
    struct lb_vm_entry e;

    OK(lb_vm_entry_load(m.state, name, &e, err));
    return e;
}

/* A file of this host, from its folder. */
static bool exists(const char *name)
{
    char path[256];

    snprintf(path, sizeof(path), "%s/%s", m.q.dir, name);
    return access(path, F_OK) == 0;
}

static struct lb_take_result take(bool suspend, struct lb_ckpt_key *key)
{
    struct lb_vm_entry e = entry_of("t");
    struct lb_take_opts o = {.suspend = suspend, .key = key};
    struct lb_take_result res;

    OK(lb_ckpt_take(&m.env, &e, &o, &res, err));
    print_message("%s: pause %.1f ms, total %.1f ms, %llu of %llu pages stored, %llu KiB\n", res.ref, res.pause_ms,
                  res.total_ms, (unsigned long long)res.stats.stored_pages, (unsigned long long)res.stats.pages,
                  (unsigned long long)res.stats.file_bytes >> 10);
    if (suspend && m.q.pid) {
        waitpid(m.q.pid, NULL, 0);
        m.q.pid = 0;
    }
    return res;
}

static void restore(const char *ref, const struct lb_restore_opts *o)
{
    struct lb_restore_result res;
    struct lb_fill *f = NULL;
    uint64_t t0;

    OK(lb_ckpt_restore(&m.env, ref, o, &f, &res, err));
    print_message("%s as %s: running after %.1f ms, %llu of %llu MiB placed, %s\n", ref, res.vm, res.running_ms,
                  (unsigned long long)res.placed_bytes >> 20, (unsigned long long)res.ram_bytes >> 20, res.note);
    assert_int_equal(res.filling, !o->eager);
    assert_int_equal(f != NULL, res.filling);
    if (!f)
        return;
    assert_int_equal(entry_of(res.vm).state, LB_VM_FILLING);
    t0 = lb_now_ns();
    OK(lb_ckpt_fill(f, err));
    print_message("filled after %.1f ms\n", ms_since(t0));
}

static struct lb_error refused(const char *ref, const struct lb_restore_opts *o)
{
    struct lb_error why = LB_ERROR_INIT;
    struct lb_restore_result res;
    struct lb_fill *f = NULL;

    assert_int_equal(lb_ckpt_restore(&m.env, ref, o, &f, &res, &why), -1);
    assert_null(f);
    print_message("%s: %s (%s)\n", ref, why.message, why.remedy);
    return why;
}

static unsigned qemus(void)
{
    struct lb_vm_entry *v = NULL;
    unsigned n = 0, alive = 0;

    OK(lb_vm_entry_list(m.state, &v, &n, err));
    for (unsigned i = 0; i < n; i++)
        alive += lb_proc_alive(&v[i].proc);
    free(v);
    return alive;
}

/* --------------------------------------------------------------- suspend, resume */

/* What the guest needed when it last came back is what its next suspend expects first. */
static void learned_is_hot(void)
{
    LB_AUTO_FREE char *path = lb_ws_path(m.env.catalog_dir, "t", 0);
    LB_AUTO_FREE uint64_t *learned = NULL, *hot = NULL;
    struct lb_chain *c;
    struct lb_ckpt_entry e;
    uint64_t n, n_hot;

    lb_ws_load(path, NULL, &learned, &n);
    print_message("%llu pages learned\n", (unsigned long long)n);
    assert_in_range(n, 100, 8192);
    OK(lb_catalog_find(m.env.catalog_dir, "t@suspend", NULL, &e, err));
    OK(lb_catalog_open(m.env.catalog_dir, &e, NULL, &c, err));
    OK(lb_chain_hot(c, &hot, &n_hot, err));
    assert_true(n_hot >= n);
    assert_memory_equal(hot, learned, n * sizeof(*hot));
    lb_chain_close(c);
    lb_ckpt_entry_free(&e);
}

static void suspend_and_resume(bool eager, struct lb_ckpt_key *key)
{
    struct lb_restore_opts o = {.eager = eager, .key = key};
    struct lb_error why;
    struct said before, after;

    start_vm();
    before = wait_good("t");
    for (int i = 0; i < 2; i++) {
        take(true, key);
        assert_int_equal(entry_of("t").state, LB_VM_SUSPENDED);
        if (i && !eager)
            learned_is_hot();
        if (key) {
            struct lb_restore_opts without = {.eager = eager};
            why = refused("t@suspend", &without);
            assert_int_equal(why.code, LB_E_AUTH);
        }
        restore("t@suspend", &o);
        assert_int_equal(entry_of("t").state, LB_VM_RUNNING);
        assert_false(exists("state/checkpoints/t/suspend.lbc"));
        after = wait_good("t");
        assert_true(after.nonce == before.nonce);
        assert_true(after.passes > before.passes);
        assert_true(exists("state/checkpoints/t/suspend.ws") == !eager); /* all of it was there */
        before = after;
    }
}

static void test_resume_lazy(void **state)
{
    (void)state;
    suspend_and_resume(false, NULL);
}

static void test_resume_eager_encrypted(void **state)
{
    struct lb_ckpt_key *key;

    (void)state;
    OK(lb_ckpt_key_passphrase("only for a test", 15, &key, err));
    suspend_and_resume(true, key);
    lb_ckpt_key_free(key);
}

/* Its disk is not what it was: the memory does not fit it. */
static void test_disk_changed(void **state)
{
    struct lb_restore_opts o = {0};
    struct lb_error why;
    char data[128];
    int fd;

    (void)state;
    start_vm();
    wait_good("t");
    take(true, NULL);
    snprintf(data, sizeof(data), "%s/data.raw", m.q.dir);
    fd = open(data, O_RDWR);
    assert_int_equal(pwrite(fd, "x", 1, 90 << 20), 1); /* where the guest never reads */
    why = refused("t@suspend", &o);
    assert_int_equal(why.code, LB_E_STATE);
    assert_non_null(strstr(why.message, "has changed"));
    assert_int_equal(entry_of("t").state, LB_VM_SUSPENDED);
    assert_true(exists("state/checkpoints/t/suspend.lbc"));
    close(fd);
    o.force = true;
    restore("t@suspend", &o);
    wait_good("t");
}

/* ------------------------------------------------------------------- live, others */

/* Refused before anything of it is loaded. */
static void check_lesser_processor(void)
{
    LB_AUTO_FREE char *path = lb_asprintf("%s/lesser", m.state);
    struct lb_launch_opts lesser = {.emulator = path};
    struct lb_restore_opts o = {.as = "lesser"};
    struct lb_error why;
    FILE *f = fopen(path, "w");

    assert_non_null(f);
    fprintf(f, "#!/bin/sh\nexec %s \"$@\" -cpu 486\n", qemu_bin());
    fclose(f);
    assert_int_equal(chmod(path, 0755), 0);
    m.env.launch = &lesser;
    why = refused("t@2", &o);
    m.env.launch = NULL;
    assert_int_equal(why.code, LB_E_PREFLIGHT);
    assert_non_null(strstr(why.message, "CPUID."));
    assert_non_null(strstr(why.remedy, "processor"));
    assert_false(exists("lesser.lb-1.qcow2") || exists("state/vms/lesser"));
}

static void test_restore_beside(void **state)
{
    struct lb_restore_opts lazy = {.as = "lazy"}, eager = {.as = "eager", .eager = true};
    struct lb_error why;
    struct said t, other;

    (void)state;
    start_vm();
    t = wait_good("t");
    take(false, NULL);
    usleep(300000);
    take(false, NULL);
    restore("t@1", &lazy);
    restore("t@2", &eager);
    assert_true(exists("lazy.lb-1.qcow2") && exists("eager.lb-1.qcow2"));
    other = wait_good("lazy");
    assert_true(other.nonce == t.nonce);
    other = wait_good("eager");
    assert_true(other.nonce == t.nonce);
    wait_good("t");
    assert_int_equal(entry_of("lazy").state, LB_VM_RUNNING);
    assert_string_equal(entry_of("lazy").origin, "restored");
    assert_true(exists("state/checkpoints/t/1.ws"));
    assert_int_equal(qemus(), 3);
    /* again, with the working set that it learned */
    strcpy(lazy.as, "again");
    restore("t@1", &lazy);
    wait_good("again");

    why = refused("t@1", &eager); /* the name is taken, and its disks stay */
    assert_int_equal(why.code, LB_E_EXISTS);
    assert_true(exists("eager.lb-1.qcow2"));
    assert_false(exists("eager.lb-2.qcow2"));
    /* what fails late leaves nothing: no emulator that works */
    struct lb_launch_opts bad = {.emulator = "/bin/true"};
    struct lb_restore_opts o = {.as = "broken"};
    m.env.launch = &bad;
    why = refused("t@2", &o);
    m.env.launch = NULL;
    assert_int_equal(why.code, LB_E_HV);
    assert_false(exists("broken.lb-1.qcow2") || exists("state/vms/broken"));
    check_lesser_processor();
    LB_AUTO_FREE char *users = NULL;
    char path[256];
    snprintf(path, sizeof(path), "%s/t/disks.json", m.catalog);
    OK(lb_file_read(path, 1 << 20, &users, NULL, err));
    assert_null(strstr(users, "broken"));
    assert_non_null(strstr(users, "eager"));
}

static unsigned long long pss_kib(pid_t pid)
{
    LB_AUTO_FREE char *text = NULL;
    char path[64];

    snprintf(path, sizeof(path), "/proc/%d/smaps_rollup", (int)pid);
    OK(lb_file_read(path, 1 << 20, &text, NULL, err));
    return number(text, "\nPss:");
}

static unsigned long long rss_kib(pid_t pid)
{
    LB_AUTO_FREE char *text = NULL;
    char path[64];

    snprintf(path, sizeof(path), "/proc/%d/smaps_rollup", (int)pid);
    OK(lb_file_read(path, 1 << 20, &text, NULL, err));
    return number(text, "\nRss:");
}

static void test_clones(void **state)
{
    struct lb_clone_opts o = {.count = 3};
    struct lb_clone_result res;
    unsigned long long pss = 0, rss = 0;
    struct said t, other;

    (void)state;
    start_vm();
    t = wait_good("t");
    take(false, NULL);
    OK(lb_ckpt_clone(&m.env, "t@1", &o, &res, err));
    assert_int_equal(res.n, 3);
    for (unsigned i = 0; i < res.n; i++) {
        struct lb_vm_entry e = entry_of(res.names[i]);
        print_message("%s runs after %.1f ms\n", res.names[i], res.running_ms[i]);
        assert_int_equal(e.state, LB_VM_RUNNING);
        assert_string_equal(e.origin, "clone");
        pss += pss_kib(e.proc.pid);
        rss += rss_kib(e.proc.pid);
    }
    print_message("Pss of 3: %llu MiB, Rss %llu MiB\n", pss >> 10, rss >> 10);
    assert_true(pss < rss * 4 / 5); /* a third of it is QEMU's own, and the guests write on */
    for (unsigned i = 0; i < res.n; i++) {
        other = wait_good(res.names[i]);
        assert_true(other.nonce == t.nonce);
    }
    free(res.names);
    free(res.running_ms);
    o.count = 1;
    OK(lb_ckpt_clone(&m.env, "t@1", &o, &res, err));
    assert_string_equal(res.names[0], "t-4");
    free(res.names);
    free(res.running_ms);
    wait_good("t");
}

/* -------------------------------------------------------- deaths of who restores */

/* A session that stops at `point` and is killed there. */
static void killed_at(const char *point, const char *ref, const struct lb_restore_opts *o)
{
    char flag[128];
    pid_t pid;

    snprintf(flag, sizeof(flag), "%s/there", m.q.dir);
    unlink(flag);
    pid = fork();
    assert_return_code(pid, errno);
    if (!pid) {
        struct lb_restore_result res;
        struct lb_fill *f = NULL;

        setenv("LIFEBOAT_PAUSE_AT", point, 1);
        setenv("LIFEBOAT_PAUSE_FILE", flag, 1);
        if (!lb_ckpt_restore(&m.env, ref, o, &f, &res, NULL) && f)
            lb_ckpt_fill(f, NULL);
        _exit(0);
    }
    for (int i = 0; i < 3000 && access(flag, F_OK); i++)
        usleep(10000);
    assert_int_equal(access(flag, F_OK), 0);
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
}

static bool recover(const char *name)
{
    char text[512];
    bool fill;

    OK(lb_ckpt_recover(&m.env, name, &fill, text, err));
    print_message("%s\n", text);
    return fill;
}

static void test_killed(void **state)
{
    static const char *const early[] = {"restore-launched", "restore-loaded"};
    static const char *const late[] = {"restore-decided", "fill-begun", "fill-half"};
    struct lb_restore_opts o = {0};
    struct said before, after;

    (void)state;
    start_vm();
    before = wait_good("t");
    take(true, NULL);
    for (unsigned i = 0; i < LB_ARRAY_LEN(early); i++) {
        killed_at(early[i], "t@suspend", &o);
        struct lb_vm_entry e = entry_of("t");
        struct lb_proc_id proc = e.proc;
        assert_int_equal(e.state, LB_VM_RESTORING);
        assert_true(lb_proc_alive(&proc));
        if (i == 0) { /* as if it had died before it could note the process */
            e.proc = (struct lb_proc_id){0};
            OK(lb_vm_entry_save(m.state, &e, err));
        }
        assert_false(recover("t"));
        assert_int_equal(entry_of("t").state, LB_VM_SUSPENDED);
        assert_false(lb_proc_alive(&proc));
    }
    for (unsigned i = 0; i < LB_ARRAY_LEN(late); i++) {
        killed_at(late[i], "t@suspend", &o);
        assert_int_equal(entry_of("t").state, LB_VM_FILLING);
        assert_true(recover("t"));
        struct lb_vm_entry e = entry_of("t");
        uint64_t t0 = lb_now_ns();
        OK(lb_ckpt_refill(&m.env, &e, NULL, err));
        print_message("filled again after %.1f ms\n", ms_since(t0));
        assert_int_equal(entry_of("t").state, LB_VM_RUNNING);
        assert_int_equal(qemus(), 1);
        after = wait_good("t");
        assert_true(after.nonce == before.nonce);
        take(true, NULL);
    }
    /* all memory is there, and nobody has made it run */
    o.eager = true;
    killed_at("restore-decided", "t@suspend", &o);
    o.eager = false;
    assert_int_equal(entry_of("t").state, LB_VM_FILLING);
    assert_true(recover("t"));
    struct lb_vm_entry waiting = entry_of("t");
    OK(lb_ckpt_refill(&m.env, &waiting, NULL, err));
    assert_int_equal(entry_of("t").state, LB_VM_RUNNING);
    assert_false(exists("state/checkpoints/t/suspend.lbc"));
    after = wait_good("t");
    assert_true(after.nonce == before.nonce);
    take(true, NULL);
    /* of another VM: nothing is left of it */
    restore("t@suspend", &o);
    take(false, NULL);
    strcpy(o.as, "other");
    killed_at("restore-launched", "t@1", &o);
    assert_true(exists("other.lb-1.qcow2"));
    recover("other");
    assert_false(exists("other.lb-1.qcow2") || exists("state/vms/other"));
    assert_int_equal(qemus(), 1);
    wait_good("t");
}

/* ------------------------------------------------------------------------ damage */

static void flip(const char *path, off_t at)
{
    int fd = open(path, O_RDWR);
    uint8_t b;

    assert_int_equal(pread(fd, &b, 1, at), 1);
    b ^= 0x40;
    assert_int_equal(pwrite(fd, &b, 1, at), 1);
    close(fd);
}

struct fixer {
    char path[512];
    off_t at;
    char note[256];
};

/* Waits until the damage is told, then repairs it. */
static void *fixer_main(void *arg)
{
    struct fixer *x = arg;

    for (int i = 0; i < 600; i++, usleep(50000)) {
        struct lb_vm_entry e;
        if (!lb_vm_entry_load(m.state, "t", &e, NULL) && e.note[0]) {
            snprintf(x->note, sizeof(x->note), "%s", e.note);
            break;
        }
    }
    flip(x->path, x->at);
    return NULL;
}

static void test_damaged(void **state)
{
    struct lb_restore_opts lazy = {0}, eager = {.eager = true};
    struct lb_take_result taken;
    struct lb_restore_result res;
    struct lb_fill *f = NULL;
    struct fixer x = {0};
    struct said before, after;
    struct lb_error why;
    pthread_t t;

    (void)state;
    start_vm();
    before = wait_good("t");
    taken = take(true, NULL);
    snprintf(x.path, sizeof(x.path), "%s", taken.path);
    x.at = (off_t)(taken.stats.file_bytes / 2);
    flip(x.path, x.at);
    why = refused("t@suspend", &eager);
    assert_int_equal(why.code, LB_E_PROTO);
    assert_non_null(strstr(why.message, "pc.ram"));
    assert_int_equal(entry_of("t").state, LB_VM_SUSPENDED);
    assert_int_equal(qemus(), 0);
    /* nobody needs that page before the guest runs: it runs, and waits for it */
    OK(lb_ckpt_restore(&m.env, "t@suspend", &lazy, &f, &res, err));
    assert_true(res.filling);
    assert_int_equal(pthread_create(&t, NULL, fixer_main, &x), 0);
    OK(lb_ckpt_fill(f, err));
    pthread_join(t, NULL);
    print_message("%s\n", x.note);
    assert_non_null(strstr(x.note, "pc.ram"));
    after = wait_good("t");
    assert_true(after.nonce == before.nonce);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(test_resume_lazy, end_all),
        cmocka_unit_test_teardown(test_resume_eager_encrypted, end_all),
        cmocka_unit_test_teardown(test_disk_changed, end_all),
        cmocka_unit_test_teardown(test_restore_beside, end_all),
        cmocka_unit_test_teardown(test_clones, end_all),
        cmocka_unit_test_teardown(test_killed, end_all),
        cmocka_unit_test_teardown(test_damaged, end_all),
    };
    if (getenv("LB_TEST_ONLY"))
        cmocka_set_test_filter(getenv("LB_TEST_ONLY"));
    return cmocka_run_group_tests(tests, NULL, NULL);
}
