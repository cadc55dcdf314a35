#!/usr/bin/python3
"""What a migration over TCP, over RDMA with buffers, and over RDMA with zero copy costs both hosts: `make bench-rdma`.

On soft-RoCE the speed says nothing, and of what both hosts spend the kernel does a device's part, copies and checksums. What can be
compared is copied_per_byte: of each byte that went over the wire, how many were moved by a processor of the source's Lifeboat
(encrypted, copied to a buffer, copied by the kernel to a socket); and processor seconds per GB, of both hosts without what they need
while nothing goes on, and of the sessions alone. Of virtual machines the hosts' is that of the two emulators; the sessions' is as these
machines see it, which on a busy machine is too long.

From when the receiver is up until the source's copy is gone; a guest of random pages that writes nothing, no compression. The modes take
turns, so that a change of the machine's mood comes to all of them. Figures are the medians.
"""

import argparse
import os
import statistics
import sys
import time

HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:0] = [HERE, os.path.join(HERE, "..", "bench"), os.path.join(HERE, "..", "rig")]
from bench_migrate import machine, write_json
from daemons import MODES, Command, Fleet, Guest, Road, at_point
from rig import BUILD, RigError, Tap

READY_MS = 1500  # to notice that the receiver is up
IDLE_S = 5
COLUMNS = (("copied_per_byte", "%.3f"), ("hosts_cpu_s_per_gb", "%.0f"), ("sessions_cpu_s_per_gb", "%.0f"), ("mb_per_s", "%.1f"),
           ("wire_mb", "%.1f"), ("registered_mb", "%.1f"))


def sessions_cpu_s(fleet):
    """Of all sessions so far: of those that have ended, and of those that work."""
    ended = sum(host.node.call("cpu_of_s", host.pid, True) for host in fleet.hosts)
    return ended + sum(host.node.call("cpu_of_s", pid) for host in fleet.hosts for pid in host.sessions())


def idle_rate(fleet):
    """Processor seconds per second of both hosts, with the guest and the daemons, while nothing goes on."""
    begin, spent = time.monotonic(), fleet.cpu_s()
    time.sleep(IDLE_S)
    return (fleet.cpu_s() - spent) / (time.monotonic() - begin)


def turn(road, fleet, mode):
    """One migration: its figures."""
    source, target = road.at, road.to()
    wait = at_point(source, "src-ready", READY_MS)
    idle = idle_rate(fleet)
    command = Command(source, "migrate", "vm", target.node.role, *MODES[mode], "--compress", "off", "--json")
    wait(command)
    begin, hosts_s, own_s = time.monotonic(), fleet.cpu_s(), sessions_cpu_s(fleet)
    result = command.result(interval_s=0.5)
    took = time.monotonic() - begin
    hosts_s = fleet.cpu_s() - hosts_s - took * idle
    if not road.settle("%s: the same guest, whole" % mode, target):
        raise RigError("the guest did not come over %s whole" % mode)
    own_s = sessions_cpu_s(fleet) - own_s
    gb = result["wire_bytes"] / 1e9
    return {"mode": mode, "transport": result["transport"], "wire_mb": gb * 1e3, "mb_per_s": gb * 1e3 / (took - READY_MS / 1e3),
            "copied_per_byte": result["copied_bytes"] / result["wire_bytes"], "hosts_cpu_s_per_gb": hosts_s / gb,
            "sessions_cpu_s_per_gb": own_s / gb, "registered_mb": result["registered_max_bytes"] / 1e6, "idle_cpus": idle,
            "load": os.getloadavg()[0]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="migrations of each mode")
    parser.add_argument("--size", type=int, default=96, help="MB of the guest's memory")
    args = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("bench.py: virtual machines that see this one's files need root")
    path, report = os.path.join(BUILD, "bench", "rdma.json"), dict(machine(), size_mb=args.size)
    with Tap() as t, Fleet() as fleet:
        report["device"] = "soft-RoCE in virtual machines" if fleet.virtual else fleet.a.node.device
        road = Road(t, fleet, Guest(fleet, memory_mb=args.size, work="rate=0 verify=0 body=random"))
        turns = [turn(road, fleet, mode) for _ in range(args.runs) for mode in MODES]
        road.guest.stop()
        report["turns"] = turns
        report["modes"] = {mode: {name: statistics.median(one[name] for one in turns if one["mode"] == mode) for name, _ in COLUMNS}
                           for mode in MODES}
        write_json(path, report)
        t.diag("%-10s %s" % ("median", "".join("%23s" % name for name, _ in COLUMNS)))
        for mode, figures in report["modes"].items():
            t.diag("%-10s %s" % (mode, "".join("%23s" % (form % figures[name]) for name, form in COLUMNS)))
        t.diag(path)


if __name__ == "__main__":
    main()
