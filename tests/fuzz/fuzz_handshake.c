/* What a stranger can send: a preamble, then a handshake or the greeting of a bulk connection. Nothing
 * but a failure may come of it, and to a bulk connection not one octet of an answer. */
#include "netproto/netproto_internal.h"

#include <assert.h>
#include <sodium.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static bool nobody(const uint8_t pub[LB_KEY_BYTES], void *arg)
{
    (void)pub;
    (void)arg;
    return false;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct lb_identity me;
    struct lb_preamble p;
    struct lb_error err = LB_ERROR_INIT;
    struct lb_transport *a, *b;

    if (size < LB_PREAMBLE_BYTES)
        return 0;
    if (lb_preamble_parse(data, &p, &err) < 0) {
        assert(err.code == LB_E_PROTO && err.message[0]);
        return 0;
    }
    uint8_t again[LB_PREAMBLE_BYTES];
    lb_preamble_write(again, &p);
    assert(memcmp(again, data, sizeof(again)) == 0);

    if (lb_crypto_init(NULL) < 0 || lb_memory_pair(&a, &b, NULL) < 0)
        return 0;
    struct iovec iov = {(void *)(uintptr_t)(data + LB_PREAMBLE_BYTES), size - LB_PREAMBLE_BYTES};
    assert(a->ops->writev(a, &iov, 1, 0, NULL) == 0);
    /* what is there is all there is: abort would also refuse the answer, so a deadline ends it */
    if (p.kind == 'C') {
        struct lb_chan *c;
        memset(me.priv, 3, sizeof(me.priv));
        crypto_scalarmult_base(me.pub, me.priv);
        assert(lb_chan_accept(b, &me, nobody, NULL, 1, &c, &err) < 0);
    } else {
        struct lb_bulk_keys k = {.cipher = LB_CIPHER_AES256GCM};
        struct lb_bulk *c;
        uint32_t index;
        uint8_t octet;
        memcpy(k.session_id, p.session_id, sizeof(k.session_id));
        memset(k.secret, 5, sizeof(k.secret));
        assert(lb_bulk_accept(b, &k, 1, &index, &c, &err) < 0);
        assert(a->ops->read_some(a, &octet, 1, 0, NULL) == 0);
    }
    assert(err.code == LB_E_PROTO || err.code == LB_E_AUTH || err.code == LB_E_NET);
    a->ops->close(a);
    return 0;
}
