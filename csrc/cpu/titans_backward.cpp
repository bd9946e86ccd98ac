// The memory's gradient on a CPU: what training calls after hope_titans_scan has kept its spans. Derived in
// hope_kernels/ops/titans/BACKWARD.md; scheduled in titans_backward.h. One thread does a (row, head) from its
// last token to its first, so nothing depends on how many there are.
#include <new>

#include "titans_backward.h"
#include "titans_check.h"
#include "width.h"

namespace {

bool fits(const TitansBackward& a) {
  const TitansCall& c = a.call;
  if (!sizes_fit(c) || !pointers_fit(c) || c.s2 || !c.N || adaptive_q(c)) return false;
  if (c.span == 0 || !extent(c.span) || !spans_fit(c) ||
      !extents({c.span / std::min(c.chunk_memory, c.chunk_other) + 1, c.Mf + c.Ms, 2 * c.N + 1, c.D}))
    return false;
  if (!all_given({a.o_bar, a.delta2_bar, a.delta1_bar, a.q_bar}) || (c.Ms && !a.delta1s_bar) ||
      !c.base2 != !a.base2_bar || !c.base1 != !a.base1_bar || !c.base1s != !a.base1s_bar)
    return false;
  if (!c.update) return true;
  if (!all_given({a.pending_k_bar, a.pending_v_bar, a.pending_eta_bar}) ||
      !c.pending_alpha != !a.pending_alpha_bar)
    return false;
  return c.self_modifying ? a.x_bar != nullptr
                          : all_given({a.k_bar, a.v_bar, a.eta_bar}) && !c.alpha == !a.alpha_bar;
}

}  // namespace

extern "C" int hope_titans_backward(const TitansBackward* call) {
  if (!call || !sizes_fit(call->call)) return BAD_ARGUMENT;
  if (call->call.B * call->call.T == 0) return DONE;
  if (!fits(*call)) return BAD_ARGUMENT;
  try {
    wide() ? avx512::all_heads_backward(*call) : all_heads_backward(*call);
    return DONE;
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  }
}
