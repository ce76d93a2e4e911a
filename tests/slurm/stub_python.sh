#!/usr/bin/env bash
# Stands in for Python where a test is about the batch script: every program but the training is Python's own. The
# training does what the file STUB says, in bash, on the first rank; the others end well.
set -euo pipefail
if [[ $1 != */pretrain_symbiotic.py ]]; then
    exec "$REAL_PYTHON" "$@"
fi
[[ $SLURM_PROCID == 0 ]] || exit 0
# shellcheck source=/dev/null
source "$STUB"
