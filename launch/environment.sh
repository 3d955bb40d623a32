# shellcheck shell=bash
# Sourced by the other scripts: makes (once) and activates the virtual environment.
# Usage: source launch/environment.sh [PIP-TARGET ...]     such as '.[cuda12]'
# CLSL_VENV names the environment (default .venv in the repository), CLSL_PYTHON the interpreter.
# Ends the shell with 2 where another try cannot help, with 1 where pip failed, which may be the network.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${CLSL_VENV:-$root/.venv}

find_python() {
  local candidate candidates=(python3.12 python3.11 python3 python)
  if [ -n "${CLSL_PYTHON:-}" ]; then candidates=("$CLSL_PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2])' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  if [ -n "${CLSL_PYTHON:-}" ]; then
    echo "error: CLSL_PYTHON=$CLSL_PYTHON is no Python 3.11 or newer that can be run." >&2
  else
    echo "error: no Python 3.11 or newer was found; install one or set CLSL_PYTHON to it." >&2
  fi
  return 1
}

if [ ! -x "$venv/bin/python" ]; then
  python=$(find_python) || exit 2
  if [ -n "$(ls -A "$venv" 2>/dev/null)" ] && [ ! -e "$venv/pyvenv.cfg" ]; then
    echo "error: CLSL_VENV=$venv holds something else; name another directory." >&2
    exit 2
  fi
  echo "Making the environment $venv with $("$python" --version) ..."
  "$python" -m venv "$venv" || {
    echo "error: '$python -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv" >&2
    exit 2
  }
fi
for target in "$@"; do
  stamp=$venv/.installed-$(echo "$target" | tr -c 'a-zA-Z0-9\n' '_')
  if [ ! -e "$stamp" ] || [ -n "$(find "$root"/requirements*.txt "$root"/setup.cfg -newer "$stamp")" ]; then
    echo "Installing $target (once; about a minute) ..."
    # An environment that was interrupted while it was made has no pip yet.
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip >/dev/null || {
      echo "error: $venv has no pip and cannot get it; remove that directory and try again." >&2
      exit 2
    }
    (cd "$root" && "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e "$target") || {
      echo "error: the installation failed; see pip's message above." >&2
      exit 1
    }
    touch "$stamp"
  fi
done
export PATH="$venv/bin:$PATH"
