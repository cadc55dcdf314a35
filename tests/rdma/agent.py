#!/usr/bin/python3
"""What the test does on a host, whether that is this machine or a virtual one: processes, files, and RAM of a QEMU as it is seen
from outside. In a virtual machine it serves calls over a virtio-serial port: agent.py --port NAME, one JSON object a line,
{"id", "method", "args"} -> {"id", "result"} or {"id", "error"}; each call has a thread, so answers come in any order."""

import glob
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), "..", "rig"))
from rig import Qmp

PAGE = 4096


class Agent:
    def __init__(self):
        self.children = {}  # pid: Popen, of start()

    # -- processes

    def run(self, argv, timeout_s=60, env=None):
        """Runs a program: [exit status, output, errors]. One that takes too long is killed, and its status is None."""
        proc = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                text=True, errors="replace", env=dict(os.environ, **(env or {})), start_new_session=True)
        try:
            out, err = proc.communicate(timeout=timeout_s)
            return [proc.returncode, out, err]
        except subprocess.TimeoutExpired:
            os.killpg(proc.pid, signal.SIGKILL)
            out, err = proc.communicate()
            return [None, out, err]

    def start(self, argv, log, env=None):
        """Starts a program that stays; returns its pid."""
        with open(log, "ab") as f:
            proc = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=f, stderr=f,
                                    env=dict(os.environ, **(env or {})), start_new_session=True)
        self.children[proc.pid] = proc
        return proc.pid

    def ended(self, pid):
        """Exit status of what start() has started; None while it runs."""
        return self.children[pid].poll()

    def kill(self, pid, number=signal.SIGKILL):
        """A signal to one process; true when there was one."""
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return False
        if pid in self.children and number == signal.SIGKILL:
            self.children[pid].wait()
        return True

    def processes(self, word):
        """{pid: words of its command line} of processes that have this word among them, or whose program's name begins so."""
        found = {}
        for path in glob.glob("/proc/[0-9]*/cmdline"):
            try:
                with open(path, "rb") as f:
                    argv = f.read().decode(errors="replace").split("\0")[:-1]
            except OSError:
                continue
            if argv and (word in argv or os.path.basename(argv[0]).startswith(word)):
                found[path.split("/")[2]] = argv
        return found

    # -- files

    def read(self, path, last=None):
        """A text file, or its last bytes; None when it is not there."""
        try:
            with open(path, "rb") as f:
                if last:
                    f.seek(max(0, os.fstat(f.fileno()).st_size - last))
                return f.read().decode(errors="replace")
        except OSError:
            return None

    def write(self, path, text):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as f:
            f.write(text)

    def newest(self, pattern, count):
        """The files of that pattern that were written last."""
        return sorted(glob.glob(pattern), key=os.path.getmtime)[-count:]

    def remove(self, path):
        if os.path.exists(path):
            os.unlink(path)

    def qmp(self, path, command):
        """What a QMP command without arguments returns."""
        monitor = Qmp(path, timeout_s=10)
        try:
            return monitor.cmd(command)
        finally:
            monitor.close()

    # -- what a process has

    def pinned_kib(self, pid):
        """Memory that a process has pinned or locked, as its kernel says; None when it is gone."""
        try:
            with open("/proc/%d/status" % pid) as f:
                return sum(int(line.split()[1]) for line in f if line.startswith(("VmPin:", "VmLck:")))
        except OSError:
            return None

    def cpu_s(self):
        """Processor seconds of the whole host, without what is idle."""
        with open("/proc/stat") as f:
            user, nice, system, _, _, irq, softirq = [int(v) for v in f.readline().split()[1:8]]
        return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")

    def cpu_of_s(self, pid, ended_children=False):
        """Of a process, or of those of its children that have ended; 0 when it is gone."""
        try:
            with open("/proc/%d/stat" % pid) as f:
                fields = f.read().rsplit(")", 1)[1].split()
        except OSError:
            return 0.0
        first = 13 if ended_children else 11
        return (int(fields[first]) + int(fields[first + 1])) / os.sysconf("SC_CLK_TCK")

    def _ram(self, pid, size_bytes):
        """(address, file) of the only mapping of a process that has exactly that size; the file is "" of anonymous memory."""
        found = []
        with open("/proc/%d/maps" % pid) as f:
            for line in f:
                span, mode, _, _, _, *name = line.split(None, 5)
                start, end = (int(edge, 16) for edge in span.split("-"))
                if end - start == size_bytes and mode.startswith("rw-"):
                    found.append((start, "".join(name).strip()))
        if len(found) != 1:
            raise ValueError("process %d has %d mappings of %d bytes" % (pid, len(found), size_bytes))
        return found[0]

    def ram_file(self, pid, size_bytes):
        """What the RAM of a QEMU is a mapping of; "" when it is anonymous."""
        return self._ram(pid, size_bytes)[1]

    def ram(self, pid, size_bytes):
        """One digest for each page of the RAM of a QEMU, hexadecimal, 16 digits each. Nobody but this function reads it in
        this way."""
        digests = []
        with open("/proc/%d/mem" % pid, "rb", buffering=0) as f:
            f.seek(self._ram(pid, size_bytes)[0])
            for _ in range(size_bytes // PAGE):
                digests.append(hashlib.blake2b(f.read(PAGE), digest_size=8).hexdigest())
        return "".join(digests)


# ---- over a port -----------------------------------------------------------------------------------------------------


def open_port(name, timeout_s=20):
    """The virtio-serial port of that name: there is no udev that would make links."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        for path in glob.glob("/sys/class/virtio-ports/*/name"):
            with open(path) as f:
                if f.read().strip() == name:
                    return open("/dev/" + path.split("/")[-2], "r+b", buffering=0)
        time.sleep(0.05)
    raise SystemExit("agent.py: no port called " + name)


def serve(port):
    agent, lock = Agent(), threading.Lock()

    def answer(request):
        reply = {"id": request["id"]}
        try:
            reply["result"] = getattr(agent, request["method"])(*request["args"])
        except Exception as error:  # whatever it is, the caller wants to know, and other calls go on
            reply["error"] = "%s: %s" % (type(error).__name__, error)
        data = json.dumps(reply).encode() + b"\n"
        with lock:
            while data:
                data = data[port.write(data):]

    buffer = b""
    while True:
        data = port.read(65536)
        if not data:
            time.sleep(0.01)  # nobody has connected yet, or not any more
            continue
        *lines, buffer = (buffer + data).split(b"\n")
        for line in lines:
            threading.Thread(target=answer, args=(json.loads(line),), daemon=True).start()


if __name__ == "__main__":
    serve(open_port(sys.argv[sys.argv.index("--port") + 1]))
