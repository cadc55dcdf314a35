/* Helpers of tests with two hosts in one process: each listens on loopback, trusts whom it is told to, and
 * serves sessions as the daemon would, a thread each. */
#ifndef HOST_UTIL_H
#define HOST_UTIL_H

#include "tests/integration/fake_util.h"

#include <arpa/inet.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

#include "migrate/migrate.h"
#include "netproto/netproto.h"

struct host {
    char name[16], dir[64];
    struct lb_identity id;
    int listen_fd;
    uint16_t port;
    pthread_t thread;
    pthread_mutex_t mu;
    int conns[64];                     /* bulk connections that nobody has taken; by mu, as what follows */
    unsigned n_conns, serving;
    uint8_t want[LB_SESSION_ID_BYTES]; /* of which session they have to be */
    _Atomic bool quit;
};

/* What the sessions of a host get: each test has its own. */
static struct lb_session_env env_of(struct host *h);

static int listen_any(uint16_t *port)
{
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof(a);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

    assert_return_code(bind(fd, (struct sockaddr *)&a, sizeof(a)), errno);
    assert_return_code(listen(fd, 64), errno);
    assert_return_code(getsockname(fd, (struct sockaddr *)&a, &len), errno);
    *port = ntohs(a.sin_port);
    return fd;
}

static bool is_trusted(const uint8_t pub[LB_KEY_BYTES], void *arg)
{
    struct host *h = arg;
    struct lb_hosts v = {0};
    bool ok = !lb_hosts_load(h->dir, &v, NULL) && lb_hosts_by_key(&v, pub);

    lb_hosts_free(&v);
    return ok;
}

/* As env wants it, with the host as its arg. */
static int want_conns(const uint8_t id[LB_SESSION_ID_BYTES], const char *vm, struct lb_error *err, void *arg)
{
    struct host *h = arg;

    (void)vm, (void)err;
    pthread_mutex_lock(&h->mu);
    memcpy(h->want, id, LB_SESSION_ID_BYTES);
    pthread_mutex_unlock(&h->mu);
    return 0;
}

static int take_conn(unsigned timeout_ms, struct lb_error *err, void *arg)
{
    struct host *h = arg;
    int fd = -1;

    for (unsigned i = 0; i < timeout_ms / 5 && fd < 0; i++) {
        pthread_mutex_lock(&h->mu);
        if (h->n_conns) {
            fd = h->conns[0];
            memmove(h->conns, h->conns + 1, sizeof(int) * --h->n_conns);
        }
        pthread_mutex_unlock(&h->mu);
        if (fd < 0)
            lb_sleep_ms(5);
    }
    return fd >= 0 ? fd : lb_fail(err, LB_E_NET, "no bulk connection came");
}

static void serve_channel(struct host *h, int fd)
{
    struct lb_session_env env = env_of(h);
    struct lb_error err = LB_ERROR_INIT;
    struct lb_hosts v = {0};
    struct lb_chan *chan;
    char vm[128] = "";

    if (lb_chan_accept(lb_tcp_from_fd(fd), &h->id, is_trusted, h, 5000, &chan, NULL))
        return;
    lb_hosts_load(h->dir, &v, NULL);
    lb_serve_channel(&env, chan, lb_hosts_by_key(&v, lb_chan_peer_key(chan))->name, vm, &err);
    lb_chan_close(chan);
    lb_hosts_free(&v);
}

struct conn {
    struct host *h;
    int fd;
};

static void *conn_main(void *arg)
{
    struct conn *c = arg;
    struct host *h = c->h;
    uint8_t pre[LB_PREAMBLE_BYTES];
    struct lb_preamble p;

    if (lb_read_all(c->fd, pre, sizeof(pre), NULL) || lb_preamble_parse(pre, &p, NULL)) {
        close(c->fd);
    } else if (p.kind == 'C') {
        serve_channel(h, c->fd);
    } else {
        pthread_mutex_lock(&h->mu);
        if (memcmp(p.session_id, h->want, sizeof(h->want)))
            close(c->fd);
        else
            h->conns[h->n_conns++] = c->fd;
        pthread_mutex_unlock(&h->mu);
    }
    pthread_mutex_lock(&h->mu);
    h->serving--;
    pthread_mutex_unlock(&h->mu);
    free(c);
    return NULL;
}

static void *host_main(void *arg)
{
    struct host *h = arg;

    for (;;) {
        int fd = accept4(h->listen_fd, NULL, NULL, SOCK_CLOEXEC);
        struct conn *c;
        pthread_t t;

        if (fd < 0 || h->quit)
            return NULL;
        c = lb_alloc(sizeof(*c));
        c->h = h;
        c->fd = fd;
        pthread_mutex_lock(&h->mu);
        h->serving++;
        pthread_mutex_unlock(&h->mu);
        pthread_create(&t, NULL, conn_main, c);
        pthread_detach(t);
    }
}

static void host_up(struct host *h, const char *name)
{
    memset(h, 0, sizeof(*h));
    snprintf(h->name, sizeof(h->name), "%s", name);
    snprintf(h->dir, sizeof(h->dir), "/tmp/lb-test-%s-XXXXXX", name);
    assert_non_null(mkdtemp(h->dir));
    assert_return_code(lb_identity_load(h->dir, &h->id, NULL), 0);
    pthread_mutex_init(&h->mu, NULL);
    h->listen_fd = listen_any(&h->port);
    pthread_create(&h->thread, NULL, host_main, h);
}

static void host_down(struct host *h)
{
    h->quit = true;
    shutdown(h->listen_fd, SHUT_RDWR);
    pthread_join(h->thread, NULL);
    close(h->listen_fd);
    lb_remove_tree(h->dir, NULL);
}

/* Until every session of that host is over. */
static void idle(struct host *h)
{
    for (int i = 0; i < 6000; i++) {
        unsigned n;

        pthread_mutex_lock(&h->mu);
        n = h->serving;
        while (!n && h->n_conns)
            close(h->conns[--h->n_conns]);
        pthread_mutex_unlock(&h->mu);
        if (!n)
            return;
        lb_sleep_ms(5);
    }
    fail_msg("a session on host %s did not end", h->name);
}

/* port: where whom is reached, perhaps by way of something that disturbs. */
static void trust(struct host *who, struct host *whom, uint16_t port)
{
    struct lb_host h = {0};

    snprintf(h.name, sizeof(h.name), "%s", whom->name);
    snprintf(h.address, sizeof(h.address), "127.0.0.1:%u", port);
    memcpy(h.pub, whom->id.pub, LB_KEY_BYTES);
    assert_return_code(lb_hosts_trust(who->dir, &h, NULL), 0);
}

#endif
