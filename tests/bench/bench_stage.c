/* What does an epoch cost: microseconds per page and bytes on the wire.
 *
 *      bench_stage [EPOCHS] [PAGES]
 *
 * A guest of 1 GiB in shared memory writes PAGES pages (500: 78 MB/s at 25 ms) between two stops, in one way
 * after the other; each epoch is captured (what the pause contains), encoded and sealed, received and applied, one
 * step after the other on one thread. Sparse: what a key-value store does to a page, a counter and a
 * pointer of 8 octets here and there. One JSON object on stdout, medians over the epochs. */
#include "remus/stage.h"

#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>

#define PAGE LB_PAGE_SIZE
#define RAM_PAGES (UINT64_C(1) << 18)
#define HOT_PAGES (UINT64_C(1) << 14) /* 64 MiB are written to, so that pages come again */
#define STATE_BYTES 110000u
#define MAX_EPOCHS 1000u

enum work { SPARSE, UNCHANGED, TEXT, NOISE, ZEROES, N_WORKS };
static const char *const NAMES[N_WORKS] = {"sparse", "unchanged", "text", "random", "zero"};

struct step {
    double us[MAX_EPOCHS]; /* per epoch */
};

static uint64_t g_rng = 1;
static unsigned g_epochs = 200, g_pages = 500;

static uint64_t rnd(void)
{
    g_rng ^= g_rng << 13;
    g_rng ^= g_rng >> 7;
    return g_rng ^= g_rng << 17;
}

static void die(const char *what, const struct lb_error *err)
{
    fprintf(stderr, "bench_stage: %s: %s\n", what, err ? err->message : strerror(errno));
    exit(1);
}

/* As of a guest: a memfd, mapped a second time by us. */
static void memory(uint8_t **guest, uint8_t **ours)
{
    int fd = memfd_create("bench", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, (off_t)(RAM_PAGES * PAGE)) < 0)
        die("memory", NULL);
    for (int i = 0; i < 2; i++) {
        uint8_t *p = mmap(NULL, RAM_PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (p == MAP_FAILED || madvise(p, HOT_PAGES * PAGE, MADV_POPULATE_WRITE) < 0)
            die("memory", NULL);
        *(i ? ours : guest) = p;
    }
    close(fd);
}

static void write_page(uint8_t *p, enum work w)
{
    switch (w) {
    case SPARSE:
        for (unsigned n = 0; n < 5; n++) {
            uint64_t v = rnd();
            memcpy(p + rnd() % (PAGE / 8) * 8, &v, 8);
        }
        break;
    case UNCHANGED:
        break;
    case TEXT:
        for (unsigned i = 0; i < PAGE; i += 16)
            snprintf((char *)p + i, 16, "key:%011u", (unsigned)(rnd() % 100000));
        break;
    case NOISE:
        for (unsigned i = 0; i < PAGE; i += 8) {
            uint64_t v = rnd();
            memcpy(p + i, &v, 8);
        }
        break;
    case ZEROES:
        memset(p, 0, PAGE);
        break;
    case N_WORKS:
        break;
    }
}

struct opening {
    struct lb_transport *t;
    struct lb_bulk_keys keys;
    struct lb_bulk *b;
};

static void *respond(void *arg)
{
    struct opening *o = arg;
    struct lb_error err = LB_ERROR_INIT;
    if (lb_bulk_open(o->t, false, &o->keys, 0, 5000, &o->b, &err) < 0)
        die("connection", &err);
    return NULL;
}

static void connect_both(struct lb_bulk **tx, struct lb_bulk **rx)
{
    struct opening i = {.keys.cipher = lb_cipher_preferred()}, r = i;
    struct lb_error err = LB_ERROR_INIT;
    pthread_t th;
    memset(i.keys.session_id, 1, sizeof(i.keys.session_id));
    r.keys = i.keys;
    if (lb_memory_pair(&i.t, &r.t, &err) < 0 || pthread_create(&th, NULL, respond, &r) != 0 ||
        lb_bulk_open(i.t, true, &i.keys, 0, 5000, &i.b, &err) < 0)
        die("connection", &err);
    pthread_join(th, NULL);
    *tx = i.b;
    *rx = r.b;
}

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double at(struct step *s, unsigned percent)
{
    qsort(s->us, g_epochs, sizeof(s->us[0]), by_size);
    return s->us[(size_t)g_epochs * percent / 100];
}

static void since(struct step *s, unsigned epoch, uint64_t *start_ns)
{
    uint64_t now = lb_now_ns();
    s->us[epoch] = (double)(now - *start_ns) / 1e3;
    *start_ns = lb_now_ns();
}

struct machine {
    struct lb_ram_block primary, standby;
    uint8_t *guest;
    struct lb_bulk *tx, *rx;
    struct lb_encoder *enc;
    struct lb_collector *col;
    struct lb_epoch e;
    struct lb_bitmap dirty;
    uint8_t state[STATE_BYTES];
};

static void guest_works(struct machine *m, enum work w)
{
    lb_bitmap_clear_all(&m->dirty);
    for (unsigned i = 0; i < g_pages; i++) {
        uint64_t page = rnd() % HOT_PAGES;
        write_page(m->guest + page * PAGE, w);
        lb_bitmap_set(&m->dirty, page);
    }
    for (unsigned i = 0; i < 200; i++)
        m->state[rnd() % STATE_BYTES] = (uint8_t)rnd();
}

static void run_epoch(struct machine *m, enum work w, unsigned i, struct step s[4])
{
    struct lb_error err = LB_ERROR_INIT;
    uint64_t number = m->e.number + 1, got;

    lb_epoch_reset(&m->e);
    if (lb_epoch_reserve(&m->e, g_pages, &err) < 0)
        die("reserve", &err);
    guest_works(m, w);
    uint64_t start_ns = lb_now_ns();
    if (lb_epoch_capture(&m->e, NULL, &m->primary, &m->dirty, &err) < 0)
        die("capture", &err);
    since(&s[0], i, &start_ns);
    m->e.number = number;
    m->e.state = malloc(STATE_BYTES);
    m->e.state_len = STATE_BYTES;
    memcpy(m->e.state, m->state, STATE_BYTES);
    start_ns = lb_now_ns();
    if (lb_encoder_send(m->enc, m->tx, &m->e, &err) < 0)
        die("send", &err);
    since(&s[1], i, &start_ns);
    if (lb_collector_recv(m->col, m->rx, 0, &got, &err) < 0)
        die("receive", &err);
    since(&s[2], i, &start_ns);
    if (lb_collector_apply(m->col, &err) < 0)
        die("apply", &err);
    since(&s[3], i, &start_ns);
}

static void bench(struct machine *m, enum work w)
{
    static struct step s[4];
    struct lb_encoder_stats before, after;

    lb_encoder_get_stats(m->enc, &before);
    for (unsigned i = 0; i < g_epochs; i++)
        run_epoch(m, w, i, s);
    lb_encoder_get_stats(m->enc, &after);
    if (memcmp(m->primary.map, m->standby.map, HOT_PAGES * PAGE) != 0)
        die("the standby differs", NULL);
    double wire = (double)(after.wire_bytes - before.wire_bytes) / g_epochs;
    double raw = (double)(after.raw_bytes - before.raw_bytes) / g_epochs;
    printf("  \"%s\": {\"capture_us\": %.0f, \"capture_p99_us\": %.0f, \"encode_us\": %.0f, "
           "\"receive_us\": %.0f, \"apply_us\": %.0f,\n    \"encode_us_per_page\": %.2f, "
           "\"raw_bytes\": %.0f, \"wire_bytes\": %.0f, \"ratio\": %.4f}%s\n",
           NAMES[w], at(&s[0], 50), at(&s[0], 99), at(&s[1], 50), at(&s[2], 50), at(&s[3], 50),
           at(&s[1], 50) / g_pages, raw, wire, wire / raw, w + 1 < N_WORKS ? "," : "");
}

int main(int argc, char **argv)
{
    static struct machine m;
    struct lb_error err = LB_ERROR_INIT;
    uint8_t *ours, *far, *far_guest;

    g_epochs = argc > 1 ? (unsigned)atoi(argv[1]) : g_epochs;
    g_pages = argc > 2 ? (unsigned)atoi(argv[2]) : g_pages;
    if (g_epochs == 0 || g_epochs > MAX_EPOCHS || g_pages == 0 || g_pages > HOT_PAGES) {
        fprintf(stderr, "usage: bench_stage [EPOCHS 1..%u] [PAGES]\n", MAX_EPOCHS);
        return 2;
    }
    memory(&m.guest, &ours);
    memory(&far_guest, &far);
    m.primary = (struct lb_ram_block){.size_bytes = RAM_PAGES * PAGE, .map = ours};
    m.standby = m.primary;
    m.standby.map = far;
    const struct lb_ram_block *map = &m.standby;
    connect_both(&m.tx, &m.rx);
    lb_epoch_init(&m.e);
    if (lb_encoder_new(&m.primary, 1, RAM_PAGES * PAGE / 4, &m.enc, &err) < 0 ||
        lb_collector_new(NULL, &map, 1, NULL, 0, &m.col, &err) < 0 ||
        lb_bitmap_init(&m.dirty, RAM_PAGES, &err) < 0)
        die("memory", &err);
    printf("{\n  \"epochs\": %u, \"pages\": %u, \"cipher\": \"%s\",\n", g_epochs, g_pages,
           lb_cipher_name(lb_cipher_preferred()));
    for (int w = 0; w < N_WORKS; w++)
        bench(&m, (enum work)w);
    printf("}\n");
    lb_epoch_free(&m.e);
    lb_encoder_free(m.enc);
    lb_collector_free(m.col);
    lb_bulk_close(m.tx);
    lb_bulk_close(m.rx);
    lb_bitmap_free(&m.dirty);
    return 0;
}
