// What commits by warpgroups serve, and where their data lies: heads of width 64 with 64 or 256 hidden units,
// chunks of 64 tokens, bf16, on compute capability 9.0, with sigma of one tanh or exponential (registers are
// too few for an exact gelu). Calls that only read take the kernels of ../prefill.cuh. One block a (row, head), or
// four, owned as in ../plan.h.
//
// Beside what ../plan.h has, a block keeps one kind of matrix in shared memory for several uses:
//     w1      [8 columns of D][units][8]       rounded: operand of M(x) of all warps, and of each one's gradients
//     a, at_v [8 columns of tokens][units][8]  sigma of the chunk's keys and values: operand of M(k) and M(v); a
//                                              also of the update
// N = 256: a memory with D outputs fills a block, 256 units. Blocks of eta and alpha have twice the units and no w1,
// no errors with D numbers, no at_v. N = 64: the units of all memories, one after another, 64 each: 192 in w1 and
// at_v, 320 in a.
#pragma once
#include "../plan.h"

namespace hope {

inline bool by_warpgroups(const TitansParams& p, int D, bool bf16, const Device& device) {
  return device.capability == 90 && device.image == 90 && D == 64 && (p.N == 64 || p.N == 256) && p.C == 64 && bf16 &&
         p.activation != kGelu && (p.flags & kUpdate);
}

constexpr Plan make_warpgroup_plan(int N, bool retention) {
  Plan p{};
  const bool one_block = N == 64;
  p.blocks = one_block ? 1 : 4, p.shards = 1, p.memories = retention ? 5 : 4;
  p.full_warps = N / 32, p.scalar_warps = p.full_warps / 2;
  constexpr int C = 64, D = 64, tile = 8 * (C * 16 + 16), panels = C / kPanel, inputs = 2 * kPanel * (D + 8) * 2;
  int at = 0;
  auto take = [&](int bytes) {
    int here = at;
    at += (bytes + 127) / 128 * 128;
    return here;
  };
  // Of each warp, but used by those of scalar memories alone.
  const int first_scalar = one_block ? 3 * p.full_warps : 0;
  auto take_scalar = [&](int bytes) { return take((kWarps - first_scalar) * bytes) - first_scalar * bytes; };
  p.call = take(128);
  p.x = take(inputs), p.q = one_block ? take(inputs) : p.x;
  p.k = take(tile), p.v = take(tile);
  p.eta = take(4 * C), p.alpha = take(4 * C), p.erase = take(4 * C), p.decay_after = take(4 * C + 4);
  p.solve = take(1024 * panels * (panels + 1) / 2), p.before = take(4 * C), p.after = take(4 * C);
  p.decay_panel = take(4 * panels), p.e2 = take(32 * C), p.es = take_scalar(4 * C);
  p.norms = take(64 * C), p.gain = take(32 * C), p.sums = one_block ? take_scalar(8 * kPanel) : take(64 * kPanel);
  p.partial = take(4 * (one_block ? 10 : 2 * kWarps) * C);
  p.delta1s = take_scalar(16384 / D), p.base1s = take_scalar(16384 / D);
  p.weights = take(kWarps * 16 * 512), p.w1 = p.weights + kWarps * 8 * 512;
  p.base = -1, p.more_d = -1;
  if (one_block) {
    p.w1 = p.weights + (6 * 8 + 2 * 16) * 512;
    p.a = take(320 * C * 2), p.at_v = p.parts = p.solved = take(192 * C * 2);
    p.d = take(6 * 8 * 512), p.e = take(3 * tile);
    p.scratch_bytes = 2 * 16 * 512;
  } else {
    p.a = take(64 << 10), p.at_v = p.parts = p.a + (32 << 10);
    p.d = take(32 << 10);
    // a scalar memory's warps have no errors of D numbers, the others have partial outputs that nobody needs
    // meanwhile
    p.e = p.solved = take(kWarps * (panels - 1) * 512);
    p.scratch_bytes = 32 << 10;
  }
  p.shared_bytes = at;
  return p;
}

template <int N> constexpr Plan kWarpgroupPlan = make_warpgroup_plan(N, true);
static_assert(kWarpgroupPlan<64>.shared_bytes <= 227 << 10 && kWarpgroupPlan<256>.shared_bytes <= 227 << 10);

}  // namespace hope
