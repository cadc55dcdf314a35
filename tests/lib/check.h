/* What tests of every kind say often. After cmocka.h and core/core.h. */
#ifndef CHECK_H
#define CHECK_H

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

/* The call fills a `struct lb_error *err` that it is given here. */
#define OK(call)                                                                                  \
    do {                                                                                          \
        struct lb_error e_ = LB_ERROR_INIT;                                                       \
        struct lb_error *err = &e_;                                                               \
        if ((call) < 0)                                                                           \
            fail_msg("%s: %s (%s)", #call, err->message, err->remedy);                            \
    } while (0)

/* A command line of the shell that has to succeed. */
static inline void run(const char *format, ...) LB_PRINTF(1, 2);
static inline void run(const char *format, ...)
{
    char line[1024];
    va_list ap;
    va_start(ap, format);
    vsnprintf(line, sizeof(line), format, ap);
    va_end(ap);
    int status = system(line);
    if (status != 0)
        fail_msg("%s: status %d", line, status);
}

#endif
