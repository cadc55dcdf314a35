/*
 * migrate/direct.h - pages written straight from the source's memory into the receiver's (RDMA with
 * --trusted-fabric; STREAM.md, 8). One of each per connection.
 *
 *   source worker                                    receiver's worker
 *   ASK run = a chunk of guest RAM, slot      --->   what that slot had is deregistered, the chunk
 *                                             <---   registered: GRANT address, key
 *   checksums of the pages; WRITE, WRITE, ...  ==>   (nobody notices)
 *   WRITTEN runs, checksums                   --->   is that what our memory has? else: mismatch
 *
 * All of it goes in order over one queue pair: what was written is there when WRITTEN comes, and nothing is
 * on its way into a chunk any more when the ASK comes that takes its slot. A chunk is LB_RDMA_CHUNK_BYTES;
 * the source decides which ones stay registered, the least recently used goes.
 *
 * A page that the guest writes between checksum and DMA is a mismatch, too; it is in the dirty log and comes
 * again. So mismatches are told at the end of a round, and the source sends those pages again; when it has
 * sent all with the guest paused there must be none.
 */
#ifndef LB_DIRECT_H
#define LB_DIRECT_H

#include "core/hv.h"
#include "netproto/netproto.h"
#include "netproto/rdma.h"

/* ---- source: the worker of the connection; staging (LB_REC_MAX_PAGES pages) is what it reads blocks without
 * a view into */
struct lb_direct;
struct lb_direct *lb_direct_new(struct lb_bulk *b, void *staging, unsigned n_connections);
/* May pages of this chunk be written? Asks when it is not registered and `worth` it. 1, 0: send records
 * with pages, -1: the connection broke. */
int lb_direct_ready(struct lb_direct *d, const struct lb_ram_block *blk, uint64_t chunk, bool worth,
                    struct lb_error *err);
/* Pages of one chunk that is ready; as lb_bulk_send_pages. iov: in the block's view, or in staging, which may
 * be used again on return. */
int lb_direct_send(struct lb_direct *d, uint32_t round, const struct lb_ram_block *blk,
                   const struct lb_page_run *runs, const struct iovec *iov, unsigned n_runs,
                   struct lb_error *err);
/* Deregisters; before the connection is closed, and nothing is sent any more. NULL is fine. */
void lb_direct_free(struct lb_direct *d);

/* ---- destination */
struct lb_direct_rx;
struct lb_direct_rx *lb_direct_rx_new(struct lb_bulk *b, unsigned n_connections);
/* ASK: blk NULL: not agreed, not granted. */
int lb_direct_rx_ask(struct lb_direct_rx *d, const struct lb_record *rec,
                     const struct lb_ram_block *blk, struct lb_error *err);
/* WRITTEN: *good has a bit for each page of the record, in order: set = as its checksum says. */
int lb_direct_rx_written(struct lb_direct_rx *d, const struct lb_record *rec,
                         const struct lb_ram_block *blk, uint64_t good[LB_REC_MAX_PAGES / 64],
                         struct lb_error *err);
/* As lb_direct_free; nobody can write into our memory any more. */
void lb_direct_rx_free(struct lb_direct_rx *d);

#endif
