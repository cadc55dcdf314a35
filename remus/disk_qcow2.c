/* remus/disk_qcow2.c - qcow2 images of the backup, written by QEMU's own code: qemu-nbd.
 *
 * Requests are pipelined: a copy of each is kept in a slot until its answer. NBD gives no order to
 * requests in flight, so one that overlaps another waits for it. qemu-nbd holds QEMU's image locks
 * and ends by itself, everything written, when we disconnect. */
#include "remus/disk_internal.h"

#include <errno.h>
#include <inttypes.h>
#include <libnbd.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include "core/host.h"

#define SLOTS 32
#define ZERO_MAX (UINT64_C(1) << 30)
enum { START_MS = 15000, ANSWER_MS = 60000, CREATE_MS = 30000, END_MS = 10000, DIED_MS = 500 };

struct slot {
    struct qcow2 *owner;
    bool busy;
    uint64_t offset, len;
    void *data;
};
struct qcow2 {
    struct nbd_handle *nbd;
    struct lb_disk_child server;
    struct slot slots[SLOTS];
    unsigned n_busy;
    int failed;            /* errno of the first request that failed */
    char *path;
};

static int fail_nbd(struct qcow2 *q, const char *doing, struct lb_error *err)
{
    int e = nbd_get_errno();
    if (e == ENOSPC || e == EDQUOT)
        return lb_disk_write_failed(q->path, e, err);
    const char *why = nbd_get_error();
    lb_fail(err, LB_E_HV, "%s: %s of qemu-nbd failed: %s", q->path, doing, why ? why : strerror(e));
    return lb_remedy(err, "look into the kernel's log for errors of this storage");
}

/* ------------------------------------------------------------------ requests */

static int answered(void *arg, int *error)
{
    struct slot *s = arg;
    if (*error && !s->owner->failed)
        s->owner->failed = *error;
    s->busy = false;
    s->owner->n_busy--;
    free(LB_STEAL_PTR(s->data));
    return 1; /* nothing to look up afterwards */
}

/* Wait for at least one answer. */
static int wait_answer(struct qcow2 *q, struct lb_error *err)
{
    int n = nbd_poll(q->nbd, ANSWER_MS);
    if (n < 0)
        return fail_nbd(q, "a request", err);
    if (n == 0) {
        lb_fail(err, LB_E_HV, "%s: its storage has not answered for %d s", q->path, ANSWER_MS / 1000);
        return lb_remedy(err, "look into the kernel's log for errors of this storage");
    }
    return 0;
}

static int check_failed(const struct qcow2 *q, struct lb_error *err)
{
    return q->failed ? lb_disk_write_failed(q->path, q->failed, err) : 0;
}

static bool overlaps(const struct qcow2 *q, uint64_t offset, uint64_t len)
{
    for (unsigned i = 0; i < SLOTS; i++)
        if (q->slots[i].busy && q->slots[i].offset < offset + len &&
            offset < q->slots[i].offset + q->slots[i].len)
            return true;
    return false;
}

static struct slot *free_slot(struct qcow2 *q)
{
    unsigned i = 0;
    while (q->slots[i].busy)
        i++;
    return &q->slots[i];
}

static int send_request(struct qcow2 *q, const void *data, uint64_t offset, uint64_t len,
                        struct lb_error *err)
{
    while (q->n_busy == SLOTS || overlaps(q, offset, len))
        if (wait_answer(q, err) < 0)
            return -1;
    struct slot *s = free_slot(q);
    nbd_completion_callback done = {.callback = answered, .user_data = s};
    *s = (struct slot){.owner = q, .busy = true, .offset = offset, .len = len};
    if (data && !(s->data = lb_try_alloc(len, err))) {
        s->busy = false;
        return -1;
    }
    if (data)
        memcpy(s->data, data, len);
    q->n_busy++;
    int64_t cookie = data ? nbd_aio_pwrite(q->nbd, s->data, len, offset, done, 0)
                          : nbd_aio_zero(q->nbd, len, offset, done, 0);
    if (cookie >= 0)
        return 0;
    if (s->busy) {
        int ignored = 0;
        answered(s, &ignored);
    }
    return fail_nbd(q, "a request", err);
}

static int qcow2_apply(void *priv, const struct lb_disk_op *op, struct lb_error *err)
{
    struct qcow2 *q = priv;
    if (op->kind == LB_DISK_WRITE) {
        if (send_request(q, op->data, op->offset, op->len, err) < 0)
            return -1;
    } else {
        for (uint64_t at = 0, n; at < op->len; at += n) {
            n = LB_MIN(op->len - at, ZERO_MAX);
            if (send_request(q, NULL, op->offset + at, n, err) < 0)
                return -1;
        }
    }
    return check_failed(q, err);
}

static int qcow2_flush(void *priv, struct lb_error *err)
{
    struct qcow2 *q = priv;
    while (q->n_busy > 0)
        if (wait_answer(q, err) < 0)
            return -1;
    if (check_failed(q, err) < 0)
        return -1;
    return nbd_flush(q->nbd, 0) == 0 ? 0 : fail_nbd(q, "a flush", err);
}

static int qcow2_close(void *priv, struct lb_error *err)
{
    struct qcow2 *q = priv;
    int rc = qcow2_flush(q, err);
    if (nbd_aio_is_ready(q->nbd) > 0)
        nbd_shutdown(q->nbd, 0);
    nbd_close(q->nbd); /* requests without an answer end here: `answered` frees them */
    lb_disk_child_end(&q->server, rc == 0 ? END_MS : 0);
    free(q->path);
    free(q);
    return rc;
}

const struct lb_disk_target_ops lb_disk_qcow2_ops = {qcow2_apply, qcow2_flush, qcow2_close};

/* ------------------------------------------------------------ create and open */

int lb_disk_qcow2_create(const struct lb_disk_target_opts *o, struct lb_error *err)
{
    char program[128], size[32];
    LB_AUTO_FREE char *said = NULL;
    if (lb_disk_find_program("qemu-img", "qemu-utils", program, err) < 0)
        return -1;
    snprintf(size, sizeof(size), "%" PRIu64, o->size_bytes);
    const char *const argv[] = {program, "create", "-q", "-f", "qcow2", "--", o->path, size, NULL};
    if (lb_host_run(argv, CREATE_MS, &said, err) < 0) {
        lb_context(err, "cannot make %s", o->path);
        return lb_remedy(err, "does its directory exist, with room in it?");
    }
    if (chmod(o->path, 0600) == 0 &&
        ((o->uid == geteuid() && o->gid == getegid()) || chown(o->path, o->uid, o->gid) == 0))
        return 0;
    lb_disk_write_failed(o->path, errno, err);
    unlink(o->path);
    return -1;
}

static int connect_to(const char *path, struct lb_error *err)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    snprintf(a.sun_path, sizeof(a.sun_path), "%s", path);
    LB_AUTO_FD int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&a, sizeof(a)) < 0)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot connect to %s", path);
    return LB_STEAL_FD(fd);
}

static int start_server(struct qcow2 *q, const char *run_dir, struct lb_error *err)
{
    static atomic_uint number;
    char program[128];
    LB_AUTO_FREE char *socket_path =
        lb_asprintf("%s/qcow2-%u.sock", run_dir, atomic_fetch_add(&number, 1));
    if (lb_disk_find_program("qemu-nbd", "qemu-utils", program, err) < 0)
        return -1;
    const char *const argv[] = {program, "--format=qcow2", "--cache=writeback", "--discard=unmap",
                                "--shared=1", "--", q->path, NULL};
    struct lb_disk_child_opts o = {.argv = argv, .socket = socket_path, .uid = geteuid(),
                                   .gid = getegid(), .pass_fd = -1};
    return lb_disk_child_start(&o, &q->server, err);
}

static int handshake(struct qcow2 *q, struct lb_error *err)
{
    int fd = connect_to(q->server.socket, err);
    lb_disk_child_unlink(&q->server);
    if (fd < 0)
        return -1;
    uint64_t until = lb_now_ns() + START_MS * UINT64_C(1000000);
    int rc = nbd_aio_connect_socket(q->nbd, fd); /* the fd is its own now */
    while (rc == 0 && nbd_aio_is_connecting(q->nbd) > 0 && lb_now_ns() < until)
        rc = nbd_poll(q->nbd, START_MS) < 0 ? -1 : 0;
    return rc == 0 && nbd_aio_is_ready(q->nbd) > 0 ? 0 : -1;
}

int lb_disk_qcow2_open(const struct lb_disk_target_opts *o, void **priv, uint64_t *size_bytes,
                       struct lb_error *err)
{
    struct qcow2 *q = lb_alloc(sizeof(*q));
    q->path = lb_strdup(o->path);
    q->server.pidfd = q->server.log_fd = -1;
    q->nbd = nbd_create();
    int rc = q->nbd ? start_server(q, o->run_dir, err)
                    : lb_fail(err, LB_E_INTERNAL, "cannot start libnbd: %s", nbd_get_error());
    if (rc == 0 && handshake(q, err) < 0) {
        lb_disk_child_failed(&q->server, DIED_MS, err);
        rc = lb_remedy(err, "try `qemu-img info %.256s`", q->path);
    }
    int64_t size = rc == 0 ? nbd_get_size(q->nbd) : -1;
    if (rc == 0 && size >= 0) {
        *size_bytes = (uint64_t)size;
        *priv = q;
        return 0;
    }
    nbd_close(q->nbd);
    lb_disk_child_end(&q->server, 0);
    free(q->path);
    free(q);
    return rc < 0 ? -1 : lb_fail(err, LB_E_HV, "qemu-nbd does not know the size of %s", o->path);
}
