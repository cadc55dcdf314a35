/* Helpers of test_qemu_*.c: a stock QEMU started by hand, in a scratch folder. */
#ifndef QEMU_UTIL_H
#define QEMU_UTIL_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "core/hv.h"
#include "core/qemu/qemu.h"
#include "tests/lib/check.h"

/* bootsec.S */
static const unsigned char boot_code[] = {
    0xfa, 0x66, 0x31, 0xdb, 0x66, 0x43, 0xb8, 0x00, 0x20, 0x8e, 0xd8, 0x66,
    0x89, 0x1e, 0x00, 0x00, 0x05, 0x00, 0x01, 0x3d, 0x00, 0x40, 0x72, 0xf1,
    0x66, 0xb9, 0x20, 0x4e, 0x00, 0x00, 0x66, 0x49, 0x75, 0xfc, 0xeb, 0xe0,
};
#define BOOT_FIRST_PAGE 0x20u
#define BOOT_N_PAGES 32u

struct qemu {
    char dir[64];
    pid_t pid;
    char disk[96];
    char qmp[96];
};

static inline const char *qemu_bin(void)
{
    const char *b = getenv("LB_TEST_QEMU");
    return b ? b : "/usr/bin/qemu-system-x86_64";
}

static inline const char *guest_dir(void)
{
    const char *d = getenv("LB_GUEST");
    return d ? d : "build/guest";
}

static inline void qemu_dir(struct qemu *q)
{
    memset(q, 0, sizeof(*q));
    strcpy(q->dir, "/tmp/lbq.XXXXXX");
    assert_non_null(mkdtemp(q->dir));
    chmod(q->dir, 0755);
    snprintf(q->disk, sizeof(q->disk), "%s/disk.raw", q->dir);
    snprintf(q->qmp, sizeof(q->qmp), "%s/src.sock", q->dir);
    int fd = open(q->disk, O_RDWR | O_CREAT | O_TRUNC, 0666);
    assert_true(fd >= 0);
    fchmod(fd, 0666);
    assert_int_equal(ftruncate(fd, 1 << 20), 0);
    assert_int_equal(pwrite(fd, boot_code, sizeof(boot_code), 0), sizeof(boot_code));
    assert_int_equal(pwrite(fd, "\x55\xaa", 2, 510), 2);
    close(fd);
}

/* args: space-separated, after the common ones; @D is the scratch folder, a tab becomes a space. */
static inline void qemu_start_as(struct qemu *q, uid_t uid, const char *args)
{
    char *argv[64];
    int n = 0;
    char line[2048], *out = line;
    for (const char *p = args; *p; p++) {
        if (p[0] == '@' && p[1] == 'D') {
            out += sprintf(out, "%s", q->dir);
            p++;
        } else {
            *out++ = *p;
        }
    }
    *out = 0;
    argv[n++] = (char *)qemu_bin();
    for (char *t = strtok(line, " "); t; t = strtok(NULL, " ")) {
        argv[n++] = t;
        for (char *tab; (tab = strchr(t, '\t'));)
            *tab = ' ';
    }
    char qmp[160];
    snprintf(qmp, sizeof(qmp), "unix:%s,server=on,wait=off", q->qmp);
    argv[n++] = (char *)"-qmp";
    argv[n++] = qmp;
    argv[n] = NULL;
    q->pid = fork();
    assert_true(q->pid >= 0);
    if (q->pid == 0) {
        if (uid && (setgid(uid) < 0 || setuid(uid) < 0))
            _exit(1);
        prctl(PR_SET_PDEATHSIG, SIGKILL); /* a failed test leaves no QEMU */
        int null = open("/dev/null", O_RDWR);
        dup2(null, 0);
        dup2(null, 1);
        execv(argv[0], argv);
        _exit(127);
    }
    for (int i = 0; i < 500 && access(q->qmp, F_OK) != 0; i++)
        usleep(10000);
    assert_int_equal(waitpid(q->pid, NULL, WNOHANG), 0); /* did it start? */
}

static inline void qemu_start(struct qemu *q, const char *args)
{
    qemu_start_as(q, 0, args);
}

static inline void qemu_end(struct qemu *q)
{
    if (q->pid > 0) {
        kill(q->pid, SIGKILL);
        waitpid(q->pid, NULL, 0);
        q->pid = 0;
    }
    lb_remove_tree(q->dir, NULL);
}

static inline struct lb_hv_vm *qemu_attach(struct qemu *q)
{
    struct lb_hv_vm *vm = NULL;
    struct lb_vm_ident id = {.name = "t"};
    OK(lb_proc_identify(q->pid, &id.proc, err));
    OK(lb_hv_attach(&lb_hv_qemu, &id, &vm, err));
    return vm;
}

static inline const struct lb_ram_block *block_named(struct lb_hv_vm *vm, const char *name)
{
    const struct lb_ram_block *b;
    unsigned n;
    OK(lb_hv_blocks(vm, &b, &n, err));
    for (unsigned i = 0; i < n; i++)
        if (strcmp(b[i].name, name) == 0)
            return &b[i];
    return NULL;
}

static inline const struct lb_ram_block *main_block(struct lb_hv_vm *vm)
{
    const struct lb_ram_block *b;
    unsigned n;
    OK(lb_hv_blocks(vm, &b, &n, err));
    for (unsigned i = 0; i < n; i++)
        if (b[i].kind == LB_RAM_MAIN)
            return &b[i];
    fail_msg("no main memory");
    return NULL;
}

static inline uint32_t counter(struct lb_hv_vm *vm, unsigned page)
{
    static char buf[4096];
    uint32_t c;
    OK(lb_hv_read(vm, main_block(vm), BOOT_FIRST_PAGE + page, 1, buf, err));
    memcpy(&c, buf, 4);
    return c;
}

/* Wait until the boot sector runs. */
static inline void wait_guest(struct lb_hv_vm *vm)
{
    for (int i = 0; i < 1000; i++) {
        uint32_t a = counter(vm, 0);
        usleep(10000);
        if (a > 0 && counter(vm, 0) != a && counter(vm, BOOT_N_PAGES - 1) > 0)
            return;
    }
    fail_msg("the boot sector does not run");
}

static inline double ms_since(uint64_t t0)
{
    return (double)(lb_now_ns() - t0) / 1e6;
}

/* Copy every located block from one VM to the other, as an engine would. */
static inline void copy_ram(struct lb_hv_vm *src, struct lb_hv_vm *dst, bool only_dirty)
{
    const struct lb_ram_block *s;
    unsigned n;
    OK(lb_hv_blocks(src, &s, &n, err));
    for (unsigned i = 0; i < n; i++) {
        const struct lb_ram_block *d = block_named(dst, s[i].name);
        struct lb_bitmap set;
        if (!s[i].hva || !d || !d->hva || s[i].size_bytes != d->size_bytes) {
            assert_int_equal(s[i].kind, LB_RAM_ROM);
            continue;
        }
        OK(lb_bitmap_init(&set, s[i].size_bytes / LB_PAGE_SIZE, err));
        if (only_dirty && s[i].kind != LB_RAM_ROM)
            OK(lb_hv_log_clean(src, &s[i], &set, err));
        else if (!only_dirty && s[i].kind == LB_RAM_MAIN)
            OK(lb_hv_populated(src, &s[i], &set, err));
        else if (!only_dirty)
            lb_bitmap_set_all(&set);
        uint64_t first, count, from = 0;
        static char buf[256 * 4096];
        while (lb_bitmap_next_run(&set, from, 256, &first, &count)) {
            OK(lb_hv_read(src, &s[i], first, count, buf, err));
            OK(lb_hv_write(dst, d, first, count, buf, err));
            from = first + count;
        }
        lb_bitmap_free(&set);
    }
}

#endif
