/*
 * cmd/daemon/qmp.c - is QEMU there, and make it quit.
 *
 * The hypervisor interface has no word for either: an attach while QEMU is still
 * starting would fail, and destroy is SIGKILL. Everything else goes through lb_hv_*.
 */
#include "cmd/daemon/daemon.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>

#define MAX_LINE_BYTES 65536u

struct qmp {
    int fd;
    uint64_t deadline_ns;
    size_t used;
    char buf[MAX_LINE_BYTES];
};

/* One line of JSON; NULL at failure. Caller: json_decref. */
static json_t *read_line(struct qmp *q, struct lb_error *err)
{
    for (;;) {
        char *nl = memchr(q->buf, '\n', q->used);
        uint64_t now = lb_now_ns();
        struct pollfd p = {.fd = q->fd, .events = POLLIN};
        ssize_t n;

        if (nl) {
            size_t len = (size_t)(nl + 1 - q->buf);
            json_t *o = json_loadb(q->buf, len, 0, NULL);

            memmove(q->buf, q->buf + len, q->used - len);
            q->used -= len;
            if (!o)
                lb_fail(err, LB_E_HV, "the control socket does not speak QMP");
            return o;
        }
        if (q->used == sizeof(q->buf)) {
            lb_fail(err, LB_E_HV, "the control socket does not speak QMP");
            return NULL;
        }
        if (now >= q->deadline_ns ||
            poll(&p, 1, (int)LB_MIN((q->deadline_ns - now) / 1000000 + 1, UINT64_C(1000000))) == 0) {
            lb_fail(err, LB_E_HV, "the control socket does not answer");
            lb_remedy(err, "a QMP socket serves one client at a time: disconnect the other one");
            return NULL;
        }
        n = recv(q->fd, q->buf + q->used, sizeof(q->buf) - q->used, MSG_DONTWAIT);
        if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR)) {
            lb_fail(err, LB_E_HV, "the control socket was closed");
            return NULL;
        }
        if (n > 0)
            q->used += (size_t)n;
    }
}

static int greeting(struct qmp *q, struct lb_error *err)
{
    json_t *o = read_line(q, err);
    bool ok = json_is_object(json_object_get(o, "QMP"));

    if (o && !ok)
        lb_fail(err, LB_E_HV, "the control socket does not speak QMP");
    json_decref(o);
    return ok ? 0 : -1;
}

static int command(struct qmp *q, const char *text, struct lb_error *err)
{
    if (lb_write_all_until(q->fd, text, strlen(text), q->deadline_ns, -1, err))
        return -1;
    for (;;) {
        json_t *o = read_line(q, err), *e;

        if (!o)
            return -1;
        if (json_object_get(o, "return")) {
            json_decref(o);
            return 0;
        }
        e = json_object_get(o, "error");
        if (e) {
            const char *desc = json_string_value(json_object_get(e, "desc"));

            lb_fail(err, LB_E_HV, "the VM refused: %.300s", desc ? desc : "no reason given");
            json_decref(o);
            return -1;
        }
        json_decref(o); /* an event */
    }
}

int lb_qmp_wait_greeting(const char *path, const struct lb_proc_id *proc, uint64_t deadline_ns,
                         struct lb_error *err)
{
    for (;;) {
        LB_AUTO_FD int fd = lb_unix_connect(path, NULL);

        if (fd >= 0) {
            LB_AUTO_FREE struct qmp *q = lb_alloc(sizeof(*q));

            q->fd = fd;
            q->deadline_ns = deadline_ns;
            return greeting(q, err);
        }
        if (!lb_proc_alive(proc))
            return lb_fail(err, LB_E_HV, "the hypervisor ended at once");
        if (lb_now_ns() > deadline_ns)
            return lb_fail(err, LB_E_HV, "the hypervisor did not open its control socket %s", path);
        lb_sleep_ms(10);
    }
}

int lb_qmp_quit(const char *path, const struct lb_proc_id *proc, uint64_t deadline_ns,
                struct lb_error *err)
{
    LB_AUTO_FREE struct qmp *q = lb_alloc(sizeof(*q));
    LB_AUTO_FD int fd = lb_unix_connect(path, err);

    if (fd < 0)
        return -1;
    q->fd = fd;
    q->deadline_ns = deadline_ns;
    if (greeting(q, err) || command(q, "{\"execute\":\"qmp_capabilities\"}\n", err) ||
        command(q, "{\"execute\":\"quit\"}\n", err)) {
        /* It may go before its answer does. */
        if (!lb_proc_alive(proc))
            return 0;
        return -1;
    }
    while (lb_proc_alive(proc)) {
        if (lb_now_ns() > deadline_ns)
            return lb_fail(err, LB_E_HV, "process %d took `quit` but is still there",
                           (int)proc->pid);
        lb_sleep_ms(5);
    }
    return 0;
}
