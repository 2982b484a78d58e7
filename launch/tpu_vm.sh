#!/usr/bin/env bash
# Trains on a Cloud TPU VM: request it, install, run, request it anew after a preemption, delete it. docs/launch/tpu_vm.md explains.
set -euo pipefail

PROGRAM="launch/tpu_vm.sh"
PREEMPTED=75 # what `allmrec` exits with when it was told to stop and has saved: run it again

usage() {
  cat <<'TEXT'
Run `allmrec run` on every worker of a Cloud TPU VM, until it is done.

  launch/tpu_vm.sh --zone ZONE --accelerator TYPE --config CONFIG --workdir gs://BUCKET/FOLDER [options] [-- FIELDS]

Steps: build this checkout's wheel; request the TPU as a queued resource and wait for it; copy the wheel, the constraints
and the config to all workers and install; `allmrec run` on all workers. If the TPU is preempted (exit status 75, or the
machine is gone) it is deleted and requested again, and the run goes on from its last checkpoint. The TPU works in a folder
of its own disk, which is copied from --workdir at the start, and to it every five minutes and at the end. At the end,
and on Ctrl-C, the TPU is deleted.

Required
  --zone ZONE            where the TPU is, e.g. us-west4-a
  --accelerator TYPE     kind and number of chips, e.g. v5litepod-8, v6e-8, v4-8 (one host: at most 8)
  --config CONFIG        a config file, e.g. configs/ml100k.py, or the bare name of one that is shipped: ml100k
  --workdir gs://...     work directory in a bucket that the TPU's service account may write; it outlives the TPU

Options
  --dry-run              print the commands, in order, and run none; needs neither gcloud nor an account
  --project PROJECT      Google Cloud project (default: gcloud's own)
  --name NAME            name of the TPU and of its request (default: allmrec)
  --spot                 cheaper, may be preempted at any time (default)
  --on-demand            full price, not preempted
  --runtime-version V    image of the VM (default: the one for TYPE)
  --service-account A    account the workers act as (default: the project's default)
  --max-restarts N       give up after that many preemptions (default: 100)
  --poll SECONDS         how often to ask whether the TPU is there (default: 30)
  --keep                 do not delete the TPU at the end: you pay until you delete it
  --help                 this text

After `--`: config fields for `allmrec run`, e.g. -- --seed 1

Exit status: 0 done; 1 a mistake in the arguments, no TPU, or installation failed; otherwise that of `allmrec run`.

Look first:  launch/tpu_vm.sh --dry-run --zone us-west4-a --accelerator v5litepod-8 \
                 --config ml100k --workdir gs://my-bucket/ml100k
TEXT
}

fail() { echo "$PROGRAM: $*" >&2; exit 1; }
note() { echo "# $*"; }

zone="" accelerator="" config="" workdir="" project="" name="allmrec" tier="--spot" runtime="" account=""
max_restarts=100 poll=30 keep=0 dry_run=0 fields=()

while [ $# -gt 0 ]; do
  option="$1"
  shift
  case "$option" in
    --help | -h) usage; exit 0 ;;
    --dry-run) dry_run=1; continue ;;
    --spot) tier="--spot"; continue ;;
    --on-demand) tier=""; continue ;;
    --keep) keep=1; continue ;;
    --) fields=("$@"); break ;;
  esac
  case "$option" in --*=*) set -- "${option#*=}" "$@"; option="${option%%=*}" ;; esac
  case "$option" in
    --zone | --accelerator | --config | --workdir | --project | --name | --runtime-version | --service-account | --max-restarts | --poll)
      [ $# -gt 0 ] && [ -n "$1" ] && [ "${1#--}" = "$1" ] || fail "$option needs a value (see --help)" ;;
    *) fail "unknown argument '$option' (see --help; fields for allmrec run go after --)" ;;
  esac
  case "$option" in
    --zone) zone="$1" ;;
    --accelerator) accelerator="$1" ;;
    --config) config="$1" ;;
    --workdir) workdir="$1" ;;
    --project) project="$1" ;;
    --name) name="$1" ;;
    --runtime-version) runtime="$1" ;;
    --service-account) account="$1" ;;
    --max-restarts) max_restarts="$1" ;;
    --poll) poll="$1" ;;
  esac
  shift
done

[ -n "$zone" ] || fail "--zone is required, e.g. --zone us-west4-a (see --help)"
[ -n "$accelerator" ] || fail "--accelerator is required, e.g. --accelerator v5litepod-8 (see --help)"
[ -n "$config" ] || fail "--config is required, e.g. --config configs/ml100k.py (see --help)"
[ -n "$workdir" ] || fail "--workdir is required, e.g. --workdir gs://my-bucket/run1 (see --help)"
case "$workdir" in
  gs://?*) ;;
  *) fail "--workdir must be in a bucket (gs://...), since the TPU's own disk is deleted with it; got '$workdir'" ;;
esac
chips="${accelerator##*-}"
case "$chips" in
  '' | *[!0-9]*) fail "--accelerator must end in a number, e.g. v5litepod-8; got '$accelerator'" ;;
esac
[ "$chips" -le 8 ] || fail "$accelerator has several hosts, which allmrec does not use yet; take one of at most 8, e.g. v5litepod-8"
case "$max_restarts" in '' | *[!0-9]*) fail "--max-restarts must be a whole number; got '$max_restarts'" ;; esac
case "$poll" in '' | *[!0-9]*) fail "--poll must be a whole number of seconds; got '$poll'" ;; esac

if [ -z "$runtime" ]; then
  case "$accelerator" in
    v2-* | v3-* | v4-*) runtime="tpu-ubuntu2204-base" ;;
    v5litepod-*) runtime="v2-alpha-tpuv5-lite" ;;
    v5p-*) runtime="v2-alpha-tpuv5" ;;
    v6e-*) runtime="v2-alpha-tpuv6e" ;;
    *) fail "no known image for accelerator '$accelerator'; name one with --runtime-version, or use v2- v3- v4- v5litepod- v5p- or v6e-" ;;
  esac
fi

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
[ "$PWD" != "$root" ] || root="."
case "$config" in
  *.py)
    [ -f "$config" ] || fail "no config file '$config'; see configs/, or give the bare name of a shipped one"
    remote_config="allmrec-files/$(basename "$config")"
    ;;
  */*) fail "a config is a .py file or the bare name of a shipped one; got '$config'" ;;
  *)
    [ -f "$root/configs/$config.py" ] || fail "no shipped config '$config'; see configs/"
    remote_config="$config"
    ;;
esac

# One word as a shell would have to read it.
quote() {
  case "$1" in
    '' | *[!A-Za-z0-9_./:=@,+-]*) printf "'%s'" "$(printf '%s' "$1" | sed "s/'/'\\\\''/g")" ;;
    *) printf '%s' "$1" ;;
  esac
}

# Runs a command, or in a dry run prints it.
run() {
  if [ "$dry_run" = 1 ]; then
    local word line=""
    for word in "$@"; do line="$line$(quote "$word") "; done
    echo "${line% }"
  else
    "$@"
  fi
}

where=(--zone "$zone")
[ -z "$project" ] || where+=(--project "$project")
gcloud_requests() { run gcloud compute tpus queued-resources "$@" "${where[@]}"; }
on_all_workers() { run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker all --command "$1"; }

requested=0

request() {
  local options=(--node-id "$name" --accelerator-type "$accelerator" --runtime-version "$runtime")
  [ -z "$tier" ] || options+=("$tier")
  [ -z "$account" ] || options+=(--service-account "$account")
  gcloud_requests create "$name" "${options[@]}" ||
    fail "the TPU could not be requested (is there one named '$name' already? then choose another --name)"
  requested=1
}

request_state() { gcloud_requests describe "$name" --format 'value(state.state)'; }
node_state() { run gcloud compute tpus tpu-vm describe "$name" "${where[@]}" --format 'value(state)'; }

# 0: the TPU is there. 1: it was lost while waiting.
wait_until_active() {
  if [ "$dry_run" = 1 ]; then
    note "every $poll s until it says ACTIVE:"
    request_state
    return 0
  fi
  local state before="" unanswered=0
  while true; do
    if state="$(request_state)"; then unanswered=0; else
      state="no answer"
      unanswered=$((unanswered + 1))
      [ "$unanswered" -lt 10 ] || fail "gcloud could not say what became of '$name', ten times in a row; see above"
    fi
    [ "$state" = "$before" ] || note "$(date +%H:%M:%S) $name: $state"
    before="$state"
    case "$state" in
      ACTIVE) return 0 ;;
      FAILED) fail "the request for $accelerator in $zone failed; gcloud compute tpus queued-resources describe $name --zone $zone says why" ;;
      SUSPENDING | SUSPENDED) return 1 ;;
    esac
    sleep "$poll"
  done
}

# 0: the machine is still ours and healthy.
still_there() { [ "$(request_state || true)" = ACTIVE ] && [ "$(node_state || true)" = READY ]; }

delete_tpu() {
  gcloud_requests delete "$name" --force --quiet
  requested=0
}

at_exit() {
  local status=$?
  trap - EXIT
  if [ "$requested" = 1 ] && [ "$keep" = 1 ]; then
    note "kept, and billed: delete it with  gcloud compute tpus queued-resources delete $name --force --zone $zone"
  elif [ "$requested" = 1 ]; then
    delete_tpu || echo "$PROGRAM: '$name' could not be deleted and may still be billed; delete it by hand" >&2
  fi
  exit "$status"
}
trap at_exit EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

version="$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$root/allmrec_jax/__init__.py")"
wheel="allmrec_jax-$version-py3-none-any.whl"
python="$root/.venv/bin/python"
[ -x "$python" ] || python="python3"

# The images come with Python 3.10; uv brings one that is new enough.
install_command="set -e; python3 -m pip install --quiet --user uv; uv=\$HOME/.local/bin/uv; \
\$uv venv --quiet --clear --python 3.12 allmrec-venv; \
\$uv pip install --quiet --python allmrec-venv/bin/python -c allmrec-files/py312.txt 'allmrec-files/${wheel}[tpu]'"

# gcloud repeats a command whose connection broke: the lock keeps the second from running beside the first.
allmrec="flock --wait 600 /tmp/allmrec.lock allmrec-venv/bin/allmrec run --config $(quote "$remote_config") --workdir allmrec-run"
for field in ${fields[@]+"${fields[@]}"}; do allmrec="$allmrec $(quote "$field")"; done
# A copy that was cut short does no harm: a checkpoint carries checksums, and the one before it is used.
sync="gcloud storage rsync --recursive --quiet"
to_bucket="$sync allmrec-run $(quote "$workdir")"
run_command="mkdir -p allmrec-run; $sync $(quote "$workdir") allmrec-run || true; \
(while sleep 300; do $to_bucket; done) & copier=\$!; \
$allmrec; status=\$?; kill \$copier; $to_bucket; exit \$status"

files=("$root/dist/$wheel" "$root/constraints/py312.txt")
[ "$remote_config" = "$config" ] || files+=("$config")

install() {
  on_all_workers "rm -rf allmrec-files && mkdir allmrec-files" &&
    run gcloud compute tpus tpu-vm scp "${files[@]}" "$name:allmrec-files/" "${where[@]}" --worker all &&
    on_all_workers "$install_command"
}

if [ "$dry_run" = 0 ]; then
  command -v gcloud >/dev/null || fail "gcloud is not installed; get the Google Cloud CLI, or use --dry-run to see the commands"
fi

note "build the wheel"
run "$python" -m pip wheel --quiet --no-deps --wheel-dir "$root/dist" "$root" || fail "the wheel could not be built"

restarts=0
while true; do
  note "request $accelerator in $zone as '$name'"
  request
  lost=0
  wait_until_active || lost=1
  if [ "$lost" = 0 ]; then
    note "install on all workers"
    if ! install; then
      still_there && fail "the installation failed on a worker; see above"
      lost=1
    fi
  fi
  if [ "$lost" = 0 ]; then
    note "run on all workers"
    status=0
    on_all_workers "$run_command" || status=$?
    [ "$dry_run" = 0 ] || note "exit status $PREEMPTED (preempted, saved), or the TPU gone: delete, and from 'request' again, at most $max_restarts times"
    [ "$status" != 0 ] || { [ "$dry_run" = 1 ] || note "done: $workdir"; exit 0; }
    # A worker may fail because another was preempted, and a preempted machine looks well for a while: so wait before asking.
    [ "$status" = "$PREEMPTED" ] || sleep "$poll"
    if [ "$status" != "$PREEMPTED" ] && still_there; then
      echo "$PROGRAM: allmrec run failed with exit status $status; see above" >&2
      exit "$status"
    fi
  fi
  restarts=$((restarts + 1))
  [ "$restarts" -le "$max_restarts" ] || fail "preempted $restarts times; --max-restarts allows $max_restarts"
  note "preempted; request it again ($restarts of at most $max_restarts)"
  delete_tpu
done
