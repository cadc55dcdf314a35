/* checkpoint/catalog_manifest.h - the folder of an exported checkpoint: what export writes and import believes. */
#ifndef LB_CATALOG_MANIFEST_H
#define LB_CATALOG_MANIFEST_H

#include "checkpoint/catalog_internal.h"

#define LB_MANIFEST_FILE "manifest.json"
#define LB_EXPORT_CHECKPOINT "checkpoint" LB_CKPT_SUFFIX
#define LB_EXPORT_DISK "disk-%u.qcow2"

struct lb_manifest_file {
    char name[32];
    uint64_t bytes;
    char sha256[65];
};
struct lb_manifest_disk {
    struct lb_manifest_file file;
    char id[256], argv_path[512];    /* as in struct lb_ckpt_disk */
    uint64_t size_bytes;             /* as the guest sees it */
};
struct lb_manifest {
    char vm[128];
    uint32_t number;                 /* it had there */
    bool encrypted;
    struct lb_manifest_file checkpoint;
    struct lb_manifest_disk *disks;
    unsigned n_disks;
};
int lb_manifest_load(const char *folder, struct lb_manifest *out, struct lb_error *err);
int lb_manifest_save(const char *folder, const struct lb_manifest *m, struct lb_error *err);
void lb_manifest_free(struct lb_manifest *m);

/* Size and SHA-256 of `from`, and with `to` a durable copy there (must not exist; whoever fails removes it). */
int lb_copy_sum(const char *from, const char *to, struct lb_manifest_file *sum, struct lb_share *share, int cancel_fd,
                struct lb_error *err);

#endif
