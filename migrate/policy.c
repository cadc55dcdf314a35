/* migrate/policy.c - when to stop the guest, and what to do when that moment does
 * not come.
 *
 * The guest may be stopped when what is left fits into the allowed pause:
 *
 *      predicted = fixed + remaining pages * time per page        <= max_downtime
 *
 * "fixed" (stop, device state, load, commits) does not depend on us, so only
 * max_downtime - fixed can be spent on pages.  We do not spend what is allowed as
 * long as less will do: first the aim (a pause that clients do not notice), of that at
 * first half, the whole of it once shrinking slows down, and what is allowed
 * beyond it only when the guest does not let us reach the aim.
 *
 * A round is stalled when the dirty set is no longer 10 % smaller than it was two
 * rounds (and one round) ago and does not fit, or when it shrinks so slowly that the
 * round limit would come first.  The position on the ladder follows from the number
 * of stalled rounds in the history and from what is already switched on, so this
 * stays a pure function:
 *
 *      stalled rounds 1, 2    more time, whole allowance
 *      then                   the whole allowed downtime, when that is enough
 *      then                   compression, if it is off and would save
 *      then                   throttle 20 %, growing with every further stalled round
 *      then                   give up, and say what would help
 */
#include "migrate/policy.h"

#include <math.h>
#include <string.h>

enum {
    MAX_ROUNDS = 64,
    MORE_TIME_ROUNDS = 2,      /* stalled rounds that are only watched */
    THROTTLE_FIRST = 20,
    THROTTLE_HIGH = 90,
    THROTTLE_LAST = 99,
    MAX_POLISH_ROUNDS = 3,     /* rounds spent on a shorter pause than allowed */
};
#define STALL_RATIO 0.9        /* shrinking by less than 10 % */
#define POLISH_RATIO 0.75      /* a further round must promise a quarter less */
#define MIN_BUDGET_MS 2.0      /* less than that cannot be reached by any guest that works */
#define RATE_WINDOW_NS (UINT64_C(200) * 1000000)
#define FORECAST_FIXED_MS 15.0 /* stop + save + load + commits of a small machine */
#define PAGE ((double)LB_PAGE_SIZE)

/* What the history says, in one place. */
struct view {
    double page_ms;        /* time to move one page now; 0 unknown */
    double rate;           /* wire bytes/s; 0 unknown */
    double dirty_bytes_s;  /* guest memory dirtied, last round */
    double budget_ms;      /* for pages; see budget() */
    double fit_pages;      /* that many fit the budget; 0 when page_ms is unknown */
    double max_pages;      /* that many fit what is allowed at most */
    double ratio;          /* dirty set now / one round ago; 0 unknown */
    uint64_t dirty;        /* pages left */
    unsigned stalls;       /* stalled rounds so far, the last one included */
    bool stalled;          /* the last one */
};

static void say(struct lb_policy_out *out, enum lb_decision decision, const char *fmt, ...)
    LB_PRINTF(3, 4);

static void say(struct lb_policy_out *out, enum lb_decision decision, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(out->reason, sizeof(out->reason), fmt, ap);
    va_end(ap);
    out->decision = decision;
}

/* Milliseconds of the pause that pages may take.  When the fixed part alone eats
 * the allowance, waiting cannot help: a floor lets the migration end with a pause
 * that is nearly all fixed, and the prediction says so honestly. */
static double budget(double max_ms, double fixed_ms)
{
    double left = max_ms - fixed_ms;
    return left >= MIN_BUDGET_MS ? left : LB_MAX(MIN_BUDGET_MS, fixed_ms * 0.1);
}

static uint32_t aim_ms(const struct lb_policy_in *in)
{
    return in->aim_downtime_ms ? LB_MIN(in->aim_downtime_ms, in->max_downtime_ms)
                               : in->max_downtime_ms;
}

/* Newest rounds, as many as make a window long enough for a meaningful rate:
 * the last rounds are short and mostly overhead. */
static void measure_rate(const struct lb_policy_in *in, struct view *v)
{
    double wire = 0, pages = 0;
    uint64_t ns = 0;

    for (unsigned i = in->n_rounds; i-- > 0 && ns < RATE_WINDOW_NS;) {
        wire += (double)in->rounds[i].wire_bytes;
        pages += (double)in->rounds[i].pages_sent;
        ns += in->rounds[i].duration_ns;
    }
    if (ns == 0 || pages == 0)
        return;
    v->rate = wire / ((double)ns / 1e9);
    if (in->bandwidth_limit && v->rate > (double)in->bandwidth_limit)
        v->rate = (double)in->bandwidth_limit;
    /* Two views of the same thing; the slower one counts: bytes when the link is
     * the limit, pages when the processor is (compression, encryption). */
    v->page_ms = (double)ns / 1e6 / pages;
    if (in->bytes_per_page > 0 && v->rate > 0)
        v->page_ms = LB_MAX(v->page_ms, in->bytes_per_page / v->rate * 1000);
}

/* Shrinking, but so slowly that the round limit would come first. */
static bool too_slow(double dirty, double two_ago, double fit, unsigned round)
{
    double ratio = sqrt(dirty / two_ago); /* per round */
    return ratio >= 1 || round + log(fit / dirty) / log(ratio) > MAX_ROUNDS - 4;
}

static bool round_stalled(const struct lb_round_stats *r, unsigned i, double fit)
{
    double now = (double)r[i].dirty_pages_after;
    if (i < 2 || fit <= 0 || now <= fit)
        return false;
    double one = (double)r[i - 1].dirty_pages_after, two = (double)r[i - 2].dirty_pages_after;
    if (now > STALL_RATIO * two && now > STALL_RATIO * one)
        return true;
    /* not right after a step that took effect: its first round is no trend */
    return i >= 4 && now > 0.75 * one && two > 0 && too_slow(now, two, fit, i);
}

static void look(const struct lb_policy_in *in, struct view *v)
{
    const struct lb_round_stats *last = &in->rounds[in->n_rounds - 1];

    memset(v, 0, sizeof(*v));
    v->dirty = last->dirty_pages_after;
    v->budget_ms = budget(aim_ms(in), in->fixed_downtime_ms);
    if (last->guest_ran_ns)
        v->dirty_bytes_s = (double)v->dirty * PAGE / ((double)last->guest_ran_ns / 1e9);
    measure_rate(in, v);
    if (v->page_ms > 0) {
        v->fit_pages = v->budget_ms / v->page_ms;
        v->max_pages = budget(in->max_downtime_ms, in->fixed_downtime_ms) / v->page_ms;
    }
    if (in->n_rounds >= 2 && last[-1].dirty_pages_after)
        v->ratio = (double)v->dirty / (double)last[-1].dirty_pages_after;
    for (unsigned i = 0; i < in->n_rounds; i++)
        v->stalls += round_stalled(in->rounds, i, v->fit_pages);
    v->stalled = round_stalled(in->rounds, in->n_rounds - 1, v->fit_pages);
}

/* Rounds that already fitted and were followed by another one for a shorter pause. */
static unsigned polished(const struct lb_policy_in *in, const struct view *v)
{
    unsigned n = 0;
    for (unsigned i = 0; i + 1 < in->n_rounds; i++)
        n += (double)in->rounds[i].dirty_pages_after <= v->fit_pages;
    return n;
}

/* It fits. Is one more round worth it? */
static bool worth_polishing(const struct lb_policy_in *in, const struct view *v)
{
    double pages_ms = (double)v->dirty * v->page_ms;
    if (pages_ms <= v->budget_ms / 2 || pages_ms <= in->fixed_downtime_ms * 0.2 ||
        pages_ms <= MIN_BUDGET_MS)
        return false;
    if (v->stalls || in->throttle_percent || in->n_rounds >= MAX_ROUNDS - 1)
        return false;
    return v->ratio > 0 && v->ratio <= POLISH_RATIO && polished(in, v) < MAX_POLISH_ROUNDS;
}

/* The last step has no way back, so it asks for more than a stall: the best of the
 * last three rounds is no better than the best before them. */
static bool hopeless(const struct lb_policy_in *in)
{
    uint64_t before = UINT64_MAX, recent = UINT64_MAX;
    for (unsigned i = 0; i < in->n_rounds; i++) {
        uint64_t *best = i + 3 < in->n_rounds ? &before : &recent;
        *best = LB_MIN(*best, in->rounds[i].dirty_pages_after);
    }
    return (double)recent > 0.98 * (double)before;
}

static unsigned next_throttle(const struct lb_policy_in *in, const struct view *v)
{
    unsigned now = in->throttle_percent;
    if (now == 0)
        return THROTTLE_FIRST;
    if (now >= THROTTLE_HIGH)
        return THROTTLE_LAST;
    /* Far from converging: bigger steps. */
    unsigned step = v->ratio > 0 && v->ratio < 0.95 ? 10 : 20;
    return LB_MIN(now + step, (unsigned)THROTTLE_HIGH);
}

static double link_pages_bytes_s(const struct view *v)
{
    return v->page_ms > 0 ? PAGE / v->page_ms * 1000 : 0;
}

static void give_up(const struct lb_policy_in *in, const struct view *v, const char *why,
                    struct lb_policy_out *out)
{
    char dirty[32], rate[32];
    lb_human_bytes(dirty, sizeof(dirty), v->dirty_bytes_s);
    lb_human_bytes(rate, sizeof(rate), link_pages_bytes_s(v));
    say(out, LB_POLICY_ABORT,
        "%s: guest dirties %s/s, link carries %s/s, pause %.0f ms; raise --max-downtime or "
        "--bandwidth%s, or retry when quieter", why, dirty, rate, out->predicted_downtime_ms,
        in->compress_possible ? ", try --compress zstd" : "");
    out->converges = 0;
}

static void ladder(const struct lb_policy_in *in, const struct view *v, struct lb_policy_out *out)
{
    char dirty[32], rate[32];
    lb_human_bytes(dirty, sizeof(dirty), v->dirty_bytes_s);
    lb_human_bytes(rate, sizeof(rate), link_pages_bytes_s(v));

    if (v->stalls <= MORE_TIME_ROUNDS) {
        say(out, LB_POLICY_CONTINUE,
            "more time: the dirty set does not shrink (%s/s dirtied, %s/s carried), %.0f ms "
            "predicted", dirty, rate, out->predicted_downtime_ms);
    } else if ((double)v->dirty <= v->max_pages) {
        say(out, LB_POLICY_STOP_AND_COPY,
            "allowed downtime: %u ms cannot be reached (%s/s dirtied, %s/s carried), %.0f of %u ms "
            "allowed will do", aim_ms(in), dirty, rate, out->predicted_downtime_ms,
            in->max_downtime_ms);
    } else if (in->compress_possible) {
        say(out, LB_POLICY_COMPRESS, "compression: %u stalled rounds, %s/s dirtied, %s/s carried",
            v->stalls, dirty, rate);
    } else if (in->throttle_possible && in->throttle_percent < THROTTLE_LAST) {
        out->throttle_percent = next_throttle(in, v);
        say(out, LB_POLICY_THROTTLE,
            "throttling the guest to %u %%: %u stalled rounds, %s/s dirtied, %s/s carried",
            out->throttle_percent, v->stalls, dirty, rate);
    } else if (!hopeless(in)) {
        say(out, LB_POLICY_CONTINUE, "nothing left but time: shrinks slowly (%s/s dirtied, %s/s "
            "carried)", dirty, rate);
    } else {
        give_up(in, v, in->throttle_percent ? "does not converge even throttled"
                                            : "does not converge", out);
    }
}

/* Geometric series until it fits. */
static void estimate_end(const struct lb_policy_in *in, const struct view *v,
                         struct lb_policy_out *out)
{
    double dirty = (double)v->dirty, left_ms = out->predicted_downtime_ms;

    if (v->page_ms <= 0)
        return;
    if (dirty <= v->fit_pages) {
        out->converges = 1;
    } else if (v->ratio > 0 && v->ratio < 0.97 && !v->stalled) {
        double rounds = ceil(log(v->fit_pages / dirty) / log(v->ratio));
        double shrink = pow(v->ratio, rounds);
        left_ms = dirty * v->page_ms * (1 - shrink) / (1 - v->ratio) + in->fixed_downtime_ms +
                  dirty * shrink * v->page_ms;
        out->converges = 1;
    } else {
        if (v->stalls > 0)
            out->converges = 0;
        return;
    }
    out->eta_s = left_ms / 1000;
}

void lb_policy_decide(const struct lb_policy_in *in, struct lb_policy_out *out)
{
    struct view v;

    memset(out, 0, sizeof(*out));
    out->eta_s = -1;
    out->converges = -1;
    out->throttle_percent = in->throttle_percent;
    if (in->n_rounds == 0) {
        say(out, LB_POLICY_CONTINUE, "first round");
        return;
    }
    look(in, &v);
    out->predicted_downtime_ms = in->fixed_downtime_ms + (double)v.dirty * v.page_ms;
    estimate_end(in, &v, out);

    bool fits = v.dirty == 0 || (v.page_ms > 0 && (double)v.dirty <= v.fit_pages);
    bool late = in->timeout_ms && in->elapsed_ms >= in->timeout_ms;
    if (fits && !late && worth_polishing(in, &v)) {
        say(out, LB_POLICY_CONTINUE, "would fit (%.1f ms), but still shrinks well",
            out->predicted_downtime_ms);
    } else if (fits) {
        out->converges = 1;
        out->eta_s = out->predicted_downtime_ms / 1000;
        if (out->predicted_downtime_ms > in->max_downtime_ms)
            say(out, LB_POLICY_STOP_AND_COPY,
                "%.1f ms predicted: the fixed part alone (%.1f ms) leaves nothing of max-downtime "
                "%u ms, more rounds cannot help", out->predicted_downtime_ms,
                in->fixed_downtime_ms, in->max_downtime_ms);
        else
            say(out, LB_POLICY_STOP_AND_COPY, "%.1f ms predicted, %u ms wanted",
                out->predicted_downtime_ms, aim_ms(in));
    } else if ((late || in->n_rounds >= MAX_ROUNDS) && v.max_pages > 0 &&
               (double)v.dirty <= v.max_pages) {
        say(out, LB_POLICY_STOP_AND_COPY, "%s, and %.0f ms are allowed: %.0f ms predicted",
            late ? "the time is over" : "many rounds", (double)in->max_downtime_ms,
            out->predicted_downtime_ms);
    } else if (in->throttle_percent >= THROTTLE_LAST && v.max_pages > 0 &&
               (double)v.dirty <= v.max_pages) {
        /* A starved guest writes in bursts, one per quota period: do not wait for better. */
        say(out, LB_POLICY_STOP_AND_COPY, "the guest cannot be throttled more, and %.0f ms are "
            "allowed: %.0f ms predicted", (double)in->max_downtime_ms, out->predicted_downtime_ms);
    } else if (late) {
        give_up(in, &v, "timeout", out);
    } else if (in->n_rounds >= MAX_ROUNDS) {
        give_up(in, &v, "too many rounds", out);
    } else if (v.stalled) {
        ladder(in, &v, out);
    } else {
        say(out, LB_POLICY_CONTINUE, "%.0f ms predicted, %u ms wanted",
            out->predicted_downtime_ms, aim_ms(in));
    }
}

/* Bytes of a working set that are dirty after t seconds of uniform writing. */
static double dirtied(double rate, double working_set, double t)
{
    return working_set > 0 ? working_set * -expm1(-rate * t / working_set) : rate * t;
}

void lb_policy_forecast(uint64_t populated_bytes, double dirty_bytes_per_s, uint64_t working_set_bytes,
                        double link_bytes_per_s, uint32_t max_downtime_ms,
                        struct lb_policy_out *out)
{
    double left = (double)populated_bytes, set = (double)working_set_bytes, total_s = 0;
    char dirty[32], link[32];

    memset(out, 0, sizeof(*out));
    out->eta_s = -1;
    out->converges = -1;
    lb_human_bytes(dirty, sizeof(dirty), dirty_bytes_per_s);
    lb_human_bytes(link, sizeof(link), link_bytes_per_s);
    if (!(link_bytes_per_s > 0)) {
        say(out, LB_POLICY_CONTINUE, "the link's rate is not known yet; the guest dirties %s/s",
            dirty);
        return;
    }
    double fit = budget(max_downtime_ms, FORECAST_FIXED_MS) / 1000 * link_bytes_per_s;
    unsigned round = 0;
    for (; round < MAX_ROUNDS && (round == 0 || left > fit); round++) {
        double t = left / link_bytes_per_s, before = left;
        total_s += t;
        left = dirtied(dirty_bytes_per_s, set, t);
        if (round >= 2 && left > fit && left > before * 0.97)
            break;
    }
    out->predicted_downtime_ms = FORECAST_FIXED_MS + left / link_bytes_per_s * 1000;
    out->converges = left <= fit;
    if (out->converges) {
        out->eta_s = total_s + out->predicted_downtime_ms / 1000;
        say(out, LB_POLICY_CONTINUE, "about %u rounds, %.1f s: the guest dirties %s/s, the link "
            "carries %s/s", round, out->eta_s, dirty, link);
    } else {
        say(out, LB_POLICY_CONTINUE, "will not converge by itself: the guest dirties %s/s, the "
            "link carries %s/s; compression or throttling will be needed", dirty, link);
    }
}
