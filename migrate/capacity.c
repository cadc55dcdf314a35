/* migrate/capacity.c - the fragment of this host, and asking others for theirs. See capacity.h. */
#include "migrate/capacity.h"

#include <inttypes.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "core/host.h"
#include "core/json.h"
#include "migrate/ctl.h"
#include "migrate/maintenance.h"
#include "netproto/desc_proto.h"

#define CONNECT_MS 3000u
#define ANSWER_NS UINT64_C(30000000000)
#define DEFAULT_RAM_BYTES (UINT64_C(128) << 20) /* QEMU's, without -m */
#define MAX_CHECKS 4096u
#define MOST_DESC_BYTES (2u << 20)               /* of one VM (netproto/desc_proto.h) */

/* ------------------------------------------------------------------------ processes */

uint64_t lb_capacity_ram_of(char *const *argv)
{
    uint64_t bytes = DEFAULT_RAM_BYTES, n;

    for (size_t i = 0; argv[i] && argv[i + 1]; i++) {
        const char *v = argv[i + 1], *size;
        char text[64];

        if (strcmp(argv[i], "-m") && strcmp(argv[i], "--m"))
            continue;
        size = !strncmp(v, "size=", 5) ? v : strstr(v, ",size=");
        v = size ? strchr(size, '=') + 1 : v;
        snprintf(text, sizeof(text), "%.*s", (int)strcspn(v, ","), v);
        if (!*text || lb_parse_size(text, &n, NULL))
            continue;
        bytes = text[strlen(text) - 1] >= '0' && text[strlen(text) - 1] <= '9' ? n << 20 : n; /* a plain number is MiB */
    }
    return bytes;
}

uint64_t lb_capacity_resident(pid_t pid)
{
    static const char *const keys[] = {"\nVmRSS:", "\nHugetlbPages:"};
    LB_AUTO_FREE char *path = lb_asprintf("/proc/%d/status", (int)pid), *text = NULL;
    uint64_t sum = 0, kib;

    if (lb_file_read(path, 65536, &text, NULL, NULL))
        return 0;
    for (size_t i = 0; i < LB_ARRAY_LEN(keys); i++) {
        const char *at = strstr(text, keys[i]);

        if (at && sscanf(at + strlen(keys[i]), "%" SCNu64, &kib) == 1)
            sum += kib << 10;
    }
    return sum;
}

/* What a VM of this process, which occupies so much, is to be counted with. */
static uint64_t memory_of(const struct lb_vm_entry *e, uint64_t resident)
{
    char **argv = NULL;
    uint64_t ram = 0;

    if (!lb_proc_cmdline(e->proc.pid, &argv, NULL))
        ram = lb_capacity_ram_of(argv);
    lb_strv_free(argv);
    return LB_MAX(lb_preflight_need_bytes(ram), resident);
}

/* ----------------------------------------------------------------------------- host */

static json_t *strings(char *const *v)
{
    json_t *a = json_array();

    for (; v && *v; v++)
        json_array_append_new(a, lb_json_text(*v));
    return a;
}

#if defined(__x86_64__)
/* The words that the hypervisor shows of a guest's processor, of this host's. */
static json_t *features(void)
{
    static const struct {
        unsigned leaf, sub, reg;
    } words[] = {
        {1, 0, 2}, {1, 0, 3}, {6, 0, 0}, {7, 0, 1}, {7, 0, 2}, {7, 0, 3}, {7, 1, 0}, {7, 1, 3}, {0xd, 1, 0},
        {0x80000001, 0, 2}, {0x80000001, 0, 3}, {0x80000007, 0, 3}, {0x80000008, 0, 1},
    };
    static const char *const regs[] = {"EAX", "EBX", "ECX", "EDX"};
    json_t *a = json_array();

    for (size_t i = 0; i < LB_ARRAY_LEN(words); i++) {
        unsigned r[4] = {0};

        if (!__get_cpuid_count(words[i].leaf, words[i].sub, &r[0], &r[1], &r[2], &r[3]))
            continue;
        LB_AUTO_FREE char *word = lb_asprintf("CPUID.%X.%u.%s:0x%08x", words[i].leaf, words[i].sub, regs[words[i].reg],
                                              r[words[i].reg]);
        json_array_append_new(a, json_string(word));
    }
    return a;
}

/* "GenuineIntel": what a KVM guest is used to. */
static json_t *cpu_maker(void)
{
    unsigned max, name[3];
    char text[13] = "";

    if (__get_cpuid(0, &max, &name[0], &name[2], &name[1]))
        memcpy(text, name, 12);
    return text[0] ? lb_json_text(text) : json_string("unknown");
}
#else
static json_t *features(void)
{
    return json_array();
}

static json_t *cpu_maker(void)
{
    return json_string("unknown");
}
#endif

/* in_vms: resident bytes of all processes that are VMs, or parts of them. */
static json_t *host_json(const char *state_dir, const struct lb_host_config *cfg, uint64_t in_vms, struct lb_error *err)
{
    int64_t total = lb_host_meminfo("MemTotal"), available = lb_host_meminfo("MemAvailable");
    struct lb_maintenance m = {0};
    uint64_t taken;
    json_t *o;

    if (total <= 0 || available < 0) {
        lb_fail(err, LB_E_INTERNAL, "/proc/meminfo cannot be read");
        return NULL;
    }
    taken = (uint64_t)(total - LB_MIN(available, total));
    if (lb_maintenance_load(state_dir, &m, NULL))
        m.on = true; /* who cannot tell takes no VM */
    o = json_pack("{s:o, s:I, s:I, s:I, s:I, s:o, s:o, s:o, s:b}", "name", lb_json_text(cfg->name), "memory_bytes",
                  (json_int_t)total, "reserved_bytes", (json_int_t)cfg->memory_reserve_bytes, "used_bytes",
                  (json_int_t)(taken > in_vms ? taken - in_vms : 0), "cpus",
                  (json_int_t)LB_MAX(sysconf(_SC_NPROCESSORS_ONLN), 1), "cpu", cpu_maker(), "features", features(),
                  "tags", strings(cfg->tags), "maintenance", m.on);
    if (o && cfg->link_bytes_per_s)
        json_object_set_new(o, "link_bytes_per_s", json_integer((json_int_t)cfg->link_bytes_per_s));
    lb_maintenance_free(&m);
    return o;
}

/* ------------------------------------------------------------------------------ VMs */

/* Is a VM's own process at work here, or about to be? */
static bool runs_here(enum lb_vm_state s)
{
    return s != LB_VM_DEAD && s != LB_VM_SUSPENDED && s != LB_VM_STANDBY && s != LB_VM_INCOMING;
}

static json_t *groups_of(const struct lb_vm_rules *rules, const char *vm)
{
    json_t *a = json_array();

    for (unsigned i = 0; i < rules->n; i++)
        for (char **p = rules->v[i].items; p && *p; p++)
            if (lb_vm_matches(*p, vm)) {
                json_array_append_new(a, json_string(rules->v[i].name));
                break;
            }
    return a;
}

/* The key of a host by the name that it has here; "": not known. */
static json_t *key_of(const struct lb_hosts *hosts, const char *name)
{
    const struct lb_host *h = name[0] ? lb_hosts_by_name(hosts, name) : NULL;
    char text[LB_KEY_TEXT_BYTES] = "";

    if (h)
        lb_key_format(text, h->pub);
    return json_string(text);
}

static json_t *vm_json(const struct lb_host_config *cfg, const struct lb_vm_entry *e, uint64_t resident,
                       const struct lb_hosts *hosts)
{
    json_t *o = json_pack("{s:s, s:I, s:I}", "name", e->name, "memory_bytes", (json_int_t)memory_of(e, resident),
                          "touched_bytes", (json_int_t)resident);

    json_object_set_new(o, "together", groups_of(&cfg->together, e->name));
    json_object_set_new(o, "apart", groups_of(&cfg->apart, e->name));
    json_object_set_new(o, "priority", json_integer(lb_config_priority(cfg, e->name)));
    if (e->state == LB_VM_PROTECTED)
        json_object_set_new(o, "backup", key_of(hosts, e->peer));
    return o;
}

json_t *lb_capacity_fragment(const char *state_dir, const struct lb_host_config *cfg, const uint8_t pub[LB_KEY_BYTES],
                             struct lb_error *err)
{
    LB_AUTO_FREE struct lb_vm_entry *v = NULL;
    json_t *vms = json_array(), *kept = json_array(), *host = NULL;
    struct lb_hosts hosts = {0};
    char key[LB_KEY_TEXT_BYTES];
    uint64_t in_vms = 0;
    unsigned n = 0;

    if (!lb_hosts_load(state_dir, &hosts, err) && !lb_vm_entry_list(state_dir, &v, &n, err)) {
        for (unsigned i = 0; i < n; i++) {
            uint64_t resident;

            if (v[i].proc.pid <= 0 || !lb_proc_alive(&v[i].proc))
                continue;
            resident = lb_capacity_resident(v[i].proc.pid);
            in_vms += resident;
            if (runs_here(v[i].state))
                json_array_append_new(vms, vm_json(cfg, &v[i], resident, &hosts));
            else if (v[i].state == LB_VM_STANDBY || v[i].state == LB_VM_INCOMING)
                json_array_append_new(kept, json_pack("{s:s, s:I, s:o}", "name", v[i].name, "memory_bytes",
                                                      (json_int_t)memory_of(&v[i], resident), "of", key_of(&hosts, v[i].peer)));
        }
        host = host_json(state_dir, cfg, in_vms, err);
    }
    lb_hosts_free(&hosts);
    if (!host) {
        json_decref(vms);
        json_decref(kept);
        return NULL;
    }
    lb_key_format(key, pub);
    return json_pack("{s:s, s:o, s:o, s:o}", "key", key, "host", host, "vms", vms, "kept", kept);
}

/* -------------------------------------------------------------------------- serving */

/* What the planner sees for itself, and what is of no account. */
static bool planned_anyway(const char *id)
{
    return !strcmp(id, "memory") || !strcmp(id, "maintenance") || !strcmp(id, "clock-skew");
}

/* The VM's backup is here: it would take over, not come. */
static bool is_standby_here(const char *state_dir, const char *vm, const char *peer)
{
    struct lb_vm_entry e;

    return lb_vm_name_valid(vm) && !lb_vm_entry_load(state_dir, vm, &e, NULL) && e.state == LB_VM_STANDBY &&
           !strcmp(e.peer, peer);
}

/* NULL: it may come. */
static Lb__VmRefused *check(const struct lb_session_env *env, const struct lb_host_config *cfg, const char *peer,
                            const Lb__VmDescription *p, uint64_t peer_wall_ms)
{
    struct lb_report r = {0};
    struct lb_error err = LB_ERROR_INIT;
    Lb__VmRefused *out = NULL;
    struct lb_vm_desc d = {0};

    if (is_standby_here(env->state_dir, p->name, peer))
        return NULL;
    if (lb_desc_from_proto(p, &d, &err))
        lb_report_add(&r, "name", LB_CHECK_FAIL, "give it another name, or another command line", "%s", err.message);
    else
        lb_preflight_dest(&d, cfg, env->state_dir, peer_wall_ms, &r);
    for (unsigned i = 0; i < r.n && !out; i++) {
        if (r.v[i].status != LB_CHECK_FAIL || planned_anyway(r.v[i].id))
            continue;
        out = lb_alloc(sizeof(*out));
        lb__vm_refused__init(out);
        out->vm = lb_strdup(p->name);
        out->message = lb_strdup(r.v[i].message);
        out->remedy = lb_strdup(r.v[i].remedy);
    }
    lb_report_free(&r);
    lb_vm_desc_free(&d);
    return out;
}

static void check_all(const struct lb_session_env *env, const struct lb_host_config *cfg, const char *peer,
                      const Lb__CapacityQuery *q, Lb__Capacity *c)
{
    c->refused = lb_alloc((q->n_check + 1) * sizeof(*c->refused));
    for (size_t i = 0; i < q->n_check; i++) {
        Lb__VmRefused *r = check(env, cfg, peer, q->check[i], q->hello ? q->hello->wall_ms : lb_wall_ms());

        if (r)
            c->refused[c->n_refused++] = r;
    }
}

static int answer(const struct lb_session_env *env, struct lb_chan *chan, const char *peer, const Lb__CapacityQuery *q,
                  const struct lb_host_config *cfg, struct lb_error *err)
{
    json_t *fragment = lb_capacity_fragment(env->state_dir, cfg, env->identity->pub, err);
    LB_AUTO_FREE char *text = fragment ? json_dumps(fragment, JSON_COMPACT) : NULL;
    Lb__Control m = LB__CONTROL__INIT;
    Lb__Capacity c = LB__CAPACITY__INIT;
    int rc;

    json_decref(fragment);
    if (!text)
        return -1;
    check_all(env, cfg, peer, q, &c);
    c.inventory_json = text;
    m.kind_case = LB__CONTROL__KIND_CAPACITY;
    m.capacity = &c;
    rc = lb_ctl_send(chan, &m, err);
    for (size_t i = 0; i < c.n_refused; i++)
        lb__vm_refused__free_unpacked(c.refused[i], NULL);
    free(c.refused);
    return rc;
}

int lb_capacity_serve(const struct lb_session_env *env, struct lb_chan *chan, const char *peer,
                      const Lb__CapacityQuery *q, struct lb_error *err)
{
    struct lb_error local = LB_ERROR_INIT;
    struct lb_host_config cfg;
    int rc;

    if (q->n_check > MAX_CHECKS)
        return lb_fail(err, LB_E_PROTO, "host %s asks about %zu VMs at once", peer, q->n_check);
    rc = lb_config_load(env->config_path, &cfg, &local);
    if (!rc) {
        rc = answer(env, chan, peer, q, &cfg, &local);
        lb_config_free(&cfg);
    }
    if (rc) {
        lb_ctl_send_failure(chan, &local, NULL);
        if (err)
            *err = local;
    }
    return rc;
}

/* --------------------------------------------------------------------------- asking */

static void take_refusals(struct lb_peer *p, const Lb__Capacity *c)
{
    p->refused = lb_alloc((c->n_refused + 1) * sizeof(*p->refused));
    for (size_t i = 0; i < c->n_refused; i++)
        p->refused[p->n_refused++] = (struct lb_refused){lb_strdup(c->refused[i]->vm), lb_strdup(c->refused[i]->message),
                                                         lb_strdup(c->refused[i]->remedy)};
}

static int take_answer(struct lb_peer *p, const Lb__Capacity *c, struct lb_error *err)
{
    json_error_t je;

    p->fragment = json_loads(c->inventory_json, JSON_REJECT_DUPLICATES, &je);
    if (!p->fragment)
        return lb_fail(err, LB_E_PROTO, "what it says of its capacity is no JSON: %.120s", je.text);
    take_refusals(p, c);
    return 0;
}

/* Those that can be told, as many as a message holds; what cannot is found out when it is to move. */
static void add_checks(Lb__CapacityQuery *q, const struct lb_vm_desc *const *check, unsigned n)
{
    size_t bytes = 0;

    q->check = lb_alloc((n + 1) * sizeof(*q->check));
    for (unsigned i = 0; i < n && q->n_check < MAX_CHECKS; i++) {
        Lb__VmDescription *d;

        if (lb_desc_to_proto(check[i], &d, NULL))
            continue;
        bytes += lb__vm_description__get_packed_size(d) + 8;
        q->check[q->n_check++] = d;
        if (bytes > LB_CONTROL_MAX_BYTES - MOST_DESC_BYTES)
            break;
    }
}

static int question(struct lb_chan *chan, struct lb_peer *p, const struct lb_vm_desc *const *check, unsigned n_check,
                    struct lb_error *err)
{
    Lb__Control m = LB__CONTROL__INIT, *in = NULL;
    Lb__CapacityQuery q = LB__CAPACITY_QUERY__INIT;
    Lb__Hello h = LB__HELLO__INIT;
    int rc;

    lb_ctl_hello(&h, NULL);
    q.hello = &h;
    add_checks(&q, check, n_check);
    m.kind_case = LB__CONTROL__KIND_CAPACITY_QUERY;
    m.capacity_query = &q;
    rc = lb_ctl_send(chan, &m, err);
    for (size_t i = 0; i < q.n_check; i++)
        lb__vm_description__free_unpacked(q.check[i], NULL);
    free(q.check);
    if (rc || lb_ctl_expect(chan, LB__CONTROL__KIND_CAPACITY, &in, lb_now_ns() + ANSWER_NS, err))
        return -1;
    rc = take_answer(p, in->capacity, err);
    lb__control__free_unpacked(in, NULL);
    return rc;
}

int lb_capacity_ask(const struct lb_identity *me, struct lb_peer *p, const struct lb_vm_desc *const *check,
                    unsigned n_check, int cancel_fd)
{
    struct lb_chan *chan = NULL;
    char host[256];
    uint16_t port;
    int rc = -1;

    lb_key_format(p->key, p->host.pub);
    if (!p->host.address[0]) {
        lb_fail(&p->error, LB_E_NET, "its address is not known here");
        return lb_remedy(&p->error, "`lifeboat host trust %s ADDRESS %s`", p->host.name, p->key);
    }
    lb_host_address(&p->host, host, &port);
    if (!lb_chan_connect(host, port, me, p->host.pub, CONNECT_MS, cancel_fd, &chan, &p->error))
        rc = question(chan, p, check, n_check, &p->error);
    lb_chan_close(chan);
    if (rc && !p->error.remedy[0])
        lb_remedy(&p->error, "see that lifeboatd of this version runs there, and the network");
    return rc;
}

void lb_peer_free(struct lb_peer *p)
{
    json_decref(p->fragment);
    for (unsigned i = 0; i < p->n_refused; i++) {
        free(p->refused[i].vm);
        free(p->refused[i].message);
        free(p->refused[i].remedy);
    }
    free(p->refused);
    *p = (struct lb_peer){0};
}
