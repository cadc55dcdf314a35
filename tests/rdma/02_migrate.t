#!/usr/bin/python3
"""Migration over RDMA and over TCP: memory compared page by page before it is handed over, from a guest whose memory is a memfd and
from one whose memory is nobody's file; bits that flip in flight; what is registered and pinned during and after it.
Arguments: only parts whose name contains one of them."""

import json
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
from daemons import MODES, Fleet, Guest, Road
from rig import Tap

TRANSPORT = {"tcp": "tcp", "bounce": "rdma", "zero-copy": "rdma zero-copy"}
CHUNK_BYTES = 16 << 20  # what zero copy registers at once of a memory that can be mapped


def copied_per_byte(result):
    return result["copied_bytes"] / result["wire_bytes"]


def went(t, result, mode, what):
    t.ok(result["transport"] == TRANSPORT[mode] and result["damaged_pages"] == 0 and not result["replaced_connections"],
         what + ": the result says how it went, and that nothing broke", result)
    t.ok((result["direct_pages"] > 0) == (mode == "zero-copy"), what + ": pages are written straight into memory with zero copy, and only then",
         result)


def way(t, road, mode):
    t.ok("memfd" in road.guest.memory_file(road.at), mode + ": memory that Lifeboat can map", road.guest.memory_file(road.at))
    result, _ = road.leg(mode)
    went(t, result, mode, mode)
    copied = copied_per_byte(result)
    t.ok(copied < 0.1 if mode == "zero-copy" else copied >= 1, "%s: %.3f bytes copied for each that is transferred" % (mode, copied))


def anonymous(t, fleet, mode):
    """A QEMU with no memory backend: its pages are read into a buffer, and that is what zero copy writes from. The receiver has a memfd."""
    what = "anonymous " + mode
    guest = Guest(fleet, backing="anonymous")
    road = Road(t, fleet, guest)
    source, target = road.at, road.to()
    t.equal(guest.memory_file(source), "", what + ": nothing that could be mapped")
    result, watch = road.leg(mode, what=what)
    went(t, result, mode, what)
    t.ok("memfd" in guest.memory_file(target), what + ": a memfd there", guest.memory_file(target))
    if mode == "zero-copy":
        copied, registered = copied_per_byte(result), watch.registered
        t.ok(0.9 < copied < 1.2, "%s: each page is copied once, %.3f bytes for each that is transferred" % (what, copied))
        t.ok(registered[source] < CHUNK_BYTES <= registered[target], what + ": buffers are registered here, the guest's memory there",
             "%d, %d" % (registered[source], registered[target]))
    guest.stop()


def damage(t, road):
    """Bits flip after the checksum was made, on their way into the other's memory."""
    result, _ = road.leg("zero-copy", what="one write damaged", env={"LIFEBOAT_RDMA_FLIP": "5"})
    t.ok(result["damaged_pages"] >= 1, "one write damaged: was noticed and sent again", result)
    source, target = road.at, road.to()
    source.restart({"LIFEBOAT_RDMA_FLIP": "all"})
    code, out, err = source.cli("migrate", "vm", target.node.role, *MODES["zero-copy"], "--json", check=False)
    result = json.loads(out.strip().splitlines()[-1])["result"]
    error = result.get("error", {})
    t.ok(code != 0 and result["final_state"] == "running" and result["damaged_pages"] > 0 and "damaged" in error.get("message", "") and
         "--transport tcp" in error.get("remedy", ""), "all writes damaged: the migration fails before the hand-over, says why, and what to do",
         out + err)
    source.restart()
    road.settle("all writes damaged: the guest stays where it was, whole; nothing left", source)


def main():
    with Tap() as t:
        if os.geteuid() != 0:
            t.skip_all("virtual machines that see this one's files need root")

        def wanted(part):
            return not sys.argv[1:] or any(word in part for word in sys.argv[1:])
        begin = time.monotonic()
        with Fleet() as fleet:
            t.diag("hosts up after %.1f s" % (time.monotonic() - begin))
            if any(wanted(part) for part in list(MODES) + ["damage"]):
                road = Road(t, fleet, Guest(fleet))
                for mode in MODES:
                    if wanted(mode):
                        way(t, road, mode)
                if wanted("damage"):
                    damage(t, road)
                road.guest.stop()
            for mode in MODES:
                if wanted("anonymous " + mode):
                    anonymous(t, fleet, mode)
            t.diag("%.0f s" % (time.monotonic() - begin))


if __name__ == "__main__":
    main()
