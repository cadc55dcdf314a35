/*
 * remus/witness_internal.h - what an implementation of a witness gives to witness.c.
 */
#ifndef LB_WITNESS_INTERNAL_H
#define LB_WITNESS_INTERNAL_H

#include "remus/witness.h"

/* All slots mandatory; contracts as in witness.h. The texts live as long as the witness. */
struct lb_witness_setup {
    const char *rest;        /* the spec after the colon */
    enum lb_side side;
    const char *self_key;
    const char *peer_name;
};
struct lb_witness_ops {
    const char *kind;
    bool automatic, remembers;
    int (*open)(const struct lb_witness_setup *s, void **impl, struct lb_error *err);
    void (*close)(void *impl);
    int (*arm)(void *impl, struct lb_remus_record *r, uint64_t deadline_ns, struct lb_error *err);
    enum lb_claim (*claim)(void *impl, const struct lb_remus_record *r, uint64_t deadline_ns,
                           struct lb_error *err);
    int (*disarm)(void *impl, const struct lb_remus_record *r, uint64_t deadline_ns,
                  struct lb_error *err);
    int (*read)(void *impl, const char *key, struct lb_witness_state *out, uint64_t deadline_ns,
                struct lb_error *err);
    bool (*healthy)(void *impl, char why[160]);
};
extern const struct lb_witness_ops lb_witness_etcd, lb_witness_fence, lb_witness_manual;

/* For witnesses without a memory: armed with a revision of no meaning, nothing to end, nothing to read. */
int lb_witness_no_arm(void *impl, struct lb_remus_record *r, uint64_t deadline_ns,
                      struct lb_error *err);
int lb_witness_no_disarm(void *impl, const struct lb_remus_record *r, uint64_t deadline_ns,
                         struct lb_error *err);
int lb_witness_no_read(void *impl, const char *key, struct lb_witness_state *out,
                       uint64_t deadline_ns, struct lb_error *err);
bool lb_witness_always_healthy(void *impl, char why[160]);

#endif
