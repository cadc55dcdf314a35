/* core/fake/fake_io.c - the fake guest's network card, disk and clock.
 *
 * A frame goes to the wire at once, or, while the card is held, through a socket to the holder:
 *
 *      guest --(nic.out)--> holder keeps it --(nic.in)--> card_main --> wire
 *
 * A real hypervisor hangs when the holder does not read.  The fake counts that (blocked) and
 * has its guest wait, so that a test ends with a message and not with a deadlock.
 *
 * The callbacks of a test run under sink_lock: once a setter has returned, the old one is not
 * called any more.  Lock order: guest->lock, then sink_lock. */
#include "core/fake/fake_internal.h"

#include <assert.h>
#include <endian.h>
#include <errno.h>
#include <string.h>
#include <sys/socket.h>

#define FRAME_AT_NONCE 16 /* after two addresses and the type, aligned */
#define FRAME_AT_SEQ 24
#define DISK_STRIDE 7919  /* prime: successive writes are far apart */

static const uint8_t frame_head[14] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x52,
                                       0x54, 0x00, 0xfa, 0x4e, 0x01, 0x88, 0xb5};

static pthread_mutex_t sink_lock = PTHREAD_MUTEX_INITIALIZER;
static lb_fake_wire_fn *wire_fn; /* these four locked by sink_lock */
static void *wire_arg;
static lb_fake_mirror_fn *mirror_fn;
static void *mirror_arg;

void lb_fake_set_wire(lb_fake_wire_fn *fn, void *arg)
{
    pthread_mutex_lock(&sink_lock);
    wire_fn = fn;
    wire_arg = arg;
    pthread_mutex_unlock(&sink_lock);
}

void lb_fake_set_mirror(lb_fake_mirror_fn *fn, void *arg)
{
    pthread_mutex_lock(&sink_lock);
    mirror_fn = fn;
    mirror_arg = arg;
    pthread_mutex_unlock(&sink_lock);
}

void lb_fake_io_reset(void)
{
    lb_fake_set_wire(NULL, NULL);
    lb_fake_set_mirror(NULL, NULL);
}

/* -------------------------------------------------------------------- card */

bool lb_fake_frame_parse(const void *frame, size_t len, uint64_t *nonce, uint64_t *seq)
{
    const uint8_t *p = frame;
    uint64_t words[2];

    if (len != LB_FAKE_FRAME_BYTES || memcmp(p, frame_head, sizeof(frame_head)))
        return false;
    memcpy(words, p + FRAME_AT_NONCE, sizeof(words));
    *nonce = le64toh(words[0]);
    *seq = le64toh(words[1]);
    return true;
}

/* lock held: a dead hypervisor sends nothing */
static void to_wire(struct guest *g, const void *frame, size_t len)
{
    if (g->dead)
        return;
    pthread_mutex_lock(&sink_lock);
    if (wire_fn)
        wire_fn(g->id, frame, len, wire_arg);
    pthread_mutex_unlock(&sink_lock);
}

bool lb_fake_send_frame(struct guest *g)
{
    uint8_t buf[4 + LB_FAKE_FRAME_BYTES] = {0}, *frame = buf + 4;
    uint32_t be = htobe32(LB_FAKE_FRAME_BYTES);
    uint64_t nonce = htole64(g->nonce), seq = htole64(g->frames + 1);

    memcpy(buf, &be, sizeof(be));
    memcpy(frame, frame_head, sizeof(frame_head));
    memcpy(frame + FRAME_AT_NONCE, &nonce, sizeof(nonce));
    memcpy(frame + FRAME_AT_SEQ, &seq, sizeof(seq));
    if (!g->nic.held) {
        to_wire(g, frame, LB_FAKE_FRAME_BYTES);
    } else if (send(g->nic.out, buf, sizeof(buf), MSG_NOSIGNAL | MSG_DONTWAIT) < 0) {
        if (errno == EAGAIN) {
            g->nic.blocked++;
            return false;
        }
        g->nic.dropped++;
    }
    g->frames++;
    return true;
}

int lb_fake_send(lb_fake_id id, struct lb_error *err)
{
    struct guest *g = lb_fake_hold(id, err);
    if (!g)
        return -1;
    assert(g->config.nic);
    bool sent = lb_fake_send_frame(g);
    lb_fake_let_go(g);
    return sent ? 0 : lb_fail(err, LB_E_STATE, "fake: the holder of the card does not read");
}

/* What the holder gives back goes on its way. Ends when `in` is shut down and empty. */
static void *card_main(void *arg)
{
    struct guest *g = arg;
    uint8_t frame[65536];
    uint32_t be;

    for (;;) {
        if (lb_read_all(g->nic.in, &be, sizeof(be), NULL) < 0)
            return NULL;
        uint32_t len = be32toh(be);
        if (len > sizeof(frame) || lb_read_all(g->nic.in, frame, len, NULL) < 0)
            return NULL;
        pthread_mutex_lock(&g->lock);
        while (g->frozen && !g->dead && !g->quit)
            pthread_cond_wait(&g->wake, &g->lock);
        to_wire(g, frame, len);
        pthread_mutex_unlock(&g->lock);
    }
}

/* Not locked: the card's thread needs the lock to end. */
static void end_hold(struct guest *g)
{
    if (!g->nic.held)
        return;
    shutdown(g->nic.in, SHUT_RD); /* what is in it can still be read */
    pthread_join(g->nic.thread, NULL);
    pthread_mutex_lock(&g->lock);
    lb_cleanup_fd(&g->nic.in);
    lb_cleanup_fd(&g->nic.out);
    g->nic.in = g->nic.out = -1;
    g->nic.held = false;
    pthread_mutex_unlock(&g->lock);
}

void lb_fake_io_die(struct guest *g)
{
    if (!g->nic.held)
        return;
    shutdown(g->nic.in, SHUT_RDWR);
    shutdown(g->nic.out, SHUT_RDWR);
}

int lb_fake_plug_card(lb_fake_id id, struct lb_error *err)
{
    struct guest *g = lb_fake_hold(id, err);
    if (!g)
        return -1;
    g->config.nic = true;
    lb_fake_let_go(g);
    return 0;
}

int lb_fake_break_hold(lb_fake_id id, struct lb_error *err)
{
    struct guest *g = lb_fake_hold(id, err);
    if (!g)
        return -1;
    lb_fake_io_die(g);
    lb_fake_let_go(g);
    return 0;
}

void lb_fake_io_free(struct guest *g)
{
    end_hold(g);
    free(g->mirror.socket);
    free(g->mirror.export_name);
}

int lb_fake_nics(struct lb_hv_vm *vm, struct lb_nic **out, unsigned *n, struct lb_error *err)
{
    const struct lb_fake_config *c = &vm->guest->config;
    if (lb_fake_enter(LB_FAKE_NICS, vm->guest, err) < 0)
        return -1;
    struct lb_nic *nic = lb_alloc(sizeof(*nic));
    snprintf(nic->id, sizeof(nic->id), "net0");
    nic->kind = c->nic_opaque ? LB_NIC_OPAQUE : LB_NIC_INSIDE;
    if (c->nic_opaque)
        snprintf(nic->why, sizeof(nic->why), "a card a test made so: give the guest another one");
    *out = nic;
    *n = c->nic ? 1 : 0;
    return 0;
}

static int check_card(struct guest *g, const char *id, struct lb_error *err)
{
    if (g->config.nic && !g->config.nic_opaque && strcmp(id, "net0") == 0)
        return 0;
    return lb_fail(err, LB_E_NOT_FOUND, "fake: %s has no card %s that can be held", g->name, id);
}

int lb_fake_nic_hold(struct lb_hv_vm *vm, const char *id, int fds[2], struct lb_error *err)
{
    struct guest *g = vm->guest;
    int out[2], in[2];

    if (lb_fake_enter(LB_FAKE_NIC_HOLD, g, err) < 0 || check_card(g, id, err) < 0)
        return -1;
    end_hold(g); /* of a holder that died */
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, out) < 0)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "fake: cannot make sockets");
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, in) < 0) {
        close(out[0]);
        close(out[1]);
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "fake: cannot make sockets");
    }
    pthread_mutex_lock(&g->lock);
    g->nic.out = out[1];
    g->nic.in = in[1];
    g->nic.held = true;
    pthread_mutex_unlock(&g->lock);
    int e = pthread_create(&g->nic.thread, NULL, card_main, g);
    assert(e == 0);
    (void)e;
    fds[0] = out[0];
    fds[1] = in[0];
    return 0;
}

int lb_fake_nic_unhold(struct lb_hv_vm *vm, const char *id, struct lb_error *err)
{
    struct guest *g = vm->guest;
    if (lb_fake_enter(LB_FAKE_NIC_UNHOLD, g, err) < 0 || check_card(g, id, err) < 0)
        return -1;
    end_hold(g);
    return 0;
}

/* -------------------------------------------------------------------- disk */

static uint64_t block_of_write(uint64_t n, uint64_t n_blocks)
{
    return n * DISK_STRIDE % n_blocks;
}

static void fill_block(void *buf, uint64_t nonce, uint64_t n)
{
    uint64_t *words = buf;
    for (unsigned i = 0; i < LB_PAGE_SIZE / sizeof(*words); i++)
        words[i] = htole64(nonce ^ n << 12 ^ i);
}

void lb_fake_disk_fill(void *image, uint64_t disk_bytes, uint64_t nonce, uint64_t writes)
{
    uint64_t n_blocks = disk_bytes / LB_PAGE_SIZE;
    memset(image, 0, disk_bytes);
    for (uint64_t n = 1; n <= writes; n++)
        fill_block((char *)image + block_of_write(n, n_blocks) * LB_PAGE_SIZE, nonce, n);
}

/* lock held */
static void to_mirror(struct guest *g, uint64_t offset, const void *data)
{
    struct fake_mirror *m = &g->mirror;
    if (!m->on || m->failed)
        return;
    pthread_mutex_lock(&sink_lock);
    int rc = mirror_fn ? mirror_fn(g->id, m->socket, m->export_name, offset, data, LB_PAGE_SIZE,
                                   mirror_arg)
                       : 0;
    pthread_mutex_unlock(&sink_lock);
    m->failed = rc < 0;
    if (rc < 0)
        snprintf(m->error, sizeof(m->error), "the server of %s is gone", m->socket);
}

void lb_fake_store_block(struct guest *g)
{
    uint8_t buf[LB_PAGE_SIZE] __attribute__((aligned(8)));
    uint64_t n = ++g->disk_writes;
    fill_block(buf, g->nonce, n);
    to_mirror(g, block_of_write(n, g->config.disk_bytes / LB_PAGE_SIZE) * LB_PAGE_SIZE, buf);
}

int lb_fake_disks(struct lb_hv_vm *vm, struct lb_hv_disk **out, unsigned *n, struct lb_error *err)
{
    struct guest *g = vm->guest;
    if (lb_fake_enter(LB_FAKE_DISKS, g, err) < 0)
        return -1;
    struct lb_hv_disk *d = lb_alloc(sizeof(*d));
    snprintf(d->id, sizeof(d->id), "disk0");
    pthread_mutex_lock(&g->lock);
    snprintf(d->path, sizeof(d->path), "%s", g->disk_path);
    snprintf(d->format, sizeof(d->format), "%s", g->n_images ? "qcow2" : "raw");
    pthread_mutex_unlock(&g->lock);
    d->size_bytes = g->config.disk_bytes;
    *out = d;
    *n = g->config.disk_bytes ? 1 : 0;
    return 0;
}

static int check_disk(struct guest *g, const char *id, struct lb_error *err)
{
    if (g->config.disk_bytes && strcmp(id, "disk0") == 0)
        return 0;
    return lb_fail(err, LB_E_NOT_FOUND, "fake: %s has no disk %s", g->name, id);
}

int lb_fake_disk_mirror(struct lb_hv_vm *vm, const char *id, const char *nbd_socket,
                        const char *export_name, struct lb_error *err)
{
    struct guest *g = vm->guest;
    struct fake_mirror *m = &g->mirror;

    if (lb_fake_enter(LB_FAKE_DISK_MIRROR, g, err) < 0 || check_disk(g, id, err) < 0)
        return -1;
    LB_AUTO_FREE char *image = lb_try_alloc(g->config.disk_bytes, err);
    if (!image)
        return -1;
    pthread_mutex_lock(&g->lock);
    bool twice = m->on;
    if (!twice) {
        free(m->socket);
        free(m->export_name);
        *m = (struct fake_mirror){.on = true, .socket = lb_strdup(nbd_socket),
                                  .export_name = lb_strdup(export_name)};
        lb_fake_disk_fill(image, g->config.disk_bytes, g->nonce, g->disk_writes);
        for (uint64_t at = 0; at < g->config.disk_bytes; at += LB_PAGE_SIZE)
            to_mirror(g, at, image + at);
    }
    pthread_mutex_unlock(&g->lock);
    return twice ? lb_fail(err, LB_E_EXISTS, "fake: %s is mirrored already", id) : 0;
}

int lb_fake_disk_mirror_status(struct lb_hv_vm *vm, const char *id, bool poll,
                               struct lb_mirror_status *out, struct lb_error *err)
{
    struct guest *g = vm->guest;

    if (lb_fake_enter(LB_FAKE_DISK_MIRROR_STATUS, g, err) < 0 || check_disk(g, id, err) < 0)
        return -1;
    pthread_mutex_lock(&g->lock);
    const struct fake_mirror *m = &g->mirror;
    bool on = m->on;
    *out = (struct lb_mirror_status){.ready = on && !m->failed, .failed = on && m->failed};
    snprintf(out->error, sizeof(out->error), "%s", m->error);
    if (poll && on) {
        out->total_bytes = g->config.disk_bytes;
        out->done_bytes = m->failed ? 0 : g->config.disk_bytes;
    }
    pthread_mutex_unlock(&g->lock);
    return on ? 0 : lb_fail(err, LB_E_STATE, "fake: %s is not mirrored", id);
}

int lb_fake_disk_mirror_end(struct lb_hv_vm *vm, const char *id, struct lb_error *err)
{
    struct guest *g = vm->guest;

    if (lb_fake_enter(LB_FAKE_DISK_MIRROR_END, g, err) < 0 || check_disk(g, id, err) < 0)
        return -1;
    pthread_mutex_lock(&g->lock);
    g->mirror.on = false;
    pthread_mutex_unlock(&g->lock);
    return 0;
}

/* ------------------------------------------------------------------- clock */

int lb_fake_clock_step(struct lb_hv_vm *vm, uint64_t *step_ns, struct lb_error *err)
{
    struct guest *g = vm->guest;

    if (lb_fake_enter(LB_FAKE_CLOCK_STEP, g, err) < 0)
        return -1;
    if (g->config.no_clock)
        return lb_fail(err, LB_E_UNSUPPORTED, "fake: %s has no clock that can be set", g->name);
    pthread_mutex_lock(&g->lock);
    g->clock_stepped_ns += *step_ns;
    pthread_mutex_unlock(&g->lock);
    return 0;
}
