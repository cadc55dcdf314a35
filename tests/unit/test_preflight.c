/* Preflight: the scan of real-life command lines, every check in its good and its
 * bad case against this very host, and the report. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <sched.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>

#include "core/registry.h"
#include "core/qemu/argv_scan.h"
#include "migrate/maintenance.h"
#include "migrate/preflight.h"
#include "core/host.h"

/* ------------------------------------------------------------ command lines */

struct want {
    enum lb_arg_kind kind;
    const char *option, *value;
    unsigned port;
    bool ro;
};

static void check_scan(const char *const *argv, const struct want *want, unsigned n_want)
{
    struct lb_arg_item *v;
    unsigned n;
    lb_argv_scan((char *const *)argv, &v, &n);
    for (unsigned i = 0; i < LB_MAX(n, n_want); i++) {
        if (i >= n)
            fail_msg("missing: %s %s", want[i].option, want[i].value);
        if (i >= n_want)
            fail_msg("too much: %s %s %s", lb_arg_kind_name(v[i].kind), v[i].option, v[i].value);
        if (v[i].kind != want[i].kind || strcmp(v[i].option, want[i].option) ||
            strcmp(v[i].value, want[i].value) || v[i].port != want[i].port ||
            v[i].read_only != want[i].ro)
            fail_msg("item %u: %s %s \"%s\" port %u ro %d, not %s %s \"%s\"", i,
                     lb_arg_kind_name(v[i].kind), v[i].option, v[i].value, v[i].port,
                     v[i].read_only, lb_arg_kind_name(want[i].kind), want[i].option, want[i].value);
    }
    lb_argv_items_free(v, n);
}
#define CHECK_SCAN(argv, want) check_scan(argv, want, LB_ARRAY_LEN(want))

static void test_scan_by_hand(void **s)
{
    (void)s;
    static const char *const argv[] = {
        "qemu-system-x86_64", "-enable-kvm", "-m", "1G", "--kernel", "/boot/vmlinuz", "-initrd",
        "rd.cpio", "-append", "-bios root=/dev/vda", "-bios", "seabios.bin", "-nographic",
        "-drive", "file=/srv/a,,b.qcow2,if=virtio,format=qcow2,readonly=on",
        "-drive", "if=pflash,file=/fw/vars.fd,format=raw", "-drive", "file=nbd://h:10809/x",
        "-cdrom", "/iso/d.iso", "-hda", "disk.img",
        "-netdev", "tap,id=n0,ifname=tap0,script=no,downscript=no,vhost=on",
        "-nic", "user,hostfwd=tcp:127.0.0.1:2222-:22,hostfwd=udp::5353-:53",
        "-qmp", "unix:/run/q.sock,server,nowait", "-monitor", "tcp:0.0.0.0:4444,server=on,wait=off",
        "-serial", "file:/var/log/s.log", "-serial", "mon:stdio", "-vnc", "127.0.0.1:1",
        "-gdb", "tcp::1234", "-D", "/var/log/q.log", "-pidfile", "/run/q.pid",
        "-fw_cfg", "name=opt/x,file=/etc/x.cfg", "-virtfs",
        "local,path=/share,mount_tag=s,security_model=none", "-s", NULL};
    static const struct want want[] = {
        {LB_ARG_FILE, "-kernel", "/boot/vmlinuz", 0, false},
        {LB_ARG_FILE, "-initrd", "rd.cpio", 0, false},
        {LB_ARG_DISK, "-drive", "/srv/a,b.qcow2", 0, true},
        {LB_ARG_DISK, "-drive", "/fw/vars.fd", 0, false},
        {LB_ARG_DISK, "-cdrom", "/iso/d.iso", 0, true},
        {LB_ARG_DISK, "-hda", "disk.img", 0, false},
        {LB_ARG_TAP, "-netdev", "tap0", 0, false},
        {LB_ARG_VHOST, "-netdev", "/dev/vhost-net", 0, false},
        {LB_ARG_TCP_LISTEN, "-nic", "127.0.0.1", 2222, false},
        {LB_ARG_UDP_LISTEN, "-nic", "", 5353, false},
        {LB_ARG_UNIX_LISTEN, "-qmp", "/run/q.sock", 0, false},
        {LB_ARG_TCP_LISTEN, "-monitor", "0.0.0.0", 4444, false},
        {LB_ARG_OUTPUT, "-serial", "/var/log/s.log", 0, false},
        {LB_ARG_TCP_LISTEN, "-vnc", "127.0.0.1", 5901, false},
        {LB_ARG_TCP_LISTEN, "-gdb", "", 1234, false},
        {LB_ARG_OUTPUT, "-D", "/var/log/q.log", 0, false},
        {LB_ARG_OUTPUT, "-pidfile", "/run/q.pid", 0, false},
        {LB_ARG_FILE, "-fw_cfg", "/etc/x.cfg", 0, false},
        {LB_ARG_DIR, "-virtfs", "/share", 0, false},
    };
    CHECK_SCAN(argv, want);
}

static void test_scan_libvirt(void **s)
{
    (void)s;
    static const char *const argv[] = {
        "/usr/bin/qemu-system-x86_64", "-name", "guest=web1,debug-threads=on", "-S", "-object",
        "{\"qom-type\":\"secret\",\"id\":\"masterKey0\",\"format\":\"raw\",\"file\":"
        "\"/var/lib/libvirt/qemu/domain-1-web1/master-key.aes\"}",
        "-machine", "pc-q35-7.2,usb=off,memory-backend=pc.ram", "-accel", "kvm", "-cpu",
        "host,migratable=on", "-m", "2048", "-no-user-config", "-nodefaults",
        "-chardev", "socket,id=charmonitor,fd=29,server=on,wait=off", "-mon",
        "chardev=charmonitor,id=monitor,mode=control", "-blockdev",
        "{\"driver\":\"file\",\"filename\":\"/var/lib/libvirt/images/web1.qcow2\",\"node-name\":"
        "\"libvirt-1-storage\",\"auto-read-only\":true,\"discard\":\"unmap\"}",
        "-blockdev", "{\"node-name\":\"libvirt-1-format\",\"read-only\":false,\"driver\":\"qcow2\","
        "\"file\":\"libvirt-1-storage\",\"backing\":null}", "-netdev",
        "{\"type\":\"tap\",\"fd\":\"31\",\"vhost\":true,\"vhostfd\":\"33\",\"id\":\"hostnet0\"}",
        "-device", "{\"driver\":\"virtio-net-pci\",\"netdev\":\"hostnet0\",\"id\":\"net0\"}",
        "-chardev", "pty,id=charserial0", "-chardev",
        "socket,id=charchannel0,path=/run/libvirt/qemu/channel/1-web1/org.qemu.guest_agent.0,"
        "server=on,wait=off", "-vnc", "127.0.0.1:0,audiodev=audio1", "-device",
        "{\"driver\":\"vfio-pci\",\"host\":\"0000:3b:00.0\",\"id\":\"hostdev0\"}",
        "-sandbox", "on,obsolete=deny", "-msg", "timestamp=on", NULL};
    static const struct want want[] = {
        {LB_ARG_FILE, "-object", "/var/lib/libvirt/qemu/domain-1-web1/master-key.aes", 0, false},
        {LB_ARG_FD, "-chardev", "29", 0, false},
        {LB_ARG_DISK, "-blockdev", "/var/lib/libvirt/images/web1.qcow2", 0, false},
        /* "file" of the format node names another node */
        {LB_ARG_FD, "-netdev", "31", 0, false},
        {LB_ARG_FD, "-netdev", "33", 0, false},
        {LB_ARG_VHOST, "-netdev", "/dev/vhost-net", 0, false},
        {LB_ARG_UNIX_LISTEN, "-chardev", "/run/libvirt/qemu/channel/1-web1/org.qemu.guest_agent.0", 0,
         false},
        {LB_ARG_TCP_LISTEN, "-vnc", "127.0.0.1", 5900, false},
        {LB_ARG_PASSTHROUGH, "-device", "vfio-pci 0000:3b:00.0", 0, false},
    };
    CHECK_SCAN(argv, want);
}

static void test_scan_proxmox(void **s)
{
    (void)s;
    static const char *const argv[] = {
        "/usr/bin/kvm", "-id", "100", "-name", "web,debug-threads=on", "-no-shutdown", "-chardev",
        "socket,id=qmp,path=/var/run/qemu-server/100.qmp,server=on,wait=off", "-mon",
        "chardev=qmp,mode=control", "-chardev",
        "socket,id=qmp-event,path=/var/run/qmeventd.sock,reconnect=5", "-pidfile",
        "/var/run/qemu-server/100.pid", "-daemonize", "-smbios",
        "type=1,uuid=4f5bd2a5-5ed4-43d4-a0a2-1f8a1e0e54a1", "-drive",
        "if=pflash,unit=0,format=raw,readonly=on,file=/usr/share/pve-edk2-firmware/OVMF_CODE.fd",
        "-smp", "4,sockets=1,cores=4,maxcpus=4", "-vnc",
        "unix:/var/run/qemu-server/100.vnc,password=on", "-chardev",
        "socket,path=/var/run/qemu-server/100.qga,server=on,wait=off,id=qga0", "-drive",
        "file=/dev/pve/vm-100-disk-0,if=none,id=drive-scsi0,format=raw,cache=none,aio=io_uring",
        "-drive", "file=rbd:pool/vm-100:conf=/etc/ceph.conf,if=none,id=drive-scsi1", "-netdev",
        "type=tap,id=net0,ifname=tap100i0,script=/usr/libexec/qemu-server/pve-bridge,"
        "downscript=/usr/libexec/qemu-server/pve-bridgedown,vhost=on", "-spice",
        "tls-port=61000,addr=127.0.0.1,tls-ciphers=HIGH,seamless-migration=on", NULL};
    static const struct want want[] = {
        {LB_ARG_UNIX_LISTEN, "-chardev", "/var/run/qemu-server/100.qmp", 0, false},
        {LB_ARG_UNIX_CONNECT, "-chardev", "/var/run/qmeventd.sock", 0, false},
        {LB_ARG_OUTPUT, "-pidfile", "/var/run/qemu-server/100.pid", 0, false},
        {LB_ARG_DISK, "-drive", "/usr/share/pve-edk2-firmware/OVMF_CODE.fd", 0, true},
        {LB_ARG_UNIX_LISTEN, "-vnc", "/var/run/qemu-server/100.vnc", 0, false},
        {LB_ARG_UNIX_LISTEN, "-chardev", "/var/run/qemu-server/100.qga", 0, false},
        {LB_ARG_DISK, "-drive", "/dev/pve/vm-100-disk-0", 0, false},
        {LB_ARG_TAP, "-netdev", "tap100i0", 0, false},
        {LB_ARG_VHOST, "-netdev", "/dev/vhost-net", 0, false},
        {LB_ARG_FILE, "-netdev", "/usr/libexec/qemu-server/pve-bridge", 0, false},
        {LB_ARG_FILE, "-netdev", "/usr/libexec/qemu-server/pve-bridgedown", 0, false},
        {LB_ARG_TCP_LISTEN, "-spice", "127.0.0.1", 61000, false},
    };
    CHECK_SCAN(argv, want);
}

/* Whatever is on the line, the scan ends and leaves nothing behind (ASan). */
static void test_scan_nonsense(void **s)
{
    (void)s;
    static const char *const words[] = {"-drive", "-netdev", "-chardev", "-vnc", "-device", "{", "",
                                        "{\"a\":[{\"b\":{}}]}", ",,,", "=", "user,hostfwd=", ":",
                                        "tcp:", "unix:", "tap,ifname=", "socket,server,port=99999",
                                        "user,hostfwd=tcp", "-", "--", ",=,", "a,", "no", "no,no"};
    unsigned seed = 7;
    for (unsigned trial = 0; trial < 20000; trial++) {
        const char *argv[8] = {"q"};
        for (unsigned i = 1; i < 7; i++)
            argv[i] = words[(unsigned)rand_r(&seed) % LB_ARRAY_LEN(words)];
        struct lb_arg_item *v;
        unsigned n;
        lb_argv_scan((char *const *)argv, &v, &n);
        assert_true(n < 100);
        lb_argv_items_free(v, n);
    }
}

/* ------------------------------------------------------------- the destination */

static char dir[64], emulator[128];
static struct lb_host_config cfg;

static char *in_dir(const char *name)
{
    return lb_asprintf("%s/%s", dir, name);
}

static void put(const char *name, const char *text, mode_t mode)
{
    char *path = in_dir(name);
    assert_int_equal(lb_file_write_atomic(path, text, strlen(text), mode, NULL), 0);
    free(path);
}

static int setup(void **s)
{
    (void)s;
    snprintf(dir, sizeof(dir), "/tmp/lb-preflight-XXXXXX");
    if (!mkdtemp(dir) || lb_config_load(NULL, &cfg, NULL) < 0)
        return -1;
    cfg.memory_reserve_bytes = 0;
    /* answers like QEMU, so that this test needs none */
    snprintf(emulator, sizeof(emulator), "%s/qemu", dir);
    put("qemu", "#!/bin/sh\n"
        "[ \"$1\" = --version ] && echo 'QEMU emulator version 7.2.22 (Debian 1:7.2)' && exit\n"
        "[ \"$2\" = help ] && printf 'Supported machines are:\\npc  Standard PC (alias of "
        "pc-i440fx-7.2)\\npc-i440fx-7.2  Standard PC (default)\\n'\n", 0755);
    return 0;
}

static int teardown(void **s)
{
    (void)s;
    lb_config_free(&cfg);
    return lb_remove_tree(dir, NULL);
}

static struct lb_vm_desc desc(const char *const *argv)
{
    static char *none[] = {NULL};
    return (struct lb_vm_desc){
        .name = (char *)"web1", .hypervisor = (char *)"qemu", .hv_version = (char *)"7.2.22",
        .emulator = emulator, .argv = (char **)argv, .cwd = dir, .uid = geteuid(),
        .gid = getegid(), .machine = (char *)"pc-i440fx-7.2", .accel = (char *)"tcg",
        .cpu_model = (char *)"max", .vcpus = 1, .ram_bytes = 1 << 20, .uuid = (char *)"",
        .features = none, .blockers = none, .kernel_release = (char *)"6.1",
    };
}

static struct lb_report run(const struct lb_vm_desc *d)
{
    struct lb_report r = {0};
    lb_preflight_dest(d, &cfg, dir, lb_wall_ms(), &r);
    for (unsigned i = 0; i < r.n; i++) {
        assert_true(r.v[i].message[0] != '\0');
        if (r.v[i].status != LB_CHECK_OK)
            assert_true(r.v[i].remedy[0] != '\0');
    }
    return r;
}

static const struct lb_check *find(const struct lb_report *r, const char *id,
                                   enum lb_check_status status, const char *part)
{
    for (unsigned i = 0; i < r->n; i++)
        if (!strcmp(r->v[i].id, id) && r->v[i].status == status && strstr(r->v[i].message, part))
            return &r->v[i];
    return NULL;
}

/* The description gets exactly this one refusal (or warning), and says this. */
static void expect(const struct lb_vm_desc *d, const char *id, enum lb_check_status status,
                   const char *message, const char *remedy)
{
    struct lb_report r = run(d);
    const struct lb_check *c = find(&r, id, status, message);
    unsigned others = 0;
    for (unsigned i = 0; i < r.n; i++)
        others += r.v[i].status == LB_CHECK_FAIL && strcmp(r.v[i].id, id);
    if (!c || others || !strstr(c->remedy, remedy)) {
        char *json = lb_report_json(&r);
        fail_msg("no %s about \"%s\" / \"%s\", or others, in %s", id, message, remedy, json);
    }
    assert_int_equal(lb_report_refused(&r), status == LB_CHECK_FAIL);
    lb_report_free(&r);
}
#define ARGV(...) ((const char *const[]){"qemu", __VA_ARGS__, NULL})

static void test_all_good(void **s)
{
    (void)s;
    static const char *const ids[] = {
        "hypervisor-version", "machine-type", "cpu-features", "memory", "disks", "disk-locks", "name",
        "files", "sockets", "ports", "taps", "passthrough", "clock-skew", "kernel", "emulator", "uid",
        "blockers", "config", "maintenance"};
    put("vmlinuz", "x", 0644);
    put("disk.img", "x", 0644);
    struct lb_vm_desc d = desc(ARGV("-kernel", "vmlinuz", "-qmp", "unix:q.sock,server", "-D", "log"));
    struct lb_disk_desc disk = {(char *)"d0", (char *)"disk.img", (char *)"raw", false, false, NULL, false};
    d.disks = &disk;
    d.n_disks = 1;
    struct lb_report r = run(&d);
    assert_false(lb_report_refused(&r));
    for (size_t i = 0; i < LB_ARRAY_LEN(ids); i++) {
        bool there = false;
        for (unsigned k = 0; k < r.n; k++)
            there |= !strcmp(r.v[k].id, ids[i]);
        if (!there)
            fail_msg("no line about %s", ids[i]);
    }
    /* nobody holds the disk's lock: it may be a copy */
    assert_non_null(find(&r, "disk-locks", LB_CHECK_WARN, "not seen"));
    lb_report_free(&r);
}

static void test_emulator(void **s)
{
    (void)s;
    struct lb_vm_desc d = desc(ARGV("-S"));
    d.emulator = (char *)"/nonexistent/qemu";
    expect(&d, "emulator", LB_CHECK_FAIL, "cannot be run", "emulator = /nonexistent/qemu ->");
    struct lb_path_map map = {(char *)"/nonexistent/qemu", emulator};
    cfg.emulators = &map;
    cfg.n_emulators = 1;
    struct lb_report r = run(&d);
    assert_false(lb_report_refused(&r));
    assert_non_null(find(&r, "hypervisor-version", LB_CHECK_OK, "7.2.22"));
    lb_report_free(&r);
    cfg.emulators = NULL;
    cfg.n_emulators = 0;

    d = desc(ARGV("-S"));
    d.hv_version = (char *)"10.0.2";
    expect(&d, "hypervisor-version", LB_CHECK_WARN, "older", "newer");
    d = desc(ARGV("-S"));
    d.machine = (char *)"pc-i440fx-7";
    expect(&d, "machine-type", LB_CHECK_FAIL, "not known", "-machine");

    put("broken", "#!/bin/sh\nexit 3\n", 0755);
    char *broken = in_dir("broken");
    d.emulator = broken;
    expect(&d, "emulator", LB_CHECK_FAIL, "status 3", "install");
    free(broken);
}

static void test_run_deadline(void **s)
{
    (void)s;
    struct lb_error err = LB_ERROR_INIT;
    char *out = NULL;
    const char *const hang[] = {"/bin/sleep", "30", NULL};
    uint64_t t = lb_now_ns();
    assert_int_equal(lb_host_run(hang, 100, &out, &err), -1);
    assert_true(lb_now_ns() - t < UINT64_C(5000000000));
    assert_non_null(strstr(err.message, "100 ms"));
    const char *const fine[] = {"/bin/echo", "hello", NULL};
    assert_int_equal(lb_host_run(fine, 5000, &out, &err), 0);
    assert_string_equal(out, "hello\n");
    free(out);
}

static void test_resources(void **s)
{
    (void)s;
    struct lb_vm_desc d = desc(ARGV("-S"));
    d.ram_bytes = UINT64_C(1) << 45;
    expect(&d, "memory", LB_CHECK_FAIL, "needs", "memory-reserve");
    d = desc(ARGV("-S"));
    cfg.memory_reserve_bytes = UINT64_C(1) << 45;
    expect(&d, "memory", LB_CHECK_FAIL, "reserve", "memory-reserve");
    cfg.memory_reserve_bytes = 0;

    struct lb_vm_entry e = {.name = "web1", .hypervisor = "qemu", .origin = "run"};
    char *made = lb_vm_dir(dir, "web1", true);
    free(made);
    assert_int_equal(lb_vm_entry_save(dir, &e, NULL), 0);
    expect(&d, "name", LB_CHECK_FAIL, "already here", "lifeboat");
    d.name = (char *)"../x";
    expect(&d, "name", LB_CHECK_FAIL, "not a VM name", "rename");
}

static void test_files(void **s)
{
    (void)s;
    struct lb_vm_desc d = desc(ARGV("-kernel", "/elsewhere/vmlinuz"));
    expect(&d, "files", LB_CHECK_FAIL, "/elsewhere/vmlinuz", "path = /elsewhere/vmlinuz ->");
    put("vmlinuz", "x", 0644);
    struct lb_path_map map = {(char *)"/elsewhere", dir};
    cfg.paths = &map;
    cfg.n_paths = 1;
    struct lb_report r = run(&d);
    assert_false(lb_report_refused(&r));
    lb_report_free(&r);
    map.to = (char *)"/nonexistent";
    expect(&d, "files", LB_CHECK_FAIL, "(/elsewhere/vmlinuz on the source)", "->");
    cfg.paths = NULL;
    cfg.n_paths = 0;

    d = desc(ARGV("-serial", "file:/nonexistent/log"));
    expect(&d, "files", LB_CHECK_FAIL, "/nonexistent/log", "");
    d = desc(ARGV("-netdev", "tap,fd=31,id=n"));
    expect(&d, "files", LB_CHECK_FAIL, "descriptor 31", "ifname=");

    struct lb_disk_desc disk = {(char *)"d0", (char *)"/elsewhere/d.img", (char *)"raw", false, false, NULL, false};
    d = desc(ARGV("-S"));
    d.disks = &disk;
    d.n_disks = 1;
    expect(&d, "disks", LB_CHECK_FAIL, "/elsewhere/d.img", "storage");
    disk.path = dir;
    expect(&d, "disks", LB_CHECK_FAIL, "not a file", "image");
    disk.path = (char *)"nbd://host/disk";
    r = run(&d);
    assert_false(lb_report_refused(&r));
    lb_report_free(&r);
}

/* Rights are those of the VM's user, not ours. */
static void test_other_user(void **s)
{
    (void)s;
    if (geteuid() != 0) {
        print_message("skipped: only root can ask for another user\n");
        skip();
    }
    put("secret", "x", 0600);
    assert_int_equal(chmod(dir, 0755), 0);
    struct lb_vm_desc d = desc(ARGV("-kernel", "secret"));
    d.uid = d.gid = 65534;
    expect(&d, "files", LB_CHECK_FAIL, "Permission denied", "give user 65534 the right");
    char *path = in_dir("secret");
    assert_int_equal(chmod(path, 0644), 0);
    free(path);
    struct lb_report r = run(&d);
    assert_false(lb_report_refused(&r));
    lb_report_free(&r);
}

static void test_disk_lock(void **s)
{
    (void)s;
    put("disk.img", "x", 0644);
    char *path = in_dir("disk.img");
    int fd = open(path, O_RDWR | O_CLOEXEC);
    struct flock l = {.l_type = F_RDLCK, .l_whence = SEEK_SET, .l_start = 101, .l_len = 1};
    assert_int_equal(lb_host_locked(path), 0);
    assert_int_equal(fcntl(fd, F_OFD_SETLK, &l), 0);
    assert_int_equal(lb_host_locked(path), 1);
    struct lb_disk_desc disk = {(char *)"d0", path, (char *)"raw", false, false, NULL, false};
    struct lb_vm_desc d = desc(ARGV("-S"));
    d.disks = &disk;
    d.n_disks = 1;
    struct lb_report r = run(&d);
    assert_non_null(find(&r, "disk-locks", LB_CHECK_OK, "as expected"));
    lb_report_free(&r);
    close(fd);
    free(path);
}

/* A disk of which a copy is kept: it may be missing, its folder not; and nobody may use it. */
static void test_copied_disk(void **s)
{
    (void)s;
    char *path = in_dir("copy.img"), *nowhere = in_dir("no/copy.img");
    const char *const copied[] = {path, nowhere};
    struct lb_disk_desc disk = {(char *)"d0", path, (char *)"raw", false, false, NULL, false};
    struct lb_vm_desc d = desc(ARGV("-S"));
    struct lb_report r = {0};
    d.disks = &disk;
    d.n_disks = 1;
    expect(&d, "disks", LB_CHECK_FAIL, "copy.img", "path = ");
    lb_preflight_standby(&d, &cfg, dir, lb_wall_ms(), copied, 2, &r);
    assert_false(lb_report_refused(&r));
    assert_non_null(find(&r, "disks", LB_CHECK_OK, "will be made"));
    lb_report_free(&r);

    disk.path = nowhere;
    lb_preflight_standby(&d, &cfg, dir, lb_wall_ms(), copied, 2, &r);
    assert_non_null(find(&r, "disks", LB_CHECK_FAIL, "cannot be made"));
    lb_report_free(&r);

    disk.path = path;
    put("copy.img", "x", 0644);
    lb_preflight_standby(&d, &cfg, dir, lb_wall_ms(), copied, 2, &r);
    assert_non_null(find(&r, "disks", LB_CHECK_OK, "will be overwritten"));
    assert_null(find(&r, "disk-locks", LB_CHECK_WARN, ""));
    lb_report_free(&r);

    int fd = open(path, O_RDWR | O_CLOEXEC);
    struct flock l = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 201, .l_len = 1};
    assert_int_equal(fcntl(fd, F_OFD_SETLK, &l), 0);
    lb_preflight_standby(&d, &cfg, dir, lb_wall_ms(), copied, 2, &r);
    assert_non_null(find(&r, "disk-locks", LB_CHECK_FAIL, "in use here"));
    lb_report_free(&r);
    close(fd);
    free(path);
    free(nowhere);
}

/* An overlay took the place of the disk: it is checked, with what it stands on by its own header, and the image
 * of the command line is not; a copy stands on nothing. */
static void test_overlay(void **s)
{
    (void)s;
    unsigned char head[300] = {'Q', 'F', 'I', 0xfb, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 200, 0, 0, 0, 8};
    char *overlay = in_dir("over.qcow2"), *base = in_dir("base.img");
    const char *const copied[] = {overlay};
    struct lb_disk_desc disks[] = {
        {(char *)"d0", overlay, (char *)"qcow2", false, false, (char *)"stale.img", false},
        {(char *)"#b", (char *)"/elsewhere/base.img", (char *)"raw", true, false, NULL, true},
    };
    struct lb_vm_desc d = desc(ARGV("-drive", "file=stale.img,format=raw"));
    struct lb_report r = {0};
    d.disks = disks;
    d.n_disks = 2;
    memcpy(head + 200, "base.img", 8);
    assert_int_equal(lb_file_write_atomic(overlay, head, sizeof(head), 0644, NULL), 0);
    expect(&d, "disks", LB_CHECK_FAIL, "base.img: No such file", "qemu-img rebase");
    lb_preflight_standby(&d, &cfg, dir, lb_wall_ms(), copied, 1, &r);
    assert_false(lb_report_refused(&r));
    lb_report_free(&r);
    put("base.img", "x", 0644);
    expect(&d, "disks", LB_CHECK_OK, "over.qcow2", "");
    r = run(&d);
    assert_false(lb_report_refused(&r));
    lb_report_free(&r);
    /* the same bytes in a raw image are the guest's */
    assert_int_equal(unlink(base), 0);
    disks[0].format = (char *)"raw";
    r = run(&d);
    assert_false(lb_report_refused(&r));
    lb_report_free(&r);
    free(overlay);
    free(base);
}

static void test_sockets(void **s)
{
    (void)s;
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    snprintf(a.sun_path, sizeof(a.sun_path), "%s/q.sock", dir);
    struct lb_vm_desc d = desc(ARGV("-serial", "unix:q.sock,server=on,wait=off"));
    struct lb_vm_desc monitor = desc(ARGV("-qmp", "unix:q.sock,server=on,wait=off"));
    struct lb_vm_desc client = desc(ARGV("-chardev", "socket,id=c,path=q.sock"));
    expect(&client, "sockets", LB_CHECK_FAIL, "nobody serves", "start its server");

    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0);
    assert_int_equal(bind(fd, (struct sockaddr *)&a, sizeof(a)), 0);
    assert_int_equal(listen(fd, 1), 0);
    expect(&d, "sockets", LB_CHECK_FAIL, "in use", "path = ");
    expect(&monitor, "sockets", LB_CHECK_WARN, "will go without it", "path = ");
    struct lb_report r = run(&client);
    assert_false(lb_report_refused(&r));
    lb_report_free(&r);
    assert_int_equal(accept(fd, NULL, NULL), -1); /* it was not disturbed */
    assert_int_equal(errno, EAGAIN);
    close(fd); /* the file stays: a stale socket is no obstacle */
    r = run(&d);
    assert_false(lb_report_refused(&r));
    lb_report_free(&r);
    d = desc(ARGV("-serial", "unix:/nonexistent/q.sock,server=on"));
    expect(&d, "sockets", LB_CHECK_FAIL, "/nonexistent/q.sock", "path = ");
    d = desc(ARGV("-qmp", "unix:/nonexistent/q.sock,server=on")); /* the receiver leaves it out */
    expect(&d, "sockets", LB_CHECK_WARN, "/nonexistent/q.sock", "path = ");
    d = desc(ARGV("-chardev", "socket,id=lb-qmp,server=on,wait=off,path=/nonexistent/q.sock", "-mon",
                  "chardev=lb-qmp,mode=control")); /* ours: the receiver gets another */
    r = run(&d);
    assert_false(lb_report_refused(&r));
    lb_report_free(&r);
}

static void test_ports(void **s)
{
    (void)s;
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof(a);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    assert_int_equal(bind(fd, (struct sockaddr *)&a, len), 0);
    assert_int_equal(listen(fd, 1), 0);
    assert_int_equal(getsockname(fd, (struct sockaddr *)&a, &len), 0);
    char *fwd = lb_asprintf("user,hostfwd=tcp:127.0.0.1:%u-:22", ntohs(a.sin_port));
    struct lb_vm_desc d = desc(ARGV("-nic", fwd));
    expect(&d, "ports", LB_CHECK_FAIL, "already in use", "ss -lntup");
    close(fd);
    struct lb_report r = run(&d);
    assert_false(lb_report_refused(&r));
    lb_report_free(&r);
    free(fwd);
    d = desc(ARGV("-gdb", "tcp:192.0.2.1:1", "-pidfile", "/nonexistent/pid")); /* not passed on */
    r = run(&d);
    assert_false(lb_report_refused(&r));
    lb_report_free(&r);
    d = desc(ARGV("-vnc", "192.0.2.1:1"));
    expect(&d, "ports", LB_CHECK_FAIL, "192.0.2.1:5901", "0.0.0.0");
    d = desc(ARGV("-vnc", "console.example:1"));
    expect(&d, "ports", LB_CHECK_WARN, "could not be checked", "numeric");
}

static void test_taps(void **s)
{
    (void)s;
    struct lb_vm_desc d = desc(ARGV("-netdev", "tap,id=n,ifname=lo"));
    struct lb_report r = run(&d);
    assert_non_null(find(&r, "taps", LB_CHECK_FAIL, "lo cannot be used")); /* no tap */
    lb_report_free(&r);
    d = desc(ARGV("-netdev", "tap,id=n,ifname=lbnosuchtap"));
    expect(&d, "taps", geteuid() ? LB_CHECK_FAIL : LB_CHECK_WARN, "lbnosuchtap",
           "tap = lbnosuchtap ->");
    d = desc(ARGV("-netdev", "tap,id=n,ifname=lbnosuchtap,script=no"));
    expect(&d, "taps", LB_CHECK_FAIL, "lbnosuchtap", "tap = lbnosuchtap ->");
    assert_int_equal(lb_host_tap_free("lbnosuchtap"), ENODEV); /* and it was not made */
    d = desc(ARGV("-netdev", "bridge,id=n,br=lbnosuchbr"));
    expect(&d, "taps", LB_CHECK_FAIL, "lbnosuchbr", "bridge");
}

static int open_tap(const char *name, short flags, bool persist)
{
    struct ifreq ifr = {.ifr_flags = (short)(IFF_TAP | IFF_NO_PI | flags)};
    snprintf(ifr.ifr_name, sizeof(ifr.ifr_name), "%s", name);
    int fd = open("/dev/net/tun", O_RDWR | O_CLOEXEC);
    if (fd < 0 || ioctl(fd, TUNSETIFF, &ifr) < 0 || ioctl(fd, TUNSETPERSIST, persist) < 0)
        return -1;
    return fd;
}

/* Real taps, in a network namespace of a child: free, busy, with queues. 0 or the step
 * that went wrong; 99: not possible here. */
static int taps_in_namespace(void)
{
    if (unshare(CLONE_NEWNET) < 0)
        return 99;
    int fd = open_tap("lbt0", 0, true);
    if (fd < 0)
        return 99;
    if (lb_host_tap_free("lbt0") != EBUSY)
        return 1;
    close(fd);
    if (lb_host_tap_free("lbt0") != 0 || lb_host_tap_free("lbt0") != 0)
        return 2;
    if (if_nametoindex("lbt0") == 0) /* still there after the question */
        return 3;
    fd = open_tap("lbt1", IFF_MULTI_QUEUE | IFF_VNET_HDR, true);
    close(fd);
    if (lb_host_tap_free("lbt1") != 0)
        return 4;
    /* the question does not change what kind of tap it is */
    fd = open_tap("lbt1", IFF_MULTI_QUEUE | IFF_VNET_HDR, true);
    if (fd < 0)
        return 5;
    close(fd);
    return lb_host_tap_free("lo") == EINVAL && lb_host_tap_free("lbt2") == ENODEV ? 0 : 6;
}

static void test_real_taps(void **s)
{
    (void)s;
    pid_t pid = fork();
    if (pid == 0)
        _exit(taps_in_namespace());
    int status;
    waitpid(pid, &status, 0);
    assert_true(WIFEXITED(status));
    if (WEXITSTATUS(status) == 99) {
        print_message("skipped: taps and network namespaces cannot be made here\n");
        skip();
    }
    assert_int_equal(WEXITSTATUS(status), 0);
}

static void test_others(void **s)
{
    (void)s;
    struct lb_vm_desc d = desc(ARGV("-device", "vfio-pci,host=01:00.0"));
    expect(&d, "passthrough", LB_CHECK_FAIL, "vfio-pci 01:00.0", "detach");
    d = desc(ARGV("-netdev", "vhost-user,id=n,chardev=c"));
    expect(&d, "passthrough", LB_CHECK_FAIL, "vhost-user", "tap");
    char *blockers[] = {(char *)"ivshmem: memory is shared with other VMs: remove the device", NULL};
    d = desc(ARGV("-S"));
    d.blockers = blockers;
    expect(&d, "blockers", LB_CHECK_FAIL, "ivshmem: memory is shared", "remove the device");
    struct lb_report r = {0};
    lb_preflight_source(&d, &r);
    assert_true(lb_report_refused(&r));
    lb_report_free(&r);
    d = desc(ARGV("-S"));
    d.accel = (char *)"kvm";
    r = run(&d);
    assert_int_equal(!find(&r, "kernel", LB_CHECK_FAIL, "/dev/kvm"),
                     access("/dev/kvm", R_OK | W_OK) == 0);
    lb_report_free(&r);
    d = desc(ARGV("-S"));
    lb_preflight_dest(&d, &cfg, dir, lb_wall_ms() - 5000, &r);
    assert_non_null(find(&r, "clock-skew", LB_CHECK_WARN, "5.0 s ahead"));
    assert_false(lb_report_refused(&r));
    lb_report_free(&r);
}

static void test_maintenance(void **s)
{
    (void)s;
    struct lb_maintenance m = {.on = true, .reason = "new power supply"};
    struct lb_vm_desc d = desc(ARGV("-S"));
    assert_int_equal(lb_maintenance_save(dir, &m, NULL), 0);
    expect(&d, "maintenance", LB_CHECK_FAIL, "takes no VMs: new power supply", "maintenance off");
    put("maintenance.json", "{", 0600);
    expect(&d, "maintenance", LB_CHECK_FAIL, "cannot be told", "remove it");
    /* over, but some VMs are still to be brought back */
    m.on = false;
    lb_left_add(&m, "web1");
    assert_int_equal(lb_maintenance_save(dir, &m, NULL), 0);
    lb_maintenance_free(&m);
    struct lb_report r = run(&d);
    assert_non_null(find(&r, "maintenance", LB_CHECK_OK, "takes VMs"));
    lb_report_free(&r);
}

static void test_features(void **s)
{
    (void)s;
    char *src[] = {(char *)"avx2", (char *)"sse2", NULL};
    char *more[] = {(char *)"aes", (char *)"avx2", (char *)"sse2", NULL};
    char *less[] = {(char *)"sse2", NULL};
    struct lb_error err = LB_ERROR_INIT;
    assert_int_equal(lb_cpu_features_check(src, more, &err), 0);
    assert_int_equal(lb_cpu_features_check(src, src, &err), 0);
    assert_int_equal(lb_cpu_features_check(NULL, less, &err), 0);
    assert_int_equal(lb_cpu_features_check(src, less, &err), -1);
    assert_int_equal(err.code, LB_E_PREFLIGHT);
    assert_non_null(strstr(err.message, "1 CPU features that this host does not offer: avx2"));
    assert_non_null(strstr(err.remedy, "-cpu"));
    /* words are sets of bits: a newer processor has more, one without the word has none */
    char *words[] = {(char *)"CPUID.1.0.ECX:0x00000206", (char *)"CPUID.7.0.EDX:0x00000000", NULL};
    char *newer[] = {(char *)"CPUID.1.0.ECX:0x80000207", NULL};
    char *older[] = {(char *)"CPUID.1.0.ECX:0x00000006", (char *)"CPUID.1.0.EDX:0xffffffff", NULL};
    assert_int_equal(lb_cpu_features_check(words, newer, &err), 0);
    assert_int_equal(lb_cpu_features_check(words, older, &err), -1);
    assert_non_null(strstr(err.message, "1 CPU features"));
    assert_non_null(strstr(err.message, "CPUID.1.0.ECX bits 0x200"));
    char *many[101];
    for (unsigned i = 0; i < 100; i++)
        many[i] = (char *)"a-rather-long-feature-name";
    many[100] = NULL;
    assert_int_equal(lb_cpu_features_check(many, less, &err), -1);
    assert_non_null(strstr(err.message, " ..."));
}

static void test_report(void **s)
{
    (void)s;
    struct lb_report r = {0};
    assert_false(lb_report_refused(&r));
    lb_report_add(&r, "a", LB_CHECK_OK, NULL, "fine \"%d\"\n\x1b", 1);
    lb_report_add(&r, "b", LB_CHECK_WARN, "look", "hm \xc3");
    assert_false(lb_report_refused(&r));
    lb_report_add(&r, "c", LB_CHECK_FAIL, "do this", "no");
    assert_true(lb_report_refused(&r));
    char *text = lb_report_json(&r);
    json_t *j = json_loads(text, 0, NULL);
    assert_int_equal(json_array_size(j), 3);
    json_t *c = json_array_get(j, 2);
    assert_string_equal(json_string_value(json_object_get(c, "id")), "c");
    assert_string_equal(json_string_value(json_object_get(c, "status")), "fail");
    assert_string_equal(json_string_value(json_object_get(c, "remedy")), "do this");
    assert_string_equal(json_string_value(json_object_get(json_array_get(j, 0), "message")),
                        "fine \"1\"  ");
    json_decref(j);
    free(text);
    lb_report_free(&r);
    text = lb_report_json(&r);
    assert_string_equal(text, "[]");
    free(text);
}

static void test_unit_of(void **s)
{
    static const struct {
        const char *cgroup, *unit;
    } cases[] = {
        {"0::/system.slice/lifeboatd.service\n", "lifeboatd.service"},
        {"0::/user.slice/user-0.slice/session-12.scope\n", "session-12.scope"},
        {"0::/user.slice/user-1000.slice/user@1000.service/app.slice/vm.service\n", "user@1000.service"},
        {"0::/machine.slice/machine-qemu\\x2d1\\x2dweb.scope/libvirt/emulator", "machine-qemu\\x2d1\\x2dweb.scope"},
        {"9:name=systemd:/system.slice/a.service\n8:cpu:/b.service\n0::/c.service\n", "a.service"},
        {"8:cpu:/b.service\n9:name=systemd:/system.slice/a.service\n", "a.service"},
        {"0::/\n", NULL}, {"0::/x.slice/.service/y\n", NULL}, {"0::/init.scope", "init.scope"},
        {"8:cpu:/b.service\n", NULL}, {"", NULL}, {"nonsense", NULL}, {":\n::", NULL},
    };
    (void)s;
    for (size_t i = 0; i < LB_ARRAY_LEN(cases); i++) {
        LB_AUTO_FREE char *unit = lb_host_unit_of(cases[i].cgroup);
        if (cases[i].unit)
            assert_string_equal(unit, cases[i].unit);
        else
            assert_null(unit);
    }
}

#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_scan_by_hand), cmocka_unit_test(test_scan_libvirt),
        cmocka_unit_test(test_scan_proxmox), cmocka_unit_test(test_scan_nonsense),
        T(test_all_good), T(test_emulator), T(test_run_deadline), T(test_resources), T(test_files),
        T(test_other_user), T(test_disk_lock), T(test_copied_disk), T(test_overlay), T(test_sockets), T(test_ports), T(test_taps),
        cmocka_unit_test(test_real_taps),         T(test_others), T(test_maintenance), cmocka_unit_test(test_features), cmocka_unit_test(test_report), cmocka_unit_test(test_unit_of),
    };
    return cmocka_run_group_tests_name("preflight", tests, NULL, NULL);
}
