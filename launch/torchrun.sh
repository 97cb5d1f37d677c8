#!/usr/bin/env bash
# torchrun with the settings this trainer relies on. Same arguments, one call per node:
#   launch/torchrun.sh --nproc-per-node 2 -m megaclass train configs/demo.yaml
#   MASTER_ADDR=node1 launch/torchrun.sh --nnodes 2 --nproc-per-node 8 -m megaclass train configs/demo.yaml
# --nnodes 1:4 goes on with the nodes there are. MASTER_ADDR and MASTER_PORT stand for --rdzv-endpoint. The interface is
# the one towards that node, or GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME. With --dry-run first: prints the command.
# Exit codes: see supervise.sh.
set -euo pipefail
say() { echo "launch/torchrun.sh: $*" >&2; }
dry_run=false
if [[ ${1-} == --dry-run ]]; then dry_run=true; shift; fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
torchrun=${here%/*}/.venv/bin/torchrun
[[ -x $torchrun ]] || torchrun=$(command -v torchrun) || { say "torchrun is not installed; run make setup"; exit 2; }
processes=1 nodes=1 alone=true first='' given=("$@")
for ((i = 0; i < $#; i++)); do # only torchrun's own options, which end at the program
  name=${given[i]%%=*} at=$i
  [[ ${given[i]} == *=* ]] || at=$((i + 1))
  value=${given[at]-}
  case ${name//_/-} in
    -m | --module | --no-python | --run-path | -- | *.py) break ;;
    --nproc-per-node) processes=${value#--*=} ;;
    --nnodes) nodes=${value#--*=} ;;
    --rdzv-endpoint | --master-addr) first=${value#--*=} endpoint=$at alone=false kind=${name//_/-} ;;
    --rdzv-* | --master-*) alone=false ;;
  esac
done
# Restarts are unlimited here: the trainer itself ends a run that makes no progress.
options=(--max-restarts 1000 --signals-to-handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
if [[ -z $first && $nodes != 1 && $nodes != 1:1 ]]; then
  [[ -n ${MASTER_ADDR-} ]] || { say "--nnodes $nodes needs the first node: set MASTER_ADDR, or give --rdzv-endpoint"; exit 2; }
  first=$MASTER_ADDR:${MASTER_PORT:-29500} endpoint=1 kind=--rdzv-endpoint given=(--rdzv-endpoint "$first" "$@")
fi
if [[ -n $first ]]; then
  python=${torchrun%/*}/python; [[ -x $python ]] || python=python3
  network=$("$python" -m megaclass.parallel.interface "$first") || exit 2
  read -r interface address place <<<"$network"
  options+=(--rdzv-backend c10d --local-addr "$address")
  # torchrun hosts the meeting point only under a name it knows as this machine's own; this one it always does.
  [[ $kind$place != --rdzv-endpointhere ]] || given[endpoint]=${given[endpoint]/"${first%:*}"/localhost}
  export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-=$interface} # "=": this name, not all that begin with it
elif $alone; then interface=lo options+=(--standalone --local-addr localhost); fi
[[ -z ${interface-} ]] || export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface}
cores=$(nproc) gpus=$(nvidia-smi -L 2>/dev/null | wc -l) || gpus=0
case $processes in
  auto | gpu) processes=$((gpus > 0 ? gpus : cores)) ;;
  0 | *[!0-9]*) processes=$cores ;;
esac
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # a shared store hands restarted ranks the addresses of dead ones
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240} # seconds to save in, once signalled
command=("$torchrun" "${options[@]}" "${given[@]}")
if $dry_run; then
  env | grep -E '^(OMP_NUM_THREADS|TORCH_DISABLE_SHARE_RDZV_TCP_STORE|(GLOO|NCCL)_SOCKET_IFNAME)=' | sort | tr '\n' ' '
  echo "${command[*]@Q}"; exit
fi
[[ -z $first ]] || say "interface $GLOO_SOCKET_IFNAME, address $address; the first node, $first, is $place"
exec "$here/supervise.sh" "${command[@]}"
