/*
 * migrate/preflight.h - what could go wrong, said before anything is touched.
 *
 * A report is a list of checks; "fail" refuses the migration and always has a
 * remedy, "warn" is told and goes on.  Stable ids (scripts match them):
 *   hypervisor-version machine-type cpu-features memory disks disk-locks name
 *   files sockets ports taps passthrough clock-skew kernel emulator uid blockers config
 *   maintenance transport
 */
#ifndef LB_PREFLIGHT_H
#define LB_PREFLIGHT_H

#include "core/core.h"
#include "core/hv.h"
#include "migrate/config.h"

enum lb_check_status { LB_CHECK_OK, LB_CHECK_WARN, LB_CHECK_FAIL };
struct lb_check {
    char id[32];
    enum lb_check_status status;
    char message[384];
    char remedy[384];
};
struct lb_report {
    struct lb_check *v;
    unsigned n;
};
void lb_report_add(struct lb_report *r, const char *id, enum lb_check_status s, const char *remedy,
                   const char *fmt, ...) LB_PRINTF(5, 6);
void lb_report_free(struct lb_report *r);
bool lb_report_refused(const struct lb_report *r);
char *lb_report_json(const struct lb_report *r); /* array; caller frees */

/* Source: blockers of the description, things that do not travel. */
void lb_preflight_source(const struct lb_vm_desc *d, struct lb_report *r);
/* Destination: everything that can be checked without launching. peer_wall_ms: the
 * source's clock in its Hello, round trip excluded. */
void lb_preflight_dest(const struct lb_vm_desc *d, const struct lb_host_config *cfg,
                       const char *state_dir, uint64_t peer_wall_ms, struct lb_report *r);
/* The same for the standby of a protected VM. copied: the source's paths of disks of which a copy is
 * kept here: they may be missing, and may not be in use. */
void lb_preflight_standby(const struct lb_vm_desc *d, const struct lb_host_config *cfg,
                          const char *state_dir, uint64_t peer_wall_ms, const char *const *copied,
                          unsigned n_copied, struct lb_report *r);
/* What a VM takes on its host: guest memory, the hypervisor itself, its tables. */
uint64_t lb_preflight_need_bytes(uint64_t ram_bytes);

#endif
