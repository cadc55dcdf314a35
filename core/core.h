/*
 * core/core.h - what every part of Lifeboat stands on.
 *
 * Errors, log, scoped cleanup, state machines, bitmaps, durable files, child
 * processes, time.  Includes nothing from any other folder.
 *
 * Conventions for the whole tree
 *  - A function that can fail returns 0 or -1 and takes `struct lb_error *err`
 *    last.  *err is untouched on success.  err may be NULL.
 *  - Units are in names: _ns _us _ms _bytes _pages.
 *  - `assert` is for our own bugs; bytes from a peer, a disk or a hypervisor
 *    are errors.
 *  - Library code never exits and never prints.
 */
#ifndef LB_CORE_H
#define LB_CORE_H

#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/types.h>
#include <unistd.h>

#define LB_PRINTF(fmt, args) __attribute__((format(printf, fmt, args)))
#define LB_ARRAY_LEN(a) (sizeof(a) / sizeof((a)[0]))
#define LB_MIN(a, b) ((a) < (b) ? (a) : (b))
#define LB_MAX(a, b) ((a) > (b) ? (a) : (b))

/* ------------------------------------------------------------------ errors */

/* What kind of failure: decides the exit code of the CLI and whether a retry
 * can help.  Values travel in control messages: append only. */
enum lb_errcode {
    LB_OK = 0,
    LB_E_INTERNAL = 1,    /* our bug or an unexpected system error */
    LB_E_USAGE = 2,       /* bad arguments or configuration */
    LB_E_NOT_FOUND = 3,   /* no such VM, host, file */
    LB_E_EXISTS = 4,      /* name or resource already taken */
    LB_E_STATE = 5,       /* not possible in the present state */
    LB_E_PREFLIGHT = 6,   /* a check refused; nothing was touched */
    LB_E_NET = 7,         /* peer unreachable, connection lost, timeout */
    LB_E_AUTH = 8,        /* unknown or wrong key, failed authentication */
    LB_E_PROTO = 9,       /* the peer sent something invalid */
    LB_E_HV = 10,         /* the hypervisor refused or died */
    LB_E_NO_CONVERGE = 11,/* the guest dirties faster than the link carries */
    LB_E_CANCELLED = 12,  /* somebody asked for it */
    LB_E_NO_SPACE = 13,   /* memory or disk is full */
    LB_E_UNDECIDED = 14,  /* handed over, and the peer cannot be asked */
    LB_E_UNSUPPORTED = 15,/* this kernel/QEMU/device cannot do it */
};

struct lb_error {
    enum lb_errcode code;
    int sys_errno;       /* 0 when no system call was at fault */
    char message[512];   /* what failed, with context; one line */
    char remedy[384];    /* what the operator can do; may be "" */
};

#define LB_ERROR_INIT { 0 }

/* Fill *err (when not NULL) and return -1.  sys_errno is not appended to the
 * text by lb_fail, it is by lb_fail_errno (": No such file or directory"). */
int lb_fail(struct lb_error *err, enum lb_errcode code, const char *fmt, ...) LB_PRINTF(3, 4);
int lb_fail_errno(struct lb_error *err, enum lb_errcode code, int sys_errno, const char *fmt, ...)
    LB_PRINTF(4, 5);
/* Add or replace the remedy; returns -1 so that it can be chained. */
int lb_remedy(struct lb_error *err, const char *fmt, ...) LB_PRINTF(2, 3);
/* Put "context: " before the message; returns -1. */
int lb_context(struct lb_error *err, const char *fmt, ...) LB_PRINTF(2, 3);
/* Stable lower-case name of a code, e.g. "preflight". */
const char *lb_errcode_name(enum lb_errcode code);
/* Exit code of the CLI for a code: LB_OK 0, else the numeric code. */
int lb_errcode_exit(enum lb_errcode code);

/* ----------------------------------------------------------------- cleanup */

void lb_cleanup_fd(int *fd);         /* closes when >= 0, errno preserved */
void lb_cleanup_free(void *pp);      /* free(*(void **)pp) */
void lb_cleanup_file(FILE **f);
#define LB_AUTO_FD __attribute__((cleanup(lb_cleanup_fd)))
#define LB_AUTO_FREE __attribute__((cleanup(lb_cleanup_free)))
#define LB_AUTO_FILE __attribute__((cleanup(lb_cleanup_file)))
/* Return *p and leave NULL / -1 behind. */
#define LB_STEAL_PTR(p) __extension__({ __typeof__(p) lb_s_ = (p); (p) = NULL; lb_s_; })
#define LB_STEAL_FD(f) __extension__({ int lb_s_ = (f); (f) = -1; lb_s_; })

/* Allocation that cannot fail for small sizes: aborts with a log line when
 * memory is gone (a small allocation failing means the host is lost anyway).
 * Sizes that come from a peer or a file use lb_try_alloc. */
void *lb_alloc(size_t bytes);             /* zeroed */
void *lb_realloc(void *p, size_t bytes);
char *lb_strdup(const char *s);           /* NULL in, NULL out */
char *lb_asprintf(const char *fmt, ...) LB_PRINTF(1, 2);
void *lb_try_alloc(size_t bytes, struct lb_error *err); /* LB_E_NO_SPACE */
void lb_strv_free(char **v);              /* NULL-terminated vector */

/* --------------------------------------------------------------------- log */

enum lb_log_level { LB_LOG_ERROR, LB_LOG_WARN, LB_LOG_INFO, LB_LOG_DEBUG, LB_LOG_TRACE };

/* One line on stderr: "<3>" journald priority prefix only when stderr is a
 * journal ($JOURNAL_STREAM), time, level, fields, text.  Thread safe. */
void lb_log(enum lb_log_level level, const char *fmt, ...) LB_PRINTF(2, 3);
void lb_log_error(enum lb_log_level level, const struct lb_error *err); /* message + remedy */
void lb_log_set_level(enum lb_log_level level);
int lb_log_parse_level(const char *name, enum lb_log_level *out); /* 0 or -1 */
/* Fields put before every line of this process, e.g. "vm=web1 session=7f3a". */
void lb_log_set_fields(const char *fields);
/* Send lines to fd instead of stderr (a session's log file). -1 restores. */
void lb_log_set_fd(int fd);

/* -------------------------------------------------------------------- time */

uint64_t lb_now_ns(void);       /* CLOCK_MONOTONIC */
uint64_t lb_wall_ms(void);      /* CLOCK_REALTIME, ms since the epoch: records only */
void lb_sleep_ms(unsigned ms);

/* ---------------------------------------------------------- state machines */

/* A table of allowed moves, checked on every move; the trace is logged.
 * (After dqlite's lib/sm.h: one place to see what may follow what.) */
struct lb_sm_state {
    const char *name;
    uint64_t allowed;    /* bit n: may move to state n */
};
struct lb_sm {
    const struct lb_sm_state *table;
    unsigned n_states;
    unsigned state;
    const char *what;                     /* for the log, e.g. "migrate-out" */
    void (*invariant)(const struct lb_sm *sm, void *arg); /* asserts; may be NULL */
    void (*on_move)(const struct lb_sm *sm, unsigned from, void *arg); /* may be NULL */
    void *arg;
};
#define LB_SM_TO(s) (UINT64_C(1) << (s))
void lb_sm_init(struct lb_sm *sm, const char *what, const struct lb_sm_state *table,
                unsigned n_states, unsigned initial);
/* assert()s that the move is allowed. */
void lb_sm_move(struct lb_sm *sm, unsigned to);
bool lb_sm_may(const struct lb_sm *sm, unsigned to);
const char *lb_sm_name(const struct lb_sm *sm);

/* ------------------------------------------------------------------ bitmap */

/* Fixed-size set of bits; not thread safe. */
struct lb_bitmap {
    uint64_t n_bits;
    uint64_t *words;
};
int lb_bitmap_init(struct lb_bitmap *b, uint64_t n_bits, struct lb_error *err); /* all clear */
void lb_bitmap_free(struct lb_bitmap *b);
bool lb_bitmap_test(const struct lb_bitmap *b, uint64_t bit);
void lb_bitmap_set(struct lb_bitmap *b, uint64_t bit);
void lb_bitmap_clear(struct lb_bitmap *b, uint64_t bit);
void lb_bitmap_set_range(struct lb_bitmap *b, uint64_t first, uint64_t count);
void lb_bitmap_clear_range(struct lb_bitmap *b, uint64_t first, uint64_t count);
void lb_bitmap_clear_all(struct lb_bitmap *b);
void lb_bitmap_set_all(struct lb_bitmap *b);
uint64_t lb_bitmap_count(const struct lb_bitmap *b);
void lb_bitmap_or(struct lb_bitmap *dst, const struct lb_bitmap *src);     /* same size */
void lb_bitmap_andnot(struct lb_bitmap *dst, const struct lb_bitmap *src); /* dst &= ~src */
/* First run of set bits at or after `from`: fills first/count (count <= max)
 * and returns true, or returns false when there is none. */
bool lb_bitmap_next_run(const struct lb_bitmap *b, uint64_t from, uint64_t max, uint64_t *first,
                        uint64_t *count);

/* ----------------------------------------------------------- durable files */

/* Write-temp + fsync + rename + fsync of the directory. */
int lb_file_write_atomic(const char *path, const void *data, size_t len, mode_t mode,
                         struct lb_error *err);
/* Whole file, NUL-terminated (the NUL is not counted). Caller frees *out. */
int lb_file_read(const char *path, size_t max_bytes, char **out, size_t *len,
                 struct lb_error *err);
/* Append one line + '\n' and fsync (history). */
int lb_file_append_line(const char *path, const char *line, struct lb_error *err);
int lb_mkdir_p(const char *path, mode_t mode, struct lb_error *err);
/* What was made, renamed or removed in a directory is durable. */
int lb_sync_dir(const char *dir, struct lb_error *err);
/* Remove a file, durably; missing is success. */
int lb_file_remove(const char *path, struct lb_error *err);
/* Directory part of path: "." when there is none. Caller frees. */
char *lb_path_parent(const char *path);
/* Remove a file or a whole directory tree; missing is success. */
int lb_remove_tree(const char *path, struct lb_error *err);

/* --------------------------------------------------------------------- I/O */

/* Loop until done, EINTR and EAGAIN (poll) handled. Errors: LB_E_NET. */
int lb_write_all(int fd, const void *buf, size_t len, struct lb_error *err);
/* LB_E_NET with message "connection closed" at EOF. */
int lb_read_all(int fd, void *buf, size_t len, struct lb_error *err);
/* As above with an absolute CLOCK_MONOTONIC deadline (0 = none) and a
 * cancel fd (-1 = none) that ends the wait with LB_E_CANCELLED when readable. */
int lb_read_all_until(int fd, void *buf, size_t len, uint64_t deadline_ns, int cancel_fd,
                      struct lb_error *err);
int lb_write_all_until(int fd, const void *buf, size_t len, uint64_t deadline_ns, int cancel_fd,
                       struct lb_error *err);
/* Waits until there is something to read, the other end is gone or broken, or a process (pidfd) has
 * ended; at most timeout_ms. fd -1: never readable. */
bool lb_readable(int fd, unsigned timeout_ms);
int lb_set_nonblock(int fd, bool on);
/* SCM_RIGHTS over a unix stream/seqpacket socket, at most 16 fds. */
int lb_send_fds(int sock, const void *buf, size_t len, const int *fds, unsigned n_fds,
                struct lb_error *err);
/* Returns bytes received (0 at EOF) or -1; *n_fds in: capacity, out: received (CLOEXEC). */
ssize_t lb_recv_fds(int sock, void *buf, size_t len, int *fds, unsigned *n_fds,
                    struct lb_error *err);
/* Parse "HOST:PORT", "[v6]:PORT", "HOST", ":PORT"; port default given. */
int lb_parse_hostport(const char *s, uint16_t default_port, char host[256], uint16_t *port,
                      struct lb_error *err);

/* --------------------------------------------------------------- processes */

/* Identity of a process that survives pid reuse: pid + start time (field 22 of
 * /proc/PID/stat, clock ticks since boot). */
struct lb_proc_id {
    pid_t pid;
    uint64_t start_ticks;
};
int lb_proc_identify(pid_t pid, struct lb_proc_id *out, struct lb_error *err);
bool lb_proc_alive(const struct lb_proc_id *id);   /* zombie counts as dead */
/* pidfd_open + identity re-check, so that signals cannot hit a reused pid.
 * Returns the fd or -1. */
int lb_proc_open(const struct lb_proc_id *id, struct lb_error *err);
/* SIGKILL and wait (by pidfd) until gone, at most timeout_ms. Removes the files of the
 * unix sockets it listened on, as it would have done itself. */
int lb_proc_kill(const struct lb_proc_id *id, unsigned timeout_ms, struct lb_error *err);
/* Paths of the unix sockets a process listens on, those that begin with /. NULL-terminated,
 * never NULL; caller: lb_strv_free. A process that is killed leaves these files: the second
 * removes those that nobody serves any more. */
char **lb_proc_listening(pid_t pid);
void lb_remove_dead_sockets(char *const *paths);
/* The calling thread before all ordinary work of this host, for what others wait for with a deadline. Not
 * everywhere allowed: then it stays as it was, and the log says so once. */
void lb_thread_realtime(void);
/* A mutex that lends the priority of who waits for it to who holds it: for what such threads share with
 * others, which would otherwise keep them waiting for as long as an ordinary thread waits for a processor. */
void lb_mutex_init_inherit(pthread_mutex_t *m);
/* NULL-terminated argv of /proc/PID/cmdline. Caller: lb_strv_free. */
int lb_proc_cmdline(pid_t pid, char ***argv, struct lb_error *err);

/* Hex. out holds 2*len+1. lb_unhex returns bytes or -1. */
void lb_hex(char *out, const void *data, size_t len);
ssize_t lb_unhex(void *out, size_t max, const char *hex);
/* "1.2 GiB", "78.0 MiB/s" into buf; returns buf. */
const char *lb_human_bytes(char *buf, size_t n, double bytes);
/* "10", "64K", "1G", "1.5M" -> bytes. "25ms", "2s", "1m" -> ms. */
int lb_parse_size(const char *s, uint64_t *bytes, struct lb_error *err);
int lb_parse_duration_ms(const char *s, uint64_t *ms, struct lb_error *err);
/* "1Gbit", "100Mbit", "50MB" (bytes/s: suffix B), plain number = bytes/s. */
int lb_parse_rate(const char *s, uint64_t *bytes_per_s, struct lb_error *err);

/* LIFEBOAT_PAUSE_AT=STATE[:ms] in the environment of a session makes it wait at
 * that point of its work (the fault matrix kills it there). Points: see
 * the table in core/points.c. Creates FILE given by LIFEBOAT_PAUSE_FILE when there. */
void lb_point(const char *name);

#endif
