#!/bin/bash
# The command line against a daemon in a directory of its own: every subcommand with good and bad input, exit statuses,
# JSON. TAP. Parts with a real hypervisor need root and QEMU.
set -u
top=$(cd "$(dirname "$0")/../.." && pwd)
bin=${BUILD:-$top/build}
dir=$(mktemp -d "${TMPDIR:-/tmp}/lb-cli-XXXXXX")
daemons=() number=0 bad=0 out= err= rc=0 name=
cleanup() {
    "$bin/lifeboat" --host "$dir/a.sock" stop --force vm >/dev/null 2>&1
    "$bin/lifeboat" --host "$dir/b.sock" stop --force vm >/dev/null 2>&1
    for pid in "${daemons[@]}" ${hand_pid:-}; do kill -9 "$pid" 2>/dev/null; done
    rm -rf "$dir"
}
trap cleanup EXIT

point() { # point NAME STATUS [EXPLANATION]
    number=$((number + 1))
    if [ "$2" = 0 ]; then
        echo "ok $number - $1"
    else
        bad=$((bad + 1))
        echo "not ok $number - $1"
        printf '%s\n' "${3:-}" | sed 's/^/#   /'
    fi
}
skip() {
    number=$((number + 1))
    echo "ok $number - $1 # SKIP $2"
}
says() { printf 'exit %s\nstdout: %s\nstderr: %s' "$rc" "$out" "$err"; }
run() { # run NAME EXIT ARGUMENTS...: remembers out, err, rc
    name=$1
    local want=$2
    shift 2
    out=$("$bin/lifeboat" "$@" 2>"$dir/err")
    rc=$?
    err=$(<"$dir/err")
    [ "$rc" = "$want" ]
    point "$name" $? "lifeboat $*: wanted exit $want: $(says)"
}
a() { run "$1" "$2" --host "$dir/a.sock" "${@:3}"; }
b() { run "$1" "$2" --host "$dir/b.sock" "${@:3}"; }
out_has() { [[ $out == *"$1"* ]]; point "$name: prints \"$1\"" $? "$(says)"; }
err_has() { [[ $err == *"$1"* ]]; point "$name: complains \"$1\"" $? "$(says)"; }
# The answer is one JSON object for which the Python expression over `o` is true.
json_has() {
    python3 -c 'import json, sys
o = json.loads(sys.argv[1])
sys.exit(0 if eval(sys.argv[2]) else 1)' "$out" "$1" 2>"$dir/why"
    point "$name: JSON: $1" $? "$(says); $(<"$dir/why")"
}
get() { python3 -c 'import json, sys; print(eval("o" + sys.argv[2], {"o": json.loads(sys.argv[1])}))' "$out" "$1"; }
failure() { # failure NAME EXIT CODE ARGUMENTS...: for people and as JSON; both give a reason
    local exit=$2 code=$3 what=$1
    shift 3
    a "$what" "$exit" "$@"
    err_has "lifeboat: "
    # --json before what may be a hypervisor's command
    a "$what, as JSON" "$exit" "$1" --json "${@:2}"
    json_has "o['error']['code'] == '$code' and o['error']['message'] and 'remedy' in o['error']"
}
start() { # start NAME OPTIONS...
    local who=$1
    shift
    "$bin/lifeboatd" --state-dir "$dir/$who" --socket "$dir/$who.sock" "$@" 2>>"$dir/$who.log" </dev/null &
    daemons+=($!)
    disown $!
    for _ in $(seq 200); do
        if [ -S "$dir/$who.sock" ] && "$bin/lifeboat" --host "$dir/$who.sock" ls >/dev/null 2>&1; then
            point "daemon $who starts" 0
            return
        fi
        sleep 0.02
    done
    point "daemon $who starts" 1 "$(cat "$dir/$who.log")"
    echo "Bail out! no daemon"
    exit 1
}
eventually() { # eventually NAME COMMAND...
    local what=$1
    shift
    for _ in $(seq 250); do
        if "$@" >/dev/null 2>&1; then
            point "$what" 0
            return
        fi
        sleep 0.02
    done
    point "$what" 1 "$*"
}

# ---- without a daemon
commands="run adopt release ls status show stop migrate preflight cancel recover history protect unprotect failover top host suspend resume checkpoint restore clone plan evacuate maintenance ask"
run "--help" 0 --help
for c in $commands; do [[ $out == *"  $c "* ]] || point "--help lists $c" 1 "$out"; done
run "--version" 0 --version
for c in $commands "host id" "host trust" "host ls" "host forget" "checkpoint take" "checkpoint ls" "checkpoint show" "checkpoint verify" \
    "checkpoint rm" "checkpoint prune" "checkpoint export" "checkpoint import"; do
    # shellcheck disable=SC2086 # two words
    run "$c --help" 0 $c --help
    out_has "--json"
done
run "no arguments" 2
run "unknown subcommand" 2 frobnicate
run "unknown option" 2 ls --frobnicate
run "usage error with --json" 2 status --json
json_has "o['error']['code'] == 'usage'"
run "daemon not there" 7 --host "$dir/none.sock" ls --json
err_has "remedy: start it"
json_has "o['error']['code'] == 'net'"
LIFEBOAT_SOCKET=$dir/other.sock run "\$LIFEBOAT_SOCKET" 7 ls
err_has "$dir/other.sock"

cat >"$dir/rack.json" <<'END'
{"hosts": [{"name": "a", "memory_bytes": "8G", "link_bytes_per_s": "1Gbit"}, {"name": "b", "memory_bytes": "4G", "link_bytes_per_s": "1Gbit"}],
 "vms": [{"name": "web", "host": "a", "memory_bytes": "2G"}, {"name": "big", "host": "b", "memory_bytes": "4000M"}]}
END
run "plan needs no daemon" 6 --host "$dir/none.sock" plan --inventory "$dir/rack.json" --evacuate b,a
out_has "stays: web on a: there is no host to go to"
run "plan --json" 0 plan --inventory "$dir/rack.json" --evacuate b --to a --parallel 2 --json
json_has "[(s['vm'], s['to']) for s in o['steps']] == [('big', 'a')] and o['stays'] == [] and 31 < o['makespan_s'] < 35"
json_has "[(h['name'], h['before_bytes'] >> 20, h['after_bytes'] >> 20) for h in o['hosts']] == [('a', 2048, 6048), ('b', 4000, 0)]"
run "plan that says why not" 6 plan --inventory "$dir/rack.json" --evacuate a
out_has "stays: web on a: host b lacks 1.9 GiB"
run "plan of an unknown host" 3 plan --inventory "$dir/rack.json" --evacuate c
err_has "there is no host \"c\""
run "plan of nothing" 2 plan --inventory "$dir/rack.json"
err_has "remedy: name it with --evacuate"
echo '{"hosts": [{"name": "a"}], "vms": []}' >"$dir/bad.json"
run "plan of a bad inventory" 2 plan --inventory "$dir/bad.json"
err_has 'hosts[0] ("a").memory_bytes is missing'
for word in "" "--inventory" "--inventory x --parallel 0" "--inventory x --hot x" "--inventory x y"; do
    # shellcheck disable=SC2086 # words
    run "plan $word" 2 plan $word
done

for word in "evacuate x" "evacuate --to ," "evacuate --parallel 0" "evacuate --parallel many" "evacuate --bandwidth fast" "evacuate --hot x" \
    maintenance "maintenance x" "maintenance on off" "maintenance on --bring-back" "maintenance off --reason x" "maintenance status --parallel 2" \
    cancel "cancel x y" "cancel x --evacuation"; do
    # shellcheck disable=SC2086 # words
    run "$word" 2 --host "$dir/none.sock" $word
done
run "evacuate without a daemon" 7 --host "$dir/none.sock" evacuate --yes
run "evacuate --priority of a file that is not there" 3 --host "$dir/none.sock" evacuate --priority "$dir/none"

# ---- the daemon's own start
port_a=$((20000 + RANDOM % 20000)) port_b=$((20000 + RANDOM % 20000))
lifeboatd() { # lifeboatd NAME EXIT TEXT OPTIONS...: must not start
    local what=$1 want=$2 text=$3
    shift 3
    err=$(timeout 10 "$bin/lifeboatd" "$@" 2>&1)
    rc=$?
    [ $rc = "$want" ] && [[ $err == *"$text"* ]]
    point "$what" $? "lifeboatd $*: wanted exit $want and \"$text\": exit $rc: $err"
}
start a --listen "127.0.0.1:$port_a"
start b --listen "127.0.0.1:$port_b"
lifeboatd "second daemon on a state directory" 4 "another lifeboatd" --state-dir "$dir/a" --socket "$dir/c.sock" --listen none
lifeboatd "socket in use" 4 "remedy" --state-dir "$dir/c" --socket "$dir/a.sock" --listen none
lifeboatd "busy port" 4 "$port_a" --state-dir "$dir/c" --socket "$dir/c.sock" --listen "127.0.0.1:$port_a"
lifeboatd "bad address" 2 "remedy" --state-dir "$dir/c" --socket "$dir/c.sock" --listen "host:port"
lifeboatd "missing configuration" 3 "$dir/none.conf" --state-dir "$dir/c" --socket "$dir/c.sock" --config "$dir/none.conf"
echo "bandwith = 1Gbit" >"$dir/bad.conf"
lifeboatd "wrong configuration" 2 "bad.conf:1" --state-dir "$dir/c" --socket "$dir/c.sock" --config "$dir/bad.conf"
lifeboatd "unknown option" 2 "" --frobnicate
lifeboatd "unknown log level" 2 "loud" --log-level loud
mode=$(stat -c %a "$dir/a.sock")
[ "$mode" = 600 ]; point "the socket is its owner's" $? "mode $mode"
mode=$(stat -c %a "$dir/a/identity.key")
[ "$mode" = 600 ]; point "the key is its owner's" $? "mode $mode"

# ---- lists of nothing
a "ls" 0 ls --json
json_has "o['vms'] == []"
a "history" 0 history --json
json_has "o == {'history': []}"
a "recover with no VM" 0 recover --json
json_has "o['vms'] == [] and o['failed'] is False"
a "ls takes no name" 2 ls x
a "top" 0 top --json
json_has "o == {'protections': []}"
a "top as a table" 0 top --once
out_has "PAUSE p50/p99"
a "top takes no name" 2 top x
a "top --interval" 2 top --interval soon
failure "status of nothing" 3 not-found status ghost
failure "show of nothing" 3 not-found show ghost
failure "stop of nothing" 3 not-found stop ghost
failure "release of nothing" 3 not-found release ghost
failure "cancel of nothing" 3 not-found cancel ghost
failure "recover of nothing" 3 not-found recover ghost
failure "migrate of nothing" 3 not-found migrate ghost b
failure "preflight of nothing" 3 not-found preflight ghost b
failure "protect of nothing" 3 not-found protect ghost --manual
failure "unprotect of nothing" 3 not-found unprotect ghost
a "status of nothing" 3 status ghost
err_has "lifeboat history ghost"
failure "failover of nothing" 3 not-found failover ghost
failure "a name like a path" 2 usage status ../../etc
[ ! -e "$dir/a/vms/ghost" ]; point "a VM that is not there leaves nothing" $? "$(ls -la "$dir/a/vms")"
a "history --limit" 0 history --limit 5
a "history --limit 0" 2 history --limit 0
for word in "--bandwidth fast" "--max-downtime 0" "--channels 0" "--channels 65" "--compress gzip" "--compress zstd:20" \
    "--timeout soon"; do
    # shellcheck disable=SC2086 # two words
    a "migrate $word" 2 migrate vm b $word
done

for word in "--interval 0" "--interval 2s" "--lease 10ms" "--lease 61s" "--disk raw" "--witness w1:2379" "--witness etcd:" \
    "--manual --fence x" "--witness etcd:http://w1 --manual" "--bandwidth fast" "--delta-cache lots" "--channels 65" "--backup ,"; do
    # shellcheck disable=SC2086 # words
    a "protect $word" 2 protect vm $word
done
a "protect of two" 2 protect vm b --manual

# ---- an evacuation of nothing
a "maintenance status" 0 maintenance status --json
json_has "o == {'maintenance': False, 'since_ms': 0, 'reason': '', 'left': []}"
a "evacuate --dry-run" 0 evacuate --dry-run
out_has "0 steps, 0 B sent"
a "evacuate --dry-run changes nothing" 0 maintenance status
out_has "maintenance mode is off"
failure "evacuate without a terminal" 2 usage evacuate
err_has "remedy: add --yes"
failure "evacuate to a host that is not trusted" 3 not-found evacuate --dry-run --to ghost
printf 'x*: 3\nghost: 1\n' >"$dir/priorities"
failure "a priority of no VM" 3 not-found evacuate --dry-run --priority "$dir/priorities"
err_has "$dir/priorities:2: there is no VM \"ghost\""
printf '\n# who first\nx* 3\n' >"$dir/priorities"
failure "a priority without a number" 2 usage evacuate --dry-run --priority "$dir/priorities"
err_has "$dir/priorities:3: "
printf '\n# who first\nx*: 3\n' >"$dir/priorities"
a "a priority of none yet" 0 evacuate --dry-run --priority "$dir/priorities"
failure "cancel of no evacuation" 5 state cancel --evacuation
a "evacuate" 0 evacuate --yes
out_has "is empty: 0 VMs"
a "evacuate begins maintenance mode" 0 maintenance status
out_has "evacuation"
a "maintenance on" 0 maintenance on --reason "a new disk" --json
json_has "o['maintenance'] and o['since_ms'] > 0 and o['reason'] == 'a new disk'"
a "maintenance off --bring-back" 0 maintenance off --bring-back
out_has "0 VMs came back"
a "maintenance off" 0 maintenance off --json
json_has "o['maintenance'] is False"

# ---- checkpoints of nothing
a "checkpoint ls" 0 checkpoint ls --json
json_has "o == {'checkpoints': []}"
a "checkpoint ls as a table" 0 checkpoint ls
out_has "CHECKPOINT"
failure "suspend of nothing" 3 not-found suspend ghost
failure "resume of nothing" 3 not-found resume ghost
failure "checkpoint of nothing" 3 not-found checkpoint ghost
failure "restore of nothing" 3 not-found restore ghost@1
failure "clone of nothing" 3 not-found clone ghost@1 2
failure "checkpoint show of nothing" 3 not-found checkpoint show ghost@1
failure "checkpoint rm of nothing" 3 not-found checkpoint rm ghost@1
failure "a schedule of nothing" 3 not-found checkpoint ghost --every 10m
failure "import of nothing" 3 not-found checkpoint import "$dir/none"
failure "a key file that is not there" 3 not-found restore ghost --key "$dir/none"
failure "a passphrase file that is not there" 3 not-found restore ghost --passphrase-file "$dir/none"
: >"$dir/empty"
failure "an empty passphrase" 2 usage restore ghost --passphrase-file "$dir/empty"
failure "prune of everything" 2 usage checkpoint prune
a "suspend --all of nothing" 0 suspend --all --json
json_has "o == {'done': [], 'failed': [], 'left': []}"
a "resume --all of nothing" 0 resume --all
out_has "0 done, 0 failed"
head -c 32 /dev/urandom >"$dir/key"
chmod 600 "$dir/key"
failure "resume --all with a key nobody waits for" 3 not-found resume --all --key "$dir/key"
chmod 644 "$dir/key"
failure "a key that others may read" 8 auth restore ghost --key "$dir/key"
for word in "suspend" "suspend vm --all" "resume vm x" "restore" "restore vm@1 --tap tap0" "restore vm@1 --tap =x" "clone vm@1" \
    "clone vm@1 0" "clone vm@1 257" "clone vm@1 2 3" "checkpoint" "checkpoint vm x" "checkpoint vm --every 9s" "checkpoint vm --every often" \
    "checkpoint vm --every 1m --keep 0" "checkpoint vm --level 20" "checkpoint show" "checkpoint export vm@1" "checkpoint prune --older 0d" \
    "checkpoint prune --keep x" "suspend vm --key a --passphrase" "suspend --all --key a" "checkpoint vm --every 1m --passphrase"; do
    # shellcheck disable=SC2086 # words
    a "$word" 2 $word
done
[ ! -e "$dir/a/vms/ghost" ] && [ -z "$(ls -A "$dir/a/checkpoints" 2>/dev/null)" ]
point "nothing leaves nothing" $? "$(find "$dir/a/vms" "$dir/a/checkpoints")"

# ---- hosts
a "host id" 0 host id
key_a=$out
[[ $key_a =~ ^lb1[0-9a-f]{64}$ ]]; point "host id prints the key alone" $? "$(says)"
err_has "lifeboat host trust"
a "host id --json" 0 host id --json
json_has "o['key'] == '$key_a' and o['name'] and o['listen'] == '127.0.0.1:$port_a'"
b "host id of the other" 0 host id
key_b=$out
[ "$key_a" != "$key_b" ]; point "two hosts have two keys" $?
a "host trust" 0 host trust b "$key_b" "127.0.0.1:$port_b" --json
json_has "o == {'name': 'b', 'address': '127.0.0.1:$port_b', 'key': '$key_b'}"
b "host trust, the other order" 0 host trust a "127.0.0.1:$port_a" "$key_a"
a "host trust again" 0 host trust b "$key_b" "127.0.0.1:$port_b"
other=lb1$(printf '%064d' 7)
a "host trust with another key" 4 host trust b "$other"
err_has "forget"
a "host trust without an address" 0 host trust c "$other"
a "host ls" 0 host ls --json
json_has "sorted(h['name'] for h in o['hosts']) == ['b', 'c']"
a "host ls as a table" 0 host ls
out_has "NAME"
a "host forget" 0 host forget c --json
json_has "o['forgotten'] is True"
a "host forget of nothing" 3 host forget c
a "host trust of ourselves" 2 host trust me "$key_a"
a "host trust with a bad key" 2 host trust d lb1nonsense
a "host trust with a damaged key" 2 host trust d "${key_b%?}"
a "host trust with a bad name" 2 host trust "../d" "$other"
a "host trust with a bad address" 2 host trust d "$other" "a b"
a "host trust with too little" 2 host trust d
a "host alone" 2 host
a "host frobnicate" 2 host frobnicate --json
json_has "o['error']['code'] == 'usage'"
[ -z "$(find "$dir/a" -name '*.tmp')" ]; point "no temporary file is left" $?

# ---- noise on the socket: the daemon says no and lives
python3 - "$dir/a.sock" <<'PY'
import os, socket, struct, sys
for data in (b"", b"\0", b"\xff" * 4096, struct.pack("<I", 5) + b"\xff" * 5, struct.pack("<I", 0), os.urandom(5000)):
    s = socket.socket(socket.AF_UNIX)
    s.connect(sys.argv[1])
    try:
        s.sendall(data)
        s.shutdown(socket.SHUT_WR)
        s.settimeout(5)
        while s.recv(4096):
            pass
    except OSError:
        pass
    s.close()
PY
a "the daemon survives noise on its socket" 0 ls
# ... and on its port, also more of it than it takes
logs=$(ls "$dir/a/log")
python3 - "$port_a" <<'PY'
import os, socket, sys
peers = [socket.create_connection(("127.0.0.1", int(sys.argv[1]))) for _ in range(80)]
for i, s in enumerate(peers[:40]):
    try:
        s.sendall((b"LBv1C\0\0\0" + bytes(16) if i % 2 else b"") + os.urandom(100))
    except OSError:
        pass
PY
eventually "the daemon survives noise on its port" "$bin/lifeboat" --host "$dir/a.sock" ls
[ "$(ls "$dir/a/log")" = "$logs" ]; point "unknown peers leave no file" $? "$(ls "$dir/a/log")"

# ---- a hypervisor that fails
a "run without a command" 2 run vm
failure "run of a missing program" 3 not-found run vm -- "$dir/no-such-program"
err_has "no-such-program"
failure "run of a program that ends" 10 hypervisor run vm -- sh -c 'echo this is my reason; exit 3' sh
err_has "this is my reason"
failure "run with a bad name" 2 usage run .vm -- true
[ -z "$(ls -A "$dir/a/vms")" ]; point "a failed run leaves nothing" $? "$(find "$dir/a/vms")"
failure "adopt of no process" 3 not-found adopt vm --pid 2000000000
a "adopt without --pid" 2 adopt vm
a "adopt of nonsense" 2 adopt vm --pid x
failure "adopt of what is no hypervisor" "${ADOPT_EXIT:-3}" not-found adopt vm --pid $$
[ -z "$(ls -A "$dir/a/vms")" ]; point "a failed adopt leaves nothing" $? "$(find "$dir/a/vms")"

# ---- a real one
qemu=qemu-system-x86_64
machine=(-m 64 -display none -machine pc -nodefaults -accel tcg)
if [ "$(id -u)" != 0 ]; then
    skip "run, show, migrate, stop with QEMU" "needs root"
elif ! command -v $qemu >/dev/null; then
    skip "run, show, migrate, stop with QEMU" "$qemu is not installed"
else
    a "run" 0 run vm --json -- $qemu "${machine[@]}" -daemonize
    json_has "o['state'] == 'running' and o['alive'] and o['pid'] > 1 and 'daemonize' in o['warnings'][0]"
    pid=$(get "['pid']")
    [ "$(ps -o ppid= -p "$pid" | tr -d ' ')" != "${daemons[0]}" ]
    point "the VM is not a child of the daemon" $?
    failure "run of a name in use" 4 exists run vm -- $qemu
    failure "adopt of a name in use" 4 exists adopt vm --pid "$pid"
    a "release of a VM that was started here" 0 release vm
    failure "its name is not free" 4 exists run vm -- $qemu "${machine[@]}"
    failure "nor for another process" 4 exists adopt vm --pid $$
    a "adopt under the name it had" 0 adopt vm --pid "$pid" --json
    json_has "o['pid'] == $pid and o['qmp'] == '$dir/a/vms/vm/qmp.sock'"
    failure "adopt of a VM that is known" 4 exists adopt vm2 --pid "$pid"
    a "ls" 0 ls --json
    json_has "[(v['name'], v['state'], v['origin']) for v in o['vms']] == [('vm', 'running', 'adopted')]"
    a "status" 0 status vm --json
    json_has "o['running'] is True and o['session'] is None and o['pid'] == $pid"
    a "status for people" 0 status vm
    out_has "running"
    a "show" 0 show vm --json
    json_has "o['description']['ram_bytes'] == 64 << 20 and o['description']['machine'].startswith('pc-i440fx-')"
    failure "migrate to an unknown host" 3 not-found migrate vm nowhere
    failure "cancel of what does not migrate" 5 state cancel vm
    a "preflight" 0 preflight vm b --json
    json_has "o['dry_run'] and o['ok'] and len(o['checks']) > 5 and all(c['status'] != 'fail' for c in o['checks'])"
    a "preflight for people" 0 preflight vm b
    [[ $out == *" preflight"* && $out != *"0 B"* ]]; point "nothing is said of what was not sent" $? "$(says)"
    out_has "can move"
    a "a dry run is no migration" 0 history --json
    json_has "o['history'] == []"
    b "a dry run leaves nothing" 0 ls --json
    json_has "o['vms'] == []"

    failure "protect without a witness" 2 usage protect vm --backup b
    err_has "--manual"
    failure "protect by an unknown host" 3 not-found protect vm --backup nowhere --manual
    failure "protect by a host named twice" 2 usage protect vm --backup b,b --manual
    failure "unprotect of what is not protected" 5 state unprotect vm
    failure "failover of what is not protected" 5 state failover vm
    a "a refused protection" 0 status vm --json
    json_has "o['state'] == 'running' and 'protect' not in o and 'wish' not in o"

    a "checkpoint" 0 checkpoint vm --label first --json
    json_has "o['ref'] == 'vm@1' and o['number'] == 1 and o['label'] == 'first' and not o['increment'] and o['pause_ms'] > 0"
    a "a second checkpoint" 0 checkpoint vm
    out_has "vm@2: increment"
    a "checkpoint ls" 0 checkpoint ls vm
    out_has "vm@2"
    out_has "first"
    a "checkpoint show" 0 checkpoint show vm@first
    out_has "vm@1"
    a "checkpoint verify" 0 checkpoint verify vm
    out_has "whole"
    python3 -c 'import sys; f = open(sys.argv[1], "r+b"); f.seek(9000); b = f.read(1); f.seek(9000); f.write(bytes([b[0] ^ 1]))' \
        "$dir/a/checkpoints/vm/1.lbc"
    a "checkpoint verify of a damaged one" 9 checkpoint verify vm@1
    out_has "DAMAGED"
    a "checkpoint verify of a damaged one, as JSON" 9 checkpoint verify vm@1 --json
    json_has "o['ok'] is False and o['problems']"
    a "checkpoint verify of a damaged one, in silence" 9 checkpoint verify vm@1 --quiet
    failure "restore of a name in use" 4 exists restore vm@2
    a "checkpoint prune --dry-run" 0 checkpoint prune vm --keep 1 --labelled --dry-run
    out_has "would remove vm@1"
    a "checkpoint rm" 0 checkpoint rm vm@2 vm@1 --yes --json
    json_has "o['removed'] == 2 and sorted(o['refs']) == ['vm@1', 'vm@2']"
    a "a schedule" 0 checkpoint vm --every 90m --keep 3
    out_has "every 90 min"
    a "a schedule in ls" 0 ls --json
    json_has "o['vms'][0]['schedule']['every_ms'] == 5400000 and o['vms'][0]['schedule']['keep'] == 3"
    a "a schedule in status" 0 status vm
    out_has "every 90 min"
    a "no schedule" 0 checkpoint vm --every off
    out_has "no checkpoints by schedule"
    # the first one was due at once, and may be on its way
    eventually "nothing is taken any more" sh -c '"$1/lifeboat" --host "$2/a.sock" status vm --json |
        python3 -c "import json, sys; sys.exit(json.load(sys.stdin)[\"session\"] is not None)"' - "$bin" "$dir"
    a "suspend" 0 suspend vm
    out_has "vm is suspended"
    failure "suspend of a suspended one" 5 state suspend vm
    failure "stop of a suspended one" 5 state stop vm
    a "ls of a suspended one" 0 ls
    out_has "suspended"
    a "status of a suspended one" 0 status vm
    out_has "suspend.lbc"
    failure "rm of a suspended VM" 5 state checkpoint rm vm@suspend
    a "resume" 0 resume vm --wait --json
    json_has "o['resumed'] and not o['filling'] and o['running_ms'] > 0"
    a "suspend and resume in history" 0 history
    out_has "suspended"
    out_has "resumed"
    rm "$dir/a/history.jsonl"
    a "resumed" 0 status vm --json
    json_has "o['state'] == 'running' and o['running'] is True"
    pid=$(get "['pid']")

    # slow enough to look at
    slow=(--bandwidth 10KB --compress off --no-throttle)
    a "migrate --detach" 0 migrate vm b --detach --json "${slow[@]}"
    json_has "o['event'] == 'started' and len(o['session']) == 32"
    # shellcheck disable=SC2016 # for the inner shell
    eventually "status shows the session" sh -c '"$1/lifeboat" --host "$2/a.sock" status vm --json |
        grep -q "\"state\":\"migrating-out\".*\"role\":\"out\""' sh "$bin" "$dir"
    failure "a second migration of it" 5 state migrate vm b
    failure "stop of a busy VM" 5 state stop vm
    failure "release of a busy VM" 5 state release vm
    failure "host forget of a needed host" 5 state host forget b
    a "show of a busy VM" 0 show vm --json
    json_has "o['description'] is None"
    kill -9 "${daemons[0]}"
    eventually "kill -9 of the daemon" sh -c "! kill -0 ${daemons[0]}"
    start a --listen "127.0.0.1:$port_a"
    # shellcheck disable=SC2016
    eventually "after kill -9 a new daemon knows the session" sh -c '"$1/lifeboat" --host "$2/a.sock" status vm --json |
        grep -q "\"role\":\"out\""' sh "$bin" "$dir"
    a "cancel" 0 cancel vm --json
    json_has "o['cancelled'] is True and o['vm'] == 'vm' and o['host'] == 'b'"
    a "status after cancel" 0 status vm --json
    json_has "o['state'] == 'running' and o['running'] is True and o['pid'] == $pid"
    # shellcheck disable=SC2016
    eventually "the other host has forgotten it" sh -c '[ -z "$(ls -A "$1/b/vms")" ]' sh "$dir"

    # the session dies: the VM stays, by itself
    a "migrate, and kill the session" 0 migrate vm b --detach --json "${slow[@]}"
    # shellcheck disable=SC2016
    eventually "it has begun" sh -c '"$1/lifeboat" --host "$2/a.sock" status vm --json | grep -q "\"state\":\"pre-copy\""' sh "$bin" "$dir"
    a "status" 0 status vm --json
    kill -9 "$(get "['session']['pid']")"
    # shellcheck disable=SC2016
    eventually "the daemon brings it back" sh -c '"$1/lifeboat" --host "$2/a.sock" status vm --json |
        grep -q "\"state\":\"running\".*\"running\":true"' sh "$bin" "$dir"
    # shellcheck disable=SC2016
    eventually "nothing is left on the other host" sh -c '[ -z "$(ls -A "$1/b/vms")" ]' sh "$dir"
    a "recover of what runs" 0 recover vm
    out_has "running on this host"

    a "migrate" 0 migrate vm b --verify
    out_has "VM vm runs on host b"
    [[ $out == *"preflight: "* ]]; point "migrate shows its preflight" $? "$out"
    percents=$(sed -nE 's/^ *([0-9]+)% .*/\1/p' <<<"$out")
    [ -n "$percents" ] && [ "$percents" = "$(sort -n <<<"$percents")" ]
    point "its progress never runs backwards" $? "$percents"
    [ ! -e "$dir/a/vms/vm" ]; point "nothing of it is left here" $? "$(find "$dir/a/vms")"
    b "back at once, with events" 0 migrate vm a --json --progress
    lines=$out
    out=$(tail -n 1 <<<"$lines")
    json_has "o['ok'] and o['final_state'] == 'moved' and o['wire_bytes'] > 0 and o['direction'] == 'out'"
    out="[$(head -n -1 <<<"$lines" | paste -sd ,)]"
    json_has "[e['event'] for e in o][:1] == ['started'] and {'preflight', 'progress'} <= {e['event'] for e in o}"
    json_has "(lambda p: p == sorted(p))([e['percent'] for e in o if e['event'] == 'progress'])"
    b "history" 0 history vm --json
    json_has "[(h['direction'], h['ok']) for h in o['history']] == [('in', True), ('out', True)]"
    a "history with its failure" 0 history vm --json
    json_has "[h['direction'] for h in o['history'] if h['ok']] == ['out', 'in'] and any(h.get('error', {}).get('code') == 'cancelled' for h in o['history'])"
    a "migrate --quiet" 0 migrate vm b -q
    [ -z "$out$err" ]; point "--quiet is quiet" $? "$(says)"
    b "stop" 0 stop vm --json
    json_has "o['stopped'] is True and o['forced'] is False"
    [ -z "$(ls -A "$dir/b/vms")" ]; point "stop leaves nothing" $? "$(find "$dir/b/vms")"

    # protected; what a protection does to a guest is for other tests
    a "run it again" 0 run vm --json -- $qemu "${machine[@]}"
    pid=$(get "['pid']")
    "$bin/lifeboat" --host "$dir/a.sock" protect vm --backup b --manual --disk none --bandwidth 100KB >"$dir/slow.out" 2>&1 &
    slow=$!
    for _ in $(seq 100); do sleep 0.1; "$bin/lifeboat" --host "$dir/a.sock" ls | grep -q 'pre-copy' && break; done
    a "ls while it gets its first copy" 0 ls
    out_has "protecting"
    a "unprotect meanwhile" 0 unprotect vm
    wait "$slow"; [ $? -ne 0 ]; point "who waited for the protection is told" $? "$(cat "$dir/slow.out")"
    a "ls after that" 0 ls
    out_has "given up before it had all"
    a "protect" 0 protect vm --backup b --manual --disk none
    out_has "protection by host b begins"
    out_has "nothing, until somebody says"
    out_has "VM vm is protected by host b"
    a "a second protection of it" 5 protect vm --backup b --manual
    a "status of the primary" 0 status vm --json
    json_has "o['state'] == 'protected' and o['session']['role'] == 'protect' and o['wish']['backups'] == ['b'] and o['wish']['disk'] == 'none'"
    json_has "(lambda p: p['role'] == 'primary' and p['state'] == 'protected' and p['host'] == 'b' and p['epoch'] > 0)(o['protect'])"
    a "status for people" 0 status vm
    out_has "protected: host b can take over"
    a "ls of a protected VM" 0 ls
    out_has "epochs/s"
    a "top of the primary" 0 top --json
    json_has "[(p['vm'], p['role'], p['host'], p['witness']) for p in o['protections']] == [('vm', 'primary', 'b', 'manual')]"
    b "status of the backup" 0 status vm --json
    json_has "o['state'] == 'standby' and o['session']['role'] == 'backup' and o['protect']['role'] == 'backup' and o['protect']['host'] == 'a'"
    b "top of the backup" 0 top
    out_has "backup"
    a "preflight of a protected VM to its backup" 0 preflight vm b --json
    json_has "o['ok'] is True and [c['id'] for c in o['checks']] == ['protection']"
    failure "migrate of a protected VM to an unknown host" 3 not-found migrate vm nowhere
    a "asking its backup" 0 ask b status vm --json
    json_has "o['state'] == 'standby'"
    a "asking its backup, for people" 0 ask b status vm
    out_has "standby"
    failure "asking its backup for what runs here" 5 state ask b migrate vm
    failure "asking its backup for another one" 8 auth ask b protect vm --backup c
    failure "asking an unknown host" 3 not-found ask nowhere status vm
    a "asking for the impossible" 2 ask b stop vm
    a "asking for a backup without a name" 2 ask b protect vm
    failure "release of a protected VM" 5 state release vm
    failure "cancel of a protected VM" 5 state cancel vm
    failure "failover on the primary" 5 state failover vm
    err_has "on host b"
    for command in "unprotect vm" "stop vm" "release vm" "migrate vm a" "protect vm --manual" "cancel vm"; do
        # shellcheck disable=SC2086 # words
        b "on the standby: $command" 5 $command
    done
    a "status" 0 status vm --json
    session=$(get "['session']['pid']")
    log=$dir/a/log/$(get "['session']['id']").log
    head -c 1100000 /dev/zero | tr '\0' '\n' >>"$log"
    # shellcheck disable=SC2016
    eventually "the log of a long session begins anew" sh -c '[ "$(stat -c %s "$1")" -lt 1000000 ] && [ -s "$1.old" ]' sh "$log"
    kill -9 "${daemons[-1]}" # that of a: it was started again above
    printf 'witness = manual\nbackup = b\n' >"$dir/a.conf"
    start a --listen "127.0.0.1:$port_a" --config "$dir/a.conf"
    # shellcheck disable=SC2016
    eventually "a new daemon knows the protection" sh -c '"$1/lifeboat" --host "$2/a.sock" top --json | grep -q "\"state\":\"protected\""' sh "$bin" "$dir"
    a "status after kill -9 of the daemon" 0 status vm --json
    json_has "o['session']['pid'] == $session"
    a "unprotect" 0 unprotect vm --json
    json_has "o == {'vm': 'vm', 'host': 'b', 'unprotected': True}"
    a "status after unprotect" 0 status vm --json
    json_has "o['state'] == 'running' and o['running'] is True and o['session'] is None and 'protect' not in o"
    # shellcheck disable=SC2016
    eventually "the standby is gone" sh -c '[ -z "$(ls -A "$1/b/vms")" ]' sh "$dir"
    a "host trust of one that does not answer" 0 host trust dead "$other" 127.0.0.1:1
    a "protect by the second host" 0 protect vm --backup dead,b --manual --disk none
    out_has "VM vm is protected by host b"
    err_has "the next one is tried"
    a "unprotect" 0 unprotect vm
    failure "protect by nobody" 7 net protect vm --backup dead --manual
    a "after that" 0 status vm --json
    json_has "o['state'] == 'running' and 'protect' not in o"
    a "protect as configured, with events" 0 protect vm --disk none --json --progress
    lines=$out
    out=$(tail -n 1 <<<"$lines")
    json_has "o['protected'] is True and o['host'] == 'b' and o['protect']['state'] == 'protected'"
    out="[$(head -n -1 <<<"$lines" | paste -sd ,)]"
    json_has "o[0]['event'] == 'started' and o[0]['wish']['witness'] == 'manual' and {'preflight', 'protect'} <= {e['event'] for e in o}"

    # the standby dies: the VM runs on, and is protected again
    b "status" 0 status vm --json
    kill -9 "$(get "['session']['pid']")"
    # shellcheck disable=SC2016
    eventually "after the death of the standby" sh -c '! "$1/lifeboat" --host "$2/a.sock" top --json | grep -q "\"state\":\"protected\""' sh "$bin" "$dir"
    for _ in $(seq 10); do sleep 1; "$bin/lifeboat" --host "$dir/a.sock" top --json | grep -q '"state":"protected"' && break; done
    a "protected again" 0 status vm --json
    json_has "o['state'] == 'protected' and o['protect']['state'] == 'protected' and o['pid'] == $pid"
    b "the standby's host too" 0 status vm --json
    json_has "o['state'] == 'standby'"

    # the session dies: nobody else can have taken over, so the VM comes back, and is protected again
    a "status" 0 status vm --json
    kill -9 "$(get "['session']['pid']")"
    # shellcheck disable=SC2016
    eventually "after the death of the session" sh -c '! "$1/lifeboat" --host "$2/a.sock" top --json | grep -q "\"state\":\"protected\""' sh "$bin" "$dir"
    for _ in $(seq 5); do sleep 2; "$bin/lifeboat" --host "$dir/a.sock" top --json | grep -q '"state":"protected"' && break; done
    a "status after that" 0 status vm --json
    json_has "o['state'] == 'protected' and o['protect']['state'] == 'protected'"

    b "failover" 0 failover vm --json
    json_has "o['promoted'] is True and o['vm'] == 'vm'"
    # shellcheck disable=SC2016
    eventually "nothing of it is left on a, or its standby" sh -c '! "$1/lifeboat" --host "$2/a.sock" ls --json | grep -q "\"state\":\"\(running\|protected\)\""' sh "$bin" "$dir"
    for _ in $(seq 10); do sleep 1; "$bin/lifeboat" --host "$dir/b.sock" top --json | grep -q '"state":"protected"' && break; done
    b "after a failover the VM is protected by where it came from" 0 status vm --json
    json_has "o['state'] == 'protected' and o['protect']['host'] == 'a' and o['wish']['failovers'] == 1"
    b "history of a failover" 0 history vm --json
    json_has "[h['direction'] for h in o['history']][-1] == 'failover'"
    a "history of giving way" 0 history vm
    out_has "gave way"
    b "stop of a protected VM" 0 stop vm --json
    json_has "o['stopped'] is True"
    b "stop leaves nothing here" 0 ls --json
    json_has "o['vms'] == []"
    # shellcheck disable=SC2016
    eventually "stop leaves nothing there" sh -c '[ -z "$(ls -A "$1/a/vms")" ]' sh "$dir"

    # by hand, adopted, released, adopted, killed
    $qemu "${machine[@]}" -qmp "unix:$dir/hand.sock,server=on,wait=off" </dev/null >/dev/null 2>&1 &
    hand_pid=$!
    disown $hand_pid
    eventually "a VM by hand" test -S "$dir/hand.sock"
    a "adopt" 0 adopt hand --pid $hand_pid --json
    json_has "o['origin'] == 'adopted' and o['pid'] == $hand_pid and o['qmp'] == '$dir/hand.sock'"
    a "release" 0 release hand --json
    json_has "o['released'] is True and o['alive'] is True"
    kill -0 $hand_pid; point "a released VM runs" $?
    a "adopt with --qmp" 0 adopt hand2 --pid $hand_pid --qmp "$dir/hand.sock"
    kill -9 $hand_pid
    # SIGKILL returns before its victim has ended, and the first thread of a process may have ended before the others
    for _ in $(seq 100); do "$bin/lifeboat" --host "$dir/a.sock" ls --json | grep -q '"state":"dead"' && break; sleep 0.05; done
    hand_pid=
    a "ls of a dead VM" 0 ls --json
    json_has "o['vms'][0]['state'] == 'dead' and o['vms'][0]['alive'] is False"
    failure "stop of a dead VM" 5 state stop hand2
    failure "migrate of a dead VM" 5 state migrate hand2 b
    a "the name of a dead VM is free" 0 run hand2 -- $qemu "${machine[@]}"
    a "stop --force" 0 stop --force hand2 --json
    json_has "o['forced'] is True"
    a "all is gone" 0 ls --json
    json_has "o['vms'] == []"
fi

# ---- the end
for pid in "${daemons[@]}"; do kill -TERM "$pid" 2>/dev/null; done
eventually "SIGTERM ends the daemons" sh -c "for p in ${daemons[*]}; do ! kill -0 \$p 2>/dev/null || exit 1; done"
[ ! -e "$dir/a.sock" ] && [ ! -e "$dir/b.sock" ]; point "they remove their sockets" $?
echo "1..$number"
[ $bad = 0 ]
