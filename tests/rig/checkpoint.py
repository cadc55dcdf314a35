"""Checkpoints in the rig: VMs that are suspended, restored and cloned on a host of a fleet, marks that tell one moment from another,
networks of their own for guests with one address, shared memory, and damage to files."""

import os
import re
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from lifeboat import Fleet
from rig import GUEST_IP, RigError, sh, wait_for


def redis(connect, *words, ip=GUEST_IP, timeout_s=10):
    """One command to the Redis of a guest; connect makes the socket. Returns the answer's text (not of lists)."""
    with connect() as sock:
        sock.settimeout(timeout_s)
        sock.connect((ip, 6379))
        sock.sendall(b"".join([b"*%d\r\n" % len(words)] + [b"$%d\r\n%s\r\n" % (len(w), w.encode()) for w in map(str, words)]))
        data = b""
        while data.count(b"\r\n") < (2 if data.startswith(b"$") and not data.startswith(b"$-1") else 1):
            piece = sock.recv(4096)
            if not piece:
                raise RigError("Redis closed the connection")
            data += piece
    lines = data.decode().split("\r\n")
    return lines[1] if lines[0].startswith("$") and len(lines) > 2 else lines[0]


def pss_kb(pid):
    """What a process holds of memory, pages that several share by halves, thirds ..."""
    with open("/proc/%d/smaps_rollup" % pid) as f:
        return int(re.search(r"^Pss:\s+(\d+) kB", f.read(), re.M).group(1))


def rss_kb(pid):
    with open("/proc/%d/smaps_rollup" % pid) as f:
        return int(re.search(r"^Rss:\s+(\d+) kB", f.read(), re.M).group(1))


def flip(path, at):
    """Changes one byte of a file; again: it is what it was."""
    with open(path, "r+b") as f:
        f.seek(at)
        byte = f.read(1)
        f.seek(at)
        f.write(bytes([byte[0] ^ 0x40]))


class SmallDisk:
    """A file system in memory with so much room, at a path."""

    def __init__(self, path, size_mb):
        self.path = path
        os.makedirs(path, exist_ok=True)
        sh("mount", "-t", "tmpfs", "-o", "size=%dm" % size_mb, "lb", path)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        sh("umount", "-l", self.path)


class Harbour(Fleet):
    """A fleet whose VMs are put away and brought back."""

    def state(self, role, name):
        return self.daemons[role].vms().get(name, {}).get("state")

    def wait_state(self, role, name, wanted, timeout_s=90):
        try:
            wait_for(lambda: self.state(role, name) == wanted, timeout_s, "VM %s %s" % (name, wanted), 0.1)
        except RigError as error:
            raise RigError("%s; it is %s\n%s" % (error, self.daemons[role].vms().get(name), self.all_logs()))

    def wait_running(self, role, name, timeout_s=90):
        """Until all of its memory is there."""
        self.wait_state(role, name, "running", timeout_s)

    def checkpoints(self, role, *names):
        """{ref: what `checkpoint ls` says of it}."""
        return {c["ref"]: c for c in self.daemons[role].json("checkpoint", "ls", *names)["checkpoints"]}

    def folder(self, role):
        """Where the checkpoints of a host are, unless it is told otherwise."""
        return os.path.join(self.daemons[role].state, "checkpoints")

    def pid_of(self, role, name):
        return self.daemons[role].vms()[name]["pid"]

    def stop(self, role, name, timeout_s=30):
        """Ends a VM and waits until nothing of it is left."""
        pid = self.daemons[role].vms().get(name, {}).get("pid", 0)
        self.daemons[role].cli("stop", name, "--force")
        wait_for(lambda: pid not in self.daemons[role].qemu_pids() and self.state(role, name) is None, timeout_s,
                 "the end of VM " + name, 0.1)
