/*
 * core/qemu/dirty_uffd.c - dirty log from userfaultfd write protection.
 *
 * Linux >= 6.7, WP_ASYNC: a page is write-protected, the first write lifts the
 * protection by itself, and PAGEMAP_SCAN lists the pages without protection
 * ("written") and protects them again in one pass.  The descriptor is made inside
 * QEMU (inject.c) and moved here, so that ours is the only reference: when we
 * die, tracking ends.
 *
 * Writes by the kernel on QEMU's behalf (read(2) into guest memory, KVM, vhost)
 * go through the same page table and are seen; DMA in flight is not, which is
 * why clean is only called while the guest is stopped and drained.
 */
#include "core/qemu/qemu_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>

#include "core/qemu/pm_defs.h"

static bool supported(void)
{
    LB_AUTO_FD int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK |
                                                          LB_UFFD_USER_MODE_ONLY);
    struct uffdio_api api = {.api = UFFD_API, .features = LB_UFFD_FEATURES};
    return fd >= 0 && ioctl(fd, UFFDIO_API, &api) == 0;
}

struct take {
    int pidfd;
    int fd;
};

/* Inside the injection: make the descriptor in QEMU, take it over, close QEMU's. */
static int take_uffd(struct lb_injector *in, void *arg, struct lb_error *err)
{
    struct take *t = arg;
    long fd, rc;
    uint64_t make[6] = {O_CLOEXEC | O_NONBLOCK | LB_UFFD_USER_MODE_ONLY};
    if (lb_inject_syscall(in, SYS_userfaultfd, make, &fd, err) < 0)
        return -1;
    if (fd < 0) {
        lb_fail_errno(err, LB_E_UNSUPPORTED, (int)-fd, "QEMU may not make a userfaultfd");
        return lb_remedy(err, "a seccomp profile around QEMU forbids it: allow userfaultfd");
    }
    t->fd = (int)syscall(SYS_pidfd_getfd, t->pidfd, (int)fd, 0);
    int e = errno;
    uint64_t shut[6] = {(uint64_t)fd};
    if (lb_inject_syscall(in, SYS_close, shut, &rc, err) < 0)
        return -1;
    if (t->fd < 0)
        return lb_fail_errno(err, LB_E_HV, e, "cannot take a descriptor out of QEMU");
    return 0;
}

static void ignore_region(uint64_t start, uint64_t end, void *arg)
{
    (void)start, (void)end, (void)arg;
}

static const struct lb_pagemap_query clean_query = {
    .flags = LB_PM_SCAN_WP_MATCHING | LB_PM_SCAN_CHECK_WPASYNC,
    .mask = LB_PAGE_IS_WRITTEN,
    .ret = LB_PAGE_IS_WRITTEN,
};
static const struct lb_pagemap_query peek_query = {
    .mask = LB_PAGE_IS_WRITTEN,
    .ret = LB_PAGE_IS_WRITTEN,
};

static void disable(struct lb_hv_vm *vm)
{
    /* the last reference: the kernel lifts all protection */
    if (vm->uffd >= 0)
        close(vm->uffd);
    vm->uffd = -1;
}

static int watch_block(struct lb_hv_vm *vm, const struct lb_qemu_block *b, struct lb_error *err)
{
    struct uffdio_register reg = {
        .range = {.start = b->pub.hva, .len = b->pub.size_bytes},
        .mode = UFFDIO_REGISTER_MODE_WP,
    };
    if (ioctl(vm->uffd, UFFDIO_REGISTER, &reg) < 0) {
        int e = errno;
        lb_fail_errno(err, LB_E_UNSUPPORTED, e, "cannot track writes to %s", b->pub.name);
        return lb_remedy(err, e == EBUSY ? "another program tracks this VM's memory: end it"
                                         : "the memory backend cannot be tracked: use anonymous "
                                           "memory, memfd or hugetlbfs");
    }
    return lb_pagemap_scan(vm->pagemap_fd, &clean_query, b->pub.hva,
                           b->pub.hva + b->pub.size_bytes, ignore_region, NULL, err);
}

static int enable(struct lb_hv_vm *vm, struct lb_error *err)
{
    struct take t = {.pidfd = vm->pidfd, .fd = -1};
    if (lb_inject(vm->proc.pid, take_uffd, &t, err) < 0) {
        lb_cleanup_fd(&t.fd);
        return -1;
    }
    vm->uffd = t.fd;
    struct uffdio_api api = {.api = UFFD_API, .features = LB_UFFD_FEATURES};
    if (ioctl(vm->uffd, UFFDIO_API, &api) < 0) {
        lb_fail_errno(err, LB_E_UNSUPPORTED, errno, "this kernel has no asynchronous "
                                                    "userfaultfd write protection");
        disable(vm);
        return -1;
    }
    for (unsigned i = 0; i < vm->n_blocks; i++) {
        if (vm->blocks[i].pub.kind != LB_RAM_ROM && watch_block(vm, &vm->blocks[i], err) < 0) {
            disable(vm);
            return -1;
        }
    }
    return 0;
}

struct mark {
    uint64_t hva;
    struct lb_bitmap *dirty;
};

static void mark_region(uint64_t start, uint64_t end, void *arg)
{
    struct mark *m = arg;
    lb_bitmap_set_range(m->dirty, (start - m->hva) / LB_PAGE_SIZE, (end - start) / LB_PAGE_SIZE);
}

static int clean(struct lb_hv_vm *vm, const struct lb_qemu_block *b, struct lb_bitmap *dirty,
                 struct lb_error *err)
{
    struct mark m = {.hva = b->pub.hva, .dirty = dirty};
    if (lb_pagemap_scan(vm->pagemap_fd, &clean_query, b->pub.hva,
                        b->pub.hva + b->pub.size_bytes, mark_region, &m, err) < 0)
        return -1;
    return lb_qemu_mm_alive(vm->proc.pid, b->pub.hva, err);
}

/* Bit 0 of dirty is page `first`. */
static int peek(struct lb_hv_vm *vm, const struct lb_qemu_block *b, uint64_t first, uint64_t count,
                struct lb_bitmap *dirty, struct lb_error *err)
{
    uint64_t start = b->pub.hva + first * LB_PAGE_SIZE;
    uint64_t end = start + count * LB_PAGE_SIZE;
    if (b->pub.track_bytes > LB_PAGE_SIZE) {
        /* hugetlb: the kernel looks at whole pages; clip what it says to the range */
        uint64_t mask = b->pub.track_bytes - 1, from = start & ~mask, to = (end + mask) & ~mask;
        struct lb_bitmap all = {0};
        if (lb_bitmap_init(&all, (to - from) / LB_PAGE_SIZE, err) < 0)
            return -1;
        struct mark whole = {.hva = from, .dirty = &all};
        int rc = lb_pagemap_scan(vm->pagemap_fd, &peek_query, from, to, mark_region, &whole, err);
        for (uint64_t i = 0; rc == 0 && i < count; i++)
            if (lb_bitmap_test(&all, (start - from) / LB_PAGE_SIZE + i))
                lb_bitmap_set(dirty, i);
        lb_bitmap_free(&all);
        return rc;
    }
    struct mark m = {.hva = start, .dirty = dirty};
    return lb_pagemap_scan(vm->pagemap_fd, &peek_query, start, end, mark_region, &m, err);
}

const struct lb_dirty_ops lb_dirty_uffd = {
    .name = "uffd",
    .supported = supported,
    .enable = enable,
    .clean = clean,
    .peek = peek,
    .disable = disable,
};
