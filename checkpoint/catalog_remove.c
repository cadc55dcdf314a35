/* checkpoint/catalog_remove.c - checkpoints go, and what stood on them stays whole.
 *
 *      before   1 <- 2 <- 3 <- 4          1. 3 is written again, holding what 1 and 2 had for it: 3' (rename over 3)
 *      rm 1 2                              2. disks.json knows the images of 1 and 2
 *      after    3' <- 4                    3. files of 2 and 1 go, the newest first
 *                                          4. their images are joined with those above (catalog_images.c)
 *
 * 3' has the id of 3, so 4 needs nothing.  Killed anywhere: before a rename the old chain is there; between 1 and 3
 * there is only more than needed; in 3 a file never goes before those that stand on it; 4 goes on at the
 * next removal, from disks.json. */
#include "checkpoint/catalog_internal.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>
#include <sys/stat.h>

struct removal {
    const char *dir, *vm;
    const struct lb_ckpt_key *key;
    struct lb_ckpt_entry *v;         /* all of the VM, by number */
    unsigned n;
    bool *goes;                      /* by entry */
    int *parent;                     /* by entry: index, -1: none or missing */
    struct lb_share share;           /* of the whole */
    int cancel_fd;
    struct lb_prune_result res;
    int64_t freed;
};

static uint64_t blocks_of(const char *path)
{
    struct stat st;

    return stat(path, &st) == 0 ? (uint64_t)st.st_blocks * 512 : 0;
}

static bool same(const struct lb_ckpt_id *a, const struct lb_ckpt_id *b)
{
    return !memcmp(a, b, sizeof(*a));
}

static void find_parents(struct removal *r)
{
    static const struct lb_ckpt_id none;

    for (unsigned i = 0; i < r->n; i++) {
        r->parent[i] = -1;
        for (unsigned k = 0; k < r->n && !same(&r->v[i].info.parent, &none); k++)
            if (k != i && same(&r->v[i].info.parent, &r->v[k].info.id))
                r->parent[i] = (int)k;
    }
}

static int mark(struct removal *r, const uint32_t *numbers, unsigned n, struct lb_error *err)
{
    for (unsigned i = 0; i < n; i++) {
        unsigned k = 0;
        while (k < r->n && r->v[k].number != numbers[i])
            k++;
        if (k == r->n)
            return lb_fail(err, LB_E_NOT_FOUND, "there is no checkpoint %s@%" PRIu32, r->vm, numbers[i]);
        r->goes[k] = true;
    }
    return 0;
}

/* Has to be written again: stays, and its parent goes. */
static bool orphan(const struct removal *r, unsigned i)
{
    return !r->goes[i] && r->parent[i] >= 0 && r->goes[r->parent[i]];
}

/* Those that would have to be written again can be: said before anything is done. */
static int check_orphans(struct removal *r, struct lb_error *err)
{
    for (unsigned i = 0; i < r->n; i++) {
        const struct lb_ckpt_entry *e = &r->v[i], *p = r->parent[i] >= 0 ? &r->v[r->parent[i]] : NULL;
        if (!orphan(r, i) || (e->readable && e->depth))
            continue;
        if (e->readable)
            lb_fail(err, LB_E_STATE, "%s stands on %s, and a parent further down is missing", e->ref, p->ref);
        else
            lb_fail(err, e->error.code == LB_E_AUTH ? LB_E_AUTH : LB_E_STATE, "%s stands on %s: %s", e->ref, p->ref,
                    e->error.message);
        return lb_remedy(err, e->error.code == LB_E_AUTH ? "give the key of %s" : "remove %s as well", e->ref);
    }
    return 0;
}

/* Files to read for it, for the progress: its own and those that go. *files: how many. -1: no parent stays. */
static int merged_of(const struct removal *r, unsigned i, unsigned *files, uint64_t *bytes)
{
    int p = r->parent[i];

    *files = 1;
    *bytes = r->v[i].info.file_bytes;
    for (; p >= 0 && r->goes[p]; p = r->parent[p]) {
        (*files)++;
        *bytes += r->v[p].info.file_bytes;
    }
    return p;
}

static int write_again(struct removal *r, unsigned i, struct lb_error *err)
{
    struct lb_ckpt_entry *e = &r->v[i];
    struct lb_chain *chain = NULL, *parent = NULL;
    uint64_t before = blocks_of(e->path);
    unsigned files;
    int p = merged_of(r, i, &files, &r->share.weight);
    int rc = lb_catalog_open(r->dir, e, r->key, &chain, err);

    if (rc == 0 && p >= 0)
        rc = lb_catalog_open(r->dir, &r->v[p], r->key, &parent, err);
    if (rc == 0)
        rc = lb_chain_merge(chain, files, parent, &lb_chain_info(chain)->meta, e->path, r->key, lb_share_progress,
                            &r->share, r->cancel_fd, err);
    lb_chain_close(parent);
    lb_chain_close(chain);
    if (rc)
        return lb_context(err, "cannot merge %s with what it stands on", e->ref);
    r->share.before += r->share.weight;
    r->freed += (int64_t)before - (int64_t)blocks_of(e->path);
    r->res.joined++;
    lb_point("rm-rewritten");
    return 0;
}

static int write_orphans(struct removal *r, struct lb_error *err)
{
    unsigned files;
    uint64_t bytes;

    for (unsigned i = 0; i < r->n; i++)
        if (orphan(r, i)) {
            merged_of(r, i, &files, &bytes);
            r->share.total += bytes;
        }
    for (unsigned i = 0; i < r->n; i++)
        if (orphan(r, i) && write_again(r, i, err))
            return -1;
    return 0;
}

/* So that the images of what goes are known when the files are gone, and those of what stays can move.  *all: there is
 * none of which nobody knows (encrypted, or damaged). */
static int note_images(struct removal *r, struct lb_disks *d, bool *all, struct lb_error *err)
{
    *all = true;
    for (unsigned i = 0; i < r->n; i++) {
        if (lb_disks_find(d, r->v[i].number))
            continue;
        if (r->v[i].readable)
            lb_disks_put(d, r->v[i].number, r->v[i].disks, r->v[i].n_disks);
        else
            *all &= r->goes[i];
    }
    return lb_disks_save(r->dir, r->vm, d, err);
}

static int unlink_files(struct removal *r, struct lb_error *err)
{
    for (unsigned i = r->n; i-- > 0;) { /* numbers rise along a chain: nothing goes before what stands on it */
        struct lb_ckpt_entry *e = &r->v[i];
        if (!r->goes[i])
            continue;
        LB_AUTO_FREE char *ws = lb_asprintf("%.*s.ws", (int)(strlen(e->path) - strlen(LB_CKPT_SUFFIX)), e->path);
        uint64_t bytes = blocks_of(e->path) + blocks_of(ws);
        if (unlink(e->path) < 0 && errno != ENOENT)
            return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot remove %s", e->path);
        unlink(ws);
        r->freed += (int64_t)bytes;
        r->res.removed++;
        lb_point("rm-unlinked");
    }
    LB_AUTO_FREE char *vm_dir = lb_catalog_vm_dir(r->dir, r->vm);
    return lb_sync_dir(vm_dir, err);
}

static int remove_all(struct removal *r, const struct lb_image_join *join, struct lb_error *err)
{
    struct lb_disks d;
    bool all_known;

    if (lb_disks_load(r->dir, r->vm, &d, err))
        return -1;
    int rc = write_orphans(r, err) || note_images(r, &d, &all_known, err) || unlink_files(r, err) ? -1 : 0;
    if (rc == 0) {
        lb_disks_tidy(r->dir, r->vm, &d);
        rc = lb_disks_save(r->dir, r->vm, &d, err);
    }
    if (rc == 0)
        rc = lb_images_reduce(r->dir, r->vm, &d, all_known ? join : NULL, &r->res, &r->freed, err);
    lb_disks_free(&d);
    return rc;
}

int lb_catalog_remove(const char *dir, const char *vm, const uint32_t *numbers, unsigned n,
                      const struct lb_ckpt_key *key, const struct lb_image_join *join,
                      void (*progress)(uint64_t done, uint64_t total, void *arg), void *arg, int cancel_fd,
                      struct lb_prune_result *res, struct lb_error *err)
{
    struct removal r = {.dir = dir, .vm = vm, .key = key, .cancel_fd = cancel_fd,
                        .share = {.progress = progress, .arg = arg}};

    *res = (struct lb_prune_result){0};
    if (lb_catalog_list(dir, vm, key, &r.v, &r.n, err))
        return -1;
    r.goes = lb_alloc(r.n + 1);
    r.parent = lb_alloc((r.n + 1) * sizeof(*r.parent));
    find_parents(&r);
    int rc = mark(&r, numbers, n, err) || check_orphans(&r, err) || remove_all(&r, join, err) ? -1 : 0;
    r.res.freed_bytes = r.freed > 0 ? (uint64_t)r.freed : 0;
    *res = r.res;
    for (unsigned i = 0; i < r.n; i++)
        lb_ckpt_entry_free(&r.v[i]);
    free(r.v);
    free(r.goes);
    free(r.parent);
    return rc;
}
