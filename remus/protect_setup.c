/*
 * remus/protect_setup.c - from nothing to the moment before epoch 1.
 *
 * Nothing of the guest is at stake here: what it sends and writes goes its usual way, and any
 * failure ends with the guest running as before. The last step, arming, changes that: once the
 * revision of the witness's key is on disk and Armed is sent, only the guard's verdict counts.
 */
#include "remus/protect_internal.h"

#include <sodium.h>
#include <string.h>

#define WITNESS_NS UINT64_C(5000000000)
#define MAX_ROUNDS 5u
#define SMALL_PAGES 2048u        /* little enough for the first epoch */
#define SYNC_POLL_MS 100u

/* ---------------------------------------------------------------- what people see */

static int tick(void *arg, struct lb_error *err)
{
    struct prot *p = arg;
    struct lb_sender_stats st;
    uint64_t all = lb_tx_dirty_total(&p->tx);

    (void)err;
    if (p->sm.state == P_ROUNDS && p->extra_percent < 1) {
        lb_sender_get_stats(p->tx.sender, &st);
        if (all)
            p->extra_percent = (double)st.done_pages / (double)all;
    }
    lb_prot_report(p, false);
    return 0;
}

/* ---------------------------------------------------------------------- checks */

/* "what: why: remedy" as a line of the report. */
static void refuse(struct lb_report *r, const char *id, const char *text)
{
    const char *what = strchr(text, ':'), *why = what ? strchr(what + 1, ':') : NULL;
    const char *remedy = why ? why + 1 + strspn(why + 1, " ") : "";

    lb_report_add(r, id, LB_CHECK_FAIL, *remedy ? remedy : "remove it from the VM", "%.*s",
                  why ? (int)(why - text) : (int)strlen(text), text);
}

static void refuse_error(struct lb_report *r, const char *id, const struct lb_error *e)
{
    lb_report_add(r, id, LB_CHECK_FAIL,
                  e->remedy[0] ? e->remedy : "see the log of lifeboatd on this host", "%s",
                  e->message);
}

static bool refuse_all(struct lb_report *r, const char *id, char **blockers)
{
    bool any = blockers && blockers[0];

    for (unsigned i = 0; any && blockers[i]; i++)
        refuse(r, id, blockers[i]);
    lb_strv_free(blockers);
    return any;
}

static void check_output(struct prot *p, struct lb_report *r)
{
    struct lb_error e = LB_ERROR_INIT;
    char **v = lb_output_blockers(p->tx.vm, &e);

    if (!v)
        refuse_error(r, "output", &e);
    else if (!refuse_all(r, "output", v))
        lb_report_add(r, "output", LB_CHECK_OK, NULL, "everything the guest sends can be held");
}

static int check_disks(struct prot *p, struct lb_report *r, struct lb_error *err)
{
    struct lb_error e = LB_ERROR_INIT;

    if (lb_hv_disks(p->tx.vm, &p->disks, &p->n_disks, err))
        return -1;
    if (p->opts.disk == LB_DISK_NONE) {
        if (p->n_disks)
            lb_report_add(r, "disk-replication", LB_CHECK_WARN,
                          "use --disk replicate unless the guest can do without what it wrote",
                          "%u writable disk(s) are not replicated", p->n_disks);
        p->n_disks = 0;
    } else if (p->n_disks && lb_disk_source_check(&e)) {
        refuse_error(r, "disk-replication", &e);
    } else if (!refuse_all(r, "disk-replication", lb_disk_blockers(p->disks, p->n_disks))) {
        lb_report_add(r, "disk-replication", LB_CHECK_OK, NULL, "%u disk(s) to replicate",
                      p->n_disks);
    }
    return 0;
}

static int check_witness(struct prot *p, struct lb_report *r, struct lb_error *err)
{
    struct lb_witness_state now;
    struct lb_error e = LB_ERROR_INIT;
    char self[LB_KEY_TEXT_BYTES];

    lb_key_format(self, p->base->identity->pub);
    if (lb_witness_open(p->opts.witness, LB_SIDE_PRIMARY, self, p->backup->name, &p->witness, err))
        return -1;
    lb_witness_key(p->rec.key, p->entry.name, p->tx.desc.uuid, p->rec.id);
    if (lb_witness_read(p->witness, p->rec.key, &now, lb_now_ns() + WITNESS_NS, &e))
        refuse_error(r, "witness", &e);
    else
        lb_report_add(r, "witness", LB_CHECK_OK, NULL, "the witness (%s) answers",
                      lb_witness_kind(p->witness));
    return 0;
}

static int checks(struct prot *p, struct lb_report *r, struct lb_error *err)
{
    check_output(p, r);
    return check_disks(p, r, err) || check_witness(p, r, err) ? -1 : 0;
}

/* ------------------------------------------------------------------- the request */

struct spec {
    Lb__ProtectSpec s;
    Lb__ProtectDisk *v, **pv;
    char (*identities)[128];
    char *wish;
    uint8_t id[LB_TOKEN_BYTES];
};

static void spec_fill(struct spec *x, struct prot *p)
{
    unsigned n = p->n_disks;

    lb__protect_spec__init(&x->s);
    x->wish = lb_wish_json(&p->wish);
    x->v = lb_alloc(sizeof(*x->v) * (n + 1));
    x->pv = lb_alloc(sizeof(*x->pv) * (n + 1));
    x->identities = lb_alloc(sizeof(*x->identities) * (n + 1));
    lb_unhex(x->id, sizeof(x->id), p->rec.id);
    for (unsigned i = 0; i < n; i++) {
        lb__protect_disk__init(&x->v[i]);
        lb_disk_file_identity(x->identities[i], p->disks[i].path);
        x->v[i].path = p->disks[i].path;
        x->v[i].format = p->disks[i].format;
        x->v[i].size_bytes = p->disks[i].size_bytes;
        x->v[i].identity = x->identities[i];
        x->pv[i] = &x->v[i];
    }
    x->s.id = (ProtobufCBinaryData){sizeof(x->id), x->id};
    x->s.wish_json = x->wish;
    x->s.witness_key = p->rec.key;
    x->s.lease_ms = p->opts.lease_ms;
    x->s.interval_ms = p->opts.interval_ms;
    x->s.n_disks = n;
    x->s.disks = x->pv;
}

static void spec_free(struct spec *x)
{
    free(x->wish);
    free(x->v);
    free(x->pv);
    free(x->identities);
}

static int preflight(struct prot *p, struct lb_report *r, struct lb_error *err)
{
    struct spec x = {0};
    int rc;

    if (checks(p, r, err))
        return -1;
    spec_fill(&x, p);
    p->tx.protect = &x.s;
    rc = lb_tx_preflight(&p->tx, r, err);
    if (!rc)
        lb_prot_keep_request(p, &x.s);
    p->tx.protect = NULL;
    spec_free(&x);
    return rc;
}

/* From now on a crash leaves something to clean up: says so on disk. */
static int begin(struct prot *p, struct lb_error *err)
{
    if (lb_record_move(p->base->state_dir, p->entry.name, &p->rec, LB_PH_ARMING, err))
        return -1;
    p->touched = true;
    p->entry.state = LB_VM_PROTECTED;
    p->entry.note[0] = '\0';
    snprintf(p->entry.peer, sizeof(p->entry.peer), "%s", p->backup->name);
    return lb_vm_entry_save(p->base->state_dir, &p->entry, err);
}

/* ------------------------------------------------------------------------ disks */

static int disk_direct(const struct lb_disk_op *op, void *arg, struct lb_error *err)
{
    struct prot *p = arg;

    if (lb_encoder_send_disk(p->enc, p->bulk, op, err) || lb_bulk_flush(p->bulk, err))
        return -1;
    lb_prot_pace(p, op->kind == LB_DISK_WRITE ? op->len : 0);
    return 0;
}

static void disk_pressure(void *arg)
{
    struct prot *p = arg;

    pthread_mutex_lock(&p->mu);
    p->pressure = true;
    pthread_cond_broadcast(&p->cond);
    pthread_mutex_unlock(&p->mu);
}

static void disk_failed(const struct lb_error *why, void *arg)
{
    struct prot *p = arg;

    pthread_mutex_lock(&p->mu);
    if (!p->disk_failed && !p->lost)
        p->why = *why;
    p->disk_failed = true;
    pthread_cond_broadcast(&p->cond);
    pthread_mutex_unlock(&p->mu);
}

static int disk_trouble(struct prot *p, struct lb_error *err)
{
    int rc = 0;

    pthread_mutex_lock(&p->mu);
    if (p->disk_failed) {
        rc = -1;
        if (err)
            *err = p->why;
    }
    pthread_mutex_unlock(&p->mu);
    return rc;
}

static int start_mirrors(struct prot *p, struct lb_error *err)
{
    struct lb_disk_source_opts o = {.run_dir = p->run_dir, .uid = p->tx.desc.uid,
                                    .gid = p->tx.desc.gid, .direct = disk_direct,
                                    .pressure = disk_pressure, .failed = disk_failed, .arg = p};

    if (lb_disk_source_open(p->disks, p->n_disks, &o, &p->disk, err))
        return -1;
    p->mirroring = true;
    for (unsigned i = 0; i < p->n_disks; i++) {
        char name[16];

        snprintf(name, sizeof(name), "%u", i);
        if (lb_hv_disk_mirror(p->tx.vm, p->disks[i].id, lb_disk_source_socket(p->disk), name, err))
            return -1;
    }
    lb_point("pr-disks");
    return 0;
}

/* 1: all the same on both sides, 0: not yet. */
static int mirrors_ready(struct prot *p, struct lb_error *err)
{
    struct lb_mirror_status st;
    uint64_t done = 0, total = 0;
    bool ready = true;

    for (unsigned i = 0; i < p->n_disks; i++) {
        if (lb_hv_disk_mirror_status(p->tx.vm, p->disks[i].id, true, &st, err))
            return -1;
        if (st.failed)
            return lb_fail(err, LB_E_HV, "disk %.100s cannot be copied: %.200s", p->disks[i].id,
                           st.error);
        ready = ready && st.ready;
        done += st.done_bytes;
        total += st.total_bytes;
    }
    p->extra_percent = total ? (double)done / (double)total : 0;
    return ready;
}

static int copy_disks(struct prot *p, struct lb_error *err)
{
    int rc;

    if (!p->n_disks)
        return 0;
    lb_prot_move(p, P_DISKS);
    if (start_mirrors(p, err))
        return disk_trouble(p, err), -1;
    while (!(rc = mirrors_ready(p, err))) {
        if (lb_tx_check_interrupt(&p->tx, err) || disk_trouble(p, err))
            return -1;
        lb_prot_report(p, false);
        lb_sleep_ms(SYNC_POLL_MS);
    }
    return rc < 0 ? -1 : 0;
}

/* ----------------------------------------------------------------------- memory */

/* Until what is left is small, or does not get smaller: then the epochs have to carry it anyway. */
static int copy_memory(struct prot *p, struct lb_error *err)
{
    uint64_t pages, before = UINT64_MAX;

    lb_prot_move(p, P_ROUNDS);
    for (uint32_t round = 0;; round++) {
        lb_sender_round_begin(p->tx.sender, round, true);
        if (!round)
            lb_point("pr-rounds");
        if (lb_tx_wait_round(&p->tx, round, tick, p, err))
            return -1;
        p->extra_percent = 1;
        if (lb_tx_count_dirty(&p->tx, &pages, err) || lb_tx_check_interrupt(&p->tx, err))
            return -1;
        lb_log(LB_LOG_DEBUG, "pre-copy round=%u left=%llu pages", round,
               (unsigned long long)pages);
        if (pages <= SMALL_PAGES || round + 1 == MAX_ROUNDS || (round && pages > before / 4 * 3))
            break;
        before = pages;
        if (lb_tx_micro_stop(&p->tx, err))
            return -1;
    }
    if (lb_sender_state(p->tx.sender, 0, NULL, 0, err)) /* END on every connection */
        return lb_tx_explain(&p->tx, err);
    for (unsigned b = 0; b < p->tx.n_blocks; b++)
        lb_bitmap_clear_all(&p->tx.dirty[b]);
    return 0;
}

/* ------------------------------------------------------------------------ arming */

static int send_armed(struct prot *p, struct lb_error *err)
{
    Lb__Control m = LB__CONTROL__INIT;
    Lb__Armed a = LB__ARMED__INIT;

    a.revision = p->rec.revision;
    m.kind_case = LB__CONTROL__KIND_ARMED;
    m.armed = &a;
    return lb_prot_send(p, &m, err);
}

static void fresh_nonce(struct lb_remus_record *r)
{
    uint8_t nonce[(LB_PROTECT_ID_HEX - 1) / 2];

    randombytes_buf(nonce, sizeof(nonce));
    lb_hex(r->nonce, nonce, sizeof(nonce));
}

/* Revision and nonce are on disk before Armed leaves: a crash from here on is settled by the witness. */
static int arm(struct prot *p, struct lb_error *err)
{
    struct lb_guard_opts g = {.chan = p->tx.chan, .vm = p->tx.vm, .hv = p->base->hv,
                              .ident = lb_entry_ident(&p->entry), .output = p->output,
                              .witness = p->witness, .rec = &p->rec, .lease_ms = p->opts.lease_ms,
                              .lost = lb_prot_claim_lost, .changed = lb_prot_guard_changed,
                              .arg = p};
    struct lb_guard *guard;

    lb_prot_move(p, P_ARM);
    lb_point("pr-arming");
    if (lb_witness_arm(p->witness, &p->rec, lb_now_ns() + WITNESS_NS, err))
        return -1;
    fresh_nonce(&p->rec);
    if (lb_record_move(p->base->state_dir, p->entry.name, &p->rec, LB_PH_ARMING, err))
        return -1;
    lb_point("pr-armed");
    g.since_ns = lb_now_ns();
    if (lb_guard_start(&g, &guard, err))
        return -1;
    pthread_mutex_lock(&p->mu);
    p->guard = guard;
    pthread_mutex_unlock(&p->mu);
    lb_ctl_queue_tap(p->tx.ctl, lb_prot_on_message, p);
    pthread_mutex_lock(&p->tx.mu);
    p->tx.decided = true; /* from here on an interruption is the engine's to handle */
    pthread_mutex_unlock(&p->tx.mu);
    if (lb_tx_check_interrupt(&p->tx, err))
        return -1;
    if (send_armed(p, err))
        return lb_tx_explain(&p->tx, err);
    lb_point("pr-told");
    return lb_prot_ship_start(p, err);
}

static int prepare(struct prot *p, struct lb_error *err)
{
    uint64_t cache = p->opts.delta_cache_bytes, left;
    struct lb_vm_ident id = lb_entry_ident(&p->entry);

    if (!cache)
        cache = p->tx.desc.ram_bytes / 4;
    p->parts = lb_prot_parts(p, err); /* first: what is plugged in from now on is noticed */
    if (!p->parts || lb_encoder_new(p->tx.blocks, p->tx.n_blocks, cache, &p->enc, err) ||
        lb_output_open(p->tx.vm, &id, p->run_dir, &p->output, err) ||
        lb_tx_connect(&p->tx, &p->bulk, err) || copy_disks(p, err) || copy_memory(p, err))
        return -1;
    if (lb_tx_count_dirty(&p->tx, &left, err) || lb_hv_checkpoint_mode(p->tx.vm, true, err))
        return -1;
    for (unsigned i = 0; i < LB_PROT_SLOTS; i++)
        if (lb_epoch_reserve(&p->slot[i].e, left + SMALL_PAGES, err))
            return -1;
    return 0;
}

int lb_prot_setup(struct prot *p, struct lb_error *err)
{
    struct lb_report r = {0};
    int rc = lb_tx_open(&p->tx, &r, err);

    if (!rc) {
        lb_prot_move(p, P_PREFLIGHT);
        rc = preflight(p, &r, err);
    }
    lb_report_free(&r);
    if (rc || begin(p, err))
        return -1;
    lb_prot_move(p, P_LAUNCH);
    if (lb_tx_launch(&p->tx, err) || prepare(p, err))
        return -1;
    return arm(p, err);
}
