#!/usr/bin/python3
"""VMs that run while their memory still comes, and nobody brings it: after the death of sessions and supervisors, without the
key, at the end of all; and all VMs of a host at once beside what was asked for by hand."""

import os
import secrets
import signal
import socket
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), "..", "rig"))
from lifeboat import DAEMON, Command, Fleet, need
from rig import RigError, Tap, wait_for

NAME = "vm"


class Harbour:
    """One host, one guest that checks itself."""

    def __init__(self, t, fleet):
        self.t, self.fleet, self.d, self.host = t, fleet, fleet.da, fleet.a
        self.disk = os.path.join(self.host.dir, "disk.raw")
        with open(self.disk, "wb") as f:
            f.truncate(64 << 20)
        self.start()

    def start(self):
        self.fleet.run_vm("a", NAME, memory_mb=256, work="dirty=10:32:mixed disk=vda", disk=self.disk)
        wait_for(self.ready, 60, "the guest's stamped pages", 0.2)
        self.nonce = self.fleet.guest_status()["nonce"]

    def ready(self):
        try:
            return self.fleet.guest_status()["ready"]
        except (OSError, RigError):
            return False

    def entry(self, name=NAME):
        return self.d.vms().get(name, {})

    def wait_state(self, state, name=NAME):
        wait_for(lambda: self.entry(name).get("state") == state, 60, "VM %s %s" % (name, state), 0.1)

    def clean(self, what):
        self.fleet.clean(self.t, self.nonce, what)

    def secret(self, name, text):
        """A file that only root reads."""
        path = os.path.join(self.host.dir, name)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as f:
            f.write(text)
        return path

    def refused(self, what, text, *argv):
        done = self.d.cli(*argv, check=False)
        self.t.ok(done.returncode != 0 and text in done.stdout + done.stderr, what,
                  "exit %d: %s%s" % (done.returncode, done.stdout, done.stderr))

    def hold_fills(self):
        """From now on a session stops before it fills: the first one after this, the next ones do not."""
        marker = os.path.join(self.host.dir, "held-%s" % secrets.token_hex(4))
        self.d.restart({"LIFEBOAT_PAUSE_AT": "fill-begun", "LIFEBOAT_PAUSE_FILE": marker})
        return marker

    def held(self, marker):
        wait_for(lambda: os.path.exists(marker), 20, "a fill that has begun")
        (pid,) = self.d.session_pids()
        return pid


def part_key_file(port):
    """A key file is remembered by its name: nobody is asked for it again."""
    t, d = port.t, port.d
    key = port.secret("key", secrets.token_hex(32) + "\n")
    d.cli("suspend", NAME, "--key", key)
    shown = port.entry()
    t.ok(shown["state"] == "suspended" and shown["suspended"]["file_bytes"] == os.path.getsize(shown["suspended"]["path"]) > 0,
         "ls has the suspended VM's file", shown)
    marker = port.hold_fills()
    answer = d.json("resume", NAME)
    t.ok(answer["filling"] and answer["resumed"], "resume finds the key, and answers when the guest runs", answer)
    pid = port.held(marker)
    port.refused("a VM that gets its memory is not migrated", "memory still comes", "migrate", NAME, "b")
    port.refused("nor stopped without force", "stop --force", "stop", NAME)
    port.refused("nor suspended again", "memory still comes", "suspend", NAME)
    port.refused("nor is its file removed", "memory of VM", "checkpoint", "rm", "--yes", NAME + "@suspend")
    os.kill(pid, signal.SIGKILL)
    d.kill()
    d.start()
    port.wait_state("running")
    port.clean("session and supervisor killed: filled by the next ones, the same guest, clean")
    folder = os.path.join(d.state, "vms", NAME)
    t.ok(not os.path.exists(os.path.join(folder, "key-file")) and not os.path.exists(shown["suspended"]["path"]),
         "neither the key's name nor the file is left", os.listdir(folder))


def part_passphrase(port):
    """A passphrase is remembered by nobody: the guest waits for it."""
    t, d = port.t, port.d
    right, wrong = port.secret("right", "correct horse\n"), port.secret("wrong", "battery staple\n")
    d.cli("suspend", NAME, "--passphrase-file", right)
    marker = port.hold_fills()
    port.refused("a wrong passphrase resumes nothing", "wrong passphrase", "resume", NAME, "--passphrase-file", wrong)
    t.equal(port.entry()["state"], "suspended", "it stays suspended")
    d.cli("resume", NAME, "--passphrase-file", right)
    os.kill(port.held(marker), signal.SIGKILL)
    wait_for(lambda: "passphrase" in port.entry().get("fill", {}).get("problem", ""), 20, "ls says what it waits for", 0.1)
    t.equal(port.entry()["state"], "filling", "without the passphrase the guest waits")
    port.refused("a wrong passphrase fills nothing", "wrong passphrase", "resume", NAME, "--passphrase-file", wrong)
    answer = d.json("resume", NAME, "--passphrase-file", right)
    t.ok(answer["filling"], "resume with the passphrase takes it up", answer)
    port.wait_state("running")
    port.clean("the same guest, clean")


def part_all(port):
    """suspend --all waits for a checkpoint under way; resume --all brings back what it suspended, and nothing else."""
    t, d = port.t, port.d
    port.fleet.run_vm("a", "by-hand", memory_mb=128, tap=None)
    d.cli("suspend", "by-hand")
    slow = Command(d, "checkpoint", NAME, "--bandwidth", "20MB", "--json")
    wait_for(lambda: port.entry()["state"] == "checkpointing", 10, "a checkpoint under way", 0.05)
    answer = d.json("suspend", "--all")
    code, _, err = slow.wait()
    t.equal(([e["vm"] for e in answer["done"]], answer["failed"], answer["left"], code), ([NAME], [], [], 0),
            "suspend --all waits for the checkpoint, then suspends" + (": " + err.strip() if code else ""))
    d.restart()
    answer = d.json("resume", "--all")
    t.equal(([e["vm"] for e in answer["done"]], answer["failed"]), ([NAME], []), "resume --all: what suspend --all suspended")
    t.equal(port.entry("by-hand")["state"], "suspended", "not what was suspended by hand")
    port.wait_state("running")
    port.clean("the same guest, clean")
    port.refused("a suspended VM is not thrown away unasked", "--force", "checkpoint", "rm", "--yes", "by-hand@suspend")
    d.cli("checkpoint", "rm", "--yes", "--force", "by-hand@suspend")
    t.equal((port.entry("by-hand"), os.path.exists(os.path.join(d.state, "vms", "by-hand"))), ({}, False), "by force it is")
    history = [(line["vm"], line["direction"], line["ok"]) for line in d.json("history")["history"]]
    t.equal([h for h in history if h[0] == "by-hand"], [("by-hand", "suspend", True)], "history has the suspend")
    t.ok((NAME, "resume", True) in history, "and the resume", history)


def part_end(port):
    """stop --force: whatever its session does."""
    t, d, fleet = port.t, port.d, port.fleet
    d.cli("suspend", NAME)
    marker = port.hold_fills()
    d.cli("resume", NAME)
    port.held(marker)
    answer = d.json("stop", NAME, "--force")
    t.ok(answer["stopped"] and answer["forced"], "stop --force of a VM that gets its memory", answer)
    fleet.nothing_left(t, "a", "nothing is left of it", NAME)
    t.equal([c["ref"] for c in d.json("checkpoint", "ls", NAME)["checkpoints"]], [NAME + "@1"], "its checkpoints are, its suspend is not")


def part_ready(port):
    """systemd is told when the socket is there."""
    base = os.path.join(port.host.dir, "second")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(base + ".notify")
        notify.settimeout(20)
        proc = port.host.popen([DAEMON, "--state-dir", base, "--socket", base + ".sock", "--config", port.d.config, "--listen", "none"],
                               env=dict(os.environ, NOTIFY_SOCKET=base + ".notify"))
        word = notify.recv(64)
        port.t.equal((word, os.path.exists(base + ".sock")), (b"READY=1", True), "ready, and the socket is there")
        proc.terminate()
        proc.wait(20)


def main():
    with Tap() as t:
        need(t)
        with Fleet("lbwait", hosts="A", trust=False) as fleet:
            port = Harbour(t, fleet)
            for part in (part_key_file, part_passphrase, part_all, part_end, part_ready):
                begin = time.monotonic()
                try:
                    part(port)
                except (RigError, OSError) as error:
                    t.ok(False, part.__name__ + " ends without an exception", "%s\n%s" % (error, fleet.all_logs()))
                    raise
                t.diag("%s: %.0f s" % (part.__name__, time.monotonic() - begin))


if __name__ == "__main__":
    main()
