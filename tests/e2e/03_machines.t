#!/usr/bin/python3
"""Machines, memory back ends and versions of QEMU: each goes there and back, and memory, disk and nonce are clean."""

import contextlib
import os
import pwd
import shutil
import subprocess
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), "..", "rig"))
from lifeboat import Fleet, need
from rig import BUILD, GUEST, RigError, Tap, Vm, sh, wait_for

TRIXIE = os.path.join(BUILD, "trixie", "qemu-system-x86_64")
QEMU = "/usr/bin/qemu-system-x86_64"
HUGE = "/proc/sys/vm/nr_hugepages"
Q35 = ["-device", "ahci,id=ahci0", "-device", "qemu-xhci,id=xhci0", "-device", "usb-tablet,bus=xhci0.0",
       "-device", "virtio-balloon-pci", "-object", "rng-random,id=rng0,filename=/dev/urandom", "-device",
       "virtio-rng-pci,rng=rng0"]
Q35_OPTIONS = {"machine": "pc-q35-7.2", "full_kernel": True, "nic": "e1000e", "smp": 2, "disk_device": "ide-hd,bus=ahci0.0",
               "extra_first": Q35}
WORK = "dirty=30:64:mixed clock"


def there_and_back(t, fleet, name, status, role="a", options=("--verify",)):
    """Moves a VM away and home again; True when both went well."""
    for source, target in ((role, "b" if role == "a" else "a"), ("b" if role == "a" else "a", role)):
        what = "%s, %s->%s" % (name, source, target)
        try:
            result = fleet.migrate(name, source, target, *options)
        except RigError as error:
            return t.ok(False, what, "%s\n%s" % (error, fleet.all_logs()))
        good = fleet.clean(t, status["nonce"], "%s: %.0f ms, downtime %.1f ms" % (what, result["total_ms"],
                                                                                  result["downtime_ms"]),
                           disk=status["disk_verified"] if status["disk_written"] else None)
        good = fleet.one_qemu(t, target, what + ": one QEMU") and good
        if not good:
            t.diag(fleet.all_logs())
            return False
        status = good_status(fleet, status)
    return True


def good_status(fleet, before):
    now = fleet.guest_status()
    return dict(now, nonce=before["nonce"])


def finish(fleet, name):
    """Ends whatever is left of a VM, also after a failure, so that the next machine starts with empty hosts."""
    for role, daemon in fleet.daemons.items():
        if name in daemon.vms():
            daemon.cli("stop", name, "--force", check=False)
            if name in daemon.vms():
                daemon.cli("release", name, check=False)
    for pids in fleet.qemus().values():
        for pid in pids:
            try:
                os.kill(pid, 9)
            except ProcessLookupError:
                pass
    wait_for(lambda: not any(fleet.qemus().values()), 10, "hosts without QEMU")


def qemu_argv(fleet, host, name, extra_first=(), **options):
    """Controllers that a disk needs must come before it on the command line."""
    argv = fleet.qemu_argv(host, name, **options)
    at = argv.index("-kernel")
    return argv[:at] + list(extra_first) + argv[at:]


def machine(t, fleet, name, role="a", before=None, migrate=("--verify",), **options):
    """One machine through `lifeboat run`, there and back. before(pid): looks at it before it goes; migrate: options."""
    options.setdefault("work", WORK)
    options.setdefault("memory_mb", 256)
    try:
        fleet.daemons[role].cli("run", name, "--", *qemu_argv(fleet, fleet.hosts[role], name, **options))
        status = fleet.wait_guest()
        if options.get("disk"):
            wait_for(lambda: fleet.guest_status()["disk_verified"] > 5, 20, "the guest uses its disk", 0.1)
        if before:
            before(fleet.daemons[role].qemu_pids()[0])
        there_and_back(t, fleet, name, status, role, migrate)
    except RigError as error:
        t.ok(False, name, "%s\n%s" % (error, fleet.all_logs()))
    finally:
        finish(fleet, name)


def mapping_kb(pid, field):
    """A field of smaps, summed over all mappings."""
    total = 0
    with open("/proc/%d/smaps" % pid) as f:
        for line in f:
            if line.startswith(field + ":"):
                total += int(line.split()[1])
    return total


def q35(t, fleet):
    disk = fleet.make_disk("q35.img")
    for name, memfd in (("q35-anon", False), ("q35-memfd", True)):
        machine(t, fleet, name, disk=disk, memfd=memfd, work=WORK + " disk=sda", **Q35_OPTIONS)


def transparent_huge(t, fleet):
    with open("/sys/kernel/mm/transparent_hugepage/enabled") as f:
        if "[never]" in f.read():
            t.skip("transparent huge pages", "this machine has them off")
            return

    def look(pid):
        huge = mapping_kb(pid, "AnonHugePages")
        t.ok(huge > 20 << 10, "the guest's memory is in transparent huge pages: %d MB" % (huge >> 10))
    machine(t, fleet, "thp", before=look)


@contextlib.contextmanager
def huge_pages(count):
    """At least count free 2 MB pages; gives how many there are. What was set before is set again."""
    with open(HUGE) as f:
        old = int(f.read())
    try:
        with open(HUGE, "w") as f:
            f.write(str(old + count))
        with open("/proc/meminfo") as f:
            free = next(int(line.split()[1]) for line in f if line.startswith("HugePages_Free:"))
        yield free
    finally:
        with open(HUGE, "w") as f:
            f.write(str(old))


def hugetlb(t, fleet):
    if not os.path.isdir("/sys/kernel/mm/hugepages/hugepages-2048kB"):
        t.skip("hugetlb", "this kernel has no 2 MB pages")
        return
    with huge_pages(2 * 128) as free:
        if free < 2 * 128:
            t.skip("hugetlb", "only %d huge pages to be had, 256 needed" % free)
            return
        # The kernel logs 2 MB at a time: the last round is as long as that makes it.
        machine(t, fleet, "hugetlb", migrate=("--verify", "--max-downtime", "1s"),
                machine="pc-i440fx-7.2,memory-backend=ram0", extra_first=[
            "-object", "memory-backend-memfd,id=ram0,size=256M,share=on,hugetlb=on,hugetlbsize=2M"])


def qcow2(t, fleet):
    path = os.path.join(fleet.dir, "disk.qcow2")
    sh("qemu-img", "create", "-q", "-f", "qcow2", path, "128M")
    machine(t, fleet, "qcow2", work=WORK + " disk=vda", extra=[
        "-blockdev", "driver=qcow2,node-name=d0,cache.direct=on,file.driver=file,file.cache.direct=on,file.filename=" + path,
        "-device", "virtio-blk-pci,drive=d0"])
    t.equal(subprocess.run(["qemu-img", "check", "-q", path]).returncode, 0, "qcow2: qemu-img check finds nothing")


def pflash(t, fleet):
    """Flash as firmware and a second, writable one. SeaBIOS in it: this needs no UEFI."""
    code, variables = os.path.join(fleet.dir, "code.fd"), os.path.join(fleet.dir, "vars.fd")
    shutil.copy(next(p for p in ("/usr/share/seabios/bios-256k.bin", "/usr/share/qemu/bios-256k.bin") if os.path.exists(p)),
                code)
    with open(variables, "wb") as f:
        f.write(b"\xff" * (128 << 10))
    machine(t, fleet, "pflash", extra=["-drive", "if=pflash,unit=0,format=raw,readonly=on,file=" + code,
                                       "-drive", "if=pflash,unit=1,format=raw,file=" + variables])


@contextlib.contextmanager
def tun_for_all():
    """/dev/net/tun open to everybody, as udev makes it on a usual host; as it was afterwards."""
    mode = os.stat("/dev/net/tun").st_mode & 0o777
    os.chmod("/dev/net/tun", 0o666)
    try:
        yield
    finally:
        os.chmod("/dev/net/tun", mode)


def unprivileged(t, fleet):
    with tun_for_all():
        nobody(t, fleet)


def nobody(t, fleet):
    """A QEMU of user nobody under seccomp, started by hand and adopted."""
    user = pwd.getpwnam("nobody")
    for host in fleet.hosts.values():
        host.add_tap("utap", user="nobody")
        folder = os.path.join(host.dir, "u")
        os.mkdir(folder, 0o700)
        os.chown(folder, user.pw_uid, user.pw_gid)
    disk = fleet.make_disk("nobody.img")
    os.chown(disk, user.pw_uid, user.pw_gid)
    for name in ("vmlinuz", "initrd.img"): # a checkout in /root is closed to nobody
        shutil.copyfile(os.path.join(GUEST, name), os.path.join(fleet.dir, name))
    argv = [a.replace(fleet.a.dir + "/", fleet.a.dir + "/u/").replace(GUEST + "/", fleet.dir + "/") for a in
            qemu_argv(fleet, fleet.a, "nobody", memory_mb=256, tap="utap", disk=disk, work=WORK + " disk=vda",
                      extra=["-sandbox", "on"])]
    base = os.path.join(fleet.a.dir, "u", "nobody")
    with open(os.path.join(fleet.a.dir, "nobody.log"), "wb") as log:
        proc = fleet.a.popen(["setpriv", "--reuid", user.pw_uid, "--regid", user.pw_gid, "--clear-groups"] + argv, stdout=log,
                             stderr=log)
    vm = Vm(fleet.a, "nobody", argv, proc, base + ".qmp", base + ".qmp2", base + ".serial",
            os.path.join(fleet.a.dir, "nobody.log"))
    fleet.vms.append(vm)
    try:
        status = fleet.wait_guest()
        vm.qmp.close()
        fleet.da.cli("adopt", "nobody", "--pid", str(vm.pid), "--qmp", vm.spare_qmp_path)
        if there_and_back(t, fleet, "nobody", status):
            with open("/proc/%d/status" % fleet.da.qemu_pids()[0]) as f:
                fields = dict(line.rstrip("\n").split(":\t", 1) for line in f if ":\t" in line)
            t.equal((fields["Uid"].split()[1], fields["CapEff"], fields["Seccomp"]), (str(user.pw_uid), "0" * 16, "2"),
                    "it is still nobody's, without capabilities and under seccomp")
    except RigError as error:
        t.ok(False, "nobody", "%s\n%s" % (error, fleet.all_logs()))
    finally:
        finish(fleet, "nobody")
        vm.proc.wait()


def versions(t):
    if not os.path.exists(TRIXIE):
        for name in ("7.2 -> 10.0 -> 7.2", "10.0 -> 7.2 -> 10.0"):
            t.skip(name, "no QEMU 10.0: run tests/trixie/build.sh %s" % os.path.dirname(TRIXIE))
        return
    real = os.path.realpath(QEMU)
    configs = {"a": "emulator = %s -> %s\n" % (TRIXIE, QEMU),
               "b": "".join("emulator = %s -> %s\n" % (old, TRIXIE) for old in sorted({QEMU, real}))}
    with Fleet("lbver", configs=configs) as fleet:
        disk = fleet.make_disk()
        # A CPU both have: "max" is more in the newer one.
        q35_options = dict(Q35_OPTIONS, disk=disk, cpu="qemu64", work=WORK + " disk=sda")
        for role, emulator, name in (("a", QEMU, "up"), ("b", TRIXIE, "down")):
            def look(pid):
                daemon = fleet.daemons[role]
                shown = daemon.json("show", "%s-pc" % name)
                t.diag("%s-pc starts under %s" % (name, find(shown, "hv_version") or "?"))
            machine(t, fleet, name + "-pc", role, look, qemu=emulator, cpu="qemu64", disk=disk,
                    work=WORK + " disk=vda")
            machine(t, fleet, name + "-q35", role, qemu=emulator, **q35_options)


def find(tree, key):
    """The first value of that key anywhere in an answer."""
    if isinstance(tree, dict):
        if key in tree:
            return tree[key]
        tree = list(tree.values())
    if isinstance(tree, list):
        for part in tree:
            value = find(part, key)
            if value is not None:
                return value
    return None


def main():
    with Tap() as t:
        need(t)
        only = sys.argv[1:]
        with Fleet("lbmach") as fleet:
            for test in (q35, transparent_huge, hugetlb, qcow2, pflash, unprivileged):
                if not only or test.__name__ in only:
                    test(t, fleet)
        if not only or "versions" in only:
            versions(t)


if __name__ == "__main__":
    main()
