#!/usr/bin/python3
"""Memory that the guest gives back while it is migrated: QEMU discards it (fallocate and madvise), the dirty log must tell
of it, and the destination must not keep what it got before. --verify compares every page of both ends."""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "rig"))
from lifeboat import Command, Fleet, need
from rig import GUEST_IP, Qmp, Tap, wait_for


def main():
    with Tap() as t:
        need(t)
        with Fleet("lbball") as fleet:
            fleet.run_vm("a", "vm", work="dirty=5:64:random redis", memory_mb=512, memfd=True,
                         extra=["-device", "virtio-balloon-pci"])
            fleet.wait_guest()
            before = fleet.guest_status(verify_all=True)
            qmp = Qmp(os.path.join(fleet.a.dir, "vm.qmp"))

            redis = fleet.client.socket()
            redis.settimeout(30)
            redis.connect((GUEST_IP, 6379))

            def ask(*words):
                redis.sendall(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in words))
                return redis.recv(4096)

            def percent():
                session = fleet.da.json("status", "vm").get("session") or {}
                return (session.get("progress") or {}).get("percent", 0)

            # Memory that is written, sent, freed, and then given back.
            filled = all(ask(b"SET", b"key%d" % i, os.urandom(1 << 20)) == b"+OK\r\n" for i in range(160))
            t.ok(filled, "the guest holds 160 MB of random values")
            command = Command(fleet.da, "migrate", "vm", "b", "--verify", "--bandwidth", "30MB", "--compress", "off", "--json")
            wait_for(lambda: percent() > 60, 60, "the migration under way", 0.05)
            t.equal(ask(b"FLUSHALL", b"SYNC"), b"+OK\r\n", "the guest frees them")
            ask(b"MEMORY", b"PURGE")
            qmp.cmd("balloon", value=180 << 20)
            wait_for(lambda: qmp.cmd("query-balloon")["actual"] <= 180 << 20, 30, "the balloon")
            t.ok(not command.done(), "and gives back 330 MB, with the migration under way")
            code, out, err = command.wait()
            t.ok(code == 0, "migrated, and every page of both ends agrees", err)
            after = fleet.guest_status(verify_all=True)
            t.equal(after["nonce"], before["nonce"], "one and the same guest")
            t.equal(after["bad_pages"], 0, "no bad page")
            t.diag(fleet.da.logs(3))


if __name__ == "__main__":
    main()
