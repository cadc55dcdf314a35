/*
 * migrate/frames.h - what clients sent to the guest while it ran nowhere.
 *
 *   client --> switch --> source's tap    QEMU is paused, then killed: its queue is lost
 *                            |  copied by a packet socket, from just before the pause on
 *                            v
 *                       Frames on the control channel, after Commit and until the
 *                            |  switches have heard the announcement
 *                            v
 *                       destination's tap --> guest
 *
 * Without this every frame that meets the pause is lost: a ping unanswered, a TCP client
 * silent for its retransmission time (200 ms at least), several times the pause.
 * Best effort: nothing of it ever fails a migration. A frame of the last moment before the
 * pause may arrive twice, as on any network. Broadcasts reach the destination by themselves.
 */
#ifndef LB_FRAMES_H
#define LB_FRAMES_H

#include "migrate/migrate_internal.h"

struct lb_frames;

/* For the taps of a command line that are in our network namespace; NULL when there are
 * none. Not copying yet. Every function takes NULL. Engine thread. */
struct lb_frames *lb_frames_new(char *const *argv);
/* Before a pause that may be the last. Takes microseconds. */
void lb_frames_start(struct lb_frames *f);
/* The guest goes on here and has got its frames itself: forget ours, stop copying. */
void lb_frames_discard(struct lb_frames *f);
/* Send what has come since; false when the channel broke. */
bool lb_frames_send(struct lb_frames *f, struct lb_chan *c);
void lb_frames_free(struct lb_frames *f);

/* Destination: put them into the taps of the VM's own command line, by this host's names. */
void lb_frames_inject(const Lb__Frames *m, char *const *argv, const struct lb_host_config *cfg);

#endif
