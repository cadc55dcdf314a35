#!/usr/bin/python3
"""Emptying a host: the plan, the evacuation, maintenance mode, the way back. Then what may go wrong in the middle of it, each
followed by another `lifeboat evacuate` that finishes the job: whoever dies, every VM runs exactly once and has lost nothing.

Guests are tests/guest/tiny.c and two of Linux; LB_FULL=1: a hundred. Arguments: only parts whose name contains one of them.
"""

import os
import random
import signal
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), "..", "rig"))
from evacuate import TINY, Evacuation, Harbour
from lifeboat import need
from rig import RigError, Tap, wait_for

FULL = os.environ.get("LB_FULL") == "1"
TINIES = 90 if FULL else 10
LINUXES = 10 if FULL else 2
FAULTY = 6           # VMs on the host of a part in which something goes wrong
STORM_SEEDS = range(20) if FULL else [7]
RATES = ("", "rate=500K", "rate=1M hz=20", "rate=2M hz=20")
LINK_MBIT = 400
STILL_MS = 3000      # at most, on a machine that is busy with tests
HOT_MBIT = 250
SLOW_MBIT = 100       # so that there is a middle


class Scene:
    """Host A full of VMs, B and C to take them."""

    def __init__(self, t, port):
        self.t, self.port = t, port
        self.parts = 0

    def fill(self, count=FAULTY):
        """Tiny guests on A under names of their own."""
        self.parts += 1
        names = ["p%d-%02d" % (self.parts, i) for i in range(count)]
        for i, name in enumerate(names):
            self.port.run_tiny("a", name, RATES[i % len(RATES)])
        self.port.wait_all()
        return names

    def empty(self):
        """Every VM ends, wherever it is; A is an ordinary host again."""
        self.port.end_all()
        self.port.da.cli("maintenance", "off", check=False)

    def evacuate(self, *options):
        return Evacuation(self.port.da, "evacuate", "--yes", *options)

    def middle(self, run, done=1, timeout_s=60):
        """Waits until some VMs have left and others are under way."""
        def reached():
            if run.done():
                raise RigError("the evacuation ended too early: %s %s" % (run.last(), run.text))
            last = run.last()
            return last.get("done", 0) >= done and last.get("active", 0) > 0
        wait_for(reached, timeout_s, "the middle of an evacuation", 0.01)

    def under_way(self):
        """A full host, slow links, and the middle of its evacuation."""
        self.fill()
        self.port.shape(SLOW_MBIT)
        run = self.evacuate()
        self.middle(run)
        return run

    def finished(self, what, *options, places="bc"):
        """Test lines: `lifeboat evacuate` (again) ends well, A is empty, every VM runs exactly once and is clean."""
        run = self.evacuate(*options)
        code, last = run.wait(180)
        self.t.ok(code == 0 and last.get("ok"), what + ": evacuate finishes the job",
                  "exit %d\n%s\n%s" % (code, run.story(), self.port.all_logs()))
        self.settled(what, places)

    def settled(self, what, places):
        self.port.once(self.t, what + ": every VM runs exactly once", set(places))
        self.port.clean_all(self.t, what + ": the same guests, clean")

    def left_on_a(self):
        return sorted(self.port.da.vms())


# ---- who is asked notices what is wrong


def part_witnesses(scene):
    """The same VM twice, and a damaged page: the parts below rely on its being seen."""
    t, port = scene.t, scene.port
    copies = [host.popen(port.tiny_argv(host, "twin")) for host in (port.a, port.b)]
    port.watch("twin")
    wait_for(lambda: port.consoles["twin"].problems, 20, "the twins being noticed on their console")
    wait_for(lambda: port.census.overlaps(), 20, "the twins being noticed in the census")
    copies[1].kill()
    copies[1].wait()
    port.forget_all()
    name = port.run_tiny("a", "hurt")
    port.wait_all()
    t.equal((port.misplaced("a"), port.damaged()), ([], []), "a VM that is well")
    with open("/proc/%d/mem" % port.census.of(name)[-1].pid, "r+b", buffering=0) as memory:
        memory.seek(guest_memory(memory.name) + (8 << 20) + 2048)
        memory.write(b"hurt")
    wrong = port.damaged()
    t.ok(any("checksum" in line for line in wrong), "a page that is damaged is found and named", wrong)
    copies[0].kill()
    copies[0].wait()


def guest_memory(path):
    """Where a process has its guest's 16 MB."""
    with open(os.path.join(os.path.dirname(path), "maps")) as f:
        for line in f:
            first, last = (int(word, 16) for word in line.split()[0].split("-"))
            if last - first == 16 << 20:
                return first
    raise RigError("no memory of a guest in " + path)


# ---- all goes well


def refused(scene, name, role, what):
    done = scene.port.daemons[role].cli("migrate", name, "a", check=False)
    scene.t.ok(done.returncode != 0 and "maintenance" in done.stdout + done.stderr, what,
               "exit %d: %s%s" % (done.returncode, done.stdout, done.stderr))


def part_there_and_back(scene):
    t, port = scene.t, scene.port
    for i in range(TINIES):
        port.run_tiny("a", "tiny%02d" % i, RATES[i % len(RATES)] + (" beat hz=50" if i % 10 == 9 else ""))
    for i in range(LINUXES):
        port.run_linux("a", "linux%d" % i, i, "calm dirty=1:24:mixed disk=vda", disk_mb=64)
    port.wait_all()
    names, port_names = set(port.names()), set(port.da.vms())
    t.equal(port_names, names, "%d VMs on A" % len(names))
    port.shape(LINK_MBIT)
    run = Evacuation(port.da, "evacuate", "--dry-run")
    code, _ = run.wait()
    plan = run.plan()
    t.ok(code == 0 and {step["vm"] for step in plan["steps"]} == names and not plan["stays"] and plan["makespan_s"] > 0 and
         {step["to"] for step in plan["steps"]} == {"b", "c"}, "the plan: every VM leaves, to both hosts",
         "exit %d: %s\n%s" % (code, plan, "".join(run.text)))
    t.equal((set(port.da.vms()), port.da.json("maintenance", "status")["maintenance"]), (names, False), "a plan alone does nothing")
    begin = time.monotonic()
    run = scene.evacuate()
    code, last = run.wait(600)
    took = time.monotonic() - begin
    t.ok(code == 0 and last.get("ok") and last["phase"] == "done" and last["done"] == len(names), "evacuated",
         "exit %d\n%s\n%s" % (code, run.story(), port.all_logs()))
    t.equal(scene.left_on_a(), [], "A is empty")
    kinds = [event["event"] for event in run.events]
    t.ok("plan" in kinds and kinds.index("plan") < kinds.index("evacuation"), "the plan comes before the first VM leaves", kinds[:20])
    scene.settled("evacuated", "bc")
    pauses = sorted(gap * 1e3 for name in names for _, _, gap in port.census.moves(name))
    t.ok(len(pauses) == len(names) and pauses[-1] < STILL_MS, "each moved once, and stood still for a moment only", pauses)
    t.diag("planned %.1f s, took %.1f s; VMs stood still for %.0f ms (p50), %.0f ms (longest)" %
           (run.plan().get("makespan_s", 0), took, pauses[len(pauses) // 2], pauses[-1]))
    t.ok({port.census.places(name)[0] for name in names} == {"b", "c"}, "on both hosts")
    somebody = next(name for name in sorted(names) if port.census.places(name) == ["b"])
    refused(scene, somebody, "b", "A is in maintenance: it takes no VM")
    port.da.restart()
    t.equal(port.da.json("maintenance", "status")["maintenance"], True, "still after a restart of its daemon")
    refused(scene, somebody, "b", "and refuses")
    back = Evacuation(port.da, "maintenance", "off", "--bring-back")
    code, last = back.wait(600)
    t.ok(code == 0 and set(port.da.vms()) == names, "brought back", "exit %d\n%s" % (code, back.story()))
    t.equal(port.da.json("maintenance", "status")["maintenance"], False, "A is an ordinary host again")
    scene.settled("brought back", "a")


# ---- something goes wrong in the middle


def part_daemon_dies(scene):
    run = scene.under_way()
    scene.port.da.restart()
    code, last = run.wait()
    scene.t.ok(code == 0 and last.get("ok"), "kill -9 of A's daemon: the next one goes on, the command finds it again",
               "exit %d\n%s" % (code, run.story()))
    scene.finished("kill -9 of A's daemon")


def part_session_dies(scene):
    run = scene.under_way()
    busy = scene.port.da.sessions("out")
    scene.t.ok(busy, "there are sessions to kill")
    os.kill(busy[0], signal.SIGKILL)
    code, last = run.wait(180)
    scene.t.ok(code == 0 and last.get("ok"), "kill -9 of a session: its VM is tried again, the evacuation goes on",
               "exit %d\n%s" % (code, run.story()))
    scene.finished("kill -9 of a session")


def part_destination_dies(scene):
    """All of Lifeboat on B; its VMs run on, as they would when it is updated."""
    port = scene.port
    run = scene.under_way()
    for pid in port.db.session_pids():
        os.kill(pid, signal.SIGKILL)
    port.db.kill()
    run.wait(240)
    port.db.start()
    scene.finished("kill -9 of Lifeboat on a destination")


def part_link_down(scene):
    port = scene.port
    run = scene.under_way()
    port.b.partition()
    code, last = run.wait(240)
    scene.t.ok(code == 0 and last.get("ok"), "the link of a destination goes down: the rest goes elsewhere",
               "exit %d\n%s" % (code, run.story()))
    port.b.partition(False)
    scene.finished("the link of a destination goes down")


def part_destination_full(scene):
    """B promises nothing any more: what was to go there goes to C."""
    port = scene.port
    run = scene.under_way()
    config = port.db.config_text
    port.db.write_config(config + "memory-reserve = 1024G\n")
    port.db.restart()
    code, last = run.wait(240)
    scene.t.ok(code == 0 and last.get("ok"), "a destination fills up: the rest goes elsewhere",
               "exit %d\n%s" % (code, run.story()))
    port.db.write_config(config)
    port.db.restart()
    scene.finished("a destination fills up")


def part_hot(scene):
    """A guest that writes far more than the link carries, but not when it gets a hundredth of a processor."""
    t, port = scene.t, scene.port
    hot = port.run_linux("a", "hot", 0, "dirty=100:24:random")
    scene.fill(2)
    port.shape(HOT_MBIT)
    run = scene.evacuate("--hot", "leave")
    code, last = run.wait(240)
    item = next((item for item in last.get("items", ()) if item["vm"] == hot), {})
    t.ok(code == 6 and scene.left_on_a() == [hot] and not last.get("ok"), "--hot leave: it stays, the others go",
         "exit %d\n%s" % (code, run.story()))
    said = str(item) + str(run.plan().get("stays")) + "".join(run.text)
    t.ok(hot in said and "writes" in said or "dirt" in said, "and it is said why", said)
    scene.settled("--hot leave", "abc")
    run = scene.evacuate("--hot", "leave", "--suspend-rest")
    code, last = run.wait(240)
    t.equal((code, port.da.vms().get(hot, {}).get("state"), port.da.qemu_pids()), (0, "suspended", []),
            "--suspend-rest: it is suspended to disk, A runs nothing " + ("" if code == 0 else "".join(run.text)))
    port.da.cli("resume", hot)
    wait_for(lambda: port.da.vms()[hot]["state"] == "running", 30, "the resumed VM", 0.1)
    scene.settled("resumed", "abc")
    run = scene.evacuate()
    code, last = run.wait(240)
    t.ok(code == 0 and last.get("ok"), "slowed down (the default), it goes, too", "exit %d\n%s" % (code, run.story()))
    scene.settled("slowed down", "bc")


def part_cancelled(scene):
    t, port = scene.t, scene.port
    names = scene.fill()
    port.shape(SLOW_MBIT)
    run = scene.evacuate()
    scene.middle(run)
    port.da.cli("cancel", "--evacuation")
    code, last = run.wait()
    t.ok(code == 12 and last.get("phase") == "cancelled", "cancel ends it", "exit %d\n%s" % (code, run.story()))
    left = scene.left_on_a()
    t.ok(0 < len(left) < len(names) and not port.da.sessions("out"), "some have left, some stay: %d of %d" % (len(left), len(names)))
    scene.settled("cancelled", "abc")
    scene.finished("cancelled")


def part_nowhere_to_go(scene):
    t, port = scene.t, scene.port
    names = scene.fill(2)
    for role in "bc":
        port.daemons[role].cli("maintenance", "on", "--reason", "repairs")
    run = scene.evacuate()
    code, last = run.wait()
    said = str(run.events) + "".join(run.text)
    t.ok(code != 0 and "maintenance" in said and scene.left_on_a() == names, "nobody takes them: nothing happens, and why",
         "exit %d: %s" % (code, said))
    for role in "bc":
        port.daemons[role].cli("maintenance", "off")
    scene.settled("nobody takes them", "a")
    scene.finished("somebody does")


def part_storm(scene):
    """Everything at once, at random moments, until A is empty: daemons and sessions of all hosts die, links go down for a while."""
    t, port = scene.t, scene.port
    for seed in STORM_SEEDS:
        chance, struck = random.Random(seed), []
        scene.fill()
        port.shape(SLOW_MBIT)
        end = time.monotonic() + 120
        run = scene.evacuate()
        while scene.left_on_a() and time.monotonic() < end:
            time.sleep(chance.uniform(0.2, 1.5))
            daemon = chance.choice(list(port.daemons.values()))
            kind = chance.choice(("daemon", "session", "session", "link"))
            struck.append("%s of %s" % (kind, daemon.host.role))
            if kind == "daemon":
                daemon.restart()
            elif kind == "session":
                for pid in daemon.session_pids()[:1]:
                    os.kill(pid, signal.SIGKILL)
            elif daemon is not port.da:
                daemon.host.partition()
                time.sleep(chance.uniform(0.2, 1.5))
                daemon.host.partition(False)
            if run.done():
                run = scene.evacuate()
        run.wait(240)
        t.diag("seed %d: %s" % (seed, ", ".join(struck)))
        scene.finished("a storm (seed %d)" % seed)
        scene.empty()


PARTS = [part_witnesses, part_there_and_back, part_daemon_dies, part_session_dies, part_destination_dies, part_link_down,
         part_destination_full, part_hot, part_cancelled, part_nowhere_to_go, part_storm]


def main():
    with Tap() as t:
        need(t)
        if not os.path.exists(TINY):
            raise RigError("%s is missing: `make guest`" % TINY)
        wanted = [part for part in PARTS if not sys.argv[1:] or any(word in part.__name__ for word in sys.argv[1:])]
        with Harbour("lbevac", linux=LINUXES) as port:
            scene = Scene(t, port)
            for part in wanted:
                begin = time.monotonic()
                try:
                    part(scene)
                except (RigError, OSError) as error:
                    t.ok(False, part.__name__ + " ends without an exception", "%s\n%s" % (error, port.all_logs()))
                took = time.monotonic() - begin
                port.shape(None)
                scene.empty()
                t.diag("%s: %.0f s, and %.0f s to end its VMs" % (part.__name__, took, time.monotonic() - begin - took))


if __name__ == "__main__":
    main()
