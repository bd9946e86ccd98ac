#!/usr/bin/env bash
# Make .venv ready for the demo and the tests; does nothing when it already is.
#
#   tools/venv.sh [PYTHON]      PYTHON: the interpreter to build on (default python3)
#
# A torch >= 2.11 that PYTHON already has is used as it is, whatever CUDA it was built for. Otherwise TORCH is
# installed.
# .venv/stamp is written last and removed first, so its absence means an interrupted run: start over.
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH="torch==2.13.0"
TRITON="triton==3.6.0"  # a CUDA build of torch brings its own
# Tests compare with it; its dependencies (datasets, an old huggingface-hub) are not needed.
ORACLE="nested-learning==0.2.0"
PYTHON=${1:-python3}

# Of everything an installation depends on; of the CUDA sources where their library is asked for, or was built.
key() {
    {
        pwd -P
        cat tools/venv.sh requirements-dev.txt pyproject.toml setup.py csrc/cpu/*
        if [ "${HOPE_KERNELS_CUDA:-}" = 1 ] || [ -e hope_kernels/_hope_cuda.so ]; then
            cat tools/build_cuda.py $(find csrc/cuda -type f | sort)
        fi
    } | cksum
}
if [ -x .venv/bin/python ] && [ "$(cat .venv/stamp 2>/dev/null)" = "$(key)" ]; then exit 0; fi

has_torch() {  # $1: an interpreter. Prints the folder its torch >= 2.11 lies in, or fails.
    "$1" - 2>/dev/null <<'PY'
import pathlib, torch
assert tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 11)
print(pathlib.Path(torch.__file__).parents[1])
PY
}

pip() {  # the venv's pip, or PYTHON's where the system splits ensurepip off into a package of its own
    if .venv/bin/python -m pip --version >/dev/null 2>&1; then
        .venv/bin/python -m pip --disable-pip-version-check "$@"
    else
        "$PYTHON" -m pip --python .venv/bin/python --disable-pip-version-check "$@"
    fi
}

create() {  # "$@": options of venv
    rm -rf .venv
    "$PYTHON" -m venv "$@" .venv || { rm -rf .venv; "$PYTHON" -m venv --without-pip "$@" .venv; }
}

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "$PYTHON is no Python >= 3.11; choose one: make PYTHON=python3.11" >&2; exit 1; }

if [ -x .venv/bin/python ] && [ -s .venv/stamp ] && has_torch .venv/bin/python >/dev/null; then
    rm .venv/stamp  # complete, but the requirements have changed
elif site=$(has_torch "$PYTHON"); then
    echo "using the torch in $site"
    create --system-site-packages
    # PYTHON is itself in a venv: --system-site-packages shows the packages of the Python that venv was made from,
    # not its own.
    has_torch .venv/bin/python >/dev/null ||
        echo "$site" >"$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer_venv.pth"
else
    create
fi
echo "installing the pinned packages"
if grep -q 'include-system-site-packages = false' .venv/pyvenv.cfg; then
    pip install --quiet --no-compile "$TORCH"  # byte code for all of torch would take longer than its installation
fi
pip install --quiet --no-warn-conflicts -r requirements-dev.txt  # no word on what the oracle lacks
pip install --quiet --no-deps "$ORACLE"
if [ "$(uname)" = Linux ] && ! .venv/bin/python -c 'import triton' 2>/dev/null; then
    pip install --quiet --no-deps "$TRITON"
fi
pip install --quiet --no-deps --no-build-isolation -e .
key >.venv/stamp
