#!/usr/bin/python3
"""The rig checks itself (TAP): hosts, cables, shaping, a guest and its observers, crash and teardown."""

import os
import socket
import sys
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from rig import CLIENT_IP, GUEST, Measure, QmpError, RedisLoad, Rig, RigError, Tap, UDP_PORT, UdpGap, wait_for


def transfer_mbit(rig, megabytes):
    """Sends over the migration link from A to B; returns Mb/s as received."""
    listener = rig.b.socket()
    listener.bind((rig.b.mig_ip, 5000))
    listener.listen(1)
    sender = rig.a.socket()

    def send():
        sender.connect((rig.b.mig_ip, 5000))
        sender.sendall(bytes(megabytes << 20))
        sender.close()

    thread = threading.Thread(target=send)
    thread.start()
    connection, _ = listener.accept()
    start, got = time.monotonic(), 0
    while True:
        data = connection.recv(1 << 20)
        if not data:
            break
        got += len(data)
    took = time.monotonic() - start
    thread.join()
    connection.close()
    listener.close()
    return got * 8 / took / 1e6


def main():
    with Tap() as t:
        if os.geteuid() != 0:
            t.skip_all("network namespaces need root")
        if not os.path.exists(os.path.join(GUEST, "initrd.img")):
            t.skip_all("no guest: run tests/guest/build.sh " + GUEST)
        with Rig("rigself", hosts="ABC") as rig:
            name, folder = rig.name, rig.dir
            for host in rig.hosts.values():
                t.ok(host.run(["ip", "-br", "link", "show", "tap0"]).stdout, "host %s has a tap" % host.role)
            t.ok(rig.ping(rig.a.lan_ip) and rig.ping(rig.c.lan_ip), "the client reaches the hosts")
            t.ok(not rig.ping(), "no guest, no answer")
            rig.shape(1000)
            measure = Measure(rig.a)
            shaped = transfer_mbit(rig, 120)
            cost = measure.stop()
            t.ok(850 < shaped < 1050, "shaped link carries about 1 Gb/s: %.0f Mb/s" % shaped)
            t.ok(120 << 20 <= cost["wire_bytes"] < 130 << 20, "the link's counter saw it: %d bytes" % cost["wire_bytes"])
            rig.shape(None)
            free = transfer_mbit(rig, 500)
            t.ok(free > 2000, "and more when not shaped: %.0f Mb/s" % free)

            udp = UdpGap(rig.client)
            begin = time.monotonic()
            vm = rig.start_qemu(rig.a, disk=rig.make_disk(), memory_mb=512,
                                work="dirty=20:64:mixed disk=vda udp=%s:%d redis clock echo" % (CLIENT_IP, UDP_PORT))
            status = rig.wait_guest()
            t.diag("guest ready after %.1f s" % (time.monotonic() - begin))
            t.ok(rig.ping(count=3), "the guest answers pings")
            udp.wait_flowing()
            redis = RedisLoad(rig.client, rate=200)
            redis.wait_flowing()
            with rig.client.socket() as echo:
                echo.connect(("10.77.0.10", 7001))
                echo.sendall(b"hello")
                t.equal(echo.recv(16), b"hello", "the guest echoes")
            start = time.time()
            time.sleep(1)
            steady = udp.longest_gap_ms(start, time.time())
            t.diag("longest gap in a quiet second: %.1f ms" % steady)
            start = time.time()
            vm.qmp.cmd("stop")
            time.sleep(0.3)
            vm.qmp.cmd("cont")
            stopped = udp.longest_gap_ms(start, time.time())
            t.ok(300 <= stopped < 400, "a stop of 300 ms is seen outside as a gap: %.1f ms" % stopped)
            after = rig.guest_status(verify_all=True)
            t.ok(after["pages_verified"] - status["pages_verified"] >= 64 * 256, "every page verified on request")
            t.equal([after[k] for k in ("bad_pages", "disk_bad", "disk_errors", "clock_steps")], [0, 0, 0, 0], "nothing bad")
            t.ok(after["disk_verified"] > 20, "the disk was written and read back: %d" % after["disk_verified"])
            t.equal(after["nonce"], status["nonce"], "one and the same guest")
            try:
                vm.qmp.cmd("no-such-command")
                t.ok(False, "a QMP error is raised")
            except QmpError:
                t.ok(True, "a QMP error is raised")
            report = redis.stop()
            t.ok(report["lost"] == 0 and report["reconnects"] == 0 and report["requests"] > 200 and report["longest_ms"] > 290,
                 "Redis lost nothing and felt the stop", report)

            # Corruption must be found, or every "bad_pages 0" above means nothing: overwrite one stamped page from outside.
            # The verifier may meet the page after the writer replaced it, so try until one is seen.
            t.ok(corrupt_until_seen(rig, vm, 512), "a page changed behind the guest's back is found")

            rig.a.crash()
            vm.proc.wait()
            t.ok(not rig.a.pids() and not rig.ping(), "a crashed host has no process and its guest is gone")
            t.ok(rig.client.pids(), "others live on")
            gaps = udp.stop()
            t.ok(gaps["packets"] > 500 and gaps["lost"] == 0, "no packet of the stream was lost", gaps)
        left = [n for n in os.listdir("/run/netns") if n.startswith(name)]
        t.ok(not left and not os.path.exists(folder), "teardown leaves nothing", left)


def corrupt_until_seen(rig, vm, memory_mb):
    """Flips a byte of a stamped page in QEMU's memory, found by the nonce every page carries."""
    nonce = int(rig.guest_status()["nonce"], 16).to_bytes(8, "little")
    with open("/proc/%d/maps" % vm.pid) as maps:
        areas = [tuple(int(x, 16) for x in line.split()[0].split("-")) for line in maps]
    # The guest's RAM is one mapping of its size; QEMU's buffer of translated code may be larger.
    start, end = next(area for area in areas if area[1] - area[0] == memory_mb << 20)
    with open("/proc/%d/mem" % vm.pid, "r+b", buffering=0) as memory:
        for address in range(start, end, 4096):
            memory.seek(address)
            try:
                page = memory.read(32)
            except OSError:
                continue
            if page[16:24] != nonce:
                continue
            memory.seek(address + 2048)
            byte = memory.read(1)
            memory.seek(address + 2048)
            memory.write(bytes([byte[0] ^ 1]))
            if rig.guest_status(verify_all=True)["bad_pages"] > 0:
                return True
    return False


if __name__ == "__main__":
    main()
