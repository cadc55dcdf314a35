/*
 * The backup's session, driven by a primary that does what each test says: real TCP, real
 * journals and records, real witnesses (etcd, a fence command), in-process guests that know what
 * every one of their pages must hold.
 *
 * Each test ends with the questions: who runs it, is every page that of the last epoch that was
 * acknowledged, is nothing left elsewhere, and was the promise kept?
 */
#include "tests/integration/etcd_util.h"
#include "tests/integration/host_util.h"

#include <sys/stat.h>

#include "migrate/handover.h"
#include "migrate/rx.h"
#include "migrate/tx.h"
#include "remus/lease.h"
#include "remus/remus.h"
#include "remus/stage.h"
#include "remus/witness.h"

#define VM "vm"
#define LEASE_MS 120u
#define PROMISE_MS (LEASE_MS + LEASE_MS / 4)
#define MS UINT64_C(1000000)
#define DISK_BYTES (UINT64_C(1) << 20)

/* ------------------------------------------------------------------- two hosts */

static struct host A, B;

/* Of the last protection that B served; by B.mu. */
static struct {
    int cancel_fd, failover_fd;
    bool force;
    int rc;
    bool promoted;
    struct lb_error err;
    char state[32], note[256];
} bk;
static struct etcd_cluster etcd;
static char fence_dir[64], fence_spec[128];

static void on_status(const struct lb_protect_status *s, void *arg)
{
    struct host *h = arg;

    pthread_mutex_lock(&h->mu);
    snprintf(bk.state, sizeof(bk.state), "%s", s->state);
    snprintf(bk.note, sizeof(bk.note), "%s", s->note);
    pthread_mutex_unlock(&h->mu);
    assert_string_equal(s->role, "backup");
}

static int serve_other(const struct lb_session_env *env, struct lb_chan *chan, const char *peer,
                       Lb__Control *first, char *vm_name, struct lb_error *err)
{
    struct host *h = env->arg;
    struct lb_remus_env re = {.base = *env, .failover_fd = bk.failover_fd,
                              .failover_force = &bk.force, .status = on_status};
    bool promoted;
    int rc = lb_backup_serve(&re, chan, peer, first, vm_name, &promoted, err);

    pthread_mutex_lock(&h->mu);
    bk.rc = rc;
    bk.promoted = promoted;
    if (rc)
        bk.err = *err;
    pthread_mutex_unlock(&h->mu);
    return rc;
}

static struct lb_session_env env_of(struct host *h)
{
    return (struct lb_session_env){.state_dir = h->dir, .hv = &lb_hv_fake, .identity = &h->id,
                                   .cancel_fd = h == &B ? bk.cancel_fd : -1, .want_conns = want_conns,
                                   .take_conn = take_conn, .serve_other = serve_other, .arg = h};
}

static void state_of(char state[32], char note[256])
{
    pthread_mutex_lock(&B.mu);
    snprintf(state, 32, "%s", bk.state);
    snprintf(note, 256, "%s", bk.note);
    pthread_mutex_unlock(&B.mu);
}

static void expect_state(const char *state)
{
    char now[32] = "", note[256] = "";

    for (int i = 0; i < 2000; i++) {
        state_of(now, note);
        if (!strcmp(now, state))
            return;
        lb_sleep_ms(2);
    }
    fail_msg("host B is \"%s\", not \"%s\": %s", now, state, note);
}

static void ring(int fd)
{
    uint64_t one = 1;

    assert_int_equal(write(fd, &one, sizeof(one)), sizeof(one));
}

static void quiet(int fd)
{
    uint64_t n;

    if (read(fd, &n, sizeof(n)) < 0)
        assert_int_equal(errno, EAGAIN);
}

/* ----------------------------------------------------------------- the primary */

/* The fake guest's mirror: writes of the epoch that runs. */
static struct {
    pthread_mutex_t mu;
    struct lb_disk_ops ops;
} mirror = {.mu = PTHREAD_MUTEX_INITIALIZER};

static int on_mirror(lb_fake_id from, const char *socket, const char *name, uint64_t offset,
                     const void *data, size_t len, void *arg)
{
    struct lb_disk_op op = {.kind = LB_DISK_WRITE, .offset = offset, .len = len};
    void *copy = lb_alloc(len);

    (void)from, (void)socket, (void)name, (void)arg;
    memcpy(copy, data, len);
    op.data = copy;
    pthread_mutex_lock(&mirror.mu);
    mirror.ops.v = lb_realloc(mirror.ops.v, (mirror.ops.n + 1) * sizeof(op));
    mirror.ops.v[mirror.ops.n++] = op;
    mirror.ops.bytes += len;
    pthread_mutex_unlock(&mirror.mu);
    return 0;
}

static struct lb_disk_ops mirror_cut(void)
{
    struct lb_disk_ops o;

    pthread_mutex_lock(&mirror.mu);
    o = mirror.ops;
    mirror.ops = (struct lb_disk_ops){0};
    pthread_mutex_unlock(&mirror.mu);
    return o;
}

struct primary {
    struct lb_session_env env;
    struct lb_host to;
    struct lb_vm_entry entry;
    struct lb_migrate_opts mopts;
    struct lb_protect_wish wish;
    struct lb_remus_record rec;      /* id, key, revision */
    struct lb_witness *witness;
    struct lb_tx tx;
    struct lb_encoder *enc;
    struct lb_bulk *bulk;
    struct lb_epoch ep;
    lb_fake_id id;
    uint64_t nonce, epoch;
    uint64_t writes[64], disk_writes[64]; /* of the guest, at the end of that epoch */
    bool disk;
    char image[128];                 /* the copy on B */
    pthread_t beater, reader;
    _Atomic bool beating, quit, discarded, yield_asked, promoted, ended;
    _Atomic uint64_t acked, answers, answered_ns; /* when the beat of the last answer was sent */
};

static void *beater_main(void *arg)
{
    struct primary *p = arg;

    while (!p->quit) {
        Lb__Control m = LB__CONTROL__INIT;
        Lb__Beat b = LB__BEAT__INIT;

        b.sent_ns = lb_now_ns();
        m.kind_case = LB__CONTROL__KIND_BEAT;
        m.beat = &b;
        if (p->beating)
            lb_ctl_send(p->tx.chan, &m, NULL);
        lb_sleep_ms(LB_BEAT_MS);
    }
    return NULL;
}

static void *reader_main(void *arg)
{
    struct primary *p = arg;

    while (!p->quit) {
        Lb__Control *m = NULL;
        struct lb_error e = LB_ERROR_INIT;

        if (lb_ctl_queue_pop(p->tx.ctl, &m, lb_now_ns() + 20 * MS, &e)) {
            if (lb_ctl_queue_ended(p->tx.ctl, NULL)) {
                p->ended = true;
                return NULL;
            }
            continue;
        }
        switch (m->kind_case) {
        case LB__CONTROL__KIND_BEAT_ANSWER:
            p->answers++;
            p->answered_ns = m->beat_answer->sent_ns;
            break;
        case LB__CONTROL__KIND_EPOCH_ACK:
            assert_int_equal(m->epoch_ack->epoch, p->acked + 1);
            p->acked = m->epoch_ack->epoch;
            break;
        case LB__CONTROL__KIND_DISCARDED: p->discarded = true; break;
        case LB__CONTROL__KIND_YIELD_REQUEST: p->yield_asked = true; break;
        case LB__CONTROL__KIND_PROMOTED: p->promoted = true; break;
        default: break;
        }
        lb__control__free_unpacked(m, NULL);
    }
    return NULL;
}

static bool wait_for(_Atomic bool *what, unsigned ms)
{
    for (unsigned i = 0; i < ms && !*what; i++)
        lb_sleep_ms(1);
    return *what;
}

static void must(int rc, const struct lb_error *err)
{
    if (rc)
        fail_msg("%s / %s", err->message, err->remedy);
}

static void boot(struct primary *p, bool disk)
{
    struct lb_fake_config c = {.name = VM, .ram_bytes = 4 << 20, .touched_pages = 500,
                               .disk_bytes = DISK_BYTES, .disk_path = "/nowhere/disk.img"};

    memset(p, 0, sizeof(*p));
    p->disk = disk;
    p->id = boot_fake(A.dir, &c, &p->entry);
    p->nonce = stats_of(p->id).nonce;
}

static void request(struct primary *p, const char *witness, struct lb_error *err)
{
    Lb__ProtectSpec spec = LB__PROTECT_SPEC__INIT;
    Lb__ProtectDisk d = LB__PROTECT_DISK__INIT, *pd = &d;
    struct lb_report mine = {0};
    LB_AUTO_FREE char *wish = NULL;
    char key[LB_KEY_TEXT_BYTES];
    int rc;

    snprintf(p->wish.opts.witness, sizeof(p->wish.opts.witness), "%s", witness);
    p->wish.opts.interval_ms = 25;
    p->wish.opts.lease_ms = LEASE_MS;
    wish = lb_wish_json(&p->wish);
    lb_hex(p->rec.id, p->tx.token, LB_TOKEN_BYTES);
    lb_key_format(key, A.id.pub);
    assert_return_code(lb_witness_open(witness, LB_SIDE_PRIMARY, key, "B", &p->witness, err), 0);
    lb_witness_key(p->rec.key, VM, "", p->rec.id);
    spec.id = (ProtobufCBinaryData){LB_TOKEN_BYTES, p->tx.token};
    spec.wish_json = wish;
    spec.witness_key = p->rec.key;
    spec.lease_ms = LEASE_MS;
    spec.interval_ms = 25;
    snprintf(p->image, sizeof(p->image), "%s/disk.img", B.dir);
    d.path = p->image;
    d.format = (char *)"raw";
    d.size_bytes = DISK_BYTES;
    spec.disks = &pd;
    spec.n_disks = p->disk;
    p->tx.protect = &spec;
    rc = lb_tx_open(&p->tx, &mine, err) || lb_tx_preflight(&p->tx, &mine, err);
    lb_report_free(&mine);
    p->tx.protect = NULL;
    must(rc, err);
}

static void first_copy(struct primary *p, struct lb_error *err)
{
    uint64_t pages;

    must(lb_tx_launch(&p->tx, err), err);
    must(lb_tx_connect(&p->tx, &p->bulk, err), err);
    must(lb_encoder_new(p->tx.blocks, p->tx.n_blocks, 1 << 20, &p->enc, err), err);
    if (p->disk) {
        struct lb_disk_ops o;

        lb_fake_set_mirror(on_mirror, NULL);
        must(lb_hv_disk_mirror(p->tx.vm, "disk0", "/nowhere", "0", err), err);
        o = mirror_cut();
        assert_true(o.n > 0);
        for (unsigned i = 0; i < o.n; i++)
            must(lb_encoder_send_disk(p->enc, p->bulk, &o.v[i], err), err);
        must(lb_bulk_flush(p->bulk, err), err);
        lb_disk_ops_free(&o);
    }
    lb_sender_round_begin(p->tx.sender, 0, false);
    must(lb_tx_wait_round(&p->tx, 0, NULL, NULL, err), err);
    must(lb_tx_pause(&p->tx, &pages, err), err);
    must(lb_tx_continue(&p->tx, err), err);
    must(lb_sender_state(p->tx.sender, 0, NULL, 0, err), err);
    /* what the log gave in this pause has not been sent: the first epoch must have it */
}

static void send_msg(struct primary *p, Lb__Control *m)
{
    struct lb_error err = LB_ERROR_INIT;

    must(lb_ctl_send(p->tx.chan, m, &err), &err);
}

/* The guest writes n pages and n blocks; then its epoch is captured and, all or half, sent. */
static void epoch(struct primary *p, unsigned n, bool whole)
{
    struct lb_error err = LB_ERROR_INIT;
    struct lb_fake_stats st;

    for (unsigned i = 0; i < n; i++)
        must(lb_fake_touch(p->id, 0, (p->epoch * 37 + i * 11) % 1000, &err), &err);
    must(lb_hv_stop(p->tx.vm, &err), &err);
    must(lb_hv_save_begin(p->tx.vm, false, &err), &err);
    lb_epoch_reset(&p->ep);
    for (unsigned b = 0; b < p->tx.n_blocks; b++) {
        const struct lb_ram_block *blk = &p->tx.blocks[b];

        must(lb_hv_log_clean(p->tx.vm, blk, &p->tx.dirty[b], &err), &err);
        must(lb_epoch_capture(&p->ep, p->tx.vm, blk, &p->tx.dirty[b], &err), &err);
        lb_bitmap_clear_all(&p->tx.dirty[b]);
    }
    must(lb_hv_save_end(p->tx.vm, &p->ep.state, &p->ep.state_len, &err), &err);
    p->ep.number = ++p->epoch;
    if (p->disk)
        p->ep.disk = mirror_cut();
    must(lb_fake_stats(p->id, &st, &err), &err);
    p->writes[p->epoch] = st.writes;
    p->disk_writes[p->epoch] = st.disk_writes;
    must(lb_hv_cont(p->tx.vm, &err), &err);
    if (!whole) { /* without its end */
        struct lb_page_run run = {0, 1};
        struct iovec iov = {p->ep.data, LB_PAGE_SIZE};

        assert_true(p->ep.n_pages > 0);
        must(lb_bulk_send_pages(p->bulk, (uint32_t)p->epoch, 0, &run, &iov, 1, 0, &err), &err);
        must(lb_bulk_flush(p->bulk, &err), &err);
        return;
    }
    must(lb_encoder_send(p->enc, p->bulk, &p->ep, &err), &err);
}

static void acked(struct primary *p)
{
    for (int i = 0; i < 3000 && p->acked < p->epoch; i++)
        lb_sleep_ms(1);
    assert_int_equal(p->acked, p->epoch);
}

/* From nothing to a standby with one complete epoch. */
static void protect(struct primary *p, const char *witness, bool disk)
{
    struct lb_error err = LB_ERROR_INIT;
    struct lb_hosts v = {0};
    Lb__Control m = LB__CONTROL__INIT;
    Lb__Armed armed = LB__ARMED__INIT;

    bk.rc = 1;
    bk.promoted = false;
    bk.err = (struct lb_error){0};
    bk.state[0] = bk.note[0] = '\0';
    boot(p, disk);
    p->env = env_of(&A);
    for (int i = 0; i < LB_SESSION_ID_BYTES; i++)
        p->env.session_id[i] = (uint8_t)rand();
    assert_return_code(lb_hosts_load(A.dir, &v, NULL), 0);
    p->to = *lb_hosts_by_name(&v, "B");
    lb_hosts_free(&v);
    p->mopts.channels = 2;
    lb_tx_init(&p->tx, &p->env, &p->to, &p->entry, &p->mopts);
    p->tx.what = p->tx.verb = "protect";
    for (int i = 0; i < LB_TOKEN_BYTES; i++)
        p->tx.token[i] = (uint8_t)rand();
    lb_epoch_init(&p->ep);
    request(p, witness, &err);
    first_copy(p, &err);
    assert_return_code(pthread_create(&p->reader, NULL, reader_main, p), 0);
    must(lb_witness_arm(p->witness, &p->rec, lb_now_ns() + 5000 * MS, &err), &err);
    armed.revision = p->rec.revision;
    m.kind_case = LB__CONTROL__KIND_ARMED;
    m.armed = &armed;
    send_msg(p, &m);
    p->beating = true;
    assert_return_code(pthread_create(&p->beater, NULL, beater_main, p), 0);
    epoch(p, 20, true);
    acked(p);
    expect_state("standby");
    for (int i = 0; i < 3000 && !p->answers; i++)
        lb_sleep_ms(1);
    assert_true(p->answers > 0);
}

/* Every process of host A dies: connections end. `guest`: the guest too. */
static void die(struct primary *p, bool guest)
{
    if (guest)
        lb_fake_kill(p->id, NULL);
    p->beating = false;
    lb_chan_abort(p->tx.chan);
    lb_bulk_abort(p->bulk);
}

static void primary_end(struct primary *p)
{
    p->quit = true;
    lb_chan_abort(p->tx.chan);
    lb_bulk_abort(p->bulk);
    pthread_join(p->beater, NULL);
    pthread_join(p->reader, NULL);
    lb_tx_close(&p->tx);
    lb_bulk_close(p->bulk);
    lb_encoder_free(p->enc);
    lb_epoch_free(&p->ep);
    lb_witness_close(p->witness);
}

/* ------------------------------------------------------------------- the questions */

static void check_nothing(struct host *h)
{
    struct lb_remus_record r;
    struct lb_protect_wish w;
    struct lb_vm_entry e;

    assert_int_equal(lb_vm_entry_load(h->dir, VM, &e, NULL), -1);
    assert_return_code(lb_record_load(h->dir, VM, &r, NULL), 0);
    assert_int_equal(r.phase, LB_PH_NONE);
    assert_int_equal(lb_wish_load(h->dir, VM, &w, NULL), -1);
}

/* It runs on B as of that epoch. */
static void check_promoted(struct primary *p, uint64_t at)
{
    struct lb_remus_record rec;
    struct lb_protect_wish w;
    struct lb_fake_stats st;
    struct lb_vm_entry e;
    uint64_t bad = 1;
    lb_fake_id id;

    if (!bk.promoted)
        fail_msg("not promoted: %s", bk.err.message);
    assert_int_equal(bk.rc, 0);
    assert_return_code(lb_vm_entry_load(B.dir, VM, &e, NULL), 0);
    assert_int_equal(e.state, LB_VM_RUNNING);
    assert_string_equal(e.note, "failed over from A");
    id = fake_in(B.dir, VM);
    assert_return_code(lb_fake_stats(id, &st, NULL), 0);
    assert_true(st.running && st.nonce == p->nonce && st.announces > 0);
    assert_int_equal(st.writes, p->writes[at]);
    assert_return_code(lb_fake_verify(id, &bad, NULL), 0);
    assert_int_equal(bad, 0);
    assert_return_code(lb_record_load(B.dir, VM, &rec, NULL), 0);
    assert_int_equal(rec.phase, LB_PH_NONE);
    assert_return_code(lb_wish_load(B.dir, VM, &w, NULL), 0);
    assert_int_equal(w.failovers, 1);
    assert_true(w.last_failover_took_ms > 0);
    if (p->disk) {
        LB_AUTO_FREE uint8_t *want = lb_alloc(DISK_BYTES);
        LB_AUTO_FREE char *have = NULL;
        size_t len;

        lb_fake_disk_fill(want, DISK_BYTES, p->nonce, p->disk_writes[at]);
        assert_return_code(lb_file_read(p->image, DISK_BYTES + 1, &have, &len, NULL), 0);
        assert_int_equal(len, DISK_BYTES);
        assert_memory_equal(have, want, DISK_BYTES);
    }
}

/* The guest on A is alone; B knows nothing of it, and says that it never will. */
static void check_stayed(struct primary *p)
{
    struct lb_journal j;

    assert_int_equal(lb_fake_running(VM), 1);
    assert_int_equal(lb_fake_count(VM), 1);
    check_nothing(&B);
    assert_false(bk.promoted);
    assert_return_code(lb_journal_load(B.dir, p->rec.id, &j, NULL), 0);
    assert_int_equal(j.state, LB_J_REFUSED);
}

/* The command notes when it was called, and says what the file "verdict" says. */
static void fence_up(void)
{
    LB_AUTO_FREE char *path = NULL, *text = NULL;

    snprintf(fence_dir, sizeof(fence_dir), "/tmp/lb-test-fence-XXXXXX");
    assert_non_null(mkdtemp(fence_dir));
    path = lb_asprintf("%s/fence", fence_dir);
    text = lb_asprintf("#!/bin/sh\ndate +%%s%%N >> %s/calls\nexit $(cat %s/verdict)\n", fence_dir,
                       fence_dir);
    assert_return_code(lb_file_write_atomic(path, text, strlen(text), 0755, NULL), 0);
    snprintf(fence_spec, sizeof(fence_spec), "fence:%s", path);
}

static void fence_says(const char *code)
{
    LB_AUTO_FREE char *path = lb_asprintf("%s/verdict", fence_dir);

    assert_return_code(lb_file_write_atomic(path, code, strlen(code), 0600, NULL), 0);
}

/* When it was called first, CLOCK_REALTIME; 0 never. */
static uint64_t fence_called(void)
{
    LB_AUTO_FREE char *path = lb_asprintf("%s/calls", fence_dir), *text = NULL;
    size_t len;

    return lb_file_read(path, 65536, &text, &len, NULL) ? 0 : strtoull(text, NULL, 10);
}

static uint64_t realtime_of(uint64_t monotonic_ns)
{
    struct timespec ts;

    clock_gettime(CLOCK_REALTIME, &ts);
    return (uint64_t)ts.tv_sec * 1000000000 + (uint64_t)ts.tv_nsec - (lb_now_ns() - monotonic_ns);
}

static char *etcd_here(void)
{
    return etcd_spec(1);
}

static int group_up(void **state)
{
    (void)state;
    lb_log_set_level(getenv("LB_TEST_LOG") ? LB_LOG_DEBUG : LB_LOG_ERROR);
    if (!getenv("LB_TEST_LOG"))
        lb_log_set_fd(eventfd(0, EFD_CLOEXEC)); /* failures are the subject, not news */
    if (!own_network())
        return -1;
    etcd_open_cluster(&etcd, 1);
    bk.cancel_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    bk.failover_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    host_up(&A, "A");
    host_up(&B, "B");
    trust(&A, &B, B.port);
    trust(&B, &A, A.port);
    fence_up();
    return 0;
}

static int group_down(void **state)
{
    (void)state;
    host_down(&A);
    host_down(&B);
    close(bk.cancel_fd);
    close(bk.failover_fd);
    etcd_close_cluster(&etcd);
    lb_remove_tree(fence_dir, NULL);
    return 0;
}

/* Before each test: nothing that a failed one left behind. */
static int fresh(void **state)
{
    LB_AUTO_FREE char *calls = lb_asprintf("%s/calls", fence_dir);
    LB_AUTO_FREE char *image = lb_asprintf("%s/disk.img", B.dir);

    (void)state;
    lb_fake_reset();
    for (struct host *h = &A;; h = &B) {
        lb_vm_entry_remove(h->dir, VM, NULL);
        lb_record_remove(h->dir, VM, NULL);
        lb_wish_remove(h->dir, VM, NULL);
        if (h == &B)
            break;
    }
    unlink(calls);
    unlink(image);
    fence_says("0");
    quiet(bk.cancel_fd);
    quiet(bk.failover_fd);
    bk.force = false;
    return 0;
}

/* ----------------------------------------------------------------------- tests */

static void test_eof(void **state)
{
    LB_AUTO_FREE char *spec = etcd_here();
    struct primary p;
    uint64_t t;

    (void)state;
    protect(&p, spec, true);
    for (int i = 0; i < 8; i++)
        epoch(&p, 50, true);
    acked(&p);
    t = lb_now_ns();
    die(&p, true);
    idle(&B);
    print_message("connection lost: running after %.1f ms (promise %u ms)\n",
                  (double)(lb_now_ns() - t) / 1e6, PROMISE_MS);
    check_promoted(&p, 9);
    primary_end(&p);
}

/* No connection ends, nothing comes any more; the claim waits for the end of the promise. */
static void test_silence(void **state)
{
    struct primary p;
    uint64_t called, promised;

    (void)state;
    protect(&p, fence_spec, false);
    epoch(&p, 10, true);
    acked(&p);
    p.beating = false;
    idle(&B);
    check_promoted(&p, 2);
    called = fence_called();
    promised = realtime_of(p.answered_ns) + PROMISE_MS * MS;
    print_message("silence: claimed %.1f ms after the promise\n",
                  ((double)called - (double)promised) / 1e6);
    assert_true(called >= promised);
    primary_end(&p);
}

/* While beats come nobody claims, however slow everything else is. */
static void test_promise(void **state)
{
    struct primary p;

    (void)state;
    protect(&p, fence_spec, false);
    for (int i = 0; i < 5; i++) {
        lb_sleep_ms(PROMISE_MS);
        assert_true(p.answers > 0);
        p.answers = 0;
    }
    assert_int_equal(fence_called(), 0);
    expect_state("standby");
    die(&p, true);
    idle(&B);
    check_promoted(&p, 1);
    primary_end(&p);
}

/* What was sent of the next epoch when the primary died is nothing. */
static void test_incomplete(void **state)
{
    LB_AUTO_FREE char *spec = etcd_here();
    struct primary p;

    (void)state;
    protect(&p, spec, true);
    epoch(&p, 30, true);
    acked(&p);
    epoch(&p, 40, false);
    lb_sleep_ms(20);
    die(&p, true);
    idle(&B);
    check_promoted(&p, 2);
    primary_end(&p);
}

static void test_lost(void **state)
{
    LB_AUTO_FREE char *spec = etcd_here();
    struct lb_error err = LB_ERROR_INIT;
    struct primary p;

    (void)state;
    protect(&p, spec, false);
    lb_hex(p.rec.nonce, p.tx.token, LB_TOKEN_BYTES);
    assert_int_equal(lb_witness_claim(p.witness, &p.rec, lb_now_ns() + 3000 * MS, &err),
                     LB_CLAIM_WON);
    die(&p, false);
    idle(&B);
    assert_int_equal(bk.rc, -1);
    check_stayed(&p);
    primary_end(&p);
}

/* The witness answers late: nothing runs on a guess. */
static void test_unreachable(void **state)
{
    LB_AUTO_FREE char *spec = etcd_here();
    struct primary p;

    (void)state;
    protect(&p, spec, false);
    etcd_signal(&etcd, 0, SIGSTOP);
    die(&p, true);
    lb_sleep_ms(PROMISE_MS + 800);
    assert_int_equal(lb_fake_running(VM), 0);
    expect_state("promoting");
    etcd_signal(&etcd, 0, SIGCONT);
    idle(&B);
    check_promoted(&p, 1);
    primary_end(&p);
}

/* Neither host reaches the witness, but the primary reaches the backup. */
static void test_asked(void **state)
{
    enum lb_verdict v;
    struct lb_error err = LB_ERROR_INIT;
    struct primary p;

    (void)state;
    fence_says("1");
    protect(&p, fence_spec, false);
    must(lb_handover_peek(&p.env, &p.to, p.rec.id, VM, &v, &err), &err);
    assert_int_equal(v, LB_VERDICT_OPEN);
    die(&p, false);
    lb_sleep_ms(PROMISE_MS + 300);
    assert_true(fence_called() > 0);
    assert_int_equal(lb_fake_count(VM), 2);
    must(lb_handover_ask(&p.env, &p.to, p.rec.id, VM, &v, &err), &err);
    assert_int_equal(v, LB_VERDICT_REFUSED);
    fence_says("0"); /* too late */
    idle(&B);
    check_stayed(&p);
    primary_end(&p);
}

static void test_discard(void **state)
{
    LB_AUTO_FREE char *spec = etcd_here();
    Lb__Control m = LB__CONTROL__INIT;
    Lb__Discard d = LB__DISCARD__INIT;
    struct primary p;

    (void)state;
    protect(&p, spec, true);
    d.reason = (char *)"unprotect";
    m.kind_case = LB__CONTROL__KIND_DISCARD;
    m.discard = &d;
    send_msg(&p, &m);
    assert_true(wait_for(&p.discarded, 3000));
    idle(&B);
    assert_int_equal(bk.rc, 0);
    check_stayed(&p);
    primary_end(&p);
}

static void yield_now(struct primary *p)
{
    Lb__Control m = LB__CONTROL__INIT;
    Lb__Yielded y = LB__YIELDED__INIT;

    assert_return_code(lb_hv_stop(p->tx.vm, NULL), 0);
    y.epoch = p->acked;
    m.kind_case = LB__CONTROL__KIND_YIELDED;
    m.yielded = &y;
    send_msg(p, &m);
}

/* Planned: nobody waits for a promise, and nobody is fenced. */
static void test_yield(void **state)
{
    struct primary p;
    uint64_t t;

    (void)state;
    protect(&p, fence_spec, true);
    ring(bk.failover_fd);
    assert_true(wait_for(&p.yield_asked, 3000));
    epoch(&p, 10, true);
    acked(&p);
    t = lb_now_ns();
    yield_now(&p);
    assert_true(wait_for(&p.promoted, 3000));
    print_message("yielded: promoted after %.1f ms\n", (double)(lb_now_ns() - t) / 1e6);
    idle(&B);
    assert_int_equal(fence_called(), 0);
    lb_fake_kill(p.id, NULL);
    check_promoted(&p, 2);
    primary_end(&p);
}

/* By hand: silence decides nothing; a word does, but only one that vouches. */
static void test_manual(void **state)
{
    char now[32], note[256] = "";
    struct primary p;

    (void)state;
    protect(&p, "manual", false);
    die(&p, true);
    lb_sleep_ms(PROMISE_MS + 100);
    assert_int_equal(lb_fake_running(VM), 0);
    expect_state("standby");
    ring(bk.failover_fd);
    for (int i = 0; i < 2000 && strncmp(note, "failover refused", 16); i++) {
        lb_sleep_ms(1);
        state_of(now, note);
    }
    assert_non_null(strstr(note, "--force"));
    assert_int_equal(lb_fake_running(VM), 0);
    bk.force = true;
    ring(bk.failover_fd);
    idle(&B);
    check_promoted(&p, 1);
    primary_end(&p);
}

static void test_receiver_dies(void **state)
{
    LB_AUTO_FREE char *spec = etcd_here();
    struct primary p;

    (void)state;
    protect(&p, spec, true);
    lb_fake_kill(fake_in(B.dir, VM), NULL);
    assert_true(wait_for(&p.ended, 3000));
    idle(&B);
    assert_int_equal(bk.err.code, LB_E_HV);
    check_stayed(&p);
    primary_end(&p);
}

static void test_cancel(void **state)
{
    LB_AUTO_FREE char *spec = etcd_here();
    struct primary p;

    (void)state;
    protect(&p, spec, false);
    ring(bk.cancel_fd);
    assert_true(wait_for(&p.ended, 3000));
    idle(&B);
    assert_int_equal(bk.err.code, LB_E_CANCELLED);
    check_stayed(&p);
    primary_end(&p);
}

/* Each call of the receiver fails once, before and at the failover. */
static void test_faults(void **state)
{
    static const enum lb_fake_slot slots[] = {LB_FAKE_LOAD_STATE, LB_FAKE_ANNOUNCE};
    LB_AUTO_FREE char *spec = etcd_here();

    (void)state;
    for (unsigned i = 0; i < LB_ARRAY_LEN(slots); i++) {
        struct primary p;

        protect(&p, spec, false);
        lb_fake_fail(slots[i], 1, LB_E_HV);
        die(&p, true);
        idle(&B);
        if (slots[i] == LB_FAKE_LOAD_STATE) {
            assert_int_equal(bk.rc, -1);
            assert_int_equal(lb_fake_count(VM), 0);
            check_nothing(&B);
        } else {
            assert_true(bk.promoted);
        }
        primary_end(&p);
        fresh(NULL);
    }
}

/* The first attempts to run fail, or seem to. */
static void test_run_again(void **state)
{
    LB_AUTO_FREE char *spec = etcd_here();

    (void)state;
    for (int late = 0; late < 2; late++) {
        struct primary p;

        protect(&p, spec, false);
        (late ? lb_fake_fail_late : lb_fake_fail)(LB_FAKE_RUN, 1, LB_E_HV);
        die(&p, true);
        idle(&B);
        check_promoted(&p, 1);
        primary_end(&p);
        fresh(NULL);
    }
}

/* It won and died before it ran: the primary, should it come back, is told so and goes on. */
static void test_run_dies(void **state)
{
    LB_AUTO_FREE char *spec = etcd_here();
    struct lb_session_env env = env_of(&A);
    struct lb_error err = LB_ERROR_INIT;
    struct lb_remus_record rec = {0};
    struct primary p;
    char text[512];

    (void)state;
    protect(&p, spec, false);
    lb_fake_die(LB_FAKE_RUN, 1);
    die(&p, false);
    idle(&B);
    assert_int_equal(bk.rc, -1);
    check_stayed(&p);
    primary_end(&p);
    rec = p.rec;
    rec.nonce[0] = '\0';
    snprintf(rec.peer, sizeof(rec.peer), "B");
    lb_key_format(rec.peer_key, B.id.pub);
    snprintf(rec.witness, sizeof(rec.witness), "%s", spec);
    must(lb_record_move(A.dir, VM, &rec, LB_PH_ARMING, &err), &err);
    must(lb_record_move(A.dir, VM, &rec, LB_PH_PROTECTED, &err), &err);
    p.entry.state = LB_VM_PROTECTED;
    must(lb_vm_entry_save(A.dir, &p.entry, &err), &err);
    must(lb_remus_recover(&env, VM, text, &err), &err);
    check_stayed(&p);
}

/* The primary begins anew while an old standby waits for a person's word. */
static void test_supersede(void **state)
{
    struct primary old, p;

    (void)state;
    protect(&old, "manual", false);
    die(&old, true);
    expect_state("standby");
    primary_end(&old);
    lb_vm_entry_remove(A.dir, VM, NULL);
    protect(&p, "manual", false);
    assert_int_equal(lb_fake_running(VM), 1);
    die(&p, false);
    bk.force = true;
    ring(bk.failover_fd);
    idle(&B);
    check_promoted(&p, 1);
    primary_end(&p);
}

/* A primary that is wrong, or not armed. */
static void test_refused(void **state)
{
    struct lb_error err = LB_ERROR_INIT;
    struct lb_report mine = {0};
    struct primary p;
    Lb__ProtectSpec spec = LB__PROTECT_SPEC__INIT;
    struct lb_hosts v = {0};

    (void)state;
    boot(&p, false);
    p.env = env_of(&A);
    assert_return_code(lb_hosts_load(A.dir, &v, NULL), 0);
    p.to = *lb_hosts_by_name(&v, "B");
    lb_hosts_free(&v);
    lb_tx_init(&p.tx, &p.env, &p.to, &p.entry, &p.mopts);
    p.tx.what = p.tx.verb = "protect";
    spec.id = (ProtobufCBinaryData){LB_TOKEN_BYTES, p.tx.token};
    spec.wish_json = (char *)"{}";
    spec.witness_key = (char *)"k";
    p.tx.protect = &spec;
    must(lb_tx_open(&p.tx, &mine, &err), &err);
    assert_int_equal(lb_tx_preflight(&p.tx, &mine, &err), -1);
    assert_int_equal(err.code, LB_E_PROTO);
    lb_tx_close(&p.tx);
    lb_report_free(&mine);
    idle(&B);
    check_nothing(&B);
}

/* ----------------------------------------------------------------- recovery */

/* A primary's entry in that phase, with a guest that runs, is stopped, or is gone. */
static struct lb_remus_record primary_in(struct primary *p, enum lb_phase phase, const char *witness,
                                         bool arm)
{
    struct lb_error err = LB_ERROR_INIT;
    struct lb_remus_record r = {0};
    char key[LB_KEY_TEXT_BYTES];
    uint8_t id[16];

    boot(p, false);
    for (unsigned i = 0; i < sizeof(id); i++)
        id[i] = (uint8_t)rand();
    lb_hex(r.id, id, sizeof(id));
    snprintf(r.peer, sizeof(r.peer), "B");
    lb_key_format(r.peer_key, B.id.pub);
    snprintf(r.witness, sizeof(r.witness), "%s", witness);
    lb_witness_key(r.key, VM, "", r.id);
    if (arm) {
        lb_key_format(key, A.id.pub);
        must(lb_witness_open(witness, LB_SIDE_PRIMARY, key, "B", &p->witness, &err), &err);
        must(lb_witness_arm(p->witness, &r, lb_now_ns() + 5000 * MS, &err), &err);
        lb_witness_close(p->witness);
    }
    if (phase != LB_PH_NONE)
        must(lb_record_move(A.dir, VM, &r, LB_PH_ARMING, &err), &err);
    if (phase >= LB_PH_PROTECTED && phase != LB_PH_ALONE)
        must(lb_record_move(A.dir, VM, &r, LB_PH_PROTECTED, &err), &err);
    if (phase != LB_PH_NONE && phase != LB_PH_ARMING && phase != LB_PH_PROTECTED)
        must(lb_record_move(A.dir, VM, &r, phase, &err), &err);
    p->entry.state = LB_VM_PROTECTED;
    must(lb_vm_entry_save(A.dir, &p->entry, &err), &err);
    return r;
}

/* B takes it over at the witness, and its journal says what it does. */
static void backup_claims(const struct lb_remus_record *r, enum lb_journal_state says)
{
    struct lb_error err = LB_ERROR_INIT;
    struct lb_remus_record mine = *r;
    struct lb_witness *w;
    struct lb_journal j = {0};
    char key[LB_KEY_TEXT_BYTES];

    snprintf(mine.nonce, sizeof(mine.nonce), "%032x", 7);
    lb_key_format(key, B.id.pub);
    if (r->revision) {
        must(lb_witness_open(r->witness, LB_SIDE_BACKUP, key, "A", &w, &err), &err);
        assert_int_equal(lb_witness_claim(w, &mine, lb_now_ns() + 3000 * MS, &err), LB_CLAIM_WON);
        lb_witness_close(w);
    }
    snprintf(j.token, sizeof(j.token), "%s", r->id);
    snprintf(j.vm, sizeof(j.vm), VM);
    snprintf(j.peer, sizeof(j.peer), "A");
    must(lb_journal_move(B.dir, &j, LB_J_PREPARED, &err), &err);
    if (says != LB_J_PREPARED)
        must(lb_journal_move(B.dir, &j, says, &err), &err);
}

static int recover(struct host *h, enum lb_errcode *code)
{
    struct lb_session_env env = env_of(h);
    struct lb_error err = LB_ERROR_INIT;
    char text[512] = "";
    int rc = lb_remus_recover(&env, VM, text, &err);

    *code = err.code;
    assert_true(text[0] || rc);
    if (rc)
        assert_true(err.message[0]);
    return rc;
}

static void check_goes_on(void)
{
    struct lb_remus_record r;
    struct lb_vm_entry e;

    assert_int_equal(lb_fake_running(VM), 1);
    assert_return_code(lb_vm_entry_load(A.dir, VM, &e, NULL), 0);
    assert_int_equal(e.state, LB_VM_RUNNING);
    assert_return_code(lb_record_load(A.dir, VM, &r, NULL), 0);
    assert_int_equal(r.phase, LB_PH_NONE);
}

static void test_recover_primary(void **state)
{
    LB_AUTO_FREE char *spec = etcd_here(), *history = lb_asprintf("%s/history.jsonl", A.dir);
    LB_AUTO_FREE char *lines = NULL;
    static const enum lb_phase free_phases[] = {LB_PH_NONE, LB_PH_ARMING, LB_PH_ALONE};
    /* armed: the backup may have won with an epoch whose Ack was not seen */
    static const enum lb_phase asked[] = {LB_PH_ARMING, LB_PH_PROTECTED, LB_PH_YIELDED};
    struct lb_remus_record r;
    struct primary p;
    enum lb_errcode code;
    size_t len;

    (void)state;
    for (unsigned i = 0; i < LB_ARRAY_LEN(free_phases); i++) {
        primary_in(&p, free_phases[i], spec, free_phases[i] == LB_PH_ALONE);
        assert_int_equal(recover(&A, &code), 0);
        check_goes_on();
        fresh(NULL);
    }
    for (unsigned i = 0; i < LB_ARRAY_LEN(asked); i++) {
        primary_in(&p, asked[i], spec, true); /* nobody claimed */
        assert_int_equal(recover(&A, &code), 0);
        check_goes_on();
        fresh(NULL);
        r = primary_in(&p, asked[i], spec, true); /* beaten */
        backup_claims(&r, LB_J_RUNNING);
        assert_int_equal(recover(&A, &code), 0);
        assert_int_equal(lb_fake_count(VM), 0);
        check_nothing(&A);
        fresh(NULL);
    }
    primary_in(&p, LB_PH_FENCED, spec, true);
    assert_int_equal(recover(&A, &code), 0);
    assert_int_equal(lb_fake_count(VM), 0);
    check_nothing(&A);
    assert_return_code(lb_file_read(history, 1 << 20, &lines, &len, NULL), 0);
    assert_non_null(strstr(lines, "\"failed-over\""));
}

/* The witness does not answer: the other host may; when it does not either, nothing runs. */
static void test_recover_unreachable(void **state)
{
    LB_AUTO_FREE char *spec = etcd_here();
    struct lb_remus_record r;
    struct lb_fake_stats st;
    struct primary p;
    enum lb_errcode code;

    (void)state;
    r = primary_in(&p, LB_PH_PROTECTED, spec, true);
    backup_claims(&r, LB_J_RUNNING);
    etcd_signal(&etcd, 0, SIGSTOP);
    assert_int_equal(recover(&A, &code), 0);
    check_nothing(&A);
    assert_int_equal(lb_fake_count(VM), 0);
    etcd_signal(&etcd, 0, SIGCONT);
    fresh(NULL);

    r = primary_in(&p, LB_PH_PROTECTED, spec, true);
    etcd_signal(&etcd, 0, SIGSTOP);
    assert_return_code(lb_hosts_forget(A.dir, "B", NULL), 0);
    assert_int_equal(recover(&A, &code), -1);
    assert_int_equal(code, LB_E_UNDECIDED);
    assert_return_code(lb_fake_stats(p.id, &st, NULL), 0);
    assert_true(st.alive && !st.running);
    etcd_signal(&etcd, 0, SIGCONT);
    trust(&A, &B, B.port);
    assert_int_equal(recover(&A, &code), 0);
    check_goes_on();
}

/* Its process is gone: it is not claimed for, only looked at what became of it. */
static void test_recover_gone(void **state)
{
    LB_AUTO_FREE char *spec = etcd_here();
    const char *const specs[] = {spec, "manual"};
    struct lb_remus_record r;
    struct lb_vm_entry e;
    struct primary p;
    enum lb_errcode code;

    (void)state;
    for (unsigned i = 0; i < LB_ARRAY_LEN(specs); i++) {
        r = primary_in(&p, LB_PH_PROTECTED, specs[i], true);
        lb_fake_kill(p.id, NULL);
        backup_claims(&r, LB_J_RUNNING);
        assert_int_equal(recover(&A, &code), 0);
        check_nothing(&A);
        fresh(NULL);

        r = primary_in(&p, LB_PH_PROTECTED, specs[i], true);
        lb_fake_kill(p.id, NULL);
        r.revision = 0; /* the backup stands by and has claimed nothing */
        backup_claims(&r, LB_J_PREPARED);
        assert_int_equal(recover(&A, &code), -1);
        assert_int_equal(code, LB_E_UNDECIDED);
        fresh(NULL);

        primary_in(&p, LB_PH_PROTECTED, specs[i], true);
        lb_fake_kill(p.id, NULL); /* and the backup knows nothing of it */
        assert_int_equal(recover(&A, &code), 0);
        assert_return_code(lb_vm_entry_load(A.dir, VM, &e, NULL), 0);
        assert_int_equal(e.state, LB_VM_DEAD);
        fresh(NULL);
    }
}

/* A fence and a person remember nothing: the other host is asked before they are. */
static void test_recover_forgetful(void **state)
{
    const char *const specs[] = {"manual", fence_spec};
    struct lb_remus_record r;
    struct primary p;
    enum lb_errcode code;

    (void)state;
    for (unsigned i = 0; i < LB_ARRAY_LEN(specs); i++) {
        r = primary_in(&p, LB_PH_PROTECTED, specs[i], false);
        backup_claims(&r, LB_J_RUNNING);
        assert_int_equal(recover(&A, &code), 0);
        assert_int_equal(lb_fake_count(VM), 0);
        check_nothing(&A);
        fresh(NULL);
        primary_in(&p, LB_PH_PROTECTED, specs[i], false);
        assert_int_equal(recover(&A, &code), 0);
        check_goes_on();
        assert_int_equal(fence_called(), 0);
        fresh(NULL);
        /* What was yielded may run there without a claim: nothing but its word counts. */
        primary_in(&p, LB_PH_YIELDED, specs[i], true);
        assert_return_code(lb_hosts_forget(A.dir, "B", NULL), 0);
        assert_int_equal(recover(&A, &code), -1);
        assert_int_equal(code, LB_E_UNDECIDED);
        assert_int_equal(lb_fake_running(VM), 0);
        assert_int_equal(fence_called(), 0);
        trust(&A, &B, B.port);
        assert_int_equal(recover(&A, &code), 0);
        check_goes_on();
        fresh(NULL);
    }
}

/* A standby on B in that phase whose session was killed; its memory is that of the guest on A. */
static struct lb_remus_record backup_in(struct primary *p, enum lb_phase phase, const char *witness,
                                        enum lb_journal_state says)
{
    struct lb_error err = LB_ERROR_INIT;
    struct lb_vm_ident id = {0};
    struct lb_remus_record armed = primary_in(p, LB_PH_PROTECTED, witness, true), r = armed;
    struct lb_vm_entry e = {.state = LB_VM_STANDBY};
    LB_AUTO_FREE char *dir = lb_vm_dir(B.dir, VM, true);
    struct lb_launch_opts lo = {.name = VM, .run_dir = dir};
    struct lb_protect_wish wish = {.opts.lease_ms = LEASE_MS};
    struct lb_vm_desc desc = {0};
    struct lb_journal j = {0};
    struct lb_hv_vm *src, *vm;
    const struct lb_ram_block *from, *to;
    unsigned n, m;
    void *state;
    size_t len;

    id.qmp_path = p->entry.qmp_path;
    must(lb_hv_attach(&lb_hv_fake, &id, &src, &err), &err);
    must(lb_hv_describe(src, &desc, &err), &err);
    must(lb_hv_blocks(src, &from, &n, &err), &err);
    must(lb_hv_launch(&lb_hv_fake, &desc, &lo, &vm, &err), &err);
    must(lb_hv_prepare_ram(vm, &err), &err);
    must(lb_hv_blocks(vm, &to, &m, &err), &err);
    must(lb_hv_stop(src, &err), &err);
    must(lb_hv_save_begin(src, false, &err) || lb_hv_save_end(src, &state, &len, &err), &err);
    for (unsigned i = 0; i < n; i++)
        memcpy(to[i].map, from[i].map, from[i].size_bytes);
    if (phase >= LB_PH_PROMOTING)
        must(lb_hv_load_state(vm, state, len, &err), &err);
    free(state);
    lb_hv_ident(vm, &id);
    e.proc = id.proc;
    snprintf(e.name, sizeof(e.name), VM);
    snprintf(e.hypervisor, sizeof(e.hypervisor), "fake");
    snprintf(e.qmp_path, sizeof(e.qmp_path), "%s", id.qmp_path);
    snprintf(e.token, sizeof(e.token), "%s", r.id);
    snprintf(e.peer, sizeof(e.peer), "A");
    must(lb_vm_entry_save(B.dir, &e, &err), &err);
    lb_hv_detach(vm);
    lb_hv_detach(src);
    lb_vm_desc_free(&desc);

    snprintf(r.peer, sizeof(r.peer), "A");
    lb_key_format(r.peer_key, A.id.pub);
    snprintf(r.nonce, sizeof(r.nonce), "%032x", 9);
    r.phase = LB_PH_NONE;
    for (enum lb_phase to_phase = LB_PH_RECEIVING; to_phase <= phase; to_phase++)
        must(lb_record_move(B.dir, VM, &r, to_phase, &err), &err);
    snprintf(wish.opts.witness, sizeof(wish.opts.witness), "%s", witness);
    must(lb_wish_save(B.dir, VM, &wish, &err), &err);
    snprintf(j.token, sizeof(j.token), "%s", r.id);
    snprintf(j.vm, sizeof(j.vm), VM);
    snprintf(j.peer, sizeof(j.peer), "A");
    must(lb_journal_move(B.dir, &j, LB_J_PREPARED, &err), &err);
    if (says != LB_J_PREPARED)
        must(lb_journal_move(B.dir, &j, says, &err), &err);
    return armed;
}

static void primary_claims(const struct lb_remus_record *armed)
{
    struct lb_error err = LB_ERROR_INIT;
    struct lb_remus_record r = *armed;
    struct lb_witness *w;
    char key[LB_KEY_TEXT_BYTES];

    lb_key_format(key, A.id.pub);
    snprintf(r.nonce, sizeof(r.nonce), "%032x", 8);
    must(lb_witness_open(r.witness, LB_SIDE_PRIMARY, key, "B", &w, &err), &err);
    assert_int_equal(lb_witness_claim(w, &r, lb_now_ns() + 3000 * MS, &err), LB_CLAIM_WON);
    lb_witness_close(w);
}

static void test_recover_backup(void **state)
{
    static const struct {
        enum lb_phase phase;
        enum lb_journal_state says;
        bool primary_first, runs;
    } cases[] = {
        {LB_PH_RECEIVING, LB_J_PREPARED, false, false}, {LB_PH_STANDBY, LB_J_PREPARED, false, false},
        {LB_PH_STANDBY, LB_J_REFUSED, false, false},    {LB_PH_PROMOTING, LB_J_PREPARED, false, true},
        {LB_PH_PROMOTING, LB_J_PREPARED, true, false},  {LB_PH_PROMOTING, LB_J_REFUSED, false, false},
        {LB_PH_PROMOTING, LB_J_RUNNING, false, true},   {LB_PH_PROMOTED, LB_J_RUNNING, false, true},
    };
    LB_AUTO_FREE char *spec = etcd_here();

    (void)state;
    for (unsigned i = 0; i < LB_ARRAY_LEN(cases); i++) {
        struct primary p;
        struct lb_remus_record r = backup_in(&p, cases[i].phase, spec, cases[i].says);
        struct lb_fake_stats st;
        struct lb_journal j;
        struct lb_vm_entry e;
        enum lb_errcode code;
        uint64_t bad = 1, t = lb_now_ns();

        if (cases[i].primary_first)
            primary_claims(&r);
        if (recover(&B, &code))
            fail_msg("case %u: %s", i, lb_errcode_name(code));
        assert_return_code(lb_journal_load(B.dir, r.id, &j, NULL), 0);
        if (cases[i].runs) {
            assert_return_code(lb_vm_entry_load(B.dir, VM, &e, NULL), 0);
            assert_int_equal(e.state, LB_VM_RUNNING);
            assert_return_code(lb_fake_stats(fake_in(B.dir, VM), &st, NULL), 0);
            assert_true(st.running && st.announces);
            assert_return_code(lb_fake_verify(fake_in(B.dir, VM), &bad, NULL), 0);
            assert_int_equal(bad, 0);
            assert_int_equal(j.state, LB_J_RUNNING);
            if (cases[i].says == LB_J_PREPARED) /* the promise is kept by recovery, too */
                assert_true(lb_now_ns() - t >= PROMISE_MS * MS);
        } else {
            check_nothing(&B);
            assert_int_equal(lb_fake_count(VM), 1);
            assert_int_equal(j.state, LB_J_REFUSED);
        }
        fresh(NULL);
    }
}

/* It may have won, and cannot ask: loaded, and still. */
static void test_recover_backup_unreachable(void **state)
{
    LB_AUTO_FREE char *spec = etcd_here();
    struct lb_fake_stats st;
    struct primary p;
    enum lb_errcode code;

    (void)state;
    backup_in(&p, LB_PH_PROMOTING, spec, LB_J_PREPARED);
    etcd_signal(&etcd, 0, SIGSTOP);
    assert_int_equal(recover(&B, &code), -1);
    assert_int_equal(code, LB_E_UNDECIDED);
    assert_return_code(lb_fake_stats(fake_in(B.dir, VM), &st, NULL), 0);
    assert_true(st.alive && !st.running);
    etcd_signal(&etcd, 0, SIGCONT);
    assert_int_equal(recover(&B, &code), 0);
    assert_return_code(lb_fake_stats(fake_in(B.dir, VM), &st, NULL), 0);
    assert_true(st.running);
}

#define T(f) cmocka_unit_test_setup(f, fresh)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(test_eof), T(test_silence), T(test_promise), T(test_incomplete), T(test_lost),
        T(test_unreachable), T(test_asked), T(test_discard), T(test_yield), T(test_manual),
        T(test_receiver_dies), T(test_cancel), T(test_faults), T(test_run_again), T(test_run_dies),
        T(test_supersede), T(test_refused), T(test_recover_primary), T(test_recover_unreachable),
        T(test_recover_gone), T(test_recover_forgetful), T(test_recover_backup),
        T(test_recover_backup_unreachable),
    };

    signal(SIGPIPE, SIG_IGN);
    return cmocka_run_group_tests(tests, group_up, group_down);
}
