#!/usr/bin/env bash
# Sets everything up and trains on this machine.
#
#   bash launch/local.sh                                   the embedded default, into runs/scenes
#   bash launch/local.sh --workdir=DIR --config=configs/voc.py --config.data.dir=PREPARED
#   bash launch/local.sh --processes 2 [...]               as two processes, as on two hosts
#   bash launch/local.sh --restarts 20 [...]               started again where it broke
#
# --processes and --restarts stand before all other arguments.
# CLSL_EXTRA names the accelerator: cuda12, cuda13 or tpu (default: the CPU). Several processes share the
# GPUs evenly, those of CUDA_VISIBLE_DEVICES or all; a TPU host is for one process.
# If one of several processes ends with an error, the others are stopped ten seconds later; what process K
# says beside the first one goes to WORKDIR.process-K.log. SIGTERM and Ctrl-C reach all of them as SIGTERM:
# they save and stop. With --restarts N, processes that end with an error otherwise are started anew, from the
# last checkpoint, up to N times (default 0); status 2 (input that cannot be used) ends it.
# Tried on x86-64 Linux without an accelerator (sharing GPUs: with stand-ins).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh ".${CLSL_EXTRA:+[$CLSL_EXTRA]}"
source launch/restarts.sh

# Large pages for the arrays of a step, which a CPU would otherwise fetch anew, 4 KiB at a time. For a large
# network on a CPU, docs/performance.md has a setting that keeps them from step to step.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

# Compiled steps of an accelerator, so that a run that goes on starts at once. Not of a CPU: on some,
# XLA writes them and never takes them again, with an error line each time
# (github.com/jax-ml/jax/issues/38445).
if [[ -n ${CLSL_EXTRA:-} ]]; then
  export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-${CLSL_CACHE_DIR:-$HOME/.cache/clsl_jax}/compiled}
fi

processes=1 restarts=0
while [[ ${1:-} =~ ^--(processes|restarts)(=(.*))?$ ]]; do
  name=${BASH_REMATCH[1]} least=1
  if [[ -n ${BASH_REMATCH[2]} ]]; then
    number=${BASH_REMATCH[3]}
    shift
  else
    number=${2:-}
    shift $(($# < 2 ? $# : 2))
  fi
  if [[ $name == restarts ]]; then least=0; fi
  if ! [[ $number =~ ^(0|[1-9][0-9]{0,8})$ ]] || ((number < least)); then
    echo "error: --$name needs a number from $least on, found '$number'." >&2
    exit 2
  fi
  printf -v "$name" %s "$number"
done
given=()
while (($#)); do
  if [[ $1 =~ ^--?(config|workdir|mode)$ ]] && (($# > 1)); then  # in two words
    given+=("--${BASH_REMATCH[1]}=$2")
    shift
  else
    given+=("$1")
  fi
  shift
done
set -- "${given[@]}"
arguments=" $* "
[[ $arguments == *" --config="* || $arguments == *" --mode=evaluate "* ]] ||
  set -- --config=configs/scenes.py "$@"
[[ $arguments == *" --workdir="* ]] || set -- --workdir=runs/scenes "$@"
if ((processes == 1 && restarts == 0)); then
  exec python -m clsl_jax.main "$@"
fi

# Else each of several processes would take all GPUs of this machine.
gpus=()
if ((processes == 1)); then
  :
elif [[ ${CLSL_EXTRA:-} == cuda* ]]; then
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
for ((k = 1; k < processes; k++)); do : >"${workdir%/}.process-$k.log"; done
program=(python -m clsl_jax.main)
if ((processes > 1)); then program+=(--distributed); fi
program+=("$@")

start() {
  local k port visible
  if ((processes > 1)); then
    port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$processes
  fi
  pids=()
  for ((k = 0; k < processes; k++)); do
    if ((processes > 1)); then export JAX_PROCESS_ID=$k; fi
    if ((share)); then
      visible=$(IFS=, && echo "${gpus[*]:k*share:share}")
      export CUDA_VISIBLE_DEVICES=$visible
    fi
    if ((k == 0)); then
      "${program[@]}" &
    else
      "${program[@]}" >>"${workdir%/}.process-$k.log" 2>&1 &
    fi
    pids+=($!)
  done
}

# Waits for all of them; returns the status of the one that failed first (half a second is one moment).
finish() {
  local pid code status=0 grace='' running
  while ((${#pids[@]} > 0)); do
    if $tell; then
      tell=false
      kill -TERM "${pids[@]}" 2>/dev/null || true
    fi
    sleep 0.5 || true  # a signal ends it early
    running=()
    for pid in "${pids[@]}"; do
      if kill -0 "$pid" 2>/dev/null; then
        running+=("$pid")
        continue
      fi
      code=0
      wait "$pid" || code=$?
      # One that was refused would be again, whatever that did to the others.
      if ((code == 2 || (code != 0 && status == 0))); then status=$code; fi
    done
    pids=("${running[@]}")
    # The others wait for the one that has failed; ten seconds are for their own last words.
    if ((status != 0 && ${#pids[@]} > 0)); then
      grace=${grace:-$((SECONDS + 10))}
      if ((SECONDS > grace)); then kill -KILL "${pids[@]}" 2>/dev/null || true; fi
    fi
  done
  return "$status"
}

# Only noted here, so that no process is missed that is just being started.
stopped=false tell=false
trap 'stopped=true tell=true' TERM INT
once() {
  start
  finish
}
start_anew() {
  if $stopped; then return 1; fi
  echo "The processes ended with status $1; starting them anew."
}
with_restarts "$restarts" once start_anew
