/*
 * core/qemu/ram.c - reading, placing, emptying guest memory, and what of it is
 * in use.  Shared memory goes through our own view of the file; anonymous memory
 * through process_vm_readv/writev, which bypass write protection of nobody: the
 * dirty log sees our writes too (a receiver has none).
 */
#include "core/qemu/qemu_internal.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include "core/qemu/pm_defs.h"

/* The kernel moves less than 2 GiB a call. */
#define MOVE_MAX (UINT64_C(1) << 30)
/* And takes so many places. */
#define MOVE_PLACES 1024u

/* Into a fresh page of a memfd, write(2) is twice as fast as a store through the mapping:
 * no fault, and the page is not zeroed first (256 MiB: 110 against 210 ms). */
static bool write_file(const struct lb_qemu_block *b, uint64_t first, const char *buf, uint64_t left)
{
    off_t at = (off_t)(b->map_offset + first * LB_PAGE_SIZE);
    if (b->pub.backing != LB_BACK_SHARED)
        return false; /* hugetlbfs has no write */
    while (left > 0) {
        ssize_t r = pwrite(b->map_fd, buf, left, at);
        if (r < 0 && errno == EINTR)
            continue;
        if (r <= 0)
            return false;
        buf += r;
        at += r;
        left -= (uint64_t)r;
    }
    return true;
}

static int move(struct lb_hv_vm *vm, const struct lb_qemu_block *b, uint64_t first, uint64_t n,
                char *buf, bool to_vm, struct lb_error *err)
{
    uint64_t at = b->pub.hva + first * LB_PAGE_SIZE, left = n * LB_PAGE_SIZE;
    if (b->pub.map) {
        char *p = (char *)b->pub.map + first * LB_PAGE_SIZE;
        if (to_vm && !write_file(b, first, buf, left))
            memcpy(p, buf, left);
        else if (!to_vm)
            memcpy(buf, p, left);
        return 0;
    }
    if (!at || !b->pub.hva)
        return lb_fail(err, LB_E_UNSUPPORTED, "block %s was not located", b->pub.name);
    while (left > 0) {
        size_t len = (size_t)LB_MIN(left, MOVE_MAX);
        struct iovec here = {buf, len}, there = {(void *)at, len};
        ssize_t r = to_vm ? process_vm_writev(vm->proc.pid, &here, 1, &there, 1, 0)
                          : process_vm_readv(vm->proc.pid, &here, 1, &there, 1, 0);
        if (r <= 0) {
            int e = r < 0 ? errno : EFAULT;
            return lb_fail_errno(err, LB_E_HV, e, "cannot %s block %s of process %d",
                                 to_vm ? "write to" : "read", b->pub.name, (int)vm->proc.pid);
        }
        buf += r;
        at += (uint64_t)r;
        left -= (uint64_t)r;
    }
    return 0;
}

int lb_qemu_read(struct lb_hv_vm *vm, const struct lb_ram_block *blk, uint64_t first_page,
                 uint64_t n_pages, void *buf, struct lb_error *err)
{
    return move(vm, lb_qemu_block(vm, blk), first_page, n_pages, buf, false, err);
}

/* Places of the first pages of a list, those that follow each other as one. Returns how many pages. */
static uint64_t places_of(const struct lb_qemu_block *b, const uint32_t *pages, uint64_t n,
                          struct iovec places[MOVE_PLACES], unsigned *n_places)
{
    uint64_t i = 0;

    *n_places = 0;
    for (; i < n && i < MOVE_MAX / LB_PAGE_SIZE; i++) {
        bool next = i > 0 && pages[i] == pages[i - 1] + 1;
        if (!next && *n_places == MOVE_PLACES)
            break;
        if (!next)
            places[(*n_places)++] = (struct iovec){
                (void *)(b->pub.hva + (uint64_t)pages[i] * LB_PAGE_SIZE), 0};
        places[*n_places - 1].iov_len += LB_PAGE_SIZE;
    }
    return i;
}

int lb_qemu_read_pages(struct lb_hv_vm *vm, const struct lb_ram_block *blk, const uint32_t *pages,
                       uint64_t n, void *buf, struct lb_error *err)
{
    const struct lb_qemu_block *b = lb_qemu_block(vm, blk);
    struct iovec places[MOVE_PLACES];
    unsigned n_places;

    if (b->pub.map || !b->pub.hva) {
        for (uint64_t i = 0; i < n; i++)
            if (move(vm, b, pages[i], 1, (char *)buf + i * LB_PAGE_SIZE, false, err) < 0)
                return -1;
        return 0;
    }
    while (n > 0) {
        size_t len = places_of(b, pages, n, places, &n_places) * LB_PAGE_SIZE;
        struct iovec here = {buf, len};
        ssize_t r = process_vm_readv(vm->proc.pid, &here, 1, places, n_places, 0);
        uint64_t done = r > 0 ? (uint64_t)r / LB_PAGE_SIZE : 0; /* it may stop early */
        if (done == 0)
            return lb_fail_errno(err, LB_E_HV, r < 0 ? errno : EFAULT,
                                 "cannot read block %s of process %d", b->pub.name,
                                 (int)vm->proc.pid);
        buf = (char *)buf + done * LB_PAGE_SIZE;
        pages += done;
        n -= done;
    }
    return 0;
}

int lb_qemu_write(struct lb_hv_vm *vm, const struct lb_ram_block *blk, uint64_t first_page,
                  uint64_t n_pages, const void *buf, struct lb_error *err)
{
    return move(vm, lb_qemu_block(vm, blk), first_page, n_pages, (char *)buf, true, err);
}

/* ---------------------------------------------------------- populated pages */

static int populated_file(const struct lb_qemu_block *b, struct lb_bitmap *pages,
                          struct lb_error *err)
{
    off_t at = (off_t)b->map_offset, end = at + (off_t)b->pub.size_bytes;
    while (at < end) {
        off_t data = lseek(b->map_fd, at, SEEK_DATA);
        if (data < 0 && errno == ENXIO)
            return 0; /* only a hole up to the end */
        off_t hole = data < 0 ? -1 : lseek(b->map_fd, data, SEEK_HOLE);
        if (data < 0 || hole < 0)
            return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot list the pages of block %s",
                                 b->pub.name);
        if (data >= end)
            return 0;
        hole = LB_MIN(hole, end);
        uint64_t first = (uint64_t)(data - (off_t)b->map_offset) / LB_PAGE_SIZE;
        uint64_t last = ((uint64_t)(hole - (off_t)b->map_offset) + LB_PAGE_SIZE - 1) / LB_PAGE_SIZE;
        lb_bitmap_set_range(pages, first, last - first);
        at = hole;
    }
    return 0;
}

/* The pagemap word of a page that is absent but write-protected (a marker, which
 * the kernel files under swap). Learnt from a page of our own; 0: unknown. */
static uint64_t marker_word(void)
{
    uint64_t word = 0;
    LB_AUTO_FD int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK |
                                                            LB_UFFD_USER_MODE_ONLY);
    LB_AUTO_FD int pm = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    void *p = mmap(NULL, LB_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct uffdio_api api = {.api = UFFD_API, .features = LB_UFFD_FEATURES};
    struct uffdio_register reg = {.range = {(uintptr_t)p, LB_PAGE_SIZE},
                                  .mode = UFFDIO_REGISTER_MODE_WP};
    struct uffdio_writeprotect wp = {.range = {(uintptr_t)p, LB_PAGE_SIZE},
                                     .mode = UFFDIO_WRITEPROTECT_MODE_WP};
    if (p != MAP_FAILED && uffd >= 0 && pm >= 0 && ioctl(uffd, UFFDIO_API, &api) == 0 &&
        ioctl(uffd, UFFDIO_REGISTER, &reg) == 0 && ioctl(uffd, UFFDIO_WRITEPROTECT, &wp) == 0 &&
        (lb_pagemap_read(pm, (uintptr_t)p, 1, &word, NULL) < 0 || !(word & LB_PM_SWAP) ||
         (word & ~(LB_PM_SWAP | UINT64_C(0x3f80000000000000))) == 0))
        word = 0; /* without CAP_SYS_ADMIN the type is hidden */
    if (p != MAP_FAILED)
        munmap(p, LB_PAGE_SIZE);
    return word;
}

struct anon_scan {
    struct lb_hv_vm *vm;
    uint64_t hva, marker;
    struct lb_bitmap *pages;
    struct lb_error *err;
    int rc;
};

static void on_present(uint64_t start, uint64_t end, void *arg)
{
    struct anon_scan *s = arg;
    lb_bitmap_set_range(s->pages, (start - s->hva) / LB_PAGE_SIZE, (end - start) / LB_PAGE_SIZE);
}

static void on_swapped(uint64_t start, uint64_t end, void *arg)
{
    struct anon_scan *s = arg;
    if (!s->marker) {
        on_present(start, end, arg);
        return;
    }
    uint64_t words[512];
    for (uint64_t n; s->rc == 0 && start < end; start += n * LB_PAGE_SIZE) {
        n = LB_MIN((end - start) / LB_PAGE_SIZE, LB_ARRAY_LEN(words));
        s->rc = lb_pagemap_read(s->vm->pagemap_fd, start, n, words, s->err);
        for (uint64_t i = 0; s->rc == 0 && i < n; i++)
            if (words[i] != s->marker && words[i] & (LB_PM_SWAP | LB_PM_PRESENT))
                lb_bitmap_set(s->pages, (start - s->hva) / LB_PAGE_SIZE + i);
    }
}

static int populated_words(struct lb_hv_vm *vm, const struct lb_qemu_block *b,
                           struct lb_bitmap *pages, struct lb_error *err)
{
    uint64_t words[1024], total = b->pub.size_bytes / LB_PAGE_SIZE;
    for (uint64_t first = 0, n; first < total; first += n) {
        n = LB_MIN(total - first, LB_ARRAY_LEN(words));
        if (lb_pagemap_read(vm->pagemap_fd, b->pub.hva + first * LB_PAGE_SIZE, n, words, err) < 0)
            return -1;
        for (uint64_t i = 0; i < n; i++)
            if (words[i] & (LB_PM_SWAP | LB_PM_PRESENT))
                lb_bitmap_set(pages, first + i);
    }
    return 0;
}

int lb_qemu_pages_there(struct lb_hv_vm *vm, const struct lb_qemu_block *b, struct lb_bitmap *pages,
                        struct lb_error *err)
{
    return b->pub.map ? populated_file(b, pages, err) : populated_words(vm, b, pages, err);
}

int lb_qemu_populated(struct lb_hv_vm *vm, const struct lb_ram_block *blk,
                      struct lb_bitmap *pages, struct lb_error *err)
{
    const struct lb_qemu_block *b = lb_qemu_block(vm, blk);
    if (!b->pub.hva) {
        lb_bitmap_set_all(pages);
        return 0;
    }
    /* of a private view: an absent page reads as the file */
    if (b->map_fd >= 0 && populated_file(b, pages, err) < 0)
        return -1;
    if (b->pub.map)
        return 0;
    struct lb_pagemap_query present = {
        .inverted = LB_PAGE_IS_PFNZERO,
        .mask = LB_PAGE_IS_PRESENT | LB_PAGE_IS_PFNZERO,
        .ret = LB_PAGE_IS_PRESENT,
    };
    struct lb_pagemap_query swapped = {.mask = LB_PAGE_IS_SWAPPED, .ret = LB_PAGE_IS_SWAPPED};
    struct anon_scan s = {.vm = vm, .hva = b->pub.hva, .marker = marker_word(), .pages = pages,
                          .err = err};
    struct lb_error why = LB_ERROR_INIT;
    uint64_t end = b->pub.hva + b->pub.size_bytes;
    /* swapped first: a page that comes back from swap in between is seen present */
    if (lb_pagemap_scan(vm->pagemap_fd, &swapped, b->pub.hva, end, on_swapped, &s, &why) < 0) {
        if (why.sys_errno == ENOTTY || why.sys_errno == EINVAL) /* Linux < 6.7 */
            return populated_words(vm, b, pages, err);
        if (err)
            *err = why;
        return -1;
    }
    if (s.rc < 0)
        return -1;
    if (lb_pagemap_scan(vm->pagemap_fd, &present, b->pub.hva, end, on_present, &s, err) < 0)
        return -1;
    /* and swapped again for one that went the other way */
    if (lb_pagemap_scan(vm->pagemap_fd, &swapped, b->pub.hva, end, on_swapped, &s, err) < 0)
        return -1;
    return s.rc < 0 ? -1 : lb_qemu_mm_alive(vm->proc.pid, b->pub.hva, err);
}

/* ------------------------------------------------------------------- empty */

struct drop {
    uint64_t addr, len;
};

static int drop_anon(struct lb_injector *in, void *arg, struct lb_error *err)
{
    struct drop *d = arg;
    uint64_t args[6] = {d->addr, d->len, MADV_DONTNEED};
    long rc;
    if (lb_inject_syscall(in, SYS_madvise, args, &rc, err) < 0)
        return -1;
    return rc == 0 ? 0 : lb_fail_errno(err, LB_E_HV, (int)-rc, "cannot empty QEMU's memory");
}

int lb_qemu_empty_block(struct lb_hv_vm *vm, const struct lb_qemu_block *b, struct lb_error *err)
{
    struct drop d = {b->pub.hva, b->pub.size_bytes};
    if (!b->pub.map)
        return lb_inject(vm->proc.pid, drop_anon, &d, err);
    if (fallocate(b->map_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)b->map_offset,
                  (off_t)b->pub.size_bytes) < 0)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot empty block %s", b->pub.name);
    return 0;
}

/* A block that is a private view of the memory that clones share loses what is its own. */
int lb_qemu_prepare_ram(struct lb_hv_vm *vm, struct lb_error *err)
{
    for (unsigned i = 0; i < vm->n_blocks; i++)
        if (vm->blocks[i].pub.kind == LB_RAM_MAIN && lb_qemu_empty_block(vm, &vm->blocks[i], err) < 0)
            return -1;
    return 0;
}
