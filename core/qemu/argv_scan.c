/* core/qemu/argv_scan.c - see argv_scan.h.
 *
 * Every argument becomes a flat list of key/value pairs, whatever its syntax:
 *      tap,id=n0,ifname=tap0            "" = tap, id = n0, ifname = tap0
 *      {"driver":"raw","file":{"filename":"/a"}}    driver = raw, file.filename = /a
 * One function per family of options then picks what it knows from the list. */
#include "core/qemu/argv_scan.h"

#include <jansson.h>
#include <string.h>

struct pair {
    char *key, *value;
};
struct pairs {
    struct pair *v;
    unsigned n;
};
struct scan {
    struct lb_arg_item *v;
    unsigned n;
    const char *option;  /* static text of the option being looked at */
};

enum { MAX_PAIRS = 4096, MAX_JSON_DEPTH = 16 };

const char *lb_arg_kind_name(enum lb_arg_kind k)
{
    static const char *const names[] = {
        "file", "disk", "output", "directory", "unix-listen", "unix-connect", "tcp-listen",
        "udp-listen", "tap", "bridge", "fd", "vhost", "vhost-user", "passthrough",
    };
    return (unsigned)k < LB_ARRAY_LEN(names) ? names[k] : "unknown";
}

/* ------------------------------------------------------------------- pairs */

static void pair_add(struct pairs *p, const char *key, size_t key_len, const char *value)
{
    if (p->n >= MAX_PAIRS)
        return;
    p->v = lb_realloc(p->v, (p->n + 1) * sizeof(*p->v));
    p->v[p->n].key = lb_asprintf("%.*s", (int)key_len, key);
    p->v[p->n].value = lb_strdup(value);
    p->n++;
}

static void json_pairs(struct pairs *p, const char *prefix, json_t *j, unsigned depth)
{
    const char *key;
    json_t *child;
    size_t i;
    char number[32];

    if (depth > MAX_JSON_DEPTH)
        return;
    if (json_is_object(j)) {
        json_object_foreach (j, key, child) {
            LB_AUTO_FREE char *name = lb_asprintf("%s%s%s", prefix, *prefix ? "." : "", key);
            json_pairs(p, name, child, depth + 1);
        }
    } else if (json_is_array(j)) {
        json_array_foreach (j, i, child) {
            LB_AUTO_FREE char *name = lb_asprintf("%s.%zu", prefix, i);
            json_pairs(p, name, child, depth + 1);
        }
    } else if (json_is_string(j)) {
        pair_add(p, prefix, strlen(prefix), json_string_value(j));
    } else if (json_is_boolean(j)) {
        pair_add(p, prefix, strlen(prefix), json_is_true(j) ? "on" : "off");
    } else if (json_is_integer(j)) {
        snprintf(number, sizeof(number), "%lld", (long long)json_integer_value(j));
        pair_add(p, prefix, strlen(prefix), number);
    }
}

static void text_pairs(struct pairs *p, const char *s)
{
    LB_AUTO_FREE char *part = lb_alloc(strlen(s) + 1);
    for (bool first = true; *s || first; first = false) {
        size_t len = 0;
        for (; *s && (*s != ',' || s[1] == ','); s++) {
            if (*s == ',') /* doubled */
                s++;
            part[len++] = *s;
        }
        part[len] = '\0';
        if (*s == ',')
            s++;
        char *eq = strchr(part, '=');
        if (eq)
            pair_add(p, part, (size_t)(eq - part), eq + 1);
        else if (first)
            pair_add(p, "", 0, part);
        else if (!strncmp(part, "no", 2)) /* nowait: wait=off */
            pair_add(p, part + 2, len - 2, "off");
        else
            pair_add(p, part, len, "on");
    }
}

static struct pairs parse(const char *arg)
{
    struct pairs p = {0};
    json_t *j = *arg == '{' ? json_loads(arg, 0, NULL) : NULL;
    if (j)
        json_pairs(&p, "", j, 0);
    else
        text_pairs(&p, arg);
    json_decref(j);
    return p;
}

static void pairs_free(struct pairs *p)
{
    for (unsigned i = 0; i < p->n; i++) {
        free(p->v[i].key);
        free(p->v[i].value);
    }
    free(p->v);
}

/* "" when absent. */
static const char *get(const struct pairs *p, const char *key)
{
    for (unsigned i = 0; i < p->n; i++)
        if (!strcmp(p->v[i].key, key))
            return p->v[i].value;
    return "";
}

/* The implied first value, or a named one in JSON. */
static const char *type_of(const struct pairs *p, const char *json_key)
{
    return *get(p, "") ? get(p, "") : get(p, json_key);
}

static bool is_on(const struct pairs *p, const char *key)
{
    const char *v = get(p, key);
    return !strcmp(v, "on") || !strcmp(v, "yes") || !strcmp(v, "true");
}

/* ------------------------------------------------------------------- items */

static struct lb_arg_item *add(struct scan *s, enum lb_arg_kind kind, const char *value)
{
    s->v = lb_realloc(s->v, (s->n + 1) * sizeof(*s->v));
    struct lb_arg_item *it = &s->v[s->n++];
    *it = (struct lb_arg_item){.kind = kind, .option = s->option, .value = lb_strdup(value)};
    return it;
}

static void add_path(struct scan *s, enum lb_arg_kind kind, const char *path)
{
    /* /dev/fdset/N and /dev/fd/N are descriptors in disguise */
    if (!strncmp(path, "/dev/fdset/", 11) || !strncmp(path, "/dev/fd/", 8))
        add(s, LB_ARG_FD, strrchr(path, '/') + 1);
    else if (*path)
        add(s, kind, path);
}

/* Image names may be URLs or "driver:rest"; only what is in a file system here. */
static void add_disk(struct scan *s, const char *path, bool read_only)
{
    if (!strncmp(path, "file:", 5))
        path += 5;
    const char *colon = strchr(path, ':'), *slash = strchr(path, '/');
    if (!*path || (colon && (!slash || colon < slash)))
        return;
    unsigned before = s->n;
    add_path(s, LB_ARG_DISK, path);
    if (s->n > before)
        s->v[s->n - 1].read_only = read_only;
}

static void add_port(struct scan *s, enum lb_arg_kind kind, const char *host, size_t host_len,
                     const char *port, unsigned offset)
{
    char *end;
    unsigned long n = strtoul(port, &end, 10);
    if (end == port || n + offset > 65535 || n + offset == 0)
        return;
    if (host_len >= 2 && host[0] == '[' && host[host_len - 1] == ']') {
        host++;
        host_len -= 2;
    }
    LB_AUTO_FREE char *name = lb_asprintf("%.*s", (int)host_len, host);
    add(s, kind, name)->port = (uint16_t)(n + offset);
}

/* "HOST:PORT" or "PORT" */
static void add_hostport(struct scan *s, enum lb_arg_kind kind, const char *text, unsigned offset)
{
    const char *colon = strrchr(text, ':');
    if (colon)
        add_port(s, kind, text, (size_t)(colon - text), colon + 1, offset);
    else
        add_port(s, kind, "", 0, text, offset);
}

/* ---------------------------------------------------------------- handlers */

typedef void handler(struct scan *s, const struct pairs *p, const char *arg);

static void h_file(struct scan *s, const struct pairs *p, const char *arg)
{
    (void)p;
    add_path(s, LB_ARG_FILE, arg);
}

/* A bare name is looked up among the emulator's own data files. */
static void h_firmware(struct scan *s, const struct pairs *p, const char *arg)
{
    (void)p;
    if (strchr(arg, '/'))
        add_path(s, LB_ARG_FILE, arg);
}

static void h_initrd(struct scan *s, const struct pairs *p, const char *arg)
{
    (void)arg; /* "FILE ARGS,FILE2" for multiboot modules: rare, the first file counts */
    LB_AUTO_FREE char *name = lb_strdup(get(p, ""));
    name[strcspn(name, " ")] = '\0';
    add_path(s, LB_ARG_FILE, name);
}

static void h_output(struct scan *s, const struct pairs *p, const char *arg)
{
    (void)p;
    add_path(s, LB_ARG_OUTPUT, arg);
}

static void h_image(struct scan *s, const struct pairs *p, const char *arg)
{
    (void)p;
    add_disk(s, arg, false);
}

static void h_cdrom(struct scan *s, const struct pairs *p, const char *arg)
{
    (void)p;
    add_disk(s, arg, true);
}

static void h_drive(struct scan *s, const struct pairs *p, const char *arg)
{
    static const char *const keys[] = {"file", "file.filename", "filename", "file.file.filename"};
    (void)arg;
    bool ro = is_on(p, "readonly") || is_on(p, "read-only") || is_on(p, "snapshot") ||
              !strcmp(get(p, "media"), "cdrom");
    /* "file" of a -blockdev is the name of another node */
    for (size_t i = !strcmp(s->option, "-blockdev"); i < LB_ARRAY_LEN(keys); i++)
        add_disk(s, get(p, keys[i]), ro);
    add_path(s, LB_ARG_UNIX_CONNECT, get(p, "server.path"));
    add_path(s, LB_ARG_UNIX_CONNECT, get(p, "file.server.path"));
}

static void h_directory(struct scan *s, const struct pairs *p, const char *arg)
{
    (void)arg;
    add_path(s, LB_ARG_DIR, get(p, "path"));
    add_path(s, LB_ARG_UNIX_CONNECT, get(p, "socket"));
    if (*get(p, "sock_fd"))
        add(s, LB_ARG_FD, get(p, "sock_fd"));
}

static void h_file_key(struct scan *s, const struct pairs *p, const char *arg)
{
    (void)arg;
    add_path(s, LB_ARG_FILE, get(p, "file"));
}

static void h_add_fd(struct scan *s, const struct pairs *p, const char *arg)
{
    (void)arg;
    add(s, LB_ARG_FD, get(p, "fd"));
}

static void add_fds(struct scan *s, const struct pairs *p)
{
    static const char *const keys[] = {"fd", "fds", "vhostfd", "vhostfds", "addr.str"};
    for (size_t i = 0; i < LB_ARRAY_LEN(keys); i++)
        if (*get(p, keys[i]) && (i < 4 || !strcmp(get(p, "addr.type"), "fd")))
            add(s, LB_ARG_FD, get(p, keys[i]));
}

/* tcp:ADDR:PORT-GUEST:PORT */
static void add_hostfwd(struct scan *s, const char *rule)
{
    enum lb_arg_kind kind = strncmp(rule, "udp:", 4) ? LB_ARG_TCP_LISTEN : LB_ARG_UDP_LISTEN;
    const char *from = strchr(rule, ':');
    if (!from)
        return;
    LB_AUTO_FREE char *host = lb_strdup(from + 1);
    char *dash = strchr(host, '-');
    if (dash)
        *dash = '\0';
    add_hostport(s, kind, host, 0);
}

static void net_tap(struct scan *s, const struct pairs *p)
{
    if (*get(p, "ifname")) {
        struct lb_arg_item *tap = add(s, LB_ARG_TAP, get(p, "ifname"));
        if (tap)
            tap->scripted = strcmp(get(p, "script"), "no") != 0;
    }
    add_fds(s, p);
    if (is_on(p, "vhost") || is_on(p, "vhostforce"))
        add(s, LB_ARG_VHOST, "/dev/vhost-net");
    if (*get(p, "br"))
        add(s, LB_ARG_BRIDGE, get(p, "br"));
    static const char *const scripts[] = {"script", "downscript"};
    for (size_t i = 0; i < 2; i++)
        if (strcmp(get(p, scripts[i]), "no"))
            add_path(s, LB_ARG_FILE, get(p, scripts[i]));
}

static void net_stream(struct scan *s, const struct pairs *p)
{
    bool server = is_on(p, "server");
    add_fds(s, p);
    if (!strcmp(get(p, "addr.type"), "unix"))
        add_path(s, server ? LB_ARG_UNIX_LISTEN : LB_ARG_UNIX_CONNECT, get(p, "addr.path"));
    else if (server && *get(p, "addr.port"))
        add_port(s, LB_ARG_TCP_LISTEN, get(p, "addr.host"), strlen(get(p, "addr.host")),
                 get(p, "addr.port"), 0);
}

static void h_net(struct scan *s, const struct pairs *p, const char *arg)
{
    const char *type = type_of(p, "type");
    (void)arg;
    if (!strcmp(type, "tap")) {
        net_tap(s, p);
    } else if (!strcmp(type, "bridge")) {
        add(s, LB_ARG_BRIDGE, *get(p, "br") ? get(p, "br") : "br0");
    } else if (!strcmp(type, "user")) {
        for (unsigned i = 0; i < p->n; i++)
            if (!strcmp(p->v[i].key, "hostfwd") || (!strncmp(p->v[i].key, "hostfwd.", 8) &&
                                                    strstr(p->v[i].key, ".str")))
                add_hostfwd(s, p->v[i].value);
        add_path(s, LB_ARG_DIR, get(p, "tftp"));
        add_path(s, LB_ARG_DIR, get(p, "smb"));
    } else if (!strcmp(type, "socket")) {
        if (*get(p, "listen"))
            add_hostport(s, LB_ARG_TCP_LISTEN, get(p, "listen"), 0);
        add_fds(s, p);
    } else if (!strcmp(type, "stream") || !strcmp(type, "dgram")) {
        net_stream(s, p);
    } else if (!strcmp(type, "vhost-user") || !strcmp(type, "vhost-vdpa") ||
               !strcmp(type, "af-xdp") || !strcmp(type, "netmap")) {
        add(s, LB_ARG_VHOST_USER, type);
    }
}

static void h_chardev(struct scan *s, const struct pairs *p, const char *arg)
{
    const char *type = type_of(p, "backend.type");
    bool server = is_on(p, "server");
    (void)arg;
    if (!strncmp(get(p, "id"), "lb-", 3))
        return; /* our own monitor: a receiver gets one of its own */
    add_path(s, LB_ARG_OUTPUT, get(p, "logfile"));
    if (!strcmp(type, "socket")) {
        add_fds(s, p);
        if (!is_on(p, "abstract"))
            add_path(s, server ? LB_ARG_UNIX_LISTEN : LB_ARG_UNIX_CONNECT, get(p, "path"));
        if (server && *get(p, "port") && !*get(p, "to"))
            add_port(s, LB_ARG_TCP_LISTEN, get(p, "host"), strlen(get(p, "host")), get(p, "port"), 0);
    } else if (!strcmp(type, "file")) {
        add_path(s, LB_ARG_OUTPUT, get(p, "path"));
        add_path(s, LB_ARG_FILE, get(p, "input-path"));
    } else if (!strcmp(type, "pipe")) {
        add_path(s, LB_ARG_OUTPUT, get(p, "path"));
    } else if (!strcmp(type, "serial") || !strcmp(type, "tty") || !strcmp(type, "parallel") ||
               !strcmp(type, "parport")) {
        add(s, LB_ARG_PASSTHROUGH, get(p, "path"));
    } else if (!strcmp(type, "udp") && *get(p, "localport")) {
        add_port(s, LB_ARG_UDP_LISTEN, get(p, "localaddr"), strlen(get(p, "localaddr")),
                 get(p, "localport"), 0);
    }
}

/* -serial, -monitor, -qmp...: "unix:PATH,server=on" and friends. -gdb always listens. */
static void h_char(struct scan *s, const struct pairs *p, const char *arg)
{
    const char *dev = get(p, "");
    bool server = is_on(p, "server") || !strcmp(s->option, "-gdb");
    (void)arg;
    if (!strncmp(dev, "mon:", 4))
        dev += 4;
    if (!strncmp(dev, "unix:", 5))
        add_path(s, server ? LB_ARG_UNIX_LISTEN : LB_ARG_UNIX_CONNECT, dev + 5);
    else if (!strncmp(dev, "tcp:", 4) && server)
        add_hostport(s, LB_ARG_TCP_LISTEN, dev + 4, 0);
    else if ((!strncmp(dev, "telnet:", 7) || !strncmp(dev, "tn3270:", 7)) && server)
        add_hostport(s, LB_ARG_TCP_LISTEN, dev + 7, 0);
    else if (!strncmp(dev, "websocket:", 10) && server)
        add_hostport(s, LB_ARG_TCP_LISTEN, dev + 10, 0);
    else if (!strncmp(dev, "file:", 5) || !strncmp(dev, "pipe:", 5))
        add_path(s, LB_ARG_OUTPUT, dev + 5);
    else if (!strncmp(dev, "/dev/", 5))
        add(s, LB_ARG_PASSTHROUGH, dev);
}

static void h_vnc(struct scan *s, const struct pairs *p, const char *arg)
{
    const char *dpy = type_of(p, "vnc");
    (void)arg;
    if (!strncmp(dpy, "unix:", 5))
        add_path(s, LB_ARG_UNIX_LISTEN, dpy + 5);
    else if (strchr(dpy, ':') && !is_on(p, "reverse") && !*get(p, "to"))
        add_hostport(s, LB_ARG_TCP_LISTEN, dpy, 5900);
    const char *ws = get(p, "websocket");
    if (*ws && strspn(ws, "0123456789") == strlen(ws) && !*get(p, "to"))
        add_port(s, LB_ARG_TCP_LISTEN, "", 0, ws, 0);
}

static void h_spice(struct scan *s, const struct pairs *p, const char *arg)
{
    const char *addr = get(p, "addr");
    (void)arg;
    if (is_on(p, "unix")) {
        add_path(s, LB_ARG_UNIX_LISTEN, addr);
        return;
    }
    add_port(s, LB_ARG_TCP_LISTEN, addr, strlen(addr), get(p, "port"), 0);
    add_port(s, LB_ARG_TCP_LISTEN, addr, strlen(addr), get(p, "tls-port"), 0);
}

static bool starts(const char *s, const char *prefix)
{
    return !strncmp(s, prefix, strlen(prefix));
}

static void h_device(struct scan *s, const struct pairs *p, const char *arg)
{
    const char *type = type_of(p, "driver");
    (void)arg;
    if (starts(type, "vfio-")) {
        const char *host = *get(p, "host") ? get(p, "host") : get(p, "sysfsdev");
        LB_AUTO_FREE char *what = lb_asprintf("%s %s", type, host);
        add(s, LB_ARG_PASSTHROUGH, what);
    } else if (starts(type, "usb-host") || starts(type, "scsi-generic") ||
               starts(type, "scsi-block") || starts(type, "vhost-scsi") ||
               starts(type, "virtio-input-host") || starts(type, "vhost-vdpa")) {
        add(s, LB_ARG_PASSTHROUGH, type);
    } else if (starts(type, "vhost-user-")) {
        add(s, LB_ARG_VHOST_USER, type);
    } else if (starts(type, "vhost-vsock")) {
        add(s, LB_ARG_VHOST, "/dev/vhost-vsock");
        add_fds(s, p);
    } else if (!strcmp(type, "loader")) {
        add_path(s, LB_ARG_FILE, get(p, "file"));
    }
    if (strchr(get(p, "romfile"), '/'))
        add_path(s, LB_ARG_FILE, get(p, "romfile"));
}

static void h_object(struct scan *s, const struct pairs *p, const char *arg)
{
    const char *type = type_of(p, "qom-type");
    (void)arg;
    if (!strcmp(type, "secret"))
        add_path(s, LB_ARG_FILE, get(p, "file"));
    else if (!strcmp(type, "rng-random"))
        add_path(s, LB_ARG_FILE, *get(p, "filename") ? get(p, "filename") : "/dev/urandom");
    else if (starts(type, "tls-creds-"))
        add_path(s, LB_ARG_DIR, get(p, "dir"));
    else if (!strcmp(type, "filter-dump"))
        add_path(s, LB_ARG_OUTPUT, get(p, "file"));
    else if (!strcmp(type, "input-linux"))
        add(s, LB_ARG_PASSTHROUGH, get(p, "evdev"));
}

static void h_usbdevice(struct scan *s, const struct pairs *p, const char *arg)
{
    (void)p;
    if (starts(arg, "host:"))
        add(s, LB_ARG_PASSTHROUGH, arg);
}

/* Options with one argument. NULL: nothing of the host in it, known so that an
 * argument that looks like an option ("-append '-kernel x'") is not taken for one. */
static const struct {
    const char *name;
    handler *handle;
} options[] = {
    {"-kernel", h_file}, {"-dtb", h_file}, {"-readconfig", h_file}, {"-option-rom", h_file_key},
    {"-initrd", h_initrd}, {"-bios", h_firmware},
    {"-fw_cfg", h_file_key}, {"-smbios", h_file_key}, {"-acpitable", h_file_key},
    {"-drive", h_drive}, {"-blockdev", h_drive}, {"-cdrom", h_cdrom}, {"-pflash", h_image},
    {"-hda", h_image}, {"-hdb", h_image}, {"-hdc", h_image}, {"-hdd", h_image},
    {"-fda", h_image}, {"-fdb", h_image}, {"-sd", h_image}, {"-mtdblock", h_image},
    {"-fsdev", h_directory}, {"-virtfs", h_directory},
    {"-D", h_output}, {"-pidfile", h_output}, {"-add-fd", h_add_fd},
    {"-netdev", h_net}, {"-net", h_net}, {"-nic", h_net},
    {"-chardev", h_chardev}, {"-serial", h_char}, {"-parallel", h_char}, {"-monitor", h_char},
    {"-qmp", h_char}, {"-qmp-pretty", h_char}, {"-gdb", h_char}, {"-debugcon", h_char},
    {"-vnc", h_vnc}, {"-spice", h_spice},
    {"-device", h_device}, {"-object", h_object}, {"-usbdevice", h_usbdevice},
    {"-append", NULL}, {"-name", NULL}, {"-m", NULL}, {"-smp", NULL}, {"-cpu", NULL},
    {"-machine", NULL}, {"-M", NULL}, {"-accel", NULL}, {"-uuid", NULL}, {"-boot", NULL},
    {"-rtc", NULL}, {"-global", NULL}, {"-msg", NULL}, {"-k", NULL}, {"-display", NULL},
    {"-vga", NULL}, {"-audiodev", NULL}, {"-audio", NULL}, {"-d", NULL}, {"-mon", NULL},
    {"-sandbox", NULL}, {"-overcommit", NULL}, {"-numa", NULL}, {"-icount", NULL},
    {"-incoming", NULL}, {"-runas", NULL}, {"-tpmdev", NULL}, {"-set", NULL}, {"-trace", NULL},
    {"-watchdog-action", NULL}, {"-mem-path", NULL}, {"-echr", NULL}, {"-compat", NULL},
    {"-action", NULL}, {"-loadvm", NULL}, {"-seed", NULL}, {"-run-with", NULL}, {"-g", NULL},
};

static int find_option(const char *arg)
{
    if (starts(arg, "--"))
        arg++;
    for (size_t i = 0; i < LB_ARRAY_LEN(options); i++)
        if (!strcmp(options[i].name, arg))
            return (int)i;
    return -1;
}

void lb_argv_scan(char *const *argv, struct lb_arg_item **v, unsigned *n)
{
    struct scan s = {0};
    bool after_unknown = false; /* the next word may be that option's argument */

    for (unsigned i = 1; argv[0] && argv[i]; i++) {
        int o = argv[i][0] == '-' ? find_option(argv[i]) : -1;
        if (o >= 0 && argv[i + 1]) {
            i++;
            after_unknown = false;
            if (!options[o].handle)
                continue;
            s.option = options[o].name;
            struct pairs p = parse(argv[i]);
            options[o].handle(&s, &p, argv[i]);
            pairs_free(&p);
        } else if (argv[i][0] == '-') {
            after_unknown = true;
        } else {
            s.option = "image";
            if (!after_unknown)
                add_disk(&s, argv[i], false);
            after_unknown = false;
        }
    }
    *v = s.v;
    *n = s.n;
}

void lb_argv_items_free(struct lb_arg_item *v, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        free(v[i].value);
    free(v);
}
