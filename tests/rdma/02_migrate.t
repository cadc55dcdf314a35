#!/usr/bin/python3
"""Migration over RDMA and over TCP: memory compared page by page before it is handed over, bits that flip in flight, what is
registered and pinned during and after it, and what each way costs. Arguments: only parts whose name contains one of them."""

import json
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
from daemons import MODES, Command, Fleet, Guest, Road, at_point
from rig import Tap

COMPARE_MS = 8000
COST_MB = 96
READY_MS = 1500
TRANSPORT = {"tcp": "tcp", "bounce": "rdma", "zero-copy": "rdma zero-copy"}


def compared(t, road, mode, what=None, env=None):
    """Both copies stand still when the destination has said that it has everything: they are read from outside. Returns the result."""
    source, target, guest, what = road.at, road.to(), road.guest, what or mode
    wait = at_point(source, "src-prepared", COMPARE_MS, env)
    command = Command(source, "migrate", "vm", target.node.role, *MODES[mode], "--json")
    wait(command)
    begin = time.monotonic()
    pages, copy = guest.pages(source), guest.pages(target)
    still = not guest.where()
    took = time.monotonic() - begin
    different = [i for i, (one, other) in enumerate(zip(pages, copy)) if one != other]
    t.ok(still and len(pages) == len(copy) and len(set(pages)) > len(pages) // 2 and not different,
         "%s: %d pages, %d of them unlike any other, are the same on both hosts" % (what, len(pages), len(set(pages))),
         "different: %s, guest running: %s" % (different[:20], guest.where()))
    t.diag("compared in %.1f s" % took)
    result = command.result()
    source.restart()
    road.settle("%s: goes on there after that" % what, target)
    return result


def way(t, road, mode):
    result = road.leg(mode)
    t.equal(result["transport"], TRANSPORT[mode], mode + ": the result says how it went")
    t.ok((result["direct_pages"] > 0) == (mode == "zero-copy") and result["damaged_pages"] == 0,
         mode + ": pages are written straight into memory with zero copy, and only then", result)
    compared(t, road, mode)


def damage(t, road):
    """Bits flip after the checksum was made, on their way into the other's memory."""
    result = compared(t, road, "zero-copy", "one write damaged", {"LIFEBOAT_RDMA_FLIP": "5"})
    t.ok(result["ok"] and result["damaged_pages"] >= 1, "one write damaged: was noticed and sent again", result)
    source, target = road.at, road.to()
    source.restart({"LIFEBOAT_RDMA_FLIP": "all"})
    code, out, err = source.cli("migrate", "vm", target.node.role, *MODES["zero-copy"], "--json", check=False)
    result = json.loads(out.strip().splitlines()[-1])["result"]
    t.ok(code != 0 and result["final_state"] == "running" and result["damaged_pages"] > 0,
         "all writes damaged: the migration fails before the hand-over", out + err)
    source.restart()
    road.settle("all writes damaged: the guest stays where it was, whole", source)


def sessions_cpu_s(fleet):
    """Of all sessions so far: of those that have ended, and of those that work."""
    ended = sum(host.node.call("cpu_of_s", host.pid, True) for host in fleet.hosts)
    return ended + sum(host.node.call("cpu_of_s", pid) for host in fleet.hosts for pid in host.sessions())


def cost(t, fleet):
    """What each way costs both hosts together, from when the receiver is up until the source's copy is gone. Of soft-RoCE the
    kernel does what a device would do, which is not in the sessions' time; and theirs is as these machines see it, which on a busy
    machine is too long."""
    guest = Guest(fleet, memory_mb=COST_MB, work="rate=0 verify=0 body=random")
    road, copied = Road(t, fleet, guest), {}
    for mode in MODES:
        source, target = road.at, road.to()
        wait = at_point(source, "src-ready", READY_MS)
        command = Command(source, "migrate", "vm", target.node.role, *MODES[mode], "--compress", "off", "--json")
        wait(command)
        begin, hosts_s, own_s = time.monotonic(), fleet.cpu_s(), sessions_cpu_s(fleet)
        result = command.result(interval_s=0.5)
        took = time.monotonic() - begin - READY_MS / 1e3
        hosts_s = fleet.cpu_s() - hosts_s
        road.settle("%s with %d MB: the same guest, whole" % (mode, COST_MB), target)
        own_s = sessions_cpu_s(fleet) - own_s
        gb, copied[mode] = result["wire_bytes"] / 1e9, result["copied_bytes"] / result["wire_bytes"]
        t.diag("%s: %.1f MB, %.1f MB/s, copied bytes per transferred byte %.3f, processor seconds per GB: %.0f of the sessions, "
               "%.0f of both hosts" % (mode, gb * 1e3, gb * 1e3 / took, copied[mode], own_s / gb, hosts_s / gb))
    t.ok(copied["zero-copy"] < 0.1 and copied["bounce"] >= 1, "zero copy copies less than a tenth of what it transfers", copied)
    guest.stop()


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
            if wanted("cost"):
                cost(t, fleet)
            t.diag("%.0f s" % (time.monotonic() - begin))


if __name__ == "__main__":
    main()
