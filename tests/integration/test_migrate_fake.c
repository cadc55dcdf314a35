/*
 * The whole engine - both sessions, real TCP on loopback, real journals - with
 * in-process guests that know what every one of their pages must hold.
 *
 * Each test ends with the same question: exactly one guest of the name runs,
 * every page of it is right, and nothing is left on the other side.
 */
#include "tests/integration/host_util.h"

#include <poll.h>

#include "migrate/journal.h"
#include "migrate/migrate_internal.h"
#include "migrate/preflight.h"
#include "netproto/desc_proto.h"

/* ------------------------------------------------------------------- two hosts */

static struct host A, B;

/* What the wire between them does to the source's bytes. */
static struct proxy {
    int listen_fd;
    uint16_t port, to;
    pthread_t thread;
    int64_t slow;         /* connection number that delivers late; -1: none */
    int64_t conn, at;     /* damage byte `at` of connection number `conn`; -1: none */
    bool cut;             /* end the connection there instead of flipping a bit */
    int64_t seen;
    bool hit, quit;
} px;

static double last_percent;
static _Atomic bool is_ready;
static int go_fd = -1;
static void on_report(const struct lb_progress *p, void *arg)
{
    (void)arg;
    assert_true(p->percent >= last_percent);
    last_percent = p->percent;
    /* Before any page is sent there is no rate; a wrong one makes an ETA of years. */
    if (p->sent_bytes < LB_PAGE_SIZE)
        assert_true(p->throughput_bytes_per_s <= 0 || p->throughput_bytes_per_s >= 1);
    if (!strcmp(p->state, "ready")) {
        assert_true(p->sent_bytes < LB_PAGE_SIZE); /* the greeting of each connection */
        is_ready = true;
    }
}

/* What the layer above does about a wish; none: it does not know what that is. */
static bool knows_wishes, cannot_keep;
static char kept_wish[64];

static void check_wish(const char *json, struct lb_report *rep, void *arg)
{
    (void)arg;
    lb_report_add(rep, "protection", LB_CHECK_OK, NULL, "%s", json);
}

static int keep_wish(const char *vm, const char *json, struct lb_error *err, void *arg)
{
    struct host *h = arg;
    struct lb_vm_entry e;

    assert_return_code(lb_vm_entry_load(h->dir, vm, &e, NULL), 0); /* beside the entry */
    if (cannot_keep)
        return lb_fail(err, LB_E_NO_SPACE, "the disk is full");
    snprintf(kept_wish, sizeof(kept_wish), "%s", json);
    return 0;
}

static struct lb_session_env env_of(struct host *h)
{
    return (struct lb_session_env){.check_wish = knows_wishes ? check_wish : NULL,
                                   .keep_wish = knows_wishes ? keep_wish : NULL,
                                   .state_dir = h->dir, .hv = &lb_hv_fake, .identity = &h->id,
                                   .cancel_fd = -1, .want_conns = want_conns,
                                   .take_conn = take_conn, .arg = h};
}

/* ------------------------------------------------------------------- the wire */

struct pipe_end {
    int from, to;
    bool first;
};

static void *pump_main(void *arg)
{
    struct pipe_end *p = arg;
    int64_t conn = p->first ? px.seen++ : -2, at = 0;
    struct pollfd ready = {.fd = p->from, .events = POLLIN};
    uint8_t buf[65536];
    bool waited;
    ssize_t n;

    while ((waited = poll(&ready, 1, 0) == 0), (n = read(p->from, buf, sizeof(buf))) > 0) {
        if (conn == px.conn && px.at >= at && px.at < at + n) {
            px.hit = true;
            if (px.cut)
                break;
            buf[px.at - at] ^= 0x10;
        }
        if (conn == px.slow && conn >= 0 && waited)
            lb_sleep_ms(200); /* late, not slow: what follows comes at full speed */
        if (lb_write_all(p->to, buf, (size_t)n, NULL))
            break;
        at += n;
    }
    shutdown(p->to, SHUT_RDWR);
    shutdown(p->from, SHUT_RDWR);
    return NULL;
}

static void *relay_main(void *arg)
{
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
                            .sin_port = htons(px.to)};
    int in = *(int *)arg, out = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct pipe_end up = {in, out, true}, down = {out, in, false};
    pthread_t t;

    free(arg);
    if (!connect(out, (struct sockaddr *)&a, sizeof(a))) {
        pthread_create(&t, NULL, pump_main, &down);
        pump_main(&up);
        pthread_join(t, NULL);
    }
    close(in);
    close(out);
    return NULL;
}

static void *proxy_main(void *arg)
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
        pthread_create(&t, NULL, relay_main, fd);
        pthread_detach(t);
        lb_sleep_ms(2); /* connection numbers follow the order of accepts */
    }
}

/* ------------------------------------------------------------------- fixtures */

static int group_up(void **state)
{
    (void)state;
    lb_log_set_level(getenv("LB_TEST_LOG") ? LB_LOG_DEBUG : LB_LOG_ERROR);
    if (!getenv("LB_TEST_LOG"))
        lb_log_set_fd(eventfd(0, EFD_CLOEXEC)); /* failures are the subject, not news */
    host_up(&A, "A");
    host_up(&B, "B");
    px.conn = px.slow = -1;
    px.listen_fd = listen_any(&px.port);
    px.to = B.port;
    pthread_create(&px.thread, NULL, proxy_main, NULL);
    trust(&A, &B, px.port);
    trust(&B, &A, A.port);
    return 0;
}

static int group_down(void **state)
{
    (void)state;
    px.quit = true;
    shutdown(px.listen_fd, SHUT_RDWR);
    pthread_join(px.thread, NULL);
    close(px.listen_fd);
    host_down(&A);
    host_down(&B);
    return 0;
}

static lb_fake_id boot(const struct lb_fake_config *c, struct lb_vm_entry *e)
{
    last_percent = 0;
    is_ready = false;
    return boot_fake(A.dir, c, e);
}

static int migrate_cancel(const struct lb_vm_entry *e, const struct lb_migrate_opts *o, int cancel,
                          struct lb_migrate_result *res, struct lb_error *err)
{
    struct lb_session_env env = env_of(&A);
    struct lb_hosts v = {0};
    int rc;

    env.report = on_report;
    env.cancel_fd = cancel;
    env.go_fd = go_fd;
    for (int i = 0; i < LB_SESSION_ID_BYTES; i++)
        env.session_id[i] = (uint8_t)rand();
    px.seen = 0;
    px.hit = false;
    lb_hosts_load(A.dir, &v, NULL);
    rc = lb_migrate_out(&env, e, lb_hosts_by_name(&v, "B"), o, res, err);
    lb_hosts_free(&v);
    idle(&B);
    return rc;
}

static int migrate(const struct lb_vm_entry *e, const struct lb_migrate_opts *o,
                   struct lb_migrate_result *res, struct lb_error *err)
{
    int cancel = eventfd(0, EFD_CLOEXEC), rc = migrate_cancel(e, o, cancel, res, err);

    close(cancel);
    return rc;
}

/* Exactly one, right, on `where`; the other host knows nothing of it. */
static void check_one(const char *name, struct host *where, struct host *not_here, uint64_t nonce)
{
    struct lb_fake_stats st;
    struct lb_vm_entry e;
    uint64_t bad = 1;
    lb_fake_id id = fake_in(where->dir, name);

    assert_int_equal(lb_fake_running(name), 1);
    assert_int_equal(lb_fake_count(name), 1);
    assert_return_code(lb_fake_stats(id, &st, NULL), 0);
    assert_true(st.running && st.holds_disk && !st.throttle_percent);
    assert_true(st.nonce == nonce);
    assert_return_code(lb_fake_verify(id, &bad, NULL), 0);
    assert_int_equal(bad, 0);
    assert_return_code(lb_vm_entry_load(where->dir, name, &e, NULL), 0);
    assert_int_equal(e.state, LB_VM_RUNNING);
    assert_int_equal(lb_vm_entry_load(not_here->dir, name, &e, NULL), -1);
}

static void clean(const char *name)
{
    lb_fake_reset();
    lb_vm_entry_remove(A.dir, name, NULL);
    lb_vm_entry_remove(B.dir, name, NULL);
    px.conn = -1;
}

/* Before each test: nothing that a failed one left behind. */
static int fresh(void **state)
{
    static const char *const names[] = {"vm", "small", "big", "wild"};

    (void)state;
    for (unsigned i = 0; i < LB_ARRAY_LEN(names); i++)
        clean(names[i]);
    px.slow = -1;
    px.to = B.port;
    return 0;
}

static const struct lb_migrate_opts plain = {.max_downtime_ms = 30, .allow_throttle = true};
static const struct lb_fake_config small = {.name = "small", .ram_bytes = 8 << 20,
                                            .touched_pages = 1000, .rate_pages_per_s = 3000,
                                            .working_set_pages = 600};

/* ----------------------------------------------------------------------- tests */

static void run_variant(const struct lb_fake_config *c, const struct lb_migrate_opts *o)
{
    struct lb_vm_entry e;
    struct lb_migrate_result res;
    struct lb_error err = LB_ERROR_INIT;
    lb_fake_id id = boot(c, &e);
    uint64_t nonce = stats_of(id).nonce;

    if (migrate(&e, o, &res, &err))
        fail_msg("%s / %s", err.message, err.remedy);
    assert_true(res.ok);
    assert_string_equal(res.final_state, "moved");
    assert_true(res.rounds >= 1);
    assert_true(res.downtime_ms > 0 && res.total_ms >= res.downtime_ms);
    check_one(c->name, &B, &A, nonce);
    clean(c->name);
}

static void test_variants(void **state)
{
    struct lb_fake_config c = {.name = "vm", .ram_bytes = 64 << 20, .touched_pages = 12000,
                               .rate_pages_per_s = 20000, .working_set_pages = 8000};
    struct lb_migrate_opts o = plain;

    (void)state;
    run_variant(&c, &o);
    for (unsigned n = 2; n <= 5; n += 3) {
        o.channels = n;
        run_variant(&c, &o);
    }
    o.verify = true;
    run_variant(&c, &o);
    o.compress = LB_COMPRESS_ZSTD;
    o.zstd_level = 3;
    run_variant(&c, &o);
    o.compress = LB_COMPRESS_OFF;
    o.insecure_plaintext = true;
    run_variant(&c, &o);
    c.no_map = true;
    run_variant(&c, &o);
    o = plain;
    o.channels = 3;
    o.verify = true;
    run_variant(&c, &o);
    c.rate_pages_per_s = 0;
    run_variant(&c, &o);
    o.bandwidth_bytes_per_s = 40 << 20;
    run_variant(&c, &o);
}

/* Nobody will ask about those that came in: each source has said so. */
static void all_settled(const struct host *h, unsigned at_least)
{
    struct lb_journal *v;
    unsigned n, incoming = 0;

    assert_return_code(lb_journal_list(h->dir, &v, &n, NULL), 0);
    for (unsigned i = 0; i < n; i++) {
        assert_true(v[i].state != LB_J_RUNNING || v[i].settled);
        incoming += v[i].state == LB_J_RUNNING;
    }
    assert_true(incoming >= at_least);
    free(v);
}

static void test_there_and_back(void **state)
{
    struct lb_vm_entry e;
    struct lb_migrate_result res;
    uint64_t nonce = stats_of(boot(&small, &e)).nonce;

    (void)state;
    assert_return_code(migrate(&e, &plain, &res, NULL), 0);
    assert_return_code(lb_vm_entry_load(B.dir, "small", &e, NULL), 0);
    {
        struct lb_session_env env = env_of(&B);
        struct lb_hosts v = {0};
        int cancel = eventfd(0, EFD_CLOEXEC);

        env.cancel_fd = cancel;
        memset(env.session_id, 7, sizeof(env.session_id));
        lb_hosts_load(B.dir, &v, NULL);
        assert_return_code(
            lb_migrate_out(&env, &e, lb_hosts_by_name(&v, "A"), &plain, &res, NULL), 0);
        lb_hosts_free(&v);
        close(cancel);
        idle(&A);
    }
    check_one("small", &A, &B, nonce);
    all_settled(&A, 1);
    all_settled(&B, 1);
    clean("small");
}

static void test_dry_run(void **state)
{
    struct lb_migrate_opts o = plain;
    struct lb_vm_entry e;
    struct lb_migrate_result res;
    uint64_t nonce = stats_of(boot(&small, &e)).nonce;

    (void)state;
    o.dry_run = true;
    assert_return_code(migrate(&e, &o, &res, NULL), 0);
    assert_false(res.ok);
    check_one("small", &A, &B, nonce);
    clean("small");
}

/* Every call of every slot on both sides fails once. */
static void test_slot_faults(void **state)
{
    unsigned long runs = 0, kept = 0, went = 0;

    (void)state;
    for (int slot = 0; slot < LB_FAKE_N_SLOTS; slot++) {
        for (unsigned nth = 1; nth <= 40; nth += nth < 6 ? 1 : 9) {
            struct lb_vm_entry e;
            struct lb_migrate_result res;
            struct lb_error err = LB_ERROR_INIT;
            uint64_t nonce = stats_of(boot(&small, &e)).nonce, calls;
            int rc;

            lb_fake_fail((enum lb_fake_slot)slot, nth, LB_E_HV);
            calls = lb_fake_calls((enum lb_fake_slot)slot);
            rc = migrate(&e, &plain, &res, &err);
            calls = lb_fake_calls((enum lb_fake_slot)slot) - calls;
            runs++;
            if (rc) {
                kept++;
                assert_true(err.message[0]);
                check_one("small", &A, &B, nonce);
            } else {
                went++;
                check_one("small", &B, &A, nonce);
            }
            clean("small");
            if (calls < nth)
                break;
        }
    }
    print_message("%lu runs: %lu stayed, %lu moved\n", runs, kept, went);
    assert_true(kept > 10 && went > 10);
}

/* The receiver, or the VM itself, dies at any of its calls. */
static void test_deaths(void **state)
{
    static const enum lb_fake_slot dest[] = {LB_FAKE_PREPARE_RAM, LB_FAKE_LOAD_STATE, LB_FAKE_RUN};

    (void)state;
    for (unsigned i = 0; i < LB_ARRAY_LEN(dest); i++) {
        struct lb_vm_entry e;
        struct lb_migrate_result res;
        struct lb_error err = LB_ERROR_INIT;
        uint64_t nonce = stats_of(boot(&small, &e)).nonce;

        lb_fake_die(dest[i], 1);
        assert_int_equal(migrate(&e, &plain, &res, &err), -1);
        assert_string_equal(res.final_state, "running");
        check_one("small", &A, &B, nonce);
        clean("small");
    }
    for (int slot = LB_FAKE_LOG_ENABLE; slot <= LB_FAKE_SAVE_END; slot++) {
        struct lb_vm_entry e, after;
        struct lb_migrate_result res;
        struct lb_error err = LB_ERROR_INIT;

        if (slot == LB_FAKE_LOG_DISABLE || slot == LB_FAKE_READ)
            continue;
        boot(&small, &e);
        lb_fake_die((enum lb_fake_slot)slot, 1);
        assert_int_equal(migrate(&e, &plain, &res, &err), -1);
        assert_int_equal(lb_fake_running("small"), 0);
        assert_return_code(lb_vm_entry_load(A.dir, "small", &after, NULL), 0);
        assert_int_equal(after.state, LB_VM_DEAD);
        assert_int_equal(lb_vm_entry_load(B.dir, "small", &after, NULL), -1);
        clean("small");
    }
}

/* Bits flipped and connections cut at many places of every connection. */
static void test_wire_faults(void **state)
{
    unsigned hits = 0;

    (void)state;
    for (int conn = 0; conn < 3; conn++) {
        for (int cut = 0; cut < 2; cut++) {
            for (int64_t at = 0; at < 3000000; at = at * 5 / 2 + 13) {
                struct lb_migrate_opts o = plain;
                struct lb_vm_entry e;
                struct lb_migrate_result res;
                struct lb_error err = LB_ERROR_INIT;
                uint64_t nonce = stats_of(boot(&small, &e)).nonce;
                int rc;

                o.channels = 2;
                o.compress = LB_COMPRESS_OFF;
                px.conn = conn;
                px.at = at;
                px.cut = cut;
                rc = migrate(&e, &o, &res, &err);
                px.conn = -1;
                hits += px.hit;
                /* Damage may also come after the commit; then the journal is asked. */
                if (rc)
                    check_one("small", &A, &B, nonce);
                else
                    check_one("small", &B, &A, nonce);
                if (px.hit && !rc)
                    assert_int_equal(conn, 0);
                clean("small");
                if (!px.hit)
                    break; /* so much is not sent on this connection */
            }
        }
    }
    print_message("%u damaged migrations\n", hits);
    assert_true(hits > 40);
}

static void *cancel_later(void *arg)
{
    int *v = arg;
    uint64_t one = 1;

    lb_sleep_ms((unsigned)v[1]);
    assert_int_equal(write(v[0], &one, sizeof(one)), sizeof(one));
    return NULL;
}

static void test_cancel(void **state)
{
    struct lb_fake_config c = {.name = "big", .ram_bytes = 64 << 20, .touched_pages = 14000,
                               .rate_pages_per_s = 5000, .working_set_pages = 9000,
                               .random_bytes = 4096};
    struct lb_migrate_opts o = plain;
    unsigned cancelled = 0;

    (void)state;
    o.bandwidth_bytes_per_s = 60 << 20;
    for (int ms = 0; ms < 1200; ms = ms * 4 / 3 + 7) {
        struct lb_vm_entry e;
        struct lb_migrate_result res;
        struct lb_error err = LB_ERROR_INIT;
        uint64_t nonce = stats_of(boot(&c, &e)).nonce;
        int v[2] = {eventfd(0, EFD_CLOEXEC), ms}, rc;
        pthread_t t;

        pthread_create(&t, NULL, cancel_later, v);
        rc = migrate_cancel(&e, &o, v[0], &res, &err);
        pthread_join(t, NULL);
        close(v[0]);
        if (rc) {
            assert_int_equal(err.code, LB_E_CANCELLED);
            cancelled++;
            check_one("big", &A, &B, nonce);
        } else {
            check_one("big", &B, &A, nonce);
        }
        clean("big");
    }
    assert_true(cancelled >= 3);
}

/* Told something a while after it is ready; what it is ready for does not happen before. */
static void *tell_ready(void *arg)
{
    int *v = arg;
    uint64_t one = 1;

    while (!is_ready)
        lb_sleep_ms(5);
    lb_sleep_ms((unsigned)v[1]);
    assert_int_equal(lb_fake_running("small"), 1);
    if (v[0] >= 0)
        assert_int_equal(write(v[0], &one, sizeof(one)), sizeof(one));
    else
        lb_fake_kill(fake_in(B.dir, "small"), NULL);
    return NULL;
}

static void test_wait_go(void **state)
{
    enum { GO, CANCEL, PEER_DIES, N };
    struct lb_migrate_opts o = plain;

    (void)state;
    o.wait_go = true;
    for (int what = 0; what < N; what++) {
        struct lb_vm_entry e;
        struct lb_migrate_result res;
        struct lb_error err = LB_ERROR_INIT;
        uint64_t nonce = stats_of(boot(&small, &e)).nonce;
        int cancel = eventfd(0, EFD_CLOEXEC), v[2] = {-1, 1500}, rc;
        pthread_t t;

        go_fd = eventfd(0, EFD_CLOEXEC);
        v[0] = what == GO ? go_fd : what == CANCEL ? cancel : -1;
        pthread_create(&t, NULL, tell_ready, v);
        rc = migrate_cancel(&e, &o, cancel, &res, &err);
        pthread_join(t, NULL);
        close(cancel);
        close(go_fd);
        go_fd = -1;
        if (what == GO) {
            assert_int_equal(rc, 0);
            assert_true(res.total_ms < 1400); /* waiting is not counted */
            check_one("small", &B, &A, nonce);
        } else {
            assert_int_equal(rc, -1);
            assert_int_equal(err.code, what == CANCEL ? LB_E_CANCELLED : LB_E_HV);
            check_one("small", &A, &B, nonce);
        }
        clean("small");
    }
}

static void test_no_converge(void **state)
{
    struct lb_fake_config c = {.name = "wild", .ram_bytes = 64 << 20, .touched_pages = 15000,
                               .rate_pages_per_s = 200000, .random_bytes = 4096};
    struct lb_migrate_opts o = plain;
    struct lb_vm_entry e;
    struct lb_migrate_result res;
    struct lb_error err = LB_ERROR_INIT;
    uint64_t nonce = stats_of(boot(&c, &e)).nonce;

    (void)state;
    o.bandwidth_bytes_per_s = 30 << 20;
    o.allow_throttle = false;
    o.timeout_ms = 15000;
    assert_int_equal(migrate(&e, &o, &res, &err), -1);
    assert_int_equal(err.code, LB_E_NO_CONVERGE);
    assert_true(err.remedy[0]);
    check_one("wild", &A, &B, nonce);
    clean("wild");
}

static void test_untrusted(void **state)
{
    struct lb_vm_entry e;
    struct lb_migrate_result res;
    struct lb_error err = LB_ERROR_INIT;
    uint64_t nonce = stats_of(boot(&small, &e)).nonce;

    (void)state;
    assert_return_code(lb_hosts_forget(B.dir, "A", NULL), 0);
    assert_int_equal(migrate(&e, &plain, &res, &err), -1);
    assert_true(err.message[0]);
    check_one("small", &A, &B, nonce);
    trust(&B, &A, A.port);
    clean("small");
}

/* The hand-over journal decides after a crash, whatever the entries say. */
static void test_recover(void **state)
{
    struct lb_session_env a = env_of(&A);
    struct lb_vm_entry e;
    struct lb_error err = LB_ERROR_INIT;
    char text[512];
    uint64_t nonce;
    lb_fake_id id;

    (void)state;
    for (int case_no = 0; case_no < 3; case_no++) {
        struct lb_journal j = {.vm = "small", .peer = "B"}, k = {.vm = "small", .peer = "A"};

        id = boot(&small, &e);
        nonce = stats_of(id).nonce;
        for (int i = 0; i < LB_TOKEN_HEX - 1; i++)
            j.token[i] = k.token[i] = "0123456789abcdef"[rand() % 16];
        snprintf(e.token, sizeof(e.token), "%s", j.token);
        snprintf(e.peer, sizeof(e.peer), "B");
        e.state = LB_VM_MIGRATING_OUT;
        assert_return_code(lb_vm_entry_save(A.dir, &e, NULL), 0);
        assert_return_code(lb_journal_move(A.dir, &j, LB_J_PREPARING, NULL), 0);
        if (case_no > 0)
            assert_return_code(lb_journal_move(A.dir, &j, LB_J_HANDED_OVER, NULL), 0);
        if (case_no == 2) {
            assert_return_code(lb_journal_move(B.dir, &k, LB_J_PREPARED, NULL), 0);
            assert_return_code(lb_journal_move(B.dir, &k, LB_J_RUNNING, NULL), 0);
        }
        if (lb_recover_vm(&a, "small", text, &err))
            fail_msg("%s", err.message);
        idle(&B);
        assert_true(text[0]);
        if (case_no < 2) {
            check_one("small", &A, &B, nonce);
        } else { /* B's journal says that B runs it: our copy must be gone */
            assert_int_equal(lb_fake_running("small"), 0);
            assert_int_equal(lb_vm_entry_load(A.dir, "small", &e, NULL), -1);
        }
        if (case_no == 1) { /* the question made B refuse for ever */
            assert_return_code(lb_journal_load(B.dir, j.token, &k, NULL), 0);
            assert_int_equal(k.state, LB_J_REFUSED);
        }
        clean("small");
    }
    /* B cannot be asked: the VM stays paused and says so. */
    {
        struct lb_journal j = {.vm = "small", .peer = "B"};

        id = boot(&small, &e);
        memset(j.token, 'a', LB_TOKEN_HEX - 1);
        snprintf(e.token, sizeof(e.token), "%s", j.token);
        e.state = LB_VM_MIGRATING_OUT;
        assert_return_code(lb_vm_entry_save(A.dir, &e, NULL), 0);
        assert_return_code(lb_journal_move(A.dir, &j, LB_J_PREPARING, NULL), 0);
        assert_return_code(lb_journal_move(A.dir, &j, LB_J_HANDED_OVER, NULL), 0);
        px.to = 1;
        assert_int_equal(lb_recover_vm(&a, "small", text, &err), -1);
        assert_int_equal(err.code, LB_E_UNDECIDED);
        assert_return_code(lb_vm_entry_load(A.dir, "small", &e, NULL), 0);
        assert_int_equal(e.state, LB_VM_HANDED_OVER);
        px.to = B.port;
        assert_return_code(lb_recover_vm(&a, "small", text, &err), 0);
        idle(&B);
        check_one("small", &A, &B, stats_of(id).nonce);
        clean("small");
    }
}

/* A command took effect, but its answer was lost. */
static void test_lost_answers(void **state)
{
    static const enum lb_fake_slot slots[] = {LB_FAKE_STOP, LB_FAKE_CONT};
    struct lb_session_env b = env_of(&B);
    struct lb_vm_entry e;
    struct lb_migrate_result res;
    struct lb_error err = LB_ERROR_INIT;
    struct lb_journal j;
    char text[512];
    uint64_t nonce;

    (void)state;
    for (unsigned i = 0; i < LB_ARRAY_LEN(slots); i++) {
        for (unsigned nth = 1; nth <= 2; nth++) {
            nonce = stats_of(boot(&small, &e)).nonce;
            lb_fake_fail_late(slots[i], nth, LB_E_HV);
            if (migrate(&e, &plain, &res, &err))
                check_one("small", &A, &B, nonce);
            else
                check_one("small", &B, &A, nonce);
            clean("small");
        }
    }
    /* The destination runs it and does not know: its journal has decided, recovery tidies up. */
    nonce = stats_of(boot(&small, &e)).nonce;
    lb_fake_fail_late(LB_FAKE_RUN, 1, LB_E_HV);
    assert_return_code(migrate(&e, &plain, &res, &err), 0);
    assert_int_equal(lb_fake_running("small"), 1);
    assert_return_code(lb_vm_entry_load(B.dir, "small", &e, NULL), 0);
    assert_int_equal(e.state, LB_VM_INCOMING);
    assert_return_code(lb_journal_load(B.dir, e.token, &j, NULL), 0);
    assert_int_equal(j.state, LB_J_RUNNING);
    assert_return_code(lb_recover_vm(&b, "small", text, &err), 0);
    check_one("small", &B, &A, nonce);
    clean("small");
}

/* The peer is busy for long; a cancel must not wait for it, least of all while the guest stands. */
static void test_cancel_slow_peer(void **state)
{
    static const enum lb_fake_slot slow[] = {LB_FAKE_LAUNCH, LB_FAKE_LOAD_STATE};

    (void)state;
    for (unsigned i = 0; i < LB_ARRAY_LEN(slow); i++) {
        struct lb_vm_entry e;
        struct lb_migrate_result res;
        struct lb_error err = LB_ERROR_INIT;
        uint64_t nonce = stats_of(boot(&small, &e)).nonce;
        int v[2] = {eventfd(0, EFD_CLOEXEC), 2000};
        pthread_t t;

        lb_fake_delay(slow[i], 6000);
        pthread_create(&t, NULL, cancel_later, v);
        assert_int_equal(migrate_cancel(&e, &plain, v[0], &res, &err), -1);
        pthread_join(t, NULL);
        close(v[0]);
        assert_int_equal(err.code, LB_E_CANCELLED);
        assert_true(res.total_ms >= 2000 && res.total_ms < 4500);
        check_one("small", &A, &B, nonce);
        clean("small");
    }
}

/* What the hypervisor itself writes while it saves: pages that have just been sent, some of
 * them on a connection that delivers later than the others. */
static void *write_in_final_stop(void *arg)
{
    lb_fake_id id = *(lb_fake_id *)arg;
    struct lb_fake_stats st;

    for (int still = 0; still < 20;) {
        if (lb_fake_stats(id, &st, NULL))
            return NULL;
        still = st.running ? 0 : still + 1;
        lb_sleep_ms(2);
    }
    for (uint64_t p = 0; p < 600; p++)
        lb_fake_touch(id, 0, p, NULL);
    return arg;
}

static void test_late_writes(void **state)
{
    struct lb_fake_config c = small;
    struct lb_migrate_opts o = plain;

    (void)state;
    c.rate_pages_per_s = 20000;
    o.channels = 4;
    o.max_downtime_ms = 20000; /* the link is slow */
    o.allow_throttle = false;
    o.verify = true;
    for (int i = 0; i < 6; i++) {
        struct lb_vm_entry e;
        struct lb_migrate_result res;
        struct lb_error err = LB_ERROR_INIT;
        lb_fake_id id = boot(&c, &e);
        uint64_t nonce = stats_of(id).nonce;
        pthread_t t;
        void *wrote;

        px.slow = 1 + i % 4;
        lb_fake_delay(LB_FAKE_SAVE_END, 120);
        pthread_create(&t, NULL, write_in_final_stop, &id);
        if (migrate(&e, &o, &res, &err))
            fail_msg("%s / %s", err.message, err.remedy);
        pthread_join(t, &wrote);
        assert_non_null(wrote);
        assert_true(res.final_dirty_pages >= 600);
        check_one("small", &B, &A, nonce);
        clean("small");
    }
}

/* A trusted peer that sends a token a second time: nothing changes, nothing is left. */
static void ask_to_migrate(const struct lb_vm_entry *e, const char *token_hex, struct lb_error *err)
{
    Lb__Control m = LB__CONTROL__INIT, *in = NULL;
    Lb__MigrateRequest r = LB__MIGRATE_REQUEST__INIT;
    Lb__Hello h = LB__HELLO__INIT;
    uint8_t token[LB_TOKEN_BYTES], some[32] = {1};
    struct lb_vm_ident id = {.name = e->name, .proc = e->proc, .qmp_path = e->qmp_path};
    struct lb_vm_desc d = {0};
    struct lb_hv_vm *vm;
    struct lb_chan *chan;

    assert_return_code(lb_hv_attach(&lb_hv_fake, &id, &vm, NULL), 0);
    assert_return_code(lb_hv_describe(vm, &d, NULL), 0);
    lb_hv_detach(vm);
    lb_unhex(token, sizeof(token), token_hex);
    h.version = 1;
    h.wall_ms = lb_wall_ms();
    h.host = h.software = (char *)"";
    r.hello = &h;
    r.session_id = (ProtobufCBinaryData){LB_SESSION_ID_BYTES, some};
    r.token = (ProtobufCBinaryData){sizeof(token), token};
    r.bulk_secret = (ProtobufCBinaryData){32, some};
    r.channels = 1;
    assert_return_code(lb_desc_to_proto(&d, &r.vm, NULL), 0);
    m.kind_case = LB__CONTROL__KIND_MIGRATE_REQUEST;
    m.migrate_request = &r;
    assert_return_code(
        lb_chan_connect("127.0.0.1", B.port, &A.id, B.id.pub, 5000, -1, &chan, NULL), 0);
    assert_return_code(lb_ctl_send(chan, &m, NULL), 0);
    assert_return_code(lb_ctl_expect(chan, LB__CONTROL__KIND_PREFLIGHT_REPORT, &in,
                                     lb_now_ns() + UINT64_C(5000000000), NULL), 0);
    assert_false(in->preflight_report->refused);
    lb__control__free_unpacked(in, NULL);
    assert_int_equal(lb_ctl_recv(chan, &in, lb_now_ns() + UINT64_C(5000000000), err), -1);
    lb_chan_close(chan);
    lb__vm_description__free_unpacked(r.vm, NULL);
    lb_vm_desc_free(&d);
    idle(&B);
}

static void test_token_reuse(void **state)
{
    static const enum lb_journal_state was[] = {LB_J_PREPARED, LB_J_RUNNING, LB_J_REFUSED};

    (void)state;
    for (unsigned i = 0; i < LB_ARRAY_LEN(was); i++) {
        struct lb_journal j = {.vm = "other", .peer = "A"}, now;
        struct lb_error err = LB_ERROR_INIT;
        struct lb_vm_entry e, none;
        uint64_t nonce = stats_of(boot(&small, &e)).nonce;

        for (int k = 0; k < LB_TOKEN_HEX - 1; k++)
            j.token[k] = "0123456789abcdef"[rand() % 16];
        assert_return_code(lb_journal_move(B.dir, &j, LB_J_PREPARED, NULL), 0);
        if (was[i] != LB_J_PREPARED)
            assert_return_code(lb_journal_move(B.dir, &j, was[i], NULL), 0);
        ask_to_migrate(&e, j.token, &err);
        assert_int_equal(err.code, LB_E_PROTO);
        assert_non_null(strstr(err.message, "used before"));
        assert_return_code(lb_journal_load(B.dir, j.token, &now, NULL), 0);
        assert_int_equal(now.state, was[i]);
        assert_int_equal(lb_vm_entry_load(B.dir, "small", &none, NULL), -1);
        check_one("small", &A, &B, nonce);
        clean("small");
    }
}

/* A VM that is to be protected: the wish is there before it is, or it stays. */
static void test_wish(void **state)
{
    struct lb_migrate_opts o = plain;
    struct lb_migrate_result res;
    struct lb_error err = LB_ERROR_INIT;
    struct lb_vm_entry e, there;
    uint64_t nonce = stats_of(boot(&small, &e)).nonce;
    char key[LB_KEY_TEXT_BYTES];

    (void)state;
    o.wish_json = "{\"a\":\"wish\"}";
    knows_wishes = false;
    assert_int_equal(migrate(&e, &o, &res, &err), -1);
    assert_int_equal(err.code, LB_E_PREFLIGHT);
    assert_non_null(strstr(err.message, "protect"));
    check_one("small", &A, &B, nonce);
    knows_wishes = cannot_keep = true;
    last_percent = 0;
    assert_int_equal(migrate(&e, &o, &res, &err), -1);
    check_one("small", &A, &B, nonce);
    cannot_keep = false;
    last_percent = 0;
    snprintf(e.came_by, sizeof(e.came_by), "nonsense");
    lb_key_format(key, B.id.pub);
    lb_came_by_add(e.came_by, key);
    assert_return_code(migrate(&e, &o, &res, &err), 0);
    check_one("small", &B, &A, nonce);
    assert_string_equal(kept_wish, o.wish_json);
    /* and it knows the way it came */
    assert_return_code(lb_vm_entry_load(B.dir, "small", &there, NULL), 0);
    assert_true(lb_came_by_has(there.came_by, key));
    assert_false(lb_came_by_has(there.came_by, "nonsense"));
    lb_key_format(key, A.id.pub);
    assert_string_equal(there.came_by + strlen(there.came_by) - strlen(key), key);
    kept_wish[0] = '\0';
    clean("small");
    boot(&small, &e);
    assert_return_code(migrate(&e, &plain, &res, &err), 0);
    assert_string_equal(kept_wish, "");
    clean("small");
    knows_wishes = false;
}

int main(void)
{
#define T(f) cmocka_unit_test_setup(f, fresh)
    const struct CMUnitTest tests[] = {
        T(test_variants),
        T(test_there_and_back),
        T(test_dry_run),
        T(test_slot_faults),
        T(test_deaths),
        T(test_wire_faults),
        T(test_cancel),
        T(test_wait_go),
        T(test_wish),
        T(test_no_converge),
        T(test_untrusted),
        T(test_recover),
        T(test_lost_answers),
        T(test_cancel_slow_peer),
        T(test_late_writes),
        T(test_token_reuse),
    };
    if (getenv("LB_TEST_ONLY")) /* a pattern, e.g. test_can* */
        cmocka_set_test_filter(getenv("LB_TEST_ONLY"));
    return cmocka_run_group_tests_name("migrate-fake", tests, group_up, group_down);
}
