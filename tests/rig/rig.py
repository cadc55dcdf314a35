"""Hosts as network namespaces, guests under QEMU, and observers outside: the stage of the e2e tests, the demo and the benchmarks.

    client 10.77.0.100 --+                                  +-- 10.78.0.1  A   (shaped by tbf, Rig.shape())
                         |  lan0 (bridge)    mig0 (bridge)  |
    A  10.77.0.1  br0 ---+   both in the                    +-- 10.78.0.2  B
    B  10.77.0.2  br0 ---+   namespace "lan"                +-- 10.78.0.3  C
         |                                                  +-- 10.78.0.201 ...  witness hosts (Rig.add_witness(), etcd.py)
         tap0 ... (persistent, the same names in every host) -- guest 10.77.0.10, reachable wherever it runs

Guest and client traffic goes over lan0, the migration over mig0, so that shaping one leaves the other alone. Hosts die
(kill_host, revive_host), stand still (stop_host, continue_host) and lose sight of one another (partition, heal). Every name of a
namespace is PREFIX + pid + "-" + role. Leaving the context (or the process, by exit, exception or SIGTERM) kills every
process in the namespaces, removes them and the folder; what a killed run left behind is removed by the next with its prefix.

Needs root and iproute2; Python's standard library only. Units are in the names; times are seconds of time.time().
"""

import atexit
import ctypes
import glob
import json
import os
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback

CLONE_NEWNET = 0x40000000
BLOCK_PREF = 77  # of our tc filters
LAN = "10.77.0"
MIG = "10.78.0"
GUEST_IP = LAN + ".10"
GUEST_MAC = "52:54:00:77:01:10"
CLIENT_IP = LAN + ".100"
LONE_IP = LAN + ".200"  # of the host, on taps that are on no bridge
UDP_PORT = 9000
STILL_MS = 250   # a stream that reports every 100 ms and does not is still by then
REPO = os.path.realpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
MEMORY = "/dev/shm"
BUILD = os.environ.get("LB_BUILD", os.path.join(REPO, "build"))
TOOLS = os.environ.get("LB_TOOLS", os.path.join(BUILD, "tests", "tools"))
GUEST = os.environ.get("LB_GUEST", os.path.join(BUILD, "guest"))

_libc = ctypes.CDLL(None, use_errno=True)


class RigError(Exception):
    pass


def sh(*argv, check=True):
    """Runs a command in the machine's own namespace and returns its standard output."""
    done = subprocess.run([str(a) for a in argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if check and done.returncode != 0:
        raise RigError("%s: %s" % (" ".join(map(str, argv)), done.stderr.strip()))
    return done.stdout


def wait_for(condition, timeout_s, what, interval_s=0.02):
    """Polls condition() until it is true; returns its value."""
    end = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise RigError("not in %g s: %s" % (timeout_s, what))
        time.sleep(interval_s)


def cpu_seconds(pid):
    """utime + stime of a whole process, all its threads."""
    with open("/proc/%d/stat" % pid) as f:
        fields = f.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ---- QMP ---------------------------------------------------------------------------------------------------------------


class QmpError(RigError):
    pass


class Qmp:
    """A client of one QMP socket. Events are kept in .events as (arrival time, event), oldest first."""

    def __init__(self, path, timeout_s=20, process=None):
        self.path, self.events, self._buffer = path, [], b""

        def connect():
            if process is not None and process.poll() is not None:
                raise RigError("QEMU ended with %s before its QMP socket %s answered" % (process.returncode, path))
            self.sock = socket.socket(socket.AF_UNIX)
            try:
                self.sock.connect(path)
                return True
            except OSError:
                self.sock.close()
                return False

        wait_for(connect, timeout_s, "connection to " + path, 0.01)
        self.sock.settimeout(timeout_s)
        self.greeting = self._read()
        self.cmd("qmp_capabilities")

    def _read(self):
        while b"\n" not in self._buffer:
            try:
                data = self.sock.recv(65536)
            except OSError as error:
                raise QmpError("%s: no answer: %s" % (self.path, error))
            if not data:
                raise QmpError("%s: closed by QEMU" % self.path)
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        return json.loads(line)

    def cmd(self, name, **arguments):
        """Runs a command and returns what it returns. Underscores in argument names become dashes."""
        message = {"execute": name}
        if arguments:
            message["arguments"] = {key.replace("_", "-"): value for key, value in arguments.items()}
        try:
            self.sock.sendall(json.dumps(message).encode())
        except OSError as error:
            raise QmpError("%s: %s: %s" % (self.path, name, error))
        while True:
            answer = self._read()
            if "event" in answer:
                self.events.append((time.time(), answer))
            elif "error" in answer:
                raise QmpError("%s: %s" % (name, answer["error"]["desc"]))
            else:
                return answer["return"]

    def hmp(self, line):
        return self.cmd("human-monitor-command", command_line=line)

    def poll_events(self, timeout_s=0.0):
        """Takes in what has arrived, waiting at most timeout_s for something to arrive."""
        while b"\n" in self._buffer or select.select([self.sock], [], [], timeout_s)[0]:
            self.events.append((time.time(), self._read()))
            timeout_s = 0.0

    def wait_event(self, match, timeout_s=60):
        """Waits until match(event) is true for an event, past or to come; returns (arrival time, event) of the first."""
        end = time.monotonic() + timeout_s
        while True:
            for when, event in self.events:
                if match(event):
                    return when, event
            left = end - time.monotonic()
            if left <= 0:
                raise QmpError("%s: event not in %g s" % (self.path, timeout_s))
            self.poll_events(left)

    def close(self):
        self.sock.close()


# ---- hosts -------------------------------------------------------------------------------------------------------------


class Namespace:
    """A network namespace; processes in it are started with run() and popen()."""

    def __init__(self, rig, role):
        self.rig, self.role = rig, role
        self.name = rig.name + "-" + role
        sh("ip", "netns", "add", self.name)
        self.path = "/run/netns/" + self.name
        self.inode = os.stat(self.path).st_ino
        self.dir = os.path.join(rig.dir, role)
        os.mkdir(self.dir, 0o755)
        self.cables = {}    # {device: (port of the lan, MAC)}, by Rig.plug()
        self.bridge_mac = None
        self.ip("link", "set", "lo", "up")

    def ip(self, *argv):
        return sh("ip", "-n", self.name, *argv)

    def argv(self, argv):
        return ["ip", "netns", "exec", self.name] + [str(a) for a in argv]

    def popen(self, argv, **options):
        """subprocess.Popen inside; the pid is that of the program itself, as `ip netns exec` turns into it."""
        options.setdefault("stdin", subprocess.DEVNULL)
        return subprocess.Popen(self.argv(argv), **options)

    def run(self, argv, check=True, timeout_s=60, **options):
        """subprocess.run inside, with output captured as text; RigError when it fails and check is set."""
        options.setdefault("stdin", subprocess.DEVNULL)
        done = subprocess.run(self.argv(argv), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                              timeout=timeout_s, **options)
        if check and done.returncode != 0:
            raise RigError("%s: %s: exit %d: %s" % (self.role, " ".join(map(str, argv)), done.returncode,
                                                    (done.stderr or done.stdout).strip()))
        return done

    def socket(self, family=socket.AF_INET, kind=socket.SOCK_STREAM, protocol=0):
        """A socket that lives in this namespace, for use by this process."""
        with open("/proc/thread-self/ns/net") as home, open(self.path) as there:
            if _libc.setns(there.fileno(), CLONE_NEWNET) != 0:
                raise RigError("setns: " + os.strerror(ctypes.get_errno()))
            try:
                return socket.socket(family, kind, protocol)
            finally:
                if _libc.setns(home.fileno(), CLONE_NEWNET) != 0:
                    os.abort()  # every later step would act in the wrong namespace

    def pids(self):
        """Every process in this namespace."""
        found = []
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                try:
                    if os.stat("/proc/%s/ns/net" % entry).st_ino == self.inode:
                        found.append(int(entry))
                except OSError:
                    pass
        return found

    def crash(self, timeout_s=10):
        """The host dies: SIGKILL to every process in it, until none is left."""
        end = time.monotonic() + timeout_s
        while True:
            pids = [pid for pid in self.pids() if not _is_zombie(pid)]
            if not pids:
                return
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            if time.monotonic() > end:
                raise RigError("%s: still running after SIGKILL: %s" % (self.role, pids))
            time.sleep(0.01)

    def signal(self, number):
        """One signal to every process in it that is there now; returns their pids."""
        pids = [pid for pid in self.pids() if not _is_zombie(pid)]
        for pid in pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass
        return pids

    def stop(self, timeout_s=5):
        """SIGSTOP to every process in it. Returns when all threads stand still, those that were made meanwhile, too."""
        end = time.monotonic() + timeout_s
        while self.signal(signal.SIGSTOP) and not all(_is_stopped(pid) for pid in self.pids()):
            if time.monotonic() > end:
                raise RigError("%s: goes on after SIGSTOP" % self.role)
            time.sleep(0.001)

    def cont(self):
        """SIGCONT to every process in it."""
        self.signal(signal.SIGCONT)

    def unplug(self, on=True):
        """Pulls its cables out of the switches (or plugs them in): nothing gets in or out, not even a last RST."""
        for port, _ in self.cables.values():
            self.rig.lan.ip("link", "set", port, "down" if on else "up")

    def macs(self):
        """Of the host itself: frames of its guests have other sources."""
        return [mac for _, mac in self.cables.values()] + ([self.bridge_mac] if self.bridge_mac else [])

    def block_commands(self, others):
        """Shell lines after which frames from those namespaces, and from no others, are dropped as they arrive here."""
        macs, lines = sorted({mac for other in others for mac in other.macs()}), []
        for device in self.cables:
            tc = "tc -n %s %%s dev %s ingress pref %d" % (self.name, device, BLOCK_PREF)
            if macs:
                # Replaced in one step, so that what stays blocked is never let through.
                lines.append(tc % "filter replace" + " protocol all handle 1 bpf direct-action bytecode '%s'" % _drop_from(macs))
            else:
                lines.append(tc % "filter del")
        return lines

    def link_bytes(self, device):
        """(sent, received) bytes of an interface, as its counters have them."""
        stats = json.loads(self.ip("-j", "-s", "link", "show", "dev", device))[0]["stats64"]
        return stats["tx"]["bytes"], stats["rx"]["bytes"]


def _drop_from(macs):
    """Classic BPF for tc: drops frames with these source addresses. The only classifier that every kernel here has."""
    code, n = [], len(macs)
    for i, mac in enumerate(macs):
        value = int(mac.replace(":", ""), 16)
        code += [(0x28, 0, 0, 6), (0x15, 0, 2, value >> 32), (0x20, 0, 0, 8),
                 (0x15, 4 * (n - 1 - i) + 1, 0, value & 0xffffffff)]
    code += [(0x06, 0, 0, 0xffffffff), (0x06, 0, 0, 2)]  # TC_ACT_UNSPEC, TC_ACT_SHOT
    return "%d,%s," % (len(code), ",".join("%d %d %d %d" % line for line in code))


def _is_stopped(pid):
    """All its threads; a process that has ended counts, too."""
    try:
        for tid in os.listdir("/proc/%d/task" % pid):
            with open("/proc/%d/task/%s/stat" % (pid, tid)) as f:
                if f.read().rsplit(")", 1)[1].split()[0] not in "TtZX":
                    return False
    except OSError:
        return _is_zombie(pid)
    return True


def _is_zombie(pid):
    try:
        with open("/proc/%d/stat" % pid) as f:
            return f.read().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


class Host(Namespace):
    """A hypervisor host: br0 with the host's address and the guests' taps, mig0 for migrations."""

    def __init__(self, rig, role, number, taps):
        super().__init__(rig, role)
        self.number = number
        self.lan_ip = "%s.%d" % (LAN, number)
        self.mig_ip = "%s.%d" % (MIG, number)
        rig.plug(self, "eth0", "lan0")
        rig.plug(self, "mig0", "mig0")
        # A bridge takes the lowest address of its ports unless told: it would change as taps come and go.
        self.bridge_mac = "52:54:00:77:00:%02x" % number
        self.ip("link", "add", "br0", "address", self.bridge_mac, "type", "bridge", "stp_state", "0",
                "forward_delay", "0", "mcast_snooping", "0")
        self.ip("link", "set", "eth0", "master", "br0")
        for device in ("eth0", "br0", "mig0"):
            self.ip("link", "set", device, "up")
        self.ip("addr", "add", self.lan_ip + "/24", "dev", "br0")
        self.ip("addr", "add", self.mig_ip + "/24", "dev", "mig0")
        self.taps, self.lone_taps = [], []
        for i in range(taps):
            self.add_tap("tap%d" % i)

    def add_tap(self, name, user=None):
        """A persistent tap on br0; user may open it without privileges."""
        self.ip("tuntap", "add", "dev", name, "mode", "tap", *(["user", user] if user else []))
        self.ip("link", "set", name, "master", "br0", "up")
        self.taps.append(name)

    def add_lone_tap(self, name):
        """A persistent tap that is a network of its own: guests with the same address do not meet. Returns what makes a
        socket to its guest."""
        self.ip("tuntap", "add", "dev", name, "mode", "tap")
        self.ip("link", "set", name, "up")
        self.ip("addr", "add", LONE_IP + "/32", "dev", name)
        self.ip("route", "add", GUEST_IP + "/32", "dev", name, "src", LONE_IP, "metric", len(self.lone_taps) + 1)
        self.lone_taps.append(name)

        def connected():
            sock = self.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, name.encode())
            return sock
        return connected

    def forget(self):
        """What a host does not remember when it has died: interfaces that its processes made, filters. The taps are new."""
        for link in json.loads(self.ip("-j", "-d", "link", "show")):
            if link.get("linkinfo", {}).get("info_kind") == "tun":
                sh("ip", "-n", self.name, "link", "del", link["ifname"], check=False)  # it may go with its process just now
        taps, self.taps = self.taps, []
        for tap in taps:
            self.add_tap(tap)

    def partition(self, on=True, device="mig0"):
        """Cuts (or mends) a link of this host: "mig0" or "eth0"."""
        self.ip("link", "set", device, "down" if on else "up")


class WitnessHost(Namespace):
    """A host with nothing but the migration network; .proc is what runs there."""

    def __init__(self, rig, role, number):
        super().__init__(rig, role)
        self.mig_ip, self.proc = "%s.%d" % (MIG, number), None
        rig.plug(self, "mig0", "mig0")
        self.ip("link", "set", "mig0", "up")
        self.ip("addr", "add", self.mig_ip + "/24", "dev", "mig0")


class Vm:
    """A QEMU started by hand. .proc, .pid, .qmp (a second monitor, for whoever adopts the VM, is at .spare_qmp_path)."""

    def __init__(self, host, name, argv, proc, qmp_path, spare_qmp_path, serial_path, log_path):
        self.host, self.name, self.argv, self.proc, self.pid = host, name, argv, proc, proc.pid
        self.qmp_path, self.spare_qmp_path = qmp_path, spare_qmp_path
        self.serial_path, self.log_path = serial_path, log_path
        try:
            self.qmp = Qmp(qmp_path, process=proc)
        except RigError as error:
            raise RigError("%s: %s" % (error, read_tail(log_path)))

    def condition(self):
        """One line on what has become of it, for a failure's message."""
        if self.proc.poll() is not None:
            return "QEMU ended with %s: %s" % (self.proc.returncode, read_tail(self.log_path, 400))
        try:
            return "QEMU says %s" % self.qmp.cmd("query-status")["status"]
        except QmpError as error:
            return str(error)

    def running(self):
        return self.proc.poll() is None and self.qmp.cmd("query-status")["status"] == "running"

    def kill(self):
        if self.proc.poll() is None:
            self.proc.kill()
        self.proc.wait()
        self.qmp.close()


def read_tail(path, size=2000):
    try:
        with open(path, errors="replace") as f:
            return f.read()[-size:].strip()
    except OSError:
        return ""


# ---- observers ---------------------------------------------------------------------------------------------------------


class Observer:
    """A tool that streams lines of JSON and ends with a report; .lines grows while it runs."""

    def __init__(self, namespace, argv):
        if not os.access(argv[0], os.X_OK):
            raise RigError("%s is missing: build it first (the line is at the head of its source)" % argv[0])
        self.lines, self._lock = [], threading.Lock()
        self.proc = namespace.popen(argv + ["--stream"], stdout=subprocess.PIPE, text=True)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self):
        for line in self.proc.stdout:
            with self._lock:
                self.lines.append(json.loads(line))

    def snapshot(self):
        with self._lock:
            return list(self.lines)

    def last(self, key):
        """The newest line that has this key, or None."""
        with self._lock:
            return next((line for line in reversed(self.lines) if key in line), None)

    def stop(self, timeout_s=40):
        """Ends it and returns its report, the last line."""
        if self.proc.poll() is None:
            self.proc.send_signal(signal.SIGTERM)
        self.proc.wait(timeout_s)
        self._thread.join(timeout_s)
        if not self.lines or "now" in self.lines[-1]:
            raise RigError("%s ended with %s and without a report" % (self.proc.args[-2], self.proc.returncode))
        return self.lines[-1]


class UdpGap(Observer):
    """The 1 kHz stream of the guest as the client sees it."""

    def __init__(self, namespace, port=UDP_PORT, gap_ms=5):
        super().__init__(namespace, [os.path.join(TOOLS, "udpgap"), "--port", str(port), "--gap-ms", str(gap_ms)])

    def seconds_alive(self):
        """How old the last packet is; None when none came yet."""
        beats = [line for line in self.snapshot() if "now" in line]
        return beats[-1]["now"] - beats[-1]["last"] if beats and beats[-1]["packets"] else None

    def wait_flowing(self, timeout_s=30):
        wait_for(lambda: (self.seconds_alive() if self.seconds_alive() is not None else 9) < 0.1, timeout_s,
                 "a packet of the guest's UDP stream")

    def gaps(self, start, end):
        """All gaps over the limit that touch the time from start to end."""
        return [line for line in self.snapshot() if "gap_ms" in line and line["end"] >= start and line["start"] <= end]

    def longest_gap_ms(self, start, end, settle_s=0.5):
        """The longest gap that touches start..end; waits until all of that time has been reported. A stream that does not
        come back is a gap up to now."""
        def known():
            return any(line.get("now", 0) >= end + settle_s for line in self.snapshot()[-20:])
        wait_for(known, end + settle_s - time.time() + 5, "udpgap's report")
        gaps = [gap["gap_ms"] for gap in self.gaps(start, end)]
        last = [line for line in self.snapshot() if "now" in line][-1]
        if last["now"] - last["last"] > 0.2 and last["last"] <= end:
            gaps.append((last["now"] - last["last"]) * 1e3)
        return max(gaps, default=0.0)


class RedisLoad(Observer):
    """One connection that streams INCR and SET, from the client; preload: all keys are set before it begins."""

    def __init__(self, namespace, host=GUEST_IP, rate=0, value_bytes=100, keys=1000, preload=False, prefix="lb"):
        super().__init__(namespace, [os.path.join(TOOLS, "redisload"), "--host", host, "--rate", str(rate), "--value-bytes",
                                     str(value_bytes), "--keys", str(keys), "--prefix", prefix] + (["--preload"] if preload else []))

    def wait_flowing(self, timeout_s=30):
        wait_for(lambda: sum(line.get("requests", 0) for line in self.snapshot()) > 10, timeout_s, "answers of Redis")


class IncrLoad(Observer):
    """INCR of one key over one connection, one request in flight: what a client was promised. log: every answer is kept."""

    def __init__(self, namespace, host=GUEST_IP, key="lb:incr", rate=0, stall_ms=100, timeout_s=30, log=None):
        self.namespace, self.host, self.key, self.log = namespace, host, key, log
        super().__init__(namespace, [os.path.join(TOOLS, "incr"), "--host", host, "--key", key, "--rate", str(rate), "--stall-ms",
                                     str(stall_ms), "--timeout", str(timeout_s)] + (["--log", log] if log else []))

    def acked(self):
        """How many answers have come, as of at most 100 ms ago."""
        line = self.last("acked")
        return line["acked"] if line else 0

    @property
    def error(self):
        """What was not kept of what the client was promised, as far as known; None when nothing."""
        line = self.last("acked") or {}
        if line.get("forgotten") or line.get("skipped"):
            return "%d acknowledged writes forgotten, %d carried out twice" % (line["forgotten"], line["skipped"])
        return line.get("error")

    def wait_flowing(self, timeout_s=30, more=10):
        """Waits for so many further answers."""
        start = self.acked()
        wait_for(lambda: self.acked() >= start + more or self.proc.poll() is not None, timeout_s, "answers of Redis")
        if self.proc.poll() is not None:
            raise RigError("the counting client ended: %s" % self.error)

    def stalls(self, start=0.0, end=float("inf")):
        """Answers that took longer than stall_ms and touch that time, as lines of the tool."""
        return [line for line in self.snapshot() if "stall_ms" in line and line["end"] >= start and line["start"] <= end]

    def stall_ms(self, start, end=float("inf")):
        """The longest of these; one that lasts still counts up to now. 0 when none was longer than stall_ms."""
        longest = max((line["stall_ms"] for line in self.stalls(start, end)), default=0.0)
        line = self.last("now")
        waits = (time.time() - line["now"]) * 1e3 if line and self.proc.poll() is None else 0.0
        return max(longest, waits if waits > STILL_MS else 0.0)

    def answers(self):
        """[(value, sent, received)] of the log, after stop()."""
        with open(self.log) as f:
            return [(int(v), float(sent), float(got)) for v, sent, got in map(str.split, f)]

    def stored(self, timeout_s=5):
        """The key as a new connection reads it."""
        with self.namespace.socket() as sock:
            sock.settimeout(timeout_s)
            sock.connect((self.host, 6379))
            sock.sendall(b"GET %s\r\n" % self.key.encode())
            data = b""
            while data.count(b"\r\n") < 2:
                piece = sock.recv(4096)
                if not piece:
                    raise RigError("Redis closed the connection")
                data += piece
        return int(data.split(b"\r\n")[1])

    def verdict(self):
        """Ends it; returns (report, [what was not kept of what the client was promised])."""
        report = self.stop()
        broken = [self.error] if self.error else []
        stored = self.stored()
        if not report["last"] <= stored <= report["last"] + report["unanswered"]:
            broken.append("answered %d, stored %d" % (report["last"], stored))
        return report, broken


class GuestCapture(Observer):
    """Where a guest sends, by its MAC, on all hosts at once: group "uplink" is what leaves a host, group "tap" what comes from
    its taps (held output comes twice: when the guest sends it and when it is released)."""

    def __init__(self, rig, mac=GUEST_MAC, hosts=None, tap="tap0"):
        hosts = hosts or list(rig.hosts.values())
        spots = []
        for host in hosts:
            spots += ["uplink:%s:%s:eth0:out" % (host.role, host.path), "tap:%s:%s:%s:in" % (host.role, host.path, tap)]
        # The order matters: --stream, added by Observer, may come last.
        super().__init__(rig.lan, [os.path.join(TOOLS, "guestcap"), "--mac", mac] + spots)

    def runs(self, group="uplink"):
        """[{"place", "first", "last", "frames"}], oldest first; as of at most 0.3 s ago while it runs."""
        with self._lock:
            if self.lines and "groups" in self.lines[-1]:
                return self.lines[-1]["groups"].get(group, [])
            found = {line["run"]: line for line in self.lines if line.get("group") == group}
        return [found[number] for number in sorted(found)]

    def order(self, group="uplink"):
        """The hosts in the order in which the guest sent from them. Two copies at a time show as a host that comes back:
        ["a", "b", "a", "b"]."""
        return [run["place"] for run in self.runs(group)]

    def place(self, group="uplink"):
        """Where its newest frame came from, and when: (role, time); (None, 0) before the first."""
        runs = self.runs(group)
        return (runs[-1]["place"], runs[-1]["last"]) if runs else (None, 0)


class Measure:
    """What a migration cost, measured the same way whatever does it: bytes on the source's migration link, processor time of
    given processes, and time. Start it, migrate, stop() it."""

    def __init__(self, source, pids=()):
        self.source, self.pids = source, list(pids)
        self.cpu_start = {pid: cpu_seconds(pid) for pid in self.pids}
        self.sent, self.received = source.link_bytes("mig0")
        self.cpu_used = {pid: 0.0 for pid in self.pids}
        self.start = time.time()
        self.end = None

    def stop(self):
        """{"start", "end", "wall_ms", "wire_bytes", "wire_bytes_back", "cpu_s"}. A process that has ended counts with what
        it had used at the last call of cpu(): call that while it lives."""
        self.end = time.time()
        sent, received = self.source.link_bytes("mig0")
        return {"start": self.start, "end": self.end, "wall_ms": (self.end - self.start) * 1e3,
                "wire_bytes": sent - self.sent, "wire_bytes_back": received - self.received, "cpu_s": self.cpu()}

    def cpu(self):
        for pid in self.pids:
            try:
                self.cpu_used[pid] = cpu_seconds(pid) - self.cpu_start[pid]
            except OSError:
                pass
        return sum(self.cpu_used.values())


# ---- the rig -----------------------------------------------------------------------------------------------------------


class Rig:
    """with Rig("t", hosts="AB") as rig: rig.a, rig.b (also rig.hosts["a"]), rig.client, rig.dir."""

    def __init__(self, prefix="lb", hosts="AB", taps=1, keep=False):
        if os.geteuid() != 0:
            raise RigError("network namespaces need root")
        if not re.fullmatch("[a-z]{1,8}", prefix):
            raise RigError("prefix %r: 1 to 8 small letters" % prefix)
        self.prefix, self.keep = prefix, keep
        self.name = "%s%d" % (prefix, os.getpid())
        self._namespaces, self._closed, self.hosts, self.vms, self.witnesses = [], False, {}, [], []
        self._partitions, self._removed_at_end = set(), []
        self._owner = os.getpid()
        remove_stale(prefix)
        self.dir = tempfile.mkdtemp(prefix=self.name + "-")
        os.chmod(self.dir, 0o755)
        atexit.register(self.close)
        # SIGTERM by default ends Python without atexit.
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        try:
            self._build(hosts, taps)
        except BaseException:
            self.close()
            raise

    def _build(self, hosts, taps):
        self.lan = self._add(Namespace(self, "lan"))
        for bridge in ("lan0", "mig0"):
            self.lan.ip("link", "add", bridge, "type", "bridge", "stp_state", "0", "forward_delay", "0", "mcast_snooping", "0")
            self.lan.ip("link", "set", bridge, "up")
        self.client = self._add(Namespace(self, "client"))
        self.plug(self.client, "eth0", "lan0")
        self.client.ip("addr", "add", CLIENT_IP + "/24", "dev", "eth0")
        self.client.ip("link", "set", "eth0", "up")
        for number, role in enumerate(hosts.lower(), 1):
            host = self._add(Host(self, role, number, taps))
            self.hosts[role] = host
            setattr(self, role, host)

    def _add(self, namespace):
        self._namespaces.append(namespace)
        return namespace

    def plug(self, namespace, device, bridge):
        """A cable from a namespace to a bridge of the lan."""
        port = "%s-%s" % (bridge[:3], namespace.role)
        self.lan.ip("link", "add", "name", port, "type", "veth", "peer", "name", device, "netns", namespace.name)
        namespace.cables[device] = (port, json.loads(namespace.ip("-j", "link", "show", "dev", device))[0]["address"])
        sh("tc", "-n", namespace.name, "qdisc", "add", "dev", device, "clsact")
        self.lan.ip("link", "set", port, "master", bridge, "up")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Kills every process of every namespace and removes all there is. Safe to call twice."""
        if self._closed or os.getpid() != self._owner:
            return
        self._closed = True
        atexit.unregister(self.close)
        for vm in self.vms:
            if vm.proc.poll() is None:
                vm.proc.kill()
        remove_namespaces(self.name + "-")
        for vm in self.vms:
            vm.proc.wait()
        if not self.keep:
            for folder in [self.dir] + self._removed_at_end:
                shutil.rmtree(folder, ignore_errors=True)

    def memory_dir(self, name):
        """A folder in memory that goes with the rig."""
        path = os.path.join(MEMORY, "%s-%s" % (self.name, name))
        os.mkdir(path, 0o700)
        self._removed_at_end.append(path)
        return path

    # -- what happens to hosts

    def add_witness(self):
        """A host on the migration network only: rig.witnesses[0] is "w1" at 10.78.0.201, and so on."""
        number = len(self.witnesses) + 1
        self.witnesses.append(self._add(WitnessHost(self, "w%d" % number, 200 + number)))
        return self.witnesses[-1]

    def partition(self, a, b, one_way=False):
        """Nothing of host a arrives at host b any more, nor the other way round unless one_way. b may be several: all are cut off
        within some 10 ms, witnesses first, so that nobody is asked for a decision by half of a partition. Guests' frames and the
        client's pass: it is the hosts that lose each other. Returns what heals it."""
        cut = {(a, other) for other in (b if isinstance(b, (list, tuple)) else [b])}
        if not one_way:
            cut |= {(receiver, sender) for sender, receiver in cut}
        self._partitions |= cut
        self._apply_partitions(cut)
        return lambda: self._heal(cut)

    def heal(self):
        """Ends all partitions."""
        self._heal(set(self._partitions))

    def _heal(self, cut):
        self._partitions -= cut
        self._apply_partitions(cut)

    def _apply_partitions(self, changed):
        receivers = sorted({receiver for _, receiver in changed}, key=lambda n: (isinstance(n, Host), n.role))
        lines = [line for receiver in receivers
                 for line in receiver.block_commands([s for s, r in self._partitions if r is receiver])]
        sh("sh", "-ec", "\n".join(lines))

    def kill_host(self, host, silent=True):
        """SIGKILL to every process of it. silent: its cables go first, as when its power does; otherwise its kernel still says
        goodbye to every connection. Returns time.time() of the moment after which nothing of it got out or ran."""
        if silent:
            host.unplug()
        host.signal(signal.SIGKILL)
        when = time.time()
        host.crash()
        return when

    def revive_host(self, host, booted=True):
        """It is back with the files it had and no process. booted: nothing is left of what its kernel had; otherwise
        interfaces and filters that its processes made are still there, which is more to clean up."""
        host.crash()
        if booted:
            host.forget()
        host.unplug(False)

    # -- the migration link

    def shape(self, mbit=None):
        """Limits what each host may send over mig0 to mbit Mb/s; None lifts the limit."""
        for host in self.hosts.values():
            host_tc = ["tc", "-n", host.name, "qdisc"]
            sh(*host_tc, "del", "dev", "mig0", "root", check=False)
            if mbit:
                # A burst of 2 ms and a queue of 20 ms: enough to keep the link full, short enough not to hide latency.
                burst = max(65536 * 2, int(mbit * 1e6 / 8 * 0.002))
                sh(*host_tc, "add", "dev", "mig0", "root", "tbf", "rate", "%dmbit" % mbit, "burst", burst, "latency", "20ms")

    # -- guests

    def make_disk(self, name="disk.img", size_mb=128):
        """A raw disk, shared by all hosts as they see the same files."""
        path = os.path.join(self.dir, name)
        with open(path, "wb") as f:
            f.truncate(size_mb << 20)
        return path

    def qemu_argv(self, host, name, work="", memory_mb=1024, machine="pc-i440fx-7.2", smp=1, tap="tap0", nic="virtio-net-pci",
                  disk=None, disk_device="virtio-blk-pci", memfd=False, incoming=None, full_kernel=False, small=False, extra=(), guest=GUEST,
                  net=GUEST_IP + "/24", mac=GUEST_MAC, qemu="qemu-system-x86_64", accel="tcg,thread=multi",
                  cpu="max"):
        """The command line of a guest; the same arguments on two hosts give two ends of a migration. work: words as in
        tests/guest/README.md, without "lb."; small: without Redis, enough for 96 MB; monitors, serial line and log go to
        host.dir/NAME.*."""
        suffix = "-full" if full_kernel else ""
        words = ["console=ttyS0", "quiet", "panic=-1", "lb.net=" + net] + ["lb." + word for word in work.split()]
        base = os.path.join(host.dir, name)
        memory = ["-m", str(memory_mb)]
        if memfd:
            memory += ["-object", "memory-backend-memfd,id=ram0,size=%dM,share=on" % memory_mb]
            machine += ",memory-backend=ram0"
        argv = [qemu, "-name", name, "-nodefaults", "-display", "none", "-no-reboot", "-machine", machine, "-accel", accel,
                "-cpu", cpu, "-smp", str(smp), *memory,
                "-kernel", os.path.join(guest, "vmlinuz" + suffix), "-initrd", os.path.join(guest, "initrd%s.img" % ("-small" if small else suffix)),
                "-append", " ".join(words),
                "-qmp", "unix:%s.qmp,server=on,wait=off" % base, "-qmp", "unix:%s.qmp2,server=on,wait=off" % base,
                "-serial", "file:%s.serial" % base]
        if tap:
            argv += ["-netdev", "tap,id=n0,ifname=%s,script=no,downscript=no,vhost=off" % tap,
                     "-device", "%s,netdev=n0,mac=%s" % (nic, mac)]
        if disk:
            argv += ["-blockdev", "driver=raw,node-name=d0,cache.direct=on,file.driver=file,file.filename=" + disk,
                     "-device", "%s,drive=d0" % disk_device]
        if incoming:
            argv += ["-incoming", incoming]
        return argv + [str(a) for a in extra]

    def start_qemu(self, host, name="vm", **options):
        """Starts a guest on a host, by hand (options as in qemu_argv), and connects to its monitor."""
        argv = self.qemu_argv(host, name, **options)
        base = os.path.join(host.dir, name)
        with open(base + ".log", "wb") as log:
            proc = host.popen(argv, stdout=log, stderr=log)
        vm = Vm(host, name, argv, proc, base + ".qmp", base + ".qmp2", base + ".serial", base + ".log")
        self.vms.append(vm)
        return vm

    # -- the guest as the client sees it

    def guest_status(self, ip=GUEST_IP, verify_all=False, timeout_s=5, via=None):
        """The guest's own account as a dict; verify_all: after it has checked every page once more (may take seconds). via: what
        makes a socket to it, not the client's."""
        with (via or self.client.socket)() as sock:
            sock.settimeout(timeout_s)
            sock.connect((ip, 7002 if verify_all else 7000))
            if verify_all:
                sock.settimeout(max(timeout_s, 30))
            data = b""
            while not data.endswith(b"\n"):
                piece = sock.recv(65536)
                if not piece:
                    raise RigError("guest closed the status connection")
                data += piece
        return json.loads(data)

    def wait_guest(self, ip=GUEST_IP, timeout_s=120):
        """Waits until the guest is up and has stamped all its memory; returns its status. It takes seconds; a minute on a machine
        with ten times the work it can do."""
        def ready():
            try:
                status = self.guest_status(ip, timeout_s=1)
            except (OSError, RigError, ValueError):
                return None
            return status if status["ready"] else None
        try:
            return wait_for(ready, timeout_s, "the guest at %s being ready" % ip, 0.05)
        except RigError as error:
            raise RigError("%s\n%s" % (error, self.serial_lines()))

    def serial_lines(self):
        """The end of what each guest said on its serial line, for a failure's message."""
        paths = [path for host in self.hosts.values() for path in glob.glob(os.path.join(host.dir, "*.serial"))]
        return "\n".join("==== %s\n%s" % (os.path.relpath(path, self.dir), read_tail(path, 400)) for path in paths)

    def ping(self, ip=GUEST_IP, count=1):
        """True when the guest answers. Done with our own packets: ping is not on every machine."""
        with self.client.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
            sock.settimeout(1)
            for sequence in range(count):
                header = struct.pack("!BBHHH", 8, 0, 0, os.getpid() & 0xffff, sequence)
                total = sum(struct.unpack("!4H", header))
                checksum = ~((total & 0xffff) + (total >> 16)) & 0xffff
                sock.sendto(struct.pack("!BBHHH", 8, 0, checksum, os.getpid() & 0xffff, sequence), (ip, 0))
                end = time.monotonic() + 1
                while True:
                    try:
                        answer = sock.recv(2048)
                    except socket.timeout:
                        return False
                    body = answer[(answer[0] & 15) * 4:]
                    if body[0] == 0 and struct.unpack("!HH", body[4:8]) == (os.getpid() & 0xffff, sequence):
                        break
                    if time.monotonic() > end:
                        return False
        return True


def remove_namespaces(start):
    """Kills every process in the namespaces whose name starts so, and removes them."""
    names = [name for name in _namespace_names() if name.startswith(start)]
    for name in names:
        try:
            inode = os.stat("/run/netns/" + name).st_ino
        except OSError:
            continue
        holder = Namespace.__new__(Namespace)
        holder.role, holder.inode = name, inode
        try:
            holder.crash()
        except RigError as error:
            print("# %s" % error, file=sys.stderr)
    for name in names:
        sh("ip", "netns", "del", name, check=False)


def remove_stale(prefix):
    """Removes what runs with this prefix left behind when they were killed."""
    for name in _namespace_names():
        match = re.fullmatch(prefix + r"(\d+)-.*", name)
        if match and not os.path.exists("/proc/" + match.group(1)):
            remove_namespaces("%s%s-" % (prefix, match.group(1)))
    for folder in (tempfile.gettempdir(), MEMORY):
        for entry in os.listdir(folder):
            match = re.fullmatch(prefix + r"(\d+)-\w+", entry)
            if match and not os.path.exists("/proc/" + match.group(1)):
                shutil.rmtree(os.path.join(folder, entry), ignore_errors=True)


def _namespace_names():
    try:
        return os.listdir("/run/netns")
    except OSError:
        return []


# ---- TAP (for `prove`) ---------------------------------------------------------------------------------------------------


class Tap:
    """with Tap() as t: t.ok(value, "name"); t.skip("name", "why"). The plan is printed at the end, and an exception is one
    more failed test. Exits with 1 when one failed."""

    def __init__(self):
        self.count = self.failed = 0

    def ok(self, value, name, detail=None):
        self.count += 1
        if not value:
            self.failed += 1
        print("%s %d - %s" % ("ok" if value else "not ok", self.count, name), flush=True)
        if not value and detail is not None:
            self.diag(detail)
        return bool(value)

    def equal(self, got, want, name):
        return self.ok(got == want, name, "got %r, want %r" % (got, want))

    def skip(self, name, why):
        self.count += 1
        print("ok %d - %s # SKIP %s" % (self.count, name, why), flush=True)

    def diag(self, text):
        for line in str(text).splitlines():
            print("# " + line, flush=True)

    def skip_all(self, why):
        """Ends the whole file as skipped."""
        if self.count:
            raise RigError("skip_all() after a test")
        print("1..0 # SKIP " + why, flush=True)
        sys.exit(0)

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        if kind is SystemExit:
            return False
        if kind is not None:
            self.ok(False, "ends without an exception", "%s: %s" % (kind.__name__, value))
            self.diag("".join(traceback.format_tb(trace)))
        print("1..%d" % self.count, flush=True)
        sys.stdout.flush()
        if kind is None or issubclass(kind, Exception):
            sys.exit(1 if self.failed else 0)
        return False
