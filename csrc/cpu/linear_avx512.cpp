// linear_run.h for sixteen floats at a time: see titans_avx512.cpp.

#if defined(__aarch64__)
#include <arm_neon.h>
#else
#include <immintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <thread>
#include <type_traits>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "check.h"
#include "linear.h"
#include "width.h"

#ifdef HOPE_AVX512
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq")
#define HOPE_WIDE
#endif

namespace avx512 {
namespace code {
#include "linear_run.h"
}  // namespace code

void linear(int64_t n, int64_t K, int64_t R, int64_t threads, const float* x, const float* W, const float* more,
            float* y) {
  code::Linear(n, K, R, x, W, more, y).run(threads);
}
}  // namespace avx512
