#!/usr/bin/python3
"""Partitions, stopped processes and a dying witness: whatever is cut, one copy runs, a loser is never heard, no acknowledged
write is lost. The clients' network is never cut: a copy that should not send would be heard."""

import os
import signal
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), "..", "rig"))
from lifeboat import need
from protect import Capture, Cluster, Counter
from rig import RigError, Tap, wait_for

NAME = "vm"
CUT_S = 2.0  # many times the lease


class Trial:
    """One guest through all of it: knows who should have it, and who was heard."""

    def __init__(self, t, cluster):
        self.t, self.cluster = t, cluster
        self.capture, self.counter = Capture(cluster), Counter(cluster.client)
        self.counter.wait_flowing()
        self.expected = []

    def begin(self):
        """(primary, backup), protected and heard."""
        role, status = self.cluster.wait_protected(NAME)
        self.counter.wait_flowing()
        if not self.expected or self.expected[-1] != role:
            self.expected.append(role)
        return role, status["host"]

    def end(self, what, stays=None, moves_to=None):
        """Protected again; the client went on; who was heard is who should have been."""
        t, cluster = self.t, self.cluster
        try:
            self.counter.wait_flowing(30)
            role, status = cluster.wait_protected(NAME)
            self.counter.wait_flowing(10)
        except RigError as error:
            t.ok(False, what + ": runs and is protected again", "%s\n%s" % (error, cluster.all_logs()))
            raise
        want = stays or moves_to
        t.ok(want is None or role == want, what + ": " + ("runs where it ran" if stays else "the backup has it" if moves_to else "runs"),
             "on %s, protected by %s" % (role, status["host"]))
        if role != self.expected[-1]:
            self.expected.append(role)
        turns = [turn[0] for turn in self.capture.turns()]
        t.equal(turns, self.expected, what + ": no loser was heard")
        t.ok(self.counter.error is None, what + ": no acknowledged write is lost, the connection lives", self.counter.error)
        return role


def others(cluster, role):
    return [host for name, host in cluster.hosts.items() if name != role]


def cut_pairs(t, cluster, trial):
    """primary|backup, both ways and each way."""
    for what, ways in (("primary|backup", "both"), ("primary>backup", "to"), ("backup>primary", "from")):
        primary, backup = trial.begin()
        p, b = cluster.hosts[primary], cluster.hosts[backup]
        heal = cluster.partition(b, p, one_way=True) if ways == "from" else cluster.partition(p, b, one_way=ways == "to")
        time.sleep(CUT_S)
        trial.counter.wait_flowing(20)
        heal()
        trial.end("cut " + what)


def cut_witness(t, cluster, trial):
    """Nobody needs the witness while both sides hear each other."""
    for side in ("primary", "backup"):
        for both_ways in (True, False):
            primary, backup = trial.begin()
            session = cluster.protection(primary, NAME)["session"]
            host = primary if side == "primary" else backup
            heal = cluster.partition(cluster.hosts[host], cluster.members, one_way=not both_ways)
            wait_for(lambda: not cluster.protection(host, NAME)["witness_ok"], 20, "status: the witness does not answer", 0.2)
            time.sleep(CUT_S)
            status = cluster.protection(primary, NAME)
            what = "cut %s%switness" % (side, "|" if both_ways else ">")
            t.ok(status["state"] == "protected" and status["session"] == session, what + ": protection goes on", status)
            heal()
            trial.end(what, stays=primary)


def cut_from_all(t, cluster, trial):
    """A primary that hears nobody falls silent and loses; it learns when it is mended."""
    for both_ways in (True, False):
        primary, backup = trial.begin()
        heal = cluster.partition(cluster.hosts[primary], others(cluster, primary) + cluster.members, one_way=not both_ways)
        wait_for(lambda: cluster.daemons[backup].vms().get(NAME, {}).get("state") in ("running", "protected"), 20,
                 "the backup takes over", 0.05)
        trial.counter.wait_flowing(10)
        time.sleep(CUT_S)
        heal()
        what = "cut primary%severybody" % ("|" if both_ways else ">")
        trial.end(what, moves_to=backup)
        wait_for(lambda: cluster.daemons[primary].vms().get(NAME, {}).get("state") in (None, "standby"), 30,
                 what + ": the loser gives up its copy", 0.1)


def stopped(t, cluster, trial):
    """Every process of the primary's host stands still for longer than the lease, and then goes on."""
    primary, backup = trial.begin()
    cluster.signal_host(primary, signal.SIGSTOP)
    wait_for(lambda: cluster.daemons[backup].vms().get(NAME, {}).get("state") in ("running", "protected"), 20,
             "the backup takes over", 0.05)
    time.sleep(1)
    cluster.signal_host(primary, signal.SIGCONT)
    trial.end("SIGSTOP of the primary's host", moves_to=backup)


def witness_dies(t, cluster, trial):
    """One member of three, then two: no quorum, no decision."""
    cluster.etcd.kill(0)
    primary, backup = trial.begin()
    cluster.crash(primary)
    wait_for(lambda: cluster.daemons[backup].vms().get(NAME, {}).get("state") in ("running", "protected"), 20,
             "the backup takes over with two members of three", 0.05)
    cluster.back(primary)
    trial.end("primary dies with one etcd member dead", moves_to=backup)
    primary, backup = trial.begin()
    cluster.etcd.kill(1)
    time.sleep(1)
    t.equal(cluster.protection(primary, NAME)["state"], "protected", "no quorum: protection goes on")
    heal = cluster.partition(cluster.hosts[primary], cluster.hosts[backup])
    time.sleep(CUT_S)
    answered = trial.counter.acked()
    time.sleep(0.5)
    t.equal(trial.counter.acked(), answered, "no quorum and no backup: nobody sends")
    for i in (0, 1):
        cluster.etcd.start(i)
    time.sleep(CUT_S)
    heal()
    trial.end("the quorum is back")


def main():
    with Tap() as t:
        need(t)
        with Cluster("lbpart", members=3) as cluster:
            disk = os.path.join(cluster.a.dir, "vm.img")
            with open(disk, "wb") as f:
                f.truncate(64 << 20)
            cluster.run_vm("a", NAME, memory_mb=256, disk=disk, work="dirty=10:32:mixed disk=vda redis")
            before = cluster.wait_guest()
            cluster.protect(NAME, "a", "bc")
            trial = Trial(t, cluster)
            cut_pairs(t, cluster, trial)
            cut_witness(t, cluster, trial)
            cut_from_all(t, cluster, trial)
            stopped(t, cluster, trial)
            witness_dies(t, cluster, trial)
            report = trial.counter.stop()
            trial.capture.stop()
            t.ok(report["error"] is None, "one connection through all of it: %d answers" % report["acked"], report)
            cluster.clean(t, before["nonce"], "the same guest, memory and disk clean")


if __name__ == "__main__":
    main()
