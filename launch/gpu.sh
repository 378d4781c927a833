#!/usr/bin/env bash
# Installs and starts a run on one machine with NVIDIA GPUs. Run it from anywhere; the same command resumes.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/gpu.sh --config=FILE [--workdir=DIR] [--config.a.b=value ...]

    launch/gpu.sh --config=configs/smollm2.py
    launch/gpu.sh --config=configs/qwen_1p5b.py --workdir=/mnt/disk/runs/qwen_1p5b

Everything behind the name of this script is passed on to `python -m dgpo_jax.train`; see its --help.
All GPUs of the machine are used, or those in CUDA_VISIBLE_DEVICES, by one process. The first call creates .venv and
installs the package with CUDA 13, which needs an NVIDIA driver of version 580 or newer; with an older driver:

    CUDA=12 launch/gpu.sh --config=FILE

Stopped, killed or crashed: the same command goes on from the last checkpoint.

Several machines that see the same --workdir: this command on each, with its own number and the address of machine 0.
When one of them dies all end; with RESTARTS they start again by themselves, from the last checkpoint.

    MACHINES=2 MACHINE=0 COORDINATOR=10.0.0.1:8476 RESTARTS=10 launch/gpu.sh --config=FILE --workdir=/shared/run
    MACHINES=2 MACHINE=1 COORDINATOR=10.0.0.1:8476 RESTARTS=10 launch/gpu.sh --config=FILE --workdir=/shared/run
TEXT
}

if [ $# -eq 0 ] || [ "$1" = -h ] || [ "$1" = --help ]; then
    usage
    exit 0
fi

command -v nvidia-smi >/dev/null || { echo "launch/gpu.sh: no nvidia-smi, so no NVIDIA driver; install it first." >&2; exit 1; }
nvidia-smi --query-gpu=index,name,memory.total,driver_version --format=csv,noheader

cd "$(dirname "$0")/.."
if [ ! -e .venv/installed ]; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        { echo "launch/gpu.sh: python3 is older than 3.11; install a newer one." >&2; exit 1; }
    python3 -m venv .venv
    if [ "${CUDA:-13}" = 12 ]; then
        .venv/bin/pip install -q -e . 'jax[cuda12]>=0.10.2'
    else
        .venv/bin/pip install -q -e '.[cuda]'
    fi
    touch .venv/installed
fi

if [ "${MACHINES:-1}" -gt 1 ]; then
    exec .venv/bin/python -m dgpo_jax.launch --machines="$MACHINES" --machine="${MACHINE:?is the number of this machine, from 0}" \
        --coordinator="${COORDINATOR:?is HOST:PORT of machine 0}" --restarts="${RESTARTS:-0}" -- dgpo_jax.train "$@"
fi
exec .venv/bin/python -m dgpo_jax.train "$@"
