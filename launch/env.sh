# Sourced by the other scripts: `source launch/env.sh [extra]` leaves an interpreter with maskwise installed in $PYTHON.
#   MASKWISE_VENV    where the environment lives (default: .venv in the repository)
#   MASKWISE_TORCH   what to install as torch where there is none (default: torch==2.13.0)
#   MASKWISE_PYTHON  an interpreter that already has everything: nothing is made or installed
set -euo pipefail

MASKWISE_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
MASKWISE_VENV="${MASKWISE_VENV:-$MASKWISE_ROOT/.venv}"

maskwise_fail() { echo "maskwise: $*" >&2; exit 2; }

maskwise_run_folder() {  # the value of --out among the arguments
    local before=""
    for word in "$@"; do
        if [ "$before" = "--out" ]; then echo "$word"; return; fi
        case "$word" in --out=*) echo "${word#--out=}"; return ;; esac
        before="$word"
    done
}

maskwise_tell() {  # $1: a signal; $2: torchrun. The ranks themselves are told, so that torchrun sees them end well; itself only while it has none
    local ranks
    ranks="$(cat "/proc/$2/task/"*/children 2>/dev/null || true)"
    kill "-$1" ${ranks:-"$2"} 2>/dev/null || true
}

maskwise_wait() {  # $1: a process; $2: its run folder; $3: what hands signals on. Waits; a run that was told to stop and has saved counts as a success
    local status=0 again=0 tell="${3:-kill_one}"
    kill_one() { kill "-$1" "$2" 2>/dev/null || true; }
    trap "$tell TERM $1" TERM HUP
    trap "$tell INT $1" INT
    trap "$tell USR1 $1" USR1
    while true; do  # a trapped signal ends `wait` early; the process may still be saving
        status=0
        wait "$1" || status=$?
        kill -0 "$1" 2>/dev/null || break
    done
    if [ "$status" -gt 128 ]; then  # was that the signal's number, or the process's own end?
        wait "$1" || again=$?
        if [ "$again" -ne 127 ]; then status="$again"; fi
    fi
    trap - TERM HUP INT USR1
    if [ "$status" -ne 0 ] && [ -n "$2" ] && [ -e "$2/preempted" ]; then status=0; fi
    return "$status"
}

maskwise_python() {  # the newest interpreter that is new enough
    local name
    for name in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
            echo "$name"
            return
        fi
    done
    maskwise_fail "no Python 3.10 or newer on the PATH; install one, or name an equipped interpreter in MASKWISE_PYTHON"
}

maskwise_install() {  # $1: extra or nothing
    local wanted="$MASKWISE_ROOT${1:+[$1]}" stamp hash pip
    stamp="$MASKWISE_VENV/.maskwise-${1:-plain}"
    hash="$(cat "$MASKWISE_ROOT/setup.cfg" "$MASKWISE_ROOT/pyproject.toml" | cksum) $MASKWISE_ROOT"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$hash" ]; then
        return
    fi
    pip=("$PYTHON" -m pip --disable-pip-version-check install -qq)
    echo "maskwise: installing into $MASKWISE_VENV (once; a minute or two)" >&2
    "$PYTHON" -c 'import setuptools, wheel; from setuptools import __version__ as v; assert int(v.split(".")[0]) >= 64' \
        >/dev/null 2>&1 || "${pip[@]}" "setuptools>=64" wheel
    if ! "$PYTHON" -c 'from importlib.metadata import version; version("torch")' >/dev/null 2>&1; then
        "${pip[@]}" "${MASKWISE_TORCH:-torch==2.13.0}" \
            || { echo "maskwise: ${MASKWISE_TORCH:-torch==2.13.0} is not to be had here; trying any torch" >&2; "${pip[@]}" torch; } \
            || maskwise_fail "torch could not be installed; is a package index within reach?"
    fi
    # the torch that is there stays: torchvision follows it, not the other way round
    "$PYTHON" -c 'from importlib.metadata import version; print("torch==" + version("torch").split("+")[0])' > "$MASKWISE_VENV/constraints.txt"
    "${pip[@]}" --no-build-isolation --constraint "$MASKWISE_VENV/constraints.txt" --editable "$wanted" \
        || maskwise_fail "the installation failed (see above); remove $MASKWISE_VENV to start afresh"
    echo "$hash" > "$stamp"
}

if [ -n "${MASKWISE_PYTHON:-}" ]; then
    PYTHON="$MASKWISE_PYTHON"
    export PYTHONPATH="$MASKWISE_ROOT/ssl${PYTHONPATH:+:$PYTHONPATH}"
else
    PYTHON="$MASKWISE_VENV/bin/python"
    if ! [ -x "$PYTHON" ]; then
        base="$(maskwise_python)"
        "$base" -m venv "$MASKWISE_VENV" \
            || maskwise_fail "$base cannot make a virtual environment (on Debian: apt-get install python3-venv)"
    fi
    maskwise_install "${1:-}"
    export PATH="$MASKWISE_VENV/bin:$PATH"
fi
export PYTHON MASKWISE_ROOT
