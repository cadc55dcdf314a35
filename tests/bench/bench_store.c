/* How fast is the writer of checkpoint files alone: megabytes of guest memory per second.
 *
 *      bench_store DIR [MIB] [THREADS]
 *
 * MIB of memory in three equal kinds, mixed by the page as a guest has them: zeros, text, noise. Written to a file in
 * DIR in one way after the other; beside it what a plain write(2) of the same memory costs there, with O_DIRECT and
 * without (then fsync). One JSON object on stdout. */
#include "checkpoint/store.h"

#include <errno.h>
#include <fcntl.h>
#include <sodium.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>

#define PAGE LB_PAGE_SIZE
#define RUN_PAGES 8 /* of one kind */

static uint64_t g_rng = 88172645463325252u;
static uint8_t *g_memory;
static uint64_t g_pages;

static uint64_t rnd(void)
{
    g_rng ^= g_rng << 13;
    g_rng ^= g_rng >> 7;
    return g_rng ^= g_rng << 17;
}

static void die(const char *what, const struct lb_error *err)
{
    fprintf(stderr, "bench_store: %s: %s\n", what, err ? err->message : strerror(errno));
    exit(1);
}

static void fill(uint8_t *p, unsigned kind)
{
    static const char *const words[] = {"connection", "kernel", "0x7ffe", "memory", "page", "socket", "the", "of"};
    if (kind == 1)
        for (unsigned i = 0; i < PAGE; i += 32)
            snprintf((char *)p + i, 32, "%s %s=%u %s", words[rnd() % 8], words[rnd() % 8], (unsigned)(rnd() % 65536),
                     words[rnd() % 8]);
    for (unsigned i = 0; kind == 2 && i < PAGE; i += 8) {
        uint64_t v = rnd();
        memcpy(p + i, &v, 8);
    }
}

static void make_memory(unsigned mib)
{
    g_pages = (uint64_t)mib << 8;
    g_memory = mmap(NULL, g_pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (g_memory == MAP_FAILED)
        die("memory", NULL);
    for (uint64_t i = 0; i < g_pages; i++)
        fill(g_memory + i * PAGE, i / RUN_PAGES % 3);
}

static double cpu_s(void)
{
    struct rusage r;
    getrusage(RUSAGE_SELF, &r);
    return (double)(r.ru_utime.tv_sec + r.ru_stime.tv_sec) + (double)(r.ru_utime.tv_usec + r.ru_stime.tv_usec) / 1e6;
}

struct took {
    double s, cpu;
    uint64_t bytes;
};

static void say(const char *what, const struct took *t, bool last)
{
    double mb = (double)(g_pages * PAGE) / 1e6;
    printf("  \"%s\": {\"mb_per_s\": %.0f, \"cpu_s\": %.2f, \"file_ratio\": %.3f}%s\n", what, mb / t->s, t->cpu,
           (double)t->bytes / (double)(g_pages * PAGE), last ? "" : ",");
}

static struct took raw(const char *path, int flags)
{
    const size_t step = 4 << 20;
    double cpu = cpu_s();
    uint64_t t = lb_now_ns();
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | flags, 0600);
    if (fd < 0)
        die(path, NULL);
    for (uint64_t at = 0; at < g_pages * PAGE; at += step)
        if (write(fd, g_memory + at, step) != (ssize_t)step)
            die(path, NULL);
    if (fsync(fd) < 0)
        die(path, NULL);
    close(fd);
    struct took r = {(double)(lb_now_ns() - t) / 1e9, cpu_s() - cpu, g_pages * PAGE};
    unlink(path);
    return r;
}

static void put_all(struct lb_ckpt_writer *w)
{
    struct lb_error err = LB_ERROR_INIT;
    uint32_t pages[LB_CKPT_CHUNK_PAGES];

    for (uint64_t at = 0; at < g_pages; at += LB_CKPT_CHUNK_PAGES) {
        void *buf = lb_ckpt_buffer(w, &err);
        if (!buf)
            die("buffer", &err);
        for (unsigned i = 0; i < LB_CKPT_CHUNK_PAGES; i++)
            pages[i] = (uint32_t)at + i;
        memcpy(buf, g_memory + at * PAGE, LB_CKPT_CHUNK_PAGES * PAGE);
        if (lb_ckpt_put(w, 0, pages, LB_CKPT_CHUNK_PAGES, buf, &err) < 0)
            die("put", &err);
    }
}

static struct took write_one(const struct lb_ckpt_create *c)
{
    static char *argv[] = {"/bin/false", NULL};
    struct lb_ckpt_meta m = {.vm = "bench",
                             .desc = {.name = "bench", .hypervisor = "qemu", .emulator = "/bin/false", .argv = argv,
                                      .machine = "pc", .vcpus = 1, .ram_bytes = PAGE}};
    struct lb_ckpt_writer *w;
    struct lb_error err = LB_ERROR_INIT;
    struct stat st;
    double cpu = cpu_s();
    uint64_t t = lb_now_ns();

    if (lb_ckpt_create(c, &w, &err) < 0)
        die("create", &err);
    put_all(w);
    if (lb_ckpt_commit(w, &m, "state", 5, NULL, &err) < 0)
        die("commit", &err);
    struct took r = {(double)(lb_now_ns() - t) / 1e9, cpu_s() - cpu, 0};
    if (stat(c->path, &st) < 0)
        die(c->path, NULL);
    r.bytes = (uint64_t)st.st_size;
    return r;
}

/* Every tenth page changes a little: what a second checkpoint is. */
static struct took write_increment(const struct lb_ckpt_create *full, const char *path)
{
    struct lb_ckpt_create c = *full;
    struct lb_chain *parent;
    struct lb_error err = LB_ERROR_INIT;

    if (lb_chain_open(&full->path, 1, NULL, &parent, &err) < 0)
        die("open", &err);
    for (uint64_t i = 0; i < g_pages; i += 10)
        g_memory[i * PAGE + rnd() % PAGE] ^= 1;
    c.path = path;
    c.parent = parent;
    struct took r = write_one(&c);
    lb_chain_close(parent);
    unlink(path);
    return r;
}

int main(int argc, char **argv)
{
    if (argc < 2) {
        fprintf(stderr, "usage: bench_store DIR [MIB] [THREADS]\n");
        return 2;
    }
    unsigned mib = argc > 2 ? (unsigned)atoi(argv[2]) : 768, threads = argc > 3 ? (unsigned)atoi(argv[3]) : 2;
    LB_AUTO_FREE char *path = lb_asprintf("%s/bench-store-%d.lbc", argv[1], (int)getpid());
    LB_AUTO_FREE char *next = lb_asprintf("%s/bench-store-%d-2.lbc", argv[1], (int)getpid());
    struct lb_ckpt_block block = {.name = "pc.ram", .kind = LB_RAM_MAIN};
    struct lb_error err = LB_ERROR_INIT;
    struct lb_ckpt_key *key = NULL;
    struct took t;

    make_memory(mib);
    block.n_pages = g_pages;
    if (sodium_init() < 0 || lb_ckpt_key_passphrase("bench", 5, &key, &err) < 0)
        die("key", &err);
    const struct {
        const char *name;
        int level;
        bool buffered, encrypted;
    } ways[] = {{"level 1", 1, false, false},       {"level -1", -1, false, false},
                {"level -5", -5, false, false},     {"level 3", 3, false, false},
                {"level 1 buffered", 1, true, false}, {"level 1 encrypted", 1, false, true}};

    printf("{\"mib\": %u, \"threads\": %u,\n", mib, threads);
    t = raw(path, 0);
    say("plain write", &t, false);
    t = raw(path, O_DIRECT);
    say("plain write O_DIRECT", &t, false);
    for (unsigned i = 0; i < LB_ARRAY_LEN(ways); i++) {
        struct lb_ckpt_create c = {.path = path, .blocks = &block, .n_blocks = 1, .threads = threads,
                                   .zstd_level = ways[i].level, .buffered = ways[i].buffered,
                                   .key = ways[i].encrypted ? key : NULL};
        t = write_one(&c);
        say(ways[i].name, &t, false);
        unlink(path);
    }
    struct lb_ckpt_create c = {.path = path, .blocks = &block, .n_blocks = 1, .threads = threads};
    write_one(&c);
    t = write_increment(&c, next);
    say("increment, all pages given, a tenth changed a little", &t, true);
    printf("}\n");
    unlink(path);
    lb_ckpt_key_free(key);
    return 0;
}
