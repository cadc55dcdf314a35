/* Helpers of tests of checkpoints with in-process guests: a folder of their own, reports that are checked and
 * may cancel what they report of. */
#ifndef CKPT_FAKE_UTIL_H
#define CKPT_FAKE_UTIL_H

#include "tests/integration/fake_util.h"

#include "checkpoint/checkpoint.h"

static char dir[64], catalog[96];

static struct {
    int cancel_fd;
    unsigned reports, cancel_at;     /* 0: never */
    enum lb_ckpt_phase last;
    double percent;
} seen;

static void on_report(const struct lb_ckpt_progress *p, void *arg)
{
    uint64_t one = 1;

    (void)arg;
    if (!strcmp(p->what, "fill") && seen.last != LB_CKPT_FILLING && seen.last != LB_CKPT_DONE)
        seen.percent = 0; /* its own work */
    assert_true(p->percent >= seen.percent && p->percent <= 100 && p->phase >= seen.last);
    seen.percent = p->percent;
    seen.last = p->phase;
    if (++seen.reports == seen.cancel_at)
        assert_int_equal(write(seen.cancel_fd, &one, sizeof(one)), sizeof(one));
}

static struct lb_ckpt_env env_here(void)
{
    seen.reports = 0;
    seen.percent = 0;
    seen.last = LB_CKPT_PREPARING;
    return (struct lb_ckpt_env){.state_dir = dir, .catalog_dir = catalog, .hv = &lb_hv_fake, .cancel_fd = seen.cancel_fd,
                                .report = on_report};
}

static void dir_up(void)
{
    strcpy(dir, "/tmp/lb-test-ckpt-XXXXXX");
    assert_non_null(mkdtemp(dir));
    snprintf(catalog, sizeof(catalog), "%s/checkpoints", dir);
    memset(&seen, 0, sizeof(seen));
    seen.cancel_fd = -1;
}

#endif
