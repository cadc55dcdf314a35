/* checkpoint/catalog_manifest.c - manifest.json of an exported checkpoint.
 *
 *   {"format": "lifeboat checkpoint", "version": 1, "vm": "web", "number": 7, "encrypted": false,
 *    "checkpoint": {"file": "checkpoint.lbc", "bytes": N, "sha256": "..."},
 *    "disks": [{"file": "disk-0.qcow2", "bytes": N, "sha256": "...", "id", "argv_path", "size_bytes"}, ...]}
 *
 * It is read from wherever somebody got it: names of files are fixed, nothing of it becomes a path. */
#include "checkpoint/catalog_manifest.h"

#include "core/registry.h"
#include "core/json.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <openssl/evp.h>
#include <string.h>

enum { VERSION = 1, MAX_BYTES = 4 << 20, COPY_BYTES = 1 << 20 };
#define FORMAT "lifeboat checkpoint"

void lb_manifest_free(struct lb_manifest *m)
{
    free(m->disks);
    *m = (struct lb_manifest){0};
}

static json_t *file_json(const struct lb_manifest_file *f)
{
    return json_pack("{s:s, s:I, s:s}", "file", f->name, "bytes", (json_int_t)f->bytes, "sha256", f->sha256);
}

static json_t *disk_json(const struct lb_manifest_disk *d)
{
    json_t *o = file_json(&d->file);

    if (!o || json_object_set_new(o, "id", json_string(d->id)) < 0 ||
        json_object_set_new(o, "argv_path", json_string(d->argv_path)) < 0 ||
        json_object_set_new(o, "size_bytes", json_integer((json_int_t)d->size_bytes)) < 0) {
        json_decref(o);
        return NULL;
    }
    return o;
}

int lb_manifest_save(const char *folder, const struct lb_manifest *m, struct lb_error *err)
{
    LB_AUTO_FREE char *path = lb_asprintf("%s/" LB_MANIFEST_FILE, folder);
    json_t *disks = json_array();
    bool bad = false;

    for (unsigned i = 0; i < m->n_disks; i++)
        bad |= json_array_append_new(disks, disk_json(&m->disks[i])) < 0;
    json_t *o = json_pack("{s:s, s:i, s:s, s:I, s:b, s:o, s:o}", "format", FORMAT, "version", VERSION, "vm", m->vm,
                          "number", (json_int_t)m->number, "encrypted", (int)m->encrypted, "checkpoint",
                          file_json(&m->checkpoint), "disks", disks);
    LB_AUTO_FREE char *text = o && !bad ? json_dumps(o, JSON_INDENT(2)) : NULL;
    json_decref(o);
    if (!text) {
        lb_fail(err, LB_E_UNSUPPORTED, "cannot write the manifest: the name of a disk is not UTF-8");
        return lb_remedy(err, "rename the image file, or export without disks");
    }
    return lb_file_write_atomic(path, text, strlen(text), 0644, err);
}

static int get_file(const json_t *o, const char *name, struct lb_manifest_file *f)
{
    uint8_t sum[32];

    return lb_json_get_string(o, "file", f->name, sizeof(f->name)) || strcmp(f->name, name) ||
                   lb_json_get_u64(o, "bytes", INT64_MAX, &f->bytes) || lb_json_get_string(o, "sha256", f->sha256, sizeof(f->sha256)) ||
                   lb_unhex(sum, sizeof(sum), f->sha256) != (ssize_t)sizeof(sum)
               ? -1
               : 0;
}

static const char *parse(const json_t *o, struct lb_manifest *m)
{
    const json_t *disks = json_object_get(o, "disks");
    char format[64], name[32];
    uint64_t version, number;

    if (lb_json_get_string(o, "format", format, sizeof(format)) || strcmp(format, FORMAT))
        return "it is not a checkpoint's";
    if (lb_json_get_u64(o, "version", INT64_MAX, &version) || version != VERSION)
        return "it is of another version";
    if (lb_json_get_string(o, "vm", m->vm, sizeof(m->vm)) || !lb_vm_name_valid(m->vm))
        return "\"vm\" is missing or wrong";
    if (lb_json_get_u64(o, "number", INT64_MAX, &number) || number > UINT32_MAX || !json_is_boolean(json_object_get(o, "encrypted")))
        return "\"number\" or \"encrypted\" is missing or wrong";
    m->number = (uint32_t)number;
    m->encrypted = json_is_true(json_object_get(o, "encrypted"));
    if (get_file(json_object_get(o, "checkpoint"), LB_EXPORT_CHECKPOINT, &m->checkpoint))
        return "\"checkpoint\" is missing or wrong";
    if (!json_is_array(disks))
        return "\"disks\" is missing";
    m->disks = lb_alloc((json_array_size(disks) + 1) * sizeof(*m->disks));
    for (size_t i = 0; i < json_array_size(disks); i++) {
        struct lb_manifest_disk *d = &m->disks[m->n_disks++];
        const json_t *v = json_array_get(disks, i);
        snprintf(name, sizeof(name), LB_EXPORT_DISK, (unsigned)i);
        if (get_file(v, name, &d->file) || lb_json_get_string(v, "id", d->id, sizeof(d->id)) ||
            lb_json_get_string(v, "argv_path", d->argv_path, sizeof(d->argv_path)) ||
            lb_json_get_u64(v, "size_bytes", INT64_MAX, &d->size_bytes))
            return "an entry of \"disks\" is wrong";
    }
    return NULL;
}

int lb_manifest_load(const char *folder, struct lb_manifest *out, struct lb_error *err)
{
    LB_AUTO_FREE char *path = lb_asprintf("%s/" LB_MANIFEST_FILE, folder);
    LB_AUTO_FREE char *text = NULL;
    json_error_t jerr = {0};
    size_t len;

    *out = (struct lb_manifest){0};
    if (lb_file_read(path, MAX_BYTES, &text, &len, err))
        return lb_remedy(err, "name the folder that `lifeboat checkpoint export` made");
    json_t *o = json_loadb(text, len, JSON_REJECT_DUPLICATES, &jerr);
    const char *wrong = o ? parse(o, out) : jerr.text;
    if (wrong) {
        lb_manifest_free(out);
        lb_fail(err, LB_E_PROTO, "%s is wrong: %s", path, wrong);
    }
    json_decref(o);
    return wrong ? -1 : 0;
}

/* ---------------------------------------------------------------------- copying */

static int write_out(int fd, const char *buf, size_t len, const char *path, struct lb_error *err)
{
    while (len) {
        ssize_t n = write(fd, buf, len);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0) {
            lb_fail_errno(err, errno == ENOSPC || errno == EDQUOT ? LB_E_NO_SPACE : LB_E_INTERNAL, errno,
                          "cannot write %s", path);
            return errno == ENOSPC ? lb_remedy(err, "free space on the file system of %s", path) : -1;
        }
        buf += n;
        len -= (size_t)n;
    }
    return 0;
}

/* One pass over the file; `to` -1: only the sum. */
static int pass(int from, int to, const char *from_path, const char *to_path, struct lb_manifest_file *sum,
                struct lb_share *share, int cancel_fd, EVP_MD_CTX *md, struct lb_error *err)
{
    LB_AUTO_FREE char *buf = lb_alloc(COPY_BYTES);
    off_t size = lseek(from, 0, SEEK_END), at = 0;
    ssize_t n;

    while ((n = pread(from, buf, COPY_BYTES, at)) != 0) {
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot read %s", from_path);
        if (lb_readable(cancel_fd, 0))
            return lb_fail(err, LB_E_CANCELLED, "cancelled");
        if (EVP_DigestUpdate(md, buf, (size_t)n) != 1)
            return lb_fail(err, LB_E_INTERNAL, "cannot compute a SHA-256");
        if (to >= 0 && write_out(to, buf, (size_t)n, to_path, err))
            return -1;
        posix_fadvise(from, at, n, POSIX_FADV_DONTNEED); /* nobody else reads it soon */
        at += n;
        if (share)
            lb_share_progress((uint64_t)at, (uint64_t)LB_MAX(size, at), share);
    }
    sum->bytes = (uint64_t)at;
    return 0;
}

int lb_copy_sum(const char *from, const char *to, struct lb_manifest_file *sum, struct lb_share *share, int cancel_fd,
                struct lb_error *err)
{
    unsigned char digest[32];
    unsigned len = sizeof(digest);
    LB_AUTO_FD int in = open(from, O_RDONLY | O_CLOEXEC);
    LB_AUTO_FD int out = to ? open(to, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600) : -1;

    if (in < 0)
        return lb_fail_errno(err, errno == ENOENT ? LB_E_NOT_FOUND : LB_E_INTERNAL, errno, "cannot open %s", from);
    if (to && out < 0)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot create %s", to);
    EVP_MD_CTX *md = EVP_MD_CTX_new();
    int rc = md && EVP_DigestInit_ex(md, EVP_sha256(), NULL) == 1 ? 0 : lb_fail(err, LB_E_INTERNAL, "cannot compute a SHA-256");
    if (rc == 0)
        rc = pass(in, out, from, to, sum, share, cancel_fd, md, err);
    if (rc == 0 && EVP_DigestFinal_ex(md, digest, &len) != 1)
        rc = lb_fail(err, LB_E_INTERNAL, "cannot compute a SHA-256");
    EVP_MD_CTX_free(md);
    if (rc == 0 && out >= 0 && fsync(out) < 0)
        rc = lb_fail_errno(err, errno == ENOSPC ? LB_E_NO_SPACE : LB_E_INTERNAL, errno, "cannot write %s", to);
    if (rc == 0)
        lb_hex(sum->sha256, digest, sizeof(digest));
    return rc;
}
