/* Helpers of test_ckpt_catalog.c (unit and integration): checkpoints of a small invented machine, and what each has
 * to hold. */
#ifndef CKPT_UTIL_H
#define CKPT_UTIL_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <string.h>
#include <sys/stat.h>

#include "checkpoint/catalog.h"
#include "tests/lib/check.h"

#define FAILS(call, want)                                                                         \
    do {                                                                                          \
        struct lb_error e_ = LB_ERROR_INIT;                                                       \
        struct lb_error *err = &e_;                                                               \
        if ((call) >= 0)                                                                          \
            fail_msg("%s did not fail", #call);                                                   \
        if (err->code != (want))                                                                  \
            fail_msg("%s: %s, code %s", #call, err->message, lb_errcode_name(err->code));         \
        last_error = e_;                                                                          \
    } while (0)

enum { MAIN_PAGES = 200, VRAM_PAGES = 8, PAGES = MAIN_PAGES + VRAM_PAGES };

static const struct lb_ckpt_block test_blocks[] = {
    {.name = "pc.ram", .n_pages = MAIN_PAGES, .kind = LB_RAM_MAIN},
    {.name = "vga.vram", .n_pages = VRAM_PAGES, .kind = LB_RAM_DEVICE},
};

/* The machine: a number per page, from which its bytes follow; 0 is a page of zeros. */
struct machine {
    uint32_t page[PAGES];
};

static inline void page_bytes(uint32_t content, uint8_t out[LB_PAGE_SIZE])
{
    memset(out, 0, LB_PAGE_SIZE);
    /* Even ones differ in a few bytes from their neighbours: worth a difference. */
    uint32_t x = content & 1 ? content * 2654435761u : 12345;
    for (unsigned i = 0; content && i < LB_PAGE_SIZE; i += 4) {
        x = x * 1664525 + 1013904223;
        memcpy(out + i, &x, 4);
    }
    if (content)
        memcpy(out + 100, &content, 4);
}

/* Some pages change: to something new, to zeros, to what another page has, back to an old content. */
static inline void machine_step(struct machine *m, unsigned *seed)
{
    for (unsigned i = 0; i < PAGES / 6; i++) {
        uint32_t *p = &m->page[(unsigned)rand_r(seed) % PAGES];
        switch (rand_r(seed) % 5) {
        case 0: *p = 0; break;
        case 1: *p = m->page[(unsigned)rand_r(seed) % PAGES]; break;
        case 2: *p = 1 + (unsigned)rand_r(seed) % 40; break;
        default: *p = 1000 + (unsigned)rand_r(seed) % 100000; break;
        }
    }
}

static inline void put_machine(struct lb_ckpt_writer *w, const struct machine *m)
{
    for (unsigned b = 0, at = 0; b < LB_ARRAY_LEN(test_blocks); at += (unsigned)test_blocks[b].n_pages, b++) {
        for (unsigned first = 0; first < test_blocks[b].n_pages;) {
            uint32_t pages[LB_CKPT_CHUNK_PAGES];
            unsigned n = 0;
            struct lb_error why = LB_ERROR_INIT;
            char *buf = lb_ckpt_buffer(w, &why);
            if (!buf)
                fail_msg("%s", why.message);
            for (; n < LB_CKPT_CHUNK_PAGES && first < test_blocks[b].n_pages; n++, first++) {
                pages[n] = first;
                page_bytes(m->page[at + first], (uint8_t *)buf + (size_t)n * LB_PAGE_SIZE);
            }
            OK(lb_ckpt_put(w, b, pages, n, buf, err));
        }
    }
}

static const char test_state[] = "state of the devices";

static inline struct lb_vm_desc test_desc(void)
{
    static char *argv[] = {(char *)"/usr/bin/qemu-system-x86_64", NULL};
    static char *none[] = {NULL};
    return (struct lb_vm_desc){.name = (char *)"web", .hypervisor = (char *)"qemu", .hv_version = (char *)"7.2.22",
                               .emulator = argv[0], .argv = argv, .cwd = (char *)"/", .uid = geteuid(),
                               .gid = getegid(), .machine = (char *)"pc-i440fx-7.2", .accel = (char *)"tcg",
                               .cpu_model = (char *)"max-x86_64-cpu", .vcpus = 1, .ram_bytes = MAIN_PAGES * LB_PAGE_SIZE,
                               .uuid = (char *)"", .features = none, .blockers = none,
                               .kernel_release = (char *)"6.1"};
}

/* A checkpoint of m at path; `on`: the one it stands on, or NULL. */
static inline void write_checkpoint(const char *path, const struct machine *m, const struct lb_ckpt_meta *meta,
                                    struct lb_chain *on, struct lb_ckpt_key *key)
{
    struct lb_ckpt_create c = {.path = path, .blocks = test_blocks, .n_blocks = LB_ARRAY_LEN(test_blocks),
                               .parent = on, .key = key, .threads = 1};
    struct lb_ckpt_writer *w = NULL;
    const uint64_t hot[] = {7, 3, UINT64_C(1) << 40 | 2};
    OK(lb_ckpt_create(&c, &w, err));
    put_machine(w, m);
    OK(lb_ckpt_put_hot(w, hot, LB_ARRAY_LEN(hot), err));
    OK(lb_ckpt_commit(w, meta, test_state, sizeof(test_state), NULL, err));
}

/* The next checkpoint of vm in the catalog, on the latest one unless full. */
static inline uint32_t take(const char *dir, const char *vm, const struct machine *m, const char *label, bool full,
                            struct lb_ckpt_key *key, struct lb_ckpt_disk *disks, unsigned n_disks)
{
    struct lb_ckpt_meta meta = {.created_ms = lb_wall_ms(), .pause_ms = 3, .desc = test_desc(), .disks = disks,
                                .n_disks = n_disks};
    struct lb_ckpt_entry latest;
    struct lb_chain *on = NULL;
    char path[512];
    OK(lb_catalog_next(dir, vm, &meta.number, path, err));
    snprintf(meta.vm, sizeof(meta.vm), "%s", vm);
    snprintf(meta.label, sizeof(meta.label), "%s", label);
    if (!full && lb_catalog_latest(dir, vm, key, &latest, NULL) == 0) {
        OK(lb_catalog_open(dir, &latest, key, &on, err));
        lb_ckpt_entry_free(&latest);
    }
    write_checkpoint(path, m, &meta, on, key);
    lb_chain_close(on);
    return meta.number;
}

struct seen {
    struct machine m;
    pthread_mutex_t lock;
};

static inline int see_pages(unsigned block, uint64_t first, uint64_t count, const void *data, void *arg,
                            struct lb_error *err)
{
    struct seen *s = arg;
    uint8_t want[LB_PAGE_SIZE];
    for (uint64_t i = 0; i < count; i++) {
        const uint8_t *have = (const uint8_t *)data + i * LB_PAGE_SIZE;
        uint32_t content;
        memcpy(&content, have + 100, 4);
        page_bytes(content, want);
        if (!content || memcmp(have, want, LB_PAGE_SIZE))
            return lb_fail(err, LB_E_INTERNAL, "page %" PRIu64 " of block %u is nothing that was ever written",
                           first + i, block);
        pthread_mutex_lock(&s->lock);
        s->m.page[(block ? MAIN_PAGES : 0) + first + i] = content;
        pthread_mutex_unlock(&s->lock);
    }
    return 0;
}

static inline void chain_holds(struct lb_chain *c, const struct machine *m)
{
    struct seen s = {.lock = PTHREAD_MUTEX_INITIALIZER};
    struct lb_chain_read_all all = {.threads = 1, .fn = see_pages, .arg = &s, .cancel_fd = -1};
    LB_AUTO_FREE void *state = NULL;
    LB_AUTO_FREE uint64_t *hot = NULL;
    uint64_t n_hot;
    size_t len;
    OK(lb_chain_read_all(c, &all, err));
    for (unsigned i = 0; i < PAGES; i++)
        if (s.m.page[i] != m->page[i])
            fail_msg("page %u is %u, not %u", i, s.m.page[i], m->page[i]);
    OK(lb_chain_state(c, &state, &len, err));
    assert_int_equal(len, sizeof(test_state));
    assert_memory_equal(state, test_state, len);
    OK(lb_chain_hot(c, &hot, &n_hot, err));
    assert_int_equal(n_hot, 3);
    assert_int_equal(hot[0], 7);
}

static inline void no_damage(const char *what, void *arg)
{
    (void)arg;
    fail_msg("%s", what);
}

/* ref can be restored to exactly m, and every byte of its files is right. */
static inline void holds(const char *dir, const char *ref, const struct lb_ckpt_key *key, const struct machine *m)
{
    struct lb_ckpt_entry e;
    struct lb_chain *c = NULL;
    OK(lb_catalog_find(dir, ref, key, &e, err));
    if (!e.readable)
        fail_msg("%s: %s", ref, e.error.message);
    OK(lb_catalog_open(dir, &e, key, &c, err));
    assert_int_equal(e.depth, lb_chain_depth(c));
    chain_holds(c, m);
    lb_chain_close(c);
    OK(lb_ckpt_verify(e.path, key, true, no_damage, NULL, err));
    lb_ckpt_entry_free(&e);
}

static inline unsigned files_in(const char *dir, const char *vm, const char *part)
{
    LB_AUTO_FREE char *cmd = lb_asprintf("ls -A %s/%s | grep -c -- '%s'", dir, vm, part);
    FILE *f = popen(cmd, "re");
    unsigned n = 0;
    assert_non_null(f);
    assert_int_equal(fscanf(f, "%u", &n), 1);
    pclose(f);
    return n;
}

#endif
