/* core/fake/fake.c - a guest inside this process, for tests.
 *
 * Threads.  One worker per guest writes pages; every page is written and marked
 * under guest->lock, so that when stop has taken the lock nothing is in flight.
 * Handles are used by the engine thread; read, write and log_peek by any.
 *
 * The guest writes through a mapping of its own and the engine sees the memfd
 * through another one, as with a real hypervisor: copying a running guest may
 * tear a page, and the dirty log is what repairs it.
 *
 * Lock order: registry_lock, then guest->lock. */
#include "core/fake/fake_internal.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/utsname.h>
#include <time.h>
#include <xxhash.h>

#define STATE_MAGIC UINT64_C(0x3265746174736b66) /* "fkstate2" */
#define STAMP_MAGIC UINT64_C(0x31706d6174736b66) /* "fkstamp1" */

/* Followed by the seq tables, padding and an XXH3 of all before it. */
struct state_header {
    uint64_t magic;
    uint64_t nonce, rng, writes, frames, disk_writes;
    uint64_t n_pages[N_BLOCKS];
    uint32_t next_seq, random_bytes;
};

static pthread_mutex_t registry_lock = PTHREAD_MUTEX_INITIALIZER;
static struct guest *guests;
static lb_fake_id last_id;

/* ------------------------------------------------------------------ faults */

struct fault {
    unsigned countdown; /* calls left, this one included; 0: disarmed */
    enum lb_errcode code;
    bool die, late;
    unsigned delay_ms;
    uint64_t calls;
};
static pthread_mutex_t fault_lock = PTHREAD_MUTEX_INITIALIZER;
static struct fault faults[LB_FAKE_N_SLOTS]; /* locked by fault_lock */

const char *lb_fake_slot_name(enum lb_fake_slot slot)
{
    static const char *const names[LB_FAKE_N_SLOTS] = {
        "attach",     "describe",  "blocks", "log_enable", "log_clean",  "log_peek",
        "log_disable", "populated", "read",   "stop",       "cont",       "save_begin",
        "save_end",   "throttle",  "launch", "prepare_ram", "write",      "load_state",
        "run",        "announce",  "status", "destroy",    "checkpoint_mode", "freeze",
        "nics",       "nic_hold",  "nic_unhold", "disks",  "disk_mirror", "disk_mirror_status",
        "disk_mirror_end", "clock_step", "disk_overlay", "disk_freeze", "disk_join",
        "lazy_begin", "lazy_attach", "lazy_fault", "lazy_place", "lazy_offer", "lazy_touched", "lazy_missing", "lazy_end",
        "cpu_features",
    };
    assert(slot < LB_FAKE_N_SLOTS);
    return names[slot];
}

static _Thread_local enum lb_errcode late_code; /* of the slot this thread is in; LB_OK: none */

static void arm(enum lb_fake_slot slot, unsigned nth, enum lb_errcode code, bool die, bool late)
{
    assert(slot < LB_FAKE_N_SLOTS);
    pthread_mutex_lock(&fault_lock);
    faults[slot].countdown = nth;
    faults[slot].code = code;
    faults[slot].die = die;
    faults[slot].late = late;
    pthread_mutex_unlock(&fault_lock);
}

void lb_fake_fail(enum lb_fake_slot slot, unsigned nth, enum lb_errcode code)
{
    assert(code != LB_OK);
    arm(slot, nth, code, false, false);
}

void lb_fake_fail_late(enum lb_fake_slot slot, unsigned nth, enum lb_errcode code)
{
    assert(code != LB_OK);
    assert(slot == LB_FAKE_STOP || slot == LB_FAKE_CONT || slot == LB_FAKE_RUN);
    arm(slot, nth, code, false, true);
}

void lb_fake_die(enum lb_fake_slot slot, unsigned nth)
{
    assert(slot != LB_FAKE_ATTACH && slot != LB_FAKE_LAUNCH);
    arm(slot, nth, LB_E_HV, true, false);
}

void lb_fake_delay(enum lb_fake_slot slot, unsigned ms)
{
    assert(slot < LB_FAKE_N_SLOTS);
    pthread_mutex_lock(&fault_lock);
    faults[slot].delay_ms = ms;
    pthread_mutex_unlock(&fault_lock);
}

uint64_t lb_fake_calls(enum lb_fake_slot slot)
{
    assert(slot < LB_FAKE_N_SLOTS);
    pthread_mutex_lock(&fault_lock);
    uint64_t calls = faults[slot].calls;
    pthread_mutex_unlock(&fault_lock);
    return calls;
}

static void guest_die(struct guest *g)
{
    pthread_mutex_lock(&g->lock);
    g->dead = true;
    g->running = false;
    g->holds_disk = false; /* the kernel drops the locks of a dead process */
    lb_fake_io_die(g);
    pthread_cond_broadcast(&g->wake);
    pthread_mutex_unlock(&g->lock);
}

/* What a hypervisor that is held by a signal cannot do: all but what goes past it. */
static bool needs_answer(enum lb_fake_slot slot)
{
    static const enum lb_fake_slot past[] = {
        LB_FAKE_READ, LB_FAKE_WRITE, LB_FAKE_POPULATED, LB_FAKE_LOG_CLEAN, LB_FAKE_LOG_PEEK,
        LB_FAKE_LOG_DISABLE, LB_FAKE_THROTTLE, LB_FAKE_FREEZE, LB_FAKE_DESTROY,
        LB_FAKE_LAZY_FAULT, LB_FAKE_LAZY_PLACE, LB_FAKE_LAZY_OFFER,
        LB_FAKE_LAZY_TOUCHED, LB_FAKE_LAZY_MISSING,
    };
    for (unsigned i = 0; i < LB_ARRAY_LEN(past); i++)
        if (past[i] == slot)
            return false;
    return true;
}

/* Of a guest, when a slot begins: can it be done? */
static int check_guest(enum lb_fake_slot slot, struct guest *g, struct lb_error *err)
{
    pthread_mutex_lock(&g->lock);
    bool dead = g->dead, frozen = g->frozen;
    pthread_mutex_unlock(&g->lock);
    if (dead && slot != LB_FAKE_STATUS && slot != LB_FAKE_DESTROY) {
        lb_fail(err, LB_E_HV, "fake: %s (%s) has died, %s is not possible", g->name, g->address,
                lb_fake_slot_name(slot));
        return lb_remedy(err, "start the guest again");
    }
    if (!dead && frozen && needs_answer(slot)) {
        lb_fail(err, LB_E_HV, "fake: %s (%s) is frozen and does not answer to %s", g->name,
                g->address, lb_fake_slot_name(slot));
        return lb_remedy(err, "thaw it first");
    }
    return 0;
}

int lb_fake_enter(enum lb_fake_slot slot, struct guest *g, struct lb_error *err)
{
    pthread_mutex_lock(&fault_lock);
    struct fault *f = &faults[slot];
    f->calls++;
    bool hit = f->countdown > 0 && --f->countdown == 0;
    struct fault now = *f;
    pthread_mutex_unlock(&fault_lock);

    if (now.delay_ms)
        lb_sleep_ms(now.delay_ms);
    late_code = hit && now.late ? now.code : LB_OK;
    if (hit && now.die && g) {
        guest_die(g);
    } else if (hit && !now.late) {
        lb_fail(err, now.code, "fake: injected fault in %s", lb_fake_slot_name(slot));
        return lb_remedy(err, "none: a test asked for it");
    }
    return g ? check_guest(slot, g, err) : 0;
}

/* End of a slot that may fail late. */
static int leave(enum lb_fake_slot slot, int rc, struct lb_error *err)
{
    enum lb_errcode code = late_code;

    late_code = LB_OK;
    if (rc == 0 && code != LB_OK) {
        lb_fail(err, code, "fake: injected fault at the end of %s", lb_fake_slot_name(slot));
        return lb_remedy(err, "none: a test asked for it");
    }
    return rc;
}

/* ------------------------------------------------------------------- guest */

/* splitmix64: a fixed, well-mixed sequence from any seed */
static uint64_t next_random(uint64_t *state)
{
    uint64_t z = (*state += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

/* The content of page `page` of block `block` (0, 1) at write number seq > 0. */
static void stamp(void *page_buf, uint64_t nonce, uint32_t random_bytes, unsigned block,
                   uint64_t page, uint32_t seq)
{
    uint64_t head[4] = {STAMP_MAGIC, nonce, page, (uint64_t)block << 32 | seq};
    uint64_t rng = nonce ^ page << 32 ^ (uint64_t)block << 63 ^ seq;
    uint8_t *p = page_buf;

    assert(random_bytes >= sizeof(head) && random_bytes <= LB_PAGE_SIZE);
    memcpy(p, head, sizeof(head));
    for (size_t at = sizeof(head); at < random_bytes; at += sizeof(uint64_t)) {
        uint64_t word = next_random(&rng);
        memcpy(p + at, &word, LB_MIN(sizeof(word), random_bytes - at));
    }
    memset(p + random_bytes, 0, LB_PAGE_SIZE - random_bytes);
}

/* lock held */
static void write_page(struct guest *g, unsigned block, uint64_t page)
{
    struct fake_block *b = &g->blocks[block];
    uint32_t seq = ++g->next_seq;

    stamp(b->guest_map + page * LB_PAGE_SIZE, g->nonce, g->config.random_bytes, block, page,
                  seq);
    b->seq[page] = seq;
    g->writes++;
    if (g->logging)
        lb_bitmap_set(&b->dirty, page);
}

/* lock held */
static bool active(const struct guest *g)
{
    return g->running && !g->frozen && !g->quit;
}

/* lock held: one rewrite somewhere in the working set */
static void write_random_page(struct guest *g)
{
    uint64_t r = next_random(&g->rng);
    if ((r & 15) == 0) {
        write_page(g, VRAM, (r >> 4) % g->blocks[VRAM].n_pages);
    } else {
        uint64_t set = g->config.working_set_pages;
        uint64_t n = g->blocks[MAIN].n_pages;
        uint64_t page = (r >> 4) % (set ? LB_MIN(set, n) : n);
        if (lb_fake_page_wait(g, page, true) && active(g)) /* it may have been stopped meanwhile */
            write_page(g, MAIN, page);
    }
}

/* lock held: how much the rate allows since p->from_ns, which moves on */
static uint64_t due(struct fake_pace *p, uint64_t rate)
{
    const uint64_t second = UINT64_C(1000000000);
    uint64_t now_ns = lb_now_ns();
    uint64_t n = rate * (now_ns - p->from_ns) / second;

    if (n > rate / 20 + 1) { /* no bursts after a nap */
        n = rate / 20 + 1;
        p->from_ns = now_ns;
    } else if (n > 0) {
        p->from_ns += n * second / rate;
    }
    return n;
}

/* lock held: the guest begins to run */
static void start_paces(struct guest *g)
{
    g->pages.from_ns = g->sends.from_ns = g->stores.from_ns = lb_now_ns();
}

/* lock held, given up between two things */
static void do_due(struct guest *g)
{
    uint64_t pages = due(&g->pages, g->pages.rate * (100 - g->throttle_percent) / 100);
    uint64_t sends = due(&g->sends, g->sends.rate), stores = due(&g->stores, g->stores.rate);

    while ((pages || sends || stores) && active(g)) {
        if (pages) {
            write_random_page(g);
            pages--;
        }
        if (stores) {
            lb_fake_store_block(g);
            stores--;
        }
        if (sends)
            sends = lb_fake_send_frame(g) ? sends - 1 : 0;
        /* let the engine in between two of them, as on another CPU */
        pthread_mutex_unlock(&g->lock);
        pthread_mutex_lock(&g->lock);
    }
}

static void *worker_main(void *arg)
{
    struct guest *g = arg;

    pthread_mutex_lock(&g->lock);
    while (!g->quit) {
        if (active(g))
            do_due(g);
        if (g->quit)
            break;
        if (active(g) && (g->pages.rate || g->sends.rate || g->stores.rate)) {
            struct timespec until;
            clock_gettime(CLOCK_MONOTONIC, &until);
            until.tv_nsec += 1000000;
            if (until.tv_nsec >= 1000000000) {
                until.tv_nsec -= 1000000000;
                until.tv_sec++;
            }
            pthread_cond_timedwait(&g->wake, &g->lock, &until);
        } else {
            pthread_cond_wait(&g->wake, &g->lock);
        }
    }
    pthread_mutex_unlock(&g->lock);
    return NULL;
}

static void block_close(struct fake_block *b)
{
    if (b->guest_map)
        munmap(b->guest_map, b->pub.size_bytes);
    if (b->our_map)
        munmap(b->our_map, b->pub.size_bytes);
    if (b->fd >= 0)
        close(b->fd);
    free(b->seq);
    lb_bitmap_free(&b->dirty);
}

static int block_open(struct fake_block *b, unsigned id, const char *name, enum lb_ram_kind kind,
                      uint64_t bytes, struct lb_error *err)
{
    b->fd = memfd_create(name, MFD_CLOEXEC);
    if (b->fd < 0 || ftruncate(b->fd, (off_t)bytes) < 0)
        return lb_fail_errno(err, LB_E_NO_SPACE, errno, "fake: cannot create %s", name);
    b->pub.id = id;
    snprintf(b->pub.name, sizeof(b->pub.name), "%s", name);
    b->pub.size_bytes = bytes;
    b->pub.track_bytes = LB_PAGE_SIZE;
    b->pub.kind = kind;
    b->pub.backing = LB_BACK_SHARED;
    b->n_pages = bytes / LB_PAGE_SIZE;
    for (int i = 0; i < 2; i++) {
        void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, b->fd, 0);
        if (p == MAP_FAILED)
            return lb_fail_errno(err, LB_E_NO_SPACE, errno, "fake: cannot map %s", name);
        *(i ? &b->our_map : &b->guest_map) = p;
    }
    b->pub.hva = (uint64_t)(uintptr_t)b->guest_map;
    b->seq = lb_try_alloc(b->n_pages * sizeof(*b->seq), err);
    if (!b->seq)
        return -1;
    return lb_bitmap_init(&b->dirty, b->n_pages, err);
}

static void guest_free(struct guest *g)
{
    for (unsigned i = 0; i < N_BLOCKS; i++)
        block_close(&g->blocks[i]);
    lb_fake_io_free(g);
    lb_fake_lazy_free(g);
    lb_cleanup_fd(&g->shared_fd);
    pthread_cond_destroy(&g->wake);
    pthread_mutex_destroy(&g->lock);
    lb_fake_images_free(g);
    free(g->disk_path);
    free(g->name);
    free(g);
}

static bool good_size(uint64_t bytes)
{
    return bytes > 0 && bytes % LB_PAGE_SIZE == 0 && bytes <= (UINT64_C(1) << 40);
}

/* A guest without life: no worker, not registered. */
static struct guest *guest_new(const char *name, const struct lb_fake_config *config,
                               struct lb_error *err)
{
    struct guest *g = lb_alloc(sizeof(*g));
    pthread_condattr_t attr;

    g->blocks[MAIN].fd = g->blocks[VRAM].fd = -1;
    g->config = *config;
    g->config.name = g->config.disk_path = NULL;
    if (!g->config.ram_bytes)
        g->config.ram_bytes = 16u << 20;
    if (!g->config.vram_bytes)
        g->config.vram_bytes = 1u << 20;
    if (!g->config.random_bytes)
        g->config.random_bytes = 512;
    g->pages.rate = config->rate_pages_per_s;
    g->sends.rate = config->nic ? config->frames_per_s : 0;
    g->stores.rate = config->disk_bytes ? config->disk_writes_per_s : 0;
    g->disk_path = lb_strdup(config->disk_path ? config->disk_path : "");
    g->nic.out = g->nic.in = g->shared_fd = -1;
    g->name = lb_strdup(name ? name : "fake");
    pthread_mutex_init(&g->lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&g->wake, &attr);
    pthread_condattr_destroy(&attr);

    if (!good_size(g->config.ram_bytes) || !good_size(g->config.vram_bytes) ||
        g->config.random_bytes < 32 || g->config.random_bytes > LB_PAGE_SIZE ||
        g->config.disk_bytes % LB_PAGE_SIZE) {
        lb_fail(err, LB_E_USAGE, "fake: %s: impossible sizes", g->name);
    } else if (block_open(&g->blocks[MAIN], MAIN, "fake.ram", LB_RAM_MAIN, g->config.ram_bytes,
                          err) == 0 &&
               block_open(&g->blocks[VRAM], VRAM, "fake.vram", LB_RAM_DEVICE,
                          g->config.vram_bytes, err) == 0) {
        for (unsigned i = 0; i < N_BLOCKS; i++) {
            g->table[i] = g->blocks[i].pub;
            g->table[i].map = g->config.no_map ? NULL : g->blocks[i].our_map;
        }
        return g;
    }
    guest_free(g);
    return NULL;
}

/* Give it an id and a thread and make it known.  On failure it is freed. */
static int guest_register(struct guest *g, bool attached, struct lb_error *err)
{
    pthread_mutex_lock(&registry_lock);
    g->id = ++last_id;
    g->attached = attached;
    snprintf(g->address, sizeof(g->address), "fake:%" PRIu64, g->id);
    if (!g->nonce) {
        g->nonce = lb_now_ns() ^ g->id << 48;
        g->rng = g->nonce;
    }
    if (!g->uuid[0])
        snprintf(g->uuid, sizeof(g->uuid), "00000000-0000-4000-8000-%012" PRIx64, g->id);
    int e = pthread_create(&g->worker, NULL, worker_main, g);
    if (e == 0) {
        g->next = guests;
        guests = g;
    }
    pthread_mutex_unlock(&registry_lock);
    if (e == 0)
        return 0;
    guest_free(g);
    return lb_fail_errno(err, LB_E_INTERNAL, e, "fake: cannot start a thread");
}

/* registry_lock held */
static void unlink_guest(struct guest *g)
{
    struct guest **at = &guests;
    while (*at != g)
        at = &(*at)->next;
    *at = g->next;
}

/* Not in the registry any more: wait for the worker and free. */
static void guest_end(struct guest *g)
{
    pthread_mutex_lock(&g->lock);
    g->quit = true;
    g->running = false;
    pthread_cond_broadcast(&g->wake);
    pthread_mutex_unlock(&g->lock);
    pthread_join(g->worker, NULL);
    guest_free(g);
}

static bool is_dead(struct guest *g)
{
    pthread_mutex_lock(&g->lock);
    bool dead = g->dead;
    pthread_mutex_unlock(&g->lock);
    return dead;
}

/* registry_lock held */
static struct guest *find_id(lb_fake_id id)
{
    for (struct guest *g = guests; g; g = g->next)
        if (g->id == id)
            return g;
    return NULL;
}

/* Let the guest run, when no other copy of the same machine has the disk. */
static int take_disk_and_run(struct guest *g, struct lb_error *err)
{
    struct guest *holder = NULL;

    pthread_mutex_lock(&registry_lock);
    for (struct guest *o = guests; o && !holder; o = o->next) {
        if (o == g || strcmp(o->uuid, g->uuid) || g->config.disk_bytes)
            continue; /* another machine, or each copy has a disk of its own */
        pthread_mutex_lock(&o->lock);
        if (o->holds_disk)
            holder = o;
        pthread_mutex_unlock(&o->lock);
    }
    if (holder) {
        lb_fail(err, LB_E_HV, "fake: %s: failed to get the write lock of the disk, %s has it",
                g->address, holder->address);
        lb_remedy(err, "stop the other copy of %s", g->name);
    } else {
        pthread_mutex_lock(&g->lock);
        g->holds_disk = true;
        if (!g->running)
            start_paces(g);
        g->running = !g->dead;
        pthread_cond_broadcast(&g->wake);
        pthread_mutex_unlock(&g->lock);
    }
    pthread_mutex_unlock(&registry_lock);
    return holder ? -1 : 0;
}

/* ---------------------------------------------------------------- test API */

int lb_fake_start(const struct lb_fake_config *config, lb_fake_id *out, struct lb_error *err)
{
    struct guest *g = guest_new(config->name, config, err);
    if (!g)
        return -1;
    if (config->touched_pages > g->blocks[MAIN].n_pages) {
        guest_free(g);
        return lb_fail(err, LB_E_USAGE, "fake: more touched pages than memory");
    }
    g->nonce = lb_now_ns() | 1;
    g->rng = g->nonce;
    for (uint64_t i = 0; i < config->touched_pages; i++)
        write_page(g, MAIN, i);
    g->holds_disk = true;
    g->running = !config->start_paused;
    start_paces(g);
    if (guest_register(g, false, err) < 0)
        return -1;
    *out = g->id;
    return 0;
}

lb_fake_id lb_fake_of(struct lb_hv_vm *vm)
{
    assert(vm->base.ops == &lb_hv_fake);
    return vm->guest->id;
}

const char *lb_fake_address(lb_fake_id id, char buf[32])
{
    snprintf(buf, 32, "fake:%" PRIu64, id);
    return buf;
}

struct guest *lb_fake_hold(lb_fake_id id, struct lb_error *err)
{
    pthread_mutex_lock(&registry_lock);
    struct guest *g = find_id(id);
    if (!g) {
        pthread_mutex_unlock(&registry_lock);
        lb_fail(err, LB_E_NOT_FOUND, "fake: there is no guest fake:%" PRIu64, id);
        return NULL;
    }
    pthread_mutex_lock(&g->lock);
    return g;
}

void lb_fake_let_go(struct guest *g)
{
    pthread_mutex_unlock(&g->lock);
    pthread_mutex_unlock(&registry_lock);
}

int lb_fake_kill(lb_fake_id id, struct lb_error *err)
{
    struct guest *g = lb_fake_hold(id, err);
    if (!g)
        return -1;
    pthread_mutex_unlock(&g->lock);
    guest_die(g);
    bool free_it = !g->attached; /* a handle frees it by detach or destroy */
    if (free_it)
        unlink_guest(g);
    pthread_mutex_unlock(&registry_lock);
    if (free_it)
        guest_end(g);
    return 0;
}

int lb_fake_power_off(lb_fake_id id, struct lb_error *err)
{
    struct guest *g = lb_fake_hold(id, err);
    if (!g)
        return -1;
    g->powered_off = true;
    lb_fake_let_go(g);
    return lb_fake_kill(id, err);
}

int lb_fake_set_rate(lb_fake_id id, uint64_t rate_pages_per_s, struct lb_error *err)
{
    struct guest *g = lb_fake_hold(id, err);
    if (!g)
        return -1;
    g->pages.rate = rate_pages_per_s;
    g->pages.from_ns = lb_now_ns();
    pthread_cond_broadcast(&g->wake);
    lb_fake_let_go(g);
    return 0;
}

int lb_fake_touch(lb_fake_id id, unsigned block, uint64_t page, struct lb_error *err)
{
    struct guest *g = lb_fake_hold(id, err);
    if (!g)
        return -1;
    assert(block < N_BLOCKS && page < g->blocks[block].n_pages);
    bool there = block != MAIN || lb_fake_page_wait(g, page, false);
    if (there)
        write_page(g, block, page);
    lb_fake_let_go(g);
    return there ? 0 : lb_fail(err, LB_E_HV, "fake: page %" PRIu64 " is missing", page);
}

int lb_fake_verify(lb_fake_id id, uint64_t *bad_pages, struct lb_error *err)
{
    static const uint8_t zeros[LB_PAGE_SIZE];
    uint8_t want[LB_PAGE_SIZE];
    uint64_t bad = 0;
    bool served = true;
    struct guest *g = lb_fake_hold(id, err);

    if (!g)
        return -1;
    for (unsigned i = 0; i < N_BLOCKS; i++) {
        const struct fake_block *b = &g->blocks[i];
        for (uint64_t page = 0; page < b->n_pages; page++) {
            const uint8_t *expected = zeros;
            if (i == MAIN && served) /* it may be written meanwhile */
                served = lb_fake_page_wait(g, page, false);
            if (b->seq[page]) {
                stamp(want, g->nonce, g->config.random_bytes, i, page, b->seq[page]);
                expected = want;
            }
            if (!served || memcmp(b->guest_map + page * LB_PAGE_SIZE, expected, LB_PAGE_SIZE))
                bad++;
        }
    }
    lb_fake_let_go(g);
    *bad_pages = bad;
    return 0;
}

int lb_fake_stats(lb_fake_id id, struct lb_fake_stats *out, struct lb_error *err)
{
    struct guest *g = lb_fake_hold(id, err);
    if (!g)
        return -1;
    *out = (struct lb_fake_stats){
        .alive = !g->dead,
        .running = g->running,
        .holds_disk = g->holds_disk,
        .attached = g->attached,
        .throttle_percent = g->throttle_percent,
        .writes = g->writes,
        .announces = g->announces,
        .nonce = g->nonce,
        .frozen = g->frozen,
        .checkpoint_mode = g->checkpoint_mode,
        .nic_held = g->nic.held,
        .mirroring = g->mirror.on && !g->mirror.failed,
        .frames = g->frames,
        .frames_blocked = g->nic.blocked,
        .frames_dropped = g->nic.dropped,
        .disk_writes = g->disk_writes,
        .clock_stepped_ns = g->clock_stepped_ns,
        .missing = g->lazy ? lb_bitmap_count(&g->missing) : 0,
    };
    lb_fake_let_go(g);
    return 0;
}

static unsigned count(const char *name, bool running_only)
{
    unsigned n = 0;
    pthread_mutex_lock(&registry_lock);
    for (struct guest *g = guests; g; g = g->next) {
        pthread_mutex_lock(&g->lock);
        if (!g->dead && ((g->running && !g->frozen) || !running_only) && (!name || !strcmp(name, g->name)))
            n++;
        pthread_mutex_unlock(&g->lock);
    }
    pthread_mutex_unlock(&registry_lock);
    return n;
}

unsigned lb_fake_count(const char *name)
{
    return count(name, false);
}

unsigned lb_fake_running(const char *name)
{
    return count(name, true);
}

unsigned lb_fake_reset(void)
{
    struct guest *gone = NULL;
    unsigned left = 0;

    pthread_mutex_lock(&registry_lock);
    for (struct guest **at = &guests; *at;) {
        struct guest *g = *at;
        left++;
        if (g->attached) {
            at = &g->next;
            continue;
        }
        *at = g->next;
        g->next = gone;
        gone = g;
    }
    pthread_mutex_unlock(&registry_lock);
    while (gone) {
        struct guest *next = gone->next;
        guest_end(gone);
        gone = next;
    }
    pthread_mutex_lock(&fault_lock);
    memset(faults, 0, sizeof(faults));
    pthread_mutex_unlock(&fault_lock);
    lb_fake_io_reset();
    return left;
}

/* ------------------------------------------------------------ slots: source */

int lb_fake_find(const struct lb_vm_ident *ident, struct lb_hv_vm **out, struct lb_error *err)
{
    struct guest *found = NULL;
    unsigned matches = 0;
    bool taken = false, paused = false;
    pthread_mutex_lock(&registry_lock);
    for (struct guest *g = guests; g; g = g->next) {
        if (ident->qmp_path ? !strcmp(g->address, ident->qmp_path)
                            : ident->name && !strcmp(g->name, ident->name)) {
            if (is_dead(g))
                continue;
            found = g;
            matches++;
        }
    }
    if (matches == 1) {
        taken = found->attached;
        found->attached = true;
        pthread_mutex_lock(&found->lock);
        paused = !found->running;
        pthread_mutex_unlock(&found->lock);
    }
    pthread_mutex_unlock(&registry_lock);

    const char *what = ident->qmp_path ? ident->qmp_path : ident->name ? ident->name : "(no name)";
    if (matches == 0)
        return lb_fail(err, LB_E_NOT_FOUND, "fake: there is no guest %s", what);
    if (matches > 1) {
        lb_fail(err, LB_E_STATE, "fake: %u guests have the name %s", matches, what);
        return lb_remedy(err, "give the address (fake:N) of one of them");
    }
    if (taken) {
        lb_fail(err, LB_E_STATE, "fake: %s is already attached", what);
        return lb_remedy(err, "detach the other handle first");
    }
    struct lb_hv_vm *vm = lb_alloc(sizeof(*vm));
    vm->guest = found;
    vm->base.state = paused ? LB_HV_STOPPED : LB_HV_RUNNING;
    *out = vm;
    return 0;
}

static int fake_attach(const struct lb_vm_ident *ident, struct lb_hv_vm **out,
                       struct lb_error *err)
{
    return lb_fake_enter(LB_FAKE_ATTACH, NULL, err) < 0 ? -1 : lb_fake_find(ident, out, err);
}

static char **features(void)
{
    char **v = lb_alloc(3 * sizeof(*v));
    v[0] = lb_strdup("fake-paging");
    v[1] = lb_strdup("fake-sse");
    return v;
}

static int fake_cpu_features(struct lb_hv_vm *vm, char ***out, struct lb_error *err)
{
    if (lb_fake_enter(LB_FAKE_CPU_FEATURES, vm->guest, err) < 0)
        return -1;
    *out = features();
    return 0;
}

static int fake_describe(struct lb_hv_vm *vm, struct lb_vm_desc *out, struct lb_error *err)
{
    struct guest *g = vm->guest;
    struct utsname host;

    if (lb_fake_enter(LB_FAKE_DESCRIBE, g, err) < 0)
        return -1;
    char **argv = lb_alloc(13 * sizeof(*argv));
    argv[0] = lb_strdup("fake-guest");
    argv[1] = lb_asprintf("vram_bytes=%" PRIu64, g->config.vram_bytes);
    argv[2] = lb_asprintf("rate_pages_per_s=%" PRIu64, g->pages.rate);
    argv[3] = lb_asprintf("working_set_pages=%" PRIu64, g->config.working_set_pages);
    argv[4] = lb_asprintf("random_bytes=%" PRIu32, g->config.random_bytes);
    argv[5] = lb_asprintf("state_bytes=%" PRIu32, g->config.state_bytes);
    argv[6] = lb_asprintf("no_map=%d", g->config.no_map);
    argv[7] = lb_asprintf("nic=%d", g->config.nic);
    argv[8] = lb_asprintf("frames_per_s=%" PRIu64, g->config.frames_per_s);
    argv[9] = lb_asprintf("disk_bytes=%" PRIu64, g->config.disk_bytes);
    argv[10] = lb_asprintf("disk_writes_per_s=%" PRIu64, g->config.disk_writes_per_s);
    argv[11] = lb_asprintf("no_clock=%d", g->config.no_clock);
    uname(&host);
    *out = (struct lb_vm_desc){
        .name = lb_strdup(g->name),
        .hypervisor = lb_strdup("fake"),
        .hv_version = lb_strdup("1.0"),
        .emulator = lb_strdup("/bin/true"),
        .argv = argv,
        .cwd = lb_strdup("/"),
        .uid = getuid(),
        .gid = getgid(),
        .machine = lb_strdup("fake-1.0"),
        .accel = lb_strdup("tcg"),
        .cpu_model = lb_strdup("fake-cpu"),
        .vcpus = 1,
        .ram_bytes = g->config.ram_bytes,
        .uuid = lb_strdup(g->uuid),
        .features = features(),
        .blockers = lb_alloc(sizeof(char *)),
        .kernel_release = lb_strdup(host.release),
    };
    return 0;
}

static int fake_blocks(struct lb_hv_vm *vm, const struct lb_ram_block **out, unsigned *n,
                       struct lb_error *err)
{
    if (lb_fake_enter(LB_FAKE_BLOCKS, vm->guest, err) < 0)
        return -1;
    *out = vm->guest->table;
    *n = N_BLOCKS;
    return 0;
}

static void set_logging(struct guest *g, bool on)
{
    pthread_mutex_lock(&g->lock);
    g->logging = on;
    for (unsigned i = 0; i < N_BLOCKS; i++)
        lb_bitmap_clear_all(&g->blocks[i].dirty);
    pthread_mutex_unlock(&g->lock);
}

static int fake_log_enable(struct lb_hv_vm *vm, struct lb_error *err)
{
    if (lb_fake_enter(LB_FAKE_LOG_ENABLE, vm->guest, err) < 0)
        return -1;
    set_logging(vm->guest, true);
    return 0;
}

static int fake_log_disable(struct lb_hv_vm *vm, struct lb_error *err)
{
    if (lb_fake_enter(LB_FAKE_LOG_DISABLE, vm->guest, err) < 0)
        return -1;
    set_logging(vm->guest, false);
    return 0;
}

static struct fake_block *block_of(struct guest *g, const struct lb_ram_block *blk)
{
    assert(blk->id < N_BLOCKS && blk == &g->table[blk->id]);
    return &g->blocks[blk->id];
}

static int fake_log_clean(struct lb_hv_vm *vm, const struct lb_ram_block *blk,
                          struct lb_bitmap *dirty, struct lb_error *err)
{
    struct guest *g = vm->guest;
    if (lb_fake_enter(LB_FAKE_LOG_CLEAN, g, err) < 0)
        return -1;
    struct fake_block *b = block_of(g, blk);
    pthread_mutex_lock(&g->lock);
    lb_bitmap_or(dirty, &b->dirty);
    lb_bitmap_clear_all(&b->dirty);
    pthread_mutex_unlock(&g->lock);
    return 0;
}

static int fake_log_peek(struct lb_hv_vm *vm, const struct lb_ram_block *blk, uint64_t first,
                         uint64_t n, struct lb_bitmap *dirty, struct lb_error *err)
{
    struct guest *g = vm->guest;
    if (lb_fake_enter(LB_FAKE_LOG_PEEK, g, err) < 0)
        return -1;
    struct fake_block *b = block_of(g, blk);
    uint64_t at = first, run_first, run;
    pthread_mutex_lock(&g->lock);
    while (at < first + n && lb_bitmap_next_run(&b->dirty, at, first + n - at, &run_first, &run) &&
           run_first < first + n) {
        run = LB_MIN(run, first + n - run_first);
        lb_bitmap_set_range(dirty, run_first - first, run);
        at = run_first + run;
    }
    pthread_mutex_unlock(&g->lock);
    return 0;
}

static int fake_populated(struct lb_hv_vm *vm, const struct lb_ram_block *blk,
                          struct lb_bitmap *pages, struct lb_error *err)
{
    struct guest *g = vm->guest;
    if (lb_fake_enter(LB_FAKE_POPULATED, g, err) < 0)
        return -1;
    struct fake_block *b = block_of(g, blk);
    off_t at = 0, size = (off_t)b->pub.size_bytes;
    while (at < size) {
        off_t data = lseek(b->fd, at, SEEK_DATA);
        if (data < 0 && errno == ENXIO)
            break;
        off_t hole = data < 0 ? -1 : lseek(b->fd, data, SEEK_HOLE);
        if (hole < 0)
            return lb_fail_errno(err, LB_E_INTERNAL, errno, "fake: cannot find the data of %s",
                                 b->pub.name);
        uint64_t first = (uint64_t)data / LB_PAGE_SIZE;
        uint64_t end = ((uint64_t)hole + LB_PAGE_SIZE - 1) / LB_PAGE_SIZE;
        lb_bitmap_set_range(pages, first, end - first);
        at = hole;
    }
    return 0;
}

static int fake_read(struct lb_hv_vm *vm, const struct lb_ram_block *blk, uint64_t first_page,
                     uint64_t n_pages, void *buf, struct lb_error *err)
{
    if (lb_fake_enter(LB_FAKE_READ, vm->guest, err) < 0)
        return -1;
    struct fake_block *b = block_of(vm->guest, blk);
    memcpy(buf, b->our_map + first_page * LB_PAGE_SIZE, n_pages * LB_PAGE_SIZE);
    return 0;
}

static int fake_read_pages(struct lb_hv_vm *vm, const struct lb_ram_block *blk,
                           const uint32_t *pages, uint64_t n, void *buf, struct lb_error *err)
{
    if (lb_fake_enter(LB_FAKE_READ, vm->guest, err) < 0)
        return -1;
    struct fake_block *b = block_of(vm->guest, blk);
    for (uint64_t i = 0; i < n; i++)
        memcpy((uint8_t *)buf + i * LB_PAGE_SIZE, b->our_map + (size_t)pages[i] * LB_PAGE_SIZE,
               LB_PAGE_SIZE);
    return 0;
}

static int fake_stop(struct lb_hv_vm *vm, struct lb_error *err)
{
    struct guest *g = vm->guest;
    if (lb_fake_enter(LB_FAKE_STOP, g, err) < 0)
        return -1;
    pthread_mutex_lock(&g->lock); /* the worker is between two pages now */
    g->running = false;
    pthread_mutex_unlock(&g->lock);
    return leave(LB_FAKE_STOP, 0, err);
}

static int fake_cont(struct lb_hv_vm *vm, struct lb_error *err)
{
    if (lb_fake_enter(LB_FAKE_CONT, vm->guest, err) < 0)
        return -1;
    return leave(LB_FAKE_CONT, take_disk_and_run(vm->guest, err), err);
}

static int fake_save_begin(struct lb_hv_vm *vm, bool final, struct lb_error *err)
{
    struct guest *g = vm->guest;
    if (lb_fake_enter(LB_FAKE_SAVE_BEGIN, g, err) < 0)
        return -1;
    if (final) {
        pthread_mutex_lock(&g->lock);
        g->holds_disk = false;
        pthread_mutex_unlock(&g->lock);
    }
    return 0;
}

static size_t tables_bytes(const struct guest *g)
{
    return (size_t)(g->blocks[MAIN].n_pages + g->blocks[VRAM].n_pages) * sizeof(uint32_t);
}

static int fake_save_end(struct lb_hv_vm *vm, void **buf, size_t *len, struct lb_error *err)
{
    struct guest *g = vm->guest;
    if (lb_fake_enter(LB_FAKE_SAVE_END, g, err) < 0)
        return -1;
    size_t body = sizeof(struct state_header) + tables_bytes(g);
    size_t total = LB_MAX(body + sizeof(uint64_t), (size_t)g->config.state_bytes);
    uint8_t *blob = lb_try_alloc(total, err);
    if (!blob)
        return -1;

    pthread_mutex_lock(&g->lock);
    struct state_header head = {
        .magic = STATE_MAGIC,
        .nonce = g->nonce,
        .rng = g->rng,
        .writes = g->writes,
        .frames = g->frames,
        .disk_writes = g->disk_writes,
        .n_pages = {g->blocks[MAIN].n_pages, g->blocks[VRAM].n_pages},
        .next_seq = g->next_seq,
        .random_bytes = g->config.random_bytes,
    };
    memcpy(blob, &head, sizeof(head));
    size_t at = sizeof(head);
    for (unsigned i = 0; i < N_BLOCKS; i++) {
        size_t bytes = (size_t)g->blocks[i].n_pages * sizeof(uint32_t);
        memcpy(blob + at, g->blocks[i].seq, bytes);
        at += bytes;
    }
    pthread_mutex_unlock(&g->lock);

    uint64_t sum = XXH3_64bits(blob, total - sizeof(sum));
    memcpy(blob + total - sizeof(sum), &sum, sizeof(sum));
    *buf = blob;
    *len = total;
    return 0;
}

static int fake_throttle(struct lb_hv_vm *vm, unsigned percent, struct lb_error *err)
{
    struct guest *g = vm->guest;
    if (lb_fake_enter(LB_FAKE_THROTTLE, g, err) < 0)
        return -1;
    pthread_mutex_lock(&g->lock);
    g->throttle_percent = percent;
    pthread_mutex_unlock(&g->lock);
    return 0;
}

static int fake_checkpoint_mode(struct lb_hv_vm *vm, bool on, struct lb_error *err)
{
    struct guest *g = vm->guest;
    if (lb_fake_enter(LB_FAKE_CHECKPOINT_MODE, g, err) < 0)
        return -1;
    pthread_mutex_lock(&g->lock);
    g->checkpoint_mode = on;
    pthread_mutex_unlock(&g->lock);
    return 0;
}

static int fake_freeze(struct lb_hv_vm *vm, bool on, struct lb_error *err)
{
    struct guest *g = vm->guest;
    if (lb_fake_enter(LB_FAKE_FREEZE, g, err) < 0)
        return -1;
    pthread_mutex_lock(&g->lock); /* the worker is between two things now */
    g->frozen = on;
    start_paces(g);
    pthread_cond_broadcast(&g->wake);
    pthread_mutex_unlock(&g->lock);
    return 0;
}

/* ---------------------------------------------------------- slots: receiver */

/* "key=number" out of the words of a description; missing is 0. */
static int word_value(char **argv, const char *key, uint64_t max, uint64_t *out,
                      struct lb_error *err)
{
    size_t len = strlen(key);
    *out = 0;
    for (char **word = argv; word && *word; word++) {
        if (strncmp(*word, key, len) || (*word)[len] != '=')
            continue;
        const char *digits = *word + len + 1;
        char *end;
        errno = 0;
        *out = strtoull(digits, &end, 10);
        if (errno || end == digits || *end || *digits == '-' || *out > max)
            return lb_fail(err, LB_E_PROTO, "fake: \"%s\" is not valid", *word);
    }
    return 0;
}

static int fake_launch(const struct lb_vm_desc *desc, const struct lb_launch_opts *opts,
                       struct lb_hv_vm **out, struct lb_error *err)
{
    uint64_t vram, rate, set, random_bytes, state, no_map, nic, sends, disk, stores, no_clock;

    if (lb_fake_enter(LB_FAKE_LAUNCH, NULL, err) < 0)
        return -1;
    if (!desc->hypervisor || strcmp(desc->hypervisor, "fake"))
        return lb_fail(err, LB_E_UNSUPPORTED, "fake: cannot run a guest of %s",
                       desc->hypervisor ? desc->hypervisor : "(nothing)");
    if (!desc->uuid || strlen(desc->uuid) >= sizeof(((struct guest *)0)->uuid) ||
        !good_size(desc->ram_bytes))
        return lb_fail(err, LB_E_PROTO, "fake: the description has no valid uuid or memory size");
    if (word_value(desc->argv, "vram_bytes", UINT64_MAX, &vram, err) < 0 ||
        word_value(desc->argv, "rate_pages_per_s", 1u << 30, &rate, err) < 0 ||
        word_value(desc->argv, "working_set_pages", UINT64_MAX, &set, err) < 0 ||
        word_value(desc->argv, "random_bytes", LB_PAGE_SIZE, &random_bytes, err) < 0 ||
        word_value(desc->argv, "state_bytes", 1u << 30, &state, err) < 0 ||
        word_value(desc->argv, "no_map", 1, &no_map, err) < 0 ||
        word_value(desc->argv, "nic", 1, &nic, err) < 0 ||
        word_value(desc->argv, "frames_per_s", 1u << 30, &sends, err) < 0 ||
        word_value(desc->argv, "disk_bytes", UINT64_C(1) << 40, &disk, err) < 0 ||
        word_value(desc->argv, "disk_writes_per_s", 1u << 30, &stores, err) < 0 ||
        word_value(desc->argv, "no_clock", 1, &no_clock, err) < 0)
        return -1;
    struct lb_fake_config config = {
        .ram_bytes = desc->ram_bytes,
        .vram_bytes = vram,
        .rate_pages_per_s = rate,
        .working_set_pages = set,
        .random_bytes = (uint32_t)random_bytes,
        .state_bytes = (uint32_t)state,
        .no_map = no_map,
        .nic = nic,
        .frames_per_s = sends,
        .disk_bytes = disk,
        .disk_writes_per_s = stores,
        .no_clock = no_clock,
    };
    struct guest *g = guest_new(opts->name ? opts->name : desc->name, &config, err);
    if (!g)
        return -1;
    snprintf(g->uuid, sizeof(g->uuid), "%s", opts->new_uuid && *opts->new_uuid ? opts->new_uuid : desc->uuid);
    if (opts->shared_memory_fd)
        g->shared_fd = fcntl(opts->shared_memory_fd, F_DUPFD_CLOEXEC, 0);
    /* what firmware leaves in a machine that was switched on: prepare_ram has
     * to remove it, and a receiver that forgets to is found out by verify */
    memset(g->blocks[MAIN].guest_map, 0xf0, LB_MIN(g->config.ram_bytes, 16 * LB_PAGE_SIZE));
    if (guest_register(g, true, err) < 0)
        return -1;
    struct lb_hv_vm *vm = lb_alloc(sizeof(*vm));
    vm->guest = g;
    *out = vm;
    return 0;
}

static int fake_prepare_ram(struct lb_hv_vm *vm, struct lb_error *err)
{
    if (lb_fake_enter(LB_FAKE_PREPARE_RAM, vm->guest, err) < 0)
        return -1;
    struct fake_block *b = &vm->guest->blocks[MAIN];
    if (fallocate(b->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0,
                  (off_t)b->pub.size_bytes) < 0)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "fake: cannot empty %s", b->pub.name);
    if (vm->guest->shared_fd < 0)
        return 0;
    /* a private view is a copy here */
    for (uint64_t at = 0; at < b->pub.size_bytes;) {
        ssize_t n = pread(vm->guest->shared_fd, b->our_map + at, b->pub.size_bytes - at, (off_t)at);
        if (n <= 0)
            return lb_fail(err, LB_E_STATE, "fake: the shared memory is shorter than %s", b->pub.name);
        at += (uint64_t)n;
    }
    return 0;
}

static int fake_write(struct lb_hv_vm *vm, const struct lb_ram_block *blk, uint64_t first_page,
                      uint64_t n_pages, const void *buf, struct lb_error *err)
{
    if (lb_fake_enter(LB_FAKE_WRITE, vm->guest, err) < 0)
        return -1;
    struct fake_block *b = block_of(vm->guest, blk);
    memcpy(b->our_map + first_page * LB_PAGE_SIZE, buf, n_pages * LB_PAGE_SIZE);
    return 0;
}

static int fake_load_state(struct lb_hv_vm *vm, const void *buf, size_t len, struct lb_error *err)
{
    struct guest *g = vm->guest;
    struct state_header head;
    uint64_t sum;

    if (lb_fake_enter(LB_FAKE_LOAD_STATE, g, err) < 0)
        return -1;
    if (len < sizeof(head) + tables_bytes(g) + sizeof(sum))
        return lb_fail(err, LB_E_PROTO, "fake: device state of %zu bytes is cut short", len);
    const uint8_t *blob = buf;
    memcpy(&sum, blob + len - sizeof(sum), sizeof(sum));
    if (sum != XXH3_64bits(blob, len - sizeof(sum)))
        return lb_fail(err, LB_E_PROTO, "fake: device state has a wrong checksum");
    memcpy(&head, blob, sizeof(head));
    if (head.magic != STATE_MAGIC || head.n_pages[MAIN] != g->blocks[MAIN].n_pages ||
        head.n_pages[VRAM] != g->blocks[VRAM].n_pages ||
        head.random_bytes != g->config.random_bytes)
        return lb_fail(err, LB_E_PROTO, "fake: device state is of another machine");
    if (lb_fake_load_touches(g, err) < 0)
        return -1;

    pthread_mutex_lock(&g->lock);
    g->nonce = head.nonce;
    g->rng = head.rng;
    g->writes = head.writes;
    g->frames = head.frames;
    g->disk_writes = head.disk_writes;
    g->next_seq = head.next_seq;
    size_t at = sizeof(head);
    for (unsigned i = 0; i < N_BLOCKS; i++) {
        size_t bytes = (size_t)g->blocks[i].n_pages * sizeof(uint32_t);
        memcpy(g->blocks[i].seq, blob + at, bytes);
        at += bytes;
    }
    pthread_mutex_unlock(&g->lock);
    return 0;
}

static int fake_run(struct lb_hv_vm *vm, struct lb_error *err)
{
    if (lb_fake_enter(LB_FAKE_RUN, vm->guest, err) < 0)
        return -1;
    return leave(LB_FAKE_RUN, take_disk_and_run(vm->guest, err), err);
}

static int fake_announce(struct lb_hv_vm *vm, struct lb_error *err)
{
    struct guest *g = vm->guest;
    if (lb_fake_enter(LB_FAKE_ANNOUNCE, g, err) < 0)
        return -1;
    pthread_mutex_lock(&g->lock);
    g->announces++;
    pthread_mutex_unlock(&g->lock);
    return 0;
}

/* -------------------------------------------------------------- slots: both */

static int fake_status(struct lb_hv_vm *vm, bool *alive, bool *running, struct lb_error *err)
{
    struct guest *g = vm->guest;
    if (lb_fake_enter(LB_FAKE_STATUS, g, err) < 0)
        return -1;
    pthread_mutex_lock(&g->lock);
    *alive = !g->dead;
    *running = g->running;
    pthread_mutex_unlock(&g->lock);
    return 0;
}

static bool fake_shut_down(struct lb_hv_vm *vm)
{
    struct guest *g = vm->guest;
    pthread_mutex_lock(&g->lock);
    bool off = g->powered_off;
    pthread_mutex_unlock(&g->lock);
    return off;
}

static void fake_ident(struct lb_hv_vm *vm, struct lb_vm_ident *out)
{
    *out = (struct lb_vm_ident){.name = vm->guest->name, .qmp_path = vm->guest->address};
    /* the guest is this process; our own entry in /proc is always there */
    int rc = lb_proc_identify(getpid(), &out->proc, NULL);
    assert(rc == 0);
    (void)rc;
}

/* The id in "fake:N", 0 when ident names none. */
static lb_fake_id id_of(const struct lb_vm_ident *ident)
{
    lb_fake_id id = 0;
    if (ident->qmp_path && !strncmp(ident->qmp_path, "fake:", 5))
        id = strtoull(ident->qmp_path + 5, NULL, 10);
    return id;
}

static bool fake_exists(const struct lb_vm_ident *ident)
{
    struct lb_fake_stats st;
    return lb_fake_stats(id_of(ident), &st, NULL) == 0 && st.alive;
}

static int fake_end(const struct lb_vm_ident *ident, struct lb_error *err)
{
    return fake_exists(ident) ? lb_fake_kill(id_of(ident), err) : 0;
}

/* The handle goes; a dead guest goes with it. */
static void fake_detach(struct lb_hv_vm *vm)
{
    struct guest *g = vm->guest;
    set_logging(g, false);
    pthread_mutex_lock(&g->lock);
    g->throttle_percent = 0;
    g->checkpoint_mode = false;
    pthread_mutex_unlock(&g->lock);

    pthread_mutex_lock(&registry_lock);
    g->attached = false;
    bool dead = is_dead(g);
    if (dead)
        unlink_guest(g);
    pthread_mutex_unlock(&registry_lock);
    if (dead)
        guest_end(g);
    free(vm);
}

static int fake_destroy(struct lb_hv_vm *vm, struct lb_error *err)
{
    struct guest *g = vm->guest;
    int rc = lb_fake_enter(LB_FAKE_DESTROY, g, err);

    pthread_mutex_lock(&registry_lock);
    unlink_guest(g);
    pthread_mutex_unlock(&registry_lock);
    guest_end(g);
    free(vm);
    return rc;
}

const struct lb_hv_ops lb_hv_fake = {
    .name = "fake",
    .attach = fake_attach,
    .describe = fake_describe,
    .cpu_features = fake_cpu_features,
    .blocks = fake_blocks,
    .log_enable = fake_log_enable,
    .log_clean = fake_log_clean,
    .log_peek = fake_log_peek,
    .log_disable = fake_log_disable,
    .populated = fake_populated,
    .read = fake_read,
    .read_pages = fake_read_pages,
    .stop = fake_stop,
    .cont = fake_cont,
    .save_begin = fake_save_begin,
    .save_end = fake_save_end,
    .throttle = fake_throttle,
    .checkpoint_mode = fake_checkpoint_mode,
    .freeze = fake_freeze,
    .nics = lb_fake_nics,
    .nic_hold = lb_fake_nic_hold,
    .nic_unhold = lb_fake_nic_unhold,
    .disks = lb_fake_disks,
    .disk_mirror = lb_fake_disk_mirror,
    .disk_mirror_status = lb_fake_disk_mirror_status,
    .disk_mirror_end = lb_fake_disk_mirror_end,
    .disk_overlay = lb_fake_disk_overlay,
    .disk_freeze = lb_fake_disk_freeze,
    .disk_overlay_drop = lb_fake_disk_overlay_drop,
    .disk_join = lb_fake_disk_join,
    .clock_step = lb_fake_clock_step,
    .launch = fake_launch,
    .prepare_ram = fake_prepare_ram,
    .lazy_begin = lb_fake_lazy_begin,
    .lazy_attach = lb_fake_lazy_attach,
    .lazy_fault = lb_fake_lazy_fault,
    .lazy_place = lb_fake_lazy_place,
    .lazy_offer = lb_fake_lazy_offer,
    .lazy_touched = lb_fake_lazy_touched,
    .lazy_missing = lb_fake_lazy_missing,
    .lazy_end = lb_fake_lazy_end,
    .write = fake_write,
    .load_state = fake_load_state,
    .run = fake_run,
    .announce = fake_announce,
    .status = fake_status,
    .shut_down = fake_shut_down,
    .ident = fake_ident,
    .exists = fake_exists,
    .end = fake_end,
    .detach = fake_detach,
    .destroy = fake_destroy,
};
