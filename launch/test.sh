#!/usr/bin/env bash
# Checks and tests, in an environment of their own:
# `bash launch/test.sh [--all | --long | --mutants N] [pytest arguments]`.
# Linter, formatter, types and documentation first (under two minutes), then the fast tests on all cores.
# --all adds the slow tests, and those of a GPU where there is one. With pytest arguments only these tests run.
# --mutants N [--seed S] plants N faults of tests/mutants.py, one at a time, and prints the seed: the tests must fail.
# --long runs the long tests alone: all of a long list, or training to a result.
#   JOBS   test processes of all tests but the slow ones that start ranks, kill or measure (default: the cores)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
all=""
mutants=""
long=""
if [ "${1:-}" = "--all" ]; then shift; all=1; fi
if [ "${1:-}" = "--long" ]; then shift; long=1; fi
if [ "${1:-}" = "--mutants" ]; then
    mutants="${2:-}"
    if ! [[ "$mutants" =~ ^[1-9][0-9]*$ ]]; then
        echo "maskwise: --mutants takes the number of faults to plant, such as --mutants 10" >&2
        exit 2
    fi
    shift 2
fi
arguments=("$@")
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # ranks and data workers of the tests would compete for the cores
source launch/env.sh test

if [ -n "$mutants" ]; then
    exec "$PYTHON" tests/mutants.py --sample "$mutants" "${arguments[@]}"
fi

if [ -n "$long" ]; then
    exec "$PYTHON" -m pytest -q -m "long and not gpu" "${arguments[@]}"
fi

if [ "${#arguments[@]}" -gt 0 ]; then
    filter="not slow and not long and not gpu"
    if [ -n "$all" ]; then filter="not long and not gpu"; fi
    if [ -n "$all" ] && command -v nvidia-smi >/dev/null 2>&1; then filter="not long"; fi
    exec "$PYTHON" -m pytest -q -m "$filter" "${arguments[@]}"
fi

echo "maskwise: linter, formatter, types, documentation" >&2
"$PYTHON" -m ruff check --quiet
"$PYTHON" -m ruff format --quiet --check
"$PYTHON" -m mypy --no-error-summary
site="$(mktemp -d)"
trap 'rm -rf "$site"' EXIT
# setup.cfg keeps MkDocs below 2; mkdocs-material warns of that version on every build
NO_MKDOCS_2_WARNING=1 "$PYTHON" -m mkdocs build --quiet --strict --site-dir "$site"

"$PYTHON" -m pytest -q -n "${JOBS:-$(getconf _NPROCESSORS_ONLN)}" -m "not slow and not long and not gpu"
if [ -n "$all" ]; then
    slow="slow and not long and not gpu"
    # ranks, kills, measurements; the planted faults use all cores by themselves
    alone=(tests/bench tests/distributed tests/doctor tests/engine tests/launch tests/runs)
    alone+=(tests/repository/test_mutants.py)
    "$PYTHON" -m pytest -q -n "${JOBS:-$(getconf _NPROCESSORS_ONLN)}" -m "$slow" "${alone[@]/#/--ignore=}"
    "$PYTHON" -m pytest -q -m "$slow" "${alone[@]}"
    if command -v nvidia-smi >/dev/null 2>&1; then "$PYTHON" -m pytest -q -m gpu; fi
fi
