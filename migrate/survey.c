/*
 * migrate/survey.c - a look at every VM of this host before an evacuation is planned.
 *
 *   each, by a thread of a few: lock -> attach -> describe -> |-- the log of what it writes, for a moment --| -> detach
 *
 * The log is started while the guest runs and only looked at, never cleared: nothing pauses the guest but the moment it takes to start
 * it (some 0.2 ms). A VM that a session works on is not touched: what it dirtied the last time is in STATE_DIR/dirty.json, the rest is what
 * the files and /proc say.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#include "core/json.h"
#include "migrate/capacity.h"
#include "netproto/netproto.h"

#define MAX_FILE (16u << 20)
#define PARALLEL_MOST 64u
#define ZERO_SAMPLE 512u   /* pages looked at for how many of all are zeros */

struct survey {
    const struct lb_survey_opts *o;
    const struct lb_vm_entry *entries;   /* as v */
    struct lb_survey_vm *v;
    unsigned n;
    atomic_uint next;
    atomic_bool cancelled;
};

static bool cancelled(struct survey *s)
{
    if (lb_readable(s->o->cancel_fd, 0))
        s->cancelled = true;
    return s->cancelled;
}

/* ------------------------------------------------------------------------- one of them */

static void block(struct lb_survey_vm *vm, const char *remedy, const char *text)
{
    lb_report_add(&vm->blockers, "state", LB_CHECK_FAIL, remedy, "%s", text);
}

/* Only what hinders it. */
static void check(struct lb_survey_vm *vm, const struct lb_vm_desc *d)
{
    struct lb_report all = {0};

    lb_preflight_source(d, &all);
    for (unsigned i = 0; i < all.n; i++)
        if (all.v[i].status == LB_CHECK_FAIL)
            lb_report_add(&vm->blockers, all.v[i].id, LB_CHECK_FAIL, all.v[i].remedy, "%s", all.v[i].message);
    lb_report_free(&all);
}

/* How many of so many pages of the set hold something: zeros are told, not sent. */
static double filled(struct lb_hv_vm *hv, const struct lb_ram_block *b, const struct lb_bitmap *set, uint64_t n)
{
    uint64_t step = n / ZERO_SAMPLE + 1, at = 0, first, count, seen = 0, some = 0, skip = 0;
    LB_AUTO_FREE uint8_t *page = lb_alloc(LB_PAGE_SIZE);

    while (lb_bitmap_next_run(set, at, set->n_bits, &first, &count)) {
        for (; skip < count; skip += step) {
            const uint8_t *p = b->map ? (const uint8_t *)b->map + (first + skip) * LB_PAGE_SIZE : page;

            if (!b->map && lb_hv_read(hv, b, first + skip, 1, page, NULL))
                return 1;
            seen++;
            some += !lb_is_zero(p, LB_PAGE_SIZE);
        }
        skip -= count;
        at = first + count;
    }
    return seen ? (double)some / (double)seen : 1;
}

/* Pages that are to be sent at all. */
static int populated(struct lb_hv_vm *hv, const struct lb_ram_block *b, uint64_t *pages, struct lb_error *err)
{
    struct lb_bitmap set = {0};
    uint64_t n = 0;
    int rc;

    if (lb_bitmap_init(&set, b->size_bytes / LB_PAGE_SIZE, err))
        return -1;
    rc = lb_hv_populated(hv, b, &set, err);
    if (!rc && (n = lb_bitmap_count(&set)))
        *pages += (uint64_t)((double)n * filled(hv, b, &set, n));
    lb_bitmap_free(&set);
    return rc;
}

static int touched(struct lb_hv_vm *hv, const struct lb_ram_block *b, unsigned n, uint64_t *bytes, struct lb_error *err)
{
    uint64_t pages = 0;

    for (unsigned i = 0; i < n; i++)
        if (b[i].kind != LB_RAM_ROM && populated(hv, &b[i], &pages, err))
            return -1;
    *bytes = pages * LB_PAGE_SIZE;
    return 0;
}

static int count_written(struct lb_hv_vm *hv, const struct lb_ram_block *b, uint64_t *pages, struct lb_error *err)
{
    struct lb_bitmap set = {0};
    int rc;

    if (b->kind == LB_RAM_ROM)
        return 0;
    if (lb_bitmap_init(&set, b->size_bytes / LB_PAGE_SIZE, err))
        return -1;
    rc = lb_hv_log_peek(hv, b, 0, set.n_bits, &set, err);
    *pages += lb_bitmap_count(&set);
    lb_bitmap_free(&set);
    return rc;
}

static int watch(struct lb_hv_vm *hv, const struct lb_ram_block *b, unsigned n, unsigned ms, uint64_t *bytes_per_s,
                 struct lb_error *err)
{
    uint64_t pages = 0, t0;
    int rc = 0;

    if (lb_hv_log_enable(hv, err))
        return -1;
    t0 = lb_now_ns();
    lb_sleep_ms(ms);
    for (unsigned i = 0; i < n && !rc; i++)
        rc = count_written(hv, &b[i], &pages, err);
    *bytes_per_s = (uint64_t)((double)pages * LB_PAGE_SIZE * 1e9 / (double)(lb_now_ns() - t0));
    if (lb_hv_log_disable(hv, rc ? NULL : err))
        rc = -1;
    return rc;
}

static int look_inside(struct survey *s, struct lb_survey_vm *vm, const struct lb_vm_entry *e, struct lb_error *err)
{
    struct lb_vm_ident id = lb_entry_ident(e);
    const struct lb_ram_block *b;
    bool alive, running = true;
    struct lb_hv_vm *hv;
    unsigned n;
    int rc = -1;

    if (lb_hv_attach(s->o->hv, &id, &hv, err))
        return -1;
    if (!lb_hv_status(hv, &alive, &running, err) && !lb_hv_describe(hv, &vm->desc, err)) {
        vm->described = true;
        free(vm->desc.name);
        vm->desc.name = lb_strdup(e->name);
        vm->memory_bytes = lb_preflight_need_bytes(vm->desc.ram_bytes);
        check(vm, &vm->desc);
        if (!running)
            block(vm, "continue it (QMP `cont`), or suspend it", "it is paused");
        if (!lb_hv_blocks(hv, &b, &n, err) && !touched(hv, b, n, &vm->touched_bytes, err) &&
            !watch(hv, b, n, s->o->window_ms ? s->o->window_ms : LB_SURVEY_WINDOW_MS, &vm->dirty_bytes_per_s, err)) {
            vm->sampled = true;
            rc = 0;
        }
    }
    lb_hv_detach(hv);
    return rc;
}

/* What is known without the VM's help. */
static void look_outside(struct lb_survey_vm *vm, const struct lb_vm_entry *e)
{
    struct lb_vm_desc d = {0};

    if (lb_proc_cmdline(e->proc.pid, &d.argv, NULL))
        return;
    if (!vm->memory_bytes)
        vm->memory_bytes = lb_preflight_need_bytes(lb_capacity_ram_of(d.argv));
    if (!vm->touched_bytes)
        vm->touched_bytes = LB_MIN(vm->memory_bytes, lb_capacity_resident(e->proc.pid));
    if (!vm->described)
        check(vm, &d);
    lb_strv_free(d.argv);
}

static void look(struct survey *s, unsigned i)
{
    const char *dir = s->o->state_dir, *name = s->entries[i].name;
    struct lb_survey_vm *vm = &s->v[i];
    struct lb_error err = LB_ERROR_INIT;
    struct lb_vm_entry e;
    LB_AUTO_FD int lock = s->entries[i].state == LB_VM_RUNNING ? lb_vm_lock(dir, name, NULL) : -1;

    if (lock >= 0 && !lb_vm_entry_load(dir, name, &e, &err) && e.state == LB_VM_RUNNING &&
        look_inside(s, vm, &e, &err))
        lb_log(LB_LOG_WARN, "vm=%s cannot be looked at: %s", name, err.message);
    look_outside(vm, &s->entries[i]);
}

static void *look_main(void *arg)
{
    struct survey *s = arg;
    unsigned i;

    while (!cancelled(s) && (i = atomic_fetch_add(&s->next, 1)) < s->n)
        look(s, i);
    return NULL;
}

/* ------------------------------------------------------------------- the last time's */

static char *known_path(const char *state_dir)
{
    return lb_asprintf("%s/dirty.json", state_dir);
}

static void recall(const char *state_dir, struct lb_survey_vm *v, unsigned n)
{
    LB_AUTO_FREE char *path = known_path(state_dir), *text = NULL;
    json_t *all;

    if (lb_file_read(path, MAX_FILE, &text, NULL, NULL))
        return;
    all = json_loads(text, 0, NULL);
    for (unsigned i = 0; i < n; i++) {
        const json_t *o = json_object_get(all, v[i].name);

        lb_json_get_u64(o, "dirty_bytes_per_s", LB_INV_MAX_BYTES, &v[i].dirty_bytes_per_s);
        lb_json_get_u64(o, "touched_bytes", LB_INV_MAX_BYTES, &v[i].touched_bytes);
    }
    json_decref(all);
}

static void remember(const char *state_dir, const struct lb_survey_vm *v, unsigned n)
{
    LB_AUTO_FREE char *path = known_path(state_dir);
    struct lb_error err = LB_ERROR_INIT;
    json_t *all = json_object();

    for (unsigned i = 0; i < n; i++)
        json_object_set_new(all, v[i].name,
                            json_pack("{s:I, s:I}", "dirty_bytes_per_s", (json_int_t)v[i].dirty_bytes_per_s,
                                      "touched_bytes", (json_int_t)v[i].touched_bytes));
    LB_AUTO_FREE char *text = json_dumps(all, JSON_COMPACT);
    json_decref(all);
    if (text && lb_file_write_atomic(path, text, strlen(text), 0600, &err))
        lb_log_error(LB_LOG_WARN, &err);
}

/* ------------------------------------------------------------------------- all of them */

/* Is it a VM that could leave, now or when a session has done its work? One that is on its way counts where it goes. */
static bool concerns(const struct lb_vm_entry *e)
{
    switch (e->state) {
    case LB_VM_RUNNING:
    case LB_VM_PROTECTED:
    case LB_VM_CHECKPOINTING:
    case LB_VM_FILLING:
    case LB_VM_RESTORING:
    case LB_VM_HANDED_OVER:
        return e->proc.pid > 0 && lb_proc_alive(&e->proc);
    default:
        return false;
    }
}

static void begin(struct lb_survey_vm *vm, const struct lb_vm_entry *e)
{
    snprintf(vm->name, sizeof(vm->name), "%s", e->name);
    if (e->state == LB_VM_PROTECTED)
        snprintf(vm->backup, sizeof(vm->backup), "%s", e->peer);
    if (e->state == LB_VM_FILLING || e->state == LB_VM_RESTORING)
        block(vm, "wait until it is there (`lifeboat status` shows how far it is), then plan again",
              "its memory still comes from a checkpoint");
    if (e->state == LB_VM_HANDED_OVER)
        block(vm, "`lifeboat recover` when that host answers, then plan again",
              "it was handed over, and the host that it went to has not said what became of it");
}

static void run(struct survey *s)
{
    unsigned want = LB_MIN(LB_MIN(s->o->parallel ? s->o->parallel : LB_SURVEY_PARALLEL, PARALLEL_MOST), s->n), n = 0;
    pthread_t threads[PARALLEL_MOST];

    while (n + 1 < want && !pthread_create(&threads[n], NULL, look_main, s))
        n++;
    look_main(s);
    while (n > 0)
        pthread_join(threads[--n], NULL);
}

int lb_survey(const struct lb_survey_opts *o, struct lb_survey_vm **v, unsigned *n, struct lb_error *err)
{
    LB_AUTO_FREE struct lb_vm_entry *entries = NULL;
    struct survey s = {.o = o};
    unsigned all = 0;

    if (lb_vm_entry_list(o->state_dir, &entries, &all, err))
        return -1;
    for (unsigned i = 0; i < all; i++)
        if (concerns(&entries[i]))
            entries[s.n++] = entries[i];
    s.entries = entries;
    s.v = lb_alloc((s.n + 1) * sizeof(*s.v));
    for (unsigned i = 0; i < s.n; i++)
        begin(&s.v[i], &entries[i]);
    recall(o->state_dir, s.v, s.n);
    run(&s);
    if (s.cancelled) {
        lb_survey_free(s.v, s.n);
        return lb_fail(err, LB_E_CANCELLED, "cancelled");
    }
    remember(o->state_dir, s.v, s.n);
    *v = s.v;
    *n = s.n;
    return 0;
}

void lb_survey_free(struct lb_survey_vm *v, unsigned n)
{
    for (unsigned i = 0; i < n; i++) {
        lb_vm_desc_free(&v[i].desc);
        lb_report_free(&v[i].blockers);
    }
    free(v);
}
