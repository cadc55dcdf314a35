/* checkpoint/progress.c - what a person sees meanwhile. See checkpoint_internal.h. */
#include "checkpoint/checkpoint_internal.h"

#include <errno.h>
#include <string.h>

#define REPORT_NS UINT64_C(100000000)
#define RATE_NS UINT64_C(250000000)

const char *lb_ckpt_phase_name(enum lb_ckpt_phase p)
{
    static const char *const names[] = {
        [LB_CKPT_PREPARING] = "preparing", [LB_CKPT_COPYING] = "copying", [LB_CKPT_PAUSED] = "paused",
        [LB_CKPT_WRITING] = "writing",     [LB_CKPT_LAUNCHING] = "launching", [LB_CKPT_LOADING] = "loading",
        [LB_CKPT_FILLING] = "filling",     [LB_CKPT_DONE] = "done",
    };

    return (unsigned)p < LB_ARRAY_LEN(names) ? names[p] : "unknown";
}

void lb_ckpt_meter_init(struct lb_ckpt_meter *m, const struct lb_ckpt_env *env, const char *what,
                        uint64_t total_bytes)
{
    memset(m, 0, sizeof(*m));
    m->env = env;
    m->p.what = what;
    m->p.total_bytes = total_bytes;
    m->p.bytes_per_s = m->p.eta_s = -1;
}

static void report(struct lb_ckpt_meter *m)
{
    m->reported_ns = lb_now_ns();
    if (m->env->report)
        m->env->report(&m->p, m->env->arg);
}

static void set_percent(struct lb_ckpt_meter *m, double percent)
{
    if (percent > m->p.percent)
        m->p.percent = LB_MIN(percent, 100.0);
}

void lb_ckpt_meter_phase(struct lb_ckpt_meter *m, enum lb_ckpt_phase phase, double percent)
{
    m->p.phase = phase;
    set_percent(m, phase == LB_CKPT_DONE ? 100 : percent);
    if (phase == LB_CKPT_DONE)
        m->p.eta_s = 0;
    report(m);
}

/* Smoothed over some quarters of a second: a figure that jumps tells nobody anything. */
static void take_rate(struct lb_ckpt_meter *m)
{
    uint64_t now = lb_now_ns();
    double rate;

    if (!m->rate_ns || m->p.done_bytes < m->rate_bytes) {
        m->rate_ns = now;
        m->rate_bytes = m->p.done_bytes;
    }
    if (now - m->rate_ns < RATE_NS)
        return;
    rate = (double)(m->p.done_bytes - m->rate_bytes) * 1e9 / (double)(now - m->rate_ns);
    m->p.bytes_per_s = m->p.bytes_per_s < 0 ? rate : 0.5 * m->p.bytes_per_s + 0.5 * rate;
    m->rate_ns = now;
    m->rate_bytes = m->p.done_bytes;
    m->p.eta_s = m->p.bytes_per_s > 0 && m->p.total_bytes >= m->p.done_bytes
                     ? (double)(m->p.total_bytes - m->p.done_bytes) / m->p.bytes_per_s
                     : -1;
}

void lb_ckpt_meter_bytes(struct lb_ckpt_meter *m, uint64_t done_bytes, double percent)
{
    m->p.done_bytes = done_bytes;
    set_percent(m, percent);
    take_rate(m);
    if (lb_now_ns() - m->reported_ns >= REPORT_NS)
        report(m);
}

void lb_ckpt_meter_note(struct lb_ckpt_meter *m, const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(m->p.note, sizeof(m->p.note), fmt, ap);
    va_end(ap);
    lb_log(LB_LOG_INFO, "%s", m->p.note);
}

int lb_ckpt_check_cancel(const struct lb_ckpt_env *env, const char *what, const char *vm,
                         struct lb_error *err)
{
    if (!lb_readable(env->cancel_fd, 0))
        return 0;
    return lb_fail(err, LB_E_CANCELLED, "%s of %s cancelled", what, vm);
}

struct lb_vm_ident lb_ckpt_ident(const struct lb_vm_entry *e)
{
    return (struct lb_vm_ident){.name = e->name, .proc = e->proc,
                                .qmp_path = e->qmp_path[0] ? e->qmp_path : NULL};
}

void lb_ckpt_remove_file(const char *path)
{
    struct lb_error why = LB_ERROR_INIT;

    if (lb_file_remove(path, &why))
        lb_log_error(LB_LOG_WARN, &why);
}
