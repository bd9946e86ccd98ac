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

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "check.h"
#include "titans_scan.h"

namespace {

void scan(const TitansCall& c, const Workspace& work, const Team& team, float* mine, int64_t b, int64_t h) {
  Scan s(c, work, team, mine);
  switch (c.activation) {
    case GELU: return s.run<GELU>(b, h);
    case SILU: return s.run<SILU>(b, h);
    default: return s.run<GELU_TANH>(b, h);
  }
}

void all_heads(const TitansCall& c) {
  const int64_t groups = c.B * c.H;
  Workspace sizes;
  const int64_t floats = sizes.carve(c, nullptr);
  const int threads = static_cast<int>(c.threads);
  const bool together = groups < threads;  // all threads on one (row, head), or one on each
  const int works = together ? 1 : threads;
  Memory memory(floats > MOST_FLOATS ? floats : floats * works);
  std::vector<Workspace> work(works);
  for (int i = 0; i < works; i++) work[i].carve(c, memory.data + i * floats);
  // every thread's own floats are asked for here, since an exception must not leave the parallel region;
  // pages come as they are touched
  const int64_t own = Head::own_floats(c);
  const std::unique_ptr<float, void (*)(void*)> mine(
      static_cast<float*>(std::calloc(own * threads, sizeof(float))), std::free);
  if (!mine) throw std::bad_alloc();
  Barrier barrier;
  in_parallel(threads, [&](int id, int n) {
    const FlushDenormals guard;
    const Team team = together ? Team{id, n, &barrier} : Team{0, 1, nullptr};
    for (int64_t i = together ? 0 : id; i < groups; i += together ? 1 : n) {
      scan(c, work[together ? 0 : id], team, mine.get() + id * own, i / c.H, i % c.H);
    }
  });
}

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

extern "C" int hope_titans_abi() { return 6; }

extern "C" int hope_titans_supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

extern "C" int hope_titans_scan(const TitansCall* call) {
  if (!call || !sizes_fit(*call)) return BAD_ARGUMENT;
  if (call->B * call->T == 0) return DONE;
  if (!pointers_fit(*call)) return BAD_ARGUMENT;
  try {
    all_heads(*call);
    return DONE;
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  }
}
