/*
 * netproto/chan.c - the control channel: Noise XX, then messages in sealed frames.
 *
 *      initiator                         responder
 *        preamble 'C'                      (read by the supervisor)
 *        u16 32  e                    ->
 *                                     <-  u16 96  e, ee, s, es
 *        [is that the key I expect?]
 *        u16 64  s, se                ->
 *                                         [do I trust that key? else close]
 *                                     <-  frame: empty message = welcome
 *
 * A frame is a u16 length and a Noise message; inside it one octet of flags (bit
 * 0: last frame of its message) and a piece of the message.
 *
 * Failure modes: whatever is wrong breaks that direction for good; only a deadline
 * that passes in lb_chan_recv loses nothing.
 */
#include "netproto/netproto_internal.h"
#include "netproto/noise.h"

#include <assert.h>
#include <pthread.h>
#include <sodium.h>
#include <string.h>

enum {
    FRAME_HEAD = 2,
    FRAME_MAX = FRAME_HEAD + LB_NOISE_MAX_BYTES,
    FRAME_DATA_MAX = LB_NOISE_MAX_BYTES - LB_NOISE_TAG_BYTES - 1,
    FLAG_FINAL = 1,
    SEND_TIMEOUT_MS = 30000, /* a peer that reads nothing for so long is gone */
};

struct lb_chan {
    /* immutable after the handshake */
    struct lb_transport *t;
    uint8_t peer[LB_KEY_BYTES];

    pthread_mutex_t send_lock; /* guards the next four */
    struct lb_noise_cipher tx;
    uint8_t *tx_plain, *tx_frame;
    bool tx_broken;

    /* receiving thread only */
    struct lb_noise_cipher rx;
    uint8_t *rbuf; /* one frame and what came with it */
    size_t r_len;
    uint8_t *msg; /* being put together */
    size_t msg_len, msg_cap;
    bool rx_broken;
};

static struct lb_chan *chan_new(struct lb_transport *t)
{
    struct lb_chan *c = lb_alloc(sizeof(*c));
    c->t = t;
    lb_mutex_init_inherit(&c->send_lock);
    c->tx_plain = lb_alloc(1 + FRAME_DATA_MAX);
    c->tx_frame = lb_alloc(FRAME_MAX);
    c->rbuf = lb_alloc(FRAME_MAX);
    return c;
}

static void wipe_free(void *p, size_t len)
{
    if (p)
        sodium_memzero(p, len); /* messages carry the secret of the bulk connections */
    free(p);
}

void lb_chan_close(struct lb_chan *c)
{
    if (!c)
        return;
    c->t->ops->close(c->t);
    pthread_mutex_destroy(&c->send_lock);
    wipe_free(c->tx_plain, 1 + FRAME_DATA_MAX);
    wipe_free(c->tx_frame, FRAME_MAX);
    wipe_free(c->rbuf, FRAME_MAX);
    wipe_free(c->msg, c->msg_cap);
    sodium_memzero(c, sizeof(*c));
    free(c);
}

void lb_chan_abort(struct lb_chan *c)
{
    c->t->ops->abort(c->t);
}

const uint8_t *lb_chan_peer_key(const struct lb_chan *c)
{
    return c->peer;
}

int lb_chan_fd(const struct lb_chan *c)
{
    return c->t->ops->fd(c->t);
}

/* ---------------------------------------------------------------- handshake */

static int put_handshake(struct lb_transport *t, struct lb_noise *n, uint64_t deadline_ns,
                         struct lb_error *err)
{
    uint8_t msg[FRAME_HEAD + LB_NOISE_MSG2_BYTES];
    size_t len = sizeof(msg) - FRAME_HEAD;

    if (lb_noise_write(n, NULL, 0, msg + FRAME_HEAD, &len, err) < 0)
        return -1;
    lb_put16(msg, (uint16_t)len);
    struct iovec iov = {.iov_base = msg, .iov_len = FRAME_HEAD + len};
    return t->ops->writev(t, &iov, 1, deadline_ns, err);
}

static int get_handshake(struct lb_transport *t, struct lb_noise *n, size_t expected,
                         uint64_t deadline_ns, struct lb_error *err)
{
    uint8_t head[FRAME_HEAD], msg[LB_NOISE_MSG2_BYTES], none[LB_NOISE_MSG2_BYTES];
    size_t none_len;

    if (lb_transport_read(t, head, sizeof(head), deadline_ns, err) < 0)
        return -1;
    size_t len = lb_get16(head);
    if (len != expected)
        return lb_fail(err, LB_E_PROTO, "handshake message of %zu bytes instead of %zu", len,
                       expected);
    if (lb_transport_read(t, msg, len, deadline_ns, err) < 0)
        return -1;
    return lb_noise_read(n, msg, len, none, &none_len, err);
}

static int refuse_key(const char *who, const uint8_t pub[LB_KEY_BYTES], const char *remedy,
                      struct lb_error *err)
{
    char text[LB_KEY_TEXT_BYTES];
    lb_key_format(text, pub);
    lb_fail(err, LB_E_AUTH, "%s with key %s, which is not trusted", who, text);
    return lb_remedy(err, "%s", remedy);
}

static int handshake_initiator(struct lb_chan *c, struct lb_noise *n,
                               const uint8_t expect[LB_KEY_BYTES], uint64_t deadline_ns,
                               struct lb_error *err)
{
    if (put_handshake(c->t, n, deadline_ns, err) < 0 ||
        get_handshake(c->t, n, LB_NOISE_MSG2_BYTES, deadline_ns, err) < 0)
        return -1;
    if (sodium_memcmp(n->rs, expect, LB_KEY_BYTES) != 0) /* before our own key is shown */
        return refuse_key("the host answers", n->rs,
                          "if its key was changed on purpose, `lifeboat host forget` it and "
                          "`lifeboat host trust` the new key", err);
    return put_handshake(c->t, n, deadline_ns, err);
}

static int handshake_responder(struct lb_chan *c, struct lb_noise *n,
                               bool (*trusted)(const uint8_t pub[LB_KEY_BYTES], void *arg),
                               void *arg, uint64_t deadline_ns, struct lb_error *err)
{
    if (get_handshake(c->t, n, LB_NOISE_MSG1_BYTES, deadline_ns, err) < 0 ||
        put_handshake(c->t, n, deadline_ns, err) < 0 ||
        get_handshake(c->t, n, LB_NOISE_MSG3_BYTES, deadline_ns, err) < 0)
        return -1;
    if (!trusted(n->rs, arg))
        return refuse_key("a host connected", n->rs,
                          "to accept it, run `lifeboat host trust NAME ADDRESS KEY` here", err);
    return 0;
}

static void start_noise(struct lb_noise *n, bool initiator, const struct lb_identity *me)
{
    uint8_t prologue[LB_PREAMBLE_BYTES];
    struct lb_preamble p = {.kind = 'C'};
    lb_preamble_write(prologue, &p);
    lb_noise_init(n, initiator, me, prologue, sizeof(prologue));
}

static void finish_noise(struct lb_chan *c, struct lb_noise *n)
{
    lb_noise_split(n, &c->tx, &c->rx);
    memcpy(c->peer, n->rs, sizeof(c->peer));
}

static int send_until(struct lb_chan *c, const void *msg, size_t len, uint64_t deadline_ns,
                      struct lb_error *err);

/* The responder says that it accepts us with an empty message. */
static int await_welcome(struct lb_chan *c, uint64_t deadline_ns, struct lb_error *err)
{
    struct lb_error why = LB_ERROR_INIT;
    LB_AUTO_FREE void *msg = NULL;
    size_t len;

    if (lb_chan_recv(c, &msg, &len, deadline_ns, &why) == 0) {
        if (len == 0)
            return 0;
        return lb_fail(err, LB_E_PROTO, "the peer's first message is not its welcome");
    }
    if (why.code == LB_E_NET && !lb_is_timeout(&why)) {
        lb_fail(err, LB_E_AUTH, "the peer closed the connection when it saw our key");
        return lb_remedy(err, "make the peer trust this host: `lifeboat host id` here, then "
                              "`lifeboat host trust` there");
    }
    if (err)
        *err = why;
    return -1;
}

static int connect_over(struct lb_transport *t, const struct lb_identity *me,
                        const uint8_t expect[LB_KEY_BYTES], uint64_t deadline_ns,
                        struct lb_chan **out, struct lb_error *err)
{
    struct lb_preamble p = {.kind = 'C'};
    uint8_t bytes[LB_PREAMBLE_BYTES];
    struct iovec iov = {.iov_base = bytes, .iov_len = sizeof(bytes)};
    struct lb_chan *c = chan_new(t);
    struct lb_noise n = {0};
    int rc = -1;

    if (lb_crypto_init(err) < 0)
        goto out;
    lb_preamble_write(bytes, &p);
    start_noise(&n, true, me);
    if (t->ops->writev(t, &iov, 1, deadline_ns, err) < 0 ||
        handshake_initiator(c, &n, expect, deadline_ns, err) < 0)
        goto out;
    finish_noise(c, &n);
    if (await_welcome(c, deadline_ns, err) < 0)
        goto out;
    *out = LB_STEAL_PTR(c);
    rc = 0;
out:
    lb_noise_wipe(&n);
    lb_chan_close(c);
    return rc;
}

int lb_chan_open(struct lb_transport *t, const struct lb_identity *me,
                 const uint8_t expect[LB_KEY_BYTES], unsigned timeout_ms, struct lb_chan **out,
                 struct lb_error *err)
{
    return connect_over(t, me, expect, lb_deadline(timeout_ms), out, err);
}

int lb_chan_connect(const char *host, uint16_t port, const struct lb_identity *me,
                    const uint8_t expect[LB_KEY_BYTES], unsigned timeout_ms, int cancel_fd,
                    struct lb_chan **out, struct lb_error *err)
{
    uint64_t deadline_ns = lb_deadline(timeout_ms);
    struct lb_transport *t;

    if (lb_tcp_connect(host, port, timeout_ms, cancel_fd, &t, err) < 0)
        return -1;
    lb_tcp_set_cancel_fd(t, cancel_fd);
    if (connect_over(t, me, expect, deadline_ns, out, err) < 0)
        return lb_context(err, "%s port %u", host, port);
    lb_tcp_set_cancel_fd(t, -1);
    return 0;
}

int lb_chan_accept(struct lb_transport *t, const struct lb_identity *me,
                   bool (*trusted)(const uint8_t pub[LB_KEY_BYTES], void *arg), void *arg,
                   unsigned timeout_ms, struct lb_chan **out, struct lb_error *err)
{
    uint64_t deadline_ns = lb_deadline(timeout_ms);
    struct lb_chan *c = chan_new(t);
    struct lb_noise n = {0};
    int rc = -1;

    if (lb_crypto_init(err) < 0)
        goto out;
    start_noise(&n, false, me);
    if (handshake_responder(c, &n, trusted, arg, deadline_ns, err) < 0)
        goto out;
    finish_noise(c, &n);
    if (send_until(c, NULL, 0, deadline_ns, err) < 0)
        goto out;
    *out = LB_STEAL_PTR(c);
    rc = 0;
out:
    lb_noise_wipe(&n);
    lb_chan_close(c);
    return rc;
}

/* ------------------------------------------------------------------ sending */

static int put_frame(struct lb_chan *c, const uint8_t *data, size_t len, bool final,
                     uint64_t deadline_ns, struct lb_error *err)
{
    c->tx_plain[0] = final ? FLAG_FINAL : 0;
    if (len > 0)
        memcpy(c->tx_plain + 1, data, len);
    if (lb_noise_seal(&c->tx, NULL, 0, c->tx_plain, len + 1, c->tx_frame + FRAME_HEAD, err) < 0)
        return -1;
    size_t sealed = len + 1 + LB_NOISE_TAG_BYTES;
    lb_put16(c->tx_frame, (uint16_t)sealed);
    struct iovec iov = {.iov_base = c->tx_frame, .iov_len = FRAME_HEAD + sealed};
    return c->t->ops->writev(c->t, &iov, 1, deadline_ns, err);
}

static int send_until(struct lb_chan *c, const void *msg, size_t len, uint64_t deadline_ns,
                      struct lb_error *err)
{
    const uint8_t *p = msg;
    int rc = 0;

    pthread_mutex_lock(&c->send_lock);
    if (c->tx_broken)
        rc = lb_fail(err, LB_E_NET, "the control channel has failed before");
    for (bool final = false; rc == 0 && !final;) {
        size_t take = LB_MIN(len, (size_t)FRAME_DATA_MAX);
        final = take == len;
        rc = put_frame(c, p, take, final, deadline_ns, err);
        if (take > 0)
            p += take;
        len -= take;
    }
    if (rc < 0)
        c->tx_broken = true; /* a frame may have gone out in part */
    pthread_mutex_unlock(&c->send_lock);
    return rc;
}

int lb_chan_send(struct lb_chan *c, const void *msg, size_t len, struct lb_error *err)
{
    if (len > LB_CONTROL_MAX_BYTES)
        return lb_fail(err, LB_E_INTERNAL, "a control message of %zu bytes is too large", len);
    return send_until(c, msg, len, lb_deadline(SEND_TIMEOUT_MS), err);
}

/* ---------------------------------------------------------------- receiving */

static int need(struct lb_chan *c, size_t len, uint64_t deadline_ns, struct lb_error *err)
{
    while (c->r_len < len) {
        ssize_t n = c->t->ops->read_some(c->t, c->rbuf + c->r_len, FRAME_MAX - c->r_len,
                                         deadline_ns, err);
        if (n < 0)
            return -1;
        if (n == 0)
            return lb_fail(err, LB_E_NET, "the peer closed the control channel");
        c->r_len += (size_t)n;
    }
    return 0;
}

static int append(struct lb_chan *c, const uint8_t *data, size_t len, struct lb_error *err)
{
    if (len > LB_CONTROL_MAX_BYTES - c->msg_len)
        return lb_fail(err, LB_E_PROTO, "a control message is larger than %u bytes",
                       LB_CONTROL_MAX_BYTES);
    size_t want = c->msg_len + len + 1; /* never malloc(0) */
    if (want > c->msg_cap) {
        size_t cap = LB_MIN(LB_MAX(want, c->msg_cap * 2), (size_t)LB_CONTROL_MAX_BYTES + 1);
        uint8_t *grown = lb_try_alloc(cap, err);
        if (!grown)
            return -1;
        if (c->msg_len > 0)
            memcpy(grown, c->msg, c->msg_len);
        wipe_free(c->msg, c->msg_cap);
        c->msg = grown;
        c->msg_cap = cap;
    }
    if (len > 0)
        memcpy(c->msg + c->msg_len, data, len);
    c->msg_len += len;
    return 0;
}

/* One whole frame is in rbuf: open it, add it to the message. */
static int take_frame(struct lb_chan *c, size_t len, bool *final, struct lb_error *err)
{
    uint8_t *p = c->rbuf + FRAME_HEAD;

    if (lb_noise_open(&c->rx, NULL, 0, p, len, p, err) < 0)
        return lb_context(err, "control channel");
    size_t data_len = len - LB_NOISE_TAG_BYTES - 1;
    if (p[0] & ~FLAG_FINAL)
        return lb_fail(err, LB_E_PROTO, "unknown flags in a control frame");
    *final = p[0] & FLAG_FINAL;
    if (!*final && data_len == 0)
        return lb_fail(err, LB_E_PROTO, "an empty control frame");
    if (append(c, p + 1, data_len, err) < 0)
        return -1;
    c->r_len -= FRAME_HEAD + len;
    memmove(c->rbuf, p + len, c->r_len);
    return 0;
}

int lb_chan_recv(struct lb_chan *c, void **msg, size_t *len, uint64_t deadline_ns,
                 struct lb_error *err)
{
    bool final = false;

    if (c->rx_broken)
        return lb_fail(err, LB_E_NET, "the control channel has failed before");
    while (!final) {
        if (need(c, FRAME_HEAD, deadline_ns, err) < 0)
            return -1;
        size_t sealed = lb_get16(c->rbuf);
        if (sealed < LB_NOISE_TAG_BYTES + 1) {
            c->rx_broken = true;
            return lb_fail(err, LB_E_PROTO, "a control frame of %zu bytes is not possible", sealed);
        }
        if (need(c, FRAME_HEAD + sealed, deadline_ns, err) < 0)
            return -1;
        if (take_frame(c, sealed, &final, err) < 0) {
            c->rx_broken = true;
            return -1;
        }
    }
    *msg = c->msg;
    *len = c->msg_len;
    c->msg = NULL;
    c->msg_len = c->msg_cap = 0;
    return 0;
}
