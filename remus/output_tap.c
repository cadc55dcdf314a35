/* remus/output_tap.c - one kernel tap whose guest is held outside the hypervisor.
 *
 *   guest -> ifname ingress -> [hold: no mark] -> redirect -> lbh<N> -> read by us, queued
 *            written by us -> lbi<N> ingress -> [mark] -> redirect -> ifname ingress -> [hold: mark, gate] -> port
 *
 * A released frame comes in where the guest's own would have: bridge, routing, other filters and learning of addresses are
 * none the wiser. What goes to the guest leaves by the tap's egress, where nothing of ours is.
 *
 * lbh<N> is made persistent before the filter that names it is put in place and made transient
 * after that is gone: while the filter exists its target does, so its index can not become another
 * link's. Dead holder: frames go to a tap without a reader, which drops them.
 *
 * Neither tap may send or learn anything by itself: no ARP, no IPv6, no address of a network. */
#include "remus/output_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <linux/mount.h>
#include <net/if.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>

#define TAP_MTU 65521u          /* the most a tap takes: 65535 - Ethernet header */
#define INJ_TXQLEN 16u          /* nobody reads what is sent to it */
#define HOLD_TXQLEN 65536u      /* a burst while we do not run; older kernels have less in one piece */
#define HOLD_TXQLEN_MIN 1000u
#ifndef TUN_F_USO4
#define TUN_F_USO4 0x20
#define TUN_F_USO6 0x40
#endif

/* ------------------------------------------------------------ receive queues */

int lb_sysfs_open(void)
{
#ifdef __NR_fsopen
    LB_AUTO_FD int fs = (int)syscall(__NR_fsopen, "sysfs", FSOPEN_CLOEXEC);
    if (fs < 0 || syscall(__NR_fsconfig, fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0) < 0)
        return -1;
    return (int)syscall(__NR_fsmount, fs, FSMOUNT_CLOEXEC, 0);
#else
    return -1;
#endif
}

static int open_rps(int sysfs_fd, const char *ifname, unsigned queue, int flags)
{
    char path[96];
    snprintf(path, sizeof(path), "class/net/%s/queues/rx-%u/rps_cpus", ifname, queue);
    return sysfs_fd < 0 ? -1 : openat(sysfs_fd, path, flags | O_CLOEXEC);
}

/* Frames handed to another CPU would pass behind those that come later by the other way. */
static void rps_off(int sysfs_fd, const char *ifname, char old[LB_RPS_MAX])
{
    size_t used = 0;
    old[0] = 0;
    for (unsigned q = 0;; q++) {
        char mask[64];
        LB_AUTO_FD int fd = open_rps(sysfs_fd, ifname, q, O_RDWR);
        ssize_t n = fd < 0 ? -1 : read(fd, mask, sizeof(mask) - 1);
        if (n <= 0 || used + (size_t)n + 1 >= LB_RPS_MAX)
            return;
        mask[n] = 0;
        mask[strcspn(mask, "\n")] = 0;
        used += (size_t)snprintf(old + used, LB_RPS_MAX - used, "%s%s", q ? " " : "", mask);
        if (strspn(mask, "0,") != strlen(mask) && pwrite(fd, "0", 1, 0) < 0)
            lb_log(LB_LOG_WARN, "%s: receive packet steering stays on: %s", ifname, strerror(errno));
    }
}

static void rps_restore(int sysfs_fd, const char *ifname, const char *old)
{
    char copy[LB_RPS_MAX], *save = NULL;
    unsigned q = 0;
    snprintf(copy, sizeof(copy), "%s", old);
    for (char *mask = strtok_r(copy, " ", &save); mask; mask = strtok_r(NULL, " ", &save), q++) {
        LB_AUTO_FD int fd = open_rps(sysfs_fd, ifname, q, O_WRONLY);
        if (strspn(mask, "0,") != strlen(mask) && (fd < 0 || write(fd, mask, strlen(mask)) < 0))
            lb_log(LB_LOG_WARN, "%s: receive packet steering %s is not restored", ifname, mask);
    }
}

/* -------------------------------------------------------------- taps of ours */

static int no_ipv6(const char *ifname, struct lb_error *err)
{
    LB_AUTO_FREE char *path = lb_asprintf("/proc/sys/net/ipv6/conf/%s/disable_ipv6", ifname);
    LB_AUTO_FD int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0 && errno == ENOENT)
        return 0; /* there is no IPv6 */
    if (fd < 0 || write(fd, "1", 1) != 1)
        return lb_fail_errno(err, LB_E_UNSUPPORTED, errno, "%s", path);
    return 0;
}

/* What may be large or without checksum stays so on its way. */
static int keep_offloads(int fd)
{
    unsigned long base = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN;
    if (ioctl(fd, TUNSETOFFLOAD, base | TUN_F_USO4 | TUN_F_USO6) == 0)
        return 0;
    return ioctl(fd, TUNSETOFFLOAD, base); /* before 6.2 */
}

/* A tap with a name after `pattern`, as the kernel numbers it. */
static int make_tap(const char *pattern, char name[16], struct lb_error *err)
{
    struct ifreq ifr;
    int hdr = LB_VNET_HDR;
    LB_AUTO_FD int fd = open("/dev/net/tun", O_RDWR | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return lb_fail_errno(err, LB_E_UNSUPPORTED, errno, "/dev/net/tun");
    memset(&ifr, 0, sizeof(ifr));
    memcpy(ifr.ifr_name, pattern, strlen(pattern));
    ifr.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
    if (ioctl(fd, TUNSETIFF, &ifr) < 0 || ioctl(fd, TUNSETVNETHDRSZ, &hdr) < 0 ||
        keep_offloads(fd) < 0)
        return lb_fail_errno(err, LB_E_UNSUPPORTED, errno, "no tap for held frames");
    memcpy(name, ifr.ifr_name, 16);
    return LB_STEAL_FD(fd);
}

static int setup_hold(struct lb_rtnl *nl, int ifindex, struct lb_error *err)
{
    struct lb_error e = LB_ERROR_INIT;
    unsigned txqlen = HOLD_TXQLEN;
    while (lb_rtnl_link_setup(nl, ifindex, TAP_MTU, txqlen, NULL, &e) < 0) {
        txqlen /= 2;
        if ((e.sys_errno != ENOMEM && e.sys_errno != ERANGE) || txqlen < HOLD_TXQLEN_MIN) {
            if (err)
                *err = e;
            return -1;
        }
    }
    if (lb_rtnl_noqueue(nl, ifindex, err) < 0)
        return -1;
    return lb_rtnl_link_up(nl, ifindex, err);
}

static int open_hold(struct lb_otap *t, struct lb_rtnl *nl, uint32_t mark, struct lb_error *err)
{
    struct lb_rtnl_link l;
    bool created;
    t->hold_fd = make_tap("lbh%d", t->hold, err);
    if (t->hold_fd < 0 || no_ipv6(t->hold, err) < 0 ||
        lb_rtnl_link_get(nl, t->hold, &l, err) < 0)
        return -1;
    t->hold_ifindex = l.ifindex;
    LB_AUTO_FD int prog = lb_bpf_prog_only(mark, err);
    if (prog < 0 || lb_rtnl_clsact_add(nl, l.ifindex, &created, err) < 0 ||
        lb_rtnl_filter_add(nl, l.ifindex, LB_EGRESS, prog, LB_FILTER_PREFIX "only", 0, err) < 0)
        return -1;
    return setup_hold(nl, l.ifindex, err);
}

/* mark 0: none. mac: a routed tap's host takes only what is for its own address. */
static int make_inj(struct lb_rtnl *nl, const struct lb_rtnl_link *target, uint32_t mark,
                    int sysfs_fd, char name[16], int *ifindex, struct lb_error *err)
{
    struct lb_rtnl_link l;
    bool created;
    char rps[LB_RPS_MAX];
    LB_AUTO_FD int fd = make_tap("lbi%d", name, err);
    if (fd < 0 || no_ipv6(name, err) < 0 || lb_rtnl_link_get(nl, name, &l, err) < 0)
        return -1;
    LB_AUTO_FD int prog = lb_bpf_prog_mark(mark, err);
    if (prog < 0 || lb_rtnl_link_setup(nl, l.ifindex, TAP_MTU, INJ_TXQLEN, target->mac, err) < 0 ||
        lb_rtnl_clsact_add(nl, l.ifindex, &created, err) < 0 ||
        lb_rtnl_filter_add(nl, l.ifindex, LB_INGRESS, prog, LB_FILTER_PREFIX "inj", target->ifindex,
                           err) < 0)
        return -1;
    rps_off(sysfs_fd, name, rps); /* net.core.rps_default_mask */
    if (lb_rtnl_link_up(nl, l.ifindex, err) < 0)
        return -1;
    *ifindex = l.ifindex;
    return LB_STEAL_FD(fd);
}

/* ------------------------------------------------------------- the guest's tap */

static bool filter_is_ours(const struct lb_rtnl_filter *f)
{
    return f->bpf && strncmp(f->name, LB_FILTER_PREFIX, strlen(LB_FILTER_PREFIX)) == 0;
}

int lb_otap_check(struct lb_rtnl *nl, const char *ifname, struct lb_error *err)
{
    struct lb_rtnl_link l;
    struct lb_rtnl_filter f;
    unsigned tcx;
    if (lb_rtnl_link_get(nl, ifname, &l, err) < 0 || lb_bpf_tcx_count(l.ifindex, &tcx, err) < 0)
        return -1;
    if (l.xdp || tcx) {
        lb_fail(err, LB_E_UNSUPPORTED, "%s: an XDP or tcx program handles the guest's frames first",
                ifname);
        return lb_remedy(err, "detach it: bpftool net show dev %s", ifname);
    }
    if (lb_rtnl_filter_get(nl, l.ifindex, &f, NULL) == 0 && !filter_is_ours(&f)) {
        lb_fail(err, LB_E_UNSUPPORTED, "%s: a tc filter has priority 1 on ingress", ifname);
        return lb_remedy(err, "give it another: tc filter show dev %s ingress", ifname);
    }
    return 0;
}

int lb_otap_open(struct lb_otap *t, struct lb_rtnl *nl, const char *ifname, int sysfs_fd,
                 uint32_t mark, int gate_fd, struct lb_error *err)
{
    struct lb_rtnl_link l;
    snprintf(t->ifname, sizeof(t->ifname), "%s", ifname);
    if (lb_otap_check(nl, ifname, err) < 0 ||
        lb_otap_clear(nl, &(struct lb_otap_left){.ifname = ifname}, sysfs_fd, err) < 0 ||
        lb_rtnl_link_get(nl, ifname, &l, err) < 0)
        return -1;
    t->ifindex = l.ifindex;
    if (open_hold(t, nl, mark, err) < 0)
        return -1;
    t->inj_fd = make_inj(nl, &l, mark, sysfs_fd, t->inj, &t->inj_ifindex, err);
    if (t->inj_fd < 0)
        return -1;
    t->prog_fd = lb_bpf_prog_hold(mark, t->hold_ifindex, gate_fd, err);
    if (t->prog_fd < 0 || lb_bpf_prog_id(t->prog_fd, &t->prog_id, err) < 0)
        return -1;
    rps_off(sysfs_fd, ifname, t->rps);
    return lb_rtnl_clsact_add(nl, t->ifindex, &t->clsact_ours, err);
}

static int add_hold_filter(struct lb_otap *t, struct lb_rtnl *nl, struct lb_error *err)
{
    char name[64];
    snprintf(name, sizeof(name), LB_FILTER_PREFIX "%s", t->hold);
    return lb_rtnl_filter_add(nl, t->ifindex, LB_INGRESS, t->prog_fd, name, 0, err);
}

int lb_otap_arm(struct lb_otap *t, struct lb_rtnl *nl, struct lb_error *err)
{
    if (ioctl(t->hold_fd, TUNSETPERSIST, 1) < 0)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "%s cannot be made persistent", t->hold);
    if (add_hold_filter(t, nl, err) < 0) {
        ioctl(t->hold_fd, TUNSETPERSIST, 0);
        return -1;
    }
    t->armed = true;
    return 0;
}

static bool in_place(struct lb_otap *t, struct lb_rtnl *nl)
{
    struct lb_rtnl_filter f;
    return lb_rtnl_filter_get(nl, t->ifindex, &f, NULL) == 0 && f.bpf && f.prog_id == t->prog_id;
}

int lb_otap_verify(struct lb_otap *t, struct lb_rtnl *nl, uint64_t *dropped, struct lb_error *err)
{
    struct lb_rtnl_link hold;
    bool created;
    if (lb_rtnl_link_get(nl, t->hold, &hold, err) < 0)
        return lb_context(err, "%s: the holding tap is gone", t->ifname);
    *dropped = hold.tx_dropped;
    if (in_place(t, nl))
        return 0;
    if (lb_rtnl_clsact_add(nl, t->ifindex, &created, err) < 0 ||
        add_hold_filter(t, nl, err) < 0)
        return lb_context(err, "%s: the output filter is gone and cannot be put back", t->ifname);
    t->clsact_ours |= created;
    if (!in_place(t, nl))
        return lb_fail(err, LB_E_STATE, "%s: another filter is in front of ours", t->ifname);
    return 1;
}

int lb_otap_disarm(struct lb_otap *t, struct lb_rtnl *nl, struct lb_error *err)
{
    if (!t->armed)
        return 0;
    if (lb_rtnl_filter_delete(nl, t->ifindex, err) < 0)
        return lb_context(err, "%s", t->ifname);
    ioctl(t->hold_fd, TUNSETPERSIST, 0);
    t->armed = false;
    return 0;
}

void lb_otap_close(struct lb_otap *t, struct lb_rtnl *nl, int sysfs_fd)
{
    struct lb_error e = LB_ERROR_INIT;
    if (!t->armed && t->ifindex) {
        if (t->clsact_ours && lb_rtnl_clsact_remove_unused(nl, t->ifindex, &e) < 0)
            lb_log_error(LB_LOG_WARN, &e);
        rps_restore(sysfs_fd, t->ifname, t->rps);
    }
    lb_cleanup_fd(&t->prog_fd);
    lb_cleanup_fd(&t->inj_fd);
    lb_cleanup_fd(&t->hold_fd);
}

/* *hold: of our filter's name; index 0 when there is none or it is gone. */
static bool find_ours(struct lb_rtnl *nl, int ifindex, struct lb_rtnl_link *hold)
{
    struct lb_rtnl_filter f;
    hold->ifindex = 0;
    if (lb_rtnl_filter_get(nl, ifindex, &f, NULL) < 0 || !filter_is_ours(&f))
        return false;
    if (lb_rtnl_link_get(nl, f.name + strlen(LB_FILTER_PREFIX), hold, NULL) < 0)
        hold->ifindex = 0;
    return true;
}

/* The guest's tap is gone, the one that held its frames stayed. */
static int clear_hold(struct lb_rtnl *nl, const struct lb_otap_left *left, struct lb_error *err)
{
    struct lb_rtnl_link hold;
    if (!left->hold || lb_rtnl_link_get(nl, left->hold, &hold, NULL) < 0 ||
        (hold.carrier && !left->ours))
        return 0; /* another's of the same name */
    return lb_rtnl_link_delete(nl, hold.ifindex, err);
}

int lb_otap_clear(struct lb_rtnl *nl, const struct lb_otap_left *left, int sysfs_fd,
                  struct lb_error *err)
{
    struct lb_rtnl_link tap, hold;
    if (lb_rtnl_link_get(nl, left->ifname, &tap, NULL) < 0)
        return clear_hold(nl, left, err);
    if (find_ours(nl, tap.ifindex, &hold)) {
        if (hold.ifindex && hold.carrier && !left->ours)
            return lb_fail(err, LB_E_STATE, "%s: its output is held by a living process",
                           left->ifname);
        if (lb_rtnl_filter_delete(nl, tap.ifindex, err) < 0 ||
            (hold.ifindex && lb_rtnl_link_delete(nl, hold.ifindex, err) < 0))
            return -1;
        lb_log(LB_LOG_INFO, "%s: removed the hold that was left on it", left->ifname);
    }
    if (left->rps)
        rps_restore(sysfs_fd, left->ifname, left->rps);
    return left->clsact_ours ? lb_rtnl_clsact_remove_unused(nl, tap.ifindex, err) : 0;
}

int lb_otap_inject_open(struct lb_rtnl *nl, const char *ifname, int sysfs_fd, int *fd,
                        struct lb_error *err)
{
    struct lb_rtnl_link l;
    char name[16];
    int ifindex;
    if (lb_rtnl_link_get(nl, ifname, &l, err) < 0)
        return -1;
    *fd = make_inj(nl, &l, 0, sysfs_fd, name, &ifindex, err);
    return *fd < 0 ? -1 : 0;
}
