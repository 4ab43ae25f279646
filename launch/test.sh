#!/usr/bin/env bash
# The tests, in an environment of their own: `bash launch/test.sh [--all] [pytest arguments]`. --all adds the slow ones (and the GPU's, where there is one).
cd "$(dirname "${BASH_SOURCE[0]}")/.."
filter="not slow and not gpu"
if [ "${1:-}" = "--all" ]; then
    shift
    filter="not gpu"
    if command -v nvidia-smi >/dev/null 2>&1; then filter="slow or not slow"; fi
fi
arguments=("$@")
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # ranks and workers of the tests would fight over the cores
source launch/env.sh test
exec "$PYTHON" -m pytest -q -m "$filter" ${arguments[@]+"${arguments[@]}"}
