/*
 * cmd/daemon/session.h - what the work of a session asks of the session process around it (session.c).
 *
 * All of it is for the main thread, which does the work.
 */
#ifndef LB_SESSION_H
#define LB_SESSION_H

#include "cmd/daemon/daemon.h"

struct sess;

/* What it was started with. The request's key is the work's to wipe (lb_ckpt_key_for does). */
const Lb__SessionStart *lb_sess_start(const struct sess *s);
const char *lb_sess_vm(const struct sess *s);
/* Readable when cancel was asked for. */
int lb_sess_cancel_fd(const struct sess *s);
/* From now on it is this VM's session, or one of this role: the supervisor is told. */
void lb_sess_set_vm(struct sess *s, const char *vm);
void lb_sess_set_role(struct sess *s, const char *role);
void lb_sess_set_peer(struct sess *s, const char *host);
/* What the engines are given; id must outlive it. */
struct lb_session_env lb_sess_env(struct sess *s, const struct lb_identity *id);
/* Log to STATE_DIR/log/SESSION.log. */
void lb_sess_open_log(struct sess *s);
/* Events; take the text. */
void lb_sess_progress(struct sess *s, char *json);
void lb_sess_running(struct sess *s, char *json);
/* To a result of the engines (JSON object, replaced): the checks of the preflight that was shown. */
void lb_sess_add_checks(struct sess *s, char **json);

/* ---- the work: 0 and *json (malloc'ed), or -1, *err and perhaps *json */
/* ckpt_session.c */
int lb_work_checkpoint(struct sess *s, char **json, struct lb_error *err); /* also role "scheduled" */
int lb_work_restore(struct sess *s, char **json, struct lb_error *err);
int lb_work_fill(struct sess *s, char **json, struct lb_error *err);
int lb_work_clone(struct sess *s, char **json, struct lb_error *err);
/* ckpt_catalog.c */
int lb_work_catalog(struct sess *s, char **json, struct lb_error *err);
/* evac_plan.c: {"plan":{the event "plan" of migrate/evacuate.h}, "inventory":{...}} */
int lb_work_plan(struct sess *s, char **json, struct lb_error *err);
/* ask.c: what the asked host answered */
int lb_work_ask(struct sess *s, char **json, struct lb_error *err);
/* the result of a dry run: of a protected VM, which goes on being protected */
int lb_work_check(struct sess *s, char **json, struct lb_error *err);
/* The channel of a session of role "in" whose first message was Ask. */
int lb_serve_ask(struct sess *s, struct lb_chan *c, const char *peer, const Lb__Ask *ask,
                 struct lb_error *err);

#endif
