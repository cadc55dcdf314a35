/* A checkpoint connection as a primary with good keys could write it, into a collector and a standby.
 *
 * Input: records in clear, one after the other (header, runs, payload; no tags). The connection's plaintext mode
 * lets them be sealed here. Whatever comes, only whole epochs reach the standby: until the first EPOCH_END its
 * memory is as it was, and what is staged is within the limit. */
#include "netproto/netproto_internal.h"
#include "remus/stage.h"

#include <assert.h>
#include <pthread.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define RAM_PAGES 300u
#define LIMIT_BYTES (UINT64_C(2) << 20)

static uint8_t g_ram[RAM_PAGES * LB_PAGE_SIZE];

struct opening {
    struct lb_transport *t;
    struct lb_bulk_keys keys;
    struct lb_bulk *b;
};

static void *respond(void *arg)
{
    struct opening *o = arg;
    if (lb_bulk_open(o->t, false, &o->keys, 1, 5000, &o->b, NULL) < 0)
        abort();
    return NULL;
}

static void seal(struct lb_aead *tx, struct lb_transport *t, const uint8_t *piece, size_t len)
{
    uint8_t *out = malloc(len + LB_TAG_BYTES);
    struct iovec iov = {out, len + LB_TAG_BYTES};
    if (!out || lb_aead_begin(tx, NULL) < 0 || lb_aead_update(tx, piece, len, out, NULL) < 0 ||
        lb_aead_finish(tx, out + len, NULL) < 0 || t->ops->writev(t, &iov, 1, 0, NULL) < 0)
        abort();
    free(out);
}

/* As many octets as are there: the rest of a piece that is cut off never comes. */
static size_t send_piece(struct lb_aead *tx, struct lb_transport *t, const uint8_t *data,
                         size_t size, size_t len)
{
    if (len > size || len == 0)
        return len ? size : 0;
    seal(tx, t, data, len);
    return len;
}

static void send_records(struct lb_aead *tx, struct lb_transport *t, const uint8_t *data,
                         size_t size)
{
    while (size >= LB_REC_HEADER_BYTES) {
        size_t runs = lb_get32(data + 16), payload = lb_get32(data + 24), n;
        if (runs > LB_REC_MAX_RUNS || payload > LB_REC_MAX_PAYLOAD) /* ends there */
            runs = payload = 0;
        const size_t pieces[] = {LB_REC_HEADER_BYTES, runs * LB_REC_RUN_BYTES, payload};
        for (unsigned i = 0; i < 3; i++) {
            n = send_piece(tx, t, data, size, pieces[i]);
            data += n;
            size -= n;
        }
    }
}

static struct lb_bulk *connect_both(struct lb_transport **raw, struct lb_bulk **unused)
{
    struct opening i = {.keys.cipher = LB_CIPHER_NONE}, r = {.keys.cipher = LB_CIPHER_NONE};
    pthread_t th;
    if (lb_memory_pair(&i.t, &r.t, NULL) < 0 || pthread_create(&th, NULL, respond, &r) != 0 ||
        lb_bulk_open(i.t, true, &i.keys, 1, 5000, &i.b, NULL) < 0)
        abort();
    pthread_join(th, NULL);
    *raw = i.t;
    *unused = i.b;
    return r.b;
}

static void collect(struct lb_collector *c, struct lb_bulk *rx)
{
    struct lb_error err = LB_ERROR_INIT;
    uint64_t epoch;
    int rc;

    while ((rc = lb_collector_recv(c, rx, lb_now_ns(), &epoch, &err)) == 1) {
        assert(lb_collector_bytes(c) <= LIMIT_BYTES);
        if (lb_collector_apply(c, &err) < 0)
            abort(); /* plain memory, no disks: cannot fail */
        assert(lb_collector_bytes(c) == 0);
    }
    assert(rc == 0 || (err.code != LB_OK && err.message[0]));
    assert(lb_collector_bytes(c) <= LIMIT_BYTES);
    lb_collector_discard(c);
    assert(lb_collector_bytes(c) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct lb_ram_block blk = {.size_bytes = sizeof(g_ram), .map = g_ram};
    const struct lb_ram_block *map[] = {&blk, NULL};
    const void *state, *frames;
    size_t len, frames_len;
    struct lb_transport *raw;
    struct lb_bulk *unused, *rx = connect_both(&raw, &unused);
    struct lb_collector *c;
    struct lb_aead tx;
    uint8_t key[32] = {0};

    memset(g_ram, 0x11, sizeof(g_ram));
    if (lb_aead_init(&tx, LB_CIPHER_NONE, key, true, NULL) < 0 ||
        lb_collector_new(NULL, map, 2, NULL, 0, &c, NULL) < 0)
        abort();
    lb_collector_set_limit(c, LIMIT_BYTES);
    send_records(&tx, raw, data, size);
    collect(c, rx);
    lb_collector_state(c, &state, &len, &frames, &frames_len);
    for (size_t i = 0; len == 0 && i < sizeof(g_ram); i++)
        assert(g_ram[i] == 0x11);
    lb_collector_free(c);
    lb_aead_wipe(&tx);
    lb_bulk_close(unused);
    lb_bulk_close(rx);
    return 0;
}
