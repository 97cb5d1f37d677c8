#!/usr/bin/env bash
# torchrun with the settings this trainer relies on. Same arguments, one call per node:
#   launch/torchrun.sh --nproc-per-node 2 -m megaclass train configs/demo.yaml
# With --dry-run as its first argument it prints the resolved command and stops.
# Exit code: 0 done, 2 configuration, 3 data, 4 checkpoint, 5 numbers, 6 a rank was lost, 75 preempted and saved.
set -euo pipefail
say() { echo "launch/torchrun.sh: $*" >&2; }
dry_run=false
if [[ ${1-} == --dry-run ]]; then dry_run=true; shift; fi
torchrun=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin/torchrun
[[ -x $torchrun ]] || torchrun=$(command -v torchrun) || { say "torchrun is not installed; run make setup"; exit 2; }
# Restarts are unlimited here: the trainer itself ends a run that makes no progress.
options=(--max-restarts 1000 --signals-to-handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" --standalone)
processes=1 previous=''
for argument in "$@"; do # only torchrun's own options, which end at the program
  [[ $previous != --nproc[-_]per[-_]node ]] || processes=$argument
  case $argument in
    -m | --module | --no[-_]python | --run[-_]path | -- | *.py) break ;;
    --nnodes* | --rdzv* | --master* | --standalone) options=("${options[@]:0:4}") ;;
    --nproc[-_]per[-_]node=*) processes=${argument#*=} ;;
  esac
  previous=$argument
done
cores=$(nproc) gpus=$(nvidia-smi -L 2>/dev/null | wc -l) || gpus=0
case $processes in
  auto | gpu) processes=$((gpus > 0 ? gpus : cores)) ;;
  0 | *[!0-9]*) processes=$cores ;;
esac
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # a shared store hands restarted ranks the addresses of dead ones
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240} # seconds to save in, once signalled
command=("$torchrun" "${options[@]}" "$@")
if $dry_run; then echo "OMP_NUM_THREADS=$OMP_NUM_THREADS TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 ${command[*]@Q}"; exit; fi

outcomes=$(mktemp -d) agent='' received=''
trap 'rm -rf "$outcomes"' EXIT
pass_on() { received=$1; [[ -z $agent ]] || kill -s "$1" "$agent" 2>/dev/null || true; }
for name in TERM INT HUP QUIT USR1; do trap "pass_on ""$name" "$name"; done
# Should this script be killed, torchrun is told to stop.
! setpriv --pdeathsig TERM true 2>/dev/null || command=(setpriv --pdeathsig TERM "${command[@]}")
set -m # torchrun gets a process group of its own, so that Ctrl-C arrives once, through this script
MEGACLASS_OUTCOME_DIR=$outcomes "${command[@]}" & agent=$!
[[ -z $received ]] || pass_on "$received" # a signal that came while it was being started
while wait "$agent" && code=0 || code=$?; kill -0 "$agent" 2>/dev/null; do :; done
# Where torchrun was killed its ranks are still there: known by what only they were given, told, and 8 s later killed.
for ((tenths = 0; tenths < 100; tenths++)); do
  mapfile -t left < <(grep -lsF "MEGACLASS_OUTCOME_DIR=$outcomes" /proc/[0-9]*/environ | cut -d/ -f3)
  ((${#left[@]})) || break
  case $tenths in 0) kill -s TERM "${left[@]}" || true ;; 80) kill -s KILL "${left[@]}" || true ;; esac
  sleep 0.1
done
verdict='' # a permanent failure goes before a preemption, the lowest rank first
while read -r file; do
  recorded=$(sed -n 's/.*"code"[[:space:]]*:[[:space:]]*\([0-9]\{1,3\}\).*/\1/p' "$file")
  case $recorded in [2-5]) verdict=$recorded; break ;; 6 | 75) verdict=$recorded ;; esac
done < <(find "$outcomes" -name 'rank-*.json' | sort -V)
[[ -n $verdict ]] || case $code in 0 | 2) verdict=$code ;; *) verdict=6 ;; esac # 2: torchrun's own options
((verdict == 0)) || say "exit code $verdict"
exit "$verdict"
