// Whether the sizes and pointers of a call of the memory fit each other (check.h).
#pragma once
#include <algorithm>

#include "call.h"
#include "check.h"
#include "vec.h"

// Of memories, whoever reads them: their kinds, widths and chunks.
inline bool memory_sizes_fit(const TitansCall& c) {
  if (!width(c.D) || (c.N == 0 ? c.scalar_skip : !width(c.N))) return false;
  const int64_t big = std::max(c.chunk_memory, c.chunk_other), small = std::min(c.chunk_memory, c.chunk_other);
  const int64_t scalars = c.self_modifying ? 1 + (c.retention != 0) : 0, units = std::max(c.N, c.D) + 1;
  return c.H > 0 && (c.self_modifying ? c.Mf == 3 || c.Mf == 4 : c.Mf == 1) && c.Ms == scalars && small > 0 &&
         big % small == 0 && extents({big, big, 2}) && extents({c.B, c.H, c.Mf + c.Ms, units, c.D}) &&
         extents({c.B, big, c.H, c.D}) && extents({big, c.Mf + c.Ms, units}) && c.activation >= GELU_TANH &&
         c.activation <= SILU;
}

inline bool sizes_fit(const TitansCall& c) {
  return memory_sizes_fit(c) && extents({c.B, c.T, c.H, c.D}) && extents({c.B, c.H, c.kept, memory_rows(c), c.D}) &&
         extents({c.B, c.H, c.kept_q, memory_rows(c), c.D}) && threads_fit(c.threads);
}

// w2, w1 and w1s: those that a call with w2 has, and no others.
inline bool weights_fit(const TitansCall& c, const float* w2, const float* w1, const float* w1s) {
  return !(w2 && c.N) == !w1 && !(w2 && c.N && c.Ms) == !w1s;
}

// Weights that a call keeps for a gradient: of `kept` chunks.
inline bool kept_weights_fit(const TitansCall& c, int64_t kept, int64_t chunk) {
  return c.update ? kept_fit(c.B, kept, chunk, c.pos, c.len) : kept > 0;
}

// for a call that has tokens
inline bool pointers_fit(const TitansCall& c) {
  const bool adaptive = adaptive_q(c), queries = adaptive && c.kept2;
  if (!all_given({c.delta2, c.pos, c.len, c.pending_k, c.pending_v, c.pending_eta}) || !c.q != adaptive) return false;
  if (!weights_fit(c, c.delta2, c.delta1, c.delta1s) || !weights_fit(c, c.base2, c.base1, c.base1s) ||
      !weights_fit(c, c.s2, c.s1, c.s1s) || !(c.kept2 && c.N) != !c.kept1)
    return false;
  if (!c.s2 != !c.pending_beta || (c.update && !c.s2 != !c.beta) || !rows_fit(c.B, c.T, c.pos, c.len)) return false;
  if (c.kept2 ? !kept_weights_fit(c, c.kept, c.chunk_memory) : c.kept != 0) return false;
  if (!c.kept_q2 != !queries || !(queries && c.N) != !c.kept_q1 || !c.made_q != !queries ||
      (queries && !kept_weights_fit(c, c.kept_q, c.chunk_other)))
    return false;
  if (c.span < 0 || (c.span && c.span % std::max(c.chunk_memory, c.chunk_other))) return false;
  if (adaptive && !c.x) return false;
  return !c.update || (c.self_modifying ? c.x != nullptr : all_given({c.k, c.v, c.eta}));
}

// for a call that keeps spans, or has kept them
inline bool spans_fit(const TitansCall& c) {
  if (!c.span || !c.update) return true;
  const int64_t big = std::max(c.chunk_memory, c.chunk_other);
  for (int64_t b = 0; b < c.B; b++)
    if (c.len[b] && (c.pos[b] % big + c.len[b] - 1) / c.span > c.spans) return false;
  return extents({c.B, c.H, c.spans, c.Mf + c.Ms, std::max(c.N, c.D) + 1, c.D}) &&
         (c.spans == 0 || (c.spans2 && weights_fit(c, c.spans2, c.spans1, c.spans1s))) &&
         (!c.self_modifying || (all_given({c.made_k, c.made_v, c.made_eta, c.made_size}) &&
                                !c.made_alpha == !c.retention));
}
