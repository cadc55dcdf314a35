#!/usr/bin/python3
"""Back-to-back migrations A<->B of a busy 1 GB guest: not one bad page, bad block, lost reply or clock step.

LB_MARATHON: how many (20)."""

import os
import statistics
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), "..", "rig"))
from lifeboat import EchoLine, Fleet, Pinger, need
from rig import CLIENT_IP, UDP_PORT, RigError, Tap, UdpGap

COUNT = int(os.environ.get("LB_MARATHON", "20"))
WORK = "dirty=78:400:random disk=vda udp=%s:%d clock echo" % (CLIENT_IP, UDP_PORT)


def main():
    with Tap() as t:
        need(t)
        with Fleet("lbmar") as fleet:
            fleet.run_vm("a", "vm", memory_mb=1024, disk=fleet.make_disk(), work=WORK)
            first = fleet.wait_guest(timeout_s=120)
            udp = UdpGap(fleet.client)
            udp.wait_flowing()
            pings, echo = Pinger(fleet.client), EchoLine(fleet.client)
            role, done, gaps, totals, before = "a", 0, [], [], first
            for i in range(COUNT):
                target = "b" if role == "a" else "a"
                start = time.time()
                try:
                    result = fleet.migrate("vm", role, target, timeout_s=120)
                except RigError as error:
                    t.ok(False, "migration %d" % (i + 1), "%s\n%s" % (error, fleet.all_logs()))
                    break
                gaps.append(udp.longest_gap_ms(start, time.time()))
                totals.append(result["total_ms"])
                status = fleet.guest_status()
                bad = {k: status[k] for k in ("bad_pages", "disk_bad", "disk_errors", "clock_steps") if status[k]}
                alone = [r for r, pids in fleet.qemus().items() for _ in pids] == [target]
                t.ok(result["ok"] and not bad and status["nonce"] == first["nonce"] and alone,
                     "migration %d, %s->%s: %.0f ms, %d rounds, %.0f MB, downtime %.1f ms, gap outside %.1f ms" %
                     (i + 1, role, target, result["total_ms"], result["rounds"], result["wire_bytes"] / 1e6,
                      result["downtime_ms"], gaps[-1]), "%s %s %s" % (bad, status.get("first_bad"), fleet.qemus()))
                role, done = target, done + 1
            answered, line, stream = pings.stop(), echo.stop(), udp.stop()
            after = fleet.clean(t, first["nonce"], "all of memory checked once more, the disk written and read on",
                                disk=before["disk_verified"])
            t.equal(done, COUNT, "all migrations done")
            t.ok(answered["lost"] == 0 and answered["sent"] > 5 * COUNT, "no ping unanswered of %d" % answered["sent"],
                 answered)
            t.ok(line["error"] is None and line["answered"] > 20 * COUNT, "one TCP connection through all of them", line)
            t.ok(stream["lost"] == 0, "no packet of the guest's stream lost of %d" % stream["packets"], stream)
            if after and gaps:
                t.diag("gap outside p50 %.1f max %.1f ms; total p50 %.0f max %.0f ms; pages verified %d, disk blocks %d" %
                       (statistics.median(gaps), max(gaps), statistics.median(totals), max(totals), after["pages_verified"],
                        after["disk_verified"]))
            fleet.stop_vm("vm")


if __name__ == "__main__":
    main()
