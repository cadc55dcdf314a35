/* Damage to a checkpoint: every byte flipped, every truncation, parts and headers that belong
 * elsewhere. Whatever it is, verify finds it, and reading gives either the page that was or an
 * error: never another page. */
#include "checkpoint/reader_internal.h"

#include <setjmp.h>
#include <stdarg.h>
#include <sys/mman.h>
#include <cmocka.h>

#include "tests/unit/ckpt_make.h"

#define PAGE LB_PAGE_SIZE
#define PAGES 40u
#define CHUNK 4u

static const struct mk_block g_block[] = {{"pc.ram", 0, PAGES}};
static const uint8_t g_key[] = "0123456789abcdefghijklmnopqrstuv";
static char g_dir[] = "/tmp/lb-test-damage.XXXXXX";
static struct lb_ckpt_key *g_file_key;

/* Memory after the parent and after the increment. */
struct memory {
    uint8_t page[PAGES][PAGE];
};
static struct memory g_now[2];
static bool g_stored[2][PAGES];

/* A file that a test damages. */
struct victim {
    struct mk m;
    int fd;
    char path[32];
};
struct pair {
    struct victim file[2]; /* 0: the parent */
    struct lb_ckpt_key *key;
};
static struct pair g_pair[2]; /* plain, encrypted */

/* ---------------------------------------------------------------- making them */

static void set_page(unsigned file, unsigned page, uint8_t value)
{
    memset(g_now[file].page[page], value, PAGE);
    g_stored[file][page] = value;
}

static void make_memory(void)
{
    for (unsigned p = 0; p < 8; p++)
        set_page(0, p, (uint8_t)(p + 1));
    set_page(0, 20, 3); /* as page 2 */
    memcpy(&g_now[1], &g_now[0], sizeof(g_now[0]));
    memcpy(g_stored[1], g_stored[0], sizeof(g_stored[0]));
    g_now[1].page[1][77] ^= 5;
    set_page(1, 4, 90);
    set_page(1, 30, 91);
    set_page(1, 31, 90);
    set_page(1, 6, 0);
}

static void load(const struct victim *v, const uint8_t *data, size_t len)
{
    if (ftruncate(v->fd, 0) < 0 || pwrite(v->fd, data, len, 0) != (ssize_t)len)
        fail_msg("memfd");
}

static void done(struct victim *v, uint32_t number)
{
    static const uint64_t hot[] = {1, 20};
    char *meta = mk_meta("web", number);
    struct mk_rest rest = {
        .meta = meta, .state = "device state", .state_len = 12, .hot = hot, .n_hot = 2};
    mk_finish(&v->m, &rest);
    free(meta);
    v->fd = memfd_create("victim", MFD_CLOEXEC);
    snprintf(v->path, sizeof(v->path), "/proc/self/fd/%d", v->fd);
    load(v, v->m.buf, v->m.len);
}

static void make_parent(struct victim *v, const uint8_t *key)
{
    static const uint64_t numbers[] = {0, 1, 2, 3, 4, 5, 6, 7};
    mk_begin(&v->m, 1, 0, g_block, 1, CHUNK, key);
    for (unsigned c = 0; c < 2; c++) {
        mk_chunk(&v->m, 0, CHUNK, numbers + c * CHUNK, NULL, g_now[0].page[c * CHUNK], true);
        mk_run(&v->m, 0, MK_WHOLE, c * CHUNK, CHUNK, c, 0, g_now[0].page[c * CHUNK]);
    }
    mk_run(&v->m, 0, MK_WHOLE, 20, 1, 0, 2, g_now[0].page[20]);
    mk_run(&v->m, 0, MK_ZERO, 21, 3, 0, 0, NULL);
    done(v, 1);
}

static void make_child(struct victim *v, const uint8_t *key)
{
    static const uint64_t numbers[] = {1, 4, 30};
    static const uint32_t kinds[] = {1, 0, 0};
    static uint8_t body[3 * PAGE];
    for (unsigned i = 0; i < PAGE; i++)
        body[i] = g_now[1].page[1][i] ^ g_now[0].page[1][i];
    memcpy(body + PAGE, g_now[1].page[4], PAGE);
    memcpy(body + 2 * PAGE, g_now[1].page[30], PAGE);
    mk_begin(&v->m, 2, 1, g_block, 1, CHUNK, key);
    mk_chunk(&v->m, 0, 3, numbers, kinds, body, true);
    mk_run(&v->m, 0, MK_XOR, 1, 1, 0, 0, g_now[1].page[1]);
    mk_run(&v->m, 0, MK_WHOLE, 4, 1, 0, 1, g_now[1].page[4]);
    mk_run(&v->m, 0, MK_WHOLE, 30, 1, 0, 2, g_now[1].page[30]);
    mk_run(&v->m, 0, MK_WHOLE, 31, 1, 0, 1, g_now[1].page[31]);
    mk_run(&v->m, 0, MK_ZERO, 6, 1, 0, 0, NULL);
    done(v, 2);
}

/* ---------------------------------------------------------------- what must hold */

struct check {
    unsigned file, wrong, given;
};

static int compare(unsigned block, uint64_t first, uint64_t count, const void *data, void *arg,
                   struct lb_error *err)
{
    struct check *c = arg;
    (void)err;
    for (uint64_t i = 0; i < count; i++) {
        if (block != 0 || first + i >= PAGES || !g_stored[c->file][first + i] ||
            memcmp(g_now[c->file].page[first + i], (const uint8_t *)data + i * PAGE, PAGE) != 0)
            c->wrong++;
        c->given++;
    }
    return 0;
}

/* Everything one can ask of a chain. True: all of it was answered, and right. */
static bool ask(struct lb_chain *c, unsigned file)
{
    struct check ck = {.file = file};
    struct lb_chain_read_all r = {.threads = 1, .fn = compare, .arg = &ck, .cancel_fd = -1};
    struct lb_error err = LB_ERROR_INIT;
    LB_AUTO_FREE void *state = NULL;
    LB_AUTO_FREE uint64_t *hot = NULL;
    uint64_t n, seed;
    size_t len;
    unsigned stored = 0, failed = 0;

    failed += lb_chain_read_all(c, &r, &err) < 0;
    for (unsigned p = 0; p < PAGES; p++)
        if (g_stored[file][p]) {
            stored++;
            failed += lb_chain_read(c, 0, p, compare, &ck, &err) < 0;
        }
    assert_int_equal(ck.wrong, 0);
    failed += lb_chain_seed(c, &seed, &err) < 0;
    if (lb_chain_state(c, &state, &len, &err) == 0)
        assert_true(len == 12 && memcmp(state, "device state", 12) == 0);
    else
        failed++;
    if (lb_chain_hot(c, &hot, &n, &err) == 0)
        assert_true(n == 2 && hot[0] == 1 && hot[1] == 20);
    else
        failed++;
    assert_true(failed == 0 || (err.code == LB_E_PROTO && err.message[0]));
    assert_true(failed > 0 || ck.given >= 2 * stored);
    return failed == 0;
}

/* The pair as it is now, through the chain whose top is `file`. */
static bool whole(const struct pair *p, unsigned file, struct lb_error *err)
{
    const char *paths[] = {p->file[file].path, p->file[0].path};
    struct lb_chain *c;
    if (lb_chain_open(paths, file + 1, p->key, &c, err) < 0) {
        assert_true(err->code != LB_OK && err->code != LB_E_INTERNAL && err->message[0]);
        return false;
    }
    bool good = ask(c, file);
    lb_chain_close(c);
    return good;
}

static void found_by_verify(const struct pair *p, const struct victim *v, const char *what,
                            size_t at)
{
    struct lb_error err = LB_ERROR_INIT;
    if (lb_ckpt_verify(v->path, p->key, true, NULL, NULL, &err) == 0)
        fail_msg("%s %zu of %zu was not found", what, at, v->m.len);
    assert_true(err.code == LB_E_PROTO || err.code == LB_E_AUTH || err.code == LB_E_UNSUPPORTED);
    assert_true(err.message[0]);
}

static void undamaged(void **state)
{
    (void)state;
    struct lb_error err = LB_ERROR_INIT;
    for (unsigned e = 0; e < 2; e++)
        for (unsigned f = 0; f < 2; f++) {
            assert_true(whole(&g_pair[e], f, &err));
            assert_int_equal(
                lb_ckpt_verify(g_pair[e].file[f].path, g_pair[e].key, true, NULL, NULL, NULL), 0);
        }
}

/* ---------------------------------------------------------------- bytes */

static void flip(struct pair *p, unsigned file)
{
    struct victim *v = &p->file[file];
    unsigned harmless = 0;
    for (size_t i = 0; i < v->m.len; i++) {
        struct lb_error err = LB_ERROR_INIT;
        uint8_t damaged = v->m.buf[i] ^ (uint8_t)(1u << i % 8);
        assert_int_equal(pwrite(v->fd, &damaged, 1, (off_t)i), 1);
        found_by_verify(p, v, "byte", i);
        harmless += whole(p, 1, &err);
        assert_int_equal(pwrite(v->fd, &v->m.buf[i], 1, (off_t)i), 1);
    }
    /* not looked at when reading: gaps of less than 16 bytes between parts */
    assert_true(harmless < v->m.n_parts * 16);
}

static void flipped_bytes(void **state)
{
    (void)state;
    for (unsigned e = 0; e < 2; e++)
        for (unsigned f = 0; f < 2; f++)
            flip(&g_pair[e], f);
}

static void truncations(void **state)
{
    (void)state;
    for (unsigned e = 0; e < 2; e++)
        for (unsigned f = 0; f < 2; f++) {
            const struct victim *v = &g_pair[e].file[f];
            for (size_t len = v->m.len; len-- > 0;) {
                struct lb_error err = LB_ERROR_INIT;
                assert_int_equal(ftruncate(v->fd, (off_t)len), 0);
                found_by_verify(&g_pair[e], v, "length", len);
                assert_false(whole(&g_pair[e], f, &err));
                assert_int_equal(err.code, LB_E_PROTO);
                assert_true(strstr(err.message, len < 4096 ? "is no checkpoint" : "is not whole"));
                if (len % 64)
                    continue;
                /* its length was written, the bytes were not */
                assert_int_equal(ftruncate(v->fd, (off_t)v->m.len), 0);
                found_by_verify(&g_pair[e], v, "zeros from", len);
                assert_false(whole(&g_pair[e], f, &err));
            }
            load(v, v->m.buf, v->m.len);
        }
}

static void longer(void **state)
{
    (void)state;
    for (unsigned e = 0; e < 2; e++) {
        const struct victim *v = &g_pair[e].file[0];
        for (size_t more = 1; more <= 3 * 4096; more = more < 4096 ? 4096 : more + 4096) {
            struct lb_error err = LB_ERROR_INIT;
            assert_int_equal(ftruncate(v->fd, (off_t)(v->m.len + more)), 0);
            found_by_verify(&g_pair[e], v, "more", more);
            assert_false(whole(&g_pair[e], 0, &err));
        }
        load(v, v->m.buf, v->m.len);
    }
}

/* ---------------------------------------------------------------- pieces that belong elsewhere */

static size_t part_bytes(const uint8_t *part)
{
    struct lb_cf_part head;
    memcpy(&head, part, sizeof(head));
    return sizeof(head) + le32toh(head.stored_bytes);
}

static size_t part_at(const struct mk *m, unsigned number)
{
    size_t at = 4096;
    while (number-- > 0)
        at = (at + part_bytes(m->buf + at) + 15) / 16 * 16;
    return at;
}

/* Two chunks of the same length, not compressed: nothing but their numbers tells them apart. */
static void make_twins(struct victim *v, uint8_t id, uint8_t first, const uint8_t *key)
{
    static const uint64_t numbers[] = {0, 1};
    static uint8_t page[PAGE];
    mk_begin(&v->m, id, 0, g_block, 1, CHUNK, key);
    for (unsigned i = 0; i < 2; i++) {
        memset(page, first + (int)i, sizeof(page));
        mk_chunk(&v->m, 0, 1, &numbers[i], NULL, page, false);
        mk_run(&v->m, 0, MK_WHOLE, i, 1, i, 0, page);
    }
    done(v, 3);
}

static void put(uint8_t *to, const struct mk *to_m, unsigned to_part, const struct mk *from,
                unsigned part)
{
    const uint8_t *p = from->buf + part_at(from, part);
    memcpy(to + part_at(to_m, to_part), p, part_bytes(p));
}

struct heard {
    unsigned n;
    char text[3][512];
};
static void hear(const char *what, void *arg)
{
    struct heard *h = arg;
    if (h->n < LB_ARRAY_LEN(h->text))
        snprintf(h->text[h->n], sizeof(h->text[0]), "%s", what);
    h->n++;
}

/* Pages 0 and 1 of a file whose chunk `part` is not its own: none is given but what was, and verify
 * names it. */
static void misplaced(const struct victim *v, struct lb_ckpt_key *key, const uint8_t *data,
                      unsigned n_bad)
{
    const char *paths[] = {v->path};
    struct heard h = {0};
    struct lb_chain *c;
    load(v, data, v->m.len);
    assert_int_equal(lb_ckpt_verify(v->path, key, false, hear, &h, NULL), -1);
    assert_int_equal(h.n, n_bad);
    assert_true(strstr(h.text[n_bad - 1], n_bad == 2
                                              ? "web@3: part 1 (pages 1-1 of pc.ram) is damaged"
                                              : "web@3: part 0 (pages 0-0 of pc.ram) is damaged"));
    assert_int_equal(lb_chain_open(paths, 1, key, &c, NULL), 0);
    for (unsigned page = 0; page < n_bad; page++) {
        struct lb_error err = LB_ERROR_INIT;
        struct check ck = {0};
        assert_int_equal(lb_chain_read(c, 0, page, compare, &ck, &err), -1);
        assert_int_equal(err.code, LB_E_PROTO);
        assert_int_equal(ck.given, 0);
    }
    lb_chain_close(c);
}

static void misplaced_parts(void **state)
{
    (void)state;
    for (unsigned e = 0; e < 2; e++) {
        const uint8_t *key = e ? g_key : NULL;
        struct lb_ckpt_key *k = e ? g_file_key : NULL;
        struct victim v = {0}, other = {0}, before = {0};
        make_twins(&v, 3, 10, key);
        make_twins(&other, 4, 10, key);  /* another file with the same pages */
        make_twins(&before, 3, 20, key); /* the file itself as it was at another time */
        uint8_t *copy = lb_alloc(v.m.len);

        memcpy(copy, v.m.buf, v.m.len);
        put(copy, &v.m, 0, &v.m, 1);
        put(copy, &v.m, 1, &v.m, 0);
        misplaced(&v, k, copy, 2);
        memcpy(copy, v.m.buf, v.m.len);
        put(copy, &v.m, 0, &v.m, 1);
        misplaced(&v, k, copy, 1);
        memcpy(copy, v.m.buf, v.m.len);
        put(copy, &v.m, 0, &other.m, 0);
        misplaced(&v, k, copy, 1);
        memcpy(copy, v.m.buf, v.m.len);
        put(copy, &v.m, 0, &before.m, 0);
        misplaced(&v, k, copy, 1);

        /* the header of another file: nothing fits it */
        struct lb_error err = LB_ERROR_INIT;
        memcpy(copy, v.m.buf, v.m.len);
        memcpy(copy, other.m.buf, 4096);
        load(&v, copy, v.m.len);
        assert_int_equal(lb_ckpt_verify(v.path, k, false, NULL, NULL, &err), -1);
        assert_int_equal(err.code, LB_E_PROTO);
        free(copy);
        close(v.fd);
        close(other.fd);
        close(before.fd);
        mk_free(&v.m);
        mk_free(&other.m);
        mk_free(&before.m);
    }
}

/* All damaged chunks are named, not only the first; the others are still read. */
static void all_are_named(void **state)
{
    (void)state;
    struct pair *p = &g_pair[0];
    struct victim *v = &p->file[0];
    struct heard h = {0};
    struct lb_error err = LB_ERROR_INIT;
    struct check ck = {0};
    const char *paths[] = {v->path};
    struct lb_chain *c;
    uint8_t byte = 0xa5;

    for (unsigned part = 0; part < 2; part++)
        assert_int_equal(pwrite(v->fd, &byte, 1, (off_t)part_at(&v->m, part) + 60), 1);
    assert_int_equal(lb_ckpt_verify(v->path, NULL, false, hear, &h, &err), -1);
    assert_int_equal(h.n, 2);
    assert_string_equal(h.text[0],
                        "web@1: part 0 (pages 0-20 of pc.ram) is damaged: its check is wrong");
    assert_string_equal(h.text[1],
                        "web@1: part 1 (pages 4-7 of pc.ram) is damaged: its check is wrong");
    assert_string_equal(err.message, h.text[0]);
    load(v, v->m.buf, v->m.len);
    assert_int_equal(pwrite(v->fd, &byte, 1, (off_t)part_at(&v->m, 0) + 60), 1);
    assert_int_equal(lb_chain_open(paths, 1, NULL, &c, NULL), 0);
    assert_int_equal(lb_chain_read(c, 0, 20, compare, &ck, &err), -1);
    assert_string_equal(err.message, h.text[0]);
    assert_int_equal(lb_chain_read(c, 0, 5, compare, &ck, NULL), 0);
    assert_true(ck.given == 4 && ck.wrong == 0);
    lb_chain_close(c);
    load(v, v->m.buf, v->m.len);
}

/* ---------------------------------------------------------------- main */

static int set_up(void **state)
{
    (void)state;
    if (!mkdtemp(g_dir))
        return -1;
    LB_AUTO_FREE char *path = lb_asprintf("%s/key", g_dir);
    if (lb_file_write_atomic(path, g_key, 32, 0600, NULL) < 0 ||
        lb_ckpt_key_file(path, &g_file_key, NULL) < 0)
        return -1;
    make_memory();
    for (unsigned e = 0; e < 2; e++) {
        make_parent(&g_pair[e].file[0], e ? g_key : NULL);
        make_child(&g_pair[e].file[1], e ? g_key : NULL);
        g_pair[e].key = e ? g_file_key : NULL;
    }
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    for (unsigned e = 0; e < 2; e++)
        for (unsigned f = 0; f < 2; f++) {
            close(g_pair[e].file[f].fd);
            mk_free(&g_pair[e].file[f].m);
        }
    lb_ckpt_key_free(g_file_key);
    return lb_remove_tree(g_dir, NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(undamaged),       cmocka_unit_test(flipped_bytes),
        cmocka_unit_test(truncations),     cmocka_unit_test(longer),
        cmocka_unit_test(misplaced_parts), cmocka_unit_test(all_are_named),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
