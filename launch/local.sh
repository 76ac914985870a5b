#!/usr/bin/env bash
# Trains with several processes on this machine, as several hosts would: one process per GPU, or two
# processes that share the CPU.
#
#   launch/local.sh [--processes=N] [--devices=D] [--doctor] [--dry_run] -- \
#     --config=FILE --workdir=DIR ...
#
#   --processes=N  number of processes (one per GPU; 2 without GPUs)
#   --devices=D    CPU devices per process, without GPUs (1)
#   --doctor       run python -m clipx.doctor instead of training
#   --dry_run      print every command, run none
#
# Exit code: 0, or that of the first process that failed. 42: training was told to stop and has
# saved.

set -euo pipefail

usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2
  echo "$1" >&2
  exit 2
}

gpus=0
if command -v nvidia-smi >/dev/null && [[ ${JAX_PLATFORMS:-} != cpu ]]; then
  gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
fi
processes=$((gpus > 0 ? gpus : 2)) devices=1 module=clipx.train dry_run=''
while [[ $# -gt 0 ]]; do
  case $1 in
    --processes=*) processes=${1#*=} ;;
    --devices=*) devices=${1#*=} ;;
    --doctor) module=clipx.doctor ;;
    --dry_run) dry_run=1 ;;
    --) shift && break ;;
    *) usage "unknown option before --: $1" ;;
  esac
  shift
done
[[ $processes =~ ^[1-9][0-9]*$ && $devices =~ ^[1-9][0-9]*$ ]] ||
  usage "--processes=$processes --devices=$devices: expected numbers of at least 1"
[[ $# -gt 0 ]] || usage 'no arguments of clipx.train after --'
if ((gpus > 0 && processes > gpus)); then
  usage "--processes=$processes: expected at most $gpus, because every process needs its own GPU"
fi

python=${PYTHON:-python}
port=${PORT:-$((20000 + RANDOM % 10000))}
pids=()
for ((i = 0; i < processes; i++)); do
  environment=(
    "JAX_COORDINATOR_ADDRESS=127.0.0.1:$port" "JAX_NUM_PROCESSES=$processes" "JAX_PROCESS_ID=$i"
  )
  if ((gpus > 0)); then
    environment+=("JAX_LOCAL_DEVICE_IDS=$i")
  else
    flags="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices"
    environment+=("JAX_PLATFORMS=cpu" "XLA_FLAGS=$flags")
  fi
  command=(env "${environment[@]}" "$python" -m "$module" "$@")
  if [[ $dry_run ]]; then
    printf '%q ' "${command[@]}" && echo
  else
    "${command[@]}" &
    pids+=($!)
  fi
done
[[ ! $dry_run ]] || exit 0

trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' INT TERM
code=0 killed=''
while ((${#pids[@]})); do
  left=()
  for pid in "${pids[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      left+=("$pid")
      continue
    fi
    ended=0
    wait "$pid" || ended=$?
    # 134 only says that another process has ended: the other's code counts
    if ((ended && (code == 0 || code == 134))); then
      code=$ended
    fi
  done
  pids=(${left[@]+"${left[@]}"})
  # the others would wait for a failed process, which will not come back
  if ((code && code != 42 && ${#pids[@]})) && [[ ! $killed ]]; then
    sleep "${GRACE_SECONDS:-15}"
    kill -KILL "${pids[@]}" 2>/dev/null || true
    killed=1
  fi
  sleep 0.2
done
exit "$code"
