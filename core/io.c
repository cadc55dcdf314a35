/* core/io.c - whole reads and writes on sockets and pipes, descriptors passed.
 *
 * Data goes before limits: the deadline and the cancel fd are looked at only
 * when a call would have to wait.  SIGPIPE never comes from a socket (send
 * with MSG_NOSIGNAL); for pipes the program has to ignore it. */
#include "core/core.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>

enum { MAX_FDS = 16 };

struct wait_limit {
    uint64_t deadline_ns; /* 0: none */
    int cancel_fd;        /* -1: none */
};

static bool limited(const struct wait_limit *l)
{
    return l->deadline_ns || l->cancel_fd >= 0;
}

/* Until fd is ready for `events`, broken, the deadline or cancelled. */
static int wait_ready(int fd, short events, const struct wait_limit *l, struct lb_error *err)
{
    for (;;) {
        struct pollfd p[2] = {{.fd = fd, .events = events},
                              {.fd = l->cancel_fd, .events = POLLIN}};
        struct timespec left, *timeout = NULL;
        if (l->deadline_ns) {
            uint64_t now_ns = lb_now_ns();
            uint64_t left_ns = l->deadline_ns > now_ns ? l->deadline_ns - now_ns : 0;
            left.tv_sec = (time_t)(left_ns / 1000000000);
            left.tv_nsec = (long)(left_ns % 1000000000);
            timeout = &left;
        }
        int n = ppoll(p, 2, timeout, NULL);
        if (n < 0) {
            if (errno == EINTR)
                continue;
            return lb_fail_errno(err, LB_E_NET, errno, "cannot wait for the connection");
        }
        assert(!((p[0].revents | p[1].revents) & POLLNVAL));
        if (p[0].revents)
            return 0;
        if (p[1].revents)
            return lb_fail(err, LB_E_CANCELLED, "cancelled");
        if (n == 0) {
            lb_fail(err, LB_E_NET, "timed out waiting for the peer");
            return lb_remedy(err, "check that the peer runs and that the network reaches it");
        }
    }
}

static int read_loop(int fd, char *buf, size_t len, const struct wait_limit *l,
                     struct lb_error *err)
{
    size_t got = 0;
    bool is_socket = true;

    while (got < len) {
        ssize_t n;
        if (is_socket) {
            n = recv(fd, buf + got, len - got, limited(l) ? MSG_DONTWAIT : 0);
            if (n < 0 && errno == ENOTSOCK) {
                is_socket = false;
                continue;
            }
        } else {
            if (limited(l) && wait_ready(fd, POLLIN, l, err) < 0)
                return -1;
            n = read(fd, buf + got, len - got);
        }
        if (n > 0) {
            got += (size_t)n;
        } else if (n == 0) {
            if (got == 0)
                return lb_fail(err, LB_E_NET, "connection closed");
            return lb_fail(err, LB_E_NET, "connection closed after %zu of %zu bytes", got, len);
        } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
            if (wait_ready(fd, POLLIN, l, err) < 0)
                return -1;
        } else if (errno != EINTR) {
            return lb_fail_errno(err, LB_E_NET, errno, "cannot read from the connection");
        }
    }
    return 0;
}

static int write_loop(int fd, const char *buf, size_t len, const struct wait_limit *l,
                      struct lb_error *err)
{
    size_t put = 0;
    bool is_socket = true;

    while (put < len) {
        ssize_t n;
        if (is_socket) {
            n = send(fd, buf + put, len - put, MSG_NOSIGNAL | (limited(l) ? MSG_DONTWAIT : 0));
            if (n < 0 && errno == ENOTSOCK) {
                is_socket = false;
                continue;
            }
        } else {
            /* a pipe reported writable takes PIPE_BUF bytes without blocking */
            size_t chunk = limited(l) ? LB_MIN(len - put, (size_t)PIPE_BUF) : len - put;
            if (limited(l) && wait_ready(fd, POLLOUT, l, err) < 0)
                return -1;
            n = write(fd, buf + put, chunk);
        }
        if (n >= 0) {
            put += (size_t)n;
        } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
            if (wait_ready(fd, POLLOUT, l, err) < 0)
                return -1;
        } else if (errno != EINTR) {
            return lb_fail_errno(err, LB_E_NET, errno, "cannot write to the connection");
        }
    }
    return 0;
}

int lb_write_all(int fd, const void *buf, size_t len, struct lb_error *err)
{
    return write_loop(fd, buf, len, &(struct wait_limit){0, -1}, err);
}

int lb_read_all(int fd, void *buf, size_t len, struct lb_error *err)
{
    return read_loop(fd, buf, len, &(struct wait_limit){0, -1}, err);
}

int lb_read_all_until(int fd, void *buf, size_t len, uint64_t deadline_ns, int cancel_fd,
                      struct lb_error *err)
{
    return read_loop(fd, buf, len, &(struct wait_limit){deadline_ns, cancel_fd}, err);
}

int lb_write_all_until(int fd, const void *buf, size_t len, uint64_t deadline_ns, int cancel_fd,
                       struct lb_error *err)
{
    return write_loop(fd, buf, len, &(struct wait_limit){deadline_ns, cancel_fd}, err);
}

bool lb_readable(int fd, unsigned timeout_ms)
{
    struct wait_limit l = {lb_now_ns() + (uint64_t)timeout_ms * 1000000, -1};
    return wait_ready(fd, POLLIN, &l, NULL) == 0;
}

int lb_set_nonblock(int fd, bool on)
{
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0)
        return -1;
    return fcntl(fd, F_SETFL, on ? flags | O_NONBLOCK : flags & ~O_NONBLOCK) < 0 ? -1 : 0;
}

/* Control space: MAX_FDS descriptors, and the credentials that SO_PASSCRED adds. */
union control {
    struct cmsghdr align;
    char space[CMSG_SPACE(MAX_FDS * sizeof(int)) + CMSG_SPACE(sizeof(struct ucred))];
};

int lb_send_fds(int sock, const void *buf, size_t len, const int *fds, unsigned n_fds,
                struct lb_error *err)
{
    assert(n_fds <= MAX_FDS);
    assert(len > 0); /* descriptors need a byte to ride on, and 0 bytes read as EOF */
    const struct wait_limit none = {0, -1};
    struct iovec iov = {.iov_base = (void *)(uintptr_t)buf, .iov_len = len};
    union control control;
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};

    if (n_fds > 0) {
        memset(&control, 0, sizeof(control));
        msg.msg_control = &control;
        msg.msg_controllen = CMSG_SPACE(n_fds * sizeof(int));
        struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(n_fds * sizeof(int));
        memcpy(CMSG_DATA(c), fds, n_fds * sizeof(int));
    }
    ssize_t n;
    while ((n = sendmsg(sock, &msg, MSG_NOSIGNAL)) < 0) {
        if (errno == EINTR)
            continue;
        if (errno != EAGAIN && errno != EWOULDBLOCK)
            return lb_fail_errno(err, LB_E_NET, errno, "cannot send a message with %u descriptors",
                                 n_fds);
        if (wait_ready(sock, POLLOUT, &none, err) < 0)
            return -1;
    }
    /* the descriptors went with the first part of a stream */
    return write_loop(sock, (const char *)buf + n, len - (size_t)n, &none, err);
}

/* Takes the descriptors out of a message, all of them, up to `max`. */
static unsigned take_fds(struct msghdr *msg, int *all, unsigned max)
{
    unsigned n = 0;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(msg); c; c = CMSG_NXTHDR(msg, c)) {
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
            continue;
        size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < count && n < max; i++)
            memcpy(&all[n++], CMSG_DATA(c) + i * sizeof(int), sizeof(int));
    }
    return n;
}

ssize_t lb_recv_fds(int sock, void *buf, size_t len, int *fds, unsigned *n_fds,
                    struct lb_error *err)
{
    const struct wait_limit none = {0, -1};
    struct iovec iov = {.iov_base = buf, .iov_len = len};
    union control control;
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
    ssize_t n;

    for (;;) {
        msg.msg_control = &control;
        msg.msg_controllen = sizeof(control);
        n = recvmsg(sock, &msg, MSG_CMSG_CLOEXEC);
        if (n >= 0)
            break;
        if (errno == EINTR)
            continue;
        if (errno != EAGAIN && errno != EWOULDBLOCK)
            return lb_fail_errno(err, LB_E_NET, errno, "cannot receive a message");
        if (wait_ready(sock, POLLIN, &none, err) < 0)
            return -1;
    }

    int all[sizeof(union control) / sizeof(int)];
    unsigned got = take_fds(&msg, all, LB_ARRAY_LEN(all));
    const char *wrong = NULL;
    if (msg.msg_flags & MSG_CTRUNC || got > *n_fds)
        wrong = "more descriptors than expected";
    else if (msg.msg_flags & MSG_TRUNC)
        wrong = "a message longer than expected";
    if (wrong) {
        for (unsigned i = 0; i < got; i++)
            close(all[i]);
        return lb_fail(err, LB_E_PROTO, "the peer sent %s", wrong);
    }
    if (got)
        memcpy(fds, all, got * sizeof(int));
    *n_fds = got;
    return n;
}
