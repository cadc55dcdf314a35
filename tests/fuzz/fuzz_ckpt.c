/* A checkpoint file as somebody with good checksums could write it.
 *
 * Input: a file as it is when it begins with the magic. Else: one octet (bit 0: an increment, on a
 * parent made here), one octet number of blocks, u16 number of runs, then parts (u8 kind, u8 bit 0
 * zstd, u16 length, octets unpacked); header, part table, checks and trailer are made here.
 *
 * Whatever is said to be readable is read, in every way, and must stay within the blocks that the
 * file says it has. */
#include "checkpoint/reader_internal.h"
#include "tests/unit/ckpt_make.h"

#include <assert.h>
#include <sys/mman.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define MAX_PAGES (UINT64_C(1) << 16)
#define PAGE_IN_CHUNK (16 + LB_PAGE_SIZE)

static const struct mk_block g_block[] = {{"pc.ram", 0, 64}};

static unsigned get16(const uint8_t *p)
{
    return p[0] | (unsigned)p[1] << 8;
}

/* Blocks as big as it pleases are legal, and take their time: nothing to learn from. */
static bool too_big(const uint8_t *index, size_t len, unsigned n_blocks)
{
    uint64_t total = 0;
    for (; n_blocks > 0 && len >= 16; n_blocks--) {
        uint32_t name;
        uint64_t pages;
        memcpy(&name, index, 4);
        memcpy(&pages, index + 8, 8);
        if (pages > MAX_PAGES)
            return true;
        total += pages;
        if (name > len - 16)
            break;
        index += 16 + name;
        len -= 16 + name;
    }
    return total > MAX_PAGES;
}

static void add_table(struct mk *m, uint8_t t[112])
{
    struct mk table = {0};
    uint8_t entry[20];
    for (uint32_t i = 0; i < m->n_chunks; i++) {
        mk_put32(entry, m->stored[i]);
        memcpy(entry + 4, m->checks[i], 16);
        mk_append(&table, entry, sizeof(entry));
    }
    mk_put64(t, mk_section(m, MK_PARTS, &table));
    mk_free(&table);
}

static void add_part(struct mk *m, unsigned kind, bool zstd, const uint8_t *data, size_t len,
                     uint8_t t[112])
{
    static const uint8_t at_of[] = {
        [MK_INDEX] = 8, [MK_HASHES] = 16, [MK_HOT] = 24, [MK_STATE] = 32, [MK_META] = 40};
    static const uint8_t none[8];
    uint32_t pages = kind == MK_PAGES ? (uint32_t)(len / PAGE_IN_CHUNK) : 0;
    m->n_chunks += kind == MK_PAGES;
    m->n_pages += pages;
    if (kind > MK_PAGES && memcmp(t + at_of[kind], none, sizeof(none)) == 0)
        mk_put64(t + at_of[kind], (m->len + 15) / 16 * 16);
    mk_part(m, kind, zstd, data, len, pages);
}

/* Chunks go first in the file, whatever their place in the input: the index is near the beginning
 * there, where a replay damages the most. */
static bool add_parts(struct mk *m, const uint8_t *data, size_t size, bool chunks, uint8_t t[112])
{
    while (size >= 4) {
        unsigned kind = data[0] % 7;
        size_t len = LB_MIN(get16(data + 2), size - 4);
        if (kind == MK_INDEX && too_big(data + 4, len, m->n_blocks))
            return false;
        if ((kind == MK_PAGES) == chunks)
            add_part(m, kind, data[1] & 1, data + 4, len, t);
        data += 4 + len;
        size -= 4 + len;
    }
    return true;
}

static int new_file(const void *data, size_t len, char path[32])
{
    int fd = memfd_create("fuzz", MFD_CLOEXEC);
    if (fd < 0 || write(fd, data, len) != (ssize_t)len)
        abort();
    snprintf(path, 32, "/proc/self/fd/%d", fd);
    return fd;
}

static int make_parent(char path[32])
{
    static uint8_t pages[4 * MK_PAGE];
    static const uint64_t numbers[] = {0, 1, 2, 3};
    struct mk m;
    char *meta = mk_meta("web", 1);
    struct mk_rest rest = {.meta = meta, .state = "state", .state_len = 5};
    memset(pages, 7, sizeof(pages));
    mk_begin(&m, 1, 0, g_block, 1, 4, NULL);
    mk_chunk(&m, 0, 4, numbers, NULL, pages, true);
    mk_run(&m, 0, MK_WHOLE, 0, 4, 0, 0, pages);
    mk_finish(&m, &rest);
    int fd = new_file(m.buf, m.len, path);
    mk_free(&m);
    free(meta);
    return fd;
}

struct ask {
    const struct lb_ckpt_block *blocks;
    unsigned n_blocks;
    uint64_t given;
    unsigned sum;
};

static int take(unsigned block, uint64_t first, uint64_t count, const void *data, void *arg,
                struct lb_error *err)
{
    struct ask *a = arg;
    (void)err;
    assert(block < a->n_blocks && count > 0 && first + count <= a->blocks[block].n_pages);
    a->given += count;
    for (uint64_t i = 0; i < count * LB_PAGE_SIZE; i += 64) /* all of it is there */
        a->sum += ((const uint8_t *)data)[i];
    return 0;
}

static void read_it(struct lb_chain *c)
{
    struct ask a = {0};
    struct lb_error err = LB_ERROR_INIT;
    struct lb_chain_read_all r = {.threads = 1, .fn = take, .arg = &a, .cancel_fd = -1};
    uint64_t stored = 0, seed, *hot, n_hot;
    void *state;
    size_t len;

    a.blocks = lb_chain_blocks(c, &a.n_blocks);
    for (unsigned b = 0; b < a.n_blocks; b++) {
        struct lb_bitmap bits;
        if (lb_bitmap_init(&bits, a.blocks[b].n_pages, NULL) < 0)
            abort();
        assert(lb_chain_populated(c, b, &bits, NULL) == 0);
        stored += lb_bitmap_count(&bits);
        for (uint64_t p = 0, n; lb_bitmap_next_run(&bits, p, 1, &p, &n); p += n)
            if (lb_chain_read(c, b, p, take, &a, &err) < 0)
                assert(err.code == LB_E_PROTO && err.message[0]);
        lb_bitmap_free(&bits);
    }
    a.given = 0;
    if (lb_chain_read_all(c, &r, &err) < 0)
        assert(err.code == LB_E_PROTO && err.message[0]);
    else
        assert(a.given == stored);
    if (lb_chain_seed(c, &seed, &err) < 0)
        assert(err.code == LB_E_PROTO && err.message[0]);
    if (lb_chain_state(c, &state, &len, &err) == 0)
        free(state);
    if (lb_chain_hot(c, &hot, &n_hot, &err) == 0)
        free(hot);
}

static void try_file(const uint8_t *data, size_t size)
{
    static char parent[32];
    static int parent_fd = -1;
    char path[32];
    int fd = new_file(data, size, path);
    const char *paths[] = {path, parent};
    struct lb_error err = LB_ERROR_INIT;
    struct lb_ckpt_info info;
    struct lb_chain *c;

    if (parent_fd < 0)
        parent_fd = make_parent(parent);
    int known = lb_ckpt_info(path, NULL, &info, &err);
    assert(known == 0 || (err.code != LB_OK && err.message[0]));
    unsigned n = info.parent.b[0] ? 2 : 1;
    lb_ckpt_info_free(&info);
    if (lb_chain_open(paths, n, NULL, &c, &err) == 0) {
        assert(known == 0);
        read_it(c);
        lb_chain_close(c);
    }
    lb_ckpt_verify(path, NULL, true, NULL, NULL, &err);
    close(fd);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct mk m;
    uint8_t t[112] = {0};

    if (size >= 8 && memcmp(data, LB_CF_MAGIC, 8) == 0) {
        try_file(data, size);
        return 0;
    }
    if (size < 4)
        return 0;
    mk_begin(&m, 2, data[0] & 1, g_block, data[1] ? data[1] : 1, 4, NULL);
    bool good = add_parts(&m, data + 4, size - 4, true, t);
    if (good) {
        add_table(&m, t);
        add_parts(&m, data + 4, size - 4, false, t);
        m.n_runs = get16(data + 2);
        mk_trailer(&m, t);
        m.n_runs = 0; /* it has none of its own */
        try_file(m.buf, m.len);
    }
    mk_free(&m);
    return 0;
}
