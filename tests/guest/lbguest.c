/* build: gcc -std=c11 -D_GNU_SOURCE -O2 -static -pthread -o lbguest lbguest.c
 *
 * lbguest - the workload that runs inside a test guest and checks itself.
 *
 * A migration is right when the guest cannot tell that it happened. So the guest carries its own witnesses:
 *   memory  every page holds {index, sequence, nonce, checksum over the whole page}; the sequence expected is kept in a
 *           table in other memory, so a page that arrives stale is found although its own checksum is good;
 *   disk    the same for 4 KiB blocks written and read back with O_DIRECT;
 *   network a 1 kHz numbered UDP stream, for an observer outside (the guest's clock stands still while it is stopped);
 *   clock   MONOTONIC against REALTIME, and the length of each tick;
 *   nonce   random, in RAM only: tells a guest that lived on from one that was booted again.
 * What runs is chosen on the kernel command line (see README.md); "lbguest body KIND PAGES" writes sample pages to stdout.
 *
 * Ports: 7000 status (one line of JSON, at once), 7001 echo, 7002 the same line after every page was checked once more.
 *
 * Threads: one writer and one verifier of memory share the pages under striped locks; all counters are atomics.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <linux/fs.h>

#define PAGE_BYTES 4096u
#define PAGE_WORDS (PAGE_BYTES / 8)
#define HEADER_WORDS 4u /* index, sequence, nonce, checksum */
#define STRIPES 64u
#define NSEC 1000000000ull
#define TICK_NS 5000000ull
#define STEP_NS 100000000ll
#define DISK_SPAN_BYTES (64u << 20)
#define DISK_THREADS 2u
#define VERIFY_IDLE_PAGES_PER_SECOND 4000u
#define VERIFY_BUSY_PAGES_PER_SECOND 20000u
#define CALM 10u /* so many times as seldom */

enum body_kind { BODY_RANDOM, BODY_COMPRESSIBLE, BODY_MIXED };

static uint64_t g_nonce;
static char g_work[512];

/* memory work; set once before the threads start */
static uint64_t *g_pages;
static uint32_t *g_page_sequence;
static uint8_t *g_page_bad; /* 1: already counted, until the page is rewritten */
static uint64_t g_page_count;
static uint64_t g_write_pages_per_second;
static enum body_kind g_body_kind;
static pthread_mutex_t g_stripes[STRIPES];

static _Atomic uint64_t g_pages_written, g_pages_verified, g_bad_pages, g_verify_passes;
static _Atomic uint64_t g_disk_written, g_disk_verified, g_disk_bad, g_disk_errors;
static _Atomic uint64_t g_clock_steps, g_tick_max_ns, g_tick_late, g_udp_sent, g_udp_errors, g_spun;
static _Atomic uint64_t g_seldom = 1; /* CALM: writes and verifies for little processor time */
static _Atomic int g_ready; /* 1 once every page was stamped (or there is no memory work) */

static pthread_mutex_t g_first_bad_lock = PTHREAD_MUTEX_INITIALIZER;
static char g_first_bad[160];

/* ---- small helpers ---- */

static uint64_t now_ns(clockid_t clock)
{
    struct timespec ts;

    clock_gettime(clock, &ts);
    return (uint64_t)ts.tv_sec * NSEC + (uint64_t)ts.tv_nsec;
}

static void sleep_until_ns(uint64_t when_ns)
{
    struct timespec ts = {.tv_sec = (time_t)(when_ns / NSEC), .tv_nsec = (long)(when_ns % NSEC)};

    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &ts, NULL) == EINTR) {
    }
}

static uint64_t mix64(uint64_t x)
{
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

static void note_bad(const char *format, ...)
{
    va_list args;

    pthread_mutex_lock(&g_first_bad_lock);
    if (g_first_bad[0] == '\0') {
        va_start(args, format);
        vsnprintf(g_first_bad, sizeof(g_first_bad), format, args);
        va_end(args);
    }
    pthread_mutex_unlock(&g_first_bad_lock);
}

static void start_thread(void *(*run)(void *), void *arg, int fifo_priority)
{
    struct sched_param param = {.sched_priority = fifo_priority};
    pthread_attr_t attr;
    pthread_t thread;

    pthread_attr_init(&attr);
    pthread_attr_setstacksize(&attr, 256 * 1024);
    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    if (fifo_priority > 0) {
        pthread_attr_setinheritsched(&attr, PTHREAD_EXPLICIT_SCHED);
        pthread_attr_setschedpolicy(&attr, SCHED_FIFO);
        pthread_attr_setschedparam(&attr, &param);
    }
    int rc = pthread_create(&thread, &attr, run, arg);
    if (rc != 0 && fifo_priority > 0) {
        pthread_attr_setinheritsched(&attr, PTHREAD_INHERIT_SCHED);
        rc = pthread_create(&thread, &attr, run, arg);
    }
    if (rc != 0) {
        fprintf(stderr, "lbguest: cannot start a thread: %s\n", strerror(rc));
        exit(1);
    }
    pthread_attr_destroy(&attr);
}

/* ---- page contents ---- */

/*
 * Text-like bodies: eight-byte words out of a vocabulary just large enough that zstd -1 makes about 4:1 of each page alone
 * (check-body.sh holds it to that).
 */
#define VOCABULARY 64u
static uint64_t g_vocabulary[VOCABULARY];

static void vocabulary_init(void)
{
    static const char letters[] = "etaoinshrdlucmfw";

    for (unsigned i = 0; i < VOCABULARY; i++) {
        char word[8];
        uint64_t r = mix64(i + 1);

        for (unsigned k = 0; k < 7; k++) {
            word[k] = letters[(r >> (4 * k)) & 15];
        }
        word[7] = ' ';
        memcpy(&g_vocabulary[i], word, 8);
    }
}

static void fill_random(uint64_t *words, unsigned count, uint64_t seed)
{
    uint64_t x = mix64(seed) | 1;

    for (unsigned i = 0; i < count; i++) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        words[i] = x;
    }
}

/* One generator step feeds eight words. */
static void fill_text(uint64_t *words, unsigned count, uint64_t seed)
{
    uint64_t x = mix64(seed) | 1;
    unsigned i = 0;

    while (i < count) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        uint64_t r = x;
        for (unsigned k = 0; k < 8 && i < count; k++, i++) {
            words[i] = g_vocabulary[r & (VOCABULARY - 1)];
            r >>= 7;
        }
    }
}

static bool page_is_text(uint64_t index)
{
    return g_body_kind == BODY_COMPRESSIBLE || (g_body_kind == BODY_MIXED && (mix64(index) & 1) != 0);
}

/* Covers the whole page but the checksum word itself. Two lanes, so that an emulated CPU is not held by one chain. */
static uint64_t page_checksum(const uint64_t *words)
{
    uint64_t a = words[0] ^ 0x243f6a8885a308d3ull, b = words[1] ^ 0x13198a2e03707344ull;

    a = (a ^ words[2]) * 0x9e3779b97f4a7c15ull;
    for (unsigned i = HEADER_WORDS; i < PAGE_WORDS; i += 2) {
        a = (a ^ words[i]) * 0x9e3779b97f4a7c15ull;
        b = (b ^ words[i + 1]) * 0xc2b2ae3d27d4eb4full;
        a ^= a >> 29;
        b ^= b >> 31;
    }
    return mix64(a) ^ b;
}

static void page_fill(uint64_t *words, uint64_t index, uint64_t sequence, bool text)
{
    uint64_t seed = g_nonce ^ mix64(index) ^ (sequence << 20);

    words[0] = index;
    words[1] = sequence;
    words[2] = g_nonce;
    if (text) {
        fill_text(words + HEADER_WORDS, PAGE_WORDS - HEADER_WORDS, seed);
    } else {
        fill_random(words + HEADER_WORDS, PAGE_WORDS - HEADER_WORDS, seed);
    }
    words[3] = page_checksum(words);
}

/* NULL when good, else the name of what is wrong. */
static const char *page_fault(const uint64_t *words, uint64_t index, uint64_t sequence)
{
    if (words[0] != index) {
        return "index";
    }
    if (words[2] != g_nonce) {
        return "nonce";
    }
    if (words[1] != sequence) {
        return words[1] < sequence ? "stale" : "sequence";
    }
    return words[3] == page_checksum(words) ? NULL : "checksum";
}

/* ---- memory ---- */

static void memory_write(uint64_t index)
{
    pthread_mutex_t *lock = &g_stripes[index % STRIPES];

    pthread_mutex_lock(lock);
    uint32_t sequence = ++g_page_sequence[index];
    page_fill(g_pages + index * PAGE_WORDS, index, sequence, page_is_text(index));
    g_page_bad[index] = 0;
    atomic_fetch_add(&g_pages_written, 1);
    pthread_mutex_unlock(lock);
}

static void memory_verify(uint64_t index)
{
    pthread_mutex_t *lock = &g_stripes[index % STRIPES];

    pthread_mutex_lock(lock);
    const uint64_t *page = g_pages + index * PAGE_WORDS;
    const char *fault = page_fault(page, index, g_page_sequence[index]);
    if (fault != NULL && !g_page_bad[index]) {
        g_page_bad[index] = 1;
        atomic_fetch_add(&g_bad_pages, 1);
        note_bad("page %" PRIu64 " %s: sequence %" PRIu64 " expected %" PRIu32, index, fault, page[1],
                 g_page_sequence[index]);
    }
    pthread_mutex_unlock(lock);
    atomic_fetch_add(&g_pages_verified, 1);
}

/*
 * The table of sequences could itself arrive stale together with its pages; then page and table agree on an old state.
 * Their sum is kept a third time, in the counter of writes.
 */
static void memory_verify_table(void)
{
    uint64_t sum = 0;

    for (unsigned i = 0; i < STRIPES; i++) {
        pthread_mutex_lock(&g_stripes[i]);
    }
    for (uint64_t i = 0; i < g_page_count; i++) {
        sum += g_page_sequence[i];
    }
    uint64_t written = atomic_load(&g_pages_written);
    for (unsigned i = STRIPES; i-- > 0;) {
        pthread_mutex_unlock(&g_stripes[i]);
    }
    if (sum != written) {
        atomic_fetch_add(&g_bad_pages, 1);
        note_bad("sequence table: sum %" PRIu64 " expected %" PRIu64, sum, written);
    }
}

static void *memory_writer(void *arg)
{
    (void)arg;
    for (uint64_t i = 0; i < g_page_count; i++) {
        memory_write(i);
    }
    atomic_store(&g_ready, 1);

    if (g_write_pages_per_second == 0) {
        return NULL;
    }
    uint64_t start_ns = now_ns(CLOCK_MONOTONIC), tick = 0, done = 0, pick = g_nonce, tick_ns = TICK_NS * atomic_load(&g_seldom);
    for (;;) {
        tick++;
        sleep_until_ns(start_ns + tick * tick_ns);
        uint64_t elapsed_ns = now_ns(CLOCK_MONOTONIC) - start_ns;
        /* Too slow a machine writes at its own speed: forget the debt instead of starving everything else. */
        if (elapsed_ns > tick * tick_ns + NSEC) {
            start_ns = now_ns(CLOCK_MONOTONIC);
            tick = done = 0;
            continue;
        }
        uint64_t due = tick * tick_ns / 1000 * g_write_pages_per_second / 1000000;
        for (; done < due; done++) {
            pick += 0x9e3779b97f4a7c15ull;
            memory_write((uint64_t)(((unsigned __int128)mix64(pick) * g_page_count) >> 64));
        }
    }
    return NULL;
}

static void *memory_verifier(void *arg)
{
    uint64_t per_tick, seldom, index = 0;

    (void)arg;
    while (!atomic_load(&g_ready)) {
        usleep(20000);
    }
    seldom = atomic_load(&g_seldom);
    per_tick = (g_write_pages_per_second && seldom == 1 ? VERIFY_BUSY_PAGES_PER_SECOND : VERIFY_IDLE_PAGES_PER_SECOND) / 100;
    for (;;) {
        usleep((useconds_t)(10000 * seldom));
        for (uint64_t i = 0; i < per_tick; i++) {
            memory_verify(index);
            if (++index == g_page_count) {
                index = 0;
                memory_verify_table();
                atomic_fetch_add(&g_verify_passes, 1);
            }
        }
    }
    return NULL;
}

static void memory_start(const char *spec)
{
    unsigned rate_mb = 0, memory_mb = 0;
    char kind[32] = "random";

    if (sscanf(spec, "%u:%u:%31s", &rate_mb, &memory_mb, kind) < 2 || memory_mb == 0) {
        fprintf(stderr, "lbguest: lb.dirty=%s: want RATE:MEM_MB[:random|compressible|mixed]\n", spec);
        exit(1);
    }
    g_body_kind = strcmp(kind, "compressible") == 0 ? BODY_COMPRESSIBLE
                  : strcmp(kind, "mixed") == 0      ? BODY_MIXED
                                                    : BODY_RANDOM;
    g_page_count = (uint64_t)memory_mb << 8;
    g_write_pages_per_second = (uint64_t)rate_mb << 8;
    size_t bytes = g_page_count * PAGE_BYTES;
    g_pages = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    g_page_sequence = calloc(g_page_count, sizeof(*g_page_sequence));
    g_page_bad = calloc(g_page_count, 1);
    if (g_pages == MAP_FAILED || g_page_sequence == NULL || g_page_bad == NULL) {
        fprintf(stderr, "lbguest: no room for %u MB: give the guest more memory\n", memory_mb);
        exit(1);
    }
    for (unsigned i = 0; i < STRIPES; i++) {
        pthread_mutex_init(&g_stripes[i], NULL);
    }
    start_thread(memory_writer, NULL, 0);
    start_thread(memory_verifier, NULL, 0);
}

/* ---- disk ---- */

struct disk_work {
    int fd;
    unsigned thread; /* owns the blocks whose index is thread modulo DISK_THREADS */
    uint64_t block_count;
};

/* One write and one read back of an older block, at most 200 times a second; runs until the guest ends. */
static void *disk_run(void *arg)
{
    struct disk_work *work = arg;
    uint64_t own = work->block_count / DISK_THREADS, written = 0, random = g_nonce ^ mix64(work->thread);
    uint32_t *sequence = calloc(own, sizeof(*sequence));
    uint64_t *list = calloc(own, sizeof(*list)); /* blocks written so far, to read back only those */
    uint64_t *buffer = NULL;

    if (sequence == NULL || list == NULL || posix_memalign((void **)&buffer, PAGE_BYTES, PAGE_BYTES) != 0) {
        fprintf(stderr, "lbguest: no memory for the disk work\n");
        exit(1);
    }
    for (;;) {
        random = mix64(random);
        uint64_t slot = random % own, block = slot * DISK_THREADS + work->thread;
        if (sequence[slot]++ == 0) {
            list[written++] = slot;
        }
        page_fill(buffer, block, sequence[slot], false);
        if (pwrite(work->fd, buffer, PAGE_BYTES, (off_t)(block * PAGE_BYTES)) != (ssize_t)PAGE_BYTES) {
            atomic_fetch_add(&g_disk_errors, 1);
            note_bad("disk block %" PRIu64 " write: %s", block, strerror(errno));
        } else {
            atomic_fetch_add(&g_disk_written, 1);
        }

        slot = list[(random >> 32) % written];
        block = slot * DISK_THREADS + work->thread;
        memset(buffer, 0, PAGE_BYTES);
        if (pread(work->fd, buffer, PAGE_BYTES, (off_t)(block * PAGE_BYTES)) != (ssize_t)PAGE_BYTES) {
            atomic_fetch_add(&g_disk_errors, 1);
            note_bad("disk block %" PRIu64 " read: %s", block, strerror(errno));
        } else {
            const char *fault = page_fault(buffer, block, sequence[slot]);
            if (fault != NULL) {
                atomic_fetch_add(&g_disk_bad, 1);
                note_bad("disk block %" PRIu64 " %s: sequence %" PRIu64 " expected %" PRIu32, block, fault, buffer[1],
                         sequence[slot]);
            }
            atomic_fetch_add(&g_disk_verified, 1);
        }
        usleep(5000);
    }
    return NULL;
}

static void disk_start(const char *name)
{
    static struct disk_work work[DISK_THREADS];
    char path[64];
    uint64_t bytes = 0;
    int fd = -1;

    snprintf(path, sizeof(path), "/dev/%s", name);
    for (unsigned i = 0; i < 500 && fd < 0; i++) { /* SCSI disks appear some time after their driver is loaded */
        fd = open(path, O_RDWR | O_DIRECT | O_CLOEXEC);
        if (fd < 0) {
            usleep(10000);
        }
    }
    if (fd < 0 || ioctl(fd, BLKGETSIZE64, &bytes) != 0 || bytes < DISK_THREADS * PAGE_BYTES) {
        fprintf(stderr, "lbguest: %s: %s\n", path, strerror(errno));
        atomic_fetch_add(&g_disk_errors, 1);
        note_bad("disk %s cannot be used", name);
        return;
    }
    for (unsigned i = 0; i < DISK_THREADS; i++) {
        work[i] = (struct disk_work){
            .fd = fd, .thread = i, .block_count = (bytes < DISK_SPAN_BYTES ? bytes : DISK_SPAN_BYTES) / PAGE_BYTES};
        start_thread(disk_run, &work[i], 0);
    }
}

/* ---- clock ---- */

static void *clock_run(void *arg)
{
    uint64_t last_ns = now_ns(CLOCK_MONOTONIC);
    int64_t last_offset = (int64_t)(now_ns(CLOCK_REALTIME) - last_ns);

    (void)arg;
    for (;;) {
        usleep(20000);
        uint64_t mono = now_ns(CLOCK_MONOTONIC);
        int64_t offset = (int64_t)(now_ns(CLOCK_REALTIME) - mono);
        int64_t tick_ns = (int64_t)(mono - last_ns);
        if (llabs(offset - last_offset) > STEP_NS || tick_ns < 0) {
            atomic_fetch_add(&g_clock_steps, 1);
            note_bad("clock step of %" PRId64 " ms", (offset - last_offset) / 1000000);
        }
        if (tick_ns > 0 && (uint64_t)tick_ns > atomic_load(&g_tick_max_ns)) {
            atomic_store(&g_tick_max_ns, (uint64_t)tick_ns);
        }
        if (tick_ns > 20000000 + STEP_NS) {
            atomic_fetch_add(&g_tick_late, 1);
        }
        last_ns = mono;
        last_offset = offset;
    }
    return NULL;
}

/* ---- network ---- */

static struct sockaddr_in g_udp_target;

/* As much as the processor gives: work done, for an observer with a clock of his own. */
static void *spin_run(void *arg)
{
    const struct sched_param none = {0};
    uint64_t x = 88172645463325252ull;

    (void)arg;
    sched_setscheduler(0, SCHED_IDLE, &none); /* what the rest leaves */
    for (;;) {
        for (int i = 0; i < 10000; i++) {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
        }
        atomic_fetch_add(&g_spun, x ? 1 : 0);
    }
    return NULL;
}

static void *udp_run(void *arg)
{
    struct {
        uint64_t sequence;
        uint64_t guest_ns;
    } packet = {0, 0};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    uint64_t next_ns = now_ns(CLOCK_MONOTONIC);

    (void)arg;
    for (;;) {
        next_ns += 1000000;
        uint64_t now = now_ns(CLOCK_MONOTONIC);
        if (now > next_ns + 2000000) {
            next_ns = now; /* late: skip the missed ticks, a burst would tell the observer nothing */
        }
        sleep_until_ns(next_ns);
        packet.guest_ns = now_ns(CLOCK_MONOTONIC);
        if (sendto(fd, &packet, sizeof(packet), 0, (struct sockaddr *)&g_udp_target, sizeof(g_udp_target)) ==
            (ssize_t)sizeof(packet)) {
            packet.sequence++; /* numbered by what was sent, so a hole in the numbers is a lost packet */
            atomic_fetch_add(&g_udp_sent, 1);
        } else {
            atomic_fetch_add(&g_udp_errors, 1);
        }
    }
    return NULL;
}

static void udp_start(const char *spec)
{
    char host[64];
    unsigned port;

    g_udp_target.sin_family = AF_INET;
    if (sscanf(spec, "%63[^:]:%u", host, &port) != 2 || inet_pton(AF_INET, host, &g_udp_target.sin_addr) != 1) {
        fprintf(stderr, "lbguest: lb.udp=%s: want IP:PORT\n", spec);
        exit(1);
    }
    g_udp_target.sin_port = htons((uint16_t)port);
    start_thread(udp_run, NULL, 50);
}

static int listen_on(uint16_t port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = INADDR_ANY};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;

    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
    if (bind(fd, (struct sockaddr *)&address, sizeof(address)) != 0 || listen(fd, 64) != 0) {
        fprintf(stderr, "lbguest: port %u: %s\n", port, strerror(errno));
        exit(1);
    }
    return fd;
}

static void *echo_connection(void *arg)
{
    int fd = (int)(intptr_t)arg, one = 1;
    char buffer[16384];
    ssize_t got;

    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    while ((got = read(fd, buffer, sizeof(buffer))) > 0) {
        for (ssize_t sent = 0; sent < got;) {
            ssize_t n = write(fd, buffer + sent, (size_t)(got - sent));
            if (n <= 0) {
                close(fd);
                return NULL;
            }
            sent += n;
        }
    }
    close(fd);
    return NULL;
}

static void *echo_run(void *arg)
{
    int listener = (int)(intptr_t)arg;

    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (fd >= 0) {
            start_thread(echo_connection, (void *)(intptr_t)fd, 0);
        }
    }
    return NULL;
}

/* ---- status ---- */

static int status_line(char *line, size_t size)
{
    char first_bad[sizeof(g_first_bad)];

    pthread_mutex_lock(&g_first_bad_lock);
    memcpy(first_bad, g_first_bad, sizeof(first_bad));
    pthread_mutex_unlock(&g_first_bad_lock);
    return snprintf(line, size,
                    "{\"nonce\":\"%016" PRIx64 "\",\"uptime_ms\":%" PRIu64 ",\"ready\":%s,\"pages_written\":%" PRIu64
                    ",\"pages_verified\":%" PRIu64 ",\"bad_pages\":%" PRIu64 ",\"verify_passes\":%" PRIu64
                    ",\"disk_written\":%" PRIu64 ",\"disk_verified\":%" PRIu64 ",\"disk_bad\":%" PRIu64
                    ",\"disk_errors\":%" PRIu64 ",\"clock_steps\":%" PRIu64 ",\"tick_max_ms\":%" PRIu64
                    ",\"tick_late\":%" PRIu64 ",\"udp_sent\":%" PRIu64 ",\"udp_errors\":%" PRIu64 ",\"spun\":%" PRIu64
                    ",\"first_bad\":\"%s\",\"work\":\"%s\"}\n",
                    g_nonce, now_ns(CLOCK_MONOTONIC) / 1000000, atomic_load(&g_ready) ? "true" : "false",
                    atomic_load(&g_pages_written), atomic_load(&g_pages_verified), atomic_load(&g_bad_pages),
                    atomic_load(&g_verify_passes), atomic_load(&g_disk_written), atomic_load(&g_disk_verified),
                    atomic_load(&g_disk_bad), atomic_load(&g_disk_errors), atomic_load(&g_clock_steps),
                    atomic_load(&g_tick_max_ns) / 1000000, atomic_load(&g_tick_late), atomic_load(&g_udp_sent),
                    atomic_load(&g_udp_errors), atomic_load(&g_spun), first_bad, g_work);
}

static void send_status(int fd)
{
    char line[2048];
    int length = status_line(line, sizeof(line));

    for (int sent = 0; sent < length;) {
        ssize_t n = write(fd, line + sent, (size_t)(length - sent));
        if (n <= 0) {
            break;
        }
        sent += (int)n;
    }
}

static void *status_run(void *arg)
{
    int listener = (int)(intptr_t)arg;

    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (fd >= 0) {
            send_status(fd);
            close(fd);
        }
    }
    return NULL;
}

static void *full_verify_run(void *arg)
{
    int listener = (int)(intptr_t)arg;

    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (fd < 0) {
            continue;
        }
        while (!atomic_load(&g_ready)) {
            usleep(20000);
        }
        for (uint64_t i = 0; i < g_page_count; i++) {
            memory_verify(i);
        }
        memory_verify_table();
        send_status(fd);
        close(fd);
    }
    return NULL;
}

static int write_sample_bodies(const char *kind, uint64_t count)
{
    uint64_t page[PAGE_WORDS];

    g_body_kind = strcmp(kind, "compressible") == 0 ? BODY_COMPRESSIBLE
                  : strcmp(kind, "mixed") == 0      ? BODY_MIXED
                                                    : BODY_RANDOM;
    for (uint64_t i = 0; i < count; i++) {
        page_fill(page, i, 1, page_is_text(i));
        if (page_fault(page, i, 1) != NULL || fwrite(page, sizeof(page), 1, stdout) != 1) {
            return 1;
        }
    }
    return 0;
}

int main(int argc, char **argv)
{
    char command_line[4096] = "", *save = NULL;
    FILE *file;

    signal(SIGPIPE, SIG_IGN);
    vocabulary_init();
    if (getrandom(&g_nonce, sizeof(g_nonce), 0) != (ssize_t)sizeof(g_nonce)) {
        return 1;
    }
    if (argc == 4 && strcmp(argv[1], "body") == 0) {
        return write_sample_bodies(argv[2], strtoull(argv[3], NULL, 10));
    }

    file = fopen("/proc/cmdline", "re");
    if (file == NULL || fgets(command_line, sizeof(command_line), file) == NULL) {
        fprintf(stderr, "lbguest: /proc/cmdline: %s\n", strerror(errno));
        return 1;
    }
    fclose(file);
    command_line[strcspn(command_line, "\n")] = '\0';

    start_thread(status_run, (void *)(intptr_t)listen_on(7000), 20);
    start_thread(full_verify_run, (void *)(intptr_t)listen_on(7002), 0);
    bool has_memory = false;
    for (char *word = strtok_r(command_line, " ", &save); word != NULL; word = strtok_r(NULL, " ", &save)) {
        if (strncmp(word, "lb.", 3) != 0) {
            continue;
        }
        size_t used = strlen(g_work);
        snprintf(g_work + used, sizeof(g_work) - used, "%s%s", used ? " " : "", word + 3);
        if (strncmp(word, "lb.dirty=", 9) == 0) {
            has_memory = true;
            memory_start(word + 9);
        } else if (strncmp(word, "lb.disk=", 8) == 0) {
            disk_start(word + 8);
        } else if (strncmp(word, "lb.udp=", 7) == 0) {
            udp_start(word + 7);
        } else if (strcmp(word, "lb.calm") == 0) {
            atomic_store(&g_seldom, CALM);
        } else if (strcmp(word, "lb.clock") == 0) {
            start_thread(clock_run, NULL, 40);
        } else if (strcmp(word, "lb.spin") == 0) {
            start_thread(spin_run, NULL, 0);
        } else if (strcmp(word, "lb.echo") == 0) {
            start_thread(echo_run, (void *)(intptr_t)listen_on(7001), 0);
        }
    }
    if (!has_memory) {
        atomic_store(&g_ready, 1);
    }

    for (;;) {
        char line[2048];

        status_line(line, sizeof(line));
        printf("LB %s", line);
        fflush(stdout);
        sleep(1);
    }
}
