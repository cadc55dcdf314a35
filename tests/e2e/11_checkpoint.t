#!/usr/bin/python3
"""VMs put away and brought back: suspended and resumed in every way, live checkpoints in a chain, restored, cloned, exported, pruned;
damage, wrong keys, a full disk; kill -9 at every state; a schedule; a VM on a checkpoint's overlay that is migrated and protected.

A nonce that is only in the guest's memory proves that it is the same guest; a mark in its Redis tells one moment from another. Guests
restored beside their original have its address: each of them is on a tap that is a network of its own.

Arguments: only these parts, and of the kills only rows that begin so ("resume/fill"). Without: all parts and the quick rows, with
LB_FULL=1 all rows.
"""

import glob
import json
import os
import re
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), "..", "rig"))
from checkpoint import Harbour, SmallDisk, flip, pss_kb, redis, rss_kb
from lifeboat import Command, EchoLine, need
from protect import Counter, unbroken
from rig import CLIENT_IP, REPO, UDP_PORT, RigError, Tap, wait_for

NAME = "vm"
WORK = "dirty=4:48:mixed disk=vda udp=%s:%d redis echo" % (CLIENT_IP, UDP_PORT)
MEMORY_MB = 192
INCREMENTS = 10
CLONES = 5


class Port:
    """The VM of all parts, on host a; every part leaves it running there."""

    def __init__(self, t, fleet):
        self.t, self.fleet, self.d = t, fleet, fleet.da
        self.connect = fleet.client.socket
        self.disk = fleet.make_disk("vm.img", 64)
        fleet.run_vm("a", NAME, memory_mb=MEMORY_MB, disk=self.disk, work=WORK)
        self.nonce = fleet.wait_guest()["nonce"]
        self.lone = fleet.a.add_lone_tap("lone0")
        wait_for(self.redis_up, 30, "Redis in the guest", 0.1)

    def redis_up(self):
        try:
            return redis(self.connect, "PING") == "+PONG"
        except (OSError, RigError):
            return False

    def clean(self, what, **options):
        return self.fleet.clean(self.t, self.nonce, what, timeout_s=30, **options)

    def refused(self, what, text, *argv):
        """A command that must fail and say why."""
        done = self.d.cli(*argv, check=False)
        return self.t.ok(done.returncode != 0 and text in done.stderr, what, "exit %d: %s%s" % (done.returncode, done.stdout, done.stderr))

    def qemus(self):
        return len(self.d.qemu_pids())

    def checkpoint(self, *options):
        return self.d.json("checkpoint", NAME, *options)

    def back_to(self, ref, *options):
        """The VM ends and begins again at a checkpoint."""
        self.fleet.stop("a", NAME)
        result = self.d.json("restore", ref, *options)
        self.fleet.wait_running("a", NAME)
        return result


# ---- suspended and resumed


def keys(port):
    """{kind: options} of the ways to encrypt."""
    key, phrase = (os.path.join(port.fleet.dir, name) for name in ("key", "phrase"))
    with open(key, "wb") as f:
        f.write(os.urandom(32))
    with open(phrase, "w") as f:
        f.write("a boat for the life of it\n")
    os.chmod(key, 0o600)
    return {"key file": ["--key", key], "passphrase": ["--passphrase-file", phrase]}


def suspended(port, what, *key):
    t, d = port.t, port.d
    result = d.json("suspend", NAME, *key)
    entry = d.vms()[NAME]
    t.ok(entry["state"] == "suspended" and port.qemus() == 0 and os.path.exists(result["path"]) and result["suspend"],
         what + ": suspended, no process, a file", "%s, %s" % (entry, result))
    t.diag("%s: %.0f ms, %.1f MB of %.1f MB" % (what, result["total_ms"], result["file_bytes"] / 1e6, result["raw_bytes"] / 1e6))
    return result


def resumed(port, what, path, *options):
    result = port.d.json("resume", NAME, *options)
    port.t.ok(result["resumed"] and result["running_ms"] > 0, what + ": resumed", result)
    port.fleet.wait_running("a", NAME)
    port.t.ok(port.qemus() == 1 and not os.path.exists(path), what + ": one QEMU, the file is gone", port.d.vms())
    port.t.diag("%s: runs after %.0f ms" % (what, result["running_ms"]))


def part_suspend(port):
    t, fleet, d = port.t, port.fleet, port.d
    counter, echo = Counter(fleet.client), EchoLine(fleet.client)
    counter.wait_flowing()
    for what, options in (("lazy", []), ("eager", ["--eager"]), ("wait", ["--wait"])):
        path = suspended(port, what)["path"]
        if what == "lazy":
            port.refused("a suspended VM is not migrated", "suspended", "migrate", NAME, "b")
            port.refused("nor suspended again", "suspended", "suspend", NAME)
            for words in (["ls"], ["status", NAME]):
                text = d.cli(*words).stdout
                t.ok("suspended" in text, words[0] + " says suspended", text)
        resumed(port, what, path, *options)
        counter.wait_flowing()
        port.clean(what + ": the same guest, memory and disk clean")
    line = echo.stop()
    t.ok(line["error"] is None and line["answered"] > 20, "an echo connection through three suspends", line)
    unbroken(t, counter, "the counting client, too: no acknowledged INCR is lost")
    told = [line["direction"] for line in d.json("history", NAME)["history"]]
    t.ok(told.count("suspend") == 3 and told.count("resume") == 3, "history has them", told)
    port.refused("a running VM is not resumed", "not suspended", "resume", NAME)


def part_encrypted(port):
    t, fleet, d = port.t, port.fleet, port.d
    wrong = os.path.join(fleet.dir, "wrong")
    with open(wrong, "wb") as f:
        f.write(os.urandom(32))
    os.chmod(wrong, 0o600)
    for what, key in keys(port).items():
        path = suspended(port, what, *key)["path"]
        # Of a key file the path is remembered, so that a reboot needs nobody; a passphrase never is.
        if what == "passphrase":
            port.refused(what + ": not without it", "passphrase", "resume", NAME)
        port.refused(what + ": not with a wrong key", "key" if what == "key file" else "passphrase", "resume", NAME, "--key", wrong)
        t.ok(fleet.state("a", NAME) == "suspended" and port.qemus() == 0 and os.path.exists(path),
             what + ": it stays suspended", d.vms())
        with open(path, "rb") as f:
            t.ok(port.nonce.encode() not in f.read(), what + ": the guest's words are not in the file")
        if what == "key file":
            second_reader(port, key + [path])
        resumed(port, what, path, *key)
        port.clean(what + ": the same guest, memory and disk clean")


# ---- a chain


def part_chain(port):
    t, fleet, d = port.t, port.fleet, port.d
    results = []
    for i in range(INCREMENTS + 1):
        redis(port.connect, "SET", "mark", i)
        results.append(port.checkpoint(*(["--label", "first"] if i == 0 else [])))
    full, increments = results[0], results[1:]
    t.ok(not full["increment"] and all(r["increment"] for r in increments), "one full, %d increments" % INCREMENTS,
         [r["increment"] for r in results])
    largest = max(r["file_bytes"] for r in increments)
    t.ok(largest < full["file_bytes"] / 2, "an increment is smaller: %.1f MB, full %.1f MB" % (largest / 1e6, full["file_bytes"] / 1e6),
         [r["file_bytes"] for r in results])
    pauses = sorted(r["pause_ms"] for r in results)
    t.diag("pauses, ms: %s" % ", ".join("%.0f" % p for p in pauses))
    port.clean("the guest went on through all of them, memory and disk clean")
    refs = [r["ref"] for r in results]
    listed = fleet.checkpoints("a", NAME)
    t.ok(set(refs) <= set(listed) and listed[refs[-1]]["depth"] == INCREMENTS + 1, "checkpoint ls has them", listed)
    shown = d.json("checkpoint", "show", refs[-1])
    t.equal((shown["chain"], len(shown["disks"])), (refs[::-1], 1), "checkpoint show names the files and the disk")
    verified = d.json("checkpoint", "verify", refs[-1])
    t.ok(verified["ok"], "checkpoint verify finds them whole", verified)
    second_reader(port, [r["path"] for r in results[::-1]])
    port.refused("not restored over the running one", "already here", "restore", refs[0])
    for i, options in ((1, []), (5, ["--eager"]), (INCREMENTS, ["--wait"])):
        result = port.back_to(refs[i], *options)
        t.equal(redis(port.connect, "GET", "mark"), str(i), "restored to the moment of increment %d" % i)
        port.clean("increment %d: the same guest, memory and disk clean" % i)
        t.diag("restore of %s %s: runs after %.0f ms" % (refs[i], " ".join(options), result["running_ms"]))
    port.refs = refs


def second_reader(port, words):
    """A reader written from FORMAT.md alone agrees; a checkpoint, then what it stands on."""
    reader = os.path.join(REPO, "tests", "reader", "lbc_reader.py")
    done = subprocess.run([sys.executable, reader] + words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    port.t.ok(done.returncode == 0, "the independent reader reads it", done.stdout[-2000:])


def part_beside(port):
    """Another VM out of a checkpoint of one that goes on."""
    t, fleet, d = port.t, port.fleet, port.d
    via = port.lone
    redis(port.connect, "SET", "mark", "before")
    ref = port.checkpoint()["ref"]
    redis(port.connect, "SET", "mark", "after")
    port.refused("not on the tap of the running one", "tap0", "restore", ref, "--as", "twin")
    d.json("restore", ref, "--as", "twin", "--tap", "tap0=lone0")
    fleet.wait_running("a", "twin")
    t.equal((redis(via, "GET", "mark"), redis(port.connect, "GET", "mark")), ("before", "after"), "restored beside the running one")
    fleet.clean(t, port.nonce, "the twin: memory and disk clean", via=via, timeout_s=30)
    port.clean("the original: memory and disk clean")
    twin = port.d.json("show", "twin")
    t.ok(port.d.vms()["twin"]["pid"] != port.d.vms()[NAME]["pid"] and "twin" in json.dumps(twin), "it has a name of its own", twin)
    fleet.stop("a", "twin")


def part_clone(port):
    t, fleet, d = port.t, port.fleet, port.d
    vias = [fleet.a.add_lone_tap("tap0-%d" % (i + 1)) for i in range(CLONES)]
    ref = port.checkpoint()["ref"]
    before = port.qemus()
    result = d.json("clone", ref, str(CLONES), timeout_s=180)
    names = [c["name"] for c in result["clones"]]
    t.equal((sorted(names), port.qemus() - before), (["%s-%d" % (NAME, i + 1) for i in range(CLONES)], CLONES), "five clones run")
    pids = [fleet.pid_of("a", name) for name in names]
    pss, rss = sum(map(pss_kb, pids)), sum(map(rss_kb, pids))
    t.ok(pss < rss * 0.6, "they share memory: %d MB together, %d MB as each sees it" % (pss >> 10, rss >> 10))
    status = [fleet.clean(t, port.nonce, "clone %d: the same guest, memory and disk clean" % (i + 1), via=via, timeout_s=30)
              for i, via in enumerate(vias)]
    for i, via in enumerate(vias):
        redis(via, "SET", "who", i)
    t.equal([redis(via, "GET", "who") for via in vias], [str(i) for i in range(CLONES)], "each has memory of its own")
    disks = [json.dumps(d.json("show", name)["description"]["disks"]) for name in names]
    t.equal(len(set(disks)), CLONES, "and a disk of its own")
    time.sleep(0.5)
    later = [fleet.guest_status(via=via, timeout_s=30) for via in vias]
    t.ok(all(b["disk_verified"] > a["disk_verified"] for a, b in zip(status, later) if a), "which it writes and reads",
         [s["disk_verified"] for s in later])
    port.clean("the original goes on")
    for name in names:
        fleet.stop("a", name)
    port.clean("and is there when they are gone")


def part_catalog(port):
    """What is removed, merged, exported and imported; what is left can be restored."""
    t, fleet, d = port.t, port.fleet, port.d
    refs = []
    for i in range(5):
        redis(port.connect, "SET", "mark", "c%d" % i)
        refs.append(port.checkpoint(*(["--label", "kept"] if i == 1 else []))["ref"])
    folder = os.path.join(fleet.dir, "exported")
    d.json("checkpoint", "export", refs[2], folder)
    would = d.json("checkpoint", "prune", NAME, "--keep", "2", "--dry-run")["would_remove"]
    t.ok(refs[0] in would and refs[2] in would and refs[1] not in would and refs[3] not in would, "prune --dry-run says what goes", would)
    gone = d.json("checkpoint", "rm", refs[3], "--yes")
    t.ok(gone["removed"] == 1 and gone["joined"] == 1, "rm: the one that stands on it is written again", gone)
    gone = d.json("checkpoint", "prune", NAME, "--keep", "2", "--yes")
    left = fleet.checkpoints("a", NAME)
    t.equal([ref for ref in refs if ref in left], [refs[1], refs[2], refs[4]], "prune leaves the latest two and those with a label")
    verified = d.json("checkpoint", "verify", *left)
    t.ok(verified["ok"], "what is left is whole", verified)
    port.clean("the guest noticed nothing of it, its disk is whole")
    for ref, mark in ((NAME + "@kept", "c1"), (refs[4], "c4")):
        port.back_to(ref)
        t.equal(redis(port.connect, "GET", "mark"), mark, "%s can still be restored" % ref)
        port.clean("%s: the same guest, memory and disk clean" % ref)
    imported = d.json("checkpoint", "import", folder, "--as", "guest")
    fleet.stop("a", NAME)
    d.json("restore", imported["ref"])
    fleet.wait_running("a", "guest")
    t.equal(redis(port.connect, "GET", "mark"), "c2", "an exported one is imported and restored")
    port.clean("imported: the same guest, memory and disk clean")
    fleet.stop("a", "guest")
    d.json("restore", refs[4])
    fleet.wait_running("a", NAME)


# ---- what goes wrong


def part_damage(port):
    t, fleet, d = port.t, port.fleet, port.d
    taken = port.checkpoint("--full")
    ref, path, size = taken["ref"], taken["path"], taken["file_bytes"]
    for at in (100, 4096 + 60, size // 2, size - 4096 - 200, size - 10):
        flip(path, at)
        done = d.cli("checkpoint", "verify", ref, "--json", check=False)
        answer = json.loads(done.stdout.splitlines()[-1])
        t.ok(done.returncode != 0 and (answer.get("problems") or answer.get("error")), "a flipped byte at %d is found" % at, answer)
        refused = d.cli("restore", ref, "--as", "bad", "--tap", "tap0=lone0", "--eager", check=False)
        t.ok(refused.returncode != 0 and fleet.state("a", "bad") is None and port.qemus() == 1,
             "and nothing of it is run", refused.stdout + refused.stderr)
        flip(path, at)
    flip(path, size // 2)
    done = d.cli("checkpoint", "verify", ref, check=False)
    t.ok(re.search(r"page", done.stdout) and re.search(r"pc\.ram", done.stdout), "damage is named: block and pages", done.stdout + done.stderr)
    t.diag(done.stdout)
    flip(path, size // 2)
    with open(path, "r+b") as f:
        f.truncate(size - 4096)
        done = d.cli("restore", ref, "--as", "bad", "--tap", "tap0=lone0", check=False)
        t.ok(done.returncode != 0 and fleet.state("a", "bad") is None, "a truncated one is refused", done.stderr)
    os.unlink(path)
    port.clean("the guest goes on")
    first = port.checkpoint("--full")
    second = port.checkpoint()
    flip(first["path"], first["file_bytes"] // 2)
    done = d.cli("checkpoint", "verify", first["ref"], second["ref"], check=False)
    t.ok(done.returncode != 0 and first["ref"] + ": DAMAGED" in done.stdout, "damage of what an increment stands on is found", done.stdout)
    done = d.cli("restore", second["ref"], "--as", "bad", "--tap", "tap0=lone0", "--eager", check=False)
    t.ok(done.returncode != 0 and first["ref"] in done.stderr and fleet.state("a", "bad") is None, "and named when that is restored",
         done.stdout + done.stderr)
    flip(first["path"], first["file_bytes"] // 2)
    os.rename(first["path"], first["path"] + ".away")
    port.refused("a missing parent is named", "parent", "restore", second["ref"], "--as", "bad", "--tap", "tap0=lone0")
    os.rename(first["path"] + ".away", first["path"])


def part_full_disk(port):
    t, fleet, d = port.t, port.fleet, port.d
    small = os.path.join(fleet.dir, "small")
    with open(d.config) as f:
        was = f.read()
    with SmallDisk(small, 8):
        with open(d.config, "a") as f:
            f.write("checkpoint-dir = %s\n" % small)
        d.restart()  # into a namespace where it is mounted
        for words in (["checkpoint", NAME], ["suspend", NAME]):
            done = d.cli(*words, check=False)
            t.ok(done.returncode != 0 and "space" in done.stderr, words[0] + " on a full disk fails and says so", done.stdout + done.stderr)
            fleet.wait_running("a", NAME)
            port.clean(words[0] + " on a full disk: the guest goes on, memory and disk clean")
            left = [n for _, _, names in os.walk(small) for n in names if ".lbc" in n]
            t.ok(not left, words[0] + " on a full disk leaves no file", left)
        with open(d.config, "w") as f:
            f.write(was)
    d.restart()
    t.ok(not glob.glob(port.disk + "*.tmp*"), "nor beside the disk")


# ---- kill -9

TAKE = ["take-opened", "take-copied", "take-paused", "take-written", "take-committed"]
SUSPEND = [p for p in TAKE if p != "take-copied"] + ["suspend-decided"]
RESTORE = ["restore-launched", "restore-loaded", "restore-decided"]
LAZY = RESTORE + ["fill-begun", "fill-half"]
REMOVE = ["rm-rewritten", "rm-unlinked", "rm-joining", "rm-joined"]
VICTIMS = ["session", "daemon", "lifeboat"]
ROWS = ([("checkpoint", p, v) for p in TAKE for v in VICTIMS + ["qemu"]] +
        [("suspend", p, v) for p in SUSPEND for v in VICTIMS] +
        [("resume", p, v) for p in LAZY for v in VICTIMS] +
        [("resume-eager", p, v) for p in RESTORE for v in VICTIMS] +
        [("restore", p, v) for p in LAZY for v in VICTIMS] +
        [("rm", p, v) for p in REMOVE for v in VICTIMS] + [("import", "import-disks", v) for v in VICTIMS])
QUICK = {"checkpoint/take-paused/session", "checkpoint/take-written/lifeboat", "checkpoint/take-committed/session",
         "suspend/take-paused/lifeboat", "suspend/take-written/session", "suspend/take-committed/session",
         "suspend/suspend-decided/lifeboat", "resume/restore-launched/session", "resume/restore-loaded/lifeboat",
         "resume/restore-decided/session", "resume/fill-begun/lifeboat", "resume/fill-half/session", "resume/fill-half/daemon",
         "resume-eager/restore-decided/session", "restore/restore-loaded/session", "restore/fill-half/lifeboat",
         "rm/rm-rewritten/session", "rm/rm-joining/lifeboat", "rm/rm-joined/session", "import/import-disks/session"}


class Kill:
    """A row: the VM is made ready, the command waits at a point, somebody is killed. Soon the VM runs once, or is suspended."""

    def __init__(self, port):
        self.port, self.t, self.fleet, self.d = port, port.t, port.fleet, port.d
        self.pause_file = os.path.join(port.fleet.dir, "paused")
        self.ref = port.checkpoint("--label", "for good")["ref"]
        self.folder = os.path.join(port.fleet.dir, "to-import")
        self.d.cli("checkpoint", "export", self.ref, self.folder)

    def ready(self, how):
        if how == "rm":
            self.doomed = self.port.checkpoint()["ref"]
            self.child = self.port.checkpoint()["ref"]
            return ["checkpoint", "rm", self.doomed, "--yes"]
        if how == "import":
            self.imported = "imported-%d" % len(self.fleet.checkpoints("a"))
            return ["checkpoint", "import", self.folder, "--as", self.imported]
        if how.startswith("resume"):
            self.d.cli("suspend", NAME)
        elif how == "restore":
            self.fleet.stop("a", NAME)
        return {"checkpoint": ["checkpoint", NAME], "suspend": ["suspend", NAME], "resume": ["resume", NAME, "--wait"],
                "resume-eager": ["resume", NAME, "--eager"], "restore": ["restore", self.ref, "--wait"]}[how]

    def strike(self, victim):
        pids = []
        if victim in ("daemon", "lifeboat"):
            pids.append(self.d.proc.pid)
        if victim in ("session", "lifeboat"):
            pids += self.d.session_pids()
        if victim == "qemu":
            pids += self.d.qemu_pids()
        if not pids:
            raise RigError("no such process: " + victim)
        for pid in pids:
            os.kill(pid, 9)
        if victim in ("daemon", "lifeboat"):
            self.d.proc.wait()
        time.sleep(0.2)

    def settled(self):
        state = self.fleet.state("a", NAME)
        if state is None:
            return "gone" if self.port.qemus() == 0 and not self.d.session_pids() else None
        if state in ("running", "suspended", "dead") and not self.d.session_pids():
            if self.port.qemus() == (1 if state == "running" else 0):
                return state
        return None

    def allowed(self, how, point, victim):
        """What it may be when all is at rest."""
        if victim == "qemu":
            return {"dead"}
        if how in ("checkpoint", "rm", "import"):
            return {"running"}
        if victim == "daemon":  # the session goes on without it
            return {"suspended"} if how == "suspend" else {"running"}
        if how == "suspend":
            return {"suspended"} if point == "suspend-decided" else {"running"}
        if point in ("restore-launched", "restore-loaded"):
            return {"gone"} if how == "restore" else {"suspended"}
        return {"running"}

    def row(self, how, point, victim):
        t, d, port, problems, place = self.t, self.d, self.port, [], None
        name, begin = "%s killed: %s %s" % (victim, how, point), time.monotonic()
        try:
            words = self.ready(how)
            if os.path.exists(self.pause_file):
                os.unlink(self.pause_file)
            d.restart({"LIFEBOAT_PAUSE_AT": point + (":1000" if victim in ("daemon", "qemu") else ""), "LIFEBOAT_PAUSE_FILE": self.pause_file})
            command = Command(d, *words)
            wait_for(lambda: os.path.exists(self.pause_file) or command.done(), 60, "the point " + point, 0.005)
            if not os.path.exists(self.pause_file):
                raise RigError("it ended before the point: %s" % (command.wait(),))
            self.strike(victim)
            command.wait(60)
            if d.proc.poll() is not None:
                d.start()
            else:
                d.cli("recover", check=False)
            place = wait_for(self.settled, 60, "the VM being at rest: %s, QEMU %s, sessions %s" % (d.vms().get(NAME), d.qemu_pids(), d.session_pids()), 0.1)
            if place not in self.allowed(how, point, victim):
                problems.append("it is %s, should be %s" % (place, self.allowed(how, point, victim)))
            self.revive(place)
            self.after(how)
            status = self.fleet.guest_status(verify_all=True, timeout_s=30)
            if status["nonce"] != port.nonce or any(status[k] for k in ("bad_pages", "disk_bad", "disk_errors")):
                problems.append("the guest: %s" % status)
        except (RigError, OSError) as error:
            problems.append("%s: %s" % (type(error).__name__, error))
        if problems:
            problems += [json.dumps(d.vms().get(NAME)), self.fleet.all_logs()]
        t.ok(not problems, "%s: %s (%.1f s)" % (name, place, time.monotonic() - begin), "\n".join(problems))
        if problems:
            self.start_over()

    def revive(self, place):
        if place == "suspended":
            self.d.cli("resume", NAME)
        elif place in ("gone", "dead"):
            self.d.cli("restore", self.ref)
        self.fleet.wait_running("a", NAME)

    def after(self, how):
        """What was interrupted can be done again; what is there is whole."""
        there = self.fleet.checkpoints("a", NAME)
        if how == "rm" and self.doomed in there:
            self.d.cli("checkpoint", "rm", self.doomed, "--yes")
        if how == "import" and not self.fleet.checkpoints("a", self.imported):
            self.d.cli("checkpoint", "import", self.folder, "--as", self.imported)
        answer = self.d.json("checkpoint", "verify", *([self.child] if how == "rm" else [self.imported] if how == "import" else []),
                             self.ref)
        if not answer["ok"]:
            raise RigError("not whole: %s" % answer["problems"])

    def start_over(self):
        """Whatever is there, the VM of the checkpoint for the next row."""
        self.d.restart()
        if self.fleet.state("a", NAME) == "running" and self.port.qemus() == 1:
            return
        for words in (["stop", NAME, "--force"], ["checkpoint", "rm", NAME + "@suspend", "--force", "--yes"], ["release", NAME]):
            self.d.cli(*words, check=False)
        for pid in self.d.session_pids() + self.d.qemu_pids():
            os.kill(pid, 9)
        wait_for(lambda: not self.d.qemu_pids(), 10, "QEMU gone")
        self.d.cli("release", NAME, check=False)
        self.d.cli("restore", self.ref)
        self.fleet.wait_running("a", NAME)


def all_points():
    found = set()
    for path in glob.glob(os.path.join(REPO, "checkpoint", "*.c")):
        with open(path) as f:
            found |= set(re.findall(r'\blb_point\("([a-z0-9-]+)"\);', f.read()))
    return found


def part_kill(port):
    known = {p for _, p, _ in ROWS}
    port.t.equal(sorted(all_points()), sorted(known), "the matrix knows every point of checkpoint/")
    kill, wanted = Kill(port), [a for a in sys.argv[1:] if "/" in a]
    for row in ROWS:
        name = "/".join(row)
        if any(name.startswith(w) for w in wanted) if wanted else os.environ.get("LB_FULL") or name in QUICK:
            kill.row(*row)
    port.d.restart()
    port.clean("after all of it: the same guest, memory and disk clean")


# ---- as time goes by


def part_schedule(port):
    """Two are left of many; all is suspended and resumed."""
    t, fleet, d = port.t, port.fleet, port.d
    before = set(fleet.checkpoints("a", NAME))
    d.cli("checkpoint", "prune", NAME, "--keep", "1", "--labelled", "--yes")
    d.cli("checkpoint", NAME, "--every", "10s", "--keep", "2")
    schedule = d.vms()[NAME]["schedule"]
    t.ok(schedule["every_ms"] == 10000 and schedule["keep"] == 2, "ls has the schedule", schedule)
    text = d.cli("status", NAME).stdout
    t.ok("every 10 s" in text, "status says it in words", text)

    def new():
        return [ref for ref in fleet.checkpoints("a", NAME) if ref not in before]
    wait_for(lambda: len(new()) >= 2, 60, "two scheduled checkpoints: %s" % d.vms()[NAME], 0.2)
    first = min(int(ref.split("@")[1]) for ref in new())
    wait_for(lambda: NAME + "@%d" % first not in new(), 60, "the oldest being pruned: %s" % d.vms()[NAME], 0.2)
    t.equal(len(fleet.checkpoints("a", NAME)), 2, "checkpoint --every 10s --keep 2 leaves two")
    port.refused("a schedule asks nobody", "nobody", "checkpoint", NAME, "--every", "1m", "--passphrase")
    d.cli("checkpoint", NAME, "--every", "off")
    t.ok("schedule" not in d.vms()[NAME], "and ends when it is told to", d.vms()[NAME])
    wait_for(lambda: not d.session_pids(), 30, "the last one being done")
    port.clean("the guest noticed nothing")


def part_all(port):
    t, fleet, d = port.t, port.fleet, port.d
    others = ["small-%d" % i for i in range(2)]
    for name in others:
        fleet.run_vm("a", name, memory_mb=128, tap=None)
    answer = d.json("suspend", "--all", timeout_s=180)
    t.equal((sorted(e["vm"] for e in answer["done"]), answer["failed"], port.qemus()), (sorted([NAME] + others), [], 0), "suspend --all")
    fleet.kill_host(fleet.a)
    fleet.revive_host(fleet.a)
    t.equal({fleet.state("a", name) for name in [NAME] + others}, {"suspended"}, "the host was off: all are suspended")
    answer = d.json("resume", "--all", timeout_s=180)
    t.equal((sorted(e["vm"] for e in answer["done"]), answer["failed"]), (sorted([NAME] + others), []), "resume --all")
    for name in [NAME] + others:
        fleet.wait_running("a", name)
    port.clean("the same guest, memory and disk clean")
    for name in others:
        fleet.stop("a", name)


def part_move(port):
    """The image a VM writes now is another than the one it was started with: that one goes with it."""
    t, fleet, d = port.t, port.fleet, port.d
    port.checkpoint()
    counter = Counter(fleet.client)
    counter.wait_flowing()
    fleet.migrate(NAME, "a", "b")
    port.clean("migrated with a checkpoint's overlay: memory and disk clean")
    fleet.migrate(NAME, "b", "a")
    port.clean("and back")
    unbroken(t, counter, "no acknowledged INCR is lost on the way")
    port.back_to(port.checkpoint()["ref"])
    port.clean("a checkpoint of a VM that came back is restored: memory and disk clean")


def part_protect(port):
    """The backup gets the image that is written now, and all that it stands on."""
    t, fleet, d = port.t, port.fleet, port.d
    d.cli("suspend", NAME)  # it makes room on the tap
    disk = os.path.join(fleet.a.dir, "guarded.img")  # in the host's own folder: the other one has an image of its own
    with open(disk, "wb") as f:
        f.truncate(64 << 20)
    fleet.run_vm("a", "guarded", memory_mb=MEMORY_MB, disk=disk, work=WORK)
    nonce = fleet.wait_guest()["nonce"]
    d.cli("checkpoint", "guarded")
    d.cli("protect", "guarded", "--backup", "b", "--manual", "--lease", "500ms")
    fleet.wait_state("a", "guarded", "protected")
    port.refused("a protected VM is not suspended", "unprotect", "suspend", "guarded")
    port.refused("nor is a checkpoint of it taken", "unprotect", "checkpoint", "guarded")
    before = fleet.clean(t, nonce, "protected with a checkpoint's overlay: memory and disk clean", timeout_s=30)
    fleet.db.cli("failover", "guarded")
    wait_for(lambda: fleet.state("b", "guarded") in ("running", "protected"), 60, "the VM on its backup", 0.1)
    fleet.clean(t, nonce, "and on its backup", disk=before and before["disk_verified"], timeout_s=30)
    if fleet.state("b", "guarded") == "protected":
        fleet.db.cli("unprotect", "guarded")
    fleet.stop("b", "guarded")
    wait_for(lambda: not port.qemus(), 30, "the tap being free", 0.1)
    d.cli("resume", NAME)
    fleet.wait_running("a", NAME)


PARTS = [part_suspend, part_encrypted, part_chain, part_beside, part_clone, part_catalog, part_damage, part_full_disk, part_kill,
         part_all, part_move, part_protect, part_schedule]


def main():
    wanted = ["kill" if "/" in a else a for a in sys.argv[1:]]
    with Tap() as t:
        need(t)
        with Harbour("lbckpt") as fleet:
            port = Port(t, fleet)
            for part in PARTS:
                name, begin = part.__name__[len("part_"):], time.monotonic()
                if wanted and name not in wanted:
                    continue
                try:
                    part(port)
                except (RigError, OSError) as error:
                    t.ok(False, name + " ends without an exception", "%s\n%s" % (error, fleet.all_logs()))
                    raise
                t.diag("part %s: %.0f s" % (name, time.monotonic() - begin))
            fleet.stop("a", NAME)


if __name__ == "__main__":
    main()
