#!/usr/bin/python3
"""Supervisors come and go: a migration under way goes on without them and is theirs again; VMs outlive a stop."""

import os
import signal
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), "..", "rig"))
from lifeboat import Command, Fleet, need
from rig import RigError, Tap, wait_for


def session_of(daemon, name):
    return daemon.json("status", name).get("session") or {}


def percent(daemon, name):
    session = session_of(daemon, name)
    return (session.get("progress") or session).get("percent", 0)


def during_migration(t, fleet, status):
    """Both are killed twice while a slow migration is under way."""
    command = Command(fleet.da, "migrate", "vm", "b", "--bandwidth", "160Mbit", "--compress", "off", "--json")
    wait_for(lambda: percent(fleet.da, "vm") > 5, 20, "the migration being under way", 0.1)
    sessions = {role: daemon.session_pids() for role, daemon in fleet.daemons.items()}
    t.ok(all(len(pids) == 1 for pids in sessions.values()), "one session on each host", sessions)
    last = 0
    for turn in ("first", "second"):
        for daemon in fleet.daemons.values():
            daemon.kill()
        if turn == "first":
            code, out, err = command.wait(10)
            t.ok(code != 0 and err.strip(), "the waiting command says that it lost its daemon", (code, out, err))
        fleet.clean(t, status["nonce"], "%s kill of both daemons: the guest does not notice" % turn, verify_all=False)
        for daemon in fleet.daemons.values():
            daemon.start()
        t.equal({role: daemon.session_pids() for role, daemon in fleet.daemons.items()}, sessions,
                "%s: the sessions live on" % turn)
        try:
            wait_for(lambda: percent(fleet.da, "vm") > last, 10, "status shows its progress again", 0.1)
            entry = fleet.da.vms()["vm"]
            last = percent(fleet.da, "vm")
            t.ok(entry["state"] == "migrating-out", "%s: status shows the migration again, at %.0f %%" % (turn, last), entry)
        except RigError as error:
            t.ok(False, "%s: status shows the migration again" % turn, "%s\n%s" % (error, fleet.all_logs()))
    busy = fleet.da.cli("migrate", "vm", "b", "--json", check=False)
    t.equal(busy.returncode, 5, "a second migration is refused: the VM is still known to be busy")
    try:
        fleet.wait_where("vm", "b", 60)
        t.ok(True, "the migration completes")
    except RigError as error:
        t.ok(False, "the migration completes", "%s\n%s" % (error, fleet.all_logs()))
    fleet.one_qemu(t, "b", "one QEMU")
    fleet.clean(t, status["nonce"], "the same guest, clean")
    fleet.nothing_left(t, "a", "nothing left on the source")
    for role, direction in (("a", "out"), ("b", "in")):
        lines = fleet.daemons[role].json("history", "vm")["history"]
        t.ok([line["direction"] for line in lines] == [direction] and lines[0]["ok"], "history of " + role, lines)


def cancelled_after_restart(t, fleet, status):
    """A session that was adopted by a new supervisor can still be cancelled."""
    Command(fleet.db, "migrate", "vm", "a", "--bandwidth", "80Mbit", "--compress", "off", "--json")
    wait_for(lambda: percent(fleet.db, "vm") > 5, 20, "the migration being under way", 0.1)
    fleet.db.restart()
    wait_for(lambda: session_of(fleet.db, "vm"), 10, "the session being known again", 0.1)
    fleet.db.cli("cancel", "vm")
    try:
        wait_for(lambda: not fleet.db.session_pids() and fleet.where("vm") == ["b"], 10, "the migration being cancelled", 0.1)
        t.ok(True, "cancel reaches a session of an earlier daemon")
    except RigError as error:
        t.ok(False, "cancel reaches a session of an earlier daemon", "%s\n%s" % (error, fleet.all_logs()))
    fleet.clean(t, status["nonce"], "the guest runs on where it was")
    fleet.nothing_left(t, "a", "nothing left on the destination")


def stop(t, fleet, status):
    """SIGTERM ends the supervisor, not the VMs."""
    entry, pids = fleet.db.vms()["vm"], fleet.db.qemu_pids()
    fleet.db.kill(signal.SIGTERM)
    t.equal(fleet.db.proc.returncode, 0, "SIGTERM: the daemon ends well")
    t.ok(not os.path.exists(fleet.db.socket), "and takes its socket away")
    done = fleet.db.cli("ls", check=False)
    t.ok(done.returncode != 0 and "lifeboatd" in done.stderr, "a command says that no daemon runs", done.stderr)
    time.sleep(0.5)
    t.equal(fleet.db.qemu_pids(), pids, "the VM runs on")
    fleet.clean(t, status["nonce"], "and answers", verify_all=False)
    fleet.db.start()
    after = fleet.db.vms()["vm"]
    t.equal((after["pid"], after["state"], after["origin"]), (entry["pid"], "running", entry["origin"]), "the next daemon has it")
    result = fleet.migrate("vm", "b", "a")
    t.ok(result["ok"], "and migrates it", result)
    fleet.clean(t, status["nonce"], "clean")


def death(t, fleet):
    """A VM that ends while nobody looks is found dead, and its entry can be released."""
    role = fleet.where("vm")[0]
    daemon = fleet.daemons[role]
    daemon.kill()
    os.kill(daemon.qemu_pids()[0], signal.SIGKILL)
    daemon.start()
    try:
        wait_for(lambda: daemon.vms()["vm"]["state"] == "dead", 10, "the VM being found dead", 0.1)
        t.ok(True, "a VM that died meanwhile is found dead")
    except RigError as error:
        t.ok(False, "a VM that died meanwhile is found dead", error)
    daemon.cli("release", "vm")
    fleet.nothing_left(t, role, "release leaves nothing of it", sockets=False)


def main():
    with Tap() as t:
        need(t)
        with Fleet("lbrest") as fleet:
            fleet.run_vm("a", "vm", memory_mb=512, work="dirty=2:160:random clock")
            status = fleet.wait_guest()
            during_migration(t, fleet, status)
            cancelled_after_restart(t, fleet, status)
            stop(t, fleet, status)
            death(t, fleet)


if __name__ == "__main__":
    main()
