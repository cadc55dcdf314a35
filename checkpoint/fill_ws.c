/* checkpoint/fill_ws.c - the working set of a checkpoint. See fill.h. */
#include "checkpoint/fill.h"

#include <endian.h>
#include <string.h>
#include <xxhash.h>

#define MAGIC "LBWS1\n\0"

struct ws_head {
    char magic[8];
    uint8_t id[LB_CKPT_ID_BYTES];
    uint64_t n;
};
_Static_assert(sizeof(MAGIC) == 8 && sizeof(struct ws_head) == 32, "fill.h: N.ws");

char *lb_ws_path(const char *catalog_dir, const char *vm, uint32_t number)
{
    return number ? lb_asprintf("%s/%s/%u.ws", catalog_dir, vm, number) : lb_asprintf("%s/%s/suspend.ws", catalog_dir, vm);
}

void lb_ws_load(const char *path, const struct lb_ckpt_id *id, uint64_t **v, uint64_t *n)
{
    LB_AUTO_FREE char *data = NULL;
    struct ws_head h;
    uint64_t check;
    size_t len;

    *v = NULL;
    *n = 0;
    if (lb_file_read(path, sizeof(h) + LB_WS_MAX_PAGES * sizeof(**v) + sizeof(check), &data, &len, NULL) < 0 ||
        len < sizeof(h) + sizeof(check))
        return;
    memcpy(&h, data, sizeof(h));
    h.n = le64toh(h.n);
    if (memcmp(h.magic, MAGIC, 8) || (id && memcmp(h.id, id->b, sizeof(h.id))) || h.n > LB_WS_MAX_PAGES ||
        len != sizeof(h) + h.n * sizeof(**v) + sizeof(check))
        return;
    memcpy(&check, data + len - sizeof(check), sizeof(check));
    if (le64toh(check) != XXH3_64bits(data, len - sizeof(check)))
        return;
    *v = lb_alloc(h.n * sizeof(**v) + 1);
    memcpy(*v, data + sizeof(h), h.n * sizeof(**v));
    for (uint64_t i = 0; i < h.n; i++)
        (*v)[i] = le64toh((*v)[i]);
    *n = h.n;
}

static int by_value(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

    return x < y ? -1 : x > y;
}

int lb_ws_save(const char *path, const struct lb_ckpt_id *id, const uint64_t *first, uint64_t n_first,
               const uint64_t *second, uint64_t n_second, struct lb_error *err)
{
    uint64_t n = LB_MIN(n_first, (uint64_t)LB_WS_MAX_PAGES), check;
    LB_AUTO_FREE uint64_t *sorted = lb_alloc(n * sizeof(*sorted) + 1);
    LB_AUTO_FREE char *data = lb_alloc(sizeof(struct ws_head) + (LB_WS_MAX_PAGES + 1) * sizeof(*first));
    struct ws_head h = {.magic = MAGIC};
    uint64_t *out = (uint64_t *)(void *)(data + sizeof(h));

    if (n)
        memcpy(sorted, first, n * sizeof(*sorted));
    qsort(sorted, n, sizeof(*sorted), by_value);
    for (uint64_t i = 0; i < n; i++)
        out[i] = htole64(first[i]);
    for (uint64_t i = 0; i < n_second && n < LB_WS_MAX_PAGES; i++)
        if (!bsearch(&second[i], sorted, LB_MIN(n_first, (uint64_t)LB_WS_MAX_PAGES), sizeof(*sorted), by_value))
            out[n++] = htole64(second[i]);
    memcpy(h.id, id->b, sizeof(h.id));
    h.n = htole64(n);
    memcpy(data, &h, sizeof(h));
    check = htole64(XXH3_64bits(data, sizeof(h) + n * sizeof(*out)));
    out[n] = check;
    return lb_file_write_atomic(path, data, sizeof(h) + (n + 1) * sizeof(*out), 0600, err);
}
