#!/usr/bin/env bash
# A Slurm job of one process per GPU on any number of nodes. Submit it from the root of the repository:
#
#     sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 launch/slurm.sh --config=FILE --workdir=/shared/run
#
# The environment .venv must be on a disk that all nodes see (made by launch/gpu.sh on a node with a GPU), and so must --workdir.
#
# Told to end, by preemption or two minutes before --time is over, the run saves and exits with code 75; then, and when a
# node or a process died, the job is put back into the queue and goes on from the last checkpoint, at most MAX_RESTARTS times (100). Bad
# input, exit code 1 or 2 of all processes, ends it for good.
#SBATCH --job-name=dgpo_jax
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
set -uo pipefail

if [ -z "${SLURM_JOB_ID:-}" ] || [ $# -eq 0 ]; then
    sed -n '2,/^#SBATCH/{/^#SBATCH/!s/^# \{0,1\}//p}' "$0"
    exit 2
fi
cd "${SLURM_SUBMIT_DIR:?}" || exit 1

most=${MAX_RESTARTS:-100} # how often a job that keeps dying is put back
# Preemption signals this shell too (depending on the cluster): it must outlive the steps, to see how they ended.
trap : TERM

# JAX finds the other processes, and which GPU is whose, by the variables of Slurm. When one dies the others end within
# hosts.heartbeat_s; two minutes later Slurm ends them. With --kill-on-bad-exit they would be killed at once, also by one
# that ended for bad input a moment before them; and srun returns the highest exit code of all, that of the kill.
srun --kill-on-bad-exit=0 --wait=120 .venv/bin/python -m dgpo_jax.train --config.hosts.cluster=auto --config.grace-seconds=90 "$@"
code=$?

case $code in
    0) exit 0 ;;
    1 | 2) echo "slurm.sh: exit code $code, which would be the same again" >&2; exit "$code" ;;
esac
if [ "${SLURM_RESTART_COUNT:-0}" -ge "$most" ]; then
    echo "slurm.sh: exit code $code after $most restarts; MAX_RESTARTS allows no more" >&2
    exit "$code"
fi
echo "slurm.sh: exit code $code; back into the queue" >&2
scontrol requeue "$SLURM_JOB_ID"
