/* The plan of an evacuation from real things: QEMUs that dirty their memory, a second lifeboatd that is asked for its capacity and
 * for what it refuses, a measured link; then the directory of hosts in a real etcd. The session of role "plan" is run as
 * lifeboatd runs it, with the test in lifeboatd's place. Runs in a network namespace of its own; needs root. */
#include "etcd_util.h"
#include "qemu_util.h"

#include <sys/mman.h>
#include <sys/un.h>

#include "core/registry.h"
#include "migrate/capacity.h"
#include "netproto/rpc.pb-c.h"
#include "remus/directory.h"

#define N_VMS 6u
#define RAM_MIB 16u

struct host {
    char dir[64], conf[96], sock[96];
    struct lb_identity id;
    uint16_t port;
    pid_t daemon;
};
static struct host A, B;
static struct qemu vms[N_VMS];
static struct etcd_cluster cluster;

static void host_up(struct host *h, uint16_t port)
{
    memset(h, 0, sizeof(*h));
    strcpy(h->dir, "/tmp/lb-plan-XXXXXX");
    assert_non_null(mkdtemp(h->dir));
    snprintf(h->conf, sizeof(h->conf), "%s/conf", h->dir);
    snprintf(h->sock, sizeof(h->sock), "%s/rpc.sock", h->dir);
    h->port = port;
    OK(lb_identity_load(h->dir, &h->id, err));
}

static void configure(struct host *h, const char *text)
{
    OK(lb_file_write_atomic(h->conf, text, strlen(text), 0600, err));
}

static void trust(struct host *h, const char *name, const struct host *other, uint16_t port)
{
    struct lb_host t = {0};

    snprintf(t.name, sizeof(t.name), "%s", name);
    snprintf(t.address, sizeof(t.address), "127.0.0.1:%u", port);
    memcpy(t.pub, other->id.pub, sizeof(t.pub));
    OK(lb_hosts_trust(h->dir, &t, err));
}

static char *program(void)
{
    const char *build = getenv("LB_BUILD");

    return lb_asprintf("%s/lifeboatd", build ? build : "build");
}

static void start_daemon(struct host *h)
{
    LB_AUTO_FREE char *bin = program(), *listen = lb_asprintf("127.0.0.1:%u", h->port), *log = lb_asprintf("%s/daemon.log", h->dir);

    h->daemon = fork();
    assert_true(h->daemon >= 0);
    if (!h->daemon) {
        int out = open(log, O_WRONLY | O_CREAT | O_APPEND, 0600);

        prctl(PR_SET_PDEATHSIG, SIGKILL);
        dup2(out, 1);
        dup2(out, 2);
        execl(bin, bin, "--state-dir", h->dir, "--socket", h->sock, "--listen", listen, "--config", h->conf, (char *)NULL);
        _exit(127);
    }
    for (int i = 0; i < 500 && access(h->sock, F_OK); i++)
        lb_sleep_ms(10);
    assert_int_equal(access(h->sock, F_OK), 0);
}

static void host_down(struct host *h)
{
    if (h->daemon > 0) {
        kill(h->daemon, SIGKILL);
        waitpid(h->daemon, NULL, 0);
    }
    lb_remove_tree(h->dir, NULL);
}

static void enter(struct host *h, struct qemu *q, const char *name, enum lb_vm_state state)
{
    struct lb_vm_entry e = {.state = state};
    LB_AUTO_FREE char *dir = lb_vm_dir(h->dir, name, true);

    snprintf(e.name, sizeof(e.name), "%s", name);
    snprintf(e.hypervisor, sizeof(e.hypervisor), "qemu");
    snprintf(e.origin, sizeof(e.origin), "adopted");
    snprintf(e.qmp_path, sizeof(e.qmp_path), "%s", q->qmp);
    OK(lb_proc_identify(q->pid, &e.proc, err));
    OK(lb_vm_entry_save(h->dir, &e, err));
}

static void start_vm(struct qemu *q, const char *name)
{
    struct lb_hv_vm *vm;
    char args[200];

    qemu_dir(q);
    snprintf(args, sizeof(args), "-accel tcg,tb-size=4 -m %u -nodefaults -display none -drive file=@D/disk.raw,format=raw,if=ide",
             RAM_MIB);
    qemu_start(q, args);
    vm = qemu_attach(q);
    wait_guest(vm);
    lb_hv_detach(vm);
    enter(&A, q, name, LB_VM_RUNNING);
}

/* ------------------------------------------------------------------------- a session */

static void become_plan(int start)
{
    LB_AUTO_FREE char *bin = program();

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    dup2(start, 3);
    close_range(4, ~0u, 0);
    execl(bin, "lifeboatd", "--session", "plan", (char *)NULL);
    _exit(127);
}

static pid_t spawn_plan(const Lb__RpcEvacuate *r)
{
    static uint8_t id[LB_SESSION_ID_BYTES] = {7};
    Lb__SessionStart m = LB__SESSION_START__INIT;
    Lb__RpcRequest q = LB__RPC_REQUEST__INIT;
    uint8_t buf[4096];
    int fd = memfd_create("start", MFD_CLOEXEC);
    pid_t pid;

    q.kind_case = LB__RPC_REQUEST__KIND_EVACUATE;
    q.evacuate = (Lb__RpcEvacuate *)r;
    m.role = (char *)"plan";
    m.session_id = (ProtobufCBinaryData){sizeof(id), id};
    m.state_dir = A.dir;
    m.config_path = A.conf;
    m.log_level = LB_LOG_INFO;
    m.request = &q;
    assert_true(lb__session_start__get_packed_size(&m) <= sizeof(buf));
    OK(lb_write_all(fd, buf, lb__session_start__pack(&m, buf), err));
    lseek(fd, 0, SEEK_SET);
    pid = fork();
    assert_true(pid >= 0);
    if (!pid)
        become_plan(fd);
    close(fd);
    return pid;
}

static int listen_at(const char *path)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    snprintf(a.sun_path, sizeof(a.sun_path), "%s", path);
    unlink(path);
    assert_return_code(bind(fd, (struct sockaddr *)&a, sizeof(a)), errno);
    assert_return_code(listen(fd, 4), errno);
    return fd;
}

static Lb__SessionEvent *next_event(int conn)
{
    uint64_t until = lb_now_ns() + UINT64_C(60000000000);
    LB_AUTO_FREE uint8_t *body = NULL;
    Lb__SessionEvent *e;
    uint32_t len;

    OK(lb_read_all_until(conn, &len, sizeof(len), until, -1, err)); /* little-endian, as this processor */
    body = lb_alloc(len + 1);
    OK(lb_read_all_until(conn, body, len, until, -1, err));
    e = lb__session_event__unpack(NULL, len, body);
    assert_non_null(e);
    return e;
}

/* The session's result, or its failure as {"code", "message", "remedy"}; *notes: how many it said. */
static json_t *plan_with(const Lb__RpcEvacuate *r, unsigned *notes)
{
    LB_AUTO_FREE char *path = lb_asprintf("%s/sessions.sock", A.dir), *logs = lb_asprintf("%s/log", A.dir);
    int listener, conn;
    json_t *out = NULL;
    pid_t pid;

    OK(lb_mkdir_p(logs, 0700, err));
    listener = listen_at(path);
    pid = spawn_plan(r);
    conn = accept(listener, NULL, NULL);
    assert_true(conn >= 0);
    while (!out) {
        Lb__SessionEvent *e = next_event(conn);

        if (e->kind_case == LB__SESSION_EVENT__KIND_EVENT_JSON && notes)
            ++*notes;
        else if (e->kind_case == LB__SESSION_EVENT__KIND_RESULT_JSON)
            out = json_loads(e->result_json, 0, NULL);
        else if (e->kind_case == LB__SESSION_EVENT__KIND_FAILURE)
            out = json_pack("{s:i, s:s, s:s}", "code", (int)e->failure->code, "message", e->failure->message, "remedy",
                            e->failure->remedy);
        lb__session_event__free_unpacked(e, NULL);
    }
    close(conn);
    close(listener);
    assert_int_equal(waitpid(pid, NULL, 0), pid);
    return out;
}

static json_t *named(json_t *list, const char *key, const char *name)
{
    json_t *o;
    size_t i;

    json_array_foreach (list, i, o)
        if (!strcmp(json_string_value(json_object_get(o, key)), name))
            return o;
    return NULL;
}

static json_t *plan_of(json_t *result)
{
    json_t *plan = json_object_get(result, "plan");

    if (!plan)
        fail_msg("%s", json_string_value(json_object_get(result, "message")));
    assert_string_equal(json_string_value(json_object_get(plan, "event")), "plan");
    return plan;
}

static double num(const json_t *o, const char *key)
{
    assert_true(json_is_number(json_object_get(o, key)));
    return json_number_value(json_object_get(o, key));
}

static bool says(const json_t *o, const char *key, const char *what)
{
    const char *text = json_string_value(json_object_get(o, key));

    return text && strstr(text, what);
}

/* ------------------------------------------------------------------------------ tests */

static int two_hosts(void **state)
{
    (void)state;
    host_up(&A, 7101);
    host_up(&B, 7102);
    configure(&A, "name = a\napart = pair: v0, v1\nvm-priority = v3: 5\nmemory-reserve = 16M\n");
    configure(&B, "name = b\ntag = ssd\nmemory-reserve = 16M\n");
    trust(&A, "bee", &B, B.port);
    trust(&B, "ay", &A, A.port);
    start_daemon(&B);
    for (unsigned i = 0; i < N_VMS; i++) {
        char name[8];

        snprintf(name, sizeof(name), "v%u", i);
        start_vm(&vms[i], name);
    }
    return 0;
}

static int no_hosts(void **state)
{
    (void)state;
    for (unsigned i = 0; i < N_VMS; i++)
        qemu_end(&vms[i]);
    host_down(&A);
    host_down(&B);
    return 0;
}

static void plans_what_is_there(void **state)
{
    Lb__RpcEvacuate r = LB__RPC_EVACUATE__INIT;
    unsigned notes = 0;
    json_t *result = plan_with(&r, &notes), *plan = plan_of(result), *hosts, *steps, *b, *v;
    LB_AUTO_FREE char *links = lb_asprintf("%s/links.json", A.dir);
    size_t i;

    (void)state;
    hosts = json_object_get(plan, "hosts");
    steps = json_object_get(plan, "steps");
    assert_true(notes > 0);
    assert_string_equal(json_string_value(json_object_get(plan, "host")), "a");
    assert_int_equal(json_array_size(hosts), 2);
    b = named(hosts, "name", "bee"); /* by the name that it has here */
    assert_non_null(b);
    assert_string_equal(json_string_value(json_object_get(b, "error")), "");
    assert_true(num(b, "link_bytes_per_s") > 1e5);
    assert_int_equal(access(links, F_OK), 0);
    /* v0 and v1 are never on one host: only one of them finds a place */
    assert_int_equal(json_array_size(steps), N_VMS - 1);
    assert_int_equal(json_array_size(json_object_get(plan, "stays")), 1);
    json_array_foreach (steps, i, v) {
        assert_string_equal(json_string_value(json_object_get(v, "to")), "bee");
        assert_true(num(v, "memory_bytes") == (double)lb_preflight_need_bytes(UINT64_C(1048576) * RAM_MIB));
        /* 32 pages, again and again, in a window of 0.4 s and a little more */
        assert_true(num(v, "dirty_bytes_per_s") > 32 * 4096 && num(v, "dirty_bytes_per_s") < 100 * 4096 / 0.4);
        assert_true(num(v, "bytes") > 32 * 4096 && num(v, "bytes") < 8e6);
        assert_true(json_is_false(json_object_get(v, "protected")));
    }
    assert_true(json_is_object(json_object_get(result, "inventory")));
    assert_true(num(named(json_object_get(json_object_get(result, "inventory"), "vms"), "name", "v3"), "priority") == 5);
    json_decref(result);
}

/* What this host knows from its own files and processes, and what it counts twice or not. */
static void counts_memory_honestly(void **state)
{
    struct lb_host_config cfg;
    struct lb_error e = LB_ERROR_INIT;
    json_t *f, *host, *again;

    (void)state;
    OK(lb_config_load(A.conf, &cfg, err));
    f = lb_capacity_fragment(A.dir, &cfg, A.id.pub, &e);
    assert_non_null(f);
    host = json_object_get(f, "host");
    assert_int_equal(json_array_size(json_object_get(f, "vms")), N_VMS);
    assert_true(num(host, "memory_bytes") > num(host, "used_bytes"));
    assert_true(num(host, "reserved_bytes") == 16 << 20);
    /* A VM that is a standby is memory kept, not a VM; its process is not "something else" all the same. */
    enter(&A, &vms[5], "v5", LB_VM_STANDBY);
    again = lb_capacity_fragment(A.dir, &cfg, A.id.pub, &e);
    enter(&A, &vms[5], "v5", LB_VM_RUNNING);
    assert_int_equal(json_array_size(json_object_get(again, "vms")), N_VMS - 1);
    assert_int_equal(json_array_size(json_object_get(again, "kept")), 1);
    assert_true(num(json_array_get(json_object_get(again, "kept"), 0), "memory_bytes") >= (128 << 20) + (RAM_MIB << 20));
    json_decref(f);
    json_decref(again);
    lb_config_free(&cfg);
}

/* A session works on v0; v1 is paused; v2's disk cannot be reached from the other host. */
static void says_what_hinders(void **state)
{
    Lb__RpcEvacuate r = LB__RPC_EVACUATE__INIT;
    LB_AUTO_FREE char *conf = lb_asprintf("name = b\npath = %s -> /nonexistent\n", vms[2].dir);
    struct lb_hv_vm *vm = qemu_attach(&vms[1]);
    json_t *result, *stays, *v0;
    int lock = lb_vm_lock(A.dir, "v0", NULL);

    (void)state;
    assert_true(lock >= 0);
    configure(&B, conf); /* read anew by every session */
    OK(lb_hv_stop(vm, err));
    lb_hv_detach(vm);
    result = plan_with(&r, NULL);
    close(lock);
    stays = json_object_get(plan_of(result), "stays");
    assert_true(says(named(stays, "vm", "v1"), "reason", "paused"));
    assert_true(says(named(stays, "vm", "v2"), "reason", "host bee does not take it: disk /nonexistent"));
    assert_true(says(named(stays, "vm", "v2"), "remedy", "/nonexistent"));
    v0 = named(json_object_get(plan_of(result), "steps"), "vm", "v0"); /* with what was known of it */
    assert_non_null(v0);
    assert_true(num(v0, "dirty_bytes_per_s") > 32 * 4096);
    json_decref(result);
    vm = qemu_attach(&vms[1]);
    OK(lb_hv_cont(vm, err));
    lb_hv_detach(vm);
    configure(&B, "name = b\ntag = ssd\nmemory-reserve = 16M\n");
}

static void excludes_and_limits(void **state)
{
    char *excluded[] = {(char *)"v4\tbee"}, *to[] = {(char *)"bee"};
    Lb__RpcEvacuate r = LB__RPC_EVACUATE__INIT;
    json_t *result, *plan;

    (void)state;
    r.excluded = excluded;
    r.n_excluded = 1;
    r.to = to;
    r.n_to = 1;
    r.bandwidth_bytes_per_s = 100000;
    r.parallel = 2;
    result = plan_with(&r, NULL);
    plan = plan_of(result);
    assert_true(says(named(json_object_get(plan, "stays"), "vm", "v4"), "reason", "its move there has failed"));
    assert_true(num(named(json_object_get(plan, "hosts"), "name", "bee"), "link_bytes_per_s") == 100000);
    assert_true(num(plan, "parallel") == 2);
    json_decref(result);
    to[0] = (char *)"nobody";
    result = plan_with(&r, NULL);
    assert_true(num(result, "code") == LB_E_NOT_FOUND);
    json_decref(result);
}

/* Its own configuration comes before what is measured. */
static void a_link_that_is_configured(void **state)
{
    Lb__RpcEvacuate r = LB__RPC_EVACUATE__INIT;
    json_t *result;

    (void)state;
    configure(&B, "name = b\nlink = 40Mbit\n");
    result = plan_with(&r, NULL);
    assert_true(num(named(json_object_get(plan_of(result), "hosts"), "name", "bee"), "link_bytes_per_s") == 5000000);
    json_decref(result);
    configure(&B, "name = b\n");
}

/* In maintenance it takes nothing, and is not measured either; silent, it is in the plan with its error. */
static void hosts_that_take_nothing(void **state)
{
    LB_AUTO_FREE char *path = lb_asprintf("%s/maintenance.json", B.dir), *links = lb_asprintf("%s/links.json", A.dir);
    static const char on[] = "{\"on\":true,\"since_ms\":1,\"reason\":\"\",\"left\":[]}";
    Lb__RpcEvacuate r = LB__RPC_EVACUATE__INIT;
    json_t *result, *bee;

    (void)state;
    unlink(links);
    OK(lb_file_write_atomic(path, on, strlen(on), 0600, err));
    result = plan_with(&r, NULL);
    bee = named(json_object_get(plan_of(result), "hosts"), "name", "bee");
    assert_true(json_is_true(json_object_get(bee, "maintenance")));
    assert_int_equal(json_array_size(json_object_get(plan_of(result), "steps")), 0);
    assert_int_equal(json_array_size(json_object_get(plan_of(result), "stays")), N_VMS);
    assert_int_not_equal(access(links, F_OK), 0);
    json_decref(result);
    unlink(path);

    kill(B.daemon, SIGSTOP);
    result = plan_with(&r, NULL);
    kill(B.daemon, SIGCONT);
    bee = named(json_object_get(plan_of(result), "hosts"), "name", "bee");
    assert_true(json_string_length(json_object_get(bee, "error")) > 0 && json_string_length(json_object_get(bee, "remedy")) > 0);
    assert_int_equal(json_array_size(json_object_get(plan_of(result), "stays")), N_VMS);
    json_decref(result);
}

/* --------------------------------------------------------------------------- directory */

static int etcd_up(void **state)
{
    (void)state;
    host_up(&A, 7101);
    host_up(&B, 7102);
    etcd_open_cluster(&cluster, 1);
    return 0;
}

static int etcd_down(void **state)
{
    (void)state;
    etcd_close_cluster(&cluster);
    host_down(&A);
    host_down(&B);
    return 0;
}

static const struct lb_directory_host *listed(const struct lb_directory_host *v, unsigned n, const char *name)
{
    for (unsigned i = 0; i < n; i++)
        if (!strcmp(v[i].host.name, name))
            return &v[i];
    return NULL;
}

static uint64_t soon(void)
{
    return lb_now_ns() + UINT64_C(10000000000);
}

static void read_directory(struct lb_directory_host **v, unsigned *n)
{
    LB_AUTO_FREE char *spec = etcd_spec(1);

    OK(lb_directory_read(spec, soon(), v, n, err));
}

static json_t *made_up(const char *name, unsigned number)
{
    uint8_t pub[LB_KEY_BYTES] = {(uint8_t)number, (uint8_t)(number >> 8), 5};
    char key[LB_KEY_TEXT_BYTES];

    lb_key_format(key, pub);
    return json_pack("{s:s, s:{s:s, s:I, s:[s], s:b}, s:[]}", "key", key, "host", "name", name, "memory_bytes", (json_int_t)(1 << 30),
                     "features", "CPUID.1.0.ECX:0x1", "maintenance", 1, "vms");
}

static void many_hosts(void **state)
{
    LB_AUTO_FREE char *spec = etcd_spec(1);
    LB_AUTO_FREE struct lb_directory_host *v = NULL;
    char address[280];
    unsigned n;

    (void)state;
    OK(lb_directory_address(spec, ":7009", address, err));
    assert_string_equal(address, "127.0.0.1:7009");
    OK(lb_directory_address(spec, "10.1.2.3:7009", address, err));
    assert_string_equal(address, "10.1.2.3:7009");
    assert_int_equal(lb_directory_address(spec, "none", address, NULL), -1);
    for (unsigned i = 0; i < 130; i++) { /* more than two pages */
        char name[16];
        json_t *f;

        snprintf(name, sizeof(name), "h%u", i);
        f = made_up(name, i);
        OK(lb_directory_publish(spec, address, f, soon(), err));
        OK(i ? 0 : lb_directory_publish(spec, address, f, soon(), err)); /* again: the same key */
        json_decref(f);
    }
    json_t *evil = made_up("x; rm -rf $HOME", 999);
    OK(lb_directory_publish(spec, address, evil, soon(), err));
    json_decref(evil);
    read_directory(&v, &n);
    assert_int_equal(n, 130); /* a name that is no name is left out */
    assert_non_null(listed(v, n, "h129"));
    assert_true(listed(v, n, "h7")->memory_bytes == 1 << 30 && listed(v, n, "h7")->maintenance);
    assert_string_equal(listed(v, n, "h7")->host.address, "10.1.2.3:7009");
}

/* A daemon publishes itself; one that is told of nobody sees it with the command that would trust it; one that trusts its key,
 * and has an address where nobody is, finds it. Dead, it is forgotten. */
static void a_host_finds_another(void **state)
{
    LB_AUTO_FREE char *spec = etcd_spec(1), *conf_a = lb_asprintf("name = a\ndirectory = %s\n", spec);
    LB_AUTO_FREE char *conf_b = lb_asprintf("name = b\nwitness = %s\n", spec); /* the witness is the directory, too */
    Lb__RpcEvacuate r = LB__RPC_EVACUATE__INIT;
    struct lb_directory_host *v = NULL;
    char key[LB_KEY_TEXT_BYTES];
    json_t *result, *b;
    unsigned n = 0;

    (void)state;
    configure(&A, conf_a);
    configure(&B, conf_b);
    start_daemon(&B);
    for (int i = 0; i < 100 && !listed(v, n, "b"); i++) {
        free(v);
        lb_sleep_ms(50);
        read_directory(&v, &n);
    }
    assert_non_null(listed(v, n, "b"));
    assert_string_equal(listed(v, n, "b")->host.address, "127.0.0.1:7102");
    assert_memory_equal(listed(v, n, "b")->host.pub, B.id.pub, LB_KEY_BYTES);
    assert_true(listed(v, n, "b")->memory_bytes > 1 << 20);
    free(v);

    lb_key_format(key, B.id.pub);
    LB_AUTO_FREE char *remedy = lb_asprintf("lifeboat host trust b 127.0.0.1:7102 %s", key);
    result = plan_with(&r, NULL);
    b = named(json_object_get(plan_of(result), "hosts"), "name", "b");
    assert_string_equal(json_string_value(json_object_get(b, "error")), "not trusted here");
    assert_string_equal(json_string_value(json_object_get(b, "remedy")), remedy);
    json_decref(result);

    trust(&A, "bee", &B, 9);
    trust(&B, "ay", &A, A.port);
    result = plan_with(&r, NULL);
    b = named(json_object_get(plan_of(result), "hosts"), "name", "bee");
    assert_string_equal(json_string_value(json_object_get(b, "error")), "");
    assert_true(num(b, "memory_bytes") > 1 << 20);
    json_decref(result);

    kill(B.daemon, SIGKILL);
    waitpid(B.daemon, NULL, 0);
    B.daemon = 0;
    for (int i = 0; i < 450; i++) { /* a lease of 30 s, and etcd's own slack */
        read_directory(&v, &n);
        bool there = listed(v, n, "b");
        free(v);
        if (!there)
            return;
        lb_sleep_ms(100);
    }
    fail_msg("a host that died is still in the directory");
}

int main(void)
{
    /* one group, as TAP has one plan: the hosts live as long as the tests about plans, etcd with those about the directory */
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(plans_what_is_there, two_hosts), cmocka_unit_test(counts_memory_honestly),
        cmocka_unit_test(says_what_hinders), cmocka_unit_test(excludes_and_limits),
        cmocka_unit_test(a_link_that_is_configured), cmocka_unit_test_teardown(hosts_that_take_nothing, no_hosts),
        cmocka_unit_test_setup(many_hosts, etcd_up), cmocka_unit_test_teardown(a_host_finds_another, etcd_down),
    };

    if (!own_network()) {
        print_message("1..0 # SKIP needs root\n");
        return 0;
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
