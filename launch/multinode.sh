#!/usr/bin/env bash
# Several nodes: run the same command on every one of them, `HOST=first-node bash launch/multinode.sh RECIPE --out DIR [key=value ...]`.
# DIR lies on a disk that all nodes share. A run told to stop saves, leaves the file `preempted` in DIR and counts as a success here.
#   HOST        the node whose agent keeps the rendezvous: a name or address that every node reaches (needed)
#   NODES       how many nodes, or least:most of an elastic run, such as 2:4 (default: 1)
#   PROCESSES   ranks a node (default: its GPUs, or 1)
#   RESTARTS    how often the ranks are started again after one was lost (default: 3)
#   INTERFACE   network interface of NCCL and gloo, where their own choice is wrong, such as eth1 or ib0
#   ADDRESS     this node's address, where its name leads to another one
#   PORT        of the rendezvous on HOST (default: 29400);  JOB  a name all nodes share (default: maskwise)
#   ALIVE       seconds without a sign of life after which a node counts as gone (default: 15);  JOIN  for the nodes to come (600);
#   LAST_CALL   seconds that an elastic run waits for more nodes once it has enough (30)
#   MASKWISE_TIMEOUT  seconds that ranks wait for each other (default: 600)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
arguments=("$@")
set --
source launch/env.sh
if [ "${#arguments[@]}" -eq 0 ] || [ -z "${HOST:-}" ]; then
    maskwise_fail "usage, on every node: HOST=FIRST_NODE NODES=n bash launch/multinode.sh RECIPE --out DIR [key=value ...]"
fi

out="$(maskwise_run_folder "${arguments[@]}")"
if [ -n "$out" ]; then rm -f "$out/preempted"; fi

processes="${PROCESSES:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
if [ -z "${OMP_NUM_THREADS:-}" ]; then
    export OMP_NUM_THREADS=$(( $(getconf _NPROCESSORS_ONLN) / processes > 0 ? $(getconf _NPROCESSORS_ONLN) / processes : 1 ))
fi
if [ -n "${INTERFACE:-}" ]; then export GLOO_SOCKET_IFNAME="$INTERFACE" NCCL_SOCKET_IFNAME="$INTERFACE"; fi
here=()
keeper=""  # torchrun finds out by itself which node is HOST where names lead to addresses
if [ -n "${ADDRESS:-}" ]; then
    here=(--local-addr "$ADDRESS")
    keeper=",is_host=$([ "$ADDRESS" = "$HOST" ] && echo true || echo false)"
fi
# torchrun's shared store keeps the addresses of ranks that are gone, and ranks started again would knock there: a store for each start
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
alive="${ALIVE:-15}"
beat=$(( alive / 3 > 0 ? alive / 3 : 1 ))

# As in torchrun.sh; a rank that does not end waits for one that is lost, and that no longer than ranks wait for each other.
apart="$(command -v setsid || true)"
wait="${MASKWISE_TIMEOUT:-600}"
export PET_SHUTDOWN_TIMEOUT="${PET_SHUTDOWN_TIMEOUT:-${wait%.*}}"
$apart "$PYTHON" -m torch.distributed.run --nnodes "${NODES:-1}" --nproc-per-node "$processes" --max-restarts "${RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "$HOST:${PORT:-29400}" --rdzv-id "${JOB:-maskwise}" ${here[@]+"${here[@]}"} \
    --rdzv-conf "join_timeout=${JOIN:-600},last_call_timeout=${LAST_CALL:-30},keep_alive_interval=$beat,keep_alive_max_attempt=$(( (alive + beat - 1) / beat )),read_timeout=60$keeper" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 -m maskwise train "${arguments[@]}" &
maskwise_wait "$!" "$out" maskwise_tell
