#!/usr/bin/env bash
# A real Slurm with two nodes, n1 and n2, on this machine, in a folder and on loopback alone; needs root, for Debian.
#   setup.sh install          slurm-wlm and munge from Debian, where they are missing; their services stay off
#   setup.sh start FOLDER     starts munged, slurmctld and two slurmd; then: export SLURM_CONF=FOLDER/slurm.conf
#   setup.sh node FOLDER n2   starts one node again
#   setup.sh stop FOLDER      ends what was started from that folder, jobs included, and nothing else
# Ports are four in a row from SLURM_TEST_PORT, default 26817: away from Slurm's own.
set -euo pipefail
say() { echo "setup.sh: $*" >&2; }
action=${1-} folder=$(realpath -m "${2:-.}") port=${SLURM_TEST_PORT:-26817} host=$(hostname -s)
[[ $EUID == 0 ]] || { say "needs root"; exit 1; }

install() {
  if command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null; then return; fi
  # A machine whose init system starts services at once must not start these: they are not configured.
  local policy=/usr/sbin/policy-rc.d added=false
  if [[ ! -e $policy ]]; then printf '#!/bin/sh\nexit 101\n' >"$policy"; chmod +x "$policy"; added=true; fi
  apt-get -o DPkg::Lock::Timeout=300 update -qq
  DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -qq -y --no-install-recommends slurm-wlm munge
  if $added; then rm "$policy"; fi
}

configure() {
  mkdir -p "$folder"/{munge,state,spool-n1,spool-n2}
  chmod 755 "$folder" "$folder/munge" # munge wants its socket within reach of all, its key out of it
  (umask 077 && head -c 1024 /dev/urandom >"$folder/munge/key")
  # cred_expire is also how long a requeued job waits before it may start again; it is two minutes by default.
  cat >"$folder/slurm.conf" <<END
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmctldPort=$port
SlurmdPort=$((port + 1))
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
SlurmdParameters=config_overrides
SlurmdTimeout=10
ReturnToService=2
KillWait=60
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 3)) CPUs=2 State=UNKNOWN
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=60 State=UP
END
}

node() { slurmd -f "$folder/slurm.conf" -N "$1"; }

start() {
  if [[ -s $folder/slurmctld.pid ]] && kill -0 "$(<"$folder/slurmctld.pid")" 2>/dev/null; then
    say "Slurm runs from $folder already; stop it first"
    exit 1
  fi
  configure
  munged --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/munge/pid" \
    --log-file="$folder/munge/log" --seed-file="$folder/munge/seed" --force 2>"$folder/munge/warnings"
  export SLURM_CONF=$folder/slurm.conf
  slurmctld -f "$SLURM_CONF"
  node n1
  node n2
  for ((tenths = 0; tenths < 600; tenths++)); do
    if [[ $(sinfo --noheader --format %D --states idle 2>/dev/null) == 2 ]]; then return; fi
    sleep 0.1
  done
  say "the two nodes did not become idle within a minute"
  sinfo -N -l >&2 || true
  tail -n 20 "$folder"/slurm*.log >&2
  stop
  exit 1
}

# Ids of the daemons that were started from the folder, and of what their jobs have left.
left() {
  local process words
  for process in /proc/[0-9]*; do
    { words=$(tr '\0' '\n' <"$process/environ"); } 2>/dev/null || continue
    if [[ $'\n'$words == *$'\nSLURM_JOB_ID='* && $words == *"SLURM_CONF=$folder/"* ]]; then echo "${process#/proc/}"; continue; fi
    { words=$(tr '\0' ' ' <"$process/cmdline"); } 2>/dev/null || continue
    case $words in
      slurmctld*"$folder/"* | slurmd*"$folder/"* | munged*"$folder/"*) echo "${process#/proc/}" ;;
    esac
  done
}

stop() {
  local tenths
  export SLURM_CONF=$folder/slurm.conf
  if timeout 5 squeue --noheader >/dev/null 2>&1; then
    squeue --noheader --format %A | xargs -r scancel --full --signal KILL || true
    squeue --noheader --format %A | xargs -r scancel || true
    for ((tenths = 0; tenths < 100; tenths++)); do
      [[ -n $(squeue --noheader) ]] || break
      sleep 0.1
    done
  fi
  for ((tenths = 0; tenths < 200; tenths++)); do
    mapfile -t ids < <(left)
    ((${#ids[@]})) || return 0
    case $tenths in 0) kill "${ids[@]}" 2>/dev/null || true ;; 100) kill -s KILL "${ids[@]}" 2>/dev/null || true ;; esac
    sleep 0.1
  done
  say "still there: ${ids[*]}"
  exit 1
}

case $action in
  install) install ;;
  start) start ;;
  node) node "${3:?which node}" ;;
  stop) stop ;;
  *) say "give install, start FOLDER, node FOLDER NAME or stop FOLDER"; exit 2 ;;
esac
