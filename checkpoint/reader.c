/* checkpoint/reader.c - one checkpoint file, open for reading.
 *
 * From both ends: the header says whose it is and gives the key; the last bytes say where the
 * trailer is; the trailer says where the sections behind the chunks begin.  Their heads are few and
 * are walked; the chunks' heads are not: PARTS has where each one is and its check, so that opening
 * a file of any size reads a few hundred kilobytes.
 *
 * No number out of the file is believed before it is compared with a limit, and no byte of a part
 * is used before its check is right.  A file that has been cut off has no trailer, and says so. */
#include "checkpoint/reader_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <sodium.h>
#include <string.h>
#include <sys/stat.h>
#include <xxhash.h>

#define PART_BYTES sizeof(struct lb_cf_part)
/* The trailer part, the end, and less than a page between them. */
#define MAX_TAIL_BYTES (2 * LB_CF_FILE_ALIGN)

static const uint8_t g_zeros[MAX_TAIL_BYTES];

const char *lb_cf_kind_name(uint32_t kind)
{
    static const char *const names[] = {"",       "chunk",     "index",
                                        "hashes", "hot pages", "device state",
                                        "meta",   "trailer",   "part table"};
    return kind < LB_ARRAY_LEN(names) ? names[kind] : "";
}

int lb_cf_pread(int fd, const char *name, void *buf, size_t len, uint64_t at, struct lb_error *err)
{
    uint8_t *p = buf;
    while (len > 0) {
        ssize_t n = pread(fd, p, len, (off_t)at);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot read %s at byte %llu", name,
                                 (unsigned long long)at);
        if (n == 0)
            return lb_fail(err, LB_E_PROTO, "%s is too short: it ends before byte %llu", name,
                           (unsigned long long)at);
        p += n;
        at += (uint64_t)n;
        len -= (size_t)n;
    }
    return 0;
}

static int damaged(const struct lb_cf_file *f, const char *what, struct lb_error *err)
{
    return lb_fail(err, LB_E_PROTO, "%s is damaged: %s", f->name, what);
}

/* ---------------------------------------------------------------- header */

static const char *header_fault(const struct lb_cf_header *h)
{
    uint32_t flags = le32toh(h->flags), pages = le32toh(h->chunk_pages),
             blocks = le32toh(h->n_blocks);
    uint32_t kind = le32toh(h->key_kind);
    bool parent = memcmp(h->parent, g_zeros, sizeof(h->parent)) != 0;

    if (flags & ~(uint32_t)(LB_CF_ENCRYPTED | LB_CF_INCREMENT))
        return "the header has a flag that is not known";
    if (memcmp(h->id, g_zeros, sizeof(h->id)) == 0 || parent != !!(flags & LB_CF_INCREMENT))
        return "the header's ids";
    if (le64toh(h->page_bytes) != LB_PAGE_SIZE || pages < 1 || pages > LB_CF_MAX_CHUNK_PAGES)
        return "the header's sizes of pages and chunks";
    if (blocks < 1 || blocks > LB_CF_MAX_BLOCKS)
        return "the header's number of memory blocks";
    if (kind > LB_KEY_PASSPHRASE || (kind != LB_KEY_NONE) != !!(flags & LB_CF_ENCRYPTED))
        return "the header's kind of key";
    if (le64toh(h->ops_limit) > LB_CF_MAX_ARGON_OPS ||
        le64toh(h->mem_limit) > LB_CF_MAX_ARGON_BYTES)
        return "the header asks for an absurd effort to make a key";
    if (h->zero != 0 || memcmp(h->zeros, g_zeros, sizeof(h->zeros)) != 0)
        return "the header has something where zeros have to be";
    return NULL;
}

static int read_header(struct lb_cf_file *f, struct lb_error *err)
{
    struct lb_cf_header *h = &f->head;
    uint8_t check[16];
    const char *fault;

    if (f->bytes < LB_CF_HEADER_BYTES || lb_cf_pread(f->fd, f->name, h, sizeof(*h), 0, err) < 0 ||
        memcmp(h->magic, LB_CF_MAGIC, sizeof(h->magic)) != 0)
        return lb_fail(err, LB_E_PROTO, "%s is no checkpoint", f->name);
    if (le32toh(h->version) != LB_CF_VERSION) {
        lb_fail(err, LB_E_UNSUPPORTED,
                "%s has version %u of the format, this program reads version %u", f->name,
                le32toh(h->version), LB_CF_VERSION);
        return lb_remedy(err, "use the release of lifeboat that made it, or a later one");
    }
    lb_cf_hash(check, h, offsetof(struct lb_cf_header, check), 0);
    if (memcmp(check, h->check, sizeof(check)) != 0)
        return damaged(f, "the header's checksum is wrong", err);
    fault = header_fault(h);
    if (fault)
        return damaged(f, fault, err);
    f->chunk_pages = le32toh(h->chunk_pages);
    f->n_blocks = le32toh(h->n_blocks);
    f->increment = le32toh(h->flags) & LB_CF_INCREMENT;
    memcpy(f->info.id.b, h->id, sizeof(h->id));
    memcpy(f->info.parent.b, h->parent, sizeof(h->parent));
    f->info.encrypted = le32toh(h->flags) & LB_CF_ENCRYPTED;
    f->info.key_kind = (enum lb_key_kind)le32toh(h->key_kind);
    f->info.file_bytes = f->bytes;
    return 0;
}

static int open_key(struct lb_cf_file *f, const struct lb_ckpt_key *key, struct lb_error *err)
{
    struct lb_key_slot slot = {
        .kind = f->info.key_kind,
        .ops_limit = le64toh(f->head.ops_limit),
        .mem_limit = le64toh(f->head.mem_limit),
    };
    memcpy(f->seal.id, f->head.id, sizeof(f->seal.id));
    if (!f->info.encrypted)
        return 0;
    memcpy(slot.salt, f->head.salt, sizeof(slot.salt));
    memcpy(slot.nonce, f->head.nonce, sizeof(slot.nonce));
    memcpy(slot.wrapped, f->head.wrapped, sizeof(slot.wrapped));
    if (sodium_init() < 0 || !(f->data_key = sodium_malloc(32)))
        return lb_fail(err, LB_E_NO_SPACE, "no guarded memory for the key of %s", f->name);
    f->seal.encrypted = true;
    f->seal.data_key = f->data_key;
    if (lb_ckpt_key_open(key, &slot, &f->head, LB_CF_BIND_BYTES, f->data_key, err) < 0)
        return lb_context(err, "%s", f->name);
    return 0;
}

/* ---------------------------------------------------------------- parts */

const char *lb_cf_head_fault(const struct lb_cf_file *f, const struct lb_cf_part *head,
                             uint32_t number, uint64_t at, uint64_t limit)
{
    uint32_t kind = le32toh(head->kind), flags = le32toh(head->flags), n = le32toh(head->n_pages);
    uint64_t stored = le32toh(head->stored_bytes), unpacked = le32toh(head->unpacked_bytes);
    uint64_t table = le32toh(head->table_bytes);

    if (le32toh(head->magic) != LB_CF_PART_MAGIC || kind < LB_CF_PAGES || kind > LB_CF_PARTS)
        return "it does not begin as a part";
    if (le32toh(head->number) != number)
        return "it has the number of another part";
    if (flags & ~(uint32_t)LB_CF_ZSTD || (!flags && stored != unpacked))
        return "its flags or sizes";
    if (stored > LB_CF_MAX_PART_BYTES || unpacked > LB_CF_MAX_PART_BYTES ||
        at + PART_BYTES + stored > limit)
        return "its size";
    if (kind != LB_CF_PAGES && (n || table))
        return "it has pages and is no chunk";
    if (kind == LB_CF_PAGES &&
        (n < 1 || n > f->chunk_pages || table != n * sizeof(struct lb_cf_page) ||
         unpacked != table + (uint64_t)n * LB_PAGE_SIZE))
        return "its number of pages";
    return NULL;
}

const char *lb_cf_unpack(const struct lb_cf_file *f, const struct lb_cf_part *head, void *stored,
                         void *out, ZSTD_DCtx *z)
{
    size_t len = le32toh(head->stored_bytes), want = le32toh(head->unpacked_bytes);

    if (!(le32toh(head->flags) & LB_CF_ZSTD))
        return lb_cf_open_part(&f->seal, head, stored, out) ? NULL : "its check is wrong";
    if (!lb_cf_open_part(&f->seal, head, stored, stored))
        return "its check is wrong";
    /* Sealed by whoever has the key, but not by this program: exactly one frame of the size that
     * the head says. An unknown size comes back as one of zstd's two huge error values. */
    if (ZSTD_getFrameContentSize(stored, len) != want ||
        ZSTD_findFrameCompressedSize(stored, len) != len ||
        ZSTD_decompressDCtx(z, out, want, stored, len) != want)
        return "it does not unpack to what its head says";
    return NULL;
}

/* One part of a section, unpacked to out, which has room for max bytes. */
static int section_part(const struct lb_cf_file *f, enum lb_cf_part_kind kind, uint32_t number,
                        uint64_t *at, uint8_t *out, uint64_t max, uint64_t *len, ZSTD_DCtx *z,
                        struct lb_error *err)
{
    struct lb_cf_part head;
    LB_AUTO_FREE uint8_t *stored = NULL;
    const char *fault = NULL;

    if (lb_cf_pread(f->fd, f->name, &head, sizeof(head), *at, err) < 0)
        return -1;
    fault = lb_cf_head_fault(f, &head, number, *at, f->trailer_at);
    *len = le32toh(head.unpacked_bytes);
    if (!fault && (le32toh(head.kind) != kind || *len > max))
        fault = "it is another part than before";
    if (!fault) {
        size_t n = le32toh(head.stored_bytes);
        stored = malloc(n + 1);
        if (!stored)
            return lb_fail(err, LB_E_NO_SPACE, "no memory for the %s of %s", lb_cf_kind_name(kind),
                           f->name);
        if (lb_cf_pread(f->fd, f->name, stored, n, *at + PART_BYTES, err) < 0)
            return -1;
        fault = lb_cf_unpack(f, &head, stored, out, z);
    }
    if (fault)
        return lb_fail(err, LB_E_PROTO, "%s: part %u (%s) is damaged: %s", f->name, number,
                       lb_cf_kind_name(kind), fault);
    *at = lb_cf_align(*at + PART_BYTES + le32toh(head.stored_bytes));
    return 0;
}

int lb_cf_section(const struct lb_cf_file *f, enum lb_cf_part_kind kind, uint64_t max, void **buf,
                  size_t *len, struct lb_error *err)
{
    const struct lb_cf_section *s = &f->sections[kind];
    uint64_t at = s->at, done = 0, got;
    uint8_t *out;
    ZSTD_DCtx *z;

    if (s->bytes > max)
        return lb_fail(err, LB_E_PROTO, "%s is damaged: its %s would have %llu bytes", f->name,
                       lb_cf_kind_name(kind), (unsigned long long)s->bytes);
    out = malloc(s->bytes + 1);
    z = ZSTD_createDCtx();
    if (!out || !z) {
        lb_fail(err, LB_E_NO_SPACE, "no memory for the %s of %s: %llu bytes", lb_cf_kind_name(kind),
                f->name, (unsigned long long)s->bytes);
        goto fail;
    }
    for (uint32_t i = 0; i < s->n; i++, done += got)
        if (section_part(f, kind, s->first + i, &at, out + done, s->bytes - done, &got, z, err) < 0)
            goto fail;
    ZSTD_freeDCtx(z);
    out[done] = '\0';
    *buf = out;
    *len = done;
    return 0;
fail:
    ZSTD_freeDCtx(z);
    free(out);
    return -1;
}

/* ---------------------------------------------------------------- trailer */

static int no_end(const struct lb_cf_file *f, struct lb_error *err)
{
    lb_fail(err, LB_E_PROTO, "%s is not whole: its end is missing or damaged", f->name);
    return lb_remedy(err, "a copy of it was cut off: copy it again; it cannot be used as it is");
}

static const char *trailer_fault(const struct lb_cf_file *f)
{
    const struct lb_cf_trailer *t = &f->trailer;
    if (t->bytes != f->trailer_at || t->zero != 0)
        return "the trailer's place";
    if (t->n_pages_parts > t->n_parts || t->n_parts > f->bytes / PART_BYTES)
        return "the trailer's number of parts";
    return NULL;
}

/* tail: the last bytes of the file, from *at on */
static int read_tail(struct lb_cf_file *f, uint8_t *tail, size_t len, uint64_t at,
                     struct lb_error *err)
{
    struct lb_cf_end end;
    struct lb_cf_part head;
    uint64_t where, body = PART_BYTES + sizeof(struct lb_cf_trailer);
    const char *fault;

    if (lb_cf_pread(f->fd, f->name, tail, len, at, err) < 0)
        return -1;
    memcpy(&end, tail + len - sizeof(end), sizeof(end));
    where = le64toh(end.trailer);
    if (memcmp(end.magic, LB_CF_END_MAGIC, sizeof(end.magic)) != 0 || where < LB_CF_HEADER_BYTES ||
        where < at || where % LB_CF_ALIGN || where + body + sizeof(end) > f->bytes ||
        f->bytes - (where + body + sizeof(end)) >= LB_CF_FILE_ALIGN ||
        memcmp(tail + (where - at) + body, g_zeros, f->bytes - where - body - sizeof(end)) != 0)
        return no_end(f, err);
    f->trailer_at = where;
    memcpy(&head, tail + (where - at), sizeof(head));
    fault = lb_cf_head_fault(f, &head, le32toh(head.number), where, f->bytes);
    if (!fault && (le32toh(head.kind) != LB_CF_TRAILER || head.flags ||
                   le32toh(head.stored_bytes) != sizeof(struct lb_cf_trailer)))
        fault = "it is none";
    if (!fault)
        fault = lb_cf_unpack(f, &head, tail + (where - at) + PART_BYTES, &f->trailer, NULL);
    if (fault)
        return lb_fail(err, LB_E_PROTO, "%s: the trailer is damaged: %s", f->name, fault);
    uint64_t *v = &f->trailer.parts;
    for (size_t i = 0; i < offsetof(struct lb_cf_trailer, whole) / sizeof(*v); i++)
        v[i] = le64toh(v[i]);
    fault = trailer_fault(f);
    if (!fault && f->trailer.n_parts != le32toh(head.number))
        fault = "the trailer's number";
    return fault ? damaged(f, fault, err) : 0;
}

static int read_trailer(struct lb_cf_file *f, struct lb_error *err)
{
    uint8_t tail[MAX_TAIL_BYTES];
    size_t len = LB_MIN(f->bytes, sizeof(tail));
    if (f->bytes % LB_CF_FILE_ALIGN || f->bytes <= LB_CF_HEADER_BYTES)
        return no_end(f, err);
    return read_tail(f, tail, len, f->bytes - len, err);
}

/* Heads of the parts behind the chunks: which section has which, and that they are in order and
 * complete. */
static int walk_sections(struct lb_cf_file *f, struct lb_error *err)
{
    static const struct {
        enum lb_cf_part_kind kind;
        size_t offset; /* in the trailer */
    } order[] = {
        {LB_CF_PARTS, offsetof(struct lb_cf_trailer, parts)},
        {LB_CF_INDEX, offsetof(struct lb_cf_trailer, index)},
        {LB_CF_HASHES, offsetof(struct lb_cf_trailer, hashes)},
        {LB_CF_HOT, offsetof(struct lb_cf_trailer, hot)},
        {LB_CF_STATE, offsetof(struct lb_cf_trailer, state)},
        {LB_CF_META, offsetof(struct lb_cf_trailer, meta)},
    };
    uint64_t at = f->trailer.parts, next;
    uint32_t number = (uint32_t)f->trailer.n_pages_parts;
    struct lb_cf_part head;

    if (at < LB_CF_HEADER_BYTES || at % LB_CF_ALIGN || at > f->trailer_at)
        return damaged(f, "the trailer's place of the part table", err);
    for (size_t i = 0; i < LB_ARRAY_LEN(order); i++) {
        struct lb_cf_section *s = &f->sections[order[i].kind];
        uint64_t said;
        memcpy(&said, (const uint8_t *)&f->trailer + order[i].offset, sizeof(said));
        for (; at < f->trailer_at; at = next, number++) {
            if (lb_cf_pread(f->fd, f->name, &head, sizeof(head), at, err) < 0)
                return -1;
            const char *fault = lb_cf_head_fault(f, &head, number, at, f->trailer_at);
            if (fault)
                return lb_fail(err, LB_E_PROTO, "%s: part %u is damaged: %s", f->name, number,
                               fault);
            if (le32toh(head.kind) != order[i].kind)
                break;
            if (s->n == 0)
                *s = (struct lb_cf_section){.at = at, .first = number};
            s->n++;
            s->bytes += le32toh(head.unpacked_bytes);
            next = lb_cf_align(at + PART_BYTES + le32toh(head.stored_bytes));
        }
        if (s->at != said || (s->n == 0 && order[i].kind != LB_CF_HOT))
            return lb_fail(err, LB_E_PROTO, "%s is damaged: its %s is not where the trailer says",
                           f->name, lb_cf_kind_name(order[i].kind));
    }
    if (at != f->trailer_at || number != f->trailer.n_parts)
        return damaged(f, "the number of its parts is not what the trailer says", err);
    return 0;
}

static int read_meta(struct lb_cf_file *f, struct lb_error *err)
{
    LB_AUTO_FREE void *json = NULL;
    size_t len;
    struct lb_ckpt_info *info = &f->info;

    if (lb_cf_section(f, LB_CF_META, LB_CF_MAX_META_BYTES, &json, &len, err) < 0)
        return -1;
    if (strlen(json) != len)
        return damaged(f, "its meta is no text", err);
    if (lb_ckpt_meta_parse(json, &info->meta, &info->stats, err) < 0)
        return lb_context(err, "%s", f->name);
    info->stats.file_bytes = f->bytes;
    if (info->meta.number)
        snprintf(f->name, sizeof(f->name), "%s@%u", info->meta.vm, info->meta.number);
    else
        snprintf(f->name, sizeof(f->name), "%s@suspend", info->meta.vm);
    return 0;
}

/* ---------------------------------------------------------------- open */

int lb_cf_open(struct lb_cf_file *f, const char *path, const struct lb_ckpt_key *key,
               struct lb_error *err)
{
    struct stat st;
    size_t len = strlen(path), shown = sizeof(f->name) - 1;

    memset(f, 0, sizeof(*f));
    f->path = lb_strdup(path);
    snprintf(f->name, sizeof(f->name), "%s", len > shown ? path + len - shown : path);
    f->fd = open(path, O_RDONLY | O_CLOEXEC);
    if (f->fd < 0)
        return lb_fail_errno(err, errno == ENOENT ? LB_E_NOT_FOUND : LB_E_INTERNAL, errno,
                             "cannot open %s", path);
    if (fstat(f->fd, &st) < 0)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot look at %s", path);
    if (!S_ISREG(st.st_mode))
        return lb_fail(err, LB_E_PROTO, "%s is no checkpoint", f->name);
    f->bytes = (uint64_t)st.st_size;
    if (read_header(f, err) < 0 || open_key(f, key, err) < 0 || read_trailer(f, err) < 0 ||
        walk_sections(f, err) < 0 || read_meta(f, err) < 0)
        return -1;
    return 0;
}

/* The checks of all parts, in order: those of the chunks are in the table, those of the sections in
 * their heads. */
static int check_whole(const struct lb_cf_file *f, struct lb_error *err)
{
    XXH3_state_t *x = XXH3_createState();
    XXH128_canonical_t sum;
    struct lb_cf_part head;
    int rc = 0;

    if (!x || XXH3_128bits_reset(x) == XXH_ERROR) {
        XXH3_freeState(x);
        return lb_fail(err, LB_E_NO_SPACE, "no memory for a checksum");
    }
    for (uint32_t i = 0; i < f->n_chunks; i++)
        XXH3_128bits_update(x, f->chunks[i].check, sizeof(f->chunks[i].check));
    for (uint64_t at = f->trailer.parts; rc == 0 && at < f->trailer_at;
         at = lb_cf_align(at + PART_BYTES + le32toh(head.stored_bytes)))
        if ((rc = lb_cf_pread(f->fd, f->name, &head, sizeof(head), at, err)) == 0)
            XXH3_128bits_update(x, head.check, sizeof(head.check));
    XXH128_canonicalFromHash(&sum, XXH3_128bits_digest(x));
    XXH3_freeState(x);
    if (rc == 0 && memcmp(&sum, f->trailer.whole, sizeof(sum)) != 0)
        rc = damaged(f, "the checksum of the whole is wrong", err);
    return rc;
}

int lb_cf_open_chunks(struct lb_cf_file *f, struct lb_error *err)
{
    uint64_t n = f->trailer.n_pages_parts, at = LB_CF_HEADER_BYTES;
    LB_AUTO_FREE void *table = NULL;
    size_t len;

    if (f->sections[LB_CF_PARTS].bytes != n * sizeof(*f->chunks))
        return damaged(f, "its part table does not fit the number of parts", err);
    if (lb_cf_section(f, LB_CF_PARTS, UINT64_MAX - 1, &table, &len, err) < 0)
        return -1;
    f->chunk_at = malloc((n + 1) * sizeof(*f->chunk_at));
    if (!f->chunk_at)
        return lb_fail(err, LB_E_NO_SPACE, "no memory for the part table of %s", f->name);
    f->chunks = LB_STEAL_PTR(table);
    f->n_chunks = (uint32_t)n;
    for (uint32_t i = 0; i < n; i++) {
        f->chunks[i].stored_bytes = le32toh(f->chunks[i].stored_bytes);
        if (f->chunks[i].stored_bytes > LB_CF_MAX_PART_BYTES)
            return damaged(f, "its part table", err);
        f->chunk_at[i] = at;
        at = lb_cf_align(at + lb_cf_chunk_raw_bytes(f, i));
    }
    f->chunk_at[n] = at;
    if (at != f->trailer.parts)
        return damaged(f, "its chunks are not as long as its part table says", err);
    return check_whole(f, err);
}

void lb_cf_close(struct lb_cf_file *f)
{
    if (f->fd >= 0)
        close(f->fd);
    if (f->data_key)
        sodium_free(f->data_key); /* wipes */
    free(f->chunks);
    free(f->chunk_at);
    lb_ckpt_info_free(&f->info);
    free(f->path);
    memset(f, 0, sizeof(*f));
    f->fd = -1;
}

int lb_ckpt_info(const char *path, const struct lb_ckpt_key *key, struct lb_ckpt_info *out,
                 struct lb_error *err)
{
    struct lb_cf_file f;
    int rc = lb_cf_open(&f, path, key, err);
    *out = f.info; /* on failure what is known of it */
    memset(&f.info, 0, sizeof(f.info));
    lb_cf_close(&f);
    return rc;
}

void lb_ckpt_info_free(struct lb_ckpt_info *i)
{
    lb_ckpt_meta_free(&i->meta);
    memset(i, 0, sizeof(*i));
}
