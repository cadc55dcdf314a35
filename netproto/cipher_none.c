/* netproto/cipher_none.c - no secrecy, a checksum only: for benchmarks (--insecure-plaintext).
 *
 * tag = XXH64(bytes, seed = counter) and the counter, both little-endian. The
 * hash is taken of the copy in our buffer, since guest memory changes meanwhile. */
#include "netproto/netproto_internal.h"

#include <string.h>
#include <xxhash.h>

enum { CHUNK = 16384 };

struct none {
    XXH64_state_t *hash;
    uint64_t counter;
    bool seal;
};

static int none_init(void **state, const uint8_t key[32], bool seal, struct lb_error *err)
{
    (void)key;
    XXH64_state_t *hash = XXH64_createState();
    if (!hash)
        return lb_fail(err, LB_E_NO_SPACE, "no memory for a checksum");
    struct none *c = lb_alloc(sizeof(*c));
    c->hash = hash;
    c->seal = seal;
    *state = c;
    return 0;
}

static void none_wipe(void *state)
{
    struct none *c = state;
    XXH64_freeState(c->hash);
    free(c);
}

static int none_begin(void *state, uint64_t counter)
{
    struct none *c = state;
    c->counter = counter;
    return XXH64_reset(c->hash, counter) == XXH_OK ? 0 : -1;
}

static int none_update(void *state, const void *in, size_t len, void *out)
{
    struct none *c = state;
    const uint8_t *src = in;
    uint8_t *dst = out;
    while (len > 0) {
        size_t n = LB_MIN(len, (size_t)CHUNK);
        if (dst != src)
            memcpy(dst, src, n);
        if (XXH64_update(c->hash, dst, n) != XXH_OK)
            return -1;
        src += n;
        dst += n;
        len -= n;
    }
    return 0;
}

static int none_finish(void *state, uint8_t tag[LB_TAG_BYTES])
{
    struct none *c = state;
    uint8_t mine[LB_TAG_BYTES];
    lb_put64(mine, XXH64_digest(c->hash));
    lb_put64(mine + 8, c->counter);
    if (c->seal) {
        memcpy(tag, mine, sizeof(mine));
        return 0;
    }
    return memcmp(tag, mine, sizeof(mine)) == 0 ? 0 : -1;
}

const struct lb_aead_ops lb_aead_none = {
    .name = "none",
    .id = LB_CIPHER_NONE,
    .init = none_init,
    .wipe = none_wipe,
    .begin = none_begin,
    .update = none_update,
    .finish = none_finish,
};
