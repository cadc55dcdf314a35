#!/usr/bin/python3
"""Protection: on and off again under a client's eyes, what is shown of it, the death of the primary host, protection on the next
host, the return of the dead one; a planned failover; the loss of the backup."""

import os
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), "..", "rig"))
from lifeboat import EchoLine, need
from protect import Capture, Cluster, Counter, unbroken
from rig import CLIENT_IP, UDP_PORT, Tap, wait_for

WORK = "dirty=20:48:mixed disk=vda udp=%s:%d redis echo" % (CLIENT_IP, UDP_PORT)
NAME = "vm"


def on_and_off(t, cluster):
    """Protection begins and ends on a running VM; clients notice nothing but a little latency."""
    counter, echo = Counter(cluster.client), EchoLine(cluster.client)
    counter.wait_flowing()
    cluster.protect(NAME, "a", "b")
    time.sleep(2)
    status = cluster.protection("a")
    t.ok(status["state"] == "protected" and status["epochs_per_s"] > 5 and status["acked"] > 20 and
         status["released"] <= status["acked"] <= status["epoch"], "protected, epochs are acknowledged", status)
    standby = cluster.protection("b")
    t.ok(standby and standby["role"] == "backup" and standby["state"] == "standby", "the other host says that it is the backup", standby)
    t.equal((cluster.da.vms()[NAME]["state"], cluster.db.vms()[NAME]["state"]), ("protected", "standby"), "ls says so on both")
    text = cluster.da.cli("status", NAME).stdout
    t.ok("protected" in text and "b" in text, "status says it in words", text)
    refused = cluster.da.cli("migrate", NAME, "c", check=False)
    t.ok(refused.returncode != 0 and "disks" in refused.stderr, "it is not migrated to where its disks are not, and why", refused.stderr)
    t.equal(cluster.protection("a")["state"], "protected", "which was found out without ending its protection")
    counter.wait_flowing()
    cluster.da.cli("unprotect", NAME)
    t.equal(cluster.da.vms()[NAME]["state"], "running", "unprotect: an ordinary VM again")
    cluster.nothing_left(t, "b", "unprotect: nothing left on the backup", NAME)
    counter.wait_flowing()
    unbroken(t, counter, "the counting client through protect and unprotect")
    line = echo.stop()
    t.ok(line["error"] is None and line["answered"] > 20, "an echo connection too", line)
    taps = cluster.a.ip("link")
    t.ok("lbh" not in taps and "lbi" not in taps, "no tap of ours is left", taps)


def host_dies(t, cluster, nonce):
    """Kill the primary host; then it comes back."""
    cluster.protect(NAME, "a", "bc")
    capture, counter = Capture(cluster), Counter(cluster.client)
    counter.wait_flowing()
    time.sleep(1)
    at = cluster.crash("a")
    counter.wait_flowing(10)
    stall = counter.stall_ms(at)
    role, status = cluster.wait_protected(NAME)
    t.equal(role, "b", "runs on the backup")
    t.equal(status["host"], "c", "and is protected on the next host")
    t.diag("the client waited %.0f ms; failover took %.0f ms as measured there" % (stall, status["last_failover_took_ms"]))
    t.ok(stall < 5000, "within seconds", stall)
    cluster.back("a")
    cluster.nothing_left(t, "a", "the host that comes back has removed its copy", NAME, timeout_s=20, sockets=False)
    unbroken(t, counter, "no acknowledged INCR is lost, the connection lives")
    t.equal([turn[0] for turn in capture.stop()], ["a", "b"], "never two copies were heard")
    cluster.clean(t, nonce, "the same guest, memory and disk clean")
    history = cluster.db.json("history", NAME)["history"]
    t.ok(any("failed" in str(entry) or "failover" in str(entry) for entry in history), "history says so", history[-2:])


def planned(t, cluster, nonce):
    """From b to c, by an operator."""
    capture, counter = Capture(cluster), Counter(cluster.client)
    counter.wait_flowing()
    cluster.dc.cli("failover", NAME)
    counter.wait_flowing(10)
    wait_for(lambda: cluster.primary(NAME) == "c", 20, "the VM on c")
    role, _ = cluster.wait_protected(NAME)
    t.equal(role, "c", "planned failover: runs on the backup, protected again")
    unbroken(t, counter, "planned failover: no acknowledged INCR is lost")
    t.equal([turn[0] for turn in capture.stop()], ["b", "c"], "planned failover: never two copies were heard")
    cluster.clean(t, nonce, "planned failover: memory and disk clean")


def backup_dies(t, cluster, nonce):
    role, status = cluster.wait_protected(NAME)
    counter = Counter(cluster.client)
    counter.wait_flowing()
    old = status["host"]
    cluster.crash(old)
    wait_for(lambda: (cluster.protection(role, NAME) or {}).get("host") != old, 30, "the primary gives the dead backup up")
    counter.wait_flowing(10)
    again, status = cluster.wait_protected(NAME)
    t.ok(again == role and status["host"] not in (old, role), "the backup died: the primary goes on, with another backup", status)
    unbroken(t, counter, "the backup died: no acknowledged INCR is lost")
    cluster.clean(t, nonce, "the backup died: memory and disk clean")
    cluster.back(old)
    return role


def main():
    with Tap() as t:
        need(t)
        with Cluster("lbprot") as cluster:
            # In the host's own folder: each host has an image of its own under that name.
            disk = os.path.join(cluster.a.dir, "vm.img")
            with open(disk, "wb") as f:
                f.truncate(128 << 20)
            cluster.run_vm("a", NAME, memory_mb=256, disk=disk, work=WORK)
            status = cluster.wait_guest()
            on_and_off(t, cluster)
            host_dies(t, cluster, status["nonce"])
            planned(t, cluster, status["nonce"])
            role = backup_dies(t, cluster, status["nonce"])
            cluster.daemons[role].cli("unprotect", NAME)
            cluster.stop_vm(NAME)


if __name__ == "__main__":
    main()
