#!/bin/bash
# Nothing includes upward: core <- netproto <- checkpoint <- migrate <- remus <- cmd. TAP.
#   check_layers.sh [ROOT]      with no ROOT: this repository, after trying the check itself on a tree that is wrong
#
# Looked at: #include "..." (and <...> that names one of our folders) of every .c, .h and .proto. Paths are from the
# top, as the compiler's -I. has it; a bare name is a file of the includer's own folder; "../" is not used at all.
# Private headers (NAME_internal.h) are for the folder they are in and those below it.
set -euo pipefail
self=$(cd "$(dirname "$0")" && pwd)/$(basename "$0")
top=${1:-$(dirname "$self")/../..}
cd "$top"
layers="core netproto checkpoint migrate remus cmd"
number=0 bad=0
point() { # point NAME COMPLAINTS: not ok when there are any
    number=$((number + 1))
    if [ -z "$2" ]; then
        echo "ok $number - $1"
    else
        echo "not ok $number - $1"
        sed 's/^/# /' <<<"$2"
        bad=$((bad + 1))
    fi
}

if [ $# = 0 ]; then
    wrong=$(mktemp -d)
    trap 'rm -rf "$wrong"' EXIT
    try() { # try WHAT FILE LINE: the check must complain about a tree with just this in it
        rm -rf "${wrong:?}"/*
        mkdir -p "$wrong/core" "$wrong/$(dirname "$2")"
        echo '/* x */' >"$wrong/core/core.h"
        echo "$3" >"$wrong/$2"
        if ("$self" "$wrong" || true) | grep "^# $2:1: " >/dev/null; then
            point "finds $1" ""
        else
            point "finds $1" "$2 with: $3"
        fi
    }
    try "an include of a higher layer" core/a.c '#include "migrate/migrate.h"'
    try "one with odd spacing" netproto/sub/a.h '  #  include   "cmd/daemon/daemon.h"'
    try "one in angle brackets" migrate/a.c '#include <remus/remus.h>'
    try "one by way of .." core/qemu/a.c '#include "../../netproto/netproto.h"'
    try "one of the tests" cmd/cli/a.c '#include "tests/rig.h"'
    try "a foreign private header" migrate/a.c '#include "core/qemu/qemu_internal.h"'
    try "an upward import" netproto/a.proto 'import "migrate/x.proto";'
fi

found=$(for layer in $layers; do
    [ ! -d "$layer" ] || find "$layer" -type f \( -name '*.[ch]' -o -name '*.proto' \)
done | LC_ALL=C sort)
complaints=$(awk -v layers="$layers" '
    BEGIN {
        n = split(layers, name, " ")
        for (i = 1; i <= n; i++)
            level[name[i]] = i
    }
    /^[ \t]*#[ \t]*include[ \t]*["<]/ || /^[ \t]*import[ \t]+(public[ \t]+|weak[ \t]+)?"/ {
        match($0, /["<][^">]*[">]/)
        what = substr($0, RSTART + 1, RLENGTH - 2)
        angle = substr($0, RSTART, 1) == "<"
        split(FILENAME, from, "/")
        split(what, to, "/")
        where = FILENAME ":" FNR ": "
        seen++
        if (what ~ /\.\.\//)
            print where "includes " what ": write the path from the top"
        else if (to[1] in level && what ~ /\//) {
            if (level[to[1]] > level[from[1]])
                print where from[1] " must not include " what
            folder = what
            sub(/[^\/]*$/, "", folder)
            if (what ~ /_internal\.h$/ && index(FILENAME, folder) != 1)
                print where what " is private to " folder
        } else if (!angle && what ~ /\//)
            print where what " is in none of the layers"
    }
    END { if (!seen) print "no include found at all" }
' $found </dev/null)
point "$(wc -w <<<"$found") files of $(wc -w <<<"$layers") layers include downward only" "$complaints"
echo "1..$number"
[ $bad = 0 ]
