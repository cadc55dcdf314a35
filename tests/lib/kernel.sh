# shellcheck shell=bash
# Debian's kernels for guests, sourced by scripts that build an initramfs. They define fail() and set $debs, the folder of unpacked
# packages; apt-get, dpkg-deb, objcopy and xz are needed. Nothing is installed.

# unpack PACKAGE: download it once and unpack it into its own folder, whose name is printed.
unpack() {
    local folder=$debs/$1
    if [ ! -e "$folder/.done" ]; then
        rm -rf "$folder" && mkdir -p "$folder/deb"
        (cd "$folder/deb" && apt-get -q -o APT::Sandbox::User= download "$1" >log 2>&1) ||
            fail "cannot download $1: $(tail -1 "$folder/deb/log") (run apt-get update?)"
        dpkg-deb -x "$folder"/deb/*.deb "$folder"
        rm -rf "$folder/deb"
        touch "$folder/.done"
    fi
    echo "$folder"
}

# The meta package only names the versioned one.
kernel_package() {
    local name
    name=$(apt-cache depends "$1" | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)$/\1/p' | head -1)
    [ -n "$name" ] || fail "$1 names no kernel package (run apt-get update?)"
    echo "$name"
}

# modules KERNEL_FOLDER TARGET NAME...: copies the modules and all they need to TARGET/lib/modules, in loading order.
modules() {
    local tree=$1/lib/modules target=$2 name file
    [ -d "$tree" ] || tree=$1/usr/lib/modules # since Debian 13
    [ -d "$tree" ] || fail "$(basename "$1") has its modules in an unknown place"
    set -- "$(basename "$1")" "${@:3}"
    mkdir -p "$target/lib/modules"
    : >"$target/lib/modules.order"
    add_module() {
        local want found plain depend
        want=$(sed 's/[-_]/[-_]/g' <<<"$1")
        found=$(find "$tree" \( -name "$want.ko" -o -name "$want.ko.xz" \) -print -quit)
        [ -n "$found" ] || return 1
        plain=$(basename "${found%.xz}")
        ! grep -qx "$plain" "$target/lib/modules.order" || return 0
        case $found in
        *.xz) xz -dc "$found" >"$target/lib/modules/$plain" ;;
        *) cp "$found" "$target/lib/modules/$plain" ;;
        esac
        for depend in $(objcopy -O binary -j .modinfo "$target/lib/modules/$plain" /dev/stdout |
            tr '\0' '\n' | sed -n 's/^depends=//p' | tr ',' ' '); do
            add_module "$depend" || fail "$plain needs $depend, which the kernel package lacks"
        done
        echo "$plain" >>"$target/lib/modules.order"
    }
    for name in "${@:2}"; do
        add_module "$name" || echo "  $1 has no module $name (built in, or not offered)"
    done
}
