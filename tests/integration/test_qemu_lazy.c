/* Memory that comes when it is touched, and memory that clones share: a real QEMU and a guest that checks every
 * page of its own memory (tests/guest) and says so once a second on its serial port. */
#include "tests/integration/qemu_util.h"

#include <pthread.h>
#include <sys/mman.h>

#define CHUNK_PAGES 32u
#define GUEST_S 90

/* ------------------------------------------------------------------- guest */

struct said {
    unsigned long long nonce, written, verified, bad, passes, mono_ms;
    bool ready;
};

static const char *guest_file(const char *name, char path[300])
{
    snprintf(path, 300, "%s/%s", guest_dir(), name);
    return path;
}

static unsigned long long number(const char *line, const char *key)
{
    const char *at = strstr(line, key);
    return at ? strtoull(at + strlen(key), NULL, 10) : 0;
}

/* The last whole line of the guest in the file behind its serial port. */
static bool last_said(const char *log, struct said *out)
{
    LB_AUTO_FREE char *text = NULL;
    if (lb_file_read(log, 8 << 20, &text, NULL, NULL) < 0)
        return false;
    char *line = NULL;
    for (char *p = text; (p = strstr(p, "LB {")) && strchr(p, '\n'); p++)
        line = p;
    if (!line)
        return false;
    *strchr(line, '\n') = 0;
    if (number(line, "\"bad_pages\":") != 0)
        print_message("guest: %s\n", line);
    *out = (struct said){
        .nonce = strtoull(strchr(strstr(line, "\"nonce\":"), ':') + 2, NULL, 16),
        .written = number(line, "\"pages_written\":"),
        .verified = number(line, "\"pages_verified\":"),
        .bad = number(line, "\"bad_pages\":"),
        .passes = number(line, "\"verify_passes\":"),
        .ready = strstr(line, "\"ready\":true") != NULL,
    };
    return true;
}

/* Wait until it has verified all its pages `passes` times more, and none was bad. */
static struct said wait_passes(const char *log, unsigned passes)
{
    struct said first = {0}, now = {0};
    bool have = false;
    for (int i = 0; i < GUEST_S * 20; i++, usleep(50000)) {
        if (!last_said(log, &now) || !now.ready)
            continue;
        if (!have)
            first = now;
        have = true;
        assert_int_equal(now.bad, 0);
        if (now.passes >= first.passes + passes)
            return now;
    }
    fail_msg("the guest did not verify its memory: %s", log);
    return now;
}

/* A file of the guest, where a QEMU of that user can read it: this tree may be in somebody's home. */
static const char *file_for(struct qemu *q, uid_t uid, const char *name, char path[300])
{
    guest_file(name, path);
    if (!uid)
        return path;
    LB_AUTO_FREE char *copy = lb_asprintf("cp %s %s/", path, q->dir);
    assert_int_equal(system(copy), 0);
    snprintf(path, 300, "%s/%s", q->dir, name);
    return path;
}

static void guest_start(struct qemu *q, const char *machine, unsigned mb_per_s, uid_t uid)
{
    char args[2000], kernel[300], initrd[300];
    qemu_dir(q);
    assert_int_equal(chown(q->dir, uid, uid), 0);
    snprintf(args, sizeof(args),
             "%s -nodefaults -display none -vga std -chardev file,id=s,path=@D/src.log -serial chardev:s "
             "-kernel %s -initrd %s -append console=ttyS0\tquiet\tlb.dirty=%u:48",
             machine, file_for(q, uid, "vmlinuz", kernel), file_for(q, uid, "initrd.img", initrd), mb_per_s);
    qemu_start_as(q, uid, args);
}

/* ------------------------------------------------- a checkpoint in our memory */

struct saved_block {
    struct lb_ram_block pub;
    struct lb_bitmap pages; /* that are not zero */
    char *data;             /* the whole block */
};
struct saved {
    struct lb_vm_desc desc;
    struct saved_block *blocks;
    unsigned n_blocks;
    void *state;
    size_t state_len;
    struct said said;
};

static void save_block(struct lb_hv_vm *vm, const struct lb_ram_block *b, struct saved_block *out)
{
    static const char zeros[LB_PAGE_SIZE];
    out->pub = *b;
    OK(lb_bitmap_init(&out->pages, b->size_bytes / LB_PAGE_SIZE, err));
    out->data = mmap(NULL, b->size_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_ptr_not_equal(out->data, MAP_FAILED);
    if (!b->hva)
        return;
    OK(lb_hv_populated(vm, b, &out->pages, err));
    uint64_t first, n;
    for (uint64_t from = 0; lb_bitmap_next_run(&out->pages, from, CHUNK_PAGES, &first, &n); from = first + n)
        OK(lb_hv_read(vm, b, first, n, out->data + first * LB_PAGE_SIZE, err));
    for (uint64_t i = 0; i < out->pages.n_bits; i++)
        if (lb_bitmap_test(&out->pages, i) && memcmp(out->data + i * LB_PAGE_SIZE, zeros, LB_PAGE_SIZE) == 0)
            lb_bitmap_clear(&out->pages, i);
}

/* Everything of a VM, which stays stopped. */
static void save_vm(struct lb_hv_vm *vm, struct saved *s)
{
    const struct lb_ram_block *b;
    memset(s, 0, sizeof(*s));
    OK(lb_hv_describe(vm, &s->desc, err));
    OK(lb_hv_stop(vm, err));
    OK(lb_hv_save_begin(vm, false, err));
    OK(lb_hv_save_end(vm, &s->state, &s->state_len, err));
    OK(lb_hv_blocks(vm, &b, &s->n_blocks, err));
    s->blocks = calloc(s->n_blocks, sizeof(*s->blocks));
    for (unsigned i = 0; i < s->n_blocks; i++)
        save_block(vm, &b[i], &s->blocks[i]);
}

static void saved_free(struct saved *s)
{
    for (unsigned i = 0; i < s->n_blocks; i++) {
        munmap(s->blocks[i].data, s->blocks[i].pub.size_bytes);
        lb_bitmap_free(&s->blocks[i].pages);
    }
    free(s->blocks);
    free(s->state);
    lb_vm_desc_free(&s->desc);
}

/* A guest that has run a while, saved and gone. */
static void make_saved(struct qemu *q, const char *machine, unsigned mb_per_s, uid_t uid, struct saved *s)
{
    char log[128];
    guest_start(q, machine, mb_per_s, uid);
    snprintf(log, sizeof(log), "%s/src.log", q->dir);
    struct lb_hv_vm *vm = qemu_attach(q);
    struct said said = wait_passes(log, 1);
    save_vm(vm, s);
    s->said = said;
    lb_hv_detach(vm);
    kill(q->pid, SIGKILL);
    waitpid(q->pid, NULL, 0);
    q->pid = 0;
}

static const struct saved_block *saved_block(const struct saved *s, const char *name)
{
    for (unsigned i = 0; i < s->n_blocks; i++)
        if (strcmp(s->blocks[i].pub.name, name) == 0)
            return &s->blocks[i];
    fail_msg("no block %s was saved", name);
    return NULL;
}

/* ---------------------------------------------------------------- receiver */

/* What a failed test leaves running. */
static struct lb_proc_id started[8];
static unsigned n_started;

static int end_all(void **state)
{
    (void)state;
    while (n_started > 0)
        lb_proc_kill(&started[--n_started], 10000, NULL);
    unsetenv("LB_TEST_QEMU");
    return 0;
}

struct receiver {
    struct lb_hv_vm *vm;
    char run_dir[96], log[96];
};

static void receiver_start(struct qemu *q, const struct saved *s, const char *name, int shared_fd,
                           const char *emulator, struct receiver *r)
{
    char from[96];
    snprintf(from, sizeof(from), "%s/src.log", q->dir);
    snprintf(r->log, sizeof(r->log), "%s/%s.log", q->dir, name);
    snprintf(r->run_dir, sizeof(r->run_dir), "%s/%s", q->dir, name);
    struct lb_path_map log = {from, r->log};
    struct lb_launch_opts o = {.name = name, .run_dir = r->run_dir, .paths = &log, .n_paths = 1,
                               .emulator = emulator ? emulator : getenv("LB_TEST_QEMU_DST"),
                               .shared_memory_fd = shared_fd};
    uint64_t t0 = lb_now_ns();
    OK(lb_hv_launch(&lb_hv_qemu, &s->desc, &o, &r->vm, err));
    print_message("launch %.1f ms\n", ms_since(t0));
    struct lb_vm_ident id;
    lb_hv_ident(r->vm, &id);
    assert_true(n_started < LB_ARRAY_LEN(started));
    started[n_started++] = id.proc;
}

/* What is not lazy. */
static void place_devices(const struct saved *s, struct lb_hv_vm *vm, bool main_too)
{
    const struct lb_ram_block *b;
    unsigned n;
    OK(lb_hv_blocks(vm, &b, &n, err));
    for (unsigned i = 0; i < n; i++) {
        const struct saved_block *from = saved_block(s, b[i].name);
        assert_int_equal(from->pub.size_bytes, b[i].size_bytes);
        if (!b[i].hva || b[i].kind == LB_RAM_ROM || (b[i].kind == LB_RAM_MAIN && !main_too))
            continue;
        if (b[i].kind == LB_RAM_DEVICE)
            OK(lb_hv_write(vm, &b[i], 0, from->pages.n_bits, from->data, err));
        uint64_t at = 0, first, count;
        for (; b[i].kind == LB_RAM_MAIN && lb_bitmap_next_run(&from->pages, at, CHUNK_PAGES, &first, &count);
             at = first + count)
            OK(lb_hv_write(vm, &b[i], first, count, from->data + first * LB_PAGE_SIZE, err));
    }
}

/* --------------------------------------------------------------- a server */

struct server {
    struct lb_hv_vm *vm;
    const struct saved *s;
    pthread_t thread;
    _Atomic bool stop;
    _Atomic uint64_t faults;
    unsigned delay_us; /* at most, before each page */
};

static void place(struct server *v, const struct lb_ram_block *b, uint64_t first, uint64_t n)
{
    const struct saved_block *from = saved_block(v->s, b->name);
    uint64_t placed = UINT64_MAX;
    OK(lb_hv_lazy_place(v->vm, b, first, n, from->data + first * LB_PAGE_SIZE, &placed, err));
    assert_true(placed <= n);
}

static void *serve(void *arg)
{
    struct server *v = arg;
    unsigned seed = 1;
    while (!v->stop) {
        const struct lb_ram_block *b;
        uint64_t page;
        int got = lb_hv_lazy_fault(v->vm, 20, &b, &page, NULL);
        assert_true(got >= 0);
        if (got == 0)
            continue;
        assert_true(page < b->size_bytes / LB_PAGE_SIZE);
        if (v->delay_us)
            usleep((unsigned)rand_r(&seed) % v->delay_us);
        place(v, b, page, 1);
        v->faults++;
    }
    return NULL;
}

static void server_start(struct server *v, struct lb_hv_vm *vm, const struct saved *s, unsigned delay_us)
{
    *v = (struct server){.vm = vm, .s = s, .delay_us = delay_us};
    assert_int_equal(pthread_create(&v->thread, NULL, serve, v), 0);
}

static void server_stop(struct server *v)
{
    v->stop = true;
    pthread_join(v->thread, NULL);
}

/* The rest, in runs of all lengths in an order without any order; only pages that are not zero when populated. */
static void fill(struct server *v, bool populated_only, double until)
{
    const struct lb_ram_block *b = main_block(v->vm);
    const struct saved_block *from = saved_block(v->s, b->name);
    uint64_t n = from->pages.n_bits, step = 7919;
    while (n % step == 0)
        step += 2;
    for (uint64_t i = 0, at = 0; i < (uint64_t)((double)n * until); i++, at = (at + step) % n) {
        uint64_t len = LB_MIN(1 + at % 5, n - at);
        if (!populated_only || lb_bitmap_test(&from->pages, at))
            place(v, b, at, populated_only ? 1 : len);
        if (i % 4096 == 0)
            usleep(2000);
    }
}

typedef int ask_fn(struct lb_hv_vm *vm, const struct lb_ram_block *blk, struct lb_bitmap *pages, struct lb_error *err);

static uint64_t count_of(struct lb_hv_vm *vm, ask_fn *ask)
{
    struct lb_bitmap m;
    const struct lb_ram_block *b = main_block(vm);
    OK(lb_bitmap_init(&m, b->size_bytes / LB_PAGE_SIZE, err));
    OK(ask(vm, b, &m, err));
    uint64_t n = lb_bitmap_count(&m);
    lb_bitmap_free(&m);
    return n;
}

static uint64_t n_missing(struct lb_hv_vm *vm)
{
    return count_of(vm, lb_hv_lazy_missing);
}

/* Logged, copied, stopped as any other VM. */
static void check_ordinary(struct lb_hv_vm *vm)
{
    const struct lb_ram_block *b = main_block(vm);
    uint64_t n = b->size_bytes / LB_PAGE_SIZE;
    struct lb_bitmap dirty, pages;
    static char buf[LB_PAGE_SIZE];
    OK(lb_bitmap_init(&dirty, n, err));
    OK(lb_bitmap_init(&pages, n, err));
    OK(lb_hv_log_enable(vm, err));
    usleep(500000); /* it writes at least 1 MB/s */
    OK(lb_hv_stop(vm, err));
    OK(lb_hv_log_clean(vm, b, &dirty, err));
    uint64_t wrote = lb_bitmap_count(&dirty);
    assert_in_range(wrote, 30, n / 2);
    lb_bitmap_clear_all(&dirty);
    OK(lb_hv_log_clean(vm, b, &dirty, err));
    assert_int_equal(lb_bitmap_count(&dirty), 0);
    OK(lb_hv_populated(vm, b, &pages, err));
    assert_in_range(lb_bitmap_count(&pages), wrote, n);
    for (uint64_t i = 0; i < n; i++)
        if (!lb_bitmap_test(&pages, i)) {
            OK(lb_hv_read(vm, b, i, 1, buf, err));
            assert_true(buf[0] == 0 && memcmp(buf, buf + 1, LB_PAGE_SIZE - 1) == 0);
        }
    OK(lb_hv_cont(vm, err));
    OK(lb_hv_log_disable(vm, err));
    lb_bitmap_free(&dirty);
    lb_bitmap_free(&pages);
}

static int open_uffds(pid_t pid)
{
    char path[64], link[64];
    int n = 0;
    for (int fd = 0; fd < 1024; fd++) {
        snprintf(path, sizeof(path), "/proc/%d/fd/%d", (int)pid, fd);
        ssize_t len = readlink(path, link, sizeof(link) - 1);
        if (len > 0 && (link[len] = 0, strstr(link, "userfaultfd")))
            n++;
    }
    return n;
}

static void check_said(const struct receiver *r, const struct saved *s)
{
    struct said now = wait_passes(r->log, 2);
    assert_true(s->said.nonce != 0 && now.nonce == s->said.nonce); /* lived on, was not booted */
    assert_true(now.written > s->said.written);
}

static void receiver_end(struct receiver *r)
{
    char record[128];
    snprintf(record, sizeof(record), "%s/lazy", r->run_dir);
    assert_int_equal(access(record, F_OK), -1);
    OK(lb_hv_destroy(r->vm, err));
    assert_int_equal(rmdir(r->run_dir), 0);
}

/* ------------------------------------------------------------------- tests */

#define MACHINE "-machine pc,accel=tcg -m 256"

/* An emulator that exchanges the receiver's backend for anonymous memory. */
static const char *anonymous_qemu(const struct qemu *q, char path[128])
{
    snprintf(path, 128, "%s/qemu", q->dir);
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fprintf(f, "#!/bin/bash\nargs=()\nfor a; do a=${a/memory-backend-memfd/memory-backend-ram}; "
               "args+=(\"${a/,share=on/}\"); done\nexec %s \"${args[@]}\"\n", qemu_bin());
    fclose(f);
    chmod(path, 0755);
    return path;
}

static void resume_lazily(bool anonymous)
{
    struct qemu q;
    struct saved s;
    struct receiver r;
    struct server v;
    char script[128];
    make_saved(&q, MACHINE, 4, 0, &s);
    receiver_start(&q, &s, "lazy", 0, anonymous ? anonymous_qemu(&q, script) : NULL, &r);
    assert_int_equal(main_block(r.vm)->backing, anonymous ? LB_BACK_ANON : LB_BACK_SHARED);
    struct lb_vm_ident id;
    lb_hv_ident(r.vm, &id);

    uint64_t t0 = lb_now_ns(), n = main_block(r.vm)->size_bytes / LB_PAGE_SIZE;
    OK(lb_hv_lazy_begin(r.vm, err));
    print_message("lazy_begin %.2f ms\n", ms_since(t0));
    assert_null(main_block(r.vm)->map);
    assert_int_equal(n_missing(r.vm), n);
    place_devices(&s, r.vm, false);
    server_start(&v, r.vm, &s, 2000);
    t0 = lb_now_ns();
    OK(lb_hv_load_state(r.vm, s.state, s.state_len, err));
    double load = ms_since(t0);
    OK(lb_hv_run(r.vm, err));
    print_message("load %.2f run %.2f ms, %llu faults by then\n", load, ms_since(t0) - load,
                  (unsigned long long)v.faults);
    for (int i = 0; i < 1000 && v.faults < 200; i++)
        usleep(20000);
    uint64_t early = v.faults;
    assert_in_range(early, 200, n - 1);
    assert_in_range(n_missing(r.vm), 1, n - early);
    v.delay_us = 0;
    fill(&v, true, 1);
    print_message("%llu faults in all, %llu pages missing (zeros)\n", (unsigned long long)v.faults,
                  (unsigned long long)n_missing(r.vm));
    server_stop(&v);
    t0 = lb_now_ns();
    OK(lb_hv_lazy_end(r.vm, err));
    print_message("lazy_end %.2f ms\n", ms_since(t0));
    assert_int_equal(open_uffds(id.proc.pid), 0);
    if (!anonymous)
        assert_non_null(main_block(r.vm)->map);
    check_said(&r, &s);
    check_ordinary(r.vm);
    check_said(&r, &s);
    receiver_end(&r);
    saved_free(&s);
    qemu_end(&q);
}

static void test_lazy_memfd(void **state)
{
    (void)state;
    resume_lazily(false);
}

static void test_lazy_anonymous(void **state)
{
    (void)state;
    resume_lazily(true);
}

/* Debian 13's, when it was built; the tests that follow start it. */
static void use_qemu10(void)
{
    char path[300];
    guest_file("../trixie/qemu-system-x86_64", path);
    if (access(path, X_OK) != 0) {
        print_message("%s is not built\n", path);
        skip();
    }
    setenv("LB_TEST_QEMU", path, 1);
}

static void test_lazy_qemu10(void **state)
{
    (void)state;
    use_qemu10();
    resume_lazily(false);
}

static uint64_t n_touched(struct lb_hv_vm *vm)
{
    return count_of(vm, lb_hv_lazy_touched);
}

/* Nobody waits for what was offered, and only what the guest went to counts as touched. */
static void test_offered(void **state)
{
    (void)state;
    struct qemu q;
    struct saved s;
    struct receiver r;
    struct server v;
    make_saved(&q, MACHINE, 4, 0, &s);
    receiver_start(&q, &s, "offered", 0, NULL, &r);
    OK(lb_hv_lazy_begin(r.vm, err));
    const struct lb_ram_block *b = main_block(r.vm);
    const struct saved_block *from = saved_block(&s, b->name);
    uint64_t n = from->pages.n_bits, first, count, before, used;
    for (uint64_t at = 0; lb_bitmap_next_run(&from->pages, at, CHUNK_PAGES, &first, &count); at = first + count)
        for (int twice = 0; twice < 2; twice++)
            OK(lb_hv_lazy_offer(r.vm, b, first, count, from->data + first * LB_PAGE_SIZE, err));
    assert_int_equal(n_missing(r.vm), n - lb_bitmap_count(&from->pages));
    before = n_touched(r.vm);
    assert_in_range(before, 0, 16); /* what QEMU itself looked at since it was emptied */
    OK(lb_hv_lazy_place(r.vm, b, 0, 1, from->data, NULL, err)); /* there already: wakes, changes nothing */
    place_devices(&s, r.vm, false);
    server_start(&v, r.vm, &s, 0);
    OK(lb_hv_load_state(r.vm, s.state, s.state_len, err));
    OK(lb_hv_run(r.vm, err));
    usleep(50000);
    used = n_touched(r.vm);
    print_message("%llu pages offered, %llu touched in the first 50 ms, %llu faults\n",
                  (unsigned long long)lb_bitmap_count(&from->pages), (unsigned long long)used,
                  (unsigned long long)v.faults);
    assert_in_range(used, 50, lb_bitmap_count(&from->pages) / 2);
    check_said(&r, &s);
    server_stop(&v);
    assert_in_range(n_touched(r.vm), used + 1, n);
    OK(lb_hv_lazy_end(r.vm, err));
    check_ordinary(r.vm);
    receiver_end(&r);
    saved_free(&s);
    qemu_end(&q);
}

/* What another process does until it is killed: half of the work. */
static void first_half(struct qemu *q, const struct saved *s, int to)
{
    struct receiver r;
    struct server v;
    receiver_start(q, s, "lazy", 0, NULL, &r);
    OK(lb_hv_lazy_begin(r.vm, err));
    place_devices(s, r.vm, false);
    server_start(&v, r.vm, s, 200);
    OK(lb_hv_load_state(r.vm, s->state, s->state_len, err));
    OK(lb_hv_run(r.vm, err));
    struct lb_vm_ident id;
    lb_hv_ident(r.vm, &id);
    assert_int_equal(write(to, &id.proc, sizeof(id.proc)), sizeof(id.proc));
    fill(&v, false, 0.02);
    pause(); /* faults go on being served */
}

/* The process that fills dies: the guest waits, reads nothing wrong, and goes on with the next one. */
static void test_server_dies(void **state)
{
    (void)state;
    struct qemu q;
    struct saved s;
    struct server v;
    struct receiver r;
    struct lb_proc_id proc;
    int p[2];
    make_saved(&q, MACHINE, 4, 0, &s);
    assert_int_equal(pipe2(p, O_CLOEXEC), 0);
    fflush(NULL);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        first_half(&q, &s, p[1]);
        _exit(1);
    }
    close(p[1]);
    assert_int_equal(read(p[0], &proc, sizeof(proc)), sizeof(proc));
    started[n_started++] = proc;
    close(p[0]);
    usleep(300000);
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);

    struct said a = {0}, b = {0};
    snprintf(r.log, sizeof(r.log), "%s/lazy.log", q.dir);
    for (int i = 0; i < 20 && (i == 0 || a.verified != b.verified); i++) {
        a = b;
        usleep(2500000); /* it speaks once a second */
        last_said(r.log, &b);
    }
    assert_int_equal(a.verified, b.verified); /* it waits */
    assert_int_equal(open_uffds(proc.pid), 1);

    char qmp[128];
    snprintf(qmp, sizeof(qmp), "%s/lazy/qmp.sock", q.dir);
    struct lb_vm_ident id = {.name = "lazy", .proc = proc, .qmp_path = qmp};
    uint64_t t0 = lb_now_ns();
    OK(lb_hv_lazy_attach(&lb_hv_qemu, &id, &r.vm, err));
    print_message("lazy_attach %.2f ms, %llu pages missing\n", ms_since(t0),
                  (unsigned long long)n_missing(r.vm));
    assert_null(main_block(r.vm)->map);
    assert_true(n_missing(r.vm) > 0);
    server_start(&v, r.vm, &s, 100);
    OK(lb_hv_run(r.vm, err)); /* said again: it was running */
    fill(&v, false, 1);
    assert_int_equal(n_missing(r.vm), 0);
    server_stop(&v);
    OK(lb_hv_lazy_end(r.vm, err));
    OK(lb_hv_lazy_end(r.vm, err));
    assert_int_equal(open_uffds(proc.pid), 0);
    check_said(&r, &s);
    check_ordinary(r.vm);

    struct lb_error why = LB_ERROR_INIT;
    struct lb_hv_vm *none = NULL;
    lb_hv_detach(r.vm);
    assert_int_equal(lb_hv_lazy_attach(&lb_hv_qemu, &id, &none, &why), -1);
    assert_int_equal(why.code, LB_E_NOT_FOUND);
    OK(lb_hv_end(&lb_hv_qemu, &id, err));
    saved_free(&s);
    qemu_end(&q);
}

/* ------------------------------------------------------------------ clones */

static const struct saved_block *saved_main(const struct saved *s)
{
    for (unsigned i = 0; i < s->n_blocks; i++)
        if (s->blocks[i].pub.kind == LB_RAM_MAIN)
            return &s->blocks[i];
    fail_msg("no main memory");
    return NULL;
}

/* Main memory of s in a sealed memfd. */
static int shared_memory(const struct saved *s)
{
    const struct saved_block *from = saved_main(s);
    int fd = memfd_create("lifeboat-clones", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    uint64_t at = 0, first, n;
    assert_true(fd >= 0);
    assert_int_equal(ftruncate(fd, (off_t)from->pub.size_bytes), 0);
    for (; lb_bitmap_next_run(&from->pages, at, CHUNK_PAGES, &first, &n); at = first + n)
        assert_int_equal(pwrite(fd, from->data + first * LB_PAGE_SIZE, n * LB_PAGE_SIZE,
                                (off_t)(first * LB_PAGE_SIZE)), n * LB_PAGE_SIZE);
    assert_int_equal(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE), 0);
    return fd;
}

/* kB of a mapping, by the field of smaps. */
static uint64_t smaps_kb(pid_t pid, uint64_t addr, const char *field)
{
    char path[64], line[512], want[32];
    uint64_t start, kb = 0;
    bool here = false;
    snprintf(path, sizeof(path), "/proc/%d/smaps", (int)pid);
    snprintf(want, sizeof(want), "%s: ", field);
    FILE *f = fopen(path, "re");
    assert_non_null(f);
    while (fgets(line, sizeof(line), f)) {
        char *end;
        start = strtoull(line, &end, 16);
        if (*end == '-')
            here = start == addr;
        else if (here && strncmp(line, want, strlen(want)) == 0)
            kb = strtoull(line + strlen(want), NULL, 10);
    }
    fclose(f);
    return kb;
}

/* What clones wrote is in nobody else's memory. */
static void check_shared(const struct saved *s, int fd)
{
    const struct saved_block *from = saved_main(s);
    void *p = mmap(NULL, from->pub.size_bytes, PROT_READ, MAP_PRIVATE, fd, 0);
    assert_ptr_not_equal(p, MAP_FAILED);
    assert_int_equal(memcmp(p, from->data, from->pub.size_bytes), 0);
    munmap(p, from->pub.size_bytes);
}

static void load_and_run(struct lb_hv_vm *vm, const struct saved *s, bool place_main)
{
    OK(lb_hv_prepare_ram(vm, err));
    place_devices(s, vm, place_main);
    OK(lb_hv_load_state(vm, s->state, s->state_len, err));
    OK(lb_hv_run(vm, err));
}

/* A clone as the source of another VM, which has memory of its own. */
static void move_clone(struct qemu *q, struct receiver *clone)
{
    struct saved s;
    struct receiver r;
    save_vm(clone->vm, &s);
    assert_true(last_said(clone->log, &s.said));
    for (char **a = s.desc.argv; *a; a++)
        assert_null(strstr(*a, "/proc/self/fd"));
    char src_log[96];
    snprintf(src_log, sizeof(src_log), "%s/src.log", q->dir);
    assert_int_equal(rename(clone->log, src_log), 0); /* the map of receiver_start begins there */
    for (char **a = s.desc.argv; *a; a++) {
        char *at = strstr(*a, clone->log);
        if (at) {
            char *other = lb_asprintf("%.*s%s%s", (int)(at - *a), *a, src_log, at + strlen(clone->log));
            free(*a);
            *a = other;
        }
    }
    receiver_start(q, &s, "moved", 0, NULL, &r);
    assert_int_equal(main_block(r.vm)->backing, LB_BACK_SHARED);
    load_and_run(r.vm, &s, true);
    check_said(&r, &s);
    receiver_end(&r);
    saved_free(&s);
}

static void clone_three(void)
{
    struct qemu q;
    struct saved s;
    struct receiver r[3];
    struct lb_vm_ident id;
    uint64_t rss = 0, pss = 0, kb = 0;
    make_saved(&q, MACHINE, 1, 0, &s);
    int fd = shared_memory(&s);
    for (unsigned i = 0; i < LB_ARRAY_LEN(r); i++) {
        char name[16];
        snprintf(name, sizeof(name), "clone%u", i);
        receiver_start(&q, &s, name, fd, NULL, &r[i]);
        const struct lb_ram_block *b = main_block(r[i].vm);
        lb_hv_ident(r[i].vm, &id);
        uint64_t own = smaps_kb(id.proc.pid, b->hva, "Anonymous");
        print_message("%llu kB of its own after launch\n", (unsigned long long)own);
        assert_int_equal(b->backing, LB_BACK_ANON);
        assert_null(b->map);
        struct lb_error why = LB_ERROR_INIT;
        assert_int_equal(lb_hv_lazy_begin(r[i].vm, &why), -1);
        assert_int_equal(why.code, LB_E_UNSUPPORTED);
        load_and_run(r[i].vm, &s, false);
    }
    for (unsigned i = 0; i < LB_ARRAY_LEN(r); i++)
        check_said(&r[i], &s);
    for (unsigned i = 0; i < LB_ARRAY_LEN(r); i++) {
        lb_hv_ident(r[i].vm, &id);
        rss += smaps_kb(id.proc.pid, main_block(r[i].vm)->hva, "Rss");
        pss += smaps_kb(id.proc.pid, main_block(r[i].vm)->hva, "Pss");
        kb += smaps_kb(id.proc.pid, main_block(r[i].vm)->hva, "Anonymous");
    }
    print_message("3 clones: %llu MB resident, %llu MB by share, %llu MB of their own\n",
                  (unsigned long long)rss >> 10, (unsigned long long)pss >> 10,
                  (unsigned long long)kb >> 10);
    assert_true(rss > 3 * (48u << 10));
    assert_true(pss < rss * 6 / 10);
    check_ordinary(r[0].vm);
    check_said(&r[0], &s);
    check_shared(&s, fd);
    close(fd);
    check_said(&r[1], &s);
    move_clone(&q, &r[2]);
    for (unsigned i = 0; i < LB_ARRAY_LEN(r); i++)
        receiver_end(&r[i]);
    saved_free(&s);
    qemu_end(&q);
}

static void test_clones(void **state)
{
    (void)state;
    clone_three();
}

static void test_clones_qemu10(void **state)
{
    (void)state;
    use_qemu10();
    clone_three();
}

/* As its own user, in its sandbox: it may neither make a userfaultfd nor open the shared memory by another way
 * than what it inherits. */
static void test_unprivileged(void **state)
{
    (void)state;
    if (getenv("LB_TEST_QEMU_DST")) {
        print_message("another QEMU is given, which may be a wrapper that needs root\n");
        skip();
    }
    struct qemu q;
    struct saved s;
    struct receiver lazy, clone;
    struct server v;
    struct stat st;
    struct lb_vm_ident id;
    char path[64];
    make_saved(&q, "-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny " MACHINE, 4,
               65534, &s);
    receiver_start(&q, &s, "lazy", 0, NULL, &lazy);
    lb_hv_ident(lazy.vm, &id);
    snprintf(path, sizeof(path), "/proc/%d/task", (int)id.proc.pid);
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(st.st_uid, 65534);
    OK(lb_hv_lazy_begin(lazy.vm, err));
    place_devices(&s, lazy.vm, false);
    server_start(&v, lazy.vm, &s, 0);
    OK(lb_hv_load_state(lazy.vm, s.state, s.state_len, err));
    OK(lb_hv_run(lazy.vm, err));
    fill(&v, true, 1);
    server_stop(&v);
    OK(lb_hv_lazy_end(lazy.vm, err));
    check_said(&lazy, &s);
    receiver_end(&lazy);

    int fd = shared_memory(&s);
    receiver_start(&q, &s, "clone", fd, NULL, &clone);
    close(fd);
    load_and_run(clone.vm, &s, false);
    check_said(&clone, &s);
    receiver_end(&clone);
    saved_free(&s);
    qemu_end(&q);
}

/* Memory that could still change, or is not of the right size, is not shared. */
static void test_clones_refused(void **state)
{
    (void)state;
    struct lb_error why = LB_ERROR_INIT;
    struct lb_hv_vm *vm = NULL;
    char *argv[] = {(char *)qemu_bin(), (char *)"-display", (char *)"none", (char *)"-nodefaults", (char *)"-m",
                    (char *)"16", NULL};
    struct lb_vm_desc d = {.argv = argv, .machine = (char *)"pc-i440fx-7.2", .emulator = argv[0],
                           .cwd = (char *)"/", .accel = (char *)"tcg"};
    struct qemu q;
    char run_dir[96];
    qemu_dir(&q);
    snprintf(run_dir, sizeof(run_dir), "%s/run", q.dir);
    int fd = memfd_create("lifeboat-clones", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    struct lb_launch_opts o = {.name = "t", .run_dir = run_dir, .shared_memory_fd = fd};
    assert_int_equal(ftruncate(fd, 32 << 20), 0);
    assert_int_equal(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW), 0);
    assert_int_equal(lb_hv_launch(&lb_hv_qemu, &d, &o, &vm, &why), -1);
    assert_int_equal(why.code, LB_E_INTERNAL);
    assert_int_equal(fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE), 0);
    assert_int_equal(lb_hv_launch(&lb_hv_qemu, &d, &o, &vm, &why), -1);
    print_message("%s\n", why.message);
    assert_int_equal(why.code, LB_E_STATE);
    assert_int_equal(rmdir(run_dir), 0);

    char **out = NULL;
    char *two[] = {(char *)"q", (char *)"-m", (char *)"2G", (char *)"-object",
                   (char *)"memory-backend-ram,id=a,size=1G", (char *)"-object",
                   (char *)"{\"qom-type\":\"memory-backend-file\",\"id\":\"b\",\"size\":1073741824,"
                           "\"mem-path\":\"/x\"}",
                   (char *)"-numa", (char *)"node,memdev=a", (char *)"-numa", (char *)"node,memdev=b", NULL};
    d.argv = two;
    assert_int_equal(lb_qemu_receiver_argv(&d, &o, &out, &why), -1);
    assert_int_equal(why.code, LB_E_UNSUPPORTED);
    close(fd);
    qemu_end(&q);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(test_lazy_memfd, end_all),
        cmocka_unit_test_teardown(test_lazy_anonymous, end_all),
        cmocka_unit_test_teardown(test_offered, end_all),
        cmocka_unit_test_teardown(test_lazy_qemu10, end_all),
        cmocka_unit_test_teardown(test_server_dies, end_all),
        cmocka_unit_test_teardown(test_clones, end_all),
        cmocka_unit_test_teardown(test_clones_qemu10, end_all),
        cmocka_unit_test_teardown(test_unprivileged, end_all),
        cmocka_unit_test_teardown(test_clones_refused, end_all),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
