/* core/error.c - filling struct lb_error.
 *
 * Text is formatted into a buffer of its own first, because callers may pass
 * parts of the very error they fill.  Control characters become spaces: texts
 * carry bytes of peers and guests, and a message is one line. */
#include "core/core_internal.h"

#include <errno.h>
#include <string.h>

static void one_line(char *s)
{
    for (; *s; s++) {
        unsigned char c = (unsigned char)*s;
        if (c < 0x20 || c == 0x7f)
            *s = ' ';
    }
}

static void vfill(struct lb_error *err, enum lb_errcode code, int sys_errno, const char *fmt,
                  va_list ap) LB_PRINTF(4, 0);

static void vfill(struct lb_error *err, enum lb_errcode code, int sys_errno, const char *fmt,
                  va_list ap)
{
    char text[sizeof(err->message)];

    vsnprintf(text, sizeof(text), fmt, ap);
    if (sys_errno) {
        char reason[128];
        size_t used = strlen(text);
        /* GNU strerror_r: thread safe, may return a static string */
        snprintf(text + used, sizeof(text) - used, ": %s",
                 strerror_r(sys_errno, reason, sizeof(reason)));
    }
    one_line(text);
    memset(err, 0, sizeof(*err));
    err->code = code;
    err->sys_errno = sys_errno;
    memcpy(err->message, text, strlen(text) + 1);
}

int lb_fail(struct lb_error *err, enum lb_errcode code, const char *fmt, ...)
{
    if (err) {
        va_list ap;
        va_start(ap, fmt);
        vfill(err, code, 0, fmt, ap);
        va_end(ap);
    }
    return -1;
}

int lb_fail_errno(struct lb_error *err, enum lb_errcode code, int sys_errno, const char *fmt, ...)
{
    if (err) {
        va_list ap;
        va_start(ap, fmt);
        vfill(err, code, sys_errno, fmt, ap);
        va_end(ap);
    }
    return -1;
}

int lb_remedy(struct lb_error *err, const char *fmt, ...)
{
    if (err) {
        char text[sizeof(err->remedy)];
        va_list ap;
        va_start(ap, fmt);
        vsnprintf(text, sizeof(text), fmt, ap);
        va_end(ap);
        one_line(text);
        memcpy(err->remedy, text, strlen(text) + 1);
    }
    return -1;
}

int lb_context(struct lb_error *err, const char *fmt, ...)
{
    if (err) {
        char text[sizeof(err->message)];
        char whole[2 * sizeof(err->message) + 2];
        va_list ap;
        va_start(ap, fmt);
        vsnprintf(text, sizeof(text), fmt, ap);
        va_end(ap);
        snprintf(whole, sizeof(whole), "%s: %s", text, err->message);
        one_line(whole);
        whole[sizeof(err->message) - 1] = '\0';
        memcpy(err->message, whole, strlen(whole) + 1);
    }
    return -1;
}

const char *lb_errcode_name(enum lb_errcode code)
{
    switch (code) {
    case LB_OK:
        return "ok";
    case LB_E_INTERNAL:
        return "internal";
    case LB_E_USAGE:
        return "usage";
    case LB_E_NOT_FOUND:
        return "not-found";
    case LB_E_EXISTS:
        return "exists";
    case LB_E_STATE:
        return "state";
    case LB_E_PREFLIGHT:
        return "preflight";
    case LB_E_NET:
        return "net";
    case LB_E_AUTH:
        return "auth";
    case LB_E_PROTO:
        return "proto";
    case LB_E_HV:
        return "hypervisor";
    case LB_E_NO_CONVERGE:
        return "no-converge";
    case LB_E_CANCELLED:
        return "cancelled";
    case LB_E_NO_SPACE:
        return "no-space";
    case LB_E_UNDECIDED:
        return "undecided";
    case LB_E_UNSUPPORTED:
        return "unsupported";
    }
    return "unknown"; /* a newer peer may know more codes than we do */
}

int lb_errcode_exit(enum lb_errcode code)
{
    /* A number from a newer peer must not wrap to 0 in the low 8 bits of the exit status. */
    if ((int)code < 0 || (int)code > 125)
        return LB_E_INTERNAL;
    return (int)code;
}

enum lb_errcode lb_errcode_of_errno(int sys_errno)
{
    switch (sys_errno) {
    case ENOENT:
    case ESRCH:
        return LB_E_NOT_FOUND;
    case EEXIST:
        return LB_E_EXISTS;
    case ENOSPC:
    case EDQUOT:
    case ENOMEM:
        return LB_E_NO_SPACE;
    default:
        return LB_E_INTERNAL;
    }
}
