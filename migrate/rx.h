/*
 * migrate/rx.h - the first half of a destination's session, shared by migration (in.c) and
 * protection (remus/backup.c): from the request to the end of the pre-copy rounds.
 *
 *   open -> lb_preflight_dest ... -> transport -> decide -> listen -> register -> launch -> ready -> map_blocks
 *        -> accept -> start -> receive -> ... -> [discard, when it never ran here] -> close
 *
 * Engine thread. The caller may read every field; it writes only `entry` and `journal`.
 */
#ifndef LB_RX_H
#define LB_RX_H

#include "migrate/config.h"
#include "migrate/ctl.h"
#include "migrate/journal.h"
#include "migrate/migrate.h"
#include "migrate/preflight.h"
#include "migrate/receiver.h"
#include "migrate/transport.h"

#include <pthread.h>

struct lb_rx {
    const struct lb_session_env *env;
    struct lb_chan *chan;
    const char *peer;
    const Lb__MigrateRequest *req;
    struct lb_host_config cfg;
    struct lb_vm_desc desc;
    struct lb_vm_entry entry;
    struct lb_journal journal;        /* of the hand-over, or of the protection (token = its id) */
    int vm_lock;
    bool have_cfg, registered, journalled;
    struct lb_transport_choice transport;
    struct lb_rdma_listener *rdma;    /* while connections are awaited; NULL: TCP only */
    bool replaceable;                 /* a connection is RDMA */
    struct lb_ctl_queue *ctl;
    struct lb_hv_vm *vm;
    const struct lb_ram_block *blocks;
    unsigned n_blocks;
    const struct lb_ram_block **map;  /* by the source's block id; NULL: not sent */
    uint64_t *map_pages;
    unsigned n_map;
    struct lb_bulk **conns;           /* by index; those of the receiver are NULL */
    unsigned n_conns;
    struct lb_receiver *recv;
    int64_t confirmed;                /* last round told to be done; -1 none */
    uint32_t rounds;                  /* after receive: the last one */
    /* locked by mu */
    pthread_mutex_t mu;
    pthread_cond_t cond;
    unsigned events;
};

/* Checks the request, reads the configuration. Whatever it returns, lb_rx_close. Keeps the pointers. */
int lb_rx_open(struct lb_rx *r, const struct lb_session_env *env, struct lb_chan *chan,
               const char *peer, const Lb__MigrateRequest *req, struct lb_error *err);
/* What will carry the bulk connections: a line of the report. */
void lb_rx_transport(struct lb_rx *r, struct lb_report *rep);
/* Locks the VM's name unless refused or a dry run, and sends the report. */
int lb_rx_decide(struct lb_rx *r, const struct lb_report *rep, bool *proceed,
                 struct lb_error *err);
/* Starts ctl; its end wakes the engine. tap: see lb_ctl_queue_tap, or NULL. */
int lb_rx_listen(struct lb_rx *r, bool (*tap)(const Lb__Control *m, void *arg), void *arg,
                 struct lb_error *err);
/* The registry entry in that state and the journal PREPARED: a receiver may be there. */
int lb_rx_register(struct lb_rx *r, enum lb_vm_state state, struct lb_error *err);
/* The receiver, its CPU features compared, its memory empty. */
int lb_rx_launch(struct lb_rx *r, struct lb_error *err);
/* Listens for RDMA connections when that was agreed, and says so. */
int lb_rx_ready(struct lb_rx *r, struct lb_error *err);
/* Waits for the source's table of blocks (by ctl), fills map, answers. */
int lb_rx_map_blocks(struct lb_rx *r, struct lb_error *err);
/* Connections 0..n-1 of this session (after env->want_conns), into conns. */
int lb_rx_accept(struct lb_rx *r, unsigned n, struct lb_error *err);
/* Start placing what comes on connections 0..n-1. */
int lb_rx_start(struct lb_rx *r, unsigned n, struct lb_error *err);
/* Rounds until those connections said END; each finished round is confirmed. tick: at every
 * event and five times a second; 1 when there were other signs of life of the source, -1 ends. */
int lb_rx_receive(struct lb_rx *r, int (*tick)(void *arg, struct lb_error *err), void *arg,
                  struct lb_error *err);
/* The engine waits on one condition for all its sources of events. wake: any thread, arg is
 * the lb_rx. wait: until there are more than `seen`, or the time comes. */
void lb_rx_wake(void *arg);
unsigned lb_rx_events(struct lb_rx *r);
void lb_rx_wait(struct lb_rx *r, unsigned seen, uint64_t until_ns);
/* It will never run here: receiver and entry are removed, the token refused for ever. False when that
 * was not done: nothing was registered, or the journal says, or may say, RUNNING. */
bool lb_rx_discard(struct lb_rx *r);
void lb_rx_close(struct lb_rx *r);

#endif
