/*
 * cmd/cli/keys.h - what the subcommands around checkpoints share: keys, and watching long work.
 */
#ifndef LB_CLI_KEYS_H
#define LB_CLI_KEYS_H

#include "cmd/cli/cli.h"

/* --key, --passphrase, --passphrase-file; the input of this child parser is the struct. */
struct lb_key_args {
    const char *file, *passphrase_file;
    bool ask;
};
extern const struct argp lb_key_argp;
/* *out must be initialised; stays empty when none was given. make: asked for twice. */
int lb_key_get(const struct lb_key_args *k, bool make, Lb__RpcKey *out, struct lb_error *err);
void lb_key_wipe(Lb__RpcKey *k);

/* watch.c. --quiet, --detach, --progress; the input of this child parser is the struct. */
struct lb_watch {
    struct lb_cli *cli;
    const char *vm;      /* for messages */
    bool quiet, detach, progress_json;
    bool stops;          /* Ctrl-C ends the work itself: it belongs to this client */
    int (*judge)(const json_t *result); /* NULL: 0; the exit status of an answer, however it is printed */
    /* private */
    bool tty, drawn;
    double percent;
    char phase[32], note[200];
};
extern const struct argp lb_watch_argp;
/* Sends r, shows what goes on, then show(result); the exit status. Every event that is no progress goes to on_event, which
 * may be NULL. */
int lb_watch(struct lb_watch *w, const Lb__RpcRequest *r, void (*show)(const json_t *result),
             void (*on_event)(const json_t *event));

/* Both, of a subcommand that has long work done: lb_work_children are its child parsers, with --json; at ARGP_KEY_INIT it
 * calls lb_work_inputs. */
struct lb_work {
    struct lb_watch watch;
    struct lb_key_args key;
};
extern const struct argp_child lb_work_children[];
void lb_work_inputs(struct lb_work *w, struct argp_state *state);
/* Gets the key into *slot (a field of r), watches r as lb_watch does, wipes the key; the exit status. */
int lb_work_run(struct lb_work *w, bool make, const Lb__RpcRequest *r, Lb__RpcKey **slot,
                void (*show)(const json_t *result), void (*on_event)(const json_t *event));

#endif
