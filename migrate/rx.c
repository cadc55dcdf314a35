/*
 * migrate/rx.c - the first half of a destination's session, shared by migration and protection.
 *
 * Nothing that a peer sends is believed: lengths and numbers are checked here, names and texts
 * in desc_proto.c, records in bulk.c against the block table agreed here.
 */
#include "migrate/rx.h"

#include "netproto/desc_proto.h"
#include "migrate/migrate_internal.h"

#include <errno.h>
#include <string.h>

#define TABLE_TIMEOUT_NS UINT64_C(60000000000)
#define CONN_TIMEOUT_NS UINT64_C(15000000000)
#define SILENT_TIMEOUT_NS UINT64_C(300000000000) /* bulk: the source was stopped, or forgot us */
#define LOCK_PATIENCE_MS 2000u
#define TICK_NS UINT64_C(200000000)
#define REPLACE_TICK_NS UINT64_C(20000000)
#define MAX_BAD_RUNS 1024u
#define GREETING_MS 10000u
#define MAX_BLOCKS 512u
#define MAX_CHANNELS 64u

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
    if (r->protect && r->protect->id.len != LB_TOKEN_BYTES)
        return lb_fail(err, LB_E_PROTO, "the peer's protection has no id");
    return 0;
}

int lb_rx_open(struct lb_rx *r, const struct lb_session_env *env, struct lb_chan *chan,
               const char *peer, const Lb__MigrateRequest *req, struct lb_error *err)
{
    pthread_condattr_t ca;

    *r = (struct lb_rx){.env = env, .chan = chan, .peer = peer, .req = req, .vm_lock = -1,
                        .confirmed = -1};
    lb_mutex_init_inherit(&r->mu);
    pthread_condattr_init(&ca);
    pthread_condattr_setclock(&ca, CLOCK_MONOTONIC);
    pthread_cond_init(&r->cond, &ca);
    pthread_condattr_destroy(&ca);
    if (check_request(req, err))
        return -1;
    snprintf(r->entry.name, sizeof(r->entry.name), "%s", req->vm->name);
    lb_hex(r->journal.token, req->protect ? req->protect->id.data : req->token.data,
           LB_TOKEN_BYTES);
    snprintf(r->journal.vm, sizeof(r->journal.vm), "%s", req->vm->name);
    snprintf(r->journal.peer, sizeof(r->journal.peer), "%s", peer);
    if (lb_desc_from_proto(req->vm, &r->desc, err) ||
        lb_config_load(env->config_path, &r->cfg, err))
        return -1;
    r->have_cfg = true;
    return 0;
}

static int send_report(struct lb_rx *r, const struct lb_report *rep, bool refused,
                       struct lb_error *err)
{
    Lb__Control m = LB__CONTROL__INIT;
    Lb__PreflightReport pr = LB__PREFLIGHT_REPORT__INIT;
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
    lb_ctl_hello(&h, &r->cfg);
    pr.hello = &h;
    pr.n_checks = rep->n;
    pr.checks = pv;
    pr.refused = refused;
    m.kind_case = LB__CONTROL__KIND_PREFLIGHT_REPORT;
    m.preflight_report = &pr;
    return lb_ctl_send(r->chan, &m, err);
}

void lb_rx_wake(void *arg)
{
    struct lb_rx *r = arg;

    pthread_mutex_lock(&r->mu);
    r->events++;
    pthread_cond_broadcast(&r->cond);
    pthread_mutex_unlock(&r->mu);
}

int lb_rx_listen(struct lb_rx *r, bool (*tap)(const Lb__Control *m, void *arg), void *arg,
                 struct lb_error *err)
{
    r->ctl = lb_ctl_queue_start_first(r->chan, tap, arg, lb_rx_wake, r);
    return r->ctl ? 0 : lb_fail(err, LB_E_INTERNAL, "cannot start a thread");
}

void lb_rx_transport(struct lb_rx *r, struct lb_report *rep)
{
    struct lb_rdma_addr mine[LB_RDMA_MAX_ADDRS];

    lb_transport_choose(r->req->transport, mine, lb_rdma_addresses(mine, LB_ARRAY_LEN(mine)),
                        &r->transport, rep);
}

int lb_rx_decide(struct lb_rx *r, const struct lb_report *rep, bool *proceed, struct lb_error *err)
{
    bool refused = lb_report_refused(rep);

    *proceed = false;
    if (!refused && !r->req->dry_run) {
        /* A session that has just let the VM go to another host, or removed a standby, may be about to end. */
        r->vm_lock = lb_vm_lock_patiently(r->env->state_dir, r->entry.name, LOCK_PATIENCE_MS, err);
        if (r->vm_lock < 0)
            return -1;
    }
    if (send_report(r, rep, refused, err))
        return -1;
    *proceed = !refused && !r->req->dry_run;
    return 0;
}

/* Looked at with the lock in hand: since the preflight check another VM may have got the
 * name, and a peer may send the token of an earlier hand-over again. */
static int check_fresh(struct lb_rx *r, struct lb_error *err)
{
    struct lb_vm_entry other;
    struct lb_journal used = {0};
    struct lb_error why = LB_ERROR_INIT;

    if (!lb_vm_entry_load(r->env->state_dir, r->entry.name, &other, &why)) {
        lb_fail(err, LB_E_EXISTS, "a VM named %s is already here (%s)", r->entry.name,
                lb_vm_state_name(other.state));
        return lb_remedy(err, "on the destination: `lifeboat status %s`; give one of the two "
                              "another name", r->entry.name);
    }
    if (why.code != LB_E_NOT_FOUND) {
        if (err)
            *err = why;
        return -1;
    }
    if (lb_journal_load(r->env->state_dir, r->journal.token, &used, err))
        return -1;
    if (used.state != LB_J_NONE) {
        lb_fail(err, LB_E_PROTO, "the token was used before (%s)",
                lb_journal_state_name(used.state));
        return lb_remedy(err, "try again: every migration and every protection makes a token of its own");
    }
    return 0;
}

/* Where it has been, and now the source too. Who made a list of nonsense gets none. */
static void note_way(struct lb_rx *r)
{
    char key[LB_KEY_TEXT_BYTES];
    uint8_t raw[LB_KEY_BYTES];

    for (size_t i = 0; i < r->req->n_came_by; i++)
        if (!lb_key_parse(r->req->came_by[i], raw, NULL)) {
            lb_key_format(key, raw);
            lb_came_by_add(r->entry.came_by, key);
        }
    lb_key_format(key, lb_chan_peer_key(r->chan));
    lb_came_by_add(r->entry.came_by, key);
}

int lb_rx_register(struct lb_rx *r, enum lb_vm_state state, struct lb_error *err)
{
    LB_AUTO_FREE char *qmp = lb_vm_qmp_path(r->env->state_dir, r->entry.name);

    if (check_fresh(r, err))
        return -1;
    note_way(r);
    r->entry.state = state;
    /* By which the receiver is found, should we die before it is known. */
    snprintf(r->entry.qmp_path, sizeof(r->entry.qmp_path), "%s", qmp);
    snprintf(r->entry.hypervisor, sizeof(r->entry.hypervisor), "%s", r->env->hv->name);
    snprintf(r->entry.origin, sizeof(r->entry.origin), "migrated");
    snprintf(r->entry.token, sizeof(r->entry.token), "%s", r->journal.token);
    snprintf(r->entry.peer, sizeof(r->entry.peer), "%s", r->peer);
    r->entry.created_ms = lb_wall_ms();
    if (lb_vm_entry_save(r->env->state_dir, &r->entry, err))
        return -1;
    r->registered = true;
    /* Before the pause, not in it: PREPARED means that a receiver may be there. */
    if (lb_journal_move(r->env->state_dir, &r->journal, LB_J_PREPARED, err))
        return -1;
    r->journalled = true;
    return 0;
}

/* -------------------------------------------------------------------- launch */

int lb_rx_launch(struct lb_rx *r, struct lb_error *err)
{
    LB_AUTO_FREE char *dir = lb_vm_dir(r->env->state_dir, r->entry.name, true);
    struct lb_launch_opts lo = {.name = r->entry.name, .run_dir = dir, .paths = r->cfg.paths,
                                .n_paths = r->cfg.n_paths, .taps = r->cfg.taps,
                                .n_taps = r->cfg.n_taps};
    const char *emu = lb_map_name(r->cfg.emulators, r->cfg.n_emulators, r->desc.emulator);
    struct lb_vm_ident id;
    struct lb_vm_desc mine = {0};
    int rc;

    lo.emulator = emu;
    if (lb_hv_launch(r->env->hv, &r->desc, &lo, &r->vm, err))
        return -1;
    lb_hv_ident(r->vm, &id);
    r->entry.proc = id.proc;
    snprintf(r->entry.qmp_path, sizeof(r->entry.qmp_path), "%s", id.qmp_path ? id.qmp_path : "");
    if (lb_vm_entry_save(r->env->state_dir, &r->entry, err))
        return -1;
    lb_point("dst-launched");
    if (lb_hv_describe(r->vm, &mine, err))
        return -1;
    rc = lb_cpu_features_check(r->desc.features, mine.features, err);
    lb_vm_desc_free(&mine);
    if (rc)
        return -1;
    if (lb_hv_blocks(r->vm, &r->blocks, &r->n_blocks, err))
        return -1;
    return lb_hv_prepare_ram(r->vm, err);
}

/* Without, the source takes TCP, or says that it cannot. */
static void listen_rdma(struct lb_rx *r)
{
    struct lb_transport_choice *c = &r->transport;
    struct lb_error e = LB_ERROR_INIT;

    if (c->rdma && lb_rdma_listen(c->at, c->n, r->req->session_id.data, &r->rdma, &e)) {
        lb_log_error(LB_LOG_WARN, &e);
        memset(c, 0, sizeof(*c));
    }
}

int lb_rx_ready(struct lb_rx *r, struct lb_error *err)
{
    Lb__Control m = LB__CONTROL__INIT;
    Lb__Ready ready = LB__READY__INIT;
    int rc;

    listen_rdma(r);
    ready.n_rdma = r->transport.n;
    ready.rdma = lb_rdma_addrs_pack(r->transport.at, r->transport.n);
    ready.zero_copy = r->transport.zero_copy;
    m.kind_case = LB__CONTROL__KIND_READY;
    m.ready = &ready;
    rc = lb_ctl_send(r->chan, &m, err);
    lb_rdma_addrs_free(ready.rdma, r->transport.n);
    return rc;
}

static const struct lb_ram_block *find_block(struct lb_rx *r, const char *name)
{
    for (unsigned i = 0; i < r->n_blocks; i++)
        if (!strcmp(r->blocks[i].name, name))
            return &r->blocks[i];
    return NULL;
}

/* The only main block under another name is still the main block. */
static const struct lb_ram_block *only_main(struct lb_rx *r, const Lb__BlockTable *t)
{
    const struct lb_ram_block *found = NULL;
    unsigned theirs = 0;

    for (size_t i = 0; i < t->n_blocks; i++)
        theirs += t->blocks[i]->kind == LB_RAM_MAIN;
    for (unsigned i = 0; i < r->n_blocks; i++)
        if (r->blocks[i].kind == LB_RAM_MAIN) {
            if (found)
                return NULL;
            found = &r->blocks[i];
        }
    return theirs == 1 ? found : NULL;
}

static int map_rom(struct lb_rx *r, const Lb__RamBlock *b, const struct lb_ram_block *mine,
                   bool *want, struct lb_error *err)
{
    uint8_t d[16];

    *want = false;
    if (!mine || !mine->hva || b->digest.len != 16) {
        lb_log(LB_LOG_DEBUG, "ROM %s cannot be compared", b->name);
        return 0;
    }
    if (mine->size_bytes == b->size_bytes) {
        if (lb_block_digest(r->vm, mine, d, err))
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

int lb_rx_map_blocks(struct lb_rx *r, struct lb_error *err)
{
    Lb__Control *m = NULL, out = LB__CONTROL__INIT;
    Lb__BlockTableOk ok = LB__BLOCK_TABLE_OK__INIT;
    LB_AUTO_FREE uint32_t *roms = NULL;
    const Lb__BlockTable *t;
    int rc = 0;

    if (lb_ctl_queue_expect(r->ctl, LB__CONTROL__KIND_BLOCK_TABLE, &m,
                            lb_now_ns() + TABLE_TIMEOUT_NS, err))
        return -1;
    t = m->block_table;
    if (t->n_blocks > MAX_BLOCKS) {
        lb__control__free_unpacked(m, NULL);
        return lb_fail(err, LB_E_PROTO, "the peer has too many RAM blocks");
    }
    r->n_map = (unsigned)t->n_blocks;
    r->map = lb_alloc(sizeof(*r->map) * (r->n_map + 1));
    r->map_pages = lb_alloc(sizeof(*r->map_pages) * (r->n_map + 1));
    roms = lb_alloc(sizeof(*roms) * (r->n_map + 1));
    for (unsigned i = 0; i < r->n_map && !rc; i++) {
        const Lb__RamBlock *b = t->blocks[i];
        const struct lb_ram_block *mine = find_block(r, b->name);
        bool want = true;

        if (b->id != i) {
            rc = lb_fail(err, LB_E_PROTO, "the peer numbers its RAM blocks wrongly");
            break;
        }
        if (b->kind == LB_RAM_ROM) {
            rc = map_rom(r, b, mine, &want, err);
            if (want && !rc)
                roms[ok.n_send_rom++] = i;
            if (!want)
                continue;
        } else if (!mine && b->kind == LB_RAM_MAIN) {
            mine = only_main(r, t);
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
        r->map[i] = mine;
        r->map_pages[i] = mine->size_bytes >> LB_PAGE_SHIFT;
    }
    lb__control__free_unpacked(m, NULL);
    if (rc)
        return -1;
    ok.send_rom = roms;
    out.kind_case = LB__CONTROL__KIND_BLOCK_TABLE_OK;
    out.block_table_ok = &ok;
    return lb_ctl_send(r->chan, &out, err);
}

/* A connection of either kind, if there is one now; both are asked, the source may have fallen back. */
static struct lb_transport *any_conn(struct lb_rx *r, unsigned wait_ms)
{
    struct lb_error e = LB_ERROR_INIT;
    struct lb_transport *t = NULL;
    int fd;

    if (r->rdma && !lb_rdma_accept(r->rdma, wait_ms, &t, &e))
        return t;
    if (e.code && e.sys_errno != ETIMEDOUT)
        lb_log_error(LB_LOG_WARN, &e);
    fd = r->env->take_conn(r->rdma ? 0 : wait_ms, NULL, r->env->arg);
    return fd >= 0 ? lb_tcp_from_fd(fd) : NULL;
}

/* The source may give up while we wait for its connection. */
static struct lb_transport *next_conn(struct lb_rx *r, struct lb_error *err)
{
    uint64_t until = lb_now_ns() + CONN_TIMEOUT_NS;

    for (;;) {
        struct lb_transport *t = any_conn(r, r->rdma ? 10 : 100);

        if (t)
            return t;
        if (lb_ctl_queue_ended(r->ctl, err))
            return NULL;
        if (lb_now_ns() > until) {
            lb_fail(err, LB_E_NET, "the source's bulk connection did not come");
            lb_remedy(err, "see whether something between the hosts limits connections");
            return NULL;
        }
    }
}

/* Takes over t. Greeting and limits; *index as the source says. */
static int open_conn(struct lb_rx *r, struct lb_transport *t, uint32_t *index, struct lb_bulk **out,
                     struct lb_error *err)
{
    struct lb_bulk_keys k = {.cipher = (enum lb_cipher)r->req->cipher};
    int rc;

    memcpy(k.secret, r->req->bulk_secret.data, sizeof(k.secret));
    memcpy(k.session_id, r->req->session_id.data, sizeof(k.session_id));
    rc = lb_bulk_accept(t, &k, GREETING_MS, index, out, err);
    memset(&k, 0, sizeof(k));
    if (!rc && lb_bulk_set_blocks(*out, r->map_pages, r->n_map, err)) {
        lb_bulk_close(*out);
        rc = -1;
    }
    return rc;
}

/* A connection in place of an RDMA one that broke. Its failure is its own: the source tries again or ends. */
static void take_replacement(struct lb_rx *r)
{
    struct lb_transport *t = any_conn(r, 0);
    struct lb_error e = LB_ERROR_INIT;
    struct lb_bulk *b;
    uint32_t index;

    if (t && (open_conn(r, t, &index, &b, &e) || lb_receiver_replace(r->recv, index, b, &e)))
        lb_log_error(LB_LOG_WARN, &e);
}

/* 1: an RDMA connection through which nothing comes. The source comes again, over TCP if it may, or ends. */
static int accept_one(struct lb_rx *r, struct lb_error *err)
{
    struct lb_error e = LB_ERROR_INIT;
    struct lb_bulk *b = NULL;
    uint32_t index = 0;
    struct lb_transport *t = next_conn(r, err);
    bool rdma = t && lb_rdma_is(t);

    if (!t)
        return -1;
    if (open_conn(r, t, &index, &b, &e)) {
        bool again = rdma && e.code == LB_E_NET;

        if (again)
            lb_log_error(LB_LOG_WARN, &e);
        else
            *err = e;
        return again ? 1 : -1;
    }
    if (index >= r->n_conns || r->conns[index]) {
        lb_bulk_close(b);
        return lb_fail(err, LB_E_PROTO, "bulk connection %u of %u came twice or is too many", index,
                       r->n_conns);
    }
    r->conns[index] = b;
    r->replaceable |= rdma;
    return 0;
}

int lb_rx_accept(struct lb_rx *r, unsigned n, struct lb_error *err)
{
    int rc = 0;

    r->conns = lb_alloc(sizeof(*r->conns) * n);
    r->n_conns = n;
    for (unsigned i = 0; i < n && rc >= 0; i += rc == 0)
        rc = accept_one(r, err);
    lb_rdma_listener_close(LB_STEAL_PTR(r->rdma)); /* what replaces a connection is TCP */
    return rc < 0 ? -1 : 0;
}

int lb_rx_start(struct lb_rx *r, unsigned n, struct lb_error *err)
{
    return lb_receiver_new(r->vm, r->map, r->n_map, r->conns, n, r->transport.zero_copy,
                           lb_rx_wake, r, &r->recv, err);
}

/* ------------------------------------------------------------------- receive */

static int send_round_done(struct lb_rx *r, uint32_t round, struct lb_error *err)
{
    Lb__Control m = LB__CONTROL__INIT;
    Lb__RoundDone d = LB__ROUND_DONE__INIT;
    LB_AUTO_FREE struct lb_bad_run *bad = lb_alloc(sizeof(*bad) * MAX_BAD_RUNS);
    LB_AUTO_FREE Lb__BadRun *v = lb_alloc(sizeof(*v) * MAX_BAD_RUNS);
    LB_AUTO_FREE Lb__BadRun **pv = lb_alloc(sizeof(*pv) * MAX_BAD_RUNS);
    unsigned n = 0;

    lb_receiver_bad(r->recv, bad, MAX_BAD_RUNS, &n);
    for (unsigned i = 0; i < n; i++) {
        lb__bad_run__init(&v[i]);
        v[i].block = bad[i].block;
        v[i].first = bad[i].run.first;
        v[i].count = bad[i].run.count;
        pv[i] = &v[i];
    }
    d.n_bad = n;
    d.bad = pv;
    d.round = round;
    d.pages = lb_receiver_pages(r->recv);
    m.kind_case = LB__CONTROL__KIND_ROUND_DONE;
    m.round_done = &d;
    return lb_ctl_send(r->chan, &m, err);
}

unsigned lb_rx_events(struct lb_rx *r)
{
    unsigned n;

    pthread_mutex_lock(&r->mu);
    n = r->events;
    pthread_mutex_unlock(&r->mu);
    return n;
}

void lb_rx_wait(struct lb_rx *r, unsigned seen, uint64_t until_ns)
{
    struct timespec ts = {(time_t)(until_ns / 1000000000u), (long)(until_ns % 1000000000u)};

    pthread_mutex_lock(&r->mu);
    while (r->events == seen && !pthread_cond_timedwait(&r->cond, &r->mu, &ts))
        ;
    pthread_mutex_unlock(&r->mu);
}

/* The control channel knows the reason; a broken bulk connection only the fact. */
static void better_reason(struct lb_rx *r, struct lb_error *err)
{
    struct lb_error why = LB_ERROR_INIT;

    for (int i = 0; i < 20 && !lb_ctl_queue_ended(r->ctl, &why); i++)
        lb_sleep_ms(10);
    if (why.code == LB_E_CANCELLED && err)
        *err = why;
}

static int confirm(struct lb_rx *r, int64_t round, struct lb_error *err)
{
    if (send_round_done(r, (uint32_t)round, err))
        return -1;
    r->confirmed = round;
    lb_point("dst-round");
    return 0;
}

int lb_rx_receive(struct lb_rx *r, int (*tick)(void *arg, struct lb_error *err), void *arg,
                  struct lb_error *err)
{
    struct lb_vm_ident id = lb_entry_ident(&r->entry);
    uint64_t pages = 0, t_life = lb_now_ns();

    for (;;) {
        unsigned seen = lb_rx_events(r);
        int64_t round;
        bool ended;
        int life;

        if (lb_receiver_poll(r->recv, &round, &ended, err)) {
            better_reason(r, err);
            return -1;
        }
        if (lb_ctl_queue_ended(r->ctl, err))
            return -1;
        if (ended) {
            r->rounds = (uint32_t)round;
            return 0;
        }
        life = tick(arg, err);
        if (life < 0)
            return -1;
        if (life || lb_receiver_pages(r->recv) != pages || round > r->confirmed) {
            pages = lb_receiver_pages(r->recv);
            t_life = lb_now_ns();
        } else if (lb_now_ns() - t_life > SILENT_TIMEOUT_NS) {
            lb_fail(err, LB_E_NET, "the source has sent nothing for %u s",
                    (unsigned)(SILENT_TIMEOUT_NS / 1000000000u));
            return lb_remedy(err, "see whether its session hangs or was stopped, then try again");
        }
        if (round > r->confirmed && confirm(r, round, err))
            return -1;
        if (r->replaceable)
            take_replacement(r);
        lb_rx_wait(r, seen, lb_now_ns() + (r->replaceable ? REPLACE_TICK_NS : TICK_NS));
        if (!lb_hv_exists(r->env->hv, &id)) {
            lb_fail(err, LB_E_HV, "the receiving process of VM %s died", r->entry.name);
            return lb_remedy(err, "see vms/%s/qemu.log in the state directory of this host",
                             r->entry.name);
        }
    }
}

/* ----------------------------------------------------------------------- end */

/* May the receiver be thrown away? Not when the file says RUNNING, or might: a write that
 * failed can have reached the disk. What we leave is recovery's, which reads it again. */
static bool may_discard(const struct lb_rx *r)
{
    struct lb_journal now = {0};

    if (r->journal.state == LB_J_RUNNING)
        return false;
    return !r->journalled || (!lb_journal_load(r->env->state_dir, r->journal.token, &now, NULL) &&
                              now.state != LB_J_RUNNING);
}

bool lb_rx_discard(struct lb_rx *r)
{
    struct lb_error e = LB_ERROR_INIT;

    lb_receiver_free(LB_STEAL_PTR(r->recv)); /* its workers write to the memory */
    if (!may_discard(r))
        return false;
    if (r->vm)
        lb_hv_destroy(LB_STEAL_PTR(r->vm), NULL); /* the next makes sure */
    if (!r->registered)
        return false;
    if (!lb_receiver_discard(r->env, &r->entry, &e))
        return true;
    lb_log_error(LB_LOG_ERROR, &e);
    return false;
}

void lb_rx_close(struct lb_rx *r)
{
    lb_receiver_free(r->recv);
    for (unsigned i = 0; i < r->n_conns; i++)
        lb_bulk_close(r->conns[i]);
    free(r->conns);
    lb_rdma_listener_close(r->rdma);
    lb_ctl_queue_stop(r->ctl);
    lb_hv_detach(r->vm);
    if (r->vm_lock >= 0)
        close(r->vm_lock);
    if (r->have_cfg)
        lb_config_free(&r->cfg);
    lb_vm_desc_free(&r->desc);
    free(r->map);
    free(r->map_pages);
    pthread_cond_destroy(&r->cond);
    pthread_mutex_destroy(&r->mu);
}
