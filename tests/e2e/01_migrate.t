#!/usr/bin/python3
"""The main road: run and adopt, there and back with every option, what status, ls, show and history say, and what the guest,
its clients and the machine see of it."""

import os
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), "..", "rig"))
from lifeboat import EchoLine, Fleet, need
from rig import CLIENT_IP, UDP_PORT, RedisLoad, RigError, Tap, UdpGap, wait_for

WORK = "dirty=20:48:mixed disk=vda udp=%s:%d redis clock echo" % (CLIENT_IP, UDP_PORT)


class Road:
    """One guest, moved again and again; knows where it is."""

    def __init__(self, t, fleet, name, role, status, udp):
        self.t, self.fleet, self.name, self.role, self.udp = t, fleet, name, role, udp
        self.nonce, self.disk, self.moves = status["nonce"], status["disk_verified"], 0

    def other(self):
        return "b" if self.role == "a" else "a"

    def leg(self, *options):
        """Moves it to the other host and asks everybody about it."""
        t, fleet, name, source, target = self.t, self.fleet, self.name, self.role, self.other()
        what = "%s %s->%s %s" % (name, source, target, " ".join(options))
        before = time.time()
        try:
            result = fleet.migrate(name, source, target, *options)
        except RigError as error:
            t.ok(False, what, "%s\n%s" % (error, fleet.all_logs()))
            raise
        after = time.time()
        self.role, self.moves = target, self.moves + 1
        t.ok(result["ok"] and result["final_state"] == "moved" and result["rounds"] >= 1 and result["wire_bytes"] > 0 and
             0 < result["downtime_ms"] < result["total_ms"] <= (after - before) * 1e3, what, result)
        t.diag("%s: %.0f ms, %d rounds, %.1f MB, downtime %.1f ms as measured there, %.1f ms as the client saw it" %
               (what, result["total_ms"], result["rounds"], result["wire_bytes"] / 1e6, result["downtime_ms"],
                self.udp.longest_gap_ms(before, after)))
        fleet.one_qemu(t, target, what + ": one QEMU, on the destination")
        self.registered(what, result)
        self.fleet.nothing_left(t, source, what + ": nothing left on the source", name)
        status = fleet.clean(t, self.nonce, what + ": the same guest, memory and disk clean", disk=self.disk)
        if status:
            self.disk = status["disk_verified"]
        return result

    def registered(self, what, result):
        t, fleet, name = self.t, self.fleet, self.name
        here, there = fleet.daemons[self.role], fleet.daemons[self.other()]
        t.equal((here.vms().get(name, {}).get("state"), name in there.vms()), ("running", False),
                what + ": ls has it on the destination alone")
        status = here.json("status", name)
        t.ok(status["name"] == name and status["state"] == "running", what + ": status says running", status)
        shown = here.json("show", name)
        t.ok("qemu-system" in str(shown) and "pc-i440fx-7.2" in str(shown), what + ": show describes the machine", shown)
        for daemon, direction in ((there, "out"), (here, "in")):
            lines = history(daemon, name)
            t.ok(len(lines) and lines[0]["direction"] == direction and lines[0]["ok"], what + ": history, %s" % direction,
                 lines[:2])
        line = history(there, name)[0]
        t.equal([line[k] for k in ("rounds", "wire_bytes", "downtime_ms")],
                [result[k] for k in ("rounds", "wire_bytes", "downtime_ms")], what + ": history has the result's numbers")


def history(daemon, name):
    """Records of a VM, newest first."""
    lines = [line for line in daemon.json("history", name)["history"] if line["vm"] == name]
    return sorted(lines, key=lambda line: line["started_ms"], reverse=True)


def dry_run(t, fleet, name, role, other, nonce):
    """Preflight and --dry-run answer and touch nothing."""
    pids, entry = fleet.qemus(), fleet.daemons[role].vms()[name]
    records = [len(history(d, name)) for d in fleet.daemons.values()]
    for argv in (("preflight", name, other), ("migrate", name, other, "--dry-run")):
        answer = fleet.daemons[role].json(*argv)
        checks = answer.get("checks", answer.get("preflight"))
        t.ok(checks and all(c["status"] in ("ok", "warn") for c in checks) and
             {"memory", "machine-type", "cpu-features", "disks", "name"} <= {c["id"] for c in checks},
             "%s lists its checks, none refuses" % argv[0], answer)
    t.equal((fleet.qemus(), fleet.daemons[role].vms()[name]["state"]), (pids, entry["state"]), "and starts and changes nothing")
    fleet.nothing_left(t, other, "and leaves nothing on the destination", name)
    t.equal([len([line for line in history(d, name) if not line.get("dry_run")]) for d in fleet.daemons.values()], records,
            "and is no migration in history")
    fleet.clean(t, nonce, "and the guest works on", verify_all=False)


def clients(t, fleet, road):
    """Connections from outside live through the moves."""
    redis, echo = RedisLoad(fleet.client, rate=300), EchoLine(fleet.client)
    redis.wait_flowing()
    road.leg()
    road.leg("--verify", "--compress", "zstd:3", "--channels", "4")
    report, line = redis.stop(), echo.stop()
    t.ok(report["lost"] == 0 and report["reconnects"] == 0 and report["requests"] > 100,
         "Redis: one connection through two moves, no request lost", report)
    t.ok(line["error"] is None and line["answered"] > 50, "an echo connection through two moves", line)
    t.diag("Redis: longest wait %.1f ms; echo: %.1f ms" % (report["longest_ms"], line["longest_ms"]))


def by_run(t, fleet, udp):
    disk = fleet.make_disk("run.img")
    fleet.run_vm("a", "one", memory_mb=512, disk=disk, work=WORK)
    status = fleet.wait_guest()
    udp.wait_flowing()
    road = Road(t, fleet, "one", "a", status, udp)
    t.equal(fleet.da.vms()["one"]["origin"], "run", "a VM started by run")
    dry_run(t, fleet, "one", "a", "b", road.nonce)
    clients(t, fleet, road)
    result = road.leg("--verify")
    t.ok(len(result["digest"]) == 32, "--verify: both ends agreed on a digest of all memory", result)
    result = road.leg("--bandwidth", "800Mbit", "--max-downtime", "100ms", "--compress", "off")
    rate = result["wire_bytes"] * 8e-3 / result["total_ms"]
    t.ok(rate < 840 and result["zstd_pages"] == 0, "--bandwidth 800Mbit is kept: %.0f Mb/s; --compress off" % rate, result)
    fleet.daemons[road.role].cli("stop", "one")
    wait_for(lambda: not any(fleet.qemus().values()), 20, "QEMU gone after stop")
    for role in "ab":
        fleet.nothing_left(t, role, "after stop, nothing is left on " + role, "one")


def by_adopt(t, fleet, udp):
    disk = fleet.make_disk("adopt.img")
    vm = fleet.start_qemu(fleet.a, "two", memory_mb=384, disk=disk, work=WORK)
    status = fleet.wait_guest()
    vm.qmp.close()
    pid = vm.pid
    fleet.da.cli("adopt", "two", "--pid", str(pid), "--qmp", vm.spare_qmp_path)
    entry = fleet.da.vms()["two"]
    t.equal((entry["origin"], entry["state"], entry["pid"]), ("adopted", "running", pid), "adopt with --qmp")
    fleet.da.cli("release", "two")
    t.ok("two" not in fleet.da.vms() and fleet.da.qemu_pids() == [pid], "release forgets it and leaves it running")
    fleet.clean(t, status["nonce"], "unharmed", verify_all=False)
    fleet.da.cli("adopt", "two", "--pid", str(pid))
    t.equal(fleet.da.vms()["two"]["pid"], pid, "adopt finds the monitor by itself")
    road = Road(t, fleet, "two", "a", status, udp)
    road.leg()
    road.leg("--verify")
    for role in ("a", "b"):
        t.equal(sorted(line["direction"] for line in history(fleet.daemons[role], "two")), ["in", "out"],
                "history of %s: once out, once in" % role)
    fleet.stop_vm("two")


def main():
    with Tap() as t:
        need(t)
        with Fleet("lbmig") as fleet:
            udp = UdpGap(fleet.client)
            by_run(t, fleet, udp)
            by_adopt(t, fleet, udp)


if __name__ == "__main__":
    main()
