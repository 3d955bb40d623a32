#!/usr/bin/env bash
# Sets everything up and trains on this machine.
#
#   bash launch/local.sh                                   the embedded default, into runs/scenes
#   bash launch/local.sh --workdir=DIR --config=configs/voc.py --config.data.dir=PREPARED
#   bash launch/local.sh --processes 2 [...]               (first) as two processes, as on two hosts
#
# CLSL_EXTRA names the accelerator: cuda12, cuda13 or tpu (default: the CPU). Several processes share the
# GPUs evenly, those of CUDA_VISIBLE_DEVICES or all; a TPU host is for one process.
# If one of several processes ends with an error, the others are stopped; what process K says beside
# the first one goes to WORKDIR.process-K.log. SIGTERM and Ctrl-C reach all of them.
# Tried on x86-64 Linux without an accelerator (sharing GPUs: with stand-ins).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh ".${CLSL_EXTRA:+[$CLSL_EXTRA]}"

# Large pages for the arrays of a step, which a CPU would otherwise fetch anew, 4 KiB at a time. For a large
# network on a CPU, docs/performance.md has a setting that keeps them from step to step.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

# Compiled steps of an accelerator, so that a run that goes on starts at once. Not of a CPU: on some,
# XLA writes them and never takes them again, with an error line each time
# (github.com/jax-ml/jax/issues/38445).
if [[ -n ${CLSL_EXTRA:-} ]]; then
  export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-${CLSL_CACHE_DIR:-$HOME/.cache/clsl_jax}/compiled}
fi

processes=1
if [[ ${1:-} == --processes ]]; then
  processes=${2:-}
  shift $(($# < 2 ? $# : 2))
elif [[ ${1:-} == --processes=* ]]; then
  processes=${1#*=}
  shift
fi
if ! [[ $processes =~ ^[1-9][0-9]*$ ]]; then
  echo "error: --processes needs a number from 1 on, found '$processes'." >&2
  exit 2
fi
arguments=" $* "
[[ $arguments == *" --config="* || $arguments == *" --mode=evaluate "* ]] ||
  set -- --config=configs/scenes.py "$@"
[[ $arguments == *" --workdir="* ]] || set -- --workdir=runs/scenes "$@"
if ((processes == 1)); then
  exec python -m clsl_jax.main "$@"
fi

# Else each process would take all GPUs of this machine.
gpus=()
if [[ ${CLSL_EXTRA:-} == cuda* ]]; then
  if [[ -v CUDA_VISIBLE_DEVICES ]]; then
    IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
  else
    mapfile -t gpus < <(nvidia-smi --query-gpu=index --format=csv,noheader)
  fi
  if ((${#gpus[@]} == 0 || ${#gpus[@]} % processes)); then
    echo "error: --processes $processes cannot share ${#gpus[@]} GPUs evenly; CUDA_VISIBLE_DEVICES chooses some." >&2
    exit 2
  fi
elif [[ ${CLSL_EXTRA:-} == tpu ]]; then
  echo "error: --processes $processes: one process drives all chips of a TPU host; leave it out." >&2
  exit 2
fi
share=$((${#gpus[@]} / processes))

for argument in "$@"; do
  [[ $argument == --workdir=* ]] && workdir=${argument#*=}
done
mkdir -p "$(dirname "$workdir")"
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$processes
pids=()
for ((k = 0; k < processes; k++)); do
  if ((share)); then
    visible=$(IFS=, && echo "${gpus[*]:k*share:share}")
    export CUDA_VISIBLE_DEVICES=$visible
  fi
  if ((k == 0)); then
    JAX_PROCESS_ID=0 python -m clsl_jax.main --distributed "$@" &
  else
    JAX_PROCESS_ID=$k python -m clsl_jax.main --distributed "$@" >"${workdir%/}.process-$k.log" 2>&1 &
  fi
  pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
status=0
while ((${#pids[@]} > 0)); do
  sleep 0.5 || true  # a signal ends it early
  running=()
  for pid in "${pids[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      running+=("$pid")
      continue
    fi
    code=0
    wait "$pid" || code=$?
    if ((code != 0 && status == 0)); then status=$code; fi
  done
  pids=("${running[@]}")
  # The others wait for the one that has failed; ten seconds are for their own last words.
  if ((status != 0 && ${#pids[@]} > 0)); then
    grace=${grace:-$((SECONDS + 10))}
    if ((SECONDS > grace)); then kill -KILL "${pids[@]}" 2>/dev/null || true; fi
  fi
done
exit "$status"
