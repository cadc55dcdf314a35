/*
 * migrate/capacity_merge.c - what this host knows of itself and what others said, as one inventory.
 *
 * Put together as the JSON of an inventory and read by its own reader, so that nothing a peer says gets around the checks. Each
 * fragment is read alone first: one that is wrong costs its host, not the plan.
 *
 *   keys of hosts        become the names that they have here; a backup on a host that is not in the inventory is left out
 *   a VM's second name   two hosts may have a VM of the same name: the one that is not ours is called "NAME (HOST)"
 *   kept memory          is used memory of its host, unless the VM that it belongs to is in the inventory with it
 *   a VM on its way      counts where it goes: it is not of our VMs any more (survey.c), and its destination keeps memory for it
 *   processor features   only those that some VM needs and some host lacks, one bit each
 *   "not on that host"   host H has the tag "host:H", and the VM must not go to a host with that tag
 */
#include <string.h>

#include "core/json.h"
#include "migrate/capacity.h"

#define HOST_TAG "host:"
#define LINK_UNKNOWN (UINT64_C(125) << 20) /* of hosts that nothing is sent to: any */

struct build {
    struct lb_merge *m;
    json_t *hosts, *vms;
    json_t *names;      /* of VMs: taken */
    json_t *backups;    /* "HOST OF THE BACKUP\tHOST\tVM" */
};

/* ------------------------------------------------------------------------- refusals */

static bool is_excluded(const struct lb_merge *m, const char *vm, const char *host)
{
    size_t len = strlen(vm);

    for (size_t i = 0; i < m->n_excluded; i++) {
        const char *x = m->excluded[i];

        if (!strncmp(x, vm, len) && x[len] == '\t' && !strcmp(x + len + 1, host))
            return true;
    }
    return false;
}

const char *lb_merge_refusal(const struct lb_merge *m, const char *vm, const char *host, const char **remedy)
{
    *remedy = "";
    for (unsigned i = 0; i < m->n_peers; i++) {
        const struct lb_peer *p = &m->peers[i];

        if (strcmp(p->host.name, host))
            continue;
        for (unsigned k = 0; k < p->n_refused; k++)
            if (!strcmp(p->refused[k].vm, vm)) {
                *remedy = p->refused[k].remedy;
                return p->refused[k].message;
            }
    }
    return is_excluded(m, vm, host) ? "its move there has failed" : NULL;
}

/* ---------------------------------------------------------------------- the reader's */

/* Is this a host and VMs that the inventory's reader takes? */
static int try_out(json_t *host, json_t *vms, struct lb_error *err)
{
    json_t *o = json_pack("{s:[O], s:O}", "hosts", host, "vms", vms);
    LB_AUTO_FREE char *text = json_dumps(o, JSON_COMPACT);
    struct lb_inventory inv;

    json_decref(o);
    if (!text)
        return lb_fail(err, LB_E_PROTO, "what it says of its capacity cannot be read");
    if (lb_inventory_parse(text, strlen(text), &inv, err))
        return -1;
    lb_inventory_free(&inv);
    return 0;
}

static struct lb_peer *by_key(const struct lb_merge *m, const char *key)
{
    for (unsigned i = 0; i < m->n_peers; i++)
        if (m->peers[i].fragment && !strcmp(m->peers[i].key, key))
            return &m->peers[i];
    return NULL;
}

/* The name here of a host that is in the inventory; NULL: it is not. */
static const char *name_of(const struct lb_merge *m, const json_t *key)
{
    const char *text = json_string_value(key);
    const struct lb_peer *p = text ? by_key(m, text) : NULL;

    if (p)
        return p->host.name;
    return text && !strcmp(text, json_string_value(json_object_get(m->fragment, "key"))) ? m->self : NULL;
}

static uint64_t u64_of(const json_t *o, const char *key)
{
    uint64_t n = 0;

    lb_json_get_u64(o, key, LB_INV_MAX_BYTES, &n);
    return n;
}

/* -------------------------------------------------------------------------- features */

/* "CPUID.7.0.EBX:0x01d843a9": where the number begins; 0: no such word. */
static size_t word_split(const char *word, uint32_t *bits)
{
    const char *colon = word ? strrchr(word, ':') : NULL;
    char *end;
    unsigned long long n;

    if (!colon || strncmp(colon, ":0x", 3))
        return 0;
    n = strtoull(colon + 1, &end, 16);
    if (*end || n > UINT32_MAX)
        return 0;
    *bits = (uint32_t)n;
    return (size_t)(colon - word);
}

/* The bits of the register that `word` (len octets of it) names. */
static uint32_t register_of(const json_t *features, const char *word, size_t len)
{
    uint32_t bits = 0, found;
    const json_t *f;
    size_t i;

    json_array_foreach (features, i, f) {
        const char *text = json_string_value(f);

        if (word_split(text, &found) == len && !strncmp(text, word, len))
            bits |= found;
    }
    return bits;
}

/* Bits of that register that some host lacks. */
static uint32_t lacking(const struct build *b, const char *word, size_t len)
{
    uint32_t missing = 0;
    const json_t *h;
    size_t i;

    json_array_foreach (b->hosts, i, h)
        missing |= ~register_of(json_object_get(h, "cpuid"), word, len);
    return missing;
}

static void add_bits(json_t *to, const char *word, size_t len, uint32_t bits)
{
    for (unsigned i = 0; i < 32; i++)
        if (bits & UINT32_C(1) << i) {
            LB_AUTO_FREE char *name = lb_asprintf("%.*s bit %u", (int)len, word, i);

            json_array_append_new(to, json_string(name));
        }
}

/* What the guest sees and its host has, as far as it makes a difference. */
static json_t *needed(const struct build *b, const struct lb_survey_vm *vm)
{
    const json_t *own = json_object_get(json_array_get(b->hosts, 0), "cpuid");
    json_t *list = json_array();
    uint32_t bits;
    size_t len;

    for (char **f = vm->desc.features; f && *f; f++)
        if ((len = word_split(*f, &bits)))
            add_bits(list, *f, len, bits & register_of(own, *f, len) & lacking(b, *f, len));
    return list;
}

/* When all VMs are known: hosts keep the bits that one of them needs. */
static void settle_features(const struct build *b)
{
    json_t *h, *v, *f;
    size_t i, k, n;

    json_array_foreach (b->hosts, i, h) {
        json_t *cpuid = json_object_get(h, "cpuid"), *has = json_array(), *seen = json_object();

        json_array_foreach (b->vms, k, v)
            json_array_foreach (json_object_get(v, "features"), n, f) {
                const char *name = json_string_value(f), *bit = strstr(name, " bit ");
                size_t len = (size_t)(bit - name);

                if (json_object_get(seen, name))
                    continue;
                json_object_set_new(seen, name, json_true());
                if (register_of(cpuid, name, len) & UINT32_C(1) << atoi(bit + 5))
                    json_array_append(has, f);
            }
        json_decref(seen);
        json_object_del(h, "cpuid");
        json_object_set_new(h, "features", has);
    }
}

/* ----------------------------------------------------------------------------- hosts */

static uint64_t limited(const struct lb_merge *m, uint64_t link)
{
    return m->bandwidth_bytes_per_s && m->bandwidth_bytes_per_s < link ? m->bandwidth_bytes_per_s : link;
}

static uint64_t configured_link(const json_t *fragment)
{
    return u64_of(json_object_get(fragment, "host"), "link_bytes_per_s");
}

/* As configured; else the best that was measured, to anybody or to several at once: that much goes through it. */
static uint64_t own_link(const struct lb_merge *m)
{
    uint64_t configured = configured_link(m->fragment), best = configured ? configured : m->own_link_bytes_per_s;

    for (unsigned i = 0; i < m->n_peers && !configured; i++)
        best = LB_MAX(best, m->peers[i].link_bytes_per_s);
    return limited(m, best ? best : LINK_UNKNOWN);
}

static json_t *host_object(const json_t *fragment, const char *name, uint64_t link)
{
    static const char *const fields[] = {"memory_bytes", "reserved_bytes", "used_bytes", "cpus", "cpu", "maintenance"};
    const json_t *from = json_object_get(fragment, "host");
    LB_AUTO_FREE char *own_tag = lb_asprintf(HOST_TAG "%s", name);
    json_t *o = json_pack("{s:o, s:I}", "name", lb_json_text(name), "link_bytes_per_s", (json_int_t)link);
    json_t *tags = json_copy(json_object_get(from, "tags")), *v;

    for (size_t i = 0; i < LB_ARRAY_LEN(fields); i++)
        if ((v = json_object_get(from, fields[i])))
            json_object_set(o, fields[i], v);
    if (!json_is_array(tags)) {
        json_decref(tags);
        tags = json_array();
    }
    json_array_append_new(tags, lb_json_text(own_tag));
    json_object_set_new(o, "tags", tags);
    return o;
}

/* ------------------------------------------------------------------------------- VMs */

/* Groups that have a pattern which means the VM, besides what its own host said. */
static json_t *groups(const json_t *said, const struct lb_vm_rules *rules, const char *vm)
{
    json_t *list = json_is_array(said) ? json_copy((json_t *)said) : json_array();

    for (unsigned i = 0; i < rules->n; i++)
        for (char **p = rules->v[i].items; p && *p; p++)
            if (lb_vm_matches(*p, vm))
                json_array_append_new(list, json_string(rules->v[i].name));
    return list;
}

/* Tags of all rules that mean the VM. */
static json_t *tag_list(const struct lb_vm_rules *rules, const char *vm)
{
    json_t *list = json_array();

    for (unsigned i = 0; i < rules->n; i++)
        for (char **tag = rules->v[i].items; lb_vm_matches(rules->v[i].name, vm) && tag && *tag; tag++)
            json_array_append_new(list, json_string(*tag));
    return list;
}

static uint32_t priority(const struct lb_merge *m, const char *vm)
{
    const json_t *exact = json_object_get(m->priorities, vm), *v;
    const char *pattern;

    if (exact)
        return (uint32_t)json_integer_value(exact);
    json_object_foreach ((json_t *)m->priorities, pattern, v)
        if (lb_vm_matches(pattern, vm))
            return (uint32_t)json_integer_value(v);
    return lb_config_priority(m->cfg, vm);
}

static json_t *blockers(const struct lb_survey_vm *vm)
{
    json_t *a = json_array();

    for (unsigned i = 0; i < vm->blockers.n; i++)
        json_array_append_new(a, json_pack("{s:o, s:o}", "message", lb_json_text(vm->blockers.v[i].message), "remedy",
                                           lb_json_text(vm->blockers.v[i].remedy)));
    return a;
}

static json_t *forbidden(const struct lb_merge *m, const char *vm)
{
    json_t *a = tag_list(&m->cfg->forbid_tags, vm);
    const char *remedy;

    for (unsigned i = 0; i < m->n_peers; i++)
        if (m->peers[i].fragment && lb_merge_refusal(m, vm, m->peers[i].host.name, &remedy)) {
            LB_AUTO_FREE char *tag = lb_asprintf(HOST_TAG "%s", m->peers[i].host.name);

            json_array_append_new(a, lb_json_text(tag));
        }
    return a;
}

static const struct lb_peer *answering(const struct lb_merge *m, const char *name)
{
    for (unsigned i = 0; i < m->n_peers; i++)
        if (m->peers[i].fragment && !strcmp(m->peers[i].host.name, name))
            return &m->peers[i];
    return NULL;
}

static char *backup_key(const char *keeper, const char *host, const char *vm)
{
    return lb_asprintf("%s\t%s\t%s", keeper, host, vm);
}

static void set_backup(struct build *b, json_t *vm, const char *host, const char *name, const char *backup)
{
    LB_AUTO_FREE char *key = backup_key(backup, host, name);

    json_object_set_new(vm, "backup", lb_json_text(backup));
    json_object_set_new(b->backups, key, json_true());
}

static void add_own(struct build *b, const struct lb_survey_vm *vm)
{
    const struct lb_merge *m = b->m;
    bool kvm = vm->described && vm->desc.accel && !strcmp(vm->desc.accel, "kvm");
    json_t *o = json_pack("{s:s, s:o, s:I, s:I, s:I, s:I}", "name", vm->name, "host", lb_json_text(m->self), "memory_bytes",
                          (json_int_t)vm->memory_bytes, "touched_bytes", (json_int_t)vm->touched_bytes,
                          "dirty_bytes_per_s", (json_int_t)LB_MIN(vm->dirty_bytes_per_s, LB_INV_MAX_BYTES), "priority",
                          (json_int_t)priority(m, vm->name));

    json_object_set_new(o, "require_tags", tag_list(&m->cfg->require_tags, vm->name));
    json_object_set_new(o, "forbid_tags", forbidden(m, vm->name));
    json_object_set_new(o, "together", groups(NULL, &m->cfg->together, vm->name));
    json_object_set_new(o, "apart", groups(NULL, &m->cfg->apart, vm->name));
    json_object_set_new(o, "blockers", blockers(vm));
    if (kvm) {
        json_object_set_new(o, "features", needed(b, vm));
        json_object_set(o, "cpu", json_object_get(json_array_get(b->hosts, 0), "cpu"));
    }
    if (vm->backup[0] && answering(m, vm->backup))
        set_backup(b, o, m->self, vm->name, vm->backup);
    json_object_set_new(b->names, vm->name, json_true());
    json_array_append_new(b->vms, o);
}

/* As the peer said it, by the names of this host; "backup" is still a key. */
static json_t *their_vm(const struct build *b, const struct lb_peer *p, const json_t *said)
{
    static const char *const fields[] = {"memory_bytes", "touched_bytes", "priority"};
    const char *name = json_string_value(json_object_get(said, "name"));
    json_t *o = json_pack("{s:o, s:o}", "name", lb_json_text(name), "host", lb_json_text(p->host.name)), *v;

    for (size_t i = 0; i < LB_ARRAY_LEN(fields); i++)
        if ((v = json_object_get(said, fields[i])))
            json_object_set(o, fields[i], v);
    name = name ? name : "";
    json_object_set_new(o, "together", groups(json_object_get(said, "together"), &b->m->cfg->together, name));
    json_object_set_new(o, "apart", groups(json_object_get(said, "apart"), &b->m->cfg->apart, name));
    json_object_set_new(o, "require_tags", tag_list(&b->m->cfg->require_tags, name)); /* for a new backup of it */
    json_object_set_new(o, "forbid_tags", tag_list(&b->m->cfg->forbid_tags, name));
    return o;
}

static json_t *their_vms(const struct build *b, const struct lb_peer *p)
{
    const json_t *said;
    json_t *vms = json_array();
    size_t i;

    json_array_foreach (json_object_get(p->fragment, "vms"), i, said)
        json_array_append_new(vms, their_vm(b, p, said));
    return vms;
}

/* Each name once. */
static void claim_name(struct build *b, const struct lb_peer *p, json_t *vm)
{
    const char *name = json_string_value(json_object_get(vm, "name"));

    if (json_object_get(b->names, name)) {
        LB_AUTO_FREE char *other = lb_asprintf("%.128s (%.100s)", name, p->host.name);

        json_object_set_new(vm, "name", lb_json_text(other));
        name = json_string_value(json_object_get(vm, "name"));
    }
    json_object_set_new(b->names, name, json_true());
}

/* Is the VM that this memory is kept for in the inventory, with its backup here? */
static bool counts_as_backup(const struct build *b, const char *keeper, const json_t *kept)
{
    const char *name = json_string_value(json_object_get(kept, "name")), *of = name_of(b->m, json_object_get(kept, "of"));
    LB_AUTO_FREE char *key = name && of ? backup_key(keeper, of, name) : NULL;

    return key && json_object_get(b->backups, key);
}

static void add_kept(struct build *b, json_t *host, const json_t *fragment)
{
    const char *name = json_string_value(json_object_get(host, "name"));
    uint64_t used = u64_of(host, "used_bytes");
    const json_t *k;
    size_t i;

    json_array_foreach (json_object_get(fragment, "kept"), i, k)
        if (!counts_as_backup(b, name, k))
            used += u64_of(k, "memory_bytes");
    json_object_set_new(host, "used_bytes", json_integer((json_int_t)LB_MIN(used, LB_INV_MAX_BYTES)));
}

/* ------------------------------------------------------------------------------- all */

static void add_host(struct build *b, const json_t *fragment, const char *name, uint64_t link)
{
    json_t *o = host_object(fragment, name, link), *cpuid = json_object_get(json_object_get(fragment, "host"), "features");

    json_object_set_new(o, "cpuid", json_is_array(cpuid) ? json_copy(cpuid) : json_array());
    json_array_append_new(b->hosts, o);
}

static uint64_t their_link(const struct lb_merge *m, const struct lb_peer *p)
{
    uint64_t link = p->link_bytes_per_s ? p->link_bytes_per_s : configured_link(p->fragment);

    return limited(m, link ? link : LINK_UNKNOWN);
}

static void drop(struct lb_peer *p)
{
    json_decref(p->fragment);
    p->fragment = NULL;
}

/* Before anybody relies on them. */
static void check_fragments(struct build *b)
{
    for (unsigned i = 0; i < b->m->n_peers; i++) {
        struct lb_peer *p = &b->m->peers[i];
        const char *key = json_string_value(json_object_get(p->fragment, "key"));
        json_t *host, *vms;

        if (!p->fragment)
            continue;
        host = host_object(p->fragment, p->host.name, their_link(b->m, p));
        vms = their_vms(b, p);
        if (!key || strcmp(key, p->key))
            lb_fail(&p->error, LB_E_PROTO, "it speaks for another key");
        else
            try_out(host, vms, &p->error);
        json_decref(host);
        json_decref(vms);
        if (p->error.code) {
            lb_remedy(&p->error, "see that lifeboatd of this version runs there");
            drop(p);
        }
    }
}

static void add_theirs(struct build *b, struct lb_peer *p)
{
    json_t *vms = their_vms(b, p), *vm, *said = json_object_get(p->fragment, "vms");
    const char *backup;
    size_t i;

    json_array_foreach (vms, i, vm) {
        backup = name_of(b->m, json_object_get(json_array_get(said, i), "backup"));
        if (backup && strcmp(backup, p->host.name))
            set_backup(b, vm, p->host.name, json_string_value(json_object_get(vm, "name")), backup);
        claim_name(b, p, vm);
        json_array_append(b->vms, vm);
    }
    json_decref(vms);
}

static void build(struct build *b)
{
    struct lb_merge *m = b->m;
    json_t *host;
    size_t i;

    check_fragments(b);
    add_host(b, m->fragment, m->self, own_link(m));
    for (unsigned k = 0; k < m->n_peers; k++)
        if (m->peers[k].fragment)
            add_host(b, m->peers[k].fragment, m->peers[k].host.name, their_link(m, &m->peers[k]));
    for (unsigned k = 0; k < m->n_vms; k++)
        add_own(b, &m->vms[k]);
    for (unsigned k = 0; k < m->n_peers; k++)
        if (m->peers[k].fragment)
            add_theirs(b, &m->peers[k]);
    settle_features(b);
    json_array_foreach (b->hosts, i, host) {
        const struct lb_peer *p = answering(m, json_string_value(json_object_get(host, "name")));

        add_kept(b, host, i ? p->fragment : m->fragment);
    }
}

int lb_capacity_merge(struct lb_merge *m, struct lb_inventory *out, struct lb_error *err)
{
    struct build b = {.m = m, .hosts = json_array(), .vms = json_array(), .names = json_object(), .backups = json_object()};
    json_t *o;

    build(&b);
    o = json_pack("{s:f, s:f, s:[s], s:o, s:o}", "setup_s", m->setup_s, "downtime_ms", m->downtime_ms, "evacuate", m->self,
                  "hosts", b.hosts, "vms", b.vms);
    LB_AUTO_FREE char *text = o ? json_dumps(o, JSON_COMPACT) : NULL;
    json_decref(o);
    json_decref(b.names);
    json_decref(b.backups);
    if (!text)
        return lb_fail(err, LB_E_INTERNAL, "cannot write the inventory as JSON");
    return lb_inventory_parse(text, strlen(text), out, err);
}
