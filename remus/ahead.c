/*
 * remus/ahead.c - would another host take a protected VM?
 *
 * The hypervisor speaks to one client at a time, and while the VM is protected that is its session. So the
 * session keeps what it told its backup (vms/NAME/request.pb: the description of the VM, its disks), and whoever
 * wants to know asks the other host with that, as a dry run. What has been plugged in since would end
 * the protection by itself (protect_epoch.c).
 */
#include "remus/protect_internal.h"

#include <sodium.h>
#include <string.h>

#include "netproto/desc_proto.h"

#define MAX_REQUEST_BYTES (1u << 20)
#define CONNECT_MS 5000u
#define REPORT_NS UINT64_C(20000000000)

static char *request_path(const char *state_dir, const char *vm)
{
    return lb_asprintf("%s/vms/%s/request.pb", state_dir, vm);
}

void lb_prot_keep_request(const struct prot *p, Lb__ProtectSpec *spec)
{
    Lb__MigrateRequest r = LB__MIGRATE_REQUEST__INIT;
    struct lb_error err = LB_ERROR_INIT;
    LB_AUTO_FREE char *path = request_path(p->base->state_dir, p->entry.name);
    Lb__VmDescription *d = NULL;
    int rc;

    rc = lb_desc_to_proto(&p->tx.desc, &d, &err);
    if (!rc) {
        size_t n;

        r.vm = d;
        r.protect = spec;
        n = lb__migrate_request__get_packed_size(&r);
        LB_AUTO_FREE uint8_t *buf = lb_alloc(n + 1);
        lb__migrate_request__pack(&r, buf);
        rc = lb_file_write_atomic(path, buf, n, 0600, &err);
        lb__vm_description__free_unpacked(d, NULL);
    }
    if (rc)
        lb_log_error(LB_LOG_WARN, &err);
}

static Lb__MigrateRequest *load(const char *state_dir, const char *vm, struct lb_error *err)
{
    LB_AUTO_FREE char *path = request_path(state_dir, vm);
    LB_AUTO_FREE char *buf = NULL;
    Lb__MigrateRequest *r;
    size_t len;

    if (lb_file_read(path, MAX_REQUEST_BYTES, &buf, &len, err))
        return NULL;
    r = lb__migrate_request__unpack(NULL, len, (uint8_t *)buf);
    if (r && r->vm && r->protect)
        return r;
    if (r)
        lb__migrate_request__free_unpacked(r, NULL);
    lb_fail(err, LB_E_NOT_FOUND, "%s is damaged", path);
    return NULL;
}

/* The question on its way and its answer; r is complete but for what is of this moment. */
static int ask(const struct lb_session_env *env, struct lb_chan *c, Lb__MigrateRequest *r,
               struct lb_error *err)
{
    uint8_t session_id[LB_SESSION_ID_BYTES], token[LB_TOKEN_BYTES], secret[32];
    Lb__Control m = LB__CONTROL__INIT, *in = NULL;
    Lb__Hello h = LB__HELLO__INIT;
    int rc;

    randombytes_buf(session_id, sizeof(session_id));
    randombytes_buf(token, sizeof(token));
    randombytes_buf(secret, sizeof(secret)); /* nothing will be sent with it */
    lb_ctl_hello(&h, NULL);
    r->hello = &h;
    r->session_id = (ProtobufCBinaryData){sizeof(session_id), session_id};
    r->token = (ProtobufCBinaryData){sizeof(token), token};
    r->bulk_secret = (ProtobufCBinaryData){sizeof(secret), secret};
    if (r->protect)
        r->protect->id = r->token;
    r->channels = 1;
    r->dry_run = true;
    m.kind_case = LB__CONTROL__KIND_MIGRATE_REQUEST;
    m.migrate_request = r;
    rc = lb_ctl_send(c, &m, err);
    if (!rc)
        rc = lb_ctl_expect(c, LB__CONTROL__KIND_PREFLIGHT_REPORT, &in, lb_now_ns() + REPORT_NS, err);
    if (rc)
        return -1;
    lb_tx_show_report(env, NULL, in->preflight_report);
    if (in->preflight_report->refused)
        rc = lb_ctl_refusal(in->preflight_report, err);
    lb__control__free_unpacked(in, NULL);
    return rc;
}

int lb_remus_ask_ahead(const struct lb_session_env *env, const char *vm, const struct lb_host *to,
                       const struct lb_protect_wish *wish, bool standby, struct lb_error *err)
{
    LB_AUTO_FREE char *text = lb_wish_json(wish);
    Lb__MigrateRequest *kept = load(env->state_dir, vm, err), r = LB__MIGRATE_REQUEST__INIT;
    Lb__ProtectSpec spec;
    struct lb_chan *c = NULL;
    char host[256];
    uint16_t port;
    int rc;

    if (!kept)
        return -1;
    spec = *kept->protect;
    spec.wish_json = text;
    r.vm = kept->vm;
    r.protect = standby ? &spec : NULL;
    r.wish_json = standby ? (char *)"" : text;
    lb_host_address(to, host, &port);
    rc = lb_chan_connect(host, port, env->identity, to->pub, CONNECT_MS, env->cancel_fd, &c, err);
    if (!rc)
        rc = ask(env, c, &r, err);
    lb_chan_close(c);
    lb__migrate_request__free_unpacked(kept, NULL);
    return rc ? lb_context(err, "host %s", to->name) : 0;
}
