/* Raw images of the backup: what is refused, what is written. Other formats and failing storage: see
 * tests/integration/test_disk.c. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>

#include "remus/disk.h"

enum { SIZE = 4 << 20 };
static char dir[64], path[96];

static int setup(void **state)
{
    (void)state;
    strcpy(dir, "/tmp/lbdisk.XXXXXX");
    if (!mkdtemp(dir))
        return -1;
    snprintf(path, sizeof(path), "%s/a.raw", dir);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    return lb_remove_tree(dir, NULL);
}

static struct lb_disk_target_opts options(void)
{
    struct lb_disk_target_opts o = {.path = path, .format = "raw", .size_bytes = SIZE, .same_as = "",
                                    .run_dir = dir, .uid = geteuid(), .gid = getegid()};
    return o;
}

static struct lb_disk_target *must_open(void)
{
    struct lb_disk_target_opts o = options();
    struct lb_disk_target *t = NULL;
    struct lb_error err = LB_ERROR_INIT;
    if (lb_disk_target_open(&o, &t, &err) < 0)
        fail_msg("%s (%s)", err.message, err.remedy);
    return t;
}

static void must_refuse(const struct lb_disk_target_opts *o, enum lb_errcode code, const char *word)
{
    struct lb_disk_target *t = NULL;
    struct lb_error err = LB_ERROR_INIT;
    assert_int_equal(lb_disk_target_open(o, &t, &err), -1);
    assert_int_equal(err.code, code);
    assert_true(err.remedy[0] != '\0');
    if (!strstr(err.message, word))
        fail_msg("'%s' does not say '%s'", err.message, word);
}

static void make_file(off_t size, char fill)
{
    char block[4096];
    memset(block, fill, sizeof(block));
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    assert_true(fd >= 0);
    for (off_t at = 0; at < size && fill; at += (off_t)sizeof(block))
        assert_int_equal(pwrite(fd, block, sizeof(block), at), sizeof(block));
    assert_int_equal(ftruncate(fd, size), 0);
    close(fd);
}

static void test_new_image_is_sparse_and_private(void **state)
{
    (void)state;
    struct stat st;
    assert_int_equal(lb_disk_target_close(must_open(), NULL), 0);
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(st.st_size, SIZE);
    assert_int_equal(st.st_blocks, 0);
    assert_int_equal(st.st_mode & 07777, 0600);
}

static void test_existing_image_is_kept(void **state)
{
    (void)state;
    static char data[8192], got[SIZE];
    make_file(SIZE, 'x');
    struct lb_disk_target *t = must_open();
    memset(data, 'y', sizeof(data));
    struct lb_disk_op ops[] = {
        {.kind = LB_DISK_WRITE, .offset = 512, .len = sizeof(data), .data = data},
        {.kind = LB_DISK_ZERO, .offset = 1 << 20, .len = 2 << 20},
        {.kind = LB_DISK_WRITE, .offset = SIZE - sizeof(data), .len = sizeof(data), .data = data},
    };
    for (size_t i = 0; i < LB_ARRAY_LEN(ops); i++)
        assert_int_equal(lb_disk_target_apply(t, &ops[i], NULL), 0);
    assert_int_equal(lb_disk_target_flush(t, NULL), 0);
    assert_int_equal(lb_disk_target_close(t, NULL), 0);
    int fd = open(path, O_RDONLY);
    assert_int_equal(read(fd, got, SIZE), SIZE);
    struct stat st;
    fstat(fd, &st);
    close(fd);
    assert_int_equal(st.st_size, SIZE);
    for (int i = 0; i < SIZE; i++) {
        char want = 'x';
        if ((i >= 512 && i < 512 + 8192) || i >= SIZE - 8192)
            want = 'y';
        else if (i >= 1 << 20 && i < 3 << 20)
            want = 0;
        if (got[i] != want)
            fail_msg("byte %d is %d, not %d", i, got[i], want);
    }
}

static void test_operations_outside_are_refused(void **state)
{
    (void)state;
    static char data[LB_DISK_OP_MAX + 512];
    struct lb_disk_target *t = must_open();
    struct lb_disk_op ops[] = {
        {.kind = LB_DISK_WRITE, .offset = SIZE, .len = 512, .data = data},
        {.kind = LB_DISK_WRITE, .offset = SIZE - 512, .len = 1024, .data = data},
        {.kind = LB_DISK_ZERO, .offset = UINT64_MAX - 511, .len = 1024},
        {.kind = LB_DISK_ZERO, .offset = 512, .len = UINT64_MAX - 511},
        {.kind = LB_DISK_WRITE, .offset = 0, .len = sizeof(data), .data = data},
        {.kind = LB_DISK_WRITE, .offset = 0, .len = 0, .data = data},
        {.kind = (enum lb_disk_op_kind)3, .offset = 0, .len = 512},
    };
    for (size_t i = 0; i < LB_ARRAY_LEN(ops); i++) {
        struct lb_error err = LB_ERROR_INIT;
        assert_int_equal(lb_disk_target_apply(t, &ops[i], &err), -1);
        assert_int_equal(err.code, LB_E_PROTO);
    }
    assert_int_equal(lb_disk_target_close(t, NULL), 0);
}

static void test_wrong_sizes_and_things_are_refused(void **state)
{
    (void)state;
    struct lb_disk_target_opts o = options();
    make_file(SIZE - 4096, 0);
    must_refuse(&o, LB_E_PREFLIGHT, "smaller");
    make_file(SIZE + 4096, 0);
    must_refuse(&o, LB_E_PREFLIGHT, "larger");
    o.path = dir;
    must_refuse(&o, LB_E_PREFLIGHT, "neither a file");
    o.path = path;
    o.format = "vmdk";
    must_refuse(&o, LB_E_UNSUPPORTED, "vmdk");
}

static void test_the_same_file_is_refused(void **state)
{
    (void)state;
    struct lb_disk_target_opts o = options();
    char same[128], other[128], link_path[96];
    make_file(SIZE, 0);
    lb_disk_file_identity(same, path);
    assert_true(strlen(same) > 36);
    o.same_as = same;
    must_refuse(&o, LB_E_PREFLIGHT, "primary's own");
    /* by another name */
    snprintf(link_path, sizeof(link_path), "%s/link", dir);
    assert_int_equal(symlink(path, link_path), 0);
    o.path = link_path;
    must_refuse(&o, LB_E_PREFLIGHT, "primary's own");
    /* the same numbers on another host are another file, unless the file system is shared */
    o.path = path;
    snprintf(other, sizeof(other), "%.*s:another-boot", (int)(strrchr(same, ':') - same), same);
    o.same_as = other;
    struct lb_disk_target *t = NULL;
    assert_int_equal(lb_disk_target_open(&o, &t, NULL), 0);
    assert_int_equal(lb_disk_target_close(t, NULL), 0);
    lb_disk_file_identity(same, link_path);
    snprintf(link_path, sizeof(link_path), "%s/missing", dir);
    lb_disk_file_identity(other, link_path);
    assert_string_equal(other, "");
}

static void test_an_image_in_use_is_refused(void **state)
{
    (void)state;
    struct lb_disk_target_opts o = options();
    struct lb_disk_target *t = must_open();
    must_refuse(&o, LB_E_EXISTS, "in use");
    assert_int_equal(lb_disk_target_close(t, NULL), 0);
    /* as QEMU does it: using "write" is a read lock of byte 101 */
    int fd = open(path, O_RDWR);
    struct flock l = {.l_type = F_RDLCK, .l_whence = SEEK_SET, .l_start = 101, .l_len = 1};
    assert_int_equal(fcntl(fd, F_OFD_SETLK, &l), 0);
    must_refuse(&o, LB_E_EXISTS, "in use");
    close(fd);
    assert_int_equal(lb_disk_target_close(must_open(), NULL), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_new_image_is_sparse_and_private, setup, teardown),
        cmocka_unit_test_setup_teardown(test_existing_image_is_kept, setup, teardown),
        cmocka_unit_test_setup_teardown(test_operations_outside_are_refused, setup, teardown),
        cmocka_unit_test_setup_teardown(test_wrong_sizes_and_things_are_refused, setup, teardown),
        cmocka_unit_test_setup_teardown(test_the_same_file_is_refused, setup, teardown),
        cmocka_unit_test_setup_teardown(test_an_image_in_use_is_refused, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
