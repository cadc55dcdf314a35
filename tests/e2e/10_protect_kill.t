#!/usr/bin/python3
"""kill -9 at every state of a protection. Whoever dies, soon exactly one VM runs, it is protected again when that is
wanted, only the one that may was heard, and the client's connection lives with every acknowledged INCR.

A row is a state and a victim. Every lb_point() of remus/ is a state; a point that the matrix does not know fails the test.
The VM and its client live through all rows; where its only copy is the victim, it dies and a new one begins.
Not lost is what was acknowledged: when only the protecting session dies, what it held is dropped, and TCP sends it again.

`make check` runs the rows marked quick; LB_FULL=1 all of them. Arguments: only rows whose name contains one of them.
"""

import glob
import os
import re
import shutil
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), "..", "rig"))
from lifeboat import Command, need
from protect import Capture, Cluster, Counter
from rig import REPO, RigError, Tap, read_tail, wait_for

NAME = "vm"
WORK = "dirty=10:32:mixed disk=vda redis"
PAUSE_MS = 700
SETTLE_S = 40

# Where a session waits: on the primary "pr-", on the backup "bk-".
SETUP = ["src-ready", "dst-launched", "pr-disks", "dst-round", "pr-rounds", "pr-arming", "pr-armed", "pr-told", "bk-first",
         "pr-first", "pr-recorded"]
UNPROTECT = ["pr-ending", "bk-discard", "pr-free", "pr-alone"]
YIELD = ["pr-yield", "pr-yielded", "bk-loaded", "bk-won", "bk-journalled", "bk-ran", "pr-fenced"]
CRASH = ["bk-loaded", "bk-won", "bk-journalled", "bk-ran"]
REPROTECT = ["pr-rounds", "pr-armed", "pr-recorded"]
ARMED = {"pr-armed", "pr-told", "bk-first", "pr-first", "pr-recorded"}

SESSIONS = ["primary-session", "backup-session", "both-sessions"]
PARTS = SESSIONS + ["primary-daemon", "backup-daemon", "primary-lifeboat", "all-lifeboat", "primary-qemu", "backup-qemu",
                    "disk-server", "backup-host", "primary-host", "witness"]
GONE = {"bk-discard": ["disk-server"], "pr-free": ["disk-server", "backup-qemu"], "pr-alone": ["disk-server", "backup-qemu"]}
MATRIX = ([("setup", p, v) for p in SETUP for v in PARTS if v != "disk-server" or p not in ("src-ready", "dst-launched")] +
          [("steady", "", v) for v in PARTS] +
          [("unprotect", p, v) for p in UNPROTECT for v in PARTS if v not in GONE.get(p, ())] +
          [("yield", p, v) for p in YIELD for v in PARTS if v != "disk-server"] +
          # One host is dead: what takes over is alone.
          [("crash", p, v) for p in CRASH for v in ("backup-session", "backup-daemon", "backup-lifeboat", "witness")] +
          [("reprotect", p, v) for p in REPROTECT for v in SESSIONS + ["primary-lifeboat", "backup-host", "witness"]])
QUICK = {"setup/pr-disks/primary-session", "setup/pr-rounds/backup-host", "setup/pr-arming/witness",
         "setup/pr-armed/primary-session", "setup/bk-first/both-sessions", "setup/pr-first/primary-qemu",
         "setup/dst-launched/backup-daemon", "unprotect/pr-ending/backup-session", "unprotect/bk-discard/primary-session",
         "unprotect/pr-alone/primary-lifeboat", "yield/pr-yielded/primary-session", "yield/bk-won/backup-qemu",
         "yield/bk-journalled/backup-session", "crash/bk-loaded/backup-session", "crash/bk-ran/backup-lifeboat",
         "reprotect/pr-armed/primary-lifeboat"} | {"steady//" + v for v in PARTS}


class Kill:
    def __init__(self, t, cluster):
        self.t, self.cluster = t, cluster
        self.pause_file = os.path.join(cluster.dir, "paused")
        self.nonce = self.counter = self.capture = self.waits_at = None
        self.expected, self.slowest = [], {}

    # -- the VM and those who watch it

    def new_vm(self):
        cluster = self.cluster
        for role, host in cluster.hosts.items():
            cluster.crash(role)
            shutil.rmtree(os.path.join(cluster.daemons[role].state, "vms"), ignore_errors=True)
            cluster.revive_host(host)
        disk = os.path.join(cluster.a.dir, "vm.img")
        with open(disk, "wb") as f:
            f.truncate(64 << 20)
        cluster.run_vm("a", NAME, memory_mb=192, disk=disk, work=WORK)
        self.nonce = cluster.wait_guest()["nonce"]
        self.counter, self.capture = wait_for(self.connect, 20, "Redis in the guest", 0.1), Capture(cluster)
        self.expected = ["a"]

    def connect(self):
        counter = Counter(self.cluster.client)
        try:
            counter.wait_flowing()
            return counter
        except RigError:
            counter.proc.kill()  # Redis starts after the rest of the guest
            counter.proc.wait()
            return None

    def forget_vm(self):
        if self.nonce:
            self.counter.proc.kill()  # asked to end it would wait for an answer, and the VM may be dead
            self.counter.proc.wait()
            self.capture.stop()
        self.nonce = None

    def heard(self, role):
        if self.expected[-1] != role:
            self.expected.append(role)

    # -- reaching a state

    def pause_at(self, role, point, own):
        """That host's next session that gets to the point waits there: until it is killed, or for a while."""
        if self.waits_at and self.waits_at != role:
            self.cluster.daemons[self.waits_at].restart()
        if os.path.exists(self.pause_file):
            os.unlink(self.pause_file)
        self.waits_at = role
        self.cluster.daemons[role].restart({"LIFEBOAT_PAUSE_AT": point + ("" if own else ":%d" % PAUSE_MS),
                                            "LIFEBOAT_PAUSE_FILE": self.pause_file})

    def paused(self, point, command=None):
        wait_for(lambda: os.path.exists(self.pause_file) or (command and command.done()), 30, "the point " + point, 0.005)
        try:  # the other side may get there a little after the command has its answer
            wait_for(lambda: os.path.exists(self.pause_file), 3, "the point " + point, 0.005)
        except RigError:
            raise RigError("it ended before the point: %s" % (command.wait(),))

    def protect(self, primary, hosts):
        return Command(self.cluster.daemons[primary], "protect", NAME, "--backup", ",".join(hosts), "--witness",
                       self.cluster.witness)

    def reach(self, how, point, victim):
        """(primary, backup, the command under way) with everything as the row wants it, a session waiting."""
        cluster = self.cluster
        role = cluster.primary(NAME)
        backups = [r for r in cluster.hosts if r != role]
        side = "primary" if point[:2] in ("pr", "sr") else "backup"
        own = victim in ("both-sessions", "all-lifeboat", side + "-session", side + "-lifeboat", side + "-host")
        if how == "setup":
            if self.wanted(role):
                cluster.daemons[role].cli("unprotect", NAME)
            backup = backups[0]
            self.pause_at(role if side == "primary" else backup, point, own)
            command = self.protect(role, backups)
            self.paused(point, command)
            return role, backup, command
        if how == "reprotect":
            # The session that protects it again starts on the backup, or on its backup in turn.
            role, status = self.protected()
            backup = status["host"]
            self.pause_at(backup, point, own)
            cluster.crash(role)
            cluster.back(role)
            self.paused(point)
            self.heard(backup)
            standby = wait_for(lambda: (cluster.protection(backup, NAME) or {}).get("host"), 10, "the next backup")
            return backup, standby, None
        if not point:
            role, _ = self.protected()
            cluster.daemons[role].restart()  # one that does not remember the losses of earlier rows, and waits the less
            role, status = self.protected()
            return role, status["host"], None
        # Sessions keep the environment that their daemon had: a new protection for each row.
        if self.wanted(role):
            cluster.daemons[role].cli("unprotect", NAME)
        backup = backups[0]
        self.pause_at(role if side == "primary" else backup, point, own)
        for _ in range(3):  # on a busy machine another host may get it
            code, out, err = self.protect(role, backups).wait()
            if code:
                raise RigError("protect: %s%s" % (out, err))
            if cluster.protection(role, NAME)["host"] == backup:
                break
            cluster.daemons[role].cli("unprotect", NAME)
        self.counter.wait_flowing()
        command = None
        if how == "unprotect":
            command = Command(cluster.daemons[role], "unprotect", NAME)
        elif how == "yield":
            command = Command(cluster.daemons[backup], "failover", NAME)
        else:
            cluster.crash(role)
        self.paused(point, command)
        return role, backup, command

    def wanted(self, role):
        return os.path.exists(os.path.join(self.cluster.daemons[role].state, "vms", NAME, "protect.json"))

    def protected(self):
        """Protected, wanted or not before."""
        cluster = self.cluster
        role = cluster.primary(NAME)
        if not self.wanted(role):
            cluster.protect(NAME, role, [r for r in cluster.hosts if r != role])
        return cluster.wait_protected(NAME)

    # -- the kill

    def disk_servers(self, role):
        found = []
        for pid in self.cluster.hosts[role].pids():
            try:
                with open("/proc/%d/comm" % pid) as f:
                    if f.read().strip() == "nbdkit":
                        found.append(pid)
            except OSError:
                pass
        return found

    def strike(self, victim, primary, backup):
        """Kills; returns what brings back later what comes back by itself in life: daemons, hosts, the witness."""
        cluster, again = self.cluster, []
        side, _, what = victim.partition("-")
        roles = {"primary": [primary], "backup": [backup]}.get(side, [primary, backup])
        daemons = [cluster.daemons[r] for r in roles]
        if victim == "witness":
            cluster.etcd.kill(0)
            return [lambda: cluster.etcd.start(0)]
        if what == "host":
            cluster.crash(roles[0])
            return [lambda: cluster.back(roles[0])]
        pids = []
        if what in ("daemon", "lifeboat"):
            for daemon in daemons:
                pids.append(daemon.proc.pid)
                again.append(daemon.start)
        if what in ("session", "sessions", "lifeboat"):
            pids += [pid for daemon in daemons for pid in daemon.session_pids()]
        if what == "qemu":
            pids += daemons[0].qemu_pids()
        if victim == "disk-server":
            pids += self.disk_servers(primary)
        if not pids:
            raise RigError("%s: no such process in this state" % victim)
        for pid in pids:
            try:
                os.kill(pid, 9)
            except ProcessLookupError:
                pass
        for daemon in daemons:
            if what in ("daemon", "lifeboat"):
                daemon.proc.wait()
        return again

    # -- what is to be

    def settled(self, session):
        """((primary, its backup or None), "") when all is at rest, "dead" in place of the primary when the VM is; else
        (None, why it is not). session: the protection that cannot go on."""
        cluster = self.cluster
        entries = {r: d.vms().get(NAME, {}).get("state") for r, d in cluster.daemons.items()}
        known = {r: s for r, s in entries.items() if s}
        if len(known) == 1 and list(known.values()) == ["dead"] and not any(cluster.qemus().values()):
            return ("dead", None), ""
        owners = [r for r, s in known.items() if s in ("running", "protected")]
        if len(owners) != 1:
            return None, "entries: %s" % entries
        owner, backup = owners[0], None
        if self.wanted(owner):
            status = cluster.protection(owner, NAME) or {}
            if status.get("state") != "protected" or status.get("role") != "primary" or status["session"] == session:
                return None, "to be protected: %s" % {k: status.get(k) for k in ("state", "host", "note")}
            backup = status["host"]
            if entries[backup] != "standby":
                return None, "entries: %s, backup %s" % (entries, backup)
        elif entries[owner] != "running":
            return None, "entries: %s" % entries
        for role in cluster.hosts:
            left = self.leftovers(role) if role not in (owner, backup) else []
            if left:
                return None, "left on %s: %s" % (role, left)
        qemus = {r: len(p) for r, p in cluster.qemus().items() if p}
        if qemus != {r: 1 for r in (owner, backup) if r}:
            return None, "QEMU: %s, owner %s, backup %s" % (qemus, owner, backup)
        return (owner, backup), ""

    def leftovers(self, role):
        """Of a host that has nothing to do with the VM any more."""
        links = self.cluster.hosts[role].ip("-o", "link")
        return self.cluster.leftovers(role, NAME, sockets=False) + re.findall(r"\blb[hi]\d+\b", links)

    def only_copy(self, how, point, victim):
        """May the VM die with that victim, as nobody else had a complete and confirmed copy?"""
        if victim in ("primary-qemu", "primary-host"):
            return how in ("setup", "unprotect") and point != "pr-recorded" or (how, point) == ("setup", "pr-recorded")
        if victim in ("backup-qemu", "backup-host"):
            return how == "yield" and point in ("bk-journalled", "bk-ran", "pr-fenced")  # it runs there, or may do
        return False

    def row(self, how, point, victim):
        name = " ".join(filter(None, [victim, "killed:", how, point]))
        begin, problems, place, took, silent = time.monotonic(), [], None, 0, 0
        try:
            if not self.nonce:
                self.new_vm()
            primary, backup, command = self.reach(how, point, victim)
            session = (self.cluster.protection(primary, NAME) or {}).get("session")
            apart = victim in ("primary-daemon", "backup-daemon", "witness")  # a protection does without, once it is set up
            goes_on = how == "steady" and apart
            at = time.time()
            again = self.strike(victim, primary, backup)
            if again:
                time.sleep(0.3)
            for start in again:
                start()
            if how == "crash":
                self.cluster.back(primary)
            place, took = self.wait_settled(at, None if apart else session, problems)
            done = command and command.wait(70)[0] == 0
            silent = self.judge(how, point, victim, at, place, problems)
            if how == "unprotect" and done and place not in (None, "dead") and self.wanted(place):
                problems.append("unprotected, and it is to be protected again")
            if goes_on and self.cluster.protection(primary, NAME)["session"] != session:
                problems.append("the protection should have gone on")
        except (RigError, OSError) as error:
            problems.append("%s: %s" % (type(error).__name__, error))
        if problems:
            problems += [self.cluster.all_logs()] + ["==== QEMU on %s\n%s" % (role, read_tail(os.path.join(
                daemon.state, "vms", NAME, "qemu.log"))) for role, daemon in self.cluster.daemons.items()]
        where = "dead, its only copy was killed" if place == "dead" else "runs on %s" % place
        self.t.ok(not problems, "%s: %s; client waited %.1f s, at rest after %.1f s (%.1f s in all)" %
                  (name, where, silent, took, time.monotonic() - begin), "\n".join(problems))
        if problems or place == "dead":
            self.forget_vm()
        else:
            for what, value in (("client waited", silent), ("at rest", took)):
                self.slowest[what] = max(self.slowest.get(what, (0, "")), (value, name))

    def wait_settled(self, at, session, problems):
        end = time.time() + SETTLE_S
        state, missing = self.settled(session)
        while state is None and time.time() < end:
            time.sleep(0.05)
            state, missing = self.settled(session)
        if state is None:
            problems.append("not at rest after %d s: %s" % (SETTLE_S, missing))
        return state and state[0], time.time() - at

    def judge(self, how, point, victim, at, place, problems):
        """Seconds the client waited."""
        if place is None:
            return 0
        if place == "dead":
            if not self.only_copy(how, point, victim):
                problems.append("the VM died")
            return 0
        try:
            self.counter.wait_flowing(20)
        except RigError as error:
            problems.append(str(error))
        self.heard(place)
        turns = [turn[0] for turn in self.capture.turns()]
        if turns != self.expected:
            problems.append("heard: %s, should have been: %s" % (turns, self.expected))
        return self.counter.stall_ms(at) / 1e3


def all_points():
    found = set()
    for path in glob.glob(os.path.join(REPO, "remus", "*.c")):
        with open(path) as f:
            found |= set(re.findall(r'\blb_point\("([a-z0-9-]+)"\);', f.read()))
    return found


def matrix(t, cluster):
    known = {p for _, p, _ in MATRIX if p[:2] in ("pr", "bk")}
    t.ok(all_points() == known and len(known) > 10, "the matrix knows every point of remus/",
         "not covered: %s, gone: %s" % (sorted(all_points() - known), sorted(known - all_points())))
    kill, rows, begin = Kill(t, cluster), 0, time.monotonic()
    for row in MATRIX:
        name = "/".join(row)
        chosen = any(word in name for word in sys.argv[1:]) if sys.argv[1:] else os.environ.get("LB_FULL") or name in QUICK
        if chosen:
            kill.row(*row)
            rows += 1
    if kill.nonce:
        t.ok(kill.counter.error is None, "the client's connection lives", kill.counter.error)
        cluster.clean(t, kill.nonce, "after all of it: the same guest, memory and disk clean")
        kill.forget_vm()
    t.diag("%d rows in %.0f s" % (rows, time.monotonic() - begin))
    for what, (value, name) in kill.slowest.items():
        t.diag("slowest, %s: %.1f s, %s" % (what, value, name))


def main():
    with Tap() as t:
        need(t)
        with Cluster("lbpkill") as cluster:
            matrix(t, cluster)


if __name__ == "__main__":
    main()
