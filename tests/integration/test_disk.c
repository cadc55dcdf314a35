/* Disk replication without a hypervisor: libnbd writes into nbdkit with our plugin as QEMU's mirror does,
 * epochs are cut and applied to real images. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <libnbd.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "remus/disk_internal.h"
#include "tests/lib/check.h"

#define DISK_BYTES (8u << 20)
#define N_DISKS 2u
#define MIB (1u << 20)

static char dir[64];

/* What the source told us. */
struct heard {
    struct lb_disk_target **targets; /* `direct` applies to them; NULL: only counts */
    _Atomic unsigned n_direct, n_pressure, n_failed;
    _Atomic uint64_t direct_bytes, largest;
    _Atomic int block;               /* `direct` waits while it is 1 and fails when it is 2 */
    struct lb_error why;
};

static int on_direct(const struct lb_disk_op *op, void *arg, struct lb_error *err)
{
    struct heard *h = arg;
    h->n_direct++;
    if (op->data)
        h->direct_bytes += op->len;
    if (op->data && op->len > h->largest)
        h->largest = op->len;
    while (h->block == 1)
        usleep(1000);
    if (h->block == 2)
        return lb_fail(err, LB_E_NET, "the link is gone");
    return h->targets ? lb_disk_target_apply(h->targets[op->disk], op, err) : 0;
}

static void on_pressure(void *arg)
{
    ((struct heard *)arg)->n_pressure++;
}

static void on_failed(const struct lb_error *why, void *arg)
{
    struct heard *h = arg;
    h->why = *why;
    h->n_failed++;
}

static int setup(void **state)
{
    (void)state;
    strcpy(dir, "/tmp/lbdisk.XXXXXX");
    return mkdtemp(dir) ? 0 : -1;
}

static int teardown(void **state)
{
    (void)state;
    return lb_remove_tree(dir, NULL);
}

static struct lb_disk_source *source(struct heard *h, uint64_t bytes, uint64_t limit)
{
    struct lb_hv_disk disks[N_DISKS] = {{.size_bytes = bytes}, {.size_bytes = bytes}};
    struct lb_disk_source_opts o = {.run_dir = dir, .uid = geteuid(), .gid = getegid(),
                                    .limit_bytes = limit, .direct = on_direct,
                                    .pressure = on_pressure, .failed = on_failed, .arg = h};
    struct lb_disk_source *s = NULL;
    OK(lb_disk_source_open(disks, N_DISKS, &o, &s, err));
    return s;
}

static struct nbd_handle *client_of(const char *path, const char *name)
{
    struct nbd_handle *nbd = nbd_create();
    assert_non_null(nbd);
    nbd_set_strict_mode(nbd, 0); /* requests that the server has to refuse, too */
    nbd_set_export_name(nbd, name);
    if (nbd_connect_unix(nbd, path) < 0)
        fail_msg("%s", nbd_get_error());
    return nbd;
}

static struct nbd_handle *client(const struct lb_disk_source *s, const char *name)
{
    return client_of(lb_disk_source_socket(s), name);
}

static struct lb_disk_target *target(const char *name, const char *format, uint64_t bytes)
{
    char path[128];
    struct lb_disk_target_opts o = {.path = path, .format = format, .size_bytes = bytes,
                                    .run_dir = dir, .uid = geteuid(), .gid = getegid()};
    struct lb_disk_target *t = NULL;
    snprintf(path, sizeof(path), "%s/%s", dir, name);
    OK(lb_disk_target_open(&o, &t, err));
    return t;
}

static unsigned cut_and_apply(struct lb_disk_source *s, struct lb_disk_target **targets)
{
    struct lb_disk_ops ops;
    lb_disk_source_cut_begin(s);
    OK(lb_disk_source_cut_end(s, &ops, err));
    for (unsigned i = 0; targets && i < ops.n; i++)
        OK(lb_disk_target_apply(targets[ops.v[i].disk], &ops.v[i], err));
    for (unsigned i = 0; targets && i < N_DISKS; i++)
        OK(lb_disk_target_flush(targets[i], err));
    unsigned n = ops.n;
    lb_disk_ops_free(&ops);
    return n;
}

static void assert_file_is(const char *name, const uint8_t *want, size_t len)
{
    char path[128];
    static uint8_t got[DISK_BYTES];
    snprintf(path, sizeof(path), "%s/%s", dir, name);
    int fd = open(path, O_RDONLY);
    assert_true(fd >= 0);
    assert_int_equal(pread(fd, got, len, 0), len);
    close(fd);
    for (size_t i = 0; i < len; i++)
        if (got[i] != want[i])
            fail_msg("%s: byte %zu is %d, not %d", name, i, got[i], want[i]);
}

static uint64_t random_state = 0x2545f4914f6cdd1d;
static unsigned pick(unsigned n)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (unsigned)(random_state >> 33) % n;
}

static uint8_t model[N_DISKS][DISK_BYTES];

static void random_request(struct nbd_handle *nbd[], unsigned number)
{
    static uint8_t data[MIB];
    unsigned disk = pick(N_DISKS), longest = pick(10) ? 32 : MIB / 512;
    size_t len = (1 + pick(longest)) * 512;
    uint64_t at = (uint64_t)pick((unsigned)((DISK_BYTES - len) / 512 + 1)) * 512;
    int rc;
    switch (pick(8)) {
    case 0:
        rc = nbd_zero(nbd[disk], len, at, 0);
        memset(model[disk] + at, 0, len);
        break;
    case 1:
        rc = nbd_trim(nbd[disk], len, at, 0);
        memset(model[disk] + at, 0, len);
        break;
    default:
        for (size_t i = 0; i < len; i += 8)
            memcpy(data + i, &(uint64_t){number * UINT64_C(0x9e3779b97f4a7c15) + i}, 8);
        rc = nbd_pwrite(nbd[disk], data, len, at, pick(4) ? 0 : LIBNBD_CMD_FLAG_FUA);
        memcpy(model[disk] + at, data, len);
    }
    if (rc < 0)
        fail_msg("%s", nbd_get_error());
}

/* First copy, then epochs; after every cut the raw image is what was written, at the end the qcow2 too. */
static void test_epochs_arrive_whole(void **state)
{
    (void)state;
    struct lb_disk_target *targets[N_DISKS] = {target("a.raw", "raw", DISK_BYTES),
                                               target("b.qcow2", "qcow2", DISK_BYTES)};
    struct heard h = {.targets = targets};
    struct lb_disk_source *s = source(&h, DISK_BYTES, 0);
    struct nbd_handle *nbd[N_DISKS] = {client(s, "0"), client(s, "1")};
    unsigned number = 0, applied = 0;

    memset(model, 0, sizeof(model));
    for (unsigned i = 0; i < 300; i++)
        random_request(nbd, ++number);
    OK(lb_disk_source_queue(s, err));
    assert_true(h.n_direct >= 300);
    assert_true(h.largest <= LB_DISK_OP_MAX);
    unsigned direct = h.n_direct;
    for (unsigned i = 0; i < N_DISKS; i++)
        OK(lb_disk_target_flush(targets[i], err));
    assert_file_is("a.raw", model[0], DISK_BYTES);
    for (unsigned epoch = 0; epoch < 150; epoch++) {
        for (unsigned i = pick(20); i > 0; i--)
            random_request(nbd, ++number);
        applied += cut_and_apply(s, targets);
        assert_int_equal(lb_disk_source_backlog(s), 0);
        assert_file_is("a.raw", model[0], DISK_BYTES);
    }
    assert_int_equal(h.n_direct, direct);
    assert_true(applied > 300);
    for (unsigned i = 0; i < N_DISKS; i++) {
        nbd_close(nbd[i]);
        uint64_t t0 = lb_now_ns();
        OK(lb_disk_target_close(targets[i], err));
        print_message("target %u closed in %.1f ms\n", i, (double)(lb_now_ns() - t0) / 1e6);
    }
    uint64_t t1 = lb_now_ns();
    lb_disk_source_close(s);
    print_message("source closed in %.1f ms\n", (double)(lb_now_ns() - t1) / 1e6);
    assert_int_equal(h.n_failed, 0);
    run("qemu-img check -q %s/b.qcow2", dir);
    run("qemu-img convert -O raw %s/b.qcow2 %s/b.raw", dir, dir);
    assert_file_is("b.raw", model[1], DISK_BYTES);
    run("test \"$(ls %s)\" = \"$(printf 'a.raw\\nb.qcow2\\nb.raw')\"", dir); /* no socket, no log is left */
}

static void test_a_large_write_is_split(void **state)
{
    (void)state;
    struct heard h = {0};
    struct lb_disk_source *s = source(&h, 64 * MIB, 256 * MIB);
    struct nbd_handle *nbd = client(s, "1");
    size_t len = LB_DISK_WIRE_MAX;
    uint32_t *data = malloc(len);
    for (uint32_t i = 0; i < len / 4; i++)
        data[i] = i;
    OK(lb_disk_source_queue(s, err));
    assert_int_equal(nbd_pwrite(nbd, data, len, 512, 0), 0);
    assert_int_equal(nbd_zero(nbd, len, 32 * MIB, 0), 0);
    struct lb_disk_ops ops;
    lb_disk_source_cut_begin(s);
    OK(lb_disk_source_cut_end(s, &ops, err));
    assert_int_equal(ops.n, 33); /* its last sector was overwritten with zeros */
    assert_int_equal(ops.bytes, len - 512 + 512 - 512);
    for (unsigned i = 0; i < 32; i++) {
        assert_int_equal(ops.v[i].disk, 1);
        assert_int_equal(ops.v[i].offset, 512 + (uint64_t)i * LB_DISK_OP_MAX);
        assert_memory_equal(ops.v[i].data, (char *)data + (size_t)i * LB_DISK_OP_MAX, ops.v[i].len);
    }
    assert_int_equal(ops.v[32].kind, LB_DISK_ZERO);
    assert_int_equal(ops.v[32].len, len);
    lb_disk_ops_free(&ops);
    free(data);
    nbd_close(nbd);
    lb_disk_source_close(s);
}

static void test_what_cannot_be_asked_is_refused(void **state)
{
    (void)state;
    struct heard h = {0};
    struct lb_disk_source *s = source(&h, DISK_BYTES, 0);
    char data[512] = {0};
    struct nbd_handle *nbd = client(s, "0");
    assert_int_equal(nbd_get_size(nbd), DISK_BYTES);
    assert_int_equal(nbd_get_block_size(nbd, LIBNBD_SIZE_MINIMUM), 512);
    assert_int_equal(nbd_get_block_size(nbd, LIBNBD_SIZE_MAXIMUM), LB_DISK_WIRE_MAX);
    assert_int_equal(nbd_pread(nbd, data, sizeof(data), 0, 0), -1);
    assert_int_equal(nbd_get_errno(), EIO);
    assert_int_equal(nbd_pwrite(nbd, data, 100, 0, 0), -1);
    assert_int_equal(nbd_get_errno(), EINVAL);
    assert_int_equal(nbd_pwrite(nbd, data, 512, DISK_BYTES, 0), -1);
    nbd_close(nbd);
    nbd = nbd_create();
    nbd_set_export_name(nbd, "2");
    assert_int_equal(nbd_connect_unix(nbd, lb_disk_source_socket(s)), -1);
    nbd_close(nbd);
    assert_int_equal(h.n_direct, 0);
    lb_disk_source_close(s);
    assert_int_equal(h.n_failed, 0);
}

struct writer {
    struct nbd_handle *nbd;
    _Atomic uint64_t written;
    _Atomic int failed, enough;
};

static void *write_on(void *arg)
{
    struct writer *w = arg;
    char *data = calloc(1, MIB);
    data[0] = 1;
    while (!w->failed && !w->enough) {
        if (nbd_pwrite(w->nbd, data, MIB, w->written % (64 * MIB), 0) < 0)
            w->failed = 1;
        else
            w->written += MIB;
    }
    free(data);
    return NULL;
}

/* A slow link makes the writer wait: what is under way stays bounded. When it breaks, the source says so, once, and the writer goes on. */
static void test_back_pressure_and_a_broken_link(void **state)
{
    (void)state;
    struct heard h = {.block = 1};
    struct lb_disk_source *s = source(&h, 64 * MIB, 0);
    struct writer w = {.nbd = client(s, "0")};
    pthread_t thread;
    pthread_create(&thread, NULL, write_on, &w);
    lb_sleep_ms(500);
    uint64_t at = w.written;
    print_message("%" PRIu64 " MiB under way with a link that stands\n", at / MIB);
    assert_true(at <= 24 * MIB);
    lb_sleep_ms(300);
    assert_int_equal(w.written, at);
    assert_int_equal(h.direct_bytes, LB_DISK_OP_MAX);
    h.block = 2;
    for (int i = 0; i < 2000 && !h.n_failed; i++)
        usleep(1000);
    assert_int_equal(h.n_failed, 1);
    for (int i = 0; i < 5000 && w.written < at + 64 * MIB; i++)
        usleep(1000);
    assert_true(w.written >= at + 64 * MIB);
    w.enough = 1;
    pthread_join(thread, NULL);
    assert_false(w.failed);
    assert_string_equal(h.why.message, "the link is gone");
    struct lb_error err = LB_ERROR_INIT;
    assert_int_equal(lb_disk_source_queue(s, &err), -1);
    assert_string_equal(err.message, "the link is gone");
    nbd_close(w.nbd);
    lb_disk_source_close(s);
    assert_int_equal(h.n_failed, 1);
}

static void test_pressure_once_per_epoch(void **state)
{
    (void)state;
    struct heard h = {0};
    struct lb_disk_source *s = source(&h, 64 * MIB, 2 * MIB);
    struct nbd_handle *nbd = client(s, "0");
    static char data[MIB];
    data[5] = 1;
    OK(lb_disk_source_queue(s, err));
    for (unsigned epoch = 1; epoch <= 3; epoch++) {
        for (unsigned i = 0; i < 2; i++)
            assert_int_equal(nbd_pwrite(nbd, data, MIB, i * MIB, 0), 0);
        for (int i = 0; i < 2000 && lb_disk_source_backlog(s) < 2 * MIB; i++)
            usleep(1000);
        assert_int_equal(h.n_pressure, epoch - 1);
        for (unsigned i = 2; i < 6; i++)
            assert_int_equal(nbd_pwrite(nbd, data, MIB, i * MIB, 0), 0);
        assert_int_equal(cut_and_apply(s, NULL), 6);
        assert_int_equal(h.n_pressure, epoch);
    }
    nbd_close(nbd);
    lb_disk_source_close(s);
}

/* The only nbdkit that has our socket; 0 when there is none. */
static pid_t find_nbdkit(pid_t parent)
{
    DIR *proc = opendir("/proc");
    struct dirent *e;
    pid_t found = 0;
    while (proc && (e = readdir(proc)) && !found) {
        char path[300], text[300] = "";
        int ppid = 0;
        snprintf(path, sizeof(path), "/proc/%s/stat", e->d_name);
        FILE *f = fopen(path, "r");
        if (!f)
            continue;
        if (fgets(text, sizeof(text), f) && strstr(text, "(nbdkit) ") &&
            sscanf(strstr(text, "(nbdkit) ") + 9, "%*c %d", &ppid) == 1 && ppid == parent)
            found = atoi(e->d_name);
        fclose(f);
    }
    closedir(proc);
    return found;
}

static void test_death_of_nbdkit_is_told(void **state)
{
    (void)state;
    struct heard h = {0};
    struct lb_disk_source *s = source(&h, DISK_BYTES, 0);
    struct nbd_handle *nbd = client(s, "0");
    char data[512] = {1};
    OK(lb_disk_source_queue(s, err));
    assert_int_equal(nbd_pwrite(nbd, data, sizeof(data), 0, 0), 0);
    pid_t pid = find_nbdkit(getpid());
    assert_true(pid > 0);
    kill(pid, SIGKILL);
    for (int i = 0; i < 5000 && !h.n_failed; i++)
        usleep(1000);
    assert_int_equal(h.n_failed, 1);
    assert_non_null(strstr(h.why.message, "nbdkit was killed by signal 9"));
    struct lb_disk_ops ops;
    struct lb_error err = LB_ERROR_INIT;
    lb_disk_source_cut_begin(s);
    assert_int_equal(lb_disk_source_cut_end(s, &ops, &err), -1);
    assert_non_null(strstr(err.message, "signal 9"));
    nbd_close(nbd);
    lb_disk_source_close(s);
    assert_int_equal(find_nbdkit(getpid()), 0);
    assert_int_equal(rmdir(dir), 0);
}

static bool ends(const struct lb_proc_id *id, unsigned within_ms)
{
    for (unsigned i = 0; i < within_ms && lb_proc_alive(id); i++)
        usleep(1000);
    return !lb_proc_alive(id);
}

/* The session is killed. A guest whose writes are copied does not notice; nbdkit ends when nobody writes to it any more. */
static void session_dies(unsigned n_clients)
{
    struct nbd_handle *nbd[2];
    int ready[2];
    char c, path[96];
    static char data[65536];
    assert_int_equal(pipe(ready), 0);
    pid_t session = fork();
    if (session == 0) {
        struct heard h = {0};
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        source(&h, DISK_BYTES, 0);
        (void)!write(ready[1], "x", 1);
        for (;;)
            pause();
    }
    assert_int_equal(read(ready[0], &c, 1), 1);
    pid_t nbdkit = find_nbdkit(session);
    assert_true(nbdkit > 0);
    struct lb_proc_id id;
    OK(lb_proc_identify(nbdkit, &id, err));
    snprintf(path, sizeof(path), "%s/disk.sock", dir);
    for (unsigned i = 0; i < n_clients; i++) {
        nbd[i] = client_of(path, "0");
        assert_int_equal(nbd_pwrite(nbd[i], data, sizeof(data), 0, 0), 0);
    }
    kill(session, SIGKILL);
    waitpid(session, NULL, 0);
    for (unsigned i = 0; i < n_clients; i++) {
        assert_false(ends(&id, 50));
        for (unsigned k = 0; k < 200; k++) /* more than the socket holds */
            assert_int_equal(nbd_pwrite(nbd[i], data, sizeof(data), k % 64 * sizeof(data), 0), 0);
        assert_int_equal(nbd_zero(nbd[i], sizeof(data), 0, 0), 0);
        assert_int_equal(nbd_flush(nbd[i], 0), 0);
        nbd_close(nbd[i]);
    }
    assert_true(ends(&id, 5000));
    unlink(path);
    close(ready[0]);
    close(ready[1]);
}

static void test_nbdkit_outlives_its_session(void **state)
{
    (void)state;
    session_dies(0);
    session_dies(1);
    session_dies(2);
}

/* The session lives, and has closed before its mirror was ended. */
static void test_close_while_written_to(void **state)
{
    (void)state;
    struct heard h = {0};
    struct lb_disk_source *s = source(&h, DISK_BYTES, 0);
    struct nbd_handle *nbd = client(s, "0");
    char data[512] = {1};
    struct lb_proc_id id;
    pid_t pid = find_nbdkit(getpid());
    OK(lb_proc_identify(pid, &id, err));
    assert_int_equal(nbd_pwrite(nbd, data, sizeof(data), 0, 0), 0);
    lb_disk_source_close(s);
    assert_int_equal(nbd_pwrite(nbd, data, sizeof(data), 512, 0), 0);
    nbd_close(nbd);
    assert_true(ends(&id, 5000));
    assert_int_equal(waitpid(pid, NULL, 0), pid);
}

static void test_user_who_has_to_reach_the_socket(void **state)
{
    (void)state;
    char deep[96];
    struct lb_hv_disk disk = {.size_bytes = DISK_BYTES};
    struct heard h = {0};
    struct lb_disk_source_opts o = {.run_dir = deep, .uid = 65534, .gid = 65533, .direct = on_direct,
                                    .pressure = on_pressure, .failed = on_failed, .arg = &h};
    struct lb_disk_source *s = NULL;
    struct lb_error why = LB_ERROR_INIT;
    struct stat st;
    snprintf(deep, sizeof(deep), "%s/deep", dir);
    assert_int_equal(mkdir(deep, 0700), 0);
    /* the one above is not ours to open */
    assert_int_equal(lb_disk_source_open(&disk, 1, &o, &s, &why), -1);
    assert_int_equal(why.code, LB_E_PREFLIGHT);
    assert_true(why.remedy[0] != '\0');
    assert_int_equal(chmod(dir, 0711), 0);
    assert_int_equal(chmod(deep, 0700), 0);
    OK(lb_disk_source_open(&disk, 1, &o, &s, err));
    assert_int_equal(stat(deep, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0710);
    assert_int_equal(st.st_gid, 65533);
    assert_int_equal(stat(lb_disk_source_socket(s), &st), 0);
    assert_int_equal(st.st_uid, 65534);
    assert_int_equal(st.st_mode & 0777, 0600);
    lb_disk_source_close(s);
}

static void test_blockers_and_check(void **state)
{
    (void)state;
    struct lb_hv_disk disks[] = {
        {.id = "good", .format = "raw", .size_bytes = MIB},
        {.id = "shared", .format = "raw", .size_bytes = MIB, .shareable = true},
        {.id = "empty", .format = "qcow2"},
        {.id = "odd", .format = "vdi", .size_bytes = MIB},
    };
    char **v = lb_disk_blockers(disks, LB_ARRAY_LEN(disks));
    assert_non_null(strstr(v[0], "disk shared"));
    assert_non_null(strstr(v[1], "disk empty"));
    assert_non_null(strstr(v[2], "disk odd"));
    assert_null(v[3]);
    lb_strv_free(v);
    OK(lb_disk_source_check(err));
    struct lb_error err = LB_ERROR_INIT;
    LB_AUTO_FREE char *real = lb_strdup(getenv("LIFEBOAT_PLUGIN_DIR"));
    setenv("LIFEBOAT_PLUGIN_DIR", dir, 1);
    run("printf x >%s/lifeboat-nbdkit-plugin.so", dir);
    assert_int_equal(lb_disk_source_check(&err), -1);
    assert_int_equal(err.code, LB_E_UNSUPPORTED);
    assert_true(err.remedy[0] != '\0');
    setenv("LIFEBOAT_PLUGIN_DIR", real, 1);
}

/* ------------------------------------------------------------------- targets */

static void refuse_target(const char *name, const char *format, uint64_t bytes, enum lb_errcode code,
                          const char *word)
{
    char path[128];
    struct lb_disk_target_opts o = {.path = path, .format = format, .size_bytes = bytes,
                                    .run_dir = dir, .uid = geteuid(), .gid = getegid()};
    struct lb_disk_target *t = NULL;
    struct lb_error err = LB_ERROR_INIT;
    snprintf(path, sizeof(path), "%s/%s", dir, name);
    assert_int_equal(lb_disk_target_open(&o, &t, &err), -1);
    if (err.code != code || !strstr(err.message, word) || !err.remedy[0])
        fail_msg("%s: code %d, not %d, or no '%s': %s (%s)", name, err.code, code, word, err.message,
                 err.remedy);
}

static void test_qcow2_that_does_not_fit(void **state)
{
    (void)state;
    run("qemu-img create -q -f qcow2 %s/small.qcow2 1M", dir);
    run("qemu-img create -q -f qcow2 %s/large.qcow2 16M", dir);
    run("qemu-img create -q -f raw %s/raw.qcow2 8M", dir);
    refuse_target("small.qcow2", "qcow2", DISK_BYTES, LB_E_PREFLIGHT, "smaller");
    refuse_target("large.qcow2", "qcow2", DISK_BYTES, LB_E_PREFLIGHT, "larger");
    refuse_target("raw.qcow2", "qcow2", DISK_BYTES, LB_E_HV, "not in qcow2 format");
    refuse_target("no/such.qcow2", "qcow2", DISK_BYTES, LB_E_HV, "qemu-img");
    refuse_target("no/such.raw", "raw", DISK_BYTES, LB_E_INTERNAL, "such.raw");
    run("test -z \"$(find %s -name '*.sock')\"", dir);
}

/* We and QEMU's tools keep each other out, in both directions. */
static void test_locks_are_qemus(void **state)
{
    (void)state;
    static const char *const formats[] = {"raw", "qcow2"};
    for (size_t i = 0; i < LB_ARRAY_LEN(formats); i++) {
        const char *f = formats[i];
        char name[16];
        snprintf(name, sizeof(name), "x.%s", f);
        struct lb_disk_target *t = target(name, f, DISK_BYTES);
        run("! qemu-io -f %s -c 'write 0 4k' %s/%s >%s/out 2>&1", f, dir, name, dir);
        run("grep -q lock %s/out", dir);
        refuse_target(name, f, DISK_BYTES, LB_E_EXISTS, "in use");
        OK(lb_disk_target_close(t, err));
        run("qemu-io -f %s -c 'write 0 4k' %s/%s >%s/out 2>&1", f, dir, name, dir);
        /* somebody who writes */
        char path[128], socket[128];
        snprintf(path, sizeof(path), "%s/%s", dir, name);
        snprintf(socket, sizeof(socket), "%s/other-%s.sock", dir, f);
        pid_t pid = fork();
        if (pid == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            execlp("qemu-nbd", "qemu-nbd", "-t", "-f", f, "-k", socket, path, NULL);
            _exit(127);
        }
        struct nbd_handle *nbd = nbd_create();
        /* connected when it has the image; a handle is good for one attempt */
        for (int k = 0; k < 5000 && nbd_connect_unix(nbd, socket) < 0; k++, usleep(1000)) {
            nbd_close(nbd);
            nbd = nbd_create();
        }
        assert_int_equal(nbd_aio_is_ready(nbd), 1);
        refuse_target(name, f, DISK_BYTES, LB_E_EXISTS, "in use");
        nbd_close(nbd);
        kill(pid, SIGTERM);
        waitpid(pid, NULL, 0);
        t = target(name, f, DISK_BYTES);
        OK(lb_disk_target_close(t, err));
    }
}

/* Writes until it fails: the storage is full. */
static void fill(const char *name, const char *format)
{
    struct lb_disk_target *t = target(name, format, 64 * MIB);
    struct lb_error err = LB_ERROR_INIT;
    static char data[MIB];
    int rc = 0;
    memset(data, 7, sizeof(data));
    for (uint64_t at = 0; at < 64 && rc == 0; at++) {
        struct lb_disk_op op = {.kind = LB_DISK_WRITE, .offset = at * MIB, .len = MIB, .data = data};
        rc = lb_disk_target_apply(t, &op, &err);
    }
    if (rc == 0)
        rc = lb_disk_target_flush(t, &err);
    assert_int_equal(rc, -1);
    if (err.code != LB_E_NO_SPACE || !strstr(err.message, name))
        fail_msg("%s: code %d: %s", name, err.code, err.message);
    assert_true(err.remedy[0] != '\0');
    lb_disk_target_close(t, NULL);
}

static void test_full_storage_is_said(void **state)
{
    (void)state;
    char small[96];
    snprintf(small, sizeof(small), "%s/small", dir);
    assert_int_equal(mkdir(small, 0700), 0);
    if (mount("none", small, "tmpfs", 0, "size=4m") < 0) {
        print_message("# SKIP no tmpfs can be mounted here\n");
        skip();
    }
    fill("small/x.raw", "raw");
    unlink(strcat(small, "/x.raw"));
    fill("small/x.qcow2", "qcow2");
    *strrchr(small, '/') = '\0';
    umount2(small, MNT_DETACH);
}

/* qemu-nbd is killed in the middle: said, and nothing hangs. */
static void test_death_of_qemu_nbd_is_said(void **state)
{
    (void)state;
    struct lb_disk_target *t = target("x.qcow2", "qcow2", 64 * MIB);
    struct lb_error err = LB_ERROR_INIT;
    static char data[MIB];
    char pids[64] = "";
    snprintf(pids, sizeof(pids), "pgrep -P %d qemu-nbd", (int)getpid());
    FILE *f = popen(pids, "r");
    assert_non_null(fgets(pids, sizeof(pids), f));
    pclose(f);
    int rc = 0;
    for (uint64_t at = 0; at < 64 && rc == 0; at++) {
        if (at == 8)
            kill(atoi(pids), SIGKILL);
        struct lb_disk_op op = {.kind = LB_DISK_WRITE, .offset = at * MIB, .len = MIB, .data = data};
        rc = lb_disk_target_apply(t, &op, &err);
    }
    if (rc == 0)
        rc = lb_disk_target_flush(t, &err);
    assert_int_equal(rc, -1);
    assert_non_null(strstr(err.message, "x.qcow2"));
    assert_int_equal(lb_disk_target_close(t, &err), -1);
}

/* Requests in flight have no order, those that overlap have. */
static void test_overlapping_writes_keep_their_order(void **state)
{
    (void)state;
    struct lb_disk_target *t = target("x.qcow2", "qcow2", DISK_BYTES);
    static uint8_t data[64 << 10];
    memset(model, 0, sizeof(model));
    for (unsigned i = 1; i < 3000; i++) {
        size_t len = (1 + pick(sizeof(data) / 512)) * 512;
        uint64_t at = (uint64_t)pick((unsigned)((256 << 10) - len) / 512 + 1) * 512;
        struct lb_disk_op op = {.kind = pick(5) ? LB_DISK_WRITE : LB_DISK_ZERO, .offset = at,
                                .len = len, .data = data};
        memset(data, (int)(i & 127) + 1, len);
        memset(model[0] + at, op.kind == LB_DISK_WRITE ? data[0] : 0, len);
        OK(lb_disk_target_apply(t, &op, err));
        memset(data, 0xff, len); /* it is ours again */
    }
    OK(lb_disk_target_close(t, err));
    run("qemu-img convert -O raw %s/x.qcow2 %s/x.raw", dir, dir);
    assert_file_is("x.raw", model[0], DISK_BYTES);
}

int main(void)
{
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
    const struct CMUnitTest tests[] = {
        T(test_epochs_arrive_whole),
        T(test_a_large_write_is_split),
        T(test_what_cannot_be_asked_is_refused),
        T(test_back_pressure_and_a_broken_link),
        T(test_pressure_once_per_epoch),
        T(test_death_of_nbdkit_is_told),
        T(test_nbdkit_outlives_its_session),
        T(test_close_while_written_to),
        T(test_user_who_has_to_reach_the_socket),
        T(test_blockers_and_check),
        T(test_qcow2_that_does_not_fit),
        T(test_locks_are_qemus),
        T(test_full_storage_is_said),
        T(test_death_of_qemu_nbd_is_said),
        T(test_overlapping_writes_keep_their_order),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
