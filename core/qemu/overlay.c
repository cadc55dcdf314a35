/*
 * core/qemu/overlay.c - disks that keep a moment: overlays, freezing, joining.
 *
 *      before      guest -> a.img
 *      made ready  guest -> a.img            a.lb-1.qcow2 (empty, its header names a.img)
 *      frozen      guest -> a.lb-1.qcow2 -> a.img (read only from now on)
 *      joined      guest -> a.img            a.lb-1.qcow2 (nobody's)
 *
 * Making ready does what takes time while the guest runs: QEMU itself makes the image (blockdev-create)
 * and opens it, so that whatever keeps it from doing so - rights, a confinement, no room - is known
 * before the pause.  Freezing is one `transaction` of blockdev-snapshot for all disks: QEMU flushes
 * each, all are switched or none.
 *
 * In its header an overlay names its backing file by its bare name when both are in one directory, so
 * that the pair may be seen under another path by another host.
 *
 * Names of nodes follow from the path, "lb-o...": what a session that died made ready has no backing node
 * yet and is found by that.
 */
#include "core/qemu/qemu_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <xxhash.h>

#define CREATE_MS 10000u
#define CLOSE_MS 2000u
#define TICK_MS 20u
#define NODE "lb-o"

struct lb_qemu_overlay {
    char node[24];
    char below[64];     /* node of the image that it will stand on */
    char *id, *path;
};

struct lb_qemu_join {
    char job[24];
    bool ready, ended;
    char error[256];
};

static const char *str(const json_t *obj, const char *key)
{
    return json_string_value(json_object_get(obj, key));
}

/* args: stolen. */
static int command(struct lb_hv_vm *vm, const char *cmd, json_t *args, json_t **ret, struct lb_error *err)
{
    char *text = json_dumps(args, JSON_COMPACT);
    json_decref(args);
    if (!text)
        return lb_fail(err, LB_E_USAGE, "%s: a name of the disk is not UTF-8", cmd);
    int rc = lb_qmp_cmd(vm->qmp, cmd, text, ret, err);
    free(text);
    return rc;
}

/* -------------------------------------------------------- can it have one? */

static int refuse(struct lb_error *err, const char *id, const char *why, const char *remedy)
{
    lb_fail(err, LB_E_UNSUPPORTED, "disk %s cannot be frozen: %s", id, why);
    return lb_remedy(err, "%s, or leave the disks out with --no-disk", remedy);
}

static json_t *graph_node(const json_t *graph, const char *key, const json_t *value)
{
    json_t *n;
    size_t i;
    json_array_foreach(json_object_get(graph, "nodes"), i, n)
        if (json_equal(json_object_get(n, key), value))
            return n;
    return NULL;
}

/* Does a job, of ours or of an operator, stand on this node? The graph is for debugging, says QEMU; where
 * it is not there, only our own jobs are known, by their names. */
static bool has_job(struct lb_hv_vm *vm, const char *id, json_t *node)
{
    json_t *graph = NULL, *jobs = NULL, *e;
    size_t i;
    bool found = false;
    char mirror[20];
    lb_qemu_mirror_name(mirror, id);
    if (lb_qmp_cmd(vm->qmp, "query-block-jobs", NULL, &jobs, NULL) == 0)
        json_array_foreach(jobs, i, e)
            found |= str(e, "device") && strcmp(str(e, "device"), mirror) == 0;
    if (!found && json_array_size(jobs) > 0 &&
        lb_qmp_cmd(vm->qmp, "x-debug-query-block-graph", NULL, &graph, NULL) == 0) {
        const json_t *number = json_object_get(graph_node(graph, "name", node), "id");
        json_array_foreach(json_object_get(graph, "edges"), i, e)
        {
            const json_t *parent = graph_node(graph, "id", json_object_get(e, "parent"));
            const char *type = str(parent, "type");
            found |= number && json_equal(json_object_get(e, "child"), number) && type &&
                     strcmp(type, "block-job") == 0;
        }
    }
    json_decref(jobs);
    json_decref(graph);
    return found;
}

/* The whole of the file is the disk? A raw node may show a part of it. */
static bool is_part(const char *file)
{
    json_t *j = file && strncmp(file, "json:", 5) == 0 ? json_loads(file + 5, 0, NULL) : NULL;
    bool part = json_object_get(j, "offset") || json_object_get(j, "size");
    json_decref(j);
    return part;
}

static int check_disk(struct lb_hv_vm *vm, const char *id, const json_t *b, char path[512],
                      struct stat *st, struct lb_error *err)
{
    const json_t *in = json_object_get(b, "inserted");
    const char *file = str(in, "file"), *format = str(in, "drv");
    if (!in || !str(in, "node-name"))
        return refuse(err, id, "it is empty", "insert a medium");
    if (json_is_true(json_object_get(in, "ro")))
        return refuse(err, id, "it is read only", "nothing has to be frozen");
    if ((file && strstr(file, "\"locking\": \"off\"")) || lb_qemu_share_rw(vm, str(b, "qdev")))
        return refuse(err, id, "other machines may write it too (share-rw or locking=off)",
                      "give the VM a disk of its own");
    if (!format || (strcmp(format, "raw") != 0 && strcmp(format, "qcow2") != 0 &&
                    strcmp(format, "file") != 0 && strcmp(format, "host_device") != 0))
        return refuse(err, id, "its format is neither raw nor qcow2", "convert it to qcow2");
    if (json_is_true(json_object_get(in, "encrypted")))
        return refuse(err, id, "it is encrypted by QEMU", "encrypt inside the guest or below QEMU");
    if (is_part(file))
        return refuse(err, id, "it is a part of its file (offset= or size=)",
                      "give it a file of its own");
    lb_qemu_disk_path(path, vm->proc.pid, file);
    if (!path[0])
        return refuse(err, id, "it is in no file of this host", "use an image in a file");
    if (stat(path, st) < 0) {
        lb_fail_errno(err, LB_E_UNSUPPORTED, errno, "disk %s cannot be frozen: %s", id, path);
        return lb_remedy(err, "its image must be in this host's file system (no -snapshot), or leave the "
                              "disks out with --no-disk");
    }
    if (has_job(vm, id, json_object_get(in, "node-name")))
        return refuse(err, id, "it is being copied (a protected VM, or a block job of its operator)",
                      "end that first");
    return 0;
}

/* --------------------------------------------------------------- its image */

/* A file of the base's owner with its rights; the caller has to own it or be root. */
static int make_file(const char *path, const struct stat *base, struct lb_error *err)
{
    LB_AUTO_FD int fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0) {
        int e = errno;
        lb_fail_errno(err, e == EEXIST ? LB_E_EXISTS : e == ENOSPC ? LB_E_NO_SPACE : LB_E_INTERNAL, e,
                      "cannot make the overlay %s", path);
        return lb_remedy(err, "the directory of the disk must be writable and have room");
    }
    if ((base->st_uid != geteuid() && fchown(fd, base->st_uid, base->st_gid) < 0) ||
        fchmod(fd, (base->st_mode & 0666) | 0600) < 0) {
        int e = errno;
        unlink(path);
        return lb_fail_errno(err, LB_E_INTERNAL, e, "cannot give %s to the owner of the disk", path);
    }
    return 0;
}

/* The image and its directory entry are on the disk. */
static int make_durable(const char *path, struct lb_error *err)
{
    LB_AUTO_FREE char *dir = lb_strdup(path);
    char *slash = strrchr(dir, '/');
    slash[slash == dir] = 0;
    LB_AUTO_FD int fd = open(path, O_RDONLY | O_CLOEXEC);
    LB_AUTO_FD int dir_fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0 || dir_fd < 0 || fsync(fd) < 0 || fsync(dir_fd) < 0)
        return lb_fail_errno(err, errno == ENOSPC ? LB_E_NO_SPACE : LB_E_INTERNAL, errno,
                             "cannot write the overlay %s", path);
    return 0;
}

/* What the overlay's header says. A name with a colon would be taken for a protocol. */
static char *backing_name(const char *overlay, const char *base)
{
    const char *a = strrchr(overlay, '/'), *b = strrchr(base, '/');
    if (a - overlay != b - base || strncmp(overlay, base, (size_t)(a - overlay)) != 0)
        return lb_strdup(base);
    return lb_asprintf("%s%s", strchr(b, ':') ? "./" : "", b + 1);
}

int lb_qemu_close_node(struct lb_hv_vm *vm, const char *node, struct lb_error *err)
{
    uint64_t deadline = lb_now_ns() + CLOSE_MS * UINT64_C(1000000);
    for (;;) {
        struct lb_error why = LB_ERROR_INIT;
        if (command(vm, "blockdev-del", json_pack("{s:s}", "node-name", node), NULL, &why) == 0 ||
            strstr(why.message, "ailed to find node"))
            return 0;
        /* a job lets go of its nodes a moment after its last event */
        if (!strstr(why.message, "in use") || lb_now_ns() >= deadline) {
            if (err)
                *err = why;
            return -1;
        }
        lb_sleep_ms(2);
    }
}

static int wait_created(struct lb_hv_vm *vm, const char *job, struct lb_error *err)
{
    uint64_t deadline = lb_now_ns() + CREATE_MS * UINT64_C(1000000);
    for (;; lb_sleep_ms(1)) {
        json_t *jobs = NULL, *j;
        size_t i;
        bool ended = true;
        LB_AUTO_FREE char *failed = NULL;
        if (lb_qmp_cmd(vm->qmp, "query-jobs", NULL, &jobs, err) < 0)
            return -1;
        json_array_foreach(jobs, i, j)
        {
            if (!str(j, "id") || strcmp(str(j, "id"), job) != 0)
                continue;
            ended = str(j, "status") && strcmp(str(j, "status"), "concluded") == 0;
            if (!failed)
                failed = lb_strdup(str(j, "error"));
        }
        json_decref(jobs);
        if (!ended && lb_now_ns() < deadline)
            continue;
        if (ended && command(vm, "job-dismiss", json_pack("{s:s}", "id", job), NULL, err) < 0)
            return -1;
        if (failed)
            return lb_fail(err, LB_E_HV, "QEMU cannot make the overlay: %s", failed);
        return ended ? 0 : lb_fail(err, LB_E_HV, "QEMU does not make the overlay in time");
    }
}

/* An empty image in the file, by QEMU's own code. */
static int make_image(struct lb_hv_vm *vm, const struct lb_qemu_overlay *o, const char *base,
                      const json_t *in, struct lb_error *err)
{
    LB_AUTO_FREE char *below = backing_name(o->path, base);
    const char *format = str(in, "drv");
    bool qcow2 = strcmp(format, "qcow2") == 0;
    json_t *size = json_object_get(json_object_get(in, "image"), "virtual-size");
    if (command(vm, "blockdev-add", json_pack("{s:s,s:s,s:s}", "driver", "file", "node-name", o->node,
                                              "filename", o->path), NULL, err) < 0)
        return -1;
    int rc = command(vm, "blockdev-create",
                     json_pack("{s:s,s:{s:s,s:s,s:O,s:s,s:s}}", "job-id", o->node, "options",
                               "driver", "qcow2", "file", o->node, "size", size, "backing-file", below,
                               "backing-fmt", qcow2 ? "qcow2" : "raw"), NULL, err);
    if (rc == 0)
        rc = wait_created(vm, o->node, err);
    if (lb_qemu_close_node(vm, o->node, rc == 0 ? err : NULL) < 0 || rc < 0)
        return -1;
    return make_durable(o->path, err);
}

/* What the command line says of the disk's file: key of -drive, or of the file's or the format's node. */
static char *said(const struct lb_qemu_opts *o, const struct lb_qemu_image *d, const char *key)
{
    if (!d)
        return NULL;
    LB_AUTO_FREE char *under = lb_asprintf("file.%s", key);
    char *v = lb_qemu_get(o->v[d->file_opt].value, key);
    if (!v)
        v = lb_qemu_get(o->v[d->file_opt].value, under);
    return v ? v : lb_qemu_get(o->v[d->opt].value, key);
}

/* How the image is opened: as the one it takes the place of. What QEMU does not tell comes from the
 * command line. */
static json_t *open_options(struct lb_hv_vm *vm, const json_t *all, const json_t *b,
                            const struct lb_qemu_overlay *o)
{
    const json_t *in = json_object_get(b, "inserted"), *cache = json_object_get(in, "cache");
    const char *zeroes = str(in, "detect_zeroes");
    struct lb_qemu_opts opts = {0};
    struct lb_qemu_images images = {0};
    char **argv = NULL;
    if (lb_proc_cmdline(vm->proc.pid, &argv, NULL) == 0 && lb_qemu_opts_parse(argv, &opts, NULL) == 0)
        lb_qemu_images_scan(&opts, &images);
    const struct lb_qemu_image *d = lb_qemu_image_of(&opts, &images, all, b);
    LB_AUTO_FREE char *aio = said(&opts, d, "aio"), *discard = said(&opts, d, "discard");
    bool unmap = discard && (strcmp(discard, "unmap") == 0 || strcmp(discard, "on") == 0);
    json_t *direct = json_object_get(cache, "direct"), *no_flush = json_object_get(cache, "no-flush");
    json_t *file = json_pack("{s:s,s:s,s:s,s:{s:O,s:O}}", "driver", "file", "filename", o->path,
                             "discard", unmap ? "unmap" : "ignore", "cache", "direct", direct,
                             "no-flush", no_flush);
    if (aio)
        json_object_set_new(file, "aio", json_string(aio));
    json_t *node = json_pack("{s:s,s:s,s:n,s:s,s:s,s:{s:O,s:O},s:o}", "driver", "qcow2", "node-name",
                             o->node, "backing", "discard", unmap ? "unmap" : "ignore", "detect-zeroes",
                             zeroes ? zeroes : "off", "cache", "direct", direct, "no-flush", no_flush,
                             "file", file);
    lb_qemu_images_free(&images);
    lb_qemu_opts_free(&opts);
    lb_strv_free(argv);
    return node;
}

/* ------------------------------------------------------------- made ready */

static void free_overlay(struct lb_qemu_overlay *o)
{
    free(o->id);
    free(o->path);
}

void lb_qemu_overlays_free(struct lb_hv_vm *vm)
{
    for (unsigned i = 0; i < vm->n_overlays; i++)
        free_overlay(&vm->overlays[i]);
    free(vm->overlays);
    vm->overlays = NULL;
    vm->n_overlays = 0;
}

const char *lb_qemu_overlay_path(const struct lb_hv_vm *vm, unsigned i)
{
    return vm->overlays[i].path;
}

static json_t *find_entry(json_t *all, const char *id)
{
    json_t *b;
    size_t i;
    json_array_foreach(all, i, b)
    {
        LB_AUTO_FREE char *have = lb_qemu_disk_id(b);
        if (have && strcmp(have, id) == 0)
            return b;
    }
    return NULL;
}

static int make_ready(struct lb_hv_vm *vm, const json_t *all, const json_t *b,
                      const struct lb_qemu_overlay *o, struct lb_error *err)
{
    char base[512];
    struct stat st;
    if (check_disk(vm, o->id, b, base, &st, err) < 0 || make_file(o->path, &st, err) < 0)
        return -1;
    if (make_image(vm, o, base, json_object_get(b, "inserted"), err) < 0 ||
        command(vm, "blockdev-add", open_options(vm, all, b, o), NULL, err) < 0) {
        unlink(o->path);
        lb_context(err, "disk %s: overlay %s", o->id, o->path);
        return lb_remedy(err, "QEMU must be allowed to open new files in that directory (rights, "
                              "AppArmor, SELinux), or leave the disks out with --no-disk");
    }
    return 0;
}

int lb_qemu_disk_overlay(struct lb_hv_vm *vm, const char *id, const char *path, struct lb_error *err)
{
    json_t *all = NULL;
    struct lb_qemu_overlay o = {.id = lb_strdup(id), .path = lb_strdup(path)};
    int rc = -1;
    snprintf(o.node, sizeof(o.node), NODE "%08x",
             (unsigned)(XXH3_64bits(path, strlen(path)) & 0xffffffffu));
    for (unsigned i = 0; i < vm->n_overlays; i++)
        if (strcmp(vm->overlays[i].id, id) == 0) {
            lb_fail(err, LB_E_EXISTS, "disk %s has an overlay made ready already", id);
            goto out;
        }
    if (path[0] != '/') {
        lb_fail(err, LB_E_USAGE, "the path of an overlay must begin with /: %s", path);
        goto out;
    }
    if (vm->n_overlays == 0)
        lb_qemu_disk_overlay_drop(vm); /* of a session that died */
    if (lb_qmp_cmd(vm->qmp, "query-block", NULL, &all, err) < 0)
        goto out;
    json_t *b = find_entry(all, id);
    if (!b) {
        lb_fail(err, LB_E_NOT_FOUND, "VM %s has no disk %s", vm->name, id);
    } else if (make_ready(vm, all, b, &o, err) == 0) {
        const char *below = str(json_object_get(b, "inserted"), "node-name");
        snprintf(o.below, sizeof(o.below), "%s", below);
        vm->overlays = lb_realloc(vm->overlays, (vm->n_overlays + 1) * sizeof(o));
        vm->overlays[vm->n_overlays++] = o;
        rc = 0;
    }
out:
    json_decref(all);
    if (rc < 0)
        free_overlay(&o);
    return rc;
}

/* Nodes of ours that stand on nothing: they were never used. */
static void close_unused(struct lb_hv_vm *vm)
{
    json_t *all = NULL, *n;
    size_t i;
    if (lb_qmp_cmd(vm->qmp, "query-named-block-nodes", "{\"flat\":true}", &all, NULL) < 0)
        return;
    json_array_foreach(all, i, n)
    {
        const char *node = str(n, "node-name");
        if (node && strncmp(node, NODE, strlen(NODE)) == 0 &&
            json_integer_value(json_object_get(n, "backing_file_depth")) == 0)
            command(vm, "blockdev-del", json_pack("{s:s}", "node-name", node), NULL, NULL);
    }
    json_decref(all);
}

void lb_qemu_disk_overlay_drop(struct lb_hv_vm *vm)
{
    struct lb_error why = LB_ERROR_INIT;
    for (unsigned i = 0; i < vm->n_overlays; i++) {
        const struct lb_qemu_overlay *o = &vm->overlays[i];
        if (lb_qemu_close_node(vm, o->node, &why) < 0 && !lb_qemu_dead(vm->pidfd))
            lb_log_error(LB_LOG_WARN, &why); /* its file may be in use: it stays */
        else
            unlink(o->path);
    }
    lb_qemu_overlays_free(vm);
    close_unused(vm);
}

int lb_qemu_disk_freeze(struct lb_hv_vm *vm, struct lb_error *err)
{
    json_t *actions = json_array();
    uint64_t t0 = lb_now_ns();
    for (unsigned i = 0; i < vm->n_overlays; i++)
        json_array_append_new(actions, json_pack("{s:s,s:{s:s,s:s}}", "type", "blockdev-snapshot", "data",
                                                 "node", vm->overlays[i].below, "overlay",
                                                 vm->overlays[i].node));
    if (vm->n_overlays == 0) {
        json_decref(actions);
        return 0;
    }
    if (command(vm, "transaction", json_pack("{s:o}", "actions", actions), NULL, err) < 0)
        return lb_context(err, "the disks cannot be frozen");
    lb_log(LB_LOG_DEBUG, "VM %s: %u disk(s) frozen in %.1f ms", vm->name, vm->n_overlays,
           (double)(lb_now_ns() - t0) / 1e6);
    lb_qemu_overlays_free(vm); /* used */
    return 0;
}

/* -------------------------------------------------------------------- join */

void lb_qemu_join_event(struct lb_hv_vm *vm, const char *event, const json_t *data)
{
    struct lb_qemu_join *j = vm->join;
    const char *job = str(data, "device"), *why = str(data, "error");
    if (!j || !job || strcmp(job, j->job) != 0)
        return;
    if (strcmp(event, "BLOCK_JOB_READY") == 0)
        j->ready = true;
    if (strcmp(event, "BLOCK_JOB_COMPLETED") == 0 || strcmp(event, "BLOCK_JOB_CANCELLED") == 0)
        j->ended = true;
    if (strcmp(event, "BLOCK_JOB_CANCELLED") == 0)
        why = "somebody cancelled it";
    if (why && !j->error[0])
        snprintf(j->error, sizeof(j->error), "%s", why);
}

static bool same_file(const char *a, const char *b)
{
    struct stat x, y;
    return strcmp(a, b) == 0 || (stat(a, &x) == 0 && stat(b, &y) == 0 && x.st_dev == y.st_dev &&
                                 x.st_ino == y.st_ino);
}

/* The node that shows the image as a disk; NULL: there is none. */
static char *image_node(struct lb_hv_vm *vm, const json_t *nodes, const char *path)
{
    const json_t *n;
    size_t i;
    json_array_foreach(nodes, i, n)
    {
        char file[512];
        const char *drv = str(n, "drv");
        lb_qemu_disk_path(file, vm->proc.pid, str(n, "file"));
        if (drv && strcmp(drv, "file") != 0 && strcmp(drv, "host_device") != 0 && file[0] &&
            same_file(file, path))
            return lb_strdup(str(n, "node-name"));
    }
    return NULL;
}

static int progress(struct lb_hv_vm *vm, const char *job, uint64_t *done, uint64_t *total,
                    struct lb_error *err)
{
    json_t *jobs = NULL, *j;
    size_t i;
    if (lb_qmp_cmd(vm->qmp, "query-block-jobs", NULL, &jobs, err) < 0)
        return -1;
    json_array_foreach(jobs, i, j)
    {
        if (!str(j, "device") || strcmp(str(j, "device"), job) != 0)
            continue;
        *done = (uint64_t)json_integer_value(json_object_get(j, "offset"));
        *total = (uint64_t)json_integer_value(json_object_get(j, "len"));
    }
    json_decref(jobs);
    return 0;
}

/* The images from top down to the one above base. NULL: base is not below top in this chain. */
static char **images_between(struct lb_hv_vm *vm, const json_t *in, const char *top, const char *base)
{
    unsigned n = 0;
    bool below = false;
    char **v = lb_alloc(sizeof(*v));
    for (const json_t *image = json_object_get(in, "image"); image;
         image = json_object_get(image, "backing-image")) {
        char file[512];
        lb_qemu_disk_path(file, vm->proc.pid, str(image, "filename"));
        below |= file[0] && same_file(file, top);
        if (below && file[0] && same_file(file, base) && n > 0)
            return v;
        if (below) {
            v = lb_realloc(v, (n + 2) * sizeof(*v));
            v[n++] = lb_strdup(file);
            v[n] = NULL;
        }
    }
    lb_strv_free(v);
    return NULL;
}

static bool is_one_of(const char *file, char *const *files)
{
    for (; *files; files++)
        if (strcmp(*files, file) == 0)
            return true;
    return false;
}

/* Nodes with a name of their own outlive what stood on them, and would count as standing on base. Format
 * nodes go before those of their files. */
static void close_joined(struct lb_hv_vm *vm, char *const *files)
{
    json_t *all = NULL, *n;
    size_t i;
    if (lb_qmp_cmd(vm->qmp, "query-named-block-nodes", "{\"flat\":true}", &all, NULL) < 0)
        return;
    for (int pass = 0; pass < 2; pass++) {
        json_array_foreach(all, i, n)
        {
            char file[512];
            struct lb_error why = LB_ERROR_INIT;
            const char *name = str(n, "node-name"), *drv = str(n, "drv");
            bool protocol = drv && (strcmp(drv, "file") == 0 || strcmp(drv, "host_device") == 0);
            lb_qemu_disk_path(file, vm->proc.pid, str(n, "file"));
            if (name && name[0] != '#' && protocol == (pass == 1) && is_one_of(file, files) &&
                lb_qemu_close_node(vm, name, &why) < 0)
                lb_log_error(LB_LOG_WARN, &why);
        }
    }
    json_decref(all);
}

/* Until the job has ended, by itself or because tick said so. */
static int follow(struct lb_hv_vm *vm, struct lb_qemu_join *j,
                  int (*tick)(uint64_t done, uint64_t total, void *arg), void *arg, struct lb_error *err)
{
    bool completing = false, cancelled = false;
    uint64_t done = 0, total = 0;
    while (!j->ended) {
        if (progress(vm, j->job, &done, &total, err) < 0)
            return -1;
        if (j->ready && !completing && !cancelled) {
            completing = true;
            if (command(vm, "block-job-complete", json_pack("{s:s}", "device", j->job), NULL, err) < 0)
                return -1;
        }
        if (!completing && !cancelled && tick && tick(done, total, arg) < 0) {
            cancelled = true;
            command(vm, "block-job-cancel",
                    json_pack("{s:s,s:b}", "device", j->job, "force", 1), NULL, NULL);
        }
        if (!j->ended)
            lb_sleep_ms(TICK_MS);
    }
    if (cancelled)
        return lb_fail(err, LB_E_CANCELLED, "the joining of images was cancelled");
    return j->error[0] ? lb_fail(err, LB_E_HV, "the joining of images failed: %s", j->error) : 0;
}

/* What the header of the image that stands on top is to say of base; NULL: nobody stands on it. */
static char *new_backing(struct lb_hv_vm *vm, const json_t *in, const char *top, const char *base)
{
    const json_t *image = json_object_get(in, "image"), *below;
    for (; (below = json_object_get(image, "backing-image")); image = below) {
        char above[512], file[512];
        lb_qemu_disk_path(above, vm->proc.pid, str(image, "filename"));
        lb_qemu_disk_path(file, vm->proc.pid, str(below, "filename"));
        if (above[0] && file[0] && same_file(file, top))
            return backing_name(above, base);
    }
    return NULL;
}

static int start_join(struct lb_hv_vm *vm, const struct lb_qemu_join *j, const json_t *in,
                      const char *top, const char *top_node, const char *base, const char *base_node,
                      struct lb_error *err)
{
    LB_AUTO_FREE char *name = new_backing(vm, in, top, base);
    json_t *args = json_pack("{s:s,s:s,s:s,s:s}", "job-id", j->job, "device", str(in, "node-name"),
                             "top-node", top_node, "base-node", base_node);
    if (name)
        json_object_set_new(args, "backing-file", json_string(name));
    return command(vm, "block-commit", args, NULL, err);
}

static int join(struct lb_hv_vm *vm, const json_t *in, const json_t *nodes, const char *top,
                const char *base, int (*tick)(uint64_t done, uint64_t total, void *arg), void *arg,
                struct lb_error *err)
{
    struct lb_qemu_join j = {.ready = false};
    char **files = images_between(vm, in, top, base);
    LB_AUTO_FREE char *top_node = image_node(vm, nodes, top), *base_node = image_node(vm, nodes, base);
    if (!files || !top_node || !base_node) {
        if (files)
            lb_strv_free(files);
        return lb_fail(err, LB_E_NOT_FOUND, "it does not stand on %s and that on %s", top, base);
    }
    snprintf(j.job, sizeof(j.job), "lb-j%08x", (unsigned)(XXH3_64bits(top, strlen(top)) & 0xffffffffu));
    vm->join = &j;
    int rc = start_join(vm, &j, in, top, top_node, base, base_node, err);
    if (rc == 0)
        rc = follow(vm, &j, tick, arg, err);
    vm->join = NULL;
    if (rc == 0)
        close_joined(vm, files);
    lb_strv_free(files);
    return rc;
}

int lb_qemu_disk_join(struct lb_hv_vm *vm, const char *id, const char *top, const char *base,
                      int (*tick)(uint64_t done, uint64_t total, void *arg), void *arg,
                      struct lb_error *err)
{
    json_t *nodes = NULL, *entry = lb_qemu_disk_entry(vm, id, err);
    if (!entry)
        return -1;
    int rc = lb_qmp_cmd(vm->qmp, "query-named-block-nodes", "{\"flat\":true}", &nodes, err);
    if (rc == 0)
        rc = join(vm, json_object_get(entry, "inserted"), nodes, top, base, tick, arg, err);
    json_decref(entry);
    json_decref(nodes);
    return rc < 0 ? lb_context(err, "disk %s", id) : 0;
}
