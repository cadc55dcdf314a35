/* core/points.c - places at which a test can stop a session and kill it.
 *
 *   LIFEBOAT_PAUSE_AT=NAME       wait here until killed
 *   LIFEBOAT_PAUSE_AT=NAME:MS    wait here for MS milliseconds, then go on
 *   LIFEBOAT_PAUSE_FILE=FILE     created (empty) when the wait begins; while it exists nobody waits:
 *                                of several sessions only the first one that gets there
 *
 *   source         where it waits                 destination
 *   src-ready      receiver is up                 dst-launched     receiver started
 *   src-round-0    first round is under way       dst-receive      connections are open
 *   src-round-n    a later round                  dst-round        a round is complete
 *   src-stopped    guest stopped for the end      dst-loaded       device state loaded
 *   src-saved      device state saved             dst-prepared     journal PREPARED
 *   src-prepared   destination said Prepared      dst-commit       Commit received
 *   src-handed-over journal HANDED_OVER           dst-journalled   journal RUNNING
 *   src-committed  Commit sent                    dst-ran          guest runs
 *   src-running    Running received               dst-acked        Running sent
 *   src-destroyed  own copy destroyed
 *
 *   protection (remus/): of setting up also src-ready, dst-launched, dst-receive, dst-round
 *   primary                                       backup
 *   pr-disks       mirrors have begun             bk-first         first epoch whole, no Ack yet
 *   pr-rounds      first round is under way       bk-discard       journal REFUSED, not told yet
 *   pr-arming      before the witness is armed    bk-loaded        state loaded, record PROMOTING
 *   pr-armed       record has the revision        bk-won           the witness gave it to us
 *   pr-told        Armed sent, no epoch yet       bk-journalled    journal RUNNING
 *   pr-first       first Ack, not recorded yet    bk-ran           guest runs
 *   pr-recorded    record PROTECTED
 *   pr-ending      before Discard is sent
 *   pr-free        it is ours, not recorded yet
 *   pr-alone       record ALONE
 *   pr-yield       record YIELDED                 pr-yielded       Yielded sent
 *   pr-fenced      record FENCED
 *
 *   checkpoints (checkpoint/)
 *   take-opened    nothing touched yet            restore-launched  receiver started
 *   take-copied    rounds done, still running     restore-loaded    state loaded, paused
 *   take-paused    guest stopped                  restore-decided   entry FILLING
 *   take-written   all in the temporary file      fill-begun        it runs, nothing filled
 *   take-committed the file has its name          fill-half         half of it is there
 *   suspend-decided entry SUSPENDED
 *   rm-rewritten   a child stands without those that go       rm-unlinked  a file of those is gone
 *   rm-joining     a join of two images is noted               rm-joined    done and noted, the upper one is there
 *   import-disks   disks have their names, the file not yet
 *
 * Without the variable a point costs one getenv, and points are a handful per
 * migration.  A value that is not understood is logged and ignored: a session
 * must never hang because of a mistyped variable. */
#include "core/core.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>

/* 0 and *forever or *ms; -1 when text is no number of milliseconds. */
static int parse_wait(const char *text, bool *forever, unsigned *ms)
{
    *forever = *text == '\0';
    *ms = 0;
    if (*forever)
        return 0;
    if (*text != ':' || strspn(text + 1, "0123456789") != strlen(text + 1) || !text[1] ||
        strlen(text + 1) > 7)
        return -1;
    *ms = (unsigned)strtoul(text + 1, NULL, 10);
    return 0;
}

/* False: somebody has waited already. */
static bool create_file(const char *path)
{
    LB_AUTO_FD int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    if (fd < 0 && errno == EEXIST)
        return false;
    if (fd < 0)
        lb_log(LB_LOG_WARN, "LIFEBOAT_PAUSE_FILE: cannot create %s: %s", path, strerror(errno));
    return true;
}

void lb_point(const char *name)
{
    const char *want = getenv("LIFEBOAT_PAUSE_AT");
    size_t len = strlen(name);
    bool forever;
    unsigned ms;

    if (!want || strncmp(want, name, len) || (want[len] && want[len] != ':'))
        return;
    if (parse_wait(want + len, &forever, &ms) < 0) {
        lb_log(LB_LOG_WARN, "LIFEBOAT_PAUSE_AT=%s ignored: it is not NAME or NAME:MS", want);
        return;
    }
    const char *file = getenv("LIFEBOAT_PAUSE_FILE");
    if (file && *file && !create_file(file))
        return;
    lb_log(LB_LOG_WARN, "waiting at point %s as LIFEBOAT_PAUSE_AT says", name);
    if (!forever)
        lb_sleep_ms(ms);
    while (forever)
        lb_sleep_ms(1000);
}
