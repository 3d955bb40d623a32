#!/usr/bin/env bash
# Sets everything up and trains on this machine.
#
#   bash launch/local.sh                                   the embedded default, into runs/scenes
#   bash launch/local.sh --workdir=DIR --config=configs/voc.py --config.data.dir=PREPARED
#
# CLSL_EXTRA names the accelerator: cuda12, cuda13 or tpu (default: the CPU).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh ".${CLSL_EXTRA:+[$CLSL_EXTRA]}"

arguments=" $* "
[[ $arguments == *" --config="* ]] || set -- --config=configs/scenes.py "$@"
[[ $arguments == *" --workdir="* ]] || set -- --workdir=runs/scenes "$@"
exec python -m clsl_jax.main "$@"
