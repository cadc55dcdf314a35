/*
 * remus/ask.h - what a trusted host may ask this one to do with a VM, and nothing else.
 *
 *   asked                   who may                                                           done as
 *   failover NAME           the primary of the standby that is here; never by force           failover
 *   protect NAME --backup X the present backup, a host that the wish names, or one the VM     protect, change: of the wish
 *                           came by                                                           only the backups
 *   migrate NAME            a host that the VM came by, to itself only                        migrate
 *   status NAME             all of these                                                      status
 *
 * Hosts that a VM came by are remembered by key in its entry (came_by), which travels with it: a VM that went from
 * A to B and on to C can be asked back by A. B, which does not have it any more, says where it went.
 */
#ifndef LB_ASK_H
#define LB_ASK_H

#include "core/registry.h"
#include "netproto/netproto.h"
#include "netproto/rpc.pb-c.h"

/* An allowed request: of what was asked only what may be; points into that and into itself. */
struct lb_asked {
    char vm[128];
    char moved_on[128]; /* on failure: the host where the VM went; "" */
    bool already;       /* failover: it runs here, and came from the one who asks */
    Lb__RpcRequest r;
    Lb__RpcName name;
    Lb__RpcProtect protect;
    Lb__RpcMigrate migrate;
    Lb__MigrateOptions options; /* how to compress is left to the host that sends */
};

/* The VM's name in it; NULL: nothing that another host may be asked for. */
const char *lb_ask_vm(const Lb__RpcRequest *r);
/* peer: name and key of the host that asks. LB_E_AUTH: it may not; LB_E_NOT_FOUND: the VM is not here. */
int lb_ask_allow(const char *state_dir, const char *peer, const uint8_t key[LB_KEY_BYTES],
                 const Lb__RpcRequest *r, struct lb_asked *out, struct lb_error *err);

#endif
