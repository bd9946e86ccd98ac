// What the entry point of attention.h checks, and the choice of vectors (width.h).

#include "attention.h"

#include <cmath>
#include <new>

#include "attention_run.h"
#include "width.h"

namespace avx512 {  // attention_avx512.cpp
void attention(const AttentionCall& c);
}  // namespace avx512

bool attention_fits(const AttentionCall& c) {
  if (!extents({c.B, c.T, c.H, c.D}) || !extents({c.B, c.slots, c.Hkv, c.D}) || c.Hkv < 1 || c.H < 1 || c.D < 1 ||
      c.H % c.Hkv || c.window < 0 || c.window > LARGEST || c.sinks < 0 || c.sinks > LARGEST ||
      (c.sinks && !c.window) || !threads_fit(c.threads) || !std::isfinite(c.scale))
    return false;
  if (c.B * c.T == 0) return true;
  if (!all_given({c.q, c.used, c.base, c.len, c.y})) return false;
  for (int64_t b = 0; b < c.B; b++)
    if (c.len[b] < 0 || c.len[b] > c.T || c.used[b] < 0 || c.used[b] > c.slots - c.len[b] || c.base[b] < 0 ||
        c.base[b] > INT64_MAX / 4 || (c.len[b] && !all_given({c.k, c.v})))
      return false;
  return true;
}

extern "C" int hope_attention(const AttentionCall* call) try {
  if (!call || !attention_fits(*call)) return BAD_ARGUMENT;
  wide() ? avx512::attention(*call) : Attention(*call).run();
  return DONE;
} catch (const std::bad_alloc&) {
  return NO_MEMORY;
}
