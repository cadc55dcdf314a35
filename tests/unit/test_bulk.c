/* Bulk connections: every cipher and codec there and back, and everything that can go wrong. */
#include "netproto/netproto_internal.h"

#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <sys/socket.h>
#include <string.h>
/* after the headers above */
#include <cmocka.h>
#include <sodium.h>
#include <zstd.h>

#define PAGE LB_WIRE_PAGE_BYTES
#define N_PAGES 2048u

static const enum lb_cipher CIPHERS[] = {LB_CIPHER_NONE, LB_CIPHER_AES256GCM,
                                         LB_CIPHER_CHACHA20POLY1305};

static struct lb_bulk_keys keys_of(enum lb_cipher c)
{
    struct lb_bulk_keys k = {.cipher = c};
    memset(k.secret, 0x51, sizeof(k.secret));
    memset(k.session_id, 0x1d, sizeof(k.session_id));
    return k;
}

/* ------------------------------------------------- two ends, joined by threads */

struct opening {
    struct lb_transport *t;
    struct lb_bulk_keys keys;
    uint32_t index;
    bool learn;
    struct lb_bulk *b;
    struct lb_error err;
    int rc;
};

static void *responder(void *arg)
{
    struct opening *o = arg;
    o->rc = o->learn ? lb_bulk_accept(o->t, &o->keys, 5000, &o->index, &o->b, &o->err)
                     : lb_bulk_open(o->t, false, &o->keys, o->index, 5000, &o->b, &o->err);
    return NULL;
}

/* Both openings; returns when both are done. */
static void join(struct opening *i, struct opening *r)
{
    pthread_t th;
    assert_int_equal(pthread_create(&th, NULL, responder, r), 0);
    i->rc = lb_bulk_open(i->t, true, &i->keys, i->index, 5000, &i->b, &i->err);
    pthread_join(th, NULL);
}

struct ends {
    struct lb_bulk *tx, *rx;
};

static struct ends make_ends(enum lb_cipher c, const struct lb_fault_plan *plan)
{
    struct opening i = {.keys = keys_of(c)}, r = {.keys = keys_of(c)};
    uint64_t n_pages = N_PAGES;
    assert_int_equal(lb_memory_pair(&i.t, &r.t, NULL), 0);
    if (plan)
        i.t = lb_transport_fault(i.t, plan);
    join(&i, &r);
    assert_int_equal(i.rc, 0);
    assert_int_equal(r.rc, 0);
    assert_int_equal(lb_bulk_set_blocks(r.b, &n_pages, 1, NULL), 0);
    return (struct ends){i.b, r.b};
}

static void close_ends(struct ends *e)
{
    lb_bulk_close(e->tx);
    lb_bulk_close(e->rx);
}

/* What the initiator sends before its first record. */
#define GREETING (LB_BULK_HELLO_BYTES + LB_BULK_CONFIRM_BYTES)

/* ------------------------------------------------------------ a whole stream */

enum fill { RANDOM, TEXT };

static uint8_t *make_memory(enum fill fill)
{
    uint8_t *mem;
    assert_int_equal(posix_memalign((void **)&mem, PAGE, (size_t)N_PAGES * PAGE), 0);
    if (fill == RANDOM)
        randombytes_buf(mem, (size_t)N_PAGES * PAGE);
    else
        for (size_t i = 0; i < (size_t)N_PAGES * PAGE; i += 8)
            snprintf((char *)mem + i, 8, "p%06x", (unsigned)(i / 64 % 65521));
    return mem;
}

static struct iovec at(uint8_t *mem, struct lb_page_run r)
{
    return (struct iovec){mem + (size_t)r.first * PAGE, (size_t)r.count * PAGE};
}

static const struct lb_page_run SCATTER[] = {{0, 1}, {3, 2}, {9, 30}, {50, 1}, {52, 7}};
#define N_SCATTER ((unsigned)LB_ARRAY_LEN(SCATTER))

static int send_stream(struct lb_bulk *b, uint8_t *mem, int level, struct lb_error *err)
{
    struct iovec iov[N_SCATTER];
    for (unsigned i = 0; i < N_SCATTER; i++)
        iov[i] = at(mem, SCATTER[i]);
    struct lb_page_run full = {256, LB_REC_MAX_PAGES};
    struct iovec full_iov = at(mem, full);
    static const struct lb_page_run zero[] = {{100, 20}, {1000, 48}};
    static uint8_t state[100001];
    memset(state, 0xda, sizeof(state));
    if (lb_bulk_send_pages(b, 1, 0, SCATTER, iov, N_SCATTER, level, err) < 0 ||
        lb_bulk_send_pages(b, 1, 0, &full, &full_iov, 1, level, err) < 0 ||
        lb_bulk_send_zero(b, 1, 0, zero, 2, err) < 0 ||
        lb_bulk_send_mark(b, LB_REC_ROUND_END, 1, NULL, 0, err) < 0 ||
        lb_bulk_send_mark(b, LB_REC_STATE, 2, state, sizeof(state), err) < 0 ||
        lb_bulk_send_mark(b, LB_REC_END, 2, NULL, 0, err) < 0)
        return -1;
    return 0;
}

/* Everything up to END into mem; the failing call's error otherwise. */
static int recv_stream(struct lb_bulk *b, uint8_t *mem, size_t *state_bytes, struct lb_error *err)
{
    struct lb_record rec;
    for (;;) {
        struct iovec iov[LB_REC_MAX_PAGES];
        static uint8_t data[LB_REC_MAX_PAYLOAD];
        if (lb_bulk_recv(b, &rec, 0, err) < 0)
            return -1;
        for (uint32_t i = 0; rec.type == LB_REC_PAGES && i < rec.n_runs; i++)
            iov[i] = at(mem, rec.runs[i]);
        for (uint32_t i = 0; rec.type == LB_REC_ZERO && i < rec.n_runs; i++)
            memset(at(mem, rec.runs[i]).iov_base, 0, at(mem, rec.runs[i]).iov_len);
        if (rec.type == LB_REC_PAGES && lb_bulk_recv_pages(b, &rec, iov, err) < 0)
            return -1;
        if (rec.type == LB_REC_STATE) {
            if (lb_bulk_recv_data(b, &rec, data, err) < 0)
                return -1;
            for (uint32_t i = 0; i < rec.payload_bytes; i++)
                assert_int_equal(data[i], 0xda);
            *state_bytes += rec.payload_bytes;
        }
        if (rec.type == LB_REC_END)
            return 0;
    }
}

static bool in_stream(size_t page)
{
    for (unsigned i = 0; i < N_SCATTER; i++)
        if (page >= SCATTER[i].first && page < SCATTER[i].first + SCATTER[i].count)
            return true;
    return page >= 256 && page < 512;
}

static bool zeroed(size_t page)
{
    return (page >= 100 && page < 120) || (page >= 1000 && page < 1048);
}

static void check_memory(uint8_t *src, uint8_t *dst)
{
    for (size_t p = 0; p < N_PAGES; p++) {
        if (in_stream(p))
            assert_memory_equal(dst + p * PAGE, src + p * PAGE, PAGE);
        else if (zeroed(p))
            assert_true(lb_is_zero(dst + p * PAGE, PAGE));
        else
            assert_int_equal(dst[p * PAGE], 0xee);
    }
}

static void round_trips(void **state)
{
    (void)state;
    static const int levels[] = {0, 1, 3, -5};
    for (size_t c = 0; c < LB_ARRAY_LEN(CIPHERS); c++)
        for (int fill = RANDOM; fill <= TEXT; fill++)
            for (size_t l = 0; l < LB_ARRAY_LEN(levels); l++) {
                struct ends e = make_ends(CIPHERS[c], NULL);
                uint8_t *src = make_memory(fill), *dst = make_memory(RANDOM);
                struct lb_error err = LB_ERROR_INIT;
                struct lb_bulk_stats st;
                size_t state_bytes = 0;
                memset(dst, 0xee, (size_t)N_PAGES * PAGE);
                assert_int_equal(send_stream(e.tx, src, levels[l], &err), 0);
                assert_int_equal(recv_stream(e.rx, dst, &state_bytes, &err), 0);
                check_memory(src, dst);
                assert_int_equal(state_bytes, 100001);
                lb_bulk_get_stats(e.tx, &st);
                assert_int_equal(st.raw_pages + st.zstd_pages, 41 + 256);
                assert_int_equal(st.zero_pages, 68);
                assert_int_equal(st.zstd_pages, levels[l] && fill == TEXT ? 41 + 256 : 0);
                if (st.zstd_pages)
                    assert_true(st.wire_bytes < 1000000);
                else
                    assert_true(st.wire_bytes > 297 * PAGE && st.wire_bytes < 310 * PAGE + 100001);
                assert_int_equal(lb_bulk_recv(e.rx, &(struct lb_record){0}, 0, &err), -1);
                assert_int_equal(err.code, LB_E_STATE); /* nothing after END */
                close_ends(&e);
                free(src);
                free(dst);
            }
}

/* ------------------------------------------------------------ key agreement */

static void wrong_keys(void **state)
{
    (void)state;
    for (int what = 0; what < 5; what++) {
        struct opening i = {.keys = keys_of(LB_CIPHER_AES256GCM), .index = 3}, r = i;
        r.learn = what == 4;
        switch (what) {
        case 0:
            r.keys.secret[31] ^= 1;
            break;
        case 1:
            r.keys.session_id[0] ^= 1;
            break;
        case 2:
            r.keys.cipher = LB_CIPHER_NONE;
            break;
        case 3:
            r.index = 4;
            break;
        }
        assert_int_equal(lb_memory_pair(&i.t, &r.t, NULL), 0);
        join(&i, &r);
        if (what == 4) { /* all right: learns the index */
            assert_int_equal(i.rc | r.rc, 0);
            assert_int_equal(r.index, 3);
            lb_bulk_close(i.b);
            lb_bulk_close(r.b);
            continue;
        }
        assert_int_equal(i.rc, -1);
        assert_int_equal(r.rc, -1);
        assert_int_equal(r.err.code, what < 2 ? LB_E_AUTH : LB_E_PROTO);
        assert_int_equal(i.err.code, LB_E_NET); /* not one byte came back */
    }
}

/* A transport that records what is written through it. */
struct tap {
    struct lb_transport base;
    struct lb_transport *inner;
    uint8_t *buf;
    size_t len, cap;
};
static int tap_writev(struct lb_transport *t, const struct iovec *iov, unsigned n, uint64_t d,
                      struct lb_error *err)
{
    struct tap *p = (struct tap *)t;
    for (unsigned i = 0; i < n; i++) {
        assert_true(p->len + iov[i].iov_len <= p->cap);
        memcpy(p->buf + p->len, iov[i].iov_base, iov[i].iov_len);
        p->len += iov[i].iov_len;
    }
    return p->inner->ops->writev(p->inner, iov, n, d, err);
}
static ssize_t tap_read_some(struct lb_transport *t, void *b, size_t l, uint64_t d,
                             struct lb_error *err)
{
    struct tap *p = (struct tap *)t;
    return p->inner->ops->read_some(p->inner, b, l, d, err);
}
static void tap_abort(struct lb_transport *t)
{
    struct tap *p = (struct tap *)t;
    p->inner->ops->abort(p->inner);
}
static int tap_fd(struct lb_transport *t)
{
    struct tap *p = (struct tap *)t;
    return p->inner->ops->fd(p->inner);
}
static void tap_close(struct lb_transport *t)
{
    struct tap *p = (struct tap *)t;
    p->inner->ops->close(p->inner);
}
static const struct lb_transport_ops TAP_OPS = {"tap", tap_writev, tap_read_some, tap_abort,
                                                tap_fd, tap_close};

static void capture(struct tap *tap, struct opening *i, struct opening *r)
{
    *tap = (struct tap){.base.ops = &TAP_OPS, .cap = 8u << 20};
    tap->buf = malloc(tap->cap);
    assert_int_equal(lb_memory_pair(&tap->inner, &r->t, NULL), 0);
    i->t = &tap->base;
    join(i, r);
    assert_int_equal(i->rc | r->rc, 0);
}

static void replayed_connection(void **state)
{
    (void)state;
    struct opening i = {.keys = keys_of(LB_CIPHER_AES256GCM)}, r = i, again = i;
    struct tap tap;
    struct lb_transport *t;
    uint8_t *mem = make_memory(RANDOM);

    capture(&tap, &i, &r);
    assert_int_equal(send_stream(i.b, mem, 0, NULL), 0);
    lb_bulk_close(i.b);
    lb_bulk_close(r.b);
    assert_int_equal(lb_memory_pair(&t, &again.t, NULL), 0);
    struct iovec iov = {tap.buf, tap.len};
    assert_int_equal(t->ops->writev(t, &iov, 1, 0, NULL), 0);
    responder(&again);
    assert_int_equal(again.rc, -1);
    assert_int_equal(again.err.code, LB_E_AUTH);
    t->ops->close(t);
    free(tap.buf);
    free(mem);
}

/* ------------------------------------------------------- the independent reader */

static void write_file(const char *path, const void *data, size_t len)
{
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, len, f), len);
    assert_int_equal(fclose(f), 0);
}

static int run_reader(const char *dir, const char *kind, const uint8_t *i2r, size_t len, char *out,
                      size_t out_size)
{
    struct lb_bulk_keys k = keys_of(LB_CIPHER_NONE);
    char secret[65], session[33], cmd[1024], path[256];
    lb_hex(secret, k.secret, sizeof(k.secret));
    lb_hex(session, k.session_id, sizeof(k.session_id));
    snprintf(path, sizeof(path), "%s/i2r", dir);
    write_file(path, i2r, len);
    snprintf(cmd, sizeof(cmd),
             "/usr/bin/python3 tests/reader/stream_reader.py %s --secret %s --session %s %s/i2r %s/r2i 2>&1",
             kind, secret, session, dir, dir);
    FILE *p = popen(cmd, "r");
    assert_non_null(p);
    out[fread(out, 1, out_size - 1, p)] = 0;
    return pclose(p);
}

/* A capture of both directions goes to tests/reader/stream_reader.py (run from the top of the
 * tree): it must accept it and count what was sent, and refuse it damaged. */
static void independent_reader(void **state)
{
    (void)state;
    struct opening i = {.keys = keys_of(LB_CIPHER_NONE)}, r = i;
    struct tap to_r = {.base.ops = &TAP_OPS, .cap = 8u << 20}, to_i = to_r;
    uint8_t *text = make_memory(TEXT), *random = make_memory(RANDOM);
    struct lb_error err = LB_ERROR_INIT;
    static const struct lb_page_run short_runs[] = {{1, 1}, {3, 1}};
    struct iovec iov[] = {at(text, short_runs[0]), at(text, short_runs[1])};
    char dir[] = "/tmp/lb-reader-XXXXXX", path[256], out[4096];

    to_r.buf = malloc(to_r.cap);
    to_i.buf = malloc(to_i.cap);
    assert_int_equal(lb_memory_pair(&to_r.inner, &to_i.inner, NULL), 0);
    i.t = &to_r.base;
    r.t = &to_i.base;
    join(&i, &r);
    assert_int_equal(i.rc | r.rc, 0);
    assert_int_equal(lb_bulk_send_pages(i.b, 0, 7, short_runs, iov, 2, 1, &err), 0);
    assert_int_equal(send_stream(i.b, random, 0, &err), 0);
    assert_non_null(mkdtemp(dir));
    snprintf(path, sizeof(path), "%s/r2i", dir);
    write_file(path, to_i.buf, to_i.len);

    int rc = run_reader(dir, "", to_r.buf, to_r.len, out, sizeof(out));
    print_message("%s", out);
    assert_int_equal(rc, 0);
    assert_non_null(strstr(out, "PAGES: 3 records, 299 pages"));
    assert_non_null(strstr(out, "ZERO: 1 records, 68 pages, 0 payload"));
    assert_non_null(strstr(out, "STATE: 1 records, 0 pages, 100001 payload"));
    assert_non_null(strstr(out, "raw pages 297, zstd pages 2"));
    /* greeting, confirmation, header, run table, tag, last octet; cut off */
    static const size_t places[] = {20, 100, 112, 112 + 32, 112 + 48 + 3, 112 + 48 + 16 + 2};
    for (size_t n = 0; n <= LB_ARRAY_LEN(places); n++) {
        size_t place = n < LB_ARRAY_LEN(places) ? places[n] : to_r.len - 1;
        to_r.buf[place] ^= 4;
        assert_int_not_equal(run_reader(dir, "", to_r.buf, to_r.len, out, sizeof(out)), 0);
        assert_non_null(strstr(out, "not valid: "));
        to_r.buf[place] ^= 4;
    }
    assert_int_not_equal(run_reader(dir, "", to_r.buf, to_r.len - 48, out, sizeof(out)), 0);
    assert_non_null(strstr(out, "not valid: "));
    lb_bulk_close(i.b);
    lb_bulk_close(r.b);
    assert_int_equal(lb_remove_tree(dir, NULL), 0);
    free(to_r.buf);
    free(to_i.buf);
    free(text);
    free(random);
}

/* ------------------------------------------------------------------- zero copy */

/* Question, answer, pages that are there: as the independent reader sees it, too. */
static void direct_records(void **state)
{
    (void)state;
    struct opening i = {.keys = keys_of(LB_CIPHER_NONE)}, r = i;
    struct tap to_r = {.base.ops = &TAP_OPS, .cap = 1u << 20}, to_i = to_r;
    static const struct lb_page_run chunk = {0, 4096}, runs[] = {{1, 2}, {5, 1}};
    static const uint64_t pages[] = {4096};
    uint8_t ask[4] = {1}, grant[16] = {9, [12] = 1}, sums[24] = {1, 2, 3}, got[LB_REC_MAX_DIRECT_BYTES];
    char dir[] = "/tmp/lb-reader-XXXXXX", path[256], out[4096];
    struct lb_record rec;

    to_r.buf = malloc(to_r.cap);
    to_i.buf = malloc(to_i.cap);
    assert_int_equal(lb_memory_pair(&to_r.inner, &to_i.inner, NULL), 0);
    i.t = &to_r.base;
    r.t = &to_i.base;
    join(&i, &r);
    assert_int_equal(i.rc | r.rc, 0);
    assert_int_equal(lb_bulk_set_blocks(i.b, pages, 1, NULL) | lb_bulk_set_blocks(r.b, pages, 1, NULL), 0);
    lb_bulk_set_direct(i.b, LB_DIRECT_SOURCE);
    lb_bulk_set_direct(r.b, LB_DIRECT_DEST);
    assert_int_equal(lb_bulk_send_direct(i.b, LB_REC_ASK, 0, 0, &chunk, 1, ask, sizeof(ask), NULL), 0);
    assert_int_equal(lb_bulk_recv(r.b, &rec, 0, NULL), 0);
    assert_int_equal(rec.type, LB_REC_ASK);
    assert_int_equal(rec.n_pages, 4096);
    assert_int_equal(lb_bulk_recv_direct(r.b, &rec, got, NULL), 0);
    assert_memory_equal(got, ask, sizeof(ask));
    assert_int_equal(lb_bulk_send_direct(r.b, LB_REC_GRANT, 0, 0, &chunk, 1, grant, sizeof(grant), NULL), 0);
    assert_int_equal(lb_bulk_recv(i.b, &rec, 0, NULL), 0);
    assert_int_equal(rec.type, LB_REC_GRANT);
    assert_int_equal(lb_bulk_recv_direct(i.b, &rec, got, NULL), 0);
    assert_memory_equal(got, grant, sizeof(grant));
    assert_int_equal(lb_bulk_send_direct(i.b, LB_REC_WRITTEN, 3, 0, runs, 2, sums, sizeof(sums), NULL), 0);
    assert_int_equal(lb_bulk_send_mark(i.b, LB_REC_END, 3, NULL, 0, NULL), 0);
    assert_int_equal(lb_bulk_recv(r.b, &rec, 0, NULL), 0);
    assert_int_equal(rec.type, LB_REC_WRITTEN);
    assert_int_equal(rec.n_pages, 3);
    assert_int_equal(lb_bulk_recv_direct(r.b, &rec, got, NULL), 0);
    assert_memory_equal(got, sums, sizeof(sums));

    assert_non_null(mkdtemp(dir));
    snprintf(path, sizeof(path), "%s/r2i", dir);
    write_file(path, to_i.buf, to_i.len);
    assert_int_equal(run_reader(dir, "--zero-copy", to_r.buf, to_r.len, out, sizeof(out)), 0);
    assert_non_null(strstr(out, "WRITTEN: 1 records, 3 pages, 24 payload"));
    assert_non_null(strstr(out, "ASK: 1 records"));
    assert_non_null(strstr(out, "GRANT: 1 records"));
    assert_int_not_equal(run_reader(dir, "", to_r.buf, to_r.len, out, sizeof(out)), 0);
    write_file(path, to_i.buf, LB_BULK_ANSWER_BYTES);
    assert_int_not_equal(run_reader(dir, "--zero-copy", to_r.buf, to_r.len, out, sizeof(out)), 0);
    assert_non_null(strstr(out, "without an answer"));
    lb_bulk_close(i.b);
    lb_bulk_close(r.b);
    assert_int_equal(lb_remove_tree(dir, NULL), 0);
    free(to_r.buf);
    free(to_i.buf);
}

/* What of them is refused: where they do not belong, and what does not fit together. */
static void direct_limits(void **state)
{
    (void)state;
    static const uint64_t pages[] = {10000};
    static const struct {
        enum lb_direct_side side;
        struct lb_rec_header h;
        int rc;
    } v[] = {
        {LB_DIRECT_DEST, {.type = LB_REC_WRITTEN, .n_runs = 1, .n_pages = 256, .payload_bytes = 2048}, 0},
        {LB_DIRECT_DEST, {.type = LB_REC_WRITTEN, .n_runs = 1, .n_pages = 257, .payload_bytes = 2056}, -1},
        {LB_DIRECT_DEST, {.type = LB_REC_WRITTEN, .n_runs = 1, .n_pages = 2, .payload_bytes = 8}, -1},
        {LB_DIRECT_DEST, {.type = LB_REC_WRITTEN, .n_runs = 0, .n_pages = 0, .payload_bytes = 0}, -1},
        {LB_DIRECT_DEST, {.type = LB_REC_WRITTEN, .codec = 1, .n_runs = 1, .n_pages = 1, .payload_bytes = 8}, -1},
        {LB_DIRECT_DEST, {.type = LB_REC_WRITTEN, .block_id = 1, .n_runs = 1, .n_pages = 1, .payload_bytes = 8}, -1},
        {LB_DIRECT_DEST, {.type = LB_REC_ASK, .n_runs = 1, .n_pages = 4096, .payload_bytes = 4}, 0},
        {LB_DIRECT_DEST, {.type = LB_REC_ASK, .n_runs = 1, .n_pages = 4097, .payload_bytes = 4}, -1},
        {LB_DIRECT_DEST, {.type = LB_REC_ASK, .n_runs = 2, .n_pages = 4096, .payload_bytes = 4}, -1},
        {LB_DIRECT_DEST, {.type = LB_REC_ASK, .n_runs = 1, .n_pages = 4096, .payload_bytes = 8}, -1},
        {LB_DIRECT_DEST, {.type = LB_REC_GRANT, .n_runs = 1, .n_pages = 1, .payload_bytes = 16}, -1},
        {LB_DIRECT_SOURCE, {.type = LB_REC_GRANT, .n_runs = 1, .n_pages = 1, .payload_bytes = 16}, 0},
        {LB_DIRECT_SOURCE, {.type = LB_REC_GRANT, .n_runs = 1, .n_pages = 1, .payload_bytes = 12}, -1},
        {LB_DIRECT_SOURCE, {.type = LB_REC_ASK, .n_runs = 1, .n_pages = 1, .payload_bytes = 4}, -1},
        {LB_DIRECT_SOURCE, {.type = LB_REC_ZERO, .n_runs = 1, .n_pages = 1}, -1},
        {LB_DIRECT_NONE, {.type = LB_REC_WRITTEN, .n_runs = 1, .n_pages = 1, .payload_bytes = 8}, -1},
        {LB_DIRECT_NONE, {.type = LB_REC_ASK, .n_runs = 1, .n_pages = 1, .payload_bytes = 4}, -1},
        {LB_DIRECT_NONE, {.type = LB_REC_GRANT, .n_runs = 1, .n_pages = 1, .payload_bytes = 16}, -1},
    };
    for (size_t i = 0; i < LB_ARRAY_LEN(v); i++) {
        struct lb_rec_limits l = {.n_pages_of_block = pages, .n_blocks = 1, .direct = v[i].side};
        uint8_t bytes[LB_REC_HEADER_BYTES];
        struct lb_rec_header h;

        lb_rec_write_header(bytes, &v[i].h);
        if (lb_rec_parse_header(bytes, &l, &h, NULL) != v[i].rc)
            fail_msg("case %zu: not %d", i, v[i].rc);
    }
}

/* Hello, answer and confirmation: damage of every bit, the end at every byte. */
static void damaged_greeting(void **state)
{
    (void)state;
    for (int64_t n = 0; n < (int64_t)GREETING * 8; n++) {
        struct opening i = {.keys = keys_of(LB_CIPHER_NONE)}, r = i;
        struct lb_fault_plan p = {.flip_bit_at = n, .truncate_at = -1, .stall_at = -1};
        assert_int_equal(lb_memory_pair(&i.t, &r.t, NULL), 0);
        i.t = lb_transport_fault(i.t, &p);
        join(&i, &r);
        assert_int_equal(r.rc, -1);
        assert_int_equal(r.err.code, LB_E_AUTH);
        if (i.rc == 0)
            lb_bulk_close(i.b);
    }
    for (int64_t n = 0; n < (int64_t)LB_BULK_ANSWER_BYTES * 8; n++) {
        struct opening i = {.keys = keys_of(LB_CIPHER_NONE)}, r = i;
        struct lb_fault_plan p = {.flip_bit_at = n, .truncate_at = -1, .stall_at = -1};
        assert_int_equal(lb_memory_pair(&i.t, &r.t, NULL), 0);
        r.t = lb_transport_fault(r.t, &p);
        join(&i, &r);
        assert_int_equal(i.rc, -1);
        assert_int_equal(i.err.code, LB_E_AUTH);
        assert_int_equal(r.rc, -1);
    }
    for (int64_t n = 0; n < (int64_t)GREETING; n++) {
        struct opening i = {.keys = keys_of(LB_CIPHER_NONE)}, r = i;
        struct lb_fault_plan p = {.flip_bit_at = -1, .truncate_at = n, .stall_at = -1};
        assert_int_equal(lb_memory_pair(&i.t, &r.t, NULL), 0);
        i.t = lb_transport_fault(i.t, &p);
        join(&i, &r);
        assert_int_equal(i.rc, -1);
        assert_int_equal(r.rc, -1);
        assert_int_equal(r.err.code, LB_E_NET);
    }
}

/* ------------------------------------------------------------ damaged records */

/* A short stream: 2 pages in 2 runs (one compressed), zero pages, a mark, END. */
static int send_short(struct lb_bulk *b, uint8_t *mem, struct lb_error *err)
{
    static const struct lb_page_run runs[] = {{1, 1}, {3, 1}}, zero = {8, 4};
    struct iovec iov[] = {at(mem, runs[0]), at(mem, runs[1])};
    if (lb_bulk_send_pages(b, 0, 0, runs, iov, 2, 0, err) < 0 ||
        lb_bulk_send_pages(b, 0, 0, runs, iov, 2, 1, err) < 0 ||
        lb_bulk_send_zero(b, 0, 0, &zero, 1, err) < 0 ||
        lb_bulk_send_mark(b, LB_REC_END, 0, NULL, 0, err) < 0)
        return -1;
    return 0;
}

static void damaged_records(void **state)
{
    (void)state;
    uint8_t *mem = make_memory(TEXT), *dst = make_memory(TEXT);
    for (size_t c = 0; c < LB_ARRAY_LEN(CIPHERS); c++) {
        struct ends e = make_ends(CIPHERS[c], NULL);
        struct lb_bulk_stats st;
        assert_int_equal(send_short(e.tx, mem, NULL), 0);
        lb_bulk_get_stats(e.tx, &st);
        close_ends(&e);
        int64_t len = (int64_t)st.wire_bytes;
        assert_true(len > 2 * PAGE + 300 && len < 4 * PAGE);
        /* every bit of all heads, tables and tags; inside page data every 61st */
        for (int64_t bit = (int64_t)GREETING * 8; bit < len * 8;) {
            struct lb_fault_plan p = {.flip_bit_at = bit, .truncate_at = -1, .stall_at = -1};
            struct lb_error err = LB_ERROR_INIT;
            size_t sb = 0;
            e = make_ends(CIPHERS[c], &p);
            assert_int_equal(send_short(e.tx, mem, NULL), 0);
            lb_bulk_close(e.tx);
            assert_int_equal(recv_stream(e.rx, dst, &sb, &err), -1);
            assert_int_equal(err.code, LB_E_AUTH);
            /* and for good */
            assert_int_equal(lb_bulk_recv(e.rx, &(struct lb_record){0}, 0, &err), -1);
            lb_bulk_close(e.rx);
            int64_t at_byte = bit / 8 - (int64_t)GREETING;
            bit += at_byte > 90 && at_byte < 2 * (int64_t)PAGE + 70 ? 509 : 3;
        }
        /* the end at every octet, with one cipher; the others share all of that code */
        int64_t step = CIPHERS[c] == LB_CIPHER_AES256GCM ? 1 : 97;
        for (int64_t n = (int64_t)GREETING; n < len; n += step) {
            struct lb_fault_plan p = {.flip_bit_at = -1, .truncate_at = n, .stall_at = -1};
            struct lb_error err = LB_ERROR_INIT;
            size_t sb = 0;
            e = make_ends(CIPHERS[c], &p);
            assert_int_equal(send_short(e.tx, mem, NULL), -1);
            assert_int_equal(recv_stream(e.rx, dst, &sb, &err), -1);
            assert_int_equal(err.code, LB_E_NET);
            close_ends(&e);
        }
    }
    free(mem);
    free(dst);
}

/* Records that are sealed well and say something impossible: written by a peer that
 * has the keys. LB_CIPHER_NONE lets this test be that peer. */
struct forger {
    struct lb_transport *t;
    struct lb_aead tx;
};

static void forge(struct forger *f, const void *piece, size_t len)
{
    uint8_t *out = malloc(len + LB_TAG_BYTES);
    struct iovec iov = {out, len + LB_TAG_BYTES};
    assert_int_equal(lb_aead_begin(&f->tx, NULL), 0);
    assert_int_equal(lb_aead_update(&f->tx, piece, len, out, NULL), 0);
    assert_int_equal(lb_aead_finish(&f->tx, out + len, NULL), 0);
    assert_int_equal(f->t->ops->writev(f->t, &iov, 1, 0, NULL), 0);
    free(out);
}

static struct lb_bulk *start_forger(struct forger *f, struct tap *tap, uint32_t index)
{
    struct opening i = {.keys = keys_of(LB_CIPHER_NONE), .index = index}, r = i;
    uint64_t n_pages[] = {N_PAGES, 1};
    uint8_t key[32] = {0};
    capture(tap, &i, &r);
    f->t = tap->inner; /* i.b stays open, unused, and is leaked on purpose of closing below */
    assert_int_equal(lb_aead_init(&f->tx, LB_CIPHER_NONE, key, true, NULL), 0);
    assert_int_equal(lb_bulk_set_blocks(r.b, n_pages, 2, NULL), 0);
    tap->base.blocked_ns = (uint64_t)(uintptr_t)i.b;
    return r.b;
}

static void stop_forger(struct forger *f, struct tap *tap, struct lb_bulk *rx)
{
    lb_aead_wipe(&f->tx);
    lb_bulk_close((struct lb_bulk *)(uintptr_t)tap->base.blocked_ns);
    lb_bulk_close(rx);
    free(tap->buf);
}

static void impossible_headers(void **state)
{
    (void)state;
    static const struct {
        const char *what;
        struct lb_rec_header h;
        uint8_t poke_at, poke;
        uint32_t index;
        bool fine;
    } cases[] = {
        {"fine: end", {.type = LB_REC_END}, 0, 0, 0, true},
        {"type 0", {.type = 0}, 0, 0, 0, false},
        {"unknown type", {.type = 77}, 0, 0, 0, false},
        {"unknown flag", {.type = LB_REC_END, .flags = 2}, 0, 0, 0, false},
        {"optional end", {.type = LB_REC_END, .flags = 1}, 0, 0, 0, false},
        {"unknown optional with bad flag", {.type = 77, .flags = 3}, 0, 0, 0, false},
        {"huge optional", {.type = 77, .flags = 1, .payload_bytes = LB_REC_MAX_PAYLOAD + 1}, 0, 0, 0, false},
        {"optional, many runs", {.type = 77, .flags = 1, .n_runs = LB_REC_MAX_RUNS + 1}, 0, 0, 0, false},
        {"reserved 5", {.type = LB_REC_END}, 5, 1, 0, false},
        {"reserved 7", {.type = LB_REC_END}, 7, 128, 0, false},
        {"reserved 28", {.type = LB_REC_END}, 28, 1, 0, false},
        {"reserved 31", {.type = LB_REC_END}, 31, 1, 0, false},
        {"end with payload", {.type = LB_REC_END, .payload_bytes = 1}, 0, 0, 0, false},
        {"end with codec", {.type = LB_REC_END, .codec = 1}, 0, 0, 0, false},
        {"end with pages", {.type = LB_REC_END, .n_pages = 1}, 0, 0, 0, false},
        {"end with runs", {.type = LB_REC_END, .n_runs = 1}, 0, 0, 0, false},
        {"end with block", {.type = LB_REC_END, .block_id = 1}, 0, 0, 0, false},
        {"round end with payload", {.type = LB_REC_ROUND_END, .payload_bytes = 8}, 0, 0, 0, false},
        {"state empty", {.type = LB_REC_STATE}, 0, 0, 0, false},
        {"state too large", {.type = LB_REC_STATE, .payload_bytes = LB_REC_MAX_PAYLOAD + 1}, 0, 0, 0, false},
        {"state compressed", {.type = LB_REC_STATE, .payload_bytes = 9, .codec = 1}, 0, 0, 0, false},
        {"state on connection 1", {.type = LB_REC_STATE, .payload_bytes = 9}, 0, 0, 1, false},
        {"pages none", {.type = LB_REC_PAGES}, 0, 0, 0, false},
        {"pages no runs", {.type = LB_REC_PAGES, .n_pages = 1, .payload_bytes = PAGE}, 0, 0, 0, false},
        {"pages fewer than runs", {.type = LB_REC_PAGES, .n_runs = 2, .n_pages = 1, .payload_bytes = PAGE}, 0, 0, 0, false},
        {"pages unknown block", {.type = LB_REC_PAGES, .block_id = 2, .n_runs = 1, .n_pages = 1, .payload_bytes = PAGE}, 0, 0, 0, false},
        {"pages more than block", {.type = LB_REC_PAGES, .block_id = 1, .n_runs = 1, .n_pages = 2, .payload_bytes = 2 * PAGE}, 0, 0, 0, false},
        {"pages too many", {.type = LB_REC_PAGES, .n_runs = 1, .n_pages = 257, .payload_bytes = LB_REC_MAX_PAYLOAD}, 0, 0, 0, false},
        {"pages overflow", {.type = LB_REC_PAGES, .n_runs = 1, .n_pages = 0x100001, .payload_bytes = PAGE}, 0, 0, 0, false},
        {"raw too short", {.type = LB_REC_PAGES, .n_runs = 1, .n_pages = 2, .payload_bytes = PAGE}, 0, 0, 0, false},
        {"raw too long", {.type = LB_REC_PAGES, .n_runs = 1, .n_pages = 1, .payload_bytes = PAGE + 1}, 0, 0, 0, false},
        {"raw none", {.type = LB_REC_PAGES, .n_runs = 1, .n_pages = 1}, 0, 0, 0, false},
        {"zstd none", {.type = LB_REC_PAGES, .codec = 1, .n_runs = 1, .n_pages = 1}, 0, 0, 0, false},
        {"zstd as large as raw", {.type = LB_REC_PAGES, .codec = 1, .n_runs = 1, .n_pages = 1, .payload_bytes = PAGE}, 0, 0, 0, false},
        {"codec 2", {.type = LB_REC_PAGES, .codec = 2, .n_runs = 1, .n_pages = 1, .payload_bytes = PAGE}, 0, 0, 0, false},
        {"zero with payload", {.type = LB_REC_ZERO, .n_runs = 1, .n_pages = 1, .payload_bytes = 1}, 0, 0, 0, false},
        {"zero more than block", {.type = LB_REC_ZERO, .n_runs = 1, .n_pages = N_PAGES + 1}, 0, 0, 0, false},
        {"zero unknown block", {.type = LB_REC_ZERO, .block_id = 9, .n_runs = 1, .n_pages = 1}, 0, 0, 0, false},
    };
    for (size_t i = 0; i < LB_ARRAY_LEN(cases); i++) {
        struct forger f;
        struct tap tap;
        struct lb_bulk *rx = start_forger(&f, &tap, cases[i].index);
        struct lb_error err = LB_ERROR_INIT;
        struct lb_record rec;
        uint8_t head[LB_REC_HEADER_BYTES];
        lb_rec_write_header(head, &cases[i].h);
        head[cases[i].poke_at] |= cases[i].poke;
        forge(&f, head, sizeof(head));
        int rc = lb_bulk_recv(rx, &rec, lb_now_ns() + 1000000000, &err);
        if (cases[i].fine ? rc != 0 : rc == 0 || err.code != LB_E_PROTO)
            fail_msg("%s: rc %d, %s", cases[i].what, rc, err.message);
        stop_forger(&f, &tap, rx);
    }
}

static void impossible_runs(void **state)
{
    (void)state;
    static const struct {
        const char *what;
        uint32_t n_pages, n_runs;
        uint32_t run[6];
        bool fine;
    } cases[] = {
        {"fine", 5, 2, {0, 3, 3, 2}, true},
        {"fine: last page", 1, 1, {N_PAGES - 1, 1}, true},
        {"empty run", 3, 2, {0, 3, 5, 0}, false},
        {"overlap", 4, 2, {0, 3, 2, 1}, false},
        {"not sorted", 2, 2, {7, 1, 2, 1}, false},
        {"twice", 2, 2, {7, 1, 7, 1}, false},
        {"behind the end", 2, 1, {N_PAGES - 1, 2}, false},
        {"far behind the end", 1, 1, {0xffffffff, 1}, false},
        {"wraps", 2, 1, {0xffffffff, 2}, false},
        {"sum too small", 5, 1, {0, 4}, false},
        {"sum too large", 5, 2, {0, 4, 8, 2}, false},
        {"sum wraps", 2, 2, {0, 1, 1, 0xffffffff}, false},
    };
    for (size_t i = 0; i < LB_ARRAY_LEN(cases); i++)
        for (int zero = 0; zero < 2; zero++) {
            struct forger f;
            struct tap tap;
            struct lb_bulk *rx = start_forger(&f, &tap, 0);
            struct lb_error err = LB_ERROR_INIT;
            struct lb_record rec;
            struct lb_rec_header h = {.type = zero ? LB_REC_ZERO : LB_REC_PAGES,
                                      .n_runs = cases[i].n_runs, .n_pages = cases[i].n_pages,
                                      .payload_bytes = zero ? 0 : cases[i].n_pages * PAGE};
            uint8_t head[LB_REC_HEADER_BYTES], table[24];
            lb_rec_write_header(head, &h);
            for (int k = 0; k < 6; k++)
                lb_put32(table + 4 * k, cases[i].run[k]);
            forge(&f, head, sizeof(head));
            forge(&f, table, h.n_runs * 8);
            int rc = lb_bulk_recv(rx, &rec, lb_now_ns() + 1000000000, &err);
            if (cases[i].fine ? rc != 0 : rc == 0 || err.code != LB_E_PROTO)
                fail_msg("%s: rc %d, %s", cases[i].what, rc, err.message);
            stop_forger(&f, &tap, rx);
        }
}

static void forge_pages(struct forger *f, uint16_t type, uint16_t flags, uint8_t codec,
                        uint32_t n_pages, const void *payload, uint32_t len)
{
    struct lb_rec_header h = {.type = type, .flags = flags, .codec = codec, .n_runs = 1,
                              .n_pages = n_pages, .payload_bytes = len};
    uint8_t head[LB_REC_HEADER_BYTES], table[8];
    lb_rec_write_header(head, &h);
    lb_put32(table, 4);
    lb_put32(table + 4, n_pages);
    forge(f, head, sizeof(head));
    forge(f, table, sizeof(table));
    forge(f, payload, len);
}

static void forged_payloads(void **state)
{
    (void)state;
    uint8_t *mem = make_memory(TEXT), *dst = make_memory(TEXT);
    struct lb_zstd *z = lb_zstd_new();
    const uint8_t *frame;
    uint8_t bad[PAGE] = {0};
    size_t n = lb_zstd_compress(z, mem, 4 * PAGE, 1, &frame);
    assert_true(n > 0 && n + 20 < sizeof(bad));
    for (int what = 0; what < 5; what++) {
        struct forger f;
        struct tap tap;
        struct lb_bulk *rx = start_forger(&f, &tap, 0);
        struct lb_error err = LB_ERROR_INIT;
        struct lb_record rec;
        size_t len = n;
        uint32_t pages = 4;
        memcpy(bad, frame, n);
        if (what == 1)
            pages = 3; /* the frame holds more than the record says */
        if (what == 2)
            pages = 5; /* less */
        if (what == 3)
            len += 1; /* something behind the frame */
        if (what == 4)
            memset(bad + 12, 0xff, n - 12); /* not zstd */
        forge_pages(&f, LB_REC_PAGES, 0, LB_CODEC_ZSTD, pages, bad, (uint32_t)len);
        struct iovec iov = {dst, pages * PAGE};
        assert_int_equal(lb_bulk_recv(rx, &rec, 0, &err), 0);
        int rc = lb_bulk_recv_pages(rx, &rec, &iov, &err);
        if (what == 0) {
            assert_int_equal(rc, 0);
            assert_memory_equal(dst, mem, 4 * PAGE);
        } else {
            assert_int_equal(rc, -1);
            assert_int_equal(err.code, LB_E_PROTO);
        }
        stop_forger(&f, &tap, rx);
    }
    lb_zstd_free(z);
    free(mem);
    free(dst);
}

/* Types 4 to 9 on both kinds of connection. */
static void headers_of_checkpoints(void **state)
{
    (void)state;
    static const struct {
        const char *what;
        struct lb_rec_header h;
        bool fine; /* on a checkpoint connection */
        bool both; /* on others too */
    } cases[] = {
        {"end", {.type = LB_REC_END}, true, true},
        {"zero", {.type = LB_REC_ZERO, .n_runs = 0, .n_pages = 0}, false, false},
        {"round end", {.type = LB_REC_ROUND_END, .round = 1}, false, true},
        {"state", {.type = LB_REC_STATE, .payload_bytes = 9}, true, false},
        {"state zstd", {.type = LB_REC_STATE, .codec = 1, .payload_bytes = 9}, true, false},
        {"state xor", {.type = LB_REC_STATE, .codec = 2, .payload_bytes = 9}, true, false},
        {"state codec", {.type = LB_REC_STATE, .codec = 3, .payload_bytes = 9}, false, false},
        {"state empty", {.type = LB_REC_STATE}, false, false},
        {"state of a block", {.type = LB_REC_STATE, .block_id = 1, .payload_bytes = 9}, false, false},
        {"state with pages", {.type = LB_REC_STATE, .n_pages = 1, .payload_bytes = 9}, false, false},
        {"disk", {.type = LB_REC_DISK, .block_id = 99, .payload_bytes = LB_REC_MAX_PAYLOAD}, true, false},
        {"disk zstd", {.type = LB_REC_DISK, .codec = 1, .payload_bytes = 9}, true, false},
        {"disk xor", {.type = LB_REC_DISK, .codec = 2, .payload_bytes = 9}, false, false},
        {"disk empty", {.type = LB_REC_DISK}, false, false},
        {"disk with runs", {.type = LB_REC_DISK, .n_runs = 1, .payload_bytes = 9}, false, false},
        {"disk optional", {.type = LB_REC_DISK, .flags = 1, .payload_bytes = 9}, false, false},
        {"disk too long", {.type = LB_REC_DISK, .payload_bytes = LB_REC_MAX_PAYLOAD + 1}, false, false},
        {"frames", {.type = LB_REC_FRAMES, .payload_bytes = 9}, true, false},
        {"frames xor", {.type = LB_REC_FRAMES, .codec = 2, .payload_bytes = 9}, false, false},
        {"frames of a block", {.type = LB_REC_FRAMES, .block_id = 1, .payload_bytes = 9}, false, false},
        {"epoch end", {.type = LB_REC_EPOCH_END, .payload_bytes = 8}, true, false},
        {"epoch end zstd", {.type = LB_REC_EPOCH_END, .codec = 1, .payload_bytes = 8}, false, false},
        {"epoch end short", {.type = LB_REC_EPOCH_END, .payload_bytes = 7}, false, false},
        {"epoch end long", {.type = LB_REC_EPOCH_END, .payload_bytes = 9}, false, false},
        {"delta no runs", {.type = LB_REC_DELTA, .codec = 1, .payload_bytes = 9}, false, false},
        {"delta raw", {.type = LB_REC_DELTA, .n_runs = 1, .n_pages = 1, .payload_bytes = 9}, false, false},
        {"delta no frame", {.type = LB_REC_DELTA, .codec = 1, .n_runs = 1, .n_pages = 1, .payload_bytes = 8}, false, false},
        {"delta too long", {.type = LB_REC_DELTA, .codec = 1, .n_runs = 1, .n_pages = 1, .payload_bytes = PAGE + 8}, false, false},
        {"delta unknown block", {.type = LB_REC_DELTA, .codec = 1, .block_id = 2, .n_runs = 1, .n_pages = 1, .payload_bytes = 9}, false, false},
        {"delta too many", {.type = LB_REC_DELTA, .codec = 1, .n_runs = 1, .n_pages = 257, .payload_bytes = 9}, false, false},
    };
    for (size_t i = 0; i < 2 * LB_ARRAY_LEN(cases); i++) {
        bool checkpoint = i % 2, fine = checkpoint ? cases[i / 2].fine : cases[i / 2].both;
        struct forger f;
        struct tap tap;
        struct lb_bulk *rx = start_forger(&f, &tap, 1);
        struct lb_error err = LB_ERROR_INIT;
        struct lb_record rec;
        uint8_t head[LB_REC_HEADER_BYTES];
        if (checkpoint)
            lb_bulk_set_checkpoint(rx);
        lb_rec_write_header(head, &cases[i / 2].h);
        forge(&f, head, sizeof(head));
        int rc = lb_bulk_recv(rx, &rec, lb_now_ns() + 1000000000, &err);
        if (fine ? rc != 0 : rc == 0 || err.code != LB_E_PROTO)
            fail_msg("%s, %d: rc %d, %s", cases[i / 2].what, (int)checkpoint, rc, err.message);
        stop_forger(&f, &tap, rx);
    }
}

/* Payloads of DELTA and of data: a frame must hold what the record and the limits say. */
static void payloads_of_checkpoints(void **state)
{
    (void)state;
    uint8_t *mem = make_memory(TEXT), *big = calloc(1, LB_REC_MAX_PAYLOAD + 1);
    static uint8_t out[8 * PAGE];
    struct lb_zstd *z = lb_zstd_new();
    const uint8_t *frame;
    uint8_t bad[4 * PAGE] = {0};
    size_t n = lb_zstd_compress(z, mem, 4 * PAGE, 1, &frame);

    assert_true(n > 0 && n + 20 < sizeof(bad));
    for (int what = 0; what < 5; what++) {
        struct forger f;
        struct tap tap;
        struct lb_bulk *rx = start_forger(&f, &tap, 3);
        struct lb_error err = LB_ERROR_INIT;
        struct lb_record rec;
        uint64_t sum = 0;
        lb_bulk_set_checkpoint(rx);
        lb_put64(bad, 77);
        memcpy(bad + 8, frame, n);
        if (what == 3)
            memset(bad + 8 + 12, 0xff, n - 12);
        forge_pages(&f, LB_REC_DELTA, 0, LB_CODEC_ZSTD, what == 1 ? 3 : what == 2 ? 5 : 4, bad,
                    (uint32_t)(8 + n + (what == 4)));
        assert_int_equal(lb_bulk_recv(rx, &rec, 0, &err), 0);
        int rc = lb_bulk_recv_delta(rx, &rec, out, &sum, &err);
        assert_int_equal(rc, what ? -1 : 0);
        assert_int_equal(what ? (int)err.code : (int)sum, what ? (int)LB_E_PROTO : 77);
        stop_forger(&f, &tap, rx);
    }
    for (int what = 0; what < 4; what++) { /* data; content too long; nothing; cut off */
        struct forger f;
        struct tap tap;
        struct lb_bulk *rx = start_forger(&f, &tap, 3);
        struct lb_error err = LB_ERROR_INIT;
        struct lb_record rec;
        const void *data;
        size_t len = 0, packed;
        uint8_t head[LB_REC_HEADER_BYTES], payload[1000];
        lb_bulk_set_checkpoint(rx);
        packed = ZSTD_compress(payload, sizeof(payload), big,
                               what == 1 ? LB_REC_MAX_PAYLOAD + 1 : what == 2 ? 0 : 5000, 1);
        assert_false(ZSTD_isError(packed));
        packed -= what == 3;
        lb_rec_write_header(head, &(struct lb_rec_header){.type = LB_REC_FRAMES, .codec = 1,
                                                          .payload_bytes = (uint32_t)packed});
        forge(&f, head, sizeof(head));
        forge(&f, payload, packed);
        assert_int_equal(lb_bulk_recv(rx, &rec, 0, &err), 0);
        assert_int_equal(lb_bulk_recv_blob(rx, &rec, &data, &len, &err), what ? -1 : 0);
        assert_int_equal(what ? (int)err.code : (int)len, what ? (int)LB_E_PROTO : 5000);
        stop_forger(&f, &tap, rx);
    }
    lb_zstd_free(z);
    free(mem);
    free(big);
}

static void optional_is_skipped(void **state)
{
    (void)state;
    struct forger f;
    struct tap tap;
    struct lb_bulk *rx = start_forger(&f, &tap, 0);
    struct lb_error err = LB_ERROR_INIT;
    struct lb_record rec;
    uint8_t junk[777], head[LB_REC_HEADER_BYTES];
    randombytes_buf(junk, sizeof(junk));
    forge_pages(&f, 200, LB_REC_FLAG_OPTIONAL, 99, 12345, junk, sizeof(junk));
    lb_rec_write_header(head, &(struct lb_rec_header){.type = LB_REC_ROUND_END, .round = 6});
    forge(&f, head, sizeof(head));
    assert_int_equal(lb_bulk_recv(rx, &rec, 0, &err), 0);
    assert_int_equal(rec.type, LB_REC_ROUND_END);
    assert_int_equal(rec.round, 6);
    stop_forger(&f, &tap, rx);
}

static void no_blocks_no_pages(void **state)
{
    (void)state;
    struct ends e = make_ends(LB_CIPHER_NONE, NULL);
    struct lb_error err = LB_ERROR_INIT;
    struct lb_page_run r = {0, 1};
    uint64_t huge = (uint64_t)UINT32_MAX + 1;
    assert_int_equal(lb_bulk_set_blocks(e.rx, NULL, 0, &err), 0);
    assert_int_equal(lb_bulk_send_zero(e.tx, 0, 0, &r, 1, &err), 0);
    assert_int_equal(lb_bulk_flush(e.tx, &err), 0);
    assert_int_equal(lb_bulk_recv(e.rx, &(struct lb_record){0}, 0, &err), -1);
    assert_int_equal(err.code, LB_E_PROTO);
    assert_int_equal(lb_bulk_set_blocks(e.rx, &huge, 1, &err), -1);
    close_ends(&e);
}

/* --------------------------------------------------------- deadlines, abort */

static void deadline_loses_nothing(void **state)
{
    (void)state;
    struct forger f;
    struct tap tap;
    struct lb_bulk *rx = start_forger(&f, &tap, 0);
    struct lb_error err = LB_ERROR_INIT;
    struct lb_record rec;
    uint8_t wire[LB_REC_HEADER_BYTES + 16 + LB_TAG_BYTES * 2], *p = wire;
    /* ZERO record by hand, sent octet by octet with a short deadline between */
    lb_rec_write_header(p, &(struct lb_rec_header){.type = LB_REC_ZERO, .n_runs = 2, .n_pages = 5});
    assert_int_equal(lb_aead_begin(&f.tx, NULL), 0);
    assert_int_equal(lb_aead_update(&f.tx, p, 32, p, NULL), 0);
    assert_int_equal(lb_aead_finish(&f.tx, p + 32, NULL), 0);
    p += 48;
    for (uint32_t i = 0; i < 2; i++) {
        lb_put32(p + 8 * i, i * 10);
        lb_put32(p + 8 * i + 4, 2 + i);
    }
    assert_int_equal(lb_aead_begin(&f.tx, NULL), 0);
    assert_int_equal(lb_aead_update(&f.tx, p, 16, p, NULL), 0);
    assert_int_equal(lb_aead_finish(&f.tx, p + 16, NULL), 0);
    for (size_t i = 0; i < sizeof(wire); i++) {
        assert_int_equal(lb_bulk_recv(rx, &rec, lb_now_ns() + 100000, &err), -1);
        assert_true(lb_is_timeout(&err));
        struct iovec iov = {wire + i, 1};
        assert_int_equal(f.t->ops->writev(f.t, &iov, 1, 0, NULL), 0);
    }
    assert_int_equal(lb_bulk_recv(rx, &rec, lb_now_ns() + 1000000000, &err), 0);
    assert_int_equal(rec.n_runs, 2);
    assert_int_equal(rec.runs[1].first, 10);
    assert_int_equal(rec.runs[1].count, 3);
    stop_forger(&f, &tap, rx);
}

static void *abort_soon(void *arg)
{
    lb_sleep_ms(50);
    lb_bulk_abort(arg);
    return NULL;
}

static void abort_ends_recv_and_send(void **state)
{
    (void)state;
    struct lb_fault_plan stall = {.flip_bit_at = -1, .truncate_at = -1, .stall_at = GREETING + 99};
    struct ends e = make_ends(LB_CIPHER_AES256GCM, &stall);
    struct lb_error err = LB_ERROR_INIT;
    uint8_t *mem = make_memory(RANDOM);
    pthread_t th;
    uint64_t start_ns = lb_now_ns();

    pthread_create(&th, NULL, abort_soon, e.rx);
    assert_int_equal(lb_bulk_recv(e.rx, &(struct lb_record){0}, 0, &err), -1);
    assert_int_equal(err.code, LB_E_CANCELLED);
    pthread_join(th, NULL);
    pthread_create(&th, NULL, abort_soon, e.tx);
    assert_int_equal(send_stream(e.tx, mem, 0, &err), -1);
    assert_true(err.code == LB_E_CANCELLED || err.code == LB_E_NET);
    pthread_join(th, NULL);
    assert_true(lb_now_ns() - start_ns < 3000000000);
    /* and stays so */
    assert_int_equal(lb_bulk_flush(e.tx, &err), -1);
    close_ends(&e);
    free(mem);
}

/* ---------------------------------------------------------------------- TCP */

struct server {
    int fd;
    struct opening o;
    struct lb_preamble p;
    struct lb_error err;
};

static void *serve(void *arg)
{
    struct server *s = arg;
    uint8_t bytes[LB_PREAMBLE_BYTES];
    int fd = accept4(s->fd, NULL, NULL, SOCK_CLOEXEC);
    if (lb_read_all(fd, bytes, sizeof(bytes), NULL) < 0)
        return NULL;
    s->o.rc = lb_preamble_parse(bytes, &s->p, &s->o.err);
    s->o.t = lb_tcp_from_fd(fd);
    s->o.learn = true;
    responder(&s->o);
    return NULL;
}

static int listen_any(uint16_t *port)
{
    struct sockaddr_storage sa;
    socklen_t len = sizeof(sa);
    int fd = lb_tcp_listen("127.0.0.1:0", 0, NULL);
    assert_true(fd >= 0);
    assert_int_equal(getsockname(fd, (struct sockaddr *)&sa, &len), 0);
    *port = (uint16_t)(((uint8_t *)&sa)[2] << 8 | ((uint8_t *)&sa)[3]);
    return fd;
}

struct sending {
    struct lb_bulk *b;
    uint8_t *mem;
    struct lb_error err;
    int rc;
};

static void *send_all(void *arg)
{
    struct sending *s = arg;
    s->rc = send_stream(s->b, s->mem, 0, &s->err);
    return NULL;
}

static void over_tcp(void **state)
{
    (void)state;
    for (size_t c = 0; c < LB_ARRAY_LEN(CIPHERS); c++) {
        struct server s = {.o.keys = keys_of(CIPHERS[c])};
        struct lb_error err = LB_ERROR_INIT;
        struct lb_bulk *tx;
        uint8_t *src = make_memory(RANDOM), *dst = make_memory(RANDOM);
        uint64_t n_pages = N_PAGES;
        uint16_t port;
        size_t sb = 0;
        pthread_t th;
        memset(dst, 0xee, (size_t)N_PAGES * PAGE);
        s.fd = listen_any(&port);
        pthread_create(&th, NULL, serve, &s);
        assert_int_equal(lb_bulk_connect("127.0.0.1", port, &s.o.keys, 0, 5000, -1, &tx, &err), 0);
        pthread_join(th, NULL);
        assert_int_equal(s.o.rc, 0);
        assert_int_equal(s.p.kind, 'D');
        assert_memory_equal(s.p.session_id, s.o.keys.session_id, LB_SESSION_ID_BYTES);
        assert_int_equal(lb_bulk_set_blocks(s.o.b, &n_pages, 1, &err), 0);
        struct sending send = {.b = tx, .mem = src};
        pthread_create(&th, NULL, send_all, &send);
        assert_int_equal(recv_stream(s.o.b, dst, &sb, &err), 0);
        pthread_join(th, NULL);
        assert_int_equal(send.rc, 0);
        check_memory(src, dst);
        lb_bulk_close(tx);
        lb_bulk_close(s.o.b);
        close(s.fd);
        free(src);
        free(dst);
    }
}

static void nobody_listens(void **state)
{
    (void)state;
    struct lb_bulk_keys k = keys_of(LB_CIPHER_NONE);
    struct lb_error err = LB_ERROR_INIT;
    struct lb_bulk *b;
    uint16_t port;
    int fd = listen_any(&port), pipes[2];
    close(fd);
    assert_int_equal(lb_bulk_connect("127.0.0.1", port, &k, 0, 2000, -1, &b, &err), -1);
    assert_int_equal(err.code, LB_E_NET);
    assert_int_equal(err.sys_errno, ECONNREFUSED);
    assert_non_null(strstr(err.remedy, "lifeboatd"));
    /* a server that accepts and says nothing: the deadline, and cancel */
    fd = listen_any(&port);
    uint64_t start_ns = lb_now_ns();
    assert_int_equal(lb_bulk_connect("127.0.0.1", port, &k, 0, 100, -1, &b, &err), -1);
    assert_true(lb_is_timeout(&err));
    assert_true(lb_now_ns() - start_ns < 2000000000);
    assert_int_equal(pipe(pipes), 0);
    assert_int_equal(write(pipes[1], "x", 1), 1);
    assert_int_equal(lb_bulk_connect("127.0.0.1", port, &k, 0, 5000, pipes[0], &b, &err), -1);
    assert_int_equal(err.code, LB_E_CANCELLED);
    /* the port is taken */
    char hostport[32];
    snprintf(hostport, sizeof(hostport), "127.0.0.1:%u", port);
    assert_int_equal(lb_tcp_listen(hostport, 1, &err), -1);
    assert_int_equal(err.code, LB_E_EXISTS);
    close(fd);
    close(pipes[0]);
    close(pipes[1]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(round_trips),
        cmocka_unit_test(wrong_keys),
        cmocka_unit_test(replayed_connection),
        cmocka_unit_test(independent_reader),
        cmocka_unit_test(direct_records),
        cmocka_unit_test(direct_limits),
        cmocka_unit_test(damaged_greeting),
        cmocka_unit_test(damaged_records),
        cmocka_unit_test(impossible_headers),
        cmocka_unit_test(impossible_runs),
        cmocka_unit_test(forged_payloads),
        cmocka_unit_test(headers_of_checkpoints),
        cmocka_unit_test(payloads_of_checkpoints),
        cmocka_unit_test(optional_is_skipped),
        cmocka_unit_test(no_blocks_no_pages),
        cmocka_unit_test(deadline_loses_nothing),
        cmocka_unit_test(abort_ends_recv_and_send),
        cmocka_unit_test(over_tcp),
        cmocka_unit_test(nobody_listens),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
