#!/usr/bin/python3
"""The fabric, the device or everything goes away at a random moment of a migration over RDMA. With the fabric alone gone it goes on
over TCP; with everything gone it fails, and the guest stays where it was. It runs once, whatever happens.

LB_SEED=N chooses the moments. LB_FULL=1: every fault in both modes, else only SOME of them with bounce buffers.
Arguments: only cases whose name contains one of them."""

import os
import random
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
from bed import LINKS
from daemons import MODES, Command, Fleet, Guest, Road, at_point
from rig import Tap

SLOW = ["--bandwidth", "40Mbit", "--compress", "off"]  # some seconds for a guest of 24 MB
LATEST_S = 3.5


def cut_all(node, on):
    for link in LINKS:
        node.cut(link, on)


# name: (what happens to a node of the source and of the destination, does TCP live on)
FAULTS = {
    "cable of the fabric pulled": (lambda source, target, on: target.cut("fab", on), True),
    "interface set down on the source": (lambda source, target, on: source.interface("fab", not on), True),
    "device taken away on the destination": (lambda source, target, on: target.device_gone(on), True),
    "device taken away on the source": (lambda source, target, on: source.device_gone(on), True),
    "all cables pulled": (lambda source, target, on: cut_all(target, on), False),
}
# with bounce buffers, unless LB_FULL is set
SOME = ["cable of the fabric pulled", "device taken away on the source"]


def case(t, road, mode, name, delay_s):
    fault, tcp_lives = FAULTS[name]
    source, target = road.at, road.to()
    what = "%s, %s after %.1f s" % (mode, name, delay_s)
    begins = at_point(source, "src-round-0", 1)
    command = Command(source, "migrate", "vm", target.node.role, *MODES[mode], *SLOW, "--json")
    try:
        begins(command)
        time.sleep(delay_s)
        early = command.done()
        begin = time.monotonic()
        fault(source.node, target.node, True)
        code, out = command.wait(120)
    finally:
        fault(source.node, target.node, False)
    took = time.monotonic() - begin
    if early:
        t.ok(False, what, "the migration was over before: %s" % out)
    elif tcp_lives:
        # The kernel may wait with taking a device away until nobody uses it: then all goes over RDMA to its end.
        over_tcp = '"transport":"rdma+tcp"' in out
        t.ok(code == 0 and (over_tcp or "device" in name), what + ": goes on" + (" over TCP" if over_tcp else ""),
             "%s\n%s" % (out, road.fleet.logs()))
    else:
        t.ok(code != 0, what + ": fails", out)
    t.diag("over %.1f s after the fault" % took)
    road.settle(what + ": the same guest, whole, once; nothing left", target if code == 0 else source)


def main():
    with Tap() as t:
        if os.geteuid() != 0:
            t.skip_all("virtual machines that see this one's files need root")
        seed = int(os.environ.get("LB_SEED", time.time()))
        t.diag("LB_SEED=%d" % seed)
        draw = random.Random(seed)
        with Fleet() as fleet:
            if not fleet.virtual:
                t.skip_all("the device and its network belong to others, too")
            road = Road(t, fleet, Guest(fleet, work="rate=256K"))
            for mode in ("bounce", "zero-copy"):
                for name in FAULTS if mode == "zero-copy" or os.environ.get("LB_FULL") else SOME:
                    delay_s = draw.uniform(0, LATEST_S)
                    if not sys.argv[1:] or any(word in mode + " " + name for word in sys.argv[1:]):
                        case(t, road, mode, name, delay_s)
            road.guest.stop()


if __name__ == "__main__":
    main()
