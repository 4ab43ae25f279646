#!/usr/bin/env bash
# Several nodes: run the same command on each,
# `HOST=first-node bash launch/multinode.sh RECIPE --out DIR [key=value ...]`.
# DIR is on a file system that all nodes share. A stopped run saves, writes the file `preempted` into DIR and exits with
# status 0.
#   HOST        the node that hosts the rendezvous: a name or address that every node can reach (required)
#   NODES       number of nodes, or min:max of an elastic run, such as 2:4 (default: 1)
#   PROCESSES   ranks per node (default: its GPUs, or 1)
#   RESTARTS    number of restarts after a rank is lost (default: 3)
#   INTERFACE   network interface of NCCL and gloo, such as eth1 or ib0 (default: their own choice)
#   ADDRESS     this node's address, if its host name resolves to another one
#   PORT        port of the rendezvous on HOST (default: 29400)
#   JOB         name of the job, equal on all nodes (default: maskwise)
#   ALIVE       seconds without a heartbeat after which a node is lost (default: 15)
#   JOIN        seconds to wait for the nodes to join (default: 600)
#   LAST_CALL   seconds that an elastic run with enough nodes waits for more (default: 30)
#   MASKWISE_TIMEOUT  seconds that ranks wait for each other (default: 600)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
arguments=("$@")
set --
source launch/env.sh
if [ "${#arguments[@]}" -eq 0 ] || [ -z "${HOST:-}" ]; then
    maskwise_fail "usage, on every node: HOST=FIRST_NODE NODES=n" \
        "bash launch/multinode.sh RECIPE --out DIR [key=value ...]"
fi

out="$(maskwise_run_folder "${arguments[@]}")"
if [ -n "$out" ]; then rm -f "$out/preempted"; fi

processes="$(maskwise_processes)"
OMP_NUM_THREADS="$(maskwise_threads "$processes")"
export OMP_NUM_THREADS
if [ -n "${INTERFACE:-}" ]; then export GLOO_SOCKET_IFNAME="$INTERFACE" NCCL_SOCKET_IFNAME="$INTERFACE"; fi
here=()
is_host=""  # by default torchrun compares names and addresses with HOST
if [ -n "${ADDRESS:-}" ]; then
    here=(--local-addr "$ADDRESS")
    is_host=",is_host=$([ "$ADDRESS" = "$HOST" ] && echo true || echo false)"
fi
# torchrun's shared store keeps addresses of lost ranks, to which restarted ranks would connect: a new store per start
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
alive="${ALIVE:-15}"
beat=$(( alive / 3 > 0 ? alive / 3 : 1 ))
rendezvous="join_timeout=${JOIN:-600},last_call_timeout=${LAST_CALL:-30},keep_alive_interval=$beat"
rendezvous="$rendezvous,keep_alive_max_attempt=$(( (alive + beat - 1) / beat )),read_timeout=60$is_host"

"$PYTHON" -m maskwise.distributed.rendezvous "$HOST" "${PORT:-29400}"  # another program there: one line, status 2

# As in torchrun.sh; a rank waits for a lost one at most MASKWISE_TIMEOUT seconds.
detach="$(command -v setsid || true)"
wait="${MASKWISE_TIMEOUT:-600}"
export PET_SHUTDOWN_TIMEOUT="${PET_SHUTDOWN_TIMEOUT:-${wait%.*}}"
$detach "$PYTHON" -m torch.distributed.run --nnodes "${NODES:-1}" --nproc-per-node "$processes" \
    --max-restarts "${RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "$HOST:${PORT:-29400}" --rdzv-id "${JOB:-maskwise}" ${here[@]+"${here[@]}"} \
    --rdzv-conf "$rendezvous" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 -m maskwise train "${arguments[@]}" &
maskwise_wait "$!" "$out" maskwise_signal_ranks
