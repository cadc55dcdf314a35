/* remus/directory.c - see directory.h. Talks to etcd's JSON gateway as the witness does (witness_http.h). */
#include "remus/directory.h"

#include <arpa/inet.h>
#include <inttypes.h>
#include <netdb.h>
#include <sodium.h>
#include <string.h>
#include <sys/socket.h>

#include "core/json.h"
#include "migrate/inventory.h"
#include "remus/witness_http.h"

#define ETCD_PORT 2379
#define PREFIX "lifeboat/hosts/"
#define PREFIX_END "lifeboat/hosts0" /* '0' comes after '/' */
#define PAGE_HOSTS 50                /* an answer has at most 256 KiB */
#define MOST_HOSTS 10000u
#define FINGERPRINT_CHARS 16         /* of the key's digits */

static int open_http(const char *spec, struct lb_http **out, struct lb_error *err)
{
    /* A key that is never written: is anybody there? */
    return lb_http_open(spec + strlen("etcd:"), ETCD_PORT, "/v3/kv/range", "{\"key\":\"bGlmZWJvYXQvbG9vaw==\"}", out, err);
}

static json_t *base64(const char *text)
{
    size_t len = strlen(text), cap = sodium_base64_ENCODED_LEN(len, sodium_base64_VARIANT_ORIGINAL);
    LB_AUTO_FREE char *out = lb_alloc(cap);

    sodium_bin2base64(out, cap, (const unsigned char *)text, len, sodium_base64_VARIANT_ORIGINAL);
    return json_string(out);
}

/* NUL-terminated; NULL: it is no base64. */
static char *unbase64(const json_t *v)
{
    size_t len = json_string_length(v), got;
    LB_AUTO_FREE char *out = lb_alloc(len + 1);

    if (!json_is_string(v) || sodium_base642bin((unsigned char *)out, len, json_string_value(v), len, NULL, &got, NULL,
                                                sodium_base64_VARIANT_ORIGINAL))
        return NULL;
    out[got] = '\0';
    return LB_STEAL_PTR(out);
}

/* Takes question. */
static int ask(struct lb_http *h, const char *path, json_t *question, uint64_t deadline_ns, json_t **answer,
               struct lb_error *err)
{
    LB_AUTO_FREE char *body = json_dumps(question, JSON_COMPACT);

    json_decref(question);
    if (!body)
        return lb_fail(err, LB_E_INTERNAL, "cannot write a question to the directory as JSON");
    return lb_http_ask(h, path, body, deadline_ns, answer, err);
}

/* ------------------------------------------------------------------------ publishing */

/* The first server of the list, as HOST and PORT. */
static int first_server(const char *spec, char host[256], char port[8], struct lb_error *err)
{
    const char *url = spec + strlen("etcd:");
    char text[300];
    uint16_t number;

    if (!strncmp(url, "http://", 7))
        url += 7;
    snprintf(text, sizeof(text), "%.*s", (int)strcspn(url, ",/"), url);
    if (lb_parse_hostport(text, ETCD_PORT, host, &number, err))
        return -1;
    snprintf(port, 8, "%u", number);
    return 0;
}

/* The address that packets to the directory would have; none is sent. */
static int own_address(const char *spec, char out[256], struct lb_error *err)
{
    struct addrinfo hints = {.ai_socktype = SOCK_DGRAM}, *list = NULL;
    struct sockaddr_storage a;
    socklen_t len = sizeof(a);
    char host[256], port[8];
    int rc;

    if (first_server(spec, host, port, err))
        return -1;
    rc = getaddrinfo(host, port, &hints, &list);
    if (rc)
        return lb_fail(err, LB_E_NET, "directory %s: %s", host, gai_strerror(rc));
    LB_AUTO_FD int s = socket(list->ai_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    rc = s < 0 || connect(s, list->ai_addr, list->ai_addrlen) || getsockname(s, (struct sockaddr *)&a, &len) ||
         getnameinfo((struct sockaddr *)&a, len, out, 256, NULL, 0, NI_NUMERICHOST);
    freeaddrinfo(list);
    return rc ? lb_fail(err, LB_E_NET, "there is no way from here to the directory %s", host) : 0;
}

int lb_directory_address(const char *spec, const char *listen, char out[280], struct lb_error *err)
{
    char host[256];
    uint16_t port;

    if (!strcmp(listen, "none"))
        return lb_fail(err, LB_E_NET, "this host listens nowhere");
    if (lb_parse_hostport(listen, LB_DEFAULT_PORT, host, &port, err))
        return -1;
    if ((!host[0] || !strcmp(host, "0.0.0.0") || !strcmp(host, "::")) && own_address(spec, host, err))
        return -1;
    snprintf(out, 280, strchr(host, ':') ? "[%.255s]:%u" : "%.255s:%u", host, port);
    return 0;
}

static json_t *entry_of(const char *address, const json_t *fragment)
{
    json_t *host = json_copy(json_object_get(fragment, "host"));

    json_object_del(host, "features");
    return json_pack("{s:O, s:O, s:o, s:o, s:I}", "name", json_object_get(host, "name"), "key",
                     json_object_get(fragment, "key"), "address", lb_json_text(address), "host", host, "vms",
                     (json_int_t)json_array_size(json_object_get(fragment, "vms")));
}

static int lease(struct lb_http *h, uint64_t deadline_ns, char id[32], struct lb_error *err)
{
    json_t *answer;
    int rc;

    if (ask(h, "/v3/lease/grant", json_pack("{s:i}", "TTL", LB_DIRECTORY_LEASE_S), deadline_ns, &answer, err))
        return -1;
    rc = lb_json_get_string(answer, "ID", id, 32); /* 64 bits: the gateway writes them as a text */
    json_decref(answer);
    return rc ? lb_fail(err, LB_E_PROTO, "the directory's answer has no lease") : 0;
}

static int put(struct lb_http *h, const char *key, const char *value, uint64_t deadline_ns, struct lb_error *err)
{
    json_t *answer;
    char id[32];

    if (lease(h, deadline_ns, id, err) ||
        ask(h, "/v3/kv/put", json_pack("{s:o, s:o, s:s}", "key", base64(key), "value", base64(value), "lease", id), deadline_ns,
            &answer, err))
        return -1;
    json_decref(answer);
    return 0;
}

int lb_directory_publish(const char *spec, const char *address, const json_t *fragment, uint64_t deadline_ns,
                         struct lb_error *err)
{
    json_t *entry = entry_of(address, fragment);
    const char *name = json_string_value(json_object_get(entry, "name"));
    const char *key = json_string_value(json_object_get(entry, "key"));
    LB_AUTO_FREE char *value = json_dumps(entry, JSON_COMPACT);
    LB_AUTO_FREE char *path = lb_asprintf(PREFIX "%s/%.*s", name ? name : "", FINGERPRINT_CHARS, key ? key + 3 : "");
    struct lb_http *h;
    int rc;

    json_decref(entry);
    if (!value)
        return lb_fail(err, LB_E_INTERNAL, "cannot write what this host has as JSON");
    if (open_http(spec, &h, err))
        return -1;
    rc = put(h, path, value, deadline_ns, err);
    lb_http_close(h);
    return rc;
}

/* --------------------------------------------------------------------------- reading */

/* Goes into commands that people copy: no octet that a shell or a terminal would take for something else. */
static bool harmless(const char *text)
{
    return *text && strspn(text, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.-_:[]") == strlen(text) &&
           *text != '-';
}

static int parse_entry(const json_t *o, struct lb_directory_host *h)
{
    const json_t *host = json_object_get(o, "host");
    char key[LB_KEY_TEXT_BYTES], name[256];
    uint16_t port;

    memset(h, 0, sizeof(*h));
    if (lb_json_get_string(o, "name", h->host.name, sizeof(h->host.name)) ||
        lb_json_get_string(o, "address", h->host.address, sizeof(h->host.address)) ||
        lb_json_get_string(o, "key", key, sizeof(key)) || lb_key_parse(key, h->host.pub, NULL) ||
        !harmless(h->host.name) || !harmless(h->host.address) ||
        lb_parse_hostport(h->host.address, LB_DEFAULT_PORT, name, &port, NULL))
        return -1;
    lb_json_get_u64(host, "memory_bytes", LB_INV_MAX_BYTES, &h->memory_bytes);
    h->maintenance = json_is_true(json_object_get(host, "maintenance"));
    return 0;
}

static void take_entry(const json_t *kv, struct lb_directory_host **v, unsigned *n)
{
    LB_AUTO_FREE char *text = unbase64(json_object_get(kv, "value"));
    json_t *o = text ? json_loads(text, 0, NULL) : NULL;
    struct lb_directory_host h;

    if (o && !parse_entry(o, &h)) {
        *v = lb_realloc(*v, (*n + 1) * sizeof(**v));
        (*v)[(*n)++] = h;
    }
    json_decref(o);
}

/* From key `from` on. *next: where to go on, NULL: nowhere. */
static int read_page(struct lb_http *h, const char *from, uint64_t deadline_ns, struct lb_directory_host **v, unsigned *n,
                     char **next, struct lb_error *err)
{
    const json_t *kvs, *kv, *last = NULL;
    json_t *answer;
    size_t i;

    *next = NULL;
    if (ask(h, "/v3/kv/range", json_pack("{s:o, s:o, s:i}", "key", base64(from), "range_end", base64(PREFIX_END), "limit",
                                         PAGE_HOSTS), deadline_ns, &answer, err))
        return -1;
    kvs = json_object_get(answer, "kvs");
    json_array_foreach (kvs, i, kv) {
        take_entry(kv, v, n);
        last = kv;
    }
    if (json_is_true(json_object_get(answer, "more")) && last && *n < MOST_HOSTS) {
        LB_AUTO_FREE char *key = unbase64(json_object_get(last, "key"));

        *next = key ? lb_asprintf("%s!", key) : NULL; /* the least that can follow: keys end with a digit */
    }
    json_decref(answer);
    return 0;
}

int lb_directory_read(const char *spec, uint64_t deadline_ns, struct lb_directory_host **v, unsigned *n, struct lb_error *err)
{
    char *from = lb_strdup(PREFIX), *next;
    struct lb_http *h;
    int rc = 0;

    *v = NULL;
    *n = 0;
    if (open_http(spec, &h, err)) {
        free(from);
        return -1;
    }
    for (; from && !rc; from = next) {
        rc = read_page(h, from, deadline_ns, v, n, &next, err);
        free(from);
        if (rc)
            next = NULL;
    }
    lb_http_close(h);
    if (rc) {
        free(*v);
        *v = NULL;
        *n = 0;
    }
    return rc;
}
