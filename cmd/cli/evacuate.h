/*
 * cmd/cli/evacuate.h - what the subcommands around evacuations share.
 */
#ifndef LB_CLI_EVACUATE_H
#define LB_CLI_EVACUATE_H

#include "cmd/cli/cli.h"

/* Sends r and shows its events (migrate/evacuate.h) until the result; the exit status. again: what to ask when the daemon
 * has been away meanwhile, or NULL. plan: the one that was shown already, or NULL. goes_on: what Ctrl-C says. */
int lb_evac_follow(struct lb_cli *cli, const Lb__RpcRequest *r, const Lb__RpcRequest *again, const json_t *plan,
                   const char *goes_on);

/* priorities.c. Lines "NAME: NUMBER" or "PATTERN: NUMBER" -> {"NAME": NUMBER, ...} (caller frees). A name without a pattern must
 * be one of `vms` ("vms" of `lifeboat ls`). Errors name the file and the line: LB_E_USAGE, LB_E_NOT_FOUND. */
int lb_priorities_parse(const char *file, char *text, const json_t *vms, char **out, struct lb_error *err);
/* The same of a file and the VMs of this host. */
int lb_priorities_load(struct lb_cli *cli, const char *file, char **out, struct lb_error *err);

#endif
