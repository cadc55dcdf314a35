/*
 * migrate/handover.h - the question "what became of this token?" between two hosts, and its answers.
 *
 * A token is decided on one host only, the one that may come to run the VM: by its journal
 * (journal.h). Migration asks about a hand-over, protection about its id: a backup that has
 * promised "refused" never claims, one that says "running" has taken over.
 */
#ifndef LB_HANDOVER_H
#define LB_HANDOVER_H

#include "migrate/migrate.h"

enum lb_verdict {
    LB_VERDICT_RUNNING,
    LB_VERDICT_REFUSED,  /* durably: it never ran there and never will */
    LB_VERDICT_OPEN,     /* only a peek finds this: not decided */
};
/* Ask the destination once; not decided yet, it is refused by this. LB_E_UNDECIDED when it
 * cannot be reached. */
int lb_handover_ask(const struct lb_session_env *env, const struct lb_host *peer,
                    const char *token_hex, const char *vm, enum lb_verdict *out,
                    struct lb_error *err);
/* The same, but nothing is decided by asking. */
int lb_handover_peek(const struct lb_session_env *env, const struct lb_host *peer,
                     const char *token_hex, const char *vm, enum lb_verdict *out,
                     struct lb_error *err);
/* Answer such a question (destination). */
int lb_handover_answer(const struct lb_session_env *env, struct lb_chan *chan, const char *peer,
                       const Lb__HandoverQuery *q, struct lb_error *err);
/* Destination: it never ran and never will: destroy the receiver, forget the entry. */
int lb_receiver_discard(const struct lb_session_env *env, const struct lb_vm_entry *e,
                        struct lb_error *err);

#endif
