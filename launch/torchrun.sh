#!/usr/bin/env bash
# One node, one process a GPU: `bash launch/torchrun.sh RECIPE --out DIR [key=value ...]`. PROCESSES=n overrides the number
# (CPU: 1). A run told to stop (SIGTERM, SIGUSR1) saves, leaves the file `preempted` in DIR and counts as a success here.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
arguments=("$@")
set --
source launch/env.sh
if [ "${#arguments[@]}" -eq 0 ]; then maskwise_fail "usage: bash launch/torchrun.sh RECIPE --out DIR [key=value ...]"; fi

out=""
for ((i = 0; i < ${#arguments[@]}; i++)); do
    case "${arguments[$i]}" in
        --out) out="${arguments[$((i + 1))]:-}" ;;
        --out=*) out="${arguments[$i]#--out=}" ;;
    esac
done
if [ -n "$out" ]; then rm -f "$out/preempted"; fi

processes="${PROCESSES:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
if [ -z "${OMP_NUM_THREADS:-}" ]; then
    export OMP_NUM_THREADS=$(( $(getconf _NPROCESSORS_ONLN) / processes > 0 ? $(getconf _NPROCESSORS_ONLN) / processes : 1 ))
fi

"$PYTHON" -m torch.distributed.run --standalone --nnodes 1 --nproc-per-node "$processes" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 -m maskwise train "${arguments[@]}" &
child=$!
trap 'kill -TERM "$child" 2>/dev/null || true' TERM INT
trap 'kill -USR1 "$child" 2>/dev/null || true' USR1
status=0
while true; do  # a trapped signal ends `wait` early; the child may still be saving
    status=0
    wait "$child" || status=$?
    kill -0 "$child" 2>/dev/null || break
done
if [ "$status" -ne 0 ] && [ -n "$out" ] && [ -e "$out/preempted" ]; then status=0; fi
exit "$status"
