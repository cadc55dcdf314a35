/*
 * remus/protect_epoch.c - the engine: when an epoch ends, and what happens in its pause.
 *
 *   stop -- save_begin ---------------------------------- save_end -- marks -- cont
 *              scan the dirty log, copy pages to the slot                        |
 *                                                  copy frames, hand to shipper, clock, reserve
 *
 * Device state is saved after the last page was looked at: QEMU's own migration does it in that
 * order too, so its devices must not write memory while they are saved. That is not only believed:
 * every LATE_CHECK epochs the log is looked at again after the save, and if anything is
 * found the pages are captured again, then and from then on after every save.
 */
#include "remus/protect_internal.h"

#include <string.h>

#define MS UINT64_C(1000000)
#define LATE_CHECK 64u
#define ADAPTIVE_MIN_MS 5u      /* output waits: an epoch is not shorter than this */
#define ADAPTIVE_IDLE 4u        /* nothing going on: it is longer by this */
#define ADAPTIVE_IDLE_PAGES 64u
#define WATCH_MS 1u             /* how often is looked whether output waits */
#define SPARE_PAGES 1024u       /* room beyond twice what the last epoch needed */
#define CLOCK_EVERY_NS UINT64_C(1000000000)
#define CLOCK_LAG_NS UINT64_C(10000000)
#define REPORT_MS 100u
#define PARTS_EVERY_NS UINT64_C(5000000000) /* rarely: it costs the prepared commands of one pause */

/* ------------------------------------------------------------------ the pause */

static int scan(struct prot *p, uint64_t *pages, struct lb_error *err)
{
    *pages = 0;
    for (unsigned b = 0; b < p->tx.n_blocks; b++) {
        if (p->tx.blocks[b].kind == LB_RAM_ROM)
            continue;
        if (lb_hv_log_clean(p->tx.vm, &p->tx.blocks[b], &p->tx.dirty[b], err))
            return -1;
        *pages += lb_bitmap_count(&p->tx.dirty[b]);
    }
    return 0;
}

static int capture(struct prot *p, struct lb_epoch *e, struct lb_error *err)
{
    e->n_pages = 0;
    for (unsigned b = 0; b < p->tx.n_blocks; b++)
        if (p->tx.blocks[b].kind != LB_RAM_ROM &&
            lb_epoch_capture(e, p->tx.vm, &p->tx.blocks[b], &p->tx.dirty[b], err))
            return -1;
    return 0;
}

static int scan_and_capture(struct prot *p, struct lb_epoch *e, uint64_t *pages,
                            struct lb_error *err)
{
    return scan(p, pages, err) || capture(p, e, err) ? -1 : 0;
}

/* After the save: did it write memory after all? */
static int check_late(struct prot *p, struct lb_epoch *e, uint64_t pages, struct lb_error *err)
{
    uint64_t now;

    if (scan(p, &now, err)) /* adds to what was found before */
        return -1;
    if (now == pages)
        return 0;
    p->scan_after_save = true;
    lb_log(LB_LOG_WARN, "saving the device state wrote %llu pages: epochs are captured after it "
                        "from now on", (unsigned long long)(now - pages));
    return capture(p, e, err);
}

/* Epoch 1: what the guest sends and writes from here on waits for its Ack. */
static int begin_holding(struct prot *p, struct lb_error *err)
{
    if (!p->out_armed) {
        p->out_armed = true; /* also when it fails half way */
        if (lb_output_arm(p->output, err))
            return -1;
    }
    if (p->disk && !p->disk_queued) {
        if (lb_disk_source_queue(p->disk, err))
            return -1;
        p->disk_queued = true;
    }
    return 0;
}

/* A mirror that ended by itself: what this epoch wrote to the disk is not all in it. */
static int check_mirrors(struct prot *p, struct lb_error *err)
{
    struct lb_mirror_status st;

    for (unsigned i = 0; p->disk && i < p->n_disks; i++) {
        if (lb_hv_disk_mirror_status(p->tx.vm, p->disks[i].id, false, &st, err))
            return -1;
        if (st.failed)
            return lb_fail(err, LB_E_HV, "disk %.100s is no longer copied: %.200s", p->disks[i].id,
                           st.error);
    }
    return 0;
}

static int save(struct prot *p, struct lb_epoch *e, struct lb_error *err)
{
    p->saving = false;
    return lb_hv_save_end(p->tx.vm, &e->state, &e->state_len, err);
}

/* Guest stopped. */
static int take(struct prot *p, struct lb_epoch *e, struct lb_error *err)
{
    uint64_t pages = 0;
    bool check = e->number % LATE_CHECK == 1;

    if (begin_holding(p, err) || lb_hv_save_begin(p->tx.vm, false, err))
        return -1;
    p->saving = true;
    lb_output_mark_begin(p->output, e->number);
    if (p->disk)
        lb_disk_source_cut_begin(p->disk);
    if (!p->scan_after_save && scan_and_capture(p, e, &pages, err))
        return -1;
    if (save(p, e, err))
        return -1;
    if (p->scan_after_save ? scan_and_capture(p, e, &pages, err)
                           : check && check_late(p, e, pages, err))
        return -1;
    p->last_dirty = e->n_pages;
    if (lb_output_mark_end(p->output, err))
        return -1;
    if (p->disk && lb_disk_source_cut_end(p->disk, &e->disk, err))
        return -1;
    return check_mirrors(p, err);
}

/* Guest running: what of the epoch can wait. */
static int complete(struct prot *p, struct lb_epoch *e, struct lb_error *err)
{
    struct lb_error why = LB_ERROR_INIT;
    int held;

    if (lb_output_copy(p->output, e->number, LB_PROT_FRAMES_MAX, &e->frames, &e->frames_len, err))
        return -1;
    held = lb_output_verify(p->output, &why);
    if (held < 0) { /* what leaves unheld is forgotten by the backup: no protection any more */
        if (err)
            *err = why;
        return -1;
    }
    if (held > 0)
        lb_prot_note(p, "%s", why.message);
    pthread_mutex_lock(&p->mu);
    p->captured = e->number;
    p->slot[e->number % LB_PROT_SLOTS].state = SLOT_FULL;
    pthread_cond_broadcast(&p->cond);
    pthread_mutex_unlock(&p->mu);
    for (unsigned b = 0; b < p->tx.n_blocks; b++)
        lb_bitmap_clear_all(&p->tx.dirty[b]);
    return 0;
}

int lb_prot_epoch(struct prot *p, bool last, struct lb_error *err)
{
    struct lb_prot_slot *s = &p->slot[(p->captured + 1) % LB_PROT_SLOTS];
    struct lb_epoch *e = &s->e;
    bool early = p->tx.stopped; /* the guest waits already */

    e->number = p->captured + 1;
    if (!early)
        p->t_stop = lb_now_ns();
    p->tx.stopped = true;
    if (lb_hv_stop(p->tx.vm, err))
        return -1;
    e->stopped_ns = p->t_stop;
    if (take(p, e, err))
        return -1;
    if (!last) {
        if (lb_hv_cont(p->tx.vm, err))
            return -1;
        p->tx.stopped = false;
    }
    p->t_cont = e->cont_ns = lb_now_ns();
    p->lag_ns += e->cont_ns - e->stopped_ns;
    p->total_pages += e->n_pages;
    lb_pause_add(p->pauses, (double)(e->cont_ns - e->stopped_ns) / 1e6);
    return complete(p, e, err);
}

/* The guest's clock stood still in every pause (DESIGN 4). */
static void step_clock(struct prot *p)
{
    struct lb_error err = LB_ERROR_INIT;
    uint64_t now = p->t_cont, owed = p->lag_ns - p->corrected_ns;

    if (p->no_clock || !owed || (owed < CLOCK_LAG_NS && now - p->t_clock < CLOCK_EVERY_NS))
        return;
    p->t_clock = now;
    uint64_t step = owed;
    if (!lb_hv_clock_step(p->tx.vm, &step, &err)) {
        p->corrected_ns += step;
        p->lag_ns -= owed - step; /* the guest lost less than the pauses took as seen from here */
        return;
    }
    p->no_clock = err.code == LB_E_UNSUPPORTED;
    if (!p->no_clock)
        lb_log_error(LB_LOG_WARN, &err);
}

/* -------------------------------------------------------------------- waiting */

/* mu held. Slots whose epoch the backup has are emptied; true when the next one's is free. */
static bool slot_free(struct prot *p)
{
    struct lb_prot_slot *next = &p->slot[(p->captured + 1) % LB_PROT_SLOTS];

    for (unsigned i = 0; i < LB_PROT_SLOTS; i++) {
        struct lb_prot_slot *s = &p->slot[i];

        if (s->state == SLOT_SENT && s->e.number <= p->acked) {
            lb_epoch_reset(&s->e);
            s->state = SLOT_FREE;
        }
    }
    return next->state == SLOT_FREE;
}

static bool output_full(struct prot *p)
{
    struct lb_output_stats st;

    lb_output_get_stats(p->output, &st);
    return st.held_bytes > LB_OUTPUT_LIMIT_BYTES;
}

static uint64_t due_at(struct prot *p)
{
    uint64_t t = p->t_stop, idle = (uint64_t)p->opts.interval_ms * ADAPTIVE_IDLE * MS;

    if (!p->captured)
        return 0;
    if (!p->opts.adaptive)
        return t + p->opts.interval_ms * MS;
    if (lb_output_waiting(p->output))
        return p->t_cont + LB_MIN(ADAPTIVE_MIN_MS, p->opts.interval_ms) * MS;
    return p->last_dirty < ADAPTIVE_IDLE_PAGES ? t + idle : t + p->opts.interval_ms * MS;
}

enum event { EV_EPOCH, EV_STOP, EV_TICK, EV_END };

/* mu held. */
static bool ended(struct prot *p, enum lb_prot_why *why)
{
    if (lb_guard_verdict(p->guard) != LB_GUARD_OPEN)
        *why = WHY_VERDICT;
    else if (p->lost)
        *why = WHY_LOST;
    else if (p->disk_failed)
        *why = WHY_BROKEN;
    else if (p->cancel)
        *why = WHY_CANCEL;
    else if (p->yield && p->may_release)
        *why = WHY_YIELD;
    else
        return false;
    return true;
}

/* mu held. What to do now; EV_TICK: nothing yet, *until is when to look again. */
static enum event consider(struct prot *p, enum lb_prot_why *why, uint64_t *until)
{
    uint64_t now = lb_now_ns(), due;
    bool room = slot_free(p), full;

    if (ended(p, why))
        return EV_END;
    due = due_at(p);
    full = p->pressure || output_full(p);
    if (room && (now >= due || full || p->tx.stopped))
        return EV_EPOCH;
    if (!room && full && !p->tx.stopped)
        return EV_STOP;
    if (!room && now > due)
        p->stretched = true;
    *until = now + REPORT_MS * MS;
    if (room)
        *until = LB_MIN(*until, due);
    if (p->opts.adaptive || !room)
        *until = LB_MIN(*until, now + WATCH_MS * MS);
    return EV_TICK;
}

/* mu held. The engine has to see to it that output is released. */
static bool first_acked(const struct prot *p)
{
    return p->acked && !p->may_release;
}

static enum event wait_event(struct prot *p, enum lb_prot_why *why)
{
    uint64_t until = 0, give_up = lb_now_ns() + REPORT_MS * MS;
    enum event ev;

    pthread_mutex_lock(&p->mu);
    while ((ev = consider(p, why, &until)) == EV_TICK && lb_now_ns() < give_up &&
           !first_acked(p))
        lb_prot_wait(p, until);
    if (ev == EV_EPOCH)
        p->pressure = false;
    pthread_mutex_unlock(&p->mu);
    return ev;
}

bool lb_prot_drain(struct prot *p, uint64_t deadline_ns)
{
    bool all;

    pthread_mutex_lock(&p->mu);
    while (p->acked < p->captured && !p->lost && lb_now_ns() < deadline_ns &&
           lb_guard_verdict(p->guard) == LB_GUARD_OPEN)
        lb_prot_wait(p, deadline_ns);
    all = p->acked == p->captured;
    slot_free(p);
    pthread_mutex_unlock(&p->mu);
    return all;
}

/* -------------------------------------------------------------------- the loop */

void lb_prot_drop_save(struct prot *p)
{
    void *buf = NULL;
    size_t len;

    if (p->saving && !lb_hv_save_end(p->tx.vm, &buf, &len, NULL))
        free(buf);
    p->saving = false;
}

int lb_prot_resume(struct prot *p, struct lb_error *err)
{
    struct lb_vm_ident id = lb_entry_ident(&p->entry);
    uint64_t until = lb_now_ns() + LB_PROT_CONT_FOR_NS;

    lb_prot_drop_save(p);
    while (p->tx.stopped) {
        if (!lb_hv_cont(p->tx.vm, err))
            p->tx.stopped = false;
        else if (!lb_hv_exists(p->base->hv, &id) || lb_now_ns() > until)
            return -1;
        else
            lb_sleep_ms(50);
    }
    return 0;
}

/* The queue of the disks or of the output is full and there is no slot: the guest waits. */
static int stop_early(struct prot *p, struct lb_error *err)
{
    lb_prot_note(p, "the guest waits: it writes or sends faster than the backup can follow");
    p->t_stop = lb_now_ns();
    p->tx.stopped = true;
    return lb_hv_stop(p->tx.vm, err);
}

/* The first Ack: on disk first, then output may leave. */
static int first_ack(struct prot *p, struct lb_error *err)
{
    bool first;

    pthread_mutex_lock(&p->mu);
    first = first_acked(p);
    pthread_mutex_unlock(&p->mu);
    if (!first)
        return 0;
    lb_point("pr-first");
    if (lb_record_move(p->base->state_dir, p->entry.name, &p->rec, LB_PH_PROTECTED, err))
        return -1;
    lb_point("pr-recorded");
    lb_prot_release_from_now(p);
    lb_prot_move(p, P_PROTECTED);
    return 0;
}

/* --------------------------------------------------------- what the VM is made of */

char *lb_prot_parts(struct prot *p, struct lb_error *err)
{
    LB_AUTO_FREE struct lb_nic *nics = NULL;
    LB_AUTO_FREE struct lb_hv_disk *disks = NULL;
    unsigned n_nics = 0, n_disks = 0;
    char *text, *longer;

    if (lb_hv_nics(p->tx.vm, &nics, &n_nics, err) || lb_hv_disks(p->tx.vm, &disks, &n_disks, err))
        return NULL;
    text = lb_strdup("");
    for (unsigned i = 0; i < n_nics + n_disks; i++, free(text), text = longer)
        longer = i < n_nics ? lb_asprintf("%s card %s,", text, nics[i].id)
                            : lb_asprintf("%s disk %s,", text, disks[i - n_nics].id);
    return text;
}

/* Nobody says so when a card or a disk is plugged in: its output would not be held, its contents not be
 * copied, and the standby does not have it. */
static int check_parts(struct prot *p, struct lb_error *err)
{
    uint64_t now = lb_now_ns();

    if (now - p->t_parts < PARTS_EVERY_NS)
        return 0;
    p->t_parts = now;
    LB_AUTO_FREE char *parts = lb_prot_parts(p, err);
    if (!parts || !strcmp(parts, p->parts))
        return parts ? 0 : -1;
    lb_fail(err, LB_E_STATE, "VM %s was changed while it was protected: it had%.150s now it has%.150s",
            p->entry.name, p->parts, parts);
    return lb_remedy(err, "it is protected again by itself, as it is now, when the other host can have a "
                          "VM like it");
}

static enum lb_prot_why broken(struct prot *p, struct lb_error *err)
{
    struct lb_vm_ident id = lb_entry_ident(&p->entry);
    bool alive = true, running;

    if (lb_guard_verdict(p->guard) != LB_GUARD_OPEN)
        return WHY_VERDICT;
    lb_log_error(LB_LOG_WARN, err);
    if (lb_hv_shut_down(p->tx.vm))
        return WHY_POWEROFF;
    lb_hv_status(p->tx.vm, &alive, &running, NULL); /* its socket may be closed before it is gone */
    return alive && lb_hv_exists(p->base->hv, &id) ? WHY_BROKEN : WHY_KILLED;
}

static int after_epoch(struct prot *p, struct lb_error *err)
{
    struct lb_prot_slot *next = &p->slot[(p->captured + 1) % LB_PROT_SLOTS];
    bool room;

    step_clock(p);
    pthread_mutex_lock(&p->mu);
    room = slot_free(p);
    p->stretched = p->stretched && !room;
    pthread_mutex_unlock(&p->mu);
    return room ? lb_epoch_reserve(&next->e, 2 * p->last_dirty + SPARE_PAGES, err) : 0;
}

enum lb_prot_why lb_prot_engine(struct prot *p, struct lb_error *err)
{
    enum lb_prot_why why = WHY_BROKEN;

    for (;;) {
        int rc = 0;

        switch (wait_event(p, &why)) {
        case EV_EPOCH:
            rc = lb_prot_epoch(p, false, err) || after_epoch(p, err);
            break;
        case EV_STOP:
            rc = stop_early(p, err);
            break;
        case EV_TICK:
            break;
        case EV_END:
            if (err && (why == WHY_LOST || why == WHY_BROKEN))
                *err = p->why;
            return why;
        }
        if (rc || first_ack(p, err) || check_parts(p, err))
            return broken(p, err);
        lb_prot_report(p, false);
    }
}
