#!/usr/bin/python3
"""check.py QEMU GUEST_DIR: does the QEMU that build.sh made work on this host? TAP.

Boots the test guest under two machine types and as an unprivileged user inside QEMU's own sandbox, asks it over QMP,
and looks at how the process shows in /proc, because Lifeboat finds out from there what it has adopted.
"""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

BOOT_S = 120
count = 0
failed = 0


def ok(good, name, why=""):
    global count, failed
    count += 1
    failed += not good
    print(f"{'ok' if good else 'not ok'} {count} - {name}", flush=True)
    if not good and why:
        print("\n".join("# " + line for line in str(why).splitlines()), flush=True)
    return good


class Qmp:
    def __init__(self, path):
        deadline = time.monotonic() + 20
        while True:
            self.sock = socket.socket(socket.AF_UNIX)
            try:
                self.sock.connect(path)
                break
            except OSError:
                self.sock.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        self.sock.settimeout(20)
        self.file = self.sock.makefile("r")
        self.greeting = json.loads(self.file.readline())
        self.cmd("qmp_capabilities")

    def cmd(self, name, **args):
        self.sock.sendall(json.dumps({"execute": name, "arguments": args}).encode())
        while True:
            reply = json.loads(self.file.readline())
            if "error" in reply:
                raise RuntimeError(f"{name}: {reply['error']['desc']}")
            if "return" in reply:
                return reply["return"]

    def hmp(self, line):
        return self.cmd("human-monitor-command", **{"command-line": line})


def boot(qemu, guest, label, machine, user=None):
    folder = tempfile.mkdtemp(prefix="lb-trixie.")
    os.chmod(folder, 0o777)
    console = os.path.join(folder, "console")
    argv = [qemu, "-accel", "tcg", "-machine", machine, "-cpu", "max", "-m", "256", "-display", "none", "-nodefaults",
            "-serial", f"file:{console}", "-qmp", f"unix:{folder}/qmp,server=on,wait=off",
            "-device", "virtio-net-pci,netdev=n0", "-netdev", "user,id=n0", "-sandbox", "on",
            "-kernel", f"{guest}/vmlinuz", "-initrd", f"{guest}/initrd.img",
            "-append", "console=ttyS0 quiet lb.dirty=4:16"]
    log = open(os.path.join(folder, "log"), "w+")
    extra = {"user": user, "group": user, "extra_groups": []} if user else {}
    started = time.monotonic()
    vm = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **extra)
    try:
        try:
            qmp = Qmp(f"{folder}/qmp")
        except (OSError, ValueError) as e:
            log.seek(0)
            ok(False, f"{label}: QEMU starts", f"{e}\n{log.read()}")
            return
        version = qmp.greeting["QMP"]["version"]["qemu"]
        ok(version["major"] >= 10, f"{label}: answers QMP as version {version['major']}.{version['minor']}.{version['micro']}")
        text = ""
        while '"ready":true' not in text.replace(" ", "") and time.monotonic() < started + BOOT_S and vm.poll() is None:
            time.sleep(0.1)
            if os.path.exists(console):
                text = open(console, errors="replace").read()
        good = ok('"ready":true' in text.replace(" ", ""), f"{label}: the guest boots and stamps its memory", text[-800:])
        if good:
            print(f"# {label}: ready after {time.monotonic() - started:.1f} s")
        blocks = qmp.hmp("info ramblock")
        ram = [line for line in blocks.splitlines() if re.match(r"\s*(pc\.ram|mem)\b", line)]
        where = re.search(r"0x[0-9a-f]{8,}\s+r[wo]", ram[0]) if ram else None
        ok(where is not None, f"{label}: info ramblock shows addresses", blocks)
        if where:
            address = int(where.group(0).split()[0], 16)
            maps = [line.split()[0].split("-") for line in open(f"/proc/{vm.pid}/maps")]
            ok(any(int(a, 16) <= address < int(b, 16) for a, b in maps), f"{label}: and the address is one of the process")
        exe = os.readlink(f"/proc/{vm.pid}/exe")
        ok(exe == os.path.realpath(qemu), f"{label}: /proc/PID/exe is the emulator", exe)
        cmdline = open(f"/proc/{vm.pid}/cmdline", "rb").read().rstrip(b"\0").decode().split("\0")
        ok(cmdline == argv, f"{label}: /proc/PID/cmdline is what was started", cmdline)
        foreign = sorted({line.split(None, 5)[5].strip() for line in open(f"/proc/{vm.pid}/maps") if ".so" in line
                          and os.path.dirname(os.path.dirname(exe)) + "/" not in line})
        ok(not foreign, f"{label}: uses no library of this host", "\n".join(foreign))
        status = dict(line.split(":\t", 1) for line in open(f"/proc/{vm.pid}/status") if ":\t" in line)
        ok(status["Seccomp"].strip() == "2", f"{label}: its sandbox is on")
        if user:
            ok(set(status["Uid"].split()) != {"0"}, f"{label}: runs unprivileged")
        qmp.cmd("stop")
        ok(qmp.cmd("query-status")["status"] == "paused", f"{label}: stops")
        try:
            qmp.cmd("quit")
        except (OSError, ValueError):
            pass
        ok(vm.wait(20) == 0, f"{label}: quits cleanly")
    finally:
        if vm.poll() is None:
            vm.send_signal(signal.SIGKILL)
            vm.wait()
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def main():
    if len(sys.argv) != 3:
        sys.exit("usage: check.py QEMU GUEST_DIR")
    qemu, guest = os.path.abspath(sys.argv[1]), os.path.abspath(sys.argv[2])
    version = subprocess.run([qemu, "--version"], capture_output=True, text=True, check=False)
    ok(version.returncode == 0 and "version 10." in version.stdout, "--version", version.stdout + version.stderr)
    machines = subprocess.run([qemu, "-machine", "help"], capture_output=True, text=True, check=False)
    ok(machines.returncode == 0 and "pc-i440fx-7.2 " in machines.stdout and "pc-q35-7.2 " in machines.stdout,
       "-machine help knows the machines of Debian 12's QEMU", machines.stdout + machines.stderr)
    boot(qemu, guest, "pc-i440fx-7.2", "pc-i440fx-7.2")
    boot(qemu, guest, "q35", "q35")
    global count
    if os.geteuid() != 0:
        count += 1
        print(f"ok {count} - unprivileged # SKIP not root: every machine above already ran unprivileged")
    elif subprocess.run(["test", "-x", qemu, "-a", "-r", f"{guest}/initrd.img"], user=65534, group=65534,
                        extra_groups=[], check=False).returncode != 0:
        count += 1
        print(f"ok {count} - unprivileged # SKIP the build folder is not readable by other users")
    else:
        boot(qemu, guest, "unprivileged", "pc-i440fx-7.2", 65534)
    print(f"1..{count}")
    sys.exit(1 if failed else 0)


main()
