/* checkpoint/writer*.c: what is written is what is read, and what is left when it fails. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "checkpoint/store_internal.h"

#define PAGE LB_PAGE_SIZE
enum { RAM_PAGES = 700, VGA_PAGES = 33 };

static const struct lb_ckpt_block BLOCKS[] = {
    {.name = "pc.ram", .n_pages = RAM_PAGES, .kind = LB_RAM_MAIN},
    {.name = "vga.vram", .n_pages = VGA_PAGES, .kind = LB_RAM_DEVICE},
};
#define N_BLOCKS LB_ARRAY_LEN(BLOCKS)

/* A guest's memory */
struct memory {
    uint8_t block[N_BLOCKS][RAM_PAGES][PAGE];
};

static char g_dir[64], g_path[128];
static struct memory g_want, g_got;
static unsigned g_seen[N_BLOCKS][RAM_PAGES];
static uint64_t g_rng;

static uint64_t rnd(void)
{
    g_rng ^= g_rng << 13;
    g_rng ^= g_rng >> 7;
    return g_rng ^= g_rng << 17;
}

static int setup(void **state)
{
    (void)state;
    strcpy(g_dir, "/tmp/lb-test-writer-XXXXXX");
    if (!mkdtemp(g_dir))
        return -1;
    snprintf(g_path, sizeof(g_path), "%s/1.lbc", g_dir);
    memset(&g_want, 0, sizeof(g_want));
    g_rng = 88172645463325252u;
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    return lb_remove_tree(g_dir, NULL);
}

static const char *path_of(unsigned n)
{
    static char path[8][128];
    char *p = path[n % 8];
    snprintf(p, sizeof(path[0]), "%s/%u.lbc", g_dir, n);
    return p;
}

static unsigned files_in_dir(void)
{
    unsigned n = 0;
    DIR *d = opendir(g_dir);
    assert_non_null(d);
    for (struct dirent *e; (e = readdir(d));)
        n += e->d_name[0] != '.';
    closedir(d);
    return n;
}

/* --------------------------------------------------------------------- memory */

static void fill_random(uint8_t *p)
{
    for (unsigned i = 0; i < PAGE; i += 8) {
        uint64_t v = rnd();
        memcpy(p + i, &v, 8);
    }
}

static void fill_text(uint8_t *p)
{
    for (unsigned i = 0; i < PAGE; i += 16)
        snprintf((char *)p + i, 16, "line %09u\n", (unsigned)(rnd() % 1000));
}

/* A third zeros, the rest text, noise and pages that are there already */
static void fill_mix(void)
{
    for (unsigned b = 0; b < N_BLOCKS; b++)
        for (unsigned i = 0; i < BLOCKS[b].n_pages; i++) {
            uint8_t *p = g_want.block[b][i];
            switch (rnd() % 6) {
            case 0:
            case 1:
                memset(p, 0, PAGE);
                break;
            case 2:
                memcpy(p, g_want.block[0][rnd() % RAM_PAGES], PAGE);
                break;
            case 3:
                fill_random(p);
                break;
            default:
                fill_text(p);
            }
        }
}

static struct lb_vm_desc desc(void)
{
    static char *argv[] = {"/usr/bin/qemu-system-x86_64", "-name", "web1", NULL};
    return (struct lb_vm_desc){.name = "web1", .hypervisor = "qemu", .hv_version = "7.2.22",
                               .emulator = "/usr/bin/qemu-system-x86_64", .argv = argv, .machine = "pc-i440fx-7.2",
                               .vcpus = 1, .ram_bytes = 64 << 20};
}

static struct lb_ckpt_meta meta(void)
{
    struct lb_ckpt_meta m = {.number = 1, .created_ms = 1700000000123, .pause_ms = 3.5, .desc = desc()};
    strcpy(m.vm, "web1");
    strcpy(m.label, "before the upgrade");
    return m;
}

/* ---------------------------------------------------------------------- writing */

static struct lb_ckpt_create create_opts(const char *path, struct lb_chain *parent)
{
    return (struct lb_ckpt_create){.path = path, .blocks = BLOCKS, .n_blocks = N_BLOCKS, .parent = parent,
                                   .threads = 2};
}

static struct lb_ckpt_writer *begin(const struct lb_ckpt_create *c)
{
    struct lb_ckpt_writer *w = NULL;
    struct lb_error err = LB_ERROR_INIT;
    if (lb_ckpt_create(c, &w, &err) < 0)
        fail_msg("create: %s", err.message);
    return w;
}

static int put(struct lb_ckpt_writer *w, unsigned block, const uint32_t *pages, unsigned n, struct lb_error *err)
{
    uint8_t *buf = lb_ckpt_buffer(w, err);
    if (!buf)
        return -1;
    assert_int_equal((uintptr_t)buf % PAGE, 0);
    for (unsigned i = 0; i < n; i++)
        memcpy(buf + (size_t)i * PAGE, g_want.block[block][pages[i]], PAGE);
    return lb_ckpt_put(w, block, pages, n, buf, err);
}

/* All pages that `which` names (NULL: all), in puts of up to `most`. */
static int put_memory(struct lb_ckpt_writer *w, const bool which[N_BLOCKS][RAM_PAGES], unsigned most,
                      struct lb_error *err)
{
    uint32_t v[LB_CKPT_CHUNK_PAGES];

    for (unsigned b = 0; b < N_BLOCKS; b++) {
        unsigned n = 0;
        for (unsigned i = 0; i < BLOCKS[b].n_pages; i++) {
            if (!which || which[b][i])
                v[n++] = i;
            if (n == most || (n > 0 && i + 1 == BLOCKS[b].n_pages)) {
                if (put(w, b, v, n, err) < 0)
                    return -1;
                n = 0;
            }
        }
    }
    return 0;
}

static void commit(struct lb_ckpt_writer *w, struct lb_ckpt_id *id)
{
    struct lb_ckpt_meta m = meta();
    struct lb_error err = LB_ERROR_INIT;
    if (lb_ckpt_commit(w, &m, "device state", 12, id, &err) < 0)
        fail_msg("commit: %s", err.message);
}

static void write_all(const struct lb_ckpt_create *c, unsigned most, struct lb_ckpt_stats *stats)
{
    struct lb_ckpt_writer *w = begin(c);
    struct lb_error err = LB_ERROR_INIT;
    if (put_memory(w, NULL, most, &err) < 0 || lb_ckpt_flush(w, &err) < 0)
        fail_msg("put: %s", err.message);
    if (stats)
        lb_ckpt_writer_stats(w, stats);
    commit(w, NULL);
}

/* ---------------------------------------------------------------------- reading */

static int got_pages(unsigned block, uint64_t first, uint64_t count, const void *data, void *arg, struct lb_error *err)
{
    (void)arg, (void)err;
    assert_true(block < N_BLOCKS && first + count <= BLOCKS[block].n_pages);
    memcpy(g_got.block[block][first], data, count * PAGE);
    for (uint64_t i = 0; i < count; i++)
        g_seen[block][first + i]++;
    return 0;
}

static struct lb_chain *open_chain(unsigned newest, unsigned depth, const struct lb_ckpt_key *key)
{
    const char *paths[8];
    struct lb_chain *c = NULL;
    struct lb_error err = LB_ERROR_INIT;
    for (unsigned i = 0; i < depth; i++)
        paths[i] = path_of(newest - i);
    if (lb_chain_open(paths, depth, key, &c, &err) < 0)
        fail_msg("open: %s", err.message);
    return c;
}

static void found(const char *what, void *arg)
{
    (void)arg;
    print_error("%s\n", what);
}

/* File `newest`, an increment over those before it, has g_want. */
static void check_reads(unsigned newest, unsigned depth, const struct lb_ckpt_key *key)
{
    struct lb_error err = LB_ERROR_INIT;
    struct lb_chain *c = open_chain(newest, depth, key);
    struct lb_chain_read_all r = {.threads = 2, .fn = got_pages, .cancel_fd = -1};

    memset(&g_got, 0, sizeof(g_got));
    memset(g_seen, 0, sizeof(g_seen));
    if (lb_chain_read_all(c, &r, &err) < 0)
        fail_msg("read: %s", err.message);
    lb_chain_close(c);
    for (unsigned b = 0; b < N_BLOCKS; b++)
        for (unsigned i = 0; i < BLOCKS[b].n_pages; i++)
            if (memcmp(g_got.block[b][i], g_want.block[b][i], PAGE) || g_seen[b][i] > 1)
                fail_msg("%s page %u (given %u times)", BLOCKS[b].name, i, g_seen[b][i]);
    for (unsigned i = 0; i < depth; i++)
        if (lb_ckpt_verify(path_of(newest - i), key, true, found, NULL, &err) < 0)
            fail_msg("verify: %s", err.message);
}

/* ------------------------------------------------------------------------ tests */

static void test_whole(void **state)
{
    static const unsigned threads[] = {1, 3}, most[] = {1, 7, LB_CKPT_CHUNK_PAGES};
    struct lb_ckpt_stats first = {0}, s;
    unsigned n = 0;
    (void)state;

    fill_mix();
    for (unsigned t = 0; t < LB_ARRAY_LEN(threads); t++)
        for (unsigned m = 0; m < LB_ARRAY_LEN(most); m++) {
            struct lb_ckpt_create c = create_opts(path_of(++n), NULL);
            c.threads = threads[t];
            c.buffered = m == 1;
            write_all(&c, most[m], &s);
            check_reads(n, 1, NULL);
            assert_int_equal(s.pages, RAM_PAGES + VGA_PAGES);
            assert_int_equal(s.raw_bytes, s.pages * PAGE);
            assert_int_equal(s.zero_pages + s.same_pages + s.stored_pages, s.pages);
            if (n == 1)
                first = s;
            assert_int_equal(s.zero_pages, first.zero_pages);
            assert_int_equal(s.stored_pages, first.stored_pages); /* however they were given */
        }
    assert_int_equal(files_in_dir(), n);
    assert_true(first.zero_pages > RAM_PAGES / 5 && first.same_pages > RAM_PAGES / 20);
}

static void test_empty(void **state)
{
    struct lb_ckpt_create c = create_opts(path_of(1), NULL);
    struct lb_ckpt_id id;
    struct lb_ckpt_info info;
    (void)state;

    commit(begin(&c), &id);
    check_reads(1, 1, NULL);
    assert_int_equal(lb_ckpt_info(path_of(1), NULL, &info, NULL), 0);
    assert_memory_equal(info.id.b, id.b, sizeof(id.b));
    assert_string_equal(info.meta.label, "before the upgrade");
    assert_int_equal(info.stats.pages, 0);
    lb_ckpt_info_free(&info);
}

static void test_extras(void **state)
{
    struct lb_ckpt_create c = create_opts(path_of(1), NULL);
    LB_AUTO_FREE uint8_t *state_bytes = lb_alloc(3 << 20);
    LB_AUTO_FREE uint64_t *hot = lb_alloc(700 * sizeof(*hot));
    struct lb_ckpt_meta m = meta();
    struct lb_error err = LB_ERROR_INIT;
    (void)state;

    for (unsigned i = 0; i < (3 << 20); i += PAGE)
        fill_random(state_bytes + i);
    for (unsigned i = 0; i < 700; i++)
        hot[i] = i % 2 ? UINT64_C(1) << 40 | i % VGA_PAGES : i % RAM_PAGES;
    struct lb_ckpt_writer *w = begin(&c);
    assert_int_equal(lb_ckpt_put_hot(w, hot, 700, &err), 0);
    assert_int_equal(lb_ckpt_commit(w, &m, state_bytes, 3 << 20, NULL, &err), 0);

    struct lb_chain *chain = open_chain(1, 1, NULL);
    void *got = NULL;
    size_t len = 0;
    uint64_t *v = NULL, n = 0;
    assert_int_equal(lb_chain_state(chain, &got, &len, &err), 0);
    assert_int_equal(len, 3 << 20);
    assert_memory_equal(got, state_bytes, len);
    assert_int_equal(lb_chain_hot(chain, &v, &n, &err), 0);
    assert_int_equal(n, 700);
    assert_memory_equal(v, hot, n * sizeof(*v));
    free(got);
    free(v);
    lb_chain_close(chain);
}

/* A page given again: the later one counts, whatever it is and was, and whichever worker has it. */
static void test_again_and_again(void **state)
{
    struct lb_ckpt_create c = create_opts(path_of(1), NULL);
    struct lb_error err = LB_ERROR_INIT;
    (void)state;

    c.threads = 3;
    struct lb_ckpt_writer *w = begin(&c);
    for (unsigned round = 0; round < 30; round++) {
        fill_mix();
        if (put_memory(w, NULL, 1 + round % LB_CKPT_CHUNK_PAGES, &err) < 0)
            fail_msg("put: %s", err.message);
    }
    memset(g_want.block[0][5], 0, 20 * PAGE);
    assert_int_equal(lb_ckpt_put_zero(w, 0, 5, 20, &err), 0);
    fill_random(g_want.block[0][7]);
    assert_int_equal(put(w, 0, &(uint32_t){7}, 1, &err), 0);
    commit(w, NULL);
    check_reads(1, 1, NULL);
}

/* One bit per word in some lines, and back. */
static void change_little(uint8_t *p)
{
    for (unsigned l = 0; l < 5; l++)
        p[rnd() % PAGE] ^= 1;
}

static void test_increments(void **state)
{
    bool which[N_BLOCKS][RAM_PAGES];
    struct lb_ckpt_create c = create_opts(path_of(1), NULL);
    struct lb_error err = LB_ERROR_INIT;
    struct lb_ckpt_stats s;
    (void)state;

    fill_mix();
    write_all(&c, LB_CKPT_CHUNK_PAGES, NULL);
    for (unsigned n = 2; n <= 6; n++) {
        struct lb_chain *parent = open_chain(n - 1, n - 1, NULL);
        memset(which, 0, sizeof(which));
        for (unsigned i = 0; i < 150; i++) {
            unsigned p = (unsigned)(rnd() % RAM_PAGES);
            which[0][p] = true;
            if (i % 5 == 0)
                fill_random(g_want.block[0][p]);
            else if (i % 5 == 1)
                memset(g_want.block[0][p], 0, PAGE);
            else if (i % 5 < 4)
                change_little(g_want.block[0][p]);
        }
        c = create_opts(path_of(n), parent);
        struct lb_ckpt_writer *w = begin(&c);
        if (put_memory(w, which, LB_CKPT_CHUNK_PAGES, &err) < 0 || lb_ckpt_flush(w, &err) < 0)
            fail_msg("put: %s", err.message);
        lb_ckpt_writer_stats(w, &s);
        assert_true(s.unchanged_pages > 0 && s.delta_pages > 0 && s.stored_pages > 0 && s.zero_pages > 0);
        assert_true(s.pages <= 150);
        commit(w, NULL);
        lb_chain_close(parent);
        check_reads(n, n, NULL);
    }
}

/* A page that changes and changes back while the increment is taken is as the parent's. */
static void test_changed_back(void **state)
{
    struct lb_ckpt_create c = create_opts(path_of(1), NULL);
    struct lb_error err = LB_ERROR_INIT;
    struct memory *before = lb_alloc(sizeof(*before));
    (void)state;

    fill_mix();
    *before = g_want;
    write_all(&c, LB_CKPT_CHUNK_PAGES, NULL);
    struct lb_chain *parent = open_chain(1, 1, NULL);
    c = create_opts(path_of(2), parent);
    struct lb_ckpt_writer *w = begin(&c);
    fill_mix();
    assert_int_equal(put_memory(w, NULL, 5, &err), 0);
    g_want = *before;
    assert_int_equal(put_memory(w, NULL, 9, &err), 0);
    commit(w, NULL);
    lb_chain_close(parent);
    check_reads(2, 2, NULL);
    free(before);
}

/* Written again without its parent; its child, which has differences from it, reads as before. */
static void test_written_again(void **state)
{
    struct lb_ckpt_create c = create_opts(path_of(1), NULL);
    struct memory *of2 = lb_alloc(sizeof(*of2)), *of3 = lb_alloc(sizeof(*of3));
    struct lb_ckpt_id id2, id;
    struct lb_ckpt_stats s;
    (void)state;

    for (unsigned i = 0; i < RAM_PAGES; i++)
        fill_text(g_want.block[0][i]);
    write_all(&c, LB_CKPT_CHUNK_PAGES, NULL);
    for (unsigned n = 2; n <= 3; n++) {
        struct lb_chain *parent = open_chain(n - 1, n - 1, NULL);
        for (unsigned i = 0; i < 64; i++)
            change_little(g_want.block[0][i * 3 + n]);
        c = create_opts(path_of(n), parent);
        write_all(&c, LB_CKPT_CHUNK_PAGES, &s);
        assert_true(s.delta_pages > 0 && s.unchanged_pages > 0);
        lb_chain_close(parent);
        *(n == 2 ? of2 : of3) = g_want;
    }

    struct lb_chain *chain = open_chain(2, 2, NULL);
    id2 = lb_chain_info(chain)->id;
    c = create_opts(path_of(2), NULL);
    c.again = chain;
    g_want = *of2;
    struct lb_ckpt_writer *w = begin(&c);
    assert_int_equal(put_memory(w, NULL, LB_CKPT_CHUNK_PAGES, NULL), 0);
    commit(w, &id);
    assert_memory_equal(id.b, id2.b, sizeof(id.b));
    lb_chain_close(chain);
    assert_int_equal(unlink(path_of(1)), 0);
    check_reads(2, 1, NULL);
    g_want = *of3;
    check_reads(3, 2, NULL);
    free(of2);
    free(of3);
}

/* What cannot be compared is stored whole. */
static void test_damaged_parent(void **state)
{
    struct lb_ckpt_create c = create_opts(path_of(1), NULL);
    struct lb_cf_part head;
    struct lb_ckpt_stats s;
    (void)state;

    for (unsigned i = 0; i < RAM_PAGES; i++)
        fill_text(g_want.block[0][i]);
    write_all(&c, LB_CKPT_CHUNK_PAGES, NULL);
    struct lb_chain *parent = open_chain(1, 1, NULL);
    LB_AUTO_FD int fd = open(path_of(1), O_RDWR);
    for (off_t at = LB_CF_HEADER_BYTES;; at += (off_t)((sizeof(head) + head.stored_bytes + 15) / 16 * 16)) {
        assert_int_equal(pread(fd, &head, sizeof(head), at), sizeof(head));
        if (le32toh(head.kind) != LB_CF_PAGES)
            break;
        assert_int_equal(pwrite(fd, "damage", 6, at + (off_t)sizeof(head) + 100), 6);
    }
    for (unsigned i = 0; i < RAM_PAGES; i++)
        change_little(g_want.block[0][i]);
    c = create_opts(path_of(2), parent);
    write_all(&c, LB_CKPT_CHUNK_PAGES, &s);
    assert_int_equal(s.delta_pages, 0);
    assert_int_equal(s.stored_pages, RAM_PAGES);
    lb_chain_close(parent);

    struct lb_chain *chain = open_chain(2, 2, NULL);
    struct lb_chain_read_all r = {.threads = 1, .fn = got_pages, .cancel_fd = -1};
    memset(&g_got, 0, sizeof(g_got));
    assert_int_equal(lb_chain_read_all(chain, &r, NULL), 0);
    assert_memory_equal(&g_got, &g_want, sizeof(g_got));
    lb_chain_close(chain);
}

/* ------------------------------------------------------------------- encryption */

static struct lb_ckpt_key *passphrase(const char *text)
{
    struct lb_ckpt_key *k = NULL;
    assert_int_equal(lb_ckpt_key_passphrase(text, strlen(text), &k, NULL), 0);
    return k;
}

static void refuse(const char *path, const struct lb_ckpt_key *key, const char *says)
{
    struct lb_chain *c = NULL;
    struct lb_error err = LB_ERROR_INIT;
    assert_int_equal(lb_chain_open(&path, 1, key, &c, &err), -1);
    assert_int_equal(err.code, LB_E_AUTH);
    if (!strstr(err.message, says))
        fail_msg("\"%s\" does not say \"%s\"", err.message, says);
}

static void test_encrypted(void **state)
{
    struct lb_ckpt_key *key = passphrase("correct horse"), *wrong = passphrase("battery staple");
    struct lb_ckpt_create c = create_opts(path_of(1), NULL);
    struct lb_error err = LB_ERROR_INIT;
    LB_AUTO_FREE char *file = NULL;
    size_t len = 0;
    (void)state;

    c.key = key;
    fill_mix();
    memcpy(g_want.block[0][0], "the secret of the guest", 23);
    write_all(&c, LB_CKPT_CHUNK_PAGES, NULL);
    struct lb_chain *parent = open_chain(1, 1, key);
    for (unsigned i = 0; i < 50; i++)
        change_little(g_want.block[0][i]);
    c = create_opts(path_of(2), parent);
    c.key = key;
    write_all(&c, LB_CKPT_CHUNK_PAGES, NULL);
    check_reads(2, 2, key);
    refuse(path_of(1), wrong, "wrong passphrase");
    refuse(path_of(1), NULL, "is encrypted with a passphrase");

    /* one of the two encrypted, the other one not */
    struct lb_ckpt_writer *w = NULL;
    c = create_opts(path_of(3), parent);
    assert_int_equal(lb_ckpt_create(&c, &w, &err), -1);
    assert_int_equal(err.code, LB_E_STATE);
    assert_int_equal(files_in_dir(), 2);
    lb_chain_close(parent);

    assert_int_equal(lb_file_read(path_of(1), 64 << 20, &file, &len, NULL), 0);
    assert_null(memmem(file, len, "the secret of the guest", 23));
    assert_null(memmem(file, len, "qemu", 4));
    lb_ckpt_key_free(key);
    lb_ckpt_key_free(wrong);
}

/* --------------------------------------------------------------------- failures */

static void test_refusals(void **state)
{
    struct lb_ckpt_create c = create_opts(path_of(1), NULL);
    struct lb_ckpt_block other[N_BLOCKS];
    struct lb_ckpt_writer *w = NULL;
    struct lb_error err = LB_ERROR_INIT;
    (void)state;

    commit(begin(&c), NULL);
    assert_int_equal(lb_ckpt_create(&c, &w, &err), -1);
    assert_int_equal(err.code, LB_E_EXISTS);

    struct lb_chain *parent = open_chain(1, 1, NULL);
    memcpy(other, BLOCKS, sizeof(other));
    other[1].n_pages--;
    c = create_opts(path_of(2), parent);
    c.blocks = other;
    assert_int_equal(lb_ckpt_create(&c, &w, &err), -1);
    assert_int_equal(err.code, LB_E_STATE);
    assert_string_equal(err.remedy, "take a full checkpoint");
    lb_chain_close(parent);

    c = create_opts("/nonexistent/1.lbc", NULL);
    assert_int_equal(lb_ckpt_create(&c, &w, &err), -1);
    assert_int_equal(err.code, LB_E_NOT_FOUND);
    assert_int_equal(files_in_dir(), 1);

    /* it came while the other one was written */
    c = create_opts(path_of(2), NULL);
    w = begin(&c);
    assert_int_equal(link(path_of(1), path_of(2)), 0);
    struct lb_ckpt_meta m = meta();
    assert_int_equal(lb_ckpt_commit(w, &m, NULL, 0, NULL, &err), -1);
    assert_int_equal(err.code, LB_E_EXISTS);
    assert_int_equal(files_in_dir(), 2);
}

static void test_abort(void **state)
{
    struct lb_ckpt_create c = create_opts(path_of(1), NULL);
    (void)state;

    fill_mix();
    lb_ckpt_abort(begin(&c));
    assert_int_equal(files_in_dir(), 0);
    struct lb_ckpt_writer *w = begin(&c);
    assert_int_equal(put_memory(w, NULL, 5, NULL), 0);
    assert_non_null(lb_ckpt_buffer(w, NULL)); /* one that is never given */
    assert_int_equal(files_in_dir(), 1);
    lb_ckpt_abort(w);
    assert_int_equal(files_in_dir(), 0);
    lb_ckpt_abort(NULL);
}

static void test_leftovers(void **state)
{
    struct lb_ckpt_create c = create_opts(path_of(1), NULL);
    struct lb_ckpt_writer *second = NULL;
    struct lb_error err = LB_ERROR_INIT;
    char old[160], kept[160];
    (void)state;

    snprintf(old, sizeof(old), "%s.tmp-1", g_path);
    snprintf(kept, sizeof(kept), "%s.tmp-x1", g_path);
    close(open(old, O_CREAT | O_WRONLY, 0600));
    close(open(kept, O_CREAT | O_WRONLY, 0600));
    struct lb_ckpt_writer *w = begin(&c);
    assert_int_equal(access(old, F_OK), -1);
    assert_int_equal(access(kept, F_OK), 0);
    /* one that is at work is left alone */
    assert_int_equal(lb_ckpt_create(&c, &second, &err), -1);
    commit(w, NULL);
    check_reads(1, 1, NULL);
}

static void limit_files(uint64_t bytes)
{
    struct rlimit r;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &r), 0);
    r.rlim_cur = LB_MIN((rlim_t)bytes, r.rlim_max);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &r), 0);
}

/* Write all of it with so much room; true when that was enough. */
static bool write_within(uint64_t bytes)
{
    struct lb_ckpt_create c = create_opts(path_of(1), NULL);
    struct lb_ckpt_writer *w = NULL;
    struct lb_error err = LB_ERROR_INIT;
    struct lb_ckpt_meta m = meta();

    c.threads = 1; /* the same file each time */
    limit_files(bytes);
    int rc = lb_ckpt_create(&c, &w, &err);
    if (rc == 0 && put_memory(w, NULL, LB_CKPT_CHUNK_PAGES, &err) < 0)
        rc = -1, lb_ckpt_abort(w);
    else if (rc == 0)
        rc = lb_ckpt_commit(w, &m, "state", 5, NULL, &err);
    limit_files(RLIM_INFINITY);
    if (rc < 0) {
        assert_int_equal(err.code, LB_E_NO_SPACE);
        assert_non_null(strstr(err.remedy, "free space"));
    }
    return rc == 0;
}

static void test_full_disk(void **state)
{
    struct lb_ckpt_create c = create_opts(path_of(1), NULL);
    struct stat st;
    (void)state;

    signal(SIGXFSZ, SIG_IGN);
    fill_mix();
    c.threads = 1;
    write_all(&c, LB_CKPT_CHUNK_PAGES, NULL);
    assert_int_equal(stat(path_of(1), &st), 0);
    uint64_t size = (uint64_t)st.st_size;
    assert_int_equal(unlink(path_of(1)), 0);
    for (unsigned i = 0; i < 16; i++) {
        assert_false(write_within(size * i / 16 / PAGE * PAGE));
        assert_int_equal(files_in_dir(), 0);
    }
    assert_false(write_within(size - PAGE));
    assert_int_equal(files_in_dir(), 0);
    assert_true(write_within(size));
    check_reads(1, 1, NULL);
}

/* The disk fills up while pages are given: the caller hears of it soon, and from every call. */
static void test_full_soon(void **state)
{
    struct lb_ckpt_create c = create_opts(path_of(1), NULL);
    struct lb_error err = LB_ERROR_INIT;
    unsigned mib = 0;
    (void)state;

    signal(SIGXFSZ, SIG_IGN);
    limit_files(1 << 20);
    struct lb_ckpt_writer *w = begin(&c);
    for (int rc = 0; rc == 0; mib++) {
        for (unsigned i = 0; i < 256; i++)
            fill_random(g_want.block[0][i]);
        for (uint32_t p = 0; p < 256 && rc == 0; p++)
            rc = put(w, 0, &p, 1, &err);
        assert_true(mib < 64);
    }
    assert_int_equal(err.code, LB_E_NO_SPACE);
    assert_null(lb_ckpt_buffer(w, NULL));
    assert_int_equal(lb_ckpt_flush(w, NULL), -1);
    limit_files(RLIM_INFINITY);
    struct lb_ckpt_meta m = meta();
    err = (struct lb_error)LB_ERROR_INIT;
    assert_int_equal(lb_ckpt_commit(w, &m, NULL, 0, NULL, &err), -1);
    assert_int_equal(err.code, LB_E_NO_SPACE);
    assert_int_equal(files_in_dir(), 0);
}

/* Killed at any moment: no file, or a whole one; and the next writer clears up. */
static void test_killed(void **state)
{
    struct lb_ckpt_create c = create_opts(path_of(1), NULL);
    unsigned whole = 0, none = 0, left = 0;
    (void)state;

    fill_mix();
    uint64_t t = lb_now_ns();
    write_all(&c, LB_CKPT_CHUNK_PAGES, NULL);
    uint64_t takes_us = (lb_now_ns() - t) / 1000;
    for (unsigned i = 0; i < 24; i++) {
        unlink(path_of(1));
        pid_t pid = fork();
        assert_true(pid >= 0);
        if (pid == 0) {
            write_all(&c, LB_CKPT_CHUNK_PAGES, NULL);
            for (;;)
                pause();
        }
        usleep((useconds_t)(takes_us * i / 16));
        assert_int_equal(kill(pid, SIGKILL), 0);
        assert_int_equal(waitpid(pid, NULL, 0), pid);
        if (access(path_of(1), F_OK) == 0) {
            check_reads(1, 1, NULL);
            whole++;
        } else {
            none++;
        }
        left += files_in_dir() > (access(path_of(1), F_OK) == 0);
    }
    assert_true(none > 0 && left > 0);
    unlink(path_of(1));
    write_all(&c, LB_CKPT_CHUNK_PAGES, NULL);
    assert_int_equal(files_in_dir(), 1);
    print_message("# killed: %u whole, %u none, %u with a temporary file\n", whole, none, left);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_whole, setup, teardown),
        cmocka_unit_test_setup_teardown(test_empty, setup, teardown),
        cmocka_unit_test_setup_teardown(test_extras, setup, teardown),
        cmocka_unit_test_setup_teardown(test_again_and_again, setup, teardown),
        cmocka_unit_test_setup_teardown(test_increments, setup, teardown),
        cmocka_unit_test_setup_teardown(test_changed_back, setup, teardown),
        cmocka_unit_test_setup_teardown(test_written_again, setup, teardown),
        cmocka_unit_test_setup_teardown(test_damaged_parent, setup, teardown),
        cmocka_unit_test_setup_teardown(test_encrypted, setup, teardown),
        cmocka_unit_test_setup_teardown(test_refusals, setup, teardown),
        cmocka_unit_test_setup_teardown(test_abort, setup, teardown),
        cmocka_unit_test_setup_teardown(test_leftovers, setup, teardown),
        cmocka_unit_test_setup_teardown(test_full_disk, setup, teardown),
        cmocka_unit_test_setup_teardown(test_full_soon, setup, teardown),
        cmocka_unit_test_setup_teardown(test_killed, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
