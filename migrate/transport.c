/* migrate/transport.c - see transport.h. */
#include "migrate/transport.h"

#include <string.h>

/* ------------------------------------------------------------ as they travel */

Lb__RdmaAddress **lb_rdma_addrs_pack(const struct lb_rdma_addr *v, unsigned n)
{
    Lb__RdmaAddress **out = lb_alloc(sizeof(*out) * (n + 1));

    for (unsigned i = 0; i < n; i++) {
        out[i] = lb_alloc(sizeof(*out[i]));
        lb__rdma_address__init(out[i]);
        out[i]->ip = lb_strdup(v[i].ip);
        out[i]->prefix = v[i].prefix;
        out[i]->port = v[i].port;
    }
    return out;
}

void lb_rdma_addrs_free(Lb__RdmaAddress **v, unsigned n)
{
    for (unsigned i = 0; v && i < n; i++) {
        free(v[i]->ip);
        free(v[i]);
    }
    free(v);
}

unsigned lb_rdma_addrs_parse(Lb__RdmaAddress *const *v, size_t n, struct lb_rdma_addr *out)
{
    unsigned have = 0;

    for (size_t i = 0; i < n && have < LB_RDMA_MAX_ADDRS; i++) {
        struct lb_rdma_addr a = {.prefix = v[i]->prefix, .port = (uint16_t)v[i]->port};

        if (!v[i]->ip || strlen(v[i]->ip) >= sizeof(a.ip) || v[i]->port > UINT16_MAX)
            continue;
        snprintf(a.ip, sizeof(a.ip), "%s", v[i]->ip);
        if (lb_rdma_addr_valid(&a))
            out[have++] = a;
    }
    return have;
}

/* -------------------------------------------------------------------- source */

Lb__TransportWish *lb_transport_wish(const struct lb_migrate_opts *o, struct lb_report *mine)
{
    struct lb_rdma_addr v[LB_RDMA_MAX_ADDRS];
    Lb__TransportWish *w = lb_alloc(sizeof(*w));

    lb__transport_wish__init(w);
    w->wish = o->transport;
    w->trusted_fabric = o->trusted_fabric;
    if (o->transport != LB_TRANSPORT_TCP)
        w->n_addresses = lb_rdma_addresses(v, LB_ARRAY_LEN(v));
    w->addresses = lb_rdma_addrs_pack(v, (unsigned)w->n_addresses);
    if (o->transport == LB_TRANSPORT_RDMA && !w->n_addresses)
        lb_report_add(mine, "transport", LB_CHECK_FAIL,
                      lb_rdma_built() ? "give an address to the RDMA device and see that its link is up "
                                        "(`rdma link`), or use --transport auto"
                                      : "install a build with RDMA, or use --transport auto",
                      lb_rdma_built() ? "the source has no RDMA device with an address and a link"
                                      : "the source's Lifeboat was built without RDMA");
    return w;
}

void lb_transport_wish_free(Lb__TransportWish *w)
{
    if (!w)
        return;
    lb_rdma_addrs_free(w->addresses, (unsigned)w->n_addresses);
    free(w);
}

/* --------------------------------------------------------------- destination */

static bool shares_network(const struct lb_rdma_addr *mine, const struct lb_rdma_addr *theirs,
                           unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        if (lb_rdma_same_network(mine, &theirs[i]))
            return true;
    return false;
}

/* On a common network; when RDMA is demanded, else any: there may be a route. */
static void find_common(const struct lb_rdma_addr *mine, unsigned n, const struct lb_rdma_addr *theirs,
                        unsigned n_theirs, bool any, struct lb_transport_choice *out)
{
    for (unsigned i = 0; i < n && out->n < LB_RDMA_MAX_ADDRS; i++)
        if (shares_network(&mine[i], theirs, n_theirs))
            out->at[out->n++] = mine[i];
    for (unsigned i = 0; any && !out->n && i < n && i < LB_RDMA_MAX_ADDRS; i++)
        out->at[i] = mine[i];
    if (any && !out->n && n_theirs)
        out->n = LB_MIN(n, LB_RDMA_MAX_ADDRS);
    out->rdma = out->n > 0;
}

static const char *why_not(unsigned n_theirs, unsigned n)
{
    if (!n_theirs)
        return "the source has no RDMA device with an address";
    if (!n)
        return lb_rdma_built() ? "the destination has no RDMA device with an address"
                               : "the destination's Lifeboat was built without RDMA";
    return "source and destination have RDMA devices, but on no common network";
}

void lb_transport_choose(const Lb__TransportWish *wish, const struct lb_rdma_addr *mine, unsigned n,
                         struct lb_transport_choice *out, struct lb_report *rep)
{
    struct lb_rdma_addr theirs[LB_RDMA_MAX_ADDRS];
    bool demanded = wish && wish->wish == LB_TRANSPORT_RDMA;
    unsigned n_theirs;

    memset(out, 0, sizeof(*out));
    if (!wish || wish->wish == LB_TRANSPORT_TCP) {
        lb_report_add(rep, "transport", LB_CHECK_OK, NULL, "TCP, %s",
                      wish ? "as asked" : "the source knows nothing else");
        return;
    }
    n_theirs = lb_rdma_addrs_parse(wish->addresses, wish->n_addresses, theirs);
    find_common(mine, n, theirs, n_theirs, demanded, out);
    out->zero_copy = out->rdma && wish->trusted_fabric;
    if (out->rdma)
        lb_report_add(rep, "transport", LB_CHECK_OK, NULL, "RDMA at %s (%s)%s", out->at[0].ip,
                      out->at[0].device,
                      out->zero_copy ? ", pages in clear straight into memory: the fabric is trusted"
                                     : ", encrypted");
    else if (demanded)
        lb_report_add(rep, "transport", LB_CHECK_FAIL,
                      "connect both hosts by RDMA devices on one network (`rdma link`, `ip addr`), or "
                      "use --transport auto",
                      "no RDMA: %s", why_not(n_theirs, n));
    else
        lb_report_add(rep, "transport", wish->trusted_fabric ? LB_CHECK_WARN : LB_CHECK_OK, NULL,
                      "TCP%s: %s", wish->trusted_fabric ? ", where --trusted-fabric changes nothing" : "",
                      why_not(n_theirs, n));
}
