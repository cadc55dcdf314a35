/* remus/nbdkit/plugin.c - nbdkit plugin: passes what QEMU's mirror writes on to the session.
 *
 *   nbdkit PLUGIN fd=N size=BYTES [size=BYTES ...]      exports "0", "1", ... in that order
 *
 * A request is answered when all of it is in the socket N: whoever sees the answer knows that the
 * session can read it. A session that is slow makes requests wait. When it is gone what comes is dropped, as
 * the copy is worth nothing any more, until QEMU has ended the mirror and with it the last connection; then nbdkit
 * ends. An error would end the mirror in the middle of the guest's writes, and QEMU 7.2 may die of that. Discarded blocks are passed on as zeros, which is how QEMU's images read
 * them. Flushes need nothing: the backup makes an epoch durable when it is complete. Nobody reads. */
#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>

#include "remus/nbdkit/wire.h"

#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL
enum { KIND_WRITE = 1, KIND_ZERO = 2 }; /* enum lb_disk_op_kind */
enum { MAX_DISKS = 256 };

struct disk {
    uint32_t number;
    int64_t size_bytes;
};
static struct disk disks[MAX_DISKS];
static unsigned n_disks;
static int out_fd = -1;
static pthread_mutex_t out_lock = PTHREAD_MUTEX_INITIALIZER;
/* locked by out_lock */
static bool out_broken;   /* a message was cut short, or nobody reads: nothing may follow */
static bool session_gone;
static unsigned connections;

static int lb_config(const char *key, const char *value)
{
    if (strcmp(key, "fd") == 0)
        return nbdkit_parse_int("fd", value, &out_fd);
    if (strcmp(key, "size") != 0 || n_disks == MAX_DISKS) {
        nbdkit_error("unknown parameter %s, or too many disks", key);
        return -1;
    }
    int64_t size = nbdkit_parse_size(value);
    if (size < 0)
        return -1;
    disks[n_disks] = (struct disk){.number = n_disks, .size_bytes = size};
    n_disks++;
    return 0;
}

static int lb_config_complete(void)
{
    if (out_fd >= 0 && n_disks > 0)
        return 0;
    nbdkit_error("fd= and at least one size= are needed");
    return -1;
}

static void end_if_unused(void)
{
    if (session_gone && connections == 0)
        nbdkit_shutdown();
}

static void *watch_session(void *arg)
{
    struct pollfd p = {.fd = out_fd}; /* POLLHUP, which is always told */
    while (poll(&p, 1, -1) < 0 && errno == EINTR)
        ;
    pthread_mutex_lock(&out_lock);
    session_gone = true;
    end_if_unused();
    pthread_mutex_unlock(&out_lock);
    return arg;
}

static int lb_after_fork(void)
{
    pthread_t t;
    int e;
    /* nbdkit that was given its socket asks for a signal when its parent dies */
    prctl(PR_SET_PDEATHSIG, 0);
    e = pthread_create(&t, NULL, watch_session, NULL);
    if (e == 0)
        e = pthread_detach(t);
    if (e != 0)
        nbdkit_error("cannot start a thread: error %d", e);
    return e == 0 ? 0 : -1;
}

static void *lb_open(int readonly)
{
    const char *name = nbdkit_export_name();
    unsigned number;
    (void)readonly;
    if (!name || nbdkit_parse_unsigned("export", name, &number) < 0 || number >= n_disks) {
        nbdkit_error("there is no disk '%s'", name ? name : "");
        return NULL;
    }
    pthread_mutex_lock(&out_lock);
    connections++;
    pthread_mutex_unlock(&out_lock);
    return &disks[number];
}

static void lb_close(void *handle)
{
    (void)handle;
    pthread_mutex_lock(&out_lock);
    connections--;
    end_if_unused();
    pthread_mutex_unlock(&out_lock);
}

static int64_t lb_get_size(void *handle)
{
    const struct disk *d = handle;
    return d->size_bytes;
}

static int lb_block_size(void *handle, uint32_t *minimum, uint32_t *preferred, uint32_t *maximum)
{
    (void)handle;
    *minimum = LB_DISK_SECTOR;
    *preferred = 4096;
    *maximum = LB_DISK_WIRE_MAX;
    return 0;
}

static int answer_yes(void *handle)
{
    (void)handle;
    return 1;
}

static int lb_can_fua(void *handle)
{
    (void)handle;
    return NBDKIT_FUA_NATIVE;
}

static int refuse(int error, const char *why)
{
    nbdkit_error("%s", why);
    nbdkit_set_error(error);
    return -1;
}

static int send_all(struct iovec *iov, int n)
{
    while (n > 0) {
        struct msghdr msg = {.msg_iov = iov, .msg_iovlen = (size_t)n};
        ssize_t sent = sendmsg(out_fd, &msg, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent < 0)
            return -1;
        for (; n > 0 && (size_t)sent >= iov->iov_len; iov++, n--)
            sent -= (ssize_t)iov->iov_len;
        if (n > 0) {
            iov->iov_base = (char *)iov->iov_base + sent;
            iov->iov_len -= (size_t)sent;
        }
    }
    return 0;
}

static int forward(const struct disk *d, uint32_t kind, const void *data, uint32_t len,
                   uint64_t offset)
{
    struct lb_disk_wire head = {.magic = LB_DISK_WIRE_MAGIC, .kind = kind, .disk = d->number,
                                .offset = offset, .len = len};
    struct iovec iov[2] = {{.iov_base = &head, .iov_len = sizeof(head)},
                           {.iov_base = (void *)data, .iov_len = len}};
    if (offset % LB_DISK_SECTOR || len % LB_DISK_SECTOR)
        return refuse(EINVAL, "a request that is not made of whole sectors");
    pthread_mutex_lock(&out_lock);
    if (!out_broken)
        out_broken = send_all(iov, kind == KIND_WRITE ? 2 : 1) < 0;
    pthread_mutex_unlock(&out_lock);
    return 0;
}

static int lb_pwrite(void *handle, const void *buf, uint32_t count, uint64_t offset, uint32_t flags)
{
    (void)flags;
    return forward(handle, KIND_WRITE, buf, count, offset);
}

static int lb_zero(void *handle, uint32_t count, uint64_t offset, uint32_t flags)
{
    (void)flags;
    return forward(handle, KIND_ZERO, NULL, count, offset);
}

static int lb_pread(void *handle, void *buf, uint32_t count, uint64_t offset, uint32_t flags)
{
    (void)handle, (void)buf, (void)count, (void)offset, (void)flags;
    return refuse(EIO, "this copy can only be written");
}

static int lb_flush(void *handle, uint32_t flags)
{
    (void)handle, (void)flags;
    return 0;
}

static struct nbdkit_plugin plugin = {
    .name = "lifeboat",
    .version = "1",
    .longname = "Lifeboat disk replication",
    .description = "passes writes on to the session that protects the VM",
    .config = lb_config,
    .config_complete = lb_config_complete,
    .config_help = "fd=<N>        socket of the session\nsize=<BYTES>  of each disk, in order",
    .after_fork = lb_after_fork,
    .open = lb_open,
    .close = lb_close,
    .get_size = lb_get_size,
    .block_size = lb_block_size,
    .can_multi_conn = answer_yes,
    .can_fast_zero = answer_yes,
    .can_fua = lb_can_fua,
    .pread = lb_pread,
    .pwrite = lb_pwrite,
    .zero = lb_zero,
    .trim = lb_zero,
    .flush = lb_flush,
    .errno_is_preserved = 1,
};
NBDKIT_REGISTER_PLUGIN(plugin)
