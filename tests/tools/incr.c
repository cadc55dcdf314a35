/* build: gcc -std=c11 -D_GNU_SOURCE -O2 -Wall -Wextra -Wshadow -Wvla -Wmissing-prototypes -Wformat=2 -o incr incr.c
 *
 * incr - what one client of a Redis was promised: INCR of one key on one TCP connection, one request in flight.
 *
 * Every answer is an acknowledged write, so the answers must be consecutive numbers: one that was seen before, or a smaller one,
 * means that the server forgot what it had acknowledged; one that jumps means that a request was carried out twice. The
 * connection is never made again: when it breaks, that is the result. After the end the caller reads the key over a
 * connection of its own and compares it with "last".
 *
 * incr --host IP [--port 6379] [--key lb:incr] [--rate PER_SECOND] [--timeout S] [--stall-ms 100] [--connect-timeout S]
 *      [--seconds S] [--stream] [--log FILE]
 *   ends on SIGTERM or SIGINT, after S seconds, or when the connection is of no more use: no answer for --timeout (30 s),
 *   reset, closed. Then it writes one JSON object to stdout: {"acked":answers,"first":..,"last":numbers,"forgotten":..,
 *   "skipped":..,"error":null or text,"unanswered":true when the last request had no answer,"longest_ms":..,"longest_at":..,
 *   "p50_ms":..,"p99_ms":..}. Exits 0 when nothing was forgotten or skipped and the connection is whole, 1 when not, 2 on wrong usage or
 *   when it never got connected.
 *   --stream writes, as it goes, one line for each answer that took longer than --stall-ms, {"stall_ms":..,"start":..,"end":..,
 *   "value":..}, and, as long as answers come, every 100 ms {"now":..,"acked":..,"last":..,"forgotten":..,"skipped":..}. --log: one line an answer, "VALUE SENT RECEIVED".
 * Times are CLOCK_REALTIME seconds, lengths of time are measured by CLOCK_MONOTONIC.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define NSEC 1000000000ull
#define BUCKETS 20000u   /* of the histogram: 50 us each, the last one for all above a second */
#define BUCKET_NS 50000u

struct options {
    const char *host, *key, *log;
    unsigned port;
    double rate, timeout_s, connect_timeout_s, seconds, stall_ms;
    bool stream;
};
struct result {
    uint64_t acked, forgotten, skipped;
    int64_t first, last;
    bool unanswered;
    char error[128];
    uint64_t longest_ns;
    double longest_at;
    uint64_t buckets[BUCKETS];
};

static volatile sig_atomic_t g_stop;

static void on_signal(int number)
{
    (void)number;
    g_stop = 1;
}

static uint64_t mono_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * NSEC + (uint64_t)ts.tv_nsec;
}

static double wall(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_REALTIME, &ts);
    return (double)ts.tv_sec + (double)ts.tv_nsec / 1e9;
}

static int connect_until(const struct options *o)
{
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)o->port)};
    struct timeval limit = {.tv_sec = 1};
    uint64_t end_ns = mono_ns() + (uint64_t)(o->connect_timeout_s * 1e9);
    int one = 1;

    if (inet_pton(AF_INET, o->host, &to.sin_addr) != 1) {
        fprintf(stderr, "incr: %s is not an IPv4 address\n", o->host);
        exit(2);
    }
    while (!g_stop && mono_ns() < end_ns) {
        int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit)); /* bounds connect() too */
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
        if (connect(fd, (struct sockaddr *)&to, sizeof(to)) == 0) {
            return fd;
        }
        close(fd);
        usleep(50000);
    }
    fprintf(stderr, "incr: no connection to %s:%u\n", o->host, o->port);
    exit(2);
}

/* Reads ":N\r\n". False, with why in r->error, when the connection is of no more use. */
static bool read_number(int fd, const struct options *o, struct result *r, int64_t *value)
{
    uint64_t end_ns = mono_ns() + (uint64_t)(o->timeout_s * 1e9);
    char line[64];
    size_t used = 0;

    for (;;) {
        struct pollfd p = {.fd = fd, .events = POLLIN};
        ssize_t got;

        if (poll(&p, 1, 100) <= 0) {
            if (mono_ns() < end_ns) {
                continue;
            }
            snprintf(r->error, sizeof(r->error), "no answer for %g s", o->timeout_s);
            return false;
        }
        got = recv(fd, line + used, sizeof(line) - 1 - used, 0);
        if (got <= 0) {
            snprintf(r->error, sizeof(r->error), "%s", got == 0 ? "closed by the server" : strerror(errno));
            return false;
        }
        used += (size_t)got;
        line[used] = '\0';
        if (line[used - 1] == '\n' || used == sizeof(line) - 1) {
            break;
        }
    }
    char *end;
    *value = strtoll(line + 1, &end, 10);
    if (line[0] != ':' || end == line + 1 || strcmp(end, "\r\n") != 0) {
        for (char *c = line; *c != '\0'; c++) {
            *c = *c < ' ' || *c == '"' || *c == '\\' ? '.' : *c;
        }
        snprintf(r->error, sizeof(r->error), "no number: %s", line);
        return false;
    }
    return true;
}

static void note_value(struct result *r, int64_t value)
{
    if (r->acked == 0) {
        r->first = value;
    } else if (value <= r->last) {
        r->forgotten += (uint64_t)(r->last + 1 - value);
    } else if (value > r->last + 1) {
        r->skipped += (uint64_t)(value - r->last - 1);
    }
    r->acked++;
    r->last = value;
}

static void note_time(struct result *r, uint64_t took_ns, double sent)
{
    r->buckets[took_ns / BUCKET_NS < BUCKETS ? took_ns / BUCKET_NS : BUCKETS - 1]++;
    if (took_ns > r->longest_ns) {
        r->longest_ns = took_ns;
        r->longest_at = sent;
    }
}

static double percentile_ms(const struct result *r, double part)
{
    uint64_t want = (uint64_t)((double)r->acked * part), seen = 0;

    for (unsigned i = 0; i < BUCKETS; i++) {
        seen += r->buckets[i];
        if (seen > want) {
            return (i + 1) * (BUCKET_NS / 1e6);
        }
    }
    return BUCKETS * (BUCKET_NS / 1e6);
}

static void run(int fd, const struct options *o, struct result *r, FILE *log)
{
    uint64_t begin_ns = mono_ns(), spoken_ns = 0;
    char request[256];
    int length = snprintf(request, sizeof(request), "*2\r\n$4\r\nINCR\r\n$%zu\r\n%s\r\n", strlen(o->key), o->key);

    while (!g_stop && (o->seconds <= 0 || (double)(mono_ns() - begin_ns) < o->seconds * 1e9)) {
        double sent = wall();
        uint64_t sent_ns = mono_ns(), took_ns;
        int64_t value;

        r->unanswered = true;
        if (send(fd, request, (size_t)length, MSG_NOSIGNAL) != length) {
            snprintf(r->error, sizeof(r->error), "%s", strerror(errno));
            return;
        }
        if (!read_number(fd, o, r, &value)) {
            return;
        }
        r->unanswered = false;
        took_ns = mono_ns() - sent_ns;
        note_value(r, value);
        note_time(r, took_ns, sent);
        if (log != NULL) {
            fprintf(log, "%" PRId64 " %.6f %.6f\n", value, sent, sent + (double)took_ns / 1e9);
        }
        if (o->stream && (double)took_ns > o->stall_ms * 1e6) {
            printf("{\"stall_ms\":%.3f,\"start\":%.6f,\"end\":%.6f,\"value\":%" PRId64 "}\n", (double)took_ns / 1e6, sent,
                   sent + (double)took_ns / 1e9, value);
        }
        if (o->stream && mono_ns() - spoken_ns > NSEC / 10) {
            spoken_ns = mono_ns();
            printf("{\"now\":%.6f,\"acked\":%" PRIu64 ",\"last\":%" PRId64 ",\"forgotten\":%" PRIu64 ",\"skipped\":%" PRIu64 "}\n",
                   wall(), r->acked, r->last, r->forgotten, r->skipped);
            fflush(stdout);
        }
        if (o->rate > 0) {
            double due_s = (double)r->acked / o->rate - (double)(mono_ns() - begin_ns) / 1e9;

            if (due_s > 0) {
                usleep((useconds_t)(due_s < 0.5 ? due_s * 1e6 : 500000));
            }
        }
    }
}

static void report(const struct result *r)
{
    char error[140] = "null";

    if (r->error[0] != '\0') {
        snprintf(error, sizeof(error), "\"%s\"", r->error);
    }
    printf("{\"acked\":%" PRIu64 ",\"first\":%" PRId64 ",\"last\":%" PRId64 ",\"forgotten\":%" PRIu64 ",\"skipped\":%" PRIu64
           ",\"error\":%s,\"unanswered\":%s,\"longest_ms\":%.3f,\"longest_at\":%.6f,\"p50_ms\":%.2f,\"p99_ms\":%.2f}\n",
           r->acked, r->first, r->last, r->forgotten, r->skipped, error, r->unanswered ? "true" : "false",
           (double)r->longest_ns / 1e6, r->longest_at, percentile_ms(r, 0.50), percentile_ms(r, 0.99));
    fflush(stdout);
}

static double positive(const char *text)
{
    char *end;
    double value = strtod(text, &end);

    if (end == text || *end != '\0' || !(value >= 0)) {
        fprintf(stderr, "incr: %s is not a number\n", text);
        exit(2);
    }
    return value;
}

static struct options parse(int argc, char **argv)
{
    static const struct option names[] = {
        {"host", required_argument, NULL, 'h'},    {"port", required_argument, NULL, 'p'},
        {"key", required_argument, NULL, 'k'},     {"rate", required_argument, NULL, 'r'},
        {"timeout", required_argument, NULL, 't'}, {"stall-ms", required_argument, NULL, 'm'},
        {"seconds", required_argument, NULL, 's'}, {"connect-timeout", required_argument, NULL, 'c'},
        {"stream", no_argument, NULL, 'S'},        {"log", required_argument, NULL, 'l'},
        {NULL, 0, NULL, 0}};
    struct options o = {.key = "lb:incr", .port = 6379, .timeout_s = 30, .connect_timeout_s = 10, .stall_ms = 100};
    int c;

    while ((c = getopt_long(argc, argv, "", names, NULL)) != -1) {
        switch (c) {
        case 'h': o.host = optarg; break;
        case 'p': o.port = (unsigned)positive(optarg); break;
        case 'k': o.key = optarg; break;
        case 'r': o.rate = positive(optarg); break;
        case 't': o.timeout_s = positive(optarg); break;
        case 'm': o.stall_ms = positive(optarg); break;
        case 's': o.seconds = positive(optarg); break;
        case 'c': o.connect_timeout_s = positive(optarg); break;
        case 'S': o.stream = true; break;
        case 'l': o.log = optarg; break;
        default: exit(2);
        }
    }
    if (o.host == NULL || optind != argc || strlen(o.key) > 100) {
        fprintf(stderr, "usage: incr --host IP [options], see the head of incr.c\n");
        exit(2);
    }
    return o;
}

int main(int argc, char **argv)
{
    static struct result result;
    struct options o = parse(argc, argv);
    struct sigaction action = {.sa_handler = on_signal};
    FILE *log = NULL;
    int fd;

    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    if (o.log != NULL && (log = fopen(o.log, "w")) == NULL) {
        fprintf(stderr, "incr: %s: %s\n", o.log, strerror(errno));
        return 2;
    }
    fd = connect_until(&o);
    run(fd, &o, &result, log);
    close(fd);
    if (log != NULL) {
        fclose(log);
    }
    report(&result);
    return result.forgotten != 0 || result.skipped != 0 || result.error[0] != '\0';
}
