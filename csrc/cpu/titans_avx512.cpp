// titans_heads.h for sixteen floats at a time, in a namespace of its own, for run time to choose (width.h).
//
// What is included before the pragma is compiled for AVX2 like everything else: a function of the standard library
// that the linker finds in several files must not be one with AVX-512 in it.

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
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>
#include <thread>
#include <type_traits>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "call.h"
#include "check.h"
#include "gates.h"
#include "width.h"

#ifdef HOPE_AVX512  // else this is the same code once more, and nobody calls it
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq")
#define HOPE_WIDE
#endif

namespace avx512 {
namespace code {
#include "titans_heads.h"
#include "titans_backward.h"
}  // namespace code

void all_heads(const TitansCall& c) { code::all_heads(c); }

void all_heads_backward(const TitansBackward& a) { code::all_heads_backward(a); }

void commit_open(const TitansCall& c, int64_t b, int64_t h, int64_t end, float* scratch, float* own) {
  code::commit_open(c, b, h, end, scratch, own);
}
}  // namespace avx512
