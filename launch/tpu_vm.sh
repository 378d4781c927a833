#!/usr/bin/env bash
# Creates a Cloud TPU VM, copies this commit to it, installs it, and starts a run. The same command resumes.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/tpu_vm.sh NAME ZONE TYPE --config=FILE [--workdir=DIR] [--config.a.b=value ...]

    launch/tpu_vm.sh trial us-east5-a v6e-8 --config=configs/smoke.py
    launch/tpu_vm.sh trial us-east5-a v6e-8 logs       # follow its output
    launch/tpu_vm.sh trial us-east5-a v6e-8 stop       # it saves first; the same command as above goes on
    launch/tpu_vm.sh trial us-east5-a v6e-8 delete     # and everything on its disk

NAME is yours to choose, ZONE one where you have quota, TYPE an accelerator type (v6e-8, v5p-8, v5litepod-8; v6e-16, v5p-32).
What is behind them goes to `python -m dgpo_jax.train`. Needs gcloud, logged in and with a project set. It costs money
until it is deleted.

Uses the last commit of this folder: uncommitted changes stay behind.
Run again after a crash or a preemption, it creates what is missing and goes on from the last checkpoint. A preempted VM
loses its disk: to outlive that, mount a bucket on it (gcsfuse) and put --workdir there.

Environment:
    RUNTIME=...       TPU software version; by default the one for TYPE
    CREATE_FLAGS=...  more flags for `gcloud compute tpus tpu-vm create`, such as --spot

No capacity? Queue for it; once it is ACTIVE, run this script with the same NAME:
    gcloud compute tpus queued-resources create NAME-request --node-id=NAME --zone=ZONE \
        --accelerator-type=TYPE --runtime-version=RUNTIME [--spot]
    gcloud compute tpus queued-resources describe NAME-request --zone=ZONE

A slice of several hosts runs one process on each, which find each other (hosts.cluster=auto). All must see the same
--workdir, so it is required there: a bucket or a file share mounted at the same place on every host. If one dies, the
others end within hosts.heartbeat_s, and the same command starts all again; `stop` has the run save and end.
TEXT
}

fail() { printf 'launch/tpu_vm.sh: %s\n' "$1" >&2; exit 1; }

if [ $# -lt 4 ]; then
    usage
    [ $# -eq 0 ] || [ "$1" = -h ] || [ "$1" = --help ] || exit 2
    exit 0
fi
name=$1 zone=$2 type=$3
shift 3
command -v gcloud >/dev/null || fail "gcloud is not installed; see https://cloud.google.com/sdk/docs/install"

tpu() { gcloud compute tpus tpu-vm "$@" --zone="$zone"; }
on_all() { tpu ssh "$name" --worker=all --command="$1"; }

case $1 in
    logs) on_all 'tail -n 200 -f ~/dgpo_jax/train.log'; exit ;;
    # Of several processes one that is told is enough, and all of them are.
    stop) on_all 'pkill -TERM -u "$USER" -f "^[^ ]*bin/python -m dgpo_jax.train" && echo "saving; see the logs" || echo "nothing runs"'; exit ;;
    delete) tpu delete "$name"; exit ;;
    --*) ;;
    *) fail "$1 is neither logs, nor stop, nor delete, nor an option such as --config=configs/smoke.py" ;;
esac

case $type in
    v6e-*) default_runtime=v2-alpha-tpuv6e ;;
    v5p-*) default_runtime=v2-alpha-tpuv5 ;;
    v5lite*) default_runtime=v2-alpha-tpuv5-lite ;;
    *) default_runtime=tpu-ubuntu2204-base ;;
esac

if [ -z "$(tpu list --filter="name:$name" --format='value(name)')" ]; then
    echo "creating $name ($type) in $zone"
    # shellcheck disable=SC2086 -- CREATE_FLAGS is a list of flags
    tpu create "$name" --accelerator-type="$type" --version="${RUNTIME:-$default_runtime}" ${CREATE_FLAGS:-}
fi

hosts=$(tpu describe "$name" --flatten='networkEndpoints[]' --format='value(networkEndpoints.ipAddress)' | wc -l)
if [ "$hosts" -gt 1 ]; then
    case " $* " in
        *" --workdir="*) ;;
        *) fail "$name has $hosts hosts, which must see the same workdir; mount a disk on all of them and give --workdir=DIR there." ;;
    esac
    set -- --config.hosts.cluster=auto "$@"
fi

cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
archive=$folder/source.tar.gz
git archive --format=tar.gz --output="$archive" HEAD
echo "copying commit $(git rev-parse --short HEAD)"
on_all 'mkdir -p ~/dgpo_jax'
tpu scp "$archive" "$name:dgpo_jax/source.tar.gz" --worker=all

# TPU images come with an older Python than 3.11; uv brings its own.
on_all '
    set -eu
    cd ~/dgpo_jax
    tar -xzf source.tar.gz
    if [ ! -e .venv/installed ]; then
        python3 -m pip install -q --user uv
        python3 -m uv venv -q --clear --seed --python 3.12 .venv
        .venv/bin/pip install -q -e ".[tpu]"
        touch .venv/installed
    fi'

arguments=$(printf '%q ' "$@")
# The lock keeps a second call from starting a second run beside the first.
on_all "
    cd ~/dgpo_jax
    if ! flock -n train.lock true; then echo 'already running'; exit 0; fi
    nohup flock -n train.lock .venv/bin/python -m dgpo_jax.train $arguments >>train.log 2>&1 </dev/null &
    sleep 1; echo started"
echo "follow it with: launch/tpu_vm.sh $name $zone $type logs"
