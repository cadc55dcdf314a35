#!/usr/bin/python3
"""The checkpoint store and QEMU's own ways to disk, side by side in one run: `make bench-checkpoint`.

    lifeboat   `lifeboat suspend`, then `lifeboat resume` (lazy) and `lifeboat resume --eager`
    migrate    `stop`, then `migrate` to a file by exec:cat, fsync, quit; back by migrate-incoming exec:cat
    live       the same without `stop`: the guest runs until the last pages are written
    savevm     `savevm` into the qcow2 disk, fsync, quit; back by -loadvm

Every round takes each tool in turn, with a fresh guest that goes to disk and back twice (Lifeboat: lazy, lazy again twice, eager:
from the second time on a suspend knows what the last lazy resume needed first). Half of the guest's memory is filled: pages of
which half compress and half are random, and Redis' data set; the rest is as the kernel left it. It writes and verifies its disk
meanwhile. Files are written out and dropped from the host's page cache before they are read, as after a reboot.

What is measured, from outside whatever the tool: gone_ms and durable_ms from the command until the process has ended and the data
are on disk; file_bytes (savevm: what the image grew by); cache_bytes that the file occupies in the host's page cache right after;
resume_ms from the command until it has said that the guest runs (QEMU by hand: until its monitor has), packet_ms to the first packet
of the guest's 1 kHz stream at its tap, reply_ms to the answer to a Redis GET of a client that tries all the time, complete_ms until
all memory is there; waited_pages is how often a lazy resume's guest had to wait for a page at first, of needed_pages that it
touched. running_ms is what Lifeboat says of itself: its session's share of resume_ms. Under TCG the time from RESUME to
the first packet is also the guest's code being translated anew, whichever tool brought it back.

Live checkpoints: 20 of a guest that writes 20 and 78 MB/s; pause as the session has it and as the longest gap of the stream during
the command, size of the increments. savevm's pause beside it is that of the rounds above.
"""

import argparse
import errno
import json
import os
import re
import select
import statistics
import subprocess
import sys
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(HERE, "..", "rig")]
from bench_migrate import machine, write_json
from bench_remus import TapStream, percentile
from lifeboat import Fleet
from rig import BUILD, CLIENT_IP, GUEST_IP, GUEST_MAC, RedisLoad, RigError, UDP_PORT, sh, wait_for

SIZES_MB = (256, 1024, 4096)
RATES_MB_PER_S = (20, 78)
CHECKPOINTS = 20
VALUE_BYTES = 1000
TRY_EVERY_S, TRIES_OPEN = 0.005, 8
DISK_MB = 256
TOOLS = ("lifeboat", "migrate", "live", "savevm")
TARGETS = {"resume_ms": 100, "reply_ms": 300, "pause_p50_ms": 20, "file_ratio": 0.6, "suspend_ratio": 1.0}


# ---- the guest ---------------------------------------------------------------------------------------------------------------


def guest_options(host, name, memory_mb, rate, cache_direct=True):
    """Half of its memory: three quarters of that stamped pages, a quarter Redis' data."""
    disk = os.path.join(host.dir, name + ".qcow2")
    if os.path.exists(disk):
        os.unlink(disk)
    sh("qemu-img", "create", "-q", "-f", "qcow2", disk, "%dM" % DISK_MB)
    cache = ",cache.direct=on" if cache_direct else ""
    return disk, {
        "memory_mb": memory_mb,
        "work": "dirty=%d:%d:mixed disk=vda redis udp=%s:%d" % (rate, memory_mb * 3 // 8, CLIENT_IP, UDP_PORT),
        "extra": ["-blockdev", "driver=qcow2,node-name=d0%s,file.driver=file,file.filename=%s" % (cache, disk),
                  "-device", "virtio-blk-pci,drive=d0"]}


def fill_redis(fleet, memory_mb):
    load = RedisLoad(fleet.client, keys=memory_mb * 1000 // 10, value_bytes=VALUE_BYTES, preload=True)
    load.wait_flowing(300)
    report = load.stop()
    if report["lost"]:
        raise RigError("Redis lost requests: %s" % report)
    with fleet.client.socket() as sock:
        sock.settimeout(5)
        sock.connect((GUEST_IP, 6379))
        sock.sendall(b"SET bench here\r\n")
        sock.recv(64)


class FirstReply:
    """A client that wants one GET answered: it tries to connect every few ms, and waits for the answer once a connection is
    there; .wait() -> time.time() of the answer."""

    def __init__(self, fleet):
        self.fleet, self.open, self.poll, self.connected = fleet, {}, select.poll(), None

    def _try(self):
        sock = self.fleet.client.socket()
        sock.setblocking(False)
        if sock.connect_ex((GUEST_IP, 6379)) not in (0, errno.EINPROGRESS):
            sock.close()
            return
        self.open[sock.fileno()] = sock
        self.poll.register(sock, select.POLLOUT)
        if len(self.open) > TRIES_OPEN:
            self._drop(next(iter(self.open)))

    def _drop(self, fd):
        self.poll.unregister(fd)
        self.open.pop(fd).close()
        if self.connected == fd:
            self.connected = None

    def _answered(self, fd, events):
        sock = self.open[fd]
        try:
            if events & select.POLLIN:
                return b"here" in sock.recv(64)
            sock.sendall(b"GET bench\r\n")
        except OSError:
            self._drop(fd)
            return False
        self.poll.modify(fd, select.POLLIN)
        self.connected = fd
        for other in [other for other in self.open if other != fd]:
            self._drop(other)
        return False

    def wait(self, timeout_s):
        end, next_try = time.time() + timeout_s, 0.0
        try:
            while time.time() < end:
                if self.connected is None and time.time() >= next_try:
                    self._try()
                    next_try = time.time() + TRY_EVERY_S
                for fd, events in self.poll.poll(TRY_EVERY_S * 1000):
                    if fd in self.open and self._answered(fd, events):
                        return time.time()
        finally:
            for fd in list(self.open):
                self._drop(fd)
        raise RigError("Redis does not answer within %d s" % timeout_s)


# ---- files -------------------------------------------------------------------------------------------------------------------


def make_durable(path):
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def cached_bytes(path):
    return int(sh("fincore", "-b", "-n", "-o", "RES", path).strip() or 0)


def forget_cached(path):
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def allocated_bytes(path):
    return os.stat(path).st_blocks * 512


# ---- the tools ---------------------------------------------------------------------------------------------------------------


class Tool:
    """A guest that goes to disk and back: start(), { suspend(), resume() }*, stop()."""

    modes = ("resume", "resume")

    def __init__(self, fleet, name, memory_mb):
        self.fleet, self.name, self.memory_mb = fleet, name, memory_mb
        self.disk, self.options = guest_options(fleet.a, name, memory_mb, 0, cache_direct=name != "savevm")
        self.stream = None


class LifeboatTool(Tool):
    modes = ("lazy", "lazy again", "lazy again", "eager")

    def start(self):
        self.fleet.run_vm("a", self.name, **self.options)

    def suspend(self):
        pid = self.fleet.da.qemu_pids()[0]
        watch, start = os.pidfd_open(pid), time.time()
        report = self.fleet.da.json("suspend", self.name, timeout_s=600)
        end = time.time()
        if not select.select([watch], [], [], 0)[0]:
            raise RigError("suspended, and yet process %d is there" % pid)
        os.close(watch)
        self.path = report["path"]
        # The file is on disk before the process is ended.
        return {"gone_ms": (end - start) * 1e3, "durable_ms": (end - start) * 1e3, "session_ms": report["total_ms"],
                "file_bytes": os.path.getsize(self.path), "cache_bytes": cached_bytes(self.path), "file": self.path}

    def resume(self, mode, reply):
        start = time.time()
        command = subprocess.Popen(self.fleet.a.argv([os.path.join(BUILD, "lifeboat"), "--host", self.fleet.da.socket, "resume",
                                                      self.name, "--json"] + (["--eager"] if mode == "eager" else [])),
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        ended = []
        watch = threading.Thread(target=lambda: ended.append((command.wait(), time.time())[1]))
        watch.start()
        try:
            answered = reply.wait(300)
        except RigError:
            command.kill()
            raise RigError("resume: %s\n%s" % (command.communicate(), self.fleet.all_logs()))
        watch.join(300)
        out, error = command.communicate()
        if command.returncode:
            raise RigError("resume: " + error)
        report = json.loads(out)
        wait_for(lambda: self.fleet.da.vms()[self.name]["state"] == "running", 600, "all memory being there", 0.05)
        return start, answered, dict(self.waited() if mode != "eager" else {}, resume_ms=(ended[0] - start) * 1e3,
                                     running_ms=report["running_ms"], complete_ms=(time.time() - start) * 1e3)

    def waited(self):
        """What the session of the last lazy resume says it learned."""
        folder = os.path.join(self.fleet.da.state, "log")
        newest = max((os.path.join(folder, name) for name in os.listdir(folder)), key=os.path.getmtime)
        with open(newest, errors="replace") as log:
            found = re.findall(r"has waited for (\d+) pages, of (\d+)", log.read())
        return {"waited_pages": int(found[-1][0]), "needed_pages": int(found[-1][1])} if found else {}

    def stop(self):
        self.fleet.da.cli("stop", self.name, "--force", check=False)
        wait_for(lambda: not self.fleet.da.qemu_pids(), 10, "the end of QEMU")


class QemuTool(Tool):
    """QEMU by hand; what the subclasses do is save() and the options that bring it back."""

    def __init__(self, fleet, name, memory_mb):
        super().__init__(fleet, name, memory_mb)
        self.path = os.path.join(fleet.a.dir, name + ".vmstate")

    def start(self):
        self.vm = self.fleet.start_qemu(self.fleet.a, self.name, **self.options)

    def suspend(self):
        before, start = allocated_bytes(self.disk), time.time()
        self.save()
        make_durable(self.file())
        durable = time.time()
        size = self.size(before)
        self.vm.qmp.sock.sendall(b'{"execute":"quit"}')
        self.vm.proc.wait(30)
        gone = time.time()
        self.vm.kill()
        return {"gone_ms": (gone - start) * 1e3, "durable_ms": (durable - start) * 1e3, "file_bytes": size,
                "cache_bytes": cached_bytes(self.file()), "file": self.file(),
                "pause_ms": max(self.stream.pauses_ms(1, start, durable), default=None) if self.stream else None}

    def file(self):
        return self.path

    def load(self):
        """What is left to do for it once QEMU is up."""

    def size(self, disk_before):
        return os.path.getsize(self.path)

    def resume(self, mode, reply):
        options = dict(self.options, **self.back())
        start = time.time()
        self.vm = self.fleet.start_qemu(self.fleet.a, self.name, **options)
        self.load()
        resumed = time.time()
        answered = reply.wait(300)
        return start, answered, {"resume_ms": (resumed - start) * 1e3, "complete_ms": (resumed - start) * 1e3}

    def stop(self):
        self.vm.kill()


class MigrateTool(QemuTool):
    live = False

    def save(self):
        if not self.live:
            self.vm.qmp.cmd("stop")
        self._events()
        self.vm.qmp.cmd("migrate-set-parameters", max_bandwidth=100 << 30)
        self.vm.qmp.cmd("migrate", uri="exec:cat > " + self.path)
        self._completed()

    def _events(self):
        self.vm.qmp.cmd("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
        self.vm.qmp.events.clear()

    def _completed(self):
        _, event = self.vm.qmp.wait_event(lambda e: e["event"] == "MIGRATION" and
                                          e["data"]["status"] in ("completed", "failed"), 600)
        if event["data"]["status"] == "failed":
            raise RigError("QEMU's migration to or from the file failed")

    def back(self):
        return {"incoming": "defer"}

    def load(self):
        self._events()
        self.vm.qmp.cmd("migrate-incoming", uri="exec:cat " + self.path)
        self._completed()
        if not self.live:
            self.vm.qmp.cmd("cont")  # saved stopped, it comes back stopped


class LiveTool(MigrateTool):
    live = True


class SavevmTool(QemuTool):
    count = 0  # each its own: one of the same name would take the place of the last

    def save(self):
        self.count += 1
        self.vm.qmp.sock.settimeout(600)
        said = self.vm.qmp.hmp("savevm bench%d" % self.count)
        if said.strip():
            raise RigError("savevm: " + said)

    def file(self):
        return self.disk

    def size(self, disk_before):
        return allocated_bytes(self.disk) - disk_before

    def back(self):
        return {"extra": self.options["extra"] + ["-loadvm", "bench%d" % self.count]}


KINDS = {"lifeboat": LifeboatTool, "migrate": MigrateTool, "live": LiveTool, "savevm": SavevmTool}


# ---- to disk and back --------------------------------------------------------------------------------------------------------


def to_disk_and_back(fleet, tool, mode):
    result = tool.suspend()
    forget_cached(result.pop("file"))
    start, answered, more = tool.resume(mode, FirstReply(fleet))
    first = next((t for t in tool.stream.times if t > start), None)
    return dict(result, mode=mode, packet_ms=(first - start) * 1e3 if first else None, reply_ms=(answered - start) * 1e3, **more)


def turn(fleet, kind, memory_mb):
    """A fresh guest, twice to disk and back."""
    tool, results = KINDS[kind](fleet, kind, memory_mb), []
    try:
        tool.start()
        before = fleet.wait_guest(timeout_s=300)
        fill_redis(fleet, memory_mb)
        tool.stream = TapStream(fleet.a)
        for mode in tool.modes:
            results.append(dict(to_disk_and_back(fleet, tool, mode), tool=kind))
        after = fleet.guest_status(verify_all=True)
    finally:
        if tool.stream:
            tool.stream.stop()
        tool.stop()
    bad = after["bad_pages"] + after["disk_bad"] + after["disk_errors"]
    for result in results:
        result.update(bad=bad, same_guest=after["nonce"] == before["nonce"])
        print("  %5d MB %s" % (memory_mb, line_of(result)), flush=True)
    return results


def number(value, form="%.0f"):
    return "-" if value is None else form % value


def line_of(r):
    return "%-8s %-10s to disk %s ms, %s MB, %s MB of it cached; back: session %s, resume %s, packet %s, reply %s, all there %s ms, waited %s of %s%s" % (
        r["tool"], r["mode"], number(max(r["gone_ms"], r["durable_ms"])), number(r["file_bytes"] / 1e6),
        number(r["cache_bytes"] / 1e6), number(r.get("running_ms")), number(r["resume_ms"]), number(r["packet_ms"]),
        number(r["reply_ms"]), number(r["complete_ms"]), number(r.get("waited_pages")), number(r.get("needed_pages")), "" if r["same_guest"] and not r["bad"] else "  BAD: %d, same guest: %s" % (
            r["bad"], r["same_guest"]))


FIGURES = ("gone_ms", "durable_ms", "session_ms", "file_bytes", "cache_bytes", "running_ms", "packet_ms", "reply_ms", "complete_ms",
           "resume_ms", "pause_ms", "waited_pages", "needed_pages")


def medians(results):
    """{"lifeboat lazy": {figure: median}, ...}; what a tool does not have is left out."""
    found = {}
    for r in results:
        found.setdefault(r["tool"] + ("" if r["mode"] == "resume" else " " + r["mode"]), []).append(r)
    return {key: {figure: statistics.median(r[figure] for r in runs if r.get(figure) is not None) for figure in FIGURES
                  if any(r.get(figure) is not None for r in runs)} for key, runs in found.items()}


# ---- live checkpoints ----------------------------------------------------------------------------------------------------------


def live_checkpoints(fleet, memory_mb, rate, count):
    """The first is whole, the others are increments."""
    name = "live%d" % rate
    _, options = guest_options(fleet.a, name, memory_mb, rate)
    fleet.run_vm("a", name, **options)
    stream, taken = None, []
    try:
        before = fleet.wait_guest(timeout_s=300)
        fill_redis(fleet, memory_mb)
        stream = TapStream(fleet.a)
        for _ in range(count + 1):
            start = time.time()
            report = fleet.da.json("checkpoint", name, timeout_s=600)
            end = time.time()
            taken.append({"pause_ms": report["pause_ms"], "outside_pause_ms": stream.pauses_ms(1, start, end)[0],
                          "file_bytes": report["file_bytes"], "total_ms": (end - start) * 1e3})
        after = fleet.guest_status(verify_all=True)
    finally:
        if stream:
            stream.stop()
        fleet.da.cli("stop", name, "--force", check=False)
    increments, bad = taken[1:], after["bad_pages"] + after["disk_bad"] + after["disk_errors"]
    summary = {"rate_mb_per_s": rate, "count": count, "bad": bad, "same_guest": after["nonce"] == before["nonce"],
               "first_bytes": taken[0]["file_bytes"], "first_ms": taken[0]["total_ms"],
               "increment_bytes": percentile([t["file_bytes"] for t in increments], 0.5),
               "increment_ms": percentile([t["total_ms"] for t in increments], 0.5), "taken": taken}
    for key in ("pause_ms", "outside_pause_ms"):
        for p in (0.5, 0.99):
            summary["%s_p%d" % (key, p * 100)] = percentile([t[key] for t in increments], p)
    print("  %5d MB %d MB/s: pause p50 %.1f, p99 %.1f ms (outside %.1f, %.1f); increments of %.1f MB in %.0f ms, the first %.1f MB "
          "in %.0f ms%s" % (memory_mb, rate, summary["pause_ms_p50"], summary["pause_ms_p99"], summary["outside_pause_ms_p50"],
             summary["outside_pause_ms_p99"], summary["increment_bytes"] / 1e6, summary["increment_ms"],
             summary["first_bytes"] / 1e6, summary["first_ms"], "  BAD: %d" % bad if bad else ""), flush=True)
    return summary


# ---- verdict -------------------------------------------------------------------------------------------------------------------


def ratio(figures, key):
    """Lifeboat's to that of the best of QEMU's."""
    own = figures.get("lifeboat lazy", {}).get(key)
    others = [values[key] for tool, values in figures.items() if not tool.startswith("lifeboat") and key in values]
    return own / min(others) if own is not None and others else None


def judge(case):
    """[(what, value, target)] of one size."""
    figures = case["medians"]
    lazy = figures.get("lifeboat lazy", {})
    rows = [("RESUME lazy, ms", lazy.get("resume_ms"), TARGETS["resume_ms"]),
            ("first reply lazy, ms", lazy.get("reply_ms"), TARGETS["reply_ms"]),
            ("first reply lazy again, ms", figures.get("lifeboat lazy again", {}).get("reply_ms"), TARGETS["reply_ms"]),
            ("suspend, of QEMU's best", ratio(figures, "durable_ms"), TARGETS["suspend_ratio"]),
            ("file, of QEMU's smallest", ratio(figures, "file_bytes"), TARGETS["file_ratio"])]
    return rows + [("pause p50 at %d MB/s, ms" % live["rate_mb_per_s"], live["pause_ms_p50"], TARGETS["pause_p50_ms"])
                   for live in case["live"]]


def print_case(case):
    print("\n%d MB\n%-19s %9s %9s %9s %9s %9s %9s %9s %9s %9s %9s" % (case["memory_mb"], "", "gone", "durable", "file MB", "cached MB",
                                                       "session", "resume", "packet", "reply", "complete", "waited"))
    for tool, v in case["medians"].items():
        print("%-19s %9s %9s %9s %9s %9s %9s %9s %9s %9s %9s" % ((tool,) + tuple(
            number(v[key] / scale if key in v else None) for key, scale in (
                ("gone_ms", 1), ("durable_ms", 1), ("file_bytes", 1e6), ("cache_bytes", 1e6), ("running_ms", 1), ("resume_ms", 1),
                ("packet_ms", 1), ("reply_ms", 1), ("complete_ms", 1), ("waited_pages", 1)))))
    for what, value, target in judge(case):
        if value is not None:
            print("  %-32s %8.2f  target %g: %s" % (what, value, target, "met" if value <= target else "NOT MET"))


def bench_size(memory_mb, arguments):
    case = {"memory_mb": memory_mb, "runs": [], "live": []}
    with Fleet("lbstore", hosts="A") as fleet:
        # What the client knows of the guest's address must not run out while the guest is on disk.
        fleet.client.ip("neigh", "replace", GUEST_IP, "lladdr", GUEST_MAC, "dev", "eth0", "nud", "permanent")
        for _ in range(arguments.runs):
            for kind in arguments.tool:
                case["runs"] += turn(fleet, kind, memory_mb)
        for rate in RATES_MB_PER_S if "lifeboat" in arguments.tool and arguments.checkpoints else ():
            case["live"].append(live_checkpoints(fleet, memory_mb, rate, arguments.checkpoints))
    case["medians"] = medians(case["runs"])
    case["targets"] = [{"what": what, "value": value, "target": target, "met": value is not None and value <= target}
                       for what, value, target in judge(case)]
    return case


def main():
    parser = argparse.ArgumentParser(description="The checkpoint store and QEMU's own ways to disk, side by side.")
    parser.add_argument("--size", type=int, action="append", metavar="MB", help="only guests of this size (default 256, 1024, 4096)")
    parser.add_argument("--runs", type=int, default=3, help="rounds; medians are given (default 3)")
    parser.add_argument("--tool", action="append", choices=TOOLS, help="only these")
    parser.add_argument("--checkpoints", type=int, default=CHECKPOINTS, help="live ones at each rate of writing; 0: none (default 20)")
    parser.add_argument("--out", default=os.path.join(BUILD, "bench", "checkpoint.json"), metavar="FILE")
    arguments = parser.parse_args()
    arguments.tool = arguments.tool or list(TOOLS)
    document = {"what": "to disk and back: Lifeboat and QEMU's own, side by side", "machine": machine(), "targets": TARGETS,
                "runs": arguments.runs, "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "sizes": []}
    if os.getloadavg()[0] > 0.5:
        print("note: something else keeps this machine busy (load %.1f): figures will be worse and scatter" % os.getloadavg()[0])
    for memory_mb in arguments.size or SIZES_MB:
        document["sizes"].append(bench_size(memory_mb, arguments))
        write_json(arguments.out, document)
    for case in document["sizes"]:
        print_case(case)
    print("\nwritten: %s" % os.path.relpath(arguments.out))
    wrong = [r for case in document["sizes"] for r in case["runs"] + case["live"] if r["bad"] or not r["same_guest"]]
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RigError as failure:
        sys.exit("bench: %s" % failure)
