/* netproto/transport.c - what is the same for every transport. */
#include "netproto/netproto_internal.h"

#include <errno.h>

int lb_fail_timeout(struct lb_error *err)
{
    lb_fail(err, LB_E_NET, "timed out waiting for the peer");
    if (err)
        err->sys_errno = ETIMEDOUT;
    return lb_remedy(err, "check that the peer runs and that the network reaches it");
}

bool lb_is_timeout(const struct lb_error *err)
{
    return err->code == LB_E_NET && err->sys_errno == ETIMEDOUT;
}

int lb_transport_read(struct lb_transport *t, void *buf, size_t len, uint64_t deadline_ns,
                      struct lb_error *err)
{
    size_t have = 0;

    while (have < len) {
        ssize_t n = t->ops->read_some(t, (char *)buf + have, len - have, deadline_ns, err);
        if (n < 0)
            return -1;
        if (n == 0)
            return lb_fail(err, LB_E_NET, "the peer closed the connection");
        have += (size_t)n;
    }
    return 0;
}
