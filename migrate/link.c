/*
 * migrate/link.c - what the network carries to another host.
 *
 *   asks                               answers
 *   LinkTest                      ->
 *   LinkData, as fast as it goes  ->   the first quarter warms up (slow start, bursts that shapers let through); then
 *                                      bytes and time are counted
 *                                 <-   LinkResult, when the time is over
 *   closes                        ->   drops what is still coming, until then
 *
 * Over the control channel, so it needs nothing else to be open; what is sent is ciphertext, which no link compresses. The receiver's
 * clock counts: what the sender has got rid of may still sit in a buffer.
 */
#include <poll.h>
#include <pthread.h>
#include <string.h>

#include "core/json.h"
#include "migrate/capacity.h"
#include "migrate/ctl.h"

#define TEST_MS 240u
#define MOST_MS 2000u           /* that we let a peer occupy us */
#define MOST_BYTES (UINT64_C(4) << 30)
#define PIECE_BYTES 32768u
#define CONNECT_MS 3000u
#define ANSWER_NS UINT64_C(5000000000)
#define DRAIN_NS UINT64_C(2000000000)
#define FRESH_MS UINT64_C(600000)
#define SLOW_BYTES_PER_S (UINT64_C(32) << 20) /* slower than this is looked at twice */
#define MAX_FILE (4u << 20)
#define OWN "own"               /* in links.json: to several at once */

/* -------------------------------------------------------------------------- serving */

struct count {
    uint64_t t_first, t_warm, t_last; /* t_warm 0: warming up */
    uint64_t since_first, since_warm; /* bytes that came after those moments */
};

/* Counts one piece; the first only starts the clock. */
static void count(struct count *c, size_t len, uint64_t now, unsigned max_ms)
{
    if (!c->t_first)
        c->t_first = now;
    else
        c->since_first += len;
    if (c->t_warm)
        c->since_warm += len;
    else if (now - c->t_first >= max_ms * UINT64_C(1000000) / 4)
        c->t_warm = now;
    c->t_last = now;
}

static int receive(struct lb_chan *chan, unsigned max_ms, uint64_t max_bytes, struct count *c, struct lb_error *err)
{
    for (;;) {
        Lb__Control *m;
        size_t len;

        if (lb_ctl_expect(chan, LB__CONTROL__KIND_LINK_DATA, &m, lb_now_ns() + ANSWER_NS, err))
            return -1;
        len = m->link_data->data.len;
        lb__control__free_unpacked(m, NULL);
        if (!len)
            return 0;
        count(c, len, lb_now_ns(), max_ms);
        if (c->t_last - c->t_first >= max_ms * UINT64_C(1000000) || c->since_first >= max_bytes)
            return 0;
    }
}

static void drain(struct lb_chan *chan)
{
    uint64_t until = lb_now_ns() + DRAIN_NS;
    Lb__Control *m;

    while (lb_now_ns() < until && !lb_ctl_recv(chan, &m, until, NULL))
        lb__control__free_unpacked(m, NULL);
}

int lb_link_serve(struct lb_chan *chan, const Lb__LinkTest *t, struct lb_error *err)
{
    Lb__Control m = LB__CONTROL__INIT;
    Lb__LinkResult r = LB__LINK_RESULT__INIT;
    struct count c = {0};

    if (receive(chan, LB_MIN(LB_MAX(t->max_ms, 1), MOST_MS), LB_MIN(t->max_bytes ? t->max_bytes : MOST_BYTES, MOST_BYTES), &c,
                err))
        return -1;
    r.bytes = c.since_warm ? c.since_warm : c.since_first;
    r.took_us = (c.t_last - (c.since_warm ? c.t_warm : c.t_first)) / 1000;
    m.kind_case = LB__CONTROL__KIND_LINK_RESULT;
    m.link_result = &r;
    if (lb_ctl_send(chan, &m, err))
        return -1;
    drain(chan); /* closed with data unread, the answer could be lost */
    return 0;
}

/* ------------------------------------------------------------------------ measuring */

/* POLLIN: it has answered; POLLOUT: there is room for more; 0: neither, and the time is over. */
static short wait_for(const struct lb_chan *chan, uint64_t until_ns)
{
    struct pollfd p = {.fd = lb_chan_fd(chan), .events = POLLIN | POLLOUT};
    uint64_t now = lb_now_ns();

    return poll(&p, 1, now < until_ns ? (int)((until_ns - now) / 1000000) + 1 : 0) > 0 ? p.revents : 0;
}

static int send_data(struct lb_chan *chan, uint8_t *data, size_t len, struct lb_error *err)
{
    Lb__Control m = LB__CONTROL__INIT;
    Lb__LinkData d = LB__LINK_DATA__INIT;

    d.data = (ProtobufCBinaryData){len, data};
    m.kind_case = LB__CONTROL__KIND_LINK_DATA;
    m.link_data = &d;
    return lb_ctl_send(chan, &m, err);
}

/* Until it answers, or for twice the time of the test; never longer in a send that gets nowhere. */
static int flood(struct lb_chan *chan, struct lb_error *err)
{
    LB_AUTO_FREE uint8_t *data = lb_alloc(PIECE_BYTES);
    uint64_t until = lb_now_ns() + 2 * TEST_MS * UINT64_C(1000000);

    for (;;) {
        short ready = wait_for(chan, until);

        if (ready & ~POLLOUT || !ready)
            return 0;
        if (lb_now_ns() >= until)
            return send_data(chan, NULL, 0, err);
        if (send_data(chan, data, PIECE_BYTES, err))
            return -1;
    }
}

static int test(struct lb_chan *chan, uint64_t *bytes_per_s, struct lb_error *err)
{
    Lb__Control m = LB__CONTROL__INIT, *in = NULL;
    Lb__LinkTest t = LB__LINK_TEST__INIT;
    Lb__Hello h = LB__HELLO__INIT;
    uint64_t us;

    lb_ctl_hello(&h, NULL);
    t.hello = &h;
    t.max_ms = TEST_MS;
    m.kind_case = LB__CONTROL__KIND_LINK_TEST;
    m.link_test = &t;
    if (lb_ctl_send(chan, &m, err) || flood(chan, err) ||
        lb_ctl_expect(chan, LB__CONTROL__KIND_LINK_RESULT, &in, lb_now_ns() + ANSWER_NS, err))
        return -1;
    us = in->link_result->took_us;
    *bytes_per_s = us ? (uint64_t)((double)in->link_result->bytes * 1e6 / (double)us) : 0;
    lb__control__free_unpacked(in, NULL);
    if (!*bytes_per_s || *bytes_per_s > LB_INV_MAX_BYTES)
        return lb_fail(err, LB_E_NET, "nothing of the test came through in time");
    return 0;
}

/* ---------------------------------------------------------------------- what is known */

/* NULL: none, or it is damaged: measured again. */
static json_t *load(const char *state_dir)
{
    LB_AUTO_FREE char *path = lb_asprintf("%s/links.json", state_dir), *text = NULL;
    json_t *o;

    if (lb_file_read(path, MAX_FILE, &text, NULL, NULL))
        return json_object();
    o = json_loads(text, 0, NULL);
    if (json_is_object(o))
        return o;
    json_decref(o);
    return json_object();
}

static bool recall(const char *state_dir, const char *key, const char *address, uint64_t *rate)
{
    json_t *all = load(state_dir), *o = json_object_get(all, key);
    const char *was = json_string_value(json_object_get(o, "address"));
    uint64_t at = 0, n = 0, now = lb_wall_ms();
    bool known = !lb_json_get_u64(o, "at_ms", INT64_MAX, &at) && !lb_json_get_u64(o, "bytes_per_s", LB_INV_MAX_BYTES, &n) &&
                 n && was && !strcmp(was, address) && at <= now && now - at < FRESH_MS;

    json_decref(all);
    if (known)
        *rate = n;
    return known;
}

static void remember(const char *state_dir, const char *key, const char *address, uint64_t rate)
{
    LB_AUTO_FREE char *path = lb_asprintf("%s/links.json", state_dir);
    struct lb_error err = LB_ERROR_INIT;
    json_t *all = load(state_dir);

    json_object_set_new(all, key, json_pack("{s:o, s:I, s:I}", "address", lb_json_text(address), "bytes_per_s",
                                            (json_int_t)rate, "at_ms", (json_int_t)lb_wall_ms()));
    LB_AUTO_FREE char *text = json_dumps(all, JSON_COMPACT);
    json_decref(all);
    if (text && lb_file_write_atomic(path, text, strlen(text), 0600, &err))
        lb_log_error(LB_LOG_WARN, &err);
}

static int measure_once(const struct lb_identity *me, const struct lb_peer *p, int cancel_fd, uint64_t *rate, struct lb_error *err)
{
    struct lb_chan *chan = NULL;
    char host[256];
    uint16_t port;
    int rc = -1;

    lb_host_address(&p->host, host, &port);
    if (!lb_chan_connect(host, port, me, p->host.pub, CONNECT_MS, cancel_fd, &chan, err))
        rc = test(chan, rate, err);
    lb_chan_close(chan);
    return rc ? lb_context(err, "the link to host %s cannot be measured", p->host.name) : 0;
}

/* A host that is busy for a moment makes its link look slow; nothing makes it look fast. */
static int measure(const struct lb_identity *me, const struct lb_peer *p, int cancel_fd, uint64_t *rate, struct lb_error *err)
{
    struct lb_error ignored = LB_ERROR_INIT;
    uint64_t again = 0;

    if (measure_once(me, p, cancel_fd, rate, err))
        return -1;
    if (*rate < SLOW_BYTES_PER_S && !measure_once(me, p, cancel_fd, &again, &ignored))
        *rate = LB_MAX(*rate, again);
    return 0;
}

int lb_link_measure(const char *state_dir, const struct lb_identity *me, struct lb_peer *p, int cancel_fd,
                    struct lb_error *err)
{
    if (!recall(state_dir, p->key, p->host.address, &p->link_bytes_per_s)) {
        if (measure(me, p, cancel_fd, &p->link_bytes_per_s, err))
            return -1;
        remember(state_dir, p->key, p->host.address, p->link_bytes_per_s);
    }
    p->measured = true;
    return 0;
}

/* ------------------------------------------------------------- several at the same time */

struct one {
    const struct lb_identity *me;
    const struct lb_peer *p;
    int cancel_fd;
    uint64_t rate;      /* 0: it failed */
    struct lb_error err;
};

static void *measure_main(void *arg)
{
    struct one *o = arg;

    if (measure(o->me, o->p, o->cancel_fd, &o->rate, &o->err))
        o->rate = 0;
    return NULL;
}

/* Which hosts a result is about. */
static char *names_of(struct lb_peer *const *v, unsigned n)
{
    char *text = lb_strdup("");

    for (unsigned i = 0; i < n; i++) {
        char *more = lb_asprintf("%s%s%.8s", text, i ? " " : "", v[i]->key + 3);

        free(text);
        text = more;
    }
    return text;
}

int lb_link_measure_own(const char *state_dir, const struct lb_identity *me, struct lb_peer *const *v, unsigned n,
                        int cancel_fd, uint64_t *bytes_per_s, struct lb_error *err)
{
    struct one ones[LB_LINK_AT_ONCE];
    pthread_t threads[LB_LINK_AT_ONCE];
    LB_AUTO_FREE char *names = NULL;
    unsigned begun = 0;
    uint64_t sum = 0;

    n = LB_MIN(n, LB_LINK_AT_ONCE);
    names = names_of(v, n);
    if (recall(state_dir, OWN, names, bytes_per_s))
        return 0;
    for (; begun < n; begun++) {
        ones[begun] = (struct one){.me = me, .p = v[begun], .cancel_fd = cancel_fd};
        if (pthread_create(&threads[begun], NULL, measure_main, &ones[begun]))
            break;
    }
    for (unsigned i = 0; i < begun; i++) {
        pthread_join(threads[i], NULL);
        if (!ones[i].rate && err)
            *err = ones[i].err;
        sum = ones[i].rate && (i == 0 || sum) ? sum + ones[i].rate : 0;
    }
    if (!sum || begun < n)
        return err && err->code ? -1 : lb_fail(err, LB_E_INTERNAL, "cannot start a thread");
    remember(state_dir, OWN, names, sum);
    *bytes_per_s = sum;
    return 0;
}
