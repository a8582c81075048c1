#!/bin/bash
# Installs a wheel of dist/ into an empty environment of its Python and asks it the known answers.
#   check_wheel.sh WHEEL [TORCH]    TORCH: a version, oldest (that fastproj takes) or newest (of pip)
# PYTHON is one with setuptools; build_wheels.py finds the wheel's own.
set -euo pipefail
wheel=$(realpath "$1")
here=$(dirname "$(realpath "$0")")
[[ $wheel =~ -cp3([0-9]+)-cp3 ]] || { echo "check_wheel.sh: $wheel names no CPython" >&2; exit 1; }
version=3.${BASH_REMATCH[1]}
python=$(PYTHONPATH="$here/../.." "${PYTHON:-python3}" -c \
    'import build_wheels, sys; print(build_wheels.find_python(sys.argv[1]) or "")' "$version")
[[ -n $python ]] || { echo "check_wheel.sh: no python$version is here for $1" >&2; exit 1; }
torch=${2:-newest}
case $torch in
    newest) want=torch ;;
    oldest) want=torch==2.6.0 ;;
    *) want=torch==$torch ;;
esac
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m venv "$work/venv"
cd "$work"
echo "== $(basename "$wheel") with $want in an empty environment"
venv/bin/python -m pip install -q "$wheel" "$want"
venv/bin/python "$here/known_answers.py" cpu
venv/bin/fastproj info
