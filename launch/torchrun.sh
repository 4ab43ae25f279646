#!/usr/bin/env bash
# One node, one process a GPU: `bash launch/torchrun.sh RECIPE --out DIR [key=value ...]`. PROCESSES=n overrides the number
# (CPU: 1). A run told to stop (SIGTERM, SIGUSR1) saves, leaves the file `preempted` in DIR and counts as a success here.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
arguments=("$@")
set --
source launch/env.sh
if [ "${#arguments[@]}" -eq 0 ]; then maskwise_fail "usage: bash launch/torchrun.sh RECIPE --out DIR [key=value ...]"; fi

out="$(maskwise_run_folder "${arguments[@]}")"
if [ -n "$out" ]; then rm -f "$out/preempted"; fi

processes="${PROCESSES:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
if [ -z "${OMP_NUM_THREADS:-}" ]; then
    export OMP_NUM_THREADS=$(( $(getconf _NPROCESSORS_ONLN) / processes > 0 ? $(getconf _NPROCESSORS_ONLN) / processes : 1 ))
fi

# In a session of its own, so that Ctrl-C comes to this script alone. Where torchrun is signalled itself, it has 30 s of patience with its ranks unless told:
# too short for a large checkpoint, or for an evaluation under way.
apart="$(command -v setsid || true)"
export PET_SHUTDOWN_TIMEOUT="${PET_SHUTDOWN_TIMEOUT:-600}"
$apart "$PYTHON" -m torch.distributed.run --standalone --nnodes 1 --nproc-per-node "$processes" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 -m maskwise train "${arguments[@]}" &
maskwise_wait "$!" "$out" maskwise_tell
