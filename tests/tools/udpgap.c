/* build: gcc -std=c11 -D_GNU_SOURCE -O2 -Wall -Wextra -Wshadow -Wvla -Wmissing-prototypes -Wformat=2 -o udpgap udpgap.c
 *
 * udpgap - what an observer outside the guest sees of its 1 kHz UDP stream: lost packets and the gaps between arrivals.
 *
 * A stopped guest cannot measure its own pause, so downtime is the longest gap between two arrivals here, by the kernel's
 * receive timestamps (SO_TIMESTAMPNS), which do not depend on when this program gets to run.
 * Packets are {u64 sequence, u64 guest CLOCK_MONOTONIC ns}; a sequence far below the last is a guest booted again.
 *
 * udpgap --port N [--bind IP] [--seconds S] [--until-file PATH] [--gap-ms 5] [--stream] [--out FILE]
 *   ends on SIGTERM or SIGINT, after S seconds or when PATH exists, and writes one JSON object to FILE (or stdout).
 *   --stream writes, as it goes, one line to stdout for each gap over the limit, {"gap_ms":..,"start":..,"end":..,
 *   "guest_ms":..}, and every 100 ms one line {"now":..,"packets":..,"last":..}, so that a reader knows up to when it knows.
 * Times are CLOCK_REALTIME seconds. guest_ms is how far the guest's own clock went over the gap.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <netinet/in.h>
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

#define WINDOW 65536u /* sequences remembered, to tell late packets from doubled ones */
#define NSEC 1000000000ull

struct gap {
    uint64_t start_ns, end_ns;
    uint64_t guest_ns;
};

struct observer {
    uint64_t packets, unique, late, doubled, restarts, bad_size;
    uint64_t base, first, highest; /* base: first sequence since the last restart */
    uint64_t expected_before;      /* packets sent before the last restart, by their numbers */
    uint64_t last_arrival_ns, last_guest_ns, first_arrival_ns;
    uint64_t gap_limit_ns;
    struct gap longest;
    struct gap *gaps;
    size_t gap_count, gap_room;
    bool stream;
    uint8_t seen[WINDOW / 8];
};

static volatile sig_atomic_t g_stop;

static void on_signal(int number)
{
    (void)number;
    g_stop = 1;
}

static uint64_t realtime_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_REALTIME, &ts);
    return (uint64_t)ts.tv_sec * NSEC + (uint64_t)ts.tv_nsec;
}

static void print_gap(FILE *out, const struct gap *gap)
{
    fprintf(out, "{\"gap_ms\":%.3f,\"start\":%.6f,\"end\":%.6f,\"guest_ms\":%.3f}",
            (double)(gap->end_ns - gap->start_ns) / 1e6, (double)gap->start_ns / 1e9, (double)gap->end_ns / 1e9,
            (double)gap->guest_ns / 1e6);
}

static bool seen_get(const struct observer *o, uint64_t sequence)
{
    return (o->seen[sequence % WINDOW / 8] >> (sequence % 8)) & 1;
}

static void seen_set(struct observer *o, uint64_t sequence, bool value)
{
    uint8_t *byte = &o->seen[sequence % WINDOW / 8], bit = (uint8_t)(1u << (sequence % 8));

    *byte = value ? (uint8_t)(*byte | bit) : (uint8_t)(*byte & ~bit);
}

static void count_sequence(struct observer *o, uint64_t sequence)
{
    if (o->packets == 0) {
        o->base = o->first = o->highest = sequence;
    } else if (sequence > o->highest) {
        if (sequence - o->highest >= WINDOW) {
            memset(o->seen, 0, sizeof(o->seen));
        } else {
            for (uint64_t s = o->highest + 1; s < sequence; s++) {
                seen_set(o, s, false);
            }
        }
        o->highest = sequence;
    } else if (o->highest - sequence >= WINDOW / 2 || (sequence < 16 && o->highest > 1000)) {
        o->expected_before += o->highest - o->base + 1;
        o->restarts++;
        o->base = o->highest = sequence;
        memset(o->seen, 0, sizeof(o->seen));
    } else if (seen_get(o, sequence)) {
        o->doubled++;
        return;
    } else {
        o->late++;
        if (sequence < o->base) {
            o->base = sequence;
        }
    }
    seen_set(o, sequence, true);
    o->unique++;
}

static void on_packet(struct observer *o, uint64_t sequence, uint64_t guest_ns, uint64_t arrival_ns)
{
    count_sequence(o, sequence);
    if (o->packets++ == 0) {
        o->first_arrival_ns = arrival_ns;
    } else if (arrival_ns > o->last_arrival_ns) {
        struct gap gap = {o->last_arrival_ns, arrival_ns, guest_ns > o->last_guest_ns ? guest_ns - o->last_guest_ns : 0};
        uint64_t length_ns = gap.end_ns - gap.start_ns;
        if (length_ns > o->longest.end_ns - o->longest.start_ns) {
            o->longest = gap;
        }
        if (length_ns > o->gap_limit_ns) {
            if (o->gap_count == o->gap_room) {
                o->gap_room = o->gap_room ? 2 * o->gap_room : 256;
                o->gaps = realloc(o->gaps, o->gap_room * sizeof(*o->gaps));
                if (o->gaps == NULL) {
                    fprintf(stderr, "udpgap: out of memory\n");
                    exit(1);
                }
            }
            o->gaps[o->gap_count++] = gap;
            if (o->stream) {
                print_gap(stdout, &gap);
                putchar('\n');
                fflush(stdout);
            }
        }
    }
    o->last_arrival_ns = arrival_ns;
    o->last_guest_ns = guest_ns;
}

/* Takes everything that is queued. Returns false on a socket error. */
static bool receive_all(struct observer *o, int fd)
{
    for (;;) {
        uint64_t payload[2], arrival_ns = 0;
        _Alignas(struct cmsghdr) char control[128];
        struct iovec iov = {payload, sizeof(payload)};
        struct msghdr message = {
            .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
        ssize_t got = recvmsg(fd, &message, MSG_DONTWAIT);

        if (got < 0) {
            return errno == EAGAIN || errno == EINTR;
        }
        if (got != (ssize_t)sizeof(payload) || (message.msg_flags & MSG_TRUNC) != 0) {
            o->bad_size++;
            continue;
        }
        for (struct cmsghdr *c = CMSG_FIRSTHDR(&message); c != NULL; c = CMSG_NXTHDR(&message, c)) {
            if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_TIMESTAMPNS) {
                struct timespec ts;
                memcpy(&ts, CMSG_DATA(c), sizeof(ts));
                arrival_ns = (uint64_t)ts.tv_sec * NSEC + (uint64_t)ts.tv_nsec;
            }
        }
        on_packet(o, payload[0], payload[1], arrival_ns ? arrival_ns : realtime_ns());
    }
}

static int write_report(const struct observer *o, const char *path)
{
    FILE *out = path ? fopen(path, "we") : stdout;
    uint64_t expected = o->packets ? o->expected_before + o->highest - o->base + 1 : 0;

    if (out == NULL) {
        fprintf(stderr, "udpgap: %s: %s\n", path, strerror(errno));
        return 1;
    }
    fprintf(out,
            "{\"packets\":%" PRIu64 ",\"first_seq\":%" PRIu64 ",\"last_seq\":%" PRIu64 ",\"lost\":%" PRIu64
            ",\"reordered\":%" PRIu64 ",\"duplicated\":%" PRIu64 ",\"restarts\":%" PRIu64 ",\"bad_size\":%" PRIu64
            ",\"first_arrival\":%.6f,\"last_arrival\":%.6f,\"longest\":",
            o->packets, o->first, o->highest, expected > o->unique ? expected - o->unique : 0, o->late, o->doubled,
            o->restarts, o->bad_size, (double)o->first_arrival_ns / 1e9, (double)o->last_arrival_ns / 1e9);
    print_gap(out, &o->longest);
    fprintf(out, ",\"gaps\":[");
    for (size_t i = 0; i < o->gap_count; i++) {
        if (i > 0) {
            fputc(',', out);
        }
        print_gap(out, &o->gaps[i]);
    }
    fprintf(out, "]}\n");
    return (path ? fclose(out) : fflush(out)) == 0 ? 0 : 1;
}

static int open_socket(const char *host, unsigned port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), one = 1, room = 4 << 20;

    if (inet_pton(AF_INET, host, &address.sin_addr) != 1) {
        fprintf(stderr, "udpgap: %s is not an IPv4 address\n", host);
        return -1;
    }
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &room, sizeof(room));
    if (setsockopt(fd, SOL_SOCKET, SO_TIMESTAMPNS, &one, sizeof(one)) != 0 ||
        bind(fd, (struct sockaddr *)&address, sizeof(address)) != 0) {
        fprintf(stderr, "udpgap: %s:%u: %s\n", host, port, strerror(errno));
        close(fd);
        return -1;
    }
    return fd;
}

int main(int argc, char **argv)
{
    static const struct option options[] = {{"port", required_argument, NULL, 'p'},
                                            {"bind", required_argument, NULL, 'b'},
                                            {"seconds", required_argument, NULL, 's'},
                                            {"until-file", required_argument, NULL, 'u'},
                                            {"gap-ms", required_argument, NULL, 'g'},
                                            {"stream", no_argument, NULL, 't'},
                                            {"out", required_argument, NULL, 'o'},
                                            {NULL, 0, NULL, 0}};
    static struct observer observer = {.gap_limit_ns = 5000000};
    const char *host = "0.0.0.0", *until = NULL, *path = NULL;
    unsigned port = 0;
    double seconds = 0;
    int option;

    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
        switch (option) {
        case 'p': port = (unsigned)strtoul(optarg, NULL, 10); break;
        case 'b': host = optarg; break;
        case 's': seconds = strtod(optarg, NULL); break;
        case 'u': until = optarg; break;
        case 'g': observer.gap_limit_ns = (uint64_t)(strtod(optarg, NULL) * 1e6); break;
        case 't': observer.stream = true; break;
        case 'o': path = optarg; break;
        default: return 2;
        }
    }
    if (port == 0 || port > 65535) {
        fprintf(stderr, "udpgap: --port is needed\n");
        return 2;
    }

    /* No SA_RESTART: a signal ends poll() at once. */
    struct sigaction action = {.sa_handler = on_signal};
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    signal(SIGPIPE, SIG_IGN);

    int fd = open_socket(host, port);
    if (fd < 0) {
        return 1;
    }
    uint64_t start_ns = realtime_ns(), next_beat_ns = start_ns;
    while (!g_stop) {
        struct pollfd pfd = {.fd = fd, .events = POLLIN};
        int ready = poll(&pfd, 1, 50);
        if ((ready < 0 && errno != EINTR) || (ready > 0 && !receive_all(&observer, fd))) {
            fprintf(stderr, "udpgap: %s\n", strerror(errno));
            return 1;
        }
        uint64_t now_ns = realtime_ns();
        if (now_ns >= next_beat_ns) {
            next_beat_ns = now_ns + 100000000;
            if (observer.stream) {
                printf("{\"now\":%.6f,\"packets\":%" PRIu64 ",\"last\":%.6f}\n", (double)now_ns / 1e9, observer.packets,
                       (double)observer.last_arrival_ns / 1e9);
                fflush(stdout);
            }
            if ((seconds > 0 && (double)(now_ns - start_ns) >= seconds * 1e9) ||
                (until != NULL && access(until, F_OK) == 0)) {
                break;
            }
        }
    }
    if (!receive_all(&observer, fd)) {
        fprintf(stderr, "udpgap: %s\n", strerror(errno));
        return 1;
    }
    close(fd);
    int rc = write_report(&observer, path);
    free(observer.gaps);
    return rc;
}
