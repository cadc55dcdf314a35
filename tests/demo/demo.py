#!/usr/bin/python3
"""`make demo`: a running virtual machine moves from host A to host B and back while a client keeps using it.

Two hosts and a client are network namespaces of this machine. The guest runs Redis; the client sends it INCR and SET over one
TCP connection, each request only after the answer to the one before, and would notice a lost, doubled or wrong answer. The two
migrations are the real command line, `lifeboat migrate web HOST`. At the end: a table, a plot, build/demo/throughput.png.

Exits with 1 when a request was lost, the connection broke, or the guest found a page of its memory changed. Leaves nothing.
"""

import argparse
import os
import shutil
import subprocess
import sys
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "rig"))
from lifeboat import CLI, DAEMON, Fleet
from rig import BUILD, CLIENT_IP, GUEST, GUEST_IP, TOOLS, UDP_PORT, RedisLoad, RigError, UdpGap

NAME = "web"
MEMORY_MB = 1024
STAMPED_MB, REWRITE_MB_PER_S = 192, 20  # memory the guest rewrites all the time and checks
KEYS, VALUE_BYTES = 60000, 1000
PAUSE_S = 2.0                           # of quiet before, between and after the migrations
SAMPLE_S = 0.1
STEPS = 6


class Failed(Exception):
    pass


def step(number, text):
    print("\n[%d/%d] %s" % (number, STEPS, text), flush=True)


def say(text):
    print("      " + text, flush=True)


class WireSampler:
    """Bytes each host sends over the migration link, ten times a second; .samples: (time, {role: MB/s})."""

    def __init__(self, hosts_pids):
        self.pids, self.samples = hosts_pids, []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @staticmethod
    def _sent(pid):
        """A process' view of its namespace's counters costs less than asking `ip`."""
        with open("/proc/%d/net/dev" % pid) as f:
            for line in f:
                device, _, counters = line.partition(":")
                if device.strip() == "mig0":
                    return int(counters.split()[8])
        raise RigError("no mig0 in the namespace of process %d" % pid)

    def _run(self):
        last_at, last = time.time(), {role: self._sent(pid) for role, pid in self.pids.items()}
        while not self._stop.wait(SAMPLE_S):
            now, sent = time.time(), {role: self._sent(pid) for role, pid in self.pids.items()}
            self.samples.append((now, {role: (sent[role] - last[role]) / (now - last_at) / 1e6 for role in sent}))
            last_at, last = now, sent

    def stop(self):
        self._stop.set()
        self._thread.join()


def migrate(fleet, source, target, udp):
    """The real command, its progress on this terminal; then what it cost, as seen from outside."""
    daemon, host = fleet.daemons[source], fleet.hosts[source]
    sent = host.link_bytes("mig0")[0]
    say("$ lifeboat migrate %s %s" % (NAME, target))
    sys.stdout.flush()
    start = time.time()
    command = host.popen([CLI, "--host", daemon.socket, "migrate", NAME, target])
    try:
        code = command.wait(120)
    except subprocess.TimeoutExpired:
        command.kill()
        raise Failed("the migration did not end in 120 s\n" + daemon.logs())
    end = time.time()
    if code != 0:
        raise Failed("lifeboat migrate ended with %d\n%s" % (code, fleet.all_logs()))
    record = [entry for entry in daemon.json("history")["history"] if entry["direction"] == "out"][-1]
    sent = host.link_bytes("mig0")[0] - sent
    downtime = udp.longest_gap_ms(start, end + 0.5)
    return {"from": source, "to": target, "start": start, "end": end, "rounds": record["rounds"],
            "wire_bytes": sent, "total_ms": (end - start) * 1e3, "downtime_ms": downtime}


def run(arguments):
    began = time.time()
    print("A virtual machine moves between two hosts while a client is using it.")
    step(1, "Two hosts, a and b, and a client: network namespaces, with a link of %d Mb/s for migrations" % arguments.link)
    with Fleet("lbdemo", trust=False) as fleet:
        fleet.shape(arguments.link)
        say("lifeboatd runs on each host")

        step(2, "The hosts learn each other's public key: lifeboat host trust; without it a host answers nobody")
        fleet.trust_all()
        for role, daemon in fleet.daemons.items():
            say("%s  %s" % (role, daemon.json("host", "id")["key"]))

        step(3, "A guest starts on host a: lifeboat run %s -- qemu-system-x86_64 ..., stock QEMU" % NAME)
        at = time.time()
        fleet.run_vm("a", NAME, memory_mb=MEMORY_MB,
                     work="dirty=%d:%d:mixed udp=%s:%d clock redis" % (REWRITE_MB_PER_S, STAMPED_MB, CLIENT_IP, UDP_PORT))
        udp = UdpGap(fleet.client)
        fleet.wait_guest(timeout_s=120)
        say("up after %.1f s: %d MB of memory, Redis, %d MB/s of memory rewritten and checked by the guest itself"
            % (time.time() - at, MEMORY_MB, REWRITE_MB_PER_S))

        before = fleet.guest_status(verify_all=True)

        step(4, "The client opens one TCP connection to Redis at %s and fills it with %d MB"
             % (GUEST_IP, KEYS * VALUE_BYTES / 1e6))
        redis = RedisLoad(fleet.client, keys=KEYS, value_bytes=VALUE_BYTES, preload=True)
        wire = WireSampler({role: daemon.proc.pid for role, daemon in fleet.daemons.items()})
        try:
            redis.wait_flowing(120)
            udp.wait_flowing()
            load_start = time.time()
            say("now it sends INCR, SET and GET without a pause, and checks every answer")
            time.sleep(PAUSE_S)
            moves = []
            for number, (source, target) in enumerate((("a", "b"), ("b", "a")), 5):
                step(number, "The guest moves from host %s to host %s" % (source, target))
                moves.append(migrate(fleet, source, target, udp))
                time.sleep(PAUSE_S)
            load_end = time.time()
            report = redis.stop()
            after = fleet.guest_status(verify_all=True)
        finally:
            wire.stop()
            for observer in (redis, udp):
                if observer.proc.poll() is None:
                    observer.proc.kill()
        beats = [line for line in redis.snapshot() if "now" in line]
    if after["nonce"] != before["nonce"]:
        raise Failed("the guest was started anew instead of moved")
    bad_pages = after["bad_pages"] - before["bad_pages"]
    print_table(moves, report, bad_pages)
    draw(wire.samples, beats, moves, load_start, load_end, arguments.png)
    print("\nThe picture: %s    (%.0f s in all; nothing is left running)" % (os.path.relpath(arguments.png), time.time() - began))
    return verdict(report, bad_pages)


def print_table(moves, report, bad_pages):
    columns = [("%s -> %s" % (move["from"], move["to"])) for move in moves]
    rows = [("rounds of memory copied", ["%d" % move["rounds"] for move in moves]),
            ("bytes over the link", ["%.1f MB" % (move["wire_bytes"] / 1e6) for move in moves]),
            ("total time", ["%.2f s" % (move["total_ms"] / 1e3) for move in moves]),
            ("downtime, as the client saw it", ["%.1f ms" % move["downtime_ms"] for move in moves])]
    line = "+" + "-" * 36 + ("+" + "-" * 14) * len(columns) + "+"
    print("\n%s\n| %-34s |%s\n%s" % (line, "migration", "".join(" %12s |" % column for column in columns), line))
    for name, values in rows:
        print("| %-34s |%s" % (name, "".join(" %12s |" % value for value in values)))
    print(line)
    width = 15 * len(columns) - 3
    for name, value in (("memory pages found changed", "%d" % bad_pages),
                        ("requests answered", "%d" % (report["requests"] - report["lost"])),
                        ("requests lost or wrongly answered", "%d" % report["lost"]),
                        ("longest wait for an answer", "%.1f ms" % report["longest_ms"]),
                        ("reconnects", "%d" % report["reconnects"]),
                        ("TCP connection kept", "yes" if report["reconnects"] == 0 and report["lost"] == 0 else "NO")):
        print("| %-34s | %*s |" % (name, width, value))
    print(line)


def verdict(report, bad_pages):
    wrong = []
    if report["lost"]:
        wrong.append("%d requests were lost: %s" % (report["lost"], report["first_error"]))
    if report["reconnects"]:
        wrong.append("the connection broke %d times" % report["reconnects"])
    if bad_pages:
        wrong.append("the guest found %d pages of its memory changed" % bad_pages)
    for line in wrong:
        print("WRONG: " + line)
    return 1 if wrong else 0


def draw(samples, beats, moves, start, end, png):
    """The throughput over time: a PNG, and the same small for the terminal."""
    os.makedirs(os.path.dirname(os.path.abspath(png)), exist_ok=True)
    base = os.path.splitext(png)[0]
    # What a sample says was so, on average, since the one before: it is drawn in the middle between the two.
    rates = [((earlier[0] + now[0]) / 2 - start, now[1]["a"] + now[1]["b"]) for earlier, now in zip(samples, samples[1:])
             if start <= now[0] <= end]
    answers = [((earlier["now"] + now["now"]) / 2 - start, now["requests"] / (now["now"] - earlier["now"]))
               for earlier, now in zip(beats, beats[1:]) if start <= now["now"] <= end]
    for name, head, points in (("wire", "MB/s over the migration link", rates),
                               ("requests", "answers of Redis in a second", answers)):
        with open("%s-%s.dat" % (base, name), "w") as f:
            f.write("# seconds, %s\n" % head)
            f.writelines("%.3f %.3f\n" % point for point in points)
    shades = "".join("set object rectangle from %.3f, graph 0 to %.3f, graph 1 fillcolor rgb '#dce9f5' fillstyle solid noborder "
                     "behind\nset label '%s to %s, %.0f ms down' at %.3f, graph 0.97 center\n"
                     % (move["start"] - start, move["end"] - start, move["from"], move["to"], move["downtime_ms"],
                        (move["start"] + move["end"]) / 2 - start) for move in moves)
    common = ("set xrange [0:%.3f]\nset yrange [0:%.1f]\nset y2range [0:%.1f]\nset xlabel 'seconds'\n"
              % (end - start, 1.2 * max(value for _, value in rates), 1.2 * max(value for _, value in answers)))
    plot = ("plot '{0}-wire.dat' using 1:2 with {1} title 'migration link, MB/s', "
            "'{0}-requests.dat' using 1:2 axes x1y2 with {2} title 'client, requests/s'\n")
    script = ("set terminal pngcairo size 1100,520 font 'DejaVu Sans,11'\nset output '%s'\n" % png + common + shades +
              "set title 'A guest under load moves from host a to host b and back'\n"
              "set ylabel 'migration link, MB/s'\nset y2label 'client, requests/s'\nset ytics nomirror\nset y2tics\n"
              "set border linecolor rgb '#606060'\nset key above\n" +
              plot.format(base, "filledcurves y1=0 fillcolor rgb '#7fb2dd' fillstyle transparent solid 0.6",
                          "lines linewidth 2 linecolor rgb '#c0392b'") + "unset output\n")
    columns = max(60, min(110, shutil.get_terminal_size((100, 24)).columns))
    script += ("reset\nset terminal dumb size %d,18 aspect 1\n" % columns + common +
               "set key above\nset ytics nomirror\nset y2tics\n" +
               plot.format(base, "impulses", "points pointtype 'o'"))
    done = subprocess.run(["gnuplot"], input=script, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0 or not os.path.exists(png):
        raise Failed("gnuplot: " + done.stderr.strip())
    print("\n" + "\n".join(line.rstrip() for line in done.stdout.strip("\f\n").splitlines()))


def main():
    parser = argparse.ArgumentParser(description="Move a running guest between two hosts and back, under a client's load.")
    parser.add_argument("--link", type=int, default=1000, metavar="MBIT", help="speed of the migration link (default 1000)")
    parser.add_argument("--png", default=os.path.join(BUILD, "demo", "throughput.png"), metavar="FILE")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("demo: network namespaces need root: sudo make demo")
    missing = [path for path in (CLI, DAEMON, os.path.join(TOOLS, "udpgap"), os.path.join(TOOLS, "redisload"),
                                 os.path.join(GUEST, "vmlinuz")) if not os.path.exists(path)]
    missing += [tool for tool in ("gnuplot", "qemu-system-x86_64", "ip", "tc") if not shutil.which(tool)]
    if missing:
        sys.exit("demo: missing: %s (`sudo make demo` installs and builds everything)" % ", ".join(missing))
    try:
        return run(arguments)
    except (RigError, Failed) as error:
        print("\nThe demo failed: %s" % error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; everything is removed", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
