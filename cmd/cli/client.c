/* cmd/cli/client.c - one request to lifeboatd and its answers. */
#include "cmd/cli/cli.h"

#include <errno.h>
#include <string.h>

static int connect_daemon(struct lb_cli *cli, struct lb_error *err)
{
    struct lb_error why = LB_ERROR_INIT;
    int fd = lb_unix_connect(cli->socket, &why);

    if (fd >= 0)
        return fd;
    if (why.sys_errno == EACCES || why.sys_errno == EPERM) {
        lb_fail(err, LB_E_AUTH, "no permission to use %s", cli->socket);
        return lb_remedy(err, "run lifeboat as root (sudo)");
    }
    lb_fail(err, LB_E_NET, "lifeboatd does not answer at %s: %s", cli->socket,
            strerror(why.sys_errno));
    return lb_remedy(err, "start it (`systemctl start lifeboatd` or `lifeboatd`), or name its "
                          "socket with --host");
}

char *lb_request(struct lb_cli *cli, const Lb__RpcRequest *r,
                 bool (*on_event)(const json_t *event, const char *text, void *arg), void *arg,
                 int cancel_fd, struct lb_error *err)
{
    LB_AUTO_FD int fd = connect_daemon(cli, err);

    cli->lost = fd < 0;
    if (fd < 0 || lb_rpc_send(fd, &r->base, 0, err))
        return NULL;
    for (;;) {
        struct lb_error why = LB_ERROR_INIT;
        Lb__RpcReply *m = (Lb__RpcReply *)lb_rpc_recv(fd, &lb__rpc_reply__descriptor, 0, cancel_fd,
                                                      &why);
        char *result = NULL;
        bool last = true;

        if (!m) {
            if (err)
                *err = why;
            if (why.code == LB_E_NET) {
                cli->lost = true;
                lb_fail(err, LB_E_NET, "lifeboatd closed the connection without an answer");
                lb_remedy(err, "sessions go on without it: see its log, start it again, then "
                               "`lifeboat ls`");
            }
            return NULL;
        }
        switch (m->kind_case) {
        case LB__RPC_REPLY__KIND_FAILURE:
            lb_fail(err, (enum lb_errcode)m->failure->code, "%s", m->failure->message);
            if (err && !err->code)
                err->code = LB_E_INTERNAL;
            lb_remedy(err, "%s", m->failure->remedy);
            free(cli->failure_json);
            cli->failure_json = m->failure->json[0] ? lb_strdup(m->failure->json) : NULL;
            break;
        case LB__RPC_REPLY__KIND_RESULT_JSON:
            result = lb_strdup(m->result_json);
            break;
        case LB__RPC_REPLY__KIND_EVENT_JSON: {
            json_t *ev = json_loads(m->event_json, 0, NULL);

            last = on_event && ev && !on_event(ev, m->event_json, arg);
            json_decref(ev);
            if (last)
                result = lb_strdup(m->event_json);
            break;
        }
        default:
            lb_fail(err, LB_E_PROTO, "lifeboatd answered something unknown");
            lb_remedy(err, "use a lifeboat and a lifeboatd of the same version");
        }
        lb__rpc_reply__free_unpacked(m, NULL);
        if (last)
            return result;
    }
}
