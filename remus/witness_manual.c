/* remus/witness_manual.c - nobody but a person can say that the other host is dead.
 *
 * The primary goes on when its backup is silent. The backup's caller has a person's word before it
 * claims (lb_witness_automatic is false), so a claim is always won: all safety is that person's. */
#include "remus/witness_internal.h"

static int manual_open(const struct lb_witness_setup *s, void **impl, struct lb_error *err)
{
    if (s->rest[0]) {
        lb_fail(err, LB_E_USAGE, "witness manual takes no argument, got \"%.100s\"", s->rest);
        return lb_remedy(err, "write it as: manual");
    }
    *impl = NULL;
    return 0;
}

static void manual_close(void *impl)
{
    (void)impl;
}

static enum lb_claim manual_claim(void *impl, const struct lb_remus_record *r, uint64_t deadline_ns,
                                  struct lb_error *err)
{
    (void)impl, (void)r, (void)deadline_ns, (void)err;
    return LB_CLAIM_WON;
}

const struct lb_witness_ops lb_witness_manual = {
    .kind = "manual",
    .automatic = false,
    .open = manual_open,
    .close = manual_close,
    .arm = lb_witness_no_arm,
    .claim = manual_claim,
    .disarm = lb_witness_no_disarm,
    .read = lb_witness_no_read,
    .healthy = lb_witness_always_healthy,
};
