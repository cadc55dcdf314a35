/*
 * core/qemu/dirty_softdirty.c - dirty log from soft-dirty bits.
 *
 * For kernels without userfaultfd WP_ASYNC (before 6.7) and with
 * CONFIG_MEM_SOFT_DIRTY, Debian's among them.  Writing 4 to clear_refs clears bit
 * 55 of every pagemap word of the whole process, so all blocks are read together
 * at the first clean of a stop and handed out block by block:
 *
 *      stop; clean(block 0): read all -> pending[], clear_refs; out 0
 *            clean(block 1): out 1 ...
 *
 * The bit of a shared page lives in QEMU's page table and is lost when the page is
 * swapped out: refused where there is swap.  hugetlbfs has no such bits at all: refused.
 *
 * A page given back (balloon, free page reporting) takes its bit along, although it
 * reads as zeros from then on.  So what had a page of its own at the last reading and
 * has none now counts as written.  Not seen: shared memory that is given back and read
 * again, unwritten, within one round; its guest was told that the contents are gone.
 */
#include "core/qemu/qemu_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>

#include "core/qemu/pm_defs.h"

static bool supported(void)
{
    volatile char *page = mmap(NULL, LB_PAGE_SIZE, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED)
        return false;
    page[0] = 1;
    LB_AUTO_FD int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    uint64_t word = 0;
    bool ok = fd >= 0 && lb_pagemap_read(fd, (uintptr_t)page, 1, &word, NULL) == 0 &&
              (word & LB_PM_SOFT_DIRTY);
    munmap((void *)page, LB_PAGE_SIZE);
    return ok;
}

static int clear_refs(struct lb_hv_vm *vm, struct lb_error *err)
{
    char path[64];
    snprintf(path, sizeof(path), "/proc/%d/clear_refs", (int)vm->proc.pid);
    LB_AUTO_FD int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0 || write(fd, "4", 1) != 1)
        return lb_fail_errno(err, LB_E_HV, errno, "cannot clear the soft-dirty bits of QEMU");
    return 0;
}

static bool have_swap(void)
{
    LB_AUTO_FREE char *text = NULL;
    if (lb_file_read("/proc/swaps", 65536, &text, NULL, NULL) < 0)
        return false;
    const char *nl = strchr(text, '\n'); /* first line: headings */
    return nl && nl[1];
}

static void disable(struct lb_hv_vm *vm)
{
    for (unsigned i = 0; vm->sd_pending && i < vm->n_blocks; i++)
        lb_bitmap_free(&vm->sd_pending[i]);
    for (unsigned i = 0; vm->sd_own && i < vm->n_blocks; i++)
        lb_bitmap_free(&vm->sd_own[i]);
    free(vm->sd_pending);
    vm->sd_pending = NULL;
    free(vm->sd_own);
    vm->sd_own = NULL;
    free(vm->sd_given);
    vm->sd_given = NULL;
}

/* The zero page, which a read of nothing maps, has many users. Our own view of
 * shared memory makes a second one, but there is no zero page in it. */
static bool own_page(const struct lb_qemu_block *b, uint64_t word)
{
    if (b->pub.backing == LB_BACK_SHARED)
        return word & (LB_PM_PRESENT | LB_PM_SWAP);
    return (word & LB_PM_SWAP) || ((word & LB_PM_PRESENT) && (word & LB_PM_EXCLUSIVE));
}

/* Bit 0 of dirty is page `first`. own, brought up to date, is of the whole block; NULL for a hint. */
static int read_bits(struct lb_hv_vm *vm, const struct lb_qemu_block *b, uint64_t first,
                     uint64_t count, struct lb_bitmap *dirty, struct lb_bitmap *own,
                     struct lb_error *err)
{
    uint64_t words[1024], bit = 0;
    while (count > 0) {
        uint64_t n = LB_MIN(count, LB_ARRAY_LEN(words));
        if (lb_pagemap_read(vm->pagemap_fd, b->pub.hva + first * LB_PAGE_SIZE, n, words, err) < 0)
            return -1;
        for (uint64_t i = 0; i < n; i++) {
            bool has = own && own_page(b, words[i]);
            bool gone = own && !has && lb_bitmap_test(own, first + i);
            if ((words[i] & LB_PM_SOFT_DIRTY) || gone)
                lb_bitmap_set(dirty, bit + i);
            if (has)
                lb_bitmap_set(own, first + i);
            else if (gone)
                lb_bitmap_clear(own, first + i);
        }
        bit += n;
        first += n;
        count -= n;
    }
    return 0;
}

/* All blocks into pending, and forget. */
static int collect(struct lb_hv_vm *vm, struct lb_error *err)
{
    for (unsigned i = 0; i < vm->n_blocks; i++) {
        const struct lb_qemu_block *b = &vm->blocks[i];
        if (b->pub.kind != LB_RAM_ROM &&
            read_bits(vm, b, 0, b->pub.size_bytes / LB_PAGE_SIZE, &vm->sd_pending[i],
                      &vm->sd_own[i], err) < 0)
            return -1;
    }
    return clear_refs(vm, err);
}

static int enable(struct lb_hv_vm *vm, struct lb_error *err)
{
    for (unsigned i = 0; i < vm->n_blocks; i++) {
        if (vm->blocks[i].pub.kind != LB_RAM_ROM && vm->blocks[i].pub.backing == LB_BACK_HUGETLB) {
            lb_fail(err, LB_E_UNSUPPORTED, "there are no soft-dirty bits in hugetlbfs memory (%s)",
                    vm->blocks[i].pub.name);
            return lb_remedy(err, "use Linux >= 6.7, or start the VM with other memory");
        }
        if (vm->blocks[i].pub.kind != LB_RAM_ROM && vm->blocks[i].pub.map && have_swap()) {
            lb_fail(err, LB_E_UNSUPPORTED, "soft-dirty bits of shared memory (%s) get lost in swap",
                    vm->blocks[i].pub.name);
            return lb_remedy(err, "turn swap off during the migration, or use Linux >= 6.7");
        }
    }
    vm->sd_pending = lb_alloc(vm->n_blocks * sizeof(*vm->sd_pending));
    vm->sd_own = lb_alloc(vm->n_blocks * sizeof(*vm->sd_own));
    vm->sd_given = lb_alloc(vm->n_blocks * sizeof(*vm->sd_given));
    for (unsigned i = 0; i < vm->n_blocks; i++) {
        uint64_t n_pages = vm->blocks[i].pub.size_bytes / LB_PAGE_SIZE;
        if (lb_bitmap_init(&vm->sd_pending[i], n_pages, err) < 0 ||
            lb_bitmap_init(&vm->sd_own[i], n_pages, err) < 0) {
            disable(vm);
            return -1;
        }
        vm->sd_given[i] = true; /* a clean before the next stop reads what there is by then */
    }
    vm->sd_stop_count = vm->stop_count;
    if (collect(vm, err) < 0) {
        disable(vm);
        return -1;
    }
    for (unsigned i = 0; i < vm->n_blocks; i++)
        lb_bitmap_clear_all(&vm->sd_pending[i]); /* from before the log */
    return 0;
}

static int clean(struct lb_hv_vm *vm, const struct lb_qemu_block *b, struct lb_bitmap *dirty,
                 struct lb_error *err)
{
    struct lb_bitmap *mine = &vm->sd_pending[b->pub.id];
    if (vm->sd_stop_count != vm->stop_count) {
        if (collect(vm, err) < 0)
            return -1;
        vm->sd_stop_count = vm->stop_count;
        memset(vm->sd_given, 0, vm->n_blocks * sizeof(*vm->sd_given));
    } else if (vm->sd_given[b->pub.id] &&
               read_bits(vm, b, 0, b->pub.size_bytes / LB_PAGE_SIZE, mine,
                         &vm->sd_own[b->pub.id], err) < 0) {
        /* a second clean in one stop also sees what QEMU itself wrote since; its
         * bits stay set and come again at the next stop, which only costs a copy */
        return -1;
    }
    if (lb_qemu_mm_alive(vm->proc.pid, b->pub.hva, err) < 0)
        return -1;
    vm->sd_given[b->pub.id] = true;
    lb_bitmap_or(dirty, mine);
    lb_bitmap_clear_all(mine);
    return 0;
}

static int peek(struct lb_hv_vm *vm, const struct lb_qemu_block *b, uint64_t first, uint64_t count,
                struct lb_bitmap *dirty, struct lb_error *err)
{
    return read_bits(vm, b, first, count, dirty, NULL, err);
}

const struct lb_dirty_ops lb_dirty_softdirty = {
    .name = "soft-dirty",
    .supported = supported,
    .enable = enable,
    .clean = clean,
    .peek = peek,
    .disable = disable,
};

const struct lb_dirty_ops *lb_dirty_choose(struct lb_error *err)
{
    const struct lb_dirty_ops *all[] = {&lb_dirty_uffd, &lb_dirty_softdirty};
    const char *want = getenv("LIFEBOAT_DIRTY_LOG");
    for (unsigned i = 0; i < LB_ARRAY_LEN(all); i++) {
        if (want && *want && strcmp(want, all[i]->name) != 0)
            continue;
        if (all[i]->supported())
            return all[i];
    }
    if (want && *want)
        lb_fail(err, LB_E_UNSUPPORTED, "LIFEBOAT_DIRTY_LOG=%s: this kernel does not offer it", want);
    else
        lb_fail(err, LB_E_UNSUPPORTED, "this kernel cannot log the writes of a process");
    lb_remedy(err, "run Linux >= 6.7 with CONFIG_USERFAULTFD, or one with CONFIG_MEM_SOFT_DIRTY");
    return NULL;
}
