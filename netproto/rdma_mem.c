/* netproto/rdma_mem.c - registered memory and one-sided writes. */
#include "netproto/rdma_internal.h"

#include <assert.h>
#include <errno.h>
#include <stdatomic.h>
#include <string.h>

static _Atomic uint64_t registered_now, registered_max;

struct ibv_mr *lb_rdma_reg(struct ibv_pd *pd, void *addr, size_t len, int access)
{
    struct ibv_mr *mr = ibv_reg_mr(pd, addr, len, access);

    if (!mr)
        return NULL;
    uint64_t now = atomic_fetch_add(&registered_now, mr->length) + mr->length;
    uint64_t max = atomic_load(&registered_max);
    while (max < now && !atomic_compare_exchange_weak(&registered_max, &max, now))
        ;
    return mr;
}

void lb_rdma_dereg(struct ibv_mr *mr)
{
    size_t len = mr ? mr->length : 0;

    if (!mr)
        return;
    int rc = ibv_dereg_mr(mr);
    if (rc != 0)
        lb_log(LB_LOG_ERROR, "rdma: cannot deregister %zu bytes: %s", len, strerror(rc));
    else
        atomic_fetch_sub(&registered_now, len);
}

void lb_rdma_registered(uint64_t *now_bytes, uint64_t *max_bytes)
{
    *now_bytes = atomic_load(&registered_now);
    *max_bytes = atomic_load(&registered_max);
}

int lb_rdma_register(struct lb_transport *t, void *addr, size_t len, bool for_peer,
                     struct lb_rdma_mr *out, struct lb_error *err)
{
    struct lb_rdma_conn *c = lb_rdma_conn_of(t);

    assert(lb_rdma_is(t));
    struct ibv_mr *mr = lb_rdma_reg(c->pd, addr, len,
                                    for_peer ? IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE : 0);
    if (!mr) {
        lb_fail_errno(err, LB_E_NO_SPACE, errno, "cannot register %zu bytes for RDMA", len);
        return lb_remedy(err, "see whether the limit of locked memory (ulimit -l) allows it");
    }
    *out = (struct lb_rdma_mr){mr, (uintptr_t)addr, len, mr->lkey, mr->rkey};
    return 0;
}

void lb_rdma_deregister(struct lb_rdma_mr *mr)
{
    lb_rdma_dereg(mr->handle);
    *mr = (struct lb_rdma_mr){0};
}

int lb_rdma_write(struct lb_transport *t, const struct lb_rdma_mr *local, const void *src, size_t len,
                  uint64_t remote_addr, uint32_t rkey, bool more, struct lb_error *err)
{
    struct lb_rdma_conn *c = lb_rdma_conn_of(t);
    struct ibv_sge sge = {(uintptr_t)src, (uint32_t)len, local->lkey};
    struct ibv_send_wr wr = {.opcode = IBV_WR_RDMA_WRITE, .sg_list = &sge, .num_sge = 1};
    int rc;

    assert(lb_rdma_is(t) && len <= LB_RDMA_CHUNK_BYTES);
    assert((uintptr_t)src >= local->addr && (uintptr_t)src + len <= local->addr + local->bytes);
    wr.wr.rdma.remote_addr = remote_addr;
    wr.wr.rdma.rkey = rkey;
    pthread_mutex_lock(&c->mu);
    rc = lb_rdma_wait_room(c, NULL, 0, err);
    if (rc == 0) {
        bool signal = !more || ++c->unsignalled >= LB_RDMA_SIGNAL_EVERY;
        if (signal)
            c->unsignalled = 0;
        rc = lb_rdma_post(c, &wr, LB_RDMA_WRITE, signal, err);
    }
    pthread_mutex_unlock(&c->mu);
    return rc;
}
