/*
 * core/qemu/throttle.c - less CPU for the guest.
 *
 * Three ways, the first that works:
 *   cgroup v1   a child of the VM's own cpu cgroup with a quota, holding the vCPU
 *               threads alone, so that QEMU's main loop still answers at once;
 *   cgroup v2   a sibling of the VM's cgroup with cpu.max, holding the whole process
 *               (a cgroup with members may not have controlled children);
 *   affinity    vCPUs squeezed on fewer CPUs; useless for one vCPU.
 *
 * What was done is recorded before it is done, so that it can be undone when we die:
 *     pid START_TICKS
 *     cgroup tasks|cgroup.procs OLD_DIR NEW_DIR      or     affinity TID HEXMASK (per vCPU)
 */
#include "core/qemu/qemu_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <string.h>
#include <sys/stat.h>

#define PERIOD_US 20000 /* short: the guest stutters less */
#define MIN_QUOTA_US 1000
#define MAX_VCPUS 1024

static pthread_mutex_t dir_lock = PTHREAD_MUTEX_INITIALIZER;
static char *throttle_dir;

void lb_qemu_set_throttle_dir(const char *dir)
{
    pthread_mutex_lock(&dir_lock);
    free(throttle_dir);
    throttle_dir = lb_strdup(dir);
    pthread_mutex_unlock(&dir_lock);
}

static char *record_path(const struct lb_hv_vm *vm)
{
    if (vm->run_dir)
        return lb_asprintf("%s/throttle", vm->run_dir);
    pthread_mutex_lock(&dir_lock);
    const char *env = getenv("LIFEBOAT_THROTTLE_DIR");
    const char *dir = throttle_dir ? throttle_dir : env && *env ? env : "/run/lifeboat";
    char *path = lb_asprintf("%s/throttle-%d", dir, (int)vm->proc.pid);
    pthread_mutex_unlock(&dir_lock);
    return path;
}

/* ------------------------------------------------------------------ cgroups */

struct group {
    bool v2;
    char *old, *new;    /* directories */
};

static void group_free(struct group *g)
{
    free(g->old);
    free(g->new);
    *g = (struct group){0};
}

static int put(const char *dir, const char *file, const char *text)
{
    LB_AUTO_FREE char *path = lb_asprintf("%s/%s", dir, file);
    LB_AUTO_FD int fd = open(path, O_WRONLY | O_CLOEXEC);
    return fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text) ? 0 : -1;
}

/* Mount point of the v1 cpu controller, or of cgroup2, with its root; NULL: none. */
static char *mount_of(bool v2, char **root)
{
    LB_AUTO_FREE char *text = NULL;
    if (lb_file_read("/proc/self/mountinfo", 1 << 20, &text, NULL, NULL) < 0)
        return NULL;
    for (char *line = text, *next; line && *line; line = next) {
        char r[1024], at[1024], fs[64], opts[1024];
        next = strchr(line, '\n');
        if (next)
            *next++ = 0;
        char *dash = strstr(line, " - ");
        if (!dash || sscanf(line, "%*d %*d %*s %1023s %1023s", r, at) != 2 ||
            sscanf(dash, " - %63s %*s %1023s", fs, opts) != 2)
            continue;
        bool cpu = false;
        for (char *save, *o = strtok_r(opts, ",", &save); o; o = strtok_r(NULL, ",", &save))
            cpu |= strcmp(o, "cpu") == 0;
        if (v2 ? strcmp(fs, "cgroup2") == 0 : strcmp(fs, "cgroup") == 0 && cpu) {
            *root = lb_strdup(r);
            return lb_strdup(at);
        }
    }
    return NULL;
}

/* Path of pid in the hierarchy: "4:cpu,cpuacct:/a" or "0::/a". */
static char *path_in(pid_t pid, bool v2)
{
    LB_AUTO_FREE char *text = NULL;
    char path[64];
    snprintf(path, sizeof(path), "/proc/%d/cgroup", (int)pid);
    if (lb_file_read(path, 65536, &text, NULL, NULL) < 0)
        return NULL;
    for (char *line = text, *next; line && *line; line = next) {
        next = strchr(line, '\n');
        if (next)
            *next++ = 0;
        char *ctl = strchr(line, ':'), *at = ctl ? strchr(ctl + 1, ':') : NULL;
        if (!at)
            continue;
        *at++ = 0;
        bool cpu = false;
        for (char *save, *o = strtok_r(ctl + 1, ",", &save); o; o = strtok_r(NULL, ",", &save))
            cpu |= strcmp(o, "cpu") == 0;
        if (v2 ? ctl[1] == 0 && strncmp(line, "0", 1) == 0 : cpu)
            return lb_strdup(at);
    }
    return NULL;
}

static bool find_group(struct lb_hv_vm *vm, bool v2, struct group *g)
{
    LB_AUTO_FREE char *root = NULL;
    LB_AUTO_FREE char *mnt = mount_of(v2, &root);
    LB_AUTO_FREE char *at = path_in(vm->proc.pid, v2);
    if (!mnt || !at)
        return false;
    size_t r = strcmp(root, "/") == 0 ? 0 : strlen(root);
    if (strncmp(at, root, r) != 0)
        return false;
    char *rest = at + r;
    g->v2 = v2;
    g->old = lb_asprintf("%s%s", mnt, strcmp(rest, "/") == 0 ? "" : rest);
    if (v2 && rest[0] && strcmp(rest, "/") != 0)
        *strrchr(rest, '/') = 0; /* the sibling's parent */
    g->new = lb_asprintf("%s%s/lifeboat-%d", mnt, strcmp(rest, "/") == 0 ? "" : rest,
                         (int)vm->proc.pid);
    return true;
}

static int set_quota(const struct group *g, unsigned percent, unsigned vcpus)
{
    char text[64];
    uint64_t quota = (uint64_t)PERIOD_US * vcpus * (100 - percent) / 100;
    quota = LB_MAX(quota, (uint64_t)MIN_QUOTA_US);
    if (g->v2) {
        snprintf(text, sizeof(text), "%" PRIu64 " %d", quota, PERIOD_US);
        return put(g->new, "cpu.max", text);
    }
    snprintf(text, sizeof(text), "%d", PERIOD_US);
    if (put(g->new, "cpu.cfs_period_us", text) < 0)
        return -1;
    snprintf(text, sizeof(text), "%" PRIu64, quota);
    return put(g->new, "cpu.cfs_quota_us", text);
}

/* ------------------------------------------------------------------- vCPUs */

static int vcpu_threads(struct lb_hv_vm *vm, pid_t tids[MAX_VCPUS], unsigned *n,
                        struct lb_error *err)
{
    json_t *cpus = NULL, *c;
    size_t i;
    if (lb_qmp_cmd(vm->qmp, "query-cpus-fast", NULL, &cpus, err) < 0)
        return -1;
    *n = 0;
    json_array_foreach(cpus, i, c)
    {
        if (*n < MAX_VCPUS)
            tids[(*n)++] = (pid_t)json_integer_value(json_object_get(c, "thread-id"));
    }
    json_decref(cpus);
    return *n ? 0 : lb_fail(err, LB_E_HV, "QEMU names no vCPU");
}

static int record(const char *path, const char *text, struct lb_error *err)
{
    LB_AUTO_FREE char *dir = lb_strdup(path);
    *strrchr(dir, '/') = 0;
    if (lb_mkdir_p(dir, 0700, err) < 0)
        return -1;
    return lb_file_write_atomic(path, text, strlen(text), 0600, err);
}

static int by_group(struct lb_hv_vm *vm, bool v2, unsigned percent, const char *path,
                    const pid_t *tids, unsigned n)
{
    struct group g = {0};
    int rc = -1;
    if (!find_group(vm, v2, &g))
        return -1;
    const char *file = v2 ? "cgroup.procs" : "tasks";
    LB_AUTO_FREE char *text =
        lb_asprintf("%d %" PRIu64 "\ncgroup %s %s %s\n", (int)vm->proc.pid, vm->proc.start_ticks,
                    file, g.old, g.new);
    if (strpbrk(g.old, " \n") || record(path, text, NULL) < 0)
        goto out;
    if ((mkdir(g.new, 0755) < 0 && errno != EEXIST) || set_quota(&g, percent, n) < 0)
        goto undo;
    for (unsigned i = 0; i < (v2 ? 1 : n); i++) {
        char id[16];
        snprintf(id, sizeof(id), "%d", (int)(v2 ? vm->proc.pid : tids[i]));
        if (put(g.new, file, id) < 0)
            goto undo;
    }
    rc = 0;
    goto out;
undo:
    lb_qemu_throttle_undo(path, NULL);
out:
    group_free(&g);
    return rc;
}

static int by_affinity(struct lb_hv_vm *vm, unsigned percent, const char *path,
                       const pid_t *tids, unsigned n, struct lb_error *err)
{
    cpu_set_t old, few;
    LB_AUTO_FREE char *text = lb_asprintf("%d %" PRIu64 "\n", (int)vm->proc.pid,
                                          vm->proc.start_ticks);
    unsigned want = LB_MAX((n * (100 - percent) + 99) / 100, 1u), have = 0;
    if (want >= n) {
        lb_fail(err, LB_E_UNSUPPORTED, "this host offers no way to slow the guest by %u%%", percent);
        return lb_remedy(err, "mount the cpu cgroup controller writable for lifeboatd");
    }
    for (unsigned i = 0; i < n; i++) {
        if (sched_getaffinity(tids[i], sizeof(old), &old) < 0)
            return lb_fail_errno(err, LB_E_HV, errno, "cannot see the affinity of a vCPU");
        char hex[2 * sizeof(old) + 1];
        lb_hex(hex, &old, sizeof(old));
        char *more = lb_asprintf("%saffinity %d %s\n", text, (int)tids[i], hex);
        free(text);
        text = more;
    }
    CPU_ZERO(&few);
    for (int c = 0; c < CPU_SETSIZE && have < want; c++) {
        if (CPU_ISSET(c, &old)) {
            CPU_SET(c, &few);
            have++;
        }
    }
    if (record(path, text, err) < 0)
        return -1;
    for (unsigned i = 0; i < n; i++) {
        if (sched_setaffinity(tids[i], sizeof(few), &few) < 0) {
            lb_fail_errno(err, LB_E_HV, errno, "cannot set the affinity of a vCPU");
            lb_qemu_throttle_undo(path, NULL);
            return -1;
        }
    }
    return 0;
}

int lb_qemu_throttle(struct lb_hv_vm *vm, unsigned percent, struct lb_error *err)
{
    pid_t tids[MAX_VCPUS];
    unsigned n;
    if (vm->throttle_path) { /* start from full speed each time */
        if (lb_qemu_throttle_undo(vm->throttle_path, err) < 0)
            return -1;
        free(vm->throttle_path);
        vm->throttle_path = NULL;
    }
    LB_AUTO_FREE char *path = record_path(vm);
    /* what a predecessor of ours left behind */
    if (lb_qemu_throttle_undo(path, err) < 0)
        return -1;
    if (percent == 0)
        return 0;
    if (vcpu_threads(vm, tids, &n, err) < 0)
        return -1;
    if (by_group(vm, false, percent, path, tids, n) < 0 &&
        by_group(vm, true, percent, path, tids, n) < 0 &&
        by_affinity(vm, percent, path, tids, n, err) < 0)
        return -1;
    vm->throttle_path = LB_STEAL_PTR(path);
    return 0;
}

/* ------------------------------------------------------------------- undo */

/* Move everything in `from` back; it may still fork threads while we look. */
static int empty_group(const char *from, const char *to, const char *file)
{
    LB_AUTO_FREE char *list = lb_asprintf("%s/%s", from, file);
    if (access(from, F_OK) < 0)
        return 0;
    for (int pass = 0; pass < 50; pass++) {
        LB_AUTO_FREE char *ids = NULL;
        if (lb_file_read(list, 1 << 20, &ids, NULL, NULL) == 0)
            for (char *save, *id = strtok_r(ids, "\n", &save); id; id = strtok_r(NULL, "\n", &save))
                put(to, file, id);
        if (rmdir(from) == 0 || errno == ENOENT)
            return 0;
        lb_sleep_ms(2);
    }
    return -1;
}

int lb_qemu_throttle_undo(const char *path, struct lb_error *err)
{
    LB_AUTO_FREE char *text = NULL;
    struct lb_error why = LB_ERROR_INIT;
    struct lb_proc_id id;
    int pid, used = 0;
    if (lb_file_read(path, 1 << 22, &text, NULL, &why) < 0) {
        if (why.code == LB_E_NOT_FOUND || why.sys_errno == ENOENT)
            return 0;
        if (err)
            *err = why;
        return -1;
    }
    if (sscanf(text, "%d %" SCNu64 "\n%n", &pid, &id.start_ticks, &used) != 2 || used == 0)
        return lb_fail(err, LB_E_INTERNAL, "cannot understand %s", path);
    id.pid = pid;
    bool alive = lb_proc_alive(&id);
    for (char *save, *line = strtok_r(text + used, "\n", &save); line;
         line = strtok_r(NULL, "\n", &save)) {
        char file[32], from[PATH_MAX], to[PATH_MAX], hex[2 * sizeof(cpu_set_t) + 1];
        cpu_set_t old;
        int tid;
        if (sscanf(line, "cgroup %31s %4095s %4095s", file, to, from) == 3) {
            /* nothing but a group of ours is ever removed */
            const char *leaf = strrchr(from, '/');
            if (!leaf || strncmp(leaf, "/lifeboat-", 10) != 0 || strchr(file, '/'))
                return lb_fail(err, LB_E_INTERNAL, "cannot understand %s", path);
            if (empty_group(from, to, file) < 0) {
                lb_fail(err, LB_E_INTERNAL, "cannot remove the cgroup %s", from);
                return lb_remedy(err, "move its processes to %s and remove it", to);
            }
        } else if (alive && sscanf(line, "affinity %d %256s", &tid, hex) == 2 &&
                   lb_unhex(&old, sizeof(old), hex) == (ssize_t)sizeof(old)) {
            sched_setaffinity(tid, sizeof(old), &old); /* a vCPU that is gone needs none */
        }
    }
    if (unlink(path) < 0 && errno != ENOENT)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot remove %s", path);
    return 0;
}
