#!/usr/bin/python3
"""What protection costs, and what it gives: `make bench-remus`.

Cost, per case and rate of epochs: one guest, measured unprotected, then protected at each rate, in the same run. The pause is
given twice: as the session has it (stop to continue), and as somebody sees it who watches the guest's 1 kHz stream where it
leaves QEMU, before it is held: as many of the longest gaps as there were epochs. Work is what a thread of lowest priority in the
guest gets done per second of the machine's clock. Latency is that of a client with one request in flight. Wire bytes are the
counters of the migration link.

Failovers (--failovers N): three hosts, an etcd apart, a Redis client that counts acknowledged INCRs on one connection, a guest
that writes and verifies its disk. N times: kill every process of the host that runs the VM at a random moment, wait until it
runs elsewhere, is protected again, and the killed host has come back and cleaned up. A capture of what leaves each host shows
whether two copies were ever heard.

Soak (--soak MINUTES): protected under load; memory and descriptors of every process at the beginning and at the end.
"""

import argparse
import json
import os
import random
import sys
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "rig"))
from protect import Capture, Cluster, Counter
from rig import BUILD, CLIENT_IP, RedisLoad, RigError, UDP_PORT, wait_for

import socket
import struct

RATES = (10, 20, 40)
# name: (memory MB, work, load by the client)
CASES = {
    "256 MB idle": (256, "spin", None),
    "256 MB 78 MB/s": (256, "spin dirty=78:128:mixed", None),
    "1 GB 78 MB/s": (1024, "spin dirty=78:512:mixed", None),
    "Redis": (512, "spin redis", 60000),  # keys of 1000 bytes in all
}
REDIS_CLIENTS = 16
TARGETS_PAUSE_MS = {"256 MB idle": 4, "256 MB 78 MB/s": 6, "1 GB 78 MB/s": 10}
SO_TIMESTAMPNS = 35
LEASE = "150ms"  # the default


def percentile(values, p):
    values = sorted(values)
    return values[min(len(values) - 1, int(p * len(values)))] if values else None


class TapStream:
    """Arrival times of the guest's 1 kHz stream at its tap, by the kernel's clock: before anything is held."""

    def __init__(self, host, tap="tap0"):
        self.times = []
        # All protocols: only those sockets are served before the hold and the bridge.
        self.sock = host.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        self.sock.bind((tap, 3))
        self.sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        self.sock.settimeout(0.2)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        while not self._stop.is_set():
            try:
                data, ancillary, _, address = self.sock.recvmsg(64, 64)
            except socket.timeout:
                continue
            if address[2] == socket.PACKET_OUTGOING or data[12:14] != b"\x08\0" or data[23] != 17 or \
                    struct.unpack("!H", data[36:38])[0] != UDP_PORT:
                continue
            seconds, nanoseconds = struct.unpack("qq", ancillary[0][2][:16])
            self.times.append(seconds + nanoseconds / 1e9)

    def stop(self):
        self._stop.set()
        self._thread.join()
        self.sock.close()

    def pauses_ms(self, epochs, start, end):
        """The `epochs` longest gaps, less the millisecond there always is."""
        times = [t for t in self.times if start <= t <= end]
        gaps = sorted((b - a for a, b in zip(times, times[1:])), reverse=True)[:max(1, epochs)]
        return [gap * 1e3 - 1 for gap in gaps]


def sample(fleet, seconds, load):
    """Work done and latency over some time of unprotected or protected running, as seen from outside."""
    clients = redis_clients(fleet, load) if load else []
    before, start = fleet.guest_status(), time.time()
    sent = fleet.a.link_bytes("mig0")[0]
    time.sleep(seconds)
    sent = fleet.a.link_bytes("mig0")[0] - sent
    after, end = fleet.guest_status(), time.time()
    report = redis_report(clients) if load else ping(fleet, 40)
    return {"start": start, "end": end, "work_per_s": (after["spun"] - before["spun"]) / (end - start), "wire_bytes": sent,
            "latency_p50_ms": report["p50_ms"], "latency_p99_ms": report["p99_ms"],
            "requests_per_s": report.get("per_second")}


def redis_clients(fleet, keys, preload=False):
    """Connections with one request in flight each, each with keys of its own."""
    clients = []
    for i in range(REDIS_CLIENTS):
        clients.append(RedisLoad(fleet.client, keys=keys // REDIS_CLIENTS, value_bytes=1000, prefix="c%d" % i, preload=preload))
        if preload:
            clients[-1].wait_flowing(120)
    for client in clients:
        client.wait_flowing()
    return clients


def redis_report(clients):
    reports = [client.stop() for client in clients]
    for report in reports:
        if report["lost"] or report["reconnects"]:
            raise RigError("a Redis client lost requests: %s" % report)
    return {"p50_ms": percentile([r["p50_ms"] for r in reports], 0.5), "p99_ms": max(r["p99_ms"] for r in reports),
            "per_second": sum(r["per_second"] for r in reports)}


def ping(fleet, count):
    """Round trips of single requests to the guest's status port: connect, one line, close."""
    times = []
    for _ in range(count):
        at = time.time()
        fleet.guest_status()
        times.append((time.time() - at) * 1e3)
    return {"p50_ms": percentile(times, 0.5), "p99_ms": percentile(times, 0.99)}


def cost_case(cluster, case, rates, seconds):
    memory_mb, work, load = CASES[case]
    name, results = "vm", []
    cluster.run_vm("a", name, memory_mb=memory_mb, work=work + " udp=%s:%d" % (CLIENT_IP, UDP_PORT))
    cluster.wait_guest(timeout_s=120)
    if load:
        redis_report(redis_clients(cluster, load, preload=True))
    stream = TapStream(cluster.a)
    try:
        plain = sample(cluster, seconds, load)
        for rate in rates:
            cluster.protect(name, "a", "b", "--interval", "%dms" % (1000 // rate))
            measured = sample(cluster, seconds, load)
            status = cluster.protection("a", name)
            cluster.da.cli("unprotect", name, timeout_s=60)
            results.append(cost(case, rate, plain, measured, status, stream))
            print_cost(results[-1])
        cluster.stop_vm(name)
    except RigError as error:
        raise RigError("%s: %s\n%s" % (case, error, cluster.all_logs()))
    finally:
        stream.stop()
    return results


def cost(case, rate, plain, measured, status, stream):
    took = measured["end"] - measured["start"]
    epochs = max(1, status["epochs_per_s"] * took)
    outside = stream.pauses_ms(int(epochs), measured["start"], measured["end"])
    raw, wire = status["raw_bytes_per_s"] / max(0.001, status["epochs_per_s"]), measured["wire_bytes"] / epochs
    return {
        "case": case, "rate": rate, "epochs_per_s": status["epochs_per_s"], "stretched": status["stretched"],
        "pause_p50_ms": status["pause_p50_ms"], "pause_p99_ms": status["pause_p99_ms"], "pause_max_ms": status["pause_max_ms"],
        "outside_pause_p50_ms": percentile(outside, 0.5), "outside_pause_p99_ms": percentile(outside, 0.99),
        "dirty_pages": status["dirty_pages"], "raw_bytes_per_epoch": raw, "wire_bytes_per_epoch": wire,
        "wire_ratio": wire / raw if raw else None,
        # Unprotected, Redis leaves nothing to a thread of lowest priority: there the requests tell.
        "work": None if CASES[case][2] else measured["work_per_s"] / plain["work_per_s"],
        "latency_p50_ms": measured["latency_p50_ms"], "latency_p99_ms": measured["latency_p99_ms"],
        "latency_added_p50_ms": measured["latency_p50_ms"] - plain["latency_p50_ms"],
        "latency_added_p99_ms": measured["latency_p99_ms"] - plain["latency_p99_ms"],
        "requests_per_s": measured["requests_per_s"], "unprotected_requests_per_s": plain["requests_per_s"],
        "clock_lag_ms": status["clock_lag_ms"]}


def number(value, form="%.1f"):
    return "-" if value is None else form % value


def print_cost(r):
    print("  %-15s %3d/s: %5.1f/s%s  pause %s / %s / %s ms, outside %s / %s  %5.0f pages  %s of %s KB (%s)  work %s  latency +%s ms"
          % (r["case"], r["rate"], r["epochs_per_s"], " slow" if r["stretched"] else "", number(r["pause_p50_ms"]),
             number(r["pause_p99_ms"]), number(r["pause_max_ms"]), number(r["outside_pause_p50_ms"]),
             number(r["outside_pause_p99_ms"]), r["dirty_pages"], number(r["wire_bytes_per_epoch"] / 1e3, "%.0f"),
             number(r["raw_bytes_per_epoch"] / 1e3, "%.0f"), number(r["wire_ratio"], "%.2f"), number(r["work"], "%.2f"),
             number(r["latency_added_p50_ms"])), flush=True)


# ---- failovers ---------------------------------------------------------------------------------------------------------------


def failovers(count, seed, memory_mb=256):
    """Kill the host that runs the VM, again and again."""
    rng, stalls, took, name = random.Random(seed), [], [], "vm"
    with Cluster("lbfail") as cluster:
        disk = os.path.join(cluster.a.dir, "vm.img")
        with open(disk, "wb") as f:
            f.truncate(64 << 20)
        cluster.run_vm("a", name, memory_mb=memory_mb, disk=disk, work="dirty=20:48:mixed disk=vda clock redis echo")
        before = cluster.wait_guest()
        capture, counter = Capture(cluster), Counter(cluster.client)
        counter.wait_flowing()
        cluster.protect(name, "a", "bc", "--lease", LEASE)
        expected = ["a"]
        for i in range(count):
            role, status = cluster.wait_protected(name)
            time.sleep(rng.uniform(0.2, 1.2))
            counter.wait_flowing()
            at = cluster.crash(role)
            try:
                counter.wait_flowing(20)
            except RigError as error:
                raise RigError("failover %d, from %s to %s: %s\n%s" % (i + 1, role, status["host"], error, cluster.all_logs()))
            stalls.append(counter.stall_ms(at))
            expected.append(status["host"])
            cluster.back(role)
            _, status = cluster.wait_protected(name)
            took.append(status["last_failover_took_ms"])
            if sys.stdout.isatty() or (i + 1) % 10 == 0:
                print("  %d: client p50 %.0f, max %.0f ms" % (i + 1, percentile(stalls, 0.5), max(stalls)), flush=True)
        guest = cluster.guest_status(verify_all=True)
        report, turns = counter.stop(), [turn[0] for turn in capture.stop()]
    return {"count": count, "seed": seed, "client_stall_ms": {"p50": percentile(stalls, 0.5), "p99": percentile(stalls, 0.99),
                                                            "max": max(stalls)},
            "measured_there_ms": {"p50": percentile(took, 0.5), "max": max(took)}, "stalls_ms": [round(s, 1) for s in stalls],
            "acked": report["acked"], "connection_error": report["error"], "two_copies_heard": turns != expected,
            "same_guest": guest["nonce"] == before["nonce"], "bad_pages": guest["bad_pages"], "disk_bad": guest["disk_bad"],
            "disk_verified": guest["disk_verified"]}


# ---- soak ----------------------------------------------------------------------------------------------------------------------


def processes(cluster):
    """{(role, what): (resident KB, descriptors)} of everything that is Lifeboat's, and of QEMU."""
    found = {}
    for role, host in cluster.hosts.items():
        for pid in host.pids():
            try:
                with open("/proc/%d/cmdline" % pid, "rb") as f:
                    argv = f.read().split(b"\0")
                with open("/proc/%d/status" % pid) as f:
                    resident = [int(line.split()[1]) for line in f if line.startswith(("RssAnon", "RssShmem"))]
                program = os.path.basename(argv[0]).decode()
                what = program + (" " + argv[2].decode() if b"--session" in argv else "")
                found[(role, what)] = (sum(resident), len(os.listdir("/proc/%d/fd" % pid)))
            except (OSError, IndexError):
                pass
    return found


def soak(minutes):
    name = "vm"
    with Cluster("lbsoak") as cluster:
        disk = os.path.join(cluster.a.dir, "vm.img")
        with open(disk, "wb") as f:
            f.truncate(64 << 20)
        cluster.run_vm("a", name, memory_mb=512, disk=disk, work="dirty=40:96:mixed disk=vda redis")
        cluster.wait_guest()
        load = RedisLoad(cluster.client, keys=20000, value_bytes=500, rate=200)
        load.wait_flowing()
        cluster.protect(name, "a", "b")
        time.sleep(60)
        first, began = processes(cluster), cluster.protection("a", name)
        series = []
        for _ in range(max(1, int(minutes))):
            time.sleep(60)
            series.append({"%s %s" % key: value for key, value in processes(cluster).items()})
        last, status = processes(cluster), cluster.protection("a", name)
        guest, report = cluster.guest_status(verify_all=True), load.stop()
        if status is None or status["state"] != "protected" or status["session"] != began["session"]:
            raise RigError("the protection did not last: %s\n%s" % (status, cluster.all_logs()))
    growth = {"%s %s" % key: {"resident_kb": [first[key][0], last[key][0]], "descriptors": [first[key][1], last[key][1]]}
              for key in first if key in last}
    return {"minutes": minutes, "epochs": status["epoch"] - began["epoch"], "processes": growth, "series": series,
            "pause_p99_ms": status["pause_p99_ms"], "requests": report["requests"], "lost": report["lost"],
            "reconnects": report["reconnects"], "bad_pages": guest["bad_pages"], "disk_bad": guest["disk_bad"]}


def main():
    parser = argparse.ArgumentParser(description="What protection costs, and what it gives.")
    parser.add_argument("--case", action="append", choices=sorted(CASES), help="only these")
    parser.add_argument("--rate", action="append", type=int, help="epochs a second (default 10, 20, 40)")
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement (default 10)")
    parser.add_argument("--failovers", type=int, default=100, help="0: none (default 100)")
    parser.add_argument("--no-cost", action="store_true", help="failovers or soak alone")
    parser.add_argument("--soak", type=float, default=0, metavar="MINUTES")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--out", default=os.path.join(BUILD, "bench", "remus.json"), metavar="FILE")
    arguments = parser.parse_args()
    result, wrong = {"costs": [], "targets_pause_p50_ms": TARGETS_PAUSE_MS}, []
    os.makedirs(os.path.dirname(arguments.out), exist_ok=True)
    if not arguments.no_cost:
        with Cluster("lbcost", hosts="AB") as cluster:
            for case in arguments.case or CASES:
                result["costs"] += cost_case(cluster, case, arguments.rate or RATES, arguments.seconds)
    if arguments.failovers:
        print("%d failovers, seed %d" % (arguments.failovers, arguments.seed), flush=True)
        r = result["failovers"] = failovers(arguments.failovers, arguments.seed)
        print("  client: p50 %.0f, p99 %.0f, max %.0f ms; %d INCRs acknowledged; %s; two copies heard: %s; bad pages %d, bad blocks %d of %d"
              % (r["client_stall_ms"]["p50"], r["client_stall_ms"]["p99"], r["client_stall_ms"]["max"], r["acked"],
                 r["connection_error"] or "connection kept, none lost", "YES" if r["two_copies_heard"] else "never",
                 r["bad_pages"], r["disk_bad"], r["disk_verified"]))
        if r["connection_error"] or r["two_copies_heard"] or r["bad_pages"] or r["disk_bad"] or not r["same_guest"]:
            wrong.append("failovers")
    if arguments.soak:
        r = result["soak"] = soak(arguments.soak)
        for what, change in r["processes"].items():
            print("  %-28s resident %d -> %d KB, descriptors %d -> %d" % ((what,) + tuple(change["resident_kb"]) +
                                                                        tuple(change["descriptors"])))
        if r["lost"] or r["bad_pages"] or r["disk_bad"]:
            wrong.append("soak")
    with open(arguments.out, "w") as f:
        json.dump(result, f, indent=1)
    print("written: %s" % os.path.relpath(arguments.out))
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RigError as failure:
        sys.exit("bench: %s" % failure)
