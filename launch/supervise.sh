#!/usr/bin/env bash
# Runs torchrun as launch/torchrun.sh resolved it: passes signals on, leaves no rank behind, and returns the trainer's own
# exit code, which torchrun hides: 0 done, 2 configuration, 3 data, 4 checkpoint, 5 numbers, 6 a rank was lost, 75
# preempted and saved.
set -euo pipefail
command=("$@")
outcomes=$(mktemp -d) agent='' early=''
trap 'rm -rf "$outcomes"' EXIT
# shellcheck disable=SC2317 # called by the traps
pass_on() {
  : >"$outcomes/told" # for the ranks, which tell other nodes
  if [[ -z $agent ]]; then early=$1; return; fi
  # A child that is this shell still, and no command of its own yet, would lose the signal.
  while cmp -s "/proc/$$/cmdline" "/proc/$agent/cmdline"; do sleep 0.05; done
  kill -s "$1" "$agent" 2>/dev/null || true
}
for name in TERM INT HUP QUIT USR1; do trap "pass_on ""$name" "$name"; done
# Should this script be killed, torchrun is told to stop.
! setpriv --pdeathsig TERM true 2>/dev/null || command=(setpriv --pdeathsig TERM "${command[@]}")
set -m # torchrun gets a process group of its own, so that Ctrl-C arrives once, through this script
MEGACLASS_OUTCOME_DIR=$outcomes "${command[@]}" & agent=$!
[[ -z $early ]] || pass_on "$early"
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
((verdict == 0)) || echo "launch/torchrun.sh: exit code $verdict" >&2
exit "$verdict"
