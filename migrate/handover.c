/*
 * migrate/handover.c - after a crash: who has the VM?
 *
 * Source side   entry MIGRATING_OUT/HANDED_OVER + journal:
 *     NONE, PREPARING, ABORTED  -> continue the guest here
 *     HANDED_OVER               -> ask the destination:
 *                                    running -> destroy our copy, DONE
 *                                    refused -> ABORTED, continue the guest here
 *                                    silent  -> stay paused, LB_E_UNDECIDED
 *     DONE                      -> destroy what is left
 * Destination   entry INCOMING + journal:
 *     NONE, PREPARED, REFUSED   -> REFUSED, destroy the receiver, forget it
 *     RUNNING                   -> see that it runs, announce it
 *
 * The destination's answer and its own Commit exclude each other by TOKEN.lock.
 */
#include "migrate/migrate_internal.h"

#include <assert.h>
#include <string.h>

void lb_host_address(const struct lb_host *h, char host[256], uint16_t *port)
{
    if (lb_parse_hostport(h->address, LB_DEFAULT_PORT, host, port, NULL)) {
        snprintf(host, 256, "%.255s", h->address);
        *port = LB_DEFAULT_PORT;
    }
}

struct lb_vm_ident lb_entry_ident(const struct lb_vm_entry *e)
{
    return (struct lb_vm_ident){.name = e->name, .proc = e->proc,
                                .qmp_path = e->qmp_path[0] ? e->qmp_path : NULL};
}

static bool exists(const struct lb_session_env *env, const struct lb_vm_entry *e)
{
    struct lb_vm_ident id = lb_entry_ident(e);

    return e->proc.pid > 0 && lb_hv_exists(env->hv, &id);
}

static int end(const struct lb_session_env *env, const struct lb_vm_entry *e, struct lb_error *err)
{
    struct lb_vm_ident id = lb_entry_ident(e);

    return id.proc.pid > 0 || id.qmp_path ? lb_hv_end(env->hv, &id, err) : 0;
}

/* ------------------------------------------------------------------ the question */

static int ask(const struct lb_session_env *env, const struct lb_host *peer, const char *token_hex,
               const char *vm, bool peek, enum lb_verdict *out, struct lb_error *err)
{
    Lb__Control m = LB__CONTROL__INIT, *in = NULL;
    Lb__HandoverQuery q = LB__HANDOVER_QUERY__INIT;
    Lb__Hello h = LB__HELLO__INIT;
    struct lb_chan *c = NULL;
    uint8_t token[LB_TOKEN_BYTES];
    char host[256];
    uint16_t port;
    int rc;

    if (lb_unhex(token, sizeof(token), token_hex) != LB_TOKEN_BYTES)
        return lb_fail(err, LB_E_STATE, "the journal has a malformed token");
    lb_host_address(peer, host, &port);
    if (lb_chan_connect(host, port, env->identity, peer->pub, 3000, -1, &c, err)) {
        if (err)
            err->code = LB_E_UNDECIDED;
        return lb_context(err, "host %s cannot be asked", peer->name);
    }
    lb_ctl_hello(&h, NULL);
    q.hello = &h;
    q.token = (ProtobufCBinaryData){sizeof(token), token};
    q.vm = (char *)vm;
    q.peek = peek;
    m.kind_case = LB__CONTROL__KIND_HANDOVER_QUERY;
    m.handover_query = &q;
    rc = lb_ctl_send(c, &m, err);
    if (!rc)
        rc = lb_ctl_expect(c, LB__CONTROL__KIND_HANDOVER_ANSWER, &in,
                           lb_now_ns() + UINT64_C(15000000000), err);
    lb_chan_close(c);
    if (rc) {
        if (err)
            err->code = LB_E_UNDECIDED;
        return lb_context(err, "host %s did not answer", peer->name);
    }
    if (!strcmp(in->handover_answer->state, "running")) {
        *out = LB_VERDICT_RUNNING;
    } else if (!strcmp(in->handover_answer->state, "refused")) {
        *out = LB_VERDICT_REFUSED;
    } else if (peek && !strcmp(in->handover_answer->state, "open")) {
        *out = LB_VERDICT_OPEN;
    } else {
        rc = lb_fail(err, LB_E_UNDECIDED, "host %s answered nonsense", peer->name);
    }
    lb__control__free_unpacked(in, NULL);
    return rc;
}

int lb_handover_ask(const struct lb_session_env *env, const struct lb_host *peer,
                    const char *token_hex, const char *vm, enum lb_verdict *out,
                    struct lb_error *err)
{
    return ask(env, peer, token_hex, vm, false, out, err);
}

int lb_handover_peek(const struct lb_session_env *env, const struct lb_host *peer,
                     const char *token_hex, const char *vm, enum lb_verdict *out,
                     struct lb_error *err)
{
    return ask(env, peer, token_hex, vm, true, out, err);
}

int lb_handover_answer(const struct lb_session_env *env, struct lb_chan *chan, const char *peer,
                       const Lb__HandoverQuery *q, struct lb_error *err)
{
    Lb__Control m = LB__CONTROL__INIT;
    Lb__HandoverAnswer a = LB__HANDOVER_ANSWER__INIT;
    struct lb_journal j = {0};
    char token[LB_TOKEN_HEX];
    LB_AUTO_FD int lock = -1;

    if (q->token.len != LB_TOKEN_BYTES)
        return lb_fail(err, LB_E_PROTO, "malformed hand-over query");
    lb_hex(token, q->token.data, LB_TOKEN_BYTES);
    lock = lb_journal_lock(env->state_dir, token, 12000, err);
    if (lock < 0 || lb_journal_load(env->state_dir, token, &j, err))
        return -1;
    if (j.state != LB_J_NONE && strcmp(j.peer, peer))
        return lb_fail(err, LB_E_AUTH, "host %s asked about a hand-over of host %s", peer, j.peer);
    switch (j.state) {
    case LB_J_RUNNING:
        a.state = (char *)"running";
        break;
    case LB_J_NONE:
    case LB_J_PREPARED:
        if (q->peek) {
            a.state = (char *)(j.state == LB_J_NONE ? "refused" : "open");
            break;
        }
        if (j.state == LB_J_NONE) {
            snprintf(j.token, sizeof(j.token), "%s", token);
            snprintf(j.vm, sizeof(j.vm), "%.127s", q->vm);
            snprintf(j.peer, sizeof(j.peer), "%s", peer);
        }
        snprintf(j.detail, sizeof(j.detail), "the source asked before it was committed");
        if (lb_journal_move(env->state_dir, &j, LB_J_REFUSED, err))
            return -1;
        /* fall through */
    case LB_J_REFUSED:
        a.state = (char *)"refused";
        a.detail = j.detail;
        break;
    default:
        return lb_fail(err, LB_E_STATE, "hand-over %s is ours, not the peer's", token);
    }
    m.kind_case = LB__CONTROL__KIND_HANDOVER_ANSWER;
    m.handover_answer = &a;
    return lb_ctl_send(chan, &m, err);
}

/* ---------------------------------------------------------------------- recovery */

int lb_receiver_discard(const struct lb_session_env *env, const struct lb_vm_entry *e,
                        struct lb_error *err)
{
    struct lb_journal j = {0};
    LB_AUTO_FD int lock = lb_journal_lock(env->state_dir, e->token, 12000, err);

    if (lock < 0 || lb_journal_load(env->state_dir, e->token, &j, err))
        return -1;
    if (j.state == LB_J_RUNNING)
        return lb_fail(err, LB_E_STATE, "VM %s was committed, it is not discarded", e->name);
    if (j.state != LB_J_REFUSED) {
        if (j.state == LB_J_NONE) {
            snprintf(j.token, sizeof(j.token), "%s", e->token);
            snprintf(j.vm, sizeof(j.vm), "%s", e->name);
            snprintf(j.peer, sizeof(j.peer), "%s", e->peer);
        }
        snprintf(j.detail, sizeof(j.detail), "given up before it was committed");
        if (lb_journal_move(env->state_dir, &j, LB_J_REFUSED, err))
            return -1;
    }
    if (end(env, e, err))
        return -1;
    return lb_vm_entry_remove(env->state_dir, e->name, err);
}

/* The guest continues on this host. */
static int bring_up(const struct lb_session_env *env, struct lb_vm_entry *e, bool announce,
                    struct lb_error *err)
{
    struct lb_vm_ident id = lb_entry_ident(e);
    struct lb_hv_vm *vm = NULL;
    bool alive = false, running = false;
    int rc;

    rc = lb_hv_attach(env->hv, &id, &vm, err);
    if (!rc)
        rc = lb_hv_throttle(vm, 0, err);
    if (!rc)
        rc = lb_hv_status(vm, &alive, &running, err);
    if (!rc && !running)
        rc = lb_hv_cont(vm, err);
    if (!rc && announce)
        rc = lb_hv_announce(vm, err);
    lb_hv_detach(vm);
    if (rc)
        return -1;
    e->state = LB_VM_RUNNING;
    e->token[0] = e->peer[0] = '\0';
    return lb_vm_entry_save(env->state_dir, e, err);
}

static int mark_dead(const struct lb_session_env *env, struct lb_vm_entry *e, const char *note,
                     struct lb_error *err)
{
    e->state = LB_VM_DEAD;
    snprintf(e->note, sizeof(e->note), "%s", note);
    return lb_vm_entry_save(env->state_dir, e, err);
}

static int stay(const struct lb_session_env *env, struct lb_vm_entry *e, struct lb_journal *j,
                const char *why, char text[512], struct lb_error *err)
{
    if (!exists(env, e)) {
        snprintf(text, 512, "%s: its process is gone; it stayed on this host (%s) and died", e->name,
                 why);
        if (j->state == LB_J_PREPARING)
            lb_journal_move(env->state_dir, j, LB_J_ABORTED, NULL);
        return mark_dead(env, e, "its process is gone", err);
    }
    snprintf(e->note, sizeof(e->note), "recovered: %s", why);
    if (bring_up(env, e, false, err))
        return -1;
    if (j->state == LB_J_PREPARING) {
        snprintf(j->detail, sizeof(j->detail), "%s", why);
        lb_journal_move(env->state_dir, j, LB_J_ABORTED, NULL);
    }
    snprintf(text, 512, "%s: running on this host (%s)", e->name, why);
    return 0;
}

static int left(const struct lb_session_env *env, struct lb_vm_entry *e, struct lb_journal *j,
                char text[512], struct lb_error *err)
{
    if (end(env, e, err))
        return -1;
    if (j->state == LB_J_HANDED_OVER && lb_journal_move(env->state_dir, j, LB_J_DONE, err))
        return -1;
    snprintf(text, 512, "%s: runs on host %s; the copy here was removed", e->name, j->peer);
    return lb_vm_entry_remove(env->state_dir, e->name, err);
}

static int ask_and_act(const struct lb_session_env *env, struct lb_vm_entry *e,
                       struct lb_journal *j, char text[512], struct lb_error *err)
{
    struct lb_hosts hosts = {0};
    const struct lb_host *peer;
    enum lb_verdict v = LB_VERDICT_REFUSED;
    char key[LB_KEY_TEXT_BYTES] = "";
    int rc;

    if (lb_hosts_load(env->state_dir, &hosts, err))
        return -1;
    peer = lb_hosts_by_name(&hosts, j->peer);
    if (peer)
        lb_key_format(key, peer->pub);
    if (peer && j->peer_key[0] && strcmp(key, j->peer_key)) {
        /* Another machine under the old name knows nothing of it and would say "refused". */
        lb_fail(err, LB_E_UNDECIDED, "VM %s was handed over to host %s, whose key was %.20s..., not "
                "the one that is trusted now", e->name, j->peer, j->peer_key);
        rc = lb_remedy(err, "trust the host with that key again under that name, then `lifeboat "
                            "recover %s`", e->name);
    } else if (!peer) {
        lb_fail(err, LB_E_UNDECIDED, "VM %s was handed over to host %s, which is no longer trusted",
                e->name, j->peer);
        rc = lb_remedy(err, "`lifeboat host trust %s KEY ADDRESS`, then `lifeboat recover %s`",
                       j->peer, e->name);
    } else {
        rc = lb_handover_ask(env, peer, j->token, e->name, &v, err);
    }
    lb_hosts_free(&hosts);
    if (rc) {
        snprintf(text, 512, "%s: paused here, handed over to %s, which cannot be asked", e->name,
                 j->peer);
        if (e->state != LB_VM_HANDED_OVER) {
            e->state = LB_VM_HANDED_OVER;
            snprintf(e->note, sizeof(e->note), "handed over to %s, which does not answer", j->peer);
            lb_vm_entry_save(env->state_dir, e, NULL);
        }
        return -1;
    }
    if (v == LB_VERDICT_RUNNING)
        return left(env, e, j, text, err);
    snprintf(j->detail, sizeof(j->detail), "refused by the destination before it ran");
    if (lb_journal_move(env->state_dir, j, LB_J_ABORTED, err))
        return -1;
    return stay(env, e, j, "the destination never ran it", text, err);
}

static int recover_incoming(const struct lb_session_env *env, struct lb_vm_entry *e,
                            struct lb_journal *j, char text[512], struct lb_error *err)
{
    if (j->state != LB_J_RUNNING) {
        if (lb_receiver_discard(env, e, err))
            return -1;
        snprintf(text, 512, "%s: an unfinished receiver was removed; it stays on host %s", e->name,
                 e->peer);
        return 0;
    }
    if (!exists(env, e)) {
        snprintf(text, 512, "%s: came from %s and its process died here", e->name, j->peer);
        return mark_dead(env, e, "its process died after it came here", err);
    }
    snprintf(e->note, sizeof(e->note), "came from %s", j->peer);
    if (bring_up(env, e, true, err))
        return -1;
    snprintf(text, 512, "%s: running on this host (came from %s)", e->name, j->peer);
    return 0;
}

int lb_recover_vm(const struct lb_session_env *env, const char *vm_name, char text[512],
                  struct lb_error *err)
{
    struct lb_vm_entry e;
    struct lb_journal j = {0};

    text[0] = '\0';
    if (lb_vm_entry_load(env->state_dir, vm_name, &e, err))
        return -1;
    if (e.token[0] && lb_journal_load(env->state_dir, e.token, &j, err))
        return -1;
    switch (e.state) {
    case LB_VM_INCOMING:
        return recover_incoming(env, &e, &j, text, err);
    case LB_VM_MIGRATING_OUT:
    case LB_VM_HANDED_OVER:
        if (j.state == LB_J_HANDED_OVER)
            return ask_and_act(env, &e, &j, text, err);
        if (j.state == LB_J_DONE)
            return left(env, &e, &j, text, err);
        return stay(env, &e, &j, "the migration had not been handed over", text, err);
    case LB_VM_RUNNING:
    case LB_VM_DEAD:
        if (exists(env, &e)) {
            snprintf(text, 512, "%s: running on this host, nothing to recover", e.name);
            return 0;
        }
        snprintf(text, 512, "%s: its process is gone", e.name);
        return e.state == LB_VM_DEAD ? 0 : mark_dead(env, &e, "its process is gone", err);
    case LB_VM_PROTECTED:
    case LB_VM_STANDBY:
        break; /* lb_remus_recover */
    case LB_VM_CHECKPOINTING:
    case LB_VM_SUSPENDED:
    case LB_VM_RESTORING:
    case LB_VM_FILLING:
        break; /* lb_ckpt_recover */
    }
    return lb_fail(err, LB_E_INTERNAL, "VM %s is %s: not a matter of migration", e.name,
                   lb_vm_state_name(e.state));
}
