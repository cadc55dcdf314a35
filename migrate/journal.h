/*
 * migrate/journal.h - the hand-over journal: exactly one running copy,
 * whatever dies.
 *
 * One file per hand-over and side, STATE_DIR/handover/TOKEN.json, each state
 * written durably (write-temp, fsync, rename, fsync of the directory) BEFORE
 * the step that it names is taken.
 *
 *   source        meaning                                  after a crash
 *   PREPARING     guest may be paused for a round          continue the guest here
 *   HANDED_OVER   Commit may have been sent                ask the destination
 *   DONE          destination runs it, we never ask again  destroy what is left
 *   ABORTED       decided: it stays here                   continue the guest here
 *
 *   destination
 *   PREPARED      complete, loaded, paused                 refuse + destroy the receiver
 *   RUNNING       decided: it runs here                    run it (again: harmless), announce
 *     settled     and the source is DONE: nobody will ask  the same
 *   REFUSED       decided: it never ran and never will     destroy the receiver
 *
 * The destination decides between RUNNING and REFUSED under the file lock
 * TOKEN.lock, so that a query and a Commit cannot both win.
 */
#ifndef LB_JOURNAL_H
#define LB_JOURNAL_H

#include "core/core.h"

#define LB_TOKEN_BYTES 16
#define LB_TOKEN_HEX (2 * LB_TOKEN_BYTES + 1)

enum lb_journal_state {
    LB_J_NONE = 0, /* no such token here */
    LB_J_PREPARING, LB_J_HANDED_OVER, LB_J_DONE, LB_J_ABORTED, /* source */
    LB_J_PREPARED, LB_J_RUNNING, LB_J_REFUSED,                 /* destination */
};
const char *lb_journal_state_name(enum lb_journal_state s);

struct lb_journal {
    char token[LB_TOKEN_HEX];
    enum lb_journal_state state;
    char vm[128];
    char peer[128];          /* name of the trusted host on the other side */
    char peer_key[72];       /* source: its key as text, so that only that host is ever asked; may be "" */
    uint64_t changed_ms;     /* wall clock */
    bool settled;            /* RUNNING: the source has said that it is DONE */
    char detail[256];
};

/* LB_J_NONE (and 0) when there is none; then only out->token is filled. A damaged
 * journal is LB_E_STATE, never LB_J_NONE. Any thread, like everything here. */
int lb_journal_load(const char *state_dir, const char *token_hex, struct lb_journal *out,
                    struct lb_error *err);
/* Durable on return; checks that the move is allowed and that *j is what the file
 * says (LB_E_STATE). vm, peer and detail are written as the caller set them;
 * state and changed_ms are updated. After a failure j->state is what the file
 * says: a full disk can strike before or after the new state took its place. */
int lb_journal_move(const char *state_dir, struct lb_journal *j, enum lb_journal_state to,
                    struct lb_error *err);
/* RUNNING -> REFUSED, the one move that takes a decision back. Allowed only to a
 * caller that KNOWS that the receiver died before its guest executed anything (e.g.
 * `cont` failed and the process is gone) and that has not told the source
 * "running". The caller holds TOKEN.lock. `reason`, not empty, goes to detail. */
int lb_journal_retract(const char *state_dir, struct lb_journal *j, const char *reason,
                       struct lb_error *err);
/* The source is DONE. *j is RUNNING, and says what the file says afterwards. */
int lb_journal_settle(const char *state_dir, struct lb_journal *j, struct lb_error *err);
/* Exclusive lock of a token, waiting at most timeout_ms; fd or -1 (LB_E_STATE when
 * held by another). Given back by close or death. */
int lb_journal_lock(const char *state_dir, const char *token_hex, unsigned timeout_ms,
                    struct lb_error *err);
/* Sorted by token; *v malloc'ed, NULL when none. Damaged ones are logged and left out. */
int lb_journal_list(const char *state_dir, struct lb_journal **v, unsigned *n,
                    struct lb_error *err);
/* Remove journals that are DONE, ABORTED, REFUSED or settled for 30 days. RUNNING that is not settled stays
 * for ever: a source that comes back after months must still get that answer. */
int lb_journal_prune(const char *state_dir, struct lb_error *err);

#endif
