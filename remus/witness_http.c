/* remus/witness_http.c - see witness_http.h.
 *
 *   question   what a caller (or the look) wants to know; lives until its last attempt is over
 *   attempt    a question at one server, tried again and again: start -> answered -> step -> start ...
 *
 * libevent's callbacks only note what came and wake `step` from the loop, so nothing of libevent is
 * changed or freed while it is inside a connection. All connections and attempts belong to the loop's
 * thread; questions and health are under `lock`. */
#include "remus/witness_http.h"

#include <arpa/inet.h>
#include <assert.h>
#include <errno.h>
#include <event2/buffer.h>
#include <event2/event.h>
#include <event2/http.h>
#include <event2/thread.h>
#include <netdb.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/queue.h>

enum { RETRY_MS = 20, MAX_IDLE = 8, MAX_BODY = 256 << 10, MAX_HEADERS = 16 << 10 };

struct server {
    char name[300];              /* as the operator wrote it */
    char address[INET6_ADDRSTRLEN];
    uint16_t port;
    struct evhttp_connection *idle[MAX_IDLE];
    unsigned n_idle;
};

struct question {
    struct lb_http *http;
    char *path, *body;
    uint64_t deadline_ns;
    bool look;                   /* nobody waits: its end says whether the servers are well */
    /* under http->lock */
    unsigned refs;               /* attempts, and the caller who waits */
    bool answered;
    json_t *answer;              /* of whoever takes it: JSON is for one thread at a time */
    char said[384];              /* what went wrong, one part a server */
};

struct attempt {
    TAILQ_ENTRY(attempt) link;
    struct question *q;
    struct server *s;
    struct evhttp_connection *conn; /* ours while a request is on its way */
    struct evhttp_request *req;     /* on its way; libevent's */
    struct event *wake;             /* runs step() */
    bool asked, failed_before;
    char *reply;                    /* body of an answer */
    int status;                     /* HTTP; 0: none came */
    int socket_errno;
};
TAILQ_HEAD(attempts, attempt);

struct lb_http {
    struct event_base *base;
    struct event *look, *job;
    pthread_t thread;
    bool running;
    struct server servers[LB_HTTP_MAX_URLS];
    unsigned n_servers;
    char *look_path, *look_body;
    struct attempts attempts;       /* loop only */

    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct question *queue[64];     /* to be started by the loop */
    unsigned n_queue;
    bool stop;
    bool healthy;
    char why[160];
};

/* ----------------------------------------------------------------- questions */

static struct question *question_new(struct lb_http *h, const char *path, const char *body,
                                     uint64_t deadline_ns)
{
    struct question *q = lb_alloc(sizeof(*q));

    q->http = h;
    q->path = lb_strdup(path);
    q->body = lb_strdup(body);
    q->deadline_ns = deadline_ns;
    q->refs = 1;
    return q;
}

/* http->lock is held. */
static void question_drop(struct question *q)
{
    struct lb_http *h = q->http;

    if (--q->refs)
        return;
    if (q->look && !q->answered) {
        h->healthy = false;
        snprintf(h->why, sizeof(h->why), "%.159s", q->said);
    }
    json_decref(q->answer);
    free(q->path);
    free(q->body);
    free(q);
}

/* http->lock is held. */
static void question_answered(struct question *q, json_t *answer)
{
    struct lb_http *h = q->http;

    h->healthy = true;
    h->why[0] = '\0';
    if (q->answered) {
        json_decref(answer);
        return;
    }
    q->answered = true;
    q->answer = answer;
    pthread_cond_broadcast(&h->changed);
}

/* ------------------------------------------------------------------ attempts */

static void attempt_free(struct attempt *a)
{
    struct lb_http *h = a->q->http;

    TAILQ_REMOVE(&h->attempts, a, link);
    if (a->conn)
        evhttp_connection_free(a->conn);
    event_free(a->wake);
    free(a->reply);
    pthread_mutex_lock(&h->lock);
    question_drop(a->q);
    pthread_mutex_unlock(&h->lock);
    free(a);
}

static void wake_in(struct attempt *a, unsigned ms)
{
    struct timeval tv = {.tv_usec = (suseconds_t)ms * 1000};

    event_add(a->wake, &tv);
}

/* Inside libevent: only notes. req is NULL, or without a status, when no answer came. */
static void on_reply(struct evhttp_request *req, void *arg)
{
    struct attempt *a = arg;

    a->req = NULL;
    a->socket_errno = errno;
    if (req)
        a->status = evhttp_request_get_response_code(req);
    if (a->status) {
        struct evbuffer *in = evhttp_request_get_input_buffer(req);
        size_t len = evbuffer_get_length(in);

        a->reply = lb_alloc(len + 1);
        evbuffer_remove(in, a->reply, len);
    }
    wake_in(a, 0);
}

static struct evhttp_connection *take_connection(struct lb_http *h, struct server *s)
{
    struct evhttp_connection *c;

    if (s->n_idle)
        return s->idle[--s->n_idle];
    c = evhttp_connection_base_new(h->base, NULL, s->address, s->port);
    if (c) {
        evhttp_connection_set_max_body_size(c, MAX_BODY);
        evhttp_connection_set_max_headers_size(c, MAX_HEADERS);
    }
    return c;
}

static void give_connection(struct server *s, struct evhttp_connection *c)
{
    if (s->n_idle < MAX_IDLE)
        s->idle[s->n_idle++] = c;
    else
        evhttp_connection_free(c);
}

static bool over(struct question *q, uint64_t now)
{
    bool answered;

    pthread_mutex_lock(&q->http->lock);
    answered = q->answered;
    pthread_mutex_unlock(&q->http->lock);
    return answered || now >= q->deadline_ns;
}

static void start(struct attempt *a)
{
    struct evhttp_request *req = evhttp_request_new(on_reply, a);
    struct evkeyvalq *headers;

    a->asked = true;
    a->status = 0;
    a->conn = take_connection(a->q->http, a->s);
    if (!req || !a->conn) {
        if (req)
            evhttp_request_free(req);
        a->socket_errno = ENOMEM;
        wake_in(a, 0);
        return;
    }
    headers = evhttp_request_get_output_headers(req);
    evhttp_add_header(headers, "Host", a->s->name + strlen("http://"));
    evhttp_add_header(headers, "Content-Type", "application/json");
    evbuffer_add(evhttp_request_get_output_buffer(req), a->q->body, strlen(a->q->body));
    a->req = req;
    wake_in(a, LB_HTTP_TRY_MS);
    /* When this fails at once, on_reply has been called or never will be: waking twice does no harm. */
    if (evhttp_make_request(a->conn, req, EVHTTP_REQ_POST, a->q->path)) {
        a->req = NULL;
        a->socket_errno = errno;
        wake_in(a, 0);
    }
}

/* What a server said, or why it said nothing; the first time it fails for this question. */
static void note_failure(struct attempt *a)
{
    struct question *q = a->q;
    size_t at;

    if (a->failed_before)
        return;
    a->failed_before = true;
    pthread_mutex_lock(&q->http->lock);
    at = strlen(q->said);
    if (a->status)
        snprintf(q->said + at, sizeof(q->said) - at, "%s%s: status %d: %.100s", at ? "; " : "",
                 a->s->name, a->status, a->reply);
    else
        snprintf(q->said + at, sizeof(q->said) - at, "%s%s: no answer%s%s", at ? "; " : "",
                 a->s->name, a->socket_errno ? ": " : "",
                 a->socket_errno ? strerror(a->socket_errno) : "");
    for (char *p = q->said + at; *p; p++)
        if ((unsigned char)*p < ' ')
            *p = ' ';
    pthread_mutex_unlock(&q->http->lock);
}

/* Outside libevent's connections: begin, take the answer, try again or end. */
static void step(evutil_socket_t fd, short what, void *arg)
{
    struct attempt *a = arg;

    (void)fd, (void)what;
    if (a->req) { /* no answer in time; libevent closes the connection and makes a new one when it is used again */
        evhttp_cancel_request(LB_STEAL_PTR(a->req));
        a->socket_errno = ETIMEDOUT;
    }
    if (a->asked) {
        json_t *o = a->status == 200 ? json_loads(a->reply, 0, NULL) : NULL;

        if (json_is_object(o)) {
            pthread_mutex_lock(&a->q->http->lock);
            question_answered(a->q, o);
            pthread_mutex_unlock(&a->q->http->lock);
        } else {
            json_decref(o);
            note_failure(a);
        }
        if (a->conn)
            give_connection(a->s, LB_STEAL_PTR(a->conn));
        free(LB_STEAL_PTR(a->reply));
        a->asked = false;
        if (!over(a->q, lb_now_ns())) {
            wake_in(a, RETRY_MS);
            return;
        }
    }
    if (over(a->q, lb_now_ns()))
        attempt_free(a);
    else
        start(a);
}

/* Loop: an attempt at every server. Takes over one reference. */
static void begin(struct question *q)
{
    struct lb_http *h = q->http;

    for (unsigned i = 0; i < h->n_servers; i++) {
        struct attempt *a = lb_alloc(sizeof(*a));

        pthread_mutex_lock(&h->lock);
        q->refs++;
        pthread_mutex_unlock(&h->lock);
        a->q = q;
        a->s = &h->servers[i];
        a->wake = evtimer_new(h->base, step, a);
        TAILQ_INSERT_TAIL(&h->attempts, a, link);
        start(a);
    }
    pthread_mutex_lock(&h->lock);
    question_drop(q);
    pthread_mutex_unlock(&h->lock);
}

static void on_job(evutil_socket_t fd, short what, void *arg)
{
    struct lb_http *h = arg;
    struct question *q;
    bool stop;

    (void)fd, (void)what;
    do {
        pthread_mutex_lock(&h->lock);
        q = h->n_queue ? h->queue[--h->n_queue] : NULL;
        stop = h->stop;
        pthread_mutex_unlock(&h->lock);
        if (q)
            begin(q);
    } while (q);
    if (stop)
        event_base_loopbreak(h->base);
}

static void on_look(evutil_socket_t fd, short what, void *arg)
{
    struct lb_http *h = arg;
    struct timeval next = {.tv_sec = LB_HTTP_LOOK_MS / 1000,
                           .tv_usec = LB_HTTP_LOOK_MS % 1000 * 1000};
    uint64_t patience_ns = UINT64_C(1000000) * LB_HTTP_LOOK_MS / 2;
    struct question *q = question_new(h, h->look_path, h->look_body, lb_now_ns() + patience_ns);

    (void)fd, (void)what;
    event_add(h->look, &next);
    q->look = true;
    begin(q);
}

static void *loop(void *arg)
{
    struct lb_http *h = arg;

    lb_thread_realtime(); /* a claim has a deadline, and takes little */
    event_base_loop(h->base, EVLOOP_NO_EXIT_ON_EMPTY);
    return NULL;
}

/* ------------------------------------------------------------------- callers */

int lb_http_ask(struct lb_http *h, const char *path, const char *body, uint64_t deadline_ns,
                json_t **answer, struct lb_error *err)
{
    struct question *q = question_new(h, path, body, deadline_ns);
    struct timespec until = {.tv_sec = (time_t)(deadline_ns / 1000000000),
                             .tv_nsec = (long)(deadline_ns % 1000000000)};
    int rc = 0;

    pthread_mutex_lock(&h->lock);
    if (h->n_queue == LB_ARRAY_LEN(h->queue)) {
        question_drop(q);
        pthread_mutex_unlock(&h->lock);
        return lb_fail(err, LB_E_NET, "too many questions to the witness at once");
    }
    q->refs++;
    h->queue[h->n_queue++] = q;
    event_active(h->job, EV_TIMEOUT, 0);
    while (!q->answered && lb_now_ns() < deadline_ns)
        pthread_cond_timedwait(&h->changed, &h->lock, &until);
    if (q->answered)
        *answer = LB_STEAL_PTR(q->answer);
    else
        rc = lb_fail(err, LB_E_NET, "the witness does not answer: %s",
                     *q->said ? q->said : "not in time");
    question_drop(q);
    pthread_mutex_unlock(&h->lock);
    return rc;
}

bool lb_http_healthy(struct lb_http *h, char why[160])
{
    bool healthy;

    pthread_mutex_lock(&h->lock);
    healthy = h->healthy;
    snprintf(why, 160, "%.159s", h->why);
    pthread_mutex_unlock(&h->lock);
    return healthy;
}

/* -------------------------------------------------------------- open, close */

static int bad_url(const char *url, const char *why, struct lb_error *err)
{
    lb_fail(err, LB_E_USAGE, "\"%.200s\" cannot be a witness: %s", url, why);
    return lb_remedy(err, "write it as http://HOST[:PORT], several with commas between them");
}

/* A name is looked up now, never again. */
static int resolve(struct server *s, const char *host, struct lb_error *err)
{
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found;
    int failed = getaddrinfo(host, NULL, &hints, &found);

    if (failed) {
        lb_fail(err, LB_E_NET, "%s: %s", s->name, gai_strerror(failed));
        return lb_remedy(err, "name the witness by its address, so that nothing depends on DNS");
    }
    failed = getnameinfo(found->ai_addr, found->ai_addrlen, s->address, sizeof(s->address), NULL, 0,
                         NI_NUMERICHOST);
    freeaddrinfo(found);
    return failed ? lb_fail(err, LB_E_NET, "%s: %s", s->name, gai_strerror(failed)) : 0;
}

static int add_url(struct lb_http *h, const char *url, uint16_t default_port, struct lb_error *err)
{
    struct server *s = &h->servers[h->n_servers];
    char host[256];
    const char *authority;
    size_t len = strlen(url);

    if (!strncmp(url, "https://", 8)) {
        lb_fail(err, LB_E_UNSUPPORTED, "\"%.200s\": https to the witness is not supported", url);
        return lb_remedy(err, "use http:// on a network that only the hosts reach");
    }
    if (strncmp(url, "http://", 7))
        return bad_url(url, "it does not begin with http://", err);
    if (len >= sizeof(s->name))
        return bad_url(url, "it is too long", err);
    if (h->n_servers == LB_HTTP_MAX_URLS)
        return bad_url(url, "there are too many", err);
    snprintf(s->name, sizeof(s->name), "%s", url);
    if (s->name[len - 1] == '/')
        s->name[len - 1] = '\0';
    authority = s->name + strlen("http://");
    if (!*authority || strpbrk(authority, "/?#@ \t\r\n"))
        return bad_url(url, "there must be a host and a port only", err);
    if (lb_parse_hostport(authority, default_port, host, &s->port, NULL) || !*host || !s->port)
        return bad_url(url, "there is no host or a wrong port", err);
    if (resolve(s, host, err))
        return -1;
    h->n_servers++;
    return 0;
}

/* A name that is unknown costs that server only, as long as there are others. */
static int add_urls(struct lb_http *h, const char *urls, uint16_t default_port, struct lb_error *err)
{
    LB_AUTO_FREE char *list = lb_strdup(urls);
    struct lb_error why = LB_ERROR_INIT;
    char *rest = list, *url;

    while ((url = strsep(&rest, ","))) {
        struct lb_error one = LB_ERROR_INIT;

        if (!add_url(h, url, default_port, &one))
            continue;
        why = one;
        if (one.code != LB_E_NET) {
            h->n_servers = 0;
            break;
        }
        lb_log_error(LB_LOG_WARN, &one);
    }
    if (!h->n_servers && err)
        *err = why;
    return h->n_servers ? 0 : -1;
}

static int start_loop(struct lb_http *h, struct lb_error *err)
{
    sigset_t all, before;
    int failed;

    if (evthread_use_pthreads() || !(h->base = event_base_new()))
        return lb_fail(err, LB_E_INTERNAL, "cannot make an event loop");
    h->look = evtimer_new(h->base, on_look, h);
    h->job = evtimer_new(h->base, on_job, h);
    event_active(h->look, EV_TIMEOUT, 0);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    failed = pthread_create(&h->thread, NULL, loop, h);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failed)
        return lb_fail_errno(err, LB_E_INTERNAL, failed, "cannot start a thread");
    h->running = true;
    return 0;
}

int lb_http_open(const char *urls, uint16_t default_port, const char *look_path,
                 const char *look_body, struct lb_http **out, struct lb_error *err)
{
    struct lb_http *h = lb_alloc(sizeof(*h));
    pthread_condattr_t monotonic;

    TAILQ_INIT(&h->attempts);
    lb_mutex_init_inherit(&h->lock);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&h->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    h->look_path = lb_strdup(look_path);
    h->look_body = lb_strdup(look_body);
    snprintf(h->why, sizeof(h->why), "it was not asked yet");
    if (add_urls(h, urls, default_port, err) || start_loop(h, err)) {
        lb_http_close(h);
        return -1;
    }
    *out = h;
    return 0;
}

void lb_http_close(struct lb_http *h)
{
    struct attempt *a;

    if (!h)
        return;
    if (h->running) {
        /* By an event: libevent forgets a loopbreak that comes before its loop has begun. */
        pthread_mutex_lock(&h->lock);
        h->stop = true;
        pthread_mutex_unlock(&h->lock);
        event_active(h->job, EV_TIMEOUT, 0);
        pthread_join(h->thread, NULL);
    }
    while ((a = TAILQ_FIRST(&h->attempts)))
        attempt_free(a);
    for (unsigned i = 0; i < h->n_queue; i++)
        question_drop(h->queue[i]);
    for (unsigned i = 0; i < h->n_servers; i++)
        while (h->servers[i].n_idle)
            evhttp_connection_free(h->servers[i].idle[--h->servers[i].n_idle]);
    if (h->look)
        event_free(h->look);
    if (h->job)
        event_free(h->job);
    if (h->base)
        event_base_free(h->base);
    pthread_cond_destroy(&h->changed);
    pthread_mutex_destroy(&h->lock);
    free(h->look_path);
    free(h->look_body);
    free(h);
}
