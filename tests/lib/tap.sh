#!/bin/bash
# Run one test for prove. cmocka writes a skipped test as "not ok N # SKIP", which prove counts as failed.
set -o pipefail
"$@" 2>&1 | sed -u -E 's/^not ok ([0-9]+ .*# SKIP)/ok \1/; s/^not ok ([0-9]+) # SKIP/ok \1 # SKIP/'
