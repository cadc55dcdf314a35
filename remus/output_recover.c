/* remus/output_recover.c - what is done about output without a running holder: before one starts (is it possible?),
 * after one died (take away what it left), and on the host that takes over (send what it held). */
#include "remus/output_internal.h"

#include <jansson.h>
#include <errno.h>
#include <unistd.h>

#define RECORD_MAX (1u << 20)

char *lb_output_record_path(const char *run_dir)
{
    return lb_asprintf("%s/output.json", run_dir);
}

/* --------------------------------------------------------- after a holder */

struct clear {
    json_t *cards;               /* of the record, or NULL */
    bool ours;
    struct lb_nic *nics;         /* as the VM has them now */
    unsigned n;
};

static int clear_taps(void *arg, struct lb_error *err)
{
    struct clear *k = arg;
    struct lb_rtnl nl;
    json_t *card;
    size_t i;
    int r = 0;
    if (lb_rtnl_open(&nl, err) < 0)
        return -1;
    LB_AUTO_FD int sysfs = lb_sysfs_open();
    json_array_foreach(k->cards, i, card) {
        struct lb_otap_left left = {
            .ifname = json_string_value(json_object_get(card, "ifname")),
            .hold = json_string_value(json_object_get(card, "hold")),
            .rps = json_string_value(json_object_get(card, "rps")),
            .clsact_ours = json_is_true(json_object_get(card, "clsact")),
            .ours = k->ours,
        };
        if (left.ifname && r == 0)
            r = lb_otap_clear(&nl, &left, sysfs, err);
    }
    for (unsigned j = 0; j < k->n && r == 0; j++) {
        struct lb_otap_left left = {.ifname = k->nics[j].ifname, .ours = k->ours};
        if (k->nics[j].kind == LB_NIC_TAP)
            r = lb_otap_clear(&nl, &left, sysfs, err);
    }
    lb_rtnl_close(&nl);
    return r;
}

static int clear_inside(json_t *cards, struct lb_hv_vm *vm, struct lb_error *err)
{
    json_t *card;
    size_t i;
    json_array_foreach(cards, i, card) {
        const char *id = json_string_value(json_object_get(card, "inside"));
        if (id && lb_hv_nic_unhold(vm, id, err) < 0)
            return -1;
    }
    return 0;
}

/* NULL: there is no record. */
static int read_record(const char *path, json_t **out, struct lb_error *err)
{
    struct lb_error e = LB_ERROR_INIT;
    LB_AUTO_FREE char *text = NULL;
    *out = NULL;
    if (access(path, F_OK) < 0)
        return 0;
    if (lb_file_read(path, RECORD_MAX, &text, NULL, &e) == 0 && (*out = json_loads(text, 0, NULL)))
        return 0;
    return lb_fail(err, LB_E_STATE, "%s is not readable: %s", path, e.message);
}

static int clear_all(const struct lb_vm_ident *ident, struct lb_hv_vm *vm, json_t *record,
                     struct lb_error *err)
{
    struct clear k = {.cards = json_object_get(record, "cards")};
    struct lb_error e = LB_ERROR_INIT;
    uint64_t inode = (uint64_t)json_integer_value(json_object_get(record, "netns"));
    k.ours = json_integer_value(json_object_get(record, "holder")) == getpid();
    if (vm && lb_hv_nics(vm, &k.nics, &k.n, err) < 0)
        return -1;
    LB_AUTO_FREE struct lb_nic *nics = k.nics;
    (void)nics;
    if (k.cards || k.n) {
        LB_AUTO_FD int netns = lb_netns_open(&ident->proc, inode, &e);
        /* A namespace that nobody can reach has taken everything with it. */
        if (netns >= 0 && lb_netns_run(netns, clear_taps, &k, err) < 0)
            return -1;
    }
    return vm ? clear_inside(k.cards, vm, err) : 0;
}

int lb_output_clear_stale(const struct lb_vm_ident *ident, struct lb_hv_vm *vm, const char *run_dir,
                          struct lb_error *err)
{
    LB_AUTO_FREE char *path = lb_output_record_path(run_dir);
    json_t *record;
    if (read_record(path, &record, err) < 0)
        return -1;
    int r = clear_all(ident, lb_proc_alive(&ident->proc) ? vm : NULL, record, err);
    json_decref(record);
    if (r == 0)
        unlink(path);
    return r;
}

/* ----------------------------------------------------------------- failover */

struct inject {
    const struct lb_nic *nics;
    unsigned n;
    const unsigned char *buf;
    size_t len;
};

/* The next frame at *at; false at the end or when the rest is nonsense. */
static bool next_frame(const struct inject *j, size_t *at, unsigned *card, size_t *len)
{
    const unsigned char *p = j->buf + *at;
    if (j->len - *at < LB_OQ_COPY_HDR)
        return false;
    *card = p[0] | (unsigned)p[1] << 8;
    *len = p[2] | (size_t)p[3] << 8 | (size_t)p[4] << 16 | (size_t)p[5] << 24;
    if (*len > LB_FRAME_MAX || *len < LB_VNET_HDR || j->len - *at - LB_OQ_COPY_HDR < *len)
        return false;
    *at += LB_OQ_COPY_HDR;
    return true;
}

static int inject_card(const struct inject *j, unsigned which, struct lb_rtnl *nl, int sysfs,
                       struct lb_error *err)
{
    LB_AUTO_FD int fd = -1;
    size_t at = 0, len;
    unsigned card;
    for (; next_frame(j, &at, &card, &len); at += len) {
        if (card != which)
            continue;
        if (fd < 0 && lb_otap_inject_open(nl, j->nics[which].ifname, sysfs, &fd, err) < 0)
            return -1;
        if (write(fd, j->buf + at, len) < 0)
            return lb_fail_errno(err, LB_E_STATE, errno, "%s: sending what was held",
                                 j->nics[which].ifname);
    }
    return at == j->len ? 0 : lb_fail(err, LB_E_PROTO, "held frames end in the middle of one");
}

static int inject_all(void *arg, struct lb_error *err)
{
    const struct inject *j = arg;
    struct lb_rtnl nl;
    int r = 0;
    if (lb_rtnl_open(&nl, err) < 0)
        return -1;
    LB_AUTO_FD int sysfs = lb_sysfs_open();
    for (unsigned i = 0; i < j->n && r == 0; i++)
        if (j->nics[i].kind == LB_NIC_TAP)
            r = inject_card(j, i, &nl, sysfs, err);
    lb_rtnl_close(&nl);
    return r;
}

int lb_output_inject(struct lb_hv_vm *vm, const struct lb_vm_ident *ident, const void *buf,
                     size_t len, struct lb_error *err)
{
    LB_AUTO_FREE struct lb_nic *nics = NULL;
    struct inject j = {.buf = buf, .len = len};
    if (len == 0)
        return 0;
    if (lb_hv_nics(vm, &nics, &j.n, err) < 0)
        return -1;
    j.nics = nics;
    LB_AUTO_FD int netns = lb_netns_open(&ident->proc, 0, err);
    return netns < 0 ? -1 : lb_netns_run(netns, inject_all, &j, err);
}

/* ----------------------------------------------------------------- preflight */

struct check {
    const struct lb_nic *nics;
    unsigned n;
    char **out;
    unsigned n_out;
};

static void add_blocker(struct check *k, const char *id, const char *why, const char *remedy)
{
    k->out[k->n_out++] = lb_asprintf("network card %s: %s%s%s", id, why, *remedy ? ": " : "", remedy);
}

static int check_all(void *arg, struct lb_error *err)
{
    struct check *k = arg;
    struct lb_rtnl nl;
    if (lb_rtnl_open(&nl, err) < 0)
        return -1;
    for (unsigned i = 0; i < k->n; i++) {
        struct lb_error e = LB_ERROR_INIT;
        if (k->nics[i].kind == LB_NIC_TAP && lb_otap_check(&nl, k->nics[i].ifname, &e) < 0)
            add_blocker(k, k->nics[i].id, e.message, e.remedy);
    }
    lb_rtnl_close(&nl);
    return 0;
}

/* Can this kernel do it at all? Said once per card. */
static int check_kernel(struct lb_error *err)
{
    struct lb_gate *gate;
    LB_AUTO_FD int fd = -1;
    if (lb_bpf_gate(&fd, &gate, err) < 0)
        return -1;
    lb_bpf_gate_unmap(gate);
    LB_AUTO_FD int prog = lb_bpf_prog_hold(1, 1, fd, err);
    return prog < 0 ? -1 : 0;
}

char **lb_output_blockers(struct lb_hv_vm *vm, struct lb_error *err)
{
    LB_AUTO_FREE struct lb_nic *nics = NULL;
    struct check k = {0};
    struct lb_vm_ident ident;
    struct lb_error e = LB_ERROR_INIT;
    bool taps = false;
    if (lb_hv_nics(vm, &nics, &k.n, err) < 0)
        return NULL;
    k.nics = nics;
    k.out = lb_alloc((k.n + 1) * sizeof(*k.out));
    for (unsigned i = 0; i < k.n; i++) {
        taps |= nics[i].kind == LB_NIC_TAP;
        if (nics[i].kind == LB_NIC_OPAQUE)
            add_blocker(&k, nics[i].id, nics[i].why, "");
    }
    if (!taps)
        return k.out;
    if (check_kernel(&e) < 0) {
        for (unsigned i = 0; i < k.n; i++)
            if (nics[i].kind == LB_NIC_TAP)
                add_blocker(&k, nics[i].id, e.message, e.remedy);
        return k.out;
    }
    lb_hv_ident(vm, &ident);
    LB_AUTO_FD int netns = lb_netns_open(&ident.proc, 0, err);
    if (netns < 0 || lb_netns_run(netns, check_all, &k, err) < 0) {
        lb_strv_free(k.out);
        return NULL;
    }
    return k.out;
}
