#!/usr/bin/env bash
# One node, one process per GPU: `bash launch/torchrun.sh RECIPE --out DIR [key=value ...]`.
# PROCESSES=n sets the number of processes (default on a CPU: 1). A run stopped by SIGTERM or SIGUSR1 saves, writes the
# file `preempted` into DIR and exits with status 0.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
arguments=("$@")
set --
source launch/env.sh
if [ "${#arguments[@]}" -eq 0 ]; then
    maskwise_fail "usage: bash launch/torchrun.sh RECIPE --out DIR [key=value ...]"
fi

out="$(maskwise_run_folder "${arguments[@]}")"
if [ -n "$out" ]; then rm -f "$out/preempted"; fi

processes="$(maskwise_processes)"
OMP_NUM_THREADS="$(maskwise_threads "$processes")"
export OMP_NUM_THREADS

# setsid: Ctrl-C reaches this script only, which forwards it. torchrun's default shutdown timeout of 30 s is too short
# for a large checkpoint or a running evaluation.
detach="$(command -v setsid || true)"
export PET_SHUTDOWN_TIMEOUT="${PET_SHUTDOWN_TIMEOUT:-600}"
$detach "$PYTHON" -m torch.distributed.run --standalone --nnodes 1 --nproc-per-node "$processes" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 -m maskwise train "${arguments[@]}" &
maskwise_wait "$!" "$out" maskwise_signal_ranks
