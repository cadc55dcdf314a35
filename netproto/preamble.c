/* netproto/preamble.c - the 24 bytes in clear that say what a connection is. */
#include "netproto/netproto_internal.h"

#include <assert.h>
#include <string.h>

static const uint8_t MAGIC[4] = {'L', 'B', 'v', '1'};

void lb_preamble_write(uint8_t out[LB_PREAMBLE_BYTES], const struct lb_preamble *p)
{
    assert(p->kind == 'C' || p->kind == 'D');
    memset(out, 0, LB_PREAMBLE_BYTES);
    memcpy(out, MAGIC, sizeof(MAGIC));
    out[4] = (uint8_t)p->kind;
    if (p->kind == 'D')
        memcpy(out + 8, p->session_id, LB_SESSION_ID_BYTES);
}

static bool all_zero(const uint8_t *p, size_t n)
{
    uint8_t any = 0;
    while (n--)
        any |= *p++;
    return any == 0;
}

int lb_preamble_parse(const uint8_t in[LB_PREAMBLE_BYTES], struct lb_preamble *p,
                      struct lb_error *err)
{
    if (memcmp(in, MAGIC, 3) != 0) {
        lb_fail(err, LB_E_PROTO, "the peer does not speak Lifeboat's protocol");
        return lb_remedy(err, "check the address and the port: something else connected");
    }
    if (in[3] != MAGIC[3]) {
        lb_fail(err, LB_E_PROTO, "the peer speaks another version of Lifeboat's protocol");
        return lb_remedy(err, "install the same version of lifeboat on both hosts");
    }
    if (in[4] != 'C' && in[4] != 'D')
        return lb_fail(err, LB_E_PROTO, "unknown kind of connection 0x%02x", in[4]);
    if (!all_zero(in + 5, 3))
        return lb_fail(err, LB_E_PROTO, "reserved bytes of the preamble are not zero");
    if (in[4] == 'C' && !all_zero(in + 8, LB_SESSION_ID_BYTES))
        return lb_fail(err, LB_E_PROTO, "a control connection has no session id");
    if (in[4] == 'D' && all_zero(in + 8, LB_SESSION_ID_BYTES))
        return lb_fail(err, LB_E_PROTO, "a bulk connection needs a session id");
    p->kind = (char)in[4];
    memcpy(p->session_id, in + 8, LB_SESSION_ID_BYTES);
    return 0;
}
