/* Helpers of tests with the Linux guest under a QEMU of their own: what it says of itself on its serial
 * line, which goes to @D/serial. */
#ifndef GUEST_UTIL_H
#define GUEST_UTIL_H

#include "tests/integration/qemu_util.h"

enum { BOOT_MS = 60000 };

/* A number of the guest's last line about itself; -1: none yet. */
static inline long guest_says(const struct qemu *q, const char *key)
{
    char path[96], *text = NULL, *last = NULL, word[64];
    snprintf(path, sizeof(path), "%s/serial", q->dir);
    if (lb_file_read(path, 16u << 20, &text, NULL, NULL) < 0)
        return -1;
    for (char *p = text; (p = strstr(p, "LB {")); p++)
        if (strchr(p, '\n'))
            last = p;
    snprintf(word, sizeof(word), "\"%s\":", key);
    char *at = last ? strstr(last, word) : NULL;
    long value = at ? atol(at + strlen(word)) : -1;
    free(text);
    return value;
}

static inline void wait_writes(const struct qemu *q, long more)
{
    long from = guest_says(q, "disk_written");
    uint64_t until = lb_now_ns() + BOOT_MS * UINT64_C(1000000);
    while (guest_says(q, "disk_written") < (from < 0 ? 0 : from) + more) {
        if (lb_now_ns() > until)
            fail_msg("the guest does not write: see its serial line");
        lb_sleep_ms(50);
    }
}

#endif
