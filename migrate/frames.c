/* migrate/frames.c - see frames.h. */
#include "migrate/frames.h"

#include "core/qemu/argv_scan.h"

#include <arpa/inet.h>
#include <errno.h>
#include <linux/filter.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <string.h>
#include <sys/socket.h>

#define MAX_TAPS 16u
#define HDR_BYTES 10u                    /* struct virtio_net_hdr */
#define MAX_FRAME_BYTES (HDR_BYTES + 14 + 4 + 65536u)
#define MAX_KEPT_BYTES (8u << 20)        /* in the kernel, per tap */
#define MAX_MESSAGE_BYTES (256u << 10)
#define MAX_SENT_FRAMES 20000u           /* per migration: a flood is not worth the time */

struct lb_frames {
    unsigned n, sent;
    struct {
        char name[IF_NAMESIZE];
        int fd;
    } taps[MAX_TAPS];
};

static int packet_socket(void)
{
    int fd = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), one = 1;

    /* large frames stay whole, partial checksums partial */
    if (fd >= 0 && setsockopt(fd, SOL_PACKET, PACKET_VNET_HDR, &one, sizeof(one))) {
        close(fd);
        return -1;
    }
    return fd;
}

static int tap_index(const struct lb_arg_item *it, const char *name)
{
    return it->kind == LB_ARG_TAP && strlen(name) < IF_NAMESIZE ? (int)if_nametoindex(name) : 0;
}

/* Copying is switched by the filter: binding again would wait for the kernel (RCU), several
 * ms of every pause. */
static int copy(int fd, bool on)
{
    /* only what the host sends to the guest */
    static struct sock_filter outgoing[] = {
        {BPF_LD | BPF_B | BPF_ABS, 0, 0, (uint32_t)(SKF_AD_OFF + SKF_AD_PKTTYPE)},
        {BPF_JMP | BPF_JEQ | BPF_K, 0, 1, PACKET_OUTGOING},
        {BPF_RET | BPF_K, 0, 0, UINT32_MAX},
        {BPF_RET | BPF_K, 0, 0, 0},
    };
    static struct sock_filter nothing[] = {{BPF_RET | BPF_K, 0, 0, 0}};
    struct sock_fprog prog = {LB_ARRAY_LEN(outgoing), outgoing};

    if (!on)
        prog = (struct sock_fprog){LB_ARRAY_LEN(nothing), nothing};
    return setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &prog, sizeof(prog));
}

struct lb_frames *lb_frames_new(char *const *argv)
{
    struct lb_frames *f = lb_alloc(sizeof(*f));
    struct lb_arg_item *v;
    struct sockaddr_ll ll = {.sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_ALL)};
    unsigned n;
    int room = MAX_KEPT_BYTES;

    lb_argv_scan(argv, &v, &n);
    for (unsigned i = 0; i < n && f->n < MAX_TAPS; i++) {
        int index = tap_index(&v[i], v[i].value);
        int fd = index ? packet_socket() : -1;

        if (fd < 0)
            continue;
        ll.sll_ifindex = index;
        if (copy(fd, false) || bind(fd, (struct sockaddr *)&ll, sizeof(ll))) {
            lb_log(LB_LOG_WARN, "frames: cannot listen on %s: %s", v[i].value, strerror(errno));
            close(fd);
            continue;
        }
        if (setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof(room)))
            lb_log(LB_LOG_DEBUG, "frames: a small buffer for %s", v[i].value);
        snprintf(f->taps[f->n].name, IF_NAMESIZE, "%s", v[i].value);
        f->taps[f->n++].fd = fd;
    }
    lb_argv_items_free(v, n);
    if (f->n)
        return f;
    free(f);
    return NULL;
}

void lb_frames_start(struct lb_frames *f)
{
    for (unsigned i = 0; f && i < f->n; i++)
        if (copy(f->taps[i].fd, true))
            lb_log(LB_LOG_WARN, "frames: cannot listen on %s: %s", f->taps[i].name,
                   strerror(errno));
}

void lb_frames_discard(struct lb_frames *f)
{
    char byte;

    for (unsigned i = 0; f && i < f->n; i++) {
        copy(f->taps[i].fd, false);
        while (recv(f->taps[i].fd, &byte, 1, MSG_DONTWAIT | MSG_TRUNC) > 0)
            ;
    }
}

static bool send_batch(struct lb_chan *c, char *tap, Lb__Frame **v, size_t n)
{
    Lb__Control m = LB__CONTROL__INIT;
    Lb__Frames fs = LB__FRAMES__INIT;
    bool ok;

    fs.tap = tap;
    fs.n_frames = n;
    fs.frames = v;
    m.kind_case = LB__CONTROL__KIND_FRAMES;
    m.frames = &fs;
    ok = !n || !lb_ctl_send(c, &m, NULL);
    for (size_t i = 0; i < n; i++) {
        free(v[i]->data.data);
        free(v[i]);
    }
    return ok;
}

static bool send_tap(struct lb_frames *f, unsigned t, uint8_t *buf, struct lb_chan *c)
{
    Lb__Frame *v[1024];
    size_t n = 0, bytes = 0;
    bool ok = true;
    ssize_t len;

    while (ok && f->sent < MAX_SENT_FRAMES &&
           (len = recv(f->taps[t].fd, buf, MAX_FRAME_BYTES, MSG_DONTWAIT)) > 0) {
        if (len < (ssize_t)(HDR_BYTES + 14) || (buf[HDR_BYTES] & 1)) /* group addresses */
            continue;
        v[n] = lb_alloc(sizeof(**v));
        lb__frame__init(v[n]);
        v[n]->data = (ProtobufCBinaryData){(size_t)len, lb_alloc((size_t)len)};
        memcpy(v[n++]->data.data, buf, (size_t)len);
        bytes += (size_t)len;
        f->sent++;
        if (n == LB_ARRAY_LEN(v) || bytes > MAX_MESSAGE_BYTES) {
            ok = send_batch(c, f->taps[t].name, v, n);
            n = bytes = 0;
        }
    }
    return send_batch(c, f->taps[t].name, v, ok ? n : 0) && ok;
}

bool lb_frames_send(struct lb_frames *f, struct lb_chan *c)
{
    LB_AUTO_FREE uint8_t *buf = f ? lb_alloc(MAX_FRAME_BYTES) : NULL;

    for (unsigned i = 0; f && i < f->n; i++)
        if (!send_tap(f, i, buf, c))
            return false;
    return true;
}

void lb_frames_free(struct lb_frames *f)
{
    if (!f)
        return;
    if (f->sent)
        lb_log(LB_LOG_DEBUG, "frames: %u that came during the pause were sent after the guest",
               f->sent);
    for (unsigned i = 0; i < f->n; i++)
        close(f->taps[i].fd);
    free(f);
}

void lb_frames_inject(const Lb__Frames *m, char *const *argv, const struct lb_host_config *cfg)
{
    struct sockaddr_ll ll = {.sll_family = AF_PACKET};
    struct lb_arg_item *v;
    unsigned n, done = 0;

    /* A peer names one of the VM's own taps, never another interface of this host. */
    lb_argv_scan(argv, &v, &n);
    for (unsigned i = 0; i < n && !ll.sll_ifindex; i++)
        if (v[i].kind == LB_ARG_TAP && !strcmp(v[i].value, m->tap))
            ll.sll_ifindex =
                tap_index(&v[i], lb_map_name(cfg->taps, cfg->n_taps, v[i].value));
    lb_argv_items_free(v, n);
    LB_AUTO_FD int fd = ll.sll_ifindex ? packet_socket() : -1;
    if (fd < 0)
        return;
    for (size_t i = 0; i < m->n_frames; i++) {
        const ProtobufCBinaryData *d = &m->frames[i]->data;

        if (d->len < HDR_BYTES + 14 || d->len > MAX_FRAME_BYTES)
            continue;
        done += sendto(fd, d->data, d->len, 0, (struct sockaddr *)&ll, sizeof(ll)) ==
                (ssize_t)d->len;
    }
    lb_log(LB_LOG_DEBUG, "frames: %u of %zu of the pause reached %s", done, m->n_frames, m->tap);
}
