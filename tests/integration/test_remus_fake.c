/*
 * Protection as a whole - both sessions, real TCP, real etcd, the real disk and output machinery -
 * around in-process guests that know what every page and every block of theirs must hold.
 *
 * A frame that has left carries its number, and the number of frames sent is part of the guest's
 * state: what runs after a failover must never know fewer frames than the network has seen.
 * Where a host has to die, the primary and its guest are a process of their own.
 */
#include "tests/integration/etcd_util.h"
#include "tests/integration/host_util.h"

#include <libnbd.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "remus/remus.h"

#define MS UINT64_C(1000000)
#define RAM (16u << 20)
#define DISK (4u << 20)

static struct etcd_cluster etcd;
static char *witness_spec;

/* ------------------------------------------------------------------ two hosts */

static struct host A, B;
static char config_a[96], config_b[96];

/* What the last backup session of B did; its operator. */
static struct {
    int failover_fd;
    bool force, promoted, ended;
    int rc;
    struct lb_error err;
    struct lb_protect_status st;
    uint64_t promoted_ns;
} bk;

/* What left each host, by the process that runs the guest. Shared with a child. */
static struct wire {
    _Atomic uint64_t last, gaps, frames, last_ns;
    _Atomic uint64_t acked, state;
} *wire;

/* ----------------------------------------------- the link, as bad as a test wants it */

static struct link {
    int listen_fd;
    uint16_t port, to;
    pthread_t thread;
    _Atomic bool quit, silent, cut;
    _Atomic uint64_t bytes_per_s;
    _Atomic unsigned open;
} px;

static void *relay_main(void *arg)
{
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
                            .sin_port = htons(px.to)};
    int in = *(int *)arg, out = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    int buffer = 65536;
    bool alive;
    char buf[16384];

    free(arg);
    if (px.bytes_per_s) /* a slow link does not hide in the buffers of a fast host */
        setsockopt(in, SOL_SOCKET, SO_RCVBUF, &buffer, sizeof(buffer));
    alive = !connect(out, (struct sockaddr *)&a, sizeof(a));
    while (alive && !px.quit && !px.cut) {
        struct pollfd p[2] = {{.fd = in, .events = POLLIN}, {.fd = out, .events = POLLIN}};

        if (px.silent) {
            lb_sleep_ms(1);
            continue;
        }
        poll(p, 2, 5);
        for (unsigned i = 0; i < 2 && alive && !px.silent; i++) {
            ssize_t n;

            if (!p[i].revents)
                continue;
            n = read(p[i].fd, buf, sizeof(buf));
            alive = n > 0 && !lb_write_all(p[!i].fd, buf, (size_t)n, NULL);
            if (alive && px.bytes_per_s)
                usleep((useconds_t)((uint64_t)n * 1000000 / px.bytes_per_s));
        }
    }
    close(in);
    close(out);
    px.open--;
    return NULL;
}

static void *link_main(void *arg)
{
    (void)arg;
    for (;;) {
        int *fd = lb_alloc(sizeof(int));
        pthread_t t;

        *fd = accept4(px.listen_fd, NULL, NULL, SOCK_CLOEXEC);
        if (*fd < 0 || px.quit) {
            free(fd);
            return NULL;
        }
        px.open++;
        pthread_create(&t, NULL, relay_main, fd);
        pthread_detach(t);
    }
}

/* ------------------------------------------------------------------- sessions of B */

static void on_backup_status(const struct lb_protect_status *s, void *arg)
{
    struct host *h = arg;

    pthread_mutex_lock(&h->mu);
    bk.st = *s;
    pthread_mutex_unlock(&h->mu);
}

static int serve_backup(const struct lb_session_env *env, struct lb_chan *chan, const char *peer,
                        Lb__Control *first, char *vm_name, struct lb_error *err)
{
    struct lb_remus_env e = {.base = *env, .failover_fd = bk.failover_fd,
                             .failover_force = &bk.force, .status = on_backup_status};
    struct host *h = env->arg;
    struct lb_error why = LB_ERROR_INIT;
    bool promoted = false;
    int rc = lb_backup_serve(&e, chan, peer, first, vm_name, &promoted, &why);

    pthread_mutex_lock(&h->mu);
    bk.rc = rc;
    bk.err = why;
    bk.promoted = promoted;
    bk.promoted_ns = lb_now_ns();
    bk.ended = true;
    pthread_mutex_unlock(&h->mu);
    if (err)
        *err = why;
    return rc;
}

static struct lb_session_env env_of(struct host *h)
{
    return (struct lb_session_env){.state_dir = h->dir, .hv = &lb_hv_fake, .identity = &h->id,
                                   .cancel_fd = -1, .want_conns = want_conns,
                                   .take_conn = take_conn, .arg = h, .serve_other = serve_backup,
                                   .config_path = h == &A ? config_a : config_b};
}

/* -------------------------------------------------------------- the guest and its wire */

static void on_wire(lb_fake_id from, const void *frame, size_t len, void *arg)
{
    struct wire *w = arg;
    uint64_t nonce, seq;

    (void)from;
    if (!lb_fake_frame_parse(frame, len, &nonce, &seq))
        return;
    if (seq != w->last + 1)
        w->gaps++;
    w->last = seq;
    w->frames++;
    w->last_ns = lb_now_ns();
}

/* The fake's mirror speaks to the session's server as QEMU does. */
static struct nbd_handle *nbd;
static pthread_mutex_t nbd_mu = PTHREAD_MUTEX_INITIALIZER;

static int on_mirror(lb_fake_id from, const char *socket, const char *name, uint64_t offset,
                     const void *data, size_t len, void *arg)
{
    int rc = -1;

    (void)from, (void)arg;
    pthread_mutex_lock(&nbd_mu);
    if (!nbd) {
        nbd = nbd_create();
        nbd_set_export_name(nbd, name);
        if (nbd_connect_unix(nbd, socket)) {
            nbd_close(nbd);
            nbd = NULL;
        }
    }
    if (nbd)
        rc = nbd_pwrite(nbd, data, len, offset, 0);
    pthread_mutex_unlock(&nbd_mu);
    return rc;
}

static void mirror_reset(void)
{
    pthread_mutex_lock(&nbd_mu);
    if (nbd)
        nbd_close(nbd);
    nbd = NULL;
    pthread_mutex_unlock(&nbd_mu);
}

static const struct lb_fake_config busy = {.name = "vm", .ram_bytes = RAM, .touched_pages = 2000,
                                           .rate_pages_per_s = 4000, .working_set_pages = 1500,
                                           .nic = true, .frames_per_s = 1000, .disk_bytes = DISK,
                                           .disk_writes_per_s = 100, .disk_path = "/guest/d.img"};

static lb_fake_id boot(const struct lb_fake_config *c, struct lb_vm_entry *e)
{
    lb_fake_set_wire(on_wire, wire);
    lb_fake_set_mirror(on_mirror, NULL);
    return boot_fake(A.dir, c, e);
}

/* ---------------------------------------------------------------- the primary's session */

struct run {
    pthread_t thread;
    struct lb_vm_entry entry;
    struct lb_protect_opts opts;
    int cancel_fd;
    pthread_mutex_t mu;
    struct lb_protect_status st;
    char state[32];
    bool stretched, done;
    enum lb_protect_end end;
    int rc;
    struct lb_error err;
};

static void on_status(const struct lb_protect_status *s, void *arg)
{
    struct run *r = arg;
    LB_AUTO_FREE char *json = lb_protect_status_json(s);

    assert_non_null(json);
    assert_true(s->released <= s->acked && s->acked <= s->epoch);
    pthread_mutex_lock(&r->mu);
    assert_true(s->percent >= r->st.percent);
    r->st = *s;
    r->stretched |= s->stretched;
    snprintf(r->state, sizeof(r->state), "%s", s->state);
    pthread_mutex_unlock(&r->mu);
    wire->acked = s->acked;
}

static void *run_main(void *arg)
{
    struct run *r = arg;
    struct lb_remus_env env = {.base = env_of(&A), .failover_fd = -1, .status = on_status};
    struct lb_hosts v = {0};

    env.base.cancel_fd = r->cancel_fd;
    env.base.arg = r;
    env.base.want_conns = NULL;
    env.base.take_conn = NULL;
    for (int i = 0; i < LB_SESSION_ID_BYTES; i++)
        env.base.session_id[i] = (uint8_t)rand();
    lb_hosts_load(A.dir, &v, NULL);
    r->rc = lb_protect_run(&env, &r->entry, lb_hosts_by_name(&v, "B"), &r->opts, &r->end, &r->err);
    lb_hosts_free(&v);
    pthread_mutex_lock(&r->mu);
    r->done = true;
    pthread_mutex_unlock(&r->mu);
    return NULL;
}

static struct lb_protect_opts plain_opts(void)
{
    struct lb_protect_opts o = {.interval_ms = 20, .lease_ms = 500}; /* on a machine that builds, too */

    snprintf(o.witness, sizeof(o.witness), "%s", witness_spec);
    return o;
}

static void run_start(struct run *r, const struct lb_vm_entry *e, const struct lb_protect_opts *o)
{
    memset(r, 0, sizeof(*r));
    memset(&bk, 0, sizeof(bk));
    bk.failover_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    pthread_mutex_init(&r->mu, NULL);
    r->entry = *e;
    r->opts = *o;
    r->cancel_fd = eventfd(0, EFD_CLOEXEC);
    assert_return_code(pthread_create(&r->thread, NULL, run_main, r), 0);
}

/* Until it has acknowledged epochs beyond `epochs`, or is over. */
static bool run_reached(struct run *r, uint64_t epochs)
{
    for (int i = 0; i < 6000; i++) {
        bool done, there;

        pthread_mutex_lock(&r->mu);
        done = r->done;
        there = !strcmp(r->state, "protected") && r->st.acked > epochs;
        pthread_mutex_unlock(&r->mu);
        if (there)
            return true;
        if (done)
            return false;
        lb_sleep_ms(5);
    }
    return false;
}

/* The last status; stretched: at any time. */
static struct lb_protect_status run_status(struct run *r)
{
    struct lb_protect_status st;

    pthread_mutex_lock(&r->mu);
    st = r->st;
    st.stretched = r->stretched;
    pthread_mutex_unlock(&r->mu);
    return st;
}

static void run_protected(struct run *r, uint64_t epochs)
{
    if (!run_reached(r, epochs))
        fail_msg("not protected: %s, %s / %s; backup: %s", r->state, r->err.message, r->err.remedy,
                 bk.err.message);
}

static void run_cancel(struct run *r)
{
    uint64_t one = 1;

    assert_int_equal(write(r->cancel_fd, &one, sizeof(one)), sizeof(one));
}

static void run_end(struct run *r)
{
    pthread_join(r->thread, NULL);
    close(r->cancel_fd);
    mirror_reset();
    idle(&B);
    close(bk.failover_fd);
    pthread_mutex_destroy(&r->mu);
}

/* ------------------------------------------------------------------------ verdicts */

/* The guest on A runs, is right, nothing of the protection is left, every frame left in order. */
static void check_free(lb_fake_id id)
{
    struct lb_fake_stats st = stats_of(id);
    struct lb_remus_record rec;
    struct lb_vm_entry e;
    uint64_t bad = 1;

    assert_true(st.alive && st.running && !st.frozen && !st.attached && !st.nic_held);
    assert_true(!st.mirroring && !st.checkpoint_mode);
    assert_return_code(lb_fake_verify(id, &bad, NULL), 0);
    assert_int_equal(bad, 0);
    assert_return_code(lb_vm_entry_load(A.dir, "vm", &e, NULL), 0);
    assert_int_equal(e.state, LB_VM_RUNNING);
    assert_return_code(lb_record_load(A.dir, "vm", &rec, NULL), 0);
    assert_int_equal(rec.phase, LB_PH_NONE);
    assert_int_equal(wire->gaps, 0);
    assert_int_equal(st.frames_dropped, 0);
    lb_sleep_ms(100);
    assert_true(wire->last > st.frames); /* it still speaks, all of it */
    assert_int_equal(wire->gaps, 0);
}

static void check_nothing_on(struct host *h)
{
    struct lb_vm_entry e;

    assert_int_equal(lb_vm_entry_load(h->dir, "vm", &e, NULL), -1);
}

/* The guest runs on B, knows every frame that left before, its memory and its disk are of one moment. */
static void check_promoted(uint64_t nonce, uint64_t seen)
{
    lb_fake_id id = fake_in(B.dir, "vm");
    struct lb_fake_stats st;
    uint64_t bad = 1, n;
    struct lb_vm_entry e;
    LB_AUTO_FREE char *path = lb_asprintf("%s/d.img", B.dir), *got = NULL;
    LB_AUTO_FREE char *want = lb_alloc(DISK);
    size_t len;

    assert_true(bk.promoted);
    assert_return_code(lb_vm_entry_load(B.dir, "vm", &e, NULL), 0);
    assert_int_equal(e.state, LB_VM_RUNNING);
    st = stats_of(id);
    assert_true(st.alive && st.running && st.announces);
    assert_true(st.nonce == nonce);
    assert_true(st.frames >= seen);
    assert_return_code(lb_fake_verify(id, &bad, NULL), 0);
    assert_int_equal(bad, 0);
    /* B's image is what the guest had written at the moment it was loaded at, or before it ran on */
    assert_return_code(lb_file_read(path, DISK, &got, &len, NULL), 0);
    assert_int_equal(len, DISK);
    for (n = st.disk_writes;; n--) {
        lb_fake_disk_fill(want, DISK, nonce, n);
        if (!memcmp(want, got, DISK))
            break;
        assert_true(n > 0);
    }
    assert_true(n > 0 || st.disk_writes < 10);
}

static void clean(void)
{
    LB_AUTO_FREE char *path = lb_asprintf("%s/d.img", B.dir);

    lb_fake_reset();
    for (unsigned i = 0; i < 2; i++) { /* whatever a test that failed has left */
        LB_AUTO_FREE char *vms = lb_asprintf("%s/vms", i ? B.dir : A.dir);
        lb_remove_tree(vms, NULL);
    }
    unlink(path);
    memset((void *)wire, 0, sizeof(*wire));
    px.silent = px.cut = false;
    px.bytes_per_s = 0;
}

static int fresh(void **state)
{
    (void)state;
    mirror_reset();
    clean();
    return 0;
}

/* ------------------------------------------------------------------------- tests */

static void test_on_and_off(void **state)
{
    struct lb_protect_status st;
    struct lb_protect_opts o = plain_opts();
    struct lb_vm_entry e;
    struct run r;
    lb_fake_id id = boot(&busy, &e);

    (void)state;
    run_start(&r, &e, &o);
    run_protected(&r, 200);
    assert_true(stats_of(id).nic_held && stats_of(id).mirroring && stats_of(id).checkpoint_mode);
    assert_return_code(lb_vm_entry_load(A.dir, "vm", &e, NULL), 0);
    assert_int_equal(e.state, LB_VM_PROTECTED);
    st = run_status(&r);
    print_message("# pause p50 %.2f p99 %.2f max %.2f ms, %.1f epochs/s, %.0f pages\n",
                  st.pause_p50_ms, st.pause_p99_ms, st.pause_max_ms, st.epochs_per_s,
                  st.dirty_pages);
    assert_true(st.pause_p50_ms > 0 && st.epochs_per_s > 5 && st.wire_bytes_per_s > 0);
    assert_true(st.witness_ok && st.lease_left_ms > 0);
    run_cancel(&r);
    run_end(&r);
    assert_int_equal(r.rc, 0);
    assert_int_equal(r.end, LB_PROTECT_OFF);
    assert_int_equal(bk.rc, 0);
    check_free(id);
    check_nothing_on(&B);
    assert_true(stats_of(id).clock_stepped_ns > 0);
    assert_int_equal(stats_of(id).frames_blocked, 0);
}

/* Nothing leaves before its epoch is acknowledged, and nothing waits longer than that. */
static void test_adaptive_without_disk(void **state)
{
    struct lb_fake_config c = busy;
    struct lb_protect_opts o = plain_opts();
    struct lb_vm_entry e;
    struct run r;
    lb_fake_id id;
    uint64_t t;

    (void)state;
    c.disk_bytes = 0;
    c.no_map = true;
    o.adaptive = true;
    o.interval_ms = 200;
    id = boot(&c, &e);
    run_start(&r, &e, &o);
    run_protected(&r, 5);
    t = lb_now_ns();
    run_protected(&r, 65); /* 200 ms each if output would not make them earlier */
    assert_true(lb_now_ns() - t < 60 * 200 * MS / 2);
    run_cancel(&r);
    run_end(&r);
    assert_int_equal(r.end, LB_PROTECT_OFF);
    check_free(id);
}

static void test_refused(void **state)
{
    struct lb_fake_config c = busy;
    struct lb_protect_opts o = plain_opts();
    struct lb_vm_entry e;
    struct run r;
    lb_fake_id id;

    (void)state;
    c.nic_opaque = true;
    id = boot(&c, &e);
    run_start(&r, &e, &o);
    run_end(&r);
    assert_int_equal(r.rc, -1);
    assert_int_equal(r.end, LB_PROTECT_FAILED);
    assert_int_equal(r.err.code, LB_E_PREFLIGHT);
    assert_true(r.err.remedy[0]);
    assert_true(stats_of(id).running && !stats_of(id).attached);
    check_nothing_on(&B);
}

/* A witness that cannot be asked refuses the protection before anything is touched. */
static void test_no_witness(void **state)
{
    struct lb_protect_opts o = plain_opts();
    struct lb_vm_entry e;
    struct run r;
    lb_fake_id id = boot(&busy, &e);

    (void)state;
    snprintf(o.witness, sizeof(o.witness), "etcd:http://127.0.0.9:1");
    run_start(&r, &e, &o);
    run_end(&r);
    assert_int_equal(r.end, LB_PROTECT_FAILED);
    assert_int_equal(r.err.code, LB_E_PREFLIGHT);
    assert_true(stats_of(id).running && !stats_of(id).nic_held);
    check_nothing_on(&B);
}

static void backup_lost(bool silent)
{
    struct lb_protect_opts o = plain_opts();
    struct lb_vm_entry e;
    struct run r;
    lb_fake_id id = boot(&busy, &e);

    run_start(&r, &e, &o);
    run_protected(&r, 20);
    *(silent ? &px.silent : &px.cut) = true;
    pthread_join(r.thread, NULL);
    px.cut = true; /* the backup's end of it, too */
    close(r.cancel_fd);
    mirror_reset();
    idle(&B);
    /* either may win; when both are equally fast it is the witness that chooses */
    if (r.end == LB_PROTECT_ALONE) {
        assert_int_equal(r.rc, -1);
        assert_false(bk.promoted);
        check_free(id);
        check_nothing_on(&B);
    } else {
        assert_int_equal(r.end, LB_PROTECT_FENCED);
        check_nothing_on(&A);
        assert_true(bk.promoted);
    }
    assert_int_equal(lb_fake_running("vm"), 1);
    assert_false(silent && r.end != LB_PROTECT_ALONE); /* the primary asks long before */
    close(bk.failover_fd);
}

static void test_backup_silent(void **state)
{
    (void)state;
    backup_lost(true);
}

static void test_backup_gone(void **state)
{
    (void)state;
    backup_lost(false);
}

/* Neither the other host nor the witness: nobody runs, nothing is said, until the witness is back. */
static void test_witness_away(void **state)
{
    struct lb_protect_opts o = plain_opts();
    struct lb_vm_entry e;
    struct run r;
    uint64_t nonce, seen;
    lb_fake_id id = boot(&busy, &e);

    (void)state;
    nonce = stats_of(id).nonce;
    run_start(&r, &e, &o);
    run_protected(&r, 20);
    etcd_signal(&etcd, 0, SIGSTOP);
    px.silent = true;
    lb_sleep_ms(1500);
    assert_int_equal(lb_fake_running("vm"), 0);
    assert_true(stats_of(id).frozen);
    assert_string_equal(run_status(&r).state, "no-lease");
    seen = wire->last;
    lb_sleep_ms(500);
    assert_true(wire->last == seen);
    etcd_signal(&etcd, 0, SIGCONT);
    lb_sleep_ms(1500);
    px.silent = false; /* a side that has lost asks the other what became of the guest */
    pthread_join(r.thread, NULL);
    px.cut = true;
    close(r.cancel_fd);
    mirror_reset();
    idle(&B);
    close(bk.failover_fd);
    assert_int_equal(lb_fake_running("vm"), 1);
    if (r.end == LB_PROTECT_ALONE) {
        check_free(id);
        check_nothing_on(&B);
    } else {
        assert_int_equal(r.end, LB_PROTECT_FENCED);
        check_promoted(nonce, seen);
        check_nothing_on(&A);
    }
}

static void test_planned_failover(void **state)
{
    struct lb_protect_opts o = plain_opts();
    struct lb_vm_entry e;
    struct run r;
    uint64_t nonce, one = 1;
    lb_fake_id id = boot(&busy, &e);

    (void)state;
    nonce = stats_of(id).nonce;
    run_start(&r, &e, &o);
    run_protected(&r, 20);
    assert_int_equal(write(bk.failover_fd, &one, sizeof(one)), sizeof(one));
    run_end(&r);
    assert_int_equal(r.end, LB_PROTECT_YIELDED);
    assert_int_equal(r.rc, 0);
    assert_int_equal(lb_fake_count("vm"), 1);
    assert_int_equal(wire->gaps, 0); /* not a frame is missing, or sent twice */
    check_promoted(nonce, wire->last);
    check_nothing_on(&A);
}

/* It took over and cannot say so, and nobody remembers: the primary waits for its word. */
static void test_planned_failover_unheard(void **state)
{
    struct lb_session_env env = env_of(&A);
    struct lb_protect_opts o = plain_opts();
    LB_AUTO_FREE char *ran = lb_asprintf("%s/ran", B.dir);
    struct lb_vm_entry e;
    char text[512];
    struct run r;
    uint64_t one = 1;

    (void)state;
    boot(&busy, &e);
    snprintf(o.witness, sizeof(o.witness), "manual");
    run_start(&r, &e, &o);
    run_protected(&r, 20);
    setenv("LIFEBOAT_PAUSE_AT", "bk-ran:300", 1);
    setenv("LIFEBOAT_PAUSE_FILE", ran, 1);
    assert_int_equal(write(bk.failover_fd, &one, sizeof(one)), sizeof(one));
    for (int i = 0; i < 10000 && access(ran, F_OK); i++)
        lb_sleep_ms(1);
    px.cut = true;
    run_end(&r);
    unsetenv("LIFEBOAT_PAUSE_AT");
    unsetenv("LIFEBOAT_PAUSE_FILE");
    assert_true(bk.promoted);
    assert_int_equal(r.end, LB_PROTECT_UNDECIDED);
    assert_int_equal(lb_fake_running("vm"), 1);
    px.cut = false;
    assert_return_code(lb_remus_recover(&env, "vm", text, NULL), 0);
    check_nothing_on(&A);
    assert_int_equal(lb_fake_count("vm"), 1);
}

/* The hypervisor is killed under the session: that is what the backup is for. */
static void test_vm_killed(void **state)
{
    struct lb_protect_opts o = plain_opts();
    struct lb_vm_entry e;
    struct run r;
    uint64_t nonce, seen;
    lb_fake_id id = boot(&busy, &e);

    (void)state;
    nonce = stats_of(id).nonce;
    run_start(&r, &e, &o);
    run_protected(&r, 20);
    assert_return_code(lb_fake_kill(id, NULL), 0);
    seen = wire->last;
    run_end(&r);
    assert_int_equal(r.end, LB_PROTECT_YIELDED);
    check_promoted(nonce, seen);
    check_nothing_on(&A);
}

/* ... and the link is gone, too: no claim for a dead guest keeps the backup from running it. */
static void test_vm_killed_unheard(void **state)
{
    struct lb_session_env env = env_of(&A);
    struct lb_protect_opts o = plain_opts();
    struct lb_vm_entry e;
    char text[512];
    struct run r;
    uint64_t nonce, seen;
    lb_fake_id id = boot(&busy, &e);

    (void)state;
    nonce = stats_of(id).nonce;
    run_start(&r, &e, &o);
    run_protected(&r, 20);
    px.silent = true;
    assert_return_code(lb_fake_kill(id, NULL), 0);
    seen = wire->last;
    run_end(&r);
    assert_int_equal(r.end, LB_PROTECT_UNDECIDED);
    check_promoted(nonce, seen);
    px.silent = px.cut = false;
    assert_return_code(lb_remus_recover(&env, "vm", text, NULL), 0);
    check_nothing_on(&A);
}

/* A guest that switched itself off stays off, on both hosts. */
static void test_power_off(void **state)
{
    struct lb_protect_opts o = plain_opts();
    struct lb_vm_entry e;
    struct run r;
    lb_fake_id id = boot(&busy, &e);

    (void)state;
    run_start(&r, &e, &o);
    run_protected(&r, 20);
    assert_return_code(lb_fake_power_off(id, NULL), 0);
    run_end(&r);
    assert_int_equal(r.end, LB_PROTECT_OFF);
    assert_int_equal(r.rc, 0);
    assert_false(bk.promoted);
    check_nothing_on(&B);
    assert_return_code(lb_vm_entry_load(A.dir, "vm", &e, NULL), 0);
    assert_int_equal(e.state, LB_VM_DEAD);
    assert_int_equal(lb_fake_count("vm"), 0);
}

/* A card that cannot be held any more ends the protection: the guest gets its network back. */
static void test_hold_lost(void **state)
{
    struct lb_protect_opts o = plain_opts();
    struct lb_fake_stats st;
    struct lb_vm_entry e;
    struct run r;
    lb_fake_id id = boot(&busy, &e);

    (void)state;
    run_start(&r, &e, &o);
    run_protected(&r, 20);
    assert_return_code(lb_fake_break_hold(id, NULL), 0);
    run_end(&r);
    assert_int_equal(r.end, LB_PROTECT_ALONE);
    assert_non_null(strstr(r.err.message, "net0"));
    st = stats_of(id);
    assert_true(st.running && !st.nic_held);
    check_nothing_on(&B);
}

/* A card that is plugged in under protection is not held: that is noticed, and ends it. */
static void test_card_plugged(void **state)
{
    struct lb_fake_config c = busy;
    struct lb_protect_opts o = plain_opts();
    struct lb_vm_entry e;
    struct run r;
    lb_fake_id id;

    (void)state;
    c.nic = false;
    c.frames_per_s = 0;
    id = boot(&c, &e);
    run_start(&r, &e, &o);
    run_protected(&r, 20);
    assert_return_code(lb_fake_plug_card(id, NULL), 0);
    run_end(&r);
    assert_int_equal(r.end, LB_PROTECT_ALONE);
    assert_non_null(strstr(r.err.message, "net0"));
    assert_true(stats_of(id).running);
    check_nothing_on(&B);
}

/* A link that is slower than the guest writes: epochs stretch, nothing breaks, memory is bounded. */
static void test_slow_link(void **state)
{
    struct lb_fake_config c = busy;
    struct lb_protect_opts o = plain_opts();
    struct lb_vm_entry e;
    struct run r;
    lb_fake_id id;

    (void)state;
    c.rate_pages_per_s = 20000;
    c.random_bytes = 4096;
    id = boot(&c, &e);
    o.bandwidth_bytes_per_s = 8u << 20;
    o.delta_cache_bytes = 1u << 20;
    run_start(&r, &e, &o);
    run_protected(&r, 20);
    lb_sleep_ms(1000);
    assert_true(run_status(&r).stretched);
    assert_true(run_status(&r).wire_bytes_per_s < 2.0 * (double)o.bandwidth_bytes_per_s);
    run_cancel(&r);
    run_end(&r);
    assert_int_equal(r.end, LB_PROTECT_OFF);
    check_free(id);
}

/* ------------------------------------------------------------ hosts that die or stop */

/* A child process is host A from here on: its session, its guest. */
static pid_t primary_process(uint64_t nonce_out[1])
{
    int fds[2];
    pid_t pid;

    assert_return_code(pipe(fds), errno);
    memset(&bk, 0, sizeof(bk));
    bk.failover_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    pid = fork();
    assert_true(pid >= 0);
    if (!pid) {
        struct lb_protect_opts o = plain_opts();
        struct lb_vm_entry e;
        struct run r;
        uint64_t nonce = stats_of(boot(&busy, &e)).nonce;

        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (write(fds[1], &nonce, sizeof(nonce)) != sizeof(nonce))
            _exit(99);
        run_start(&r, &e, &o);
        pthread_join(r.thread, NULL);
        wire->state = 1;
        _exit(10 + (int)r.end);
    }
    close(fds[1]);
    assert_int_equal(read(fds[0], nonce_out, sizeof(*nonce_out)), sizeof(*nonce_out));
    close(fds[0]);
    return pid;
}

static void child_protected(uint64_t epochs)
{
    for (int i = 0; i < 6000 && wire->acked <= epochs; i++)
        lb_sleep_ms(5);
    if (wire->acked <= epochs)
        fail_msg("the child is not protected; backup: %s", bk.err.message);
}

static void wait_promoted(void)
{
    for (int i = 0; i < 2000; i++) {
        bool there;

        pthread_mutex_lock(&B.mu);
        there = bk.ended;
        pthread_mutex_unlock(&B.mu);
        if (there)
            return;
        lb_sleep_ms(5);
    }
    fail_msg("the backup did not take over");
}

static void test_host_killed(void **state)
{
    double worst = 0;

    (void)state;
    for (int round = 0; round < 5; round++) {
        uint64_t nonce, t, seen;
        pid_t pid = primary_process(&nonce);

        child_protected(10 + 3 * (uint64_t)round);
        lb_sleep_ms((unsigned)rand() % 25);
        t = lb_now_ns();
        assert_return_code(kill(pid, SIGKILL), errno);
        assert_int_equal(waitpid(pid, NULL, 0), pid);
        seen = wire->last;
        assert_int_equal(wire->gaps, 0);
        wait_promoted();
        worst = LB_MAX(worst, (double)(bk.promoted_ns - t) / 1e6);
        idle(&B);
        check_promoted(nonce, seen);
        close(bk.failover_fd);
        clean();
    }
    print_message("# takeover after kill -9, slowest of 5: %.0f ms\n", worst);
}

/* Stopped for longer than its lease, the old primary wakes up: it says nothing any more, and goes. */
static void test_host_stopped(void **state)
{
    uint64_t nonce, seen;
    int status;
    pid_t pid = primary_process(&nonce);

    (void)state;
    child_protected(20);
    assert_return_code(kill(pid, SIGSTOP), errno);
    seen = wire->last;
    wait_promoted();
    idle(&B);
    check_promoted(nonce, seen);
    lb_sleep_ms(100);
    seen = wire->last_ns;
    wire->gaps = 0;
    assert_return_code(kill(pid, SIGCONT), errno);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 10 + LB_PROTECT_FENCED);
    check_nothing_on(&A);
    assert_true(lb_fake_running("vm") == 1);
    close(bk.failover_fd);
}

/* ---------------------------------------------------------------------- faults */

static void one_fault(enum lb_fake_slot slot, unsigned nth)
{
    struct lb_fake_config c = busy;
    struct lb_protect_opts o = plain_opts();
    struct lb_vm_entry e;
    struct run r;
    lb_fake_id id;

    c.disk_writes_per_s = 20;
    id = boot(&c, &e);
    lb_fake_fail(slot, nth, LB_E_HV);
    run_start(&r, &e, &o);
    if (run_reached(&r, 10)) /* it was no matter of life and death, or came too late */
        run_cancel(&r);
    run_end(&r);
    lb_fake_fail(slot, 0, LB_E_HV);
    print_message("# %s %u: %s (%s)\n", lb_fake_slot_name(slot), nth, lb_protect_end_name(r.end),
                  r.rc ? r.err.message : "");
    assert_true(r.end == LB_PROTECT_OFF || r.end == LB_PROTECT_ALONE || r.end == LB_PROTECT_FAILED);
    assert_true(r.rc == 0 || strstr(r.err.message, "injected fault"));
    assert_false(bk.promoted);
    check_free(id);
    check_nothing_on(&B);
    clean();
}

static void test_faults(void **state)
{
    static const enum lb_fake_slot slots[] = {
        LB_FAKE_ATTACH, LB_FAKE_DESCRIBE, LB_FAKE_LOG_ENABLE, LB_FAKE_LOG_CLEAN, LB_FAKE_LOG_PEEK,
        LB_FAKE_POPULATED, LB_FAKE_STOP, LB_FAKE_CONT, LB_FAKE_SAVE_BEGIN, LB_FAKE_SAVE_END,
        LB_FAKE_CHECKPOINT_MODE, LB_FAKE_NICS, LB_FAKE_NIC_HOLD, LB_FAKE_DISKS,
        LB_FAKE_DISK_MIRROR, LB_FAKE_DISK_MIRROR_STATUS, LB_FAKE_CLOCK_STEP, LB_FAKE_LAUNCH,
        LB_FAKE_PREPARE_RAM,
    };

    (void)state;
    for (unsigned i = 0; i < LB_ARRAY_LEN(slots); i++) {
        one_fault(slots[i], 1);
        if (slots[i] == LB_FAKE_LOG_CLEAN || slots[i] == LB_FAKE_STOP || slots[i] == LB_FAKE_CONT ||
            slots[i] == LB_FAKE_SAVE_BEGIN || slots[i] == LB_FAKE_SAVE_END) {
            one_fault(slots[i], 3);
            one_fault(slots[i], 8);
        }
    }
}

/* ------------------------------------------------------------------------ fixtures */

/* Both hosts have the guest's disk at a path of their own. */
static void configure(const struct host *h, char path[96])
{
    LB_AUTO_FILE FILE *f = NULL;

    assert_return_code(chmod(h->dir, 0755), errno);
    snprintf(path, 96, "%s/lifeboatd.conf", h->dir);
    f = fopen(path, "w");
    assert_non_null(f);
    fprintf(f, "name = %s\npath = /guest -> %s\n", h->name, h->dir);
}

static int group_up(void **state)
{
    (void)state;
    lb_log_set_level(getenv("LB_TEST_LOG") ? LB_LOG_DEBUG : LB_LOG_ERROR);
    if (!getenv("LB_TEST_LOG"))
        lb_log_set_fd(eventfd(0, EFD_CLOEXEC)); /* failures are the subject, not news */
    wire = mmap(NULL, sizeof(*wire), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    assert_true(wire != MAP_FAILED);
    etcd_open_cluster(&etcd, 1);
    witness_spec = etcd_spec(1);
    host_up(&A, "A");
    host_up(&B, "B");
    configure(&A, config_a);
    configure(&B, config_b);
    px.listen_fd = listen_any(&px.port);
    px.to = B.port;
    pthread_create(&px.thread, NULL, link_main, NULL);
    trust(&A, &B, px.port);
    trust(&B, &A, A.port);
    lb_sleep_ms(500); /* etcd elects itself */
    return 0;
}

static int group_down(void **state)
{
    (void)state;
    clean();
    px.quit = true;
    shutdown(px.listen_fd, SHUT_RDWR);
    pthread_join(px.thread, NULL);
    close(px.listen_fd);
    host_down(&A);
    host_down(&B);
    etcd_close_cluster(&etcd);
    free(witness_spec);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(test_on_and_off, fresh),
        cmocka_unit_test_setup(test_adaptive_without_disk, fresh),
        cmocka_unit_test_setup(test_refused, fresh),
        cmocka_unit_test_setup(test_no_witness, fresh),
        cmocka_unit_test_setup(test_backup_silent, fresh),
        cmocka_unit_test_setup(test_backup_gone, fresh),
        cmocka_unit_test_setup(test_witness_away, fresh),
        cmocka_unit_test_setup(test_planned_failover, fresh),
        cmocka_unit_test_setup(test_planned_failover_unheard, fresh),
        cmocka_unit_test_setup(test_vm_killed, fresh),
        cmocka_unit_test_setup(test_vm_killed_unheard, fresh),
        cmocka_unit_test_setup(test_power_off, fresh),
        cmocka_unit_test_setup(test_hold_lost, fresh),
        cmocka_unit_test_setup(test_card_plugged, fresh),
        cmocka_unit_test_setup(test_slow_link, fresh),
        cmocka_unit_test_setup(test_host_killed, fresh),
        cmocka_unit_test_setup(test_host_stopped, fresh),
        cmocka_unit_test_setup(test_faults, fresh),
    };

    if (!own_network()) {
        print_message("1..0 # SKIP needs root for a network namespace\n");
        return 0;
    }
    signal(SIGPIPE, SIG_IGN); /* as the daemon does */
    if (getenv("LB_TEST_ONLY"))
        cmocka_set_test_filter(getenv("LB_TEST_ONLY"));
    srand((unsigned)time(NULL));
    return cmocka_run_group_tests(tests, group_up, group_down);
}
