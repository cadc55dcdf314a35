/*
 * cmd/cli/cli.h - shared by the files of the CLI: one file per subcommand.
 *
 * A subcommand parses its own arguments (argp), sends one request and prints the
 * answer: with --json exactly what the daemon said, else for people. It returns
 * the exit status; failures go through lb_cli_fail.
 */
#ifndef LB_CLI_H
#define LB_CLI_H

#include <argp.h>
#include <jansson.h>

#include "cmd/common/rpc.h"
#include "core/core.h"
#include "netproto/rpc.pb-c.h"

struct lb_cli {
    const char *socket;
    bool json;
    bool reported;       /* an error was printed already */
    bool lost;           /* the last request failed because the daemon is not there, or not any more */
    char *failure_json;  /* what came along with a failure (a preflight report); NULL */
};

struct lb_cmd {
    const char *name, *args, *summary;
    int (*run)(struct lb_cli *cli, int argc, char **argv);
};

extern const struct lb_cmd lb_cmd_run, lb_cmd_adopt, lb_cmd_release, lb_cmd_ls, lb_cmd_status,
    lb_cmd_show, lb_cmd_stop, lb_cmd_migrate, lb_cmd_cancel, lb_cmd_recover, lb_cmd_preflight,
    lb_cmd_history, lb_cmd_host, lb_cmd_protect, lb_cmd_unprotect, lb_cmd_failover, lb_cmd_top,
    lb_cmd_suspend, lb_cmd_resume, lb_cmd_checkpoint, lb_cmd_restore, lb_cmd_clone, lb_cmd_plan,
    lb_cmd_evacuate, lb_cmd_maintenance, lb_cmd_ask;

/* ---- arguments */

/* --json; the child parser every subcommand has. Its input is the struct lb_cli. */
extern const struct argp lb_json_argp;

/* Subcommands whose arguments are NAME and perhaps --force / --limit. */
struct lb_name_args {
    struct lb_cli *cli;
    const char *name;     /* NULL when not given */
    bool force;
    uint32_t limit;
};
enum { LB_NAME_OPTIONAL = 1, LB_NAME_NONE = 2, LB_NAME_FORCE = 4, LB_NAME_LIMIT = 8 };
/* Exits with a usage error. `force` documents --force. */
void lb_parse_name(struct lb_cli *cli, const struct lb_cmd *cmd, const char *doc, unsigned flags,
                   const char *force, int argc, char **argv, struct lb_name_args *out);
/* argp_parse as every subcommand wants it: named "lifeboat CMD". */
void lb_parse(const char *cmd, const struct argp *argp, unsigned flags, int argc, char **argv,
              void *input);

/* A number and nothing else. */
bool lb_arg_number(const char *s, unsigned long min, unsigned long max, unsigned long *out);
/* An argument that is no option: the first of these two (second: NULL, there is none) that has no value
 * yet gets it. Exits with a usage error. */
void lb_arg_word(char *arg, struct argp_state *state, char **first, char **second);
/* "25ms", "1s"; a bare number is what the option's name says: unit_ms. Exits with a usage error. */
uint64_t lb_arg_duration(const char *arg, uint64_t unit_ms, const char *option,
                         struct argp_state *state);
uint64_t lb_arg_rate(const char *arg, struct argp_state *state); /* --bandwidth */
uint32_t lb_arg_transport(const char *arg, struct argp_state *state); /* --transport; enum lb_transport_wish */
int lb_arg_level(const char *arg, struct argp_state *state);     /* --level, of zstd */
uint32_t lb_arg_parallel(const char *arg, struct argp_state *state); /* --parallel; 0: auto */
unsigned lb_arg_hot(const char *arg, struct argp_state *state);  /* --hot: enum lb_plan_hot */

/* ---- talking to the daemon (client.c) */

/* Send r, hand events to on_event (may be NULL; returns false to stop listening), return
 * the result as JSON text (caller frees) or NULL and *err. cancel_fd: -1, or an fd whose
 * readability ends the wait with LB_E_CANCELLED. */
char *lb_request(struct lb_cli *cli, const Lb__RpcRequest *r,
                 bool (*on_event)(const json_t *event, const char *text, void *arg), void *arg,
                 int cancel_fd, struct lb_error *err);

/* ---- printing (print.c) */

/* Print the error (stderr; with --json also stdout); returns the exit status. */
int lb_cli_fail(struct lb_cli *cli, const struct lb_error *err);
/* Request with one answer: print it by `show`, or as JSON; returns the exit status. */
int lb_ask(struct lb_cli *cli, const Lb__RpcRequest *r, void (*show)(const json_t *result));
/* "" when missing or of another type. */
const char *lb_jstr(const json_t *o, const char *key);
double lb_jnum(const json_t *o, const char *key);
json_int_t lb_jint(const json_t *o, const char *key);
bool lb_jbool(const json_t *o, const char *key);
/* Bytes of peers, logs and guests must not move the cursor of a terminal. */
void lb_print_text(FILE *f, const char *text);

/* Every text of the array o.key on a line of its own on stderr, after lead. */
void lb_print_each(const json_t *o, const char *key, const char *lead);

/* A table whose columns are as wide as needed; cells are copied. */
struct lb_table;
struct lb_table *lb_table_new(unsigned n_cols, const char *const *heads);
void lb_table_cell(struct lb_table *t, const char *fmt, ...) LB_PRINTF(2, 3);
void lb_table_print(struct lb_table *t); /* and free */
void lb_table_write(struct lb_table *t, FILE *f); /* and free */

/* "2026-01-31 12:00:00" local time; buf of at least 32. */
const char *lb_when(char *buf, double wall_ms);
/* "12.3 ms", "4.56 s", "3 min 20 s". */
const char *lb_span(char *buf, size_t n, double ms);

/* Preflight report for people: one line per check, remedies below. */
void lb_print_preflight(const json_t *checks, bool all); /* with a summary above it */

/* One line on a schedule of checkpoints, and what went wrong with it. */
void lb_print_schedule(const json_t *o);

/* Exit status when Ctrl-C ended the watching of what goes on; as a shell reports Ctrl-C. */
#define LB_EXIT_DETACHED 130
/* From now on Ctrl-C makes this descriptor readable; -1: it ends the process. */
int lb_catch_sigint(void);
unsigned lb_columns(void), lb_rows(void); /* of the terminal */
/* A line with a bar that is drawn over and over; the caller ends it. */
void lb_draw_bar(double percent, const char *text);

/* protect.c: the words for one element of `protections` (top), as lines "key  value". */
void lb_print_protection(const json_t *p);
/* What is "protected" in the registry is "protecting" as long as nobody could take over yet. */
const char *lb_vm_state_text(const json_t *vm);
/* "protected", "62% pre-copy", ...; buf is returned. */
const char *lb_protect_state(const json_t *p, char *buf, size_t n);

/* status.c: the answer of `status`, of this host or of another one. */
void lb_show_status(const json_t *o);
/* restore.c: what comes of a restore or resume, and its event "running". */
void lb_show_restored(const json_t *o);
void lb_show_running(const json_t *ev);

/* migrate and preflight share their request. */
int lb_migrate_request(struct lb_cli *cli, const Lb__RpcMigrate *m, bool quiet, bool detach,
                       bool progress_json);

#endif
