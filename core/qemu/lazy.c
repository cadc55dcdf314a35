/*
 * core/qemu/lazy.c - memory that comes when it is touched (userfaultfd, missing pages).
 *
 * The descriptor must be of QEMU's address space and must see the faults of the kernel too (block
 * and network devices, KVM, vhost), which an unprivileged QEMU may not ask for:
 *
 *     we (root)                              QEMU
 *     open /dev/userfaultfd = D  --getfd-->  D
 *                                            ioctl(D, USERFAULTFD_IOC_NEW) = U    injected
 *     pidfd_getfd(U)             <---------  U stays open
 *     watch main memory, then empty it
 *     read who waits, place pages
 *     watch no more                          close(U)                            injected
 *
 * U stays open in QEMU because the last one who closes it ends the watch: whoever waits would then
 * read zeros.  As it is, our death makes the guest wait, and the next process takes U again.
 *
 * That process cannot ask QEMU anything: its main thread may be among those who wait.  So what
 * is needed is written down in RUN_DIR/lazy: the number of U, and where the blocks are.  The file
 * counts only together with the process it names.  It goes before U is closed there; who finds it
 * finds U.
 *
 * Watched first and emptied second: a page that QEMU touches between the two is dropped with the
 * rest, the other way round it would stay, and hide the one that is to come.
 *
 * A page that is only offered goes into the file behind the memory (memfd), by a userfaultfd of our own view of it, which
 * like U places whole pages at once.  Whoever touches it in QEMU finds it there without asking, but not in QEMU's page
 * table before: so what is in that table was touched.  The kernel would map the neighbours of such a page along with it;
 * it does not where memory is registered for write protection, of which no use is made.
 *
 * A page that the guest gives back (balloon) while memory is lazy is missing again and comes back as
 * it was: allowed for a balloon.  Free page reporting and virtio-mem rely on zeros, and are refused.
 */
#include "core/qemu/qemu_internal.h"
#include "core/qemu/pm_defs.h"

#include <assert.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <sched.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <linux/userfaultfd.h>

#define DEVICE "/dev/userfaultfd"
#define OURS "anon_inode:[userfaultfd]"
#define FD_NAME "lb-uffd"
#define RECORD_MAX (1u << 20)

static bool is_lazy(const struct lb_qemu_block *b)
{
    return b->pub.kind == LB_RAM_MAIN;
}

/* ------------------------------------------------------------------ record */

static char *record_path(const char *qmp_path)
{
    const char *slash = strrchr(qmp_path, '/');
    return slash ? lb_asprintf("%.*s/%s", (int)(slash - qmp_path), qmp_path, LB_QEMU_LAZY_FILE)
                 : lb_strdup(LB_QEMU_LAZY_FILE);
}

/* Not synced: it is of no use to another boot of the host. The directory is that of QEMU's user: a
 * link there is not followed. */
static int write_record(struct lb_hv_vm *vm, struct lb_error *err)
{
    unlink(vm->lazy_path);
    LB_AUTO_FD int fd = open(vm->lazy_path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    LB_AUTO_FILE FILE *f = fd < 0 ? NULL : fdopen(fd, "w");
    if (!f)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot write %s", vm->lazy_path);
    fd = -1; /* f has it */
    fprintf(f, "%d %" PRIu64 " %d %u\n", (int)vm->proc.pid, vm->proc.start_ticks, vm->lazy_remote_fd,
            vm->n_blocks);
    for (unsigned i = 0; i < vm->n_blocks; i++) {
        const struct lb_qemu_block *b = &vm->blocks[i];
        fprintf(f, "%d %d %" PRIx64 " %" PRIx64 " %" PRIx64 " %s\n", (int)b->pub.kind, b->read_only,
                b->pub.hva, b->pub.size_bytes, b->total_bytes, b->pub.name);
    }
    if (fflush(f) != 0)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot write %s", vm->lazy_path);
    return 0;
}

static int parse_block(const char *line, unsigned id, struct lb_qemu_block *b)
{
    int kind, ro;
    *b = (struct lb_qemu_block){.map_fd = -1};
    if (sscanf(line, "%d %d %" SCNx64 " %" SCNx64 " %" SCNx64 " %255[^\n]", &kind, &ro, &b->pub.hva,
               &b->pub.size_bytes, &b->total_bytes, b->pub.name) != 6 ||
        kind < LB_RAM_MAIN || kind > LB_RAM_ROM || b->pub.size_bytes % LB_PAGE_SIZE)
        return -1;
    b->pub.id = id;
    b->pub.kind = (enum lb_ram_kind)kind;
    b->pub.track_bytes = LB_PAGE_SIZE;
    b->read_only = ro;
    return 0;
}

/* Fills lazy_remote_fd and blocks. */
static int read_record(struct lb_hv_vm *vm, struct lb_error *err)
{
    LB_AUTO_FREE char *text = NULL;
    if (lb_file_read(vm->lazy_path, RECORD_MAX, &text, NULL, err) < 0)
        return -1;
    int pid;
    uint64_t ticks;
    unsigned n;
    if (sscanf(text, "%d %" SCNu64 " %d %u", &pid, &ticks, &vm->lazy_remote_fd, &n) != 4 ||
        pid != (int)vm->proc.pid || ticks != vm->proc.start_ticks || n > LB_QEMU_MAX_BLOCKS)
        return lb_fail(err, LB_E_NOT_FOUND, "%s is not about process %d", vm->lazy_path,
                       (int)vm->proc.pid);
    vm->blocks = lb_alloc(LB_MAX(n, 1) * sizeof(*vm->blocks));
    const char *line = text;
    for (; vm->n_blocks < n; vm->n_blocks++) {
        line = strchr(line, '\n');
        if (!line || parse_block(++line, vm->n_blocks, &vm->blocks[vm->n_blocks]) < 0)
            return lb_fail(err, LB_E_NOT_FOUND, "%s was cut short", vm->lazy_path);
    }
    return 0;
}

/* ------------------------------------------------------------------- begin */

static int fail_option(struct lb_error *err, const char *what)
{
    lb_fail(err, LB_E_UNSUPPORTED, "%s expects zeros where it gave memory back, so memory cannot be "
                                   "filled while the guest runs", what);
    return lb_remedy(err, "resume it with --eager");
}

static int check_options(const struct lb_hv_vm *vm, struct lb_error *err)
{
    char **argv = NULL;
    int rc = 0;
    if (lb_proc_cmdline(vm->proc.pid, &argv, err) < 0)
        return -1;
    for (unsigned i = 0; rc == 0 && argv[i]; i++) {
        if (strstr(argv[i], "free-page-reporting=on") || strstr(argv[i], "\"free-page-reporting\":true"))
            rc = fail_option(err, "free page reporting");
        else if (strstr(argv[i], "virtio-mem"))
            rc = fail_option(err, "virtio-mem");
    }
    lb_strv_free(argv);
    return rc;
}

static int check_blocks(const struct lb_hv_vm *vm, struct lb_error *err)
{
    for (unsigned i = 0; i < vm->n_blocks; i++) {
        const struct lb_qemu_block *b = &vm->blocks[i];
        if (!is_lazy(b) || (b->pub.backing != LB_BACK_HUGETLB && !b->file_private))
            continue;
        lb_fail(err, LB_E_UNSUPPORTED, "memory block %s is %s, which cannot be filled page by page",
                b->pub.name, b->file_private ? "a private view of a file" : "of huge pages");
        return lb_remedy(err, "resume it with --eager");
    }
    return 0;
}

/* Number of the descriptor of DEVICE in QEMU, whoever opened it; -1. */
static int find_device(pid_t pid)
{
    char dir[64], link[64];
    int found = -1;
    snprintf(dir, sizeof(dir), "/proc/%d/fd", (int)pid);
    DIR *d = opendir(dir);
    if (!d)
        return -1;
    for (struct dirent *e; found < 0 && (e = readdir(d));) {
        ssize_t n = readlinkat(dirfd(d), e->d_name, link, sizeof(link) - 1);
        if (n > 0 && (link[n] = 0, strcmp(link, DEVICE) == 0))
            found = atoi(e->d_name);
    }
    closedir(d);
    return found;
}

struct make {
    int pidfd, device;
    int remote, fd; /* the new one: its number in QEMU, and ours */
};

static int make_uffd(struct lb_injector *in, void *arg, struct lb_error *err)
{
    struct make *m = arg;
    uint64_t args[6] = {(uint64_t)m->device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK};
    long rc;
    if (lb_inject_syscall(in, SYS_ioctl, args, &rc, err) < 0)
        return -1;
    if (rc < 0)
        return lb_fail_errno(err, LB_E_UNSUPPORTED, (int)-rc, "QEMU may not make a userfaultfd");
    m->remote = (int)rc;
    m->fd = (int)syscall(SYS_pidfd_getfd, m->pidfd, m->remote, 0);
    if (m->fd >= 0)
        return 0;
    int e = errno;
    uint64_t shut[6] = {(uint64_t)m->remote};
    lb_inject_syscall(in, SYS_close, shut, &rc, NULL);
    return lb_fail_errno(err, LB_E_HV, e, "cannot take a descriptor out of QEMU");
}

static int close_remote(struct lb_injector *in, void *arg, struct lb_error *err)
{
    uint64_t args[6] = {(uint64_t)*(const int *)arg};
    long rc;
    return lb_inject_syscall(in, SYS_close, args, &rc, err);
}

static int take_uffd(struct lb_hv_vm *vm, struct lb_error *err)
{
    LB_AUTO_FD int dev = open(DEVICE, O_RDWR | O_CLOEXEC);
    if (dev < 0) {
        lb_fail_errno(err, LB_E_UNSUPPORTED, errno, "cannot open %s", DEVICE);
        return lb_remedy(err, "filling memory while the guest runs needs root and Linux 6.1 or newer with "
                              "userfaultfd; --eager needs neither");
    }
    if (lb_qmp_send(vm->qmp, "getfd", "{\"fdname\":\"" FD_NAME "\"}", dev, NULL, err) < 0 ||
        lb_qmp_wait(vm->qmp, "getfd", LB_QMP_MS, NULL, err) < 0)
        return -1;
    struct make m = {.pidfd = vm->pidfd, .device = find_device(vm->proc.pid), .fd = -1};
    int rc = m.device < 0 ? lb_fail(err, LB_E_HV, "QEMU did not keep the descriptor it was given")
                          : lb_inject(vm->proc.pid, make_uffd, &m, err);
    int closed = lb_qmp_cmd(vm->qmp, "closefd", "{\"fdname\":\"" FD_NAME "\"}", NULL, rc < 0 ? NULL : err);
    vm->lazy_uffd = m.fd;
    vm->lazy_remote_fd = m.remote;
    return rc < 0 ? rc : closed;
}

/* Is a page of it in QEMU's page table only when it was touched? */
static bool is_offered(const struct lb_qemu_block *b)
{
    return is_lazy(b) && b->pub.map;
}

static int say_api(int uffd, uint64_t features)
{
    struct uffdio_api api = {.api = UFFD_API, .features = features};
    return ioctl(uffd, UFFDIO_API, &api);
}

/* Without it there is no learning, nothing else. */
static void watch_views(struct lb_hv_vm *vm)
{
    LB_AUTO_FD int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | LB_UFFD_USER_MODE_ONLY);
    if (fd < 0 || say_api(fd, UFFD_FEATURE_MISSING_SHMEM) < 0)
        return;
    for (unsigned i = 0; i < vm->n_blocks; i++) {
        const struct lb_qemu_block *b = &vm->blocks[i];
        struct uffdio_register reg = {.range = {.start = (uintptr_t)b->pub.map, .len = b->pub.size_bytes},
                                      .mode = UFFDIO_REGISTER_MODE_MISSING};
        if (is_offered(b) && ioctl(fd, UFFDIO_REGISTER, &reg) < 0)
            return;
    }
    vm->lazy_view_uffd = LB_STEAL_FD(fd);
}

static int watch(struct lb_hv_vm *vm, struct lb_error *err)
{
    bool alone = say_api(vm->lazy_uffd, UFFD_FEATURE_MISSING_SHMEM | LB_UFFD_FEATURE_PAGEFAULT_FLAG_WP |
                                            LB_UFFD_FEATURE_WP_HUGETLBFS_SHMEM) == 0;
    if (!alone && say_api(vm->lazy_uffd, UFFD_FEATURE_MISSING_SHMEM) < 0)
        return lb_fail_errno(err, LB_E_UNSUPPORTED, errno, "this kernel's userfaultfd is too old");
    for (unsigned i = 0; i < vm->n_blocks; i++) {
        const struct lb_qemu_block *b = &vm->blocks[i];
        struct uffdio_register reg = {.range = {.start = b->pub.hva, .len = b->pub.size_bytes},
                                      .mode = UFFDIO_REGISTER_MODE_MISSING};
        if (alone && is_offered(b))
            reg.mode |= UFFDIO_REGISTER_MODE_WP;
        if (is_lazy(b) && ioctl(vm->lazy_uffd, UFFDIO_REGISTER, &reg) < 0) {
            int e = errno;
            lb_fail_errno(err, LB_E_UNSUPPORTED, e, "cannot watch memory block %s", b->pub.name);
            return lb_remedy(err, e == EBUSY ? "another program tracks this VM's memory: end it" : "");
        }
    }
    if (alone)
        watch_views(vm);
    return 0;
}

/* Our own view would make a missing page a page of zeros, unseen by the guest: nobody gets it. */
static void hide_maps(struct lb_hv_vm *vm, bool hide)
{
    for (unsigned i = 0; i < vm->n_blocks; i++)
        if (is_lazy(&vm->blocks[i]))
            vm->table[i].map = hide ? NULL : vm->blocks[i].pub.map;
}

/* Everybody goes on, and what is missing is zeros from now on. */
static void unwatch(struct lb_hv_vm *vm)
{
    for (unsigned i = 0; i < vm->n_blocks; i++) {
        const struct lb_qemu_block *b = &vm->blocks[i];
        struct uffdio_range r = {.start = b->pub.hva, .len = b->pub.size_bytes};
        if (is_lazy(b))
            ioctl(vm->lazy_uffd, UFFDIO_UNREGISTER, &r); /* fails only when it was not watched */
    }
    close(LB_STEAL_FD(vm->lazy_uffd));
    lb_cleanup_fd(&vm->lazy_view_uffd);
    vm->lazy_view_uffd = -1;
    unlink(vm->lazy_path);
    struct lb_error why = LB_ERROR_INIT;
    if (lb_inject(vm->proc.pid, close_remote, &vm->lazy_remote_fd, &why) < 0)
        lb_log_error(LB_LOG_WARN, &why); /* it keeps a descriptor of no use */
    hide_maps(vm, false);
}

int lb_qemu_lazy_begin(struct lb_hv_vm *vm, struct lb_error *err)
{
    assert(vm->run_dir && vm->lazy_uffd < 0);
    if (check_options(vm, err) < 0 || check_blocks(vm, err) < 0)
        return -1;
    free(vm->lazy_path);
    vm->lazy_path = record_path(vm->qmp_path);
    int rc = take_uffd(vm, err);
    if (rc == 0)
        rc = watch(vm, err);
    if (rc == 0)
        rc = write_record(vm, err);
    for (unsigned i = 0; rc == 0 && i < vm->n_blocks; i++)
        if (is_lazy(&vm->blocks[i]))
            rc = lb_qemu_empty_block(vm, &vm->blocks[i], err);
    if (rc == 0)
        hide_maps(vm, true);
    else if (vm->lazy_uffd >= 0)
        unwatch(vm);
    return rc;
}

/* ------------------------------------------------------------------ attach */

/* QEMU's descriptor, if it still is one. */
static int take_again(struct lb_hv_vm *vm, struct lb_error *err)
{
    char path[64], link[64];
    snprintf(path, sizeof(path), "/proc/%d/fd/%d", (int)vm->proc.pid, vm->lazy_remote_fd);
    ssize_t n = readlink(path, link, sizeof(link) - 1);
    if (n < 0 || (link[n] = 0, strcmp(link, OURS) != 0))
        return lb_fail(err, LB_E_NOT_FOUND, "QEMU has no userfaultfd of ours");
    vm->lazy_uffd = (int)syscall(SYS_pidfd_getfd, vm->pidfd, vm->lazy_remote_fd, 0);
    if (vm->lazy_uffd < 0)
        return lb_fail_errno(err, LB_E_HV, errno, "cannot take a descriptor out of QEMU");
    return 0;
}

static void wake(struct lb_hv_vm *vm, const struct lb_qemu_block *b, uint64_t first, uint64_t n)
{
    struct uffdio_range r = {.start = b->pub.hva + first * LB_PAGE_SIZE, .len = n * LB_PAGE_SIZE};
    ioctl(vm->lazy_uffd, UFFDIO_WAKE, &r);
}

int lb_qemu_lazy_attach(const struct lb_vm_ident *ident, struct lb_hv_vm **out, struct lb_error *err)
{
    struct lb_hv_vm *vm = lb_qemu_vm_new(ident->name);
    struct lb_error why = LB_ERROR_INIT;
    vm->proc = ident->proc;
    vm->qmp_path = lb_strdup(ident->qmp_path);
    vm->lazy_path = record_path(ident->qmp_path ? ident->qmp_path : "");
    vm->pidfd = lb_proc_open(&ident->proc, &why);
    if (vm->pidfd < 0 || read_record(vm, &why) < 0 || take_again(vm, &why) < 0 ||
        lb_qemu_open_pagemap(vm, &why) < 0 || lb_qemu_locate_blocks(vm, &why) < 0) {
        lb_context(&why, "no memory of VM %s is missing", ident->name);
        lb_qemu_vm_free(vm);
        if (err)
            *err = why;
        return -1;
    }
    hide_maps(vm, true);
    /* who waits for a page that the other process was to place asks once more */
    for (unsigned i = 0; i < vm->n_blocks; i++)
        if (is_lazy(&vm->blocks[i]))
            wake(vm, &vm->blocks[i], 0, vm->blocks[i].pub.size_bytes / LB_PAGE_SIZE);
    *out = vm;
    return 0;
}

/* ------------------------------------------------------------------ faults */

static bool find_page(struct lb_hv_vm *vm, uint64_t addr, const struct lb_ram_block **blk,
                      uint64_t *page)
{
    for (unsigned i = 0; i < vm->n_blocks; i++) {
        const struct lb_ram_block *b = &vm->table[i];
        if (is_lazy(&vm->blocks[i]) && addr >= b->hva && addr - b->hva < b->size_bytes) {
            *blk = b;
            *page = (addr - b->hva) / LB_PAGE_SIZE;
            return true;
        }
    }
    return false;
}

int lb_qemu_lazy_fault(struct lb_hv_vm *vm, unsigned timeout_ms, const struct lb_ram_block **blk,
                       uint64_t *page, struct lb_error *err)
{
    uint64_t deadline = lb_now_ns() + timeout_ms * UINT64_C(1000000);
    for (;;) {
        struct uffd_msg m;
        ssize_t n = read(vm->lazy_uffd, &m, sizeof(m));
        if (n == sizeof(m)) {
            if (m.event == UFFD_EVENT_PAGEFAULT && find_page(vm, m.arg.pagefault.address, blk, page))
                return 1;
            continue;
        }
        if (n < 0 && errno != EAGAIN && errno != EINTR)
            return lb_fail_errno(err, LB_E_HV, errno, "cannot read who waits for memory");
        uint64_t now = lb_now_ns();
        if (now >= deadline)
            return 0;
        struct pollfd p[2] = {{.fd = vm->lazy_uffd, .events = POLLIN},
                              {.fd = vm->pidfd, .events = POLLIN}};
        if (poll(p, 2, (int)((deadline - now + 999999) / 1000000)) > 0 && p[1].revents)
            return lb_fail(err, LB_E_HV, "QEMU (process %d) died while its memory was being filled",
                           (int)vm->proc.pid);
    }
}

/* ----------------------------------------------------------------- placing */

/* One call; bytes placed, or -errno. */
static int64_t place_once(int uffd, uint64_t at, uint64_t len, const char *buf)
{
    struct uffdio_copy c = {.dst = at, .src = (uintptr_t)buf, .len = len};
    struct uffdio_zeropage z = {.range = {.start = at, .len = len}};
    int rc = buf ? ioctl(uffd, UFFDIO_COPY, &c) : ioctl(uffd, UFFDIO_ZEROPAGE, &z);
    int64_t done = buf ? c.copy : z.zeropage;
    return rc < 0 && done == 0 ? -errno : done;
}

static int fail_place(struct lb_hv_vm *vm, const struct lb_qemu_block *b, int e, struct lb_error *err)
{
    if (e == ESRCH || lb_qemu_dead(vm->pidfd))
        return lb_fail(err, LB_E_HV, "QEMU (process %d) died while its memory was being filled",
                       (int)vm->proc.pid);
    lb_fail_errno(err, e == ENOMEM ? LB_E_NO_SPACE : LB_E_HV, e, "cannot place pages of block %s",
                  b->pub.name);
    return e == ENOMEM ? lb_remedy(err, "free memory on this host: the guest waits for it") : -1;
}

/* offer: through our own mapping, waking nobody. *placed: pages that were missing. */
static int place_pages(struct lb_hv_vm *vm, const struct lb_qemu_block *b, bool offer, uint64_t first, uint64_t n,
                       const char *buf, uint64_t *placed, struct lb_error *err)
{
    int uffd = offer ? vm->lazy_view_uffd : vm->lazy_uffd;
    uint64_t base = offer ? (uintptr_t)b->pub.map : b->pub.hva;
    *placed = 0;
    for (uint64_t done = 0; done < n;) {
        int64_t r = place_once(uffd, base + (first + done) * LB_PAGE_SIZE, (n - done) * LB_PAGE_SIZE,
                               buf ? buf + done * LB_PAGE_SIZE : NULL);
        if (r > 0) {
            done += (uint64_t)r / LB_PAGE_SIZE;
            *placed += (uint64_t)r / LB_PAGE_SIZE;
        } else if (r == -EEXIST) {
            if (!offer)
                wake(vm, b, first + done, 1); /* may have come another way than by placing */
            done++;
        } else if (r == -EAGAIN) {
            sched_yield(); /* the mappings are being changed */
        } else {
            return fail_place(vm, b, (int)-r, err);
        }
    }
    return 0;
}

int lb_qemu_lazy_place(struct lb_hv_vm *vm, const struct lb_ram_block *blk, uint64_t first, uint64_t n,
                       const void *buf, uint64_t *placed, struct lb_error *err)
{
    const struct lb_qemu_block *b = lb_qemu_block(vm, blk);
    uint64_t count;
    assert(is_lazy(b));
    return place_pages(vm, b, false, first, n, buf, placed ? placed : &count, err);
}

int lb_qemu_lazy_offer(struct lb_hv_vm *vm, const struct lb_ram_block *blk, uint64_t first, uint64_t n,
                       const void *buf, struct lb_error *err)
{
    const struct lb_qemu_block *b = lb_qemu_block(vm, blk);
    uint64_t count;
    assert(is_lazy(b));
    return place_pages(vm, b, vm->lazy_view_uffd >= 0 && is_offered(b), first, n, buf, &count, err);
}

struct touched {
    uint64_t hva;
    struct lb_bitmap *pages;
};

static void on_touched(uint64_t start, uint64_t end, void *arg)
{
    const struct touched *t = arg;
    lb_bitmap_set_range(t->pages, (start - t->hva) / LB_PAGE_SIZE, (end - start) / LB_PAGE_SIZE);
}

int lb_qemu_lazy_touched(struct lb_hv_vm *vm, const struct lb_ram_block *blk, struct lb_bitmap *pages,
                         struct lb_error *err)
{
    const struct lb_qemu_block *b = lb_qemu_block(vm, blk);
    const struct lb_pagemap_query present = {.mask = LB_PAGE_IS_PRESENT, .ret = LB_PAGE_IS_PRESENT};
    struct touched t = {.hva = b->pub.hva, .pages = pages};
    struct lb_error why = LB_ERROR_INIT;
    if (vm->lazy_view_uffd < 0 || !is_offered(b))
        return lb_fail(err, LB_E_UNSUPPORTED, "pages of block %s that were touched cannot be told", b->pub.name);
    if (lb_pagemap_scan(vm->pagemap_fd, &present, b->pub.hva, b->pub.hva + b->pub.size_bytes, on_touched, &t, &why) == 0)
        return 0;
    bool old = why.sys_errno == ENOTTY || why.sys_errno == EINVAL; /* Linux < 6.7 */
    return lb_fail_errno(err, old ? LB_E_UNSUPPORTED : why.code, why.sys_errno, "%s", why.message);
}

int lb_qemu_lazy_missing(struct lb_hv_vm *vm, const struct lb_ram_block *blk, struct lb_bitmap *pages,
                         struct lb_error *err)
{
    const struct lb_qemu_block *b = lb_qemu_block(vm, blk);
    struct lb_bitmap there = {0};
    if (!is_lazy(b))
        return 0;
    if (lb_bitmap_init(&there, pages->n_bits, err) < 0)
        return -1;
    int rc = lb_qemu_pages_there(vm, b, &there, err);
    uint64_t from = 0, first, n;
    for (; rc == 0 && lb_bitmap_next_run(&there, from, pages->n_bits, &first, &n); from = first + n)
        lb_bitmap_set_range(pages, from, first - from);
    if (rc == 0)
        lb_bitmap_set_range(pages, from, pages->n_bits - from);
    lb_bitmap_free(&there);
    return rc;
}

/* --------------------------------------------------------------------- end */

int lb_qemu_lazy_end(struct lb_hv_vm *vm, struct lb_error *err)
{
    if (lb_qemu_dead(vm->pidfd))
        return lb_fail(err, LB_E_HV, "QEMU (process %d) died while its memory was being filled",
                       (int)vm->proc.pid);
    if (vm->lazy_uffd >= 0)
        unwatch(vm);
    return lb_qemu_connect(vm, err);
}

/* The guest goes on waiting: QEMU's descriptor stays. */
void lb_qemu_lazy_close(struct lb_hv_vm *vm)
{
    lb_cleanup_fd(&vm->lazy_uffd);
    lb_cleanup_fd(&vm->lazy_view_uffd);
    vm->lazy_uffd = vm->lazy_view_uffd = -1;
    free(vm->lazy_path);
    vm->lazy_path = NULL;
}
