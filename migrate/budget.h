/*
 * migrate/budget.h - a limit of bandwidth, of one sender or shared by those of several processes.
 *
 * What is sent takes up time: bytes / bytes_per_s, after what others have taken up. Whoever has sent waits until that time has come.
 * So the limit holds for all together, and what one does not use the others have. Shared, the time stands in a file that all map;
 * a process that dies leaves at most what it had just sent.
 */
#ifndef LB_BUDGET_H
#define LB_BUDGET_H

#include "core/core.h"

struct lb_budget {
    uint64_t bytes_per_s;         /* 0: no limit */
    _Atomic uint64_t own_ns;      /* used up until then (lb_now_ns) by this process */
    _Atomic uint64_t *shared_ns;  /* by all; NULL: not shared */
};

/* path: of the file to share by, made when it is not there; NULL: not shared. */
int lb_budget_open(struct lb_budget *b, uint64_t bytes_per_s, const char *path, struct lb_error *err);
/* bytes are sent, or are just going to be: when (lb_now_ns) more may follow. urgent: not waiting for what others have taken up,
 * who wait for it instead. Any thread. */
uint64_t lb_budget_take(struct lb_budget *b, uint64_t bytes, bool urgent);
void lb_budget_close(struct lb_budget *b);

#endif
