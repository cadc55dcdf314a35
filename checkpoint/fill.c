/*
 * checkpoint/fill.c - memory that comes while the guest runs. See fill.h for the idea.
 *
 * A thread that cannot serve a page before `decided` says so in `fatal` and ends the receiver, which wakes the engine
 * thread wherever it waits for the hypervisor.  After `decided` nothing ends but with the VM itself.
 */
#include "checkpoint/fill.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/ioprio.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>

#define FAULT_WAIT_MS 50u
#define RETRY_S 5
#define YIELD_US 100u   /* how long the filler steps aside while somebody waits, at most YIELDS times a chunk */
#define YIELDS 20u
#define ZERO_AHEAD 16u  /* zero pages placed at once: who touches one goes on to the next */
#define FILL_NICE 10
#define FIRST_MS 300u         /* a guest that runs again has this long for itself; what it needs then is learned */
#define QUIET_MAX_MS 300u     /* and as much longer as pages are waited for, */
#define QUIET_NS UINT64_C(50000000) /* the last one less than this ago */
#define STEP_MS 10u

/* --------------------------------------------------------------------- what is there */

static bool is_present(const struct lb_fill *f, unsigned block, uint64_t page)
{
    return atomic_load_explicit(&f->present[block][page / 64], memory_order_relaxed) >> (page % 64) & 1;
}

static void set_present(struct lb_fill *f, unsigned block, uint64_t page)
{
    uint64_t bit = UINT64_C(1) << (page % 64);

    if (!(atomic_fetch_or(&f->present[block][page / 64], bit) & bit) &&
        lb_bitmap_test(&f->mem.populated[block], page))
        atomic_fetch_add(&f->placed_pages, 1);
}

static bool is_main(const struct lb_fill *f, unsigned block)
{
    return f->mem.blocks[block].kind == LB_RAM_MAIN;
}

/* Until the filler begins only what somebody waits for is placed, so that it can be told what was needed. */
static int place_run(struct lb_fill *f, unsigned block, uint64_t first, uint64_t n, const char *data,
                     struct lb_error *err)
{
    const struct lb_ram_block *blk = f->mem.map[block];
    int rc = atomic_load(&f->learning) ? lb_hv_lazy_offer(f->vm, blk, first, n, data, err)
                                       : lb_hv_lazy_place(f->vm, blk, first, n, data, NULL, err);

    for (uint64_t k = 0; !rc && k < n; k++)
        set_present(f, block, first + k);
    return rc;
}

/* lb_chain_pages_fn: those of the pages that are not there yet, in runs. */
static int place_pages(unsigned block, uint64_t first, uint64_t count, const void *data, void *arg,
                       struct lb_error *err)
{
    struct lb_fill *f = arg;

    if (!is_main(f, block))
        return 0;
    for (uint64_t i = 0, n; i < count; i += n) {
        n = 1;
        if (is_present(f, block, first + i))
            continue;
        while (i + n < count && !is_present(f, block, first + i + n))
            n++;
        if (place_run(f, block, first + i, n, (const char *)data + (i << LB_PAGE_SHIFT), err))
            return -1;
    }
    return 0;
}

/* ------------------------------------------------------------------- failures */

/* Locked: the guest waits for what cannot be read; the engine thread tells. */
static void note_damage(struct lb_fill *f, const struct lb_error *why)
{
    if (strcmp(f->damage.message, why->message)) {
        f->damage = *why;
        f->damage_seq++;
    }
}

/* Somebody waits and cannot be served. */
static void cannot_serve(struct lb_fill *f, const struct lb_error *why)
{
    struct lb_vm_ident id = lb_ckpt_ident(&f->entry);
    bool end = false;

    pthread_mutex_lock(&f->mu);
    if (f->decided) {
        note_damage(f, why);
    } else if (f->fatal.code == LB_OK) {
        f->fatal = *why;
        end = true;
    }
    pthread_mutex_unlock(&f->mu);
    if (end && lb_hv_end(f->env.hv, &id, NULL))
        lb_log(LB_LOG_ERROR, "the receiver of VM %s cannot be ended", f->entry.name);
}

static bool vm_gone(struct lb_fill *f)
{
    struct lb_vm_ident id = lb_ckpt_ident(&f->entry);

    return !lb_hv_exists(f->env.hv, &id);
}

int lb_fill_decide(struct lb_fill *f, bool decide, struct lb_error *err)
{
    int rc = 0;

    pthread_mutex_lock(&f->mu);
    if (f->fatal.code == LB_OK) {
        f->decided |= decide;
    } else {
        rc = -1;
        if (err)
            *err = f->fatal;
    }
    pthread_mutex_unlock(&f->mu);
    return rc;
}

/* ---------------------------------------------------------------------- faults */

static void remember_fault(struct lb_fill *f, unsigned block, uint64_t page)
{
    atomic_store(&f->last_fault_ns, lb_now_ns());
    pthread_mutex_lock(&f->mu);
    if (atomic_load(&f->learning) && f->n_faults < LB_WS_MAX_PAGES)
        f->faults[f->n_faults++] = lb_page_key(block, page);
    pthread_mutex_unlock(&f->mu);
}

static int serve_zeros(struct lb_fill *f, unsigned block, uint64_t page, struct lb_error *err)
{
    uint64_t n = 1, max = LB_MIN((uint64_t)ZERO_AHEAD, f->mem.blocks[block].n_pages - page);

    while (n < max && !lb_bitmap_test(&f->mem.populated[block], page + n) && !is_present(f, block, page + n))
        n++;
    if (lb_hv_lazy_place(f->vm, f->mem.map[block], page, n, NULL, NULL, err))
        return -1;
    for (uint64_t k = 0; k < n; k++)
        set_present(f, block, page + k);
    return 0;
}

struct wanted {
    struct lb_fill *f;
    unsigned block;
    uint64_t page;
};

/* lb_chain_pages_fn: the page that somebody waits for before the others, and whether it has come meanwhile or not: only
 * so he wakes for certain. */
static int place_wanted(unsigned block, uint64_t first, uint64_t count, const void *data, void *arg,
                        struct lb_error *err)
{
    const struct wanted *w = arg;
    uint64_t at = w->page - first;

    if (block == w->block && w->page >= first && at < count) {
        if (lb_hv_lazy_place(w->f->vm, w->f->mem.map[block], w->page, 1, (const char *)data + (at << LB_PAGE_SHIFT), NULL,
                             err))
            return -1;
        set_present(w->f, block, w->page);
    }
    return place_pages(block, first, count, data, w->f, err);
}

static int serve(struct lb_fill *f, unsigned block, uint64_t page, struct lb_error *err)
{
    struct wanted w = {f, block, page};

    /* There and missing again: the guest gave it back (a balloon), and gets a new one. */
    if (is_present(f, block, page))
        return lb_hv_lazy_place(f->vm, f->mem.map[block], page, 1, NULL, NULL, err);
    if (!lb_bitmap_test(&f->mem.populated[block], page))
        return serve_zeros(f, block, page, err);
    remember_fault(f, block, page);
    return lb_chain_read(f->chain, block, page, place_wanted, &w, err);
}

static int block_of(const struct lb_fill *f, const struct lb_ram_block *blk)
{
    for (unsigned i = 0; i < f->mem.n; i++)
        if (f->mem.map[i] == blk)
            return (int)i;
    return -1;
}

/* One fault; -1: the hypervisor is gone, or we cannot ask it. */
static int serve_next(struct lb_fill *f, struct lb_error *err)
{
    const struct lb_ram_block *blk;
    struct lb_error why = LB_ERROR_INIT;
    uint64_t page;
    int got = lb_hv_lazy_fault(f->vm, FAULT_WAIT_MS, &blk, &page, err);
    int block = got > 0 ? block_of(f, blk) : -1, rc;

    if (got <= 0 || block < 0)
        return got < 0 ? -1 : 0;
    atomic_fetch_add(&f->waiting, 1);
    rc = serve(f, (unsigned)block, page, &why);
    atomic_fetch_sub(&f->waiting, 1);
    if (rc)
        cannot_serve(f, &why); /* the filler tries it again */
    return 0;
}

static void *server_main(void *arg)
{
    struct lb_fill *f = arg;

    lb_thread_realtime();
    while (!atomic_load(&f->quit)) {
        struct lb_error err = LB_ERROR_INIT;

        if (!serve_next(f, &err))
            continue;
        if (vm_gone(f))
            return NULL;
        cannot_serve(f, &err);
        lb_sleep_ms(FAULT_WAIT_MS);
    }
    return NULL;
}

/* ---------------------------------------------------------------------- filling */

/* Threads made from here on inherit it. */
static void be_modest(void)
{
    setpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid), FILL_NICE);
    syscall(SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, IOPRIO_PRIO_VALUE(IOPRIO_CLASS_BE, 7));
}

static void step_aside(struct lb_fill *f)
{
    for (unsigned i = 0; i < YIELDS && atomic_load(&f->waiting); i++)
        usleep(YIELD_US);
}

/* The point is reached by one thread while the others wait: half of the memory stays missing there. */
static void point_half(struct lb_fill *f)
{
    pthread_mutex_lock(&f->half);
    bool now = !f->half_said && 2 * atomic_load(&f->placed_pages) >= f->mem.populated_pages;
    f->half_said |= now;
    if (now)
        lb_point("fill-half");
    pthread_mutex_unlock(&f->half);
}

static int fill_pages(unsigned block, uint64_t first, uint64_t count, const void *data, void *arg,
                      struct lb_error *err)
{
    struct lb_fill *f = arg;

    if (atomic_load(&f->quit))
        return lb_fail(err, LB_E_CANCELLED, "stopped");
    step_aside(f);
    point_half(f);
    return place_pages(block, first, count, data, f, err);
}

static bool not_needed(unsigned block, uint64_t page, void *arg)
{
    const struct lb_fill *f = arg;

    return !is_main(f, block) || is_present(f, block, page);
}

static void fill_hot(struct lb_fill *f)
{
    for (uint64_t i = 0; i < f->n_hot && !atomic_load(&f->quit); i++) {
        unsigned block = lb_key_block(f->hot[i]);
        uint64_t page = lb_key_page(f->hot[i]);

        if (block >= f->mem.n || page >= f->mem.blocks[block].n_pages || !is_main(f, block) ||
            !lb_bitmap_test(&f->mem.populated[block], page) || is_present(f, block, page))
            continue;
        step_aside(f);
        if (lb_chain_read(f->chain, block, page, place_pages, f, NULL))
            return; /* a hint: who needs it will say so */
    }
}

static bool wait_go(struct lb_fill *f)
{
    pthread_mutex_lock(&f->mu);
    while (!f->go && !atomic_load(&f->quit))
        pthread_cond_wait(&f->cond, &f->mu);
    pthread_mutex_unlock(&f->mu);
    return !atomic_load(&f->quit);
}

/* The guest has just begun to run: the processors, the disk and QEMU's page table are for what it asks for. */
static bool wait_first(struct lb_fill *f)
{
    for (unsigned ms = 0; ms < FIRST_MS && !atomic_load(&f->quit); ms += STEP_MS)
        lb_sleep_ms(STEP_MS);
    return !atomic_load(&f->quit);
}

/* One that goes on waiting for page after page is better served with all of them. */
static bool wait_quiet(struct lb_fill *f)
{
    for (unsigned ms = 0; ms < QUIET_MAX_MS && !atomic_load(&f->quit); ms += STEP_MS) {
        uint64_t now = lb_now_ns(), last = atomic_load(&f->last_fault_ns);

        if (now > last && now - last >= QUIET_NS)
            break;
        lb_sleep_ms(STEP_MS);
    }
    return !atomic_load(&f->quit);
}

/* Pages of the block that were touched, as far as there is room; those in faults[] are in front already. */
static void add_touched(struct lb_fill *f, unsigned block, const struct lb_bitmap *touched, uint64_t n_faults)
{
    struct lb_bitmap left = {0};
    uint64_t first, n;

    if (lb_bitmap_init(&left, touched->n_bits, NULL))
        return;
    lb_bitmap_or(&left, touched);
    for (uint64_t i = 0; i < n_faults; i++)
        if (lb_key_block(f->faults[i]) == block)
            lb_bitmap_clear(&left, lb_key_page(f->faults[i]));
    for (uint64_t at = 0; f->n_faults < LB_WS_MAX_PAGES && lb_bitmap_next_run(&left, at, 1, &first, &n); at = first + 1)
        if (lb_bitmap_test(&f->mem.populated[block], first))
            f->faults[f->n_faults++] = lb_page_key(block, first);
    lb_bitmap_free(&left);
}

/* What the guest needed first is known now: what it waited for, then what it found there. faults[] is ours from here on. */
static void end_learning(struct lb_fill *f)
{
    struct lb_error why = LB_ERROR_INIT;
    uint64_t n_faults;

    pthread_mutex_lock(&f->mu);
    atomic_store(&f->learning, false);
    n_faults = f->n_faults;
    pthread_mutex_unlock(&f->mu);
    f->learned = true;
    for (unsigned b = 0; b < f->mem.n && f->learned; b++) {
        struct lb_bitmap touched = {0};

        if (!is_main(f, b))
            continue;
        f->learned = !lb_bitmap_init(&touched, f->mem.blocks[b].n_pages, &why) &&
                     !lb_hv_lazy_touched(f->vm, f->mem.map[b], &touched, &why);
        if (f->learned)
            add_touched(f, b, &touched, n_faults);
        lb_bitmap_free(&touched);
    }
    if (!f->learned)
        lb_log_error(LB_LOG_DEBUG, &why);
    lb_log(LB_LOG_INFO, "VM %s has waited for %llu pages, of %llu that it needed first; %llu were expected", f->entry.name,
           (unsigned long long)n_faults, (unsigned long long)f->n_faults, (unsigned long long)f->n_hot);
}

/* Every page that is still missing, by itself; those that cannot be read stay. */
static uint64_t fill_rest(struct lb_fill *f)
{
    struct lb_error first_error = LB_ERROR_INIT;
    uint64_t bad = 0;

    for (unsigned b = 0; b < f->mem.n; b++)
        for (uint64_t page = 0; is_main(f, b) && page < f->mem.blocks[b].n_pages && !atomic_load(&f->quit); page++) {
            struct lb_error why = LB_ERROR_INIT;

            if (!lb_bitmap_test(&f->mem.populated[b], page) || is_present(f, b, page))
                continue;
            if (!lb_chain_read(f->chain, b, page, fill_pages, f, &why) || is_present(f, b, page))
                continue;
            if (!bad++)
                first_error = why;
        }
    pthread_mutex_lock(&f->mu);
    f->damaged_pages = bad;
    if (bad && !atomic_load(&f->quit))
        note_damage(f, &first_error);
    pthread_mutex_unlock(&f->mu);
    return bad;
}

static void wait_retry(struct lb_fill *f)
{
    struct timespec ts;

    clock_gettime(CLOCK_REALTIME, &ts);
    ts.tv_sec += RETRY_S;
    pthread_mutex_lock(&f->mu);
    while (!atomic_load(&f->quit) && !pthread_cond_timedwait(&f->cond, &f->mu, &ts))
        ;
    pthread_mutex_unlock(&f->mu);
}

static void *filler_main(void *arg)
{
    struct lb_fill *f = arg;
    struct lb_chain_read_all all = {.skip = not_needed, .fn = fill_pages, .arg = f, .cancel_fd = -1,
                                    .dont_cache = true};
    struct lb_error why = LB_ERROR_INIT;

    be_modest(); /* also before: the hypervisor that loads is more urgent than what the guest may need */
    fill_hot(f);
    if (!wait_go(f) || !wait_first(f))
        return NULL;
    end_learning(f);
    if (!wait_quiet(f))
        return NULL;
    if (lb_chain_read_all(f->chain, &all, &why) && !atomic_load(&f->quit))
        lb_log_error(LB_LOG_WARN, &why); /* page by page, then */
    while (fill_rest(f) && !atomic_load(&f->quit))
        wait_retry(f);
    pthread_mutex_lock(&f->mu);
    f->complete = !atomic_load(&f->quit);
    pthread_cond_broadcast(&f->cond);
    pthread_mutex_unlock(&f->mu);
    return NULL;
}

/* ---------------------------------------------------------------------- life */

struct lb_fill *lb_fill_new(const struct lb_ckpt_env *env, const struct lb_vm_entry *entry, struct lb_hv_vm *vm,
                            struct lb_chain *chain)
{
    struct lb_fill *f = lb_alloc(sizeof(*f));

    f->env = *env;
    f->env.launch = NULL;
    f->entry = *entry;
    f->vm = vm;
    f->chain = chain;
    f->learning = true;
    f->faults = lb_alloc(LB_WS_MAX_PAGES * sizeof(*f->faults));
    lb_mutex_init_inherit(&f->mu);
    pthread_mutex_init(&f->half, NULL);
    pthread_cond_init(&f->cond, NULL);
    return f;
}

static int init_present(struct lb_fill *f, unsigned block, struct lb_error *err)
{
    uint64_t n = f->mem.blocks[block].n_pages;
    struct lb_bitmap missing = {0};
    int rc;

    f->present[block] = lb_try_alloc((n + 63) / 64 * sizeof(**f->present), err);
    if (!f->present[block] || lb_bitmap_init(&missing, n, err))
        return -1;
    rc = lb_hv_lazy_missing(f->vm, f->mem.map[block], &missing, err);
    for (uint64_t page = 0; !rc && page < n; page++)
        if (!lb_bitmap_test(&missing, page))
            set_present(f, block, page);
    lb_bitmap_free(&missing);
    return rc;
}

int lb_fill_start(struct lb_fill *f, struct lb_error *err)
{
    int e = 0;

    f->present = lb_alloc(sizeof(*f->present) * (f->mem.n + 1));
    for (unsigned i = 0; i < f->mem.n; i++)
        if (is_main(f, i) && init_present(f, i, err))
            return -1;
    for (; !e && f->n_servers < LB_ARRAY_LEN(f->server); f->n_servers += !e)
        e = pthread_create(&f->server[f->n_servers], NULL, server_main, f);
    if (!e)
        e = pthread_create(&f->filler, NULL, filler_main, f);
    f->filler_started = !e;
    return e ? lb_fail_errno(err, LB_E_NO_SPACE, e, "cannot start a thread") : 0;
}

void lb_fill_stop(struct lb_fill *f)
{
    pthread_mutex_lock(&f->mu);
    atomic_store(&f->quit, true);
    pthread_cond_broadcast(&f->cond);
    pthread_mutex_unlock(&f->mu);
    while (f->n_servers)
        pthread_join(f->server[--f->n_servers], NULL);
    if (f->filler_started)
        pthread_join(f->filler, NULL);
    f->filler_started = false;
}

void lb_fill_free(struct lb_fill *f)
{
    if (!f)
        return;
    lb_fill_stop(f);
    for (unsigned i = 0; f->present && i < f->mem.n; i++)
        free(f->present[i]);
    free(f->present);
    lb_mem_free(&f->mem);
    lb_hv_detach(f->vm);
    lb_chain_close(f->chain);
    pthread_mutex_destroy(&f->mu);
    pthread_mutex_destroy(&f->half);
    pthread_cond_destroy(&f->cond);
    free(f->remove_path);
    free(f->ws_path);
    free(f->hot);
    free(f->faults);
    free(f);
}

/* ---------------------------------------------------------------- until all is there */

/* Loudly, once each time it changes: who looks at the VM, who watches the session, who reads the log. */
static void tell_damage(struct lb_fill *f, struct lb_ckpt_meter *meter, uint64_t *told)
{
    struct lb_error why;
    uint64_t pages, seq;

    pthread_mutex_lock(&f->mu);
    why = f->damage;
    pages = f->damaged_pages;
    seq = f->damage_seq;
    pthread_mutex_unlock(&f->mu);
    if (seq == *told)
        return;
    *told = seq;
    lb_log(LB_LOG_ERROR, "VM %s waits for memory that cannot be read (%llu pages so far): %s", f->entry.name,
           (unsigned long long)pages, why.message);
    lb_ckpt_meter_note(meter, "waits for memory: %.170s", why.message);
    snprintf(f->entry.note, sizeof(f->entry.note), "waits for memory that cannot be read: %.200s", why.message);
    if (lb_vm_entry_save(f->env.state_dir, &f->entry, &why))
        lb_log_error(LB_LOG_WARN, &why);
}

static bool wait_complete(struct lb_fill *f)
{
    struct timespec ts;
    bool complete;

    clock_gettime(CLOCK_REALTIME, &ts);
    ts.tv_nsec += 100000000;
    ts.tv_sec += ts.tv_nsec / 1000000000;
    ts.tv_nsec %= 1000000000;
    pthread_mutex_lock(&f->mu);
    f->go = true;
    pthread_cond_broadcast(&f->cond);
    while (!f->complete && !pthread_cond_timedwait(&f->cond, &f->mu, &ts))
        ;
    complete = f->complete;
    pthread_mutex_unlock(&f->mu);
    return complete;
}

/* Somebody who ended it may have forgotten it, too: then there is nothing to say. */
static int gone(struct lb_fill *f, struct lb_error *err)
{
    struct lb_error why = LB_ERROR_INIT;
    struct lb_vm_entry now;

    lb_fill_stop(f);
    if (!lb_vm_entry_load(f->env.state_dir, f->entry.name, &now, NULL) && now.state == LB_VM_FILLING) {
        now.state = LB_VM_DEAD;
        snprintf(now.note, sizeof(now.note), "ended while its memory still came from %s", now.checkpoint);
        if (lb_vm_entry_save(f->env.state_dir, &now, &why))
            lb_log_error(LB_LOG_WARN, &why);
    }
    return lb_fail(err, LB_E_HV, "VM %s ended while its memory still came from %s", f->entry.name,
                   f->entry.checkpoint);
}

static int fill_all(struct lb_fill *f, struct lb_ckpt_meter *meter, struct lb_error *err)
{
    uint64_t told = 0;

    for (bool complete = false; !complete;) {
        complete = wait_complete(f);
        uint64_t placed = atomic_load(&f->placed_pages);
        lb_ckpt_meter_bytes(meter, placed << LB_PAGE_SHIFT,
                            100.0 * (double)placed / (double)LB_MAX(f->mem.populated_pages, UINT64_C(1)));
        if (vm_gone(f))
            return gone(f, err);
        tell_damage(f, meter, &told);
    }
    return 0;
}

/* All pages are there, the threads have ended. */
static int settle(struct lb_fill *f, struct lb_error *err)
{
    struct lb_error why = LB_ERROR_INIT;

    if (lb_hv_lazy_end(f->vm, err))
        return vm_gone(f) ? gone(f, err) : -1;
    f->entry.state = LB_VM_RUNNING;
    snprintf(f->entry.note, sizeof(f->entry.note), "%s %s", f->remove_path ? "resumed from" : "restored from",
             f->entry.checkpoint);
    f->entry.checkpoint[0] = '\0';
    if (lb_vm_entry_save(f->env.state_dir, &f->entry, err))
        return -1;
    if (f->remove_path)
        lb_ckpt_remove_file(f->remove_path);
    /* Of hot pages that were read ahead it is known only then whether they were needed. */
    if (f->ws_path && f->n_faults &&
        lb_ws_save(f->ws_path, &f->id, f->faults, f->n_faults, f->hot, f->learned ? 0 : f->n_hot, &why))
        lb_log_error(LB_LOG_WARN, &why);
    return 0;
}

int lb_ckpt_fill(struct lb_fill *f, struct lb_error *err)
{
    struct lb_ckpt_meter meter;
    int rc;

    lb_ckpt_meter_init(&meter, &f->env, "fill", f->mem.populated_pages << LB_PAGE_SHIFT);
    lb_ckpt_meter_phase(&meter, LB_CKPT_FILLING, -1);
    lb_point("fill-begun");
    rc = fill_all(f, &meter, err);
    if (!rc) {
        lb_fill_stop(f);
        rc = settle(f, err);
    }
    if (!rc)
        lb_ckpt_meter_phase(&meter, LB_CKPT_DONE, 100);
    lb_fill_free(f);
    return rc;
}

/* ------------------------------------------------------------- after a crash of who filled */

/* Nothing is missing: the other one came to its end but for the entry. */
static int was_filled(const struct lb_ckpt_env *env, const struct lb_vm_entry *vm, const struct lb_ckpt_entry *ck,
                      struct lb_error *err)
{
    struct lb_vm_entry entry = *vm;
    struct lb_vm_ident id = lb_ckpt_ident(vm);
    struct lb_hv_vm *h = NULL;
    bool alive, running = false;
    int rc = lb_hv_attach(env->hv, &id, &h, err);

    if (!rc)
        rc = lb_hv_status(h, &alive, &running, err);
    if (!rc && !running)
        rc = lb_hv_cont(h, err);
    if (!rc && !running && lb_hv_announce(h, NULL))
        lb_log(LB_LOG_WARN, "VM %s is not announced to the network", vm->name);
    lb_hv_detach(h);
    if (rc)
        return -1;
    entry.state = LB_VM_RUNNING;
    entry.checkpoint[0] = '\0';
    snprintf(entry.note, sizeof(entry.note), "%s %s", ck->info.meta.suspend ? "resumed from" : "restored from", ck->ref);
    if (lb_vm_entry_save(env->state_dir, &entry, err))
        return -1;
    if (ck->info.meta.suspend)
        lb_ckpt_remove_file(ck->path);
    return 0;
}

/* It is decided that the guest runs. Its hypervisor may answer only as pages come. */
static int make_run(struct lb_fill *f, struct lb_error *err)
{
    if (lb_hv_run(f->vm, err))
        return vm_gone(f) ? gone(f, err) : -1;
    if (lb_hv_announce(f->vm, NULL))
        lb_log(LB_LOG_WARN, "VM %s is not announced to the network", f->entry.name);
    return 0;
}

static int refill(struct lb_fill *f, const struct lb_ckpt_entry *ck, struct lb_error *err)
{
    f->id = ck->info.id;
    if (ck->info.meta.suspend && !strcmp(ck->vm, f->entry.name)) /* another VM's is only read */
        f->remove_path = lb_strdup(ck->path);
    f->decided = true;
    if (lb_mem_init(&f->mem, f->vm, f->chain, true, err) || lb_fill_start(f, err) || make_run(f, err)) {
        lb_fill_free(f);
        return -1;
    }
    return lb_ckpt_fill(f, err);
}

int lb_ckpt_refill(const struct lb_ckpt_env *env, const struct lb_vm_entry *vm, struct lb_ckpt_key *key,
                   struct lb_error *err)
{
    struct lb_vm_ident id = lb_ckpt_ident(vm);
    struct lb_error why = LB_ERROR_INIT;
    struct lb_ckpt_entry ck;
    struct lb_chain *chain = NULL;
    struct lb_hv_vm *h = NULL;
    int rc;

    if (lb_catalog_find(env->catalog_dir, vm->checkpoint, key, &ck, err))
        return -1;
    rc = lb_catalog_open(env->catalog_dir, &ck, key, &chain, err);
    if (!rc && lb_hv_lazy_attach(env->hv, &id, &h, &why)) {
        lb_chain_close(chain);
        if (why.code == LB_E_NOT_FOUND && lb_hv_exists(env->hv, &id)) {
            rc = was_filled(env, vm, &ck, err);
        } else {
            if (err)
                *err = why;
            rc = -1;
        }
    } else if (!rc) {
        rc = refill(lb_fill_new(env, vm, h, chain), &ck, err);
    }
    lb_ckpt_entry_free(&ck);
    return rc;
}
