#!/usr/bin/env bash
# Installs and starts a run on one machine with NVIDIA GPUs. Run it from anywhere; the same command resumes.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/gpu.sh --config=FILE [--workdir=DIR] [--config.a.b=value ...]

    launch/gpu.sh --config=configs/smollm2.py
    launch/gpu.sh --config=configs/qwen_1p5b.py --workdir=/mnt/disk/runs/qwen_1p5b

Everything behind the name of this script is passed on to `python -m dgpo_jax.train`; see its --help.
All GPUs of the machine are used, or those in CUDA_VISIBLE_DEVICES. The first call creates .venv and installs the
package with CUDA 13, which needs an NVIDIA driver of version 580 or newer; with an older driver:

    CUDA=12 launch/gpu.sh --config=FILE

Stopped, killed or crashed: the same command goes on from the last checkpoint.
Several machines: not yet. Multi-host training comes with a later release.
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

exec .venv/bin/python -m dgpo_jax.train "$@"
