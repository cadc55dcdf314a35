#!/usr/bin/python3
"""Lifeboat and QEMU's own migration side by side, in one run: `make bench-migrate`.

A case is a link, a load and a kind of memory. In every case each tool has its turns, tool after tool and round after round, so
that a machine that is slower for a while is slower for all of them:

    round 1:  lifeboat  plain  multifd  multifd-zstd  xbzrle      a turn: a fresh guest on A, then A -> B -> A
    round 2:  plain  multifd  multifd-zstd  xbzrle  lifeboat                                      -> B, until the runs are up
    ...

All figures come from the same places whichever tool migrates: downtime is the longest gap of the guest's 1 kHz UDP stream at a
client outside, bytes are the counters of the source's migration link, bad pages the guest's own check of all its memory. Time is
taken twice: total_with_launch_ms from the command to completion, with the start of the receiving QEMU; total_ms without that
preparation (Lifeboat: total_ms - setup_ms of its result; QEMU: from `migrate`). source_cpu_s is processor time on the source
from the command to completion, the guest's own work included: source QEMU and, for Lifeboat, daemon and session, by a cgroup.

"Best QEMU" is, figure by figure, the best median among its configurations, even when no one of them has them all.
Post-copy is not among them: it gives up the guest when the link fails midway.

Both tools move a guest of the same QEMU. QEMU 7.2 under TCG loses pages of a guest that writes much (see qemu_native.py), so the
cases with the load "busy" run under QEMU 10.0 when tests/trixie/build.sh has made it. A guest that QEMU lost counts with its time
and bytes, which are too low for it, and not with its downtime.

--throughput measures something else: how near an idle migration over an uncapped link comes to raw TCP and to the cipher.
"""

import argparse
import json
import mmap
import os
import platform
import re
import select
import signal
import socket
import statistics
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "rig"))
import qemu_native
from lifeboat import CLI, DAEMON, Fleet
from rig import BUILD, GUEST, TOOLS, RedisLoad, RigError, UdpGap, cpu_seconds, sh, wait_for

CASES = [(link, load, body) for link in (None, 1000)
         for load, body in (("idle", "random"), ("idle", "compressible"), ("busy", "random"), ("busy", "compressible"),
                            ("redis", "mixed"))]
QUICK = [(None, "idle", "random"), (1000, "busy", "compressible"), (1000, "redis", "mixed")]
COMPRESSES = ("compressible", "mixed")
RUNS_PER_TURN = 3
MEMORY_MB, TOUCHED_MB = 1024, 512
# Under the load "redis" half of the touched memory is Redis' data set, the rest is stamped so that it can be verified.
REDIS_KEYS, REDIS_VALUE_BYTES = 200000, 1000
# figure: key in a run's result
FIGURES = ("total_ms", "total_with_launch_ms", "downtime_ms", "wire_bytes", "source_cpu_s")
TARGET_DOWNTIME_MS = 30
QEMU = "qemu-system-x86_64"
NEWER_QEMU = os.path.join(BUILD, "trixie", QEMU)


def case_name(case):
    link, load, body = case
    return "%s/%s/%s" % ("free" if link is None else link, load, body)


# ---- processor time --------------------------------------------------------------------------------------------------------


class HostCpu:
    """Processor time of everything a host's daemon starts, whoever reaps it and however short it lives: a cgroup (v2)."""

    def __init__(self, host):
        self.path = os.path.join(self.root(), "%s-%s" % (host.rig.name, host.role))
        os.mkdir(self.path)

    @staticmethod
    def root():
        with open("/proc/self/mounts") as f:
            for line in f:
                _, where, kind = line.split()[:3]
                if kind == "cgroup2":
                    return where
        raise RigError("no cgroup2 file system is mounted: mount -t cgroup2 none /mnt, or boot with systemd")

    def add(self, pid):
        with open(os.path.join(self.path, "cgroup.procs"), "w") as f:
            f.write(str(pid))

    def seconds(self):
        with open(os.path.join(self.path, "cpu.stat")) as f:
            return int(f.readline().split()[1]) / 1e6

    def remove(self):
        def gone():
            try:
                os.rmdir(self.path)
                return True
            except OSError:
                return False
        try:
            wait_for(gone, 5, "the end of the processes in " + self.path)
        except RigError as error:
            print("# %s" % error, file=sys.stderr)


# ---- the tools ---------------------------------------------------------------------------------------------------------------


class QemuTool:
    """One turn with QEMU's own migration: start(), migrate() any number of times, stop()."""

    def __init__(self, fleet, config, options):
        self.fleet, self.config, self.options, self.vm = fleet, config, options, None

    def start(self):
        self.vm = self.fleet.start_qemu(self.fleet.a, **self.options)

    def migrate(self, udp):
        target = self.fleet.b if self.vm.host is self.fleet.a else self.fleet.a
        self.vm, result = qemu_native.migrate(self.fleet, self.vm, target, self.config, udp, **self.options)
        # Over the same stretch of time as Lifeboat's, which has no "from `migrate`" to begin at.
        result["source_cpu_s"] = result.pop("source_cpu_with_launch_s")
        return result

    def stop(self):
        if self.vm is not None:
            self.vm.kill()


class LifeboatTool:
    """The same with Lifeboat, through its daemons and its command line."""

    turns = 0

    def __init__(self, fleet, cpus, options, extra=()):
        self.fleet, self.cpus, self.options, self.extra = fleet, cpus, options, extra
        LifeboatTool.turns += 1
        self.name, self.role = "vm%d" % LifeboatTool.turns, "a"

    def start(self):
        self.fleet.run_vm("a", self.name, **self.options)

    def migrate(self, udp):
        fleet, source, target = self.fleet, self.role, "b" if self.role == "a" else "a"
        daemon, host = fleet.daemons[source], fleet.hosts[source]
        before = fleet.guest_status(verify_all=True)
        if udp is not None:
            udp.wait_flowing()
            time.sleep(1.0)
        sent, _ = host.link_bytes("mig0")
        cpu, start = self.cpus[source].seconds(), time.time()
        report = fleet.migrate(self.name, source, target, *self.extra)
        end = time.time()
        wait_for(lambda: not daemon.session_pids(), 5, "the end of the session on " + source, 0.005)
        cpu = self.cpus[source].seconds() - cpu
        self.role = target
        result = {"tool": "lifeboat", "total_ms": report["total_ms"] - report["setup_ms"],
                  "total_with_launch_ms": (end - start) * 1e3, "wire_bytes": host.link_bytes("mig0")[0] - sent,
                  "source_cpu_s": cpu, "rounds": report["rounds"],
                  "reported": {key: report.get(key) for key in ("total_ms", "setup_ms", "downtime_ms", "load_ms", "wire_bytes",
                                                                "zero_pages", "raw_pages", "zstd_pages")}}
        if udp is not None:
            result["downtime_ms"] = udp.longest_gap_ms(start, end + 1.0)
            result["quiet_gap_ms"] = udp.longest_gap_ms(start - 1.0, start)
        after = fleet.guest_status(verify_all=True)
        result["bad_pages"] = after["bad_pages"] - before["bad_pages"]
        result["same_guest"] = after["nonce"] == before["nonce"]
        result["clock_steps"] = after["clock_steps"]
        if result["bad_pages"]:
            result["first_bad"] = after["first_bad"]
        return result

    def stop(self):
        """Ends the guest wherever it is: a failed migration must not leave one that answers for the next."""
        for role, pids in self.fleet.qemus().items():
            self.fleet.daemons[role].cli("stop", self.name, check=False)
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
        wait_for(lambda: not any(self.fleet.qemus().values()), 10, "the end of every QEMU")


# ---- cases ---------------------------------------------------------------------------------------------------------------------


def guest_options(load, body, qemu, memory_mb=MEMORY_MB, touched_mb=TOUCHED_MB):
    stamped = touched_mb // 2 if load == "redis" else touched_mb
    return {"work": qemu_native.guest_work(load, body, stamped), "memory_mb": memory_mb, "qemu": qemu}


def qemu_of(load, wanted):
    if wanted:
        return wanted
    return NEWER_QEMU if load == "busy" and os.access(NEWER_QEMU, os.X_OK) else QEMU


def qemu_version(qemu):
    return re.search(r"version (\S+)", sh(qemu, "--version")).group(1)


def run_turn(fleet, tool, load, runs, on_result):
    """A fresh guest, `runs` migrations. A run that fails, as {"failed": why}, or that loses the guest ends the turn."""
    results, udp, redis = [], None, None
    try:
        tool.start()
        udp = UdpGap(fleet.client)
        fleet.wait_guest(timeout_s=180)
        if load == "redis":
            redis = RedisLoad(fleet.client, value_bytes=REDIS_VALUE_BYTES, keys=REDIS_KEYS, preload=True)
            redis.wait_flowing(180)
        for _ in range(runs):
            result = tool.migrate(udp)
            results.append(result)
            if "guest_lost" in result:
                break
    except (RigError, OSError, ValueError, subprocess.TimeoutExpired) as error:
        results.append({"failed": str(error)})
    finally:
        if redis is not None:
            try:
                report = redis.stop()
                for result in results:
                    result.update(redis_lost=report["lost"], redis_reconnects=report["reconnects"])
            except (RigError, subprocess.TimeoutExpired) as error:
                results.append({"failed": str(error)})
        if udp is not None:
            udp.stop()
        tool.stop()
    for result in results:
        on_result(result)
    return results


def run_case(fleet, cpus, case, tools, runs, qemu, extra=()):
    """Every tool's turns, interleaved; {tool: [results]}. extra: options of `lifeboat migrate`."""
    link, load, body = case
    options = guest_options(load, body, qemu)
    results = {tool: [] for tool in tools}
    fleet.shape(link)
    rounds = -(-runs // RUNS_PER_TURN)
    for number in range(rounds):
        turn = number % len(tools)
        for tool in tools[turn:] + tools[:turn]:
            def on_result(result, tool=tool):
                print("  %-24s %-13s %s" % (case_name(case), tool, line_of(result)), flush=True)
            todo = min(RUNS_PER_TURN, runs - number * RUNS_PER_TURN)
            while todo > 0:  # a turn that a lost guest ended goes on with a fresh one
                worker = (LifeboatTool(fleet, cpus, options, extra) if tool == "lifeboat"
                          else QemuTool(fleet, tool, options))
                done = run_turn(fleet, worker, load, todo, on_result)
                results[tool] += done
                todo -= len(done)
    fleet.shape(None)
    return results


def line_of(result):
    if "failed" in result:
        return "failed: " + result["failed"].splitlines()[0]
    lost = "guest_lost" in result
    return "%7.0f ms (%7.0f with launch)  down %s  %7.1f MB  cpu %5.2f s  %s" % (
        result["total_ms"], result["total_with_launch_ms"], "for good " if lost else "%6.1f ms" % result["downtime_ms"],
        result["wire_bytes"] / 1e6, result["source_cpu_s"], "GUEST LOST" if lost else "bad %d" % result["bad_pages"])


def summarize(runs):
    """Medians over the runs that went through."""
    good = [run for run in runs if "failed" not in run]
    summary = {"runs_done": len(good), "runs_failed": len(runs) - len(good)}
    failures = sorted({run["failed"].splitlines()[0] for run in runs if "failed" in run})
    if failures:
        summary["failures"] = failures
    if good:
        for key in FIGURES:
            values = [run[key] for run in good if run[key] is not None]
            if values:
                summary[key] = {"p50": statistics.median(values), "min": min(values), "max": max(values)}
        summary["guests_lost"] = sum("guest_lost" in run for run in good)
        summary["bad_pages"] = sum(run.get("bad_pages", 0) for run in good)
        summary["quiet_gap_ms"] = {"p50": statistics.median(run["quiet_gap_ms"] for run in good)}
        summary["redis_lost"] = max((run.get("redis_lost", 0) for run in good), default=0)
        summary["redis_reconnects"] = max((run.get("redis_reconnects", 0) for run in good), default=0)
    return summary


def judge(case, results, version):
    """What migrate.json says of a case."""
    link, load, body = case
    tools = {tool if tool == "lifeboat" else "qemu-" + tool: summarize(runs) for tool, runs in results.items()}
    entry = {"case": case_name(case), "link_mbit": link, "load": load, "body": body, "guest_qemu": version,
             "compresses": body in COMPRESSES,
             "tools": tools, "best_qemu": {}, "ratios": {}}
    for key in FIGURES:
        found = [(summary[key]["p50"], tool) for tool, summary in tools.items() if tool != "lifeboat" and key in summary]
        if found:
            value, tool = min(found)
            entry["best_qemu"][key] = {"p50": value, "tool": tool}
            if key in tools.get("lifeboat", {}) and value > 0:
                entry["ratios"][key] = tools["lifeboat"][key]["p50"] / value
    own = tools.get("lifeboat", {})
    if "downtime_ms" in own:
        limit = 0.6 if entry["compresses"] else 1.0
        entry["targets"] = {
            "ratio_limit": limit,
            "total_ms": entry["ratios"].get("total_ms", 0) <= limit,
            "wire_bytes": entry["ratios"].get("wire_bytes", 0) <= limit,
            "downtime_ms": own["downtime_ms"]["p50"] <= TARGET_DOWNTIME_MS,
            "bad_pages": own["bad_pages"] == 0,
            "redis": own["redis_lost"] == 0 and own["redis_reconnects"] == 0,
        }
    entry["runs"] = {tool if tool == "lifeboat" else "qemu-" + tool: runs for tool, runs in results.items()}
    return entry


def print_case(entry):
    for tool, summary in entry["tools"].items():
        row = "%-22s %-18s" % (entry["case"], tool)
        if not summary["runs_done"]:
            print(row + " failed: " + summary["failures"][0])
            continue
        down = summary.get("downtime_ms")
        print(row + "%9.0f %9.0f %9s %9s %9.1f %8.2f %5d%s%s" % (
            summary["total_ms"]["p50"], summary["total_with_launch_ms"]["p50"], "%.1f" % down["p50"] if down else "-",
            "%.1f" % down["max"] if down else "-", summary["wire_bytes"]["p50"] / 1e6, summary["source_cpu_s"]["p50"],
            summary["bad_pages"], "  %d failed" % summary["runs_failed"] if summary["runs_failed"] else "",
            "  %d of %d guests lost" % (summary["guests_lost"], summary["runs_done"]) if summary["guests_lost"] else ""))
    ratios = entry["ratios"]
    if ratios:
        met = [key for key, value in entry.get("targets", {}).items() if value is False]
        print("%-22s %-18s%9.2f %9.2f %9.2f %9s %9.2f %8.2f        %s" % (
            "  (QEMU %s)" % entry["guest_qemu"], "lifeboat/best qemu",
            *(ratios.get(key, float("nan")) for key in FIGURES[:3]), "",
            *(ratios.get(key, float("nan")) for key in FIGURES[3:]),
            "beyond target: " + ", ".join(met) if met else "all targets met"))


def print_table(entries):
    print("\n%-22s %-18s%9s %9s %9s %9s %9s %8s %5s" % ("case", "tool", "total ms", "+launch", "down p50", "down max", "wire MB",
                                                       "cpu s", "bad"))
    for entry in entries:
        print_case(entry)


def machine():
    model = ""
    with open("/proc/cpuinfo") as f:
        for line in f:
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return {"cpus": os.cpu_count(), "cpu_model": model, "kernel": platform.release(),
            "accelerator": "tcg", "load_before": os.getloadavg()[0]}


def write_json(path, value):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".new", "w") as f:
        json.dump(value, f, indent=1)
        f.write("\n")
    os.rename(path + ".new", path)


def measured_fleet():
    """A fleet whose daemons, and all they start, are in a cgroup each; (fleet, {role: HostCpu})."""
    fleet = Fleet("lbbench")
    cpus = {}
    try:
        for role, host in fleet.hosts.items():
            cpus[role] = HostCpu(host)
            cpus[role].add(fleet.daemons[role].proc.pid)
    except BaseException:
        close_fleet(fleet, cpus)
        raise
    return fleet, cpus


def close_fleet(fleet, cpus):
    fleet.close()
    for cpu in cpus.values():
        cpu.remove()


def bench(arguments):
    cases = QUICK if arguments.quick else CASES
    if arguments.case:
        cases = [case for case in CASES if any(re.search(want, case_name(case)) for want in arguments.case)]
        if not cases:
            raise RigError("no case matches; there are: " + " ".join(map(case_name, CASES)))
    runs = arguments.runs or (2 if arguments.quick else 5)
    document = {"what": "live migration: Lifeboat and QEMU's own, side by side",
                "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "machine": machine(),
                "guest": {"memory_mb": MEMORY_MB, "touched_mb": TOUCHED_MB, "busy_mb_per_s": 78,
                          "redis_data_set_mb": REDIS_KEYS * REDIS_VALUE_BYTES / 1e6},
                "runs_per_tool_and_case": runs, "lifeboat_options": arguments.lifeboat_option, "cases": []}
    if os.getloadavg()[0] > 0.5:
        print("note: something else keeps this machine busy (load %.1f): figures will be worse and scatter" % os.getloadavg()[0])
    fleet, cpus = measured_fleet()
    try:
        for number, case in enumerate(cases, 1):
            qemu = qemu_of(case[1], arguments.qemu)
            version = qemu_version(qemu)
            print("case %d of %d: %s, %d runs of each tool, guests under QEMU %s"
                  % (number, len(cases), case_name(case), runs, version), flush=True)
            document["cases"].append(judge(case, run_case(fleet, cpus, case, arguments.tool, runs, qemu,
                                                           arguments.lifeboat_option), version))
            write_json(arguments.out or os.path.join(BUILD, "bench", "migrate.json"), document)
    finally:
        close_fleet(fleet, cpus)
    print_table(document["cases"])
    print("\nwritten: %s" % (arguments.out or os.path.join(BUILD, "bench", "migrate.json")))
    own = [entry["tools"]["lifeboat"] for entry in document["cases"] if "lifeboat" in entry["tools"]]
    return 1 if any(summary["runs_failed"] or summary.get("bad_pages") for summary in own) else 0


# ---- throughput ----------------------------------------------------------------------------------------------------------------


BUFFER = 4 << 20


def tcp_sink(address, port, size, fresh):
    """Receives so many bytes, into one buffer over and over or, as a migration must, into fresh memory of that size; prints
    seconds from the first byte to the last."""
    room = size if fresh else BUFFER
    with socket.socket() as listener, mmap.mmap(-1, room) as memory:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(1)
        print("ready", flush=True)
        connection, _ = listener.accept()
        select.select([connection], [], [])
        start, got = time.monotonic(), 0
        with connection, memoryview(memory) as view:
            while got < size:
                at = got % room
                count = connection.recv_into(view[at:min(at + BUFFER, at + size - got, room)])
                if count == 0:
                    return 1
                got += count
        print(time.monotonic() - start, flush=True)
    return 0


def tcp_source(address, port, size):
    with mmap.mmap(-1, size) as memory, socket.socket() as connection:
        block = os.urandom(1 << 20)
        for offset in range(0, size - len(block) + 1, len(block)):
            memory[offset:offset + len(block)] = block
        connection.connect((address, port))
        with memoryview(memory) as view:
            connection.sendall(view)
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)
    return 0


def raw_tcp(fleet, size, fresh):
    """MB/s of one TCP connection from A to B, memory to memory; fresh as in tcp_sink()."""
    own = [sys.executable, os.path.abspath(__file__)]
    where = [fleet.b.mig_ip, "5001", str(size)]
    with fleet.b.popen(own + ["--tcp-sink-fresh" if fresh else "--tcp-sink"] + where, stdout=subprocess.PIPE, text=True) as sink:
        if sink.stdout.readline().strip() != "ready":
            raise RigError("raw TCP: no receiver")
        fleet.a.run(own + ["--tcp-source"] + where)
        took = sink.stdout.readline().strip()
    if not took:
        raise RigError("raw TCP: broke off")
    return size / float(took) / 1e6


def cipher_alone():
    """What bench_bulk measures, on this machine alone: ciphers on one core, raw TCP and bulk connections over loopback."""
    path = os.path.join(BUILD, "tests", "bench", "bench_bulk")
    if not os.access(path, os.X_OK):
        return None
    done = subprocess.run([path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=120)
    if done.returncode != 0:
        raise RigError("bench_bulk: " + done.stderr.strip())
    return json.loads(done.stdout)


def throughput(arguments):
    qemu = qemu_of("idle", arguments.qemu)
    memory_mb, touched_mb = (1024, 512) if arguments.quick else (2048, 1536)
    runs = arguments.runs or (2 if arguments.quick else 6)
    options = guest_options("idle", "random", qemu, memory_mb, touched_mb)
    flavours = {"lifeboat": (), "lifeboat-plaintext": ("--insecure-plaintext",)}
    raw = {"raw-tcp": False, "raw-tcp into fresh memory": True}
    rates = {name: [] for name in list(flavours) + list(raw)}
    failures = []
    fleet, cpus = measured_fleet()
    try:
        for _ in range(-(-runs // RUNS_PER_TURN)):
            size = touched_mb << 20
            for name, extra in flavours.items():
                def on_result(result, name=name):
                    print("  %-20s %s" % (name, line_of(result)), flush=True)
                for result in run_turn(fleet, LifeboatTool(fleet, cpus, options, extra), "idle", RUNS_PER_TURN, on_result):
                    if "failed" in result:
                        failures.append("%s: %s" % (name, result["failed"]))
                        continue
                    size = result["wire_bytes"]
                    rates[name].append(size / result["total_ms"] / 1e3)
            for name, fresh in list(raw.items()) * RUNS_PER_TURN:
                rates[name].append(raw_tcp(fleet, size, fresh))
                print("  %-20s %.0f MB in %.0f ms" % (name, size / 1e6, size / rates[name][-1] / 1e3), flush=True)
    finally:
        close_fleet(fleet, cpus)
    medians = {name: statistics.median(values) for name, values in rates.items() if values}
    alone = cipher_alone() or {}
    for key, value in alone.items():
        if key.startswith("cipher ") and key != "cipher none":
            medians[key + ", one core"] = value["seal_mb_s"]
    limit = min([medians["raw-tcp"], max([v for k, v in medians.items() if k.startswith("cipher ")], default=float("inf"))])
    ratios = {}
    if "lifeboat" in medians:
        ratios["lifeboat"] = medians["lifeboat"] / limit
    if "lifeboat-plaintext" in medians:
        ratios["lifeboat-plaintext"] = medians["lifeboat-plaintext"] / medians["raw-tcp"]
    document = {"what": "an idle guest over an uncapped link: wire bytes by total_ms", "machine": machine(),
                "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "guest": {"memory_mb": memory_mb, "touched_mb": touched_mb, "qemu": qemu_version(qemu)},
                "mb_per_s": rates, "p50_mb_per_s": medians,
                "bench_bulk": alone, "failures": failures, "ratio_to_what_allows": ratios}
    path = arguments.out or os.path.join(BUILD, "bench", "throughput.json")
    write_json(path, document)
    print("\n%-34s %10s   %s" % ("", "MB/s p50", "of what the slower of raw TCP and the cipher allows (plaintext: of raw TCP)"))
    for name, value in medians.items():
        print("%-34s %10.0f   %s" % (name, value, "%.2f" % ratios[name] if name in ratios else ""))
    if not alone:
        print("(the cipher alone is not measured: build/tests/bench/bench_bulk is missing)")
    for line in failures:
        print("failed: " + line)
    print("written: " + path)
    return 1 if failures else 0


def main():
    if len(sys.argv) == 5 and sys.argv[1].startswith("--tcp-"):  # our own ends of the raw TCP copy
        role, address, port, size = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
        if role == "--tcp-source":
            return tcp_source(address, port, size)
        return tcp_sink(address, port, size, role == "--tcp-sink-fresh")
    tools = ["lifeboat"] + list(qemu_native.CONFIGS)
    parser = argparse.ArgumentParser(description="Lifeboat and QEMU's own migration, measured side by side.",
                                     epilog="Cases: " + " ".join(map(case_name, CASES)))
    parser.add_argument("--runs", type=int, help="migrations of each tool in each case (default 5)")
    parser.add_argument("--quick", action="store_true", help="three cases, two runs")
    parser.add_argument("--case", action="append", metavar="REGEX", help="only cases that match; may be repeated")
    parser.add_argument("--tool", nargs="+", choices=tools, default=tools)
    parser.add_argument("--qemu", metavar="PROGRAM", help="of the guests (default: the installed one, and 10.0 for busy ones)")
    parser.add_argument("--lifeboat-option", action="append", default=[], metavar="OPTION",
                        help="of `lifeboat migrate`, such as --lifeboat-option=--compress=zstd (default: none)")
    parser.add_argument("--out", metavar="FILE", help="where the JSON goes (default build/bench/migrate.json)")
    parser.add_argument("--throughput", action="store_true",
                        help="instead: Lifeboat with and without encryption, raw TCP and the cipher, uncapped and idle")
    arguments = parser.parse_args()
    missing = [path for path in (CLI, DAEMON, os.path.join(TOOLS, "udpgap"), os.path.join(TOOLS, "redisload"),
                                 os.path.join(GUEST, "vmlinuz")) if not os.path.exists(path)]
    if missing:
        sys.exit("missing: %s (run `make bench-migrate`, or `make all tools` and tests/guest/build.sh)" % ", ".join(missing))
    try:
        return throughput(arguments) if arguments.throughput else bench(arguments)
    except RigError as error:
        sys.exit("bench_migrate: %s" % error)


if __name__ == "__main__":
    sys.exit(main())
