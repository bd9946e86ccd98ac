#include "width.h"

#include <atomic>

namespace {

int widest() {
#ifdef __clang__  // titans_avx512.cpp
  return 256;
#else
  const bool all = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                   __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  return all ? 512 : 256;
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
  if (asked == 256 || (asked == 512 && widest() == 512)) bits.store(asked, std::memory_order_relaxed);
  return wide() ? 512 : 256;
}
