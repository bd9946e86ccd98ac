// What the entry points of attention.h check, and the choice of vectors (width.h).

#include "attention_call.h"

#include <cmath>
#include <new>

#include "attention_backward.h"
#include "attention_run.h"
#include "width.h"

namespace avx512 {  // attention_avx512.cpp
void attention(const AttentionCall& c);
void attention_task(const AttentionCall& c, int64_t i, float* work);
void attention_backward(const AttentionBackward& a);
}  // namespace avx512

bool attention_sizes_fit(const AttentionCall& c) {
  return extents({c.B, c.T, c.H, c.D}) && extents({c.B, c.slots, c.Hkv, c.D}) && c.Hkv > 0 && c.H > 0 && c.D > 0 &&
         c.H % c.Hkv == 0 && extent(c.window) && extent(c.sinks) &&
         (!c.sinks || c.window) && std::isfinite(c.scale);
}

bool attention_rows_fit(const AttentionCall& c) {
  for (int64_t b = 0; b < c.B; b++)
    if (c.len[b] < 0 || c.len[b] > c.T || c.used[b] < 0 || c.used[b] > c.slots - c.len[b] || c.base[b] < 0 ||
        c.base[b] > INT64_MAX / 4)
      return false;
  return true;
}

int64_t attention_tasks(const AttentionCall& c) { return Attention(c).tasks(); }
int64_t attention_floats(const AttentionCall& c) { return Attention(c).floats(); }
void attention_task(const AttentionCall& c, int64_t i, float* work) {
  wide() ? avx512::attention_task(c, i, work) : Attention(c).task(i, work);
}

bool attention_fits(const AttentionCall& c) {
  if (!attention_sizes_fit(c) || !threads_fit(c.threads)) return false;
  if (c.B * c.T == 0) return true;
  if (!all_given({c.q, c.used, c.base, c.len, c.y}) || !attention_rows_fit(c)) return false;
  for (int64_t b = 0; b < c.B; b++)
    if (c.len[b] && !all_given({c.k, c.v})) return false;
  return true;
}

extern "C" int hope_attention(const AttentionCall* call) try {
  if (!call || !attention_fits(*call)) return BAD_ARGUMENT;
  wide() ? avx512::attention(*call) : Attention(*call).run();
  return DONE;
} catch (const std::bad_alloc&) {
  return NO_MEMORY;
}

extern "C" int hope_attention_backward(const AttentionBackward* a) try {
  if (!a || !attention_fits(a->call) || !a->dfar != !a->call.sinks) return BAD_ARGUMENT;
  const AttentionCall& c = a->call;
  if (c.B * c.T == 0) return DONE;
  if (!all_given({c.most, c.sum, a->dy, a->dq, a->dk, a->dv})) return BAD_ARGUMENT;
  wide() ? avx512::attention_backward(*a) : AttentionGradient(*a).run();
  return DONE;
} catch (const std::bad_alloc&) {
  return NO_MEMORY;
}
