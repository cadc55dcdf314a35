/* migrate/plan_internal.h - what the parts of the planner share. */
#ifndef LB_PLAN_INTERNAL_H
#define LB_PLAN_INTERNAL_H

#include "migrate/plan.h"

/* A transfer converges when it sends at least this many times what its VM dirties. */
#define LB_PLAN_MARGIN 1.1

/* Appends to p->steps and p->stays; fills before and after. plan_place.c */
void lb_plan_place(const struct lb_inventory *inv, const struct lb_plan_opts *opts, struct lb_plan *p);
/* Fills the times of the steps, sorts them, chooses p->parallel. plan_time.c */
void lb_plan_time(const struct lb_inventory *inv, const struct lb_plan_opts *opts, struct lb_plan *p);

/* What the links between two hosts carry when nothing else uses them. */
double lb_plan_link(const struct lb_inventory *inv, uint32_t from, uint32_t to);
void lb_plan_add_step(struct lb_plan *p, enum lb_plan_kind kind, uint32_t vm, uint32_t from, uint32_t to);
/* Takes reason. */
void lb_plan_add_stay(struct lb_plan *p, uint32_t vm, bool backup, char *reason, const char *remedy);

#endif
