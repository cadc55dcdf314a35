/*
 * core/qemu/qcow2.c - what a qcow2 image stands on, by its header.
 *
 *      0  magic "QFI\xfb", version 2 or 3      8  offset, 16 length of the backing file's name
 *      after the header: extensions {type, length, data padded to 8}; 0xe2792aca is the backing format
 *
 * All numbers are big-endian.  The header is somebody else's: lengths are checked.
 */
#include "core/qemu/qemu_internal.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>

#define MAGIC 0x514649fbu
#define EXT_END 0u
#define EXT_BACKING_FORMAT 0xe2792acau
#define NAME_MAX_BYTES 1023u
#define V2_BYTES 72u
#define MAX_DEPTH 256u

struct head {
    unsigned char b[4096]; /* the extensions are in here, as QEMU writes them */
    size_t len;
};

static uint32_t be32(const struct head *h, size_t at)
{
    uint32_t v = 0;
    if (at + sizeof(v) <= h->len)
        memcpy(&v, h->b + at, sizeof(v));
    return be32toh(v);
}

static bool is_raw(const struct head *h)
{
    size_t at = be32(h, 4) == 2 ? V2_BYTES : be32(h, 100);
    for (uint32_t type; at + 8 <= h->len && (type = be32(h, at)) != EXT_END;) {
        size_t len = be32(h, at + 4);
        if (type == EXT_BACKING_FORMAT)
            return len == 3 && at + 11 <= h->len && memcmp(h->b + at + 8, "raw", 3) == 0;
        at += 8 + (len + 7) / 8 * 8;
    }
    return false;
}

/* Relative names are beside the image. NULL: it is in no file. */
static char *resolve(const char *image, const char *name)
{
    const char *file = strncmp(name, "file:", 5) == 0 ? name + 5 : name;
    const char *slash = strrchr(image, '/');
    if (file[0] == '/' || !slash)
        return lb_strdup(file);
    if (file == name && name[strcspn(name, ":/")] == ':')
        return NULL;
    return lb_asprintf("%.*s/%s", (int)(slash - image), image, file);
}

/* *raw: what it stands on is to be read as it is. */
static int backing_of(const char *image, char **backing, bool *raw, struct lb_error *err)
{
    struct head h = {.len = 0};
    char name[NAME_MAX_BYTES + 1] = "";
    *backing = NULL;
    LB_AUTO_FD int fd = open(image, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : pread(fd, h.b, sizeof(h.b), 0);
    if (n < 0)
        return lb_fail_errno(err, errno == ENOENT ? LB_E_NOT_FOUND : LB_E_INTERNAL, errno, "%s", image);
    h.len = (size_t)n;
    if (be32(&h, 0) != MAGIC || h.len < V2_BYTES)
        return 0;
    uint64_t offset = (uint64_t)be32(&h, 8) << 32 | be32(&h, 12);
    uint32_t len = be32(&h, 16);
    if (offset == 0)
        return 0;
    if (len > NAME_MAX_BYTES || offset > (uint64_t)INT64_MAX - len ||
        pread(fd, name, len, (off_t)offset) != (ssize_t)len)
        return lb_fail(err, LB_E_PREFLIGHT, "%s: the header of this image is damaged", image);
    *raw = is_raw(&h);
    *backing = resolve(image, name);
    return 0;
}

int lb_qemu_image_chain(const char *image, char ***files, struct lb_error *err)
{
    unsigned n = 0;
    bool raw = false;
    char **v = lb_alloc(sizeof(*v));
    for (const char *at = image; !raw;) {
        char *next = NULL;
        if (n == MAX_DEPTH)
            lb_fail(err, LB_E_PREFLIGHT, "%s: the chain of this image has no end", image);
        if (n == MAX_DEPTH || backing_of(at, &next, &raw, err) < 0) {
            lb_strv_free(v);
            return -1;
        }
        if (!next)
            break;
        v = lb_realloc(v, (n + 2) * sizeof(*v));
        v[n++] = next;
        v[n] = NULL;
        at = next;
    }
    *files = v;
    return 0;
}
