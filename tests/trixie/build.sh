#!/bin/bash
# QEMU of Debian 13 on any Debian: build.sh OUTDIR -> OUTDIR/qemu-system-x86_64, with its libraries and firmware in OUTDIR/tree.
#
# The packages are resolved by apt in a private, throw-away state (nothing of the machine is read but where its Debian
# mirror is, and nothing of it is changed), checked against Debian's keys by apt as always, and unpacked. No root.
# The emulator gets the tree's own loader and library path written into it (patchelf, from the same tree), so it is an
# ordinary program: it needs no chroot and no wrapper, and /proc/PID/exe and cmdline look as those of an installed QEMU.
# Firmware and modules come from the tree too. Built once; made anew when this script changes or OUTDIR has moved.
set -euo pipefail
umask 022
suite=trixie
packages="qemu-system-x86 patchelf"

fail() { echo "trixie/build.sh: $*" >&2; exit 1; }
out=$(mkdir -p "${1:?usage: build.sh OUTDIR}" && cd "$1" && pwd -P)
self=$(cd "$(dirname "$0")" && pwd)/$(basename "$0")
[ "$(dpkg --print-architecture)" = amd64 ] || fail "only for amd64"
for tool in apt-get dpkg-deb flock; do
    command -v $tool >/dev/null || fail "$tool is missing: install it first"
done

exec 9>"$out/.lock"
flock 9
stamp="$out $(cksum <"$self")"
if [ "$(cat "$out/.done" 2>/dev/null)" = "$stamp" ] && [ -x "$out/qemu-system-x86_64" ]; then
    exit 0
fi
rm -rf "$out/.done" "$out/qemu-system-x86_64" "$out/tree"
work=$(mktemp -d "$out/.apt.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/{lists/partial,cache/archives/partial,parts}
: >"$work/status"

# Where this machine gets Debian itself from: what the downloaded Release files say, else the configured suite names.
mirrors() {
    local codename
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-$suite}")
    apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Component: main' 'Origin: Debian' "Codename: $codename"
    apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Component: main' "Release: $codename"
}
private_apt() {
    apt-get -q -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts="$work/parts" \
        -o Dir::Etc::preferences=/dev/null -o Dir::Etc::preferencesparts=/dev/null \
        -o Dir::State="$work" -o Dir::State::status="$work/status" -o Dir::Cache="$work/cache" \
        -o Acquire::Languages=none -o APT::Sandbox::User= -o APT::Architecture=amd64 -o APT::Architectures=amd64 "$@"
}
keys=/usr/share/keyrings/debian-archive-keyring.gpg
[ -r $keys ] && signed="Signed-By: $keys" || signed="Enabled: yes"
found=
for mirror in $(mirrors | awk '!seen[$0]++'); do
    printf 'Types: deb\nURIs: %s\nSuites: %s\nComponents: main\n%s\n' "$mirror" $suite "$signed" >"$work/parts/debian.sources"
    if private_apt -o APT::Update::Error-Mode=any update >"$work/log" 2>&1; then
        found=1
        break
    fi
done
[ -n "$found" ] || fail "cannot read the package lists of $suite: $(tail -1 "$work/log" 2>/dev/null || echo "no Debian mirror configured, run apt-get update")"
# shellcheck disable=SC2086 # list of words
private_apt -y --no-install-recommends --download-only install $packages >"$work/log" 2>&1 ||
    fail "cannot download $packages: $(tail -1 "$work/log")"
mkdir "$out/tree"
for deb in "$work"/cache/archives/*.deb; do
    dpkg-deb -x "$deb" "$out/tree" || fail "cannot unpack $(basename "$deb")"
done
rm -rf "$out"/tree/usr/share/{doc,man,locale,i18n,info,lintian,bug}

lib=$out/tree/usr/lib/x86_64-linux-gnu
loader=$out/tree/usr/lib64/ld-linux-x86-64.so.2
program=$out/tree/usr/bin/qemu-system-x86_64
[ -x "$loader" ] && [ -x "$program" ] || fail "the packages of $suite are laid out in an unknown way"
# DT_RPATH, not RUNPATH: it also serves the libraries' own needs and what is loaded later. $ORIGIN would not do for them.
paths=$lib
for sub in $(find "$lib" -mindepth 2 -name 'lib*.so.*' -printf '%h\n' | sort -u); do
    paths=$paths:$sub
done
"$loader" --library-path "$paths" "$out/tree/usr/bin/patchelf" --force-rpath --set-rpath "$paths" \
    --set-interpreter "$loader" "$program" || fail "cannot patch the emulator"
# Debian's QEMU takes its data from /usr whatever its own place is, except for what is in "qemu-bundle" beside the program.
mkdir "$out/tree/usr/bin/qemu-bundle"
ln -s ../.. "$out/tree/usr/bin/qemu-bundle/usr"
# A link, not a copy: "beside" is where /proc/self/exe says.
ln -s tree/usr/bin/qemu-system-x86_64 "$out/qemu-system-x86_64"
"$out/qemu-system-x86_64" --version >"$work/version" || fail "the emulator does not start here"
"$out/qemu-system-x86_64" -L help >"$work/data"
! grep -qv "^$out/tree/" "$work/data" || fail "the emulator looks for its data in $(tr '\n' ' ' <"$work/data")"
head -1 "$work/version"
echo "$stamp" >"$out/.done"
