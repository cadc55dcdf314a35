#!/usr/bin/python3
"""A VM that has live checkpoints ends and is started again by its old command line: it goes on where it was, and what its
checkpoints hold stays as it is; where that is not clear nothing starts; who is found on an old image is told."""

import hashlib
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), "..", "rig"))
from lifeboat import Fleet, need
from rig import RigError, Tap, sh, wait_for

NAME = "vm"


def digest(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class Old:
    """One host, one raw disk, one command line."""

    def __init__(self, t, fleet):
        self.t, self.fleet, self.d, self.host = t, fleet, fleet.da, fleet.a
        self.disk = os.path.join(self.host.dir, "disk.raw")
        with open(self.disk, "wb") as f:
            f.truncate(64 << 20)
        self.argv = self.fleet.qemu_argv(self.host, NAME, memory_mb=192, work="dirty=2:16:mixed disk=vda",
                                         disk=self.disk)

    def run(self, name=NAME):
        return self.d.cli("run", "--json", name, "--", *self.argv, check=False)

    def write_some(self):
        """Until the guest has written and read back some of its disk."""
        before = self.fleet.wait_guest()["disk_verified"]
        wait_for(lambda: self.fleet.guest_status()["disk_verified"] > before + 50, 30, "the guest's writes", 0.1)

    def stop(self):
        self.d.cli("stop", NAME, "--force")

    def images(self):
        """What the VM writes to."""
        return [disk["path"] for disk in self.d.json("show", NAME)["description"]["disks"] if not disk["read_only"]]


def goes_on(old):
    t, d = old.t, old.d
    t.equal(old.run().returncode, 0, "a VM on a disk that no checkpoint holds starts")
    old.write_some()
    for _ in range(2):
        d.cli("checkpoint", NAME)
        old.write_some()
    newest = old.disk + ".lb-%s-2" % NAME
    held = {path: digest(path) for path in (old.disk, old.disk + ".lb-%s-1" % NAME)}
    old.stop()
    done = old.run()
    t.ok(done.returncode == 0 and newest in done.stdout, "its old command line starts it, with a warning",
         done.stdout + done.stderr)
    old.write_some()
    t.equal(old.images()[:1], [newest], "on the image where it went on")
    d.cli("checkpoint", NAME)
    old.stop()
    t.equal({path: digest(path) for path in held}, held, "the images of its checkpoints are as they were")
    done = d.cli("checkpoint", "verify", NAME + "@1", NAME + "@3", check=False)
    t.equal(done.returncode, 0, "and its checkpoints whole")


def is_not_clear(old):
    t, d = old.t, old.d
    above = os.path.join(old.host.dir, "mine.qcow2")
    sh("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", old.disk + ".lb-%s-1" % NAME, above)
    done = old.run()
    t.ok(done.returncode != 0 and above in done.stdout and ".lb-%s-3" % NAME in done.stdout,
         "with two images that stand on it nothing starts, and both are named", done.stdout + done.stderr)
    os.unlink(above)
    t.equal(old.run("other").returncode, 0, "another name changes nothing")
    old.write_some()
    d.cli("suspend", "other")
    done = old.run()
    t.ok(done.returncode != 0 and "lifeboat resume other" in done.stdout, "one that waits for its resume is not written to",
         done.stdout + done.stderr)
    d.cli("resume", "other", "--wait")
    old.fleet.wait_guest()
    d.cli("stop", "other", "--force")


def is_told(old):
    vm = old.fleet.start_qemu(old.host, "byhand", memory_mb=192, work="dirty=0:8:mixed", disk=old.disk)
    done = old.d.json("adopt", "byhand", "--pid", str(vm.pid), "--qmp", vm.spare_qmp_path)
    old.t.ok(any(old.disk in text for text in done.get("damages", [])), "who is found writing to an image of a checkpoint is told",
             str(done))
    old.d.cli("release", "byhand")
    vm.kill()


with Tap() as t:
    need(t)
    with Fleet("lbimg", hosts="A") as fleet:
        try:
            old = Old(t, fleet)
            goes_on(old)
            is_not_clear(old)
            is_told(old)
        except RigError as error:
            raise RigError("%s\n%s" % (error, fleet.all_logs()))
