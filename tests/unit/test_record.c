/* protect.json and remus.json: what is written is read again, every damage is found, only allowed
 * moves are made, and two writers cannot both go on. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>

#include "core/core.h"
#include "remus/record.h"

static char dir[64];
#define ID "00112233445566778899aabbccddeeff"
#define ID2 "ffeeddccbbaa99887766554433221100"

static int setup(void **s)
{
    (void)s;
    snprintf(dir, sizeof(dir), "/tmp/lb-record-XXXXXX");
    return mkdtemp(dir) ? 0 : -1;
}

static int teardown(void **s)
{
    (void)s;
    return lb_remove_tree(dir, NULL);
}

static void put(const char *file, const char *text)
{
    LB_AUTO_FREE char *folder = lb_asprintf("%s/vms/web1", dir);
    LB_AUTO_FREE char *path = lb_asprintf("%s/%s", folder, file);
    assert_int_equal(lb_mkdir_p(folder, 0700, NULL), 0);
    assert_int_equal(lb_file_write_atomic(path, text, strlen(text), 0600, NULL), 0);
}

static char *get(const char *file)
{
    LB_AUTO_FREE char *path = lb_asprintf("%s/vms/web1/%s", dir, file);
    char *text = NULL;
    size_t len;
    assert_int_equal(lb_file_read(path, 1 << 20, &text, &len, NULL), 0);
    return text;
}

/* A copy of text with the first `from` replaced by `to`. */
static char *with(const char *text, const char *from, const char *to)
{
    const char *at = strstr(text, from);
    if (!at)
        fail_msg("no %s in %s", from, text);
    return lb_asprintf("%.*s%s%s", (int)(at - text), text, to, at + strlen(from));
}

static struct lb_protect_wish a_wish(void)
{
    struct lb_protect_wish w;

    memset(&w, 0, sizeof(w));
    w.opts.interval_ms = 25;
    w.opts.adaptive = true;
    w.opts.disk = LB_DISK_NONE;
    snprintf(w.opts.witness, sizeof(w.opts.witness), "etcd:http://10.0.0.1:2379");
    w.opts.lease_ms = 200;
    w.opts.bandwidth_bytes_per_s = UINT64_C(5) << 30;
    w.opts.delta_cache_bytes = 1 << 20;
    w.opts.channels = 2;
    w.n_backups = 2;
    snprintf(w.backups[0], sizeof(w.backups[0]), "hostB");
    snprintf(w.backups[1], sizeof(w.backups[1]), "hostC");
    w.failovers = 3;
    w.last_failover_ms = UINT64_C(1700000000123);
    w.last_failover_took_ms = 263.25;
    w.unprotected_since_ms = UINT64_C(1700000000456);
    w.last_gap_ms = 1234;
    return w;
}

static void wish_comes_back(void **state)
{
    (void)state;
    struct lb_protect_wish w = a_wish(), r;
    struct lb_error err = LB_ERROR_INIT;

    assert_int_equal(lb_wish_load(dir, "web1", &r, &err), -1);
    assert_int_equal(err.code, LB_E_NOT_FOUND);
    assert_int_equal(lb_wish_save(dir, "web1", &w, &err), 0);
    memset(&r, 0xff, sizeof(r));
    assert_int_equal(lb_wish_load(dir, "web1", &r, &err), 0);
    assert_memory_equal(&w, &r, sizeof(w));
    w.opts.interval_ms = 50;
    w.n_backups = 0;
    memset(w.backups, 0, sizeof(w.backups));
    assert_int_equal(lb_wish_save(dir, "web1", &w, &err), 0);
    assert_int_equal(lb_wish_load(dir, "web1", &r, &err), 0);
    assert_memory_equal(&w, &r, sizeof(w));
    assert_int_equal(lb_wish_remove(dir, "web1", &err), 0);
    assert_int_equal(lb_wish_remove(dir, "web1", &err), 0);
    assert_int_equal(lb_wish_load(dir, "web1", &r, &err), -1);
    assert_int_equal(err.code, LB_E_NOT_FOUND);
    assert_int_equal(lb_wish_save(dir, "../x", &w, &err), -1);
    assert_int_equal(err.code, LB_E_USAGE);
}

static void wish_of_a_peer(void **state)
{
    (void)state;
    static const char *const changes[][2] = {
        {"\"interval_ms\": 25", "\"interval_ms\": 1001"},
        {"\"interval_ms\": 25", "\"interval_ms\": -1"},
        {"\"interval_ms\": 25", "\"interval_ms\": \"25\""},
        {"\"adaptive\": true", "\"adaptive\": 1"},
        {"\"disk\": \"none\"", "\"disk\": \"some\""},
        {"\"witness\": \"etcd:http://10.0.0.1:2379\"", "\"witness\": \"\""},
        {"\"witness\": \"etcd", "\"witness\": \"a\\u0000etcd"},
        {"\"lease_ms\": 200", "\"lease_ms\": 49"},
        {"\"lease_ms\": 200", "\"lease_ms\": 60001"},
        {"\"channels\": 2", "\"channels\": 65"},
        {"\"hostB\"", "\"\""},
        {"\"hostB\"", "17"},
        {"\"backups\": [", "\"backups\": ["
            "\"a\",\"b\",\"c\",\"d\",\"e\",\"f\",\"g\",\"h\",\"i\",\"j\",\"k\",\"l\",\"m\",\"n\",\"o\","},
        {"\"failovers\": 3", "\"failovers\": 3, \"failovers\": 4"},
        {"\"last_failover_took_ms\": 263.25", "\"last_failover_took_ms\": -1"},
        {"\"unprotected_since_ms\": 1700000000456", "\"unprotected_since_ms\": -1"},
        {"\"last_gap_ms\": 1234", "\"last_gap_ms\": \"long\""},
        {"{", ""},
    };
    struct lb_protect_wish w = a_wish(), r;
    LB_AUTO_FREE char *good = lb_wish_json(&w);

    assert_int_equal(lb_wish_parse(good, &r, NULL), 0);
    for (unsigned i = 0; i < LB_ARRAY_LEN(changes); i++) {
        LB_AUTO_FREE char *bad = with(good, changes[i][0], changes[i][1]);
        struct lb_error err = LB_ERROR_INIT;

        if (!lb_wish_parse(bad, &r, &err))
            fail_msg("accepted: %s", bad);
        assert_int_equal(err.code, LB_E_PROTO);
    }
    /* what a newer one adds is ignored */
    LB_AUTO_FREE char *newer = with(good, "{", "{\"colour\": \"red\",");
    assert_int_equal(lb_wish_parse(newer, &r, NULL), 0);
    /* what an older one does not know is not there */
    LB_AUTO_FREE char *cut = with(good, "\"last_gap_ms\"", "\"x\"");
    LB_AUTO_FREE char *older = with(cut, "\"unprotected_since_ms\"", "\"y\"");
    assert_int_equal(lb_wish_parse(older, &r, NULL), 0);
    assert_true(!r.last_gap_ms && !r.unprotected_since_ms);
    put("protect.json", "{}");
    struct lb_error err = LB_ERROR_INIT;
    assert_int_equal(lb_wish_load(dir, "web1", &r, &err), -1);
    assert_int_equal(err.code, LB_E_STATE);
    assert_non_null(strstr(err.message, "protect.json"));
}

static struct lb_remus_record a_record(void)
{
    struct lb_remus_record r;

    memset(&r, 0, sizeof(r));
    snprintf(r.id, sizeof(r.id), ID);
    snprintf(r.peer, sizeof(r.peer), "hostB");
    snprintf(r.peer_key, sizeof(r.peer_key), "key of B");
    snprintf(r.witness, sizeof(r.witness), "etcd:http://10.0.0.1:2379");
    snprintf(r.key, sizeof(r.key), "lifeboat/vm/x");
    return r;
}

/* The shortest way from nothing to each phase. */
static const enum lb_phase way[][4] = {
    [LB_PH_ARMING] = {LB_PH_ARMING},
    [LB_PH_PROTECTED] = {LB_PH_ARMING, LB_PH_PROTECTED},
    [LB_PH_ALONE] = {LB_PH_ARMING, LB_PH_PROTECTED, LB_PH_ALONE},
    [LB_PH_YIELDED] = {LB_PH_ARMING, LB_PH_PROTECTED, LB_PH_YIELDED},
    [LB_PH_FENCED] = {LB_PH_ARMING, LB_PH_PROTECTED, LB_PH_FENCED},
    [LB_PH_RECEIVING] = {LB_PH_RECEIVING},
    [LB_PH_STANDBY] = {LB_PH_RECEIVING, LB_PH_STANDBY},
    [LB_PH_PROMOTING] = {LB_PH_RECEIVING, LB_PH_STANDBY, LB_PH_PROMOTING},
    [LB_PH_PROMOTED] = {LB_PH_RECEIVING, LB_PH_STANDBY, LB_PH_PROMOTING, LB_PH_PROMOTED},
};
/* What may follow each phase, itself included, as record.h has it. */
static const char *const after[] = {
    [LB_PH_NONE] = "arming receiving",
    [LB_PH_ARMING] = "arming protected alone fenced",
    [LB_PH_PROTECTED] = "protected alone yielded fenced",
    [LB_PH_ALONE] = "alone",
    [LB_PH_YIELDED] = "yielded alone fenced",
    [LB_PH_FENCED] = "fenced",
    [LB_PH_RECEIVING] = "receiving standby",
    [LB_PH_STANDBY] = "standby promoting",
    [LB_PH_PROMOTING] = "promoting promoted",
    [LB_PH_PROMOTED] = "promoted",
};

static struct lb_remus_record at(enum lb_phase p)
{
    struct lb_remus_record r = a_record();

    assert_int_equal(lb_record_remove(dir, "web1", NULL), 0);
    for (unsigned i = 0; i < 4 && r.phase != p; i++)
        assert_int_equal(lb_record_move(dir, "web1", &r, way[p][i], NULL), 0);
    assert_int_equal(r.phase, p);
    return r;
}

static void record_comes_back(void **state)
{
    (void)state;
    struct lb_remus_record r, got;
    uint64_t before = lb_wall_ms();

    assert_int_equal(lb_record_load(dir, "web1", &got, NULL), 0);
    assert_int_equal(got.phase, LB_PH_NONE);
    r = at(LB_PH_PROTECTED);
    r.revision = UINT64_C(1) << 60;
    snprintf(r.nonce, sizeof(r.nonce), ID2);
    snprintf(r.detail, sizeof(r.detail), "a \"reason\" \xff of a peer");
    assert_int_equal(lb_record_move(dir, "web1", &r, LB_PH_PROTECTED, NULL), 0);
    assert_int_equal(lb_record_load(dir, "web1", &got, NULL), 0);
    assert_string_equal(got.detail, "a \"reason\" ? of a peer");
    assert_in_range(got.changed_ms, before, lb_wall_ms());
    snprintf(r.detail, sizeof(r.detail), "%s", got.detail);
    memset(r.detail + strlen(r.detail), 0, sizeof(r.detail) - strlen(r.detail));
    assert_memory_equal(&got, &r, sizeof(r));
}

/* One process a move: an illegal one ends it. */
static bool survives(enum lb_phase from, enum lb_phase to)
{
    struct lb_remus_record r = at(from);
    int status;
    pid_t pid = fork();

    assert_true(pid >= 0);
    if (pid == 0) {
        int null = open("/dev/null", O_WRONLY);
        dup2(null, STDERR_FILENO);
        signal(SIGABRT, SIG_DFL);
        _exit(lb_record_move(dir, "web1", &r, to, NULL) ? 1 : 0);
    }
    assert_int_equal(waitpid(pid, &status, 0), pid);
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

static void only_allowed_moves(void **state)
{
    (void)state;

    for (unsigned from = LB_PH_NONE; from <= LB_PH_PROMOTED; from++)
        for (unsigned to = LB_PH_NONE; to <= LB_PH_PROMOTED; to++) {
            LB_AUTO_FREE char *list = lb_asprintf(" %s ", after[from]);
            LB_AUTO_FREE char *word = lb_asprintf(" %s ", lb_phase_name((enum lb_phase)to));
            bool want = strstr(list, word) != NULL;

            if (survives((enum lb_phase)from, (enum lb_phase)to) != want)
                fail_msg("%s -> %s should be %s", lb_phase_name((enum lb_phase)from),
                         lb_phase_name((enum lb_phase)to), want ? "allowed" : "an error");
        }
}

static void two_writers(void **state)
{
    (void)state;
    struct lb_remus_record first = at(LB_PH_PROTECTED), second = first, fresh = a_record(), got;
    struct lb_error err = LB_ERROR_INIT;

    assert_int_equal(lb_record_move(dir, "web1", &first, LB_PH_ALONE, &err), 0);
    assert_int_equal(lb_record_move(dir, "web1", &second, LB_PH_FENCED, &err), -1);
    assert_int_equal(err.code, LB_E_STATE);
    assert_int_equal(second.phase, LB_PH_PROTECTED);
    /* a new protection does not run over one that was not recovered */
    snprintf(fresh.id, sizeof(fresh.id), ID2);
    assert_int_equal(lb_record_move(dir, "web1", &fresh, LB_PH_ARMING, &err), -1);
    assert_int_equal(err.code, LB_E_STATE);
    snprintf(first.id, sizeof(first.id), ID2);
    assert_int_equal(lb_record_move(dir, "web1", &first, LB_PH_ALONE, &err), -1);
    assert_int_equal(lb_record_load(dir, "web1", &got, NULL), 0);
    assert_int_equal(got.phase, LB_PH_ALONE);
    assert_string_equal(got.id, ID);
}

static void damage_is_found(void **state)
{
    (void)state;
    static const char *const changes[][2] = {
        {ID, "0011"},
        {"\"protected\"", "\"none\""},
        {"\"protected\"", "\"lost\""},
        {"\"revision\": 0", "\"revision\": -1"},
        {"\"peer\"", "\"pear\""},
        {"\"nonce\": \"\"", "\"nonce\": \"" ID ID "\""},
        {"\"changed_ms\"", "\"changed\""},
        {"\"witness\"", "\"key\": 1, \"witness\""},
        {"{", ""},
        {"{", "[{"},
    };
    struct lb_remus_record r = at(LB_PH_PROTECTED);
    LB_AUTO_FREE char *good = get("remus.json");

    for (unsigned i = 0; i < LB_ARRAY_LEN(changes); i++) {
        LB_AUTO_FREE char *bad = with(good, changes[i][0], changes[i][1]);
        struct lb_error err = LB_ERROR_INIT;

        put("remus.json", bad);
        if (!lb_record_load(dir, "web1", &r, &err))
            fail_msg("accepted: %s", bad);
        assert_int_equal(err.code, LB_E_STATE);
        assert_true(err.remedy[0]);
        assert_int_equal(lb_record_move(dir, "web1", &r, LB_PH_ALONE, NULL), -1);
    }
    /* every cut of it */
    for (size_t len = 0; len < strlen(good); len += 7) {
        LB_AUTO_FREE char *bad = lb_asprintf("%.*s", (int)len, good);
        put("remus.json", bad);
        assert_int_equal(lb_record_load(dir, "web1", &r, NULL), -1);
    }
    put("remus.json", good);
    assert_int_equal(lb_record_load(dir, "web1", &r, NULL), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(wish_comes_back, setup, teardown),
        cmocka_unit_test_setup_teardown(wish_of_a_peer, setup, teardown),
        cmocka_unit_test_setup_teardown(record_comes_back, setup, teardown),
        cmocka_unit_test_setup_teardown(only_allowed_moves, setup, teardown),
        cmocka_unit_test_setup_teardown(two_writers, setup, teardown),
        cmocka_unit_test_setup_teardown(damage_is_found, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
