/* migrate/tuner.c - see tuner.h. */
#include "migrate/tuner.h"

#include "core/hv.h"

#include <assert.h>
#include <string.h>

#define LIMITED 0.15    /* share of its time a worker waits when the link is the limit */
#define GAIN_NEEDED 1.08 /* a change must promise that much */
#define LINK_GROWTH 1.01 /* per window in which the link was not the limit */
#define MIN_BASE_NS 100.0
#define OVERHEAD 1.01   /* headers and tags, per byte */

static const int levels[LB_TUNER_LEVELS] = {0, 1, 3};

void lb_tuner_init(struct lb_tuner *t)
{
    memset(t, 0, sizeof(*t));
    t->known[0] = true;
    t->bytes[0] = LB_PAGE_SIZE * OVERHEAD;
}

int lb_tuner_level(unsigned index)
{
    assert(index < LB_TUNER_LEVELS);
    return levels[index];
}

static void smooth(double *v, double sample, bool known)
{
    *v = known ? 0.7 * *v + 0.3 * sample : sample;
}

void lb_tuner_sample(struct lb_tuner *t, unsigned index, uint64_t pages, uint64_t ns,
                     uint64_t out_bytes)
{
    assert(index > 0 && index < LB_TUNER_LEVELS && pages);
    smooth(&t->zstd_ns[index], (double)ns / (double)pages, t->known[index]);
    smooth(&t->bytes[index], (double)out_bytes * OVERHEAD / (double)pages, t->known[index]);
    t->known[index] = true;
}

static double rate(const struct lb_tuner *t, unsigned index, unsigned workers)
{
    double cpu = workers * 1e9 / (t->base_ns + t->zstd_ns[index]);

    return t->link_bytes_s > 0 ? LB_MIN(cpu, t->link_bytes_s / t->bytes[index]) : cpu;
}

unsigned lb_tuner_window(struct lb_tuner *t, unsigned workers, uint64_t elapsed_ns,
                         uint64_t blocked_ns, uint64_t pages, uint64_t wire_bytes)
{
    double all = (double)workers * (double)elapsed_ns, blocked = LB_MIN((double)blocked_ns, all);
    double wire, base;
    unsigned best = t->now;

    if (!pages || !elapsed_ns)
        return t->now;
    wire = (double)wire_bytes * 1e9 / (double)elapsed_ns;
    base = LB_MAX((all - blocked) / (double)pages - t->zstd_ns[t->now], MIN_BASE_NS);
    smooth(&t->base_ns, base, t->base_ns > 0);
    if (blocked > LIMITED * all)
        smooth(&t->link_bytes_s, wire, t->link_bytes_s > 0);
    else if (t->link_bytes_s > 0)
        /* Not the limit now: it can do what it does and perhaps more. Slowly believing so
         * makes us look again, the later the more compression gains. */
        t->link_bytes_s = LB_MAX(t->link_bytes_s * LINK_GROWTH, wire);
    if (t->bytes[best] > t->bytes[0] * 0.97) /* costs, and saves nothing */
        best = 0;
    for (unsigned i = 0; i < LB_TUNER_LEVELS; i++)
        if (t->known[i] && rate(t, i, workers) > rate(t, best, workers) * GAIN_NEEDED)
            best = i;
    t->now = best;
    return best;
}

bool lb_tuner_compressible(const struct lb_tuner *t)
{
    for (unsigned i = 1; i < LB_TUNER_LEVELS; i++)
        if (t->known[i] && t->bytes[i] < t->bytes[0] * 7 / 8)
            return true;
    return false;
}
