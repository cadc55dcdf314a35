/* netproto/transport_memory.c - two connected ends inside one process, for tests.
 *
 *      end a --pipe[0]--> end b         each pipe: a growing buffer that blocks
 *      end b --pipe[1]--> end a         the writer at PIPE_MAX
 *
 * The pair is freed when both ends are closed. What was written before an end
 * is closed or aborted can still be read by the other, then it sees the end. */
#include "netproto/netproto_internal.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>

#define PIPE_MAX ((size_t)16 << 20)

struct pipe_buf {
    uint8_t *data;
    size_t cap, start, end;
    bool ended;   /* by its writer */
    bool refused; /* by its reader: writes fail */
    int event_fd; /* readable while there is something to read */
    pthread_cond_t changed;
};

struct pair;
struct mem {
    struct lb_transport base;
    struct pair *pair;
    unsigned side; /* writes pipe[side], reads pipe[!side] */
    bool aborted;
    bool closed;
};
struct pair {
    pthread_mutex_t lock; /* guards everything here */
    struct pipe_buf pipe[2];
    struct mem ends[2];
};

static struct mem *mem_of(struct lb_transport *t)
{
    return (struct mem *)t;
}

static int wait_changed(struct pair *p, struct pipe_buf *b, uint64_t deadline_ns,
                        struct lb_error *err)
{
    if (!deadline_ns) {
        pthread_cond_wait(&b->changed, &p->lock);
        return 0;
    }
    struct timespec ts = {.tv_sec = (time_t)(deadline_ns / 1000000000),
                          .tv_nsec = (long)(deadline_ns % 1000000000)};
    if (pthread_cond_timedwait(&b->changed, &p->lock, &ts) == ETIMEDOUT)
        return lb_fail_timeout(err);
    return 0;
}

static void signal_readable(struct pipe_buf *b)
{
    uint64_t one = 1;
    if (write(b->event_fd, &one, sizeof(one)) < 0)
        return; /* the counter is full: readable anyway */
}

/* Room for at least 1 byte; the caller holds the lock. */
static size_t make_room(struct pipe_buf *b, size_t want)
{
    size_t used = b->end - b->start;
    if (used >= PIPE_MAX)
        return 0;
    if (b->cap - b->end < want && b->start > 0) {
        memmove(b->data, b->data + b->start, used);
        b->start = 0;
        b->end = used;
    }
    if (b->cap - b->end < want && b->cap < PIPE_MAX) {
        b->cap = LB_MIN(PIPE_MAX, LB_MAX(b->cap * 2, used + want));
        b->data = lb_realloc(b->data, b->cap);
    }
    return b->cap - b->end;
}

static int put_bytes(struct mem *m, const uint8_t *src, size_t len, uint64_t deadline_ns,
                     struct lb_error *err)
{
    struct pair *p = m->pair;
    struct pipe_buf *b = &p->pipe[m->side];

    while (len > 0) {
        if (m->aborted)
            return lb_fail(err, LB_E_CANCELLED, "the connection was aborted");
        if (b->refused)
            return lb_fail(err, LB_E_NET, "the connection to the peer broke");
        size_t n = LB_MIN(len, make_room(b, len));
        if (n == 0) {
            uint64_t start_ns = lb_now_ns();
            int rc = wait_changed(p, b, deadline_ns, err);
            atomic_fetch_add_explicit(&m->base.blocked_ns, lb_now_ns() - start_ns,
                                      memory_order_relaxed);
            if (rc < 0)
                return -1;
            continue;
        }
        memcpy(b->data + b->end, src, n);
        b->end += n;
        src += n;
        len -= n;
        signal_readable(b);
        pthread_cond_broadcast(&b->changed);
    }
    return 0;
}

static int mem_writev(struct lb_transport *t, const struct iovec *iov, unsigned n,
                      uint64_t deadline_ns, struct lb_error *err)
{
    struct mem *m = mem_of(t);
    int rc = 0;

    pthread_mutex_lock(&m->pair->lock);
    for (unsigned i = 0; i < n && rc == 0; i++)
        rc = put_bytes(m, iov[i].iov_base, iov[i].iov_len, deadline_ns, err);
    pthread_mutex_unlock(&m->pair->lock);
    return rc;
}

static ssize_t get_bytes(struct mem *m, void *buf, size_t len, uint64_t deadline_ns,
                         struct lb_error *err)
{
    struct pair *p = m->pair;
    struct pipe_buf *b = &p->pipe[!m->side];

    for (;;) {
        if (m->aborted)
            return lb_fail(err, LB_E_CANCELLED, "the connection was aborted");
        if (b->end > b->start)
            break;
        if (b->ended)
            return 0;
        if (wait_changed(p, b, deadline_ns, err) < 0)
            return -1;
    }
    size_t n = LB_MIN(len, b->end - b->start);
    memcpy(buf, b->data + b->start, n);
    b->start += n;
    if (b->start == b->end) {
        uint64_t count;
        b->start = b->end = 0;
        if (!b->ended && read(b->event_fd, &count, sizeof(count)) < 0)
            count = 0; /* was not readable */
    }
    pthread_cond_broadcast(&b->changed);
    return (ssize_t)n;
}

static ssize_t mem_read_some(struct lb_transport *t, void *buf, size_t len, uint64_t deadline_ns,
                             struct lb_error *err)
{
    struct mem *m = mem_of(t);
    pthread_mutex_lock(&m->pair->lock);
    ssize_t n = get_bytes(m, buf, len, deadline_ns, err);
    pthread_mutex_unlock(&m->pair->lock);
    return n;
}

static void end_both(struct mem *m)
{
    struct pair *p = m->pair;
    p->pipe[m->side].ended = true;
    p->pipe[!m->side].refused = true;
    for (int i = 0; i < 2; i++) {
        signal_readable(&p->pipe[i]);
        pthread_cond_broadcast(&p->pipe[i].changed);
    }
}

static void mem_abort(struct lb_transport *t)
{
    struct mem *m = mem_of(t);
    pthread_mutex_lock(&m->pair->lock);
    m->aborted = true;
    end_both(m);
    pthread_mutex_unlock(&m->pair->lock);
}

static int mem_fd(struct lb_transport *t)
{
    struct mem *m = mem_of(t);
    return m->pair->pipe[!m->side].event_fd;
}

static void free_pair(struct pair *p)
{
    for (int i = 0; i < 2; i++) {
        free(p->pipe[i].data);
        if (p->pipe[i].event_fd >= 0)
            close(p->pipe[i].event_fd);
        pthread_cond_destroy(&p->pipe[i].changed);
    }
    pthread_mutex_destroy(&p->lock);
    free(p);
}

static void mem_close(struct lb_transport *t)
{
    struct mem *m = mem_of(t);
    struct pair *p = m->pair;

    pthread_mutex_lock(&p->lock);
    m->closed = true;
    end_both(m);
    bool last = p->ends[0].closed && p->ends[1].closed;
    pthread_mutex_unlock(&p->lock);
    if (last)
        free_pair(p);
}

static const struct lb_transport_ops MEM_OPS = {
    .name = "memory",
    .writev = mem_writev,
    .read_some = mem_read_some,
    .abort = mem_abort,
    .fd = mem_fd,
    .close = mem_close,
};

int lb_memory_pair(struct lb_transport **a, struct lb_transport **b, struct lb_error *err)
{
    struct pair *p = lb_alloc(sizeof(*p));
    pthread_condattr_t attr;
    bool ok = true;

    pthread_mutex_init(&p->lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    for (unsigned i = 0; i < 2; i++) {
        pthread_cond_init(&p->pipe[i].changed, &attr);
        p->pipe[i].event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        ok = ok && p->pipe[i].event_fd >= 0;
        p->ends[i].base.ops = &MEM_OPS;
        p->ends[i].pair = p;
        p->ends[i].side = i;
    }
    pthread_condattr_destroy(&attr);
    if (!ok) {
        lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot make an eventfd");
        free_pair(p);
        return -1;
    }
    *a = &p->ends[0].base;
    *b = &p->ends[1].base;
    return 0;
}
