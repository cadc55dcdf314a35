/*
 * migrate/tx.c - see tx.h.
 *
 * The dirty log is started while the destination launches its receiver: the time until
 * Ready is a free sample of the guest's dirty rate. The log is fetched and cleared only
 * with the guest paused: with its disk I/O drained, no DMA can be in flight whose page was
 * already looked at (DESIGN 2a).
 */
#include "migrate/tx.h"

#include "netproto/desc_proto.h"
#include "migrate/migrate_internal.h"

#include <errno.h>
#include <poll.h>
#include <sodium.h>
#include <string.h>
#include <sys/eventfd.h>

#define SETUP_TIMEOUT_NS UINT64_C(60000000000)
#define CONNECT_MS 10000u
#define AUTO_RDMA_MS 4000u /* to connect where TCP does as well, for all addresses together */

void lb_tx_init(struct lb_tx *t, const struct lb_session_env *env, const struct lb_host *to,
                const struct lb_vm_entry *entry, const struct lb_migrate_opts *opts)
{
    memset(t, 0, sizeof(*t));
    t->env = env;
    t->to = to;
    t->entry = entry;
    t->opts = opts;
    t->watcher_stop = -1;
    t->keys.cipher = opts->insecure_plaintext ? LB_CIPHER_NONE : lb_cipher_preferred();
    randombytes_buf(t->keys.secret, sizeof(t->keys.secret));
    memcpy(t->keys.session_id, env->session_id, LB_SESSION_ID_BYTES);
    lb_mutex_init_inherit(&t->mu);
}

void lb_tx_hang_up(struct lb_tx *t)
{
    pthread_mutex_lock(&t->mu);
    t->abort_ctl = NULL;
    pthread_mutex_unlock(&t->mu);
    lb_ctl_queue_stop(t->ctl);
    t->ctl = NULL;
}

void lb_tx_close(struct lb_tx *t)
{
    pthread_mutex_lock(&t->mu);
    t->abort_sender = NULL;
    pthread_mutex_unlock(&t->mu);
    lb_tx_hang_up(t);
    if (t->watching) {
        uint64_t one = 1;

        if (write(t->watcher_stop, &one, sizeof(one)) == sizeof(one))
            pthread_join(t->watcher, NULL);
    }
    if (t->watcher_stop >= 0)
        close(t->watcher_stop);
    lb_sender_free(t->sender);
    lb_chan_close(t->chan);
    lb_hv_detach(t->vm);
    for (unsigned b = 0; b < t->n_blocks && t->dirty; b++)
        lb_bitmap_free(&t->dirty[b]);
    free(t->dirty);
    lb_vm_desc_free(&t->desc);
    if (t->last_done)
        lb__control__free_unpacked(t->last_done, NULL);
    lb_transport_wish_free(t->wish);
    if (t->have_cfg)
        lb_config_free(&t->cfg);
    sodium_memzero(&t->keys, sizeof(t->keys));
    pthread_mutex_destroy(&t->mu);
}

/* ------------------------------------------------------- being told to stop */

static void interrupt(struct lb_tx *t, bool cancel)
{
    pthread_mutex_lock(&t->mu);
    if (!t->decided) {
        t->cancelled |= cancel;
        t->aborting = true;
        if (t->abort_sender)
            lb_sender_abort(t->abort_sender);
        if (cancel && t->abort_ctl)
            lb_ctl_queue_interrupt(t->abort_ctl);
    }
    pthread_mutex_unlock(&t->mu);
    if (t->on_interrupt)
        t->on_interrupt(cancel, t->arg);
}

static void channel_ended(void *arg)
{
    interrupt(arg, false);
}

static void *watcher_main(void *arg)
{
    struct lb_tx *t = arg;
    struct pollfd p[2] = {{.fd = t->env->cancel_fd, .events = POLLIN},
                          {.fd = t->watcher_stop, .events = POLLIN}};

    for (;;) {
        if (poll(p, 2, -1) < 0 && errno != EINTR)
            return NULL;
        if (p[1].revents)
            return NULL;
        if (p[0].revents) {
            interrupt(t, true);
            return NULL;
        }
    }
}

/* An error that only says "connection aborted" hides who aborted and why. */
int lb_tx_explain(struct lb_tx *t, struct lb_error *err)
{
    struct lb_error why = LB_ERROR_INIT;
    bool cancelled;

    pthread_mutex_lock(&t->mu);
    /* A connect that watches the descriptor itself may be ahead of the watcher thread. */
    cancelled = t->cancelled || (!t->decided && lb_readable(t->env->cancel_fd, 0));
    pthread_mutex_unlock(&t->mu);
    if (cancelled) {
        lb_fail(err, LB_E_CANCELLED, "%s of %s cancelled", t->what, t->entry->name);
        return lb_remedy(err, "the VM runs here; %s again when it suits", t->verb);
    }
    if (err && (err->code == LB_E_NET || err->code == LB_E_CANCELLED) && t->ctl) {
        /* The peer's reason may be a moment behind the broken bulk connection. */
        for (int i = 0; i < 20 && !lb_ctl_queue_ended(t->ctl, &why); i++)
            lb_sleep_ms(10);
        if (lb_ctl_queue_ended(t->ctl, &why)) {
            *err = why;
            if (why.code == LB_E_NET) {
                lb_context(err, "connection to host %s", t->to->name);
                if (!err->remedy[0])
                    lb_remedy(err, "see whether lifeboatd runs on %s and what its log says",
                              t->to->name);
            }
        }
    }
    return -1;
}

int lb_tx_check_interrupt(struct lb_tx *t, struct lb_error *err)
{
    bool aborting;

    pthread_mutex_lock(&t->mu);
    aborting = t->aborting;
    pthread_mutex_unlock(&t->mu);
    if (!aborting)
        return 0;
    lb_fail(err, LB_E_NET, "interrupted");
    return lb_tx_explain(t, err);
}

/* -------------------------------------------------- attach, connect, preflight */

void lb_tx_show_report(const struct lb_session_env *env, const struct lb_report *mine,
                       const Lb__PreflightReport *theirs)
{
    struct lb_report all = {0};
    LB_AUTO_FREE char *json = NULL;

    for (unsigned i = 0; mine && i < mine->n; i++)
        lb_report_add(&all, mine->v[i].id, mine->v[i].status, mine->v[i].remedy, "%s",
                      mine->v[i].message);
    for (size_t i = 0; theirs && i < theirs->n_checks; i++) {
        const Lb__Check *c = theirs->checks[i];
        bool said = false;

        /* both ends look at the description: once is enough when all is well */
        for (unsigned k = 0; mine && k < mine->n; k++)
            said |= !strcmp(mine->v[k].id, c->id) && mine->v[k].status == LB_CHECK_OK;
        if (said && !strcmp(c->status, "ok"))
            continue;
        lb_report_add(&all, c->id,
                      !strcmp(c->status, "fail")   ? LB_CHECK_FAIL
                      : !strcmp(c->status, "warn") ? LB_CHECK_WARN
                                                   : LB_CHECK_OK,
                      c->remedy, "%s", c->message);
    }
    json = lb_report_json(&all);
    if (env->preflight && json)
        env->preflight(json, env->arg);
    lb_report_free(&all);
}

static int attach_vm(struct lb_tx *t, struct lb_report *mine, struct lb_error *err)
{
    struct lb_vm_ident id = lb_entry_ident(t->entry);
    bool alive, running;

    if (lb_hv_attach(t->env->hv, &id, &t->vm, err))
        return -1;
    if (lb_hv_status(t->vm, &alive, &running, err))
        return -1;
    if (!running) {
        lb_fail(err, LB_E_STATE, "VM %s is paused", t->entry->name);
        return lb_remedy(err, "continue it first (QMP `cont`), then %s", t->verb);
    }
    if (lb_hv_describe(t->vm, &t->desc, err))
        return -1;
    free(t->desc.name);
    t->desc.name = lb_strdup(t->entry->name);
    lb_preflight_source(&t->desc, mine);
    return 0;
}

/* The words of the entry's list; a word and its blank are two bytes at least. */
static size_t came_by(char *list, char **v)
{
    char *save = NULL;
    size_t n = 0;

    for (char *key = strtok_r(list, " ", &save); key; key = strtok_r(NULL, " ", &save))
        v[n++] = key;
    return n;
}

static int request(struct lb_tx *t, struct lb_error *err)
{
    LB_AUTO_FREE char *list = lb_strdup(t->entry->came_by);
    char *keys[LB_CAME_BY_BYTES / 2];
    Lb__Control m = LB__CONTROL__INIT;
    Lb__MigrateRequest r = LB__MIGRATE_REQUEST__INIT;
    Lb__Hello h = LB__HELLO__INIT;
    Lb__VmDescription *d = NULL;
    int rc;

    if (lb_desc_to_proto(&t->desc, &d, err))
        return -1;
    lb_ctl_hello(&h, &t->cfg);
    r.hello = &h;
    r.session_id = (ProtobufCBinaryData){LB_SESSION_ID_BYTES, t->keys.session_id};
    r.token = (ProtobufCBinaryData){sizeof(t->token), t->token};
    r.vm = d;
    r.dry_run = t->opts->dry_run;
    r.channels = t->n_threads;
    r.cipher = t->keys.cipher;
    r.bulk_secret = (ProtobufCBinaryData){sizeof(t->keys.secret), t->keys.secret};
    r.verify = t->opts->verify;
    r.protect = t->protect;
    r.transport = t->wish;
    r.wish_json = (char *)(t->opts->wish_json && !t->protect ? t->opts->wish_json : "");
    r.n_came_by = came_by(list, keys);
    r.came_by = keys;
    m.kind_case = LB__CONTROL__KIND_MIGRATE_REQUEST;
    m.migrate_request = &r;
    rc = lb_ctl_send(t->chan, &m, err);
    lb__vm_description__free_unpacked(d, NULL);
    return rc;
}

/* A destination that does not know what a wish is would lose it without a word. */
static int check_wish_heard(struct lb_tx *t, const Lb__PreflightReport *rep, struct lb_error *err)
{
    for (size_t i = 0; i < rep->n_checks; i++)
        if (!strcmp(rep->checks[i]->id, "protection"))
            return 0;
    lb_fail(err, LB_E_PREFLIGHT, "protection: host %s would not protect VM %s again", t->to->name,
            t->entry->name);
    return lb_remedy(err, "run the same Lifeboat version there, or `lifeboat unprotect %s` first",
                     t->entry->name);
}

int lb_tx_preflight(struct lb_tx *t, const struct lb_report *mine, struct lb_error *err)
{
    Lb__Control *m = NULL;
    bool refused = lb_report_refused(mine);
    int rc = 0;

    if (request(t, err))
        return -1;
    if (lb_ctl_queue_expect(t->ctl, LB__CONTROL__KIND_PREFLIGHT_REPORT, &m,
                            lb_now_ns() + SETUP_TIMEOUT_NS, err))
        return lb_tx_explain(t, err);
    lb_tx_show_report(t->env, mine, m->preflight_report);
    if (t->opts->wish_json && !t->protect && !refused && !m->preflight_report->refused)
        rc = check_wish_heard(t, m->preflight_report, err);
    if (rc) {
        /* err says it */
    } else if (refused) {
        for (unsigned i = 0; i < mine->n; i++)
            if (mine->v[i].status == LB_CHECK_FAIL) {
                rc = lb_fail(err, LB_E_PREFLIGHT, "%s: %s", mine->v[i].id, mine->v[i].message);
                lb_remedy(err, "%s", mine->v[i].remedy);
                break;
            }
    } else if (m->preflight_report->refused) {
        rc = lb_ctl_refusal(m->preflight_report, err);
    }
    lb__control__free_unpacked(m, NULL);
    return rc;
}

int lb_tx_open(struct lb_tx *t, struct lb_report *mine, struct lb_error *err)
{
    char host[256];
    uint16_t port;
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);

    if (lb_config_load(t->env->config_path, &t->cfg, err))
        return -1;
    t->have_cfg = true;
    /* One connection moves what one core can encrypt; more than half of the cores
     * would take them from the guests. */
    t->n_threads = t->opts->channels ? t->opts->channels
                                     : (unsigned)LB_MAX(1L, LB_MIN(8L, cpus / 2));
    if (t->n_threads > 64)
        return lb_remedy((lb_fail(err, LB_E_USAGE, "--channels %u is too many", t->n_threads), err),
                         "use at most 64");
    t->watcher_stop = eventfd(0, EFD_CLOEXEC);
    if (t->watcher_stop < 0 || pthread_create(&t->watcher, NULL, watcher_main, t))
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot start a thread");
    t->watching = true;
    if (attach_vm(t, mine, err))
        return -1;
    t->wish = lb_transport_wish(t->opts, mine);
    if (!t->to->address[0]) {
        lb_fail(err, LB_E_USAGE, "host %s has no address", t->to->name);
        return lb_remedy(err, "`lifeboat host trust %s KEY ADDRESS`", t->to->name);
    }
    lb_host_address(t->to, host, &port);
    if (lb_chan_connect(host, port, t->env->identity, t->to->pub, 10000, t->env->cancel_fd,
                        &t->chan, err)) {
        lb_tx_explain(t, err);
        return lb_context(err, "host %s", t->to->name);
    }
    t->ctl = lb_ctl_queue_start(t->chan, channel_ended, t);
    if (!t->ctl)
        return lb_fail(err, LB_E_INTERNAL, "cannot start a thread");
    t->reached_peer = true;
    pthread_mutex_lock(&t->mu);
    t->abort_ctl = t->ctl;
    pthread_mutex_unlock(&t->mu);
    return lb_tx_check_interrupt(t, err);
}

/* -------------------------------------------- dirty log, block table, connections */

static int start_log(struct lb_tx *t, struct lb_error *err)
{
    if (lb_hv_blocks(t->vm, &t->blocks, &t->n_blocks, err))
        return -1;
    t->dirty = lb_alloc(sizeof(*t->dirty) * (t->n_blocks + 1));
    for (unsigned b = 0; b < t->n_blocks; b++)
        if (lb_bitmap_init(&t->dirty[b], t->blocks[b].size_bytes >> LB_PAGE_SHIFT, err))
            return -1;
    t->stopped = true; /* enabling stops it for a moment, and may fail half way */
    if (lb_hv_log_enable(t->vm, err))
        return -1;
    t->logging = true;
    return lb_tx_micro_stop(t, err);
}

static int agree_blocks(struct lb_tx *t, struct lb_error *err)
{
    Lb__Control m = LB__CONTROL__INIT, *in = NULL;
    Lb__BlockTable table = LB__BLOCK_TABLE__INIT;
    LB_AUTO_FREE Lb__RamBlock *v = lb_alloc(sizeof(*v) * (t->n_blocks + 1));
    LB_AUTO_FREE Lb__RamBlock **pv = lb_alloc(sizeof(*pv) * (t->n_blocks + 1));
    LB_AUTO_FREE uint8_t *digests = lb_alloc(16 * (size_t)(t->n_blocks + 1));
    int rc = 0;

    for (unsigned b = 0; b < t->n_blocks; b++) {
        const struct lb_ram_block *blk = &t->blocks[b];

        lb__ram_block__init(&v[b]);
        v[b].id = blk->id;
        v[b].name = (char *)blk->name;
        v[b].size_bytes = blk->size_bytes;
        v[b].kind = blk->kind;
        pv[b] = &v[b];
        if (blk->kind == LB_RAM_ROM && blk->hva) {
            if (lb_block_digest(t->vm, blk, digests + 16 * b, err))
                return -1;
            v[b].digest = (ProtobufCBinaryData){16, digests + 16 * b};
        }
    }
    table.n_blocks = t->n_blocks;
    table.blocks = pv;
    m.kind_case = LB__CONTROL__KIND_BLOCK_TABLE;
    m.block_table = &table;
    if (lb_ctl_send(t->chan, &m, err))
        return lb_tx_explain(t, err);
    if (lb_ctl_queue_expect(t->ctl, LB__CONTROL__KIND_BLOCK_TABLE_OK, &in,
                            lb_now_ns() + SETUP_TIMEOUT_NS, err))
        return lb_tx_explain(t, err);
    for (unsigned b = 0; b < t->n_blocks && !rc; b++) {
        lb_bitmap_clear_all(&t->dirty[b]);
        if (t->blocks[b].kind == LB_RAM_MAIN)
            rc = lb_hv_populated(t->vm, &t->blocks[b], &t->dirty[b], err);
        else if (t->blocks[b].kind == LB_RAM_DEVICE)
            lb_bitmap_set_all(&t->dirty[b]);
    }
    for (size_t i = 0; i < in->block_table_ok->n_send_rom && !rc; i++) {
        uint32_t id = in->block_table_ok->send_rom[i];

        if (id >= t->n_blocks || t->blocks[id].kind != LB_RAM_ROM || !t->blocks[id].hva)
            rc = lb_fail(err, LB_E_PROTO, "the peer asked for block %u which is no ROM", id);
        else
            lb_bitmap_set_all(&t->dirty[id]);
    }
    lb__control__free_unpacked(in, NULL);
    return rc;
}

static int connect_tcp(struct lb_tx *t, unsigned index, struct lb_bulk **out, struct lb_error *err)
{
    char host[256];
    uint16_t port;

    lb_host_address(t->to, host, &port);
    return lb_bulk_connect(host, port, &t->keys, index, CONNECT_MS, t->env->cancel_fd, out, err);
}

/* By the first of the addresses that answers; each is tried twice, since a request that is lost is sent again
 * by the device only after seconds. */
static int connect_rdma(struct lb_tx *t, unsigned index, struct lb_bulk **out, struct lb_error *err)
{
    bool must = t->opts->transport == LB_TRANSPORT_RDMA;
    unsigned tries = 2 * t->n_rdma, each_ms = must ? CONNECT_MS / 2 : AUTO_RDMA_MS / tries;
    struct lb_transport *link = NULL;
    int rc = -1;

    for (unsigned i = 0; i < tries && rc; i++) {
        rc = lb_rdma_connect(&t->rdma[i % t->n_rdma], t->keys.session_id, each_ms, t->env->cancel_fd,
                             &link, err);
        if (rc && err->code == LB_E_CANCELLED)
            return -1;
    }
    return rc ? -1 : lb_bulk_open(link, true, &t->keys, index, must ? CONNECT_MS : AUTO_RDMA_MS, out, err);
}

/* What was agreed; TCP when that fails and need not be. */
static int connect_one(struct lb_tx *t, unsigned index, struct lb_bulk **out, struct lb_error *err)
{
    struct lb_error e = LB_ERROR_INIT;

    if (t->n_rdma && !connect_rdma(t, index, out, &e))
        return 0;
    if (e.code && (t->opts->transport == LB_TRANSPORT_RDMA || e.code == LB_E_CANCELLED)) {
        if (err)
            *err = e;
        return -1;
    }
    if (e.code) {
        lb_context(&e, "no RDMA, TCP instead");
        lb_log_error(LB_LOG_WARN, &e);
        snprintf(t->why_tcp, sizeof(t->why_tcp), "%s", e.message);
        t->n_rdma = 0;
    }
    return connect_tcp(t, index, out, err);
}

/* Of the sender, any of its threads: what is read here does not change any more. */
static int reconnect(unsigned index, struct lb_bulk **out, struct lb_error *err, void *arg)
{
    return connect_tcp(arg, index, out, err);
}

int lb_tx_connect(struct lb_tx *t, struct lb_bulk **extra, struct lb_error *err)
{
    struct lb_bulk **conns = lb_alloc(sizeof(struct lb_bulk *) * t->n_threads);
    int rc = 0;

    for (unsigned i = 0; i < t->n_threads && !rc; i++)
        rc = connect_one(t, i, &conns[i], err);
    if (!rc && extra)
        rc = connect_one(t, t->n_threads, extra, err);
    if (!rc)
        rc = lb_sender_new(t->vm, t->blocks, t->dirty, t->n_blocks, conns, t->n_threads, t->opts,
                           &t->sender, err);
    for (unsigned i = 0; i < t->n_threads; i++)
        lb_bulk_close(conns[i]);
    free(conns);
    if (rc)
        return lb_tx_explain(t, err);
    lb_sender_set_reconnect(t->sender, reconnect, t);
    if (t->zero_copy && lb_sender_set_zero_copy(t->sender, err))
        return -1;
    pthread_mutex_lock(&t->mu);
    t->abort_sender = t->sender;
    pthread_mutex_unlock(&t->mu);
    return lb_tx_check_interrupt(t, err);
}

int lb_tx_launch(struct lb_tx *t, struct lb_error *err)
{
    Lb__Control *m = NULL;

    if (start_log(t, err))
        return -1;
    if (lb_ctl_queue_expect(t->ctl, LB__CONTROL__KIND_READY, &m, lb_now_ns() + SETUP_TIMEOUT_NS,
                            err))
        return lb_tx_explain(t, err);
    t->n_rdma = lb_rdma_addrs_parse(m->ready->rdma, m->ready->n_rdma, t->rdma);
    t->zero_copy = t->n_rdma && m->ready->zero_copy;
    lb__control__free_unpacked(m, NULL);
    lb_point("src-ready");
    if (!t->n_rdma && t->opts->transport == LB_TRANSPORT_RDMA) {
        lb_fail(err, LB_E_NET, "host %s cannot listen for RDMA connections", t->to->name);
        return lb_remedy(err, "see the log of lifeboatd there, or use --transport auto");
    }
    return agree_blocks(t, err);
}

/* ------------------------------------------------------------- pauses and rounds */

/* Guest stopped: the pages written since the last time become dirty[], and are forgotten. */
int lb_tx_fetch_log(struct lb_tx *t, uint64_t *pages, struct lb_error *err)
{
    *pages = 0;
    for (unsigned b = 0; b < t->n_blocks; b++) {
        lb_bitmap_clear_all(&t->dirty[b]);
        if (t->blocks[b].kind == LB_RAM_ROM)
            continue;
        if (lb_hv_log_clean(t->vm, &t->blocks[b], &t->dirty[b], err))
            return -1;
        *pages += lb_bitmap_count(&t->dirty[b]);
    }
    *pages += lb_tx_add_bad(t);
    return 0;
}

/* Pause and fetch the log; the guest stays paused. */
int lb_tx_pause(struct lb_tx *t, uint64_t *pages, struct lb_error *err)
{
    t->t_stop = lb_now_ns();
    t->stopped = true; /* also when stop fails half way: continuing twice does no harm */
    if (lb_hv_stop(t->vm, err))
        return -1;
    return lb_tx_fetch_log(t, pages, err);
}

int lb_tx_continue(struct lb_tx *t, struct lb_error *err)
{
    double ms;

    t->t_clean = lb_now_ns();
    if (lb_hv_cont(t->vm, err))
        return -1;
    t->stopped = false;
    ms = (double)(lb_now_ns() - t->t_stop) / 1e6;
    t->stop_ms = t->stop_ms > 0 ? (t->stop_ms + ms) / 2 : ms;
    return 0;
}

int lb_tx_restart_log(struct lb_tx *t, struct lb_error *err)
{
    t->t_stop = lb_now_ns();
    t->stopped = true;
    if (lb_hv_stop(t->vm, err))
        return -1;
    for (unsigned b = 0; b < t->n_blocks; b++)
        if (t->blocks[b].kind != LB_RAM_ROM && lb_hv_log_clean(t->vm, &t->blocks[b], &t->dirty[b], err))
            return -1;
    return lb_tx_continue(t, err);
}

int lb_tx_micro_stop(struct lb_tx *t, struct lb_error *err)
{
    uint64_t pages;

    return lb_tx_pause(t, &pages, err) || lb_tx_continue(t, err) ? -1 : 0;
}

/* What the guest wrote since the last clean, without clearing. */
int lb_tx_count_dirty(struct lb_tx *t, uint64_t *pages, struct lb_error *err)
{
    *pages = 0;
    for (unsigned b = 0; b < t->n_blocks; b++) {
        struct lb_bitmap tmp = {0};
        int rc;

        if (t->blocks[b].kind == LB_RAM_ROM)
            continue;
        if (lb_bitmap_init(&tmp, t->dirty[b].n_bits, err))
            return -1;
        rc = lb_hv_log_peek(t->vm, &t->blocks[b], 0, tmp.n_bits, &tmp, err);
        *pages += lb_bitmap_count(&tmp);
        lb_bitmap_free(&tmp);
        if (rc)
            return -1;
    }
    return 0;
}

uint64_t lb_tx_dirty_total(const struct lb_tx *t)
{
    uint64_t n = 0;

    for (unsigned b = 0; b < t->n_blocks; b++)
        n += lb_bitmap_count(&t->dirty[b]);
    return n;
}

int lb_tx_wait_done(struct lb_tx *t, uint32_t round, bool last, struct lb_error *err)
{
    for (;;) {
        if (t->last_done)
            lb__control__free_unpacked(LB_STEAL_PTR(t->last_done), NULL);
        if (lb_ctl_queue_expect(t->ctl, LB__CONTROL__KIND_ROUND_DONE, &t->last_done,
                                lb_now_ns() + LB_TX_ROUND_TIMEOUT_NS, err))
            return lb_tx_explain(t, err);
        uint32_t done = t->last_done->round_done->round;
        if (done == round)
            return 0;
        if (!last || done > round)
            return lb_fail(err, LB_E_PROTO, "the peer finished round %u, we are in round %u", done,
                           round);
    }
}

uint64_t lb_tx_add_bad(struct lb_tx *t)
{
    const Lb__RoundDone *d = t->last_done ? t->last_done->round_done : NULL;
    uint64_t added = 0;

    for (size_t i = 0; d && i < d->n_bad; i++) {
        const Lb__BadRun *run = d->bad[i];

        if (run->block >= t->n_blocks)
            continue;
        struct lb_bitmap *dirty = &t->dirty[run->block];
        uint64_t end = LB_MIN((uint64_t)run->first + run->count, dirty->n_bits);
        for (uint64_t page = run->first; page < end; page++) {
            added += !lb_bitmap_test(dirty, page);
            lb_bitmap_set(dirty, page);
        }
    }
    if (t->last_done)
        lb__control__free_unpacked(LB_STEAL_PTR(t->last_done), NULL);
    t->damaged_pages += added;
    if (added)
        lb_log(LB_LOG_WARN, "%llu pages were damaged on their way and are sent again",
               (unsigned long long)added);
    return added;
}

int lb_tx_wait_round(struct lb_tx *t, uint32_t round,
                     int (*tick)(void *arg, struct lb_error *err), void *arg,
                     struct lb_error *err)
{
    int rc;

    while ((rc = lb_sender_round_wait(t->sender, 20, err)) == 1)
        if (tick && tick(arg, err))
            return -1;
    if (rc)
        return lb_tx_explain(t, err);
    /* The destination says when it placed the last page: from here on nothing of
     * this round sits in a socket buffer, where it would lengthen the pause. */
    return lb_tx_wait_done(t, round, false, err);
}
