/* build: gcc -std=c11 -D_GNU_SOURCE -O2 -Wall -Wextra -Wshadow -Wvla -Wmissing-prototypes -Wformat=2 -o guestcap guestcap.c
 *
 * guestcap - on which host does a guest send? One watcher over the interfaces of all hosts, each in a network namespace.
 *
 * A frame counts when its source is the guest's MAC and it goes the right way: "out" for a host's cable (what leaves the host),
 * "in" for a tap (what the guest, or whoever holds its output, puts into the host). Frames are ordered by the kernel's receive
 * timestamps (SO_TIMESTAMPNS), one clock for all namespaces, which do not depend on when this program gets to run. Frames
 * that follow one another in the same group and at the same place are one run; so a guest that ran on A and then on B makes two
 * runs, and two copies that send at the same time make many.
 *
 * guestcap --mac MAC [--stream] GROUP:PLACE:NAMESPACE:DEVICE:in|out ...
 *   NAMESPACE is a path. Ends on SIGTERM or SIGINT and writes one JSON object to stdout: {"dropped":frames the kernel could not
 *   keep for us,"groups":{GROUP:[{"place":..,"first":..,"last":..,"frames":..},...]}}. Exits 0, 2 on wrong usage.
 *   --stream writes each 100 ms, for every group, {"now":..,"group":..,"run":number,"place":..,"first":..,"last":..,"frames":..} of
 *   the newest run and of those that came before it since the last time.
 * Times are CLOCK_REALTIME seconds. A clock that is set while it runs makes it say so and exit with 1.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/filter.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
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
#define MAX_SPOTS 64
#define MAX_GROUPS 8
#define BATCH 64
#define SETTLE_NS (NSEC / 5)     /* how late a frame may be read and still be put in order */
#define RECEIVE_BYTES (32 << 20)

struct spot {
    char group[16], place[32];
    unsigned group_index;
    int fd;
    uint64_t dropped;
};
struct frame {
    uint64_t ns;
    unsigned spot;
};
struct run {
    const char *place;
    uint64_t first_ns, last_ns, frames;
};
struct group {
    const char *name;
    struct run *runs;
    size_t n, room;
    size_t spoken; /* the first run that may have changed since it was told */
};

static struct spot spots[MAX_SPOTS];
static struct group groups[MAX_GROUPS];
static unsigned n_spots, n_groups;
static struct frame *frames; /* read, not in order yet */
static size_t n_frames, frames_room;
static volatile sig_atomic_t g_stop;

static void on_signal(int number)
{
    (void)number;
    g_stop = 1;
}

static void die(const char *what, const char *detail)
{
    fprintf(stderr, "guestcap: %s: %s\n", what, detail);
    exit(2);
}

static void *grown(void *old, size_t *room, size_t size)
{
    *room = *room != 0 ? 2 * *room : 1024;
    void *p = realloc(old, *room * size);
    if (p == NULL) {
        die("memory", "none left");
    }
    return p;
}

static uint64_t clock_ns(clockid_t clock)
{
    struct timespec ts;

    clock_gettime(clock, &ts);
    return (uint64_t)ts.tv_sec * NSEC + (uint64_t)ts.tv_nsec;
}

/* Frames from the MAC that go the right way pass; of them only the first bytes are kept. */
static void filter(int fd, const unsigned char mac[6], bool out)
{
    uint32_t high = (uint32_t)(mac[0] << 8 | mac[1]);
    uint32_t low = (uint32_t)mac[2] << 24 | (uint32_t)mac[3] << 16 | (uint32_t)mac[4] << 8 | mac[5];
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_H | BPF_ABS, (uint32_t)(SKF_AD_OFF + SKF_AD_PKTTYPE)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, PACKET_OUTGOING, out ? 0 : 5, out ? 5 : 0),
        BPF_STMT(BPF_LD | BPF_H | BPF_ABS, 6),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, high, 0, 3),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 8),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, low, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, ETH_HLEN),
        BPF_STMT(BPF_RET | BPF_K, 0),
    };
    struct sock_fprog program = {.len = sizeof(code) / sizeof(*code), .filter = code};

    if (setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof(program)) < 0) {
        die("filter", strerror(errno));
    }
}

static int open_in(const char *namespace, const char *device, const unsigned char mac[6], bool out)
{
    struct sockaddr_ll at = {.sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_ALL)};
    int home = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC), there = open(namespace, O_RDONLY | O_CLOEXEC);
    int fd, one = 1, bytes = RECEIVE_BYTES;

    if (home < 0 || there < 0 || setns(there, CLONE_NEWNET) < 0) {
        die(namespace, strerror(errno));
    }
    fd = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, 0); /* receives nothing before bind() */
    at.sll_ifindex = (int)if_nametoindex(device);
    if (fd < 0 || at.sll_ifindex == 0) {
        die(device, strerror(errno));
    }
    filter(fd, mac, out);
    if (setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &bytes, sizeof(bytes)) < 0 ||
        setsockopt(fd, SOL_SOCKET, SO_TIMESTAMPNS, &one, sizeof(one)) < 0 ||
        bind(fd, (struct sockaddr *)&at, sizeof(at)) < 0) {
        die(device, strerror(errno));
    }
    if (setns(home, CLONE_NEWNET) < 0) {
        die("setns", strerror(errno));
    }
    close(home);
    close(there);
    return fd;
}

static unsigned group_of(const char *name)
{
    for (unsigned i = 0; i < n_groups; i++) {
        if (strcmp(groups[i].name, name) == 0) {
            return i;
        }
    }
    if (n_groups == MAX_GROUPS) {
        die(name, "too many groups");
    }
    groups[n_groups].name = name;
    return n_groups++;
}

static void add_spot(char *text, const unsigned char mac[6])
{
    char *part[5], *rest = text;
    struct spot *s = &spots[n_spots];

    for (unsigned i = 0; i < 5; i++) {
        part[i] = strsep(&rest, ":");
        if (part[i] == NULL) {
            die("want GROUP:PLACE:NAMESPACE:DEVICE:in|out", text);
        }
    }
    if (rest != NULL || n_spots == MAX_SPOTS || (strcmp(part[4], "in") != 0 && strcmp(part[4], "out") != 0)) {
        die("cannot watch", text);
    }
    snprintf(s->group, sizeof(s->group), "%s", part[0]);
    snprintf(s->place, sizeof(s->place), "%s", part[1]);
    s->group_index = group_of(s->group);
    s->fd = open_in(part[2], part[3], mac, strcmp(part[4], "out") == 0);
    n_spots++;
}

static uint64_t stamp_of(struct msghdr *message)
{
    for (struct cmsghdr *c = CMSG_FIRSTHDR(message); c != NULL; c = CMSG_NXTHDR(message, c)) {
        if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_TIMESTAMPNS) {
            struct timespec ts;

            memcpy(&ts, CMSG_DATA(c), sizeof(ts));
            return (uint64_t)ts.tv_sec * NSEC + (uint64_t)ts.tv_nsec;
        }
    }
    die("a frame", "has no timestamp");
    return 0;
}

static void read_spot(unsigned index)
{
    static char data[BATCH][ETH_HLEN], control[BATCH][64];
    struct iovec vectors[BATCH];
    struct mmsghdr messages[BATCH];
    int got;

    do {
        for (unsigned i = 0; i < BATCH; i++) {
            vectors[i] = (struct iovec){data[i], sizeof(data[i])};
            messages[i].msg_hdr = (struct msghdr){.msg_iov = &vectors[i], .msg_iovlen = 1, .msg_control = control[i],
                                                  .msg_controllen = sizeof(control[i])};
        }
        got = recvmmsg(spots[index].fd, messages, BATCH, MSG_DONTWAIT, NULL);
        for (int i = 0; i < got; i++) {
            if (n_frames == frames_room) {
                frames = grown(frames, &frames_room, sizeof(*frames));
            }
            frames[n_frames++] = (struct frame){stamp_of(&messages[i].msg_hdr), index};
        }
    } while (got == BATCH);
}

static int by_time(const void *a, const void *b)
{
    const struct frame *x = a, *y = b;

    return (x->ns > y->ns) - (x->ns < y->ns);
}

static void put_in_run(const struct frame *f)
{
    const struct spot *s = &spots[f->spot];
    struct group *g = &groups[s->group_index];
    struct run *last = g->n != 0 ? &g->runs[g->n - 1] : NULL;

    if (last == NULL || strcmp(last->place, s->place) != 0) {
        if (g->n == g->room) {
            g->runs = grown(g->runs, &g->room, sizeof(*g->runs));
        }
        last = &g->runs[g->n++];
        *last = (struct run){.place = s->place, .first_ns = f->ns};
    }
    last->last_ns = f->ns;
    last->frames++;
}

/* Moves what is older than `before` into runs. */
static void settle(uint64_t before)
{
    size_t done = 0;

    qsort(frames, n_frames, sizeof(*frames), by_time);
    while (done < n_frames && frames[done].ns < before) {
        put_in_run(&frames[done++]);
    }
    memmove(frames, frames + done, (n_frames - done) * sizeof(*frames));
    n_frames -= done;
}

static void count_dropped(void)
{
    for (unsigned i = 0; i < n_spots; i++) {
        struct tpacket_stats stats;
        socklen_t length = sizeof(stats);

        if (getsockopt(spots[i].fd, SOL_PACKET, PACKET_STATISTICS, &stats, &length) == 0) {
            spots[i].dropped += stats.tp_drops;
        }
    }
}

static void print_run(const struct run *r)
{
    printf("\"place\":\"%s\",\"first\":%.6f,\"last\":%.6f,\"frames\":%" PRIu64 "}", r->place, (double)r->first_ns / 1e9,
           (double)r->last_ns / 1e9, r->frames);
}

static void speak(uint64_t now)
{
    for (unsigned i = 0; i < n_groups; i++) {
        struct group *g = &groups[i];

        for (size_t k = g->spoken; k < g->n; k++) {
            printf("{\"now\":%.6f,\"group\":\"%s\",\"run\":%zu,", (double)now / 1e9, g->name, k);
            print_run(&g->runs[k]);
            printf("\n");
        }
        g->spoken = g->n != 0 ? g->n - 1 : 0;
    }
    fflush(stdout);
}

static void report(void)
{
    uint64_t dropped = 0;

    for (unsigned i = 0; i < n_spots; i++) {
        dropped += spots[i].dropped;
    }
    printf("{\"dropped\":%" PRIu64 ",\"groups\":{", dropped);
    for (unsigned i = 0; i < n_groups; i++) {
        printf("%s\"%s\":[", i != 0 ? "," : "", groups[i].name);
        for (size_t k = 0; k < groups[i].n; k++) {
            printf("%s{", k != 0 ? "," : "");
            print_run(&groups[i].runs[k]);
        }
        printf("]");
    }
    printf("}}\n");
    fflush(stdout);
}

static int watch(bool stream)
{
    struct pollfd p[MAX_SPOTS];
    int64_t step = (int64_t)(clock_ns(CLOCK_REALTIME) - clock_ns(CLOCK_MONOTONIC)), now_step;
    uint64_t spoken = 0, now;

    do {
        for (unsigned i = 0; i < n_spots; i++) {
            p[i] = (struct pollfd){.fd = spots[i].fd, .events = POLLIN};
        }
        poll(p, n_spots, 50);
        for (unsigned i = 0; i < n_spots; i++) {
            read_spot(i);
        }
        now = clock_ns(CLOCK_REALTIME);
        if (now - spoken > NSEC / 10 || g_stop) {
            spoken = now;
            settle(g_stop ? UINT64_MAX : now - SETTLE_NS);
            count_dropped();
            if (stream) {
                speak(now);
            }
        }
    } while (!g_stop);
    report();
    now_step = (int64_t)(clock_ns(CLOCK_REALTIME) - clock_ns(CLOCK_MONOTONIC));
    if (llabs(now_step - step) > (int64_t)(NSEC / 20)) {
        fprintf(stderr, "guestcap: the clock was set meanwhile: the order is not certain\n");
        return 1;
    }
    return 0;
}

int main(int argc, char **argv)
{
    struct sigaction action = {.sa_handler = on_signal};
    unsigned char mac[6] = {0};
    bool stream = false, have_mac = false;

    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--stream") == 0) {
            stream = true;
        } else if (strcmp(argv[i], "--mac") == 0 && i + 1 < argc) {
            have_mac = sscanf(argv[++i], "%2hhx:%2hhx:%2hhx:%2hhx:%2hhx:%2hhx", &mac[0], &mac[1], &mac[2], &mac[3], &mac[4],
                              &mac[5]) == 6;
        } else if (have_mac) {
            add_spot(argv[i], mac);
        } else {
            die("usage", "--mac MAC comes first");
        }
    }
    if (n_spots == 0) {
        die("usage", "nothing to watch");
    }
    return watch(stream);
}
