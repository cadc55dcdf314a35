#!/usr/bin/python3
"""Every command on a VM that is suspended, and on one whose memory still comes: done, or refused with a remedy, soon; and
after all of them it is the same guest, in one place."""

import os
import signal
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), "..", "rig"))
from lifeboat import Fleet, need
from rig import RigError, Tap, wait_for

NAME = "vm"
SOON_S = 15

# command, and what is said of it
SUSPENDED = (
    (("migrate", NAME, "b"), "resume"),
    (("protect", NAME, "--backup", "b"), "resume"),
    (("unprotect", NAME), ""),
    (("failover", NAME), ""),
    (("suspend", NAME), "resume"),
    (("checkpoint", NAME), "resume"),
    (("stop", NAME), "resume"),
    (("stop", NAME, "--force"), "resume"),
    (("release", NAME), "resume"),
    (("cancel", NAME), ""),
    (("run", NAME, "--", "qemu-system-x86_64"), "resume"),
    (("adopt", NAME, "--pid", "1"), "resume"),
    (("restore", NAME + "@1"), "resume"),
    (("restore", NAME + "@suspend", "--as", "other"), "resume"),
    (("clone", NAME + "@suspend", "2"), "resume"),
    (("checkpoint", "rm", "--yes", NAME + "@suspend"), "--force"),
)
FILLING = (
    (("migrate", NAME, "b"), "memory still comes"),
    (("protect", NAME, "--backup", "b"), "memory still comes"),
    (("unprotect", NAME), ""),
    (("failover", NAME), ""),
    (("suspend", NAME), "memory still comes"),
    (("checkpoint", NAME), "memory still comes"),
    (("stop", NAME), "memory still comes"),
    (("release", NAME), "memory still comes"),
    (("release", NAME, "--force"), ""),
    (("cancel", NAME), ""),
    (("run", NAME, "--", "qemu-system-x86_64"), ""),
    (("restore", NAME + "@1"), ""),
    (("resume", NAME), ""),
    (("checkpoint", "rm", "--yes", NAME + "@suspend"), "memory of VM"),
)


def refuse_all(t, fleet, table, state):
    d = fleet.da
    for argv, text in table:
        begin = time.monotonic()
        try:
            done = d.cli(*argv, check=False, timeout_s=SOON_S + 20)
        except subprocess.TimeoutExpired:
            t.ok(False, "%s: %s comes back" % (state, " ".join(argv[:3])))
            continue
        said = done.stdout + done.stderr
        took = time.monotonic() - begin
        t.ok(done.returncode != 0 and text in said and took < SOON_S and d.vms().get(NAME, {}).get("state") == state,
             "%s: %s is refused" % (state, " ".join(argv[:3])),
             "exit %d after %.1f s, VM %s: %s" % (done.returncode, took, d.vms().get(NAME), said))


def suspended(t, fleet):
    d = fleet.da
    d.cli("checkpoint", NAME)
    d.cli("suspend", NAME)
    refuse_all(t, fleet, SUSPENDED, "suspended")
    for argv in (("status", NAME), ("show", NAME), ("recover", NAME), ("checkpoint", "ls", NAME), ("checkpoint", "verify", NAME + "@suspend")):
        t.equal((d.cli(*argv, check=False).returncode, d.vms()[NAME]["state"]), (0, "suspended"),
                "suspended: %s" % " ".join(argv))


def filling(t, fleet):
    d = fleet.da
    marker = os.path.join(fleet.a.dir, "held")
    d.restart({"LIFEBOAT_PAUSE_AT": "fill-begun", "LIFEBOAT_PAUSE_FILE": marker})
    d.cli("resume", NAME)
    wait_for(lambda: os.path.exists(marker), 20, "a fill that has begun")
    (pid,) = d.session_pids()
    refuse_all(t, fleet, FILLING, "filling")
    for argv in (("status", NAME), ("show", NAME), ("recover", NAME), ("checkpoint", "verify", NAME + "@suspend")):
        begin = time.monotonic()
        t.equal((d.cli(*argv, check=False).returncode, d.vms()[NAME]["state"], time.monotonic() - begin < SOON_S),
                (0, "filling", True), "filling: %s" % " ".join(argv))
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: d.vms()[NAME]["state"] == "running", 60, "the next one fills it", 0.1)


def main():
    with Tap() as t:
        need(t)
        with Fleet("lbstate") as fleet:
            try:
                disk = os.path.join(fleet.a.dir, "disk.raw")
                with open(disk, "wb") as f:
                    f.truncate(16 << 20)
                fleet.run_vm("a", NAME, memory_mb=192, work="dirty=5:16:mixed disk=vda", disk=disk)
                nonce = fleet.wait_guest()["nonce"]
                suspended(t, fleet)
                filling(t, fleet)
                fleet.clean(t, nonce, "the same guest after all of that, clean")
                fleet.one_qemu(t, "a", "one VM")
            except (RigError, OSError) as error:
                t.ok(False, "no exception", "%s\n%s" % (error, fleet.all_logs()))
                raise


if __name__ == "__main__":
    main()
