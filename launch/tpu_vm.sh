#!/usr/bin/env bash
# Trains on a TPU VM or a slice of many hosts; a host that is taken away and comes back goes on.
#
#   bash launch/tpu_vm.sh --tpu=NAME --zone=ZONE --bucket=gs://BUCKET/RUN -- \
#       --config=configs/coco.py --config.batch_size=64 --config.data.dir=/mnt/data/coco
#
# Copies this repository, as it is committed, to every host, sets the environment up there (once), and
# starts one process a host; JAX finds the others by itself. Needs `gcloud`, logged in, and on every host
# Python 3.11 or newer with its venv module, as python3 or by its version. Ubuntu 22.04 has 3.10: install
# one more there first, or take another image. --dry-run prints the commands.
#   --bucket   checkpoints (checkpoint.dir) and compiled steps; the workdir itself, with log and
#              results, is ~/runs/RUN on host 0
#   --project  of the TPU, if not gcloud's own
# What follows `--` goes to clsl_jax.main; the batch must spread over all chips. If a host is lost or
# gets SIGTERM, all processes end; this script waits until the TPU is READY again and starts them anew,
# from the last checkpoint, up to 20 times. So it does where pip failed, which may be the network; status 2
# (input that cannot be used, no Python that will do) ends it. Tried with a stand-in for gcloud, on no TPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/restarts.sh

tpu='' zone='' bucket='' project='' dry=false
while (($#)); do
  case $1 in
    --tpu=*) tpu=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --bucket=*) bucket=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --dry-run) dry=true ;;
    --) shift; break ;;
    *) echo "error: unknown argument '$1': write what goes to clsl_jax.main after --." >&2; exit 2 ;;
  esac
  shift
done
for name in tpu zone bucket; do
  if [[ -z ${!name} ]]; then echo "error: --$name=... is missing." >&2; exit 2; fi
done
if [[ $bucket != gs://[!/]* ]]; then echo "error: --bucket=$bucket: expected gs://BUCKET/RUN." >&2; exit 2; fi
bucket=${bucket%/}

where=(--zone="$zone")
if [[ -n $project ]]; then where+=(--project="$project"); fi

run() {
  if $dry; then printf '%q ' "$@"; echo; else "$@"; fi
}
on_all() {
  run gcloud compute tpus tpu-vm ssh "$tpu" "${where[@]}" --worker=all --command="$1"
}

archive=$(mktemp --suffix=.tgz)
trap 'rm -f "$archive"' EXIT
git archive --format=tgz -o "$archive" HEAD || {
  echo "error: 'git archive HEAD' failed: what is sent is this repository's last commit, so it must be a checkout." >&2
  exit 2
}
changes=$(git status --porcelain)
if [[ -n $changes ]]; then
  printf 'warning: the last commit is sent, without these changes:\n%s\n' "$changes" >&2
fi
set_up="mkdir -p clsl_jax runs && tar xzf clsl_jax.tgz -C clsl_jax && cd clsl_jax \
&& source launch/environment.sh '.[tpu]' && pip install --quiet gcsfs"
arguments=$(printf '%q ' --workdir="runs/$(basename "$bucket")" \
  --config.checkpoint.dir="$bucket/checkpoints" "$@")
train="cd clsl_jax && source launch/environment.sh && cd .. && ln -sfn clsl_jax/configs configs \
&& JAX_COMPILATION_CACHE_DIR=$(printf %q "$bucket/compiled") PYTHONUNBUFFERED=1 \
python -m clsl_jax.main --distributed --stopped_status=75 $arguments"

once() {
  run gcloud compute tpus tpu-vm scp "$archive" "$tpu:clsl_jax.tgz" "${where[@]}" --worker=all &&
    on_all "$set_up" && on_all "$train"
}
wait_for_tpu() {
  echo "The processes ended with status $1; waiting until $tpu is READY."
  until state=$(gcloud compute tpus tpu-vm describe "$tpu" "${where[@]}" --format='value(state)') &&
    [[ $state == READY ]]; do
    # A spot TPU that was preempted has to be made again by whoever made it.
    echo "$(date +%T) $tpu is ${state:-not found}"
    sleep 30
  done
  sleep 30  # hosts that have just come up refuse connections for a while
}
with_restarts 20 once wait_for_tpu
