// A work space of floats: zeroed, from the start of a cache line.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "check.h"

struct AlignedFloats {
  float* data;

  // `count` parts of `floats` each
  explicit AlignedFloats(int64_t floats, int64_t count = 1) {
    if (floats > MOST_FLOATS / std::max<int64_t>(count, 1)) throw std::bad_alloc();
    const size_t bytes = floats * count * sizeof(float);
    data = static_cast<float*>(std::aligned_alloc(64, bytes / 64 * 64 + 64));
    if (!data) throw std::bad_alloc();
    std::memset(data, 0, bytes);
  }
  ~AlignedFloats() { std::free(data); }
  AlignedFloats(const AlignedFloats&) = delete;
  AlignedFloats& operator=(const AlignedFloats&) = delete;
};
