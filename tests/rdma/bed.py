"""Two hosts with RDMA between them: the stage of tests/rdma.

    a  10.78.0.1 ctl --------------------- 10.78.0.2  b      control and TCP
       10.79.0.1 fab, rxe0 ------- rxe0, fab 10.79.0.2       the fabric, MTU 9000
       10.80.0.15 ------ 10.80.0.2 (this machine) ------     to the witness, which is on neither host

Where this machine has no RDMA device, a and b are virtual machines (TCG, one processor each) with Debian's kernel and soft-RoCE.
Their file system is that of this machine, read only, so they run the same programs and this build; /run and /dev/shm are
their own, in memory.  The links are sockets between the two emulators, and each can be cut.  Where this machine has a device, a and b
are two daemons on it that talk through it, and what would cut it for everybody else is left out (Bed.virtual is false).

Leaving the context, or the process, ends all that was started.  Standard library only, and rig.py.
"""

import atexit
import ctypes
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), "..", "rig"))
sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
from agent import Agent
from rig import BUILD, GUEST, Qmp, RigError, cpu_seconds, read_tail, wait_for

HERE = os.path.dirname(os.path.realpath(__file__))
INITRD = os.environ.get("LB_RDMA", os.path.join(BUILD, "rdma")) + "/initrd.img"
BOOT_S = 300
MEMORY_MB = 1536
LINKS = ("ctl", "fab")
MANAGER_QP = 1  # of every port: connections are made through it


PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def die_with_us():
    """For a child, before it becomes a program: it ends with this process, however that ends."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class AgentError(RigError):
    pass


class RemoteAgent:
    """Calls an Agent in a virtual machine through the socket of its virtio-serial port."""

    def __init__(self, path):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(path)
        self._ids, self._lock, self._changed = itertools.count(1), threading.Lock(), threading.Condition()
        self._answers, self._closed = {}, False
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        buffer = b""
        while True:
            try:
                data = self.sock.recv(1 << 20)
            except OSError:
                data = b""
            *lines, buffer = (buffer + data).split(b"\n")
            with self._changed:
                for line in lines:
                    answer = json.loads(line)
                    self._answers[answer["id"]] = answer
                self._closed = not data
                self._changed.notify_all()
            if not data:
                return

    def call(self, method, *args, timeout_s=60):
        number = next(self._ids)
        with self._lock:
            try:
                self.sock.sendall(json.dumps({"id": number, "method": method, "args": args}).encode() + b"\n")
            except OSError as error:
                raise AgentError("%s: %s" % (method, error))
        with self._changed:
            self._changed.wait_for(lambda: number in self._answers or self._closed, timeout_s)
            answer = self._answers.pop(number, None)
        if answer is None:
            raise AgentError("%s%r: %s" % (method, args, "the machine is gone" if self._closed else "no answer in %g s" % timeout_s))
        if "error" in answer:
            raise AgentError("%s%r: %s" % (method, args, answer["error"]))
        return answer["result"]

    def close(self):
        self.sock.close()


class LocalAgent:
    """The same on this machine."""

    def __init__(self):
        self.agent = Agent()

    def call(self, method, *args, timeout_s=60):
        try:
            return getattr(self.agent, method)(*args)
        except OSError as error:
            raise AgentError("%s%r: %s" % (method, args, error))

    def close(self):
        for pid in self.agent.children:
            self.agent.kill(pid)


class Node:
    """A host: run(), start() and call() (methods of Agent) happen there. .ip is for daemons, .fabric_ip is that of .device."""

    def __init__(self, role, agent, directory, ip, fabric_ip, device, port):
        self.role, self.agent, self.dir = role, agent, directory
        self.ip, self.fabric_ip, self.device, self.port = ip, fabric_ip, device, port

    def call(self, method, *args, timeout_s=60):
        return self.agent.call(method, *args, timeout_s=timeout_s)

    def run(self, *argv, check=True, timeout_s=60, env=None):
        """(exit status, output, errors); RigError when it fails and check is set."""
        code, out, err = self.call("run", [str(a) for a in argv], timeout_s, env, timeout_s=timeout_s + 30)
        if check and code != 0:
            raise RigError("%s: %s: %s: %s" % (self.role, " ".join(map(str, argv)),
                                               "not in %g s" % timeout_s if code is None else "exit %d" % code, (err or out).strip()))
        return code, out, err

    def start(self, *argv, log=None, env=None):
        """Starts a program that stays; returns its pid there."""
        return self.call("start", [str(a) for a in argv], log or self.path("started.log"), env)

    def path(self, name):
        return os.path.join(self.dir, name)

    # -- RDMA as the kernel counts it

    def resources(self):
        """{"qp", "cq", "mr", "pd", "cm_id": how many}, of our device, without what the kernel itself holds."""
        return {kind: len(self.users(kind)) for kind in ("qp", "cq", "mr", "pd", "cm_id")}

    def users(self, kind):
        """What programs have of a kind now, one object each."""
        out = self.run("rdma", "-j", "-d", "res", "show", kind)[1]
        return [e for e in (json.loads(out) if out.strip() else []) if e.get("ifname", self.device) == self.device and "pid" in e]

    def registered_bytes(self):
        """How much memory programs have registered now."""
        return sum(int(e.get("mrlen", 0)) for e in self.users("mr"))

    def pairs(self):
        """Numbers of the connected queue pairs of programs."""
        return sorted(e["lqpn"] for e in self.users("qp") if e.get("state") == "RTS")


class Machine(Node):
    """A virtual machine with soft-RoCE. It boots in the background: wait_up() before anything else."""

    def __init__(self, bed, number):
        self.bed, self.number = bed, number
        role = "ab"[number - 1]
        self.base = os.path.join(bed.dir, role)
        super().__init__(role, None, "/run/lb", "10.78.0.%d" % number, "10.79.0.%d" % number, "rxe0", 7007)
        # no_timer_check: on a busy host the kernel finds that its timer does not tick as it should, and gives up.
        words = ["console=ttyS0", "quiet", "panic=-1", "no_timer_check", "lb.agent=" + os.path.join(HERE, "agent.py"),
                 "lb.net0=%s/24" % self.ip, "lb.net1=%s/24" % self.fabric_ip, "lb.net2=10.80.0.15/24"]
        argv = ["qemu-system-x86_64", "-name", "rdma-" + role, "-nodefaults", "-display", "none", "-no-reboot", "-machine", "pc",
                "-accel", "tcg", "-cpu", "max", "-smp", "1", "-m", str(MEMORY_MB),
                "-kernel", os.path.join(GUEST, "vmlinuz-full"), "-initrd", INITRD, "-append", " ".join(words),
                "-serial", "file:%s.console" % self.base, "-qmp", "unix:%s.qmp,server=on,wait=off" % self.base,
                "-fsdev", "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap",
                "-device", "virtio-9p-pci,fsdev=host,mount_tag=host", "-device", "virtio-serial-pci",
                "-chardev", "socket,id=agent,path=%s.agent,server=on,wait=off" % self.base,
                "-device", "virtserialport,chardev=agent,name=lb.agent"]
        for i, link in enumerate(LINKS):
            # The first machine listens, the second connects.
            argv += ["-netdev", "stream,id=%s,server=%s,addr.type=unix,addr.path=%s" %
                     (link, "on" if number == 1 else "off", os.path.join(bed.dir, link)),
                     "-device", "virtio-net-pci,netdev=%s,host_mtu=9000,mac=52:54:00:78:%02x:%02x" % (link, i, number)]
        argv += ["-netdev", "user,id=out,net=10.80.0.0/24", "-device", "virtio-net-pci,netdev=out"]
        with open(self.base + ".log", "wb") as log:
            self.proc = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=die_with_us)
        self.qmp = Qmp(self.base + ".qmp", process=self.proc)

    def wait_up(self):
        """Waits for the agent, and makes the RDMA device."""
        try:
            self.agent = RemoteAgent(self.base + ".agent")
            self.call("write", self.path("up"), "", timeout_s=BOOT_S)
            self.run("rdma", "link", "add", self.device, "type", "rxe", "netdev", "eth1")
        except (OSError, RigError) as error:
            raise RigError("machine %s: %s\n%s\n%s" % (self.role, error, read_tail(self.base + ".console"), read_tail(self.base + ".log")))

    # -- faults

    def cut(self, link, on=True):
        """Pulls the cable out of the interface of a link (LINKS), or plugs it in again: the system there sees that at once."""
        self.qmp.hmp("set_link %s %s" % (link, "off" if on else "on"))

    def interface(self, link, up):
        """As an administrator would: ip link set up or down. The device is made anew then: with soft-RoCE of Linux 6.1 no further
        connection comes about when one was broken off meanwhile."""
        self.run("ip", "link", "set", "eth%d" % LINKS.index(link), "up" if up else "down")
        if up and link == "fab":
            self.device_gone(True)
            self.device_gone(False)

    def device_gone(self, on=True):
        """Takes the RDMA device away under those who use it, or makes it again."""
        if on:
            self.run("rdma", "link", "delete", self.device)
        else:
            self.run("rdma", "link", "add", self.device, "type", "rxe", "netdev", "eth1")

    def lose(self, what=None):
        """What comes in for the RDMA device is lost on its way from now on: "all" of it, "connecting" (what the connection manager
        says), "data" (all but that), or what is for the queue pair of that number; None: nothing."""
        self.run("tc", "qdisc", "del", "dev", "eth1", "ingress", check=False)
        if what is None:
            return
        self.run("tc", "qdisc", "add", "dev", "eth1", "ingress")
        rdma = ["match", "ip", "protocol", "17", "0xff", "match", "ip", "dport", "4791", "0xffff"]

        def rule(pref, pair, action):
            pair = ["match", "u32", "0x%06x" % pair, "0x00ffffff", "at", "32"] if pair is not None else []
            self.run("tc", "filter", "add", "dev", "eth1", "parent", "ffff:", "protocol", "ip", "pref", pref, "u32", *rdma, *pair,
                     "action", action)
        if what == "data":
            rule(1, MANAGER_QP, "pass")
        rule(2, {"all": None, "data": None, "connecting": MANAGER_QP}.get(what, what), "drop")

    def lost(self):
        """How many packets lose() has taken."""
        shown = json.loads(self.run("tc", "-s", "-j", "filter", "show", "dev", "eth1", "parent", "ffff:")[1] or "[]")
        actions = [action for entry in shown for action in entry.get("options", {}).get("actions", [])]
        return sum(action["stats"]["drops"] for action in actions)

    def crash(self):
        """The power fails."""
        self.proc.kill()
        self.proc.wait()

    def close(self):
        if self.proc.poll() is None:
            self.proc.kill()
        self.proc.wait()
        if self.agent:
            self.agent.close()


class LocalNode(Node):
    """A daemon of its own on this machine, whose device both use."""

    def __init__(self, bed, number, device, ip):
        role = "ab"[number - 1]
        super().__init__(role, LocalAgent(), os.path.join(bed.dir, role), ip, ip, device, 7006 + number)
        os.mkdir(self.dir)

    def wait_up(self):
        pass

    def close(self):
        self.agent.close()


def real_device():
    """(device, IPv4 address of its interface) of this machine, the first that has one; None."""
    for name in sorted(os.listdir("/sys/class/infiniband")) if os.path.isdir("/sys/class/infiniband") else []:
        links = json.loads(subprocess.run(["rdma", "-j", "link"], stdout=subprocess.PIPE, text=True, timeout=20).stdout or "[]")
        for link in links:
            if link.get("ifname") != name or link.get("state") != "ACTIVE" or "netdev" not in link:
                continue
            shown = subprocess.run(["ip", "-j", "-4", "addr", "show", "dev", link["netdev"]], stdout=subprocess.PIPE, text=True, timeout=20)
            addresses = [a["local"] for entry in json.loads(shown.stdout or "[]") for a in entry.get("addr_info", [])]
            if addresses:
                return name, addresses[0]
    return None


class Bed:
    """with Bed() as bed: bed.a, bed.b"""

    def __init__(self):
        self.dir = tempfile.mkdtemp(prefix="lbrdma%d-" % os.getpid())
        self.nodes, self._closed, self._owner = [], False, os.getpid()
        atexit.register(self.close)
        if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        begin = time.monotonic()
        try:
            device = real_device()
            self.virtual = device is None
            for number in (1, 2):
                self.nodes.append(Machine(self, number) if self.virtual else LocalNode(self, number, *device))
            self.a, self.b = self.nodes
            for node in self.nodes:
                node.wait_up()
        except BaseException:
            self.close()
            raise
        self.up_s = time.monotonic() - begin  # says how slow the hosts are today

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def cpu_s(self):
        """Processor seconds of both hosts so far: of the emulators, as a virtual machine does not know what it has really got."""
        if self.virtual:
            return sum(cpu_seconds(node.proc.pid) for node in self.nodes)
        return self.nodes[0].call("cpu_s")

    def close(self):
        """Safe to call twice."""
        if self._closed or os.getpid() != self._owner:
            return
        self._closed = True
        atexit.unregister(self.close)
        for node in self.nodes:
            node.close()
        shutil.rmtree(self.dir, ignore_errors=True)
