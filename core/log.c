/* core/log.c - one line per event, one write(2) per line.
 *
 * A line is built on the stack and written at once, so lines of threads and of
 * processes that share a log file do not mix.  The mutex guards the fields
 * only; fork handlers keep it usable in a child. */
#include "core/core.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <time.h>

static const char *const level_names[] = {"error", "warn", "info", "debug", "trace"};
static const int level_priority[] = {3, 4, 6, 7, 7}; /* syslog(3) */

static atomic_int log_level = LB_LOG_INFO;
static atomic_int log_fd = -1;
static pthread_mutex_t fields_lock = PTHREAD_MUTEX_INITIALIZER;
static char fields_text[256]; /* locked by fields_lock */
static pthread_once_t once = PTHREAD_ONCE_INIT;
static bool stderr_is_journal; /* immutable after once */

static void lock_fields(void)
{
    pthread_mutex_lock(&fields_lock);
}

static void unlock_fields(void)
{
    pthread_mutex_unlock(&fields_lock);
}

/* $JOURNAL_STREAM is "device:inode" of the stream systemd connected; a
 * redirected stderr no longer matches. */
static void init_once(void)
{
    const char *journal = getenv("JOURNAL_STREAM");
    struct stat st;
    unsigned long long dev, ino;

    if (journal && sscanf(journal, "%llu:%llu", &dev, &ino) == 2 && fstat(STDERR_FILENO, &st) == 0)
        stderr_is_journal = st.st_dev == dev && st.st_ino == ino;
    pthread_atfork(lock_fields, unlock_fields, unlock_fields);
}

void lb_log_set_level(enum lb_log_level level)
{
    atomic_store(&log_level, (int)level);
}

int lb_log_parse_level(const char *name, enum lb_log_level *out)
{
    for (size_t i = 0; i < LB_ARRAY_LEN(level_names); i++) {
        if (name && !strcasecmp(name, level_names[i])) {
            *out = (enum lb_log_level)i;
            return 0;
        }
    }
    return -1;
}

void lb_log_set_fields(const char *fields)
{
    pthread_once(&once, init_once);
    lock_fields();
    snprintf(fields_text, sizeof(fields_text), "%s", fields ? fields : "");
    unlock_fields();
}

void lb_log_set_fd(int fd)
{
    atomic_store(&log_fd, fd);
}

static size_t put(char *line, size_t size, size_t used, const char *fmt, ...) LB_PRINTF(4, 5);

/* Append, cut at size; returns the new length. */
static size_t put(char *line, size_t size, size_t used, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(line + used, size - used, fmt, ap);
    va_end(ap);
    return n < 0 ? used : LB_MIN(used + (size_t)n, size - 1);
}

void lb_log(enum lb_log_level level, const char *fmt, ...)
{
    if ((int)level > atomic_load(&log_level))
        return;

    int saved = errno;
    pthread_once(&once, init_once);
    int fd = atomic_load(&log_fd);
    bool journal = fd < 0 && stderr_is_journal;
    char line[2048];
    const size_t size = sizeof(line) - 1; /* room for '\n' */
    size_t used = 0;

    if (journal)
        used = put(line, size, used, "<%d>", level_priority[level]);
    size_t text_start = used;

    struct timespec now;
    struct tm tm;
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &tm);
    used = put(line, size, used, "%04d-%02d-%02dT%02d:%02d:%02d.%03ldZ %-5s ", tm.tm_year + 1900,
               tm.tm_mon + 1, tm.tm_mday, tm.tm_hour, tm.tm_min, tm.tm_sec, now.tv_nsec / 1000000,
               level_names[level]);

    lock_fields();
    if (fields_text[0])
        used = put(line, size, used, "%s ", fields_text);
    unlock_fields();

    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(line + used, size - used, fmt, ap);
    va_end(ap);
    if (n > 0)
        used = LB_MIN(used + (size_t)n, size - 1);

    for (size_t i = text_start; i < used; i++)
        if ((unsigned char)line[i] < 0x20 || line[i] == 0x7f)
            line[i] = ' ';
    line[used++] = '\n';

    /* Nobody can be told when the log itself cannot be written. */
    ssize_t done;
    do {
        done = write(fd < 0 ? STDERR_FILENO : fd, line, used);
    } while (done < 0 && errno == EINTR);
    errno = saved;
}

void lb_log_error(enum lb_log_level level, const struct lb_error *err)
{
    if (err->remedy[0])
        lb_log(level, "%s: %s (remedy: %s)", lb_errcode_name(err->code), err->message,
               err->remedy);
    else
        lb_log(level, "%s: %s", lb_errcode_name(err->code), err->message);
}
