#!/usr/bin/python3
"""Protection over RDMA: epochs arrive, nothing stays registered when it ends, and when the host dies the guest goes on with the
other one, the same guest and whole."""

import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
from bed import wait_for
from daemons import Fleet, Guest, Road, Witness
from rig import Tap

LEASE_S = 4  # at least; half the time that these machines took to come up, as that says how slow they are


def status(host):
    """What a host says of its protection; None when it has none."""
    for entry in host.json("top", "--once")["protections"]:
        if entry.get("vm") == "vm":
            return entry
    return None


def protect(t, fleet, witness, what):
    """Over RDMA, with the guest on a; waits for some epochs."""
    lease = "%dms" % (max(LEASE_S, fleet.up_s / 2) * 1e3)
    fleet.a.cli("protect", "vm", "--backup", "b", "--witness", witness.spec, "--lease", lease, "--transport", "rdma", "--interval", "100ms")

    def acked():
        entry = status(fleet.a)
        return entry if entry and entry["state"] == "protected" and entry["acked"] >= 20 else None
    entry = wait_for(acked, 90, "20 epochs at the backup", 0.5)
    registered = [host.node.registered_bytes() for host in fleet.hosts]
    t.ok(min(registered) > 0, "%s: epochs are acknowledged, over RDMA" % what, "registered %s, %s" % (registered, entry))
    t.diag("%s: %.1f epochs/s, %s bytes registered" % (what, entry["epochs_per_s"], registered))


def main():
    with Tap() as t:
        if os.geteuid() != 0:
            t.skip_all("virtual machines that see this one's files need root")
        with Fleet() as fleet, Witness(fleet) as witness:
            guest = Guest(fleet)
            road = Road(t, fleet, guest)
            protect(t, fleet, witness, "protect")
            fleet.a.cli("unprotect", "vm")
            road.settle("unprotect: the same guest, whole; nothing left, registered or pinned", fleet.a)
            protect(t, fleet, witness, "again")
            last = guest.ticks(fleet.a)[-1]["tick"]
            begin = time.monotonic()
            fleet.crash(fleet.a)
            wait_for(lambda: guest.running(fleet.b), 90, "the guest on the other host", 0.2)
            t.diag("runs there %.1f s after the crash" % (time.monotonic() - begin))
            wait_for(lambda: guest.ticks(fleet.b), 60, "a line of it", 0.2)
            trouble = guest.trouble(fleet.b)
            wait_for(lambda: not fleet.rdma_leftovers(fleet.b), 60, "the end of what carried its epochs", 0.5)
            t.ok(True, "the host died: nothing is left registered or pinned on the other one")
            first = guest.ticks(fleet.b)[0]["tick"]
            t.ok(not trouble, "the host died: the same guest goes on with the other one, whole", "%s\n%s" % (trouble, fleet.b.logs()))
            t.ok(last - 8 <= first <= last + 8, "from where it was: tick %d there, %d the last heard of" % (first, last))


if __name__ == "__main__":
    main()
