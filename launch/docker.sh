#!/usr/bin/env bash
# Runs a command in the project's container, with what multi-GPU training needs from the host:
#   docker build --file docker/Dockerfile --target gpu --tag megaclass:gpu .
#   launch/docker.sh launch/torchrun.sh --nproc-per-node 8 -m megaclass train configs/demo.yaml
# Options, before the command:
#   --dry-run      print the resolved command and stop
#   --image NAME   default megaclass:gpu where the host has NVIDIA GPUs, else megaclass:cpu
#   --data DIR     data sets, read and written at data/ in the container; default ./data
#   --runs DIR     run directories, at runs/ in the container; default ./runs
#   --cache DIR    compiled kernels, kept for the next container; default ~/.cache/megaclass
#   --shm SIZE     shared memory for decoding processes and NCCL; default 16g
# Variables NCCL_*, GLOO_*, TORCH_*, MASTER_ADDR, MASTER_PORT and OMP_NUM_THREADS of the host are passed on.
set -euo pipefail
say() { echo "launch/docker.sh: $*" >&2; }

dry_run=false image='' data=$PWD/data runs=$PWD/runs shm=16g cache=${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/megaclass
while (($#)); do
  case $1 in
    --dry-run) dry_run=true; shift ;;
    --image | --data | --runs | --cache | --shm)
      if (($# < 2)); then say "$1 has no value; give it as $1 VALUE"; exit 2; fi
      printf -v "${1#--}" %s "$2"
      shift 2 ;;
    --) shift; break ;;
    -*) say "unknown option $1; allowed are --dry-run, --image, --data, --runs, --cache and --shm"; exit 2 ;;
    *) break ;;
  esac
done
if (($# == 0)); then say "give a command, for example: megaclass --help"; exit 2; fi

gpus=false
if nvidia-smi -L >/dev/null 2>&1; then gpus=true; fi
if [[ -z $image ]]; then if $gpus; then image=megaclass:gpu; else image=megaclass:cpu; fi; fi

# --init reaps what a killed rank leaves; the time to stop is what saving may take; files belong to who started it.
options=(--rm --init --stop-timeout 240 --shm-size "$shm" --ulimit memlock=-1 --ulimit stack=67108864
  --user "$(id -u):$(id -g)" --security-opt no-new-privileges
  --volume "$(realpath -m "$data"):/workspace/data" --volume "$(realpath -m "$runs"):/workspace/runs"
  --volume "$(realpath -m "$cache"):/cache")
if $gpus; then options+=(--gpus all); fi
# InfiniBand: the device files, and leave to pin memory for them.
if [[ -d ${INFINIBAND:=/dev/infiniband} ]]; then options+=(--device "$INFINIBAND" --cap-add IPC_LOCK); fi
# More nodes than one, and metrics, are reached through the host's own network.
options+=(--network host)
# The flight recorder: each rank remembers its newest 2,000 collectives, and writes them down where one hangs.
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000} TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
for name in $(compgen -e); do
  if [[ $name =~ ^(NCCL_|GLOO_|TORCH_|MASTER_(ADDR|PORT)$|OMP_NUM_THREADS$) ]]; then options+=(--env "$name=${!name}"); fi
done
# The image's health check asks for metrics; a command that serves none would count as ill.
if [[ " $* " != *metrics[-_]port* ]]; then options+=(--no-healthcheck); fi
if [[ -t 0 && -t 1 ]]; then options+=(--interactive --tty); fi

command=(docker run "${options[@]}" "$image" "$@")
if $dry_run; then echo "${command[*]@Q}"; exit; fi
mkdir -p "$data" "$runs" "$cache" # docker would make them, but as root's
exec "${command[@]}"
