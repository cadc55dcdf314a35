/* remus/witness.c - the spec chooses the implementation; what all have in common. */
#include "remus/witness_internal.h"

#include <assert.h>
#include <string.h>

struct lb_witness {
    const struct lb_witness_ops *ops;
    void *impl;
    char *rest, *self_key, *peer_name;
};

static const struct lb_witness_ops *const kinds[] = {
    &lb_witness_etcd,
    &lb_witness_fence,
    &lb_witness_manual,
};

static const struct lb_witness_ops *kind_of(const char *spec, const char **rest)
{
    size_t len = strcspn(spec, ":");

    for (unsigned i = 0; i < LB_ARRAY_LEN(kinds); i++)
        if (strlen(kinds[i]->kind) == len && !strncmp(kinds[i]->kind, spec, len)) {
            *rest = spec[len] ? spec + len + 1 : spec + len;
            return kinds[i];
        }
    return NULL;
}

int lb_witness_open(const char *spec, enum lb_side side, const char *self_key,
                    const char *peer_name, struct lb_witness **out, struct lb_error *err)
{
    const char *rest;
    const struct lb_witness_ops *ops = kind_of(spec, &rest);
    struct lb_witness *w;

    if (!ops) {
        lb_fail(err, LB_E_USAGE, "\"%.200s\" is no witness", spec);
        return lb_remedy(err, "use etcd:URL[,URL...], fence:COMMAND or manual");
    }
    w = lb_alloc(sizeof(*w));
    w->ops = ops;
    w->rest = lb_strdup(rest);
    w->self_key = lb_strdup(self_key);
    w->peer_name = lb_strdup(peer_name);
    struct lb_witness_setup setup = {w->rest, side, w->self_key, w->peer_name};
    if (ops->open(&setup, &w->impl, err)) {
        w->ops = NULL;
        lb_witness_close(w);
        return -1;
    }
    *out = w;
    return 0;
}

void lb_witness_close(struct lb_witness *w)
{
    if (!w)
        return;
    if (w->ops)
        w->ops->close(w->impl);
    free(w->rest);
    free(w->self_key);
    free(w->peer_name);
    free(w);
}

const char *lb_witness_kind(const struct lb_witness *w)
{
    return w->ops->kind;
}

bool lb_witness_automatic(const struct lb_witness *w)
{
    return w->ops->automatic;
}

bool lb_witness_remembers(const struct lb_witness *w)
{
    return w->ops->remembers;
}

void lb_witness_key(char out[160], const char *vm_name, const char *uuid, const char *id)
{
    /* QEMU says a uuid of zeros for a VM that was given none */
    if (uuid && strspn(uuid, "0-") != strlen(uuid))
        snprintf(out, 160, "lifeboat/vm/%.64s/%.64s", uuid, vm_name);
    else
        snprintf(out, 160, "lifeboat/vm/%.64s/%.64s", vm_name, id);
}

int lb_witness_arm(struct lb_witness *w, struct lb_remus_record *r, uint64_t deadline_ns,
                   struct lb_error *err)
{
    assert(r->id[0] && r->key[0]);
    return w->ops->arm(w->impl, r, deadline_ns, err);
}

enum lb_claim lb_witness_claim(struct lb_witness *w, const struct lb_remus_record *r,
                               uint64_t deadline_ns, struct lb_error *err)
{
    assert(r->id[0] && r->key[0] && r->nonce[0]);
    if (!r->revision) {
        lb_fail(err, LB_E_STATE, "the witness was never armed for this protection");
        return LB_CLAIM_UNREACHABLE;
    }
    return w->ops->claim(w->impl, r, deadline_ns, err);
}

int lb_witness_disarm(struct lb_witness *w, const struct lb_remus_record *r, uint64_t deadline_ns,
                      struct lb_error *err)
{
    assert(r->id[0] && r->key[0]);
    return w->ops->disarm(w->impl, r, deadline_ns, err);
}

int lb_witness_read(struct lb_witness *w, const char *key, struct lb_witness_state *out,
                    uint64_t deadline_ns, struct lb_error *err)
{
    return w->ops->read(w->impl, key, out, deadline_ns, err);
}

bool lb_witness_healthy(struct lb_witness *w, char why[160])
{
    return w->ops->healthy(w->impl, why);
}

/* ------------------------------------------------- for those without a memory */

int lb_witness_no_arm(void *impl, struct lb_remus_record *r, uint64_t deadline_ns,
                      struct lb_error *err)
{
    (void)impl, (void)deadline_ns, (void)err;
    r->revision = 1;
    return 0;
}

int lb_witness_no_disarm(void *impl, const struct lb_remus_record *r, uint64_t deadline_ns,
                         struct lb_error *err)
{
    (void)impl, (void)r, (void)deadline_ns, (void)err;
    return 0;
}

int lb_witness_no_read(void *impl, const char *key, struct lb_witness_state *out,
                       uint64_t deadline_ns, struct lb_error *err)
{
    (void)impl, (void)key, (void)deadline_ns, (void)err;
    memset(out, 0, sizeof(*out));
    return 0;
}

bool lb_witness_always_healthy(void *impl, char why[160])
{
    (void)impl;
    why[0] = '\0';
    return true;
}
