// Whether the sizes and pointers of a call of the memory fit each other (check.h).
#pragma once
#include <algorithm>

#include "call.h"
#include "check.h"
#include "vec.h"

inline bool sizes_fit(const TitansCall& c) {
  const int64_t big = std::max(c.chunk_memory, c.chunk_other);
  const int64_t small = std::min(c.chunk_memory, c.chunk_other);
  const int64_t scalars = c.self_modifying ? 1 + (c.retention != 0) : 0;
  return width(c.D) && width(c.N) && c.H > 0 && c.Mf == (c.self_modifying ? 3 : 1) && c.Ms == scalars &&
         small > 0 && big <= LARGEST && big % small == 0 && extents({c.B, c.T, c.H, c.D}) &&
         extents({c.B, c.H, c.Mf + c.Ms, c.N + 1, c.D}) && extents({c.B, big, c.H, c.D}) &&
         extents({c.B, c.H, c.kept, c.N, c.D}) && extents({big, c.Mf + c.Ms, c.N + 1}) &&
         threads_fit(c.threads) && c.activation >= GELU_TANH && c.activation <= SILU;
}

// for a call that has tokens
inline bool pointers_fit(const TitansCall& c) {
  if (!all_given({c.delta2, c.delta1, c.q, c.pos, c.len, c.pending_k, c.pending_v, c.pending_eta}))
    return false;
  if ((c.Ms && !c.delta1s) || !c.base2 != !c.base1 || !(c.base2 && c.Ms) != !c.base1s || !c.kept2 != !c.kept1)
    return false;
  if (!c.s2 != !c.s1 || !(c.s2 && c.Ms) != !c.s1s || !c.s2 != !c.pending_beta || (c.update && !c.s2 != !c.beta))
    return false;
  if (!rows_fit(c.B, c.T, c.pos, c.len)) return false;
  if (c.kept2 && !(c.update ? kept_fit(c.B, c.kept, c.chunk_memory, c.pos, c.len) : c.kept > 0)) return false;
  if (c.span < 0 || (c.span && c.span % std::max(c.chunk_memory, c.chunk_other))) return false;
  return !c.update || (c.self_modifying ? c.x != nullptr : all_given({c.k, c.v, c.eta}));
}

// for a call that keeps spans, or has kept them
inline bool spans_fit(const TitansCall& c) {
  if (!c.span || !c.update) return true;
  const int64_t big = std::max(c.chunk_memory, c.chunk_other);
  for (int64_t b = 0; b < c.B; b++)
    if (c.len[b] && (c.pos[b] % big + c.len[b] - 1) / c.span > c.spans) return false;
  return extents({c.B, c.H, c.spans, c.Mf + c.Ms, c.N + 1, c.D}) &&
         (c.spans == 0 || (all_given({c.spans2, c.spans1}) && (!c.Ms || c.spans1s))) &&
         (!c.self_modifying || (all_given({c.made_k, c.made_v, c.made_eta, c.made_size}) &&
                                !c.made_alpha == !c.retention));
}
