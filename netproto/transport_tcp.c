/* netproto/transport_tcp.c - a TCP connection (or any stream socket) as a transport.
 *
 * Every call tries the socket first and polls only when it would block; what is
 * spent in poll while sending is counted (blocked_ns).  Abort is shutdown(2):
 * it ends a poll of another thread on the same socket at once. */
#include "netproto/netproto_internal.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

enum { IOV_BATCH = 64, USER_TIMEOUT_MS = 20000, UNSENT_BYTES = 1 << 20 };

struct tcp {
    struct lb_transport base;
    int fd;
    int cancel_fd;
    atomic_bool aborted;
};

static struct tcp *tcp_of(struct lb_transport *t)
{
    return (struct tcp *)t; /* base is the first member */
}

/* Poll fd for events until the deadline (0: none) or cancel_fd (-1: none) is readable. */
static int wait_fd(int fd, short events, int cancel_fd, uint64_t deadline_ns, struct lb_error *err)
{
    for (;;) {
        struct pollfd p[2] = {{.fd = fd, .events = events}, {.fd = cancel_fd, .events = POLLIN}};
        struct timespec left, *timeout = NULL;
        if (deadline_ns) {
            uint64_t now_ns = lb_now_ns();
            uint64_t left_ns = deadline_ns > now_ns ? deadline_ns - now_ns : 0;
            left.tv_sec = (time_t)(left_ns / 1000000000);
            left.tv_nsec = (long)(left_ns % 1000000000);
            timeout = &left;
        }
        int n = ppoll(p, 2, timeout, NULL);
        if (n < 0 && errno != EINTR)
            return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot wait for a connection");
        if (n > 0 && p[1].revents)
            return lb_fail(err, LB_E_CANCELLED, "cancelled");
        if (n > 0)
            return 0;
        if (n == 0)
            return lb_fail_timeout(err);
    }
}

static int wait_tcp(struct tcp *t, short events, uint64_t deadline_ns, struct lb_error *err)
{
    return wait_fd(t->fd, events, t->cancel_fd, deadline_ns, err);
}

static int fail_aborted(struct lb_error *err)
{
    return lb_fail(err, LB_E_CANCELLED, "the connection was aborted");
}

static int fail_broken(struct tcp *t, int sys_errno, struct lb_error *err)
{
    if (atomic_load(&t->aborted))
        return fail_aborted(err);
    lb_fail_errno(err, LB_E_NET, sys_errno, "the connection to the peer broke");
    return lb_remedy(err, "check that the peer still runs and that the network reaches it");
}

static int tcp_writev(struct lb_transport *base, const struct iovec *iov, unsigned n,
                      uint64_t deadline_ns, struct lb_error *err)
{
    struct tcp *t = tcp_of(base);
    size_t skip = 0; /* of iov[0] */

    while (n > 0) {
        struct iovec part[IOV_BATCH];
        unsigned n_part = LB_MIN(n, (unsigned)IOV_BATCH);
        memcpy(part, iov, n_part * sizeof(*part));
        part[0].iov_base = (char *)part[0].iov_base + skip;
        part[0].iov_len -= skip;
        struct msghdr m = {.msg_iov = part, .msg_iovlen = n_part};
        if (atomic_load_explicit(&t->aborted, memory_order_relaxed))
            return fail_aborted(err);
        ssize_t put = sendmsg(t->fd, &m, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (put < 0) {
            if (errno == EINTR)
                continue;
            if (errno != EAGAIN && errno != EWOULDBLOCK)
                return fail_broken(t, errno, err);
            uint64_t start_ns = lb_now_ns();
            int rc = wait_tcp(t, POLLOUT, deadline_ns, err);
            atomic_fetch_add_explicit(&base->blocked_ns, lb_now_ns() - start_ns,
                                      memory_order_relaxed);
            if (rc < 0)
                return -1;
            continue;
        }
        atomic_fetch_add_explicit(&base->copied_bytes, (uint64_t)put, memory_order_relaxed);
        skip += (size_t)put;
        while (n > 0 && skip >= iov->iov_len) {
            skip -= iov->iov_len;
            iov++;
            n--;
        }
    }
    return 0;
}

static ssize_t tcp_read_some(struct lb_transport *base, void *buf, size_t len,
                             uint64_t deadline_ns, struct lb_error *err)
{
    struct tcp *t = tcp_of(base);
    for (;;) {
        if (atomic_load_explicit(&t->aborted, memory_order_relaxed))
            return fail_aborted(err);
        ssize_t got = recv(t->fd, buf, len, MSG_DONTWAIT);
        if (got > 0)
            atomic_fetch_add_explicit(&base->copied_bytes, (uint64_t)got, memory_order_relaxed);
        if (got > 0 || (got == 0 && !atomic_load(&t->aborted)))
            return got;
        if (got == 0)
            return fail_aborted(err);
        if (errno == EINTR)
            continue;
        if (errno != EAGAIN && errno != EWOULDBLOCK)
            return fail_broken(t, errno, err);
        if (wait_tcp(t, POLLIN, deadline_ns, err) < 0)
            return -1;
    }
}

static void tcp_abort(struct lb_transport *base)
{
    struct tcp *t = tcp_of(base);
    atomic_store(&t->aborted, true);
    shutdown(t->fd, SHUT_RDWR);
}

static int tcp_fd(struct lb_transport *base)
{
    return tcp_of(base)->fd;
}

static void tcp_close(struct lb_transport *base)
{
    close(tcp_of(base)->fd);
    free(base);
}

static const struct lb_transport_ops TCP_OPS = {
    .name = "tcp",
    .writev = tcp_writev,
    .read_some = tcp_read_some,
    .abort = tcp_abort,
    .fd = tcp_fd,
    .close = tcp_close,
};

/* Failures do not matter: a unix socket knows none of these. The buffers are left
 * to the kernel's own tuning, which knows the path; setting them by hand would
 * cap them at net.core.*mem_max. What is queued but not yet on its way is kept
 * short, since the pages of the last round stand in line behind it. */
static void tune(int fd)
{
    static const struct {
        int level, name, value;
    } opts[] = {
        {IPPROTO_TCP, TCP_NODELAY, 1},
        {SOL_SOCKET, SO_KEEPALIVE, 1},
        {IPPROTO_TCP, TCP_KEEPIDLE, 5},
        {IPPROTO_TCP, TCP_KEEPINTVL, 5},
        {IPPROTO_TCP, TCP_KEEPCNT, 3},
        {IPPROTO_TCP, TCP_USER_TIMEOUT, USER_TIMEOUT_MS},
        {IPPROTO_TCP, TCP_NOTSENT_LOWAT, UNSENT_BYTES},
    };
    for (size_t i = 0; i < LB_ARRAY_LEN(opts); i++)
        setsockopt(fd, opts[i].level, opts[i].name, &opts[i].value, sizeof(opts[i].value));
}

struct lb_transport *lb_tcp_from_fd(int fd)
{
    struct tcp *t = lb_alloc(sizeof(*t));
    t->base.ops = &TCP_OPS;
    t->fd = fd;
    t->cancel_fd = -1;
    tune(fd);
    return &t->base;
}

void lb_tcp_set_cancel_fd(struct lb_transport *t, int fd)
{
    assert(t->ops == &TCP_OPS);
    tcp_of(t)->cancel_fd = fd;
}

/* One address. Returns the connected socket or -1. */
static int connect_one(const struct addrinfo *ai, uint64_t deadline_ns, int cancel_fd,
                       struct lb_error *err)
{
    LB_AUTO_FD int fd =
        socket(ai->ai_family, ai->ai_socktype | SOCK_CLOEXEC | SOCK_NONBLOCK, ai->ai_protocol);
    if (fd < 0)
        return lb_fail_errno(err, LB_E_NET, errno, "cannot make a socket");
    if (connect(fd, ai->ai_addr, ai->ai_addrlen) < 0) {
        if (errno != EINPROGRESS && errno != EINTR)
            return lb_fail_errno(err, LB_E_NET, errno, "cannot connect");
        if (wait_fd(fd, POLLOUT, cancel_fd, deadline_ns, err) < 0)
            return -1;
        int so_error = 0;
        socklen_t len = sizeof(so_error);
        getsockopt(fd, SOL_SOCKET, SO_ERROR, &so_error, &len);
        if (so_error)
            return lb_fail_errno(err, LB_E_NET, so_error, "cannot connect");
    }
    return LB_STEAL_FD(fd);
}

static int resolve(const char *host, uint16_t port, int flags, struct addrinfo **out,
                   struct lb_error *err)
{
    char service[8];
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = flags | AI_NUMERICSERV};

    snprintf(service, sizeof(service), "%u", port);
    int rc = getaddrinfo(host, service, &hints, out);
    if (rc == 0)
        return 0;
    lb_fail(err, LB_E_NET, "cannot resolve \"%s\": %s", host ? host : "*", gai_strerror(rc));
    return lb_remedy(err, "check the name, or use an IP address");
}

static void connect_remedy(const char *host, uint16_t port, struct lb_error *err)
{
    if (!err || err->code != LB_E_NET)
        return;
    int e = err->sys_errno;
    lb_context(err, "%s port %u", host, port);
    if (e == ECONNREFUSED)
        lb_remedy(err, "start lifeboatd there and check that it listens on port %u", port);
    else if (e)
        lb_remedy(err, "check that %s is up, and that no firewall drops port %u", host, port);
}

int lb_tcp_connect(const char *host, uint16_t port, unsigned timeout_ms, int cancel_fd,
                   struct lb_transport **out, struct lb_error *err)
{
    uint64_t deadline_ns = lb_deadline(timeout_ms);
    struct addrinfo *list;
    int fd = -1;

    if (resolve(host, port, AI_ADDRCONFIG, &list, NULL) < 0 &&
        resolve(host, port, 0, &list, err) < 0) /* a host with loopback only */
        return -1;
    for (const struct addrinfo *ai = list; ai && fd < 0; ai = ai->ai_next) {
        struct lb_error one = LB_ERROR_INIT;
        fd = connect_one(ai, deadline_ns, cancel_fd, &one);
        if (fd < 0 && err)
            *err = one;
        if (fd < 0 && one.code == LB_E_CANCELLED)
            break;
    }
    freeaddrinfo(list);
    if (fd < 0) {
        connect_remedy(host, port, err);
        return -1;
    }
    *out = lb_tcp_from_fd(fd);
    return 0;
}

static int listen_one(const struct addrinfo *ai, struct lb_error *err)
{
    int on = 1, off = 0;
    LB_AUTO_FD int fd = socket(ai->ai_family, ai->ai_socktype | SOCK_CLOEXEC, ai->ai_protocol);

    if (fd < 0)
        return lb_fail_errno(err, LB_E_NET, errno, "cannot make a socket");
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    if (ai->ai_family == AF_INET6) /* one socket for both families */
        setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof(off));
    if (bind(fd, ai->ai_addr, ai->ai_addrlen) < 0 || listen(fd, 128) < 0)
        return lb_fail_errno(err, errno == EADDRINUSE ? LB_E_EXISTS : LB_E_NET, errno,
                             "cannot listen");
    return LB_STEAL_FD(fd);
}

int lb_tcp_listen(const char *hostport, uint16_t default_port, struct lb_error *err)
{
    char host[256];
    uint16_t port;
    struct addrinfo *list = NULL;
    int fd = -1;

    if (lb_parse_hostport(hostport, default_port, host, &port, err) < 0)
        return -1;
    struct lb_error one = LB_ERROR_INIT;
    if (host[0] ? resolve(host, port, AI_PASSIVE, &list, &one)
                : resolve("::", port, AI_PASSIVE | AI_NUMERICHOST, &list, &one))
        list = NULL;
    for (const struct addrinfo *ai = list; ai && fd < 0; ai = ai->ai_next)
        fd = listen_one(ai, &one);
    if (list)
        freeaddrinfo(list);
    if (fd < 0 && !host[0] && one.code != LB_E_EXISTS) { /* no IPv6 here */
        if (resolve("0.0.0.0", port, AI_PASSIVE | AI_NUMERICHOST, &list, &one) == 0) {
            fd = listen_one(list, &one);
            freeaddrinfo(list);
        }
    }
    if (fd >= 0)
        return fd;
    if (err)
        *err = one;
    lb_context(err, "%s port %u", host[0] ? host : "*", port);
    if (one.code == LB_E_EXISTS)
        lb_remedy(err, "another program has port %u: stop it, or choose another --listen", port);
    return -1;
}
