#include "width.h"

#include <atomic>

namespace {

#if defined(__aarch64__)
constexpr int NARROW = 128;
#else
constexpr int NARROW = 256;
#endif

int widest() {
#ifdef HOPE_AVX512
  const bool all = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                   __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  return all ? 512 : NARROW;
#else
  return NARROW;
#endif
}

std::atomic<int> bits{0};  // 0: nobody has asked yet

}  // namespace

bool wide() {
  int now = bits.load(std::memory_order_relaxed);
  if (!now) bits.store(now = widest(), std::memory_order_relaxed);
  return now == 512;
}

extern "C" int hope_cpu_width(int asked) {
  if (asked == NARROW || (asked == 512 && widest() == 512)) bits.store(asked, std::memory_order_relaxed);
  return wide() ? 512 : NARROW;
}
