/*
 * cmd/cli/evac_view.h - plans and evacuations for people (their JSON: migrate/evacuate.h).
 *
 * No clock, no terminal, no daemon: events in, text out. So that the tests can replay events.
 */
#ifndef LB_EVAC_VIEW_H
#define LB_EVAC_VIEW_H

#include <jansson.h>
#include <stdbool.h>
#include <stdio.h>

/* Steps, hosts and what stays, as tables; of `lifeboat plan` and of the event "plan". */
void lb_plan_print(FILE *f, const json_t *plan);

/*
 * An evacuation that is watched. What has begun or ended becomes lines that stay. Below them, on a terminal, stands one
 * line for each VM at work and one for the whole, drawn over when they change:
 *
 *   web1 -> b: 1.2 GiB in 4.10 s, paused 21.0 ms
 *   [############--------]  62%  web2 -> c  sending  87.0 MiB/s  1.2 GiB sent  ETA 3 s
 *   [--------------------]   0%  db1 -> b   setting up
 *   [########------------]  41%  12 of 30 VMs  210.0 MiB/s  14.8 GiB of 36.0 GiB  ETA 80 s
 *
 * Elsewhere the whole is a line every 10 s.
 */
struct lb_evac_view;
struct lb_evac_view *lb_evac_view_new(FILE *f, bool tty, bool returning); /* returning: VMs come back */
/* Any event of an evacuation. cols, rows: of the terminal now; without one they mean nothing. */
void lb_evac_view_event(struct lb_evac_view *v, const json_t *ev, unsigned cols, unsigned rows);
/* What stands there and would be drawn over is wiped: before anything else is printed. */
void lb_evac_view_wipe(struct lb_evac_view *v);
/* The last event: in words, with what is left, why, and what can be done. */
void lb_evac_view_result(struct lb_evac_view *v, const json_t *result);
void lb_evac_view_free(struct lb_evac_view *v);

#endif
