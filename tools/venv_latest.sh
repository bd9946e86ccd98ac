#!/usr/bin/env bash
# Make .venv-latest: the newest PyTorch, NumPy and Triton that pip finds, the rest as .venv has it.
#
#   tools/venv_latest.sh [PYTHON]      PYTHON: the interpreter to build on (default python3)
#
# What pip finds is asked anew every time. A PyTorch for CUDA brings its own Triton, and several GB.
set -euo pipefail
cd "$(dirname "$0")/.."
eval "$(grep '^ORACLE=' tools/venv.sh)"
venv=.venv-latest

if [ ! -x $venv/bin/python ]; then "${1:-python3}" -m venv $venv; fi
pip() { $venv/bin/python -m pip --disable-pip-version-check install --quiet "$@"; }

pip --no-compile --upgrade torch numpy -r <(grep -v '^numpy' requirements-dev.txt)
$venv/bin/python -c 'from importlib.metadata import requires as r; exit(not any("triton" in x for x in r("torch")))' ||
    pip --upgrade --no-deps triton
pip --no-deps "$ORACLE"
pip --no-deps --no-build-isolation -e .
$venv/bin/python -c 'import importlib.metadata as m
print(*(f"{d.name} {d.version}" for n in ("torch", "triton", "numpy") for d in m.distributions(name=n)), sep=", ")'
