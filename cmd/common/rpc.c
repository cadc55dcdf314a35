/* cmd/common/rpc.c - see rpc.h.
 *
 * A unix socket address holds 107 bytes, a state directory may be deeper: the
 * directory is opened and the socket named through /proc/self/fd. */
#include "cmd/common/rpc.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

static void put_u32(uint8_t *p, uint32_t v)
{
    for (int i = 0; i < 4; i++)
        p[i] = (uint8_t)(v >> (8 * i));
}

uint8_t *lb_rpc_frame(const ProtobufCMessage *m, size_t *len, struct lb_error *err)
{
    size_t n = protobuf_c_message_get_packed_size(m);
    uint8_t *buf;

    if (n > LB_RPC_MAX_BYTES) {
        lb_fail(err, LB_E_NO_SPACE, "a message of %zu bytes is too long (at most %u)", n,
                LB_RPC_MAX_BYTES);
        return NULL;
    }
    buf = lb_alloc(4 + n);
    put_u32(buf, (uint32_t)n);
    protobuf_c_message_pack(m, buf + 4);
    *len = 4 + n;
    return buf;
}

int lb_rpc_send(int fd, const ProtobufCMessage *m, uint64_t deadline_ns, struct lb_error *err)
{
    size_t len;
    LB_AUTO_FREE uint8_t *buf = lb_rpc_frame(m, &len, err);

    return buf ? lb_write_all_until(fd, buf, len, deadline_ns, -1, err) : -1;
}

ProtobufCMessage *lb_rpc_recv(int fd, const ProtobufCMessageDescriptor *type, uint64_t deadline_ns,
                              int cancel_fd, struct lb_error *err)
{
    ProtobufCMessage *m;
    uint8_t head[4];
    uint32_t len;

    if (lb_read_all_until(fd, head, sizeof(head), deadline_ns, cancel_fd, err))
        return NULL;
    len = head[0] | (uint32_t)head[1] << 8 | (uint32_t)head[2] << 16 | (uint32_t)head[3] << 24;
    if (len > LB_RPC_MAX_BYTES) {
        lb_fail(err, LB_E_PROTO, "a message of %u bytes was announced, at most %u are allowed", len,
                LB_RPC_MAX_BYTES);
        return NULL;
    }
    LB_AUTO_FREE uint8_t *buf = lb_try_alloc((size_t)len + 1, err);
    if (!buf || lb_read_all_until(fd, buf, len, deadline_ns, cancel_fd, err))
        return NULL;
    m = protobuf_c_message_unpack(type, NULL, len, buf);
    if (!m)
        lb_fail(err, LB_E_PROTO, "a message could not be understood");
    return m;
}

/* ------------------------------------------------------------------- sockets */

/* Fill *a for path; *dir_fd must stay open as long as *a is used. */
static int address(const char *path, struct sockaddr_un *a, int *dir_fd, struct lb_error *err)
{
    const char *slash = strrchr(path, '/');
    const char *base = slash ? slash + 1 : path;

    memset(a, 0, sizeof(*a));
    a->sun_family = AF_UNIX;
    *dir_fd = -1;
    if (strlen(path) < sizeof(a->sun_path)) {
        memcpy(a->sun_path, path, strlen(path) + 1);
        return 0;
    }
    LB_AUTO_FREE char *dir = slash ? lb_asprintf("%.*s", (int)(slash - path), path)
                                   : lb_strdup(".");
    if (strlen(base) > 64)
        return lb_fail(err, LB_E_USAGE, "the socket name %s is too long", base);
    *dir_fd = open(dir, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (*dir_fd < 0)
        return lb_fail_errno(err, LB_E_NOT_FOUND, errno, "cannot open %s", dir);
    snprintf(a->sun_path, sizeof(a->sun_path), "/proc/self/fd/%d/%s", *dir_fd, base);
    return 0;
}

int lb_unix_connect(const char *path, struct lb_error *err)
{
    struct sockaddr_un a;
    LB_AUTO_FD int dir_fd = -1;
    /* Without waiting: a QEMU monitor in use takes two connections more, and a third would
     * wait for ever. */
    LB_AUTO_FD int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

    if (fd < 0)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot make a socket");
    if (address(path, &a, &dir_fd, err))
        return -1;
    if (connect(fd, (struct sockaddr *)&a, sizeof(a)) < 0) {
        int e = errno;

        lb_fail_errno(err, e == ENOENT ? LB_E_NOT_FOUND : LB_E_NET, e, "cannot connect to %s%s",
                      path, e == EAGAIN ? ": too many others wait for it" : "");
        return e == EAGAIN ? lb_remedy(err, "close the other client of that socket, or try again")
                           : -1;
    }
    lb_set_nonblock(fd, false);
    return LB_STEAL_FD(fd);
}

int lb_unix_listen(const char *path, mode_t mode, struct lb_error *err)
{
    struct sockaddr_un a;
    LB_AUTO_FD int dir_fd = -1;
    LB_AUTO_FD int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    int other;
    mode_t old;
    int rc;

    if (fd < 0)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot make a socket");
    if (address(path, &a, &dir_fd, err))
        return -1;
    other = lb_unix_connect(path, NULL);
    if (other >= 0) {
        close(other);
        lb_fail(err, LB_E_EXISTS, "another process listens on %s", path);
        return lb_remedy(err, "stop it, or give another --socket and --state-dir");
    }
    struct stat st;
    if (!lstat(path, &st) && !S_ISSOCK(st.st_mode)) {
        lb_fail(err, LB_E_EXISTS, "%s exists and is not a socket", path);
        return lb_remedy(err, "give another path");
    }
    unlink(path);
    old = umask(0777 & ~mode);
    rc = bind(fd, (struct sockaddr *)&a, sizeof(a));
    umask(old);
    if (rc < 0 || listen(fd, 64) < 0) {
        lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot listen on %s", path);
        return lb_remedy(err, "see that its directory exists and that you may write there");
    }
    return LB_STEAL_FD(fd);
}
