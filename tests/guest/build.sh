#!/bin/bash
# Builds the test guest: build.sh OUTDIR -> OUTDIR/vmlinuz, initrd.img (Debian's cloud kernel: all of virtio) and
# OUTDIR/vmlinuz-full, initrd-full.img (Debian's full kernel, for e1000e, ahci and xhci, which the cloud kernel lacks);
# initrd-small.img goes with vmlinuz and has no Redis: it needs 96 MB of memory, the others 160 MB.
# Packages are downloaded by name and unpacked, never installed; no root. What is already there is not made again.
set -euo pipefail
out=$(mkdir -p "${1:?usage: build.sh OUTDIR}" && cd "$1" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
debs=$out/debs
mkdir -p "$debs"
trap 'rm -rf "$out/root.$$"' EXIT

fail() { echo "build.sh: $*" >&2; exit 1; }
for tool in apt-get dpkg-deb gcc objcopy objdump xz; do
    command -v $tool >/dev/null || fail "$tool is missing: install it first"
done

. "$here/../lib/kernel.sh"

# libraries ROOT PROGRAM: copies the shared libraries PROGRAM needs, from the unpacked packages, else from this machine.
libraries() {
    local root=$1 soname found
    for soname in $(objdump -p "$2" | awk '$1 == "NEEDED" { print $2 }'); do
        [ ! -e "$root/lib/$soname" ] || continue
        found=$(find "$debs" -name "$soname" -print -quit)
        [ -n "$found" ] || found=$(PATH=$PATH:/sbin ldconfig -p | awk -v s="$soname" '$1 == s && /x86-64/ { print $NF }' | sed -n 1p)
        [ -n "$found" ] || fail "library $soname (for $(basename "$2")) not found"
        cp -L "$found" "$root/lib/$soname"
        libraries "$root" "$root/lib/$soname"
    done
}

make_initrd() { # make_initrd KERNEL_FOLDER IMAGE MODULE...; no Redis in one that is called small
    local root=$out/root.$$ kernel=$1 image=$2
    shift 2
    rm -rf "$root"
    mkdir -p "$root"/{bin,lib,lib64,dev,proc,sys,tmp}
    cp "$busybox" "$root/bin/busybox"
    cp "$out/lbguest" "$root/bin/lbguest"
    case $image in
    *-small.img) ;;
    *)
        cp -L "$redis/usr/bin/redis-check-rdb" "$root/bin/redis-server" # one program under two names
        libraries "$root" "$root/bin/redis-server"
        cp -L /lib64/ld-linux-x86-64.so.2 "$root/lib64/"
        ;;
    esac
    install -m 755 "$here/init" "$root/init"
    ln -s busybox "$root/bin/sh"
    modules "$kernel" "$root" "$@"
    (cd "$root" && find . | LC_ALL=C sort | "$busybox" cpio -o -H newc -R 0:0 2>/dev/null) >"$image.tmp" ||
        fail "cannot write $image"
    rm -rf "$root"
    mv "$image.tmp" "$image"
}

virtio="virtio_pci virtio_blk virtio_net virtio_balloon virtio_rng virtio_scsi sd_mod"
if [ ! -e "$out/lbguest" ] || [ "$here/lbguest.c" -nt "$out/lbguest" ]; then
    gcc -std=c11 -D_GNU_SOURCE -O2 -Wall -Wextra -static -pthread -o "$out/lbguest" "$here/lbguest.c"
fi
newer() { # newer IMAGE: true when IMAGE is there and no source changed since
    [ -e "$1" ] && ! [ "$out/lbguest" -nt "$1" ] && ! [ "$here/init" -nt "$1" ] && ! [ "$here/build.sh" -nt "$1" ] &&
        ! [ "$here/../lib/kernel.sh" -nt "$1" ]
}
if newer "$out/initrd.img" && newer "$out/initrd-small.img" && newer "$out/initrd-full.img" && [ -e "$out/vmlinuz" ] && [ -e "$out/vmlinuz-full" ]; then
    exit 0
fi

busybox=$(unpack busybox-static)/bin/busybox
[ -x "$busybox" ] || busybox=$debs/busybox-static/usr/bin/busybox
redis=$(unpack redis-tools)
for package in $(apt-cache depends redis-tools | sed -n 's/^ *Depends: \(lib[^ ]*\)$/\1/p'); do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || unpack "$package" >/dev/null
done
for flavour in cloud full; do
    case $flavour in
    cloud) meta=linux-image-cloud-amd64 suffix= extra= ;;
    full) meta=linux-image-amd64 suffix=-full extra="e1000e ahci xhci_pci" ;;
    esac
    kernel=$(unpack "$(kernel_package $meta)")
    cp -f "$kernel"/boot/vmlinuz-* "$out/vmlinuz$suffix"
    # shellcheck disable=SC2086 # lists of words
    make_initrd "$kernel" "$out/initrd$suffix.img" $virtio $extra
    # shellcheck disable=SC2086
    [ $flavour = full ] || make_initrd "$kernel" "$out/initrd-small.img" $virtio
done
ls -l "$out"/vmlinuz* "$out"/initrd*
