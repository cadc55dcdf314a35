/*
 * test_softdirty.c - does a source of the dirty log report exactly what a process wrote?
 *
 *      test_softdirty soft-dirty|uffd [DISK]
 *
 * A child process stands for QEMU: it has memory of each kind and does what it is told (write these pages, read them,
 * read(2) with O_DIRECT into them ...) through a socket, so that "stopped" is simply: not told anything.  run.sh runs
 * this with soft-dirty inside a VM, on a kernel that has it, and with uffd on a host that has that: the contract of
 * core/qemu/qemu_internal.h is the same.
 * By itself the engine takes userfaultfd where the kernel has it (from 6.7 on), and the first test checks that.
 *
 * Where the log is coarse (soft-dirty marks a whole huge page, and so may uffd before it is split) the set reported
 * may be larger, but only within the huge page that was written.  DISK is a file or device of at least 4 MiB whose
 * 4 KiB block i starts with the number i + 1, little-endian.
 */
#include "core/qemu/qemu_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>

#include "core/qemu/pm_defs.h"

#define HUGE_BYTES (2u << 20)
#define HUGE_PAGES (HUGE_BYTES / LB_PAGE_SIZE)
#define BLOCK_BYTES (4 * HUGE_BYTES)
#define BLOCK_PAGES (BLOCK_BYTES / LB_PAGE_SIZE)
#define DISK_PAGES 1024

enum { ANON, SHARED, THP, N_TRACKED, ROM = N_TRACKED, N_BLOCKS };
static const char *const block_name[] = {"anonymous", "memfd", "huge", "rom"};

static const struct lb_dirty_ops *ops;
static const char *disk_path;

/* ------------------------------------------------------------------ the child */

enum op { OP_WRITE, OP_READ, OP_DIRECT, OP_BUFFERED, OP_DISCARD, OP_FORK, OP_RUN };

struct order {
    enum op op;
    unsigned block;
    uint64_t page, n;
};

struct child {
    pid_t pid;
    int sock;
    uint64_t hva[N_BLOCKS];
    volatile int *run; /* shared: OP_RUN goes on while it is set */
};

/* Guarded, so that no neighbour merges with it; aligned to a huge page. */
static void *reserve(int flags, int fd)
{
    char *room = mmap(NULL, BLOCK_BYTES + 2 * HUGE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (room == MAP_FAILED)
        return room;
    char *at = (char *)(((uintptr_t)room + HUGE_BYTES) & ~(uintptr_t)(HUGE_BYTES - 1));
    return mmap(at, BLOCK_BYTES, PROT_READ | PROT_WRITE, flags | MAP_FIXED, fd, 0);
}

static int read_disk(void *to, uint64_t disk_page, bool direct)
{
    int fd = open(disk_path, O_RDONLY | (direct ? O_DIRECT : 0));
    ssize_t got = fd < 0 ? -1 : pread(fd, to, LB_PAGE_SIZE, (off_t)(disk_page * LB_PAGE_SIZE));
    int e = errno;
    if (fd >= 0)
        close(fd);
    if (got != LB_PAGE_SIZE)
        return fd < 0 || got < 0 ? -e : -EIO;
    return *(uint64_t *)to == disk_page + 1 ? 0 : -EILSEQ;
}

static uint64_t draw(uint64_t *seed)
{
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    return *seed;
}

static int obey(const struct child *c, char *const *base, const struct order *o)
{
    static uint64_t stamp;
    int rc = 0;
    if (o->op == OP_FORK) {
        pid_t pid = fork();
        if (pid == 0)
            _exit(0);
        return pid > 0 && waitpid(pid, NULL, 0) == pid ? 0 : -errno;
    }
    if (o->op == OP_RUN) {
        uint64_t seed = UINT64_C(0x9e3779b97f4a7c15);
        while (*c->run) {
            unsigned b = (unsigned)(draw(&seed) % N_TRACKED);
            char *at = base[b] + draw(&seed) % BLOCK_PAGES * LB_PAGE_SIZE;
            if (disk_path && draw(&seed) % 64 == 0)
                rc = read_disk(at, draw(&seed) % DISK_PAGES, true);
            else
                ((uint64_t *)at)[draw(&seed) % 512] = ++stamp;
            if (rc < 0)
                return rc;
        }
        return 0;
    }
    for (uint64_t p = o->page; p < o->page + o->n && rc == 0; p++) {
        char *at = base[o->block] + p * LB_PAGE_SIZE;
        switch (o->op) {
        case OP_WRITE: ((uint64_t *)at)[p % 512] = ++stamp; break;
        case OP_READ: *(volatile char *)at; break;
        case OP_DIRECT: rc = read_disk(at, p % DISK_PAGES, true); break;
        case OP_BUFFERED: rc = read_disk(at, p % DISK_PAGES, false); break;
        case OP_DISCARD: rc = madvise(at, LB_PAGE_SIZE, MADV_DONTNEED) < 0 ? -errno : 0; break;
        default: rc = -EINVAL;
        }
    }
    return rc;
}

static void be_child(struct child *c, int sock)
{
    char *base[N_BLOCKS];
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    int fd = memfd_create("ram", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, BLOCK_BYTES) < 0)
        _exit(2);
    base[ANON] = reserve(MAP_PRIVATE | MAP_ANONYMOUS, -1);
    base[SHARED] = reserve(MAP_SHARED, fd);
    base[THP] = reserve(MAP_PRIVATE | MAP_ANONYMOUS, -1);
    base[ROM] = reserve(MAP_PRIVATE | MAP_ANONYMOUS, -1);
    for (unsigned i = 0; i < N_BLOCKS; i++) {
        if (base[i] == MAP_FAILED)
            _exit(2);
        madvise(base[i], BLOCK_BYTES, i == THP ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
        c->hva[i] = (uintptr_t)base[i];
    }
    struct order o;
    int rc = write(sock, c->hva, sizeof(c->hva)) == sizeof(c->hva) ? 0 : -1;
    while (rc == 0 && read(sock, &o, sizeof(o)) == sizeof(o)) {
        int answer = obey(c, base, &o);
        rc = write(sock, &answer, sizeof(answer)) == sizeof(answer) ? 0 : -1;
    }
    _exit(0);
}

/* ------------------------------------------------------------------ this side */

struct fixture {
    struct child child;
    struct lb_hv_vm *vm;
    struct lb_bitmap dirty;
};

static int setup(void **state)
{
    struct fixture *f = lb_alloc(sizeof(*f));
    int pair[2];
    f->child.run = mmap(NULL, LB_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (f->child.run == MAP_FAILED || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0)
        return -1;
    f->child.pid = fork();
    if (f->child.pid == 0) {
        close(pair[0]);
        be_child(&f->child, pair[1]);
    }
    close(pair[1]);
    f->child.sock = pair[0];
    if (f->child.pid < 0 || read(pair[0], f->child.hva, sizeof(f->child.hva)) != sizeof(f->child.hva))
        return -1;

    struct lb_hv_vm *vm = f->vm = lb_qemu_vm_new("child");
    char path[64];
    snprintf(path, sizeof(path), "/proc/%d/pagemap", (int)f->child.pid);
    vm->pagemap_fd = open(path, O_RDONLY | O_CLOEXEC);
    if (vm->pagemap_fd < 0 || lb_proc_identify(f->child.pid, &vm->proc, NULL) < 0)
        return -1;
    vm->pidfd = lb_proc_open(&vm->proc, NULL);
    vm->n_blocks = N_BLOCKS;
    vm->blocks = lb_alloc(N_BLOCKS * sizeof(*vm->blocks));
    for (unsigned i = 0; i < N_BLOCKS; i++) {
        struct lb_qemu_block *b = &vm->blocks[i];
        b->pub.id = i;
        snprintf(b->pub.name, sizeof(b->pub.name), "%s", block_name[i]);
        b->pub.size_bytes = b->total_bytes = BLOCK_BYTES;
        b->pub.track_bytes = LB_PAGE_SIZE;
        b->pub.kind = i == ROM ? LB_RAM_ROM : LB_RAM_MAIN;
        b->pub.backing = i == SHARED ? LB_BACK_SHARED : LB_BACK_ANON;
        b->pub.hva = f->child.hva[i];
        b->map_fd = -1;
    }
    vm->stop_count = 1; /* as after the first stop: the child is idle, that is stopped */
    *state = f;
    return lb_bitmap_init(&f->dirty, BLOCK_PAGES, NULL);
}

static int teardown(void **state)
{
    struct fixture *f = *state;
    f->vm->dirty = NULL; /* each test disables */
    lb_qemu_vm_free(f->vm);
    kill(f->child.pid, SIGKILL);
    waitpid(f->child.pid, NULL, 0);
    close(f->child.sock);
    munmap((void *)f->child.run, LB_PAGE_SIZE);
    lb_bitmap_free(&f->dirty);
    free(f);
    return 0;
}

static void tell(struct fixture *f, enum op op, unsigned block, uint64_t page, uint64_t n)
{
    struct order o = {op, block, page, n};
    int rc = -1;
    assert_int_equal(write(f->child.sock, &o, sizeof(o)), sizeof(o));
    assert_int_equal(read(f->child.sock, &rc, sizeof(rc)), sizeof(rc));
    assert_int_equal(rc, 0);
}

static void tell_list(struct fixture *f, enum op op, unsigned block, const uint64_t *pages, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        tell(f, op, block, pages[i], 1);
}

/* What the engine does between two rounds, to the log. */
static void next_stop(struct fixture *f)
{
    f->vm->stop_count++;
}

static void enable(struct fixture *f)
{
    struct lb_error err = LB_ERROR_INIT;
    if (ops->enable(f->vm, &err) < 0)
        fail_msg("enable: %s", err.message);
}

static void disable(struct fixture *f)
{
    ops->disable(f->vm);
}

static const struct lb_bitmap *clean(struct fixture *f, unsigned block)
{
    struct lb_error err = LB_ERROR_INIT;
    lb_bitmap_clear_all(&f->dirty);
    if (ops->clean(f->vm, &f->vm->blocks[block], &f->dirty, &err) < 0)
        fail_msg("clean: %s", err.message);
    return &f->dirty;
}

static const struct lb_bitmap *peek(struct fixture *f, unsigned block, uint64_t first, uint64_t count)
{
    struct lb_error err = LB_ERROR_INIT;
    lb_bitmap_clear_all(&f->dirty);
    if (ops->peek(f->vm, &f->vm->blocks[block], first, count, &f->dirty, &err) < 0)
        fail_msg("peek: %s", err.message);
    return &f->dirty;
}

#define expect_pages(f, got, block, pages, n) expect_pages_(got, block, pages, n, 0, __LINE__)
#define expect_none(f, got, block) expect_pages_(got, block, NULL, 0, 0, __LINE__)
static void expect_pages_(const struct lb_bitmap *got, unsigned block, const uint64_t *pages, size_t n,
                          uint64_t first, int line)
{
    for (size_t i = 0; i < n; i++)
        if (!lb_bitmap_test(got, pages[i] - first))
            fail_msg("line %d, %s: page %u was written and is missing of %u reported", line, block_name[block],
                     (unsigned)pages[i], (unsigned)lb_bitmap_count(got));
    for (uint64_t p = 0; p < got->n_bits; p++) {
        bool mine = false;
        for (size_t i = 0; i < n && !mine; i++)
            mine = block == THP ? pages[i] / HUGE_PAGES == (p + first) / HUGE_PAGES : pages[i] == p + first;
        if (lb_bitmap_test(got, p) && !mine)
            fail_msg("line %d, %s: page %u is reported and was not written", line, block_name[block],
                     (unsigned)(p + first));
    }
}

static void populate_all(struct fixture *f)
{
    for (unsigned b = 0; b < N_BLOCKS; b++)
        tell(f, OP_WRITE, b, 0, BLOCK_PAGES);
}

static const uint64_t scattered[] = {0, 1, 7, 63, 64, 65, 511, 512, 1000, 1023, BLOCK_PAGES - 1};
#define N_SCATTERED LB_ARRAY_LEN(scattered)

/* ------------------------------------------------------------------ the tests */

static void kernel_chooses(void **state)
{
    (void)state;
    const char *other = ops == &lb_dirty_uffd ? "soft-dirty" : "uffd";
    struct utsname kernel;
    unsigned major, minor;
    assert_int_equal(uname(&kernel), 0);
    assert_int_equal(sscanf(kernel.release, "%u.%u", &major, &minor), 2);
    bool has_uffd = major > 6 || (major == 6 && minor >= 7); /* Debian 12's guest has not, Debian 13's has both */
    unsetenv("LIFEBOAT_DIRTY_LOG");
    struct lb_error err = LB_ERROR_INIT;
    const struct lb_dirty_ops *chosen = lb_dirty_choose(&err);
    assert_non_null(chosen);
    assert_string_equal(chosen->name, has_uffd ? "uffd" : "soft-dirty");
    setenv("LIFEBOAT_DIRTY_LOG", ops->name, 1);
    assert_ptr_equal(lb_dirty_choose(&err), ops);
    const struct lb_dirty_ops *second = ops == &lb_dirty_uffd ? &lb_dirty_softdirty : &lb_dirty_uffd;
    setenv("LIFEBOAT_DIRTY_LOG", other, 1);
    if (second->supported()) {
        assert_ptr_equal(lb_dirty_choose(&err), second);
    } else {
        assert_null(lb_dirty_choose(&err));
        assert_int_equal(err.code, LB_E_UNSUPPORTED);
        assert_non_null(strstr(err.message, other));
    }
    unsetenv("LIFEBOAT_DIRTY_LOG");
}

/* Written pages, and only those; once; and again when written again. */
static void exact_set(struct fixture *f, unsigned block, enum op op)
{
    populate_all(f);
    enable(f);
    next_stop(f);
    expect_none(f, clean(f, block), block);
    for (unsigned round = 0; round < 3; round++) {
        const uint64_t *pages = scattered + round;
        size_t n = N_SCATTERED - 2 * round;
        tell_list(f, op, block, pages, (unsigned)n);
        next_stop(f);
        expect_pages(f, clean(f, block), block, pages, n);
        next_stop(f);
        expect_none(f, clean(f, block), block);
    }
    disable(f);
}

static void exact_anonymous(void **state)
{
    exact_set(*state, ANON, OP_WRITE);
}

static void exact_memfd(void **state)
{
    exact_set(*state, SHARED, OP_WRITE);
}

static uint64_t huge_bytes_of(struct fixture *f)
{
    char path[64], line[256];
    unsigned long from, to, bytes = 0, kb;
    bool mine = false;
    snprintf(path, sizeof(path), "/proc/%d/smaps", (int)f->child.pid);
    FILE *file = fopen(path, "re");
    assert_non_null(file);
    while (fgets(line, sizeof(line), file)) {
        if (sscanf(line, "%lx-%lx ", &from, &to) == 2)
            mine = from == f->child.hva[THP];
        else if (mine && sscanf(line, "AnonHugePages: %lu kB", &kb) == 1)
            bytes = kb << 10;
    }
    fclose(file);
    return bytes;
}

static void exact_huge(void **state)
{
    struct fixture *f = *state;
    populate_all(f);
    if (huge_bytes_of(f) == 0) {
        print_message("# this kernel gave no huge page\n");
        skip();
    }
    exact_set(f, THP, OP_WRITE);
    /* for the record: how many pages one write costs */
    const uint64_t page = 3 * HUGE_PAGES + 5;
    enable(f);
    tell(f, OP_WRITE, THP, page, 1);
    next_stop(f);
    print_message("# one write in a huge page: %u pages reported\n", (unsigned)lb_bitmap_count(clean(f, THP)));
    disable(f);
}

static void exact_buffered_read(void **state)
{
    if (!disk_path)
        skip();
    exact_set(*state, ANON, OP_BUFFERED);
}

static void exact_direct_anonymous(void **state)
{
    if (!disk_path)
        skip();
    exact_set(*state, ANON, OP_DIRECT);
}

static void exact_direct_memfd(void **state)
{
    if (!disk_path)
        skip();
    exact_set(*state, SHARED, OP_DIRECT);
}

static void exact_direct_huge(void **state)
{
    if (!disk_path)
        skip();
    exact_set(*state, THP, OP_DIRECT);
}

/* A write by another process into the child's memory, as process_vm_writev(2) and ptrace do. */
static void written_from_outside(void **state)
{
    struct fixture *f = *state;
    const uint64_t page = 77;
    char data[100];
    memset(data, 'x', sizeof(data));
    populate_all(f);
    enable(f);
    for (unsigned b = ANON; b <= SHARED; b++) {
        struct iovec here = {data, sizeof(data)};
        struct iovec there = {(void *)(f->child.hva[b] + page * LB_PAGE_SIZE), sizeof(data)};
        assert_int_equal(process_vm_writev(f->child.pid, &here, 1, &there, 1, 0), sizeof(data));
    }
    next_stop(f);
    expect_pages(f, clean(f, ANON), ANON, &page, 1);
    expect_pages(f, clean(f, SHARED), SHARED, &page, 1);
    disable(f);
}

static void peek_does_not_forget(void **state)
{
    struct fixture *f = *state;
    populate_all(f);
    enable(f);
    for (unsigned b = 0; b < N_TRACKED; b++) {
        expect_none(f, peek(f, b, 0, BLOCK_PAGES), b);
        tell_list(f, OP_WRITE, b, scattered, N_SCATTERED);
        for (unsigned again = 0; again < 2; again++)
            expect_pages(f, peek(f, b, 0, BLOCK_PAGES), b, scattered, N_SCATTERED);
    }
    /* bit 0 is the first page asked for, and nothing beyond the last is touched */
    const uint64_t inside[] = {63, 64, 65, 511};
    const struct lb_bitmap *part = peek(f, ANON, 63, 449);
    expect_pages_(part, ANON, inside, LB_ARRAY_LEN(inside), 63, __LINE__);
    next_stop(f);
    for (unsigned b = 0; b < N_TRACKED; b++)
        expect_pages(f, clean(f, b), b, scattered, N_SCATTERED);
    for (unsigned b = 0; b < N_TRACKED; b++)
        expect_none(f, peek(f, b, 0, BLOCK_PAGES), b);
    disable(f);
}

/* Pages nobody had touched when the log began: reading makes them no dirtier, writing does. */
static void unpopulated(void **state)
{
    struct fixture *f = *state;
    enable(f);
    for (unsigned b = ANON; b <= SHARED; b++) {
        next_stop(f);
        expect_none(f, clean(f, b), b);
        tell(f, OP_READ, b, 100, 50);
        next_stop(f);
        expect_none(f, clean(f, b), b);
        const uint64_t pages[] = {99, 100, 149, 150, 2000};
        tell_list(f, OP_WRITE, b, pages, LB_ARRAY_LEN(pages));
        next_stop(f);
        expect_pages(f, clean(f, b), b, pages, LB_ARRAY_LEN(pages));
        next_stop(f);
        expect_none(f, clean(f, b), b);
    }
    const uint64_t page = 700;
    tell(f, OP_WRITE, THP, page, 1);
    next_stop(f);
    expect_pages(f, clean(f, THP), THP, &page, 1);
    disable(f);
}

static void two_blocks(void **state)
{
    struct fixture *f = *state;
    const uint64_t first[] = {3, 5}, second[] = {4, 2047}, late[] = {9};
    populate_all(f);
    enable(f);
    tell_list(f, OP_WRITE, ANON, first, 2);
    tell_list(f, OP_WRITE, SHARED, second, 2);
    next_stop(f);
    expect_pages(f, clean(f, ANON), ANON, first, 2);
    expect_pages(f, clean(f, SHARED), SHARED, second, 2);
    expect_none(f, clean(f, THP), THP);

    /* a block left out at one stop keeps its pages for the next */
    tell_list(f, OP_WRITE, ANON, first, 2);
    tell_list(f, OP_WRITE, SHARED, second, 2);
    next_stop(f);
    expect_pages(f, clean(f, ANON), ANON, first, 2);
    tell_list(f, OP_WRITE, SHARED, late, 1);
    next_stop(f);
    expect_none(f, clean(f, ANON), ANON);
    const uint64_t both[] = {4, 2047, 9};
    expect_pages(f, clean(f, SHARED), SHARED, both, 3);
    disable(f);
}

/* QEMU itself writes guest memory while it is stopped (saving a device may): no later clean may miss it. */
static void written_while_stopped(void **state)
{
    struct fixture *f = *state;
    const uint64_t page = 42;
    populate_all(f);
    enable(f);
    tell(f, OP_WRITE, ANON, page, 1); /* same stop as enable */
    if (!lb_bitmap_test(clean(f, ANON), page))
        fail_msg("written after enable, missing from a clean in the same stop");
    for (unsigned b = ANON; b <= SHARED; b++) {
        next_stop(f);
        clean(f, ANON);
        clean(f, SHARED);
        tell(f, OP_WRITE, b, page, 1);
        if (!lb_bitmap_test(clean(f, b), page))
            fail_msg("%s: written between two cleans of one stop, missing from the second", block_name[b]);
        tell(f, OP_WRITE, b, page + 1, 1);
        next_stop(f);
        if (!lb_bitmap_test(clean(f, b), page + 1))
            fail_msg("%s: written after the last clean of a stop, missing from the next stop", block_name[b]);
    }
    disable(f);
}

/* A balloon or free page reporting gives a page back: its contents change to zeros without a write. */
static void discarded(void **state)
{
    struct fixture *f = *state;
    const uint64_t pages[] = {200, 201};
    populate_all(f);
    enable(f);
    next_stop(f);
    expect_none(f, clean(f, ANON), ANON);
    tell_list(f, OP_DISCARD, ANON, pages, 2);
    next_stop(f);
    expect_pages(f, clean(f, ANON), ANON, pages, 2);
    /* written, then given back, within one round */
    const uint64_t more[] = {300, 301};
    tell_list(f, OP_WRITE, ANON, more, 2);
    tell_list(f, OP_DISCARD, ANON, more, 2);
    next_stop(f);
    const struct lb_bitmap *got = clean(f, ANON);
    assert_true(lb_bitmap_test(got, more[0]) && lb_bitmap_test(got, more[1]));
    disable(f);
}

/* A fork (QEMU starts helpers) write-protects all memory: tracking goes on. */
static void after_a_fork(void **state)
{
    struct fixture *f = *state;
    populate_all(f);
    enable(f);
    tell_list(f, OP_WRITE, ANON, scattered, 3);
    tell(f, OP_FORK, 0, 0, 0);
    tell_list(f, OP_WRITE, ANON, scattered + 3, N_SCATTERED - 3);
    next_stop(f);
    const struct lb_bitmap *got = clean(f, ANON);
    for (unsigned i = 0; i < N_SCATTERED; i++)
        assert_true(lb_bitmap_test(got, scattered[i]));
    next_stop(f);
    tell_list(f, OP_WRITE, SHARED, scattered, N_SCATTERED);
    next_stop(f);
    expect_pages(f, clean(f, SHARED), SHARED, scattered, N_SCATTERED);
    disable(f);
}

static void enable_again(void **state)
{
    struct fixture *f = *state;
    const uint64_t page = 5;
    populate_all(f);
    for (unsigned i = 0; i < 3; i++) {
        enable(f);
        next_stop(f);
        expect_none(f, clean(f, ANON), ANON);
        tell(f, OP_WRITE, ANON, page, 1);
        next_stop(f);
        expect_pages(f, clean(f, ANON), ANON, &page, 1);
        tell(f, OP_WRITE, ANON, 0, 10); /* not handed out: the next log does not begin with it */
        disable(f);
        tell(f, OP_WRITE, ANON, 20, 10);
    }
}

/* Pre-copy as it is: the child works at random, is stopped, the log is read, the pages are copied while it works on.
 * In the end the copy is equal. */
static void whole_precopy(void **state)
{
    struct fixture *f = *state;
    enum { ROUNDS = 60 };
    char *copy[N_TRACKED], *now = lb_alloc(BLOCK_BYTES);
    struct lb_bitmap dirty[N_TRACKED];
    uint64_t copied = 0;
    populate_all(f);
    enable(f);
    for (unsigned b = 0; b < N_TRACKED; b++) {
        copy[b] = lb_alloc(BLOCK_BYTES);
        assert_int_equal(lb_bitmap_init(&dirty[b], BLOCK_PAGES, NULL), 0);
        lb_bitmap_set_all(&dirty[b]);
    }
    *f->child.run = 1;
    struct order run = {.op = OP_RUN};
    assert_int_equal(write(f->child.sock, &run, sizeof(run)), sizeof(run));
    for (unsigned round = 0; round <= ROUNDS; round++) {
        for (unsigned b = 0; b < N_TRACKED; b++) {
            uint64_t at = 0, first, n;
            while (lb_bitmap_next_run(&dirty[b], at, UINT64_MAX, &first, &n)) {
                struct iovec here = {copy[b] + first * LB_PAGE_SIZE, n * LB_PAGE_SIZE};
                struct iovec there = {(void *)(f->child.hva[b] + first * LB_PAGE_SIZE), n * LB_PAGE_SIZE};
                assert_int_equal(process_vm_readv(f->child.pid, &here, 1, &there, 1, 0), n * LB_PAGE_SIZE);
                copied += n;
                at = first + n;
            }
        }
        if (round == ROUNDS)
            break;
        int status;
        usleep(2000);
        assert_int_equal(kill(f->child.pid, SIGSTOP), 0);
        assert_int_equal(waitpid(f->child.pid, &status, WUNTRACED), f->child.pid);
        assert_true(WIFSTOPPED(status));
        f->vm->stop_count++;
        for (unsigned b = 0; b < N_TRACKED; b++) {
            lb_bitmap_clear_all(&dirty[b]);
            assert_int_equal(ops->clean(f->vm, &f->vm->blocks[b], &dirty[b], NULL), 0);
        }
        if (round < ROUNDS - 1)
            assert_int_equal(kill(f->child.pid, SIGCONT), 0);
    }
    for (unsigned b = 0; b < N_TRACKED; b++) {
        struct iovec here = {now, BLOCK_BYTES}, there = {(void *)f->child.hva[b], BLOCK_BYTES};
        assert_int_equal(process_vm_readv(f->child.pid, &here, 1, &there, 1, 0), BLOCK_BYTES);
        for (uint64_t p = 0; p < BLOCK_PAGES; p++)
            if (memcmp(now + p * LB_PAGE_SIZE, copy[b] + p * LB_PAGE_SIZE, LB_PAGE_SIZE) != 0)
                fail_msg("%s: page %u of the copy is stale", block_name[b], (unsigned)p);
        free(copy[b]);
        lb_bitmap_free(&dirty[b]);
    }
    *f->child.run = 0;
    int rc = -1;
    kill(f->child.pid, SIGCONT);
    assert_int_equal(read(f->child.sock, &rc, sizeof(rc)), sizeof(rc));
    assert_int_equal(rc, 0);
    print_message("# %u rounds, %u pages copied\n", ROUNDS, (unsigned)copied);
    assert_true(copied > N_TRACKED * BLOCK_PAGES); /* more than the first round: it did work meanwhile */
    free(now);
    disable(f);
}

/* Memory in huge pages of hugetlbfs: either every write is logged or enabling is refused; silence is a lost page. */
static void hugetlb(void **state)
{
    struct fixture *f = *state;
    struct lb_error err = LB_ERROR_INIT;
    /* in this process: it only has to be written and looked at */
    char *at = mmap(NULL, HUGE_BYTES, PROT_READ | PROT_WRITE,
                    MAP_SHARED | MAP_ANONYMOUS | MAP_HUGETLB | (21 << MAP_HUGE_SHIFT), -1, 0);
    if (at == MAP_FAILED) {
        print_message("# no huge page is reserved here\n");
        skip();
    }
    at[0] = 1;
    struct lb_hv_vm *vm = lb_qemu_vm_new("self");
    vm->pagemap_fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    assert_int_equal(lb_proc_identify(getpid(), &vm->proc, NULL), 0);
    vm->n_blocks = 1;
    vm->blocks = lb_alloc(sizeof(*vm->blocks));
    vm->blocks[0] = f->vm->blocks[SHARED];
    vm->blocks[0].pub.id = 0;
    vm->blocks[0].pub.hva = (uintptr_t)at;
    vm->blocks[0].pub.size_bytes = HUGE_BYTES;
    vm->blocks[0].pub.track_bytes = HUGE_BYTES;
    vm->blocks[0].pub.backing = LB_BACK_HUGETLB;
    vm->stop_count = 1;
    if (ops->enable(vm, &err) < 0) {
        assert_int_equal(err.code, LB_E_UNSUPPORTED);
        print_message("# refused: %s\n", err.message);
    } else {
        struct lb_bitmap got;
        assert_int_equal(lb_bitmap_init(&got, HUGE_PAGES, NULL), 0);
        at[12345] = 2;
        vm->stop_count++;
        assert_int_equal(ops->clean(vm, &vm->blocks[0], &got, &err), 0);
        assert_true(lb_bitmap_test(&got, 12345 / LB_PAGE_SIZE));
        lb_bitmap_free(&got);
        ops->disable(vm);
    }
    lb_qemu_vm_free(vm);
    munmap(at, HUGE_BYTES);
}

static void child_dies(void **state)
{
    struct fixture *f = *state;
    struct lb_error err = LB_ERROR_INIT;
    populate_all(f);
    enable(f);
    tell(f, OP_WRITE, ANON, 0, 10);
    kill(f->child.pid, SIGKILL);
    siginfo_t info;
    assert_int_equal(waitid(P_PID, (id_t)f->child.pid, &info, WEXITED | WNOWAIT), 0);
    next_stop(f);
    assert_int_equal(ops->clean(f->vm, &f->vm->blocks[ANON], &f->dirty, &err), -1);
    assert_int_equal(err.code, LB_E_HV);
    disable(f);
}

int main(int argc, char **argv)
{
    if (argc < 2 || argc > 3) {
        fprintf(stderr, "usage: test_softdirty soft-dirty|uffd [DISK]\n");
        return 2;
    }
    ops = strcmp(argv[1], "uffd") == 0 ? &lb_dirty_uffd : &lb_dirty_softdirty;
    disk_path = argc > 2 ? argv[2] : NULL;
    signal(SIGPIPE, SIG_IGN);
    cmocka_set_message_output(CM_OUTPUT_TAP);
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(kernel_chooses),
        TEST(exact_anonymous),
        TEST(exact_memfd),
        TEST(exact_huge),
        TEST(exact_buffered_read),
        TEST(exact_direct_anonymous),
        TEST(exact_direct_memfd),
        TEST(exact_direct_huge),
        TEST(written_from_outside),
        TEST(peek_does_not_forget),
        TEST(unpopulated),
        TEST(two_blocks),
        TEST(written_while_stopped),
        TEST(discarded),
        TEST(after_a_fork),
        TEST(enable_again),
        TEST(whole_precopy),
        TEST(hugetlb),
        TEST(child_dies),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
