/*
 * core/qemu/cmdline.c - QEMU command lines as a list of options.
 *
 * QEMU accepts one or two dashes, an option's value is always the next word, and
 * which options take none is fixed.  Values are comma lists in which ",," is a
 * comma.
 */
#include "core/qemu/qemu_internal.h"

#include <string.h>

/* Options without a value, of QEMU 5 to 10. */
static const char *const flags[] = {
    "S", "s", "h", "help", "version", "daemonize", "nographic", "enable-kvm", "nodefaults",
    "no-user-config", "no-reboot", "no-shutdown", "snapshot", "no-acpi", "no-hpet",
    "no-fd-bootchk", "full-screen", "usb", "win2k-hack", "mem-prealloc", "singlestep",
    "only-migratable", "portrait", "alt-grab", "ctrl-grab", "no-frame", "no-quit", "sdl",
    "curses", "semihosting", "old-param", "nodefconfig", "preconfig", "enable-fips",
    "xen-attach", "xen-domid-restrict", "async-teardown", "enable-sync-profile", "perfmap",
    "jitdump", "no-kvm", "no-kvm-irqchip", "show-cursor", "bt-none",
};

static bool takes_value(const char *name)
{
    for (unsigned i = 0; i < LB_ARRAY_LEN(flags); i++)
        if (strcmp(flags[i], name) == 0)
            return false;
    return true;
}

bool lb_qemu_opt_is(const struct lb_qemu_opt *o, const char *name)
{
    return strcmp(o->name, name) == 0;
}

void lb_qemu_opts_add(struct lb_qemu_opts *o, const char *name, const char *value)
{
    o->v = lb_realloc(o->v, (o->n + 1) * sizeof(*o->v));
    o->v[o->n++] = (struct lb_qemu_opt){lb_strdup(name), lb_strdup(value)};
}

int lb_qemu_opts_parse(char *const *argv, struct lb_qemu_opts *out, struct lb_error *err)
{
    *out = (struct lb_qemu_opts){0};
    if (!argv || !argv[0])
        return lb_fail(err, LB_E_USAGE, "the command line of QEMU is empty");
    out->emulator = lb_strdup(argv[0]);
    for (unsigned i = 1; argv[i]; i++) {
        const char *a = argv[i];
        if (a[0] != '-' || !a[1]) {
            lb_qemu_opts_add(out, "", a);
            continue;
        }
        a += a[1] == '-' ? 2 : 1;
        if (!takes_value(a)) {
            lb_qemu_opts_add(out, a, NULL);
        } else if (argv[i + 1]) {
            lb_qemu_opts_add(out, a, argv[++i]);
        } else {
            lb_qemu_opts_free(out);
            return lb_fail(err, LB_E_USAGE, "the command line of QEMU ends with -%s", a);
        }
    }
    return 0;
}

void lb_qemu_opts_free(struct lb_qemu_opts *o)
{
    for (unsigned i = 0; i < o->n; i++) {
        free(o->v[i].name);
        free(o->v[i].value);
    }
    free(o->v);
    free(o->emulator);
    *o = (struct lb_qemu_opts){0};
}

char **lb_qemu_opts_argv(const struct lb_qemu_opts *o)
{
    char **argv = lb_alloc((2 * (size_t)o->n + 2) * sizeof(*argv));
    unsigned n = 0;
    argv[n++] = lb_strdup(o->emulator);
    for (unsigned i = 0; i < o->n; i++) {
        if (o->v[i].name[0])
            argv[n++] = lb_asprintf("-%s", o->v[i].name);
        if (o->v[i].value)
            argv[n++] = lb_strdup(o->v[i].value);
    }
    return argv;
}

/* End of the list element at p: a single comma or the end. */
static const char *element_end(const char *p)
{
    for (; *p; p++) {
        if (*p == ',') {
            if (p[1] != ',')
                return p;
            p++;
        }
    }
    return p;
}

/* The element's value when it is for key, else NULL. */
static const char *value_of(const char *p, const char *end, const char *key, bool first)
{
    const char *eq = memchr(p, '=', (size_t)(end - p));
    if (!key)
        return first && !eq ? p : NULL;
    size_t n = strlen(key);
    return eq && (size_t)(eq - p) == n && strncmp(p, key, n) == 0 ? eq + 1 : NULL;
}

char *lb_qemu_prop(const char *value, const char *key)
{
    char *found = NULL;
    for (const char *p = value; value && *p;) {
        const char *end = element_end(p), *v = value_of(p, end, key, p == value);
        if (v) { /* the last one counts, as in QEMU */
            free(found);
            char *to = found = lb_alloc((size_t)(end - v) + 1);
            for (; v < end; v++) {
                *to++ = *v;
                if (*v == ',')
                    v++;
            }
        }
        p = *end ? end + 1 : end;
    }
    return found;
}

char *lb_qemu_prop_set(const char *value, const char *key, const char *val)
{
    size_t extra = val ? 2 * strlen(val) + strlen(key ? key : "") + 3 : 0;
    char *out = lb_alloc(strlen(value) + extra + 1), *to = out;
    bool done = !val;
    for (const char *p = value;;) {
        const char *end = element_end(p);
        bool mine = value_of(p, end, key, p == value) != NULL;
        if (!mine && end > p) {
            if (to > out)
                *to++ = ',';
            memcpy(to, p, (size_t)(end - p));
            to += end - p;
        }
        if ((mine && !done) || (!*end && !done)) {
            if (to > out)
                *to++ = ',';
            if (key)
                to += sprintf(to, "%s=", key);
            for (const char *v = val; *v; v++) {
                *to++ = *v;
                if (*v == ',')
                    *to++ = ',';
            }
            done = true;
        }
        if (!*end)
            break;
        p = end + 1;
    }
    *to = 0;
    return out;
}
