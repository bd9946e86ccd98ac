#!/usr/bin/env bash
# All tests and docstring examples, and one summary; arguments go to pytest. Triton decides when it is imported whether
# it interprets kernels or compiles them: tests of what it compiles have a process of their own, beside the others,
# and are shown after them.
# VENV: the environment to test in, .venv otherwise.
cd "$(dirname "$0")/.." || exit 1
python=${VENV:-.venv}/bin/python
logs=$(mktemp -d)
[ -t 1 ] && color=yes || color=no
passed() { [ "$1" -eq 0 ] || [ "$1" -eq 5 ]; } # 5: arguments that leave no test of this process

HOPE_KERNELS_PTX=1 "$python" -m pytest --color=$color tests/ptx/triton "$@" >"$logs/ptx" 2>&1 & ptx=$!
trap 'kill $ptx 2>/dev/null; rm -rf "$logs"' EXIT
failed=0
"$python" -m pytest --color=$color "$@" 2>&1 | tee "$logs/tests"
passed "${PIPESTATUS[0]}" || failed=1
wait $ptx
passed $? || failed=1
cat "$logs/ptx"
echo "tests: $(tail -n 1 "$logs/tests")"
echo "Triton's kernels as PTX: $(tail -n 1 "$logs/ptx")"
exit $failed
