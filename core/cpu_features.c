/* core/cpu_features.c - what a guest uses of a processor, and what a host offers. */
#include "core/hv.h"

#include <string.h>

/* "CPUID.7.0.EBX:0x01d843a9" is a set of 32 features: the bits that the host's
 * word of that name lacks. False when text is no such word. */
static bool lacking_bits(const char *text, char *const *host, char out[64])
{
    const char *colon = strrchr(text, ':');
    unsigned long long want, have = 0;
    char *end;

    if (!colon || strncmp(colon, ":0x", 3))
        return false;
    want = strtoull(colon + 1, &end, 16);
    if (*end)
        return false;
    for (; host && *host; host++)
        if (!strncmp(*host, text, (size_t)(colon - text) + 3))
            have |= strtoull(*host + (colon - text) + 1, NULL, 16);
    out[0] = '\0';
    if (want & ~have)
        snprintf(out, 64, "%.*s bits 0x%llx", (int)LB_MIN(colon - text, (ptrdiff_t)40), text,
                 want & ~have);
    return true;
}

int lb_cpu_features_check(char *const *guest, char *const *host, struct lb_error *err)
{
    char missing[256] = "", bits[64];
    size_t used = 0;
    unsigned n = 0;

    for (; guest && *guest; guest++) {
        char *const *d = host;
        const char *name = *guest;

        if (lacking_bits(*guest, host, bits)) {
            if (!bits[0])
                continue;
            name = bits;
        } else {
            while (d && *d && strcmp(*d, *guest))
                d++;
            if (d && *d)
                continue;
        }
        n++;
        if (used + strlen(name) + 2 < sizeof(missing) - 8)
            used += (size_t)snprintf(missing + used, sizeof(missing) - used, "%s%s",
                                     used ? ", " : "", name);
        else if (used < sizeof(missing) - 6 && !strstr(missing, " ..."))
            snprintf(missing + used, sizeof(missing) - used, " ...");
    }
    if (!n)
        return 0;
    lb_fail(err, LB_E_PREFLIGHT, "cpu-features: the guest uses %u CPU features that this host does "
            "not offer: %s", n, missing);
    return lb_remedy(err, "start the VM with a -cpu model that every host of the group has (see "
                          "`-cpu help`), or move it to a host with a newer processor");
}
