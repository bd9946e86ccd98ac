#!/usr/bin/env bash
# All tests and docstring examples, and one summary; arguments go to pytest. Triton decides when it is imported whether
# it interprets kernels or compiles them: tests of what it compiles have a process of their own.
cd "$(dirname "$0")/.." || exit 1
log=$(mktemp)
trap 'rm -f "$log"' EXIT
failed=0 summary=()
[ -t 1 ] && color=yes || color=no

run() {
  local name=$1
  shift
  .venv/bin/python -m pytest --color=$color "$@" 2>&1 | tee "$log"
  case ${PIPESTATUS[0]} in 0 | 5) ;; *) failed=1 ;; esac # 5: arguments that leave no test of this process
  summary+=("$name: $(tail -n 1 "$log")")
}

run "tests" "$@"
HOPE_KERNELS_PTX=1 run "Triton's kernels as PTX" tests/ptx/triton "$@"
printf '%s\n' "${summary[@]}"
exit $failed
