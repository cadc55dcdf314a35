/* A real VM moved through the whole life of hv.h: launch, copy, stop, save, load,
 * run, and every way back. */
#include "tests/integration/qemu_util.h"

static const char pc_args[] =
    "-machine pc,accel=tcg -m 64 -nodefaults -display none -drive if=none,id=d0,file=@D/disk.raw,"
    "format=raw,cache=none -device virtio-blk-pci,drive=d0,bootindex=1 -vga std";

struct move {
    struct lb_hv_vm *src, *dst;
    struct lb_vm_desc desc;
    char run_dir[96];
};

static void prepare(struct qemu *q, struct move *m)
{
    memset(m, 0, sizeof(*m));
    m->src = qemu_attach(q);
    wait_guest(m->src);
    OK(lb_hv_describe(m->src, &m->desc, err));
    snprintf(m->run_dir, sizeof(m->run_dir), "%s/run", q->dir);
    struct lb_launch_opts opts = {.name = "t", .run_dir = m->run_dir};
    opts.emulator = getenv("LB_TEST_QEMU_DST");
    uint64_t t0 = lb_now_ns();
    OK(lb_hv_launch(&lb_hv_qemu, &m->desc, &opts, &m->dst, err));
    print_message("launch %.1f ms\n", ms_since(t0));
    t0 = lb_now_ns();
    OK(lb_hv_prepare_ram(m->dst, err));
    print_message("prepare_ram %.2f ms\n", ms_since(t0));
    t0 = lb_now_ns();
    OK(lb_hv_log_enable(m->src, err));
    print_message("log_enable %.2f ms\n", ms_since(t0));
    copy_ram(m->src, m->dst, false);
}

/* One migration; the source is left stopped and released. */
static void hand_over(struct move *m)
{
    void *state = NULL;
    size_t len = 0;
    for (int round = 0; round < 3; round++) {
        uint64_t t0 = lb_now_ns();
        OK(lb_hv_stop(m->src, err));
        double stop = ms_since(t0);
        copy_ram(m->src, m->dst, true);
        uint64_t t1 = lb_now_ns();
        OK(lb_hv_cont(m->src, err));
        print_message("round: stop %.2f cont %.2f pause %.2f ms\n", stop, ms_since(t1), ms_since(t0));
        usleep(20000);
    }
    uint64_t t0 = lb_now_ns();
    OK(lb_hv_stop(m->src, err));
    double stop = ms_since(t0);
    uint64_t t1 = lb_now_ns();
    OK(lb_hv_save_begin(m->src, true, err));
    double begin = ms_since(t1);
    t1 = lb_now_ns();
    copy_ram(m->src, m->dst, true);
    double copy = ms_since(t1);
    OK(lb_hv_save_end(m->src, &state, &len, err));
    double save = ms_since(t1);
    /* saving wrote nothing into the guest's memory */
    struct lb_bitmap late;
    const struct lb_ram_block *ram = main_block(m->src);
    OK(lb_bitmap_init(&late, ram->size_bytes / LB_PAGE_SIZE, err));
    OK(lb_hv_log_clean(m->src, ram, &late, err));
    assert_int_equal(lb_bitmap_count(&late), 0);
    lb_bitmap_free(&late);
    uint32_t at = counter(m->src, 0);
    uint64_t t2 = lb_now_ns();
    OK(lb_hv_load_state(m->dst, state, len, err));
    double load = ms_since(t2);
    bool alive, running;
    OK(lb_hv_status(m->dst, &alive, &running, err));
    assert_true(alive);
    assert_false(running);
    assert_int_equal(counter(m->dst, 0), at); /* complete, but paused */
    t2 = lb_now_ns();
    OK(lb_hv_run(m->dst, err));
    print_message("stop %.2f save_begin %.2f scan+copy %.2f save %.2f (%zu bytes) load %.2f run %.2f "
                  "total %.2f ms\n", stop, begin, copy, save, len, load, ms_since(t2), ms_since(t0));
    OK(lb_hv_announce(m->dst, err));
    free(state);
    for (int i = 0; i < 500 && counter(m->dst, BOOT_N_PAGES - 1) <= at + 2; i++)
        usleep(10000);
    assert_true(counter(m->dst, BOOT_N_PAGES - 1) > at + 2);
    /* one counter everywhere: nothing stale came over */
    OK(lb_hv_stop(m->dst, err));
    for (unsigned p = 1; p < BOOT_N_PAGES; p++)
        assert_in_range(counter(m->dst, 0) - counter(m->dst, p), 0, 1);
    OK(lb_hv_cont(m->dst, err));
}

static void end(struct qemu *q, struct move *m)
{
    lb_hv_detach(m->src);
    OK(lb_hv_destroy(m->dst, err));
    lb_vm_desc_free(&m->desc);
    /* nothing is left in its folder */
    assert_int_equal(rmdir(m->run_dir), 0);
    qemu_end(q);
}

static void move_with(const char *args)
{
    struct qemu q;
    struct move m;
    qemu_dir(&q);
    qemu_start(&q, args);
    prepare(&q, &m);
    hand_over(&m);
    /* the source cannot take the disk back while the receiver runs */
    struct lb_error why = LB_ERROR_INIT;
    assert_int_equal(lb_hv_cont(m.src, &why), -1);
    assert_int_equal(why.code, LB_E_HV);
    assert_non_null(strstr(why.message, "lock"));
    end(&q, &m);
}

static void test_move_pc(void **state)
{
    (void)state;
    move_with(pc_args);
}

static void test_move_q35(void **state)
{
    (void)state;
    move_with("-machine q35,accel=tcg -smp 2 -m 128 -display none -nographic -device qemu-xhci "
              "-device virtio-balloon-pci -device virtio-rng-pci -vga std -netdev user,id=n "
              "-device e1000e,netdev=n "
              "-drive if=none,id=d0,file=@D/disk.raw,format=raw,cache=none "
              "-device ahci,id=h -device ide-hd,bus=h.0,drive=d0,bootindex=1");
}

static void test_move_memfd(void **state)
{
    (void)state;
    move_with("-object memory-backend-memfd,id=m,size=64M,share=on "
              "-machine pc,accel=tcg,memory-backend=m -m 64 -nodefaults -display none "
              "-drive if=none,id=d0,file=@D/disk.raw,format=raw,cache=none "
              "-device virtio-blk-pci,drive=d0,bootindex=1");
}

static void test_move_qcow2(void **state)
{
    (void)state;
    struct qemu q;
    struct move m;
    char cmd[400];
    qemu_dir(&q);
    snprintf(cmd, sizeof(cmd), "qemu-img convert -f raw -O qcow2 %s %s/d.qcow2", q.disk, q.dir);
    if (system(cmd) != 0) {
        print_message("qemu-img is missing\n");
        qemu_end(&q);
        skip();
    }
    qemu_start(&q, "-machine pc,accel=tcg -m 64 -nodefaults -display none "
                   "-drive if=none,id=d0,file=@D/d.qcow2,format=qcow2,cache=none "
                   "-device virtio-blk-pci,drive=d0,bootindex=1");
    prepare(&q, &m);
    hand_over(&m);
    struct lb_error why = LB_ERROR_INIT;
    assert_int_equal(lb_hv_cont(m.src, &why), -1);
    assert_non_null(strstr(why.message, "lock"));
    end(&q, &m);
}

/* Everything goes wrong after the disks were released: the source goes on as if nothing
 * had happened, and can be moved after that. */
static void test_back_to_source(void **state)
{
    (void)state;
    struct qemu q;
    struct move m;
    void *buf = NULL;
    size_t len = 0;
    qemu_dir(&q);
    qemu_start(&q, pc_args);
    prepare(&q, &m);
    OK(lb_hv_stop(m.src, err));
    copy_ram(m.src, m.dst, true);
    OK(lb_hv_save_begin(m.src, true, err));
    OK(lb_hv_save_end(m.src, &buf, &len, err));
    OK(lb_hv_load_state(m.dst, buf, len, err));
    free(buf);
    OK(lb_hv_destroy(m.dst, err));
    OK(lb_hv_cont(m.src, err)); /* takes the disks again */
    wait_guest(m.src);
    struct lb_launch_opts opts = {.name = "t", .run_dir = m.run_dir};
    opts.emulator = getenv("LB_TEST_QEMU_DST");
    OK(lb_hv_launch(&lb_hv_qemu, &m.desc, &opts, &m.dst, err));
    OK(lb_hv_prepare_ram(m.dst, err));
    copy_ram(m.src, m.dst, false);
    hand_over(&m);
    end(&q, &m);
}

/* The receiver is an ordinary VM afterwards: found by its command line, moved on. */
static void test_move_on(void **state)
{
    (void)state;
    struct qemu q;
    struct move m, next;
    char dir[112];
    qemu_dir(&q);
    qemu_start(&q, pc_args);
    prepare(&q, &m);
    hand_over(&m);
    struct lb_vm_ident id;
    lb_hv_ident(m.dst, &id);
    struct lb_vm_ident again = {.name = "t", .proc = id.proc};
    lb_hv_detach(m.dst);
    OK(lb_hv_destroy(m.src, err));
    waitpid(q.pid, NULL, 0);
    q.pid = 0;

    memset(&next, 0, sizeof(next));
    OK(lb_hv_attach(&lb_hv_qemu, &again, &next.src, err));
    OK(lb_hv_describe(next.src, &next.desc, err));
    unsigned n_mem = 0, n_machine = 0, n_ours = 0;
    for (char **a = next.desc.argv; *a; a++) {
        n_mem += strstr(*a, "memory-backend-memfd") != NULL;
        n_machine += strcmp(*a, "-machine") == 0;
        n_ours += strstr(*a, "lb-qmp") != NULL || strcmp(*a, "-incoming") == 0;
    }
    assert_int_equal(n_mem, 1);
    assert_int_equal(n_machine, 1);
    assert_int_equal(n_ours, 0);
    assert_null(next.desc.blockers[0]);
    snprintf(dir, sizeof(dir), "%s/run2", q.dir);
    struct lb_launch_opts opts = {.name = "t", .run_dir = dir};
    opts.emulator = getenv("LB_TEST_QEMU_DST");
    OK(lb_hv_launch(&lb_hv_qemu, &next.desc, &opts, &next.dst, err));
    OK(lb_hv_prepare_ram(next.dst, err));
    OK(lb_hv_log_enable(next.src, err));
    copy_ram(next.src, next.dst, false);
    hand_over(&next);
    OK(lb_hv_destroy(next.src, err));
    OK(lb_hv_destroy(next.dst, err));
    lb_vm_desc_free(&next.desc);
    lb_vm_desc_free(&m.desc);
    qemu_end(&q);
}

/* Runs as the source's user, with its sandbox. */
static void test_move_unprivileged(void **state)
{
    (void)state;
    if (getenv("LB_TEST_QEMU") || getenv("LB_TEST_QEMU_DST")) {
        print_message("another QEMU is given, which may be a wrapper that needs root\n");
        skip();
    }
    struct qemu q;
    struct move m;
    qemu_dir(&q);
    assert_int_equal(chown(q.dir, 65534, 65534), 0);
    qemu_start_as(&q, 65534,
                  "-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny "
                  "-machine pc,accel=tcg -m 64 -nodefaults -display none "
                  "-drive if=none,id=d0,file=@D/disk.raw,format=raw,cache=none "
                  "-device virtio-blk-pci,drive=d0,bootindex=1");
    prepare(&q, &m);
    struct lb_vm_ident id;
    char path[64];
    struct stat st;
    lb_hv_ident(m.dst, &id);
    snprintf(path, sizeof(path), "/proc/%d/task", (int)id.proc.pid);
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(st.st_uid, 65534);
    hand_over(&m);
    end(&q, &m);
}

/* A receiver that cannot start, and one fed with nonsense: an error that says what QEMU
 * said, and nothing left behind. */
static void test_bad_receivers(void **state)
{
    (void)state;
    struct qemu q;
    struct lb_vm_desc desc;
    struct lb_error why = LB_ERROR_INIT;
    struct lb_hv_vm *dst = NULL;
    char run_dir[96];
    qemu_dir(&q);
    qemu_start(&q, pc_args);
    struct lb_hv_vm *src = qemu_attach(&q);
    wait_guest(src);
    OK(lb_hv_describe(src, &desc, err));
    snprintf(run_dir, sizeof(run_dir), "%s/run", q.dir);
    struct lb_path_map map = {q.dir, (char *)"/nonexistent"};
    struct lb_launch_opts opts = {.name = "t", .run_dir = run_dir, .paths = &map, .n_paths = 1};
    opts.emulator = getenv("LB_TEST_QEMU_DST");
    assert_int_equal(lb_hv_launch(&lb_hv_qemu, &desc, &opts, &dst, &why), -1);
    print_message("missing disk: %s\n", why.message);
    assert_int_equal(why.code, LB_E_HV);
    assert_non_null(strstr(why.message, "/nonexistent/disk.raw"));
    assert_true(why.remedy[0]);
    assert_int_equal(rmdir(run_dir), 0);

    opts = (struct lb_launch_opts){.name = "t", .run_dir = run_dir, .emulator = "/no/qemu"};
    assert_int_equal(lb_hv_launch(&lb_hv_qemu, &desc, &opts, &dst, &why), -1);
    assert_int_equal(why.code, LB_E_NOT_FOUND);
    assert_int_equal(rmdir(run_dir), 0);

    opts.emulator = "/bin/true"; /* ends at once */
    assert_int_equal(lb_hv_launch(&lb_hv_qemu, &desc, &opts, &dst, &why), -1);
    assert_int_equal(why.code, LB_E_HV);
    assert_int_equal(rmdir(run_dir), 0);

    opts.emulator = getenv("LB_TEST_QEMU_DST");
    void *buf = NULL;
    size_t len = 0;
    OK(lb_hv_stop(src, err));
    OK(lb_hv_save_begin(src, false, err));
    OK(lb_hv_save_end(src, &buf, &len, err));
    OK(lb_hv_launch(&lb_hv_qemu, &desc, &opts, &dst, err));
    assert_int_equal(lb_hv_load_state(dst, "nonsense and more", 17, &why), -1);
    assert_int_equal(why.code, LB_E_PROTO);
    memset((char *)buf + len / 3, 0x5a, len / 3);
    assert_int_equal(lb_hv_load_state(dst, buf, len, &why), -1);
    print_message("damaged state: %s\n", why.message);
    assert_int_equal(why.code, LB_E_HV);
    OK(lb_hv_destroy(dst, err));
    OK(lb_hv_cont(src, err));
    wait_guest(src);
    free(buf);
    lb_vm_desc_free(&desc);
    lb_hv_detach(src);
    qemu_end(&q);
}

/* What describe says, and that it names what cannot travel. */
static void test_describe(void **state)
{
    (void)state;
    struct qemu q;
    struct lb_vm_desc d;
    qemu_dir(&q);
    qemu_start(&q, "-machine pc,accel=tcg -m 64 -smp 2 -nodefaults -display none -snapshot "
                   "-uuid 11111111-2222-3333-4444-555555555555 -device ivshmem-plain,id=iv,memdev=sh "
                   "-object memory-backend-ram,id=sh,size=1M,share=on "
                   "-drive if=ide,id=d0,file=@D/disk.raw,format=raw,cache=none");
    struct lb_hv_vm *vm = qemu_attach(&q);
    OK(lb_hv_describe(vm, &d, err));
    assert_string_equal(d.hypervisor, "qemu");
    assert_int_equal(strncmp(d.machine, "pc-i440fx-", 10), 0);
    assert_string_equal(d.accel, "tcg");
    assert_int_equal(d.vcpus, 2);
    assert_int_equal(d.ram_bytes, 64u << 20);
    assert_string_equal(d.uuid, "11111111-2222-3333-4444-555555555555");
    assert_true(d.n_disks >= 1);
    assert_non_null(d.features[0]);
    assert_int_equal(strncmp(d.features[0], "CPUID.", 6), 0);
    bool snapshot = false, ivshmem = false;
    for (char **b = d.blockers; *b; b++) {
        print_message("blocker: %s\n", *b);
        snapshot |= strncmp(*b, "-snapshot:", 10) == 0;
        ivshmem |= strstr(*b, "ivshmem") != NULL;
    }
    assert_true(snapshot && ivshmem);
    lb_vm_desc_free(&d);
    lb_hv_detach(vm);
    qemu_end(&q);
}

static const char *after(char **argv, const char *option)
{
    for (; *argv; argv++)
        if (strcmp(*argv, option) == 0)
            return argv[1];
    return "";
}

static void test_command_line(void **state)
{
    (void)state;
    char *in[] = {(char *)"qemu", (char *)"-M", (char *)"q35,accel=kvm", (char *)"-m", (char *)"2G",
                  (char *)"-daemonize", (char *)"-pidfile", (char *)"/run/x.pid",
                  (char *)"-serial", (char *)"mon:stdio", (char *)"-monitor", (char *)"stdio",
                  (char *)"-drive", (char *)"file=/srv/a,,b/d.img,if=virtio",
                  (char *)"-netdev", (char *)"tap,id=n,ifname=tap1,script=no",
                  (char *)"-object", (char *)"memory-backend-file,id=h,size=1G,mem-path=/dev/shm/x",
                  (char *)"-blockdev", (char *)"{\"driver\":\"file\",\"filename\":\"/srv/z\"}",
                  (char *)"-incoming", (char *)"tcp::1", (char *)"-S", (char *)"-D",
                  (char *)"/srv/log", NULL};
    struct lb_vm_desc d = {.argv = in, .machine = (char *)"pc-q35-7.2", .emulator = (char *)"/q"};
    struct lb_path_map paths[] = {{(char *)"/srv", (char *)"/mnt"}, {(char *)"/srv/a,,b", (char *)"/ab"}};
    struct lb_path_map taps[] = {{(char *)"tap1", (char *)"tapB"}};
    struct lb_launch_opts o = {.name = "t", .run_dir = "/r", .paths = paths, .n_paths = 2,
                               .taps = taps, .n_taps = 1};
    char **out = NULL;
    OK(lb_qemu_receiver_argv(&d, &o, &out, err));
    assert_string_equal(out[0], "/q");
    assert_string_equal(after(out, "-machine"), "pc-q35-7.2,accel=kvm,memory-backend=pc.ram");
    assert_string_equal(after(out, "-serial"), "file:/r/serial0.log");
    assert_string_equal(after(out, "-drive"), "file=/ab/d.img,if=virtio");
    assert_string_equal(after(out, "-netdev"), "tap,id=n,ifname=tapB,script=no");
    assert_string_equal(after(out, "-object"), "memory-backend-memfd,id=h,size=1G,share=on");
    assert_non_null(strstr(after(out, "-blockdev"), "/mnt/z"));
    assert_string_equal(after(out, "-D"), "/mnt/log");
    assert_string_equal(after(out, "-incoming"), "defer");
    assert_string_equal(after(out, "-monitor"), "");
    assert_string_equal(after(out, "-pidfile"), "");
    unsigned s = 0;
    for (char **a = out; *a; a++) {
        s += strcmp(*a, "-S") == 0;
        assert_int_not_equal(strcmp(*a, "-daemonize"), 0);
    }
    assert_int_equal(s, 1);
    lb_strv_free(out);
    taps[0].to = (char *)""; /* connected to nothing: still a tap */
    OK(lb_qemu_receiver_argv(&d, &o, &out, err));
    assert_string_equal(after(out, "-netdev"), "tap,id=n,script=no,downscript=no");
    lb_strv_free(out);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_command_line),
        cmocka_unit_test(test_move_pc),
        cmocka_unit_test(test_move_q35),
        cmocka_unit_test(test_move_memfd),
        cmocka_unit_test(test_move_qcow2),
        cmocka_unit_test(test_back_to_source),
        cmocka_unit_test(test_move_on),
        cmocka_unit_test(test_move_unprivileged),
        cmocka_unit_test(test_bad_receivers),
        cmocka_unit_test(test_describe),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
