// segment_run.h for sixteen floats at a time: see titans_avx512.cpp.

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
#include "cms.h"
#include "cms_whole.h"
#include "gates.h"
#include "layer.h"
#include "segment.h"
#include "width.h"

#ifdef HOPE_AVX512
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq")
#define HOPE_WIDE
#endif

namespace avx512 {
namespace code {
#include "segment_run.h"
}  // namespace code

void segment_read(const SegmentCall& c) { code::segment_read(c); }
void segment_head(const SegmentCall& c) { code::segment_head(c); }
void segment_learn(const SegmentCall& c) { code::segment_learn(c); }
}  // namespace avx512
