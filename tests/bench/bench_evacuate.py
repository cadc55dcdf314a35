#!/usr/bin/python3
"""A host of a hundred VMs is emptied onto two others: at the concurrency that Lifeboat plans, and at fixed ones, as other systems
have them: `make bench-evacuate`.

    A  ==1 Gbit==>  B    90 tiny guests of 16 to 32 MB (tests/guest/tiny.c) that write nothing, or up to 8 MB/s,
                    C    10 of Linux with 96 MB

Each run takes each concurrency in turn, beginning with another one each time, with fresh guests. All figures but the reported ones
are taken from outside: time_s is that of the command, planning included; wire_bytes the counter of A's migration link; a VM's
downtime from its monitors' events (when the one QEMU stopped it and the other ran it, by QEMU's clock), and of every tenth tiny
guest also from what it sends every 10 ms, as the longest time in which nothing came (so up to 10 ms more than it stood still).

Before all, a small evacuation that is not judged ("first"): links are measured then and kept for some time, and what a migration
costs on these hosts becomes known to them. Else whatever mode came first would be the one to pay for that.
"""

import argparse
import os
import statistics
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(HERE, "..", "rig")]
from bench_migrate import machine, write_json
from bench_remus import percentile
from evacuate import Evacuation, Harbour
from rig import BUILD, RigError

MODES = ("auto", "1", "2", "4", "8")
# (memory in MB, words): what tiny guests do, one after the other
KINDS = ((16, ""), (24, "rate=256K"), (16, "rate=1M hz=20"), (32, "body=text"), (16, "rate=4M hz=50"), (24, "body=random"),
         (32, "rate=512K set=4M"), (16, ""), (32, "rate=8M set=8M hz=50"), (16, "beat hz=100"))
WITHIN = 1.10  # the planned concurrency is the best or at most this much worse


def fill(port, vms):
    """The guests of one turn; every tenth is Linux."""
    linux = vms // 10
    for i in range(vms - linux):
        memory_mb, words = KINDS[i % len(KINDS)]
        port.run_tiny("a", "t%03d" % i, words, memory_mb=memory_mb)
    for i in range(linux):
        port.run_linux("a", "linux%d" % i, i, "calm dirty=1:24:mixed")
    port.wait_all(300)
    return port.names()


def turn(port, vms, mode):
    """One evacuation: its figures."""
    names = fill(port, vms)
    time.sleep(2)  # what has just been started is at rest
    sent, _ = port.a.link_bytes("mig0")
    start = time.time()
    run = Evacuation(port.da, "evacuate", "--yes", "--parallel", mode)
    code, last = run.wait(1800)
    end = time.time()
    wire = port.a.link_bytes("mig0")[0] - sent
    plan, items = run.plan(), [item for item in last.get("items", ()) if item.get("downtime_ms")]
    gaps = [gap * 1e3 for name in names for _, _, gap in port.census.moves(name)]
    beats = [port.beats.longest_gap_ms(name, start, end) for name in names if name in port.beats.arrivals]
    result = {"mode": mode, "ok": code == 0 and bool(last.get("ok")), "time_s": end - start, "elapsed_s": last.get("elapsed_s"),
              "planned_links": {host["name"]: host["link_bytes_per_s"] for host in plan.get("hosts", ())},
              "planned_s": plan.get("makespan_s"), "planned_parallel": plan.get("parallel"), "planned_bytes": plan.get("bytes"),
              "wire_bytes": wire, "moved": len(gaps), "tries": sum(item.get("tries", 1) for item in last.get("items", ())),
              "wrong": port.misplaced({"b", "c"}) + port.damaged()}
    for key, values in (("downtime_ms", gaps), ("beat_gap_ms", beats), ("reported_downtime_ms", [i["downtime_ms"] for i in items])):
        for p in (0.5, 0.99):
            result["%s_p%d" % (key, p * 100)] = percentile(values, p) if values else None
    if not result["ok"]:
        result["said"] = "".join(run.text)[-2000:]
    port.end_all()
    port.da.cli("maintenance", "off")
    return result


def number(value, form="%.1f"):
    return "-" if value is None else form % value


def line_of(r):
    return "%5.1f s (planned %s s, %s at a time), %.0f MB, downtime p50 %s p99 %s ms%s%s" % (
        r["time_s"], number(r["planned_s"]), r["planned_parallel"], r["wire_bytes"] / 1e6, number(r["downtime_ms_p50"]),
        number(r["downtime_ms_p99"]), "" if r["ok"] else "  FAILED: " + r.get("said", "")[-300:],
        "  WRONG: %s" % r["wrong"][:3] if r["wrong"] else "")


def judge(runs):
    """Medians of each mode, and the planned concurrency beside the best fixed one."""
    modes = {}
    for mode in MODES:
        good = [r for r in runs if r["mode"] == mode and r["ok"]]
        if good:
            modes[mode] = {key: statistics.median(r[key] for r in good if r[key] is not None)
                           for key in good[0] if isinstance(good[0][key], (int, float)) and not isinstance(good[0][key], bool)}
    fixed = {mode: figures["time_s"] for mode, figures in modes.items() if mode != "auto"}
    verdict = {}
    if "auto" in modes and fixed:
        best = min(fixed, key=fixed.get)
        verdict = {"best_fixed": best, "ratio_to_best": modes["auto"]["time_s"] / fixed[best], "limit": WITHIN,
                   "faster_than": {mode: took / modes["auto"]["time_s"] for mode, took in fixed.items()}}
        verdict["met"] = verdict["ratio_to_best"] <= WITHIN
    return modes, verdict


def print_table(modes, verdict):
    print("\n%-6s %8s %9s %9s %10s %10s %12s %12s" % ("", "time s", "planned", "wire MB", "down p50", "down p99", "reported p50",
                                                      "beats p99"))
    for mode, f in modes.items():
        print("%-6s %8.1f %9s %9.0f %10s %10s %12s %12s" % (mode, f["time_s"], number(f.get("planned_s")), f["wire_bytes"] / 1e6,
              number(f.get("downtime_ms_p50")), number(f.get("downtime_ms_p99")), number(f.get("reported_downtime_ms_p50")),
              number(f.get("beat_gap_ms_p99"))))
    if verdict:
        print("planned concurrency: %.2f of the time of the best fixed one (%s at a time), limit %.2f: %s; " %
              (verdict["ratio_to_best"], verdict["best_fixed"], WITHIN, "met" if verdict["met"] else "NOT MET") +
              ", ".join("%.2f times as fast as %s at a time" % (v, m) for m, v in verdict["faster_than"].items()))


def main():
    parser = argparse.ArgumentParser(description="Emptying a host of many VMs, at the planned and at fixed concurrency.")
    parser.add_argument("--vms", type=int, default=100, help="a tenth of them Linux (default 100)")
    parser.add_argument("--runs", type=int, default=3, help="rounds; medians are given (default 3)")
    parser.add_argument("--mode", action="append", choices=MODES, help="only these concurrencies")
    parser.add_argument("--link", type=int, default=1000, metavar="MBIT", help="what each host may send (default 1000)")
    parser.add_argument("--out", default=os.path.join(BUILD, "bench", "evacuate.json"), metavar="FILE")
    arguments = parser.parse_args()
    modes = arguments.mode or list(MODES)
    document = {"what": "a host is emptied onto two others, at the planned and at fixed concurrency", "machine": machine(),
                "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "vms": arguments.vms, "link_mbit": arguments.link,
                "runs_per_mode": arguments.runs, "runs": []}
    if os.getloadavg()[0] > 0.5:
        print("note: something else keeps this machine busy (load %.1f): figures will be worse and scatter" % os.getloadavg()[0])
    with Harbour("lbevb", linux=max(1, arguments.vms // 10)) as port:
        port.shape(arguments.link)
        document["first"] = turn(port, max(10, arguments.vms // 5), "auto")
        print("first,  auto %s" % line_of(document["first"]), flush=True)
        for i in range(arguments.runs):
            for mode in modes[i % len(modes):] + modes[:i % len(modes)]:
                document["runs"].append(turn(port, arguments.vms, mode))
                print("run %d, %-4s %s" % (i + 1, mode, line_of(document["runs"][-1])), flush=True)
                document["modes"], document["verdict"] = judge(document["runs"])
                write_json(arguments.out, document)
    print_table(document["modes"], document["verdict"])
    print("\nwritten: %s" % os.path.relpath(arguments.out))
    return 1 if any(not r["ok"] or r["wrong"] for r in document["runs"]) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RigError as failure:
        sys.exit("bench_evacuate: %s" % failure)
