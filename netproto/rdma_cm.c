/* netproto/rdma_cm.c - RDMA addresses of this host, listening and connecting (librdmacm).
 *
 * A connection request carries the preamble of a bulk connection and our buffers, the acceptance the
 * other side's buffers.  Every connected id has an event channel of its own, for its end. */
#include "netproto/rdma_internal.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <poll.h>
#include <string.h>
#include <time.h>

#define RESOLVE_MS 2000
#define BACKLOG 64
#define MAX_ANSWERED 8u /* and not yet connected; the next one is turned away, and comes again */
/* The device waits 4.096 us * 2^17 = 0.54 s for an answer and tries 7 times: 4 s until it gives up. Not 8
 * times: 7 retries are endless ones to soft-RoCE, as by the specification they are only when the other
 * side has no buffer. */
#define ACK_TIMEOUT 17
#define RETRIES 6
#define REQUEST_BYTES (LB_PREAMBLE_BYTES + LB_RDMA_HELLO_BYTES) /* at most 56 */

static const struct lb_rdma_hello MY_HELLO = {LB_RDMA_BUFS, LB_RDMA_BUF_BYTES};

bool lb_rdma_built(void)
{
    return true;
}

/* ---------------------------------------------------------------- addresses */

/* Asking the libraries costs more, and they complain on stderr. */
static bool have_devices(void)
{
    DIR *d = opendir("/sys/class/infiniband");
    struct dirent *e;
    bool found = false;

    while (d && (e = readdir(d)))
        found |= e->d_name[0] != '.';
    if (d)
        closedir(d);
    return found;
}

static struct rdma_event_channel *event_channel(struct lb_error *err)
{
    struct rdma_event_channel *ch = rdma_create_event_channel();

    if (ch && fcntl(ch->fd, F_SETFL, O_NONBLOCK) == 0 && fcntl(ch->fd, F_SETFD, FD_CLOEXEC) == 0)
        return ch;
    lb_fail_errno(err, LB_E_NET, errno, "cannot use RDMA connections");
    lb_remedy(err, "load the modules rdma_cm and rdma_ucm");
    if (ch)
        rdma_destroy_event_channel(ch);
    return NULL;
}

static bool usable(const struct ifaddrs *a)
{
    const struct sockaddr_in6 *six = (const void *)a->ifa_addr;

    if (!a->ifa_addr || !a->ifa_netmask || !(a->ifa_flags & IFF_UP) || (a->ifa_flags & IFF_LOOPBACK))
        return false;
    if (a->ifa_addr->sa_family == AF_INET)
        return true;
    return a->ifa_addr->sa_family == AF_INET6 && !IN6_IS_ADDR_LINKLOCAL(&six->sin6_addr);
}

static unsigned mask_bits(const struct sockaddr *mask)
{
    bool four = mask->sa_family == AF_INET;
    const uint8_t *p = four ? (const uint8_t *)&((const struct sockaddr_in *)(const void *)mask)->sin_addr
                            : ((const struct sockaddr_in6 *)(const void *)mask)->sin6_addr.s6_addr;
    unsigned n = 0;

    for (unsigned i = 0; i < (four ? 4u : 16u); i++)
        n += (unsigned)__builtin_popcount(p[i]);
    return n;
}

/* Binding to an address says whether a device has it. */
static bool describe(struct rdma_event_channel *ch, const struct ifaddrs *a, struct lb_rdma_addr *out)
{
    bool four = a->ifa_addr->sa_family == AF_INET, ok = false;
    const void *octets = four ? (const void *)&((const struct sockaddr_in *)(const void *)a->ifa_addr)->sin_addr
                              : &((const struct sockaddr_in6 *)(const void *)a->ifa_addr)->sin6_addr;
    struct sockaddr_storage sa = {0};
    struct rdma_cm_id *id;
    struct ibv_port_attr port;

    memcpy(&sa, a->ifa_addr, four ? sizeof(struct sockaddr_in) : sizeof(struct sockaddr_in6));
    if (rdma_create_id(ch, &id, NULL, RDMA_PS_TCP) != 0)
        return false;
    if (rdma_bind_addr(id, (struct sockaddr *)&sa) == 0 && id->verbs &&
        ibv_query_port(id->verbs, id->port_num, &port) == 0 && port.state == IBV_PORT_ACTIVE) {
        *out = (struct lb_rdma_addr){.prefix = mask_bits(a->ifa_netmask)};
        inet_ntop(a->ifa_addr->sa_family, octets, out->ip, sizeof(out->ip));
        snprintf(out->device, sizeof(out->device), "%s", ibv_get_device_name(id->verbs->device));
        ok = true;
    }
    rdma_destroy_id(id);
    return ok;
}

unsigned lb_rdma_addresses(struct lb_rdma_addr *v, unsigned max)
{
    struct ifaddrs *list = NULL;
    struct rdma_event_channel *ch = have_devices() ? event_channel(NULL) : NULL;
    unsigned n = 0;

    if (!ch)
        return 0;
    if (getifaddrs(&list) == 0)
        for (const struct ifaddrs *a = list; a && n < max; a = a->ifa_next)
            n += usable(a) && describe(ch, a, &v[n]);
    if (list)
        freeifaddrs(list);
    rdma_destroy_event_channel(ch);
    return n;
}

static int to_sockaddr(const struct lb_rdma_addr *a, struct sockaddr_storage *out, struct lb_error *err)
{
    struct sockaddr_in *four = (void *)out;
    struct sockaddr_in6 *six = (void *)out;

    memset(out, 0, sizeof(*out));
    if (inet_pton(AF_INET, a->ip, &four->sin_addr) == 1) {
        four->sin_family = AF_INET;
        four->sin_port = htons(a->port);
    } else if (inet_pton(AF_INET6, a->ip, &six->sin6_addr) == 1) {
        six->sin6_family = AF_INET6;
        six->sin6_port = htons(a->port);
    } else {
        return lb_fail(err, LB_E_PROTO, "\"%s\" is no address", a->ip);
    }
    return 0;
}

/* ------------------------------------------------------------------- events */

/* The next event of a channel, to be acknowledged. */
static int next_event(struct rdma_event_channel *ch, int cancel_fd, uint64_t deadline_ns,
                      struct rdma_cm_event **ev, struct lb_error *err)
{
    for (;;) {
        struct pollfd p[2] = {{.fd = ch->fd, .events = POLLIN}, {.fd = cancel_fd, .events = POLLIN}};
        uint64_t now_ns = lb_now_ns();
        uint64_t left_ns = deadline_ns > now_ns ? deadline_ns - now_ns : 0;
        struct timespec left = {(time_t)(left_ns / 1000000000), (long)(left_ns % 1000000000)};

        if (rdma_get_cm_event(ch, ev) == 0)
            return 0;
        if (errno != EAGAIN && errno != EINTR)
            return lb_fail_errno(err, LB_E_NET, errno, "cannot wait for an RDMA connection");
        int n = ppoll(p, 2, &left, NULL);
        if (n > 0 && p[1].revents)
            return lb_fail(err, LB_E_CANCELLED, "cancelled");
        if (n == 0)
            return lb_fail_timeout(err);
    }
}

/* Wait for one step of setting up. *hello, when not NULL, from what the peer said with it. */
static int expect(struct rdma_event_channel *ch, enum rdma_cm_event_type want, int cancel_fd,
                  uint64_t deadline_ns, struct lb_rdma_hello *hello, struct lb_error *err)
{
    struct rdma_cm_event *ev;
    int rc = 0;

    if (next_event(ch, cancel_fd, deadline_ns, &ev, err) < 0)
        return -1;
    if (ev->event != want)
        rc = lb_fail(err, LB_E_NET, "no RDMA connection: %s (%d)", rdma_event_str(ev->event),
                     ev->status);
    else if (hello)
        rc = lb_rdma_hello_parse(ev->param.conn.private_data, ev->param.conn.private_data_len, hello,
                                 err);
    rdma_ack_cm_event(ev);
    return rc;
}

static void set_timeout(struct rdma_cm_id *id)
{
    uint8_t t = ACK_TIMEOUT;

    if (rdma_set_option(id, RDMA_OPTION_ID, RDMA_OPTION_ID_ACK_TIMEOUT, &t, sizeof(t)) != 0)
        lb_log(LB_LOG_DEBUG, "rdma: the time until a link counts as broken is the device's own");
}

/* --------------------------------------------------------------- connecting */

static int connect_id(struct lb_rdma_conn *c, const struct lb_rdma_addr *to,
                      const uint8_t session_id[LB_SESSION_ID_BYTES], uint64_t deadline_ns,
                      int cancel_fd, struct lb_error *err)
{
    struct lb_preamble p = {.kind = 'D'};
    uint8_t request[REQUEST_BYTES];
    struct rdma_conn_param param = {.private_data = request, .private_data_len = sizeof(request),
                                    .retry_count = RETRIES, .rnr_retry_count = RETRIES};
    struct sockaddr_storage sa;
    struct lb_rdma_hello theirs;

    memcpy(p.session_id, session_id, sizeof(p.session_id));
    lb_preamble_write(request, &p);
    lb_rdma_hello_write(request + LB_PREAMBLE_BYTES, &MY_HELLO);
    if (to_sockaddr(to, &sa, err) < 0)
        return -1;
    if (rdma_resolve_addr(c->id, NULL, (struct sockaddr *)&sa, RESOLVE_MS) != 0)
        return lb_fail_errno(err, LB_E_NET, errno, "no RDMA device reaches it");
    if (expect(c->events, RDMA_CM_EVENT_ADDR_RESOLVED, cancel_fd, deadline_ns, NULL, err) < 0)
        return -1;
    set_timeout(c->id);
    if (rdma_resolve_route(c->id, RESOLVE_MS) != 0)
        return lb_fail_errno(err, LB_E_NET, errno, "no RDMA route to it");
    if (expect(c->events, RDMA_CM_EVENT_ROUTE_RESOLVED, cancel_fd, deadline_ns, NULL, err) < 0 ||
        lb_rdma_conn_prepare(c, err) < 0)
        return -1;
    if (rdma_connect(c->id, &param) != 0)
        return lb_fail_errno(err, LB_E_NET, errno, "cannot connect");
    if (expect(c->events, RDMA_CM_EVENT_ESTABLISHED, cancel_fd, deadline_ns, &theirs, err) < 0)
        return -1;
    lb_rdma_conn_start(c, &theirs);
    return 0;
}

int lb_rdma_connect(const struct lb_rdma_addr *to, const uint8_t session_id[LB_SESSION_ID_BYTES],
                    unsigned timeout_ms, int cancel_fd, struct lb_transport **out,
                    struct lb_error *err)
{
    struct rdma_event_channel *ch = event_channel(err);
    struct rdma_cm_id *id;

    if (!ch)
        return -1;
    if (rdma_create_id(ch, &id, NULL, RDMA_PS_TCP) != 0) {
        rdma_destroy_event_channel(ch);
        return lb_fail_errno(err, LB_E_NET, errno, "cannot make an RDMA connection");
    }
    struct lb_rdma_conn *c = lb_rdma_conn_new(ch, id);
    if (connect_id(c, to, session_id, lb_now_ns() + (uint64_t)timeout_ms * 1000000, cancel_fd, err) < 0) {
        c->base.ops->close(&c->base);
        return lb_context(err, "RDMA to %s port %u", to->ip, to->port);
    }
    *out = &c->base;
    return 0;
}

/* ---------------------------------------------------------------- listening */

/* Whoever asks is answered at once, and then waited for together with all others: an answer that is lost must not keep
 * the next connection, of whatever kind, waiting. */
struct lb_rdma_listener {
    struct rdma_event_channel *events; /* of ids and of those in answered */
    struct rdma_cm_id *ids[LB_RDMA_MAX_ADDRS];
    unsigned n;
    uint8_t session_id[LB_SESSION_ID_BYTES];
    struct {
        struct lb_rdma_conn *conn;     /* NULL: free */
        struct lb_rdma_hello theirs;
    } answered[MAX_ANSWERED];
};

void lb_rdma_listener_close(struct lb_rdma_listener *l)
{
    if (!l)
        return;
    for (unsigned i = 0; i < MAX_ANSWERED; i++)
        if (l->answered[i].conn)
            l->answered[i].conn->base.ops->close(&l->answered[i].conn->base);
    for (unsigned i = 0; i < l->n; i++)
        rdma_destroy_id(l->ids[i]);
    rdma_destroy_event_channel(l->events);
    free(l);
}

static int listen_one(struct lb_rdma_listener *l, struct lb_rdma_addr *a, struct lb_error *err)
{
    struct sockaddr_storage sa;
    struct rdma_cm_id *id;

    a->port = 0;
    if (to_sockaddr(a, &sa, err) < 0)
        return -1;
    if (rdma_create_id(l->events, &id, NULL, RDMA_PS_TCP) != 0)
        return lb_fail_errno(err, LB_E_NET, errno, "cannot listen for RDMA connections");
    l->ids[l->n++] = id;
    if (rdma_bind_addr(id, (struct sockaddr *)&sa) != 0 || rdma_listen(id, BACKLOG) != 0)
        return lb_fail_errno(err, LB_E_NET, errno, "cannot listen for RDMA connections at %s", a->ip);
    a->port = ntohs(rdma_get_src_port(id));
    return 0;
}

int lb_rdma_listen(struct lb_rdma_addr *v, unsigned n, const uint8_t session_id[LB_SESSION_ID_BYTES],
                   struct lb_rdma_listener **out, struct lb_error *err)
{
    struct rdma_event_channel *ch = event_channel(err);

    if (!ch)
        return -1;
    struct lb_rdma_listener *l = lb_alloc(sizeof(*l));
    l->events = ch;
    memcpy(l->session_id, session_id, sizeof(l->session_id));
    for (unsigned i = 0; i < LB_MIN(n, LB_RDMA_MAX_ADDRS); i++)
        if (listen_one(l, &v[i], err) < 0) {
            lb_rdma_listener_close(l);
            return -1;
        }
    *out = l;
    return 0;
}

/* Is it a request for our session? */
static bool for_us(const struct lb_rdma_listener *l, const struct rdma_cm_event *ev,
                   struct lb_rdma_hello *theirs)
{
    const uint8_t *data = ev->param.conn.private_data;
    size_t len = ev->param.conn.private_data_len;
    struct lb_preamble p;

    return ev->event == RDMA_CM_EVENT_CONNECT_REQUEST && data && len >= REQUEST_BYTES &&
           lb_preamble_parse(data, &p, NULL) == 0 && p.kind == 'D' &&
           memcmp(p.session_id, l->session_id, sizeof(p.session_id)) == 0 &&
           lb_rdma_hello_parse(data + LB_PREAMBLE_BYTES, len - LB_PREAMBLE_BYTES, theirs, NULL) == 0;
}

static int answer(struct lb_rdma_conn *c, struct lb_error *err)
{
    uint8_t data[LB_RDMA_HELLO_BYTES];
    struct rdma_conn_param param = {.private_data = data, .private_data_len = sizeof(data),
                                    .retry_count = RETRIES, .rnr_retry_count = RETRIES};

    lb_rdma_hello_write(data, &MY_HELLO);
    set_timeout(c->id);
    if (lb_rdma_conn_prepare(c, err) < 0)
        return -1;
    if (rdma_accept(c->id, &param) != 0)
        return lb_fail_errno(err, LB_E_NET, errno, "cannot accept an RDMA connection");
    return 0;
}

static int place_for(const struct lb_rdma_listener *l, const struct rdma_cm_id *id)
{
    for (int i = 0; i < (int)MAX_ANSWERED; i++)
        if (id ? l->answered[i].conn && l->answered[i].conn->id == id : !l->answered[i].conn)
            return i;
    return -1;
}

/* A request: answered, or turned away. */
static int asked(struct lb_rdma_listener *l, struct rdma_cm_id *id, const struct lb_rdma_hello *theirs,
                 struct lb_error *err)
{
    int at = theirs ? place_for(l, NULL) : -1;
    struct rdma_event_channel *ch = at >= 0 ? event_channel(err) : NULL;

    if (!ch) {
        rdma_reject(id, NULL, 0);
        rdma_destroy_id(id);
        return at >= 0 ? -1 : 0;
    }
    struct lb_rdma_conn *c = lb_rdma_conn_new(ch, id);
    if (answer(c, err) < 0) {
        c->base.ops->close(&c->base);
        return -1;
    }
    l->answered[at].conn = c;
    l->answered[at].theirs = *theirs;
    return 0;
}

/* What became of an answer. 1: *out is connected. */
static int became(struct lb_rdma_listener *l, int at, enum rdma_cm_event_type event,
                  struct lb_transport **out, struct lb_error *err)
{
    struct lb_rdma_conn *c = LB_STEAL_PTR(l->answered[at].conn);

    if (event == RDMA_CM_EVENT_ESTABLISHED && rdma_migrate_id(c->id, c->events) == 0) {
        lb_rdma_conn_start(c, &l->answered[at].theirs);
        *out = &c->base;
        return 1;
    }
    c->base.ops->close(&c->base);
    return lb_fail(err, LB_E_NET, "an RDMA connection did not come about: %s", rdma_event_str(event));
}

int lb_rdma_accept(struct lb_rdma_listener *l, unsigned timeout_ms, struct lb_transport **out,
                   struct lb_error *err)
{
    uint64_t deadline_ns = lb_now_ns() + (uint64_t)timeout_ms * 1000000;
    int rc = 0;

    while (rc == 0) {
        struct rdma_cm_event *ev;
        struct lb_rdma_hello theirs;

        if (next_event(l->events, -1, deadline_ns, &ev, err) < 0)
            return -1;
        enum rdma_cm_event_type event = ev->event;
        struct rdma_cm_id *id = ev->id;
        bool ours = for_us(l, ev, &theirs);
        rdma_ack_cm_event(ev);
        int at = place_for(l, id);
        if (event == RDMA_CM_EVENT_CONNECT_REQUEST)
            rc = asked(l, id, ours ? &theirs : NULL, err);
        else if (at >= 0)
            rc = became(l, at, event, out, err);
    }
    return rc < 0 ? -1 : 0;
}
