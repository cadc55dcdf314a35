/* build: gcc -std=c11 -D_GNU_SOURCE -O2 -Wall -Wextra -Wshadow -Wvla -Wmissing-prototypes -Wformat=2 -o redisload redisload.c
 *
 * redisload - one client of the Redis in the guest, over one TCP connection, that notices whatever goes wrong.
 *
 * Each request waits for its answer: INCR counter must answer the next integer, SET key value must answer OK, and every
 * eighth time GET must answer the value set before. A request without answer, or with a wrong one, is lost. A broken
 * connection is made again and counted; a counter that went back after it is counted as lost requests too. Values are
 * documents of words and numbers, which compress about as well as what people keep in Redis (2.7:1 by zstd -1, page by page);
 * SETs walk the keys in an order that jumps about, so they touch memory all over the data set.
 *
 * redisload --host IP [--port 6379] [--seconds S] [--until-file PATH] [--rate PER_SECOND] [--value-bytes 100] [--keys 1000]
 *           [--prefix lb] [--preload] [--connect-timeout S] [--timeout S] [--stream] [--out FILE]
 *   ends on SIGTERM or SIGINT, after S seconds or when PATH exists, and writes one JSON object to FILE (or stdout). Exits 0
 *   when no request was lost and the connection was kept, 1 when not, 2 on wrong usage or when it never got connected.
 *   --prefix: of the names of keys and counter, for several clients at once.
 *   --preload sets every key once before the load begins (and before its time and figures are counted).
 *   --stream writes one line a 100 ms to stdout: {"now":..,"requests":..,"max_ms":..} (of that interval).
 */
#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <netinet/in.h>
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
#define MAX_VALUE_BYTES 4096u
#define KEY_STEP 1000003u       /* a prime, so that every key comes up once before one comes again */
#define PRELOAD_WINDOW_BYTES (256u << 10) /* unanswered requests at most */

struct load {
    const char *host, *prefix;
    unsigned port;
    unsigned value_bytes, keys;
    double connect_timeout_s, timeout_s;
    int fd;
    char reply[MAX_VALUE_BYTES + 64];

    uint64_t requests, incr, set, get, lost, reconnects;
    int64_t counter; /* value the last INCR answered */
    char first_error[200];
    uint32_t *latency_us; /* one per answered request */
    size_t latency_count, latency_room;
    uint64_t longest_ns, interval_longest_ns;
    double longest_at; /* CLOCK_REALTIME seconds at which the longest request was sent */
};

static volatile sig_atomic_t g_stop;

static void on_signal(int number)
{
    (void)number;
    g_stop = 1;
}

static uint64_t clock_ns(clockid_t clock)
{
    struct timespec ts;

    clock_gettime(clock, &ts);
    return (uint64_t)ts.tv_sec * NSEC + (uint64_t)ts.tv_nsec;
}

static void lose(struct load *load, const char *what, const char *detail)
{
    load->lost++;
    if (load->first_error[0] == '\0') {
        snprintf(load->first_error, sizeof(load->first_error), "%s: %.120s", what, detail);
        for (char *c = load->first_error; *c != '\0'; c++) {
            if (*c == '"' || *c == '\\' || (unsigned char)*c < ' ') {
                *c = '.';
            }
        }
    }
}

static bool connect_once(struct load *load)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)load->port)};
    struct timeval limit = {.tv_sec = 1};
    int one = 1;

    if (inet_pton(AF_INET, load->host, &address.sin_addr) != 1) {
        fprintf(stderr, "redisload: %s is not an IPv4 address\n", load->host);
        exit(2);
    }
    load->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(load->fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit)); /* bounds connect() too */
    setsockopt(load->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    if (connect(load->fd, (struct sockaddr *)&address, sizeof(address)) != 0) {
        close(load->fd);
        load->fd = -1;
        return false;
    }
    return true;
}

static bool connect_until(struct load *load, double seconds)
{
    uint64_t end_ns = clock_ns(CLOCK_MONOTONIC) + (uint64_t)(seconds * 1e9);

    while (!g_stop) {
        if (connect_once(load)) {
            return true;
        }
        if (clock_ns(CLOCK_MONOTONIC) > end_ns) {
            break;
        }
        usleep(50000);
    }
    return false;
}

/* Reads one reply into load->reply without its line ends ("+OK", ":5", or a bulk body). False: no whole reply came. */
static bool read_reply(struct load *load, const char **problem)
{
    uint64_t end_ns = clock_ns(CLOCK_MONOTONIC) + (uint64_t)(load->timeout_s * 1e9);
    size_t used = 0, need = 0, body = 0;

    for (;;) {
        load->reply[used] = '\0';
        char *line_end = used ? strstr(load->reply, "\r\n") : NULL;
        if (line_end != NULL && need == 0) {
            body = (size_t)(line_end - load->reply) + 2;
            need = body;
            if (load->reply[0] == '$') {
                long length = strtol(load->reply + 1, NULL, 10);
                if (length > (long)MAX_VALUE_BYTES) {
                    *problem = "reply too long";
                    return false;
                }
                need = length < 0 ? body : body + (size_t)length + 2;
            }
        }
        if (need != 0 && used >= need) {
            if (used > need) {
                *problem = "more than was asked for";
                return false;
            }
            load->reply[need - 2] = '\0';
            if (load->reply[0] == '$') {
                memmove(load->reply, load->reply + body, need - body);
            }
            return true;
        }
        if (used + 1 >= sizeof(load->reply)) {
            *problem = "reply too long";
            return false;
        }
        struct pollfd pfd = {.fd = load->fd, .events = POLLIN};
        int ready = poll(&pfd, 1, 100);
        if (ready == 0 || (ready < 0 && errno == EINTR)) {
            if (clock_ns(CLOCK_MONOTONIC) > end_ns) {
                *problem = "no reply in time";
                return false;
            }
            continue;
        }
        ssize_t got = recv(load->fd, load->reply + used, sizeof(load->reply) - 1 - used, 0);
        if (got <= 0) {
            *problem = got == 0 ? "connection closed" : strerror(errno);
            return false;
        }
        used += (size_t)got;
    }
}

static void note_latency(struct load *load, uint64_t took_ns, double sent_at)
{
    if (load->latency_count == load->latency_room) {
        load->latency_room = load->latency_room ? 2 * load->latency_room : 65536;
        load->latency_us = realloc(load->latency_us, load->latency_room * sizeof(*load->latency_us));
        if (load->latency_us == NULL) {
            fprintf(stderr, "redisload: out of memory\n");
            exit(2);
        }
    }
    load->latency_us[load->latency_count++] = took_ns / 1000 > UINT32_MAX ? UINT32_MAX : (uint32_t)(took_ns / 1000);
    if (took_ns > load->longest_ns) {
        load->longest_ns = took_ns;
        load->longest_at = sent_at;
    }
    if (took_ns > load->interval_longest_ns) {
        load->interval_longest_ns = took_ns;
    }
}

/* One request and its reply. False when the connection is no longer usable; the request is then counted as lost. */
static bool ask(struct load *load, const char *request, size_t length)
{
    const char *problem = NULL;
    uint64_t start_ns = clock_ns(CLOCK_MONOTONIC);
    double sent_at = (double)clock_ns(CLOCK_REALTIME) / 1e9;

    load->requests++;
    if (send(load->fd, request, length, MSG_NOSIGNAL) != (ssize_t)length) {
        problem = strerror(errno);
    } else if (read_reply(load, &problem)) {
        note_latency(load, clock_ns(CLOCK_MONOTONIC) - start_ns, sent_at);
        return true;
    }
    lose(load, "request without answer", problem);
    return false;
}

static void make_value(const struct load *load, char *value, uint64_t round)
{
    static const char *const words[] = {
        "account", "address", "amount",  "balance", "basket", "bicycle", "branch",  "capital", "carrier", "charge",
        "city",    "client",  "comment", "country", "credit", "culture", "deliver", "deposit", "edition", "engine",
        "expires", "factory", "garden",  "history", "island", "journal", "kitchen", "language", "library", "market"};
    uint64_t x = (round + 1) * UINT64_C(0x9e3779b97f4a7c15);
    int used = snprintf(value, MAX_VALUE_BYTES + 1, "{\"id\":%" PRIu64, round);

    while (used < (int)load->value_bytes) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        used += snprintf(value + used, MAX_VALUE_BYTES + 1 - (size_t)used, ",\"%s\":\"%s %" PRIu64 "\"",
                         words[x % 30], words[x / 32 % 30], x >> 40);
    }
    /* The number that tells this value from others is never cut off. */
    if (load->value_bytes > 24) {
        value[load->value_bytes] = '\0';
    }
}

static uint64_t key_of(const struct load *load, uint64_t round)
{
    return round * KEY_STEP % load->keys;
}

/* Appends a SET; returns its length. room: of out. */
static int put_set(char *out, size_t room, const char *prefix, uint64_t number, const char *value)
{
    char key[32];
    int key_length = snprintf(key, sizeof(key), "%s:%" PRIu64, prefix, number);

    return snprintf(out, room, "*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%zu\r\n%s\r\n", key_length, key, strlen(value), value);
}

/* Sets every key, many requests at a time. False: said why on stderr. */
static bool preload(struct load *load)
{
    static char requests[PRELOAD_WINDOW_BYTES], value[MAX_VALUE_BYTES + 32];
    char answers[4096];
    uint64_t done = 0;

    while (done < load->keys && !g_stop) {
        size_t used = 0, sent = 0, answered = 0, want = 0;

        while (done < load->keys && used + MAX_VALUE_BYTES + 256 < sizeof(requests)) {
            make_value(load, value, done);
            used += (size_t)put_set(requests + used, sizeof(requests) - used, load->prefix, key_of(load, done), value);
            done++;
            want += 5; /* "+OK\r\n" */
        }
        while (sent < used || answered < want) {
            struct pollfd pfd = {.fd = load->fd, .events = (short)(POLLIN | (sent < used ? POLLOUT : 0))};

            if (poll(&pfd, 1, (int)(load->timeout_s * 1e3)) <= 0) {
                fprintf(stderr, "redisload: preload: no answer in time\n");
                return false;
            }
            if (pfd.revents & POLLOUT) {
                ssize_t put = send(load->fd, requests + sent, used - sent, MSG_NOSIGNAL | MSG_DONTWAIT);
                sent += put > 0 ? (size_t)put : 0;
            }
            if (pfd.revents & ~POLLOUT) {
                ssize_t got = recv(load->fd, answers, sizeof(answers), MSG_DONTWAIT);
                if (got == 0 || (got < 0 && errno != EAGAIN)) {
                    fprintf(stderr, "redisload: preload: connection lost\n");
                    return false;
                }
                if (got > 0 && memchr(answers, '-', (size_t)got) != NULL) {
                    fprintf(stderr, "redisload: preload: %.*s\n", (int)got, answers);
                    return false;
                }
                answered += got > 0 ? (size_t)got : 0;
            }
        }
    }
    return true;
}

static bool one_round(struct load *load, uint64_t round)
{
    static char request[MAX_VALUE_BYTES + 256], value[MAX_VALUE_BYTES + 32];
    char expected[32], key[32];
    int length;

    length = snprintf(request, sizeof(request), "*2\r\n$4\r\nINCR\r\n$%zu\r\n%s:counter\r\n", strlen(load->prefix) + 8, load->prefix);
    load->incr++;
    if (!ask(load, request, (size_t)length)) {
        return false;
    }
    snprintf(expected, sizeof(expected), ":%" PRId64, load->counter + 1);
    if (strcmp(load->reply, expected) != 0) {
        lose(load, expected, load->reply);
        if (load->reply[0] == ':') {
            load->counter = strtoll(load->reply + 1, NULL, 10);
        }
    } else {
        load->counter++;
    }

    make_value(load, value, round);
    length = put_set(request, sizeof(request), load->prefix, key_of(load, round), value);
    load->set++;
    if (!ask(load, request, (size_t)length)) {
        return false;
    }
    if (strcmp(load->reply, "+OK") != 0) {
        lose(load, "SET", load->reply);
    }

    if (round % 8 == 7 && load->keys > 5) {
        uint64_t before = round - 5;
        make_value(load, value, before);
        int key_length = snprintf(key, sizeof(key), "%s:%" PRIu64, load->prefix, key_of(load, before));
        length = snprintf(request, sizeof(request), "*2\r\n$3\r\nGET\r\n$%d\r\n%s\r\n", key_length, key);
        load->get++;
        if (!ask(load, request, (size_t)length)) {
            return false;
        }
        if (strcmp(load->reply, value) != 0) {
            lose(load, "GET", load->reply);
        }
    }
    return true;
}

static bool reset_counter(struct load *load)
{
    char request[128];
    int length = snprintf(request, sizeof(request), "*3\r\n$3\r\nSET\r\n$%zu\r\n%s:counter\r\n$1\r\n0\r\n", strlen(load->prefix) + 8,
                          load->prefix);

    load->counter = 0;
    if (!ask(load, request, (size_t)length)) {
        return false;
    }
    return strcmp(load->reply, "+OK") == 0;
}

static int compare_u32(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

    return x < y ? -1 : x > y;
}

static double percentile_ms(const struct load *load, double fraction)
{
    return load->latency_count ? load->latency_us[(size_t)((double)(load->latency_count - 1) * fraction)] / 1e3 : 0;
}

static int write_report(struct load *load, const char *path, double seconds)
{
    FILE *out = path ? fopen(path, "we") : stdout;

    if (out == NULL) {
        fprintf(stderr, "redisload: %s: %s\n", path, strerror(errno));
        return -1;
    }
    qsort(load->latency_us, load->latency_count, sizeof(*load->latency_us), compare_u32);
    fprintf(out,
            "{\"requests\":%" PRIu64 ",\"incr\":%" PRIu64 ",\"set\":%" PRIu64 ",\"get\":%" PRIu64 ",\"lost\":%" PRIu64
            ",\"reconnects\":%" PRIu64 ",\"seconds\":%.3f,\"per_second\":%.1f,\"longest_ms\":%.3f,\"longest_at\":%.6f"
            ",\"p50_ms\":%.3f,\"p99_ms\":%.3f,\"first_error\":\"%s\"}\n",
            load->requests, load->incr, load->set, load->get, load->lost, load->reconnects, seconds,
            seconds > 0 ? (double)load->requests / seconds : 0, (double)load->longest_ns / 1e6, load->longest_at,
            percentile_ms(load, 0.5), percentile_ms(load, 0.99), load->first_error);
    return (path ? fclose(out) : fflush(out)) == 0 ? 0 : -1;
}

int main(int argc, char **argv)
{
    static const struct option options[] = {{"host", required_argument, NULL, 'h'},
                                            {"port", required_argument, NULL, 'p'},
                                            {"seconds", required_argument, NULL, 's'},
                                            {"until-file", required_argument, NULL, 'u'},
                                            {"rate", required_argument, NULL, 'r'},
                                            {"value-bytes", required_argument, NULL, 'v'},
                                            {"keys", required_argument, NULL, 'k'},
                                            {"prefix", required_argument, NULL, 'x'},
                                            {"preload", no_argument, NULL, 'l'},
                                            {"connect-timeout", required_argument, NULL, 'c'},
                                            {"timeout", required_argument, NULL, 'i'},
                                            {"stream", no_argument, NULL, 't'},
                                            {"out", required_argument, NULL, 'o'},
                                            {NULL, 0, NULL, 0}};
    static struct load load = {
        .port = 6379, .prefix = "lb", .value_bytes = 100, .keys = 1000, .connect_timeout_s = 30, .timeout_s = 30, .fd = -1};
    const char *until = NULL, *path = NULL;
    double seconds = 0, rate = 0;
    bool stream = false, fill = false;
    int option;

    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
        switch (option) {
        case 'h': load.host = optarg; break;
        case 'p': load.port = (unsigned)strtoul(optarg, NULL, 10); break;
        case 's': seconds = strtod(optarg, NULL); break;
        case 'u': until = optarg; break;
        case 'r': rate = strtod(optarg, NULL); break;
        case 'v': load.value_bytes = (unsigned)strtoul(optarg, NULL, 10); break;
        case 'k': load.keys = (unsigned)strtoul(optarg, NULL, 10); break;
        case 'x': load.prefix = optarg; break;
        case 'l': fill = true; break;
        case 'c': load.connect_timeout_s = strtod(optarg, NULL); break;
        case 'i': load.timeout_s = strtod(optarg, NULL); break;
        case 't': stream = true; break;
        case 'o': path = optarg; break;
        default: return 2;
        }
    }
    if (load.host == NULL || load.value_bytes > MAX_VALUE_BYTES || load.keys == 0 ||
        load.keys % KEY_STEP == 0 || strlen(load.prefix) > 8) {
        fprintf(stderr, "redisload: --host is needed, --value-bytes at most %u, --keys at least 1, --prefix at most 8 bytes\n",
                MAX_VALUE_BYTES);
        return 2;
    }
    struct sigaction action = {.sa_handler = on_signal};
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);

    if (!connect_until(&load, load.connect_timeout_s) || !reset_counter(&load)) {
        fprintf(stderr, "redisload: no Redis at %s:%u\n", load.host, load.port);
        return 2;
    }
    if (fill && !preload(&load)) {
        return 2;
    }
    uint64_t start_ns = clock_ns(CLOCK_MONOTONIC), next_beat_ns = start_ns, end_ns = start_ns;
    uint64_t last_requests = load.requests;
    for (uint64_t round = 0; !g_stop; round++) {
        if (!one_round(&load, round)) {
            close(load.fd);
            load.fd = -1;
            if (!connect_until(&load, load.timeout_s)) {
                break;
            }
            load.reconnects++;
        }
        end_ns = clock_ns(CLOCK_MONOTONIC);
        if (end_ns >= next_beat_ns) {
            next_beat_ns = end_ns + 100000000;
            if (stream) {
                printf("{\"now\":%.6f,\"requests\":%" PRIu64 ",\"max_ms\":%.3f}\n",
                       (double)clock_ns(CLOCK_REALTIME) / 1e9, load.requests - last_requests,
                       (double)load.interval_longest_ns / 1e6);
                fflush(stdout);
            }
            last_requests = load.requests;
            load.interval_longest_ns = 0;
            if ((seconds > 0 && (double)(end_ns - start_ns) >= seconds * 1e9) ||
                (until != NULL && access(until, F_OK) == 0)) {
                break;
            }
        }
        if (rate > 0) {
            uint64_t due_ns = start_ns + (uint64_t)((double)load.requests / rate * 1e9);
            if (due_ns > end_ns) {
                struct timespec pause = {.tv_sec = (time_t)((due_ns - end_ns) / NSEC),
                                         .tv_nsec = (long)((due_ns - end_ns) % NSEC)};
                nanosleep(&pause, NULL);
            }
        }
    }
    if (write_report(&load, path, (double)(end_ns - start_ns) / 1e9) != 0) {
        return 2;
    }
    free(load.latency_us);
    if (load.fd >= 0) {
        close(load.fd);
    }
    return load.lost == 0 && load.reconnects == 0 ? 0 : 1;
}
