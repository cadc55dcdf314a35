/* Epochs from capture to apply: whatever a guest does, the standby is what the primary was. */
#include "netproto/netproto_internal.h"
#include "remus/stage_internal.h"

#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>
#include <sys/mman.h>
/* after the headers above */
#include <cmocka.h>

#define PAGE LB_PAGE_SIZE
#define RAM_PAGES 3000u  /* block 0: mapped on both sides */
#define VRAM_PAGES 1300u /* block 2: by lb_hv_read and lb_hv_write; block 1 is ROM */
#define DISK_BYTES ((size_t)3 << 20)
#define N_DISKS 2u

static uint64_t g_rng;

static uint64_t rnd(uint64_t below)
{
    g_rng = g_rng * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (g_rng >> 33) % below;
}

static void fill_random(uint8_t *p, size_t len)
{
    for (size_t i = 0; i < len; i += 4) {
        uint32_t v = (uint32_t)rnd(UINT32_MAX);
        memcpy(p + i, &v, LB_MIN(len - i, sizeof(v)));
    }
}

/* cmocka's own comparison looks at one octet at a time. */
#define assert_same(a, b, len) assert_int_equal(memcmp(a, b, len), 0)

static uint8_t *pages_new(size_t n)
{
    uint8_t *p = mmap(NULL, n * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_ptr_not_equal(p, MAP_FAILED);
    return p;
}

/* ------------------------------------------------- a machine made of plain memory */

struct lb_hv_vm {
    struct lb_hv_vm_base base;
    uint8_t *ram, *vram;
    unsigned reads_left; /* before one fails; 0: never */
};

static int mem_read(struct lb_hv_vm *vm, const struct lb_ram_block *blk, uint64_t first,
                    uint64_t n, void *buf, struct lb_error *err)
{
    assert_int_equal(blk->id, 2);
    assert_true(n > 0 && first + n <= VRAM_PAGES);
    if (vm->reads_left && --vm->reads_left == 0)
        return lb_fail(err, LB_E_HV, "cannot read");
    memcpy(buf, vm->vram + first * PAGE, n * PAGE);
    return 0;
}

static int mem_read_pages(struct lb_hv_vm *vm, const struct lb_ram_block *blk,
                          const uint32_t *pages, uint64_t n, void *buf, struct lb_error *err)
{
    for (uint64_t i = 0; i < n; i++)
        if (mem_read(vm, blk, pages[i], 1, (uint8_t *)buf + i * PAGE, err) < 0)
            return -1;
    return 0;
}

static int mem_write(struct lb_hv_vm *vm, const struct lb_ram_block *blk, uint64_t first,
                     uint64_t n, const void *buf, struct lb_error *err)
{
    (void)err;
    assert_int_equal(blk->id, 2);
    assert_true(n > 0 && first + n <= VRAM_PAGES);
    memcpy(vm->vram + first * PAGE, buf, n * PAGE);
    return 0;
}

static const struct lb_hv_ops OPS = {.name = "memory", .read = mem_read,
                                   .read_pages = mem_read_pages, .write = mem_write};

static void blocks_of(struct lb_hv_vm *vm, struct lb_ram_block out[3])
{
    memset(out, 0, 3 * sizeof(*out));
    out[0] = (struct lb_ram_block){.id = 0, .size_bytes = RAM_PAGES * PAGE, .track_bytes = PAGE,
                                   .kind = LB_RAM_MAIN, .map = vm->ram};
    out[1] = (struct lb_ram_block){.id = 1, .size_bytes = 4 * PAGE, .kind = LB_RAM_ROM};
    out[2] = (struct lb_ram_block){.id = 2, .size_bytes = VRAM_PAGES * PAGE, .track_bytes = PAGE,
                                   .kind = LB_RAM_DEVICE};
}

static struct lb_hv_vm vm_new(void)
{
    return (struct lb_hv_vm){.base.ops = &OPS, .ram = pages_new(RAM_PAGES),
                             .vram = pages_new(VRAM_PAGES)};
}

static void vm_free(struct lb_hv_vm *vm)
{
    munmap(vm->ram, RAM_PAGES * PAGE);
    munmap(vm->vram, VRAM_PAGES * PAGE);
}

/* ------------------------------------------------ disks made of plain memory */

struct lb_disk_target {
    uint8_t image[DISK_BYTES];
    unsigned applied, flushes, unflushed, fail_after; /* 0: never */
};

static void disk_write(uint8_t *image, const struct lb_disk_op *op)
{
    assert_true(op->offset + op->len <= DISK_BYTES);
    if (op->kind == LB_DISK_WRITE)
        memcpy(image + op->offset, op->data, op->len);
    else
        memset(image + op->offset, 0, op->len);
}

int lb_disk_target_apply(struct lb_disk_target *t, const struct lb_disk_op *op,
                         struct lb_error *err)
{
    if (t->fail_after && --t->fail_after == 0)
        return lb_fail(err, LB_E_NO_SPACE, "disk full");
    disk_write(t->image, op);
    t->applied++;
    t->unflushed++;
    return 0;
}

int lb_disk_target_flush(struct lb_disk_target *t, struct lb_error *err)
{
    (void)err;
    t->flushes++;
    t->unflushed = 0;
    return 0;
}

void lb_disk_ops_free(struct lb_disk_ops *o)
{
    for (unsigned i = 0; i < o->n; i++)
        free((void *)(uintptr_t)o->v[i].data);
    free(o->v);
    *o = (struct lb_disk_ops){0};
}

static void ops_add(struct lb_disk_ops *o, uint32_t disk, uint64_t offset, uint64_t len, int what)
{
    struct lb_disk_op op = {.disk = disk, .kind = what ? LB_DISK_WRITE : LB_DISK_ZERO,
                            .offset = offset, .len = len};
    if (what) {
        uint8_t *data = malloc(len);
        assert_non_null(data);
        memset(data, what == 1 ? 0 : (int)rnd(255) + 1, len);
        if (what == 3)
            fill_random(data, LB_MIN(len, (uint64_t)20000));
        op.data = data;
        o->bytes += len;
    }
    o->v = lb_realloc(o->v, (o->n + 1) * sizeof(*o->v));
    o->v[o->n++] = op;
}

/* --------------------------------------- a connection that can be held up on its way */

struct hose {
    struct lb_transport base;
    struct lb_transport *inner;
    bool hold, copy; /* keep what comes; keep it and let it pass */
    uint8_t *buf;
    size_t len;
};

static int hose_writev(struct lb_transport *t, const struct iovec *iov, unsigned n, uint64_t d,
                       struct lb_error *err)
{
    struct hose *h = (struct hose *)t;
    for (unsigned i = 0; (h->hold || h->copy) && i < n; i++) {
        h->buf = lb_realloc(h->buf, h->len + iov[i].iov_len);
        memcpy(h->buf + h->len, iov[i].iov_base, iov[i].iov_len);
        h->len += iov[i].iov_len;
    }
    return h->hold ? 0 : h->inner->ops->writev(h->inner, iov, n, d, err);
}
static ssize_t hose_read_some(struct lb_transport *t, void *b, size_t l, uint64_t d,
                              struct lb_error *err)
{
    struct hose *h = (struct hose *)t;
    return h->inner->ops->read_some(h->inner, b, l, d, err);
}
static void hose_abort(struct lb_transport *t)
{
    struct hose *h = (struct hose *)t;
    h->inner->ops->abort(h->inner);
}
static int hose_fd(struct lb_transport *t)
{
    struct hose *h = (struct hose *)t;
    return h->inner->ops->fd(h->inner);
}
static void hose_close(struct lb_transport *t)
{
    struct hose *h = (struct hose *)t;
    h->inner->ops->close(h->inner);
}
static const struct lb_transport_ops HOSE_OPS = {"hose", hose_writev, hose_read_some, hose_abort,
                                                 hose_fd, hose_close};

static void hose_pass(struct hose *h, size_t from, size_t n)
{
    struct iovec iov = {h->buf + from, n};
    assert_int_equal(h->inner->ops->writev(h->inner, &iov, 1, 0, NULL), 0);
}

/* ------------------------------------------------------------- both sides together */

struct opening {
    struct lb_transport *t;
    struct lb_bulk_keys keys;
    struct lb_bulk *b;
};

static void *respond(void *arg)
{
    struct opening *o = arg;
    assert_int_equal(lb_bulk_open(o->t, false, &o->keys, 3, 5000, &o->b, NULL), 0);
    return NULL;
}

struct pair {
    struct lb_hv_vm primary, standby;
    struct lb_ram_block blocks[3], far[3];
    struct lb_bulk *tx, *rx;
    struct hose hose;
    struct lb_encoder *enc;
    struct lb_collector *col;
    struct lb_epoch epoch;
    struct lb_bitmap dirty[3];
    struct lb_disk_target *disks[N_DISKS];
    uint8_t *disk_model[N_DISKS];
    uint8_t *state;
    size_t state_len;
};

static void connect_pair(struct pair *p, enum lb_cipher cipher)
{
    struct opening r = {.keys.cipher = cipher};
    pthread_t th;

    memset(r.keys.session_id, 7, sizeof(r.keys.session_id));
    free(p->hose.buf);
    p->hose = (struct hose){.base.ops = &HOSE_OPS};
    assert_int_equal(lb_memory_pair(&p->hose.inner, &r.t, NULL), 0);
    assert_int_equal(pthread_create(&th, NULL, respond, &r), 0);
    assert_int_equal(lb_bulk_open(&p->hose.base, true, &r.keys, 3, 5000, &p->tx, NULL), 0);
    pthread_join(th, NULL);
    p->rx = r.b;
}

static void collector_new(struct pair *p)
{
    const struct lb_ram_block *map[] = {&p->far[0], &p->far[1], &p->far[2]};
    assert_int_equal(lb_collector_new(&p->standby, map, 3, p->disks, N_DISKS, &p->col, NULL), 0);
}

static void pair_open(struct pair *p, uint64_t cache_bytes, enum lb_cipher cipher)
{
    g_rng = 20260101;
    memset(p, 0, sizeof(*p));
    p->primary = vm_new();
    p->standby = vm_new();
    blocks_of(&p->primary, p->blocks);
    blocks_of(&p->standby, p->far);
    for (unsigned i = 0; i < 3; i++)
        lb_bitmap_init(&p->dirty[i], p->blocks[i].size_bytes / PAGE, NULL);
    for (unsigned i = 0; i < N_DISKS; i++) {
        p->disks[i] = calloc(1, sizeof(*p->disks[i]));
        p->disk_model[i] = calloc(1, DISK_BYTES);
    }
    p->state_len = 50001;
    p->state = calloc(1, 3 << 20);
    fill_random(p->state, 20000);
    connect_pair(p, cipher);
    assert_int_equal(lb_encoder_new(p->blocks, 3, cache_bytes, &p->enc, NULL), 0);
    collector_new(p);
    lb_epoch_init(&p->epoch);
}

static void pair_close(struct pair *p)
{
    lb_epoch_free(&p->epoch);
    lb_encoder_free(p->enc);
    lb_collector_free(p->col);
    lb_bulk_close(p->tx);
    lb_bulk_close(p->rx);
    free(p->hose.buf);
    for (unsigned i = 0; i < 3; i++)
        lb_bitmap_free(&p->dirty[i]);
    for (unsigned i = 0; i < N_DISKS; i++) {
        free(p->disks[i]);
        free(p->disk_model[i]);
    }
    free(p->state);
    vm_free(&p->primary);
    vm_free(&p->standby);
}

static uint8_t *page_of(struct lb_hv_vm *vm, unsigned block, uint64_t page)
{
    return (block ? vm->vram : vm->ram) + page * PAGE;
}

/* All that the initiator sends stays in the hose, from its greeting on; the responder's part is in
 * DIR/r2i. Nothing arrives. */
static void pair_open_recorded(struct pair *p, const char *dir)
{
    struct opening r = {.keys.cipher = LB_CIPHER_NONE};
    struct hose back = {.base.ops = &HOSE_OPS, .copy = true};
    pthread_t th;
    char path[64];
    FILE *f;

    pair_open(p, UINT64_C(1) << 30, LB_CIPHER_NONE);
    lb_bulk_close(p->tx);
    lb_bulk_close(p->rx);
    memset(r.keys.session_id, 7, sizeof(r.keys.session_id));
    p->hose = (struct hose){.base.ops = &HOSE_OPS, .copy = true};
    assert_int_equal(lb_memory_pair(&p->hose.inner, &back.inner, NULL), 0);
    r.t = &back.base;
    assert_int_equal(pthread_create(&th, NULL, respond, &r), 0);
    assert_int_equal(lb_bulk_open(&p->hose.base, true, &r.keys, 3, 5000, &p->tx, NULL), 0);
    pthread_join(th, NULL);
    lb_bulk_close(r.b);
    p->rx = NULL;
    p->hose.copy = false;
    p->hose.hold = true;
    snprintf(path, sizeof(path), "%s/r2i", dir);
    assert_non_null(f = fopen(path, "w"));
    assert_int_equal(fwrite(back.buf, 1, back.len, f), back.len);
    assert_int_equal(fclose(f), 0);
    free(back.buf);
}

static void guest_writes(struct pair *p, unsigned block, uint64_t page, unsigned how)
{
    uint8_t *q = page_of(&p->primary, block, page);

    lb_bitmap_set(&p->dirty[block], page);
    switch (how % 8) {
    case 0:
        fill_random(q, PAGE);
        break;
    case 1:
        memset(q, 0, PAGE);
        break;
    case 2: /* written, but with what it held */
        break;
    case 3:
        memset(q, 'a' + (int)rnd(26), PAGE);
        break;
    case 4: /* half of it */
        fill_random(q + rnd(2) * PAGE / 2, PAGE / 2);
        break;
    default:
        for (uint64_t n = rnd(12) + 1; n > 0; n--)
            q[rnd(PAGE)] = (uint8_t)rnd(256);
    }
}

/* The guest's work between two stops; hot pages are written more often. */
static void guest_works(struct pair *p, unsigned n_writes)
{
    while (n_writes > 0) {
        unsigned block = rnd(8) ? 0 : 2;
        uint64_t n_pages = block ? VRAM_PAGES : RAM_PAGES;
        uint64_t first = rnd(4) ? rnd(n_pages / 16) : rnd(n_pages), run = rnd(6) ? 1 : rnd(300) + 1;
        unsigned how = (unsigned)rnd(8);
        for (uint64_t i = first; i < first + run && i < n_pages && n_writes > 0; i++, n_writes--)
            guest_writes(p, block, i, how);
    }
    for (uint64_t n = rnd(20); n > 0; n--)
        p->state[rnd(p->state_len)] ^= (uint8_t)rnd(256);
    if (rnd(10) == 0)
        p->state_len = 50000 + rnd(rnd(10) ? 50000 : 2600000);
}

static void capture(struct pair *p, uint64_t number)
{
    struct lb_epoch *e = &p->epoch;

    lb_epoch_reset(e);
    e->number = number;
    for (unsigned i = 0; i < 3; i++) {
        assert_int_equal(lb_epoch_capture(e, &p->primary, &p->blocks[i], &p->dirty[i], NULL), 0);
        lb_bitmap_clear_all(&p->dirty[i]);
    }
    e->state = malloc(p->state_len);
    e->state_len = p->state_len;
    memcpy(e->state, p->state, p->state_len);
}

static void add_disk_and_frames(struct pair *p)
{
    struct lb_epoch *e = &p->epoch;

    for (uint64_t n = rnd(5); n > 0; n--) {
        uint64_t len = (rnd(20) ? rnd(64) + 1 : rnd(2048) + 1) * 512;
        ops_add(&e->disk, (uint32_t)rnd(N_DISKS), rnd((DISK_BYTES - len) / 512) * 512, len,
                (int)rnd(4));
    }
    for (unsigned i = 0; i < e->disk.n; i++)
        disk_write(p->disk_model[e->disk.v[i].disk], &e->disk.v[i]);
    if (rnd(3)) {
        e->frames_len = rnd(50) ? rnd(5000) + 1 : 1200000;
        e->frames = calloc(1, e->frames_len);
        fill_random(e->frames, LB_MIN(e->frames_len, (size_t)3000));
    }
}

static int receive(struct pair *p, struct lb_error *err)
{
    uint64_t number = 0;
    int rc = lb_collector_recv(p->col, p->rx, lb_now_ns() + 2000000000, &number, err);
    if (rc == 1)
        assert_int_equal(number, p->epoch.number);
    return rc;
}

static void check_memory(struct pair *p)
{
    assert_same(p->primary.ram, p->standby.ram, RAM_PAGES * PAGE);
    assert_same(p->primary.vram, p->standby.vram, VRAM_PAGES * PAGE);
}

static void check_rest(struct pair *p)
{
    const void *state, *frames;
    size_t len, frames_len;

    lb_collector_state(p->col, &state, &len, &frames, &frames_len);
    assert_int_equal(len, p->epoch.state_len);
    assert_same(state, p->epoch.state, len);
    assert_int_equal(frames_len, p->epoch.frames_len);
    if (frames_len > 0)
        assert_same(frames, p->epoch.frames, frames_len);
    for (unsigned i = 0; i < N_DISKS; i++) {
        assert_same(p->disks[i]->image, p->disk_model[i], DISK_BYTES);
        assert_int_equal(p->disks[i]->unflushed, 0);
    }
    assert_int_equal(lb_collector_bytes(p->col), 0);
}

/* One whole epoch of random work. */
static void run_epoch(struct pair *p, uint64_t number, unsigned n_writes)
{
    struct lb_error err = LB_ERROR_INIT;

    guest_works(p, n_writes);
    capture(p, number);
    add_disk_and_frames(p);
    if (lb_encoder_send(p->enc, p->tx, &p->epoch, &err) < 0 || receive(p, &err) != 1 ||
        lb_collector_apply(p->col, &err) < 0)
        fail_msg("epoch %llu: %s", (unsigned long long)number, err.message);
}

/* ---------------------------------------------------------------------------- tests */

static uint64_t pages_of(const struct lb_encoder_stats *s)
{
    return s->delta_pages + s->zero_pages + s->zstd_pages + s->raw_pages + s->same_pages;
}

static void random_guests(void **state)
{
    (void)state;
    static const uint64_t caches[] = {0, 16 * PAGE, 200 * PAGE, UINT64_C(1) << 40};
    uint64_t wire[LB_ARRAY_LEN(caches)];

    for (unsigned c = 0; c < LB_ARRAY_LEN(caches); c++) {
        struct pair p;
        struct lb_encoder_stats s;
        uint64_t captured = 0;
        pair_open(&p, caches[c], c == 1 ? LB_CIPHER_AES256GCM : LB_CIPHER_NONE);
        for (uint64_t n = 1; n <= 150; n++) {
            run_epoch(&p, n, (unsigned)(n % 50 ? rnd(120) : 3000));
            captured += p.epoch.n_pages;
            check_memory(&p);
            check_rest(&p);
        }
        lb_encoder_get_stats(p.enc, &s);
        assert_int_equal(pages_of(&s), captured);
        assert_true(s.zero_pages && s.zstd_pages && s.raw_pages);
        assert_true(s.cache_bytes <= caches[c]);
        assert_true(caches[c] ? s.cache_bytes >= 16 * PAGE && s.delta_pages && s.same_pages
                              : !s.delta_pages && !s.same_pages);
        wire[c] = s.wire_bytes;
        assert_true(s.wire_bytes < s.raw_bytes);
        pair_close(&p);
    }
    assert_true(wire[3] < wire[2] && wire[2] < wire[0]);
}

/* Thousands of small ones: memory of the collector and the buffers stays what it was. */
static void many_epochs(void **state)
{
    (void)state;
    struct pair p;

    pair_open(&p, 64 * PAGE, LB_CIPHER_NONE);
    for (uint64_t n = 1; n <= 2000; n++) {
        run_epoch(&p, n, (unsigned)rnd(8));
        if (n % 500 == 0) {
            check_memory(&p);
            check_rest(&p);
        }
    }
    assert_true(p.epoch.pages_cap <= 1024);
    pair_close(&p);
}

static void first_copy_of_disks(void **state)
{
    (void)state;
    struct pair p;
    struct lb_disk_ops ops = {0};
    struct lb_error err = LB_ERROR_INIT;
    uint64_t number;

    pair_open(&p, 0, LB_CIPHER_NONE);
    ops_add(&ops, 0, 0, 100 * 512, 2);
    ops_add(&ops, 1, 512, LB_DISK_OP_MAX, 3); /* more than a record holds */
    ops_add(&ops, 1, 1024, 512, 1);
    ops_add(&ops, 0, 10 * 512, DISK_BYTES - 20 * 512, 0);
    for (unsigned i = 0; i < ops.n; i++) {
        disk_write(p.disk_model[ops.v[i].disk], &ops.v[i]);
        assert_int_equal(lb_encoder_send_disk(p.enc, p.tx, &ops.v[i], &err), 0);
    }
    assert_int_equal(lb_bulk_flush(p.tx, &err), 0);
    assert_int_equal(lb_collector_recv(p.col, p.rx, lb_now_ns() + 20000000, &number, &err), 0);
    for (unsigned i = 0; i < N_DISKS; i++)
        assert_same(p.disks[i]->image, p.disk_model[i], DISK_BYTES);
    assert_int_equal(p.disks[1]->applied, 3);
    assert_int_equal(p.disks[0]->flushes + p.disks[1]->flushes, 0);
    run_epoch(&p, 1, 10); /* durable with the first epoch */
    check_rest(&p);
    lb_disk_ops_free(&ops);
    pair_close(&p);
}

/* The deadline passes at every octet of an epoch: nothing is lost, nothing is early. */
static void deadlines_lose_nothing(void **state)
{
    (void)state;
    struct pair p;
    struct lb_error err = LB_ERROR_INIT;
    uint64_t number;

    pair_open(&p, UINT64_C(1) << 30, LB_CIPHER_AES256GCM);
    p.state_len = 700;
    run_epoch(&p, 1, 500);
    guest_writes(&p, 0, 5, 5);
    guest_writes(&p, 0, 9, 5);
    guest_writes(&p, 0, 2900, 0);
    guest_writes(&p, 2, 200, 1);
    p.state_len = 700;
    capture(&p, 2);
    ops_add(&p.epoch.disk, 1, 512, 512, 3);
    disk_write(p.disk_model[1], &p.epoch.disk.v[0]);
    p.hose.hold = true;
    assert_int_equal(lb_encoder_send(p.enc, p.tx, &p.epoch, &err), 0);
    assert_true(p.hose.len > PAGE && p.hose.len < 2 * PAGE);
    for (size_t i = 0; i < p.hose.len; i++) {
        assert_int_equal(lb_collector_recv(p.col, p.rx, lb_now_ns() + 20000, &number, &err), 0);
        assert_int_equal(p.disks[1]->unflushed, 0);
        hose_pass(&p.hose, i, 1);
    }
    assert_int_equal(receive(&p, &err), 1);
    assert_int_equal(lb_collector_apply(p.col, &err), 0);
    check_memory(&p);
    check_rest(&p);
    pair_close(&p);
}

/* ------------------------------------------------------- the independent reader */

static int run_reader(const char *dir, const uint8_t *i2r, size_t len, char *out, size_t out_size)
{
    char cmd[512], path[64];
    FILE *f;

    snprintf(path, sizeof(path), "%s/i2r", dir);
    assert_non_null(f = fopen(path, "w"));
    assert_int_equal(fwrite(i2r, 1, len, f), len);
    assert_int_equal(fclose(f), 0);
    snprintf(cmd, sizeof(cmd),
             "/usr/bin/python3 tests/reader/stream_reader.py --checkpoint --secret %064d "
             "--session %s %s/i2r %s/r2i 2>&1", 0, "07070707070707070707070707070707", dir, dir);
    assert_non_null(f = popen(cmd, "r"));
    out[fread(out, 1, out_size - 1, f)] = 0;
    return pclose(f);
}

/* A whole protection goes to tests/reader/stream_reader.py (run from the top of the tree). It must
 * find what was sent, and refuse the end of an epoch that is missing, or damage. */
static void independent_reader(void **state)
{
    (void)state;
    struct pair p;
    struct lb_encoder_stats st;
    struct lb_disk_op op = {.disk = 1, .kind = LB_DISK_ZERO, .offset = 4096, .len = 1 << 20};
    char dir[] = "/tmp/lb-epochs-XXXXXX", out[4096], want[64];

    assert_non_null(mkdtemp(dir));
    pair_open_recorded(&p, dir);
    assert_int_equal(lb_encoder_send_disk(p.enc, p.tx, &op, NULL), 0);
    for (uint64_t n = 1; n <= 20; n++) {
        guest_works(&p, 60);
        capture(&p, n);
        add_disk_and_frames(&p);
        assert_int_equal(lb_encoder_send(p.enc, p.tx, &p.epoch, NULL), 0);
    }
    lb_encoder_get_stats(p.enc, &st);
    assert_true(st.delta_pages > 0 && st.zero_pages > 0);
    assert_int_equal(run_reader(dir, p.hose.buf, p.hose.len, out, sizeof(out)), 0);
    assert_non_null(strstr(out, "20 epochs"));
    assert_non_null(strstr(out, "EPOCH_END: 20 records, 0 pages, 160 payload"));
    snprintf(want, sizeof(want), ", %llu pages", (unsigned long long)st.delta_pages);
    assert_non_null(strstr(strstr(out, "DELTA: "), want));
    assert_non_null(strstr(out, "FRAMES: "));
    assert_non_null(strstr(out, "DISK: "));
    for (size_t place = 113; place < p.hose.len; place += p.hose.len / 7) {
        p.hose.buf[place] ^= 16;
        assert_int_not_equal(run_reader(dir, p.hose.buf, p.hose.len, out, sizeof(out)), 0);
        assert_non_null(strstr(out, "not valid: "));
        p.hose.buf[place] ^= 16;
    }
    assert_int_not_equal(run_reader(dir, p.hose.buf, p.hose.len - 72, out, sizeof(out)), 0);
    assert_non_null(strstr(out, "not valid: "));
    assert_int_equal(lb_remove_tree(dir, NULL), 0);
    pair_close(&p);
}

/* ------------------------------------------------------------- damage on the way */

/* A first epoch is applied, a second one is held up in the hose: differences, a plain page, zeros, a disk
 * operation, frames, device state. */
static void hold_epoch(struct pair *p, enum lb_cipher cipher)
{
    pair_open(p, UINT64_C(1) << 30, cipher);
    p->state_len = 300;
    for (unsigned i = 0; i < 4; i++)
        guest_writes(p, 0, i * 2, 3);
    capture(p, 1);
    assert_int_equal(lb_encoder_send(p->enc, p->tx, &p->epoch, NULL), 0);
    assert_int_equal(receive(p, NULL), 1);
    assert_int_equal(lb_collector_apply(p->col, NULL), 0);
    guest_writes(p, 0, 2, 5);
    guest_writes(p, 0, 6, 5);
    guest_writes(p, 0, 50, 3);
    guest_writes(p, 2, 7, 1);
    p->state[5] ^= 9;
    capture(p, 2);
    ops_add(&p->epoch.disk, 1, 512, 512, 3);
    p->epoch.frames = lb_strdup("frames");
    p->epoch.frames_len = 6;
    p->hose.hold = true;
    assert_int_equal(lb_encoder_send(p->enc, p->tx, &p->epoch, NULL), 0);
    p->hose.hold = false;
}

/* The epoch cannot be had; the one before is as it was and stays. */
static void expect_refused(struct pair *p, enum lb_errcode code, const char *what)
{
    static uint8_t before[64 * PAGE]; /* where the epochs of this test write */
    struct lb_error err = LB_ERROR_INIT;
    const void *state, *frames;
    size_t len, frames_len;

    memcpy(before, p->standby.ram, sizeof(before));
    lb_bulk_close(p->tx); /* the end */
    p->tx = NULL;
    if (receive(p, &err) != -1 || err.code != code || !err.message[0])
        fail_msg("%s: code %d: %s", what, (int)err.code, err.message);
    lb_collector_discard(p->col);
    assert_int_equal(lb_collector_bytes(p->col), 0);
    assert_same(before, p->standby.ram, sizeof(before));
    assert_int_equal(p->disks[1]->applied, 0);
    lb_collector_state(p->col, &state, &len, &frames, &frames_len);
    assert_int_equal(len, 300);
    assert_int_equal(frames_len, 0);
    p->state[5] ^= 9;
    assert_same(state, p->state, len);
    assert_int_equal(receive(p, &err), -1); /* and for good */
}

static void damaged_epochs(void **state)
{
    (void)state;
    struct pair p;
    size_t len = 1;

    for (size_t i = 0; i < len; i++) /* cut off at every octet */
        for (unsigned flip = 0; flip < 2; flip++) {
            hold_epoch(&p, i % 2 ? LB_CIPHER_NONE : LB_CIPHER_AES256GCM);
            len = p.hose.len;
            if (flip)
                p.hose.buf[i] ^= (uint8_t)(1u << i % 8);
            hose_pass(&p.hose, 0, flip ? len : i);
            expect_refused(&p, flip ? LB_E_AUTH : LB_E_NET, flip ? "flipped" : "cut off");
            pair_close(&p);
        }
    assert_true(len > 500 && len < 3000);
}

/* --------------------------------------------- a primary that says impossible things */

enum lie {
    FINE, /* the same way, but nothing wrong: it is the lies that are refused */
    OTHER_EPOCH, OTHER_NUMBER, SKIPPED_EPOCH, TWICE_PLAIN, TWICE_ZERO, NO_STATE, UNKNOWN_DISK,
    OP_KIND, OP_RESERVED, OP_SHORT, OP_EMPTY, OP_WRAPS, OP_BEHIND, ROM_PAGE, UNKNOWN_BLOCK,
    WRONG_BASE, STATE_TOO_LONG, FIRST_COPY_LATE, ENDS, N_LIES
};

static void send_lies(struct pair *p, enum lie lie)
{
    struct lb_bulk *b = p->tx;
    uint32_t round = lie == OTHER_EPOCH ? 3 : 2;
    uint64_t number = lie == OTHER_NUMBER ? 1 : lie == SKIPPED_EPOCH ? 3 : 2;
    struct lb_page_run run = {20, 2};
    static uint8_t buf[2 * PAGE];
    uint8_t op[LB_STAGE_OP_BYTES + 512] = {0};
    struct lb_disk_op good = {.kind = LB_DISK_WRITE, .offset = 512, .len = 512};
    struct iovec pages = {buf, sizeof(buf)}, st = {buf, 300}, n = {&number, 8},
                 ops = {op, sizeof(op)};

    memset(buf, 0, sizeof(buf));
    buf[0] = 1;
    lb_bulk_set_checkpoint(b);
    uint32_t block = lie == ROM_PAGE ? 1 : lie == UNKNOWN_BLOCK ? 3 : 0;
    lb_bulk_send_pages(b, round, block, &run, &pages, 1, 0, NULL);
    run = (struct lb_page_run){lie == TWICE_PLAIN ? 21 : 30, 1};
    pages.iov_len = PAGE;
    lb_bulk_send_pages(b, round, 0, &run, &pages, 1, 0, NULL);
    run = (struct lb_page_run){lie == TWICE_ZERO ? 15 : 40, 6};
    lb_bulk_send_zero(b, round, 0, &run, 1, NULL);
    run = (struct lb_page_run){lie == WRONG_BASE ? 2 : 0, 1}; /* page 0 is as the primary has it */
    memset(buf, 0, sizeof(buf));
    lb_bulk_send_delta(b, round, 0, &run, 1, buf, lb_bulk_checksum(0, p->primary.ram, 1), 1, NULL);
    lb_stage_put_op(op, &good);
    op[0] = lie == OP_KIND ? 3 : op[0];
    op[4] = lie == OP_RESERVED;
    op[17] = lie == OP_EMPTY ? 0 : lie == OP_BEHIND ? 3 : op[17];
    op[15] = lie == OP_WRAPS ? 0xff : 0;
    ops.iov_len = lie == OP_SHORT ? 23 : ops.iov_len;
    lb_bulk_send_data(b, LB_REC_DISK, lie == FIRST_COPY_LATE ? 0 : round,
                      lie == UNKNOWN_DISK ? N_DISKS : 1, &ops, 1, 0, NULL);
    if (lie == STATE_TOO_LONG)
        lb_bulk_send_state_xor(b, round, buf, 301, 1, NULL);
    else if (lie != NO_STATE)
        lb_bulk_send_data(b, LB_REC_STATE, round, 0, &st, 1, 1, NULL);
    if (lie == ENDS)
        lb_bulk_send_mark(b, LB_REC_END, 0, NULL, 0, NULL);
    else
        lb_bulk_send_data(b, LB_REC_EPOCH_END, round, 0, &n, 1, 0, NULL);
    lb_bulk_flush(b, NULL);
}

static void impossible_epochs(void **state)
{
    (void)state;
    for (enum lie lie = FINE; lie < N_LIES; lie++) {
        struct pair p;
        char what[16];
        hold_epoch(&p, LB_CIPHER_NONE);
        lb_bulk_close(p.tx); /* another connection, and a collector that has epoch 1 */
        lb_bulk_close(p.rx);
        lb_collector_free(p.col);
        lb_encoder_free(p.enc);
        connect_pair(&p, LB_CIPHER_NONE);
        collector_new(&p);
        assert_int_equal(lb_encoder_new(p.blocks, 3, 0, &p.enc, NULL), 0);
        p.state[5] ^= 9;
        memcpy(p.primary.ram, p.standby.ram, RAM_PAGES * PAGE);
        guest_writes(&p, 0, 0, 3);
        guest_writes(&p, 0, 2, 3);
        p.primary.ram[2 * PAGE] = (uint8_t)(p.primary.ram[0] + 1);
        lb_disk_ops_free(&p.epoch.disk);
        capture(&p, 1);
        assert_int_equal(lb_encoder_send(p.enc, p.tx, &p.epoch, NULL), 0);
        assert_int_equal(receive(&p, NULL), 1);
        assert_int_equal(lb_collector_apply(p.col, NULL), 0);
        send_lies(&p, lie);
        p.epoch.number = 2;
        snprintf(what, sizeof(what), "lie %d", (int)lie);
        if (lie == FINE) {
            assert_int_equal(receive(&p, NULL), 1);
            assert_int_equal(lb_collector_apply(p.col, NULL), 0);
            assert_int_equal(p.disks[1]->applied, 1);
            assert_int_equal(p.disks[1]->flushes, 1);
        } else {
            p.state[5] ^= 9;
            expect_refused(&p, lie == ENDS ? LB_E_NET : LB_E_PROTO, what);
        }
        pair_close(&p);
    }
}

static void limit_of_an_epoch(void **state)
{
    (void)state;
    for (unsigned what = 0; what < 3; what++) {
        struct pair p;
        struct lb_error err = LB_ERROR_INIT;
        pair_open(&p, 0, LB_CIPHER_NONE);
        lb_collector_set_limit(p.col, 200 * PAGE);
        p.state_len = what == 1 ? 250 * PAGE : PAGE;
        for (unsigned i = 0; i < (what ? 100 : 200); i++)
            guest_writes(&p, 0, i, 0);
        capture(&p, 1);
        if (what == 2)
            ops_add(&p.epoch.disk, 0, 0, 500 * 1024, 3);
        assert_int_equal(lb_encoder_send(p.enc, p.tx, &p.epoch, &err), 0);
        assert_int_equal(receive(&p, &err), -1);
        assert_int_equal(err.code, LB_E_NO_SPACE);
        assert_true(lb_collector_bytes(p.col) <= 200 * PAGE);
        assert_true(lb_is_zero(p.standby.ram, RAM_PAGES * PAGE));
        pair_close(&p);
    }
}

/* An epoch that is complete is not an incomplete one: what was promised can be applied. */
static void discard_keeps_the_complete(void **state)
{
    (void)state;
    struct pair p;

    pair_open(&p, 0, LB_CIPHER_NONE);
    guest_works(&p, 200);
    capture(&p, 1);
    add_disk_and_frames(&p);
    assert_int_equal(lb_encoder_send(p.enc, p.tx, &p.epoch, NULL), 0);
    assert_int_equal(receive(&p, NULL), 1);
    assert_true(lb_collector_bytes(p.col) > 0);
    lb_collector_discard(p.col);
    assert_int_equal(lb_collector_apply(p.col, NULL), 0);
    check_memory(&p);
    check_rest(&p);
    pair_close(&p);
}

static void disk_that_fails(void **state)
{
    (void)state;
    struct pair p;
    struct lb_error err = LB_ERROR_INIT;

    pair_open(&p, 0, LB_CIPHER_NONE);
    capture(&p, 1);
    for (unsigned i = 0; i < 4; i++)
        ops_add(&p.epoch.disk, 0, i * 4096, 512, 2);
    p.disks[0]->fail_after = 3;
    assert_int_equal(lb_encoder_send(p.enc, p.tx, &p.epoch, &err), 0);
    assert_int_equal(receive(&p, &err), 1);
    assert_int_equal(lb_collector_apply(p.col, &err), -1);
    assert_int_equal(err.code, LB_E_NO_SPACE);
    assert_int_equal(p.disks[0]->flushes, 0);
    pair_close(&p);
}

/* --------------------------------------------------------------- the staging buffer */

static uint64_t resident(const void *p, uint64_t n_pages)
{
    static unsigned char v[16384];
    uint64_t n = 0;

    assert_true(n_pages <= sizeof(v));
    assert_int_equal(mincore((void *)(uintptr_t)p, n_pages * PAGE, v), 0);
    for (uint64_t i = 0; i < n_pages; i++)
        n += v[i] & 1;
    return n;
}

static void buffer_is_ready_and_given_back(void **state)
{
    (void)state;
    struct lb_epoch e;
    uint64_t cap;

    lb_epoch_init(&e);
    assert_int_equal(lb_epoch_reserve(&e, 10000, NULL), 0);
    cap = e.pages_cap;
    assert_true(cap >= 10000 && cap < 11000);
    assert_int_equal(resident(e.data, cap), cap);
    for (unsigned i = 0; i < 200; i++)
        assert_int_equal(lb_epoch_reserve(&e, 100, NULL), 0);
    assert_int_equal(lb_epoch_reserve(&e, 5000, NULL), 0); /* not yet: it is needed again */
    for (unsigned i = 0; i < 200; i++)
        assert_int_equal(lb_epoch_reserve(&e, 100, NULL), 0);
    assert_int_equal(e.pages_cap, cap);
    for (unsigned i = 0; i < 3000; i++)
        assert_int_equal(lb_epoch_reserve(&e, 100, NULL), 0);
    assert_true(e.pages_cap >= 100 && e.pages_cap <= 2048);
    assert_int_equal(resident(e.data, e.pages_cap), e.pages_cap);
    struct lb_error err = LB_ERROR_INIT;
    assert_int_equal(lb_epoch_reserve(&e, UINT64_MAX / 2, &err), -1);
    assert_int_equal(err.code, LB_E_NO_SPACE);
    lb_epoch_free(&e);
    assert_null(e.data);
}

static void check_capture(struct pair *p)
{
    uint64_t k = 0;

    for (unsigned b = 0; b < 3; b += 2)
        for (uint64_t i = 0; i < p->dirty[b].n_bits; i++) {
            if (!lb_bitmap_test(&p->dirty[b], i))
                continue;
            assert_int_equal(p->epoch.pages[k].block, b);
            assert_int_equal(p->epoch.pages[k].page, i);
            assert_same(p->epoch.data + k * PAGE, page_of(&p->primary, b, i), PAGE);
            k++;
        }
    assert_int_equal(p->epoch.n_pages, k);
}

/* With room and without, with one thread and with two, with runs of every length. */
static void captures(void **state)
{
    (void)state;
    for (unsigned n = 0; n < 40; n++) {
        struct pair p;
        pair_open(&p, 0, LB_CIPHER_NONE);
        fill_random(p.primary.ram, RAM_PAGES * PAGE);
        fill_random(p.primary.vram, VRAM_PAGES * PAGE);
        if (n % 2)
            assert_int_equal(lb_epoch_reserve(&p.epoch, n * 100, NULL), 0);
        g_rng += n;
        for (unsigned b = 0; b < 3; b += 2)
            for (uint64_t i = 0; i < p.dirty[b].n_bits; i += rnd(1 + n % 4) + 1)
                if (rnd(20) < n)
                    lb_bitmap_set(&p.dirty[b], i);
        for (unsigned twice = 0; twice < 2; twice++) {
            for (unsigned b = 0; b < 3; b++)
                assert_int_equal(lb_epoch_capture(&p.epoch, &p.primary, &p.blocks[b], &p.dirty[b],
                                                  NULL), 0);
            check_capture(&p);
            lb_epoch_reset(&p.epoch);
            assert_int_equal(p.epoch.n_pages, 0);
        }
        assert_true(n % 2 == 0 || n * 100 < 512 || p.epoch.copier != NULL);
        pair_close(&p);
    }
}

static void capture_that_fails(void **state)
{
    (void)state;
    struct pair p;
    struct lb_error err = LB_ERROR_INIT;

    pair_open(&p, 0, LB_CIPHER_NONE);
    for (unsigned i = 0; i < 10; i++) {
        lb_bitmap_set(&p.dirty[0], i * 2);
        lb_bitmap_set(&p.dirty[2], i * 2);
    }
    p.primary.reads_left = 4;
    assert_int_equal(lb_epoch_capture(&p.epoch, &p.primary, &p.blocks[0], &p.dirty[0], &err), 0);
    assert_int_equal(lb_epoch_capture(&p.epoch, &p.primary, &p.blocks[2], &p.dirty[2], &err), -1);
    assert_int_equal(err.code, LB_E_HV);
    assert_int_equal(p.epoch.n_pages, 10);
    pair_close(&p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(random_guests),
        cmocka_unit_test(many_epochs),
        cmocka_unit_test(first_copy_of_disks),
        cmocka_unit_test(deadlines_lose_nothing),
        cmocka_unit_test(independent_reader),
        cmocka_unit_test(damaged_epochs),
        cmocka_unit_test(impossible_epochs),
        cmocka_unit_test(limit_of_an_epoch),
        cmocka_unit_test(discard_keeps_the_complete),
        cmocka_unit_test(disk_that_fails),
        cmocka_unit_test(buffer_is_ready_and_given_back),
        cmocka_unit_test(captures),
        cmocka_unit_test(capture_that_fails),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
