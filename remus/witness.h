/*
 * remus/witness.h - the third party that decides who may run when a side is silent.
 *
 *   etcd:URL[,URL...]  one key per protected VM. Armed by the primary with owner and a fencing revision;
 *                      a claim is one transaction: if the key is still at that revision, it is mine.
 *                      Nobody asks while both sides hear each other; both look at it every 2 s
 *                      to know that it would answer. JSON gateway (/v3/kv/...), libevent's HTTP client.
 *   fence:CMD          CMD cuts the other host off (power, switch): `CMD off HOST` exits with 0 when that
 *                      is certain. The primary fences without delay, the backup after its promise.
 *   manual             The backup never claims by itself; a person says so. The primary always wins.
 *
 * The text before the colon chooses the implementation (lb_witness_open). Calls block at most until
 * their deadline and may be made from any thread; the implementation runs its own loop. Several
 * URLs are asked at the same time and the first definite answer counts: claims are idempotent by nonce.
 *
 * What the key of etcd says (JSON), and who may do what with it:
 *
 *   state      owner        written by                     arm by another host
 *   armed      the primary  lb_witness_arm                 refused: it is protected there
 *   alone      the primary  its claim, revision as armed   allowed: that protection is over
 *   promoted   the backup   its claim, revision as armed   refused: it runs there
 *   ended      who ended it lb_witness_disarm              allowed
 *
 * The owner may always arm it again. A claim succeeds at the revision of its record alone, and every
 * write makes a new revision: after A -> B (promoted) and B -> C (armed, owner B) A can neither claim nor arm.
 * Keys are never deleted by us: a missing one, or one as it was before, means that the witness lost
 * its memory.
 *
 * fence and manual have no memory. A claim asks them to act (again) or rests on a person's word, so
 * recovery after a crash asks the other host first and claims only when it does not run the VM. A
 * backup runs what was yielded to it without a claim: after that the primary claims no more.
 */
#ifndef LB_WITNESS_H
#define LB_WITNESS_H

#include "core/core.h"
#include "remus/record.h"

enum lb_claim {
    LB_CLAIM_WON,         /* ours, and nobody else's from now on */
    LB_CLAIM_LOST,        /* the other side's: never run, never let output leave */
    LB_CLAIM_UNREACHABLE, /* not known; ask again with the same nonce */
};
enum lb_side { LB_SIDE_PRIMARY, LB_SIDE_BACKUP };

struct lb_witness_state {       /* what the key says */
    bool present;
    uint64_t revision;
    char id[LB_PROTECT_ID_HEX]; /* protection that wrote it */
    char owner[128];            /* host that may run it: key as text */
    char nonce[LB_PROTECT_ID_HEX];
    bool armed;                 /* as lb_witness_arm left it: nobody claimed yet */
};

struct lb_witness;
/* Parses the spec, resolves names (once: a failover must not wait for DNS), starts the loop; waits for
 * no answer. LB_E_USAGE with a remedy for a bad spec, LB_E_NET when no name can be resolved. */
int lb_witness_open(const char *spec, enum lb_side side, const char *self_key,
                    const char *peer_name, struct lb_witness **out, struct lb_error *err);
void lb_witness_close(struct lb_witness *w); /* NULL is fine */
/* "etcd", "fence", "manual" */
const char *lb_witness_kind(const struct lb_witness *w);
/* May the backup claim without a person? (manual: no) */
bool lb_witness_automatic(const struct lb_witness *w);
/* Does a claim tell whether the other side has won before? (fence, manual: no) */
bool lb_witness_remembers(const struct lb_witness *w);
/* The key of a VM: from its uuid and name (copies of a VM often keep its uuid: with one key for both, one
 * host could arm it twice, and the first would lose its claims), or from its name and the protection's
 * id when it has no uuid. */
void lb_witness_key(char out[160], const char *vm_name, const char *uuid, const char *id);

/* Primary: put the key (owner: self, nonce: r->id), whatever it said before, unless it says that another
 * host protects the VM or took it over: LB_E_STATE with the remedy. Fills r->revision. */
int lb_witness_arm(struct lb_witness *w, struct lb_remus_record *r, uint64_t deadline_ns,
                   struct lb_error *err);
/* Either side. r->nonce must be set (fresh, and saved) before. For UNREACHABLE and LOST *err says why.
 * A record that was never armed (revision 0) and a witness that lost its memory are UNREACHABLE:
 * neither side may conclude anything. UNREACHABLE is no refusal: the claim may have been won, and may
 * still be. */
enum lb_claim lb_witness_claim(struct lb_witness *w, const struct lb_remus_record *r,
                               uint64_t deadline_ns, struct lb_error *err);
/* The protection of r->id ended here: the key is kept and says so, when it is still ours. A host that
 * comes back with an old record loses its claim. The record must be gone or "alone" before. */
int lb_witness_disarm(struct lb_witness *w, const struct lb_remus_record *r, uint64_t deadline_ns,
                      struct lb_error *err);
int lb_witness_read(struct lb_witness *w, const char *key, struct lb_witness_state *out,
                    uint64_t deadline_ns, struct lb_error *err);
/* The last look at it (background, every 2 s; etcd only, others always healthy). Never blocks. */
bool lb_witness_healthy(struct lb_witness *w, char why[160]);

#endif
