#!/usr/bin/env bash
# Make the virtual environment with the first Python >= 3.11 that works here (PYTHON=... names another).
set -euo pipefail
venv=$1
right='import sys; sys.exit(sys.version_info < (3, 11))'

if [ -x "$venv/bin/python" ] && "$venv/bin/python" -c "$right"; then
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip >/dev/null
    exit 0
fi
for python in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
    "$python" -c "$right" 2>/dev/null || continue
    rm -rf "$venv"
    if ! said=$("$python" -m venv "$venv" 2>&1); then
        rm -rf "$venv"
        echo "$said" >&2
        echo "Error: $python cannot make a virtual environment." >&2
        echo "On Debian and Ubuntu its parts are in a package of their own: apt install python3-venv" >&2
        exit 1
    fi
    exit 0
done
echo "Error: Headgate needs Python 3.11 or newer; tried ${PYTHON:-python3.11 python3.12 python3.13 python3}." >&2
echo "On Debian and Ubuntu: apt install python3 python3-venv. Another one: make setup PYTHON=/path/to/python" >&2
exit 1
