/*
 * core/qcow2.h - what a qcow2 image says in its header. Nothing is locked: it may be in use. Any thread.
 */
#ifndef LB_QCOW2_H
#define LB_QCOW2_H

#include "core/core.h"

struct lb_qcow2_head {
    bool qcow2;          /* else nothing below */
    uint64_t size_bytes; /* as the guest sees it */
    bool data_file;      /* its data are in another file */
    bool opaque;         /* has a backing file, but which is not said in a way we understand */
    bool local;          /* `backing` is a file of this host, relative names resolved beside the image */
    bool backing_raw;    /* it is to be read as it is, whatever it begins with */
    char backing[1024];  /* not local: as it stands there; "" none, or (opaque) a header that is damaged */
};
/* LB_E_NOT_FOUND, or it cannot be read. Never for an image that may be raw: what that begins with is its guest's. */
int lb_qcow2_head(const char *path, struct lb_qcow2_head *out, struct lb_error *err);

/* The files an image stands on, next one first, as its header and theirs say. *files NULL-terminated, caller:
 * lb_strv_free. A file that is missing ends it: LB_E_NOT_FOUND names it (the image itself included); LB_E_PREFLIGHT:
 * a damaged header, or no end. */
int lb_qcow2_chain(const char *image, char ***files, struct lb_error *err);

#endif
