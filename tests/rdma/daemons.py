"""Lifeboat on the two hosts of a Bed: daemons that trust each other, one small guest, and those who watch it from outside."""

import json
import os
import re
import signal
import socket
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

from bed import Bed, RigError, die_with_us, wait_for
from rig import BUILD, GUEST

CLI = os.path.join(BUILD, "lifeboat")
DAEMON = os.path.join(BUILD, "lifeboatd")
TINY = os.path.join(GUEST, "tiny.elf")
NAME = "vm"
MODES = {"tcp": ["--transport", "tcp"], "bounce": ["--transport", "rdma"], "zero-copy": ["--transport", "rdma", "--trusted-fabric"]}
# On a busy host these machines converge only now and then, and with the huge pages of anonymous memory, of whose log the kernel knows
# 2 MB only, there is always much to send at the end; how long the guest is paused is not what is tested here.
PATIENT = ["--max-downtime", "5s"]
REGISTERED_MAX = 300 << 20  # by both ends of a migration each
SAMPLE_S = 0.5  # looking costs these machines more than it seems
HOLD_MS = 6000  # time to notice that a session waits
TICK = re.compile(r"^tick=(\d+) nonce=(\w+) pages=(\d+) bad=(\d+) written=(\d+) verified=(\d+) passes=(\d+) checks=(\d+)", re.M)


class CliError(RigError):
    """A lifeboat command failed: .code, .error (the JSON object)."""

    def __init__(self, argv, code, out, err):
        self.code = code
        try:
            self.error = json.loads(out.strip().splitlines()[-1])["error"]
        except (ValueError, KeyError, IndexError, TypeError):
            self.error = {}
        super().__init__("lifeboat %s: %s: %s" % (" ".join(map(str, argv)), "killed after its time" if code is None else "exit %d" % code,
                                                  err.strip() or out.strip()))


class Host:
    """lifeboatd on a node of the bed."""

    def __init__(self, node, other):
        self.node, self.other, self.pid, self.env = node, other, None, {}
        self.state, self.socket, self.log = node.path("state"), node.path("lifeboat.sock"), node.path("lifeboatd.log")
        self.start()

    def start(self, env=None):
        node, self.env = self.node, env or {}
        # Small machines; and on one machine each host has a folder of its own.
        config = "name = %s\nmemory-reserve = 64M\n" % node.role
        if self.other.dir != node.dir:
            config += "path = %s -> %s\n" % (self.other.dir, node.dir)
        node.call("write", node.path("lifeboatd.conf"), config)
        node.call("remove", self.socket)
        self.pid = node.start(DAEMON, "--state-dir", self.state, "--socket", self.socket, "--config", node.path("lifeboatd.conf"),
                              "--listen", "%s:%d" % (node.ip, node.port), "--log-level", "debug", log=self.log, env=env)

        def up():
            if node.call("ended", self.pid) is not None:
                raise RigError("lifeboatd ended: " + (node.call("read", self.log, 2000) or ""))
            return self.cli("ls", "--json", check=False)[0] == 0
        wait_for(up, 60, "lifeboatd on " + node.role, 0.2)

    def restart(self, env=None):
        """With this environment and no other: sessions get it from their daemon."""
        if self.env != (env or {}):
            self.node.call("kill", self.pid)
            self.start(env)

    def cli(self, *argv, check=True, timeout_s=120):
        """(exit status, output, errors)"""
        code, out, err = self.node.run(CLI, "--host", self.socket, *argv, check=False, timeout_s=timeout_s)
        if check and code != 0:
            raise CliError(argv, code, out, err)
        return code, out, err

    def json(self, *argv, **options):
        out = self.cli(*argv, "--json", **options)[1].strip()
        try:
            return json.loads(out)
        except ValueError:
            raise RigError("lifeboat %s --json printed no JSON: %r" % (" ".join(argv), out))

    def vm(self):
        """State of the guest as this daemon says; None when it has no such guest."""
        return {entry["name"]: entry["state"] for entry in self.json("ls")["vms"]}.get(NAME)

    def qemus(self):
        return [int(pid) for pid, argv in self.node.call("processes", "qemu-system").items() if self.node.path(NAME + ".qmp") in str(argv)]

    def sessions(self):
        return [int(pid) for pid, argv in self.node.call("processes", "lifeboatd").items() if "--session" in argv and self._mine(argv)]

    def _mine(self, argv):
        return self.node.dir == self.other.dir or self.node.dir in " ".join(argv)

    def logs(self, size=3000):
        """The end of the daemon's log and of the newest session's, for a failure's message."""
        text = self.node.call("read", self.log, size) or ""
        for path in self.node.call("newest", os.path.join(self.state, "log", "*"), 2):
            text += "\n---- %s\n%s" % (path, self.node.call("read", path, size))
        return "==== %s\n%s" % (self.node.role, text)


class Command:
    """A lifeboat command in the background: done(), wait() -> (exit status, output)."""

    count = 0

    def __init__(self, host, *argv):
        Command.count += 1
        self.host, self.argv, self.out = host, argv, host.node.path("command%d" % Command.count)
        self.pid = host.node.start(CLI, "--host", host.socket, *argv, log=self.out)

    def done(self):
        return self.host.node.call("ended", self.pid) is not None

    def wait(self, timeout_s=120, interval_s=0.1):
        wait_for(self.done, timeout_s, "lifeboat %s at its end" % " ".join(self.argv), interval_s)
        return self.host.node.call("ended", self.pid), self.host.node.call("read", self.out)

    def result(self, **options):
        """Waits for it to end well; what its last line of JSON says."""
        code, out = self.wait(**options)
        if code != 0:
            raise CliError(self.argv, code, out, "")
        return json.loads(out.strip().splitlines()[-1])


def at_point(host, point, ms, env=None):
    """The next session of that host that comes to a point will wait there for so long. Returns what waits until it does."""
    paused = host.node.path("paused")
    host.restart(dict(env or {}, LIFEBOAT_PAUSE_AT="%s:%d" % (point, ms), LIFEBOAT_PAUSE_FILE=paused))
    host.node.call("remove", paused)  # while it is there nobody waits

    def wait(command):
        wait_for(lambda: host.node.call("read", paused) is not None or command.done(), 120, "the point " + point, 0.1)
        return not command.done()
    return wait


class Still:
    """with Still(host): the sessions there stand still, however long that takes."""

    def __init__(self, host):
        self.host, self.pids = host, []

    def _signal(self, number):
        for pid in self.pids:
            self.host.node.call("kill", pid, number)

    def __enter__(self):
        self.pids = self.host.sessions()
        self._signal(signal.SIGSTOP)

    def __exit__(self, *_):
        self._signal(signal.SIGCONT)


class Guest:
    """tests/guest/tiny, wherever it runs. Its line of text tells what it found; here is what it said on either host."""

    def __init__(self, fleet, memory_mb=24, work="rate=1M", backing="memfd"):
        self.fleet, self.memory_mb = fleet, memory_mb
        node = fleet.a.node
        machine = "pc" + (",memory-backend=ram0" if backing == "memfd" else "")
        argv = ["qemu-system-x86_64", "-name", NAME, "-nodefaults", "-display", "none", "-no-reboot", "-machine", machine,
                "-accel", "tcg,tb-size=8", "-cpu", "qemu64", "-m", str(memory_mb), "-kernel", TINY, "-append", work + " tick=250",
                "-qmp", "unix:%s,server=on,wait=off" % node.path(NAME + ".qmp"),
                "-qmp", "unix:%s,server=on,wait=off" % node.path(NAME + ".qmp2"), "-serial", "file:" + node.path(NAME + ".serial")]
        if backing == "memfd":
            argv += ["-object", "memory-backend-memfd,id=ram0,size=%dM,share=on" % memory_mb]
        for host in fleet.hosts:
            host.node.call("remove", host.node.path(NAME + ".serial"))
        fleet.a.cli("run", NAME, "--", *argv)
        self.nonce = wait_for(lambda: self.ticks(fleet.a), 60, "a line of the guest", 0.2)[-1]["nonce"]

    def ticks(self, host):
        """What it said on a host, oldest first."""
        keys = ("tick", "pages", "bad", "written", "verified", "passes", "checks")
        found = []
        for line in TICK.findall(host.node.call("read", host.node.path(NAME + ".serial"), 200000) or ""):
            found.append(dict(zip(keys, [int(v) for v in line[:1] + line[2:]]), nonce=line[1]))
        return found

    def running(self, host):
        """Whether its processor runs there, as QEMU says."""
        try:
            return bool(host.qemus()) and host.node.call("qmp", host.node.path(NAME + ".qmp2"), "query-status")["running"]
        except RigError:
            return False  # it has just ended

    def where(self):
        return [host.node.role for host in self.fleet.hosts if self.running(host)]

    def trouble(self, host):
        """What is wrong with the guest on the host where it should run; [] when nothing. It checks all of its memory first."""
        before = self.ticks(host)
        checks = before[-1]["checks"] if before else 0
        host.node.call("qmp", host.node.path(NAME + ".qmp2"), "inject-nmi")

        def checked():
            lines = self.ticks(host)
            return lines if lines and lines[-1]["checks"] > checks else None
        try:
            lines = wait_for(checked, 60, "its check of all memory", 0.2)
        except RigError as error:
            return ["the guest: %s: %s" % (error, self.ticks(host)[-1:])]
        found = []
        if lines[-1]["bad"]:
            found.append("%d pages are bad: %s" % (lines[-1]["bad"], (host.node.call("read", host.node.path(NAME + ".serial"), 1500))))
        said = [(h.node.role, line) for h in self.fleet.hosts for line in self.ticks(h)]
        if any(line["nonce"] != self.nonce for _, line in said):
            found.append("another guest: nonces %s" % sorted({line["nonce"] for _, line in said}))
        # Its ticks count up by one for ever: one that comes twice is a guest that ran twice.
        numbers = [line["tick"] for _, line in said]
        twice = sorted({n for n in numbers if numbers.count(n) > 1})
        if twice:
            found.append("ticks that it made twice: %s" % twice[:5])
        if self.where() != [host.node.role]:
            found.append("it runs on %s" % self.where())
        return found

    def _of_qemu(self, host, method):
        pids = host.qemus()
        if len(pids) != 1:
            raise RigError("QEMU on %s: %s" % (host.node.role, pids))
        return host.node.call(method, pids[0], self.memory_mb << 20, timeout_s=120)

    def memory_file(self, host):
        """What its memory there is a mapping of; "" when it is anonymous."""
        return self._of_qemu(host, "ram_file")

    def pages(self, host):
        """A digest of each of its pages there, read from outside."""
        text = self._of_qemu(host, "ram")
        return [text[i:i + 16] for i in range(0, len(text), 16)]

    def stop(self):
        for host in self.fleet.hosts:
            if host.vm():
                host.cli("stop", NAME, "--force")
        wait_for(lambda: not any(host.qemus() for host in self.fleet.hosts), 20, "QEMU gone after stop")


class Watch:
    """Samples while something goes on: where the guest runs, how much memory is registered."""

    def __init__(self, guest, source, target):
        self.guest, self.source, self.target = guest, source, target
        self.both, self.samples, self.error = 0, 0, None
        self.registered = {host: 0 for host in (source, target)}  # at most
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        try:
            while not self._stop.wait(SAMPLE_S):
                # In this order: it moves one way, so what runs at the target and then still at the source runs twice.
                if self.guest.running(self.target) and self.guest.running(self.source):
                    self.both += 1
                for host in self.registered:
                    self.registered[host] = max(self.registered[host], host.node.registered_bytes())
                self.samples += 1
        except RigError as error:
            self.error = str(error)

    def stop(self):
        self._stop.set()
        self._thread.join(60)
        return self


class Road:
    """The guest, moved again and again; knows where it is."""

    def __init__(self, t, fleet, guest):
        self.t, self.fleet, self.guest, self.at = t, fleet, guest, fleet.a

    def to(self):
        return self.fleet.other(self.at)

    def settle(self, what, where=None):
        """A test line: the guest runs on one host, there if told, found nothing bad, and nothing is left on the other."""
        guest, fleet = self.guest, self.fleet

        def rest():
            at = guest.where()
            return at if len(at) == 1 and not any(host.sessions() for host in fleet.hosts) else None
        try:
            at = fleet.at(wait_for(rest, 90, "the guest running once and no session", 0.3)[0])
        except RigError as error:
            self.t.ok(False, what, "%s: it runs on %s\n%s" % (error, guest.where(), fleet.logs()))
            raise
        self.at = at
        wrong = guest.trouble(at) + fleet.leftovers(fleet.other(at)) + fleet.rdma_leftovers(at)
        if where and at is not where:
            wrong.append("it is on " + at.node.role)
        return self.t.ok(not wrong, what, "\n".join(map(str, wrong)) + "\n" + fleet.logs())

    def leg(self, mode, *options, what=None, env=None):
        """A migration that must go well; returns its result and what Watch saw. When both copies stand still, as the destination
        has said that it has everything, their memory is read from outside, and must be the same."""
        source, target, what = self.at, self.to(), what or mode
        what += " %s->%s" % (source.node.role, target.node.role)
        wait = at_point(source, "src-prepared", HOLD_MS, env)
        watch = Watch(self.guest, source, target)
        try:
            command = Command(source, "migrate", NAME, target.node.role, *MODES[mode], *PATIENT, *options, "--json")
            if wait(command):
                with Still(source):
                    self._compare(what, source, target)
            result = command.result(timeout_s=180)
        except RigError as error:
            self.t.ok(False, what, "%s\n%s" % (error, self.fleet.logs()))
            raise
        finally:
            watch.stop()
        self.t.ok(result["ok"] and result["final_state"] == "moved", what, result)
        registered = list(watch.registered.values())
        self.t.ok(not watch.both and not watch.error and max(registered) <= REGISTERED_MAX and
                  (min(registered) > 0) == (max(registered) > 0) == (mode != "tcp"),
                  what + ": never two running, registered memory bounded",
                  "%d samples, both %d, registered %s, %s" % (watch.samples, watch.both, registered, watch.error))
        self.settle(what + ": the same guest, whole; nothing left, registered or pinned", target)
        self.t.diag("%s: %.1f s, %.1f MB, registered at most %s MB" %
                    (what, result["total_ms"] / 1e3, result["wire_bytes"] / 1e6, ", ".join("%.1f" % (n / 1e6) for n in registered)))
        return result, watch

    def _compare(self, what, source, target):
        with ThreadPoolExecutor(2) as pool:
            pages, copy = pool.map(self.guest.pages, (source, target))
        still = not self.guest.where()
        different = [i for i, (one, other) in enumerate(zip(pages, copy)) if one != other]
        self.t.ok(still and len(pages) == len(copy) and len(set(pages)) > len(pages) // 2 and not different,
                  "%s: %d pages, %d of them unlike any other, are the same on both hosts" % (what, len(pages), len(set(pages))),
                  "different: %s, guest running: %s" % (different[:20], self.guest.where()))


class Witness:
    """A real etcd on this machine, outside of both hosts: .spec is what --witness takes there."""

    def __init__(self, fleet):
        def free_port():
            with socket.socket() as sock:
                sock.bind(("127.0.0.1", 0))
                return sock.getsockname()[1]
        port, peer_port = free_port(), free_port()
        urls = ["http://127.0.0.1:%d" % number for number in (port, peer_port)]
        with open(os.path.join(fleet.dir, "etcd.log"), "wb") as log:
            self.proc = subprocess.Popen(["etcd", "--name", "w", "--data-dir", os.path.join(fleet.dir, "etcd"), "--log-level", "warn",
                                          "--listen-client-urls", urls[0], "--advertise-client-urls", urls[0],
                                          "--listen-peer-urls", urls[1], "--initial-advertise-peer-urls", urls[1],
                                          "--initial-cluster", "w=" + urls[1]], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                         preexec_fn=die_with_us)
        self.spec = "etcd:http://%s:%d" % ("10.80.0.2" if fleet.virtual else "127.0.0.1", port)

        def up():
            with socket.socket() as sock:
                return sock.connect_ex(("127.0.0.1", port)) == 0
        wait_for(up, 30, "etcd", 0.1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.proc.kill()
        self.proc.wait()


class Fleet(Bed):
    """A bed with Lifeboat on both hosts: fleet.a and fleet.b are Hosts, fleet.hosts both."""

    def __init__(self):
        super().__init__()
        try:
            nodes = self.nodes
            self.a, self.b = self.hosts = [Host(node, other) for node, other in (nodes, nodes[::-1])]
            keys = [host.json("host", "id")["key"] for host in self.hosts]
            for host, other, key in zip(self.hosts, self.hosts[::-1], keys[::-1]):
                host.cli("host", "trust", other.node.role, key, "%s:%d" % (other.node.ip, other.node.port))
            # What there is now is what rdma_leftovers() takes for nothing.
            self.at_rest = {host.node.role: host.node.resources() for host in self.hosts}
        except BaseException:
            self.close()
            raise

    def at(self, role):
        return self.a if role == "a" else self.b

    def other(self, host):
        return self.b if host is self.a else self.a

    def crash(self, host):
        """The host dies, and all that runs on it; from now on there is only the other one."""
        self.hosts.remove(host)
        if self.virtual:
            host.node.crash()
        else:
            for pid in [host.pid] + host.sessions() + host.qemus():
                host.node.call("kill", pid)

    def leftovers(self, host):
        """What a guest that went away has left there: processes, and RDMA resources of anybody; [] when nothing."""
        found = ["QEMU %d" % pid for pid in host.qemus()] + ["session %d" % pid for pid in host.sessions()]
        return found + self.rdma_leftovers(host)

    def rdma_leftovers(self, host):
        node = host.node
        found = ["%d %s" % (n, kind) for kind, n in node.resources().items() if n > self.at_rest[node.role][kind]]
        for pid in [host.pid] + host.qemus():
            pinned = node.call("pinned_kib", pid)
            if pinned:
                found.append("process %d has %d KiB pinned" % (pid, pinned))
        return found

    def logs(self):
        return "\n".join(host.logs() for host in self.hosts)
