#!/bin/bash
# What must not be in the repository, and what every header and command must have. TAP.
#   check_words.sh [ROOT]       with no ROOT: this repository, after trying the checks themselves on a tree that is wrong
set -euo pipefail
self=$(cd "$(dirname "$0")" && pwd)/$(basename "$0")
top=${1:-$(dirname "$self")/../..}
cd "$top"
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
skip() {
    number=$((number + 1))
    echo "ok $number - $1 # SKIP $2"
}

# This file must not find itself, so no pattern is spelled as what it matches.
paths='(^|[^A-Za-z0-9_.$})*/-])/(work|home|workspaces?|Users|root|tmp)/[A-Za-z0-9_]'
hosts='(ht|f)tps?://[^ "<>)/]*(debian|ubuntu)[^ "<>)]*|[a-z.]+\.debian\.(org|net)|registry\.npmjs|pypi\.(org|python)'
hosts="$hosts|crates\.(io)|docker\.(io)|ghcr\.(io)|proxy\.golang"
marks='\b(TO[D]O|FI[X]ME|X{3})\b'
# The commands that scripts outside this repository rely on.
contract="run adopt release ls status show stop migrate cancel recover preflight history host"

if [ $# = 0 ]; then
    wrong=$(mktemp -d)
    trap 'rm -rf "$wrong"' EXIT
    try() { # try WHAT FILE TEXT COMPLAINT: the check must complain about a tree with just this in it
        rm -rf "${wrong:?}"/*
        mkdir -p "$wrong/$(dirname "$2")"
        printf '%b\n' "$3" >"$wrong/$2"
        if ("$self" "$wrong" || true) | grep "^# .*$4" >/dev/null; then
            point "finds $1" ""
        else
            point "finds $1" "$2 with: $3"
        fi
    }
    try "a path of somebody's machine" core/a.c '/* see \0057home/jane/notes */' 'core/a.c:1:'
    try "a fixed name in a shared folder" tests/a.sh 'log=\0057tmp/log' 'tests/a.sh:1:'
    try "a mirror" tests/a.sh 'debootstrap x http:\0057/ftp.xx.debian.\0157rg/debian' 'tests/a.sh:1:'
    try "a mirror without a scheme" tests/a.sh 'host=deb.debian.\0157rg' 'tests/a.sh:1:'
    try "a mark of unfinished work" core/a.c '/* T\0117DO: later */' 'core/a.c:1:'
    try "a header that says nothing" core/a.h '#ifndef A_H\n#define A_H\n#endif' 'core/a.h'
    try "a header with an empty comment" core/a.h '/*\n */\n#ifndef A_H' 'core/a.h'
    try "commands without a page" cmd/cli/main.c 'const struct lb_cmd lb_cmd_migrate = {' 'cmd/cli/lifeboat-migrate.1'
    try "a command beyond the contract without a page" cmd/cli/main.c 'const struct lb_cmd lb_cmd_dance = {' 'cmd/cli/lifeboat-dance.1'
    try "a page without a command" cmd/cli/lifeboat-sing.1 '.Dd x' 'lifeboat-sing.1 describes no command'
    ! command -v mandoc >/dev/null ||
        try "a faulty page" cmd/cli/lifeboat-migrate.1 '.Dd $Mdocdate$\n.Dt LIFEBOAT 1\n.Os\n.Sh NAME\n.Foo' 'lifeboat-migrate.1.*macro'
fi

if [ $# = 0 ] && git rev-parse --is-inside-work-tree >/dev/null 2>&1; then
    files=$(git ls-files -co --exclude-standard)
else
    files=$(find . \( -name .git -o -name build \) -prune -o -type f -printf '%P\n')
fi
# Only what is still there, and text.
files=$(LC_ALL=C sort -u <<<"$files" | while IFS= read -r f; do [ ! -f "$f" ] || echo "$f"; done)
search() { # search REGEX [FILE_REGEX]
    grep -E "${2:-.}" <<<"$files" | tr '\n' '\0' | xargs -0 -r grep -nHIE -e "$1" || true
}
# tests/unit, tests/fuzz: made-up command lines and paths are test data there. A template for mkdtemp(3) is no fixed name.
point "no absolute path of a developer's machine" \
    "$(search "$paths" | grep -vE '^tests/(unit|fuzz)/|/tmp/[^" ]*XXXXXX' || true)"
point "no registry or mirror" "$(search "$hosts")"
point "nothing marked as unfinished" "$(search "$marks" '(\.([chS]|sh|py|proto|pl|md|[158]|yml|mk|pml)|Makefile|/[^./]+)$')"

headers=$(grep -E '^(core|netproto|checkpoint|migrate|remus|cmd)/.*\.h$' <<<"$files" || true)
silent=$(for h in $headers; do
    # the opening comment: at least three words before it ends
    awk 'NR == 1 && !/^\/\*/ { exit } { text = text " " $0 } /\*\// { exit } END {
        sub(/^ *\/\*/, "", text); sub(/\*\/.*/, "", text); gsub(/\*/, "", text)
        exit split(text, word, " ") >= 3 ? 0 : 1 }' "$h" || echo "$h does not begin with a comment that says what it is for"
done)
point "$(wc -w <<<"$headers") headers say what they are for" "$silent"

sources=$(grep -E '^cmd/cli/.*\.c$' <<<"$files" || true)
pages=$(grep -E '^cmd/cli/lifeboat-[^/]*\.1$' <<<"$files" || true)
if [ -z "$sources$pages" ]; then
    skip "every command has a man page" "there is no command line yet"
else
    # shellcheck disable=SC2086 # lists of files
    table=$([ -z "$sources" ] || sed -nE 's/^const struct lb_cmd lb_cmd_([a-z_]+) *=.*$/\1/p' $sources | tr _ -)
    missing=$([ -z "$sources" ] || for c in $(printf '%s\n' $contract $table | sort -u); do
        [ -f "cmd/cli/lifeboat-$c.1" ] || echo "cmd/cli/lifeboat-$c.1 is missing"
    done)
    stray=$(for p in $pages; do
        name=${p#cmd/cli/lifeboat-} name=${name%.1}
        printf '%s\n' $contract $table | grep -qx -- "$name" || echo "$p describes no command"
    done)
    point "every command has a man page" "$missing"
    point "every man page has a command" "$stray"
fi
manuals=$(grep -E '\.[1578]$' <<<"$files" || true)
if [ -z "$manuals" ]; then
    skip "mandoc accepts the man pages" "there are none yet"
elif ! command -v mandoc >/dev/null; then
    skip "mandoc accepts the man pages" "mandoc is not installed"
else
    # shellcheck disable=SC2086 # list of files
    point "mandoc accepts $(wc -w <<<"$manuals") man pages" "$(mandoc -Tlint -W warning $manuals 2>&1 || true)"
fi
echo "1..$number"
[ $bad = 0 ]
