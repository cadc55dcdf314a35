#!/usr/bin/python3
"""Hosts that ask each other: the primary has its backup take over, a backup has itself replaced, a host gets back what came from it,
also by way of a third one; nobody else may. A protected VM is migrated: its protection ends, it moves, it is protected again; whoever
dies on the way, in the end it runs once and is protected."""

import json
import os
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), "..", "rig"))
from lifeboat import Command, need
from protect import Capture, Cluster, Counter, unbroken
from rig import CLIENT_IP, UDP_PORT, RigError, Tap, wait_for

NAME = "vm"
WORK = "dirty=10:32:mixed udp=%s:%d redis" % (CLIENT_IP, UDP_PORT)
AUTH = 5  # exit status, see lifeboat(1)


# Whoever waits at these points is killed: the daemon of that host, its sessions, or all of them. `make check` does the quick ones,
# LB_FULL=1 all; arguments: only rows whose name contains one of them.
POINTS = {"source": ["pr-ending", "pr-free", "pr-alone", "src-ready", "src-prepared", "src-handed-over", "src-committed", "src-running"],
          "target": ["dst-launched", "dst-receive", "dst-loaded", "dst-prepared", "dst-commit", "dst-journalled", "dst-ran", "dst-acked"]}
ROWS = [(point, side, victim) for side in POINTS for point in POINTS[side] for victim in ("daemon", "sessions", "all")]
QUICK = [("pr-ending", "source", "daemon"), ("src-ready", "source", "sessions"), ("dst-journalled", "target", "sessions")]


class Asks:
    def __init__(self, t, cluster, nonce):
        self.t, self.cluster, self.nonce = t, cluster, nonce

    def refused(self, role, host, *words, why="may not"):
        """A test line: that host may not ask for it."""
        done = self.cluster.daemons[role].cli("ask", host, *words, check=False)
        self.t.ok(done.returncode != 0 and why in done.stderr, "%s asks %s: %s: refused" % (role, host, " ".join(words)),
                  "exit %d: %s%s" % (done.returncode, done.stdout, done.stderr))

    def protected(self, role, backup, what):
        """A test line: the VM runs there, and that host is its backup."""
        try:
            there, status = self.cluster.wait_protected(NAME)
        except RigError as error:
            self.t.ok(False, what, error)
            return {}
        self.t.equal((there, status["host"]), (role, backup), what)
        return status

    def watched(self):
        counter, capture = Counter(self.cluster.client), Capture(self.cluster)
        counter.wait_flowing()
        return counter, capture

    def unnoticed(self, watched, turns, what):
        """Test lines: the client lost nothing, one copy at a time was heard, the guest is the same and clean."""
        counter, capture = watched
        counter.wait_flowing(10)
        unbroken(self.t, counter, what + ": no acknowledged INCR is lost, the connection lives")
        self.t.equal([turn[0] for turn in capture.stop()], turns, what + ": one copy at a time was heard")
        self.cluster.clean(self.t, self.nonce, what + ": the same guest, memory clean")

    # -- what is shown

    def strangers(self):
        """A VM that was never anywhere else: nobody but its operator has a say."""
        for words in (["migrate", NAME], ["protect", NAME, "--backup", "c"], ["failover", NAME], ["status", NAME]):
            self.refused("b", "a", *words)
        self.refused("b", "c", "status", NAME, why="no VM named")
        status = self.cluster.da.cli("ask", "nowhere", "status", NAME, check=False)
        self.t.ok(status.returncode != 0 and "host ls" in status.stderr, "a host that is not known cannot be asked", status.stderr)

    def swap(self):
        cluster = self.cluster
        cluster.protect(NAME, "a", ["b", "c"], "--disk", "none")
        self.refused("c", "b", "failover", NAME)
        self.refused("b", "a", "migrate", NAME)
        status = cluster.da.json("ask", "b", "status", NAME)
        self.t.equal(status["state"], "standby", "the primary may ask how its standby is")
        watched = self.watched()
        at = time.monotonic()
        answer = cluster.da.json("ask", "b", "failover", NAME)
        self.t.ok(answer.get("promoted") is True, "the primary asks its backup to take over", answer)
        watched[0].wait_flowing(10)
        stall = watched[0].stall_ms(at)
        self.t.diag("the client waited %.0f ms" % stall)
        self.t.ok(stall < 3000, "the client sees one short stall", stall)
        self.protected("b", "c", "swapped: it runs on the backup, which has one itself")
        self.unnoticed(watched, ["a", "b"], "swap")
        again = cluster.da.json("ask", "b", "failover", NAME)
        self.t.ok(again.get("already") is True, "asked once more it is done already", again)

    def another_backup(self):
        """It runs on b, c is the backup: c wants to be replaced by a."""
        cluster = self.cluster
        watched = self.watched()
        missing = cluster.dc.cli("ask", "b", "protect", NAME, "--backup", "nowhere", check=False)
        self.t.ok(missing.returncode != 0, "a backup that nobody knows", missing.stderr)
        status = self.protected("b", "c", "the old backup goes on meanwhile")
        self.t.equal(status.get("state"), "protected", "it never stopped")
        answer = cluster.dc.json("ask", "b", "protect", NAME, "--backup", "a")
        gap = answer.get("protect", {}).get("unprotected_ms")
        self.t.ok(answer.get("host") == "a" and gap, "the backup asks to be replaced, and is told for how long there was none", answer)
        self.protected("b", "a", "the named host is the backup now")
        self.t.diag("without a backup for %s ms" % gap)
        text = cluster.db.cli("status", NAME).stdout
        self.t.ok("without a backup was" in text, "status says how long there was none", text)
        again = cluster.dc.json("ask", "b", "protect", NAME, "--backup", "a")
        self.t.ok(again.get("already") is True, "asked once more it is done already", again)
        self.unnoticed(watched, ["b"], "another backup")

    def migrate(self):
        """A protected VM is migrated by its operator: b to c, a is the backup."""
        cluster = self.cluster
        watched = self.watched()
        checked = cluster.db.json("preflight", NAME, "c")
        self.t.ok(any(line["id"] == "protection" for line in checked["checks"]), "preflight asks the host and says it is protected again",
                  checked)
        self.protected("b", "a", "preflight does not end the protection")
        answer = cluster.db.json("migrate", NAME, "c")
        self.t.ok(answer["ok"] and answer["host"] == "c", "migrate of a protected VM", answer)
        status = self.protected("c", "a", "it is protected again where it went, not by the host that it left")
        self.t.diag("without a backup for %s ms, paused for %.0f ms" % (status.get("unprotected_ms"), answer["downtime_ms"]))
        self.t.ok(status.get("unprotected_ms", 0) > 0, "and it says for how long it was not", status)
        self.unnoticed(watched, ["b", "c"], "migrate")
        self.t.ok(NAME not in cluster.db.vms(), "nothing is left on the host that it left", cluster.db.vms())

    def bring_back(self):
        """a asks b, where it sent the VM; b says that it went on to c; c has a as its backup, so it gets another one first."""
        cluster = self.cluster
        watched = self.watched()
        cluster.da.json("ask", "c", "protect", NAME, "--backup", "b")
        self.protected("c", "b", "the host that wants it back is no longer the backup")
        answer = cluster.da.json("ask", "b", "migrate", NAME)
        self.t.ok(answer.get("ok") is True, "asked of the host where it went first: followed to where it is", answer)
        self.protected("a", "b", "it is back, protected")
        self.unnoticed(watched, ["c", "a"], "back")

    def to_its_backup(self):
        watched = self.watched()
        answer = self.cluster.da.json("migrate", NAME, "b")
        self.t.ok(answer.get("promoted") is True, "migrate to its own backup: that takes it over", answer)
        self.protected("b", "c", "and it is protected by the next host")
        self.unnoticed(watched, ["a", "b"], "to its backup")

    # -- hosts in maintenance

    def last(self, done):
        return json.loads(done.stdout.strip().splitlines()[-1])

    def refuses(self):
        """b runs it, c is the backup; a is in maintenance and will not be it: found out without ending the protection."""
        cluster = self.cluster
        cluster.da.cli("maintenance", "on")
        before = cluster.protection("b")["epoch"]
        refused = cluster.dc.cli("ask", "b", "protect", NAME, "--backup", "a", check=False)
        self.t.ok(refused.returncode != 0 and "maintenance" in refused.stderr, "a host in maintenance is no new backup", refused.stderr)
        refused = cluster.db.cli("migrate", NAME, "a", check=False)
        self.t.ok(refused.returncode != 0 and "maintenance" in refused.stderr, "and takes no protected VM", refused.stderr)
        status = self.protected("b", "c", "it is protected as before")
        self.t.ok(status.get("epoch", 0) > before, "without a break", (before, status))

    def swapped_in_maintenance(self):
        """Only its own backup is left: b in maintenance too, c takes over and finds nobody, until a may again."""
        cluster = self.cluster
        cluster.db.cli("maintenance", "on")
        watched = self.watched()
        cluster.db.json("ask", "c", "failover", NAME)
        wait_for(lambda: cluster.primary(NAME) == "c", 20, "the VM on c")
        wait_for(lambda: "maintenance" in (cluster.protection("c") or {}).get("note", ""), 30, "why it is not protected", 0.1)
        status = cluster.protection("c")
        self.t.ok(status["state"] == "waiting" and status.get("unprotected_since_ms", 0) > 0, "no host would be its backup: status says why "
                  "and since when", status)
        cluster.da.cli("maintenance", "off")
        self.protected("c", "a", "it has a backup as soon as a host may be it")
        cluster.db.cli("maintenance", "off")
        self.unnoticed(watched, ["b", "c"], "a swap in maintenance")

    def evacuated(self):
        """The host of a protected VM is emptied and filled again; then the host of its backup is emptied."""
        cluster = self.cluster
        watched, turns = self.watched(), [cluster.primary(NAME)]
        for number in (1, 2):
            source, status = cluster.wait_protected(NAME)
            other = next(role for role in cluster.hosts if role not in (source, status["host"]))
            target = status["host"] if number == 1 else other
            limit = [] if number == 1 else ["--to", other]  # left to itself the plan is to swap
            done = self.last(cluster.daemons[source].cli("evacuate", "--yes", "--json", *limit))
            self.t.ok(done.get("ok") is True, "evacuate: the VM leaves for %s" % ("its backup" if number == 1 else "another host"), done)
            role, status = cluster.wait_protected(NAME)
            self.t.equal(role, target, "it runs there")
            self.t.ok(status["host"] not in (source, role), "its backup is no host in maintenance", status)
            done = self.last(cluster.daemons[source].cli("maintenance", "off", "--bring-back", "--json"))
            self.t.ok(done.get("ok") is True, "maintenance off --bring-back", done)
            self.t.equal(cluster.wait_protected(NAME)[0], source, "it is back, protected")
            turns += [target, source]
        source, status = cluster.wait_protected(NAME)
        backup = status["host"]
        done = self.last(cluster.daemons[backup].cli("evacuate", "--yes", "--json"))
        self.t.ok(done.get("ok") is True, "evacuate of the host of its backup", done)
        role, status = cluster.wait_protected(NAME)
        self.t.ok(role == source and status["host"] not in (source, backup), "it has another backup", status)
        self.t.ok(not cluster.daemons[backup].vms(), "nothing is left there", cluster.daemons[backup].vms())
        cluster.daemons[backup].cli("maintenance", "off")
        self.unnoticed(watched, turns, "evacuations")

    # -- somebody dies

    def settled(self, what):
        """A test line: it runs once and is protected."""
        try:
            role, status = self.cluster.wait_protected(NAME)
        except RigError as error:
            self.t.ok(False, what, error)
            return None
        wait_for(lambda: sum(len(pids) for pids in self.cluster.qemus().values()) == 2, 20, "one VM and one standby", 0.1)
        self.cluster.clean(self.t, self.nonce, "%s: runs on %s, backup %s" % (what, role, status["host"]))
        return role

    def dies(self, point, side, victim):
        """While a protected VM is migrated, at that point of the source's or the destination's session."""
        cluster = self.cluster
        source, status = cluster.wait_protected(NAME)
        target = next(role for role in cluster.hosts if role not in (source, status["host"]))
        where = source if side == "source" else target
        pause = os.path.join(cluster.dir, "paused-%s-%s" % (point, victim))
        forever = victim != "daemon"  # else it goes on by itself when the daemon is gone
        cluster.daemons[where].restart({"LIFEBOAT_PAUSE_AT": point if forever else point + ":700", "LIFEBOAT_PAUSE_FILE": pause})
        if point.startswith("pr-"):  # a session that was there before the restart waits nowhere
            cluster.wait_protected(NAME)
            cluster.daemons[source].cli("unprotect", NAME)
            cluster.protect(NAME, source, [status["host"], target], "--disk", "none")
        cluster.wait_protected(NAME)
        command = Command(cluster.daemons[source], "migrate", NAME, target)
        wait_for(lambda: os.path.exists(pause) or command.done(), 30, "the point " + point, 0.01)
        if not os.path.exists(pause):
            raise RigError("it ended before the point %s: %s" % (point, command.wait()))
        if victim != "sessions":
            cluster.daemons[where].kill()
        for pid in cluster.daemons[where].session_pids() if victim != "daemon" else []:
            os.kill(pid, 9)
        cluster.daemons[where].restart()
        command.wait()
        self.settled("%s: %s of the %s killed" % (point, victim, side))


def main():
    with Tap() as t:
        need(t)
        with Cluster("lbask") as cluster:
            cluster.run_vm("a", NAME, memory_mb=192, work=WORK)
            asks = Asks(t, cluster, cluster.wait_guest()["nonce"])
            wanted = sys.argv[1:]
            if wanted:
                cluster.protect(NAME, "a", ["b", "c"], "--disk", "none")
            else:
                asks.strangers()
                asks.swap()
                asks.another_backup()
                asks.migrate()
                asks.bring_back()
                asks.to_its_backup()
                asks.refuses()
                asks.swapped_in_maintenance()
                asks.evacuated()
            for row in ROWS if wanted or os.environ.get("LB_FULL") else QUICK:
                if not wanted or any(word in "/".join(row) for word in wanted):
                    asks.dies(*row)
            role, _ = cluster.wait_protected(NAME)
            cluster.daemons[role].cli("unprotect", NAME)
            cluster.stop_vm(NAME)


if __name__ == "__main__":
    main()
