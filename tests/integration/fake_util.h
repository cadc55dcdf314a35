/* Helpers of tests with in-process guests (core/fake). */
#ifndef FAKE_UTIL_H
#define FAKE_UTIL_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/fake/fake.h"
#include "core/registry.h"

/* The guest runs and is in the registry of that folder. */
static inline lb_fake_id boot_fake(const char *state_dir, const struct lb_fake_config *c, struct lb_vm_entry *e)
{
    struct lb_error err = LB_ERROR_INIT;
    lb_fake_id id;

    if (lb_fake_start(c, &id, &err))
        fail_msg("%s", err.message);
    memset(e, 0, sizeof(*e));
    snprintf(e->name, sizeof(e->name), "%s", c->name);
    snprintf(e->hypervisor, sizeof(e->hypervisor), "fake");
    snprintf(e->origin, sizeof(e->origin), "run");
    lb_fake_address(id, e->qmp_path);
    assert_int_equal(lb_proc_identify(getpid(), &e->proc, NULL), 0);
    assert_int_equal(lb_vm_entry_save(state_dir, e, NULL), 0);
    return id;
}

static inline struct lb_fake_stats stats_of(lb_fake_id id)
{
    struct lb_fake_stats st;

    assert_int_equal(lb_fake_stats(id, &st, NULL), 0);
    return st;
}

static inline struct lb_vm_entry entry_in(const char *state_dir, const char *name)
{
    struct lb_error err = LB_ERROR_INIT;
    struct lb_vm_entry e;

    if (lb_vm_entry_load(state_dir, name, &e, &err))
        fail_msg("%s", err.message);
    return e;
}

/* Which guest the registry means; 0: it has none of that name. */
static inline lb_fake_id fake_in(const char *state_dir, const char *name)
{
    struct lb_vm_entry e;

    if (lb_vm_entry_load(state_dir, name, &e, NULL))
        return 0;
    return strtoull(e.qmp_path + strlen("fake:"), NULL, 10);
}

#endif
