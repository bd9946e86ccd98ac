// newton_schulz.h for sixteen floats at a time: see titans_avx512.cpp.

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
#include <thread>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "width.h"

#ifdef HOPE_AVX512
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq")
#define HOPE_WIDE
#endif

namespace avx512 {
namespace code {
#include "newton_schulz.h"
}  // namespace code

void newton_schulz(int64_t r, int64_t c, int64_t team, const float* from, float norm, float* to, float* work) {
  code::NewtonSchulz(r, c).run(team, from, norm, to, work);
}
}  // namespace avx512
