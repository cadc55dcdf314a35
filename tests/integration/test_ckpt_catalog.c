/* The catalog with real images: chains of qcow2 overlays are joined as checkpoints go, also over deaths; export
 * and import.  qemu-img is the hypervisor here: what it reads from an image is what a guest would. */
#include <signal.h>
#include <sys/wait.h>

#include "checkpoint/catalog_internal.h"
#include "checkpoint/catalog_manifest.h"
#include "tests/unit/ckpt_util.h"

enum { DISK_BYTES = 4 << 20, SECTOR = 65536 };

static char dir[64], cat[96], img[96];
static struct lb_error last_error;

static int setup(void **s)
{
    (void)s;
    /* Hundreds of durable files: in memory, where fsync costs nothing, when that is there. */
    snprintf(dir, sizeof(dir), "%s/lb-images-XXXXXX", access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm");
    if (!mkdtemp(dir))
        return -1;
    snprintf(cat, sizeof(cat), "%s/checkpoints", dir);
    snprintf(img, sizeof(img), "%s/img", dir);
    return mkdir(img, 0755);
}

static int teardown(void **s)
{
    (void)s;
    return lb_remove_tree(dir, NULL);
}

/* ---- a VM of which only the disks are real */

static char *image(const char *name)
{
    return lb_asprintf("%s/%s", img, name);
}

#define QEMU_IMG(...) OK(lb_qemu_img((const char *const[]){"qemu-img", __VA_ARGS__, NULL}, NULL, -1, err))

static void overlay(const char *name, const char *base, const char *format)
{
    LB_AUTO_FREE char *path = image(name), *on = image(base);
    QEMU_IMG("create", "-q", "-f", "qcow2", "-F", format, "-b", on, path);
}

/* The guest writes: `value` into a sector of what it has now. */
static void write_sector(const char *name, const char *format, unsigned sector, unsigned value)
{
    LB_AUTO_FREE char *path = image(name);
    LB_AUTO_FREE char *cmd = lb_asprintf("qemu-io -f %s -c 'write -q -P %u %u %u' %s", format, value, sector * SECTOR,
                                         (unsigned)SECTOR, path);
    assert_int_equal(system(cmd), 0);
}

/* What a guest would read from that image, as one number. */
static char *sum_of(const char *path, const char *format)
{
    struct lb_manifest_file f = {0};
    LB_AUTO_FREE char *raw = lb_asprintf("%s/raw", dir);
    unlink(raw);
    QEMU_IMG("convert", "-U", "-f", format, "-O", "raw", path, raw);
    OK(lb_copy_sum(raw, NULL, &f, NULL, -1, err));
    return lb_strdup(f.sha256);
}

struct vm {
    struct machine m[8];             /* of checkpoint N at [N] */
    char *disk[8];                   /* sum of its disk at checkpoint N */
    unsigned n;
    char now[64], format[16];        /* image the guest writes to */
};

/* Freeze what the guest writes to, take a checkpoint of it, let the guest write on. */
static void checkpoint(struct vm *v)
{
    struct lb_ckpt_disk d = {.id = "vda", .size_bytes = DISK_BYTES};
    LB_AUTO_FREE char *path = image(v->now);
    char next[64];
    unsigned seed = ++v->n, n = v->n;
    v->m[n] = v->m[n - 1];
    machine_step(&v->m[n], &seed);
    snprintf(d.path, sizeof(d.path), "%s", path);
    snprintf(d.argv_path, sizeof(d.argv_path), "%s/web.raw", img);
    snprintf(d.format, sizeof(d.format), "%s", v->format);
    OK(lb_disk_identify(&d, err));
    snprintf(next, sizeof(next), n % 2 ? "web.lb-%u.qcow2" : "web.raw.lb-web-%u", n); /* both kinds of ours */
    overlay(next, v->now, v->format);
    free(v->disk[n]);
    v->disk[n] = sum_of(path, v->format);
    assert_int_equal(take(cat, "web", &v->m[n], "", false, NULL, &d, 1), n);
    strcpy(v->now, next);
    strcpy(v->format, "qcow2");
    write_sector(v->now, v->format, n, 100 + n);
    write_sector(v->now, v->format, 20, 50 + n);
}

static void make_vm(struct vm *v, unsigned checkpoints)
{
    LB_AUTO_FREE char *raw = image("web.raw");
    QEMU_IMG("create", "-q", "-f", "raw", raw, "4M");
    strcpy(v->now, "web.raw");
    strcpy(v->format, "raw");
    write_sector("web.raw", "raw", 0, 7);
    while (v->n < checkpoints)
        checkpoint(v);
}

static void end_vm(struct vm *v)
{
    for (unsigned i = 0; i < LB_ARRAY_LEN(v->disk); i++)
        free(v->disk[i]);
}

/* As block-commit does: what is in top goes into base, who stood on top stands on base. */
static int join_images(const char *vm, const char *disk_id, const char *top, const char *base, void *arg,
                       struct lb_error *why)
{
    struct vm *v = arg;
    LB_AUTO_FREE char *now = image(v->now);
    struct lb_qcow2_head h;
    char above[512] = "", walk[512];
    size_t len = strlen(base);
    const char *format = len > 4 && !strcmp(base + len - 4, ".raw") ? "raw" : "qcow2";
    assert_string_equal(vm, "web");
    assert_string_equal(disk_id, "vda");
    snprintf(walk, sizeof(walk), "%s", now);
    while (strcmp(walk, top)) { /* down the chain of the running VM */
        if (lb_qcow2_head(walk, &h, why))
            return -1;
        if (!h.backing[0])
            return lb_fail(why, LB_E_STATE, "%s is not in the chain", top);
        strcpy(above, walk);
        snprintf(walk, sizeof(walk), "%.511s", h.backing);
    }
    QEMU_IMG("commit", "-q", "-d", "-f", "qcow2", "-b", base, top);
    lb_point("test-committed");
    if (above[0]) {
        QEMU_IMG("rebase", "-u", "-f", "qcow2", "-b", base, "-F", format, above);
    } else {
        snprintf(v->now, sizeof(v->now), "%s", strrchr(base, '/') + 1);
        strcpy(v->format, format);
    }
    return 0;
}

static void all_hold(struct vm *v, const char *guest_sum)
{
    struct lb_ckpt_entry *e;
    unsigned n;
    OK(lb_catalog_list(cat, "web", NULL, &e, &n, err));
    for (unsigned i = 0; i < n; i++) {
        holds(cat, e[i].ref, NULL, &v->m[e[i].number]);
        assert_int_equal(e[i].n_disks, 1);
        LB_AUTO_FREE char *sum = sum_of(e[i].disks[0].path, e[i].disks[0].format);
        assert_string_equal(sum, v->disk[e[i].number]);
        lb_ckpt_entry_free(&e[i]);
    }
    free(e);
    LB_AUTO_FREE char *now = image(v->now);
    LB_AUTO_FREE char *sum = sum_of(now, v->format);
    assert_string_equal(sum, guest_sum);
}

static char *guest(struct vm *v)
{
    LB_AUTO_FREE char *now = image(v->now);
    return sum_of(now, v->format);
}

static int lock(void)
{
    int fd = -1;
    OK(fd = lb_catalog_lock(cat, "web", 2000, err));
    return fd;
}

static int rm(const uint32_t *numbers, unsigned n, struct vm *v, struct lb_prune_result *res, struct lb_error *err)
{
    struct lb_image_join join = {.join = join_images, .arg = v};
    return lb_catalog_remove(cat, "web", numbers, n, NULL, v ? &join : NULL, NULL, NULL, -1, res, err);
}

/* ------------------------------------------------------------------------ joining */

/* A schedule's life: the oldest goes, its image takes up the next one's. */
static void test_oldest_goes(void **s)
{
    (void)s;
    struct vm v = {0};
    struct lb_prune_result res;
    LB_AUTO_FD int held = lock();
    make_vm(&v, 4);
    LB_AUTO_FREE char *sum = guest(&v);
    for (uint32_t i = 1; i <= 3; i++) {
        OK(rm(&i, 1, &v, &res, err));
        assert_int_equal(res.images_joined, 1);
        assert_int_equal(res.images_kept, 0);
        assert_int_equal(files_in(img, "", "lb-"), 4 - i);
        all_hold(&v, sum);
    }
    /* The last one: the guest itself comes back to its first image. */
    OK(rm((uint32_t[]){4}, 1, &v, &res, err));
    assert_string_equal(v.now, "web.raw");
    assert_int_equal(files_in(img, "", "lb-"), 0);
    all_hold(&v, sum);
    end_vm(&v);
}

static void test_some_go(void **s)
{
    (void)s;
    struct vm v = {0};
    struct lb_prune_result res;
    LB_AUTO_FD int held = lock();
    make_vm(&v, 5);
    LB_AUTO_FREE char *sum = guest(&v);
    OK(rm((uint32_t[]){2, 3}, 2, &v, &res, err)); /* 4's image goes down by two */
    assert_int_equal(res.images_joined, 2);
    all_hold(&v, sum);
    OK(rm((uint32_t[]){1, 4, 5}, 3, &v, &res, err));
    assert_int_equal(res.images_joined, 3);
    assert_int_equal(files_in(img, "", "lb-"), 0);
    all_hold(&v, sum);
    end_vm(&v);
}

/* The VM does not run: nothing is touched, and made up for when it does. */
static void test_later(void **s)
{
    (void)s;
    struct vm v = {0};
    struct lb_prune_result res;
    LB_AUTO_FD int held = lock();
    make_vm(&v, 3);
    LB_AUTO_FREE char *sum = guest(&v);
    OK(rm((uint32_t[]){1, 2}, 2, NULL, &res, err));
    assert_int_equal(res.images_joined, 0);
    assert_int_equal(res.images_kept, 2);
    assert_int_equal(files_in(img, "", "lb-"), 3);
    all_hold(&v, sum);
    OK(rm(NULL, 0, &v, &res, err));
    assert_int_equal(res.images_joined, 2);
    assert_int_equal(res.images_kept, 0);
    assert_int_equal(files_in(img, "", "lb-"), 1);
    all_hold(&v, sum);
    end_vm(&v);
}

/* Somebody else stands on an image: it stays as it is until he is gone. */
static void check_user(const char *clone_on, const char *format, bool said, bool elsewhere)
{
    struct vm v = {0};
    struct lb_prune_result res;
    LB_AUTO_FD int held = lock();
    make_vm(&v, 3);
    LB_AUTO_FREE char *sum = guest(&v);
    LB_AUTO_FREE char *base = image(clone_on);
    LB_AUTO_FREE char *clone = elsewhere ? lb_asprintf("%s/clone.qcow2", dir) : image("clone.lb-1.qcow2");
    QEMU_IMG("create", "-q", "-f", "qcow2", "-F", format, "-b", base, clone);
    LB_AUTO_FREE char *clone_sum = sum_of(clone, "qcow2");
    if (said)
        OK(lb_catalog_use_image(cat, "web", clone, "web-1", true, err));
    OK(rm((uint32_t[]){1}, 1, &v, &res, err));
    assert_int_equal(res.images_joined, 0);
    assert_int_equal(res.images_kept, 1);
    LB_AUTO_FREE char *clone_now = sum_of(clone, "qcow2");
    assert_string_equal(clone_now, clone_sum);
    all_hold(&v, sum);
    assert_int_equal(unlink(clone), 0);
    OK(rm(NULL, 0, &v, &res, err));
    assert_int_equal(res.images_joined, 1);
    all_hold(&v, sum);
    end_vm(&v);
}

static void test_user_on_base(void **s)
{
    (void)s;
    check_user("web.raw", "raw", true, false);
}

static void test_user_on_top(void **s)
{
    (void)s;
    check_user("web.lb-1.qcow2", "qcow2", true, false);
}

static void test_user_not_said(void **s)
{
    (void)s;
    check_user("web.raw", "raw", false, false);
}

static void test_user_elsewhere(void **s)
{
    (void)s;
    check_user("web.raw", "raw", true, true);
}

/* A restored VM that was checkpointed itself: its catalog counts. */
static void test_user_of_another_catalog(void **s)
{
    (void)s;
    struct vm v = {0};
    struct lb_prune_result res;
    LB_AUTO_FD int held = lock();
    int other = -1;
    OK(other = lb_catalog_lock(cat, "copy", 0, err));
    make_vm(&v, 2);
    LB_AUTO_FREE char *sum = guest(&v), *base = image("web.raw");
    LB_AUTO_FREE char *far = lb_asprintf("%s/copy.qcow2", dir);
    QEMU_IMG("create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, far);
    struct lb_ckpt_disk d = {.id = "vda", .format = "qcow2"};
    snprintf(d.path, sizeof(d.path), "%s", far);
    OK(lb_catalog_set_disks(cat, "copy", 1, &d, 1, err));
    OK(rm((uint32_t[]){1}, 1, &v, &res, err));
    assert_int_equal(res.images_joined, 0);
    assert_int_equal(res.images_kept, 1);
    all_hold(&v, sum);
    close(other);
    end_vm(&v);
}

/* An overlay that an operator made is never joined: it would have to be deleted. */
static void test_name_of_an_operator(void **s)
{
    (void)s;
    static const char *const foreign[] = {"web.snap", "web.lb-1.qcow2.bak", "lb-1.qcow2", ".lb-1.qcow2", "web.lb-x"};
    for (unsigned i = 0; i < LB_ARRAY_LEN(foreign); i++) {
        struct vm v = {0};
        struct lb_prune_result res;
        OK(lb_remove_tree(cat, err));
        int held = lock();
        make_vm(&v, 1);
        LB_AUTO_FREE char *now = image(v.now), *other = image(foreign[i]);
        assert_int_equal(rename(now, other), 0);
        snprintf(v.now, sizeof(v.now), "%s", foreign[i]);
        LB_AUTO_FREE char *sum = guest(&v);
        OK(rm((uint32_t[]){1}, 1, &v, &res, err));
        assert_int_equal(res.images_joined, 0);
        assert_int_equal(res.images_kept, 1);
        all_hold(&v, sum);
        assert_int_equal(unlink(other), 0);
        close(held);
        end_vm(&v);
    }
}

static int join_refused(const char *vm, const char *disk_id, const char *top, const char *base, void *arg,
                        struct lb_error *err)
{
    (void)vm, (void)disk_id, (void)top, (void)base;
    ++*(unsigned *)arg;
    return lb_fail(err, LB_E_STATE, "the disk is mirrored");
}

static void test_join_refused(void **s)
{
    (void)s;
    struct vm v = {0};
    struct lb_prune_result res;
    unsigned calls = 0;
    struct lb_image_join join = {.join = join_refused, .arg = &calls};
    LB_AUTO_FD int held = lock();
    make_vm(&v, 3);
    LB_AUTO_FREE char *sum = guest(&v);
    OK(lb_catalog_remove(cat, "web", (uint32_t[]){1}, 1, NULL, &join, NULL, NULL, -1, &res, err));
    assert_int_equal(calls, 1);
    assert_int_equal(res.images_kept, 1);
    all_hold(&v, sum);
    OK(rm(NULL, 0, &v, &res, err));
    assert_int_equal(res.images_joined, 1);
    all_hold(&v, sum);
    end_vm(&v);
}

static int not_in_chain(const char *vm, const char *disk_id, const char *top, const char *base, void *arg,
                        struct lb_error *err)
{
    (void)vm, (void)disk_id, (void)arg;
    return lb_fail(err, LB_E_NOT_FOUND, "it does not stand on %s and that on %s", top, base);
}

/* After a checkpoint the VM was started from the image it had at first, as its command line says: what the guest had
 * written since is in the overlay alone. */
static void test_started_from_base(void **s)
{
    (void)s;
    struct vm v = {0};
    struct lb_prune_result res;
    struct lb_image_join join = {.join = not_in_chain};
    struct flock fl = {.l_type = F_RDLCK, .l_whence = SEEK_SET, .l_start = 101, .l_len = 1}; /* as QEMU, when it writes */
    LB_AUTO_FD int held = lock();
    make_vm(&v, 1);
    LB_AUTO_FREE char *base = image("web.raw"), *top = image(v.now);
    LB_AUTO_FREE char *sum = guest(&v);
    LB_AUTO_FD int qemu = open(base, O_RDWR | O_CLOEXEC);
    assert_int_equal(fcntl(qemu, F_OFD_SETLK, &fl), 0);
    OK(lb_catalog_remove(cat, "web", (uint32_t[]){1}, 1, NULL, &join, NULL, NULL, -1, &res, err));
    assert_int_equal(res.images_joined, 0);
    assert_int_equal(res.images_kept, 1);
    assert_int_equal(access(top, F_OK), 0);
    LB_AUTO_FREE char *after = guest(&v);
    assert_string_equal(after, sum);
    end_vm(&v);
}

/* A checkpoint that was taken while the VM was on another host: its image is one of the chain, and in no book here. */
static void test_frozen_elsewhere(void **s)
{
    (void)s;
    struct vm v = {0};
    struct lb_prune_result res;
    LB_AUTO_FD int held = lock();
    make_vm(&v, 3);
    LB_AUTO_FREE char *sum = guest(&v), *theirs = image("web.lb-1.qcow2");
    LB_AUTO_FREE char *file = lb_asprintf("%s/web/2.lbc", cat), *away = lb_asprintf("%s/2.lbc", dir);
    assert_int_equal(rename(file, away), 0);
    OK(rm((uint32_t[]){1}, 1, &v, &res, err));
    assert_int_equal(res.images_joined, 0);
    assert_int_equal(res.images_kept, 1);
    LB_AUTO_FREE char *their_sum = sum_of(theirs, "qcow2");
    assert_string_equal(their_sum, v.disk[2]);
    LB_AUTO_FREE char *after = guest(&v);
    assert_string_equal(after, sum);
    end_vm(&v);
}

/* Killed on the way, at every point of it. */
static void check_death(const char *point, uint32_t number)
{
    struct vm v = {0};
    struct lb_prune_result res;
    LB_AUTO_FREE char *mark = lb_asprintf("%s/at-point", dir);
    int held = lock(), status;
    make_vm(&v, 3);
    LB_AUTO_FREE char *sum = guest(&v);
    close(held);
    pid_t pid = fork();
    if (pid == 0) {
        setenv("LIFEBOAT_PAUSE_AT", point, 1);
        setenv("LIFEBOAT_PAUSE_FILE", mark, 1);
        held = lb_catalog_lock(cat, "web", 2000, NULL);
        _exit(held < 0 || rm(&number, 1, &v, &res, NULL) ? 1 : 0);
    }
    for (unsigned i = 0; i < 20000 && access(mark, F_OK) < 0; i++)
        usleep(1000);
    assert_int_equal(access(mark, F_OK), 0);
    kill(pid, SIGKILL);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    held = lock();
    all_hold(&v, sum);
    OK(rm(&number, strcmp(point, "rm-rewritten") ? 0 : 1, &v, &res, err));
    assert_int_equal(res.images_kept, 0);
    assert_int_equal(files_in(img, "", "lb-"), 2);
    all_hold(&v, sum);
    close(held);
    end_vm(&v);
}

static void test_death_before(void **s)
{
    (void)s;
    check_death("rm-rewritten", 1);
}

static void test_death_unlinked(void **s)
{
    (void)s;
    check_death("rm-unlinked", 2);
}

static void test_death_joining(void **s)
{
    (void)s;
    check_death("rm-joining", 1);
}

static void test_death_in_join(void **s)
{
    (void)s;
    check_death("test-committed", 2);
}

static void test_death_joined(void **s)
{
    (void)s;
    check_death("rm-joined", 1);
}

/* -------------------------------------------------------------- export and import */

struct told {
    uint64_t done, total;
};

static void on_progress(uint64_t done, uint64_t total, void *arg)
{
    struct told *t = arg;
    if (done < t->done || done > total || (t->total && total != t->total))
        abort(); /* not this thread's test to fail */
    *t = (struct told){done, total};
}

static int export_to(const char *ref, const char *to, bool no_disk, struct told *t, int cancel_fd, struct lb_error *err)
{
    struct lb_ckpt_entry e;
    if (lb_catalog_find(cat, ref, NULL, &e, err))
        return -1;
    int rc = lb_catalog_export(cat, &e, NULL, to, no_disk, on_progress, t, cancel_fd, err);
    lb_ckpt_entry_free(&e);
    return rc;
}

static void test_export_import(void **s)
{
    (void)s;
    struct vm v = {0};
    struct told t = {0};
    struct lb_ckpt_entry e;
    int held = lock();
    make_vm(&v, 3);
    close(held);
    LB_AUTO_FREE char *sum = guest(&v), *to = lb_asprintf("%s/out", dir);
    LB_AUTO_FREE char *slash = lb_asprintf("%s/", to);
    assert_int_equal(mkdir(to, 0700), 0); /* an empty folder is taken */
    OK(export_to("web@2", slash, false, &t, -1, err));
    assert_int_equal(t.done, t.total);
    assert_int_equal(files_in(dir, "out", "."), 3);
    FAILS(export_to("web@2", to, false, &(struct told){0}, -1, err), LB_E_EXISTS);

    FAILS(lb_catalog_import(cat, to, NULL, NULL, NULL, NULL, -1, &e, err), LB_E_EXISTS); /* it is here already */
    assert_non_null(strstr(last_error.message, "web@2"));
    t = (struct told){0};
    OK(lb_catalog_import(cat, to, "copy", NULL, on_progress, &t, -1, &e, err));
    assert_int_equal(t.done, t.total);
    assert_string_equal(e.ref, "copy@1");
    assert_string_equal(e.info.meta.vm, "copy");
    assert_int_equal(e.depth, 1);
    assert_int_equal(e.n_disks, 1);
    assert_string_equal(e.disks[0].format, "qcow2");
    LB_AUTO_FREE char *disk = sum_of(e.disks[0].path, "qcow2");
    assert_string_equal(disk, v.disk[2]);
    holds(cat, "copy@1", NULL, &v.m[2]);
    struct stat st;
    assert_int_equal(stat(e.disks[0].path, &st), 0);
    assert_true(st.st_ino == e.disks[0].inode && (uint64_t)st.st_size == e.disks[0].file_bytes);

    /* Increments of the exported one stand on it as before; its image goes with the import, unless it is stood on. */
    holds(cat, "web@3", NULL, &v.m[3]);
    struct lb_prune_result res;
    LB_AUTO_FREE char *clone = image("clone.qcow2");
    QEMU_IMG("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", e.disks[0].path, clone);
    int copy_lock = -1;
    OK(copy_lock = lb_catalog_lock(cat, "copy", 0, err));
    OK(lb_catalog_use_image(cat, "copy", clone, "copy-1", true, err));
    OK(lb_catalog_remove(cat, "copy", (uint32_t[]){1}, 1, NULL, NULL, NULL, NULL, -1, &res, err));
    assert_int_equal(res.images_kept, 1);
    assert_int_equal(access(e.disks[0].path, F_OK), 0);
    assert_int_equal(unlink(clone), 0);
    OK(lb_catalog_remove(cat, "copy", NULL, 0, NULL, NULL, NULL, NULL, -1, &res, err));
    assert_int_equal(res.images_kept, 0);
    assert_int_equal(access(e.disks[0].path, F_OK), -1);
    close(copy_lock);
    lb_ckpt_entry_free(&e);
    end_vm(&v);
}

static void test_export_no_disk_and_cancel(void **s)
{
    (void)s;
    struct vm v = {0};
    struct told t = {0};
    struct lb_ckpt_entry e;
    int held = lock(), ends[2];
    make_vm(&v, 2);
    close(held);
    LB_AUTO_FREE char *to = lb_asprintf("%s/out", dir), *gone = image("web.lb-1.qcow2");
    assert_int_equal(pipe(ends), 0);
    assert_int_equal(write(ends[1], "x", 1), 1);
    FAILS(export_to("web@2", to, false, &t, ends[0], err), LB_E_CANCELLED);
    assert_int_equal(files_in(dir, "", "out"), 0); /* nothing half */
    assert_int_equal(unlink(gone), 0);
    FAILS(export_to("web@2", to, false, &(struct told){0}, -1, err), LB_E_NOT_FOUND);
    assert_int_equal(files_in(dir, "", "out"), 0);
    OK(export_to("web@2", to, true, &(struct told){0}, -1, err));
    assert_int_equal(files_in(dir, "out", "."), 2);
    FAILS(lb_catalog_import(cat, to, "copy", NULL, NULL, NULL, ends[0], &e, err), LB_E_CANCELLED);
    assert_int_equal(files_in(cat, "copy", "lbc"), 0);
    OK(lb_catalog_import(cat, to, "copy", NULL, NULL, NULL, -1, &e, err));
    assert_true(e.info.meta.no_disk);
    assert_int_equal(e.n_disks, 0);
    holds(cat, e.ref, NULL, &v.m[2]);
    lb_ckpt_entry_free(&e);
    close(ends[0]);
    close(ends[1]);
    end_vm(&v);
}

static void change(const char *cmd, const char *folder)
{
    LB_AUTO_FREE char *text = lb_asprintf("cd %s && %s", folder, cmd);
    assert_int_equal(system(text), 0);
}

/* A folder that is not what it says is refused, and leaves nothing. */
static void test_import_refuses(void **s)
{
    (void)s;
    struct vm v = {0};
    struct told t = {0};
    struct lb_ckpt_entry e;
    int held = lock();
    make_vm(&v, 2);
    close(held);
    LB_AUTO_FREE char *to = lb_asprintf("%s/out", dir), *bad = lb_asprintf("%s/bad", dir);
    OK(export_to("web@2", to, false, &t, -1, err));
    static const struct {
        const char *cmd;
        enum lb_errcode code;
    } cases[] = {
        {"rm manifest.json", LB_E_NOT_FOUND},
        {"echo '{}' >manifest.json", LB_E_PROTO},
        {"sed -i 's/checkpoint.lbc/..\\/out\\/checkpoint.lbc/' manifest.json", LB_E_PROTO},
        {"sed -i 's/\"vda\"/\"vdb\"/' manifest.json", LB_E_PROTO},
        {"sed -i 's/4194304/4194816/' manifest.json", LB_E_PROTO},
        {"rm disk-0.qcow2", LB_E_NOT_FOUND},
        {"printf x | dd of=checkpoint.lbc bs=1 seek=5000 conv=notrunc 2>/dev/null", LB_E_PROTO},
        {"printf x >>disk-0.qcow2", LB_E_PROTO},
        {"truncate -s 100 disk-0.qcow2", LB_E_PROTO},
        /* right sums, but an image that reads a file of this host */
        {"qemu-img rebase -q -u -f qcow2 -F raw -b /etc/passwd disk-0.qcow2 && "
         "sed -i \"/disk-0/,/}/s/\\\"sha256\\\": \\\".*\\\"/\\\"sha256\\\": \\\"$(sha256sum <disk-0.qcow2 | cut -c-64)\\\"/\" "
         "manifest.json && sed -i \"/disk-0/,/}/s/\\\"bytes\\\": [0-9]*/\\\"bytes\\\": $(stat -c %s disk-0.qcow2)/\" manifest.json",
         LB_E_PROTO},
    };
    for (unsigned i = 0; i < LB_ARRAY_LEN(cases); i++) {
        LB_AUTO_FREE char *copy = lb_asprintf("rm -rf %s && cp -r %s %s", bad, to, bad);
        assert_int_equal(system(copy), 0);
        change(cases[i].cmd, bad);
        FAILS(lb_catalog_import(cat, bad, "copy", NULL, NULL, NULL, -1, &e, err), cases[i].code);
        if (i + 1 == LB_ARRAY_LEN(cases))
            assert_non_null(strstr(last_error.message, "stands alone"));
        LB_AUTO_FREE char *left = lb_asprintf("ls %s/copy 2>/dev/null | grep -q -e disk -e lbc", cat);
        assert_int_not_equal(system(left), 0);
    }
    OK(lb_catalog_import(cat, to, "copy", NULL, NULL, NULL, -1, &e, err));
    lb_ckpt_entry_free(&e);
    end_vm(&v);
}

/* Died when the disks had their names and the checkpoint not: they go with the next removal. */
static void test_import_dies(void **s)
{
    (void)s;
    struct vm v = {0};
    struct told t = {0};
    struct lb_ckpt_entry e;
    struct lb_prune_result res;
    int held = lock(), status;
    make_vm(&v, 1);
    close(held);
    LB_AUTO_FREE char *to = lb_asprintf("%s/out", dir), *mark = lb_asprintf("%s/at-point", dir);
    OK(export_to("web@1", to, false, &t, -1, err));
    pid_t pid = fork();
    if (pid == 0) {
        setenv("LIFEBOAT_PAUSE_AT", "import-disks", 1);
        setenv("LIFEBOAT_PAUSE_FILE", mark, 1);
        _exit(lb_catalog_import(cat, to, "copy", NULL, NULL, NULL, -1, &e, NULL) ? 1 : 0);
    }
    for (unsigned i = 0; i < 20000 && access(mark, F_OK) < 0; i++)
        usleep(1000);
    kill(pid, SIGKILL);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_int_equal(files_in(cat, "copy", "disk-1-0"), 1);
    OK(held = lb_catalog_lock(cat, "copy", 0, err));
    OK(lb_catalog_remove(cat, "copy", NULL, 0, NULL, NULL, NULL, NULL, -1, &res, err));
    assert_int_equal(files_in(cat, "copy", "disk-"), 0);
    assert_int_equal(files_in(cat, "copy", "lbc"), 0);
    close(held);
    OK(lb_catalog_import(cat, to, "copy", NULL, NULL, NULL, -1, &e, err));
    assert_string_equal(e.ref, "copy@2"); /* 1 is used up */
    lb_ckpt_entry_free(&e);
    end_vm(&v);
}

int main(void)
{
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
    const struct CMUnitTest tests[] = {
        T(test_oldest_goes), T(test_some_go), T(test_later), T(test_user_on_base), T(test_user_on_top),
        T(test_user_not_said), T(test_user_elsewhere), T(test_user_of_another_catalog), T(test_join_refused),
        T(test_started_from_base), T(test_frozen_elsewhere), T(test_name_of_an_operator),
        T(test_death_before), T(test_death_unlinked), T(test_death_joining), T(test_death_in_join), T(test_death_joined),
        T(test_export_import), T(test_export_no_disk_and_cancel), T(test_import_refuses), T(test_import_dies),
    };
    lb_log_set_level(LB_LOG_ERROR);
    return cmocka_run_group_tests_name("catalog and images", tests, NULL, NULL);
}
