# shellcheck shell=bash
# Sourced by local.sh and tpu_vm.sh, which start again what has ended with work left; slurm.sh leaves
# that to Slurm and gke.yaml to JobSet.

# Usage: with_restarts MOST TRY AGAIN
# Runs TRY; where it has ended with work left, AGAIN STATUS and then TRY anew, up to MOST times or until
# AGAIN fails. Returns the last status.
with_restarts() {
  local most=$1 try=$2 again=$3 attempt code
  for ((attempt = 0; ; attempt++)); do
    code=0
    "$try" || code=$?
    # 0: done; 2: refused, and would be again. 75, stopped by SIGTERM, goes on like all others.
    if ((code == 0 || code == 2 || attempt == most)); then return "$code"; fi
    "$again" "$code" || return "$code"
  done
}
