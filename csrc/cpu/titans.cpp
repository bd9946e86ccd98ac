// The self-modifying memory on a CPU: a whole call in one pass per (row, head), fp32, AVX2.
//
// What is computed: hope_kernels/ops/titans/README.md. Without momentum a chunk's update is of rank C, with
// gamma[t,s] = prod_{s<j<=t} alpha_j:
//
//     Kg_s = gamma[C,s] k_s - sum_{t>s} gamma[t-1,s] (k_t.k_s) eta_t Kg_t               back substitution
//     delta2 <- gamma[C,0] delta2 - U^T Kg,   U_t = gain_t d_t + eta_t gamma[t-1,0] delta2 k_t
//     delta1 <- gamma[C,0] delta1 - sum_t gain_t gamma[C,t] e_t a_t^T
//
// Schedule: stages (titans_read.h, titans_commit.h), each a product over rows of weights that the threads of
// a team share out, with barriers between them. A thread owns whole rows, never a part of a sum: every number
// is one chain of operations whose order follows from shapes and the token's place in its chunk. So results
// are bit-identical for any number of threads, any split of the sequence, any company in the batch. Where
// there are at least as many (row, head) as threads, each team is one thread.
//
// At most 64 D N + 3 C D FLOPs a token and head; 70 D N with target norms, 80 with deviations kept beside a
// base as well. The weights stream from L2 or L3 once per product; a tile reuses each for 16 tokens, so
// that the FMA units are the limit.

#include <new>

#include "check.h"
#include "titans_heads.h"
#include "width.h"

namespace {

bool sizes_fit(const TitansCall& c) {
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
bool pointers_fit(const TitansCall& c) {
  if (!all_given({c.delta2, c.delta1, c.q, c.o, c.pos, c.len, c.pending_k, c.pending_v, c.pending_eta}))
    return false;
  if ((c.Ms && !c.delta1s) || !c.base2 != !c.base1 || !(c.base2 && c.Ms) != !c.base1s || !c.kept2 != !c.kept1)
    return false;
  if (!rows_fit(c.B, c.T, c.pos, c.len)) return false;
  if (c.kept2 && !(c.update ? kept_fit(c.B, c.kept, c.chunk_memory, c.pos, c.len) : c.kept > 0)) return false;
  return !c.update || (c.self_modifying ? c.x != nullptr : all_given({c.k, c.v, c.eta}));
}

}  // namespace

extern "C" int hope_titans_abi() { return 8; }

extern "C" int hope_titans_supported() {
#if defined(__aarch64__)
  return 1;
#else
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
}

extern "C" int hope_titans_scan(const TitansCall* call) {
  if (!call || !sizes_fit(*call)) return BAD_ARGUMENT;
  if (call->B * call->T == 0) return DONE;
  if (!pointers_fit(*call)) return BAD_ARGUMENT;
  try {
    wide() ? avx512::all_heads(*call) : all_heads(*call);
    return DONE;
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  }
}
