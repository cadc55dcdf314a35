/*
 * migrate/tuner.h - which compression level moves most guest pages per second.
 *
 * A pure model, fed with what the workers measure; no clock, no threads (the caller
 * locks). A page costs processor time and link time, which overlap:
 *
 *      rate(level) = min( workers / (base + zstd time(level)),  link / bytes(level) )
 *
 * base: everything but compression (looking, encrypting, writing); link: what the
 * connection carried when it was the limit. zstd time and size come from samples, small
 * records compressed now and then at a level that is not in use, so nothing has to be tried on
 * the whole stream. A link that is never the limit needs no compression.
 */
#ifndef LB_TUNER_H
#define LB_TUNER_H

#include "core/core.h"

#define LB_TUNER_LEVELS 3 /* off, zstd 1, zstd 3: faster levels save less and are no faster on pages */
#define LB_TUNER_FORCED 1 /* when somebody else decides that there is compression */
#define LB_TUNER_SAMPLE_PAGES 32u

struct lb_tuner {
    unsigned now;                         /* index of the level in use */
    double zstd_ns[LB_TUNER_LEVELS];      /* per page */
    double bytes[LB_TUNER_LEVELS];        /* per page on the wire */
    bool known[LB_TUNER_LEVELS];
    double base_ns;                       /* per page; 0 unknown */
    double link_bytes_s;                  /* all connections; 0: never was the limit */
};

void lb_tuner_init(struct lb_tuner *t);
int lb_tuner_level(unsigned index);
/* One compressed record: `pages` of them took ns and became out_bytes. */
void lb_tuner_sample(struct lb_tuner *t, unsigned index, uint64_t pages, uint64_t ns,
                     uint64_t out_bytes);
/* What happened in a window of at least some tens of ms: blocked_ns is the sum over the
 * workers of the time spent waiting for the link (or for a bandwidth limit). Returns the
 * index of the level to use from now on. */
unsigned lb_tuner_window(struct lb_tuner *t, unsigned workers, uint64_t elapsed_ns,
                         uint64_t blocked_ns, uint64_t pages, uint64_t wire_bytes);
/* Would compression save at least 1/8? */
bool lb_tuner_compressible(const struct lb_tuner *t);

#endif
