#!/usr/bin/python3
"""A VM whose disk got an overlay after it was started: it migrates, is protected and fails over with the image it writes, not with
the one of its command line; what cannot be there on the other host is said before."""

import os
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), "..", "rig"))
from lifeboat import need
from protect import Cluster
from rig import Qmp, Tap

WORK = "dirty=10:32:mixed disk=vda echo"
NAME = "vm"


def monitor(host):
    return Qmp(os.path.join(host.dir, NAME + ".qmp2"))


def snapshot(host, image):
    """An operator's snapshot of the first disk."""
    qmp = monitor(host)
    node = qmp.cmd("query-block")[0]["inserted"]["node-name"]
    qmp.cmd("blockdev-snapshot-sync", node_name=node, snapshot_file=image, snapshot_node_name="op", format="qcow2")
    qmp.close()


def open_images(pid):
    found = set()
    for fd in os.listdir("/proc/%d/fd" % pid):
        try:
            found.add(os.readlink("/proc/%d/fd/%s" % (pid, fd)))
        except OSError:
            pass
    return found


def written(cluster, t, nonce, what):
    """The guest goes on writing and reading back."""
    before = cluster.guest_status()["disk_verified"]
    time.sleep(1)
    cluster.clean(t, nonce, what, disk=before)


def migrate(t, cluster):
    """Shared storage."""
    disk = cluster.make_disk()
    overlay = os.path.join(cluster.dir, "over.qcow2")
    cluster.run_vm("a", NAME, memory_mb=128, disk=disk, work=WORK)
    nonce = cluster.wait_guest()["nonce"]
    snapshot(cluster.a, overlay)
    written(cluster, t, nonce, "on its overlay")

    os.rename(disk, disk + ".away")
    refused = cluster.da.cli("migrate", NAME, "b", check=False)
    t.ok(refused.returncode != 0 and "stands on" in refused.stderr and disk in refused.stderr,
         "an overlay without what it stands on is refused", refused.stderr)
    os.rename(disk + ".away", disk)

    for source, target in (("a", "b"), ("b", "a")):
        cluster.migrate(NAME, source, target)
        cluster.wait_where(NAME, target)
        images = open_images(cluster.daemons[target].qemu_pids()[0])
        t.ok(overlay in images and disk in images, "on %s with its overlay" % target, images)
        written(cluster, t, nonce, "the same guest, its disk is what it wrote")
    cluster.stop_vm(NAME)


def protect(t, cluster):
    """Each host has images of its own: the backup needs neither the overlay nor what it stands on."""
    disk = os.path.join(cluster.a.dir, "own.img")
    with open(disk, "wb") as f:
        f.truncate(128 << 20)
    cluster.run_vm("a", NAME, memory_mb=128, disk=disk, work=WORK)
    nonce = cluster.wait_guest()["nonce"]
    snapshot(cluster.a, os.path.join(cluster.a.dir, "own.1"))
    cluster.protect(NAME, "a", "b")
    written(cluster, t, nonce, "protected on its overlay")
    cluster.crash("a")
    wait = time.monotonic() + 30
    while cluster.primary(NAME) != "b" and time.monotonic() < wait:
        time.sleep(0.2)
    t.equal(cluster.primary(NAME), "b", "the backup runs it")
    copy = os.path.join(cluster.b.dir, "own.1")
    images = open_images(cluster.db.qemu_pids()[0])
    t.ok(copy in images and os.path.join(cluster.b.dir, "own.img") not in images, "with its copy of the overlay", images)
    written(cluster, t, nonce, "the same guest, its disk is what it wrote")


def main():
    with Tap() as t:
        need(t)
        with Cluster("lbov", hosts="AB") as cluster:
            migrate(t, cluster)
            protect(t, cluster)


if __name__ == "__main__":
    main()
