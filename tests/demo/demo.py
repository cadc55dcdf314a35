#!/usr/bin/python3
"""`make demo`: a running virtual machine moves between two hosts, is protected, outlives the host it runs on, and another that is emptied.

Three hosts, a client and an etcd are network namespaces of this machine. The guest runs Redis. A client uses it over one TCP
connection, each request only after the answer to the one before, and would notice a lost, doubled or wrong answer.

    act 1   lifeboat migrate: host a -> host b -> host a
    act 2   lifeboat protect on host a; host a is killed; host b goes on with the guest, host c keeps the next copy; host a comes
            back and removes what it still has of the guest
    act 3   lifeboat evacuate on the host that runs it now, with two small guests more; lifeboat maintenance off --bring-back

Every command is the real one. At the end a table and a plot (report.py), build/demo/throughput.png. Exits with 1 when an answer
or a write was lost, a connection broke, two copies of the guest were heard, or the guest found a page of its memory changed.
Leaves nothing.
"""

import argparse
import os
import shutil
import subprocess
import sys
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "rig"))
import report
from evacuate import TINY, Console
from lifeboat import CLI, DAEMON
from protect import Cluster
from rig import BUILD, CLIENT_IP, GUEST, GUEST_IP, TOOLS, UDP_PORT, GuestCapture, IncrLoad, RedisLoad, RigError, UdpGap, wait_for

NAME = "web"
MEMORY_MB = 1024
STAMPED_MB, REWRITE_MB_PER_S = 192, 20  # memory the guest rewrites all the time and checks
KEYS, VALUE_BYTES = 60000, 1000
QUIET_S = 2.0                           # before, between and after the migrations
INCRS_PER_S = 200                       # of the second client, while nothing holds its answers back
PROTECTED_S = 4.0                       # of protection before the host dies
SAMPLE_S = 0.1
SMALL = ("small1", "small2")            # guests that only check themselves
STEPS = 11


class Failed(Exception):
    pass


def step(number, text):
    print("\n[%d/%d] %s" % (number, STEPS, text), flush=True)


def say(text):
    print("      " + text, flush=True)


def lifeboat(cluster, role, *words, timeout_s=120):
    """The real command on a host, its output on this terminal."""
    daemon = cluster.daemons[role]
    say("%s# lifeboat %s" % (role, " ".join(words)))
    command = cluster.hosts[role].popen([CLI, "--host", daemon.socket, *words])
    try:
        code = command.wait(timeout_s)
    except subprocess.TimeoutExpired:
        command.kill()
        command.wait()
        raise Failed("`lifeboat %s` did not end in %d s\n%s" % (words[0], timeout_s, cluster.all_logs()))
    if code != 0:
        raise Failed("`lifeboat %s` ended with %d\n%s" % (words[0], code, cluster.all_logs()))


class WireSampler:
    """What all hosts together send over the migration link, ten times a second; .samples: (time, MB/s). Counted at the switch,
    where the counters outlive a host; watcher is any process in the switch's namespace."""

    def __init__(self, watcher, roles):
        self.path, self.ports, self.samples = "/proc/%d/net/dev" % watcher, ["mig-" + role for role in roles], []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _sent(self):
        """A process' view of its namespace's counters costs less than asking `ip`."""
        with open(self.path) as f:
            lines = [line.partition(":") for line in f]
        received = {device.strip(): counters.split()[0] for device, colon, counters in lines if colon}
        return sum(int(received[port]) for port in self.ports)

    def _run(self):
        last_at, last = time.time(), self._sent()
        while not self._stop.wait(SAMPLE_S):
            now, sent = time.time(), self._sent()
            self.samples.append((now, (sent - last) / (now - last_at) / 1e6))
            last_at, last = now, sent

    def stop(self):
        self._stop.set()
        self._thread.join()


class Observers:
    """Who watches a running guest from outside: its 1 kHz stream at the client, where it is heard, the migration link."""

    def __init__(self, cluster):
        self.udp, self.capture = UdpGap(cluster.client), GuestCapture(cluster)
        self.clients, self.wire = [], None
        wait_for(self.capture.snapshot, 10, "the capture")  # it has entered the switch's namespace
        self.wire = WireSampler(self.capture.proc.pid, cluster.hosts)

    def client(self, observer):
        self.clients.append(observer)
        return observer

    def end(self):
        """Returns the hosts on which the guest was heard, one after the other."""
        self.wire.stop()
        self.capture.stop()
        return self.capture.order()

    def kill(self):
        if self.wire:
            self.wire.stop()
        for observer in [self.udp, self.capture] + self.clients:
            if observer.proc.poll() is None:
                observer.proc.kill()


# ---- act 1 ---------------------------------------------------------------------------------------------------------------


def migrate(cluster, source, target, udp):
    """One migration and what it cost, as seen from outside."""
    host = cluster.hosts[source]
    sent = host.link_bytes("mig0")[0]
    start = time.time()
    lifeboat(cluster, source, "migrate", NAME, target)
    end = time.time()
    record = [entry for entry in cluster.daemons[source].json("history")["history"] if entry["direction"] == "out"][-1]
    sent = host.link_bytes("mig0")[0] - sent
    return {"from": source, "to": target, "start": start, "end": end, "rounds": record["rounds"], "wire_bytes": sent,
            "total_ms": (end - start) * 1e3, "downtime_ms": udp.longest_gap_ms(start, end + 0.5)}


def act_one(cluster, watch):
    """There and back, under load. Returns what report.py needs of it."""
    step(4, "A client opens one TCP connection to Redis at %s and fills it with %d MB" % (GUEST_IP, KEYS * VALUE_BYTES / 1e6))
    redis = watch.client(RedisLoad(cluster.client, keys=KEYS, value_bytes=VALUE_BYTES, preload=True))
    redis.wait_flowing(120)
    watch.udp.wait_flowing()
    start = time.time()
    say("Now it sends INCR, SET and GET without a pause, and checks every answer.")
    time.sleep(QUIET_S)
    moves = []
    for number, (source, target) in enumerate((("a", "b"), ("b", "a")), 5):
        step(number, "The guest moves from host %s to host %s while the client goes on" % (source, target))
        moves.append(migrate(cluster, source, target, watch.udp))
        time.sleep(QUIET_S)
    end = time.time()
    return {"start": start, "end": end, "moves": moves, "client": redis.stop(),
            "beats": [line for line in redis.snapshot() if "now" in line]}


# ---- act 2 ---------------------------------------------------------------------------------------------------------------


def protect(cluster, counter):
    """Protection begins on the running guest. Returns what it costs, and which host could take over."""
    step(7, "The guest is protected: another host keeps a copy that can go on at any moment")
    say("40 times a second all that has changed in the guest goes to host b. An answer leaves host a only when host b")
    say("has the state behind it. So no client ever sees an answer that can be forgotten; it waits a little longer for each.")
    say("An etcd, apart from all hosts, decides who may run the guest: never two at a time.")
    start = time.time()
    lifeboat(cluster, "a", "protect", NAME, "--backup", "b,c", "--witness", cluster.witness)
    ready = time.time()
    time.sleep(PROTECTED_S)
    counter.wait_flowing()
    lifeboat(cluster, "a", "top", "--once")

    def measured():
        status = cluster.protection("a", NAME)
        return status if status and status["state"] == "protected" and status["epochs_per_s"] > 0 else None
    # On a machine that is too busy a backup may have been given up meanwhile: then host a finds the next one by itself.
    try:
        status = wait_for(measured, 90, "the guest protected on host a", 0.1)
    except RigError as error:
        raise Failed("%s\n%s" % (error, cluster.all_logs()))
    return {"start": start, "ready": ready, "status": status, "backup": status["host"]}


def host_dies(cluster, watch, counter, backup):
    """Host a is gone at once. Returns when, and what the client saw of it."""
    last = "bc".replace(backup, "")
    step(8, "Host a dies: its cables are pulled and every process on it is killed, QEMU, too")
    say("Host %s hears nothing any more. It waits until host a must have stopped, asks the etcd, and runs the guest." % backup)
    acked, died = counter.acked(), time.time()
    cluster.kill_host(cluster.a)
    try:
        wait_for(lambda: watch.capture.place()[0] == backup, 40, "the guest heard on host " + backup, 0.05)
        counter.wait_flowing(40)
    except RigError as error:
        raise Failed("%s\n%s" % (error, cluster.all_logs()))
    # It includes the answer that was asked for when the host died.
    stall = max(counter.stalls(died), key=lambda stall: stall["stall_ms"])
    say("The client had counted to about %d. It waited %.0f ms for one answer, %d, on the same connection; then it went on."
        % (acked, stall["stall_ms"], stall["value"]))
    role, status = cluster.wait_protected(NAME, 90)
    again = time.time()
    if (role, status["host"]) != (backup, last):
        raise Failed("runs on %s, protected by %s\n%s" % (role, status["host"], cluster.all_logs()))
    say("Host %s has found the next host for a copy by itself:" % backup)
    time.sleep(QUIET_S)
    lifeboat(cluster, backup, "status", NAME)
    return {"died": died, "stall_ms": stall["stall_ms"], "again": again}


def host_returns(cluster, backup):
    """Its disk says that it has the guest; it must not run it, nor keep it."""
    step(9, "Host a comes back. Its disk still says that the guest is its own")

    def left():
        return cluster.leftovers("a", NAME, sockets=False)
    if not left():
        raise Failed("host a has nothing to remove")
    say("There is: " + ", ".join(left()))
    cluster.revive_host(cluster.a)
    back = time.time()
    try:
        wait_for(lambda: not left(), 30, "", 0.05)
    except RigError:
        raise Failed("host a keeps %s\n%s" % (left(), cluster.all_logs()))
    say("After %.1f s it knows that host %s runs the guest, and has removed all it had of it:" % (time.time() - back, backup))
    lifeboat(cluster, "a", "ls")
    lifeboat(cluster, "a", "history", NAME)


# ---- act 3 ---------------------------------------------------------------------------------------------------------------


def run_small(cluster, role, name):
    """A guest without an operating system that checks its memory; returns what it says."""
    console = Console(os.path.join(cluster.dir, name + ".console"))
    cluster.daemons[role].cli("run", name, "--", "qemu-system-x86_64", "-name", name, "-nodefaults", "-display", "none", "-machine", "q35",
                              "-accel", "tcg,tb-size=1", "-m", "64", "-kernel", TINY, "-append", "rate=1M",
                              "-serial", "chardev:com1", "-chardev", "file,id=com1,append=on,path=" + console.path)

    def up():
        console.feed()
        return console.last
    wait_for(up, 60, "the first line of " + name, 0.05)
    return console


def hosts_guests(cluster, role):
    return sorted(name for name, entry in cluster.daemons[role].vms().items() if entry["state"] in ("running", "protected"))


def emptied(cluster, counter, role):
    """The host that runs the guest is emptied, and gets back what it had. Returns how long that took."""
    step(10, "Host %s needs more memory: it is emptied. Two small guests run there, too" % role)
    consoles = [run_small(cluster, role, name) for name in SMALL]
    cluster.wait_protected(NAME, 90)
    begin = time.time()
    lifeboat(cluster, role, "evacuate", "--yes")
    away = time.time()
    if hosts_guests(cluster, role):
        raise Failed("host %s still runs %s" % (role, hosts_guests(cluster, role)))
    via = wait_for(lambda: cluster.primary(NAME), 10, "the guest on another host")
    # On a machine that is too busy it may have been without a backup in that moment; then it was copied.
    if cluster.daemons[via].json("history", NAME)["history"][-1]["direction"] == "failover":
        say("The protected guest was not copied: its backup on host %s has taken over." % via)
    step(11, "Host %s has it, and gets its guests back" % role)
    back = time.time()
    lifeboat(cluster, role, "maintenance", "off", "--bring-back")
    end = time.time()
    if hosts_guests(cluster, role) != sorted((NAME, *SMALL)):
        raise Failed("host %s runs %s\n%s" % (role, hosts_guests(cluster, role), cluster.all_logs()))
    counter.wait_flowing(40)
    cluster.wait_protected(NAME, 90)
    lifeboat(cluster, role, "ls")
    for console in consoles:
        console.feed()
    return {"emptied_s": away - begin, "filled_s": end - back, "stalls": counter.stalls(begin), "via": via,
            "small": [problem for console in consoles for problem in console.problems]}


# ---- both acts under the counting client --------------------------------------------------------------------------------


def act_two(cluster, watch):
    """Protected, killed, taken over, protected again; then act three. Returns what report.py needs of them."""
    counter = watch.client(IncrLoad(cluster.client, rate=INCRS_PER_S, stall_ms=50, log=os.path.join(cluster.dir, "answers")))
    counter.wait_flowing()
    begin = time.time()
    time.sleep(QUIET_S / 2)
    result = protect(cluster, counter)
    result.update(host_dies(cluster, watch, counter, result["backup"]))
    host_returns(cluster, result["backup"])
    counter.wait_flowing()
    result.update(begin=begin, end=time.time(), empty=emptied(cluster, counter, result["backup"]))
    result["client"], result["broken"] = counter.verdict()
    result["answers"] = counter.answers()
    return result


# ---- all of it -----------------------------------------------------------------------------------------------------------


def run(arguments):
    began = time.time()
    print("A virtual machine moves between hosts while a client is using it, and outlives the death of its host and the emptying of another.")
    step(1, "Three hosts a, b, c, a client and an etcd: network namespaces; the link between hosts has %d Mb/s" % arguments.link)
    with Cluster("lbdemo", trust=False) as cluster:
        cluster.shape(arguments.link)
        say("lifeboatd runs on each host. Below, \"a#\" is what an administrator types on host a.")

        step(2, "The hosts learn each other's public key: lifeboat host trust; without it a host answers nobody")
        cluster.trust_all()
        for role, daemon in cluster.daemons.items():
            say("%s  %s" % (role, daemon.json("host", "id")["key"]))

        step(3, "A guest starts on host a: lifeboat run %s -- qemu-system-x86_64 ..., stock QEMU" % NAME)
        at = time.time()
        cluster.run_vm("a", NAME, memory_mb=MEMORY_MB,
                       work="dirty=%d:%d:mixed udp=%s:%d clock redis" % (REWRITE_MB_PER_S, STAMPED_MB, CLIENT_IP, UDP_PORT))
        cluster.wait_guest(timeout_s=120)
        say("Up after %.1f s: %d MB of memory, Redis, %d MB/s of memory rewritten and checked by the guest itself."
            % (time.time() - at, MEMORY_MB, REWRITE_MB_PER_S))
        before = cluster.guest_status(verify_all=True)
        watch = Observers(cluster)
        try:
            moved = act_one(cluster, watch)
            protected = act_two(cluster, watch)
            after = cluster.guest_status(verify_all=True)
            heard = watch.end()
        finally:
            watch.kill()
    if after["nonce"] != before["nonce"]:
        raise Failed("the guest was started anew")
    bad_pages = after["bad_pages"] - before["bad_pages"]
    report.print_table(moved, protected, bad_pages, heard)
    report.draw(watch.wire.samples, moved, protected, arguments.png)
    print("\nThe picture: %s    (%.0f s in all; nothing is left running)" % (os.path.relpath(arguments.png), time.time() - began))
    wrong = report.wrong(moved, protected, bad_pages, heard)
    for line in wrong:
        print("WRONG: " + line)
    return 1 if wrong else 0


def main():
    parser = argparse.ArgumentParser(description="Move a running guest, protect it, kill its host; a client watches.")
    parser.add_argument("--link", type=int, default=1000, metavar="MBIT", help="speed of the migration link (default 1000)")
    parser.add_argument("--png", default=os.path.join(BUILD, "demo", "throughput.png"), metavar="FILE")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("demo: network namespaces need root: sudo make demo")
    tools = [os.path.join(TOOLS, tool) for tool in ("udpgap", "redisload", "incr", "guestcap")]
    missing = [path for path in (CLI, DAEMON, *tools, os.path.join(GUEST, "vmlinuz"), TINY) if not os.path.exists(path)]
    missing += [tool for tool in ("gnuplot", "qemu-system-x86_64", "etcd", "ip", "tc") if not shutil.which(tool)]
    if missing:
        sys.exit("demo: missing: %s (`sudo make demo` installs and builds everything)" % ", ".join(missing))
    try:
        return run(arguments)
    except (RigError, Failed, report.DrawError) as error:
        print("\nThe demo failed: %s" % error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; everything is removed", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
