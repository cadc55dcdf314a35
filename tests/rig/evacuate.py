"""Hosts full of VMs: a hundred tiny guests (tests/guest/tiny.c) and a few of Linux, what each of them says, where each of them runs.

    Console   what a tiny guest says on its serial line, wherever it is: one file, which every host appends to. Ticks count up by
              one: a number that is missing or comes twice is a guest that ran twice, or was set back.
    Census    which QEMU of which host runs a VM and since when. It is no part of Lifeboat and does not ask it: processes are found
              in /proc, and each tells a monitor of its own, with its time, when its guest stops and runs.
    Beats     how long a guest stood still: datagrams it sends at a fixed pace, with the kernel's time of arrival.
    Evacuation  a running `lifeboat evacuate --json`.
"""

import json
import os
import re
import selectors
import socket
import struct
import sys
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from lifeboat import CLI, Command, Fleet
from rig import CLIENT_IP, GUEST, LAN, RigError, wait_for

TINY = os.path.join(GUEST, "tiny.elf")
SO_TIMESTAMPNS = 35
TICK = re.compile(r"(\w+)=([0-9a-f]+)")


class Console:
    """The lines of one tiny guest; feed() takes in what is new. .problems: what a guest that lives on does not say."""

    def __init__(self, path):
        self.path, self.last, self.ticks, self.problems = path, {}, [], []
        self._file, self._rest, self._lock = None, b"", threading.Lock()

    def feed(self):
        with self._lock:
            if self._file is None:
                try:
                    self._file = open(self.path, "rb", buffering=0)
                except FileNotFoundError:
                    return
            data = self._file.read()
            if not data:
                return
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                self._line(line.decode(errors="replace"))

    def _line(self, line):
        if not line.startswith("tick="):
            self.problems.append(line)
            return
        new, old = dict(TICK.findall(line)), self.last
        nonce = new.pop("nonce", None)
        new = {key: int(value) for key, value in new.items()}
        new["nonce"], new["at"] = nonce, time.time()
        if old and nonce != old["nonce"]:
            self.problems.append("booted again: nonce %s after %s" % (nonce, old["nonce"]))
        elif old and new["tick"] != old["tick"] + 1:
            self.problems.append("tick %d after %d" % (new["tick"], old["tick"]))
        if new["bad"] and not (old and old["bad"]):
            self.problems.append("%d bad pages" % new["bad"])
        self.last = new
        self.ticks.append(new["at"])


class Census:
    """with Census(rig) as census: census.places(name), .overlaps(), .gaps(name, start, end). Times are time.time()."""

    SCAN_S = 0.1

    class Qemu:
        def __init__(self, pid, role, name, sock):
            self.pid, self.role, self.name, self.sock = pid, role, name, sock
            self.runs, self.buffer, self.asked = [], b"", 0  # runs: [start, end or None]

        def running(self):
            return bool(self.runs) and self.runs[-1][1] is None

        def begin(self, when):
            if not self.running():
                self.runs.append([when, None])

        def end(self, when):
            if self.running():
                self.runs[-1][1] = when

    def __init__(self, rig):
        self.roles = {host.inode: role for role, host in rig.hosts.items()}
        self.qemus, self._known, self._lock = [], {}, threading.RLock()
        self._selector, self._stop = selectors.DefaultSelector(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self._stop.set()
        self._thread.join()
        for qemu in self.qemus:
            qemu.sock.close()

    # -- its thread

    def _run(self):
        scanned = 0.0
        while not self._stop.is_set():
            if time.monotonic() - scanned >= self.SCAN_S:
                self._scan()
                scanned = time.monotonic()
            for key, _ in self._selector.select(self.SCAN_S):
                with self._lock:
                    self._read(key.data)

    def _scan(self):
        pids = {int(entry) for entry in os.listdir("/proc") if entry.isdigit()}
        for pid in list(self._known):
            if pid not in pids:
                del self._known[pid]
        for pid in pids - set(self._known):
            self._meet(pid)

    def _meet(self, pid):
        """A process that was not there before: not known until it is clear what it is, as it may still become a QEMU."""
        try:
            role = self.roles.get(os.stat("/proc/%d/ns/net" % pid).st_ino)
            if role is None:
                if time.time() - os.stat("/proc/%d" % pid).st_ctime > 1:
                    self._known[pid] = None
                return
            with open("/proc/%d/cmdline" % pid, "rb") as f:
                argv = [word.decode(errors="replace") for word in f.read().split(b"\0")]
        except OSError:
            return
        if "qemu-system" not in os.path.basename(argv[0]) or "-name" not in argv or "-qmp" not in argv:
            return
        name = argv[argv.index("-name") + 1].split(",")[0]
        path = [argv[i + 1] for i, word in enumerate(argv) if word == "-qmp"][-1][len("unix:"):].split(",")[0]
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(path)
        except OSError:  # it is not that far yet
            sock.close()
            return
        sock.sendall(b'{"execute":"qmp_capabilities"}{"execute":"query-status"}')
        qemu = Census.Qemu(pid, role, name, sock)
        with self._lock:
            self.qemus.append(qemu)
        self._known[pid] = qemu
        self._selector.register(sock, selectors.EVENT_READ, qemu)

    def _read(self, qemu):
        if qemu.sock.fileno() < 0:
            return  # forgotten meanwhile
        try:
            data = qemu.sock.recv(65536)
        except OSError:
            data = b""
        if not data:
            qemu.end(time.time())
            self._selector.unregister(qemu.sock)
            return
        *lines, qemu.buffer = (qemu.buffer + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            stamp = message.get("timestamp", {})
            when = stamp.get("seconds", 0) + stamp.get("microseconds", 0) / 1e6
            if message.get("event") == "RESUME":
                qemu.begin(when)
            elif message.get("event") in ("STOP", "SHUTDOWN"):
                qemu.end(when)
            elif isinstance(message.get("return"), dict) and message["return"].get("running"):
                qemu.begin(time.time())

    # -- what it knows

    def forget(self):
        """Everything so far, also what runs now."""
        with self._lock:
            for qemu in self.qemus:
                if qemu.sock.fileno() in self._selector.get_map():
                    self._selector.unregister(qemu.sock)
                qemu.sock.close()
            self.qemus.clear()

    def of(self, name):
        with self._lock:
            return [qemu for qemu in self.qemus if qemu.name == name]

    def places(self, name):
        """Hosts on which it runs now."""
        return [qemu.role for qemu in self.of(name) if qemu.running()]

    def tell(self, name, command):
        """A QMP command to the one that runs it; its answer is not waited for."""
        for qemu in self.of(name):
            if qemu.running():
                try:
                    qemu.sock.sendall(json.dumps({"execute": command}).encode())
                except OSError:
                    pass  # it ends just now

    def overlaps(self):
        """["NAME ran on a and b for 3.1 ms"]: every time at which two QEMUs ran the same VM."""
        found = []
        with self._lock:
            for i, one in enumerate(self.qemus):
                for other in self.qemus[i + 1:]:
                    if one.name == other.name:
                        found += [(one, other, start, end) for start, end in _common(one.runs, other.runs)]
        return ["%s ran on %s (pid %d) and %s (pid %d) for %.1f ms" % (a.name, a.role, a.pid, b.role, b.pid, (end - start) * 1e3)
                for a, b, start, end in found]

    def gaps(self, name, since=0.0, least_s=0.0):
        """[(start, end)]: when it ran nowhere, between its first run and its last."""
        now = time.time()
        with self._lock:
            runs = sorted((start, now if end is None else end) for qemu in self.qemus if qemu.name == name
                          for start, end in qemu.runs)
        gaps, reached = [], None
        for start, end in runs:
            if reached is not None and start - reached > least_s and start > since:
                gaps.append((reached, start))
            reached = end if reached is None else max(reached, end)
        return gaps

    def moves(self, name):
        """[(from, to, seconds it ran nowhere)], in order."""
        now = time.time()
        with self._lock:
            runs = sorted((start, now if end is None else end, qemu.role) for qemu in self.qemus if qemu.name == name
                          for start, end in qemu.runs)
        return [(a[2], b[2], b[0] - a[1]) for a, b in zip(runs, runs[1:]) if a[2] != b[2]]


def _common(a, b):
    now = time.time()
    for start, end in a:
        for other_start, other_end in b:
            first, last = max(start, other_start), min(end or now, other_end or now)
            if first < last:
                yield first, last


class Beats:
    """Datagrams of guests with the word "beat", each to a port of its own: .port(name), .longest_gap_ms(name, start, end)."""

    FIRST_PORT = 20000

    def __init__(self, namespace):
        self.namespace, self.arrivals, self._ports, self._stop = namespace, {}, {}, threading.Event()
        self._selector = selectors.DefaultSelector()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def port(self, name):
        if name not in self._ports:
            self._ports[name] = self.FIRST_PORT + len(self._ports)
            sock = self.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
            sock.bind(("0.0.0.0", self._ports[name]))
            sock.setblocking(False)
            self.arrivals[name] = []
            self._selector.register(sock, selectors.EVENT_READ, self.arrivals[name])
        return self._ports[name]

    def _run(self):
        while not self._stop.is_set():
            for key, _ in self._selector.select(0.2):
                while True:
                    try:
                        _, extra, _, _ = key.fileobj.recvmsg(64, 64)
                    except BlockingIOError:
                        break
                    seconds, nanoseconds = struct.unpack("qq", extra[0][2][:16])
                    key.data.append(seconds + nanoseconds / 1e9)

    def longest_gap_ms(self, name, start, end):
        """Between two datagrams that arrived from start to end; a guest that has gone still counts up to end."""
        times = [when for when in list(self.arrivals[name]) if start <= when <= end]
        return max((b - a) * 1e3 for a, b in zip([start] + times, times + [end]))

    def close(self):
        self._stop.set()
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()


class Evacuation(Command):
    """`lifeboat evacuate --yes --json` (or what else streams lines of JSON); .events grows while it runs."""

    def __init__(self, daemon, *argv):
        super().__init__(daemon, *argv, "--json")
        self.events, self.text = [], []
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._read, self._complaints)]
        for thread in self._threads:
            thread.start()

    def _read(self):
        for line in self.proc.stdout:
            try:
                self.events.append(json.loads(line))
            except ValueError:
                self.text.append(line)

    def _complaints(self):
        for line in self.proc.stderr:
            self.text.append(line)

    def last(self, kind="evacuation"):
        return next((event for event in reversed(self.events) if event.get("event") == kind), {})

    def plan(self):
        return self.last("plan")

    def done_vms(self):
        """How many VMs have left, as far as it said."""
        return self.last().get("done", 0)

    def story(self):
        """What became of each VM, for a failure's message."""
        lines, was = [], {}
        for event in self.events:
            for item in event.get("items", ()):
                now = "%s to %s: %s (try %d) %s" % (item["vm"], item["to"], item["state"], item["tries"], item["message"])
                if was.get(item["vm"]) != now:
                    was[item["vm"]] = now
                    lines.append("%6.1f %s %s" % (event["elapsed_s"], event["phase"], now))
        return "\n".join(lines + self.text + [str({key: value for key, value in self.last().items() if key != "items"})])

    def wait(self, timeout_s=120):
        """(exit code, its last event); the command's own complaint is in .text."""
        try:
            self.proc.wait(timeout_s)
        except Exception:
            raise RigError("not in %g s: lifeboat %s: %s" % (timeout_s, " ".join(self.argv), self.last()))
        for thread in self._threads:
            thread.join(5)
        return self.proc.returncode, self.last()


class Harbour(Fleet):
    """A fleet of hosts with many VMs: run_tiny(), run_linux(), and what is asked of all of them at the end."""

    def __init__(self, prefix="lbhar", hosts="ABC", linux=0, **options):
        super().__init__(prefix, hosts, taps=linux, **options)
        self.consoles, self.linux, self._reading = {}, {}, threading.Event()
        self.console_dir = os.path.join(self.dir, "console")
        os.mkdir(self.console_dir)
        self.census, self.beats = Census(self), Beats(self.client)
        self._reader = threading.Thread(target=self._read_consoles, daemon=True)
        self._reader.start()

    def close(self):
        if not self._closed and hasattr(self, "census"):
            self._reading.set()
            self._reader.join()
            self.census.close()
            self.beats.close()
        super().close()

    def _read_consoles(self):
        while not self._reading.wait(0.05):
            for console in list(self.consoles.values()):
                console.feed()

    # -- guests

    def tiny_argv(self, host, name, words="", memory_mb=16, machine="pc-q35-7.2", qemu="qemu-system-x86_64", accel="tcg,tb-size=1"):
        base = os.path.join(host.dir, name)
        argv = [qemu, "-name", name, "-nodefaults", "-display", "none", "-machine", machine, "-accel", accel, "-m", str(memory_mb),
                "-kernel", TINY, "-append", words, "-qmp", "unix:%s.qmp,server=on,wait=off" % base,
                "-chardev", "file,id=com1,append=on,path=" + os.path.join(self.console_dir, name), "-serial", "chardev:com1"]
        if "beat" in words.split():
            argv += ["-serial", "udp:%s:%d" % (CLIENT_IP, self.beats.port(name))]
        return argv

    def watch(self, name):
        """From now on what a tiny guest of this name says is read."""
        self.consoles[name] = Console(os.path.join(self.console_dir, name))

    def run_tiny(self, role, name, words="", **options):
        """A tiny guest through `lifeboat run`."""
        self.watch(name)
        self.daemons[role].cli("run", name, "--", *self.tiny_argv(self.hosts[role], name, words, **options))
        return name

    def run_linux(self, role, name, number, work, memory_mb=96, disk_mb=0):
        """A Linux guest with tap NUMBER and an address of its own; it has stamped its memory when wait_all() returns."""
        disk = self.make_disk(name + ".img", disk_mb) if disk_mb else None
        ip = "%s.%d" % (LAN, 10 + number)
        self.run_vm(role, name, memory_mb=memory_mb, work=work, disk=disk, tap="tap%d" % number, net=ip + "/24",
                    mac="52:54:00:77:01:%02x" % (16 + number), accel="tcg,thread=multi,tb-size=16", small=True)
        self.linux[name] = {"ip": ip, "nonce": None, "disk": bool(disk)}
        return name

    def names(self):
        return sorted(self.consoles) + sorted(self.linux)

    def wait_all(self, timeout_s=120):
        """Waits until every guest is up."""
        for name, console in self.consoles.items():
            wait_for(lambda: console.last.get("tick", 0) > 0, timeout_s, "the first ticks of %s" % name, 0.05)
        for name, guest in self.linux.items():
            guest["nonce"] = self.wait_guest(guest["ip"], timeout_s)["nonce"]

    def end_all(self):
        """Every VM ends, wherever it is, in whatever state; their names are free."""
        for role, daemon in self.daemons.items():
            for name, entry in daemon.vms().items():
                if entry["state"] == "suspended":
                    daemon.cli("checkpoint", "rm", "--yes", "--force", name + "@suspend")
                else:
                    daemon.cli("stop", name, "--force")
        try:
            wait_for(lambda: not any(self.qemus().values()), 20, "QEMU gone", 0.1)
        except RigError as error:
            raise RigError("%s: %s; known: %s\n%s" % (error, self.qemu_lines(), {r: d.vms() for r, d in self.daemons.items()},
                                                     self.all_logs()))
        self.forget_all()

    def qemu_lines(self):
        """{role: [(pid, its arguments)]} of what runs, for a failure's message."""
        found = {}
        for role, pids in self.qemus().items():
            for pid in pids:
                try:
                    with open("/proc/%d/cmdline" % pid, "rb") as f:
                        found.setdefault(role, []).append((pid, f.read().replace(b"\0", b" ").decode(errors="replace")))
                except OSError:
                    pass  # gone by now
        return found

    def forget_all(self):
        """What guests said and where they ran, so far."""
        for console in self.consoles.values():
            os.unlink(console.path)
        self.consoles.clear()
        self.linux.clear()
        self.census.forget()

    # -- what is asked of all of them

    def misplaced(self, places=None, timeout_s=10):
        """What is wrong with where VMs run, [] when each runs exactly once, never ran twice, and the daemons say the same;
        places: {role} where they may be. Waits for it."""
        wrong = []

        def right():
            known = {}
            for role, daemon in self.daemons.items():
                for name, entry in daemon.vms().items():
                    if entry["state"] == "running":
                        known.setdefault(name, []).append(role)
            at = {name: self.census.places(name) for name in self.names()}
            wrong[:] = ["%s runs on %s, known to run on %s" % (name, at[name], known.get(name, [])) for name in at
                        if len(at[name]) != 1 or known.get(name) != at[name] or (places and at[name][0] not in places)]
            return not wrong
        try:
            wait_for(right, timeout_s, "", 0.2)
        except RigError:
            pass
        return wrong + self.census.overlaps()

    def damaged(self, timeout_s=60):
        """What is wrong with the guests, [] when each is the one that was started, has checked all of its memory now and found
        nothing."""
        wrong, asked = [], {}
        for name, console in self.consoles.items():
            asked[name] = console.last.get("checks", 0)
            self.census.tell(name, "inject-nmi")
        for name, guest in self.linux.items():
            try:
                status = self.guest_status(guest["ip"], verify_all=True)
                bad = {key: status[key] for key in ("bad_pages", "disk_bad", "disk_errors", "clock_steps") if status.get(key)}
                if bad or status["nonce"] != guest["nonce"] or (guest["disk"] and not status["disk_verified"]):
                    wrong.append("%s: %s nonce %s want %s" % (name, bad, status["nonce"], guest["nonce"]))
            except (OSError, RigError, ValueError) as error:
                wrong.append("%s does not answer: %s" % (name, error))
        end = time.monotonic() + timeout_s
        for name, console in self.consoles.items():
            try:
                wait_for(lambda: console.last.get("checks", 0) > asked[name], max(0.1, end - time.monotonic()), "", 0.02)
            except RigError:
                wrong.append("%s does not check itself; its last line: %s" % (name, console.last))
            wrong += ["%s: %s" % (name, problem) for problem in console.problems]
        return wrong

    def once(self, t, what, places=None):
        """A test line: misplaced()."""
        wrong = self.misplaced(places)
        return t.ok(not wrong, what, "\n".join(wrong[:20]))

    def clean_all(self, t, what):
        """A test line: damaged()."""
        wrong = self.damaged()
        return t.ok(not wrong, what, "\n".join(wrong[:20]))
