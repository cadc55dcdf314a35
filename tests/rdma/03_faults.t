#!/usr/bin/python3
"""The fabric, the device, one of several connections or everything goes away at a random moment of a migration over RDMA. With the
fabric alone gone it goes on over TCP; with everything gone it fails, and the guest stays where it was. It runs once, whatever happens.
And a fabric that looks well but lets nothing through: --transport auto takes TCP instead, soon.

LB_SEED=N chooses the moments. LB_FULL=1: every fault in both modes, else only SOME of them with bounce buffers.
Arguments: only cases whose name contains one of them."""

import json
import os
import random
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
from bed import LINKS
from daemons import MODES, PATIENT, Command, Fleet, Guest, Road, at_point
from rig import Tap

SLOW = PATIENT + ["--bandwidth", "40Mbit", "--compress", "off"]  # some seconds for a guest of 24 MB
LATEST_S = 3.5


def cut_all(node, on):
    for link in LINKS:
        node.cut(link, on)


def lose_one(node, on):
    """All for one of the connections, from now on."""
    node.lose(random.choice(node.pairs()) if on else None)


# name: (what happens to a node of the source and of the destination, does TCP live on, options)
FAULTS = {
    "cable of the fabric pulled": (lambda source, target, on: target.cut("fab", on), True, []),
    "interface set down on the source": (lambda source, target, on: source.interface("fab", not on), True, []),
    "device taken away on the destination": (lambda source, target, on: target.device_gone(on), True, []),
    "device taken away on the source": (lambda source, target, on: source.device_gone(on), True, []),
    "one of 4 connections lost": (lambda source, target, on: lose_one(target, on), True, ["--channels", "4"]),
    "all cables pulled": (lambda source, target, on: cut_all(target, on), False, []),
}
# with bounce buffers, unless LB_FULL is set
SOME = ["cable of the fabric pulled", "device taken away on the source", "one of 4 connections lost"]
# name: what is lost of what comes in at the source, at the destination
DEAF = {
    "nothing comes to the destination": (None, "all"),
    "no answer comes to the source": ("all", None),
    "connections come about, and carry nothing": (None, "data"),
}
SOON_S = 12  # to set up with TCP after all: 4 s for RDMA, and these machines are slow


def case(t, road, mode, name, delay_s):
    fault, tcp_lives, options = FAULTS[name]
    source, target = road.at, road.to()
    what = "%s, %s after %.1f s" % (mode, name, delay_s)
    begins = at_point(source, "src-round-0", 1)
    command = Command(source, "migrate", "vm", target.node.role, *MODES[mode], *SLOW, *options, "--json")
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
        if options:
            t.ok('"replaced_connections":1,' in out, what + ": the other ones stay with RDMA", out)
    else:
        t.ok(code != 0, what + ": fails", out)
    t.diag("over %.1f s after the fault" % took)
    road.settle(what + ": the same guest, whole, once; nothing left", target if code == 0 else source)


def deaf(t, road, name):
    """--transport auto where both ends have a device with a link, and it does not do."""
    source, target = road.at, road.to()
    what, (at_source, at_target) = "auto, " + name, DEAF[name]
    source.node.lose(at_source)
    target.node.lose(at_target)
    try:
        command = Command(source, "migrate", "vm", target.node.role, "--transport", "auto", "--trusted-fabric", *PATIENT, "--json")
        code, out = command.wait(180)
        lost = [node.lost() for node, taken in ((source.node, at_source), (target.node, at_target)) if taken]
    finally:
        for host in (source, target):
            host.node.lose(None)
    result = json.loads(out.strip().splitlines()[-1])
    t.ok(code == 0 and result["transport"] == "tcp" and "RDMA" in result.get("why_tcp", "") and min(lost) > 0,
         "%s: goes over TCP, and says why" % what, "%s lost\n%s\n%s" % (lost, out, road.fleet.logs()))
    t.ok(result["setup_ms"] < SOON_S * 1e3, "%s: soon" % what, "%.1f s" % (result["setup_ms"] / 1e3))
    t.diag("%s: %s; set up after %.1f s; %s packets lost" % (what, result.get("why_tcp"), result["setup_ms"] / 1e3, lost))
    road.settle(what + ": the same guest, whole, once; nothing left", target if code == 0 else source)


def main():
    with Tap() as t:
        if os.geteuid() != 0:
            t.skip_all("virtual machines that see this one's files need root")
        seed = int(os.environ.get("LB_SEED", time.time()))
        t.diag("LB_SEED=%d" % seed)
        random.seed(seed)
        with Fleet() as fleet:
            if not fleet.virtual:
                t.skip_all("the device and its network belong to others, too")
            road = Road(t, fleet, Guest(fleet, work="rate=256K"))
            for mode in ("bounce", "zero-copy"):
                for name in FAULTS if mode == "zero-copy" or os.environ.get("LB_FULL") else SOME:
                    delay_s = random.uniform(0, LATEST_S)
                    if not sys.argv[1:] or any(word in mode + " " + name for word in sys.argv[1:]):
                        case(t, road, mode, name, delay_s)
            for name in DEAF:
                if not sys.argv[1:] or any(word in "auto " + name for word in sys.argv[1:]):
                    deaf(t, road, name)
            road.guest.stop()


if __name__ == "__main__":
    main()
