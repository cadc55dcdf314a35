/* core/qemu/pagemap.c - /proc/PID/pagemap, as an ioctl and as words. */
#include "core/qemu/qemu_internal.h"

#include <errno.h>
#include <sys/ioctl.h>
#include <sys/uio.h>

#include "core/qemu/pm_defs.h"

/* Regions per call: 12 KiB of stack, so that any thread may scan. */
#define N_REGIONS 512

int lb_qemu_mm_alive(pid_t pid, uint64_t addr, struct lb_error *err)
{
    char byte;
    struct iovec here = {&byte, 1}, there = {(void *)addr, 1};
    if (process_vm_readv(pid, &here, 1, &there, 1, 0) == 1)
        return 0;
    return lb_fail_errno(err, LB_E_HV, errno, "QEMU's memory is gone: process %d died", (int)pid);
}

int lb_pagemap_scan(int fd, const struct lb_pagemap_query *q, uint64_t start, uint64_t end,
                    void (*on_region)(uint64_t start, uint64_t end, void *arg), void *arg,
                    struct lb_error *err)
{
    struct lb_page_region reg[N_REGIONS];
    while (start < end) {
        struct lb_pm_scan_arg a = {
            .size = sizeof(a),
            .flags = q->flags,
            .start = start,
            .end = end,
            .vec = (uintptr_t)reg,
            .vec_len = N_REGIONS,
            .category_inverted = q->inverted,
            .category_mask = q->mask,
            .category_anyof_mask = q->anyof,
            .return_mask = q->ret,
        };
        int n = ioctl(fd, LB_PAGEMAP_SCAN, &a);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return lb_fail_errno(err, errno == ESRCH ? LB_E_HV : LB_E_INTERNAL, errno,
                                 "cannot scan the page table of QEMU");
        for (int i = 0; i < n; i++)
            on_region(reg[i].start, reg[i].end, arg);
        if (a.walk_end <= start)
            return lb_fail(err, LB_E_INTERNAL, "the scan of QEMU's page table does not advance");
        start = a.walk_end;
    }
    return 0;
}

int lb_pagemap_read(int fd, uint64_t addr, uint64_t n, uint64_t *words, struct lb_error *err)
{
    char *to = (char *)words;
    size_t left = n * 8;
    off_t at = (off_t)(addr / LB_PAGE_SIZE * 8);
    while (left > 0) {
        ssize_t r = pread(fd, to, left, at);
        if (r < 0 && errno == EINTR)
            continue;
        if (r < 0)
            return lb_fail_errno(err, LB_E_HV, errno, "cannot read the page table of QEMU");
        if (r == 0)
            return lb_fail(err, LB_E_HV, "QEMU's memory is gone: it died");
        to += r;
        left -= (size_t)r;
        at += r;
    }
    return 0;
}
