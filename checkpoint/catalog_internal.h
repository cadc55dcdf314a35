/* checkpoint/catalog_internal.h - shared by the files of the catalog: disks.json, images, merging. */
#ifndef LB_CATALOG_INTERNAL_H
#define LB_CATALOG_INTERNAL_H

#include "checkpoint/catalog.h"
#include "core/qcow2.h"

/* ---- disks.json of one VM (disks_json.c) */

struct lb_disks_of {
    uint32_t number;
    struct lb_ckpt_disk *v;
    unsigned n;
};
struct lb_disks_user {
    char image[512], user[128];
};
/* A join that was begun: what is known about it decides after a crash whether it came to its end. */
struct lb_disks_joining {
    char id[256], top[512], base[512], base_format[32];
    char above[512];                 /* image that stood on top; "": the guest wrote to top itself */
    bool done;                       /* whoever used top uses base; top's file is still to go */
};
struct lb_disks {
    struct lb_disks_of *of;          /* by checkpoint */
    unsigned n_of;
    struct lb_disks_user *users;
    unsigned n_users;
    struct lb_ckpt_disk *spare;      /* of checkpoints that are gone: to be joined when that is possible */
    unsigned n_spare;
    struct lb_disks_joining joining; /* top "": none */
};
/* No file is an empty one. LB_E_STATE: damaged. */
int lb_disks_load(const char *dir, const char *vm, struct lb_disks *out, struct lb_error *err);
int lb_disks_save(const char *dir, const char *vm, const struct lb_disks *d, struct lb_error *err);
void lb_disks_free(struct lb_disks *d);
const struct lb_disks_of *lb_disks_find(const struct lb_disks *d, uint32_t number);
void lb_disks_put(struct lb_disks *d, uint32_t number, const struct lb_ckpt_disk *v, unsigned n);
/* Is `path` the image of a checkpoint? */
bool lb_disks_held(const struct lb_disks *d, const char *path);
/* Take what is no more: the images of checkpoints whose file is gone become spare ones, users whose image is gone are
 * forgotten. True when anything changed. Lock held. */
bool lb_disks_tidy(const char *dir, const char *vm, struct lb_disks *d);
void lb_disks_drop_spare(struct lb_disks *d, unsigned i);

/* ---- images (catalog_images.c) */

/* Join or delete the spare images of VM as far as nobody else needs them; counts into res. Lock held. */
int lb_images_reduce(const char *dir, const char *vm, struct lb_disks *d, const struct lb_image_join *join,
                     struct lb_prune_result *res, int64_t *freed, struct lb_error *err);

/* A join that its session did not see the end of: complete the books when it was done; else forget it when give_up. */
int lb_images_settle(const char *dir, const char *vm, struct lb_disks *d, bool give_up, struct lb_prune_result *res,
                     int64_t *freed, struct lb_error *err);

bool lb_same_file(const char *a, const char *b);
/* Images in the folder of `base`, and of `more` (n), that stand on it. NULL-terminated, caller: lb_strv_free. */
char **lb_images_above(const char *base, const char *const *more, unsigned n);

/* ---- names (catalog_names.c) */

char *lb_catalog_vm_dir(const char *dir, const char *vm);
char *lb_catalog_file(const char *dir, const char *vm, uint32_t number);
/* Number of "7.lbc" or "suspend.lbc" (0); false: another file. */
bool lb_catalog_number(const char *file_name, uint32_t *number);
int lb_catalog_check_vm(const char *vm, struct lb_error *err);
struct lb_ckpt_disk *lb_disks_dup(const struct lb_ckpt_disk *v, unsigned n);
/* Size, time and inode of `path` as they are now. */
int lb_disk_identify(struct lb_ckpt_disk *d, struct lb_error *err);

/* ---- merging (flatten.c) */

typedef void lb_progress_fn(uint64_t done, uint64_t total, void *arg);
/* The newest `files` files of c as one file at `path` that stands on `parent` (NULL: full; then files is the whole
 * chain), with this meta. */
int lb_chain_merge(struct lb_chain *c, unsigned files, struct lb_chain *parent, const struct lb_ckpt_meta *meta,
                   const char *path, const struct lb_ckpt_key *key, lb_progress_fn *progress, void *arg,
                   int cancel_fd, struct lb_error *err);

/* A part of a longer work, for its progress. */
struct lb_share {
    lb_progress_fn *progress;
    void *arg;
    uint64_t before, weight, total;
};
void lb_share_progress(uint64_t done, uint64_t total, void *share);

/* qemu-img with these arguments (argv[0] included); its percentage goes to share. */
int lb_qemu_img(const char *const argv[], struct lb_share *share, int cancel_fd, struct lb_error *err);

#endif
