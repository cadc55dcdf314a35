/*
 * migrate/out_rounds.c - pre-copy rounds and the stop-and-copy of the source session.
 *
 * A round sends the pages that were dirty at its start.
 */
#include "migrate/out_internal.h"

#include "migrate/frames.h"

#include <string.h>
#include <xxhash.h>

#define REPAIRS 3u

static int pause_guest(struct out *o, uint64_t *pages, struct lb_error *err)
{
    lb_frames_start(o->frames);
    return lb_tx_pause(&o->tx, pages, err);
}

static int continue_guest(struct out *o, struct lb_error *err)
{
    if (lb_tx_continue(&o->tx, err))
        return -1;
    lb_frames_discard(o->frames);
    return 0;
}

/* -------------------------------------------------------------------- rounds */

static int round_tick(void *arg, struct lb_error *err)
{
    struct out *o = arg;

    lb_out_report(o, false);
    if (o->opts->timeout_ms && lb_out_ms_since(o->t_start) > o->opts->timeout_ms) {
        lb_fail(err, LB_E_NO_CONVERGE, "no end within --timeout %llu ms",
                (unsigned long long)o->opts->timeout_ms);
        return lb_remedy(err, "raise --timeout or --bandwidth");
    }
    return 0;
}

/* Returns 1 to go on with another round, 0 to stop and copy, -1 on failure. The guest is
 * paused: nothing slow here. *throttle: what to slow it to once it continues. */
static int decide(struct out *o, unsigned *throttle, struct lb_error *err)
{
    struct lb_round_stats *r = &o->rounds[o->n_rounds - 1];
    struct lb_policy_in in = {0};
    struct lb_policy_out out = {0};
    uint64_t sent = 0, wire = 0;

    for (unsigned i = o->n_rounds > 3 ? o->n_rounds - 3 : 0; i < o->n_rounds; i++) {
        sent += o->rounds[i].pages_sent;
        wire += o->rounds[i].wire_bytes;
    }
    in.rounds = o->rounds;
    in.n_rounds = o->n_rounds;
    in.max_downtime_ms = o->opts->max_downtime_ms;
    in.aim_downtime_ms = LB_AIM_DOWNTIME_MS;
    /* stop + log + state + load + two journal writes; the parts that only the end shows
     * are taken from what QEMU needs at least (DESIGN 2a) */
    in.fixed_downtime_ms = o->tx.stop_ms + 10;
    in.bytes_per_page = sent ? (double)wire / (double)sent : LB_PAGE_SIZE;
    in.elapsed_ms = lb_out_ms_since(o->t_start);
    in.timeout_ms = o->opts->timeout_ms;
    in.bandwidth_limit = o->opts->bandwidth_bytes_per_s;
    in.compress_possible = o->opts->compress == LB_COMPRESS_AUTO && o->prog.zstd_level == 0 &&
                           lb_sender_compressible(o->tx.sender);
    in.throttle_possible = o->opts->allow_throttle && o->throttle_percent < 99;
    in.throttle_percent = o->throttle_percent;
    lb_policy_decide(&in, &out);
    o->prog.predicted_downtime_ms = out.predicted_downtime_ms;
    o->prog.eta_s = out.eta_s;
    o->prog.converges = out.converges;
    lb_log(LB_LOG_DEBUG, "round=%u sent=%llu skipped=%llu dirty=%llu %.1f ms: %s", r->round,
           (unsigned long long)r->pages_sent, (unsigned long long)r->pages_skipped,
           (unsigned long long)r->dirty_pages_after, (double)r->duration_ns / 1e6, out.reason);
    switch (out.decision) {
    case LB_POLICY_CONTINUE:
        return 1;
    case LB_POLICY_STOP_AND_COPY:
        return 0;
    case LB_POLICY_COMPRESS:
        lb_out_note(o, out.reason);
        lb_sender_force_compress(o->tx.sender);
        return 1;
    case LB_POLICY_THROTTLE:
        lb_out_note(o, out.reason);
        *throttle = out.throttle_percent;
        return 1;
    case LB_POLICY_ABORT:
        lb_out_note(o, out.reason);
        lb_fail(err, LB_E_NO_CONVERGE, "%s", out.reason);
        return lb_remedy(err, "raise --max-downtime or --bandwidth, use --compress zstd, or "
                              "migrate when the guest is quieter; the VM runs here");
    }
    return lb_fail(err, LB_E_INTERNAL, "the policy decided nothing");
}

static void slow_down(struct out *o, unsigned percent)
{
    struct lb_error e = LB_ERROR_INIT;

    o->throttle_percent = percent;
    o->throttled = true;
    if (lb_hv_throttle(o->tx.vm, percent, &e)) {
        lb_log_error(LB_LOG_WARN, &e);
        o->throttle_percent = 99; /* one step of the ladder fewer */
    }
}

int lb_out_precopy(struct out *o, struct lb_error *err)
{
    struct lb_sender_stats st;
    uint32_t round = 0;
    int rc;

    o->bytes_seen_ns = 0; /* setup is no part of the rate */
    lb_out_move(o, S_ROUNDS);
    for (;; round++) {
        struct lb_round_stats *r;
        uint64_t pages;
        unsigned throttle;

        if (o->n_rounds == MAX_ROUNDS) { /* keep the recent half */
            memmove(o->rounds, o->rounds + MAX_ROUNDS / 2, sizeof(*o->rounds) * MAX_ROUNDS / 2);
            o->n_rounds = MAX_ROUNDS / 2;
        }
        r = &o->rounds[o->n_rounds];
        memset(r, 0, sizeof(*r));
        o->t_round = lb_now_ns();
        o->round_pages = lb_tx_dirty_total(&o->tx);
        o->prog.round = round;
        o->prog.dirty_pages = o->round_pages;
        lb_sender_get_stats(o->tx.sender, &st);
        o->wire_before = st.bulk.wire_bytes;
        lb_sender_round_begin(o->tx.sender, round, true);
        lb_out_report(o, false);
        lb_point(round == 0 ? "src-round-0" : "src-round-n");
        if (lb_tx_wait_round(&o->tx, round, round_tick, o, err))
            return -1;
        lb_sender_get_stats(o->tx.sender, &st);
        r->round = round;
        r->pages_skipped = st.skipped_pages;
        r->pages_sent = o->round_pages - st.skipped_pages;
        r->wire_bytes = st.bulk.wire_bytes - o->wire_before;
        r->duration_ns = lb_now_ns() - o->t_round;
        /* Paused before it is decided: what is decided about is exactly what is left, and when
         * it is little enough the guest needs no second pause. */
        if (pause_guest(o, &pages, err))
            return -1;
        r->guest_ran_ns = o->tx.t_stop - o->tx.t_clean;
        r->dirty_pages_after = pages;
        o->n_rounds++;
        o->res->rounds = round + 1;
        o->dirty_rate = (double)pages * LB_PAGE_SIZE * 1e9 / (double)r->guest_ran_ns;
        if (lb_tx_check_interrupt(&o->tx, err))
            return -1;
        throttle = 0;
        rc = decide(o, &throttle, err);
        if (rc <= 0)
            return rc;
        if (continue_guest(o, err))
            return -1;
        if (throttle)
            slow_down(o, throttle);
    }
}

/* -------------------------------------------------------------- stop and copy */

static int send_last(struct out *o, uint32_t round, struct lb_error *err)
{
    int rc;

    lb_sender_round_begin(o->tx.sender, round, false);
    while ((rc = lb_sender_round_wait(o->tx.sender, 20, err)) == 1)
        ;
    return rc ? lb_tx_explain(&o->tx, err) : 0;
}

/* Zero copy, the guest is paused: what is other than its checksum now was damaged on its way. */
static int repair(struct out *o, uint32_t *round, struct lb_error *err)
{
    for (unsigned tries = 0; tries <= REPAIRS; tries++) {
        if (tries && send_last(o, ++*round, err))
            return -1;
        if (lb_tx_wait_done(&o->tx, *round, true, err))
            return -1;
        for (unsigned b = 0; b < o->tx.n_blocks; b++)
            lb_bitmap_clear_all(&o->tx.dirty[b]);
        if (!lb_tx_add_bad(&o->tx))
            return 0;
    }
    lb_fail(err, LB_E_NET, "pages arrive damaged over RDMA again and again");
    return lb_remedy(err, "see to the fabric (cables, firmware, memory of the device), or migrate with "
                          "--transport tcp");
}

static int digest_blocks(struct out *o, uint8_t out[16], struct lb_error *err)
{
    LB_AUTO_FREE const struct lb_ram_block **v = lb_alloc(sizeof(*v) * (o->tx.n_blocks + 1));
    LB_AUTO_FREE uint32_t *ids = lb_alloc(sizeof(*ids) * (o->tx.n_blocks + 1));
    unsigned n = 0;

    for (unsigned b = 0; b < o->tx.n_blocks; b++)
        if (o->tx.blocks[b].kind != LB_RAM_ROM) {
            ids[n] = o->tx.blocks[b].id;
            v[n++] = &o->tx.blocks[b];
        }
    return lb_memory_digest(o->tx.vm, v, ids, n, o->tx.n_threads + 1, out, err);
}

static int send_finish(struct out *o, uint32_t round, size_t len, uint64_t sum,
                       const uint8_t *digest, struct lb_error *err)
{
    Lb__Control m = LB__CONTROL__INIT;
    Lb__Finish f = LB__FINISH__INIT;

    f.round = round;
    f.state_bytes = len;
    f.state_checksum = sum;
    if (digest)
        f.digest = (ProtobufCBinaryData){16, (uint8_t *)digest};
    m.kind_case = LB__CONTROL__KIND_FINISH;
    m.finish = &f;
    return lb_ctl_send(o->tx.chan, &m, err) ? lb_tx_explain(&o->tx, err) : 0;
}

/* The guest is paused since the last round and dirty[] is what is left. Every microsecond
 * here is downtime: the hypervisor saves its device state while we send, and a second
 * scan afterwards catches what saving itself wrote. */
int lb_out_stop_and_copy(struct out *o, struct lb_error *err)
{
    uint32_t round = o->res->rounds;
    LB_AUTO_FREE void *state = NULL;
    size_t state_len = 0;
    uint64_t pages = lb_tx_dirty_total(&o->tx), late;
    uint8_t digest[16];

    lb_point("src-stopped");
    if (lb_hv_save_begin(o->tx.vm, true, err))
        return -1;
    o->saving = true;
    lb_out_move(o, S_FINAL);
    if (send_last(o, round, err))
        return -1;
    o->saving = false;
    if (lb_hv_save_end(o->tx.vm, &state, &state_len, err))
        return -1;
    lb_point("src-saved");
    /* A round of its own: a page of both must not overtake itself on another connection. */
    round++;
    if (lb_tx_fetch_log(&o->tx, &late, err) || send_last(o, round, err))
        return -1;
    if (o->tx.zero_copy && repair(o, &round, err))
        return -1;
    o->res->final_dirty_pages = (double)(pages + late);
    if (lb_sender_state(o->tx.sender, round, state, state_len, err))
        return lb_tx_explain(&o->tx, err);
    if (o->opts->verify) {
        if (digest_blocks(o, digest, err))
            return -1;
        lb_hex(o->res->digest, digest, sizeof(digest));
    }
    if (send_finish(o, round, state_len, XXH3_64bits(state, state_len),
                    o->opts->verify ? digest : NULL, err))
        return -1;
    lb_log(LB_LOG_DEBUG, "stop-and-copy: %llu + %llu pages, %zu bytes of state sent after %.1f ms",
           (unsigned long long)pages, (unsigned long long)late, state_len,
           (double)(lb_now_ns() - o->tx.t_stop) / 1e6);
    return 0;
}

static uint64_t prepared_timeout_ns(const struct out *o)
{
    return PREPARED_TIMEOUT_NS + (o->opts->verify ? 2 * o->tx.desc.ram_bytes : 0);
}

int lb_out_wait_prepared(struct out *o, struct lb_error *err)
{
    Lb__Control *m = NULL;
    uint32_t load_us;

    lb_sm_move(&o->sm, S_WAIT);
    for (;;) {
        if (lb_ctl_queue_pop(o->tx.ctl, &m, lb_now_ns() + prepared_timeout_ns(o), err))
            return lb_tx_explain(&o->tx, err);
        if (m->kind_case == LB__CONTROL__KIND_PREPARED)
            break;
        if (m->kind_case != LB__CONTROL__KIND_ROUND_DONE) { /* of the last round: no news */
            lb__control__free_unpacked(m, NULL);
            return lb_fail(err, LB_E_PROTO, "the peer answered Finish with something else");
        }
        lb__control__free_unpacked(m, NULL);
    }
    load_us = m->prepared->load_us;
    o->res->load_ms = load_us / 1000.0;
    lb__control__free_unpacked(m, NULL);
    return 0;
}

