/*
 * remus/delta.h - the primary's bounded copy of pages that the backup holds.
 *
 * A page sent in an epoch is kept here, so that the next time it is written only the difference
 * travels. When it is full the pages that have not been written again for the longest time make room
 * (CLOCK). Not thread safe.
 */
#ifndef LB_REMUS_DELTA_H
#define LB_REMUS_DELTA_H

#include "core/hv.h"

struct lb_delta;

enum lb_delta_kind {
    LB_DELTA_NEW,    /* was not held */
    LB_DELTA_SAME,   /* held, and no byte has changed */
    LB_DELTA_SPARSE, /* held, and a good part has not changed: xored is worth compressing */
    LB_DELTA_DENSE,  /* held, but little is as it was: xored is worth nothing */
};

/* Up to max_bytes of pages; memory is taken as it is needed, plus 4 bytes per page of the guest. */
int lb_delta_new(const uint64_t *n_pages_of_block, unsigned n_blocks, uint64_t max_bytes,
                 struct lb_delta **out, struct lb_error *err);
/* The page is now `now`: says how that differs from what was held, which is replaced. xored:
 * LB_PAGE_SIZE bytes, now XOR what was held when the answer is SAME, SPARSE or DENSE. All aligned to 64.
 * A page of zeros that is not held is not kept. */
enum lb_delta_kind lb_delta_update(struct lb_delta *d, uint32_t block, uint32_t page,
                                   const void *now, bool zero, void *xored);
uint64_t lb_delta_bytes(const struct lb_delta *d); /* of pages held */
void lb_delta_free(struct lb_delta *d);            /* NULL is fine */

#endif
