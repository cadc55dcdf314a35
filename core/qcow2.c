/*
 * core/qcow2.c - what a qcow2 image stands on, by its header.
 *
 * After the header: extensions {type, length, data padded to 8}; one of them is the format of the backing file.
 * All numbers are big-endian. The header is somebody else's: lengths are checked.
 */
#include "core/qcow2.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stddef.h>
#include <string.h>
#include <unistd.h>

#define EXT_END 0u
#define EXT_BACKING_FORMAT 0xe2792acau
#define INCOMPATIBLE_DATA_FILE (UINT64_C(1) << 2)
#define MAX_DEPTH 256u

struct fields {
    uint8_t magic[4];
    uint32_t version;
    uint64_t backing_at;
    uint32_t backing_bytes, cluster_bits;
    uint64_t size_bytes;
    uint8_t other[40];
    uint64_t incompatible; /* from here on: version 3 */
    uint8_t more[20];
    uint32_t header_bytes;
} __attribute__((packed));
_Static_assert(offsetof(struct fields, incompatible) == 72 && offsetof(struct fields, header_bytes) == 100,
               "qcow2 header");

union head {
    struct fields f;
    uint8_t b[4096]; /* the extensions are in here, as QEMU writes them */
};

static bool backing_is_raw(const union head *h, size_t len)
{
    bool v2 = be32toh(h->f.version) == 2;

    for (size_t at = v2 ? offsetof(struct fields, incompatible) : be32toh(h->f.header_bytes); at + 8 <= len;) {
        uint32_t ext[2];
        memcpy(ext, h->b + at, sizeof(ext));
        size_t bytes = be32toh(ext[1]);
        if (be32toh(ext[0]) == EXT_END)
            break;
        if (be32toh(ext[0]) == EXT_BACKING_FORMAT)
            return bytes == 3 && at + 11 <= len && !memcmp(h->b + at + 8, "raw", 3);
        at += 8 + (bytes + 7) / 8 * 8;
    }
    return false;
}

/* file.filename of a "json:{...}" name. */
static bool json_file_name(const char *text, char *out, size_t cap)
{
    json_t *o = json_loads(text, JSON_REJECT_DUPLICATES, NULL);
    const json_t *file = json_object_get(o, "file");
    const char *name = json_string_value(json_object_get(o, "file.filename"));

    if (!name)
        name = json_string_value(json_object_get(file, "filename"));
    bool found = name && (size_t)snprintf(out, cap, "%s", name) < cap;
    json_decref(o);
    return found;
}

static void set_backing(const char *path, const char *name, struct lb_qcow2_head *out)
{
    char inner[sizeof(out->backing)];
    const char *slash = strrchr(path, '/');
    bool said_file = false;

    if (!strncmp(name, "json:", 5)) {
        out->opaque = !json_file_name(name + 5, inner, sizeof(inner));
        name = out->opaque ? name : inner;
        said_file = !out->opaque;
    }
    if (!strncmp(name, "file:", 5)) {
        name += 5;
        said_file = true;
    }
    out->local = !out->opaque && (said_file || name[strcspn(name, ":/")] != ':');
    int len;
    if (out->local && name[0] != '/' && slash)
        len = snprintf(out->backing, sizeof(out->backing), "%.*s/%s", (int)(slash - path), path, name);
    else
        len = snprintf(out->backing, sizeof(out->backing), "%s", name);
    if ((size_t)len >= sizeof(out->backing)) {
        out->opaque = true;
        out->local = false;
    }
}

int lb_qcow2_head(const char *path, struct lb_qcow2_head *out, struct lb_error *err)
{
    union head h = {.b = {0}};
    char name[sizeof(out->backing)];

    *out = (struct lb_qcow2_head){0};
    LB_AUTO_FD int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    ssize_t n = fd < 0 ? -1 : pread(fd, &h, sizeof(h), 0);
    if (n < 0)
        return lb_fail_errno(err, errno == ENOENT ? LB_E_NOT_FOUND : LB_E_INTERNAL, errno, "cannot read %s", path);
    if (n < (ssize_t)offsetof(struct fields, incompatible) || memcmp(h.f.magic, "QFI\xfb", 4))
        return 0;
    out->qcow2 = true;
    out->size_bytes = be64toh(h.f.size_bytes);
    out->data_file = be32toh(h.f.version) >= 3 && (be64toh(h.f.incompatible) & INCOMPATIBLE_DATA_FILE);
    uint64_t at = be64toh(h.f.backing_at);
    uint32_t bytes = be32toh(h.f.backing_bytes);
    if (!at)
        return 0;
    if (!bytes || bytes >= sizeof(name) || at > (uint64_t)INT64_MAX - bytes ||
        pread(fd, name, bytes, (off_t)at) != (ssize_t)bytes) {
        out->opaque = true;
        return 0;
    }
    name[bytes] = '\0';
    set_backing(path, name, out);
    out->backing_raw = backing_is_raw(&h, (size_t)n);
    return 0;
}

/* head_of(at) as *h; false: *err says why. */
static bool step(const char *at, unsigned depth, struct lb_qcow2_head *h, struct lb_error *err)
{
    if (lb_qcow2_head(at, h, err) < 0)
        return false;
    if (h->opaque && !h->backing[0])
        lb_fail(err, LB_E_PREFLIGHT, "%s: the header of this image is damaged", at);
    else if (h->local && depth == MAX_DEPTH)
        lb_fail(err, LB_E_PREFLIGHT, "%s: the chain of this image has no end", at);
    else
        return true;
    return false;
}

int lb_qcow2_chain(const char *image, char ***files, struct lb_error *err)
{
    struct lb_qcow2_head h = {.local = true};
    char **v = lb_alloc(sizeof(*v));
    const char *at = image;

    for (unsigned n = 0; h.local && !h.backing_raw; at = v[n - 1]) {
        if (!step(at, n, &h, err)) {
            lb_strv_free(v);
            return -1;
        }
        if (!h.local)
            break;
        v = lb_realloc(v, (n + 2) * sizeof(*v));
        v[n++] = lb_strdup(h.backing);
        v[n] = NULL;
    }
    *files = v;
    return 0;
}
