/*
 * remus/lease.h - until when the primary may let output leave and its guest run, and from when on
 * the backup may ask the witness. Pure: time comes in, decisions go out. CLOCK_MONOTONIC of
 * each host only; nothing compares clocks of two hosts.
 *
 * Every message of the primary (a heartbeat each LB_BEAT_MS, every epoch) carries its send time.
 * Handling it at its own time h, the backup promises: "I shall not claim before h + lease + margin",
 * and answers with the send time t. When the answer arrives, the primary knows it is safe until t + lease.
 * Since t was before h, the primary's lease ends before the backup's promise does, whatever the
 * delays; margin covers clocks of slightly different speed and the time to stop a guest.
 *
 *      primary   |--t------------------------------- t+lease: gate closed, guest frozen
 *                    no answer for `ask`: claims "alone" at the witness, in time to win
 *      backup         |--h------------------------------------ h+lease+margin: loads, claims, runs
 *
 * Whoever wins the claim at the witness runs; the loser's copy is destroyed. A primary that wins
 * needs no lease any more.
 */
#ifndef LB_LEASE_H
#define LB_LEASE_H

#include <stdbool.h>
#include <stdint.h>

#define LB_BEAT_MS 10
/* A client's TCP sends again 200 ms after it got no answer, and then only after 400 ms more: the guest should run before the
 * first. A busy host with virtual processors is late by tens of ms even with real-time priority. */
#define LB_LEASE_MS 150
/* A false alarm costs a whole host its power. */
#define LB_LEASE_FENCE_MS 1000
#define LB_LEASE_MIN_MS 50

struct lb_lease {
    uint64_t lease_ns, ask_ns, margin_ns;  /* ask = 0.8 lease; margin = 0.25 lease */
    uint64_t until_ns;      /* primary: end of the lease */
    uint64_t heard_ns;      /* last answer / last message: the backup's promise counts from here */
};
/* lease_ms: 0 = LB_LEASE_MS, less than LB_LEASE_MIN_MS is LB_LEASE_MIN_MS. The first lease and the first
 * promise begin with now_ns: the primary takes that time before it sends Armed, the backup when it handles it. */
/* What is good for a kind of witness (witness.h), when nobody says. */
uint32_t lb_lease_default_ms(const char *witness);
void lb_lease_init(struct lb_lease *l, uint32_t lease_ms, uint64_t now_ns);

/* primary */
enum lb_lease_state { LB_LEASE_OK, LB_LEASE_ASK, LB_LEASE_LAPSED };
/* Never moves until_ns back; a sent_ns that is not in the past is ignored. */
void lb_lease_answered(struct lb_lease *l, uint64_t sent_ns, uint64_t now_ns);
enum lb_lease_state lb_lease_state(const struct lb_lease *l, uint64_t now_ns);
/* When the state changes next if nothing is heard; UINT64_MAX once it has lapsed. */
uint64_t lb_lease_next_ns(const struct lb_lease *l, uint64_t now_ns);

/* backup */
void lb_promise_heard(struct lb_lease *l, uint64_t now_ns);
bool lb_promise_over(const struct lb_lease *l, uint64_t now_ns);
uint64_t lb_promise_end_ns(const struct lb_lease *l);

#endif
