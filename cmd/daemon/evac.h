/*
 * cmd/daemon/evac.h - what the files about evacuations share.
 *
 *   evacuate.c     requests, the plan, what clients are told, restarts
 *   evac_work.c    items: where a VM is, what is begun for it, what its session says
 *   maintenance.c  maintenance.json, `maintenance`, --bring-back
 *
 * All of it on the loop.
 */
#ifndef LB_EVAC_H
#define LB_EVAC_H

#include "cmd/daemon/daemon.h"
#include "migrate/evacuate.h"

/* There is one evacuation or return at a time. */
struct evacuation {
    struct lb_evac *e;         /* NULL: none */
    struct session *planner;
    bool showing;              /* what it plans is only to be shown */
    bool maintenance_was_on;   /* before this one began */
    char *plan;                /* JSON: the last one; NULL */
    uint64_t planned_ns;
    struct event *tick;
    bool say_all, save_due;
    uint64_t said_ns, saved_ns, quiet_until_ns; /* quiet: after a restart sessions connect again first */
};

/* ---- evacuate.c */
struct evacuation *lb_evac_of(struct daemon *d); /* made when there is none */
bool lb_evac_runs(const struct evacuation *v);
uint64_t lb_evac_now_ms(void);
/* LB_E_STATE while one is under way or being planned. */
int lb_evac_refuse_two(struct evacuation *v, struct lb_error *err);
/* v->e is new, or was only shown: it begins. */
void lb_evac_begin(struct daemon *d);
/* Shows what is under way to one more client. */
void lb_evac_attach(struct daemon *d, struct client *c);

/* ---- evac_work.c */
enum lb_evac_place {
    LB_PLACE_BUSY,   /* something works on it, or it is to be decided */
    LB_PLACE_HERE,   /* it runs here and nothing works on it, but perhaps what protects it */
    LB_PLACE_AWAY,   /* it does not run here, and will not by itself */
    LB_PLACE_DISK,   /* suspended on this host's disk */
    LB_PLACE_FILLS,  /* it runs here, and its memory still comes */
    LB_PLACE_DEAD,
};
/* why: what keeps it busy. */
enum lb_evac_place lb_evac_place_of(struct daemon *d, const char *vm, char why[256]);
/* Is it where the item wants it? */
bool lb_evac_reached(const struct lb_evac_item *it, enum lb_evac_place p);
/* Of an unsettled one: is it clear by now what has become of it? */
void lb_evac_settle(struct daemon *d, struct lb_evac_item *it);
/* What lb_evac_next ordered. */
void lb_evac_do_begin(struct daemon *d, struct lb_evac_item *it);
void lb_evac_do_tell(struct daemon *d, const struct lb_evac_order *o);
/* Its session is gone. */
void lb_evac_work_over(struct session *s);
/* VMs that no plan knew of leave as well; when all that it knew of have ended. */
void lb_evac_find_others(struct daemon *d);
/* Of an awaited one: does something still work on it? */
void lb_evac_look_again(struct daemon *d, struct lb_evac_item *it);
/* Sessions of an earlier supervisor that are ready to leave: taken up, or cancelled. */
void lb_evac_take_up_strays(struct daemon *d);

/* ---- maintenance.c */
bool lb_maintenance_is_on(struct daemon *d);
/* reason NULL: as it is. */
int lb_maintenance_set(struct daemon *d, bool on, const char *reason, bool keep_left, struct lb_error *err);
/* What leaves is written down before it does; what has not left, or is back, is taken out. */
int lb_maintenance_note(struct daemon *d, const struct lb_evac_item *it, bool leaves, struct lb_error *err);
void lb_maintenance_forget(struct daemon *d, const struct lb_evac_item *it);

#endif
