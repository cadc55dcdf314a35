/*
 * core/qemu/qmp.c - client of QEMU's control socket.
 *
 * QEMU reads the socket one byte per turn of its loop, so the length of a
 * command is its latency.  Three remedies:
 *   - short JSON: no spaces, no ids;
 *   - capability "oob", which moves the reading to a thread of its own that
 *     goes on while the main thread executes a command;
 *   - a command can be sent ahead without its final '}' (`next` of lb_qmp_send); the
 *     '}' alone then triggers it:
 *
 *        we:    {"execute":"stop"}{"execute":"cont"          }
 *        QEMU:            [ stops.. ][ reads meanwhile ]      [ continues
 *
 *     When another command is needed instead, the pending one is spoilt with an
 *     unknown member: QEMU answers it with an error and executes nothing.  When
 *     we die, QEMU drops the unfinished text with the connection.
 *
 * Replies come in the order of the commands.  A command given up on (deadline,
 * or spoilt) owes a reply that is skipped when it comes.  Every wait has a
 * deadline and watches QEMU's pidfd.
 *
 * Events go to the handler as they are read: in every wait, and by lb_qmp_drain.
 */
#include "core/qemu/qemu_internal.h"

#include <assert.h>
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

/* A reply longer than this is not one (info mtree of large machines: 1 MiB). */
#define RX_MAX (64u << 20)
/* A monitor that somebody else uses accepts us and stays silent; so does a QEMU that has no time just now. */
#define GREETING_MS 2000
#define HMP "human-monitor-command"

struct lb_qmp {
    int fd;
    int pidfd;           /* borrowed */
    char *path;
    char *rx;
    size_t rx_len, rx_scanned, rx_cap;
    unsigned owed;       /* replies to skip */
    char *pending;       /* text sent ahead: a command but for its last byte; or NULL */
    char migration[32];  /* last MIGRATION event */
    lb_qmp_event_fn *on_event;
    void *on_event_arg;
};

bool lb_qemu_dead(int pidfd)
{
    return lb_readable(pidfd, 0);
}

static int fail_dead(struct lb_error *err, const char *doing)
{
    lb_fail(err, LB_E_HV, "QEMU died during %s", doing);
    return lb_remedy(err, "look into QEMU's log and the kernel's (out of memory?)");
}

static int fail_closed(struct lb_qmp *q, struct lb_error *err, const char *doing)
{
    /* the socket closes a moment before the process is gone */
    if (lb_readable(q->pidfd, 200))
        return fail_dead(err, doing);
    return lb_fail(err, LB_E_HV, "QEMU closed its monitor %s during %s", q->path, doing);
}

static int left_ms(uint64_t deadline_ns)
{
    uint64_t now = lb_now_ns();
    return now >= deadline_ns ? 0 : (int)((deadline_ns - now + 999999) / 1000000);
}

/* Wait until fd is ready for events; 0, or -1 with err. */
static int wait_fd(struct lb_qmp *q, short events, uint64_t deadline_ns, const char *doing,
                   struct lb_error *err)
{
    for (;;) {
        struct pollfd p[2] = {{.fd = q->fd, .events = events}, {.fd = q->pidfd, .events = POLLIN}};
        int n = poll(p, 2, left_ms(deadline_ns));
        if (n < 0 && errno != EINTR)
            return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot wait for QEMU");
        if (n > 0 && p[0].revents)
            return 0;
        if (n > 0 && p[1].revents)
            return fail_dead(err, doing);
        if (n <= 0 && left_ms(deadline_ns) == 0) {
            lb_fail(err, LB_E_HV, "QEMU did not answer during %s in time", doing);
            return lb_remedy(err, "its main loop hangs: check the storage behind its disks");
        }
    }
}

/* Next whole line in *line (owned by q, valid until the next call). */
static int read_line(struct lb_qmp *q, uint64_t deadline_ns, const char *doing, char **line,
                     size_t *len, struct lb_error *err)
{
    for (;;) {
        char *nl = memchr(q->rx + q->rx_scanned, '\n', q->rx_len - q->rx_scanned);
        if (nl) {
            *line = q->rx;
            *len = (size_t)(nl - q->rx) + 1;
            return 0;
        }
        q->rx_scanned = q->rx_len;
        if (q->rx_len == q->rx_cap) {
            if (q->rx_cap >= RX_MAX)
                return lb_fail(err, LB_E_HV, "QEMU sent an endless line to %s", doing);
            q->rx_cap *= 2;
            q->rx = lb_realloc(q->rx, q->rx_cap);
        }
        ssize_t n = recv(q->fd, q->rx + q->rx_len, q->rx_cap - q->rx_len, MSG_DONTWAIT);
        if (n > 0) {
            q->rx_len += (size_t)n;
        } else if (n == 0 || (errno != EAGAIN && errno != EINTR)) {
            return fail_closed(q, err, doing);
        } else if (wait_fd(q, POLLIN, deadline_ns, doing, err) < 0) {
            return -1;
        }
    }
}

static void note_event(struct lb_qmp *q, const char *event, const json_t *obj)
{
    const json_t *data = json_object_get(obj, "data");
    if (strcmp(event, "MIGRATION") == 0) {
        const char *status = json_string_value(json_object_get(data, "status"));
        snprintf(q->migration, sizeof(q->migration), "%s", status ? status : "");
    } else if (q->on_event) {
        q->on_event(event, data, q->on_event_arg);
    }
}

static int fail_not_qmp(struct lb_qmp *q, struct lb_error *err)
{
    lb_fail(err, LB_E_HV, "QEMU's monitor %s sent something else than QMP", q->path);
    return lb_remedy(err, "give --qmp of a monitor in control mode (-qmp unix:PATH,server,nowait)");
}

/* The line of `len` bytes at the head of rx as an object, or NULL. */
static json_t *parse_line(struct lb_qmp *q, size_t len, struct lb_error *err)
{
    json_error_t je;
    json_t *obj = json_loadb(q->rx, len, JSON_ALLOW_NUL, &je);
    if (json_is_object(obj))
        return obj;
    json_decref(obj);
    fail_not_qmp(q, err);
    return NULL;
}

static void drop_line(struct lb_qmp *q, size_t len)
{
    q->rx_len -= len;
    q->rx_scanned = 0;
    memmove(q->rx, q->rx + len, q->rx_len);
}

/* Next object that is not an event (or also events when want_event); new reference. */
static json_t *read_object(struct lb_qmp *q, uint64_t deadline_ns, const char *doing,
                           bool want_event, struct lb_error *err)
{
    for (;;) {
        char *line = NULL;
        size_t len = 0;
        if (read_line(q, deadline_ns, doing, &line, &len, err) < 0)
            return NULL;
        json_t *obj = parse_line(q, len, err);
        drop_line(q, len);
        if (!obj)
            return NULL;
        const char *event = json_string_value(json_object_get(obj, "event"));
        if (!event)
            return obj;
        note_event(q, event, obj);
        if (want_event)
            return obj;
        json_decref(obj);
    }
}

int lb_qmp_drain(struct lb_qmp *q, struct lb_error *err)
{
    for (;;) {
        char *line = NULL;
        size_t len = 0;
        /* a deadline in the past: what is there already, and no error for nothing */
        struct lb_error why = LB_ERROR_INIT;
        if (!memchr(q->rx, '\n', q->rx_len) && !lb_readable(q->fd, 0))
            return 0;
        if (read_line(q, 0, "nothing", &line, &len, &why) < 0) {
            if (!lb_readable(q->fd, 0))
                return 0; /* the rest of a line is on its way */
            if (err)
                *err = why;
            return -1;
        }
        json_t *obj = parse_line(q, len, err);
        if (!obj)
            return -1;
        const char *event = json_string_value(json_object_get(obj, "event"));
        bool skip = !event && q->owed > 0;
        if (event)
            note_event(q, event, obj);
        q->owed -= skip;
        json_decref(obj);
        if (!event && !skip)
            return 0; /* a reply that somebody will wait for */
        drop_line(q, len);
    }
}

int lb_qmp_wait_event(struct lb_qmp *q, unsigned timeout_ms, const char *doing,
                      struct lb_error *err)
{
    json_t *obj = read_object(q, lb_now_ns() + (uint64_t)timeout_ms * 1000000, doing, true, err);
    if (!obj)
        return -1;
    if (!json_object_get(obj, "event") && q->owed > 0)
        q->owed--;
    json_decref(obj);
    return 0;
}

void lb_qmp_on_event(struct lb_qmp *q, lb_qmp_event_fn *fn, void *arg)
{
    q->on_event = fn;
    q->on_event_arg = arg;
}

static int send_bytes(struct lb_qmp *q, const char *buf, size_t len, int pass_fd,
                      const char *doing, struct lb_error *err)
{
    uint64_t deadline = lb_now_ns() + (uint64_t)LB_QMP_MS * 1000000;
    while (len > 0) {
        struct iovec iov = {.iov_base = (void *)buf, .iov_len = len};
        union {
            char buf[CMSG_SPACE(sizeof(int))];
            struct cmsghdr align;
        } ctl = {{0}};
        struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
        if (pass_fd >= 0) {
            msg.msg_control = ctl.buf;
            msg.msg_controllen = sizeof(ctl.buf);
            struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
            c->cmsg_level = SOL_SOCKET;
            c->cmsg_type = SCM_RIGHTS;
            c->cmsg_len = CMSG_LEN(sizeof(int));
            memcpy(CMSG_DATA(c), &pass_fd, sizeof(int));
        }
        ssize_t n = sendmsg(q->fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n > 0) {
            buf += n;
            len -= (size_t)n;
            pass_fd = -1;
        } else if (n < 0 && errno == EAGAIN) {
            if (wait_fd(q, POLLOUT, deadline, doing, err) < 0)
                return -1;
        } else if (n < 0 && errno != EINTR) {
            return fail_closed(q, err, doing);
        }
    }
    return 0;
}

char *lb_qmp_text(const char *cmd, const char *args)
{
    return lb_asprintf("{\"execute\":\"%s\"%s%s", cmd, args ? ",\"arguments\":" : "",
                       args ? args : "");
}

int lb_qmp_send(struct lb_qmp *q, const char *cmd, const char *args, int pass_fd,
                const char *next, struct lb_error *err)
{
    LB_AUTO_FREE char *text = lb_qmp_text(cmd, args);
    bool trigger = q->pending && strcmp(q->pending, text) == 0;
    const char *spoil = "";
    if (q->pending && !trigger) {
        spoil = ",\"x\":0}";
        q->owed++;
    }
    LB_AUTO_FREE char *bytes = lb_asprintf("%s%s}%s", spoil, trigger ? "" : text,
                                           next ? next : "");
    free(q->pending);
    q->pending = lb_strdup(next);
    return send_bytes(q, bytes, strlen(bytes), pass_fd, cmd, err);
}

int lb_qmp_wait(struct lb_qmp *q, const char *cmd, unsigned timeout_ms, json_t **ret,
                struct lb_error *err)
{
    uint64_t deadline = lb_now_ns() + (uint64_t)timeout_ms * 1000000;
    for (;;) {
        json_t *obj = read_object(q, deadline, cmd, false, err);
        if (!obj) {
            q->owed++; /* should it come after all */
            return -1;
        }
        if (q->owed > 0) {
            q->owed--;
            json_decref(obj);
            continue;
        }
        json_t *value = json_object_get(obj, "return");
        if (value) {
            if (ret)
                *ret = json_incref(value);
            json_decref(obj);
            return 0;
        }
        const char *desc =
            json_string_value(json_object_get(json_object_get(obj, "error"), "desc"));
        lb_fail(err, LB_E_HV, "QEMU refused %s: %s", cmd, desc ? desc : "(no reason given)");
        json_decref(obj);
        return -1;
    }
}

int lb_qmp_cmd(struct lb_qmp *q, const char *cmd, const char *args, json_t **ret,
               struct lb_error *err)
{
    if (lb_qmp_send(q, cmd, args, -1, NULL, err) < 0)
        return -1;
    return lb_qmp_wait(q, cmd, LB_QMP_MS, ret, err);
}

int lb_qmp_send_hmp(struct lb_qmp *q, const char *line, struct lb_error *err)
{
    LB_AUTO_FREE char *args = lb_asprintf("{\"command-line\":\"%s\"}", line);
    return lb_qmp_send(q, HMP, args, -1, NULL, err);
}

int lb_qmp_wait_hmp(struct lb_qmp *q, const char *line, char **text, struct lb_error *err)
{
    json_t *ret = NULL;
    if (lb_qmp_wait(q, HMP, LB_QMP_MS, &ret, err) < 0)
        return -1;
    const char *s = json_string_value(ret);
    *text = s ? lb_strdup(s) : NULL;
    json_decref(ret);
    return *text ? 0 : lb_fail(err, LB_E_HV, "QEMU answered '%s' with something strange", line);
}

int lb_qmp_hmp(struct lb_qmp *q, const char *line, char **text, struct lb_error *err)
{
    return lb_qmp_send_hmp(q, line, err) < 0 ? -1 : lb_qmp_wait_hmp(q, line, text, err);
}

void lb_qmp_clear_migration(struct lb_qmp *q)
{
    q->migration[0] = 0;
}

int lb_qmp_wait_migration(struct lb_qmp *q, unsigned timeout_ms, char status[32],
                          struct lb_error *err)
{
    uint64_t deadline = lb_now_ns() + (uint64_t)timeout_ms * 1000000;
    while (strcmp(q->migration, "completed") != 0 && strcmp(q->migration, "failed") != 0)
        if (lb_qmp_wait_event(q, (unsigned)left_ms(deadline), "the load of the device state",
                              err) < 0)
            return -1;
    memcpy(status, q->migration, sizeof(q->migration));
    return 0;
}

static int connect_once(const char *path, struct lb_error *err)
{
    struct sockaddr_un sa = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof(sa.sun_path)) {
        lb_fail(err, LB_E_USAGE, "the path of the control socket is too long: %s", path);
        return lb_remedy(err, "use a directory with a shorter name (107 bytes at most)");
    }
    strcpy(sa.sun_path, path);
    LB_AUTO_FD int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot make a socket");
    lb_set_nonblock(fd, true);
    if (connect(fd, (struct sockaddr *)&sa, sizeof(sa)) < 0) {
        int e = errno;
        lb_fail_errno(err, e == ENOENT ? LB_E_NOT_FOUND : LB_E_HV, e, "cannot connect to %s", path);
        return lb_remedy(err, e == EAGAIN ? "close the other client or give --qmp of a spare monitor"
                                          : "give --qmp of a monitor this QEMU listens on");
    }
    return LB_STEAL_FD(fd);
}

static int check_peer(int fd, const char *path, pid_t expect, struct lb_error *err)
{
    struct ucred cred;
    socklen_t len = sizeof(cred);
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &cred, &len) < 0)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot ask who listens on %s", path);
    if (cred.pid == expect)
        return 0;
    lb_fail(err, LB_E_USAGE, "the control socket %s belongs to process %d, not to %d", path,
            (int)cred.pid, (int)expect);
    return lb_remedy(err, "give --qmp of a monitor that process %d opened itself", (int)expect);
}

static int negotiate(struct lb_qmp *q, uint64_t greeting_until_ns, struct lb_error *err)
{
    struct lb_error why = LB_ERROR_INIT;
    json_t *hello = read_object(q, greeting_until_ns, "the greeting", false, &why);
    if (!hello) {
        if (lb_qemu_dead(q->pidfd))
            return fail_dead(err, "the greeting");
        lb_fail(err, LB_E_HV, "the monitor %s does not greet: %s", q->path,
                "somebody else is connected to it, and QEMU serves one client per monitor");
        return lb_remedy(err, "close the other client or give --qmp of a spare monitor");
    }
    json_t *qmp = json_object_get(hello, "QMP");
    if (!qmp) {
        json_decref(hello);
        lb_fail(err, LB_E_HV, "%s is no QMP monitor", q->path);
        return lb_remedy(err, "give --qmp of a monitor in control mode (-qmp unix:PATH,server,nowait)");
    }
    bool oob = false;
    size_t i;
    json_t *cap;
    json_array_foreach(json_object_get(qmp, "capabilities"), i, cap)
    {
        const char *s = json_string_value(cap);
        oob |= s && strcmp(s, "oob") == 0;
    }
    json_decref(hello);
    return lb_qmp_cmd(q, "qmp_capabilities", oob ? "{\"enable\":[\"oob\"]}" : NULL, NULL, err);
}

int lb_qmp_open(const char *path, pid_t expect_pid, int pidfd, uint64_t retry_until_ns,
                struct lb_qmp **out, struct lb_error *err)
{
    struct lb_error why = LB_ERROR_INIT;
    int fd;
    while ((fd = connect_once(path, &why)) < 0) {
        bool early = why.sys_errno == ENOENT || why.sys_errno == ECONNREFUSED;
        if (lb_qemu_dead(pidfd))
            return fail_dead(err, "its start");
        if (!early || lb_now_ns() >= retry_until_ns) {
            if (err)
                *err = why;
            return -1;
        }
        lb_readable(pidfd, 1);
    }
    struct lb_qmp *q = lb_alloc(sizeof(*q));
    q->fd = fd;
    q->pidfd = pidfd;
    q->path = lb_strdup(path);
    q->rx_cap = 16384;
    q->rx = lb_alloc(q->rx_cap);
    /* QEMU listens early in its start and answers at the end of it. */
    uint64_t greeting_until_ns = LB_MAX(retry_until_ns, lb_now_ns() + GREETING_MS * UINT64_C(1000000));
    if (check_peer(fd, path, expect_pid, err) < 0 || negotiate(q, greeting_until_ns, err) < 0) {
        lb_qmp_close(q);
        return -1;
    }
    *out = q;
    return 0;
}

void lb_qmp_close(struct lb_qmp *q)
{
    if (!q)
        return;
    close(q->fd); /* QEMU drops a pending command with the connection */
    free(q->pending);
    free(q->path);
    free(q->rx);
    free(q);
}
