#!/usr/bin/env bash
# Trains on a Cloud TPU VM with any number of hosts: creates the TPU or uses an existing one,
# installs this checkout on every host, starts the run on all hosts, follows its log, and resumes
# after a preemption.
#
#   launch/tpu_vm.sh VERB --name=NAME --zone=ZONE [options] -- --config=FILE --workdir=DIR ...
#
# Verbs: run (create, install and train), stop (stop the run), down (delete the TPU), doctor (run
# python -m clipx.doctor on every host of an existing TPU where clipx is installed).
#   --type=T          accelerator type, such as v5litepod-16, v4-32, v6e-256
#   --version=V       runtime version (default: chosen by type)
#   --project=P       Google Cloud project (default: gcloud's)
#   --spot            a spot TPU: cheaper, but can be preempted at any time
#   --queued          wait for capacity in Google's queue (a queued resource)
#   --env_file=FILE   lines NAME=VALUE, set on every host; for secrets, which then are on no
#                     command line
#   --restarts=N      restarts after preemptions, at most (100)
#   --other_region    allow buckets in another region than the TPU's (every byte read is charged)
#   --down            delete the TPU when the run has ended
#   --dry_run         print every command, run none
#
# All hosts must share the workdir: use a mounted bucket or NFS.
# Exit code 0: done. 2: the config, the data, the quota or the region must be fixed first. 42: still
# preempted after N restarts; the last checkpoint is kept. 1: any other failure, after the end of
# the log.

set -euo pipefail

python="$HOME/clipx-env/bin/python"
state_folder="$HOME/clipx-run"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
poll=${POLL_SECONDS:-30}

say() { echo "tpu_vm: $*" >&2; }
die() { # CODE WHY
  say "${@:2}"
  exit "$1"
}

# ---- on a worker ---------------------------------------------------------------------------------

worker_number() {
  local name
  name=$(hostname)
  [[ $name =~ -w-([0-9]+)$ ]] && echo "${BASH_REMATCH[1]}" || echo 0
}

alive() { [[ -e $state_folder/pid ]] && kill -0 "$(cat "$state_folder/pid")" 2>/dev/null; }

free_tpu() { # removes the lock of a dead run; fails if a process still holds the TPU
  local lock=${LIBTPU_LOCK:-/tmp/libtpu_lockfile} devices=() owners=''
  shopt -s nullglob
  devices=(/dev/accel* /dev/vfio/[0-9]*)
  [[ -e $lock ]] && devices+=("$lock")
  if ((${#devices[@]})); then
    owners=$(sudo fuser "${devices[@]}" 2>/dev/null | xargs || true)
  fi
  if [[ $owners ]]; then
    echo "worker $number: refused: the TPU is held by process $owners ($(
      ps -o args= -p "${owners// /,}" | head -1 | cut -c1-120
    )); end that process, or run launch/tpu_vm.sh stop"
    return 1
  fi
  if [[ -e $lock ]]; then
    sudo rm -f "$lock"
    echo "worker $number: removed a stale $lock"
  fi
}

worker() {
  local verb=$1 number
  shift
  number=$(worker_number)
  mkdir -p "$state_folder"
  cd "$HOME/clipx"
  case $verb in
    install)
      python3 -m pip install --user --quiet uv
      [[ -x $python ]] || python3 -m uv venv --quiet --python 3.12 "$HOME/clipx-env"
      python3 -m uv pip install --quiet --python "$python" --editable '.[tpu,remote]'
      ;;
    start)
      if alive; then
        echo "worker $number: already runs"
      else
        free_tpu || return 0
        rm -f "$state_folder/code"
        setsid nohup bash launch/tpu_vm.sh worker train "$@" \
          >"$state_folder/log" 2>&1 </dev/null &
        echo $! >"$state_folder/pid"
      fi
      ;;
    train)
      local code=0
      load_env
      "$python" -m clipx.train "$@" || code=$?
      echo "$code" >"$state_folder/code"
      exit "$code"
      ;;
    doctor)
      load_env
      "$python" -m clipx.doctor "$@" || true
      ;;
    follow)
      tail --pid="$(cat "$state_folder/pid")" --sleep-interval=0.5 --lines=+1 --follow \
        "$state_folder/log"
      ;;
    result)
      if alive; then
        echo "worker $number: runs"
      else
        echo "worker $number: ended $(cat "$state_folder/code" 2>/dev/null || echo unknown)"
      fi
      ;;
    log) tail --lines=30 "$state_folder/log" ;;
    stop)
      if alive; then
        kill -TERM -- "-$(cat "$state_folder/pid")"
        for _ in {1..120}; do
          alive || break
          sleep 1
        done
        alive && kill -KILL -- "-$(cat "$state_folder/pid")"
      fi
      ;;
    *) die 2 "unknown verb '$verb' of a worker" ;;
  esac
  echo "worker $number: ok $verb"
}

load_env() {
  if [[ -e $HOME/clipx.env ]]; then
    set -a
    # shellcheck source=/dev/null
    source "$HOME/clipx.env"
    set +a
  fi
}

# ---- on this machine -----------------------------------------------------------------------------

usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2
  die 2 "$1"
}

quoted() { (($#)) && printf ' %q' "$@" || true; }

run() { # runs a command; in a dry run prints it
  if [[ $dry_run ]]; then
    quoted "$@" | cut -c2-
  else
    "$@"
  fi
}

tpu() { # VERB ARGUMENTS...: a gcloud command for this TPU VM
  run gcloud compute tpus tpu-vm "$1" "$name" "${place[@]}" "${@:2}"
}

copy() { run gcloud compute tpus tpu-vm scp "$1" "$2" "${place[@]}" --worker=all; }

queue() { run gcloud compute tpus queued-resources "$1" "$name" "${place[@]}" "${@:2}"; }

check_regions() { # refuses buckets in another region, from which every byte read is charged
  local region=${zone%-*} bucket found buckets
  buckets=$(printf '%s\n' "$@" | grep -oE 'gs://[a-z0-9._-]+' | sort -u || true)
  for bucket in $buckets; do
    [[ $dry_run ]] && run gcloud storage buckets describe "$bucket" '--format=value(location)' &&
      continue
    found=$(gcloud storage buckets describe "$bucket" '--format=value(location)') ||
      die 2 "gcloud cannot describe $bucket: check its name, and that this account may read it"
    found=$(tr '[:upper:]' '[:lower:]' <<<"$found")
    case $region in
      "$found" | "$found"-*) continue ;; # the region, or a multi-region like us or asia
      europe-*) [[ $found == eu ]] && continue ;;
    esac
    if [[ $other_region ]]; then
      say "$bucket is in $found, the TPU in $region: every byte read is charged"
    else
      die 2 "$bucket is in $found, the TPU would be in $region: every byte read is charged." \
        "Copy it (gcloud storage cp --recursive $bucket gs://NAME-IN-$region), choose a zone in" \
        "$found, or pass --other_region"
    fi
  done
}

state() { # prints the TPU's state: READY, CREATING, PREEMPTED, ...; ABSENT without a TPU
  local found
  if [[ $dry_run ]]; then
    tpu describe '--format=value(state)' >&3
    echo ABSENT
  elif found=$(tpu describe '--format=value(state)' 2>&1); then
    echo "${found##*$'\n'}"
  elif [[ $found == *NOT_FOUND* || $found == *'not found'* || $found == *'was not found'* ]]; then
    echo ABSENT
  else
    die 1 "$found"
  fi
}

create() {
  local kind=(--accelerator-type="$type") said
  [[ $spot ]] && kind+=(--spot)
  while true; do
    if [[ $queued ]]; then
      said=$(queue create --node-id="$name" --runtime-version="$version" "${kind[@]}" 2>&1) &&
        break
    else
      said=$(tpu create --version="$version" "${kind[@]}" 2>&1) && break
    fi
    case $said in
      *[Aa]lready*[Ee]xists* | *ALREADY_EXISTS*) return ;;
      *[Qq]uota*)
        die 2 "$said"$'\n'"tpu_vm: the quota of this project does not allow a $type in $zone:" \
          'ask for more (IAM & Admin > Quotas), or choose another zone or type, or --spot'
        ;;
      *'no more capacity'* | *[Ss]tockout* | *RESOURCE_EXHAUSTED*)
        say "no capacity for $type in $zone; next try in $poll s (--queued waits in Google's queue)"
        sleep "$poll"
        ;;
      *) die 1 "$said" ;;
    esac
  done
  [[ ! $dry_run ]] || echo "$said"
}

delete() {
  if [[ $queued ]]; then
    queue delete --force --quiet
  else
    tpu delete --quiet
  fi
}

up() { # creates the TPU if necessary, returns when it is READY; sets `workers`
  local now
  while true; do
    now=$(state)
    case $now in
      READY) break ;;
      ABSENT)
        say "creating $name, a $type in $zone"
        if [[ $queued && ! $dry_run && $(queue_state) =~ ^(FAILED|SUSPENDED)$ ]]; then
          delete
        fi
        create
        [[ ! $dry_run ]] || break
        ;;
      PREEMPTED | TERMINATED | STOPPED | UNHIDING | HIDDEN)
        say "$name is $now: deleting it and creating it again"
        delete
        ;;
      *)
        say "$name is $now; waiting"
        sleep "$poll"
        ;;
    esac
    [[ $now != ABSENT ]] || sleep "$poll"
  done
  workers=1
  if [[ $dry_run ]]; then
    tpu describe '--format=value(networkEndpoints.len())'
  else
    workers=$(tpu describe '--format=value(networkEndpoints.len())')
  fi
}

queue_state() { queue describe '--format=value(state.state)' 2>/dev/null || echo ABSENT; }

everywhere() { # VERB ARGUMENTS...: runs on every worker, asks silent ones again; sets `answers`
  local command said silent i attempt
  command="${before:-}bash clipx/launch/tpu_vm.sh worker$(quoted "$@")"
  if [[ $dry_run ]]; then
    tpu ssh --worker=all --command="$command"
    return
  fi
  said=$(tpu ssh --worker=all --command="$command" 2>&1) || true
  for attempt in 1 2 3 4; do
    silent=()
    for ((i = 0; i < workers; i++)); do
      grep -q "worker $i: ok $1" <<<"$said" || silent+=("$i")
    done
    if grep 'worker [0-9]*: refused' <<<"$said" >&2; then
      die 1 'nothing was started on that worker'
    fi
    ((${#silent[@]})) || break
    ((attempt < 4)) || break
    [[ $(state) == READY ]] || return 1
    say "no answer to $1 from worker ${silent[*]}; asking again"
    sleep "$poll"
    for i in "${silent[@]}"; do
      said+=$'\n'$(tpu ssh --worker="$i" --command="$command" 2>&1) || true
    done
  done
  answers=$said
  grep -v ': ok ' <<<"$said" | grep '^worker\|rror' >&2 || true
  if ((${#silent[@]})); then
    say "$said"
    die 1 "worker ${silent[*]} of $workers did not answer to '$1' in four tries; log in to look:" \
      "gcloud compute tpus tpu-vm ssh $name --zone=$zone --worker=${silent[0]}"
  fi
}

install() {
  local packed attempt
  packed=$(mktemp -d)/clipx.tar.gz
  run tar --create --gzip --file="$packed" --directory="$here/.." --exclude=__pycache__ \
    clipx configs launch setup.py pyproject.toml README.md LICENSE
  for attempt in 1 2 3; do
    copy "$packed" "$name:clipx.tar.gz" && break
    ((attempt < 3)) || die 1 "cannot copy to every worker of $name"
    [[ $(state) == READY ]] || return 1
    say 'cannot copy to every worker yet; trying again'
    sleep "$poll"
  done
  [[ ! $env_file ]] || copy "$env_file" "$name:clipx.env"
  rm -rf "$(dirname "$packed")"
  before='mkdir -p clipx && tar --extract --gzip --file=clipx.tar.gz --directory=clipx && ' \
    everywhere install
}

once() { # trains once, to its end; sets `ended`: 0, 2, 42, preempted or another code
  ended=preempted
  up
  install || return 0
  everywhere start "$@" || return 0
  tpu ssh --worker=0 --command='bash clipx/launch/tpu_vm.sh worker follow' || true
  local i codes
  for ((i = 0; i < 20; i++)); do # the other workers end soon, unless they hang
    [[ $(state) == READY || $dry_run ]] || return 0
    everywhere result || return 0
    [[ ! $dry_run ]] || return 0
    grep -q 'worker [0-9]*: runs' <<<"$answers" || break
    sleep "$poll"
  done
  codes=$(grep -o 'worker [0-9]*: \(ended [a-z0-9]*\|runs\)' <<<"$answers" | sort -u)
  # the first worker that failed by itself: not because another ended (134), nor told to stop (42)
  ended=$(grep -v 'ended \(0\|42\|134\)$' <<<"$codes" | head -1 || true)
  if [[ ! $ended ]]; then
    for ended in 42 134 0; do
      grep -q "ended $ended$" <<<"$codes" && break
    done
    return 0
  fi
  i=$(awk '{print $2 + 0}' <<<"$ended") ended=${ended##* }
  say "worker $i: $ended; the end of its log:"
  tpu ssh --worker="$i" --command='bash clipx/launch/tpu_vm.sh worker log' >&2 || true
  case $ended in
    137) say 'killed: out of the host'\''s memory, or by hand (not preempted: the TPU is READY)' ;;
    runs) say 'it hangs although others have ended' && ended=1 && everywhere stop ;;
  esac
}

train() {
  local restart
  check_regions "$@"
  for ((restart = 0; restart <= restarts; restart++)); do
    once "$@"
    if [[ $dry_run ]]; then
      echo '# after a preemption, or exit code 42: the same commands again, from the first'
      break
    fi
    case $ended in
      0) say 'done' ;;
      2) say 'the config, the workdir or the data must be fixed first' ;;
      42 | preempted)
        say "preempted ($ended); restart $((restart + 1)) of $restarts"
        continue
        ;;
      *) say "failed with $ended" ;;
    esac
    break
  done
  [[ ! $down ]] || delete
  [[ ! $dry_run ]] || return 0
  case $ended in
    0 | 2) exit "$ended" ;;
    42 | preempted) die 42 "still preempted after $restarts restarts; the last checkpoint is kept" ;;
    *) exit 1 ;;
  esac
}

main() {
  verb=${1:-} name='' zone='' type='' version='' project='' spot='' queued='' env_file=''
  restarts=100 other_region='' down='' dry_run='' workers=1 answers='' ended=''
  [[ $# -eq 0 ]] || shift
  while [[ $# -gt 0 ]]; do
    case $1 in
      --name=*) name=${1#*=} ;;
      --zone=*) zone=${1#*=} ;;
      --type=*) type=${1#*=} ;;
      --version=*) version=${1#*=} ;;
      --project=*) project=${1#*=} ;;
      --env_file=*) env_file=${1#*=} ;;
      --restarts=*) restarts=${1#*=} ;;
      --spot) spot=1 ;;
      --queued) queued=1 ;;
      --other_region) other_region=1 ;;
      --down) down=1 ;;
      --dry_run) dry_run=1 ;;
      --) shift && break ;;
      *) usage "unknown option before --: $1" ;;
    esac
    shift
  done
  [[ $name && $zone ]] || usage '--name and --zone are needed'
  [[ $restarts =~ ^[0-9]+$ ]] || usage "--restarts=$restarts: expected a number"
  [[ ! $env_file || -r $env_file ]] || usage "--env_file=$env_file: no such file, or not readable"
  place=(--zone="$zone")
  [[ ! $project ]] || place+=(--project="$project")
  exec 3>&1
  case $verb in
    run)
      [[ $type ]] || usage '--type is needed'
      [[ $# -gt 0 ]] || usage 'no arguments of clipx.train after --'
      if [[ ! $version ]]; then
        case $type in # Cloud TPU's table of runtime versions
          v6e-*) version=v2-alpha-tpuv6e ;;
          v5p-*) version=v2-alpha-tpuv5 ;;
          v5litepod-*) version=v2-alpha-tpuv5-lite ;;
          *) version=tpu-ubuntu2204-base ;;
        esac
      fi
      train "$@"
      ;;
    doctor | stop)
      [[ $dry_run ]] || workers=$(tpu describe '--format=value(networkEndpoints.len())')
      everywhere "$verb" "$@"
      [[ ! $answers ]] || echo "$answers"
      ;;
    down) delete ;;
    *) usage "unknown verb '$verb'" ;;
  esac
}

if [[ ${1:-} == worker ]]; then
  shift
  worker "$@"
else
  main "$@"
fi
