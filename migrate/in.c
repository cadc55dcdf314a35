/*
 * migrate/in.c - the destination session, and the other things a trusted peer
 * may ask of us on a channel.
 *
 * Happy path: serve_migration reads top to bottom: check, launch, receive, load,
 * wait for Commit, journal RUNNING, run, tell, announce. Anything wrong before
 * the journal says RUNNING ends in lb_rx_discard(): no process, no entry,
 * no file is left, and the token is refused for ever. What comes before the load is in rx.c.
 */
#include "migrate/migrate_internal.h"

#include "migrate/capacity.h"
#include "migrate/frames.h"
#include "migrate/rx.h"

#include <string.h>
#include <xxhash.h>

#define IDLE_TIMEOUT_NS UINT64_C(60000000000)
#define COMMIT_TIMEOUT_NS UINT64_C(60000000000)
#define LAST_WORDS_NS UINT64_C(3000000000)

struct in {
    struct lb_rx rx;
    uint64_t t_start, started_wall_ms;
    struct lb_progress prog;
    unsigned heard;        /* messages, when we last looked */
    bool settled;          /* the source will never ask about it */
};

static void report(struct in *s, const char *state, double percent)
{
    const struct lb_session_env *env = s->rx.env;

    s->prog.state = state;
    if (percent > s->prog.percent)
        s->prog.percent = percent;
    s->prog.eta_s = -1;
    s->prog.converges = -1;
    if (env->report)
        env->report(&s->prog, env->arg);
}

/* ------------------------------------------------------------------- receive */

static int on_tick(void *arg, struct lb_error *err)
{
    struct in *s = arg;
    unsigned before = s->heard;

    (void)err;
    s->heard = lb_ctl_queue_heard(s->rx.ctl);
    s->prog.round = (uint32_t)(s->rx.confirmed + 1);
    s->prog.sent_bytes = lb_receiver_pages(s->rx.recv) << LB_PAGE_SHIFT;
    report(s, "receiving", 50);
    return s->heard != before; /* one that waits for its go keeps in touch */
}

static int own_digest(struct in *s, uint8_t out[16], struct lb_error *err)
{
    LB_AUTO_FREE const struct lb_ram_block **v = lb_alloc(sizeof(*v) * (s->rx.n_map + 1));
    LB_AUTO_FREE uint32_t *ids = lb_alloc(sizeof(*ids) * (s->rx.n_map + 1));
    unsigned n = 0;

    for (unsigned i = 0; i < s->rx.n_map; i++)
        if (s->rx.map[i] && s->rx.map[i]->kind != LB_RAM_ROM) {
            ids[n] = i;
            v[n++] = s->rx.map[i];
        }
    return lb_memory_digest(s->rx.vm, v, ids, n, s->rx.req->channels + 1, out, err);
}

static int load(struct in *s, struct lb_error *err)
{
    Lb__Control *m = NULL, out = LB__CONTROL__INIT;
    Lb__Prepared p = LB__PREPARED__INIT;
    uint8_t digest[16];
    const void *state;
    size_t len;
    uint64_t t;
    int rc = 0;
    struct lb_bad_run bad;
    unsigned n_bad;
    uint64_t n = lb_receiver_bad(s->rx.recv, &bad, 1, &n_bad);

    if (n) {
        lb_fail(err, LB_E_NET, "%llu pages are other than their checksums, first page %u of block %u",
                (unsigned long long)n, bad.run.first, bad.block);
        return lb_remedy(err, "see to the fabric, or migrate with --transport tcp");
    }
    /* The source computes its digest while we compute ours. */
    if (s->rx.req->verify && own_digest(s, digest, err))
        return -1;
    if (lb_ctl_queue_expect(s->rx.ctl, LB__CONTROL__KIND_FINISH, &m, lb_now_ns() + IDLE_TIMEOUT_NS,
                            err))
        return -1;
    lb_receiver_state(s->rx.recv, &state, &len);
    if (!len || m->finish->state_bytes != len || m->finish->state_checksum != XXH3_64bits(state, len) ||
        m->finish->round != s->rx.rounds)
        rc = lb_fail(err, LB_E_PROTO, "the device state did not arrive whole");
    else if (s->rx.req->verify &&
             (m->finish->digest.len != 16 || memcmp(m->finish->digest.data, digest, 16))) {
        rc = lb_fail(err, LB_E_PROTO, "memory differs between source and destination (--verify)");
        lb_remedy(err, "this must never happen: keep both logs and report it");
    }
    lb__control__free_unpacked(m, NULL);
    if (rc)
        return -1;
    t = lb_now_ns();
    if (lb_hv_load_state(s->rx.vm, state, len, err))
        return -1;
    lb_point("dst-loaded");
    p.load_us = (uint32_t)((lb_now_ns() - t) / 1000);
    if (s->rx.req->verify)
        p.digest = (ProtobufCBinaryData){16, digest};
    out.kind_case = LB__CONTROL__KIND_PREPARED;
    out.prepared = &p;
    if (lb_ctl_send(s->rx.chan, &out, err))
        return -1;
    lb_point("dst-prepared");
    return 0;
}

/* ---------------------------------------------------------------- the decision */

static void answer_refused(struct in *s, const char *detail)
{
    Lb__Control m = LB__CONTROL__INIT;
    Lb__HandoverAnswer a = LB__HANDOVER_ANSWER__INIT;

    a.state = (char *)"refused";
    a.detail = (char *)detail;
    m.kind_case = LB__CONTROL__KIND_HANDOVER_ANSWER;
    m.handover_answer = &a;
    lb_ctl_send(s->rx.chan, &m, NULL);
}

/* `run` failed. May the decision be taken back? Only when the guest is known not to run:
 * the receiver says so, or it is dead (it may have run for the moment between the command
 * and its death; the source's copy, which has not been destroyed, is the only one left).
 * A receiver that lives and does not answer may be running: that is left to recovery. */
static bool not_running(struct in *s, const struct lb_error *why)
{
    struct lb_vm_ident id = lb_entry_ident(&s->rx.entry);
    bool alive = false, running = false;

    for (int i = 0; i < 100; i++) {
        if (!lb_hv_exists(s->rx.env->hv, &id))
            return true;
        if (!lb_hv_status(s->rx.vm, &alive, &running, NULL))
            return !running;
        lb_sleep_ms(50);
    }
    lb_log(LB_LOG_ERROR, "the receiver neither answers nor ends: %s", why->message);
    return false;
}

static bool is_ours(const struct in *s, const ProtobufCBinaryData *token)
{
    return token->len == LB_TOKEN_BYTES && !memcmp(token->data, s->rx.req->token.data, LB_TOKEN_BYTES);
}

static int commit(struct in *s, struct lb_error *err)
{
    Lb__Control *m = NULL, out = LB__CONTROL__INIT;
    Lb__Running r = LB__RUNNING__INIT;
    LB_AUTO_FD int lock = -1;
    struct lb_vm_ident id = lb_entry_ident(&s->rx.entry);
    struct lb_error e2 = LB_ERROR_INIT;
    uint64_t t;
    bool ok, ran;

    if (lb_ctl_queue_expect(s->rx.ctl, LB__CONTROL__KIND_COMMIT, &m,
                            lb_now_ns() + COMMIT_TIMEOUT_NS, err))
        return -1;
    ok = is_ours(s, &m->commit->token);
    lb__control__free_unpacked(m, NULL);
    if (!ok)
        return lb_fail(err, LB_E_PROTO, "the peer committed another hand-over");
    lb_point("dst-commit");
    lock = lb_journal_lock(s->rx.env->state_dir, s->rx.journal.token, 10000, err);
    if (lock < 0)
        return -1;
    /* On failure the file may already say RUNNING (full disk between rename and fsync of
     * the directory): then it is decided all the same. */
    if (lb_journal_move(s->rx.env->state_dir, &s->rx.journal, LB_J_RUNNING, err) &&
        s->rx.journal.state != LB_J_RUNNING)
        return -1;
    lb_point("dst-journalled");
    t = lb_now_ns();
    ran = !lb_hv_run(s->rx.vm, &e2);
    if (!ran && not_running(s, &e2)) {
        lb_log_error(LB_LOG_ERROR, &e2);
        if (lb_hv_end(s->rx.env->hv, &id, err) ||
            lb_journal_retract(s->rx.env->state_dir, &s->rx.journal, e2.message, err))
            return -1;
        answer_refused(s, e2.message);
        *err = e2;
        return -1;
    }
    lb_point("dst-ran");
    r.token = s->rx.req->token;
    r.run_us = (uint32_t)((lb_now_ns() - t) / 1000);
    out.kind_case = LB__CONTROL__KIND_RUNNING;
    out.running = &r;
    if (lb_ctl_send(s->rx.chan, &out, ran ? &e2 : NULL) && ran)
        lb_log_error(LB_LOG_WARN, &e2); /* the source will ask our journal */
    lb_point("dst-acked");
    if (!ran) { /* it is ours, and recovery sees to the rest */
        *err = e2;
        return -1;
    }
    return 0;
}

static void settle(struct in *s)
{
    struct lb_error e = LB_ERROR_INIT;
    struct lb_migrate_result res = {0};
    LB_AUTO_FREE char *line = NULL, *path = NULL;

    /* first: until the switches know, what clients send goes to the old host */
    if (lb_hv_announce(s->rx.vm, &e))
        lb_log_error(LB_LOG_WARN, &e);
    s->rx.entry.state = LB_VM_RUNNING;
    snprintf(s->rx.entry.note, sizeof(s->rx.entry.note), "came from %s", s->rx.peer);
    s->rx.entry.token[0] = '\0';
    if (lb_vm_entry_save(s->rx.env->state_dir, &s->rx.entry, &e))
        lb_log_error(LB_LOG_ERROR, &e);
    res.ok = true;
    res.rounds = s->rx.rounds;
    res.total_ms = (double)(lb_now_ns() - s->t_start) / 1e6;
    res.wire_bytes = 0;
    snprintf(res.final_state, sizeof(res.final_state), "running");
    line = lb_migrate_result_json(&s->rx.entry, s->rx.peer, "in", s->started_wall_ms, &res);
    path = lb_asprintf("%s/history.jsonl", s->rx.env->state_dir);
    if (line && lb_file_append_line(path, line, &e))
        lb_log_error(LB_LOG_WARN, &e);
    report(s, "done", 100);
}

/* What came for the guest during its pause, and that all is settled; until the source has closed, or is silent, or
 * has had time enough: the lock of the VM is held meanwhile. */
static void last_words(struct in *s, unsigned wait_ms)
{
    uint64_t until = lb_now_ns() + LAST_WORDS_NS;
    Lb__Control *m = NULL;

    while (lb_now_ns() < until &&
           !lb_ctl_queue_pop(s->rx.ctl, &m, lb_now_ns() + UINT64_C(1000000) * wait_ms, NULL)) {
        if (m->kind_case == LB__CONTROL__KIND_FRAMES && s->rx.desc.argv)
            lb_frames_inject(m->frames, s->rx.desc.argv, &s->rx.cfg);
        else if (m->kind_case == LB__CONTROL__KIND_SETTLED)
            s->settled |= is_ours(s, &m->settled->token);
        lb__control__free_unpacked(m, NULL);
    }
}

/* ---------------------------------------------------------------------- serve */

static int checks(struct in *s, bool *proceed, struct lb_error *err)
{
    struct lb_rx *r = &s->rx;
    struct lb_report rep = {0};
    int rc;

    lb_preflight_dest(&r->desc, &r->cfg, r->env->state_dir, r->req->hello->wall_ms, &rep);
    lb_rx_transport(r, &rep);
    if (r->req->wish_json[0] && r->env->check_wish)
        r->env->check_wish(r->req->wish_json, &rep, r->env->arg);
    rc = lb_rx_decide(r, &rep, proceed, err);
    lb_report_free(&rep);
    return rc;
}

/* Beside the entry before anything can run: whatever happens from now on, it is where the VM is. */
static int keep_wish(struct lb_rx *r, struct lb_error *err)
{
    if (!r->req->wish_json[0])
        return 0;
    if (!r->env->keep_wish)
        return lb_fail(err, LB_E_UNSUPPORTED, "this lifeboatd protects no VMs");
    return r->env->keep_wish(r->entry.name, r->req->wish_json, err, r->env->arg);
}

static int migration(struct in *s, struct lb_error *err)
{
    struct lb_rx *r = &s->rx;
    struct lb_error e = LB_ERROR_INIT;
    bool proceed;

    if (checks(s, &proceed, err))
        return -1;
    if (!proceed)
        return 0;
    if (lb_rx_listen(r, NULL, NULL, err))
        return -1;
    report(s, "launching", 2);
    if (lb_rx_register(r, LB_VM_INCOMING, err) || keep_wish(r, err) || lb_rx_launch(r, err))
        return -1;
    if (r->env->want_conns(r->req->session_id.data, r->entry.name, err, r->env->arg))
        return -1;
    if (lb_rx_ready(r, err) || lb_rx_map_blocks(r, err) || lb_rx_accept(r, r->req->channels, err) ||
        lb_rx_start(r, r->req->channels, err))
        return -1;
    report(s, "receiving", 5);
    lb_point("dst-receive");
    if (lb_rx_receive(r, on_tick, s, err) || load(s, err))
        return -1;
    if (commit(s, err))
        return -1;
    last_words(s, 0);
    settle(s);
    last_words(s, 1000);
    if (s->settled && lb_journal_settle(r->env->state_dir, &r->journal, &e))
        lb_log_error(LB_LOG_WARN, &e);
    return 0;
}

static int serve_migration(const struct lb_session_env *env, struct lb_chan *chan,
                           const char *peer, Lb__MigrateRequest *req, char *vm_name,
                           struct lb_error *err)
{
    struct in s = {.t_start = lb_now_ns(), .started_wall_ms = lb_wall_ms()};
    struct lb_error local = LB_ERROR_INIT;
    int rc = lb_rx_open(&s.rx, env, chan, peer, req, &local);

    snprintf(vm_name, 128, "%s", s.rx.entry.name);
    if (!rc)
        rc = migration(&s, &local);
    if (rc) {
        lb_log_error(LB_LOG_ERROR, &local);
        if (s.rx.journal.state != LB_J_RUNNING)
            lb_ctl_send_failure(chan, &local, NULL);
        lb_rx_discard(&s.rx);
    }
    lb_rx_close(&s.rx);
    if (rc && err)
        *err = local;
    return rc;
}

static int serve_ping(struct lb_chan *chan, struct lb_error *err)
{
    Lb__Control m = LB__CONTROL__INIT;
    Lb__Pong p = LB__PONG__INIT;
    Lb__Hello h = LB__HELLO__INIT;

    lb_ctl_hello(&h, NULL);
    p.hello = &h;
    m.kind_case = LB__CONTROL__KIND_PONG;
    m.pong = &p;
    return lb_ctl_send(chan, &m, err);
}

int lb_serve_channel(const struct lb_session_env *env, struct lb_chan *chan, const char *peer,
                     char *vm_name, struct lb_error *err)
{
    Lb__Control *m = NULL;
    int rc;

    if (lb_ctl_recv(chan, &m, lb_now_ns() + UINT64_C(10000000000), err))
        return -1;
    switch (m->kind_case) {
    case LB__CONTROL__KIND_MIGRATE_REQUEST:
        if (m->migrate_request->protect) {
            rc = env->serve_other
                     ? env->serve_other(env, chan, peer, m, vm_name, err)
                     : lb_fail(err, LB_E_UNSUPPORTED, "this lifeboatd protects no VMs");
            break;
        }
        rc = serve_migration(env, chan, peer, m->migrate_request, vm_name, err);
        break;
    case LB__CONTROL__KIND_HANDOVER_QUERY:
        rc = lb_handover_answer(env, chan, peer, m->handover_query, err);
        break;
    case LB__CONTROL__KIND_PING:
        rc = serve_ping(chan, err);
        break;
    case LB__CONTROL__KIND_CAPACITY_QUERY:
        rc = lb_capacity_serve(env, chan, peer, m->capacity_query, err);
        break;
    case LB__CONTROL__KIND_LINK_TEST:
        rc = lb_link_serve(chan, m->link_test, err);
        break;
    case LB__CONTROL__KIND_ASK:
        rc = env->serve_other ? env->serve_other(env, chan, peer, m, vm_name, err)
                              : lb_fail(err, LB_E_UNSUPPORTED, "this lifeboatd cannot be asked");
        break;
    default:
        rc = lb_fail(err, LB_E_PROTO, "the peer opened with control message %d",
                     (int)m->kind_case);
    }
    lb__control__free_unpacked(m, NULL);
    return rc;
}
