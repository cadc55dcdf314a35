/* How fast is a bulk connection, and what bounds it?
 *
 *      bench_bulk [MIB] [RUN_PAGES]
 *
 * On loopback TCP, two processes: raw writes of the same sizes, then lb_bulk with each cipher. And
 * each cipher alone, on one core, sealing pages into a buffer that stays in the cache.
 * One JSON object on stdout: rates in MB/s (10^6), CPU seconds of each side. */
#include "netproto/netproto_internal.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <sched.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>

#define PAGE LB_WIRE_PAGE_BYTES
#define RAW_WRITE ((size_t)256 << 10)

static size_t g_bytes;
static unsigned g_run_pages;

static void die(const char *what, const struct lb_error *err)
{
    fprintf(stderr, "bench_bulk: %s: %s\n", what, err ? err->message : "failed");
    exit(1);
}

static void pin(int cpu)
{
    cpu_set_t set;
    if (cpu < 0)
        return;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    sched_setaffinity(0, sizeof(set), &set);
}

static uint8_t *memory(int fill)
{
    uint8_t *p = mmap(NULL, g_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        die("memory", NULL);
    for (size_t i = 0; i < g_bytes; i += 8) { /* touches every page */
        uint64_t v = (i + 1) * UINT64_C(0x9e3779b97f4a7c15) * (uint64_t)fill;
        memcpy(p + i, &v, 8);
    }
    return p;
}

static double cpu_s(int who)
{
    struct rusage u;
    getrusage(who, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) +
           (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e6;
}

/* All memory in records of LB_REC_MAX_PAGES, runs of g_run_pages. */
static void send_memory(struct lb_bulk *b, uint8_t *mem, int level)
{
    struct lb_error err = LB_ERROR_INIT;
    struct lb_page_run runs[LB_REC_MAX_PAGES];
    struct iovec iov[LB_REC_MAX_PAGES];
    uint32_t total = (uint32_t)(g_bytes / PAGE), page = 0;
    while (page < total) {
        unsigned n = 0;
        for (uint32_t end = page + LB_REC_MAX_PAGES; page < end && page < total; n++) {
            uint32_t count = LB_MIN(LB_MIN(g_run_pages, end - page), total - page);
            runs[n] = (struct lb_page_run){page, count};
            iov[n] = (struct iovec){mem + (size_t)page * PAGE, (size_t)count * PAGE};
            page += count;
        }
        if (lb_bulk_send_pages(b, 0, 0, runs, iov, n, level, &err) < 0)
            die("send", &err);
    }
    if (lb_bulk_send_mark(b, LB_REC_END, 0, NULL, 0, &err) < 0)
        die("send", &err);
}

static void recv_memory(struct lb_bulk *b, uint8_t *mem)
{
    struct lb_error err = LB_ERROR_INIT;
    struct lb_record rec;
    uint64_t n_pages = g_bytes / PAGE;
    if (lb_bulk_set_blocks(b, &n_pages, 1, &err) < 0)
        die("blocks", &err);
    for (;;) {
        struct iovec iov[LB_REC_MAX_PAGES];
        if (lb_bulk_recv(b, &rec, 0, &err) < 0)
            die("recv", &err);
        if (rec.type == LB_REC_END)
            return;
        for (uint32_t i = 0; i < rec.n_runs; i++)
            iov[i] = (struct iovec){mem + (size_t)rec.runs[i].first * PAGE,
                                    (size_t)rec.runs[i].count * PAGE};
        if (lb_bulk_recv_pages(b, &rec, iov, &err) < 0)
            die("recv", &err);
    }
}

static void raw_send(int fd, const uint8_t *mem)
{
    for (size_t at = 0; at < g_bytes; at += RAW_WRITE)
        if (lb_write_all(fd, mem + at, LB_MIN(RAW_WRITE, g_bytes - at), NULL) < 0)
            die("write", NULL);
}

static void raw_recv(int fd, uint8_t *mem)
{
    size_t at = 0;
    while (at < g_bytes) {
        ssize_t n = recv(fd, mem + at, LB_MIN(RAW_WRITE, g_bytes - at), 0);
        if (n <= 0)
            die("read", NULL);
        at += (size_t)n;
    }
}

struct figures {
    double mb_s, tx_cpu_s, rx_cpu_s;
};

/* cipher < 0: raw TCP. Both ends meet before the clock starts, and the receiver's last byte ends it. */
static struct figures transfer(int cipher, int level, uint8_t *src, uint8_t *dst, int same_core)
{
    struct lb_error err = LB_ERROR_INIT;
    struct sockaddr_in sa;
    socklen_t len = sizeof(sa);
    struct lb_bulk_keys k = {.cipher = cipher < 0 ? LB_CIPHER_NONE : (enum lb_cipher)cipher};
    int listener = lb_tcp_listen("127.0.0.1:0", 0, &err), go[2];
    double child_cpu[1];
    if (listener < 0 || getsockname(listener, (struct sockaddr *)&sa, &len) < 0 || pipe(go) < 0)
        die("listen", &err);
    memset(k.session_id, 1, sizeof(k.session_id));
    pid_t pid = fork();
    if (pid == 0) { /* the receiver */
        uint8_t preamble[LB_PREAMBLE_BYTES];
        struct lb_bulk *b;
        uint32_t index = 0;
        pin(same_core ? 0 : 1);
        int fd = accept(listener, NULL, NULL);
        if (lb_read_all(fd, preamble, sizeof(preamble), &err) < 0)
            die("preamble", &err);
        madvise(dst, g_bytes, MADV_POPULATE_WRITE); /* no page faults on the clock */
        if (write(go[1], &index, 1) < 0)
            _exit(1);
        double before = cpu_s(RUSAGE_SELF);
        if (cipher < 0) {
            lb_tcp_from_fd(fd); /* the same socket options */
            raw_recv(fd, dst);
        } else {
            if (lb_bulk_accept(lb_tcp_from_fd(fd), &k, 5000, &index, &b, &err) < 0)
                die("accept", &err);
            recv_memory(b, dst);
        }
        child_cpu[0] = cpu_s(RUSAGE_SELF) - before;
        if (write(go[1], child_cpu, sizeof(child_cpu)) < 0)
            _exit(1);
        _exit(0);
    }
    pin(0);
    struct lb_transport *t = NULL;
    struct lb_bulk *b = NULL;
    if (cipher < 0) {
        uint8_t preamble[LB_PREAMBLE_BYTES] = {0};
        if (lb_tcp_connect("127.0.0.1", ntohs(sa.sin_port), 5000, -1, &t, &err) < 0 ||
            lb_write_all(t->ops->fd(t), preamble, sizeof(preamble), &err) < 0)
            die("connect", &err);
    } else if (lb_bulk_connect("127.0.0.1", ntohs(sa.sin_port), &k, 0, 5000, -1, &b, &err) < 0) {
        die("connect", &err);
    }
    char ready;
    if (read(go[0], &ready, 1) != 1)
        die("receiver", NULL);
    double before = cpu_s(RUSAGE_SELF);
    uint64_t start_ns = lb_now_ns();
    if (cipher < 0)
        raw_send(t->ops->fd(t), src);
    else
        send_memory(b, src, level);
    if (read(go[0], child_cpu, sizeof(child_cpu)) != sizeof(child_cpu))
        die("receiver", NULL);
    double s = (double)(lb_now_ns() - start_ns) / 1e9;
    struct figures f = {(double)g_bytes / 1e6 / s, cpu_s(RUSAGE_SELF) - before, child_cpu[0]};
    waitpid(pid, NULL, 0);
    if (cipher >= 0 && memcmp(src, dst, g_bytes) != 0)
        die("the memory differs", NULL);
    if (t)
        t->ops->close(t);
    lb_bulk_close(b);
    close(listener);
    close(go[0]);
    close(go[1]);
    return f;
}

static double cipher_alone(enum lb_cipher c, bool seal, uint8_t *mem)
{
    static uint8_t buf[256 << 10], key[32], tag[LB_TAG_BYTES];
    struct lb_aead a;
    uint64_t start_ns = lb_now_ns();
    pin(0);
    if (lb_aead_init(&a, c, key, seal, NULL) < 0)
        die("cipher", NULL);
    for (size_t at = 0; at < g_bytes; at += LB_REC_MAX_PAYLOAD) {
        size_t end = LB_MIN(g_bytes, at + LB_REC_MAX_PAYLOAD);
        lb_aead_begin(&a, NULL);
        size_t step = LB_MIN((size_t)g_run_pages * PAGE, sizeof(buf));
        for (size_t p = at; p < end; p += step) {
            size_t n = LB_MIN(step, end - p);
            if (lb_aead_update(&a, seal ? mem + p : buf, n, seal ? buf : mem + p, NULL) < 0)
                die("cipher", NULL);
        }
        int rc = lb_aead_finish(&a, tag, NULL);
        if (seal && rc < 0)
            die("cipher", NULL);
    }
    lb_aead_wipe(&a);
    return (double)g_bytes / 1e6 / ((double)(lb_now_ns() - start_ns) / 1e9);
}

static void print(const char *name, struct figures f)
{
    /* the last figure does not depend on what else the machine does */
    printf("  \"%s\": {\"mb_s\": %.0f, \"tx_cpu_s\": %.3f, \"rx_cpu_s\": %.3f, "
           "\"mb_per_cpu_s\": %.0f},\n",
           name, f.mb_s, f.tx_cpu_s, f.rx_cpu_s,
           (double)g_bytes / 1e6 / LB_MAX(f.tx_cpu_s, f.rx_cpu_s));
}

int main(int argc, char **argv)
{
    g_bytes = (size_t)(argc > 1 ? atoi(argv[1]) : 512) << 20;
    g_run_pages = argc > 2 ? (unsigned)atoi(argv[2]) : 256;
    if (g_bytes == 0 || g_run_pages == 0 || g_run_pages > LB_REC_MAX_PAGES) {
        fprintf(stderr, "usage: bench_bulk [MIB] [RUN_PAGES 1..256]\n");
        return 2;
    }
    static const enum lb_cipher all[] = {LB_CIPHER_NONE, LB_CIPHER_AES256GCM,
                                         LB_CIPHER_CHACHA20POLY1305};
    uint8_t *src = memory(1), *dst = memory(2);
    char name[64];
    if (lb_crypto_init(NULL) < 0)
        return 1;
    printf("{\n  \"mib\": %zu, \"run_pages\": %u,\n", g_bytes >> 20, g_run_pages);
    for (int same = 0; same < 2; same++) {
        snprintf(name, sizeof(name), "tcp raw%s", same ? " one core" : "");
        print(name, transfer(-1, 0, src, dst, same));
        for (size_t i = 0; i < LB_ARRAY_LEN(all); i++) {
            snprintf(name, sizeof(name), "bulk %s%s", lb_cipher_name(all[i]), same ? " one core" : "");
            print(name, transfer((int)all[i], 0, src, dst, same));
        }
    }
    for (size_t i = 0; i < LB_ARRAY_LEN(all); i++)
        printf("  \"cipher %s\": {\"seal_mb_s\": %.0f, \"open_mb_s\": %.0f},\n",
               lb_cipher_name(all[i]), cipher_alone(all[i], true, src),
               cipher_alone(all[i], false, dst));
    uint64_t start_ns = lb_now_ns();
    memset(dst, 0, g_bytes);
    uint64_t zero = 0, set_ns = lb_now_ns();
    for (size_t p = 0; p < g_bytes; p += PAGE)
        zero += lb_is_zero(dst + p, PAGE);
    printf("  \"memset_mb_s\": %.0f, \"is_zero_mb_s\": %.0f, \"zero_pages\": %llu\n}\n",
           (double)g_bytes / 1e6 / ((double)(set_ns - start_ns) / 1e9),
           (double)g_bytes / 1e6 / ((double)(lb_now_ns() - set_ns) / 1e9),
           (unsigned long long)zero);
    return 0;
}
