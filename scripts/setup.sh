#!/bin/sh
# Creates the virtual environment and installs from the lock files. Usage: setup.sh run|dev
set -eu
what=${1:-run}
python=${PYTHON:-python3}
venv=.venv

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Cloister needs Python 3.11 or newer; $("$python" --version 2>&1) was found. Set PYTHON=/path/to/python3.11." >&2
    exit 1
}

if [ ! -x "$venv/bin/python" ]; then
    # Debian and Ubuntu ship venv without ensurepip until python3-venv is installed.
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
            apt-get update -qq && apt-get install -y -qq python3-venv
        else
            echo "Python's venv module is missing. Install it: sudo apt-get install python3-venv" >&2
            exit 1
        fi
    fi
    "$python" -m venv "$venv"
fi

pip="$venv/bin/python -m pip --disable-pip-version-check"
echo "Installing the locked dependencies ($what) ..."
$pip install --quiet --no-deps --require-hashes -r "requirements/$what.lock"
if [ "$what" = dev ]; then
    sh scripts/install_torch.sh "$venv/bin/python"
fi
$pip install --quiet --no-deps --editable .
