/* netproto/rdma_flow.c - what of RDMA can be reckoned without a device: credits, the window of chunks,
 * addresses. */
#include "netproto/rdma_flow.h"

#include "netproto/netproto_internal.h"
#include "netproto/rdma.h"

#include <arpa/inet.h>
#include <assert.h>
#include <string.h>

/* ------------------------------------------------------------------ credits */

void lb_rdma_flow_init(struct lb_rdma_flow *f, unsigned own, unsigned peers)
{
    *f = (struct lb_rdma_flow){.own = own, .peers = peers, .credits = peers};
}

uint32_t lb_rdma_flow_tell(struct lb_rdma_flow *f)
{
    uint32_t immediate = f->owed;

    f->owed = 0;
    return immediate;
}

uint32_t lb_rdma_flow_send(struct lb_rdma_flow *f)
{
    assert(f->credits > 0);
    f->credits--;
    return lb_rdma_flow_tell(f);
}

bool lb_rdma_flow_due(const struct lb_rdma_flow *f)
{
    return f->owed > 0 && f->owed * 2 >= f->own;
}

int lb_rdma_flow_got(struct lb_rdma_flow *f, uint32_t immediate, struct lb_error *err)
{
    if (immediate > f->peers - f->credits)
        return lb_fail(err, LB_E_PROTO, "the peer gives back %u buffers, %u are in use", immediate,
                       f->peers - f->credits);
    f->credits += immediate;
    return 0;
}

void lb_rdma_flow_freed(struct lb_rdma_flow *f)
{
    assert(f->owed < f->own);
    f->owed++;
}

#define MAX_BUFFERS 4096u
#define MIN_BUFFER_BYTES 4096u
#define MAX_BUFFER_BYTES (8u << 20)

void lb_rdma_hello_write(uint8_t out[LB_RDMA_HELLO_BYTES], const struct lb_rdma_hello *h)
{
    lb_put32(out, h->buffers);
    lb_put32(out + 4, h->buffer_bytes);
}

int lb_rdma_hello_parse(const uint8_t *in, size_t len, struct lb_rdma_hello *h,
                        struct lb_error *err)
{
    if (len < LB_RDMA_HELLO_BYTES)
        return lb_fail(err, LB_E_PROTO, "the peer's RDMA greeting is too short");
    *h = (struct lb_rdma_hello){lb_get32(in), lb_get32(in + 4)};
    if (h->buffers < 2 || h->buffers > MAX_BUFFERS || h->buffer_bytes < MIN_BUFFER_BYTES ||
        h->buffer_bytes > MAX_BUFFER_BYTES)
        return lb_fail(err, LB_E_PROTO, "the peer has %u RDMA buffers of %u bytes", h->buffers,
                       h->buffer_bytes);
    return 0;
}

/* ------------------------------------------------------------------- window */

void lb_rdma_window_init(struct lb_rdma_window *w, unsigned n_connections)
{
    unsigned share = (unsigned)LB_RDMA_MAX_SLOTS / LB_MAX(n_connections, 1u);

    *w = (struct lb_rdma_window){.n_slots = LB_MAX(share, 2u)};
}

int lb_rdma_window_find(struct lb_rdma_window *w, uint32_t block, uint64_t chunk)
{
    for (unsigned i = 0; i < w->n_slots; i++)
        if (w->slot[i].full && w->slot[i].block == block && w->slot[i].chunk == chunk) {
            w->slot[i].used = ++w->clock;
            return (int)i;
        }
    return -1;
}

unsigned lb_rdma_window_victim(const struct lb_rdma_window *w)
{
    unsigned oldest = 0;

    for (unsigned i = 0; i < w->n_slots; i++) {
        if (!w->slot[i].full)
            return i;
        if (w->slot[i].used < w->slot[oldest].used)
            oldest = i;
    }
    return oldest;
}

void lb_rdma_window_put(struct lb_rdma_window *w, unsigned slot, uint32_t block, uint64_t chunk)
{
    assert(slot < w->n_slots);
    w->slot[slot].full = true;
    w->slot[slot].block = block;
    w->slot[slot].chunk = chunk;
    w->slot[slot].used = ++w->clock;
}

/* ---------------------------------------------------------------- addresses */

/* 4 or 16 octets; 0 when the text is no address. */
static unsigned octets(const char *text, uint8_t out[16])
{
    if (inet_pton(AF_INET, text, out) == 1)
        return 4;
    return inet_pton(AF_INET6, text, out) == 1 ? 16 : 0;
}

bool lb_rdma_addr_valid(const struct lb_rdma_addr *a)
{
    uint8_t o[16];
    unsigned n = octets(a->ip, o);

    return n > 0 && a->prefix > 0 && a->prefix <= n * 8;
}

static bool same_bits(const uint8_t *a, const uint8_t *b, unsigned bits)
{
    unsigned whole = bits / 8, rest = bits % 8;

    if (memcmp(a, b, whole) != 0)
        return false;
    return rest == 0 || ((a[whole] ^ b[whole]) >> (8 - rest)) == 0;
}

bool lb_rdma_same_network(const struct lb_rdma_addr *a, const struct lb_rdma_addr *b)
{
    uint8_t oa[16], ob[16];

    if (!lb_rdma_addr_valid(a) || !lb_rdma_addr_valid(b) ||
        octets(a->ip, oa) != octets(b->ip, ob) || a->prefix != b->prefix)
        return false;
    return same_bits(oa, ob, a->prefix);
}
