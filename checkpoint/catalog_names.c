/* checkpoint/catalog_names.c - names of files, the lock and the next number.
 *
 * A number is taken from `next` and `next` is raised durably before the number is used; the files that are there
 * count too, so that a lost `next` never gives a number twice to files that exist.  The directory of a VM is
 * never removed: it remembers the numbers.
 *
 * Directories may be searched by all (0711): the images of an imported checkpoint are in them, and a hypervisor
 * that is not root opens those.  Files are for root alone unless said otherwise. */
#include "checkpoint/catalog_internal.h"

#include "core/registry.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <string.h>
#include <sys/stat.h>

enum { DIR_MODE = 0711, LOCK_POLL_MS = 10 };
#define SUSPEND_FILE "suspend" LB_CKPT_SUFFIX

int lb_catalog_check_vm(const char *vm, struct lb_error *err)
{
    return lb_vm_name_valid(vm) ? 0 : lb_fail(err, LB_E_USAGE, "\"%.80s\" is not a valid VM name", vm);
}

char *lb_catalog_vm_dir(const char *dir, const char *vm)
{
    return lb_asprintf("%s/%s", dir, vm);
}

char *lb_catalog_file(const char *dir, const char *vm, uint32_t number)
{
    if (!number)
        return lb_asprintf("%s/%s/" SUSPEND_FILE, dir, vm);
    return lb_asprintf("%s/%s/%" PRIu32 LB_CKPT_SUFFIX, dir, vm, number);
}

char *lb_catalog_suspend_path(const char *dir, const char *vm)
{
    return lb_catalog_file(dir, vm, 0);
}

bool lb_catalog_number(const char *file_name, uint32_t *number)
{
    size_t digits = strspn(file_name, "0123456789");

    if (!strcmp(file_name, SUSPEND_FILE)) {
        *number = 0;
        return true;
    }
    if (!digits || digits > 10 || file_name[0] == '0' || strcmp(file_name + digits, LB_CKPT_SUFFIX))
        return false;
    unsigned long long v = strtoull(file_name, NULL, 10);
    *number = (uint32_t)v;
    return v <= UINT32_MAX;
}

void lb_share_progress(uint64_t done, uint64_t total, void *share)
{
    const struct lb_share *s = share;

    if (s->progress && total)
        s->progress(s->before + (uint64_t)((double)s->weight * (double)done / (double)total), s->total, s->arg);
}

/* ---------------------------------------------------------------------- lock */

static bool ends_with(const char *s, const char *end)
{
    size_t n = strlen(s), m = strlen(end);

    return n >= m && !strcmp(s + n - m, end);
}

/* A name that only a file has which somebody with the lock was writing.  (N.ws is written without the lock: its
 * temporary files are left alone; so are images of VMs, whatever they are called.) */
static bool is_left_over(const char *name)
{
    const char *tmp = strstr(name, LB_CKPT_SUFFIX ".tmp-");
    unsigned number, k, pid;
    uint32_t of;
    int end = 0;

    if (tmp) {
        LB_AUTO_FREE char *file = lb_asprintf("%.*s" LB_CKPT_SUFFIX, (int)(tmp - name), name);
        return lb_catalog_number(file, &of);
    }
    if (sscanf(name, "disk-%u-%u.qcow2.tmp-%u%n", &number, &k, &pid, &end) == 3 && !name[end])
        return true;
    return ends_with(name, ".tmp") && (!strncmp(name, ".next.", 6) || !strncmp(name, ".disks.json.", 12));
}

static void clean(const char *dir, const char *vm)
{
    LB_AUTO_FREE char *path = lb_catalog_vm_dir(dir, vm);
    struct lb_disks d;
    struct dirent *e;
    DIR *v = opendir(path);

    while (v && (e = readdir(v)))
        if (is_left_over(e->d_name) && unlinkat(dirfd(v), e->d_name, 0) == 0)
            lb_log(LB_LOG_INFO, "removed %s/%s, which was never finished", path, e->d_name);
    if (v)
        closedir(v);
    struct lb_error why = LB_ERROR_INIT;
    struct lb_prune_result res = {0};
    int64_t freed = 0;
    if (lb_disks_load(dir, vm, &d, &why) || lb_images_settle(dir, vm, &d, false, &res, &freed, &why) ||
        (lb_disks_tidy(dir, vm, &d) && lb_disks_save(dir, vm, &d, &why)))
        lb_log_error(LB_LOG_WARN, &why);
    lb_disks_free(&d);
}

int lb_catalog_lock(const char *dir, const char *vm, unsigned wait_ms, struct lb_error *err)
{
    uint64_t until = lb_now_ns() + (uint64_t)wait_ms * 1000000;
    struct flock fl = {.l_type = F_WRLCK, .l_whence = SEEK_SET};

    if (lb_catalog_check_vm(vm, err))
        return -1;
    LB_AUTO_FREE char *vm_dir = lb_catalog_vm_dir(dir, vm);
    LB_AUTO_FREE char *path = lb_asprintf("%s/lock", vm_dir);
    if (lb_mkdir_p(vm_dir, DIR_MODE, err))
        return -1;
    LB_AUTO_FD int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot open %s", path);
    while (fcntl(fd, F_OFD_SETLK, &fl) < 0) {
        if (errno != EAGAIN && errno != EACCES)
            return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot lock %s", path);
        if (lb_now_ns() >= until) {
            lb_fail(err, LB_E_STATE, "somebody else works on the checkpoints of VM %s", vm);
            return lb_remedy(err, "wait until that is done, then try again");
        }
        lb_sleep_ms(LOCK_POLL_MS);
    }
    clean(dir, vm);
    return LB_STEAL_FD(fd);
}

/* -------------------------------------------------------------------- numbers */

static int read_next(const char *path, uint64_t *next, struct lb_error *err)
{
    LB_AUTO_FREE char *text = NULL;
    struct lb_error why = LB_ERROR_INIT;

    *next = 1;
    if (lb_file_read(path, 64, &text, NULL, &why)) {
        if (why.code == LB_E_NOT_FOUND)
            return 0;
        if (err)
            *err = why;
        return -1;
    }
    size_t digits = strspn(text, "0123456789");
    if (!digits || digits > 10 || strspn(text + digits, "\n") != strlen(text + digits)) {
        lb_fail(err, LB_E_STATE, "%s is damaged: it should hold one number", path);
        return lb_remedy(err, "write a number into it that no checkpoint of this VM ever had");
    }
    *next = strtoull(text, NULL, 10);
    return 0;
}

int lb_catalog_next(const char *dir, const char *vm, uint32_t *number, char path[512], struct lb_error *err)
{
    LB_AUTO_FREE char *vm_dir = lb_catalog_vm_dir(dir, vm);
    LB_AUTO_FREE char *file = lb_asprintf("%s/next", vm_dir);
    char text[32];
    uint64_t next;
    uint32_t have;
    struct dirent *e;

    if (read_next(file, &next, err))
        return -1;
    DIR *v = opendir(vm_dir);
    if (!v)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot read %s", vm_dir);
    while ((e = readdir(v)))
        if (lb_catalog_number(e->d_name, &have) && have >= next)
            next = (uint64_t)have + 1;
    closedir(v);
    if (!next || next > UINT32_MAX)
        return lb_fail(err, LB_E_STATE, "VM %s has no numbers of checkpoints left", vm);
    LB_AUTO_FREE char *name = lb_catalog_file(dir, vm, (uint32_t)next);
    if (strlen(name) >= 512)
        return lb_fail(err, LB_E_USAGE, "the path of the checkpoints is too long: %.200s...", dir);
    snprintf(text, sizeof(text), "%" PRIu64 "\n", next + 1);
    if (lb_file_write_atomic(file, text, strlen(text), 0600, err))
        return -1;
    *number = (uint32_t)next;
    strcpy(path, name);
    return 0;
}
