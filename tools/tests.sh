#!/usr/bin/env bash
# All tests and docstring examples, and one summary; arguments go to pytest. Two lines of processes, a core each. Triton
# decides when it is imported whether it interprets kernels or compiles them: tests of what it compiles have a process
# of their own, before those of benchmarks and of what compilers make; both are shown after the others.
# VENV: the environment to test in, .venv otherwise.
cd "$(dirname "$0")/.." || exit 1
python=${VENV:-.venv}/bin/python
logs=$(mktemp -d)
[ -t 1 ] && color=yes || color=no
passed() { [ "$1" -eq 0 ] || [ "$1" -eq 5 ]; } # 5: arguments that leave no test of this process
elsewhere=(tests/benchmarks tests/csrc tests/ptx)

others() {
  local failed=0
  HOPE_KERNELS_PTX=1 "$python" -m pytest --color=$color tests/ptx/triton "$@" >"$logs/ptx" 2>&1
  passed $? || failed=1
  "$python" -m pytest --color=$color "${elsewhere[@]}" "$@" >"$logs/more" 2>&1
  passed $? || failed=1
  return $failed
}

others "$@" & others=$!
trap 'kill $others 2>/dev/null; rm -rf "$logs"' EXIT
failed=0
"$python" -m pytest --color=$color "${elsewhere[@]/#/--ignore=}" "$@" 2>&1 | tee "$logs/tests"
passed "${PIPESTATUS[0]}" || failed=1
wait $others || failed=1
cat "$logs/more" "$logs/ptx"
echo "tests: $(tail -n 1 "$logs/tests")"
echo "benchmarks, compilers: $(tail -n 1 "$logs/more")"
echo "Triton's kernels as PTX: $(tail -n 1 "$logs/ptx")"
exit $failed
