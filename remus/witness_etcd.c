/* remus/witness_etcd.c - one key of etcd decides; the table of its states is in witness.h.
 *
 * Talks to the JSON gateway (/v3/kv/range, /v3/kv/txn), where keys and values are base64 and 64-bit
 * numbers are texts. Reads are linearizable and a transaction that may write goes through the log, so a
 * member without a majority has no answer to give: every answer with status 200 is definite.
 *
 * All members are asked the same at the same time. Each transaction is bound to the revision that was
 * seen or armed, so however often and however late it is carried out, it does its work once; the
 * answers that come second find our own nonce or id and mean the same. A claim is also bound to the
 * protection's id: a cluster that was set up anew counts its revisions from one again. One that was set
 * back (restored from a copy) must not tell both sides that they have lost: both would end their guest. */
#include "remus/witness_http.h"
#include "remus/witness_internal.h"

#include <inttypes.h>
#include <sodium.h>
#include <string.h>

#define ETCD_PORT 2379
#define RANGE "/v3/kv/range"
#define TXN "/v3/kv/txn"
#define LOOK_KEY "lifeboat/look"  /* never written */

enum key_state { KEY_ABSENT, KEY_ARMED, KEY_ALONE, KEY_PROMOTED, KEY_ENDED };
static const char *const key_states[] = {
    [KEY_ARMED] = "armed",
    [KEY_ALONE] = "alone",
    [KEY_PROMOTED] = "promoted",
    [KEY_ENDED] = "ended",
};

struct value {
    enum key_state state;
    uint64_t revision;           /* mod_revision of the key; 0 absent */
    char id[LB_PROTECT_ID_HEX];
    char owner[128];
    char host[64];               /* for people: node name of who wrote it */
    char nonce[LB_PROTECT_ID_HEX];
};

struct etcd {
    struct lb_http *http;
    enum lb_side side;
    const char *self_key;        /* of the setup */
    char host[64];
};

/* --------------------------------------------------------------------- JSON */

static json_t *base64(const char *text)
{
    size_t len = strlen(text);
    LB_AUTO_FREE char *out = lb_alloc(sodium_base64_ENCODED_LEN(len, sodium_base64_VARIANT_ORIGINAL));

    sodium_bin2base64(out, sodium_base64_ENCODED_LEN(len, sodium_base64_VARIANT_ORIGINAL),
                      (const unsigned char *)text, len, sodium_base64_VARIANT_ORIGINAL);
    return json_string(out);
}

/* NUL-terminated text of a base64 member, or NULL. */
static char *unbase64(const json_t *v)
{
    size_t len = json_string_length(v), got;
    LB_AUTO_FREE char *out = lb_alloc(len + 1);

    if (!json_is_string(v) ||
        sodium_base642bin((unsigned char *)out, len, json_string_value(v), len, NULL, &got, NULL,
                          sodium_base64_VARIANT_ORIGINAL))
        return NULL;
    out[got] = '\0';
    return LB_STEAL_PTR(out);
}

/* The gateway writes 64-bit numbers as texts; 0 when missing, as a zero is left out. */
static uint64_t number(const json_t *v)
{
    if (json_is_integer(v))
        return json_integer_value(v) > 0 ? (uint64_t)json_integer_value(v) : 0;
    return json_is_string(v) ? strtoull(json_string_value(v), NULL, 10) : 0;
}

static int copy(const json_t *o, const char *name, char *out, size_t cap)
{
    const json_t *v = json_object_get(o, name);

    if (!json_is_string(v) || json_string_length(v) >= cap)
        return -1;
    snprintf(out, cap, "%s", json_string_value(v));
    return 0;
}

static int parse_value(const json_t *o, struct value *v)
{
    char state[16];

    if (copy(o, "state", state, sizeof(state)) || copy(o, "id", v->id, sizeof(v->id)) ||
        copy(o, "owner", v->owner, sizeof(v->owner)) || copy(o, "host", v->host, sizeof(v->host)) ||
        copy(o, "nonce", v->nonce, sizeof(v->nonce)))
        return -1;
    for (unsigned i = 0; i < LB_ARRAY_LEN(key_states); i++)
        if (key_states[i] && !strcmp(key_states[i], state)) {
            v->state = (enum key_state)i;
            return 0;
        }
    return -1;
}

/* From the answer of a range: what the one key says. */
static int parse_range(const json_t *range, struct value *v, struct lb_error *err)
{
    const json_t *kv = json_array_get(json_object_get(range, "kvs"), 0);
    int bad;

    memset(v, 0, sizeof(*v));
    if (!kv)
        return 0;
    v->revision = number(json_object_get(kv, "mod_revision"));
    LB_AUTO_FREE char *text = unbase64(json_object_get(kv, "value"));
    json_t *o = text ? json_loads(text, 0, NULL) : NULL;
    bad = parse_value(o, v);
    json_decref(o);
    if (bad || !v->revision)
        return lb_fail(err, LB_E_PROTO, "the witness's key was written by something else");
    return 0;
}

static json_t *range_of(const char *key)
{
    json_t *o = json_object();

    json_object_set_new(o, "key", base64(key));
    return o;
}

static json_t *list_of(json_t *one)
{
    json_t *list = json_array();

    json_array_append_new(list, one);
    return list;
}

static json_t *wrap(const char *name, json_t *inner)
{
    json_t *o = json_object();

    json_object_set_new(o, name, inner);
    return o;
}

/* Begins with the id: so a transaction can compare it without knowing the rest. */
#define ID_FIRST "{\"id\":\"%s\""

static char *value_text(const struct value *v)
{
    json_t *o = json_object();
    char *text;

    json_object_set_new(o, "id", json_string(v->id));
    json_object_set_new(o, "state", json_string(key_states[v->state]));
    json_object_set_new(o, "owner", json_string(v->owner));
    json_object_set_new(o, "host", json_string(v->host));
    json_object_set_new(o, "nonce", json_string(v->nonce));
    text = json_dumps(o, JSON_COMPACT);
    json_decref(o);
    return text;
}

static json_t *compare(const char *key, const char *target, const char *result, const char *name,
                       json_t *value)
{
    json_t *o = json_object();

    json_object_set_new(o, "key", base64(key));
    json_object_set_new(o, "target", json_string(target));
    json_object_set_new(o, "result", json_string(result));
    json_object_set_new(o, name, value);
    return o;
}

/* If the key is at `revision` (0: absent) and, with id, of that protection, it becomes `v`; if not, what
 * is it? */
static char *txn_text(const char *key, uint64_t revision, const char *id, const struct value *v)
{
    LB_AUTO_FREE char *plain = value_text(v);
    json_t *put = json_object(), *compares = json_array(), *txn = json_object();
    char text[24], *out;

    snprintf(text, sizeof(text), "%" PRIu64, revision);
    json_array_append_new(compares, compare(key, "MOD", "EQUAL", "mod_revision", json_string(text)));
    if (id) {
        LB_AUTO_FREE char *least = lb_asprintf(ID_FIRST, id);
        LB_AUTO_FREE char *most = lb_asprintf(ID_FIRST "~", id);

        json_array_append_new(compares, compare(key, "VALUE", "GREATER", "value", base64(least)));
        json_array_append_new(compares, compare(key, "VALUE", "LESS", "value", base64(most)));
    }
    json_object_set_new(put, "key", base64(key));
    json_object_set_new(put, "value", base64(plain ? plain : ""));
    json_object_set_new(txn, "compare", compares);
    json_object_set_new(txn, "success", list_of(wrap("request_put", put)));
    json_object_set_new(txn, "failure", list_of(wrap("request_range", range_of(key))));
    out = plain ? json_dumps(txn, JSON_COMPACT) : NULL;
    json_decref(txn);
    return out;
}

/* ---------------------------------------------------------------- questions */

static int get(struct etcd *e, const char *key, struct value *v, uint64_t deadline_ns,
               struct lb_error *err)
{
    json_t *o = range_of(key), *answer;
    LB_AUTO_FREE char *body = json_dumps(o, JSON_COMPACT);
    int rc;

    json_decref(o);
    if (lb_http_ask(e->http, RANGE, body, deadline_ns, &answer, err))
        return -1;
    rc = parse_range(answer, v, err);
    json_decref(answer);
    return rc;
}

/* 1: written, now->revision is its revision; 0: the key was not at that revision (or of another id, unless
 * that is NULL), *now is what it says. */
static int put_if(struct etcd *e, const char *key, uint64_t revision, const char *id,
                  const struct value *v, struct value *now, uint64_t deadline_ns,
                  struct lb_error *err)
{
    LB_AUTO_FREE char *body = txn_text(key, revision, id, v);
    const json_t *first;
    json_t *answer;
    int rc = 1;

    if (!body)
        return lb_fail(err, LB_E_INTERNAL, "cannot write a witness's transaction as JSON");
    if (lb_http_ask(e->http, TXN, body, deadline_ns, &answer, err))
        return -1;
    first = json_array_get(json_object_get(answer, "responses"), 0);
    if (json_is_true(json_object_get(answer, "succeeded"))) {
        *now = *v;
        now->revision = number(json_object_get(json_object_get(answer, "header"), "revision"));
        if (!now->revision)
            rc = lb_fail(err, LB_E_PROTO, "the witness's answer has no revision");
    } else if (json_is_object(json_object_get(first, "response_range"))) {
        rc = parse_range(json_object_get(first, "response_range"), now, err);
    } else {
        rc = lb_fail(err, LB_E_PROTO, "the witness's answer is no answer to a transaction");
    }
    json_decref(answer);
    return rc;
}

static struct value value_of(const struct etcd *e, enum key_state state, const char *id,
                             const char *nonce)
{
    struct value v = {.state = state};

    snprintf(v.id, sizeof(v.id), "%s", id);
    snprintf(v.owner, sizeof(v.owner), "%s", e->self_key);
    snprintf(v.host, sizeof(v.host), "%s", e->host);
    snprintf(v.nonce, sizeof(v.nonce), "%s", nonce);
    return v;
}

static bool is_mine(const struct etcd *e, const struct value *v)
{
    return v->state != KEY_ABSENT && !strcmp(v->owner, e->self_key);
}

/* ------------------------------------------------------------------- the ops */

static int etcd_open(const struct lb_witness_setup *s, void **impl, struct lb_error *err)
{
    struct etcd *e = lb_alloc(sizeof(*e));
    json_t *look = range_of(LOOK_KEY);
    LB_AUTO_FREE char *body = json_dumps(look, JSON_COMPACT);

    json_decref(look);
    e->side = s->side;
    e->self_key = s->self_key;
    if (gethostname(e->host, sizeof(e->host) - 1) || !*e->host)
        snprintf(e->host, sizeof(e->host), "unknown");
    for (char *p = e->host; *p; p++) /* JSON takes no odd bytes */
        if (*p < ' ' || *p > '~')
            *p = '?';
    if (lb_http_open(s->rest, ETCD_PORT, RANGE, body, &e->http, err)) {
        free(e);
        return -1;
    }
    *impl = e;
    return 0;
}

static void etcd_close(void *impl)
{
    struct etcd *e = impl;

    lb_http_close(e->http);
    free(e);
}

static int elsewhere(const char *key, const struct value *v, struct lb_error *err)
{
    lb_fail(err, LB_E_STATE, "the witness says that this VM %s on another host: %s, key %.64s",
            v->state == KEY_ARMED ? "is protected" : "runs since a failover", v->host, v->owner);
    return lb_remedy(err, "protect it there; when it does not run there any more, remove the key: "
                          "etcdctl del %s", key);
}

static int etcd_arm(void *impl, struct lb_remus_record *r, uint64_t deadline_ns, struct lb_error *err)
{
    struct etcd *e = impl;
    struct value want = value_of(e, KEY_ARMED, r->id, r->id), now;
    int done;

    if (get(e, r->key, &now, deadline_ns, err))
        return -1;
    for (;;) {
        /* another member's answer may have been the first to count */
        if (now.state == KEY_ARMED && is_mine(e, &now) && !strcmp(now.id, r->id)) {
            r->revision = now.revision;
            return 0;
        }
        if ((now.state == KEY_ARMED || now.state == KEY_PROMOTED) && !is_mine(e, &now))
            return elsewhere(r->key, &now, err);
        done = put_if(e, r->key, now.revision, NULL, &want, &now, deadline_ns, err);
        if (done < 0)
            return -1;
    }
}

static enum lb_claim etcd_claim(void *impl, const struct lb_remus_record *r, uint64_t deadline_ns,
                                struct lb_error *err)
{
    struct etcd *e = impl;
    enum key_state state = e->side == LB_SIDE_PRIMARY ? KEY_ALONE : KEY_PROMOTED;
    struct value want = value_of(e, state, r->id, r->nonce), now;
    int done = put_if(e, r->key, r->revision, r->id, &want, &now, deadline_ns, err);

    if (done < 0)
        return LB_CLAIM_UNREACHABLE;
    if (done > 0 || (is_mine(e, &now) && !strcmp(now.nonce, r->nonce)))
        return LB_CLAIM_WON;
    /* Every write makes a later revision: what is not later was not written after it was armed. */
    if (now.state == KEY_ABSENT || now.revision <= r->revision) {
        lb_fail(err, LB_E_STATE, "the witness has lost its memory: key %s is %s", r->key,
                now.state == KEY_ABSENT ? "gone" : "as it was before");
        lb_remedy(err, "find out which host may run the VM and stop the other's copy");
        return LB_CLAIM_UNREACHABLE;
    }
    lb_fail(err, LB_E_STATE, "the witness gave the VM to another claim: %s by %s, key %.64s",
            key_states[now.state], now.host, now.owner);
    return LB_CLAIM_LOST;
}

static int etcd_disarm(void *impl, const struct lb_remus_record *r, uint64_t deadline_ns,
                       struct lb_error *err)
{
    struct etcd *e = impl;
    struct value want = value_of(e, KEY_ENDED, r->id, ""), now;

    if (get(e, r->key, &now, deadline_ns, err))
        return -1;
    while (is_mine(e, &now) && now.state != KEY_ENDED && !strcmp(now.id, r->id)) {
        int done = put_if(e, r->key, now.revision, NULL, &want, &now, deadline_ns, err);

        if (done < 0)
            return -1;
    }
    return 0;
}

static int etcd_read(void *impl, const char *key, struct lb_witness_state *out, uint64_t deadline_ns,
                     struct lb_error *err)
{
    struct value v;

    memset(out, 0, sizeof(*out));
    if (get(impl, key, &v, deadline_ns, err))
        return -1;
    out->present = v.state != KEY_ABSENT;
    out->revision = v.revision;
    out->armed = v.state == KEY_ARMED;
    snprintf(out->id, sizeof(out->id), "%s", v.id);
    snprintf(out->owner, sizeof(out->owner), "%s", v.owner);
    snprintf(out->nonce, sizeof(out->nonce), "%s", v.nonce);
    return 0;
}

static bool etcd_healthy(void *impl, char why[160])
{
    struct etcd *e = impl;

    return lb_http_healthy(e->http, why);
}

const struct lb_witness_ops lb_witness_etcd = {
    .kind = "etcd",
    .automatic = true,
    .remembers = true,
    .open = etcd_open,
    .close = etcd_close,
    .arm = etcd_arm,
    .claim = etcd_claim,
    .disarm = etcd_disarm,
    .read = etcd_read,
    .healthy = etcd_healthy,
};
