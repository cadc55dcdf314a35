/* core/host.c - see host.h. */
#include "core/host.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <inttypes.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <netdb.h>
#include <poll.h>
#include <pthread.h>
#include <pwd.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>

enum { MAX_GROUPS = 256, MAX_OUTPUT = 1 << 20, RUN_TIMEOUT_MS = 10000 };

static int wait_for(pid_t pid)
{
    int status;
    while (waitpid(pid, &status, 0) < 0)
        if (errno != EINTR)
            return -1;
    return status;
}

/* Groups of a user, found before the fork: the child must not take locks of libc. */
static int groups_of(uid_t uid, gid_t gid, gid_t *groups)
{
    char buf[4096];
    struct passwd pw, *found = NULL;
    int n = MAX_GROUPS;

    groups[0] = gid;
    if (getpwuid_r(uid, &pw, buf, sizeof(buf), &found) != 0 || !found)
        return 1;
    if (getgrouplist(found->pw_name, gid, groups, &n) < 0)
        return 1;
    return n;
}

int lb_host_access_as(uid_t uid, gid_t gid, const char *path, int mode)
{
    if (uid == geteuid())
        return faccessat(AT_FDCWD, path, mode, AT_EACCESS) < 0 ? errno : 0;
    gid_t groups[MAX_GROUPS];
    int n = groups_of(uid, gid, groups);
    pid_t pid = fork();
    if (pid < 0)
        return errno;
    if (pid == 0) {
        if (setgroups((size_t)n, groups) < 0 || setresgid(gid, gid, gid) < 0 ||
            setresuid(uid, uid, uid) < 0)
            _exit(EPERM);
        _exit(faccessat(AT_FDCWD, path, mode, AT_EACCESS) < 0 ? errno : 0);
    }
    int status = wait_for(pid);
    return WIFEXITED(status) ? WEXITSTATUS(status) : EIO;
}

/* ---------------------------------------------------------------- programs */

static void read_output(int fd, uint64_t deadline_ns, char *buf, size_t cap, size_t *used,
                        bool *in_time)
{
    *used = 0;
    *in_time = false;
    while (*used < cap) {
        uint64_t now_ns = lb_now_ns();
        if (now_ns >= deadline_ns)
            return;
        struct pollfd p = {.fd = fd, .events = POLLIN};
        int n = poll(&p, 1, (int)((deadline_ns - now_ns) / 1000000 + 1));
        if (n < 0 && errno != EINTR)
            return;
        if (n <= 0)
            continue;
        ssize_t got = read(fd, buf + *used, cap - *used);
        if (got == 0)
            *in_time = true;
        if (got == 0 || (got < 0 && errno != EINTR))
            return;
        *used += got > 0 ? (size_t)got : 0;
    }
}

int lb_host_run(const char *const argv[], unsigned timeout_ms, char **out, struct lb_error *err)
{
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) < 0)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot make a pipe");
    LB_AUTO_FD int in = ends[0];
    LB_AUTO_FD int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    pid_t pid = fork();
    if (pid < 0) {
        close(ends[1]);
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot start %s", argv[0]);
    }
    if (pid == 0) {
        char *const clean[] = {(char *)"PATH=/usr/sbin:/usr/bin:/sbin:/bin", (char *)"LC_ALL=C",
                               NULL};
        if (dup2(null, 0) < 0 || dup2(ends[1], 1) < 0 || dup2(null, 2) < 0)
            _exit(127);
        execve(argv[0], (char *const *)argv, clean);
        _exit(127);
    }
    close(ends[1]);
    LB_AUTO_FREE char *text = lb_alloc(MAX_OUTPUT + 1);
    size_t used;
    bool in_time;
    read_output(in, lb_now_ns() + (uint64_t)timeout_ms * 1000000, text, MAX_OUTPUT, &used, &in_time);
    if (!in_time)
        kill(pid, SIGKILL);
    int status = wait_for(pid);
    text[used] = '\0';
    if (!in_time)
        return lb_fail(err, LB_E_HV, "%s %s did not answer within %u ms", argv[0], argv[1],
                       timeout_ms);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
        return lb_fail(err, LB_E_HV, "%s %s failed (status %d)", argv[0], argv[1],
                       WIFEXITED(status) ? WEXITSTATUS(status) : -1);
    *out = LB_STEAL_PTR(text);
    return 0;
}

static struct {
    pthread_mutex_t lock;
    struct stat st;
    char *path, *version, *machines; /* locked by lock */
} known = {.lock = PTHREAD_MUTEX_INITIALIZER};

static bool same_file(const struct stat *a, const struct stat *b)
{
    return a->st_ino == b->st_ino && a->st_dev == b->st_dev && a->st_size == b->st_size &&
           a->st_mtim.tv_sec == b->st_mtim.tv_sec && a->st_mtim.tv_nsec == b->st_mtim.tv_nsec;
}

int lb_host_emulator(const char *path, char **version, char **machines, struct lb_error *err)
{
    const char *const ask_version[] = {path, "--version", NULL};
    const char *const ask_machines[] = {path, "-machine", "help", NULL};
    struct stat st;
    int rc = 0;

    if (stat(path, &st) < 0)
        return lb_fail_errno(err, LB_E_NOT_FOUND, errno, "%s", path);
    pthread_mutex_lock(&known.lock);
    if (!known.path || strcmp(known.path, path) || !same_file(&known.st, &st)) {
        char *v = NULL, *m = NULL;
        if (lb_host_run(ask_version, RUN_TIMEOUT_MS, &v, err) < 0 ||
            lb_host_run(ask_machines, RUN_TIMEOUT_MS, &m, err) < 0) {
            free(v);
            rc = -1;
        } else {
            free(known.path);
            free(known.version);
            free(known.machines);
            known.path = lb_strdup(path);
            known.version = v;
            known.machines = m;
            known.st = st;
        }
    }
    if (rc == 0) {
        *version = lb_strdup(known.version);
        *machines = lb_strdup(known.machines);
    }
    pthread_mutex_unlock(&known.lock);
    return rc;
}

/* ------------------------------------------------------------------ network */

int lb_host_port_free(bool udp, const char *address, uint16_t port)
{
    struct addrinfo hints = {.ai_flags = AI_PASSIVE | AI_NUMERICHOST | AI_NUMERICSERV,
                             .ai_socktype = udp ? SOCK_DGRAM : SOCK_STREAM};
    struct addrinfo *list;
    char service[8];
    int result = 0, one = 1;

    /* Names would have to be asked of a server that may not answer. */
    if (!strcmp(address, "localhost"))
        address = "127.0.0.1";
    if (!strcmp(address, "*"))
        address = "";
    snprintf(service, sizeof(service), "%u", port);
    if (getaddrinfo(*address ? address : "0.0.0.0", service, &hints, &list) != 0)
        return EINVAL;
    for (struct addrinfo *a = list; a && !result; a = a->ai_next) {
        LB_AUTO_FD int fd = socket(a->ai_family, a->ai_socktype | SOCK_CLOEXEC, 0);
        if (fd < 0 || (!udp && setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)) < 0) ||
            bind(fd, a->ai_addr, a->ai_addrlen) < 0)
            result = errno;
    }
    freeaddrinfo(list);
    return result;
}

/* A datagram socket may not connect to a stream socket; the kernel says so only after
 * it has found one in use there, and the other side notices nothing. (A real connection
 * would occupy a QMP monitor, which serves one client.) */
bool lb_host_unix_served(const char *path)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof(a.sun_path))
        return false;
    memcpy(a.sun_path, path, strlen(path) + 1);
    LB_AUTO_FD int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    return fd >= 0 && (connect(fd, (struct sockaddr *)&a, sizeof(a)) == 0 || errno == EPROTOTYPE);
}

int lb_host_tap_free(const char *name)
{
    struct ifreq ifr = {0};
    if (strlen(name) >= sizeof(ifr.ifr_name))
        return EINVAL;
    /* Asked first: TUNSETIFF would create what is not there. By socket and not by
     * /sys, which may show another namespace. */
    if (if_nametoindex(name) == 0)
        return ENODEV;
    static const short flags[] = {IFF_TAP | IFF_NO_PI | IFF_VNET_HDR,
                                  IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE};
    int result = 0;
    for (size_t i = 0; i < LB_ARRAY_LEN(flags); i++) {
        LB_AUTO_FD int fd = open("/dev/net/tun", O_RDWR | O_CLOEXEC);
        if (fd < 0)
            return errno;
        memcpy(ifr.ifr_name, name, strlen(name) + 1);
        ifr.ifr_flags = flags[i];
        if (ioctl(fd, TUNSETIFF, &ifr) == 0)
            return 0;
        result = errno;
        if (result != EINVAL)
            return result;
    }
    return result;
}

/* -------------------------------------------------------------------- rest */

int lb_host_locked(const char *path)
{
    LB_AUTO_FD int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    /* QEMU's image locks are bytes from 100 on: permissions, then what is not shared. */
    struct flock l = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 100, .l_len = 200};
    if (fd < 0 || fcntl(fd, F_OFD_GETLK, &l) < 0)
        return -1;
    return l.l_type != F_UNLCK;
}

int64_t lb_host_meminfo(const char *key)
{
    LB_AUTO_FREE char *text = NULL;
    size_t len = strlen(key);
    if (lb_file_read("/proc/meminfo", 65536, &text, NULL, NULL) < 0)
        return -1;
    for (const char *line = text; line && *line;) {
        uint64_t kib;
        if (!strncmp(line, key, len) && line[len] == ':' &&
            sscanf(line + len + 1, "%" SCNu64, &kib) == 1)
            return (int64_t)(kib * 1024);
        line = strchr(line, '\n');
        line = line ? line + 1 : NULL;
    }
    return -1;
}

/* ------------------------------------------------------------------ systemd */

/* Lines are ID:CONTROLLERS:PATH; systemd's own is that of name=systemd, or the only one (controllers empty). */
char *lb_host_unit_of(const char *text)
{
    for (const char *line = text, *end; *line; line = *end ? end + 1 : end) {
        end = strchrnul(line, '\n');
        const char *c = memchr(line, ':', (size_t)(end - line));
        if (!c || (strncmp(c, "::/", 3) && strncmp(c, ":name=systemd:/", 15)))
            continue;
        for (const char *p = memchr(c, '/', (size_t)(end - c)), *next; p; p = next) {
            p++;
            next = memchr(p, '/', (size_t)(end - p));
            size_t len = (size_t)((next ? next : end) - p);
            if ((len > 8 && !memcmp(p + len - 8, ".service", 8)) || (len > 6 && !memcmp(p + len - 6, ".scope", 6)))
                return lb_asprintf("%.*s", (int)len, p);
        }
    }
    return NULL;
}

/* Output of systemctl; "" when it fails. Caller frees. */
static char *systemctl(const char *a, const char *b, const char *c, const char *d)
{
    const char *const argv[] = {"/usr/bin/systemctl", a, b, c, d, NULL};
    char *out = NULL;
    return lb_host_run(argv, RUN_TIMEOUT_MS, &out, NULL) < 0 ? lb_strdup("") : out;
}

bool lb_host_stops_early(pid_t pid, const char *unit, char **its)
{
    LB_AUTO_FREE char *path = lb_asprintf("/proc/%d/cgroup", (int)pid);
    LB_AUTO_FREE char *text = NULL;
    size_t len;
    *its = NULL;
    if (access("/run/systemd/system", F_OK) < 0 || lb_file_read(path, 65536, &text, &len, NULL) < 0)
        return false;
    LB_AUTO_FREE char *enabled = systemctl("is-enabled", unit, NULL, NULL);
    char *own = strncmp(enabled, "enabled", 7) ? NULL : lb_host_unit_of(text);
    if (!own)
        return false;
    LB_AUTO_FREE char *before = systemctl("show", "--property=Before", "--value", own);
    if (strstr(before, unit)) {
        free(own);
        return false;
    }
    *its = own;
    return true;
}
