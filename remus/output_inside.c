/* remus/output_inside.c - one card whose output the hypervisor itself hands to us and takes back.
 *
 * Both ways the same bytes: u32 BE length, frame. In the queue a frame has a vnet header of zeros in front, as if
 * it came from a tap. The hypervisor blocks when nobody reads: so we always read, whatever the queue holds.
 *
 * The gate of these cards is a comparison before each write, not a part of the kernel: a session that is stopped between
 * the two and wakes after its lease can let one frame out. The hypervisor is frozen by then (primary's guard) and
 * destroyed without running again, so the frame stays in its socket. */
#include "remus/output_internal.h"

#include <arpa/inet.h>
#include <errno.h>
#include <string.h>
#include <sys/uio.h>

#define PREFIX 4u                        /* the length */
#define FRAME_MAX (LB_FRAME_MAX - LB_VNET_HDR)
#define BUF_BYTES (PREFIX + FRAME_MAX)

int lb_oinside_arm(struct lb_oinside *c, struct lb_hv_vm *vm, struct lb_error *err)
{
    int fds[2] = {-1, -1};
    c->buf = lb_try_alloc(BUF_BYTES, err);
    if (!c->buf || lb_hv_nic_hold(vm, c->id, fds, err) < 0)
        return -1;
    c->in_fd = fds[0];
    c->out_fd = fds[1];
    c->held = true;
    if (lb_set_nonblock(c->in_fd, true) < 0 || lb_set_nonblock(c->out_fd, true) < 0)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "%s: held frames", c->id);
    return 0;
}

/* Move whole frames from buf to the queue. */
static int parse(struct lb_oinside *c, struct lb_oq *q, struct lb_error *err)
{
    size_t at = 0;
    int n = 0;
    while (c->have - at >= PREFIX) {
        uint32_t len;
        memcpy(&len, c->buf + at, PREFIX);
        len = ntohl(len);
        if (len > FRAME_MAX)
            return lb_fail(err, LB_E_HV, "%s: a held frame of %u bytes", c->id, len);
        if (c->have - at - PREFIX < len)
            break;
        unsigned char *room = lb_oq_room(q, err);
        if (!room)
            return -1;
        memset(room, 0, LB_VNET_HDR);
        memcpy(room + LB_VNET_HDR, c->buf + at + PREFIX, len);
        lb_oq_commit(q, LB_VNET_HDR + len, lb_now_ns());
        at += PREFIX + len;
        n++;
    }
    memmove(c->buf, c->buf + at, c->have - at);
    c->have -= at;
    return n;
}

int lb_oinside_read(struct lb_oinside *c, struct lb_oq *q, unsigned max_frames,
                    struct lb_error *err)
{
    int total = 0;
    while (total < (int)max_frames && !c->broken && c->in_fd >= 0) {
        ssize_t n = read(c->in_fd, c->buf + c->have, BUF_BYTES - c->have);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN)
            break;
        if (n <= 0) {
            c->broken = true;
            return lb_fail(err, LB_E_HV, "%s: the hypervisor ended the hold", c->id);
        }
        c->have += (size_t)n;
        int frames = parse(c, q, err);
        if (frames < 0) {
            c->broken = true;
            return -1;
        }
        total += frames;
    }
    return total;
}

int lb_oinside_write(struct lb_oinside *c, const struct lb_oq_frame *f, struct lb_error *err)
{
    size_t len = (size_t)f->len - LB_VNET_HDR;
    uint32_t prefix = htonl((uint32_t)len);
    while (c->sent < PREFIX + len) {
        size_t p = LB_MIN(c->sent, (size_t)PREFIX), d = c->sent - p;
        struct iovec v[2] = {
            {.iov_base = (char *)&prefix + p, .iov_len = PREFIX - p},
            {.iov_base = (char *)f->data + LB_VNET_HDR + d, .iov_len = len - d},
        };
        ssize_t n = writev(c->out_fd, v, 2);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN)
            return 0;
        if (n < 0) {
            c->broken = true;
            return lb_fail_errno(err, LB_E_HV, errno, "%s: releasing a frame", c->id);
        }
        c->sent += (size_t)n;
    }
    c->sent = 0;
    return 1;
}

int lb_oinside_disarm(struct lb_oinside *c, struct lb_hv_vm *vm, struct lb_error *err)
{
    if (!c->held)
        return 0;
    if (lb_hv_nic_unhold(vm, c->id, err) < 0 && !c->broken)
        return -1;
    c->held = false;
    return 0;
}

void lb_oinside_close(struct lb_oinside *c)
{
    lb_cleanup_fd(&c->in_fd);
    lb_cleanup_fd(&c->out_fd);
    free(c->buf);
    c->buf = NULL;
}
