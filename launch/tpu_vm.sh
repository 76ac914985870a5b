#!/usr/bin/env bash
# Trains on a Cloud TPU VM of any number of hosts: creates it or uses the one that is there,
# installs this checkout on every host, starts the run on all of them, follows its log, and goes on
# after a preemption.
#
#   launch/tpu_vm.sh VERB --name=NAME --zone=ZONE [options] -- --config=FILE --workdir=DIR ...
#
# Verbs: run (all of it), stop (the run), down (deletes the TPU), doctor (python -m clipx.doctor on
# every host).
#   --type=T          accelerator type, such as v5litepod-16, v4-32, v6e-256
#   --version=V       runtime version (chosen by type)
#   --project=P       Google Cloud project (gcloud's own)
#   --spot            cheaper, and can be taken away at any time
#   --queued          waits in the queue for capacity (a queued resource)
#   --env_file=FILE   lines NAME=VALUE that every host sets: secrets go here, on no command line
#   --restarts=N      how often to go on after a preemption (100)
#   --other_region    allows buckets in another region than the TPU's (every byte is charged)
#   --down            deletes the TPU when the run has ended
#   --dry_run         prints every command and runs none
#
# The workdir has to be one folder that all hosts share: a mounted bucket or NFS.
# It ends with 0: done; 2: something must be mended first (config, data, quota, region); 42: still
# preempted after N restarts, the last checkpoint is kept; 1: anything else, with the log's end.

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

free_tpu() { # removes the lock that a dead run left; refuses if a process still has the TPU
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
    )); end it there, or: launch/tpu_vm.sh stop"
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
        echo "worker $number: runs already"
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
    *) die 2 "no verb $verb" ;;
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

# ---- here ----------------------------------------------------------------------------------------

usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2
  die 2 "$1"
}

quoted() { (($#)) && printf ' %q' "$@" || true; }

run() { # a command, or its words in a dry run
  if [[ $dry_run ]]; then
    quoted "$@" | cut -c2-
  else
    "$@"
  fi
}

tpu() { # VERB ARGUMENTS...: gcloud on this TPU VM
  run gcloud compute tpus tpu-vm "$1" "$name" "${place[@]}" "${@:2}"
}

copy() { run gcloud compute tpus tpu-vm scp "$1" "$2" "${place[@]}" --worker=all; }

queue() { run gcloud compute tpus queued-resources "$1" "$name" "${place[@]}" "${@:2}"; }

check_regions() { # a run in one region that reads a bucket in another pays for every byte
  local region=${zone%-*} bucket found buckets
  buckets=$(printf '%s\n' "$@" | grep -oE 'gs://[a-z0-9._-]+' | sort -u || true)
  for bucket in $buckets; do
    [[ $dry_run ]] && run gcloud storage buckets describe "$bucket" '--format=value(location)' &&
      continue
    found=$(gcloud storage buckets describe "$bucket" '--format=value(location)') ||
      die 2 "$bucket: cannot be looked at; is the name right, and may this account read it?"
    found=$(tr '[:upper:]' '[:lower:]' <<<"$found")
    case $region in
      "$found" | "$found"-*) continue ;; # the region, or a multi-region like us or asia
      europe-*) [[ $found == eu ]] && continue ;;
    esac
    if [[ $other_region ]]; then
      say "$bucket is in $found, the TPU in $region: every byte read is charged"
    else
      die 2 "$bucket is in $found, the TPU would be in $region: every byte read is charged." \
        "Copy it (gcloud storage cp --recursive $bucket gs://NAME-IN-$region), take a zone of" \
        "$found, or say --other_region"
    fi
  done
}

state() { # READY, CREATING, PREEMPTED, ...; ABSENT where there is none
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
          'ask for more (IAM & Admin > Quotas), or take another zone, type or --spot'
        ;;
      *'no more capacity'* | *[Ss]tockout* | *RESOURCE_EXHAUSTED*)
        say "no capacity for $type in $zone now; again in $poll s (--queued waits in Google's queue)"
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

up() { # returns when the TPU is there and READY; sets `workers`
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
        say "$name is $now: it is made anew"
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

everywhere() { # VERB ARGUMENTS...: on every worker; names those that do not answer in three times
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
      die 1 'nothing was started there'
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
    die 1 "worker ${silent[*]} of $workers did not answer to '$1' in four times;" \
      "look there: gcloud compute tpus tpu-vm ssh $name --zone=$zone --worker=${silent[0]}"
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
    say 'cannot copy to every worker yet; again'
    sleep "$poll"
  done
  [[ ! $env_file ]] || copy "$env_file" "$name:clipx.env"
  rm -rf "$(dirname "$packed")"
  before='mkdir -p clipx && tar --extract --gzip --file=clipx.tar.gz --directory=clipx && ' \
    everywhere install
}

once() { # one start on all workers, to its end; sets `ended`: 0, 2, 42, preempted or another code
  ended=preempted
  up
  install || return 0
  everywhere start "$@" || return 0
  tpu ssh --worker=0 --command='bash clipx/launch/tpu_vm.sh worker follow' || true
  local i codes
  for ((i = 0; i < 20; i++)); do # the others end within moments, or hang
    [[ $(state) == READY || $dry_run ]] || return 0
    everywhere result || return 0
    [[ ! $dry_run ]] || return 0
    grep -q 'worker [0-9]*: runs' <<<"$answers" || break
    sleep "$poll"
  done
  codes=$(grep -o 'worker [0-9]*: \(ended [a-z0-9]*\|runs\)' <<<"$answers" | sort -u)
  # what failed by itself: not the echo of another's end (134), not told to stop (42)
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
    137) say 'killed: out of the host'\''s memory, or by hand (no preemption: the TPU is READY)' ;;
    runs) say 'it hangs while others have ended' && ended=1 && everywhere stop ;;
  esac
}

train() {
  local restart
  check_regions "$@"
  for ((restart = 0; restart <= restarts; restart++)); do
    once "$@"
    if [[ $dry_run ]]; then
      echo '# after a preemption, or exit code 42: all from the first command again'
      break
    fi
    case $ended in
      0) say 'done' ;;
      2) say 'the config, the workdir or the data must be mended first' ;;
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
      *) usage "not known before --: $1" ;;
    esac
    shift
  done
  [[ $name && $zone ]] || usage '--name and --zone are needed'
  [[ $restarts =~ ^[0-9]+$ ]] || usage "--restarts=$restarts: expected a number"
  [[ ! $env_file || -r $env_file ]] || usage "--env_file=$env_file: not there"
  place=(--zone="$zone")
  [[ ! $project ]] || place+=(--project="$project")
  exec 3>&1
  case $verb in
    run)
      [[ $type ]] || usage '--type is needed'
      [[ $# -gt 0 ]] || usage 'after --: the arguments of clipx.train'
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
    *) usage "no verb '$verb'" ;;
  esac
}

if [[ ${1:-} == worker ]]; then
  shift
  worker "$@"
else
  main "$@"
fi
