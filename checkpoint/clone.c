/*
 * checkpoint/clone.c - several VMs out of one checkpoint.
 *
 * Main memory is read once, into a memfd that is then sealed: nobody can write to it any more.  Each clone has a private
 * view of it, so that a page is the host's only once until a clone writes to its own; zero pages are holes.  The rest of a
 * clone (blocks of devices, state, overlays on the disks) is an ordinary restore under another name.
 *
 * Two are made at a time: a hypervisor that starts is one process that computes.
 */
#include "checkpoint/restore_internal.h"

#include "core/host.h"
#include "core/qemu/argv_scan.h"

#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <string.h>
#include <sys/mman.h>

#define AT_ONCE 2u
#define MAX_CLONES 256u
#define MAX_NUMBER 100000u
#define MEMORY_PERCENT 60.0  /* of the work, the rest is starting them */

struct clone {
    /* immutable while the workers run */
    const struct lb_ckpt_env *env;
    struct lb_ckpt_env quiet;         /* for the workers: reports are the engine thread's */
    const char *ref;
    const struct lb_clone_opts *opts;
    uint64_t t_start;
    struct lb_ckpt_entry ck;
    struct lb_chain *chain;
    int memfd;
    unsigned block;                   /* the main one */
    struct lb_arg_item *items;        /* of the command line */
    unsigned n_items;
    /* locked by mu */
    pthread_mutex_t mu;
    pthread_cond_t cond;
    unsigned number, started, ended;  /* number: last one tried */
    int rc;
    struct lb_error err;
    struct lb_clone_result *res;
};

/* ---------------------------------------------------------------------- memory */

static int find_main(struct clone *c, struct lb_error *err)
{
    unsigned n, mains = 0;
    const struct lb_ckpt_block *v = lb_chain_blocks(c->chain, &n);

    for (unsigned i = 0; i < n; i++)
        if (v[i].kind == LB_RAM_MAIN) {
            c->block = i;
            mains++;
        }
    if (mains == 1)
        return 0;
    lb_fail(err, LB_E_UNSUPPORTED, "%s has %u blocks of main memory: they cannot be shared", c->ck.ref, mains);
    return lb_remedy(err, "`lifeboat restore %s --as NAME` makes copies one by one", c->ck.ref);
}

static int populated_bytes(struct clone *c, uint64_t *bytes, struct lb_error *err)
{
    unsigned n;
    struct lb_bitmap b = {0};
    int rc = lb_bitmap_init(&b, lb_chain_blocks(c->chain, &n)[c->block].n_pages, err);

    if (!rc)
        rc = lb_chain_populated(c->chain, c->block, &b, err);
    *bytes = rc ? 0 : lb_bitmap_count(&b) << LB_PAGE_SHIFT;
    lb_bitmap_free(&b);
    return rc;
}

static int check_memory(const struct clone *c, uint64_t need, struct lb_error *err)
{
    int64_t available = lb_host_meminfo("MemAvailable");
    char a[32], b[32];

    if (available < 0 || need <= (uint64_t)available)
        return 0;
    lb_fail(err, LB_E_PREFLIGHT, "clones of %s share %s, this host has %s available", c->ck.ref,
            lb_human_bytes(a, sizeof(a), (double)need), lb_human_bytes(b, sizeof(b), (double)available));
    return lb_remedy(err, "stop, suspend or move other VMs away");
}

static int place_memfd(unsigned block, uint64_t first, uint64_t count, const void *data, void *arg,
                       struct lb_error *err)
{
    const struct clone *c = arg;
    size_t left = (size_t)(count << LB_PAGE_SHIFT);
    off_t at = (off_t)(first << LB_PAGE_SHIFT);

    if (block != c->block)
        return 0;
    for (const char *p = data; left;) {
        ssize_t n = pwrite(c->memfd, p, left, at);

        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return lb_fail_errno(err, LB_E_NO_SPACE, errno, "no memory for the clones");
        p += n;
        at += n;
        left -= (size_t)n;
    }
    return 0;
}

static int read_memory(struct clone *c, struct lb_ckpt_meter *meter, struct lb_error *err)
{
    unsigned n;
    const struct lb_ckpt_block *b = lb_chain_blocks(c->chain, &n);

    if (populated_bytes(c, &meter->p.total_bytes, err) || check_memory(c, meter->p.total_bytes, err))
        return -1;
    c->memfd = memfd_create("lifeboat-clones", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (c->memfd < 0 || ftruncate(c->memfd, (off_t)(b[c->block].n_pages << LB_PAGE_SHIFT)) < 0)
        return lb_fail_errno(err, LB_E_NO_SPACE, errno, "no memory for the clones");
    lb_ckpt_meter_phase(meter, LB_CKPT_COPYING, 1);
    if (lb_mem_read_main(c->chain, place_memfd, c, meter, 1, MEMORY_PERCENT, err))
        return -1;
    if (fcntl(c->memfd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL) < 0)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot seal the memory of the clones");
    return 0;
}

/* -------------------------------------------------------------------- one clone */

/* Whole name of a tap for this clone's i-th card; "" none: it is connected to nothing. */
static int tap_name(const struct clone *c, const char *old, unsigned i, unsigned number, char out[IFNAMSIZ],
                    struct lb_error *err)
{
    const char *pattern = c->opts->tap, *d = strstr(pattern, "%d");
    LB_AUTO_FREE char *more = i ? lb_asprintf("-%u", i + 1) : lb_strdup("");
    LB_AUTO_FREE char *name = !pattern[0] ? lb_asprintf("%s-%u", old, number)
                              : d         ? lb_asprintf("%.*s%u%s%s", (int)(d - pattern), pattern, number, d + 2, more)
                                          : lb_asprintf("%s%s", pattern, more);

    out[0] = '\0';
    if (strlen(name) >= IFNAMSIZ)
        return pattern[0] ? lb_fail(err, LB_E_USAGE, "the tap name %s is too long", name) : 0;
    if (pattern[0] || lb_host_tap_free(name) != ENODEV)
        memcpy(out, name, strlen(name) + 1);
    return 0;
}

static int clone_taps(const struct clone *c, unsigned number, struct lb_path_map **out, unsigned *n_out,
                      char (**names)[IFNAMSIZ], struct lb_error *err)
{
    struct lb_path_map *v = lb_alloc(sizeof(*v) * (c->n_items + 1));
    unsigned n = 0;

    *out = v;
    *names = lb_alloc(sizeof(**names) * (c->n_items + 1));
    for (unsigned i = 0; i < c->n_items; i++) {
        if (c->items[i].kind != LB_ARG_TAP)
            continue;
        if (tap_name(c, c->items[i].value, n, number, (*names)[n], err))
            return -1;
        v[n] = (struct lb_path_map){.from = c->items[i].value, .to = (*names)[n]};
        n++;
    }
    *n_out = n;
    return 0;
}

static int restore_one(const struct clone *c, const char *name, unsigned number, double *running_ms,
                       struct lb_error *err)
{
    LB_AUTO_FREE struct lb_path_map *taps = NULL;
    LB_AUTO_FREE char(*names)[IFNAMSIZ] = NULL;
    struct lb_restore_opts o = {.key = c->opts->key, .shared_memory_fd = c->memfd};
    struct lb_restore_result res;
    struct lb_fill *f;
    uint64_t t = lb_now_ns();

    snprintf(o.as, sizeof(o.as), "%s", name);
    if (clone_taps(c, number, &taps, &o.n_taps, &names, err))
        return -1;
    o.taps = taps;
    /* Not c->ref: what that names may be another one by now ("web": the latest). */
    if (lb_ckpt_restore(&c->quiet, c->ck.ref, &o, &f, &res, err))
        return -1;
    *running_ms = (double)(t - c->t_start) / 1e6 + res.running_ms;
    return 0;
}

/* Locked by mu: the next name that is free; the lock of that VM, or -1. */
static int next_name(struct clone *c, char name[128], unsigned *number, struct lb_error *err)
{
    const char *stem = c->opts->name[0] ? c->opts->name : c->ck.vm;
    struct lb_error why = LB_ERROR_INIT;
    struct lb_vm_entry e;
    int lock;

    while (c->number < MAX_NUMBER) {
        *number = ++c->number;
        snprintf(name, 128, "%.100s-%u", stem, *number);
        why = (struct lb_error)LB_ERROR_INIT;
        if (!lb_vm_entry_load(c->env->state_dir, name, &e, &why))
            continue;
        if (why.code != LB_E_NOT_FOUND)
            break;
        lock = lb_vm_lock(c->env->state_dir, name, &why);
        if (lock >= 0)
            return lock;
        if (why.code != LB_E_STATE) /* else somebody is at it */
            break;
    }
    if (c->number == MAX_NUMBER)
        return lb_fail(err, LB_E_EXISTS, "no name %s-N is free", stem);
    *err = why;
    return -1;
}

/* ---------------------------------------------------------------------- workers */

static void worker_failed(struct clone *c, const struct lb_error *why)
{
    pthread_mutex_lock(&c->mu);
    if (!c->rc) {
        c->rc = -1;
        c->err = *why;
    }
    pthread_mutex_unlock(&c->mu);
}

/* False: enough, or one has failed. */
static bool make_next(struct clone *c)
{
    struct lb_error why = LB_ERROR_INIT;
    char name[128];
    unsigned number = 0;
    double ms = 0;
    LB_AUTO_FD int lock = -1;

    pthread_mutex_lock(&c->mu);
    bool more = !c->rc && c->started < c->opts->count;
    if (more) {
        c->started++;
        lock = next_name(c, name, &number, &why);
    }
    pthread_mutex_unlock(&c->mu);
    if (!more)
        return false;
    if (lock < 0 || restore_one(c, name, number, &ms, &why)) {
        if (lock >= 0)
            lb_context(&why, "clone %s", name);
        worker_failed(c, &why);
        return false;
    }
    pthread_mutex_lock(&c->mu);
    memcpy(c->res->names[c->res->n], name, sizeof(name));
    c->res->running_ms[c->res->n++] = ms;
    pthread_cond_signal(&c->cond);
    pthread_mutex_unlock(&c->mu);
    return true;
}

static void *worker_main(void *arg)
{
    struct clone *c = arg;

    while (make_next(c))
        ;
    pthread_mutex_lock(&c->mu);
    c->ended++;
    pthread_cond_signal(&c->cond);
    pthread_mutex_unlock(&c->mu);
    return NULL;
}

static int run_workers(struct clone *c, struct lb_ckpt_meter *meter, struct lb_error *err)
{
    pthread_t t[AT_ONCE];
    unsigned n = 0, made;
    int e = 0;

    lb_ckpt_meter_phase(meter, LB_CKPT_LAUNCHING, MEMORY_PERCENT);
    for (; n < LB_MIN(AT_ONCE, c->opts->count) && !e; n += !e)
        e = pthread_create(&t[n], NULL, worker_main, c);
    if (e && !n)
        return lb_fail_errno(err, LB_E_NO_SPACE, e, "cannot start a thread");
    for (bool ended = false; !ended;) {
        pthread_mutex_lock(&c->mu);
        made = c->res->n;
        while (c->ended < n && c->res->n == made)
            pthread_cond_wait(&c->cond, &c->mu);
        made = c->res->n;
        ended = c->ended == n;
        pthread_mutex_unlock(&c->mu);
        lb_ckpt_meter_phase(meter, LB_CKPT_LAUNCHING,
                            MEMORY_PERCENT + (100 - MEMORY_PERCENT) * made / c->opts->count);
    }
    for (unsigned i = 0; i < n; i++)
        pthread_join(t[i], NULL);
    if (c->rc && err)
        *err = c->err;
    return c->rc;
}

/* ------------------------------------------------------------------------ order */

static int check(struct clone *c, struct lb_error *err)
{
    const struct lb_clone_opts *o = c->opts;

    if (o->count < 1 || o->count > MAX_CLONES)
        return lb_fail(err, LB_E_USAGE, "%u clones: from 1 to %u can be made at once", o->count, MAX_CLONES);
    if (o->tap[0] && !strstr(o->tap, "%d") && o->count > 1) {
        lb_fail(err, LB_E_USAGE, "one tap, %s, for %u clones", o->tap, o->count);
        return lb_remedy(err, "put %%d where the number of the clone belongs: --tap %.10s%%d", o->tap);
    }
    if (lb_catalog_find(c->env->catalog_dir, c->ref, o->key, &c->ck, err))
        return -1;
    if (!c->ck.readable) {
        if (err)
            *err = c->ck.error;
        return -1;
    }
    if (c->ck.info.meta.suspend && c->ck.n_disks) {
        lb_fail(err, LB_E_STATE, "%s is a suspended VM: its disks are its own", c->ck.ref);
        return lb_remedy(err, "`lifeboat resume %s`, then take a checkpoint and clone that", c->ck.vm);
    }
    if (c->ck.info.meta.desc.argv)
        lb_argv_scan(c->ck.info.meta.desc.argv, &c->items, &c->n_items);
    return 0;
}

static int clone_all(struct clone *c, struct lb_ckpt_meter *meter, struct lb_error *err)
{
    if (check(c, err))
        return -1;
    lb_ckpt_meter_phase(meter, LB_CKPT_PREPARING, 0);
    if (lb_catalog_open(c->env->catalog_dir, &c->ck, c->opts->key, &c->chain, err) || find_main(c, err) ||
        read_memory(c, meter, err) || run_workers(c, meter, err))
        return -1;
    lb_ckpt_meter_phase(meter, LB_CKPT_DONE, 100);
    return 0;
}

int lb_ckpt_clone(const struct lb_ckpt_env *env, const char *ref, const struct lb_clone_opts *opts,
                  struct lb_clone_result *res, struct lb_error *err)
{
    struct clone c = {.env = env, .quiet = *env, .ref = ref, .opts = opts, .t_start = lb_now_ns(), .memfd = -1,
                      .res = res};
    struct lb_ckpt_meter meter;
    int rc;

    memset(res, 0, sizeof(*res));
    res->names = lb_alloc(sizeof(*res->names) * LB_MIN(opts->count, MAX_CLONES) + 1);
    res->running_ms = lb_alloc(sizeof(*res->running_ms) * LB_MIN(opts->count, MAX_CLONES) + 1);
    c.quiet.report = NULL;
    pthread_mutex_init(&c.mu, NULL);
    pthread_cond_init(&c.cond, NULL);
    lb_ckpt_meter_init(&meter, env, "clone", 0);
    rc = clone_all(&c, &meter, err);
    pthread_mutex_destroy(&c.mu);
    pthread_cond_destroy(&c.cond);
    lb_argv_items_free(c.items, c.n_items);
    lb_chain_close(c.chain);
    lb_ckpt_entry_free(&c.ck);
    lb_cleanup_fd(&c.memfd);
    return rc;
}
