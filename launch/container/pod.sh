#!/usr/bin/env bash
# One pod of a PyTorchJob (pytorchjob.yaml): launch/multinode.sh with the node of MASTER_ADDR, which Kubeflow's training
# operator sets, as HOST. A run that was signaled has saved and exits with 143, which restartPolicy ExitCode restarts;
# status 0 would complete the job.
#   RANK     number of the pod, set by the operator; 0 is the master
#   POD_IP   address of the pod: names of workers do not resolve
#   further variables: launch/multinode.sh
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
arguments=("$@")
set --
source launch/env.sh
out="$(maskwise_run_folder ${arguments[@]+"${arguments[@]}"})"
if [ -z "$out" ] || [ -z "${MASTER_ADDR:-}" ] || [ -z "${RANK:-}" ]; then
    maskwise_fail "usage, in a pod of a PyTorchJob: bash launch/container/pod.sh RECIPE --out DIR [key=value ...]"
fi
export HOST="$MASTER_ADDR" ADDRESS="${POD_IP:-}"
if [ "$RANK" = 0 ]; then export ADDRESS="$HOST"; fi
unset RANK WORLD_SIZE MASTER_ADDR MASTER_PORT  # of the pods; torchrun sets those of the ranks

bash launch/multinode.sh "${arguments[@]}" &
maskwise_wait "$!" "$out"
if [ -e "$out/preempted" ]; then exit 143; fi
