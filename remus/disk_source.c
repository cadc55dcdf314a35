/* remus/disk_source.c - the primary's disks: what QEMU's mirror writes, as epochs.
 *
 *   guest -> QEMU mirror -> nbdkit + plugin -> socket -> reader thread -> direct()   first copy
 *                                                                     \-> queue      epochs, cut
 *
 * The reader never leaves the socket unread for longer than `direct` takes: the mirror would hold up
 * the guest's writes and QEMU's stop. A cut is asked for while the VM is stopped; all its writes have
 * been answered then, so all are in the socket: the epoch is complete when the socket is empty at a
 * message's end.
 *
 * A failure (nbdkit dies, the link of the first copy breaks, no memory) is told once and ends the reader;
 * it shuts the socket, so that the plugin drops what comes while the guest goes on, until the mirror is ended. */
#include "remus/disk_internal.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>

#include "core/host.h"

#define PLUGIN_FILE "lifeboat-nbdkit-plugin.so"
#define INSTALL_DIR "/usr/local/lib/lifeboat"
#define DEFAULT_LIMIT (64u << 20)
#define SOCKET_BYTES (4 << 20) /* answered and not read yet: what the link of the first copy lags behind */
enum { CUT_MS = 10000, DIED_MS = 1000, CHECK_MS = 10000, END_MS = 1000 };

enum request { REQ_NONE, REQ_QUEUE, REQ_CUT };

struct lb_disk_source {
    /* immutable after open */
    struct lb_disk_source_opts opts;
    unsigned n_disks;
    uint64_t *sizes;
    char socket[108];
    int sock, wake_fd;
    pthread_t reader;
    struct lb_disk_child nbdkit;
    /* locked by lock */
    pthread_mutex_t lock;
    pthread_cond_t changed;
    enum request request;     /* REQ_NONE: the last one is done */
    bool closing, failed;
    struct lb_error why;
    struct lb_disk_ops cut;
    /* reader only */
    struct lb_disk_queue *queue;
    bool queueing, pressed;
    struct lb_disk_wire head;
    size_t head_got;
    uint64_t offset, left;    /* of the message: not delivered yet */
    uint8_t *body;
    size_t body_got;
    /* any thread */
    _Atomic uint64_t backlog;
};

/* -------------------------------------------------------------- the programs */

static int find_plugin(char path[512], struct lb_error *err)
{
    char exe[384];
    ssize_t n = readlink("/proc/self/exe", exe, sizeof(exe) - 1);
    exe[n > 0 ? n : 0] = '\0';
    char *slash = strrchr(exe, '/');
    if (slash)
        *slash = '\0';
    const char *told = getenv("LIFEBOAT_PLUGIN_DIR");
    const struct { const char *dir, *below; } places[] = {
        {told ? told : exe, ""}, {exe, ""}, {exe, "/../lib/lifeboat"}, {INSTALL_DIR, ""}};
    for (size_t i = 0; i < LB_ARRAY_LEN(places); i++) {
        snprintf(path, 512, "%.380s%s/" PLUGIN_FILE, places[i].dir, places[i].below);
        if (access(path, R_OK) == 0)
            return 0;
    }
    lb_fail(err, LB_E_UNSUPPORTED, "disks cannot be replicated: %s is neither in %s nor in %s",
            PLUGIN_FILE, places[0].dir, INSTALL_DIR);
    return lb_remedy(err, "install Lifeboat with `make install`, or protect with --disk none");
}

int lb_disk_source_check(struct lb_error *err)
{
    char nbdkit[128], plugin[512];
    LB_AUTO_FREE char *text = NULL;
    if (lb_disk_find_program("nbdkit", "nbdkit", nbdkit, err) < 0 || find_plugin(plugin, err) < 0)
        return -1;
    const char *const argv[] = {nbdkit, "--dump-plugin", plugin, NULL};
    if (lb_host_run(argv, CHECK_MS, &text, err) == 0 && strstr(text, "has_zero=1"))
        return 0;
    lb_fail(err, LB_E_UNSUPPORTED, "nbdkit does not load %s", plugin);
    return lb_remedy(err, "run `nbdkit --dump-plugin %s`: it says why", plugin);
}

char **lb_disk_blockers(const struct lb_hv_disk *disks, unsigned n)
{
    char **v = lb_alloc((n + 1) * sizeof(*v));
    unsigned found = 0;
    for (unsigned i = 0; i < n; i++) {
        const struct lb_hv_disk *d = &disks[i];
        const char *why = NULL, *what_to_do = "";
        if (d->shareable) {
            why = "others may write to it, what they wrote cannot be rolled back";
            what_to_do = "remove share-rw=on and locking=off, or protect with --disk none";
        } else if (strcmp(d->format, "raw") && strcmp(d->format, "qcow2")) {
            why = "only raw and qcow2 can be replicated";
            what_to_do = "convert it with qemu-img convert -O qcow2";
        } else if (d->size_bytes == 0 || d->size_bytes % LB_DISK_SECTOR) {
            why = "its size is not known";
            what_to_do = "insert a medium or remove the drive";
        }
        if (why)
            v[found++] = lb_asprintf("disk %s (%s%s%s): %s: %s", d->id, d->format,
                                     d->path[0] ? ", " : "", d->path, why, what_to_do);
    }
    return v;
}

static int start_nbdkit(struct lb_disk_source *s, int plugin_end, struct lb_error *err)
{
    char nbdkit[128], plugin[512], fd[16];
    LB_AUTO_FREE char (*sizes)[32] = lb_alloc(s->n_disks * sizeof(*sizes));
    LB_AUTO_FREE const char **argv = lb_alloc((s->n_disks + 8) * sizeof(*argv));
    unsigned n = 0;

    if (lb_disk_find_program("nbdkit", "nbdkit", nbdkit, err) < 0 || find_plugin(plugin, err) < 0)
        return -1;
    snprintf(fd, sizeof(fd), "fd=%d", LB_DISK_CHILD_FD);
    argv[n++] = nbdkit;
    argv[n++] = "--foreground";
    argv[n++] = "--log=stderr";
    argv[n++] = plugin;
    argv[n++] = fd;
    for (unsigned i = 0; i < s->n_disks; i++) {
        snprintf(sizes[i], sizeof(sizes[i]), "size=%" PRIu64, s->sizes[i]);
        argv[n++] = sizes[i];
    }
    struct lb_disk_child_opts o = {.argv = argv, .socket = s->socket, .uid = s->opts.uid,
                                   .gid = s->opts.gid, .pass_fd = plugin_end, .outlives = true};
    return lb_disk_child_start(&o, &s->nbdkit, err);
}

/* The VM's process has to get to the socket: its group may search our directory. */
static int let_in(struct lb_disk_source *s, const char *run_dir, struct lb_error *err)
{
    struct stat st;
    int e = lb_host_access_as(s->opts.uid, s->opts.gid, s->socket, W_OK);
    if (e == EACCES && stat(run_dir, &st) == 0 && chown(run_dir, (uid_t)-1, s->opts.gid) == 0 &&
        chmod(run_dir, (st.st_mode & 07777) | S_IXGRP) == 0)
        e = lb_host_access_as(s->opts.uid, s->opts.gid, s->socket, W_OK);
    if (e == 0)
        return 0;
    lb_fail_errno(err, LB_E_PREFLIGHT, e, "user %u, who runs the VM, cannot reach %s", s->opts.uid,
                  s->socket);
    return lb_remedy(err, "let everybody search the directories above: chmod o+x");
}

/* ---------------------------------------------------------------- the reader */

static int deliver(struct lb_disk_source *s, const struct lb_disk_op *op, void *data,
                   struct lb_error *err)
{
    if (!s->queueing) {
        struct lb_disk_op o = *op;
        o.data = data;
        int rc = s->opts.direct(&o, s->opts.arg, err);
        free(data);
        return rc;
    }
    lb_disk_queue_add(s->queue, op, data);
    uint64_t bytes = lb_disk_queue_bytes(s->queue);
    atomic_store(&s->backlog, bytes);
    if (bytes > s->opts.limit_bytes && !s->pressed) {
        s->pressed = true;
        s->opts.pressure(s->opts.arg);
    }
    return 0;
}

static int head_complete(struct lb_disk_source *s, struct lb_error *err)
{
    const struct lb_disk_wire *h = &s->head;
    if (h->magic != LB_DISK_WIRE_MAGIC || h->disk >= s->n_disks || h->len == 0 ||
        (h->kind != LB_DISK_WRITE && h->kind != LB_DISK_ZERO) ||
        (h->offset | h->len) % LB_DISK_SECTOR || h->offset > s->sizes[h->disk] ||
        h->len > s->sizes[h->disk] - h->offset)
        return lb_fail(err, LB_E_PROTO, "nbdkit sent a request that makes no sense");
    s->offset = h->offset;
    s->left = h->kind == LB_DISK_WRITE ? h->len : 0;
    s->body_got = 0;
    if (h->kind == LB_DISK_WRITE)
        return 0;
    struct lb_disk_op op = {.disk = h->disk, .kind = LB_DISK_ZERO, .offset = h->offset,
                            .len = h->len};
    s->head_got = 0;
    return deliver(s, &op, NULL, err);
}

/* A write is passed on in pieces of LB_DISK_OP_MAX. */
static int body_complete(struct lb_disk_source *s, size_t len, struct lb_error *err)
{
    struct lb_disk_op op = {.disk = s->head.disk, .kind = LB_DISK_WRITE, .offset = s->offset,
                            .len = len};
    s->offset += len;
    s->left -= len;
    s->body_got = 0;
    if (s->left == 0)
        s->head_got = 0;
    return deliver(s, &op, LB_STEAL_PTR(s->body), err);
}

/* Where the next bytes go, and how many. */
static int next_bytes(struct lb_disk_source *s, void **to, size_t *n, struct lb_error *err)
{
    if (s->head_got < sizeof(s->head)) {
        *to = (char *)&s->head + s->head_got;
        *n = sizeof(s->head) - s->head_got;
        return 0;
    }
    size_t len = LB_MIN(s->left, LB_DISK_OP_MAX);
    if (!s->body)
        s->body = lb_try_alloc(len, err);
    if (!s->body)
        return -1;
    *to = s->body + s->body_got;
    *n = len - s->body_got;
    return 0;
}

static int got_bytes(struct lb_disk_source *s, size_t n, struct lb_error *err)
{
    if (s->head_got < sizeof(s->head)) {
        s->head_got += n;
        return s->head_got == sizeof(s->head) ? head_complete(s, err) : 0;
    }
    size_t len = LB_MIN(s->left, LB_DISK_OP_MAX);
    s->body_got += n;
    return s->body_got == len ? body_complete(s, len, err) : 0;
}

/* Until the socket is empty. */
static int drain(struct lb_disk_source *s, struct lb_error *err)
{
    for (;;) {
        void *to;
        size_t n;
        if (next_bytes(s, &to, &n, err) < 0)
            return -1;
        ssize_t got = recv(s->sock, to, n, MSG_DONTWAIT);
        if (got < 0 && errno == EAGAIN)
            return 0;
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return lb_disk_child_failed(&s->nbdkit, DIED_MS, err);
        if (got_bytes(s, (size_t)got, err) < 0)
            return -1;
    }
}

static void serve_request(struct lb_disk_source *s, enum request request)
{
    struct lb_disk_ops cut = {0};
    s->queueing = true;
    if (request == REQ_CUT) {
        lb_disk_queue_take(s->queue, &cut);
        s->pressed = false;
        atomic_store(&s->backlog, 0);
    }
    pthread_mutex_lock(&s->lock);
    lb_disk_ops_free(&s->cut); /* of a request that nobody waited for long enough */
    s->cut = cut;
    s->request = REQ_NONE;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
}

/* Returns false when it is time to end. */
static bool wait_for_work(struct lb_disk_source *s, enum request *request)
{
    struct pollfd p[2] = {{.fd = s->sock, .events = POLLIN}, {.fd = s->wake_fd, .events = POLLIN}};
    uint64_t count;
    if (poll(p, 2, -1) > 0 && p[1].revents)
        (void)!read(s->wake_fd, &count, sizeof(count));
    pthread_mutex_lock(&s->lock);
    bool go_on = !s->closing;
    *request = s->request;
    pthread_mutex_unlock(&s->lock);
    return go_on;
}

static void *read_disks(void *arg)
{
    struct lb_disk_source *s = arg;
    struct lb_error why = LB_ERROR_INIT;
    enum request request;

    while (wait_for_work(s, &request)) {
        /* The request was seen before the socket is found empty: what it is about has been read. */
        if (drain(s, &why) < 0)
            break;
        if (request != REQ_NONE && s->head_got == 0)
            serve_request(s, request);
    }
    pthread_mutex_lock(&s->lock);
    bool tell = !s->closing;
    s->failed = true;
    s->why = why;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
    shutdown(s->sock, SHUT_RDWR);
    if (tell)
        s->opts.failed(&why, s->opts.arg);
    return NULL;
}

/* ------------------------------------------------------------- engine thread */

static void ask(struct lb_disk_source *s, enum request request)
{
    const uint64_t one = 1;
    pthread_mutex_lock(&s->lock);
    assert(s->request == REQ_NONE);
    s->request = request;
    pthread_mutex_unlock(&s->lock);
    (void)!write(s->wake_fd, &one, sizeof(one));
}

static int wait_done(struct lb_disk_source *s, struct lb_disk_ops *out, struct lb_error *err)
{
    struct timespec until;
    int rc = 0;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += CUT_MS / 1000;
    pthread_mutex_lock(&s->lock);
    while (s->request != REQ_NONE && !s->failed && rc == 0)
        rc = pthread_cond_timedwait(&s->changed, &s->lock, &until);
    bool done = s->request == REQ_NONE;
    if (done && out)
        *out = s->cut;
    else if (!done && s->failed && err)
        *err = s->why;
    s->cut = (struct lb_disk_ops){0};
    s->request = REQ_NONE;
    pthread_mutex_unlock(&s->lock);
    if (!done && rc != 0)
        lb_fail(err, LB_E_HV, "nbdkit still sends half a write, and the VM is stopped");
    return done ? 0 : -1;
}

int lb_disk_source_queue(struct lb_disk_source *s, struct lb_error *err)
{
    ask(s, REQ_QUEUE);
    return wait_done(s, NULL, err);
}

void lb_disk_source_cut_begin(struct lb_disk_source *s)
{
    ask(s, REQ_CUT);
}

int lb_disk_source_cut_end(struct lb_disk_source *s, struct lb_disk_ops *out, struct lb_error *err)
{
    return wait_done(s, out, err);
}

uint64_t lb_disk_source_backlog(struct lb_disk_source *s)
{
    return atomic_load(&s->backlog);
}

const char *lb_disk_source_socket(const struct lb_disk_source *s)
{
    return s->socket;
}

static void source_free(struct lb_disk_source *s)
{
    if (s->sock >= 0)
        close(s->sock); /* by that it knows */
    lb_disk_child_end(&s->nbdkit, END_MS);
    if (s->wake_fd >= 0)
        close(s->wake_fd);
    lb_disk_ops_free(&s->cut);
    lb_disk_queue_free(s->queue);
    pthread_mutex_destroy(&s->lock);
    pthread_cond_destroy(&s->changed);
    free(s->body);
    free(s->sizes);
    free(s);
}

static struct lb_disk_source *source_new(const struct lb_hv_disk *disks, unsigned n,
                                         const struct lb_disk_source_opts *opts)
{
    struct lb_disk_source *s = lb_alloc(sizeof(*s));
    pthread_condattr_t monotonic;
    s->opts = *opts;
    s->opts.run_dir = NULL; /* the caller's string */
    if (s->opts.limit_bytes == 0)
        s->opts.limit_bytes = DEFAULT_LIMIT;
    s->n_disks = n;
    s->sizes = lb_alloc(n * sizeof(*s->sizes));
    for (unsigned i = 0; i < n; i++)
        s->sizes[i] = disks[i].size_bytes;
    s->queue = lb_disk_queue_new(n);
    s->sock = s->wake_fd = -1;
    pthread_mutex_init(&s->lock, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&s->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    return s;
}

static int source_start(struct lb_disk_source *s, const char *run_dir, struct lb_error *err)
{
    int ends[2], bytes = SOCKET_BYTES;
    s->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (s->wake_fd < 0 || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) < 0)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot make a socket for nbdkit");
    s->sock = ends[0];
    LB_AUTO_FD int plugin_end = ends[1];
    /* best effort: with less, writes only wait more often */
    if (setsockopt(plugin_end, SOL_SOCKET, SO_SNDBUFFORCE, &bytes, sizeof(bytes)) < 0)
        setsockopt(plugin_end, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes));
    if (start_nbdkit(s, plugin_end, err) < 0 || let_in(s, run_dir, err) < 0)
        return -1;
    int e = pthread_create(&s->reader, NULL, read_disks, s);
    return e == 0 ? 0 : lb_fail_errno(err, LB_E_INTERNAL, e, "cannot start a thread");
}

int lb_disk_source_open(const struct lb_hv_disk *disks, unsigned n,
                        const struct lb_disk_source_opts *opts, struct lb_disk_source **out,
                        struct lb_error *err)
{
    struct lb_disk_source *s = source_new(disks, n, opts);
    int len = snprintf(s->socket, sizeof(s->socket), "%s/disk.sock", opts->run_dir);
    int rc = 0;
    if (len >= (int)sizeof(s->socket)) {
        rc = lb_fail(err, LB_E_USAGE, "the path of a socket is too long: %s/disk.sock",
                     opts->run_dir);
        lb_remedy(err, "use a state directory with a shorter name");
    }
    if (rc < 0 || source_start(s, opts->run_dir, err) < 0) {
        source_free(s);
        return -1;
    }
    *out = s;
    return 0;
}

void lb_disk_source_close(struct lb_disk_source *s)
{
    if (!s)
        return;
    const uint64_t one = 1;
    pthread_mutex_lock(&s->lock);
    s->closing = true;
    pthread_mutex_unlock(&s->lock);
    (void)!write(s->wake_fd, &one, sizeof(one));
    shutdown(s->sock, SHUT_RDWR);
    pthread_join(s->reader, NULL);
    source_free(s);
}
