#!/bin/sh
# Replay the committed seeds of every fuzz target. replay.sh [BUILD] (liblifeboat.a is there)
# To fuzz for real: clang -fsanitize=fuzzer,address instead of replay_main.c.
set -u
build=${1:-build}
cd "$(dirname "$0")/../.."
mkdir -p "$build/tests/fuzz"
# shellcheck disable=SC2046 # list of packages
libs=$(pkg-config --libs $(sed -n 's/^PKGS *:= //p' Makefile))
n=0 failed=0
for src in tests/fuzz/fuzz_*.c; do
    name=$(basename "$src" .c)
    n=$((n + 1))
    set -- tests/fuzz/seeds/"$name"/*
    # shellcheck disable=SC2086
    if [ -f "$1" ] &&
        ${CC:-cc} -std=c11 -D_GNU_SOURCE -I. -I"$build/gen" -Ibuild/gen -O1 -g -o "$build/tests/fuzz/$name" \
            "$src" tests/fuzz/replay_main.c "$build/liblifeboat.a" $libs -pthread &&
        "$build/tests/fuzz/$name" "$@"; then
        echo "ok $n - $name: $# seeds"
    else
        echo "not ok $n - $name"
        failed=1
    fi
done
echo "1..$n"
exit $failed
