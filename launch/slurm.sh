#!/usr/bin/env bash
# Trains under Slurm, one task a GPU; near its time limit or preempted, it is queued again and goes on.
#
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 --cpus-per-task=8 launch/slurm.sh \
#       --config=configs/coco.py --config.batch_size=64 --workdir=/shared/runs/coco \
#       --config.data.dir=/shared/coco
#   sbatch --nodes=1 --ntasks=2 launch/slurm.sh --workdir=/shared/runs/cpu     two CPU processes
#
# The repository, its environment and --workdir must lie where every node sees them, and the batch must
# spread over all devices. Make the environment once beforehand, on a node with network:
# bash -c "source launch/environment.sh '.[cuda12]'"
# CLSL_VENV names it (default .venv). What the tasks share by environment:
#   JAX_COMPILATION_CACHE_DIR   compiled steps (default WORKDIR/../compiled), so that a restart takes
#                               seconds; CLSL_CACHE_DIR: decoded images and features of frozen backbones
# Checkpoints lie in the workdir; --config.checkpoint.dir=gs://BUCKET/RUN keeps them in a bucket.
# Queued again: tasks that a signal stopped with work left, always; tasks that broke, unless the job was queued
# again CLSL_MOST_RESTARTS times already (default 20), for whatever reason. Not: a job that is done, refused
# (status 2), or ended by scancel.
# Tried with Slurm 22.05 on one node without GPUs, two tasks: a run that was stopped, queued again and went on to
# its end; with a stand-in for the program, all that is said here, a time limit and preemption of three kinds
# (REQUEUE, with and without GraceTime, and CANCEL).
#SBATCH --job-name=clsl_jax
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=clsl_jax-%j.log
# Two minutes before the time is over every task gets SIGTERM: it saves and ends with status 75.
#SBATCH --signal=B:USR1@120
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
export PATH="${CLSL_VENV:-$PWD/.venv}/bin:$PATH"
command -v python >/dev/null || { echo "error: no environment in ${CLSL_VENV:-$PWD/.venv}" >&2; exit 2; }

config=configs/scenes.py
workdir=
for argument in "$@"; do
  case $argument in
    --config=*) config= ;;
    --workdir=*) workdir=${argument#*=} ;;
  esac
done
if [[ -z $workdir ]]; then
  echo "error: --workdir=DIR is missing: a directory that every node sees." >&2
  exit 2
fi
# Not of a CPU, see launch/local.sh.
if [[ -n ${SLURM_GPUS_ON_NODE:-}${SLURM_JOB_GPUS:-} ]]; then
  export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$(dirname "$workdir")/compiled}
fi
# srun does not take --cpus-per-task from sbatch since Slurm 22.05.
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
export PYTHONUNBUFFERED=1
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1} # large pages, for arrays on a CPU

stopped=false
# shellcheck disable=SC2329  # by the trap below
stop() {
  stopped=true
  echo "Slurm ends this job: the tasks save and stop."
  # To the tasks of the one job step; srun itself would take SIGTERM as an order to kill them.
  scancel --signal=TERM "$SLURM_JOB_ID.0" || true
}
trap stop USR1 TERM

# --kill-on-bad-exit: if one task fails, the others, which wait for it, are ended too.
srun --kill-on-bad-exit=1 python -m clsl_jax.main --distributed --stopped_status=75 \
  ${config:+--config="$config"} "$@" &
tasks=$!

# A trapped signal wakes `wait` with a status of its own; that of the tasks comes when they have ended.
while kill -0 "$tasks" 2>/dev/null; do wait "$tasks" || true; done
code=0
wait "$tasks" || code=$?
if ((code == 0 || code == 2)); then exit "$code"; fi # done; refused, and would be again

# What `scancel` ends stays so, and what is preempted with PreemptMode=REQUEUE Slurm itself queues again:
# both are COMPLETING by now. So is a job that was preempted otherwise, or whose time ran out while its
# tasks saved; these say so, and go on.
job=$(scontrol show job -o "$SLURM_JOB_ID") || true
if ! [[ $job =~ \ (JobState=RUNNING|Reason=TimeLimit|PreemptTime=[0-9]) ]]; then
  echo "The tasks ended with status $code in a job that no longer runs: it is left to Slurm."
elif $stopped || ((code == 75)); then # 75: the tasks were sent SIGTERM by another than this script
  echo "Stopped with work left: queueing the job again."
  scontrol requeue "$SLURM_JOB_ID"
elif ((${SLURM_RESTART_COUNT:-0} < ${CLSL_MOST_RESTARTS:-20})); then
  # Broken: a node or a process was lost. The last checkpoint is still there.
  echo "The tasks ended with status $code: queueing the job again."
  scontrol requeue "$SLURM_JOB_ID"
else
  echo "The tasks ended with status $code in a job that was queued again ${SLURM_RESTART_COUNT:-0} times: no more." \
    "The same command goes on from the last checkpoint."
fi
exit "$code"
