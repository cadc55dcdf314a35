/*
 * remus/stage.h - the contents of an epoch on both sides.
 *
 * Primary: staging buffers are filled in the pause (copy of the dirty pages) and emptied by the
 * shipper: against the delta cache - a bounded copy of pages the backup holds - into records on the
 * checkpoint connection (STREAM.md):
 *      page the cache has     DELTA (zstd of new XOR old), when smaller
 *      other page             PAGES (zstd or raw), kept in the cache; ZERO for zero pages
 *      disk operations        DISK     output frames   FRAMES
 *      device state           STATE    then EPOCH_END
 * Backup: records are collected decoded; apply() writes them to the standby's memory and disks only
 * when the epoch is complete.
 */
#ifndef LB_STAGE_H
#define LB_STAGE_H

#include "core/hv.h"
#include "netproto/netproto.h"
#include "remus/disk.h"

#define LB_EPOCH_MAX_STATE (64u << 20)  /* bytes of device state */
#define LB_EPOCH_MAX_FRAMES (64u << 20) /* bytes of frames that travel with an epoch */

/* ---- one captured epoch (primary) */
struct lb_epoch_page { uint32_t block, page; };
struct lb_copier;
struct lb_epoch {
    uint64_t number;               /* 1, 2, ... */
    struct lb_epoch_page *pages;   /* sorted by block, page; capacity pages_cap */
    uint64_t n_pages, pages_cap;
    uint8_t *data;                 /* n_pages * LB_PAGE_SIZE, 4096-aligned, already faulted in for pages_cap */
    void *state;                   /* device state, malloc'ed */
    size_t state_len;
    struct lb_disk_ops disk;
    void *frames;                  /* lb_output_copy */
    size_t frames_len;
    uint64_t stopped_ns, cont_ns;  /* when */
    unsigned ample;                /* private: reserves in a row that needed far less than there is */
    struct lb_copier *copier;      /* private */
};
void lb_epoch_init(struct lb_epoch *e);
void lb_epoch_reset(struct lb_epoch *e);   /* empties, keeps the buffers */
void lb_epoch_free(struct lb_epoch *e);
/* Room for n more pages, faulted in; call it outside the pause with what the next epoch may need. An empty
 * epoch that has needed far less for many calls gives memory back. */
int lb_epoch_reserve(struct lb_epoch *e, uint64_t n_pages, struct lb_error *err);
/* In the pause: append the set bits of `dirty` of a block and copy the pages (by map, or by lb_hv_read).
 * Makes room when there is too little, in the pause. Many pages are copied by two threads. */
int lb_epoch_capture(struct lb_epoch *e, struct lb_hv_vm *vm, const struct lb_ram_block *blk,
                     const struct lb_bitmap *dirty, struct lb_error *err);

/* ---- primary's encoder */
struct lb_encoder;
struct lb_encoder_stats {
    uint64_t raw_bytes;      /* pages + disk + state + frames before encoding */
    uint64_t wire_bytes;
    uint64_t delta_pages, zero_pages, zstd_pages, raw_pages, same_pages; /* same: unchanged, not sent */
    uint64_t cache_bytes;
};
/* cache_bytes 0: no deltas. blocks are not needed after the call. */
int lb_encoder_new(const struct lb_ram_block *blocks, unsigned n_blocks, uint64_t cache_bytes,
                   struct lb_encoder **out, struct lb_error *err);
/* An operation of the first copy, before the first epoch. The sending thread of that time. Buffered: lb_bulk_flush. */
int lb_encoder_send_disk(struct lb_encoder *enc, struct lb_bulk *bulk, const struct lb_disk_op *op,
                         struct lb_error *err);
/* Send the whole epoch, EPOCH_END included, and flush. One thread. A failed send is final. The cache
 * is updated as if the backup had got it: a new connection needs a new encoder. */
int lb_encoder_send(struct lb_encoder *enc, struct lb_bulk *bulk, const struct lb_epoch *e,
                    struct lb_error *err);
void lb_encoder_get_stats(struct lb_encoder *enc, struct lb_encoder_stats *out); /* any thread */
void lb_encoder_free(struct lb_encoder *enc);

/* ---- backup's collector */
struct lb_collector;
/* map[i]: local block for the primary's id i, or NULL; map and targets are copied. targets: as many as
 * disks, owned by the caller. */
int lb_collector_new(struct lb_hv_vm *vm, const struct lb_ram_block *const *map, unsigned n_map,
                     struct lb_disk_target **targets, unsigned n_targets, struct lb_collector **out,
                     struct lb_error *err);
/* Memory for one epoch (LB_E_NO_SPACE beyond). Unless told: the guest's memory and 256 MiB. */
void lb_collector_set_limit(struct lb_collector *c, uint64_t max_bytes);
/* Receive until an EPOCH_END (1, *epoch), the deadline (0; call again) or a failure (-1; final). Epochs are
 * 1, 2, ... Operations of the first copy, before them, are applied at once. Needs the epochs
 * before to be applied: deltas refer to the standby's memory. Prepares the connection itself. */
int lb_collector_recv(struct lb_collector *c, struct lb_bulk *bulk, uint64_t deadline_ns,
                      uint64_t *epoch, struct lb_error *err);
/* Write the complete epoch to memory and disks; disks durable on return. A failure is final:
 * the standby is of no use any more. */
int lb_collector_apply(struct lb_collector *c, struct lb_error *err);
/* Device state and frames of the last complete epoch; owned by c. */
void lb_collector_state(struct lb_collector *c, const void **state, size_t *len,
                        const void **frames, size_t *frames_len);
/* Forget what has come of an incomplete epoch. */
void lb_collector_discard(struct lb_collector *c);
uint64_t lb_collector_bytes(struct lb_collector *c); /* staged now; any thread */
void lb_collector_free(struct lb_collector *c);

#endif
