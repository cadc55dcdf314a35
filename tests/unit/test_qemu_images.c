/* A receiver's command line: other images, other names; what a qcow2 image stands on. No QEMU runs. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <endian.h>
#include <string.h>

#include "core/qcow2.h"
#include "core/qemu/qemu.h"

#define OLD (char *)"/srv/a.img"
#define NEW (char *)"/srv/a.img.lb-1.qcow2"

/* The receiver's command line as one text, "" around every word; caller frees. */
static char *derive(const char *const *words, const struct lb_disk_desc *disk, struct lb_launch_opts *o)
{
    char *argv[64], **out;
    unsigned n = 0;
    struct lb_error err = LB_ERROR_INIT;
    argv[n++] = (char *)"qemu";
    for (; *words; words++)
        argv[n++] = (char *)*words;
    argv[n] = NULL;
    struct lb_vm_desc d = {.argv = argv, .machine = (char *)"pc-q35-7.2", .emulator = (char *)"/q",
                           .disks = (struct lb_disk_desc *)disk, .n_disks = disk ? 1 : 0, .ram_bytes = 4096};
    o->name = "t";
    o->run_dir = "/r";
    if (lb_qemu_receiver_argv(&d, o, &out, &err) < 0)
        return lb_asprintf("%s", err.message);
    char *text = lb_strdup(" ");
    for (char **a = out; *a; a++) {
        char *longer = lb_asprintf("%s%s ", text, *a);
        free(text);
        text = longer;
    }
    lb_strv_free(out);
    return text;
}

struct image_case {
    const char *words[8];
    const char *want;      /* " in the command line, between spaces" */
};

static void check_images(const struct image_case *c, unsigned n, const char *format, bool by_opts)
{
    struct lb_disk_desc disk = {.path = NEW, .argv_path = OLD, .format = (char *)format};
    struct lb_disk_map map = {OLD, NEW, (char *)format};
    for (unsigned i = 0; i < n; i++) {
        struct lb_launch_opts o = {.disks = by_opts ? &map : NULL, .n_disks = by_opts};
        LB_AUTO_FREE char *line = derive(c[i].words, by_opts ? NULL : &disk, &o);
        LB_AUTO_FREE char *want = lb_asprintf(" %s ", c[i].want);
        if (!strstr(line, want))
            fail_msg("case %u:\n%s\nhas no\n%s", i, line, want);
    }
}

/* Raw on the command line, a qcow2 overlay now. */
static void test_overlay(void **state)
{
    (void)state;
    static const struct image_case cases[] = {
        {{"-drive", "file=/srv/a.img,if=virtio,format=raw,cache=none"},
         "-drive file=/srv/a.img.lb-1.qcow2,if=virtio,format=qcow2,cache=none"},
        {{"-drive", "if=none,id=d,file=/srv/a.img"},
         "-drive if=none,id=d,file=/srv/a.img.lb-1.qcow2,format=qcow2"},
        {{"-drive", "if=none,driver=raw,file.driver=file,file.filename=/srv/a.img,file.aio=native"},
         "-drive if=none,file.driver=file,file.filename=/srv/a.img.lb-1.qcow2,file.aio=native,format=qcow2"},
        {{"-drive", "file=/srv/a.img,format=qcow2,backing.driver=raw,backing.file.filename=/b,l2-cache-size=1M"},
         "-drive file=/srv/a.img.lb-1.qcow2,format=qcow2"},
        {{"-hdb", "/srv/a.img"}, "-drive index=1,media=disk,file=/srv/a.img.lb-1.qcow2,format=qcow2"},
        {{"/srv/a.img"}, "-drive index=0,media=disk,file=/srv/a.img.lb-1.qcow2,format=qcow2"},
        {{"-cdrom", "/srv/a.img"}, "-drive index=2,media=cdrom,file=/srv/a.img.lb-1.qcow2,format=qcow2"},
        {{"-pflash", "/srv/a.img"}, "-drive if=pflash,file=/srv/a.img.lb-1.qcow2,format=qcow2"},
        {{"-blockdev", "driver=file,filename=/srv/a.img,node-name=s", "-blockdev",
          "raw,file=s,node-name=f,offset=0", "-device", "virtio-blk-pci,drive=f"},
         "-blockdev driver=file,filename=/srv/a.img.lb-1.qcow2,node-name=s -blockdev "
         "file=s,node-name=f,driver=qcow2"},
        {{"-blockdev", "qcow2,node-name=f,file.driver=file,file.filename=/srv/a.img,backing=old", "-blockdev",
          "file,filename=/srv/b,node-name=old"},
         "-blockdev node-name=f,file.driver=file,file.filename=/srv/a.img.lb-1.qcow2,driver=qcow2"},
        {{"-blockdev", "{\"driver\":\"file\",\"filename\":\"/srv/a.img\",\"node-name\":\"s\"}", "-blockdev",
          "{\"driver\":\"qcow2\",\"file\":\"s\",\"node-name\":\"f\",\"backing\":null}"},
         "-blockdev {\"driver\":\"file\",\"filename\":\"/srv/a.img.lb-1.qcow2\",\"node-name\":\"s\"} -blockdev "
         "{\"driver\":\"qcow2\",\"file\":\"s\",\"node-name\":\"f\"}"},
        {{"-blockdev", "{\"driver\":\"host_device\",\"filename\":\"/srv/a.img\",\"node-name\":\"s\","
          "\"cache\":{\"direct\":true},\"read-only\":false}"},
         "-blockdev {\"node-name\":\"s\",\"driver\":\"qcow2\",\"read-only\":false,\"cache\":{\"direct\":true},"
         "\"file\":{\"driver\":\"file\",\"filename\":\"/srv/a.img.lb-1.qcow2\",\"cache\":{\"direct\":true},"
         "\"read-only\":false}}"},
        {{"-blockdev", "file,filename=/srv/a.img,node-name=s,cache.direct=on,aio=native"},
         "-blockdev driver=qcow2,node-name=s,cache.direct=on,file.filename=/srv/a.img.lb-1.qcow2,"
         "file.cache.direct=on,file.aio=native,file.driver=file"},
    };
    check_images(cases, LB_ARRAY_LEN(cases), "qcow2", false);
    check_images(cases, LB_ARRAY_LEN(cases), "qcow2", true);
}

/* And back: the overlay was on the command line and was joined. */
static void test_joined(void **state)
{
    (void)state;
    static const struct image_case cases[] = {
        {{"-hda", "/srv/a.img"}, "-drive index=0,media=disk,file=/srv/a.img.lb-1.qcow2,format=raw"},
        {{"-drive", "file=/srv/a.img,format=qcow2,lazy-refcounts=on,if=virtio"},
         "-drive file=/srv/a.img.lb-1.qcow2,format=raw,if=virtio"},
        {{"-blockdev", "file,filename=/srv/a.img,node-name=s"},
         "-blockdev filename=/srv/a.img.lb-1.qcow2,node-name=s,driver=file"},
    };
    check_images(cases, LB_ARRAY_LEN(cases), "raw", false);
}

/* Description's paths are the source's, the caller's are this host's; what is not there is an error. */
static void test_mapping(void **state)
{
    (void)state;
    const char *const two[] = {"-drive", "file=/srv/x,,y/a.img,format=raw,id=a", "-drive",
                               "file=/srv/b.img,format=raw,id=b", NULL};
    struct lb_path_map paths[] = {{(char *)"/srv", (char *)"/srv/here"}};
    struct lb_disk_desc disk = {.path = (char *)"/srv/x,y/a.2", .argv_path = (char *)"/srv/x,y/a.img",
                                .format = (char *)"qcow2"};
    struct lb_disk_map map = {(char *)"/srv/b.img", (char *)"/srv/clone.qcow2", (char *)"qcow2"};
    struct lb_launch_opts o = {.paths = paths, .n_paths = 1, .disks = &map, .n_disks = 1};
    LB_AUTO_FREE char *line = derive(two, &disk, &o);
    assert_non_null(strstr(line, " file=/srv/here/x,,y/a.2,format=qcow2,id=a "));
    assert_non_null(strstr(line, " file=/srv/clone.qcow2,format=qcow2,id=b "));

    struct lb_disk_map both[] = {map, {disk.argv_path, (char *)"/own.qcow2", NULL}}; /* before the description */
    o.disks = both;
    o.n_disks = 2;
    LB_AUTO_FREE char *own = derive(two, &disk, &o);
    assert_non_null(strstr(own, " file=/own.qcow2,format=raw,id=a "));

    disk.argv_path = (char *)"/srv/c.img";
    LB_AUTO_FREE char *said = derive(two, &disk, &o);
    assert_non_null(strstr(said, "has no disk /srv/c.img"));
}

static const char *after(const char *line, const char *what)
{
    const char *at = strstr(line, what);
    if (!at)
        fail_msg("%s\nhas no %s", line, what);
    return at + strlen(what);
}

/* Another machine: every card has a MAC of its own, the same for the same seed. */
static void test_another(void **state)
{
    (void)state;
    const char *const words[] = {
        "-name", "web1,debug-threads=on", "-uuid", "11111111-2222-3333-4444-555555555555", "-smbios",
        "type=1,uuid=11111111-2222-3333-4444-555555555555", "-netdev", "user,id=n", "-device",
        "virtio-net-pci,netdev=n,mac=52:54:00:00:00:01", "-device",
        "{\"driver\":\"e1000\",\"id\":\"e\"}", "-nic", "user,id=k", "-nic", "none", "-net", "nic,model=e1000",
        "-net", "user", "-device", "virtio-blk-pci,drive=f", NULL};
    struct lb_launch_opts o = {.new_name = "web2", .new_uuid = "99999999-2222-3333-4444-555555555555",
                               .mac_seed = "web2"};
    LB_AUTO_FREE char *a = derive(words, NULL, &o);
    LB_AUTO_FREE char *again = derive(words, NULL, &o);
    o.mac_seed = "web3";
    LB_AUTO_FREE char *other = derive(words, NULL, &o);
    assert_string_equal(a, again);
    after(a, " -name debug-threads=on,guest=web2 ");
    after(a, " -uuid 99999999-2222-3333-4444-555555555555 ");
    after(a, " -smbios type=1,uuid=99999999-2222-3333-4444-555555555555 ");
    assert_null(strstr(a, "52:54"));
    after(a, " -nic none ");
    after(a, " -device virtio-blk-pci,drive=f ");
    static const char *const keys[] = {" virtio-net-pci,netdev=n,mac=", "\"mac\":\"", " user,id=k,mac=",
                                       " nic,model=e1000,macaddr="};
    for (unsigned i = 0; i < LB_ARRAY_LEN(keys); i++) {
        assert_memory_equal(after(a, keys[i]), "02:", 3);
        assert_memory_not_equal(after(a, keys[i]), after(other, keys[i]), 17);
        for (unsigned k = 0; k < i; k++)
            assert_memory_not_equal(after(a, keys[i]), after(a, keys[k]), 17);
    }

    /* nothing said: a name, a UUID and QEMU's own card get theirs */
    const char *const bare[] = {"-m", "64", NULL};
    LB_AUTO_FREE char *plain = derive(bare, NULL, &o);
    after(plain, " -name web2 ");
    after(plain, " -uuid 99999999");
    after(plain, " -net nic,macaddr=02:");
    after(plain, " -net user ");
    struct lb_launch_opts none = {.new_name = ""};
    LB_AUTO_FREE char *same = derive(words, NULL, &none);
    after(same, " -name web1,debug-threads=on ");
    after(same, "mac=52:54:00:00:00:01 ");
    assert_null(strstr(same, "02:"));
}

/* ------------------------------------------------------------------- qcow2 */

static char dir[] = "/tmp/lbi.XXXXXX";

static char *in_dir(const char *name)
{
    return lb_asprintf("%s/%s", dir, name);
}

/* A header that names a backing file; format NULL: it does not say which. */
static void put_image(const char *name, const char *backing, const char *format)
{
    unsigned char h[512] = {'Q', 'F', 'I', 0xfb, 0, 0, 0, 3};
    uint64_t at = htobe64(200);
    uint32_t len = htobe32((uint32_t)strlen(backing)), head = htobe32(104);
    memcpy(h + 8, &at, 8);
    memcpy(h + 16, &len, 4);
    memcpy(h + 100, &head, 4);
    if (format) {
        uint32_t ext[2] = {htobe32(0xe2792acau), htobe32((uint32_t)strlen(format))};
        memcpy(h + 104, ext, 8);
        memcpy(h + 112, format, strlen(format));
    }
    memcpy(h + 200, backing, strlen(backing));
    LB_AUTO_FREE char *path = in_dir(name);
    assert_int_equal(lb_file_write_atomic(path, h, sizeof(h), 0600, NULL), 0);
}

static unsigned chain(const char *name, char ***files, struct lb_error *err)
{
    LB_AUTO_FREE char *path = in_dir(name);
    unsigned n = 0;
    if (lb_qcow2_chain(path, files, err) < 0)
        return 99;
    while ((*files)[n])
        n++;
    return n;
}

static void test_chain(void **state)
{
    (void)state;
    struct lb_error err = LB_ERROR_INIT;
    char **files;
    LB_AUTO_FREE char *base = in_dir("base"), *mid = in_dir("mid:1");
    assert_non_null(mkdtemp(dir));
    put_image("top", "./mid:1", "qcow2");
    put_image("mid:1", base, "raw");
    put_image("base", "/etc/passwd", NULL); /* a guest's: never looked at */
    assert_int_equal(chain("top", &files, &err), 2);
    assert_non_null(strstr(files[0], "mid:1"));
    assert_string_equal(files[1], base);
    lb_strv_free(files);
    put_image("net", "nbd://h/x", NULL);
    assert_int_equal(chain("net", &files, &err), 0);
    lb_strv_free(files);

    put_image("self", "self", "qcow2");
    assert_int_equal(chain("self", &files, &err), 99);
    assert_non_null(strstr(err.message, "no end"));
    put_image("lost", "gone", "qcow2");
    assert_int_equal(chain("lost", &files, &err), 99);
    assert_int_equal(err.code, LB_E_NOT_FOUND);
    assert_non_null(strstr(err.message, "/gone"));
    /* lengths of a damaged header */
    put_image("bad", "gone", "qcow2");
    LB_AUTO_FREE char *bad = in_dir("bad");
    for (unsigned at = 8; at < 20; at++) {
        char *bytes;
        size_t len;
        assert_int_equal(lb_file_read(bad, 4096, &bytes, &len, NULL), 0);
        char was = bytes[at];
        bytes[at] = (char)0xff;
        assert_int_equal(lb_file_write_atomic(bad, bytes, len, 0600, NULL), 0);
        assert_int_equal(chain("bad", &files, &err), 99);
        bytes[at] = was;
        assert_int_equal(lb_file_write_atomic(bad, bytes, len, 0600, NULL), 0);
        free(bytes);
    }
    lb_remove_tree(dir, NULL);
}

/* Of a command line as somebody typed it only the image changes. */
static void test_argv_image(void **state)
{
    (void)state;
    struct lb_error err = LB_ERROR_INIT;
    char *argv[] = {(char *)"wrap", (char *)"--node=0", (char *)"qemu", (char *)"--name", (char *)"x", (char *)"-S",
                    (char *)"-drive", (char *)"if=virtio,file=/srv/a.img,format=raw", (char *)"-hdb", (char *)"/srv/b.img",
                    (char *)"--hdc", OLD, NULL};
    static const char *const want[] = {"wrap", "--node=0", "qemu", "--name", "x", "-S", "-drive",
                                       "if=virtio,file=/srv/a.img.lb-1.qcow2,format=qcow2", "-hdb", "/srv/b.img", "-drive",
                                       "index=2,media=disk,file=/srv/a.img.lb-1.qcow2,format=qcow2", NULL};
    char **out = NULL;
    unsigned n = 0;
    assert_int_equal(lb_qemu_argv_image(argv, OLD, NEW, "qcow2", &out, &err), 0);
    for (; want[n] && out[n]; n++)
        assert_string_equal(out[n], want[n]);
    assert_true(!want[n] && !out[n]);
    lb_strv_free(out);
    char *bare[] = {(char *)"qemu", OLD, NULL};
    assert_int_equal(lb_qemu_argv_image(bare, OLD, NEW, "qcow2", &out, &err), 0);
    assert_string_equal(out[2], "index=0,media=disk,file=/srv/a.img.lb-1.qcow2,format=qcow2");
    assert_null(out[3]);
    lb_strv_free(out);
    assert_int_equal(lb_qemu_argv_image(argv, "/srv/c.img", NEW, "qcow2", &out, &err), -1);
    assert_int_equal(err.code, LB_E_UNSUPPORTED);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_overlay), cmocka_unit_test(test_joined),  cmocka_unit_test(test_mapping),
        cmocka_unit_test(test_another), cmocka_unit_test(test_chain), cmocka_unit_test(test_argv_image),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
