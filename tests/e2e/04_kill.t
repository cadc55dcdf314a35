#!/usr/bin/python3
"""kill -9 at every state of a migration. Whoever dies, in the end exactly one VM runs, it is whole, `recover` says where,
registry and journals of both hosts agree, and it can be migrated again.

Every lb_point() of the engine is a row of the matrix; a point that the matrix does not know fails the test. The session that
waits at a point and its counterpart are killed at every point; daemons, the destination's QEMU and both sessions at once at
the points around the hand-over, as before it they differ in nothing. Arguments: only cases whose name contains one of them.
"""

import glob
import json
import os
import re
import shutil
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), "..", "rig"))
from lifeboat import Command, Fleet, need
from rig import REPO, RigError, Tap, wait_for

POINTS = ["src-ready", "src-round-0", "src-round-n", "src-stopped", "src-saved", "src-prepared", "src-handed-over",
          "src-committed", "src-running", "src-destroyed",
          "dst-launched", "dst-receive", "dst-round", "dst-loaded", "dst-prepared", "dst-commit", "dst-journalled", "dst-ran",
          "dst-acked"]
AROUND = ["src-prepared", "src-handed-over", "src-committed", "dst-prepared", "dst-commit", "dst-journalled", "dst-ran"]
MATRIX = ([(point, victim) for point in POINTS for victim in ("source-session", "destination-session")] +
          [(point, "destination-qemu") for point in AROUND] +
          [(point, victim) for point in ("src-prepared", "src-committed", "dst-commit", "dst-journalled")
           for victim in ("source-daemon", "destination-daemon", "both-daemons")] +
          [(point, "both-sessions") for point in ("src-handed-over", "src-committed", "dst-journalled", "dst-ran")])
# The destination's QEMU runs the VM already: with it the only copy dies, whoever manages it.
ONLY_OWNER = {"dst-ran"}
# It was told to run it: this or the other, as the race goes.
EITHER = {"src-committed"}
WORK = "dirty=20:32:mixed clock"
PAUSE_MS = 700
SETTLE_S = 30


class Kill:
    def __init__(self, t, fleet):
        self.t, self.fleet = t, fleet
        self.pause_file = os.path.join(fleet.dir, "paused")
        self.nonce = None
        self.slowest = (0.0, "")

    # -- the VM

    def where(self):
        return self.fleet.where("vm")

    def ensure_vm(self):
        """A running VM on exactly one host, a new one if need be; returns its host."""
        if self.nonce and len(self.where()) == 1:
            return self.where()[0]
        self.reset()
        self.fleet.run_vm("a", "vm", memory_mb=256, work=WORK)
        self.nonce = self.fleet.wait_guest()["nonce"]
        return "a"

    def reset(self):
        """Everything of a VM goes, by force: one failed case must not fail the next."""
        self.nonce = None
        for daemon in self.fleet.daemons.values():
            daemon.kill()
            for pid in daemon.session_pids() + daemon.qemu_pids():
                try:
                    os.kill(pid, 9)
                except ProcessLookupError:
                    pass
            wait_for(lambda: not daemon.session_pids() + daemon.qemu_pids(), 10, "an empty host")
            for folder in ("vms", "handover"):
                shutil.rmtree(os.path.join(daemon.state, folder), ignore_errors=True)
            daemon.start()

    # -- one case

    def kill_victim(self, point, victim, source, target):
        """Kills, and starts killed daemons again without a point to wait at. Returns what it could not do, or None."""
        src, dst = self.fleet.daemons[source], self.fleet.daemons[target]
        pids = {"source-session": src.session_pids, "destination-session": dst.session_pids,
                "both-sessions": lambda: src.session_pids() + dst.session_pids(),
                "destination-qemu": dst.qemu_pids}
        if victim in pids:
            found = pids[victim]()
            for pid in found:
                os.kill(pid, 9)
            gone = victim == "destination-session" and point == "src-destroyed"  # it may have ended by then
            return None if found or gone else "%s: no such process at this point" % victim
        dead = {"source-daemon": [src], "destination-daemon": [dst], "both-daemons": [src, dst]}[victim]
        for daemon in dead:
            daemon.kill()
        for daemon in dead:
            daemon.start()
        return None

    def settled(self):
        """(where, None) when the hosts have come to rest with one VM or with a dead one; else (None, what is missing)."""
        sessions = {role: d.session_pids() for role, d in self.fleet.daemons.items()}
        if any(sessions.values()):
            return None, "sessions at work: %s" % sessions
        entries = {role: d.vms().get("vm", {}).get("state") for role, d in self.fleet.daemons.items()}
        known = [role for role, state in entries.items() if state]
        if len(known) != 1 or entries[known[0]] not in ("running", "dead"):
            return None, "entries: %s" % entries
        qemus = [role for role, pids in self.fleet.qemus().items() for _ in pids]
        if qemus != (known if entries[known[0]] == "running" else []):
            return None, "QEMU on %s, entries: %s" % (qemus, entries)
        open_journals = [j for j in self.journals() if j["state"] in ("preparing", "prepared", "handed-over")]
        if open_journals:
            return None, "undecided journals: %s" % open_journals
        return (known[0] if entries[known[0]] == "running" else "dead"), None

    def journals(self):
        found = []
        for role, daemon in self.fleet.daemons.items():
            for path in glob.glob(os.path.join(daemon.state, "handover", "*.json")):
                with open(path) as f:
                    text = f.read()
                entry = json.loads(text)
                found.append({"role": role, "token": os.path.basename(path)[:-5],
                              "state": str(entry["state"]).lower().replace("_", "-"), "detail": entry.get("detail", "")})
        return found

    def disagreeing(self):
        """Tokens whose two journals contradict each other."""
        by_token = {}
        for journal in self.journals():
            by_token.setdefault(journal["token"], {})[journal["role"]] = journal["state"]
        return {token: states for token, states in by_token.items()
                if tuple(sorted(states.values())) not in (("done", "running"), ("aborted", "refused"), ("aborted",), ("refused",))}

    def case(self, point, victim):
        fleet, problems = self.fleet, []
        begin = time.monotonic()
        source = self.ensure_vm()
        target = "b" if source == "a" else "a"
        side = source if point.startswith("src-") else target
        own = victim == "both-sessions" or victim == ("source-session" if side == source else "destination-session")
        if os.path.exists(self.pause_file):
            os.unlink(self.pause_file)
        for role, daemon in fleet.daemons.items():
            daemon.restart({"LIFEBOAT_PAUSE_AT": point + ("" if own else ":%d" % PAUSE_MS),
                            "LIFEBOAT_PAUSE_FILE": self.pause_file} if role == side else None)
        options = ["--bandwidth", "200Mbit", "--max-downtime", "20ms", "--compress", "off"] if point == "src-round-n" else []
        command = Command(fleet.daemons[source], "migrate", "vm", target, "--json", *options)
        try:
            wait_for(lambda: os.path.exists(self.pause_file) or command.done(), 20, "the point " + point, 0.005)
            if not os.path.exists(self.pause_file):
                raise RigError("migrate ended before the point: %s" % (command.wait(),))
            killed = time.monotonic()
            problem = self.kill_victim(point, victim, source, target)
            if problem:
                problems.append(problem)
            end = killed + SETTLE_S
            place, missing = self.settled()
            while place is None and time.monotonic() < end:
                time.sleep(0.05)
                place, missing = self.settled()
            took = time.monotonic() - killed
            self.slowest = max(self.slowest, (took, "%s x %s" % (point, victim)))
            code, out, err = command.wait(10)
            if place is None:
                problems.append("not settled in %d s: %s" % (SETTLE_S, missing))
            else:
                self.judge(point, victim, place, problems)
                if victim.endswith("-session") and place == source and code == 0:
                    problems.append("the VM stayed, and migrate said that it moved: " + out)
        except RigError as error:
            problems.append(str(error))
            took, place = 0, None
        name = "%s killed at %s" % (victim, point)
        self.t.ok(not problems, "%s: %s after %.1f s (%.1f s in all)" %
                  (name, {source: "on the source", target: "on the destination", "dead": "dead, as its only copy was killed",
                          None: "no outcome"}[place], took, time.monotonic() - begin),
                  "\n".join(problems) + "\n" + (fleet.all_logs() if problems else ""))
        if problems:
            self.reset()
        elif place == "dead":
            self.nonce = None

    def judge(self, point, victim, place, problems):
        fleet = self.fleet
        if place == "dead":
            if victim != "destination-qemu" or point not in ONLY_OWNER | EITHER:
                problems.append("the VM died")
            text = " ".join(d.cli("recover", check=False).stdout for d in fleet.daemons.values())
            if "gone" not in text and "died" not in text:
                problems.append("recover does not say that it died: %r" % text)
            return
        if victim == "destination-qemu" and point in ONLY_OWNER:
            problems.append("it runs on %s although its only copy was killed" % place)
        try:
            status = fleet.guest_status(verify_all=True)
            bad = {k: status[k] for k in ("bad_pages", "clock_steps") if status[k]}
            if bad or status["nonce"] != self.nonce:
                problems.append("guest: %s nonce %s want %s: %s" % (bad, status["nonce"], self.nonce, status["first_bad"]))
        except (OSError, RigError, ValueError) as error:
            problems.append("the guest does not answer: %s" % error)
        told = fleet.daemons[place].cli("recover", "vm", check=False)
        if told.returncode or "running on this host" not in told.stdout:
            problems.append("recover on %s: exit %d %r %r" % (place, told.returncode, told.stdout, told.stderr))
        other = fleet.daemons["b" if place == "a" else "a"].cli("recover", check=False)
        if other.returncode or "vm:" in other.stdout:
            problems.append("recover on the other host: exit %d %r %r" % (other.returncode, other.stdout, other.stderr))
        wrong = self.disagreeing()
        if wrong:
            problems.append("journals disagree: %s" % wrong)
        left = fleet.leftovers("b" if place == "a" else "a", "vm")
        if left:
            problems.append("left on the other host: %s" % left)
        self.again(place, problems)

    def again(self, place, problems):
        """It can be migrated, with daemons that wait nowhere; and lands where the next case starts from."""
        fleet = self.fleet
        for daemon in fleet.daemons.values():
            daemon.restart()
        try:
            result = fleet.migrate("vm", place, "b" if place == "a" else "a", timeout_s=60)
            if not result["ok"]:
                problems.append("a further migration: %s" % result)
            status = fleet.guest_status()
            if status["bad_pages"] or status["nonce"] != self.nonce:
                problems.append("after a further migration: %s" % status)
        except (OSError, RigError, ValueError) as error:
            problems.append("a further migration: %s" % error)


def all_points():
    found = set()
    for path in glob.glob(os.path.join(REPO, "migrate", "*.c")):
        with open(path) as f:
            for call in re.findall(r"\blb_point\(([^;]*)\);", f.read()):
                found |= set(re.findall(r'"([a-z0-9-]+)"', call))
    return found


def main():
    with Tap() as t:
        need(t)
        known = all_points()
        t.ok(known == set(POINTS) and len(known) > 10, "the matrix covers every point of the engine",
             "not covered: %s, gone: %s" % (sorted(known - set(POINTS)), sorted(set(POINTS) - known)))
        begin = time.monotonic()
        with Fleet("lbkill") as fleet:
            kill = Kill(t, fleet)
            for point, victim in MATRIX:
                name = "%s/%s" % (point, victim)
                if not sys.argv[1:] or any(word in name for word in sys.argv[1:]):
                    kill.case(point, victim)
            t.diag("%d cases in %.0f s; slowest to settle: %s after %.1f s" %
                   (t.count - 1, time.monotonic() - begin, kill.slowest[1], kill.slowest[0]))


if __name__ == "__main__":
    main()
