/* netproto/transport_fault.c - a filter that damages what is sent, for tests.
 *
 * Counts the bytes written through it; at the told places it flips a bit, ends
 * the stream, or blocks until abort. Reading is passed on untouched. */
#include "netproto/netproto_internal.h"

#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <time.h>

struct fault {
    struct lb_transport base;
    struct lb_transport *inner;
    struct lb_fault_plan plan;
    int64_t sent; /* bytes; writer only */
    bool ended;   /* writer only */
    pthread_mutex_t lock;
    pthread_cond_t cond;
    bool aborted; /* by lock */
};

static struct fault *fault_of(struct lb_transport *t)
{
    return (struct fault *)t;
}

static int stall(struct fault *f, uint64_t deadline_ns, struct lb_error *err)
{
    struct timespec ts = {.tv_sec = (time_t)(deadline_ns / 1000000000),
                          .tv_nsec = (long)(deadline_ns % 1000000000)};
    int rc = 0;

    pthread_mutex_lock(&f->lock);
    while (!f->aborted && rc != ETIMEDOUT)
        rc = deadline_ns ? pthread_cond_timedwait(&f->cond, &f->lock, &ts)
                         : pthread_cond_wait(&f->cond, &f->lock);
    bool aborted = f->aborted;
    pthread_mutex_unlock(&f->lock);
    return aborted ? lb_fail(err, LB_E_CANCELLED, "the connection was aborted")
                   : lb_fail_timeout(err);
}

static int fault_put(struct fault *f, const void *buf, size_t len, uint64_t deadline_ns,
                     struct lb_error *err)
{
    LB_AUTO_FREE uint8_t *copy = lb_alloc(len ? len : 1);
    struct iovec iov = {.iov_base = copy, .iov_len = len};
    const struct lb_fault_plan *p = &f->plan;

    memcpy(copy, buf, len);
    int64_t flip = p->flip_bit_at - f->sent * 8;
    if (p->flip_bit_at >= 0 && flip >= 0 && flip < (int64_t)len * 8)
        copy[flip / 8] ^= (uint8_t)(1u << (flip % 8));
    bool end = p->truncate_at >= 0 && f->sent + (int64_t)len > p->truncate_at;
    bool hang = p->stall_at >= 0 && f->sent + (int64_t)len > p->stall_at;
    if (end || hang) {
        int64_t at = end ? p->truncate_at : p->stall_at;
        iov.iov_len = (size_t)LB_MAX(at - f->sent, 0);
    }
    f->sent += (int64_t)iov.iov_len;
    if (iov.iov_len > 0 && f->inner->ops->writev(f->inner, &iov, 1, deadline_ns, err) < 0)
        return -1;
    if (end) {
        f->ended = true;
        f->inner->ops->abort(f->inner);
        return lb_fail(err, LB_E_NET, "the connection to the peer broke");
    }
    return hang ? stall(f, deadline_ns, err) : 0;
}

static int fault_writev(struct lb_transport *t, const struct iovec *iov, unsigned n,
                        uint64_t deadline_ns, struct lb_error *err)
{
    struct fault *f = fault_of(t);
    if (f->ended)
        return lb_fail(err, LB_E_NET, "the connection to the peer broke");
    for (unsigned i = 0; i < n; i++)
        if (fault_put(f, iov[i].iov_base, iov[i].iov_len, deadline_ns, err) < 0)
            return -1;
    return 0;
}

static ssize_t fault_read_some(struct lb_transport *t, void *buf, size_t len, uint64_t deadline_ns,
                               struct lb_error *err)
{
    struct lb_transport *inner = fault_of(t)->inner;
    return inner->ops->read_some(inner, buf, len, deadline_ns, err);
}

static void fault_abort(struct lb_transport *t)
{
    struct fault *f = fault_of(t);
    pthread_mutex_lock(&f->lock);
    f->aborted = true;
    pthread_cond_broadcast(&f->cond);
    pthread_mutex_unlock(&f->lock);
    f->inner->ops->abort(f->inner);
}

static int fault_fd(struct lb_transport *t)
{
    struct lb_transport *inner = fault_of(t)->inner;
    return inner->ops->fd(inner);
}

static void fault_close(struct lb_transport *t)
{
    struct fault *f = fault_of(t);
    f->inner->ops->close(f->inner);
    pthread_cond_destroy(&f->cond);
    pthread_mutex_destroy(&f->lock);
    free(f);
}

static const struct lb_transport_ops FAULT_OPS = {
    .name = "fault",
    .writev = fault_writev,
    .read_some = fault_read_some,
    .abort = fault_abort,
    .fd = fault_fd,
    .close = fault_close,
};

struct lb_transport *lb_transport_fault(struct lb_transport *inner, const struct lb_fault_plan *p)
{
    struct fault *f = lb_alloc(sizeof(*f));
    pthread_condattr_t attr;

    f->base.ops = &FAULT_OPS;
    f->inner = inner;
    f->plan = *p;
    pthread_mutex_init(&f->lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&f->cond, &attr);
    pthread_condattr_destroy(&attr);
    return &f->base;
}
