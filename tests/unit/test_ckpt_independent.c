/* What the writer writes, read by tests/reader/lbc_reader.py, which was written from FORMAT.md
 * alone: the same memory, and damage is found. Run from the top of the tree. */
#include "checkpoint/store_internal.h"

#include <setjmp.h>
#include <sodium.h>
#include <stdarg.h>
#include <string.h>
#include <sys/wait.h>
#include <cmocka.h>

#define PAGE LB_PAGE_SIZE
enum { RAM_PAGES = 300, VGA_PAGES = 20, FILES = 4 };

static const struct lb_ckpt_block BLOCKS[] = {
    {.name = "pc.ram", .n_pages = RAM_PAGES, .kind = LB_RAM_MAIN},
    {.name = "0000:00:02.0/vga.vram", .n_pages = VGA_PAGES, .kind = LB_RAM_DEVICE},
};
#define N_BLOCKS ((unsigned)LB_ARRAY_LEN(BLOCKS))
static const char PASSPHRASE[] = "correct horse", KEY[] = "0123456789abcdefghijklmnopqrstuv";

static char g_dir[] = "/tmp/lb-test-independent.XXXXXX";
static uint8_t g_ram[N_BLOCKS][RAM_PAGES][PAGE];

static uint64_t g_rng = 5;
static uint64_t rnd(uint64_t below)
{
    g_rng = g_rng * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (g_rng >> 33) % below;
}

/* ---------------------------------------------------------------- writing */

/* Of all kinds: zeros, as another page, a little changed, text, noise. */
static void change(unsigned block, unsigned page)
{
    uint8_t *p = g_ram[block][page];
    unsigned what = (unsigned)rnd(5);
    if (what == 0)
        memset(p, 0, PAGE);
    else if (what == 1)
        memcpy(p, g_ram[0][rnd(RAM_PAGES)], PAGE);
    else if (what == 2)
        p[rnd(PAGE)] ^= 0x5a;
    for (unsigned i = 0; what > 2 && i < PAGE; i++)
        p[i] = what == 3 ? (uint8_t)rnd(256) : (uint8_t)(i / 100 + page);
}

static void put(struct lb_ckpt_writer *w, unsigned block, uint32_t page)
{
    uint8_t *buf = lb_ckpt_buffer(w, NULL);
    assert_non_null(buf);
    memcpy(buf, g_ram[block][page], PAGE);
    assert_int_equal(lb_ckpt_put(w, block, &page, 1, buf, NULL), 0);
}

static void commit(struct lb_ckpt_writer *w, uint32_t number)
{
    char *argv[] = {(char *)"qemu", NULL}, *none[] = {NULL};
    const uint64_t hot[] = {7, 0};
    struct lb_ckpt_meta meta = {.vm = "web", .label = "nightly", .number = number, .created_ms = 1};
    struct lb_error err = LB_ERROR_INIT;
    meta.desc = (struct lb_vm_desc){.name = (char *)"web",
                                    .hypervisor = (char *)"qemu",
                                    .emulator = (char *)"/usr/bin/qemu",
                                    .argv = argv,
                                    .machine = (char *)"pc",
                                    .features = none,
                                    .blockers = none,
                                    .vcpus = 1,
                                    .ram_bytes = RAM_PAGES * PAGE};
    assert_int_equal(lb_ckpt_put_hot(w, hot, 2, NULL), 0);
    if (lb_ckpt_commit(w, &meta, "the state", 9, NULL, &err) < 0)
        fail_msg("%s", err.message);
}

static char *path_of(const char *name, unsigned file)
{
    return lb_asprintf("%s/%s-%u.lbc", g_dir, name, file);
}

static struct lb_chain *open_chain(const char *name, unsigned files, const struct lb_ckpt_key *key)
{
    char *paths[FILES];
    struct lb_chain *c = NULL;
    for (unsigned i = 0; i < files; i++)
        paths[i] = path_of(name, files - 1 - i);
    assert_int_equal(lb_chain_open((const char *const *)paths, files, key, &c, NULL), 0);
    for (unsigned i = 0; i < files; i++)
        free(paths[i]);
    return c;
}

static void write_chain(const char *name, const struct lb_ckpt_key *key)
{
    memset(g_ram, 0, sizeof(g_ram));
    for (unsigned f = 0; f < FILES; f++) {
        LB_AUTO_FREE char *path = path_of(name, f);
        struct lb_chain *parent = f ? open_chain(name, f, key) : NULL;
        const struct lb_ckpt_create create = {.path = path,
                                              .blocks = BLOCKS,
                                              .n_blocks = N_BLOCKS,
                                              .parent = parent,
                                              .key = key,
                                              .threads = 2};
        struct lb_ckpt_writer *w;
        struct lb_error err = LB_ERROR_INIT;
        if (lb_ckpt_create(&create, &w, &err) < 0)
            fail_msg("%s", err.message);
        for (unsigned b = 0; b < N_BLOCKS; b++)
            for (uint32_t p = 0; p < BLOCKS[b].n_pages; p++)
                if (f == 0 || rnd(4) == 0) {
                    change(b, p);
                    put(w, b, p);
                }
        commit(w, f + 1);
        lb_chain_close(parent);
    }
}

/* ---------------------------------------------------------------- reading */

/* 0 when it accepted; out: what it said. */
static int run_reader(const char *name, const char *how, char *out, size_t cap)
{
    LB_AUTO_FREE char *cmd = lb_asprintf("/usr/bin/python3 tests/reader/lbc_reader.py %s "
                                         "%s/%s-3.lbc %s/%s-2.lbc %s/%s-1.lbc %s/%s-0.lbc 2>&1",
                                         how, g_dir, name, g_dir, name, g_dir, name, g_dir, name);
    FILE *p = popen(cmd, "r");
    assert_non_null(p);
    out[fread(out, 1, cap - 1, p)] = '\0';
    int rc = pclose(p);
    assert_true(WIFEXITED(rc));
    return WEXITSTATUS(rc);
}

static void same_memory(const char *name, const char *how, const struct lb_ckpt_key *key)
{
    char out[4096];
    write_chain(name, key);
    if (run_reader(name, how, out, sizeof(out)) != 0)
        fail_msg("%s", out);
    for (unsigned b = 0; b < N_BLOCKS; b++) {
        uint8_t sum[crypto_hash_sha256_BYTES];
        char hex[2 * sizeof(sum) + 1];
        crypto_hash_sha256(sum, g_ram[b][0], BLOCKS[b].n_pages * PAGE);
        lb_hex(hex, sum, sizeof(sum));
        if (!strstr(out, hex))
            fail_msg("another memory: %s", out);
    }
    assert_non_null(strstr(out, "web@4: 4 files, "));
    assert_non_null(strstr(out, " 2 hot, state 9\n"));
    assert_null(strstr(out, " 0 zero,"));
    assert_null(strstr(out, " 0 differences,")); /* the test would prove less */
}

static void plain(void **state)
{
    (void)state;
    same_memory("plain", "", NULL);
}

static void key_file(void **state)
{
    (void)state;
    LB_AUTO_FREE char *path = lb_asprintf("%s/key", g_dir);
    LB_AUTO_FREE char *how = lb_asprintf("--key %s", path);
    struct lb_ckpt_key *key;
    char out[4096];
    assert_int_equal(lb_file_write_atomic(path, KEY, 32, 0600, NULL), 0);
    assert_int_equal(lb_ckpt_key_file(path, &key, NULL), 0);
    same_memory("key", how, key);
    lb_ckpt_key_free(key);
    assert_int_equal(lb_file_write_atomic(path, KEY + 1, 32, 0600, NULL), 0);
    assert_int_equal(run_reader("key", how, out, sizeof(out)), 1);
    assert_non_null(strstr(out, "wrong key"));
}

static void passphrase(void **state)
{
    (void)state;
    LB_AUTO_FREE char *how = lb_asprintf("--passphrase '%s'", PASSPHRASE);
    struct lb_ckpt_key *key;
    assert_int_equal(lb_ckpt_key_passphrase(PASSPHRASE, strlen(PASSPHRASE), &key, NULL), 0);
    same_memory("pass", how, key);
    lb_ckpt_key_free(key);
}

/* Both readers find the same byte, wherever it is. */
static void damage(void **state)
{
    (void)state;
    LB_AUTO_FREE char *path = path_of("damage", 1);
    LB_AUTO_FREE char *data = NULL;
    size_t len;
    char out[4096];
    write_chain("damage", NULL);
    assert_int_equal(lb_file_read(path, 64 << 20, &data, &len, NULL), 0);
    for (unsigned i = 0; i < 8; i++) {
        size_t at = len * i / 8 + rnd(len / 8);
        data[at] ^= 0x10;
        assert_int_equal(lb_file_write_atomic(path, data, len, 0600, NULL), 0);
        data[at] ^= 0x10;
        assert_int_equal(run_reader("damage", "", out, sizeof(out)), 1);
        assert_non_null(strstr(out, "not valid: "));
        assert_int_equal(lb_ckpt_verify(path, NULL, true, NULL, NULL, NULL), -1);
    }
}

static int set_up(void **state)
{
    (void)state;
    return mkdtemp(g_dir) ? 0 : -1;
}

static int tear_down(void **state)
{
    (void)state;
    return lb_remove_tree(g_dir, NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(plain),
        cmocka_unit_test(key_file),
        cmocka_unit_test(passphrase),
        cmocka_unit_test(damage),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
