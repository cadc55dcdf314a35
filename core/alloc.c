/* core/alloc.c - allocation and scoped cleanup. */
#include "core/core.h"

#include <errno.h>
#include <string.h>

void lb_cleanup_fd(int *fd)
{
    if (*fd >= 0) {
        int saved = errno;
        close(*fd);
        errno = saved;
        *fd = -1;
    }
}

void lb_cleanup_free(void *pp)
{
    void *p;
    memcpy(&p, pp, sizeof(p)); /* pp is the address of some other pointer type */
    free(p);
}

void lb_cleanup_file(FILE **f)
{
    if (*f) {
        int saved = errno;
        fclose(*f);
        errno = saved;
        *f = NULL;
    }
}

static void *must(void *p, size_t bytes)
{
    if (!p) {
        lb_log(LB_LOG_ERROR, "out of memory: %zu bytes", bytes);
        abort();
    }
    return p;
}

void *lb_alloc(size_t bytes)
{
    return must(calloc(1, bytes ? bytes : 1), bytes);
}

void *lb_realloc(void *p, size_t bytes)
{
    return must(realloc(p, bytes ? bytes : 1), bytes);
}

char *lb_strdup(const char *s)
{
    return s ? must(strdup(s), strlen(s) + 1) : NULL;
}

char *lb_asprintf(const char *fmt, ...)
{
    char *out = NULL;
    va_list ap;
    va_start(ap, fmt);
    int n = vasprintf(&out, fmt, ap);
    va_end(ap);
    return must(n < 0 ? NULL : out, 0);
}

void *lb_try_alloc(size_t bytes, struct lb_error *err)
{
    void *p = calloc(1, bytes ? bytes : 1);
    if (!p) {
        lb_fail(err, LB_E_NO_SPACE, "cannot allocate %zu bytes of memory", bytes);
        lb_remedy(err, "free memory on this host or raise the memory limit of the service");
    }
    return p;
}

void lb_strv_free(char **v)
{
    if (!v)
        return;
    for (char **s = v; *s; s++)
        free(*s);
    free(v);
}
