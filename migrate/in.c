/*
 * migrate/in.c - the destination session, and the other things a trusted peer
 * may ask of us on a channel.
 *
 * Happy path: serve_migration reads top to bottom: check, launch, receive, load,
 * wait for Commit, journal RUNNING, run, tell, announce. Anything wrong before
 * the journal says RUNNING ends in lb_receiver_discard(): no process, no entry,
 * no file is left, and the token is refused for ever.
 *
 * The engine waits on one condition for two sources of events: control messages
 * (a reader thread) and the bulk workers.
 */
#include "migrate/migrate_internal.h"

#include "migrate/desc_proto.h"
#include "migrate/frames.h"

#include <assert.h>
#include <string.h>
#include <sys/stat.h>
#include <xxhash.h>

#define IDLE_TIMEOUT_NS UINT64_C(60000000000)
#define SILENT_TIMEOUT_NS UINT64_C(300000000000) /* bulk: the source was stopped, or forgot us */
#define COMMIT_TIMEOUT_NS UINT64_C(60000000000)
#define LATE_FRAMES_NS UINT64_C(3000000000)
#define MAX_BLOCKS 512u
#define MAX_CHANNELS 64u

struct in {
    const struct lb_session_env *env;
    struct lb_chan *chan;
    const char *peer;
    Lb__MigrateRequest *req;
    struct lb_host_config cfg;
    struct lb_vm_desc desc;
    struct lb_vm_entry entry;
    struct lb_journal journal;
    int vm_lock;
    bool have_cfg, registered, journalled;
    struct lb_hv_vm *vm;
    const struct lb_ram_block *blocks;
    unsigned n_blocks;
    const struct lb_ram_block **map;  /* by the source's block id */
    uint64_t *map_pages;
    unsigned n_map;
    struct lb_receiver *recv;
    struct lb_ctl_queue *ctl;
    uint64_t t_start, started_wall_ms;
    uint32_t rounds;
    struct lb_progress prog;
    /* locked by mu */
    pthread_mutex_t mu;
    pthread_cond_t cond;
    unsigned events;
};

static void on_event(void *arg)
{
    struct in *s = arg;

    pthread_mutex_lock(&s->mu);
    s->events++;
    pthread_cond_broadcast(&s->cond);
    pthread_mutex_unlock(&s->mu);
}

static void report(struct in *s, const char *state, double percent)
{
    s->prog.state = state;
    if (percent > s->prog.percent)
        s->prog.percent = percent;
    s->prog.eta_s = -1;
    s->prog.converges = -1;
    if (s->env->report)
        s->env->report(&s->prog, s->env->arg);
}

/* ------------------------------------------------------------------- request */

static int check_request(const Lb__MigrateRequest *r, struct lb_error *err)
{
    if (!r->hello || r->hello->version != 1) {
        lb_fail(err, LB_E_PROTO, "the peer speaks protocol version %u, we speak 1",
                r->hello ? r->hello->version : 0);
        return lb_remedy(err, "run the same Lifeboat version on both hosts");
    }
    if (r->session_id.len != LB_SESSION_ID_BYTES || r->token.len != LB_TOKEN_BYTES ||
        r->bulk_secret.len != 32 || !r->vm || !r->channels || r->channels > MAX_CHANNELS ||
        r->cipher > LB_CIPHER_CHACHA20POLY1305)
        return lb_fail(err, LB_E_PROTO, "the peer's migration request is malformed");
    if (!r->vm->name || !lb_vm_name_valid(r->vm->name))
        return lb_fail(err, LB_E_PROTO, "the peer's VM name is not valid");
    return 0;
}

static int send_report(struct in *s, const struct lb_report *rep, bool refused,
                       struct lb_error *err)
{
    Lb__Control m = LB__CONTROL__INIT;
    Lb__PreflightReport r = LB__PREFLIGHT_REPORT__INIT;
    Lb__Hello h = LB__HELLO__INIT;
    LB_AUTO_FREE Lb__Check *v = lb_alloc(sizeof(*v) * (rep->n + 1));
    LB_AUTO_FREE Lb__Check **pv = lb_alloc(sizeof(*pv) * (rep->n + 1));

    for (unsigned i = 0; i < rep->n; i++) {
        const struct lb_check *c = &rep->v[i];

        lb__check__init(&v[i]);
        v[i].id = (char *)c->id;
        v[i].status = (char *)(c->status == LB_CHECK_FAIL   ? "fail"
                               : c->status == LB_CHECK_WARN ? "warn"
                                                            : "ok");
        v[i].message = (char *)c->message;
        v[i].remedy = (char *)c->remedy;
        pv[i] = &v[i];
    }
    lb_ctl_hello(&h, &s->cfg);
    r.hello = &h;
    r.n_checks = rep->n;
    r.checks = pv;
    r.refused = refused;
    m.kind_case = LB__CONTROL__KIND_PREFLIGHT_REPORT;
    m.preflight_report = &r;
    return lb_ctl_send(s->chan, &m, err);
}

/* -------------------------------------------------------------------- launch */

static int launch(struct in *s, struct lb_error *err)
{
    LB_AUTO_FREE char *dir = lb_vm_dir(s->env->state_dir, s->entry.name, true);
    struct lb_launch_opts lo = {.name = s->entry.name, .run_dir = dir, .paths = s->cfg.paths,
                                .n_paths = s->cfg.n_paths, .taps = s->cfg.taps,
                                .n_taps = s->cfg.n_taps};
    const char *emu = lb_map_name(s->cfg.emulators, s->cfg.n_emulators, s->desc.emulator);
    struct lb_vm_ident id;
    struct lb_vm_desc mine = {0};
    int rc;

    lo.emulator = emu;
    if (lb_hv_launch(s->env->hv, &s->desc, &lo, &s->vm, err))
        return -1;
    lb_hv_ident(s->vm, &id);
    s->entry.proc = id.proc;
    snprintf(s->entry.qmp_path, sizeof(s->entry.qmp_path), "%s", id.qmp_path ? id.qmp_path : "");
    if (lb_vm_entry_save(s->env->state_dir, &s->entry, err))
        return -1;
    lb_point("dst-launched");
    if (lb_hv_describe(s->vm, &mine, err))
        return -1;
    rc = lb_preflight_features(s->desc.features, mine.features, err);
    lb_vm_desc_free(&mine);
    if (rc)
        return -1;
    if (lb_hv_blocks(s->vm, &s->blocks, &s->n_blocks, err))
        return -1;
    return lb_hv_prepare_ram(s->vm, err);
}

static int send_ready(struct in *s, struct lb_error *err)
{
    Lb__Control m = LB__CONTROL__INIT;
    Lb__Ready r = LB__READY__INIT;

    m.kind_case = LB__CONTROL__KIND_READY;
    m.ready = &r;
    return lb_ctl_send(s->chan, &m, err);
}

static const struct lb_ram_block *find_block(struct in *s, const char *name)
{
    for (unsigned i = 0; i < s->n_blocks; i++)
        if (!strcmp(s->blocks[i].name, name))
            return &s->blocks[i];
    return NULL;
}

/* The only main block under another name is still the main block. */
static const struct lb_ram_block *only_main(struct in *s, const Lb__BlockTable *t)
{
    const struct lb_ram_block *found = NULL;
    unsigned theirs = 0;

    for (size_t i = 0; i < t->n_blocks; i++)
        theirs += t->blocks[i]->kind == LB_RAM_MAIN;
    for (unsigned i = 0; i < s->n_blocks; i++)
        if (s->blocks[i].kind == LB_RAM_MAIN) {
            if (found)
                return NULL;
            found = &s->blocks[i];
        }
    return theirs == 1 ? found : NULL;
}

static int map_rom(struct in *s, const Lb__RamBlock *b, const struct lb_ram_block *mine,
                   bool *want, struct lb_error *err)
{
    uint8_t d[16];

    *want = false;
    if (!mine || !mine->hva || b->digest.len != 16) {
        lb_log(LB_LOG_DEBUG, "ROM %s cannot be compared", b->name);
        return 0;
    }
    if (mine->size_bytes == b->size_bytes) {
        if (lb_block_digest(s->vm, mine, d, err))
            return -1;
        if (!memcmp(d, b->digest.data, 16))
            return 0;
        *want = true;
        return 0;
    }
    lb_log(LB_LOG_WARN, "ROM %s is %llu bytes here and %llu on the source", b->name,
           (unsigned long long)mine->size_bytes, (unsigned long long)b->size_bytes);
    return 0;
}

static int map_blocks(struct in *s, struct lb_error *err)
{
    Lb__Control *m = NULL, out = LB__CONTROL__INIT;
    Lb__BlockTableOk ok = LB__BLOCK_TABLE_OK__INIT;
    LB_AUTO_FREE uint32_t *roms = NULL;
    const Lb__BlockTable *t;
    int rc = 0;

    if (lb_ctl_queue_expect(s->ctl, LB__CONTROL__KIND_BLOCK_TABLE, &m,
                            lb_now_ns() + IDLE_TIMEOUT_NS, err))
        return -1;
    t = m->block_table;
    if (t->n_blocks > MAX_BLOCKS) {
        lb__control__free_unpacked(m, NULL);
        return lb_fail(err, LB_E_PROTO, "the peer has too many RAM blocks");
    }
    s->n_map = (unsigned)t->n_blocks;
    s->map = lb_alloc(sizeof(*s->map) * (s->n_map + 1));
    s->map_pages = lb_alloc(sizeof(*s->map_pages) * (s->n_map + 1));
    roms = lb_alloc(sizeof(*roms) * (s->n_map + 1));
    for (unsigned i = 0; i < s->n_map && !rc; i++) {
        const Lb__RamBlock *b = t->blocks[i];
        const struct lb_ram_block *mine = find_block(s, b->name);
        bool want = true;

        if (b->id != i) {
            rc = lb_fail(err, LB_E_PROTO, "the peer numbers its RAM blocks wrongly");
            break;
        }
        if (b->kind == LB_RAM_ROM) {
            rc = map_rom(s, b, mine, &want, err);
            if (want && !rc)
                roms[ok.n_send_rom++] = i;
            if (!want)
                continue;
        } else if (!mine && b->kind == LB_RAM_MAIN) {
            mine = only_main(s, t);
        }
        if (rc)
            break;
        if (!mine || mine->size_bytes != b->size_bytes) {
            rc = lb_fail(err, LB_E_PREFLIGHT, "RAM block %.80s of %llu bytes %s", b->name,
                         (unsigned long long)b->size_bytes,
                         mine ? "has another size here" : "does not exist here");
            lb_remedy(err, "the hypervisor here builds another machine from the same command "
                           "line: use the same version, or map the emulator in lifeboat.conf");
            break;
        }
        /* Zero pages of main memory are not sent: only what prepare_ram emptied can hold it. */
        if (b->kind == LB_RAM_MAIN && mine->kind != LB_RAM_MAIN) {
            rc = lb_fail(err, LB_E_PREFLIGHT, "RAM block %.80s is main memory on the source and "
                         "not here", b->name);
            lb_remedy(err, "use the same version of the hypervisor on both hosts");
            break;
        }
        s->map[i] = mine;
        s->map_pages[i] = mine->size_bytes >> LB_PAGE_SHIFT;
    }
    lb__control__free_unpacked(m, NULL);
    if (rc)
        return -1;
    ok.send_rom = roms;
    out.kind_case = LB__CONTROL__KIND_BLOCK_TABLE_OK;
    out.block_table_ok = &ok;
    return lb_ctl_send(s->chan, &out, err);
}

/* The source may give up while we wait for its connection. */
static int next_conn(struct in *s, struct lb_error *err)
{
    uint64_t until = lb_now_ns() + UINT64_C(15000000000);

    for (;;) {
        struct lb_error e = LB_ERROR_INIT;
        int fd = s->env->take_conn(100, &e, s->env->arg);

        if (fd >= 0)
            return fd;
        if (lb_ctl_queue_ended(s->ctl, err))
            return -1;
        if (lb_now_ns() > until) {
            lb_fail(err, LB_E_NET, "the source's bulk connection did not come");
            return lb_remedy(err, "see whether something between the hosts limits connections");
        }
    }
}

static int accept_bulk(struct in *s, struct lb_error *err)
{
    struct lb_bulk_keys k = {.cipher = (enum lb_cipher)s->req->cipher};
    unsigned n = s->req->channels;
    struct lb_bulk **conns = lb_alloc(sizeof(struct lb_bulk *) * n);
    int rc = 0;

    memcpy(k.secret, s->req->bulk_secret.data, sizeof(k.secret));
    memcpy(k.session_id, s->req->session_id.data, sizeof(k.session_id));
    for (unsigned i = 0; i < n && !rc; i++) {
        struct lb_bulk *b = NULL;
        uint32_t index = 0;
        int fd = next_conn(s, err);

        if (fd < 0) {
            rc = -1;
            break;
        }
        rc = lb_bulk_accept(lb_tcp_from_fd(fd), &k, 10000, &index, &b, err);
        if (!rc && (index >= n || conns[index])) {
            lb_bulk_close(b);
            rc = lb_fail(err, LB_E_PROTO, "bulk connection %u of %u came twice or is too many",
                         index, n);
        } else if (!rc) {
            conns[index] = b;
            rc = lb_bulk_set_blocks(b, s->map_pages, s->n_map, err);
        }
    }
    if (!rc)
        rc = lb_receiver_new(s->vm, s->map, s->n_map, conns, n, on_event, s, &s->recv, err);
    for (unsigned i = 0; i < n; i++)
        lb_bulk_close(conns[i]);
    free(conns);
    memset(&k, 0, sizeof(k));
    return rc;
}

/* ------------------------------------------------------------------- receive */

static int send_round_done(struct in *s, uint32_t round, struct lb_error *err)
{
    Lb__Control m = LB__CONTROL__INIT;
    Lb__RoundDone d = LB__ROUND_DONE__INIT;

    d.round = round;
    d.pages = lb_receiver_pages(s->recv);
    m.kind_case = LB__CONTROL__KIND_ROUND_DONE;
    m.round_done = &d;
    return lb_ctl_send(s->chan, &m, err);
}

/* Rounds until the bulk connections said END; each finished round is confirmed. */
static int receive(struct in *s, struct lb_error *err)
{
    struct lb_vm_ident id = lb_entry_ident(&s->entry);
    int64_t confirmed = -1;
    uint64_t pages = 0, t_pages = lb_now_ns();

    for (;;) {
        struct timespec ts;
        struct lb_error why = LB_ERROR_INIT;
        int64_t round;
        bool ended;
        unsigned seen;

        pthread_mutex_lock(&s->mu);
        seen = s->events;
        pthread_mutex_unlock(&s->mu);
        /* The control channel knows the reason; a broken bulk connection only the fact. */
        if (lb_receiver_poll(s->recv, &round, &ended, err)) {
            for (int i = 0; i < 20 && !lb_ctl_queue_ended(s->ctl, &why); i++)
                lb_sleep_ms(10);
            if (lb_ctl_queue_ended(s->ctl, &why) && why.code == LB_E_CANCELLED)
                *err = why;
            return -1;
        }
        if (lb_ctl_queue_ended(s->ctl, err))
            return -1;
        if (ended) {
            s->rounds = (uint32_t)round;
            return 0;
        }
        if (lb_receiver_pages(s->recv) != pages || round > confirmed) {
            pages = lb_receiver_pages(s->recv);
            t_pages = lb_now_ns();
        } else if (lb_now_ns() - t_pages > SILENT_TIMEOUT_NS) {
            lb_fail(err, LB_E_NET, "the source has sent nothing for %u s",
                    (unsigned)(SILENT_TIMEOUT_NS / 1000000000u));
            return lb_remedy(err, "see whether its session hangs or was stopped, then migrate again");
        }
        if (round > confirmed) {
            if (send_round_done(s, (uint32_t)round, err))
                return -1;
            confirmed = round;
            s->prog.round = (uint32_t)round + 1;
            lb_point("dst-round");
        }
        s->prog.sent_bytes = lb_receiver_pages(s->recv) << LB_PAGE_SHIFT;
        report(s, "receiving", 50);
        clock_gettime(CLOCK_REALTIME, &ts);
        ts.tv_nsec += 200000000;
        ts.tv_sec += ts.tv_nsec / 1000000000;
        ts.tv_nsec %= 1000000000;
        pthread_mutex_lock(&s->mu);
        if (s->events == seen)
            pthread_cond_timedwait(&s->cond, &s->mu, &ts);
        pthread_mutex_unlock(&s->mu);
        if (!lb_hv_exists(s->env->hv, &id)) {
            lb_fail(err, LB_E_HV, "the receiving process of VM %s died", s->entry.name);
            return lb_remedy(err, "see vms/%s/qemu.log in the state directory of this host",
                             s->entry.name);
        }
    }
}

static int own_digest(struct in *s, uint8_t out[16], struct lb_error *err)
{
    LB_AUTO_FREE const struct lb_ram_block **v = lb_alloc(sizeof(*v) * (s->n_map + 1));
    LB_AUTO_FREE uint32_t *ids = lb_alloc(sizeof(*ids) * (s->n_map + 1));
    unsigned n = 0;

    for (unsigned i = 0; i < s->n_map; i++)
        if (s->map[i] && s->map[i]->kind != LB_RAM_ROM) {
            ids[n] = i;
            v[n++] = s->map[i];
        }
    return lb_memory_digest(s->vm, v, ids, n, s->req->channels + 1, out, err);
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

    /* The source computes its digest while we compute ours. */
    if (s->req->verify && own_digest(s, digest, err))
        return -1;
    if (lb_ctl_queue_expect(s->ctl, LB__CONTROL__KIND_FINISH, &m, lb_now_ns() + IDLE_TIMEOUT_NS,
                            err))
        return -1;
    lb_receiver_state(s->recv, &state, &len);
    if (!len || m->finish->state_bytes != len || m->finish->state_checksum != XXH3_64bits(state, len) ||
        m->finish->round != s->rounds)
        rc = lb_fail(err, LB_E_PROTO, "the device state did not arrive whole");
    else if (s->req->verify &&
             (m->finish->digest.len != 16 || memcmp(m->finish->digest.data, digest, 16))) {
        rc = lb_fail(err, LB_E_PROTO, "memory differs between source and destination (--verify)");
        lb_remedy(err, "this must never happen: keep both logs and report it");
    }
    lb__control__free_unpacked(m, NULL);
    if (rc)
        return -1;
    t = lb_now_ns();
    if (lb_hv_load_state(s->vm, state, len, err))
        return -1;
    lb_point("dst-loaded");
    p.load_us = (uint32_t)((lb_now_ns() - t) / 1000);
    if (s->req->verify)
        p.digest = (ProtobufCBinaryData){16, digest};
    out.kind_case = LB__CONTROL__KIND_PREPARED;
    out.prepared = &p;
    if (lb_ctl_send(s->chan, &out, err))
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
    lb_ctl_send(s->chan, &m, NULL);
}

/* `run` failed. May the decision be taken back? Only when the guest is known not to run:
 * the receiver says so, or it is dead (it may have run for the moment between the command
 * and its death; the source's copy, which has not been destroyed, is the only one left).
 * A receiver that lives and does not answer may be running: that is left to recovery. */
static bool not_running(struct in *s, const struct lb_error *why)
{
    struct lb_vm_ident id = lb_entry_ident(&s->entry);
    bool alive = false, running = false;

    for (int i = 0; i < 100; i++) {
        if (!lb_hv_exists(s->env->hv, &id))
            return true;
        if (!lb_hv_status(s->vm, &alive, &running, NULL))
            return !running;
        lb_sleep_ms(50);
    }
    lb_log(LB_LOG_ERROR, "the receiver neither answers nor ends: %s", why->message);
    return false;
}

static int commit(struct in *s, struct lb_error *err)
{
    Lb__Control *m = NULL, out = LB__CONTROL__INIT;
    Lb__Running r = LB__RUNNING__INIT;
    LB_AUTO_FD int lock = -1;
    struct lb_vm_ident id = lb_entry_ident(&s->entry);
    struct lb_error e2 = LB_ERROR_INIT;
    uint64_t t;
    bool ok, ran;

    if (lb_ctl_queue_expect(s->ctl, LB__CONTROL__KIND_COMMIT, &m,
                            lb_now_ns() + COMMIT_TIMEOUT_NS, err))
        return -1;
    ok = m->commit->token.len == LB_TOKEN_BYTES &&
         !memcmp(m->commit->token.data, s->req->token.data, LB_TOKEN_BYTES);
    lb__control__free_unpacked(m, NULL);
    if (!ok)
        return lb_fail(err, LB_E_PROTO, "the peer committed another hand-over");
    lb_point("dst-commit");
    lock = lb_journal_lock(s->env->state_dir, s->journal.token, 10000, err);
    if (lock < 0)
        return -1;
    /* On failure the file may already say RUNNING (full disk between rename and fsync of
     * the directory): then it is decided all the same. */
    if (lb_journal_move(s->env->state_dir, &s->journal, LB_J_RUNNING, err) &&
        s->journal.state != LB_J_RUNNING)
        return -1;
    lb_point("dst-journalled");
    t = lb_now_ns();
    ran = !lb_hv_run(s->vm, &e2);
    if (!ran && not_running(s, &e2)) {
        lb_log_error(LB_LOG_ERROR, &e2);
        if (lb_hv_end(s->env->hv, &id, err) ||
            lb_journal_retract(s->env->state_dir, &s->journal, e2.message, err))
            return -1;
        answer_refused(s, e2.message);
        *err = e2;
        return -1;
    }
    lb_point("dst-ran");
    r.token = s->req->token;
    r.run_us = (uint32_t)((lb_now_ns() - t) / 1000);
    out.kind_case = LB__CONTROL__KIND_RUNNING;
    out.running = &r;
    if (lb_ctl_send(s->chan, &out, ran ? &e2 : NULL) && ran)
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
    if (lb_hv_announce(s->vm, &e))
        lb_log_error(LB_LOG_WARN, &e);
    s->entry.state = LB_VM_RUNNING;
    snprintf(s->entry.note, sizeof(s->entry.note), "came from %s", s->peer);
    s->entry.token[0] = '\0';
    if (lb_vm_entry_save(s->env->state_dir, &s->entry, &e))
        lb_log_error(LB_LOG_ERROR, &e);
    res.ok = true;
    res.rounds = s->rounds;
    res.total_ms = (double)(lb_now_ns() - s->t_start) / 1e6;
    res.wire_bytes = 0;
    snprintf(res.final_state, sizeof(res.final_state), "running");
    line = lb_migrate_result_json(&s->entry, s->peer, "in", s->started_wall_ms, &res);
    path = lb_asprintf("%s/history.jsonl", s->env->state_dir);
    if (line && lb_file_append_line(path, line, &e))
        lb_log_error(LB_LOG_WARN, &e);
    report(s, "done", 100);
}

/* What came for the guest during its pause; until the source has closed, or is silent, or
 * has had time enough: the lock of the VM is held meanwhile. */
static void late_frames(struct in *s, unsigned wait_ms)
{
    uint64_t until = lb_now_ns() + LATE_FRAMES_NS;
    Lb__Control *m = NULL;

    while (lb_now_ns() < until &&
           !lb_ctl_queue_pop(s->ctl, &m, lb_now_ns() + UINT64_C(1000000) * wait_ms, NULL)) {
        if (m->kind_case == LB__CONTROL__KIND_FRAMES && s->desc.argv)
            lb_frames_inject(m->frames, s->desc.argv, &s->cfg);
        lb__control__free_unpacked(m, NULL);
    }
}

/* ---------------------------------------------------------------------- serve */

/* Looked at with the lock in hand: since the preflight check another VM may have got the
 * name, and a peer may send the token of an earlier hand-over again. */
static int check_fresh(struct in *s, struct lb_error *err)
{
    struct lb_vm_entry other;
    struct lb_journal used = {0};
    struct lb_error why = LB_ERROR_INIT;

    if (!lb_vm_entry_load(s->env->state_dir, s->entry.name, &other, &why)) {
        lb_fail(err, LB_E_EXISTS, "a VM named %s is already here (%s)", s->entry.name,
                lb_vm_state_name(other.state));
        return lb_remedy(err, "on the destination: `lifeboat status %s`; give one of the two "
                              "another name", s->entry.name);
    }
    if (why.code != LB_E_NOT_FOUND) {
        if (err)
            *err = why;
        return -1;
    }
    if (lb_journal_load(s->env->state_dir, s->journal.token, &used, err))
        return -1;
    if (used.state != LB_J_NONE) {
        lb_fail(err, LB_E_PROTO, "the token of this hand-over was used before (%s)",
                lb_journal_state_name(used.state));
        return lb_remedy(err, "migrate again: every migration makes a token of its own");
    }
    return 0;
}

static int register_incoming(struct in *s, struct lb_error *err)
{
    if (check_fresh(s, err))
        return -1;
    s->entry.state = LB_VM_INCOMING;
    snprintf(s->entry.hypervisor, sizeof(s->entry.hypervisor), "%s", s->env->hv->name);
    snprintf(s->entry.origin, sizeof(s->entry.origin), "migrated");
    snprintf(s->entry.token, sizeof(s->entry.token), "%s", s->journal.token);
    snprintf(s->entry.peer, sizeof(s->entry.peer), "%s", s->peer);
    s->entry.created_ms = lb_wall_ms();
    if (lb_vm_entry_save(s->env->state_dir, &s->entry, err))
        return -1;
    s->registered = true;
    /* Before the pause, not in it: PREPARED means that a receiver may be there. */
    if (lb_journal_move(s->env->state_dir, &s->journal, LB_J_PREPARED, err))
        return -1;
    s->journalled = true;
    return 0;
}

static int checks(struct in *s, bool *proceed, struct lb_error *err)
{
    struct lb_report rep = {0};
    bool refused;
    int rc;

    *proceed = false;
    lb_preflight_dest(&s->desc, &s->cfg, s->env->state_dir, s->req->hello->wall_ms, &rep);
    refused = lb_report_refused(&rep);
    if (!refused && !s->req->dry_run) {
        s->vm_lock = lb_vm_lock(s->env->state_dir, s->entry.name, err);
        if (s->vm_lock < 0) {
            lb_report_free(&rep);
            return -1;
        }
    }
    rc = send_report(s, &rep, refused, err);
    lb_report_free(&rep);
    *proceed = !refused && !s->req->dry_run;
    return rc;
}

static int migration(struct in *s, struct lb_error *err)
{
    bool proceed;

    if (lb_config_load(s->env->config_path, &s->cfg, err))
        return -1;
    s->have_cfg = true;
    if (checks(s, &proceed, err))
        return -1;
    if (!proceed)
        return 0;
    s->ctl = lb_ctl_queue_start(s->chan, on_event, s);
    if (!s->ctl)
        return lb_fail(err, LB_E_INTERNAL, "cannot start a thread");
    report(s, "launching", 2);
    if (register_incoming(s, err) || launch(s, err))
        return -1;
    if (s->env->want_conns(s->req->session_id.data, s->entry.name, err, s->env->arg))
        return -1;
    if (send_ready(s, err) || map_blocks(s, err) || accept_bulk(s, err))
        return -1;
    report(s, "receiving", 5);
    lb_point("dst-receive");
    if (receive(s, err) || load(s, err))
        return -1;
    if (commit(s, err))
        return -1;
    late_frames(s, 0);
    settle(s);
    late_frames(s, 1000);
    return 0;
}

/* May the receiver be thrown away? Not when the file says RUNNING, or might: a write that
 * failed can have reached the disk. What we leave is recovery's, which reads it again. */
static bool may_discard(const struct in *s)
{
    struct lb_journal now = {0};

    if (s->journal.state == LB_J_RUNNING)
        return false;
    return !s->journalled || (!lb_journal_load(s->env->state_dir, s->journal.token, &now, NULL) &&
                              now.state != LB_J_RUNNING);
}

static int serve_migration(const struct lb_session_env *env, struct lb_chan *chan,
                           const char *peer, Lb__MigrateRequest *req, char *vm_name,
                           struct lb_error *err)
{
    struct in s = {.env = env, .chan = chan, .peer = peer, .req = req, .vm_lock = -1};
    struct lb_error local = LB_ERROR_INIT;
    int rc;

    if (check_request(req, err))
        return -1;
    s.t_start = lb_now_ns();
    s.started_wall_ms = lb_wall_ms();
    pthread_mutex_init(&s.mu, NULL);
    pthread_cond_init(&s.cond, NULL);
    snprintf(vm_name, 128, "%s", req->vm->name);
    snprintf(s.entry.name, sizeof(s.entry.name), "%s", req->vm->name);
    lb_hex(s.journal.token, req->token.data, LB_TOKEN_BYTES);
    snprintf(s.journal.vm, sizeof(s.journal.vm), "%s", req->vm->name);
    snprintf(s.journal.peer, sizeof(s.journal.peer), "%s", peer);
    rc = lb_desc_from_proto(req->vm, &s.desc, &local);
    if (!rc)
        rc = migration(&s, &local);
    if (rc) {
        lb_log_error(LB_LOG_ERROR, &local);
        if (s.journal.state != LB_J_RUNNING)
            lb_ctl_send_failure(chan, &local, NULL);
    }
    lb_receiver_free(s.recv);
    if (rc && may_discard(&s)) {
        if (s.vm)
            lb_hv_destroy(LB_STEAL_PTR(s.vm), NULL); /* discard makes sure */
        if (s.registered && lb_receiver_discard(env, &s.entry, &local))
            lb_log_error(LB_LOG_ERROR, &local);
    }
    lb_ctl_queue_stop(s.ctl);
    lb_hv_detach(s.vm);
    if (s.vm_lock >= 0)
        close(s.vm_lock);
    if (s.have_cfg)
        lb_config_free(&s.cfg);
    lb_vm_desc_free(&s.desc);
    free(s.map);
    free(s.map_pages);
    pthread_cond_destroy(&s.cond);
    pthread_mutex_destroy(&s.mu);
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
    default:
        rc = lb_fail(err, LB_E_PROTO, "the peer opened with control message %d",
                     (int)m->kind_case);
    }
    lb__control__free_unpacked(m, NULL);
    return rc;
}
