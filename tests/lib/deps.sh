#!/bin/sh
# Install what a step needs, by package name, only what is missing, quietly.
#   deps.sh [--say] build|unit|check|demo|bench|rdma [...]
# Debian 12 and 13. As an ordinary user, or with --say, it only says what is missing.
set -eu
cd "$(dirname "$0")/../.."

build="gcc make pkg-config libc6-dev libevent-dev libzstd-dev libsodium-dev libprotobuf-c-dev
 protobuf-c-compiler libjansson-dev libxxhash-dev libssl-dev libnbd-dev nbdkit-plugin-dev libibverbs-dev librdmacm-dev"
unit="libcmocka-dev perl"
guest="bash binutils xz-utils busybox-static qemu-system-x86 qemu-utils nbdkit python3 iproute2 procps"
check="mandoc etcd-server"
demo="gnuplot-nox etcd-server"
bench="gnuplot-nox etcd-server"
rdma="ibverbs-providers ibverbs-utils rdmacm-utils etcd-server"

say=
[ "${1:-}" != --say ] || { say=1; shift; }
[ "$(id -u)" = 0 ] || say=1
want= downloads=
for set in "$@"; do
    case $set in
    build) want="$want $build" ;;
    unit)  want="$want $build $unit" ;;
    check) want="$want $build $unit $guest $check" downloads=1 ;;
    demo)  want="$want $build $guest $demo" downloads=1 ;;
    bench) want="$want $build $guest $bench" downloads=1 ;;
    rdma)  want="$want $build $guest $rdma" downloads=1 ;;
    *) echo "deps.sh: unknown set $set" >&2; exit 2 ;;
    esac
done
if ! command -v dpkg-query >/dev/null; then
    # Elsewhere the compiler says what it lacks.
    # shellcheck disable=SC2086 # list of words
    [ -n "$say" ] || echo "deps.sh: this is no Debian, nothing is installed; what is needed is called there:" $want >&2
    exit 0
fi

missing=
for p in $want; do
    dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q ' installed$' || missing="$missing $p"
done
if [ -n "$say" ]; then
    [ -n "$missing" ] || exit 0
    echo "packages are missing; as root: make deps-$1, or apt-get install$missing" >&2
    exit 1
fi
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# A fresh machine has no package lists, an old one has stale ones. The guest is downloaded by apt, too, when it is not there.
if [ -n "$missing" ] || { [ -n "$downloads" ] && [ ! -e build/guest/initrd.img ]; }; then
    apt-get update -qq >"$log" 2>&1 || true # what is cached may do
fi
[ -n "$missing" ] || exit 0
echo "installing:$missing"
# A package that brings a service (etcd) must not start it: what is needed is the program.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    trap 'rm -f "$log" $policy' EXIT
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod 755 $policy
fi
# shellcheck disable=SC2086 # list of words
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >>"$log" 2>&1 || {
    cat "$log" >&2
    echo "packages could not be installed; see above" >&2
    exit 1
}
