/* Witnesses without servers: what specs say, keys of VMs, fence commands, a person's word. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

#include "remus/witness.h"

#define ID "00112233445566778899aabbccddeeff"
#define NONCE "ffeeddccbbaa99887766554433221100"

static uint64_t in_ms(unsigned ms)
{
    return lb_now_ns() + ms * UINT64_C(1000000);
}

static struct lb_remus_record record(void)
{
    struct lb_remus_record r;

    memset(&r, 0, sizeof(r));
    snprintf(r.id, sizeof(r.id), ID);
    snprintf(r.nonce, sizeof(r.nonce), NONCE);
    snprintf(r.key, sizeof(r.key), "lifeboat/vm/x");
    return r;
}

static struct lb_witness *witness(const char *spec, enum lb_side side)
{
    struct lb_error err = LB_ERROR_INIT;
    struct lb_witness *w;

    if (lb_witness_open(spec, side, "our key", "host-b", &w, &err))
        fail_msg("%s: %s", spec, err.message);
    return w;
}

static void bad_specs(void **state)
{
    (void)state;
    static const struct { const char *spec; enum lb_errcode code; } bad[] = {
        {"", LB_E_USAGE},
        {"zookeeper:http://10.0.0.1", LB_E_USAGE},
        {"etc:http://10.0.0.1", LB_E_USAGE},
        {"etcdd:http://10.0.0.1", LB_E_USAGE},
        {"etcd", LB_E_USAGE},
        {"etcd:", LB_E_USAGE},
        {"etcd:10.0.0.1:2379", LB_E_USAGE},
        {"etcd:https://10.0.0.1:2379", LB_E_UNSUPPORTED},
        {"etcd:http://", LB_E_USAGE},
        {"etcd:http://:2379", LB_E_USAGE},
        {"etcd:http://10.0.0.1:0", LB_E_USAGE},
        {"etcd:http://10.0.0.1:65536", LB_E_USAGE},
        {"etcd:http://10.0.0.1:x", LB_E_USAGE},
        {"etcd:http://me:secret@10.0.0.1", LB_E_USAGE},
        {"etcd:http://10.0.0.1/v3", LB_E_USAGE},
        {"etcd:http://10.0.0.1?x", LB_E_USAGE},
        {"etcd:http://10.0.0.1,", LB_E_USAGE},
        {"etcd:http://10.0.0.1,ftp://10.0.0.2", LB_E_USAGE},
        {"etcd:http://10.0.0.1, http://10.0.0.2", LB_E_USAGE},
        {"etcd:http://1,http://1,http://1,http://1,http://1,http://1,http://1,http://1,http://1,http://1,"
         "http://1,http://1,http://1,http://1,http://1,http://1,http://1", LB_E_USAGE},
        {"etcd:http://no-such-host.invalid", LB_E_NET},
        {"fence", LB_E_USAGE},
        {"fence:", LB_E_USAGE},
        {"fence:  ", LB_E_USAGE},
        {"manual:x", LB_E_USAGE},
    };

    for (unsigned i = 0; i < LB_ARRAY_LEN(bad); i++) {
        struct lb_error err = LB_ERROR_INIT;
        struct lb_witness *w;

        if (!lb_witness_open(bad[i].spec, LB_SIDE_PRIMARY, "k", "p", &w, &err))
            fail_msg("accepted: %s", bad[i].spec);
        if (err.code != bad[i].code || !err.remedy[0])
            fail_msg("%s: %s: %s (%s)", bad[i].spec, lb_errcode_name(err.code), err.message, err.remedy);
    }
}

static void good_specs(void **state)
{
    (void)state;
    static const struct { const char *spec, *kind; bool automatic; } good[] = {
        {"etcd:http://127.0.0.1", "etcd", true},
        {"etcd:http://127.0.0.1:2379/,http://[::1]:2379,http://localhost:1", "etcd", true},
        {"etcd:http://no-such-host.invalid,http://127.0.0.1:1", "etcd", true},
        {"fence:true", "fence", true},
        {"manual", "manual", false},
        {"manual:", "manual", false},
    };
    int quiet = open("/dev/null", O_WRONLY | O_CLOEXEC);

    lb_log_set_fd(quiet);
    for (unsigned i = 0; i < LB_ARRAY_LEN(good); i++) {
        struct lb_witness *w = witness(good[i].spec, LB_SIDE_BACKUP);

        assert_string_equal(lb_witness_kind(w), good[i].kind);
        assert_int_equal(lb_witness_automatic(w), good[i].automatic);
        lb_witness_close(w);
    }
    lb_log_set_fd(-1);
    close(quiet);
    lb_witness_close(NULL);
}

/* Nobody listens there: every call ends at its deadline and says so. */
static void no_server(void **state)
{
    (void)state;
    struct lb_witness *w = witness("etcd:http://127.0.0.1:1,http://[::1]:1", LB_SIDE_PRIMARY);
    struct lb_remus_record r = record();
    struct lb_error err = LB_ERROR_INIT;
    uint64_t begin = lb_now_ns();
    char why[160];

    assert_int_equal(lb_witness_arm(w, &r, in_ms(50), &err), -1);
    assert_int_equal(err.code, LB_E_NET);
    assert_non_null(strstr(err.message, "http://127.0.0.1:1: no answer"));
    assert_int_equal(r.revision, 0);
    r.revision = 5;
    assert_int_equal(lb_witness_claim(w, &r, in_ms(50), &err), LB_CLAIM_UNREACHABLE);
    assert_int_equal(lb_witness_claim(w, &r, lb_now_ns() - 1, &err), LB_CLAIM_UNREACHABLE);
    assert_int_equal(lb_witness_disarm(w, &r, in_ms(50), &err), -1);
    assert_true(lb_now_ns() - begin >= 150 * UINT64_C(1000000));
    assert_false(lb_witness_healthy(w, why));
    assert_true(why[0]);
    lb_witness_close(w);
}

static void keys(void **state)
{
    (void)state;
    char key[160];

    lb_witness_key(key, "web1", "3f1c7a52-5a0e-4b7e-9f43-1d2f5c0a9b11", ID);
    assert_string_equal(key, "lifeboat/vm/3f1c7a52-5a0e-4b7e-9f43-1d2f5c0a9b11/web1");
    /* a copy of the VM on the same host */
    lb_witness_key(key, "web2", "3f1c7a52-5a0e-4b7e-9f43-1d2f5c0a9b11", ID);
    assert_string_equal(key, "lifeboat/vm/3f1c7a52-5a0e-4b7e-9f43-1d2f5c0a9b11/web2");
    lb_witness_key(key, "web1", "00000000-0000-0000-0000-000000000000", ID);
    assert_string_equal(key, "lifeboat/vm/web1/" ID);
    lb_witness_key(key, "web1", "", ID);
    assert_string_equal(key, "lifeboat/vm/web1/" ID);
    lb_witness_key(key, "web1", NULL, ID);
    assert_string_equal(key, "lifeboat/vm/web1/" ID);
}

static void manual(void **state)
{
    (void)state;
    struct lb_witness *w = witness("manual", LB_SIDE_PRIMARY);
    struct lb_remus_record r = record();
    struct lb_witness_state s;
    char why[160];

    assert_int_equal(lb_witness_claim(w, &r, in_ms(1), NULL), LB_CLAIM_UNREACHABLE); /* not armed */
    assert_int_equal(lb_witness_arm(w, &r, in_ms(1), NULL), 0);
    assert_true(r.revision > 0);
    assert_int_equal(lb_witness_claim(w, &r, in_ms(1), NULL), LB_CLAIM_WON);
    assert_int_equal(lb_witness_read(w, r.key, &s, in_ms(1), NULL), 0);
    assert_false(s.present);
    assert_int_equal(lb_witness_disarm(w, &r, in_ms(1), NULL), 0);
    assert_true(lb_witness_healthy(w, why));
    lb_witness_close(w);
}

static enum lb_claim fence(const char *command, unsigned ms, struct lb_error *err)
{
    LB_AUTO_FREE char *spec = lb_asprintf("fence:%s", command);
    struct lb_witness *w = witness(spec, LB_SIDE_BACKUP);
    struct lb_remus_record r = record();
    enum lb_claim got;

    assert_int_equal(lb_witness_arm(w, &r, in_ms(1), NULL), 0);
    got = lb_witness_claim(w, &r, in_ms(ms), err);
    lb_witness_close(w);
    return got;
}

static void fencing(void **state)
{
    (void)state;
    struct lb_error err = LB_ERROR_INIT;
    char dir[] = "/tmp/lb-fence-XXXXXX";
    size_t len;

    assert_non_null(mkdtemp(dir));
    LB_AUTO_FREE char *script = lb_asprintf("%s/fence", dir);
    LB_AUTO_FREE char *said = lb_asprintf("%s/said", dir);
    LB_AUTO_FREE char *text = lb_asprintf("#!/bin/sh\necho \"$#:$1:$2:$3\" >%s\n", said);
    LB_AUTO_FREE char *command = lb_asprintf("%s --now", script);
    LB_AUTO_FREE char *got = NULL;
    assert_int_equal(lb_file_write_atomic(script, text, strlen(text), 0755, NULL), 0);
    assert_int_equal(fence(command, 10000, &err), LB_CLAIM_WON);
    assert_int_equal(lb_file_read(said, 100, &got, &len, NULL), 0);
    assert_string_equal(got, "3:--now:off:host-b\n");
    lb_remove_tree(dir, NULL);

    assert_int_equal(fence("echo the socket does not answer; exit 7; :", 10000, &err),
                     LB_CLAIM_UNREACHABLE);
    assert_non_null(strstr(err.message, "exit code 7"));
    assert_non_null(strstr(err.message, "the socket does not answer"));
    assert_int_equal(fence("no-such-command-at-all", 10000, &err), LB_CLAIM_UNREACHABLE);
    assert_non_null(strstr(err.message, "exit code 127"));
    assert_int_equal(fence("kill -9 $$;", 10000, &err), LB_CLAIM_UNREACHABLE);
    assert_non_null(strstr(err.message, "signal 9"));
    /* says more than fits into a pipe */
    assert_int_equal(fence("yes | head -c 300000; true", 10000, &err), LB_CLAIM_WON);
    /* a child that lives on keeps nobody waiting */
    uint64_t begin = lb_now_ns();
    assert_int_equal(fence("sleep 5 & true", 4000, &err), LB_CLAIM_WON);
    assert_true(lb_now_ns() - begin < 3000 * UINT64_C(1000000));
}

/* At the deadline the command goes with all that it has started. */
static void fence_in_time(void **state)
{
    (void)state;
    struct lb_error err = LB_ERROR_INIT;
    char dir[] = "/tmp/lb-fence-XXXXXX";
    uint64_t begin = lb_now_ns();
    size_t len;

    assert_non_null(mkdtemp(dir));
    LB_AUTO_FREE char *file = lb_asprintf("%s/pid", dir);
    LB_AUTO_FREE char *command = lb_asprintf("sleep 60 & echo $! >%s; wait;", file);
    LB_AUTO_FREE char *pid = NULL;
    assert_int_equal(fence(command, 300, &err), LB_CLAIM_UNREACHABLE);
    assert_non_null(strstr(err.message, "did not end in time"));
    assert_non_null(strstr(err.message, "host-b"));
    assert_in_range((lb_now_ns() - begin) / 1000000, 300, 3000);
    assert_int_equal(lb_file_read(file, 100, &pid, &len, NULL), 0);
    struct lb_proc_id id = {.pid = (pid_t)strtol(pid, NULL, 10)};
    for (int i = 0; i < 200 && !lb_proc_identify(id.pid, &id, NULL) && lb_proc_alive(&id); i++)
        lb_sleep_ms(5);
    assert_false(!lb_proc_identify(id.pid, &id, NULL) && lb_proc_alive(&id));
    lb_remove_tree(dir, NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bad_specs), cmocka_unit_test(good_specs), cmocka_unit_test(no_server),
        cmocka_unit_test(keys), cmocka_unit_test(manual), cmocka_unit_test(fencing),
        cmocka_unit_test(fence_in_time),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
