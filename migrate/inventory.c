/*
 * migrate/inventory.c - JSON of an inventory: one table per kind of object says what its fields are
 * called, what they hold and where they go; reading, checking and writing follow the tables.
 */
#include "migrate/inventory.h"

#include <jansson.h>
#include <math.h>
#include <string.h>

enum kind { F_TEXT, F_BYTES, F_RATE, F_NUMBER, F_REAL, F_BOOL, F_WORDS, F_HOST, F_HOSTS, F_BLOCKERS, F_SECTION };

struct field {
    const char *key;
    enum kind kind;
    size_t at;
    bool needed;
};

static const struct field host_fields[] = {
    {"name", F_TEXT, offsetof(struct lb_inv_host, name), true},
    {"memory_bytes", F_BYTES, offsetof(struct lb_inv_host, memory_bytes), true},
    {"reserved_bytes", F_BYTES, offsetof(struct lb_inv_host, reserved_bytes), false},
    {"used_bytes", F_BYTES, offsetof(struct lb_inv_host, used_bytes), false},
    {"cpus", F_NUMBER, offsetof(struct lb_inv_host, cpus), false},
    {"cpu", F_TEXT, offsetof(struct lb_inv_host, cpu), false},
    {"generation", F_NUMBER, offsetof(struct lb_inv_host, generation), false},
    {"features", F_WORDS, offsetof(struct lb_inv_host, features), false},
    {"tags", F_WORDS, offsetof(struct lb_inv_host, tags), false},
    {"link_bytes_per_s", F_RATE, offsetof(struct lb_inv_host, link_bytes_per_s), true},
    {"maintenance", F_BOOL, offsetof(struct lb_inv_host, maintenance), false},
    {0},
};
static const struct field vm_fields[] = {
    {"name", F_TEXT, offsetof(struct lb_inv_vm, name), true},
    {"host", F_HOST, offsetof(struct lb_inv_vm, host), true},
    {"memory_bytes", F_BYTES, offsetof(struct lb_inv_vm, memory_bytes), true},
    {"touched_bytes", F_BYTES, offsetof(struct lb_inv_vm, touched_bytes), false},
    {"dirty_bytes_per_s", F_BYTES, offsetof(struct lb_inv_vm, dirty_bytes_per_s), false},
    {"cpu", F_TEXT, offsetof(struct lb_inv_vm, cpu), false},
    {"generation", F_NUMBER, offsetof(struct lb_inv_vm, generation), false},
    {"features", F_WORDS, offsetof(struct lb_inv_vm, features), false},
    {"require_tags", F_WORDS, offsetof(struct lb_inv_vm, require_tags), false},
    {"forbid_tags", F_WORDS, offsetof(struct lb_inv_vm, forbid_tags), false},
    {"together", F_WORDS, offsetof(struct lb_inv_vm, together), false},
    {"apart", F_WORDS, offsetof(struct lb_inv_vm, apart), false},
    {"priority", F_NUMBER, offsetof(struct lb_inv_vm, priority), false},
    {"backup", F_HOST, offsetof(struct lb_inv_vm, backup), false},
    {"blockers", F_BLOCKERS, offsetof(struct lb_inv_vm, blockers), false},
    {0},
};
static const struct field top_fields[] = {
    {"setup_s", F_REAL, offsetof(struct lb_inventory, setup_s), false},
    {"downtime_ms", F_REAL, offsetof(struct lb_inventory, downtime_ms), false},
    {"evacuate", F_HOSTS, offsetof(struct lb_inventory, evacuate), false},
    {"to", F_HOSTS, offsetof(struct lb_inventory, to), false},
    {"hosts", F_SECTION, 0, true},
    {"vms", F_SECTION, 0, true},
    {0},
};

/* While reading: what is known by name so far. */
struct reader {
    struct lb_inventory *inv;
    json_t *hosts, *vms, *words;  /* name -> index */
    struct lb_error *err;
};

static int bad(struct reader *r, const char *where, const char *key, const char *what, const char *remedy)
{
    lb_fail(r->err, LB_E_USAGE, "inventory: %.200s%s%s %s", where, *where && *key ? "." : "", key, what);
    return lb_remedy(r->err, "%s", remedy);
}

/* ---------------------------------------------------------------------------- sets */

static int by_id(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

    return (x > y) - (x < y);
}

static void set_add(struct lb_inv_set *s, uint32_t id)
{
    s->ids[s->n++] = id;
}

static void set_finish(struct lb_inv_set *s)
{
    uint32_t n = 0;

    if (!s->n)
        return;
    qsort(s->ids, s->n, sizeof(*s->ids), by_id);
    for (uint32_t i = 0; i < s->n; i++)
        if (!n || s->ids[n - 1] != s->ids[i])
            s->ids[n++] = s->ids[i];
    s->n = n;
}

bool lb_inv_has(const struct lb_inv_set *s, uint32_t id)
{
    return s->n && bsearch(&id, s->ids, s->n, sizeof(id), by_id);
}

uint32_t lb_inv_host_find(const struct lb_inventory *inv, const char *name)
{
    for (uint32_t i = 0; i < inv->n_hosts; i++)
        if (!strcmp(inv->hosts[i].name, name))
            return i;
    return LB_INV_NONE;
}

/* -------------------------------------------------------------------------- reading */

static bool good_text(const json_t *v)
{
    return json_is_string(v) && json_string_length(v) >= 1 && json_string_length(v) <= 255;
}

static uint32_t word_id(struct reader *r, const char *word)
{
    struct lb_inventory *inv = r->inv;
    json_t *known = json_object_get(r->words, word);

    if (known)
        return (uint32_t)json_integer_value(known);
    if (!(inv->n_words & (inv->n_words - 1))) /* room is a power of two */
        inv->words = lb_realloc(inv->words, (inv->n_words ? 2 * (size_t)inv->n_words : 1) * sizeof(*inv->words));
    inv->words[inv->n_words] = lb_strdup(word);
    json_object_set_new(r->words, word, json_integer(inv->n_words));
    return inv->n_words++;
}

static int read_set(struct reader *r, const char *where, const struct field *f, const json_t *v, struct lb_inv_set *out)
{
    size_t i;
    json_t *e;

    if (!json_is_array(v))
        return bad(r, where, f->key, "is no list", "write [\"NAME\", ...]");
    out->ids = lb_alloc((json_array_size(v) + 1) * sizeof(*out->ids));
    json_array_foreach (v, i, e) {
        const json_t *host;

        if (!good_text(e))
            return bad(r, where, f->key, "has an entry that is no name", "names are strings of 1 to 255 bytes");
        if (f->kind == F_WORDS) {
            set_add(out, word_id(r, json_string_value(e)));
            continue;
        }
        host = json_object_get(r->hosts, json_string_value(e));
        if (!host)
            return bad(r, where, f->key, "names a host that is not in \"hosts\"", "add the host, or correct its name");
        set_add(out, (uint32_t)json_integer_value(host));
    }
    set_finish(out);
    return 0;
}

static int read_bytes(struct reader *r, const char *where, const struct field *f, const json_t *v, uint64_t *out)
{
    uint64_t n = 0;
    bool ok;

    if (json_is_string(v)) {
        ok = !(f->kind == F_RATE ? lb_parse_rate : lb_parse_size)(json_string_value(v), &n, NULL);
    } else {
        double d = json_number_value(v);

        ok = json_is_number(v) && d >= 0 && d <= (double)LB_INV_MAX_BYTES;
        n = ok ? (uint64_t)d : 0;
    }
    if (!ok || n > LB_INV_MAX_BYTES)
        return bad(r, where, f->key, "is no size", f->kind == F_RATE ? "write a number, or a string such as \"10Gbit\""
                                                                     : "write a number, or a string such as \"4G\"");
    *out = n;
    return 0;
}

static int read_blockers(struct reader *r, const char *where, const json_t *v, struct lb_inv_vm *vm)
{
    static const char remedy[] = "write [{\"message\": \"...\", \"remedy\": \"...\"}]";
    size_t i;
    json_t *e;

    if (!json_is_array(v))
        return bad(r, where, "blockers", "is no list", remedy);
    vm->blockers = lb_alloc((json_array_size(v) + 1) * sizeof(*vm->blockers));
    json_array_foreach (v, i, e) {
        const char *message = NULL, *cure = "";

        if (json_unpack_ex(e, NULL, JSON_STRICT, "{s:s, s?s}", "message", &message, "remedy", &cure))
            return bad(r, where, "blockers", "has an entry that is no blocker", remedy);
        vm->blockers[vm->n_blockers].message = lb_strdup(message);
        vm->blockers[vm->n_blockers++].remedy = lb_strdup(cure);
    }
    return 0;
}

static int read_field(struct reader *r, const char *where, const struct field *f, const json_t *v, void *object)
{
    void *at = (char *)object + f->at;

    switch (f->kind) {
    case F_TEXT:
        if (!good_text(v))
            return bad(r, where, f->key, "is no name", "names are strings of 1 to 255 bytes");
        *(char **)at = lb_strdup(json_string_value(v));
        return 0;
    case F_BYTES:
    case F_RATE:
        return read_bytes(r, where, f, v, at);
    case F_NUMBER:
        if (!json_is_integer(v) || json_integer_value(v) < 0 || json_integer_value(v) > INT32_MAX)
            return bad(r, where, f->key, "is no whole number from 0", "write a number without quotes");
        *(uint32_t *)at = (uint32_t)json_integer_value(v);
        return 0;
    case F_REAL:
        if (!json_is_number(v) || json_number_value(v) < 0 || json_number_value(v) > 1e6)
            return bad(r, where, f->key, "is no number from 0 to 1000000", "write a number without quotes");
        *(double *)at = json_number_value(v);
        return 0;
    case F_BOOL:
        if (!json_is_boolean(v))
            return bad(r, where, f->key, "is neither true nor false", "write true or false without quotes");
        *(bool *)at = json_is_true(v);
        return 0;
    case F_HOST: {
        const json_t *host = json_is_string(v) ? json_object_get(r->hosts, json_string_value(v)) : NULL;

        if (!host)
            return bad(r, where, f->key, "names a host that is not in \"hosts\"", "add the host, or correct its name");
        *(uint32_t *)at = (uint32_t)json_integer_value(host);
        return 0;
    }
    case F_WORDS:
    case F_HOSTS:
        return read_set(r, where, f, v, at);
    case F_BLOCKERS:
        return read_blockers(r, where, v, object);
    case F_SECTION:
        break;
    }
    return json_is_array(v) ? 0 : bad(r, where, f->key, "is no list", "write [{...}, ...]");
}

static int read_object(struct reader *r, const char *where, const struct field *fields, json_t *o, void *out)
{
    const char *key;
    json_t *v;

    if (!json_is_object(o))
        return bad(r, where, "", *where ? "is no object" : "the whole is no object", "write {\"name\": ...}");
    json_object_foreach (o, key, v) {
        const struct field *f = fields;

        while (f->key && strcmp(f->key, key))
            f++;
        if (!f->key) {
            LB_AUTO_FREE char *shown = lb_asprintf("%.64s", key);

            return bad(r, where, shown, "is not known", "correct its name; lifeboat-plan(1) lists the fields");
        }
        if (read_field(r, where, f, v, out))
            return -1;
    }
    for (const struct field *f = fields; f->key; f++)
        if (f->needed && !json_object_get(o, f->key))
            return bad(r, where, f->key, "is missing", "add it; lifeboat-plan(1) lists the fields");
    return 0;
}

/* hosts[3] or vms[3], with its name when it has one */
static void say_where(char *buf, size_t n, const char *section, size_t i, json_t *o)
{
    const json_t *name = json_object_get(o, "name");

    if (good_text(name))
        snprintf(buf, n, "%s[%zu] (\"%.100s\")", section, i, json_string_value(name));
    else
        snprintf(buf, n, "%s[%zu]", section, i);
}

static int claim_name(struct reader *r, json_t *names, const char *where, const char *name, uint32_t index)
{
    if (json_object_get(names, name))
        return bad(r, where, "name", "is there twice", "give each a name of its own");
    json_object_set_new(names, name, json_integer(index));
    return 0;
}

static int read_hosts(struct reader *r, json_t *list)
{
    struct lb_inventory *inv = r->inv;
    char where[160];
    size_t i;
    json_t *o;

    inv->hosts = lb_alloc((json_array_size(list) + 1) * sizeof(*inv->hosts));
    json_array_foreach (list, i, o) {
        struct lb_inv_host *h = &inv->hosts[inv->n_hosts++];

        h->cpus = 1;
        say_where(where, sizeof(where), "hosts", i, o);
        if (read_object(r, where, host_fields, o, h) || claim_name(r, r->hosts, where, h->name, (uint32_t)i))
            return -1;
        if (!h->link_bytes_per_s)
            return bad(r, where, "link_bytes_per_s", "is 0", "give what the link carries, such as \"10Gbit\"");
        if (!h->cpus)
            return bad(r, where, "cpus", "is 0", "leave it out when it is not known");
    }
    return 0;
}

static int read_vms(struct reader *r, json_t *list)
{
    struct lb_inventory *inv = r->inv;
    char where[160];
    size_t i;
    json_t *o;

    inv->vms = lb_alloc((json_array_size(list) + 1) * sizeof(*inv->vms));
    json_array_foreach (list, i, o) {
        struct lb_inv_vm *v = &inv->vms[inv->n_vms++];

        v->backup = LB_INV_NONE;
        v->touched_bytes = UINT64_MAX;
        say_where(where, sizeof(where), "vms", i, o);
        if (read_object(r, where, vm_fields, o, v) || claim_name(r, r->vms, where, v->name, (uint32_t)i))
            return -1;
        v->touched_bytes = LB_MIN(v->touched_bytes, v->memory_bytes);
        if (v->backup == v->host)
            return bad(r, where, "backup", "is the host it runs on", "name another host, or leave it out");
    }
    return 0;
}

static int read_all(struct reader *r, json_t *root)
{
    static const struct field sections[] = {{"hosts", F_SECTION, 0, true}, {0}};
    json_t *hosts = json_object_get(root, "hosts");

    /* hosts first: all else names them */
    if (!json_is_object(root))
        return bad(r, "", "", "the whole is no object", "write {\"hosts\": [...], \"vms\": [...]}");
    if (hosts && (read_field(r, "", &sections[0], hosts, NULL) || read_hosts(r, hosts)))
        return -1;
    if (read_object(r, "", top_fields, root, r->inv))
        return -1;
    return read_vms(r, json_object_get(root, "vms"));
}

int lb_inventory_parse(const char *text, size_t len, struct lb_inventory *out, struct lb_error *err)
{
    struct lb_inventory inv = {.setup_s = 0.35, .downtime_ms = 30};
    json_error_t je;
    json_t *root = json_loadb(text, len, JSON_REJECT_DUPLICATES, &je);
    struct reader r = {&inv, json_object(), json_object(), json_object(), err};
    int rc;

    if (!root) {
        lb_fail(err, LB_E_USAGE, "inventory: line %d: %.120s", je.line, je.text);
        rc = lb_remedy(err, "correct that line");
    } else {
        rc = read_all(&r, root);
    }
    json_decref(root);
    json_decref(r.hosts);
    json_decref(r.vms);
    json_decref(r.words);
    if (rc)
        lb_inventory_free(&inv);
    else
        *out = inv;
    return rc;
}

int lb_inventory_load(const char *path, struct lb_inventory *out, struct lb_error *err)
{
    LB_AUTO_FREE char *text = NULL;
    size_t len;

    if (lb_file_read(path, LB_INV_MAX_FILE, &text, &len, err))
        return -1;
    return lb_inventory_parse(text, len, out, err) ? lb_context(err, "%.200s", path) : 0;
}

/* -------------------------------------------------------------------------- writing */

static json_t *dump_set(const struct lb_inventory *inv, const struct lb_inv_set *s, bool hosts)
{
    json_t *a = json_array();

    for (uint32_t i = 0; i < s->n; i++)
        json_array_append_new(a, json_string(hosts ? inv->hosts[s->ids[i]].name : inv->words[s->ids[i]]));
    return a;
}

static json_t *dump_blockers(const struct lb_inv_vm *vm)
{
    json_t *a = json_array();

    for (uint32_t i = 0; i < vm->n_blockers; i++)
        json_array_append_new(a, json_pack("{s:s, s:s}", "message", vm->blockers[i].message, "remedy",
                                           vm->blockers[i].remedy));
    return a;
}

static json_t *dump_field(const struct lb_inventory *inv, const struct field *f, const void *object)
{
    const void *at = (const char *)object + f->at;

    switch (f->kind) {
    case F_TEXT:
        return *(char *const *)at ? json_string(*(char *const *)at) : NULL;
    case F_BYTES:
    case F_RATE:
        return json_integer((json_int_t) * (const uint64_t *)at);
    case F_NUMBER:
        return json_integer(*(const uint32_t *)at);
    case F_REAL:
        return json_real(*(const double *)at);
    case F_BOOL:
        return json_boolean(*(const bool *)at);
    case F_WORDS:
    case F_HOSTS:
        return dump_set(inv, at, f->kind == F_HOSTS);
    case F_HOST:
        return *(const uint32_t *)at == LB_INV_NONE ? NULL : json_string(inv->hosts[*(const uint32_t *)at].name);
    case F_BLOCKERS:
        return dump_blockers(object);
    case F_SECTION:
        break;
    }
    return NULL;
}

static json_t *dump_object(const struct lb_inventory *inv, const struct field *fields, const void *object)
{
    json_t *o = json_object();

    for (const struct field *f = fields; f->key; f++) {
        json_t *v = dump_field(inv, f, object);

        if (v)
            json_object_set_new(o, f->key, v);
    }
    return o;
}

char *lb_inventory_dump(const struct lb_inventory *inv)
{
    json_t *root = dump_object(inv, top_fields, inv), *hosts = json_array(), *vms = json_array();
    char *text;

    for (uint32_t i = 0; i < inv->n_hosts; i++)
        json_array_append_new(hosts, dump_object(inv, host_fields, &inv->hosts[i]));
    for (uint32_t i = 0; i < inv->n_vms; i++)
        json_array_append_new(vms, dump_object(inv, vm_fields, &inv->vms[i]));
    json_object_set_new(root, "hosts", hosts);
    json_object_set_new(root, "vms", vms);
    text = json_dumps(root, JSON_INDENT(1) | JSON_REAL_PRECISION(12));
    json_decref(root);
    return text;
}

static void free_vm(struct lb_inv_vm *v)
{
    for (uint32_t i = 0; i < v->n_blockers; i++) {
        free(v->blockers[i].message);
        free(v->blockers[i].remedy);
    }
    free(v->blockers);
    free(v->name);
    free(v->cpu);
    free(v->features.ids);
    free(v->require_tags.ids);
    free(v->forbid_tags.ids);
    free(v->together.ids);
    free(v->apart.ids);
}

void lb_inventory_free(struct lb_inventory *inv)
{
    for (uint32_t i = 0; i < inv->n_hosts; i++) {
        free(inv->hosts[i].name);
        free(inv->hosts[i].cpu);
        free(inv->hosts[i].features.ids);
        free(inv->hosts[i].tags.ids);
    }
    for (uint32_t i = 0; i < inv->n_vms; i++)
        free_vm(&inv->vms[i]);
    for (uint32_t i = 0; i < inv->n_words; i++)
        free(inv->words[i]);
    free(inv->hosts);
    free(inv->vms);
    free(inv->words);
    free(inv->evacuate.ids);
    free(inv->to.ids);
    *inv = (struct lb_inventory){0};
}
