#!/usr/bin/python3
"""The bed itself, before Lifeboat is judged on it: data goes over RDMA whole, RDMA and TCP fail apart from each other, and what is
in use is seen."""

import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
from bed import Bed, RigError, wait_for
from rig import BUILD, Tap


def serve(bed, *argv):
    """rping as a server that listens; its pid."""
    ids = bed.b.resources()["cm_id"]
    server = bed.b.start("rping", "-s", "-a", bed.b.fabric_ip, *argv)
    wait_for(lambda: bed.b.resources()["cm_id"] > ids or bed.b.call("ended", server) is not None, 20, "rping's server", 0.2)
    return server


def rping(bed, count, size=32768, timeout_s=60):
    """rping writes and reads by RDMA and compares what came: (status of the client, its output, the server's pid)."""
    server = serve(bed, "-p", "18515", "-C", str(count), "-S", str(size), "-V")
    code, out, err = bed.a.run("rping", "-c", "-a", bed.b.fabric_ip, "-p", "18515", "-C", str(count), "-S", str(size), "-V", "-v",
                               check=False, timeout_s=timeout_s)
    return code, out + err, server


def goes(t, bed):
    for node in bed.nodes:
        out = node.run("ibv_devices")[1]
        t.ok(node.device in out, "%s has the device %s" % (node.role, node.device), out)
    rest = [node.resources() for node in bed.nodes]
    code, text, server = rping(bed, 50)
    t.ok(code == 0 and text.count("ping data") == 50, "rping: 50 writes and reads of 32 KiB, compared", text[-300:])
    wait_for(lambda: bed.b.call("ended", server) is not None, 20, "rping's server at its end")
    t.equal([node.resources() for node in bed.nodes], rest, "nothing is in use afterwards")


def engine(t, bed):
    """The connections themselves, both ends in one process: a test that is skipped where there is no device."""
    code, out, err = bed.a.run(os.path.join(BUILD, "tests", "integration", "test_rdma"), check=False, timeout_s=120,
                               env={"CMOCKA_MESSAGE_OUTPUT": "TAP"})
    t.ok(code == 0 and "SKIP" not in out and "ok 1" in out, "test_rdma passes there", out + err)
    t.diag(out)


def seen(t, bed):
    """What is in use is counted: else a leak would not be seen."""
    rest = bed.b.resources()
    server = serve(bed, "-p", "18516", "-C", "1000000", "-S", "32768")
    client = bed.a.start("rping", "-c", "-a", bed.b.fabric_ip, "-p", "18516", "-C", "1000000", "-S", "32768")
    wait_for(lambda: bed.b.registered_bytes() >= 32768, 20, "memory that is registered")
    used = bed.b.resources()
    t.ok(all(used[kind] > rest[kind] for kind in ("qp", "mr", "pd")), "what rping uses is counted", "%s, before %s" % (used, rest))
    for node, pid in ((bed.a, client), (bed.b, server)):
        node.call("kill", pid)
    wait_for(lambda: bed.b.resources() == rest, 20, "the kernel takes back what a killed program had")
    t.ok(True, "and is gone when they are killed")


def falls(t, bed):
    if not bed.virtual:
        t.skip("each network is cut alone", "the device and its network belong to others, too")
        return

    def tcp():
        return bed.a.run("python3", "-c", "import socket; socket.create_connection(('%s', 22), 2)" % bed.b.ip, check=False)[2]
    faults = [("the cable", lambda on: bed.b.cut("fab", on)), ("the interface", lambda on: bed.b.interface("fab", not on)),
              ("the device", bed.b.device_gone)]
    for what, fault in faults:
        fault(True)
        code, text, server = rping(bed, 2, timeout_s=8)  # by itself it gives up after a minute
        bed.b.call("kill", server)
        t.ok(code != 0 and "ConnectionRefused" in tcp(), "%s: no RDMA without it, and TCP goes on" % what, "%s\n%s" % (text[-300:], tcp()))
        fault(False)
        code, text, server = rping(bed, 2)
        t.ok(code == 0, "%s: RDMA works again" % what, text[-300:])


def main():
    with Tap() as t:
        if os.geteuid() != 0:
            t.skip_all("virtual machines that see this one's files need root")
        begin = time.monotonic()
        with Bed() as bed:
            t.diag("%s up after %.1f s" % ("virtual machines" if bed.virtual else "device %s" % bed.a.device, time.monotonic() - begin))
            goes(t, bed)
            engine(t, bed)
            seen(t, bed)
            falls(t, bed)


if __name__ == "__main__":
    main()
