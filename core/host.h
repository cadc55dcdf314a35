/* core/host.h - questions to this host, for the checks before something is done. None of
 * them changes anything or disturbs what it finds. Any thread. */
#ifndef LB_HOST_H
#define LB_HOST_H

#include "core/core.h"

/* May a process of uid:gid (and the user's other groups) do `mode` (R_OK | W_OK |
 * X_OK) on path? 0 or an errno; asked in a child with exactly those credentials. */
int lb_host_access_as(uid_t uid, gid_t gid, const char *path, int mode);
/* Output (stdout, at most 1 MiB) of a program, killed after timeout_ms. */
int lb_host_run(const char *const argv[], unsigned timeout_ms, char **out, struct lb_error *err);
/* `EMULATOR --version` and `-machine help`, remembered until the file changes. The
 * strings are copies, caller frees. */
int lb_host_emulator(const char *path, char **version, char **machines, struct lb_error *err);
/* Can a server bind address ("" = all) and port? 0 or an errno; EINVAL: not an address. */
int lb_host_port_free(bool udp, const char *address, uint16_t port);
/* Does a process serve this socket? Never connects to it. */
bool lb_host_unix_served(const char *path);
/* 0: a tap that is free; ENODEV: no such interface; EBUSY: in use; EINVAL: no tap; other. */
int lb_host_tap_free(const char *name);
/* Does any other open file hold a byte-range lock on path? 1, 0, or -1 cannot tell. */
int lb_host_locked(const char *path);
/* The systemd unit of the system (not a user's) in /proc/PID/cgroup as `text` has it. Caller frees; NULL: none. */
char *lb_host_unit_of(const char *text);
/* Does systemd, when this host goes down, stop the process at a time of its own, and not after `unit`? *its: what it
 * belongs to, caller frees. False also when unit is not enabled, or systemd does not run here. */
bool lb_host_stops_early(pid_t pid, const char *unit, char **its);
/* A value of /proc/meminfo in bytes; -1 when absent. */
int64_t lb_host_meminfo(const char *key);

#endif
