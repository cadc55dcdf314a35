/*
 * core/qemu/another.c - another machine from the same state: name, UUID and MACs on the command line.
 *
 * The guest that runs has its MACs and its UUID in its memory, and the cards have theirs in their
 * state: they change when it boots the next time.  What takes effect at once is what the host sees:
 * name and UUID of the VM.
 *
 * A card without mac= gets one too: QEMU numbers such cards from the same address in every VM.
 */
#include "core/qemu/qemu_internal.h"

#include <string.h>
#include <xxhash.h>

static void replace(struct lb_qemu_opt *o, char *value)
{
    free(o->value);
    o->value = value;
}

static void set_name(struct lb_qemu_opts *o, const char *name)
{
    bool found = false;
    for (unsigned i = 0; i < o->n; i++) {
        if (!lb_qemu_opt_is(&o->v[i], "name"))
            continue;
        LB_AUTO_FREE char *bare = lb_qemu_prop_set(o->v[i].value, NULL, NULL);
        replace(&o->v[i], lb_qemu_prop_set(bare, "guest", name));
        found = true;
    }
    if (!found)
        lb_qemu_opts_add(o, "name", name);
}

static void set_uuid(struct lb_qemu_opts *o, const char *uuid)
{
    bool found = false;
    for (unsigned i = 0; i < o->n; i++) {
        LB_AUTO_FREE char *smbios =
            lb_qemu_opt_is(&o->v[i], "smbios") ? lb_qemu_prop(o->v[i].value, "uuid") : NULL;
        if (smbios)
            replace(&o->v[i], lb_qemu_prop_set(o->v[i].value, "uuid", uuid));
        if (!lb_qemu_opt_is(&o->v[i], "uuid"))
            continue;
        replace(&o->v[i], lb_strdup(uuid));
        found = true;
    }
    if (!found)
        lb_qemu_opts_add(o, "uuid", uuid);
}

/* -------------------------------------------------------------------- MACs */

/* Of the n-th card: locally administered, the same for the same seed. */
static char *new_mac(const char *seed, unsigned n, const char *old)
{
    LB_AUTO_FREE char *text = lb_asprintf("%s %u %s", seed, n, old ? old : "");
    uint64_t h = XXH3_64bits(text, strlen(text));
    return lb_asprintf("02:%02x:%02x:%02x:%02x:%02x", (unsigned)(h >> 32 & 0xff),
                       (unsigned)(h >> 24 & 0xff), (unsigned)(h >> 16 & 0xff),
                       (unsigned)(h >> 8 & 0xff), (unsigned)(h & 0xff));
}

static bool is_card(const char *value)
{
    static const char *const models[] = {"virtio-net-", "e1000", "rtl8139", "pcnet", "ne2k_", "i8255",
                                         "vmxnet3", "usb-net", "igb", "tulip"};
    LB_AUTO_FREE char *driver = lb_qemu_get(value, "driver");
    LB_AUTO_FREE char *netdev = lb_qemu_get(value, "netdev");
    LB_AUTO_FREE char *mac = lb_qemu_get(value, "mac");
    if (!driver && value[0] != '{')
        driver = lb_qemu_prop(value, NULL);
    for (unsigned i = 0; driver && i < LB_ARRAY_LEN(models); i++)
        if (strncmp(driver, models[i], strlen(models[i])) == 0)
            return true;
    return netdev || mac;
}

/* Key of the MAC in an option that makes a card, or NULL. */
static const char *mac_key(const struct lb_qemu_opt *o)
{
    if (lb_qemu_opt_is(o, "device"))
        return is_card(o->value) ? "mac" : NULL;
    bool nic = lb_qemu_opt_is(o, "nic"), net = lb_qemu_opt_is(o, "net");
    LB_AUTO_FREE char *type = nic || net ? lb_qemu_prop(o->value, NULL) : NULL;
    if (nic)
        return type && strcmp(type, "none") == 0 ? NULL : "mac";
    return net && type && strcmp(type, "nic") == 0 ? "macaddr" : NULL;
}

/* Without any option about the network QEMU makes a card by itself. */
static bool has_default_card(const struct lb_qemu_opts *o)
{
    static const char *const without[] = {"nodefaults", "net", "nic", "netdev"};
    for (unsigned i = 0; i < o->n; i++)
        for (unsigned k = 0; k < LB_ARRAY_LEN(without); k++)
            if (lb_qemu_opt_is(&o->v[i], without[k]))
                return false;
    return true;
}

static void set_macs(struct lb_qemu_opts *o, const char *seed)
{
    unsigned n = 0;
    if (has_default_card(o)) {
        lb_qemu_opts_add(o, "net", "nic");
        lb_qemu_opts_add(o, "net", "user");
    }
    for (unsigned i = 0; i < o->n; i++) {
        const char *key = mac_key(&o->v[i]);
        if (!key)
            continue;
        LB_AUTO_FREE char *old = lb_qemu_get(o->v[i].value, key);
        LB_AUTO_FREE char *mac = new_mac(seed, n++, old);
        lb_qemu_put(&o->v[i].value, key, mac);
    }
}

static bool given(const char *s)
{
    return s && *s;
}

void lb_qemu_another(struct lb_qemu_opts *o, const struct lb_launch_opts *opts)
{
    if (given(opts->new_name))
        set_name(o, opts->new_name);
    if (given(opts->new_uuid))
        set_uuid(o, opts->new_uuid);
    if (given(opts->mac_seed))
        set_macs(o, opts->mac_seed);
}
