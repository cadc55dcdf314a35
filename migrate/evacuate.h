/*
 * migrate/evacuate.h - carrying out the plan of an evacuation, and what is on disk about it.
 *
 * Pure but for load and save: it is told what has happened and says what to do next. The
 * supervisor (cmd/daemon/evacuate.c) starts the sessions and tells it; nothing here knows of processes.
 *
 *   phase      meaning                                        next
 *   planned    a plan was shown; nothing is done              running, or forgotten
 *   running    items are begun and end; maintenance is on     replanning, done, incomplete, cancelling
 *   replanning something failed or has changed: what is left is planned anew
 *   cancelling nothing new begins; what has not handed over goes back to running here
 *   cancelled  the rest runs here; `evacuate` goes on
 *   incomplete what is left cannot leave: each has its reason and remedy
 *   done       the host is empty
 *
 *   item:  WAITS -> SETUP -> READY -> SENDING -> DONE
 *            |        +--------+---------+-----> FAILED (retry_at, excluded) -> planned anew, elsewhere first
 *            +-> LEFT (a blocker, or too many failures: runs on here)
 *   kinds without a transfer of their own (swap, backup, suspend) go from SETUP to DONE. READY is where a copy
 *   waits for its go: alone on its link, or every share of it at least `margin` times what its guest dirties.
 *   A protected VM that is copied: unprotected first, protected again from where it is then (its plan has a
 *   backup step after it).
 *
 * Rules: a VM is never begun twice; one that a session works on already (found after a restart) is taken up, not
 * begun; what is DONE is known from the registry (it is not here any more), never from this file alone. So a
 * file that is lost or old costs at most the retries it had counted.
 *
 * STATE_DIR/evacuation.json: the whole of struct lb_evac. STATE_DIR/maintenance.json: maintenance.h.
 *
 * JSON that `evacuate` streams and `--json` prints (one object a line):
 *   {"event":"note","text":"measuring the link to b"}                                     while it plans
 *   {"event":"plan","id":"...","host":"a","makespan_s":,"bytes":,"parallel":,"margin":,"vms":,
 *    "steps":[{"vm","kind":"copy|swap|backup|suspend","from","to","start_s","end_s","downtime_ms","bytes","memory_bytes",
 *              "dirty_bytes_per_s","alone","throttled","suspended"}],
 *    "stays":[{"vm","backup":false,"reason","remedy"}],
 *    "hosts":[{"name","memory_bytes","before_bytes","after_bytes","link_bytes_per_s","maintenance","error"}]}
 *   {"event":"evacuation","phase":,"percent":,"elapsed_s":,"eta_s":(null: not known),"vms":,"done":,"failed":,"left":,"active":,
 *    "bytes":,"bytes_planned":,"throughput_bytes_per_s":,"note":"",
 *    "items":[{"vm","kind","from","to","state","percent","bytes","throughput_bytes_per_s","eta_s","elapsed_s","downtime_ms",
 *              "tries","message","remedy"}]}        at most 4/s; the first and the last have all items, others those that changed
 *   result: the last "evacuation" event with "ok": nothing is left
 * state: a word of the drawing above in lower case. elapsed_s: since this try began, of one that has ended what it
 * took. A "plan" in the middle (another "id") is what is left, planned anew.
 * Result of "plan": the last "plan" event. Of "status" and "cancel" (when it has come to rest): an "evacuation" with all
 * items; phase "none" when there is none; cancel is refused then (LB_E_STATE).
 * `maintenance` on, off, status: {"maintenance":true,"since_ms":,"reason":"","left":[as in maintenance.json]}.
 * off with bring_back streams "evacuation" events of phase "returning" (item: from where it is, to this host); the
 * result is the last one, with "ok": all are back.
 */
#ifndef LB_EVACUATE_H
#define LB_EVACUATE_H

#include "migrate/plan.h"

#endif
