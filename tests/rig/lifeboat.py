"""lifeboatd in the rig: a daemon in every host namespace, trust between them, VMs run, adopted and migrated through the CLI."""

import json
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from etcd import Etcd
from rig import BUILD, GUEST, GUEST_IP, TOOLS, Rig, RigError, read_tail, wait_for

CLI = os.path.join(BUILD, "lifeboat")
DAEMON = os.path.join(BUILD, "lifeboatd")
PORT = 7007


# `ip netns exec` gives its child a /sys of its own, without the cgroups that throttling needs.
WITH_CGROUPS = """mount -t tmpfs lb /sys/fs/cgroup && mkdir /sys/fs/cgroup/cpu && mount -t cgroup -o cpu lb /sys/fs/cgroup/cpu ||
mount -t cgroup2 lb /sys/fs/cgroup; exec "$@" """


class CliError(RigError):
    """A lifeboat command failed: .code, .error (the JSON object), .text."""

    def __init__(self, argv, code, out, err):
        self.code, self.text = code, err.strip()
        try:
            self.error = json.loads(out.strip().splitlines()[-1])["error"]
        except (ValueError, KeyError, IndexError, TypeError):
            self.error = {}
        super().__init__("lifeboat %s: exit %d: %s" % (" ".join(map(str, argv)), code, self.text or out.strip()))


class Daemon:
    """One lifeboatd: .cli(...) runs the command line against it."""

    def __init__(self, host, config="", environment=None):
        self.host = host
        self.state = os.path.join(host.dir, "state")
        self.socket = os.path.join(host.dir, "lifeboat.sock")
        self.config = os.path.join(host.dir, "lifeboatd.conf")
        self.log = os.path.join(host.dir, "lifeboatd.log")
        self.proc = None
        self.write_config(config)
        self.start(environment)

    def write_config(self, text):
        """All but its name; it counts when the daemon starts again."""
        self.config_text = text
        with open(self.config, "w") as f:
            f.write("name = %s\n%s\n" % (self.host.role, text))

    def start(self, environment=None):
        env = dict(os.environ, **(environment or {}))
        with open(self.log, "ab") as log:
            self.proc = self.host.popen(["sh", "-c", WITH_CGROUPS, "sh", DAEMON, "--state-dir", self.state, "--socket", self.socket, "--config", self.config,
                                         "--listen", "%s:%d" % (self.host.mig_ip, PORT), "--log-level", "debug"],
                                        stdout=log, stderr=log, env=env)

        def up():
            if self.proc.poll() is not None:
                raise RigError("lifeboatd ended: " + read_tail(self.log))
            return os.path.exists(self.socket) and self.cli("ls", "--json", check=False).returncode == 0
        wait_for(up, 10, "lifeboatd on %s" % self.host.role)
        return self

    def kill(self, number=signal.SIGKILL):
        self.proc.send_signal(number)
        self.proc.wait()

    def restart(self, environment=None):
        if self.proc.poll() is None:
            self.kill()
        return self.start(environment)

    def cli(self, *argv, check=True, timeout_s=120):
        done = self.host.run([CLI, "--host", self.socket] + list(argv), check=False, timeout_s=timeout_s)
        if check and done.returncode != 0:
            raise CliError(argv, done.returncode, done.stdout, done.stderr)
        return done

    def json(self, *argv, **options):
        """Runs a subcommand with --json and returns what it says."""
        out = self.cli(*argv, "--json", **options).stdout.strip()
        try:
            return json.loads(out)
        except ValueError:
            raise RigError("lifeboat %s --json printed no JSON: %r" % (" ".join(argv), out))

    def vms(self):
        """{name: entry} of `lifeboat ls`."""
        answer = self.json("ls")
        return {entry["name"]: entry for entry in (answer["vms"] if isinstance(answer, dict) else answer)}

    def logs(self, lines=40):
        """The end of the daemon's log and of the newest session's, for a failure's message."""
        text = read_tail(self.log, 3000)
        folder = os.path.join(self.state, "log")
        names = sorted(os.listdir(folder), key=lambda n: os.path.getmtime(os.path.join(folder, n))) \
            if os.path.isdir(folder) else []
        for name in names[-2:]:
            text += "\n---- %s\n%s" % (name, read_tail(os.path.join(folder, name), 4000))
        return "\n".join(text.splitlines()[-lines:])

    def session_pids(self):
        """Pids of this host's session processes."""
        found = []
        for pid in self.host.pids():
            try:
                with open("/proc/%d/cmdline" % pid, "rb") as f:
                    argv = f.read().split(b"\0")
            except OSError:
                continue
            if argv[0].endswith(b"lifeboatd") and b"--session" in argv:
                found.append(pid)
        return found

    def sessions(self, role):
        """Pids of its sessions with this role, as the daemon says."""
        found = (entry.get("session") or {} for entry in self.vms().values())
        return [session["pid"] for session in found if session.get("role") == role]

    def qemu_pids(self):
        found = []
        for pid in self.host.pids():
            try:
                with open("/proc/%d/cmdline" % pid, "rb") as f:
                    argv0 = f.read().split(b"\0")[0]
                if b"qemu-system" in os.path.basename(argv0):
                    found.append(pid)
            except OSError:
                pass
        return found


# ---- witnesses -----------------------------------------------------------------------------------------------------------


class Pinger:
    """Pings the guest from the client at a fixed pace and counts what never came back."""

    def __init__(self, namespace, ip=GUEST_IP, interval_s=0.1):
        self.ip, self.interval_s, self.ident = ip, interval_s, (os.getpid() ^ id(self)) & 0xffff
        self.sent, self.back = {}, {}
        self.sock = namespace.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        self.sock.settimeout(0.2)
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()

    def _send(self):
        sequence = 0
        while not self._stop.is_set():
            sequence = (sequence + 1) & 0xffff
            words = (0x0800, 0, self.ident, sequence)
            total = sum(words)
            total = (total & 0xffff) + (total >> 16)
            self.sent[sequence] = time.time()
            try:
                self.sock.sendto(struct.pack("!4H", words[0], ~total & 0xffff, self.ident, sequence), (self.ip, 0))
            except OSError:
                pass  # no route at this moment: it stays unanswered and counts as lost
            self._stop.wait(self.interval_s)

    def _receive(self):
        while True:
            try:
                packet = self.sock.recv(2048)
            except socket.timeout:
                if self._stop.is_set():
                    return
                continue
            body = packet[(packet[0] & 15) * 4:]
            if body[0] == 0:
                ident, sequence = struct.unpack("!HH", body[4:8])
                if ident == self.ident:
                    self.back.setdefault(sequence, time.time())

    def stop(self, settle_s=1.0):
        """{"sent", "lost", "lost_at": [time], "longest_ms"} after waiting for late answers."""
        self._stop.set()
        self._threads[0].join()
        time.sleep(settle_s)
        self._threads[1].join()
        self.sock.close()
        lost = [sequence for sequence in self.sent if sequence not in self.back]
        return {"sent": len(self.sent), "lost": len(lost), "lost_at": [round(self.sent[s], 3) for s in lost],
                "longest_ms": round(max(((self.back[s] - self.sent[s]) * 1e3 for s in self.back), default=0.0), 1)}


class EchoLine:
    """One TCP connection to the guest's echo port, with a numbered message every interval_s. It never reconnects."""

    def __init__(self, namespace, ip=GUEST_IP, interval_s=0.01):
        self.interval_s, self.answered, self.longest_ms, self.error = interval_s, 0, 0.0, None
        self.sock = namespace.socket()
        self.sock.settimeout(30)
        self.sock.connect((ip, 7001))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        try:
            while not self._stop.is_set():
                message = b"%015d\n" % self.answered
                begin, answer = time.time(), b""
                self.sock.sendall(message)
                while len(answer) < len(message):
                    piece = self.sock.recv(64)
                    if not piece:
                        raise OSError("closed by the guest")
                    answer += piece
                if answer != message:
                    raise OSError("sent %r, got %r" % (message, answer))
                self.answered += 1
                self.longest_ms = max(self.longest_ms, (time.time() - begin) * 1e3)
                self._stop.wait(self.interval_s)
        except OSError as error:
            self.error = str(error)

    def stop(self):
        """{"answered", "longest_ms", "error"}; error is None when the connection is whole."""
        self._stop.set()
        self._thread.join(35)
        self.sock.close()
        return {"answered": self.answered, "longest_ms": round(self.longest_ms, 1), "error": self.error}


class Command:
    """A lifeboat command in the background: .done(), .wait() -> (code, stdout, stderr)."""

    def __init__(self, daemon, *argv):
        self.argv = argv
        self.proc = daemon.host.popen([CLI, "--host", daemon.socket] + list(argv), stdout=subprocess.PIPE,
                                      stderr=subprocess.PIPE, text=True)

    def done(self):
        return self.proc.poll() is not None

    def wait(self, timeout_s=120):
        try:
            out, err = self.proc.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise RigError("not in %g s: lifeboat %s" % (timeout_s, " ".join(self.argv)))
        return self.proc.returncode, out, err

    def error(self, timeout_s=120):
        """Waits for its failure: a CliError; RigError when it succeeded."""
        code, out, err = self.wait(timeout_s)
        if code == 0:
            raise RigError("lifeboat %s: succeeded, a failure was expected: %s" % (" ".join(self.argv), out))
        return CliError(self.argv, code, out, err)


class Fleet(Rig):
    """A rig with a daemon on every host, all trusting each other: fleet.daemons["a"], fleet.da, fleet.db. witness: how many
    members of etcd there are (fleet.etcd)."""

    def __init__(self, prefix="lb", hosts="AB", taps=1, configs=None, environments=None, trust=True, witness=0, **options):
        super().__init__(prefix, hosts, taps, **options)
        try:
            self.etcd = Etcd(self, witness) if witness else None
            self.daemons = {}
            for role, host in self.hosts.items():
                self.daemons[role] = Daemon(host, self.default_config(host) + (configs or {}).get(role, ""),
                                            (environments or {}).get(role))
                setattr(self, "d" + role, self.daemons[role])
            if trust:
                self.trust_all()
        except BaseException:
            self.close()
            raise

    def default_config(self, host):
        """Hosts of the rig share one file system: what a host calls its own must not clash with another's."""
        return "".join("path = %s -> %s\n" % (other.dir, host.dir) for other in self.hosts.values() if other is not host)

    def trust_all(self):
        keys = {role: daemon.json("host", "id")["key"] for role, daemon in self.daemons.items()}
        for role, daemon in self.daemons.items():
            for other, key in keys.items():
                if other != role:
                    daemon.cli("host", "trust", other, key, "%s:%d" % (self.hosts[other].mig_ip, PORT))

    def kill_host(self, host, silent=True):
        when = super().kill_host(host, silent)
        self.daemons[host.role].proc.wait()
        return when

    def revive_host(self, host, booted=True, environment=None):
        """The host is back and its daemon starts, with the state directory it had."""
        super().revive_host(host, booted)
        self.daemons[host.role].start(environment)

    def run_vm(self, role="a", name="vm", **options):
        """A guest through `lifeboat run`."""
        host = self.hosts[role]
        self.daemons[role].cli("run", name, "--", *self.qemu_argv(host, name, **options))
        return name

    def migrate(self, name, source, target, *options, timeout_s=180):
        """`lifeboat migrate`; returns its JSON."""
        return self.daemons[source].json("migrate", name, target, *options, timeout_s=timeout_s)

    def where(self, name):
        """Hosts on which a VM of that name is running, as their daemons say."""
        return [role for role, daemon in self.daemons.items() if daemon.vms().get(name, {}).get("state") == "running"]

    def qemus(self):
        """{role: pids of QEMU processes}."""
        return {role: daemon.qemu_pids() for role, daemon in self.daemons.items()}

    def all_logs(self):
        return "\n".join("==== %s\n%s" % (role, daemon.logs()) for role, daemon in self.daemons.items())

    # -- what a test asks at the end

    def wait_where(self, name, role, timeout_s=30):
        """Waits until a VM runs on that host and on no other, as the daemons say."""
        wait_for(lambda: self.where(name) == [role], timeout_s, "VM %s running on %s alone" % (name, role), 0.1)

    def leftovers(self, role, name="vm", sockets=True):
        """What a VM has left on a host: processes, entry, sockets, throttling; [] when nothing. sockets: not of a VM that
        somebody else killed, nobody can take them away for it."""
        daemon, host = self.daemons[role], self.hosts[role]
        found = ["QEMU %d" % pid for pid in daemon.qemu_pids()]
        found += ["session %d" % pid for pid in daemon.session_pids()]
        folder = os.path.join(daemon.state, "vms")
        if os.path.isdir(folder):
            found += ["vms/" + entry for entry in os.listdir(folder)]
        throttle = os.path.join(daemon.state, "throttle")
        if os.path.isdir(throttle):
            found += ["throttle/" + entry for entry in os.listdir(throttle)]
        for entry in os.listdir(host.dir):
            path = os.path.join(host.dir, entry)
            if sockets and entry.startswith(name + ".") and stat.S_ISSOCK(os.lstat(path).st_mode):
                found.append(path)
        return found + self.cgroups()

    def cgroups(self):
        """Control groups that Lifeboat made, as its daemons see them: those of this rig's VMs, and those of VMs that are gone.
        Others are of a test that runs beside this one."""
        ours, found = {pid for host in self.hosts.values() for pid in host.pids()}, []
        for role, daemon in self.daemons.items():
            for top, folders, _ in os.walk("/proc/%d/root/sys/fs/cgroup" % daemon.proc.pid):
                for folder in (folder for folder in folders if folder.startswith("lifeboat-")):
                    pid = int(folder.split("-")[1])
                    if pid in ours or not os.path.exists("/proc/%d" % pid):
                        found.append("cgroup of %s: %s" % (role, os.path.join(top, folder).split("/cgroup/", 1)[1]))
        return found

    def nothing_left(self, t, role, what, name="vm", timeout_s=10, sockets=True):
        """A test line: the host is as if the VM had never come."""
        try:
            wait_for(lambda: not self.leftovers(role, name, sockets), timeout_s, "", 0.1)
        except RigError:
            pass
        left = self.leftovers(role, name, sockets)
        return t.ok(not left, what, "left on %s: %s" % (role, left))

    def clean(self, t, nonce, what, verify_all=True, ip=GUEST_IP, disk=None, via=None, timeout_s=5):
        """A test line: the guest is the same one and found nothing bad in all of its memory (and disk). Returns its status."""
        try:
            status = self.guest_status(ip, verify_all=verify_all, via=via, timeout_s=timeout_s)
        except (OSError, RigError) as error:
            t.ok(False, what, "the guest does not answer: %s" % error)
            return None
        bad = {key: status[key] for key in ("bad_pages", "disk_bad", "disk_errors", "clock_steps") if status.get(key)}
        t.ok(not bad and status["nonce"] == nonce and (disk is None or status["disk_verified"] > disk), what,
             "bad: %s, nonce %s want %s, first_bad %s, disk_verified %s" %
             (bad, status["nonce"], nonce, status.get("first_bad"), status.get("disk_verified")))
        return status

    def one_qemu(self, t, role, what):
        """A test line: one QEMU in all hosts, and it is there."""
        def alone():
            return [r for r, pids in self.qemus().items() for _ in pids] == [role]
        try:
            wait_for(alone, 10, "", 0.1)
        except RigError:
            pass
        return t.ok(alone(), what, "QEMU processes: %s" % self.qemus())

    def stop_vm(self, name):
        """Ends a VM wherever it is."""
        wait_for(lambda: self.where(name), 10, "VM %s runs somewhere" % name)  # a protection may still be ending
        for role in self.where(name):
            self.daemons[role].cli("stop", name, "--force")
        wait_for(lambda: not any(self.qemus().values()), 10, "QEMU gone after stop")


def need(t):
    """Skips the whole file where it cannot run. What the build makes is no reason to skip: its absence is a failure."""
    if os.geteuid() != 0:
        t.skip_all("network namespaces need root")
    if not os.path.exists("/dev/net/tun"):
        t.skip_all("no /dev/net/tun on this machine")
    for path in (CLI, DAEMON, os.path.join(GUEST, "initrd.img"), os.path.join(TOOLS, "udpgap")):
        if not os.path.exists(path):
            raise RigError("%s is missing: `make all tools`, tests/guest/build.sh %s" % (path, GUEST))
