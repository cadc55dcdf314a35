#!/bin/bash
# Holds the page bodies to what tests and benchmarks claim of them: check-body.sh LBGUEST. Pages are compressed one by one,
# as a migration does. Prints the ratios; fails when "compressible" is not 3.5..4.5 to 1 or "random" shrinks.
set -euo pipefail
program=$(realpath "${1:?usage: check-body.sh LBGUEST}")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
ratio() {
    rm -f "$folder"/page*
    "$program" body "$1" 100 | split -b 4096 -a 3 - "$folder/page"
    for page in "$folder"/page*; do zstd -1 -q --no-check -c "$page" | wc -c; done |
        awk '{ bytes += $1 } END { printf "%.2f\n", NR * 4096 / bytes }'
}
random=$(ratio random) text=$(ratio compressible)
echo "random $random, compressible $text"
awk -v r="$random" -v t="$text" 'BEGIN { exit !(r <= 1.0 && t >= 3.5 && t <= 4.5) }'
