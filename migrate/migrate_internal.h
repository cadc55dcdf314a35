/*
 * migrate/migrate_internal.h - shared by the files of this folder only.
 *
 *   out.c       source session: the state machine from CONNECT to DONE
 *   sender.c    bulk workers of the source, see sender.h
 *   in.c        destination session
 *   receiver.c  bulk workers of the destination: records -> guest RAM
 *   handover.c  asking the peer, recovery after a crash
 *   ctl.c       control messages, see ctl.h
 *   digest.c    digest of all memory
 */
#ifndef LB_MIGRATE_INTERNAL_H
#define LB_MIGRATE_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>

#include "migrate/ctl.h"
#include "migrate/handover.h"
#include "migrate/journal.h"
#include "migrate/migrate.h"
#include "migrate/policy.h"
#include "migrate/preflight.h"
#include "migrate/receiver.h"
#include "migrate/sender.h"
#include "netproto/control.pb-c.h"

/* ----------------------------------------------------------- digest (digest.c) */

/* 128-bit digest of every non-zero page of the blocks that travel; ids[i] is the
 * number of blocks[i] on the source. VM stopped. Uses n_threads. */
int lb_memory_digest(struct lb_hv_vm *vm, const struct lb_ram_block *const *blocks,
                     const uint32_t *ids, unsigned n_blocks, unsigned n_threads, uint8_t out[16],
                     struct lb_error *err);
/* XXH3-128 of the bytes of one (ROM) block. */
int lb_block_digest(struct lb_hv_vm *vm, const struct lb_ram_block *blk, uint8_t out[16],
                    struct lb_error *err);

#endif
