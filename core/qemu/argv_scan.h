/*
 * core/qemu/argv_scan.h - what a QEMU command line uses of its host: files,
 * directories, sockets, ports, taps, devices.
 *
 * Understands key=value lists (",," is a comma), dotted keys, JSON arguments and
 * the older "unix:PATH,server" forms. What it does not know it leaves out: it is a help
 * for preflight, the launch itself has the last word.
 */
#ifndef LB_ARGV_SCAN_H
#define LB_ARGV_SCAN_H

#include "core/core.h"

enum lb_arg_kind {
    LB_ARG_FILE,        /* value: file that is read */
    LB_ARG_DISK,        /* value: image or block device; read_only */
    LB_ARG_OUTPUT,      /* value: file that is created or appended to */
    LB_ARG_DIR,         /* value: directory */
    LB_ARG_UNIX_LISTEN, /* value: path of a socket that QEMU creates */
    LB_ARG_UNIX_CONNECT,/* value: path of a socket somebody else serves */
    LB_ARG_TCP_LISTEN,  /* value: address ("" = all), port */
    LB_ARG_UDP_LISTEN,
    LB_ARG_TAP,         /* value: interface name */
    LB_ARG_BRIDGE,      /* value: interface name */
    LB_ARG_FD,          /* value: descriptor number, given by whoever started QEMU */
    LB_ARG_VHOST,       /* value: device file of a kernel vhost back end */
    LB_ARG_VHOST_USER,  /* value: what */
    LB_ARG_PASSTHROUGH, /* value: what */
};
const char *lb_arg_kind_name(enum lb_arg_kind k);

struct lb_arg_item {
    enum lb_arg_kind kind;
    const char *option;  /* "-drive"; static */
    char *value;
    uint16_t port;
    bool read_only;
    bool scripted;       /* tap: QEMU runs a script that connects it */
};
/* Never fails; order of the command line. Free with lb_argv_items_free. */
void lb_argv_scan(char *const *argv, struct lb_arg_item **v, unsigned *n);
void lb_argv_items_free(struct lb_arg_item *v, unsigned n);

#endif
