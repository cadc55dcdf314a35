/* migrate/preflight.c - what could go wrong, said before anything is touched.
 *
 * One function per check, each adding one or more lines under its stable id.  The
 * destination is asked about the command line as the receiver will get it: paths,
 * taps and the emulator mapped by this host's configuration.
 *
 * Source and destination may share a kernel (tests, the demo) or a file system
 * (shared storage), so the source's own locks and listeners are seen here: a lock
 * on a disk is expected, a listening socket under the same path is a real conflict. */
#include "migrate/preflight.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <jansson.h>
#include <pwd.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/utsname.h>

#include "core/qcow2.h"
#include "core/qemu/qemu.h"
#include "core/registry.h"
#include "core/qemu/argv_scan.h"
#include "core/host.h"
#include "core/json.h"
#include "migrate/maintenance.h"

/* What QEMU needs besides guest RAM: itself, device RAM, page tables. */
#define OVERHEAD_BYTES (UINT64_C(128) << 20)
#define MAX_SKEW_MS 1000

/* ------------------------------------------------------------------ report */

/* One line, UTF-8 or not: control characters would break the terminal. */
static void clean(char *s)
{
    for (; *s; s++)
        if ((unsigned char)*s < 0x20 || *s == 0x7f)
            *s = ' ';
}

void lb_report_add(struct lb_report *r, const char *id, enum lb_check_status s, const char *remedy,
                   const char *fmt, ...)
{
    assert(s != LB_CHECK_FAIL || (remedy && *remedy));
    r->v = lb_realloc(r->v, (r->n + 1) * sizeof(*r->v));
    struct lb_check *c = &r->v[r->n++];
    memset(c, 0, sizeof(*c));
    snprintf(c->id, sizeof(c->id), "%s", id);
    c->status = s;
    snprintf(c->remedy, sizeof(c->remedy), "%s", remedy ? remedy : "");
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(c->message, sizeof(c->message), fmt, ap);
    va_end(ap);
    clean(c->message);
    clean(c->remedy);
}

/* As lb_report_add, the remedy formatted too. */
static void refuse(struct lb_report *r, const char *id, const char *remedy, const char *fmt, ...)
    LB_PRINTF(4, 5);

static void refuse(struct lb_report *r, const char *id, const char *remedy, const char *fmt, ...)
{
    char text[384];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    lb_report_add(r, id, LB_CHECK_FAIL, remedy, "%s", text);
}

void lb_report_free(struct lb_report *r)
{
    free(r->v);
    *r = (struct lb_report){0};
}

bool lb_report_refused(const struct lb_report *r)
{
    for (unsigned i = 0; i < r->n; i++)
        if (r->v[i].status == LB_CHECK_FAIL)
            return true;
    return false;
}

char *lb_report_json(const struct lb_report *r)
{
    static const char *const names[] = {"ok", "warn", "fail"};
    json_t *list = json_array();
    for (unsigned i = 0; i < r->n; i++) {
        json_t *o = json_object();
        json_object_set_new(o, "id", lb_json_text(r->v[i].id));
        json_object_set_new(o, "status", json_string(names[r->v[i].status]));
        json_object_set_new(o, "message", lb_json_text(r->v[i].message));
        json_object_set_new(o, "remedy", lb_json_text(r->v[i].remedy));
        json_array_append_new(list, o);
    }
    char *text = json_dumps(list, JSON_COMPACT);
    json_decref(list);
    return text;
}

/* ------------------------------------------------------------------ source */

static void check_passthrough(const struct lb_arg_item *v, unsigned n, struct lb_report *r)
{
    unsigned found = 0;
    for (unsigned i = 0; i < n; i++) {
        if (v[i].kind == LB_ARG_PASSTHROUGH)
            refuse(r, "passthrough", "detach the device from the guest (device_del) before migrating",
                   "%s gives the guest a device of the host: %s", v[i].option, v[i].value);
        else if (v[i].kind == LB_ARG_VHOST_USER)
            refuse(r, "passthrough", "use a tap (vhost=off or kernel vhost) or a virtio-blk image instead",
                   "%s %s writes guest memory from another process, which is not tracked",
                   v[i].option, v[i].value);
        else
            continue;
        found++;
    }
    if (!found)
        lb_report_add(r, "passthrough", LB_CHECK_OK, NULL, "no devices of the host in the guest");
}

static void check_blockers(const struct lb_vm_desc *d, struct lb_report *r)
{
    unsigned n = 0;
    for (; d->blockers && d->blockers[n]; n++) {
        /* "what: why: remedy" */
        const char *text = d->blockers[n], *what = strchr(text, ':');
        const char *why = what ? strchr(what + 1, ':') : NULL;
        const char *remedy = why ? why + 1 + strspn(why + 1, " ") : "";
        if (!*remedy)
            remedy = "remove it from the VM";
        refuse(r, "blockers", remedy, "%.*s", why ? (int)(why - text) : (int)strlen(text), text);
    }
    if (!n)
        lb_report_add(r, "blockers", LB_CHECK_OK, NULL, "nothing in the VM hinders its move");
}

static void check_descriptors(const struct lb_arg_item *v, unsigned n, struct lb_report *r)
{
    for (unsigned i = 0; i < n; i++)
        if (v[i].kind == LB_ARG_FD)
            refuse(r, "files", "start the VM with names (ifname=, path=, file=) instead of descriptors",
                   "%s uses descriptor %s, which whoever started the VM had opened", v[i].option,
                   v[i].value);
}

void lb_preflight_source(const struct lb_vm_desc *d, struct lb_report *r)
{
    struct lb_arg_item *v;
    unsigned n;
    char *none[] = {NULL};

    lb_argv_scan(d->argv ? d->argv : none, &v, &n);
    check_blockers(d, r);
    check_passthrough(v, n, r);
    check_descriptors(v, n, r);
    lb_argv_items_free(v, n);
}

/* ------------------------------------------------------------- destination */

struct dest {
    const struct lb_vm_desc *d;
    const struct lb_host_config *cfg;
    const char *state_dir;
    const struct lb_arg_item *items;
    unsigned n_items;
    struct lb_report *r;
    const char *const *copied; /* disks that are not shared: a copy is kept here */
    unsigned n_copied;
};

/* As the receiver will see it: launch maps the text of the command line and starts it
 * in the directory that the source has. */
static char *local_path(const struct dest *x, const char *path)
{
    if (path[0] == '/' || !x->d->cwd || !x->d->cwd[0])
        return lb_map_path(x->cfg->paths, x->cfg->n_paths, path);
    return lb_asprintf("%s/%s", x->d->cwd, path);
}

/* A monitor belongs to whoever runs the source: the receiver does without it when its
 * place is taken. The receiver gets no pid file and no debugger port at all. */
static bool is_monitor(const struct lb_arg_item *it)
{
    return !strcmp(it->option, "-qmp") || !strcmp(it->option, "-qmp-pretty") ||
           !strcmp(it->option, "-monitor");
}

static bool is_dropped(const struct lb_arg_item *it)
{
    return !strcmp(it->option, "-pidfile") || !strcmp(it->option, "-gdb");
}

static void refuse_path(const struct dest *x, const char *id, const char *what, const char *orig,
                        const char *path, int e)
{
    char remedy[384], reason[128];
    if (e == EACCES || e == EPERM)
        snprintf(remedy, sizeof(remedy), "give user %u the right to use %s", x->d->uid, path);
    else
        snprintf(remedy, sizeof(remedy),
                 "put %s on storage that both hosts see, copy it here, or map it in the "
                 "configuration: path = %s -> PATH-HERE", path, orig);
    refuse(x->r, id, remedy, "%s %s%s%s%s: %s", what, path, strcmp(orig, path) ? " (" : "",
           strcmp(orig, path) ? orig : "", strcmp(orig, path) ? " on the source)" : "",
           strerror_r(e, reason, sizeof(reason)));
}

static int version_number(const char *s)
{
    int major = 0, minor = 0;
    while (s && *s && (*s < '0' || *s > '9'))
        s++;
    if (!s || sscanf(s, "%d.%d", &major, &minor) < 1)
        return -1;
    return major * 1000 + minor;
}

/* Does `-machine help` list the name as a word at the start of a line? */
static bool lists_machine(const char *machines, const char *name)
{
    size_t len = strlen(name);
    for (const char *line = machines; line; line = strchr(line, '\n')) {
        line += *line == '\n';
        if (!strncmp(line, name, len) && (line[len] == ' ' || line[len] == '\n' || !line[len]))
            return len > 0;
    }
    return false;
}

static void check_version(const struct dest *x, const char *emulator, const char *version)
{
    const char *here = strstr(version, "version ");
    char name[64] = "";
    if (here)
        sscanf(here + 8, "%63[0-9.]", name);
    int mine = version_number(name), theirs = version_number(x->d->hv_version);
    if (mine < 0 || theirs < 0)
        lb_report_add(x->r, "hypervisor-version", LB_CHECK_WARN, "compare the versions by hand",
                      "cannot compare the versions of QEMU (%.40s here, %s on the source)",
                      name[0] ? name : version, x->d->hv_version);
    else if (mine < theirs)
        lb_report_add(x->r, "hypervisor-version", LB_CHECK_WARN,
                      "install the same or a newer QEMU here: older ones may refuse the device state",
                      "QEMU here is older: %s at %s, the source has %s", name, emulator,
                      x->d->hv_version);
    else
        lb_report_add(x->r, "hypervisor-version", LB_CHECK_OK, NULL, "QEMU %s here, %s on the source",
                      name, x->d->hv_version);
}

static void check_emulator(const struct dest *x)
{
    const struct lb_vm_desc *d = x->d;
    const char *path = lb_map_name(x->cfg->emulators, x->cfg->n_emulators, d->emulator);
    LB_AUTO_FREE char *version = NULL;
    LB_AUTO_FREE char *machines = NULL;
    struct lb_error why = LB_ERROR_INIT;
    char remedy[384];

    snprintf(remedy, sizeof(remedy), "install it, or map it in the configuration: "
             "emulator = %.120s -> PATH-HERE", d->emulator);
    int e = lb_host_access_as(d->uid, d->gid, path, X_OK);
    if (e) {
        refuse(x->r, "emulator", remedy, "the emulator %s cannot be run here: %s", path,
               strerror(e));
        return;
    }
    if (lb_host_emulator(path, &version, &machines, &why) < 0) {
        refuse(x->r, "emulator", remedy, "the emulator does not work here: %s", why.message);
        return;
    }
    lb_report_add(x->r, "emulator", LB_CHECK_OK, NULL, "%s", path);
    check_version(x, path, version);
    if (lists_machine(machines, d->machine))
        lb_report_add(x->r, "machine-type", LB_CHECK_OK, NULL, "%s is known here", d->machine);
    else
        refuse(x->r, "machine-type",
               "install a QEMU here that has this machine type (see `-machine help`), or start the VM "
               "with -machine of a version that both hosts have",
               "machine type %s is not known to %s", d->machine, path);
}

uint64_t lb_preflight_need_bytes(uint64_t ram_bytes)
{
    return ram_bytes + OVERHEAD_BYTES + ram_bytes / 256;
}

static void check_memory(const struct dest *x)
{
    int64_t available = lb_host_meminfo("MemAvailable");
    uint64_t reserve = x->cfg->memory_reserve_bytes;
    uint64_t need = lb_preflight_need_bytes(x->d->ram_bytes);
    char a[32], b[32], c[32];

    if (available < 0) {
        lb_report_add(x->r, "memory", LB_CHECK_WARN, "check free memory by hand",
                      "/proc/meminfo cannot be read");
        return;
    }
    lb_human_bytes(a, sizeof(a), (double)need);
    lb_human_bytes(b, sizeof(b), (double)available);
    lb_human_bytes(c, sizeof(c), (double)reserve);
    if ((uint64_t)available < reserve || (uint64_t)available - reserve < need)
        refuse(x->r, "memory",
               "stop or move other VMs away, or lower memory-reserve in the configuration",
               "the VM needs %s, this host has %s available and keeps %s in reserve", a, b, c);
    else
        lb_report_add(x->r, "memory", LB_CHECK_OK, NULL, "%s needed, %s available, %s reserved", a,
                      b, c);
}

static void check_lock(const struct dest *x, const struct lb_disk_desc *k, const char *path)
{
    int locked = lb_host_locked(path);
    if (k->read_only || k->shareable || locked < 0)
        return;
    if (locked)
        lb_report_add(x->r, "disk-locks", LB_CHECK_OK, NULL,
                      "%s is locked, as expected while the source uses it", path);
    else
        lb_report_add(x->r, "disk-locks", LB_CHECK_WARN,
                      "make sure that this is the source's disk (shared storage) and not a copy of it",
                      "%s: the source's lock is not seen here", path);
}

/* Network and other protocol disks have no path in a file system. */
static bool is_file_path(const char *path)
{
    const char *colon = strchr(path, ':'), *slash = strchr(path, '/');
    return path[0] && !(colon && (!slash || colon < slash)) && path[0] != '{';
}

/* A copy of it is kept up to date here: it may be missing, and nobody else may use it. */
static bool is_copied(const struct dest *x, const char *path)
{
    for (unsigned i = 0; i < x->n_copied; i++)
        if (!strcmp(x->copied[i], path))
            return true;
    return false;
}

static void check_copied(const struct dest *x, const char *path, int e)
{
    LB_AUTO_FREE char *dir = lb_path_parent(path);

    if (e == ENOENT && access(dir, W_OK) == 0)
        lb_report_add(x->r, "disks", LB_CHECK_OK, NULL, "%s will be made for the copy", path);
    else if (e == ENOENT)
        refuse(x->r, "disks", "make the directory, or map the path: `path = THERE -> HERE` in the "
               "configuration of this host", "the copy %s cannot be made: %s", path, strerror(errno));
    else if (lb_host_locked(path) == 1)
        refuse(x->r, "disk-locks", "map the path to another file: `path = THERE -> HERE` in the "
               "configuration of this host", "%s is in use here, it cannot be the copy", path);
    else
        lb_report_add(x->r, "disks", LB_CHECK_OK, NULL, "%s will be overwritten with the copy", path);
}

/* QEMU will open what the header of the image says, whatever the paths of this host are mapped to. */
static void check_chain(const struct dest *x, const char *path)
{
    struct lb_error why = LB_ERROR_INIT;
    char **files = NULL;
    char remedy[384];
    if (lb_qcow2_chain(path, &files, &why) < 0) {
        refuse(x->r, "disks", "put the file there, or correct the image with `qemu-img rebase -u -b FILE -F "
               "FORMAT`", "%s stands on an image that is missing here: %s", path, why.message);
        return;
    }
    for (unsigned i = 0; files[i]; i++) {
        int e = lb_host_access_as(x->d->uid, x->d->gid, files[i], R_OK);
        snprintf(remedy, sizeof(remedy), "give user %u the right to read %s", x->d->uid, files[i]);
        if (e)
            refuse(x->r, "disks", remedy, "%s stands on %s, which cannot be read: %s", path, files[i],
                   strerror(e));
    }
    lb_strv_free(files);
}

static void check_disk(const struct dest *x, const struct lb_disk_desc *k)
{
    if (!is_file_path(k->path) || k->backing) /* backing files: with the image that stands on them */
        return;
    LB_AUTO_FREE char *path = local_path(x, k->path);
    struct stat st;
    int e = stat(path, &st) < 0 ? errno : 0;
    bool copied = is_copied(x, k->path);
    if (copied && e == ENOENT) {
        check_copied(x, path, e);
        return;
    }
    if (!e)
        e = lb_host_access_as(x->d->uid, x->d->gid, path, k->read_only ? R_OK : R_OK | W_OK);
    if (e) {
        refuse_path(x, "disks", "disk", k->path, path, e);
    } else if (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode) && !S_ISCHR(st.st_mode)) {
        refuse(x->r, "disks", "give the path of an image or a block device",
               "disk %s is not a file or a block device here", path);
    } else if (copied) {
        check_copied(x, path, 0);
    } else {
        lb_report_add(x->r, "disks", LB_CHECK_OK, NULL, "%s (%s)", path,
                      k->read_only ? "read only" : "read and write");
        check_lock(x, k, path);
        if (k->format && !strcmp(k->format, "qcow2")) /* what a raw one begins with is its guest's */
            check_chain(x, path);
    }
}

static bool is_described_disk(const struct lb_vm_desc *d, const char *path)
{
    for (unsigned i = 0; i < d->n_disks; i++)
        if (!strcmp(d->disks[i].path, path) ||
            (d->disks[i].argv_path && !strcmp(d->disks[i].argv_path, path))) /* another took its place */
            return true;
    return false;
}

static void check_disks(const struct dest *x)
{
    unsigned before = x->r->n;
    for (unsigned i = 0; i < x->d->n_disks; i++)
        check_disk(x, &x->d->disks[i]);
    /* What the hypervisor did not report (a pflash, a disk of an old QEMU). */
    for (unsigned i = 0; i < x->n_items; i++) {
        const struct lb_arg_item *it = &x->items[i];
        struct lb_disk_desc k = {.path = it->value, .read_only = it->read_only, .shareable = true};
        if (it->kind == LB_ARG_DISK && !is_described_disk(x->d, it->value))
            check_disk(x, &k);
    }
    if (x->r->n == before)
        lb_report_add(x->r, "disks", LB_CHECK_OK, NULL, "no disks");
}

static void check_maintenance(const struct dest *x)
{
    struct lb_maintenance m;
    struct lb_error why = LB_ERROR_INIT;

    if (lb_maintenance_load(x->state_dir, &m, &why))
        refuse(x->r, "maintenance", why.remedy, "whether this host is in maintenance cannot be told: %s", why.message);
    else if (m.on)
        refuse(x->r, "maintenance", "`lifeboat maintenance off` on this host ends it, or choose another host",
               "this host is in maintenance and takes no VMs%s%s", m.reason[0] ? ": " : "", m.reason);
    else
        lb_report_add(x->r, "maintenance", LB_CHECK_OK, NULL, "this host takes VMs");
    lb_maintenance_free(&m);
}

static void check_name(const struct dest *x)
{
    struct lb_vm_entry e;
    struct lb_error why = LB_ERROR_INIT;
    char remedy[384];

    if (!lb_vm_name_valid(x->d->name)) {
        refuse(x->r, "name", "rename the VM: letters, digits, dot, dash and underscore",
               "\"%.64s\" is not a VM name", x->d->name);
    } else if (lb_vm_entry_load(x->state_dir, x->d->name, &e, &why) == 0) {
        snprintf(remedy, sizeof(remedy), "on this host: `lifeboat status %s`, then `lifeboat %s %s`, "
                 "or give one of the two another name", x->d->name,
                 e.state == LB_VM_DEAD ? "release" : "stop", x->d->name);
        refuse(x->r, "name", remedy, "a VM named %s is already here (%s)", x->d->name,
               lb_vm_state_name(e.state));
    } else if (why.code != LB_E_NOT_FOUND) {
        refuse(x->r, "name", "repair or remove the VM's directory in the state directory",
               "a VM named %s is already here, and its entry is damaged: %s", x->d->name,
               why.message);
    } else {
        lb_report_add(x->r, "name", LB_CHECK_OK, NULL, "%s is free", x->d->name);
    }
}

static int check_file(const struct dest *x, const struct lb_arg_item *it)
{
    LB_AUTO_FREE char *path = local_path(x, it->value);
    LB_AUTO_FREE char *parent = lb_path_parent(path);
    char what[64];
    int e;

    if (it->kind == LB_ARG_OUTPUT) {
        e = lb_host_access_as(x->d->uid, x->d->gid, path, W_OK);
        if (e == ENOENT)
            e = lb_host_access_as(x->d->uid, x->d->gid, parent, W_OK | X_OK);
    } else {
        e = lb_host_access_as(x->d->uid, x->d->gid, path,
                              it->kind == LB_ARG_DIR ? R_OK | X_OK : R_OK);
    }
    if (!e)
        return 0;
    snprintf(what, sizeof(what), "%s of %s", it->kind == LB_ARG_DIR ? "directory" : "file",
             it->option);
    refuse_path(x, "files", what, it->value, path, e);
    return -1;
}

static void check_files(const struct dest *x)
{
    unsigned n = 0, bad = 0;
    for (unsigned i = 0; i < x->n_items; i++) {
        enum lb_arg_kind k = x->items[i].kind;
        if ((k != LB_ARG_FILE && k != LB_ARG_OUTPUT && k != LB_ARG_DIR) || is_dropped(&x->items[i]))
            continue;
        n++;
        bad += check_file(x, &x->items[i]) < 0;
    }
    if (!bad)
        lb_report_add(x->r, "files", LB_CHECK_OK, NULL, "%u files and directories of the command "
                      "line can be used", n);
}

static int check_socket(const struct dest *x, const struct lb_arg_item *it)
{
    LB_AUTO_FREE char *path = local_path(x, it->value);
    LB_AUTO_FREE char *parent = lb_path_parent(path);
    char remedy[384];
    bool served = lb_host_unix_served(path);

    if (it->kind == LB_ARG_UNIX_CONNECT) {
        if (served)
            return 0;
        snprintf(remedy, sizeof(remedy), "start its server here, or map it in the configuration: "
                 "path = %.120s -> PATH-HERE", it->value);
        refuse(x->r, "sockets", remedy, "nobody serves the socket %s of %s", path, it->option);
        return -1;
    }
    if (served && is_monitor(it)) {
        lb_report_add(x->r, "sockets", LB_CHECK_WARN,
                      "map its directory in the configuration (path = A -> B) to keep it",
                      "the monitor %s of %s is in use here: the VM will go without it", path,
                      it->option);
        return 0;
    }
    if (served) {
        LB_AUTO_FREE char *dir = lb_path_parent(it->value);
        snprintf(remedy, sizeof(remedy), "give it another place on this host in the configuration: "
                 "path = %.120s -> ANOTHER-DIRECTORY", dir);
        refuse(x->r, "sockets", remedy, "the socket %s of %s is in use by another process here", path,
               it->option);
        return -1;
    }
    int e = strlen(path) > 107 ? ENAMETOOLONG
                               : lb_host_access_as(x->d->uid, x->d->gid, parent, W_OK | X_OK);
    if (e == ENOENT && is_monitor(it)) {
        lb_report_add(x->r, "sockets", LB_CHECK_WARN,
                      "create its directory, or map it in the configuration (path = A -> B), to keep it",
                      "the monitor %s of %s cannot be here: the VM will go without it", path, it->option);
        return 0;
    }
    if (e)
        refuse_path(x, "sockets", "directory of the socket", it->value, path, e);
    return e ? -1 : 0;
}

static void check_sockets(const struct dest *x)
{
    unsigned n = 0, bad = 0;
    for (unsigned i = 0; i < x->n_items; i++) {
        enum lb_arg_kind k = x->items[i].kind;
        if (k != LB_ARG_UNIX_LISTEN && k != LB_ARG_UNIX_CONNECT)
            continue;
        n++;
        bad += check_socket(x, &x->items[i]) < 0;
    }
    if (!bad)
        lb_report_add(x->r, "sockets", LB_CHECK_OK, NULL, "%u unix sockets can be used", n);
}

static void check_ports(const struct dest *x)
{
    unsigned n = 0, bad = 0;
    for (unsigned i = 0; i < x->n_items; i++) {
        const struct lb_arg_item *it = &x->items[i];
        if ((it->kind != LB_ARG_TCP_LISTEN && it->kind != LB_ARG_UDP_LISTEN) || is_dropped(it))
            continue;
        int e = lb_host_port_free(it->kind == LB_ARG_UDP_LISTEN, it->value, it->port);
        n++;
        if (!e)
            continue;
        bad++;
        const char *proto = it->kind == LB_ARG_UDP_LISTEN ? "UDP" : "TCP";
        const char *host = *it->value ? it->value : "*";
        if (e == EINVAL) /* a host name: only the launch can tell */
            lb_report_add(x->r, "ports", LB_CHECK_WARN, "use a numeric address on the command line",
                          "%s port %s:%u of %s could not be checked", proto, host, it->port,
                          it->option);
        else
            refuse(x->r, "ports",
                   e == EADDRNOTAVAIL
                       ? "start the VM with an address that every host has (0.0.0.0 or 127.0.0.1)"
                       : "stop what listens there (see `ss -lntup`), or start the VM with another port",
                   "%s port %s:%u of %s cannot be used here: %s", proto, host, it->port, it->option,
                   strerror(e));
    }
    if (!bad)
        lb_report_add(x->r, "ports", LB_CHECK_OK, NULL, "%u ports are free", n);
}

static void check_tap(const struct dest *x, const struct lb_arg_item *it, unsigned *bad)
{
    const char *name = lb_map_name(x->cfg->taps, x->cfg->n_taps, it->value);
    int e = lb_host_tap_free(name);
    char remedy[384];

    if (!e)
        return;
    ++*bad;
    snprintf(remedy, sizeof(remedy),
             "make it (`ip tuntap add %.15s mode tap user %u`, `ip link set %.15s master BRIDGE up`) or "
             "map it in the configuration: tap = %.15s -> NAME-HERE", name, x->d->uid, name,
             it->value);
    if (e == ENODEV && x->d->uid == 0 && it->scripted)
        lb_report_add(x->r, "taps", LB_CHECK_WARN, remedy,
                      "there is no tap %s here: QEMU will make one, connected to nothing unless its "
                      "script does it", name);
    else if (e == ENODEV && x->d->uid == 0)
        refuse(x->r, "taps", remedy, "there is no tap %s here, and no script that would connect it: "
               "the VM would have no network", name);
    else if (e == EBUSY)
        refuse(x->r, "taps", remedy, "the tap %s is in use by another process here", name);
    else
        refuse(x->r, "taps", remedy, "%s cannot be used as a tap here: %s", name,
               e == ENODEV ? "no such interface" : strerror(e));
}

static void check_taps(const struct dest *x)
{
    unsigned n = 0, bad = 0;
    for (unsigned i = 0; i < x->n_items; i++) {
        const struct lb_arg_item *it = &x->items[i];
        if (it->kind == LB_ARG_TAP) {
            check_tap(x, it, &bad);
            n++;
        } else if (it->kind == LB_ARG_BRIDGE && lb_host_tap_free(it->value) == ENODEV) {
            refuse(x->r, "taps", "make a bridge of that name on this host",
                   "there is no bridge %s here (%s)", it->value, it->option);
            bad++;
        } else if (it->kind == LB_ARG_VHOST) {
            int e = lb_host_access_as(x->d->uid, x->d->gid, it->value, R_OK | W_OK);
            if (!e)
                continue;
            bad++;
            refuse(x->r, "taps",
                   strstr(it->value, "vsock") ? "load it: `modprobe vhost_vsock`, and allow its use"
                                              : "load it: `modprobe vhost_net`, and allow its use",
                   "%s needs %s: %s", it->option, it->value, strerror(e));
        }
    }
    if (!bad)
        lb_report_add(x->r, "taps", LB_CHECK_OK, NULL, "%u taps can be used", n);
}

static void check_clock(const struct dest *x, uint64_t here_ms, uint64_t peer_wall_ms)
{
    int64_t skew = (int64_t)(here_ms - peer_wall_ms);
    if (skew > MAX_SKEW_MS || skew < -MAX_SKEW_MS)
        lb_report_add(x->r, "clock-skew", LB_CHECK_WARN,
                      "synchronise both hosts (chrony, systemd-timesyncd): the guest's clock may step",
                      "this host's clock is %.1f s %s the source's", (double)llabs(skew) / 1000,
                      skew > 0 ? "ahead of" : "behind");
    else
        lb_report_add(x->r, "clock-skew", LB_CHECK_OK, NULL, "%" PRId64 " ms", skew);
}

static void check_kernel(const struct dest *x)
{
    struct utsname u;
    int e = 0;
    if (x->d->accel && !strcmp(x->d->accel, "kvm"))
        e = lb_host_access_as(x->d->uid, x->d->gid, "/dev/kvm", R_OK | W_OK);
    if (e)
        refuse(x->r, "kernel", "enable virtualisation in the firmware, load kvm_intel or kvm_amd, and "
               "allow the VM's user to use /dev/kvm", "the VM runs under KVM, and /dev/kvm cannot be "
               "used here: %s", strerror(e));
    else
        lb_report_add(x->r, "kernel", LB_CHECK_OK, NULL, "Linux %s here, %s on the source",
                      uname(&u) == 0 ? u.release : "?", x->d->kernel_release);
}

static void check_uid(const struct dest *x)
{
    char buf[4096];
    struct passwd pw, *found = NULL;
    uid_t uid = x->d->uid;

    if (geteuid() != 0 && uid != geteuid())
        refuse(x->r, "uid", "run lifeboatd as root", "the VM runs as user %u, and lifeboatd (user %u) "
               "may not start processes of other users", uid, geteuid());
    else if (getpwuid_r(uid, &pw, buf, sizeof(buf), &found) != 0 || !found)
        lb_report_add(x->r, "uid", LB_CHECK_WARN, "make the same users on both hosts",
                      "the VM runs as user %u, who has no name here", uid);
    else
        lb_report_add(x->r, "uid", LB_CHECK_OK, NULL, "user %u (%s)", uid, found->pw_name);
}

static void check_config(const struct dest *x)
{
    unsigned missing = 0;
    for (unsigned i = 0; i < x->cfg->n_paths; i++) {
        if (access(x->cfg->paths[i].to, F_OK) == 0)
            continue;
        missing++;
        lb_report_add(x->r, "config", LB_CHECK_WARN, "make the directory or correct the line",
                      "path = %.120s -> %.120s: the target does not exist", x->cfg->paths[i].from,
                      x->cfg->paths[i].to);
    }
    if (!missing)
        lb_report_add(x->r, "config", LB_CHECK_OK, NULL, "%u path, %u tap and %u emulator mappings",
                      x->cfg->n_paths, x->cfg->n_taps, x->cfg->n_emulators);
}

void lb_preflight_dest(const struct lb_vm_desc *d, const struct lb_host_config *cfg,
                       const char *state_dir, uint64_t peer_wall_ms, struct lb_report *r)
{
    lb_preflight_standby(d, cfg, state_dir, peer_wall_ms, NULL, 0, r);
}

void lb_preflight_standby(const struct lb_vm_desc *d, const struct lb_host_config *cfg,
                          const char *state_dir, uint64_t peer_wall_ms, const char *const *copied,
                          unsigned n_copied, struct lb_report *r)
{
    struct lb_arg_item *items = NULL;
    unsigned n = 0;
    bool qemu = !strcmp(d->hypervisor, "qemu");
    uint64_t here_ms = lb_wall_ms(); /* before the checks that take their time */

    if (qemu) /* other command lines have other rules */
        lb_argv_scan(d->argv, &items, &n);
    struct dest x = {.d = d, .cfg = cfg, .state_dir = state_dir, .items = items, .n_items = n,
                     .copied = copied, .n_copied = n_copied, .r = r};
    check_blockers(d, r);
    check_passthrough(items, n, r);
    check_descriptors(items, n, r);
    check_maintenance(&x);
    check_config(&x);
    check_name(&x);
    check_uid(&x);
    if (qemu)
        check_emulator(&x);
    check_kernel(&x);
    check_memory(&x);
    check_disks(&x);
    check_files(&x);
    check_sockets(&x);
    check_ports(&x);
    check_taps(&x);
    check_clock(&x, here_ms, peer_wall_ms);
    lb_report_add(r, "cpu-features", LB_CHECK_OK, NULL,
                  "%s, %u vCPUs: features are compared when the receiver is up", d->cpu_model,
                  d->vcpus);
    lb_argv_items_free(items, n);
}

