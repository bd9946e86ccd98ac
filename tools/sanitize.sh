#!/usr/bin/env bash
# Builds the C++ of csrc/cpu under GCC's or Clang's sanitizers and runs its tests. Any report is a failure.
#
#   tools/sanitize.sh memory [PYTHON]    addresses and undefined behaviour, under the Python tests of the library
#   tools/sanitize.sh files [PYTHON]     the same under 100,000 damaged files of states; those that load go on reading
#   tools/sanitize.sh races              data races between the threads of a call, under tests/csrc/races.cpp
set -euo pipefail
cd "$(dirname "$0")/.."
compiler=${CXX:-g++}
flags=(-std=c++17 -O1 -g -mavx2 -mfma -ffp-contract=off -fno-omit-frame-pointer -Wno-ignored-attributes -Icsrc/cpu)
mkdir -p build/sanitized

case "$1" in
races)
  # OpenMP's own threads are not instrumented: a call starts threads of the standard library instead
  "$compiler" "${flags[@]}" -DHOPE_STD_THREADS -fsanitize=thread tests/csrc/races.cpp \
    csrc/cpu/{titans*,token,attention,attention_avx512,width,cms_whole*}.cpp -pthread -o build/sanitized/races
  build/sanitized/races
  ;;
memory | files)
  library=$PWD/build/sanitized/_titans_cpu.so
  "$compiler" "${flags[@]}" -fopenmp -fPIC -shared -fsanitize=address,undefined -fno-sanitize-recover=all \
    csrc/cpu/*.cpp -o "$library"
  tests=(tests/ops/titans/test_cpp{,_backward,_training}.py tests/ops/cms/test_{cpp,cpp_step,cpp_whole,precondition}.py
    tests/ops/test_cpp_training.py tests/ops/{attention/test_attention{,_backward},linear/test_linear}.py
    tests/state/test_identity.py tests/layers/test_{titans_cpp,bits,attention_bits}.py
    tests/engine/test_native{,_segment,_attention,_attention_step}.py tests/engine/test_{attention_segment,segment_levels}.py
    tests/engine/test_{streaming_bits,sampling,read_off,changes_between_steps}.py
    tests/csrc/test_native_arguments.py tests/csrc/test_width.py)
  if [ "$1" = files ]; then tests=(tests/state/test_files.py -m slow); fi
  # Python and PyTorch leak by design, and are not instrumented themselves
  LD_PRELOAD=$("$compiler" -print-file-name=libasan.so):$("$compiler" -print-file-name=libubsan.so) \
    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 HOPE_KERNELS_TEST_LIBRARY=$library \
    HOPE_KERNELS_TEST_SEED=0 HOPE_KERNELS_TEST_FILES=100000 \
    "${2:-python3}" -m pytest -q -s -p no:cacheprovider "${tests[@]}"
  ;;
*)
  echo "usage: tools/sanitize.sh memory [PYTHON] | files [PYTHON] | races" >&2
  exit 2
  ;;
esac
