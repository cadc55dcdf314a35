/*
 * core/qemu/net.c - the guest's network cards: what each is connected to, and holding what they
 * send inside QEMU.
 *
 * `info network` lists the cards with their back ends; a tap's name is there or, when QEMU was
 * given a descriptor, in /proc/PID/fdinfo of it.
 *
 *      e1: index=0,type=nic,model=virtio-net-pci,...       hub 0
 *       \ n1: index=0,type=tap,ifname=tap0,...              \ hub0port1: #net7: index=0,type=user,...
 *      e1: index=1,type=nic,                                \ hub0port0: e1000.0: index=0,type=nic,...
 *       \ n1: index=1,type=tap,ifname=tap0,...
 *      lone: index=0,type=nic,...          (connected to nothing)
 *
 * A hold is two filter-redirectors on the back end, each at a socketpair whose other end is the
 * caller's.  Release comes first in the list of filters, so that what it lets in is not taken out
 * again; queue=rx is what goes from the guest to the net.
 *
 *      guest -> [frel <- hi <- fds[1]] -> [fout -> ho -> fds[0]]  X  back end
 *
 * QEMU gets its ends by getfd, so that neither a path nor permissions on one matter.  Names of
 * objects follow from the back end's: a session can remove what a dead one left.
 */
#include "core/qemu/qemu_internal.h"

#include <assert.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/sockios.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <xxhash.h>

#define DRAIN_MS 5000
#define TUN_FDS_MAX 256
/* QEMU's main loop waits when the holder is so much behind */
#define SOCKET_BYTES (4 << 20)

/* ---------------------------------------------------------------- cards */

/* The network descriptors of a QEMU. */
struct tun_fd {
    int fd;
    char ifname[16];  /* "": a macvtap */
    bool claimed;
};
struct net_fds {
    struct tun_fd v[TUN_FDS_MAX];
    unsigned n;
    bool vhost;       /* some card uses the kernel's vhost-net */
};

static void tun_name(pid_t pid, struct tun_fd *t)
{
    char path[64];
    LB_AUTO_FREE char *info = NULL;
    snprintf(path, sizeof(path), "/proc/%d/fdinfo/%d", (int)pid, t->fd);
    if (lb_file_read(path, 65536, &info, NULL, NULL) < 0)
        return;
    const char *iff = strstr(info, "iff:");
    if (iff)
        sscanf(iff, "iff: %15s", t->ifname);
}

static int by_fd(const void *a, const void *b)
{
    return ((const struct tun_fd *)a)->fd - ((const struct tun_fd *)b)->fd;
}

static int find_net_fds(pid_t pid, struct net_fds *out, struct lb_error *err)
{
    char path[64], to[64];
    *out = (struct net_fds){.n = 0};
    snprintf(path, sizeof(path), "/proc/%d/fd", (int)pid);
    DIR *d = opendir(path);
    if (!d)
        return lb_fail_errno(err, LB_E_HV, errno, "cannot look at the files of process %d", (int)pid);
    for (struct dirent *e; (e = readdir(d)) && out->n < TUN_FDS_MAX;) {
        ssize_t n = readlinkat(dirfd(d), e->d_name, to, sizeof(to) - 1);
        to[n > 0 ? n : 0] = 0;
        bool tun = strcmp(to, "/dev/net/tun") == 0;
        out->vhost |= strcmp(to, "/dev/vhost-net") == 0;
        if (!tun && strncmp(to, "/dev/tap", 8) != 0)
            continue;
        struct tun_fd *t = &out->v[out->n++];
        t->fd = atoi(e->d_name);
        if (tun)
            tun_name(pid, t);
    }
    closedir(d);
    qsort(out->v, out->n, sizeof(out->v[0]), by_fd);
    return 0;
}

struct cards {
    struct lb_hv_vm *vm;
    struct net_fds fds;
    struct lb_nic *v;
    unsigned n;
    struct lb_nic *open; /* the card whose back end is on the next line; NULL none */
};

static struct lb_nic *card_named(struct cards *c, const char *id)
{
    for (unsigned i = 0; i < c->n; i++)
        if (strcmp(c->v[i].id, id) == 0)
            return &c->v[i];
    return NULL;
}

static struct lb_nic *add_card(struct cards *c, const char *id)
{
    c->v = lb_realloc(c->v, (c->n + 1) * sizeof(*c->v));
    struct lb_nic *nic = &c->v[c->n++];
    *nic = (struct lb_nic){.kind = LB_NIC_NONE};
    snprintf(nic->id, sizeof(nic->id), "%s", id);
    return nic;
}

static void opaque(struct lb_nic *nic, const char *what, const char *remedy)
{
    nic->kind = LB_NIC_OPAQUE;
    snprintf(nic->why, sizeof(nic->why), "%s: %s", what, remedy);
}

/* The tap behind a back end: by name, by descriptor, or (made by a helper) the next that no other
 * card has: which of several it is does not matter, since all are held. */
static struct tun_fd *find_tun(struct cards *c, const char *line)
{
    LB_AUTO_FREE char *ifname = lb_qemu_prop(line, "ifname"), *fd = lb_qemu_prop(line, "fd");
    for (unsigned i = 0; i < c->fds.n; i++) {
        struct tun_fd *t = &c->fds.v[i];
        if (ifname ? strcmp(t->ifname, ifname) == 0 : fd ? t->fd == atoi(fd) : !t->claimed)
            return t;
    }
    return NULL;
}

static void set_tap(struct cards *c, struct lb_nic *nic, const char *line)
{
    struct tun_fd *t = find_tun(c, line);
    if (!t) {
        opaque(nic, "a tap that is not among QEMU's files", "restart the VM with ifname= of the tap");
        return;
    }
    nic->vhost = c->fds.vhost;
    if (!t->ifname[0]) { /* macvtap: its frames never pass a tap's ingress */
        t->claimed = true;
        if (nic->vhost)
            opaque(nic, "a macvtap with vhost", "use a tap on a bridge, or vhost=off");
        else
            nic->kind = LB_NIC_INSIDE;
        return;
    }
    nic->kind = LB_NIC_TAP;
    nic->queues = 0;
    snprintf(nic->ifname, sizeof(nic->ifname), "%s", t->ifname);
    for (unsigned i = 0; i < c->fds.n; i++) {
        bool same = strcmp(c->fds.v[i].ifname, t->ifname) == 0;
        c->fds.v[i].claimed |= same;
        nic->queues += same;
    }
}

static void set_backend(struct cards *c, struct lb_nic *nic, const char *line)
{
    static const char *const inside[] = {"user", "socket", "stream", "dgram", "l2tpv3", "vde", "netmap",
                                         "hubport", "passt", "af-xdp"};
    LB_AUTO_FREE char *type = lb_qemu_prop(line, "type");
    char what[96];
    if (type && (strcmp(type, "tap") == 0 || strcmp(type, "bridge") == 0)) {
        set_tap(c, nic, line);
        return;
    }
    for (unsigned i = 0; type && i < LB_ARRAY_LEN(inside); i++) {
        if (strcmp(type, inside[i]) == 0) {
            nic->kind = LB_NIC_INSIDE;
            return;
        }
    }
    snprintf(what, sizeof(what), "a back end of type %.32s, whose frames do not pass QEMU",
             type ? type : "unknown");
    opaque(nic, what, "use a tap");
}

/* One line of `info network`, without its end. */
static void take_line(struct cards *c, char *line)
{
    bool child = strncmp(line, " \\ ", 3) == 0;
    char *name = line + (child ? 3 : 0), *rest = strstr(name, ": ");
    if (!rest)
        return; /* "hub 0" */
    *rest = 0;
    rest += 2;
    char *second = strstr(rest, ": "), *type = strstr(rest, "type="); /* hub0port0: e1000.0: index=... */
    if (second && type && second > type)
        second = NULL; /* n0: index=0,type=socket,socket: udp=... */
    bool nic = strstr(second ? second : rest, ",type=nic") != NULL;
    if (second) {
        if (nic) /* filters sit at its port of the hub */
            set_backend(c, add_card(c, name), "type=hubport");
    } else if (child && c->open) {
        struct lb_nic *known = card_named(c, name);
        if (known) { /* one more queue of it */
            known->queues += known->kind != LB_NIC_TAP; /* a tap's are counted by descriptors */
            c->n--;  /* the card that was opened for it */
        } else {
            snprintf(c->open->id, sizeof(c->open->id), "%s", name);
            c->open->queues = 1;
            set_backend(c, c->open, rest);
        }
    }
    c->open = !child && nic ? add_card(c, name) : NULL;
}

/* More queues than one, found after the kind was set: not for the filters of QEMU. */
static void check_queues(struct cards *c)
{
    for (unsigned i = 0; i < c->n; i++)
        if (c->v[i].kind == LB_NIC_INSIDE && c->v[i].queues > 1)
            opaque(&c->v[i], "several queues on a back end that is no tap", "use one queue, or a tap");
}

int lb_qemu_nics(struct lb_hv_vm *vm, struct lb_nic **out, unsigned *n, struct lb_error *err)
{
    struct cards c = {.vm = vm};
    LB_AUTO_FREE char *text = NULL;
    char *save = NULL;
    if (lb_qmp_hmp(vm->qmp, "info network", &text, err) < 0 ||
        find_net_fds(vm->proc.pid, &c.fds, err) < 0)
        return -1;
    for (char *l = strtok_r(text, "\r\n", &save); l; l = strtok_r(NULL, "\r\n", &save))
        take_line(&c, l);
    check_queues(&c);
    *out = c.v ? c.v : lb_alloc(sizeof(**out));
    *n = c.n;
    return 0;
}

/* ----------------------------------------------------------------- hold */

struct lb_qemu_hold {
    char key[16];
    int release; /* a duplicate of the caller's fds[1], to see whether QEMU has read it all */
};

static void hold_key(char key[16], const char *id)
{
    snprintf(key, 16, "%08x", (unsigned)(XXH3_64bits(id, strlen(id)) & 0xffffffffu));
}

static int command(struct lb_hv_vm *vm, const char *cmd, char *args, struct lb_error *err)
{
    int rc = lb_qmp_cmd(vm->qmp, cmd, args, NULL, err);
    free(args);
    return rc;
}

/* A character device at a socket; *ours is the other end. */
static int add_socket(struct lb_hv_vm *vm, const char *what, const char *key, int *ours,
                      struct lb_error *err)
{
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot make a socket");
    LB_AUTO_FD int mine = pair[0];
    LB_AUTO_FD int theirs = pair[1];
    for (int i = 0, room = SOCKET_BYTES; i < 2; i++)
        if (setsockopt(pair[i], SOL_SOCKET, SO_SNDBUFFORCE, &room, sizeof(room)) < 0)
            lb_log(LB_LOG_DEBUG, "a socket stays small: %s", strerror(errno));
    if (lb_qmp_send(vm->qmp, "getfd", "{\"fdname\":\"lb-hold\"}", theirs, NULL, err) < 0 ||
        lb_qmp_wait(vm->qmp, "getfd", LB_QMP_MS, NULL, err) < 0)
        return -1;
    char *args = lb_asprintf("{\"id\":\"lb-%s-%s\",\"backend\":{\"type\":\"socket\",\"data\":"
                             "{\"addr\":{\"type\":\"fd\",\"data\":{\"str\":\"lb-hold\"}},"
                             "\"server\":false}}}", what, key);
    if (command(vm, "chardev-add", args, err) < 0) {
        lb_qmp_cmd(vm->qmp, "closefd", "{\"fdname\":\"lb-hold\"}", NULL, NULL);
        return -1;
    }
    *ours = LB_STEAL_FD(mine);
    return 0;
}

static int add_filter(struct lb_hv_vm *vm, const char *what, const char *key, const char *id,
                      const char *dev, const char *chardev, struct lb_error *err)
{
    return command(vm, "object-add",
                   lb_asprintf("{\"qom-type\":\"filter-redirector\",\"id\":\"lb-%s-%s\","
                               "\"netdev\":\"%s\",\"queue\":\"rx\",\"%s\":\"lb-%s-%s\"}",
                               what, key, id, dev, chardev, key), err);
}

/* Each may be there or not. The first error that is not "not there" stays in err. */
static int remove_all(struct lb_hv_vm *vm, const char *key, struct lb_error *err)
{
    static const char *const steps[][2] = {
        {"object-del", "fout"}, {"object-del", "frel"}, {"chardev-remove", "ho"}, {"chardev-remove", "hi"},
    };
    int rc = 0;
    for (unsigned i = 0; i < LB_ARRAY_LEN(steps); i++) {
        struct lb_error why = LB_ERROR_INIT;
        if (command(vm, steps[i][0], lb_asprintf("{\"id\":\"lb-%s-%s\"}", steps[i][1], key),
                    &why) < 0 && !strstr(why.message, "not found") && rc == 0) {
            rc = -1;
            if (err)
                *err = why;
        }
    }
    return rc;
}

static struct lb_qemu_hold *find_hold(struct lb_hv_vm *vm, const char *key)
{
    for (unsigned i = 0; i < vm->n_holds; i++)
        if (strcmp(vm->holds[i].key, key) == 0)
            return &vm->holds[i];
    return NULL;
}

static void forget_hold(struct lb_hv_vm *vm, struct lb_qemu_hold *h)
{
    close(h->release);
    *h = vm->holds[--vm->n_holds];
}

void lb_qemu_holds_free(struct lb_hv_vm *vm)
{
    while (vm->n_holds > 0)
        forget_hold(vm, &vm->holds[0]);
    free(vm->holds);
    vm->holds = NULL;
}

static void remember_hold(struct lb_hv_vm *vm, const char *key, int release)
{
    vm->holds = lb_realloc(vm->holds, (vm->n_holds + 1) * sizeof(*vm->holds));
    struct lb_qemu_hold *h = &vm->holds[vm->n_holds++];
    snprintf(h->key, sizeof(h->key), "%s", key);
    h->release = release;
}

int lb_qemu_nic_hold(struct lb_hv_vm *vm, const char *id, int fds[2], struct lb_error *err)
{
    char key[16];
    LB_AUTO_FD int out = -1;
    LB_AUTO_FD int in = -1;
    hold_key(key, id);
    assert(!find_hold(vm, key));
    if (remove_all(vm, key, err) < 0) /* of a session that died */
        return -1;
    if (add_socket(vm, "ho", key, &out, err) < 0 || add_socket(vm, "hi", key, &in, err) < 0 ||
        add_filter(vm, "frel", key, id, "indev", "hi", err) < 0 ||
        add_filter(vm, "fout", key, id, "outdev", "ho", err) < 0) {
        remove_all(vm, key, NULL);
        return lb_context(err, "cannot hold what network card %s sends", id);
    }
    LB_AUTO_FD int dup = fcntl(in, F_DUPFD_CLOEXEC, 3);
    if (dup < 0) {
        lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot duplicate a socket");
        remove_all(vm, key, NULL);
        return -1;
    }
    remember_hold(vm, key, LB_STEAL_FD(dup));
    fds[0] = LB_STEAL_FD(out);
    fds[1] = LB_STEAL_FD(in);
    return 0;
}

/* Wait until QEMU has taken every byte of the socket. */
static int wait_taken(struct lb_hv_vm *vm, int fd, struct lb_error *err)
{
    uint64_t deadline = lb_now_ns() + DRAIN_MS * UINT64_C(1000000);
    for (;;) {
        int left = 0;
        if (ioctl(fd, SIOCOUTQ, &left) < 0)
            return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot ask a socket what is in it");
        if (left == 0 || lb_qemu_dead(vm->pidfd))
            return 0;
        if (lb_now_ns() >= deadline)
            return lb_fail(err, LB_E_HV, "QEMU does not take the frames that were released");
        usleep(50);
    }
}

int lb_qemu_nic_unhold(struct lb_hv_vm *vm, const char *id, struct lb_error *err)
{
    char key[16];
    hold_key(key, id);
    struct lb_qemu_hold *h = find_hold(vm, key);
    if (h && wait_taken(vm, h->release, err) < 0)
        return -1;
    if (remove_all(vm, key, err) < 0)
        return lb_context(err, "cannot end the hold of network card %s", id);
    if (h)
        forget_hold(vm, h);
    return 0;
}
