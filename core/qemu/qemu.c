/*
 * core/qemu/qemu.c - lb_hv_qemu: stock QEMU (KVM or TCG) driven from outside.
 *
 * The facts it stands on: dirty log by write protection made from outside
 * (dirty_uffd.c), guest memory through /proc (ramblocks.c, ram.c), device state
 * through QMP (state.c).  Nothing is preloaded or patched, so a VM started by hand
 * can be adopted while it runs.
 *
 * Happy path of a round:   stop (disks drained) - clean - cont
 * QMP commands are sent ahead where the next one is known: see qmp.c.
 */
#include "core/qemu/qemu_internal.h"

#include <assert.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>

#define YOUNG_MS 500

struct lb_hv_vm *lb_qemu_vm_new(const char *name)
{
    struct lb_hv_vm *vm = lb_alloc(sizeof(*vm));
    vm->base.ops = &lb_hv_qemu;
    vm->name = lb_strdup(name ? name : "");
    vm->pidfd = vm->pagemap_fd = vm->uffd = vm->state_fd = vm->state_wfd = vm->fdset = -1;
    vm->lazy_uffd = vm->lazy_view_uffd = -1;
    return vm;
}

void lb_qemu_vm_free(struct lb_hv_vm *vm)
{
    if (!vm)
        return;
    if (vm->dirty)
        vm->dirty->disable(vm);
    lb_qemu_lazy_close(vm);
    lb_qemu_free_blocks(vm);
    lb_qemu_state_close(vm);
    lb_qmp_close(vm->qmp);
    lb_cleanup_fd(&vm->pagemap_fd);
    lb_cleanup_fd(&vm->pidfd);
    lb_qemu_mirrors_free(vm);
    lb_qemu_overlays_free(vm);
    lb_qemu_holds_free(vm);
    free(vm->save_text);
    free(vm->throttle_path);
    free(vm->machine);
    free(vm->qmp_path);
    free(vm->run_dir);
    lb_strv_free(vm->sockets);
    free(vm->name);
    free(vm);
}

/* ------------------------------------------------------------------ attach */

static char *resolve(pid_t pid, const char *path)
{
    /* relative to QEMU's directory, not to ours */
    return path[0] == '/' ? lb_strdup(path) : lb_asprintf("/proc/%d/cwd/%s", (int)pid, path);
}

/* unix socket of "unix:PATH,server=on" or "socket,id=..,path=PATH,server=on" */
static char *listening_path(const char *value)
{
    LB_AUTO_FREE char *path = NULL;
    if (strncmp(value, "unix:", 5) == 0) {
        path = lb_qemu_prop(value + 5, NULL);
        if (!path)
            path = lb_qemu_prop(value + 5, "path");
    } else {
        path = lb_qemu_prop(value, "path");
    }
    LB_AUTO_FREE char *server = lb_qemu_prop(value, "server");
    bool listens = server ? strcmp(server, "off") != 0 && strcmp(server, "no") != 0
                          : strstr(value, ",server") != NULL;
    return path && listens ? LB_STEAL_PTR(path) : NULL;
}

static const char *chardev_value(const struct lb_qemu_opts *o, const char *id)
{
    for (unsigned i = 0; i < o->n; i++) {
        if (!lb_qemu_opt_is(&o->v[i], "chardev"))
            continue;
        LB_AUTO_FREE char *have = lb_qemu_prop(o->v[i].value, "id");
        if (have && strcmp(have, id) == 0)
            return o->v[i].value;
    }
    return NULL;
}

static char *monitor_path(const struct lb_qemu_opts *o, const struct lb_qemu_opt *opt)
{
    if (lb_qemu_opt_is(opt, "qmp") || lb_qemu_opt_is(opt, "qmp-pretty")) {
        const char *v = strncmp(opt->value, "chardev:", 8) == 0 ? chardev_value(o, opt->value + 8)
                                                                : opt->value;
        return v ? listening_path(v) : NULL;
    }
    if (!lb_qemu_opt_is(opt, "mon"))
        return NULL;
    LB_AUTO_FREE char *mode = lb_qemu_prop(opt->value, "mode");
    LB_AUTO_FREE char *dev = lb_qemu_prop(opt->value, "chardev");
    if (!dev)
        dev = lb_qemu_prop(opt->value, NULL);
    const char *v = dev && mode && strcmp(mode, "control") == 0 ? chardev_value(o, dev) : NULL;
    return v ? listening_path(v) : NULL;
}

/* Try every monitor on the command line; the error is that of the last one. */
static int open_any(struct lb_hv_vm *vm, uint64_t until, struct lb_error *err)
{
    char **argv = NULL;
    struct lb_qemu_opts o = {0};
    int rc = -1, tried = 0;
    if (lb_proc_cmdline(vm->proc.pid, &argv, err) < 0)
        return -1;
    if (lb_qemu_opts_parse(argv, &o, err) < 0)
        goto out;
    for (unsigned i = 0; i < o.n && rc < 0; i++) {
        LB_AUTO_FREE char *path = monitor_path(&o, &o.v[i]);
        if (!path)
            continue;
        LB_AUTO_FREE char *full = resolve(vm->proc.pid, path);
        tried++;
        rc = lb_qmp_open(full, vm->proc.pid, vm->pidfd, until, &vm->qmp, err);
        if (rc == 0)
            vm->qmp_path = LB_STEAL_PTR(full);
    }
    if (!tried) {
        lb_fail(err, LB_E_NOT_FOUND, "process %d has no QMP monitor on a unix socket",
                (int)vm->proc.pid);
        lb_remedy(err, "start the VM with -qmp unix:PATH,server=on,wait=off, or give --qmp");
    }
out:
    lb_qemu_opts_free(&o);
    lb_strv_free(argv);
    return rc;
}

/* STOP and RESUME come for everybody's commands. Ours are between the sending of "stop" and
 * the answer to "cont". */
static void on_event(const char *event, const json_t *data, void *arg)
{
    struct lb_hv_vm *vm = arg;
    if (strcmp(event, "RESUME") == 0)
        vm->paused_by_others = false;
    else if (strcmp(event, "STOP") == 0)
        vm->paused_by_others = !vm->stopped_by_us;
    else if (strcmp(event, "SHUTDOWN") == 0)
        vm->shut_down = true;
    else if (strncmp(event, "BLOCK_JOB_", 10) == 0) {
        lb_qemu_mirror_event(vm, event, data);
        lb_qemu_join_event(vm, event, data);
    }
}

int lb_qemu_identify(struct lb_hv_vm *vm, struct lb_error *err)
{
    json_t *ret = NULL;
    lb_qmp_on_event(vm->qmp, on_event, vm);
    /* all questions before the first answer */
    if (lb_qmp_send(vm->qmp, "query-version", NULL, -1, NULL, err) < 0 ||
        lb_qmp_send(vm->qmp, "qom-get", "{\"path\":\"/machine\",\"property\":\"type\"}", -1, NULL, err) < 0 ||
        lb_qmp_send(vm->qmp, "query-status", NULL, -1, NULL, err) < 0 ||
        lb_qmp_wait(vm->qmp, "query-version", LB_QMP_MS, &ret, err) < 0)
        return -1;
    json_t *v = json_object_get(ret, "qemu");
    const char *key[3] = {"major", "minor", "micro"};
    for (int i = 0; i < 3; i++)
        vm->version[i] = (int)json_integer_value(json_object_get(v, key[i]));
    json_decref(ret);

    if (lb_qmp_wait(vm->qmp, "qom-get", LB_QMP_MS, &ret, err) < 0)
        return -1;
    const char *type = json_string_value(ret);
    size_t n = type ? strlen(type) : 0;
    if (n > 8 && strcmp(type + n - 8, "-machine") == 0)
        vm->machine = lb_asprintf("%.*s", (int)n - 8, type);
    json_decref(ret);
    if (!vm->machine)
        return lb_fail(err, LB_E_UNSUPPORTED, "cannot find out the machine type of QEMU");

    if (lb_qmp_wait(vm->qmp, "query-status", LB_QMP_MS, &ret, err) < 0)
        return -1;
    vm->base.state = json_is_true(json_object_get(ret, "running")) ? LB_HV_RUNNING : LB_HV_STOPPED;
    json_decref(ret);
    return lb_qemu_open_pagemap(vm, err);
}

int lb_qemu_open_pagemap(struct lb_hv_vm *vm, struct lb_error *err)
{
    char path[64];
    if (vm->pagemap_fd >= 0)
        return 0;
    snprintf(path, sizeof(path), "/proc/%d/pagemap", (int)vm->proc.pid);
    vm->pagemap_fd = open(path, O_RDONLY | O_CLOEXEC);
    if (vm->pagemap_fd < 0) {
        lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot open the page table of process %d",
                      (int)vm->proc.pid);
        return lb_remedy(err, "lifeboatd needs root");
    }
    return 0;
}

int lb_qemu_connect(struct lb_hv_vm *vm, struct lb_error *err)
{
    if (vm->qmp)
        return 0;
    /* a QEMU that was started a moment ago does not listen yet */
    uint64_t until = lb_now_ns() + YOUNG_MS * UINT64_C(1000000);
    if ((vm->qmp_path ? lb_qmp_open(vm->qmp_path, vm->proc.pid, vm->pidfd, until, &vm->qmp, err)
                      : open_any(vm, until, err)) < 0)
        return -1;
    if (lb_qemu_identify(vm, err) == 0)
        return 0;
    lb_qmp_close(LB_STEAL_PTR(vm->qmp));
    return -1;
}

static int attach(const struct lb_vm_ident *ident, struct lb_hv_vm **out, struct lb_error *err)
{
    struct lb_hv_vm *vm = lb_qemu_vm_new(ident->name);
    vm->proc = ident->proc;
    vm->qmp_path = lb_strdup(ident->qmp_path);
    vm->pidfd = lb_proc_open(&ident->proc, err);
    if (vm->pidfd < 0 || lb_qemu_connect(vm, err) < 0) {
        lb_context(err, "VM %s", vm->name);
        lb_qemu_vm_free(vm);
        return -1;
    }
    *out = vm;
    return 0;
}

/* ------------------------------------------------------------------ source */

static int blocks(struct lb_hv_vm *vm, const struct lb_ram_block **out, unsigned *n,
                  struct lb_error *err)
{
    if (!vm->blocks && lb_qemu_find_blocks(vm, err) < 0)
        return -1;
    *out = vm->table;
    *n = vm->n_blocks;
    return 0;
}

static int stop(struct lb_hv_vm *vm, struct lb_error *err)
{
    if (lb_qmp_drain(vm->qmp, err) < 0)
        return -1;
    vm->stopped_by_us = true;
    /* what follows is read by QEMU while it stops */
    if (lb_qmp_send(vm->qmp, "stop", NULL, -1, vm->save_text ? vm->save_text : LB_QMP_CONT,
                    err) < 0 ||
        lb_qmp_wait(vm->qmp, "stop", LB_QMP_SLOW_MS, NULL, err) < 0)
        return -1;
    vm->stop_count++;
    return 0;
}

static int cont(struct lb_hv_vm *vm, struct lb_error *err)
{
    if (vm->paused_by_others && !vm->released)
        return 0; /* somebody paused it before we stopped it, and did not ask for this */
    if (lb_qmp_send(vm->qmp, "cont", NULL, -1, vm->base.logging ? LB_QMP_STOP : NULL, err) < 0)
        return -1;
    if (lb_qmp_wait(vm->qmp, "cont", LB_QMP_SLOW_MS, NULL, err) < 0) {
        if (err && strstr(err->message, "lock"))
            lb_remedy(err, "another process holds a disk of this VM: if the VM runs elsewhere, "
                           "this copy must not");
        return -1;
    }
    vm->stopped_by_us = vm->released = false;
    return 0;
}

static int log_enable(struct lb_hv_vm *vm, struct lb_error *err)
{
    const struct lb_ram_block *table;
    unsigned n;
    const struct lb_dirty_ops *ops = lb_dirty_choose(err);
    if (!ops || blocks(vm, &table, &n, err) < 0)
        return -1;
    if (ops->enable(vm, err) < 0)
        return lb_context(err, "VM %s", vm->name);
    vm->dirty = ops;
    /* DMA submitted before this moment marked its pages too early: let it finish
     * before anybody copies them */
    if (vm->base.state == LB_HV_RUNNING && (stop(vm, err) < 0 || cont(vm, err) < 0)) {
        cont(vm, NULL);
        ops->disable(vm);
        vm->dirty = NULL;
        return -1;
    }
    return 0;
}

static int log_clean(struct lb_hv_vm *vm, const struct lb_ram_block *blk, struct lb_bitmap *dirty,
                     struct lb_error *err)
{
    assert(vm->dirty);
    return vm->dirty->clean(vm, lb_qemu_block(vm, blk), dirty, err);
}

static int log_peek(struct lb_hv_vm *vm, const struct lb_ram_block *blk, uint64_t first,
                    uint64_t count, struct lb_bitmap *dirty, struct lb_error *err)
{
    assert(vm->dirty);
    return vm->dirty->peek(vm, lb_qemu_block(vm, blk), first, count, dirty, err);
}

static int log_disable(struct lb_hv_vm *vm, struct lb_error *err)
{
    (void)err;
    if (vm->dirty)
        vm->dirty->disable(vm);
    vm->dirty = NULL;
    return 0;
}

/* ------------------------------------------------------------- checkpoints */

static int checkpoint_mode(struct lb_hv_vm *vm, bool on, struct lb_error *err)
{
    free(vm->save_text);
    vm->save_text = NULL;
    vm->clock_based = false;
    return on && (lb_qemu_clock_base(vm, err) < 0 || lb_qemu_save_prepare(vm, err) < 0) ? -1 : 0;
}

/* Any thread. SIGSTOP is seen by every thread of QEMU at its next return from the kernel; vCPUs
 * are threads too. */
static int freeze(struct lb_hv_vm *vm, bool on, struct lb_error *err)
{
    if (syscall(SYS_pidfd_send_signal, vm->pidfd, on ? SIGSTOP : SIGCONT, NULL, 0) < 0)
        return lb_fail_errno(err, LB_E_HV, errno, "cannot %s process %d", on ? "freeze" : "thaw",
                             (int)vm->proc.pid);
    return 0;
}

/* -------------------------------------------------------------------- both */

static int announce(struct lb_hv_vm *vm, struct lb_error *err)
{
    return lb_qmp_cmd(vm->qmp, "announce-self",
                      "{\"initial\":20,\"max\":200,\"rounds\":5,\"step\":50}", NULL, err);
}

static int status(struct lb_hv_vm *vm, bool *alive, bool *running, struct lb_error *err)
{
    *running = false;
    *alive = !lb_qemu_dead(vm->pidfd);
    if (!*alive)
        return 0;
    json_t *ret = NULL;
    struct lb_error why = LB_ERROR_INIT;
    if (lb_qemu_connect(vm, &why) < 0 || lb_qmp_cmd(vm->qmp, "query-status", NULL, &ret, &why) < 0) {
        *alive = !lb_qemu_dead(vm->pidfd);
        if (!*alive)
            return 0; /* it died while being asked: an answer, not an error */
        if (err)
            *err = why;
        return -1;
    }
    *running = json_is_true(json_object_get(ret, "running"));
    json_decref(ret);
    return 0;
}

/* The event is sent before the process ends: it may be there and not read yet. */
static bool shut_down(struct lb_hv_vm *vm)
{
    if (vm->qmp)
        lb_qmp_drain(vm->qmp, NULL);
    return vm->shut_down;
}

static void ident(struct lb_hv_vm *vm, struct lb_vm_ident *out)
{
    *out = (struct lb_vm_ident){.name = vm->name, .proc = vm->proc, .qmp_path = vm->qmp_path};
}

static bool exists(const struct lb_vm_ident *id)
{
    return lb_proc_alive(&id->proc);
}

/* Of a receiver that was started by somebody who died before he could write it down: its control socket, which is on
 * its command line, tells. False: none. */
static bool find_by_socket(const char *path, struct lb_proc_id *out)
{
    LB_AUTO_FREE char *set = lb_qemu_prop_set("", "path", path); /* commas doubled */
    DIR *d = opendir("/proc");
    bool found = false;
    for (struct dirent *e; d && !found && (e = readdir(d));) {
        char **argv = NULL;
        pid_t pid = (pid_t)atoi(e->d_name);
        if (pid <= 0 || lb_proc_cmdline(pid, &argv, NULL) < 0)
            continue;
        for (char **a = argv; *a && !found; a++)
            found = strncmp(*a, "socket,id=lb-qmp,", 17) == 0 && strstr(*a, set) &&
                    lb_proc_identify(pid, out, NULL) == 0;
        lb_strv_free(argv);
    }
    if (d)
        closedir(d);
    return found;
}

static int end(const struct lb_vm_ident *id, struct lb_error *err)
{
    struct lb_proc_id proc = id->proc;
    if (proc.pid == 0 && id->qmp_path && !find_by_socket(id->qmp_path, &proc))
        return 0;
    if (lb_proc_kill(&proc, 10000, err) < 0)
        return -1;
    if (id->qmp_path)
        unlink(id->qmp_path); /* a killed QEMU leaves it */
    return 0;
}

static void detach(struct lb_hv_vm *vm)
{
    if (!vm)
        return;
    if (vm->throttle_path)
        lb_qemu_throttle(vm, 0, NULL);
    lb_qemu_vm_free(vm);
}

static int destroy(struct lb_hv_vm *vm, struct lb_error *err)
{
    if (vm->throttle_path)
        lb_qemu_throttle(vm, 0, NULL);
    int rc = lb_proc_kill(&vm->proc, 10000, err);
    if (rc == 0 && vm->run_dir) {
        lb_qemu_remove_run_files(vm->run_dir);
        lb_remove_dead_sockets(vm->sockets); /* it may have died by itself */
    }
    lb_qemu_vm_free(vm);
    return rc;
}

const struct lb_hv_ops lb_hv_qemu = {
    .name = "qemu",
    .attach = attach,
    .describe = lb_qemu_describe,
    .cpu_features = lb_qemu_cpu_features,
    .blocks = blocks,
    .log_enable = log_enable,
    .log_clean = log_clean,
    .log_peek = log_peek,
    .log_disable = log_disable,
    .populated = lb_qemu_populated,
    .read = lb_qemu_read,
    .read_pages = lb_qemu_read_pages,
    .stop = stop,
    .cont = cont,
    .save_begin = lb_qemu_save_begin,
    .save_end = lb_qemu_save_end,
    .throttle = lb_qemu_throttle,
    .checkpoint_mode = checkpoint_mode,
    .freeze = freeze,
    .nics = lb_qemu_nics,
    .nic_hold = lb_qemu_nic_hold,
    .nic_unhold = lb_qemu_nic_unhold,
    .disks = lb_qemu_disks,
    .disk_mirror = lb_qemu_disk_mirror,
    .disk_mirror_status = lb_qemu_disk_mirror_status,
    .disk_mirror_end = lb_qemu_disk_mirror_end,
    .disk_overlay = lb_qemu_disk_overlay,
    .disk_freeze = lb_qemu_disk_freeze,
    .disk_overlay_drop = lb_qemu_disk_overlay_drop,
    .disk_join = lb_qemu_disk_join,
    .clock_step = lb_qemu_clock_step,
    .launch = lb_qemu_launch,
    .prepare_ram = lb_qemu_prepare_ram,
    .lazy_begin = lb_qemu_lazy_begin,
    .lazy_attach = lb_qemu_lazy_attach,
    .lazy_fault = lb_qemu_lazy_fault,
    .lazy_place = lb_qemu_lazy_place,
    .lazy_offer = lb_qemu_lazy_offer,
    .lazy_touched = lb_qemu_lazy_touched,
    .lazy_missing = lb_qemu_lazy_missing,
    .lazy_end = lb_qemu_lazy_end,
    .write = lb_qemu_write,
    .load_state = lb_qemu_load_state,
    .run = lb_qemu_run,
    .announce = announce,
    .status = status,
    .shut_down = shut_down,
    .ident = ident,
    .exists = exists,
    .end = end,
    .detach = detach,
    .destroy = destroy,
};
