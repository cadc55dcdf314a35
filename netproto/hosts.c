/* netproto/hosts.c - the hosts this one believes: STATE_DIR/hosts.json.
 *
 *      {"version": 1, "hosts": [{"name": "b", "address": "10.0.0.2:7007", "key": "lb1..."}]}
 *
 * Read whole, written whole and atomically; writers take turns by hosts.lock. */
#include "netproto/netproto_internal.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <string.h>
#include <sys/file.h>

enum { MAX_FILE_BYTES = 4 << 20, MAX_HOSTS = 10000 };

static int check_host(const char *name, const char *address, struct lb_error *err)
{
    char host[256];
    uint16_t port;

    if (!name[0] || strlen(name) >= sizeof(((struct lb_host *)0)->name))
        return lb_fail(err, LB_E_USAGE, "a host name has 1 to 127 characters");
    for (const char *p = name; *p; p++)
        if (!isalnum((unsigned char)*p) && !strchr("._-", *p)) {
            lb_fail(err, LB_E_USAGE, "\"%s\" cannot be a host name", name);
            return lb_remedy(err, "use letters, digits, dot, dash and underscore");
        }
    if (strlen(address) >= sizeof(((struct lb_host *)0)->address))
        return lb_fail(err, LB_E_USAGE, "the address of host %s is too long", name);
    if (address[0] && lb_parse_hostport(address, LB_DEFAULT_PORT, host, &port, err) < 0)
        return lb_context(err, "host %s", name);
    return 0;
}

static int read_host(json_t *item, struct lb_host *h, struct lb_error *err)
{
    const char *name, *address, *key;

    if (json_unpack(item, "{s:s, s:s, s:s}", "name", &name, "address", &address, "key", &key) < 0)
        return lb_fail(err, LB_E_USAGE, "a host lacks its name, address or key");
    if (check_host(name, address, err) < 0 || lb_key_parse(key, h->pub, err) < 0)
        return -1;
    strcpy(h->name, name); /* lengths were checked */
    strcpy(h->address, address);
    return 0;
}

static int read_all(json_t *root, struct lb_hosts *out, struct lb_error *err)
{
    int version;
    json_t *list;

    if (json_unpack(root, "{s:i, s:o}", "version", &version, "hosts", &list) < 0 ||
        !json_is_array(list))
        return lb_fail(err, LB_E_USAGE, "no version or no list of hosts");
    if (version != 1)
        return lb_fail(err, LB_E_USAGE, "version %d is not known", version);
    size_t n = json_array_size(list);
    if (n > MAX_HOSTS)
        return lb_fail(err, LB_E_USAGE, "more than %d hosts", MAX_HOSTS);
    out->v = lb_alloc((n ? n : 1) * sizeof(*out->v));
    for (; out->n < n; out->n++) {
        if (read_host(json_array_get(list, out->n), &out->v[out->n], err) < 0)
            return -1;
        if (lb_hosts_by_name(out, out->v[out->n].name) || lb_hosts_by_key(out, out->v[out->n].pub))
            return lb_fail(err, LB_E_USAGE, "host %s is there twice", out->v[out->n].name);
    }
    return 0;
}

int lb_hosts_load(const char *state_dir, struct lb_hosts *out, struct lb_error *err)
{
    LB_AUTO_FREE char *path = lb_asprintf("%s/hosts.json", state_dir);
    LB_AUTO_FREE char *text = NULL;
    struct lb_hosts hosts = {0};
    json_error_t why;
    size_t len;

    if (access(path, F_OK) < 0 && errno == ENOENT) {
        *out = hosts;
        return 0;
    }
    if (lb_file_read(path, MAX_FILE_BYTES, &text, &len, err) < 0)
        return -1;
    json_t *root = json_loadb(text, len, JSON_REJECT_DUPLICATES, &why);
    int rc = root ? read_all(root, &hosts, err)
                  : lb_fail(err, LB_E_USAGE, "line %d: %s", why.line, why.text);
    json_decref(root);
    if (rc < 0) {
        lb_hosts_free(&hosts);
        lb_context(err, "%s", path);
        return lb_remedy(err, "mend or remove %s and trust the hosts again", path);
    }
    *out = hosts;
    return 0;
}

void lb_hosts_free(struct lb_hosts *h)
{
    free(h->v);
    *h = (struct lb_hosts){0};
}

const struct lb_host *lb_hosts_by_name(const struct lb_hosts *h, const char *name)
{
    for (unsigned i = 0; i < h->n; i++)
        if (strcmp(h->v[i].name, name) == 0)
            return &h->v[i];
    return NULL;
}

const struct lb_host *lb_hosts_by_key(const struct lb_hosts *h, const uint8_t pub[LB_KEY_BYTES])
{
    for (unsigned i = 0; i < h->n; i++)
        if (memcmp(h->v[i].pub, pub, LB_KEY_BYTES) == 0)
            return &h->v[i];
    return NULL;
}

static int save(const char *state_dir, const struct lb_hosts *h, struct lb_error *err)
{
    LB_AUTO_FREE char *path = lb_asprintf("%s/hosts.json", state_dir);
    json_t *list = json_array();

    for (unsigned i = 0; i < h->n; i++) {
        char key[LB_KEY_TEXT_BYTES];
        lb_key_format(key, h->v[i].pub);
        json_array_append_new(list, json_pack("{s:s, s:s, s:s}", "name", h->v[i].name, "address",
                                              h->v[i].address, "key", key));
    }
    json_t *root = json_pack("{s:i, s:o}", "version", 1, "hosts", list);
    LB_AUTO_FREE char *text = root ? json_dumps(root, JSON_INDENT(2)) : NULL;
    json_decref(root);
    if (!text)
        return lb_fail(err, LB_E_INTERNAL, "cannot write the list of hosts");
    return lb_file_write_atomic(path, text, strlen(text), 0600, err);
}

/* Returns the locked file or -1. */
static int lock_hosts(const char *state_dir, struct lb_error *err)
{
    LB_AUTO_FREE char *path = lb_asprintf("%s/hosts.lock", state_dir);

    if (lb_mkdir_p(state_dir, 0700, err) < 0)
        return -1;
    LB_AUTO_FD int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot open %s", path);
    while (flock(fd, LOCK_EX) < 0)
        if (errno != EINTR)
            return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot lock %s", path);
    return LB_STEAL_FD(fd);
}

static int add(struct lb_hosts *all, const struct lb_host *h, struct lb_error *err)
{
    const struct lb_host *same_key = lb_hosts_by_key(all, h->pub);
    struct lb_host *same_name = (struct lb_host *)(uintptr_t)lb_hosts_by_name(all, h->name);

    if (same_name && same_name != same_key) {
        lb_fail(err, LB_E_EXISTS, "host %s is trusted with another key", h->name);
        return lb_remedy(err, "if its key was changed on purpose: lifeboat host forget %s", h->name);
    }
    if (same_key && !same_name) {
        lb_fail(err, LB_E_EXISTS, "that key is trusted already, as host %s", same_key->name);
        return lb_remedy(err, "to rename it: lifeboat host forget %s", same_key->name);
    }
    if (!same_name) {
        all->v = lb_realloc(all->v, (all->n + 1) * sizeof(*all->v));
        same_name = &all->v[all->n++];
    }
    memset(same_name, 0, sizeof(*same_name));
    strcpy(same_name->name, h->name);
    strcpy(same_name->address, h->address);
    memcpy(same_name->pub, h->pub, sizeof(h->pub));
    return 0;
}

int lb_hosts_trust(const char *state_dir, const struct lb_host *h, struct lb_error *err)
{
    struct lb_hosts all;

    if (check_host(h->name, h->address, err) < 0)
        return -1;
    LB_AUTO_FD int lock = lock_hosts(state_dir, err);
    if (lock < 0 || lb_hosts_load(state_dir, &all, err) < 0)
        return -1;
    int rc = all.n >= MAX_HOSTS ? lb_fail(err, LB_E_NO_SPACE, "%d hosts are enough", MAX_HOSTS)
                                : add(&all, h, err);
    if (rc == 0)
        rc = save(state_dir, &all, err);
    lb_hosts_free(&all);
    return rc;
}

int lb_hosts_forget(const char *state_dir, const char *name, struct lb_error *err)
{
    struct lb_hosts all;
    int rc;

    LB_AUTO_FD int lock = lock_hosts(state_dir, err);
    if (lock < 0 || lb_hosts_load(state_dir, &all, err) < 0)
        return -1;
    const struct lb_host *h = lb_hosts_by_name(&all, name);
    if (!h) {
        lb_fail(err, LB_E_NOT_FOUND, "no trusted host is called %s", name);
        rc = lb_remedy(err, "see `lifeboat host ls`");
    } else {
        size_t i = (size_t)(h - all.v);
        memmove(&all.v[i], &all.v[i + 1], (all.n - i - 1) * sizeof(*all.v));
        all.n--;
        rc = save(state_dir, &all, err);
    }
    lb_hosts_free(&all);
    return rc;
}
