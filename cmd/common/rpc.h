/*
 * cmd/common/rpc.h - framing of netproto/rpc.proto and unix sockets; used by the
 * CLI, the supervisor and the session processes.
 */
#ifndef LB_RPC_H
#define LB_RPC_H

#include <protobuf-c/protobuf-c.h>

#include "core/core.h"

#define LB_VERSION "0.1.0"
#define LB_RPC_MAX_BYTES (16u << 20) /* a catalog of 10,000 checkpoints as JSON is 6 MB */
#define LB_DEFAULT_SOCKET "/run/lifeboat/lifeboat.sock"
#define LB_DEFAULT_STATE_DIR "/var/lib/lifeboat"
#define LB_RPC_COMPRESS_CONFIGURED 255u

/* Length prefix + packed message; caller frees. NULL (LB_E_NO_SPACE) when it is longer than
 * LB_RPC_MAX_BYTES. */
uint8_t *lb_rpc_frame(const ProtobufCMessage *m, size_t *len, struct lb_error *err);
/* Blocking; deadline_ns and cancel_fd as for lb_read_all_until. */
int lb_rpc_send(int fd, const ProtobufCMessage *m, uint64_t deadline_ns, struct lb_error *err);
/* NULL on failure; caller: protobuf_c_message_free_unpacked. */
ProtobufCMessage *lb_rpc_recv(int fd, const ProtobufCMessageDescriptor *type, uint64_t deadline_ns,
                              int cancel_fd, struct lb_error *err);

/* Unix stream sockets at paths of any length; fd (CLOEXEC) or -1. Listening replaces the
 * socket of a dead owner and refuses (LB_E_EXISTS) when a live one answers. */
int lb_unix_connect(const char *path, struct lb_error *err);
int lb_unix_listen(const char *path, mode_t mode, struct lb_error *err);

#endif
