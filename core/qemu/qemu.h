/*
 * core/qemu/qemu.h - what the QEMU backend offers beside the table lb_hv_qemu.
 */
#ifndef LB_QEMU_H
#define LB_QEMU_H

#include "core/hv.h"

/* Where throttling of VMs that have no run_dir of ours (adopted ones) is
 * recorded, as DIR/throttle-PID.  A VM launched by lb_hv_qemu records in its
 * run_dir as RUN_DIR/throttle.  Default: $LIFEBOAT_THROTTLE_DIR, else
 * /run/lifeboat.  Call before the first throttle; the string is copied. */
void lb_qemu_set_throttle_dir(const char *dir);

/* Undo what a dead process of ours recorded in `path` and remove the file.
 * Missing file, or a VM that is gone: success. Any thread. */
int lb_qemu_throttle_undo(const char *path, struct lb_error *err);

/* The command line of a receiver for desc on this host: what launch starts.
 * *argv NULL-terminated, caller: lb_strv_free. */
int lb_qemu_receiver_argv(const struct lb_vm_desc *desc, const struct lb_launch_opts *opts,
                          char ***argv, struct lb_error *err);

/* argv (argv[0] included) with another image where a disk of it is `path`, as it is written there. *out NULL-terminated,
 * caller: lb_strv_free. LB_E_UNSUPPORTED: no disk of it is. */
int lb_qemu_argv_image(char *const *argv, const char *path, const char *to, const char *format, char ***out,
                       struct lb_error *err);

#endif
