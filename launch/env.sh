# Sourced by the other scripts: `source launch/env.sh [extra]` sets $PYTHON to an interpreter with maskwise installed.
#   MASKWISE_VENV    folder of the virtual environment (default: .venv in the repository)
#   MASKWISE_TORCH   packages to install if torch is missing (default: "torch==2.14.1 torchvision==0.29.1")
#   MASKWISE_PYTHON  an interpreter with everything installed; no environment is created then
set -euo pipefail

MASKWISE_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
MASKWISE_VENV="${MASKWISE_VENV:-$MASKWISE_ROOT/.venv}"

maskwise_fail() { echo "maskwise: $*" >&2; exit 2; }

maskwise_run_folder() {  # prints the value of --out among the arguments
    local before=""
    for word in "$@"; do
        if [ "$before" = "--out" ]; then echo "$word"; return; fi
        case "$word" in --out=*) echo "${word#--out=}"; return ;; esac
        before="$word"
    done
}

# $1: a signal; $2: process id of torchrun. Signals the ranks, so that torchrun sees them exit normally;
# torchrun itself gets the signal only while it has no ranks.
maskwise_signal_ranks() {
    local ranks
    ranks="$(cat "/proc/$2/task/"*/children 2>/dev/null || true)"
    kill "-$1" ${ranks:-"$2"} 2>/dev/null || true
}

# $1: a process id; $2: its run folder; $3: function that forwards signals (default: to the process itself).
# Waits for the process. A run that was interrupted and has saved (file `preempted`) counts as a success.
maskwise_wait() {
    local status=0 again=0 forward="${3:-signal_process}"
    signal_process() { kill "-$1" "$2" 2>/dev/null || true; }
    trap "$forward TERM $1" TERM HUP
    trap "$forward INT $1" INT
    trap "$forward USR1 $1" USR1
    while true; do  # a trapped signal interrupts `wait`; the process may still be saving
        status=0
        wait "$1" || status=$?
        kill -0 "$1" 2>/dev/null || break
    done
    if [ "$status" -gt 128 ]; then  # the number of the signal, or the exit status of the process?
        wait "$1" || again=$?
        if [ "$again" -ne 127 ]; then status="$again"; fi
    fi
    trap - TERM HUP INT USR1
    if [ "$status" -ne 0 ] && [ -n "$2" ] && [ -e "$2/preempted" ]; then status=0; fi
    return "$status"
}

maskwise_processes() {  # prints the number of ranks of this node: PROCESSES, or its GPUs, or 1
    echo "${PROCESSES:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
}

maskwise_threads() {  # $1: ranks of this node; prints the threads of each, an equal share of the cores
    local share=$(( $(getconf _NPROCESSORS_ONLN) / $1 ))
    echo "${OMP_NUM_THREADS:-$(( share > 0 ? share : 1 ))}"
}

maskwise_python() {  # prints the first suitable interpreter on the PATH
    local name
    for name in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
            echo "$name"
            return
        fi
    done
    maskwise_fail "no Python 3.10 or newer on the PATH;" \
        "install one, or set MASKWISE_PYTHON to an interpreter that has maskwise"
}

maskwise_install() {  # $1: an extra of setup.cfg, or nothing
    local wanted="$MASKWISE_ROOT${1:+[$1]}" stamp hash pip
    stamp="$MASKWISE_VENV/.maskwise-${1:-plain}"
    hash="$(cat "$MASKWISE_ROOT/setup.cfg" "$MASKWISE_ROOT/pyproject.toml" | cksum) $MASKWISE_ROOT"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$hash" ]; then
        return
    fi
    pip=("$PYTHON" -m pip --disable-pip-version-check install -qq)
    echo "maskwise: installing into $MASKWISE_VENV (once; a minute or two)" >&2
    "$PYTHON" -c 'import setuptools, wheel; assert int(setuptools.__version__.split(".")[0]) >= 64' \
        >/dev/null 2>&1 || "${pip[@]}" "setuptools>=64" wheel
    if ! "$PYTHON" -c 'from importlib.metadata import version; version("torch")' >/dev/null 2>&1; then
        local pair
        read -ra pair <<< "${MASKWISE_TORCH:-torch==2.14.1 torchvision==0.29.1}"
        "${pip[@]}" "${pair[@]}" \
            || { echo "maskwise: ${pair[*]} is not available; trying the newest torch" >&2
                 "${pip[@]}" torch torchvision; } \
            || maskwise_fail "torch could not be installed; is a package index reachable?"
    fi
    # keep the installed torch
    "$PYTHON" -c 'from importlib.metadata import version; print("torch==" + version("torch").split("+")[0])' \
        > "$MASKWISE_VENV/constraints.txt"
    "${pip[@]}" --no-build-isolation --constraint "$MASKWISE_VENV/constraints.txt" --editable "$wanted" \
        || maskwise_fail "the installation failed (see above); remove $MASKWISE_VENV and try again"
    "$PYTHON" -c 'import torchvision, timm' >/dev/null 2>&1 \
        || echo "maskwise: the compiled part of torchvision does not match this torch: maskwise works," \
            "but 'import torchvision' and 'import timm' fail; install a matching pair with MASKWISE_TORCH" >&2
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
            || maskwise_fail "$base cannot create a virtual environment (on Debian: apt-get install python3-venv)"
    fi
    maskwise_install "${1:-}"
    export PATH="$MASKWISE_VENV/bin:$PATH"
fi
export PYTHON MASKWISE_ROOT
