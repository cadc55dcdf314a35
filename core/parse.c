/* core/parse.c - what people type: sizes, durations, rates, addresses, hex.
 *
 * Numbers are parsed by hand: the locale must not decide what "1.5M" means,
 * and signs, blanks and overflow are refused. */
#include "core/core.h"

#include <inttypes.h>
#include <string.h>
#include <strings.h>

__extension__ typedef unsigned __int128 u128;

struct unit {
    const char *suffix; /* compared without case */
    uint64_t mult;      /* result = number * mult / div */
    uint64_t div;
};

static bool is_digit(char c)
{
    return c >= '0' && c <= '9';
}

/* "12.5SUFFIX" by a table of suffixes; exact, rounded down. */
static int parse_number(const char *s, const struct unit *units, size_t n_units, uint64_t *out)
{
    uint64_t whole = 0, frac = 0, scale = 1;
    const char *p = s;

    if (!is_digit(*p))
        return -1;
    for (; is_digit(*p); p++)
        if (__builtin_mul_overflow(whole, 10, &whole) ||
            __builtin_add_overflow(whole, (uint64_t)(*p - '0'), &whole))
            return -1;
    if (*p == '.') {
        p++;
        if (!is_digit(*p))
            return -1;
        for (; is_digit(*p); p++) {
            if (scale < 1000000000) { /* digits further on do not matter */
                frac = frac * 10 + (uint64_t)(*p - '0');
                scale *= 10;
            }
        }
    }
    for (size_t i = 0; i < n_units; i++) {
        const struct unit *u = &units[i];
        if (strcasecmp(p, u->suffix))
            continue;
        if (scale > 1 && u->mult == 1) /* half a byte */
            return -1;
        u128 v = ((u128)whole * scale + frac) * u->mult / scale / u->div;
        if (v > UINT64_MAX)
            return -1;
        *out = (uint64_t)v;
        return 0;
    }
    return -1;
}

#define KI UINT64_C(1024)
#define K UINT64_C(1000)

int lb_parse_size(const char *s, uint64_t *bytes, struct lb_error *err)
{
    static const struct unit units[] = {
        {"", 1, 1},           {"B", 1, 1},
        {"K", KI, 1},         {"KB", KI, 1},          {"KiB", KI, 1},
        {"M", KI * KI, 1},    {"MB", KI * KI, 1},     {"MiB", KI * KI, 1},
        {"G", KI * KI * KI, 1}, {"GB", KI * KI * KI, 1}, {"GiB", KI * KI * KI, 1},
        {"T", KI * KI * KI * KI, 1}, {"TB", KI * KI * KI * KI, 1}, {"TiB", KI * KI * KI * KI, 1},
    };
    if (parse_number(s, units, LB_ARRAY_LEN(units), bytes) == 0)
        return 0;
    lb_fail(err, LB_E_USAGE, "\"%s\" is not a size", s);
    return lb_remedy(err, "give a number with an optional K, M, G or T (powers of 1024), e.g. 1.5G");
}

int lb_parse_duration_ms(const char *s, uint64_t *ms, struct lb_error *err)
{
    static const struct unit units[] = {
        {"ms", 1, 1}, {"s", K, 1}, {"m", 60 * K, 1}, {"min", 60 * K, 1}, {"h", 3600 * K, 1},
    };
    if (parse_number(s, units, LB_ARRAY_LEN(units), ms) == 0)
        return 0;
    lb_fail(err, LB_E_USAGE, "\"%s\" is not a duration", s);
    return lb_remedy(err, "give a number and a unit: ms, s, m or h, e.g. 25ms");
}

int lb_parse_rate(const char *s, uint64_t *bytes_per_s, struct lb_error *err)
{
    static const struct unit units[] = {
        {"", 1, 1},            {"B", 1, 1},
        {"KB", K, 1},          {"MB", K * K, 1},        {"GB", K * K * K, 1},
        {"KiB", KI, 1},        {"MiB", KI * KI, 1},     {"GiB", KI * KI * KI, 1},
        {"bit", 1, 8},         {"kbit", K, 8},          {"Mbit", K * K, 8},
        {"Gbit", K * K * K, 8}, {"Tbit", K * K * K * K, 8},
    };
    LB_AUTO_FREE char *text = lb_strdup(s);
    size_t len = strlen(text);
    if (len > 3 && !strcmp(text + len - 2, "/s"))
        text[len - 2] = '\0';
    if (parse_number(text, units, LB_ARRAY_LEN(units), bytes_per_s) == 0)
        return 0;
    lb_fail(err, LB_E_USAGE, "\"%s\" is not a rate", s);
    return lb_remedy(err, "give bits (100Mbit, 1Gbit) or bytes (50MB) per second");
}

int lb_parse_hostport(const char *s, uint16_t default_port, char host[256], uint16_t *port,
                      struct lb_error *err)
{
    const char *start = s, *end, *colon;
    const char *wrong = NULL;

    if (*s == '[') {
        start = s + 1;
        end = strchr(start, ']');
        colon = end ? end + 1 : NULL;
        if (!end || end == start)
            wrong = "the address in brackets is empty or not closed";
        else if (*colon && *colon != ':')
            wrong = "only :PORT may follow the bracket";
    } else {
        colon = strchr(s, ':');
        if (colon && strchr(colon + 1, ':')) /* a bare IPv6 address has no port */
            colon = s + strlen(s);
        else if (!colon)
            colon = s + strlen(s);
        end = colon;
        if (!*s)
            wrong = "it is empty";
    }
    if (!wrong && (size_t)(end - start) > 255)
        wrong = "the host name is too long";
    for (const char *p = start; !wrong && p < end; p++)
        if ((unsigned char)*p <= ' ' || *p == 0x7f || strchr("/@[]", *p))
            wrong = "a host name does not contain such characters";

    unsigned long value = default_port;
    if (!wrong && *colon == ':') {
        size_t digits = strspn(colon + 1, "0123456789");
        if (digits == 0 || digits > 5 || colon[1 + digits])
            wrong = "the port is not a number";
        else if ((value = strtoul(colon + 1, NULL, 10)) > 65535)
            wrong = "the port is larger than 65535";
    }
    if (wrong) {
        lb_fail(err, LB_E_USAGE, "\"%s\" is not an address: %s", s, wrong);
        return lb_remedy(err, "give HOST, HOST:PORT or [IPV6]:PORT");
    }
    memcpy(host, start, (size_t)(end - start));
    host[end - start] = '\0';
    *port = (uint16_t)value;
    return 0;
}

void lb_hex(char *out, const void *data, size_t len)
{
    const unsigned char *p = data;
    for (size_t i = 0; i < len; i++) {
        *out++ = "0123456789abcdef"[p[i] >> 4];
        *out++ = "0123456789abcdef"[p[i] & 15];
    }
    *out = '\0';
}

static int hex_value(char c)
{
    if (is_digit(c))
        return c - '0';
    if (c >= 'a' && c <= 'f')
        return c - 'a' + 10;
    if (c >= 'A' && c <= 'F')
        return c - 'A' + 10;
    return -1;
}

ssize_t lb_unhex(void *out, size_t max, const char *hex)
{
    unsigned char *p = out;
    size_t len = strlen(hex);

    if (len % 2 || len / 2 > max)
        return -1;
    for (size_t i = 0; i < len; i += 2) {
        int hi = hex_value(hex[i]), lo = hex_value(hex[i + 1]);
        if (hi < 0 || lo < 0)
            return -1;
        *p++ = (unsigned char)(hi << 4 | lo);
    }
    return (ssize_t)(len / 2);
}

const char *lb_human_bytes(char *buf, size_t n, double bytes)
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
    size_t u = 0;

    /* 1023.95 prints as 1024.0: take the next unit before that */
    while (u + 1 < LB_ARRAY_LEN(units) && bytes >= (u ? 1023.95 : 1023.5)) {
        bytes /= 1024;
        u++;
    }
    snprintf(buf, n, u ? "%.1f %s" : "%.0f %s", bytes, units[u]);
    return buf;
}
