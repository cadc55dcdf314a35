/* cmd/daemon/ops_host.c - requests that files answer at once. */
#include "cmd/daemon/daemon.h"

#include <string.h>
#include <sys/stat.h>
#include <fcntl.h>

#define HISTORY_READ_BYTES (4u << 20) /* from the end; some 8,000 migrations */
#define HISTORY_DEFAULT 50u
#define HISTORY_MAX 1000u

char *lb_json_dump(json_t *o)
{
    char *s = json_dumps(o, JSON_COMPACT | JSON_REAL_PRECISION(12));

    json_decref(o);
    return s ? s : lb_strdup("{}");
}

json_t *lb_entry_to_json(const struct lb_vm_entry *e)
{
    json_t *o = json_object();
    bool alive = e->proc.pid > 0 && lb_proc_alive(&e->proc);
    enum lb_vm_state state = e->state == LB_VM_RUNNING && !alive ? LB_VM_DEAD : e->state;

    json_object_set_new(o, "name", lb_json_text(e->name));
    json_object_set_new(o, "state", json_string(lb_vm_state_name(state)));
    json_object_set_new(o, "alive", json_boolean(alive));
    json_object_set_new(o, "hypervisor", lb_json_text(e->hypervisor));
    json_object_set_new(o, "pid", json_integer(e->proc.pid));
    json_object_set_new(o, "qmp", lb_json_text(e->qmp_path));
    json_object_set_new(o, "origin", lb_json_text(e->origin));
    json_object_set_new(o, "peer", lb_json_text(e->peer));
    json_object_set_new(o, "created_ms", json_integer((json_int_t)e->created_ms));
    json_object_set_new(o, "changed_ms", json_integer((json_int_t)e->changed_ms));
    json_object_set_new(o, "note", lb_json_text(e->note));
    return o;
}

json_t *lb_session_to_json(const struct session *s)
{
    json_t *o, *progress;

    if (!s)
        return NULL;
    o = json_object();
    json_object_set_new(o, "id", json_string(s->id));
    json_object_set_new(o, "role", lb_json_text(s->role));
    json_object_set_new(o, "pid", json_integer(s->pid));
    json_object_set_new(o, "host", lb_json_text(s->peer));
    progress = s->progress ? json_loads(s->progress, 0, NULL) : NULL;
    json_object_set_new(o, "progress", progress ? progress : json_null());
    return o;
}

char *lb_op_ls(struct daemon *d, struct lb_error *err)
{
    LB_AUTO_FREE struct lb_vm_entry *v = NULL;
    unsigned n = 0;
    json_t *o, *list;

    if (lb_vm_entry_list(d->opt.state_dir, &v, &n, err))
        return NULL;
    o = json_object();
    list = json_array();
    for (unsigned i = 0; i < n; i++) {
        json_t *e = lb_entry_to_json(&v[i]), *s = lb_session_to_json(lb_session_of_vm(d, v[i].name));
        json_t *p = lb_protect_json(d, &v[i]);

        lb_ckpt_add_json(d, &v[i], e);
        if (s)
            json_object_set_new(e, "session", s);
        if (p)
            json_object_set_new(e, "protect", p);
        json_array_append_new(list, e);
    }
    json_object_set_new(o, "vms", list);
    json_object_set_new(o, "host", lb_maintenance_status(d));
    return lb_json_dump(o);
}

/* -------------------------------------------------------------------- history */

static char *read_tail(const char *path, size_t *len, struct lb_error *err)
{
    LB_AUTO_FD int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat st;
    char *buf, *nl;
    off_t from;
    ssize_t n;

    *len = 0;
    if (fd < 0 || fstat(fd, &st))
        return lb_strdup("");
    from = st.st_size > (off_t)HISTORY_READ_BYTES ? st.st_size - (off_t)HISTORY_READ_BYTES : 0;
    buf = lb_try_alloc((size_t)(st.st_size - from) + 1, err);
    if (!buf)
        return NULL;
    n = pread(fd, buf, (size_t)(st.st_size - from), from);
    if (n < 0)
        n = 0;
    buf[n] = '\0';
    *len = (size_t)n;
    /* The first line is cut. */
    nl = from ? memchr(buf, '\n', (size_t)n) : NULL;
    if (nl) {
        *len -= (size_t)(nl + 1 - buf);
        memmove(buf, nl + 1, *len + 1);
    }
    return buf;
}

/* Newest `limit` lines of the VM (all when ""), oldest first. */
char *lb_op_history(struct daemon *d, const Lb__RpcName *r, struct lb_error *err)
{
    LB_AUTO_FREE char *path = lb_asprintf("%s/history.jsonl", d->opt.state_dir);
    unsigned limit = r->limit ? LB_MIN(r->limit, HISTORY_MAX) : HISTORY_DEFAULT, n = 0;
    size_t len;
    LB_AUTO_FREE char *text = read_tail(path, &len, err);
    json_t *list = json_array(), *o;

    if (!text) {
        json_decref(list);
        return NULL;
    }
    for (char *end = text + len; end > text && n < limit;) {
        char *start;
        json_t *line;
        const char *vm;

        if (end[-1] == '\n')
            end--;
        *end = '\0';
        for (start = end; start > text && start[-1] != '\n';)
            start--;
        line = json_loads(start, 0, NULL);
        vm = json_string_value(json_object_get(line, "vm"));
        /* A line torn by a crash is no record. */
        if (vm && (!r->name[0] || !strcmp(vm, r->name))) {
            json_array_insert(list, 0, line);
            n++;
        }
        json_decref(line);
        end = start;
    }
    o = json_object();
    json_object_set_new(o, "history", list);
    return lb_json_dump(o);
}

/* ---------------------------------------------------------------------- hosts */

char *lb_op_host_id(struct daemon *d, struct lb_error *err)
{
    char key[LB_KEY_TEXT_BYTES];
    struct lb_identity id;
    json_t *o;

    if (lb_identity_load(d->opt.state_dir, &id, err))
        return NULL;
    lb_key_format(key, id.pub);
    lb_identity_wipe(&id);
    o = json_object();
    json_object_set_new(o, "name", lb_json_text(d->cfg.name));
    json_object_set_new(o, "key", json_string(key));
    json_object_set_new(o, "listen",
                        lb_json_text(d->opt.listen ? d->opt.listen : d->cfg.listen));
    return lb_json_dump(o);
}

static json_t *host_to_json(const struct lb_host *h)
{
    char key[LB_KEY_TEXT_BYTES];
    json_t *o = json_object();

    lb_key_format(key, h->pub);
    json_object_set_new(o, "name", lb_json_text(h->name));
    json_object_set_new(o, "address", lb_json_text(h->address));
    json_object_set_new(o, "key", json_string(key));
    return o;
}

char *lb_op_host_trust(struct daemon *d, const Lb__RpcHostTrust *r, struct lb_error *err)
{
    struct lb_host h = {0};
    struct lb_identity me;
    char host[256];
    uint16_t port;
    bool self;

    if (!lb_vm_name_valid(r->name)) {
        lb_fail(err, LB_E_USAGE, "\"%.80s\" is not a valid host name", r->name);
        lb_remedy(err, "use at most 63 letters, digits, '.', '_' and '-', beginning with a letter "
                       "or a digit");
        return NULL;
    }
    if (lb_key_parse(r->key, h.pub, err))
        return NULL;
    if (r->address[0] && lb_parse_hostport(r->address, LB_DEFAULT_PORT, host, &port, err))
        return NULL;
    if (r->address[0] && (!host[0] || !port)) {
        lb_fail(err, LB_E_USAGE, "\"%.200s\" is not an address to connect to", r->address);
        lb_remedy(err, "give HOST or HOST:PORT");
        return NULL;
    }
    if (strlen(r->address) >= sizeof(h.address)) {
        lb_fail(err, LB_E_USAGE, "the address is too long");
        return NULL;
    }
    if (lb_identity_load(d->opt.state_dir, &me, err))
        return NULL;
    self = !memcmp(me.pub, h.pub, LB_KEY_BYTES);
    lb_identity_wipe(&me);
    if (self) {
        lb_fail(err, LB_E_USAGE, "that is the key of this host itself");
        lb_remedy(err, "run `lifeboat host id` on the other host and use the key that it prints");
        return NULL;
    }
    snprintf(h.name, sizeof(h.name), "%s", r->name);
    snprintf(h.address, sizeof(h.address), "%s", r->address);
    if (lb_hosts_trust(d->opt.state_dir, &h, err))
        return NULL;
    lb_log(LB_LOG_INFO, "host %s is trusted now", h.name);
    return lb_json_dump(host_to_json(&h));
}

char *lb_op_host_ls(struct daemon *d, struct lb_error *err)
{
    struct lb_hosts hosts = {0};
    json_t *o, *list;

    if (lb_hosts_load(d->opt.state_dir, &hosts, err))
        return NULL;
    list = json_array();
    for (unsigned i = 0; i < hosts.n; i++)
        json_array_append_new(list, host_to_json(&hosts.v[i]));
    lb_hosts_free(&hosts);
    o = json_object();
    json_object_set_new(o, "hosts", list);
    return lb_json_dump(o);
}

/* A VM that was handed over to that host can only be decided by asking it. */
static int check_needed(struct daemon *d, const char *host, struct lb_error *err)
{
    LB_AUTO_FREE struct lb_vm_entry *v = NULL;
    unsigned n = 0;

    if (lb_vm_entry_list(d->opt.state_dir, &v, &n, err))
        return -1;
    for (unsigned i = 0; i < n; i++)
        if (v[i].state != LB_VM_RUNNING && v[i].state != LB_VM_DEAD && !strcmp(v[i].peer, host)) {
            lb_fail(err, LB_E_STATE, "host %s is needed to decide about VM %s", host, v[i].name);
            return lb_remedy(err, "`lifeboat recover %s` first, or --force", v[i].name);
        }
    return 0;
}

char *lb_op_host_forget(struct daemon *d, const Lb__RpcName *r, struct lb_error *err)
{
    json_t *o;

    if ((!r->force && check_needed(d, r->name, err)) ||
        lb_hosts_forget(d->opt.state_dir, r->name, err))
        return NULL;
    lb_log(LB_LOG_INFO, "host %.100s is no longer trusted", r->name);
    o = json_object();
    json_object_set_new(o, "name", lb_json_text(r->name));
    json_object_set_new(o, "forgotten", json_true());
    return lb_json_dump(o);
}
