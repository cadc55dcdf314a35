/* Reading checkpoints, against a plain model of the memory: chains, differences, pages of the same
 * content, zeros; one page, all pages, by one thread and by several; what is said of files that are
 * not what they should be. The files are made by ckpt_make.h. */
#include "checkpoint/reader_internal.h"

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <cmocka.h>

#include "tests/unit/ckpt_make.h"

#define PAGE LB_PAGE_SIZE
#define FILES 5u
#define CHUNK 8u

static const struct mk_block g_blocks[] = {
    {"pc.ram", 0, 1000}, {"vga.vram", 1, 64}, {"pc.rom", 2, 16}};
#define N_BLOCKS ((unsigned)LB_ARRAY_LEN(g_blocks))
#define TOTAL_PAGES 1080u
static const uint64_t g_hot[] = {UINT64_C(1) << 40 | 63, 999, 0, UINT64_C(2) << 40};

static char g_dir[] = "/tmp/lb-test-reader.XXXXXX";
static const uint8_t g_key[] = "0123456789abcdefghijklmnopqrstuv";
static struct lb_ckpt_key *g_file_key;

/* ---------------------------------------------------------------- the model */

struct page {
    uint8_t b[PAGE];
    bool whole;  /* the nearest file that names it has it whole */
    bool stored; /* not zeros */
    int file;    /* that names it; -1: none */
};
/* Memory as it is after each file; pages of all blocks one after the other. */
struct model {
    struct page *after[FILES];
    char path[FILES][512];
    struct lb_ckpt_key *key;
};
static struct model g_models[2]; /* plain, encrypted */

static uint64_t g_rng = 11;
static uint64_t rnd(uint64_t below)
{
    g_rng = g_rng * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (g_rng >> 33) % below;
}

static unsigned index_of(unsigned block, uint64_t page)
{
    return (unsigned)page + (block > 0 ? 1000 : 0) + (block > 1 ? 64 : 0);
}

/* Some compress, some do not; no two are the same. */
static void new_content(uint8_t *b)
{
    bool noise = rnd(3) > 0;
    for (unsigned i = 0; i < PAGE; i++)
        b[i] = noise ? (uint8_t)rnd(256) : (uint8_t)(i / 64);
    mk_put64(b, g_rng | 1);
}

struct making {
    struct mk m;
    /* the chunk that is being filled */
    uint32_t n, block, kinds[CHUNK];
    bool dead[CHUNK];
    uint64_t numbers[CHUNK];
    uint8_t body[CHUNK * PAGE], content[CHUNK * PAGE];
    /* a page that is in the file whole */
    bool has_same;
    uint32_t same_part, same_slot;
    uint8_t same[PAGE];
};

/* One run for each stretch of neighbours of a kind; none for what was written again. */
static void close_chunk(struct making *k)
{
    if (k->n == 0)
        return;
    uint32_t part =
        mk_chunk(&k->m, k->block, k->n, k->numbers, k->kinds, k->body, k->m.n_chunks % 4 > 0);
    for (uint32_t i = 0, n; i < k->n; i += n) {
        for (n = 1; i + n < k->n && k->numbers[i + n] == k->numbers[i] + n &&
                    k->kinds[i + n] == k->kinds[i] && !k->dead[i] && !k->dead[i + n];
             n++)
            ;
        if (k->dead[i])
            continue;
        mk_run(&k->m, k->block, k->kinds[i] ? MK_XOR : MK_WHOLE, k->numbers[i], n, part, i,
               k->content + (size_t)i * PAGE);
        if (!k->kinds[i]) {
            k->has_same = true;
            k->same_part = part;
            k->same_slot = i;
            memcpy(k->same, k->content + (size_t)i * PAGE, PAGE);
        }
    }
    k->n = 0;
}

static void add_page(struct making *k, unsigned block, uint64_t page, const uint8_t *content,
                     const uint8_t *base, bool dead)
{
    if (k->n == CHUNK || (k->n && k->block != block))
        close_chunk(k);
    uint8_t *body = k->body + (size_t)k->n * PAGE;
    k->block = block;
    k->numbers[k->n] = page;
    k->kinds[k->n] = base ? 1 : 0;
    k->dead[k->n] = dead;
    memcpy(k->content + (size_t)k->n * PAGE, content, PAGE);
    for (unsigned i = 0; i < PAGE; i++)
        body[i] = content[i] ^ (base ? base[i] : 0);
    k->n++;
}

static void change_page(struct making *k, unsigned block, uint64_t page, struct page *p, int file)
{
    uint8_t old[PAGE];
    unsigned what = (unsigned)rnd(20);
    memcpy(old, p->b, PAGE);
    p->file = file;
    if (what < 2) {
        memset(p->b, 0, PAGE);
        p->whole = p->stored = false;
        mk_run(&k->m, block, MK_ZERO, page, 1, 0, 0, NULL);
        return;
    }
    if (what < 5 && k->has_same) {
        memcpy(p->b, k->same, PAGE);
        p->whole = p->stored = true;
        mk_run(&k->m, block, MK_WHOLE, page, 1, k->same_part, k->same_slot, p->b);
        return;
    }
    if (what == 5) {
        new_content(p->b);
        add_page(k, block, page, p->b, NULL, true);
    }
    bool differs = what > 10 && file > 0 && p->stored && p->whole;
    if (differs) {
        memcpy(p->b, old, PAGE);
        p->b[rnd(PAGE)] ^= 1;
    } else {
        new_content(p->b);
    }
    add_page(k, block, page, p->b, differs ? old : NULL, false);
    p->whole = !differs;
    p->stored = true;
}

static void finish(struct mk *m, const char *path, uint32_t number)
{
    LB_AUTO_FREE char *meta = mk_meta("web", number);
    struct mk_rest rest = {.meta = meta, .state = "the state of devices", .state_len = 20};
    if (number % 2) {
        rest.hot = g_hot;
        rest.n_hot = LB_ARRAY_LEN(g_hot);
        m->split = 1000;
    }
    mk_finish(m, &rest);
    mk_write(m, path);
    mk_free(m);
}

static void make_file(struct model *model, unsigned file, const uint8_t *key)
{
    struct making *k = lb_alloc(sizeof(*k));
    struct page *now = lb_alloc(TOTAL_PAGES * sizeof(*now));

    model->after[file] = now;
    for (unsigned i = 0; i < TOTAL_PAGES; i++)
        now[i].file = -1;
    if (file)
        memcpy(now, model->after[file - 1], TOTAL_PAGES * sizeof(*now));
    mk_begin(&k->m, (uint8_t)(file + 1), (uint8_t)file, g_blocks, N_BLOCKS, CHUNK, key);
    for (unsigned b = 0; b < N_BLOCKS; b++)
        for (uint64_t p = 0; p < g_blocks[b].n_pages; p++)
            if (rnd(100) < (file ? 12 : 80))
                change_page(k, b, p, &now[index_of(b, p)], (int)file);
    close_chunk(k);
    finish(&k->m, model->path[file], file + 1);
    free(k);
}

/* paths, the checkpoint first */
static struct lb_chain *open_chain(const struct model *m, unsigned top)
{
    const char *paths[FILES];
    struct lb_chain *c = NULL;
    struct lb_error err = LB_ERROR_INIT;
    for (unsigned i = 0; i <= top; i++)
        paths[i] = m->path[top - i];
    if (lb_chain_open(paths, top + 1, m->key, &c, &err) < 0)
        fail_msg("%s", err.message);
    return c;
}

/* ---------------------------------------------------------------- reading */

/* What came; compared when it comes, from any thread. */
struct seen {
    const struct page *now;
    atomic_uint wrong, calls, last_calls[TOTAL_PAGES];
    unsigned fail_at; /* 0: never */
};

static int take(unsigned block, uint64_t first, uint64_t count, const void *data, void *arg,
                struct lb_error *err)
{
    struct seen *s = arg;
    if (atomic_fetch_add(&s->calls, 1) + 1 == s->fail_at)
        return lb_fail(err, LB_E_HV, "no more");
    for (uint64_t i = 0; i < count; i++) {
        unsigned at = index_of(block, first + i);
        if (first + i >= g_blocks[block].n_pages || !s->now[at].stored ||
            memcmp(s->now[at].b, (const uint8_t *)data + i * PAGE, PAGE) != 0)
            atomic_fetch_add(&s->wrong, 1);
        else
            atomic_fetch_add(&s->last_calls[at], 1);
    }
    return 0;
}

static void seen_all_once(const struct seen *s)
{
    assert_int_equal(s->wrong, 0);
    for (unsigned i = 0; i < TOTAL_PAGES; i++)
        assert_int_equal(s->last_calls[i], s->now[i].stored);
}

static void every_page(void **state)
{
    (void)state;
    for (unsigned e = 0; e < 2; e++)
        for (unsigned top = 0; top < FILES; top++) {
            struct lb_chain *c = open_chain(&g_models[e], top);
            assert_int_equal(lb_chain_depth(c), top + 1);
            for (unsigned how = 0; how < 4; how++) {
                struct seen s = {.now = g_models[e].after[top]};
                struct lb_error err = LB_ERROR_INIT;
                struct lb_chain_read_all r = {.threads = how + how / 2,
                                              .fn = take,
                                              .arg = &s,
                                              .cancel_fd = -1,
                                              .dont_cache = how % 2};
                if (lb_chain_read_all(c, &r, &err) < 0)
                    fail_msg("%s", err.message);
                seen_all_once(&s);
            }
            lb_chain_close(c);
        }
}

/* The page that was asked for is in the first call, nothing comes twice. */
struct one {
    struct seen s;
    uint64_t block, page;
    bool first_has;
};

static int take_one(unsigned block, uint64_t first, uint64_t count, const void *data, void *arg,
                    struct lb_error *err)
{
    struct one *o = arg;
    if (o->s.calls == 0)
        o->first_has = block == o->block && first <= o->page && o->page < first + count;
    return take(block, first, count, data, &o->s, err);
}

static void one_page(void **state)
{
    (void)state;
    struct one *o = lb_alloc(sizeof(*o));
    unsigned along = 0, pages = 0;
    for (unsigned e = 0; e < 2; e++) {
        struct lb_chain *c = open_chain(&g_models[e], FILES - 1);
        const struct page *now = g_models[e].after[FILES - 1];
        for (unsigned b = 0; b < N_BLOCKS; b++)
            for (uint64_t p = 0; p < g_blocks[b].n_pages; p++) {
                struct lb_error err = LB_ERROR_INIT;
                *o = (struct one){.s.now = now, .block = b, .page = p};
                if (!now[index_of(b, p)].stored) {
                    assert_int_equal(lb_chain_read(c, b, p, take_one, o, &err), -1);
                    continue;
                }
                if (lb_chain_read(c, b, p, take_one, o, &err) < 0)
                    fail_msg("%s", err.message);
                assert_int_equal(o->s.wrong, 0);
                assert_true(o->first_has);
                for (unsigned i = 0; i < TOTAL_PAGES; i++) {
                    assert_true(o->s.last_calls[i] <= 1);
                    along += o->s.last_calls[i];
                }
                pages++;
            }
        lb_chain_close(c);
    }
    assert_true(along > 3 * pages); /* neighbours came along */
    free(o);
}

struct reader {
    struct lb_chain *c;
    const struct page *now;
    unsigned seed, wrong;
};

static void *read_at_random(void *arg)
{
    struct reader *r = arg;
    struct seen *s = lb_alloc(sizeof(*s));
    uint64_t x = r->seed;
    s->now = r->now;
    for (unsigned i = 0; i < 400; i++) {
        x = x * UINT64_C(6364136223846793005) + 1;
        uint64_t p = (x >> 33) % 1000;
        if (r->now[p].stored && lb_chain_read(r->c, 0, p, take, s, NULL) < 0)
            s->wrong++;
    }
    r->wrong = s->wrong;
    free(s);
    return NULL;
}

static void several_readers(void **state)
{
    (void)state;
    struct lb_chain *c = open_chain(&g_models[0], FILES - 1);
    struct reader r[4];
    pthread_t th[4];
    for (unsigned i = 0; i < 4; i++) {
        r[i] = (struct reader){.c = c, .now = g_models[0].after[FILES - 1], .seed = i};
        assert_int_equal(pthread_create(&th[i], NULL, read_at_random, &r[i]), 0);
    }
    for (unsigned i = 0; i < 4; i++) {
        pthread_join(th[i], NULL);
        assert_int_equal(r[i].wrong, 0);
    }
    lb_chain_close(c);
}

/* One content under the names of many pages is given in bounded pieces. */
static void many_of_one(void **state)
{
    (void)state;
    static const struct mk_block block = {"pc.ram", 0, 20000};
    struct mk m;
    uint8_t page[PAGE];
    LB_AUTO_FREE char *path = lb_asprintf("%s/many.lbc", g_dir);
    const char *paths[] = {path};
    struct lb_chain *c;
    uint64_t number = 0;

    memset(page, 0xcc, PAGE);
    mk_begin(&m, 9, 0, &block, 1, 1, NULL);
    mk_chunk(&m, 0, 1, &number, NULL, page, true);
    for (unsigned p = 0; p < block.n_pages; p++)
        mk_run(&m, 0, MK_WHOLE, p, 1, 0, 0, page);
    finish(&m, path, 1);
    assert_int_equal(lb_chain_open(paths, 1, NULL, &c, NULL), 0);
    struct seen *s = lb_alloc(sizeof(*s));
    struct page same = {.stored = true};
    memcpy(same.b, page, PAGE);
    struct page *now = lb_alloc(TOTAL_PAGES * sizeof(*now));
    for (unsigned i = 0; i < TOTAL_PAGES; i++)
        now[i] = same;
    s->now = now;
    assert_int_equal(lb_chain_read(c, 0, 500, take, s, NULL), 0);
    assert_int_equal(s->last_calls[500], 1);
    assert_true(s->wrong == 0 && s->calls <= 4);
    uint64_t seen = 0;
    struct lb_chain_read_all r = {.threads = 2, .fn = take, .arg = s, .cancel_fd = -1};
    s->calls = 0;
    memset(s->last_calls, 0, sizeof(s->last_calls));
    assert_int_equal(lb_chain_read_all(c, &r, NULL), 0);
    for (unsigned i = 0; i < 1000; i++)
        seen += s->last_calls[i];
    assert_int_equal(seen, 1000);
    assert_true(s->calls >= block.n_pages / LB_CF_MAX_CHUNK_PAGES);
    lb_chain_close(c);
    assert_int_equal(lb_ckpt_verify(path, NULL, true, NULL, NULL, NULL), 0);
    free(now);
    free(s);
}

static bool skip_odd(unsigned block, uint64_t page, void *arg)
{
    (void)block;
    (void)arg;
    return page % 2;
}

static void ends_early(void **state)
{
    (void)state;
    struct lb_chain *c = open_chain(&g_models[0], FILES - 1);
    const struct page *now = g_models[0].after[FILES - 1];
    struct lb_error err = LB_ERROR_INIT;
    struct seen s = {.now = now};
    struct lb_chain_read_all r = {
        .threads = 2, .fn = take, .arg = &s, .cancel_fd = -1, .skip = skip_odd};

    assert_int_equal(lb_chain_read_all(c, &r, &err), 0);
    assert_int_equal(s.wrong, 0);
    for (unsigned b = 0; b < N_BLOCKS; b++)
        for (uint64_t p = 0; p < g_blocks[b].n_pages; p++)
            assert_int_equal(s.last_calls[index_of(b, p)],
                             p % 2 == 0 && now[index_of(b, p)].stored);

    r.skip = NULL;
    s.fail_at = s.calls + 5;
    assert_int_equal(lb_chain_read_all(c, &r, &err), -1);
    assert_int_equal(err.code, LB_E_HV);

    int fd = eventfd(1, EFD_CLOEXEC);
    s = (struct seen){.now = now};
    r.cancel_fd = fd;
    assert_int_equal(lb_chain_read_all(c, &r, &err), -1);
    assert_int_equal(err.code, LB_E_CANCELLED);
    assert_int_equal(s.calls, 0);
    close(fd);
    lb_chain_close(c);
}

/* ---------------------------------------------------------------- what there is */

static void facts(void **state)
{
    (void)state;
    for (unsigned e = 0; e < 2; e++)
        for (unsigned top = 0; top < FILES; top++) {
            struct lb_chain *c = open_chain(&g_models[e], top);
            const struct lb_ckpt_info *info = lb_chain_info(c);
            struct stat st;
            struct lb_ckpt_info alone;
            unsigned n;
            const struct lb_ckpt_block *blocks = lb_chain_blocks(c, &n);
            void *buf;
            size_t len;
            uint64_t *hot, n_hot;

            assert_int_equal(stat(g_models[e].path[top], &st), 0);
            assert_int_equal(lb_ckpt_info(g_models[e].path[top], g_models[e].key, &alone, NULL), 0);
            assert_memory_equal(&alone.id, &info->id, sizeof(alone.id));
            assert_int_equal(alone.id.b[5], top + 1);
            assert_int_equal(alone.parent.b[15], top);
            assert_int_equal(alone.encrypted, e);
            assert_int_equal(alone.key_kind, e ? LB_KEY_FILE : LB_KEY_NONE);
            assert_int_equal(alone.file_bytes, st.st_size);
            assert_int_equal(alone.stats.pages, 77);
            assert_int_equal(alone.stats.file_bytes, st.st_size);
            assert_string_equal(alone.meta.vm, "web");
            assert_int_equal(alone.meta.number, top + 1);
            lb_ckpt_info_free(&alone);

            assert_int_equal(n, N_BLOCKS);
            for (unsigned b = 0; b < n; b++) {
                assert_string_equal(blocks[b].name, g_blocks[b].name);
                assert_int_equal(blocks[b].n_pages, g_blocks[b].n_pages);
                assert_int_equal(blocks[b].kind, g_blocks[b].kind);
            }
            assert_int_equal(lb_chain_state(c, &buf, &len, NULL), 0);
            assert_int_equal(len, 20);
            assert_memory_equal(buf, "the state of devices", 20);
            free(buf);
            assert_int_equal(lb_chain_hot(c, &hot, &n_hot, NULL), 0);
            assert_int_equal(n_hot, top % 2 ? 0 : LB_ARRAY_LEN(g_hot));
            if (n_hot)
                assert_memory_equal(hot, g_hot, sizeof(g_hot));
            free(hot);
            lb_chain_close(c);
        }
}

static void bits(void **state)
{
    (void)state;
    struct lb_chain *c = open_chain(&g_models[0], FILES - 1);
    const struct page *now = g_models[0].after[FILES - 1];
    for (unsigned b = 0; b < N_BLOCKS; b++) {
        struct lb_bitmap stored, named;
        assert_int_equal(lb_bitmap_init(&stored, g_blocks[b].n_pages, NULL), 0);
        assert_int_equal(lb_chain_populated(c, b, &stored, NULL), 0);
        for (uint64_t p = 0; p < g_blocks[b].n_pages; p++)
            assert_int_equal(lb_bitmap_test(&stored, p), now[index_of(b, p)].stored);
        lb_bitmap_free(&stored);
        for (unsigned files = 0; files < FILES; files++) {
            assert_int_equal(lb_bitmap_init(&named, g_blocks[b].n_pages, NULL), 0);
            assert_int_equal(lb_chain_named(c, b, files, &named, NULL), 0);
            for (uint64_t p = 0; p < g_blocks[b].n_pages; p++)
                assert_int_equal(lb_bitmap_test(&named, p),
                                 now[index_of(b, p)].file >= (int)(FILES - files));
            lb_bitmap_free(&named);
        }
    }
    struct lb_bitmap small;
    assert_int_equal(lb_bitmap_init(&small, 3, NULL), 0);
    assert_int_equal(lb_chain_populated(c, 0, &small, NULL), -1);
    assert_int_equal(lb_chain_named(c, N_BLOCKS, 1, &small, NULL), -1);
    lb_bitmap_free(&small);
    lb_chain_close(c);
}

static void hashes(void **state)
{
    (void)state;
    struct lb_chain *c = open_chain(&g_models[1], FILES - 1);
    const struct page *now = g_models[1].after[FILES - 1];
    uint64_t seed;
    unsigned differences = 0;

    assert_int_equal(lb_chain_seed(c, &seed, NULL), 0);
    assert_int_equal(seed, UINT64_C(0x0123456789abcdef));
    assert_int_equal(lb_chain_seed(c, &seed, NULL), 0);
    for (unsigned b = 0; b < N_BLOCKS; b++)
        for (uint64_t p = 0; p < g_blocks[b].n_pages; p++) {
            const struct page *is = &now[index_of(b, p)];
            uint8_t got[16], want[16];
            bool whole = false;
            assert_int_equal(lb_chain_hash(c, b, p, got, &whole), is->stored);
            if (!is->stored)
                continue;
            mk_hash(want, is->b, PAGE, seed);
            assert_memory_equal(got, want, sizeof(got));
            assert_int_equal(whole, is->whole);
            differences += !whole;
        }
    assert_true(differences > 50);
    lb_chain_close(c);
}

static void none_found(const char *what, void *arg)
{
    (void)arg;
    fail_msg("%s", what);
}

static void verified(void **state)
{
    (void)state;
    for (unsigned e = 0; e < 2; e++)
        for (unsigned f = 0; f < FILES; f++)
            for (int deep = 0; deep < 2; deep++)
                assert_int_equal(lb_ckpt_verify(g_models[e].path[f], g_models[e].key, deep,
                                                none_found, NULL, NULL),
                                 0);
}

/* What is open stays readable, whatever becomes of the names. */
static void unlinked(void **state)
{
    (void)state;
    struct model *m = &g_models[0];
    struct lb_chain *c = open_chain(m, 1);
    LB_AUTO_FREE char *away = lb_asprintf("%s/away", g_dir);
    assert_int_equal(rename(m->path[0], away), 0);
    assert_int_equal(link(m->path[1], m->path[0]), 0);
    for (int direct = 0; direct < 2; direct++) {
        struct seen s = {.now = m->after[1]};
        struct lb_chain_read_all r = {.fn = take, .arg = &s, .cancel_fd = -1, .dont_cache = direct};
        assert_int_equal(lb_chain_read_all(c, &r, NULL), 0);
        seen_all_once(&s);
    }
    lb_chain_close(c);
    assert_int_equal(rename(away, m->path[0]), 0);
}

/* ---------------------------------------------------------------- refused */

static void refused(const char *const *paths, unsigned n, const struct lb_ckpt_key *key,
                    enum lb_errcode code, const char *text)
{
    struct lb_chain *c = NULL;
    struct lb_error err = LB_ERROR_INIT;
    assert_int_equal(lb_chain_open(paths, n, key, &c, &err), -1);
    if (err.code != code || !strstr(err.message, text))
        fail_msg("not what was expected: %s: %s", lb_errcode_name(err.code), err.message);
}

static void wrong_chains(void **state)
{
    (void)state;
    const struct model *m = &g_models[0];
    LB_AUTO_FREE char *gone = lb_asprintf("%s/gone.lbc", g_dir);
    const char *missing[] = {m->path[2], m->path[1]}, *skipped[] = {m->path[2], m->path[0]};
    const char *lost[] = {m->path[2], gone}, *more[] = {m->path[0], m->path[1]},
               *nothing[] = {gone};
    refused(missing, 2, NULL, LB_E_NOT_FOUND,
            "the parent of web@2 (id 01010101010101010101010101010101) is missing");
    refused(skipped, 2, NULL, LB_E_NOT_FOUND,
            "the parent of web@3 (id 02020202020202020202020202020202) is missing");
    refused(skipped, 2, NULL, LB_E_NOT_FOUND, "web@1");
    refused(lost, 2, NULL, LB_E_NOT_FOUND, "the parent of web@3");
    refused(more, 2, NULL, LB_E_USAGE, "web@1 is a full checkpoint");
    refused(nothing, 1, NULL, LB_E_NOT_FOUND, "gone.lbc");
}

static void wrong_keys(void **state)
{
    (void)state;
    const char *paths[] = {g_models[1].path[0]};
    LB_AUTO_FREE char *other = lb_asprintf("%s/other.key", g_dir);
    struct lb_ckpt_key *wrong, *pass;
    struct lb_ckpt_info info;
    struct lb_error err = LB_ERROR_INIT;

    assert_int_equal(
        lb_file_write_atomic(other, "0123456789abcdefghijklmnopqrstu!", 32, 0600, NULL), 0);
    assert_int_equal(lb_ckpt_key_file(other, &wrong, NULL), 0);
    assert_int_equal(lb_ckpt_key_passphrase("0123", 4, &pass, NULL), 0);
    refused(paths, 1, wrong, LB_E_AUTH, "wrong key");
    refused(paths, 1, pass, LB_E_AUTH, "is encrypted with a key file");
    refused(paths, 1, NULL, LB_E_AUTH, "is encrypted");
    assert_int_equal(lb_ckpt_info(paths[0], NULL, &info, &err), -1);
    assert_int_equal(err.code, LB_E_AUTH);
    assert_true(info.encrypted && info.id.b[0] == 1 && info.key_kind == LB_KEY_FILE &&
                info.file_bytes > 0);
    lb_ckpt_info_free(&info);
    assert_int_equal(lb_ckpt_verify(paths[0], wrong, false, NULL, NULL, &err), -1);
    assert_int_equal(err.code, LB_E_AUTH);
    lb_ckpt_key_free(wrong);
    lb_ckpt_key_free(pass);
}

/* A file of two chunks, plain: page 0..3 of pc.ram in the first, page 8 and a difference of 9 (when
 * it has a parent) in the second. Runs are the caller's. */
static void small_file(struct mk *m, uint8_t id, uint8_t parent)
{
    static uint8_t pages[4 * PAGE];
    static const uint64_t first[] = {0, 1, 2, 3}, second[] = {8, 9};
    const uint32_t kinds[] = {0, parent ? 1 : 0};
    memset(pages, id, sizeof(pages));
    mk_begin(m, id, parent, g_blocks, N_BLOCKS, CHUNK, NULL);
    mk_chunk(m, 0, 4, first, NULL, pages, true);
    mk_chunk(m, 0, 2, second, kinds, pages, true);
}

struct bad_run {
    uint32_t block, kind;
    uint64_t first;
    uint32_t count, part, slot;
    const char *text;
};

static void small_finish(struct mk *m, const char *path)
{
    finish(m, path, m->id[0]);
}

static void bad_runs(void **state)
{
    (void)state;
    static const struct bad_run bad[] = {
        {3, 1, 0, 1, 0, 0, "unknown block"},
        {0, 3, 0, 1, 0, 0, "unknown block or kind"},
        {0, 1, 999, 2, 0, 0, "within its block"},
        {0, 0, 1000, 1, 0, 0, "within its block"},
        {0, 1, 5, 0, 0, 0, "within its block"},
        {0, 1, 0, 1, 2, 0, "in no chunk"},
        {0, 1, 0, 4, 0, 5, "in no chunk"},
        {0, 2, 0, 1, 0, 0, "from nothing"},
        {0, 0, UINT64_MAX, 2, 0, 0, "within its block"},
    };
    LB_AUTO_FREE char *path = lb_asprintf("%s/bad.lbc", g_dir);
    const char *paths[] = {path};
    static uint8_t content[8 * PAGE];
    struct mk m;
    for (size_t i = 0; i < LB_ARRAY_LEN(bad); i++) {
        const struct bad_run *b = &bad[i];
        small_file(&m, 1, 0);
        mk_run(&m, b->block, b->kind, b->first, b->count, b->part, b->slot, content);
        small_finish(&m, path);
        refused(paths, 1, NULL, LB_E_PROTO, b->text);
        assert_int_equal(lb_ckpt_verify(path, NULL, false, NULL, NULL, NULL), -1);
    }
    small_file(&m, 1, 0);
    mk_run(&m, 0, MK_WHOLE, 0, 3, 0, 0, content);
    mk_run(&m, 0, MK_ZERO, 2, 3, 0, 0, NULL);
    small_finish(&m, path);
    refused(paths, 1, NULL, LB_E_PROTO, "not in order");
}

struct heard {
    unsigned n;
    char text[4][512];
};
static void hear(const char *what, void *arg)
{
    struct heard *h = arg;
    if (h->n < LB_ARRAY_LEN(h->text))
        snprintf(h->text[h->n], sizeof(h->text[0]), "%s", what);
    h->n++;
}

/* The index says something of a chunk that is not so: known when the chunk is there, and then
 * nothing of it is used. */
static void bad_slots(void **state)
{
    (void)state;
    static const struct bad_run bad[] = {
        {0, 1, 100, 2, 1, 1, "names a page that is not in it"},
        {0, 1, 9, 1, 1, 1, "difference"},
        {0, 2, 8, 1, 1, 0, "difference"},
        {0, 2, 10, 1, 1, 1, "difference"},
    };
    LB_AUTO_FREE char *parent = lb_asprintf("%s/parent.lbc", g_dir);
    LB_AUTO_FREE char *child = lb_asprintf("%s/child.lbc", g_dir);
    const char *paths[] = {child, parent};
    static uint8_t content[16 * PAGE];
    struct mk m;
    memset(content, 1, sizeof(content));
    small_file(&m, 1, 0);
    mk_run(&m, 0, MK_WHOLE, 0, 4, 0, 0, content);
    mk_run(&m, 0, MK_WHOLE, 8, 2, 1, 0, content);
    mk_run(&m, 0, MK_WHOLE, 10, 2, 0, 0, content);
    small_finish(&m, parent);
    memset(content, 2, sizeof(content));
    for (size_t i = 0; i < LB_ARRAY_LEN(bad); i++) {
        const struct bad_run *b = &bad[i];
        struct lb_chain *c;
        struct lb_error err = LB_ERROR_INIT;
        struct heard h = {0};
        struct seen s = {.now = g_models[0].after[0]};
        small_file(&m, 2, 1);
        mk_run(&m, b->block, b->kind, b->first, b->count, b->part, b->slot, content);
        small_finish(&m, child);
        assert_int_equal(lb_chain_open(paths, 2, NULL, &c, &err), 0);
        assert_int_equal(lb_chain_read(c, 0, b->first + b->count - 1, take, &s, &err), -1);
        assert_int_equal(err.code, LB_E_PROTO);
        assert_int_equal(s.calls, 0);
        if (!strstr(err.message, "web@2: part 1 (pages ") || !strstr(err.message, "of pc.ram"))
            fail_msg("%s", err.message);
        struct lb_chain_read_all r = {.threads = 1, .fn = take, .arg = &s, .cancel_fd = -1};
        assert_int_equal(lb_chain_read_all(c, &r, &err), -1);
        lb_chain_close(c);
        assert_int_equal(lb_ckpt_verify(child, NULL, true, hear, &h, &err), -1);
        assert_int_equal(h.n, 1);
        if (!strstr(h.text[0], b->text))
            fail_msg("%s", h.text[0]);
    }
    /* a difference from a page that the parent does not store whole */
    small_file(&m, 2, 1);
    mk_run(&m, 0, MK_XOR, 20, 1, 1, 1, content);
    small_finish(&m, child);
    refused(paths, 2, NULL, LB_E_PROTO, "not stored whole");
}

static void rewrite(const char *path, size_t at, const void *data, size_t len, bool seal)
{
    char *buf;
    size_t n;
    assert_int_equal(lb_file_read(path, 64 << 20, &buf, &n, NULL), 0);
    memcpy(buf + at, data, len);
    if (seal)
        mk_seal_header((uint8_t *)buf);
    assert_int_equal(lb_file_write_atomic(path, buf, n, 0600, NULL), 0);
    free(buf);
}

static void strangers(void **state)
{
    (void)state;
    LB_AUTO_FREE char *path = lb_asprintf("%s/strange.lbc", g_dir);
    const char *paths[] = {path}, *dir[] = {g_dir};
    struct mk m;
    static const struct {
        size_t at;
        uint32_t value;
        enum lb_errcode code;
        const char *text;
    } bad[] = {
        {0, 0x11111111, LB_E_PROTO, "is no checkpoint"},
        {8, 2, LB_E_UNSUPPORTED, "version 2"},
        {12, 4, LB_E_PROTO, "flag"},
        {12, 2, LB_E_PROTO, "ids"},
        {48, 8192, LB_E_PROTO, "sizes"},
        {56, 0, LB_E_PROTO, "sizes"},
        {56, 257, LB_E_PROTO, "sizes"},
        {60, 0, LB_E_PROTO, "memory blocks"},
        {60, 4097, LB_E_PROTO, "memory blocks"},
        {64, 1, LB_E_PROTO, "kind of key"},
        {64, 3, LB_E_PROTO, "kind of key"},
        {68, 1, LB_E_PROTO, "zeros"},
        {88, 17, LB_E_PROTO, "absurd"},
        {100, 1, LB_E_PROTO, "absurd"},
        {4000, 1, LB_E_PROTO, "zeros"},
        {60, 2, LB_E_PROTO, "index"},
    };
    for (size_t i = 0; i < LB_ARRAY_LEN(bad); i++) {
        uint8_t v[4];
        small_file(&m, 1, 0);
        small_finish(&m, path);
        mk_put32(v, bad[i].value);
        rewrite(path, bad[i].at, v, sizeof(v), true);
        refused(paths, 1, NULL, bad[i].code, bad[i].text);
    }
    refused(dir, 1, NULL, LB_E_PROTO, "is no checkpoint");
    assert_int_equal(lb_file_write_atomic(path, "LBCKPT1\n", 8, 0600, NULL), 0);
    refused(paths, 1, NULL, LB_E_PROTO, "is no checkpoint");
}

static void different_blocks(void **state)
{
    (void)state;
    static const struct mk_block others[][3] = {
        {{"pc.ram", 0, 1001}, {"vga.vram", 1, 64}, {"pc.rom", 2, 16}},
        {{"pc.ram", 0, 1000}, {"vga.vram", 1, 64}, {"pc.row", 2, 16}},
        {{"pc.ram", 0, 1000}, {"vga.vram", 0, 64}, {"pc.rom", 2, 16}},
    };
    LB_AUTO_FREE char *path = lb_asprintf("%s/others.lbc", g_dir);
    const char *paths[] = {path, g_models[0].path[0]};
    struct lb_chain *c;
    struct mk m;
    uint64_t seed;
    struct lb_error err = LB_ERROR_INIT;
    for (size_t i = 0; i < LB_ARRAY_LEN(others); i++) {
        mk_begin(&m, 2, 1, others[i], N_BLOCKS, CHUNK, NULL);
        finish(&m, path, 2);
        refused(paths, 2, NULL, LB_E_PROTO, "same memory blocks");
    }
    mk_begin(&m, 2, 1, g_blocks, N_BLOCKS, CHUNK, NULL);
    m.seed++;
    finish(&m, path, 2);
    assert_int_equal(lb_chain_open(paths, 2, NULL, &c, NULL), 0);
    assert_int_equal(lb_chain_seed(c, &seed, &err), -1);
    assert_int_equal(err.code, LB_E_PROTO);
    lb_chain_close(c);
}

/* A hash that is not the page's: only a deep look finds it. */
static void wrong_hash(void **state)
{
    (void)state;
    LB_AUTO_FREE char *path = lb_asprintf("%s/hash.lbc", g_dir);
    static uint8_t content[4 * PAGE];
    struct heard h = {0};
    struct mk m;
    small_file(&m, 1, 0);
    memset(content, 1, sizeof(content));
    content[2 * PAGE] = 7;
    mk_run(&m, 0, MK_WHOLE, 0, 4, 0, 0, content);
    small_finish(&m, path);
    assert_int_equal(lb_ckpt_verify(path, NULL, false, hear, &h, NULL), 0);
    assert_int_equal(lb_ckpt_verify(path, NULL, true, hear, &h, NULL), -1);
    assert_int_equal(h.n, 1);
    assert_string_equal(
        h.text[0],
        "web@1: part 0 (pages 0-3 of pc.ram) is damaged: a page is not what its hash says");
}

/* The same for a difference: only with its parent. */
static void wrong_difference(void **state)
{
    (void)state;
    LB_AUTO_FREE char *parent = lb_asprintf("%s/parent.lbc", g_dir);
    LB_AUTO_FREE char *child = lb_asprintf("%s/child.lbc", g_dir);
    const char *paths[] = {child, parent};
    static uint8_t content[2 * PAGE];
    struct heard h = {0};
    struct lb_error err = LB_ERROR_INIT;
    struct lb_chain *c;
    struct mk m;

    memset(content, 1, sizeof(content));
    small_file(&m, 1, 0);
    mk_run(&m, 0, MK_WHOLE, 8, 2, 1, 0, content);
    small_finish(&m, parent);
    for (uint8_t good = 0; good < 2; good++) {
        memset(content, good ? 1 ^ 2 : 4, sizeof(content)); /* what the child stores is all 2 */
        small_file(&m, 2, 1);
        mk_run(&m, 0, MK_XOR, 9, 1, 1, 1, content);
        small_finish(&m, child);
        assert_int_equal(lb_ckpt_verify(child, NULL, true, none_found, NULL, NULL), 0);
        assert_int_equal(lb_chain_open(paths, 2, NULL, &c, NULL), 0);
        assert_int_equal(lb_chain_verify(c, hear, &h, -1, &err), good ? 0 : -1);
        lb_chain_close(c);
    }
    assert_int_equal(h.n, 1);
    assert_string_equal(h.text[0], "web@2: page 9 of pc.ram is not what its hash says");
    assert_string_equal(err.message, h.text[0]);
    for (unsigned e = 0; e < 2; e++) {
        c = open_chain(&g_models[e], FILES - 1);
        assert_int_equal(lb_chain_verify(c, none_found, NULL, -1, NULL), 0);
        lb_chain_close(c);
    }
}

/* ---------------------------------------------------------------- main */

static int set_up(void **state)
{
    (void)state;
    if (!mkdtemp(g_dir))
        return -1;
    char *path = lb_asprintf("%s/key", g_dir);
    if (lb_file_write_atomic(path, g_key, 32, 0600, NULL) < 0 ||
        lb_ckpt_key_file(path, &g_file_key, NULL) < 0)
        return -1;
    free(path);
    for (unsigned e = 0; e < 2; e++)
        for (unsigned f = 0; f < FILES; f++) {
            snprintf(g_models[e].path[f], sizeof(g_models[e].path[f]), "%s/%s-%u.lbc", g_dir,
                     e ? "enc" : "plain", f);
            g_models[e].key = e ? g_file_key : NULL;
            make_file(&g_models[e], f, e ? g_key : NULL);
        }
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    for (unsigned e = 0; e < 2; e++)
        for (unsigned f = 0; f < FILES; f++)
            free(g_models[e].after[f]);
    lb_ckpt_key_free(g_file_key);
    return lb_remove_tree(g_dir, NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_page),
        cmocka_unit_test(one_page),
        cmocka_unit_test(several_readers),
        cmocka_unit_test(many_of_one),
        cmocka_unit_test(ends_early),
        cmocka_unit_test(facts),
        cmocka_unit_test(bits),
        cmocka_unit_test(hashes),
        cmocka_unit_test(verified),
        cmocka_unit_test(unlinked),
        cmocka_unit_test(wrong_chains),
        cmocka_unit_test(wrong_keys),
        cmocka_unit_test(bad_runs),
        cmocka_unit_test(bad_slots),
        cmocka_unit_test(strangers),
        cmocka_unit_test(different_blocks),
        cmocka_unit_test(wrong_hash),
        cmocka_unit_test(wrong_difference),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
