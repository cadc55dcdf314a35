/* remus/disk_target.c - the backup's disks: what may be written to, and raw images.
 *
 * Before anything is written: is it the primary's own file (by device and inode on one host, by the
 * kind of file system or the WWN of a LUN across hosts)? Is somebody using it (QEMU's image locks)?
 * Is its size the guest's?
 *
 * QEMU's locks are bytes of the file: 100 + p is read-locked by who uses permission p, 200 + p by who
 * does not want others to use it. We are a writer that shares nothing but reading, as a guest's disk
 * is: a QEMU, qemu-img or qemu-nbd that wants to write is refused, and so are we when one is there. */
#include "remus/disk_internal.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>

struct lb_disk_target {
    const struct lb_disk_target_ops *ops;
    void *priv;
    uint64_t size_bytes;   /* as the guest sees it */
};
struct raw {
    int fd;
    bool no_punch;         /* this storage cannot make holes */
    char *path;
};

/* ------------------------------------------------------------------ identity */

static void read_line(const char *path, char *line, size_t size)
{
    LB_AUTO_FREE char *text = NULL;
    line[0] = '\0';
    if (lb_file_read(path, 4096, &text, NULL, NULL) < 0)
        return;
    text[strcspn(text, "\n")] = '\0';
    for (char *p = text; *p; p++)
        if (*p == ' ' || *p == ':') /* our own separators */
            *p = '_';
    snprintf(line, size, "%s", text);
}

/* What other hosts call the same block device: the WWN of a LUN, the UUID of a mapped device. */
static void device_name(dev_t dev, char *name, size_t size)
{
    static const char *const files[] = {"dm/uuid", "wwid", "device/wwid"};
    char path[96];
    name[0] = '\0';
    for (size_t i = 0; i < LB_ARRAY_LEN(files) && !name[0]; i++) {
        snprintf(path, sizeof(path), "/sys/dev/block/%u:%u/%s", major(dev), minor(dev), files[i]);
        read_line(path, name, size);
    }
}

/* DEV:INODE:BOOT-ID, or for a block device rMAJOR.MINOR:NAME:BOOT-ID. */
void lb_disk_file_identity(char out[128], const char *path)
{
    char boot[48], name[48];
    struct stat st;
    out[0] = '\0';
    if (stat(path, &st) < 0)
        return;
    read_line("/proc/sys/kernel/random/boot_id", boot, sizeof(boot));
    if (S_ISBLK(st.st_mode)) {
        device_name(st.st_rdev, name, sizeof(name));
        snprintf(out, 128, "r%u.%u:%s:%s", major(st.st_rdev), minor(st.st_rdev), name, boot);
    } else {
        snprintf(out, 128, "%" PRIx64 ":%" PRIu64 ":%s", (uint64_t)st.st_dev, (uint64_t)st.st_ino,
                 boot);
    }
}

struct identity { char where[48], what[48], boot[48]; };

static bool identity_parse(const char *text, struct identity *id)
{
    *id = (struct identity){0};
    const char *a = strchr(text, ':'), *b = a ? strchr(a + 1, ':') : NULL;
    if (!b)
        return false;
    snprintf(id->where, sizeof(id->where), "%.*s", (int)(a - text), text);
    snprintf(id->what, sizeof(id->what), "%.*s", (int)(b - a - 1), a + 1);
    snprintf(id->boot, sizeof(id->boot), "%s", b + 1);
    return true;
}

/* File systems that several hosts may have mounted. */
static bool on_shared_fs(const char *path)
{
    static const uint32_t magics[] = {
        0x6969 /* nfs */, 0xff534d42 /* cifs */, 0xfe534d42 /* smb2 */, 0x00c36400 /* ceph */,
        0x01161970 /* gfs2 */, 0x7461636f /* ocfs2 */, 0x0bd00bd0 /* lustre */,
        0x47504653 /* gpfs */, 0x65735546 /* fuse: gluster, sshfs */, 0x01021997 /* 9p */,
    };
    struct statfs fs;
    if (statfs(path, &fs) < 0)
        return false;
    for (size_t i = 0; i < LB_ARRAY_LEN(magics); i++)
        if ((uint32_t)fs.f_type == magics[i])
            return true;
    return false;
}

static int refuse_same(const char *path, const char *why, struct lb_error *err)
{
    lb_fail(err, LB_E_PREFLIGHT, "%s %s", path, why);
    return lb_remedy(err, "give this host a copy of its own: map its directory with "
                          "`path = FROM -> TO` in this host's configuration, or protect with --disk none");
}

/* path exists. */
static int check_not_same(const char *path, const char *same_as, struct lb_error *err)
{
    char own[128];
    struct identity theirs = {0}, ours;
    lb_disk_file_identity(own, path);
    if (!identity_parse(own, &ours))
        return lb_fail(err, LB_E_INTERNAL, "cannot look at %s", path);
    bool known = same_as && identity_parse(same_as, &theirs);
    bool device = ours.where[0] == 'r';
    if (known && !strcmp(ours.boot, theirs.boot))
        return !strcmp(ours.where, theirs.where) && (device || !strcmp(ours.what, theirs.what))
                   ? refuse_same(path, "is the primary's own disk", err)
                   : 0;
    if (device)
        return ours.what[0] && known && !strcmp(ours.what, theirs.what)
                   ? refuse_same(path, "is the primary's own LUN", err)
                   : 0;
    if (on_shared_fs(path) && (!known || !strcmp(ours.what, theirs.what)))
        return refuse_same(path, "is on a shared file system and may be the primary's own file", err);
    return 0;
}

/* --------------------------------------------------------------------- locks */

enum { PERM_READ = 0, PERM_WRITE = 1, PERM_RESIZE = 3, USE_BASE = 100, UNSHARE_BASE = 200 };

static int lock_byte(int fd, int cmd, short type, off_t at)
{
    struct flock l = {.l_type = type, .l_whence = SEEK_SET, .l_start = at, .l_len = 1};
    if (fcntl(fd, cmd, &l) < 0)
        return -1;
    return cmd == F_OFD_GETLK && l.l_type != F_UNLCK;
}

static int fail_in_use(const char *path, struct lb_error *err)
{
    lb_fail(err, LB_E_EXISTS, "%s is in use: another VM or tool has it open", path);
    return lb_remedy(err, "see who has it with `fuser -v %.256s`; end it, or map the path elsewhere",
                     path);
}

/* keep: hold the locks for as long as fd is open; else only look. */
static int lock_image(int fd, const char *path, bool keep, struct lb_error *err)
{
    static const off_t ours[] = {USE_BASE + PERM_READ, USE_BASE + PERM_WRITE,
                                 UNSHARE_BASE + PERM_WRITE, UNSHARE_BASE + PERM_RESIZE};
    /* somebody writes or resizes, or does not want anybody to read or write */
    static const off_t theirs[] = {USE_BASE + PERM_WRITE, USE_BASE + PERM_RESIZE,
                                   UNSHARE_BASE + PERM_READ, UNSHARE_BASE + PERM_WRITE};
    for (size_t i = 0; keep && i < LB_ARRAY_LEN(ours); i++)
        if (lock_byte(fd, F_OFD_SETLK, F_RDLCK, ours[i]) < 0)
            return errno == EAGAIN || errno == EACCES
                       ? fail_in_use(path, err)
                       : lb_fail_errno(err, LB_E_UNSUPPORTED, errno, "cannot lock %s", path);
    for (size_t i = 0; i < LB_ARRAY_LEN(theirs); i++)
        if (lock_byte(fd, F_OFD_GETLK, F_WRLCK, theirs[i]) != 0)
            return fail_in_use(path, err);
    return 0;
}

/* ----------------------------------------------------------------------- raw */

int lb_disk_write_failed(const char *path, int sys_errno, struct lb_error *err)
{
    bool full = sys_errno == ENOSPC || sys_errno == EDQUOT;
    lb_fail_errno(err, full ? LB_E_NO_SPACE : LB_E_INTERNAL, sys_errno, "cannot write to the disk %s",
                  path);
    return full ? lb_remedy(err, "make room on the backup's storage, then protect again")
                : lb_remedy(err, "look into the kernel's log for errors of this storage");
}

static int write_all_at(struct raw *r, const void *data, uint64_t len, uint64_t offset,
                        struct lb_error *err)
{
    while (len > 0) {
        ssize_t n = pwrite(r->fd, data, len, (off_t)offset);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return lb_disk_write_failed(r->path, n < 0 ? errno : EIO, err);
        data = (const char *)data + n;
        offset += (uint64_t)n;
        len -= (uint64_t)n;
    }
    return 0;
}

static bool cannot(int e)
{
    return e == EOPNOTSUPP || e == ENOSYS || e == EINVAL || e == EPERM;
}

static int zero_range(struct raw *r, uint64_t offset, uint64_t len, struct lb_error *err)
{
    static const char zeros[256 << 10];
    const int punch = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
    const int zero = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE;
    if (!r->no_punch) {
        if (fallocate(r->fd, punch, (off_t)offset, (off_t)len) == 0)
            return 0;
        if (!cannot(errno))
            return lb_disk_write_failed(r->path, errno, err);
        r->no_punch = true;
    }
    if (fallocate(r->fd, zero, (off_t)offset, (off_t)len) == 0)
        return 0;
    if (!cannot(errno))
        return lb_disk_write_failed(r->path, errno, err);
    for (uint64_t n; len > 0; offset += n, len -= n) {
        n = LB_MIN(len, sizeof(zeros));
        if (write_all_at(r, zeros, n, offset, err) < 0)
            return -1;
    }
    return 0;
}

static int raw_apply(void *priv, const struct lb_disk_op *op, struct lb_error *err)
{
    struct raw *r = priv;
    return op->kind == LB_DISK_ZERO ? zero_range(r, op->offset, op->len, err)
                                    : write_all_at(r, op->data, op->len, op->offset, err);
}

static int raw_flush(void *priv, struct lb_error *err)
{
    struct raw *r = priv;
    return fdatasync(r->fd) == 0 ? 0 : lb_disk_write_failed(r->path, errno, err);
}

static int raw_close(void *priv, struct lb_error *err)
{
    struct raw *r = priv;
    int rc = raw_flush(r, err);
    close(r->fd);
    free(r->path);
    free(r);
    return rc;
}

static const struct lb_disk_target_ops raw_ops = {raw_apply, raw_flush, raw_close};

static int raw_create(const struct lb_disk_target_opts *o, struct lb_error *err)
{
    LB_AUTO_FD int fd = open(o->path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0)
        return lb_disk_write_failed(o->path, errno, err);
    if (ftruncate(fd, (off_t)o->size_bytes) == 0 &&
        ((o->uid == geteuid() && o->gid == getegid()) || fchown(fd, o->uid, o->gid) == 0) &&
        fsync(fd) == 0)
        return 0;
    lb_disk_write_failed(o->path, errno, err);
    unlink(o->path);
    return -1;
}

static int raw_open(const struct lb_disk_target_opts *o, void **priv, uint64_t *size,
                    struct lb_error *err)
{
    struct stat st;
    LB_AUTO_FD int fd = open(o->path, O_RDWR | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &st) < 0)
        return lb_fail_errno(err, LB_E_PREFLIGHT, errno, "cannot open %s", o->path);
    *size = (uint64_t)st.st_size;
    if (S_ISBLK(st.st_mode) && ioctl(fd, BLKGETSIZE64, size) < 0)
        return lb_fail_errno(err, LB_E_PREFLIGHT, errno, "cannot ask for the size of %s", o->path);
    if (lock_image(fd, o->path, true, err) < 0)
        return -1;
    struct raw *r = lb_alloc(sizeof(*r));
    r->path = lb_strdup(o->path);
    r->fd = LB_STEAL_FD(fd);
    *priv = r;
    return 0;
}

/* -------------------------------------------------------------------- target */

/* What is there already: 1 yes, 0 nothing. */
static int check_existing(const struct lb_disk_target_opts *o, bool *device, struct lb_error *err)
{
    struct stat st;
    if (stat(o->path, &st) < 0)
        return errno == ENOENT
                   ? 0
                   : lb_fail_errno(err, LB_E_PREFLIGHT, errno, "cannot look at %s", o->path);
    *device = S_ISBLK(st.st_mode);
    if (!S_ISREG(st.st_mode) && !*device) {
        lb_fail(err, LB_E_PREFLIGHT, "%s is neither a file nor a block device", o->path);
        return lb_remedy(err, "remove it, or map the path elsewhere");
    }
    if (check_not_same(o->path, o->same_as, err) < 0)
        return -1;
    LB_AUTO_FD int fd = open(o->path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return lb_fail_errno(err, LB_E_PREFLIGHT, errno, "cannot open %s", o->path);
    return lock_image(fd, o->path, false, err) < 0 ? -1 : 1;
}

static int check_size(const struct lb_disk_target_opts *o, uint64_t size, bool device,
                      struct lb_error *err)
{
    if (size == o->size_bytes || (device && size > o->size_bytes))
        return 0;
    lb_fail(err, LB_E_PREFLIGHT, "%s is %s than the guest's disk: %" PRIu64 " bytes, not %" PRIu64,
            o->path, size < o->size_bytes ? "smaller" : "larger", size, o->size_bytes);
    return lb_remedy(err, "remove it: a new one is made; or `qemu-img resize` it");
}

int lb_disk_target_open(const struct lb_disk_target_opts *opts, struct lb_disk_target **out,
                        struct lb_error *err)
{
    bool qcow2 = strcmp(opts->format, "qcow2") == 0, device = false;
    uint64_t size = 0;
    void *priv = NULL;

    if (!qcow2 && strcmp(opts->format, "raw") != 0) {
        lb_fail(err, LB_E_UNSUPPORTED, "%s: images of format %s cannot be replicated", opts->path,
                opts->format);
        return lb_remedy(err, "convert it with qemu-img convert -O qcow2");
    }
    int there = check_existing(opts, &device, err);
    if (there < 0 ||
        (!there && (qcow2 ? lb_disk_qcow2_create(opts, err) : raw_create(opts, err)) < 0) ||
        (qcow2 ? lb_disk_qcow2_open(opts, &priv, &size, err) : raw_open(opts, &priv, &size, err)) < 0)
        return -1;
    struct lb_disk_target *t = lb_alloc(sizeof(*t));
    *t = (struct lb_disk_target){.ops = qcow2 ? &lb_disk_qcow2_ops : &raw_ops, .priv = priv,
                                 .size_bytes = opts->size_bytes};
    if (check_size(opts, size, device && !qcow2, err) < 0) {
        lb_disk_target_close(t, NULL);
        return -1;
    }
    *out = t;
    return 0;
}

int lb_disk_target_apply(struct lb_disk_target *t, const struct lb_disk_op *op,
                         struct lb_error *err)
{
    bool is_write = op->kind == LB_DISK_WRITE;
    if ((!is_write && op->kind != LB_DISK_ZERO) || op->len == 0 || op->offset > t->size_bytes ||
        op->len > t->size_bytes - op->offset || (is_write && op->len > LB_DISK_OP_MAX))
        return lb_fail(err, LB_E_PROTO, "an operation outside of the disk was received");
    return t->ops->apply(t->priv, op, err);
}

int lb_disk_target_flush(struct lb_disk_target *t, struct lb_error *err)
{
    return t->ops->flush(t->priv, err);
}

int lb_disk_target_close(struct lb_disk_target *t, struct lb_error *err)
{
    if (!t)
        return 0;
    int rc = t->ops->close(t->priv, err);
    free(t);
    return rc;
}
