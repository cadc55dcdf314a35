/* netproto/transport_rdma.c - the byte stream over a connected queue pair.
 *
 *      writev --copy--> ring of 16 buffers --SEND, credit--> peer's ring --copy--> read_some
 *
 * Every message carries in its immediate value how many buffers its sender has free again (rdma_flow.h).
 * Completions of both directions come to one queue, and whoever has to wait polls it for all: one thread
 * sleeps (completion channel, connection events, abort), the others wait for it to say that
 * something happened.
 *
 * Failure modes: a request that fails (peer or link gone: the device gives up after some seconds), removal of
 * the device, a peer that breaks the rules: the connection is broken, every call fails from then on - but
 * what had arrived before is still read. A peer that disconnects is the end of the stream. Closing waits for
 * what is on its way, a few seconds at most, unless aborted. */
#include "netproto/rdma_internal.h"

#include <arpa/inet.h>
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>

#define CLOSE_WAIT_NS UINT64_C(3000000000)
#define RECEIVE_BIT (UINT64_C(1) << 63) /* in the number of a request */
#define RING_BYTES ((size_t)(LB_RDMA_BUFS + LB_RDMA_RX) * LB_RDMA_BUF_BYTES)

static uint8_t *tx_buf(struct lb_rdma_conn *c, unsigned index)
{
    return c->ring + (size_t)index * LB_RDMA_BUF_BYTES;
}

static uint8_t *rx_buf(struct lb_rdma_conn *c, unsigned index)
{
    return tx_buf(c, LB_RDMA_BUFS + index);
}

/* --------------------------------------------------------- what has happened */

static void lose(struct lb_rdma_conn *c, const struct lb_error *why)
{
    if (!c->broken) {
        c->why = *why;
        /* The peer has to learn it: of a device that is being removed the queue pair would still take
         * what it sends, and it would wait for buffers that nobody reads. */
        if (c->connected)
            rdma_disconnect(c->id);
    }
    c->broken = true;
    pthread_cond_broadcast(&c->cond);
}

static void lose_text(struct lb_rdma_conn *c, const char *what, const char *why)
{
    struct lb_error e = LB_ERROR_INIT;

    lb_fail(&e, LB_E_NET, "the RDMA connection to the peer broke: %s%s%s", what, why ? ": " : "",
            why ? why : "");
    lb_remedy(&e, "check the link and the devices (`rdma link`), or use --transport tcp");
    lose(c, &e);
}

static int post_receive(struct lb_rdma_conn *c, unsigned index)
{
    struct ibv_sge sge = {(uintptr_t)rx_buf(c, index), LB_RDMA_BUF_BYTES, c->ring_mr->lkey};
    struct ibv_recv_wr wr = {.wr_id = RECEIVE_BIT | index, .sg_list = &sge, .num_sge = 1}, *bad;

    return ibv_post_recv(c->id->qp, &wr, &bad);
}

int lb_rdma_post(struct lb_rdma_conn *c, struct ibv_send_wr *wr, enum lb_rdma_kind kind, bool signal,
                 struct lb_error *err)
{
    struct ibv_qp_attr dead = {.qp_state = IBV_QPS_ERR};
    struct ibv_send_wr *bad;

    if (c->break_at && c->posted >= c->break_at)
        ibv_modify_qp(c->id->qp, &dead, IBV_QP_STATE);
    wr->wr_id = ++c->posted << 2 | kind;
    if (signal)
        wr->send_flags |= IBV_SEND_SIGNALED;
    int rc = ibv_post_send(c->id->qp, wr, &bad);
    if (rc == 0)
        return 0;
    c->posted--;
    lose_text(c, "cannot send", strerror(rc));
    if (err)
        *err = c->why;
    return -1;
}

/* Say what is free again when nothing else carries it. */
static void tell(struct lb_rdma_conn *c)
{
    struct ibv_send_wr wr = {.opcode = IBV_WR_SEND_WITH_IMM};

    if (c->broken || c->peer_closed || !lb_rdma_flow_due(&c->flow) ||
        c->posted - c->done >= c->sq_depth)
        return;
    wr.imm_data = htonl(lb_rdma_flow_tell(&c->flow));
    lb_rdma_post(c, &wr, LB_RDMA_TOLD, true, NULL);
}

static void received(struct lb_rdma_conn *c, const struct ibv_wc *wc)
{
    struct lb_error e = LB_ERROR_INIT;
    unsigned index = (unsigned)(wc->wr_id & ~RECEIVE_BIT);

    if (wc->opcode != IBV_WC_RECV || !(wc->wc_flags & IBV_WC_WITH_IMM)) {
        lose_text(c, "the peer sends what is no message", NULL);
        return;
    }
    if (lb_rdma_flow_got(&c->flow, ntohl(wc->imm_data), &e) < 0) {
        lose(c, &e);
        return;
    }
    if (wc->byte_len > 0)
        c->in[c->n_in++] = (struct lb_rdma_in){index, wc->byte_len};
    else if (post_receive(c, index) != 0)
        lose_text(c, "cannot receive", NULL);
}

static void completed(struct lb_rdma_conn *c, const struct ibv_wc *wc)
{
    if (wc->status != IBV_WC_SUCCESS) {
        if (wc->status != IBV_WC_WR_FLUSH_ERR || !c->peer_closed)
            lose_text(c, ibv_wc_status_str(wc->status), NULL);
        return;
    }
    if (wc->wr_id & RECEIVE_BIT) {
        received(c, wc);
        return;
    }
    c->done = wc->wr_id >> 2; /* and all before it */
    if ((wc->wr_id & 3) == LB_RDMA_DATA)
        c->tx_busy--;
}

static void take_events(struct lb_rdma_conn *c)
{
    struct rdma_cm_event *ev;

    while (rdma_get_cm_event(c->events, &ev) == 0) {
        enum rdma_cm_event_type type = ev->event;
        rdma_ack_cm_event(ev);
        if (type == RDMA_CM_EVENT_DISCONNECTED) {
            c->peer_closed = true;
            rdma_disconnect(c->id); /* and what we have posted comes back */
        } else if (type == RDMA_CM_EVENT_DEVICE_REMOVAL) {
            lose_text(c, "the device was removed", NULL);
        }
    }
}

/* mu held. What is there, without waiting. */
static void take(struct lb_rdma_conn *c)
{
    struct ibv_wc wc[16];
    int n;

    take_events(c);
    while ((n = ibv_poll_cq(c->cq, LB_ARRAY_LEN(wc), wc)) > 0)
        for (int i = 0; i < n; i++)
            completed(c, &wc[i]);
    if (n < 0)
        lose_text(c, "the completion queue failed", NULL);
    tell(c);
}

static void sleep_for_all(struct lb_rdma_conn *c, const struct timespec *left)
{
    struct pollfd p[3] = {{.fd = c->comp->fd, .events = POLLIN},
                          {.fd = c->events->fd, .events = POLLIN},
                          {.fd = c->wake_fd, .events = POLLIN}};
    struct ibv_cq *cq;
    void *context;

    ppoll(p, LB_ARRAY_LEN(p), left, NULL);
    while (p[0].revents && ibv_get_cq_event(c->comp, &cq, &context) == 0)
        ibv_ack_cq_events(cq, 1);
}

/* mu held. Returns when something may have happened; -1 when the deadline (0: none) has passed. */
static int wait_some(struct lb_rdma_conn *c, uint64_t deadline_ns, struct lb_error *err)
{
    struct timespec at = {(time_t)(deadline_ns / 1000000000), (long)(deadline_ns % 1000000000)}, left;
    uint64_t now_ns = lb_now_ns();

    if (deadline_ns && now_ns >= deadline_ns)
        return lb_fail_timeout(err);
    if (c->polling) {
        if (deadline_ns)
            pthread_cond_timedwait(&c->cond, &c->mu, &at);
        else
            pthread_cond_wait(&c->cond, &c->mu);
        return 0;
    }
    if (ibv_req_notify_cq(c->cq, 0) != 0)
        lose_text(c, "the completion queue failed", NULL);
    uint64_t posted = c->posted, done = c->done;
    unsigned n_in = c->n_in, credits = c->flow.credits;
    take(c); /* what came before the notification was asked for */
    if (c->broken || c->aborted || c->peer_closed || posted != c->posted || done != c->done ||
        n_in != c->n_in || credits != c->flow.credits)
        return 0;
    uint64_t left_ns = deadline_ns ? deadline_ns - now_ns : 0;
    left = (struct timespec){(time_t)(left_ns / 1000000000), (long)(left_ns % 1000000000)};
    c->polling = true;
    pthread_mutex_unlock(&c->mu);
    sleep_for_all(c, deadline_ns ? &left : NULL);
    pthread_mutex_lock(&c->mu);
    c->polling = false;
    take(c);
    pthread_cond_broadcast(&c->cond);
    return 0;
}

/* mu held. */
static int check(const struct lb_rdma_conn *c, struct lb_error *err)
{
    if (c->aborted)
        return lb_fail(err, LB_E_CANCELLED, "the connection was aborted");
    if (!c->broken && !c->peer_closed)
        return 0;
    if (c->broken && err)
        *err = c->why;
    return c->broken ? -1 : lb_fail(err, LB_E_NET, "the peer closed the connection");
}

/* ------------------------------------------------------------------ sending */

int lb_rdma_wait_room(struct lb_rdma_conn *c, bool (*ready)(const struct lb_rdma_conn *c),
                      uint64_t deadline_ns, struct lb_error *err)
{
    uint64_t start_ns = 0;
    int rc = 0;

    take(c);
    while ((rc = check(c, err)) == 0 &&
           (c->posted - c->done >= c->sq_depth - LB_RDMA_SQ_KEPT || (ready && !ready(c)))) {
        start_ns = start_ns ? start_ns : lb_now_ns();
        if ((rc = wait_some(c, deadline_ns, err)) < 0)
            break;
    }
    if (start_ns)
        atomic_fetch_add_explicit(&c->base.blocked_ns, lb_now_ns() - start_ns,
                                  memory_order_relaxed);
    return rc;
}

static bool may_send(const struct lb_rdma_conn *c)
{
    return c->flow.credits > 0 && c->tx_busy < LB_RDMA_BUFS;
}

static int post_data(struct lb_rdma_conn *c, struct lb_error *err)
{
    struct ibv_sge sge = {(uintptr_t)tx_buf(c, c->tx_next), c->tx_fill, c->ring_mr->lkey};
    struct ibv_send_wr wr = {.opcode = IBV_WR_SEND_WITH_IMM, .sg_list = &sge, .num_sge = 1};

    wr.imm_data = htonl(lb_rdma_flow_send(&c->flow));
    c->tx_next = (c->tx_next + 1) % LB_RDMA_BUFS;
    c->tx_fill = 0;
    c->tx_busy++;
    c->unsignalled = 0;
    return lb_rdma_post(c, &wr, LB_RDMA_DATA, true, err);
}

/* mu held; released while copying: the buffer is the sender's until it is posted. */
static int put_bytes(struct lb_rdma_conn *c, const uint8_t *p, size_t len, uint64_t deadline_ns,
                     struct lb_error *err)
{
    while (len > 0) {
        if (c->tx_fill == 0 && lb_rdma_wait_room(c, may_send, deadline_ns, err) < 0)
            return -1;
        uint32_t n = (uint32_t)LB_MIN(len, (size_t)(c->tx_bytes - c->tx_fill));
        pthread_mutex_unlock(&c->mu);
        memcpy(tx_buf(c, c->tx_next) + c->tx_fill, p, n);
        pthread_mutex_lock(&c->mu);
        c->tx_fill += n;
        p += n;
        len -= n;
        if (c->tx_fill == c->tx_bytes && post_data(c, err) < 0)
            return -1;
    }
    return 0;
}

static int rdma_writev(struct lb_transport *t, const struct iovec *iov, unsigned n,
                       uint64_t deadline_ns, struct lb_error *err)
{
    struct lb_rdma_conn *c = lb_rdma_conn_of(t);
    size_t bytes = 0;
    int rc = 0;

    pthread_mutex_lock(&c->mu);
    for (unsigned i = 0; i < n && rc == 0; i++) {
        rc = put_bytes(c, iov[i].iov_base, iov[i].iov_len, deadline_ns, err);
        bytes += iov[i].iov_len;
    }
    if (rc == 0)
        rc = check(c, err);
    if (rc == 0 && c->tx_fill > 0)
        rc = post_data(c, err);
    pthread_mutex_unlock(&c->mu);
    atomic_fetch_add_explicit(&c->base.copied_bytes, bytes, memory_order_relaxed);
    return rc;
}

int lb_rdma_drain(struct lb_transport *t, uint64_t deadline_ns, struct lb_error *err)
{
    struct lb_rdma_conn *c = lb_rdma_conn_of(t);
    int rc = 0;

    if (!lb_rdma_is(t))
        return 0;
    pthread_mutex_lock(&c->mu);
    take(c);
    while (c->done < c->posted && (rc = check(c, err)) == 0 &&
           (rc = wait_some(c, deadline_ns, err)) == 0)
        ;
    pthread_mutex_unlock(&c->mu);
    return rc;
}

/* ------------------------------------------------------------------ reading */

/* mu held. */
static void give_back(struct lb_rdma_conn *c)
{
    unsigned index = c->in[0].index;

    memmove(c->in, c->in + 1, --c->n_in * sizeof(c->in[0]));
    c->in_pos = 0;
    if (c->broken || c->peer_closed)
        return;
    if (post_receive(c, index) != 0) {
        lose_text(c, "cannot receive", NULL);
        return;
    }
    lb_rdma_flow_freed(&c->flow);
    tell(c);
}

/* mu held. 1: in[0] is there, 0: the stream has ended. */
static int wait_in(struct lb_rdma_conn *c, uint64_t deadline_ns, struct lb_error *err)
{
    for (;;) {
        if (c->aborted)
            return check(c, err);
        if (c->n_in > 0)
            return 1;
        take(c);
        if (c->n_in > 0)
            return 1;
        if (c->peer_closed && !c->broken)
            return 0;
        if (check(c, err) < 0 || wait_some(c, deadline_ns, err) < 0)
            return -1;
    }
}

static ssize_t rdma_read_some(struct lb_transport *t, void *buf, size_t len, uint64_t deadline_ns,
                              struct lb_error *err)
{
    struct lb_rdma_conn *c = lb_rdma_conn_of(t);

    pthread_mutex_lock(&c->mu);
    int rc = wait_in(c, deadline_ns, err);
    if (rc <= 0) {
        pthread_mutex_unlock(&c->mu);
        return rc;
    }
    struct lb_rdma_in in = c->in[0]; /* stays the reader's until it is given back */
    pthread_mutex_unlock(&c->mu);
    uint32_t n = (uint32_t)LB_MIN(len, (size_t)(in.bytes - c->in_pos));
    memcpy(buf, rx_buf(c, in.index) + c->in_pos, n);
    c->in_pos += n;
    atomic_fetch_add_explicit(&c->base.copied_bytes, n, memory_order_relaxed);
    if (c->in_pos == in.bytes) {
        pthread_mutex_lock(&c->mu);
        give_back(c);
        pthread_mutex_unlock(&c->mu);
    }
    return (ssize_t)n;
}

/* ------------------------------------------------------------- life and death */

static void rdma_abort(struct lb_transport *t)
{
    struct lb_rdma_conn *c = lb_rdma_conn_of(t);
    uint64_t one = 1;

    pthread_mutex_lock(&c->mu);
    bool first = !c->aborted;
    c->aborted = true;
    if (first && write(c->wake_fd, &one, sizeof(one)) != sizeof(one))
        lb_log(LB_LOG_WARN, "rdma: cannot wake a waiting thread: %s", strerror(errno));
    if (first && c->connected)
        rdma_disconnect(c->id); /* so that the peer need not wait to find out */
    pthread_cond_broadcast(&c->cond);
    pthread_mutex_unlock(&c->mu);
}

static int rdma_fd(struct lb_transport *t)
{
    return lb_rdma_conn_of(t)->comp->fd;
}

static void rdma_close(struct lb_transport *t)
{
    struct lb_rdma_conn *c = lb_rdma_conn_of(t);

    if (c->connected && !c->aborted && c->tx_busy > 0)
        lb_rdma_drain(t, lb_now_ns() + CLOSE_WAIT_NS, NULL);
    if (c->connected)
        rdma_disconnect(c->id);
    if (c->id->qp)
        rdma_destroy_qp(c->id);
    lb_rdma_dereg(c->ring_mr);
    if (c->ring)
        munmap(c->ring, RING_BYTES); /* what is in it is sealed */
    if (c->cq)
        ibv_destroy_cq(c->cq);
    if (c->comp)
        ibv_destroy_comp_channel(c->comp);
    if (c->pd)
        ibv_dealloc_pd(c->pd);
    rdma_destroy_id(c->id);
    rdma_destroy_event_channel(c->events);
    if (c->wake_fd >= 0)
        close(c->wake_fd);
    pthread_cond_destroy(&c->cond);
    pthread_mutex_destroy(&c->mu);
    free(c);
}

const struct lb_transport_ops lb_rdma_ops = {
    .name = "rdma",
    .writev = rdma_writev,
    .read_some = rdma_read_some,
    .abort = rdma_abort,
    .fd = rdma_fd,
    .close = rdma_close,
};

bool lb_rdma_is(const struct lb_transport *t)
{
    return t->ops == &lb_rdma_ops;
}

struct lb_rdma_conn *lb_rdma_conn_new(struct rdma_event_channel *events, struct rdma_cm_id *id)
{
    struct lb_rdma_conn *c = lb_alloc(sizeof(*c));
    const char *fault = getenv("LIFEBOAT_RDMA_BREAK");
    pthread_condattr_t attr;

    c->break_at = fault ? strtoull(fault, NULL, 10) : 0;
    c->base.ops = &lb_rdma_ops;
    c->events = events;
    c->id = id;
    c->wake_fd = -1;
    pthread_mutex_init(&c->mu, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&c->cond, &attr);
    pthread_condattr_destroy(&attr);
    return c;
}

static int make_queues(struct lb_rdma_conn *c, struct lb_error *err)
{
    struct ibv_context *v = c->id->verbs;
    struct ibv_device_attr dev;

    if (ibv_query_device(v, &dev) != 0)
        return lb_fail_errno(err, LB_E_NET, errno, "cannot ask the RDMA device what it can do");
    c->sq_depth = LB_MIN(LB_RDMA_SQ_DEPTH, (unsigned)dev.max_qp_wr);
    c->pd = ibv_alloc_pd(v);
    c->comp = ibv_create_comp_channel(v);
    if (!c->pd || !c->comp || fcntl(c->comp->fd, F_SETFL, O_NONBLOCK) < 0)
        return lb_fail_errno(err, LB_E_NET, errno, "cannot prepare the RDMA device");
    c->cq = ibv_create_cq(v, (int)(c->sq_depth + LB_RDMA_RX), NULL, c->comp, 0);
    if (!c->cq)
        return lb_fail_errno(err, LB_E_NET, errno, "cannot make an RDMA completion queue");
    struct ibv_qp_init_attr qp = {
        .send_cq = c->cq,
        .recv_cq = c->cq,
        .qp_type = IBV_QPT_RC,
        .cap = {.max_send_wr = c->sq_depth, .max_recv_wr = LB_RDMA_RX, .max_send_sge = 1,
                .max_recv_sge = 1},
    };
    if (rdma_create_qp(c->id, c->pd, &qp) != 0)
        return lb_fail_errno(err, LB_E_NET, errno, "cannot make an RDMA queue pair");
    return 0;
}

int lb_rdma_conn_prepare(struct lb_rdma_conn *c, struct lb_error *err)
{
    c->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (c->wake_fd < 0)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot make an eventfd");
    if (make_queues(c, err) < 0)
        return -1;
    /* shared: a fork must not move the pages that the device knows */
    void *ring = mmap(NULL, RING_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (ring == MAP_FAILED)
        return lb_fail_errno(err, LB_E_NO_SPACE, errno, "no memory for RDMA buffers");
    c->ring = ring;
    c->ring_mr = lb_rdma_reg(c->pd, ring, RING_BYTES, IBV_ACCESS_LOCAL_WRITE);
    if (!c->ring_mr) {
        lb_fail_errno(err, LB_E_NET, errno, "cannot register RDMA buffers");
        return lb_remedy(err, "see whether the limit of locked memory (ulimit -l) allows it");
    }
    for (unsigned i = 0; i < LB_RDMA_RX; i++)
        if (post_receive(c, i) != 0)
            return lb_fail(err, LB_E_NET, "cannot post RDMA receives");
    return 0;
}

void lb_rdma_conn_start(struct lb_rdma_conn *c, const struct lb_rdma_hello *peers)
{
    lb_rdma_flow_init(&c->flow, LB_RDMA_BUFS, peers->buffers);
    c->tx_bytes = LB_MIN(LB_RDMA_BUF_BYTES, peers->buffer_bytes);
    c->connected = true;
}
