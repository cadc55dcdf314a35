#!/bin/sh
# Fetch published Noise test vectors from a Debian package, once. They are not kept
# in this repository. Usage: noise_vectors.sh [FILE]   (default build/vectors/noise.txt)
set -eu
out=${1:-build/vectors}/noise.txt
suite='handshake=Noise_XX_25519_ChaChaPoly_SHA256$'
[ -s "$out" ] && exit 0
mkdir -p "$(dirname "$out")"
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
chmod 755 "$tmp"
(cd "$tmp" && apt-get -q download golang-github-flynn-noise-dev >log 2>&1 ||
    { cat log >&2; echo "cannot fetch the package with the Noise vectors: check apt's sources" >&2; exit 1; })
dpkg-deb -x "$tmp"/golang-github-flynn-noise-dev_*.deb "$tmp/x"
found=$(find "$tmp/x" -name 'vectors.txt' | head -n 1)
[ -n "$found" ] && grep -q "$suite" "$found" ||
    { echo "the package holds no vectors for the suite" >&2; exit 1; }
cp "$found" "$out.part"
mv "$out.part" "$out"
