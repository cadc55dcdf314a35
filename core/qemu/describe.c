/*
 * core/qemu/describe.c - what a VM is, and what keeps it from travelling.
 *
 * Two sources: the command line, which the receiver's is derived from, and QMP,
 * which says what the VM is now.  Where they disagree (hot-plugged devices,
 * changed media) the receiver would differ from the source: a blocker.  Every
 * blocker reads "what: why: remedy".
 */
#include "core/qemu/qemu_internal.h"

#include <errno.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/utsname.h>

struct look {
    struct lb_hv_vm *vm;
    struct lb_vm_desc *out;
    struct lb_qemu_opts opts;
    unsigned n_blockers;
    char **blockers;
};

static void add_string(char ***v, unsigned *n, char *s)
{
    *v = lb_realloc(*v, (*n + 2) * sizeof(**v));
    (*v)[(*n)++] = s;
    (*v)[*n] = NULL;
}

static void block(struct look *l, const char *fmt, ...) LB_PRINTF(2, 3);
static void block(struct look *l, const char *fmt, ...)
{
    va_list ap;
    char *s = NULL;
    va_start(ap, fmt);
    if (vasprintf(&s, fmt, ap) < 0)
        s = lb_strdup(fmt);
    va_end(ap);
    add_string(&l->blockers, &l->n_blockers, s);
}

/* NULL when QEMU does not know it (older, newer) */
static json_t *try_query(struct look *l, const char *cmd, const char *args)
{
    json_t *ret = NULL;
    lb_qmp_cmd(l->vm->qmp, cmd, args, &ret, NULL);
    return ret;
}

static json_t *qom_get(struct look *l, const char *path, const char *prop)
{
    LB_AUTO_FREE char *args = lb_asprintf("{\"path\":\"%s\",\"property\":\"%s\"}", path, prop);
    return try_query(l, "qom-get", args);
}

static char *take_string(json_t *j)
{
    char *s = lb_strdup(json_string_value(j));
    json_decref(j);
    return s;
}

static const char *str(const json_t *obj, const char *key)
{
    return json_string_value(json_object_get(obj, key));
}

/* --------------------------------------------------------------- process */

static char *read_link(pid_t pid, const char *what)
{
    char path[64], buf[4096];
    snprintf(path, sizeof(path), "/proc/%d/%s", (int)pid, what);
    ssize_t n = readlink(path, buf, sizeof(buf) - 1);
    if (n < 0)
        return NULL;
    buf[n] = 0;
    char *gone = strstr(buf, " (deleted)"); /* the package was upgraded: the path still counts */
    if (gone)
        *gone = 0;
    return lb_strdup(buf);
}

static int look_at_process(struct look *l, struct lb_error *err)
{
    struct lb_vm_desc *d = l->out;
    pid_t pid = l->vm->proc.pid;
    char path[64];
    LB_AUTO_FREE char *status = NULL;
    struct utsname u;
    snprintf(path, sizeof(path), "/proc/%d/status", (int)pid);
    if (lb_file_read(path, 65536, &status, NULL, err) < 0)
        return -1;
    const char *uid = strstr(status, "\nUid:"), *gid = strstr(status, "\nGid:");
    if (!uid || !gid || sscanf(uid, " Uid: %*u %u", &d->uid) != 1 ||
        sscanf(gid, " Gid: %*u %u", &d->gid) != 1)
        return lb_fail(err, LB_E_INTERNAL, "cannot understand %s", path);
    d->emulator = read_link(pid, "exe");
    d->cwd = read_link(pid, "cwd");
    d->kernel_release = lb_strdup(uname(&u) == 0 ? u.release : "");
    return d->emulator && d->cwd ? 0
                                 : lb_fail_errno(err, LB_E_INTERNAL, errno,
                                                 "cannot look at process %d", (int)pid);
}

/* The command line without what launch added. */
static int look_at_argv(struct look *l, struct lb_error *err)
{
    char **argv = NULL;
    struct lb_qemu_opts all = {0};
    if (lb_proc_cmdline(l->vm->proc.pid, &argv, err) < 0)
        return -1;
    int rc = lb_qemu_opts_parse(argv, &all, err);
    lb_strv_free(argv);
    if (rc < 0)
        return -1;
    l->opts.emulator = lb_strdup(all.emulator);
    for (unsigned i = 0; i < all.n; i++) {
        const struct lb_qemu_opt *o = &all.v[i];
        LB_AUTO_FREE char *id = NULL;
        if (lb_qemu_opt_is(o, "chardev"))
            id = lb_qemu_prop(o->value, "id");
        else if (lb_qemu_opt_is(o, "mon"))
            id = lb_qemu_prop(o->value, "chardev");
        if ((id && strncmp(id, "lb-", 3) == 0) || lb_qemu_opt_is(o, "S") ||
            lb_qemu_opt_is(o, "incoming"))
            continue;
        LB_AUTO_FREE char *own = lb_qemu_opt_is(o, "object") ? lb_qemu_ordinary_memory(o->value) : NULL;
        lb_qemu_opts_add(&l->opts, o->name, own ? own : o->value);
    }
    lb_qemu_opts_free(&all);
    l->out->argv = lb_qemu_opts_argv(&l->opts);
    return 0;
}

/* --------------------------------------------------------------- machine */

static int by_name(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static void look_at_cpu(struct look *l)
{
    json_t *cpus = try_query(l, "query-cpus-fast", NULL);
    const char *path = str(json_array_get(cpus, 0), "qom-path");
    l->out->vcpus = (uint32_t)json_array_size(cpus);
    if (path) {
        l->out->cpu_model = take_string(qom_get(l, path, "type"));
        json_t *words = qom_get(l, path, "feature-words"), *w;
        size_t i;
        unsigned n = 0;
        json_array_foreach(words, i, w)
        {
            const char *reg = str(w, "cpuid-register");
            add_string(&l->out->features, &n,
                       lb_asprintf("CPUID.%llX.%llu.%s:0x%08llx",
                                   (unsigned long long)json_integer_value(
                                       json_object_get(w, "cpuid-input-eax")),
                                   (unsigned long long)json_integer_value(
                                       json_object_get(w, "cpuid-input-ecx")),
                                   reg ? reg : "?",
                                   (unsigned long long)json_integer_value(
                                       json_object_get(w, "features"))));
        }
        json_decref(words);
        if (n > 1)
            qsort(l->out->features, n, sizeof(char *), by_name);
    }
    json_decref(cpus);
}

int lb_qemu_cpu_features(struct lb_hv_vm *vm, char ***out, struct lb_error *err)
{
    struct lb_vm_desc desc = {0};
    struct look l = {.vm = vm, .out = &desc};
    look_at_cpu(&l);
    *out = LB_STEAL_PTR(desc.features);
    lb_vm_desc_free(&desc);
    return *out ? 0 : lb_fail(err, LB_E_HV, "QEMU of VM %s does not tell what its processor offers", vm->name);
}

static void look_at_machine(struct look *l)
{
    struct lb_vm_desc *d = l->out;
    d->hypervisor = lb_strdup("qemu");
    d->hv_version = lb_asprintf("%d.%d.%d", l->vm->version[0], l->vm->version[1],
                                l->vm->version[2]);
    d->machine = lb_strdup(l->vm->machine);
    json_t *j = try_query(l, "query-kvm", NULL);
    d->accel = lb_strdup(json_is_true(json_object_get(j, "enabled")) ? "kvm" : "tcg");
    json_decref(j);
    j = try_query(l, "query-memory-size-summary", NULL);
    d->ram_bytes = (uint64_t)json_integer_value(json_object_get(j, "base-memory")) +
                   (uint64_t)json_integer_value(json_object_get(j, "plugged-memory"));
    json_decref(j);
    j = try_query(l, "query-uuid", NULL);
    d->uuid = lb_strdup(str(j, "UUID") ? str(j, "UUID") : "");
    json_decref(j);
    j = try_query(l, "query-name", NULL);
    d->name = lb_strdup(l->vm->name[0] ? l->vm->name : str(j, "name") ? str(j, "name") : "");
    json_decref(j);
    j = try_query(l, "query-target", NULL);
    const char *arch = str(j, "arch");
    if (arch && strcmp(arch, "x86_64") != 0 && strcmp(arch, "i386") != 0)
        block(l, "architecture %s: device state can be saved on x86 only: use qemu-system-x86_64",
              arch);
    json_decref(j);
}

/* ------------------------------------------------------------------ disks */

static bool on_command_line(const struct look *l, const char *path)
{
    LB_AUTO_FREE char *set = lb_qemu_prop_set("x", "f", path); /* commas doubled */
    for (unsigned i = 0; i < l->opts.n; i++)
        if (l->opts.v[i].value &&
            (strstr(l->opts.v[i].value, path) || strstr(l->opts.v[i].value, set + 4)))
            return true;
    return false;
}

static bool have_disk(const struct look *l, const char *path)
{
    for (unsigned i = 0; i < l->out->n_disks; i++)
        if (strcmp(l->out->disks[i].path, path) == 0)
            return true;
    return false;
}

static struct lb_disk_desc *add_disk(struct look *l, const char *id, const char *path,
                                     const char *format, bool read_only)
{
    struct lb_vm_desc *d = l->out;
    d->disks = lb_realloc(d->disks, (d->n_disks + 1) * sizeof(*d->disks));
    struct lb_disk_desc *k = &d->disks[d->n_disks++];
    bool plain = format && (strcmp(format, "file") == 0 || strcmp(format, "host_device") == 0);
    *k = (struct lb_disk_desc){.id = lb_strdup(id ? id : ""), .path = lb_strdup(path),
                               .format = lb_strdup(plain ? "raw" : format ? format : ""),
                               .read_only = read_only};
    return k;
}

/* One disk as it is now, and what the command line calls it. */
static void look_at_disk(struct look *l, const struct lb_qemu_images *images, const json_t *all,
                         const json_t *b, bool daemonized)
{
    const json_t *in = json_object_get(b, "inserted");
    const char *name = str(in, "file");
    if (!name || !*name)
        return;
    LB_AUTO_FREE char *id = lb_qemu_disk_id(b);
    LB_AUTO_FREE char *file = lb_qemu_image_file(name);
    const struct lb_qemu_image *first = lb_qemu_image_of(&l->opts, images, all, b);
    struct lb_disk_desc *k = add_disk(l, id, file ? file : name, str(in, "drv"),
                                      json_is_true(json_object_get(in, "ro")));
    k->shareable = strstr(name, "\"locking\": \"off\"") || lb_qemu_share_rw(l->vm, str(b, "qdev"));
    if (file && first && first->path) {
        if (strcmp(first->path, file) != 0)
            k->argv_path = lb_strdup(first->path);
    } else if (strncmp(name, "json:", 5) != 0 && !on_command_line(l, k->path)) {
        block(l, "disk %s (%s): it was attached or changed after the start, so a receiver would start "
                 "without it: restart the VM with it on the command line", k->id, k->path);
    }
    if (daemonized && file && file[0] != '/')
        block(l, "disk %s (%s): its relative path belongs to a directory that -daemonize left: restart "
                 "the VM with an absolute path", k->id, k->path);
}

static bool made_ready(const struct look *l, const char *path)
{
    for (unsigned i = 0; i < l->vm->n_overlays; i++)
        if (strcmp(lb_qemu_overlay_path(l->vm, i), path) == 0)
            return true;
    return false;
}

/* Files that other images stand on, and nodes without a device. */
static void look_at_backing(struct look *l)
{
    json_t *all = try_query(l, "query-named-block-nodes", NULL), *n;
    size_t i;
    json_array_foreach(all, i, n)
    {
        const char *drv = str(n, "drv"), *file = str(n, "file");
        if (drv && file && (strcmp(drv, "file") == 0 || strcmp(drv, "host_device") == 0) &&
            !have_disk(l, file) && !made_ready(l, file))
            add_disk(l, str(n, "node-name"), file, drv, json_is_true(json_object_get(n, "ro")))->backing =
                true;
    }
    json_decref(all);
}

static void look_at_disks(struct look *l)
{
    bool daemonized = false;
    for (unsigned i = 0; i < l->opts.n; i++)
        daemonized |= lb_qemu_opt_is(&l->opts.v[i], "daemonize");
    json_t *all = try_query(l, "query-block", NULL), *b;
    struct lb_qemu_images images;
    size_t i;
    lb_qemu_images_scan(&l->opts, &images);
    json_array_foreach(all, i, b)
        look_at_disk(l, &images, all, b, daemonized);
    lb_qemu_images_free(&images);
    json_decref(all);
    look_at_backing(l);
}

/* --------------------------------------------------------------- blockers */

static const struct {
    const char *prefix, *why;
} bad_devices[] = {
    {"vfio-", "its DMA cannot be tracked: use virtio, or unplug it first"},
    {"vhost-user-", "another process writes this VM's memory untracked: use the in-QEMU or kernel "
                    "back end"},
    {"vhost-vdpa-", "hardware writes this VM's memory untracked: use virtio with a kernel back end"},
    {"usb-host", "a USB device of this host cannot follow: unplug it first"},
    {"ivshmem-", "memory shared with other processes cannot follow: remove it"},
    {"scsi-generic", "a SCSI device of this host cannot follow: use scsi-hd on a shared image"},
    {"tpm-passthrough", "the TPM of this host cannot follow: use the emulator"},
    {"sgx-epc", "SGX memory cannot be read: run the VM without it"},
    {"nvdimm", "its persistent memory file would stay behind: use a disk"},
};

static void check_device(struct look *l, const char *dir, const char *id, const char *type)
{
    for (unsigned i = 0; i < LB_ARRAY_LEN(bad_devices); i++)
        if (strncmp(type, bad_devices[i].prefix, strlen(bad_devices[i].prefix)) == 0)
            block(l, "device %s (%s): %s", id, type, bad_devices[i].why);
    LB_AUTO_FREE char *path = lb_asprintf("%s/%s", dir, id);
    json_t *hot = qom_get(l, path, "hotplugged");
    if (json_is_true(hot))
        block(l, "device %s (%s): it was plugged after the start, so a receiver would start without "
                 "it: unplug it, or restart the VM with it on the command line", id, type);
    json_decref(hot);
}

/* Every -device with an id must still be there. */
static void check_unplugged(struct look *l, json_t *present)
{
    for (unsigned k = 0; k < l->opts.n; k++) {
        if (!lb_qemu_opt_is(&l->opts.v[k], "device"))
            continue;
        const char *value = l->opts.v[k].value;
        LB_AUTO_FREE char *id = NULL;
        if (value[0] == '{') {
            json_t *j = json_loads(value, 0, NULL);
            id = lb_strdup(str(j, "id"));
            json_decref(j);
        } else {
            id = lb_qemu_prop(value, "id");
        }
        bool found = !id;
        size_t i;
        json_t *p;
        json_array_foreach(present, i, p)
            found |= id && str(p, "name") && strcmp(str(p, "name"), id) == 0;
        if (!found)
            block(l, "device %s: it is on the command line but was unplugged, so a receiver would "
                     "start with it: plug it in again or restart the VM without it", id);
    }
}

static void check_devices(struct look *l)
{
    static const char *const dirs[] = {"/machine/peripheral", "/machine/peripheral-anon"};
    for (unsigned d = 0; d < LB_ARRAY_LEN(dirs); d++) {
        LB_AUTO_FREE char *args = lb_asprintf("{\"path\":\"%s\"}", dirs[d]);
        json_t *list = try_query(l, "qom-list", args), *p;
        size_t i;
        json_array_foreach(list, i, p)
        {
            const char *type = str(p, "type"), *id = str(p, "name");
            if (!type || !id || strncmp(type, "child<", 6) != 0)
                continue;
            LB_AUTO_FREE char *bare = lb_asprintf("%.*s", (int)strlen(type) - 7, type + 6);
            check_device(l, dirs[d], id, bare);
        }
        if (d == 0 && list)
            check_unplugged(l, list);
        json_decref(list);
    }
}

static void check_options(struct look *l)
{
    static const char *const fd_keys[] = {"fd", "fds", "vhostfd", "vhostfds"};
    for (unsigned i = 0; i < l->opts.n; i++) {
        const struct lb_qemu_opt *o = &l->opts.v[i];
        bool fd = lb_qemu_opt_is(o, "add-fd") ||
                  (o->value && (strstr(o->value, "/dev/fdset/") || strstr(o->value, "\"fd\"")));
        for (unsigned k = 0; o->value && k < LB_ARRAY_LEN(fd_keys); k++) {
            LB_AUTO_FREE char *v = lb_qemu_prop(o->value, fd_keys[k]);
            fd |= v != NULL;
        }
        if (fd)
            block(l, "-%s %s: it uses a descriptor that whoever started QEMU opened: start QEMU with "
                     "a path or an interface name instead", o->name, o->value);
        if (lb_qemu_opt_is(o, "snapshot"))
            block(l, "-snapshot: the temporary overlays of the disks would stay behind: start the VM "
                     "without it");
        if (!o->value)
            continue;
        LB_AUTO_FREE char *type = lb_qemu_prop(o->value, NULL);
        if (type && lb_qemu_opt_is(o, "netdev") &&
            (strcmp(type, "vhost-user") == 0 || strcmp(type, "vhost-vdpa") == 0))
            block(l, "network %s: another process or hardware writes this VM's memory untracked: use "
                     "a tap", o->value);
        if (type && lb_qemu_opt_is(o, "tpmdev") && strcmp(type, "passthrough") == 0)
            block(l, "-tpmdev %s: the TPM of this host cannot follow: use the emulator", o->value);
        if (strstr(o->value, "sev-guest") || strstr(o->value, "sev-snp-guest") ||
            strstr(o->value, "tdx-guest"))
            block(l, "-%s %s: encrypted memory cannot be read: run the VM without it", o->name,
                  o->value);
    }
}

static void check_migration(struct look *l)
{
    json_t *m = try_query(l, "query-migrate", NULL), *reason;
    size_t i;
    json_array_foreach(json_object_get(m, "blocked-reasons"), i, reason)
        block(l, "QEMU refuses: %s: remove what it names",
              json_string_value(reason) ? json_string_value(reason) : "?");
    const char *status = str(m, "status");
    static const char *const busy[] = {"setup", "active", "device", "pre-switchover", "colo",
                                       "postcopy-active", "cancelling", "wait-unplug"};
    for (i = 0; status && i < LB_ARRAY_LEN(busy); i++)
        if (strcmp(status, busy[i]) == 0)
            block(l, "QEMU migrates by itself (%s): two migrations disturb each other: wait for it or "
                     "cancel it", status);
    json_decref(m);
}

int lb_qemu_describe(struct lb_hv_vm *vm, struct lb_vm_desc *out, struct lb_error *err)
{
    struct look l = {.vm = vm, .out = out};
    int rc = -1;
    *out = (struct lb_vm_desc){0};
    if (look_at_process(&l, err) < 0 || look_at_argv(&l, err) < 0)
        goto out;
    look_at_machine(&l);
    look_at_cpu(&l);
    look_at_disks(&l);
    check_devices(&l);
    check_options(&l);
    check_migration(&l);
    if (lb_qemu_dead(vm->pidfd)) {
        lb_fail(err, LB_E_HV, "QEMU died while it was being described");
        goto out;
    }
    out->blockers = l.blockers ? l.blockers : lb_alloc(sizeof(char *));
    l.blockers = NULL;
    if (!out->features)
        out->features = lb_alloc(sizeof(char *));
    rc = 0;
out:
    lb_qemu_opts_free(&l.opts);
    if (l.blockers)
        lb_strv_free(l.blockers);
    if (rc < 0)
        lb_vm_desc_free(out);
    return rc;
}
