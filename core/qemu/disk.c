/*
 * core/qemu/disk.c - writable disks, and copying them while the guest writes.
 *
 *      guest -> disk's node -> [mirror job, write-blocking] -> image
 *                                       \-> nbd node -> unix socket -> NBD server
 *
 * The job first copies what is there; a write of the guest is done when both sides have it, so at
 * every `stop` the server has seen everything.  What becomes of a job is told by events
 * (READY; ERROR, COMPLETED or CANCELLED when it ended), so that asking costs no command.
 *
 * A server that dies ends the job and lets the guest go on: `failed`.  Names of job and node
 * follow from the disk's: a session can end what a dead one left.
 */
#include "core/qemu/qemu_internal.h"

#include <errno.h>
#include <string.h>
#include <xxhash.h>

#define END_MS 10000

struct lb_qemu_mirror {
    char name[20];     /* of job and node */
    bool ready, ended, failed;
    char error[256];
};

static const char *str(const json_t *obj, const char *key)
{
    return json_string_value(json_object_get(obj, key));
}

/* ---------------------------------------------------------------- disks */

bool lb_qemu_share_rw(struct lb_hv_vm *vm, const char *qdev)
{
    json_t *on = NULL;
    if (!qdev)
        return false;
    LB_AUTO_FREE char *args =
        lb_asprintf("{\"path\":\"%s%s\",\"property\":\"share-rw\"}",
                    qdev[0] == '/' ? "" : "/machine/peripheral/", qdev);
    lb_qmp_cmd(vm->qmp, "qom-get", args, &on, NULL); /* not every device has it */
    bool share = json_is_true(on);
    json_decref(on);
    return share;
}

/* "json:{...}" is QEMU's name for what a plain name cannot say: the file is at the end of it. */
char *lb_qemu_image_file(const char *name)
{
    if (!name || !*name)
        return NULL;
    if (strncmp(name, "json:", 5) != 0) {
        size_t scheme = strcspn(name, ":/");
        return name[scheme] == ':' ? NULL : lb_strdup(name);
    }
    json_t *top = json_loads(name + 5, 0, NULL), *j = top;
    while (json_is_object(json_object_get(j, "file")))
        j = json_object_get(j, "file");
    const char *driver = str(j, "driver");
    bool file = driver && (strcmp(driver, "file") == 0 || strcmp(driver, "host_device") == 0);
    char *path = file ? lb_strdup(str(j, "filename")) : NULL;
    json_decref(top);
    return path;
}

void lb_qemu_disk_path(char out[512], pid_t pid, const char *name)
{
    char link[64], cwd[256];
    LB_AUTO_FREE char *file = lb_qemu_image_file(name);
    out[0] = 0;
    if (!file)
        return;
    if (file[0] == '/') {
        snprintf(out, 512, "%s", file);
        return;
    }
    snprintf(link, sizeof(link), "/proc/%d/cwd", (int)pid);
    ssize_t n = readlink(link, cwd, sizeof(cwd) - 1);
    if (n > 0)
        snprintf(out, 512, "%.*s/%.250s", (int)n, cwd, file);
}

char *lb_qemu_disk_id(const json_t *entry)
{
    static const char named[] = "/machine/peripheral/", inner[] = "/virtio-backend";
    const char *drive = str(entry, "device"), *qdev = str(entry, "qdev");
    if (drive && *drive)
        return lb_strdup(drive);
    if (!qdev)
        return lb_strdup(str(json_object_get(entry, "inserted"), "node-name"));
    if (strncmp(qdev, named, strlen(named)) == 0)
        qdev += strlen(named);
    size_t n = strlen(qdev), less = strlen(inner);
    bool shorter = n > less && strcmp(qdev + n - less, inner) == 0;
    return lb_asprintf("%.*s", (int)(shorter ? n - less : n), qdev);
}

json_t *lb_qemu_disk_entry(struct lb_hv_vm *vm, const char *id, struct lb_error *err)
{
    json_t *all = NULL, *b, *found = NULL;
    size_t i;
    if (lb_qmp_cmd(vm->qmp, "query-block", NULL, &all, err) < 0)
        return NULL;
    json_array_foreach(all, i, b)
    {
        LB_AUTO_FREE char *have = lb_qemu_disk_id(b);
        if (!found && have && strcmp(have, id) == 0)
            found = json_incref(b);
    }
    json_decref(all);
    if (!found)
        lb_fail(err, LB_E_NOT_FOUND, "VM %s has no disk %s", vm->name, id);
    return found;
}

static bool take_disk(struct lb_hv_vm *vm, const json_t *b, struct lb_hv_disk *d)
{
    const json_t *in = json_object_get(b, "inserted"), *image = json_object_get(in, "image");
    const char *file = str(in, "file");
    LB_AUTO_FREE char *id = lb_qemu_disk_id(b);
    if (!in || !id || json_is_true(json_object_get(in, "ro")))
        return false; /* an empty drive, or nothing that changes */
    *d = (struct lb_hv_disk){0};
    snprintf(d->id, sizeof(d->id), "%s", id);
    snprintf(d->format, sizeof(d->format), "%s", str(in, "drv") ? str(in, "drv") : "");
    d->size_bytes = (uint64_t)json_integer_value(json_object_get(image, "virtual-size"));
    lb_qemu_disk_path(d->path, vm->proc.pid, file);
    d->shareable = (file && strstr(file, "\"locking\": \"off\"")) ||
                   lb_qemu_share_rw(vm, str(b, "qdev"));
    return true;
}

int lb_qemu_disks(struct lb_hv_vm *vm, struct lb_hv_disk **out, unsigned *n, struct lb_error *err)
{
    json_t *all = NULL, *b;
    size_t i;
    if (lb_qmp_cmd(vm->qmp, "query-block", NULL, &all, err) < 0)
        return -1;
    struct lb_hv_disk *v = lb_alloc((json_array_size(all) + 1) * sizeof(*v));
    *n = 0;
    json_array_foreach(all, i, b)
        *n += take_disk(vm, b, &v[*n]);
    json_decref(all);
    *out = v;
    return 0;
}

/* --------------------------------------------------------------- mirrors */

void lb_qemu_mirror_name(char name[20], const char *id)
{
    snprintf(name, 20, "lb-m%08x", (unsigned)(XXH3_64bits(id, strlen(id)) & 0xffffffffu));
}

static struct lb_qemu_mirror *find_mirror(struct lb_hv_vm *vm, const char *name)
{
    for (unsigned i = 0; name && i < vm->n_mirrors; i++)
        if (strcmp(vm->mirrors[i].name, name) == 0)
            return &vm->mirrors[i];
    return NULL;
}

static struct lb_qemu_mirror *mirror_of(struct lb_hv_vm *vm, const char *id)
{
    char name[20];
    lb_qemu_mirror_name(name, id);
    return find_mirror(vm, name);
}

static struct lb_qemu_mirror *add_mirror(struct lb_hv_vm *vm, const char *id)
{
    vm->mirrors = lb_realloc(vm->mirrors, (vm->n_mirrors + 1) * sizeof(*vm->mirrors));
    struct lb_qemu_mirror *m = &vm->mirrors[vm->n_mirrors++];
    *m = (struct lb_qemu_mirror){.ready = false};
    lb_qemu_mirror_name(m->name, id);
    return m;
}

static void forget_mirror(struct lb_hv_vm *vm, struct lb_qemu_mirror *m)
{
    *m = vm->mirrors[--vm->n_mirrors];
}

void lb_qemu_mirrors_free(struct lb_hv_vm *vm)
{
    free(vm->mirrors);
    vm->mirrors = NULL;
    vm->n_mirrors = 0;
}

static void mirror_failed(struct lb_qemu_mirror *m, const char *why)
{
    m->failed = true;
    m->ready = false;
    if (!m->error[0])
        snprintf(m->error, sizeof(m->error), "%s", why);
}

void lb_qemu_mirror_event(struct lb_hv_vm *vm, const char *event, const json_t *data)
{
    struct lb_qemu_mirror *m = find_mirror(vm, str(data, "device"));
    const char *why = str(data, "error");
    if (!m)
        return;
    if (strcmp(event, "BLOCK_JOB_READY") == 0) {
        m->ready = !m->failed;
    } else if (strcmp(event, "BLOCK_JOB_ERROR") == 0) {
        const char *what = str(data, "operation");
        mirror_failed(m, what && strcmp(what, "read") == 0 ? "an error of a read of the disk"
                                                           : "an error of a write to the copy");
    } else if (strcmp(event, "BLOCK_JOB_COMPLETED") == 0) {
        m->ended = true;
        mirror_failed(m, why ? why : "somebody ended it");
    } else if (strcmp(event, "BLOCK_JOB_CANCELLED") == 0) {
        m->ended = true;
        mirror_failed(m, "somebody cancelled it");
    }
}

/* JSON text of a string, quotes included. */
static char *quoted(const char *s)
{
    json_t *j = json_string(s);
    char *text = j ? json_dumps(j, JSON_ENCODE_ANY) : NULL;
    json_decref(j);
    return text ? text : lb_strdup("\"\"");
}

static int command(struct lb_hv_vm *vm, const char *cmd, char *args, struct lb_error *err)
{
    int rc = lb_qmp_cmd(vm->qmp, cmd, args, NULL, err);
    free(args);
    return rc;
}

int lb_qemu_disk_mirror(struct lb_hv_vm *vm, const char *id, const char *nbd_socket,
                        const char *export_name, struct lb_error *err)
{
    if (mirror_of(vm, id))
        return lb_fail(err, LB_E_EXISTS, "disk %s is mirrored already", id);
    if (lb_qemu_disk_mirror_end(vm, id, err) < 0) /* of a session that died */
        return lb_context(err, "an old mirror of disk %s", id);
    json_t *entry = lb_qemu_disk_entry(vm, id, err);
    if (!entry)
        return -1;
    LB_AUTO_FREE char *disk = quoted(str(json_object_get(entry, "inserted"), "node-name"));
    json_decref(entry);
    struct lb_qemu_mirror *m = add_mirror(vm, id);
    LB_AUTO_FREE char *path = quoted(nbd_socket), *name = quoted(export_name);
    /* discard and detect-zeroes: what is zero or a hole stays one on the other side */
    char *node = lb_asprintf("{\"driver\":\"nbd\",\"node-name\":\"%s\",\"server\":{\"type\":\"unix\","
                             "\"path\":%s},\"export\":%s,\"reconnect-delay\":0,\"discard\":\"unmap\","
                             "\"detect-zeroes\":\"unmap\"}", m->name, path, name);
    char *job = lb_asprintf("{\"job-id\":\"%s\",\"device\":%s,\"target\":\"%s\",\"sync\":\"full\","
                            "\"copy-mode\":\"write-blocking\",\"on-target-error\":\"report\"}",
                            m->name, disk, m->name);
    if (command(vm, "blockdev-add", node, err) < 0) {
        free(job);
    } else if (command(vm, "blockdev-mirror", job, err) == 0) {
        return 0;
    } else {
        lb_qemu_close_node(vm, m->name, NULL);
    }
    forget_mirror(vm, mirror_of(vm, id));
    return lb_context(err, "cannot copy disk %s", id);
}

static int ask_progress(struct lb_hv_vm *vm, const char *name, struct lb_mirror_status *out,
                        struct lb_error *err)
{
    json_t *jobs = NULL, *j;
    size_t i;
    if (lb_qmp_cmd(vm->qmp, "query-block-jobs", NULL, &jobs, err) < 0)
        return -1;
    json_array_foreach(jobs, i, j)
    {
        const char *dev = str(j, "device");
        if (!dev || strcmp(dev, name) != 0)
            continue;
        out->done_bytes = (uint64_t)json_integer_value(json_object_get(j, "offset"));
        out->total_bytes = (uint64_t)json_integer_value(json_object_get(j, "len"));
    }
    json_decref(jobs);
    return 0;
}

int lb_qemu_disk_mirror_status(struct lb_hv_vm *vm, const char *id, bool poll,
                               struct lb_mirror_status *out, struct lb_error *err)
{
    char name[20];
    lb_qemu_mirror_name(name, id);
    *out = (struct lb_mirror_status){0};
    if (!find_mirror(vm, name))
        return lb_fail(err, LB_E_STATE, "disk %s is not mirrored", id);
    if ((poll ? ask_progress(vm, name, out, err) : lb_qmp_drain(vm->qmp, err)) < 0)
        return -1;
    const struct lb_qemu_mirror *m = find_mirror(vm, name);
    out->ready = m->ready;
    out->failed = m->failed;
    snprintf(out->error, sizeof(out->error), "%s", m->error);
    return 0;
}

int lb_qemu_disk_mirror_end(struct lb_hv_vm *vm, const char *id, struct lb_error *err)
{
    char name[20];
    struct lb_error why = LB_ERROR_INIT;
    lb_qemu_mirror_name(name, id);
    if (!find_mirror(vm, name))
        add_mirror(vm, id); /* of another session: its events matter from now on */
    uint64_t deadline = lb_now_ns() + END_MS * UINT64_C(1000000);
    int rc = command(vm, "block-job-cancel",
                     lb_asprintf("{\"device\":\"%s\",\"force\":true}", name), &why);
    bool there = rc == 0 || !strstr(why.message, "not found");
    while (there && !find_mirror(vm, name)->ended) {
        if (lb_now_ns() >= deadline)
            return lb_fail(err, LB_E_HV, "QEMU does not end the copy of disk %s", id);
        if (lb_qmp_wait_event(vm->qmp, END_MS, "the end of a mirror", err) < 0)
            return -1;
    }
    forget_mirror(vm, find_mirror(vm, name));
    return lb_qemu_close_node(vm, name, err);
}
