#!/bin/bash
# The initramfs of the RDMA test's machines: build.sh GUEST_DIR OUTDIR -> OUTDIR/initrd.img, for GUEST_DIR/vmlinuz-full.
#
# It has only the drivers (virtio, 9p, soft-RoCE) and busybox: everything else the machines take, read only, from the file system
# of the machine that runs the test. GUEST_DIR is what tests/guest/build.sh has made: Debian's full kernel and its package.
set -euo pipefail
guest=$(cd "${1:?usage: build.sh GUEST_DIR OUTDIR}" && pwd)
out=$(mkdir -p "${2:?usage: build.sh GUEST_DIR OUTDIR}" && cd "$2" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
fail() { echo "rdma/build.sh: $*" >&2; exit 1; }
debs=$guest/debs
. "$here/../lib/kernel.sh"

image=$out/initrd.img
if [ -e "$image" ] && [ "$image" -nt "$guest/vmlinuz-full" ] && [ "$image" -nt "$here/init" ] && [ "$image" -nt "$here/build.sh" ] &&
    [ "$image" -nt "$here/../lib/kernel.sh" ]; then
    exit 0
fi
root=$out/root.$$
trap 'rm -rf "$root"' EXIT
mkdir -p "$root"/{bin,proc,sys,dev,host}
busybox=$(unpack busybox-static)/bin/busybox
[ -x "$busybox" ] || busybox=$debs/busybox-static/usr/bin/busybox
cp "$busybox" "$root/bin/busybox"
ln -s busybox "$root/bin/sh"
install -m 755 "$here/init" "$root/init"
# crc32_generic: without it rdma_rxe loads, and then cannot make a device
modules "$(unpack "$(kernel_package linux-image-amd64)")" "$root" virtio_pci virtio_net virtio_console 9p 9pnet_virtio \
    crc32_generic crc32-pclmul rdma_ucm ib_uverbs rdma_rxe sch_ingress cls_u32 act_gact
(cd "$root" && find . | LC_ALL=C sort | "$busybox" cpio -o -H newc -R 0:0 2>/dev/null) >"$image.tmp" || fail "cannot write $image"
mv "$image.tmp" "$image"
