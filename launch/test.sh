#!/usr/bin/env bash
# Sets everything up and runs the tests; arguments go to pytest (such as -m 'not slow').
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh ".[dev]"
exec python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder "$@"
