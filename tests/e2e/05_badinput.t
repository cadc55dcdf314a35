#!/usr/bin/python3
"""What goes wrong before a hand-over: each has its exit status and an error with a remedy, the VM runs on at the source and is
clean, and nothing is left on the destination. Arguments: only these cases."""

import json
import os
import random
import signal
import socket
import sys
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), "..", "rig"))
from lifeboat import CLI, PORT, CliError, Command, Daemon, Fleet, need
from rig import CLIENT_IP, Qmp, RigError, Tap, wait_for

# exit statuses: core/core.h, enum lb_errcode
USAGE, NOT_FOUND, EXISTS, STATE, PREFLIGHT, NET, AUTH, PROTO, HV, NO_CONVERGE, CANCELLED = range(2, 13)
WORK = "dirty=10:32:mixed disk=vda clock"
SLOW = ("--bandwidth", "100Mbit", "--compress", "off")
TCP_PORT = 4455


class Cases:
    def __init__(self, t, fleet):
        self.t, self.fleet = t, fleet
        self.config_b = fleet.default_config(fleet.b)
        self.keys = {role: d.json("host", "id")["key"] for role, d in fleet.daemons.items()}
        # In A's own folder: B's mapping looks for it in B's.
        self.disk = os.path.join(fleet.a.dir, "disk.img")
        with open(self.disk, "wb") as f:
            f.truncate(128 << 20)
        self.disk_b = os.path.join(fleet.b.dir, "disk.img")
        os.symlink(self.disk, self.disk_b)
        self.start()

    def start(self):
        self.fleet.run_vm("a", "vm", memory_mb=256, work=WORK, disk=self.disk, extra=[
            "-serial", "unix:%s,server=on,wait=off" % self.port("a"),
            "-qmp", "tcp:%s:%d,server=on,wait=off" % ("0.0.0.0", TCP_PORT)])
        self.nonce = self.fleet.wait_guest()["nonce"]

    def port(self, role):
        """A serial line of the VM, a socket that it cannot do without."""
        return os.path.join(self.fleet.hosts[role].dir, "vm.port")

    # -- what every failure must look like

    def unharmed(self, what):
        t, fleet = self.t, self.fleet
        try:
            wait_for(lambda: fleet.da.vms()["vm"]["state"] == "running" and not fleet.da.session_pids(), 10, "", 0.1)
        except RigError:
            pass
        status = fleet.da.json("status", "vm")
        t.ok(status["state"] == "running" and status["running"] is True and len(fleet.da.qemu_pids()) == 1,
             what + ": the VM runs at the source", status)
        fleet.clean(t, self.nonce, what + ": it is clean")
        fleet.nothing_left(t, "b", what + ": nothing left on the destination")

    def failed(self, what, error, codes, *words):
        """error: a CliError. words: parts of its message or remedy that must be there."""
        codes = codes if isinstance(codes, tuple) else (codes,)
        message, remedy = error.error.get("message", ""), error.error.get("remedy", "")
        text = "%s %s" % (message, remedy)
        self.t.ok(error.code in codes and message and remedy and all(word in text for word in words),
                  "%s: exit %d: %s" % (what, error.code, message.splitlines()[0] if message else ""),
                  "want exit %s and %s; remedy: %r; stderr: %r" % (codes, words, remedy, error.text))

    def refused(self, what, codes, *words, options=(), host="b", unharmed=True):
        """A migration that must fail."""
        try:
            result = self.fleet.migrate("vm", "a", host, *options, timeout_s=90)
        except CliError as error:
            self.failed(what, error, codes, *words)
            if unharmed:
                self.unharmed(what)
            return
        self.t.ok(False, what + " fails", result)
        if host == "b":  # it moved: begin anew, or all that follows fails as well
            self.fleet.stop_vm("vm")
            self.start()

    def with_config(self, text, run):
        self.fleet.db.write_config(self.config_b + text)
        try:
            run()
        finally:
            self.fleet.db.write_config(self.config_b)

    def under_way(self, *options, percent=10):
        """A slow migration as a background command, once it is in its rounds."""
        command = Command(self.fleet.da, "migrate", "vm", "b", "--json", *(options or SLOW))

        def moving():
            if command.done():
                raise RigError("migrate ended early: %s" % (command.wait(),))
            session = self.fleet.da.json("status", "vm").get("session")
            progress = session and session.get("progress")
            return progress and progress["state"] == "pre-copy" and progress["percent"] >= percent
        wait_for(moving, 20, "a migration in its rounds", 0.05)
        return command

    # -- cases

    def options(self):
        for argv in (["--bandwidth", "fast"], ["--bandwidth", "-1"], ["--max-downtime", "-5"], ["--max-downtime", "never"],
                     ["--channels", "0"], ["--channels", "1000"], ["--compress", "lzma"], ["--compress", "zstd:99"],
                     ["--compress", "zstd:"], ["--timeout", "abc"], ["--no-such-option"], ["--bandwidth"]):
            done = self.fleet.da.cli("migrate", "vm", "b", "--json", *argv, check=False)
            error = CliError(argv, done.returncode, done.stdout, done.stderr)
            self.t.ok(error.code == USAGE and error.text, "migrate %s: exit %d: %s" % (" ".join(argv), error.code, error.text.splitlines()[0][:90]),
                      (done.stdout, done.stderr))
        for argv in (["migrate", "vm"], ["migrate"], ["nosuch"], ["run", "../x", "--", "qemu-system-x86_64"], ["run", "x"],
                     ["adopt", "x"], ["adopt", "x", "--pid", "abc"], ["host", "trust", "c", "not-a-key", "10.0.0.1"],
                     ["status", "a b"]):
            done = self.fleet.da.cli(*argv, check=False)
            self.t.ok(done.returncode in (USAGE, NOT_FOUND) and done.stderr.strip(), "%s: exit %d" % (" ".join(argv), done.returncode),
                      (done.stdout, done.stderr))
        self.unharmed("bad options")

    def names(self):
        self.refused("unknown host", NOT_FOUND, "nowhere", "host trust", host="nowhere")
        done = self.fleet.da.cli("migrate", "ghost", "b", "--json", check=False)
        self.failed("unknown VM", CliError(["migrate", "ghost"], done.returncode, done.stdout, done.stderr), NOT_FOUND, "ghost")
        done = self.fleet.da.cli("adopt", "x", "--pid", str(os.getpid()), "--json", check=False)
        self.failed("adopt of a process that is no QEMU", CliError(["adopt"], done.returncode, done.stdout, done.stderr),
                    (USAGE, NOT_FOUND, HV, STATE, 15))
        done = self.fleet.da.cli("adopt", "y", "--pid", str(self.fleet.da.qemu_pids()[0]), "--json", check=False)
        self.failed("adopt of a VM that is known", CliError(["adopt"], done.returncode, done.stdout, done.stderr), EXISTS)
        done = self.fleet.da.cli("run", "vm", "--json", "--", "qemu-system-x86_64", check=False)
        self.failed("run with a name that is taken", CliError(["run"], done.returncode, done.stdout, done.stderr), EXISTS)
        done = self.fleet.da.cli("run", "z", "--json", "--", "qemu-system-x86_64", "-no-such-option", check=False)
        self.failed("run of a command line that fails", CliError(["run"], done.returncode, done.stdout, done.stderr), HV,
                    "no-such-option")
        self.t.equal(sorted(self.fleet.da.vms()), ["vm"], "none of them is registered")
        self.t.equal(len(self.fleet.da.qemu_pids()), 1, "none of them left a process")

    def trust(self):
        a, b = self.fleet.da, self.fleet.db
        address_a, address_b = ("%s:%d" % (host.mig_ip, PORT) for host in (self.fleet.a, self.fleet.b))
        other = key_of_nobody(self.fleet)
        b.cli("host", "forget", "a", "--force")
        self.refused("untrusted: the destination does not know our key", (NET, AUTH), "trust")
        b.cli("host", "trust", "a", other, address_a)
        self.refused("wrong key: the destination expects another", (NET, AUTH), "trust")
        b.cli("host", "forget", "a", "--force")
        b.cli("host", "trust", "a", self.keys["a"], address_a)
        a.cli("host", "forget", "b", "--force")
        a.cli("host", "trust", "b", other, address_b)
        self.refused("wrong key: the destination is not whom we trust", AUTH, "key")
        a.cli("host", "forget", "b", "--force")
        a.cli("host", "trust", "b", self.keys["b"], address_b)

    def nonsense(self):
        """A stranger at the port, and a stranger behind an address."""
        noise, stop = random.Random(7), threading.Event()
        address = (self.fleet.b.mig_ip, PORT)
        for size in (1, 23, 24, 25, 4096, 1 << 20):
            with self.fleet.a.socket() as s:
                s.settimeout(5)
                s.connect(address)
                try:
                    s.sendall(noise.randbytes(size))
                    s.shutdown(socket.SHUT_WR)
                    while s.recv(4096):
                        pass
                except OSError:
                    pass
        slow = self.fleet.a.socket()
        slow.connect(address)

        def drip():
            try:
                while not stop.wait(0.5):
                    slow.send(b"L")
            except OSError:
                pass
        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        crowd = []
        for _ in range(1000):
            s = self.fleet.a.socket()
            s.setblocking(False)
            s.connect_ex(address)
            crowd.append(s)
        time.sleep(1)
        begin = time.monotonic()
        self.t.ok(self.fleet.db.cli("ls", check=False).returncode == 0 and time.monotonic() - begin < 2,
                  "a thousand silent connections: the daemon serves its own")
        try:
            self.fleet.migrate("vm", "a", "b")
            self.fleet.migrate("vm", "b", "a")
            self.t.ok(True, "a thousand silent connections: a trusted host still gets through")
        except RigError as error:
            self.t.ok(False, "a thousand silent connections: a trusted host still gets through", error)
        for s in crowd:
            s.close()
        stop.set()
        thread.join()
        slow.close()
        self.t.ok(self.fleet.db.proc.poll() is None, "noise at the port: the daemon lives")
        self.unharmed("noise at the port")

        server = self.fleet.b.socket()
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((self.fleet.b.mig_ip, 7100))
        server.listen(8)

        def babble():
            try:
                while True:
                    connection, _ = server.accept()
                    connection.settimeout(5)
                    with connection:
                        try:
                            connection.sendall(noise.randbytes(200000))
                            connection.recv(65536)
                        except OSError:
                            pass
            except OSError:
                pass
        threading.Thread(target=babble, daemon=True).start()
        self.fleet.da.cli("host", "trust", "c", key_of_nobody(self.fleet), "%s:7100" % self.fleet.b.mig_ip)
        self.refused("the address of a host answers with noise", (NET, AUTH, PROTO), host="c")
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        self.refused("nobody at the address of a host", NET, "lifeboatd", host="c")
        self.fleet.da.cli("host", "forget", "c")

    def tampering(self):
        """Somebody in the middle flips, cuts or inserts; the control channel and the bulk connections notice."""
        for kind, after in (("flip", 100), ("flip", 3000), ("flip", 4 << 20), ("cut", 6 << 20), ("insert", 3 << 20)):
            middle = Middle(self.fleet, kind, after)
            self.fleet.da.cli("host", "forget", "b", "--force")
            self.fleet.da.cli("host", "trust", "b", self.keys["b"], "%s:%d" % middle.address)
            self.refused("%s after %d bytes on the way" % (kind, after), (NET, AUTH, PROTO),
                         options=("--bandwidth", "400Mbit", "--compress", "off"))
            self.t.ok(middle.done, "%s after %d bytes: it did happen" % (kind, after))
            middle.close()
        self.fleet.da.cli("host", "forget", "b", "--force")
        self.fleet.da.cli("host", "trust", "b", self.keys["b"], "%s:%d" % (self.fleet.b.mig_ip, PORT))

    def daemons(self):
        self.fleet.db.kill()
        self.refused("no daemon on the destination", NET, "lifeboatd")
        self.fleet.db.start()
        done = self.fleet.a.run([CLI, "--host", self.fleet.da.socket + "-not", "ls"], check=False)
        self.t.ok(done.returncode == NET and "lifeboatd" in done.stderr, "no daemon here: exit %d" % done.returncode, done.stderr)

    def busy(self):
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(self.port("b"))
            s.listen(1)
            self.refused("a unix socket of the VM is in use there", PREFLIGHT, "vm.port", unharmed=False)
        os.unlink(self.port("b"))
        self.unharmed("busy unix socket")
        with self.fleet.b.socket() as s:
            s.bind(("0.0.0.0", TCP_PORT))
            s.listen(1)
            self.refused("a port of the VM is in use there", PREFLIGHT, str(TCP_PORT))

    def files(self):
        os.unlink(self.disk_b)
        self.refused("the disk is missing there", PREFLIGHT, "disk.img", "path =")
        os.mkdir(self.disk_b)
        self.refused("the disk is a folder there", PREFLIGHT, "disk.img")
        os.rmdir(self.disk_b)
        os.symlink(self.disk, self.disk_b)
        guest = os.path.dirname(next(a for a in self.fleet.da.json("show", "vm")["description"]["argv"] if a.endswith("/vmlinuz")))
        self.with_config("path = %s -> %s\n" % (guest, self.fleet.b.dir + "/nowhere"),
                         lambda: self.refused("the kernel file is missing there", PREFLIGHT, "vmlinuz"))
        self.with_config("tap = tap0 -> tap77\n", lambda: self.refused("the tap is missing there", PREFLIGHT, "tap77"))
        self.with_config("emulator = %s -> /nowhere/qemu\n" % self.emulator(),
                         lambda: self.refused("the emulator is missing there", PREFLIGHT, "/nowhere/qemu"))
        self.with_config("nonsense = 1\n", lambda: self.refused("the configuration there is wrong", USAGE, "nonsense"))

    def emulator(self):
        return self.fleet.da.json("show", "vm")["description"]["emulator"]

    def full(self):
        self.with_config("memory-reserve = 900000G\n", lambda: self.refused("no memory there", PREFLIGHT, "memory"))
        script = os.path.join(self.fleet.b.dir, "qemu-broken")
        for how, what in (("echo 'cannot set up guest memory: out of it' >&2; exit 1", "the receiver does not start"),
                          ("sleep 0.3; echo 'cannot set up guest memory: out of it' >&2; kill -9 $$", "the receiver dies at once")):
            with open(script, "w") as f:
                f.write("#!/bin/sh\ncase \"$*\" in *-incoming*) %s;; esac\nexec %s \"$@\"\n" % (how, self.emulator()))
            os.chmod(script, 0o755)
            self.with_config("emulator = %s -> %s\n" % (self.emulator(), script),
                             lambda: self.refused(what, HV, "out of it"))

    def receiver_unknown(self):
        """The destination's session dies when it has started a QEMU and could not yet write down which."""
        script, born = (os.path.join(self.fleet.b.dir, name) for name in ("qemu-still", "born"))
        with open(script, "w") as f:
            # It stands still as soon as it has a control socket, so that nobody gets an answer there.
            f.write("#!/bin/sh\nhold() {\n    while [ ! -S %s ] && [ -d /proc/$$ ]; do :; done\n    kill -STOP $$\n"
                    "    echo $$ >%s.new\n    mv %s.new %s\n}\ncase \"$*\" in *-incoming*) hold & ;; esac\nexec %s \"$@\"\n" %
                    (os.path.join(self.fleet.db.state, "vms", "vm", "qmp.sock"), born, born, born, self.emulator()))
        os.chmod(script, 0o755)

        def die():
            command = Command(self.fleet.da, "migrate", "vm", "b", "--json")
            wait_for(lambda: os.path.exists(born), 20, "a receiver being started", 0.005)
            os.kill(self.fleet.db.session_pids()[0], signal.SIGKILL)
            self.failed("the destination's session dies with a receiver that nobody knows", command.error(20), NET)
        self.with_config("emulator = %s -> %s\n" % (self.emulator(), script), die)
        with open(born) as f:
            pid = int(f.read())
        try:
            wait_for(lambda: ended(pid), 10, "", 0.1)
        except RigError:
            pass
        self.t.ok(ended(pid), "the receiver that nobody knew is ended")
        self.unharmed("a receiver that nobody knew")

    def names_there(self):
        self.fleet.db.cli("run", "vm", "--", "qemu-system-x86_64", "-nodefaults", "-display", "none", "-machine", "none")
        self.refused("the name is taken there", PREFLIGHT, "vm", unharmed=False)
        self.t.equal(sorted(self.fleet.db.vms()), ["vm"], "the other VM of that name lives on")
        self.fleet.db.cli("stop", "vm")
        self.unharmed("the name is taken there")

    def paused(self):
        qmp = Qmp(os.path.join(self.fleet.a.dir, "vm.qmp2"))
        qmp.cmd("stop")
        self.refused("the VM is paused", STATE, "paused", unharmed=False)
        self.t.equal(qmp.cmd("query-status")["status"], "paused", "and stays paused")
        qmp.cmd("cont")
        qmp.close()
        self.unharmed("after cont")

    def busy_vm(self):
        command = self.under_way()
        for argv in (("migrate", "vm", "b"), ("stop", "vm"), ("release", "vm")):
            done = self.fleet.da.cli(*argv, "--json", check=False)
            self.failed("%s of a VM that is being migrated" % argv[0], CliError(argv, done.returncode, done.stdout, done.stderr),
                        STATE, "vm")
        done = self.fleet.db.cli("stop", "vm", "--json", check=False)
        self.failed("stop of a receiver", CliError(["stop"], done.returncode, done.stdout, done.stderr), STATE)
        done = self.fleet.db.cli("cancel", "vm", "--json", check=False)
        self.failed("cancel at the destination", CliError(["cancel"], done.returncode, done.stdout, done.stderr), STATE)
        self.fleet.da.cli("cancel", "vm")
        self.failed("cancel", command.error(15), CANCELLED, "cancelled")
        self.unharmed("cancel")
        done = self.fleet.da.cli("cancel", "vm", "--json", check=False)
        self.failed("cancel of nothing", CliError(["cancel"], done.returncode, done.stdout, done.stderr), STATE)

    def interrupted(self):
        """Ctrl-C at the command: the same as a cancel, or the session goes on; never something in between."""
        command = self.under_way()
        command.proc.send_signal(signal.SIGINT)
        code, _, err = command.wait(15)
        self.t.ok(code != 0 and err, "interrupt: exit %d" % code, err)
        time.sleep(0.5)
        if self.fleet.da.session_pids():
            self.t.diag("the session goes on after the interrupt")
            self.fleet.da.cli("cancel", "vm")
        self.unharmed("interrupt")

    def timeout(self):
        begin = time.monotonic()
        self.refused("--timeout", NO_CONVERGE, "--timeout", options=("--timeout", "2s", "--bandwidth", "40Mbit", "--compress", "off"))
        self.t.ok(time.monotonic() - begin < 20, "--timeout ends it in time")

    def receiver_dies(self):
        command = self.under_way()
        os.kill(self.fleet.db.qemu_pids()[0], signal.SIGKILL)
        self.failed("the receiver dies midway", command.error(20), (HV, NET))
        self.unharmed("the receiver dies midway")
        command = self.under_way()
        os.kill(self.fleet.db.session_pids()[0], signal.SIGKILL)
        self.failed("the destination's session dies midway", command.error(20), NET)
        self.unharmed("the destination's session dies midway")

    def link_cut(self):
        """The cable goes: both ends notice by themselves, and both are as before."""
        command = self.under_way()
        self.fleet.b.partition()
        begin = time.monotonic()
        try:
            self.failed("the link is cut", command.error(75), NET)
            self.t.diag("noticed after %.0f s" % (time.monotonic() - begin))
            self.fleet.nothing_left(self.t, "b", "the link is cut: nothing left on the destination though it cannot be told",
                                    timeout_s=75)
        finally:
            self.fleet.b.partition(False)
        self.unharmed("the link is cut")

    def converge(self):
        """A guest faster than the link: given up when nothing may slow it, moved when something may."""
        self.fleet.stop_vm("vm")
        self.fleet.run_vm("a", "vm", memory_mb=256, work="dirty=60:96:random", disk=self.disk)
        self.nonce = self.fleet.wait_guest()["nonce"]
        options = ("--bandwidth", "240Mbit", "--compress", "off", "--max-downtime", "60ms")
        begin = time.monotonic()
        self.refused("a guest faster than the link, --no-throttle", NO_CONVERGE, "max-downtime",
                     options=options + ("--no-throttle",))
        self.t.diag("given up after %.0f s" % (time.monotonic() - begin))
        command, most = Command(self.fleet.da, "migrate", "vm", "b", "--json", *options), 0
        while not command.done():
            done = self.fleet.da.cli("status", "vm", "--json", check=False)
            session = json.loads(done.stdout).get("session") if done.returncode == 0 else None
            most = max(most, ((session or {}).get("progress") or {}).get("throttle_percent", 0))
            time.sleep(0.2)
        code, out, err = command.wait(5)
        self.t.ok(code == 0, "with the throttle it moves", (code, out[-2000:], err))
        self.t.ok(most > 0, "it was throttled: %d %%" % most)
        if code == 0:
            self.t.diag("moved after %s" % out.strip().splitlines()[-1][:300])
            self.fleet.clean(self.t, self.nonce, "and is clean")
            written = self.fleet.guest_status()["pages_written"]
            time.sleep(2)
            rate = (self.fleet.guest_status()["pages_written"] - written) / 256 / 2
            self.t.ok(rate > 30, "and is as fast as before there: %.0f MB/s" % rate)
            self.fleet.nothing_left(self.t, "a", "no throttle, cgroup or process is left where it was")
            self.fleet.migrate("vm", "b", "a")

    def dies(self):
        """Last: the VM itself dies midway."""
        command = self.under_way()
        os.kill(self.fleet.da.qemu_pids()[0], signal.SIGKILL)
        self.failed("the VM dies midway", command.error(20), HV, "died")
        self.fleet.nothing_left(self.t, "b", "the VM dies midway: nothing left on the destination")
        self.t.equal(self.fleet.da.vms()["vm"]["state"], "dead", "and its entry says so")
        self.refused("migrate of a dead VM", STATE, "dead", unharmed=False)
        self.fleet.da.cli("release", "vm")
        self.fleet.nothing_left(self.t, "a", "release leaves nothing of it", sockets=False)


class Middle:
    """A relay before B's port that spoils what A sends on its busiest connection, once."""

    def __init__(self, fleet, kind, after):
        self.kind, self.after, self.done, self.total, self.lock = kind, after, False, 0, threading.Lock()
        self.fleet, self.address = fleet, (fleet.b.mig_ip, 7200)
        self.sockets = []
        self.server = fleet.b.socket()
        self.server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.server.bind(self.address)
        self.server.listen(16)
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        try:
            while True:
                a, _ = self.server.accept()
                b = self.fleet.b.socket()
                b.connect((self.fleet.b.mig_ip, PORT))
                self.sockets += [a, b]
                threading.Thread(target=self.relay, args=(a, b, True), daemon=True).start()
                threading.Thread(target=self.relay, args=(b, a, False), daemon=True).start()
        except OSError:
            pass

    def relay(self, source, sink, spoil):
        try:
            while True:
                data = source.recv(65536)
                if not data:
                    break
                if spoil:
                    data = self.spoil(data)
                    if data is None:
                        break
                sink.sendall(data)
        except OSError:
            pass
        for s in (source, sink):
            try:
                s.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def spoil(self, data):
        with self.lock:
            self.total += len(data)
            if self.done or self.total < self.after:
                return data
            self.done = True
        if self.kind == "flip":
            at = len(data) // 2
            return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1:]
        if self.kind == "insert":
            return data + b"\xff" * 64
        return None

    def close(self):
        for s in [self.server] + self.sockets:
            try:
                s.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            s.close()


def ended(pid):
    try:
        with open("/proc/%d/cmdline" % pid, "rb") as f:
            return not f.read()  # of one that is not yet waited for
    except OSError:
        return True


def key_of_nobody(fleet):
    """A well-formed key that no host has: that of a daemon that lives for a moment."""
    if not hasattr(fleet, "nobody_key"):
        folder = os.path.join(fleet.client.dir, "nobody")
        os.mkdir(folder)

        class Place:
            role, dir, mig_ip = "nobody", folder, CLIENT_IP
            popen, run, pids = fleet.client.popen, fleet.client.run, fleet.client.pids
        daemon = Daemon(Place)
        fleet.nobody_key = daemon.json("host", "id")["key"]
        daemon.kill(signal.SIGTERM)
    return fleet.nobody_key


ORDER = ["options", "names", "trust", "nonsense", "tampering", "daemons", "busy", "files", "full", "receiver_unknown", "names_there",
         "paused", "busy_vm", "interrupted", "timeout", "receiver_dies", "link_cut", "converge", "dies"]


def main():
    with Tap() as t:
        need(t)
        with Fleet("lbbad") as fleet:
            cases = Cases(t, fleet)
            for name in ORDER:
                if sys.argv[1:] and name not in sys.argv[1:]:
                    continue
                begin = time.monotonic()
                getattr(cases, name)()
                t.diag("%s: %.1f s" % (name, time.monotonic() - begin))


if __name__ == "__main__":
    main()
