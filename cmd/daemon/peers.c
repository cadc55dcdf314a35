/*
 * cmd/daemon/peers.c - the port other hosts connect to.
 *
 * The supervisor reads exactly the 24 bytes of a preamble, never more and never
 * waiting, and passes the socket on: a control channel ('C') to a session process of
 * its own, a bulk connection ('D') to the session that registered its id. What
 * an unknown peer can occupy is bounded in number and time; when all places are
 * taken the longest silent one is closed, so that a peer that speaks gets through.
 *
 * A bulk connection may arrive before its session is known here (the session
 * reports it over another socket, or the supervisor was just restarted): it is
 * parked for a moment.
 */
#include "cmd/daemon/daemon.h"

#include <errno.h>
#include <event2/listener.h>
#include <string.h>
#include <sys/socket.h>

struct peer {
    LIST_ENTRY(peer) link;
    struct daemon *d;
    int fd;
    struct event *ev;     /* readable; parked: the timeout */
    struct event *deadline; /* of the preamble, from the accept on, however bytes trickle in */
    uint8_t buf[LB_PREAMBLE_BYTES];
    unsigned got;
    bool parked;
    struct lb_preamble pre;
};

static void peer_free(struct peer *p)
{
    LIST_REMOVE(p, link);
    if (p->parked)
        p->d->n_parked--;
    else
        p->d->n_unauthenticated--;
    event_free(p->ev);
    event_free(p->deadline);
    if (p->fd >= 0)
        close(p->fd);
    free(p);
}

static void pass_on(struct peer *p, struct session *s)
{
    struct lb_error err = LB_ERROR_INIT;

    if (lb_session_order_conn(s, LB_STEAL_FD(p->fd), &err))
        lb_log_error(LB_LOG_WARN, &err);
    peer_free(p);
}

static void on_park_timeout(evutil_socket_t fd, short what, void *arg)
{
    (void)fd;
    (void)what;
    lb_log(LB_LOG_WARN, "a bulk connection came for a session that is not here: closed");
    peer_free(arg);
}

static void park(struct peer *p)
{
    struct timeval limit = {PARK_TIMEOUT_S, 0};

    if (p->d->n_parked >= MAX_PARKED) {
        peer_free(p);
        return;
    }
    p->parked = true;
    p->d->n_unauthenticated--;
    p->d->n_parked++;
    evtimer_del(p->deadline);
    event_free(p->ev);
    p->ev = evtimer_new(p->d->base, on_park_timeout, p);
    evtimer_add(p->ev, &limit);
}

void lb_peers_unpark(struct daemon *d, struct session *s)
{
    struct peer *p, *next;

    for (p = LIST_FIRST(&d->peers); p; p = next) {
        next = LIST_NEXT(p, link);
        if (p->parked && s->conn && !memcmp(p->pre.session_id, s->want_id, LB_SESSION_ID_BYTES))
            pass_on(p, s);
    }
}

static void route(struct peer *p)
{
    struct lb_error err = LB_ERROR_INIT;
    struct daemon *d = p->d;
    struct session *s;

    if (lb_preamble_parse(p->buf, &p->pre, &err)) {
        lb_log(LB_LOG_DEBUG, "a connection with a foreign preamble: closed");
        peer_free(p);
        return;
    }
    if (p->pre.kind == 'D') {
        s = lb_session_wanting(d, p->pre.session_id);
        if (s)
            pass_on(p, s);
        else
            park(p);
        return;
    }
    if (d->n_in >= MAX_SESSIONS_IN) {
        lb_log(LB_LOG_WARN, "%d incoming sessions are at work: a connection was refused",
               MAX_SESSIONS_IN);
    } else if (!lb_session_spawn(d, "in", NULL, NULL, NULL, LB_STEAL_FD(p->fd), &err)) {
        lb_log_error(LB_LOG_ERROR, &err);
    }
    peer_free(p);
}

static void on_deadline(evutil_socket_t fd, short what, void *arg)
{
    (void)fd;
    (void)what;
    peer_free(arg);
}

/* false: p is gone, routed or closed. */
static bool read_preamble(struct peer *p)
{
    ssize_t n = recv(p->fd, p->buf + p->got, sizeof(p->buf) - p->got, MSG_DONTWAIT);

    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return true;
    if (n <= 0) {
        peer_free(p);
        return false;
    }
    p->got += (unsigned)n;
    if (p->got < sizeof(p->buf))
        return true;
    /* Before the descriptor goes to another process: epoll watches the open file, not our
     * number for it, and would report it for ever after we closed ours. */
    event_del(p->ev);
    route(p);
    return false;
}

static void on_peer(evutil_socket_t fd, short what, void *arg)
{
    (void)fd;
    (void)what;
    read_preamble(arg);
}

static void make_room(struct daemon *d)
{
    struct peer *p, *oldest = NULL;

    LIST_FOREACH (p, &d->peers, link)
        if (!p->parked)
            oldest = p; /* the newest are at the head */
    /* Many accepted at once: it may have spoken, unheard yet. */
    if (oldest && read_preamble(oldest))
        peer_free(oldest);
}

static void on_accept(struct evconnlistener *l, evutil_socket_t fd, struct sockaddr *a, int len,
                      void *arg)
{
    struct timeval limit = {PREAMBLE_TIMEOUT_S, 0};
    struct daemon *d = arg;
    struct peer *p;

    (void)l;
    (void)a;
    (void)len;
    if (d->n_unauthenticated >= MAX_UNAUTHENTICATED)
        make_room(d);
    p = lb_alloc(sizeof(*p));
    p->d = d;
    p->fd = fd;
    p->ev = event_new(d->base, fd, EV_READ | EV_PERSIST, on_peer, p);
    p->deadline = evtimer_new(d->base, on_deadline, p);
    LIST_INSERT_HEAD(&d->peers, p, link);
    d->n_unauthenticated++;
    event_add(p->ev, NULL);
    evtimer_add(p->deadline, &limit);
}

static void on_accept_error(struct evconnlistener *l, void *arg)
{
    (void)l;
    (void)arg;
    /* Out of descriptors, most likely: the loop must not spin on it. */
    lb_log(LB_LOG_ERROR, "cannot accept a connection: %s", strerror(errno));
    lb_sleep_ms(20);
}

int lb_peers_start(struct daemon *d, const char *listen, struct lb_error *err)
{
    int fd;

    if (!strcmp(listen, "none"))
        return 0;
    fd = lb_tcp_listen(listen, LB_DEFAULT_PORT, err);
    if (fd < 0)
        return -1;
    evutil_make_socket_nonblocking(fd);
    d->peer_listener = evconnlistener_new(
        d->base, on_accept, d,
        LEV_OPT_CLOSE_ON_FREE | LEV_OPT_CLOSE_ON_EXEC | LEV_OPT_LEAVE_SOCKETS_BLOCKING, 0, fd);
    if (!d->peer_listener) {
        close(fd);
        return lb_fail(err, LB_E_INTERNAL, "cannot serve %s", listen);
    }
    evconnlistener_set_error_cb(d->peer_listener, on_accept_error);
    return 0;
}
