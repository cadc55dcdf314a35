/*
 * netproto/desc_proto.h - struct lb_vm_desc <-> protobuf VmDescription.
 *
 * What a peer sends becomes file names, a command line and log lines here, so
 * every count and length has a hard maximum, and every text must be UTF-8
 * without control characters. The sender applies the same rules, so that a VM
 * that cannot be described is refused at home with a clear message.
 */
#ifndef LB_DESC_PROTO_H
#define LB_DESC_PROTO_H

#include "core/core.h"
#include "core/hv.h"
#include "netproto/control.pb-c.h"

#define LB_DESC_MAX_ARGS 4096u
#define LB_DESC_MAX_ARG_BYTES (64u << 10)
#define LB_DESC_MAX_ARGV_BYTES (1u << 20)  /* all of them */
#define LB_DESC_MAX_DISKS 256u
#define LB_DESC_MAX_FEATURES 4096u
#define LB_DESC_MAX_BLOCKERS 256u
#define LB_DESC_MAX_VCPUS 8192u
#define LB_DESC_MAX_RAM_BYTES (UINT64_C(64) << 40)

/* *out is malloc'ed, freed by lb__vm_description__free_unpacked(*out, NULL). NULL
 * texts travel as "". LB_E_UNSUPPORTED when d breaks a limit. */
int lb_desc_to_proto(const struct lb_vm_desc *d, Lb__VmDescription **out, struct lb_error *err);

/* *out is freed by lb_vm_desc_free; untouched on failure. Texts are never NULL ("" when
 * the peer left them out); argv, features and blockers are never NULL. LB_E_PROTO. */
int lb_desc_from_proto(const Lb__VmDescription *p, struct lb_vm_desc *out, struct lb_error *err);

#endif
