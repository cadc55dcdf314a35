/*
 * core/qemu/launch.c - a receiver: its command line, its start, its end.
 *
 * The command line is the source's, so that every device is the same, with
 *   - the machine type replaced by the versioned one ("pc" -> "pc-i440fx-7.2");
 *   - RAM from memfd, so that pages are placed through a mapping of our own; of a clone, a private
 *     view of the memfd that all clones share, which QEMU inherits and opens as a file;
 *   - -incoming defer -S and a control socket in run_dir (ids "lb-...", which is how
 *     they are recognised and dropped when the VM moves on);
 *   - paths and tap names mapped to this host's;
 *   - images that took the place of the command line's (overlays) instead of those;
 *   - what needs a terminal or a desktop replaced by what does not: serial ports and
 *     chardevs on stdio write to files in RUN_DIR, monitors on stdio and windows are gone.
 *
 * The process is started by a double fork: its parent is init, so it neither dies
 * with us nor leaves us a zombie.  If anything fails, it is killed and what it left
 * in run_dir is removed.
 */
#include "core/qemu/qemu_internal.h"
#include "core/registry.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <poll.h>
#include <pwd.h>
#include <signal.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>

#define START_MS 20000

/* ------------------------------------------------------------- path mapping */

static const char *const schemes[] = {"unix:", "file:", "pipe:", "host_device:", "raw:", "nbd+unix:"};

/* s with the longest matching prefix replaced, or NULL when none matches. */
static char *map_path(const struct lb_launch_opts *o, const char *s)
{
    const struct lb_path_map *best = NULL;
    size_t best_len = 0;
    for (unsigned i = 0; i < o->n_paths; i++) {
        size_t n = strlen(o->paths[i].from);
        bool whole = n > 0 && strncmp(s, o->paths[i].from, n) == 0 &&
                     (o->paths[i].from[n - 1] == '/' || s[n] == '/' || s[n] == 0 || s[n] == ',');
        if (whole && n > best_len) {
            best = &o->paths[i];
            best_len = n;
        }
    }
    return best ? lb_asprintf("%s%s", best->to, s + best_len) : NULL;
}

/* One element of a comma list: "key=PATH", "unix:PATH", "PATH". Always a new string. */
static char *map_element(const struct lb_launch_opts *o, const char *e)
{
    const char *v = e;
    for (int again = 1; again;) {
        again = 0;
        const char *eq = strchr(v, '=');
        const char *slash = strchr(v, '/');
        if (eq && (!slash || eq < slash)) {
            v = eq + 1;
            again = 1;
        }
        for (unsigned i = 0; i < LB_ARRAY_LEN(schemes); i++) {
            if (strncmp(v, schemes[i], strlen(schemes[i])) == 0) {
                v += strlen(schemes[i]);
                again = 1;
            }
        }
    }
    LB_AUTO_FREE char *to = map_path(o, v);
    return to ? lb_asprintf("%.*s%s", (int)(v - e), e, to) : lb_strdup(e);
}

static char *map_list(const struct lb_launch_opts *o, const char *value)
{
    char *out = lb_strdup("");
    for (const char *p = value;;) {
        const char *end = p;
        while (*end && !(*end == ',' && end[1] != ',')) /* ",," belongs to the element */
            end += *end == ',' ? 2 : 1;
        LB_AUTO_FREE char *e = lb_asprintf("%.*s", (int)(end - p), p);
        LB_AUTO_FREE char *m = map_element(o, e);
        char *longer = lb_asprintf("%s%s%s", out, p == value ? "" : ",", m);
        free(out);
        out = longer;
        if (!*end)
            return out;
        p = end + 1;
    }
}

static void map_json(const struct lb_launch_opts *o, json_t *j)
{
    const char *key;
    json_t *v;
    size_t i;
    void *tmp;
    if (json_is_object(j)) {
        json_object_foreach_safe(j, tmp, key, v)
        {
            LB_AUTO_FREE char *to = json_is_string(v) ? map_element(o, json_string_value(v)) : NULL;
            if (to)
                json_object_set_new(j, key, json_string(to));
            else
                map_json(o, v);
        }
    } else if (json_is_array(j)) {
        json_array_foreach(j, i, v)
            map_json(o, v);
    }
}

/* ------------------------------------------------------------------ memory */

static bool hugepages_free(uint64_t bytes)
{
    LB_AUTO_FREE char *text = NULL;
    unsigned long long n = 0, kb = 0;
    if (lb_file_read("/proc/meminfo", 65536, &text, NULL, NULL) < 0)
        return false;
    const char *a = strstr(text, "HugePages_Free:"), *b = strstr(text, "Hugepagesize:");
    if (!a || !b || sscanf(a, "HugePages_Free: %llu", &n) != 1 ||
        sscanf(b, "Hugepagesize: %llu", &kb) != 1)
        return false;
    return n * kb * 1024 >= bytes;
}

/* How a clone's QEMU finds the shared memory it inherits. */
#define SHARED_PATH "/proc/self/fd/"
#define SHARED_PATH_MAX 32
static const char *shared_path(char path[SHARED_PATH_MAX], int fd)
{
    snprintf(path, SHARED_PATH_MAX, SHARED_PATH "%d", fd);
    return path;
}

/* Options of a backend that would say where its memory comes from. */
static const char *const backing_keys[] = {"mem-path", "pmem", "align", "readonly", "rom",
                                           "discard-data", "prealloc", "prealloc-threads",
                                           "offset", "seal", "share", "hugetlb", "hugetlbsize"};

/* memory-backend-ram/-file/-memfd -> memfd,share=on with the same id and size. */
static char *memfd_backend(const char *value)
{
    char *out = lb_qemu_prop_set(value, NULL, "memory-backend-memfd");
    LB_AUTO_FREE char *huge = lb_qemu_prop(value, "hugetlb");
    LB_AUTO_FREE char *hugesize = lb_qemu_prop(value, "hugetlbsize");
    LB_AUTO_FREE char *size = lb_qemu_prop(value, "size");
    for (unsigned i = 0; i < LB_ARRAY_LEN(backing_keys); i++) {
        char *less = lb_qemu_prop_set(out, backing_keys[i], NULL);
        free(out);
        out = less;
    }
    uint64_t bytes = 0;
    bool keep_huge = huge && strcmp(huge, "on") == 0 && size &&
                     lb_parse_size(size, &bytes, NULL) == 0 && hugepages_free(bytes);
    char *full = lb_asprintf("%s,share=on%s%s%s", out, keep_huge ? ",hugetlb=on" : "",
                             keep_huge && hugesize ? ",hugetlbsize=" : "",
                             keep_huge && hugesize ? hugesize : "");
    free(out);
    return full;
}

/* The same as a private view of what clones share. */
static char *shared_backend(const char *value, int fd)
{
    char path[SHARED_PATH_MAX];
    LB_AUTO_FREE char *memfd = memfd_backend(value);
    LB_AUTO_FREE char *file = lb_qemu_prop_set(memfd, NULL, "memory-backend-file");
    LB_AUTO_FREE char *one = lb_qemu_prop_set(file, "hugetlb", NULL);
    LB_AUTO_FREE char *two = lb_qemu_prop_set(one, "hugetlbsize", NULL);
    LB_AUTO_FREE char *own = lb_qemu_prop_set(two, "share", "off");
    return lb_qemu_prop_set(own, "mem-path", shared_path(path, fd));
}

static void memfd_backend_json(json_t *j)
{
    bool huge = json_is_true(json_object_get(j, "hugetlb")) &&
                hugepages_free((uint64_t)json_integer_value(json_object_get(j, "size")));
    json_object_set_new(j, "qom-type", json_string("memory-backend-memfd"));
    for (unsigned i = 0; i < LB_ARRAY_LEN(backing_keys); i++)
        if (!huge || strncmp(backing_keys[i], "hugetlb", 7) != 0)
            json_object_del(j, backing_keys[i]);
    json_object_set_new(j, "share", json_true());
}

static void shared_backend_json(json_t *j, int fd)
{
    char path[SHARED_PATH_MAX];
    memfd_backend_json(j);
    json_object_del(j, "hugetlb");
    json_object_del(j, "hugetlbsize");
    json_object_set_new(j, "qom-type", json_string("memory-backend-file"));
    json_object_set_new(j, "share", json_false());
    json_object_set_new(j, "mem-path", json_string(shared_path(path, fd)));
}

char *lb_qemu_ordinary_memory(const char *value)
{
    if (value[0] != '{') {
        LB_AUTO_FREE char *path = lb_qemu_prop(value, "mem-path");
        return path && strncmp(path, SHARED_PATH, strlen(SHARED_PATH)) == 0 ? memfd_backend(value) : NULL;
    }
    json_t *j = json_loads(value, 0, NULL);
    const char *path = json_string_value(json_object_get(j, "mem-path"));
    char *out = NULL;
    if (path && strncmp(path, SHARED_PATH, strlen(SHARED_PATH)) == 0) {
        memfd_backend_json(j);
        char *text = json_dumps(j, JSON_COMPACT);
        out = lb_strdup(text);
        free(text);
    }
    json_decref(j);
    return out;
}

static bool is_memory_type(const char *type)
{
    return type && (strcmp(type, "memory-backend-ram") == 0 ||
                    strcmp(type, "memory-backend-file") == 0 ||
                    strcmp(type, "memory-backend-memfd") == 0);
}

/* ------------------------------------------------------- option by option */

struct derive {
    const struct lb_vm_desc *desc;
    const struct lb_launch_opts *opts;
    struct lb_qemu_opts in, out;
    char *machine_props;      /* of all -machine options, without the type */
    uint64_t ram_bytes;       /* -m */
    bool numa_memdev, has_display, has_serial, nographic, nodefaults;
    unsigned n_logs, n_memory;
};

static bool in_list(const char *name, const char *const *list)
{
    for (; *list; list++)
        if (strcmp(name, *list) == 0)
            return true;
    return false;
}

/* Not part of what the guest sees, or set anew below. */
static const char *const dropped[] = {
    "daemonize", "pidfile", "incoming", "S", "loadvm", "mem-path", "mem-prealloc", "s", "gdb",
    "sdl", "curses", "full-screen", "alt-grab", "ctrl-grab", "no-frame", "no-quit", "portrait",
    "show-cursor", NULL};
static const char *const monitors[] = {"monitor", "qmp", "qmp-pretty", "mon", NULL};
static const char *const ports[] = {"serial", "parallel", "debugcon", "virtioconsole", NULL};

static bool is_ours(const struct lb_qemu_opt *o)
{
    LB_AUTO_FREE char *id = NULL;
    if (lb_qemu_opt_is(o, "chardev"))
        id = lb_qemu_prop(o->value, "id");
    else if (lb_qemu_opt_is(o, "mon"))
        id = lb_qemu_prop(o->value, "chardev");
    return id && strncmp(id, "lb-", 3) == 0;
}

static bool on_stdio(const char *v)
{
    return v && (strcmp(v, "stdio") == 0 || strcmp(v, "mon:stdio") == 0 ||
                 strncmp(v, "stdio,", 6) == 0 || strcmp(v, "msmouse") == 0);
}

static char *log_file(struct derive *d, const char *what)
{
    LB_AUTO_FREE char *plain = lb_asprintf("%s/%s%u.log", d->opts->run_dir, what, d->n_logs++);
    LB_AUTO_FREE char *set = lb_qemu_prop_set("file", "path", plain); /* escapes commas */
    return lb_strdup(set + strlen("file,path="));
}

/* Is somebody listening on this unix socket of this host? */
static bool socket_taken(const char *path)
{
    struct sockaddr_un sa = {.sun_family = AF_UNIX};
    if (!path || strlen(path) >= sizeof(sa.sun_path))
        return false;
    strcpy(sa.sun_path, path);
    LB_AUTO_FD int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    return fd >= 0 && (connect(fd, (struct sockaddr *)&sa, sizeof(sa)) == 0 || errno == EAGAIN);
}

static bool dir_exists(const char *path)
{
    LB_AUTO_FREE char *dir = lb_strdup(path);
    char *slash = strrchr(dir, '/');
    if (!slash || slash == dir)
        return true;
    *slash = 0;
    return access(dir, F_OK) == 0;
}

/* The path of a listening unix socket in a chardev-like value, or NULL. */
static char *server_path(const char *v)
{
    LB_AUTO_FREE char *server = lb_qemu_prop(v, "server");
    if (!strstr(v, ",server") || (server && strcmp(server, "off") == 0))
        return NULL;
    if (strncmp(v, "unix:", 5) == 0)
        return lb_qemu_prop(v + 5, NULL);
    return strncmp(v, "socket,", 7) == 0 ? lb_qemu_prop(v, "path") : NULL;
}

static void take_machine(struct derive *d, const char *value)
{
    LB_AUTO_FREE char *bare = lb_qemu_prop_set(value, NULL, NULL);
    LB_AUTO_FREE char *props = lb_qemu_prop_set(bare, "type", NULL);
    if (!*props)
        return;
    char *both = d->machine_props ? lb_asprintf("%s,%s", d->machine_props, props)
                                  : lb_strdup(props);
    free(d->machine_props);
    d->machine_props = both;
}

static uint64_t parse_m(const char *value)
{
    LB_AUTO_FREE char *s = lb_qemu_prop(value, "size");
    if (!s)
        s = lb_qemu_prop(value, NULL);
    uint64_t n = 0;
    if (!s || lb_parse_size(s, &n, NULL) < 0)
        return 0;
    char last = s[strlen(s) - 1];
    return last >= '0' && last <= '9' ? n << 20 : n; /* a plain number is MiB */
}

/* NULL: the name stays. */
static const char *mapped_tap(const struct derive *d, const char *ifname)
{
    for (unsigned i = 0; ifname && i < d->opts->n_taps; i++)
        if (strcmp(ifname, d->opts->taps[i].from) == 0)
            return d->opts->taps[i].to;
    return NULL;
}

/* Value of a -netdev, -nic or -net with tap names of this host. Connected to nothing is still a tap, one that QEMU
 * makes for itself: another back end lacks the offloads that the state of the guest's card relies on. */
static char *map_tap(const struct derive *d, const char *value)
{
    LB_AUTO_FREE char *ifname = lb_qemu_prop(value, "ifname");
    const char *to = mapped_tap(d, ifname);
    if (!to)
        return lb_strdup(value);
    if (*to)
        return lb_qemu_prop_set(value, "ifname", to);
    LB_AUTO_FREE char *bare = lb_qemu_prop_set(value, "ifname", NULL);
    LB_AUTO_FREE char *up = lb_qemu_prop_set(bare, "script", "no");
    return lb_qemu_prop_set(up, "downscript", "no");
}

static void map_tap_json(const struct derive *d, json_t *j)
{
    const char *to = mapped_tap(d, json_string_value(json_object_get(j, "ifname")));
    if (to && *to) {
        json_object_set_new(j, "ifname", json_string(to));
    } else if (to) {
        json_object_del(j, "ifname");
        json_object_set_new(j, "script", json_string("no"));
        json_object_set_new(j, "downscript", json_string("no"));
    }
}

static char *add_backend(struct derive *d, const char *value)
{
    d->n_memory++;
    return d->opts->shared_memory_fd ? shared_backend(value, d->opts->shared_memory_fd)
                                     : memfd_backend(value);
}

static int take_json(struct derive *d, const struct lb_qemu_opt *o, struct lb_error *err)
{
    json_error_t je;
    json_t *j = json_loads(o->value, 0, &je);
    if (!j)
        return lb_fail(err, LB_E_USAGE, "cannot understand -%s %s", o->name, o->value);
    if (lb_qemu_opt_is(o, "object") &&
        is_memory_type(json_string_value(json_object_get(j, "qom-type")))) {
        d->n_memory++;
        if (d->opts->shared_memory_fd)
            shared_backend_json(j, d->opts->shared_memory_fd);
        else
            memfd_backend_json(j);
    }
    map_json(d->opts, j);
    map_tap_json(d, j);
    char *text = json_dumps(j, JSON_COMPACT);
    json_decref(j);
    lb_qemu_opts_add(&d->out, o->name, text);
    free(text);
    return 0;
}

/* -chardev stdio,id=X,... -> file,id=X,path=RUN_DIR/...; NULL: leave it */
static char *no_terminal(struct derive *d, const struct lb_qemu_opt *o)
{
    if (lb_qemu_opt_is(o, "chardev") && strncmp(o->value, "stdio", 5) == 0) {
        LB_AUTO_FREE char *a = lb_qemu_prop_set(o->value, NULL, "file");
        LB_AUTO_FREE char *b = lb_qemu_prop_set(a, "signal", NULL);
        LB_AUTO_FREE char *log = log_file(d, "chardev");
        return lb_asprintf("%s,path=%s", b, log);
    }
    if (in_list(o->name, ports) && on_stdio(o->value)) {
        LB_AUTO_FREE char *log = log_file(d, o->name);
        return lb_asprintf("file:%s", log);
    }
    return NULL;
}

static int take(struct derive *d, const struct lb_qemu_opt *o, struct lb_error *err)
{
    LB_AUTO_FREE char *value = NULL;
    if (in_list(o->name, dropped) || is_ours(o))
        return 0;
    if (lb_qemu_opt_is(o, "machine") || lb_qemu_opt_is(o, "M")) {
        take_machine(d, o->value);
        return 0;
    }
    if (lb_qemu_opt_is(o, "nographic")) {
        d->nographic = true;
        return 0;
    }
    d->nodefaults |= lb_qemu_opt_is(o, "nodefaults");
    d->has_serial |= lb_qemu_opt_is(o, "serial");
    if (lb_qemu_opt_is(o, "m"))
        d->ram_bytes = parse_m(o->value);
    if (lb_qemu_opt_is(o, "numa") && strstr(o->value, "memdev="))
        d->numa_memdev = true;
    if (!o->value) {
        lb_qemu_opts_add(&d->out, o->name, NULL);
        return 0;
    }
    if (o->value[0] == '{')
        return take_json(d, o, err);
    if (lb_qemu_opt_is(o, "display")) {
        LB_AUTO_FREE char *type = lb_qemu_prop(o->value, NULL);
        if (!type || (strcmp(type, "none") != 0 && strncmp(type, "vnc", 3) != 0 &&
                      strcmp(type, "egl-headless") != 0))
            return 0; /* a window or a terminal */
        d->has_display = true;
    }
    d->has_display |= lb_qemu_opt_is(o, "vnc") || lb_qemu_opt_is(o, "spice");
    if (in_list(o->name, monitors) && on_stdio(o->value))
        return 0;

    value = no_terminal(d, o);
    if (!value) {
        LB_AUTO_FREE char *type = lb_qemu_prop(o->value, NULL);
        LB_AUTO_FREE char *mine = NULL;
        if (lb_qemu_opt_is(o, "object") && is_memory_type(type))
            mine = add_backend(d, o->value);
        else if (lb_qemu_opt_is(o, "netdev") || lb_qemu_opt_is(o, "nic") || lb_qemu_opt_is(o, "net"))
            mine = map_tap(d, o->value);
        value = map_list(d->opts, mine ? mine : o->value);
        LB_AUTO_FREE char *sock = server_path(value);
        if (sock && in_list(o->name, monitors) && (socket_taken(sock) || !dir_exists(sock))) {
            /* not the guest's, and the VM has our monitor */
            lb_log(LB_LOG_INFO, "VM %s: its monitor %s cannot be on this host and is left out",
                   d->opts->name, sock);
            return 0;
        }
        if (sock && socket_taken(sock)) {
            lb_fail(err, LB_E_EXISTS, "the socket %s of -%s is in use on this host", sock, o->name);
            return lb_remedy(err, "map its directory to another one in this host's configuration");
        }
    }
    lb_qemu_opts_add(&d->out, o->name, value);
    return 0;
}

/* A path of the source's command line as it is after take(). */
static char *mapped(const struct derive *d, const char *path)
{
    LB_AUTO_FREE char *element = lb_qemu_prop_set("", "f", path); /* commas doubled, as they are there */
    LB_AUTO_FREE char *list = map_list(d->opts, element);
    return lb_qemu_prop(list, "f");
}

static int replace_image(struct derive *d, const char *argv_path, const char *path, const char *format,
                         struct lb_error *err)
{
    struct lb_qemu_images images;
    LB_AUTO_FREE char *there = mapped(d, argv_path);
    bool found = false;
    lb_qemu_images_scan(&d->out, &images);
    for (unsigned i = 0; i < images.n && !found; i++) {
        found = images.v[i].path && strcmp(images.v[i].path, there) == 0;
        if (found)
            lb_qemu_image_replace(&d->out, &images.v[i], path, format);
    }
    lb_qemu_images_free(&images);
    if (found)
        return 0;
    lb_fail(err, LB_E_UNSUPPORTED, "the command line of VM %s has no disk %s, whose image is %s now",
            d->opts->name, argv_path, path);
    return lb_remedy(err, "join the images of that disk, or restart the VM from its present image");
}

static bool in_opts(const struct derive *d, const char *argv_path)
{
    for (unsigned i = 0; i < d->opts->n_disks; i++)
        if (strcmp(d->opts->disks[i].argv_path, argv_path) == 0)
            return true;
    return false;
}

/* Present images instead of those the VM was started with: the caller's word, else the description's. */
static int replace_images(struct derive *d, struct lb_error *err)
{
    for (unsigned i = 0; i < d->desc->n_disks; i++) {
        const struct lb_disk_desc *k = &d->desc->disks[i];
        if (!k->argv_path || !*k->argv_path || in_opts(d, k->argv_path))
            continue;
        LB_AUTO_FREE char *path = mapped(d, k->path);
        if (replace_image(d, k->argv_path, path, k->format, err) < 0)
            return -1;
    }
    for (unsigned i = 0; i < d->opts->n_disks; i++) {
        const struct lb_disk_map *m = &d->opts->disks[i];
        if (replace_image(d, m->argv_path, m->path, m->format, err) < 0)
            return -1;
    }
    return 0;
}

static void add_machine(struct derive *d)
{
    LB_AUTO_FREE char *backend = lb_qemu_prop(d->machine_props, "memory-backend");
    LB_AUTO_FREE char *props = d->machine_props ? lb_asprintf(",%s", d->machine_props)
                                                : lb_strdup("");
    const char *own = "";
    if (!backend && !d->numa_memdev) {
        bool microvm = strncmp(d->desc->machine, "microvm", 7) == 0;
        const char *id = microvm ? "microvm.ram" : "pc.ram";
        /* the same block name as when QEMU makes the memory itself */
        LB_AUTO_FREE char *plain = lb_asprintf(
            "memory-backend-memfd,id=%s,size=%llu,x-use-canonical-path-for-ramblock-id=off", id,
            (unsigned long long)d->ram_bytes);
        LB_AUTO_FREE char *obj = add_backend(d, plain);
        lb_qemu_opts_add(&d->out, "object", obj);
        own = microvm ? ",memory-backend=microvm.ram" : ",memory-backend=pc.ram";
    }
    LB_AUTO_FREE char *value = lb_asprintf("%s%s%s%s", d->desc->machine, props, own,
                                           d->nographic ? ",graphics=off" : "");
    lb_qemu_opts_add(&d->out, "machine", value);
}

static void add_ours(struct derive *d)
{
    LB_AUTO_FREE char *sock = lb_asprintf("%s/%s", d->opts->run_dir, LB_VM_QMP_SOCK);
    LB_AUTO_FREE char *chardev = lb_qemu_prop_set("socket,id=lb-qmp,server=on,wait=off", "path", sock);
    if (d->nographic && !d->has_serial && !d->nodefaults) {
        LB_AUTO_FREE char *log = log_file(d, "serial");
        LB_AUTO_FREE char *file = lb_asprintf("file:%s", log);
        lb_qemu_opts_add(&d->out, "serial", file);
    }
    if (!d->has_display)
        lb_qemu_opts_add(&d->out, "display", "none");
    lb_qemu_opts_add(&d->out, "chardev", chardev);
    lb_qemu_opts_add(&d->out, "mon", "chardev=lb-qmp,mode=control");
    lb_qemu_opts_add(&d->out, "incoming", "defer");
    lb_qemu_opts_add(&d->out, "S", NULL);
}

int lb_qemu_receiver_argv(const struct lb_vm_desc *desc, const struct lb_launch_opts *opts,
                          char ***argv, struct lb_error *err)
{
    struct derive d = {.desc = desc, .opts = opts, .ram_bytes = desc->ram_bytes};
    int rc = -1;
    if (!desc->machine || !desc->machine[0]) {
        lb_fail(err, LB_E_PROTO, "the description of VM %s names no machine type", opts->name);
        goto out;
    }
    if (lb_qemu_opts_parse(desc->argv, &d.in, err) < 0)
        goto out;
    const char *emulator = opts->emulator ? opts->emulator : desc->emulator;
    d.out.emulator = lb_strdup(emulator ? emulator : d.in.emulator);
    for (unsigned i = 0; i < d.in.n; i++)
        if (take(&d, &d.in.v[i], err) < 0)
            goto out;
    if (replace_images(&d, err) < 0)
        goto out;
    lb_qemu_another(&d.out, opts);
    if (d.ram_bytes == 0)
        d.ram_bytes = desc->ram_bytes;
    add_machine(&d);
    add_ours(&d);
    if (opts->shared_memory_fd && d.n_memory != 1) {
        lb_fail(err, LB_E_UNSUPPORTED, "VM %s has %u pieces of memory: only one can be shared",
                opts->name, d.n_memory);
        lb_remedy(err, "restore it instead: each copy has memory of its own then");
        goto out;
    }
    *argv = lb_qemu_opts_argv(&d.out);
    rc = 0;
out:
    lb_qemu_opts_free(&d.in);
    lb_qemu_opts_free(&d.out);
    free(d.machine_props);
    return rc;
}

/* ------------------------------------------------------------------- start */

struct child {
    char **argv;
    const char *cwd;
    int log_fd, null_fd, pipe_fd, shared_fd;
    bool drop;
    uint32_t uid, gid;
    gid_t groups[64];
    int n_groups;
};

struct child_report {
    int32_t pid;
    int32_t failed; /* errno of what failed, 0 */
};

/* After fork in a process with threads: system calls only. */
static void __attribute__((noreturn)) run_child(const struct child *c)
{
    struct child_report r = {.pid = (int32_t)getpid()};
    sigset_t none;
    sigemptyset(&none);
    for (int s = 1; s < NSIG; s++)
        signal(s, SIG_DFL);
    sigprocmask(SIG_SETMASK, &none, NULL);
    if (write(c->pipe_fd, &r, sizeof(r)) != (ssize_t)sizeof(r))
        _exit(127);
    if (c->cwd && chdir(c->cwd) < 0 && chdir("/") < 0)
        _exit(127);
    dup2(c->null_fd, 0);
    dup2(c->log_fd, 1);
    dup2(c->log_fd, 2);
    syscall(SYS_close_range, 3u, ~0u, 4u /* CLOSE_RANGE_CLOEXEC */);
    if (c->shared_fd)
        fcntl(c->shared_fd, F_SETFD, 0);
    umask(022);
    if (!c->drop || (setgroups((size_t)c->n_groups, c->groups) == 0 &&
                     setresgid(c->gid, c->gid, c->gid) == 0 &&
                     setresuid(c->uid, c->uid, c->uid) == 0))
        execv(c->argv[0], c->argv);
    r.failed = errno;
    if (write(c->pipe_fd, &r, sizeof(r)) < 0)
        _exit(126);
    _exit(127);
}

/* Start; the pid of a process whose exec succeeded, or -1. */
static pid_t spawn(struct child *c, struct lb_error *err)
{
    int p[2];
    if (pipe2(p, O_CLOEXEC) < 0)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot make a pipe");
    LB_AUTO_FD int rd = p[0];
    LB_AUTO_FD int wr = p[1];
    c->pipe_fd = wr;
    pid_t mid = fork();
    if (mid < 0)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot start a process");
    if (mid == 0) {
        setsid();
        pid_t pid = fork();
        if (pid == 0)
            run_child(c);
        _exit(pid < 0 ? 1 : 0);
    }
    close(LB_STEAL_FD(wr));
    while (waitpid(mid, NULL, 0) < 0 && errno == EINTR)
        ;
    struct child_report first, second;
    if (lb_read_all(rd, &first, sizeof(first), NULL) < 0)
        return lb_fail(err, LB_E_INTERNAL, "cannot start a process for QEMU");
    if (lb_read_all(rd, &second, sizeof(second), NULL) == 0) {
        lb_fail_errno(err, second.failed == ENOENT ? LB_E_NOT_FOUND : LB_E_HV, second.failed,
                      "cannot start %s", c->argv[0]);
        return lb_remedy(err, "install it on this host or set the emulator of this host's "
                              "configuration");
    }
    return (pid_t)first.pid;
}

/* The user of the source, with access to /dev/kvm when it needs that. */
static int drop_to(struct child *c, const struct lb_vm_desc *desc, const char *run_dir,
                   struct lb_error *err)
{
    for (unsigned i = 0; desc->argv[i]; i++)
        if (strcmp(desc->argv[i], "-runas") == 0 || strcmp(desc->argv[i], "--runas") == 0 ||
            strcmp(desc->argv[i], "-run-with") == 0)
            return 0; /* QEMU does it itself, and needs root until then */
    if (geteuid() != 0 || desc->uid == 0)
        return 0;
    c->drop = true;
    c->uid = desc->uid;
    c->gid = desc->gid;
    c->n_groups = LB_ARRAY_LEN(c->groups) - 1;
    struct passwd pw, *found = NULL;
    char buf[4096];
    struct stat st;
    if (getpwuid_r(desc->uid, &pw, buf, sizeof(buf), &found) != 0 || !found ||
        getgrouplist(pw.pw_name, desc->gid, c->groups, &c->n_groups) < 0) {
        c->groups[0] = desc->gid;
        c->n_groups = 1;
    }
    if (desc->accel && strcmp(desc->accel, "kvm") == 0 && stat("/dev/kvm", &st) == 0)
        c->groups[c->n_groups++] = st.st_gid;
    if (chown(run_dir, desc->uid, desc->gid) < 0 ||
        fchown(c->log_fd, desc->uid, desc->gid) < 0)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot give %s to user %u", run_dir,
                             desc->uid);
    return 0;
}

void lb_qemu_add_log(const char *run_dir, struct lb_error *err)
{
    if (!err)
        return;
    LB_AUTO_FREE char *path = lb_asprintf("%s/qemu.log", run_dir);
    LB_AUTO_FREE char *text = NULL;
    size_t len = 0;
    if (lb_file_read(path, 1 << 20, &text, &len, NULL) < 0 || len == 0)
        return;
    while (len > 0 && text[len - 1] == '\n')
        text[--len] = 0;
    char *tail = text + (len > 300 ? len - 300 : 0);
    char *nl = len > 300 ? strchr(tail, '\n') : NULL;
    if (nl)
        tail = nl + 1;
    for (char *c = tail; *c; c++)
        if ((unsigned char)*c < ' ')
            *c = c[0] == '\n' ? ';' : ' ';
    size_t have = strlen(err->message);
    snprintf(err->message + have, sizeof(err->message) - have, ": %s", tail);
}

void lb_qemu_remove_run_files(const char *run_dir)
{
    static const char *const files[] = {LB_VM_QMP_SOCK, "qemu.log", "throttle", LB_QEMU_LAZY_FILE};
    for (unsigned i = 0; i < LB_ARRAY_LEN(files); i++) {
        LB_AUTO_FREE char *path = lb_asprintf("%s/%s", run_dir, files[i]);
        unlink(path);
    }
    static const char *const logs[] = {"chardev", "serial", "parallel", "debugcon", "virtioconsole"};
    for (unsigned i = 0; i < LB_ARRAY_LEN(logs); i++) {
        for (unsigned k = 0; k < 16; k++) {
            LB_AUTO_FREE char *path = lb_asprintf("%s/%s%u.log", run_dir, logs[i], k);
            unlink(path);
        }
    }
}

/* From the running process to a handle that accepts commands. */
static int come_up(struct lb_hv_vm *vm, const struct lb_vm_desc *desc, struct lb_error *err)
{
    uint64_t deadline = lb_now_ns() + START_MS * UINT64_C(1000000);
    if (lb_qmp_open(vm->qmp_path, vm->proc.pid, vm->pidfd, deadline, &vm->qmp, err) < 0 ||
        lb_qmp_cmd(vm->qmp, "migrate-set-capabilities",
                   "{\"capabilities\":[{\"capability\":\"events\",\"state\":true},"
                   "{\"capability\":\"late-block-activate\",\"state\":true}]}", NULL, err) < 0 ||
        lb_qemu_identify(vm, err) < 0 || lb_qemu_find_blocks(vm, err) < 0)
        return -1;
    if (strcmp(vm->machine, desc->machine) != 0)
        return lb_fail(err, LB_E_UNSUPPORTED, "the receiver is a %s, the source a %s", vm->machine,
                       desc->machine);
    return 0;
}

#define SHARED_SEALS (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE)

/* Nobody may change it any more, QEMU neither (it would punch holes into it for a balloon). */
static int check_sealed(int fd, struct lb_error *err)
{
    int seals = fcntl(fd, F_GET_SEALS);
    if (seals < 0 || (seals & SHARED_SEALS) != SHARED_SEALS)
        return lb_fail(err, LB_E_INTERNAL, "the memory that clones share is not sealed");
    return 0;
}

static int check_shared(const struct lb_hv_vm *vm, int fd, struct lb_error *err)
{
    struct stat st;
    if (fstat(fd, &st) < 0)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot look at the memory that clones share");
    for (unsigned i = 0; i < vm->n_blocks; i++) {
        const struct lb_qemu_block *b = &vm->blocks[i];
        if (b->pub.kind == LB_RAM_MAIN && (!b->file_private || b->pub.size_bytes != (uint64_t)st.st_size))
            return lb_fail(err, LB_E_STATE, "memory block %s of %llu bytes is not the shared memory of %llu",
                           b->pub.name, (unsigned long long)b->pub.size_bytes,
                           (unsigned long long)st.st_size);
    }
    return 0;
}

int lb_qemu_launch(const struct lb_vm_desc *desc, const struct lb_launch_opts *opts,
                   struct lb_hv_vm **out, struct lb_error *err)
{
    struct child c = {.cwd = desc->cwd, .log_fd = -1, .null_fd = -1, .shared_fd = opts->shared_memory_fd};
    struct lb_hv_vm *vm = NULL;
    LB_AUTO_FREE char *log = lb_asprintf("%s/qemu.log", opts->run_dir);
    int rc = -1;
    if ((c.shared_fd && check_sealed(c.shared_fd, err) < 0) || lb_mkdir_p(opts->run_dir, 0700, err) < 0 ||
        lb_qemu_receiver_argv(desc, opts, &c.argv, err) < 0)
        goto out;
    vm = lb_qemu_vm_new(opts->name);
    vm->run_dir = lb_strdup(opts->run_dir);
    vm->qmp_path = lb_asprintf("%s/%s", opts->run_dir, LB_VM_QMP_SOCK);
    unlink(vm->qmp_path);
    c.log_fd = open(log, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0600);
    c.null_fd = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (c.log_fd < 0 || c.null_fd < 0) {
        lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot open %s", log);
        goto out;
    }
    if (drop_to(&c, desc, opts->run_dir, err) < 0)
        goto out;
    pid_t pid = spawn(&c, err);
    if (pid < 0)
        goto out;
    struct lb_error why = LB_ERROR_INIT;
    if (lb_proc_identify(pid, &vm->proc, &why) < 0 ||
        (vm->pidfd = lb_proc_open(&vm->proc, &why)) < 0 || come_up(vm, desc, &why) < 0 ||
        (c.shared_fd && check_shared(vm, c.shared_fd, &why) < 0)) {
        if (vm->proc.pid && lb_proc_kill(&vm->proc, 10000, NULL) < 0)
            lb_log(LB_LOG_ERROR, "receiver %s (process %d) cannot be killed", opts->name, (int)pid);
        if (why.code == LB_E_NOT_FOUND) /* gone before we looked */
            lb_fail(&why, LB_E_HV, "QEMU ended at once");
        lb_qemu_add_log(opts->run_dir, &why);
        lb_context(&why, "cannot start the receiver of VM %s", opts->name);
        lb_remedy(&why, "correct what QEMU says above: files, taps and sockets of the source's "
                        "command line must exist here or be mapped in this host's configuration");
        if (err)
            *err = why;
        goto out;
    }
    vm->sockets = lb_proc_listening(pid);
    *out = LB_STEAL_PTR(vm);
    rc = 0;
out:
    if (vm) {
        lb_qemu_remove_run_files(opts->run_dir);
        lb_qemu_vm_free(vm);
    }
    lb_cleanup_fd(&c.log_fd);
    lb_cleanup_fd(&c.null_fd);
    lb_strv_free(c.argv);
    return rc;
}
