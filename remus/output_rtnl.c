/* remus/output_rtnl.c - what we ask of the kernel's network by rtnetlink: one request, one answer.
 *
 * A netlink socket belongs to the namespace it was opened in, so only the opening has to be done there. */
#include "remus/output_internal.h"

#include <arpa/inet.h>
#include <assert.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_ether.h>
#include <linux/if_link.h>
#include <linux/netlink.h>
#include <linux/pkt_cls.h>
#include <linux/pkt_sched.h>
#include <linux/rtnetlink.h>
#include <linux/tc_act/tc_mirred.h>
#include <net/if.h>
#include <pthread.h>
#include <sched.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>

#define OUR_PRIO 1u /* before every other filter */
#define OUR_HANDLE 1u
#define ANSWER_TIMEOUT_S 10
#define INGRESS TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS)
#define EGRESS TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_EGRESS)

int lb_rtnl_open(struct lb_rtnl *nl, struct lb_error *err)
{
    int one = 1;
    struct timeval patience = {.tv_sec = ANSWER_TIMEOUT_S};
    nl->seq = 0;
    nl->fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
    if (nl->fd < 0)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "no netlink socket");
    setsockopt(nl->fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
    /* Reasons in words; older kernels have none. */
    setsockopt(nl->fd, SOL_NETLINK, NETLINK_EXT_ACK, &one, sizeof(one));
    return 0;
}

void lb_rtnl_close(struct lb_rtnl *nl)
{
    if (nl->fd >= 0)
        close(nl->fd);
    nl->fd = -1;
}

/* ---------------------------------------------------------------- messages */

struct req {
    struct nlmsghdr h;
    union {
        struct ifinfomsg link;
        struct tcmsg tc;
    } u;
    unsigned char attrs[768];
};

static void begin(struct req *r, uint16_t type, uint16_t flags, size_t fixed)
{
    memset(r, 0, sizeof(*r));
    r->h.nlmsg_len = (uint32_t)NLMSG_LENGTH(fixed);
    r->h.nlmsg_type = type;
    r->h.nlmsg_flags = (uint16_t)(NLM_F_REQUEST | flags);
}

static void *put(struct req *r, uint16_t type, const void *data, size_t len)
{
    size_t at = NLMSG_ALIGN(r->h.nlmsg_len);
    assert(at + RTA_SPACE(len) <= sizeof(*r));
    struct rtattr *a = (struct rtattr *)((unsigned char *)r + at);
    a->rta_type = type;
    a->rta_len = (uint16_t)RTA_LENGTH(len);
    if (len)
        memcpy(RTA_DATA(a), data, len);
    r->h.nlmsg_len = (uint32_t)(at + RTA_ALIGN(a->rta_len));
    return a;
}

static void put_u32(struct req *r, uint16_t type, uint32_t v)
{
    put(r, type, &v, sizeof(v));
}

static void put_str(struct req *r, uint16_t type, const char *s)
{
    put(r, type, s, strlen(s) + 1);
}

static struct rtattr *nest(struct req *r, uint16_t type)
{
    return put(r, type, NULL, 0);
}

static void end(struct req *r, struct rtattr *a)
{
    a->rta_len = (uint16_t)((unsigned char *)r + r->h.nlmsg_len - (unsigned char *)a);
}

/* The kernel's own words, or "". */
static const char *reason(const struct nlmsghdr *h)
{
    const struct nlmsgerr *e = NLMSG_DATA(h);
    if (!(h->nlmsg_flags & NLM_F_ACK_TLVS))
        return "";
    size_t skip = sizeof(*e);
    if (!(h->nlmsg_flags & NLM_F_CAPPED))
        skip += e->msg.nlmsg_len - NLMSG_HDRLEN;
    int left = (int)NLMSG_PAYLOAD(h, 0) - (int)NLMSG_ALIGN(skip);
    const struct rtattr *a = (const void *)((const unsigned char *)e + NLMSG_ALIGN(skip));
    for (; RTA_OK(a, left); a = RTA_NEXT(a, left))
        if (a->rta_type == NLMSGERR_ATTR_MSG)
            return RTA_DATA(a);
    return "";
}

typedef void on_msg(const struct nlmsghdr *h, void *arg);

/* One datagram of the answer. 1: it was the last. *code: errno of the answer. */
static int take(struct lb_rtnl *nl, on_msg *each, void *arg, int *code, const char **why)
{
    static _Thread_local _Alignas(8) unsigned char buf[32768];
    ssize_t n = recv(nl->fd, buf, sizeof(buf), 0);
    if (n < 0) {
        *code = errno;
        return errno != EINTR;
    }
    unsigned left = (unsigned)n;
    for (const struct nlmsghdr *h = (const void *)buf; NLMSG_OK(h, left); h = NLMSG_NEXT(h, left)) {
        if (h->nlmsg_seq != nl->seq)
            continue;
        if (h->nlmsg_type == NLMSG_ERROR) {
            *code = -((const struct nlmsgerr *)NLMSG_DATA(h))->error;
            *why = reason(h);
            return 1;
        }
        if (h->nlmsg_type == NLMSG_DONE) {
            *code = 0;
            return 1;
        }
        if (each)
            each(h, arg);
    }
    return 0;
}

/* Send, wait for the end of the answer. 0 or an errno; *why is valid until the next call. */
static int ask(struct lb_rtnl *nl, struct req *r, on_msg *each, void *arg, const char **why)
{
    int code = 0;
    *why = "";
    r->h.nlmsg_seq = ++nl->seq;
    if ((r->h.nlmsg_flags & NLM_F_DUMP) != NLM_F_DUMP) /* its bits mean something else to others */
        r->h.nlmsg_flags |= NLM_F_ACK;
    if (send(nl->fd, r, r->h.nlmsg_len, 0) < 0)
        return errno;
    while (!take(nl, each, arg, &code, why))
        ;
    return code;
}

static int failed(struct lb_error *err, int code, const char *why, const char *what)
{
    enum lb_errcode kind = code == ENODEV || code == ENOENT ? LB_E_NOT_FOUND : LB_E_UNSUPPORTED;
    return *why ? lb_fail_errno(err, kind, code, "%s: %s", what, why)
                : lb_fail_errno(err, kind, code, "%s", what);
}

static int do_it(struct lb_rtnl *nl, struct req *r, const char *what, struct lb_error *err)
{
    const char *why;
    int code = ask(nl, r, NULL, NULL, &why);
    return code ? failed(err, code, why, what) : 0;
}

/* ------------------------------------------------------------------- links */

static void on_link(const struct nlmsghdr *h, void *arg)
{
    struct lb_rtnl_link *l = arg;
    const struct ifinfomsg *m = NLMSG_DATA(h);
    if (h->nlmsg_type != RTM_NEWLINK)
        return;
    l->ifindex = m->ifi_index;
    int left = (int)IFLA_PAYLOAD(h);
    for (const struct rtattr *a = IFLA_RTA(m); RTA_OK(a, left); a = RTA_NEXT(a, left)) {
        struct rtnl_link_stats64 s;
        switch (a->rta_type) {
        case IFLA_ADDRESS:
            memcpy(l->mac, RTA_DATA(a), LB_MIN(RTA_PAYLOAD(a), sizeof(l->mac)));
            break;
        case IFLA_CARRIER:
            l->carrier = *(const uint8_t *)RTA_DATA(a) != 0;
            break;
        case IFLA_STATS64:
            memset(&s, 0, sizeof(s));
            memcpy(&s, RTA_DATA(a), LB_MIN(RTA_PAYLOAD(a), sizeof(s)));
            l->tx_dropped = s.tx_dropped;
            break;
        case IFLA_XDP: {
            int in = (int)RTA_PAYLOAD(a);
            for (const struct rtattr *x = RTA_DATA(a); RTA_OK(x, in); x = RTA_NEXT(x, in))
                if (x->rta_type == IFLA_XDP_ATTACHED)
                    l->xdp = *(const uint8_t *)RTA_DATA(x) != XDP_ATTACHED_NONE;
            break;
        }
        }
    }
}

int lb_rtnl_link_get(struct lb_rtnl *nl, const char *ifname, struct lb_rtnl_link *out,
                     struct lb_error *err)
{
    struct req r;
    const char *why;
    memset(out, 0, sizeof(*out));
    begin(&r, RTM_GETLINK, 0, sizeof(r.u.link));
    put_str(&r, IFLA_IFNAME, ifname);
    int code = ask(nl, &r, on_link, out, &why);
    if (!code && !out->ifindex)
        code = ENODEV;
    return code ? failed(err, code, why, ifname) : 0;
}

int lb_rtnl_link_setup(struct lb_rtnl *nl, int ifindex, unsigned mtu, unsigned txqlen,
                       const unsigned char *mac, struct lb_error *err)
{
    struct req r;
    begin(&r, RTM_NEWLINK, 0, sizeof(r.u.link));
    r.u.link.ifi_index = ifindex;
    r.u.link.ifi_flags = IFF_NOARP;
    r.u.link.ifi_change = IFF_NOARP;
    put_u32(&r, IFLA_MTU, mtu);
    put_u32(&r, IFLA_TXQLEN, txqlen);
    if (mac)
        put(&r, IFLA_ADDRESS, mac, 6);
    return do_it(nl, &r, "setting up a tap of ours", err);
}

int lb_rtnl_link_up(struct lb_rtnl *nl, int ifindex, struct lb_error *err)
{
    struct req r;
    begin(&r, RTM_NEWLINK, 0, sizeof(r.u.link));
    r.u.link.ifi_index = ifindex;
    r.u.link.ifi_flags = IFF_UP;
    r.u.link.ifi_change = IFF_UP;
    return do_it(nl, &r, "bringing a tap of ours up", err);
}

int lb_rtnl_link_delete(struct lb_rtnl *nl, int ifindex, struct lb_error *err)
{
    struct req r;
    const char *why;
    begin(&r, RTM_DELLINK, 0, sizeof(r.u.link));
    r.u.link.ifi_index = ifindex;
    int code = ask(nl, &r, NULL, NULL, &why);
    return code && code != ENODEV ? failed(err, code, why, "removing a tap of ours") : 0;
}

/* ------------------------------------------------------ queueing disciplines */

static void begin_tc(struct req *r, uint16_t type, uint16_t flags, int ifindex, uint32_t parent,
                     uint32_t handle)
{
    begin(r, type, flags, sizeof(r->u.tc));
    r->u.tc.tcm_family = AF_UNSPEC;
    r->u.tc.tcm_ifindex = ifindex;
    r->u.tc.tcm_parent = parent;
    r->u.tc.tcm_handle = handle;
}

int lb_rtnl_noqueue(struct lb_rtnl *nl, int ifindex, struct lb_error *err)
{
    struct req r;
    begin_tc(&r, RTM_NEWQDISC, NLM_F_CREATE | NLM_F_REPLACE, ifindex, TC_H_ROOT, 0);
    put_str(&r, TCA_KIND, "noqueue");
    return do_it(nl, &r, "setting noqueue on a tap of ours", err);
}

int lb_rtnl_clsact_add(struct lb_rtnl *nl, int ifindex, bool *created, struct lb_error *err)
{
    struct req r;
    const char *why;
    begin_tc(&r, RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL, ifindex, TC_H_CLSACT,
             TC_H_MAKE(TC_H_CLSACT, 0));
    put_str(&r, TCA_KIND, "clsact");
    int code = ask(nl, &r, NULL, NULL, &why);
    *created = code == 0;
    if (code && code != EEXIST) {
        failed(err, code, why, "no clsact");
        return lb_remedy(err, "the kernel needs CONFIG_NET_SCH_INGRESS, CONFIG_NET_CLS_BPF and "
                              "CONFIG_NET_ACT_MIRRED, lifeboatd CAP_NET_ADMIN");
    }
    return 0;
}

static void on_any_filter(const struct nlmsghdr *h, void *arg)
{
    if (h->nlmsg_type == RTM_NEWTFILTER)
        *(bool *)arg = true;
}

int lb_rtnl_clsact_remove_unused(struct lb_rtnl *nl, int ifindex, struct lb_error *err)
{
    const uint32_t parents[] = {INGRESS, EGRESS};
    const char *why;
    struct req r;
    bool used = false;
    for (unsigned i = 0; i < LB_ARRAY_LEN(parents); i++) {
        begin_tc(&r, RTM_GETTFILTER, NLM_F_DUMP, ifindex, parents[i], 0);
        int code = ask(nl, &r, on_any_filter, &used, &why);
        if (code)
            return failed(err, code, why, "listing filters");
    }
    if (used)
        return 0;
    begin_tc(&r, RTM_DELQDISC, 0, ifindex, TC_H_CLSACT, TC_H_MAKE(TC_H_CLSACT, 0));
    put_str(&r, TCA_KIND, "clsact");
    int code = ask(nl, &r, NULL, NULL, &why);
    return code && code != ENOENT && code != ENODEV ? failed(err, code, why, "removing clsact") : 0;
}

/* ----------------------------------------------------------------- filters */

static void on_bpf_option(const struct rtattr *options, struct lb_rtnl_filter *f)
{
    int left = (int)RTA_PAYLOAD(options);
    for (const struct rtattr *a = RTA_DATA(options); RTA_OK(a, left); a = RTA_NEXT(a, left)) {
        if (a->rta_type == TCA_BPF_NAME)
            snprintf(f->name, sizeof(f->name), "%.*s", (int)RTA_PAYLOAD(a),
                     (const char *)RTA_DATA(a));
        else if (a->rta_type == TCA_BPF_ID)
            memcpy(&f->prog_id, RTA_DATA(a), sizeof(f->prog_id));
    }
}

struct first_filter {
    bool found;
    struct lb_rtnl_filter f;
};

/* A dump has them in the order the kernel runs them. */
static void on_filter(const struct nlmsghdr *h, void *arg)
{
    struct first_filter *first = arg;
    const struct tcmsg *m = NLMSG_DATA(h);
    if (h->nlmsg_type != RTM_NEWTFILTER || first->found || !m->tcm_handle)
        return;
    first->found = true;
    int left = (int)TCA_PAYLOAD(h);
    for (const struct rtattr *a = TCA_RTA(m); RTA_OK(a, left); a = RTA_NEXT(a, left)) {
        if (a->rta_type == TCA_KIND)
            first->f.bpf = strcmp(RTA_DATA(a), "bpf") == 0;
        else if (a->rta_type == TCA_OPTIONS && first->f.bpf)
            on_bpf_option(a, &first->f);
    }
}

int lb_rtnl_filter_get(struct lb_rtnl *nl, int ifindex, struct lb_rtnl_filter *out,
                       struct lb_error *err)
{
    struct req r;
    struct first_filter first = {0};
    const char *why;
    begin_tc(&r, RTM_GETTFILTER, NLM_F_DUMP, ifindex, INGRESS, 0);
    r.u.tc.tcm_info = TC_H_MAKE(OUR_PRIO << 16, 0);
    int code = ask(nl, &r, on_filter, &first, &why);
    if (code)
        return failed(err, code, why, "listing filters");
    if (!first.found)
        return lb_fail(err, LB_E_NOT_FOUND, "no filter");
    *out = first.f;
    return 0;
}

static void put_redirect(struct req *r, int ifindex)
{
    struct tc_mirred m = {
        .action = TC_ACT_STOLEN, .eaction = TCA_INGRESS_REDIR, .ifindex = (uint32_t)ifindex,
    };
    struct rtattr *list = nest(r, TCA_BPF_ACT), *first = nest(r, 1);
    put_str(r, TCA_ACT_KIND, "mirred");
    struct rtattr *options = nest(r, TCA_ACT_OPTIONS);
    put(r, TCA_MIRRED_PARMS, &m, sizeof(m));
    end(r, options);
    end(r, first);
    end(r, list);
}

int lb_rtnl_filter_add(struct lb_rtnl *nl, int ifindex, enum lb_rtnl_hook hook, int prog_fd,
                       const char *name, int redirect_ifindex, struct lb_error *err)
{
    struct req r;
    begin_tc(&r, RTM_NEWTFILTER, NLM_F_CREATE, ifindex, hook == LB_INGRESS ? INGRESS : EGRESS,
             OUR_HANDLE);
    r.u.tc.tcm_info = TC_H_MAKE(OUR_PRIO << 16, htons(ETH_P_ALL));
    put_str(&r, TCA_KIND, "bpf");
    struct rtattr *options = nest(&r, TCA_OPTIONS);
    put_u32(&r, TCA_BPF_FD, (uint32_t)prog_fd);
    put_str(&r, TCA_BPF_NAME, name);
    if (redirect_ifindex)
        put_redirect(&r, redirect_ifindex);
    else
        put_u32(&r, TCA_BPF_FLAGS, TCA_BPF_FLAG_ACT_DIRECT);
    end(&r, options);
    if (do_it(nl, &r, "adding a filter", err) < 0)
        return lb_remedy(err, "the kernel needs CONFIG_NET_CLS_BPF and CONFIG_NET_ACT_MIRRED");
    return 0;
}

int lb_rtnl_filter_delete(struct lb_rtnl *nl, int ifindex, struct lb_error *err)
{
    struct req r;
    const char *why;
    begin_tc(&r, RTM_DELTFILTER, 0, ifindex, INGRESS, OUR_HANDLE);
    r.u.tc.tcm_info = TC_H_MAKE(OUR_PRIO << 16, htons(ETH_P_ALL));
    put_str(&r, TCA_KIND, "bpf");
    int code = ask(nl, &r, NULL, NULL, &why);
    /* EINVAL: the queueing discipline is gone as well */
    bool gone = code == ENOENT || code == ENODEV || code == EINVAL;
    return code && !gone ? failed(err, code, why, "removing a filter") : 0;
}

/* -------------------------------------------------------------- namespaces */

struct visit {
    int netns_fd;
    int (*f)(void *arg, struct lb_error *err);
    void *arg;
    struct lb_error *err;
    int result;
};

static void *visit_main(void *arg)
{
    struct visit *v = arg;
    if (setns(v->netns_fd, CLONE_NEWNET) < 0)
        v->result = lb_fail_errno(v->err, LB_E_UNSUPPORTED, errno,
                                  "the network namespace of the VM cannot be entered");
    else
        v->result = v->f(v->arg, v->err);
    return NULL;
}

int lb_netns_run(int netns_fd, int (*f)(void *arg, struct lb_error *err), void *arg,
                 struct lb_error *err)
{
    struct visit v = {.netns_fd = netns_fd, .f = f, .arg = arg, .err = err, .result = -1};
    pthread_t t;
    int e = pthread_create(&t, NULL, visit_main, &v);
    if (e)
        return lb_fail_errno(err, LB_E_INTERNAL, e, "no thread");
    pthread_join(t, NULL);
    return v.result;
}

/* An fd of path when it is that namespace, else -1. */
static int try_netns(const char *path, uint64_t inode)
{
    struct stat st;
    LB_AUTO_FD int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &st) < 0 || st.st_ino != inode)
        return -1;
    return LB_STEAL_FD(fd);
}

/* A namespace without its process: our own, the machine's, or one with a name. */
static int find_netns(uint64_t inode)
{
    int fd = try_netns("/proc/thread-self/ns/net", inode);
    if (fd < 0)
        fd = try_netns("/proc/1/ns/net", inode);
    DIR *d = fd < 0 ? opendir("/run/netns") : NULL;
    for (struct dirent *e; d && fd < 0 && (e = readdir(d));) {
        LB_AUTO_FREE char *path = lb_asprintf("/run/netns/%s", e->d_name);
        fd = try_netns(path, inode);
    }
    if (d)
        closedir(d);
    return fd;
}

int lb_netns_open(const struct lb_proc_id *proc, uint64_t inode, struct lb_error *err)
{
    char path[64];
    snprintf(path, sizeof(path), "/proc/%d/ns/net", (int)proc->pid);
    LB_AUTO_FD int fd = lb_proc_alive(proc) ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd >= 0 && lb_proc_alive(proc))
        return LB_STEAL_FD(fd);
    int other = inode ? find_netns(inode) : open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC);
    if (other < 0)
        lb_fail(err, LB_E_NOT_FOUND, "the network namespace of process %d is not to be found",
                (int)proc->pid);
    return other;
}
