/* What a trusted host may ask for: each of the four things by who may, and refused for everybody else; whatever else
 * there is in a request is refused or left out. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <string.h>

#include "remus/ask.h"
#include "remus/record.h"

static char dir[64];
static const uint8_t key_a[LB_KEY_BYTES] = {1}, key_b[LB_KEY_BYTES] = {2}, key_c[LB_KEY_BYTES] = {3};

static int setup(void **s)
{
    (void)s;
    strcpy(dir, "/tmp/lb-ask-XXXXXX");
    return mkdtemp(dir) ? 0 : -1;
}

static int teardown(void **s)
{
    (void)s;
    return lb_remove_tree(dir, NULL);
}

/* A VM here in that state, its other side `peer`, that came by hosts with those keys. */
static void have(enum lb_vm_state state, const char *peer, const uint8_t *by1, const uint8_t *by2)
{
    struct lb_vm_entry e = {.name = "web1", .hypervisor = "qemu", .origin = "migrated", .state = state};
    char key[LB_KEY_TEXT_BYTES];

    snprintf(e.peer, sizeof(e.peer), "%s", peer);
    for (int i = 0; i < 2; i++)
        if (i ? by2 : by1) {
            lb_key_format(key, i ? by2 : by1);
            lb_came_by_add(e.came_by, key);
        }
    assert_int_equal(lb_vm_entry_save(dir, &e, NULL), 0);
}

static void wish_for(const char *backup)
{
    struct lb_protect_wish w;

    memset(&w, 0, sizeof(w));
    snprintf(w.opts.witness, sizeof(w.opts.witness), "manual");
    w.opts.interval_ms = 25;
    w.n_backups = 1;
    snprintf(w.backups[0], sizeof(w.backups[0]), "%s", backup);
    assert_int_equal(lb_wish_save(dir, "web1", &w, NULL), 0);
}

static struct lb_asked asked;

/* The code of the refusal; LB_OK: allowed. */
static enum lb_errcode ask(const char *peer, const uint8_t *key, const Lb__RpcRequest *r)
{
    struct lb_error err = LB_ERROR_INIT;
    int rc = lb_ask_allow(dir, peer, key, r, &asked, &err);

    assert_int_equal(rc != 0, err.code != LB_OK);
    assert_true(!rc || err.message[0]);
    return err.code;
}

static enum lb_errcode ask_name(Lb__RpcRequest__KindCase kind, const char *peer, const uint8_t *key, bool force)
{
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;
    Lb__RpcName n = LB__RPC_NAME__INIT;

    n.name = (char *)"web1";
    n.force = force;
    r.kind_case = kind;
    r.failover = &n; /* all of these have an RpcName */
    return ask(peer, key, &r);
}

static enum lb_errcode ask_migrate(const char *peer, const uint8_t *key, const char *host, bool plaintext)
{
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;
    Lb__RpcMigrate m = LB__RPC_MIGRATE__INIT;
    Lb__MigrateOptions o = LB__MIGRATE_OPTIONS__INIT;

    m.name = (char *)"web1";
    m.host = (char *)host;
    m.options = &o;
    o.bandwidth_bytes_per_s = 1000;
    o.insecure_plaintext = plaintext;
    o.wait_go = true;
    o.dry_run = true;
    r.kind_case = LB__RPC_REQUEST__KIND_MIGRATE;
    r.migrate = &m;
    return ask(peer, key, &r);
}

static enum lb_errcode ask_protect(const char *peer, const uint8_t *key, const char *witness, size_t n)
{
    static char *backups[LB_PROTECT_MAX_BACKUPS + 1] = {(char *)"c"};
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;
    Lb__RpcProtect p = LB__RPC_PROTECT__INIT;

    p.name = (char *)"web1";
    p.backups = backups;
    p.n_backups = n;
    p.witness = (char *)witness;
    p.interval_ms = 1;
    p.disk = LB_DISK_NONE;
    r.kind_case = LB__RPC_REQUEST__KIND_PROTECT;
    r.protect = &p;
    return ask(peer, key, &r);
}

static void test_failover(void **s)
{
    (void)s;
    have(LB_VM_STANDBY, "a", key_a, NULL);
    assert_int_equal(ask_name(LB__RPC_REQUEST__KIND_FAILOVER, "a", key_a, false), LB_OK);
    assert_int_equal(asked.r.kind_case, LB__RPC_REQUEST__KIND_FAILOVER);
    assert_string_equal(asked.r.failover->name, "web1");
    assert_false(asked.r.failover->force || asked.already);
    assert_int_equal(ask_name(LB__RPC_REQUEST__KIND_FAILOVER, "a", key_a, true), LB_E_AUTH);
    assert_int_equal(ask_name(LB__RPC_REQUEST__KIND_FAILOVER, "c", key_c, false), LB_E_AUTH);
    /* it has taken over meanwhile: whoever asks again is told so, but only the one it came from last */
    have(LB_VM_RUNNING, "", key_c, key_a);
    assert_int_equal(ask_name(LB__RPC_REQUEST__KIND_FAILOVER, "a", key_a, false), LB_OK);
    assert_true(asked.already);
    assert_int_equal(ask_name(LB__RPC_REQUEST__KIND_FAILOVER, "c", key_c, false), LB_E_AUTH);
    have(LB_VM_INCOMING, "a", NULL, NULL);
    assert_int_equal(ask_name(LB__RPC_REQUEST__KIND_FAILOVER, "a", key_a, false), LB_E_AUTH);
}

static void test_protect(void **s)
{
    (void)s;
    have(LB_VM_PROTECTED, "b", NULL, NULL);
    assert_int_equal(ask_protect("b", key_b, "", 1), LB_OK);
    assert_int_equal(asked.r.kind_case, LB__RPC_REQUEST__KIND_PROTECT);
    assert_true(asked.r.protect->change);
    assert_int_equal(asked.r.protect->n_backups, 1);
    assert_string_equal(asked.r.protect->backups[0], "c");
    assert_int_equal(asked.r.protect->interval_ms, 0); /* the wish's, not the asker's */
    assert_int_equal(asked.r.protect->disk, LB_DISK_REPLICATE);
    assert_int_equal(ask_protect("b", key_b, "fence:/bin/sh", 1), LB_E_AUTH);
    assert_int_equal(ask_protect("b", key_b, "", 0), LB_E_USAGE);
    assert_int_equal(ask_protect("b", key_b, "", LB_PROTECT_MAX_BACKUPS + 1), LB_E_USAGE);
    assert_int_equal(ask_protect("a", key_a, "", 1), LB_E_AUTH);
    wish_for("a");
    assert_int_equal(ask_protect("a", key_a, "", 1), LB_OK);
    assert_int_equal(ask_protect("c", key_c, "", 1), LB_E_AUTH);
    have(LB_VM_RUNNING, "", key_c, key_a);
    assert_int_equal(ask_protect("c", key_c, "", 1), LB_OK);
    have(LB_VM_STANDBY, "a", key_a, NULL);
    assert_int_equal(ask_protect("a", key_a, "", 1), LB_E_AUTH);
}

static void test_migrate(void **s)
{
    (void)s;
    have(LB_VM_RUNNING, "", key_a, key_b);
    assert_int_equal(ask_migrate("a", key_a, "", false), LB_OK);
    assert_int_equal(asked.r.kind_case, LB__RPC_REQUEST__KIND_MIGRATE);
    assert_string_equal(asked.r.migrate->host, "a");
    assert_int_equal(asked.r.migrate->options->bandwidth_bytes_per_s, 1000);
    assert_false(asked.r.migrate->options->wait_go || asked.r.migrate->options->insecure_plaintext);
    assert_int_equal(ask_migrate("a", key_a, "a", false), LB_OK);
    assert_int_equal(ask_migrate("a", key_a, "c", false), LB_E_AUTH);  /* not to a third one */
    assert_int_equal(ask_migrate("a", key_a, "", true), LB_E_AUTH);
    assert_int_equal(ask_migrate("b", key_b, "", false), LB_OK);
    assert_int_equal(ask_migrate("c", key_c, "", false), LB_E_AUTH);
    assert_int_equal(ask_migrate("a", key_c, "", false), LB_E_AUTH);   /* another machine of that name */
    wish_for("c");
    assert_int_equal(ask_migrate("c", key_c, "", false), LB_E_AUTH);   /* a backup is no place where it was */
    have(LB_VM_PROTECTED, "c", key_a, NULL);
    assert_int_equal(ask_migrate("a", key_a, "", false), LB_OK);
    have(LB_VM_STANDBY, "c", key_a, key_c); /* it runs there, here is its standby */
    assert_int_equal(ask_migrate("a", key_a, "", false), LB_E_NOT_FOUND);
    assert_string_equal(asked.moved_on, "c");
    assert_int_equal(ask_migrate("b", key_b, "", false), LB_E_AUTH);
    assert_string_equal(asked.moved_on, "");
    assert_int_equal(ask_migrate("c", key_c, "", false), LB_E_STATE); /* it has it */
    have(LB_VM_SUSPENDED, "", key_a, NULL);
    assert_int_equal(ask_migrate("a", key_a, "", false), LB_E_AUTH);
}

static void test_status(void **s)
{
    (void)s;
    have(LB_VM_STANDBY, "a", NULL, NULL);
    assert_int_equal(ask_name(LB__RPC_REQUEST__KIND_STATUS, "a", key_a, false), LB_OK);
    assert_string_equal(asked.r.status->name, "web1");
    assert_int_equal(ask_name(LB__RPC_REQUEST__KIND_STATUS, "c", key_c, false), LB_E_AUTH);
    have(LB_VM_RUNNING, "", key_c, NULL);
    assert_int_equal(ask_name(LB__RPC_REQUEST__KIND_STATUS, "c", key_c, false), LB_OK);
    assert_int_equal(ask_name(LB__RPC_REQUEST__KIND_STATUS, "a", key_a, false), LB_E_AUTH);
}

/* Nothing else, whoever asks and whatever the VM is. */
static void test_nothing_else(void **s)
{
    (void)s;
    have(LB_VM_RUNNING, "a", key_a, NULL);
    wish_for("a");
    for (int kind = LB__RPC_REQUEST__KIND__NOT_SET; kind < 100; kind++) {
        Lb__RpcRequest r = LB__RPC_REQUEST__INIT;

        if (kind == LB__RPC_REQUEST__KIND_FAILOVER || kind == LB__RPC_REQUEST__KIND_PROTECT ||
            kind == LB__RPC_REQUEST__KIND_MIGRATE || kind == LB__RPC_REQUEST__KIND_STATUS)
            continue;
        r.kind_case = (Lb__RpcRequest__KindCase)kind;
        assert_int_equal(ask("a", key_a, &r), LB_E_AUTH);
    }
}

static void history(const char *direction, const char *host, const char *final)
{
    LB_AUTO_FREE char *path = lb_asprintf("%s/history.jsonl", dir);
    LB_AUTO_FREE char *line = lb_asprintf("{\"vm\":\"web1\",\"host\":\"%s\",\"direction\":\"%s\",\"final_state\":\"%s\"}",
                                          host, direction, final);

    assert_int_equal(lb_file_append_line(path, line, NULL), 0);
}

/* It is not here any more: where it went is told to hosts that had it before. */
static void test_moved_on(void **s)
{
    (void)s;
    assert_int_equal(ask_migrate("a", key_a, "", false), LB_E_NOT_FOUND);
    assert_string_equal(asked.moved_on, "");
    history("in", "a", "running");
    history("out", "c", "running"); /* one that failed */
    assert_int_equal(ask_migrate("a", key_a, "", false), LB_E_NOT_FOUND);
    assert_string_equal(asked.moved_on, "");
    history("out", "c", "moved");
    assert_int_equal(ask_migrate("a", key_a, "", false), LB_E_NOT_FOUND);
    assert_string_equal(asked.moved_on, "c");
    assert_int_equal(ask_migrate("d", key_b, "", false), LB_E_NOT_FOUND);
    assert_string_equal(asked.moved_on, "");
    history("failover", "c", "running");
    history("failed-over", "b", "moved");
    assert_int_equal(ask_migrate("a", key_a, "", false), LB_E_NOT_FOUND);
    assert_string_equal(asked.moved_on, "b");
}

static void test_bad_names(void **s)
{
    (void)s;
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;
    Lb__RpcName n = LB__RPC_NAME__INIT;

    n.name = (char *)"../web1";
    r.kind_case = LB__RPC_REQUEST__KIND_STATUS;
    r.status = &n;
    assert_int_equal(ask("a", key_a, &r), LB_E_PROTO);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_failover, setup, teardown),
        cmocka_unit_test_setup_teardown(test_protect, setup, teardown),
        cmocka_unit_test_setup_teardown(test_migrate, setup, teardown),
        cmocka_unit_test_setup_teardown(test_status, setup, teardown),
        cmocka_unit_test_setup_teardown(test_nothing_else, setup, teardown),
        cmocka_unit_test_setup_teardown(test_moved_on, setup, teardown),
        cmocka_unit_test_setup_teardown(test_bad_names, setup, teardown),
    };
    return cmocka_run_group_tests_name("ask", tests, NULL, NULL);
}
