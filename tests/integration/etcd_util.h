/* Helpers of test_witness.c: real etcd members on loopback addresses of a network namespace of the
 * test's own (127.0.0.1, .2, ...), with their data in memory. */
#ifndef ETCD_UTIL_H
#define ETCD_UTIL_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <arpa/inet.h>
#include <fcntl.h>
#include <net/if.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/core.h"

struct etcd_cluster {
    char dir[64];
    unsigned n;
    pid_t pid[3];   /* 0: not running */
};

/* False where it may not. */
static inline bool own_network(void)
{
    struct ifreq lo = {.ifr_flags = IFF_UP};
    int s;

    if (unshare(CLONE_NEWNET) < 0)
        return false;
    strcpy(lo.ifr_name, "lo");
    s = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    assert_int_equal(ioctl(s, SIOCSIFFLAGS, &lo), 0);
    close(s);
    return true;
}

static inline void etcd_start(struct etcd_cluster *c, unsigned i)
{
    char *name = lb_asprintf("m%u", i + 1), *data = lb_asprintf("%s/m%u", c->dir, i + 1);
    char *client = lb_asprintf("http://127.0.0.%u:2379", i + 1);
    char *peer = lb_asprintf("http://127.0.0.%u:2380", i + 1);
    char *all = lb_strdup("");

    for (unsigned m = 1; m <= c->n; m++) {
        char *more = lb_asprintf("%s%sm%u=http://127.0.0.%u:2380", all, m > 1 ? "," : "", m, m);
        free(all);
        all = more;
    }
    assert_int_equal(c->pid[i], 0);
    c->pid[i] = fork();
    assert_true(c->pid[i] >= 0);
    if (c->pid[i] == 0) {
        char *log = lb_asprintf("%s/m%u.log", c->dir, i + 1);
        int out = open(log, O_WRONLY | O_CREAT | O_APPEND, 0600);

        prctl(PR_SET_PDEATHSIG, SIGKILL);
        dup2(out, STDOUT_FILENO);
        dup2(out, STDERR_FILENO);
        execlp("etcd", "etcd", "--name", name, "--data-dir", data, "--listen-client-urls", client,
               "--advertise-client-urls", client, "--listen-peer-urls", peer,
               "--initial-advertise-peer-urls", peer, "--initial-cluster", all,
               "--heartbeat-interval", "50", "--election-timeout", "300", "--log-level", "error",
               (char *)NULL);
        _exit(127);
    }
    free(name);
    free(data);
    free(client);
    free(peer);
    free(all);
}

/* Returns when it is dead, or when the last of its threads has stopped. */
static inline void etcd_signal(struct etcd_cluster *c, unsigned i, int number)
{
    assert_true(c->pid[i] > 0);
    assert_int_equal(kill(c->pid[i], number), 0);
    if (number == SIGSTOP)
        assert_int_equal(waitpid(c->pid[i], NULL, WUNTRACED), c->pid[i]);
    if (number != SIGKILL)
        return;
    assert_int_equal(waitpid(c->pid[i], NULL, 0), c->pid[i]);
    c->pid[i] = 0;
}

static inline void etcd_open_cluster(struct etcd_cluster *c, unsigned n)
{
    memset(c, 0, sizeof(*c));
    strcpy(c->dir, "/dev/shm/lb-etcd.XXXXXX");
    assert_non_null(mkdtemp(c->dir));
    c->n = n;
    for (unsigned i = 0; i < n; i++)
        etcd_start(c, i);
}

static inline void etcd_close_cluster(struct etcd_cluster *c)
{
    for (unsigned i = 0; i < c->n; i++)
        if (c->pid[i])
            etcd_signal(c, i, SIGKILL);
    assert_int_equal(lb_remove_tree(c->dir, NULL), 0);
}

/* "etcd:http://127.0.0.1:2379,..." of the members whose bit is set. */
static inline char *etcd_spec(unsigned members)
{
    char *spec = lb_strdup("etcd:");

    for (unsigned i = 0; i < 3; i++)
        if (members & (1u << i)) {
            char *more = lb_asprintf("%s%shttp://127.0.0.%u:2379", spec,
                                     spec[strlen(spec) - 1] == ':' ? "" : ",", i + 1);
            free(spec);
            spec = more;
        }
    return spec;
}

/* ------------------------------------------------------- a proxy that loses answers */

struct proxy {
    int listener;
    uint16_t port;
    pthread_t thread;
    bool stop;              /* atomic, as the rest */
    bool lose;              /* forward the request, wait for its answer, cut the connection */
    unsigned connections, lost;
};
struct proxy_line {
    struct proxy *p;
    int client;
};

/* One connection: one thread, bytes to and fro until one side ends. */
static inline void *proxy_line(void *arg)
{
    struct proxy_line *l = arg;
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(2379),
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int server = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    bool alive = !connect(server, (struct sockaddr *)&to, sizeof(to));
    char buf[65536];

    while (alive && !__atomic_load_n(&l->p->stop, __ATOMIC_ACQUIRE)) {
        struct pollfd fds[2] = {{.fd = l->client, .events = POLLIN}, {.fd = server, .events = POLLIN}};

        poll(fds, 2, 50);
        for (unsigned i = 0; i < 2 && alive; i++) {
            if (!fds[i].revents)
                continue;
            ssize_t n = read(fds[i].fd, buf, sizeof(buf));
            if (i == 1 && n > 0 && __atomic_load_n(&l->p->lose, __ATOMIC_ACQUIRE)) {
                __atomic_add_fetch(&l->p->lost, 1, __ATOMIC_RELAXED);
                alive = false;
            } else {
                alive = n > 0 && write(fds[!i].fd, buf, (size_t)n) == n;
            }
        }
    }
    close(server);
    close(l->client);
    free(l);
    return NULL;
}

static inline void *proxy_loop(void *arg)
{
    struct proxy *p = arg;
    pthread_t lines[256];
    unsigned n = 0;

    while (!__atomic_load_n(&p->stop, __ATOMIC_ACQUIRE)) {
        struct pollfd fd = {.fd = p->listener, .events = POLLIN};

        if (poll(&fd, 1, 50) != 1)
            continue;
        struct proxy_line *l = lb_alloc(sizeof(*l));
        l->p = p;
        l->client = accept4(p->listener, NULL, NULL, SOCK_CLOEXEC);
        __atomic_add_fetch(&p->connections, 1, __ATOMIC_RELAXED);
        if (n == LB_ARRAY_LEN(lines) || pthread_create(&lines[n], NULL, proxy_line, l)) {
            close(l->client);
            free(l);
        } else {
            n++;
        }
    }
    for (unsigned i = 0; i < n; i++)
        pthread_join(lines[i], NULL);
    return NULL;
}

static inline void proxy_open(struct proxy *p)
{
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof(at);

    memset(p, 0, sizeof(*p));
    p->listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(bind(p->listener, (struct sockaddr *)&at, sizeof(at)), 0);
    assert_int_equal(listen(p->listener, 64), 0);
    assert_int_equal(getsockname(p->listener, (struct sockaddr *)&at, &len), 0);
    p->port = ntohs(at.sin_port);
    assert_int_equal(pthread_create(&p->thread, NULL, proxy_loop, p), 0);
}

static inline void proxy_close(struct proxy *p)
{
    __atomic_store_n(&p->stop, true, __ATOMIC_RELEASE);
    pthread_join(p->thread, NULL);
    close(p->listener);
}

#endif
