/* core/file.c - files that survive a crash.
 *
 * Atomic write: the new content goes to ".NAME.XXXXXX.tmp" in the same
 * directory, is fsynced, and takes the name by rename(2); then the directory is
 * fsynced.  A crash leaves the old or the new content, never a mixture, and at
 * worst a hidden .tmp file that directory readers skip by its leading dot.
 *
 * Appending takes flock(2), so that lines of several processes do not mix; a
 * line torn by a crash is closed with '\n' by the next append and cannot
 * swallow it; a line that did not fit the disk is taken back. */
#include "core/core_internal.h"

#include <assert.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>

enum { MAX_TREE_DEPTH = 64 }; /* one descriptor is open per level */

static int fail_file(struct lb_error *err, int sys_errno, const char *what, const char *path)
{
    enum lb_errcode code = lb_errcode_of_errno(sys_errno);
    lb_fail_errno(err, code, sys_errno, "cannot %s %s", what, path);
    if (code == LB_E_NO_SPACE)
        lb_remedy(err, "free space on the file system of %s", path);
    return -1;
}

char *lb_path_parent(const char *path)
{
    const char *slash = strrchr(path, '/');
    if (!slash)
        return lb_strdup(".");
    if (slash == path)
        return lb_strdup("/");
    return lb_asprintf("%.*s", (int)(slash - path), path);
}

int lb_sync_dir(const char *dir, struct lb_error *err)
{
    LB_AUTO_FD int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return fail_file(err, errno, "open directory", dir);
    /* EINVAL: a file system that has nothing to sync */
    if (fsync(fd) < 0 && errno != EINVAL)
        return fail_file(err, errno, "sync directory", dir);
    return 0;
}

static int write_file(int fd, const void *data, size_t len)
{
    const char *p = data;
    while (len > 0) {
        ssize_t n = write(fd, p, len);
        if (n < 0) {
            if (errno == EINTR)
                continue;
            return -1;
        }
        p += n;
        len -= (size_t)n;
    }
    return 0;
}

int lb_file_write_atomic(const char *path, const void *data, size_t len, mode_t mode,
                         struct lb_error *err)
{
    LB_AUTO_FREE char *dir = lb_path_parent(path);
    const char *slash = strrchr(path, '/');
    const char *base = slash ? slash + 1 : path;
    LB_AUTO_FREE char *tmp = lb_asprintf("%s/.%s.XXXXXX.tmp", dir, base);

    LB_AUTO_FD int fd = mkostemps(tmp, 4, O_CLOEXEC);
    if (fd < 0)
        return fail_file(err, errno, "create a temporary file for", path);
    if (fchmod(fd, mode) < 0 || write_file(fd, data, len) < 0 || fsync(fd) < 0) {
        fail_file(err, errno, "write", path);
        unlink(tmp);
        return -1;
    }
    if (rename(tmp, path) < 0) {
        fail_file(err, errno, "replace", path);
        unlink(tmp);
        return -1;
    }
    return lb_sync_dir(dir, err);
}

int lb_file_read(const char *path, size_t max_bytes, char **out, size_t *len,
                 struct lb_error *err)
{
    LB_AUTO_FD int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return fail_file(err, errno, "open", path);

    /* st_size is a hint only: files of /proc say 0. One byte more than the
     * content is asked for, to see the end of file or the excess. */
    struct stat st;
    size_t cap = 4096;
    if (fstat(fd, &st) == 0 && st.st_size > 0)
        cap = LB_MIN((size_t)st.st_size, max_bytes) + 2;
    LB_AUTO_FREE char *buf = lb_try_alloc(cap, err);
    size_t used = 0;
    if (!buf)
        return -1;
    for (;;) {
        if (used + 1 >= cap) {
            char *more = realloc(buf, cap * 2);
            if (!more)
                return fail_file(err, ENOMEM, "read", path);
            buf = more;
            cap *= 2;
        }
        ssize_t n = read(fd, buf + used, cap - used - 1);
        if (n < 0) {
            if (errno == EINTR)
                continue;
            return fail_file(err, errno, "read", path);
        }
        if (n == 0)
            break;
        used += (size_t)n;
        if (used > max_bytes)
            return lb_fail(err, LB_E_PROTO, "%s is larger than the allowed %zu bytes", path,
                           max_bytes);
    }
    buf[used] = '\0';
    *out = LB_STEAL_PTR(buf);
    if (len)
        *len = used;
    return 0;
}

int lb_file_append_line(const char *path, const char *line, struct lb_error *err)
{
    assert(!strchr(line, '\n'));
    LB_AUTO_FD int fd = open(path, O_RDWR | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
    if (fd < 0)
        return fail_file(err, errno, "open", path);
    while (flock(fd, LOCK_EX) < 0)
        if (errno != EINTR)
            return fail_file(err, errno, "lock", path);

    struct stat st;
    if (fstat(fd, &st) < 0)
        return fail_file(err, errno, "stat", path);
    char last = '\n';
    if (st.st_size > 0 && pread(fd, &last, 1, st.st_size - 1) != 1)
        return fail_file(err, errno, "read", path);

    LB_AUTO_FREE char *text = lb_asprintf("%s%s\n", last == '\n' ? "" : "\n", line);
    if (write_file(fd, text, strlen(text)) < 0 || fsync(fd) < 0) {
        fail_file(err, errno, "append to", path);
        if (ftruncate(fd, st.st_size) < 0)
            lb_context(err, "a partial line was left behind");
        return -1;
    }
    if (st.st_size == 0) { /* perhaps new: its name must survive too */
        LB_AUTO_FREE char *dir = lb_path_parent(path);
        return lb_sync_dir(dir, err);
    }
    return 0;
}

int lb_file_remove(const char *path, struct lb_error *err)
{
    LB_AUTO_FREE char *dir = lb_path_parent(path);

    if (unlink(path) == 0)
        return lb_sync_dir(dir, err);
    if (errno != ENOENT)
        return fail_file(err, errno, "remove", path);
    lb_sync_dir(dir, NULL); /* who removed it may have died before this */
    return 0;
}

int lb_mkdir_p(const char *path, mode_t mode, struct lb_error *err)
{
    LB_AUTO_FREE char *part = lb_strdup(path);
    char *end = part;

    while (*end) {
        end += strspn(end, "/");
        end += strcspn(end, "/");
        char saved = *end;
        *end = '\0';
        if (mkdir(part, mode) == 0) {
            LB_AUTO_FREE char *parent = lb_path_parent(part);
            if (lb_sync_dir(parent, err) < 0)
                return -1;
        } else {
            /* EEXIST for most, but also EROFS, EACCES of a parent that exists */
            int e = errno;
            struct stat st;
            if (stat(part, &st) < 0)
                return fail_file(err, e, "create directory", part);
            if (!S_ISDIR(st.st_mode))
                return fail_file(err, ENOTDIR, "create directory", part);
        }
        *end = saved;
    }
    return 0;
}

/* Empty and remove the directory `name` in `at`.  Symbolic links are removed,
 * never followed; a file system mounted inside is refused. */
static int remove_dir(int at, const char *name, dev_t dev, unsigned depth, const char *shown,
                      struct lb_error *err)
{
    if (depth > MAX_TREE_DEPTH)
        return lb_fail(err, LB_E_INTERNAL, "cannot remove %s: more than %d levels deep", shown,
                       MAX_TREE_DEPTH);
    int fd = openat(at, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
        return errno == ENOENT ? 0 : fail_file(err, errno, "open directory", shown);
    struct stat st;
    if (fstat(fd, &st) < 0 || (depth > 0 && st.st_dev != dev)) {
        close(fd);
        lb_fail(err, LB_E_STATE, "cannot remove %s: a file system is mounted there", shown);
        return lb_remedy(err, "unmount %s first", shown);
    }
    DIR *d = fdopendir(fd);
    if (!d) {
        int e = errno;
        close(fd);
        return fail_file(err, e, "read directory", shown);
    }

    int rc = 0;
    struct dirent *entry;
    while (rc == 0 && (errno = 0, entry = readdir(d))) {
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
            continue;
        if (unlinkat(dirfd(d), entry->d_name, 0) == 0 || errno == ENOENT)
            continue;
        int e = errno;
        LB_AUTO_FREE char *child = lb_asprintf("%s/%s", shown, entry->d_name);
        if (e == EISDIR || e == EPERM)
            rc = remove_dir(dirfd(d), entry->d_name, st.st_dev, depth + 1, child, err);
        else
            rc = fail_file(err, e, "remove", child);
    }
    if (rc == 0 && errno)
        rc = fail_file(err, errno, "read directory", shown);
    closedir(d);
    if (rc == 0 && unlinkat(at, name, AT_REMOVEDIR) < 0 && errno != ENOENT)
        rc = fail_file(err, errno, "remove directory", shown);
    return rc;
}

int lb_remove_tree(const char *path, struct lb_error *err)
{
    LB_AUTO_FREE char *name = lb_strdup(path);
    size_t len = strlen(name);

    /* "link/" would name what the link points to */
    while (len > 0 && name[len - 1] == '/')
        name[--len] = '\0';
    assert(len > 0); /* "" and "/" */
    if (unlink(name) == 0 || errno == ENOENT)
        return 0;
    if (errno != EISDIR && errno != EPERM)
        return fail_file(err, errno, "remove", name);
    return remove_dir(AT_FDCWD, name, 0, 0, name, err);
}
