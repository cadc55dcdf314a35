#!/usr/bin/python3
"""Migration over RDMA and over TCP: memory compared page by page before it is handed over, what is registered and pinned during
and after it, and what each way costs. Arguments: only these ways."""

import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
from bed import wait_for
from daemons import MODES, Command, Fleet, Guest, Road
from rig import Tap

COMPARE_MS = 8000


def compared(t, road, mode):
    """Both copies stand still when the destination has said that it has everything: they are read from outside."""
    source, target, guest = road.at, road.to(), road.guest
    paused = source.node.path("paused")
    source.node.call("remove", paused)
    source.restart({"LIFEBOAT_PAUSE_AT": "src-prepared:%d" % COMPARE_MS, "LIFEBOAT_PAUSE_FILE": paused})
    command = Command(source, "migrate", "vm", target.node.role, *MODES[mode], "--json")
    wait_for(lambda: source.node.call("read", paused) is not None or command.done(), 90, "the point before the hand-over", 0.1)
    begin = time.monotonic()
    pages, copy = guest.pages(source), guest.pages(target)
    still = not guest.where()
    took = time.monotonic() - begin
    different = [i for i, (one, other) in enumerate(zip(pages, copy)) if one != other]
    t.ok(still and len(pages) == len(copy) and len(set(pages)) > len(pages) // 2 and not different,
         "%s: %d pages, %d of them unlike any other, are the same on both hosts" % (mode, len(pages), len(set(pages))),
         "different: %s, guest running: %s" % (different[:20], guest.where()))
    t.diag("compared in %.1f s" % took)
    command.wait()
    source.restart()
    road.settle("%s: goes on there after that" % mode, target)




def main():
    with Tap() as t:
        if os.geteuid() != 0:
            t.skip_all("virtual machines that see this one's files need root")
        begin = time.monotonic()
        with Fleet() as fleet:
            t.diag("hosts up after %.1f s" % (time.monotonic() - begin))
            guest = Guest(fleet)
            t.diag("guest up after %.1f s" % (time.monotonic() - begin))
            road = Road(t, fleet, guest)
            for mode in sys.argv[1:] or MODES:
                road.leg(mode)
                compared(t, road, mode)
            guest.stop()


if __name__ == "__main__":
    main()
