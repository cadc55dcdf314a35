/* checkpoint/writer_file.c - the file under a checkpoint that is being written.
 *
 * The file is written front to back through a ring of memory.  Whoever has a part takes the next place
 * (number and bytes) under the lock, and fills it without; the thread writes a segment when all of it is filled:
 *
 *      written            end                    written + RING
 *         |==== filled or being filled ====|........ free ........|
 *         segment   segment   segment
 *
 * O_DIRECT, so that a guest of any size leaves the host's page cache as it was; where that is refused, the
 * cache is written and dropped behind us.
 *
 * The temporary file PATH.tmp-PID is locked (flock) while it is written: one that nobody has locked is a dead writer's.
 */
#include "checkpoint/writer_internal.h"

#include <assert.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>

#define SEGMENT_BYTES (UINT64_C(4) << 20)
#define N_SEGMENTS 4u
#define RING_BYTES (SEGMENT_BYTES * N_SEGMENTS)
#define MAX_PART_BYTES (SEGMENT_BYTES / 2) /* of what a writer makes: room for several in the ring */

struct lb_out {
    /* constant */
    char *path, *tmp, *dir;
    int fd;
    uint8_t *ring;
    pthread_t thread;
    bool threaded;
    /* the thread's, after its end the caller's */
    bool direct, named;

    pthread_mutex_t lock;
    pthread_cond_t room, work;
    uint64_t end;                 /* places given so far */
    uint64_t written;             /* in the file; a multiple of SEGMENT_BYTES but for the last write */
    uint64_t filled[N_SEGMENTS];  /* bytes that are there */
    struct lb_cf_part_entry *entries;
    uint32_t n_parts, cap_parts;
    bool stopping, failed;
    struct lb_error error;
};

static int fail_write(const struct lb_out *o, int sys_errno, const char *what, struct lb_error *err)
{
    bool full = sys_errno == ENOSPC || sys_errno == EDQUOT || sys_errno == EFBIG;
    lb_fail_errno(err, full ? LB_E_NO_SPACE : LB_E_INTERNAL, sys_errno, "cannot %s %s", what, o->path);
    if (full)
        return lb_remedy(err, "free space on the file system of %s, remove checkpoints, or give them another place "
                              "(checkpoint-dir)", o->dir);
    return lb_remedy(err, "look at the kernel's log for what is wrong with the file system of %s", o->dir);
}

/* ------------------------------------------------------------------ temporary files */

static const char *base_of(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

/* BASE.tmp-DIGITS, and nobody holds its lock */
static void remove_if_dead(int dir_fd, const char *name, const char *base)
{
    size_t len = strlen(base);
    if (strncmp(name, base, len) || strncmp(name + len, ".tmp-", 5) || !name[len + 5] ||
        name[len + 5 + strspn(name + len + 5, "0123456789")])
        return;
    LB_AUTO_FD int fd = openat(dir_fd, name, O_WRONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd >= 0 && flock(fd, LOCK_EX | LOCK_NB) == 0 && unlinkat(dir_fd, name, 0) == 0)
        lb_log(LB_LOG_INFO, "removed %s: its writer is gone", name);
}

static int remove_dead(const struct lb_out *o, struct lb_error *err)
{
    DIR *d = opendir(o->dir);
    if (!d)
        return lb_fail_errno(err, errno == ENOENT ? LB_E_NOT_FOUND : LB_E_INTERNAL, errno, "cannot open directory %s",
                             o->dir);
    for (struct dirent *e; (e = readdir(d));)
        remove_if_dead(dirfd(d), e->d_name, base_of(o->path));
    closedir(d);
    return 0;
}

/* The file is ours once it is locked and still has its name: before that it looks like a dead one's. */
static int create_locked(struct lb_out *o, int flags)
{
    for (;;) {
        int fd = open(o->tmp, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | flags, 0600);
        struct stat st;
        if (fd < 0)
            return -1;
        if (flock(fd, LOCK_EX | LOCK_NB) == 0 && fstat(fd, &st) == 0 && st.st_nlink > 0)
            return fd;
        close(fd);
    }
}

static int create_tmp(struct lb_out *o, bool buffered, struct lb_error *err)
{
    o->direct = !buffered;
    o->fd = create_locked(o, o->direct ? O_DIRECT : 0);
    if (o->fd < 0 && o->direct && errno == EINVAL) { /* no such thing on this file system */
        unlink(o->tmp);
        o->direct = false;
        o->fd = create_locked(o, 0);
    }
    if (o->fd < 0)
        return fail_write(o, errno, "create a temporary file for", err);
    /* A file system that is full says so here, before anybody has stopped a guest. */
    if (fallocate(o->fd, 0, 0, LB_CF_HEADER_BYTES) < 0 && errno != EOPNOTSUPP)
        return fail_write(o, errno, "write", err);
    return 0;
}

/* -------------------------------------------------------------------------- writing */

static int write_at(struct lb_out *o, const uint8_t *p, uint64_t len, uint64_t offset)
{
    while (len > 0) {
        ssize_t n = pwrite(o->fd, p, len, (off_t)offset);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EINVAL && o->direct) { /* O_DIRECT was accepted by open alone */
            int flags = fcntl(o->fd, F_GETFL);
            o->direct = false;
            if (flags < 0 || fcntl(o->fd, F_SETFL, flags & ~O_DIRECT) < 0)
                return -1;
            continue;
        }
        if (n < 0)
            return -1;
        p += n;
        len -= (uint64_t)n;
        offset += (uint64_t)n;
    }
    return 0;
}

/* Begin to write back what was just written, and forget what was written before. Hints: what fails is left to fsync. */
static void drop_cache(const struct lb_out *o, uint64_t offset, uint64_t len)
{
    if (o->direct)
        return;
    sync_file_range(o->fd, (off_t)offset, (off_t)len, SYNC_FILE_RANGE_WRITE);
    if (offset == 0)
        return;
    uint64_t before = LB_MIN(offset, SEGMENT_BYTES);
    sync_file_range(o->fd, (off_t)(offset - before), (off_t)before,
                    SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER);
    posix_fadvise(o->fd, (off_t)(offset - before), (off_t)before, POSIX_FADV_DONTNEED);
}

static unsigned segment_of(uint64_t offset)
{
    return (unsigned)(offset / SEGMENT_BYTES % N_SEGMENTS);
}

void lb_out_fail(struct lb_out *o, const struct lb_error *why)
{
    pthread_mutex_lock(&o->lock);
    if (!o->failed)
        o->error = *why;
    o->failed = true;
    pthread_cond_broadcast(&o->room);
    pthread_cond_broadcast(&o->work);
    pthread_mutex_unlock(&o->lock);
}

static int failure(const struct lb_out *o, struct lb_error *err)
{
    if (err)
        *err = o->error;
    return -1;
}

static void *write_segments(void *arg)
{
    struct lb_out *o = arg;

    pthread_mutex_lock(&o->lock);
    for (;;) {
        uint64_t *filled = &o->filled[segment_of(o->written)];
        while (*filled < SEGMENT_BYTES && !o->stopping && !o->failed)
            pthread_cond_wait(&o->work, &o->lock);
        if (*filled < SEGMENT_BYTES || o->failed)
            break;
        uint64_t at = o->written;
        pthread_mutex_unlock(&o->lock);

        int rc = write_at(o, o->ring + at % RING_BYTES, SEGMENT_BYTES, at);
        if (rc < 0) {
            struct lb_error why = LB_ERROR_INIT;
            fail_write(o, errno, "write", &why);
            lb_out_fail(o, &why);
        } else {
            drop_cache(o, at, SEGMENT_BYTES);
        }
        pthread_mutex_lock(&o->lock);
        if (rc < 0)
            break;
        *filled = 0;
        o->written += SEGMENT_BYTES;
        pthread_cond_broadcast(&o->room);
    }
    pthread_mutex_unlock(&o->lock);
    return NULL;
}

int lb_out_open(const char *path, bool buffered, struct lb_out **out, struct lb_error *err)
{
    struct lb_out *o = lb_alloc(sizeof(*o));
    int e;

    o->path = lb_strdup(path);
    o->dir = lb_path_parent(path);
    o->tmp = lb_asprintf("%s.tmp-%d", path, (int)getpid());
    o->fd = -1;
    pthread_mutex_init(&o->lock, NULL);
    pthread_cond_init(&o->room, NULL);
    pthread_cond_init(&o->work, NULL);
    o->ring = mmap(NULL, RING_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (o->ring == MAP_FAILED) {
        o->ring = NULL;
        lb_fail_errno(err, LB_E_NO_SPACE, errno, "no memory to write %s", path);
        goto fail;
    }
    if (remove_dead(o, err) < 0 || create_tmp(o, buffered, err) < 0)
        goto fail;
    if ((e = pthread_create(&o->thread, NULL, write_segments, o)) != 0) {
        lb_fail_errno(err, LB_E_INTERNAL, e, "cannot start a thread");
        goto fail;
    }
    o->threaded = true;
    *out = o;
    return 0;
fail:
    lb_out_close(o);
    return -1;
}

static void stop_thread(struct lb_out *o)
{
    if (!o->threaded)
        return;
    pthread_mutex_lock(&o->lock);
    o->stopping = true;
    pthread_cond_broadcast(&o->work);
    pthread_mutex_unlock(&o->lock);
    pthread_join(o->thread, NULL);
    o->threaded = false;
}

void lb_out_close(struct lb_out *o)
{
    if (!o)
        return;
    stop_thread(o);
    if (o->fd >= 0) {
        if (!o->named)
            unlink(o->tmp);
        close(o->fd);
    }
    if (o->ring)
        munmap(o->ring, RING_BYTES);
    pthread_cond_destroy(&o->work);
    pthread_cond_destroy(&o->room);
    pthread_mutex_destroy(&o->lock);
    free(o->entries);
    free(o->path);
    free(o->tmp);
    free(o->dir);
    free(o);
}

/* --------------------------------------------------------------------------- places */

/* The next `len` bytes; with a part: its number. Lock held. */
static int take(struct lb_out *o, uint64_t len, bool part, struct lb_out_place *place, struct lb_error *err)
{
    assert(len <= MAX_PART_BYTES);
    while (o->end + len > o->written + RING_BYTES && !o->failed)
        pthread_cond_wait(&o->room, &o->lock);
    if (o->failed)
        return failure(o, err);
    if (part && o->n_parts == o->cap_parts) {
        o->cap_parts = LB_MAX(o->cap_parts * 2, 1024u);
        o->entries = lb_realloc(o->entries, o->cap_parts * sizeof(*o->entries));
    }
    *place = (struct lb_out_place){o->n_parts, o->end};
    o->n_parts += part;
    o->end += len;
    return 0;
}

/* To its place in the ring; data NULL: zeros. */
static void copy_in(struct lb_out *o, uint64_t offset, const void *data, uint64_t len)
{
    while (len > 0) {
        uint64_t at = offset % RING_BYTES, n = LB_MIN(len, RING_BYTES - at);
        if (data) {
            memcpy(o->ring + at, data, n);
            data = (const uint8_t *)data + n;
        } else {
            memset(o->ring + at, 0, n);
        }
        offset += n;
        len -= n;
    }
}

/* [offset, offset + len) is in the ring. Lock held. */
static void filled(struct lb_out *o, uint64_t offset, uint64_t len)
{
    while (len > 0) {
        uint64_t n = LB_MIN(len, SEGMENT_BYTES - offset % SEGMENT_BYTES);
        uint64_t *f = &o->filled[segment_of(offset)];
        *f += n;
        if (*f == SEGMENT_BYTES)
            pthread_cond_signal(&o->work);
        offset += n;
        len -= n;
    }
}

void lb_out_header(struct lb_out *o, const struct lb_cf_header *h)
{
    struct lb_out_place place;
    pthread_mutex_lock(&o->lock);
    if (take(o, sizeof(*h), false, &place, NULL) == 0) {
        copy_in(o, place.offset, h, sizeof(*h));
        filled(o, place.offset, sizeof(*h));
    }
    pthread_mutex_unlock(&o->lock);
}

int lb_out_part(struct lb_out *o, const struct lb_cf_seal *seal, struct lb_cf_part *head, void *stored,
                struct lb_out_place *place, struct lb_error *err)
{
    uint64_t len = le32toh(head->stored_bytes);
    uint64_t whole = (sizeof(*head) + len + LB_CF_ALIGN - 1) / LB_CF_ALIGN * LB_CF_ALIGN;
    struct lb_out_place p;

    pthread_mutex_lock(&o->lock);
    int rc = take(o, whole, true, &p, err);
    pthread_mutex_unlock(&o->lock);
    if (rc < 0)
        return -1;

    head->number = htole32(p.number);
    uint64_t body = p.offset + sizeof(*head);
    if (body % RING_BYTES + len <= RING_BYTES) {
        lb_cf_seal_part(seal, head, stored, o->ring + body % RING_BYTES);
    } else { /* around the end of the ring */
        lb_cf_seal_part(seal, head, stored, stored);
        copy_in(o, body, stored, len);
    }
    copy_in(o, p.offset, head, sizeof(*head));
    copy_in(o, body + len, NULL, whole - sizeof(*head) - len);

    pthread_mutex_lock(&o->lock);
    struct lb_cf_part_entry *e = &o->entries[p.number];
    e->stored_bytes = head->stored_bytes;
    memcpy(e->check, head->check, sizeof(e->check));
    filled(o, p.offset, whole);
    pthread_mutex_unlock(&o->lock);
    if (place)
        *place = p;
    return 0;
}

uint64_t lb_out_bytes(struct lb_out *o)
{
    pthread_mutex_lock(&o->lock);
    uint64_t n = o->end;
    pthread_mutex_unlock(&o->lock);
    return n;
}

void lb_out_entries(struct lb_out *o, const struct lb_cf_part_entry **v, uint32_t *n)
{
    pthread_mutex_lock(&o->lock);
    *v = o->entries;
    *n = o->n_parts;
    pthread_mutex_unlock(&o->lock);
}

int lb_out_settle(struct lb_out *o, struct lb_error *err)
{
    pthread_mutex_lock(&o->lock);
    while (o->end - o->written >= SEGMENT_BYTES && !o->failed)
        pthread_cond_wait(&o->room, &o->lock);
    int rc = o->failed ? failure(o, err) : 0;
    pthread_mutex_unlock(&o->lock);
    return rc;
}

/* ------------------------------------------------------------------------------ end */

static int sync_dir(const struct lb_out *o, struct lb_error *err)
{
    LB_AUTO_FD int fd = open(o->dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0 || (fsync(fd) < 0 && errno != EINVAL)) /* EINVAL: a file system that has nothing to sync */
        return fail_write(o, errno, "make durable", err);
    return 0;
}

static int give_name(struct lb_out *o, bool replace, struct lb_error *err)
{
    /* EINVAL: a file system that cannot; then the check at the beginning has to do */
    if (renameat2(AT_FDCWD, o->tmp, AT_FDCWD, o->path, replace ? 0 : RENAME_NOREPLACE) < 0 &&
        (errno != EINVAL || rename(o->tmp, o->path) < 0)) {
        if (errno == EEXIST)
            return lb_fail(err, LB_E_EXISTS, "%s exists already", o->path);
        return fail_write(o, errno, "give its name to", err);
    }
    o->named = true;
    if (sync_dir(o, err) == 0)
        return 0;
    if (!replace)
        unlink(o->path); /* who asked for it is told that there is none */
    return -1;
}

int lb_out_finish(struct lb_out *o, const struct lb_cf_end *end, bool replace, struct lb_error *err)
{
    struct lb_out_place place;
    uint64_t used = lb_out_bytes(o) + sizeof(*end);
    uint64_t bytes = (used + LB_CF_FILE_ALIGN - 1) / LB_CF_FILE_ALIGN * LB_CF_FILE_ALIGN;

    pthread_mutex_lock(&o->lock);
    int rc = take(o, bytes - used + sizeof(*end), false, &place, err);
    pthread_mutex_unlock(&o->lock);
    if (rc < 0)
        return -1;
    copy_in(o, place.offset, NULL, bytes - used);
    copy_in(o, bytes - sizeof(*end), end, sizeof(*end));
    pthread_mutex_lock(&o->lock);
    filled(o, place.offset, bytes - place.offset);
    pthread_mutex_unlock(&o->lock);

    stop_thread(o);
    if (o->failed)
        return failure(o, err);
    assert(o->end == bytes && bytes - o->written < SEGMENT_BYTES);
    uint64_t left = bytes - o->written;
    if (write_at(o, o->ring + o->written % RING_BYTES, left, o->written) < 0 || fsync(o->fd) < 0)
        return fail_write(o, errno, "write", err);
    o->written = bytes;
    if (!o->direct)
        posix_fadvise(o->fd, 0, 0, POSIX_FADV_DONTNEED);
    return give_name(o, replace, err);
}
