/*
 * cmd/daemon/vm_images.c - a VM is started on, or found on, an image that a checkpoint holds.
 *
 * A live checkpoint leaves the image of the command line as it is and lets the guest write to an overlay.  When that guest
 * has ended and is started by the same command line, it would be back in the past, and what it writes there would
 * damage every checkpoint that stands on the image.  So `run` starts it where it went on.
 */
#include "cmd/daemon/ckpt.h"

#include <string.h>

#include "core/qemu/argv_scan.h"
#include "core/qemu/qemu.h"

static char *absolute(const char *cwd, const char *path)
{
    return path[0] == '/' ? lb_strdup(path) : lb_asprintf("%s/%s", cwd, path);
}

static int refuse(const char *image, const struct lb_image_held *h, struct lb_error *err)
{
    lb_fail(err, LB_E_STATE, "disk %s must not be written to: it holds %s", image, h->by);
    if (h->suspended)
        return lb_remedy(err, "`lifeboat resume %s` brings that VM back", h->vm);
    if (!h->newest[0])
        return lb_remedy(err, "no image stands on it any more: `lifeboat restore %s` goes on from the checkpoint",
                         strchr(h->by, '@') ? h->by : "REF");
    return lb_remedy(err, "several images stand on it: start the VM with the one it is to go on with: %.200s or %.200s%s",
                     h->newest[0], h->newest[1], h->newest[2] ? " or others" : "");
}

/* One image of the command line. */
static int check_image(const char *catalog_dir, const char *vm, const char *cwd, const char *value, char ***argv,
                       json_t *warnings, struct lb_error *err)
{
    LB_AUTO_FREE char *image = absolute(cwd, value);
    struct lb_image_held h;
    char **now = NULL;
    int rc = 0;

    if (!lb_catalog_image_held(catalog_dir, image, vm, &h))
        return 0;
    if (h.suspended || !h.newest[0] || h.newest[1]) {
        rc = refuse(image, &h, err);
    } else if (lb_qemu_argv_image(*argv, value, h.newest[0], "qcow2", &now, err)) {
        rc = lb_remedy(err, "%s holds %s: start the VM with %s", image, h.by, h.newest[0]);
    } else {
        lb_strv_free(*argv);
        *argv = now;
        LB_AUTO_FREE char *text = lb_asprintf("disk %s holds %s and is not written to: the VM goes on with %s", image,
                                              h.by, h.newest[0]);
        json_array_append_new(warnings, lb_json_text(text));
    }
    lb_image_held_free(&h);
    return rc;
}

int lb_vm_newest_images(struct daemon *d, const char *vm, const char *cwd, char ***argv, json_t *warnings,
                        struct lb_error *err)
{
    struct lb_arg_item *v = NULL;
    struct lb_ckpt_host host;
    unsigned n = 0;
    int rc = 0;

    if (lb_ckpt_host_open(&host, d->opt.state_dir, d->opt.config_path, err))
        return -1;
    lb_argv_scan(*argv, &v, &n);
    for (unsigned i = 0; i < n && !rc; i++)
        if (v[i].kind == LB_ARG_DISK && !v[i].read_only)
            rc = check_image(host.catalog_dir, vm, cwd, v[i].value, argv, warnings, err);
    lb_argv_items_free(v, n);
    lb_ckpt_host_close(&host);
    return rc;
}

void lb_vm_warn_images(struct daemon *d, const char *vm, const struct lb_vm_desc *desc, json_t *damages)
{
    struct lb_error err = LB_ERROR_INIT;
    struct lb_ckpt_host host;

    if (lb_ckpt_host_open(&host, d->opt.state_dir, d->opt.config_path, &err)) {
        lb_log_error(LB_LOG_WARN, &err);
        return;
    }
    for (unsigned i = 0; i < desc->n_disks; i++) {
        const struct lb_disk_desc *k = &desc->disks[i];
        struct lb_image_held h;

        if (k->read_only || k->backing || !lb_catalog_image_held(host.catalog_dir, k->path, vm, &h))
            continue;
        LB_AUTO_FREE char *text = lb_asprintf("VM %s writes to disk %s, which holds %s: that state of the disk is lost, and so "
                                              "is what stands on it%s%s", vm, k->path, h.by,
                                              h.newest[0] ? "; stop it and start it with " : "",
                                              h.newest[0] ? h.newest[0] : "");
        lb_log(LB_LOG_ERROR, "%s", text);
        json_array_append_new(damages, lb_json_text(text));
        lb_image_held_free(&h);
    }
    lb_ckpt_host_close(&host);
}
