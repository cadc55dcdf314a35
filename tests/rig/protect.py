"""Protection in the rig: hosts A, B, C, an etcd apart, crashes, partitions, a client that counts acknowledged answers, and a
capture of what leaves each host; the parts are in rig.py and etcd.py."""

import json
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from lifeboat import Fleet
from rig import GuestCapture, IncrLoad, RigError, wait_for


class Cluster(Fleet):
    """A fleet with an etcd: cluster.etcd, its hosts cluster.members, cluster.witness (what --witness takes)."""

    def __init__(self, prefix="lbp", hosts="ABC", members=1, **options):
        super().__init__(prefix, hosts, witness=members, **options)
        self.members, self.witness = self.etcd.hosts, self.etcd.spec()

    # -- protections

    def protect(self, name, role, backups, *options, timeout_s=120):
        """A lease several times the default, unless told: a machine that is busy with tests must not look dead."""
        words = list(options)
        if "--lease" not in words:
            words += ["--lease", "500ms"]
        if not any(word in ("--manual", "--fence", "--witness") for word in words):
            words += ["--witness", self.witness]
        return self.daemons[role].cli("protect", name, "--backup", ",".join(backups), *words, timeout_s=timeout_s)

    def protection(self, role, name="vm"):
        """The last status of a VM's protection on a host, or None."""
        daemon = self.daemons[role]
        if daemon.proc.poll() is not None:
            return None
        done = daemon.cli("top", "--once", "--json", check=False)
        if done.returncode != 0:
            return None
        for entry in json.loads(done.stdout)["protections"]:
            if entry.get("vm") == name:
                return entry
        return None

    def primary(self, name="vm"):
        """Role of the host whose daemon says that it runs the VM; None when none or several do."""
        found = []
        for role, daemon in self.daemons.items():
            if daemon.proc.poll() is None and daemon.vms().get(name, {}).get("state") in ("running", "protected"):
                found.append(role)
        return found[0] if len(found) == 1 else None

    def wait_protected(self, name="vm", timeout_s=60):
        """Waits until the VM runs on one host, protected; returns that host's role and its status."""
        def there():
            role = self.primary(name)
            status = self.protection(role, name) if role else None
            return (role, status) if status and status["state"] == "protected" and status["role"] == "primary" else None
        try:
            return wait_for(there, timeout_s, "VM %s protected" % name, 0.1)
        except RigError as error:
            raise RigError("%s\n%s" % (error, self.all_logs()))

    # -- faults

    def crash(self, role):
        """The host dies without a word. Returns the time."""
        return self.kill_host(self.hosts[role])

    def back(self, role):
        """It comes back with what is on its disk, and with what dead processes have left in its kernel."""
        self.revive_host(self.hosts[role], booted=False)

    def signal_host(self, role, number):
        self.hosts[role].signal(number)


class Counter(IncrLoad):
    """The client of IncrLoad; stalls from 50 ms on."""

    def __init__(self, namespace):
        super().__init__(namespace, stall_ms=50, timeout_s=60)

    def stop(self, timeout_s=40):
        """Its report; "error" says also what was forgotten."""
        report = super().stop(timeout_s)
        return dict(report, error=self.error)


class Capture(GuestCapture):
    """Who was heard when: frames with the guest's address that left each host."""

    def turns(self):
        """Who was heard so far, one after the other: [(role, first time, last time)]. One running copy at a time gives one turn for
        each host that had it, and no more: a loser that is heard once more makes two more turns."""
        return [(run["place"], run["first"], run["last"]) for run in self.runs()]

    def stop(self, timeout_s=40):
        super().stop(timeout_s)
        return self.turns()


def unbroken(t, counter, what):
    """A test line: the counting client lost nothing and its connection lives. Returns its report."""
    report = counter.stop()
    t.ok(report["error"] is None and report["acked"] > 0, what, report)
    return report
