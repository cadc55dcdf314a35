/* checkpoint/catalog.c - what there is: list, find, chains, what may go.
 *
 * Nothing here writes and nothing takes the lock: a file that has its name is whole, and one that goes away while
 * it is looked at is just not there.  A file that cannot be read is an entry all the same, with the reason.  Who
 * stands on whom is in the headers, by id; numbers and names are those of the place, also when the file itself was
 * made under another name (an import). */
#include "checkpoint/catalog_internal.h"
#include "checkpoint/store_internal.h"

#include "core/registry.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <string.h>

enum { CHAIN_TRIES = 4, CHAIN_TRY_MS = 5 };

/* The ids in a file's header: enough to follow a chain, and the same whatever key there is. */
struct ids {
    struct lb_ckpt_id id, parent;
    char path[512];
};

static bool no_id(const struct lb_ckpt_id *id)
{
    static const struct lb_ckpt_id none;

    return !memcmp(id, &none, sizeof(none));
}

static bool same_id(const struct lb_ckpt_id *a, const struct lb_ckpt_id *b)
{
    return !memcmp(a, b, sizeof(*a));
}

void lb_ckpt_entry_free(struct lb_ckpt_entry *e)
{
    lb_ckpt_info_free(&e->info);
    free(e->disks);
    *e = (struct lb_ckpt_entry){0};
}

static void free_entries(struct lb_ckpt_entry *v, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        lb_ckpt_entry_free(&v[i]);
    free(v);
}

/* -------------------------------------------------------------------- one entry */

/* Disks of the entry; without them (disks.json is damaged) it is of no use. */
static void set_entry_disks(struct lb_ckpt_entry *e, const struct lb_disks *d, const struct lb_error *d_err)
{
    const struct lb_disks_of *of = lb_disks_find(d, e->number);

    if (d_err->code) {
        e->readable = false;
        e->error = *d_err;
    } else if (of) {
        e->disks = lb_disks_dup(of->v, of->n);
        e->n_disks = of->n;
    } else {
        e->disks = lb_disks_dup(e->info.meta.disks, e->info.meta.n_disks);
        e->n_disks = e->info.meta.n_disks;
    }
}

/* vm "": a file that is in no catalog; it says itself what it is. */
static void load_entry(struct lb_ckpt_entry *e, const char *vm, uint32_t number, const char *path,
                       const struct lb_ckpt_key *key, const struct lb_disks *d, const struct lb_error *d_err)
{
    *e = (struct lb_ckpt_entry){.number = number};
    snprintf(e->vm, sizeof(e->vm), "%s", vm);
    snprintf(e->path, sizeof(e->path), "%s", path);
    e->readable = lb_ckpt_info(path, key, &e->info, &e->error) == 0;
    if (!vm[0]) {
        snprintf(e->vm, sizeof(e->vm), "%s", e->info.meta.vm);
        e->number = e->info.meta.number;
        snprintf(e->ref, sizeof(e->ref), "%s", path);
    } else if (e->readable) {
        snprintf(e->info.meta.vm, sizeof(e->info.meta.vm), "%s", vm);
        e->info.meta.number = number;
    }
    if (vm[0] && number)
        snprintf(e->ref, sizeof(e->ref), "%s@%" PRIu32, e->vm, number);
    else if (vm[0])
        snprintf(e->ref, sizeof(e->ref), "%s@suspend", e->vm);
    set_entry_disks(e, d, d_err);
}

static bool gone(const struct lb_ckpt_entry *e)
{
    return !e->readable && access(e->path, F_OK) < 0 && errno == ENOENT;
}

/* ------------------------------------------------------------------------- list */

/* Numbers of the checkpoints of a VM, in no order. No directory: none. */
static int numbers_of(const char *dir, const char *vm, uint32_t **v, unsigned *n, struct lb_error *err)
{
    LB_AUTO_FREE char *path = lb_catalog_vm_dir(dir, vm);
    DIR *d = opendir(path);
    struct dirent *e;
    uint32_t number;

    *v = NULL;
    *n = 0;
    if (!d)
        return errno == ENOENT ? 0 : lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot read %s", path);
    while ((e = readdir(d)))
        if (lb_catalog_number(e->d_name, &number)) {
            *v = lb_realloc(*v, (*n + 1) * sizeof(**v));
            (*v)[(*n)++] = number;
        }
    closedir(d);
    return 0;
}

static int by_vm_and_number(const void *a, const void *b)
{
    const struct lb_ckpt_entry *x = a, *y = b;
    int c = strcmp(x->vm, y->vm);

    return c ? c : (x->number > y->number) - (x->number < y->number);
}

static int by_id(const void *a, const void *b)
{
    return memcmp(&(*(const struct lb_ckpt_entry *const *)a)->info.id,
                  &(*(const struct lb_ckpt_entry *const *)b)->info.id, sizeof(struct lb_ckpt_id));
}

struct by_ids {
    struct lb_ckpt_entry **v;
    unsigned n;
};

static struct lb_ckpt_entry *find_id(const struct by_ids *ids, const struct lb_ckpt_id *id)
{
    struct lb_ckpt_entry key = {.info.id = *id}, *p = &key;
    struct lb_ckpt_entry **found = bsearch(&p, ids->v, ids->n, sizeof(*ids->v), by_id);

    return found ? *found : NULL;
}

/* How many files a restore of e reads; the depths found on the way stay, so that a long chain is walked once. */
static unsigned depth_of(struct lb_ckpt_entry *e, const struct by_ids *ids)
{
    struct lb_ckpt_entry *p = e;
    unsigned steps = 0, depth = 0;

    /* up, until something is known; a ring of parents ends by the count */
    while (p && !p->depth && !no_id(&p->info.id) && !no_id(&p->info.parent) && steps < ids->n) {
        p = find_id(ids, &p->info.parent);
        steps++;
    }
    if (p && p->depth)
        depth = p->depth + steps;
    else if (p && !no_id(&p->info.id) && no_id(&p->info.parent))
        depth = 1 + steps;
    if (depth) /* and down again */
        for (p = e; p && !p->depth; p = find_id(ids, &p->info.parent))
            p->depth = depth--;
    return e->depth;
}

static void set_depths(struct lb_ckpt_entry *v, unsigned n)
{
    struct by_ids ids = {.v = lb_alloc((n + 1) * sizeof(*ids.v)), .n = n};

    for (unsigned i = 0; i < n; i++)
        ids.v[i] = &v[i];
    qsort(ids.v, n, sizeof(*ids.v), by_id);
    for (unsigned i = 0; i < n; i++)
        depth_of(&v[i], &ids);
    free(ids.v);
}

/* Adds what VM has to *v. */
static int list_vm(const char *dir, const char *vm, const struct lb_ckpt_key *key, struct lb_ckpt_entry **v,
                   unsigned *n, struct lb_error *err)
{
    LB_AUTO_FREE uint32_t *numbers = NULL;
    struct lb_error d_err = LB_ERROR_INIT;
    struct lb_disks d;
    unsigned count, first = *n;

    if (numbers_of(dir, vm, &numbers, &count, err))
        return -1;
    lb_disks_load(dir, vm, &d, &d_err);
    *v = lb_realloc(*v, (*n + count + 1) * sizeof(**v));
    for (unsigned i = 0; i < count; i++) {
        LB_AUTO_FREE char *path = lb_catalog_file(dir, vm, numbers[i]);
        load_entry(&(*v)[*n], vm, numbers[i], path, key, &d, &d_err);
        if (gone(&(*v)[*n]))
            lb_ckpt_entry_free(&(*v)[*n]);
        else
            (*n)++;
    }
    lb_disks_free(&d);
    set_depths(*v + first, *n - first);
    return 0;
}

int lb_catalog_list(const char *dir, const char *vm, const struct lb_ckpt_key *key, struct lb_ckpt_entry **v,
                    unsigned *n, struct lb_error *err)
{
    struct dirent *e;
    int rc = 0;

    *v = NULL;
    *n = 0;
    if (vm) {
        rc = lb_catalog_check_vm(vm, err) || list_vm(dir, vm, key, v, n, err) ? -1 : 0;
    } else {
        DIR *d = opendir(dir);
        if (!d && errno != ENOENT)
            return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot read %s", dir);
        while (d && rc == 0 && (e = readdir(d)))
            if (lb_vm_name_valid(e->d_name) && e->d_type != DT_REG)
                rc = list_vm(dir, e->d_name, key, v, n, err);
        if (d)
            closedir(d);
    }
    if (rc) {
        free_entries(*v, *n);
        *v = NULL;
        *n = 0;
        return -1;
    }
    if (*n)
        qsort(*v, *n, sizeof(**v), by_vm_and_number);
    return 0;
}

/* ----------------------------------------------------------------------- chains */

static bool read_ids(const char *path, struct ids *out)
{
    struct lb_cf_header h;
    uint8_t check[16];
    LB_AUTO_FD int fd = open(path, O_RDONLY | O_CLOEXEC);

    if (fd < 0 || pread(fd, &h, sizeof(h), 0) != (ssize_t)sizeof(h) || memcmp(h.magic, LB_CF_MAGIC, sizeof(h.magic)))
        return false;
    lb_cf_hash(check, &h, offsetof(struct lb_cf_header, check), 0);
    if (memcmp(check, h.check, sizeof(check)) || strlen(path) >= sizeof(out->path))
        return false;
    memcpy(out->id.b, h.id, sizeof(out->id.b));
    memcpy(out->parent.b, h.parent, sizeof(out->parent.b));
    strcpy(out->path, path);
    return true;
}

/* All checkpoints beside `path`. */
static struct ids *ids_beside(const char *path, unsigned *n)
{
    LB_AUTO_FREE char *folder = lb_path_parent(path);
    struct ids *v = NULL;
    DIR *d = opendir(folder);
    struct dirent *e;

    *n = 0;
    while (d && (e = readdir(d))) {
        size_t len = strlen(e->d_name), suffix = strlen(LB_CKPT_SUFFIX);
        if (len <= suffix || strcmp(e->d_name + len - suffix, LB_CKPT_SUFFIX))
            continue;
        LB_AUTO_FREE char *file = lb_asprintf("%s/%s", folder, e->d_name);
        v = lb_realloc(v, (*n + 1) * sizeof(*v));
        if (read_ids(file, &v[*n]))
            (*n)++;
    }
    if (d)
        closedir(d);
    return v;
}

static const struct ids *ids_of(const struct ids *v, unsigned n, const struct lb_ckpt_id *id)
{
    for (unsigned i = 0; i < n; i++)
        if (same_id(&v[i].id, id))
            return &v[i];
    return NULL;
}

static int missing_parent(const char *of, const struct lb_ckpt_id *id, struct lb_error *err)
{
    char hex[2 * LB_CKPT_ID_BYTES + 1];

    lb_hex(hex, id->b, sizeof(id->b));
    lb_fail(err, LB_E_NOT_FOUND, "parent of %s (id %s) is missing", of, hex);
    return lb_remedy(err, "bring the file back beside it; without it this checkpoint cannot be read");
}

/* Paths of the chain, the checkpoint first, NULL-terminated; the caller's to free.  What the file says now, not what it
 * said when the entry was made: it may have been written again since. */
static int chain_paths(const struct lb_ckpt_entry *e, char ***paths, unsigned *n, struct lb_error *err)
{
    struct ids self;
    struct lb_ckpt_id parent = read_ids(e->path, &self) ? self.parent : e->info.parent;
    const char *of = e->ref;
    unsigned n_ids = 0, count = 0;
    LB_AUTO_FREE struct ids *ids = no_id(&parent) ? NULL : ids_beside(e->path, &n_ids);
    char **v = lb_alloc((n_ids + 3) * sizeof(*v));

    v[count++] = lb_strdup(e->path);
    while (!no_id(&parent)) {
        const struct ids *p = ids_of(ids, n_ids, &parent);
        if (!p || count > n_ids) {
            missing_parent(of, &parent, err);
            lb_strv_free(v);
            return -1;
        }
        v[count++] = lb_strdup(p->path);
        parent = p->parent;
        of = p->path;
    }
    *paths = v;
    *n = count;
    return 0;
}

static int open_chain(const struct lb_ckpt_entry *e, const struct lb_ckpt_key *key, struct lb_chain **out,
                      struct lb_error *err)
{
    char **paths;
    unsigned n;

    if (chain_paths(e, &paths, &n, err))
        return -1;
    int rc = lb_chain_open((const char *const *)paths, n, key, out, err);
    lb_strv_free(paths);
    return rc;
}

/* A removal may replace and remove files of the chain between our looking for them and opening them.  Then it is
 * another chain a moment later; a chain that is really broken is broken each time. */
int lb_catalog_open(const char *dir, const struct lb_ckpt_entry *e, const struct lb_ckpt_key *key,
                    struct lb_chain **out, struct lb_error *err)
{
    struct lb_error why = LB_ERROR_INIT;

    (void)dir; /* a chain is in one folder, which e->path names */
    if (no_id(&e->info.id)) { /* nothing could be read of it */
        if (err)
            *err = e->error;
        return -1;
    }
    for (unsigned i = 0; i < CHAIN_TRIES; i++) {
        if (open_chain(e, key, out, &why) == 0)
            return 0;
        if (why.code == LB_E_AUTH)
            break;
        lb_sleep_ms(CHAIN_TRY_MS);
    }
    if (err)
        *err = why;
    return -1;
}

/* ------------------------------------------------------------------------- find */

/* "web@1, web@7 (before-upgrade)" of what is there, as much as fits. */
static void say_what_there_is(const struct lb_ckpt_entry *v, unsigned n, struct lb_error *err)
{
    char text[300] = "";
    size_t used = 0;

    for (unsigned i = 0; i < n && used < sizeof(text) - 220; i++) {
        const char *label = v[i].info.meta.label;
        used += (size_t)snprintf(text + used, sizeof(text) - used, "%s%s%s%.60s%s", used ? ", " : "", v[i].ref,
                                 label[0] ? " (" : "", label, label[0] ? ")" : "");
        if (used >= sizeof(text))
            used = sizeof(text) - 1;
    }
    lb_remedy(err, "there is %s%s", text, n && used >= sizeof(text) - 220 ? " ..." : "");
}

static int nothing_of(const char *dir, const char *vm, struct lb_error *err)
{
    struct lb_ckpt_entry *all;
    unsigned n;

    lb_fail(err, LB_E_NOT_FOUND, "there are no checkpoints of a VM named %s", vm);
    if (lb_catalog_list(dir, NULL, NULL, &all, &n, NULL))
        return -1;
    if (n)
        say_what_there_is(all, n, err);
    else
        lb_remedy(err, "`lifeboat checkpoint %s` takes one of a VM that runs", vm);
    free_entries(all, n);
    return -1;
}

static int not_found(const char *dir, const char *vm, const char *what, const struct lb_ckpt_key *key,
                     struct lb_error *err)
{
    struct lb_ckpt_entry *v;
    unsigned n;

    if (lb_catalog_list(dir, vm, key, &v, &n, err))
        return -1;
    if (!n)
        return nothing_of(dir, vm, err);
    lb_fail(err, LB_E_NOT_FOUND, "there is no checkpoint %s@%s", vm, what);
    say_what_there_is(v, n, err);
    free_entries(v, n);
    return -1;
}

/* The number that a label of VM names. */
static int find_label(const char *dir, const char *vm, const char *label, const struct lb_ckpt_key *key,
                      uint32_t *number, struct lb_error *err)
{
    struct lb_ckpt_entry *v;
    unsigned n, hits = 0, locked = 0;
    const char *first = "", *second = "";
    int rc = 0;

    if (lb_catalog_list(dir, vm, key, &v, &n, err))
        return -1;
    for (unsigned i = 0; i < n; i++) {
        locked += !v[i].readable && v[i].error.code == LB_E_AUTH;
        if (!v[i].readable || strcmp(v[i].info.meta.label, label))
            continue;
        *number = v[i].number;
        if (hits++ == 0)
            first = v[i].ref;
        else
            second = v[i].ref;
    }
    if (hits == 0) {
        rc = not_found(dir, vm, label, key, err);
        if (locked)
            lb_remedy(err, "%u of its checkpoints are encrypted: give their key to find a label among them", locked);
    } else if (hits > 1) {
        rc = lb_fail(err, LB_E_USAGE, "%u checkpoints of %s are labelled %.100s: %s and %s", hits, vm, label, first,
                     second);
        lb_remedy(err, "name one by its number");
    }
    free_entries(v, n);
    return rc;
}

/* What is after the '@', or NULL: the latest. */
static int find_number(const char *dir, const char *vm, const char *what, const struct lb_ckpt_key *key,
                       uint32_t *number, struct lb_error *err)
{
    LB_AUTO_FREE uint32_t *v = NULL;
    unsigned n;

    if (numbers_of(dir, vm, &v, &n, err))
        return -1;
    if (!n)
        return nothing_of(dir, vm, err);
    *number = 0;
    if (!what) {
        for (unsigned i = 0; i < n; i++)
            *number = LB_MAX(*number, v[i]);
        return 0;
    }
    size_t digits = strspn(what, "0123456789");
    bool all_digits = digits && digits <= 10 && !what[digits];
    if (all_digits)
        *number = (uint32_t)LB_MIN(strtoull(what, NULL, 10), UINT32_MAX);
    if (!strcmp(what, "suspend") || (all_digits && *number)) {
        for (unsigned i = 0; i < n; i++)
            if (v[i] == *number)
                return 0;
        return not_found(dir, vm, what, key, err);
    }
    return find_label(dir, vm, what, key, number, err);
}

/* As patient as lb_catalog_open. */
static void set_depth(struct lb_ckpt_entry *e)
{
    char **paths;

    e->depth = 0;
    for (unsigned i = 0; !e->depth && i < CHAIN_TRIES && !no_id(&e->info.id); i++) {
        if (i)
            lb_sleep_ms(CHAIN_TRY_MS);
        if (!chain_paths(e, &paths, &e->depth, NULL))
            lb_strv_free(paths);
    }
}

static int find_in_catalog(const char *dir, const char *vm, uint32_t number, const struct lb_ckpt_key *key,
                           struct lb_ckpt_entry *out, struct lb_error *err)
{
    LB_AUTO_FREE char *path = lb_catalog_file(dir, vm, number);
    struct lb_error d_err = LB_ERROR_INIT;
    struct lb_disks d;

    lb_disks_load(dir, vm, &d, &d_err);
    load_entry(out, vm, number, path, key, &d, &d_err);
    lb_disks_free(&d);
    if (gone(out)) {
        lb_ckpt_entry_free(out);
        return lb_fail(err, LB_E_NOT_FOUND, "%s has just been removed", path);
    }
    set_depth(out);
    return 0;
}

/* A path may lead into the catalog. */
static bool path_in_catalog(const char *dir, const char *path, char vm[128], uint32_t *number)
{
    LB_AUTO_FREE char *real_dir = realpath(dir, NULL);
    LB_AUTO_FREE char *real = realpath(path, NULL);
    size_t len = real_dir ? strlen(real_dir) : 0;

    if (!real || !len || strncmp(real, real_dir, len) || real[len] != '/')
        return false;
    char *name = real + len + 1, *slash = strchr(name, '/');
    if (!slash || !lb_catalog_number(slash + 1, number))
        return false;
    *slash = '\0';
    snprintf(vm, 128, "%s", name);
    return lb_vm_name_valid(name);
}

static int find_file(const char *path, const struct lb_ckpt_key *key, struct lb_ckpt_entry *out, struct lb_error *err)
{
    struct lb_error none = LB_ERROR_INIT;
    struct lb_disks d = {0};

    if (access(path, R_OK) < 0)
        return lb_fail_errno(err, errno == ENOENT ? LB_E_NOT_FOUND : LB_E_INTERNAL, errno, "cannot open %s", path);
    if (strlen(path) >= sizeof(out->ref)) {
        lb_fail(err, LB_E_USAGE, "the name of the file is too long: %.200s", path);
        return lb_remedy(err, "move it to a shorter one, or `lifeboat checkpoint import` it");
    }
    load_entry(out, "", 0, path, key, &d, &none);
    set_depth(out);
    return 0;
}

int lb_catalog_find(const char *dir, const char *ref, const struct lb_ckpt_key *key, struct lb_ckpt_entry *out,
                    struct lb_error *err)
{
    char vm[128];
    uint32_t number;

    if (strchr(ref, '/') && !path_in_catalog(dir, ref, vm, &number))
        return find_file(ref, key, out, err);
    if (!strchr(ref, '/')) {
        const char *at = strchr(ref, '@');
        LB_AUTO_FREE char *name = at ? lb_asprintf("%.*s", (int)(at - ref), ref) : lb_strdup(ref);
        if (lb_catalog_check_vm(name, err))
            return lb_remedy(err, "a checkpoint is named VM@NUMBER, VM@LABEL, VM@suspend, or by the path of its file");
        snprintf(vm, sizeof(vm), "%s", name);
        if (find_number(dir, vm, at ? at + 1 : NULL, key, &number, err))
            return -1;
    }
    return find_in_catalog(dir, vm, number, key, out, err);
}

/* ------------------------------------------------------------- what can stand, what can go */

int lb_catalog_latest(const char *dir, const char *vm, const struct lb_ckpt_key *key, struct lb_ckpt_entry *out,
                      struct lb_error *err)
{
    struct lb_ckpt_entry *v;
    unsigned n;

    if (lb_catalog_list(dir, vm, key, &v, &n, err))
        return -1;
    for (unsigned i = n; i-- > 0;) {
        struct lb_ckpt_entry *e = &v[i];
        if (!e->number || !e->readable || !e->depth || e->depth >= LB_CF_MAX_DEPTH || e->info.encrypted != (key != NULL))
            continue;
        *out = *e;
        *e = (struct lb_ckpt_entry){0};
        free_entries(v, n);
        return 0;
    }
    free_entries(v, n);
    return lb_fail(err, LB_E_NOT_FOUND, "VM %s has no checkpoint that another one can stand on", vm);
}

int lb_catalog_prunable(const char *dir, const char *vm, const struct lb_ckpt_key *key, unsigned keep,
                        uint64_t max_age_ms, bool labelled, uint32_t **v, unsigned *n, struct lb_error *err)
{
    uint64_t now = lb_wall_ms();
    struct lb_ckpt_entry *all;
    unsigned count, kept = 0;

    if (lb_catalog_list(dir, vm, key, &all, &count, err))
        return -1;
    *v = lb_alloc((count + 1) * sizeof(**v));
    *n = 0;
    for (unsigned i = count; i-- > 0;) {
        const struct lb_ckpt_entry *e = &all[i];
        if (!e->number || kept++ < keep)
            continue;
        /* Neither age nor label of one that cannot be read is known: it stays until somebody names it. */
        if (!e->readable || (e->info.meta.label[0] && !labelled) ||
            (max_age_ms && e->info.meta.created_ms + max_age_ms > now))
            continue;
        (*v)[(*n)++] = e->number;
    }
    free_entries(all, count);
    return 0;
}
