/* remus/output.c - the holder: reads what guests send, keeps it by epoch, lets it go when it may.
 *
 *      cards --- epoll --> queues --- mark(n) by the engine, release(n) by whoever heard the Ack
 *                             |
 *      loop: head of a queue allowed and gate open? write it, next. A card that blocks waits for POLLOUT.
 *
 * Everything is read by whoever has the time: the loop when a card is readable, the engine in mark_end, so that a mark
 * costs a few system calls and no switch of threads. Only the loop writes; disarm ends it first and takes its place.
 *
 * Memory: the engine stops the guest when held_bytes says so. Should it not, we leave frames in the kernel's own queue
 * from LB_OUTPUT_LIMIT_BYTES on, which drops at its end and counts; being read later only puts a frame in a later
 * epoch. The hypervisor's cards are always read.
 *
 * A failed write (a tap went down) loses a frame, as networks do, and is counted. */
#include "remus/output_internal.h"

#include <assert.h>
#include <errno.h>
#include <jansson.h>
#include <poll.h>
#include <pthread.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#define READ_BATCH 16u       /* frames read with the lock held */
#define WRITE_BATCH 64u      /* frames of a card before the next one has its turn */
#define FLUSH_TIMEOUT_MS 2000
#define LOOP_NICE (-10)      /* clients wait for what it writes */

struct card {
    enum lb_nic_kind kind;   /* TAP, INSIDE, or NONE */
    struct lb_otap tap;
    struct lb_oinside inside;
    struct lb_oq q;          /* lock */
    bool paused;             /* loop: not read now, too much is held */
    bool blocked;            /* loop: waits for room to write */
    bool broken;             /* lock */
    uint64_t kernel_dropped; /* lock: before we read them */
};

struct lb_output {
    /* immutable after open */
    struct card *cards;
    unsigned n;
    struct lb_hv_vm *vm;
    char *record;
    uint64_t netns_inode;
    int sysfs_fd, epoll_fd, kick_fd;
    int gate_fd;             /* -1: no tap, the gate is ordinary memory */
    struct lb_gate *gate;    /* atomic */

    /* engine thread */
    struct lb_rtnl nl;
    bool armed, looping;
    uint64_t marking;
    unsigned verify_next;
    pthread_t loop;

    /* any thread */
    pthread_mutex_t lock;
    struct lb_output_stats stats;   /* lock; only the totals */
    uint64_t may;                   /* atomic: epochs < may may leave */
    bool gate_waits;                /* atomic: frames wait for the gate */
    bool ending;                    /* atomic */
};

static void kick(struct lb_output *o)
{
    uint64_t one = 1;
    ssize_t n = write(o->kick_fd, &one, sizeof(one));
    (void)n; /* full: it is awake anyway */
}

static bool gate_open(struct lb_output *o)
{
    return lb_now_ns() < __atomic_load_n(&o->gate->until_ns, __ATOMIC_SEQ_CST);
}

/* ------------------------------------------------------------------ reading */

static uint64_t held_bytes(const struct lb_output *o) /* lock */
{
    uint64_t sum = 0;
    for (unsigned i = 0; i < o->n; i++)
        sum += o->cards[i].q.held_bytes;
    return sum;
}

/* Up to a batch of frames, lock held. 1: there may be more, 0: no more now, -1: broken or no memory. */
static int read_tap(struct card *c, struct lb_error *err)
{
    for (unsigned i = 0; i < READ_BATCH; i++) {
        void *room = lb_oq_room(&c->q, err);
        if (!room)
            return -1;
        ssize_t n = read(c->tap.hold_fd, room, LB_FRAME_MAX);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN)
            return 0;
        if (n < 0)
            return lb_fail_errno(err, LB_E_STATE, errno, "%s: reading held frames", c->tap.ifname);
        if (n > (ssize_t)LB_VNET_HDR)
            lb_oq_commit(&c->q, (size_t)n, lb_now_ns());
    }
    return 1;
}

/* As read_tap, takes the lock. *full: enough is held, nothing was read. */
static int read_card(struct lb_output *o, struct card *c, bool *full, struct lb_error *err)
{
    int r = 0;
    pthread_mutex_lock(&o->lock);
    *full = c->kind == LB_NIC_TAP && held_bytes(o) > LB_OUTPUT_LIMIT_BYTES;
    if (!c->broken && !*full && c->kind == LB_NIC_TAP)
        r = read_tap(c, err);
    else if (!c->broken && c->kind == LB_NIC_INSIDE)
        r = lb_oinside_read(&c->inside, &c->q, READ_BATCH, err);
    c->broken |= r < 0;
    pthread_mutex_unlock(&o->lock);
    return r;
}

static int drain(struct lb_output *o, struct card *c, struct lb_error *err)
{
    bool full;
    int r;
    do {
        r = read_card(o, c, &full, err);
    } while (r > 0);
    return r;
}

/* ------------------------------------------------------------------ writing */

/* 1: gone (or lost), 0: would block. */
static int write_frame(struct lb_output *o, struct card *c, const struct lb_oq_frame *f)
{
    struct lb_error e = LB_ERROR_INIT;
    int r;
    if (c->kind == LB_NIC_INSIDE) {
        r = lb_oinside_write(&c->inside, f, &e);
    } else {
        ssize_t n = write(c->tap.inj_fd, f->data, f->len);
        if (n < 0 && (errno == EAGAIN || errno == EINTR))
            return 0;
        r = n < 0 ? lb_fail_errno(&e, LB_E_STATE, errno, "%s: releasing a frame", c->tap.ifname) : 1;
    }
    if (r < 0) {
        pthread_mutex_lock(&o->lock);
        if (o->stats.dropped_packets++ == 0)
            lb_log_error(LB_LOG_WARN, &e);
        pthread_mutex_unlock(&o->lock);
    }
    return r != 0;
}

enum pumped { PUMP_EMPTY, PUMP_MORE, PUMP_BLOCKED, PUMP_GATE };

static enum pumped pump(struct lb_output *o, struct card *c)
{
    pthread_mutex_lock(&o->lock);
    uint64_t may = __atomic_load_n(&o->may, __ATOMIC_SEQ_CST);
    if (may)
        lb_oq_allow(&c->q, may - 1);
    const struct lb_oq_frame *f = lb_oq_head(&c->q);
    pthread_mutex_unlock(&o->lock);
    for (unsigned i = 0; f && i < WRITE_BATCH; i++) {
        if (!gate_open(o))
            return PUMP_GATE;
        uint64_t len = f->len;
        if (!write_frame(o, c, f))
            return PUMP_BLOCKED;
        pthread_mutex_lock(&o->lock);
        lb_oq_pop(&c->q);
        o->stats.released_packets++;
        o->stats.released_bytes += len - LB_VNET_HDR;
        f = lb_oq_head(&c->q);
        pthread_mutex_unlock(&o->lock);
    }
    return f ? PUMP_MORE : PUMP_EMPTY;
}

/* --------------------------------------------------------------------- loop */

/* epoll's tag: the card, and which of its two descriptors. */
#define TAG(card, out) ((uint64_t)(card) << 1 | (out))
#define TAG_KICK UINT64_MAX

static int in_fd(const struct card *c)
{
    return c->kind == LB_NIC_TAP ? c->tap.hold_fd : c->inside.in_fd;
}

static int out_fd(const struct card *c)
{
    return c->kind == LB_NIC_TAP ? c->tap.inj_fd : c->inside.out_fd;
}

static void watch(struct lb_output *o, int op, int fd, uint64_t tag, uint32_t events)
{
    struct epoll_event ev = {.events = events, .data.u64 = tag};
    epoll_ctl(o->epoll_fd, op, fd, &ev);
}

static void forget(struct lb_output *o, struct card *c, const struct lb_error *why)
{
    lb_log_error(LB_LOG_ERROR, why);
    watch(o, EPOLL_CTL_DEL, in_fd(c), 0, 0);
    watch(o, EPOLL_CTL_DEL, out_fd(c), 0, 0);
}

static void on_event(struct lb_output *o, const struct epoll_event *ev)
{
    if (ev->data.u64 == TAG_KICK) {
        uint64_t n;
        ssize_t r = read(o->kick_fd, &n, sizeof(n));
        (void)r;
        return;
    }
    struct card *c = &o->cards[ev->data.u64 >> 1];
    struct lb_error e = LB_ERROR_INIT;
    bool full = false;
    if (ev->data.u64 & 1) {
        c->blocked = false;
        watch(o, EPOLL_CTL_MOD, out_fd(c), ev->data.u64, 0);
        if (!(ev->events & (EPOLLERR | EPOLLHUP)))
            return;
        lb_fail(&e, LB_E_STATE, "card %u: released frames are not taken any more",
                (unsigned)(ev->data.u64 >> 1));
        pthread_mutex_lock(&o->lock);
        c->broken = true;
        pthread_mutex_unlock(&o->lock);
        forget(o, c, &e);
    } else if (read_card(o, c, &full, &e) < 0) {
        forget(o, c, &e);
    } else if (full) {
        c->paused = true;
        watch(o, EPOLL_CTL_MOD, in_fd(c), ev->data.u64, 0);
    }
}

/* Read again what was left in the kernel. */
static void unpause(struct lb_output *o)
{
    pthread_mutex_lock(&o->lock);
    bool room = held_bytes(o) < LB_OUTPUT_LIMIT_BYTES / 2;
    pthread_mutex_unlock(&o->lock);
    for (unsigned i = 0; room && i < o->n; i++) {
        struct card *c = &o->cards[i];
        if (!c->paused)
            continue;
        c->paused = false;
        watch(o, EPOLL_CTL_MOD, in_fd(c), TAG(i, 0), EPOLLIN);
    }
}

/* Returns whether there is more to write at once. */
static bool pump_all(struct lb_output *o)
{
    bool more = false, gate = false;
    for (unsigned i = 0; i < o->n; i++) {
        struct card *c = &o->cards[i];
        enum pumped p = c->kind == LB_NIC_NONE || c->blocked ? PUMP_EMPTY : pump(o, c);
        more |= p == PUMP_MORE;
        gate |= p == PUMP_GATE;
        if (p == PUMP_BLOCKED) {
            c->blocked = true;
            watch(o, EPOLL_CTL_MOD, out_fd(c), TAG(i, 1), EPOLLOUT);
        }
    }
    __atomic_store_n(&o->gate_waits, gate, __ATOMIC_SEQ_CST);
    return more || (gate && gate_open(o)); /* it may have been opened before we said that we wait */
}

static void *loop_main(void *arg)
{
    struct lb_output *o = arg;
    struct epoll_event ev[16];
    bool more = false;
    setpriority(PRIO_PROCESS, (id_t)syscall(__NR_gettid), LOOP_NICE);
    while (!__atomic_load_n(&o->ending, __ATOMIC_SEQ_CST)) {
        int n = epoll_wait(o->epoll_fd, ev, LB_ARRAY_LEN(ev), more ? 0 : -1);
        for (int i = 0; i < n; i++)
            on_event(o, &ev[i]);
        more = pump_all(o);
        unpause(o);
    }
    return NULL;
}

static int start_loop(struct lb_output *o, struct lb_error *err)
{
    __atomic_store_n(&o->ending, false, __ATOMIC_SEQ_CST);
    int e = pthread_create(&o->loop, NULL, loop_main, o);
    if (e)
        return lb_fail_errno(err, LB_E_INTERNAL, e, "no thread for held output");
    o->looping = true;
    return 0;
}

static void end_loop(struct lb_output *o)
{
    if (!o->looping)
        return;
    __atomic_store_n(&o->ending, true, __ATOMIC_SEQ_CST);
    kick(o);
    pthread_join(o->loop, NULL);
    o->looping = false;
}

/* ------------------------------------------------------------------- record */

/* For who comes after a crash: what to take away, and what to put back. */
static int write_record(struct lb_output *o, struct lb_error *err)
{
    json_t *cards = json_array();
    for (unsigned i = 0; i < o->n; i++) {
        const struct card *c = &o->cards[i];
        if (c->kind == LB_NIC_TAP)
            json_array_append_new(cards, json_pack("{s:s,s:s,s:s,s:b}", "ifname", c->tap.ifname,
                                                   "hold", c->tap.hold, "rps", c->tap.rps, "clsact",
                                                   c->tap.clsact_ours));
        else if (c->kind == LB_NIC_INSIDE)
            json_array_append_new(cards, json_pack("{s:s}", "inside", c->inside.id));
    }
    json_t *top = json_pack("{s:I,s:I,s:o}", "holder", (json_int_t)getpid(), "netns",
                            (json_int_t)o->netns_inode, "cards", cards);
    LB_AUTO_FREE char *text = top ? json_dumps(top, JSON_INDENT(1)) : NULL;
    json_decref(top);
    if (!text)
        return lb_fail(err, LB_E_INTERNAL, "no record of the held output");
    return lb_file_write_atomic(o->record, text, strlen(text), 0600, err);
}

/* ----------------------------------------------------------- open and close */

static int add_cards(struct lb_output *o, const struct lb_nic *nics, struct lb_error *err)
{
    for (unsigned i = 0; i < o->n; i++) {
        struct card *c = &o->cards[i];
        c->kind = nics[i].kind;
        c->tap = (struct lb_otap)LB_OTAP_INIT;
        c->inside = (struct lb_oinside)LB_OINSIDE_INIT;
        memcpy(c->inside.id, nics[i].id, sizeof(c->inside.id));
        memcpy(c->tap.ifname, nics[i].ifname, sizeof(c->tap.ifname));
        if (c->kind == LB_NIC_OPAQUE)
            return lb_fail(err, LB_E_UNSUPPORTED, "output of %s cannot be held: %s", nics[i].id,
                           nics[i].why);
    }
    return 0;
}

static bool any_tap(const struct lb_output *o)
{
    for (unsigned i = 0; i < o->n; i++)
        if (o->cards[i].kind == LB_NIC_TAP)
            return true;
    return false;
}

static int make_gate(struct lb_output *o, struct lb_error *err)
{
    if (any_tap(o))
        return lb_bpf_gate(&o->gate_fd, &o->gate, err);
    o->gate = lb_alloc(sizeof(*o->gate));
    return 0;
}

/* In the namespace of the VM. */
static int open_taps(void *arg, struct lb_error *err)
{
    struct lb_output *o = arg;
    uint32_t mark = 0;
    while (mark == 0)
        if (getrandom(&mark, sizeof(mark), 0) != (ssize_t)sizeof(mark))
            return lb_fail_errno(err, LB_E_INTERNAL, errno, "no random number");
    if (lb_rtnl_open(&o->nl, err) < 0)
        return -1;
    o->sysfs_fd = lb_sysfs_open();
    for (unsigned i = 0; i < o->n; i++) {
        struct card *c = &o->cards[i];
        char ifname[16];
        memcpy(ifname, c->tap.ifname, sizeof(ifname));
        if (c->kind == LB_NIC_TAP &&
            lb_otap_open(&c->tap, &o->nl, ifname, o->sysfs_fd, mark, o->gate_fd, err) < 0)
            return lb_context(err, "%s", ifname);
    }
    return 0;
}

static int enter(struct lb_output *o, const struct lb_vm_ident *ident, struct lb_error *err)
{
    struct stat st;
    LB_AUTO_FD int netns = lb_netns_open(&ident->proc, 0, err);
    if (netns < 0)
        return -1;
    if (fstat(netns, &st) < 0)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "the network namespace of the VM");
    o->netns_inode = st.st_ino;
    return lb_netns_run(netns, open_taps, o, err);
}

int lb_output_open(struct lb_hv_vm *vm, const struct lb_vm_ident *ident, const char *run_dir,
                   struct lb_output **out, struct lb_error *err)
{
    LB_AUTO_FREE struct lb_nic *nics = NULL;
    unsigned n = 0;
    if (lb_hv_nics(vm, &nics, &n, err) < 0)
        return -1;
    struct lb_output *o = lb_alloc(sizeof(*o));
    o->vm = vm;
    o->n = n;
    o->cards = lb_alloc(LB_MAX(n, 1u) * sizeof(*o->cards));
    o->record = lb_output_record_path(run_dir);
    o->nl.fd = o->sysfs_fd = o->gate_fd = -1;
    lb_mutex_init_inherit(&o->lock);
    o->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    o->kick_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (o->epoll_fd < 0 || o->kick_fd < 0) {
        lb_fail_errno(err, LB_E_INTERNAL, errno, "no event loop for held output");
        goto fail;
    }
    watch(o, EPOLL_CTL_ADD, o->kick_fd, TAG_KICK, EPOLLIN);
    if (add_cards(o, nics, err) < 0 || make_gate(o, err) < 0 ||
        (any_tap(o) && enter(o, ident, err) < 0) || write_record(o, err) < 0 ||
        start_loop(o, err) < 0)
        goto fail;
    *out = o;
    return 0;
fail:
    lb_output_close(o);
    return -1;
}

static bool still_armed(const struct lb_output *o)
{
    for (unsigned i = 0; i < o->n; i++)
        if (o->cards[i].tap.armed || o->cards[i].inside.held)
            return true;
    return false;
}

void lb_output_close(struct lb_output *o)
{
    if (!o)
        return;
    end_loop(o);
    bool keep = still_armed(o);
    for (unsigned i = 0; i < o->n; i++) {
        struct card *c = &o->cards[i];
        if (c->kind == LB_NIC_TAP)
            lb_otap_close(&c->tap, &o->nl, o->sysfs_fd);
        lb_oinside_close(&c->inside);
        lb_oq_free(&c->q);
    }
    if (!keep)
        unlink(o->record);
    if (o->gate_fd >= 0)
        lb_bpf_gate_unmap(o->gate);
    else
        free(o->gate);
    lb_cleanup_fd(&o->gate_fd);
    lb_rtnl_close(&o->nl);
    lb_cleanup_fd(&o->sysfs_fd);
    lb_cleanup_fd(&o->epoll_fd);
    lb_cleanup_fd(&o->kick_fd);
    pthread_mutex_destroy(&o->lock);
    free(o->record);
    free(o->cards);
    free(o);
}

/* ----------------------------------------------------------- arm and disarm */

static int arm_card(struct lb_output *o, unsigned i, struct lb_error *err)
{
    struct card *c = &o->cards[i];
    int r = c->kind == LB_NIC_TAP ? lb_otap_arm(&c->tap, &o->nl, err)
                                  : lb_oinside_arm(&c->inside, o->vm, err);
    if (r < 0)
        return -1;
    watch(o, EPOLL_CTL_ADD, in_fd(c), TAG(i, 0), EPOLLIN);
    watch(o, EPOLL_CTL_ADD, out_fd(c), TAG(i, 1), 0);
    return 0;
}

static int disarm_cards(struct lb_output *o, struct lb_error *err)
{
    int result = 0;
    for (unsigned i = 0; i < o->n; i++) {
        struct card *c = &o->cards[i];
        struct lb_error e = LB_ERROR_INIT;
        if (c->kind == LB_NIC_NONE)
            continue;
        watch(o, EPOLL_CTL_DEL, in_fd(c), 0, 0);
        watch(o, EPOLL_CTL_DEL, out_fd(c), 0, 0);
        int r = c->kind == LB_NIC_TAP ? lb_otap_disarm(&c->tap, &o->nl, &e)
                                      : lb_oinside_disarm(&c->inside, o->vm, &e);
        if (r < 0 && result == 0 && err)
            *err = e;
        result |= r;
    }
    return result < 0 ? -1 : 0;
}

int lb_output_arm(struct lb_output *o, struct lb_error *err)
{
    assert(!o->armed);
    for (unsigned i = 0; i < o->n; i++) {
        if (o->cards[i].kind != LB_NIC_NONE && arm_card(o, i, err) < 0) {
            disarm_cards(o, NULL);
            return -1;
        }
    }
    o->armed = true;
    return 0;
}

/* The loop has ended: write all that is held. */
static int flush(struct lb_output *o, struct card *c, struct lb_error *err)
{
    enum pumped p;
    lb_oq_allow_all(&c->q);
    while ((p = pump(o, c)) != PUMP_EMPTY) {
        struct pollfd fd = {.fd = out_fd(c), .events = POLLOUT};
        if (p == PUMP_GATE)
            return lb_fail(err, LB_E_STATE, "the gate closed before all output had left");
        if (p == PUMP_BLOCKED && poll(&fd, 1, FLUSH_TIMEOUT_MS) == 0)
            return lb_fail(err, LB_E_HV, "held output does not leave");
    }
    return 0;
}

static bool more_in_kernel(const struct card *c)
{
    struct pollfd fd = {.fd = in_fd(c), .events = POLLIN};
    return c->kind == LB_NIC_TAP && poll(&fd, 1, 0) == 1 && (fd.revents & POLLIN);
}

/* Read all there is and, with release, write it. */
static int settle(struct lb_output *o, struct card *c, bool release, struct lb_error *err)
{
    if (c->kind == LB_NIC_NONE || c->broken)
        return 0;
    do { /* what found no room comes after what did */
        int r = drain(o, c, release ? err : NULL);
        if (release && (r < 0 || flush(o, c, err) < 0))
            return -1;
    } while (release && more_in_kernel(c));
    return 0;
}

int lb_output_disarm(struct lb_output *o, bool release, struct lb_error *err)
{
    int r = 0;
    if (!o->armed)
        return 0;
    if (release && !gate_open(o))
        return lb_fail(err, LB_E_STATE, "held output cannot be released: the gate is closed");
    end_loop(o);
    for (unsigned i = 0; i < o->n && r == 0; i++)
        r = settle(o, &o->cards[i], release, err);
    if (r < 0) {
        start_loop(o, NULL); /* as before: still held */
        return -1;
    }
    if (disarm_cards(o, err) < 0)
        return -1;
    o->armed = false;
    return 0;
}

/* ------------------------------------------------------------------- epochs */

void lb_output_mark_begin(struct lb_output *o, uint64_t epoch)
{
    o->marking = epoch; /* the loop reads anyway */
}

int lb_output_mark_end(struct lb_output *o, struct lb_error *err)
{
    for (unsigned i = 0; i < o->n; i++)
        if (drain(o, &o->cards[i], err) < 0)
            return -1;
    pthread_mutex_lock(&o->lock);
    for (unsigned i = 0; i < o->n; i++)
        lb_oq_mark(&o->cards[i].q, o->marking);
    pthread_mutex_unlock(&o->lock);
    return 0;
}

int lb_output_copy(struct lb_output *o, uint64_t epoch, size_t max_bytes, void **buf, size_t *len,
                   struct lb_error *err)
{
    LB_AUTO_FREE const struct lb_oq **q = lb_alloc(LB_MAX(o->n, 1u) * sizeof(*q));
    for (unsigned i = 0; i < o->n; i++)
        q[i] = &o->cards[i].q;
    pthread_mutex_lock(&o->lock);
    int r = lb_oq_copy(q, o->n, epoch, max_bytes, buf, len, err);
    pthread_mutex_unlock(&o->lock);
    return r;
}

void lb_output_release(struct lb_output *o, uint64_t epoch)
{
    uint64_t may = epoch + 1, now = __atomic_load_n(&o->may, __ATOMIC_SEQ_CST);
    assert(may);
    while (now < may && !__atomic_compare_exchange_n(&o->may, &now, may, false, __ATOMIC_SEQ_CST,
                                                     __ATOMIC_SEQ_CST))
        ;
    kick(o);
}

void lb_output_gate(struct lb_output *o, uint64_t until_ns)
{
    __atomic_store_n(&o->gate->until_ns, until_ns, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&o->gate_waits, __ATOMIC_SEQ_CST))
        kick(o);
}

bool lb_output_waiting(struct lb_output *o)
{
    bool waiting = false;
    pthread_mutex_lock(&o->lock);
    for (unsigned i = 0; i < o->n; i++)
        waiting |= o->cards[i].q.in > o->cards[i].q.marked;
    pthread_mutex_unlock(&o->lock);
    return waiting;
}

void lb_output_get_stats(struct lb_output *o, struct lb_output_stats *out)
{
    pthread_mutex_lock(&o->lock);
    *out = o->stats;
    out->held_bytes = held_bytes(o);
    out->dropped_packets += __atomic_load_n(&o->gate->dropped, __ATOMIC_RELAXED);
    for (unsigned i = 0; i < o->n; i++) {
        const struct lb_oq *q = &o->cards[i].q;
        const struct lb_oq_frame *f = lb_oq_oldest(q);
        out->held_packets += q->in - q->out;
        out->dropped_packets += o->cards[i].kernel_dropped;
        if (f && (!out->oldest_held_ns || f->came_ns < out->oldest_held_ns))
            out->oldest_held_ns = f->came_ns;
    }
    pthread_mutex_unlock(&o->lock);
}

/* ------------------------------------------------------------------- verify */

static int verify_tap(struct lb_output *o, struct card *c, struct lb_error *err)
{
    uint64_t dropped = c->kernel_dropped;
    int r = lb_otap_verify(&c->tap, &o->nl, &dropped, err);
    pthread_mutex_lock(&o->lock);
    c->kernel_dropped = dropped;
    pthread_mutex_unlock(&o->lock);
    if (r > 0)
        lb_fail(err, LB_E_STATE, "%s: the output filter was removed; it is in place again, output may "
                                 "have left meanwhile", c->tap.ifname);
    return r;
}

int lb_output_verify(struct lb_output *o, struct lb_error *err)
{
    if (!o->armed || !o->n)
        return 0;
    const char *broken = NULL;
    pthread_mutex_lock(&o->lock);
    for (unsigned i = 0; i < o->n; i++)
        if (o->cards[i].broken)
            broken = o->cards[i].inside.id;
    pthread_mutex_unlock(&o->lock);
    if (broken)
        return lb_fail(err, LB_E_STATE, "network card %s: its output is not held any more", broken);
    struct card *c = &o->cards[o->verify_next++ % o->n];
    return c->kind == LB_NIC_TAP ? verify_tap(o, c, err) : 0;
}
