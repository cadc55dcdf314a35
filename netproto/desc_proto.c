/* netproto/desc_proto.c - descriptions on the wire; see desc_proto.h.
 *
 * Both directions check the protobuf form: one list of rules, applied to what is
 * sent and to what was received. */
#include "netproto/desc_proto.h"

#include <limits.h>
#include <string.h>

#include "core/registry.h"

/* One well-formed UTF-8 sequence at s: its length, or 0. Overlong forms,
 * surrogates and values above U+10FFFF are not well-formed. */
static size_t utf8_sequence(const unsigned char *s)
{
    if (s[0] < 0x80)
        return 1;
    size_t n = s[0] >= 0xf0 ? 4 : s[0] >= 0xe0 ? 3 : 2;
    if (s[0] < 0xc2 || s[0] > 0xf4)
        return 0;
    for (size_t i = 1; i < n; i++)
        if ((s[i] & 0xc0) != 0x80) /* also stops at the final NUL */
            return 0;
    if ((s[0] == 0xe0 && s[1] < 0xa0) || (s[0] == 0xed && s[1] > 0x9f) ||
        (s[0] == 0xf0 && s[1] < 0x90) || (s[0] == 0xf4 && s[1] > 0x8f))
        return 0;
    return n;
}

static bool text_clean(const char *text)
{
    const unsigned char *s = (const unsigned char *)text;
    while (*s) {
        size_t n = utf8_sequence(s);
        if (n == 0 || *s < 0x20 || *s == 0x7f || (*s == 0xc2 && s[1] < 0xa0)) /* C0, DEL, C1 */
            return false;
        s += n;
    }
    return true;
}

static int check_text(const char *what, const char *s, size_t max, struct lb_error *err)
{
    if (strnlen(s, max + 1) > max)
        return lb_fail(err, LB_E_PROTO, "VM description: %s is longer than %zu bytes", what, max);
    if (!text_clean(s))
        return lb_fail(err, LB_E_PROTO,
                       "VM description: %s contains control characters or is not UTF-8", what);
    return 0;
}

static int check_list(const char *what, char *const *v, size_t n, size_t max_n, size_t max_bytes,
                      struct lb_error *err)
{
    if (n > max_n)
        return lb_fail(err, LB_E_PROTO, "VM description: %zu %s, at most %zu are allowed", n, what,
                       max_n);
    for (size_t i = 0; i < n; i++)
        if (check_text(what, v[i], max_bytes, err) < 0)
            return -1;
    return 0;
}

static int check_argv(const Lb__VmDescription *p, struct lb_error *err)
{
    size_t total = 0;
    if (p->n_argv == 0 || !p->argv[0][0])
        return lb_fail(err, LB_E_PROTO, "VM description: the command line is empty");
    if (check_list("command line arguments", p->argv, p->n_argv, LB_DESC_MAX_ARGS,
                   LB_DESC_MAX_ARG_BYTES, err) < 0)
        return -1;
    for (size_t i = 0; i < p->n_argv; i++)
        total += strlen(p->argv[i]) + 1;
    if (total > LB_DESC_MAX_ARGV_BYTES)
        return lb_fail(err, LB_E_PROTO,
                       "VM description: the command line has %zu bytes, at most %u are allowed",
                       total, LB_DESC_MAX_ARGV_BYTES);
    return 0;
}

static int check_disks(const Lb__VmDescription *p, struct lb_error *err)
{
    if (p->n_disks > LB_DESC_MAX_DISKS)
        return lb_fail(err, LB_E_PROTO, "VM description: %zu disks, at most %u are allowed",
                       p->n_disks, LB_DESC_MAX_DISKS);
    for (size_t i = 0; i < p->n_disks; i++) {
        const Lb__Disk *k = p->disks[i];
        if (check_text("a disk's id", k->id, 256, err) < 0 ||
            check_text("a disk's path", k->path, PATH_MAX, err) < 0 ||
            check_text("a disk's format", k->format, 64, err) < 0 ||
            check_text("a disk's first path", k->argv_path, PATH_MAX, err) < 0)
            return -1;
    }
    return 0;
}

static int check_numbers(const Lb__VmDescription *p, struct lb_error *err)
{
    if (p->vcpus == 0 || p->vcpus > LB_DESC_MAX_VCPUS)
        return lb_fail(err, LB_E_PROTO, "VM description: %u vCPUs", p->vcpus);
    if (p->ram_bytes == 0 || p->ram_bytes > LB_DESC_MAX_RAM_BYTES || p->ram_bytes % LB_PAGE_SIZE)
        return lb_fail(err, LB_E_PROTO, "VM description: %llu bytes of memory",
                       (unsigned long long)p->ram_bytes);
    /* (uid_t)-1 means "leave it" to setuid(2): the VM would keep our privileges. */
    if (p->uid == UINT32_MAX || p->gid == UINT32_MAX)
        return lb_fail(err, LB_E_PROTO, "VM description: invalid user or group");
    return 0;
}

static int check(const Lb__VmDescription *p, struct lb_error *err)
{
    const struct {
        const char *what, *text;
        size_t max;
    } texts[] = {
        {"the name", p->name, 63},
        {"the hypervisor", p->hypervisor, 15},
        {"the hypervisor's version", p->hv_version, 64},
        {"the emulator", p->emulator, PATH_MAX - 1},
        {"the working directory", p->cwd, PATH_MAX - 1},
        {"the machine type", p->machine, 128},
        {"the accelerator", p->accel, 32},
        {"the CPU model", p->cpu_model, 256},
        {"the UUID", p->uuid, 64},
        {"the kernel release", p->kernel_release, 128},
    };
    for (size_t i = 0; i < LB_ARRAY_LEN(texts); i++)
        if (check_text(texts[i].what, texts[i].text, texts[i].max, err) < 0)
            return -1;
    /* The name becomes a directory. */
    if (!lb_vm_name_valid(p->name))
        return lb_fail(err, LB_E_PROTO, "VM description: \"%s\" is not a VM name", p->name);
    if (!p->hypervisor[0] || !p->machine[0])
        return lb_fail(err, LB_E_PROTO, "VM description: no hypervisor or machine type");
    if (p->emulator[0] != '/')
        return lb_fail(err, LB_E_PROTO, "VM description: the emulator is not an absolute path");
    if (p->cwd[0] && p->cwd[0] != '/')
        return lb_fail(err, LB_E_PROTO,
                       "VM description: the working directory is not an absolute path");
    if (check_numbers(p, err) < 0 || check_argv(p, err) < 0 || check_disks(p, err) < 0)
        return -1;
    if (check_list("CPU features", p->features, p->n_features, LB_DESC_MAX_FEATURES, 128, err) < 0)
        return -1;
    return check_list("blockers", p->blockers, p->n_blockers, LB_DESC_MAX_BLOCKERS, 2048, err);
}

/* ------------------------------------------------------------------ to wire */

static char *text_or_empty(const char *s)
{
    return lb_strdup(s ? s : "");
}

static char **list_dup(char *const *v, size_t *n)
{
    *n = 0;
    while (v && v[*n])
        ++*n;
    char **out = *n ? lb_alloc(*n * sizeof(*out)) : NULL;
    for (size_t i = 0; i < *n; i++)
        out[i] = lb_strdup(v[i]);
    return out;
}

static void disks_to_proto(const struct lb_vm_desc *d, Lb__VmDescription *p)
{
    if (!d->n_disks)
        return;
    p->disks = lb_alloc(d->n_disks * sizeof(*p->disks));
    p->n_disks = d->n_disks;
    for (unsigned i = 0; i < d->n_disks; i++) {
        Lb__Disk *k = p->disks[i] = lb_alloc(sizeof(*k));
        lb__disk__init(k);
        k->id = text_or_empty(d->disks[i].id);
        k->path = text_or_empty(d->disks[i].path);
        k->format = text_or_empty(d->disks[i].format);
        k->read_only = d->disks[i].read_only;
        k->shareable = d->disks[i].shareable;
        k->argv_path = text_or_empty(d->disks[i].argv_path);
        k->backing = d->disks[i].backing;
    }
}

int lb_desc_to_proto(const struct lb_vm_desc *d, Lb__VmDescription **out, struct lb_error *err)
{
    Lb__VmDescription *p = lb_alloc(sizeof(*p));
    struct lb_error why = LB_ERROR_INIT;

    lb__vm_description__init(p);
    p->name = text_or_empty(d->name);
    p->hypervisor = text_or_empty(d->hypervisor);
    p->hv_version = text_or_empty(d->hv_version);
    p->emulator = text_or_empty(d->emulator);
    p->argv = list_dup(d->argv, &p->n_argv);
    p->cwd = text_or_empty(d->cwd);
    p->uid = d->uid;
    p->gid = d->gid;
    p->machine = text_or_empty(d->machine);
    p->accel = text_or_empty(d->accel);
    p->cpu_model = text_or_empty(d->cpu_model);
    p->vcpus = d->vcpus;
    p->ram_bytes = d->ram_bytes;
    p->uuid = text_or_empty(d->uuid);
    disks_to_proto(d, p);
    p->features = list_dup(d->features, &p->n_features);
    p->blockers = list_dup(d->blockers, &p->n_blockers);
    p->kernel_release = text_or_empty(d->kernel_release);

    if (check(p, &why) < 0) {
        lb__vm_description__free_unpacked(p, NULL);
        lb_fail(err, LB_E_UNSUPPORTED, "%s", why.message);
        return lb_remedy(err, "a VM described like this cannot be sent to another host; start it "
                              "with a simpler command line or name");
    }
    *out = p;
    return 0;
}

/* ---------------------------------------------------------------- from wire */

static char **list_of(char *const *v, size_t n)
{
    char **out = lb_alloc((n + 1) * sizeof(*out));
    for (size_t i = 0; i < n; i++)
        out[i] = lb_strdup(v[i]);
    return out;
}

int lb_desc_from_proto(const Lb__VmDescription *p, struct lb_vm_desc *out, struct lb_error *err)
{
    if (!p)
        return lb_fail(err, LB_E_PROTO, "the peer sent no VM description");
    if (check(p, err) < 0)
        return -1;
    struct lb_vm_desc d = {
        .name = lb_strdup(p->name),
        .hypervisor = lb_strdup(p->hypervisor),
        .hv_version = lb_strdup(p->hv_version),
        .emulator = lb_strdup(p->emulator),
        .argv = list_of(p->argv, p->n_argv),
        .cwd = lb_strdup(p->cwd),
        .uid = p->uid,
        .gid = p->gid,
        .machine = lb_strdup(p->machine),
        .accel = lb_strdup(p->accel),
        .cpu_model = lb_strdup(p->cpu_model),
        .vcpus = p->vcpus,
        .ram_bytes = p->ram_bytes,
        .uuid = lb_strdup(p->uuid),
        .n_disks = (unsigned)p->n_disks,
        .features = list_of(p->features, p->n_features),
        .blockers = list_of(p->blockers, p->n_blockers),
        .kernel_release = lb_strdup(p->kernel_release),
    };
    d.disks = lb_alloc(p->n_disks * sizeof(*d.disks));
    for (size_t i = 0; i < p->n_disks; i++) {
        const Lb__Disk *k = p->disks[i];
        d.disks[i] = (struct lb_disk_desc){
            .id = lb_strdup(k->id),
            .path = lb_strdup(k->path),
            .format = lb_strdup(k->format),
            .read_only = k->read_only,
            .shareable = k->shareable,
            .argv_path = lb_strdup(k->argv_path),
            .backing = k->backing,
        };
    }
    *out = d;
    return 0;
}
