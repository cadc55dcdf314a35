/*
 * cmd/daemon/evac_plan.c - the work of a session of role "plan": which VM goes where, and when. Nothing is changed.
 *
 *   look at the VMs here -> ask every trusted host -> measure the links to those that may take VMs -> merge -> plan
 *
 * A host that does not answer is in the result with its error, and takes nothing. Hosts that the directory knows and this one does
 * not trust are in it with the command that would change that. What is planned for one host alone (the "evacuate" of the
 * planner is this host) still needs the others' VMs: their memory, their groups, and whose backups are here.
 */
#include <pthread.h>
#include <sodium.h>
#include <stdatomic.h>
#include <string.h>

#include "cmd/daemon/session.h"
#include "core/qemu/qemu.h"
#include "migrate/capacity.h"
#include "migrate/plan.h"
#include "remus/directory.h"

#define ASK_PARALLEL 16u
#define TOP_NS UINT64_C(2000000000)
#define DIRECTORY_NS UINT64_C(3000000000)
#define SETUP_S 0.35
#define DOWNTIME_MS 30

struct planner {
    struct sess *s;
    const Lb__SessionStart *start;
    const Lb__RpcEvacuate *req;
    struct lb_host_config cfg;
    struct lb_identity me;
    struct lb_hosts hosts;
    char self[160];
    struct lb_survey_vm *vms;
    unsigned n_vms;
    const struct lb_vm_desc **descs;
    unsigned n_descs;
    struct lb_peer *peers;
    unsigned n_peers;
    struct lb_directory_host *listed;
    unsigned n_listed;
    json_t *fragment, *priorities;
    struct lb_merge merge;
    struct lb_inventory inv;
    struct lb_plan plan;
    uint64_t own_link;
    atomic_uint next;
};

static void note(struct planner *p, const char *fmt, ...) LB_PRINTF(2, 3);

static void note(struct planner *p, const char *fmt, ...)
{
    char text[512];
    json_t *o = json_object();
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    lb_log(LB_LOG_INFO, "%s", text);
    json_object_set_new(o, "event", json_string("note"));
    json_object_set_new(o, "text", lb_json_text(text));
    lb_sess_progress(p->s, lb_json_dump(o));
}

/* -------------------------------------------------------------------------- request */

static bool wanted(const struct planner *p, const char *host)
{
    for (size_t i = 0; i < p->req->n_to; i++)
        if (!strcmp(p->req->to[i], host))
            return true;
    return !p->req->n_to;
}

static int check_to(const struct planner *p, struct lb_error *err)
{
    for (size_t i = 0; i < p->req->n_to; i++)
        if (!lb_hosts_by_name(&p->hosts, p->req->to[i])) {
            lb_fail(err, LB_E_NOT_FOUND, "host %.100s is not known here", p->req->to[i]);
            return lb_remedy(err, "`lifeboat host ls` shows those that are; `lifeboat host trust` adds one");
        }
    return 0;
}

static int read_priorities(struct planner *p, struct lb_error *err)
{
    const char *name;
    json_t *v;

    if (!p->req->priorities_json[0])
        return 0;
    p->priorities = json_loads(p->req->priorities_json, JSON_REJECT_DUPLICATES, NULL);
    if (!json_is_object(p->priorities)) {
        lb_fail(err, LB_E_USAGE, "the priorities are no JSON object");
        return lb_remedy(err, "write {\"NAME or pattern\": 10, ...}");
    }
    json_object_foreach (p->priorities, name, v)
        if (!json_is_integer(v) || json_integer_value(v) < 0 || json_integer_value(v) > INT32_MAX) {
            lb_fail(err, LB_E_USAGE, "the priority of %.100s is no whole number from 0", name);
            return lb_remedy(err, "write {\"NAME or pattern\": 10, ...}");
        }
    return 0;
}

static int hot_of(const char *text, enum lb_plan_hot *out, struct lb_error *err)
{
    static const char *const names[] = {[LB_PLAN_THROTTLE] = "throttle", [LB_PLAN_SUSPEND] = "suspend", [LB_PLAN_LEAVE] = "leave"};

    *out = LB_PLAN_THROTTLE;
    for (unsigned i = 0; i < LB_ARRAY_LEN(names); i++)
        if (!strcmp(names[i], text)) {
            *out = (enum lb_plan_hot)i;
            return 0;
        }
    return *text ? lb_fail(err, LB_E_USAGE, "\"%.40s\": VMs too hot to converge are throttled, suspended or left: give "
                                            "throttle, suspend or leave", text)
                 : 0;
}

static int open_planner(struct planner *p, struct lb_error *err)
{
    if (!p->req)
        return lb_fail(err, LB_E_USAGE, "a plan needs a request to evacuate");
    if (lb_config_load(p->start->config_path, &p->cfg, err) || lb_identity_load(p->start->state_dir, &p->me, err) ||
        lb_hosts_load(p->start->state_dir, &p->hosts, err))
        return -1;
    snprintf(p->self, sizeof(p->self), "%s%s", p->cfg.name, lb_hosts_by_name(&p->hosts, p->cfg.name) ? " (this host)" : "");
    return check_to(p, err) || read_priorities(p, err) ? -1 : 0;
}

/* ------------------------------------------------------------------------ this host */

/* What this host's protections say of themselves; NULL: nobody answers. */
static json_t *protections(const char *socket)
{
    LB_AUTO_FD int fd = *socket ? lb_unix_connect(socket, NULL) : -1;
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;
    Lb__RpcName top = LB__RPC_NAME__INIT;
    Lb__RpcReply *reply;
    json_t *o, *list;

    r.kind_case = LB__RPC_REQUEST__KIND_TOP;
    r.top = &top;
    if (fd < 0 || lb_rpc_send(fd, &r.base, lb_now_ns() + TOP_NS, NULL))
        return NULL;
    reply = (Lb__RpcReply *)lb_rpc_recv(fd, &lb__rpc_reply__descriptor, lb_now_ns() + TOP_NS, -1, NULL);
    if (!reply)
        return NULL;
    o = reply->kind_case == LB__RPC_REPLY__KIND_RESULT_JSON ? json_loads(reply->result_json, 0, NULL) : NULL;
    lb__rpc_reply__free_unpacked(reply, NULL);
    list = json_incref(json_object_get(o, "protections"));
    json_decref(o);
    return list;
}

/* Of those that a protection works on: what it finds dirty. It looks many times a second, and finds a page each time that is
 * dirtied again and again: what was sampled before it began is nearer to the truth when it is less. */
static void take_rates(struct planner *p)
{
    json_t *list = protections(p->start->socket), *o;
    size_t i;

    json_array_foreach (list, i, o)
        for (unsigned k = 0; k < p->n_vms; k++) {
            struct lb_survey_vm *vm = &p->vms[k];
            const char *name = json_string_value(json_object_get(o, "vm"));
            double rate = json_number_value(json_object_get(o, "dirty_pages")) * LB_PAGE_SIZE *
                          json_number_value(json_object_get(o, "epochs_per_s"));

            if (!vm->sampled && name && !strcmp(name, vm->name) && rate > 0 && rate < (double)LB_INV_MAX_BYTES &&
                (!vm->dirty_bytes_per_s || rate < (double)vm->dirty_bytes_per_s))
                vm->dirty_bytes_per_s = (uint64_t)rate;
        }
    json_decref(list);
}

static int look_here(struct planner *p, struct lb_error *err)
{
    struct lb_survey_opts o = {.state_dir = p->start->state_dir, .hv = &lb_hv_qemu, .cancel_fd = lb_sess_cancel_fd(p->s)};
    uint64_t t0 = lb_now_ns();
    unsigned sampled = 0;

    note(p, "looking at the VMs of this host");
    if (lb_survey(&o, &p->vms, &p->n_vms, err))
        return -1;
    take_rates(p);
    p->descs = lb_alloc((p->n_vms + 1) * sizeof(*p->descs));
    for (unsigned i = 0; i < p->n_vms; i++) {
        sampled += p->vms[i].sampled;
        if (p->vms[i].described)
            p->descs[p->n_descs++] = &p->vms[i].desc;
    }
    lb_log(LB_LOG_INFO, "%u VMs, %u of them watched, took %.1f s", p->n_vms, sampled, (double)(lb_now_ns() - t0) / 1e9);
    p->fragment = lb_capacity_fragment(p->start->state_dir, &p->cfg, p->me.pub, err);
    return p->fragment ? 0 : -1;
}

/* ---------------------------------------------------------------------------- others */

static void read_directory(struct planner *p)
{
    const char *spec = lb_config_directory(&p->cfg);
    struct lb_error err = LB_ERROR_INIT;

    if (spec && lb_directory_read(spec, lb_now_ns() + DIRECTORY_NS, &p->listed, &p->n_listed, &err)) {
        note(p, "the directory of hosts does not answer: %.300s", err.message);
        lb_log_error(LB_LOG_WARN, &err);
    }
}

static const struct lb_directory_host *listed_as(const struct planner *p, const uint8_t pub[LB_KEY_BYTES])
{
    for (unsigned i = 0; i < p->n_listed; i++)
        if (!memcmp(p->listed[i].host.pub, pub, LB_KEY_BYTES))
            return &p->listed[i];
    return NULL;
}

/* Where it was told to be; then where it says that it is. */
static void ask_one(struct planner *p, struct lb_peer *peer)
{
    const struct lb_directory_host *d = listed_as(p, peer->host.pub);
    int fd = lb_sess_cancel_fd(p->s);
    struct lb_error first;

    if (!lb_capacity_ask(&p->me, peer, p->descs, p->n_descs, fd) || !d || !strcmp(d->host.address, peer->host.address))
        return;
    first = peer->error;
    peer->error = (struct lb_error)LB_ERROR_INIT;
    snprintf(peer->host.address, sizeof(peer->host.address), "%s", d->host.address);
    if (lb_capacity_ask(&p->me, peer, p->descs, p->n_descs, fd) && first.code != LB_E_NET)
        peer->error = first;
}

static void *ask_main(void *arg)
{
    struct planner *p = arg;
    unsigned i;

    while ((i = atomic_fetch_add(&p->next, 1)) < p->n_peers)
        ask_one(p, &p->peers[i]);
    return NULL;
}

static void ask_all(struct planner *p)
{
    pthread_t threads[ASK_PARALLEL];
    unsigned n = 0;

    p->peers = lb_alloc((p->hosts.n + 1) * sizeof(*p->peers));
    for (p->n_peers = 0; p->n_peers < p->hosts.n; p->n_peers++)
        p->peers[p->n_peers].host = p->hosts.v[p->n_peers];
    if (p->n_peers)
        note(p, "asking %u host%s what they can take", p->n_peers, p->n_peers == 1 ? "" : "s");
    while (n < ASK_PARALLEL && n + 1 < p->n_peers && !pthread_create(&threads[n], NULL, ask_main, p))
        n++;
    ask_main(p);
    while (n > 0)
        pthread_join(threads[--n], NULL);
    for (unsigned i = 0; i < p->n_peers; i++)
        if (!p->peers[i].fragment)
            note(p, "host %s does not answer: %.300s", p->peers[i].host.name, p->peers[i].error.message);
}

static bool takes_vms(const struct planner *p, const struct lb_peer *peer)
{
    return peer->fragment && wanted(p, peer->host.name) &&
           !json_is_true(json_object_get(json_object_get(peer->fragment, "host"), "maintenance"));
}

static void measure_one(struct planner *p, struct lb_peer *peer)
{
    struct lb_error err = LB_ERROR_INIT;
    char rate[32];

    note(p, "measuring the link to %s", peer->host.name);
    if (lb_link_measure(p->start->state_dir, &p->me, peer, lb_sess_cancel_fd(p->s), &err))
        lb_log_error(LB_LOG_WARN, &err);
    else
        lb_log(LB_LOG_INFO, "the link to %s carries %s/s", peer->host.name,
               lb_human_bytes(rate, sizeof(rate), (double)peer->link_bytes_per_s));
}

/* To each alone, one after the other, as at the same time they would measure each other; then, for this host's own link, just that. */
static void measure_links(struct planner *p)
{
    struct lb_peer *all[LB_LINK_AT_ONCE];
    struct lb_error err = LB_ERROR_INIT;
    unsigned n = 0;

    for (unsigned i = 0; i < p->n_peers && p->n_vms; i++) {
        struct lb_peer *peer = &p->peers[i];

        if (!takes_vms(p, peer) || json_object_get(json_object_get(peer->fragment, "host"), "link_bytes_per_s"))
            continue;
        measure_one(p, peer);
        if (peer->measured && n < LB_LINK_AT_ONCE)
            all[n++] = peer;
    }
    if (n > 1 && !p->cfg.link_bytes_per_s &&
        lb_link_measure_own(p->start->state_dir, &p->me, all, n, lb_sess_cancel_fd(p->s), &p->own_link, &err))
        lb_log_error(LB_LOG_WARN, &err);
}

static int check_answers(const struct planner *p, struct lb_error *err)
{
    const struct lb_peer *silent = NULL;

    for (unsigned i = 0; i < p->n_peers; i++) {
        if (!wanted(p, p->peers[i].host.name))
            continue;
        if (p->peers[i].fragment)
            return 0;
        silent = &p->peers[i];
    }
    if (!silent || !p->req->n_to)
        return 0;
    *err = silent->error;
    return lb_context(err, "host %s, where the VMs are to go", silent->host.name);
}

/* ------------------------------------------------------------------------------ plan */

static int make_inventory(struct planner *p, struct lb_error *err)
{
    p->merge = (struct lb_merge){.cfg = &p->cfg, .self = p->self, .fragment = p->fragment, .vms = p->vms, .n_vms = p->n_vms,
                                 .peers = p->peers, .n_peers = p->n_peers, .priorities = p->priorities,
                                 .excluded = p->req->excluded, .n_excluded = p->req->n_excluded,
                                 .bandwidth_bytes_per_s = p->req->bandwidth_bytes_per_s, .setup_s = SETUP_S,
                                 .downtime_ms = DOWNTIME_MS, .own_link_bytes_per_s = p->own_link};
    lb_migration_medians(p->start->state_dir, &p->merge.setup_s, &p->merge.downtime_ms);
    return lb_capacity_merge(&p->merge, &p->inv, err);
}

static int make_plan(struct planner *p, struct lb_error *err)
{
    LB_AUTO_FREE uint32_t *to = lb_alloc((p->inv.n_hosts + 1) * sizeof(*to));
    struct lb_plan_opts o = {.evacuate = p->inv.evacuate, .to = {to, 0}, .parallel = p->req->parallel};

    if (hot_of(p->req->hot, &o.hot, err))
        return -1;
    for (uint32_t h = 0; h < p->inv.n_hosts && p->req->n_to; h++)
        if (wanted(p, p->inv.hosts[h].name))
            to[o.to.n++] = h;
    return lb_plan_make(&p->inv, &o, &p->plan, err);
}

/* ---------------------------------------------------------------------------- result */

static void add_error(json_t *host, const char *error, const char *remedy)
{
    json_object_set_new(host, "error", lb_json_text(error));
    json_object_set_new(host, "remedy", lb_json_text(remedy));
}

static json_t *absent_host(const char *name, uint64_t memory_bytes, bool maintenance, const char *error, const char *remedy)
{
    json_t *o = json_pack("{s:o, s:I, s:i, s:i, s:i, s:i, s:i, s:b}", "name", lb_json_text(name), "memory_bytes",
                          (json_int_t)memory_bytes, "reserved_bytes", 0, "before_bytes", 0, "after_bytes", 0,
                          "link_bytes_per_s", 0, "parallel", 0, "maintenance", maintenance);

    add_error(o, error, remedy);
    return o;
}

static bool is_me(const struct planner *p, const uint8_t pub[LB_KEY_BYTES])
{
    return !memcmp(p->me.pub, pub, LB_KEY_BYTES);
}

/* Those that were planned with, those that do not answer, those that nobody told us of. */
static void add_hosts(struct planner *p, json_t *list)
{
    json_t *o;
    size_t i;

    json_array_foreach (list, i, o)
        add_error(o, "", "");
    for (i = 0; i < p->n_peers; i++) {
        const struct lb_peer *peer = &p->peers[i];
        const struct lb_directory_host *d = listed_as(p, peer->host.pub);

        if (!peer->fragment)
            json_array_append_new(list, absent_host(peer->host.name, d ? d->memory_bytes : 0, d && d->maintenance,
                                                    peer->error.message, peer->error.remedy));
    }
    for (i = 0; i < p->n_listed; i++) {
        const struct lb_directory_host *d = &p->listed[i];
        char key[LB_KEY_TEXT_BYTES];

        if (is_me(p, d->host.pub) || lb_hosts_by_key(&p->hosts, d->host.pub))
            continue;
        lb_key_format(key, d->host.pub);
        LB_AUTO_FREE char *remedy = lb_asprintf("lifeboat host trust %s %s %s", d->host.name, d->host.address, key);
        note(p, "host %s is in the directory and not trusted here: %s", d->host.name, remedy);
        json_array_append_new(list, absent_host(d->host.name, d->memory_bytes, d->maintenance, "not trusted here", remedy));
    }
}

static char *replaced(const char *text, const char *what, const char *with)
{
    const char *at = strstr(text, what);

    return at ? lb_asprintf("%.*s%s%s", (int)(at - text), text, with, at + strlen(what)) : NULL;
}

/* Instead of the tags that say "not there" inside the planner, what the host itself said. */
static void explain_stay(const struct planner *p, json_t *stay)
{
    const char *vm = json_string_value(json_object_get(stay, "vm"));

    for (unsigned i = 0; i < p->n_peers; i++) {
        const char *host = p->peers[i].host.name, *remedy, *said = lb_merge_refusal(&p->merge, vm, host, &remedy);
        LB_AUTO_FREE char *tag = lb_asprintf("host %s has the forbidden tag host:%s", host, host);
        LB_AUTO_FREE char *better = lb_asprintf("host %s does not take it: %s", host, said ? said : "nor what it is together with");
        LB_AUTO_FREE char *reason = replaced(json_string_value(json_object_get(stay, "reason")), tag, better);

        if (!reason)
            continue;
        json_object_set_new(stay, "reason", lb_json_text(reason));
        if (said && *remedy)
            json_object_set_new(stay, "remedy", lb_json_text(remedy));
    }
}

static bool has_backup_here(const struct planner *p, const struct lb_vm_entry *e)
{
    size_t len = strlen(e->name);

    for (uint32_t i = 0; i < p->inv.n_vms; i++) {
        const struct lb_inv_vm *v = &p->inv.vms[i];

        if (v->backup != LB_INV_NONE && !strcmp(p->inv.hosts[v->backup].name, p->self) &&
            !strcmp(p->inv.hosts[v->host].name, e->peer) && !strncmp(v->name, e->name, len) &&
            (!v->name[len] || v->name[len] == ' ')) /* its second name: "NAME (HOST)" */
            return true;
    }
    return false;
}

/* Backups kept here of VMs whose hosts said nothing. */
static void add_orphans(const struct planner *p, json_t *stays)
{
    LB_AUTO_FREE struct lb_vm_entry *v = NULL;
    unsigned n = 0;

    if (lb_vm_entry_list(p->start->state_dir, &v, &n, NULL))
        return;
    for (unsigned i = 0; i < n; i++)
        if (v[i].state == LB_VM_STANDBY && !has_backup_here(p, &v[i])) {
            LB_AUTO_FREE char *reason = lb_asprintf("host %s, where it runs, says nothing of it: it may need its backup here",
                                                    v[i].peer);

            json_array_append_new(stays, json_pack("{s:s, s:o, s:b, s:o, s:s}", "vm", v[i].name, "host", lb_json_text(v[i].peer),
                                                   "backup", 1, "reason", lb_json_text(reason), "remedy",
                                                   "see that lifeboatd runs there, or decide with `lifeboat failover`"));
        }
}

/* Is it protected, or to be as soon as it can be? */
static bool is_protected(const struct planner *p, const char *vm)
{
    LB_AUTO_FREE struct lb_protect_wish *w = lb_alloc(sizeof(*w));

    return vm && lb_vm_name_valid(vm) && !lb_wish_load(p->start->state_dir, vm, w, NULL);
}

static char *result_of(struct planner *p)
{
    json_t *plan = lb_plan_json(&p->inv, &p->plan), *o, *inventory, *stays = json_object_get(plan, "stays");
    LB_AUTO_FREE char *text = lb_inventory_dump(&p->inv);
    uint32_t self = lb_inv_host_find(&p->inv, p->self);
    char id[17];
    uint8_t bytes[8];
    size_t i;

    randombytes_buf(bytes, sizeof(bytes));
    lb_hex(id, bytes, sizeof(bytes));
    json_array_foreach (stays, i, o)
        explain_stay(p, o);
    add_orphans(p, stays);
    json_array_foreach (json_object_get(plan, "steps"), i, o)
        json_object_set_new(o, "protected", json_boolean(is_protected(p, json_string_value(json_object_get(o, "vm")))));
    add_hosts(p, json_object_get(plan, "hosts"));
    json_object_set_new(plan, "event", json_string("plan"));
    json_object_set_new(plan, "id", json_string(id));
    json_object_set_new(plan, "host", lb_json_text(p->self));
    json_object_set_new(plan, "parallel", json_integer(self == LB_INV_NONE ? 0 : p->plan.parallel[self]));
    json_object_set_new(plan, "vms", json_integer(p->n_vms));
    inventory = json_loads(text, 0, NULL);
    return lb_json_dump(json_pack("{s:o, s:o}", "plan", plan, "inventory", inventory ? inventory : json_null()));
}

static void close_planner(struct planner *p)
{
    lb_plan_free(&p->plan);
    lb_inventory_free(&p->inv);
    for (unsigned i = 0; i < p->n_peers; i++)
        lb_peer_free(&p->peers[i]);
    free(p->peers);
    free(p->listed);
    free(p->descs);
    lb_survey_free(p->vms, p->n_vms);
    json_decref(p->fragment);
    json_decref(p->priorities);
    lb_hosts_free(&p->hosts);
    lb_identity_wipe(&p->me);
    lb_config_free(&p->cfg);
}

int lb_work_plan(struct sess *s, char **json, struct lb_error *err)
{
    struct planner p = {.s = s, .start = lb_sess_start(s)};
    int rc;

    lb_sess_open_log(s);
    p.req = p.start->request ? p.start->request->evacuate : NULL;
    rc = open_planner(&p, err) || look_here(&p, err);
    if (!rc) {
        read_directory(&p);
        ask_all(&p);
        rc = check_answers(&p, err);
    }
    if (!rc) {
        measure_links(&p);
        note(&p, "planning");
        rc = make_inventory(&p, err) || make_plan(&p, err);
    }
    if (!rc)
        *json = result_of(&p);
    close_planner(&p);
    return rc ? -1 : 0;
}
