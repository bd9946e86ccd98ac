// The self-modifying memory on a CPU: a whole call in one pass per (row, head), fp32.
//
// What is computed: hope_kernels/ops/titans/README.md. Without momentum a chunk's update is of rank C, with
// gamma[t,s] = prod_{s<j<=t} alpha_j:
//
//     Kg_s = gamma[C,s] k_s - sum_{t>s} gamma[t-1,s] (k_t.k_s) eta_t Kg_t               back substitution
//     delta2 <- gamma[C,0] delta2 - U^T Kg,   U_t = gain_t d_t + eta_t gamma[t-1,0] delta2 k_t
//     delta1 <- gamma[C,0] delta1 - sum_t gain_t gamma[C,t] e_t a_t^T
//
// With it: titans_momentum.h. Linear memories, which have no delta1 and whose d is e: titans_linear.h.
//
// Schedule: stages (titans_read.h; titans_commit.h with titans_clock.h and titans_update.h), each a product over rows
// of weights that the threads of a team share out, with barriers between them. A thread owns whole rows, never a part
// of a sum: every number is one chain of operations whose order follows from shapes and the token's place in its chunk.
// So results are bit-identical for any number of threads, any split of the sequence, any company in the batch. Where
// there are at least as many (row, head) as threads, each team is one thread.
//
// At most 64 D N + 3 C D FLOPs a token and head; 70 D N with target norms, 80 with deviations kept beside a
// base as well. The weights stream from L2 or L3 once per product; a tile reuses each for 16 tokens, so
// that the FMA units are the limit.

#include <new>

#include "titans_check.h"
#include "titans_heads.h"
#include "width.h"

extern "C" int hope_titans_abi() { return 23; }

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
  if (!call->o || !pointers_fit(*call) || !spans_fit(*call)) return BAD_ARGUMENT;
  try {
    wide() ? avx512::all_heads(*call) : all_heads(*call);
    return DONE;
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  }
}
