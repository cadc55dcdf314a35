/*
 * migrate/out_setup.c - the source session until the first page: attach, connect,
 * preflight, the dirty log, block table, bulk connections.
 *
 * The dirty log is started while the destination launches its receiver: the time until
 * Ready is a free sample of the guest's dirty rate.
 */
#include "migrate/out_internal.h"

#include "migrate/desc_proto.h"

#include <errno.h>
#include <sodium.h>
#include <string.h>
#include <sys/eventfd.h>

static int first_refusal(const Lb__PreflightReport *rep, struct lb_error *err)
{
    for (size_t i = 0; i < rep->n_checks; i++) {
        const Lb__Check *c = rep->checks[i];

        if (strcmp(c->status, "fail"))
            continue;
        lb_fail(err, LB_E_PREFLIGHT, "%.60s: %.400s", c->id, c->message);
        if (c->remedy && *c->remedy)
            lb_remedy(err, "%s", c->remedy);
        return -1;
    }
    return lb_fail(err, LB_E_PREFLIGHT, "the destination refused without saying why");
}

static void show_report(struct out *o, const struct lb_report *mine,
                        const Lb__PreflightReport *theirs)
{
    struct lb_report all = {0};
    LB_AUTO_FREE char *json = NULL;

    for (unsigned i = 0; i < mine->n; i++)
        lb_report_add(&all, mine->v[i].id, mine->v[i].status, mine->v[i].remedy, "%s",
                      mine->v[i].message);
    for (size_t i = 0; theirs && i < theirs->n_checks; i++) {
        const Lb__Check *c = theirs->checks[i];
        bool said = false;

        /* both ends look at the description: once is enough when all is well */
        for (unsigned k = 0; k < mine->n; k++)
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
    if (o->env->preflight && json)
        o->env->preflight(json, o->env->arg);
    lb_report_free(&all);
}

static int attach_vm(struct out *o, struct lb_report *mine, struct lb_error *err)
{
    struct lb_vm_ident id = lb_entry_ident(&o->entry);
    bool alive, running;

    if (lb_hv_attach(o->env->hv, &id, &o->vm, err))
        return -1;
    if (lb_hv_status(o->vm, &alive, &running, err))
        return -1;
    if (!running) {
        lb_fail(err, LB_E_STATE, "VM %s is paused", o->entry.name);
        return lb_remedy(err, "continue it first (QMP `cont`), then migrate");
    }
    if (lb_hv_describe(o->vm, &o->desc, err))
        return -1;
    free(o->desc.name);
    o->desc.name = lb_strdup(o->entry.name);
    lb_preflight_source(&o->desc, mine);
    return 0;
}

static int request(struct out *o, struct lb_error *err)
{
    Lb__Control m = LB__CONTROL__INIT;
    Lb__MigrateRequest r = LB__MIGRATE_REQUEST__INIT;
    Lb__Hello h = LB__HELLO__INIT;
    Lb__VmDescription *d = NULL;
    uint8_t token[LB_TOKEN_BYTES];
    int rc;

    lb_unhex(token, sizeof(token), o->journal.token);
    if (lb_desc_to_proto(&o->desc, &d, err))
        return -1;
    lb_ctl_hello(&h, &o->cfg);
    r.hello = &h;
    r.session_id = (ProtobufCBinaryData){LB_SESSION_ID_BYTES, o->keys.session_id};
    r.token = (ProtobufCBinaryData){sizeof(token), token};
    r.vm = d;
    r.dry_run = o->opts->dry_run;
    r.channels = o->n_threads;
    r.cipher = o->keys.cipher;
    r.bulk_secret = (ProtobufCBinaryData){sizeof(o->keys.secret), o->keys.secret};
    r.verify = o->opts->verify;
    m.kind_case = LB__CONTROL__KIND_MIGRATE_REQUEST;
    m.migrate_request = &r;
    rc = lb_ctl_send(o->chan, &m, err);
    lb__vm_description__free_unpacked(d, NULL);
    return rc;
}

int lb_out_preflight(struct out *o, struct lb_report *mine, struct lb_error *err)
{
    Lb__Control *m = NULL;
    bool refused = lb_report_refused(mine);
    int rc = 0;

    if (request(o, err))
        return -1;
    if (lb_ctl_queue_expect(o->ctl, LB__CONTROL__KIND_PREFLIGHT_REPORT, &m,
                            lb_now_ns() + SETUP_TIMEOUT_NS, err))
        return lb_out_explain(o, err);
    show_report(o, mine, m->preflight_report);
    if (refused) {
        for (unsigned i = 0; i < mine->n; i++)
            if (mine->v[i].status == LB_CHECK_FAIL) {
                rc = lb_fail(err, LB_E_PREFLIGHT, "%s: %s", mine->v[i].id, mine->v[i].message);
                lb_remedy(err, "%s", mine->v[i].remedy);
                break;
            }
    } else if (m->preflight_report->refused) {
        rc = first_refusal(m->preflight_report, err);
    }
    lb__control__free_unpacked(m, NULL);
    return rc;
}

int lb_out_open(struct out *o, struct lb_report *mine, struct lb_error *err)
{
    char host[256];
    uint16_t port;
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);

    if (lb_config_load(o->env->config_path, &o->cfg, err))
        return -1;
    o->have_cfg = true;
    /* One connection moves what one core can encrypt; more than half of the cores
     * would take them from the guests. */
    o->n_threads = o->opts->channels ? o->opts->channels
                                     : (unsigned)LB_MAX(1L, LB_MIN(8L, cpus / 2));
    if (o->n_threads > 64)
        return lb_remedy((lb_fail(err, LB_E_USAGE, "--channels %u is too many", o->n_threads), err),
                         "use at most 64");
    o->keys.cipher = o->opts->insecure_plaintext ? LB_CIPHER_NONE : lb_cipher_preferred();
    randombytes_buf(o->keys.secret, sizeof(o->keys.secret));
    memcpy(o->keys.session_id, o->env->session_id, LB_SESSION_ID_BYTES);
    o->watcher_stop = eventfd(0, EFD_CLOEXEC);
    if (o->watcher_stop < 0 || pthread_create(&o->watcher, NULL, lb_out_watcher, o))
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot start a thread");
    o->watching = true;
    if (attach_vm(o, mine, err))
        return -1;
    if (!o->to->address[0]) {
        lb_fail(err, LB_E_USAGE, "host %s has no address", o->to->name);
        return lb_remedy(err, "`lifeboat host trust %s KEY ADDRESS`", o->to->name);
    }
    lb_host_address(o->to, host, &port);
    if (lb_chan_connect(host, port, o->env->identity, o->to->pub, 10000, o->env->cancel_fd,
                        &o->chan, err)) {
        lb_out_explain(o, err);
        return lb_context(err, "host %s", o->to->name);
    }
    o->ctl = lb_ctl_queue_start(o->chan, lb_out_channel_ended, o);
    if (!o->ctl)
        return lb_fail(err, LB_E_INTERNAL, "cannot start a thread");
    o->reached_peer = true;
    pthread_mutex_lock(&o->mu);
    o->abort_ctl = o->ctl;
    pthread_mutex_unlock(&o->mu);
    return lb_out_check_interrupt(o, err);
}

int lb_out_begin_journal(struct out *o, struct lb_error *err)
{
    if (lb_journal_move(o->env->state_dir, &o->journal, LB_J_PREPARING, err))
        return -1;
    o->journalled = true;
    o->entry.state = LB_VM_MIGRATING_OUT;
    o->entry.note[0] = '\0';
    snprintf(o->entry.token, sizeof(o->entry.token), "%s", o->journal.token);
    snprintf(o->entry.peer, sizeof(o->entry.peer), "%s", o->to->name);
    return lb_vm_entry_save(o->env->state_dir, &o->entry, err);
}

static int start_log(struct out *o, struct lb_error *err)
{
    if (lb_hv_blocks(o->vm, &o->blocks, &o->n_blocks, err))
        return -1;
    o->dirty = lb_alloc(sizeof(*o->dirty) * (o->n_blocks + 1));
    for (unsigned b = 0; b < o->n_blocks; b++)
        if (lb_bitmap_init(&o->dirty[b], o->blocks[b].size_bytes >> LB_PAGE_SHIFT, err))
            return -1;
    o->stopped = true; /* enabling stops it for a moment, and may fail half way */
    if (lb_hv_log_enable(o->vm, err))
        return -1;
    o->logging = true;
    return lb_out_micro_stop(o, err);
}

static int agree_blocks(struct out *o, struct lb_error *err)
{
    Lb__Control m = LB__CONTROL__INIT, *in = NULL;
    Lb__BlockTable t = LB__BLOCK_TABLE__INIT;
    LB_AUTO_FREE Lb__RamBlock *v = lb_alloc(sizeof(*v) * (o->n_blocks + 1));
    LB_AUTO_FREE Lb__RamBlock **pv = lb_alloc(sizeof(*pv) * (o->n_blocks + 1));
    LB_AUTO_FREE uint8_t *digests = lb_alloc(16 * (size_t)(o->n_blocks + 1));
    int rc = 0;

    for (unsigned b = 0; b < o->n_blocks; b++) {
        const struct lb_ram_block *blk = &o->blocks[b];

        lb__ram_block__init(&v[b]);
        v[b].id = blk->id;
        v[b].name = (char *)blk->name;
        v[b].size_bytes = blk->size_bytes;
        v[b].kind = blk->kind;
        pv[b] = &v[b];
        if (blk->kind == LB_RAM_ROM && blk->hva) {
            if (lb_block_digest(o->vm, blk, digests + 16 * b, err))
                return -1;
            v[b].digest = (ProtobufCBinaryData){16, digests + 16 * b};
        }
    }
    t.n_blocks = o->n_blocks;
    t.blocks = pv;
    m.kind_case = LB__CONTROL__KIND_BLOCK_TABLE;
    m.block_table = &t;
    if (lb_ctl_send(o->chan, &m, err))
        return lb_out_explain(o, err);
    if (lb_ctl_queue_expect(o->ctl, LB__CONTROL__KIND_BLOCK_TABLE_OK, &in,
                            lb_now_ns() + SETUP_TIMEOUT_NS, err))
        return lb_out_explain(o, err);
    for (unsigned b = 0; b < o->n_blocks && !rc; b++) {
        lb_bitmap_clear_all(&o->dirty[b]);
        if (o->blocks[b].kind == LB_RAM_MAIN)
            rc = lb_hv_populated(o->vm, &o->blocks[b], &o->dirty[b], err);
        else if (o->blocks[b].kind == LB_RAM_DEVICE)
            lb_bitmap_set_all(&o->dirty[b]);
    }
    for (size_t i = 0; i < in->block_table_ok->n_send_rom && !rc; i++) {
        uint32_t id = in->block_table_ok->send_rom[i];

        if (id >= o->n_blocks || o->blocks[id].kind != LB_RAM_ROM || !o->blocks[id].hva)
            rc = lb_fail(err, LB_E_PROTO, "the peer asked for block %u which is no ROM", id);
        else
            lb_bitmap_set_all(&o->dirty[id]);
    }
    lb__control__free_unpacked(in, NULL);
    return rc;
}

static int connect_bulk(struct out *o, struct lb_error *err)
{
    struct lb_bulk **conns = lb_alloc(sizeof(struct lb_bulk *) * o->n_threads);
    char host[256];
    uint16_t port;
    int rc = 0;

    lb_host_address(o->to, host, &port);
    for (unsigned i = 0; i < o->n_threads && !rc; i++)
        rc = lb_bulk_connect(host, port, &o->keys, i, 10000, o->env->cancel_fd, &conns[i], err);
    if (!rc)
        rc = lb_sender_new(o->vm, o->blocks, o->dirty, o->n_blocks, conns, o->n_threads, o->opts,
                           &o->sender, err);
    for (unsigned i = 0; i < o->n_threads; i++)
        lb_bulk_close(conns[i]);
    free(conns);
    if (rc)
        return lb_out_explain(o, err);
    pthread_mutex_lock(&o->mu);
    o->abort_sender = o->sender;
    pthread_mutex_unlock(&o->mu);
    return lb_out_check_interrupt(o, err);
}

int lb_out_setup(struct out *o, struct lb_error *err)
{
    Lb__Control *m = NULL;
    uint64_t pages, t;
    double dt;
    struct lb_policy_out fc = {0};
    uint64_t populated = 0;

    lb_out_move(o, S_LAUNCH);
    /* While the destination starts its receiver we start the log: the time until Ready is
     * a free sample of the dirty rate. */
    if (start_log(o, err))
        return -1;
    t = o->t_clean;
    if (lb_ctl_queue_expect(o->ctl, LB__CONTROL__KIND_READY, &m, lb_now_ns() + SETUP_TIMEOUT_NS,
                            err))
        return lb_out_explain(o, err);
    lb__control__free_unpacked(m, NULL);
    lb_point("src-ready");
    if (agree_blocks(o, err))
        return -1;
    if (lb_out_count_dirty(o, &pages, err))
        return -1;
    dt = (double)(lb_now_ns() - t) / 1e9;
    o->dirty_rate = dt > 0 ? (double)pages * LB_PAGE_SIZE / dt : 0;
    for (unsigned b = 0; b < o->n_blocks; b++)
        populated += lb_bitmap_count(&o->dirty[b]) << LB_PAGE_SHIFT;
    lb_policy_forecast(populated, o->dirty_rate, 0, (double)o->opts->bandwidth_bytes_per_s,
                       o->opts->max_downtime_ms, &fc);
    o->prog.converges = fc.converges;
    o->prog.predicted_downtime_ms = fc.predicted_downtime_ms;
    o->prog.eta_s = fc.eta_s;
    lb_out_note(o, fc.reason);
    lb_out_report(o, true);
    return connect_bulk(o, err);
}

