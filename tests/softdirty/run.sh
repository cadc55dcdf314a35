#!/bin/bash
# The dirty log against real kernels: run.sh [BUILD_DIR], TAP. Needs BUILD_DIR/liblifeboat.a; root for the part on this host.
#
# Soft-dirty is in Debian's kernels but not in every kernel, so its test runs in a VM (TCG) with Debian's, on top of the
# test guest's initramfs. The same test then runs here with userfaultfd, when this kernel is new enough to choose that.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
top=$(cd "$here/../.." && pwd)
build=$(cd "${1:-$top/build}" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
number=0 bad=0

# Lines of a cmocka run become ours: prefixed, and counted in one plan.
renumber() { # renumber PREFIX FILE
    local line verdict name
    while IFS= read -r line; do
        case $line in
        "ok "* | "not ok "*)
            verdict=${line%%ok *}ok
            name=$(sed 's/^.*ok [0-9]* *-* *//' <<<"$line")
            number=$((number + 1))
            case $verdict:$name in
            "not ok":*"# SKIP"*) verdict=ok ;;
            "not ok":*) bad=$((bad + 1)) ;;
            esac
            name=${name/#\# SKIP/skipped # SKIP}
            echo "$verdict $number - $1: $name"
            ;;
        1..* | "# ok"* | "# not ok"*) ;;
        "#"* | "  "* | "") [ -z "$line" ] || echo "# ${line#\# }" ;;
        esac
    done <"$2"
}
verdict() { # verdict ok|"not ok" NAME
    number=$((number + 1))
    [ "$1" = ok ] || bad=$((bad + 1))
    echo "$1 $number - $2"
}

test=$build/tests/softdirty/test_softdirty
mkdir -p "$(dirname "$test")"
[ -e "$build/liblifeboat.a" ] || { echo "run.sh: $build/liblifeboat.a is missing: run make first" >&2; exit 1; }
if [ ! -e "$test" ] || [ "$build/liblifeboat.a" -nt "$test" ] || [ "$here/test_softdirty.c" -nt "$test" ]; then
    # shellcheck disable=SC2046,SC2086 # lists of words
    ${CC:-cc} -std=c11 -D_GNU_SOURCE -I"$top" -I"$build/gen" -Wall -Wextra -Wshadow -Wvla -Wmissing-prototypes -Wformat=2 \
        ${CFLAGS:--O2 -g} -pthread -o "$test.tmp" "$here/test_softdirty.c" -Wl,--as-needed "$build/liblifeboat.a" -lcmocka \
        $(pkg-config --cflags --libs libevent libevent_pthreads libzstd libsodium libprotobuf-c jansson libxxhash libcrypto) -lm
    mv "$test.tmp" "$test"
fi
"$top/tests/guest/build.sh" "$build/guest" >&2

# A disk whose blocks can be told apart.
perl -e 'print pack("Q<", $_), "\xa5" x 4088 for 1 .. 1024' >"$work/disk"

# --- in a VM
root=$work/root
mkdir -p "$root"/{bin,lib,lib64}
cp "$test" "$root/bin/test_softdirty"
ldd "$test" | awk '$2 == "=>" { print $3 } $1 ~ /^\// { print $1 }' | while read -r file; do
    case $file in
    */ld-linux-*) cp -L "$file" "$root/lib64/" ;;
    *) cp -L "$file" "$root/lib/" ;;
    esac
done
cat >"$root/init" <<'END'
#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
exec </dev/console >/dev/console 2>&1
export PATH=/bin LD_LIBRARY_PATH=/lib
for module in $(busybox cat /lib/modules.order); do
    busybox insmod "/lib/modules/$module"
done
tries=0
while [ ! -e /dev/vda ] && [ $tries -lt 100 ]; do
    busybox usleep 20000
    tries=$((tries + 1))
done
echo 4 >/proc/sys/vm/nr_hugepages
echo always >/sys/kernel/mm/transparent_hugepage/enabled # off by itself in a small machine
echo "KERNEL=$(busybox uname -r)"
test_softdirty soft-dirty /dev/vda
echo "RC=$?"
busybox poweroff -f
END
chmod 755 "$root/init"
busybox=$build/guest/debs/busybox-static/bin/busybox
[ -x "$busybox" ] || busybox=$(command -v busybox)
# Archives one after the other are one initramfs, later files replacing earlier ones.
(cd "$root" && find . | LC_ALL=C sort | "$busybox" cpio -o -H newc -R 0:0 2>/dev/null) >"$work/overlay"
cat "$build/guest/initrd.img" "$work/overlay" >"$work/initrd"
console=$work/console
: >"$console"
started=$(date +%s)
timeout -k 5 180 qemu-system-x86_64 -accel tcg -machine pc -cpu max -smp 2 -m 512 -display none -nodefaults -no-reboot \
    -kernel "$build/guest/vmlinuz" -initrd "$work/initrd" -append "console=ttyS0 quiet loglevel=1 panic=-1" \
    -serial "file:$console" -drive "file=$work/disk,if=none,id=d0,format=raw" -device virtio-blk-pci,drive=d0 \
    </dev/null >"$work/qemu.log" 2>&1 || sed 's/^/# /' "$work/qemu.log"
tr -d '\r' <"$console" >"$console.txt"
kernel=$(sed -n 's/^KERNEL=//p' "$console.txt")
echo "# VM with kernel ${kernel:-unknown}: $(($(date +%s) - started)) s"
renumber "soft-dirty" "$console.txt"
if grep -qx 'RC=0' "$console.txt"; then
    verdict ok "soft-dirty: the test ended well in the VM"
else
    verdict "not ok" "soft-dirty: the test ended well in the VM"
    tail -20 "$console.txt" | sed 's/^/# /'
fi

# --- here
if [ "$(id -u)" != 0 ]; then
    number=$((number + 1))
    echo "ok $number - uffd: on this host # SKIP needs root"
elif [ "$(printf '6.7\n%s\n' "$(uname -r)" | sort -V | head -1)" != 6.7 ]; then
    number=$((number + 1))
    echo "ok $number - uffd: on this host # SKIP Linux $(uname -r) is older than 6.7"
else
    # O_DIRECT needs a file system that has it, which a temporary folder may not be on
    disk=$build/tests/softdirty/disk
    cp "$work/disk" "$disk"
    dd if="$disk" of=/dev/null bs=4096 count=1 iflag=direct 2>/dev/null || disk=
    rc=0
    timeout -k 5 120 "$test" uffd ${disk:+"$disk"} >"$work/here" 2>&1 || rc=$?
    rm -f "$build/tests/softdirty/disk"
    renumber "uffd" "$work/here"
    if [ $rc = 0 ]; then
        verdict ok "uffd: the test ended well on Linux $(uname -r)"
    else
        verdict "not ok" "uffd: the test ended well on Linux $(uname -r) (status $rc)"
    fi
fi
echo "1..$number"
[ $bad = 0 ]
