/*
 * remus/backup.c - the backup's session: its life from above, and how it begins.
 *
 * Happy path: serve() reads top to bottom. Anything wrong before it is decided that the VM runs here
 * ends in lb_rx_discard(): no process, no entry, no file is left but the disks, and the
 * protection's id is refused for ever, so that a primary that asks is told to go on.
 *
 * A primary that begins anew while an old standby of the same VM still waits here (its connection broke
 * and nobody could tell it) has decided for itself: supersede() ends the old one.
 */
#include "remus/backup_internal.h"

#include <assert.h>
#include <string.h>

#include "migrate/handover.h"
#include "remus/output.h"

#define WITNESS_LOOK_NS UINT64_C(3000000000)
#define FIRST_EPOCH_NS UINT64_C(60000000000) /* from END to a complete epoch, arming included */
#define SUPERSEDE_NS UINT64_C(5000000000)
#define ARMED_NS UINT64_C(5000000000)
#define GIVE_BACK_NS UINT64_C(2000000000)
#define JOURNAL_LOCK_MS 5000
#define MAX_DISKS 64u

static const struct lb_sm_state states[BK_N_STATES] = {
    [BK_PREFLIGHT] = {"preflight", LB_SM_TO(BK_LAUNCH) | LB_SM_TO(BK_DISCARDED) | LB_SM_TO(BK_FAILED)},
    [BK_LAUNCH] = {"launching", LB_SM_TO(BK_RECEIVE) | LB_SM_TO(BK_FAILED)},
    [BK_RECEIVE] = {"receiving", LB_SM_TO(BK_STANDBY) | LB_SM_TO(BK_DISCARDED) | LB_SM_TO(BK_FAILED)},
    [BK_STANDBY] = {"standby", LB_SM_TO(BK_ORPHAN) | LB_SM_TO(BK_LOADED) | LB_SM_TO(BK_DISCARDED) |
                                   LB_SM_TO(BK_FAILED)},
    [BK_ORPHAN] = {"orphan", LB_SM_TO(BK_LOADED) | LB_SM_TO(BK_DISCARDED) | LB_SM_TO(BK_FAILED)},
    [BK_LOADED] = {"loaded", LB_SM_TO(BK_CLAIMING) | LB_SM_TO(BK_DISCARDED) | LB_SM_TO(BK_FAILED)},
    [BK_CLAIMING] = {"claiming", LB_SM_TO(BK_PROMOTED) | LB_SM_TO(BK_DISCARDED) | LB_SM_TO(BK_FAILED)},
    [BK_PROMOTED] = {"promoted", 0},
    [BK_DISCARDED] = {"discarded", 0},
    [BK_FAILED] = {"failed", 0},
};

/* -------------------------------------------------------------------- preflight */

static int check_spec(struct lb_bk *b, struct lb_error *err)
{
    const Lb__ProtectSpec *p = b->spec;

    if (p->n_disks > MAX_DISKS || strlen(p->witness_key) >= sizeof(b->rec.key) || !p->witness_key[0])
        return lb_fail(err, LB_E_PROTO, "the peer's wish for protection is malformed");
    for (size_t i = 0; i < p->n_disks; i++)
        if (!p->disks[i]->path[0] || !p->disks[i]->size_bytes)
            return lb_fail(err, LB_E_PROTO, "disk %zu of the peer has no file or no size", i);
    return lb_wish_parse(p->wish_json, &b->wish, err);
}

static void check_witness(struct lb_bk *b, struct lb_report *rep)
{
    struct lb_witness_state st;
    struct lb_error why = LB_ERROR_INIT;

    if (lb_witness_read(b->witness, b->spec->witness_key, &st, lb_now_ns() + WITNESS_LOOK_NS, &why))
        lb_report_add(rep, "witness", LB_CHECK_FAIL,
                      why.remedy[0] ? why.remedy : "see that it runs and can be reached from this host",
                      "the witness cannot be asked from here: %s", why.message);
    else
        lb_report_add(rep, "witness", LB_CHECK_OK, NULL, "%.200s", b->wish.opts.witness);
}

/* After a failover this host is the primary and wants a backup itself. */
static void check_trust(struct lb_bk *b, struct lb_report *rep)
{
    struct lb_hosts hosts = {0};
    struct lb_error why = LB_ERROR_INIT;

    if (lb_hosts_load(b->rx.env->state_dir, &hosts, &why)) {
        lb_report_add(rep, "trust", LB_CHECK_WARN, "repair hosts.json", "%s", why.message);
        return;
    }
    for (unsigned i = 0; i < b->wish.n_backups; i++) {
        const char *name = b->wish.backups[i];

        if (strcmp(name, b->rx.cfg.name) && !lb_hosts_by_name(&hosts, name))
            lb_report_add(rep, "trust", LB_CHECK_WARN, "`lifeboat host trust` it here too",
                          "host %s is not known here: after a failover it cannot be the next backup",
                          name);
    }
    lb_hosts_free(&hosts);
}

static int checks(struct lb_bk *b, bool *proceed, struct lb_error *err)
{
    struct lb_rx *r = &b->rx;
    LB_AUTO_FREE const char **copied = lb_alloc(sizeof(*copied) * (b->spec->n_disks + 1));
    struct lb_report rep = {0};
    char self[LB_KEY_TEXT_BYTES];
    int rc;

    for (size_t i = 0; i < b->spec->n_disks; i++)
        copied[i] = b->spec->disks[i]->path;
    lb_key_format(self, r->env->identity->pub);
    if (lb_witness_open(b->wish.opts.witness, LB_SIDE_BACKUP, self, r->peer, &b->witness, err))
        return -1;
    lb_preflight_standby(&r->desc, &r->cfg, r->env->state_dir, r->req->hello->wall_ms, copied,
                         (unsigned)b->spec->n_disks, &rep);
    check_witness(b, &rep);
    check_trust(b, &rep);
    lb_rx_transport(r, &rep);
    rc = lb_rx_decide(r, &rep, proceed, err);
    lb_report_free(&rep);
    return rc;
}

/* An older standby of this VM and of the same primary: it is told that it will never run, by its
 * journal, and its session goes. Without a session it is removed here. */
static void supersede(struct lb_rx *r)
{
    const char *dir = r->env->state_dir;
    uint64_t until = lb_now_ns() + SUPERSEDE_NS;
    struct lb_vm_entry e;
    struct lb_journal j = {0};

    /* By the entry: the record of one that is being removed is gone already. */
    if (lb_vm_entry_load(dir, r->entry.name, &e, NULL) || e.state != LB_VM_STANDBY ||
        strcmp(e.peer, r->peer))
        return;
    LB_AUTO_FD int lock = lb_journal_lock(dir, e.token, JOURNAL_LOCK_MS, NULL);
    if (lock < 0 || lb_journal_load(dir, e.token, &j, NULL) || j.state == LB_J_RUNNING)
        return;
    snprintf(j.detail, sizeof(j.detail), "the primary began another protection");
    if (j.state == LB_J_PREPARED && lb_journal_move(dir, &j, LB_J_REFUSED, NULL))
        return;
    close(LB_STEAL_FD(lock));
    lb_log(LB_LOG_INFO, "an older standby of %s makes way", e.name);
    while (lb_now_ns() < until) {
        bool here = !lb_vm_entry_load(dir, r->entry.name, &e, NULL);
        LB_AUTO_FD int vm_lock = here ? lb_vm_lock(dir, e.name, NULL) : -1;

        if (vm_lock >= 0 && !lb_receiver_discard(r->env, &e, NULL))
            return;
        if (!here && !lb_vm_is_locked(dir, r->entry.name))
            return;
        lb_sleep_ms(20);
    }
}

/* ----------------------------------------------------------------------- launch */

static int begin_record(struct lb_bk *b, struct lb_error *err)
{
    struct lb_rx *r = &b->rx;

    snprintf(b->rec.id, sizeof(b->rec.id), "%s", r->journal.token);
    snprintf(b->rec.peer, sizeof(b->rec.peer), "%s", r->peer);
    lb_key_format(b->rec.peer_key, lb_chan_peer_key(r->chan));
    snprintf(b->rec.witness, sizeof(b->rec.witness), "%s", b->wish.opts.witness);
    snprintf(b->rec.key, sizeof(b->rec.key), "%s", b->spec->witness_key);
    lb_bk_forget(r->env->state_dir, r->entry.name); /* of a VM that is not here any more */
    if (lb_record_move(r->env->state_dir, r->entry.name, &b->rec, LB_PH_RECEIVING, err))
        return -1;
    return lb_wish_save(r->env->state_dir, r->entry.name, &b->wish, err);
}

/* A relative name is one in the directory the VM was started in, as its own host has it. */
static char *disk_path(const struct lb_rx *r, const char *path)
{
    if (path[0] == '/' || !r->desc.cwd || !r->desc.cwd[0])
        return lb_map_path(r->cfg.paths, r->cfg.n_paths, path);
    return lb_asprintf("%s/%s", r->desc.cwd, path);
}

/* Before the receiver: QEMU remembers the size of a disk. */
static int open_targets(struct lb_bk *b, struct lb_error *err)
{
    struct lb_rx *r = &b->rx;
    LB_AUTO_FREE char *dir = lb_vm_dir(r->env->state_dir, r->entry.name, true);

    b->targets = lb_alloc(sizeof(struct lb_disk_target *) * (b->spec->n_disks + 1));
    for (size_t i = 0; i < b->spec->n_disks; i++) {
        const Lb__ProtectDisk *d = b->spec->disks[i];
        LB_AUTO_FREE char *path = disk_path(r, d->path);
        struct lb_disk_target_opts o = {.path = path, .format = d->format, .size_bytes = d->size_bytes,
                                        .same_as = d->identity, .run_dir = dir, .uid = r->desc.uid,
                                        .gid = r->desc.gid};

        if (lb_disk_target_open(&o, &b->targets[i], err))
            return lb_context(err, "disk %s", path);
        b->n_targets++;
    }
    return 0;
}

/* ------------------------------------------------------------------- first copy */

/* Operations of the first copy of the disks are applied while the rounds go on; it ends with
 * the first complete epoch. */
static void *copy_main(void *arg)
{
    struct lb_bk *b = arg;
    int got = 0;

    while (!got)
        got = lb_collector_recv(b->coll, b->bulk, lb_now_ns() + UINT64_C(100000000), &b->copy_epoch,
                                &b->copy_error);
    pthread_mutex_lock(&b->mu);
    b->copy_done = true;
    pthread_mutex_unlock(&b->mu);
    lb_rx_wake(&b->rx);
    return NULL;
}

static bool copy_done(struct lb_bk *b)
{
    bool done;

    pthread_mutex_lock(&b->mu);
    done = b->copy_done;
    pthread_mutex_unlock(&b->mu);
    return done;
}

static void copy_end(struct lb_bk *b)
{
    if (!b->copying)
        return;
    pthread_join(b->copy_thread, NULL);
    b->copying = false;
}

static int copy_begin(struct lb_bk *b, struct lb_error *err)
{
    struct lb_rx *r = &b->rx;

    if (lb_collector_new(r->vm, r->map, r->n_map, b->targets, b->n_targets, &b->coll, err))
        return -1;
    b->bulk = LB_STEAL_PTR(r->conns[r->req->channels]);
    if (pthread_create(&b->copy_thread, NULL, copy_main, b))
        return lb_fail(err, LB_E_INTERNAL, "cannot start a thread");
    b->copying = true;
    return 0;
}

static int on_tick(void *arg, struct lb_error *err)
{
    struct lb_bk *b = arg;
    uint64_t ram = LB_MAX(b->rx.desc.ram_bytes >> LB_PAGE_SHIFT, 1);
    double percent = 100.0 * (double)lb_receiver_pages(b->rx.recv) / (double)ram;

    if (copy_done(b) && !b->copy_epoch) {
        if (err)
            *err = b->copy_error;
        return -1;
    }
    b->st.percent = LB_MAX(b->st.percent, LB_MIN(percent, 99.0));
    lb_bk_status(b, false);
    if (lb_bk_check(b, err))
        return -1;
    return b->n_targets > 0; /* a large disk takes its time, and is not seen here */
}

/* Rounds are over: the witness is armed, the first epoch comes. */
static int first_epoch(struct lb_bk *b, struct lb_error *err)
{
    uint64_t until = lb_now_ns() + FIRST_EPOCH_NS;

    while (!copy_done(b)) {
        unsigned seen = lb_rx_events(&b->rx);

        if (lb_ctl_queue_ended(b->rx.ctl, err) || lb_bk_check(b, err))
            return -1;
        if (lb_bk_said(b).discard)
            return lb_fail(err, LB_E_CANCELLED, "the primary gave the protection up");
        if (lb_now_ns() > until)
            return lb_fail(err, LB_E_NET, "no complete checkpoint came from host %s", b->rx.peer);
        lb_rx_wait(&b->rx, seen, lb_now_ns() + UINT64_C(100000000));
    }
    copy_end(b);
    if (!b->copy_epoch) {
        if (!lb_ctl_queue_ended(b->rx.ctl, err) && err)
            *err = b->copy_error;
        return -1;
    }
    until = lb_now_ns() + ARMED_NS; /* it was sent before, on the other connection */
    while (!lb_bk_said(b).armed && lb_now_ns() < until)
        lb_rx_wait(&b->rx, lb_rx_events(&b->rx), lb_now_ns() + UINT64_C(1000000));
    if (!lb_bk_said(b).armed)
        return lb_fail(err, LB_E_PROTO, "the primary sent a checkpoint before it armed the witness");
    return lb_bk_take_epoch(b, b->copy_epoch, err);
}

/* -------------------------------------------------------------------- from above */

/* It will never run here, and whoever asks is told so from now on. */
static int refuse(struct lb_bk *b, const char *why, struct lb_error *err)
{
    const char *dir = b->rx.env->state_dir;
    LB_AUTO_FD int lock = lb_journal_lock(dir, b->rx.journal.token, JOURNAL_LOCK_MS, err);

    if (lock < 0 || lb_journal_load(dir, b->rx.journal.token, &b->rx.journal, err))
        return -1;
    if (b->rx.journal.state == LB_J_REFUSED)
        return 0;
    snprintf(b->rx.journal.detail, sizeof(b->rx.journal.detail), "%.250s", why);
    return lb_journal_move(dir, &b->rx.journal, LB_J_REFUSED, err);
}

/* The primary goes on without us. Answered when it is durable, before the receiver is gone. */
static int discarded(struct lb_bk *b, struct lb_error *err)
{
    Lb__Control m = LB__CONTROL__INIT;
    Lb__Discarded d = LB__DISCARDED__INIT;

    if (refuse(b, "discarded by the primary", err))
        return -1;
    lb_point("bk-discard");
    if (lb_record_remove(b->rx.env->state_dir, b->rx.entry.name, err))
        return -1;
    m.kind_case = LB__CONTROL__KIND_DISCARDED;
    m.discarded = &d;
    lb_ctl_send(b->rx.chan, &m, NULL); /* it may have closed already */
    lb_log(LB_LOG_INFO, "discarded: %s", lb_bk_said(b).reason);
    return 0;
}

static int receive(struct lb_bk *b, struct lb_error *err)
{
    struct lb_rx *r = &b->rx;
    unsigned n = r->req->channels;

    if (r->env->want_conns(r->req->session_id.data, r->entry.name, err, r->env->arg))
        return -1;
    if (lb_rx_ready(r, err) || lb_rx_map_blocks(r, err) || lb_rx_accept(r, n + 1, err) ||
        lb_rx_start(r, n, err) || copy_begin(b, err))
        return -1;
    lb_sm_move(&b->sm, BK_RECEIVE);
    lb_bk_status(b, true);
    if (lb_rx_receive(r, on_tick, b, err))
        return -1;
    lb_receiver_free(LB_STEAL_PTR(r->recv));
    return first_epoch(b, err);
}

/* What a session that died here held on the same taps would swallow all that this guest sends. */
static void clear_output(struct lb_bk *b)
{
    struct lb_vm_ident id = lb_entry_ident(&b->rx.entry);
    LB_AUTO_FREE char *dir = lb_vm_dir(b->rx.env->state_dir, b->rx.entry.name, false);
    struct lb_error e = LB_ERROR_INIT;

    if (lb_output_clear_stale(&id, b->rx.vm, dir, &e))
        lb_log_error(LB_LOG_WARN, &e);
}

/* Returns 0 when it was discarded, or runs here: the state machine says which. */
static int serve(struct lb_bk *b, struct lb_error *err)
{
    struct lb_rx *r = &b->rx;
    bool proceed;

    lb_bk_status(b, true);
    if (!r->req->dry_run)
        supersede(r);
    if (check_spec(b, err) || checks(b, &proceed, err))
        return -1;
    if (!proceed) {
        lb_sm_move(&b->sm, BK_DISCARDED);
        return 0;
    }
    lb_sm_move(&b->sm, BK_LAUNCH);
    lb_bk_status(b, true);
    if (lb_rx_listen(r, lb_bk_on_message, b, err) || lb_rx_register(r, LB_VM_STANDBY, err) ||
        begin_record(b, err) || open_targets(b, err) || lb_rx_launch(r, err))
        return -1;
    clear_output(b);
    if (receive(b, err) || lb_bk_follow(b, err))
        return -1;
    if (b->sm.state == BK_DISCARDED)
        return discarded(b, err);
    return 0;
}

/* A claim that was won and came to nothing: refused durably, so the primary may protect its VM again. */
static void give_back(struct lb_bk *b)
{
    struct lb_error err = LB_ERROR_INIT;

    if (b->rec.nonce[0] &&
        lb_witness_disarm(b->witness, &b->rec, lb_now_ns() + GIVE_BACK_NS, &err))
        lb_log_error(LB_LOG_WARN, &err);
}

static void forget(struct lb_bk *b)
{
    if (b->bulk)
        lb_bulk_abort(b->bulk);
    copy_end(b);
    lb_receiver_free(LB_STEAL_PTR(b->rx.recv));
    lb_collector_free(b->coll);
    lb_bulk_close(b->bulk);
    for (unsigned i = 0; i < b->n_targets; i++)
        lb_disk_target_close(b->targets[i], NULL);
    free(b->targets);
    if (b->sm.state != BK_PROMOTED && lb_rx_discard(&b->rx)) {
        give_back(b);
        lb_bk_forget(b->rx.env->state_dir, b->rx.entry.name);
    }
    lb_rx_close(&b->rx);
    lb_witness_close(b->witness);
    pthread_mutex_destroy(&b->mu);
}

int lb_backup_serve(const struct lb_remus_env *env, struct lb_chan *chan, const char *peer,
                    Lb__Control *first, char *vm_name, bool *promoted, struct lb_error *err)
{
    struct lb_bk b = {.env = env, .spec = first->migrate_request->protect};
    struct lb_error local = LB_ERROR_INIT;
    int rc;

    assert(b.spec);
    *promoted = false;
    lb_mutex_init_inherit(&b.mu);
    lb_sm_init(&b.sm, "backup", states, BK_N_STATES, BK_PREFLIGHT);
    rc = lb_rx_open(&b.rx, &env->base, chan, peer, first->migrate_request, &local);
    snprintf(vm_name, 128, "%s", b.rx.entry.name);
    if (!rc)
        rc = serve(&b, &local);
    if (rc) {
        lb_log_error(LB_LOG_ERROR, &local);
        if (b.rx.journal.state != LB_J_RUNNING)
            lb_ctl_send_failure(chan, &local, NULL);
        if (lb_sm_may(&b.sm, BK_FAILED))
            lb_sm_move(&b.sm, BK_FAILED);
        lb_bk_note(&b, "%s", local.message);
        lb_bk_status(&b, true);
    }
    *promoted = b.sm.state == BK_PROMOTED;
    forget(&b);
    if (rc && err)
        *err = local;
    return rc;
}
