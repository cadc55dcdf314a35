#include "migrate/budget.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <sys/mman.h>

/* No sender takes up so much at once. More is of an earlier boot, since when the clock has begun anew. */
#define MOST_NS UINT64_C(600000000000)

int lb_budget_open(struct lb_budget *b, uint64_t bytes_per_s, const char *path, struct lb_error *err)
{
    *b = (struct lb_budget){.bytes_per_s = bytes_per_s};
    if (!bytes_per_s || !path)
        return 0;
    LB_AUTO_FD int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    uint64_t found;
    void *p;

    if (fd < 0 || ftruncate(fd, sizeof(*b->shared_ns)))
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot open %s", path);
    p = mmap(NULL, sizeof(*b->shared_ns), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (p == MAP_FAILED)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot map %s", path);
    b->shared_ns = p;
    found = atomic_load(b->shared_ns);
    if (found > lb_now_ns() + MOST_NS)
        atomic_compare_exchange_strong(b->shared_ns, &found, 0);
    return 0;
}

static uint64_t take_up(_Atomic uint64_t *until, uint64_t now, uint64_t ns)
{
    uint64_t old = atomic_load(until), new;

    do
        new = LB_MAX(old, now) + ns;
    while (!atomic_compare_exchange_weak(until, &old, new));
    return new;
}

uint64_t lb_budget_take(struct lb_budget *b, uint64_t bytes, bool urgent)
{
    uint64_t now = lb_now_ns(), ns, own, all;

    if (!b->bytes_per_s)
        return now;
    ns = (uint64_t)((double)bytes * 1e9 / (double)b->bytes_per_s);
    own = take_up(&b->own_ns, now, ns);
    if (!b->shared_ns)
        return own;
    all = take_up(b->shared_ns, now, ns);
    return urgent ? own : all;
}

void lb_budget_close(struct lb_budget *b)
{
    if (b->shared_ns)
        munmap(b->shared_ns, sizeof(*b->shared_ns));
    *b = (struct lb_budget){0};
}
