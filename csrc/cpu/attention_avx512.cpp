// attention_run.h for sixteen floats at a time: see titans_avx512.cpp.

#if defined(__aarch64__)
#include <arm_neon.h>
#else
#include <immintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "attention.h"
#include "check.h"
#include "width.h"

#ifdef HOPE_AVX512
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq")
#define HOPE_WIDE
#endif

namespace avx512 {
namespace code {
#include "attention_run.h"
#include "attention_backward.h"
}  // namespace code

void attention(const AttentionCall& c) { code::Attention(c).run(); }
void attention_task(const AttentionCall& c, int64_t i, float* work) { code::Attention(c).task(i, work); }
void attention_backward(const AttentionBackward& a) { code::AttentionGradient(a).run(); }
}  // namespace avx512
