/* remus/lease.c - arithmetic of leases and promises; the idea is in lease.h.
 *
 * Everything follows from two numbers that never go back: until_ns (the primary's) and
 * heard_ns (the backup's). Late, doubled and reordered messages therefore change nothing. */
#include "remus/lease.h"

#include <string.h>

#define NS_PER_MS UINT64_C(1000000)

uint32_t lb_lease_default_ms(const char *witness)
{
    return strncmp(witness, "fence:", 6) ? LB_LEASE_MS : LB_LEASE_FENCE_MS;
}

void lb_lease_init(struct lb_lease *l, uint32_t lease_ms, uint64_t now_ns)
{
    if (!lease_ms)
        lease_ms = LB_LEASE_MS;
    if (lease_ms < LB_LEASE_MIN_MS)
        lease_ms = LB_LEASE_MIN_MS;
    l->lease_ns = lease_ms * NS_PER_MS;
    l->ask_ns = l->lease_ns / 10 * 8;
    l->margin_ns = l->lease_ns / 4;
    l->heard_ns = now_ns;
    l->until_ns = now_ns + l->lease_ns;
}

void lb_lease_answered(struct lb_lease *l, uint64_t sent_ns, uint64_t now_ns)
{
    /* Nobody answers what was not sent yet: such a time is not ours. */
    if (sent_ns > now_ns)
        return;
    if (now_ns > l->heard_ns)
        l->heard_ns = now_ns;
    if (sent_ns + l->lease_ns > l->until_ns)
        l->until_ns = sent_ns + l->lease_ns;
}

static uint64_t ask_at(const struct lb_lease *l)
{
    return l->until_ns - l->lease_ns + l->ask_ns;
}

enum lb_lease_state lb_lease_state(const struct lb_lease *l, uint64_t now_ns)
{
    if (now_ns >= l->until_ns)
        return LB_LEASE_LAPSED;
    return now_ns >= ask_at(l) ? LB_LEASE_ASK : LB_LEASE_OK;
}

uint64_t lb_lease_next_ns(const struct lb_lease *l, uint64_t now_ns)
{
    switch (lb_lease_state(l, now_ns)) {
    case LB_LEASE_OK: return ask_at(l);
    case LB_LEASE_ASK: return l->until_ns;
    case LB_LEASE_LAPSED: break;
    }
    return UINT64_MAX;
}

void lb_promise_heard(struct lb_lease *l, uint64_t now_ns)
{
    if (now_ns > l->heard_ns)
        l->heard_ns = now_ns;
}

uint64_t lb_promise_end_ns(const struct lb_lease *l)
{
    return l->heard_ns + l->lease_ns + l->margin_ns;
}

bool lb_promise_over(const struct lb_lease *l, uint64_t now_ns)
{
    return now_ns >= lb_promise_end_ns(l);
}
