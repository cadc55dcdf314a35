/*
 * core/qemu/ramblocks.c - where guest memory is in QEMU's address space.
 *
 * `info ramblock` names the blocks; QEMU >= 8 prints their addresses too.  For
 * older ones, in this order:
 *   1. a block mapped in guest-physical memory: `info mtree -f` gives an address
 *      and a region name, which is the block's name after the last '/';
 *      `gpa2hva` translates and repeats the name;
 *   2. else the one mapping of exactly the block's size that is followed by a 4 KiB
 *      inaccessible guard page, as QEMU allocates blocks.
 * A name or a size that fits twice is not guessed at: a block that must travel and
 * cannot be located is an error.  Every address is checked against
 * /proc/PID/maps, which also tells what is behind it.
 */
#include "core/qemu/qemu_internal.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/vfs.h>
#include <linux/magic.h>

struct vma {
    uint64_t start, end, offset, inode;
    char perm[5];
};
struct maps {
    struct vma *v;
    size_t n;
};

static int read_maps(pid_t pid, struct maps *out, struct lb_error *err)
{
    char path[64];
    LB_AUTO_FREE char *text = NULL;
    snprintf(path, sizeof(path), "/proc/%d/maps", (int)pid);
    if (lb_file_read(path, 256u << 20, &text, NULL, err) < 0)
        return lb_context(err, "cannot see QEMU's memory map");
    size_t cap = 0;
    *out = (struct maps){0};
    for (char *line = text, *next; line && *line; line = next) {
        next = strchr(line, '\n');
        if (next)
            *next++ = 0;
        struct vma v;
        if (sscanf(line, "%" SCNx64 "-%" SCNx64 " %4s %" SCNx64 " %*s %" SCNu64, &v.start, &v.end,
                   v.perm, &v.offset, &v.inode) != 5)
            continue;
        if (out->n == cap) {
            cap = cap ? cap * 2 : 512;
            out->v = lb_realloc(out->v, cap * sizeof(*out->v));
        }
        out->v[out->n++] = v;
    }
    return 0;
}

static size_t vma_at(const struct maps *m, uint64_t addr)
{
    for (size_t i = 0; i < m->n; i++)
        if (addr >= m->v[i].start && addr < m->v[i].end)
            return i;
    return m->n;
}

/* ------------------------------------------------------- names and sizes */

static bool ends_with(const char *s, const char *end)
{
    size_t a = strlen(s), b = strlen(end);
    return a >= b && strcmp(s + a - b, end) == 0;
}

static const char *leaf(const char *name)
{
    const char *slash = strrchr(name, '/');
    return slash ? slash + 1 : name;
}

/* ROMs are loaded by every QEMU from its own files: they travel only when they
 * differ. Main memory is what memory backends provide; the rest is device RAM. */
static enum lb_ram_kind kind_of(const struct lb_qemu_block *b, const json_t *memdevs)
{
    const char *name = b->pub.name;
    if (strncmp(name, "/rom@", 5) == 0 || ends_with(name, ".rom") || ends_with(name, ".bios") ||
        strcmp(name, "isa-bios") == 0)
        return LB_RAM_ROM;
    size_t i;
    json_t *dev;
    json_array_foreach(memdevs, i, dev)
    {
        const char *id = json_string_value(json_object_get(dev, "id"));
        if (id && (strcmp(id, name) == 0 ||
                   (strncmp(name, "/objects/", 9) == 0 && strcmp(id, name + 9) == 0)))
            return LB_RAM_MAIN;
    }
    if (strcmp(name, "pc.ram") == 0 || strncmp(name, "/objects/", 9) == 0 ||
        strncmp(name, "ram-node", 8) == 0)
        return LB_RAM_MAIN;
    return b->read_only ? LB_RAM_ROM : LB_RAM_DEVICE;
}

/*              Block Name    PSize              Offset               Used              Total  [HVA  RO]
 *                  pc.ram    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000  */
static int parse_line(const char *line, struct lb_qemu_block *b)
{
    char ro[8] = "";
    uint64_t hva = 0;
    *b = (struct lb_qemu_block){.map_fd = -1};
    int n = sscanf(line, " %255s %*u %*s 0x%*x 0x%" SCNx64 " 0x%" SCNx64 " 0x%" SCNx64 " %7s",
                   b->pub.name, &b->pub.size_bytes, &b->total_bytes, &hva, ro);
    if (n < 3)
        return -1;
    b->pub.hva = hva;
    b->read_only = strcmp(ro, "ro") == 0;
    return 0;
}

/* And *mtree: what locate_mapped reads; NULL of a QEMU that prints addresses. */
static int list_blocks(struct lb_hv_vm *vm, char **mtree, struct lb_error *err)
{
    LB_AUTO_FREE char *text = NULL;
    json_t *memdevs = NULL;
    bool ask = vm->version[0] < 8;
    /* all questions before the first answer */
    if (lb_qmp_send_hmp(vm->qmp, "info ramblock", err) < 0 ||
        lb_qmp_send(vm->qmp, "query-memdev", NULL, -1, NULL, err) < 0 ||
        (ask && lb_qmp_send_hmp(vm->qmp, "info mtree -f", err) < 0) ||
        lb_qmp_wait_hmp(vm->qmp, "info ramblock", &text, err) < 0 ||
        lb_qmp_wait(vm->qmp, "query-memdev", LB_QMP_MS, &memdevs, err) < 0 ||
        (ask && lb_qmp_wait_hmp(vm->qmp, "info mtree -f", mtree, err) < 0)) {
        json_decref(memdevs);
        return -1;
    }
    unsigned cap = 0;
    for (char *line = text, *next; line && *line; line = next) {
        next = strchr(line, '\n');
        if (next)
            *next++ = 0;
        struct lb_qemu_block b;
        if (parse_line(line, &b) < 0 || b.pub.size_bytes == 0 || vm->n_blocks == LB_QEMU_MAX_BLOCKS)
            continue;
        b.pub.size_bytes = (b.pub.size_bytes + LB_PAGE_SIZE - 1) & ~(uint64_t)(LB_PAGE_SIZE - 1);
        b.pub.id = vm->n_blocks;
        b.pub.track_bytes = LB_PAGE_SIZE;
        b.pub.kind = kind_of(&b, memdevs);
        if (vm->n_blocks == cap) {
            cap = cap ? cap * 2 : 32;
            vm->blocks = lb_realloc(vm->blocks, cap * sizeof(*vm->blocks));
        }
        vm->blocks[vm->n_blocks++] = b;
    }
    json_decref(memdevs);
    if (vm->n_blocks == 0)
        return lb_fail(err, LB_E_UNSUPPORTED, "cannot understand this QEMU's 'info ramblock'");
    return 0;
}

/* ------------------------------------------------------------- addresses */

/* The only block whose name ends in `region`, or NULL. */
static struct lb_qemu_block *block_of_region(struct lb_hv_vm *vm, const char *region)
{
    struct lb_qemu_block *found = NULL;
    for (unsigned i = 0; i < vm->n_blocks; i++) {
        if (strcmp(leaf(vm->blocks[i].pub.name), region) != 0)
            continue;
        if (found)
            return NULL;
        found = &vm->blocks[i];
    }
    return found;
}

static int gpa2hva(struct lb_hv_vm *vm, uint64_t gpa, const char *region, uint64_t *hva)
{
    LB_AUTO_FREE char *text = NULL;
    char line[64], name[LB_BLOCK_NAME_MAX];
    struct lb_error why;
    snprintf(line, sizeof(line), "gpa2hva 0x%" PRIx64, gpa);
    if (lb_qmp_hmp(vm->qmp, line, &text, &why) < 0)
        return -1;
    /* Host virtual address for 0x0 (pc.ram) is 0x7f... */
    if (sscanf(text, "Host virtual address for 0x%*x (%255[^)]) is 0x%" SCNx64, name, hva) != 2)
        return -1;
    return strcmp(name, region) == 0 ? 0 : -1;
}

/*   0000000000100000-0000000003ffffff (prio 0, ram): pc.ram @0000000000100000 [KVM]  */
static void locate_mapped(struct lb_hv_vm *vm, char *text)
{
    bool memory = false; /* inside the view of address space "memory" */
    for (char *line = text, *next; line && *line; line = next) {
        next = strchr(line, '\n');
        if (next)
            *next++ = 0;
        if (strncmp(line, "FlatView", 8) == 0)
            memory = false;
        if (strncmp(line, " AS \"memory\"", 12) == 0)
            memory = true;
        uint64_t gpa, off = 0, hva;
        char region[LB_BLOCK_NAME_MAX];
        int at = 0;
        if (!memory || sscanf(line, " %" SCNx64 "-%*x (prio %*d, r%*[am/od]): %255s%n", &gpa,
                              region, &at) != 2 || at == 0)
            continue;
        const char *plus = strchr(line + at, '@');
        if (plus)
            sscanf(plus, "@%" SCNx64, &off);
        struct lb_qemu_block *b = block_of_region(vm, region);
        if (!b || b->pub.hva || off >= b->total_bytes)
            continue;
        if (gpa2hva(vm, gpa, region, &hva) == 0)
            b->pub.hva = hva - off;
    }
}

static void locate_by_size(struct lb_hv_vm *vm, const struct maps *m)
{
    for (unsigned i = 0; i < vm->n_blocks; i++) {
        struct lb_qemu_block *b = &vm->blocks[i];
        uint64_t hit = 0;
        unsigned hits = 0, same = 0;
        if (b->pub.hva)
            continue;
        for (unsigned k = 0; k < vm->n_blocks; k++)
            same += !vm->blocks[k].pub.hva && vm->blocks[k].total_bytes == b->total_bytes;
        for (size_t k = 0; k + 1 < m->n; k++) {
            const struct vma *v = &m->v[k], *guard = &m->v[k + 1];
            if (v->end - v->start != b->total_bytes || strncmp(v->perm, "rw", 2) != 0 ||
                guard->start != v->end || guard->end - guard->start != LB_PAGE_SIZE ||
                strncmp(guard->perm, "---", 3) != 0)
                continue;
            bool taken = false;
            for (unsigned t = 0; t < vm->n_blocks; t++)
                taken |= vm->blocks[t].pub.hva == v->start;
            if (!taken) {
                hit = v->start;
                hits++;
            }
        }
        if (hits == 1 && same == 1)
            b->pub.hva = hit;
    }
}

/* --------------------------------------------------------------- backing */

static int look_behind(struct lb_hv_vm *vm, const struct maps *m, struct lb_qemu_block *b,
                       struct lb_error *err)
{
    uint64_t end = b->pub.hva + b->pub.size_bytes;
    size_t i = vma_at(m, b->pub.hva);
    bool shared = i < m->n && m->v[i].perm[3] == 's';
    for (size_t k = i; k < m->n; k++) { /* anonymous memory may be cut into several mappings */
        if (m->v[k].perm[1] != 'w' || (m->v[k].perm[3] == 's') != shared)
            break;
        if (m->v[k].end >= end) {
            end = 0;
            break;
        }
        if (shared || k + 1 == m->n || m->v[k + 1].start != m->v[k].end)
            break;
    }
    if (i == m->n || end != 0) {
        if (b->pub.kind == LB_RAM_ROM) {
            b->pub.hva = 0;
            return 0;
        }
        return lb_fail(err, LB_E_HV, "block %s is not where QEMU says (0x%" PRIx64 ")",
                       b->pub.name, b->pub.hva);
    }
    const struct vma *v = &m->v[i];
    b->pub.backing = shared ? LB_BACK_SHARED : LB_BACK_ANON;
    if (v->inode == 0)
        return 0;

    char path[96];
    snprintf(path, sizeof(path), "/proc/%d/map_files/%" PRIx64 "-%" PRIx64, (int)vm->proc.pid,
             v->start, v->end);
    LB_AUTO_FD int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        fd = open(path, O_RDONLY | O_CLOEXEC);
    struct statfs fs;
    if (fd < 0 || fstatfs(fd, &fs) < 0) {
        lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot open the memory file of block %s",
                      b->pub.name);
        return lb_remedy(err, "lifeboatd needs root (CAP_SYS_ADMIN) for it");
    }
    if (fs.f_type == HUGETLBFS_MAGIC) {
        b->pub.backing = LB_BACK_HUGETLB;
        b->pub.track_bytes = (uint32_t)fs.f_bsize;
    }
    b->map_offset = v->offset + (b->pub.hva - v->start);
    b->file_private = !shared;
    if (!shared) {
        b->map_fd = LB_STEAL_FD(fd);
        return 0;
    }
    int prot = (fcntl(fd, F_GETFL) & O_ACCMODE) == O_RDWR ? PROT_READ | PROT_WRITE : PROT_READ;
    void *p = mmap(NULL, b->pub.size_bytes, prot, MAP_SHARED, fd, (off_t)b->map_offset);
    if (p == MAP_FAILED)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot map block %s", b->pub.name);
    b->pub.map = p;
    b->map_fd = LB_STEAL_FD(fd);
    return 0;
}

void lb_qemu_free_blocks(struct lb_hv_vm *vm)
{
    for (unsigned i = 0; i < vm->n_blocks; i++) {
        if (vm->blocks[i].pub.map)
            munmap(vm->blocks[i].pub.map, vm->blocks[i].pub.size_bytes);
        lb_cleanup_fd(&vm->blocks[i].map_fd);
    }
    free(vm->blocks);
    free(vm->table);
    vm->blocks = NULL;
    vm->table = NULL;
    vm->n_blocks = 0;
}

static int look_behind_all(struct lb_hv_vm *vm, const struct maps *m, struct lb_error *err)
{
    for (unsigned i = 0; i < vm->n_blocks; i++) {
        struct lb_qemu_block *b = &vm->blocks[i];
        if (b->pub.hva && look_behind(vm, m, b, err) < 0)
            return -1;
        if (!b->pub.hva && b->pub.kind != LB_RAM_ROM) {
            lb_fail(err, LB_E_UNSUPPORTED, "cannot locate the memory block %s in QEMU %d.%d",
                    b->pub.name, vm->version[0], vm->version[1]);
            return lb_remedy(err, "two devices of the same kind hide it: use QEMU >= 8, which "
                                  "prints addresses, or remove one of them");
        }
    }
    return 0;
}

/* The table for callers, or nothing. */
static int made(struct lb_hv_vm *vm, int rc)
{
    if (rc < 0) {
        lb_qemu_free_blocks(vm);
        return -1;
    }
    vm->table = lb_alloc(vm->n_blocks * sizeof(*vm->table));
    for (unsigned i = 0; i < vm->n_blocks; i++)
        vm->table[i] = vm->blocks[i].pub;
    return 0;
}

static int find(struct lb_hv_vm *vm, struct maps *m, struct lb_error *err)
{
    LB_AUTO_FREE char *mtree = NULL;
    if (list_blocks(vm, &mtree, err) < 0)
        return -1;
    bool all = true;
    for (unsigned i = 0; i < vm->n_blocks; i++)
        all &= vm->blocks[i].pub.hva != 0;
    if (!all && !mtree && lb_qmp_hmp(vm->qmp, "info mtree -f", &mtree, err) < 0)
        return -1;
    if (!all)
        locate_mapped(vm, mtree);
    if (read_maps(vm->proc.pid, m, err) < 0)
        return -1;
    if (!all)
        locate_by_size(vm, m);
    return look_behind_all(vm, m, err);
}

int lb_qemu_find_blocks(struct lb_hv_vm *vm, struct lb_error *err)
{
    struct maps m = {0};
    int rc = find(vm, &m, err);
    free(m.v);
    return made(vm, rc);
}

int lb_qemu_locate_blocks(struct lb_hv_vm *vm, struct lb_error *err)
{
    struct maps m = {0};
    int rc = read_maps(vm->proc.pid, &m, err);
    if (rc == 0)
        rc = look_behind_all(vm, &m, err);
    free(m.v);
    return made(vm, rc);
}

const struct lb_qemu_block *lb_qemu_block(struct lb_hv_vm *vm, const struct lb_ram_block *blk)
{
    assert(blk->id < vm->n_blocks);
    return &vm->blocks[blk->id];
}
