/* netproto/rdma_none.c - in place of RDMA in a build without its libraries. */
#include "netproto/rdma.h"

static int not_built(struct lb_error *err)
{
    lb_fail(err, LB_E_UNSUPPORTED, "this Lifeboat was built without RDMA");
    return lb_remedy(err, "build it where libibverbs-dev and librdmacm-dev are installed, or use "
                          "--transport tcp");
}

bool lb_rdma_built(void)
{
    return false;
}

unsigned lb_rdma_addresses(struct lb_rdma_addr *v, unsigned max)
{
    (void)v, (void)max;
    return 0;
}

int lb_rdma_listen(struct lb_rdma_addr *v, unsigned n, const uint8_t session_id[LB_SESSION_ID_BYTES],
                   struct lb_rdma_listener **out, struct lb_error *err)
{
    (void)v, (void)n, (void)session_id, (void)out;
    return not_built(err);
}

int lb_rdma_accept(struct lb_rdma_listener *l, unsigned timeout_ms, struct lb_transport **out,
                   struct lb_error *err)
{
    (void)l, (void)timeout_ms, (void)out;
    return not_built(err);
}

void lb_rdma_listener_close(struct lb_rdma_listener *l)
{
    (void)l;
}

int lb_rdma_connect(const struct lb_rdma_addr *to, const uint8_t session_id[LB_SESSION_ID_BYTES],
                    unsigned timeout_ms, int cancel_fd, struct lb_transport **out,
                    struct lb_error *err)
{
    (void)to, (void)session_id, (void)timeout_ms, (void)cancel_fd, (void)out;
    return not_built(err);
}

bool lb_rdma_is(const struct lb_transport *t)
{
    (void)t;
    return false;
}

int lb_rdma_drain(struct lb_transport *t, uint64_t deadline_ns, struct lb_error *err)
{
    (void)t, (void)deadline_ns, (void)err;
    return 0;
}

int lb_rdma_register(struct lb_transport *t, void *addr, size_t len, bool for_peer,
                     struct lb_rdma_mr *out, struct lb_error *err)
{
    (void)t, (void)addr, (void)len, (void)for_peer, (void)out;
    return not_built(err);
}

void lb_rdma_deregister(struct lb_rdma_mr *mr)
{
    (void)mr;
}

int lb_rdma_write(struct lb_transport *t, const struct lb_rdma_mr *local, const void *src, size_t len,
                  uint64_t remote_addr, uint32_t rkey, bool more, struct lb_error *err)
{
    (void)t, (void)local, (void)src, (void)len, (void)remote_addr, (void)rkey, (void)more;
    return not_built(err);
}

void lb_rdma_registered(uint64_t *now_bytes, uint64_t *max_bytes)
{
    *now_bytes = *max_bytes = 0;
}
