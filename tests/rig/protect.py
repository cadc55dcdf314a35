"""Protection in the rig: hosts A, B, C, an etcd apart, crashes, partitions, a client that counts acknowledged answers, and a
capture of what leaves each host.

    10.78.0.51.. w1, w2, w3 (etcd members) -- mig0 -- A, B, C        everything else as in rig.py

A partition here loses frames in silence and in one direction when asked to: the sender is given a wrong permanent neighbour
for the other's address. Times of the capture are the kernel's, CLOCK_REALTIME like time.time().
"""

import json
import os
import signal
import socket
import struct
import sys
import threading
import time
import urllib.request

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from lifeboat import PORT, Fleet
from rig import GUEST_IP, MIG, Namespace, RigError, read_tail, wait_for

NOBODY = "02:00:00:00:00:fe"
GUEST_MAC = bytes.fromhex("525400770110")
SO_TIMESTAMPNS = 35


class Member(Namespace):
    """One etcd member in a namespace of its own."""

    def __init__(self, rig, number):
        super().__init__(rig, "w%d" % number)
        self.number, self.mig_ip = number, "%s.%d" % (MIG, 50 + number)
        rig.plug(self, "mig0", "mig0")
        self.ip("addr", "add", self.mig_ip + "/24", "dev", "mig0")
        self.ip("link", "set", "mig0", "up")
        self.url = "http://%s:2379" % self.mig_ip
        self.log = os.path.join(self.dir, "etcd.log")
        self.proc = None

    def start(self, members):
        peer = "http://%s:2380"
        with open(self.log, "ab") as log:
            self.proc = self.popen(
                ["etcd", "--name", self.role, "--data-dir", os.path.join(self.dir, "data"),
                 "--listen-client-urls", self.url, "--advertise-client-urls", self.url,
                 "--listen-peer-urls", peer % self.mig_ip, "--initial-advertise-peer-urls", peer % self.mig_ip,
                 "--initial-cluster", ",".join("%s=%s" % (m.role, peer % m.mig_ip) for m in members),
                 "--heartbeat-interval", "50", "--election-timeout", "300"], stdout=log, stderr=log)

    def healthy(self):
        """Does it answer, from inside its own namespace?"""
        try:
            done = self.run(["python3", "-c", "import urllib.request as u; print(u.urlopen('%s/health', timeout=1).read().decode())"
                             % self.url], check=False, timeout_s=5)
            return json.loads(done.stdout).get("health") == "true"
        except (ValueError, OSError):
            return False


class Cluster(Fleet):
    """A fleet with an etcd: cluster.members, cluster.witness (what --witness takes)."""

    def __init__(self, prefix="lbp", hosts="ABC", members=1, **options):
        super().__init__(prefix, hosts, **options)
        try:
            self.members = [self._add(Member(self, i + 1)) for i in range(members)]
            for member in self.members:
                member.start(self.members)
            wait_for(lambda: all(m.healthy() for m in self.members), 30,
                     "etcd: " + " ".join(read_tail(m.log, 300) for m in self.members), 0.2)
            self.witness = "etcd:" + ",".join(m.url for m in self.members)
        except BaseException:
            self.close()
            raise

    # -- protections

    def protect(self, name, role, backups, *options, timeout_s=120):
        words = list(options)
        if not any(word in ("--manual", "--fence", "--witness") for word in words):
            words += ["--witness", self.witness]
        return self.daemons[role].cli("protect", name, "--backup", ",".join(backups), *words, timeout_s=timeout_s)

    def protection(self, role, name="vm"):
        """The last status of a VM's protection on a host, or None."""
        daemon = self.daemons[role]
        if daemon.proc.poll() is not None:
            return None
        done = daemon.cli("top", "--once", "--json", check=False)
        if done.returncode != 0:
            return None
        for entry in json.loads(done.stdout)["protections"]:
            if entry.get("vm") == name:
                return entry
        return None

    def primary(self, name="vm"):
        """Role of the host whose daemon says that it runs the VM; None when none or several do."""
        found = []
        for role, daemon in self.daemons.items():
            if daemon.proc.poll() is None and daemon.vms().get(name, {}).get("state") in ("running", "protected"):
                found.append(role)
        return found[0] if len(found) == 1 else None

    def wait_protected(self, name="vm", timeout_s=60):
        """Waits until the VM runs on one host, protected; returns that host's role and its status."""
        def there():
            role = self.primary(name)
            status = self.protection(role, name) if role else None
            return (role, status) if status and status["state"] == "protected" and status["role"] == "primary" else None
        try:
            return wait_for(there, timeout_s, "VM %s protected" % name, 0.1)
        except RigError as error:
            raise RigError("%s\n%s" % (error, self.all_logs()))

    # -- faults

    def crash(self, role):
        """The host dies: every process in it, at once. Returns the time."""
        at = time.time()
        self.hosts[role].crash()
        self.daemons[role].proc.wait()
        return at

    def back(self, role):
        """It comes back with what is on its disk."""
        self.daemons[role].start()

    def signal_host(self, role, number):
        for pid in self.hosts[role].pids():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass

    @staticmethod
    def cut(source, target):
        """What source sends to target on mig0 is lost; the other direction goes on."""
        source.ip("neigh", "replace", target.mig_ip, "lladdr", NOBODY, "nud", "permanent", "dev", "mig0")

    @staticmethod
    def mend(source, target):
        source.ip("neigh", "del", target.mig_ip, "dev", "mig0")

    def partition(self, one, others, both_ways=True):
        """Cuts a host from others (hosts or members); returns what heals it."""
        pairs = [(one, other) for other in others] + ([(other, one) for other in others] if both_ways else [])
        for source, target in pairs:
            self.cut(source, target)

        def heal():
            for source, target in pairs:
                self.mend(source, target)
        return heal


class Counter:
    """A Redis client that sends INCR on one connection, each after the answer to the one before, and checks that every answer
    is the next number. It never reconnects. acks: (sent, answered, number)."""

    def __init__(self, namespace, ip=GUEST_IP, key="lb:acked", interval_s=0.0, timeout_s=60):
        self.acks, self.error, self.interval_s = [], None, interval_s
        self.request = b"*2\r\n$4\r\nINCR\r\n$%d\r\n%s\r\n" % (len(key), key.encode())
        self.sock = namespace.socket()
        self.sock.settimeout(timeout_s)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.connect((ip, 6379))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _ask(self):
        self.sock.sendall(self.request)
        answer = b""
        while not answer.endswith(b"\r\n"):
            piece = self.sock.recv(256)
            if not piece:
                raise OSError("connection closed by the guest")
            answer += piece
        return int(answer[1:])

    def _run(self):
        last = None
        try:
            while not self._stop.is_set():
                sent = time.time()
                number = self._ask()
                if last is not None and number != last + 1:
                    raise OSError("answer %d after %d: %s" % (number, last, "acknowledged writes are lost" if number <= last
                                                              else "a write happened twice"))
                last = number
                self.acks.append((sent, time.time(), number))
                if self.interval_s:
                    self._stop.wait(self.interval_s)
        except (OSError, ValueError) as error:
            self.error = "%s: %s" % (type(error).__name__, error)

    def wait_flowing(self, timeout_s=30):
        have = len(self.acks)
        wait_for(lambda: len(self.acks) > have + 3 or self.error, timeout_s, "answers of Redis")
        if self.error:
            raise RigError("the counting client: " + self.error)

    def stall_ms(self, start, end=None):
        """The longest time without an answer that touches start..end."""
        times = [answered for _, answered, _ in self.acks]
        end = end or time.time()
        gaps = [b - a for a, b in zip(times, times[1:] + [time.time()]) if b >= start and a <= end]
        return max(gaps, default=0.0) * 1e3

    def stop(self):
        """{"acked", "error", "longest_ms"}"""
        self._stop.set()
        self._thread.join(65)
        self.sock.close()
        return {"acked": len(self.acks), "error": self.error,
                "longest_ms": max(((b - a) * 1e3 for a, b, _ in self.acks), default=0.0)}


class Capture:
    """Who was heard when: frames with the guest's address that left each host, seen where its cable ends."""

    def __init__(self, rig, mac=GUEST_MAC):
        self.mac, self.heard, self._stop, self._threads = mac, {role: [] for role in rig.hosts}, threading.Event(), []
        self._socks = []
        for role in rig.hosts:
            sock = rig.lan.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            sock.bind(("lan-" + role, 3))
            sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
            sock.settimeout(0.2)
            self._socks.append(sock)
            thread = threading.Thread(target=self._run, args=(sock, self.heard[role]), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _run(self, sock, times):
        while not self._stop.is_set():
            try:
                data, ancillary, _, address = sock.recvmsg(14, 64)
            except socket.timeout:
                continue
            if address[2] == socket.PACKET_OUTGOING or data[6:12] != self.mac:
                continue
            seconds, nanoseconds = struct.unpack("qq", ancillary[0][2][:16])
            times.append(seconds + nanoseconds / 1e9)

    def turns(self):
        """Who was heard, one after the other: [(role, first time, last time)]. One running copy at a time gives one turn for
        each host that had it, and no more: a loser that is heard once more makes two more turns."""
        found = []
        for t, role in sorted((t, role) for role, times in self.heard.items() for t in list(times)):
            if not found or found[-1][0] != role:
                found.append([role, t, t])
            found[-1][2] = t
        return [tuple(turn) for turn in found]

    def stop(self):
        self._stop.set()
        for thread in self._threads:
            thread.join()
        for sock in self._socks:
            sock.close()
        return self.turns()


def unbroken(t, counter, what):
    """A test line: the counting client lost nothing and its connection lives. Returns its report."""
    report = counter.stop()
    t.ok(report["error"] is None and report["acked"] > 0, what, report)
    return report
